"""Expert parallelism tried out: what ranks run that a notebook, a benchmark or torchrun starts.

    python -m torch.distributed.run --nproc-per-node 2 -m moe_course.parallel.demo

compares one layer on all ranks with the same layer on one, output and gradients, then prints tokens/s and bytes. The
page "A run on a cluster" tells how to start it on several machines.

Chapter: book/bandwidth/cluster.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from moe_course.layers import Experts, MoE, Routing, TopKRouter
from moe_course.layers.routing import renormalised
from moe_course.parallel.expert_parallel import (
    ExpertParallelMoE,
    Traffic,
    reduce_gradients,
    shard,
)
from moe_course.parallel.launch import Place, torchrun_ranks


@dataclass(frozen=True)
class Sizes:
    """A layer and its tokens; float32."""

    tokens: int = 512  # of each rank
    width: int = 64
    hidden: int = 128  # of one expert
    experts: int = 8  # on all ranks together
    k: int = 2


class EvenRouter(nn.Module):
    """Chooses experts in turn, so that all are chosen equally often: token t takes t·K up to t·K + K - 1, modulo E."""

    def __init__(self, experts: int, k: int) -> None:
        super().__init__()
        self.experts, self.k = experts, k

    def forward(
        self, x: Float[Tensor, "T D"], token_ids: Tensor | None = None
    ) -> Routing:
        first = torch.arange(len(x), device=x.device)[:, None] * self.k
        chosen = (first + torch.arange(self.k, device=x.device)) % self.experts
        logits = x.new_full((len(x), self.experts), -9.0)
        logits.scatter_(1, chosen, 1.0)
        return renormalised(logits, self.k)


def whole_layer(sizes: Sizes, even: bool = False) -> MoE:
    """The layer on one process; the same weights in every process that asks."""
    torch.manual_seed(0)
    router: nn.Module = TopKRouter(sizes.width, sizes.experts, sizes.k)
    if even:
        router = EvenRouter(sizes.experts, sizes.k)
    return MoE(router, Experts(sizes.experts, sizes.width, sizes.hidden))


def tokens_of(rank: int, sizes: Sizes) -> Float[Tensor, "T D"]:
    rng = torch.Generator().manual_seed(rank)
    return torch.randn(sizes.tokens, sizes.width, generator=rng)


def parallel_layer(
    sizes: Sizes, even: bool = False, place: Place | None = None
) -> ExpertParallelMoE:
    """`whole_layer`, spread over all ranks."""
    device = torch.device("cpu") if place is None else place.device
    layer = whole_layer(sizes, even).to(device)
    mine = shard(layer.experts, dist.get_rank(), dist.get_world_size())
    return ExpertParallelMoE(layer.router, mine, None if place is None else place.group)


def step(layer: nn.Module, x: Float[Tensor, "T D"], tokens: int) -> Tensor:
    """Forward and backward of this rank's part of a loss that is a mean over `tokens` tokens; returns the output."""
    y, _, _ = layer(x)
    (y.square().sum() / tokens).backward()
    if isinstance(layer, ExpertParallelMoE):
        reduce_gradients(layer, layer.experts, world=layer.group)
    return y.detach()


def compare(
    sizes: Sizes, even: bool = False, place: Place | None = None
) -> dict[str, Any]:
    """One step of the parallel layer beside one step of the whole layer on all ranks' tokens.

    Returns the greatest differences of `output`, of the gradients of `tokens`, `router` and `experts`, each divided by
    the largest entry of what it is compared with; `traffic`, bytes that this rank sent in the step; `slots`, how many
    choices each expert received from this rank; and of a forward pass beforehand `counted`, bytes by the layer's own
    count, and `written`, by that of the operating system (`bytes_written`).
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    layer = parallel_layer(sizes, even, place)
    device = layer.experts.w_up.device
    everybody = [tokens_of(r, sizes).to(device) for r in range(ranks)]
    _together(place)
    before = bytes_written()
    with torch.no_grad():
        _, routing, _ = layer(everybody[rank])
    after = bytes_written()
    written = None if before is None or after is None else after - before
    counted, layer.traffic = layer.traffic.total(), Traffic()

    x = everybody[rank].clone().requires_grad_()
    y = step(layer, x, ranks * sizes.tokens)

    whole = whole_layer(sizes, even).to(device)
    all_x = torch.cat(everybody).requires_grad_()
    all_y = step(whole, all_x, ranks * sizes.tokens)

    mine = slice(rank * sizes.tokens, (rank + 1) * sizes.tokens)
    each = sizes.experts // ranks
    held = slice(rank * each, (rank + 1) * each)
    assert x.grad is not None
    assert all_x.grad is not None
    differences = {
        "output": _difference(y, all_y[mine]),
        "tokens": _difference(x.grad, all_x.grad[mine]),
        "router": _most(layer.router, whole.router, slice(None)),
        "experts": _most(layer.experts, whole.experts, held),
    }
    slots = torch.bincount(routing.expert_ids.flatten(), minlength=sizes.experts)
    return differences | {
        "traffic": asdict(layer.traffic),
        "slots": slots.tolist(),
        "counted": counted,
        "written": written,
    }


def bytes_written() -> int | None:
    """Bytes that this process has written so far, to sockets and files, as Linux counts them; None elsewhere.

    What gloo sends is among them, with its headers. What a GPU or RDMA sends is not.
    """
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return int(dict(line.split(": ") for line in lines)["wchar"])


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def _most(a: nn.Module, b: nn.Module, part: slice) -> float:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    found = [_difference(p.grad, q.grad[part]) for p, q in pairs]  # type: ignore[arg-type, index]
    return max(found, default=0.0)


def exchange_times(
    sizes: Sequence[int], rounds: int = 15, place: Place | None = None
) -> list[float]:
    """Median seconds of one all_to_all in which every rank sends so many bytes to the others, split evenly.

    sizes: bytes that leave a rank; rounded to whole bytes for each peer. Within a round the sizes come in a random
    order, the same on all ranks: what an exchange finds in the caches depends on the one before. Each time runs from a
    barrier until this rank has sent and received all.
    """
    ranks = dist.get_world_size()
    group = None if place is None else place.group
    device = torch.device("cpu") if place is None else place.device
    rows = [size // max(1, ranks - 1) * ranks for size in sizes]
    # Ones, not zeros: memory that nobody has written to is given out by the page, while the clock runs.
    sent = [torch.ones(n, dtype=torch.uint8, device=device) for n in rows]
    received = [torch.ones_like(mine) for mine in sent]
    times: list[list[float]] = [[] for _ in sizes]
    for turn in range(rounds + 1):  # the first warms up
        for i in random.Random(turn).sample(range(len(sizes)), len(sizes)):
            start = _together(place)
            dist.all_to_all_single(received[i], sent[i], group=group)
            seconds = _now(place) - start
            if turn:
                times[i].append(seconds)
    return [statistics.median(found) for found in times]


def _now(place: Place | None) -> float:
    """The time at which this rank has done what it was told to."""
    if place is not None and place.device.type == "cuda":
        torch.cuda.synchronize(place.device)
    return time.perf_counter()


def _together(place: Place | None) -> float:
    """The time at which every rank has."""
    _now(place)
    dist.barrier()
    return time.perf_counter()


def tour(
    sizes: Sizes, sent: Sequence[int], rounds: int = 15
) -> dict[str, dict[str, Any] | list[float]]:
    """What the chapter asks of each rank: `even` and `routed`, from `compare`, and `times`, from `exchange_times`."""
    return {
        "even": compare(sizes, even=True),
        "routed": compare(sizes),
        "times": exchange_times(sent, rounds),
    }


def step_times(
    sizes: Sizes, rounds: int = 5, place: Place | None = None
) -> dict[str, float]:
    """Median seconds of a step: `parallel` on all ranks; on rank 0, while the others wait, `strong`, the whole layer
    on the tokens of all ranks, and `weak`, the whole layer on one rank's tokens.

    The three take turns within a round.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    layer = parallel_layer(sizes, place=place)
    device = layer.experts.w_up.device
    whole = whole_layer(sizes).to(device)
    mine = tokens_of(rank, sizes).to(device)
    everybody = torch.cat([tokens_of(r, sizes) for r in range(ranks)]).to(device)
    contenders: dict[str, tuple[nn.Module, Tensor, bool]] = {
        "parallel": (layer, mine, True),
        "strong": (whole, everybody, rank == 0),
        "weak": (whole, mine, rank == 0),
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):  # the first warms up
        for name, (module, x, takes_part) in contenders.items():
            module.zero_grad()
            start = _together(place)
            if takes_part:
                step(module, x.clone().requires_grad_(), ranks * sizes.tokens)
            seconds = _together(place) - start
            if turn:
                times[name].append(seconds)
    return {name: statistics.median(found) for name, found in times.items()}


def report(place: Place, sizes: Sizes, rounds: int) -> list[str]:
    """Compare, measure, and say so: the lines that rank 0 prints."""
    found = compare(sizes, place=place)
    names = ("output", "tokens", "router", "experts")
    most = {name: torch.tensor(found[name]) for name in names}
    sent = torch.tensor(float(sum(found["traffic"].values())))
    for value in most.values():
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
    dist.all_reduce(sent)
    wrong = {name: float(value) for name, value in most.items() if value > 1e-4}
    if wrong or any(value.isnan() for value in most.values()):
        raise ValueError(f"the parallel layer differs from the layer alone: {most}")
    seconds = step_times(sizes, rounds, place)
    tokens = place.ranks * sizes.tokens
    shape = ", ".join(f"{key} {value}" for key, value in asdict(sizes).items())
    return [
        f"{place.ranks} ranks, {place.backend}, {place.device.type}: {shape}",
        "equal to one process: "
        + ", ".join(f"{name} to {value:.0e}" for name, value in most.items()),
        f"sent in a step, all ranks: {sent:,.0f} bytes",
        f"{tokens / seconds['parallel']:,.0f} tokens/s; one process on the same tokens "
        f"{tokens / seconds['strong']:,.0f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for field in fields(Sizes):
        parser.add_argument(f"--{field.name}", type=int, default=field.default)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds")
    given = vars(parser.parse_args())
    rounds, timeout = given.pop("rounds"), given.pop("timeout")
    torch.set_num_threads(1)
    with torchrun_ranks(timeout) as place:
        lines = report(place, Sizes(**given), rounds)
        if place.rank == 0:
            print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
