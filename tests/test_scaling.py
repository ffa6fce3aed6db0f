"""Scaling laws against the figures that their papers print, and what follows from their form."""

from __future__ import annotations

import math
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_course.costs import (
    CLARK,
    clark_loss,
    effective_parameters,
    krajewski_dense_loss,
    krajewski_loss,
)

sizes = st.floats(15e6, 1.3e9)
experts = st.floats(1, 512)
methods = st.sampled_from(sorted(CLARK))


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize(
    ("active", "tokens", "granularity", "printed"),
    [  # arXiv:2402.07871, table 2
        (100e6, 4.37e9, 8, 3.133),
        (1e9, 28.94e9, 16, 2.491),
        (3e9, 72.90e9, 16, 2.245),
        (7e9, 137.60e9, 32, 2.076),
        (70e9, 941.07e9, 32, 1.694),
        (300e9, 2.96e12, 64, 1.503),
        (1e12, 7.94e12, 64, 1.367),
    ],
)
def test_krajewskis_law_gives_the_losses_of_its_table(
    active, tokens, granularity, printed
):
    # Section 6.1: N = width² · (8·64 + 4) · layers, of which 12 · width² · layers are active.
    total = active * (8 * 64 + 4) / 12
    # The constants are printed to two or three digits; 64 * active instead would miss by up to 0.09.
    assert krajewski_loss(total, tokens, granularity) == pytest.approx(
        printed, abs=0.025
    )


@given(sizes, methods)
def test_one_expert_is_the_dense_model(params, method):
    law = CLARK[method]
    assert law.effective_experts(1) == pytest.approx(law.e_start)
    assert effective_parameters(params, 1, method) == pytest.approx(params)


def test_infinitely_many_experts_count_as_a_few_hundred():
    for law in CLARK.values():
        assert law.effective_experts(1e12) == pytest.approx(law.e_max, rel=1e-6)


@given(sizes, experts, methods)
def test_the_effective_size_has_the_loss(params, experts, method):
    dense = effective_parameters(params, experts, method)
    assert clark_loss(dense, 1, method) == pytest.approx(
        clark_loss(params, experts, method)
    )
    assert dense >= params * (1 - 1e-9)


@given(sizes, experts, experts, methods)
def test_more_experts_help_and_help_the_larger_model_less(params, one, two, method):
    few, many = sorted((one, two))
    better, worse = (clark_loss(params, e, method) for e in (many, few))
    assert better <= worse * (1 + 1e-9)
    gain = effective_parameters(params, many, method) / params
    later = effective_parameters(2 * params, many, method) / (2 * params)
    assert later <= gain * (1 + 1e-9)


def test_routing_stops_to_help_near_a_trillion_parameters():
    # arXiv:2202.01169, section 5.3: 937 billion for S-BASE; the rounded constants put it at 10^(0.108 / 0.009).
    law = CLARK["s-base"]
    assert 10 ** (-law.b / law.c) == pytest.approx(937e9, rel=0.07)
    assert clark_loss(1e12, 64) == pytest.approx(clark_loss(1e12, 1), rel=1e-9)


def test_a_dense_model_of_the_stored_size_is_the_better_one():
    # Stored alike, the dense one computes 43 times as much.
    assert krajewski_dense_loss(1e9, 66e9) < krajewski_loss(1e9, 66e9, 1)
    assert krajewski_dense_loss(1e9 / 43, 66e9) > krajewski_loss(1e9, 66e9, 1)


@given(st.floats(129e6, 3.7e9), st.floats(16e9, 130e9), st.floats(1, 16))
def test_krajewskis_losses_fall_with_each_of_the_three(params, tokens, granularity):
    loss = krajewski_loss(params, tokens, granularity)
    assert krajewski_loss(2 * params, tokens, granularity) < loss
    assert krajewski_loss(params, 2 * tokens, granularity) < loss
    assert krajewski_loss(params, tokens, 2 * granularity) < loss
    assert krajewski_dense_loss(2 * params, tokens) < krajewski_dense_loss(
        params, tokens
    )


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: clark_loss(14e6, 8), "params"),
        (lambda: clark_loss(1e9, 1024), "experts"),
        (lambda: krajewski_loss(1e8, 2e10, 1), "params"),
        (lambda: krajewski_loss(1e9, 1e9, 1), "tokens"),
        (lambda: krajewski_loss(1e9, 2e10, 32), "granularity"),
        (lambda: krajewski_dense_loss(1e9, 1e12), "tokens"),
    ],
)
def test_outside_the_fitted_range_a_law_warns_and_answers(call, name):
    with pytest.warns(UserWarning, match=f"{name} = .* outside the fitted range"):
        assert math.isfinite(call())


def test_within_the_range_there_is_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clark_loss(1e9, 128)
        krajewski_loss(1e9, 66e9, 8)
        krajewski_dense_loss(1e9, 66e9)


@pytest.mark.parametrize("bad", [0, 0.5, -1, math.nan])
def test_what_is_no_size_is_refused(bad):
    for call in (
        lambda: clark_loss(bad, 8),
        lambda: clark_loss(1e9, bad),
        lambda: krajewski_loss(1e9, bad, 1),
        lambda: krajewski_dense_loss(bad, 1e9),
    ):
        with pytest.raises(ValueError, match="must be at least 1, got"):
            call()
