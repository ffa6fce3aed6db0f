"""The feed-forward networks of a dense block, which are the experts of a sparse one.

Chapter: book/concepts/anatomy.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}


class DenseFFN(nn.Module):
    """Two matrices around a non-linearity (arXiv:1706.03762, section 3.3).

        y = W_down act(W_up x)          W_up [F, D], W_down [D, F]

    activation: "relu", or "gelu" (the exact one, with erf). Parameters: 2·D·F, with
    bias F + D more. Raises ValueError on an unknown activation.
    """

    def __init__(
        self, width: int, hidden: int, activation: str = "relu", bias: bool = False
    ) -> None:
        super().__init__()
        if activation not in _ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {', '.join(_ACTIVATIONS)}, "
                f"got {activation!r}"
            )
        self.activation = activation
        self.up = nn.Linear(width, hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        hidden = _ACTIVATIONS[self.activation](self.up(x))  # [..., F]
        return self.down(hidden)


class SwiGLU(nn.Module):
    """A gated FFN with three matrices (arXiv:2002.05202): most models since LLaMA.

        y = W_down (silu(W_gate x) ⊙ W_up x)      W_gate, W_up [F, D], W_down [D, F]

    silu(z) = z·sigmoid(z). Parameters: 3·D·F, with bias 2·F + D more.
    """

    def __init__(self, width: int, hidden: int, bias: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=bias)
        self.up = nn.Linear(width, hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        hidden = F.silu(self.gate(x)) * self.up(x)  # [..., F]
        return self.down(hidden)
