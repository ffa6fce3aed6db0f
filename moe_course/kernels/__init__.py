"""A fused Mixture-of-Experts layer in Triton, forward and backward.

Needs triton, which exists for Linux alone. On an NVIDIA GPU of compute capability 8.0 or newer the kernels are
compiled. Anywhere else they run in Triton's interpreter, a program at a time on the CPU: right, and slow (`INTERPRETED`
says which). TRITON_INTERPRET=1 or =0, set before the first import, overrules the choice.
"""

from __future__ import annotations

import os
import sys


def _interpret() -> bool:
    chosen = os.environ.get("TRITON_INTERPRET")
    if chosen is not None:
        return chosen.lower() in ("1", "true", "yes", "on", "y")
    import torch

    return not (
        torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    )


INTERPRETED = _interpret()
if INTERPRETED:
    os.environ["TRITON_INTERPRET"] = "1"

try:
    import triton
except ImportError as error:
    raise ImportError(
        f"moe_course.kernels needs triton, which is not installed here ({sys.platform}; there are builds for Linux "
        "alone): use dispatch 'grouped', or run this part on Linux or Colab"
    ) from error


def _interpret_the_standard_library() -> None:
    """Triton's own functions (tl.sum, tl.zeros, ...), too, if somebody imported triton before us without saying so."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    for module in (triton.language, triton.language.standard):
        for name, value in list(vars(module).items()):
            if type(value) is JITFunction:
                setattr(module, name, InterpretedFunction(value.fn))


if INTERPRETED:
    _interpret_the_standard_library()

from moe_course.kernels.fused_moe import fused_moe  # noqa: E402
from moe_course.kernels.routing import (  # noqa: E402
    SortedSlots,
    sort_by_expert,
    top_k_gate,
)

__all__ = ["INTERPRETED", "SortedSlots", "fused_moe", "sort_by_expert", "top_k_gate"]
