"""Triton for exercise notebooks: `from moe_course.grading.interpreter import tl, triton`.

Kernels run in Triton's interpreter, on the CPU, whether or not there is a GPU. Where Triton is not installed, stand-ins
let the cells that define kernels run; the questions about kernels are then left out. The judge's worker runs this very
file.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, and by each jit

MISSING = (
    "Triton is not installed here (it runs on Linux): "
    "the questions that need it are left out, and their points with them. All others work."
)

triton: Any
tl: Any
if importlib.util.find_spec("triton") is None:
    print(MISSING)

    def _jit(function: Any = None, **_options: Any) -> Any:
        return function or _jit

    triton = SimpleNamespace(jit=_jit, cdiv=lambda a, b: -(-a // b))
    tl = SimpleNamespace(constexpr=int)
else:
    triton = importlib.import_module("triton")
    tl = importlib.import_module("triton.language")
    from triton.runtime.interpreter import InterpretedFunction

    if not isinstance(tl.standard.sigmoid, InterpretedFunction):
        raise RuntimeError(
            "Triton was imported before, without its interpreter: restart the kernel and run this notebook from the top"
        )

__all__ = ["tl", "triton"]
