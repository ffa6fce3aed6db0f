"""Upcycling against its alternatives, at equal extra compute: what a trained dense model gains by becoming sparse.

    python -m moe_course.finetune.upcycle_study [--jobs N]

A small dense byte-level model is trained; then the same FLOPs are spent on it as it is, on its upcycled forms, and on
sparse models from scratch. A finished run is a file: the same command goes on where it was stopped.

Chapter: book/finetuning/upcycling.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from moe_course import records
from moe_course.finetune.upcycle import upcycle, upcycled_spec
from moe_course.layers import Transformer
from moe_course.layers.routing import renormalised, softmax_top_k
from moe_course.specs import FFN, GQA, ModelSpec
from moe_course.training import data, loop, runs

RECORD = records.FOLDER / "upcycling.json"
FOLDER = Path("_build/experiments/upcycling")
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Arm:
    """What the extra compute is spent on; experts = 1 is the dense model itself."""

    experts: int = 1
    k: int = 1
    granularity: int = 1
    noise: float = 0.0
    gate: str = "renormalised"
    start: str = "upcycled"  # or "scratch", or "scratch, all compute"


ARMS = {
    "dense, trained on": Arm(),
    "1 of 8": Arm(8, 1),
    "1 of 8, weight of the softmax": Arm(8, 1, gate="softmax"),
    "2 of 8": Arm(8, 2),
    "2 of 8, noise 0.1": Arm(8, 2, noise=0.1),
    "2 of 8, noise 0.5": Arm(8, 2, noise=0.5),
    "4 of 16, halved": Arm(8, 2, granularity=2),
    "2 of 8 from scratch, extra compute": Arm(8, 2, start="scratch"),
    "2 of 8 from scratch, all compute": Arm(8, 2, start="scratch, all compute"),
}


@dataclass(frozen=True)
class Setup:
    """What all runs share."""

    width: int = 64
    layers: int = 2
    heads: int = 2
    hidden: int = 192
    context: int = 128
    batch_size: int = 16
    first_steps: int = 800
    extra_steps: int = 400  # of the dense model; a costlier one takes fewer
    peak_lr: float = 3e-3
    extra_lr: float = (
        1e-3  # of what goes on from a trained model: the full rate undoes much first
    )
    held_out: int = 32_768  # bytes of each domain
    rows: int = 8  # of each curve

    def spec(self) -> ModelSpec:
        return ModelSpec(
            "dense",
            self.layers,
            self.width,
            data.VOCAB,
            GQA(self.heads, self.heads, self.width // self.heads),
            ffn=FFN(self.hidden),
        )


def halves(setup: Setup) -> tuple[UInt8[Tensor, " N"], UInt8[Tensor, " M"]]:
    """Text to train on first, and text for the extra steps: from each domain, and no byte in both."""
    size = setup.batch_size * setup.context
    first, extra = setup.first_steps * size, setup.extra_steps * size
    before, after = [], []
    for domain in data.DOMAINS:
        share = [n // len(data.DOMAINS) for n in (first, extra)]
        text = data.load([domain], "train", sum(share) + 1)
        before.append(text[: share[0]])
        after.append(text[share[0] :])
    return torch.cat(before), torch.cat(after)


def train(
    model: Transformer,
    text: Tensor,
    steps: int,
    seed: int,
    setup: Setup,
    checkpoint: Path | None = None,
    peak_lr: float | None = None,
) -> list[dict[str, Any]]:
    """So many steps, or as many as the text has; rows of the log, held-out bits as their mean over the domains."""
    batches = data.Batches(text, setup.context, setup.batch_size, seed)
    steps = min(steps, len(batches))
    recipe = loop.Recipe(
        steps,
        peak_lr=setup.peak_lr if peak_lr is None else peak_lr,
        warmup=steps // 10,
        rows=setup.rows,
        held_out_windows=setup.held_out // setup.context,
        final_windows=setup.held_out // setup.context,
    )
    held_out = {
        d: data.load([d], "held_out")[: setup.held_out + 1] for d in data.DOMAINS
    }
    log = loop.train(
        model,
        batches,
        recipe,
        flops_per_token=loop.flops_per_token(model.spec, setup.context),
        held_out=held_out,
        checkpoint=checkpoint,
    )
    return [
        {
            "flops": row["flops"],
            "bits": round(sum(row["bits"].values()) / len(row["bits"]), 4),
        }
        for row in log
    ]


def first(
    seed: int, setup: Setup, folder: Path
) -> tuple[Transformer, list[dict[str, Any]]]:
    """The dense model that all arms of a seed begin with."""
    torch.manual_seed(seed)
    model = Transformer(setup.spec())
    log = train(
        model,
        halves(setup)[0],
        setup.first_steps,
        seed,
        setup,
        folder / f"dense-seed{seed}.pt",
    )
    return model, log


def run(name: str, seed: int, setup: Setup, folder: Path) -> dict[str, Any]:
    """One arm: its curve of held-out bits against extra FLOPs, and what its start already knew."""
    arm = ARMS[name]
    dense, log = first(seed, setup, folder)
    torch.manual_seed(seed)
    gate = softmax_top_k if arm.gate == "softmax" else renormalised
    if arm.experts == 1:
        model = dense
    elif arm.start == "upcycled":
        model = upcycle(
            dense, arm.experts, arm.k, arm.granularity, noise=arm.noise, gate=gate
        )
    else:
        model = Transformer(upcycled_spec(setup.spec(), arm.experts, arm.k), gate)
    each = loop.flops_per_token(model.spec, setup.context)
    cost = loop.flops_per_token(dense.spec, setup.context)
    before, after = halves(setup)
    steps, text = setup.extra_steps, after
    if arm.start == "scratch, all compute":
        steps, text = setup.first_steps + setup.extra_steps, torch.cat([before, after])
    peak_lr = setup.extra_lr if arm.start == "upcycled" else setup.peak_lr
    steps = round(steps * cost / each)
    curve = train(model, text, steps, seed, setup, peak_lr=peak_lr)
    return {
        "dense_bits": log[-1]["bits"],
        "params": model.spec.total_params(),
        "flops_per_token": each,
        "curve": curve,
    }


Which = tuple[str, int]


def identity(which: Which, setup: Setup) -> dict[str, Any]:
    name, seed = which
    return {
        "arm": name, "seed": seed, "settings": asdict(ARMS[name]), "setup": asdict(setup),
    }  # fmt: skip


def path_of(which: Which, folder: Path) -> Path:
    name, seed = which
    plain = "".join(c if c.isalnum() else "-" for c in name)
    return folder / f"{plain}-seed{seed}.json"


def work(which: Which, setup: Setup, folder: Path) -> dict[str, Any]:
    """Read a run's result or make it."""
    make = partial(run, *which, setup, folder)
    return runs.made(path_of(which, folder), identity(which, setup), make)


def row(result: dict[str, Any]) -> dict[str, Any]:
    """One run as a record holds it."""
    curve = result["curve"]
    return {
        "arm": result["arm"],
        "seed": result["seed"],
        "params": result["params"],
        "flops_per_token": result["flops_per_token"],
        "dense_bits": result["dense_bits"],
        "start_bits": curve[0]["bits"],
        "end_bits": curve[-1]["bits"],
        "flops": [point["flops"] for point in curve],
        "bits": [point["bits"] for point in curve],
    }


def _first(seed: int, setup: Setup, folder: Path) -> None:
    torch.set_num_threads(1)
    first(seed, setup, folder)


def study(folder: Path, jobs: int) -> list[dict[str, Any]]:
    """The dense models first, then all arms, `jobs` at a time; the record's rows."""
    setup = Setup()
    which = [(name, seed) for seed in SEEDS for name in ARMS]
    runs.side_by_side(partial(_first, setup=setup, folder=folder), SEEDS, jobs)
    one = partial(work, setup=setup, folder=folder)
    runs.side_by_side(one, which, jobs)
    return [row(one(each)) for each in which]


def main(arguments: Sequence[str] | None = None) -> int:
    return runs.command_line(
        "moe_course.finetune.upcycle_study",
        "upcycling",
        FOLDER,
        RECORD,
        study,
        arguments,
    )


if __name__ == "__main__":
    sys.exit(main())
