"""The experts of a sparse layer: E equal FFNs whose weights are stacked, as grouped kernels read them.

Chapter: book/concepts/anatomy.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from moe_course.layers.routing import Slots

CLAMP = 7.0  # gpt-oss: its gate and up projections are cut off here


def swiglu(z: Float[Tensor, "... rows"]) -> Float[Tensor, "... F"]:
    """silu(g) ⊙ u, where g is the first half of z and u the second (arXiv:2002.05202)."""
    gate, up = z.chunk(2, dim=-1)
    return F.silu(gate) * up


def clamped_swiglu(z: Float[Tensor, "... rows"]) -> Float[Tensor, "... F"]:
    """The activation of gpt-oss (arXiv:2508.10925): (u + 1) ⊙ g·sigmoid(1.702·g), with g ≤ 7 and |u| ≤ 7."""
    gate, up = z.chunk(2, dim=-1)
    gate, up = gate.clamp(max=CLAMP), up.clamp(-CLAMP, CLAMP)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


GATED: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": swiglu,
    "clamped_swiglu": clamped_swiglu,
}
ACTIVATIONS = GATED | {"gelu": F.gelu, "relu": F.relu}


class Experts(nn.Module):
    """E FFNs of equal size in one stack of weights.

        y = W_down,e act(W_up,e x + b_up,e) + b_down,e

    w_up is [E, 2F, D] for the gated activations "swiglu" and "clamped_swiglu" (F rows of the gate, then F rows of the
    up projection) and [E, F, D] for "gelu" (the exact one) and "relu"; w_down is [E, D, F]; with bias=True there are
    b_up, [E, 2F] or [E, F], and b_down, [E, D]. Parameters: E times those of one DenseFFN or SwiGLU. Initialised as
    `nn.Linear` is: uniform within ±1/sqrt(fan in).

    Raises ValueError on a size below 1 and on an unknown activation.
    """

    def __init__(
        self,
        num_experts: int,
        width: int,
        hidden: int,
        activation: str = "swiglu",
        bias: bool = False,
    ) -> None:
        super().__init__()
        if min(num_experts, width, hidden) < 1:
            raise ValueError(
                "num_experts, width and hidden must be at least 1, "
                f"got {num_experts}, {width} and {hidden}"
            )
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {', '.join(ACTIVATIONS)}, "
                f"got {activation!r}"
            )
        self.num_experts, self.width, self.hidden = num_experts, width, hidden
        self.activation = activation
        rows = 2 * hidden if activation in GATED else hidden
        self.w_up = nn.Parameter(torch.empty(num_experts, rows, width))
        self.w_down = nn.Parameter(torch.empty(num_experts, width, hidden))
        self.b_up = self.b_down = None
        if bias:
            self.b_up = nn.Parameter(torch.empty(num_experts, rows))
            self.b_down = nn.Parameter(torch.empty(num_experts, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weights, fan_in in (
            ((self.w_up, self.b_up), self.width),
            ((self.w_down, self.b_down), self.hidden),
        ):
            for weight in weights:
                if weight is not None:
                    nn.init.uniform_(weight, -(fan_in**-0.5), fan_in**-0.5)

    def forward(
        self, x: Float[Tensor, "T D"], slots: Slots, dispatch: str = "grouped"
    ) -> Float[Tensor, "T D"]:
        """The weighted sum over each token's slots, computed in one of the ways of `layers.dispatch`."""
        from moe_course.layers.dispatch import DISPATCH  # which reads this module

        return DISPATCH[dispatch](x, slots, self)

    def activate(self, z: Float[Tensor, "... rows"]) -> Float[Tensor, "... F"]:
        """What stands between the two products: rows is 2F for gated activations, else F."""
        return ACTIVATIONS[self.activation](z)

    def extra_repr(self) -> str:
        return (
            f"{self.num_experts}, {self.width}, {self.hidden}, "
            f"activation={self.activation!r}, bias={self.b_up is not None}"
        )
