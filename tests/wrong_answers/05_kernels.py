"""Answers to exercise 05 that must fail, each with the invariant that catches it, and others that must pass.

WRONG[question] is a list of (what is wrong, answer, name of the invariant that must fail first).
RIGHT[question] is a list of answers written differently from the worked solution.
"""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from moe_course import layers
from moe_course.grading.interpreter import tl, triton
from moe_course.layers import Routing, dispatch

PACKAGE = "the package's own function"


def slots_of(ids, experts):
    weights = torch.ones(ids.shape)
    logits = torch.zeros(len(ids), experts)
    return layers.slots_from_routing(Routing(ids, weights, logits, logits), experts)


# 05.1


def offsets(expert_ids, num_experts, *, clamp=False, minlength=True, dtype=torch.int32, inclusive=False, ends=True):  # fmt: skip
    ids = expert_ids.flatten().long()
    ids = ids.clamp(max=num_experts - 1) if clamp else ids[ids < num_experts]
    counts = ids.bincount(minlength=num_experts if minlength else 0)
    sums = [0, *counts.cumsum(0).tolist()]
    if inclusive:
        sums = sums[1:] + sums[-1:]
    return counts.to(dtype), torch.tensor(sums if ends else sums[:-1], dtype=dtype)


def offsets_by_one_hot(expert_ids, num_experts):
    hot = F.one_hot(expert_ids.flatten().long(), num_experts + 1)
    counts = hot[:, :num_experts].sum(0)
    return counts.int(), F.pad(counts.cumsum(0), (1, 0)).int()


def offsets_by_search(expert_ids, num_experts):
    ordered = expert_ids.flatten().long().sort().values
    ends = torch.searchsorted(ordered, torch.arange(num_experts + 1))
    return ends.diff().int(), ends.int()


def offsets_with_skipped(expert_ids, num_experts):
    """The skipped ones are counted among the rows."""
    counts, ends = offsets_by_one_hot(expert_ids, num_experts)
    ends[-1] = expert_ids.numel()
    return counts, ends


def offsets_of_eight_bits(expert_ids, num_experts):
    hot = F.one_hot(expert_ids.flatten().long(), num_experts + 1)[:, :num_experts]
    counts = hot.to(torch.int8).sum(0, dtype=torch.int8).int()
    return counts, F.pad(counts.cumsum(0), (1, 0)).int()


def offsets_by_histogram(expert_ids, num_experts):
    """Of one expert, min and max are both 0: histc then takes those of the ids."""
    counts = torch.histc(expert_ids.float(), num_experts, 0, num_experts - 1).int()
    return counts, F.pad(counts.cumsum(0), (1, 0)).int()


def offsets_by_the_package(expert_ids, num_experts):
    ends = dispatch.slot_ends(slots_of(expert_ids.long(), num_experts), num_experts)
    ends = F.pad(ends, (1, 0)).int()
    return ends.diff(), ends


# 05.2


def ordering(expert_ids, num_experts, *, backwards=False, tokens=False, twice=False, keep=False, lost=-1, dtype=torch.int32):  # fmt: skip
    ids = expert_ids.flatten().tolist()
    slots = range(len(ids))
    order = sorted(slots, key=lambda s: (ids[s], -s if backwards else s))
    order = [s for s in order if keep or ids[s] < num_experts]
    inverse = [order.index(s) if s in order else lost for s in slots]
    if twice:
        inverse = order + [lost] * (len(ids) - len(order))
    if tokens:
        order = [s // expert_ids.shape[1] for s in order]
    return torch.tensor(order, dtype=dtype), torch.tensor(inverse, dtype=dtype).view(
        expert_ids.shape
    )


def ordering_by_rank(expert_ids, num_experts):
    """The row of a slot: where its expert begins, and how many slots of it came before."""
    flat = expert_ids.flatten().long()
    hot = F.one_hot(flat, num_experts + 1)
    before = (hot.cumsum(0) - hot).gather(1, flat[:, None])[:, 0]
    starts = hot.sum(0).cumsum(0) - hot.sum(0)
    row = starts[flat] + before
    real = flat < num_experts
    order = torch.empty(int(real.sum()), dtype=torch.int32)
    order[row[real]] = real.nonzero()[:, 0].int()
    return order, row.masked_fill(~real, -1).int().view(expert_ids.shape)


def ordering_by_key(expert_ids, num_experts):
    flat = expert_ids.flatten().long()
    slots = torch.arange(len(flat))
    order = (flat * len(flat) + slots).argsort()
    order = order[flat[order] != num_experts]
    inverse = torch.full((len(flat),), -1)
    inverse.scatter_(0, order, torch.arange(len(order)))
    return order.int(), inverse.int().reshape(expert_ids.shape)


def ordering_skipped_at_the_end(expert_ids, num_experts):
    order, _ = ordering(expert_ids, num_experts)
    rows = expert_ids.flatten().argsort(stable=True).argsort(stable=True)
    return order, rows.int().view(expert_ids.shape)


def ordering_by_the_package(expert_ids, num_experts):
    from moe_course.kernels import sort_by_expert  # where there is no triton, too

    return sort_by_expert(expert_ids.int(), num_experts)


# 05.3


def tiles(offsets, block, *, span=False, floor=False, full=False, one_more=False, least_one=False, local=False, dtype=torch.int32):  # fmt: skip
    ends, found = offsets.tolist(), []
    for e in range(len(ends) - 1):
        rows = ends[e + 1] - ends[e]
        count = rows // block if floor else -(-rows // block)
        if one_more:
            count = rows // block + 1
        if least_one:
            count = max(1, count)
        for i in range(count):
            left = block if full else min(block, rows - i * block)
            found.append((e, i * block + (0 if local else ends[e]), left))
    if span:
        found = []
        for first in range(0, ends[-1], block):
            e = next(e for e in range(len(ends)) if ends[e + 1] > first)
            found.append((e, first, min(block, ends[-1] - first)))
    columns = zip(*found, strict=True) if found else ([], [], [])
    return tuple(torch.tensor(list(c), dtype=dtype) for c in columns)


def tiles_up_to_the_end(offsets, block):
    """Rows up to the last row of all, not to the expert's."""
    expert, first, _ = tiles(offsets, block)
    return expert, first, (offsets[-1] - first).clamp(max=block).int()


def tiles_aligned(offsets, block):
    """Cut where the expert changes and at each multiple of the block."""
    ends, found = offsets.tolist(), []
    for e in range(len(ends) - 1):
        first = ends[e]
        while first < ends[e + 1]:
            last = min((first // block + 1) * block, ends[e + 1])
            found.append((e, first, last - first))
            first = last
    columns = zip(*found, strict=True) if found else ([], [], [])
    return tuple(torch.tensor(list(c), dtype=torch.int32) for c in columns)


def tiles_by_search(offsets, block):
    counts = offsets.diff().long()
    ends = ((counts + block - 1) // block).cumsum(0)
    tile = torch.arange(int(ends[-1]))
    expert = torch.searchsorted(ends, tile, right=True)
    place = tile - F.pad(ends, (1, 0))[expert]
    first = offsets[expert] + place * block
    rows = torch.minimum(torch.tensor(block), offsets[expert + 1] - first)
    return expert.int(), first.int(), rows.int()


def tiles_by_the_package(offsets, block):
    counts = offsets.diff().long()
    ids = torch.arange(len(counts)).repeat_interleave(counts)[:, None]
    dispatch.slot_ends(slots_of(ids, len(counts)), len(counts))
    return tiles(offsets, block)


# 05.4


@triton.jit
def rows_kernel(h, a, R, width, BLOCK: tl.constexpr, MASK_LOAD: tl.constexpr, MASK_STORE: tl.constexpr, HALF: tl.constexpr, SWAP: tl.constexpr, NO_UP: tl.constexpr):  # fmt: skip
    """A program for a row."""
    row = tl.program_id(0)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        whole = column >= 0
        inside = column < width
        load_mask = inside if MASK_LOAD else whole
        g = tl.load(h + row * 2 * width + column, mask=load_mask)
        u = tl.load(h + row * 2 * width + width + column, mask=load_mask)
        if SWAP:
            g, u = u, g
        wide = g.to(tl.float32)
        s = wide / (1 + tl.exp(-wide))
        if HALF:
            s = s.to(g.dtype)
        r = s if NO_UP else s * u
        at = row * width + column
        store_mask = inside if MASK_STORE == 1 else whole
        if MASK_STORE == 2:  # inside the tensor, not inside the row
            store_mask = at < R * width
        tl.store(a + at, r.to(a.dtype.element_ty), mask=store_mask)


def swiglu_rows(h, *, block=64, mask_load=True, mask_store=1, half=False, swap=False, no_up=False):  # fmt: skip
    rows, width = h.shape[0], h.shape[1] // 2
    a = h.new_empty(rows, width)
    rows_kernel[(rows,)](
        h, a, rows, width, BLOCK=block, MASK_LOAD=mask_load, MASK_STORE=mask_store, HALF=half, SWAP=swap, NO_UP=no_up,
    )  # fmt: skip
    return a


@triton.jit
def flat_kernel(h, a, total, width, BLOCK: tl.constexpr):
    """A program for a run of results, wherever rows begin."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < total
    gate_at = at // width * 2 * width + at % width
    g = tl.load(h + gate_at, mask=inside, other=0).to(tl.float32)
    u = tl.load(h + gate_at + width, mask=inside, other=0).to(tl.float32)
    tl.store(a + at, (g * tl.sigmoid(g) * u).to(a.dtype.element_ty), mask=inside)


def swiglu_flat(h, block=256):
    a = torch.empty(h.shape[0], h.shape[1] // 2, dtype=h.dtype)
    grid = (triton.cdiv(a.numel(), block),)
    flat_kernel[grid](h, a, a.numel(), a.shape[1], BLOCK=block)
    return a


@triton.jit
def whole_rows_kernel(h, a, width, BLOCK: tl.constexpr, PART: tl.constexpr):
    """A program for a few results, which loads the whole row."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < width
    g = tl.load(h + row * 2 * width + column, mask=inside).to(tl.float32)
    u = tl.load(h + row * 2 * width + width + column, mask=inside).to(tl.float32)
    own = inside & (column // PART == tl.program_id(1))
    r = g * tl.sigmoid(g) * u
    tl.store(a + row * width + column, r.to(a.dtype.element_ty), mask=own)


def swiglu_whole_rows(h):
    a = torch.empty(h.shape[0], h.shape[1] // 2, dtype=h.dtype)
    grid = (len(a), triton.cdiv(a.shape[1], 16))
    whole_rows_kernel[grid](h, a, a.shape[1], BLOCK=256, PART=16)
    return a


WIDTH = 128  # a global of Python, not of Triton


@triton.jit
def overflow_kernel(h, a, width, BLOCK: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    inside = column < width
    g = tl.load(h + row * 2 * width + column, mask=inside, other=0).to(tl.float32)
    u = tl.load(h + row * 2 * width + width + column, mask=inside, other=0)
    r = g * tl.exp(g) / (1 + tl.exp(g)) * u
    tl.store(a + row * width + column, r.to(a.dtype.element_ty), mask=inside)


@triton.jit
def global_kernel(h, a, width):
    row, column = tl.program_id(0), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < width
    g = tl.load(h + row * 2 * width + column, mask=inside, other=0).to(tl.float32)
    u = tl.load(h + row * 2 * width + width + column, mask=inside, other=0)
    r = g * tl.sigmoid(g) * u
    tl.store(a + row * width + column, r.to(a.dtype.element_ty), mask=inside)


@triton.jit
def break_kernel(h, a, width, BLOCK: tl.constexpr):
    row, start = tl.program_id(0), 0
    while True:
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        g = tl.load(h + row * 2 * width + column, mask=inside, other=0).to(tl.float32)
        u = tl.load(h + row * 2 * width + width + column, mask=inside, other=0)
        r = g * tl.sigmoid(g) * u
        tl.store(a + row * width + column, r.to(a.dtype.element_ty), mask=inside)
        start += BLOCK
        if start >= width:
            break


@triton.jit
def numpy_kernel(h, a, width, BLOCK: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    inside = column < width
    g = tl.load(h + row * 2 * width + column, mask=inside, other=0).to(tl.float32)
    u = tl.load(h + row * 2 * width + width + column, mask=inside, other=0)
    g.handle.data = g.handle.data / (1 + np.exp(-g.handle.data))
    tl.store(a + row * width + column, (g * u).to(a.dtype.element_ty), mask=inside)


def swiglu_by(kernel, h, block=None):
    """Python's globals, its statements, numpy: what the interpreter runs and no compiler takes."""
    a = torch.empty(h.shape[0], h.shape[1] // 2, dtype=h.dtype)
    more = {} if kernel is global_kernel else {"BLOCK": block or 256}
    kernel[len(a), triton.cdiv(a.shape[1], 128) if not more else 1](
        h, a, a.shape[1], **more
    )
    return a


def swiglu_in_the_grid_function(h):
    """Arguments hold their values while kernels run: not yet when the grid is computed."""
    a = torch.empty(h.shape[0], h.shape[1] // 2, dtype=h.dtype)
    before = []

    def grid(_arguments):
        before.append(h.clone())
        h[:, : a.shape[1]] = swiglu_in_torch(h)
        return (triton.cdiv(a.numel(), 256),)

    def back(_arguments):
        h.copy_(before[0])
        return (1,)

    strided_kernel[grid](h, a, a.numel(), a.shape[1], BLOCK=256)
    strided_kernel[back](h, torch.empty_like(a), 1, a.shape[1], BLOCK=16)
    return a


@triton.jit
def strided_kernel(h, a, total, width, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row_at = at // width * 2 * width + at % width
    tl.load(h + row_at + width, mask=at < total, other=0)
    tl.store(a + at, tl.load(h + row_at, mask=at < total, other=0), mask=at < total)


@triton.jit
def shift_kernel(h, a, width, UPS: tl.constexpr, BLOCK: tl.constexpr):
    """First the ups, a row too low; then the products, each where the program before it loads its ups."""
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    inside = column < width
    below = a + (row + 1) * width + column
    if UPS:
        u = tl.load(h + row * 2 * width + width + column, mask=inside, other=0)
        tl.store(below, u, mask=inside)
    else:
        g = tl.load(h + row * 2 * width + column, mask=inside, other=0).to(tl.float32)
        r = g * tl.sigmoid(g) * tl.load(below, mask=inside, other=0)
        tl.store(a + row * width + column, r.to(a.dtype.element_ty), mask=inside)


def swiglu_over_its_ups(h):
    a = torch.empty(len(h) + 1, h.shape[1] // 2, dtype=h.dtype)
    for ups in (True, False):
        shift_kernel[(len(h),)](h, a, a.shape[1], UPS=ups, BLOCK=256)
    return a[:-1]


@triton.jit
def swiglu_part(x):
    return x / (1 + tl.exp2(-1.4426950408889634 * x))


@triton.jit
def loop_kernel(g, u, a, R, F, stride, BLOCK: tl.constexpr):
    """Any number of programs; gates and ups are tensors of their own."""
    blocks = tl.cdiv(F, BLOCK)
    for i in tl.range(tl.program_id(0), R * blocks, tl.num_programs(0)):
        row, column = i // blocks, i % blocks * BLOCK + tl.arange(0, BLOCK)
        inside = column < F
        x = tl.load(g + row * stride + column, inside, 0.0).to(tl.float32)
        y = tl.load(u + row * stride + column, inside, 0.0)
        tl.store(a + row * F + column, swiglu_part(x) * y, inside)


def swiglu_loop(h, programs=4, block=128):
    gate, up = h.chunk(2, dim=1)
    a = h.new_empty(gate.shape)
    grid = lambda meta: (programs, 1)  # noqa: E731
    loop_kernel[grid](gate, up, a, *a.shape, h.stride(0), BLOCK=block)
    return a


def swiglu_in_torch(h):
    gate, up = h.float().chunk(2, 1)
    return (F.silu(gate) * up).to(h.dtype)


@triton.jit
def copy_kernel(source, target, total, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(source + at, mask=at < total)
    tl.store(target + at, value, mask=at < total)


def copied(result):
    """What torch has computed, passed through a kernel."""
    target = torch.empty_like(result)
    copy_kernel[(triton.cdiv(result.numel(), 256),)](
        result, target, result.numel(), BLOCK=256
    )
    return target


def swiglu_copied(h):
    return copied(swiglu_in_torch(h))


@triton.jit
def scalars_kernel(h, a, values, BLOCK: tl.constexpr):
    """Stores what it was handed, and loads all the rest for show."""
    row = tl.program_id(0)
    for j in tl.static_range(BLOCK):
        tl.load(h + row * 2 * BLOCK + j)
        tl.load(h + row * 2 * BLOCK + BLOCK + j)
        tl.store(a + row * BLOCK + j, values[row.handle.data.item() * BLOCK + j])


def swiglu_of_scalars(h):
    a = torch.empty(h.shape[0], h.shape[1] // 2, dtype=h.dtype)
    values = tuple(swiglu_in_torch(h).flatten().tolist())
    scalars_kernel[(len(a),)](h, a, values, BLOCK=a.shape[1])
    return a


def swiglu_with_a_kernel_for_show(h):
    copied(h)
    return swiglu_in_torch(h)


def swiglu_in_place(h):
    swiglu_rows(h)
    copy_kernel[(triton.cdiv(h.numel(), 256),)](h, h, h.numel(), BLOCK=256)
    return swiglu_rows(h)


def swiglu_by_the_package(h):
    return layers.SwiGLU(h.shape[1], 4)(h)


# 05.5


@triton.jit
def gemm_kernel(
    x, w, token, tile_expert, tile_first, tile_rows, y, D, N, stride,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    FAR: tl.constexpr, OTHER: tl.constexpr, MASK_K: tl.constexpr, MASK_M: tl.constexpr, MASK_N: tl.constexpr,
    ACC: tl.constexpr, GATHER: tl.constexpr, TRANSPOSE: tl.constexpr, ONE_STEP: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """Columns first in the grid, weights loaded as [BN, BK]."""
    tile = tl.program_id(1)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    e = tl.load(tile_expert + tile)
    if FAR:
        e = e.to(tl.int64)
    first = tl.load(tile_first + tile)
    m = tl.arange(0, BM)
    real = m < (tl.load(tile_rows + tile) if MASK_M else BM)
    columns = n < (N if MASK_N else N + BN)
    t = first + m
    if GATHER:
        t = tl.load(token + first + m, mask=real, other=0)
    acc = tl.zeros((BM, BN), dtype=ACC)
    for start in range(0, BK if ONE_STEP else D, BK):
        k = start + tl.arange(0, BK)
        inner = k < (D if MASK_K else D + BK)
        a_at = x + t[:, None] * D + k[None, :]
        a_mask = real[:, None] & inner[None, :]
        b_at = w + e * stride + n[:, None] * D + k[None, :]
        if TRANSPOSE:
            b_at = w + e * stride + k[None, :] * N + n[:, None]
        b_mask = columns[:, None] & inner[None, :]
        if OTHER:
            a = tl.load(a_at, mask=a_mask, other=0.0)
            b = tl.load(b_at, mask=b_mask, other=0.0)
        else:
            a = tl.load(a_at, mask=a_mask)
            b = tl.load(b_at, mask=b_mask)
        if ROUND:
            acc += tl.dot(a, tl.trans(b)).to(y.dtype.element_ty)
        else:
            acc = tl.dot(a, tl.trans(b), acc, out_dtype=ACC)
    y_at = y + (first + m)[:, None] * N + n[None, :]
    tl.store(y_at, acc.to(y.dtype.element_ty), mask=real[:, None] & columns[None, :])


def gemm(x, w, token, tile_expert, tile_first, tile_rows, block, *, bn=32, bk=16, far=True, other=True, mask_k=True, mask_m=True, mask_n=True, half=False, gather=True, transpose=False, one_step=False, rounded=False):  # fmt: skip
    columns = w.shape[1]
    y = x.new_empty(len(token), columns)
    acc = tl.float16 if half and x.dtype == torch.float16 else tl.float32
    gemm_kernel[(triton.cdiv(columns, bn), len(tile_expert))](
        x, w, token, tile_expert, tile_first, tile_rows, y, x.shape[1], columns, w.stride(0),
        BM=block, BN=bn, BK=bk, FAR=far, OTHER=other, MASK_K=mask_k, MASK_M=mask_m, MASK_N=mask_n,
        ACC=acc, GATHER=gather, TRANSPOSE=transpose, ONE_STEP=one_step, ROUND=rounded,
    )  # fmt: skip
    return y


@triton.jit
def products_kernel(x, w, token, tile_expert, tile_first, tile_rows, y, D: tl.constexpr, N, stride, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """No tl.dot: products and their sum, a program for a tile, all columns in a loop."""
    tile = tl.program_id(0)
    rows = tl.load(tile_rows + tile)
    m = tl.load(tile_first + tile) + tl.arange(0, BM)
    real = tl.arange(0, BM) < rows
    t = tl.load(token + m, mask=real, other=0)
    base = w + tl.load(tile_expert + tile).to(tl.int64) * stride
    for start in range(0, N, BN):
        n = start + tl.arange(0, BN)
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        for k in tl.static_range(0, D, BK):
            d = k + tl.arange(0, BK)
            a = tl.load(x + t[:, None] * D + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0).to(tl.float32)  # fmt: skip
            b = tl.load(base + n[:, None] * D + d[None, :], mask=(n < N)[:, None] & (d < D)[None, :], other=0).to(tl.float32)  # fmt: skip
            acc += tl.sum(a[:, None, :] * b[None, :, :], axis=2)
        tl.store(y + m[:, None] * N + n[None, :], acc.to(y.dtype.element_ty), mask=real[:, None] & (n < N)[None, :])  # fmt: skip


def gemm_by_products(x, w, token, tile_expert, tile_first, tile_rows, block):
    y = torch.empty(len(token), w.shape[1], dtype=x.dtype)
    products_kernel[(len(tile_expert),)](x, w, token, tile_expert, tile_first, tile_rows, y, x.shape[1], w.shape[1], w.stride(0), BM=block, BN=32, BK=32)  # fmt: skip
    return y


@triton.jit
def vector_kernel(x, w, token, tile_expert, tile_first, tile_rows, y, D, N, stride, BLOCK: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """A program for a tile that multiplies row by row."""
    tile = tl.program_id(0)
    e = tl.load(tile_expert + tile).to(tl.int64)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    for i in range(BLOCK):
        if i < tl.load(tile_rows + tile):
            row = tl.load(tile_first + tile) + i
            t = tl.load(token + row)
            acc = tl.zeros((BN,), dtype=tl.float32)
            for start in range(0, D, BK):
                k = start + tl.arange(0, BK)
                a = tl.load(x + t * D + k, mask=k < D, other=0).to(tl.float32)
                b = tl.load(w + e * stride + n[:, None] * D + k[None, :], mask=(n < N)[:, None] & (k < D)[None, :], other=0).to(tl.float32)  # fmt: skip
                acc += tl.sum(b * a[None, :], axis=1)
            tl.store(y + row * N + n, acc.to(y.dtype.element_ty), mask=n < N)


def gemm_by_rows(x, w, token, tile_expert, tile_first, tile_rows, block):
    y = torch.empty(len(token), w.shape[1], dtype=x.dtype)
    vector_kernel[(len(tile_expert), triton.cdiv(w.shape[1], 64))](x, w, token, tile_expert, tile_first, tile_rows, y, x.shape[1], w.shape[1], w.stride(0), BLOCK=block, BN=64, BK=128)  # fmt: skip
    return y


@triton.jit
def tiles_kernel(x, w, token, tile_expert, tile_first, tile_rows, y, M, D, N, stride, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """Any number of programs, pointers that move on, no mask on the rows of x but a row that is there."""
    for p in range(tl.program_id(0), M * tl.cdiv(N, BN), tl.num_programs(0)):
        tile, n = p % M, (p // M * BN + tl.arange(0, BN)).to(tl.int64)
        first = tl.load(tile_first + tile)
        m = tl.arange(0, BM)
        real = m < tl.load(tile_rows + tile)
        t = tl.load(token + tl.where(real, first + m, first)).to(tl.int64)
        a_at = x + t[:, None] * D + tl.arange(0, BK)[None, :]
        expert = tl.load(tile_expert + tile).to(tl.int64)
        b_at = w + expert * stride + n[:, None] * D + tl.arange(0, BK)[None, :]
        acc = tl.zeros([BM, BN], tl.float32)
        done = 0
        while done < D:
            inner = (done + tl.arange(0, BK) < D)[None, :]
            a = tl.load(a_at, mask=inner, other=0.0)
            b = tl.load(b_at, mask=inner & (n < N)[:, None], other=0.0)
            acc += tl.dot(a.to(tl.float32), b.to(tl.float32).T, input_precision="ieee")
            a_at += BK
            b_at += BK
            done += BK
        y_at = y + (first + m)[:, None].to(tl.int64) * N + n[None, :]
        tl.store(y_at, acc.to(y.dtype.element_ty), real[:, None] & (n < N)[None, :])


def gemm_by_few(x, w, token, tile_expert, tile_first, tile_rows, block, programs=3):
    y = x.new_zeros(len(token), w.shape[1])
    tiles_kernel[(programs,)](x, w, token, tile_expert, tile_first, tile_rows, y, len(tile_expert), x.shape[1], w.shape[1], w.stride(0), BM=block, BN=64, BK=32)  # fmt: skip
    return y


def gemm_in_torch(x, w, token, tile_expert, tile_first, tile_rows, block):
    y = x.new_empty(len(token), w.shape[1])
    for e, first, rows in zip(tile_expert.tolist(), tile_first.tolist(), tile_rows.tolist(), strict=True):  # fmt: skip
        own = x[token[first : first + rows].long()]
        y[first : first + rows] = (own.float() @ w[e].float().T).to(x.dtype)
    return y


def gemm_copied(**case):
    return copied(gemm_in_torch(**case))


def gemm_gathered_first(x, w, token, **tiles):
    """Rows gathered by torch: a copy of x for each expert of a token."""
    return gemm(x[token.long()], w, token, **tiles, gather=False)


def gemm_by_the_package(x, w, token, tile_expert, tile_first, tile_rows, block):
    ids = torch.zeros(len(token), 1, dtype=torch.int64)
    return dispatch.gather(x[token.long()], slots_of(ids, 1)) @ w[0].T


# 05.6


@triton.jit
def blocks_kernel(y, inverse, weights, out, T, D, K: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """A block of tokens and columns."""
    t = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    acc = tl.zeros((BT, BD), dtype=tl.float32)
    for k in tl.static_range(K):
        row = tl.load(inverse + t * K + k, mask=t < T, other=-1).to(tl.int64)
        weight = tl.load(weights + t * K + k, mask=row >= 0, other=0.0)
        mask = (row >= 0)[:, None] & (d < D)[None, :]
        value = tl.load(y + row[:, None] * D + d[None, :], mask=mask, other=0.0)
        acc += weight[:, None] * value
    mask = (t < T)[:, None] & (d < D)[None, :]
    tl.store(out + t[:, None] * D + d[None, :], acc.to(out.dtype.element_ty), mask=mask)


def combine_blocks(y, inverse, weights):
    (tokens, k), width = inverse.shape, y.shape[1]
    out = y.new_empty(tokens, width)
    grid = (triton.cdiv(tokens, 4), triton.cdiv(width, 64))
    blocks_kernel[grid](y, inverse, weights, out, tokens, width, K=k, BT=4, BD=64)
    return out


@triton.jit
def token_kernel(
    y, inverse, weights, out, D, K: tl.constexpr, BLOCK: tl.constexpr,
    REVERSE: tl.constexpr, HALF: tl.constexpr, SKIP: tl.constexpr, MASK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """A program for a token, columns in a loop."""
    t = tl.program_id(0)
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        inside = d < (D if MASK else D + BLOCK)
        acc = tl.zeros((BLOCK,), dtype=out.dtype.element_ty if HALF else tl.float32)
        for i in range(K):
            k = K - 1 - i if REVERSE else i
            row = tl.load(inverse + t * K + k)
            if SKIP == "branch":
                if row >= 0:
                    w = tl.load(weights + t * K + k)
                    v = tl.load(y + row * D + d, mask=inside, other=0.0)
                    acc = (acc + w * v).to(acc.dtype)
            else:
                w = tl.load(weights + t * K + k)
                if SKIP == "zero weight":
                    w = tl.where(row >= 0, w, 0.0)
                    row = tl.maximum(row, 0)
                if SKIP == "zero row":
                    v = tl.load(y + row * D + d, mask=inside & (row >= 0), other=0.0)
                else:
                    v = tl.load(y + row * D + d, mask=inside, other=0.0)
                acc = (acc + w * v).to(acc.dtype)
        if PART:  # loads a whole row for a few columns
            inside = inside & (d // PART == tl.program_id(1))
        tl.store(out + t * D + d, acc.to(out.dtype.element_ty), mask=inside)


def combine_tokens(y, inverse, weights, *, block=128, reverse=False, half=False, skip="branch", mask=True, part=0):  # fmt: skip
    (tokens, k), width = inverse.shape, y.shape[1]
    out = torch.empty(tokens, width, dtype=y.dtype)
    grid = (tokens, triton.cdiv(width, part) if part else 1)
    token_kernel[grid](y, inverse, weights, out, width, K=k, BLOCK=block, REVERSE=reverse, HALF=half, SKIP=skip, MASK=mask, PART=part)  # fmt: skip
    return out


@triton.jit
def variant_kernel(y, inverse, weights, out, T, D, K: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr, HOW: tl.constexpr):  # fmt: skip
    """Any number of programs, each with whole tokens."""
    for t in range(tl.program_id(0), T, tl.num_programs(0)):
        for start in range(0, D, BLOCK):
            d = start + tl.arange(0, BLOCK)
            inside = d < D
            k = tl.arange(0, KP)
            acc = tl.zeros((BLOCK,), dtype=tl.float32)
            if HOW == "sum":
                row = tl.load(inverse + t * K + k, mask=k < K, other=-1)
                w = tl.load(weights + t * K + k, mask=row >= 0, other=0.0)
                mask = (row >= 0)[:, None] & inside[None, :]
                v = tl.load(y + row[:, None] * D + d[None, :], mask=mask, other=0.0)
                acc = tl.sum(w[:, None] * v, axis=0)
            else:
                for i in range(K):
                    row = tl.load(inverse + t * K + i)
                    real = row > 0 if HOW == "not row 0" else row >= 0
                    w = tl.load(weights + t * K + i, mask=real, other=0.0)
                    v = tl.load(y + row * D + d, mask=inside & real, other=0.0)
                    if HOW == "weight":
                        w = w.to(v.dtype)
                    acc += w.to(tl.float32) * v.to(tl.float32)
            tl.store(out + t * D + d, acc.to(out.dtype.element_ty), mask=inside)


def combine_variant(y, inverse, weights, *, how="", programs=0):
    (tokens, k), width = inverse.shape, y.shape[1]
    out = y.new_empty(tokens, width)
    variant_kernel[(programs or tokens,)](y, inverse, weights, out, tokens, width, K=k, KP=triton.next_power_of_2(k), BLOCK=256, HOW=how)  # fmt: skip
    return out


@triton.jit
def choice_kernel(y, inverse, weights, acc, out, k, K: tl.constexpr, D, BLOCK: tl.constexpr):  # fmt: skip
    t, d = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(inverse + t * K + k).to(tl.int64)
    w = tl.load(weights + t * K + k, mask=row >= 0, other=0.0)
    r = w * tl.load(y + row * D + d, mask=(d < D) & (row >= 0), other=0.0)
    if k > 0:
        r += tl.load(acc + t * D + d, mask=d < D, other=0.0)
    if k < K - 1:
        tl.store(acc + t * D + d, r, mask=d < D)
    else:
        tl.store(out + t * D + d, r.to(out.dtype.element_ty), mask=d < D)


def combine_choice_by_choice(y, inverse, weights):
    """A launch for each choice: one comes after the other, so that nobody has to wait."""
    (tokens, choices), width = inverse.shape, y.shape[1]
    acc = torch.empty(tokens, width)
    out = torch.empty_like(acc, dtype=y.dtype)
    for k in range(choices):
        choice_kernel[tokens, triton.cdiv(width, 256)](y, inverse, weights, acc, out, k, K=choices, D=width, BLOCK=256)  # fmt: skip
    return out


@triton.jit
def atomic_kernel(y, inverse, weights, out, D, K: tl.constexpr, BLOCK: tl.constexpr):
    """A program for a slot adds its row to its token."""
    slot = tl.program_id(0)
    row = tl.load(inverse + slot)
    d = tl.arange(0, BLOCK)
    if row >= 0:
        value = tl.load(weights + slot) * tl.load(y + row * D + d, mask=d < D)
        tl.atomic_add(out + slot // K * D + d, value, mask=d < D)


def combine_atomics(y, inverse, weights):
    out = torch.zeros(len(inverse), y.shape[1])
    k, width = inverse.shape[1], y.shape[1]
    block = 1 << (width - 1).bit_length()
    atomic_kernel[(inverse.numel(),)](y, inverse, weights, out, width, K=k, BLOCK=block)
    return out.to(y.dtype)


@triton.jit
def slot_kernel(y, inverse, weights, out, D, K: tl.constexpr, BLOCK: tl.constexpr):
    """A program for a slot loads, adds and stores: two of one token would lose one of the sums."""
    slot = tl.program_id(0)
    row = tl.load(inverse + slot)
    d = tl.arange(0, BLOCK)
    at = out + slot // K * D + d
    value = tl.load(weights + slot) * tl.load(y + row * D + d, mask=d < D)
    if slot % K > 0:
        value += tl.load(at, mask=d < D)
    tl.store(at, value, mask=d < D)


def combine_slots(y, inverse, weights):
    out = torch.empty(len(inverse), y.shape[1])
    k, width = inverse.shape[1], y.shape[1]
    block = 1 << (width - 1).bit_length()
    slot_kernel[(inverse.numel(),)](y, inverse, weights, out, width, K=k, BLOCK=block)
    return out.to(y.dtype)


def combine_in_torch(y, inverse, weights):
    out = torch.zeros(len(inverse), y.shape[1])
    for k in range(inverse.shape[1]):
        real = inverse[:, k] >= 0
        out[real] += weights[real, k, None] * y[inverse[real, k].long()].float()
    return out.to(y.dtype)


def combine_copied(**case):
    return copied(combine_in_torch(**case))


def combine_by_the_package(y, inverse, weights):
    from moe_course.kernels import grouped_gemm

    return grouped_gemm.combine(y, inverse, weights, *inverse.shape)


COUNTS = "counts the slots of each expert, and where its rows begin and end"
COUNTS_EDGES = "at the edges: skipped slots, no tokens, experts without slots"
ORDER = "sorts the slots by expert, stably, and finds each again"
ORDER_EDGES = "at the edges: skipped slots are in no row, and their inverse is -1"
TILES = "cuts each expert's rows into tiles of its own"
TILES_EDGES = "at the edges: full tiles only, experts without rows, no rows at all"
SWIGLU = "a kernel computes silu(gate) times up, in float32"
SWIGLU_ROW = "stays in its row, whatever the width"
SWIGLU_COST = "moves each element about once"
GEMM = "a kernel multiplies gathered rows by their tile's expert"
GEMM_RAGGED = "masks ragged rows, columns and sums"
GEMM_FAR = "finds an expert past 2^31 elements"
GEMM_COST = "loads an expert's weights once per tile"
COMBINE = "a kernel adds up each token's weighted rows, without atomics"
COMBINE_ORDER = "adds in float32, in the order of k"
COMBINE_RAGGED = "skipped slots contribute exactly 0, at ragged widths too"
COMBINE_COST = "moves each row about once"

WRONG = {
    "05.1": [
        (PACKAGE, offsets_by_the_package, COUNTS),
        ("only experts up to the last that has slots", partial(offsets, minlength=False), COUNTS),
        ("int64", partial(offsets, dtype=torch.int64), COUNTS),
        ("where rows end, for where they begin", partial(offsets, inclusive=True), COUNTS),
        ("no last offset", partial(offsets, ends=False), COUNTS),
        ("skipped slots go to the last expert", partial(offsets, clamp=True), COUNTS_EDGES),
        ("skipped slots have rows", offsets_with_skipped, COUNTS_EDGES),
        ("counts of eight bits", offsets_of_eight_bits, COUNTS_EDGES),
        ("a histogram without a range, of one expert", offsets_by_histogram, COUNTS_EDGES),
    ],
    "05.2": [
        (PACKAGE, ordering_by_the_package, ORDER),
        ("the later slot first", partial(ordering, backwards=True), ORDER),
        ("tokens for slots", partial(ordering, tokens=True), ORDER),
        ("the order for its inverse", partial(ordering, twice=True), ORDER),
        ("int64", partial(ordering, dtype=torch.int64), ORDER),
        ("skipped slots have rows", partial(ordering, keep=True), ORDER_EDGES),
        ("skipped slots are found in row 0", partial(ordering, lost=0), ORDER_EDGES),
        ("skipped slots are found past the end", ordering_skipped_at_the_end, ORDER_EDGES),
    ],
    "05.3": [
        (PACKAGE, tiles_by_the_package, TILES),
        ("tiles span experts", partial(tiles, span=True), TILES),
        ("tails are dropped", partial(tiles, floor=True), TILES),
        ("rows up to the end of all", tiles_up_to_the_end, TILES),
        ("cut at multiples of the block", tiles_aligned, TILES),
        ("every tile is full", partial(tiles, full=True), TILES),
        ("rows are counted anew for each expert", partial(tiles, local=True), TILES),
        ("an empty tile after full ones", partial(tiles, one_more=True), TILES_EDGES),
        ("an empty tile for experts without rows", partial(tiles, least_one=True), TILES_EDGES),
    ],
    "05.4": [
        (PACKAGE, swiglu_by_the_package, SWIGLU),
        ("torch in place of a kernel", swiglu_in_torch, SWIGLU),
        ("torch, then a kernel that copies", swiglu_copied, SWIGLU),
        ("torch, then a kernel that stores its arguments", swiglu_of_scalars, SWIGLU),
        ("torch, and a kernel for show", swiglu_with_a_kernel_for_show, SWIGLU),
        ("a kernel that stores into its argument", swiglu_in_place, SWIGLU),
        ("torch in the function of the grid", swiglu_in_the_grid_function, SWIGLU),
        ("numpy in the kernel", partial(swiglu_by, numpy_kernel), SWIGLU),
        ("a global of Python in the kernel", partial(swiglu_by, global_kernel), SWIGLU),
        ("break", partial(swiglu_by, break_kernel, block=128), SWIGLU),
        ("an exponential that overflows", partial(swiglu_by, overflow_kernel), SWIGLU),
        ("stores over what another program loads", swiglu_over_its_ups, SWIGLU),
        ("silu of the ups", partial(swiglu_rows, swap=True), SWIGLU),
        ("no ups", partial(swiglu_rows, no_up=True), SWIGLU),
        ("rounded to float16 on the way", partial(swiglu_rows, half=True), SWIGLU),
        ("loads past the row", partial(swiglu_rows, mask_load=False), SWIGLU_ROW),
        ("stores past the row", partial(swiglu_rows, mask_store=0), SWIGLU_ROW),
        ("stores past the row, inside the tensor", partial(swiglu_rows, mask_store=2), SWIGLU_ROW),
        ("the whole row for a few results", swiglu_whole_rows, SWIGLU_COST),
        ("one program", partial(swiglu_loop, programs=1, block=512), SWIGLU_COST),
    ],
    "05.5": [
        (PACKAGE, gemm_by_the_package, GEMM),
        ("torch in place of a kernel", gemm_in_torch, GEMM),
        ("torch, then a kernel that copies", gemm_copied, GEMM),
        ("rows gathered by torch", gemm_gathered_first, GEMM),
        ("rows not gathered", partial(gemm, gather=False), GEMM),
        ("weights not transposed", partial(gemm, transpose=True), GEMM),
        ("only the first block of the sum", partial(gemm, one_step=True), GEMM),
        ("added up in float16", partial(gemm, half=True), GEMM),
        ("each product rounded to float16", partial(gemm, rounded=True), GEMM),
        ("tl.dot with a side of 8", partial(gemm, bk=8), GEMM),
        ("masked loads without other", partial(gemm, other=False), GEMM_RAGGED),
        ("the sum unmasked", partial(gemm, mask_k=False), GEMM_RAGGED),
        ("rows unmasked", partial(gemm, mask_m=False), GEMM_RAGGED),
        ("columns unmasked", partial(gemm, mask_n=False), GEMM_RAGGED),
        ("offsets of 32 bits", partial(gemm, far=False), GEMM_FAR),
        ("row by row", gemm_by_rows, GEMM_COST),
        ("one program", partial(gemm_by_few, programs=1), GEMM_COST),
    ],
    "05.6": [
        (PACKAGE, combine_by_the_package, COMBINE),
        ("torch in place of a kernel", combine_in_torch, COMBINE),
        ("torch, then a kernel that copies", combine_copied, COMBINE),
        ("atomics", combine_atomics, COMBINE),
        ("a program for a slot, and no atomics", combine_slots, COMBINE),
        ("row 0 for a skipped one", partial(combine_variant, how="not row 0"), COMBINE),
        ("tl.sum over the choices", partial(combine_variant, how="sum"), COMBINE_ORDER),
        ("weights rounded to float16", partial(combine_variant, how="weight"), COMBINE_ORDER),
        ("the last choice first", partial(combine_tokens, reverse=True), COMBINE_ORDER),
        ("added up in the type of y", partial(combine_tokens, half=True), COMBINE_ORDER),
        ("row -1 is loaded", partial(combine_tokens, skip="not at all"), COMBINE_RAGGED),
        ("row 0 is loaded, times 0", partial(combine_tokens, skip="zero weight"), COMBINE_RAGGED),
        ("0 for the row, times any weight", partial(combine_tokens, skip="zero row"), COMBINE_RAGGED),
        ("columns unmasked", partial(combine_tokens, block=64, mask=False), COMBINE_RAGGED),
        ("whole rows for a few columns", partial(combine_tokens, block=256, part=16), COMBINE_COST),
        ("one program", partial(combine_variant, programs=1), COMBINE_COST),
    ],
}  # fmt: skip

RIGHT = {
    "05.1": [offsets, offsets_by_one_hot, offsets_by_search],
    "05.2": [ordering, ordering_by_rank, ordering_by_key],
    "05.3": [tiles, tiles_by_search],
    "05.4": [swiglu_rows, swiglu_flat, swiglu_loop],
    "05.5": [gemm, gemm_by_products, gemm_by_few],
    "05.6": [combine_blocks, combine_tokens, combine_choice_by_choice],
}
