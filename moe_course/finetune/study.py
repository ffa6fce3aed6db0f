"""Recipes for fine-tuning a sparse model, side by side: what is learned, what is forgotten, how far the router moves.

    python -m moe_course.finetune.study [--jobs N]

A small byte-level model is trained on four domains, then every recipe continues on a fifth one, at three learning
rates, from the same three checkpoints (seeds). A finished run is a file: the same command goes on where it was stopped.

Chapter: book/finetuning/drift.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from moe_course import balance, records
from moe_course.finetune.drift import drift_of, relevant_experts, replayed_routes
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

RECORD = records.FOLDER / "finetuning.json"
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


def windows_of(domain: str, setup: Setup) -> Int[Tensor, "B S1"]:
    """All held-out text of a domain, in windows of the context and the byte that follows."""
    text = data.load([domain], "held_out")[: setup.held_out + 1]
    return text.unfold(0, setup.context + 1, setup.context).long()


@torch.no_grad()
def read(
    model: Transformer, windows: Int[Tensor, "B S1"]
) -> tuple[float, list[Routing]]:
    """The loss in bits per byte, and what each router decided on the way."""
    logits, routings = model.eval()(windows[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    return loss.item() / math.log(2), routings


def compare(
    before: Transformer, after: Transformer, setup: Setup
) -> dict[str, dict[str, Any]]:
    """Both models on all held-out text: losses, also with each other's routes; drift and load by layer."""
    found = {}
    for domain in (*OLD, NEW):
        windows = windows_of(domain, setup)
        bits_before, old = read(before, windows)
        bits_after, new = read(after, windows)
        with replayed_routes(after, old):
            bits_old_routes, _ = read(after, windows)
        with replayed_routes(before, new):
            bits_new_routes, _ = read(before, windows)
        drifts = [drift_of(*pair) for pair in zip(old, new, strict=True)]
        found[domain] = {
            "bits_before": bits_before,
            "bits_after": bits_after,
            "bits_after_old_routes": bits_old_routes,
            "bits_before_new_routes": bits_new_routes,
            "agreement": [d.agreement for d in drifts],
            "kl_nats": [d.kl for d in drifts],
            "violation_before": [_violation(r) for r in old],
            "violation_after": [_violation(r) for r in new],
        }
    return found


def _violation(routing: Routing) -> float:
    return balance.max_violation(balance.assignments(routing))


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
    """One recipe from one checkpoint: what was trained, and how the model reads every domain before and after."""
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
    return {
        "trainable": trained_numbers(model, recipe, before, setup),
        "domains": compare(before, model, setup),
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
    """One run as a record holds it: means over the old domains, loads of each."""
    domains = result["domains"]

    def old(key: str) -> float:
        """The mean over the old domains, and over layers where there is one number for each."""
        return mean(_mean(domains[d][key]) for d in OLD)

    new = domains[NEW]
    values = {
        "new_bits_before": new["bits_before"],
        "new_bits_after": new["bits_after"],
        "new_bits_after_old_routes": new["bits_after_old_routes"],
        "old_bits_before": old("bits_before"),
        "old_bits_after": old("bits_after"),
        "old_bits_after_old_routes": old("bits_after_old_routes"),
        "old_bits_before_new_routes": old("bits_before_new_routes"),
        "agreement_old": old("agreement"),
        "agreement_new": _mean(new["agreement"]),
        "kl_old_nats": old("kl_nats"),
    }
    violations = {
        f"max_violation_{moment}": {
            d: [round(v, 3) for v in domains[d][f"violation_{moment}"]] for d in domains
        }
        for moment in ("before", "after")
    }
    return {
        "recipe": result["name"],
        "peak_lr": result["peak_lr"],
        "seed": result["seed"],
        "trainable": result["trainable"],
        **{key: round(value, 4) for key, value in values.items()},
        **violations,
        "dead_experts": result["dead_experts"],
    }


def _mean(value: float | list[float]) -> float:
    return mean(value) if isinstance(value, list) else value


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
