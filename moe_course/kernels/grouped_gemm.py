"""Matrix products over rows sorted by expert, and what is fused to them.

Every kernel follows one pattern. The rows of expert e lie at offsets[e] up to offsets[e+1]; they are cut into tiles of
BLOCK_M rows that never span two experts. A program takes one tile of the result after another, finds the tile's expert
in a map, and multiplies its rows by that expert's matrix. The number of tiles is read from memory: the host never knows
it.

Rows are gathered on load where the input stands in token order: row r is that of token order[r] // K. Offsets into rows
and weights are 64-bit: E·2F·D passes 2^31 elements at the size of DeepSeek-V3, N·D at T = 32768, K = 16, D = 4096.

Chapter: book/kernels/grouped_gemm.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_course.kernels import tiles
from moe_course.kernels.routing import SortedSlots
from moe_course.kernels.tiles import Tile

GATED = ("swiglu", "clamped_swiglu")
CLAMP = tl.constexpr(7.0)  # gpt-oss

# ---- The activation, forward and backward -----------------------------------------------------------------------


@triton.jit
def _activate(gate, up, ACTIVATION: tl.constexpr):
    """act(z) for z = (gate, up), or for gate alone where there is no up. Comparisons that keep NaN a NaN."""
    if ACTIVATION == "swiglu":
        return gate * tl.sigmoid(gate) * up
    elif ACTIVATION == "clamped_swiglu":
        gate = tl.where(gate > CLAMP, CLAMP, gate)
        up = tl.where(up > CLAMP, CLAMP, tl.where(up < -CLAMP, -CLAMP, up))
        return (up + 1) * gate * tl.sigmoid(1.702 * gate)
    elif ACTIVATION == "gelu":
        return 0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476))
    else:
        tl.static_assert(ACTIVATION == "relu")
        return tl.where(gate < 0, 0.0, gate)


@triton.jit
def _activate_backward(gate, up, grad, ACTIVATION: tl.constexpr):
    """The gradients of gate and up, given that of act; the second is meaningless where there is no up."""
    if ACTIVATION == "swiglu":
        s = tl.sigmoid(gate)
        return grad * up * s * (1 + gate * (1 - s)), grad * gate * s
    elif ACTIVATION == "clamped_swiglu":
        g = tl.where(gate > CLAMP, CLAMP, gate)
        u = tl.where(up > CLAMP, CLAMP, tl.where(up < -CLAMP, -CLAMP, up))
        s = tl.sigmoid(1.702 * g)
        grad_gate = grad * (u + 1) * s * (1 + 1.702 * g * (1 - s))
        grad_up = grad * g * s
        return (
            tl.where(gate > CLAMP, 0.0, grad_gate),
            tl.where((up > CLAMP) | (up < -CLAMP), 0.0, grad_up),
        )
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1 + tl.erf(gate * 0.7071067811865476))
        pdf = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
        return grad * (cdf + gate * pdf), gate
    else:
        tl.static_assert(ACTIVATION == "relu")
        return tl.where(gate > 0, grad, 0.0), gate


# ---- The pieces that the kernels share --------------------------------------------------------------------------


@triton.jit
def _locate(
    tile,
    columns,
    offsets_ptr,
    tile_offsets_ptr,
    tile_expert_ptr,
    E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Number of a tile -> its expert, first row, end of the expert's rows, and column of tiles.

    GROUP_M row tiles take turns on a column before the next column begins: they read the same weights, mostly.
    """
    row_tiles = tl.load(tile_offsets_ptr + E)
    first = tile // (GROUP_M * columns) * GROUP_M
    height = tl.minimum(row_tiles - first, GROUP_M)
    inside = tile % (GROUP_M * columns)
    row_tile = first + inside % height
    expert = tl.load(tile_expert_ptr + row_tile)
    row = tl.load(offsets_ptr + expert) + BLOCK_M * (
        row_tile - tl.load(tile_offsets_ptr + expert)
    )
    return expert, row, tl.load(offsets_ptr + expert + 1), inside // height


@triton.jit
def _weight_tile(
    w,
    expert,
    n,
    k,
    N,
    depth,
    HALVES: tl.constexpr,
    ACROSS: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """[BLOCK_K, HALVES·BLOCK_N] of one expert's matrix.

    ACROSS: the matrix stands as [HALVES·N, depth], a row per column of the result. With two halves, gate row n and up
    row n come side by side, so that a program holds both numbers that SwiGLU joins.
    Otherwise it stands as [depth, N].
    """
    if TMA:
        if ACROSS:
            block = w.load([expert, n, 0, k])
            tile = tl.reshape(block, (BLOCK_N * HALVES, BLOCK_K)).T
        else:
            tile = tl.reshape(w.load([expert, k, n]), (BLOCK_K, BLOCK_N))
    else:
        cols = tl.arange(0, BLOCK_N * HALVES)
        depths = k + tl.arange(0, BLOCK_K)
        column = n + cols // HALVES
        inside = (column < N)[None, :] & (depths < depth)[:, None]
        base = w + expert.to(tl.int64) * HALVES * N * depth
        if ACROSS:
            # Row numbers of one expert's matrix fit 32 bits, its elements need not.
            row = ((cols % HALVES) * N + column).to(tl.int64)
            where = base + row[None, :] * depth + depths[:, None]
        else:
            where = base + depths.to(tl.int64)[:, None] * N + column[None, :]
        tile = tl.load(where, mask=inside, other=0.0)
    return tile


@triton.jit
def _product(
    rows_ptr,
    row,
    inside,
    stride,
    w,
    expert,
    n,
    N,
    depth,
    HALVES: tl.constexpr,
    ACROSS: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Rows `row` of a matrix times one expert's weights, in float32: [BLOCK_M, HALVES·BLOCK_N]."""
    acc = tl.zeros((BLOCK_M, HALVES * BLOCK_N), tl.float32)
    start = rows_ptr + row.to(tl.int64)[:, None] * stride
    for k in range(0, depth, BLOCK_K):
        cols = k + tl.arange(0, BLOCK_K)[None, :]
        a = tl.load(start + cols, mask=inside[:, None] & (cols < depth), other=0.0)
        b = _weight_tile(
            w, expert, n, k, N, depth, HALVES, ACROSS, TMA, BLOCK_N, BLOCK_K
        )
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _part(
    tile,
    part: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One of PARTS runs of columns of a tile (PARTS a power of 2). An epilogue in parts needs fewer registers."""
    if PARTS > 1:
        halves = tl.permute(tl.reshape(tile, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        half = left if part < PARTS // 2 else right
        tile = _part(half, part % (PARTS // 2), PARTS // 2, BLOCK_M, BLOCK_N // 2)
    return tile


# ---- Forward ----------------------------------------------------------------------------------------------------


@triton.jit
def _store_activated(
    z,
    row,
    inside,
    first,
    expert,
    b_ptr,
    hidden_ptr,
    act_ptr,
    F,
    ACTIVATION: tl.constexpr,
    HALVES: tl.constexpr,
    BIAS: tl.constexpr,
    SAVE_HIDDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The epilogue of the up-projection, on columns first .. first + BLOCK_N of its result."""
    f = first + tl.arange(0, BLOCK_N)
    valid = inside[:, None] & (f < F)[None, :]
    bias = b_ptr + expert.to(tl.int64) * HALVES * F + f
    if HALVES == 2:
        gate, up = tl.split(tl.reshape(z, (BLOCK_M, BLOCK_N, 2)))
        if BIAS:
            up += tl.load(bias + F, mask=f < F, other=0.0).to(tl.float32)[None, :]
    else:
        gate, up = z, z
    if BIAS:
        gate += tl.load(bias, mask=f < F, other=0.0).to(tl.float32)[None, :]
    row = row.to(tl.int64)[:, None]
    if SAVE_HIDDEN:
        kept = hidden_ptr + row * HALVES * F + f[None, :]
        tl.store(kept, gate.to(hidden_ptr.dtype.element_ty), mask=valid)
        if HALVES == 2:
            tl.store(kept + F, up.to(hidden_ptr.dtype.element_ty), mask=valid)
    act = _activate(gate, up, ACTIVATION).to(act_ptr.dtype.element_ty)
    tl.store(act_ptr + row * F + f[None, :], act, mask=valid)


@triton.jit
def _up_kernel(
    x_ptr,  # [T, D]
    w,  # [E, HALVES·F, D]
    b_ptr,  # [E, HALVES·F]
    hidden_ptr,  # [N, HALVES·F]
    act_ptr,  # [N, F]
    order_ptr,
    offsets_ptr,
    tile_offsets_ptr,
    tile_expert_ptr,
    D,
    F,
    stride_x,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HALVES: tl.constexpr,
    BIAS: tl.constexpr,
    SAVE_HIDDEN: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
):
    """act = activate(x W_up^T + b), rows gathered on load, the activation applied before anything is written."""
    columns = tl.cdiv(F, BLOCK_N)
    tile_count = tl.load(tile_offsets_ptr + E) * columns
    for tile in range(tl.program_id(0), tile_count, tl.num_programs(0)):
        expert, first, end, column = _locate(
            tile, columns, offsets_ptr, tile_offsets_ptr, tile_expert_ptr,
            E, BLOCK_M, GROUP_M,
        )  # fmt: skip
        row = first + tl.arange(0, BLOCK_M)
        inside = row < end
        token = tl.load(order_ptr + row, mask=inside, other=0) // TOP_K
        z = _product(
            x_ptr, token, inside, stride_x, w, expert, column * BLOCK_N, F, D,
            HALVES, True, TMA, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        for part in tl.static_range(PARTS):
            _store_activated(
                _part(z, part, PARTS, BLOCK_M, HALVES * BLOCK_N),
                row, inside, column * BLOCK_N + part * (BLOCK_N // PARTS), expert,
                b_ptr, hidden_ptr, act_ptr, F,
                ACTIVATION, HALVES, BIAS, SAVE_HIDDEN, BLOCK_M, BLOCK_N // PARTS,
            )  # fmt: skip


@triton.jit
def _rows_kernel(
    rows_ptr,  # [N, depth], sorted
    w,  # [E, N_out, depth] if ACROSS, else [E, depth, N_out]
    b_ptr,  # [E, N_out]
    out_ptr,  # [N, N_out]
    offsets_ptr,
    tile_offsets_ptr,
    tile_expert_ptr,
    N_out,
    depth,
    E: tl.constexpr,
    ACROSS: tl.constexpr,
    BIAS: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Sorted rows times their expert's matrix (+ b): the down-projection, and the gradient of the gathered rows."""
    columns = tl.cdiv(N_out, BLOCK_N)
    tile_count = tl.load(tile_offsets_ptr + E) * columns
    for tile in range(tl.program_id(0), tile_count, tl.num_programs(0)):
        expert, first, end, column = _locate(
            tile, columns, offsets_ptr, tile_offsets_ptr, tile_expert_ptr,
            E, BLOCK_M, GROUP_M,
        )  # fmt: skip
        row = first + tl.arange(0, BLOCK_M)
        inside = row < end
        acc = _product(
            rows_ptr, row, inside, depth, w, expert, column * BLOCK_N, N_out, depth,
            1, ACROSS, TMA, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        n = column * BLOCK_N + tl.arange(0, BLOCK_N)
        if BIAS:
            bias = b_ptr + expert.to(tl.int64) * N_out + n
            acc += tl.load(bias, mask=n < N_out, other=0.0).to(tl.float32)[None, :]
        where = out_ptr + row.to(tl.int64)[:, None] * N_out + n[None, :]
        valid = inside[:, None] & (n < N_out)[None, :]
        tl.store(where, acc.to(out_ptr.dtype.element_ty), mask=valid)


@triton.jit
def _combine_kernel(
    rows_ptr,  # [N, D], sorted
    inverse_ptr,  # [N]
    weights_ptr,  # [T, K]
    out_ptr,  # [T, D]
    tokens,
    D,
    TOP_K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out_t = sum over k of weights[t, k] · rows[inverse[t, k]], k in rising order: the same bits on every run."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for k in tl.static_range(TOP_K):
        slot = t * TOP_K + k
        row = tl.load(inverse_ptr + slot, mask=t < tokens, other=-1)
        valid = (row >= 0)[:, None] & (d < D)[None, :]
        where = rows_ptr + row.to(tl.int64)[:, None] * D + d[None, :]
        value = tl.load(where, mask=valid, other=0.0).to(tl.float32)
        if WEIGHTED:
            weight = tl.load(weights_ptr + slot, mask=row >= 0, other=0.0)
            value *= weight.to(tl.float32)[:, None]
        acc += value
    out = out_ptr + t.to(tl.int64)[:, None] * D + d[None, :]
    valid = (t < tokens)[:, None] & (d < D)[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=valid)


# ---- Backward ---------------------------------------------------------------------------------------------------


@triton.jit
def _store_gradients(
    dunscaled,
    row,
    inside,
    first,
    weight,
    hidden_ptr,
    dhidden_ptr,
    scaled_ptr,
    F,
    ACTIVATION: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The epilogue of dy W_down, on columns first .. first + BLOCK_N; returns their part of <dy W_down, act>."""
    f = first + tl.arange(0, BLOCK_N)
    valid = inside[:, None] & (f < F)[None, :]
    row = row.to(tl.int64)[:, None]
    place = row * HALVES * F + f[None, :]
    gate = tl.load(hidden_ptr + place, mask=valid, other=0.0).to(tl.float32)
    up = gate
    if HALVES == 2:
        up = tl.load(hidden_ptr + place + F, mask=valid, other=0.0).to(tl.float32)
    act = _activate(gate, up, ACTIVATION)
    dtype = dhidden_ptr.dtype.element_ty
    scaled = (act * weight[:, None]).to(dtype)
    tl.store(scaled_ptr + row * F + f[None, :], scaled, mask=valid)
    dgate, dup = _activate_backward(gate, up, dunscaled * weight[:, None], ACTIVATION)
    tl.store(dhidden_ptr + place, dgate.to(dtype), mask=valid)
    if HALVES == 2:
        tl.store(dhidden_ptr + place + F, dup.to(dtype), mask=valid)
    return tl.sum(dunscaled * act, axis=1)


@triton.jit
def _dact_kernel(
    dy_ptr,  # [T, D]
    w,  # W_down [E, D, F]
    b_ptr,  # b_down [E, D]
    hidden_ptr,  # [N, HALVES·F]
    weights_ptr,  # [T, K]
    dhidden_ptr,  # [N, HALVES·F]
    scaled_ptr,  # [N, F]: gate weight · act
    dgate_ptr,  # [columns, T, K]: parts of the gate weights' gradient
    order_ptr,
    offsets_ptr,
    tile_offsets_ptr,
    tile_expert_ptr,
    D,
    F,
    slots,
    stride_dy,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HALVES: tl.constexpr,
    BIAS: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
):
    """dy W_down, gathered on load; in its epilogue the activation once more, its backward, and the gates' gradient.

    A row's output is w·(W_down a + b), so the gradient of w is <dy, W_down a + b> = <dy W_down, a> + <dy, b>: the
    output itself is not needed, and was not kept.
    """
    columns = tl.cdiv(F, BLOCK_N)
    tile_count = tl.load(tile_offsets_ptr + E) * columns
    for tile in range(tl.program_id(0), tile_count, tl.num_programs(0)):
        expert, first, end, column = _locate(
            tile, columns, offsets_ptr, tile_offsets_ptr, tile_expert_ptr,
            E, BLOCK_M, GROUP_M,
        )  # fmt: skip
        row = first + tl.arange(0, BLOCK_M)
        inside = row < end
        slot = tl.load(order_ptr + row, mask=inside, other=0)
        dunscaled = _product(
            dy_ptr, slot // TOP_K, inside, stride_dy, w, expert, column * BLOCK_N, F, D,
            1, False, TMA, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        weight = tl.load(weights_ptr + slot, mask=inside, other=0.0).to(tl.float32)
        dgate = tl.zeros((BLOCK_M,), tl.float32)
        for part in tl.static_range(PARTS):
            dgate += _store_gradients(
                _part(dunscaled, part, PARTS, BLOCK_M, BLOCK_N),
                row, inside, column * BLOCK_N + part * (BLOCK_N // PARTS), weight,
                hidden_ptr, dhidden_ptr, scaled_ptr, F,
                ACTIVATION, HALVES, BLOCK_N // PARTS,
            )  # fmt: skip
        if BIAS and column == 0:
            for k in range(0, D, BLOCK_K):
                d = k + tl.arange(0, BLOCK_K)
                where = (slot // TOP_K).to(tl.int64)[:, None] * stride_dy + d[None, :]
                mask = inside[:, None] & (d < D)[None, :]
                dy = tl.load(dy_ptr + where, mask=mask, other=0.0).to(tl.float32)
                bias = b_ptr + expert.to(tl.int64) * D + d
                bias = tl.load(bias, mask=d < D, other=0.0).to(tl.float32)
                dgate += tl.sum(dy * bias[None, :], axis=1)
        tl.store(dgate_ptr + column.to(tl.int64) * slots + slot, dgate, mask=inside)


@triton.jit
def _weight_gradient_kernel(
    p_ptr,  # [N, M_out] sorted, or [T, M_out]
    q_ptr,  # [N, N_out] sorted, or [T, N_out]
    out_ptr,  # [E, M_out, N_out]
    order_ptr,
    offsets_ptr,
    M_out,
    N_out,
    stride_p,
    stride_q,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    GATHER_P: tl.constexpr,
    GATHER_Q: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """out[e] = sum over the rows r of expert e of p_r ⊗ q_r. One program owns a tile of the result: no atomics."""
    tiles_m, tiles_n = tl.cdiv(M_out, BLOCK_M), tl.cdiv(N_out, BLOCK_N)
    for tile in range(tl.program_id(0), E * tiles_m * tiles_n, tl.num_programs(0)):
        expert = tile // (tiles_m * tiles_n)
        place = tile % (tiles_m * tiles_n)
        first = place // (GROUP_M * tiles_n) * GROUP_M
        height = tl.minimum(tiles_m - first, GROUP_M)
        inside = place % (GROUP_M * tiles_n)
        m = (first + inside % height) * BLOCK_M + tl.arange(0, BLOCK_M)
        n = inside // height * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        end = tl.load(offsets_ptr + expert + 1)
        for r in range(tl.load(offsets_ptr + expert), end, BLOCK_K):
            row = r + tl.arange(0, BLOCK_K)
            token = row
            if GATHER_P or GATHER_Q:
                token = tl.load(order_ptr + row, mask=row < end, other=0) // TOP_K
            p_row = (token if GATHER_P else row).to(tl.int64)
            q_row = (token if GATHER_Q else row).to(tl.int64)
            p = tl.load(
                p_ptr + p_row[None, :] * stride_p + m[:, None],
                mask=(m < M_out)[:, None] & (row < end)[None, :],
                other=0.0,
            )
            q = tl.load(
                q_ptr + q_row[:, None] * stride_q + n[None, :],
                mask=(row < end)[:, None] & (n < N_out)[None, :],
                other=0.0,
            )
            acc = tl.dot(p, q, acc, input_precision=PRECISION)
        where = expert.to(tl.int64) * M_out + m
        out = out_ptr + where[:, None] * N_out + n[None, :]
        valid = (m < M_out)[:, None] & (n < N_out)[None, :]
        tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=valid)


@triton.jit
def _bias_gradient_kernel(
    rows_ptr,  # [N, N_out] sorted, or [T, N_out]
    weights_ptr,  # [T, K]
    out_ptr,  # [E, N_out]
    order_ptr,
    offsets_ptr,
    N_out,
    stride,
    TOP_K: tl.constexpr,
    GATHER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out[e] = sum over the rows of expert e; gathered rows times their gate weight."""
    expert = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_N,), tl.float32)
    end = tl.load(offsets_ptr + expert + 1)
    for r in range(tl.load(offsets_ptr + expert), end, BLOCK_M):
        row = r + tl.arange(0, BLOCK_M)
        source = row
        if GATHER:
            slot = tl.load(order_ptr + row, mask=row < end, other=0)
            source = slot // TOP_K
        valid = (row < end)[:, None] & (n < N_out)[None, :]
        where = rows_ptr + source.to(tl.int64)[:, None] * stride + n[None, :]
        value = tl.load(where, mask=valid, other=0.0).to(tl.float32)
        if GATHER:
            weight = tl.load(weights_ptr + slot, mask=row < end, other=0.0)
            value *= weight.to(tl.float32)[:, None]
        acc += tl.sum(value, axis=0)
    out = out_ptr + expert.to(tl.int64) * N_out + n
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=n < N_out)


# ---- Launches ---------------------------------------------------------------------------------------------------


def _halves(activation: str) -> int:
    return 2 if activation in GATED else 1


def _precision(x: Tensor) -> str:
    """Three tf32 products keep a float32 product near float32; 16-bit inputs are multiplied exactly anyway."""
    return "tf32x3" if x.dtype == torch.float32 else "tf32"


def _meta(tile: Tile) -> dict[str, int]:
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP_M": tile.group_m,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def up_projection(
    x: Tensor,
    w_up: Tensor,
    b_up: Tensor | None,
    s: SortedSlots,
    k: int,
    activation: str,
    save_hidden: bool,
    tile: Tile,
) -> tuple[Tensor, Tensor]:
    """act [N, F] = activate(x W_up^T + b) of the sorted slots, and what stood before it, [N, HALVES·F] or empty."""
    (num_experts, rows, width), halves = w_up.shape, _halves(activation)
    hidden_width, slots = rows // halves, len(s.order)
    act = x.new_empty(slots, hidden_width)
    hidden = x.new_empty(slots if save_hidden else 0, rows)
    w, tma = tiles.weights(
        w_up.view(num_experts, halves, hidden_width, width).transpose(1, 2),
        [1, tile.block_n, halves, tile.block_k],
    )
    grid = tiles.grid(s, triton.cdiv(hidden_width, tile.block_n), tile)
    _up_kernel[grid](
        x, w, w_up if b_up is None else b_up, hidden, act,
        s.order, s.offsets, s.tile_offsets, s.tile_expert,
        width, hidden_width, x.stride(0),
        E=num_experts, TOP_K=k, ACTIVATION=activation, HALVES=halves,
        BIAS=b_up is not None, SAVE_HIDDEN=save_hidden, TMA=tma,
        PRECISION=_precision(x), PARTS=max(1, tile.block_n // 32), **_meta(tile),
    )  # fmt: skip
    return act, hidden


def row_products(
    rows: Tensor,
    w: Tensor,
    bias: Tensor | None,
    s: SortedSlots,
    across: bool,
    tile: Tile,
) -> Tensor:
    """Sorted rows times W_e^T (across) or W_e, plus b_e: [N, N_out]."""
    num_experts, depth = len(w), rows.shape[1]
    n_out = w.shape[1] if across else w.shape[2]
    out = rows.new_empty(len(rows), n_out)
    if across:
        weights, tma = tiles.weights(w.unsqueeze(2), [1, tile.block_n, 1, tile.block_k])
    else:
        weights, tma = tiles.weights(w, [1, tile.block_k, tile.block_n])
    _rows_kernel[tiles.grid(s, triton.cdiv(n_out, tile.block_n), tile)](
        rows, weights, w if bias is None else bias, out,
        s.offsets, s.tile_offsets, s.tile_expert, n_out, depth,
        E=num_experts, ACROSS=across, BIAS=bias is not None, TMA=tma,
        PRECISION=_precision(rows), **_meta(tile),
    )  # fmt: skip
    return out


def combine(
    rows: Tensor, inverse: Tensor, weights: Tensor | None, tokens: int, k: int
) -> Tensor:
    """Each token's rows, times their gate weights where given, summed: [T, D]."""
    width = rows.shape[1]
    out = rows.new_empty(tokens, width)
    block_t, block_d = tiles.combine_block(tokens, width)
    grid = (triton.cdiv(tokens, block_t), triton.cdiv(width, block_d))
    _combine_kernel[grid](
        rows, inverse, inverse if weights is None else weights, out, tokens, width,
        TOP_K=k, WEIGHTED=weights is not None, BLOCK_T=block_t, BLOCK_D=block_d,
    )  # fmt: skip
    return out


def activation_gradient(
    dy: Tensor,
    w_down: Tensor,
    b_down: Tensor | None,
    hidden: Tensor,
    weights: Tensor,
    s: SortedSlots,
    activation: str,
    tile: Tile,
) -> tuple[Tensor, Tensor, Tensor]:
    """dhidden [N, HALVES·F], gate weight · act [N, F], and the gradient of the gate weights [T, K] in float32."""
    num_experts, width, hidden_width = w_down.shape
    columns = triton.cdiv(hidden_width, tile.block_n)
    dhidden = torch.empty_like(hidden)
    scaled = hidden.new_empty(len(hidden), hidden_width)
    # Skipped slots are never written: their gradient is 0.
    parts = dy.new_zeros((columns, *weights.shape), dtype=torch.float32)
    w, tma = tiles.weights(w_down, [1, tile.block_k, tile.block_n])
    _dact_kernel[tiles.grid(s, columns, tile)](
        dy, w, w_down if b_down is None else b_down, hidden, weights, dhidden,
        scaled, parts, s.order, s.offsets, s.tile_offsets, s.tile_expert,
        width, hidden_width, weights.numel(), dy.stride(0),
        E=num_experts, TOP_K=weights.shape[1], ACTIVATION=activation,
        HALVES=_halves(activation), BIAS=b_down is not None, TMA=tma,
        PRECISION=_precision(dy), PARTS=max(1, tile.block_n // 32), **_meta(tile),
    )  # fmt: skip
    return dhidden, scaled, parts.sum(0)


def weight_gradient(
    p: Tensor,
    q: Tensor,
    s: SortedSlots,
    k: int,
    tile: Tile,
    gather_p: bool = False,
    gather_q: bool = False,
) -> Tensor:
    """sum over each expert's rows of p_r ⊗ q_r: [E, M, N]; a gathered operand stands in token order."""
    num_experts = len(s.offsets) - 1
    out = p.new_empty(num_experts, p.shape[1], q.shape[1])
    count = num_experts * triton.cdiv(p.shape[1], tile.block_m)
    grid = (tiles.programs(p.device, count * triton.cdiv(q.shape[1], tile.block_n)),)
    _weight_gradient_kernel[grid](
        p, q, out, s.order, s.offsets, p.shape[1], q.shape[1], p.stride(0), q.stride(0),
        E=num_experts, TOP_K=k, GATHER_P=gather_p, GATHER_Q=gather_q,
        PRECISION=_precision(p), **_meta(tile),
    )  # fmt: skip
    return out


def bias_gradient(
    rows: Tensor, weights: Tensor | None, s: SortedSlots, k: int
) -> Tensor:
    """The sum of each expert's rows, [E, N]; with gate weights, of the weighted rows of its tokens."""
    num_experts, width = len(s.offsets) - 1, rows.shape[1]
    out = rows.new_empty(num_experts, width)
    block = min(128, triton.next_power_of_2(width))
    _bias_gradient_kernel[(num_experts, triton.cdiv(width, block))](
        rows, rows if weights is None else weights, out, s.order, s.offsets, width,
        rows.stride(0), TOP_K=k, GATHER=weights is not None, BLOCK_M=16, BLOCK_N=block,
    )  # fmt: skip
    return out
