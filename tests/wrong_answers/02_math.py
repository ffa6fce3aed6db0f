"""Answers to exercise 02 that must fail, each with the invariant that catches it, and others that must pass.

WRONG[question] is a list of (what is wrong, answer, name of the invariant that must fail first).
RIGHT[question] is a list of answers written differently from the worked solution.
"""

import itertools

import torch
import torch.nn.functional as F

from moe_course.layers import SwiGLU
from moe_course.specs import FFN

PACKAGE = "the package's own function"


def borrow(*_args, **_kwargs):
    """Any call into the package counts as its answer."""
    return FFN(1).params(1)


def kept_ids(scores, k):
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :k]


def scatter_gate(logits, kept, weights):
    return torch.zeros_like(logits).scatter(1, kept, weights)


# 02.1


def gate_masked(logits, k):
    kept = torch.zeros_like(logits).scatter(1, kept_ids(logits, k), 1.0).bool()
    return logits.masked_fill(~kept, float("-inf")).softmax(-1)


def gate_loop(logits, k):
    rows = []
    for row in logits:
        order = sorted(range(len(row)), key=lambda i: (-row[i].item(), i))[:k]
        rows.append(
            torch.zeros_like(row).index_put(
                (torch.tensor(order),), row[order].softmax(0)
            )
        )
    return torch.stack(rows) if rows else torch.zeros_like(logits)


def gate_topk(logits, k):
    values, kept = logits.topk(k, dim=-1)
    return scatter_gate(logits, kept, values.softmax(-1))


def gate_not_renormalised(logits, k):
    kept = kept_ids(logits, k)
    return scatter_gate(logits, kept, logits.softmax(-1).gather(1, kept))


def gate_twice(logits, k):
    probs = logits.softmax(-1)
    kept = kept_ids(probs, k)
    return scatter_gate(logits, kept, probs.gather(1, kept).softmax(-1))


def gate_of_zeros(logits, k):
    kept = torch.zeros_like(logits).scatter(1, kept_ids(logits, k), 1.0)
    return (logits * kept).softmax(-1)


def gate_overflow(logits, k):
    kept = kept_ids(logits, k)
    weights = logits.gather(1, kept).exp()
    return scatter_gate(logits, kept, weights / weights.sum(-1, keepdim=True))


# 02.2


def biased(
    logits,
    bias,
    k,
    scale,
    *,
    weigh_bias=False,
    normalise=True,
    use_scale=True,
    softmax=False,
    ignore=False,
):
    scores = logits.softmax(-1) if softmax else logits.sigmoid()
    kept = kept_ids(scores if ignore else scores + bias, k)
    weights = (scores + bias if weigh_bias else scores).gather(1, kept)
    if normalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return scatter_gate(logits, kept, weights * (scale if use_scale else 1))


def biased_mask(logits, bias, k, scale):
    scores = logits.sigmoid()
    mask = torch.zeros_like(logits).scatter(
        1, kept_ids(scores.detach() + bias.detach(), k), 1.0
    )
    kept = scores * mask
    return scale * kept / kept.sum(-1, keepdim=True)


def biased_straight_through(logits, bias, k, scale):
    return biased(logits, bias, k, scale) + 0 * bias + (bias - bias.detach())


# 02.3


def combine_loop(outputs, weights, keep):
    y = outputs.new_zeros(len(outputs), outputs.shape[2])
    for j in range(outputs.shape[1]):
        part = (weights[:, j, None] * outputs[:, j]).masked_fill(~keep[:, j, None], 0)
        y = y + part
    return y


def combine_einsum(outputs, weights, keep):
    clean = outputs.masked_fill(~keep[:, :, None], 0)
    return torch.einsum("tk,tkd->td", weights, clean)


def combine_renormalised(outputs, weights, keep):
    weights = weights * keep
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-9)
    return (weights[:, :, None] * torch.where(keep[:, :, None], outputs, 0)).sum(1)


def combine_identity(outputs, weights, keep):
    y = (weights[:, :, None] * torch.where(keep[:, :, None], outputs, 0)).sum(1)
    return torch.where(keep.any(1)[:, None], y, outputs.mean(1))


# 02.4


def sort_by_counting(expert_ids, num_experts):
    flat = expert_ids.flatten()
    runs = [(flat == e).nonzero().flatten() for e in range(num_experts)]
    offsets = torch.tensor([0, *(len(run) for run in runs)]).cumsum(0)
    return torch.cat(runs), offsets


def sort_by_key(expert_ids, num_experts):
    flat = expert_ids.flatten()
    order = (flat * flat.numel() + torch.arange(flat.numel())).argsort()
    return order, torch.searchsorted(flat[order], torch.arange(num_experts + 1))


def sort_inclusive(expert_ids, num_experts):
    order, offsets = sort_by_counting(expert_ids, num_experts)
    return order, offsets[1:]


def sort_unstable(expert_ids, num_experts):
    order, offsets = sort_by_counting(expert_ids, num_experts)
    runs = [order[a:b].flip(0) for a, b in itertools.pairwise(offsets)]
    return torch.cat(runs), offsets


def sort_columns(expert_ids, num_experts):
    return sort_by_counting(expert_ids.T.contiguous(), num_experts)


def sort_seen_only(expert_ids, num_experts):
    flat = expert_ids.flatten()
    counts = flat.bincount()
    return flat.argsort(stable=True), torch.cat([counts.new_zeros(1), counts.cumsum(0)])


# 02.5


def moe_loop(x, expert_ids, weights, w_gate, w_up, w_down):
    y = torch.zeros_like(x)
    for e in range(len(w_up)):
        token, choice = (expert_ids == e).nonzero(as_tuple=True)
        rows = x[token]
        out = (F.silu(rows @ w_gate[e].T) * (rows @ w_up[e].T)) @ w_down[e].T
        y = y.index_add(0, token, out * weights[token, choice, None])
    return y


def moe_dense(x, expert_ids, weights, w_gate, w_up, w_down):
    gates = torch.zeros(len(x), len(w_up), dtype=x.dtype).scatter(
        1, expert_ids, weights
    )
    y = torch.zeros_like(x)
    for e in range(len(w_up)):
        y = y + gates[:, e, None] * (
            (F.silu(x @ w_gate[e].T) * (x @ w_up[e].T)) @ w_down[e].T
        )
    return y


def moe_gather(x, expert_ids, weights, w_gate, w_up, w_down):
    gate = torch.einsum("tkfd,td->tkf", w_gate[expert_ids], x)
    up = torch.einsum("tkfd,td->tkf", w_up[expert_ids], x)
    out = torch.einsum("tkdf,tkf->tkd", w_down[expert_ids], F.silu(gate) * up)
    return (weights[:, :, None] * out).sum(1)


def moe_weight_first(x, expert_ids, weights, w_gate, w_up, w_down):
    y = torch.zeros_like(x)
    for e in range(len(w_up)):
        token, choice = (expert_ids == e).nonzero(as_tuple=True)
        rows = x[token] * weights[token, choice, None]
        y = y.index_add(
            0, token, (F.silu(rows @ w_gate[e].T) * (rows @ w_up[e].T)) @ w_down[e].T
        )
    return y


def moe_swapped(x, expert_ids, weights, w_gate, w_up, w_down):
    return moe_loop(x, expert_ids, weights, w_up, w_gate, w_down)


def moe_detached(x, expert_ids, weights, w_gate, w_up, w_down):
    return moe_loop(x, expert_ids, weights.detach(), w_gate, w_up, w_down)


def moe_overwrites(x, expert_ids, weights, w_gate, w_up, w_down):
    y = torch.zeros_like(x)
    for e in range(len(w_up)):
        token, choice = (expert_ids == e).nonzero(as_tuple=True)
        rows = x[token]
        y[token] = (
            (F.silu(rows @ w_gate[e].T) * (rows @ w_up[e].T)) @ w_down[e].T
        ) * weights[token, choice, None]
    return y


# 02.6


def dispatch_loop(expert_ids, num_experts, capacity):
    mask, taken = torch.zeros(len(expert_ids), num_experts, capacity), [0] * num_experts
    for t, e in enumerate(expert_ids.tolist()):
        if taken[e] < capacity:
            mask[t, e, taken[e]] = 1
        taken[e] += 1
    return mask


def dispatch_one_hot(expert_ids, num_experts, capacity):
    chosen = F.one_hot(expert_ids, num_experts)
    place = (chosen.cumsum(0) - 1).gather(1, expert_ids[:, None]).squeeze(1)
    places = F.one_hot(place.clamp(max=capacity), capacity + 1)[:, :capacity]
    return (chosen[:, :, None] * places[:, None, :]).float()


def dispatch_from_one(expert_ids, num_experts, capacity):
    chosen = F.one_hot(expert_ids, num_experts)
    place = chosen.cumsum(0)
    return (
        (place[:, :, None] == torch.arange(capacity)) & (chosen[:, :, None] == 1)
    ).float()


def dispatch_global(expert_ids, num_experts, capacity):
    chosen = F.one_hot(expert_ids, num_experts)
    place = torch.arange(len(expert_ids))[:, None, None]
    return ((place == torch.arange(capacity)) & (chosen[:, :, None] == 1)).float()


def dispatch_overfull(expert_ids, num_experts, capacity):
    chosen = F.one_hot(expert_ids, num_experts)
    place = (chosen.cumsum(0) - 1).clamp(
        max=capacity - 1
    )  # the last place, again and again
    return (
        (place[:, :, None] == torch.arange(capacity)) & (chosen[:, :, None] == 1)
    ).float()


# 02.7


def gradient_by_jacobian(logits, k, grad_weights):
    kept = kept_ids(logits, k)
    w = logits.gather(1, kept).softmax(-1)
    jacobian = torch.diag_embed(w) - w[:, :, None] * w[:, None, :]
    return torch.zeros_like(logits).scatter(
        1, kept, (jacobian @ grad_weights[:, :, None]).squeeze(2)
    )


def gradient_loop(logits, k, grad_weights):
    grad = torch.zeros_like(logits)
    for t, kept in enumerate(kept_ids(logits, k).tolist()):
        w = logits[t, kept].softmax(0)
        mean = (w * grad_weights[t]).sum()
        for j, e in enumerate(kept):
            grad[t, e] = w[j] * (grad_weights[t, j] - mean)
    return grad


def gradient_of_all(logits, k, grad_weights):
    kept, w = kept_ids(logits, k), logits.softmax(-1)
    full = torch.zeros_like(logits).scatter(1, kept, grad_weights)
    return w * (full - (w * full).sum(-1, keepdim=True))


def gradient_diagonal(logits, k, grad_weights):
    kept = kept_ids(logits, k)
    w = logits.gather(1, kept).softmax(-1)
    return torch.zeros_like(logits).scatter(1, kept, w * (1 - w) * grad_weights)


def gradient_no_jacobian(logits, k, grad_weights):
    return torch.zeros_like(logits).scatter(1, kept_ids(logits, k), grad_weights)


def gradient_sigmoid_at_one(logits, k, grad_weights):
    if k > 1:
        return gradient_loop(logits, k, grad_weights)
    kept = kept_ids(logits, 1)
    s = logits.gather(1, kept).sigmoid()
    return torch.zeros_like(logits).scatter(1, kept, s * (1 - s) * grad_weights)


# 02.8


def flops(
    width,
    hidden,
    experts,
    k,
    shared,
    tokens,
    training,
    *,
    router=None,
    per_weight=2,
    backward=3,
    matrices=3,
):
    router = experts if router is None else router
    return (
        tokens
        * per_weight
        * (width * router + (k + shared) * matrices * width * hidden)
        * (backward if training else 1)
    )


VALUES_1, LIMITS_1 = (
    "keeps the k largest and lets their weights sum to 1",
    "breaks ties by the lowest expert, and survives large logits",
)
VALUES_2, LIMITS_2 = (
    "selects with the bias and weighs without it",
    "the loss reaches the logits and not the bias",
)
VALUES_3 = "sums what was kept, and adds nothing for what was dropped"
LIMITS_3 = "works for no tokens, in float32, and ignores what was never computed"
ORDER = "puts the slots of each expert together, in their old order"
EQUALS, COPIES = "equals the definition", "makes no copy of weights for each token"
PLACES, DROPS = (
    "gives each token its place in its expert's buffer",
    "drops what comes after the capacity",
)
JACOBIAN = "is the softmax's Jacobian on the kept logits and 0 elsewhere"
COUNTS, THRICE = (
    "counts router, selected and shared experts",
    "counts three times as much for training",
)

WRONG = {
    "02.1": [
        ("not renormalised", gate_not_renormalised, VALUES_1),
        ("softmax twice", gate_twice, VALUES_1),
        ("softmax over zeros", gate_of_zeros, VALUES_1),
        ("topk breaks ties its own way", gate_topk, LIMITS_1),
        ("exp overflows", gate_overflow, LIMITS_1),
        (PACKAGE, borrow, VALUES_1),
    ],
    "02.2": [
        ("bias in the weights", lambda **c: biased(**c, weigh_bias=True), VALUES_2),
        ("not normalised", lambda **c: biased(**c, normalise=False), VALUES_2),
        ("no scale", lambda **c: biased(**c, use_scale=False), VALUES_2),
        ("softmax scores", lambda **c: biased(**c, softmax=True), VALUES_2),
        ("bias ignored", lambda **c: biased(**c, ignore=True), VALUES_2),
        ("detached scores", lambda **c: biased(**c | {"logits": c["logits"].detach()}), LIMITS_2),
        ("a gradient into the bias", biased_straight_through, LIMITS_2),
        (PACKAGE, borrow, VALUES_2),
    ],
    "02.3": [
        ("renormalised over what was kept", combine_renormalised, VALUES_3),
        ("dropped tokens pass through", combine_identity, VALUES_3),
        ("nothing dropped", lambda outputs, weights, keep: (weights[:, :, None] * outputs).sum(1), VALUES_3),
        ("unweighted", lambda outputs, weights, keep: (keep[:, :, None] * outputs).sum(1), VALUES_3),
        ("zero times NaN", lambda outputs, weights, keep: ((weights * keep)[:, :, None] * outputs).sum(1), LIMITS_3),
        ("always float64", lambda outputs, weights, keep: combine_loop(outputs, weights, keep).double(), LIMITS_3),
        (PACKAGE, borrow, VALUES_3),
    ],
    "02.4": [
        ("offsets without the leading 0", sort_inclusive, ORDER),
        ("reversed runs", sort_unstable, ORDER),
        ("slots numbered by columns", sort_columns, ORDER),
        ("idle experts at the end forgotten", sort_seen_only, "gives an idle expert an empty run"),
        (PACKAGE, borrow, ORDER),
    ],
    "02.5": [
        ("weights gathered per token", moe_gather, COPIES),
        ("gate weight before the non-linearity", moe_weight_first, EQUALS),
        ("gate and up swapped", moe_swapped, EQUALS),
        ("later experts overwrite earlier ones", moe_overwrites, EQUALS),
        ("no gradient to the gate", moe_detached, "has the gradients of the definition"),
        (PACKAGE, lambda x, **_: SwiGLU(x.shape[1], 2).to(x.dtype)(x), EQUALS),
    ],
    "02.6": [
        ("places from 1", dispatch_from_one, PLACES),
        ("places over all experts", dispatch_global, PLACES),
        ("the last place for all that come late", dispatch_overfull, DROPS),
        ("no expert dimension", lambda expert_ids, num_experts, capacity: F.one_hot(expert_ids, capacity).float()
            if not len(expert_ids) or int(expert_ids.max()) < capacity else torch.zeros(1), PLACES),
        (PACKAGE, borrow, PLACES),
    ],
    "02.7": [
        ("softmax over all experts", gradient_of_all, JACOBIAN),
        ("only the diagonal", gradient_diagonal, JACOBIAN),
        ("no Jacobian", gradient_no_jacobian, JACOBIAN),
        ("a sigmoid's gradient at k = 1", gradient_sigmoid_at_one, "is exactly 0 at k = 1"),
        (PACKAGE, borrow, JACOBIAN),
    ],
    "02.8": [
        ("the router's rows of selected experts only", lambda **c: flops(**c, router=c["k"]), COUNTS),
        ("multiplications only", lambda **c: flops(**c, per_weight=1), COUNTS),
        ("two matrices", lambda **c: flops(**c, matrices=2), COUNTS),
        ("every expert", lambda **c: flops(**c | {"k": c["experts"]}), COUNTS),
        ("training is twice the forward pass", lambda **c: flops(**c, backward=2), THRICE),
        (PACKAGE, borrow, COUNTS),
    ],
}  # fmt: skip

RIGHT = {
    "02.1": [gate_masked, gate_loop],
    "02.2": [biased, biased_mask],
    "02.3": [combine_loop, combine_einsum],
    "02.4": [sort_by_counting, sort_by_key],
    "02.5": [moe_loop, moe_dense],
    "02.6": [dispatch_loop, dispatch_one_hot],
    "02.7": [gradient_by_jacobian, gradient_loop],
    "02.8": [
        flops,
        lambda width, hidden, experts, k, shared, tokens, training: sum(
            2 * tokens * rows * columns * (3 if training else 1)
            for rows, columns in [
                (experts, width),
                *[(hidden, width)] * (3 * (k + shared)),
            ]
        ),
    ],
}
