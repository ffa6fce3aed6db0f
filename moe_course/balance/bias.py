"""Balance without a loss: a bias on the scores, set by a rule after each step (arXiv:2408.15664)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn

from moe_course.balance.losses import assignments
from moe_course.layers import MoE, Routing

Rule = Literal["sign", "proportional"]


def updated_correction(
    correction: Float[Tensor, " E"],
    counts: Int[Tensor, " E"],
    step: float,
    rule: Rule = "sign",
    *,
    centred: bool = False,
) -> Float[Tensor, " E"]:
    """The next bias from the counts of one batch (Wang et al. 2024, arXiv:2408.15664, algorithm 1; DeepSeek-V3).

        sign:          b_e + step · sign(mean - c_e)
        proportional:  b_e + step · (mean - c_e) / mean

    An expert with more than its share becomes less likely to be chosen, and the weights
    of those chosen do not change. `proportional` is stated in multiples of the mean
    load, so that `step` does not depend on the size of the batch. centred: subtracts
    the mean of the change, as torchtitan does; a shift of all biases changes no choice,
    but without it their mean may drift. Without tokens nothing changes.

    Raises ValueError on an unknown rule and a step that is not positive.
    """
    if rule not in ("sign", "proportional"):
        raise ValueError(f"rule must be 'sign' or 'proportional', got {rule!r}")
    if step <= 0:
        raise ValueError(f"step must be positive, got {step}")
    load = counts.to(correction.dtype)
    excess = load.mean() - load
    mean = load.mean().clamp(min=1e-20)  # 0 without tokens
    change = excess.sign() if rule == "sign" else excess / mean
    if centred:
        change = change - change.mean()
    return correction + step * change


@torch.no_grad()
def update_corrections(
    model: nn.Module,
    routings: Iterable[Routing],
    step: float,
    rule: Rule = "sign",
    *,
    centred: bool = False,
) -> None:
    """Set the bias of every router in `model` that has one, from the routings of a step, in the order of the layers.

    To be called after the optimizer's step, so that a batch never changes its own
    routing. Counts of all ranks are summed where `torch.distributed` runs. Raises
    ValueError where the routings are not one for each sparse layer.
    """
    layers = [m for m in model.modules() if isinstance(m, MoE)]
    routings = list(routings)
    if len(layers) != len(routings):
        raise ValueError(
            f"{len(layers)} sparse layers, {len(routings)} routings: give one for each"
        )
    for layer, routing in zip(layers, routings, strict=True):
        counts = assignments(routing)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts)
        correction = layer.router.correction
        if isinstance(correction, Tensor):
            correction.copy_(
                updated_correction(correction, counts, step, rule, centred=centred)
            )
