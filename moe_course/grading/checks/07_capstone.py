"""Checks of exercise 07: what a design costs, what a budget buys, schedules, choosing, and a design trained again.

The oracles of 07.1 to 07.4 and of the claims of 07.5 are arithmetic in plain Python. The design of 07.5 is trained
here, in a process of its own, with a seed drawn by the check, and measured on text that no design is trained on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from random import Random
from typing import Any
from weakref import WeakKeyDictionary

from moe_course.grading.core import (
    Answer,
    Exercise,
    Failure,
    Invariant,
    Question,
    Shown,
    describe,
    expect_count,
    mismatch,
    same,
    shown,
)
from moe_course.training import capstone

Case = dict[str, Any]

ROUNDING = 1e-9  # relative


def _one_of(got: Any, mistakes: dict[str, Any]) -> str:
    """Which mistake gives this value; where many do, it tells nothing."""
    found = [text for text, value in mistakes.items() if value == got]
    return f"\n    that is {'; or '.join(found)}" if 0 < len(found) < 3 else ""


# 07.1

VOCAB = 256


def _draw_shape(rng: Random, dense: bool) -> dict[str, int]:
    heads = rng.choice([1, 2, 3])
    experts = 1 if dense else rng.randint(3, 60)
    return {
        "width": 2 * heads * rng.randint(4, 40),
        "layers": rng.randint(1, 5),
        "heads": heads,
        "experts": experts,
        "k": 1 if dense else rng.randint(1, experts - 1),
        "hidden": rng.randint(9, 300),
        "shared": 0 if dense else rng.choice([0, rng.randint(1, 200)]),
    }


def _parameters(design: dict[str, int]) -> tuple[int, int]:
    """(stored, used): one matrix after the other."""
    d = design["width"]
    stored = used = 0

    def add(weights: int, times_stored: int = 1, times_used: int = 1) -> None:
        nonlocal stored, used
        stored += times_stored * weights
        used += times_used * weights

    add(VOCAB * d, times_used=0)  # input embedding: one row is looked up
    add(d)  # the last norm
    add(VOCAB * d)  # output head
    for _ in range(design["layers"]):
        for _ in ("q", "k", "v", "out"):
            add(d * d)
        for _ in ("before attention", "before the FFN"):
            add(d)
        if design["experts"] > 1:
            add(d * design["experts"])  # router
        for _ in ("gate", "up", "down"):
            add(d * design["hidden"], design["experts"], design["k"])
            add(d * design["shared"])
    return stored, used


def _parameter_cases(rng: Random) -> list[Case]:
    cases = [{"design": _draw_shape(rng, dense=False)} for _ in range(4)]
    # Always one with a shared FFN and one without.
    cases[0]["design"]["shared"], cases[1]["design"]["shared"] = 0, rng.randint(5, 200)
    return sorted(cases, key=lambda case: sum(case["design"].values()))


def _parameter_mistakes(design: dict[str, int]) -> dict[str, tuple[int, int]]:
    stored, used = _parameters(design)
    d, layers = design["width"], design["layers"]
    router = layers * d * design["experts"]
    return {
        "without the router, which every byte meets whole": (stored - router, used - router),
        "the router counted for the chosen experts alone": (stored, used - router + layers * d * design["k"]),
        "with the input embedding among what a byte multiplies by": (stored, used + VOCAB * d),
        "without an output head of its own": (stored - VOCAB * d, used - VOCAB * d),
        "without the norms": (stored - (2 * layers + 1) * d, used - (2 * layers + 1) * d),
        "without the last norm": (stored - d, used - d),
    }  # fmt: skip


def _expect_parameters(answer: Answer, case: Case) -> None:
    want, got = _parameters(**case), answer(**case)
    if not same(got, want):
        failure = mismatch(got, want, describe(**case))
        known = _one_of(got, _parameter_mistakes(case["design"]))
        raise Failure(f"{failure}{known}", failure.hint)


def _counts_sparse(answer: Answer, rng: Random) -> None:
    for case in _parameter_cases(rng):
        _expect_parameters(answer, case)


def _counts_dense(answer: Answer, rng: Random) -> None:
    for _ in range(3):
        _expect_parameters(answer, {"design": _draw_shape(rng, dense=True)})


# 07.2


def _steps(
    used: int, layers: int, width: int, context: int, batch: int, flops: int,
    text: int, passes: int,
) -> int:  # fmt: skip
    each = 0
    for _ in range(used):
        each += 6
    for _ in range(layers):
        each += 12 * width * context  # scores and weighted values: 2 · 2 · 3 · D · S
    affordable = flops // (each * batch * context)
    windows = (text - 1) // context
    return min(affordable, passes * (windows // batch))


def _draw_budget(rng: Random, text_binds: bool) -> Case:
    case = {
        "used": rng.randint(900, 5000), "layers": rng.randint(1, 4), "width": 2 * rng.randint(8, 60),
        "context": rng.randint(20, 90), "batch": rng.randint(2, 19), "flops": 0, "text": 0, "passes": 2,
    }  # fmt: skip
    per_step = _per_step(case)
    steps = rng.randint(40, 400)
    case["flops"] = steps * per_step + rng.randrange(per_step)
    batches = rng.randint(10, steps // 3) if text_binds else steps
    # Windows that do not fill a batch, and bytes that do not fill a window.
    windows = batches * case["batch"] + rng.randrange(1, case["batch"])
    case["text"] = windows * case["context"] + rng.randrange(2, case["context"])
    return case


def _per_step(case: Case) -> int:
    each = 6 * case["used"] + 12 * case["layers"] * case["width"] * case["context"]
    return int(each * case["batch"] * case["context"])


def _steps_of_flops(answer: Answer, rng: Random) -> None:
    cases = [_draw_budget(rng, text_binds=False) for _ in range(4)]
    expect_count(answer, cases, _steps)


def _steps_of_text(answer: Answer, rng: Random) -> None:
    cases = [_draw_budget(rng, text_binds=True) for _ in range(3)]
    for case, passes in zip(cases, (1, 2, 2), strict=True):
        case["passes"] = passes
    # One byte more than whole windows; one byte too few for the last.
    for case, extra in zip(cases[1:], (1, 0), strict=True):
        windows = (case["text"] // case["context"]) // case["batch"] * case["batch"]
        case["text"] = windows * case["context"] + extra
    expect_count(answer, cases, _steps)


def _steps_exactly(answer: Answer, rng: Random) -> None:
    """Budgets that just suffice, and lack one FLOP; of sizes that a float does not hold; nothing at all."""
    case = _draw_budget(rng, text_binds=False)
    steps = 3 * 10**14 + rng.randrange(10**6)
    room = case["context"] * case["batch"] * (steps + 1) + 1
    cases = [
        case | {"flops": steps * _per_step(case) + more, "text": room}
        for more in (0, -1)
    ]
    cases += [case | {"flops": _per_step(case) - 1}, case | {"text": 1}]
    expect_count(answer, cases, _steps)


# 07.3

Schedule = list[tuple[float, float]]


def _rate(step: int, steps: int, peak: float, schedule: Schedule) -> Fraction:
    at = Fraction(step + 1, steps)
    points = [(Fraction(x), Fraction(y)) for x, y in schedule]
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 <= at <= x1:
            weight = (at - x0) / (x1 - x0)
            return Fraction(peak) * ((1 - weight) * y0 + weight * y1)
    raise AssertionError("a schedule ends at 1")


def _draw_schedule(rng: Random, points: int) -> Schedule:
    while True:
        inner = sorted(rng.uniform(0.05, 0.95) for _ in range(points - 2))
        at = [0.0, *inner, 1.0]
        if all(b - a > 0.03 for a, b in pairwise(at)):
            return [(x, rng.uniform(0.05, 1.0)) for x in at]


def _expect_rate(answer: Answer, case: Case) -> None:
    want, got = float(_rate(**case)), answer(**case)
    if type(got) not in (int, float):
        failure = mismatch(got, want, describe(**case))
        raise Failure(str(failure), hint=False)
    if not abs(got - want) <= ROUNDING * abs(want):
        raise mismatch(Shown(f"{got:.8g}"), Shown(f"{want:.8g}"), describe(**case))


def _rates(answer: Answer, rng: Random) -> None:
    for points in (2, 3, 5, 8):
        steps = rng.randint(20, 90)
        schedule = _draw_schedule(rng, points)
        peak = rng.uniform(1e-3, 1e-2)
        for step in sorted(rng.sample(range(1, steps), 6)):
            _expect_rate(answer, {"step": step, "steps": steps, "peak": peak, "schedule": schedule})  # fmt: skip


def _rate_corners(answer: Answer, rng: Random) -> None:
    """First and last step, corners themselves, a fall within one step, a single step."""
    schedule = [(0.0, 0.0), (0.25, 1.0), (0.5, 0.75), (1.0, 0.0)]
    for step in (0, 3, 4, 7, 8, 15):
        _expect_rate(answer, {"step": step, "steps": 16, "peak": 0.5, "schedule": schedule})  # fmt: skip
    late = [(0.0, 0.25), (0.875, 0.5), (1.0, 1.0)]
    for step, steps in ((0, 1), (0, 2), (1, 2)):
        _expect_rate(answer, {"step": step, "steps": steps, "peak": 1.0, "schedule": late})  # fmt: skip


# 07.4

Candidate = dict[str, Any]
NAMES = (
    "amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heath", "islet", "juniper", "knoll"
)  # fmt: skip


def _gain(dense: dict[int, float], candidate: Candidate) -> tuple[float, float, int]:
    """(mean gain, its standard error, seeds in common); the error is NaN where a run diverged."""
    seeds = [s for s in dense if s in candidate["bits"]]
    gains = [dense[s] - candidate["bits"][s] for s in seeds]
    if len(gains) < 2:
        return math.nan, math.nan, len(gains)
    mean = math.fsum(gains) / len(gains)
    variance = math.fsum((g - mean) ** 2 for g in gains) / (len(gains) - 1)
    return mean, math.sqrt(variance / len(gains)), len(gains)


def _chosen(
    dense: dict[int, float],
    candidates: list[Candidate],
    flops: int,
    state_bytes: int,
) -> str:
    best, name = 0.0, "dense"
    for candidate in candidates:
        mean, error, seeds = _gain(dense, candidate)
        allowed = candidate["flops"] <= flops and candidate["state_bytes"] <= state_bytes  # fmt: skip
        if not allowed or candidate["dead_experts"] or seeds < 3:
            continue
        if mean > 3 * error and mean > best:
            best, name = mean, candidate["name"]
    return name


def _draw_runs(
    rng: Random, dense: dict[int, float], gain: float, spread: float
) -> dict[int, float]:
    """Losses whose gains have just this mean and this standard deviation."""
    raw = [rng.gauss(0, 1) for _ in dense]
    mean = sum(raw) / len(raw)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in raw) / (len(raw) - 1))
    return {
        seed: bits - gain - spread * (x - mean) / deviation
        for (seed, bits), x in zip(dense.items(), raw, strict=True)
    }


def _draw_choice(rng: Random) -> Case:
    """Sound candidates, and beside them one for each way to be misled, all of which look better."""
    # Seeds differ by more than designs do: unpaired, nothing is significant.
    seeds = rng.sample(range(100), rng.randint(4, 7))
    dense = {seed: 3.2 + rng.choice([-1, 1]) * rng.uniform(0.3, 0.6) for seed in seeds}
    n, flops, room = len(seeds), rng.randint(10**9, 10**12), rng.randint(10**6, 10**8)
    gain = rng.uniform(0.05, 0.06)
    root = math.sqrt(n)

    def one(gain: float, errors: float, **more: Any) -> Candidate:
        """A gain of so many standard errors."""
        return {
            "name": "",
            "bits": _draw_runs(rng, dense, gain, gain / errors * root),
            "flops": flops - rng.randrange(10**6),
            "state_bytes": room - rng.randrange(10**4),
            "dead_experts": 0,
        } | more

    right = one(gain, 3.6)
    surer = one(0.5 * gain, 40.0)
    # With the deviation over n in place of n - 1 it would pass.
    lucky = one(1.5 * gain, 3.0 * math.sqrt((n - 1) / n) + 0.5 * (3 - 3 * math.sqrt((n - 1) / n)))  # fmt: skip
    noisy = one(2.0 * gain, 1.2)
    costly = one(2.5 * gain, 30.0, flops=flops + 1)
    large = one(2.5 * gain, 30.0, state_bytes=room + 1)
    dead = one(2.5 * gain, 30.0, dead_experts=rng.randint(1, 3))
    worse = one(-gain, 30.0)
    worst = max(dense, key=lambda seed: dense[seed])
    best = min(dense, key=lambda seed: dense[seed])
    few = one(3 * gain, 30.0)
    few["bits"] = {s: few["bits"][s] for s in (worst, best)}
    diverged = one(3 * gain, 30.0)
    diverged["bits"][worst] = math.inf
    # Other seeds, on which everything is easier.
    strangers = one(0.3 * gain, 30.0)
    strangers["bits"] |= {200 + i: 2.0 + 0.001 * i for i in range(9)}
    found = [right, surer, lucky, noisy, costly, large, dead, worse, few, diverged, strangers]  # fmt: skip
    rng.shuffle(found)
    names = rng.sample(NAMES, len(found))
    for candidate, name in zip(found, names, strict=True):
        candidate["name"] = name
        bits = list(candidate["bits"].items())
        rng.shuffle(bits)
        candidate["bits"] = dict(bits)
    return {"dense": dense, "candidates": found, "flops": flops, "state_bytes": room}


def _expect_choice(answer: Answer, case: Case) -> None:
    want, got = _chosen(**case), answer(**case)
    if same(got, want):
        return
    rows = []
    for c in case["candidates"]:
        mean, error, seeds = _gain(case["dense"], c)
        over = " over its FLOPs" * (c["flops"] > case["flops"])
        over += " over its memory" * (c["state_bytes"] > case["state_bytes"])
        over += f" {c['dead_experts']} dead" * bool(c["dead_experts"])
        rows.append(f"    {c['name']:<8} gain {mean:+.4f} ± {error:.4f} on {seeds} seeds{over}")  # fmt: skip
    raise Failure(f"expected {want!r}, got {shown(got)}:\n" + "\n".join(rows))


def _chooses(answer: Answer, rng: Random) -> None:
    for _ in range(5):
        _expect_choice(answer, _draw_choice(rng))


def _chooses_dense(answer: Answer, rng: Random) -> None:
    """Nothing is good enough; ties; limits just met; no candidates at all."""
    case = _draw_choice(rng)
    right = _chosen(**case)
    (kept,) = [c for c in case["candidates"] if c["name"] == right]
    exact = kept | {"flops": case["flops"], "state_bytes": case["state_bytes"]}
    for candidates in (
        [],
        [c for c in case["candidates"] if c["name"] != right and _gain(case["dense"], c)[0] <= 0],
        [exact | {"name": "first"}, exact | {"name": "second"}],
    ):  # fmt: skip
        _expect_choice(answer, case | {"candidates": candidates})
    dense = {1: 3.5, 2: 3.25, 3: 3.0}
    three = exact | {"bits": {1: 3.25, 2: 3.0, 3: 2.75}, "name": "sure"}
    two = exact | {"bits": {1: 3.25, 2: 3.0}, "name": "two seeds"}
    equal = exact | {"bits": dict(dense), "name": "equal"}
    for candidates in ([three], [two], [equal]):
        _expect_choice(answer, case | {"dense": dense, "candidates": candidates})


# 07.5

MOST_VIOLATION = 2.5
WITHIN = 0.03  # relative, of the loss that a recipe claims
MOST_BATCH = 1024

HUGE = 1e30  # beyond it a claim is none

Recipe = tuple[capstone.Design, Any]
# What an answer returned, read once: whatever it returns when it is asked again does not count.
_recipes: WeakKeyDictionary[Answer, Recipe] = WeakKeyDictionary()


def _distinct(experts: int, k: int, batch: int) -> float:
    missed = 1.0
    for _ in range(batch):
        missed *= 1 - k / experts
    return experts * (1 - missed)


def _decode_ms(design: capstone.Design, batch: int) -> tuple[float, float]:
    """Milliseconds of a decode step for reading, and for computing."""
    d = design.width
    read = min(batch, VOCAB) * d + VOCAB * d + d  # embedding, head, last norm
    router = design.experts if design.experts > 1 else 0
    experts = _distinct(design.experts, design.k, batch) * 3 * d * design.hidden
    layer = 4 * d * d + 2 * d + router * d + 3 * d * design.shared + experts
    _, used = _parameters(_shape(design))
    return (
        4e3 * (read + design.layers * layer) / capstone.DEVICE.bandwidth,
        2e3 * used * batch / capstone.DEVICE.bf16,
    )


def _shape(design: capstone.Design) -> dict[str, int]:
    names = ("width", "layers", "heads", "experts", "k", "hidden", "shared")
    return {name: getattr(design, name) for name in names}


def _compute_bound_from(design: capstone.Design) -> int:
    for batch in range(1, MOST_BATCH + 1):
        reading, computing = _decode_ms(design, batch)
        if computing > reading:
            return batch
    return 0


def true_claims(design: capstone.Design) -> dict[str, float]:
    """All claims but the loss, from the design alone."""
    stored, used = _parameters(_shape(design))
    weights = design.k * design.hidden + design.shared
    tokens = design.steps * design.batch * capstone.CONTEXT
    each = 6 * used + 12 * design.layers * design.width * capstone.CONTEXT
    return {
        "stored_params": stored,
        "used_params": used,
        "training_flops": tokens * each,
        "stored_per_used": (design.experts * design.hidden + design.shared) / weights,
        "experts_read_at_16": _distinct(design.experts, design.k, 16),
        "compute_bound_from": _compute_bound_from(design),
    }


CLAIMS = (
    "stored_params", "used_params", "training_flops", "stored_per_used", "experts_read_at_16",
    "compute_bound_from", "held_out_bits",
)  # fmt: skip


def _read(raw: object) -> Recipe:
    """The design, and the claims as they came. Raises ValueError where it is no design."""
    if type(raw) is not dict:
        raise ValueError(f"a recipe is a dict, got {type(raw).__name__}")
    design = {key: value for key, value in raw.items() if key != "claims"}
    return capstone.read(design), raw.get("claims")


def _claimed(answer: Answer) -> dict[str, float]:
    """What is claimed, as plain numbers."""
    claims = _recipes[answer][1]
    if type(claims) is not dict or any(type(key) is not str for key in claims):
        raise Failure("no claims: they are a dict under the key 'claims'", hint=False)
    missing = [key for key in CLAIMS if key not in claims]
    extra = [key[:40] for key in claims if key not in CLAIMS]
    if missing or extra:
        parts = [f"lack {', '.join(missing)}"] * bool(missing)
        parts += [f"have unknown {', '.join(extra[:9])}"] * bool(extra)
        raise Failure(f"the claims {' and '.join(parts)}", hint=False)
    found = {}
    for key in CLAIMS:
        value = claims[key]
        if type(value) not in (int, float) or not -HUGE < value < HUGE:
            raise Failure(
                f"the claim {key} must be a plain number, got {shown(value)}",
                hint=False,
            )
        found[key] = value
    return found


def _number(value: float, unit: str) -> str:
    if unit == "s":
        return f"{1e3 * value:.4g} ms"
    return f"{value:,.0f} {unit}"


def _keep(limits: list[capstone.Limit]) -> list[str]:
    """What is wrong with each limit that is not kept."""
    return [
        f"{limit.what}: {_number(limit.value, limit.unit)}, {_number(limit.most, limit.unit)} at most; {limit.advice}"
        for limit in limits
        if not limit.kept
    ]


def _is_sparse_and_within(answer: Answer, rng: Random) -> str:
    try:
        design, claims = _read(answer())
    except ValueError as error:
        raise Failure(str(error), hint=False) from error
    disguise = capstone.dense_in_disguise(design)
    if disguise:
        raise Failure(disguise, hint=False)
    if broken := _keep(capstone.budget(design)):
        raise Failure("; ".join(broken))
    if design.gate == "renormalised" and design.k == 1:
        raise Failure(
            "k = 1 with the gate 'renormalised': its only weight is 1 whatever the router says, so the loss teaches it "
            "nothing; use 'softmax' or 'sigmoid'",
            hint=False,
        )
    _recipes[answer] = design, claims
    spent = design.flops() / capstone.BUDGET
    return f"{spent:.1%} of the FLOPs, {capstone.state_bytes(design) / capstone.MEMORY:.0%} of the memory"


def _decodes_in_time(answer: Answer, rng: Random) -> str:
    design, _ = _recipes[answer]
    limits = capstone.latency(design)
    if broken := _keep(limits):
        raise Failure("; ".join(broken))
    return "; ".join(f"{one.what}: {_number(one.value, one.unit)}" for one in limits)


def _claims_hold(answer: Answer, rng: Random) -> None:
    design, claims = _recipes[answer][0], _claimed(answer)
    for key, want in true_claims(design).items():
        got = claims[key]
        exact = isinstance(want, int)
        if got != want if exact else not abs(got - want) <= 0.001 * abs(want):
            about = f"{want:,}" if exact else f"{want:.5g} (within 0.1 %)"
            raise Failure(f"{key} is {about}, the recipe claims {shown(got)}")


@lru_cache(maxsize=32)
def _trained(design: capstone.Design, seed: int) -> dict[str, Any]:
    return capstone.train_apart(design, seed)


def _result(answer: Answer, rng: Random) -> dict[str, Any]:
    """The design trained again. Not where it is outside its limits: that would measure another exercise."""
    design, _ = _recipes[answer]
    if broken := _keep(capstone.latency(design)):
        raise Failure(f"not trained: {broken[0]}", hint=False)
    # Every invariant of an answer asks for the same training.
    seed = _seeds.setdefault(answer, rng.randrange(10**6, 2**31))
    try:
        return _trained(design, seed)
    except (ValueError, RuntimeError) as error:
        raise Failure(f"trained again: {error}", hint=False) from error


_seeds: WeakKeyDictionary[Answer, int] = WeakKeyDictionary()


def _measured(result: dict[str, Any]) -> str:
    each = ", ".join(f"{name} {bits:.3f}" for name, bits in result["domains"].items())
    return f"{result['bits']:.4f} bits per byte ({each})"


def _beats_dense(answer: Answer, rng: Random) -> str:
    result = _result(answer, rng)
    text = (
        f"{_measured(result)} after {result['steps']:,} steps; at most {capstone.BAR:.3f} is asked for, the best dense "
        f"model has {capstone.DENSE_BITS:.3f}"
    )
    if not result["bits"] <= capstone.BAR:
        raise Failure(text)
    return text


def _is_balanced(answer: Answer, rng: Random) -> str:
    result = _result(answer, rng)
    violation, dead = capstone.uneven(result)
    busiest = [max(layer) / sum(layer) * len(layer) - 1 for layer in result["counts"]]
    text = f"max violation by layer {', '.join(f'{v:.2f}' for v in busiest)}; dead experts: {dead}"
    if dead or not violation <= MOST_VIOLATION:
        raise Failure(f"{text}; at most {MOST_VIOLATION:.2f} and none are asked for")
    return text


def _is_honest(answer: Answer, rng: Random) -> str:
    claimed = _claimed(answer)["held_out_bits"]
    measured = _result(answer, rng)["bits"]
    text = f"claimed {claimed:.4f}, measured {measured:.4f}"
    if not abs(claimed - measured) <= WITHIN * measured:
        raise Failure(f"{text}: further apart than {WITHIN:.0%}")
    return text


_EQUIVALENCE = "book/math/compute_equivalence"
_COLLAPSE = "book/balancing/losses"
_ROOFLINE = "book/bandwidth/roofline"

Test = Callable[[Answer, Random], str | None]

EXERCISE = Exercise(
    number="07",
    topic="capstone",
    title="The capstone",
    next_step="all of exercise 07 is done; its hand-graded question is the last cell",
    questions=(
        Question(
            "07.1",
            "What a design stores and uses",
            "parameters",
            1,
            15,
            "book/concepts/two_bets",
            (
                Invariant(
                    "counts all weights that are stored, and those that a byte meets",
                    2,
                    _counts_sparse,
                    "Matrix by matrix: embedding and head 256·D each, four D x D of attention, two norms of D a layer "
                    "and one at the end, the router D·E, three D x F an expert. Used: k experts, no embedding.",
                ),
                Invariant(
                    "takes a dense design for what it is",
                    1,
                    _counts_dense,
                    "With one expert there is nothing to choose from, so no router is stored.",
                ),
            ),
        ),
        Question(
            "07.2",
            "What a budget buys",
            "steps_within",
            2,
            15,
            _EQUIVALENCE,
            (
                Invariant(
                    "is the number of whole steps that the FLOPs pay for",
                    2,
                    _steps_of_flops,
                    "A byte costs 6 FLOPs for each weight that it meets, and 12·L·D·S in attention; a step has "
                    "batch·context bytes; a step that is paid for in part is none.",
                ),
                Invariant(
                    "ends where the text does",
                    1,
                    _steps_of_text,
                    "The last byte of a text is predicted, never read: (text - 1) // context windows. In every pass "
                    "the windows that do not fill a batch are left out.",
                ),
                Invariant(
                    "is exact, however large the budget",
                    1,
                    _steps_exactly,
                    "A float holds 53 bits: divide integers with //, and never through a float.",
                ),
            ),
        ),
        Question(
            "07.3",
            "A schedule that is data",
            "learning_rate",
            1,
            10,
            _EQUIVALENCE,
            (
                Invariant(
                    "reads the rate off straight lines between the points",
                    2,
                    _rates,
                    "Step i of n stands at (i + 1) / n. Find the two points around it; the nearer one weighs more.",
                ),
                Invariant(
                    "is right at the corners, at the first step and the last",
                    1,
                    _rate_corners,
                    "At a point itself the rate is that of the point; the last step stands at 1, not before it.",
                ),
            ),
        ),
        Question(
            "07.4",
            "Better, or lucky?",
            "choose",
            2,
            20,
            _EQUIVALENCE,
            (
                Invariant(
                    "takes the largest gain that is no luck, within the limits",
                    3,
                    _chooses,
                    "Differences seed by seed, on the seeds that both have; their mean against three times their "
                    "standard deviation (n - 1) over the root of n; what is over a limit, has dead experts, fewer than "
                    "three seeds or an infinite loss is out, whatever it gains.",
                ),
                Invariant(
                    "stays with the dense model where nothing is sure, and takes the first of equals",
                    1,
                    _chooses_dense,
                    "Start from 'dense' with a gain of 0, and replace it by a larger one alone. Limits can be met.",
                ),
            ),
        ),
        Question(
            "07.5",
            "The design",
            "recipe",
            3,
            120,
            _EQUIVALENCE,
            (
                Invariant(
                    "is a sparse model within FLOPs and memory",
                    3,
                    _is_sparse_and_within,
                    "steps_within says how many steps a design can have; 16 bytes of training state lie behind every "
                    "stored weight.",
                ),
                Invariant(
                    "decodes in time, alone and in a batch of 64",
                    2,
                    _decodes_in_time,
                    f"See {_ROOFLINE}: alone, a byte reads what it uses; in a batch nearly every expert is read.",
                ),
                Invariant(
                    "gives reasons whose numbers are its own",
                    3,
                    _claims_hold,
                    "Compute every number from the design that you hand in: a late change makes old claims false.",
                ),
                Invariant(
                    "trained again, it is better than the best dense model of as many FLOPs",
                    5,
                    _beats_dense,
                    "Same FLOPs, more bytes or more weights? Compare designs with one change each, on two seeds; try "
                    "the learning rate first, then how many experts there are and how fine.",
                ),
                Invariant(
                    "keeps every expert of every layer busy",
                    2,
                    _is_balanced,
                    f"See {_COLLAPSE}: a loss of too little weight, or a bias of too small a step, lets a router lean.",
                ),
                Invariant(
                    "and its loss is what it says",
                    1,
                    _is_honest,
                    "held_out_bits is what capstone.compare prints for a quarter of the steps: the mean of your seeds.",
                ),
            ),
            slow=True,
        ),
    ),
)
