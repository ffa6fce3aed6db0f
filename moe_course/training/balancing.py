"""What keeps a router balanced, measured: every cure on the same small language model, and what its experts come to do.

    python -m moe_course.training.balancing [--jobs N]       93 runs, about half an hour on two cores

A finished run is a JSON file: the same command goes on where it was stopped.

Chapters: book/balancing/collapse, book/balancing/losses.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_course import balance, records
from moe_course.layers import Routing, Transformer
from moe_course.layers.routing import (
    hash_table,
    hashed,
    noisy_top_k,
    renormalised,
    sigmoid_top_k,
    sinkhorn_top_k,
    softmax_top_k,
)
from moe_course.specs import FFN, GQA, ModelSpec, RoutedExperts
from moe_course.training import data, loop
from moe_course.training.runs import command_line, made, side_by_side

RECORD = records.FOLDER / "balancing.json"
FOLDER = Path("_build/experiments/balancing")

# What each cure adds to the loss, for its strength to multiply; the others act elsewhere.
LOSSES: dict[str, Callable[[Routing, int], Tensor]] = {
    "switch": lambda r, _: balance.load_balancing_loss(r, r.probs.shape[1]),
    "sequence": lambda r, b: balance.sequence_balancing_loss(r, r.probs.shape[1], b),
    "importance": lambda r, _: balance.importance_loss(r),
    "importance + load": lambda r, _: balance.importance_loss(r) + balance.load_loss(r),
    "z": lambda r, _: balance.z_loss(r.logits),
}
CURES = (*LOSSES, "none", "bias", "bias, proportional", "hash", "sinkhorn")


@dataclass(frozen=True)
class Run:
    """One training run. `strength` is the weight of the cure's loss, or the step of its bias."""

    cure: str
    strength: float = 0.0
    experts: int = 8
    k: int = 1
    seed: int = 0

    @property
    def name(self) -> str:
        cure = self.cure.replace(", ", "-").replace(" + ", "-")
        return f"{cure}-{self.strength:g}-e{self.experts}-k{self.k}-seed{self.seed}"


@dataclass(frozen=True)
class Setup:
    """What all runs share: the model but for its experts, and the text."""

    width: int = 64
    layers: int = 2
    heads: int = 2
    hidden: int = 128  # of one expert
    context: int = 128
    batch_size: int = 8
    steps: int = 800
    every: int = 20  # steps that one row of the load's history sums up
    held_out: int = 16_384  # bytes of each domain

    def model(self, run: Run) -> Transformer:
        """Its weights follow from torch's generator.

        A single gate that sums to 1 is 1 whatever the router says, and teaches it nothing: with k = 1 the gate is the
        score itself, as in Switch.
        """
        spec = ModelSpec(
            name=run.name,
            layers=self.layers,
            width=self.width,
            vocab=data.VOCAB,
            attention=GQA(self.heads, self.heads, self.width // self.heads),
            ffn=None,
            moe=RoutedExperts(run.experts, run.k, FFN(self.hidden)),
        )
        gate: Any = softmax_top_k if run.k == 1 else renormalised
        options: dict[str, Any] = {}
        if run.cure.startswith("bias"):
            gate, options = sigmoid_top_k, {"normalise": run.k > 1}
        elif run.cure == "hash":
            gate = hashed
            options = {"table": hash_table(data.VOCAB, run.experts, run.k)}
        elif run.cure == "sinkhorn":
            gate = sinkhorn_top_k
        elif run.cure == "importance + load":
            gate = noisy_top_k
        return Transformer(spec, gate, **options)


def train(run: Run, setup: Setup) -> tuple[Transformer, dict[str, Any]]:
    """Train one model; returns it, and what became of its load and its loss.

    `history`: assignments by row of `every` steps, layer and expert. `held_out`: by
    domain the loss in bits per byte and the assignments by layer and expert.
    """
    torch.manual_seed(run.seed)
    model = setup.model(run)
    unique = setup.steps * setup.batch_size * setup.context + 1
    text = data.load(data.DOMAINS, "train", unique)
    batches = data.Batches(text, setup.context, setup.batch_size, run.seed)
    steps = min(setup.steps, len(batches))
    recipe = loop.Recipe(
        steps, peak_lr=3e-3, warmup=steps // 10, balance=run.strength, rows=1
    )
    history: list[Any] = []
    since = torch.zeros(setup.layers, run.experts, dtype=torch.int64)
    seen = 0

    def auxiliary(routings: list[Routing]) -> Tensor:
        losses = [LOSSES[run.cure](r, setup.batch_size) for r in routings]
        return torch.stack(losses).mean()

    def after_step(model: nn.Module, routings: list[Routing]) -> None:
        nonlocal since, seen
        if run.cure.startswith("bias"):
            rule: Any = "proportional" if "proportional" in run.cure else "sign"
            balance.update_corrections(model, routings, run.strength, rule)
        since += torch.stack([balance.assignments(r) for r in routings])
        seen += 1
        if seen % setup.every == 0:
            history.append(since.tolist())
            since = torch.zeros_like(since)

    begin = time.perf_counter()
    loop.train(
        model,
        batches,
        recipe,
        flops_per_token=0,
        held_out={},
        auxiliary=auxiliary if run.cure in LOSSES else lambda _: torch.zeros(()),
        after_step=after_step,
    )
    seconds = time.perf_counter() - begin
    return model, {
        "run": asdict(run),
        "setup": asdict(setup),
        "seconds": round(seconds, 1),
        "history": history,
        "held_out": {d: evaluate(model, d, setup) for d in data.DOMAINS},
    }


@torch.no_grad()
def evaluate(model: nn.Module, domain: str, setup: Setup) -> dict[str, Any]:
    """Loss in bits per byte and assignments by layer and expert, on held-out text of one domain."""
    text = data.load([domain], "held_out")[: setup.held_out + 1]
    windows = (len(text) - 1) // setup.context
    inputs = text[: windows * setup.context].view(windows, -1).long()
    model.eval()
    _, routings = model(inputs)
    return {
        "bits": loop.bits_per_byte(model, text, setup.context, windows),
        "counts": [balance.assignments(r).tolist() for r in routings],
    }


def row(result: dict[str, Any], history: bool = False) -> dict[str, Any]:
    """One run as a record holds it: flat, the balance of each layer on held-out text beside the loss.

    `held_out_bits`: mean over the domains, in bits per byte. The lists are by layer:
    `max_violation` and `dead_experts` of the load over all domains, `domain_bits` what
    the domain of a byte tells about its expert, in bits.
    """
    held_out = result["held_out"]
    by_domain = torch.tensor(
        [d["counts"] for d in held_out.values()]
    )  # [domains, L, E]
    layers = by_domain.sum(dim=0)
    bits = [d["bits"] for d in held_out.values()]
    flat = result["run"] | {
        "steps": result["setup"]["steps"],
        "seconds": result["seconds"],
        "held_out_bits": round(sum(bits) / len(bits), 4),
        "max_violation": [round(balance.max_violation(c), 3) for c in layers],
        "dead_experts": [balance.dead_experts(c) for c in layers],
        "load_entropy": [round(balance.load_entropy(c), 4) for c in layers],
        "domain_bits": [
            round(balance.mutual_information(c), 4) for c in by_domain.unbind(1)
        ],
    }
    if history:
        flat["every"] = result["setup"]["every"]
        flat["history"] = result["history"]
        flat["by_domain"] = by_domain.tolist()
    return flat


def select(
    rows: Sequence[dict[str, Any]], cure: str, strength: float = 0.0, **wanted: int
) -> list[dict[str, Any]]:
    """The record's rows of one setting, by seed; eight experts and one chosen where nothing else is wanted."""
    setting = {"cure": cure, "strength": strength, "experts": 8, "k": 1} | wanted
    return [row for row in rows if setting.items() <= row.items()]


# --- The study -----------------------------------------------------------------------

SEEDS = (0, 1, 2)
ALPHAS = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 1.0, 10.0)
STEPS = (1e-4, 1e-3, 1e-2, 1e-1)  # of the bias


def runs() -> list[Run]:
    """All of them, seed by seed: a study that is cut short has whole comparisons."""
    each = [Run("none"), *(Run("switch", alpha) for alpha in ALPHAS)]
    each += [Run("bias", step) for step in STEPS]
    each += [Run("bias, proportional", step) for step in (1e-3, 1e-2)]
    for more in (
        {"k": 2}, {"k": 4}, {"experts": 16}, {"experts": 32}, {"experts": 64}
    ):  # fmt: skip
        each += [Run("none", **more), Run("switch", 1e-2, **more)]
    each += [Run("sequence", 1e-2), Run("importance", 1e-1), Run("z", 1e-3)]
    each += [Run("hash"), Run("sinkhorn"), Run("importance + load", 1e-1, k=2)]
    return [replace(run, seed=seed) for seed in SEEDS for run in each]


def with_history(run: Run) -> bool:
    """Whether the record keeps a run's load over time, by layer: it is long."""
    kept = {("none", 0.0), ("switch", 1e-2), ("switch", 10.0), ("bias", 1e-2)}
    small = run.experts == 8 and run.k == 1
    return run.seed == 0 and small and (run.cure, run.strength) in kept


def work(run: Run, setup: Setup, folder: Path) -> dict[str, Any]:
    """Read a run's result or make it. Raises ValueError when the one found is of another setup."""
    identity = {"run": asdict(run), "setup": asdict(setup)}
    return made(folder / f"{run.name}.json", identity, lambda: train(run, setup)[1])


def study(
    which: Sequence[Run], setup: Setup, folder: Path, jobs: int
) -> list[dict[str, Any]]:
    """All runs, `jobs` at a time, with a line of progress; the record's rows."""
    one = partial(work, setup=setup, folder=folder)
    side_by_side(one, which, jobs)
    return [row(one(run), with_history(run)) for run in which]


def main(arguments: Sequence[str] | None = None) -> int:
    rows = partial(study, runs(), Setup())
    return command_line(
        "moe_course.training.balancing",
        "balancing",
        FOLDER,
        RECORD,
        rows,
        arguments,
    )


if __name__ == "__main__":
    sys.exit(main())
