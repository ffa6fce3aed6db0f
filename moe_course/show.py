"""`show(function)`: the package's own source in a notebook, so that a page never holds
a copy of code.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from typing import Any


def show(*objects: type | Callable[..., Any]) -> Any:
    """Display the source of functions, classes or Triton kernels, highlighted, with the file that holds it."""
    from IPython.display import Code

    parts = []
    thing: Any
    for thing in objects:
        # A Triton kernel, compiled or interpreted, wraps the function as it was written.
        while type(thing).__module__.startswith("triton."):
            thing = thing.fn
        module = inspect.getmodule(thing)
        if module is None or module.__name__ == "__main__":
            place = "this notebook"
        else:
            place = module.__name__.replace(".", "/") + ".py"
        parts.append(f"# {place}\n{textwrap.dedent(inspect.getsource(thing)).rstrip()}")
    return Code("\n\n\n".join(parts), language="python")
