"""How fast a cluster trains, and what a token costs to serve.

Chapter: book/bandwidth/economics.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_course.costs.latency import attention_flops
from moe_course.specs.hardware import Accelerator
from moe_course.specs.model import ModelSpec

DAY = 86400.0


def training_flops_per_token(
    spec: ModelSpec, context: float = 0, causal: bool = True
) -> float:
    """FLOPs of the model for one token, forward (one part) and backward (two): what is recomputed is not counted.

        6 · active weights + 3 · 4 · layers · heads · head_dim · context/2

    The input embedding multiplies nothing and is left out. MLA trains with its keys and values unfolded
    (`costs.attention_flops`, absorbed=False).

    context: tokens in a sequence, of which one sees half on average.
    causal: False counts the masked half as well, as PaLM (arXiv:2204.02311, appendix B: 6N + 12LHQT) and Megatron do.

    DeepSeek prints 155 (V2) and 250 (V3) GFLOP at 4,096 tokens (arXiv:2505.09343, table 2): causal.
    """
    seen = context / 2 if causal else context
    attention = attention_flops(spec, 1, seen, absorbed=False)
    return 6 * spec.active_params(include_embedding=False) + 3 * attention


def training_tokens_per_day(
    spec: ModelSpec,
    accelerator: Accelerator,
    devices: int,
    mfu: float,
    context: float = 0,
    causal: bool = True,
) -> float:
    """Tokens a day at a model FLOP utilisation: useful FLOPs over the bf16 peak (arXiv:2204.02311, appendix B).

    mfu has no default on purpose: it is the largest unknown. What makes a sparse model's lower than a dense one's
    (communication, small products, dropped or padded slots) belongs into it. context, causal: as its source counts
    FLOPs (`training_flops_per_token`). Raises ValueError unless 0 < mfu <= 1 and devices >= 1.
    """
    if not 0 < mfu <= 1:
        raise ValueError(f"mfu must lie in 0..1 and not be 0, got {mfu}")
    if devices < 1:
        raise ValueError(f"devices must be at least 1, got {devices}")
    per_second = devices * accelerator.bf16 * mfu
    return per_second * DAY / training_flops_per_token(spec, context, causal)


def training_mfu(
    spec: ModelSpec,
    accelerator: Accelerator,
    tokens: float,
    device_hours: float,
    context: float = 0,
    causal: bool = True,
) -> float:
    """The MFU that a training of so many tokens in so many device hours implies: of the hours, idle ones included.

        tokens · FLOPs per token / (device hours · 3600 · bf16 peak)

    Above 1 if the figures do not belong together, or the training computed below 16 bits. Raises ValueError unless
    tokens and device_hours are positive.
    """
    if tokens <= 0 or device_hours <= 0:
        raise ValueError(
            f"tokens and device_hours must be positive, got {tokens} and {device_hours}"
        )
    useful = tokens * training_flops_per_token(spec, context, causal)
    return useful / (device_hours * 3600 * accelerator.bf16)


@dataclass(frozen=True)
class ServingCost:
    """What serving costs: the rate of all devices together, and the price of a million tokens."""

    tokens_per_s: float
    per_million_tokens: float  # in the currency of the hourly price


def serving_cost(
    tokens_per_s: float, devices: int, price_per_device_hour: float, busy: float = 1.0
) -> ServingCost:
    """What a million tokens cost: devices · price / (tokens/s · 3600 · busy).

    tokens_per_s: of all devices together, as `Step.tokens_per_s` is.
    busy: the share of the time in which the devices serve at that rate. Raises ValueError unless 0 < busy <= 1, the
        rate is positive, devices >= 1 and the price is not negative.
    """
    if not 0 < busy <= 1 or tokens_per_s <= 0:
        raise ValueError(
            f"busy must lie in 0..1 and tokens_per_s be positive, got {busy} and {tokens_per_s}"
        )
    if devices < 1 or price_per_device_hour < 0:
        raise ValueError(
            "devices must be at least 1 and the price not negative, got "
            f"{devices} and {price_per_device_hour}"
        )
    hourly = tokens_per_s * 3600 * busy
    return ServingCost(tokens_per_s, devices * price_per_device_hour / hourly * 1e6)
