# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Exercise 06: Fine-tuning
#
# <div class="page-card">
#
# **You will be able to**
#
# - put low-rank adapters on stacked experts, merge them, and say what training them takes;
# - make sure that what you wanted to train is trained, and nothing else: by name, and by what an optimiser does to
#   experts that nobody used;
# - measure how far a router has moved, and turn a dense layer into a sparse one that computes the same.
#
# {minutes} · {points} points · Needs: [LoRA on experts](../book/finetuning/lora.ipynb), [Router
# drift](../book/finetuning/drift.ipynb) and [Upcycling](../book/finetuning/upcycling.ipynb).
#
# </div>
#
# As before: fill in the functions, run the cell under each. Sizes are random, odd and empty ones included; types are
# random too: return the type that you were given. Arguments are not to be changed. The conventions here are not those
# of the package, so read them twice; calls into `moe_course` earn nothing, torch is all you need.
#
# Letters are those of the course: `S` rows (a token and one of its experts each), `E` experts, `K` or `k` experts per
# token, `D` width, `F` hidden width, `T` tokens; `r` is the rank of an adapter.

# %%
import torch
from torch import Tensor

from moe_course.grading import check, solution, total

# %% [markdown]
# ## 06.1 LoRA on stacked experts
#
# {meta 06.1}
#
# The up projections of all experts are one stack, `weight` [E, 2F, D], of which the first F rows of each expert are
# its gate. Their adapters are stacks as well: `a` [E, r, D] and `b` [E, 2F, r]. `x` [S, D] holds the rows sorted by
# expert; `ends` [E] says where those of each expert end, so expert `e` has the rows from `ends[e - 1]` (0 for the
# first) up to, not including, `ends[e]`. Return what goes into the down projection, [S, F]:
#
# $$h = W_e x + \text{scale} \cdot B_e A_e x, \qquad \operatorname{silu}(h_{\text{gate}}) \odot h_{\text{up}}$$
#
# An expert may have no rows. `b` is 0 when training starts: its gradient must not be. The check also counts: no
# $B_e A_e$ is formed, which would cost more than what it adds to a few rows, no row gets a copy of weights for itself,
# and none meets the weights of other experts.


# %% tags=["06.1"]
def expert_hidden(
    x: Tensor, ends: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float
) -> Tensor:
    """[S, F]: silu(gate) * up of rows [S, D] sorted by expert, with LoRA."""
    # Your code here.
    # BEGIN SOLUTION
    parts, first = [], 0
    for e, end in enumerate(ends.tolist()):
        rows = x[first:end]
        # A first: r numbers a row, where B A would be a matrix.
        parts.append(rows @ weight[e].T + scale * (rows @ a[e].T) @ b[e].T)
        first = end
    gate, up = torch.cat(parts).chunk(2, dim=1)
    return torch.nn.functional.silu(gate) * up
    # END SOLUTION


# %%
check("06.1", expert_hidden)

# %% [markdown]
# ## 06.2 Merge what PEFT has trained
#
# {meta 06.2}
#
# PEFT keeps the adapters of a stack as two plain matrices. In `lora_a` [E·r, in] the expert is the **slow** index of
# the rows: first all r rows of expert 0. In `lora_b` [out, r·E] it is the **fast** index of the columns: first the
# columns 0 of all experts, then their columns 1.
#
# Return the merged stack, `weight` [E, out, in] plus `scale` times $B_e A_e$, in the type of `weight`. That may be
# bfloat16, with adapters in float32, as they are trained. Then add in float32 and round once: a $B A$ that is rounded
# before it is added is rounded twice.
#
# *Worked example.* Two experts, rank 2, one input and one output: `lora_a = [[1], [2], [3], [4]]` and `lora_b = [[10,
# 20, 30, 40]]`. Expert 0 has A = (1, 2) and B = (10, 30), so B A = 70; expert 1 has 20 · 3 + 40 · 4 = 220.


# %% tags=["06.2"]
def merged(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """[E, out, in]: weight + scale · B A of each expert, rounded once."""
    # Your code here.
    # BEGIN SOLUTION
    experts = len(weight)
    a = lora_a.unflatten(0, (experts, -1))  # [E, r, in]
    b = lora_b.unflatten(1, (-1, experts)).permute(2, 0, 1)  # [E, out, r]
    # Of bfloat16 and float32, float32 comes out.
    return (weight + scale * (b @ a)).to(weight.dtype)
    # END SOLUTION


# %%
check("06.2", merged)

# %% [markdown]
# ## 06.3 What is really trained
#
# {meta 06.3}
#
# "LoRA only", said the comment over this loop, slightly shortened:
#
# ```python
# for name, parameter in model.named_parameters():
#     if "expert" in name and "lora" not in name:
#         parameter.requires_grad = False
# ```
#
# It froze the experts, and trained attention, router, embeddings and norms as they are. Write what was meant: of the
# parameters' `names`, return those that are trained, in their order; all others are frozen. `lora` and `full` are
# lists of parts. Of a part in `lora` its adapters are trained, of one in `full` its own weights, of one in both all,
# of one in neither nothing. `layers` lists the numbers of the layers in which anything is trained; `None` means all.
#
# A name is a path with dots, such as `model.layers.11.mlp.experts.gate_up_proj`, and may begin with anything. After
# `layers.N.`
#
# | what follows | is part |
# |---|---|
# | `self_attn.` | `"attention"` |
# | `mlp.gate.` | `"router"` |
# | `mlp.experts.` | `"experts"` |
# | `mlp.shared_expert.` or `mlp.shared_expert_gate.` | `"shared"` |
# | all else: norms, the FFNs of dense layers | none |
#
# and what lies outside of layers is no part either; what is no part is never trained. A parameter is an adapter's if a
# step of its path is `lora_A` or `lora_B`.


# %% tags=["06.3"]
def trained_names(
    names: list[str],
    lora: list[str],
    full: list[str],
    layers: list[int] | None,
) -> list[str]:
    """The names of the parameters that are trained, in their order."""
    parts = {
        "self_attn": "attention",
        "mlp.gate": "router",
        "mlp.experts": "experts",
        "mlp.shared_expert": "shared",
        "mlp.shared_expert_gate": "shared",
    }
    trained = []
    # Your code here.
    # BEGIN SOLUTION
    for name in names:
        path = name.split(".")
        if "layers" not in path[:-1]:
            continue
        at = path.index("layers") + 1
        inside = path[at + 1 :]
        # Whole steps of the path: "mlp.gate" is no beginning of "mlp.gate_proj".
        part = parts.get(inside[0]) or parts.get(".".join(inside[:2]))
        wanted = lora if {"lora_A", "lora_B"} & set(path) else full
        if part in wanted and (layers is None or int(path[at]) in layers):
            trained.append(name)
    return trained
    # END SOLUTION


# %%
check("06.3", trained_names)

# %% [markdown]
# ## 06.4 What it takes
#
# {meta 06.4}
#
# "LoRA on an MoE saves nothing: every expert needs its adapters." Count. `shape` describes a decoder:
#
# | key | |
# |---|---|
# | `vocab`, `width`, `tied` | an embedding; the output matrix is the same one (`tied`) or another one |
# | `layers`, `dense_layers` | all layers, and how many of them have a dense FFN in place of experts |
# | `heads`, `kv_heads`, `head_dim` | of attention: query, key, value and output projection, no biases |
# | `experts`, `hidden` | routed experts of a sparse layer and their hidden width |
# | `shared_hidden` | hidden width of its shared expert, without a gate of its own; 0 where there is none |
# | `dense_hidden` | hidden width of a dense layer's FFN |
#
# Every FFN is gated: gate, up and down projection. A sparse layer has a router, one number for each expert and
# dimension. Each layer has two norms of `width` numbers, and there is one more at the end.
#
# `ranks` says which parts get LoRA, and of which rank: `"attention"` (all four projections), `"experts"` or
# `"shared"` (all three of each). A matrix of `in` inputs and `out` outputs gets A [r, in] and B [out, r]. With `joint`,
# gate and up projection of a **routed** expert are one matrix of 2 · `hidden` outputs, and so have one A.
#
# A number that is trained takes 16 bytes: weight and gradient in 16 bits, a float32 copy, two moments. A frozen one
# takes `frozen_bits` bits; round the bytes of all of them up. Return
#
# - how many numbers LoRA trains,
# - the bytes of training with LoRA, the frozen model included,
# - the bytes of training everything, without LoRA.


# %% tags=["06.4"]
def training_bytes(
    shape: dict[str, int],
    ranks: dict[str, int],
    joint: bool,
    frozen_bits: int,
) -> tuple[int, int, int]:
    """(trained numbers, bytes with LoRA, bytes of training everything)."""
    d = shape["width"]
    q = shape["heads"] * shape["head_dim"]
    kv = shape["kv_heads"] * shape["head_dim"]
    # Your code here.
    # BEGIN SOLUTION
    layers, dense = shape["layers"], shape["dense_layers"]
    sparse, experts = layers - dense, shape["experts"]
    attention = [(d, q), (d, kv), (d, kv), (q, d)]

    def ffn(hidden: int) -> list[tuple[int, int]]:
        return [(d, hidden), (d, hidden), (hidden, d)]

    # (inputs, outputs) and how often.
    routed = ffn(shape["hidden"])
    groups = {
        "attention": (attention, layers),
        "experts": (routed, sparse * experts),
        "shared": (ffn(shape["shared_hidden"]), sparse),
        "dense": (ffn(shape["dense_hidden"]), dense),
    }
    total = (2 - shape["tied"]) * shape["vocab"] * d + (2 * layers + 1) * d
    total += sparse * experts * d
    for matrices, times in groups.values():
        total += times * sum(i * o for i, o in matrices)
    if joint:
        groups["experts"] = ([(d, 2 * shape["hidden"]), routed[2]], sparse * experts)
    if not shape["shared_hidden"]:
        groups["shared"] = ([], 0)
    trained = 0
    for part, rank in ranks.items():
        matrices, times = groups[part]
        trained += times * rank * sum(i + o for i, o in matrices)
    frozen = -(-total * frozen_bits // 8)
    return trained, frozen + 16 * trained, 16 * total
    # END SOLUTION


# %%
check("06.4", training_bytes)

# %% [markdown]
# Qwen3-30B-A3B, with rank 16 everywhere but in attention:

# %%
qwen = {
    "vocab": 151936,
    "width": 2048,
    "tied": 0,
    "layers": 48,
    "dense_layers": 0,
    "heads": 32,
    "kv_heads": 4,
    "head_dim": 128,
    "experts": 128,
    "hidden": 768,
    "shared_hidden": 0,
    "dense_hidden": 0,
}
print(training_bytes(qwen, {"experts": 16}, joint=True, frozen_bits=16))

# %% [markdown]
# ## 06.5 How far a router has moved
#
# {meta 06.5}
#
# The same text went through a model before and after tuning. Of one layer you have both choices, `ids_before` and
# `ids_after` [T, K], the best expert first, and the router's logits, [T, E]. An id of `E` is no expert: that choice
# was dropped. A token without any expert **before** is padding and counts nowhere; its logits may be anything, NaN
# included. Return two plain numbers:
#
# - **agreement**: of all experts that tokens had before, the share that the same token still has. Their order does not
#   matter; what was dropped before and after agrees with nothing.
# - **KL**: the mean over tokens of $\sum_e p_e (\ln p_e - \ln q_e)$, with p the probabilities before and q those
#   after. An expert that is forbidden, with a logit of minus infinity both before and after, adds 0.
#
# Two routers that are almost equal have a KL of $10^{-7}$ or less, which is what float32 loses in such a sum: compute
# in float64, whatever the logits come in. Where no token counts, nothing has moved: an agreement of 1.0, a KL of 0.0.
#
# *Worked example.* 4 experts; before `[[0, 1], [2, 4], [4, 4]]`, after `[[1, 3], [4, 2], [0, 1]]`. Three experts
# before: token 0 keeps expert 1, token 1 keeps expert 2, and token 2 is padding. The agreement is 2/3.


# %% tags=["06.5"]
def router_drift(
    ids_before: Tensor,
    ids_after: Tensor,
    logits_before: Tensor,
    logits_after: Tensor,
) -> tuple[float, float]:
    """(agreement, KL) of one layer; ids [T, K], logits [T, E]."""
    experts = logits_before.shape[1]
    # Your code here.
    # BEGIN SOLUTION
    chosen = ids_before < experts
    real = chosen.any(dim=1)
    if not real.any():
        return 1.0, 0.0
    same = ids_before[:, :, None] == ids_after[:, None, :]  # [T, K, K]
    kept = same.any(dim=2) & chosen
    p = logits_before[real].double().log_softmax(dim=1)
    q = logits_after[real].double().log_softmax(dim=1)
    # 0 · (-inf + inf) is NaN: choose, do not multiply.
    each = torch.where(p == -torch.inf, 0, p.exp() * (p - q))
    agreement = kept.sum().item() / chosen.sum().item()
    return agreement, each.sum(dim=1).mean().item()
    # END SOLUTION


# %%
check("06.5", router_drift)

# %% [markdown]
# ## 06.6 Upcycling, with a shared expert
#
# {meta 06.6}
#
# A dense FFN computes $W_{down} (\operatorname{silu}(W_{gate} x) \odot W_{up} x)$, with `gate` and `up` [F, D] and
# `down` [D, F]. Make a sparse layer of it that computes the same for every x, whatever the router chooses:
#
# - The first `shared` of the F hidden numbers become a shared expert. All tokens use it, with weight 1.
# - The others are cut into `pieces` runs of equal length, in order. Of these there are as many copies as `router`
#   [N, D] has rows: N · pieces routed experts, all pieces of copy 0 first.
# - Row `c` of `router` scores copy `c`: all of its pieces get that row, so that they are chosen together.
#
# The layer scores each routed expert with the sigmoid of its logit, takes the k · pieces best, the lowest first among
# equals, and weighs them by their scores **divided by their sum and multiplied by `factor`**, as DeepSeek-V3 does.
# Return all of it:
#
# - `router` [N·pieces, D];
# - `w_up` [N·pieces, 2H, D], gate rows above up rows, and `w_down` [N·pieces, D, H], with H = (F - shared) / pieces;
# - `shared_up` [2·shared, D], built like `w_up`, and `shared_down` [D, shared].
#
# Two corrections are due, both in `w_down`. Which weight does a piece get, if all chosen copies compute the same?


# %% tags=["06.6"]
def upcycled(
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    router: Tensor,
    pieces: int,
    shared: int,
    factor: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(router, w_up, w_down, shared_up, shared_down) of a sparse layer."""
    copies = len(router)
    # Your code here.
    # BEGIN SOLUTION
    gates = gate[shared:].unflatten(0, (pieces, -1))  # [pieces, H, D]
    ups = up[shared:].unflatten(0, (pieces, -1))
    downs = down[:, shared:].unflatten(1, (pieces, -1)).movedim(1, 0)
    return (
        router.repeat_interleave(pieces, dim=0),
        torch.cat([gates, ups], dim=1).repeat(copies, 1, 1),
        # Piece j of all chosen copies together has weight factor / pieces.
        (downs * pieces / factor).repeat(copies, 1, 1),
        torch.cat([gate[:shared], up[:shared]]),
        down[:, :shared].clone(),
    )
    # END SOLUTION


# %%
check("06.6", upcycled)

# %% [markdown]
# ## 06.7 An optimiser that lets idle experts be
#
# {meta 06.7}
#
# Expert weights are one stack, so an expert that no token chose has a gradient of zeros, not none. AdamW moves it all
# the same: weight decay shrinks it, and its first moment carries it on along old gradients. Write a step that lets idle
# experts be. `weight`, `grad`, `m` and `v` have the experts as their first of two or more dimensions; `steps` [E],
# int64, counts the steps in which each took part. For an expert of which some entry of the gradient is not 0:
#
# - count one step more: t; then, for **all** of its entries,
# - m becomes β₁ m + (1 - β₁) g, and v becomes β₂ v + (1 - β₂) g²;
# - w becomes w · (1 - lr · decay) - lr · m̂ / (√v̂ + eps), with m̂ = m / (1 - β₁ᵗ) and v̂ = v / (1 - β₂ᵗ).
#
# Of the others, everything stays as it was, to the last bit. (The moments' bias correction counts an expert's own steps
# here. torch counts those of the whole stack.) Return the new weight, m, v and steps.


# %% tags=["06.7"]
def sparse_adamw(
    weight: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    steps: Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    decay: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(weight, m, v, steps) after one step; idle experts stay as they were."""
    beta1, beta2 = betas
    # Your code here.
    # BEGIN SOLUTION
    active = (grad != 0).flatten(1).any(dim=1)  # [E]; of a norm, tiny ones vanish
    along = (-1, *[1] * (grad.ndim - 1))
    new_steps = steps + active
    t = new_steps.to(weight.dtype).view(along)
    new_m = beta1 * m + (1 - beta1) * grad
    new_v = beta2 * v + (1 - beta2) * grad.square()
    m_hat, v_hat = new_m / (1 - beta1**t), new_v / (1 - beta2**t)
    moved = weight * (1 - lr * decay) - lr * m_hat / (v_hat.sqrt() + eps)
    on = active.view(along)
    return (
        torch.where(on, moved, weight),
        torch.where(on, new_m, m),
        torch.where(on, new_v, v),
        new_steps,
    )
    # END SOLUTION


# %%
check("06.7", sparse_adamw)

# %% [markdown]
# ## Points

# %%
full_marks = total("06")
# BEGIN SOLUTION
assert full_marks, "the solutions must earn full marks"
# END SOLUTION

# %% [markdown]
# ## 06.H A plan for 3000 examples (graded by hand, not counted above)
#
# A colleague wants to tune Qwen3-30B-A3B on 3000 examples of support chats, on one GPU with 80 GB, and writes: "LoRA
# with rank 16 on all experts, because every expert must adapt. But the optimizer of 128 experts in 48 layers will not
# fit, so we train the router in full instead and freeze the rest: it has to learn where the new domain goes. If loads
# become uneven, we raise the balancing loss." In at most 250 words: say what is right and what is wrong, each number
# with its unit and its source, propose what to train, and name what you would measure before, during and after,
# including what would make you stop. The rubric is on the page [For instructors](../book/start/instructors.md).
