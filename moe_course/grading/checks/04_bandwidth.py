"""Checks of exercise 04: time of a step, experts that a batch reads, crossovers, memory, four bits, splits, placement.

The oracles here are loops in plain Python, and fractions where something just fits; they do not call moe_course.costs.
Most cases are drawn again until none of the usual mistakes comes out right on them: a table of mistakes serves for
that, and for saying which of them a learner has made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from functools import partial
from itertools import combinations
from random import Random
from typing import Any

import torch
from torch import Tensor

from moe_course.grading.core import (
    Answer,
    Exercise,
    Failure,
    Invariant,
    Question,
    describe,
    mismatch,
    same,
    shown,
)
from moe_course.grading.tensors import compare

Mistakes = dict[str, Callable[..., Any]]

ROUNDING = 1e-9  # relative
APART = 1e-3  # what a case must make of a mistake, relative


def _near(got: Any, want: Any, tolerance: float) -> bool:
    if isinstance(want, float):
        return abs(got - want) <= tolerance * abs(want)
    return bool(got == want)


def _drawn(
    draw: Callable[[], dict[str, Any]],
    right: Callable[..., Any],
    wrong: Iterable[Callable[..., Any]],
) -> dict[str, Any]:
    """A case on which none of the mistakes comes out right."""
    mistakes = list(wrong)
    while True:
        case = draw()
        want = right(**case)
        if not any(_near(mistake(**case), want, APART) for mistake in mistakes):
            return case


def _named(got: Any, case: dict[str, Any], mistakes: Mistakes) -> str:
    """Which mistake gives this value, if any does."""
    for text, mistake in mistakes.items():
        if _near(mistake(**case), got, ROUNDING):
            return f"\n    that is {text}"
    return ""


def _expect_float(
    got: Any, want: float, case: dict[str, Any], mistakes: Mistakes, what: str = ""
) -> None:
    """A plain Python number within rounding of `want`; `what` says which of several results it is."""
    about = describe(**case) + what
    if type(got) not in (int, float):
        kind = "" if got is None else "; return a plain Python number: float(...)"
        raise Failure(
            f"{about}:\n    expected a number, got {shown(got)}{kind}", hint=False
        )
    if not abs(got - want) <= ROUNDING * abs(want):
        text = f"{about}:\n    expected {want:.10g}, got {got:.10g}"
        if _near(got, want, 1e-5):
            nearly = "nearly: float32 rounds in the seventh digit, compute in float64"
            raise Failure(f"{text}\n    {nearly}", hint=False)
        raise Failure(text + _named(float(got), case, mistakes))


def _several(
    got: Any, number: int, case: dict[str, Any], names: str
) -> tuple[Any, ...]:
    if not isinstance(got, tuple | list) or len(got) != number:
        came = f"{len(got)} results" if isinstance(got, tuple | list) else shown(got)
        raise Failure(f"{describe(**case)}:\n    expected {names}, got {came}", hint=False)  # fmt: skip
    return tuple(got)


# 04.1

Kernels = list[tuple[float, float]]


def _step(**case: Any) -> tuple[float, str]:
    spent = _spent(**case)
    return sum(spent.values()), _largest(spent)


def _spent(
    kernels: Kernels, tflops: float, gb_s: float, launch_us: float
) -> dict[str, float]:
    spent = {"memory": 0.0, "compute": 0.0, "launch": 0.0}
    for compute, memory in _times(kernels, tflops, gb_s):
        spent["compute" if compute > memory else "memory"] += max(compute, memory)
        spent["launch"] += launch_us * 1e-6
    return spent


def _times(
    kernels: Kernels, tflops: float, gb_s: float, tera: float = 1e12, giga: float = 1e9
) -> list[tuple[float, float]]:
    return [(f / (tflops * tera), b / (gb_s * giga)) for f, b in kernels]


def _longer(compute: float, memory: float, launch: float) -> float:
    return launch + max(compute, memory)


def _seconds(
    each: Callable[[float, float, float], float] = _longer, **units: float
) -> Callable[..., float]:
    """The time of a step by another rule for each kernel, or in other units."""

    def step(kernels: Kernels, tflops: float, gb_s: float, launch_us: float) -> float:
        launch = launch_us * 1e-6
        return sum(each(*t, launch) for t in _times(kernels, tflops, gb_s, **units))

    return step


def _whole_roofline(
    kernels: Kernels, tflops: float, gb_s: float, launch_us: float
) -> float:
    compute, memory = map(sum, zip(*_times(kernels, tflops, gb_s), strict=True))
    return max(compute, memory) + len(kernels) * launch_us * 1e-6


def _launched_once(
    kernels: Kernels, tflops: float, gb_s: float, launch_us: float
) -> float:
    return _seconds()(kernels, tflops, gb_s, 0) + launch_us * 1e-6


STEP_MISTAKES: Mistakes = {
    "the longer of all arithmetic and all traffic; take the longer kernel by kernel, then add": _whole_roofline,
    "arithmetic and traffic added up; within a kernel they overlap, so the longer counts": _seconds(
        lambda c, m, launch: launch + c + m
    ),
    "the shorter of the two": _seconds(lambda c, m, launch: launch + min(c, m)),
    "arithmetic alone": _seconds(lambda c, m, launch: launch + c),
    "traffic alone": _seconds(lambda c, m, launch: launch + m),
    "without launching": _seconds(lambda c, m, _: max(c, m)),
    "with a single launch; every kernel has one": _launched_once,
    "with launching hidden behind the work; nothing else happens in that time": _seconds(
        lambda c, m, launch: max(c, m, launch)
    ),
    "in GiB/s; a data sheet's GB are 10^9 bytes": _seconds(giga=2.0**30),
    "with a tera of 2^40; a data sheet's is 10^12": _seconds(tera=2.0**40),
    "with binary units; a data sheet's are powers of ten": _seconds(
        tera=2.0**40, giga=2.0**30
    ),
    "in microseconds; return seconds": lambda **case: 1e6 * _step(**case)[0],
    "in milliseconds; return seconds": lambda **case: 1e3 * _step(**case)[0],
}


def _step_case(rng: Random, kernels: int = 0) -> dict[str, Any]:
    tflops, gb_s = rng.choice([121, 312, 989.4]), rng.choice([300, 1555, 2039, 3350])
    longest = 1e-6 * rng.choice([20, 50, 100])
    drawn = [
        (
            math.floor(tflops * 1e12 * longest * rng.random() ** 3),
            math.floor(gb_s * 1e9 * longest * rng.random() ** 3),
        )
        for _ in range(kernels or rng.randint(3, 7))
    ]
    return {
        "kernels": drawn,
        "tflops": tflops,
        "gb_s": gb_s,
        "launch_us": rng.choice([2, 4.5, 8, 12]),
    }


def _step_pair(got: Any, case: dict[str, Any]) -> tuple[Any, ...]:
    return _several(got, 2, case, "the pair (seconds, what they went into)")


def _step_seconds(answer: Answer, rng: Random) -> None:
    by_hand: dict[str, Any] = {
        "kernels": [(2e9, 4e6), (1e8, 3e7)],
        "tflops": 100,
        "gb_s": 1000,
        "launch_us": 10,
    }
    cases = [by_hand]
    for number in (2, 3, 5, 8):
        draw = partial(_step_case, rng, number)
        cases.append(_drawn(draw, _seconds(), STEP_MISTAKES.values()))
    # Layers are alike: the same kernels come again.
    cases.append(cases[1] | {"kernels": 2 * cases[1]["kernels"]})
    for case in cases:
        got, _ = _step_pair(answer(**case), case)
        _expect_float(got, _step(**case)[0], case, STEP_MISTAKES)


def _largest(spent: dict[str, float]) -> str:
    return max(spent, key=lambda what: spent[what])


def _bound_of_sums(**case: Any) -> str:
    times = _times(case["kernels"], case["tflops"], case["gb_s"])
    compute, memory = map(sum, zip(*times, strict=True))
    launch = len(times) * case["launch_us"] * 1e-6
    return _largest({"memory": memory, "compute": compute, "launch": launch})


def _bound_by_number(**case: Any) -> str:
    times = _times(case["kernels"], case["tflops"], case["gb_s"])
    compute = sum(c > m for c, m in times)
    return "compute" if compute > len(times) / 2 else "memory"


def _bound_of_longest(**case: Any) -> str:
    times = _times(case["kernels"], case["tflops"], case["gb_s"])
    compute, memory = max(times, key=max)
    return "compute" if compute > memory else "memory"


def _bound_of_one_launch(**case: Any) -> str:
    return _largest(_spent(**case) | {"launch": case["launch_us"] * 1e-6})


def _bound_by_majority(**case: Any) -> str:
    spent = _spent(**case)
    if 2 * spent["launch"] <= sum(spent.values()):
        spent["launch"] = 0.0
    return _largest(spent)


def _clear(**case: Any) -> bool:
    """Whether no rounding could make another answer of it."""
    *_, second, first = sorted(_spent(**case).values())
    return first > 1.01 * second


BOUND_MISTAKES = (
    *(_bound_of_sums, _bound_by_number, _bound_of_longest),
    *(_bound_of_one_launch, _bound_by_majority),
)


def _step_bound(answer: Answer, rng: Random) -> None:
    cases: list[dict[str, Any]] = []

    def draw_until(fits: Callable[..., bool]) -> None:
        case = _step_case(rng)
        while not (_clear(**case) and fits(**case)):
            case = _step_case(rng)
        cases.append(case)

    # A case for each word, and one on which each other rule fails.
    for word in ("memory", "compute", "launch"):
        draw_until(lambda w=word, **c: _step(**c)[1] == w)
    for rule in BOUND_MISTAKES:
        draw_until(lambda r=rule, **c: _step(**c)[1] != r(**c))
    for _ in range(30):
        draw_until(lambda **_: True)
    plain = {"tflops": 1, "gb_s": 1000, "launch_us": 0}  # both rates are 10^12
    # Ties: of a kernel, which is memory's then; and of the whole.
    cases += [
        plain | {"kernels": [(4e6, 4e6), (3e6, 1e6)]},
        plain | {"kernels": [(4e6, 1e6), (1e6, 4e6)]},
        plain | {"kernels": [(0, 5e6), (1e6, 0)], "launch_us": 1},
        {"kernels": [], "tflops": 312, "gb_s": 2039, "launch_us": 5},
    ]
    for case in cases:
        got, bound = _step_pair(answer(**case), case)
        want = _step(**case)
        _expect_float(got, want[0], case, STEP_MISTAKES if case["kernels"] else {})
        if not same(bound, want[1]):
            raise mismatch(bound, want[1], f"{describe(**case)}, where most of it goes")


# 04.2

Shares = list[list[float]]


def _distinct(shares: Shares, tokens: list[int], k: int) -> float:
    expected = 0.0
    for e in range(len(shares[0])):
        missed = 1.0
        for row, count in zip(shares, tokens, strict=True):
            for _ in range(count):
                missed *= max(0.0, 1 - k * row[e])
        expected += 1 - missed
    return expected


def _one_domain(shares: Shares, tokens: list[int], k: int) -> float:
    """By the popularity in all domains together."""
    total, pooled = sum(tokens), []
    for column in zip(*shares, strict=True):
        pooled.append(sum(n * s for n, s in zip(tokens, column, strict=True)) / total)
    return _distinct([pooled], [total], k)


def _by_domain(shares: Shares, tokens: list[int], k: int) -> list[float]:
    return [_distinct([row], [n], k) for row, n in zip(shares, tokens, strict=True)]


def _with_repeats(shares: Shares, tokens: list[int], k: int) -> float:
    return _distinct(shares, [k * n for n in tokens], 1)


def _one_choice(shares: Shares, tokens: list[int], k: int) -> float:
    return _distinct(shares, tokens, 1)


def _evenly(shares: Shares, tokens: list[int], k: int) -> float:
    experts = len(shares[0])
    return _distinct([[1 / experts] * experts], [sum(tokens)], k)


def _assignments(shares: Shares, tokens: list[int], k: int) -> float:
    return float(k * sum(tokens))


def _at_most_all(shares: Shares, tokens: list[int], k: int) -> float:
    return float(min(k * sum(tokens), len(shares[0])))


def _unread(shares: Shares, tokens: list[int], k: int) -> float:
    return len(shares[0]) - _distinct(shares, tokens, k)


ONE_DOMAIN_MISTAKES: Mistakes = {
    "the number of assignments; tokens share experts": _assignments,
    "the number of assignments, up to all experts; tokens share some before that": _at_most_all,
    "what tokens that choose an expert twice would read; a token's k experts differ": _with_repeats,
    "what one choice of each token reads; it has an expert with chance k · share": _one_choice,
    "what evenly popular experts would give; look at the shares": _evenly,
    "how many are not read": _unread,
}
DISTINCT_MISTAKES: Mistakes = ONE_DOMAIN_MISTAKES | {
    "by the shares of all domains together; chances to be missed multiply, domain by domain": _one_domain,
    "the sum over domains; an expert that two of them have is read once": lambda **c: (
        sum(_by_domain(**c))
    ),
    "the most of any domain": lambda **c: max(_by_domain(**c)),
}


def _share_row(rng: Random, experts: int, k: int) -> list[float]:
    """Shares of a log of so many tokens, with a few favourites."""
    weights = [rng.random() ** 3 + 0.02 for _ in range(experts)]
    logged = rng.randint(5, 40)
    counts = [0] * experts
    for _ in range(logged):
        # Of all orders by weighted draws, the first k.
        order = sorted(range(experts), key=lambda e: rng.random() ** (1 / weights[e]))
        for e in order[-k:]:
            counts[e] += 1
    return [count / (logged * k) for count in counts]


def _share_case(rng: Random, domains: int, experts: int, k: int) -> dict[str, Any]:
    def row() -> list[float]:
        drawn = _share_row(rng, experts, k)
        while k * max(drawn) > 0.99:  # an expert that every token has is an edge
            drawn = _share_row(rng, experts, k)
        return drawn

    return {
        "shares": [row() for _ in range(domains)],
        "tokens": [rng.randint(1, 9) for _ in range(domains)],
        "k": k,
    }


def _distinct_values(answer: Answer, rng: Random) -> None:
    even: dict[str, Any] = {"shares": [[0.25] * 4], "tokens": [3], "k": 2}
    cases = [even]
    for domains, experts, k in ((1, 4, 2), (1, 8, 3), (2, 4, 2), (2, 6, 2), (3, 12, 4), (4, 9, 3)):  # fmt: skip
        wrong = DISTINCT_MISTAKES if domains > 1 else ONE_DOMAIN_MISTAKES
        cases.append(
            _drawn(
                partial(_share_case, rng, domains, experts, k),
                _distinct,
                wrong.values(),
            )
        )
    for case in cases:
        _expect_float(answer(**case), _distinct(**case), case, DISTINCT_MISTAKES)


def _distinct_limits(answer: Answer, rng: Random) -> None:
    third = 1 / 3
    cases: list[dict[str, Any]] = [
        {"shares": [[0.5, 0.25, 0.25]], "tokens": [0], "k": 2},
        # Every token has expert 0, nobody has expert 3.
        {"shares": [[0.5, 0.25, 0.25, 0.0]], "tokens": [1], "k": 2},
        {"shares": [[0.5, 0.25, 0.25, 0.0]], "tokens": [0], "k": 2},
        {"shares": [[third] * 3], "tokens": [2], "k": 3},
        {"shares": [[1.0]], "tokens": [7], "k": 1},
        {"shares": [[0.7, 0.3]], "tokens": [1], "k": 1},
        {"shares": [[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]], "tokens": [0, 4], "k": 2},
        {"shares": [[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]], "tokens": [1, 1], "k": 2},
        # One token reads k experts, however popular they are.
        _share_case(rng, 1, 7, 3) | {"tokens": [1]},
        _share_case(rng, 2, 40, 1) | {"tokens": [300, 0]},
        _share_case(rng, 3, 24, 5) | {"tokens": [0, 0, 0]},
        _share_case(rng, 1, 16, 2) | {"tokens": [5000]},
    ]
    for case in cases:
        got, want = answer(**case), _distinct(**case)
        if want == 0 and type(got) in (int, float) and abs(got) < ROUNDING:
            continue
        _expect_float(got, want, case, {})


# 04.3

Model = dict[str, float]


def _gathered(model: Model, batch: int) -> float:
    """Expected bytes of the distinct experts."""
    if not model["experts"]:
        return 0.0
    missed = (1 - model["k"] / model["experts"]) ** batch
    return model["expert_bytes"] * model["experts"] * (1 - missed)


def _slots(model: Model, batch: int) -> float:
    return model["expert_bytes"] * min(batch * model["k"], model["experts"])


def _stored(model: Model, batch: int) -> float:
    return model["expert_bytes"] * model["experts"]


def _of_one(model: Model, batch: int) -> float:
    return model["expert_bytes"] * model["k"]


def _every_slot(model: Model, batch: int) -> float:
    return model["expert_bytes"] * batch * model["k"]


def _drawn_twice(model: Model, batch: int) -> float:
    if not model["experts"]:
        return 0.0
    missed = (1 - 1 / model["experts"]) ** (model["k"] * batch)
    return model["expert_bytes"] * model["experts"] * (1 - missed)


Gather = Callable[[Model, int], float]


def _leading(
    a: Model,
    b: Model,
    bandwidth: float,
    flop_rate: float,
    most: int,
    gathered: Gather = _gathered,
    both: Callable[[float, float], float] = max,
    cached: int = 1,
    computed: int = 1,
) -> list[tuple[int, str]]:
    """By a time for each batch; `cached` and `computed` are 0 where only one sequence caches, or computes."""

    def seconds(model: Model, batch: int) -> float:
        caches = batch if cached else 1
        read = model["fixed_bytes"] + caches * model["cache_bytes"]
        read += gathered(model, batch)
        work = (batch if computed else 1) * model["flops"]
        return both(read / bandwidth, work / flop_rate)

    found: list[tuple[int, str]] = []
    for batch in range(1, most + 1):
        of_a, of_b = seconds(a, batch), seconds(b, batch)
        if not found:
            found.append((1, "a" if of_a <= of_b else "b"))
        elif of_a < of_b and found[-1][1] == "b":
            found.append((batch, "a"))
        elif of_b < of_a and found[-1][1] == "a":
            found.append((batch, "b"))
    return found


def _by(**other: Any) -> Callable[..., Any]:
    return lambda **case: _leading(**case, **other)


LEADING_MISTAKES: Mistakes = {
    "so when all stored experts are read; read those that some token has": _by(gathered=_stored),
    "so when a batch reads the experts of one token": _by(gathered=_of_one),
    "so when B·k experts are read, up to all; tokens share some before": _by(gathered=_slots),
    "so when each token reads experts of its own; they share them": _by(gathered=_every_slot),
    "so when a token chooses an expert twice; its k experts differ": _by(gathered=_drawn_twice),
    "so when both times are added up; the longer counts": _by(both=lambda m, c: m + c),
    "so when nothing but bytes counts": _by(both=lambda m, c: m),
    "so when nothing but FLOPs count": _by(both=lambda m, c: c),
    "so when one sequence's cache is read; each has its own": _by(cached=0),
    "so when one sequence computes; each does": _by(computed=0),
}  # fmt: skip


def _firm(a: Model, b: Model, bandwidth: float, flop_rate: float, most: int) -> bool:
    """Whether rounding can change nothing: both times differ by more than a millionth, or are the same product."""
    for batch in range(1, most + 1):
        times, terms = [], []
        for model in (a, b):
            read = model["fixed_bytes"] + _gathered(model, batch)
            read += batch * model["cache_bytes"]
            compute = batch * model["flops"] / flop_rate
            times.append(max(read / bandwidth, compute))
            bound = compute > 1.000001 * read / bandwidth
            terms.append(model["flops"] if bound else None)
        close = abs(times[0] - times[1]) <= 1e-6 * times[0]
        if close and (terms[0] is None or terms[0] != terms[1]):
            return False
    return True


def _dense(weights: float, cache: float) -> Model:
    return {
        "fixed_bytes": 2 * weights,
        "experts": 0,
        "k": 0,
        "expert_bytes": 0,
        "cache_bytes": cache,
        "flops": 2 * weights,
    }


def _sparse(rng: Random, experts: int, k: int, cache: float) -> Model:
    fixed, one = rng.randint(1, 4) * 10**8, rng.randint(2, 20) * 10**8 // k
    return {
        "fixed_bytes": 2 * fixed,
        "experts": experts,
        "k": k,
        "expert_bytes": 2 * one,
        "cache_bytes": cache,
        "flops": 2 * (fixed + k * one),
    }


def _rates(rng: Random) -> dict[str, Any]:
    """Batches of some tens make a dense model compute-bound here, so that nobody needs to look at thousands."""
    bandwidth = rng.choice([3e11, 1e12, 2e12])
    return {"bandwidth": bandwidth, "flop_rate": bandwidth * rng.randint(20, 60)}


def _three_regimes(
    rng: Random, experts: int = 0, k: int = 1, share: float = 0.0
) -> dict[str, Any]:
    """A sparse model against a dense one whose size lies between its active and its total, at that share of the way."""
    cache = rng.choice([0, 0, 10**6, 2 * 10**6])
    if not experts:
        experts, k = rng.choice([(4, 1), (8, 2), (16, 4), (32, 3)])
    sparse = _sparse(rng, experts, k, cache)
    stored = sparse["fixed_bytes"] + sparse["experts"] * sparse["expert_bytes"]
    share = share or rng.uniform(0.2, 0.9)
    weights = int(share * stored + (1 - share) * sparse["flops"]) // 2
    pair = [sparse, _dense(weights, rng.choice([1, 2]) * cache)]
    rng.shuffle(pair)
    return {"a": pair[0], "b": pair[1], **_rates(rng), "most": rng.randint(90, 160)}


def _two_sparse(rng: Random) -> dict[str, Any]:
    """Few large experts against many small ones."""
    pair = [_sparse(rng, 8, 2, 0), _sparse(rng, rng.choice([32, 64]), 6, 0)]
    for key in ("fixed_bytes", "flops"):
        pair[1][key] *= rng.choice([0.5, 1.5, 2.5])
    rng.shuffle(pair)
    return {"a": pair[0], "b": pair[1], **_rates(rng), "most": rng.randint(60, 120)}


def _same_experts(**case: Any) -> list[tuple[int, str]]:
    """Both with the experts of a."""
    both = {key: case["a"][key] for key in ("experts", "k")}
    return _leading(**case | {"b": case["b"] | both})


def _changing(
    draw: Callable[[], dict[str, Any]],
    least: int,
    mistake: Callable[..., Any] | None = None,
) -> dict[str, Any]:
    """A case with so many leaders at least, on which the mistake comes out wrong."""
    while True:
        case = draw()
        right = _leading(**case)
        longer = _leading(**case | {"most": case["most"] + 1})
        if len(right) < least or longer != right or right[-1][0] == case["most"]:
            continue
        if mistake and mistake(**case) == right:
            continue
        if _firm(**case):
            return case


def _expect_leaders(answer: Answer, case: dict[str, Any]) -> None:
    want, got = _leading(**case), answer(**case)
    if isinstance(got, tuple | list):
        got = [tuple(e) if isinstance(e, list) else e for e in got]
        right = len(got) == len(want) and all(map(same, got, want))
    else:
        right = False
    if not right:
        text = f"{describe(**case)}:\n    expected {shown(want)}, got {shown(got)}"
        if got == want:
            raise Failure(f"{text} (return plain ints and strings)", hint=False)
        named = _named(got, case, LEADING_MISTAKES) if type(got) is list else ""
        raise Failure(text + named)


def _leaders_change(answer: Answer, rng: Random) -> None:
    draw = partial(_three_regimes, rng)
    cases = [_changing(draw, 3) for _ in range(3)]
    # For each mistake a case on which it comes out wrong: on some it does not matter.
    for mistake in LEADING_MISTAKES.values():
        if all(mistake(**case) == _leading(**case) for case in cases):
            cases.append(_changing(draw, 2, mistake))
    cases.append(_changing(partial(_two_sparse, rng), 2, _same_experts))
    for case in sorted(cases, key=lambda case: case["most"]):
        _expect_leaders(answer, case)


# Where one might look for a change, if there were but one between two neighbours.
GRID = {round(2 ** (i / 8)) for i in range(80)}


def _short_lead(rng: Random) -> dict[str, Any]:
    """The dense model leads for two batches or so: memory lets it pass, arithmetic holds it back."""
    while True:
        case = _three_regimes(rng, 64, rng.randint(1, 2), rng.uniform(0.5, 0.7))
        found = _leading(**case | {"flop_rate": 1e30})
        if len(found) < 2:
            continue
        at = found[1][0] + 1
        sparse, dense = sorted((case["a"], case["b"]), key=lambda m: -m["experts"])
        read = sparse["fixed_bytes"] + at * sparse["cache_bytes"]
        read += _gathered(sparse, at)
        case["flop_rate"] = case["bandwidth"] * (at + 0.5) * dense["flops"] / read
        case["most"] = at + rng.randint(20, 80)
        found = _leading(**case)
        if len(found) == 3 and not GRID & set(range(found[1][0], found[2][0])):
            return case


def _four_leaders(rng: Random) -> dict[str, Any]:
    """Caches of the dense model grow until the sparse one leads again, and its FLOPs until it does not."""
    unit = rng.randint(10**8, 10**9)
    sparse = _sparse(rng, 8, 2, 0)
    sparse |= {"fixed_bytes": 4 * unit, "expert_bytes": 7 * unit, "flops": 2 * unit}
    dense = _dense(rng.randint(38 * unit, 42 * unit) // 2, unit) | {"flops": unit}
    pair = [sparse, dense]
    rng.shuffle(pair)
    rates = {"bandwidth": 1e12, "flop_rate": 1e12, "most": rng.randint(60, 90)}
    return {"a": pair[0], "b": pair[1], **rates}


def _leaders_short(answer: Answer, rng: Random) -> None:
    for _ in range(3):
        _expect_leaders(answer, _changing(partial(_short_lead, rng), 3))

    _expect_leaders(answer, _changing(partial(_four_leaders, rng), 4))

    def cached() -> dict[str, Any]:
        case = _three_regimes(rng)
        for model in (case["a"], case["b"]):
            model["cache_bytes"] = rng.randint(0, 40) * 10**6
        return case

    _expect_leaders(answer, _changing(cached, 2, _by(cached=0)))
    # Mixtral against 30 billion dense weights, on an A100: 243 sequences and more.
    mixtral = {
        "fixed_bytes": 3.2e9,
        "experts": 8,
        "k": 2,
        "expert_bytes": 11.27e9,
        "cache_bytes": 0,
        "flops": 25.5e9,
    }
    rates = {"bandwidth": 2.039e12, "flop_rate": 312e12, "most": 400}
    _expect_leaders(answer, {"a": mixtral, "b": _dense(30e9, 0), **rates})


def _leaders_limits(answer: Answer, rng: Random) -> None:
    rates = _rates(rng)
    dense, large = _dense(10**9, 0), _dense(10**9 + 1000, 0)
    sparse = _sparse(rng, 8, 2, 0)
    # As many FLOPs as the sparse one: from some batch on, a tie that changes nothing.
    twin = _dense(sparse["flops"] // 2, 0)
    twin["fixed_bytes"] += 2**20
    all_experts = sparse | {"k": 8, "flops": 20 * 10**9}
    # Fewer bytes, more FLOPs; it is caught up at one batch exactly, and passed at the next.
    lean = dense | {"fixed_bytes": 10**9, "flops": 2**31}
    even = dense | {"fixed_bytes": 2**35, "flops": 2**30}
    exact = {"bandwidth": 2.0**40, "flop_rate": 2.0**40}
    idle = dense | {"fixed_bytes": 0, "cache_bytes": 2**20, "flops": 1}
    slow = idle | {"fixed_bytes": 2**25, "cache_bytes": 0}
    cases = [
        {"a": dense, "b": dense, **rates, "most": 5},
        {"a": large, "b": dense, **rates, "most": 3},
        {"a": dense, "b": large, **rates, "most": 1},
        {"a": twin, "b": sparse, **rates, "most": 200},
        {"a": sparse, "b": twin, **rates, "most": 200},
        {"a": all_experts, "b": dense, **rates, "most": 4},
        {"a": dense, "b": all_experts, **rates, "most": 4},
        # At batch 16 both take 2^35 / 2^40 s: the lead stays, and changes at 17.
        {"a": lean, "b": even, **exact, "most": 40},
        {"a": even, "b": lean, **exact, "most": 40},
        {"a": even, "b": lean, **exact, "most": 17},
        {"a": even, "b": lean, **exact, "most": 16},
        # B · 2^20 bytes against 2^25: a tie at 32.
        {"a": idle, "b": slow, **exact, "most": 33},
        {"a": idle, "b": slow, **exact, "most": 32},
    ]  # fmt: skip
    for case in cases:
        _expect_leaders(answer, case)


# 04.4


def _room(
    attention: dict[str, Any],
    layers: int,
    windowed: int,
    window: int,
    context: int,
    params: int,
    weight_bits: float,
    cache_bits: int,
    devices: int,
    device_gb: int,
    reserve_gib: int,
    *,
    giga: int = 10**9,
    gibi: int = 2**30,
    reserves: int | None = None,
    rounded: Callable[[Fraction], int] = math.floor,
    bits_in_a_byte: tuple[int, int] = (8, 8),
    numbers: Callable[[dict[str, Any]], int] | None = None,
    kept: Callable[[int, int, int, int], int] | None = None,
) -> int:
    """The keywords are what the mistakes get wrong."""
    of_layer = (numbers or _cached_numbers)(attention)
    tokens = (kept or _kept_tokens)(layers, windowed, window, context)
    each = Fraction(of_layer * tokens * cache_bits, bits_in_a_byte[1])
    stored = params * Fraction(weight_bits) / bits_in_a_byte[0]
    free = devices * device_gb * giga - stored
    free -= (devices if reserves is None else reserves) * reserve_gib * gibi
    return max(0, rounded(free / each))


def _cached_numbers(attention: dict[str, Any]) -> int:
    if attention["kind"] == "mla":
        return int(attention["kv_rank"] + attention["rope_dim"])
    return sum(2 * attention["head_dim"] for _ in range(attention["kv_heads"]))


def _kept_tokens(layers: int, windowed: int, window: int, context: int) -> int:
    whole = [context] * (layers - windowed)
    return sum(whole + [min(context, window)] * windowed)


def _but(**other: Any) -> Callable[..., int]:
    return lambda **case: _room(**case, **other)


ROOM_MISTAKES: Mistakes = {
    "with GiB for the GB of the device": _but(giga=2**30),
    "with GB for the GiB of the reserve": _but(gibi=10**9),
    "with GB and GiB exchanged": _but(giga=2**30, gibi=10**9),
    "with one reserve for all devices; each keeps its own": _but(reserves=1),
    "without the reserve": _but(reserves=0),
    "with the weights on every device; they are split": lambda **c: _room(
        **c | {"params": c["params"] * c["devices"]}),
    "with one device": lambda **c: _room(**c | {"devices": 1}),
    "with bits for bytes in the weights": _but(bits_in_a_byte=(1, 8)),
    "with bits for bytes in the cache": _but(bits_in_a_byte=(8, 1)),
    "with 2 bytes for a cached number": lambda **c: _room(**c | {"cache_bits": 16}),
    "rounded up; a part of a sequence does not fit": _but(rounded=math.ceil),
    "rounded to the nearest; a part of a sequence does not fit": _but(rounded=round),
    "with whole bits": lambda **c: _room(**c | {"weight_bits": int(c["weight_bits"])}),
    "without the windows": _but(kept=lambda la, w, n, c: la * c),
    "with windows in all layers": _but(kept=lambda la, w, n, c: la * min(c, n)),
    "with windows in the other layers": _but(
        kept=lambda la, w, n, c: w * c + (la - w) * min(c, n)),
    "without the cache of the windowed layers": _but(kept=lambda la, w, n, c: (la - w) * c),
    "with the cache of one layer": _but(kept=lambda la, w, n, c: c),
}  # fmt: skip
GQA_MISTAKES: Mistakes = ROOM_MISTAKES | {
    "without the factor 2 for key and value": _but(numbers=lambda a: a["kv_heads"] * a["head_dim"]),
    "with the query heads; only key-value heads are cached": _but(numbers=lambda a: 2 * a["heads"] * a["head_dim"]),
    "with the query heads, and without the factor 2": _but(numbers=lambda a: a["heads"] * a["head_dim"]),
    "without the head dimension": _but(numbers=lambda a: 2 * a["kv_heads"]),
}  # fmt: skip
MLA_MISTAKES: Mistakes = ROOM_MISTAKES | {
    "with a factor 2; keys and values come from one latent": _but(numbers=lambda a: 2 * (a["kv_rank"] + a["rope_dim"])),
    "with two latents; keys and values come from one": _but(numbers=lambda a: 2 * a["kv_rank"] + a["rope_dim"]),
    "without the rotary key": _but(numbers=lambda a: a["kv_rank"]),
    "with a rotary key for each head; they share one": _but(
        numbers=lambda a: a["kv_rank"] + a["heads"] * a["rope_dim"]),
    "with a latent for each head; they share one": _but(numbers=lambda a: a["heads"] * (a["kv_rank"] + a["rope_dim"])),
    "with keys and values of all heads; they are made from the latent, and not kept": _but(
        numbers=lambda a: 2 * a["heads"] * a["head_dim"]),
}  # fmt: skip


def _machine(rng: Random) -> dict[str, Any]:
    layers = rng.randint(20, 70)
    return {
        "layers": layers,
        "windowed": rng.randint(layers // 4, 3 * layers // 4),
        "window": rng.choice([128, 512, 1024]),
        "context": rng.randint(1500, 20000),
        "params": rng.randint(5 * 10**9, 7 * 10**10),
        "weight_bits": rng.choice([4.25, 4.5, 8.25]),
        "cache_bits": 8,
        "devices": rng.randint(2, 8),
        "device_gb": rng.choice([24, 40, 80, 141]),
        "reserve_gib": rng.randint(2, 9),
    }


def _gqa(rng: Random) -> dict[str, Any]:
    kv_heads = rng.choice([2, 4, 8])
    return {
        "kind": "gqa",
        "heads": kv_heads * rng.choice([4, 7, 8]),
        "kv_heads": kv_heads,
        "head_dim": rng.choice([64, 96, 128]),
    }


def _mla(rng: Random) -> dict[str, Any]:
    return {
        "kind": "mla",
        "heads": rng.choice([16, 64, 128]),
        "head_dim": rng.choice([64, 128]),
        "kv_rank": rng.choice([256, 384, 512]),
        "rope_dim": rng.choice([32, 64]),
    }


def _expect_room(answer: Answer, case: dict[str, Any], mistakes: Mistakes) -> None:
    want, got = _room(**case), answer(**case)
    if not same(got, want):
        failure = mismatch(got, want, describe(**case))
        named = _named(got, case, mistakes) if type(got) is int and got else ""
        raise Failure(f"{failure}{named}", failure.hint)


def _room_gqa(answer: Answer, rng: Random) -> None:
    for _ in range(5):
        case = _drawn(
            lambda: {"attention": _gqa(rng), **_machine(rng)},
            _room,
            GQA_MISTAKES.values(),
        )
        _expect_room(answer, case, GQA_MISTAKES)


def _room_mla(answer: Answer, rng: Random) -> None:
    for _ in range(5):
        case = _drawn(
            lambda: {"attention": _mla(rng), **_machine(rng)},
            _room,
            MLA_MISTAKES.values(),
        )
        _expect_room(answer, case, MLA_MISTAKES)


def _room_limits(answer: Answer, rng: Random) -> None:
    heads = {"kind": "gqa", "heads": 8, "kv_heads": 8, "head_dim": 128}
    kinds = [_gqa(rng), _mla(rng), heads]
    for attention in kinds:
        case = {"attention": attention, **_machine(rng)}
        case |= {"devices": rng.randint(1, 3), "weight_bits": 8, "cache_bits": 16}
        sizes = (case[n] for n in ("layers", "windowed", "window", "context"))
        each = 2 * _cached_numbers(attention) * _kept_tokens(*sizes)
        space = case["device_gb"] * 10**9 - case["reserve_gib"] * 2**30
        space *= case["devices"]
        number = rng.randint(1, (space - 1) // each)
        just = case | {"params": space - number * each}
        case["params"] = space // 3
        cases = [
            just,
            just | {"params": just["params"] + 1},
            just | {"params": space},
            just | {"params": space + 1},
            just | {"params": 4 * space},
            # A weight of half a byte: one more is half a byte too many.
            just | {"params": 2 * just["params"], "weight_bits": 4},
            just | {"params": 2 * just["params"] + 1, "weight_bits": 4},
            case | {"windowed": 0},
            case | {"windowed": case["layers"]},
            case | {"windowed": case["layers"], "context": case["window"]},
            case | {"context": case["window"] // 3},
            case | {"context": 1},
            case | {"devices": 1, "reserve_gib": 0},
        ]
        for each_case in cases:
            _expect_room(answer, each_case, {})


# 04.5


def _four_bits(weight: Tensor, group: int) -> tuple[Tensor, Tensor, float]:
    rows, scales = [], []
    for numbers in weight.float().tolist():
        own, codes = [], []
        for start in range(0, len(numbers), group):
            part = numbers[start : start + group]
            scale = torch.tensor(max(map(abs, part)) / 7).half().item()
            own.append(scale)
            whole = [round(w / scale) if scale else 0 for w in part]
            codes += [8 + max(-7, min(7, number)) for number in whole]
        codes += [8] * (len(codes) % 2)
        pairs = zip(codes[::2], codes[1::2], strict=True)
        rows.append([16 * high + low for high, low in pairs])
        scales.append(own)
    packed = torch.tensor(rows, dtype=torch.uint8)
    bits = (8 * packed.numel() + 16 * len(scales) * len(scales[0])) / weight.numel()
    return packed, torch.tensor(scales, dtype=torch.float16), bits


def _weights(
    rng: Random,
    rows: int,
    columns: int,
    group: int,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Weights near whole multiples of their scales, so that no order of operations rounds another way."""
    table = []
    for _ in range(rows):
        row: list[float] = []
        while len(row) < columns:
            scale = 0.004 * (1 + 3 * rng.random())
            part = [
                rng.randint(-6, 6) + 0.3 * (2 * rng.random() - 1)
                for _ in range(min(group, columns - len(row)))
            ]
            part[rng.randrange(len(part))] = rng.choice([-7.0, 7.0])
            row += [scale * number for number in part]
        table.append(row)
    return {"weight": torch.tensor(table).to(dtype), "group": group}


def _three(got: Any, case: dict[str, Any]) -> tuple[Any, ...]:
    return _several(got, 3, case, "bytes, scales and bits a weight")


def _packing_mistake(got: Any, want: Tensor) -> str:
    if type(got) is not Tensor or got.dtype != want.dtype or got.shape != want.shape:
        return ""
    swapped = (want << 4) | (want >> 4)
    mistakes = {
        "the first number in the low half; here it is in the high one": swapped,
        "two's complement; here 8 is added": want ^ 0x88,
        "two's complement, and the first number in the low half": swapped ^ 0x88,
    }
    for text, value in mistakes.items():
        if torch.equal(got, value):
            return f"\n    that is {text}"
    return ""


def _expect_packed(answer: Answer, case: dict[str, Any]) -> None:
    packed, scales, _ = _three(answer(**case), case)
    want = _four_bits(**case)
    compare(scales, want[1], f"{describe(**case)}, the scales")
    try:
        compare(packed, want[0], f"{describe(**case)}, the bytes")
    except Failure as failure:
        text = f"{failure}{_packing_mistake(packed, want[0])}"
        raise Failure(text, failure.hint) from None


def _four_values(answer: Answer, rng: Random) -> None:
    cases = [{"weight": torch.tensor([[0.7, -0.1, 0.35, 0.05]]), "group": 2}]
    for rows, columns, group in ((1, 4, 4), (2, 8, 4), (3, 12, 6), (5, 64, 32)):
        cases.append(_weights(rng, rows, columns, group))
    cases.append(_weights(rng, 3, 16, 4, torch.bfloat16))
    for case in cases:
        _expect_packed(answer, case)


RAGGED = (
    *((1, 1, 2), (1, 3, 2), (2, 5, 4), (3, 7, 16), (4, 33, 8)),
    *((2, 30, 8), (3, 9, 3), (2, 6, 1), (3, 15, 5)),
)


def _four_ragged(answer: Answer, rng: Random) -> None:
    cases = [_weights(rng, *size) for size in RAGGED]
    cases.append(_weights(rng, 3, 13, 4, torch.bfloat16))
    silent = _weights(rng, 3, 11, 4)
    silent["weight"][1, 4:8] = 0
    silent["weight"][2] = 0
    # Near float16's largest number; and a scale that it holds but roughly: codes are of the scale as stored.
    large = _weights(rng, 2, 6, 4)
    large["weight"] *= 2.0**20
    small = torch.tensor([[7.0, 3.2, -5.3, 1.1, -6.9]]) * 1.375 * 2.0**-24
    for case in (*cases, silent, large, {"weight": small, "group": 5}):
        _expect_packed(answer, case)


BITS_MISTAKES: Mistakes = {
    "without the scales": lambda weight, group: _bits(weight, group, scale=0),
    "4, the bits of the integers alone": lambda weight, group: 4.0,
    "with scales of 32 bits; they are stored in 16": lambda weight, group: _bits(weight, group, scale=32),
    "with one scale in all": lambda weight, group: 16 / weight.numel() + _bits(weight, group, scale=0),
    "with one scale a row": lambda weight, group: _bits(weight, weight.shape[1]),
    "4 + 16 / group; a shorter group has a scale, too, and an odd row half a byte more": lambda weight, group: (
        4 + 16 / group),
    "without the scales of the short groups": lambda weight, group: (
        _bits(weight, group) - 16 / weight.shape[1]),
    "with the last groups padded": lambda weight, group: _bits(weight, group, padded=True),
    "without what fills odd rows": lambda weight, group: (
        _bits(weight, group) - 4 / weight.shape[1]),
    "bytes a weight; return bits": lambda weight, group: _bits(weight, group) / 8,
    "the bits of all weights together": lambda weight, group: _bits(weight, group) * weight.numel(),
    "the bytes of all weights together": lambda weight, group: _bits(weight, group) * weight.numel() / 8,
}  # fmt: skip


def _bits(weight: Tensor, group: int, scale: int = 16, padded: bool = False) -> float:
    rows, columns = weight.shape
    groups = -(-columns // group)
    stored = groups * group if padded else columns
    return rows * (8 * -(-stored // 2) + scale * groups) / weight.numel()


def _four_bits_each(answer: Answer, rng: Random) -> None:
    def odd() -> dict[str, Any]:
        group = rng.choice([4, 8, 16])
        columns = group * rng.randint(1, 3) + rng.randrange(1, group - 1, 2)
        return _weights(rng, rng.randint(2, 4), columns, group)

    def right(**case: Any) -> float:
        return _four_bits(**case)[2]

    cases = [_drawn(odd, right, BITS_MISTAKES.values()) for _ in range(3)]
    whole = [_weights(rng, *size) for size in ((2, 8, 8), (2, 64, 32), (1, 1, 128))]
    whole.append(_weights(rng, 3, 13, 4, torch.bfloat16))
    for case in (*cases, *whole):
        got = _three(answer(**case), case)[2]
        _expect_float(got, right(**case), case, BITS_MISTAKES, ", bits a weight")


# 04.6


def _splits(
    expert_ids: list[Tensor], rank_of: Tensor, row_bytes: int
) -> tuple[Tensor, Tensor, Tensor]:
    ranks, home = len(expert_ids), rank_of.tolist()
    sent = [[0] * ranks for _ in range(ranks)]
    for i, ids in enumerate(expert_ids):
        for row in ids.tolist():
            for j in {home[e] for e in row if e >= 0}:
                sent[i][j] += 1
    received = [[sent[j][i] for j in range(ranks)] for i in range(ranks)]
    leaving = [row_bytes * (sum(sent[i]) - sent[i][i]) for i in range(ranks)]
    return torch.tensor(sent), torch.tensor(received), torch.tensor(leaving)


def _homes(rng: Random, experts: int, ranks: int) -> Tensor:
    homes = [e % ranks for e in range(experts)]
    rng.shuffle(homes)
    return torch.tensor(homes)


def _split_case(
    rng: Random, experts: int, k: int, tokens: list[int], dropped: float = 0.0
) -> dict[str, Any]:
    dtype = rng.choice([torch.int64, torch.int32])
    ids = []
    for count in tokens:
        rows = [rng.sample(range(experts), k) for _ in range(count)]
        rows = [[-1 if rng.random() < dropped else e for e in row] for row in rows]
        ids.append(torch.tensor(rows, dtype=dtype).reshape(count, k))
    return {
        "expert_ids": ids,
        "rank_of": _homes(rng, experts, len(tokens)),
        "row_bytes": 2 * rng.randint(3, 4000),
    }


def _split_mistake(got: Any, case: dict[str, Any]) -> str:
    want, ranks = _splits(**case)[0], len(case["expert_ids"])
    slots = torch.zeros_like(want)
    contiguous = torch.zeros_like(want)
    each = -(-len(case["rank_of"]) // ranks)
    for i, ids in enumerate(case["expert_ids"]):
        for row in ids.tolist():
            for e in row:
                slots[i, case["rank_of"][e]] += e >= 0
            for j in {e // each for e in row if e >= 0}:
                contiguous[i, j] += 1
    mistakes = {
        "one row for each choice: a token with two experts on a rank goes there once": slots,
        "what each rank receives from the others: rows are those who send": want.T,
        "without what stays on the rank: the split sizes hold it, the bytes do not": want
        - want.diag().diag(),
        "with E/R neighbours on each rank: look at rank_of": contiguous,
    }
    for text, value in mistakes.items():
        if type(got) is Tensor and got.shape == want.shape and torch.equal(got, value):
            return f"\n    that is {text}"
    return ""


SPLITS = "sent, received and leaving"


def _split_sent(answer: Answer, rng: Random) -> None:
    by_hand: dict[str, Any] = {
        "expert_ids": [torch.tensor([[0, 2], [0, 1]]), torch.tensor([[2, 1]])],
        "rank_of": torch.tensor([0, 1, 0, 1]),
        "row_bytes": 10,
    }
    cases = [by_hand]
    sizes = ((6, 2, [3, 5]), (8, 3, [4, 6, 2, 9]), (9, 4, [7, 12, 5]))
    cases += [_split_case(rng, *size) for size in sizes]
    for case in cases:
        sent = _several(answer(**case), 3, case, SPLITS)[0]
        try:
            compare(sent, _splits(**case)[0], f"{describe(**case)}, sent")
        except Failure as failure:
            text = f"{failure}{_split_mistake(sent, case)}"
            raise Failure(text, failure.hint) from None


def _split_back(answer: Answer, rng: Random) -> None:
    for experts, k, tokens in (
        (4, 2, [1, 3]),
        (6, 2, [2, 7, 4]),
        (12, 3, [5, 1, 8, 3]),
    ):
        case = _split_case(rng, experts, k, tokens)
        got, want = _several(answer(**case), 3, case, SPLITS), _splits(**case)
        compare(got[1], want[1], f"{describe(**case)}, received")
        text = ""
        everything = want[0].sum(dim=1) * case["row_bytes"]
        arriving = (want[1].sum(dim=1) - want[1].diagonal()) * case["row_bytes"]
        if type(got[2]) is Tensor and torch.equal(got[2], everything):
            text = "\n    that counts what stays on the rank, which leaves nothing"
        elif type(got[2]) is Tensor and torch.equal(got[2], arriving):
            text = "\n    that is what arrives, not what leaves"
        try:
            compare(got[2], want[2], f"{describe(**case)}, leaving")
        except Failure as failure:
            raise Failure(f"{failure}{text}", failure.hint) from None


def _split_limits(answer: Answer, rng: Random) -> None:
    crowd = _split_case(rng, 4, 1, [5, 0, 3, 4])
    crowd["expert_ids"] = [torch.full_like(ids, 2) for ids in crowd["expert_ids"]]
    uneven = _split_case(rng, 7, 2, [3, 4, 2])
    uneven["rank_of"] = torch.tensor([1, 1, 0, 1, 1, 0, 1])  # rank 2 has no experts
    lost = _split_case(rng, 6, 2, [4, 3, 5], dropped=0.4)
    # The last expert lives where an id of -1 would be looked up.
    gone: dict[str, Any] = {
        "expert_ids": [torch.tensor([[-1, -1], [0, -1]]), torch.tensor([[-1, 1]])],
        "rank_of": torch.tensor([0, 0, 1, 1]),
        "row_bytes": 8,
    }
    cases = [
        gone,
        _split_case(rng, 4, 2, [3, 0]),
        _split_case(rng, 4, 2, [0, 0, 0]),
        _split_case(rng, 3, 2, [5]),
        _split_case(rng, 4, 4, [2, 3]),
        _split_case(rng, 8, 1, [6, 1, 4, 2]),
        _split_case(rng, 40, 6, [20, 0, 31, 7, 1]),
        _split_case(rng, 6, 2, [700, 700]) | {"row_bytes": 10**9},  # past 2^31
        crowd,
        uneven,
        lost,
    ]
    for case in cases:
        got = _several(answer(**case), 3, case, SPLITS)
        want = _splits(**case)
        for place, name in enumerate(("sent", "received", "leaving")):
            compare(got[place], want[place], f"{describe(**case)}, {name}")


# 04.7

FIRST_BAR, MENDED_BAR = 1.3, 1.08

Loads = list[list[int]]


def _cost(loads: Loads, placed: list[int], ranks: int) -> int:
    waited = 0
    for batch in loads:
        held = [0] * ranks
        for e, rank in enumerate(placed):
            held[rank] += batch[e]
        waited += max(held)
    return waited


def _placements(experts: int, ranks: int) -> Iterator[list[int]]:
    """All of them; ranks are interchangeable, so the first expert that is left opens the next rank."""

    def fill(left: list[int], rank: int, placed: dict[int, int]) -> Iterator[list[int]]:
        if not left:
            yield [placed[e] for e in range(experts)]
            return
        first, *rest = left
        for others in combinations(rest, experts // ranks - 1):
            more = placed | dict.fromkeys((first, *others), rank)
            yield from fill([e for e in rest if e not in others], rank + 1, more)

    return fill(list(range(experts)), 0, {})


def _least(loads: Loads, ranks: int) -> int:
    experts = len(loads[0])
    return min(_cost(loads, placed, ranks) for placed in _placements(experts, ranks))


def _greedy(loads: Loads, ranks: int) -> list[int]:
    """Heaviest expert first, each to where the cost grows least."""
    experts = len(loads[0])
    totals = [[0] * ranks for _ in loads]
    held, placed = [0] * ranks, [0] * experts

    def after(e: int, rank: int) -> tuple[int, int]:
        both = list(zip(totals, loads, strict=True))
        grown = sum(max(*of, of[rank] + batch[e]) for of, batch in both)
        return grown, sum(of[rank] for of in totals)

    for e in sorted(range(experts), key=lambda e: -sum(batch[e] for batch in loads)):
        room = [rank for rank in range(ranks) if held[rank] < experts // ranks]
        rank = min(room, key=lambda rank: after(e, rank))
        placed[e] = rank
        held[rank] += 1
        for of, batch in zip(totals, loads, strict=True):
            of[rank] += batch[e]
    return placed


def _blind(loads: Loads, ranks: int) -> list[list[int]]:
    """Placements that look at all batches together, or at one."""
    experts = len(loads[0])
    summed = [[sum(column) for column in zip(*loads, strict=True)]]
    order = sorted(range(experts), key=lambda e: -summed[0][e])
    dealt, snake = [0] * experts, [0] * experts
    for place, e in enumerate(order):
        lap, at = divmod(place, ranks)
        dealt[e] = at
        snake[e] = at if lap % 2 == 0 else ranks - 1 - at
    return [
        [e * ranks // experts for e in range(experts)],
        [e % ranks for e in range(experts)],
        _greedy(summed, ranks),
        dealt,
        snake,
        # With two experts a rank, who parts those of one topic has parted the others.
        *(_greedy([b], ranks) for b in loads if experts > 2 * ranks),
    ]


def _hot_together(rng: Random, experts: int, ranks: int, batches: int) -> Loads:
    """Each batch is of one topic, and the experts of a topic, one for each rank, are hot together."""
    order = rng.sample(range(experts), experts)
    topics = [order[first : first + ranks] for first in range(0, experts, ranks)]
    loads = []
    for number in range(batches):
        topic = topics[number % len(topics)]
        loads.append([rng.randint(0, 8) + 40 * (e in topic) for e in range(experts)])
    return loads


def _skewed(rng: Random, experts: int, batches: int) -> Loads:
    def load() -> int:
        return rng.randint(0, 9) if rng.random() < 0.6 else rng.randint(10, 40)

    return [[load() for _ in range(experts)] for _ in range(batches)]


def _exchanged(loads: Loads, placed: list[int], ranks: int) -> list[int] | None:
    """The first placement that is better by an exchange of two experts, None where no exchange helps."""
    now = _cost(loads, placed, ranks)
    for a, b in combinations(range(len(placed)), 2):
        other = list(placed)
        other[a], other[b] = placed[b], placed[a]
        if _cost(loads, other, ranks) < now:
            return other
    return None


def _mended(loads: Loads, placed: list[int], ranks: int) -> list[int]:
    while (better := _exchanged(loads, placed, ranks)) is not None:
        placed = better
    return placed


def _expect_placed(
    answer: Answer,
    loads: Loads,
    ranks: int,
    least: float,
    bar: float,
    of: str = "the least",
) -> None:
    case: dict[str, Any] = {"loads": loads, "ranks": ranks}
    got, experts = answer(**case), len(loads[0])
    what = describe(**case)

    def require(holds: bool, wanted: str, came: object) -> None:
        if not holds:
            text = f"{what}:\n    expected {wanted}, got {shown(came)}"
            raise Failure(text, hint=False)

    plain = type(got) in (list, tuple) and all(type(rank) is int for rank in got)
    require(plain, f"a list of {experts} ranks, each a plain int", got)
    inside = len(got) == experts and all(0 <= rank < ranks for rank in got)
    require(inside, f"{experts} ranks from 0 to {ranks - 1}", got)
    held = [list(got).count(rank) for rank in range(ranks)]
    require(len(set(held)) == 1, f"{experts // ranks} experts on each rank", held)
    cost = _cost(loads, list(got), ranks)
    if cost > bar * least:
        ratio = f", {cost / least:.2f} times {of}" if least else ""
        raise Failure(
            f"{what}:\n    expected a cost of at most {bar} · {least:g} = {bar * least:g}, "
            f"got {cost}{ratio}, with {shown(got)}"
        )


def _placed_by_batch(answer: Answer, rng: Random) -> None:
    _expect_placed(answer, [[8, 8, 0, 0], [0, 0, 8, 8]], 2, 16, FIRST_BAR)
    # Were it not for the number of experts on a rank, the first would be alone.
    _expect_placed(answer, [[9, 1, 1, 1], [9, 1, 1, 1]], 2, 20, FIRST_BAR)
    sizes = ((8, 4, 4), (9, 3, 3), (9, 3, 3), (10, 5, 4))
    for experts, ranks, batches in sizes:
        while True:
            loads = _hot_together(rng, experts, ranks, batches)
            blind = min(_cost(loads, p, ranks) for p in _blind(loads, ranks))
            greedy = _cost(loads, _greedy(loads, ranks), ranks)
            if blind <= 1.4 * greedy:  # luck should not be enough
                continue
            least = _least(loads, ranks)
            if greedy <= 1.2 * least:
                break
        _expect_placed(answer, loads, ranks, least, FIRST_BAR)
    while True:
        loads = _hot_together(rng, 24, 6, 8)
        # The fullest rank has no less than the mean, nor than the heaviest expert.
        bound = sum(max(max(batch), sum(batch) / 6) for batch in loads)
        if min(_cost(loads, p, 6) for p in _blind(loads, 6)) > 1.4 * bound:
            break
    of = "what no placement can go below"
    _expect_placed(answer, loads, 6, bound, FIRST_BAR, of)


def _placed_mended(answer: Answer, rng: Random) -> None:
    for experts, ranks, batches in ((6, 2, 2), (6, 3, 3), (8, 4, 4), (9, 3, 5)):
        while True:
            loads = _skewed(rng, experts, batches)
            greedy = _greedy(loads, ranks)
            cost = _cost(loads, greedy, ranks)
            if cost <= 1.12 * _cost(loads, _mended(loads, greedy, ranks), ranks):
                continue
            least = _least(loads, ranks)
            bar = MENDED_BAR * least
            # Wherever exchanges begin and whichever come first, they end below the bar.
            if all(
                _cost(loads, placed, ranks) <= bar or _exchanged(loads, placed, ranks)
                for placed in _placements(experts, ranks)
            ):
                break
        _expect_placed(answer, loads, ranks, least, MENDED_BAR)


def _placed_limits(answer: Answer, rng: Random) -> None:
    # Nothing to choose, nothing to do, and nothing to tell experts apart.
    _expect_placed(answer, _skewed(rng, 5, 3), 1, 0.0, math.inf)
    _expect_placed(answer, _skewed(rng, 4, 2), 4, 0.0, math.inf)
    _expect_placed(answer, [[0] * 6, [0] * 6], 3, 0.0, 1.0)
    _expect_placed(answer, [[3, 3, 3, 3, 3, 3]], 2, 9, 1.0)


_ROOFLINE = "book/bandwidth/roofline"
_PARALLEL = "book/bandwidth/expert_parallel"
_QUANTISED = "book/bandwidth/quantised"

EXERCISE = Exercise(
    number="04",
    topic="bandwidth",
    title="Bandwidth and systems",
    next_step="all of exercise 04 is done; its hand-graded question is the last cell",
    questions=(
        Question(
            "04.1",
            "A step, kernel by kernel",
            "step_time",
            1,
            15,
            _ROOFLINE,
            (
                Invariant(
                    "adds up kernels, each as long as the longer of its two times, and their launches",
                    2,
                    _step_seconds,
                    "FLOPs over FLOP/s and bytes over bytes/s are seconds; max of the two, plus launch_us · 1e-6, for "
                    "each kernel; then the sum. TFLOP/s are 10^12, GB/s 10^9.",
                ),
                Invariant(
                    "says where most of the time goes, of ties and of no kernels, too",
                    1,
                    _step_bound,
                    "Add up three times: those of memory-bound kernels, of compute-bound ones, and of all launches; "
                    "the largest names the bound. Not how many kernels of a kind there are, nor which is longest.",
                ),
            ),
        ),
        Question(
            "04.2",
            "How many experts a batch reads",
            "experts_read",
            2,
            15,
            _ROOFLINE,
            (
                Invariant(
                    "is the sum over experts of the chance that some token has it",
                    2,
                    _distinct_values,
                    "A token has expert e with chance k · share, since its k experts differ. All tokens miss it with "
                    "the product of (1 - k · share) over tokens, domain by domain. Chances to be missed multiply, "
                    "chances to be read do not add.",
                ),
                Invariant(
                    "at the edges: no tokens, every expert for each, one that nobody has",
                    1,
                    _distinct_limits,
                    "No tokens read nothing: anything to the power of 0 is 1, also 0. One token reads exactly k "
                    "experts, whatever their popularity.",
                ),
            ),
        ),
        Question(
            "04.3",
            "Who leads, and from which batch on",
            "leaders",
            3,
            25,
            _ROOFLINE,
            (
                Invariant(
                    "names each leader with its first batch, in three regimes",
                    2,
                    _leaders_change,
                    "Bytes: fixed + expert_bytes · E · (1 - (1 - k/E)^B) + B · cache. Time: the longer of bytes over "
                    "bandwidth and B · flops over flop_rate, not their sum. Then look at every batch in turn.",
                ),
                Invariant(
                    "misses no lead, however short or late",
                    1,
                    _leaders_short,
                    "Powers of two, and a search by halves, jump over a lead of three batches. Caches count, too: "
                    "they grow with the batch.",
                ),
                Invariant(
                    "at the edges: ties, dense models, every expert for each, one batch",
                    1,
                    _leaders_limits,
                    "At a tie the old leader stays; compare with < in both directions, not with < and else. A dense "
                    "model has no experts: k/E is 0/0. `most` is the last batch.",
                ),
            ),
        ),
        Question(
            "04.4",
            "How many sequences fit",
            "sequences_that_fit",
            2,
            20,
            _ROOFLINE,
            (
                Invariant(
                    "counts caches of grouped-query attention beside the weights",
                    2,
                    _room_gqa,
                    "Cache of a layer and token: 2 · kv_heads · head_dim numbers. Free: devices · (device_gb · 10^9 - "
                    "reserve_gib · 2^30), less params · weight_bits / 8. Windowed layers keep min(context, window).",
                ),
                Invariant(
                    "counts one latent and one rotary key for latent attention",
                    1,
                    _room_mla,
                    "kv_rank + rope_dim numbers: no factor 2, and no number of heads.",
                ),
                Invariant(
                    "is exact where it just fits, and 0 where the weights do not",
                    1,
                    _room_limits,
                    "Stay in bytes: a division into GB rounds. Below 0 is 0. A window longer than the context keeps "
                    "the context.",
                ),
            ),
        ),
        Question(
            "04.5",
            "Four bits, with their scales",
            "quantise4",
            2,
            25,
            _QUANTISED,
            (
                Invariant(
                    "stores integers plus 8, the first of two in the high half, and a scale for each group",
                    2,
                    _four_values,
                    "scale = max |w| / 7 in float32, then float16; integer = round(w / scale); byte = 16 · (first + 8) "
                    "+ (second + 8). Convert to uint8 after adding 8: negative numbers wrap.",
                ),
                Invariant(
                    "takes ragged groups, odd rows and groups of zeros",
                    1,
                    _four_ragged,
                    "The last group has its own scale, of what it holds. Pack row by row, an odd one with 8 at its "
                    "end. 0/0 is NaN, and NaN is any byte. Divide by the scale as it is stored: float16 rounds it.",
                ),
                Invariant(
                    "counts every stored bit: integers, scales, fillings",
                    1,
                    _four_bits_each,
                    "8 · (bytes of the packed tensor + bytes of the scales) / number of weights. Scales are 16 bits, "
                    "one for each group, short ones too.",
                ),
            ),
        ),
        Question(
            "04.6",
            "Who sends what to whom",
            "split_sizes",
            2,
            20,
            _PARALLEL,
            (
                Invariant(
                    "sends each token once to each rank that holds one of its experts",
                    1,
                    _split_sent,
                    "rank_of[expert_ids] gives ranks [T, K]; per token and rank, ask whether any of them is it. Row i "
                    "belongs to the rank that sends.",
                ),
                Invariant(
                    "receives what others send, and counts the bytes that leave",
                    1,
                    _split_back,
                    "What i receives from j is what j sends to i: the transpose. What stays on its rank leaves "
                    "nothing: take off the diagonal.",
                ),
                Invariant(
                    "at the edges: no tokens, one rank, dropped choices, idle ranks",
                    1,
                    _split_limits,
                    "rank_of[-1] is the rank of the last expert: mask ids below 0. The number of ranks is "
                    "len(expert_ids), also where some hold no experts. Bytes pass 2^31: int64.",
                ),
            ),
        ),
        Question(
            "04.7",
            "Where experts live",
            "place",
            3,
            30,
            _PARALLEL,
            (
                Invariant(
                    "parts experts that are hot at the same time",
                    2,
                    _placed_by_batch,
                    "Sums over batches are even here, and tell nothing. Give each expert, the heaviest first, to the "
                    "rank with room where the sum over batches of the fullest rank grows least.",
                ),
                Invariant(
                    "is nearly the best where a greedy rule is not",
                    1,
                    _placed_mended,
                    "Try to exchange each pair of experts on different ranks; keep what lowers the cost; stop when no "
                    "pair does.",
                ),
                Invariant(
                    "at the edges: one rank, one expert a rank, no load",
                    1,
                    _placed_limits,
                    "Any placement with E/R experts a rank is right there. Ranks count from 0; where all loads are 0, "
                    "do not divide by them.",
                ),
            ),
        ),
    ),
)
