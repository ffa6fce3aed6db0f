"""Which expert, and in which order: the top-k gate, and a counting sort of the slots by expert.

A slot is one (token, choice) pair, numbered t·K + k. Nothing here reads a number back to the host, so that a CUDA graph
can capture it; nothing is decided by an atomic operation, so that the same input gives the same bits.

Chapter: book/kernels/grouped_gemm.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

# ---- The gate ---------------------------------------------------------------------------------------------------


@triton.jit
def _rank_keys(logits, ids):
    """Integers in the order of the logits: NaN first, then +inf down to -inf, and of equal ones the lower id first."""
    bits = (logits + 0.0).to(tl.int32, bitcast=True)  # -0.0 + 0.0 is 0.0
    ordered = bits ^ (
        (bits >> 31) & 0x7FFFFFFF
    )  # negative floats: larger bits, smaller
    ordered = tl.where(logits != logits, 0x7FFFFFFF, ordered)
    return (ordered.to(tl.int64) << 32) - ids


@triton.jit
def _gate_kernel(
    logits_ptr,  # [T, E]
    ids_ptr,  # [T, K] int32
    weights_ptr,  # [T, K] float32
    tokens,
    stride_t,
    E: tl.constexpr,
    K: tl.constexpr,
    RENORMALISE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    k = tl.arange(0, BLOCK_K)
    inside = (t < tokens)[:, None] & (e < E)[None, :]
    where = logits_ptr + t.to(tl.int64)[:, None] * stride_t + e[None, :]
    logits = tl.load(where, mask=inside, other=0.0).to(tl.float32)
    logits = tl.where((e < E)[None, :], logits, float("-inf"))
    shifted = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    total = tl.sum(shifted, axis=1)

    lowest = tl.full((BLOCK_T, BLOCK_E), -(2**63), tl.int64)
    keys = tl.where(e[None, :] < E, _rank_keys(logits, e[None, :]), lowest)
    chosen = tl.zeros((BLOCK_T, BLOCK_K), tl.int32)
    weights = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    for i in tl.static_range(K):
        best = tl.max(keys, axis=1)
        hit = keys == best[:, None]  # exactly one a row: keys differ
        expert = tl.sum(tl.where(hit, e[None, :], 0), axis=1)
        weight = tl.sum(tl.where(hit, shifted, 0.0), axis=1)
        here = (k == i)[None, :]
        chosen = tl.where(here, expert[:, None], chosen)
        weights = tl.where(here, weight[:, None], weights)
        keys = tl.where(hit, lowest, keys)
    if RENORMALISE:
        total = tl.sum(weights, axis=1)
    weights = weights / total[:, None]
    out = t.to(tl.int64)[:, None] * K + k[None, :]
    valid = (t < tokens)[:, None] & (k < K)[None, :]
    tl.store(ids_ptr + out, chosen, mask=valid)
    tl.store(weights_ptr + out, weights, mask=valid)


def gate(logits: Tensor, k: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    """The launch of `top_k_gate`: weights, then ids (opcheck adds up outputs, in the dtype of the first)."""
    tokens, num_experts = logits.shape
    ids = logits.new_empty((tokens, k), dtype=torch.int32)
    weights = logits.new_empty((tokens, k), dtype=torch.float32)
    block_e = triton.next_power_of_2(num_experts)
    block_t = max(1, 1024 // block_e)
    if tokens:
        logits = logits if logits.stride(1) == 1 else logits.contiguous()
        _gate_kernel[(triton.cdiv(tokens, block_t),)](
            logits,
            ids,
            weights,
            tokens,
            logits.stride(0),
            E=num_experts,
            K=k,
            RENORMALISE=renormalise,
            BLOCK_T=block_t,
            BLOCK_E=block_e,
            BLOCK_K=triton.next_power_of_2(k),
        )
    return weights, ids


_top_k_gate = torch.library.custom_op("moe_course::top_k_gate", gate, mutates_args=())


@_top_k_gate.register_fake
def _(logits: Tensor, k: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], k)
    return (
        logits.new_empty(shape, dtype=torch.float32),
        logits.new_empty(shape, dtype=torch.int32),
    )


def _save_for_gate(ctx, inputs, output) -> None:
    logits, _, ctx.renormalise = inputs
    weights, ids = output
    ctx.mark_non_differentiable(ids)
    ctx.save_for_backward(logits, ids, weights)


def _gate_backward(ctx, grad: Tensor, _):
    # T·E numbers, a thousandth of the layer's work: plain torch.
    logits, ids, weights = ctx.saved_tensors
    inner = (grad * weights).sum(dim=1, keepdim=True)
    if ctx.renormalise:  # softmax over the chosen alone
        grad_logits = torch.zeros_like(logits, dtype=torch.float32)
    else:  # softmax over all: the others lose what the chosen gain
        grad_logits = -logits.float().softmax(dim=1) * inner
        inner = torch.zeros_like(inner)
    change = weights * (grad - inner)
    return grad_logits.scatter_add(1, ids.long(), change).to(logits.dtype), None, None


_top_k_gate.register_autograd(_gate_backward, setup_context=_save_for_gate)


def top_k_gate(
    logits: Float[Tensor, "T E"], k: int, *, renormalise: bool = True
) -> tuple[Int[Tensor, "T K"], Float[Tensor, "T K"]]:
    """Each token's k largest logits, in falling order, and their softmax weights.

        w_i = exp(l_i) / sum over j in S of exp(l_j)

    S are the chosen ones (Mixtral, arXiv:2401.04088, section 2.1), or with renormalise=False all (OLMoE,
    arXiv:2409.02060).

    Returns expert ids (int32) and weights (float32, differentiable). Of equal logits the lowest expert id is chosen.
    The whole row, its maximum, its sum and the choice stay in registers: E numbers read, 2K written per token.

    Raises ValueError unless logits are a float matrix and 1 <= k <= E.
    """
    if logits.ndim != 2 or not logits.is_floating_point():
        raise ValueError(
            f"logits must be a float matrix [T, E], got {logits.dtype} {list(logits.shape)}"
        )
    if not 1 <= k <= logits.shape[1]:
        raise ValueError(
            f"k must lie in 1..{logits.shape[1]} (the number of experts), got {k}"
        )
    if logits.dtype == torch.bfloat16 and not logits.is_cuda:
        logits = logits.float()  # Triton's interpreter does not know bfloat16
    weights, ids = _top_k_gate(logits, k, renormalise)
    return ids, weights


# ---- The counting sort ------------------------------------------------------------------------------------------

SUB = 128  # slots that are ranked against each other at once
MAX_BLOCKS = (
    128  # programs that share the sort; each adds up the counts of those before it
)


class SortedSlots(NamedTuple):
    """The slots in the order of their experts. Row r of a sorted matrix belongs to slot order[r].

    A tile is block_m rows of one expert; an expert's last tile may hold fewer.
    """

    order: Int[Tensor, " N"]  # undefined from offsets[E] on
    inverse: Int[Tensor, " N"]  # the row of a slot; -1 where it is skipped
    offsets: Int[Tensor, " E+1"]  # expert e owns rows offsets[e] up to offsets[e+1]
    tile_offsets: Int[
        Tensor, " E+1"
    ]  # and tiles tile_offsets[e] up to tile_offsets[e+1]
    tile_expert: Int[Tensor, " tiles"]  # undefined from tile_offsets[E] on


@triton.jit
def _load_ids(ids_ptr, slot, slots, E: tl.constexpr):
    """Expert ids of some slots; whatever is no expert, and whatever lies beyond the end, becomes E."""
    ids = tl.load(ids_ptr + slot, mask=slot < slots, other=E)
    return tl.where((ids >= 0) & (ids < E), ids, E)


@triton.jit
def _count_kernel(
    ids_ptr,  # [N]
    counts_ptr,  # [blocks, BINS]
    slots,
    per_block,
    E: tl.constexpr,
    BINS: tl.constexpr,
    SUB: tl.constexpr,
):
    """How many slots of each expert each block holds."""
    block = tl.program_id(0)
    counts = tl.zeros((BINS,), tl.int32)
    for first in range(block * per_block, (block + 1) * per_block, SUB):
        ids = _load_ids(ids_ptr, first + tl.arange(0, SUB), slots, E)
        counts += tl.histogram(tl.minimum(ids, E - 1), BINS, mask=ids < E)
    tl.store(counts_ptr + block * BINS + tl.arange(0, BINS), counts)


@triton.jit
def _sort_kernel(
    ids_ptr,  # [N]
    counts_ptr,  # [blocks, BINS], of _count_kernel
    order_ptr,  # [N]
    inverse_ptr,  # [N]
    offsets_ptr,  # [E+1]
    tile_offsets_ptr,  # [E+1]
    tile_expert_ptr,  # [max_tiles]
    slots,
    per_block,
    max_tiles,
    E: tl.constexpr,
    BINS: tl.constexpr,
    SUB: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Write every slot to its place: start of its expert + slots of that expert before it."""
    block, blocks = tl.program_id(0), tl.num_programs(0)
    e = tl.arange(0, BINS)
    c = tl.arange(0, CHUNK)
    before = tl.zeros((BINS,), tl.int32)
    total = tl.zeros((BINS,), tl.int32)
    for first in range(0, blocks, CHUNK):
        row = first + c
        counts = tl.load(
            counts_ptr + row[:, None] * BINS + e[None, :],
            mask=(row < blocks)[:, None],
            other=0,
        )
        total += tl.sum(counts, axis=0)
        before += tl.sum(tl.where((row < block)[:, None], counts, 0), axis=0)
    ends = tl.cumsum(total, axis=0)
    next_place = ends - total + before

    i = tl.arange(0, SUB)
    for first in range(block * per_block, (block + 1) * per_block, SUB):
        slot = first + i
        ids = _load_ids(ids_ptr, slot, slots, E)
        # A stable rank: how many slots before me want my expert?
        same = (ids[:, None] == ids[None, :]) & (i[:, None] > i[None, :])
        rank = tl.sum(same.to(tl.int32), axis=1)
        known = tl.minimum(ids, E - 1)
        place = tl.gather(next_place, known, 0) + rank
        wanted = ids < E
        tl.store(order_ptr + place, slot, mask=wanted)
        tl.store(inverse_ptr + slot, tl.where(wanted, place, -1), mask=slot < slots)
        next_place += tl.histogram(known, BINS, mask=wanted)

    tile_ends = tl.cumsum((total + BLOCK_M - 1) // BLOCK_M, axis=0)
    if block == 0:
        tl.store(offsets_ptr, 0)
        tl.store(offsets_ptr + 1 + e, ends, mask=e < E)
        tl.store(tile_offsets_ptr, 0)
        tl.store(tile_offsets_ptr + 1 + e, tile_ends, mask=e < E)
    for first in range(block * CHUNK, max_tiles, blocks * CHUNK):
        tile = first + c
        passed = (tile_ends[None, :] <= tile[:, None]) & (e < E)[None, :]
        expert = tl.sum(passed.to(tl.int32), axis=1)
        tl.store(tile_expert_ptr + tile, expert, mask=tile < max_tiles)


def max_tiles(slots: int, num_experts: int, block_m: int) -> int:
    """A bound on the number of row tiles that needs no look at the counts: each expert leaves one of them ragged."""
    return min(slots, slots // block_m + num_experts)


def sort_by_expert(
    expert_ids: Int[Tensor, "T K"], num_experts: int, block_m: int = 128
) -> SortedSlots:
    """A stable counting sort of the slots by expert, and the map from tiles of block_m rows to experts.

    Ids that are no expert (such as E) are skipped. Two kernels: a histogram per block of slots, then every block adds
    up the counts before its own and writes its slots. At most `max_tiles` tiles, whatever the routing.
    """
    ids = expert_ids.reshape(-1).to(torch.int32).contiguous()
    slots = len(ids)
    tiles = max_tiles(slots, num_experts, block_m)
    order, inverse = torch.empty_like(ids), torch.empty_like(ids)
    offsets = ids.new_empty(num_experts + 1)
    tile_offsets, tile_expert = torch.empty_like(offsets), ids.new_empty(tiles)
    if not slots:
        offsets.zero_(), tile_offsets.zero_()
    else:
        bins = max(16, triton.next_power_of_2(num_experts))
        per_block = SUB * triton.cdiv(slots, SUB * MAX_BLOCKS)
        blocks = triton.cdiv(slots, per_block)
        counts = ids.new_empty((blocks, bins))
        _count_kernel[(blocks,)](
            ids, counts, slots, per_block, E=num_experts, BINS=bins, SUB=SUB
        )
        _sort_kernel[(blocks,)](
            ids,
            counts,
            order,
            inverse,
            offsets,
            tile_offsets,
            tile_expert,
            slots,
            per_block,
            tiles,
            E=num_experts,
            BINS=bins,
            SUB=SUB,
            CHUNK=max(1, min(64, 8192 // bins)),
            BLOCK_M=block_m,
            num_warps=8,
        )
    return SortedSlots(order, inverse, offsets, tile_offsets, tile_expert)
