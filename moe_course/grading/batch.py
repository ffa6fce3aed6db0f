"""Grading a class: one result per submission whatever happens, resumed where it was stopped, and the tables of it."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    Executor,
    Future,
    wait,
)
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from moe_course.grading import core
from moe_course.grading.core import Invariant, load_exercise
from moe_course.grading.judge import (
    GRADED,
    NEEDS_REVIEW,
    UNREADABLE,
    Private,
    Result,
    Verdict,
    judge,
    nothing_graded,
)
from moe_course.grading.run import UnreadableError
from moe_course.grading.sandbox import Limits, Sandbox
from moe_course.grading.submissions import Submission, code_cells

Overrides = dict[tuple[str, str], tuple[int, str]]
Graded = tuple[str, str]  # student and digest of the submission
COLUMNS = ("student", "question", "points", "status", "reason", "seconds")
FIRST_USER = 61_000  # a judge that is root gives each worker a user of its own
USERS = 4_000


class GradesError(RuntimeError):
    """Results cannot be read or written; the text says where and what to do."""


@dataclass(frozen=True)
class Settings:
    """What a batch is graded with: the same settings and submission give the same points."""

    exercise: str
    seed: str = ""
    private: str = ""  # source of an instructor's own checks: not a path, another machine may grade
    limits: Limits = field(default_factory=Limits)
    sandboxed: bool = True

    @property
    def digest(self) -> str:
        """Changes with the seed, the limits, the text of every check, and what this machine cannot check."""
        exercise = load_exercise(self.exercise)
        here = Path(core.__file__)
        files = [core.CHECKS / f"{exercise.stem}.py", here]
        files += [here.with_name("tensors.py"), here.with_name("calls.py")]
        files += [here.parents[1] / "kernels" / "trace.py"]
        files += [here.parents[1] / "training" / "capstone.py"]
        parts = [repr(self), *(question.lacking for question in exercise.questions)]
        parts += [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def private_checks(self) -> Private:
        """The instructor's invariants: PRIVATE, a dict from question to a tuple of Invariant.

        Raises ValueError that says what is wrong with them.
        """
        if not self.private:
            return {}
        names: dict[str, Any] = {"__name__": "private_checks"}
        try:
            exec(compile(self.private, "private checks", "exec"), names)
            private = dict(names["PRIVATE"])
        except Exception as error:
            raise ValueError(
                f"private checks: {type(error).__name__}: {error}"
            ) from error
        known = {question.id for question in load_exercise(self.exercise).questions}
        for question, invariants in private.items():
            if question not in known:
                raise ValueError(f"private checks: there is no question {question!r}")
            if not all(isinstance(one, Invariant) for one in invariants):
                raise ValueError(
                    f"private checks: {question} holds something that is no Invariant"
                )
        return private


def read_private(folder: Path, exercise: str) -> str:
    """The text of NN_topic.py in an instructor's folder. Raises ValueError where there is none."""
    path = folder / f"{load_exercise(exercise).stem}.py"
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise ValueError(
            f"{path}: no private checks of exercise {exercise} ({error.strerror})"
        ) from error


# --- One submission, in a process of the pool ----------------------------------------

# The next worker, which imports torch while this one is in use, and what it was started for.
_spare: tuple[Settings, Sandbox] | None = None
_users = 0
_lock = threading.Lock()


def _fresh(settings: Settings) -> Sandbox:
    """A worker that nothing has run in, and the start of the next."""
    global _spare
    with (
        _lock
    ):  # a worker of a cluster may have several threads, and serve several batches
        spare, _spare = _spare, None
        if spare is not None and spare[0] != settings:
            # It may have other limits, or no walls at all.
            spare[1].close()
            spare = None
        ready = spare[1] if spare else _start(settings)
        _spare = settings, _start(settings)
    return ready


def _start(settings: Settings) -> Sandbox:
    global _users
    _users += 1
    user = FIRST_USER + (os.getpid() * 61 + _users) % USERS
    return Sandbox(settings.limits, user, unsafe=not settings.sandboxed)


def close_spare() -> None:
    """End the worker that waits for a submission that does not come."""
    global _spare
    with _lock:
        spare, _spare = _spare, None
    if spare is not None:
        spare[1].close()


def grade_one(submission: Submission, settings: Settings) -> Result:
    """A pure function of the submission and the settings, but for its seconds."""
    private = settings.private_checks()
    try:
        if submission.reason:
            raise UnreadableError(submission.reason)
        cells = code_cells(submission.content, settings.exercise)
    except UnreadableError as error:
        return nothing_graded(settings.exercise, UNREADABLE, str(error), private)
    return judge(
        cells,
        settings.exercise,
        lambda: _fresh(settings),
        seed=settings.seed,
        private=private,
        limits=settings.limits,
        sandboxed=settings.sandboxed,
    )


# --- A batch -------------------------------------------------------------------------


def grade_batch(
    submissions: Iterable[Submission],
    settings: Settings,
    out: Path,
    executor: Executor,
    jobs: int,
    on_done: Callable[[Submission, Result, bool], None] | None = None,
) -> list[Graded]:
    """Grade what has no result in `out` yet, and say what has one then.

    Stopped at any moment, the same call goes on; no result is made twice.
    Raises GradesError where a result cannot be written or the processes that grade have gone: the results before stay.
    """
    graded: list[Graded] = []
    digest = settings.digest
    waiting: dict[Future[Result], Submission] = {}

    def finish(done: Iterable[Future[Result]]) -> None:
        for future in done:
            submission = waiting.pop(future)
            try:
                result = future.result()
            except BrokenExecutor as error:
                raise _gone(error) from error
            except Exception as error:
                # Of the judge or the machine, and not the submission's: said so, and tried again by the next run.
                reason = f"the judge itself failed ({type(error).__name__}: {error})"
                result = nothing_graded(settings.exercise, NEEDS_REVIEW, reason)
                result = replace(result, final=False)
            _store(out, submission, digest, result)
            if on_done is not None:
                on_done(submission, result, False)

    for submission in submissions:
        graded.append((submission.student, submission.digest))
        before = _stored(out, *graded[-1], digest)
        if before is not None and before.final:
            if on_done is not None:
                on_done(submission, before, True)
            continue
        # A window of them: memory does not grow with the class.
        if len(waiting) >= 2 * jobs:
            finish(wait(waiting, return_when=FIRST_COMPLETED).done)
        try:
            future = executor.submit(grade_one, submission, settings)
        except BrokenExecutor as error:
            raise _gone(error) from error
        waiting[future] = submission
    while waiting:
        finish(wait(waiting, return_when=FIRST_COMPLETED).done)
    return graded


def _gone(error: BrokenExecutor) -> GradesError:
    return GradesError(
        f"a process that grades ended ({error}), perhaps for want of memory: try a smaller -j. What was graded before "
        "is kept: the same command goes on"
    )


def _result_path(out: Path, student: str) -> Path:
    name = hashlib.sha256(student.encode()).hexdigest()[:24]
    return out / "results" / f"{name}.json"


def _stored(out: Path, student: str, content: str, digest: str) -> Result | None:
    """The result of exactly this content under exactly these settings, if there is one."""
    try:
        raw = json.loads(_result_path(out, student).read_text("utf-8"))
        if raw["graded_with"] != digest or raw["submission"] != content:
            return None
        return _result(raw["result"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _result(raw: dict[str, Any]) -> Result:
    verdicts = tuple(
        Verdict(**v | {"lines": tuple(v["lines"])}) for v in raw["verdicts"]
    )
    return Result(**raw | {"verdicts": verdicts, "troubles": tuple(raw["troubles"])})


def _store(out: Path, submission: Submission, digest: str, result: Result) -> None:
    content = {
        "student": submission.student,
        "file": submission.name,
        "submission": submission.digest,
        "graded_with": digest,
        "result": asdict(result),
    }
    write(_result_path(out, submission.student), json.dumps(content, indent=1) + "\n")


def write(path: Path, parts: Iterable[str]) -> None:
    """Write a file, given as text or as parts of it, whole or not at all. Raises GradesError that says what is left."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8", newline="") as file:
            file.writelines([parts] if isinstance(parts, str) else parts)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise GradesError(
            f"cannot write {path}: {error.strerror}. What was graded before is kept: make room or give "
            "another folder with -o, and run the same command again"
        ) from error


def rows(
    graded: Iterable[Graded], settings: Settings, out: Path
) -> Iterator[tuple[str, Result]]:
    """Student and result of every submission, in their order. Raises GradesError where one has none."""
    digest = settings.digest
    for student, content in graded:
        result = _stored(out, student, content, digest)
        if result is None:
            raise GradesError(f"{student} has no result in {out}")
        yield student, result


# --- Overrides and tables ------------------------------------------------------------


def read_overrides(path: Path, most: dict[str, int]) -> Overrides:
    """Points and reason by student and question, from a CSV with these four columns; `most` points by question.

    Raises GradesError that names the line that cannot be followed.
    """
    found: Overrides = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            if not {"student", "question", "points", "reason"} <= set(
                reader.fieldnames or ()
            ):
                raise GradesError(
                    f"{path}: needs the columns student, question, points and reason"
                )
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if row["question"] not in most:
                    raise GradesError(
                        f"{where}: there is no question {row['question']!r}"
                    )
                points = row["points"] or ""
                if not points.isdecimal() or int(points) > most[row["question"]]:
                    raise GradesError(
                        f"{where}: points must be 0 to {most[row['question']]}, got {points!r}"
                    )
                found[row["student"], row["question"]] = (
                    int(points),
                    row["reason"] or "",
                )
    except OSError as error:
        raise GradesError(f"cannot read {path}: {error.strerror}") from error
    return found


def overridden(student: str, result: Result, overrides: Overrides) -> Result:
    """The result with a person's decisions in place of the judge's."""
    verdicts = tuple(
        replace(v, points=overrides[student, v.question][0], status=GRADED,
                reason=f"set by hand: {overrides[student, v.question][1]}")
        if (student, v.question) in overrides
        else v
        for v in result.verdicts
    )  # fmt: skip
    open_ones = [v.status for v in verdicts if v.status != GRADED]
    settled = verdicts != result.verdicts and not open_ones
    return replace(
        result, verdicts=verdicts, status=GRADED if settled else result.status
    )


def table(results: Iterable[tuple[str, Result]]) -> Iterator[str]:
    """grades.csv: a row for each student and question. Seconds are those of the judge's work on it."""

    def row(*cells: str) -> str:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(map(_plain, cells))
        return text.getvalue()

    yield row(*COLUMNS)
    for student, result in results:
        for v in result.verdicts:
            reason = " ".join(v.reason.split())
            yield row(
                student, v.question, str(v.points), v.status, reason, f"{v.seconds:.2f}"
            )


def _plain(cell: str) -> str:
    """A spreadsheet runs what begins like a formula: students choose their file names and messages."""
    return f"'{cell}" if cell[:1] in ("=", "+", "-", "@", "\t", "\r") else cell


def as_json(results: Iterable[tuple[str, Result]]) -> Iterator[str]:
    """grades.json: everything that is known of every submission."""
    before = "[\n"
    for student, result in results:
        yield before + json.dumps({"student": student} | asdict(result), indent=1)
        before = ",\n"
    yield before if before == "[\n" else ""
    yield "\n]\n"
