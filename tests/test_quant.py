"""Small numbers: errors within their bounds, sizes with scales, and MXFP4 against a table written out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_course import quant
from moe_course.costs import Precision, weight_bytes
from moe_course.layers import (
    ExpertChoiceRouter,
    Experts,
    MoE,
    SwiGLU,
    TopKRouter,
    Transformer,
    renormalised,
)
from moe_course.specs import FFN, GQA, ModelSpec, RoutedExperts, zoo

GROUPS = st.sampled_from([2, 16, 32, 128, None])


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=80)
@given(
    rows=st.integers(0, 5),
    n=st.integers(1, 70),
    bits=st.sampled_from([4, 8]),
    group=GROUPS,
    dtype=st.sampled_from(
        [torch.float64, torch.float32, torch.bfloat16, torch.float16]
    ),
    exponent=st.sampled_from([-12, 0, 12]),
    seed=st.integers(0, 9),
)
def test_no_weight_is_off_by_more_than_its_bound(
    rows, n, bits, group, dtype, exponent, seed
):
    w = (draw(rows, n, seed=seed).double() * 2.0**exponent).to(dtype)
    q = quant.quantise(w, bits, group)
    back = q.dequantise()
    assert back.shape == w.shape
    assert back.dtype == q.scales.dtype == dtype
    even = n + n % 2
    long = even if group is None else min(group, even)
    groups = math.ceil(n / long)
    assert q.nbytes() == rows * groups * (long * bits // 8 + dtype.itemsize)
    # Half a step, what the scale was rounded by for each step, and what the product was.
    padded = torch.nn.functional.pad(w.double(), (0, -n % long)).unflatten(
        -1, (groups, long)
    )
    most = 2 ** (bits - 1) - 1
    exact = padded.abs().amax(-1) / most
    stored = q.scales.double()
    narrow = torch.finfo(dtype)
    slip = narrow.eps * exact + narrow.smallest_normal * narrow.eps
    assert ((stored - exact).abs() <= slip).all()
    rounding = torch.promote_types(dtype, torch.float32)
    product = back.double().abs() * (narrow.eps + 256 * torch.finfo(rounding).eps)
    wide = (stored / 2 + most * (stored - exact).abs()).repeat_interleave(long, -1)
    assert ((back.double() - w.double()).abs() <= wide[:, :n] * 1.0001 + product).all()


@settings(max_examples=40)
@given(
    n=st.integers(1, 40),
    bits=st.sampled_from([4, 8]),
    group=GROUPS,
    seed=st.integers(0, 9),
)
def test_an_integer_is_the_nearest_one_and_the_largest_keeps_its_value(
    n, bits, group, seed
):
    w = draw(3, n, seed=seed)
    q = quant.quantise(w, bits, group)
    integers = q.values if bits == 8 else quant.unpack4(q.values)
    most = 2 ** (bits - 1) - 1
    for row in range(3):
        for g in range(q.scales.shape[1]):
            numbers = w[row, g * q.group : (g + 1) * q.group].tolist()
            scale = max(map(abs, numbers)) / most
            want = [round(v / scale) for v in numbers]
            got = integers[row, g * q.group : g * q.group + len(want)].tolist()
            assert got == want
            assert max(map(abs, got)) == most
    # Rounded again it stays.
    again = quant.quantise(q.dequantise(), bits, group).dequantise()
    torch.testing.assert_close(again, q.dequantise())


def test_groups_are_rows_of_their_own():
    """A scale looks at its own group alone, along the last dimension, in any number of dimensions."""
    w = draw(2, 3, 64)
    w[1, 2, 32:] *= 1000
    q = quant.quantise(w, 4, 32)
    assert q.scales.shape == (2, 3, 2)
    untouched = quant.quantise(draw(2, 3, 64), 4, 32).dequantise()
    got = q.dequantise()
    assert torch.equal(got[..., :32], untouched[..., :32])
    assert torch.equal(got[:1], untouched[:1])
    # A bank of experts is quantised expert by expert, however it is cut.
    alone = torch.stack([quant.quantise(each, 4, 32).dequantise() for each in w])
    assert torch.equal(got, alone)


def test_a_group_longer_than_a_row_is_the_row():
    w = draw(4, 48)
    for group in (48, 128, None):
        q = quant.quantise(w, 4, group)
        assert (q.group, q.scales.shape) == (48, (4, 1))
        assert q.nbytes() == 4 * (24 + 4)


def test_float64_beyond_float32():
    w = torch.tensor([[1e300, -5e299, 0.0, 1e290]], dtype=torch.float64)
    back = quant.quantise(w, 8, 4).dequantise()
    assert (back - w).abs().max() <= 1e300 / 127 / 2 * 1.0001
    with pytest.raises(ValueError, match="finite"):
        quant.encode_mxfp4(w.repeat(1, 8))


def test_sizes_with_scales():
    w = torch.randn(64, 4096).bfloat16()
    assert quant.quantise(w, 4, 32).nbytes() / w.numel() == 0.5 + 2 / 32
    assert quant.quantise(w, 8, 128).nbytes() / w.numel() == 1 + 2 / 128


def test_counts_meet_published_files():
    """Shapes, bits and what stays wide give the sizes that are printed, to their last digit."""
    mixtral = zoo["mixtral-8x7b"]
    parts = mixtral.breakdown()
    # AWQ in groups of 128 with zero points; embeddings, head, router and norms in 16 bits (its quant_config.json).
    wide = sum(
        parts[name].total
        for name in ("input_embedding", "output_head", "router", "norms")
    )
    narrow = mixtral.total_params() - wide
    assert round((narrow * (4 + 20 / 128) / 8 + 2 * wide) / 1e9, 2) == 24.65
    # llama.cpp's Q8_0: a 16-bit scale for each 32 weights, everywhere (pull request 4406: 46.22 GiB).
    assert weight_bytes(mixtral, Precision(8.5 / 8)) / 2**30 == pytest.approx(
        46.22, abs=0.02
    )
    for name, published in (("gpt-oss-120b", 60.8), ("gpt-oss-20b", 12.8)):
        spec = zoo[name]
        matrices = 3 * spec.width * spec.moe.expert.hidden * spec.moe.experts
        experts = len(spec.moe_layers) * matrices
        size = experts * 4.25 / 8 + 2 * (spec.total_params() - experts)
        assert round(size / 2**30, 1) == published  # arXiv:2508.10925, table 1


def test_zeros_and_what_is_not_finite():
    assert not quant.quantise(torch.zeros(2, 8), 4, 4).dequantise().any()
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite"):
            quant.quantise(torch.tensor([[1.0, bad]]), 8, 2)
        with pytest.raises(ValueError, match="finite"):
            quant.encode_mxfp4(torch.full((1, 32), bad))
    with pytest.raises(ValueError, match="bits must be 8 or 4, got 3"):
        quant.quantise(torch.ones(1, 4), 3)
    for group in (3, 0, -2):
        with pytest.raises(ValueError, match="even number"):
            quant.quantise(torch.ones(1, 4), 4, group)
    for bits in (4, 8):
        with pytest.raises(ValueError, match=r"hold numbers, got shape \[2, 0\]"):
            quant.quantise(torch.ones(2, 0), bits)


@settings(max_examples=30)
@given(
    st.lists(st.integers(-8, 7), min_size=0, max_size=16).filter(
        lambda v: len(v) % 2 == 0
    )
)
def test_two_integers_to_a_byte_and_back(values):
    packed = quant.pack4(torch.tensor([values], dtype=torch.int8))
    assert packed.shape[-1] == len(values) // 2
    assert quant.unpack4(packed).tolist() == [values]


def test_the_first_integer_is_the_low_half():
    assert quant.pack4(torch.tensor([1, -1], dtype=torch.int8)).tolist() == [0xF1]
    with pytest.raises(ValueError, match="even number of columns"):
        quant.pack4(torch.ones(3, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"-8\.\.7, got 1\.\.8"):
        quant.pack4(torch.tensor([1, 8], dtype=torch.int8))


def e2m1(bits):
    """From the definition: sign, two bits of exponent with bias 1, one of mantissa; no infinity."""
    sign = -1 if bits & 8 else 1
    exponent, mantissa = bits >> 1 & 3, bits & 1
    value = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2 ** (exponent - 1)
    return sign * value


def test_mxfp4_by_its_definition():
    blocks = torch.arange(256, dtype=torch.uint8).view(16, 16)
    scales = torch.arange(120, 136, dtype=torch.uint8).view(16, 1)
    got = quant.decode_mxfp4(blocks, scales)
    for row in range(16):
        want = [
            e2m1(byte >> shift & 0xF) * 2.0 ** (120 + row - 127)
            for byte in blocks[row].tolist()
            for shift in (0, 4)
        ]
        assert got[row].tolist() == want
    assert (
        quant.decode_mxfp4(blocks[:1], torch.tensor([[255]], dtype=torch.uint8))
        .isnan()
        .all()
    )
    with pytest.raises(
        ValueError, match="16 bytes hold 32 numbers, but 2 scales need 64"
    ):
        quant.decode_mxfp4(blocks, scales.expand(16, 2))


def test_every_scale_of_mxfp4_is_exact():
    """All 255 powers of two, those that float32 holds only as subnormal numbers included."""
    scales = torch.arange(255, dtype=torch.uint8).view(255, 1)
    blocks = torch.full((255, 16), 0x72, dtype=torch.uint8)  # 1 and 6
    got = quant.decode_mxfp4(blocks, scales).double()
    for row in range(255):
        assert got[row, 0].item() == 2.0 ** (row - 127)
        six = 6 * 2.0 ** (row - 127)
        assert got[row, 1].item() == (six if six < 2.0**128 else math.inf)


def test_mxfp4_where_subnormal_numbers_are_flushed():
    """6 · 2^-127 is a normal number, though its scale is not."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush subnormal numbers")
    try:
        blocks = torch.full((1, 16), 0x77, dtype=torch.uint8)
        got = quant.decode_mxfp4(blocks, torch.zeros(1, 1, dtype=torch.uint8))
        wanted = quant.quantise_mxfp4(torch.full((1, 32), 6 * 2.0**-127))
    finally:
        torch.set_flush_denormal(False)
    assert (got == 6 * 2.0**-127).all()
    assert (wanted.dequantise() == got).all()


@settings(max_examples=60)
@given(
    rows=st.integers(0, 3),
    seed=st.integers(0, 99),
    exponent=st.sampled_from([-149, -140, -126, -20, -3, 0, 5, 20, 125]),
)
def test_mxfp4_finds_the_nearest_value(rows, seed, exponent):
    w = (draw(rows, 64, seed=seed).clamp(-3.9, 3.9).double() * 2.0**exponent).float()
    small = quant.quantise_mxfp4(w)
    assert small.nbytes() == rows * 64 * 4.25 / 8
    back = small.dequantise()
    assert back.dtype == torch.float32
    unit = torch.exp2(small.scales.double() - 127).repeat_interleave(32, -1)
    grid = torch.tensor([e2m1(b) for b in range(16)], dtype=torch.float64)
    best = (w.double() / unit)[..., None].sub(grid).abs().amin(-1)
    assert torch.equal((w.double() / unit - back.double() / unit).abs(), best)
    # The largest of a group lies in [4, 8) scales, but where the scale cannot be smaller.
    largest = (w.double() / unit).unflatten(-1, (2, 32)).abs().amax(-1)
    smallest = small.scales == 0
    assert (largest < 8).all()
    assert ((largest >= 4) | (largest == 0) | smallest).all()
    # What it can store comes back.
    assert torch.equal(quant.quantise_mxfp4(back).dequantise(), back)


def test_mxfp4_of_zeros_and_of_nothing():
    assert not quant.quantise_mxfp4(torch.zeros(2, 32)).dequantise().any()
    assert quant.quantise_mxfp4(torch.zeros(3, 0)).dequantise().shape == (3, 0)


def test_mxfp4_ties_go_to_the_even_mantissa():
    # The 6 sets the scale to 1. Halfway between neighbours of the grid: 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    w = torch.tensor([[6.0, *ties, *(-t for t in ties)] + [0.0] * 17])
    got = quant.decode_mxfp4(*quant.encode_mxfp4(w))[0, 1:8].tolist()
    assert got == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    with pytest.raises(ValueError, match="groups of 32"):
        quant.encode_mxfp4(torch.ones(1, 33))


def test_mxfp4_agrees_with_transformers():
    integration = pytest.importorskip("transformers.integrations.mxfp4")
    rng = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (2, 6, 3, 16), generator=rng, dtype=torch.uint8)
    scales = torch.randint(118, 137, (2, 6, 3), generator=rng, dtype=torch.uint8)
    theirs = integration.convert_moe_packed_tensors(
        blocks.clone(), scales.clone(), dtype=torch.float32
    )
    ours = quant.decode_mxfp4(blocks.flatten(-2), scales)  # [E, rows, columns]
    torch.testing.assert_close(ours.mT, theirs, rtol=0, atol=0)


# --- A whole model -------------------------------------------------------------------


def moe(shared=False, bias=False, k=2):
    torch.manual_seed(0)
    return MoE(
        TopKRouter(16, 8, k, bias=bias),
        Experts(8, 16, 32, bias=bias),
        SwiGLU(16, 8) if shared else None,
        torch.nn.Linear(16, 1) if shared else None,
    )


def test_every_parameter_belongs_somewhere():
    assert quant.part_of(moe(shared=True, bias=True)) == {
        "router.weight": "router",
        "router.bias": "vectors",
        "experts.w_up": "experts",
        "experts.w_down": "experts",
        "experts.b_up": "vectors",
        "experts.b_down": "vectors",
        "shared.gate.weight": "ffn",
        "shared.up.weight": "ffn",
        "shared.down.weight": "ffn",
        "shared_gate.weight": "router",
        "shared_gate.bias": "vectors",
    }
    assert set(quant.part_of(Experts(2, 4, 4)).values()) == {"experts"}
    assert set(quant.part_of(SwiGLU(4, 4)).values()) == {"ffn"}
    assert quant.part_of(ExpertChoiceRouter(4, 4, 1)) == {"weight": "router"}


def spec(**rest):
    return ModelSpec("x", 2, 16, 32, GQA(2, 1, 8, qkv_bias=True), **rest)


def test_parts_of_a_model_have_the_sizes_that_its_spec_counts():
    sparse = RoutedExperts(4, 2, FFN(8, bias=True), shared=FFN(8), router_bias=True)
    for tied in (False, True):
        shape = spec(ffn=FFN(24), moe=sparse, first_dense=1, tied_embeddings=tied)
        model = Transformer(shape)
        sizes = dict.fromkeys(quant.PARTS, 0)
        belongs = quant.part_of(model)
        for name, parameter in model.named_parameters():
            sizes[belongs[name]] += parameter.numel()
        assert sum(sizes.values()) == shape.total_params()
        assert sizes["experts"] == 4 * 3 * 16 * 8
        assert sizes["router"] == 4 * 16
        assert sizes["ffn"] == 3 * 16 * 24 + 3 * 16 * 8
        heads = 2 * 16 * 16 + 2 * 16 * 8
        assert sizes["other"] == 2 * heads + (1 if tied else 2) * 32 * 16


@settings(max_examples=20)
@given(
    parts=st.sets(st.sampled_from(["experts", "router", "ffn", "other"])),
    bits=st.sampled_from([4, 8]),
)
def test_a_copy_differs_in_what_was_stored_and_only_there(parts, bits):
    torch.manual_seed(1)
    model = Transformer(spec(ffn=FFN(24), moe=RoutedExperts(4, 2, FFN(8)), moe_every=2))
    before = {n: p.clone() for n, p in model.named_parameters()}
    stored = quant.quantise_parts(
        model, lambda w: quant.quantise(w.bfloat16(), bits, 8), *parts
    )
    twin = quant.dequantised(model, stored)
    belongs, size = quant.part_of(model), 0.0
    for name, parameter in twin.named_parameters():
        assert torch.equal(dict(model.named_parameters())[name], before[name])
        if belongs[name] in parts:
            size += parameter.numel() * (bits / 8 + 2 / 8)
            torch.testing.assert_close(
                parameter.detach(), stored[name].dequantise().float(), rtol=0, atol=0
            )
            assert not torch.equal(parameter, before[name])
        else:
            size += 3 * parameter.numel()
            assert torch.equal(parameter, before[name])
    assert set(stored) == {n for n, part in belongs.items() if part in parts}
    assert quant.stored_bytes(model, stored, rest=3.0) == size
    ids = torch.randint(32, (2, 5))
    same = torch.equal(model(ids)[0], twin(ids)[0])
    assert same == (not parts)


def test_a_tied_weight_stays_tied():
    model = Transformer(spec(ffn=FFN(8), tied_embeddings=True))
    stored = quant.quantise_parts(model, lambda w: quant.quantise(w, 8), "other")
    twin = quant.dequantised(model, stored)
    assert twin.head.weight is twin.embedding.weight
    assert not torch.equal(twin.head.weight, model.head.weight)


def test_names_that_are_not_there():
    with pytest.raises(ValueError, match=r"parts must be among .*, got 'gates'"):
        quant.quantise_parts(moe(), lambda w: quant.quantise(w, 8), "experts", "gates")
    stored = quant.quantise_parts(moe(), lambda w: quant.quantise(w, 8), "experts")
    with pytest.raises(ValueError, match=r"no parameter 'experts.w_up'"):
        quant.dequantised(SwiGLU(4, 4), stored)


@settings(max_examples=20)
@given(pieces=st.sampled_from([1, 2, 4]), bits=st.sampled_from([4, 8]))
def test_a_dense_ffn_is_experts_that_are_always_chosen_rounded_or_not(pieces, bits):
    """Cut into slices of its hidden units, and summed with weight 1: the same function, and the same integers."""
    torch.manual_seed(2)
    dense, hidden = SwiGLU(32, 64), 64 // pieces
    bank = Experts(pieces, 32, hidden)
    with torch.no_grad():
        up = [dense.gate.weight, dense.up.weight]
        bank.w_up.copy_(
            torch.stack(
                [
                    torch.cat([w[i * hidden : (i + 1) * hidden] for w in up])
                    for i in range(pieces)
                ]
            )
        )
        bank.w_down.copy_(torch.stack(dense.down.weight.chunk(pieces, dim=1)))

    def small(module, part):
        return quant.dequantised(
            module,
            quant.quantise_parts(module, lambda w: quant.quantise(w, bits, 16), part),
        )

    x = draw(9, 32)
    for ffn, experts in ((dense, bank), (small(dense, "ffn"), small(bank, "experts"))):
        got = sum(
            torch.nn.functional.linear(
                experts.activate(torch.nn.functional.linear(x, experts.w_up[e])),
                experts.w_down[e],
            )
            for e in range(pieces)
        )
        torch.testing.assert_close(got, ffn(x), atol=1e-6, rtol=1e-4)


# --- Routing and errors --------------------------------------------------------------


@settings(max_examples=40)
@given(
    tokens=st.integers(0, 12),
    experts=st.integers(1, 6),
    k=st.integers(1, 6),
    noise=st.sampled_from([0.0, 0.3, 3.0]),
    seed=st.integers(0, 99),
)
def test_flips_are_sets_that_differ_and_margins_say_how_nearly(
    tokens, experts, k, noise, seed
):
    k = min(k, experts)
    logits = draw(tokens, experts, seed=seed)
    moved = logits + noise * draw(tokens, experts, seed=seed + 1000)
    a, b = renormalised(logits, k), renormalised(moved, k)
    got, gap = quant.flipped(a, b), quant.margin(a)
    for t in range(tokens):
        assert got[t].item() == (
            set(a.expert_ids[t].tolist()) != set(b.expert_ids[t].tolist())
        )
        best = sorted(logits[t].tolist(), reverse=True)
        want = best[k - 1] - best[k] if k < experts else math.inf
        assert gap[t].item() == pytest.approx(want, rel=1e-5, abs=1e-6)
        # To turn a token the logits must move by its margin, up and down together.
        if got[t]:
            spread = (moved - logits)[t]
            assert gap[t] <= spread.max() - spread.min() + 1e-6


def test_the_order_of_the_chosen_is_no_flip():
    logits = torch.tensor([[3.0, 2.0, 0.0], [3.0, 2.0, 0.0]])
    moved = torch.tensor([[2.0, 3.0, 0.0], [3.0, 0.0, 2.0]])
    a, b = renormalised(logits, 2), renormalised(moved, 2)
    assert quant.flipped(a, b).tolist() == [False, True]
    assert quant.margin(a).tolist() == [2.0, 2.0]


def test_relative_error():
    want = torch.tensor([3.0, 4.0])
    assert quant.relative_error(want, want) == 0
    assert quant.relative_error(torch.zeros(2), want) == 1
    assert quant.relative_error(torch.tensor([3.0, 4.5]), want) == pytest.approx(0.1)


@settings(max_examples=30)
@given(
    k=st.integers(1, 6),
    alignment=st.sampled_from([0.0, 0.3, 0.8, 1.0]),
    skew=st.sampled_from([0.0, 1.0, 3.0]),
)
def test_errors_of_aligned_experts_average_and_of_unrelated_ones_do_not(
    k, alignment, skew
):
    """Against terms drawn so: a common part and one of its own, in very many dimensions."""
    rng = torch.Generator().manual_seed(k)
    w = torch.exp(-skew * torch.arange(k) / k)
    w = w / w.sum()
    size = 50_000
    common = torch.randn(size, generator=rng)
    own, noise = torch.randn(2, k, size, generator=rng)
    outputs = alignment**0.5 * common + (1 - alignment) ** 0.5 * own
    exact = (w[:, None] * outputs).sum(0)
    rounded = (w[:, None] * (outputs + 0.1 * noise)).sum(0)
    concentration = w.square().sum().item()
    got = quant.combined_error(0.1, concentration, alignment)
    assert quant.relative_error(rounded, exact) == pytest.approx(got, rel=0.03)
    if alignment == 0:
        assert got == pytest.approx(0.1)
    if alignment == 1:
        assert got == pytest.approx(0.1 * concentration**0.5)


def test_combined_error_needs_a_signal():
    for concentration, alignment in ((0.0, 1.0), (1.1, 1.0), (0.5, -1.0)):
        with pytest.raises(ValueError, match="concentration must lie"):
            quant.combined_error(0.1, concentration, alignment)
