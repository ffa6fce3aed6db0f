"""The class that never was: the same on every machine, and graded as the instructors' page says."""

from __future__ import annotations

import ast
import csv
import random
import re

import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_course import cli, records
from moe_course.grading import sample, sandbox
from moe_course.grading.sample import answer, slip, write_class
from moe_course.grading.submissions import code_cells

WORKED = "def f(a, b):\n    # why\n    return 3 * a + b // 2 if a < b else 0"
STUB = "def f(a, b):\n    # Your code here.\n"


def nodes(tree):
    """Every node as text, without those below it."""
    return [
        repr(node.value) if isinstance(node, ast.Constant) else type(node).__name__
        for node in ast.walk(tree)
    ]


@given(st.integers(0, 10_000))
def test_a_slip_changes_one_thing(seed):
    before = nodes(ast.parse(WORKED))
    after = nodes(ast.parse(slip(WORKED, random.Random(seed))))
    assert len(before) == len(after)
    assert sum(a != b for a, b in zip(before, after, strict=True)) == 1


def test_nothing_to_slip_on_is_left_alone():
    assert slip("def f(a):\n    return a", random.Random(0)) == (
        "def f(a):\n    return a"
    )


def test_skill_decides():
    rng = random.Random(0)
    assert answer(WORKED, STUB, 1.0, rng) == WORKED
    handed_in = {answer(WORKED, STUB, 0.0, rng) for _ in range(200)}
    assert WORKED not in handed_in
    assert STUB in handed_in
    assert any("unfinished" in text for text in handed_in)
    assert len(handed_in) > 8


@pytest.mark.parametrize("exercise", ["01", "02", "03"])
def test_the_same_seed_writes_the_same_class(tmp_path, root, exercise):
    first = write_class(root, tmp_path / "a", exercise, 60, 7)
    second = write_class(root, tmp_path / "b", exercise, 60, 7)
    other = write_class(root, tmp_path / "c", exercise, 60, 8)
    assert len({path.name for path in first}) == 60
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    assert [p.read_bytes() for p in first] != [p.read_bytes() for p in other]
    cut = first[-4].read_text()
    assert "cells" in cut
    for path in first:
        if path != first[-4]:
            nbformat.validate(nbformat.reads(path.read_text(), 4))
            assert code_cells(path.read_bytes(), exercise)
    assert "while True" in first[-1].read_text()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "not empty"),
        (["--students", "0"], "1 to 100,000"),
        (["--exercise", "77"], "no exercise '77'"),
    ],
)
def test_what_cannot_be_written_is_one_line(tmp_path, capsys, words, says):
    place = tmp_path / "class"
    if not words:
        place.mkdir()
        (place / "x").write_text("")
    assert sample.main([str(place), *words]) == 2
    assert says in capsys.readouterr().err


def test_the_instructors_page_quotes_the_benchmark(root):
    page = (root / "book/start/instructors.md").read_text("utf-8")
    told = re.search(
        r"(\d+) submissions of exercise 01 and (\d+) of 02 a minute,\s+([\d.]+) and ([\d.]+) times as many as",
        page,
    ).groups()
    rows = records.load(root / "moe_course/data/records/grading_cpu.json").rows
    assert [r["exercise"] for r in rows] == ["01", "02"]
    assert list(told[:2]) == [f"{r['ours_per_minute']:.0f}" for r in rows]
    assert list(told[2:]) == [f"{r['ratio']:.1f}" for r in rows]


@pytest.mark.thorough
def test_the_instructors_page_tells_what_happens(tmp_path, root, capsys):
    reason = sandbox.why_not()
    if reason is not None:
        pytest.skip(f"no sandbox here: {reason}")
    page = (root / "book/start/instructors.md").read_text("utf-8")
    part = page[page.index("## A class of thirty") :]
    part = part[: part.index("\n## ", 3)]
    # The commands of the page, and what it says of their outcome.
    (exercise, students, seed) = re.search(
        r"grading\.sample class/ --exercise (\d\d) --students (\d+) --seed (\d+)", part
    ).groups()
    words = [str(tmp_path / "class"), "--exercise", exercise]
    assert sample.main([*words, "--students", students, "--seed", seed]) == 0
    grading = re.search(r'--seed "([^"]+)"', part)[1]
    out = tmp_path / "grades"
    words = ["grade", str(tmp_path / "class"), "--exercise", exercise, "-o", str(out)]
    assert cli.main([*words, "--seed", grading, "-j", "2"]) == 0
    told = re.search(r"^(\d+ submissions: .*?)\. grades/", part, re.MULTILINE)[1]
    assert told in capsys.readouterr().out
    with (out / "grades.csv").open(newline="") as file:
        rows = {(r["student"], r["question"]): r for r in csv.DictReader(file)}
    shown = re.findall(r"^([a-z]+),(\d\d\.\d),(\d+),([a-z-]+),(.*?),", part, re.M)
    assert len(shown) >= 3
    for student, question, points, status, why in shown:
        row = rows[student, question]
        assert (row["points"], row["status"]) == (points, status)
        assert row["reason"].startswith(why.strip('"').removesuffix("..."))
