"""Recipes for fine-tuning a sparse model, side by side: what is learned, what is forgotten, how far the router moves.

    python -m moe_course.finetune.study [--jobs N]

A small byte-level model is trained on four domains, then every recipe continues on a fifth one, at three learning
rates, from the same three checkpoints (seeds). A finished run is a file: the same command goes on where it was stopped.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from moe_course import balance
from moe_course.finetune.drift import relevant_experts, router_drift
from moe_course.finetune.lora import apply_lora_to_moe, count_trainable_params
from moe_course.finetune.select import (
    parts_of,
    spare_idle_experts,
    train_experts,
    train_only,
)
from moe_course.layers import DecoderBlock, MoE, Routing, Transformer
from moe_course.layers.routing import renormalised
from moe_course.specs import FFN, GQA, ModelSpec, RoutedExperts
from moe_course.training import data, loop, runs

RECORD = Path("book/data/records/finetuning.json")
FOLDER = Path("_build/experiments/finetuning")

OLD = ("prose", "python", "manual", "logs")
NEW = "c"
SEEDS = (0, 1, 2)
RATES = (3e-4, 1e-3, 3e-3)


@dataclass(frozen=True)
class Recipe:
    """What of the model is trained, and how."""

    parts: tuple[str, ...] = ("router", "experts", "shared", "rest")
    router_rate: float = 1.0  # times the learning rate
    balance: float = 0.01  # weight of the balancing loss
    subset: float | None = (
        None  # experts that carry so much of the new domain's load, no others
    )
    lora: int | None = None  # rank, on the experts
    replay: float = 0.0  # share of the text that is of the old domains


RECIPES = {
    "everything": Recipe(),
    "everything, no balancing loss": Recipe(balance=0.0),
    "everything, balancing loss x10": Recipe(balance=0.1),
    "everything, replay 20 %": Recipe(replay=0.2),
    "router at 1/100 of the rate": Recipe(router_rate=0.01),
    "router frozen": Recipe(parts=("experts", "shared", "rest")),
    "router alone": Recipe(parts=("router",)),
    "experts alone": Recipe(parts=("experts",)),
    "router and experts": Recipe(parts=("router", "experts")),
    "all but router and experts": Recipe(parts=("shared", "rest")),
    "experts of the domain": Recipe(parts=("experts",), subset=0.5),
    "router and experts of the domain": Recipe(parts=("router", "experts"), subset=0.5),
    "LoRA on experts": Recipe(parts=(), lora=4),
    "LoRA on experts, router": Recipe(parts=("router",), lora=4),
}


@dataclass(frozen=True)
class Setup:
    """What all runs share."""

    width: int = 64
    layers: int = 2
    heads: int = 2
    hidden: int = 96  # of one expert
    experts: int = 8
    k: int = 2
    context: int = 128
    batch_size: int = 16
    first_steps: int = 1000
    steps: int = 200
    held_out: int = 32_768  # bytes of each domain

    def model(self) -> Transformer:
        spec = ModelSpec(
            "fine-tuned",
            self.layers,
            self.width,
            data.VOCAB,
            GQA(self.heads, self.heads, self.width // self.heads),
            moe=RoutedExperts(self.experts, self.k, FFN(self.hidden)),
        )
        return Transformer(spec, renormalised)


def text_of(domains: Sequence[str], setup: Setup, steps: int) -> Tensor:
    return data.load(domains, "train", steps * setup.batch_size * setup.context + 1)


def held_out(domain: str, setup: Setup) -> Int[Tensor, "B S"]:
    text = data.load([domain], "held_out")[: setup.held_out]
    windows = len(text) // setup.context
    return text[: windows * setup.context].view(windows, -1).long()


def bits(model: Transformer, setup: Setup) -> dict[str, float]:
    """Held-out loss of each domain in bits per byte."""
    windows = setup.held_out // setup.context
    return {
        domain: loop.bits_per_byte(
            model,
            data.load([domain], "held_out")[: setup.held_out + 1],
            setup.context,
            windows,
        )
        for domain in (*OLD, NEW)
    }


def pretrained(seed: int, setup: Setup, folder: Path) -> Transformer:
    """The model that all recipes of a seed begin with, trained if it is not there yet."""
    torch.manual_seed(seed)
    model = setup.model()
    path = folder / f"pretrained-seed{seed}.pt"
    recipe = loop.Recipe(setup.first_steps, warmup=setup.first_steps // 10, rows=1)
    text = text_of(OLD, setup, setup.first_steps)
    batches = data.Batches(text, setup.context, setup.batch_size, seed)
    loop.train(model, batches, recipe, flops_per_token=0, held_out={}, checkpoint=path)
    return model


def moe_layers(model: Transformer) -> list[MoE]:
    return [
        b.ffn
        for b in model.blocks
        if isinstance(b, DecoderBlock) and isinstance(b.ffn, MoE)
    ]


@torch.no_grad()
def domain_experts(model: Transformer, share: float, setup: Setup) -> list[Tensor]:
    """By layer, the experts that carry `share` of the new domain's load before any tuning: of its training text."""
    ids = text_of([NEW], setup, 8)[:-1].view(-1, setup.context).long()
    routings = model(ids)[1]
    return [relevant_experts(r, share, "tokens") for r in routings]


def prepare(
    model: Transformer, recipe: Recipe, setup: Setup
) -> Callable[[torch.optim.Optimizer], object] | None:
    """Freeze, adapt and choose as the recipe says; returns what the optimiser has to be told."""
    chosen = (
        None if recipe.subset is None else domain_experts(model, recipe.subset, setup)
    )
    if recipe.lora is None:
        train_only(model, recipe.parts)
    else:
        apply_lora_to_moe(
            model, recipe.lora, 2.0 * recipe.lora, train_router="router" in recipe.parts
        )
    if chosen is None:
        return None
    banks = [layer.experts for layer in moe_layers(model)]
    for bank, mask in zip(banks, chosen, strict=True):
        train_experts(bank, mask)
    return partial(spare_idle_experts, banks=banks)


def trained_numbers(
    model: Transformer, recipe: Recipe, before: Transformer, setup: Setup
) -> int:
    """Numbers that training changes; of a stack only the chosen experts."""
    trained = count_trainable_params(model)[1]
    if recipe.subset is not None:
        masks = domain_experts(before, recipe.subset, setup)
        for layer, mask in zip(moe_layers(model), masks, strict=True):
            each = sum(p.numel() for p in layer.experts.parameters()) // len(mask)
            trained -= each * int((~mask).sum())
    return trained


def tune(
    name: str, peak: float, seed: int, setup: Setup, folder: Path
) -> dict[str, Any]:
    """One recipe from one checkpoint: losses of all domains before and after, drift, load."""
    recipe = RECIPES[name]
    before = pretrained(seed, setup, folder)
    model = copy.deepcopy(before)
    tell = prepare(model, recipe, setup)
    router = {n for n, part in parts_of(model).items() if part == "router"}
    old = round(recipe.replay * setup.steps)
    text = text_of([NEW], setup, setup.steps - old)
    if old:
        text = torch.cat([text[:-1], text_of(OLD, setup, old)])
    batches = data.Batches(text, setup.context, setup.batch_size, seed)
    plan = loop.Recipe(
        min(setup.steps, len(batches)), peak_lr=peak, warmup=setup.steps // 10,
        balance=recipe.balance, rows=1,
    )  # fmt: skip
    counts: list[Tensor] = []

    def look(_: Any, routings: list[Routing]) -> None:
        counts.append(torch.stack([balance.assignments(r) for r in routings]))

    torch.manual_seed(seed)
    loop.train(
        model,
        batches,
        plan,
        flops_per_token=0,
        held_out={},
        after_step=look,
        rate=lambda n: recipe.router_rate if n in router else 1.0,
        prepare=tell,
    )
    late = torch.stack(counts[-20:]).sum(0)
    drifts = {
        domain: router_drift(before, model, held_out(domain, setup)[:64])
        for domain in (*OLD, NEW)
    }
    return {
        "bits_before": bits(before, setup),
        "bits_after": bits(model, setup),
        "trainable": trained_numbers(model, recipe, before, setup),
        "agreement": {d: [round(x.agreement, 4) for x in v] for d, v in drifts.items()},
        "kl_nats": {d: [round(x.kl, 5) for x in v] for d, v in drifts.items()},
        "max_violation_before": [
            round(max(x.load_before) * setup.experts - 1, 3) for x in drifts[NEW]
        ],
        "max_violation_after": [round(balance.max_violation(c), 3) for c in late],
        "dead_experts": [balance.dead_experts(c) for c in late],
    }


Run = tuple[str, float, int]


def path_of(run: Run, folder: Path) -> Path:
    name, peak, seed = run
    plain = "".join(c if c.isalnum() else "-" for c in name)
    return folder / f"{plain}-{peak:g}-seed{seed}.json"


def identity(run: Run, setup: Setup) -> dict[str, Any]:
    name, peak, seed = run
    return {
        "name": name, "peak_lr": peak, "seed": seed,
        "recipe": asdict(RECIPES[name]), "setup": asdict(setup),
    }  # fmt: skip


def work(run: Run, setup: Setup, folder: Path) -> dict[str, Any]:
    """Read a run's result or make it."""
    make = partial(tune, *run, setup, folder)
    return runs.made(path_of(run, folder), identity(run, setup), make)


def row(result: dict[str, Any]) -> dict[str, Any]:
    """One run as a record holds it."""
    before, after = result["bits_before"], result["bits_after"]

    def mean(values: Iterable[float]) -> float:
        values = list(values)
        return round(sum(values) / len(values), 4)

    return {
        "recipe": result["name"],
        "peak_lr": result["peak_lr"],
        "seed": result["seed"],
        "trainable": result["trainable"],
        "new_bits_before": round(before[NEW], 4),
        "new_bits_after": round(after[NEW], 4),
        "old_bits_before": mean(before[d] for d in OLD),
        "old_bits_after": mean(after[d] for d in OLD),
        "agreement_old": mean(a for d in OLD for a in result["agreement"][d]),
        "agreement_new": mean(result["agreement"][NEW]),
        "kl_old_nats": mean(k for d in OLD for k in result["kl_nats"][d]),
        "max_violation_before": result["max_violation_before"],
        "max_violation_after": result["max_violation_after"],
        "dead_experts": result["dead_experts"],
    }


def all_runs() -> list[Run]:
    """Seed by seed: a study that is cut short has whole comparisons."""
    return [(name, peak, seed) for seed in SEEDS for name in RECIPES for peak in RATES]


def study(folder: Path, jobs: int) -> list[dict[str, Any]]:
    """The checkpoints first, then all runs, `jobs` at a time; the record's rows."""
    setup = Setup()
    runs.side_by_side(partial(_first, setup=setup, folder=folder), SEEDS, jobs)
    one = partial(work, setup=setup, folder=folder)
    runs.side_by_side(one, all_runs(), jobs)
    return [row(one(run)) for run in all_runs()]


def _first(seed: int, setup: Setup, folder: Path) -> None:
    torch.set_num_threads(1)
    pretrained(seed, setup, folder)


def main(arguments: Sequence[str] | None = None) -> int:
    return runs.command_line(
        "moe_course.finetune.study", "fine-tuning", FOLDER, RECORD, study, arguments
    )


if __name__ == "__main__":
    sys.exit(main())
