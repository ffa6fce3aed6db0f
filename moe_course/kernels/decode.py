"""The layer for a few tokens: nothing to share between rows, so no sort and no tiles, only weights to read.

A slot is a matrix-vector product. Each program reads some rows of the weights of one slot's expert, once, from start to
end; the second kernel adds up a token's experts on the fly. Two launches, and T·K·3·F·D weights read: more than are
distinct only where two tokens share an expert.

Chapter: book/kernels/fused_moe.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_course.kernels import INTERPRETED
from moe_course.kernels.grouped_gemm import _activate, _halves


@triton.jit
def _dot_rows(
    w_ptr,
    row,
    rows,
    vector_ptr,
    depth,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The rows `row` of a matrix times a vector: [BLOCK_N]. Partial sums stay apart until the end."""
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    where = w_ptr + row.to(tl.int64)[:, None] * depth
    for k in range(0, depth, BLOCK_K):
        cols = k + tl.arange(0, BLOCK_K)
        valid = (row < rows)[:, None] & (cols < depth)[None, :]
        w = tl.load(where + cols[None, :], mask=valid, other=0.0)
        v = tl.load(vector_ptr + cols, mask=cols < depth, other=0.0)
        acc += w.to(tl.float32) * v.to(tl.float32)[None, :]
    return tl.sum(acc, axis=1)


@triton.jit
def _decode_up_kernel(
    x_ptr,  # [T, D]
    w_ptr,  # [E, HALVES·F, D]
    b_ptr,  # [E, HALVES·F]
    act_ptr,  # [T·K, F] float32
    ids_ptr,  # [T·K]
    D,
    F,
    stride_x,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HALVES: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    slot = tl.program_id(0)
    expert = tl.load(ids_ptr + slot)
    if (expert >= 0) & (expert < E):
        f = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        x = x_ptr + (slot // TOP_K).to(tl.int64) * stride_x
        w = w_ptr + expert.to(tl.int64) * HALVES * F * D
        b = b_ptr + expert.to(tl.int64) * HALVES * F + f
        gate = _dot_rows(w, f, F, x, D, BLOCK_N, BLOCK_K)
        if BIAS:
            gate += tl.load(b, mask=f < F, other=0.0).to(tl.float32)
        up = gate
        if HALVES == 2:
            # Not F.to: an argument that is 1 is a number of the compiler, without methods.
            second = w + tl.cast(F, tl.int64) * D
            up = _dot_rows(second, f, F, x, D, BLOCK_N, BLOCK_K)
            if BIAS:
                up += tl.load(b + F, mask=f < F, other=0.0).to(tl.float32)
        act = _activate(gate, up, ACTIVATION)
        tl.store(act_ptr + slot.to(tl.int64) * F + f, act, mask=f < F)


@triton.jit
def _decode_down_kernel(
    act_ptr,  # [T·K, F] float32
    w_ptr,  # [E, D, F]
    b_ptr,  # [E, D]
    y_ptr,  # [T, D]
    ids_ptr,  # [T·K]
    weights_ptr,  # [T·K]
    D,
    F,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    token = tl.program_id(0)
    d = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_N,), tl.float32)
    for k in range(TOP_K):
        slot = token * TOP_K + k
        expert = tl.load(ids_ptr + slot)
        if (expert >= 0) & (expert < E):
            w = w_ptr + expert.to(tl.int64) * D * F
            a = act_ptr + slot.to(tl.int64) * F
            out = _dot_rows(w, d, D, a, F, BLOCK_N, BLOCK_K)
            if BIAS:
                b = b_ptr + expert.to(tl.int64) * D + d
                out += tl.load(b, mask=d < D, other=0.0).to(tl.float32)
            acc += tl.load(weights_ptr + slot).to(tl.float32) * out
    y = y_ptr + token.to(tl.int64) * D + d
    tl.store(y, acc.to(y_ptr.dtype.element_ty), mask=d < D)


def fits_decode(tokens: int, k: int, num_experts: int) -> bool:
    """Whether slots are so few that hardly two of them share an expert."""
    return tokens == 1 or tokens * k <= num_experts // 4


def decode(
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    b_up: Tensor | None,
    b_down: Tensor | None,
    activation: str,
) -> Tensor:
    """y [T, D] of a layer that runs forward alone, on few tokens."""
    (tokens, k), (num_experts, width, hidden) = expert_ids.shape, w_down.shape
    act = x.new_empty(tokens * k, hidden, dtype=torch.float32)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    halves = _halves(activation)
    block_n, block_k = (64, 512) if INTERPRETED else (8, 512)
    meta = {"E": num_experts, "TOP_K": k, "BLOCK_N": block_n, "num_warps": 4}
    _decode_up_kernel[(tokens * k, triton.cdiv(hidden, block_n))](
        x, w_up, w_up if b_up is None else b_up, act, expert_ids,
        width, hidden, x.stride(0),
        ACTIVATION=activation, HALVES=halves, BIAS=b_up is not None,
        BLOCK_K=min(block_k, triton.next_power_of_2(width)), **meta,
    )  # fmt: skip
    _decode_down_kernel[(tokens, triton.cdiv(width, block_n))](
        act, w_down, w_down if b_down is None else b_down, y, expert_ids, weights,
        width, hidden, BIAS=b_down is not None,
        BLOCK_K=min(block_k, triton.next_power_of_2(hidden)), **meta,
    )  # fmt: skip
    return y
