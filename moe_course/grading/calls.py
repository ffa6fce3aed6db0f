"""What surrounds a call of an answer, here or in the judge's worker. Needs nothing of the course.

Torch is imported where it is needed: counting exercises need none.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
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
