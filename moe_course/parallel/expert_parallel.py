"""Expert parallelism: experts live on different ranks, and tokens travel to them and back.

Every rank holds E/R experts, its own tokens, and a copy of the router. A layer sends each slot's token to the rank of
its expert, computes there, and sends the result home, where it is weighted and summed (arXiv:2006.16668, section
3.2). Only two things cross: how many, then what.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moe_course.layers.dispatch import (
    DISPATCH,
    combine,
    gather,
    slots_from_routing,
)
from moe_course.layers.experts import Experts
from moe_course.layers.routing import Routing, Slots


@dataclass
class Traffic:
    """Bytes that this rank sent to others, by what they were; what stays on the rank is not counted."""

    counts: int = 0
    dispatch: int = 0
    combine: int = 0
    backward: int = 0

    def total(self) -> int:
        return self.counts + self.dispatch + self.combine + self.backward


class _AllToAll(torch.autograd.Function):
    """Rows to their ranks. The gradient of an exchange is the exchange back."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        sent: list[int],
        received: list[int],
        group: dist.ProcessGroup | None,
        traffic: Traffic,
        kind: str,
    ) -> Tensor:
        ctx.sent, ctx.received, ctx.group, ctx.traffic = sent, received, group, traffic
        _count(traffic, kind, rows, sent, group)
        return _exchange(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad.contiguous()
        _count(ctx.traffic, "backward", grad, ctx.received, ctx.group)
        back = _exchange(grad, ctx.received, ctx.sent, ctx.group)
        return back, None, None, None, None, None


_all_to_all: Any = _AllToAll.apply


def _exchange(
    rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup | None
) -> Tensor:
    out = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(out, rows, received, sent, group=group)
    return out


def _count(
    traffic: Traffic,
    kind: str,
    rows: Tensor,
    sent: list[int],
    group: dist.ProcessGroup | None,
) -> None:
    away = sum(sent) - sent[dist.get_rank(group)]
    size = away * rows[0].nbytes if len(rows) else 0
    setattr(traffic, kind, getattr(traffic, kind) + size)


class ExpertParallelMoE(nn.Module):
    """A sparse layer whose experts are spread over the ranks of a process group.

        y = sum over the chosen experts e:  w_e · FFN_e(x)      rank r holds the experts r·E/R up to (r+1)·E/R

    router: the same on every rank, over all E experts.
    experts: this rank's E/R experts.
    group: the ranks that share the experts; None means all. On GPUs one whose backend is NCCL.
    dispatch: how the rows that arrived are computed, a name in `layers.dispatch.DISPATCH`.

    Output and gradients are those of one `MoE` on all tokens. With a loss that is a sum over all ranks' tokens
    (divide by their global number), an expert's gradient is complete where the expert lives: tokens of every rank
    went through it, so it must not be reduced over this group. The gradients of whatever is copied, the router too,
    must be summed: `reduce_gradients`.

    `traffic` counts the bytes of the tensors that went to other ranks, without the protocol's own. Raises ValueError,
    on every rank, when the ranks' experts do not fit together.
    """

    def __init__(
        self,
        router: nn.Module,
        experts: Experts,
        group: dist.ProcessGroup | None = None,
        dispatch: str = "grouped",
    ) -> None:
        super().__init__()
        if dispatch not in DISPATCH:
            raise ValueError(
                f"dispatch must be one of {', '.join(DISPATCH)}, got {dispatch!r}"
            )
        self.router, self.experts = router, experts
        self.group, self.dispatch = group, dispatch
        self.ranks = dist.get_world_size(group)
        self.num_experts = self.ranks * experts.num_experts
        self.traffic = Traffic()
        self._agree()

    def _agree(self) -> None:
        """A mismatch would show as a hang or as garbage, later and elsewhere."""
        e = self.experts
        mine = (
            e.num_experts, e.width, e.hidden, e.activation, e.b_up is not None,
            str(e.w_up.dtype),
        )  # fmt: skip
        everybody: list[Any] = [None] * self.ranks
        dist.all_gather_object(everybody, mine, group=self.group)
        if len(set(everybody)) > 1:
            shown = "; ".join(f"rank {r}: {what}" for r, what in enumerate(everybody))
            raise ValueError(
                "the ranks' experts must agree in number, width, hidden, activation, bias and dtype, got "
                + shown
            )

    def forward(
        self, x: Float[Tensor, "*B D"], token_mask: Bool[Tensor, "*B"] | None = None
    ) -> tuple[Float[Tensor, "*B D"], Routing, Slots]:
        """The layer's output for this rank's tokens, its routing and its slots.

        Every rank must call it, with tokens or without, and the backward pass too: each is an exchange in which all
        take part. For the same reason the tokens need a gradient on all ranks or on none.
        """
        if x.shape[-1] != self.experts.width:
            raise ValueError(
                f"the experts take tokens of width {self.experts.width}, got {x.shape[-1]}"
            )
        if token_mask is not None and token_mask.shape != x.shape[:-1]:
            raise ValueError(
                f"token_mask must be {list(x.shape[:-1])}, got {list(token_mask.shape)}"
            )
        tokens = x.reshape(-1, x.shape[-1])
        mask = None if token_mask is None else token_mask.flatten()
        routing = self.router(tokens)
        if routing.logits.shape[1] != self.num_experts:
            raise ValueError(
                f"the router chooses among {routing.logits.shape[1]} experts, but {self.ranks} ranks with "
                f"{self.experts.num_experts} each hold {self.num_experts}"
            )
        # Sorted by expert is sorted by rank: what goes to one rank is one run of rows.
        slots = slots_from_routing(routing, self.num_experts, mask)
        out = self._experts_elsewhere(gather(tokens, slots), slots.expert)
        return combine(out, slots, tokens).view_as(x), routing, slots

    def _experts_elsewhere(
        self, rows: Float[Tensor, "S D"], expert: Int[Tensor, " S"]
    ) -> Float[Tensor, "S D"]:
        """FFN_e of every row, wherever expert e lives."""
        counts = torch.bincount(expert, minlength=self.num_experts)
        arriving = torch.empty_like(counts)
        dist.all_to_all_single(arriving, counts, group=self.group)
        self.traffic.counts += counts.nbytes * (self.ranks - 1) // self.ranks
        sent = counts.view(self.ranks, -1).sum(1).tolist()
        per_expert = arriving.view(self.ranks, -1)  # [R, E/R]
        received = per_expert.sum(1).tolist()

        arrived = _all_to_all(
            rows, sent, received, self.group, self.traffic, "dispatch"
        )
        # From each rank in turn come its rows, sorted by expert; grouped kernels want them sorted by expert over all.
        local = torch.arange(self.experts.num_experts, device=rows.device)
        of_row = local.repeat(self.ranks).repeat_interleave(per_expert.flatten())
        order = of_row.argsort(stable=True)
        ones = arrived.new_ones(len(order))
        here = Slots(order, of_row[order], ones)
        out = self.experts(arrived, here, self.dispatch)
        return _all_to_all(out, received, sent, self.group, self.traffic, "combine")


def shard(experts: Experts, rank: int, ranks: int) -> Experts:
    """The experts of one rank, copied out of a whole bank: rank·E/R up to (rank+1)·E/R."""
    if experts.num_experts % ranks:
        raise ValueError(
            f"{experts.num_experts} experts do not spread evenly over {ranks} ranks"
        )
    each = experts.num_experts // ranks
    mine = Experts(
        each,
        experts.width,
        experts.hidden,
        experts.activation,
        experts.b_up is not None,
    ).to(experts.w_up)
    with torch.no_grad():
        for target, source in zip(mine.parameters(), experts.parameters(), strict=True):
            target.copy_(source[rank * each : (rank + 1) * each])
    return mine


def reduce_gradients(
    layer: nn.Module,
    experts: nn.Module,
    world: dist.ProcessGroup | None = None,
    same_experts: dist.ProcessGroup | None = None,
) -> None:
    """Sum gradients over the ranks that hold copies, after a backward pass of this rank's part of the global loss.

    What is not in `experts` is on all ranks of `world`. The experts are copied only where expert parallelism is
    combined with data parallelism, over the ranks of `same_experts`; None means that nobody else holds them. A
    parameter without a gradient counts as zero and gets one, so that a rank without tokens takes part.
    """
    own = {id(p) for p in experts.parameters()}
    for parameter in layer.parameters():
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if id(parameter) not in own:
            dist.all_reduce(parameter.grad, group=world)
        elif same_experts is not None:
            dist.all_reduce(parameter.grad, group=same_experts)
