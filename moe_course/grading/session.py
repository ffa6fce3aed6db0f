"""A submission's functions and modules as if they were here: calls, gradients, callbacks and parameters across the
boundary to the process that runs it.
"""

from __future__ import annotations

import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch

from moe_course.grading import wire
from moe_course.grading.calls import Kernels, differentiable, tensors
from moe_course.grading.core import Failure, RemoteError
from moe_course.grading.sandbox import Limits, Sandbox, WorkerGoneError

MOST_RESTARTS = 12  # of one submission's worker
MOST_HELD = 256 * 2**20  # bytes of tensors kept here for gradients of callbacks

NONSENSE = "the process of this submission sent nonsense"


class Remote:
    """A function of the submission, called across the boundary as if it were here, gradients included."""

    def __init__(self, session: Session, target: str | int) -> None:
        self.session, self.target = session, target

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.session.call(self.target, args, kwargs)

    def cost(self, **kwargs: Any) -> tuple[int, int]:
        """Entries of the largest tensor that a call makes and FLOPs of its products, as the worker saw them."""
        return self.session.measure(self.target, kwargs)

    def watch(self, case: dict[str, Any], apart: dict[str, int]) -> tuple[Any, Kernels]:
        """The result of a call, and what its kernels did, as the worker saw it."""
        return self.session.watch(self.target, case, apart)

    def __deepcopy__(self, memo: object) -> Remote:
        return self


class RemoteModule(torch.nn.Module):
    """A module of the submission. Its parameters and buffers are here, to be read, set and optimised; a call sends
    them along, and brings back what it has changed.

    The submodules hold tensors alone: only the whole can be called.
    """

    def __init__(self, session: Session, target: int, name: str, state: Any) -> None:
        super().__init__()
        self.session, self.target, self.name = session, target, name
        for path, (tensor, trained) in _entries(state).items():
            *above, last = path.split(".")
            module: torch.nn.Module = self
            for part in [*above, last]:
                _require_name(part)
            try:
                for part in above:
                    if part not in module._modules:
                        module.add_module(part, torch.nn.Module())
                    module = module.get_submodule(part)
                if trained is None:
                    module.register_buffer(last, tensor)
                else:
                    parameter = torch.nn.Parameter(tensor, requires_grad=trained)
                    module.register_parameter(last, parameter)
            except KeyError as error:
                raise wire.WireError(
                    f"a module with two parts in one place ({path})"
                ) from error

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.session.call(self.target, args, kwargs, self)

    def __deepcopy__(self, memo: object) -> RemoteModule:
        return self

    def __repr__(self) -> str:
        return f"<module {self.name}>"

    def state(self) -> dict[str, Any]:
        """What the worker's module is set to before a call."""
        held: dict[str, Any] = dict(self.named_parameters())
        held |= dict(self.named_buffers())
        return {"tensors": held, "training": self.training}

    def update(self, state: Any) -> None:
        """What a call has left behind. Raises WireError unless it is the same tensors."""
        held: dict[str, Any] = self.state()["tensors"]
        found = _entries(state)
        if found.keys() != held.keys():
            raise wire.WireError("a module that has lost or gained tensors")
        with torch.no_grad():
            for path, (tensor, _) in found.items():
                if (tensor.shape, tensor.dtype) != (held[path].shape, held[path].dtype):
                    raise wire.WireError("a module whose tensors have other shapes")
                # An equal one is left alone: autograd counts every writing.
                if not torch.equal(tensor, held[path]):
                    held[path].copy_(tensor)


def _entries(state: Any) -> dict[str, tuple[torch.Tensor, bool | None]]:
    """Path to tensor and whether it is trained, None for a buffer. Raises WireError on what is no such state."""
    if not isinstance(state, dict):
        raise wire.WireError("no module")
    found: dict[str, tuple[torch.Tensor, bool | None]] = {}
    for path, entry in state.items():
        if not (
            isinstance(path, str)
            and isinstance(entry, tuple)
            and len(entry) == 2
            and type(entry[0]) is torch.Tensor
            and (entry[1] is None or type(entry[1]) is bool)
            and not (entry[1] and not entry[0].is_floating_point())
        ):
            raise wire.WireError("no module")
        found[path] = (entry[0], entry[1])
    return found


def _require_name(part: str) -> None:
    """A name that cannot take the place of anything that a module has."""
    plain = part.isdecimal() or (part.isidentifier() and not part.startswith("_"))
    taken = ("session", "target", "name", "state", "update")
    if not plain or part in taken or hasattr(torch.nn.Module, part):
        raise wire.WireError(f"a module with a part named {part[:50]!r}")


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
        self.lost = ""  # how the worker was lost in the question at hand
        self.end = time.monotonic() + limits.whole_seconds
        # Handles of what lived in a worker that has gone mean nothing to the next.
        self.dropped: list[int] = []  # graphs that are of no use any more
        self.functions: list[Callable[..., Any]] = []  # the judge's, handed over
        self.graphs: OrderedDict[int, tuple[list[Any], list[Any]]] = OrderedDict()
        self.called_back = 0

    def close(self) -> None:
        if self.sandbox is not None:
            self.sandbox.close()
            self.sandbox = None
        self.dropped = []  # the old list stays with the graphs of the old worker
        self.graphs.clear()

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
                self.troubles[number] = told(reply["error"])
        return True

    def ask(
        self, message: dict[str, Any], blobs: list[bytes]
    ) -> tuple[dict[str, Any], memoryview]:
        """The worker's reply. Raises RemoteError when there is none: `lost` then says how the worker was lost."""
        if self.lost:
            raise RemoteError(self.lost)
        try:
            sandbox = self.ready()
            message["drop"], self.dropped[:] = list(self.dropped), []
            seconds = self._seconds(self.limits.call_seconds)
            return sandbox.ask(message, blobs, seconds, self._called_back)
        except WorkerGoneError as gone:
            raise self._gone(gone.reason) from gone

    def _gone(self, how: str) -> RemoteError:
        self.close()
        self.lost = how
        return RemoteError(how)

    def kinds(self, names: list[str]) -> dict[str, str]:
        reply, _ = self.ask({"do": "names", "names": names}, [])
        kinds = reply.get("value")
        if (
            not isinstance(kinds, list)
            or len(kinds) != len(names)
            or not all(isinstance(kind, str) for kind in kinds)
        ):
            raise self._gone(NONSENSE)
        return dict(zip(names, kinds, strict=True))

    # --- Calls ---

    def measure(self, target: str | int, kwargs: dict[str, Any]) -> tuple[int, int]:
        message, blobs = self._message(target, (), kwargs)
        reply, _ = self.ask(message | {"measure": True}, blobs)
        self._raise(reply)
        cost = reply.get("cost")
        if not isinstance(cost, list) or [type(n) for n in cost] != [int, int]:
            raise self._gone(NONSENSE)
        return cost[0], cost[1]

    def watch(
        self, target: str | int, case: dict[str, Any], apart: dict[str, int]
    ) -> tuple[Any, Kernels]:
        about = {"watch": apart}
        both = self._value(target, (), case, [], False, about)[0]
        try:
            result, account = both
            return result, Kernels.of(account)
        except (TypeError, ValueError) as error:
            raise self._gone(NONSENSE) from error

    def call(
        self,
        target: str | int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        module: RemoteModule | None = None,
    ) -> Any:
        modules = {m.target: m for m in _modules((args, kwargs)) if m.session is self}
        if module is not None:
            modules[module.target] = module
        held = [*modules.values()]
        inputs = tensors((args, kwargs)) + [p for m in held for p in m.parameters()]
        leaves = [t for t in inputs if t.requires_grad]

        def forward() -> tuple[Any, list[Any], Any]:
            value, needing, number = self._value(target, args, kwargs, held, True)
            graph = _Graph(number)
            weakref.finalize(graph, self.dropped.append, number)
            return value, needing, graph

        def backward(graph: _Graph, gradients: list[Any]) -> list[Any]:
            return self._gradients(graph.number, gradients, leaves)

        if leaves and torch.is_grad_enabled():
            return differentiable(leaves, forward, backward)
        on = torch.is_grad_enabled()
        return self._value(target, args, kwargs, held, on)[0]

    def _message(
        self,
        target: str | int,
        args: Any,
        kwargs: Any,
        held: Any = (),
        gradients: bool = True,
    ) -> tuple[dict[str, Any], list[bytes]]:
        def handle(value: Any) -> list[Any] | None:
            if isinstance(value, Remote | RemoteModule) and value.session is self:
                return ["held", value.target]
            if callable(value):
                self.functions.append(value)
                return ["callback", len(self.functions) - 1]
            return None

        blobs: list[bytes] = []
        states = [(module.target, module.state()) for module in held]
        coded = wire.encode((args, kwargs, states), blobs, handle)
        message = {"do": "call", "target": target, "arguments": coded}
        # A check may forbid autograd: there, too.
        message["inference"] = torch.is_inference_mode_enabled()
        message["gradients"] = gradients
        return message, blobs

    def _value(
        self,
        target: str | int,
        args: Any,
        kwargs: Any,
        held: list[RemoteModule],
        gradients: bool,
        about: Mapping[str, Any] | None = None,
    ) -> tuple[Any, list[Any], Any]:
        message, blobs = self._message(target, args, kwargs, held, gradients)
        reply, raw = self.ask(message | dict(about or {}), blobs)
        self._raise(reply)
        needing: list[Any] = []
        try:
            both = wire.decode(reply.get("value"), raw, self._object, needing)
            if not isinstance(both, tuple) or len(both) != 2:
                raise wire.WireError("no value")
            value, states = both
            if not isinstance(states, list) or len(states) != len(held):
                raise wire.WireError("no states of modules")
            for module, state in zip(held, states, strict=True):
                module.update(state)
        except wire.WireError as error:
            raise self._gone(f"the process of this submission sent {error}") from error
        if reply.get("changed"):
            raise Failure("your code changed its arguments; work on a copy", hint=False)
        return value, needing, reply.get("id")

    def _gradients(
        self, number: int, gradients: list[Any], leaves: list[Any]
    ) -> list[Any]:
        blobs: list[bytes] = []
        coded = wire.encode(gradients, blobs)
        message = {"do": "backward", "graph": number, "gradients": coded}
        reply, raw = self.ask(message, blobs)
        self._raise(reply)
        try:
            back = wire.decode(reply.get("value"), raw)
        except wire.WireError as error:
            raise RemoteError(f"its gradients are {error}") from error
        if not isinstance(back, list) or len(back) != len(leaves):
            raise RemoteError("its gradients are not as many as its arguments")
        for leaf, gradient in zip(leaves, back, strict=True):
            if gradient is not None and (
                type(gradient) is not torch.Tensor or gradient.shape != leaf.shape
            ):
                raise RemoteError("a gradient has another shape than its argument")
        return back

    def _object(self, coded: list[Any]) -> Any:
        kind, number, *rest = coded
        if kind == "object" and type(number) is int and len(rest) == 2:
            name, state = rest
            if not isinstance(name, str):
                raise wire.WireError("an object without a name")
            if state is None:
                return Remote(self, number)
            return RemoteModule(self, number, name[:100], state)
        raise wire.WireError("a value of no known kind")

    def _raise(self, reply: dict[str, Any]) -> None:
        if "error" in reply:
            raise RemoteError(told(reply["error"]))

    # --- Calls of the judge's own functions, from inside ---

    def _called_back(
        self, message: dict[str, Any], raw: memoryview
    ) -> tuple[dict[str, Any], list[bytes]]:
        """The reply to a call of a function handed over, or to a request for its gradients."""
        out: list[bytes] = []
        try:
            if "graph" in message:
                value: Any = self._back(message, raw)
                return {"value": wire.encode(value, out)}, out
            number = message["callback"]
            if type(number) is not int or not 0 <= number < len(self.functions):
                raise wire.WireError("a call of no known function")
            leaves: list[Any] = []
            given = wire.decode(message.get("arguments"), raw, None, leaves)
            if not (
                isinstance(given, tuple)
                and len(given) == 2
                and isinstance(given[0], tuple)
                and isinstance(given[1], dict)
            ):
                raise wire.WireError("no arguments")
            for leaf in leaves:
                leaf.requires_grad_()
            with torch.set_grad_enabled(bool(leaves)):
                value = self.functions[number](*given[0], **given[1])
            self.called_back += 1
            self._hold(self.called_back, leaves, tensors(value))
            return {"value": wire.encode(value, out), "graph": self.called_back}, out
        except wire.WireError:
            raise
        except Exception as error:  # of what the learner passed
            return {"error": f"{type(error).__name__}: {error}"[:300]}, []

    def _hold(self, number: int, leaves: list[Any], outputs: list[Any]) -> None:
        """Keep a graph for its gradients, within bounds: the oldest go first."""
        if not any(t.requires_grad for t in outputs):
            return
        self.graphs[number] = (leaves, outputs)
        sizes = {n: sum(t.nbytes for t in a + b) for n, (a, b) in self.graphs.items()}
        while sum(sizes.values()) > MOST_HELD or len(self.graphs) > 1_000:
            oldest, _ = self.graphs.popitem(last=False)
            del sizes[oldest]

    def _back(self, message: dict[str, Any], raw: memoryview) -> list[Any]:
        if message["graph"] not in self.graphs:
            raise RuntimeError("the gradients of this call are no longer kept")
        leaves, outputs = self.graphs[message["graph"]]
        given = wire.decode(message.get("gradients"), raw)
        if not isinstance(given, list) or len(given) != len(outputs):
            raise wire.WireError("no gradients")
        pairs = [
            (o, g)
            for o, g in zip(outputs, given, strict=True)
            if o.requires_grad and g is not None
        ]
        for leaf in leaves:
            leaf.grad = None
        # Into what the function has of its own, too, as if it had been called here.
        torch.autograd.backward(
            [o for o, _ in pairs], [g for _, g in pairs], retain_graph=True
        )
        return [leaf.grad for leaf in leaves]


class _Graph:
    """The name of a graph that the worker keeps, for as long as autograd keeps this."""

    def __init__(self, number: int) -> None:
        self.number = number


def _modules(value: Any) -> list[RemoteModule]:
    if isinstance(value, RemoteModule):
        return [value]
    parts = value.values() if isinstance(value, dict) else value
    if isinstance(value, dict | list | tuple):
        return [module for part in parts for module in _modules(part)]
    return []


def told(error: Any) -> str:
    """The worker's account of an exception, whatever it sent."""
    if not isinstance(error, list) or len(error) != 3:
        return "your code raised an error that cannot be shown"
    kind, text, line = (str(part)[:300] for part in error)
    where = f"\n    {line}" if line else ""
    return f"your code raised {kind}: {text}{where}" if kind else f"{text}{where}"
