"""What a learner calls in an exercise notebook: `check`, `total`, `solution`."""

from __future__ import annotations

import inspect
import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import CodeType
from typing import Any

from moe_course.grading.core import Outcome, Question, grade, load_exercise

ATTEMPTS_BEFORE_SOLUTION = 2
RESULT_TYPE = "application/vnd.moe-course.result+json"

# Of this kernel: a slow question has the same cases throughout, so that what it computed need not be computed again.
_SLOW_SEED = secrets.randbits(32)

_attempts: dict[
    str, set[int]
] = {}  # of this kernel: the different answers tried for each question


def _fingerprint(function: Any) -> int:
    """Two answers count as two attempts when their code differs, not when the same cell runs twice."""
    function = inspect.unwrap(getattr(function, "func", function))
    code = getattr(function, "__code__", None) or getattr(
        type(function).__call__, "__code__", None
    )
    if code is None:
        return hash(type(function))

    def flat(c: CodeType) -> tuple[Any, ...]:
        constants = tuple(
            flat(x) if isinstance(x, CodeType) else repr(x) for x in c.co_consts
        )
        return (c.co_code, c.co_names, constants)

    return hash(flat(code))


def _grade(question: Question, answer: Any, seed: int | None = None) -> Outcome:
    return grade(
        question, answer, _SLOW_SEED if question.slow and seed is None else seed
    )


def check(question_id: str, answer: Any, seed: int | None = None) -> None:
    """Print which invariants of a question hold for your answer, and what to look at where one does not."""
    question = load_exercise(question_id[:2]).question(question_id)
    outcome = _grade(question, answer, seed)
    print(outcome.text())
    if outcome.full or not outcome.attempted:
        return
    tries = _attempts.setdefault(question_id, set())
    tries.add(_fingerprint(answer))
    print(f"  Read again: {question.link}")
    if len(tries) >= ATTEMPTS_BEFORE_SOLUTION:
        print(
            f'  Stuck after {len(tries)} attempts? solution("{question_id}") shows a worked answer.'
        )


def find_upwards(relative: str, start: Path | None = None) -> Path | None:
    """`relative` in the current folder or one above it, or beside the package."""
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents, Path(__file__).parents[2]):
        if (folder / relative).exists():
            return folder / relative
    return None


def worked_answer(question_id: str, master: Path) -> str:
    """The cell of an exercise's master that answers a question, without its markers."""
    cells = re.split(r"(?m)^# %%", master.read_text(encoding="utf-8"))
    for cell in cells:
        head, _, body = cell.partition("\n")
        if f'"{question_id}"' in head:
            return re.sub(r"(?m)^\s*# (BEGIN|END) SOLUTION\n", "", body).strip()
    raise ValueError(f"{master.name} has no cell tagged {question_id!r}")


def solution(question_id: str) -> None:
    """Print a worked answer, once two different answers of yours have been checked."""
    exercise = load_exercise(question_id[:2])
    exercise.question(question_id)
    tries = len(_attempts.get(question_id, ()))
    if tries < ATTEMPTS_BEFORE_SOLUTION:
        left = ATTEMPTS_BEFORE_SOLUTION - tries
        print(
            f"{question_id}: check {left} more attempt{'s' * (left > 1)} of your own first."
        )
        return
    master = find_upwards(f"solutions/{exercise.stem}.py")
    if master is None:
        print(
            f"{question_id}: this copy of the course comes without solutions; ask whoever teaches it."
        )
        return
    print(worked_answer(question_id, master))


def grade_all(
    number: str, names: Mapping[str, Any], seed: int | None = None
) -> list[Outcome]:
    """The outcome of every question of an exercise, the answers looked up by name."""
    return [
        _grade(question, names.get(question.answer), seed)
        for question in load_exercise(number).questions
    ]


def summary(number: str, outcomes: list[Outcome]) -> str:
    """A table of points, the total, and what comes next."""
    exercise = load_exercise(number)
    rows = [
        f"  {o.points:>3} of {o.out_of:>2}  {o.question} {o.title}"
        if not o.left_out
        else f"         –  {o.question} {o.title} (left out)"
        for o in outcomes
    ]
    points = sum(o.points for o in outcomes)
    out_of = sum(o.out_of for o in outcomes)
    reasons = {o.lines[0].detail for o in outcomes if o.left_out}
    unfinished = next((o for o in outcomes if not o.full), None)
    following = (
        f"{unfinished.question} {unfinished.title}"
        if unfinished
        else exercise.next_step
    )
    rows += [f"  {points:>3} of {out_of:>2}  in all", f"Next: {following}"]
    rows += [f"Left out: {reason}" for reason in sorted(reasons)]
    return "\n".join(rows)


def _notebook_names() -> Mapping[str, Any]:
    import __main__

    return vars(__main__)


def total(number: str) -> bool:
    """Print the points of a whole exercise. True at full marks."""
    outcomes = grade_all(number, _notebook_names())
    print(summary(number, outcomes))
    return all(outcome.full for outcome in outcomes)


def emit_result(question_id: str) -> None:
    """Hand the outcome of this kernel's answer to `moe-course check`, as a display of our own type."""
    from IPython.display import display

    question = load_exercise(question_id[:2]).question(question_id)
    outcome = _grade(question, _notebook_names().get(question.answer))
    display({RESULT_TYPE: json.dumps(asdict(outcome)), "text/plain": ""}, raw=True)
