"""show(): the source that a page displays is the package's own."""

from __future__ import annotations

import inspect

import pytest

from moe_course.layers import SwiGLU
from moe_course.show import show
from moe_course.specs import FFN


def test_it_shows_the_file_and_the_whole_source():
    code = show(FFN)
    assert (
        code.data == "# moe_course/specs/model.py\n" + inspect.getsource(FFN).rstrip()
    )
    assert code.language == "python"


def test_several_objects_are_shown_in_order():
    code = show(SwiGLU, FFN.params).data
    assert code.index("# moe_course/layers/ffn.py\nclass SwiGLU") == 0
    # a method loses the indentation of its class, and nothing else
    assert code.index("# moe_course/specs/model.py\ndef params") > code.index(
        "return self.down(hidden)"
    )
    assert "\n    weights = (inputs + 1) * width * self.hidden\n" in code


def test_a_kernel_is_shown_as_it_was_written():
    pytest.importorskip("triton")
    from moe_course.kernels import grouped_gemm, routing

    code = show(routing._count_kernel, grouped_gemm.combine).data
    assert code.startswith("# moe_course/kernels/routing.py\n@triton.jit\n")
    assert "def _count_kernel(\n    ids_ptr," in code
    assert "\n\n\n# moe_course/kernels/grouped_gemm.py\ndef combine(" in code


def test_what_a_notebook_defines_is_said_to_be_there():
    def mine(x):
        return x + 1

    mine.__module__ = "__main__"  # as in a notebook
    assert show(mine).data.startswith("# this notebook\n")
    assert "return x + 1" in show(mine).data
