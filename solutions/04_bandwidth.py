# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Exercise 04: Bandwidth and systems
#
# <div class="page-card">
#
# **You will be able to**
#
# - say how long a step takes at least, what it waits for, and from which batch on another model is faster;
# - count what fits: weights with their scales, caches, and what crosses between ranks;
# - place experts so that nobody waits for one full rank.
#
# {minutes} · {points} points · Needs: [The roofline](../book/bandwidth/roofline.ipynb),
# [Expert parallelism](../book/bandwidth/expert_parallel.ipynb) and [Quantised
# experts](../book/bandwidth/quantised.ipynb).
#
# </div>
#
# As before: fill in the functions, run the cell under each. Sizes are random, odd and empty ones included. The
# conventions here are not those of the package, so read them twice; calls into `moe_course` earn nothing. Where a
# number is asked for, return a plain Python one. GB are $10^9$ bytes, GiB are $2^{30}$.
#
# Letters are those of the course: `B` sequences in a batch, `E` experts, `k` or `K` experts per token, `R` ranks, `T`
# tokens. Decoding gives each sequence one more token, so a step of batch `B` computes `B` tokens.

# %%
import torch
from torch import Tensor

from moe_course.grading import check, solution, total

# %% [markdown]
# ## 04.1 A step, kernel by kernel
#
# {meta 04.1}
#
# The roofline of a step lets all of its memory traffic overlap with all of its arithmetic. A GPU cannot: kernels run
# one after another, and only within a kernel do the two overlap. Before each kernel, `launch_us` microseconds pass in
# which nothing happens. `kernels` lists (FLOPs, bytes) of each; the rates are given as data sheets print them,
# `tflops` in $10^{12}$ FLOP/s and `gb_s` in $10^9$ bytes/s. Return
#
# - the seconds that the step takes, and
# - where most of them go: `"memory"`, into kernels whose traffic takes at least as long as their arithmetic;
#   `"compute"`, into the other kernels; or `"launch"`. Of equal ones, the first in this order. So a step without
#   kernels takes 0 seconds, and that is `"memory"`.
#
# *Worked example.* At 100 TFLOP/s, 1000 GB/s and 10 µs, `[(2e9, 4e6), (1e8, 3e7)]` takes 20 µs of arithmetic (its 4 µs
# of traffic are hidden), then 30 µs of traffic, and 2 · 10 µs for launching: 70 µs, most of it memory. What would the
# roofline of the whole step have said?


# %% tags=["04.1"]
def step_time(
    kernels: list[tuple[float, float]],
    tflops: float,
    gb_s: float,
    launch_us: float,
) -> tuple[float, str]:
    """(seconds, "memory", "compute" or "launch") of (FLOPs, bytes) kernels."""
    spent = {"memory": 0.0, "compute": 0.0, "launch": 0.0}
    # Your code here.
    # BEGIN SOLUTION
    for flops, size in kernels:
        compute, memory = flops / (tflops * 1e12), size / (gb_s * 1e9)
        spent["memory" if memory >= compute else "compute"] += max(memory, compute)
        spent["launch"] += launch_us * 1e-6
    # max returns the first of equal ones.
    return sum(spent.values()), max(spent, key=lambda what: spent[what])
    # END SOLUTION


# %%
check("04.1", step_time)

# %% [markdown]
# ## 04.2 How many experts a batch reads
#
# {meta 04.2}
#
# A server has logged how popular the experts of a layer are, by domain: `shares[g][e]` is expert `e`'s share of the
# **assignments** of domain `g`. A row sums to 1. Each token makes `k` assignments, to `k` different experts, so no
# share is above $1/k$. Tokens choose independently of each other.
#
# A step computes `tokens[g]` tokens of each domain. How many different experts does it read, on average?
#
# *Worked example.* One domain, 4 experts with a share of 0.25 each, `k` = 2: a token has an expert among its two with
# chance 0.5. Three tokens all miss it with chance $0.5^3$, so $4 \cdot (1 - 0.125) = 3.5$ experts are read. Not 6,
# which is more than there are; nor $4 \cdot (1 - 0.75^6) = 3.29$, which lets a token choose the same expert twice.


# %% tags=["04.2"]
def experts_read(shares: list[list[float]], tokens: list[int], k: int) -> float:
    """Expected number of different experts; shares [G][E], tokens [G]."""
    # Your code here.
    # BEGIN SOLUTION
    expected = 0.0
    for of_expert in zip(*shares, strict=True):
        missed = 1.0
        for share, count in zip(of_expert, tokens, strict=True):
            missed *= (1 - k * share) ** count
        expected += 1 - missed
    return expected
    # END SOLUTION


# %%
check("04.2", experts_read)

# %% [markdown]
# ## 04.3 Who leads, and from which batch on
#
# {meta 04.3}
#
# "A sparse model pays off at large batches." Let us see. Two models, `a` and `b`, each described by
#
# | key | |
# |---|---|
# | `fixed_bytes` | read once in every step: everything but the routed experts |
# | `experts`, `k`, `expert_bytes` | routed experts, how many a token uses, bytes of one (all layers together) |
# | `cache_bytes` | read for every sequence of the batch |
# | `flops` | computed for every sequence of the batch |
#
# A step takes the longer of two times: the bytes that it reads over `bandwidth`, and the FLOPs over `flop_rate`. Of
# the experts it reads the expected number of different ones, each chosen equally often. A dense model has 0 experts.
#
# Return who leads, from batch 1 up to and including `most`: a list of (first batch, `"a"` or `"b"`), one entry for
# each new leader. The first entry is that of batch 1. Who leads stays in the lead until the other is really faster: a
# tie changes nothing. At batch 1, a tie is `"a"`'s.
#
# How many entries does a model of 47 billion weights, 13 billion of them active, have against a dense one of 30
# billion?


# %% tags=["04.3"]
def leaders(
    a: dict[str, float],
    b: dict[str, float],
    bandwidth: float,
    flop_rate: float,
    most: int,
) -> list[tuple[int, str]]:
    """[(first batch, "a" or "b"), ...], one entry for each new leader."""

    def seconds(model: dict[str, float], batch: int) -> float:
        """The time of one step."""
        # Your code here.
        # BEGIN SOLUTION
        read = model["fixed_bytes"] + batch * model["cache_bytes"]
        if experts := model["experts"]:
            distinct = experts * (1 - (1 - model["k"] / experts) ** batch)
            read += distinct * model["expert_bytes"]
        return max(read / bandwidth, batch * model["flops"] / flop_rate)
        # END SOLUTION

    # BEGIN SOLUTION
    found = [(1, "b" if seconds(b, 1) < seconds(a, 1) else "a")]
    # Any batch may bring a change: a search by halves would see one at most.
    for batch in range(2, most + 1):
        lead = seconds(b, batch) - seconds(a, batch)  # that of a
        faster = "a" if lead > 0 else "b"
        if lead != 0 and faster != found[-1][1]:
            found.append((batch, faster))
    return found
    # END SOLUTION


# %%
check("04.3", leaders)

# %% [markdown]
# Mixtral 8x7B in 16 bits against such a dense model, on an A100:

# %%
mixtral = {
    "fixed_bytes": 3.2e9,
    "experts": 8,
    "k": 2,
    "expert_bytes": 11.27e9,
    "cache_bytes": 0,
    "flops": 25.5e9,
}
dense = {
    "fixed_bytes": 60e9,
    "experts": 0,
    "k": 0,
    "expert_bytes": 0,
    "cache_bytes": 0,
    "flops": 60e9,
}
print(leaders(mixtral, dense, bandwidth=2.039e12, flop_rate=312e12, most=1000))

# %% [markdown]
# ## 04.4 How many sequences fit
#
# {meta 04.4}
#
# Weights and caches are split evenly over `devices`, each with `device_gb` GB, of which `reserve_gib` GiB are kept
# free for all else. (Data sheets print GB, tools GiB.) The model has `params` weights of `weight_bits` bits, scales
# included, and caches numbers of `cache_bits` bits. A layer caches for each token
#
# - with `{"kind": "gqa", "heads": ..., "kv_heads": ..., "head_dim": ...}` a key and a value for each key-value head;
# - with `{"kind": "mla", "heads": ..., "head_dim": ..., "kv_rank": ..., "rope_dim": ...}` one latent of `kv_rank`
#   numbers, from which all heads make their keys and values, and one rotary key of `rope_dim`, which they share.
#
# Of the `layers`, `windowed` look at the last `window` tokens alone, and cache no more than these. How many sequences
# of `context` tokens fit? 0 where the weights alone do not. Bytes are exact here: what just fits, fits.


# %% tags=["04.4"]
def sequences_that_fit(
    attention: dict[str, str | int],
    layers: int,
    windowed: int,
    window: int,
    context: int,
    params: int,
    weight_bits: float,
    cache_bits: int,
    devices: int,
    device_gb: int,
    reserve_gib: int,
) -> int:
    """Sequences of `context` tokens whose caches fit beside the weights."""
    # Your code here.
    # BEGIN SOLUTION
    if attention["kind"] == "gqa":
        numbers = 2 * attention["kv_heads"] * attention["head_dim"]
    else:
        numbers = attention["kv_rank"] + attention["rope_dim"]
    kept = (layers - windowed) * context + windowed * min(context, window)
    each = numbers * kept * cache_bits / 8
    free = devices * (device_gb * 10**9 - reserve_gib * 2**30)
    free -= params * weight_bits / 8
    return max(0, int(free // each))
    # END SOLUTION


# %%
check("04.4", sequences_that_fit)

# %% [markdown]
# ## 04.5 Four bits, with their scales
#
# {meta 04.5}
#
# Store `weight` [N, D] in four bits. Formats differ in details, and who mixes them up reads noise. This one:
#
# - Groups run along a row, `group` numbers each; the last group of a row may be shorter, and is not padded.
# - A group's scale is its largest magnitude over 7, stored as float16. Each number becomes the integer nearest to
#   `weight / scale`, from -7 to 7; in a group of zeros all integers are 0, and so is the scale.
# - An integer is stored as 4 bits without sign, with 8 added: 0 is 8, and 7 is 15.
# - Two share a byte, the first of them in its **high** half. Where `D` is odd, the last byte of a row ends in an 8.
#
# Return the bytes, uint8 [N, ⌈D/2⌉]; the scales, float16 [N, ⌈D/group⌉]; and the **bits that a weight really costs**:
# all that is stored, scales and fillings included, over the number of weights. `weight` is float32 or bfloat16, `N`
# and `D` are at least 1; compute in float32, bfloat16 has 8 bits of precision.
#
# *Worked example.* `[[0.7, -0.1, 0.35]]` in groups of 2: the scales are 0.1 and 0.05, the integers 7 and -1, then 7.
# Stored are the bytes `0xF7` and `0xF8`, and 2 scales of 16 bits: 48 bits for 3 weights, 16 each. How many are they in
# groups of 128, of a matrix that is not tiny? And what does a model of 46.7 billion weights take then, in GB?


# %% tags=["04.5"]
def quantise4(weight: Tensor, group: int) -> tuple[Tensor, Tensor, float]:
    """(bytes [N, ceil(D/2)], scales [N, ceil(D/group)], bits a weight)."""
    # Your code here.
    # BEGIN SOLUTION
    wide = weight.float()
    scales = [part.abs().amax(1) / 7 for part in wide.split(group, dim=1)]
    scales = torch.stack(scales, dim=1).half()
    of_each = scales.float().repeat_interleave(group, dim=1)[:, : wide.shape[1]]
    ratio = torch.where(of_each == 0, 0, wide / of_each)
    codes = ratio.round().clamp(-7, 7) + 8
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1), value=8)
    codes = codes.to(torch.uint8)
    packed = (codes[:, ::2] << 4) | codes[:, 1::2]
    bits = 8 * (packed.nbytes + scales.nbytes) / weight.numel()
    return packed, scales, bits
    # END SOLUTION


# %%
check("04.5", quantise4)

# %% [markdown]
# ## 04.6 Who sends what to whom
#
# {meta 04.6}
#
# Experts live on ranks: `rank_of` [E] says which on which, in any order. `expert_ids[i]` [T_i, K] holds the choices of
# the tokens of rank `i`, int32 or int64; a rank may have no tokens, and an id of -1 is a choice that was dropped.
# Before tokens travel, the ranks agree on how many rows come: the split sizes of the all-to-all. A token's row goes
# **once** to each rank that holds any of its experts, however many of them live there. Return, all int64:
#
# - `sent` [R, R]: entry `[i, j]` is the number of rows that rank `i` hands over for rank `j`, itself included;
# - `received` [R, R]: entry `[i, j]` is the number of rows that rank `i` gets from rank `j`;
# - `leaving` [R]: the bytes that really leave rank `i`, at `row_bytes` a row.


# %% tags=["04.6"]
def split_sizes(
    expert_ids: list[Tensor], rank_of: Tensor, row_bytes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(sent [R, R], received [R, R], leaving [R]); R = len(expert_ids)."""
    ranks = len(expert_ids)
    sent = torch.zeros(ranks, ranks, dtype=torch.int64)
    # Your code here.
    # BEGIN SOLUTION
    for i, ids in enumerate(expert_ids):
        for j in range(ranks):
            # -1 would read the last entry of rank_of: it counts nowhere.
            there = (ids >= 0) & (rank_of[ids] == j)  # [T, K]
            sent[i, j] = there.any(dim=1).sum()
    leaving = (sent.sum(dim=1) - sent.diagonal()) * row_bytes
    return sent, sent.T.clone(), leaving
    # END SOLUTION


# %%
check("04.6", split_sizes)

# %% [markdown]
# ## 04.7 Where experts live
#
# {meta 04.7}
#
# `loads[b][e]` is what expert `e` had to do in batch `b`; `loads` are past batches, and the next ones will be like
# them. Put each expert on a rank, the same number on each of the `ranks` (which divides the number of experts), and
# return the rank of each. In every batch all ranks wait for the fullest, so the *cost* of a placement is the sum over
# batches of the largest load of a rank.
#
# Who adds up the batches first cannot see what matters: experts that are hot at the same time must be apart. In `loads
# = [[8, 8, 0, 0], [0, 0, 8, 8]]` all have the same sum. With experts 0 and 1 on one rank the cost is 32; with 0 and 2
# it is 16.
#
# Nobody knows a fast way to the best placement, so you need not find it. The check asks for a cost of at most
#
# - **1.3** times the least, which it finds by trying all, for up to 10 experts; and 1.3 times what no placement can go
#   below for 24 experts on 6 ranks, which have over 4 million million placements. A greedy rule that looks at each
#   batch does that;
# - **1.08** times the least for up to 9 experts where such a greedy rule falls into its traps: mend its result by
#   exchanging experts. A second is plenty.


# %% tags=["04.7"]
def place(loads: list[list[int]], ranks: int) -> list[int]:
    """The rank of each expert, E/R experts on each; loads [B][E]."""

    # Your code here.
    # BEGIN SOLUTION
    def cost(placed: list[int]) -> int:
        waited = 0
        for batch in loads:
            totals = [0] * ranks
            for load, rank in zip(batch, placed, strict=True):
                totals[rank] += load
            waited += max(totals)
        return waited

    experts = len(loads[0])
    placed = [e % ranks for e in range(experts)]
    least, better = cost(placed), True
    while better:
        better = False
        # Exchanging two experts keeps their number on each rank.
        for a in range(experts):
            for b in range(a):
                placed[a], placed[b] = placed[b], placed[a]
                now = cost(placed)
                if now < least:
                    least, better = now, True
                else:
                    placed[a], placed[b] = placed[b], placed[a]
    return placed
    # END SOLUTION


# %%
check("04.7", place)

# %% [markdown]
# ## Points

# %%
full_marks = total("04")
# BEGIN SOLUTION
assert full_marks, "the solutions must earn full marks"
# END SOLUTION

# %% [markdown]
# ## 04.H Four users, one card (graded by hand, not counted above)
#
# A colleague writes: "We serve four people from one card with 80 GB and 2 TB/s. Mixtral 8x7B in int4 takes 47 / 2 =
# 23.5 GB, so 56 GB are left for caches. But a sparse model pays off only at large batches, and the all-to-all eats the
# rest. I suggest a dense 30B model in int4." In at most 250 words: say what is right and what is wrong, each number
# with its unit and its source, decide, and name the two measurements that could change your mind. The rubric is on the
# page [For instructors](../book/start/instructors.md).
