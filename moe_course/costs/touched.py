"""How many experts a batch touches: what is read from memory, and what is not.

Derived, and compared with counts, in book/bandwidth/roofline.
"""

from __future__ import annotations

from collections.abc import Sequence


def expected_distinct_experts(
    num_experts: int,
    k: int,
    tokens: float,
    inclusion: Sequence[float] | None = None,
) -> float:
    """Expected number of experts that at least one of `tokens` tokens chooses, in one layer.

        E · (1 - (1 - K/E)^B)                    every expert equally popular
        sum over e of 1 - (1 - pi_e)^B           pi_e = chance that a token's K choices include e, sum of pi = K

    Tokens choose independently of each other; a token's K experts differ. Uneven popularity touches fewer. Raises
    ValueError unless 1 <= k <= num_experts, tokens >= 0 and, where given, the chances lie in 0..1 and sum to k.
    """
    if not 1 <= k <= num_experts:
        raise ValueError(
            f"k must lie in 1..{num_experts} (the number of experts), got {k}"
        )
    if tokens < 0:
        raise ValueError(f"tokens must not be negative, got {tokens}")
    if inclusion is None:
        return num_experts * (1 - (1 - k / num_experts) ** tokens)
    if len(inclusion) != num_experts or not all(0 <= p <= 1 for p in inclusion):
        raise ValueError(
            f"inclusion must hold {num_experts} chances between 0 and 1, got {list(inclusion)[:8]}"
        )
    if abs(sum(inclusion) - k) > 1e-6 * k:
        raise ValueError(
            f"inclusion must sum to k = {k} (each token chooses k experts), got {sum(inclusion):.6g}"
        )
    return sum(1 - (1 - p) ** tokens for p in inclusion)


def zipf_inclusion(num_experts: int, k: int, exponent: float) -> list[float]:
    """Chances pi_e that fall as rank^-exponent, none above 1, summing to k.

    Experts that would be above 1 are chosen by every token, and the rest share what is left in the same proportions.
    exponent 0 is an even load. Raises ValueError on a negative exponent and unless 1 <= k <= num_experts.
    """
    if exponent < 0:
        raise ValueError(f"exponent must not be negative, got {exponent}")
    if not 1 <= k <= num_experts:
        raise ValueError(
            f"k must lie in 1..{num_experts} (the number of experts), got {k}"
        )
    if exponent > 100:
        raise ValueError(f"exponent must not be above 100, got {exponent}")
    weights = [(rank + 1.0) ** -exponent for rank in range(num_experts)]
    always = 0  # so many of the most popular are always chosen
    while True:
        rest = sum(weights[always:])
        if always == num_experts or (k - always) * weights[always] <= rest:
            break
        always += 1
    scale = (k - always) / rest if rest else 0.0
    return [1.0] * always + [scale * w for w in weights[always:]]
