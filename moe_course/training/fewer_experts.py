"""What a sparse model loses when it uses fewer experts per token than it was trained with, or more.

    python -m moe_course.training.fewer_experts [--jobs N]       9 runs, about three minutes on two cores

Models with eight experts, trained with one, two and four per byte, each evaluated with one to eight. Fewer experts send
fewer bytes. A finished run is a JSON file: the same command goes on where it was stopped.

Chapter: book/bandwidth/expert_parallel.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moe_course import records
from moe_course.layers import Transformer
from moe_course.training import balancing, data, loop
from moe_course.training.runs import command_line, made, side_by_side

RECORD = records.FOLDER / "fewer_experts.json"
FOLDER = Path("_build/experiments/fewer_experts")
TRAINED, SEEDS = (1, 2, 4), (0, 1, 2)
USED = (1, 2, 3, 4, 8)


def use_experts(model: Transformer, k: int) -> None:
    """Let every router choose k experts from now on; weights are renormalised over them where they were in training."""
    for block in model.blocks:
        block.ffn.router.k = k  # type: ignore[union-attr]


def bits_with(model: Transformer, k: int, setup: balancing.Setup) -> float:
    """Held-out loss in bits per byte, mean over the domains, with k experts per byte."""
    use_experts(model, k)
    bits = []
    for domain in data.DOMAINS:
        text = data.load([domain], "held_out")[: setup.held_out + 1]
        windows = setup.held_out // setup.context
        bits.append(loop.bits_per_byte(model, text, setup.context, windows))
    return sum(bits) / len(bits)


@torch.no_grad()
def chosen_sets(
    model: Transformer, k: int, setup: balancing.Setup
) -> list[dict[str, int]]:
    """By layer, how many held-out bytes chose each set of k experts; {"0 3": 5} are five that chose 0 and 3."""
    use_experts(model, k)
    model.eval()
    counts: list[Counter[tuple[int, ...]]] = [Counter() for _ in model.blocks]
    for domain in data.DOMAINS:
        text = data.load([domain], "held_out")[: setup.held_out]
        _, routings = model(text.view(-1, setup.context).long())
        for counter, routing in zip(counts, routings, strict=True):
            ids = routing.expert_ids.sort(dim=1).values.tolist()
            counter.update(map(tuple, ids))
    return [
        {" ".join(map(str, ids)): n for ids, n in sorted(counter.items())}
        for counter in counts
    ]


def train_and_use(k: int, seed: int, setup: balancing.Setup) -> list[dict[str, Any]]:
    """Train a model with k experts per byte; a row for each number it is used with."""
    torch.set_num_threads(1)
    model, _ = balancing.train(
        balancing.Run("switch", 0.01, experts=8, k=k, seed=seed), setup
    )
    rows: list[dict[str, Any]] = [
        {
            "trained_k": k,
            "seed": seed,
            "used_k": used,
            "held_out_bits": round(bits_with(model, used, setup), 4),
        }
        for used in USED
    ]
    for row in rows:
        if row["used_k"] == k == 2 and seed == 0:
            row["chosen"] = chosen_sets(model, k, setup)
    return rows


def work(
    which: tuple[int, int], setup: balancing.Setup, folder: Path
) -> list[dict[str, Any]]:
    """Read the rows of a model (its K and seed), or make them."""
    k, seed = which
    result = made(
        folder / f"k{k}-seed{seed}.json",
        {"setup": asdict(setup)},
        lambda: {"rows": train_and_use(k, seed, setup)},
    )
    return list(result["rows"])


def study(folder: Path, jobs: int) -> list[dict[str, Any]]:
    """All models, `jobs` at a time; the record's rows."""
    models = [(k, seed) for seed in SEEDS for k in TRAINED]
    one = partial(work, setup=balancing.Setup(), folder=folder)
    side_by_side(one, models, jobs)
    return [row for model in models for row in one(model)]


def main(arguments: Sequence[str] | None = None) -> int:
    return command_line(
        "moe_course.training.fewer_experts",
        "fewer_experts",
        FOLDER,
        RECORD,
        study,
        arguments,
    )


if __name__ == "__main__":
    sys.exit(main())
