"""Published scaling laws of sparse models, with the constants and the ranges that their papers give.

A law describes the runs that it was fitted to: one corpus, one tokeniser, one recipe. Its loss, in nats per token, is
not that of another corpus; ratios carry over better. Outside the fitted range every function warns, and still answers.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ClarkLaw:
    """The constants of one way of routing in Clark et al. (2022), table 3; logarithms are to base 10."""

    a: float
    b: float
    c: float
    d: float
    e_start: float
    e_max: float

    def effective_experts(self, experts: float) -> float:
        """The number of experts with its ends bent: 1 expert counts as `e_start`, infinitely many as `e_max`.

        1/Ê = 1 / (E - 1 + 1 / (1/E_start - 1/E_max)) + 1/E_max
        """
        return _bent(experts, self.e_start, self.e_max)


Method = Literal["s-base", "rl-r", "hash"]

CLARK: dict[Method, ClarkLaw] = {
    "s-base": ClarkLaw(-0.082, -0.108, 0.009, 1.104, 1.847, 314.478),
    "rl-r": ClarkLaw(-0.083, -0.126, 0.012, 1.111, 1.880, 469.982),
    "hash": ClarkLaw(-0.087, -0.136, 0.012, 1.157, 4.175, 477.741),
}


def clark_loss(params: float, experts: float, method: Method = "s-base") -> float:
    """Loss of a model with top-1 routing in every second layer after 130 billion tokens (arXiv:2202.01169, equation 1).

        log L = a log N + b log Ê + c log N log Ê + d

    params: N, the parameters of the dense model whose FFNs became experts; fitted from 15 million to 1.3 billion.
    experts: E; fitted from 1 (the dense model) to 512.

    Because c > 0, experts help less the larger N is. Raises ValueError on values below 1.
    """
    _require_at_least_1(params=params, experts=experts)
    _warn_outside("params", params, 15e6, 1.3e9)
    _warn_outside("experts", experts, 1, 512)
    law = CLARK[method]
    n, e = math.log10(params), math.log10(law.effective_experts(experts))
    return 10 ** (law.a * n + law.b * e + law.c * n * e + law.d)


def effective_parameters(
    params: float, experts: float, method: Method = "s-base"
) -> float:
    """Size of the dense model that `clark_loss` puts level with `experts` experts (arXiv:2202.01169, equation 11).

    It solves L(N̄, 1) = L(N, E) for N̄: above N wherever routing helps.
    """
    law = CLARK[method]
    start = math.log10(law.e_start)
    loss = math.log10(clark_loss(params, experts, method))
    return 10 ** ((loss - law.d - law.b * start) / (law.a + law.c * start))


def krajewski_loss(params: float, tokens: float, granularity: float) -> float:
    """Loss of a fine-grained sparse model whose FFNs store 64 times what a token uses (arXiv:2402.07871, equation 9).

        L = c + (g / G^γ + a) / N^α + b / D^β        constants of table 1

    params: N, all parameters but embeddings and router; fitted from 129 million to 3.7 billion. Attention is not
        multiplied: with FFNs of four times the width, 1/43 of N is active (12 of 8·64 + 4 squares of the width).
    tokens: D; fitted from 16 to 130 billion.
    granularity: G, how many small experts take the place of one as large as the FFN, and how many a token uses;
        fitted from 1 to 16.

    Raises ValueError on values below 1.
    """
    _require_at_least_1(params=params, tokens=tokens, granularity=granularity)
    _warn_outside("params", params, 129e6, 3.7e9)
    _warn_outside("tokens", tokens, 16e9, 130e9)
    _warn_outside("granularity", granularity, 1, 16)
    width = 2.1 / granularity**0.58 + 18.1
    return 0.47 + width / params**0.115 + 30.8 / tokens**0.147


def krajewski_dense_loss(params: float, tokens: float) -> float:
    """Loss of a dense model of the same study, L = c + a / N^α + b / D^β (arXiv:2402.07871, equation 1, table 1).

    params: all but embeddings; fitted from 3 to 85 million, on 16 to 66 billion tokens (table 4).
    """
    _require_at_least_1(params=params, tokens=tokens)
    _warn_outside("params", params, 3e6, 85e6)
    _warn_outside("tokens", tokens, 16e9, 66e9)
    return 0.47 + 16.3 / params**0.126 + 26.7 / tokens**0.127


@dataclass(frozen=True)
class LudziejewskiLaw:
    """The constants of Ludziejewski et al. (2025), table 3; logarithms are natural."""

    a: float = 35.91
    alpha: float = -0.1889
    delta: float = -0.2285
    gamma: float = 0.0098
    b: float = 35.98
    beta: float = -0.1775
    omega: float = 0.5529
    zeta: float = -0.0259
    e_start: float = 2.0732
    e_max: float = 290.4521
    c: float = 1.3637

    def terms(self, experts: float) -> tuple[float, float, float, float]:
        """m, μ, n, ν of L = m N^μ + n D^ν + c for this number of experts (arXiv:2502.05172, equation 5)."""
        e = _bent(experts, self.e_start, self.e_max)
        return (
            self.a * e**self.delta,
            self.alpha + self.gamma * math.log(e),
            self.b * e**self.omega,
            self.beta + self.zeta * math.log(e),
        )


LUDZIEJEWSKI = LudziejewskiLaw()


def ludziejewski_loss(params: float, tokens: float, experts: float) -> float:
    """Loss of a model, dense or with top-1 experts as large as the FFN in every layer (arXiv:2502.05172, equation 6).

        L = a Ê^δ N^(α + γ ln Ê) + b Ê^ω D^(β + ζ ln Ê) + c        constants of table 3

    params: N, the *active* parameters with both embeddings; fitted from 79 million to 2.7 billion, and up to 5.0
        billion stored (`ludziejewski_total`).
    tokens: D; fitted from 0.5 to 80 billion. With fewer tokens than parameters the paper sees larger errors.
    experts: E; fitted from 1 (the dense model) to 32. With 16 and 32 no run had more than 321 million active parameters
        or 16 billion tokens, with 8 not more than 683 million or 32 billion (appendix E); of that nothing warns.

    Raises ValueError on values below 1.
    """
    _require_at_least_1(params=params, tokens=tokens, experts=experts)
    # The listing of runs (appendix E) is rounded: what rounds to its ends is within.
    _warn_outside("params", params, 78.5e6, 2.75e9)
    _warn_outside("tokens", tokens, 0.5e9, 80e9)
    _warn_outside("experts", experts, 1, 32)
    _warn_outside("stored params", ludziejewski_total(params, experts), 78.5e6, 5.05e9)
    m, mu, n, nu = LUDZIEJEWSKI.terms(experts)
    return m * params**mu + n * tokens**nu + LUDZIEJEWSKI.c


def ludziejewski_total(params: float, experts: float) -> float:
    """Stored parameters of the paper's model with `params` active ones (arXiv:2502.05172, equations 9 and 10, A.3).

        active = 2 d V + 13 B d²      total = 2 d V + (4 + 9E) B d²      V = 50,257, B = d / 64 layers

    Of 13 d² per layer attention has 4 and SwiGLU of three times the width 9. Raises ValueError on values below 1.
    """
    _require_at_least_1(params=params, experts=experts)
    low, high = 0.0, params  # active(d) > d, so d lies between
    for _ in range(200):
        width = (low + high) / 2
        active = 2 * width * 50_257 + 13 * width**3 / 64
        low, high = (width, high) if active < params else (low, width)
    return params + 9 * (experts - 1) * width**3 / 64


def ludziejewski_optimum(flops: float, experts: float) -> tuple[float, float]:
    """Active parameters and tokens of least loss with 6·N·D = `flops` (arXiv:2502.05172, equation 7, table 1).

        N = (μ m / (ν n) · (flops / 6)^-ν)^(-1 / (μ + ν))      D = flops / (6 N)

    from dL/dN = 0, with μ, ν < 0. No run of the paper took more than 6e20 FLOPs. Raises ValueError on values below 1.
    """
    _require_at_least_1(flops=flops, experts=experts)
    m, mu, n, nu = LUDZIEJEWSKI.terms(experts)
    params = (mu * m / (nu * n) * (flops / 6) ** -nu) ** (-1 / (mu + nu))
    return params, flops / (6 * params)


def _bent(experts: float, e_start: float, e_max: float) -> float:
    offset = 1 / (1 / e_start - 1 / e_max)
    return 1 / (1 / (experts - 1 + offset) + 1 / e_max)


def _require_at_least_1(**values: float) -> None:
    for name, value in values.items():
        if not value >= 1:  # nan too
            raise ValueError(f"{name} must be at least 1, got {value}")


def _warn_outside(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        message = f"{name} = {value:g} is outside the fitted range, {low:g} to {high:g}"
        warnings.warn(message, stacklevel=3)
