"""Accelerators against figures taken from the makers' data sheets by hand."""

from __future__ import annotations

import math

import pytest

from moe_course.specs import accelerators

# name: dense bf16 and fp8 TFLOP/s, GB/s, GB, GB/s of links in one direction, bf16 FLOP per byte of memory traffic
SHEETS = {
    "A100-40GB": (312, None, 1555, 40, 300, 201),
    "A100-80GB": (312, None, 2039, 80, 300, 153),
    "H100-SXM": (989, 1979, 3350, 80, 450, 295),
    "H200": (989, 1979, 4800, 141, 450, 206),
    "B200": (2250, 4500, 62000 / 8, 180, 900, 290),
    "L4": (121, 242, 300, 24, 32, 403),
    "RTX-4090": (165, 330, 1008, 24, 32, 164),
}


def test_no_accelerator_is_missing_and_each_has_a_source():
    assert set(accelerators) == set(SHEETS)
    for name, chip in accelerators.items():
        assert chip.name == name
        assert len(chip.source) > 20
        assert chip.link


@pytest.mark.parametrize("name", SHEETS)
def test_figures_are_those_of_the_data_sheet(name):
    chip = accelerators[name]
    bf16, fp8, bandwidth, capacity, link, ridge = SHEETS[name]
    assert chip.bf16 == pytest.approx(bf16 * 1e12, rel=5e-3)
    assert (chip.fp8 is None) == (fp8 is None)
    if fp8:
        assert chip.fp8 == pytest.approx(fp8 * 1e12, rel=5e-3)
    assert chip.bandwidth == bandwidth * 1e9
    assert chip.capacity == capacity * 1e9
    assert chip.link_bandwidth == link * 1e9
    assert chip.ridge() == pytest.approx(ridge, rel=5e-3)


@pytest.mark.parametrize("name", SHEETS)
def test_figures_are_in_order(name):
    chip = accelerators[name]
    peaks = [chip.bf16] if chip.fp8 is None else [chip.bf16, chip.fp8]
    assert all(
        math.isfinite(x) and x > 0
        for x in (*peaks, chip.bandwidth, chip.capacity, chip.link_bandwidth)
    )
    assert peaks == sorted(peaks)
    assert chip.link_bandwidth < chip.bandwidth < chip.bf16
