"""Losses that keep the load of the experts even."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from moe_course.layers import Routing


def load_balancing_loss(routing: Routing, num_experts: int) -> Float[Tensor, ""]:
    """The balancing loss of one layer (Switch Transformer, arXiv:2101.03961, section 2.2; 1/K added for K > 1).

        E · sum over e of f_e · P_e        f_e = assignments to e / (T·K)      P_e = mean over tokens of p_e

    1 where f or P is uniform, E where both lie on one expert. Gradient flows through P
    alone: f counts decisions. It is a sum over the experts: their mean would be E times
    too small. An expert id of E, a choice of no expert, counts in T·K but for no
    expert. 0 without tokens. Several layers: the mean of their losses, never the loss
    of their pooled counts, which is blind to layers that collapse onto different
    experts.

    Raises ValueError when num_experts is not the width of routing.probs.
    """
    if routing.probs.shape[-1] != num_experts:
        raise ValueError(
            f"routing.probs has {routing.probs.shape[-1]} experts, num_experts is {num_experts}"
        )
    ids, probs = routing.expert_ids.flatten(), routing.probs
    counts = torch.bincount(ids, minlength=num_experts)[:num_experts]  # [E]
    f = counts.to(probs.dtype) / max(1, len(ids))
    p = probs.sum(dim=0) / max(1, len(probs))
    return num_experts * (f * p).sum()
