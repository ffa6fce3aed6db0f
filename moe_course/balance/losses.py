"""Losses that keep the load of the experts even, and the router's logits small.

All are for one layer, and 0 without tokens. Of several layers take the mean of their losses, never the loss of their
pooled counts: layers that have collapsed, each onto experts of its own, pool to a perfect score.

`mask` leaves out padding (False). An expert id of E is a choice of no expert: it counts among the T·K assignments, and
for no expert.

Chapter: book/balancing/losses.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_course.layers import Routing


def assignments(
    routing: Routing, mask: Bool[Tensor, " T"] | None = None
) -> Int[Tensor, " E"]:
    """How many of the T·K assignments each expert received. Decisions have no gradient."""
    experts = routing.probs.shape[1]
    ids = routing.expert_ids if mask is None else routing.expert_ids[mask]
    return torch.bincount(ids.flatten(), minlength=experts)[:experts]


def load_balancing_loss(
    routing: Routing,
    num_experts: int,
    *,
    mask: Bool[Tensor, " T"] | None = None,
    divide_by_k: bool = True,
    counts: Int[Tensor, " E"] | None = None,
) -> Float[Tensor, ""]:
    """The balancing loss of one layer (Switch Transformer, arXiv:2101.03961, section 2.2; 1/K added for K > 1).

        E · sum over e of f_e · P_e        f_e = assignments to e / (T·K)      P_e = mean over tokens of p_e

    1 where f or P is uniform, E/K where all is on K experts, and below 1 where f and P
    are anti-correlated. Gradient flows through P alone: f counts decisions. It is a sum over the
    experts: their mean would be E times too small.

    divide_by_k: False gives f_e = assignments to e / T, as `transformers` has it: K
        times as large.
    counts: the assignments that f is made of, where these are not those of `routing`:
        of several batches or ranks, see `global_counts`.

    Raises ValueError when num_experts is not the width of routing.probs.
    """
    if routing.probs.shape[-1] != num_experts:
        raise ValueError(
            f"routing.probs has {routing.probs.shape[-1]} experts, num_experts is {num_experts}"
        )
    k = routing.expert_ids.shape[1]
    probs = routing.probs if mask is None else routing.probs[mask]
    if counts is None:
        counts, total = assignments(routing, mask), len(probs) * k
    else:
        total = int(counts.sum())
    f = counts.to(probs.dtype) / max(1, total)
    p = probs.sum(dim=0) / max(1, len(probs))
    loss = num_experts * (f * p).sum()
    return loss if divide_by_k else k * loss


@torch.no_grad()
def global_counts(
    routing: Routing,
    mask: Bool[Tensor, " T"] | None = None,
    before: Int[Tensor, " E"] | None = None,
) -> Int[Tensor, " E"]:
    """Assignments summed over all ranks, and over earlier micro-batches: the f of a global batch (arXiv:2501.11873).

    before: what this function returned for the micro-batches before. Without
    `torch.distributed` running there is one rank.
    """
    counts = assignments(routing, mask)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(counts)
    return counts if before is None else counts + before


def sequence_balancing_loss(
    routing: Routing, num_experts: int, sequences: int
) -> Float[Tensor, ""]:
    """`load_balancing_loss` of each sequence by itself, mean over them (DeepSeek-V3, arXiv:2412.19437, eq. 17-20).

    The T tokens are `sequences` sequences of equal length, one after the other. Raises
    ValueError where they do not divide T.
    """
    tokens, k = routing.expert_ids.shape
    if sequences < 1 or tokens % sequences:
        raise ValueError(
            f"{tokens} tokens are no {sequences} sequences of equal length"
        )
    if routing.probs.shape[-1] != num_experts:
        raise ValueError(
            f"routing.probs has {routing.probs.shape[-1]} experts, num_experts is {num_experts}"
        )
    ids = routing.expert_ids.reshape(sequences, -1)  # [B, S·K]
    counts = routing.probs.new_zeros(sequences, num_experts + 1)
    counts.scatter_add_(1, ids, torch.ones_like(ids, dtype=counts.dtype))
    length = max(1, tokens // sequences)
    f = counts[:, :num_experts] / (length * k)
    p = routing.probs.reshape(sequences, -1, num_experts).sum(dim=1) / length
    return num_experts * (f * p).sum(dim=1).mean()


def device_balancing_loss(routing: Routing, num_devices: int) -> Float[Tensor, ""]:
    """The loss over groups of experts that live together (DeepSeekMoE, arXiv:2401.06066, equations 15-17).

        sum over d of f'_d · P'_d        f'_d = mean of E·f_e, P'_d = sum of P_e, over the experts e of device d

    1 where the devices are loaded evenly, however uneven their own experts are. Device
    d holds experts d·E/devices up to (d + 1)·E/devices. Raises ValueError where the
    devices do not divide E.
    """
    experts = routing.probs.shape[1]
    if num_devices < 1 or experts % num_devices:
        raise ValueError(f"{num_devices} devices do not divide {experts} experts")
    counts = assignments(routing).to(routing.probs.dtype)
    f = experts * counts / max(1, routing.expert_ids.numel())
    p = routing.probs.sum(dim=0) / max(1, len(routing.probs))
    shape = (num_devices, experts // num_devices)
    return (f.view(shape).mean(dim=1) * p.view(shape).sum(dim=1)).sum()


def squared_cv(values: Float[Tensor, " E"]) -> Float[Tensor, ""]:
    """The squared coefficient of variation: variance / mean², over all values; 0 where the mean is 0.

    The variance divides by E: 0 for equal values, E - 1 for all on one.
    """
    mean = values.mean()
    spread = (values - mean).square().mean()
    # 0/0 without tokens: the double where keeps NaN out of the gradient, too.
    safe = torch.where(mean == 0, torch.ones_like(mean), mean)
    return torch.where(mean == 0, torch.zeros_like(mean), spread / safe.square())


def importance_loss(routing: Routing) -> Float[Tensor, ""]:
    """CV² of the experts' importance, the sum of the weights that they serve with (arXiv:1701.06538, equations 6-7).

        importance_e = sum over tokens t with e in S_t of w_te

    Equal importance may hide unequal load: few tokens of large weight, or many of
    small. Scores of several ranks are not pooled.
    """
    tokens, experts = routing.probs.shape
    weights = routing.weights.new_zeros(tokens, experts + 1)
    weights = weights.scatter_add(1, routing.expert_ids, routing.weights)
    return squared_cv(weights[:, :experts].sum(dim=0))


def load_loss(routing: Routing) -> Float[Tensor, ""]:
    """CV² of a smooth estimate of the load of noisy top-k (arXiv:1701.06538, appendix A).

        load_e = sum over t of Phi((l_te - threshold_te) / std_te)

    the probability that e would be chosen if its noise were drawn once more, all other
    noise kept: the threshold is the k-th largest noisy logit of the others. Unlike
    counts it has a gradient. With K = E every expert is chosen, and the loss is 0.

    Raises ValueError without noise: use `noisy_top_k` in training.
    """
    if routing.noisy_logits is None or routing.noise_std is None:
        raise ValueError(
            "load_loss needs the noise of noisy_top_k in training; this routing has none"
        )
    k, experts = routing.expert_ids.shape[1], routing.logits.shape[1]
    if k == experts:
        return squared_cv(routing.logits.sum(dim=0) * 0 + 1)
    noisy = routing.noisy_logits
    top = noisy.topk(k + 1, dim=1).values
    inside = noisy >= top[:, k - 1 : k]
    # Of the others the k-th: for a chosen one that is the (k + 1)-th of all.
    threshold = torch.where(inside, top[:, k:], top[:, k - 1 : k])
    z = (routing.logits - threshold) / routing.noise_std
    return squared_cv(torch.special.ndtr(z).sum(dim=0))


def z_loss(
    logits: Float[Tensor, "T E"], mask: Bool[Tensor, " T"] | None = None
) -> Float[Tensor, ""]:
    """Mean over tokens of (log sum over e of exp l_e)² (ST-MoE, arXiv:2202.08906, equation 5).

    Keeps logits small, so that rounding them changes little; it balances nothing. Computed in float32 or better.
    """
    if mask is not None:
        logits = logits[mask]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.logsumexp(dim=1).square().sum() / max(1, len(logits))
