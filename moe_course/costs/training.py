"""How fast a cluster trains, and what a token costs to serve."""

from __future__ import annotations

from dataclasses import dataclass

from moe_course.specs.hardware import Accelerator
from moe_course.specs.model import ModelSpec

DAY = 86400.0


def training_flops_per_token(spec: ModelSpec, context: float = 0) -> float:
    """6 FLOPs for each active weight that multiplies (forward 2, backward 4), and attention's 3 · 4 · heads ·
    head_dim · context/2.

    The input embedding multiplies nothing and is left out.
    """
    from moe_course.costs.latency import attention_flops

    weights = 6 * spec.active_params(include_embedding=False)
    return weights + 3 * attention_flops(spec, 1, context / 2)


def training_tokens_per_day(
    spec: ModelSpec,
    accelerator: Accelerator,
    devices: int,
    mfu: float,
    context: float = 0,
) -> float:
    """Tokens a day at a model FLOP utilisation: useful FLOPs over peak (arXiv:2204.02311, appendix B).

    mfu has no default on purpose: it is the largest unknown. What makes a sparse model's lower than a dense one's
    (communication, small products, dropped or padded slots) belongs into it. Raises ValueError unless 0 < mfu <= 1.
    """
    if not 0 < mfu <= 1:
        raise ValueError(f"mfu must lie in 0..1 and not be 0, got {mfu}")
    per_second = devices * accelerator.bf16 * mfu
    return per_second * DAY / training_flops_per_token(spec, context)


@dataclass(frozen=True)
class ServingCost:
    tokens_per_s: float
    per_million_tokens: float  # in the currency of the hourly price


def serving_cost(
    tokens_per_s: float, devices: int, price_per_device_hour: float, busy: float = 1.0
) -> ServingCost:
    """What a million tokens cost: devices · price / (tokens/s · 3600 · busy).

    busy: the share of the time in which the devices serve at that rate. Raises ValueError unless 0 < busy <= 1 and the
    rate is positive.
    """
    if not 0 < busy <= 1 or tokens_per_s <= 0:
        raise ValueError(
            f"busy must lie in 0..1 and tokens_per_s be positive, got {busy} and {tokens_per_s}"
        )
    hourly = tokens_per_s * 3600 * busy
    return ServingCost(tokens_per_s, devices * price_per_device_hour / hourly * 1e6)
