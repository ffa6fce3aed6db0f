"""Grading what others wrote: checks run here, the submission in a sandbox, values cross between the two.

A result is *graded*; or *needs-review*, where the submission's process was stopped or ended by itself, which a slow
machine may have caused too; or *unreadable*. Points that are not given always have a reason.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from moe_course.grading.core import (
    Invariant,
    Question,
    RemoteError,
    grade,
    load_exercise,
    ungraded,
)
from moe_course.grading.sandbox import Limits, Sandbox
from moe_course.grading.session import Remote, Session

GRADED, NEEDS_REVIEW, UNREADABLE = "graded", "needs-review", "unreadable"
MOST_CELLS = 500
MOST_SOURCE = 2_000_000  # characters of all cells

Private = dict[
    str, tuple[Invariant, ...]
]  # an instructor's own invariants, by question


@dataclass(frozen=True)
class Verdict:
    """What became of one question of one submission."""

    question: str
    title: str
    points: int
    out_of: int
    status: str
    reason: str
    seconds: float
    lines: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Result:
    """What became of one submission: one verdict per question, whatever happened."""

    status: str
    reason: str
    verdicts: tuple[Verdict, ...]
    seconds: float
    sandboxed: bool
    troubles: tuple[str, ...] = field(default=())
    final: bool = True  # False where the judge itself failed: the next run tries again

    @property
    def points(self) -> int:
        return sum(verdict.points for verdict in self.verdicts)


# --- One submission ------------------------------------------------------------------


def judge(
    cells: list[str],
    number: str,
    start: Callable[[], Sandbox],
    *,
    seed: str = "",
    private: Private | None = None,
    limits: Limits | None = None,
    sandboxed: bool = True,
) -> Result:
    """Grade the code cells of one submission; `start` gives a fresh worker each time it is called.

    The same cells, checks and seed give the same points. Raises SandboxError alone: that is the machine's fault, and
    no submission's.
    """
    limits = limits or Limits()
    begin = time.monotonic()
    exercise = load_exercise(number)
    questions = [
        replace(q, invariants=(*q.invariants, *(private or {}).get(q.id, ())))
        for q in exercise.questions
    ]
    session = Session(cells, start, limits)
    verdicts = []
    try:
        for question in questions:
            verdicts.append(_one(session, question, seed))
    finally:
        session.close()
    reasons = [
        f"{v.question}: {v.reason}" for v in verdicts if v.status == NEEDS_REVIEW
    ]
    stopped = [f"cell {n}: {why}" for n, why in sorted(session.skipped.items())]
    raised = [f"cell {n}: {why}" for n, why in sorted(session.troubles.items())]
    status = NEEDS_REVIEW if reasons or stopped else GRADED
    return Result(
        status,
        "; ".join(dict.fromkeys(stopped + reasons)),
        tuple(verdicts),
        time.monotonic() - begin,
        sandboxed,
        tuple(stopped + raised),
    )


def _one(session: Session, question: Question, seed: str) -> Verdict:
    begin = time.monotonic()
    session.lost = ""
    try:
        kind = session.kinds([question.answer])[question.answer]
        if kind == "callable":
            # The draws of a class: of its seed and the question alone.
            answer = Remote(session, question.answer)
            outcome = grade(question, answer, seed=f"{seed}/{question.id}")
        elif kind == "missing":
            outcome = ungraded(question, _missing(session, question), attempted=False)
        else:
            text = f"{question.answer} is no function but {kind}"
            outcome = ungraded(question, text, attempted=False)
    except RemoteError as error:
        outcome = ungraded(question, str(error))
    failed = next((line for line in outcome.lines if line.status != "passed"), None)
    reason = session.lost or ("" if failed is None else failed.detail or failed.name)
    return Verdict(
        question.id,
        question.answer,
        outcome.points,
        outcome.out_of,
        NEEDS_REVIEW if session.lost else GRADED,
        reason,
        time.monotonic() - begin,
        tuple(asdict(line) for line in outcome.lines),
    )


def _missing(session: Session, question: Question) -> str:
    text = f"{question.answer} is missing: no cell defines it"
    for number, why in sorted({**session.troubles, **session.skipped}.items()):
        if question.answer in session.cells[number - 1]:
            return f"{question.answer} is missing: in cell {number} {why}"
    return text


def nothing_graded(
    number: str, status: str, reason: str, private: Private | None = None
) -> Result:
    """The result of a submission that no worker saw."""
    verdicts = [
        Verdict(
            q.id, q.answer, 0,
            0 if q.lacking else q.points + sum(i.points for i in (private or {}).get(q.id, ())),
            status, reason, 0.0,
        )
        for q in load_exercise(number).questions
    ]  # fmt: skip
    return Result(status, reason, tuple(verdicts), 0.0, True)
