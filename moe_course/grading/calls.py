"""What is looked at around a call of an answer, here or in the judge's worker. Needs nothing of the course.

Torch is imported where it is needed: counting exercises need none.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
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
