"""Reading what was handed in: whatever it is, there is one submission with its code, or with a reason."""

from __future__ import annotations

import io
import json
import zipfile
from contextlib import suppress
from pathlib import Path

import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_course.grading import submissions
from moe_course.grading.run import UnreadableError
from moe_course.grading.submissions import MOST_BYTES, code_cells, collect, read

ROOT = Path(__file__).parents[2]
STUB = (ROOT / "exercises" / "02_math.ipynb").read_bytes()


def changed(**entries):
    return json.dumps(json.loads(STUB) | entries).encode()


def without_metadata(cells):
    return json.dumps({"cells": cells, "metadata": {}, "nbformat": 4}).encode()


def code(source):
    return {"cell_type": "code", "source": source}


def test_the_code_is_that_which_nbformat_reads():
    expected = [
        cell.source
        for cell in nbformat.reads(STUB.decode(), 4).cells
        if cell.cell_type == "code"
    ]
    assert code_cells(STUB, "02") == expected
    assert code_cells(b"\xef\xbb\xbf" + STUB, "02") == expected


def test_a_notebook_that_lost_its_metadata_is_known_by_its_checks_or_answers():
    for source in ('check("02.1", f)', ["def gate_", "matrix(logits, k): pass"]):
        assert code_cells(without_metadata([code(source)]), "02")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"  \n", "empty"),
        (STUB[: len(STUB) // 2], "cut off"),
        (b"\xff\xfe" + STUB, "UTF-8"),
        (b"[1, 2]", "no notebook"),
        (b'{"a": 1}', "no notebook"),
        (b"hello", "not JSON"),
        (b"[" * 200_000, "no notebook"),
        (changed(cells=[{"cell_type": "code"}]), "no source"),
        (changed(cells=[3]), "no source"),
        (changed(cells=[code([1, 2])]), "no source"),
        (changed(cells=[code("x")] * 2001), "cells"),
        (changed(metadata={"moe_course": {"exercise": "01"}}, cells=[]), "is exercise 01, not 02"),
        (without_metadata([code("print(1)")]), "not of exercise 02"),
        (changed(metadata=[], cells=[code("print(1)")]), "not of exercise 02"),
    ],
)  # fmt: skip
def test_what_is_no_notebook_of_the_exercise_is_told(content, says):
    with pytest.raises(UnreadableError, match=says):
        code_cells(content, "02")


@given(st.binary(max_size=300))
def test_no_bytes_crash_the_reader(content):
    with suppress(UnreadableError):
        assert isinstance(code_cells(content, "02"), list)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                ["cells", "metadata", "source", "cell_type", "moe_course", "exercise"]
            ),
            inner,
            max_size=4,
        )
    ),
)


@given(json_values)
def test_no_json_crashes_the_reader(value):
    with suppress(UnreadableError):
        assert isinstance(code_cells(json.dumps(value).encode(), "02"), list)


def archive(**members):
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return target.getvalue()


def test_files_folders_and_archives(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "ada.ipynb").write_bytes(STUB)
    (tmp_path / "a" / "notes.txt").write_text("no")
    (tmp_path / "a" / ".ipynb_checkpoints").mkdir()
    (tmp_path / "a" / ".ipynb_checkpoints" / "ada.ipynb").write_bytes(STUB)
    (tmp_path / "a" / "class.zip").write_bytes(
        archive(**{"x/ben.ipynb": STUB, "__MACOSX/x/ben.ipynb": b"", "x/notes.md": ""})
    )
    (tmp_path / "cleo.ipynb").write_bytes(STUB)
    found = [*read(collect([tmp_path / "a", tmp_path / "cleo.ipynb"]))]
    assert {s.student for s in found} == {"ada", "ben", "cleo"}
    assert all(s.content == STUB for s in found)


def test_equal_names_are_told_apart(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "hw.ipynb").write_bytes(STUB)
    names = [s.student for s in collect([tmp_path])]
    assert names == ["one/hw", "two/hw"]
    again = [s.student for s in collect([tmp_path / "one", tmp_path / "two"])]
    assert len(set(again)) == 2


def test_what_is_no_plain_file_has_a_reason(tmp_path):
    (tmp_path / "folder.ipynb").mkdir()
    (tmp_path / "link.ipynb").symlink_to(ROOT / "exercises" / "02_math.ipynb")
    (tmp_path / "gone.ipynb").symlink_to(tmp_path / "nowhere")
    with (tmp_path / "large.ipynb").open("wb") as file:
        file.truncate(300_000_000)
    (tmp_path / "broken.zip").write_bytes(b"PK\x03\x04 no archive")
    reasons = {s.name: s.reason for s in read(collect([tmp_path]))}
    assert "a folder" in reasons["folder.ipynb"]
    assert "symbolic link" in reasons["link.ipynb"]
    assert "symbolic link" in reasons["gone.ipynb"]
    assert "larger than 20 MiB" in reasons["large.ipynb"]
    assert "no zip archive" in reasons["broken.zip"]
    assert all(not s.content for s in read(collect([tmp_path])))


def test_an_archive_writes_nothing_and_a_bomb_does_not_burst(tmp_path, monkeypatch):
    bomb = bytes(MOST_BYTES + 1)
    members = {"../../up.ipynb": STUB, "/abs.ipynb": STUB, "bomb.ipynb": bomb}
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "x.zip"
    path.write_bytes(archive(**members))
    found = {s.name: s for s in read(collect([path]))}
    assert found["x.zip/../../up.ipynb"].content == STUB
    assert "larger" in found["x.zip/bomb.ipynb"].reason
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["in", "x.zip"]
    monkeypatch.setattr(submissions, "MOST_MEMBERS", 2)
    (only,) = read(collect([path]))
    assert "more than 2 files" in only.reason


def test_a_damaged_member_does_not_hide_the_others(tmp_path):
    raw = bytearray(archive(**{"a.ipynb": STUB, "b.ipynb": STUB}))
    at = raw.index(b"a.ipynb") + 60
    raw[at : at + 20] = bytes(20)
    (tmp_path / "x.zip").write_bytes(raw)
    found = {s.student: s for s in read(collect([tmp_path / "x.zip"]))}
    assert found["a"].reason
    assert found["b"].content == STUB


def test_what_changes_between_finding_and_reading_has_a_reason(tmp_path):
    (tmp_path / "a.ipynb").write_bytes(STUB)
    (tmp_path / "b.ipynb").write_bytes(STUB)
    (tmp_path / "c.zip").write_bytes(archive(**{"d.ipynb": STUB, "e.ipynb": STUB}))
    found = collect([tmp_path])
    (tmp_path / "a.ipynb").unlink()
    (tmp_path / "b.ipynb").unlink()
    (tmp_path / "b.ipynb").symlink_to("/etc/passwd")
    (tmp_path / "c.zip").write_bytes(archive(**{"e.ipynb": STUB}))
    reasons = {s.student: s.reason for s in read(found)}
    assert "cannot be read" in reasons["a"]
    assert "symbolic link" in reasons["b"]
    assert "damaged" in reasons["d"]
    assert not reasons["e"]


def test_nothing_to_grade_is_an_error(tmp_path):
    with pytest.raises(UnreadableError, match="no notebook in"):
        collect([tmp_path])
    with pytest.raises(UnreadableError, match="no such file or folder"):
        collect([tmp_path / "nowhere"])
