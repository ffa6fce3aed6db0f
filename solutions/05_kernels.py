# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Exercise 05: Kernels of a sparse layer
#
# <div class="page-card">
#
# **You will be able to**
#
# - sort slots by expert and cut them into tiles that never span two experts, as a kernel needs them;
# - write Triton kernels with masks on every ragged edge: SwiGLU, a grouped matrix product, the combine;
# - read a cost table, and say why one kernel moves four times the bytes of another.
#
# {minutes} · {points} points · Needs: [From loop to grouped GEMM](../book/kernels/grouped_gemm.ipynb) and
# [The fused layer](../book/kernels/fused_moe.ipynb).
#
# </div>
#
# Fill in the functions, run the cell under each. Sizes are random, ragged ones included. 05.1 to 05.3 are plain torch
# and run everywhere. 05.4 to 05.6 are kernels: they run in Triton's interpreter, on the CPU, also where there is a
# GPU. Triton exists for Linux; where it is missing, these three questions are left out, and their points with them.
#
# The check watches every program. What the interpreter forgives and a GPU does not, fails here, even where the values
# are right: a load or store outside a tensor, two programs that share an element that one of them stores, `tl.dot` with
# a side below 16, and what Triton's compiler refuses (`break`, a dict, numpy, a global that is no `tl.constexpr`). Sums
# by `tl.sum` have no order, and one program for everything leaves a GPU idle. A lane that a mask leaves out is NaN
# unless the load says `other=`. Outside of kernels the arguments hold NaN too: what torch computes earns nothing here,
# nor do calls into `moe_course`.
#
# Letters are those of the course: `T` tokens, `E` experts, `K` experts per token, `D` and `N` widths. A *slot* is one
# choice of one token; the slot of token `t` and choice `k` has the number `t·K + k`. An expert id of `E` skips its
# slot.

# %%
import torch
from torch import Tensor

from moe_course.grading import check, solution, total

# Triton, told to interpret its kernels before it is imported.
from moe_course.grading.interpreter import tl, triton

# %% [markdown]
# ## 05.1 Where each expert begins
#
# {meta 05.1}
#
# `expert_ids` [T, K] says which expert each slot goes to. Return, both of int32:
#
# - `counts` [E]: how many slots each expert has. Slots with the id `E` are skipped, they count for nobody;
# - `offsets` [E + 1]: when the slots stand sorted by expert, expert `e` has the rows `offsets[e]` to
#   `offsets[e + 1] - 1`. So `offsets[0]` is 0, and `offsets[E]` is the number of rows.


# %% tags=["05.1"]
def expert_offsets(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """(counts [E], offsets [E + 1]), both int32; expert_ids [T, K]."""
    # Your code here.
    # BEGIN SOLUTION
    ids = expert_ids.flatten()
    counts = ids.bincount(minlength=num_experts + 1)[:num_experts]
    offsets = torch.zeros(num_experts + 1, dtype=torch.int32)
    offsets[1:] = counts.cumsum(dim=0)
    return counts.int(), offsets
    # END SOLUTION


# %%
check("05.1", expert_offsets)

# %% [markdown]
# ## 05.2 There and back
#
# {meta 05.2}
#
# Sort the slots by expert; those of one expert stay in the order of their numbers, so that every run and every
# machine adds up in the same order. Return, both of int32:
#
# - `order` [R]: the number of the slot that stands in each sorted row. Skipped slots are not among the `R` rows;
# - `inverse` [T, K]: the row in which each slot stands, and -1 for a skipped one.
#
# The first is what a kernel gathers by, the second what the combine finds its rows with.


# %% tags=["05.2"]
def stable_order(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """(order [R], inverse [T, K]), both int32; expert_ids [T, K]."""
    # Your code here.
    # BEGIN SOLUTION
    ids = expert_ids.flatten()
    order = ids.argsort(stable=True)  # the skipped ones, E, come last
    order = order[: int((ids < num_experts).sum())]
    inverse = torch.full_like(ids, -1, dtype=torch.int32)
    inverse[order] = torch.arange(len(order), dtype=torch.int32)
    return order.int(), inverse.view(expert_ids.shape)
    # END SOLUTION


# %%
check("05.2", stable_order)

# %% [markdown]
# ## 05.3 Tiles
#
# {meta 05.3}
#
# A program of a grouped product multiplies one tile: up to `block` rows by the weights of **one** expert. Cut the
# sorted rows of 05.1 into tiles: every expert begins a tile of its own, its tiles are full but for the last, and an
# expert without rows has none. Return, for the tiles in order of their rows, all int32 [M]:
#
# - the expert of the tile,
# - its first row,
# - its number of rows, 1 to `block`.
#
# How many rows of work are wasted, with 4 experts of 17 rows each and a block of 16? What would a block of 64 waste?


# %% tags=["05.3"]
def tile_map(offsets: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """(expert [M], first row [M], rows [M]), all int32; offsets [E + 1]."""
    # Your code here.
    # BEGIN SOLUTION
    counts = offsets.diff()
    tiles = (counts + block - 1) // block  # of each expert
    expert = torch.arange(len(counts)).repeat_interleave(tiles)
    before = (tiles.cumsum(dim=0) - tiles)[expert]  # tiles of earlier experts
    first = offsets[expert] + block * (torch.arange(len(expert)) - before)
    rows = (offsets[expert + 1] - first).clamp(max=block)
    return expert.int(), first.int(), rows.int()
    # END SOLUTION


# %%
check("05.3", tile_map)

# %% [markdown]
# ## 05.4 SwiGLU, masked
#
# {meta 05.4}
#
# `h` [R, 2F] holds, in each row, F gates and then F ups. Write the kernel and its launch:
#
# $$a = \text{silu}(g) \cdot u = g \, \sigma(g) \cdot u$$
#
# The result [R, F] has the type of `h`, float32 or float16; compute in float32 whatever the type. `R` may be 0, and
# `F` is any number, so no block fits: mask what is past the end of the row. What lies behind the gates of a row? And
# behind the ups of the last?
#
# The launch is yours too: how many programs, and what each of them does. `h` is contiguous.


# %% tags=["05.4"]
@triton.jit
def swiglu_kernel(h, a, F, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)  # row · F may exceed 2^31
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    # Your code here.
    # BEGIN SOLUTION
    inside = column < F
    gate = tl.load(h + row * 2 * F + column, mask=inside, other=0.0)
    up = tl.load(h + row * 2 * F + F + column, mask=inside, other=0.0)
    gate = gate.to(tl.float32)
    result = gate * tl.sigmoid(gate) * up.to(tl.float32)
    tl.store(a + row * F + column, result.to(a.dtype.element_ty), mask=inside)
    # END SOLUTION


def swiglu(h: Tensor) -> Tensor:
    """silu(gate) · up, [R, F], computed by a kernel; h [R, 2F]."""
    rows, width = h.shape[0], h.shape[1] // 2
    a = torch.empty(rows, width, dtype=h.dtype)
    # Launch the kernel here: a is its result.
    # BEGIN SOLUTION
    grid = (rows, triton.cdiv(width, 128))
    swiglu_kernel[grid](h, a, width, BLOCK=128)
    return a
    # END SOLUTION


# %%
check("05.4", swiglu)

# %% [markdown]
# ## 05.5 A grouped product
#
# {meta 05.5}
#
# Row `r` of the result is `w[e] @ x[token[r]]`, where `e` is the expert of the tile that row `r` lies in. The tiles
# are those of 05.3: `tile_expert`, `tile_first`, `tile_rows`, with at most `block` rows each (a power of two, at
# least 16); `x` [T, D] holds each token once, so gather its rows as you load them. Add up in float32; the result [R,
# N] has the type of `x`, float32 or float16.
#
# - Mask three ragged edges: rows of the tile, columns `N`, and the `D` that you sum over. Which of them need `other`?
# - Load the weights of an expert once per tile, not once per row. That is what the tiles are for.
# - An expert's weights are contiguous, and the experts lie `w.stride(0)` apart: together they may have more than
#   $2^{31}$ elements. Ids are int32; what is multiplied by a stride has to be int64 **before** the product.


# %% tags=["05.5"]
@triton.jit
def grouped_gemm_kernel(
    x, w, token, tile_expert, tile_first, tile_rows, y,
    D, N, w_stride,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    n = tl.program_id(1) * BN + tl.arange(0, BN)  # columns of the result
    # Your code here.
    # BEGIN SOLUTION
    expert = tl.load(tile_expert + tile).to(tl.int64)
    m = tl.arange(0, BM)
    real = m < tl.load(tile_rows + tile)
    row = tl.load(tile_first + tile) + m.to(tl.int64)
    t = tl.load(token + row, mask=real, other=0).to(tl.int64)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, D, BK):
        k = start + tl.arange(0, BK)
        # Sums run over k: what is left out of them must be 0.
        a_mask = real[:, None] & (k < D)[None, :]
        a = tl.load(x + t[:, None] * D + k[None, :], mask=a_mask, other=0.0)
        b_mask = (k < D)[:, None] & (n < N)[None, :]
        b_at = w + expert * w_stride + n[None, :] * D + k[:, None]
        b = tl.load(b_at, mask=b_mask, other=0.0)
        acc = tl.dot(a, b, acc)
    y_mask = real[:, None] & (n < N)[None, :]
    y_at = y + row[:, None] * N + n[None, :]
    tl.store(y_at, acc.to(y.dtype.element_ty), mask=y_mask)
    # END SOLUTION


def grouped_gemm(
    x: Tensor,
    w: Tensor,
    token: Tensor,
    tile_expert: Tensor,
    tile_first: Tensor,
    tile_rows: Tensor,
    block: int,
) -> Tensor:
    """[R, N], row r is w[expert of r] @ x[token[r]]; x [T, D], w [E, N, D]."""
    rows, width, columns = len(token), x.shape[1], w.shape[1]
    y = torch.empty(rows, columns, dtype=x.dtype)
    # Launch the kernel here: y is its result.
    # BEGIN SOLUTION
    grid = (len(tile_expert), triton.cdiv(columns, 64))
    grouped_gemm_kernel[grid](
        x, w, token, tile_expert, tile_first, tile_rows, y,
        width, columns, w.stride(0),
        BM=block, BN=64, BK=32,
    )  # fmt: skip
    return y
    # END SOLUTION


# %%
check("05.5", grouped_gemm)

# %% [markdown]
# ## 05.6 The combine, without atomics
#
# {meta 05.6}
#
# Token `t` gets the sum over `k` of `weights[t, k] · y[inverse[t, k]]`, with the rows `y` [R, D] of the experts,
# sorted as in 05.2, and its `inverse` [T, K]. Rows of a token are far apart, so it is tempting to let each row add
# itself to its token by an atomic. Floating-point addition depends on its order, and the order of atomics on the
# weather: two runs would differ. Let a program own its output and add for `k = 0, 1, ...`, in this order, in float32.
#
# A slot with the inverse -1 was skipped: it contributes exactly 0, whatever `weights` holds there. A token may have
# lost all its slots. The result [T, D] has the type of `y`, float32 or float16; `weights` are float32.


# %% tags=["05.6"]
@triton.jit
def combine_kernel(y, inverse, weights, out, D, K: tl.constexpr, BLOCK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    # Your code here.
    # BEGIN SOLUTION
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for k in range(K):
        row = tl.load(inverse + t * K + k).to(tl.int64)
        chosen = row >= 0
        weight = tl.load(weights + t * K + k, mask=chosen, other=0.0)
        mask = chosen & (column < D)
        value = tl.load(y + row * D + column, mask=mask, other=0.0)
        acc += weight * value.to(tl.float32)
    tl.store(out + t * D + column, acc.to(out.dtype.element_ty), mask=column < D)
    # END SOLUTION


def combine(y: Tensor, inverse: Tensor, weights: Tensor) -> Tensor:
    """[T, D], the sum over k of weights[t, k] · y[inverse[t, k]], in float32."""
    (tokens, k), width = inverse.shape, y.shape[1]
    out = torch.empty(tokens, width, dtype=y.dtype)
    # Launch the kernel here: out is its result.
    # BEGIN SOLUTION
    grid = (tokens, triton.cdiv(width, 128))
    combine_kernel[grid](y, inverse, weights, out, width, K=k, BLOCK=128)
    return out
    # END SOLUTION


# %%
check("05.6", combine)

# %% [markdown]
# ## Points

# %%
full_marks = total("05")
# BEGIN SOLUTION
assert full_marks, "the solutions must earn full marks"
# END SOLUTION

# %% [markdown]
# ## 05.H Right here, wrong there (graded by hand, not counted above)
#
# A colleague's grouped product passes its test: 128 tokens, 8 experts, 16 rows each, width 256, float32, in the
# interpreter. On a GPU, with a production model's shapes and bfloat16, it is wrong now and then, and slow. In at most
# 250 words: name four reasons why that test could not have told, say for each which input or which tool would have
# shown it, and which one you would look at first. The rubric is on the page [For
# instructors](../book/start/instructors.md).
