"""Answers to exercise 07 that must fail, each with the invariant that catches it, and others that must pass.

Of 07.5 those that are trained take long: they are TRAINED_WRONG and TRAINED_RIGHT, and tests marked thorough run them.
"""

from __future__ import annotations

import importlib
import math
import statistics
from itertools import pairwise

from moe_course.specs import FFN, GQA, ModelSpec, RoutedExperts
from moe_course.training import capstone

CHECKS = importlib.import_module("moe_course.grading.checks.07_capstone")
PACKAGE = "the package's own function"

# 07.1


def counted(design, router=True, all_router=True, norms=True, last=True, head=True,
            embedding=False, gated=True, shared=True, layers=True, dense_router=False, all_experts=False):  # fmt: skip
    d = design["width"]
    depth = design["layers"] if layers else 1
    one = (3 if gated else 2) * d * design["hidden"]
    each = 4 * d * d + 2 * d * norms + 3 * d * design["shared"] * shared
    routes = router and (dense_router or design["experts"] > 1)
    each += d * design["experts"] * routes
    used_each = each
    if not all_router and routes:
        used_each -= d * (design["experts"] - design["k"])
    outer = 256 * d * head + d * (norms and last)
    stored = 256 * d + outer + depth * (each + design["experts"] * one)
    chosen = design["experts"] if all_experts else design["k"]
    used = outer + depth * (used_each + chosen * one) + 256 * d * embedding
    return stored, used


def shape_of(design):
    sparse = design["experts"] > 1
    d, heads = design["width"], design["heads"]
    shared = FFN(design["shared"]) if design["shared"] else None
    moe = RoutedExperts(design["experts"], design["k"], FFN(design["hidden"]), shared)
    return ModelSpec(
        name="x", layers=design["layers"], width=d, vocab=256, attention=GQA(heads, heads, d // heads),
        ffn=None if sparse else FFN(design["hidden"]), moe=moe if sparse else None,
    )  # fmt: skip


def counted_by_the_package(design):
    spec = shape_of(design)
    return spec.total_params(), spec.active_params(include_embedding=False)


def counted_by_difference(design):
    """Used: what is stored, less what is not met."""
    d, sparse = design["width"], design["experts"] > 1
    attention, one = 4 * d**2, 3 * d * design["hidden"]
    layer = attention + 2 * d + one * design["experts"] + 3 * d * design["shared"]
    layer += d * design["experts"] * sparse
    stored = (2 * 256 + 1) * d + design["layers"] * layer
    idle = design["layers"] * (design["experts"] - design["k"]) * one
    return stored, stored - idle - 256 * d


# 07.2


def bought(used, layers, width, context, batch, flops, text, passes, each=6, attention=12, less=1,
           by_pass=True, floats=False, ignore_text=False, ignore_flops=False, up=False, once=False):  # fmt: skip
    step = (each * used + attention * layers * width * context) * batch * context
    steps = int(flops / step) if floats else -(-flops // step) if up else flops // step
    windows = (text - less) // context
    held = passes * (windows // batch) if by_pass else passes * windows // batch
    if once:
        held = windows // batch
    if ignore_text:
        return steps
    return held if ignore_flops else min(steps, held)


def bought_by_search(used, layers, width, context, batch, flops, text, passes):
    def fits(steps):
        cost = steps * batch * context * (6 * used + 12 * layers * width * context)
        return cost <= flops and steps <= passes * ((text - 1) // context // batch)

    low, high = 0, 1
    while fits(high):
        high *= 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def bought_by_the_package(used, layers, width, context, batch, flops, text, passes):
    spec = ModelSpec("x", layers, width, 256, GQA(1, 1, width), ffn=FFN(8))
    from moe_course.training import loop

    loop.flops_per_token(spec, context)
    return bought(used, layers, width, context, batch, flops, text, passes)


# 07.3


def rated(step, steps, peak, schedule, shift=1, over=0, mode="line"):
    at = (step + shift) / max(1, steps - over)
    for (x0, y0), (x1, y1) in pairwise(schedule):
        if at <= x1 or x1 == schedule[-1][0]:
            if mode == "stairs":
                return peak * y0
            if mode == "nearest":
                return peak * (y0 if at - x0 < x1 - at else y1)
            if mode == "cosine":
                u = (at - x0) / (x1 - x0)
                return peak * (y1 + (y0 - y1) * (1 + math.cos(math.pi * u)) / 2)
            if mode == "ends":
                (a, b), (c, e) = schedule[0], schedule[-1]
                return peak * (b + (e - b) * (at - a) / (c - a))
            if mode == "backwards":
                return peak * (y1 + (y0 - y1) * (at - x0) / (x1 - x0))
            return peak * (y0 + (y1 - y0) * (at - x0) / (x1 - x0))
    raise AssertionError


def rated_without_peak(step, steps, peak, schedule):
    return rated(step, steps, 1.0, schedule)


def rated_from_above(step, steps, peak, schedule):
    """The segment sought from the end."""
    at = (step + 1) / steps
    i = max(i for i, (x, _) in enumerate(schedule[:-1]) if x <= at)
    (x0, y0), (x1, y1) = schedule[i : i + 2]
    weight = (x1 - at) / (x1 - x0)
    return peak * (weight * y0 + (1 - weight) * y1)


def rated_by_increments(step, steps, peak, schedule):
    at, share = (step + 1) / steps, schedule[0][1]
    for (x0, y0), (x1, y1) in pairwise(schedule):
        part = min(max((at - x0) / (x1 - x0), 0.0), 1.0)
        share += part * (y1 - y0)
    return peak * share


def rated_but_zero_first(step, steps, peak, schedule):
    return 0.0 if step == 0 else rated(step, steps, peak, schedule)


def rated_but_corners_fall_through(step, steps, peak, schedule):
    """`<` for `<=` and nothing behind the last point."""
    at = (step + 1) / steps
    for (x0, y0), (x1, y1) in pairwise(schedule):
        if x0 < at < x1:
            return peak * (y0 + (y1 - y0) * (at - x0) / (x1 - x0))
    return peak * schedule[-1][1]


def rated_by_the_package(step, steps, peak, schedule):
    design = capstone.BASELINE
    design.rate(step, steps)
    return rated(step, steps, peak, schedule)


# 07.4


def chosen(dense, candidates, flops, state_bytes, paired=True, over=1, root=True, errors=3.0, dead=True,
           least=3, strict=True, key="gain", nan=True, within=True, first=True, memory=True):  # fmt: skip
    best, name = None, "dense"
    for c in candidates:
        shared = [s for s in dense if s in c["bits"]]
        if paired:
            gains = [dense[s] - c["bits"][s] for s in shared]
        else:
            mean = statistics.fmean(dense.values())
            gains = [mean - bits for bits in c["bits"].values()]
        if not nan:
            gains = [g for g in gains if math.isfinite(g)]
        n = len(gains)
        if n < least or (dead and c["dead_experts"]):
            continue
        if within and (
            c["flops"] > flops or (memory and c["state_bytes"] > state_bytes)
        ):
            continue
        if not strict and (c["flops"] == flops or c["state_bytes"] == state_bytes):
            continue
        mean = math.fsum(gains) / n
        variance = math.fsum((g - mean) ** 2 for g in gains) / max(1, n - over)
        error = math.sqrt(variance / (n if root else 1))
        if not (mean > errors * error and mean > 0):
            continue
        value = {"gain": mean, "sure": mean / (error + 1e-12), "luck": max(gains)}[key]
        if best is None or (value > best if first else value >= best):
            best, name = value, c["name"]
    return name


def chosen_by_lowest_bits(dense, candidates, flops, state_bytes):
    sound = [c for c in candidates if c["flops"] <= flops and c["state_bytes"] <= state_bytes and not c["dead_experts"]]  # fmt: skip
    return min(sound, key=lambda c: statistics.fmean(c["bits"].values()), default={"name": "dense"})["name"]  # fmt: skip


def chosen_in_one_go(dense, candidates, flops, state_bytes):
    """By sorting, with statistics.stdev."""

    def gains(c):
        return [dense[s] - c["bits"][s] for s in set(dense) & set(c["bits"])]

    def sound(c):
        g = gains(c)
        if len(g) < 3 or any(math.isinf(x) for x in g):
            return False
        sure = statistics.fmean(g) > 3 * statistics.stdev(g) / len(g) ** 0.5
        return sure and c["flops"] <= flops and c["state_bytes"] <= state_bytes and c["dead_experts"] == 0  # fmt: skip

    kept = sorted(filter(sound, candidates), key=lambda c: -statistics.fmean(gains(c)))
    return kept[0]["name"] if kept and statistics.fmean(gains(kept[0])) > 0 else "dense"


def chosen_by_the_package(dense, candidates, flops, state_bytes):
    capstone.bits([], "dense")
    return chosen(dense, candidates, flops, state_bytes)


# 07.5

# Cheap to train: half as many steps of twice the size.
BASE = capstone.plain(
    capstone.largest(width=32, experts=32, k=2, hidden=32, gate="renormalised", peak_lr=0.012, batch=16)
)  # fmt: skip
FINE = capstone.plain(capstone.DESIGNS["64 fine experts, 4 used"])
BITS = 2.94  # what it is about to reach; an honest claim stands within 3 %


def claimed(design, bits=None, **other):
    """A recipe whose claims are true, but for `other`."""
    claims = dict(CHECKS.true_claims(capstone.read(design)))
    claims["held_out_bits"] = BITS if bits is None else bits
    return design | {"claims": claims | other}


def a_recipe(bits=None, claims=None, drop=(), **changes):
    """A function that returns a recipe; its claims are those of a sound design where this one has none."""
    design = BASE | changes
    for key in drop:
        del design[key]
    try:
        made = claimed(design, bits, **(claims or {}))
    except (ValueError, KeyError, TypeError, ZeroDivisionError, OverflowError):
        made = design | {"claims": claimed(BASE)["claims"]}
    return lambda: made


SOUND = claimed(BASE)
CLAIMED = SOUND["claims"]


class Changing(dict):
    """Another value each time that it is read."""

    reads = 0

    def __getitem__(self, key):
        self.reads += 1
        return 1 if self.reads % 2 and key == "steps" else super().__getitem__(key)


class Small(int):
    """Says that it is small, and is not."""

    def __le__(self, other):
        return True

    def __index__(self):
        return 10**9


def by_the_package():
    """The claims by the package's own arithmetic."""
    design = capstone.read(BASE)
    return SOUND | {"steps": design.flops() and design.steps}


STEPS = BASE["steps"]
WITHIN_5, LATENCY_5, CLAIMS_5, TRAINED_5, BALANCED_5, HONEST_5 = (
    "is a sparse model within FLOPs and memory",
    "decodes in time, alone and in a batch of 64",
    "gives reasons whose numbers are its own",
    "trained again, it is better than the best dense model of as many FLOPs",
    "keeps every expert of every layer busy",
    "and its loss is what it says",
)
SPARSE_1, DENSE_1 = (
    "counts all weights that are stored, and those that a byte meets",
    "takes a dense design for what it is",
)
FLOPS_2, TEXT_2, EXACT_2 = (
    "is the number of whole steps that the FLOPs pay for",
    "ends where the text does",
    "is exact, however large the budget",
)
LINES_3, CORNERS_3 = (
    "reads the rate off straight lines between the points",
    "is right at the corners, at the first step and the last",
)
GAIN_4, NONE_4 = (
    "takes the largest gain that is no luck, within the limits",
    "stays with the dense model where nothing is sure, and takes the first of equals",
)


def _within(what, answer):
    return (what, answer, WITHIN_5)


WRONG = {
    "07.1": [
        ("no router", lambda design: counted(design, router=False), SPARSE_1),
        ("router of the chosen alone", lambda design: counted(design, all_router=False), SPARSE_1),
        ("no norms", lambda design: counted(design, norms=False), SPARSE_1),
        ("no last norm", lambda design: counted(design, last=False), SPARSE_1),
        ("tied head", lambda design: counted(design, head=False), SPARSE_1),
        ("embedding used", lambda design: counted(design, embedding=True), SPARSE_1),
        ("two matrices an expert", lambda design: counted(design, gated=False), SPARSE_1),
        ("shared left out", lambda design: counted(design, shared=False), SPARSE_1),
        ("one layer", lambda design: counted(design, layers=False), SPARSE_1),
        ("all experts used", lambda design: counted(design, all_experts=True), SPARSE_1),
        ("floats", lambda design: tuple(map(float, counted(design))), SPARSE_1),
        ("a dense model with a router", lambda design: counted(design, dense_router=True), DENSE_1),
        (PACKAGE, counted_by_the_package, SPARSE_1),
    ],
    "07.2": [
        ("2 FLOPs a weight", lambda **c: bought(**c, each=2), FLOPS_2),
        ("no attention", lambda **c: bought(**c, attention=0), FLOPS_2),
        ("causal attention", lambda **c: bought(**c, attention=6), FLOPS_2),
        ("rounded up", lambda **c: bought(**c, up=True), FLOPS_2),
        ("FLOPs ignored", lambda **c: bought(**c, ignore_flops=True), FLOPS_2),
        ("text ignored", lambda **c: bought(**c, ignore_text=True), TEXT_2),
        ("one pass", lambda **c: bought(**c, once=True), TEXT_2),
        ("windows of both passes pooled", lambda **c: bought(**c, by_pass=False), TEXT_2),
        ("the last byte has no successor", lambda **c: bought(**c, less=0), TEXT_2),
        ("through a float", lambda **c: bought(**c, floats=True), EXACT_2),
        (PACKAGE, bought_by_the_package, FLOPS_2),
    ],
    "07.3": [
        ("constant", lambda step, steps, peak, schedule: peak, LINES_3),
        ("step / steps", lambda **c: rated(**c, shift=0), LINES_3),
        ("step / (steps - 1)", lambda **c: rated(**c, shift=0, over=1), LINES_3),
        ("stairs", lambda **c: rated(**c, mode="stairs"), LINES_3),
        ("the nearest point", lambda **c: rated(**c, mode="nearest"), LINES_3),
        ("a cosine between points", lambda **c: rated(**c, mode="cosine"), LINES_3),
        ("from first to last", lambda **c: rated(**c, mode="ends"), LINES_3),
        ("lines turned round", lambda **c: rated(**c, mode="backwards"), LINES_3),
        ("without the peak", rated_without_peak, LINES_3),
        ("nothing in the first step", rated_but_zero_first, CORNERS_3),
        ("corners fall through", rated_but_corners_fall_through, CORNERS_3),
        (PACKAGE, rated_by_the_package, LINES_3),
    ],
    "07.4": [
        ("always dense", lambda **c: "dense", GAIN_4),
        ("lowest loss", chosen_by_lowest_bits, GAIN_4),
        ("unpaired", lambda **c: chosen(**c, paired=False), GAIN_4),
        ("over n", lambda **c: chosen(**c, over=0), GAIN_4),
        ("no root of n", lambda **c: chosen(**c, root=False), GAIN_4),
        ("one standard error", lambda **c: chosen(**c, errors=1.0), GAIN_4),
        ("the surest", lambda **c: chosen(**c, key="sure"), GAIN_4),
        ("the best seed", lambda **c: chosen(**c, errors=-9.0, key="luck"), GAIN_4),
        ("dead experts kept", lambda **c: chosen(**c, dead=False), GAIN_4),
        ("two seeds are enough", lambda **c: chosen(**c, least=2), GAIN_4),
        ("what diverged left out", lambda **c: chosen(**c, nan=False), GAIN_4),
        ("limits ignored", lambda **c: chosen(**c, within=False), GAIN_4),
        ("memory ignored", lambda **c: chosen(**c, memory=False), GAIN_4),
        ("below the limit", lambda **c: chosen(**c, strict=False), NONE_4),
        ("the last of equals", lambda **c: chosen(**c, first=False), NONE_4),
        (PACKAGE, chosen_by_the_package, GAIN_4),
    ],
    "07.5": [
        # No recipe
        _within("a text", lambda: "E=32, k=2"),
        _within("a list", lambda: [BASE]),
        _within("empty", lambda: {}),
        _within("keys that are no texts", lambda: SOUND | {1: 2}),
        _within("an entry missing", a_recipe(drop=("gate",))),
        _within("unknown entries: held-out text to train on", a_recipe(train_on="held_out")),
        _within("a seed of one's own", a_recipe(seed=0)),
        _within("weights handed in", a_recipe(checkpoint="weights.pt")),
        _within("a dict that changes", lambda: Changing(SOUND)),
        _within("a number that lies", a_recipe(steps=Small(STEPS))),
        _within("bool for a number", a_recipe(layers=True)),
        _within("a float for a count", a_recipe(experts=32.0)),
        _within("a text for a count", a_recipe(experts="32")),
        # Values
        _within("no layers", a_recipe(layers=0)),
        _within("negative steps", a_recipe(steps=-STEPS)),
        _within("no steps", a_recipe(steps=0)),
        _within("a width of 10^9", a_recipe(width=10**9)),
        _within("experts without end", a_recipe(experts=10**5000)),
        _within("NaN as learning rate", a_recipe(peak_lr=math.nan)),
        _within("an infinite learning rate", a_recipe(peak_lr=math.inf)),
        _within("a negative learning rate", a_recipe(peak_lr=-0.01)),
        _within("an infinite strength", a_recipe(strength=math.inf)),
        _within("odd heads", a_recipe(heads=3)),
        _within("k above E", a_recipe(k=33)),
        _within("an unknown gate", a_recipe(gate="argmax")),
        _within("an unknown cure", a_recipe(cure="prayer")),
        _within("a bias on a softmax", a_recipe(cure="bias")),
        _within("a bias that does not move", a_recipe(cure="bias", gate="sigmoid", strength=0.0)),
        _within("one gate that is always 1", a_recipe(k=1, hidden=64)),
        # Schedules
        _within("a schedule of one point", a_recipe(schedule=[(0.0, 1.0)])),
        _within("a schedule that ends early", a_recipe(schedule=[(0.0, 1.0), (0.9, 0.1)])),
        _within("a schedule that turns back", a_recipe(schedule=[(0.0, 1.0), (0.5, 1.0), (0.4, 0.5), (1.0, 0.1)])),
        _within("a jump: two points at one place", a_recipe(schedule=[(0.0, 1.0), (0.5, 1.0), (0.5, 0.5), (1.0, 0.1)])),
        _within("a schedule of triples", a_recipe(schedule=[(0.0, 1.0, 1), (1.0, 0.1, 1)])),
        _within("a share of 20", a_recipe(schedule=[(0.0, 20.0), (1.0, 0.1)])),
        _within("NaN in the schedule", a_recipe(schedule=[(0.0, 1.0), (math.nan, 0.5), (1.0, 0.1)])),
        _within("a schedule without end", a_recipe(schedule=[(i / 5000, 1.0) for i in range(5001)])),
        _within("a schedule that is an iterator", a_recipe(schedule=iter([(0.0, 1.0), (1.0, 0.1)]))),
        # Dense in disguise
        _within("one expert", a_recipe(experts=1, k=1, hidden=128)),
        _within("all experts for every byte", a_recipe(experts=4, k=4, hidden=32)),
        _within("all but one", a_recipe(experts=4, k=3, hidden=32)),
        _within("one more than half", a_recipe(experts=7, k=4, hidden=32)),
        _within("all of it shared", a_recipe(experts=2, k=1, hidden=1, shared=128, gate="softmax")),
        _within("shared, by a hair", a_recipe(shared=65)),
        # Budgets
        _within("steps and layers without end", a_recipe(width=16, layers=6, k=1, hidden=1, gate="softmax", batch=8, steps=3500)),
        _within("one step too many", a_recipe(steps=STEPS + 1)),
        _within("ten times the steps", a_recipe(steps=19_999)),
        _within("more than two passes", a_recipe(width=16, hidden=1, k=1, experts=2, gate="softmax", batch=64, steps=2000)),
        _within("too much memory, by a hair", a_recipe(experts=64, k=1, hidden=38, gate="softmax")),
        # Latency
        ("too slow alone", a_recipe(width=48, hidden=48, experts=16, steps=1000), LATENCY_5),
        ("too slow in a batch", a_recipe(experts=32, k=4, hidden=64, steps=1000), LATENCY_5),
        (PACKAGE, by_the_package, WITHIN_5),
    ],
}  # fmt: skip

# What the check is about to measure of each, in their order: honest claims, means of the record.
EXPECTED = dict(zip(capstone.DESIGNS, (2.88, 2.96, 2.97, 2.94, 2.89), strict=True))

RIGHT = {
    "07.1": [counted, counted_by_difference],
    "07.2": [bought, bought_by_search],
    "07.3": [rated, rated_from_above, rated_by_increments],
    "07.4": [chosen, chosen_in_one_go],
    "07.5": [
        a_recipe(EXPECTED[name], **capstone.plain(design))
        for name, design in capstone.DESIGNS.items()
    ],
}

SLOW_WRONG = {
    "07.5": [
        ("no claims", lambda: dict(BASE), CLAIMS_5),
        ("claims of text", lambda: BASE | {"claims": "true"}, CLAIMS_5),
        ("a claim left out", lambda: BASE | {"claims": {"stored_params": 1}}, CLAIMS_5),
        ("a claim of text", a_recipe(claims={"stored_params": "120928"}), CLAIMS_5),
        ("a claim that is NaN", a_recipe(claims={"held_out_bits": math.nan}), CLAIMS_5),
        ("a claim that is infinite", a_recipe(claims={"held_out_bits": math.inf}), CLAIMS_5),
        ("a claim more", a_recipe(claims={"passed": 1}), CLAIMS_5),
        ("a claim of 10^5000", a_recipe(claims={"stored_params": 10**5000}), CLAIMS_5),
        ("one weight too many", a_recipe(claims={"stored_params": CLAIMED["stored_params"] + 1}), CLAIMS_5),
        ("embedding used", a_recipe(claims={"used_params": CLAIMED["used_params"] + 256 * 32}), CLAIMS_5),
        ("FLOPs of a rounded budget", a_recipe(claims={"training_flops": capstone.BUDGET}), CLAIMS_5),
        ("experts of parameters, shared left out", a_recipe(claims={"stored_per_used": 32.0}), CLAIMS_5),
        ("B · k experts read", a_recipe(claims={"experts_read_at_16": 32.0}), CLAIMS_5),
        ("repeated draws", a_recipe(claims={"experts_read_at_16": 32 * (1 - (31 / 32) ** 32)}), CLAIMS_5),
        ("never compute-bound", a_recipe(claims={"compute_bound_from": 0}), CLAIMS_5),
        ("one batch too late", a_recipe(claims={"compute_bound_from": CLAIMED["compute_bound_from"] + 1}), CLAIMS_5),
        ("claims of another design", lambda: BASE | {"experts": 16, "claims": CLAIMED}, CLAIMS_5),
        ("a loss that it does not have", a_recipe(bits=0.9 * BITS), HONEST_5),
        ("a loss of 0", a_recipe(bits=0), HONEST_5),
        ("hardly a learning rate", a_recipe(peak_lr=1e-5), TRAINED_5),
        ("a schedule that is 0", a_recipe(schedule=[(0.0, 0.0), (1.0, 0.0)]), TRAINED_5),
        ("a tenth of the steps", a_recipe(steps=STEPS // 10), TRAINED_5),
        ("too high a rate", a_recipe(peak_lr=0.1, schedule=[(0.0, 1.0), (1.0, 1.0)], weight_decay=0.0), TRAINED_5),
        ("balance is all", a_recipe(strength=100.0), TRAINED_5),
        ("half of it shared, two experts", a_recipe(experts=2, k=1, hidden=64, shared=64, gate="softmax", steps=4000), TRAINED_5),
        ("a router left alone", a_recipe(cure="none", strength=0.0), TRAINED_5),
        ("a router left alone, with fine experts", a_recipe(bits=2.95, **FINE | {"cure": "none"}), BALANCED_5),
        ("a bias of too small a step", a_recipe(gate="sigmoid", cure="bias", strength=1e-6), TRAINED_5),
    ]
}  # fmt: skip
