"""Invariants, questions and their outcomes: one set of checks for notebook, command line, tests and judge.

A question is a list of named invariants. Each is a plain function of the learner's answer and a source of random
numbers; it returns when the invariant holds and raises `Failure` on the smallest case where it does not. The first
invariant discriminates: the others are not reached, and earn nothing, until it passes.
"""

from __future__ import annotations

import importlib
import importlib.util
import random
import sys
import traceback
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

from moe_course.grading.calls import is_tensor, unchanged

CHECKS = Path(__file__).parent / "checks"

MOST_ENTRIES = 24  # of a tensor that a message spells out
# What runs between a check and an answer in another process, and is no answer.
PLUMBING = {
    __name__,
    *(f"{__package__}.{m}" for m in ("calls", "judge", "sandbox", "session", "wire")),
    f"{__package__}.tensors",
    "moe_course.kernels.trace",
}

LONGEST = 300  # characters of anything a learner's code hands us

PASSED, FAILED, NOT_REACHED = "passed", "failed", "not reached"
LEFT_OUT = "left out"  # cannot be checked on this machine: counts neither way
MARKS = {PASSED: "✓", FAILED: "✗", NOT_REACHED: "–", LEFT_OUT: "·"}
# What a question may need, and why it is not everywhere.
NEEDS = {
    "triton": "Triton is not installed here (it runs on Linux): this question is left out, and its points with it",
}


class Failure(AssertionError):
    """An invariant does not hold, with the smallest case that shows it.

    `hint=False` where the text says itself what is amiss, and the usual mistake is not it.
    """

    def __init__(self, text: str, hint: bool = True) -> None:
        super().__init__(text)
        self.hint = hint


class RemoteError(Exception):
    """A learner's function that runs in another process raised; the text says what and where."""


class PackageAnswer(Exception):
    """The answer called the package instead of being one."""


@dataclass(frozen=True)
class Invariant:
    """What must hold, worth `points`; `test(answer, rng)` raises Failure; `hint` diagnoses the usual mistake.

    A text that the test returns is shown where it passes.
    """

    name: str
    points: int
    test: Callable[[Answer, random.Random], str | None]
    hint: str


@dataclass(frozen=True)
class Question:
    """One question: `answer` is the name its answer has in the notebook, `link` the page that teaches it."""

    id: str
    title: str
    answer: str
    difficulty: int  # 1 to 3
    minutes: int
    link: str
    invariants: tuple[Invariant, ...]
    allowed: tuple[str, ...] = ()  # modules of the package that an answer may call
    needs: str = (
        ""  # a module, one of NEEDS: where it is missing, the question is left out
    )
    slow: bool = False  # takes minutes: a notebook draws its cases once, tests draw few

    def __post_init__(self) -> None:
        if not self.invariants or any(
            not i.name or not i.hint or i.points < 0 for i in self.invariants
        ):
            raise ValueError(
                f"question {self.id}: every invariant needs a name, a hint and points of 0 or more"
            )
        if (
            self.difficulty not in (1, 2, 3)
            or self.minutes < 1
            or not self.link
            or not self.title
        ):
            raise ValueError(
                f"question {self.id} needs a title, a difficulty of 1 to 3, minutes and a link"
            )

    @property
    def points(self) -> int:
        return sum(invariant.points for invariant in self.invariants)

    @property
    def lacking(self) -> str:
        """Why the question cannot be checked on this machine, "" where it can."""
        if not self.needs or importlib.util.find_spec(self.needs) is not None:
            return ""
        return NEEDS[self.needs]


@dataclass(frozen=True)
class Exercise:
    """The questions of one notebook, and where a learner goes from there."""

    number: str
    topic: str  # the stem of its files is number_topic
    title: str
    questions: tuple[Question, ...]
    next_step: str

    @property
    def stem(self) -> str:
        return f"{self.number}_{self.topic}"

    @property
    def points(self) -> int:
        return sum(question.points for question in self.questions)

    def question(self, question_id: str) -> Question:
        for question in self.questions:
            if question.id == question_id:
                return question
        known = ", ".join(question.id for question in self.questions)
        raise ValueError(
            f"exercise {self.number} has no question {question_id!r}; it has {known}"
        )


@dataclass(frozen=True)
class Line:
    """What became of one invariant."""

    name: str
    status: str
    points: int
    detail: str = ""
    hint: str = ""


@dataclass(frozen=True)
class Outcome:
    """What became of one question."""

    question: str
    title: str
    out_of: int
    lines: tuple[Line, ...]
    attempted: bool = True

    @property
    def points(self) -> int:
        return sum(line.points for line in self.lines if line.status == PASSED)

    @property
    def full(self) -> bool:
        """Whether nothing is left to do here."""
        return all(line.status in (PASSED, LEFT_OUT) for line in self.lines)

    @property
    def left_out(self) -> bool:
        return any(line.status == LEFT_OUT for line in self.lines)

    def text(self) -> str:
        if self.left_out:
            return f"{self.question} {self.title}: {self.lines[0].detail}"
        rows = [f"{self.question} {self.title}: {self.points} of {self.out_of} points"]
        for line in self.lines:
            rows.append(
                f"  {MARKS[line.status]} {line.name}"
                + (" (not reached)" * (line.status == NOT_REACHED))
            )
            rows += [f"      {row}" for row in line.detail.splitlines()]
            if line.hint:
                rows.append(f"      Hint: {line.hint}")
        return "\n".join(rows)


def exercise_numbers() -> list[str]:
    return sorted(path.stem.split("_")[0] for path in CHECKS.glob("[0-9][0-9]_*.py"))


@cache
def load_exercise(number: str) -> Exercise:
    """The checks of one exercise, from checks/NN_topic.py. Raises ValueError when there is no such exercise."""
    found = (
        sorted(CHECKS.glob(f"{number}_*.py"))
        if len(number) == 2 and number.isdecimal()
        else []
    )
    if not found:
        known = ", ".join(exercise_numbers())
        raise ValueError(f"there is no exercise {number!r}; the exercises are {known}")
    module = importlib.import_module(f"moe_course.grading.checks.{found[0].stem}")
    exercise = module.EXERCISE
    assert isinstance(exercise, Exercise)
    return exercise


@contextmanager
def _watch(allowed: tuple[str, ...], used: set[str]) -> Any:
    """Note every function of moe_course that is called, so that the package's own code is no answer."""

    def note(frame: FrameType, event: str, _arg: object) -> None:
        if event != "call":
            return
        module = frame.f_globals.get("__name__") or ""
        ours = module == "moe_course" or module.startswith("moe_course.")
        if (
            ours
            and module not in PLUMBING
            and not module.startswith(allowed or ("\0",))
        ):
            used.add(f"{module}.{frame.f_code.co_qualname}")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(before)


def _own_line(error: BaseException) -> str:
    """The learner's own line that failed: the last frame outside this package and the standard library."""
    if isinstance(error, RemoteError):
        return str(error)
    library = str(Path(random.__file__).parent)
    here = str(Path(__file__).parents[1])
    frames = traceback.extract_tb(error.__traceback__)
    own = [
        f
        for f in frames
        if not f.filename.startswith((library, here))
        and "site-packages" not in f.filename
    ]
    where = ""
    if own and own[-1].line:
        where = f"\n    line {own[-1].lineno} of your cell: {own[-1].line}"
    return f"your code raised {type(error).__name__}: {str(error)[:LONGEST]}{where}"


class Answer:
    """The learner's function, called on copies of its arguments and watched for calls into the package."""

    def __init__(
        self, function: Callable[..., Any], allowed: tuple[str, ...] = ()
    ) -> None:
        self.function, self.allowed = function, allowed
        self.calls = self.empty = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = deepcopy((args, kwargs))
        used: set[str] = set()
        self.calls += 1
        try:
            with _watch(self.allowed, used):
                result = self.function(*given[0], **given[1])
        except Failure as failure:  # of a function that lives in another process
            text = f"{describe(*args, **kwargs)}: {failure}"
            raise Failure(text, hint=False) from failure
        except (Exception, SystemExit) as error:
            if used:
                raise PackageAnswer(", ".join(sorted(used))) from error
            text = f"{describe(*args, **kwargs)}: {_own_line(error)}"
            raise Failure(text, hint=False) from error
        if used:
            raise PackageAnswer(", ".join(sorted(used)))
        if not unchanged(given, (args, kwargs)):
            changed = "your code changed its arguments; work on a copy"
            raise Failure(f"{describe(*args, **kwargs)}: {changed}", hint=False)
        self.empty += result is None
        return result


class Shown(str):
    """A text that stands for a value in a message, without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)

    @classmethod
    def of(cls, tensor: Any) -> Shown:
        """A small tensor as nested lists, a larger one as its type and shape."""
        if tensor.numel() > MOST_ENTRIES:
            return cls(
                f"<{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}>"
            )

        def rounded(entry: Any) -> Any:
            if isinstance(entry, list):
                return [rounded(e) for e in entry]
            return float(f"{entry:.4g}") if isinstance(entry, float) else entry

        return cls(rounded(tensor.detach().cpu().tolist()))


def shown(value: object) -> str:
    """`repr`, but short, and never failing: a learner's object may have a broken one."""
    if is_tensor(value):
        value = Shown.of(value)
    try:
        text = repr(value)
    except Exception:  # also: an integer of more digits than Python prints
        return f"<{type(value).__name__}>"
    return text if len(text) <= LONGEST else text[:LONGEST] + "..."


def describe(*args: Any, **kwargs: Any) -> str:
    return ", ".join(
        [shown(a) for a in args] + [f"{k}={shown(v)}" for k, v in kwargs.items()]
    )


def same(got: object, want: object) -> bool:
    """Equal, and of the same plain type: no float, no bool, no object with an equality of its own."""
    if isinstance(want, tuple):
        matching = isinstance(got, tuple) and len(got) == len(want)
        return matching and all(map(same, tuple(got), want))  # type: ignore[arg-type]
    return type(got) is type(want) and got == want


def mismatch(got: object, want: object, what: str) -> Failure:
    """What was expected and what came; where only the type is amiss, that in place of a hint."""
    text = f"{what}:\n    expected {shown(want)}, got {shown(got)}"
    if type(got) is type(want) or (isinstance(want, tuple) and isinstance(got, tuple)):
        return Failure(text)
    try:
        right = bool(got == want)
    except Exception:
        right = False
    if isinstance(want, int) and right and isinstance(got, float):
        return Failure(
            f"{text} (a float; counts are exact integers: use // instead of /)",
            hint=False,
        )
    if isinstance(want, int) and right:
        return Failure(
            f"{text} (as {type(got).__name__}; return a plain int)", hint=False
        )
    if isinstance(want, tuple) and isinstance(got, list):
        return Failure(f"{text} (a list; return a tuple)", hint=False)
    if got is None:
        return Failure(f"{text} (is a `return` missing on some path?)", hint=False)
    return Failure(text)


def expect_count(
    answer: Answer, cases: Iterable[dict[str, Any]], oracle: Callable[..., Any]
) -> None:
    """The answer equals the oracle on every case, as exact integers; the smallest failing case is reported.

    A case is a dict of keyword arguments. Integers only: a count of parameters that went through a float is
    wrong from 2^53 on. A tuple of integers is compared element by element.
    """
    for case in sorted(cases, key=case_size):
        want, got = oracle(**case), answer(**case)
        if not same(got, want):
            raise mismatch(got, want, describe(**case))


def case_size(case: dict[str, Any]) -> int:
    return sum(value for value in case.values() if isinstance(value, int))


def grade(question: Question, function: Any, seed: int | str | None = None) -> Outcome:
    """Run a question's invariants on an answer. The same seed draws the same cases."""
    if question.lacking:
        return ungraded(question, "", attempted=False)
    if not callable(function):
        missing = "is missing: run the cell that defines it"
        if function is not None:
            missing = f"is no function but {type(function).__name__}: pass the function itself"
        return ungraded(question, f"{question.answer} {missing}", attempted=False)
    answer = Answer(function, question.allowed)
    rng = random.Random(seed)
    lines: list[Line] = []
    for number, invariant in enumerate(question.invariants):
        try:
            note = invariant.test(answer, rng)
        except PackageAnswer as used:
            return ungraded(
                question,
                f"your answer calls the package ({used}): write it out yourself",
            )
        except Failure as failure:
            if answer.empty and answer.empty == answer.calls:
                text = "returned None: fill in the cell above, or is a `return` missing on some path?"
                return ungraded(question, text, attempted=False)
            hint = invariant.hint if failure.hint else ""
            lines.append(
                Line(invariant.name, FAILED, invariant.points, str(failure), hint)
            )
        except RemoteError as error:  # of an object that the answer returned
            lines.append(Line(invariant.name, FAILED, invariant.points, str(error)))
        except Exception as error:  # an answer that breaks the comparison itself fails its question alone
            text = f"what your code returned cannot be compared: {type(error).__name__}: {str(error)[:LONGEST]}"
            lines.append(Line(invariant.name, FAILED, invariant.points, text))
        else:
            detail = note if isinstance(note, str) else ""
            lines.append(Line(invariant.name, PASSED, invariant.points, detail))
        if number == 0 and lines[0].status == FAILED:
            lines += [
                Line(i.name, NOT_REACHED, i.points) for i in question.invariants[1:]
            ]
            break
    return Outcome(question.id, question.answer, question.points, tuple(lines))


def ungraded(question: Question, detail: str, attempted: bool = True) -> Outcome:
    """No points, and why; out of no points where the question cannot be checked here."""
    if question.lacking:
        line = Line(question.title, LEFT_OUT, 0, question.lacking)
        return Outcome(question.id, question.answer, 0, (line,), attempted=False)
    first, *rest = question.invariants
    lines = [Line(first.name, FAILED, first.points, detail)]
    lines += [Line(i.name, NOT_REACHED, i.points) for i in rest]
    return Outcome(
        question.id, question.answer, question.points, tuple(lines), attempted
    )
