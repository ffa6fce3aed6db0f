"""File names and gradebooks of Canvas and Moodle."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

from moe_course import cli
from moe_course.grading.roster import RosterError, assign, filled, read_roster
from moe_course.grading.submissions import Found

CANVAS = """\ufeffStudent,ID,SIS User ID,SIS Login ID,Section,Exercise 01 (11),Exercise 02 (12)
    Points Possible,,,,,20,25
"Doe, Jane",1234,s1,jane,A,18,
"Roe, Rick",77,s2,rick,A,,
"Student, Test",,,,A,,
"""
MOODLE = """Identifier,Full name,Email address,Status,Grade,Maximum Grade
Participant 501,Jane Doe,j@x.org,Submitted,,25.00
Participant 502,Rick Roe,r@x.org,No submission,,25.00
"""


def files(*names):
    return [Found("", name, Path(name)) for name in names]


@pytest.fixture
def canvas(tmp_path):
    (tmp_path / "canvas.csv").write_text(CANVAS, encoding="utf-8")
    return read_roster(tmp_path / "canvas.csv")


@pytest.fixture
def moodle(tmp_path):
    (tmp_path / "moodle.csv").write_text(MOODLE)
    return read_roster(tmp_path / "moodle.csv")


def test_canvas_names_and_the_last_attempt(canvas):
    found = files(
        "doejane_1234_900_02_math.ipynb",
        "in.zip/doejane_LATE_1234_950_02_math-2.ipynb",
        "doejane_1234_950_02_math-1.ipynb",
        "roerick_77_3_02_math.ipynb",
        "somebody_9_3_02_math.ipynb",
        "notes.ipynb",
    )
    counted, strangers = assign(found, canvas)
    assert [(s.student, s.name) for s in counted] == [
        ("1234", "in.zip/doejane_LATE_1234_950_02_math-2.ipynb"),
        ("77", "roerick_77_3_02_math.ipynb"),
    ]
    assert strangers == ["somebody_9_3_02_math.ipynb", "notes.ipynb"]


def test_moodle_names_with_and_without_folders(moodle):
    found = files(
        "Jane Doe_501_assignsubmission_file_/02_math.ipynb",
        "in.zip/Rick Roe_502_assignsubmission_file_02_math.ipynb",
        "02_math.ipynb",
    )
    counted, strangers = assign(found, moodle)
    assert [s.student for s in counted] == ["501", "502"]
    assert strangers == ["02_math.ipynb"]


def table(text):
    return list(csv.reader(io.StringIO(text)))


def test_the_gradebook_comes_back_with_one_column_filled(canvas, moodle):
    before = table(CANVAS.lstrip("\ufeff"))
    after = table(filled(canvas, {"1234": 25, "9": 3}, "Exercise 02 (12)"))
    assert after[2][-1] == "25"
    after[2][-1] = ""
    assert after == before
    after = table(filled(moodle, {"502": 7}))
    assert [line[4] for line in after] == ["Grade", "", "7"]
    with pytest.raises(RosterError, match=r"no column ''.*Exercise 02 \(12\)"):
        filled(canvas, {})
    with pytest.raises(RosterError, match="no column 'x'"):
        filled(moodle, {}, "x")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "neither"),
        (b"a,b\n1,2\n", "neither"),
        (b"Student,ID\nx,\n", "no line"),
        (b"\xff\xfe\x00", "cannot read"),
    ],
)
def test_another_file_is_refused(tmp_path, content, says):
    (tmp_path / "r.csv").write_bytes(content)
    with pytest.raises(RosterError, match=says):
        read_roster(tmp_path / "r.csv")
    with pytest.raises(RosterError, match="cannot read"):
        read_roster(tmp_path / "gone.csv")


def test_the_command_grades_the_last_attempt_and_fills_the_gradebook(tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("doejane_1234_5_a.ipynb", "doejane_1234_6_a-1.ipynb", "x_5_5_a.ipynb"):
        (folder / name).write_text("nothing")
    roster = tmp_path / "canvas.csv"
    roster.write_text(CANVAS)
    out = tmp_path / "out"
    words = ["grade", str(folder), "--exercise", "01", "-o", str(out), "-j", "1"]
    words += ["--unsafe-no-sandbox", "--roster", str(roster), "--export", "canvas"]
    assert cli.main(words) == 2
    assert "--column" in capsys.readouterr().err
    assert cli.main([*words, "--column", "Exercise 02 (12)"]) == 0
    said = capsys.readouterr()
    assert "x_5_5_a.ipynb belongs to nobody" in said.err
    assert "1 submissions: 1 unreadable" in said.out
    lines = table((out / "canvas.csv").read_text())
    assert (lines[2][1], lines[2][-1]) == ("1234", "")  # unreadable is no 0
    overrides = tmp_path / "o.csv"
    rows = [f"1234,01.{n},1,seen on paper" for n in range(1, 8)]
    overrides.write_text("\n".join(["student,question,points,reason", *rows]))
    more = ["--column", "Exercise 02 (12)", "--overrides", str(overrides)]
    assert cli.main([*words, *more]) == 0
    assert table((out / "canvas.csv").read_text())[2][-1] == "7"
    assert cli.main([*words[:-2], "--export", "moodle"]) == 2
    assert "give it with --roster" in capsys.readouterr().err
