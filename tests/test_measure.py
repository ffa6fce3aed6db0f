"""What the cost model is held against: the sums behind the predictions, never a timing."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_course import costs, measure
from moe_course.layers import Transformer
from moe_course.specs import zoo

TINY = measure.decode_specs(layers=2, width=64, hidden=48, vocab=32)


def test_the_dense_models_are_as_large_as_they_say():
    for specs in (measure.decode_specs(), TINY):
        sparse, total, active = specs.values()
        router = sparse.breakdown()["router"].total
        assert sparse.total_params() == total.total_params() + router
        assert sparse.active_params() == active.active_params() + router
    for spec in TINY.values():
        counted = sum(p.numel() for p in Transformer(spec).parameters())
        assert counted == spec.total_params()


@given(batch=st.integers(1, 200), each=st.floats(1e-12, 1e-6))
def test_equal_cost_for_each_weight_gives_the_weights_that_are_read(batch, each):
    for spec in (*TINY.values(), zoo["llama-3.1-8b"]):
        got = measure.step_from_products(spec, batch, {1: each, 256: each})
        rows = 0 if spec.tied_embeddings else min(batch, spec.vocab) * spec.width
        read = costs.touched_weights(spec, batch, costs.Precision(1)) - rows
        assert got == pytest.approx(read * each)


def test_experts_are_charged_for_the_rows_that_reach_them():
    """Cost proportional to rows: then the sparse model costs its active weights, times the batch."""
    each = {n: n * 1e-9 for n in (1, 2, 4, 8, 16, 32, 64, 128)}
    for batch in (1, 2, 16, 128):
        got = measure.step_from_products(TINY["sparse"], batch, each)
        weights = TINY["sparse"].active_params(include_embedding=False)
        assert got == pytest.approx(weights * batch * 1e-9)


def test_between_measured_rows_costs_lie_on_a_power_law():
    dense = TINY["equal total"]
    weights = dense.total_params() - dense.breakdown()["input_embedding"].total
    got = measure.step_from_products(dense, 4, {2: 1e-9, 8: 4e-9})
    assert got == pytest.approx(weights * math.sqrt(1e-9 * 4e-9))


def test_rows_that_were_not_measured_are_refused():
    each = {8: 4e-9, 2: 1e-9}  # in any order
    dense = TINY["equal total"]
    assert measure.step_from_products(dense, 4, each) == measure.step_from_products(
        dense, 4, dict(sorted(each.items()))
    )
    for batch in (1, 9):
        with pytest.raises(ValueError, match="measured with 2 to 8 rows"):
            measure.step_from_products(dense, batch, each)


def test_turns_are_taken_in_order_and_the_first_is_not_counted():
    calls = []
    before = torch.get_num_threads()
    threads = []
    times = measure.take_turns(
        {
            "a": lambda: calls.append("a"),
            "b": lambda: threads.append(torch.get_num_threads()),
        },
        3,
    )
    assert calls == ["a"] * 4
    assert threads == [1] * 4
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}
    assert torch.get_num_threads() == before
    with pytest.raises(RuntimeError, match="on purpose"), measure.one_thread():
        raise RuntimeError("on purpose")
    assert torch.get_num_threads() == before


def test_all_that_is_measured_is_a_positive_number_and_repeats_the_same_steps():
    assert measure.read_bandwidth(2**16, 1) > 0
    assert measure.flop_rate(16, 1) > 0
    each = measure.seconds_per_weight([1, 3], 16, 8, 2**12, 1)
    assert list(each) == [1, 3]
    assert min(each.values()) > 0
    state = torch.get_rng_state()
    found = measure.decode_seconds(TINY, [1, 5], 1)
    assert torch.equal(state, torch.get_rng_state())
    assert {b: list(times) for b, times in found.items()} == {
        1: list(TINY),
        5: list(TINY),
    }
    assert all(t > 0 for times in found.values() for t in times.values())
