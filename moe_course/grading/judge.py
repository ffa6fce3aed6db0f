"""Grading what others wrote: checks run here, the submission in a sandbox, values cross between the two.

A result is *graded*; or *needs-review*, where the submission's process was stopped or ended by itself, which a slow
machine may have caused too; or *unreadable*. Points that are not given always have a reason.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from moe_course.grading import wire
from moe_course.grading.core import (
    Failure,
    Invariant,
    Question,
    RemoteError,
    grade,
    load_exercise,
    ungraded,
)
from moe_course.grading.sandbox import Limits, Sandbox, WorkerGoneError

GRADED, NEEDS_REVIEW, UNREADABLE = "graded", "needs-review", "unreadable"
MOST_RESTARTS = 12  # of one submission's worker
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


class Remote:
    """A function of the submission, called across the boundary as if it were here, gradients included."""

    def __init__(self, session: Session, target: str | int) -> None:
        self.session, self.target = session, target

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.session.call(self.target, args, kwargs)

    def cost(self, **kwargs: Any) -> tuple[int, int]:
        """Entries of the largest tensor that a call makes and FLOPs of its products, as the worker saw them."""
        return self.session.measure(self.target, kwargs)


class Session:
    """A submission's worker, started again when it is gone, so that later questions still count."""

    def __init__(
        self, cells: list[str], start: Callable[[], Sandbox], limits: Limits
    ) -> None:
        self.cells, self.start, self.limits = cells, start, limits
        self.sandbox: Sandbox | None = None
        self.skipped: dict[int, str] = {}  # cells that ended the worker, and how
        self.troubles: dict[int, str] = {}  # cells that raised
        self.restarts = -1
        self.end = time.monotonic() + limits.whole_seconds

    def close(self) -> None:
        if self.sandbox is not None:
            self.sandbox.close()
            self.sandbox = None

    def _seconds(self, most: float) -> float:
        left = self.end - time.monotonic()
        if left <= 0:
            raise WorkerGoneError(
                f"the submission took more than {self.limits.whole_seconds:.0f} s in all"
            )
        return min(most, left)

    def ready(self) -> Sandbox:
        """A worker that has executed the cells. Raises WorkerGoneError when there is none to be had any more."""
        while self.sandbox is None:
            self.restarts += 1
            if self.restarts > MOST_RESTARTS:
                raise WorkerGoneError(
                    f"its process was stopped {MOST_RESTARTS} times; no more was tried"
                )
            self._seconds(0)
            sandbox = self.start()
            sandbox.wait_until_ready()
            if self._execute(sandbox):
                self.sandbox = sandbox
        return self.sandbox

    def _execute(self, sandbox: Sandbox) -> bool:
        for number, source in enumerate(self.cells, 1):
            if number in self.skipped:
                continue
            try:
                reply, _ = sandbox.ask(
                    {"do": "cell", "source": source, "number": number},
                    [],
                    self._seconds(self.limits.cell_seconds),
                )
            except WorkerGoneError as gone:
                sandbox.close()
                self.skipped[number] = gone.reason
                return False
            if "error" in reply:
                self.troubles[number] = _told(reply["error"])
        return True

    def ask(
        self, message: dict[str, Any], blobs: list[bytes], callback: Any = None
    ) -> tuple[dict[str, Any], memoryview]:
        sandbox = self.ready()
        try:
            return sandbox.ask(
                message, blobs, self._seconds(self.limits.call_seconds), callback
            )
        except WorkerGoneError:
            self.close()
            raise

    def kinds(self, names: list[str]) -> dict[str, str]:
        reply, _ = self.ask({"do": "names", "names": names}, [])
        kinds = reply.get("value")
        if (
            not isinstance(kinds, list)
            or len(kinds) != len(names)
            or not all(isinstance(kind, str) for kind in kinds)
        ):
            self.close()
            raise WorkerGoneError("the process of this submission sent nonsense")
        return dict(zip(names, kinds, strict=True))

    # --- Calls ---

    def measure(self, target: str | int, kwargs: dict[str, Any]) -> tuple[int, int]:
        message, blobs, callback = _arguments(target, (), kwargs)
        reply, _ = self.ask(message | {"measure": True}, blobs, callback)
        self._raise(reply)
        cost = reply.get("cost")
        if not isinstance(cost, list) or [type(n) for n in cost] != [int, int]:
            self.close()
            raise WorkerGoneError("the process of this submission sent nonsense")
        return cost[0], cost[1]

    def call(
        self, target: str | int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        import torch

        leaves = [t for t in _tensors((args, kwargs)) if t.requires_grad]
        if leaves and torch.is_grad_enabled():
            return self._differentiable(target, args, kwargs, leaves)
        return self._value(target, args, kwargs)[0]

    def _value(
        self, target: str | int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, list[Any], Any]:
        message, blobs, callback = _arguments(target, args, kwargs)
        reply, raw = self.ask(message, blobs, callback)
        self._raise(reply)
        needing: list[Any] = []
        try:
            value = wire.decode(reply.get("value"), raw, self._object, needing)
        except wire.WireError as error:
            self.close()
            raise WorkerGoneError(
                f"the process of this submission sent {error}"
            ) from error
        if reply.get("changed"):
            raise Failure("your code changed its arguments; work on a copy", hint=False)
        return value, needing, reply.get("id")

    def _object(self, coded: list[Any]) -> Remote:
        if len(coded) == 2 and coded[0] == "object" and type(coded[1]) is int:
            return Remote(self, coded[1])
        raise wire.WireError("a value of no known kind")

    def _raise(self, reply: dict[str, Any]) -> None:
        if "error" in reply:
            raise RemoteError(_told(reply["error"]))

    def _differentiable(
        self, target: Any, args: Any, kwargs: Any, leaves: list[Any]
    ) -> Any:
        """The call as one operation of autograd: its backward asks the worker for the gradients."""
        import torch

        session = self
        found: dict[str, Any] = {}

        class Across(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *given: Any) -> Any:
                value, needing, number = session._value(target, args, kwargs)
                outputs = list(_tensors(value))
                found.update(value=value, outputs=outputs)
                ctx.number = number
                wanted = {id(t) for t in needing}
                ctx.mark_non_differentiable(
                    *[t for t in outputs if id(t) not in wanted]
                )
                return tuple(outputs)

            @staticmethod
            def backward(ctx: Any, *gradients: Any) -> Any:
                blobs: list[bytes] = []
                coded = wire.encode(list(gradients), blobs)
                reply, raw = session.ask(
                    {"do": "backward", "graph": ctx.number, "gradients": coded}, blobs
                )
                session._raise(reply)
                try:
                    back = wire.decode(reply.get("value"), raw)
                except wire.WireError as error:
                    raise RemoteError(f"its gradients are {error}") from error
                if not isinstance(back, list) or len(back) != len(leaves):
                    raise RemoteError("its gradients are not as many as its arguments")
                for leaf, gradient in zip(leaves, back, strict=True):
                    if gradient is not None and (
                        type(gradient) is not torch.Tensor
                        or gradient.shape != leaf.shape
                    ):
                        raise RemoteError(
                            "a gradient has another shape than its argument"
                        )
                return tuple(back)

        made = Across.apply(*leaves)  # type: ignore[no-untyped-call]
        return _with_tensors(found["value"], iter(made))


def _told(error: Any) -> str:
    """The worker's account of an exception, whatever it sent."""
    if not isinstance(error, list) or len(error) != 3:
        return "your code raised an error that cannot be shown"
    kind, text, line = (str(part)[:300] for part in error)
    where = f"\n    {line}" if line else ""
    return f"your code raised {kind}: {text}{where}" if kind else f"{text}{where}"


def _arguments(
    target: str | int, args: Any, kwargs: Any
) -> tuple[dict[str, Any], list[bytes], Any]:
    import torch

    functions: list[Any] = []
    blobs: list[bytes] = []

    def handle(value: Any) -> list[Any] | None:
        if callable(value):
            functions.append(value)
            return ["callback", len(functions) - 1]
        return None

    coded = wire.encode((args, kwargs), blobs, handle)

    def callback(
        message: dict[str, Any], raw: memoryview
    ) -> tuple[dict[str, Any], list[bytes]]:
        number = message["callback"]
        if type(number) is not int or not 0 <= number < len(functions):
            raise wire.WireError("a call of no known function")
        given = wire.decode(message.get("arguments"), raw)
        if not (
            isinstance(given, tuple)
            and len(given) == 2
            and isinstance(given[0], tuple)
            and isinstance(given[1], dict)
        ):
            raise wire.WireError("no arguments")
        out: list[bytes] = []
        try:
            return {
                "value": wire.encode(functions[number](*given[0], **given[1]), out)
            }, out
        except Exception as error:  # of what the learner passed
            return {"error": f"{type(error).__name__}: {error}"[:300]}, []

    message = {"do": "call", "target": target, "arguments": coded}
    # A check may forbid autograd: there, too.
    message["inference"] = torch.is_inference_mode_enabled()
    return message, blobs, callback


def _tensors(value: Any) -> list[Any]:
    """The tensors in plain containers, in the order of the wire."""
    import torch

    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value
    if isinstance(value, dict | list | tuple):
        return [tensor for part in parts for tensor in _tensors(part)]
    return []


def _with_tensors(value: Any, tensors: Any) -> Any:
    """The value with its tensors replaced, in order."""
    import torch

    if isinstance(value, torch.Tensor):
        return next(tensors)
    if isinstance(value, dict):
        return {key: _with_tensors(part, tensors) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_with_tensors(part, tensors) for part in value)
    return value


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
    reasons = [v.reason for v in verdicts if v.status == NEEDS_REVIEW]
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
    gone: list[str] = []

    class Watched(Remote):
        """Notes that the worker was lost in a call: the outcome alone would look like a wrong answer."""

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self._noting(lambda: super(Watched, self).__call__(*args, **kwargs))

        def cost(self, **kwargs: Any) -> tuple[int, int]:
            found: tuple[int, int] = self._noting(
                lambda: super(Watched, self).cost(**kwargs)
            )
            return found

        def _noting(self, call: Callable[[], Any]) -> Any:
            if gone:
                raise RemoteError(gone[0])
            try:
                return call()
            except WorkerGoneError as error:
                gone.append(error.reason)
                raise RemoteError(error.reason) from error

    try:
        kind = session.kinds([question.answer])[question.answer]
        if kind == "callable":
            # The draws of a class: of its seed and the question alone.
            outcome = grade(
                question,
                Watched(session, question.answer),
                seed=f"{seed}/{question.id}",
            )
        elif kind == "missing":
            outcome = ungraded(question, _missing(session, question), attempted=False)
        else:
            text = f"{question.answer} is no function but {kind}"
            outcome = ungraded(question, text, attempted=False)
    except WorkerGoneError as error:
        gone.append(error.reason)
        outcome = ungraded(question, error.reason)
    failed = next((line for line in outcome.lines if line.status != "passed"), None)
    reason = (
        gone[0] if gone else ("" if failed is None else failed.detail or failed.name)
    )
    return Verdict(
        question.id,
        question.answer,
        outcome.points,
        outcome.out_of,
        NEEDS_REVIEW if gone else GRADED,
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
            q.points + sum(i.points for i in (private or {}).get(q.id, ())),
            status, reason, 0.0,
        )
        for q in load_exercise(number).questions
    ]  # fmt: skip
    return Result(status, reason, tuple(verdicts), 0.0, True)
