"""How far a router has moved: which choices are still the same, and how its probabilities changed.

Chapter: book/finetuning/drift.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moe_course.balance import router_saturation
from moe_course.layers import MoE, Routing


def router_kl(
    before: Float[Tensor, "T E"], after: Float[Tensor, "T E"]
) -> Float[Tensor, " T"]:
    """KL(before ‖ after) of each token's probabilities, in nats, from the logits: what agreement does not see.

    sum over e of p_e · (log p_e - log q_e); NaN where a logit is -inf
    """
    log_p = before.double().log_softmax(-1)
    log_q = after.double().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@dataclass(frozen=True)
class Drift:
    """Of one sparse layer, means over tokens."""

    agreement: float  # share of a token's experts that are still its experts (`balance.router_saturation`)
    kl: float  # KL(before ‖ after) in nats
    load_before: list[float]  # share of the assignments by expert
    load_after: list[float]


def drift_of(before: Routing, after: Routing) -> Drift:
    """Compare two routings of the same tokens; without tokens agreement and KL are NaN."""
    experts = before.logits.shape[1]

    def load(ids: Tensor) -> list[float]:
        counts = torch.bincount(ids[ids < experts].flatten(), minlength=experts)
        return (counts / max(1, int(counts.sum()))).tolist()

    return Drift(
        router_saturation(before.expert_ids, after.expert_ids).item(),
        router_kl(before.logits, after.logits).mean().item(),
        load(before.expert_ids),
        load(after.expert_ids),
    )


@torch.no_grad()
def router_drift(
    before: nn.Module, after: nn.Module, token_ids: Int[Tensor, "B S"]
) -> list[Drift]:
    """Drift of every sparse layer between two models that map token ids to (logits, routings), on the same text.

    What a layer's router sees changes with the layers below it, so a frozen router drifts as well.
    """
    routings: list[Sequence[Routing]] = []
    for model in (before, after):
        training = model.training
        model.eval()
        routings.append(model(token_ids)[1])
        model.train(training)
    return [drift_of(b, a) for b, a in zip(*routings, strict=True)]


@contextmanager
def replayed_routes(model: nn.Module, routings: Sequence[Routing]) -> Iterator[None]:
    """Within it every sparse layer uses the experts that `routings` chose for the same tokens, layer by layer.

        w_e = exp(l_e) / sum over the replayed experts of exp(l)        l: the model's own logits

    So a model that was tuned can be read with the choices from before, and R3 trains with the choices that the
    inference engine made (arXiv:2510.11370, section 4). With the model's own choices nothing changes where its gate
    is `renormalised` or `top_k_softmax`. Raises ValueError where layers, tokens or experts do not fit.
    """
    layers = [m for m in model.modules() if isinstance(m, MoE)]
    if len(layers) != len(routings):
        raise ValueError(
            f"the model has {len(layers)} sparse layers, got routings of {len(routings)}"
        )

    def hook(ids: Tensor, experts: int, made: Routing) -> Routing:
        if len(ids) != len(made.logits) or experts != made.logits.shape[1]:
            raise ValueError(
                f"the routing is of {len(ids)} tokens and {experts} experts, "
                f"the layer has {len(made.logits)} and {made.logits.shape[1]}: replay it on the same text"
            )
        # A choice of no expert has the id E; its weight is never used.
        padded = F.pad(made.logits, (0, 1), value=torch.finfo(made.logits.dtype).min)
        return replace(
            made, expert_ids=ids, weights=padded.gather(1, ids).softmax(dim=1)
        )

    handles = [
        layer.router.register_forward_hook(
            lambda _m, _x, made, old=old: hook(
                old.expert_ids, old.logits.shape[1], made
            )
        )
        for layer, old in zip(layers, routings, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def relevant_experts(
    routing: Routing, share: float, by: str = "weight"
) -> Bool[Tensor, " E"]:
    """The fewest experts that carry `share` of a domain's routing (ESFT: arXiv:2407.01906, section 3.2).

    by: "weight", the mean gate weight, or "tokens", the share of the assignments. Among equals the lower number is
        taken; without tokens none is. Raises ValueError on another word and on a share outside 0..1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must lie in 0..1, got {share}")
    if by not in ("weight", "tokens"):
        raise ValueError(f"by must be 'weight' or 'tokens', got {by!r}")
    experts = routing.logits.shape[1]
    weights = routing.weights.double()
    each = weights if by == "weight" else torch.ones_like(weights)
    taken = routing.expert_ids < experts
    score = each.new_zeros(experts).index_put(
        (routing.expert_ids[taken],), each[taken], accumulate=True
    )
    score = score / score.sum()
    order = score.argsort(descending=True, stable=True)
    before = score[order].cumsum(0) - score[order]
    chosen = torch.zeros(experts, dtype=torch.bool, device=score.device)
    chosen[order[before < share - 1e-12]] = True
    return chosen
