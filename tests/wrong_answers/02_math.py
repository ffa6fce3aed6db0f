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


def gate_small_fill(logits, k):
    kept = torch.zeros_like(logits).scatter(1, kept_ids(logits, k), 1.0).bool()
    return logits.masked_fill(~kept, -999.0).softmax(-1)


def gate_common_maximum(logits, k):
    kept = kept_ids(logits, k)
    largest = logits.max() if logits.numel() else 0.0
    weights = (logits.gather(1, kept) - largest).exp()
    return scatter_gate(logits, kept, weights / weights.sum(-1, keepdim=True))


def gate_nudged(logits, k):
    nudge = 1e-6 * torch.arange(logits.shape[1], dtype=logits.dtype)
    kept = (logits - nudge).topk(k).indices  # a tie-break that reorders close logits
    return scatter_gate(logits, kept, logits.gather(1, kept).softmax(-1))


def gate_by_rank(logits, k):
    mine, other = logits[:, :, None], logits[:, None, :]
    e = torch.arange(logits.shape[1])
    before = (other > mine) | ((other == mine) & (e[None, :] < e[:, None]))
    return logits.masked_fill(before.sum(-1) >= k, float("-inf")).softmax(-1)


def gate_by_logsumexp(logits, k):
    kept = kept_ids(logits, k)
    values = logits.gather(1, kept)
    return scatter_gate(logits, kept, (values - values.logsumexp(1, True)).exp())


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
    eps=0.0,
):
    scores = logits.softmax(-1) if softmax else logits.sigmoid()
    kept = kept_ids(scores if ignore else scores + bias, k)
    weights = (scores + bias if weigh_bias else scores).gather(1, kept)
    if normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + eps)
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


def biased_selection(logits, kept, scale):
    weights = logits.sigmoid().gather(1, kept)
    weights = scale * weights / weights.sum(-1, keepdim=True)
    return scatter_gate(logits, kept, weights)


def biased_softmax_selects(logits, bias, k, scale):
    return biased_selection(logits, kept_ids(logits.softmax(-1) + bias, k), scale)


def biased_negative_is_zero(logits, bias, k, scale):
    scores = (logits.sigmoid() + bias).clamp(min=0)
    return biased_selection(logits, kept_ids(scores, k), scale)


def biased_new_leaf(logits, bias, k, scale):
    return biased(logits.detach().clone().requires_grad_(), bias, k, scale)


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


def combine_normalised_first(outputs, weights, keep):
    return combine_einsum(outputs, weights / weights.sum(-1, keepdim=True), keep)


def combine_one_unweighted(outputs, weights, keep):
    return combine_einsum(
        outputs, weights if weights.shape[1] > 1 else torch.ones_like(weights), keep
    )


def combine_isnan(outputs, weights, keep):
    clean = torch.where(outputs.isnan(), 0, outputs)
    return ((weights * keep)[:, :, None] * clean).sum(1)


def combine_scattered(outputs, weights, keep):
    token, choice = keep.nonzero(as_tuple=True)
    rows = outputs[token, choice] * weights[token, choice, None]
    return outputs.new_zeros(len(outputs), outputs.shape[2]).index_add(0, token, rows)


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


def sort_not_stably(expert_ids, num_experts):
    flat = expert_ids.flatten()
    return flat.argsort(), sort_by_counting(expert_ids, num_experts)[1]


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


def moe_dense_einsum(x, expert_ids, weights, w_gate, w_up, w_down):
    gates = torch.zeros(len(x), len(w_up), dtype=x.dtype).scatter(
        1, expert_ids, weights
    )
    gate = torch.einsum("td,efd->tef", x, w_gate)
    hidden = F.silu(gate) * torch.einsum("td,efd->tef", x, w_up)
    return torch.einsum("te,tef,edf->td", gates, hidden, w_down)


def moe_padded(x, expert_ids, weights, w_gate, w_up, w_down):
    flat = expert_ids.flatten()
    if not len(flat):
        return torch.zeros_like(x)
    chosen = F.one_hot(flat, len(w_up))
    place = (chosen.cumsum(0) - 1).gather(1, flat[:, None])[:, 0]
    token = torch.arange(len(flat)) // expert_ids.shape[1]
    rows = x.new_zeros(len(w_up), int(chosen.sum(0).max()), x.shape[1])
    rows = rows.index_put((flat, place), x[token])
    outputs = (F.silu(rows @ w_gate.mT) * (rows @ w_up.mT)) @ w_down.mT
    weighted = outputs[flat, place] * weights.flatten()[:, None]
    return torch.zeros_like(x).index_add(0, token, weighted)


def moe_row_by_row(x, expert_ids, weights, w_gate, w_up, w_down):
    y = torch.zeros_like(x)
    for e in range(len(w_up)):
        mine = expert_ids == e
        some = mine.any(1)
        rows, weight = x[some], (weights * mine).sum(1)[some]
        out = (F.silu(rows @ w_gate[e].T) * (rows @ w_up[e].T)) @ w_down[e].T
        y[some] = y[some] + weight[:, None] * out
    return y


def moe_normalised(x, expert_ids, weights, **experts):
    return moe_loop(x, expert_ids, weights / weights.sum(-1, keepdim=True), **experts)


def moe_always_double(**case):
    return moe_loop(
        **{n: v if n == "expert_ids" else v.double() for n, v in case.items()}
    )


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


def dispatch_counts_in_bfloat16(expert_ids, num_experts, capacity):
    chosen = F.one_hot(expert_ids, num_experts)
    place = chosen.bfloat16().cumsum(0) - 1
    return (
        (place[:, :, None] == torch.arange(capacity)) & (chosen[:, :, None] == 1)
    ).float()


def dispatch_common_capacity(expert_ids, num_experts, capacity):
    mask = dispatch_one_hot(expert_ids, num_experts, capacity)
    mask[num_experts * capacity :] = 0  # as if all experts shared their places
    return mask


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


def gradient_by_differences(logits, k, grad_weights):
    def loss(at):
        return (at.gather(1, kept).softmax(-1) * grad_weights).sum(1)

    kept, step, at = kept_ids(logits, k), 6e-6, logits.double()
    grad = torch.zeros_like(at)
    for e, nudge in enumerate(step * torch.eye(logits.shape[1], dtype=at.dtype)):
        grad[:, e] = (loss(at + nudge) - loss(at - nudge)) / (2 * step)
    return grad.to(logits.dtype)


def gradient_always_double(logits, k, grad_weights):
    return gradient_by_jacobian(logits.double(), k, grad_weights.double())


def gradient_pairwise(logits, k, grad_weights):
    kept = kept_ids(logits, k)
    w = logits.gather(1, kept).softmax(-1)
    gaps = grad_weights[:, :, None] - grad_weights[:, None, :]
    return scatter_gate(logits, kept, torch.einsum("ti,tj,tij->ti", w, w, gaps))


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
LIMITS_3 = "works for no tokens, in float32, and ignores what was never computed, and only that"
ORDER = "puts the slots of each expert together, in their old order"
EQUALS, WORK = (
    "equals the definition",
    "copies no weights for each token, and runs no expert on the others' tokens",
)
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
        ("-999 for minus infinity", gate_small_fill, LIMITS_1),
        ("one maximum for all rows", gate_common_maximum, LIMITS_1),
        ("ties broken by a small number", gate_nudged, LIMITS_1),
        (PACKAGE, borrow, VALUES_1),
    ],
    "02.2": [
        ("bias in the weights", lambda **c: biased(**c, weigh_bias=True), VALUES_2),
        ("not normalised", lambda **c: biased(**c, normalise=False), VALUES_2),
        ("no scale", lambda **c: biased(**c, use_scale=False), VALUES_2),
        ("softmax scores", lambda **c: biased(**c, softmax=True), VALUES_2),
        ("bias ignored", lambda **c: biased(**c, ignore=True), VALUES_2),
        ("selection by softmax scores", biased_softmax_selects, VALUES_2),
        ("negative scores count as 0", biased_negative_is_zero, VALUES_2),
        ("one expert is not normalised", lambda **c: biased(**c, normalise=c["k"] > 1), VALUES_2),
        ("an epsilon in the sum", lambda **c: biased(**c, eps=1e-12), VALUES_2),
        ("gradient of a copy", biased_new_leaf, LIMITS_2),
        ("detached scores", lambda **c: biased(**c | {"logits": c["logits"].detach()}), LIMITS_2),
        ("a gradient into the bias", biased_straight_through, LIMITS_2),
        (PACKAGE, borrow, VALUES_2),
    ],
    "02.3": [
        ("renormalised over what was kept", combine_renormalised, VALUES_3),
        ("dropped tokens pass through", combine_identity, VALUES_3),
        ("nothing dropped", lambda outputs, weights, keep: (weights[:, :, None] * outputs).sum(1), VALUES_3),
        ("unweighted", lambda outputs, weights, keep: (keep[:, :, None] * outputs).sum(1), VALUES_3),
        ("normalised before the drop", combine_normalised_first, VALUES_3),
        ("one choice is not weighted", combine_one_unweighted, VALUES_3),
        ("NaN is filled and infinity not", combine_isnan, LIMITS_3),
        ("nan_to_num at the end", lambda outputs, weights, keep: ((weights * keep)[:, :, None] * outputs).sum(1).nan_to_num(), LIMITS_3),
        ("every NaN hidden", lambda outputs, weights, keep: ((weights * keep)[:, :, None] * outputs.nan_to_num()).sum(1), LIMITS_3),
        ("nansum", lambda outputs, weights, keep: ((weights * keep)[:, :, None] * outputs).nansum(1), LIMITS_3),
        ("zero times NaN", lambda outputs, weights, keep: ((weights * keep)[:, :, None] * outputs).sum(1), LIMITS_3),
        ("always float64", lambda outputs, weights, keep: combine_loop(outputs, weights, keep).double(), LIMITS_3),
        (PACKAGE, borrow, VALUES_3),
    ],
    "02.4": [
        ("offsets without the leading 0", sort_inclusive, ORDER),
        ("reversed runs", sort_unstable, ORDER),
        ("argsort without stable=True", sort_not_stably, ORDER),
        ("slots numbered by columns", sort_columns, ORDER),
        ("idle experts at the end forgotten", sort_seen_only, "gives an idle expert an empty run"),
        (PACKAGE, borrow, ORDER),
    ],
    "02.5": [
        ("weights gathered per token", moe_gather, WORK),
        ("every expert on every token", moe_dense, WORK),
        ("every expert on every token, at once", moe_dense_einsum, WORK),
        ("weights normalised", moe_normalised, EQUALS),
        ("always float64", moe_always_double, EQUALS),
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
        ("one capacity for all experts", dispatch_common_capacity, DROPS),
        ("places counted in bfloat16", dispatch_counts_in_bfloat16, DROPS),
        ("no expert dimension", lambda expert_ids, num_experts, capacity: F.one_hot(expert_ids, capacity).float()
            if not len(expert_ids) or int(expert_ids.max()) < capacity else torch.zeros(1), PLACES),
        (PACKAGE, borrow, PLACES),
    ],
    "02.7": [
        ("softmax over all experts", gradient_of_all, JACOBIAN),
        ("only the diagonal", gradient_diagonal, JACOBIAN),
        ("no Jacobian", gradient_no_jacobian, JACOBIAN),
        ("finite differences", gradient_by_differences, JACOBIAN),
        ("always float64", gradient_always_double, JACOBIAN),
        ("zeros of another type at k = 1", lambda **c: gradient_loop(**c) if c["k"] > 1 else torch.zeros(c["logits"].shape), "is exactly 0 at k = 1"),
        ("a sigmoid's gradient at k = 1", gradient_sigmoid_at_one, "is exactly 0 at k = 1"),
        (PACKAGE, borrow, JACOBIAN),
    ],
    "02.8": [
        ("the router's rows of selected experts only", lambda **c: flops(**c, router=c["k"]), COUNTS),
        ("multiplications only", lambda **c: flops(**c, per_weight=1), COUNTS),
        ("two matrices", lambda **c: flops(**c, matrices=2), COUNTS),
        ("every expert", lambda **c: flops(**c | {"k": c["experts"]}), COUNTS),
        ("rounded by a float", lambda **c: int(flops(**c, per_weight=2.0)), COUNTS),
        ("activations counted", lambda **c: flops(**c) + c["tokens"] * c["k"] * c["hidden"], COUNTS),
        ("training is twice the forward pass", lambda **c: flops(**c, backward=2), THRICE),
        (PACKAGE, borrow, COUNTS),
    ],
}  # fmt: skip

RIGHT = {
    "02.1": [gate_masked, gate_loop, gate_by_rank, gate_by_logsumexp],
    "02.2": [biased, biased_mask, lambda **c: biased(**c, eps=1e-20)],
    "02.3": [combine_loop, combine_einsum, combine_scattered],
    "02.4": [sort_by_counting, sort_by_key],
    "02.5": [moe_loop, moe_padded, moe_row_by_row],
    "02.6": [dispatch_loop, dispatch_one_hot],
    "02.7": [gradient_by_jacobian, gradient_loop, gradient_pairwise],
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
