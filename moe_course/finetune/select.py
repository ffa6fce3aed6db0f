"""What of a sparse model is trained: parts by name, experts by number, and optimisers that leave idle experts alone.

Chapters: book/finetuning/lora, book/finetuning/drift.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from moe_course.costs.budget import checked_parts
from moe_course.layers import Experts, MoE


def parts_of(model: nn.Module) -> dict[str, str]:
    """Each parameter's name and what it belongs to: "router", "experts", "shared" (with its gate) or the "rest"."""
    kind = {id(p): "rest" for p in model.parameters()}
    for layer in model.modules():
        if isinstance(layer, MoE):
            for part, module in (
                ("router", layer.router),
                ("experts", layer.experts),
                ("shared", layer.shared),
                ("shared", layer.shared_gate),
            ):
                if module is not None:
                    kind |= {id(p): part for p in module.parameters()}
    return {name: kind[id(p)] for name, p in model.named_parameters()}


def train_only(model: nn.Module, parts: Iterable[str]) -> nn.Module:
    """Freeze all but these of `PARTS`, in place; returns the model. Raises ValueError on others."""
    wanted, names = checked_parts(parts), parts_of(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(names[name] in wanted)
    return model


def train_experts(experts: Experts, chosen: Bool[Tensor, " E"]) -> list[Any]:
    """Let gradients reach the chosen experts of a bank alone; returns handles whose `remove()` undoes it.

    Frozen weights stay frozen.

    The weights are one stack, so the others get a gradient of exactly 0. An optimiser moves a weight without gradient
    all the same, by decay and by its memory: use `spare_idle_experts` with it.
    """
    if chosen.shape != (experts.num_experts,):
        raise ValueError(
            f"chosen must say yes or no for {experts.num_experts} experts, got {list(chosen.shape)}"
        )

    def masked(grad: Tensor) -> Tensor:
        keep = chosen.to(grad.device).view(-1, *[1] * (grad.ndim - 1))
        return torch.where(keep, grad, 0)

    return [p.register_hook(masked) for p in experts.parameters() if p.requires_grad]


def spare_idle_experts(
    optimizer: torch.optim.Optimizer, banks: Iterable[nn.Module]
) -> list[Any]:
    """Let every step leave experts alone whose gradient is all 0: weights and the optimiser's state stay as they were.

    AdamW shrinks a weight that has no gradient (weight decay), and moves it along old gradients (its first moment).
    For an expert that no token chose both are wrong: it did not take part in the step. Kept is what has the shape of
    the weights; Adam's count of steps is the stack's, so an expert that is used late begins without bias correction.
    Gradients must be there before the step: not for `step(closure)`. Returns handles whose `remove()` undoes it.
    """
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    stacks = [p for bank in banks for p in bank.parameters() if id(p) in own]
    held: list[tuple[Tensor, Tensor, dict[str, Tensor]]] = []

    def idle_rows(p: Tensor) -> Tensor:
        assert p.grad is not None
        return (p.grad.flatten(1) == 0).all(1)

    @torch.no_grad()
    def before(*_: Any) -> None:
        held.clear()
        for p in stacks:
            if p.grad is not None:
                state: Mapping[str, Any] = optimizer.state.get(p, {})
                idle = idle_rows(p)
                kept = {
                    k: v[idle].clone()
                    for k, v in state.items()
                    if isinstance(v, Tensor) and v.shape == p.shape
                }
                held.append((p, idle, kept | {"": p[idle].clone()}))

    @torch.no_grad()
    def after(*_: Any) -> None:
        for p, idle, kept in held:
            p[idle] = kept[""]
            for k, v in optimizer.state.get(p, {}).items():
                if isinstance(v, Tensor) and v.shape == p.shape:
                    v[idle] = kept.get(k, torch.zeros_like(v[idle]))
        held.clear()

    return [
        optimizer.register_step_pre_hook(before),
        optimizer.register_step_post_hook(after),
    ]
