"""What rounding does to trained models, dense and sparse: errors, losses, flipped routes, bytes.

    python -m moe_course.training.quantisation [--jobs N]     15 models, about a quarter of an hour on 2 cores

Small language models are trained, and their weights rounded to the nearest in every format and part of the model. A
finished model is a JSON file: the same command goes on where it was stopped.

Chapter: book/bandwidth/quantised.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from moe_course import quant, records
from moe_course.layers import (
    DecoderBlock,
    Experts,
    MoE,
    Routing,
    SwiGLU,
    Transformer,
)
from moe_course.layers.routing import renormalised, softmax_top_k
from moe_course.quant import Stored
from moe_course.specs import FFN, GQA, ModelSpec, RoutedExperts
from moe_course.training import data, loop
from moe_course.training.runs import command_line, made, side_by_side

RECORD = records.FOLDER / "quantised.json"
FOLDER = Path("_build/experiments/quantised")


@dataclass(frozen=True)
class Run:
    """One trained model: experts = 1 is dense, with `widening` times the setup's hidden size."""

    experts: int = 1
    k: int = 1
    widening: int = 1
    seed: int = 0

    @property
    def label(self) -> str:
        """The same for all seeds."""
        if self.experts > 1:
            return f"{self.k} of {self.experts} experts"
        return (
            "dense" if self.widening == 1 else f"dense, {self.widening} times as wide"
        )

    @property
    def name(self) -> str:
        return f"e{self.experts}-k{self.k}-x{self.widening}-seed{self.seed}"


@dataclass(frozen=True)
class Setup:
    """What all models share. Sparse ones choose k experts of hidden / k: as many active FFN weights as the dense."""

    width: int = 128
    layers: int = 3
    heads: int = 4
    hidden: int = 256
    context: int = 128
    batch_size: int = 8
    steps: int = 500
    held_out: int = 8192  # bytes of each domain
    probes: int = 4096  # tokens whose layer outputs are compared

    def spec(self, run: Run) -> ModelSpec:
        sparse = run.experts > 1
        return ModelSpec(
            name=run.label,
            layers=self.layers,
            width=self.width,
            vocab=data.VOCAB,
            attention=GQA(self.heads, self.heads, self.width // self.heads),
            ffn=None if sparse else FFN(run.widening * self.hidden),
            moe=RoutedExperts(run.experts, run.k, FFN(self.hidden // run.k))
            if sparse
            else None,
        )


def train(run: Run, setup: Setup, checkpoint: Path | None = None) -> Transformer:
    """A model trained on all domains; with k = 1 the gate is the probability, as in Switch.

    checkpoint: a file that a training which was stopped goes on from; a finished one is read from it.
    """
    torch.manual_seed(run.seed)
    gate = softmax_top_k if run.k == 1 else renormalised
    model = Transformer(setup.spec(run), gate)
    unique = setup.steps * setup.batch_size * setup.context + 1
    text = data.load(data.DOMAINS, "train", unique)
    batches = data.Batches(text, setup.context, setup.batch_size, run.seed)
    steps = min(setup.steps, len(batches))
    recipe = loop.Recipe(steps, warmup=steps // 10, rows=1, checkpoints=5)
    loop.train(
        model,
        batches,
        recipe,
        flops_per_token=0,
        held_out={},
        checkpoint=checkpoint,
    )
    return model.eval()


# --- Formats -------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Cast:
    """Weights in a floating-point type of torch: bfloat16, what most models are published in."""

    values: Tensor

    def nbytes(self) -> int:
        return self.values.nbytes

    def dequantise(self) -> Float[Tensor, ...]:
        """The numbers, in float32."""
        return self.values.float()


def _integers(bits: int, group: int | None, weight: Tensor) -> Stored:
    # From bfloat16, as published models are: scales take 16 bits, and scale · integer is rounded to 16 bits, as a
    # kernel that multiplies in 16 bits has it.
    return quant.quantise(weight.bfloat16(), bits, group)


GROUPS = (32, 64, 128, None)  # None: one scale a row
FORMATS: dict[str, Callable[[Tensor], Stored]] = {
    "bf16": lambda weight: Cast(weight.bfloat16()),
    **{
        f"int{bits}, {group or 'row'}": partial(_integers, bits, group)
        for bits in (8, 4)
        for group in GROUPS
    },
    "mxfp4": quant.quantise_mxfp4,
}
# Which parts of a model are rounded, and in which formats. A dense model has no experts and no router.
CHOICES: dict[str, tuple[str, ...]] = {
    "ffn": ("experts", "ffn"),
    "router": ("router",),
    "all but router": ("experts", "ffn", "other"),
    "all": ("experts", "ffn", "other", "router"),
}
FEW = ("bf16", "int8, 128", "int4, 32", "mxfp4")


# --- Loss and routing ----------------------------------------------------------------


def _ffns(model: Transformer) -> list[nn.Module]:
    return [block.ffn for block in model.blocks if isinstance(block, DecoderBlock)]


def windows(setup: Setup) -> Int[Tensor, "B S1"]:
    """Held-out text of all domains in equal parts: windows of the context and one byte more."""
    each = [data.load([d], "held_out")[: setup.held_out + 1] for d in data.DOMAINS]
    starts = torch.arange(setup.held_out // setup.context) * setup.context
    at = starts[:, None] + torch.arange(setup.context + 1)
    return torch.cat([text[at].long() for text in each])


@torch.no_grad()
def evaluate(
    model: Transformer,
    text: Int[Tensor, "B S1"],
    forced: Sequence[Routing] | None = None,
    batch_size: int = 64,
) -> tuple[Float[Tensor, " B"], list[Routing]]:
    """Loss of each window in bits per byte, and what the router of each sparse layer decided for all tokens.

    forced: the experts are those of these routings; their weights still follow the logits.
    """
    routers: list[Any] = [m.router for m in _ffns(model) if isinstance(m, MoE)]
    gates = [router.gate for router in routers]
    bits, seen, length = [], [], text.shape[1] - 1
    try:
        for i, batch in enumerate(text.split(batch_size)):
            for router, routing in zip(routers, forced or (), strict=bool(forced)):
                ids = routing.expert_ids.split(batch_size * length)[i]
                router.gate = partial(_keep, expert_ids=ids)
            logits, routings = model(batch[:, :-1])
            nats = F.cross_entropy(logits.mT, batch[:, 1:], reduction="none")
            bits.append(nats.mean(1) / math.log(2))
            seen.append(routings)
    finally:
        for router, gate in zip(routers, gates, strict=True):
            router.gate = gate
    whole = [
        Routing(
            *(
                torch.cat([getattr(part, field) for part in parts])
                for field in ("expert_ids", "weights", "probs", "logits")
            )
        )
        for parts in zip(*seen, strict=True)
    ]
    return torch.cat(bits), whole


def _keep(
    logits: Float[Tensor, "T E"], k: int, expert_ids: Int[Tensor, "T K"]
) -> Routing:
    """The experts given, with the weights that `train`'s gates would give them."""
    probs = logits.softmax(-1)
    weights = probs.gather(1, expert_ids)
    if k > 1:
        weights = weights / weights.sum(-1, keepdim=True)
    return Routing(expert_ids, weights, probs, logits)


def losses(
    model: Transformer, text: Int[Tensor, "B S1"], formats: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """A row for every format and choice of parts: loss, bytes, and the share of tokens with other experts by layer.

    `more_bits` is the loss less that of the exact model, `uncertainty` its standard error over the windows of the text,
    and `kept_more_bits` the same with every token at the experts that the exact model chose. Besides the FFNs, parts
    are rounded in the formats of FEW alone.
    """
    exact, before = evaluate(model, text)
    yield {"kind": "exact", "bits": exact.mean().item()}
    for name, (choice, parts) in product(formats, CHOICES.items()):
        if choice != "ffn" and name not in FEW:
            continue
        if not before and choice in ("router", "all"):
            continue  # no router: all is all but the router
        stored = quant.quantise_parts(model, FORMATS[name], *parts)
        twin = quant.dequantised(model, stored)
        bits, after = evaluate(twin, text)
        more = bits - exact
        pairs = list(zip(before, after, strict=True))
        row = {
            "kind": "loss",
            "format": name,
            "parts": choice,
            "more_bits": more.mean().item(),
            "uncertainty": (more.std() / len(more) ** 0.5).item(),
            "bytes": round(quant.stored_bytes(model, stored)),
            "flipped": [quant.flipped(a, b).double().mean().item() for a, b in pairs],
        }
        if before and choice in ("ffn", "router") and name in FEW:
            kept, _ = evaluate(twin, text, forced=before)
            row["kept_more_bits"] = (kept - exact).mean().item()
        yield row
        if choice in ("ffn", "router") and name in FEW:
            for layer, (a, b) in enumerate(pairs):
                about = {"format": name, "parts": choice, "layer": layer}
                yield {"kind": "margin"} | about | margins(a, b)


def margins(before: Routing, after: Routing, bins: int = 10) -> dict[str, Any]:
    """Share of tokens with other experts, by how near they were to a tie: from the nearest tenth to the farthest.

    `margin` is a bin's mean of `quant.margin`, in logits. `expected` is the share that a normal error of the two
    logits' difference would turn, whatever else the other logits do:  mean of Phi(-margin / noise), where `noise` is
    the root of that difference's mean squared change.
    """
    gap, turned = quant.margin(before).double(), quant.flipped(before, after).double()
    k = before.expert_ids.shape[1]
    pair = before.logits.topk(k + 1, dim=-1).indices[:, k - 1 :]  # [T, 2]
    moved = (after.logits - before.logits).gather(1, pair).double()
    noise = (moved[:, 0] - moved[:, 1]).square().mean().sqrt()
    chance = torch.special.ndtr(-gap / noise)
    order = gap.argsort()
    return {
        "noise": noise.item(),
        "margin": [part.mean().item() for part in gap[order].tensor_split(bins)],
        "flipped": [part.mean().item() for part in turned[order].tensor_split(bins)],
        "expected": [part.mean().item() for part in chance[order].tensor_split(bins)],
    }


# --- Errors of single layers ---------------------------------------------------------


def layer_inputs(
    model: Transformer, text: Int[Tensor, "B S1"], tokens: int
) -> list[Float[Tensor, "T D"]]:
    """What the FFN of each layer is given, for `tokens` tokens from windows spread over the text."""
    some = -(-tokens // (text.shape[1] - 1))
    which = torch.arange(some) * len(text) // some
    inputs: list[Tensor] = []
    hooks = [
        ffn.register_forward_pre_hook(
            lambda _, args: inputs.append(args[0].flatten(0, -2)[:tokens])
        )
        for ffn in _ffns(model)
    ]
    with torch.no_grad():
        model(text[which, :-1])
    for hook in hooks:
        hook.remove()
    return inputs


def expert_terms(
    experts: Experts, x: Float[Tensor, "T D"], routing: Routing
) -> Float[Tensor, "T K D"]:
    """The terms of a sparse layer's sum, w · E(x), before they are added up."""
    terms = x.new_empty(*routing.expert_ids.shape, x.shape[1])
    for e in range(experts.num_experts):
        token, place = (routing.expert_ids == e).nonzero(as_tuple=True)
        hidden = experts.activate(F.linear(x[token], experts.w_up[e]))
        terms[token, place] = F.linear(hidden, experts.w_down[e])
    return terms * routing.weights[..., None]


def slice_terms(
    ffn: SwiGLU, x: Float[Tensor, "T D"], pieces: int
) -> Float[Tensor, "T K D"]:
    """A dense FFN as the sum it is: its hidden units in so many pieces, each an expert that every token meets."""
    hidden = F.silu(ffn.gate(x)) * ffn.up(x)
    downs = ffn.down.weight.chunk(pieces, dim=1)
    parts = zip(hidden.chunk(pieces, dim=1), downs, strict=True)
    return torch.stack([F.linear(h, down) for h, down in parts], dim=1)


def sum_errors(
    exact: Float[Tensor, "T K D"],
    rounded: Float[Tensor, "T K D"],
    weights: Float[Tensor, "T K"],
) -> dict[str, float]:
    """How the errors of the terms of a sum become the error of the sum.

        single   = sqrt(sum |d|² / sum |f|²)      f the terms of all tokens, d their errors
        output   = sqrt(sum |sum d|² / sum |sum f|²)
        signal   = sum |sum f|² / sum |f|²        1 where the terms of a token are orthogonal, K where they are equal
        noise    = the same of d                  1 where their errors are independent
        output   = single · sqrt(noise / signal)  exactly

    `predicted`: `quant.combined_error` of single, of the mean concentration of the gate weights and of `alignment`, the
    cosine between the terms of a token, averaged with their sizes.
    """
    f, d, w = exact.double(), (rounded - exact).double(), weights.double()

    def energies(v: Tensor) -> tuple[float, float]:
        return v.square().sum().item(), v.sum(1).square().sum().item()

    (f_each, f_sum), (d_each, d_sum) = energies(f), energies(d)
    size = f.norm(dim=-1)  # [T, K]
    pairs = (size.sum(1).square() - size.square().sum(1)).sum().item()
    alignment = (f_sum - f_each) / pairs if pairs else 1.0
    concentration = (w.square().sum(1) / w.sum(1).square()).mean().item()
    single = (d_each / f_each) ** 0.5
    return {
        "single": single,
        "output": (d_sum / f_sum) ** 0.5,
        "signal": f_sum / f_each,
        "noise": d_sum / d_each,
        "alignment": alignment,
        "concentration": concentration,
        "predicted": quant.combined_error(single, concentration, alignment),
    }


PIECE = 128  # hidden units of one piece of a dense FFN


def terms(
    ffn: nn.Module, x: Float[Tensor, "T D"], routing: Routing | None
) -> Float[Tensor, "T K D"]:
    """What a layer adds up: the outputs of the experts chosen, or of pieces of a dense FFN."""
    if routing is not None:
        assert isinstance(ffn, MoE)
        return expert_terms(ffn.experts, x, routing)
    assert isinstance(ffn, SwiGLU)
    return slice_terms(ffn, x, ffn.down.in_features // PIECE or 1)


def _units(
    ffn: nn.Module, x: Float[Tensor, "T D"], routing: Routing | None
) -> Iterator[tuple[Float[Tensor, "N F"], Float[Tensor, "D F"]]]:
    """The hidden units that tokens meet, with their gate weights in them, and what each unit writes; by expert."""
    if routing is None:
        assert isinstance(ffn, SwiGLU)
        yield F.silu(ffn.gate(x)) * ffn.up(x), ffn.down.weight
        return
    assert isinstance(ffn, MoE)
    bank = ffn.experts
    for e in range(bank.num_experts):
        token, place = (routing.expert_ids == e).nonzero(as_tuple=True)
        hidden = bank.activate(F.linear(x[token], bank.w_up[e]))
        yield hidden * routing.weights[token, place, None], bank.w_down[e]


def unit_errors(
    exact: nn.Module,
    rounded: nn.Module,
    x: Float[Tensor, "T D"],
    routing: Routing | None,
) -> tuple[float, float]:
    """Sum over tokens and hidden units of |f|² and of |d|²: f what one unit adds to the output, d its error.

    Any FFN, dense or a mixture, is a sum over its hidden units: what `sum_errors` has for experts, in smallest pieces.
    """
    signal = noise = 0.0
    pairs = zip(_units(exact, x, routing), _units(rounded, x, routing), strict=True)
    for (h, w), (h2, w2) in pairs:
        h, w, h2, w2 = (v.double() for v in (h, w, h2, w2))
        # |h'w' - hw|² = h'²|w'|² - 2·hh'(w·w') + h²|w|², without a tensor of tokens x units x width
        mine = (h.square() @ w.square().sum(0)).sum()
        theirs = (h2.square() @ w2.square().sum(0)).sum()
        signal += mine.item()
        noise += (mine + theirs - 2 * ((h * h2) @ (w * w2).sum(0)).sum()).item()
    return signal, noise


def _matrices(ffn: nn.Module) -> list[Tensor]:
    belongs = quant.part_of(ffn)
    return [p for n, p in ffn.named_parameters() if belongs[n] in CHOICES["ffn"]]


@torch.no_grad()
def errors(
    model: Transformer,
    text: Int[Tensor, "B S1"],
    tokens: int,
    formats: Sequence[str],
) -> Iterator[dict[str, Any]]:
    """A row for every format and layer: the relative errors of its weights, of single experts and of its output.

    The inputs are those of the exact model, and so is the routing: what is seen is the experts' rounding alone.
    `peak`: the largest weight of a row over its root mean square, mean over the rows; it is what a scale is set by.
    `gain`: what the rounded weights are on average in multiples of the exact ones, (w · w') / (w · w).
    `unit`, `unit_signal`, `unit_noise`: as `sum_errors` has single, signal and noise, with hidden units as terms.
    """
    inputs = layer_inputs(model, text, tokens)
    for name in formats:
        stored = quant.quantise_parts(model, FORMATS[name], *CHOICES["ffn"])
        twin = quant.dequantised(model, stored)
        layers = zip(inputs, _ffns(model), _ffns(twin), strict=True)
        for layer, (x, exact, small) in enumerate(layers):
            routing = exact.router(x) if isinstance(exact, MoE) else None
            f, g = terms(exact, x, routing), terms(small, x, routing)
            weights = routing.weights if routing else x.new_ones(f.shape[:2])
            signal, noise = unit_errors(exact, small, x, routing)
            sizes = [v.sum(1).double().square().sum().item() for v in (f, g - f)]
            old = _matrices(exact)
            peaks = [w.abs().amax(-1) / w.square().mean(-1).sqrt() for w in old]
            flat = torch.cat([w.flatten() for w in old])
            rounded = torch.cat([w.flatten() for w in _matrices(small)])
            yield {
                "kind": "error",
                "format": name,
                "layer": layer,
                "weights": quant.relative_error(rounded, flat),
                "gain": (rounded @ flat / flat.square().sum()).item(),
                "peak": torch.cat([p.flatten() for p in peaks]).mean().item(),
                "unit": (noise / signal) ** 0.5,
                "unit_signal": sizes[0] / signal,
                "unit_noise": sizes[1] / noise,
            } | sum_errors(f, g, weights)


# --- The study -----------------------------------------------------------------------

SEEDS = (0, 1, 2)
SHAPES = (Run(), Run(widening=4), Run(4, 1), Run(8, 2), Run(16, 4))


def runs() -> list[Run]:
    """All of them, seed by seed: a study that is cut short has whole comparisons."""
    return [replace(run, seed=seed) for seed in SEEDS for run in SHAPES]


def measure(
    run: Run,
    setup: Setup,
    formats: Sequence[str] = tuple(FORMATS),
    checkpoint: Path | None = None,
) -> dict[str, Any]:
    """Train one model and round it in every way."""
    model = train(run, setup, checkpoint)
    text, spec = windows(setup), setup.spec(run)
    rows = [*losses(model, text, formats), *errors(model, text, setup.probes, formats)]
    rows[0] |= {
        "steps": setup.steps,
        "total_params": spec.total_params(),
        "active_params": spec.active_params(include_embedding=False),
    }
    return {"run": asdict(run), "setup": asdict(setup), "rows": rows}


def record_rows(result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows as a record holds them: each says which model it is of; numbers to the digits that mean something."""

    def rounded(value: Any) -> Any:
        if isinstance(value, list):
            return [rounded(each) for each in value]
        return float(f"{value:.5g}") if isinstance(value, float) else value

    run = Run(**result["run"])
    about = {"model": run.label} | result["run"]
    for row in result["rows"]:
        yield about | {key: rounded(value) for key, value in row.items()}


def work(run: Run, setup: Setup, folder: Path) -> dict[str, Any]:
    """Read a run's result or make it. Raises ValueError when the one found is of another setup."""
    identity = {"run": asdict(run), "setup": asdict(setup)}
    make = partial(measure, run, setup, checkpoint=folder / f"{run.name}.pt")
    return made(folder / f"{run.name}.json", identity, make)


def study(
    which: Sequence[Run], setup: Setup, folder: Path, jobs: int
) -> list[dict[str, Any]]:
    """All runs, `jobs` at a time, with a line of progress; the record's rows."""
    one = partial(work, setup=setup, folder=folder)
    side_by_side(one, which, jobs)
    return [row for run in which for row in record_rows(one(run))]


def main(arguments: Sequence[str] | None = None) -> int:
    rows = partial(study, runs(), Setup())
    return command_line(
        "moe_course.training.quantisation",
        "quantised",
        FOLDER,
        RECORD,
        rows,
        arguments,
    )


if __name__ == "__main__":
    sys.exit(main())
