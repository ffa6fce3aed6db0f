"""What surrounds a call of an answer, here or in the judge's worker. Needs nothing of the course.

Torch is imported where it is needed: counting exercises need none.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any


def is_tensor(value: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def unchanged(now: Any, before: Any) -> bool:
    """Equal in every entry: containers by element, tensors by shape, type and values; functions are not compared."""
    if is_tensor(before):
        if not is_tensor(now) or now.shape != before.shape or now.dtype != before.dtype:
            return False
        return bool(((now == before) | ((now != now) & (before != before))).all())
    if isinstance(before, dict):
        return now.keys() == before.keys() and all(
            unchanged(now[key], before[key]) for key in before
        )
    if isinstance(before, list | tuple):
        return len(now) == len(before) and all(map(unchanged, now, before))
    return callable(before) or bool(now == before)


def cost(call: Callable[[], Any]) -> tuple[Any, int, int]:
    """The result of a call, the entries of the largest tensor that it makes, and the FLOPs of its matrix products.

    The storage of a tensor is counted: views are not counted twice.
    """
    from torch import Tensor
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from torch.utils.flop_counter import FlopCounterMode

    class Largest(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.entries = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            made = func(*args, **(kwargs or {}))
            sizes = [
                leaf.untyped_storage().nbytes() // leaf.element_size()
                for leaf in tree_leaves(made)
                if isinstance(leaf, Tensor)
            ]
            self.entries = max([self.entries, *sizes])
            return made

    with Largest() as largest, FlopCounterMode(display=False) as flops:
        result = call()
    return result, largest.entries, int(flops.get_total_flops())


# --- What kernels do -----------------------------------------------------------------


@dataclass(frozen=True)
class Kernels:
    """What the Triton kernels of one call did, in plain values."""

    programs: int
    loads: int  # operations
    stores: int
    atomics: int
    loaded: int  # bytes, in whole pieces of 32
    written: int
    launches: list[int]  # programs of each
    dots: list[list[int]]  # M, N, K of each tl.dot
    races: list[str]
    unwritten: list[str]
    refused: list[str]  # what a compiler would not take
    read: dict[str, int]  # distinct elements of each argument that were loaded
    changed: list[str]  # arguments that were stored into
    apart: (
        bool  # whether arguments were laid out as asked: memory may have been refused
    )
    stored: Any  # of a tensor that was returned: which elements programs have stored

    def plain(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def of(cls, plain: Any) -> Kernels:
        """From what another process says. Raises ValueError on what is no such thing."""

        def lists(value: Any, kind: type) -> bool:
            return type(value) is list and all(type(entry) is kind for entry in value)

        names = [field.name for field in fields(cls)]
        if type(plain) is not dict or list(plain) != names:
            raise ValueError("no account of kernels")
        got = cls(**plain)
        if not (
            all(type(plain[name]) is int for name in names[:6])
            and lists(got.launches, int)
            and lists(got.dots, list)
            and all(lists(dot, int) and len(dot) == 3 for dot in got.dots)
            and all(lists(plain[n], str) for n in ("races", "unwritten", "refused"))
            and lists(got.changed, str)
            and type(got.read) is dict
            and lists(list(got.read), str)
            and lists(list(got.read.values()), int)
            and type(got.apart) is bool
            and (got.stored is None or is_tensor(got.stored))
        ):
            raise ValueError("no account of kernels")
        return got


def spread(tensor: Any, stride: int) -> Any:
    """The same values with `stride` elements from one entry of the first dimension to the next."""
    inner = tensor[0].contiguous()
    memory = tensor.new_empty((len(tensor) - 1) * stride + inner.numel())
    wide = memory.as_strided(tensor.shape, (stride, *inner.stride()))
    return wide.copy_(tensor)


def watch(
    function: Callable[..., Any],
    case: dict[str, Any],
    apart: Mapping[str, int],
    trace: Any,
) -> tuple[Any, dict[str, Any]]:
    """The result of a call, and what its kernels did, as `Kernels.plain`.

    apart: arguments that are laid out with this stride of their first dimension. trace: moe_course.kernels.trace.trace.
    """
    import torch

    given, granted = dict(case), True
    try:
        given |= {name: spread(case[name], apart[name]) for name in apart}
    except RuntimeError:  # of the allocator
        granted, apart = False, {}
    tensors = {name: value for name, value in given.items() if is_tensor(value)}
    with trace(tensors, hide=True) as seen:
        result = function(**given)
    for name in apart:
        case[name].copy_(given[name])  # whoever compares sees what has changed
    loads, stores = seen.traffic("load"), seen.traffic("store")
    stored = None
    if type(result) is torch.Tensor and result.device.type == "cpu":
        with suppress(ValueError):  # its elements share memory
            stored = torch.from_numpy(seen.stored(result))
    account = Kernels(
        seen.count,
        loads.operations,
        stores.operations,
        seen.traffic("atomic").operations,
        loads.moved,
        stores.moved,
        [x * y * z for x, y, z in seen.launches],
        [list(dot) for dot in sorted(seen.dots)],
        [text[:300] for text in seen.races],
        [text[:300] for text in seen.unwritten],
        [text[:300] for text in seen.refused],
        {name: int(seen.loaded(tensor).sum()) for name, tensor in tensors.items()},
        [name for name, tensor in tensors.items() if seen.changed(tensor)],
        granted,
        stored,
    )  # fmt: skip
    return result, account.plain()


# --- Calls whose other half is in another process ------------------------------------


def tensors(value: Any) -> list[Any]:
    """The tensors in plain containers, in the order in which they travel."""
    import torch

    if type(value) in (torch.Tensor, torch.nn.Parameter):
        return [value]
    if type(value) is dict:
        value = list(value.values())
    if type(value) in (list, tuple):
        return [tensor for part in value for tensor in tensors(part)]
    return []


def with_tensors(value: Any, new: Iterator[Any]) -> Any:
    """The value with its tensors replaced, in that order."""
    import torch

    if type(value) in (torch.Tensor, torch.nn.Parameter):
        return next(new)
    if type(value) is dict:
        return {key: with_tensors(part, new) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(with_tensors(part, new) for part in value)
    return value


def differentiable(
    leaves: list[Any],
    forward: Callable[[], tuple[Any, list[Any], Any]],
    backward: Callable[[Any, list[Any]], list[Any]],
) -> Any:
    """A call whose other half is elsewhere, as one operation of autograd.

    forward: its value, those of the value's tensors that depend on a leaf, and a name for the graph that is kept over
    there, which lives as long as autograd's here. backward: from that name and the gradients of the value's tensors,
    in order, to those of the leaves.
    """
    import torch

    value: Any = None

    class Across(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *_leaves: Any) -> Any:
            nonlocal value
            value, needing, ctx.graph = forward()
            wanted = {id(tensor) for tensor in needing}
            made = tensors(value)
            ctx.mark_non_differentiable(*[t for t in made if id(t) not in wanted])
            return tuple(made)

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return tuple(backward(ctx.graph, list(gradients)))

    made = Across.apply(*leaves)  # type: ignore[no-untyped-call]
    whole = with_tensors(value, iter(made))
    value = None  # else a cycle: value, its graph, Across, value
    return whole
