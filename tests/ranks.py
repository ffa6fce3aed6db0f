"""What the ranks of tests/test_parallel.py run: processes of their own import it by name."""

from __future__ import annotations

import os
import time

import torch
import torch.distributed as dist

from moe_course.layers import Experts, MoE, TopKRouter, softmax_top_k
from moe_course.parallel import ExpertParallelMoE, demo, reduce_gradients, shard


def bank(experts, width, hidden, k, activation, bias, dtype):
    torch.manual_seed(0)
    router = TopKRouter(width, experts, k, gate=softmax_top_k)
    return router.to(dtype), Experts(experts, width, hidden, activation, bias).to(dtype)


def tokens_of(rank, counts, width, dtype):
    rng = torch.Generator().manual_seed(7)
    x = torch.randn(sum(counts), width, generator=rng, dtype=torch.float64)
    start = sum(counts[:rank])
    return x.to(dtype)[start : start + counts[rank]].requires_grad_()


def step(
    counts,
    experts=4,
    width=8,
    hidden=6,
    k=2,
    activation="swiglu",
    bias=False,
    tilt=0.0,
    dtype=torch.float64,
    dispatch="grouped",
    masked=False,
):
    """One forward and backward pass of each rank: output, gradients, traffic."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    router, whole = bank(experts, width, hidden, k, activation, bias, dtype)
    with torch.no_grad():
        router.weight[0] *= 1 + tilt
    layer = ExpertParallelMoE(router, shard(whole, rank, ranks), dispatch=dispatch)
    x = tokens_of(rank, counts, width, dtype)
    mask = torch.arange(len(x)) % 3 != 0 if masked else None
    y, _, slots = layer(x, mask)
    # This rank's part of the mean over all tokens.
    (y.square().sum() / max(1, sum(counts))).backward()
    reduce_gradients(layer, layer.experts)
    return {
        "y": y.detach(),
        "x": x.grad,
        "router": [p.grad for p in layer.router.parameters()],
        "experts": [p.grad for p in layer.experts.parameters()],
        "traffic": vars(layer.traffic),
        "slots": len(slots.token),
    }


def single(
    counts,
    ranks,
    experts=4,
    width=8,
    hidden=6,
    k=2,
    activation="swiglu",
    bias=False,
    tilt=0.0,
    dtype=torch.float64,
    masked=False,
    **_,
):
    """The same on one process."""
    router, whole = bank(experts, width, hidden, k, activation, bias, dtype)
    with torch.no_grad():
        router.weight[0] *= 1 + tilt
    layer = MoE(router, whole, dispatch="loop")
    xs = [tokens_of(rank, counts, width, dtype) for rank in range(ranks)]
    x = torch.cat([x.detach() for x in xs]).requires_grad_()
    mask = None
    if masked:
        mask = torch.cat([torch.arange(n) % 3 != 0 for n in counts])
    y, _, _ = layer(x, token_mask=mask)
    (y.square().sum() / max(1, sum(counts))).backward()
    return (
        y.detach(),
        x.grad,
        [p.grad for p in router.parameters()],
        [p.grad for p in whole.parameters()],
    )


def data_parallel(counts, expert_ranks):
    """Expert parallelism inside pairs of ranks, data parallelism across them."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mine = same = None
    for first in range(0, ranks, expert_ranks):
        members = list(range(first, first + expert_ranks))
        group = dist.new_group(members)
        mine = group if rank in members else mine
    for place in range(expert_ranks):
        members = list(range(place, ranks, expert_ranks))
        group = dist.new_group(members)
        same = group if rank in members else same
    router, whole = bank(4, 8, 6, 2, "swiglu", False, torch.float64)
    layer = ExpertParallelMoE(
        router, shard(whole, rank % expert_ranks, expert_ranks), mine
    )
    x = tokens_of(rank, counts, 8, torch.float64)
    y, _, _ = layer(x)
    (y.square().sum() / sum(counts)).backward()
    reduce_gradients(layer, layer.experts, same_experts=same)
    return {
        "y": y.detach(),
        "x": x.grad,
        "router": [p.grad for p in layer.router.parameters()],
        "experts": [p.grad for p in layer.experts.parameters()],
    }


def step_with(counts, options):
    return step(counts, **options)


def evenly_routed(counts):
    """Token t of every rank goes to experts t and t + 1, modulo their number: an even load."""
    _, whole = bank(8, 8, 6, 2, "swiglu", False, torch.float64)
    rank, ranks = dist.get_rank(), dist.get_world_size()

    class Even(torch.nn.Module):
        def forward(self, x):
            t = torch.arange(len(x))
            logits = torch.full((len(x), 8), -9.0, dtype=x.dtype)
            logits[t, t % 8] = 1.0
            logits[t, (t + 1) % 8] = 0.5
            return softmax_top_k(logits, 2)

    layer = ExpertParallelMoE(Even(), shard(whole, rank, ranks))
    y, _, _ = layer(tokens_of(rank, counts, 8, torch.float64))
    y.sum().backward()
    return vars(layer.traffic)


def tour_and_steps(sizes):
    """All that the chapter and the benchmark run, once each."""
    found = demo.tour(sizes, [0, 1001, 10000], rounds=2)
    return found | {"steps": demo.step_times(sizes, rounds=2)}


def wrong_router():
    router, _ = bank(6, 8, 6, 2, "swiglu", False, torch.float32)
    _, whole = bank(4, 8, 6, 2, "swiglu", False, torch.float32)
    layer = ExpertParallelMoE(router, shard(whole, dist.get_rank(), 2))
    layer(torch.randn(3, 8))


def mismatched():
    rank = dist.get_rank()
    router, whole = bank(4, 8, 6 + rank, 2, "swiglu", False, torch.float32)
    ExpertParallelMoE(router, shard(whole, 0, 2))


def one_dies(how):
    if dist.get_rank() == 1:
        if how == "kill":
            os.kill(os.getpid(), 9)
        if how == "raise":
            raise ZeroDivisionError("on purpose")
        if how == "sleep":
            time.sleep(600)
    step([3] * dist.get_world_size())


def rank():
    return dist.get_rank()
