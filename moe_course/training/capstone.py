"""The capstone: a design is data, and this is what it costs, how it trains and what it is measured against.

    python -m moe_course.training.capstone [--jobs N]       renews the record

A learner's notebook, the check of exercise 07 and the record of its dense baseline all come through here. A design is
trained in a process of its own, on one thread: the same design and seed give the same numbers on one machine, whatever
was changed in the process that asked for them.

Exercise: exercises/07_capstone.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_course import balance, records
from moe_course.costs import Precision, decode_step, expected_distinct_experts
from moe_course.layers import Routing, Transformer
from moe_course.layers.routing import renormalised, sigmoid_top_k, softmax_top_k
from moe_course.specs import FFN, GQA, Accelerator, ModelSpec, RoutedExperts
from moe_course.training import data, loop
from moe_course.training.runs import command_line, kept, made, side_by_side

RECORD = records.FOLDER / "capstone.json"
FOLDER = Path("_build/experiments/capstone")
RUNS = Path("capstone_runs")  # a learner's own, beside the notebook

DOMAINS = data.SHIPPED
TRAIN_BYTES = 4_000_000  # of text, equally much of each domain
HELD_OUT_BYTES = 32_768  # of each domain
CONTEXT = 64

PASSES = 2  # over the text, at most

BUDGET = 800_000_000_000  # FLOPs of training
PART = 4  # a check trains with a quarter of the steps
MEMORY = 4_000_000  # bytes that last between steps: weight, gradient, two moments
# A small processor with its weights in slow memory: made up, of a size that fits models this small.
DEVICE = Accelerator(
    "the exercise's device", 2e9, None, 0.2e9, 8e6, "none", 0.0, "made up for the exercise"
)  # fmt: skip
DECODE = {1: 0.6e-3, 64: 4e-3}  # batch: seconds of a step at most
FLOAT32 = Precision(weights=4.0)
# From the record, at the part of the budget that a check trains with (a test compares).
DENSE_BITS, BAR = 3.1157, 3.05

# --- A design ------------------------------------------------------------------------

GATES = {"softmax": softmax_top_k, "renormalised": renormalised, "sigmoid": sigmoid_top_k}  # fmt: skip
CURES = ("none", "loss", "bias")


@dataclass(frozen=True)
class Design:
    """A model, how its router is balanced and how it is trained. Sizes are those of the course's letters.

    hidden, shared: widths of one routed expert and of the FFN that every token passes (0: none); all are gated.
    experts: 1 is a dense model: `hidden` is then its FFN, and the router's settings mean nothing.
    strength: weight of the balancing loss, or step of the bias.
    batch: windows of CONTEXT bytes in a step.
    steps: within the whole BUDGET; a check takes a PARTth of them.
    schedule: (share of the training, share of peak_lr), from share 0 to 1, straight lines between.
    """

    width: int
    layers: int
    heads: int
    experts: int
    k: int
    hidden: int
    shared: int
    gate: str
    cure: str
    strength: float
    batch: int
    steps: int
    peak_lr: float
    schedule: tuple[tuple[float, float], ...]
    weight_decay: float

    def spec(self) -> ModelSpec:
        sparse = self.experts > 1
        shared = FFN(self.shared) if self.shared else None
        return ModelSpec(
            name="design",
            layers=self.layers,
            width=self.width,
            vocab=data.VOCAB,
            attention=GQA(self.heads, self.heads, self.width // self.heads),
            ffn=None if sparse else FFN(self.hidden),
            moe=RoutedExperts(self.experts, self.k, FFN(self.hidden), shared)
            if sparse
            else None,
        )

    @property
    def tokens_per_step(self) -> int:
        return self.batch * CONTEXT

    def flops(self) -> int:
        """Training FLOPs of all steps, as `loop.flops_per_token` counts them."""
        each = loop.flops_per_token(self.spec(), CONTEXT)
        return self.steps * self.tokens_per_step * each

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of step 0, 1, ... of `steps`, read off the schedule at (step + 1) / steps."""
        at = (step + 1) / steps
        for (x0, y0), (x1, y1) in pairwise(self.schedule):
            if at <= x1:
                return self.peak_lr * (y0 + (y1 - y0) * (at - x0) / (x1 - x0))
        return self.peak_lr * self.schedule[-1][1]


MOST_LAYER_STEPS = 20_000  # a step of a small model takes its time whatever it computes
_INTEGERS = {
    "width": (16, 128), "layers": (1, 6), "heads": (1, 8), "experts": (1, 64), "k": (1, 64), "hidden": (1, 1024),
    "shared": (0, 1024), "batch": (8, 64), "steps": (PART, MOST_LAYER_STEPS),
}  # fmt: skip
_NUMBERS = {"strength": (0.0, 100.0), "peak_lr": (1e-5, 0.1), "weight_decay": (0.0, 1.0)}  # fmt: skip
_WORDS = {"gate": tuple(GATES), "cure": CURES}
KEYS = tuple(field.name for field in fields(Design))


def read(raw: object) -> Design:
    """A design from plain data. Raises ValueError that says which entry is amiss and what it may be.

    Plain types alone: an object that is a number only while it is looked at is none.
    """
    if type(raw) is not dict:
        raise ValueError(f"a design is a dict, got {type(raw).__name__}")
    if any(type(key) is not str for key in raw):
        raise ValueError("the keys of a design are texts")
    missing = [key for key in KEYS if key not in raw]
    extra = [key for key in raw if key not in KEYS]
    if missing or extra:
        parts = [f"lacks {', '.join(missing)}"] * bool(missing)
        parts += [f"has unknown {', '.join(e[:40] for e in extra[:9])}"] * bool(extra)
        raise ValueError(f"the design {' and '.join(parts)}")
    for key, (least, most) in _INTEGERS.items():
        value = raw[key]
        if type(value) is not int or not least <= value <= most:
            raise ValueError(
                f"{key} must be a plain integer from {least:,} to {most:,}, got {_told(value)}"
            )
    for key, (low, high) in _NUMBERS.items():
        _require_number(key, raw[key], low, high)
    for key, words in _WORDS.items():
        if type(raw[key]) is not str or raw[key] not in words:
            raise ValueError(
                f"{key} must be one of {', '.join(words)}, got {_told(raw[key])}"
            )
    values = dict(raw) | {"schedule": _schedule(raw["schedule"])}
    for key in _NUMBERS:
        values[key] = float(values[key])
    design = Design(**values)
    if design.width % (2 * design.heads):
        raise ValueError(
            f"width must be a multiple of 2 · heads, got {design.width} and {design.heads} heads"
        )
    if design.k > design.experts:
        raise ValueError(
            f"k must be at most the number of experts, got k = {design.k} of {design.experts}"
        )
    if design.experts == 1 and design.shared:
        raise ValueError("with experts = 1 (dense) shared must be 0: make hidden wider")
    if design.steps * design.layers > MOST_LAYER_STEPS:
        raise ValueError(
            f"steps · layers must be at most {MOST_LAYER_STEPS:,}, so that a check ends: got "
            f"{design.steps:,} steps of {design.layers} layers; take larger batches"
        )
    if design.cure == "bias" and design.gate != "sigmoid":
        raise ValueError("the cure 'bias' needs the gate 'sigmoid'")
    if design.cure == "bias" and not design.strength:
        raise ValueError("the cure 'bias' needs a strength above 0")
    if design.steps > most_steps(design):
        raise ValueError(
            f"{design.steps:,} steps of {design.tokens_per_step:,} bytes are more than {PASSES} passes over the "
            f"{TRAIN_BYTES:,} bytes of text: at most {most_steps(design):,}"
        )
    return design


def most_steps(design: Design) -> int:
    """As many as the text holds."""
    return (TRAIN_BYTES - 1) // CONTEXT // design.batch * PASSES


def _require_number(key: str, value: Any, low: float, high: float) -> None:
    # NaN compares false with everything.
    if type(value) not in (int, float) or not low <= value <= high:
        raise ValueError(
            f"{key} must be a plain number from {low:g} to {high:g}, got {_told(value)}"
        )


def _schedule(raw: Any) -> tuple[tuple[float, float], ...]:
    if type(raw) not in (list, tuple) or not 2 <= len(raw) <= 20:
        raise ValueError("schedule must be a list of 2 to 20 pairs")
    for pair in raw:
        if type(pair) not in (list, tuple) or len(pair) != 2:
            raise ValueError(
                f"schedule must hold pairs (share of the training, share of peak_lr), got {_told(pair)}"
            )
        for what, value in zip(("a share of the training", "a share of peak_lr"), pair, strict=True):  # fmt: skip
            _require_number(f"schedule: {what}", value, 0, 1)
    points = tuple((float(x), float(y)) for x, y in raw)
    at = [x for x, _ in points]
    if at[0] != 0 or at[-1] != 1 or any(a >= b for a, b in pairwise(at)):  # fmt: skip
        raise ValueError(
            f"schedule: the shares of the training must rise from 0 to 1, got {at}"
        )
    return points


def _told(value: object) -> str:
    """A value in a message; whatever a learner hands over must not break it."""
    try:
        return repr(value)[:80]
    except Exception:
        return f"<{type(value).__name__}>"


def plain(design: Design) -> dict[str, Any]:
    """As `read` takes it, and JSON gives it back."""
    raw: dict[str, Any] = json.loads(json.dumps(asdict(design)))
    return raw


# --- What it costs -------------------------------------------------------------------


@dataclass(frozen=True)
class Limit:
    """One line of the budget: `value` must not be above `most`."""

    what: str
    value: float
    most: float
    unit: str
    advice: str

    @property
    def kept(self) -> bool:
        return self.value <= self.most


def state_bytes(design: Design) -> int:
    """Memory of training that lasts between steps: weight, gradient, AdamW's two moments, 4 B each."""
    return 16 * design.spec().total_params()


def decode_seconds(design: Design, batch: int) -> float:
    """A decode step on DEVICE in float32, without a cache."""
    return decode_step(design.spec(), DEVICE, batch, precision=FLOAT32).time_s


def budget(design: Design) -> list[Limit]:
    """Training FLOPs and memory."""
    return [
        Limit("training", design.flops(), BUDGET, "FLOPs", "take fewer steps"),
        Limit("training state", state_bytes(design), MEMORY, "bytes", "store fewer or smaller experts"),
    ]  # fmt: skip


def latency(design: Design) -> list[Limit]:
    """Decode steps on the exercise's device."""
    advice = {1: "use fewer weights per byte", 64: "store fewer or smaller experts"}
    return [
        Limit(f"a decode step at batch {batch}", decode_seconds(design, batch), most, "s", advice[batch])
        for batch, most in DECODE.items()
    ]  # fmt: skip


def dense_in_disguise(design: Design) -> str:
    """Why a design is no sparse model, "" where it is one.

    At most half of the experts work on a byte, and the routed ones make up at least half of the FFN weights that it
    meets. A dense model of any shape fails one of the two.
    """
    if 2 * design.k > design.experts:
        return (
            f"{design.k} of {design.experts} experts work on every byte: at most half may, "
            "or it is a dense model in disguise"
        )
    if design.shared > design.k * design.hidden:
        return (
            f"the shared FFN ({design.shared} wide) is wider than the {design.k} routed experts of a byte together "
            f"({design.k * design.hidden}): a dense model in disguise"
        )
    return ""


def claims(design: Design) -> dict[str, float]:
    """The numbers that a defence of the design rests on, bits apart: those are measured."""
    parts, spec = design.spec().breakdown(), design.spec()
    ffn = parts["experts"].active + parts["shared"].active
    return {
        "stored_params": spec.total_params(),
        "used_params": spec.active_params(include_embedding=False),
        "training_flops": design.flops(),
        "state_bytes": state_bytes(design),
        "stored_per_used": (parts["experts"].total + parts["shared"].total) / max(1, ffn),
        "experts_read_at_64": expected_distinct_experts(design.experts, design.k, 64),
        "decode_ms_at_1": 1e3 * decode_seconds(design, 1),
        "decode_ms_at_64": 1e3 * decode_seconds(design, 64),
    }  # fmt: skip


# --- Training ------------------------------------------------------------------------


def transformer(design: Design) -> Transformer:
    """Its weights follow from torch's generator."""
    options: dict[str, Any] = {}
    if design.gate == "sigmoid":
        # A single gate that is divided by its sum is 1 whatever the router says.
        options = {"normalise": design.k > 1}
    return Transformer(design.spec(), GATES[design.gate], **options)


def train(
    design: Design,
    seed: int,
    part: int = PART,
    checkpoint: Path | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Train with steps // part steps, in this process; what became of loss and load on held-out text.

    `bits`: mean over the domains, in bits per byte; `domains`: each; `counts`: assignments by sparse layer and expert.
    Raises FloatingPointError when the loss is no longer finite.
    """
    steps = design.steps // part
    text = data.load(DOMAINS, "train", TRAIN_BYTES)
    batches = data.Batches(text, CONTEXT, design.batch, seed, PASSES)
    torch.manual_seed(seed)
    model = transformer(design)
    recipe = loop.Recipe(
        steps,
        peak_lr=design.peak_lr,
        warmup=0,
        weight_decay=design.weight_decay,
        balance=design.strength if design.cure == "loss" else 0.0,
        rows=1,
        checkpoints=10,
    )

    def after_step(model: nn.Module, routings: list[Routing]) -> None:
        if design.cure == "bias" and routings:
            balance.update_corrections(model, routings, design.strength)

    loop.train(
        model,
        batches,
        recipe,
        flops_per_token=0,
        held_out={},
        checkpoint=checkpoint,
        on_step=None if on_step is None else partial(on_step, steps),
        after_step=after_step,
        schedule=lambda step, _: design.rate(step, steps),
    )
    found = {domain: evaluate(model, domain) for domain in DOMAINS}
    counts = [c for _, c in found.values() if c is not None]
    return {
        "steps": steps,
        "bits": statistics.mean(bits for bits, _ in found.values()),
        "domains": {domain: bits for domain, (bits, _) in found.items()},
        "counts": torch.stack(counts).sum(dim=0).tolist() if counts else [],
    }


@torch.no_grad()
def evaluate(model: Transformer, domain: str) -> tuple[float, Tensor | None]:
    """Loss in bits per byte on held-out text of a domain, and assignments [L, E]; None in a dense model."""
    text = data.load([domain], "held_out")[: HELD_OUT_BYTES + 1]
    windows = HELD_OUT_BYTES // CONTEXT
    bits = loop.bits_per_byte(model, text, CONTEXT, windows)
    model.eval()
    _, routings = model(text[: windows * CONTEXT].view(windows, -1).long())
    counts = [balance.assignments(r) for r in routings]
    return bits, torch.stack(counts) if counts else None


def uneven(result: Mapping[str, Any]) -> tuple[float, int]:
    """(largest max violation of a layer, dead experts of all layers) on held-out text."""
    layers = [torch.tensor(c) for c in result["counts"]]
    return (
        max(map(balance.max_violation, layers), default=0.0),
        sum(map(balance.dead_experts, layers)),
    )


# --- In a process of its own ---------------------------------------------------------

_CHILD = [sys.executable, "-P", "-m", "moe_course.training.capstone", "--train"]


def train_apart(
    design: Design,
    seed: int,
    part: int = PART,
    folder: Path | None = None,
    on_step: Callable[[int, int], None] | None = None,
    most_seconds: float = 1200.0,
) -> dict[str, Any]:
    """`train` in a fresh process on one thread, which nothing that was patched here reaches.

    folder: keeps the result and, until it is there, a checkpoint: a run that was stopped goes on, one that is done is
        read. on_step: called with the number of all steps, then of those done.

    Raises ValueError with a sentence for the learner when the training fails.
    """
    identity: dict[str, Any] = {"design": plain(design), "seed": seed, "part": part}
    job, path = identity | {"checkpoint": None}, None
    if folder is not None:
        name = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
        path = folder / f"{name}.json"
        found = kept(path, identity)
        if found is not None:
            return found
        job["checkpoint"] = str((folder / f"{name}.pt").resolve())
    result = _run(job, on_step, most_seconds)
    if path is not None:
        records.write_json(identity | result, path)
        path.with_suffix(".pt").unlink(missing_ok=True)
    return identity | result


def _run(
    job: dict[str, Any],
    on_step: Callable[[int, int], None] | None,
    most_seconds: float,
) -> dict[str, Any]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    # Products of one thread are summed in one order.
    environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    child = subprocess.Popen(
        _CHILD,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
    )
    end = threading.Timer(most_seconds, child.kill)
    end.start()
    said: dict[str, Any] = {}
    try:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(json.dumps(job))
        child.stdin.close()
        for line in child.stdout:
            said = json.loads(line)
            if "done" in said and on_step is not None:
                on_step(said["of"], said["done"])
        child.wait()
    finally:
        end.cancel()
        child.kill()
        child.wait()
        words = child.stderr.read() if child.stderr else ""
    if "error" in said:
        raise ValueError(said["error"])
    if "result" not in said:
        last = words.strip().splitlines()[-1:] or [f"stopped after {most_seconds:.0f} s at most"]  # fmt: skip
        raise RuntimeError(f"the process that trains has ended: {last[0][:300]}")
    result: dict[str, Any] = said["result"]
    return result


def _child() -> int:
    """Train what standard input asks for; progress and the result are lines on standard output."""
    torch.set_num_threads(1)
    job = json.load(sys.stdin)

    def say(**line: Any) -> None:
        print(json.dumps(line), flush=True)

    def on_step(steps: int, done: int) -> None:
        if done % 10 == 0 or done == steps:
            say(done=done, of=steps)

    checkpoint = Path(job["checkpoint"]) if job["checkpoint"] else None
    try:
        say(result=train(read(job["design"]), job["seed"], job["part"], checkpoint, on_step))  # fmt: skip
    except (FloatingPointError, ValueError) as error:
        say(error=str(error))
    return 0


# --- For a learner -------------------------------------------------------------------


def compare(
    raw: dict[str, Any],
    seeds: Sequence[int] = (0,),
    part: int = PART,
    folder: Path = RUNS,
) -> list[float]:
    """Print what a design costs, train it once with each seed, and print its loss beside the dense baseline's.

    Entries that are none of a design's are left alone, so a whole recipe will do. Results are kept in `folder`: the
    same call reads them, and goes on with what was stopped. Returns the losses in bits per byte.
    """
    design = read({key: raw[key] for key in KEYS if key in raw})
    for limit in (*budget(design), *latency(design)):
        mark = "within" if limit.kept else "ABOVE "
        print(f"{limit.what:<26}{limit.value:>12.4g} {mark} {limit.most:.4g} {limit.unit}")  # fmt: skip
    if disguise := dense_in_disguise(design):
        print(disguise)
    found = []
    for seed in seeds:

        def show(steps: int, done: int, seed: int = seed) -> None:
            print(f"\rseed {seed}: step {done:>6,} of {steps:,}", end="", flush=True)

        result = train_apart(design, seed, part, folder, show)
        violation, dead = uneven(result)
        each = "  ".join(f"{k} {v:.3f}" for k, v in result["domains"].items())
        print(f"\rseed {seed}: {result['bits']:.4f} bits per byte   {each}")
        if result["counts"]:
            print(f"        max violation {violation:.2f}, dead experts {dead}")
        found.append(result["bits"])
    if part == PART:
        print(f"best dense model: {DENSE_BITS:.4f}, the bar: {BAR:.3f}")
    return found


# --- The record ----------------------------------------------------------------------

_COSINE = tuple(
    (round(u, 3), round(0.05 + 0.95 * (1 + math.cos(math.pi * (u - 0.1) / 0.9)) / 2, 4))
    for u in (0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 1.0)
)
SCHEDULE = ((0.0, 0.0), *_COSINE)  # half a cosine in six straight lines
DENSE_SHAPE = {"experts": 1, "k": 1, "shared": 0, "gate": "softmax", "cure": "none", "strength": 0.0}  # fmt: skip


def largest(**given: Any) -> Design:
    """A design with as many steps as the budget and the text allow."""
    values: dict[str, Any] = {
        "layers": 1, "heads": 1, "shared": 0, "cure": "loss", "strength": 0.01, "batch": 8, "steps": PART,
        "schedule": SCHEDULE, "weight_decay": 0.1,
    } | given  # fmt: skip
    one = Design(**values)
    per_step = one.flops() // one.steps
    return replace(one, steps=min(BUDGET // per_step, most_steps(one)))


def dense(width: int, hidden: int, peak_lr: float, **given: Any) -> Design:
    return largest(width=width, hidden=hidden, peak_lr=peak_lr, **(DENSE_SHAPE | given))


def _sparse(experts: int, k: int, hidden: int, **given: Any) -> Design:
    base = {"width": 32, "gate": "renormalised" if k > 1 else "softmax", "peak_lr": 0.012}  # fmt: skip
    return largest(experts=experts, k=k, hidden=hidden, **(base | given))


# Dense shapes and learning rates, one seed each: which of them is the baseline.
SEARCH = [
    dense(32, 128, 0.012, batch=16),
    dense(32, 128, 0.024, batch=16),
    dense(32, 64, 0.012, batch=16),
    dense(32, 256, 0.012, batch=16),
    dense(48, 128, 0.012, batch=16),
    dense(32, 64, 0.012, batch=16, layers=2),
    dense(32, 128, 0.012),
    dense(32, 128, 0.024),
    dense(32, 64, 0.012),
    dense(32, 64, 0.024),
    dense(24, 128, 0.024),
    dense(24, 128, 0.012),
    dense(32, 256, 0.012),
    dense(48, 128, 0.012),
    dense(32, 128, 0.012, layers=2),
    dense(24, 64, 0.012),
    dense(24, 192, 0.012),
    dense(16, 128, 0.012),
    dense(24, 128, 0.008),
]
BASELINE = dense(24, 128, 0.012)
# Sparse designs that differ, each of which must reach the bar.
DESIGNS = {
    "64 fine experts, 4 used": _sparse(64, 4, 16),
    "8 large experts, 2 used": _sparse(8, 2, 64),
    "one of 32 experts, a gate that is a probability": _sparse(32, 1, 64, strength=0.02),
    "a shared FFN and 2 of 16 experts": _sparse(16, 2, 32, shared=32),
    "2 of 32 experts, sigmoid gate, a bias and no loss": _sparse(32, 2, 32, gate="sigmoid", cure="bias", strength=0.01),
}  # fmt: skip
SEEDS = tuple(range(5))


def arms() -> list[tuple[str, Design, int]]:
    """(name, design, seed) of every run of the record."""
    found = [("search", design, 0) for design in SEARCH]
    for seed in SEEDS:
        found.append(("dense", BASELINE, seed))
        found += [(name, design, seed) for name, design in DESIGNS.items()]
    return found


def row(name: str, design: Design, seed: int, result: Mapping[str, Any]) -> dict[str, Any]:  # fmt: skip
    """One run as the record holds it: flat, at the part of the budget that a check trains with."""
    violation, dead = uneven(result)
    sizes = [
        key for key in KEYS if key not in ("heads", "steps", "schedule", "weight_decay")
    ]
    return {
        "name": name,
        "seed": seed,
        **{key: getattr(design, key) for key in sizes},
        "steps": result["steps"],
        "flops": result["steps"] * design.flops() // design.steps,
        "stored_params": design.spec().total_params(),
        "used_params": design.spec().active_params(include_embedding=False),
        "held_out_bits": round(result["bits"], 4),
        **{f"{domain}_bits": round(bits, 4) for domain, bits in result["domains"].items()},
        "max_violation": round(violation, 3),
        "dead_experts": dead,
    }  # fmt: skip


def work(arm: tuple[str, Design, int], folder: Path) -> dict[str, Any]:
    """Read a run's result or make it."""
    _, design, seed = arm
    identity = {"design": plain(design), "seed": seed, "part": PART}
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    return made(folder / f"{digest}.json", identity, lambda: train(design, seed))


def study(folder: Path, jobs: int) -> list[dict[str, Any]]:
    """All arms, `jobs` at a time; the record's rows."""
    one = partial(work, folder=folder)
    side_by_side(one, arms(), jobs)
    return [row(*arm, one(arm)) for arm in arms()]


def bits(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """The held-out losses of a design of the record, by seed."""
    return [row["held_out_bits"] for row in rows if row["name"] == name]


def bar(rows: Sequence[Mapping[str, Any]]) -> float:
    """What a design must not exceed: 2 % below the dense baseline's mean, in hundredths of a bit."""
    return math.floor(98 * statistics.mean(bits(rows, "dense"))) / 100


def main(arguments: Sequence[str] | None = None) -> int:
    if (sys.argv[1:] if arguments is None else arguments) == ["--train"]:
        return _child()
    return command_line(
        "moe_course.training.capstone", "capstone", FOLDER, RECORD, study, arguments
    )


if __name__ == "__main__":
    sys.exit(main())
