"""Which models meet given needs, and in which order: each rule with its figure, its limit and its place in the course.

First hard constraints: a model that misses one is out, with how much it misses and what would help. Then an order by
one stated criterion. There is no score. Times are lower bounds (`costs.latency`): a limit that a bound misses is missed
for certain, one that it meets may still be missed in practice. Quality is never computed here: bring a published
figure, or it is unknown. Unknown is None, and is neither met nor missed.

Chapter: book/choosing/when.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from math import inf
from typing import Any, Literal, get_args

from moe_course.costs.budget import lora_budget
from moe_course.costs.latency import Step, decode_step, prefill, touched_weights
from moe_course.costs.memory import (
    BF16,
    Precision,
    cache_bytes,
    training_memory,
    weight_bytes,
)
from moe_course.costs.training import serving_cost, training_flops_per_token
from moe_course.specs.hardware import Accelerator
from moe_course.specs.model import ModelSpec

Tuning = Literal["none", "lora", "full"]
Data = Literal["one domain", "diverse"]

LORA_RANK = 16
MOST_DEVICES = 4096
WIDTH = 100  # columns of a printed table
MOST_BATCH = 2**17
LEAST_BITS = 2.0  # a weight; what needs fewer gets no advice to quantise

_MXFP4 = Precision(2.0, experts=4.25 / 8)
# What is published in fewer than 16 bits: arXiv:2508.10925, table 1; README_WEIGHTS.md of DeepSeek-V3; Kimi K2's card.
AS_PUBLISHED: Mapping[str, Precision] = {
    "gpt-oss-20b": _MXFP4,
    "gpt-oss-120b": _MXFP4,
    "deepseek-v3": Precision(1.0),
    "kimi-k2": Precision(1.0),
}


@dataclass(frozen=True)
class Quality:
    """Figures that you bring, the larger the better: a benchmark's from one source, say, or effective parameters from a
    scaling law inside its range (`costs.effective_parameters`).

    A model without a figure is unknown, not 0. Figures of different measures, or of one measure with different prompts,
    do not compare: so the measure has to be named. Raises ValueError where it is not, and on figures below 0.
    """

    measure: str  # what, how and where: "MMLU, 5-shot, arXiv:2401.04088, table 2"
    figures: Mapping[str, float]  # by name of the model
    least: float | None = None  # a model below is out

    def __post_init__(self) -> None:
        if not self.measure.strip():
            raise ValueError(
                "a quality figure needs the name of its measure, such as 'MMLU, 5-shot'"
            )
        for name, value in self.figures.items():
            _require(0 <= value < inf, f"the quality of {name}", "not negative", value)


@dataclass(frozen=True)
class Needs:
    """What a model is wanted for. Raises ValueError on what contradicts itself."""

    accelerator: Accelerator | None = None
    devices: int = 1  # over which weights, caches and arithmetic are split evenly
    memory: float | None = None  # bytes, in place of an accelerator: no times then
    batch: int | None = None  # sequences decoded at once; 1 unless told otherwise
    requests_per_s: float | None = None  # in place of a batch, with `answer`
    context: int = 4096  # tokens of a sequence at its end, prompt and answer
    answer: int = 0  # of these, tokens that a request has written for it
    latency_ms: float | None = None  # a token, at most
    training_flops: float | None = None
    tuning: Tuning = "none"
    data: Data | None = None
    precision: Precision | None = None  # of all models; None: as published, else bf16
    quality: Quality | None = None
    price: float = 1.0  # of one device and hour, in any currency

    def __post_init__(self) -> None:
        if (self.accelerator is None) == (self.memory is None):
            raise ValueError("needs either an accelerator or a memory, one of the two")
        if self.memory is not None:
            _require(0 < self.memory < inf, "memory", "positive", self.memory)
            _require(self.devices == 1, "devices of a plain memory", "1", self.devices)
        if self.batch is not None and self.requests_per_s is not None:
            raise ValueError("needs either a batch or requests_per_s, not both")
        for name in ("devices", "batch"):
            value = getattr(self, name)
            whole = value is None or (type(value) is int and value >= 1)
            _require(whole, name, "an integer of at least 1", value)
        for name in ("context", "answer"):
            value = getattr(self, name)
            whole = type(value) is int and value >= 0
            _require(whole, name, "an integer of at least 0", value)
        for name in ("requests_per_s", "latency_ms", "training_flops"):
            value = getattr(self, name)
            _require(value is None or 0 < value < inf, name, "positive", value)
        _require(0 <= self.price < inf, "price", "not negative", self.price)
        least = 0 if self.requests_per_s is None else 1
        fits = least <= self.answer <= self.context
        asked = f"{least}..{self.context} (the context)"
        _require(fits, "answer", asked, self.answer)
        _require(self.tuning in get_args(Tuning), "tuning", Tuning, self.tuning)
        known = self.data is None or self.data in get_args(Data)
        _require(known, "data", Data, self.data)

    @property
    def sequences(self) -> int:
        """The batch, or one where requests come at a rate, for which `largest_batch` finds how many are best."""
        return self.batch or 1

    @property
    def capacity(self) -> float:
        """Bytes of all devices together."""
        if self.accelerator is None:
            return self.memory or 0.0
        return self.devices * self.accelerator.capacity

    def precision_of(self, spec: ModelSpec) -> Precision:
        return self.precision or AS_PUBLISHED.get(spec.name, BF16)


def _require(holds: bool, name: str, expected: object, got: object) -> None:
    if not holds:  # nan too, since no comparison with it holds
        choices = get_args(expected)
        text = "one of " + ", ".join(map(repr, choices)) if choices else expected
        raise ValueError(f"{name} must be {text}, got {got!r}")


@dataclass(frozen=True)
class Rule:
    """A hard constraint: its figure has to be at most its limit (`at_least`: at least)."""

    text: str
    unit: str
    evidence: str  # page#anchor of the course where such figures are shown
    asked: Callable[[Needs], bool]
    figure: Callable[[ModelSpec, Needs], float | None]
    limit: Callable[[Needs], float]
    at_least: bool = False


@dataclass(frozen=True)
class Check:
    """A rule applied to a model."""

    rule: str
    figure: float | None  # None: unknown
    limit: float
    unit: str
    evidence: str
    at_least: bool = False
    remedy: str = ""  # of a missed one: what would meet it
    devices: int | None = None  # the fewest of the same kind that meet it

    @property
    def met(self) -> bool | None:
        if self.figure is None:
            return None
        if self.at_least:
            return self.figure >= self.limit
        return self.figure <= self.limit

    @property
    def share(self) -> float | None:
        """Figure over limit (where it is a least, limit over figure), above 1 if missed."""
        if self.figure is None:
            return None
        above, below = self.figure, self.limit
        if self.at_least:
            above, below = below, above
        return above / below if below else inf if above else 1.0


@dataclass(frozen=True)
class Judgement:
    """A model against needs: its checks, and the figures to choose by. Bytes, seconds; None: unknown."""

    spec: ModelSpec
    precision: Precision
    checks: tuple[Check, ...]
    batch: int | None  # asked for, or the largest that fits and is in time
    stored_bytes: float  # weights, and the caches of that batch
    read_share: float | None  # of the weights, in one step of that batch
    step_s: float | None
    tokens_per_s: float | None
    cost: float | None  # of a million tokens written, the devices always busy
    training_tokens: float | None
    quality: float | None

    @property
    def sparse(self) -> bool:
        """Does a token leave some experts out?"""
        moe = self.spec.moe
        return moe is not None and bool(self.spec.moe_layers) and moe.k < moe.experts

    @property
    def met(self) -> bool | None:
        """False where a check is missed, else None where one is unknown, else True."""
        answers = [check.met for check in self.checks]
        return False if False in answers else None if None in answers else True

    @property
    def missed(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.met is False)

    @property
    def value(self) -> float | None:
        """Quality per unit of cost, where both are known and the cost is not 0."""
        return self.quality / self.cost if self.quality and self.cost else None


# What the rules measure.


def _held(spec: ModelSpec, needs: Needs, batch: int) -> float:
    precision = needs.precision_of(spec)
    caches = cache_bytes(spec, batch, needs.context, precision)
    return weight_bytes(spec, precision) + caches


def _step(spec: ModelSpec, needs: Needs, batch: int) -> Step | None:
    if needs.accelerator is None:
        return None
    # While an answer is written its context grows: on average half of it is there.
    return decode_step(
        spec, needs.accelerator, batch, needs.context - needs.answer / 2,
        precision=needs.precision_of(spec), devices=needs.devices,
    )  # fmt: skip


def largest_batch(spec: ModelSpec, needs: Needs) -> int:
    """The most sequences that fit and whose step is in time, up to 2^17; 0 if not even one."""

    precision, limit = needs.precision_of(spec), needs.latency_ms
    weights = weight_bytes(spec, precision)  # once: it does not depend on the batch

    def serves(batch: int) -> bool:
        caches = cache_bytes(spec, batch, needs.context, precision)
        if weights + caches > needs.capacity:
            return False
        step = None if limit is None else _step(spec, needs, batch)
        return step is None or limit is None or step.time_s * 1e3 <= limit

    low, high = 0, MOST_BATCH + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if serves(middle) else (low, middle)
    return low


def _at_once(spec: ModelSpec, needs: Needs) -> int:
    """Sequences in one step: the batch, or as many as possible where requests come in at a rate."""
    if needs.requests_per_s is None:
        return needs.sequences
    return largest_batch(spec, needs)


def _request_s(spec: ModelSpec, needs: Needs, batch: int) -> float | None:
    """Seconds of all devices that a request takes: its share of a batch of prompts, and of its answer's steps."""
    step = _step(spec, needs, batch) if batch else None
    if step is None or needs.accelerator is None:
        return None
    read, prompt = 0.0, needs.context - needs.answer
    if prompt:
        read = prefill(
            spec, needs.accelerator, prompt, batch,
            precision=needs.precision_of(spec), devices=needs.devices,
        ).time_s / batch  # fmt: skip
    return read + needs.answer * step.time_s / batch


def _memory(spec: ModelSpec, needs: Needs) -> float:
    # Where requests come at a rate, one sequence has to fit: `load` asks for the rest.
    return _held(spec, needs, needs.sequences)


def _latency(spec: ModelSpec, needs: Needs) -> float | None:
    step = _step(spec, needs, needs.sequences)
    return None if step is None else step.time_s * 1e3


def _load(spec: ModelSpec, needs: Needs) -> float | None:
    seconds = _request_s(spec, needs, largest_batch(spec, needs))
    return None if seconds is None else seconds * (needs.requests_per_s or 0)


def _trained(spec: ModelSpec, needs: Needs) -> float:
    return training_memory(
        spec, max(needs.context, 1), needs.devices, shard="weights", recompute=True
    ).total()


def _tuned(spec: ModelSpec, needs: Needs) -> float:
    if needs.tuning == "full":
        return _trained(spec, needs)
    adapters = lora_budget(spec, LORA_RANK, shared=True, attention=True, dense=True)
    held = weight_bytes(spec, needs.precision_of(spec)) + adapters.training_bytes
    activations = training_memory(
        spec, max(needs.context, 1), recompute=True
    ).activations
    return held / needs.devices + activations


def _quality(spec: ModelSpec, needs: Needs) -> float | None:
    return None if needs.quality is None else needs.quality.figures.get(spec.name)


def _one_device(needs: Needs) -> float:
    return needs.capacity / needs.devices


RULES: Mapping[str, Rule] = {
    "memory": Rule(
        "weights, and the caches of the batch, on all devices",
        "GB", "bandwidth/economics#serving-what-must-be-stored",
        lambda needs: True, _memory, lambda needs: needs.capacity,
    ),
    "latency": Rule(
        "least time of a token: bytes over bandwidth or FLOPs over rate, the longer",
        "ms", "bandwidth/roofline#the-table-corrected",
        lambda needs: needs.latency_ms is not None, _latency,
        lambda needs: needs.latency_ms or 0,
    ),
    "load": Rule(
        "share of the time that the devices are busy, in the largest batch in time",
        "", "bandwidth/economics#serving-throughput-at-a-latency",
        lambda needs: needs.requests_per_s is not None, _load, lambda needs: 1.0,
    ),
    "tuning": Rule(
        "fine-tuning on one device, all state split (ZeRO 3), recomputing",
        "GB", "finetuning/lora#budgets",
        lambda needs: needs.tuning != "none", _tuned, _one_device,
    ),
    "training": Rule(
        "training on one device, all state split (ZeRO 3), recomputing",
        "GB", "bandwidth/economics#training-which-memory",
        lambda needs: needs.training_flops is not None, _trained, _one_device,
    ),
    "quality": Rule(
        "the figure that you brought",
        "", "choosing/when#what-no-rule-decides",
        lambda needs: needs.quality is not None and needs.quality.least is not None,
        _quality,
        lambda needs: (needs.quality and needs.quality.least) or 0.0,
        at_least=True,
    ),
}  # fmt: skip


# What would help.


def least_devices(
    spec: ModelSpec, needs: Needs, rules: Iterable[str] | None = None
) -> int | None:
    """The fewest devices of the same kind that meet these rules (all that were asked unless named); None above 4,096.

    Splitting is even and free, so this too is a lower bound. None without an accelerator.
    """
    if needs.accelerator is None:
        return None
    names = [name for name in rules or RULES if RULES[name].asked(needs)]

    def enough(devices: int) -> bool:
        more = replace(needs, devices=devices)
        return all(_check(name, spec, more).met for name in names)

    low, high = 0, 1
    while not enough(high):
        if high >= MOST_DEVICES:
            return None
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _check(name: str, spec: ModelSpec, needs: Needs) -> Check:
    rule = RULES[name]
    scale = 1e9 if rule.unit == "GB" else 1.0
    figure = rule.figure(spec, needs)
    return Check(
        name,
        None if figure is None else figure / scale,
        rule.limit(needs) / scale,
        rule.unit,
        rule.evidence,
        rule.at_least,
    )


def _with_remedy(check: Check, spec: ModelSpec, needs: Needs) -> Check:
    if check.met is not False or check.rule == "quality":
        return check
    devices = least_devices(spec, needs, [check.rule])
    ways = []
    if devices is not None:
        ways.append(f"{devices:,} devices")
    elif needs.accelerator is not None:
        ways.append(f"more than {MOST_DEVICES:,} devices")
    if check.rule == "memory":
        caches = _held(spec, needs, needs.sequences) - _held(spec, needs, 0)
        bits = 8 * (needs.capacity - caches) / spec.total_params()
        if bits >= LEAST_BITS:
            ways.append(f"{bits:.2f} bits a weight")
    if check.rule == "latency" and needs.sequences > 1:
        batch = _batch_in_time(spec, needs)
        ways += [f"a batch of {batch:,}"] if batch else []
    return replace(check, remedy=" or ".join(ways), devices=devices)


def _batch_in_time(spec: ModelSpec, needs: Needs) -> int:
    low, high = 0, needs.sequences  # which is too many
    while high - low > 1:
        middle = (low + high) // 2
        figure = _latency(spec, replace(needs, batch=middle))
        in_time = figure is not None and figure <= (needs.latency_ms or 0)
        low, high = (middle, high) if in_time else (low, middle)
    return low


# Judging and ordering.


def judge(spec: ModelSpec, needs: Needs) -> Judgement:
    """One model against the needs: every rule that they ask for, and the figures to choose by."""
    checks = tuple(
        _with_remedy(_check(name, spec, needs), spec, needs)
        for name, rule in RULES.items()
        if rule.asked(needs)
    )
    precision, batch = needs.precision_of(spec), _at_once(spec, needs)
    # A model that does not fit has no speed.
    fits = batch > 0 and _held(spec, needs, batch) <= needs.capacity
    step = _step(spec, needs, batch) if fits else None
    rate = None if step is None else step.tokens_per_s
    if needs.requests_per_s is not None:
        seconds = _request_s(spec, needs, batch)
        rate = None if seconds is None else needs.answer / seconds
    flops = training_flops_per_token(spec, needs.context)
    budget = needs.training_flops
    return Judgement(
        spec,
        precision,
        checks,
        batch or None,
        stored_bytes=_held(spec, needs, batch),
        read_share=touched_weights(spec, batch, precision)
        / weight_bytes(spec, precision)
        if batch
        else None,
        step_s=None if step is None else step.time_s,
        tokens_per_s=rate,
        cost=None
        if rate is None
        else serving_cost(rate, needs.devices, needs.price).per_million_tokens,
        training_tokens=None if budget is None else budget / flops,
        quality=_quality(spec, needs),
    )


@dataclass(frozen=True)
class Criterion:
    """What models that miss nothing are ordered by."""

    text: str
    of: Callable[[Judgement], float | None]
    highest_first: bool = False


CRITERIA: Mapping[str, Criterion] = {
    "cost": Criterion("cost of a million tokens, lowest first", lambda j: j.cost),
    "latency": Criterion("time of a token, shortest first", lambda j: j.step_s),
    "memory": Criterion("bytes stored, fewest first", lambda j: j.stored_bytes),
    "tokens": Criterion(
        "tokens that the training budget buys, most first",
        lambda j: j.training_tokens, True,
    ),
    "quality": Criterion("your quality figure, highest first", lambda j: j.quality, True),
    "value": Criterion(
        "your quality figure over the cost of a million tokens, highest first",
        lambda j: j.value, True,
    ),
}  # fmt: skip


def rank(needs: Needs, specs: Iterable[ModelSpec], by: str = "cost") -> list[Judgement]:
    """All models, judged: those that meet everything, then the undecided (an unknown figure), then those that miss.

    Within the first two by the criterion, unknown last; those that miss by how far they miss most, nearest first. Ties
    go by name, so the order of `specs` does not matter. Raises ValueError on an unknown criterion, two models of one
    name, and a quality figure of a model that is not there.
    """
    specs = list(specs)
    if by not in CRITERIA:
        raise ValueError(f"by must be one of {', '.join(CRITERIA)}, got {by!r}")
    names = [spec.name for spec in specs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two models are called {twice[0]!r}: rename one of them")
    strangers = sorted(set(needs.quality.figures if needs.quality else ()) - set(names))
    if strangers:
        raise ValueError(
            f"there is a quality figure for {strangers[0]!r}, but no such model: the models are {', '.join(names)}"
        )
    criterion = CRITERIA[by]

    def place(judgement: Judgement) -> tuple[int, bool, float, str]:
        group = {True: 0, None: 1, False: 2}[judgement.met]
        if group == 2:
            worst = max(check.share or 0.0 for check in judgement.missed)
            return group, False, worst, judgement.spec.name
        figure = criterion.of(judgement)
        order = (
            0.0 if figure is None else -figure if criterion.highest_first else figure
        )
        return group, figure is None, order, judgement.spec.name

    return sorted((judge(spec, needs) for spec in specs), key=place)


@dataclass(frozen=True)
class Remark:
    """What bears on the choice and no figure here decides."""

    text: str
    evidence: str


def remarks(needs: Needs) -> list[Remark]:
    """What the table cannot say about these needs, and where the course looks into it."""
    said = []
    if needs.accelerator is not None:
        said.append(
            Remark(
                "times are lower bounds: peak rates, perfect overlap, even splits, nothing exchanged between devices",
                "bandwidth/roofline#does-a-machine-agree",
            )
        )
    if needs.data is not None:
        said.append(
            Remark(
                "data: no rule. At equal compute 8 experts gained 1.1 % of the loss on six domains and 0.9 % on one, "
                "where seeds differ by more than that; models of 1 million parameters",
                "math/compute_equivalence#loss-against-flops",
            )
        )
    if needs.tuning != "none":
        said.append(
            Remark(
                "tuning: memory is a rule, quality after it is not: what is forgotten depends on what is trained, and "
                "on replay, more than on the router",
                "finetuning/drift#the-experiment",
            )
        )
    if needs.training_flops is not None:
        said.append(
            Remark(
                "training: tokens bought are no loss. Scaling laws relate the two, for the recipes and sizes that they "
                "were fitted to",
                "math/compute_equivalence#what-scaling-laws-say",
            )
        )
    if needs.quality is None:
        said.append(
            Remark(
                "quality is unknown: bring figures of one measure, or all that is compared is cost",
                "choosing/when#what-no-rule-decides",
            )
        )
    return said


# Showing.


def _number(value: float | None) -> str:
    """Three or four digits that mean something, or a question mark."""
    if value is None:
        return "?"
    if value and not 1e-3 <= value < 1e6:
        return f"{value:.1e}"
    digits = 0 if value >= 1000 else 1 if value >= 100 else 2 if value >= 10 else 3
    return f"{value:,.{digits}f}"


@dataclass(frozen=True)
class _Column:
    head: str
    unit: str
    text: Callable[[Judgement], str]

    @property
    def width(self) -> int:
        return max(len(self.head), len(self.unit), 6) + 2


def _columns(needs: Needs, by: str) -> list[_Column]:
    """What there is to see: the models, each rule with its limit, and what they can be ordered by."""
    columns = [
        _Column("kind", "", lambda j: "sparse" if j.sparse else "dense"),
        _Column("total", "10^9", lambda j: _number(j.spec.total_params() / 1e9)),
        _Column("active", "10^9", lambda j: _number(j.spec.active_params() / 1e9)),
        _Column("bits", "/weight", lambda j: f"{_bits(j):.2f}"),
    ]
    columns += [
        _of_rule(name, rule, needs) for name, rule in RULES.items() if rule.asked(needs)
    ]
    if needs.requests_per_s is not None:
        columns.append(_Column("batch", "", lambda j: f"{j.batch or 0:,}"))
    if needs.accelerator is not None:
        columns += [
            _Column("token", "ms", lambda j: _number(j.step_s and j.step_s * 1e3)),
            _Column("tokens", "/s", lambda j: _number(j.tokens_per_s)),
            _Column("cost", "/10^6", lambda j: _number(j.cost)),
        ]
    if needs.training_flops is not None:
        columns.append(
            _Column("buys", "10^9", lambda j: _number((j.training_tokens or 0) / 1e9))
        )
    if needs.quality is not None and needs.quality.least is None:
        columns.append(_Column("quality", "yours", lambda j: _number(j.quality)))
    if by == "value":
        columns.append(_Column("value", "/cost", lambda j: _number(j.value)))
    return columns


def _of_rule(name: str, rule: Rule, needs: Needs) -> _Column:
    limit = rule.limit(needs) / (1e9 if rule.unit == "GB" else 1)
    sign = ">=" if rule.at_least else "<="
    unit = f"{sign} {limit:,.4g} {rule.unit}".strip()

    def text(judgement: Judgement) -> str:
        return next(_number(c.figure) for c in judgement.checks if c.rule == name)

    return _Column(name, unit, text)


def _bits(judgement: Judgement) -> float:
    spec = judgement.spec
    return 8 * weight_bytes(spec, judgement.precision) / spec.total_params()


def _asked(needs: Needs) -> str:
    """The needs in one line."""
    if needs.accelerator is None:
        where = f"{needs.capacity / 1e9:,.1f} GB"
    else:
        each = needs.accelerator
        where = f"{needs.devices:,} x {each.name} ({needs.capacity / 1e9:,.1f} GB)"
    parts = [where]
    if needs.requests_per_s is None:
        parts.append(f"batch {needs.sequences:,}, context {needs.context:,}")
    else:
        prompt = needs.context - needs.answer
        rate = f"{needs.requests_per_s:,g} requests/s"
        parts.append(f"{rate} of {prompt:,} + {needs.answer:,} tokens")
    if needs.latency_ms is not None:
        parts.append(f"at most {needs.latency_ms:g} ms a token")
    if needs.tuning != "none":
        parts.append(f"tuning {needs.tuning}")
    if needs.training_flops is not None:
        parts.append(f"training {needs.training_flops:.1e} FLOPs")
    if needs.data is not None:
        parts.append(f"data {needs.data}")
    return ", ".join(parts)


def _missed(check: Check) -> str:
    """A missed check in words: figure, limit, by how much, and what would meet it."""
    unit = f" {check.unit}" if check.unit else ""
    sign = "least" if check.at_least else "most"
    text = (
        f"{check.rule} {_number(check.figure)}, at {sign} {_number(check.limit)}{unit}"
    )
    if not check.at_least:
        text += f", {_number(check.share)} times"
    return text + (f": {check.remedy} would do" if check.remedy else "")


def table(
    needs: Needs, judgements: list[Judgement], by: str = "cost", width: int = WIDTH
) -> str:
    """What `rank` returned as plain text, at most `width` columns wide, with every part of the decision in it."""

    def wrapped(text: str, indent: int = 3) -> list[str]:
        return textwrap.wrap(
            text, width, subsequent_indent=" " * indent,
            break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip

    lines = wrapped(f"Needs: {_asked(needs)}")
    lines += wrapped(f"Order: {CRITERIA[by].text}")
    if needs.quality is not None:
        lines += wrapped(f"Quality: {needs.quality.measure}")
    met = [j for j in judgements if j.met is True]
    undecided = [j for j in judgements if j.met is None]
    missed = [j for j in judgements if j.met is False]
    if met:
        lines += [
            "",
            f"Every rule met: {len(met)}",
            *_rows(met, _columns(needs, by), width),
        ]
    else:
        lines += ["", "No model meets every rule."]
    if undecided:
        title = f"Undecided, since a figure is unknown: {len(undecided)}"
        lines += ["", title, *_rows(undecided, _columns(needs, by), width, len(met))]
    if missed:
        lines += ["", f"A rule missed, nearest first: {len(missed)}"]
        for judgement in missed:
            said = "; ".join(map(_missed, judgement.missed))
            lines += wrapped(f"   {_short(judgement):<18} {said}", 22)
    lines += ["", "Rules, and where such figures are shown"]
    for name, rule in RULES.items():
        if rule.asked(needs):
            lines += wrapped(f" - {name}: {rule.text} [{rule.evidence}]", 3)
    lines += ["", "Not in the table"]
    for remark in remarks(needs):
        lines += wrapped(f" - {remark.text} [{remark.evidence}]", 3)
    return "\n".join(lines)


def _short(judgement: Judgement) -> str:
    name = judgement.spec.name
    return name if len(name) <= 18 else name[:17] + "…"


def _rows(
    judgements: list[Judgement], columns: list[_Column], width: int, placed: int = 0
) -> list[str]:
    """Blocks of columns, as many as it takes to stay within the width; each begins with the names."""
    blocks: list[list[_Column]] = [[]]
    for column in columns:
        if 22 + sum(c.width for c in [*blocks[-1], column]) > width:
            blocks.append([])
        blocks[-1].append(column)
    lines = []
    for block in blocks:
        lines.append(" " * 22 + "".join(f"{c.head:>{c.width}}" for c in block))
        lines.append(" " * 22 + "".join(f"{c.unit:>{c.width}}" for c in block))
        for place, judgement in enumerate(judgements, placed + 1):
            cells = "".join(f"{c.text(judgement):>{c.width}}" for c in block)
            lines.append(f"{place:>2} {_short(judgement):<19}{cells}")
    return [line.rstrip() for line in lines]


def as_dict(
    needs: Needs, judgements: list[Judgement], by: str = "cost"
) -> dict[str, Any]:
    """The same for programs. None is unknown; bytes, seconds, and GB where a check says so."""
    return {
        "needs": asdict(needs),
        "order": {"by": by, "means": CRITERIA[by].text},
        "models": [
            {
                "name": j.spec.name,
                "kind": "sparse" if j.sparse else "dense",
                "meets_all": j.met,
                "total_params": j.spec.total_params(),
                "active_params": j.spec.active_params(),
                "bits_per_weight": _bits(j),
                "batch": j.batch,
                "stored_bytes": j.stored_bytes,
                "read_share": j.read_share,
                "seconds_per_token": j.step_s,
                "tokens_per_s": j.tokens_per_s,
                "cost_per_million_tokens": j.cost,
                "training_tokens": j.training_tokens,
                "quality": j.quality,
                "value": j.value,
                "checks": [asdict(check) | {"met": check.met} for check in j.checks],
            }
            for j in judgements
        ],
        "rules": {
            name: {"text": rule.text, "evidence": rule.evidence}
            for name, rule in RULES.items()
            if rule.asked(needs)
        },
        "remarks": [asdict(remark) for remark in remarks(needs)],
    }


__all__ = [
    "AS_PUBLISHED",
    "CRITERIA",
    "RULES",
    "Check",
    "Criterion",
    "Judgement",
    "Needs",
    "Quality",
    "Remark",
    "Rule",
    "as_dict",
    "judge",
    "largest_batch",
    "least_devices",
    "rank",
    "remarks",
    "table",
]
