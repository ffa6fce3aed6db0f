"""Weights in fewer bits: group-wise integers and MXFP4, with their scales, for one tensor or a whole model.

Weight-only: numbers are stored small and multiplied in the wide type. Groups run along the last dimension, the one
that a product sums over.

Chapter: book/bandwidth/quantised.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, Integer, UInt8
from torch import Tensor, nn

from moe_course.layers import (
    DenseFFN,
    ExpertChoiceRouter,
    Experts,
    MoE,
    Routing,
    SwiGLU,
    TopKRouter,
)

# The eight magnitudes of E2M1 (OCP Microscaling Formats 1.0, section 5.3.3), by their low 3 bits: two of exponent, one
# of mantissa. The fourth bit is the sign.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
MXFP4_GROUP = 32


# --- One tensor ----------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
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
    weight: Float[Tensor, "*rows n"], bits: int, group: int | None = 128
) -> Quantised:
    """Symmetric integers of 8 or 4 bits, one scale for each `group` numbers of a row.

        scale = max |w| / (2^(bits-1) - 1)      integer = round(w / scale), ties to even

    group: None, or more than a row has, is one scale for the whole row. A row that is no multiple of it is padded with
        zeros (which are stored).

    A group of zeros has scale 0. The scales keep the dtype of the weight, which rounds them: the error is at most half
    a scale, and 2^(bits-1) - 1 times what the scale itself was rounded by.

    Raises ValueError on bits other than 8 and 4, on a group that is no positive even number, on rows of no numbers and
    on weights that are not finite.
    """
    if bits not in (4, 8):
        raise ValueError(f"bits must be 8 or 4, got {bits}")
    if group is not None and (group < 2 or group % 2):
        raise ValueError(f"group must be a positive even number, got {group}")
    size = weight.shape[-1]
    if not size:
        raise ValueError(f"rows must hold numbers, got shape {list(weight.shape)}")
    if not weight.isfinite().all():
        raise ValueError("weights must be finite to have a scale, got inf or nan")
    row = size + size % 2  # two integers share a byte
    group = row if group is None else min(group, row)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    padded = nn.functional.pad(weight, (0, -size % group))
    grouped = padded.unflatten(-1, (-1, group)).to(dtype)
    most = 2 ** (bits - 1) - 1
    scales = (grouped.abs().amax(-1) / most).to(weight.dtype)
    safe = torch.where(scales == 0, 1, scales).to(dtype)
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


@dataclass(frozen=True, eq=False)
class Microscaled:
    """Weights in MXFP4, as `encode_mxfp4` makes and `decode_mxfp4` reads them."""

    blocks: UInt8[Tensor, "*rows half"]
    scales: UInt8[Tensor, "*rows groups"]

    def nbytes(self) -> int:
        """Bytes stored, scales included."""
        return self.blocks.nbytes + self.scales.nbytes

    def dequantise(self) -> Float[Tensor, "*rows n"]:
        """The numbers, in float32."""
        return decode_mxfp4(self.blocks, self.scales)


def quantise_mxfp4(weight: Float[Tensor, "*rows n"]) -> Microscaled:
    """Weights rounded to MXFP4: `encode_mxfp4`, kept together. Raises ValueError as that does."""
    return Microscaled(*encode_mxfp4(weight))


def decode_mxfp4(
    blocks: UInt8[Tensor, "*rows half"], scales: UInt8[Tensor, "*rows groups"]
) -> Float[Tensor, "*rows n"]:
    """MXFP4 as gpt-oss stores it, in float32: 32 numbers of 4 bits share one exponent.

        value = E2M1(4 bits) · 2^(scale - 127)

    blocks: two numbers to a byte, the first in the low half.
    scales: one byte (E8M0) for each 32 numbers; 255 is NaN.

    4.25 bits a number (OCP Microscaling Formats 1.0, sections 5.3.3 and 5.4.1). Exact, but that beyond 1.5 · 2^127
    float32 ends and the value is infinite. Raises ValueError where the sizes do not fit.
    """
    if blocks.shape[-1] * 2 != scales.shape[-1] * MXFP4_GROUP:
        raise ValueError(
            f"{blocks.shape[-1]} bytes hold {2 * blocks.shape[-1]} numbers, but {scales.shape[-1]} scales need "
            f"{scales.shape[-1] * MXFP4_GROUP}"
        )
    table = torch.tensor([*E2M1, *(-v for v in E2M1)], device=blocks.device)
    halves = torch.stack((blocks & 0xF, blocks >> 4), dim=-1).flatten(-2)
    numbers = table[halves.long()].unflatten(-1, (scales.shape[-1], MXFP4_GROUP))
    exponent = scales.to(torch.int32) - 127
    # In float64, whose smallest normal number is far below 2^-127: no power of two is flushed to zero on the way.
    factor = torch.exp2(exponent.double())
    factor = torch.where(scales == 255, torch.nan, factor)
    return (numbers * factor[..., None]).float().flatten(-2)


def encode_mxfp4(
    weight: Float[Tensor, "*rows n"],
) -> tuple[UInt8[Tensor, "*rows half"], UInt8[Tensor, "*rows groups"]]:
    """Nearest E2M1 values under a shared power of two (OCP Microscaling Formats 1.0, section 6.3), as blocks and
    scales.

        scale = 2^(floor(log2 max |w|) - 2)        2 is the exponent of the largest E2M1 number, 6 = 1.5 · 2^2

    What lies beyond 6 · scale (the largest number of a group may be near 8) becomes 6 · scale; ties go to the even
    mantissa. Raises ValueError unless n is a multiple of 32 and the weights are finite, in float32.
    """
    size = weight.shape[-1]
    if size % MXFP4_GROUP:
        raise ValueError(
            f"MXFP4 stores groups of {MXFP4_GROUP} numbers, got rows of {size}"
        )
    wide = weight.float()
    if not wide.isfinite().all():
        raise ValueError("weights must be finite to have a scale, got inf or nan")
    grouped = wide.unflatten(-1, (size // MXFP4_GROUP, MXFP4_GROUP))
    largest = grouped.abs().amax(-1)
    exponent = torch.where(largest == 0, 0, torch.frexp(largest).exponent - 1 - 2)
    exponent = exponent.clamp(-127, 127)
    # In float64 a division by 2^-127 is exact.
    scaled = grouped.double() / torch.exp2(exponent.double())[..., None]
    values = torch.tensor(E2M1, dtype=torch.float64, device=weight.device)
    midpoints = (values[1:] + values[:-1]) / 2
    # Even mantissas have even numbers: a tie goes down below an odd number and up below an even one.
    low = torch.searchsorted(midpoints, scaled.abs(), right=False)
    high = torch.searchsorted(midpoints, scaled.abs(), right=True)
    number = torch.where(low % 2 == 0, low, high)
    bits = (number + 8 * (scaled < 0)).flatten(-2).to(torch.uint8)
    return bits[..., ::2] | (bits[..., 1::2] << 4), (exponent + 127).to(torch.uint8)


# --- A whole model -------------------------------------------------------------------

PARTS = ("experts", "router", "ffn", "other", "vectors")
Model = TypeVar("Model", bound=nn.Module)


@runtime_checkable
class Stored(Protocol):
    """A tensor as it is stored: `Quantised`, `Microscaled` or anything else that can be counted and read back."""

    def nbytes(self) -> int: ...

    def dequantise(self) -> Float[Tensor, "*rows n"]: ...


def part_of(model: nn.Module) -> dict[str, str]:
    """What each parameter of a model belongs to, by name.

        "experts"   the matrices of an `Experts` bank
        "router"    a router's matrices, and the gate in front of a shared expert
        "ffn"       the matrices of a dense FFN, shared experts included
        "other"     the other matrices: attention, embedding, output head
        "vectors"   norms and biases, which are few and stay as they are almost everywhere

    A tied weight has one name.
    """
    parts = {name: "other" for name, _ in model.named_parameters()}

    def assign(module: nn.Module | None, prefix: str, part: str) -> None:
        if module is not None:
            names = (name for name, _ in module.named_parameters(prefix))
            parts.update((name, part) for name in names if name in parts)

    for prefix, module in model.named_modules():
        if isinstance(module, Experts):
            assign(module, prefix, "experts")
        elif isinstance(module, TopKRouter | ExpertChoiceRouter):
            assign(module, prefix, "router")
        elif isinstance(module, SwiGLU | DenseFFN):
            assign(module, prefix, "ffn")
        elif isinstance(module, MoE):
            inside = f"{prefix}.shared_gate" if prefix else "shared_gate"
            assign(module.shared_gate, inside, "router")
    for name, parameter in model.named_parameters():
        # The biases of a bank of experts are a matrix, a vector for each expert.
        if parameter.ndim < 2 or name.rpartition(".")[2] in ("b_up", "b_down"):
            parts[name] = "vectors"
    return parts


def quantise_parts(
    model: nn.Module,
    store: Callable[[Float[Tensor, "*rows n"]], Stored],
    *parts: str,
) -> dict[str, Stored]:
    """The parameters of some parts of a model (`part_of`), each stored by `store`, by name.

    Raises ValueError on a part that is none of `PARTS`.
    """
    if unknown := sorted(set(parts) - set(PARTS)):
        raise ValueError(f"parts must be among {', '.join(PARTS)}, got {unknown[0]!r}")
    belongs = part_of(model)
    return {
        name: store(parameter.detach())
        for name, parameter in model.named_parameters()
        if belongs[name] in parts
    }


@torch.no_grad()
def dequantised(model: Model, stored: Mapping[str, Stored]) -> Model:
    """A copy of a model that computes with what was stored; everything else is as it was.

    The copy holds wide weights: its values are those of weight-only quantisation, its memory is not (for that see
    `stored_bytes`). Raises ValueError on a name that the model does not have.
    """
    twin = copy.deepcopy(model)
    parameters = dict(twin.named_parameters())
    for name, small in stored.items():
        if name not in parameters:
            raise ValueError(f"the model has no parameter {name!r}")
        parameters[name].copy_(small.dequantise())
    return twin


def stored_bytes(
    model: nn.Module, stored: Mapping[str, Stored], rest: float = 2.0
) -> float:
    """Bytes of all weights: of what was stored as its tensors count, scales included, and `rest` for each other one."""
    others = [p.numel() for name, p in model.named_parameters() if name not in stored]
    return sum(small.nbytes() for small in stored.values()) + rest * sum(others)


# --- What it does to routing and to outputs ------------------------------------------


def flipped(a: Routing, b: Routing) -> Bool[Tensor, " T"]:
    """Tokens whose set of experts differs between two routings of the same tokens; the order within it is no matter."""
    ours, theirs = a.expert_ids.sort(-1).values, b.expert_ids.sort(-1).values
    return (ours != theirs).any(-1)


def margin(routing: Routing) -> Float[Tensor, " T"]:
    """How far a token is from another set of experts: its K-th largest logit less the next.

    Of gates that choose the K largest logits. Infinite where K = E and there is no other set.
    """
    k, (tokens, num_experts) = routing.expert_ids.shape[1], routing.logits.shape
    if k == num_experts:
        return routing.logits.new_full((tokens,), torch.inf)
    best = routing.logits.topk(k + 1, dim=-1).values
    return best[:, k - 1] - best[:, k]


def relative_error(
    got: Float[Tensor, "*shape"], want: Float[Tensor, "*shape"]
) -> float:
    """||got - want|| / ||want||, over all numbers, in float64."""
    wanted = want.double()
    return float((got.double() - wanted).norm() / wanted.norm())


def combined_error(single: float, concentration: float, alignment: float) -> float:
    """Relative error of a weighted sum of k experts, each with relative error `single`.

        single · sqrt(c / (c + (1 - c)·a))

    concentration: c = sum of w² of gate weights that sum to 1; 1/k for even ones, 1 for a single expert.
    alignment: a, the cosine between the outputs of two experts of a token.

    Assumes outputs of equal size, and errors that are independent of each other and of the outputs: the errors' squares
    add up to single² · sum of w², the signal's to c + (1 - c)·a. Experts that say the same (a = 1) average their errors
    away, down to sqrt(c); experts that say unrelated things (a = 0) do not: their signal shrinks as their noise does.

    Raises ValueError unless 0 < c <= 1 and the signal's square is positive.
    """
    signal = concentration + (1 - concentration) * alignment
    if not 0 < concentration <= 1 or signal <= 0:
        raise ValueError(
            "concentration must lie in (0, 1] and c + (1 - c)·a be positive, got "
            f"{concentration} and {alignment}"
        )
    return single * math.sqrt(concentration / signal)
