# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Exercise 03: Balancing a router
#
# <div class="page-card">
#
# **You will be able to**
#
# - write the losses, the capacity and the bias that keep experts busy, with the gradients that they have and those
#   that they have not;
# - read a table of loads, layer by layer, and name what is the matter;
# - cure a router that collapses, and show on new data that it is cured.
#
# {minutes} · {points} points · Needs: [Collapse](../book/balancing/collapse.ipynb),
# [Losses](../book/balancing/losses.ipynb) and [Capacity](../book/balancing/capacity.ipynb).
#
# </div>
#
# As before: fill in the functions, run the cell under each. Sizes are random, ragged ones included, and there may be no
# tokens at all; types are random too: return the type that you were given, unless the text says otherwise. Calls into
# `moe_course` earn nothing here, torch is all you need.
# Letters are those of the course: `T` tokens, `E` experts, `K` or `k` experts per token, `L` layers, `D` width.

# %%
import torch
from torch import Tensor

from moe_course.grading import check, solution, total

# %% [markdown]
# ## 03.1 The load-balancing loss
#
# {meta 03.1}
#
# From the router's logits [T, E] and the experts that were chosen, `expert_ids` [T, K], compute
#
# $$E \sum_e f_e P_e \qquad P_e = \frac{1}{T} \sum_t \text{softmax}(l_t)_e$$
#
# where $f_e$ counts the assignments to expert $e$: divided by $T \cdot K$ with `divide_by_k=True`, and by $T$ alone
# with `divide_by_k=False`, as `transformers` does it. The ids are given: do not choose again. 0 where there are no
# tokens.
#
# Before you run the check: is 1 the least that this loss can be? Try two experts and four tokens, three of them
# undecided ($p = 0.5$ for both) and served by expert 0, and one certain of expert 1.


# %% tags=["03.1"]
def switch_loss(
    logits: Tensor,
    expert_ids: Tensor,
    divide_by_k: bool,
) -> Tensor:
    """E · sum over e of f_e · P_e; logits [T, E], expert_ids [T, K]."""
    tokens, experts = logits.shape
    # Your code here.
    # BEGIN SOLUTION
    counts = expert_ids.flatten().bincount(minlength=experts)
    served = expert_ids.numel() if divide_by_k else tokens
    f = counts.to(logits.dtype) / max(served, 1)
    p = logits.softmax(dim=-1).sum(dim=0) / max(tokens, 1)
    return experts * (f * p).sum()
    # END SOLUTION


# %%
check("03.1", switch_loss)

# %% [markdown]
# ## 03.2 Even importance
#
# {meta 03.2}
#
# The first balancing loss of sparse layers looks at weights, not counts. The importance of an expert is the sum of the
# gate weights with which it serves, and the loss is the squared coefficient of variation of the `num_experts`
# importances: their variance (divide by E) over the square of their mean. An expert that serves nobody has importance
# 0, and counts.
#
# The loss does not change when all weights shrink to a billionth, so there is no room for an epsilon. But where all
# importances are 0, for want of tokens or because every weight is 0, it is 0, and its gradient holds no NaN.


# %% tags=["03.2"]
def importance_cv2(
    expert_ids: Tensor,
    weights: Tensor,
    num_experts: int,
) -> Tensor:
    """CV² of the importances, a scalar; expert_ids, weights [T, K]."""
    importance = weights.new_zeros(num_experts)
    # Your code here.
    # BEGIN SOLUTION
    ids = expert_ids.flatten()
    importance = importance.index_add(0, ids, weights.flatten())
    mean = importance.mean()
    variance = (importance - mean).square().mean()
    if mean == 0:
        return 0 * variance
    return variance / mean.square()
    # END SOLUTION


# %%
check("03.2", importance_cv2)

# %% [markdown]
# ## 03.3 The z-loss
#
# {meta 03.3}
#
# Mean over tokens of $\left(\log \sum_e e^{l_e}\right)^2$. Compute in float32, or in float64 where the logits are
# float64, and return that type: logits in float16 square beyond what the type holds. Logits of 1000 occur, too, and
# logits of minus infinity, which forbid an expert. No tokens: 0.


# %% tags=["03.3"]
def router_z_loss(logits: Tensor) -> Tensor:
    """Mean over tokens of logsumexp squared, a scalar, in float32 or better."""
    # Your code here.
    # BEGIN SOLUTION
    if logits.dtype != torch.float64:
        logits = logits.float()
    z = logits.logsumexp(dim=-1)
    return z.square().sum() / max(len(z), 1)
    # END SOLUTION


# %%
check("03.3", router_z_loss)

# %% [markdown]
# ## 03.4 Who fits in
#
# {meta 03.4}
#
# Each expert takes at most `capacity` assignments. They are served in the order of the tokens, and those of one token
# in the order of its choices; what comes too late is dropped. `real` [T] is False for padding, which is never kept and
# takes nobody's place. Return a mask [T, K] of bool: True where an assignment is kept.
#
# The check also puts your mask into a combine: what is dropped contributes exactly 0, also where a token loses all that
# it had.


# %% tags=["03.4"]
def kept_slots(
    expert_ids: Tensor, num_experts: int, capacity: int, real: Tensor
) -> Tensor:
    """[T, K] of bool: which assignments fit; expert_ids [T, K], real [T]."""
    # Your code here.
    # BEGIN SOLUTION
    wanted = real[:, None].expand_as(expert_ids).flatten()  # [T·K]
    chosen = torch.nn.functional.one_hot(expert_ids.flatten(), num_experts)
    chosen = chosen * wanted[:, None]  # [T·K, E]
    before = chosen.cumsum(dim=0) - chosen  # earlier assignments to each expert
    place = before.gather(1, expert_ids.flatten()[:, None]).squeeze(1)
    return (wanted & (place < capacity)).view(expert_ids.shape)
    # END SOLUTION


# %%
check("03.4", kept_slots)

# %% [markdown]
# ## 03.5 A bias instead of a loss
#
# {meta 03.5}
#
# Route one batch, and say with which bias the next one is to be routed:
#
# - each token is served by the `k` experts with the largest `scores + bias`, the best first, among equal ones the
#   lowest expert first;
# - it weighs them by their scores **without** the bias, divided by their sum;
# - then the bias of an expert with less than the mean load goes up by `step`, that of one with more goes down by
#   `step`, and that of one with exactly the mean stays.
#
# The scores are positive. The weights pass a gradient to them; the bias belongs to no graph.


# %% tags=["03.5"]
def biased_step(
    scores: Tensor, bias: Tensor, k: int, step: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(expert_ids [T, K], weights [T, K], next bias [E]); scores [T, E]."""
    experts = scores.shape[1]
    # Your code here.
    # BEGIN SOLUTION
    order = (scores.detach() + bias).sort(dim=-1, descending=True, stable=True)
    expert_ids = order.indices[:, :k]
    weights = scores.gather(1, expert_ids)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    counts = expert_ids.flatten().bincount(minlength=experts)
    # In integers, E times as large: no rounding near the mean.
    missing = (expert_ids.numel() - experts * counts).sign()
    return expert_ids, weights, bias + step * missing
    # END SOLUTION


# %%
check("03.5", biased_step)

# %% [markdown]
# ## 03.6 Layer by layer
#
# {meta 03.6}
#
# `counts` [L, E] holds the assignments to each expert of each layer. Return, for each layer,
#
# - its max violation, as float64: how far the busiest expert is above the mean load, $\max_e c_e / \bar c - 1$. NaN
#   where a layer has no assignments: about nothing there is nothing to say;
# - its dead experts, as int64: how many have at most 1 % of the mean load.
#
# Expert 3 of one layer has nothing to do with expert 3 of another. What would the sum over layers show of four layers,
# each collapsed onto two experts of its own?


# %% tags=["03.6"]
def load_report(counts: Tensor) -> tuple[Tensor, Tensor]:
    """(max violation [L], dead experts [L]); counts [L, E] of int64."""
    # Your code here.
    # BEGIN SOLUTION
    load = counts.double()
    mean = load.mean(dim=1)  # [L]
    violation = load.max(dim=1).values / mean - 1
    dead = (load <= 0.01 * mean[:, None]).sum(dim=1)
    return violation, dead
    # END SOLUTION


# %%
check("03.6", load_report)

# %% [markdown]
# ## 03.7 A diagnosis
#
# {meta 03.7}
#
# A run logs the assignments of its last batch: `counts` [B, L, E], for each of B sequences, L layers and E experts. Let
# the *violation* of a load be that of 03.6, and call a load **uneven** when its violation is above 1: the busiest
# expert has more than twice the mean. Return the first line that fits:
#
# | Answer | where |
# |---|---|
# | `"no tokens"` | no layer has any assignment |
# | `"collapsed"` | the whole batch's load is uneven in every layer |
# | `"some layers"` | it is uneven in at least one layer, not in all |
# | `"dead experts"` | in at least one layer, an expert has at most 1 % of the layer's mean load in the whole batch |
# | `"sequences"` | in at least one layer, at least half of the sequences with assignments there are uneven alone |
# | `"healthy"` | all others |
#
# A layer without assignments is left out everywhere: it is not uneven, it has no dead experts, and "every layer" means
# those that have assignments. Say by eye what is the matter with these runs; then let your function say it.

# %%
runs = {
    "A": [[[9, 7, 8, 8]], [[6, 9, 8, 9]]],
    "B": [[[31, 0, 1, 0]], [[29, 2, 1, 0]]],
    "C": [[[30, 1, 1, 0], [1, 0, 1, 30]], [[28, 2, 1, 1], [0, 1, 0, 31]]],
    "D": [[[30, 1, 0, 1], [8, 8, 8, 8]], [[31, 0, 1, 0], [7, 9, 8, 8]]],
    "E": [[[20, 1, 1, 10], [9, 2, 20, 1]], [[1, 20, 11, 0], [10, 20, 1, 1]]],
    "F": [[[14, 9, 9, 0]], [[11, 12, 9, 0]]],
}


# %% tags=["03.7"]
def diagnose(counts: Tensor) -> str:
    """The word of the table for this load; counts [B, L, E]."""
    # Your code here.
    # BEGIN SOLUTION
    batch = counts.sum(dim=0)  # [L, E]
    used = batch.sum(dim=1) > 0
    counts, batch = counts[:, used], batch[used]
    if not len(batch):
        return "no tokens"
    # A busiest expert above twice the mean: max · E > 2 · sum, in integers.
    experts = batch.shape[1]
    uneven = batch.amax(dim=1) * experts > 2 * batch.sum(dim=1)  # [L]
    if uneven.all():
        return "collapsed"
    if uneven.any():
        return "some layers"
    if (100 * experts * batch <= batch.sum(dim=1, keepdim=True)).any():
        return "dead experts"
    size = counts.sum(dim=2)  # [B, L]
    alone = counts.amax(dim=2) * experts > 2 * size
    if (2 * alone.sum(dim=0) >= (size > 0).sum(dim=0)).any():
        return "sequences"
    return "healthy"
    # END SOLUTION


# %%
check("03.7", diagnose)

# %%
for name, counts in runs.items():
    print(name, diagnose(torch.tensor(counts)))

# %% [markdown]
# ## 03.8 Cure a router
#
# {meta 03.8}
#
# A sparse layer with one expert per token, each expert a matrix:
#
# $$p = \text{softmax}(W x) \qquad e = \text{the lowest id with the largest } p_e + b_e \qquad y = p_e A_e x$$
#
# The tokens come in E kinds, equally many of each, and what is asked of a kind is linear: as many experts as kinds
# could do it. But the router that you are handed leans towards one expert, and trained as below it never gives every
# expert a fair share.
#
# Cure it by whatever means: a loss, a bias, another beginning, a method that nobody has thought of. Return
# `router.detach(), bias, experts.detach()` with shapes [E, D], [E] and [E, D, D]; without need of the bias leave it 0.
# The check computes the layer itself, on new tokens of the same kinds, and asks for both
#
# - a **max violation of at most 0.75**, and
# - a **mean squared error of at most 0.36** times the variance of `y`.
#
# An even load alone is easy and worth nothing: experts that are all alike do not reach the second bar. You have 10
# seconds on one processor; 1 is plenty. `Adam`, the learning rate and the number of steps below are no part of the
# task: change them if you like.


# %% tags=["03.8"]
def train_balanced(
    x: Tensor, y: Tensor, router: Tensor, experts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(router [E, D], bias [E], experts [E, D, D]), trained; x and y [T, D]."""
    router = router.clone().requires_grad_()
    experts = experts.clone().requires_grad_()
    bias = torch.zeros(len(router))
    optimizer = torch.optim.Adam([router, experts], lr=0.02)
    for _ in range(200):
        logits = x @ router.T  # [T, E]
        probs = logits.softmax(dim=-1)
        order = (probs + bias).sort(dim=-1, descending=True, stable=True)
        chosen = order.indices[:, :1]  # [T, 1]
        outputs = torch.einsum("eij,tj->tei", experts, x)  # [T, E, D]
        output = outputs[torch.arange(len(x)), chosen[:, 0]]
        loss = (probs.gather(1, chosen) * output - y).square().mean()
        # Your code here.
        # BEGIN SOLUTION
        loss = loss + switch_loss(logits, chosen, True)
        # END SOLUTION
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # BEGIN SOLUTION
    return router.detach(), bias, experts.detach()
    # END SOLUTION


# %%
check("03.8", train_balanced)

# %% [markdown]
# ## Points

# %%
full_marks = total("03")
# BEGIN SOLUTION
assert full_marks, "the solutions must earn full marks"
# END SOLUTION

# %% [markdown]
# ## 03.H A loss of 1.00 (graded by hand, not counted above)
#
# A colleague reports on a language model with 24 sparse layers of 64 experts, 8 per token: "Our load-balancing loss,
# pooled over all layers and the whole batch, has been 1.00 since step 2000, so the experts are balanced and we can set
# the capacity factor to 1.0." In production, users with long programs complain of poor answers. In at most 250 words:
# name three ways in which a loss of 1.00 and uneven experts go together, say for each what you would log to see it, and
# what you would change first. The rubric is on the page [For instructors](../book/start/instructors.md).
