# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Exercise 07: The capstone
#
# <div class="page-card">
#
# **You will be able to**
#
# - design a sparse model for a budget of FLOPs, memory and latency, and say with numbers why it is as it is;
# - tell a design that is better from one that was lucky;
# - beat the best dense model of as many FLOPs, on text that you did not train on.
#
# {minutes} · {points} points · Needs: [Compute equivalence](../book/math/compute_equivalence.ipynb),
# [Losses](../book/balancing/losses.ipynb), [The roofline](../book/bandwidth/roofline.ipynb); two CPU cores and an
# evening.
#
# </div>
#
# The first four questions are the tools, the fifth is the work. As before, calls into `moe_course` earn nothing as an
# answer; for trying designs out, the package is yours.
#
# A **design** is a dict of plain numbers and words. Nothing else is handed in: no weights, no logs. What you claim is
# computed again, and what you designed is trained again.
#
# | key | | may be |
# |---|---|---|
# | `width`, `layers`, `heads` | model width D (a multiple of 2 · heads), layers L | 16 to 128, 1 to 6, 1 to 8 |
# | `experts`, `k`, `hidden` | E experts a layer, k per byte, each a gated FFN this wide | 1 to 64, 1 to E, 1 to 1024 |
# | `shared` | width of an FFN that every byte passes besides; 0 for none | 0 to 1024 |
# | `gate` | weights are probabilities, these over their sum, or sigmoids | `"softmax"`, `"renormalised"`, `"sigmoid"` |
# | `cure` | what balances; a bias needs the sigmoid gate | `"loss"`, `"bias"`, `"none"` |
# | `strength` | weight of the balancing loss, or step of the bias | 0 to 100 |
# | `batch`, `steps` | windows of 64 bytes in a step, and steps | 8 to 64, 4 to 20,000 / L |
# | `peak_lr`, `schedule` | and pairs (share of the training, share of `peak_lr`) | 1e-5 to 0.1; 2 to 20 pairs |
# | `weight_decay` | of AdamW, on matrices alone | 0 to 1 |
#
# Every design is a byte-level language model (256 bytes, input embedding and output head of their own), trained on
# prose, C, Python and its manual from [the course's corpus](../book/math/compute_equivalence.ipynb). `experts = 1` is
# a dense model, for comparison.

# %%
from moe_course.grading import check, solution, total

# %% [markdown]
# ## 07.1 What a design stores and uses
#
# {meta 07.1}
#
# Return (stored, used) weights, as exact integers. Stored: an input embedding and an output head of 256 · D each; in
# every layer four D x D matrices of attention, two norm vectors of D, a router of D · E, E experts of three D x
# `hidden` matrices, and three D x `shared` matrices; one more norm at the end. Used by a byte: all of it but the
# experts that it does not choose and the input embedding, of which it looks up one row.
#
# A dense design (`experts` = 1) has no router.


# %% tags=["07.1"]
def parameters(design: dict) -> tuple[int, int]:
    """(stored, used) weights of a design, as integers."""
    d, layers = design["width"], design["layers"]
    # Your code here.
    # BEGIN SOLUTION
    experts = design["experts"]
    one = 3 * d * design["hidden"]
    each = 4 * d * d + 2 * d + 3 * d * design["shared"]
    each += d * experts if experts > 1 else 0
    rest = 256 * d + d + layers * each  # head, last norm
    stored = 256 * d + rest + layers * experts * one
    return stored, rest + layers * design["k"] * one
    # END SOLUTION


# %%
check("07.1", parameters)

# %% [markdown]
# ## 07.2 What a budget buys
#
# {meta 07.2}
#
# Training costs 6 FLOPs for each used weight and byte, and 12 · L · D · context for each byte in attention. A step has
# `batch` windows of `context` bytes. How many whole steps do `flops` pay for? They may also end with the text: its
# windows do not overlap, the byte after a window must be there to be predicted, in each of the `passes` every window
# is read once, and those that do not fill a batch are left out of that pass.


# %% tags=["07.2"]
def steps_within(
    used: int,
    layers: int,
    width: int,
    context: int,
    batch: int,
    flops: int,
    text: int,
    passes: int,
) -> int:
    """The largest number of steps within `flops` and `passes` over the text."""
    # Your code here.
    # BEGIN SOLUTION
    per_byte = 6 * used + 12 * layers * width * context
    windows = (text - 1) // context
    return min(
        flops // (per_byte * batch * context),
        passes * (windows // batch),
    )
    # END SOLUTION


# %%
check("07.2", steps_within)

# %% [markdown]
# ## 07.3 A schedule that is data
#
# {meta 07.3}
#
# A schedule is a list of points (share of the training, share of the peak), from share 0 to share 1, with straight
# lines between them. Step 0, 1, ... of `steps` stands at share (step + 1) / steps. Return its learning rate.


# %% tags=["07.3"]
def learning_rate(
    step: int, steps: int, peak: float, schedule: list[tuple[float, float]]
) -> float:
    """The learning rate of one step."""
    at = (step + 1) / steps
    # Your code here.
    # BEGIN SOLUTION
    x0, y0 = [point for point in schedule if point[0] < at][-1]
    x1, y1 = next(point for point in schedule if point[0] >= at)
    return peak * (y0 + (y1 - y0) * (at - x0) / (x1 - x0))
    # END SOLUTION


# %%
check("07.3", learning_rate)

# %% [markdown]
# ## 07.4 Better, or lucky?
#
# {meta 07.4}
#
# You have trained a dense model and some candidates with several seeds. `dense` maps a seed to the loss in bits per
# byte; each candidate is a dict with `name`, `bits` (a map like `dense`), `flops`, `state_bytes` and `dead_experts`. A
# seed orders the text, so losses of one seed belong together: its *gain* is the dense loss minus the candidate's.
# Return the name of the candidate with the largest mean gain, over the seeds that it shares with the dense model,
# among those
#
# - with `flops` and `state_bytes` not above the two limits, no dead experts, and at least three shared seeds,
# - whose mean gain is above three times its standard error, $s / \sqrt n$ with $s$ the sample standard deviation (over
#   n - 1) of the n gains. A run that diverged has an infinite loss; its candidate is out.
#
# Of equal ones the first; `"dense"` where none is left.


# %% tags=["07.4"]
def choose(
    dense: dict[int, float],
    candidates: list[dict],
    flops: int,
    state_bytes: int,
) -> str:
    """The name of the best candidate that is no luck, or "dense"."""
    best, name = 0.0, "dense"
    # Your code here.
    # BEGIN SOLUTION
    for one in candidates:
        gains = [dense[s] - bits for s, bits in one["bits"].items() if s in dense]
        n = len(gains)
        if n < 3 or one["dead_experts"]:
            continue
        if one["flops"] > flops or one["state_bytes"] > state_bytes:
            continue
        mean = sum(gains) / n
        variance = sum((gain - mean) ** 2 for gain in gains) / (n - 1)
        # After an infinite loss both are no numbers, and compare false.
        if mean > 3 * (variance / n) ** 0.5 and mean > best:
            best, name = mean, one["name"]
    return name
    # END SOLUTION


# %%
check("07.4", choose)

# %% [markdown]
# ## 07.5 The design
#
# {meta 07.5}
#
# Return a design within these limits, and the numbers that it rests on:
#
# | limit | |
# |---|---|
# | training | 8 · 10¹¹ FLOPs, counted as in 07.2, and at most 2 passes over 4,000,000 bytes of text |
# | memory | 4,000,000 bytes of training state: 16 for each stored weight |
# | latency | a decode step takes at most 0.6 ms at batch 1, and 4 ms at batch 64 |
# | sparse | at most half of the experts work on a byte; those that do are together at least as wide as `shared` |
#
# Latency is that of a made-up device: 0.2 GB/s and 2 GFLOP/s. A step of B sequences reads, in 4 bytes each, min(B, 256)
# rows of the input embedding, the expected number of different experts in each layer ([distinct
# experts](../book/bandwidth/roofline.ipynb)), and everything else once. It computes 2 FLOPs for each used weight and
# sequence, and takes the longer of the two times; there is no cache.
#
# **What it is measured against.** The check trains your design with a quarter of its steps (the schedule shrinks with
# them), with a seed that you do not know, and asks for
#
# - a loss of at most 3.050 bits per byte, the mean over the four domains' held-out text,
# - in every layer a max violation of at most 2.5 on held-out text, and no dead expert (at most 1 % of an even share).
#
# *The record behind it* (`moe_course/data/records/capstone.json`, a quarter of the budget; on the page of all
# [measurements](../book/reference/measurements.ipynb)): the best dense model of 19 shapes and learning rates has width
# 24, one layer and a hidden width of 128; over five seeds its loss is 3.116 ± 0.013 (standard deviation). Five quite
# different sparse designs, five seeds each, have mean losses from 2.881 to 2.972, each with a deviation below 0.025.
# The bar is 2 % below the dense mean: more than three deviations from either side. `python -m
# moe_course.training.capstone` makes it again.
#
# **What you claim.** Under the key `"claims"`, a dict of the reasons for your design, as numbers:
#
# | claim | |
# |---|---|
# | `stored_params`, `used_params` | as in 07.1 |
# | `training_flops` | of all `steps` |
# | `stored_per_used` | FFN weights stored, routed and shared, over those that a byte uses; no router |
# | `experts_read_at_16` | expected number of different experts of a layer in a batch of 16, all equally popular |
# | `compute_bound_from` | first batch (1 to 1024) whose decode step computes longer than it reads; 0: none |
# | `held_out_bits` | the loss that you expect the check to measure, to 3 % |
#
# Counts, FLOPs and the batch are exact, the fourth and fifth within 0.1 %. They may be computed in your function.
#
# Here is a design to start from. It breaks a rule, trains for too short a time and at the wrong rate: see what
# `compare` says of it, and of your own. It prints costs and limits, trains with the seeds that you name, each in well
# under a minute on a quiet core, and keeps what it has in `capstone_runs`: stopped, the same call goes on; done, it
# reads.

# %%
from moe_course.training import capstone

example = {
    "width": 32,
    "layers": 1,
    "heads": 1,
    "experts": 4,
    "k": 4,
    "hidden": 32,
    "shared": 0,
    "gate": "renormalised",
    "cure": "loss",
    "strength": 0.01,
    "batch": 8,
    "steps": 1000,
    "peak_lr": 0.002,
    "schedule": [(0.0, 0.0), (0.1, 1.0), (1.0, 0.1)],
    "weight_decay": 0.1,
}

# %%
# Take a # away: a quarter of the steps, as in the check; then the whole.
# capstone.compare(example, seeds=(0, 1))
# capstone.compare(example, part=1)


# %% tags=["07.5"]
def recipe() -> dict:
    """A design, and under the key "claims" the numbers that it rests on."""
    # Your code here.
    # BEGIN SOLUTION
    design = example | {
        "experts": 32,
        "k": 2,
        "batch": 16,
        "peak_lr": 0.012,
        "schedule": [(0.0, 0.0), (0.1, 1.0), (0.5, 0.7), (1.0, 0.05)],
    }
    stored, used = parameters(design)
    budget = {"flops": 8 * 10**11, "text": 4_000_000, "passes": 2}
    shape = {key: design[key] for key in ("layers", "width", "batch")}
    steps = steps_within(used, context=64, **shape, **budget)
    design["steps"] = steps
    per_byte = 6 * used + 12 * design["layers"] * design["width"] * 64

    def distinct(batch: int) -> float:
        return 32 * (1 - (1 - 2 / 32) ** batch)

    def compute_bound(batch: int) -> bool:
        one = 3 * design["width"] * design["hidden"]
        read = used + (distinct(batch) - 2) * one
        read += min(batch, 256) * design["width"]
        return 2 * used * batch / 2e9 > 4 * read / 0.2e9

    claims = {
        "stored_params": stored,
        "used_params": used,
        "training_flops": steps * design["batch"] * 64 * per_byte,
        "stored_per_used": 32 / 2,
        "experts_read_at_16": distinct(16),
        "compute_bound_from": next(filter(compute_bound, range(1, 1025)), 0),
        "held_out_bits": 2.92,
    }
    return design | {"claims": claims}
    # END SOLUTION


# %%
check("07.5", recipe)

# %% [markdown]
# ## Points

# %%
full_marks = total("07")
# BEGIN SOLUTION
assert full_marks, "the solutions must earn full marks"
# END SOLUTION

# %% [markdown]
# ## 07.H The defence (graded by hand, not counted above)
#
# Your design goes before a board. In at most 300 words, with the numbers of your own runs: what did you try, in which
# order, and which change was worth how much, on how many seeds? Then answer two of its members. One says: *"Your model
# stores several times as many weights. A dense model with that many would be better still."* The other: *"At four times
# the budget the dense model will have caught up."* Say what your numbers show, what they do not, and which run would
# settle it. The rubric is on the page [For instructors](../book/start/instructors.md).
