"""Answers to exercise 03 that must fail, each with the invariant that catches it, and others that must pass.

WRONG[question] is a list of (what is wrong, answer, name of the invariant that must fail first).
RIGHT[question] is a list of answers written differently from the worked solution.
"""

import math

import torch
import torch.nn.functional as F

from moe_course import balance, layers
from moe_course.layers import Routing

PACKAGE = "the package's own function"


def kept_ids(scores, k):
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :k]


def routing_of(logits, expert_ids, weights=None):
    probs = logits.softmax(-1)
    if weights is None:
        weights = probs.gather(1, expert_ids)
    return Routing(expert_ids, weights, probs, logits)


# 03.1


def switch(
    logits,
    expert_ids,
    divide_by_k,
    *,
    twice=False,
    mean=False,
    soft_counts=False,
    straight_through=False,
    detached=False,
    choose=False,
    least_one=False,
    always_divide=False,
    never_divide=False,
):
    tokens, experts = logits.shape
    k = expert_ids.shape[1]
    p = logits.softmax(-1)
    if twice:
        p = p.softmax(-1)
    if choose:
        expert_ids = kept_ids(logits, k)
    hot = F.one_hot(expert_ids, experts).sum(1).to(p.dtype)  # [T, E]
    if straight_through:
        hot = hot + p - p.detach()
    if soft_counts:
        hot = k * p
    divisor = k if (divide_by_k or always_divide) and not never_divide else 1
    f = hot.sum(0) / max(1, tokens) / divisor
    mean_p = (p.detach() if detached else p).sum(0) / max(1, tokens)
    loss = experts * (f * mean_p).mean() if mean else experts * (f * mean_p).sum()
    return loss.clamp(min=1) if least_one else loss


def switch_by_tokens(logits, expert_ids, divide_by_k):
    """The mean over tokens and choices of the mean probability of the chosen expert."""
    tokens, experts = logits.shape
    if not tokens:
        return logits.sum()
    picked = logits.softmax(-1).mean(0)[expert_ids]  # [T, K]
    return experts * (picked.mean() if divide_by_k else picked.sum() / tokens)


def switch_by_covariance(logits, expert_ids, divide_by_k):
    tokens, experts = logits.shape
    if not tokens:
        return logits.new_zeros(())
    f = torch.stack([(expert_ids == e).to(logits.dtype).mean() for e in range(experts)])
    p = torch.log_softmax(logits, -1).exp().mean(0)
    loss = 1 + experts * torch.dot(f - 1 / experts, p - 1 / experts)
    return loss if divide_by_k else loss * expert_ids.shape[1]


def switch_nan_of_nothing(logits, expert_ids, divide_by_k):
    experts = logits.shape[1]
    f = F.one_hot(expert_ids, experts).to(logits.dtype).mean((0, 1))
    loss = experts * (f * logits.softmax(-1).mean(0)).sum()
    return loss if divide_by_k else expert_ids.shape[1] * loss


def switch_overflows(logits, expert_ids, divide_by_k):
    p = logits.exp() / logits.exp().sum(-1, keepdim=True)
    return switch(p.log(), expert_ids, divide_by_k)


def switch_of_float32_shares(logits, expert_ids, divide_by_k):
    """Torch divides integers into float32."""
    tokens, experts = logits.shape
    counts = expert_ids.flatten().bincount(minlength=experts)
    f = counts / max(1, expert_ids.numel() if divide_by_k else tokens)
    return experts * (f * logits.softmax(-1).sum(0) / max(1, tokens)).sum()


def switch_in_float64(logits, expert_ids, divide_by_k):
    return switch(logits.double(), expert_ids, divide_by_k)


# 03.2


def importance(
    expert_ids,
    weights,
    num_experts,
    *,
    counts=False,
    unbiased=False,
    root=False,
    eps=0.0,
    least=0.0,
    served_only=False,
    where=True,
    detached=False,
    each_token=False,
):
    if counts:
        weights = torch.ones_like(weights)
    if each_token:
        weights = weights / weights.sum(-1, keepdim=True)
    if detached:
        weights = weights.detach().clone().requires_grad_()
    sums = weights.new_zeros(num_experts)
    sums = sums.scatter_add(0, expert_ids.flatten(), weights.flatten())
    if served_only:
        sums = sums[expert_ids.flatten().bincount(minlength=num_experts) > 0]
    mean = sums.mean()
    variance = sums.var(unbiased=unbiased)
    if root:
        variance = variance.sqrt() * mean
    if where:
        safe = torch.where(mean == 0, torch.ones_like(mean), mean)
        return torch.where(
            mean == 0, 0 * mean, variance / (safe.square() + eps).clamp(min=least)
        )
    return variance / (mean.square() + eps)


def importance_where_alone(expert_ids, weights, num_experts):
    value = importance(expert_ids, weights, num_experts, where=False)
    return torch.where(value.isnan(), torch.zeros_like(value), value)


def importance_by_root(expert_ids, weights, num_experts):
    sums = weights.new_zeros(num_experts)
    sums = sums.index_add(0, expert_ids.flatten(), weights.flatten())
    mean = sums.mean()
    if mean == 0:
        return 0 * mean
    return ((sums - mean).square().mean().sqrt() / mean).square()


def importance_by_moments(expert_ids, weights, num_experts):
    hot = F.one_hot(expert_ids, num_experts).to(weights.dtype)
    sums = torch.einsum("tk,tke->e", weights, hot)
    total = sums.sum()
    if not total.item():
        return total * 0
    share = sums / total
    return num_experts * share.square().sum() - 1


# 03.3


def z_by_hand(logits):
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if not len(logits):
        return logits.new_zeros(())
    top = logits.max(-1, keepdim=True).values.detach()
    return ((logits - top).exp().sum(-1).log() + top[:, 0]).square().mean()


def z_by_log_softmax(logits):
    """logsumexp is a logit less its log-probability; that of the largest is finite."""
    logits = logits.double() if logits.dtype == torch.float64 else logits.float()
    top = logits.argmax(-1, keepdim=True)
    z = (logits - logits.log_softmax(-1)).gather(1, top)
    return z.pow(2).sum() / max(1, z.numel())


def z_naive(logits):
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.exp().sum(-1).log().square().sum() / max(1, len(logits))


def z_in_half(logits):
    z = logits.logsumexp(-1).square().sum() / max(1, len(logits))
    return z.to(torch.promote_types(logits.dtype, torch.float32))


def z_of_nothing(logits):
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits.to(wide).logsumexp(-1).square().mean()


def z_without_infinity(logits):
    """-1e4 for minus infinity: right values, and a row of nothing but such would be wrong."""
    return z_by_hand(logits.nan_to_num(neginf=0.0))


def z_times_mask(logits):
    allowed = logits > -torch.inf
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    z = (logits * allowed).logsumexp(-1)
    return z.square().sum() / max(1, len(z))


def z_detached(logits):
    return z_by_hand(logits.detach().clone().requires_grad_())


# 03.4


def kept_loop(expert_ids, num_experts, capacity, real, *, padding_takes=False):
    taken, keep = [0] * num_experts, []
    for row, is_real in zip(expert_ids.tolist(), real.tolist(), strict=True):
        for e in row:
            keep.append(is_real and taken[e] < capacity)
            taken[e] += is_real or padding_takes
    return torch.tensor(keep, dtype=torch.bool).reshape(expert_ids.shape)


def kept_sorted(expert_ids, num_experts, capacity, real):
    flat = torch.where(real[:, None], expert_ids, num_experts).flatten()
    order = flat.argsort(stable=True)
    runs = flat[order]
    place = torch.arange(len(flat)) - torch.searchsorted(runs, runs)
    keep = torch.zeros(len(flat), dtype=torch.bool)
    keep[order] = (place < capacity) & (runs < num_experts)
    return keep.reshape(expert_ids.shape)


def kept_by_expert(expert_ids, num_experts, capacity, real):
    keep = torch.zeros(expert_ids.numel(), dtype=torch.bool)
    wanted = (expert_ids + 1) * real[:, None]
    for e in range(num_experts):
        keep[(wanted.flatten() == e + 1).nonzero().flatten()[:capacity]] = True
    return keep.view_as(expert_ids)


def kept_first_choices_first(expert_ids, num_experts, capacity, real):
    k = expert_ids.shape[1]
    keep = kept_loop(expert_ids.T.reshape(-1, 1), num_experts, capacity, real.repeat(k))
    return keep.reshape(k, -1).T


def kept_with_last_resort(expert_ids, num_experts, capacity, real):
    keep = kept_loop(expert_ids, num_experts, capacity, real)
    lost = real & ~keep.any(1)
    keep[:, 0] |= lost & (expert_ids.shape[1] > 1)  # passed through by its first choice
    return keep


def kept_last_ones(expert_ids, num_experts, capacity, real):
    return kept_loop(expert_ids.flip(0), num_experts, capacity, real.flip(0)).flip(0)


def kept_inclusive(expert_ids, num_experts, capacity, real):
    return kept_loop(expert_ids, num_experts, capacity - 1, real)


def kept_but_padding(expert_ids, num_experts, capacity, real):
    return kept_loop(expert_ids, num_experts, capacity, torch.ones_like(real))


def kept_padding_takes(expert_ids, num_experts, capacity, real):
    return kept_loop(expert_ids, num_experts, capacity, real, padding_takes=True)


def kept_common(expert_ids, num_experts, capacity, real):
    place = torch.arange(expert_ids.numel()).view_as(expert_ids)
    return (place < num_experts * capacity) & real[:, None]


def kept_at_least_one(expert_ids, num_experts, capacity, real):
    return kept_loop(expert_ids, num_experts, max(1, capacity), real)


def kept_padding_takes_second(expert_ids, num_experts, capacity, real):
    """Padding is taken out of the first choices only."""
    taken, keep = [0] * num_experts, []
    for row, is_real in zip(expert_ids.tolist(), real.tolist(), strict=True):
        for j, e in enumerate(row):
            keep.append(is_real and taken[e] < capacity)
            taken[e] += is_real or j > 0
    return torch.tensor(keep, dtype=torch.bool).reshape(expert_ids.shape)


def kept_below_all(expert_ids, num_experts, capacity, real):
    """A capacity of T, cut to an index."""
    most = min(capacity, len(expert_ids) - 1)
    return kept_loop(expert_ids, num_experts, most, real)


def kept_in(dtype, expert_ids, num_experts, capacity, real):
    hot = F.one_hot(expert_ids.flatten(), num_experts).to(dtype)
    hot = hot * real.repeat_interleave(expert_ids.shape[1])[:, None]
    before = (hot.cumsum(0) - hot).gather(1, expert_ids.flatten()[:, None])[:, 0]
    keep = (before < capacity).view_as(expert_ids)
    return keep & real[:, None]


def kept_by_the_package(expert_ids, num_experts, capacity, real):
    logits = torch.zeros(len(expert_ids), num_experts)
    slots = layers.slots_from_routing(
        routing_of(logits, expert_ids), num_experts, real, capacity
    )
    keep = torch.zeros_like(logits, dtype=torch.bool)
    keep[slots.token, slots.expert] = True
    return keep.gather(1, expert_ids)


# 03.5


def biased(
    scores,
    bias,
    k,
    step,
    *,
    weigh_bias=False,
    normalise=True,
    ignore=False,
    softmax=False,
    topk=False,
    detached=False,
    rule="sign",
):
    tokens, experts = scores.shape
    chooses = scores if ignore else scores + bias
    ids = chooses.topk(k).indices if topk else kept_ids(chooses, k)
    weights = (scores + bias if weigh_bias else scores).gather(1, ids)
    if detached:
        weights = weights.detach().clone().requires_grad_()
    if softmax:
        weights = weights.softmax(-1)
    elif normalise:
        weights = weights / weights.sum(-1, keepdim=True)
    load = F.one_hot(ids, experts).sum((0, 1)).to(bias.dtype)
    if rule == "scores":
        load = scores.detach().sum(0)
    if rule == "tokens":
        load = load * experts / max(1, tokens) * load.mean()
    excess = load.mean() - load
    if rule == "weights":
        load = torch.zeros_like(bias).index_add(
            0, ids.flatten(), weights.detach().flatten()
        )
        excess = load.mean() - load
    if rule == "unbiased":
        load = F.one_hot(kept_ids(scores, k), experts).sum((0, 1)).to(bias.dtype)
        excess = load.mean() - load
    change = {
        "floor": (load.mean().floor() - load).sign(),
        "round": (load.mean().round() - load).sign(),
        "median": (load.median() - load).sign(),
        "middle": ((load.max() + load.min()) / 2 - load).sign(),
        "dead band": excess.sign() * (excess.abs() >= 0.5),
        "upside down": -excess.sign(),
        "proportional": excess / load.mean().clamp(min=1e-20),
        "never still": (excess >= 0) * 2.0 - 1,
        "centred": excess.sign() - excess.sign().mean(),
        "busiest only": -(load == load.max()).to(bias.dtype),
        "of one token": (tokens / experts - load).sign(),
    }.get(rule, excess.sign())
    return ids, weights, (bias + step * change).to(bias.dtype)


def biased_by_mask(scores, bias, k, step):
    tokens, experts = scores.shape
    mine, other = (scores + bias)[:, :, None], (scores + bias)[:, None, :]
    e = torch.arange(experts)
    before = (other > mine) | ((other == mine) & (e[None, :] < e[:, None]))
    rank = before.sum(-1)  # [T, E]
    ids = rank.argsort(-1)[:, :k]
    kept = scores * (rank < k)
    weights = (kept / kept.sum(-1, keepdim=True)).gather(1, ids)
    load = (rank < k).sum(0) * experts
    moved = bias.clone()
    moved[load < tokens * k] += step
    moved[load > tokens * k] -= step
    return ids, weights, moved


def biased_by_loop(scores, bias, k, step):
    ids = [
        sorted(range(len(row)), key=lambda e, row=row: (-row[e], e))[:k]
        for row in (scores + bias).tolist()
    ]
    ids = torch.tensor(ids, dtype=torch.int64).reshape(-1, k)
    logs = scores.log().gather(1, ids)
    load = ids.flatten().bincount(minlength=scores.shape[1]).tolist()
    share = sum(load) / len(load)
    signs = [(c < share) - (c > share) for c in load]
    return ids, logs.softmax(-1), bias + step * torch.tensor(signs).to(bias.dtype)


def biased_soft_load(scores, bias, k, step):
    ids, weights, moved = biased(scores, bias, k, step)
    attached = scores.sum(0) - scores.sum(0).detach()
    return ids, weights, moved + attached


def biased_by_rounded_shares(scores, bias, k, step):
    ids, weights, moved = biased(scores, bias, k, step)
    if not len(ids):
        return ids, weights, moved
    share = F.one_hot(ids, len(bias)).sum((0, 1)) * torch.tensor(
        1 / ids.numel(), dtype=torch.float64
    )
    return ids, weights, bias + step * (1 / len(bias) - share).sign().to(bias.dtype)


def biased_bias_moves_first(scores, bias, k, step):
    """The batch is routed by the bias that it leaves behind."""
    moved = biased(scores, bias, k, step)[2]
    return *biased(scores, moved, k, step)[:2], moved


def biased_always_first(scores, bias, k, step):
    """Without tokens every bias goes up: nobody reached a share that nobody has."""
    ids, weights, moved = biased(scores, bias, k, step)
    return ids, weights, moved if len(scores) else bias + step


def biased_by_the_package(scores, bias, k, step):
    ids, weights, _ = biased(scores, bias, k, step)
    counts = ids.flatten().bincount(minlength=len(bias))
    return ids, weights, balance.updated_correction(bias, counts, step)


def biased_gate_of_the_package(scores, bias, k, step):
    routing = layers.routing.sigmoid_top_k(scores.logit(), k, correction=bias)
    moved = biased(scores, bias, k, step)[2]
    return routing.expert_ids, routing.weights, moved


# 03.6


def report(counts, *, share=0.01, strict=False, minus=1.0, unbiased=False):
    load = counts.double()
    mean = load.mean(1, keepdim=True)
    dead = load < share * mean if strict else load <= share * mean
    return load.amax(1) / mean[:, 0] - minus, dead.sum(1)


def report_pooled(counts):
    one = report(counts.sum(0, keepdim=True))
    return tuple(entry.expand(len(counts)).clone() for entry in one)


def report_common_mean(counts):
    load = counts.double()
    mean = load.mean()
    return load.amax(1) / mean - 1, (load <= 0.01 * mean).sum(1)


def report_pooled_dead(counts):
    violation, _ = report(counts)
    return violation, report_pooled(counts)[1]


def report_hides_nan(counts):
    violation, dead = report(counts)
    return violation.nan_to_num(0.0), dead


def report_clamped(counts):
    load = counts.double()
    mean = load.mean(1).clamp(min=1e-9)
    return load.amax(1) / mean - 1, (load <= 0.01 * mean[:, None]).sum(1)


def report_idle_only(counts):
    return report(counts)[0], (counts == 0).sum(1)


def report_above_and_below(counts):
    load = counts.double()
    mean = load.mean(1, keepdim=True)
    return ((load - mean).abs() / mean).amax(1), report(counts)[1]


def report_fractions(counts):
    violation, dead = [], []
    for row in counts.tolist():
        total, experts = sum(row), len(row)
        violation.append(max(row) * experts / total - 1 if total else math.nan)
        dead.append(len([c for c in row if 100 * c * experts <= total]))
    return (
        torch.tensor(violation, dtype=torch.float64),
        torch.tensor(dead, dtype=torch.int64),
    )


def report_shares(counts):
    experts = counts.shape[1]
    share = counts.double() / counts.sum(1, keepdim=True).double()
    dead = 100 * experts * counts <= counts.sum(1, keepdim=True)
    return (experts * share).max(1).values.sub(1), dead.long().sum(1)


def report_of(busiest=None, reference=None):
    """With another busiest load, or 1 % of something else than the mean."""

    def answer(counts):
        load = counts.double()
        top = load.amax(1) if busiest is None else busiest(load)
        of = load.mean(1) if reference is None else reference(load)
        return top / load.mean(1) - 1, (100 * load <= of[:, None]).sum(1)

    return answer


def mean_of_serving(load):
    return load.sum(1) / (load > 0).sum(1).clamp(min=1)


def at_most_one(load):
    """100 where a single assignment is below the mean: one is dead, whatever the mean."""
    return 100.0 * (load.mean(1) > 1)


def report_by_the_package(counts):
    violation = [balance.max_violation(row) for row in counts]
    dead = [balance.dead_experts(row) for row in counts]
    return (
        torch.tensor(violation, dtype=torch.float64),
        torch.tensor(dead, dtype=torch.int64),
    )


# 03.7


def diagnosis(
    counts,
    *,
    above=2.0,
    at_least=True,
    share=0.01,
    strict=False,
    pool=False,
    skip_empty=True,
    empty_sequences=False,
    every_sequence=False,
    dead_first=False,
    dead_last=False,
    dead_in_sequence=False,
    sequences_pooled=False,
    half_strict=False,
    collapse_any=False,
    most=False,
    uneven_of=None,
    dead_of=None,
    alone_of=None,
    present_of=None,
):
    if pool:
        counts = counts.sum(1, keepdim=True)
    batch = counts.sum(0).double()
    used = batch.sum(1) > 0
    if not used.any():
        return "no tokens"
    if skip_empty:
        counts, batch = counts[:, used], batch[used]
    mean = batch.mean(1)
    top = batch.amax(1)
    if uneven_of:
        mean = uneven_of(batch)
    uneven = top > above * mean if at_least else top >= above * mean
    mean = dead_of(batch) if dead_of else batch.mean(1)
    dead = batch < share * mean[:, None] if strict else batch <= share * mean[:, None]
    if dead_in_sequence:
        dead = dead | (counts == 0).any(0)
    if dead_first and dead.any():
        return "dead experts"
    if most and 2 * uneven.sum() > len(uneven):
        return "collapsed"
    if uneven.any() if collapse_any else uneven.all():
        return "collapsed"
    if uneven.any():
        return "some layers"
    if dead.any() and not dead_last:
        return "dead experts"
    load = counts.double()
    own = alone_of(load) if alone_of else load.mean(2)
    alone = load.amax(2) > above * own
    present = load.sum(2) > 0
    if present_of:
        present = present_of(load)
    if empty_sequences:
        present = torch.ones_like(present)
    share_uneven = alone.sum(0) / present.sum(0)
    if sequences_pooled:
        share_uneven = alone.sum() / present.sum()
    least = 1.0 if every_sequence else 0.5
    found = share_uneven > least if half_strict else share_uneven >= least
    if found.any():
        return "sequences"
    return "dead experts" if dead.any() else "healthy"


def diagnosis_in_python(counts):
    layers_, sick, dead, mixed = 0, 0, False, False
    sequences, experts = counts.shape[0], counts.shape[2]
    for layer in counts.unbind(1):
        load = layer.sum(0).tolist()
        total = sum(load)
        if total == 0:
            continue
        layers_ += 1
        sick += max(load) / total > 2 / experts
        dead |= min(load) / total <= 0.01 / experts
        filled = [layer[b].tolist() for b in range(sequences) if layer[b].sum() > 0]
        bad = [row for row in filled if max(row) * len(row) > 2 * sum(row)]
        mixed |= len(bad) >= len(filled) - len(bad)
    if layers_ == 0:
        return "no tokens"
    if sick:
        return "collapsed" if sick == layers_ else "some layers"
    return "dead experts" if dead else "sequences" if mixed else "healthy"


def diagnosis_by_the_package(counts):
    batch = counts.sum(0)
    if not batch.sum():
        return "no tokens"
    uneven = [balance.max_violation(row) > 1 for row in batch if row.sum()]
    if any(uneven):
        return "collapsed" if all(uneven) else "some layers"
    if any(balance.dead_experts(row) for row in batch if row.sum()):
        return "dead experts"
    return diagnosis(counts)


# 03.8


def layer(x, router, bias, experts):
    probs = (x @ router.T).softmax(-1)
    chosen = kept_ids((probs + bias).detach(), 1)
    outputs = torch.einsum("eij,tj->tei", experts, x)
    output = outputs[torch.arange(len(x)), chosen[:, 0]]
    return probs.gather(1, chosen) * output, probs, chosen


def trained(
    x, y, router, experts, *, aux=0.0, step=0.0, lr=0.02, steps=120, freeze=False
):
    router = router.clone().requires_grad_(not freeze)
    experts = experts.clone().requires_grad_()
    bias = torch.zeros(len(router))
    optimizer = torch.optim.Adam([experts] if freeze else [router, experts], lr=lr)
    for _ in range(steps):
        output, probs, chosen = layer(x, router, bias, experts)
        loss = (output - y).square().mean()
        load = chosen.flatten().bincount(minlength=len(router)) / len(x)
        loss = loss + aux * len(router) * (load * probs.mean(0)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bias = bias + step * (1 / len(router) - load).sign()
    return router.detach(), bias, experts.detach()


def by_bias(x, y, router, experts):
    return trained(x, y, router, experts, step=0.01)


def by_loss(x, y, router, experts):
    return trained(x, y, router, experts, aux=3.0)


def k_means(x, first, count):
    """(sum of squared distances, cluster of each token), from far-apart centres."""
    centre = [x[first]]
    for _ in range(count - 1):
        centre.append(x[torch.cdist(x, torch.stack(centre)).amin(1).argmax()])
    centres = torch.stack(centre)
    for _ in range(10):
        mine = torch.cdist(x, centres).argmin(1)
        centres = torch.stack([x[mine == e].mean(0) for e in range(count)])
    nearest = torch.cdist(x, centres).min(1)
    return nearest.values.square().sum().item(), nearest.indices


def by_clusters(x, y, router, experts):
    """No gradient at all: k-means, the best of 20, and a matrix for each cluster."""
    tries = [k_means(x, first, len(router)) for first in range(20)]
    mine = min(tries, key=lambda found: found[0])[1]
    # All tokens share one direction: along it a linear router has a constant.
    design = torch.cat([x, torch.ones(len(x), 1)], 1)
    solved = torch.linalg.lstsq(design, F.one_hot(mine, len(router)).float()).solution
    router = 30 * (solved[:-1].T + solved[-1:].T * one_for_all(x))
    fitted = [torch.linalg.lstsq(x[mine == e], y[mine == e]).solution.T for e in range(len(router))]  # fmt: skip
    return router, torch.zeros(len(router)), torch.stack(fitted)


def one_for_all(x):
    """A vector whose product with every token is about 1."""
    return torch.linalg.lstsq(x, torch.ones(len(x), 1)).solution.T


def nothing_done(x, y, router, experts):
    return trained(x, y, router, experts, steps=200)


def faster_without_cure(x, y, router, experts):
    return trained(x, y, router, experts, lr=0.05)


def untrained(x, y, router, experts):
    return router, torch.zeros(len(router)), experts


def blind_router(x, router):
    """Looks at noise alone: the directions in which tokens differ least."""
    least = torch.linalg.svd(x - x.mean(0)).Vh[-3:]  # [3, D]
    least = least - least @ one_for_all(x).T * x.mean(0)
    angle = torch.arange(len(router)) * (2 * math.pi / len(router))
    return 30 * (angle.cos()[:, None] * least[0] + angle.sin()[:, None] * least[1])


def even_and_blind(x, y, router, experts):
    router = blind_router(x, router)
    router, bias, experts = trained(
        x, y, router, experts, freeze=True, step=0.01, steps=60
    )
    return router, bias, experts


def one_matrix_for_all(x, y, router, experts):
    router, bias, _ = trained(x, y, router, experts, step=0.02, steps=60)
    alike = torch.linalg.lstsq(x, y).solution.T
    return router, bias, alike.expand_as(experts).clone()


def uniform_router(x, y, router, experts):
    """The router undecided about everything: of equal scores the lowest id is chosen."""
    return trained(x, y, torch.zeros_like(router), experts, freeze=True, steps=20)


def bias_in_the_gate(x, y, router, experts):
    """Trained with weights that hold the bias, so that the layer as asked for is another."""
    router, bias, experts = by_bias(x, y, router, experts)
    return router, bias, experts * 3


def eight_only(x, y, router, experts):
    return by_loss(x, y, router, experts) if len(router) == 8 else nothing_done(x, y, router, experts)  # fmt: skip


def diverged(x, y, router, experts):
    return router, torch.zeros(len(router)), experts / 0


def cured_by_the_package(x, y, router, experts):
    logits = x @ router.T
    balance.load_balancing_loss(routing_of(logits, kept_ids(logits, 1)), len(router))
    return by_loss(x, y, router, experts)


VALUES_1 = "is E times the sum over experts of share times mean probability, in both conventions"
GRADIENT_1 = "passes a gradient through the probabilities alone"
LIMITS_1 = "at the edges: no tokens, one expert, every expert for each, all on one"
VALUES_2, GRADIENT_2, LIMITS_2 = (
    "is the variance of the summed weights over their squared mean",
    "passes a gradient to the weights",
    "is 0 where all importances are 0, without NaN in value or gradient",
)
VALUES_3, LARGE_3, LIMITS_3 = (
    "is the mean over tokens of logsumexp squared",
    "survives logits of 1000 and of half precision",
    "takes forbidden experts and no tokens, gradient included",
)
FIRST_4, PADDING_4, ZERO_4 = (
    "keeps the first `capacity` assignments of each expert",
    "gives padding no place",
    "lets what is dropped contribute exactly 0, at the edges too",
)
CHOICE_5, UPDATE_5, LIMITS_5 = (
    "chooses with the bias and weighs without it",
    "moves each bias by one step against its excess of load",
    "breaks ties, takes no tokens, and lets the gradient reach the scores",
)
LAYERS_6, LIMITS_6 = (
    "reports each layer by itself",
    "at the edges: just 1 %, one expert, an empty layer",
)
WORDS_7, LINES_7 = (
    "names what is the matter, layer by layer and sequence by sequence",
    "draws the lines where the table draws them",
)
CURED_8, AGAIN_8 = (
    "has a small error and an even load on tokens that it has not seen",
    "and again with another number of kinds",
)

WRONG = {
    "03.1": [
        ("softmax twice", lambda **c: switch(**c, twice=True), VALUES_1),
        ("mean over experts", lambda **c: switch(**c, mean=True), VALUES_1),
        ("counts of probabilities", lambda **c: switch(**c, soft_counts=True), VALUES_1),
        ("never below 1", lambda **c: switch(**c, least_one=True), VALUES_1),
        ("chooses again", lambda **c: switch(**c, choose=True), VALUES_1),
        ("always divided by K", lambda **c: switch(**c, always_divide=True), VALUES_1),
        ("never divided by K", lambda **c: switch(**c, never_divide=True), VALUES_1),
        ("a gradient through f", lambda **c: switch(**c, straight_through=True), GRADIENT_1),
        ("no gradient through P", lambda **c: switch(**c, detached=True), GRADIENT_1),
        ("NaN without tokens", switch_nan_of_nothing, LIMITS_1),
        ("exp overflows", switch_overflows, LIMITS_1),
        ("always float64", switch_in_float64, VALUES_1),
        ("shares in float32", switch_of_float32_shares, VALUES_1),
        (PACKAGE, lambda logits, expert_ids, divide_by_k: balance.load_balancing_loss(
            routing_of(logits, expert_ids), logits.shape[1], divide_by_k=divide_by_k), VALUES_1),
    ],
    "03.2": [
        ("counts for weights", lambda **c: importance(**c, counts=True), VALUES_2),
        ("variance over E - 1", lambda **c: importance(**c, unbiased=True), VALUES_2),
        ("not squared", lambda **c: importance(**c, root=True), VALUES_2),
        ("an epsilon", lambda **c: importance(**c, eps=1e-10), VALUES_2),
        ("a clamp", lambda **c: importance(**c, least=1e-12), VALUES_2),
        ("a clamp below a billionth", lambda **c: importance(**c, least=1e-20), VALUES_2),
        ("idle experts left out", lambda **c: importance(**c, served_only=True), VALUES_2),
        ("weights normalised", lambda **c: importance(**c, each_token=True), VALUES_2),
        ("no gradient", lambda **c: importance(**c, detached=True), GRADIENT_2),
        ("a root: NaN in the gradient where all are even", importance_by_root, GRADIENT_2),
        ("0/0", lambda **c: importance(**c, where=False), LIMITS_2),
        ("one where: NaN in the gradient", importance_where_alone, LIMITS_2),
        (PACKAGE, lambda expert_ids, weights, num_experts: balance.importance_loss(routing_of(
            weights.new_zeros(len(weights), num_experts), expert_ids, weights)), VALUES_2),
    ],
    "03.3": [
        ("not squared", lambda logits: logits.logsumexp(-1).mean(), VALUES_3),
        ("square of the mean", lambda logits: logits.logsumexp(-1).mean().square(), VALUES_3),
        ("logits squared", lambda logits: logits.square().mean(), VALUES_3),
        ("sum over tokens", lambda logits: logits.logsumexp(-1).square().sum(), VALUES_3),
        ("over tokens, not experts", lambda logits: logits.logsumexp(0).square().mean(), VALUES_3),
        ("no gradient", z_detached, VALUES_3),
        ("exp overflows", z_naive, LARGE_3),
        ("computed in half precision", z_in_half, LARGE_3),
        ("returned in half precision", lambda logits: z_by_hand(logits).to(logits.dtype), LARGE_3),
        ("NaN without tokens", z_of_nothing, LIMITS_3),
        ("minus infinity counts as 0", z_without_infinity, LIMITS_3),
        ("minus infinity times 0", z_times_mask, LIMITS_3),
        (PACKAGE, balance.z_loss, VALUES_3),
    ],
    "03.4": [
        ("first choices of all first", kept_first_choices_first, FIRST_4),
        ("the last ones stay", kept_last_ones, FIRST_4),
        ("one place too few", kept_inclusive, FIRST_4),
        ("one capacity for all experts", kept_common, FIRST_4),
        ("nothing dropped", lambda expert_ids, real, **_: real[:, None].expand_as(expert_ids).clone(), FIRST_4),
        ("a mask of floats", lambda **c: kept_loop(**c).float(), FIRST_4),
        ("padding kept", kept_but_padding, PADDING_4),
        ("padding takes places", kept_padding_takes, PADDING_4),
        ("padding takes places as second choice", kept_padding_takes_second, PADDING_4),
        ("a token that lost all keeps its first choice", kept_with_last_resort, ZERO_4),
        ("at least one place", kept_at_least_one, ZERO_4),
        ("never as many as there are tokens", kept_below_all, ZERO_4),
        ("places counted in bfloat16", lambda **c: kept_in(torch.bfloat16, **c), ZERO_4),
        ("places counted in float16", lambda **c: kept_in(torch.float16, **c), ZERO_4),
        (PACKAGE, kept_by_the_package, FIRST_4),
    ],
    "03.5": [
        ("bias in the weights", lambda **c: biased(**c, weigh_bias=True), CHOICE_5),
        ("not normalised", lambda **c: biased(**c, normalise=False), CHOICE_5),
        ("softmax of the scores", lambda **c: biased(**c, softmax=True), CHOICE_5),
        ("bias ignored", lambda **c: biased(**c, ignore=True), CHOICE_5),
        ("upside down", lambda **c: biased(**c, rule="upside down"), UPDATE_5),
        ("in proportion", lambda **c: biased(**c, rule="proportional"), UPDATE_5),
        ("just the mean still moves", lambda **c: biased(**c, rule="never still"), UPDATE_5),
        ("centred", lambda **c: biased(**c, rule="centred"), UPDATE_5),
        ("only the busiest moves", lambda **c: biased(**c, rule="busiest only"), UPDATE_5),
        ("the mean of one choice", lambda **c: biased(**c, rule="of one token"), UPDATE_5),
        ("mean rounded down", lambda **c: biased(**c, rule="floor"), UPDATE_5),
        ("mean rounded", lambda **c: biased(**c, rule="round"), UPDATE_5),
        ("median for mean", lambda **c: biased(**c, rule="median"), UPDATE_5),
        ("middle for mean", lambda **c: biased(**c, rule="middle"), UPDATE_5),
        ("nearly the mean stays", lambda **c: biased(**c, rule="dead band"), UPDATE_5),
        ("load of weights", lambda **c: biased(**c, rule="weights"), UPDATE_5),
        ("load without the bias", lambda **c: biased(**c, rule="unbiased"), UPDATE_5),
        ("shares added up with rounding", biased_by_rounded_shares, UPDATE_5),
        ("load of scores", lambda **c: biased(**c, rule="scores"), UPDATE_5),
        ("topk breaks ties its own way", lambda **c: biased(**c, topk=True), LIMITS_5),
        ("no gradient", lambda **c: biased(**c, detached=True), LIMITS_5),
        ("a gradient into the next bias", biased_soft_load, LIMITS_5),
        ("moves without tokens", biased_always_first, LIMITS_5),
        (PACKAGE, biased_by_the_package, CHOICE_5),
    ],
    "03.6": [
        ("pooled over layers", report_pooled, LAYERS_6),
        ("dead in all layers together", report_pooled_dead, LAYERS_6),
        ("one mean for all layers", report_common_mean, LAYERS_6),
        ("max over mean", lambda counts: report(counts, minus=0.0), LAYERS_6),
        ("only idle ones are dead", report_idle_only, LAYERS_6),
        ("10 %", lambda counts: report(counts, share=0.1), LAYERS_6),
        ("the busiest of all layers", report_of(lambda load: load.max().expand(len(load)) if load.numel() else load.sum(1)), LAYERS_6),
        ("1 % of the busiest", report_of(reference=lambda load: load.amax(1)), LAYERS_6),
        ("1 % of the total", report_of(reference=lambda load: load.sum(1)), LAYERS_6),
        ("1 % of the median", report_of(reference=lambda load: load.median(1).values), LAYERS_6),
        ("dead with one assignment", report_of(reference=at_most_one), LAYERS_6),
        ("dead by the mean of all layers", report_of(reference=lambda load: load.mean().expand(len(load))), LAYERS_6),
        ("1 % of the mean of those that serve", report_of(reference=mean_of_serving), LAYERS_6),
        ("below 1 %", lambda counts: report(counts, strict=True), LIMITS_6),
        ("NaN hidden", report_hides_nan, LIMITS_6),
        ("an empty layer is even", report_clamped, LIMITS_6),
        ("deviation below counts, too", report_above_and_below, LIMITS_6),
        (PACKAGE, report_by_the_package, LAYERS_6),
    ],
    "03.7": [
        ("always healthy", lambda counts: "healthy", WORDS_7),
        ("pooled over layers", lambda counts: diagnosis(counts, pool=True), WORDS_7),
        ("one layer is enough", lambda counts: diagnosis(counts, collapse_any=True), WORDS_7),
        ("dead experts first", lambda counts: diagnosis(counts, dead_first=True), WORDS_7),
        ("half as strict", lambda counts: diagnosis(counts, above=5.0), WORDS_7),
        ("twice is uneven", lambda counts: diagnosis(counts, at_least=False), LINES_7),
        ("below 1 %", lambda counts: diagnosis(counts, strict=True), LINES_7),
        ("2 %", lambda counts: diagnosis(counts, share=0.02), LINES_7),
        ("empty layers are dead", lambda counts: diagnosis(counts, skip_empty=False), LINES_7),
        ("empty sequences count", lambda counts: diagnosis(counts, empty_sequences=True), LINES_7),
        ("all sequences", lambda counts: diagnosis(counts, every_sequence=True), LINES_7),
        ("more than half", lambda counts: diagnosis(counts, half_strict=True), LINES_7),
        ("idle in one sequence", lambda counts: diagnosis(counts, dead_in_sequence=True), LINES_7),
        ("sequences before dead experts", lambda counts: diagnosis(counts, dead_last=True), LINES_7),
        ("most layers are all layers", lambda counts: diagnosis(counts, most=True), WORDS_7),
        ("uneven by the mean of all layers", lambda counts: diagnosis(
            counts, uneven_of=lambda batch: batch.mean().expand(len(batch))), LINES_7),
        ("dead by the mean of all layers", lambda counts: diagnosis(
            counts, dead_of=lambda batch: batch.mean().expand(len(batch))), LINES_7),
        ("1 % of the busiest", lambda counts: diagnosis(counts, dead_of=lambda batch: batch.amax(1)), LINES_7),
        ("1 % of the median", lambda counts: diagnosis(counts, dead_of=lambda batch: batch.median(1).values), LINES_7),
        ("dead with one assignment", lambda counts: diagnosis(counts, dead_of=at_most_one), LINES_7),
        ("sequences by the mean of the batch", lambda counts: diagnosis(
            counts, alone_of=lambda load: load.mean((0, 2)).expand(len(load), -1)), LINES_7),
        ("sequences by the mean of their layers", lambda counts: diagnosis(
            counts, alone_of=lambda load: load.mean((1, 2))[:, None].expand(-1, load.shape[1])), LINES_7),
        ("sequences with assignments in another layer", lambda counts: diagnosis(
            counts, present_of=lambda load: (load.sum((1, 2)) > 0)[:, None].expand(-1, load.shape[1])), LINES_7),
        ("half of all layers' sequences", lambda counts: diagnosis(counts, sequences_pooled=True), LINES_7),
        (PACKAGE, diagnosis_by_the_package, WORDS_7),
    ],
    "03.8": [
        ("nothing done", nothing_done, CURED_8),
        ("nothing but a larger learning rate", faster_without_cure, CURED_8),
        ("not trained", untrained, CURED_8),
        ("even, without looking at the kind", even_and_blind, CURED_8),
        ("even, with experts all alike", one_matrix_for_all, CURED_8),
        ("an undecided router", uniform_router, CURED_8),
        ("weights of another scale", bias_in_the_gate, CURED_8),
        ("diverged", diverged, CURED_8),
        ("eight experts only", eight_only, AGAIN_8),
        (PACKAGE, cured_by_the_package, CURED_8),
    ],
}  # fmt: skip

RIGHT = {
    "03.1": [switch, switch_by_tokens, switch_by_covariance],
    "03.2": [importance, importance_by_moments],
    "03.3": [z_by_hand, z_by_log_softmax],
    "03.4": [kept_loop, kept_sorted, kept_by_expert],
    "03.5": [biased, biased_by_mask, biased_by_loop],
    "03.6": [report, report_fractions, report_shares],
    "03.7": [diagnosis, diagnosis_in_python],
    "03.8": [by_bias, by_loss, by_clusters],
}
