"""What the book's playground shows for what its reader chose: this very file runs in the browser.

A state maps names of `FIELDS` to the texts that were typed there; what it lacks has its default. It is also what stands
in a shared link. `answer` reads a state, calls `costs` and `specs`, and returns what JSON can hold: numbers, and the
same numbers as sentences, tables and charts, which the page only has to draw.

Page: book/choosing/playground.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moe_course.costs.latency import (
    Step,
    compute_bound_from,
    crossovers,
    decode_step,
    prefill,
)
from moe_course.costs.memory import Precision, cache_bytes, weight_bytes
from moe_course.costs.network import Link, all_to_all_bytes, all_to_all_time
from moe_course.costs.touched import expected_distinct_experts
from moe_course.costs.training import serving_cost
from moe_course.specs.hardware import Accelerator, accelerators
from moe_course.specs.model import FFN, GQA, ModelSpec, RoutedExperts
from moe_course.specs.zoo import zoo

# ---- What can be chosen ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Field:
    """One input: a choice where there are `choices`, a number where there is a `most`, else a text of many lines."""

    name: str
    label: str
    default: str
    least: float = 0
    most: float | None = None
    whole: bool = True  # of a number
    choices: tuple[tuple[str, str], ...] = ()


TYPED, PASTED = ("typed", "typed in below"), ("config", "a config.json, pasted below")
# 4 bits carry a scale of 16 bits for every 32 weights.
BYTES = {"16": 2.0, "8": 1.0, "4": 0.5625}
_BITS = (("16", "16 bits"), ("8", "8 bits"), ("4", "4 bits, with scales"))
_MODELS = (*((name, name) for name in zoo), TYPED, PASTED)
SHAPE = (
    Field("layers", "Layers", "32", 1, 1000),
    Field("width", "Width", "4096", 1, 10**6),
    Field("vocab", "Vocabulary", "32000", 1, 10**8),
    Field("heads", "Query heads", "32", 1, 10**5),
    Field("kv_heads", "Key and value heads", "8", 1, 10**5),
    Field("head_dim", "Numbers in a head", "128", 1, 10**5),
    Field("experts", "Experts, 0: dense", "8", 0, 10**5),
    Field("k", "Experts for a token", "2", 1, 10**5),
    Field("hidden", "Hidden width, expert", "14336", 1, 10**7),
    Field("shared", "Shared experts", "0", 0, 1000),
    Field("first_dense", "Dense layers in front", "0", 0, 1000),
    Field("dense_hidden", "Hidden width, dense", "14336", 1, 10**7),
)
_ALL = (
    Field("model", "Model", "mixtral-8x7b", choices=_MODELS),
    *SHAPE,
    Field("config", "config.json", ""),
    Field("other", "Other model", "llama-2-70b", choices=(("", "none"), *_MODELS)),
    *(replace(field, name=f"other_{field.name}") for field in SHAPE),
    Field("other_config", "config.json of the other model", ""),
    Field("gpu", "GPU", "H200", choices=(*((g, g) for g in accelerators), TYPED)),
    Field("tflops", "TFLOP/s in 16 bits", "989.4", 0.001, 10**9, whole=False),
    Field("tflops8", "TFLOP/s in 8 bits", "1978.9", 0.001, 10**9, whole=False),
    Field("bandwidth", "Memory bandwidth, GB/s", "4800", 0.001, 10**9, whole=False),
    Field("capacity", "Memory, GB", "141", 0.001, 10**9, whole=False),
    Field("link", "Link between GPUs, GB/s", "450", 0.001, 10**9, whole=False),
    Field("gpus", "Number of GPUs", "2", 1, 10**5),
    Field("weights", "Weights", "16", choices=_BITS),
    Field("experts_in", "Weights of experts", "", choices=(("", "the same"), *_BITS)),
    Field("cache", "KV cache", "16", choices=_BITS[:2]),
    Field("arithmetic", "Arithmetic", "16", choices=_BITS[:2]),
    Field("price", "Price of a GPU-hour", "1", 0, 10**9, whole=False),
    Field("busy", "Share of the hour in use, %", "100", 0.001, 100, whole=False),
    Field("batch", "Batch: sequences at once", "32", 1, 65536),
    Field("context", "Context: tokens in each", "4096", 0, 10**7),
)
# A shared link holds what differs from these defaults, so they stay as they are.
FIELDS = {field.name: field for field in _ALL}
MOST_PARAMS = 10**16  # beyond this a config.json is broken, and floats may overflow


@dataclass(frozen=True)
class Setting:
    """Where and how the models run."""

    chip: Accelerator
    flops: float  # of one GPU, in the arithmetic chosen
    gpus: int
    precision: Precision
    batch: int
    context: int
    price: float  # of one GPU and hour
    busy: float  # share of the hour, 0 to 1

    def step(self, spec: ModelSpec, batch: int) -> Step:
        return decode_step(
            spec, self.chip, batch, self.context,
            precision=self.precision, flops=self.flops, devices=self.gpus,
        )  # fmt: skip

    def cost(self, step: Step) -> float:
        """Of a million tokens."""
        served = serving_cost(step.tokens_per_s, self.gpus, self.price, self.busy)
        return served.per_million_tokens


# ---- Reading a state ------------------------------------------------------------------------------------------


class _Inputs:
    """A state that is being read. What cannot be used gets a sentence in `errors`, under the name of its field."""

    def __init__(self, state: Mapping[str, str]) -> None:
        self.state = state
        self.errors: dict[str, str] = {}

    def text(self, name: str) -> str:
        return self.state.get(name, FIELDS[name].default).strip()

    def refuse(self, name: str, why: str) -> None:
        self.errors.setdefault(name, why)

    def choice(self, name: str) -> str:
        chosen = self.text(name)
        if chosen in dict(FIELDS[name].choices):
            return chosen
        self.refuse(name, f"{chosen[:40]!r} is not in this list: choose from it.")
        return FIELDS[name].default

    def number(self, name: str) -> float:
        field, text = FIELDS[name], self.text(name)
        assert field.most is not None
        try:
            value = float(text.replace(",", ""))
        except ValueError:
            value = math.nan
        if field.least <= value <= field.most and (
            not field.whole or value == int(value)
        ):
            return value
        self.refuse(
            name,
            f"A {'whole ' if field.whole else ''}number from {field.least:,.10g} to {field.most:,.10g} is needed here, "
            f"not {text[:20]!r}.",
        )
        return float(field.default)

    def whole(self, name: str) -> int:
        return int(self.number(name))


def _chip(inputs: _Inputs) -> tuple[Accelerator, float]:
    """The accelerator, and its FLOP rate in the arithmetic chosen."""
    chosen = inputs.choice("gpu")
    if chosen != "typed":
        chip = accelerators[chosen]
    else:
        chip = Accelerator(
            "the GPU typed in",
            bf16=1e12 * inputs.number("tflops"),
            fp8=1e12 * inputs.number("tflops8"),
            bandwidth=1e9 * inputs.number("bandwidth"),
            capacity=1e9 * inputs.number("capacity"),
            link="link",
            link_bandwidth=1e9 * inputs.number("link"),
            source="typed in",
        )
    if inputs.choice("arithmetic") == "16":
        return chip, chip.bf16
    if chip.fp8 is None:
        inputs.refuse(
            "arithmetic",
            f"The {chip.name} has no 8-bit (fp8) arithmetic: choose 16 bits, or another GPU.",
        )
    return chip, chip.fp8 or chip.bf16


def _setting(inputs: _Inputs) -> Setting:
    chip, flops = _chip(inputs)
    experts = inputs.choice("experts_in")
    return Setting(
        chip,
        flops,
        inputs.whole("gpus"),
        Precision(
            BYTES[inputs.choice("weights")],
            BYTES[experts] if experts else None,
            BYTES[inputs.choice("cache")],
        ),
        inputs.whole("batch"),
        inputs.whole("context"),
        inputs.number("price"),
        inputs.number("busy") / 100,
    )


def _model(inputs: _Inputs, which: str, prefix: str) -> ModelSpec | None:
    """The model chosen in the field `which`, None where there is none or its inputs have errors."""
    chosen = inputs.choice(which)
    if chosen == "typed":
        return _typed(inputs, prefix)
    if chosen == "config":
        return _pasted(inputs, f"{prefix}config")
    return zoo[chosen] if chosen else None


def _typed(inputs: _Inputs, prefix: str) -> ModelSpec | None:
    before = len(inputs.errors)
    n = {field.name: inputs.whole(prefix + field.name) for field in SHAPE}
    if n["heads"] % n["kv_heads"]:
        inputs.refuse(
            f"{prefix}kv_heads",
            f"{n['heads']} query heads cannot share {n['kv_heads']} evenly: take a divisor of {n['heads']}.",
        )
    if n["experts"] and n["k"] > n["experts"]:
        inputs.refuse(
            f"{prefix}k",
            f"A token cannot choose {n['k']} of {n['experts']} experts: at most {n['experts']}.",
        )
    if len(inputs.errors) > before:
        return None
    moe = None
    if n["experts"]:
        shared = FFN(n["shared"] * n["hidden"]) if n["shared"] else None
        moe = RoutedExperts(n["experts"], n["k"], FFN(n["hidden"]), shared)
    return ModelSpec(
        "the other typed model" if prefix else "the typed model",
        n["layers"],
        n["width"],
        n["vocab"],
        GQA(n["heads"], n["kv_heads"], n["head_dim"]),
        ffn=FFN(n["dense_hidden"]),
        moe=moe,
        first_dense=n["first_dense"],
    )


def _pasted(inputs: _Inputs, name: str) -> ModelSpec | None:
    text = inputs.text(name).removeprefix("\ufeff")
    label = "the other pasted model" if name.startswith("other") else "the pasted model"
    if not text:
        inputs.refuse(name, "Paste the text of the model's config.json here.")
        return None
    try:
        spec = ModelSpec.from_hf_config(json.loads(text), label)
        if spec.total_params() > MOST_PARAMS:
            raise ValueError(f"its sizes give more than {MOST_PARAMS:.0e} parameters")
    except json.JSONDecodeError as error:
        what = error.msg[:1].lower() + error.msg[1:].removesuffix(" starting at")
        inputs.refuse(
            name,
            f"This is not JSON: {what} in line {error.lineno}, column {error.colno}.",
        )
    except RecursionError:
        inputs.refuse(name, "This is not a config.json: it is nested too deeply.")
    except (ValueError, OverflowError) as error:
        inputs.refuse(name, f"This config.json cannot be counted: {error}.")
    else:
        return spec
    return None


# ---- Answering ------------------------------------------------------------------------------------------------


def answer(state: Mapping[str, str]) -> dict[str, Any]:
    """What the page shows for a state.

    errors: a sentence for each field that cannot be used, by its name; where there are any, nothing else
    models: for each of one or two models its numbers by name, in bytes, seconds, tokens/s and units of money
    lead: who has the shorter step, as (first batch, model 0 or 1)
    summary: the same as sentences
    tables, charts: the same as texts in rows, and as points over the batch with what each waits for

    Every number is what `costs` and `specs` return; computed here is only what there is room for.
    """
    inputs = _Inputs(state)
    setting = _setting(inputs)
    chosen = (_model(inputs, "model", ""), _model(inputs, "other", "other_"))
    if inputs.errors:
        return {"errors": inputs.errors}
    specs = [spec for spec in chosen if spec is not None]
    models = [numbers(spec, setting) for spec in specs]
    lead = _lead(specs, setting)
    return {
        "errors": {},
        "models": models,
        "lead": lead,
        "summary": [_sentence(m, setting) for m in models]
        + _lead_sentence(models, lead),
        "tables": [_table(models), *(_parts(m) for m in models)],
        "charts": _charts(specs, models, setting),
    }


def numbers(spec: ModelSpec, setting: Setting) -> dict[str, Any]:
    """All numbers of one model. Of all GPUs together unless the name says `per_gpu`; None: does not apply."""
    s = setting
    step = s.step(spec, s.batch)
    weights = weight_bytes(spec, s.precision)
    each = cache_bytes(spec, 1, s.context, s.precision)
    turns = compute_bound_from(
        spec, s.chip, s.context, precision=s.precision, flops=s.flops
    )
    prompt = (
        prefill(
            spec, s.chip, s.context,
            precision=s.precision, flops=s.flops, devices=s.gpus,
        )
        if s.context
        else None
    )  # fmt: skip
    moe = spec.moe
    return {
        "name": spec.name,
        "total_params": spec.total_params(),
        "active_params": spec.active_params(),
        "breakdown": {name: list(count) for name, count in spec.breakdown().items()},
        "experts": moe.experts if moe else None,
        "k": moe.k if moe else None,
        "experts_read": expected_distinct_experts(moe.experts, moe.k, s.batch)
        if moe
        else None,
        "weight_bytes": weights,
        "cache_bytes": s.batch * each,
        "stored_per_gpu": step.stored_bytes,
        "capacity_per_gpu": s.chip.capacity,
        "fits": step.fits,
        "gpus_needed": math.ceil((weights + s.batch * each) / s.chip.capacity),
        "largest_batch": _room(spec, s),
        "step_s": step.time_s,
        "memory_s": step.memory_s,
        "compute_s": step.compute_s,
        "bound": step.bound,
        "read_bytes": s.gpus * (step.weight_bytes + step.cache_bytes),
        "compute_bound_from": None if math.isinf(turns) else turns,
        "exchange_s": _exchange(spec, s),
        "prefill_s": prompt.time_s if prompt else None,
        "tokens_per_s": step.tokens_per_s,
        "tokens_per_s_each": step.tokens_per_s / s.batch,
        "per_million": s.cost(step),
    }


def _room(spec: ModelSpec, setting: Setting) -> int | None:
    """The most sequences that fit beside the weights; None: without context there is no end."""
    s = setting
    each = cache_bytes(spec, 1, s.context, s.precision)
    free = s.gpus * s.chip.capacity - weight_bytes(spec, s.precision)
    if free >= 0 and not each:
        return None
    return max(0, math.floor(free / each)) if each else 0


def _exchange(spec: ModelSpec, setting: Setting) -> float | None:
    """Seconds of a step's dispatch and combine, were experts spread over all GPUs, latency not counted."""
    s = setting
    if spec.moe is None or s.gpus == 1:
        return None
    sent = all_to_all_bytes(s.batch / s.gpus, spec.width, spec.moe.k, s.gpus)
    link = Link(s.chip.link, 0.0, s.chip.link_bandwidth)
    return 2 * len(spec.moe_layers) * all_to_all_time(sent, s.gpus, link)


def _lead(specs: Sequence[ModelSpec], setting: Setting) -> list[tuple[int, int]]:
    if len(specs) < 2:
        return []
    s = setting
    a, b = specs
    changes = crossovers(
        a, b, s.chip, s.context, flops=s.flops, devices=s.gpus, precision=s.precision
    )
    first = 0 if s.step(a, 1).time_s < s.step(b, 1).time_s else 1
    return [(batch, (first + i) % 2) for i, batch in enumerate([1, *changes])]


# ---- Texts ----------------------------------------------------------------------------------------------------


def amount(value: float) -> str:
    """Three figures: 0.0123, 1.23, 12.3, 1,230; 0 below a millionth, and powers of ten from 10^15 on."""
    if abs(value) >= 1e15:
        return f"{value:.2e}"
    if abs(value) < 1e-6:
        return "0"
    rounded = float(f"{value:.3g}")  # first, for 99.96 is 100 and not 100.0
    return f"{rounded:,.{max(0, 2 - math.floor(math.log10(abs(rounded))))}f}"


def gigabytes(value: float) -> str:
    return f"{amount(value / 1e9)} GB"


def seconds(value: float) -> str:
    if value >= 1:
        return f"{amount(value)} s"
    return f"{amount(value * 1e3)} ms" if value >= 1e-3 else f"{amount(value * 1e6)} µs"


def _sentence(m: dict[str, Any], setting: Setting) -> str:
    s = setting
    gpus = s.chip.name if s.gpus == 1 else f"{s.gpus:,} x {s.chip.name}"
    waits = {"memory": "memory", "compute": "arithmetic"}[m["bound"]]
    said = (
        f"{m['name']} on {gpus}: a decode step for {_sequences(s.batch)} takes at least {seconds(m['step_s'])} "
        f"and waits for {waits}; at most {amount(m['tokens_per_s'])} tokens/s, which cost at least "
        f"{amount(m['per_million'])} a million."
    )
    if m["fits"]:
        return said
    return (
        f"{said} But it does not fit: {gigabytes(m['stored_per_gpu'])} for a GPU of "
        f"{gigabytes(m['capacity_per_gpu'])}; {m['gpus_needed']:,} GPUs could hold it."
    )


def _batch(value: float) -> str:
    return f"{math.ceil(value):,}"


def _sequences(batch: int) -> str:
    return "one sequence" if batch == 1 else f"{batch:,} sequences"


def _lead_sentence(
    models: Sequence[dict[str, Any]], lead: Sequence[tuple[int, int]]
) -> list[str]:
    if not lead:
        return []
    if len(lead) == 1 and models[0]["step_s"] == models[1]["step_s"]:
        return ["Both take equally long."]
    (_, first), *changes = lead
    names = [m["name"] for m in models]
    later = [f", {names[who]} from batch {batch:,} on" for batch, who in changes]
    # `crossovers` looks no further than this.
    end = f"at every batch up to {65536:,}" if not changes else "at batch 1"
    return [f"The shorter step is that of {names[first]} {end}{''.join(later)}."]


def _table(models: Sequence[dict[str, Any]]) -> dict[str, Any]:
    def none(shown: Any, word: str = "none") -> Any:
        return lambda value: word if value is None else shown(value)

    whole = "{:,}".format
    rows = (
        ("Decode step, at least", "step_s", seconds),
        ("Memory alone", "memory_s", seconds),
        ("Arithmetic alone", "compute_s", seconds),
        ("It waits for", "bound", {"memory": "memory", "compute": "arithmetic"}.get),
        (
            "Arithmetic is longer from batch",
            "compute_bound_from",
            none(_batch, "never"),
        ),
        ("Read in a step", "read_bytes", gigabytes),
        ("Experts read in each layer", "experts_read", none(amount)),
        ("Dispatch and combine, on top", "exchange_s", none(seconds)),
        ("Prompt of one context, at least", "prefill_s", none(seconds)),
        ("Tokens/s, at most", "tokens_per_s", amount),
        ("Tokens/s of one sequence", "tokens_per_s_each", amount),
        ("A million tokens cost, at least", "per_million", amount),
        ("Weights", "weight_bytes", gigabytes),
        ("KV cache", "cache_bytes", gigabytes),
        ("On each GPU", "stored_per_gpu", gigabytes),
        ("Memory of a GPU", "capacity_per_gpu", gigabytes),
        ("Fits", "fits", {True: "yes", False: "no"}.get),
        ("GPUs that could hold it", "gpus_needed", whole),
        ("Most sequences that fit", "largest_batch", none(whole, "no limit")),
        ("Parameters, stored", "total_params", whole),
        ("Parameters that a token uses", "active_params", whole),
    )
    return {
        "id": "results",
        "caption": "A decode step and what it needs",
        "head": ["", *(m["name"] for m in models)],
        "rows": [[label, *(show(m[key]) for m in models)] for label, key, show in rows],
    }


def _parts(m: dict[str, Any]) -> dict[str, Any]:
    rows = [
        [
            name.replace("_", " ").capitalize().replace("ffn", "FFN"),
            f"{total:,}",
            f"{active:,}",
        ]
        for name, (total, active) in m["breakdown"].items()
        if total
    ]
    rows.append(["All", f"{m['total_params']:,}", f"{m['active_params']:,}"])
    return {
        "id": "parameters",
        "caption": f"Parameters of {m['name']}",
        "head": ["", "stored", "used by a token"],
        "rows": rows,
    }


# ---- Charts ---------------------------------------------------------------------------------------------------


def batches(batch: int) -> list[int]:
    """Where the lines are drawn: two in each doubling, to 4,096 or as far as the batch chosen asks for."""
    octaves = max(12, (batch - 1).bit_length())
    return sorted({round(2 ** (i / 2)) for i in range(2 * octaves + 1)})


def _charts(
    specs: Sequence[ModelSpec], models: Sequence[dict[str, Any]], setting: Setting
) -> dict[str, Any]:
    """Three quantities over the batch, and what is stored.

    lines: for each quantity and model its points, [batch, value, its text, what the step waits for, does it fit];
        `here` is the one at the batch chosen
    """
    s = setting
    steps = [[s.step(spec, b) for b in batches(s.batch)] for spec in specs]
    now = [s.step(spec, s.batch) for spec in specs]
    quantities: list[tuple[str, str, str, Callable[[Step], float]]] = [
        ("time", "Time of a decode step, at least", "ms", lambda x: 1e3 * x.time_s),
        ("rate", "Tokens a second, at most", "tokens/s", lambda x: x.tokens_per_s),
    ]
    if s.price:
        cost = ("cost", "Cost of a million tokens, at least", "units of money", s.cost)
        quantities.append(cost)

    def point(step: Step, value: Callable[[Step], float]) -> list[Any]:
        y = value(step)
        return [step.tokens, y, amount(y), step.bound, step.fits]

    names = [m["name"] for m in models]
    lines = []
    for id, title, unit, value in quantities:
        here = [point(step, value) for step in now]
        said = (f"{name} {p[2]} {unit}" for name, p in zip(names, here, strict=True))
        lines.append(
            {
                "id": id,
                "title": title,
                "unit": unit,
                "names": names,
                "here": here,
                "alt": f"{title}, over the batch. At {_sequences(s.batch)}: {', '.join(said)}.",
                "lines": [[point(step, value) for step in each] for each in steps],
            }
        )
    room = s.gpus * s.chip.capacity
    stored = {
        "id": "memory",
        "title": "Stored on all GPUs together",
        "room": room,
        "room_text": f"room for {gigabytes(room)}",
        "bars": [
            {
                "name": m["name"],
                "parts": [
                    [label, m[key], gigabytes(m[key])]
                    for label, key in (
                        ("weights", "weight_bytes"),
                        ("KV cache", "cache_bytes"),
                    )
                ],
            }
            for m in models
        ],
    }
    return {"lines": lines, "stored": stored}
