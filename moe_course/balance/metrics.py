"""How even a load is, and what experts have come to do. Counts are assignments per expert.

Chapters: book/balancing/collapse, book/balancing/specialisation.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_course.balance.losses import squared_cv
from moe_course.layers import Experts, Routing, Slots
from moe_course.layers.dispatch import loop

# --- Balance -------------------------------------------------------------------------


def load_entropy(counts: Int[Tensor, " E"]) -> float:
    """Entropy of the load as a share of the greatest possible: 1 for an even load, 0 for all on one expert.

    - sum over e of f_e ln f_e / ln E        f_e = c_e / sum of c

    exp(ln E · entropy) is the number of experts that would, evenly loaded, have the
    same entropy. 1 for E = 1; NaN without assignments.
    """
    if len(counts) == 1:
        return 1.0
    f = counts.double() / counts.sum()
    return float(torch.special.entr(f).sum() / math.log(len(counts)))


def max_violation(counts: Int[Tensor, " E"]) -> float:
    """How far the busiest expert is above its share: max c_e / mean - 1 (MaxVio, arXiv:2408.15664, section 4.1).

    0 for an even load, E - 1 for all on one; NaN without assignments.
    """
    return float(counts.max() / counts.double().mean() - 1)


def load_cv(counts: Int[Tensor, " E"]) -> float:
    """Standard deviation over mean of the load: 0 for an even one, sqrt(E - 1) for all on one expert."""
    return math.sqrt(float(squared_cv(counts.double())))


def dead_experts(counts: Int[Tensor, " E"], below: float = 0.01) -> int:
    """How many experts receive at most `below` of an even share: too little to learn from.

    Of counts over enough tokens: with few, an expert may be idle by chance. All of
    them without assignments.
    """
    return int((counts <= below * counts.double().mean()).sum())


def drop_rate(
    routing: Routing, slots: Slots, mask: Bool[Tensor, " T"] | None = None
) -> float:
    """Share of the assignments that no expert computed, for want of capacity. 0 without assignments.

    mask: False marks padding, whose assignments never count.
    """
    ids = routing.expert_ids if mask is None else routing.expert_ids[mask]
    wanted = int((ids < routing.probs.shape[1]).sum())
    return 1 - len(slots.token) / wanted if wanted else 0.0


# --- Specialisation ------------------------------------------------------------------


def class_counts(
    routing: Routing, classes: Int[Tensor, " T"], num_classes: int
) -> Int[Tensor, "classes E"]:
    """Assignments by class of the token and expert. A class is a domain, a token id, a part of speech.

    Row by row divided by its sum, this is the domain or vocabulary specialisation of
    OLMoE (arXiv:2409.02060, section 5.3 and 5.4) up to its factor K. Raises ValueError
    on classes outside 0..C-1.
    """
    tokens, k = routing.expert_ids.shape
    if len(classes) != tokens:
        raise ValueError(f"one class for each of {tokens} tokens, got {len(classes)}")
    if tokens and not 0 <= classes.min() <= classes.max() < num_classes:
        raise ValueError(
            f"classes must lie in 0..{num_classes - 1}, "
            f"got {classes.min().item()}..{classes.max().item()}"
        )
    wide = routing.probs.shape[1] + 1  # one more for `no expert`
    pairs = classes.repeat_interleave(k) * wide + routing.expert_ids.flatten()
    table = torch.bincount(pairs, minlength=num_classes * wide)
    return table.view(num_classes, wide)[:, :-1]


def mutual_information(table: Int[Tensor, "classes E"]) -> float:
    """Bits that the class of a token tells about its expert, from their counts.

        sum over c, e of p_ce · log2(p_ce / (p_c · p_e))

    0 where the experts do not depend on the class, at most log2 of the smaller of C and
    E. Of counts it is too large by about (C-1)(E-1) / (2 N ln 2) bits, N assignments
    (Miller 1955): compare with the same tokens under shuffled classes. 0 without
    assignments.
    """
    p = table.double() / max(1, int(table.sum()))
    by_class, by_expert = p.sum(dim=1, keepdim=True), p.sum(dim=0, keepdim=True)
    logs = p.log() - by_class.log() - by_expert.log()
    return float(torch.where(p > 0, p * logs, 0.0).sum() / math.log(2))


def router_saturation(
    before: Int[Tensor, "T K"], after: Int[Tensor, "T K"]
) -> Float[Tensor, ""]:
    """Share of a token's experts that are the same later in training (OLMoE, arXiv:2409.02060, section 5.1).

        mean over t of |S_t ∩ S'_t| / K

    1 when nothing changes; K/E for choices that have nothing to do with each other. NaN without tokens.
    """
    if before.shape != after.shape:
        raise ValueError(
            f"the same tokens, {list(before.shape)} and {list(after.shape)} given"
        )
    shared = before[:, :, None] == after[:, None, :]  # [T, K, K]
    return shared.any(dim=2).double().mean()


def co_activation(routing: Routing) -> Float[Tensor, "E E"]:
    """How often expert j is chosen for a token, given that i is (OLMoE, arXiv:2409.02060, section 5.2).

        entry (i, j): tokens that chose both / tokens that chose i

    Over all pairs of a token's K choices; counting neighbours in the list alone misses
    most of them for K > 2. The diagonal is 1; for choices without preference the rest
    is (K-1)/(E-1). Rows of experts never chosen are 0.
    """
    tokens, experts = routing.probs.shape
    chosen = torch.zeros(tokens, experts + 1, dtype=torch.float64)
    chosen.scatter_(1, routing.expert_ids.cpu(), 1.0)
    chosen = chosen[:, :experts]
    both = chosen.T @ chosen
    return both / both.diagonal().clamp(min=1)[:, None]


def repeat_rate(expert_ids: Int[Tensor, "B S K"]) -> float:
    """How often a token's first choice is that of the token before it, in the same sequence (Mixtral,
    arXiv:2401.04088, section 5). By chance: the sum of squares of the load's shares, 1/E where it is even.
    """
    first = expert_ids[:, :, 0]
    return float((first[:, 1:] == first[:, :-1]).double().mean())


@torch.no_grad()
def output_similarity(
    experts: Experts, x: Float[Tensor, "T D"]
) -> Float[Tensor, "E E"]:
    """Mean over tokens of the cosine between what two experts make of the same token: 1 for redundant ones.

    Weights do not tell: two experts whose hidden units are in another order are the same function.
    """
    outputs = []
    for e in range(experts.num_experts):
        token = torch.arange(len(x), device=x.device)
        slots = Slots(token, torch.full_like(token, e), x.new_ones(len(x)))
        outputs.append(loop(x, slots, experts))
    y = torch.nn.functional.normalize(torch.stack(outputs), dim=2)  # [E, T, D]
    return torch.einsum("itd,jtd->ij", y, y) / max(1, len(x))
