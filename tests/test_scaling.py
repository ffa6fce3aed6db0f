"""Scaling laws against the figures that their papers print, and what follows from their form."""

from __future__ import annotations

import math
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_course.costs import (
    CLARK,
    LUDZIEJEWSKI,
    clark_loss,
    effective_parameters,
    krajewski_dense_loss,
    krajewski_loss,
    ludziejewski_loss,
    ludziejewski_optimum,
    ludziejewski_total,
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
    # Stored alike, the dense one computes 43 times as much; and is far larger than any dense run.
    with pytest.warns(UserWarning, match="params"):
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
    ("experts", "printed"),
    [  # arXiv:2502.05172, table 4: m, μ, n, ν
        (1, (30.3640, -0.1817, 53.9838, -0.1965)),
        (2, (27.7982, -0.1780, 66.8401, -0.2065)),
        (4, (24.8462, -0.1731, 87.7022, -0.2192)),
        (8, (21.8330, -0.1676, 119.9126, -0.2338)),
        (16, (19.0159, -0.1617, 167.5073, -0.2494)),
        (32, (16.5424, -0.1557, 234.6726, -0.2652)),
    ],
)
def test_ludziejewskis_terms_are_those_of_the_table(experts, printed):
    # Table 4 was computed before table 3 was rounded, to three digits at worst.
    m, mu, n, nu = LUDZIEJEWSKI.terms(experts)
    assert (m, n) == pytest.approx((printed[0], printed[2]), rel=3e-3)
    assert (mu, nu) == pytest.approx((printed[1], printed[3]), abs=1.5e-4)


@pytest.mark.parametrize(
    ("flops", "experts", "params", "tokens"),
    [  # arXiv:2502.05172, table 1
        (1e20, 1, 1.7e9, 9.7e9),
        (1e20, 8, 990e6, 17e9),
        (1e20, 32, 669e6, 24.9e9),
        (1e21, 2, 5e9, 33e9),
        (1e21, 16, 3.3e9, 51.2e9),
        (1e22, 1, 18.8e9, 88.6e9),
        (1e22, 4, 15.8e9, 105.4e9),
        (1e22, 32, 12.2e9, 136.9e9),
    ],
)
def test_ludziejewskis_compute_optima_are_those_of_the_table(
    flops, experts, params, tokens
):
    assert ludziejewski_optimum(flops, experts) == pytest.approx(
        (params, tokens), rel=0.02
    )


@given(st.floats(1e18, 1e24), st.floats(1, 32), st.floats(0.2, 5))
def test_no_other_split_of_the_compute_is_better(flops, experts, factor):
    params, tokens = ludziejewski_optimum(flops, experts)
    assert 6 * params * tokens == pytest.approx(flops)
    best = ludziejewski_loss(params, tokens, experts)
    other = ludziejewski_loss(params * factor, tokens / factor, experts)
    assert best <= other * (1 + 1e-12)


@pytest.mark.parametrize(
    ("width", "experts", "active", "total"),
    [  # arXiv:2502.05172, appendix E, where the layers are a 64th of the width
        (512, 32, 79e6, 664e6),
        (576, 8, 97e6, 285e6),
        (1024, 32, 321e6, 5.0e9),
        (1408, 2, 709e6, 1.1e9),
        (1792, 4, 1.3e9, 3.8e9),
        (2304, 1, 2.7e9, 2.7e9),
    ],
)
def test_ludziejewskis_models_store_what_the_listing_says(
    width, experts, active, total
):
    exact = 2 * width * 50_257 + 13 * width**3 / 64
    assert exact == pytest.approx(active, rel=0.05)
    assert ludziejewski_total(exact, experts) == pytest.approx(total, rel=0.03)


def test_ludziejewskis_rule_of_thumb_has_its_example():
    # Section 4.5: 1.1 billion stored in each; E experts see E times the tokens of the dense model.
    assert ludziejewski_total(709e6, 2) == pytest.approx(1.1e9, rel=0.03)
    assert ludziejewski_total(426e6, 4) == pytest.approx(1.1e9, rel=0.03)
    dense = ludziejewski_loss(1.1e9, 8e9, 1)
    assert ludziejewski_loss(709e6, 16e9, 2) < dense
    assert ludziejewski_loss(426e6, 32e9, 4) < dense
    # On the same tokens it would be worse.
    assert ludziejewski_loss(709e6, 8e9, 2) > dense
    assert ludziejewski_loss(426e6, 8e9, 4) > dense


@given(st.floats(1e19, 1e22), st.floats(1, 31))
def test_at_equal_compute_more_experts_are_better_and_see_more_tokens(flops, experts):
    # Findings 1 and 2.
    few, many = (ludziejewski_optimum(flops, e) for e in (experts, experts + 1))
    assert many[0] < few[0]
    assert many[1] > few[1]
    assert ludziejewski_loss(*many, experts + 1) < ludziejewski_loss(*few, experts)


@given(st.floats(79e6, 1.3e9), st.floats(2e9, 40e9), st.floats(2, 32))
def test_ludziejewskis_gain_falls_with_size_and_grows_with_tokens(
    params, tokens, experts
):
    # Observations 2 and 3 of section 3.
    def gain(params, tokens):
        sparse = ludziejewski_loss(params, tokens, experts)
        return 1 - sparse / ludziejewski_loss(params, tokens, 1)

    assert gain(2 * params, tokens) < gain(params, tokens) < gain(params, 2 * tokens)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: clark_loss(14e6, 8), "params"),
        (lambda: clark_loss(1e9, 1024), "experts"),
        (lambda: krajewski_loss(1e8, 2e10, 1), "params"),
        (lambda: krajewski_loss(1e9, 1e9, 1), "tokens"),
        (lambda: krajewski_loss(1e9, 2e10, 32), "granularity"),
        (lambda: krajewski_dense_loss(25e6, 1e11), "tokens"),
        (lambda: krajewski_dense_loss(1e9, 66e9), "params"),
        (lambda: ludziejewski_loss(7e7, 1e9, 1), "params"),
        (lambda: ludziejewski_loss(1e9, 1e11, 1), "tokens"),
        (lambda: ludziejewski_loss(1e8, 1e9, 64), "experts"),
        (lambda: ludziejewski_loss(1e9, 1e9, 32), "stored params"),
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
        krajewski_dense_loss(25e6, 66e9)
        ludziejewski_loss(321e6, 16e9, 32)
        ludziejewski_loss(2.7e9, 9.2e9, 1)
        ludziejewski_loss(79e6, 0.5e9, 1)


@pytest.mark.parametrize("bad", [0, 0.5, -1, math.nan])
def test_what_is_no_size_is_refused(bad):
    for call in (
        lambda: clark_loss(bad, 8),
        lambda: clark_loss(1e9, bad),
        lambda: krajewski_loss(1e9, bad, 1),
        lambda: krajewski_dense_loss(bad, 1e9),
        lambda: ludziejewski_loss(bad, 1e9, 1),
        lambda: ludziejewski_loss(1e9, bad, 1),
        lambda: ludziejewski_loss(1e9, 1e9, bad),
        lambda: ludziejewski_total(bad, 1),
        lambda: ludziejewski_total(1e9, bad),
        lambda: ludziejewski_optimum(bad, 1),
        lambda: ludziejewski_optimum(1e20, bad),
    ):
        with pytest.raises(ValueError, match="must be at least 1, got"):
            call()
