"""A sparse layer: a router, its experts, and what every token passes through besides."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moe_course.layers.dispatch import (
    DISPATCH,
    Drop,
    expert_capacity,
    slots_from_routing,
)
from moe_course.layers.experts import Experts
from moe_course.layers.routing import ExpertChoiceRouter, Routing, Slots


class MoE(nn.Module):
    """Mixture of experts (arXiv:1701.06538, section 2).

        y = sum over the chosen experts e:  w_e · FFN_e(x)   [ + g · FFN_shared(x) ]

    router: maps tokens [T, D] to a Routing, or straight to Slots (expert choice).
    shared: a DenseFFN or SwiGLU that every token passes through (arXiv:2401.06066); several shared experts of width F
        are one of their summed width.
    shared_gate: g = sigmoid(shared_gate(x)), a linear map to one number (Qwen2-MoE); without it g = 1.
    dispatch: how the sum is computed, a name in `layers.dispatch.DISPATCH`.
    capacity_factor: an expert takes at most ceil(factor · T·K/E) slots, T counting the tokens that are no padding; what
        is beyond is dropped and contributes exactly 0. None drops nothing.
    drop: which slots are dropped, "position", "probs" or "prioritised": see `slots_from_routing`.
    sequence_capacity: an expert takes at most this many slots of one sequence, the tokens along the last dimension but
        one; so `transformers` runs Switch. Not together with capacity_factor.
    """

    def __init__(
        self,
        router: nn.Module,
        experts: Experts,
        shared: nn.Module | None = None,
        shared_gate: nn.Module | None = None,
        dispatch: str = "grouped",
        capacity_factor: float | None = None,
        sequence_capacity: int | None = None,
        drop: Drop = "position",
    ) -> None:
        super().__init__()
        if dispatch not in DISPATCH:
            raise ValueError(
                f"dispatch must be one of {', '.join(DISPATCH)}, got {dispatch!r}"
            )
        if shared_gate is not None and shared is None:
            raise ValueError("shared_gate needs a shared expert to gate: give `shared`")
        if capacity_factor is not None and sequence_capacity is not None:
            raise ValueError(
                "give capacity_factor or sequence_capacity, "
                f"got both ({capacity_factor}, {sequence_capacity})"
            )
        if capacity_factor is not None and capacity_factor <= 0:
            raise ValueError(f"capacity_factor must be positive, got {capacity_factor}")
        self.router, self.experts = router, experts
        self.shared, self.shared_gate = shared, shared_gate
        self.dispatch, self.capacity_factor = dispatch, capacity_factor
        self.sequence_capacity, self.drop = sequence_capacity, drop

    def forward(
        self,
        x: Float[Tensor, "*B D"],
        token_mask: Bool[Tensor, "*B"] | None = None,
        token_ids: Int[Tensor, "*B"] | None = None,
    ) -> tuple[Float[Tensor, "*B D"], Routing | None, Slots]:
        """The layer's output in the dtype of x, the router's decision, and the slots that were computed.

        token_mask: False marks padding. It takes no slot and no capacity: its routed part is exactly 0. The shared
            part does not look at the mask: padding passes through it like every token.
        token_ids: what was embedded; hash routers read it.
        """
        for name, given in (("token_mask", token_mask), ("token_ids", token_ids)):
            if given is not None and given.shape != x.shape[:-1]:
                raise ValueError(
                    f"{name} must be {list(x.shape[:-1])}, got {list(given.shape)}"
                )
        tokens = x.reshape(-1, x.shape[-1])  # [T, D]
        mask = None if token_mask is None else token_mask.flatten()
        ids = None if token_ids is None else token_ids.flatten()
        length = x.shape[-2] if x.ndim > 1 else 1
        routing, slots = self._route(tokens, mask, ids, length)
        y = self.experts(tokens, slots, self.dispatch)
        if self.shared is not None:
            shared = self.shared(tokens)
            if self.shared_gate is not None:
                shared = torch.sigmoid(self.shared_gate(tokens)) * shared
            y = y + shared
        return y.view_as(x), routing, slots

    def _route(
        self,
        tokens: Float[Tensor, "T D"],
        mask: Bool[Tensor, " T"] | None,
        ids: Int[Tensor, " T"] | None,
        sequence_length: int,
    ) -> tuple[Routing | None, Slots]:
        if isinstance(self.router, ExpertChoiceRouter) and mask is not None:
            real = mask.nonzero().squeeze(1)  # what is not shown cannot be chosen
            slots = self.router(tokens[real])
            return None, Slots(real[slots.token], slots.expert, slots.weight)
        decision = self.router(tokens, token_ids=ids)
        if isinstance(decision, Slots):
            return None, decision
        num_experts, capacity = self.experts.num_experts, self.sequence_capacity
        if decision.logits.shape[1] != num_experts:
            raise ValueError(
                f"the router chooses among {decision.logits.shape[1]} experts, but there are {num_experts}"
            )
        length = None if capacity is None else sequence_length
        if self.capacity_factor is not None:
            real_tokens = len(tokens) if mask is None else int(mask.sum())
            k = decision.expert_ids.shape[1]
            capacity = expert_capacity(
                real_tokens, k, num_experts, self.capacity_factor
            )
        return decision, slots_from_routing(
            decision, num_experts, mask, capacity, self.drop, length
        )
