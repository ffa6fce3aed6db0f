"""The judge: right answers earn full marks across the boundary, and hostile ones earn what is fair."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest
from hostile import CASES, THOROUGH, Case, solution

from moe_course.grading.core import load_exercise
from moe_course.grading.judge import judge
from moe_course.grading.sandbox import Limits, Sandbox, descendants, why_not

LIMITS = Limits(cell_seconds=6, call_seconds=6, memory_bytes=2 * 2**30)


@pytest.fixture(scope="module", autouse=True)
def _sandbox():
    reason = why_not()
    if reason is not None:
        pytest.skip(f"no sandbox here: {reason}")


def run(cells, number, **options):
    return judge(cells, number, lambda: Sandbox(LIMITS), limits=LIMITS, **options)


def test_the_catalogue_names_every_case_once():
    names = [case.name for case in CASES]
    assert len(names) == len(set(names)) >= 60
    assert set(names) >= THOROUGH


@pytest.mark.parametrize("number", ["01", "02", "03", "04", "05", "06", "07"])
def test_worked_solutions_earn_full_marks(number):
    result = run([source for _, source in solution(number)], number, seed="class 7")
    assert result.status == "graded"
    assert result.points == load_exercise(number).points
    assert not result.troubles


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, id=c.name, marks=[pytest.mark.thorough] * c.thorough)
        for c in CASES
    ],
)
def test_hostile_submissions_get_what_is_fair(case: Case):
    before = set(descendants(os.getpid()))
    begin = time.monotonic()
    result = run(case.cells(), case.exercise, seed="s")
    assert time.monotonic() - begin < 120
    assert result.status == case.status, (result.reason, result.troubles)
    for verdict in result.verdicts:
        if verdict.question in case.lost:
            assert verdict.points == 0, verdict
            assert verdict.reason
        else:
            assert verdict.points == verdict.out_of, verdict
        expected = "needs-review" if verdict.question in case.review else "graded"
        assert verdict.status == expected, verdict
    if case.says:
        said = [result.reason, *result.troubles, *(v.reason for v in result.verdicts)]
        assert any(case.says in text for text in said), said
    left = set(descendants(os.getpid())) - before
    assert not left, [Path(f"/proc/{p}/cmdline").read_bytes() for p in left]
    if "98765" in case.last:  # away from its parent, it is no descendant of ours
        assert b"98765" not in subprocess.check_output(["ps", "ax"])
