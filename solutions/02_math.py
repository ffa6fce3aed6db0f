# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Exercise 02: Gates and dispatch
#
# <div class="page-card">
#
# **You will be able to**
#
# - write the two gates that most models use, with their ties and their gradients;
# - compute a sparse layer by sorting, without copying weights, and find the bugs that others shipped;
# - count the FLOPs of a sparse layer, forward and in training.
#
# {minutes} · {points} points · Needs: [Routing](../book/math/routing.ipynb) and
# [Dispatch](../book/math/dispatch.ipynb).
#
# </div>
#
# As in exercise 01: fill in the functions, run the cell under each. Sizes are random, ragged ones included, and there
# may be no tokens at all; types are random too: return the type that you were given. Calls into `moe_course` earn
# nothing here, torch is all you need.
# Letters are those of the course: `T` tokens, `E` experts, `K` or `k` experts per token, `D` width, `F` hidden width,
# `C` capacity.

# %%
import torch
from torch import Tensor

from moe_course.grading import check, solution, total

# %% [markdown]
# ## 02.1 A gate as a matrix
#
# {meta 02.1}
#
# From the router's logits [T, E], make the gate matrix [T, E] of a model like Mixtral: in each row the `k` largest
# logits are kept and their weights are the softmax **over the kept ones**; everything else is 0. Among equal logits
# the lowest expert is kept. That is the same decision that `moe_course.layers` returns as ids and weights, in another
# layout.


# %% tags=["02.1"]
def gate_matrix(logits: Tensor, k: int) -> Tensor:
    """[T, E] weights: the softmax over each row's k largest logits, 0 elsewhere."""
    # Your code here.
    # BEGIN SOLUTION
    kept = logits.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    weights = logits.gather(1, kept).softmax(dim=-1)
    return torch.zeros_like(logits).scatter(1, kept, weights)
    # END SOLUTION


# %%
check("02.1", gate_matrix)

# %% [markdown]
# ## 02.2 Bias in the selection only
#
# {meta 02.2}
#
# DeepSeek-V3 scores each expert by a sigmoid, adds a bias per expert **to select** the `k` best, and weighs the
# selected ones by their sigmoids **without** the bias, divided by their sum and multiplied by `scale`. Return the
# gate matrix. The scores must pass a gradient to the logits; the bias gets none.


# %% tags=["02.2"]
def biased_gate(logits: Tensor, bias: Tensor, k: int, scale: float) -> Tensor:
    """[T, E] weights of the k experts with the largest sigmoid(logits) + bias; logits [T, E], bias [E]."""
    scores = torch.sigmoid(logits)
    # Your code here.
    # BEGIN SOLUTION
    kept = (scores + bias).sort(dim=-1, descending=True, stable=True).indices[:, :k]
    weights = scores.gather(1, kept)
    weights = scale * weights / weights.sum(dim=-1, keepdim=True)
    return torch.zeros_like(logits).scatter(1, kept, weights)
    # END SOLUTION


# %%
check("02.2", biased_gate)

# %% [markdown]
# ## 02.3 Two bugs in a combine
#
# {meta 02.3}
#
# Experts with a capacity drop tokens. This combine stood in a real code base, slightly shortened:
#
# ```python
# def combine(outputs, weights, keep):              # [T, K, D], [T, K], [T, K] of bool
#     weights = weights * keep
#     weights = weights / weights.sum(-1, keepdim=True)
#     return (weights[:, :, None] * outputs).sum(1)
# ```
#
# It has two bugs. A token that lost one of its two experts gets the other one's output at full weight, as if nothing
# had been dropped, and a token that lost both gets NaN. What should they get? Write it right; the weights of a token
# need not sum to 1. One more trap: the outputs of dropped slots were never computed, so they may hold anything, NaN
# and infinity included. A NaN in a kept slot was computed: it is a bug somewhere else and must stay visible.


# %% tags=["02.3"]
def combine(outputs: Tensor, weights: Tensor, keep: Tensor) -> Tensor:
    """[T, D]: the sum of weight times output over each token's kept slots; dropped ones contribute exactly 0."""
    # Your code here.
    # BEGIN SOLUTION
    outputs = torch.where(keep[:, :, None], outputs, 0)
    return (weights[:, :, None] * outputs).sum(dim=1)
    # END SOLUTION


# %%
check("02.3", combine)

# %% [markdown]
# ## 02.4 Sort by expert
#
# {meta 02.4}
#
# Number the slots row by row: slot `t * K + j` is token `t`'s choice `j`. Return `order` [T·K], the slots sorted by
# expert (those of one expert in their old order), and `offsets` [E + 1], such that `order[offsets[e]:offsets[e + 1]]`
# are the slots of expert `e`. Both int64. An expert may be idle; there may be no tokens.


# %% tags=["02.4"]
def sort_slots(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """(order [T·K], offsets [E + 1]) of the slots in expert_ids [T, K]."""
    flat = expert_ids.flatten()
    # Your code here.
    # BEGIN SOLUTION
    order = flat.argsort(stable=True)
    counts = flat.bincount(minlength=num_experts)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return order, offsets
    # END SOLUTION


# %%
check("02.4", sort_slots)

# %% [markdown]
# ## 02.5 A sorted sparse layer
#
# {meta 02.5}
#
# Compute the layer: $y_t = \sum_j w_{tj} \, \text{FFN}_{e_{tj}}(x_t)$ with SwiGLU experts, $\text{FFN}_e(x) =
# W_{\text{down},e}\,(\text{silu}(W_{\text{gate},e}\,x) \odot W_{\text{up},e}\,x)$. Sort the slots, gather their rows
# of `x`, run each expert on its own rows, weight, and add back to the tokens. Your `sort_slots` may help.
#
# The check measures the largest tensor that you make (`w_up[expert_ids]` would copy a whole matrix for each slot) and
# the FLOPs of your matrix products (every expert on every token would be $E / K$ times the work). The weights of a
# token need not sum to 1.


# %% tags=["02.5"]
def sorted_moe(
    x: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
) -> Tensor:
    """[T, D]; x [T, D], expert_ids and weights [T, K], w_gate and w_up [E, F, D], w_down [E, D, F]."""
    # Your code here.
    # BEGIN SOLUTION
    order, offsets = sort_slots(expert_ids, len(w_up))
    token = order // max(expert_ids.shape[1], 1)
    rows = x[token].split(offsets.diff().tolist())
    outputs = []
    for mine, gate, up, down in zip(rows, w_gate, w_up, w_down, strict=True):
        hidden = torch.nn.functional.silu(mine @ gate.T) * (mine @ up.T)
        outputs.append(hidden @ down.T)
    weighted = torch.cat(outputs) * weights.flatten()[order, None]
    return torch.zeros_like(x).index_add(0, token, weighted)
    # END SOLUTION


# %%
check("02.5", sorted_moe)

# %% [markdown]
# ## 02.6 Dispatch as a tensor
#
# {meta 02.6}
#
# GShard and Switch dispatch with one einsum: a tensor [T, E, C] holds a 1 where token `t` takes place `c` in the
# buffer of expert `e`. Each token chose one expert, `expert_ids` [T]. Places are given in the order of the tokens; a
# token for which none is left (the expert's buffer holds `capacity`) is dropped: its slice is all 0. Return float32.


# %% tags=["02.6"]
def dispatch_tensor(expert_ids: Tensor, num_experts: int, capacity: int) -> Tensor:
    """[T, E, C] of 0 and 1: which place of which expert each token takes."""
    chosen = torch.nn.functional.one_hot(expert_ids, num_experts)  # [T, E]
    # Your code here.
    # BEGIN SOLUTION
    place = chosen.cumsum(0) - 1  # [T, E]: how many earlier tokens chose the expert
    places = torch.arange(capacity)
    return ((place[:, :, None] == places) & (chosen[:, :, None] == 1)).float()
    # END SOLUTION


# %%
check("02.6", dispatch_tensor)

# %% [markdown]
# ## 02.7 Gradient through the gate
#
# {meta 02.7}
#
# The gate of 02.1 in its compact form: `w = softmax(kept logits)`, [T, K], the largest first. Somebody hands you the
# gradient of the loss in these weights, `grad_weights` [T, K]. Return the gradient in **all** logits, [T, E], in
# closed form (autograd is switched off here).
#
# Before you run the check: what is the gradient for `k = 1`? And what does that say about training a router of this
# kind with one expert per token?


# %% tags=["02.7"]
def gate_gradient(logits: Tensor, k: int, grad_weights: Tensor) -> Tensor:
    """[T, E]: d loss / d logits, given d loss / d w for w = softmax over each row's k largest logits, largest first."""
    kept = logits.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    w = logits.gather(1, kept).softmax(dim=-1)
    # Your code here.
    # BEGIN SOLUTION
    grad_kept = w * (grad_weights - (w * grad_weights).sum(dim=-1, keepdim=True))
    return torch.zeros_like(logits).scatter(1, kept, grad_kept)
    # END SOLUTION


# %%
check("02.7", gate_gradient)

# %% [markdown]
# ## 02.8 FLOPs of a sparse layer
#
# {meta 02.8}
#
# How many FLOPs does one sparse layer spend on `tokens` tokens? Count the matrix products only: the router (`width` x
# `experts`), `k` selected and `shared` shared SwiGLU experts of hidden width `hidden`. 2 FLOPs per weight and token
# in the forward pass; with `training=True`, forward and backward together.


# %% tags=["02.8"]
def layer_flops(
    width: int,
    hidden: int,
    experts: int,
    k: int,
    shared: int,
    tokens: int,
    training: bool,
) -> int:
    """FLOPs of the matrix products of one sparse layer."""
    # Your code here.
    # BEGIN SOLUTION
    weights_met = width * experts + (k + shared) * 3 * width * hidden
    return 2 * weights_met * tokens * (3 if training else 1)
    # END SOLUTION


# %%
check("02.8", layer_flops)

# %% [markdown]
# ## Points

# %%
full_marks = total("02")
# BEGIN SOLUTION
assert full_marks, "the solutions must earn full marks"
# END SOLUTION

# %% [markdown]
# ## 02.H Explain a bug report (graded by hand, not counted above)
#
# A user writes: "After I switched the gate from softmax-then-top-k to top-k-then-softmax, the router of my top-1
# model no longer learns. With top-2 everything is fine. Is this a bug in your library?" Answer in at most 200 words:
# is it a bug, why does it happen at top-1 and not at top-2, and what should they do? The rubric is on the page [For
# instructors](../book/start/instructors.md).
