"""The trace of kernels: what is counted, and what is refused, where the interpreter itself is silent."""

import subprocess
import sys
from contextlib import suppress

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: no kernels to watch")

import trace_kernels as k
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_course.kernels.trace import OutOfBoundsError, trace


def numbers(*shape, dtype=torch.float32):
    return torch.arange(1, 1 + int(np.prod(shape)), dtype=dtype).reshape(shape)


def test_loads_and_stores_are_counted_by_tensor_and_program():
    x, y = numbers(100), torch.zeros(100)
    with trace({"x": x, "y": y}) as seen:
        k.copy[(4,)](x, y, 100, BLOCK=32)
    assert torch.equal(x, y)
    assert seen.launches == [(4, 1, 1)]
    assert seen.count == 4
    loads, last = seen.traffic("load", "x"), seen.traffic("store", "y", program=3)
    assert (loads.operations, loads.elements, loads.bytes) == (4, 100, 400)
    assert (last.operations, last.elements, last.bytes) == (1, 4, 16)
    assert seen.traffic("load", "y").operations == 0
    assert seen.traffic("load") == loads
    assert not seen.races + seen.unwritten
    assert not seen.outside
    assert not seen.dots


def test_who_stored_and_loaded_each_element():
    x, y = numbers(10), torch.zeros(5, 4)
    with trace({"x": x, "y": y}) as seen:
        k.copy[(3,)](x, y, 10, BLOCK=4)
    want = [[0] * 4, [1] * 4, [2, 2, -1, -1], [-1] * 4, [-1] * 4]
    assert seen.programs("y").tolist() == want
    assert seen.touched("store", "y", program=1).tolist() == [
        [r == 1] * 4 for r in range(5)
    ]
    assert seen.touched("load", "x", program=2).nonzero()[0].tolist() == [8, 9]
    assert seen.touched("load", "x").all()
    assert (seen.programs("x") == -1).all()
    assert seen.stored(y[:2]).all()
    assert not seen.stored(y[3:]).any()


def test_programs_of_a_grid_are_numbered_like_threads():
    y = torch.zeros(24, dtype=torch.int32)
    with trace() as seen:
        k.grid_numbers[(2, 3, 4)](y, X=2, Y=3)
    assert seen.programs("y").tolist() == list(range(24))


def test_scattered_accesses_move_whole_sectors():
    # Rows of 64 bytes that begin where a sector does.
    memory = torch.zeros(8 * 16 + 8)
    skip = -(memory.data_ptr() // 4) % 8
    x, y = memory[skip : skip + 128].view(8, 16), torch.zeros(16 * 8)
    with trace({"x": x, "y": y}) as seen:
        k.columns[(16,)](x, y, 8, 16, BLOCK=8)
    loads = seen.traffic("load", "x")
    assert loads.bytes == 4 * 128
    assert loads.moved == 32 * 128  # a sector for every element


@pytest.mark.parametrize("length", [1, 63, 100, 127])
def test_a_load_past_the_end_is_refused_though_the_values_there_are_right(length):
    memory = numbers(128)
    x, y = memory[:length], torch.zeros(128)
    programs = -(-length // 32)
    with (
        pytest.raises(OutOfBoundsError, match=rf"x \(shape \[{length}\]\)") as error,
        trace({"x": x, "y": y}),
    ):
        k.copy_all[(programs,)](x, y, BLOCK=32)
    missing = 32 * programs - length
    assert f"program {programs - 1} (grid position {programs - 1}, 0, 0)" in str(
        error.value
    )
    assert f"loads {missing} element{'s' * (missing > 1)} out of bounds" in str(
        error.value
    )
    assert "past the end" in str(error.value)
    k.copy_all[(programs,)](x, y, BLOCK=32)  # as it goes unwatched
    assert torch.equal(y[: 32 * programs], memory[: 32 * programs])


def test_one_element_of_a_neighbour_is_outside():
    """Two tensors of one allocation, end to end: each pointer belongs to one of them."""
    memory = numbers(64)
    x, z, y = memory[:32], memory[32:], torch.zeros(32)
    with trace({"x": x, "z": z, "y": y}):
        k.shifted[(1,)](x, y, 0, BLOCK=32)
    with (
        pytest.raises(OutOfBoundsError, match="1 element past the end of x"),
        trace({"x": x, "z": z, "y": y}),
    ):
        k.shifted[(1,)](x, y, 1, BLOCK=32)
    with (
        pytest.raises(OutOfBoundsError, match="3 elements before the beginning of z"),
        trace({"x": x, "z": z, "y": y}),
    ):
        k.shifted[(1,)](z, y, -3, BLOCK=32)


def test_a_store_outside_touches_no_memory():
    x, memory = numbers(64), torch.zeros(64)
    with (
        pytest.raises(OutOfBoundsError, match="stores 24 elements"),
        trace() as seen,
    ):
        k.copy_all[(2,)](x, memory[:40], BLOCK=32)
    assert torch.equal(memory[:32], x[:32])  # the first program's
    assert not memory[32:].any()
    assert seen.outside


def test_gaps_of_a_view_are_outside():
    memory = numbers(4, 8)
    view, y = memory[:, :5], torch.zeros(4 * 5)
    with trace({"x": view, "y": y}) as seen:
        k.columns[(5,)](view, y, 4, 8, BLOCK=4)
    assert torch.equal(y.view(5, 4), view.T)
    assert seen.touched("load", "x", program=2).tolist() == [[False, False, True, False, False]] * 4  # fmt: skip
    y = torch.zeros(4 * 8)
    with (
        pytest.raises(OutOfBoundsError, match="between the elements of x"),
        trace({"x": view, "y": y}),
    ):
        k.columns[(6,)](view, y, 3, 8, BLOCK=4)


def test_an_access_that_somebody_swallows_is_still_an_error():
    x, y = numbers(3), torch.zeros(4)
    with pytest.raises(OutOfBoundsError), trace(), suppress(Exception):
        k.copy_all[(1,)](x, y, BLOCK=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_a_lane_without_other_is_nan(dtype):
    x, y = numbers(3, 5, dtype=dtype), torch.zeros(3, dtype=dtype)
    with trace():
        k.row_sums[(3,)](x, y, 5, OTHER=True, BLOCK=8)
    assert torch.equal(y, x.sum(1))
    with trace():
        k.row_sums[(3,)](x, y, 5, OTHER=False, BLOCK=8)
    assert y.isnan().all()
    k.row_sums[(3,)](x, y, 5, OTHER=False, BLOCK=8)
    assert torch.equal(y, x.sum(1))  # the interpreter's kindness
    whole = numbers(3, 8, dtype=dtype)
    with trace():
        k.row_sums[(3,)](whole, y, 8, OTHER=False, BLOCK=8)
    assert torch.equal(y, whole.sum(1))  # nothing is left out


def test_a_scalar_other_of_zero_is_no_missing_one():
    x, y = numbers(1), torch.full((1,), 5.0)
    with trace():
        k.scalar[(1,)](x, y, zero=True)
    assert y.item() == 0
    with trace():
        k.scalar[(1,)](x, y, zero=False)
    assert y.isnan().all()


def test_an_integer_lane_without_other_is_far_from_anything():
    x, y = numbers(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with trace():
        k.scalar[(1,)](x, y, zero=False)
    assert y.item() == torch.iinfo(torch.int32).max


def test_two_programs_that_store_one_element_are_noticed():
    y = torch.zeros(4, dtype=torch.int32)
    with trace({"y": y}) as seen:
        k.same_place[(1,)](y, BLOCK=4)
        k.same_place[(1,)](y, BLOCK=4)  # one launch after the other is in order
    assert not seen.races
    assert (seen.programs("y") == 1).all()
    with trace({"y": y}) as seen:
        k.same_place[(3,)](y, BLOCK=4)
    assert (
        seen.races[0]
        == "program 1 stores element [0] of y, which program 0 of the same launch has stored"
    )
    assert (seen.programs("y") == 2).all()


def test_a_program_that_needs_another_s_result_is_noticed():
    y = torch.zeros(4, dtype=torch.int32)
    with trace({"y": y}) as seen:
        k.chain[(4,)](y)
    assert y.tolist() == [1, 2, 3, 4]  # by the interpreter's order
    assert "program 1 loads element [0] of y, which program 0" in seen.races[0]


def test_what_another_program_stores_later_is_noticed():
    x, y = torch.ones(20), torch.zeros(16)
    with trace() as seen:
        k.from_the_next[(4,)](x, y, BLOCK=4)
    text = "program 0 loads element [4] of x, which program 1 of the same launch stores"
    assert seen.races[0] == text
    x, y = torch.ones(20), torch.zeros(16)
    with trace() as seen:
        for _ in range(3):
            k.from_the_next[(1,)](x, y, BLOCK=4)
    assert not seen.races


def test_sums_of_floats_have_another_order_than_the_interpreter_s():
    x = torch.tensor([[2.0**24, 1], [-(2.0**24), 2], [1, 3], [0.5, 4]])
    y = torch.zeros(2)
    with trace():
        k.column_sums[(1,)](x, y, ROWS=4, COLUMNS=2)
    assert y[0] != 1.5  # what comes out from the first to the last
    assert y[1] == 10


def test_what_a_compiler_refuses_is_noticed():
    x, y = torch.ones(4), torch.zeros(4)
    with trace() as seen:
        k.foreign[(1,)](x, y)
    assert torch.equal(y, torch.full((4,), 2.0))
    said = "\n".join(seen.refused)
    names = ("uses np", "uses sum", "plain, a function without", "SIZE, a global")
    for text in (*names, "{'one': 1}", "`break`", "value.handle"):
        assert text in said, text
    assert "FIXED" not in said
    assert said.count("foreign says") == 4
    with trace() as seen:
        k.known[(1,)](x, y)
        k.copy[(1,)](x, y, 4, BLOCK=4)
    assert not seen.refused


def test_loads_and_stores_through_views_count_for_their_memory():
    x, y = numbers(4, 4), torch.zeros(16)
    with trace({"x": x, "y": y}) as seen:
        k.copy[(1,)](x[1:3], y[4:], 8, BLOCK=8)
    assert seen.loaded(x).any(axis=1).tolist() == [False, True, True, False]
    assert seen.changed(y)
    assert not seen.changed(x)


def test_a_function_that_computes_the_grid_sees_no_values():
    x, y = numbers(8), torch.zeros(8)
    found = []

    def grid(_arguments):
        found.append(x.clone())
        return (1,)

    with trace({"x": x, "y": y}, hide=True):
        k.copy[grid](x, y, 8, BLOCK=8)
    assert found[0].isnan().all()
    assert torch.equal(y, x)

    def fails(_arguments):
        raise LookupError("no grid")

    with suppress(LookupError), trace({"x": x, "y": y}, hide=True):
        k.copy[fails](x, y, 8, BLOCK=8)
    assert torch.equal(x, numbers(8))


def test_loads_of_what_nobody_stored_are_noticed():
    x, scratch, y = numbers(8), torch.zeros(8), torch.zeros(8)
    with trace({"x": x}) as seen:
        k.copy_all[(1,)](x, scratch, BLOCK=8)
        k.copy_all[(1,)](scratch, y, BLOCK=8)
    assert not seen.unwritten
    with trace({"x": x}) as seen:
        k.copy_all[(1,)](x[:4], scratch[:4], BLOCK=4)  # a view of x is x
        k.copy_all[(1,)](scratch, y, BLOCK=8)
    assert "program 1 loads element [4] of " in seen.unwritten[0]
    assert "which no program has stored" in seen.unwritten[0]
    with trace() as seen:  # without names, all that kernels are given is given
        k.copy_all[(1,)](scratch, y, BLOCK=8)
    assert not seen.unwritten


def test_values_are_hidden_between_launches():
    x, y, z = numbers(8), torch.zeros(8), numbers(8, dtype=torch.int32)
    with trace({"x": x, "z": z}, hide=True):
        assert x.isnan().all()
        assert torch.equal(z, numbers(8, dtype=torch.int32))
        k.copy_all[(1,)](x, y, BLOCK=8)
        assert x.isnan().all()
        k.copy_all[(1,)](z, x, BLOCK=8)  # what a kernel stores stays
    assert torch.equal(y, numbers(8))
    assert torch.equal(x, numbers(8))
    with pytest.raises(OutOfBoundsError), trace({"x": x}, hide=True):
        k.copy_all[(1,)](x, y, BLOCK=16)
    assert torch.equal(x, numbers(8))


def test_atomics_are_counted_and_bounded():
    x, y = numbers(8), torch.zeros(1)
    with trace({"x": x, "y": y}) as seen:
        k.add_up[(2,)](x, y, BLOCK=4)
    assert y.item() == 36
    assert seen.traffic("atomic", "y").operations == 2
    assert all(a.floating for a in seen.accesses if a.kind == "atomic")
    assert not seen.races
    with pytest.raises(OutOfBoundsError, match="updates 1 element"), trace():
        k.add_up[(1,)](x, y[1:], BLOCK=4)
    flag = torch.zeros(1, dtype=torch.int32)
    with trace() as seen:
        k.swap[(1,)](flag)
    assert flag.item() == 7
    assert seen.traffic("atomic", "flag").operations == 1


def test_sizes_of_products_are_kept():
    x, y, z = torch.ones(1, 8), torch.ones(8, 16), torch.zeros(1, 16)
    with trace() as seen:
        k.product[(1,)](x, y, z, M=1, N=16, K=8)
    assert (z == 8).all()
    assert seen.dots == {(1, 16, 8)}


def test_offsets_past_32_bits_are_found_without_the_memory():
    x = torch.empty(3, 2**30, dtype=torch.float16)
    x[2, :8] = numbers(8, dtype=torch.float16)
    y, index = torch.zeros(8, dtype=torch.float16), torch.tensor([2], dtype=torch.int32)
    with trace():
        k.pick[(1,)](x, y, index, 2**30, BLOCK=8, WIDE=True)
    assert y.tolist() == list(range(1, 9))
    with (
        pytest.raises(OutOfBoundsError, match="2,147,483,648 elements before"),
        trace(),
    ):
        k.pick[(1,)](x, y, index, 2**30, BLOCK=8, WIDE=False)


def test_block_pointers_and_descriptors_are_seen():
    x, y = numbers(3, 5), torch.zeros(3, 5)
    with trace({"x": x, "y": y}) as seen:
        k.block_pointers[(1,)](x, y, 3, 5, BLOCK=8)
    assert torch.equal(x, y)
    assert seen.traffic("load", "x").elements == 15
    assert (seen.programs("y") == 0).all()
    x, y = numbers(5, 8), torch.zeros(5, 8)
    with trace({"x": x, "y": y}) as seen:
        k.descriptors[(3,)](
            TensorDescriptor.from_tensor(x, [2, 8]),
            TensorDescriptor.from_tensor(y, [2, 8]),
            ROWS=2,
            COLUMNS=8,
        )
    assert torch.equal(x, y)
    assert seen.programs("y")[:, 0].tolist() == [0, 0, 1, 1, 2]


def test_everything_is_put_back_after_an_error_too():
    builder = interpreter.interpreter_builder
    before = dict(vars(builder)), dict(vars(interpreter)), interpreter.GridExecutor.__call__  # fmt: skip
    x, y = numbers(1), torch.zeros(1)
    with pytest.raises(ValueError, match="of its own"), trace():
        k.fails[(1,)](x, y)
    with pytest.raises(KeyError), trace():
        raise KeyError
    with pytest.raises(OutOfBoundsError), trace():
        k.copy_all[(1,)](x, y, BLOCK=2)
    after = dict(vars(builder)), dict(vars(interpreter)), interpreter.GridExecutor.__call__  # fmt: skip
    for name in ("create_masked_load", "create_dot", "set_grid_dim"):
        assert name not in after[0]
    assert before[1] == after[1]
    assert before[2] is after[2]
    assert "load" not in vars(interpreter.interpreter_semantic)
    with trace() as seen:  # and it works again
        k.copy_all[(1,)](x, y, BLOCK=1)
    assert seen.count == 1


def test_what_cannot_be_watched_is_told():
    with pytest.raises(ValueError, match="share memory"), trace({"x": torch.zeros(1).expand(3)}):  # fmt: skip
        pass
    with pytest.raises(RuntimeError, match="inside a trace"), trace(), trace():
        pass
    with trace() as seen:
        pass
    with pytest.raises(ValueError, match="no tensor 'x'"):
        seen.programs("x")
    with pytest.raises(TypeError, match="BLOCK"), trace():
        k.copy_all[(1,)](torch.zeros(1), torch.zeros(1))


def test_empty_tensors_and_views_of_any_order_are_fine():
    x = numbers(2, 3, 4).permute(2, 0, 1)[:, :, ::2]
    with trace({"x": x, "nothing": torch.zeros(0, 3)}) as seen:
        pass
    region = seen._region("x")
    assert region.index(region.addresses().ravel()).tolist() == list(range(16))
    inside = {*region.addresses().ravel().tolist()}
    around = np.arange(region.base - 40, region.end + 40)
    assert {int(a) for a in around[region.index(around) >= 0]} == inside
    assert seen.programs("nothing").shape == (0, 3)


def test_the_file_needs_triton_only_when_used_and_says_so_where_kernels_are_compiled(root):  # fmt: skip
    """The judge's worker has this file without its package."""
    code = f"""
import importlib.util, sys
path = {str(root / "moe_course" / "kernels" / "trace.py")!r}
spec = importlib.util.spec_from_file_location("trace_alone", path)
module = sys.modules["trace_alone"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert "triton" not in sys.modules
try:
    with module.trace(): pass
except RuntimeError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PATH": "/usr/bin:/bin", "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "set TRITON_INTERPRET=1" in done.stdout, done.stderr
