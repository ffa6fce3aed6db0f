"""Weights in fewer bits: group-wise integers and MXFP4, with their scales.

Weight-only: numbers are stored small and multiplied in the wide type. Groups run along the last dimension, the one
that a product sums over.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Integer, UInt8
from torch import Tensor

# The sixteen values of E2M1 (OCP Microscaling Formats 1.0, section 5.3.3), by their 4 bits: sign, two exponent bits,
# one of mantissa.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
MXFP4_GROUP = 32


@dataclass(frozen=True)
class Quantised:
    """Integers and the scale of each group: weight = scale · integer. Four-bit integers come two to a byte."""

    values: Integer[Tensor, "*rows stored"]
    scales: Float[Tensor, "*rows groups"]
    bits: int
    size: int  # numbers in a row, before padding to whole groups
    group: int

    def nbytes(self) -> int:
        """Bytes stored, scales included."""
        return self.values.nbytes + self.scales.nbytes

    def dequantise(self) -> Float[Tensor, "*rows n"]:
        """scale · integer, in the dtype of the scales."""
        integers = self.values if self.bits == 8 else unpack4(self.values)
        grouped = integers.unflatten(-1, (-1, self.group))
        wide = grouped.to(self.scales.dtype) * self.scales[..., None]
        return wide.flatten(-2)[..., : self.size]


def quantise(
    weight: Float[Tensor, "*rows n"], bits: int, group: int = 128
) -> Quantised:
    """Symmetric integers of 8 or 4 bits, one scale for each `group` numbers of a row.

        scale = max |w| / (2^(bits-1) - 1)      integer = round(w / scale), ties to even

    A group of zeros has scale 0. A row that is no multiple of `group` is padded with zeros (which are stored). The
    scales keep the dtype of the weight. Largest error: half a scale (and the rounding of that dtype).

    Raises ValueError on bits other than 8 and 4, on a group that is no positive even number, and on weights that are
    not finite.
    """
    if bits not in (4, 8):
        raise ValueError(f"bits must be 8 or 4, got {bits}")
    if group < 2 or group % 2:
        raise ValueError(f"group must be a positive even number, got {group}")
    if not weight.isfinite().all():
        raise ValueError("weights must be finite to have a scale, got inf or nan")
    size = weight.shape[-1]
    padded = torch.nn.functional.pad(weight, (0, -size % group))
    grouped = padded.unflatten(-1, (-1, group)).float()
    most = 2 ** (bits - 1) - 1
    scales = (grouped.abs().amax(-1) / most).to(weight.dtype)
    safe = torch.where(scales == 0, 1, scales).float()
    integers = (grouped / safe[..., None]).round().clamp(-most, most)
    values = integers.flatten(-2).to(torch.int8)
    stored = values if bits == 8 else pack4(values)
    return Quantised(stored, scales, bits, size, group)


def pack4(values: Int[Tensor, "*rows n"]) -> UInt8[Tensor, "*rows half"]:
    """Integers from -8 to 7, two to a byte, the first in the low half. Raises ValueError on an odd number or a wider
    range.
    """
    if values.shape[-1] % 2:
        raise ValueError(
            f"two integers share a byte: an even number of columns is needed, got {values.shape[-1]}"
        )
    if values.numel() and not -8 <= values.min() <= values.max() <= 7:
        raise ValueError(
            f"4 bits hold -8..7, got {values.min().item()}..{values.max().item()}"
        )
    bits = (values & 0xF).to(torch.uint8)
    return bits[..., ::2] | (bits[..., 1::2] << 4)


def unpack4(packed: UInt8[Tensor, "*rows half"]) -> Int[Tensor, "*rows n"]:
    """The inverse of `pack4`, as int8."""
    halves = torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)
    signed = halves.to(torch.int8)
    return torch.where(signed > 7, signed - 16, signed)


def decode_mxfp4(
    blocks: UInt8[Tensor, "*rows half"], scales: UInt8[Tensor, "*rows groups"]
) -> Float[Tensor, "*rows n"]:
    """MXFP4 as gpt-oss stores it, in float32: 32 numbers of 4 bits share one exponent.

        value = E2M1(4 bits) · 2^(scale - 127)

    blocks: two numbers to a byte, the first in the low half; scales: one byte (E8M0) for each 32 numbers, 255 is NaN
        (OCP
    Microscaling Formats 1.0, sections 5.3.3, 5.4.1). 4.25 bits a number. Raises ValueError where the sizes do not fit.
    """
    if blocks.shape[-1] * 2 != scales.shape[-1] * MXFP4_GROUP:
        raise ValueError(
            f"{blocks.shape[-1]} bytes hold {2 * blocks.shape[-1]} numbers, but {scales.shape[-1]} scales need "
            f"{scales.shape[-1] * MXFP4_GROUP}"
        )
    table = torch.tensor([*E2M1, *(-v for v in E2M1)], device=blocks.device)
    halves = torch.stack((blocks & 0xF, blocks >> 4), dim=-1).flatten(-2)
    numbers = table[halves.long()].unflatten(-1, (-1, MXFP4_GROUP))
    exponent = scales.to(torch.int32) - 127
    factor = torch.where(scales == 255, torch.nan, torch.exp2(exponent.float()))
    return (numbers * factor[..., None]).flatten(-2)


def encode_mxfp4(
    weight: Float[Tensor, "*rows n"],
) -> tuple[UInt8[Tensor, "*rows half"], UInt8[Tensor, "*rows groups"]]:
    """Nearest E2M1 values under a shared power of two (OCP Microscaling Formats 1.0, section 6.3), as blocks and
    scales.

        scale = 2^(floor(log2 max |w|) - 2)        2 is the exponent of the largest E2M1 number, 6 = 1.5 · 2^2

    What lies beyond 6 · scale becomes 6 · scale; ties go to the even mantissa. Raises ValueError unless n is a
    multiple of 32 and the weights are finite.
    """
    if weight.shape[-1] % MXFP4_GROUP:
        raise ValueError(
            f"MXFP4 stores groups of {MXFP4_GROUP} numbers, got rows of {weight.shape[-1]}"
        )
    if not weight.isfinite().all():
        raise ValueError("weights must be finite to have a scale, got inf or nan")
    grouped = weight.float().unflatten(-1, (-1, MXFP4_GROUP))
    largest = grouped.abs().amax(-1)
    exponent = torch.where(largest == 0, 0, torch.frexp(largest).exponent - 1 - 2)
    exponent = exponent.clamp(-127, 127)
    scaled = torch.ldexp(grouped, -exponent[..., None])
    values = torch.tensor(E2M1, device=weight.device)
    midpoints = (values[1:] + values[:-1]) / 2
    # Even mantissas have even numbers: a tie goes down below an odd number and up below an even one.
    low = torch.searchsorted(midpoints, scaled.abs().contiguous(), right=False)
    high = torch.searchsorted(midpoints, scaled.abs().contiguous(), right=True)
    number = torch.where(low % 2 == 0, low, high)
    bits = (number + 8 * (scaled < 0)).flatten(-2).to(torch.uint8)
    return bits[..., ::2] | (bits[..., 1::2] << 4), (exponent + 127).to(torch.uint8)
