"""Small numbers: errors within their bounds, sizes with scales, and MXFP4 against a table written out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_course import quant


@settings(max_examples=60)
@given(
    rows=st.integers(0, 5),
    n=st.integers(1, 70),
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from([2, 16, 32, 128]),
    seed=st.integers(0, 9),
)
def test_no_weight_is_off_by_more_than_half_a_step(rows, n, bits, group, seed):
    w = torch.randn(rows, n, generator=torch.Generator().manual_seed(seed))
    q = quant.quantise(w, bits, group)
    back = q.dequantise()
    assert back.shape == w.shape
    steps = q.scales.repeat_interleave(group, -1)[:, :n]
    assert ((back - w).abs() <= steps / 2 * (1 + 1e-5)).all()
    # The largest of each group is kept.
    padded = torch.nn.functional.pad(w, (0, -n % group)).unflatten(-1, (-1, group))
    most = 2 ** (bits - 1) - 1
    torch.testing.assert_close(q.scales * most, padded.abs().amax(-1))
    groups = math.ceil(n / group)
    assert q.nbytes() == rows * groups * (group * bits // 8 + 4)


def test_sizes_with_scales():
    w = torch.randn(64, 4096).bfloat16()
    assert quant.quantise(w, 4, 32).nbytes() / w.numel() == 0.5 + 2 / 32
    assert quant.quantise(w, 8, 128).nbytes() / w.numel() == 1 + 2 / 128


def test_zeros_and_what_is_not_finite():
    assert not quant.quantise(torch.zeros(2, 8), 4, 4).dequantise().any()
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite"):
            quant.quantise(torch.tensor([[1.0, bad]]), 8, 2)
        with pytest.raises(ValueError, match="finite"):
            quant.encode_mxfp4(torch.full((1, 32), bad))
    with pytest.raises(ValueError, match="bits must be 8 or 4, got 3"):
        quant.quantise(torch.ones(1, 4), 3)
    with pytest.raises(ValueError, match="even number"):
        quant.quantise(torch.ones(1, 4), 4, 3)


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


@settings(max_examples=40)
@given(seed=st.integers(0, 99), exponent=st.integers(-20, 20))
def test_mxfp4_finds_the_nearest_value(seed, exponent):
    rng = torch.Generator().manual_seed(seed)
    w = torch.randn(3, 64, generator=rng) * 2.0**exponent
    blocks, scales = quant.encode_mxfp4(w)
    assert (blocks.nbytes + scales.nbytes) / w.numel() == 4.25 / 8
    back = quant.decode_mxfp4(blocks, scales)
    unit = torch.exp2(scales.float() - 127).repeat_interleave(32, -1)
    grid = torch.tensor([e2m1(b) for b in range(16)])
    best = (w / unit)[..., None].sub(grid).abs().amin(-1)
    torch.testing.assert_close((w / unit - back / unit).abs(), best)
    # What it can store comes back.
    again = quant.decode_mxfp4(*quant.encode_mxfp4(back))
    assert torch.equal(again, back)


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
