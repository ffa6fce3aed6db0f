"""Expert parallelism: the time of an exchange by its size, and of a whole training step against one process.

    python benchmarks/expert_parallel.py [--ranks 1 2] [--rounds 15] [--processes 3] [--record]
    python -m torch.distributed.run --nproc-per-node 8 benchmarks/expert_parallel.py [--record]

The first starts ranks of one thread each on this machine, with gloo; by default one rank and as many as there are cores
(up to 8). The second measures the ranks that torchrun started: NCCL where every rank has a GPU.

A step is the layer forward and backward, with the sum of the router's gradient. What it is compared with runs on rank
0 while the others wait: the same layer in one process, on the tokens of all ranks (strong scaling: the same work,
divided) and on those of one rank (weak scaling: as much work for each). The three take turns within each round; a time
is the median over rounds, each row the median over fresh groups of processes.
"""

from __future__ import annotations

import argparse
import os
import statistics
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from moe_course import costs, records
from moe_course.parallel import Place, run_ranks, torchrun_ranks
from moe_course.parallel.demo import Sizes, exchange_times, step_times

# The same FLOPs and slots' width; few wide experts send a quarter of what many narrow ones do.
SHAPES = {
    "wide": Sizes(tokens=1024, width=256, hidden=512, experts=8, k=2),
    "narrow": Sizes(tokens=1024, width=256, hidden=128, experts=32, k=8),
}
SENT = tuple(1024 * 4**power for power in range(8))  # 1 KiB to 16 MiB
FOLDER = Path("moe_course/data/records")


def measured(sizes: list[Sizes], rounds: int, place: Place | None = None) -> Any:
    """What each rank of a group runs."""
    torch.set_num_threads(1)
    alone = place is not None and place.ranks == 1
    alone = alone or (place is None and torch.distributed.get_world_size() == 1)
    exchanges = [] if alone else exchange_times(SENT, rounds, place)
    return exchanges, [step_times(one, rounds, place) for one in sizes]


def rows_of(ranks: int, backend: str, found: list[Any]) -> list[dict[str, Any]]:
    """Rows from what several groups of so many ranks measured."""
    rows: list[dict[str, Any]] = []
    common = {"ranks": ranks, "backend": backend}
    each = zip(*(exchanges for exchanges, _ in found), strict=True)
    exchanges = [statistics.median(same) for same in each]
    # One rank exchanges nothing, and has no times.
    for sent, seconds in zip(SENT, exchanges, strict=False):
        row = {"kind": "exchange", "sent_bytes": sent, "time_us": seconds * 1e6}
        rows.append(common | row)
    if exchanges:
        link = costs.fit_link(backend, SENT, exchanges, messages=ranks - 1)
        rows.append(
            common
            | {
                "kind": "fit",
                "latency_us": link.latency * 1e6,
                "bandwidth_gb_s": link.bandwidth / 1e9,
            }
        )
    for index, (name, sizes) in enumerate(SHAPES.items()):
        times = {
            key: statistics.median(steps[index][key] for _, steps in found)
            for key in ("parallel", "strong", "weak")
        }
        one_way = costs.all_to_all_bytes(sizes.tokens, sizes.width, sizes.k, ranks, 4)
        rows.append(
            common
            | {"kind": "step", "shape": name}
            | asdict(sizes)
            | {f"{key}_ms": 1e3 * seconds for key, seconds in times.items()}
            | {
                "tokens_per_s": ranks * sizes.tokens / times["parallel"],
                "one_process_tokens_per_s": ranks * sizes.tokens / times["strong"],
                "strong_efficiency": times["strong"] / times["parallel"] / ranks,
                "weak_efficiency": times["weak"] / times["parallel"],
                "expected_sent_bytes": 4 * one_way,  # if all experts are chosen evenly
            }
        )
    return [
        {key: _short(value) if isinstance(value, float) else value for key, value in row.items()}
        for row in rows
    ]  # fmt: skip


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def shown(row: dict[str, Any]) -> str:
    start = f"{row['ranks']} ranks, {row['backend']}"
    if row["kind"] == "exchange":
        return f"{start}: {row['sent_bytes']:>10,} bytes {row['time_us']:>10,.0f} us"
    if row["kind"] == "fit":
        return f"{start}: alpha {row['latency_us']:,.0f} us, beta {row['bandwidth_gb_s']:.2f} GB/s"
    return (
        f"{start}, {row['shape']}: {row['parallel_ms']:.1f} ms, {row['tokens_per_s']:,.0f} tokens/s "
        f"(one process {row['one_process_tokens_per_s']:,.0f}), efficiency {row['strong_efficiency']:.0%} strong, "
        f"{row['weak_efficiency']:.0%} weak"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    cores = min(8, os.cpu_count() or 1)
    parser.add_argument("--ranks", type=int, nargs="+", default=sorted({1, cores}))
    parser.add_argument("--rounds", type=int, default=15, help="in each group")
    parser.add_argument("--processes", type=int, default=3, help="groups")
    parser.add_argument("--tokens", type=int, help="of each rank, instead of 1024")
    parser.add_argument("--record", action="store_true", help=f"write to {FOLDER}")
    options = parser.parse_args()
    sizes = list(SHAPES.values())
    if options.tokens:
        sizes = [replace(one, tokens=options.tokens) for one in sizes]
        SHAPES.update(zip(SHAPES, sizes, strict=True))

    if "RANK" in os.environ:  # torchrun started this
        with torchrun_ranks() as place:
            found = measured(sizes, options.rounds, place)
            if place.rank:
                return
            rows = rows_of(place.ranks, place.backend, [found])
            kind = "gpu" if place.device.type == "cuda" else "cpu_torchrun"
            started = f"python -m torch.distributed.run --nproc-per-node {place.ranks}"
    else:
        rows, kind, started = [], "cpu", "python"
        for ranks in options.ranks:
            groups = [
                run_ranks(measured, ranks, sizes, options.rounds, timeout=120)[0]
                for _ in range(options.processes)
            ]
            rows += rows_of(ranks, "gloo", groups)
    for row in rows:
        print(shown(row))
    if options.record:
        words = f"--rounds {options.rounds} --record"
        if kind == "cpu":
            ranks = " ".join(map(str, options.ranks))
            words = f"--ranks {ranks} --processes {options.processes} {words}"
        command = f"{started} benchmarks/expert_parallel.py {words}"
        name = f"expert_parallel_{kind}"
        records.save(records.measure(name, command, rows), FOLDER / f"{name}.json")


if __name__ == "__main__":
    main()
