"""Soft MoE: instead of choosing, every expert works on mixtures of all tokens."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn


class SoftMoE(nn.Module):
    """Fully differentiable mixture of experts (arXiv:2308.00951, section 2).

        l_tj = x̂_t · φ̂_j                           for every token t and slot j, P slots for each of E experts
        slot_j = sum_t softmax over t (l)_tj x_t     dispatch: each slot is a mean of the sequence's tokens
        y_t = sum_j softmax over j (l)_tj f_e(j)(slot_j)                  combine: e(j) is the expert that owns slot j

    x̂ = x/|x| and φ̂ = scale·φ/|φ| (section 2.3), or x and φ themselves with normalise=False. Nothing is dropped, the
    load is even, and there is no balancing loss. Not causal: every output depends on all tokens of the sequence, so
    this is for encoders and vision, not for decoders. The cost grows with slots, not with experts.

    experts: E modules that map [..., P, D] to [..., P, D], as SwiGLU. Parameters besides theirs: E·P·D, and 1 for
    `scale`. Raises ValueError without an expert or with fewer than one slot.
    """

    def __init__(
        self,
        width: int,
        experts: Iterable[nn.Module],
        slots_per_expert: int = 1,
        normalise: bool = True,
    ) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        if not len(self.experts) or slots_per_expert < 1:
            raise ValueError(
                "Soft MoE needs at least one expert and one slot for each, "
                f"got {len(self.experts)} experts and {slots_per_expert} slots"
            )
        shape = (len(self.experts), slots_per_expert, width)
        self.phi = nn.Parameter(torch.randn(shape) * width**-0.5)  # [E, P, D]
        self.scale = nn.Parameter(torch.ones(())) if normalise else None

    def forward(
        self,
        x: Float[Tensor, "*B T D"],
        token_mask: Bool[Tensor, "*B T"] | None = None,
    ) -> Float[Tensor, "*B T D"]:
        """Mixes the T tokens of each sequence. token_mask: False marks padding, it enters no slot and leaves as 0."""
        logits = self._logits(x)  # [..., T, E·P]
        weights = logits
        if token_mask is not None:
            weights = logits.masked_fill(
                ~token_mask[..., None], torch.finfo(logits.dtype).min
            )
        dispatch = weights.softmax(dim=-2).to(x.dtype)
        combine = logits.softmax(dim=-1).to(x.dtype)
        slots = dispatch.transpose(-1, -2) @ x  # [..., E·P, D]
        by_expert = slots.view(*slots.shape[:-2], *self.phi.shape).unbind(
            -3
        )  # E of [..., P, D]
        out = [f(mine) for f, mine in zip(self.experts, by_expert, strict=True)]
        y = combine @ torch.cat(out, dim=-2)
        return y if token_mask is None else y * token_mask[..., None]

    def _logits(self, x: Tensor) -> Tensor:
        # In float32 or better, like every router's.
        dtype = torch.promote_types(x.dtype, torch.float32)
        x, phi = x.to(dtype), self.phi.flatten(0, 1).to(dtype)
        if self.scale is not None:
            x = nn.functional.normalize(x, dim=-1)
            phi = self.scale.to(dtype) * nn.functional.normalize(phi, dim=-1)
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            return x @ phi.T
