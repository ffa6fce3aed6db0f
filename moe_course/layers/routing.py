"""Routers: which experts serve which tokens, and with what weight.

A token-choice gate is a function `gate(logits, k, **options) -> Routing`; `TopKRouter`
is a matrix in front of one. In expert choice the experts pick tokens, so
`expert_choice` gives `Slots` at once. `layers.soft_moe` mixes all tokens.

What holds for every gate:

- Among equal scores the lowest expert id wins, on every device.
- The choice passes no gradient, the weights do; gates compute in the dtype of the
  logits.
- A logit of -inf forbids an expert: it is taken only when nothing else is left, and
  gets weight 0 then. A row of nothing but -inf is a row of equal logits.
- NaN ranks first, so a token with a NaN logit gets NaN weights where they depend on
  logits, and the loss shows it; its ids are still distinct and valid, so no kernel
  reads out of bounds. There is no check, because the answer would have to travel from
  the GPU to Python in every layer of every step.

Chapter: book/math/routing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Routing:
    """What a token-choice router decides; losses and metrics read it.

    expert_ids: the K experts of each token, the best first where scores choose.
    weights: what each of them multiplies its output with.
    probs: how the router spreads each token over all experts, rows that sum to 1.
    logits: the router's output before noise, bias and softmax.
    noisy_logits, noise_std: of noisy top-k in training; the load loss needs them.
    """

    expert_ids: Int[Tensor, "T K"]
    weights: Float[Tensor, "T K"]
    probs: Float[Tensor, "T E"]
    logits: Float[Tensor, "T E"]
    noisy_logits: Float[Tensor, "T E"] | None = None
    noise_std: Float[Tensor, "T E"] | None = None


@dataclass(frozen=True, eq=False)
class Slots:
    """What is computed: an entry for each pair of a token and an expert that serves it.

    Sorted by expert, in token order within one. A dropped token is absent.
    """

    token: Int[Tensor, " S"]
    expert: Int[Tensor, " S"]
    weight: Float[Tensor, " S"]


Gate = Callable[..., Routing]  # gate(logits, k, **options)


# --- Selection ---------------------------------------------------------------


@dataclass(frozen=True)
class Groups:
    """Limits each token to experts of few groups (devices, nodes): less traffic.

    The E experts form `count` groups of neighbours. A group's score is the sum of its
    `best` highest scores; a token chooses among the experts of its `kept` best groups.
    best=1, the maximum, is DeepSeek-V2 (arXiv:2405.04434, section 2.2.2), best=2
    DeepSeek-V3 (arXiv:2412.19437, section 2.1.2).
    """

    count: int
    kept: int
    best: int

    def __post_init__(self) -> None:
        if not 1 <= self.kept <= self.count:
            raise ValueError(
                f"kept must lie in 1..{self.count} (the number of groups), "
                f"got {self.kept}"
            )
        if self.best < 1:
            raise ValueError(f"best must be at least 1, got {self.best}")


def _require_k(k: int, num_experts: int) -> None:
    if not 1 <= k <= num_experts:
        raise ValueError(
            f"k must lie in 1..{num_experts} (the number of experts), got {k}"
        )


def select(
    scores: Float[Tensor, "T E"], k: int, groups: Groups | None = None
) -> Int[Tensor, "T K"]:
    """The ids of each token's k highest scores, best first, lower ids first among equals.

    Raises ValueError unless 1 <= k <= E and the groups fit: count divides E,
    best <= E/count, kept·E/count >= k.
    """
    num_experts = scores.shape[1]
    _require_k(k, num_experts)
    scores = scores.detach()
    if groups is None:
        return _stable_top_k(scores, k)
    candidates = _experts_of_kept_groups(scores, k, groups)  # [T, kept·E/count]
    return candidates.gather(1, _stable_top_k(scores.gather(1, candidates), k))


def _stable_top_k(scores: Tensor, k: int) -> Tensor:
    if not scores.is_cpu:  # to look for ties would make Python wait for the GPU
        return _sorted_ids(scores, k)
    # topk promises nothing about ties, but takes a third of the time. One more than k shows a tie for the last place.
    values, ids = scores.topk(min(k + 1, scores.shape[1]), dim=1)
    tied = (values[:, 1:] == values[:, :-1]).any(dim=1)  # [T]
    ids = ids[:, :k].contiguous()
    if tied.any():
        ids[tied] = _sorted_ids(scores[tied], k)
    return ids


def _sorted_ids(scores: Tensor, k: int) -> Tensor:
    # + 0.0 turns -0.0 into 0.0, which a sort by bits would put after it.
    ids = (scores + 0.0).sort(dim=1, descending=True, stable=True).indices
    return ids[:, :k].contiguous()


def _experts_of_kept_groups(scores: Tensor, k: int, groups: Groups) -> Tensor:
    num_experts = scores.shape[1]
    size, rest = divmod(num_experts, groups.count)
    if rest:
        raise ValueError(
            f"{groups.count} groups do not divide {num_experts} experts evenly"
        )
    if groups.best > size:
        raise ValueError(
            f"best must lie in 1..{size} (the experts of a group), got {groups.best}"
        )
    if groups.kept * size < k:
        raise ValueError(
            f"{groups.kept} groups of {size} experts hold fewer than k = {k}"
        )
    by_group = scores.reshape(-1, groups.count, size)  # [T, count, size]
    group_scores = by_group.topk(groups.best, dim=2).values.sum(dim=2)  # [T, count]
    # In ascending order, so that ties between their experts still go to the lowest id.
    kept = _stable_top_k(group_scores, groups.kept).sort(dim=1).values  # [T, kept]
    members = torch.arange(size, device=scores.device)
    return (kept[:, :, None] * size + members).flatten(1)


def _softmax(logits: Tensor) -> Tensor:
    # Without the clamp a row of nothing but -inf gives 0/0.
    return logits.clamp(min=torch.finfo(logits.dtype).min).softmax(dim=1)


# --- Token-choice gates ------------------------------------------------------


def softmax_top_k(
    logits: Float[Tensor, "T E"],
    k: int,
    *,
    scale: float = 1.0,
    groups: Groups | None = None,
) -> Routing:
    """The k highest probabilities as they are (Switch with k = 1: arXiv:2101.03961,
    section 2.1; OLMoE, DeepSeek-V2).

        p = softmax(l),   w_i = scale · p_i   for i in TopK(p)

    The weights sum to less than 1 unless k = E, and their gradient reaches every logit.
    OLMoE: arXiv:2409.02060. DeepSeek-V2 (arXiv:2405.04434, section 2.2; its config):
    scale 16 and Groups(8, kept=3, best=1).

    Raises ValueError as `select` does.
    """
    probs = _softmax(logits)
    # Softmax keeps the order, so the logits choose: exp may round two of them together.
    expert_ids = select(probs if groups else logits, k, groups)
    return Routing(expert_ids, scale * probs.gather(1, expert_ids), probs, logits)


def renormalised(
    logits: Float[Tensor, "T E"],
    k: int,
    *,
    scale: float = 1.0,
    groups: Groups | None = None,
) -> Routing:
    """The k highest probabilities, divided by their sum (Qwen3, norm_topk_prob in its
    config: arXiv:2505.09388; Mixtral as `transformers` runs it).

        p = softmax(l),   w_i = scale · p_i / sum_{j in S} p_j   for i in S = TopK(p)

    With scale 1 this is `top_k_softmax`, in value and in gradient: the sum over all
    experts cancels.

    Raises ValueError as `select` does.
    """
    probs = _softmax(logits)
    expert_ids = select(probs if groups else logits, k, groups)
    chosen = probs.gather(1, expert_ids)  # [T, K]
    weights = scale * chosen / chosen.sum(dim=1, keepdim=True)
    return Routing(expert_ids, weights, probs, logits)


def top_k_softmax(logits: Float[Tensor, "T E"], k: int) -> Routing:
    """A softmax over the k highest logits alone (Mixtral: arXiv:2401.04088, section
    2.1; gpt-oss: arXiv:2508.10925).

        w = softmax(l_S)   for S = TopK(l)

    Logits outside S get no gradient; for k = 1 the weight is 1 and none gets any.

    Raises ValueError unless 1 <= k <= E.
    """
    expert_ids = select(logits, k)
    weights = _softmax(logits.gather(1, expert_ids))
    return Routing(expert_ids, weights, _softmax(logits), logits)


def sigmoid_top_k(
    logits: Float[Tensor, "T E"],
    k: int,
    *,
    correction: Float[Tensor, " E"] | None = None,
    normalise: bool = True,
    scale: float = 1.0,
    groups: Groups | None = None,
) -> Routing:
    """Sigmoid scores with a bias that takes part in the choice only (DeepSeek-V3:
    arXiv:2412.19437, section 2.1.2).

        s = sigmoid(l),   w_i = scale · s_i / sum_{j in S} s_j   for i in S,
        S = TopK(s + correction)

    The correction balances the load without a loss (arXiv:2408.15664): it is set after
    each step, never learned, and the weights do not contain it. With normalise=False
    w_i = scale · s_i. `probs` is s divided by its sum over all experts, as the paper's
    balance loss has it. DeepSeek-V3 (its config): scale 2.5 and
    Groups(8, kept=4, best=2).

    Raises ValueError as `select` does.
    """
    scores = logits.sigmoid()
    biased = scores if correction is None else scores + correction
    expert_ids = select(biased, k, groups)
    weights = scores.gather(1, expert_ids)  # not of `biased`
    if normalise:
        weights = _divided_by_sum(weights)
    return Routing(expert_ids, scale * weights, _divided_by_sum(scores), logits)


def _divided_by_sum(scores: Tensor) -> Tensor:
    # 1e-20: sigmoid underflows to 0 in float32 below -104, and all may be 0.
    return scores / (scores.sum(dim=1, keepdim=True) + 1e-20)


def noisy_top_k(
    logits: Float[Tensor, "T E"],
    k: int,
    *,
    noise_logits: Float[Tensor, "T E"] | None = None,
) -> Routing:
    """Top-k after noise whose size is learned (Shazeer et al., arXiv:1701.06538,
    section 2.1).

        h = l + ε · softplus(noise_logits),  ε ~ N(0, 1)
        w = softmax(h_S)   for S = TopK(h)

    The noise spreads tokens over experts and makes the load differentiable (the paper's
    appendix A). noise_logits=None means no noise, as in evaluation. `probs` is the
    softmax of the clean logits over all experts.

    Raises ValueError unless 1 <= k <= E.
    """
    noisy, std = logits, None
    if noise_logits is not None:
        std = F.softplus(noise_logits)
        noisy = logits + torch.randn_like(logits) * std
    expert_ids = select(noisy, k)
    weights = _softmax(noisy.gather(1, expert_ids))
    probs = _softmax(logits)
    return Routing(
        expert_ids, weights, probs, logits, None if std is None else noisy, std
    )


def hashed(
    logits: Float[Tensor, "T E"],
    k: int,
    *,
    token_ids: Int[Tensor, " T"],
    table: Int[Tensor, "V K"],
    learned: bool = True,
) -> Routing:
    """The experts of a token are looked up by its vocabulary id and never change (Hash
    layers, arXiv:2106.04426).

        S = table[token_id],   w_i = softmax(l)_i   for i in S (learned=False: 1/k)

    Raises ValueError if the table's rows do not hold k experts.
    """
    if table.ndim != 2 or table.shape[1] != k:
        raise ValueError(
            f"table must be [V, K] with K = k = {k}, got {list(table.shape)}"
        )
    expert_ids, probs = table[token_ids], _softmax(logits)
    weights = probs.gather(1, expert_ids)
    if not learned:
        weights = torch.full_like(weights, 1 / k)
    return Routing(expert_ids, weights, probs, logits)


def hash_table(vocab: int, num_experts: int, k: int) -> Int[Tensor, "V K"]:
    """A random table for `hashed`: k different experts per vocabulary id, each expert
    in k·V/E rows, up to rounding.

    That balances the vocabulary. Tokens follow Zipf's law, so the load is not balanced.

    Raises ValueError unless 1 <= k <= E.
    """
    _require_k(k, num_experts)
    first = torch.randperm(vocab) % num_experts
    return (first[:, None] + torch.arange(k)) % num_experts


def balanced_random(logits: Float[Tensor, "T E"], k: int) -> Routing:
    """Random experts and a perfectly even load, for benchmarks: it learns nothing.

    Token t gets experts (k·π(t) + j) mod E for j < k, π a random permutation: each
    expert serves T·k/E tokens, up to rounding. w_i = softmax(l)_i, so that the logits
    have a gradient to be timed.

    Raises ValueError unless 1 <= k <= E.
    """
    tokens, num_experts = logits.shape
    _require_k(k, num_experts)
    order = torch.randperm(tokens, device=logits.device)
    slots = order[:, None] * k + torch.arange(k, device=logits.device)  # [T, K]
    expert_ids, probs = slots % num_experts, _softmax(logits)
    return Routing(expert_ids, probs.gather(1, expert_ids), probs, logits)


def sinkhorn_top_k(
    logits: Float[Tensor, "T E"], k: int, *, greedy: bool = False
) -> Routing:
    """Top-k of the transport plan nearest to the logits that loads all experts evenly
    (S-BASE, arXiv:2202.01169).

        S = TopK(Π),   w_i = sigmoid(l)_i if k = 1, else softmax(l)_i   for i in S

    Π (`sinkhorn_log_plan`) looks at all tokens at once, so the choice is not causal;
    greedy=True, for evaluation, takes S = TopK(l). Even mass in Π does not force even
    counts: for those see `base_assignment`.

    Raises ValueError unless 1 <= k <= E.
    """
    expert_ids = select(logits if greedy else sinkhorn_log_plan(logits), k)
    probs = _softmax(logits)
    weights = (logits.sigmoid() if k == 1 else probs).gather(1, expert_ids)
    return Routing(expert_ids, weights, probs, logits)


@torch.no_grad()
def sinkhorn_log_plan(
    logits: Float[Tensor, "T E"], tolerance: float = 1e-4, max_iterations: int = 100
) -> Float[Tensor, "T E"]:
    """log Π for Π = diag(u) exp(l) diag(v) with row sums 1/T and column sums 1/E
    (Sinkhorn's algorithm).

    Rows and columns are scaled in turn until every column sum is within `tolerance` of
    1/E, relative. In logarithms, because exp(l) overflows float32 at l = 89.
    """
    tokens, num_experts = logits.shape
    log_plan = logits
    for _ in range(max_iterations):
        log_plan = log_plan - _log_sum(log_plan, dim=1) - math.log(max(tokens, 1))
        excess = _log_sum(log_plan, dim=0) + math.log(num_experts)  # [1, E]
        if excess.abs().max() <= tolerance:
            break
        log_plan = log_plan - excess
    return log_plan


def _log_sum(log_plan: Tensor, dim: int) -> Tensor:
    total = log_plan.logsumexp(dim=dim, keepdim=True)
    # A row or column of nothing but -inf cannot be scaled: leave it as it is.
    return total.masked_fill(total == -torch.inf, 0.0)


def base_assignment(
    logits: Float[Tensor, "T E"], k: int, *, greedy: bool = False
) -> Routing:
    """The assignment of highest total score under an even load (BASE layers,
    arXiv:2103.16716, section 3).

        max over S of  sum_t l_{t,S(t)}   with T/E tokens on each expert,
        w = sigmoid(l_S)

    T/E up to rounding. Solved exactly by scipy on the CPU, in O(T³): for study, not for
    speed. Not causal; greedy=True, for evaluation, takes each token's highest logit.

    Raises ValueError unless k = 1 and the logits are finite, ImportError without scipy.
    """
    if k != 1:
        raise ValueError(f"BASE gives each token one expert, so k must be 1, got {k}")
    expert_ids = select(logits, 1) if greedy else _assign(logits)  # [T, 1]
    weights = logits.sigmoid().gather(1, expert_ids)
    return Routing(expert_ids, weights, _softmax(logits), logits)


def _assign(logits: Tensor) -> Tensor:
    try:
        from scipy.optimize import (  # type: ignore[import-untyped]
            linear_sum_assignment,
        )
    except ImportError as error:
        raise ImportError("base_assignment needs scipy: pip install scipy") from error
    tokens, num_experts = logits.shape
    scores = logits.detach().double().cpu()
    if not scores.isfinite().all():
        raise ValueError(
            "base_assignment needs finite logits: an even load cannot forbid an expert"
        )
    # Column c is place c % places of expert c // places. Where E does not divide T, idle rows fill the last place of
    # some experts, and only that, so no expert gets less than its share.
    places = -(-tokens // num_experts)
    idle = torch.full((num_experts * places - tokens, num_experts, places), -torch.inf)
    idle[:, :, -1:] = 0.0
    scores = torch.cat([scores.repeat_interleave(places, 1), idle.double().flatten(1)])
    columns = linear_sum_assignment(scores.numpy(), maximize=True)[1][:tokens]
    expert_ids = torch.from_numpy(columns).to(logits.device) // max(places, 1)
    return expert_ids[:, None]


# --- Expert choice -----------------------------------------------------------


def expert_choice(logits: Float[Tensor, "T E"], capacity: int) -> Slots:
    """Each expert takes the tokens that want it most (arXiv:2202.09368, section 3.2).

        p = softmax(l),   w_te = p_te   for the `capacity` tokens t of highest p_te

    The load is even by construction; a token is served by any number of experts, none
    included. The paper's capacity is T·c/E; c, its capacity factor, is the mean number
    of experts per token. Not causal: whether a token is served depends on the tokens
    after it, so a decoder trained this way sees the future. Among equal probabilities
    the first token wins.

    Raises ValueError unless 0 <= capacity <= T.
    """
    tokens, num_experts = logits.shape
    if not 0 <= capacity <= tokens:
        raise ValueError(
            f"capacity must lie in 0..{tokens} (the number of tokens), got {capacity}"
        )
    by_expert = _softmax(logits).T  # [E, T]
    token = _stable_top_k(by_expert.detach(), capacity).sort(dim=1).values  # [E, C]
    expert = torch.arange(num_experts, device=logits.device).repeat_interleave(capacity)
    return Slots(token.flatten(), expert, by_expert.gather(1, token).flatten())


# --- Modules -----------------------------------------------------------------


def router_logits(
    x: Float[Tensor, "T D"],
    weight: Float[Tensor, "E D"],
    bias: Float[Tensor, " E"] | None = None,
) -> Float[Tensor, "T E"]:
    """x W^T + b in float32 or better, as Switch has it for stable training
    (arXiv:2101.03961, section 2.4).

    In bfloat16, experts whose logits lie close change places.

    Raises ValueError unless x is [T, D].
    """
    if x.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x must be [T, {weight.shape[1]}], got {list(x.shape)}")
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float)
    # Autocast would send the float32 product back to bfloat16. (It knows no meta device.)
    with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
        return F.linear(
            x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        )


def jittered(x: Float[Tensor, "T D"], amount: float) -> Float[Tensor, "T D"]:
    """x ⊙ u with u uniform in [1 - amount, 1 + amount], in float32 or better.

    Switch: arXiv:2101.03961, appendix C.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * torch.empty_like(x).uniform_(1 - amount, 1 + amount)


class TopKRouter(nn.Module):
    """A router matrix and a token-choice gate.

        Routing = gate(x W^T + b, k, **options)

    gate: one of this module's gates, or any function
        `gate(logits, k, **options) -> Routing`.
    bias: adds b [E] to the logits, learned (gpt-oss).
    jitter: in training multiplies the router's input, not the experts', by uniform
        noise (`jittered`).
    options: passed to the gate, as scale=2.5 (here, not by functools.partial, which
        hides the gate).

    Some gates need more than logits, and get it here: `sigmoid_top_k` the buffer
    `correction` [E], 0 until a balancing rule sets it; `noisy_top_k` a second matrix
    `noise_weight` [E, D], in training only; `hashed` the buffer `table` [V, K], given
    as an option, and token ids at each call; `sinkhorn_top_k` and `base_assignment`
    greedy=True in evaluation.

    Parameters: E·D, with bias E more, with noise E·D more. Raises ValueError on k
    outside 1..E, a jitter outside [0, 1) and a table that does not hold k ids of 0..E-1
    in each row.
    """

    correction: Tensor | None
    table: Tensor | None

    def __init__(
        self,
        width: int,
        num_experts: int,
        k: int,
        gate: Gate = renormalised,
        *,
        bias: bool = False,
        jitter: float = 0.0,
        table: Int[Tensor, "V K"] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        _require_k(k, num_experts)
        if not 0 <= jitter < 1:
            raise ValueError(f"jitter must lie in [0, 1), got {jitter}")
        if (table is not None) != (gate is hashed):
            raise ValueError("table is what the gate `hashed` needs, and no other gate")
        if table is not None and (
            table.ndim != 2
            or table.shape[1] != k
            or not ((table >= 0) & (table < num_experts)).all()
        ):
            raise ValueError(
                f"table must be [V, {k}] with expert ids in 0..{num_experts - 1}"
            )
        self.k, self.gate, self.jitter, self.options = k, gate, jitter, options
        shape = (num_experts, width)
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(num_experts)) if bias else None
        noisy, biased = gate is noisy_top_k, gate is sigmoid_top_k
        self.noise_weight = nn.Parameter(torch.empty(shape)) if noisy else None
        self.register_buffer("correction", torch.empty(num_experts) if biased else None)
        self.register_buffer("table", table)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """W from N(0, 0.02²), the rest 0.

        Noise then has the same size, softplus(0) = 0.69, for every expert.
        """
        nn.init.normal_(self.weight, std=0.02)
        for rest in (self.bias, self.noise_weight, self.correction):
            if rest is not None:
                nn.init.zeros_(rest)

    def forward(
        self, x: Float[Tensor, "T D"], token_ids: Int[Tensor, " T"] | None = None
    ) -> Routing:
        """token_ids: the vocabulary ids of the tokens; only `hashed` reads them."""
        if self.training and self.jitter:
            x = jittered(x, self.jitter)
        logits = router_logits(x, self.weight, self.bias)
        return self.gate(logits, self.k, **self.options, **self._inputs(x, token_ids))

    def _inputs(self, x: Tensor, token_ids: Tensor | None) -> dict[str, Any]:
        if self.gate is sigmoid_top_k:
            return {"correction": self.correction}
        if self.gate is noisy_top_k and self.training:
            assert self.noise_weight is not None
            return {"noise_logits": router_logits(x, self.noise_weight)}
        if self.gate is hashed:
            if token_ids is None:
                raise ValueError("the gate `hashed` needs token_ids, got None")
            return {"token_ids": token_ids, "table": self.table}
        if self.gate in (sinkhorn_top_k, base_assignment):
            return {"greedy": not self.training}
        return {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Keeps `correction` out of .bfloat16() and .half(): steps of 0.001 would vanish beside a value of 1.
        before = self.correction
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        after = self.correction
        if before is not None and after is not None and after.dtype.itemsize < 4:
            self.correction = before.to(after.device)
        return self

    def extra_repr(self) -> str:
        num_experts, width = self.weight.shape
        options = "".join(f", {key}={value!r}" for key, value in self.options.items())
        return f"{width}, {num_experts}, k={self.k}, gate={self.gate.__name__}{options}"


class ExpertChoiceRouter(nn.Module):
    """A router matrix in front of `expert_choice`.

        capacity = ceil(capacity_factor · T·K/E), at most T

    Parameters: E·D. Raises ValueError on k outside 1..E and a capacity factor that is
    not positive.
    """

    def __init__(
        self, width: int, num_experts: int, k: int, capacity_factor: float = 1.0
    ) -> None:
        super().__init__()
        _require_k(k, num_experts)
        if capacity_factor <= 0:
            raise ValueError(f"capacity_factor must be positive, got {capacity_factor}")
        self.k, self.capacity_factor = k, capacity_factor
        self.weight = nn.Parameter(torch.empty(num_experts, width))
        nn.init.normal_(self.weight, std=0.02)

    def forward(
        self, x: Float[Tensor, "T D"], token_ids: Int[Tensor, " T"] | None = None
    ) -> Slots:
        """token_ids: not read; there so that all routers are called alike."""
        logits = router_logits(x, self.weight)
        share = len(x) * self.k / len(self.weight)
        # Less a billionth: 1.1 · 10 is a little more than 11 in floating point.
        capacity = math.ceil(self.capacity_factor * share - 1e-9)
        return expert_choice(logits, min(len(x), capacity))

    def extra_repr(self) -> str:
        num_experts, width = self.weight.shape
        return f"{width}, {num_experts}, k={self.k}, capacity_factor={self.capacity_factor}"
