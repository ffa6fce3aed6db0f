"""The process that runs a submission, inside the sandbox. It needs Python, torch and the files beside it, and nothing
of the judge.

It executes the cells that it is sent, calls the functions that they define, and answers over two pipes. Nothing that it
says is believed: it returns values, and what they should have been never comes here.
"""

from __future__ import annotations

import ast
import builtins
import linecache
import os
import signal
import sys
import traceback
import types
from typing import Any

# The sandbox binds this file and those beside it into a folder of this name.
from moe_judge import calls, wire  # type: ignore[import-not-found]

TEXT = 300  # characters of an error's message


class Channel:
    """Messages over two file descriptors that no submission needs to know."""

    def __init__(self, incoming: int, outgoing: int) -> None:
        self.incoming, self.outgoing = incoming, outgoing

    def _read(self, size: int) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            part = os.read(self.incoming, min(size - len(parts), 2**20))
            if not part:
                os._exit(0)  # the judge has gone
            parts += part
        return bytes(parts)

    def receive(self) -> tuple[dict[str, Any], memoryview]:
        header = self._read(wire.HEADER.size)
        return wire.unpack(header, self._read(wire.HEADER.unpack(header)[0]))

    def send(self, message: dict[str, Any], blobs: list[bytes]) -> None:
        data = memoryview(wire.pack(message, blobs))
        while data:
            data = data[os.write(self.outgoing, data) :]


class Worker:
    """One submission: its names, and the objects and gradients that the judge holds handles of."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.objects: list[Any] = []
        self.graphs: dict[int, tuple[list[Any], list[Any]]] = {}
        self.names: dict[str, Any] = _course(
            types.ModuleType("__main__").__dict__ | {"__builtins__": builtins}
        )

    # --- Cells ---

    def cell(self, source: str, number: int) -> dict[str, Any]:
        name = f"<cell {number}>"
        linecache.cache[name] = (len(source), None, source.splitlines(True), name)
        try:
            tree = ast.parse(source, name)
            exec(compile(tree, name, "exec"), self.names)
        except BaseException as error:
            return {"error": describe(error)}
        return {}

    # --- Calls ---

    def call(self, message: dict[str, Any], blobs: memoryview) -> tuple[Any, ...]:
        import torch

        target = message["target"]
        wanted: list[Any] = []
        args, kwargs, states = wire.decode(
            message["arguments"], blobs, self._given, wanted
        )
        try:
            function: Any = (
                self.names[target] if isinstance(target, str) else self.objects[target]
            )
            modules = [self.objects[number] for number, _ in states]
        except LookupError:
            return {"error": ["", "what it returned before has gone", ""]}, []
        inside = {id(t) for _, state in states for t in state["tensors"].values()}
        leaves = [leaf for leaf in wanted if id(leaf) not in inside]
        for leaf in leaves:
            leaf.requires_grad_()
        before = wire.decode(message["arguments"], blobs, self._given)[:2]
        cost = [0, 0]
        try:
            for module, (_, state) in zip(modules, states, strict=True):
                leaves += _set(module, state["tensors"], wanted)
                module.train(state["training"])
            with (
                torch.inference_mode(bool(message.get("inference"))),
                torch.set_grad_enabled(bool(message.get("gradients", True))),
            ):
                if message.get("measure"):
                    result, *cost = calls.cost(lambda: function(*args, **kwargs))
                elif "watch" in message:
                    from moe_judge import trace

                    apart = message["watch"]
                    result = calls.watch(function, kwargs, apart, trace.trace)
                else:
                    result = function(*args, **kwargs)
            # What it holds may have changed: read back before anything else is said.
            after = [_state(module) for module in modules]
        except BaseException as error:
            return {"error": describe(error)}, []
        changed = not calls.unchanged((args, kwargs), before)
        out: list[bytes] = []

        def handle(value: Any) -> list[Any] | None:
            if not callable(value):
                return None
            self.objects.append(value)
            state = _state(value) if isinstance(value, torch.nn.Module) else None
            name = type(value).__name__[:100]
            number = len(self.objects) - 1
            return ["object", number, *(wire.encode(v, out) for v in (name, state))]

        coded = wire.encode((result, after), out, handle)
        outputs = calls.tensors(result)
        if leaves and any(t.requires_grad for t in outputs):
            self.graphs[message["id"]] = (leaves, outputs)
        return {"value": coded, "changed": changed, "cost": cost}, out

    def _given(self, coded: list[Any]) -> Any:
        """What is no plain value among the arguments: an object made here, or a function of the judge's."""
        kind, number = coded
        if kind == "held":
            return (
                self.names[number] if isinstance(number, str) else self.objects[number]
            )
        if kind != "callback":
            raise wire.WireError("a value of no known kind")

        def ask(*args: Any, **kwargs: Any) -> Any:
            import torch

            def forward() -> tuple[Any, list[Any], Any]:
                blobs: list[bytes] = []
                arguments = wire.encode((args, kwargs), blobs)
                self.channel.send({"callback": number, "arguments": arguments}, blobs)
                reply, raw = self._reply()
                needing: list[Any] = []
                value = wire.decode(reply["value"], raw, None, needing)
                return value, needing, reply["graph"]

            def backward(graph: int, gradients: list[Any]) -> list[Any]:
                blobs: list[bytes] = []
                coded = wire.encode(gradients, blobs)
                about = {"callback": -1, "graph": graph, "gradients": coded}
                self.channel.send(about, blobs)
                reply, raw = self._reply()
                found: list[Any] = wire.decode(reply["value"], raw)
                return found

            leaves = [t for t in calls.tensors((args, kwargs)) if t.requires_grad]
            if leaves and torch.is_grad_enabled():
                return calls.differentiable(leaves, forward, backward)
            return forward()[0]

        return ask

    def _reply(self) -> tuple[dict[str, Any], memoryview]:
        reply, raw = self.channel.receive()
        if "error" in reply:
            raise RuntimeError(reply["error"])
        return reply, raw

    def backward(self, message: dict[str, Any], blobs: memoryview) -> tuple[Any, ...]:
        import torch

        leaves, outputs = self.graphs[message["graph"]]
        given = wire.decode(message["gradients"], blobs)
        pairs = [
            (o, g)
            for o, g in zip(outputs, given, strict=True)
            if o.requires_grad and g is not None
        ]
        try:
            gradients = torch.autograd.grad(
                [o for o, _ in pairs],
                leaves,
                [g for _, g in pairs],
                allow_unused=True,
                retain_graph=True,
            )
        except BaseException as error:
            return {"error": describe(error)}, []
        out: list[bytes] = []
        return {"value": wire.encode(list(gradients), out)}, out

    def serve(self) -> None:
        while True:
            message, blobs = self.channel.receive()
            for number in message.get("drop", ()):
                self.graphs.pop(number, None)
            try:
                kind, out = message["do"], []
                if kind == "cell":
                    reply = self.cell(message["source"], message["number"])
                elif kind == "names":
                    reply = {"value": [_kind(self.names, n) for n in message["names"]]}
                elif kind == "call":
                    reply, out = self.call(message, blobs)
                else:
                    reply, out = self.backward(message, blobs)
                self.channel.send({"id": message["id"]} | reply, out)
            except wire.WireError as error:
                text = f"what your code returned is {error}"
                self.channel.send({"id": message["id"], "error": ["", text, ""]}, [])


def _kind(names: dict[str, Any], name: str) -> str:
    if name not in names or names[name] is None:
        return "missing"
    return (
        "callable" if callable(names[name]) else str(type(names[name]).__name__)[:100]
    )


def _state(module: Any) -> dict[str, Any]:
    """Path to tensor and whether it is trained, None for a buffer."""
    trained = {n: (p.detach(), p.requires_grad) for n, p in module.named_parameters()}
    return trained | {n: (b.detach(), None) for n, b in module.named_buffers()}


def _set(module: Any, sent: dict[str, Any], wanted: list[Any]) -> list[Any]:
    """Give a module the judge's tensors; those of its parameters that gradients are wanted of."""
    import torch

    ids = {id(tensor) for tensor in wanted}
    own = dict(module.named_parameters()) | dict(module.named_buffers())
    with torch.no_grad():
        for path, tensor in sent.items():
            # An equal one is left alone: autograd counts every writing.
            if not torch.equal(own[path], tensor):
                own[path].copy_(tensor)
            if isinstance(own[path], torch.nn.Parameter):
                own[path].requires_grad_(id(tensor) in ids)
    return [own[path] for path, tensor in sent.items() if id(tensor) in ids]


def describe(error: BaseException) -> list[str]:
    """Type, message and the learner's own line of an error; none of the three can fail."""
    try:
        text = str(error)[:TEXT]
    except BaseException:
        text = ""
    line = ""
    try:
        if isinstance(error, SyntaxError):
            line = (
                f"line {error.lineno} of your cell: {(error.text or '').strip()[:TEXT]}"
            )
            text = str(error.msg)[:TEXT]
        else:
            own = [
                f
                for f in traceback.extract_tb(error.__traceback__)
                if f.filename.startswith("<cell ")
            ]
            if own and own[-1].line:
                line = f"line {own[-1].lineno} of your cell: {own[-1].line[:TEXT]}"
    except BaseException:
        pass
    return [type(error).__name__[:100], text, line]


class _Idle(types.ModuleType):
    """Stands for a module that a learner tries things out with: whatever is called does nothing here."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None


class _Triton(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        from moe_judge import interpreter

        return getattr(interpreter, name)


def _course(names: dict[str, Any]) -> dict[str, Any]:
    """A moe_course that has nothing but the calls of an exercise notebook, which do nothing here."""
    course, grading = (
        types.ModuleType("moe_course"),
        types.ModuleType("moe_course.grading"),
    )
    course.__path__ = []
    course.grading = grading  # type: ignore[attr-defined]
    for name in ("check", "total", "solution"):
        setattr(grading, name, lambda *args, **kwargs: True)
    sys.modules["moe_course"], sys.modules["moe_course.grading"] = course, grading
    capstone, training = _Idle("capstone"), types.ModuleType("moe_course.training")
    training.capstone = capstone  # type: ignore[attr-defined]
    sys.modules["moe_course.training"] = training
    sys.modules["moe_course.training.capstone"] = capstone
    # Triton is imported by those who use it.
    sys.modules["moe_course.grading.interpreter"] = _Triton("interpreter")
    names["get_ipython"] = lambda: None
    names["display"] = lambda *args, **kwargs: None
    names["__name__"] = "__main__"
    return names


def main() -> None:
    import torch

    torch.set_num_threads(1)
    # The learner's prints go nowhere; the pipes get numbers of their own.
    channel = Channel(os.dup(0), os.dup(1))
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(nothing, fd)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.ones(2, requires_grad=True).sum().backward()  # threads and tables of autograd
    channel.send({"ready": True}, [])
    Worker(channel).serve()


if __name__ == "__main__":
    main()
