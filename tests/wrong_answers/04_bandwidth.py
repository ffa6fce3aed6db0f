"""Answers to exercise 04 that must fail, each with the invariant that catches it, and others that must pass.

WRONG[question] is a list of (what is wrong, answer, name of the invariant that must fail first).
RIGHT[question] is a list of answers written differently from the worked solution.
"""

import math
import random
from functools import cache, partial
from itertools import combinations, groupby

import numpy as np
import torch
import torch.nn.functional as F

from moe_course import costs, quant
from moe_course.costs import placement
from moe_course.specs import FFN, GQA, MLA, ModelSpec

PACKAGE = "the package's own function"


# 04.1


def step(
    kernels,
    tflops,
    gb_s,
    launch_us,
    *,
    each=lambda c, m, launch: max(c, m) + launch,
    tera=1e12,
    giga=1e9,
    micro=1e-6,
    order=("memory", "compute", "launch"),
    tie="memory",
    count=False,
    sums=False,
    launches=None,
    launched=True,
    scale=1.0,
):
    launch = launch_us * micro
    spent, seconds = dict.fromkeys(order, 0.0), 0.0
    for flops, size in kernels:
        c, m = flops / (tflops * tera), size / (gb_s * giga)
        seconds += each(c, m, launch)
        bound = tie if c == m else "compute" if c > m else "memory"
        if sums:
            spent["compute"] += c
            spent["memory"] += m
        else:
            spent[bound] += 1 if count else max(c, m)
    number = len(kernels) if launches is None else launches
    if launched and "launch" in spent:
        spent["launch"] = number * (1e-9 if count else launch)
    return seconds * scale, max(order, key=lambda what: spent[what])


def step_in_microseconds(kernels, tflops, gb_s, launch_us):
    """Everything in microseconds; lists instead of sums."""
    compute, memory = [], []
    for flops, size in kernels:
        c, m = flops / tflops / 1e6, size / gb_s / 1e3
        (compute if c > m else memory).append(max(c, m))
    parts = [sum(memory), sum(compute), len(kernels) * launch_us]
    what = ["memory", "compute", "launch"][parts.index(max(parts))]
    return sum(parts) / 1e6, what


def step_in_numpy(kernels, tflops, gb_s, launch_us):
    table = np.array(kernels, dtype=float).reshape(-1, 2)
    times = table / [tflops * 1e12, gb_s * 1e9]
    longer, bound = times.max(axis=1), times[:, 0] > times[:, 1]
    parts = [longer[~bound].sum(), longer[bound].sum(), len(table) * launch_us / 1e6]
    return float(sum(parts)), ("memory", "compute", "launch")[int(np.argmax(parts))]


def step_by_intensity(kernels, tflops, gb_s, launch_us):
    ridge = tflops * 1e3 / gb_s
    spent = [0.0, 0.0, len(kernels) * launch_us * 1e-6]
    for flops, size in kernels:
        if flops > ridge * size:
            spent[1] += flops / tflops * 1e-12
        else:
            spent[0] += size / gb_s * 1e-9
    return [math.fsum(spent), ("memory", "compute", "launch")[spent.index(max(spent))]]


def step_roofline(kernels, tflops, gb_s, launch_us):
    compute = sum(f for f, _ in kernels) / tflops / 1e12
    memory = sum(b for _, b in kernels) / gb_s / 1e9
    launch = len(kernels) * launch_us * 1e-6
    bound = "memory" if memory >= compute else "compute"
    return max(compute, memory) + launch, bound if launch <= max(compute, memory) else "launch"  # fmt: skip


def step_of_longest(kernels, tflops, gb_s, launch_us):
    """The bound of the longest kernel."""
    seconds, _ = step(kernels, tflops, gb_s, launch_us)
    times = [(f / tflops / 1e12, b / gb_s / 1e9) for f, b in kernels]
    compute, memory = max(times, key=max, default=(0, 0))
    return seconds, "compute" if compute > memory else "memory"


def step_by_majority(kernels, tflops, gb_s, launch_us):
    """Launching where it is more than half; else the longer of the others."""
    seconds, bound = step(kernels, tflops, gb_s, launch_us)
    if bound == "launch" and len(kernels) * launch_us * 2e-6 <= seconds:
        return seconds, step(kernels, tflops, gb_s, 0)[1]
    return seconds, bound


def step_never_empty(kernels, tflops, gb_s, launch_us):
    seconds, bound = step(kernels, tflops, gb_s, launch_us)
    return seconds, bound if kernels else "launch"


def step_fails_when_empty(kernels, tflops, gb_s, launch_us):
    max(max(kernel) for kernel in kernels)
    return step(kernels, tflops, gb_s, launch_us)


def step_changes_its_argument(kernels, tflops, gb_s, launch_us):
    answer = step(kernels, tflops, gb_s, launch_us)
    kernels.sort()
    kernels.append((0, 0))
    return answer


def step_by_the_package(kernels, tflops, gb_s, launch_us):
    seconds, kinds = 0.0, {"memory": 0.0, "compute": 0.0}
    for flops, size in kernels:
        one = costs.Step(
            1, flops, size, 0, 0, size / gb_s / 1e9, flops / tflops / 1e12, 0, 0, 1
        )
        kinds[one.bound] += one.time_s
        seconds += one.time_s + launch_us * 1e-6
    launch = len(kernels) * launch_us * 1e-6
    return seconds, "launch" if launch > max(kinds.values()) else max(kinds, key=kinds.get)  # fmt: skip


# 04.2


def distinct(
    shares,
    tokens,
    k,
    *,
    chance=lambda share, k: k * share,
    power=lambda n, k: n,
    join="product",
    even=False,
    clamp=1.0,
):
    experts = len(shares[0])
    if even:
        shares = [[1 / experts] * experts for _ in shares]
    if join == "pooled":
        total = sum(tokens) or 1
        shares = [
            [
                sum(n * s for n, s in zip(tokens, c, strict=False)) / total
                for c in zip(*shares, strict=False)
            ]
        ]
        tokens = [total if sum(tokens) else 0]
    if join == "averaged":
        shares = [[sum(c) / len(c) for c in zip(*shares, strict=False)]]
        tokens = [sum(tokens)]
    missed = [
        [max(0.0, 1 - chance(s, k)) ** power(n, k) for s in row]
        for row, n in zip(shares, tokens, strict=True)
    ]
    if join in ("sum", "max", "last"):
        own = [sum(1 - m for m in row) for row in missed]
        return {"sum": sum(own), "max": max(own), "last": own[-1]}[join]
    if join == "added chances":
        return float(
            sum(min(clamp, sum(1 - m for m in c)) for c in zip(*missed, strict=False))
        )
    if join == "largest chance":
        return float(sum(max(1 - m for m in c) for c in zip(*missed, strict=False)))
    return float(sum(1 - math.prod(c) for c in zip(*missed, strict=False)))


def distinct_in_torch(shares, tokens, k):
    missed = 1 - k * torch.tensor(shares, dtype=torch.float64)
    powers = missed.clamp(min=0) ** torch.tensor(tokens, dtype=torch.float64)[:, None]
    return (1 - powers.prod(0)).sum().item()


def distinct_in_numpy(shares, tokens, k):
    missed = 1 - k * np.array(shares)
    missed = np.prod(missed ** np.array(tokens)[:, None], axis=0)
    return float(len(shares[0]) - missed.sum())


def distinct_token_by_token(shares, tokens, k):
    """A chance that an expert is read already, updated by each token."""
    read = [0.0] * len(shares[0])
    for row, count in zip(shares, tokens, strict=True):
        for _ in range(count):
            read = [
                r + (1 - r) * min(1.0, k * s) for r, s in zip(read, row, strict=False)
            ]
    return sum(read)


def distinct_by_logarithms(shares, tokens, k):
    """log(0) where every token has an expert."""
    return sum(
        -math.expm1(
            sum(n * math.log1p(-k * s) for n, s in zip(tokens, c, strict=False))
        )
        for c in zip(*shares, strict=False)
    )


def distinct_in_float32(shares, tokens, k):
    missed = 1 - k * torch.tensor(shares)
    return (1 - (missed ** torch.tensor(tokens)[:, None]).prod(0)).sum().item()


def distinct_by_simulation(shares, tokens, k):
    rng, runs, seen = random.Random(0), 300, 0
    for _ in range(runs):
        for column in zip(*shares, strict=True):
            seen += any(
                rng.random() < k * s
                for s, n in zip(column, tokens, strict=False)
                for _ in range(n)
            )
    return seen / runs


def distinct_at_least_k(shares, tokens, k):
    """Never below k, as if there always were a token."""
    return max(float(k), distinct(shares, tokens, k))


def distinct_rounded(shares, tokens, k):
    return float(round(distinct(shares, tokens, k)))


def distinct_by_the_package(shares, tokens, k):
    total = sum(tokens)
    inclusion = [
        k * sum(n * s for n, s in zip(tokens, column, strict=False)) / max(1, total)
        for column in zip(*shares, strict=False)
    ]
    return costs.expected_distinct_experts(len(inclusion), k, total, inclusion)


# 04.3


def touched(model, batch):
    if not model["experts"]:
        return 0.0
    return model["experts"] * (1 - (1 - model["k"] / model["experts"]) ** batch)


def leading(
    a,
    b,
    bandwidth,
    flop_rate,
    most,
    *,
    experts=touched,
    longer=max,
    caches=lambda batch: batch,
    work=lambda batch: batch,
    fixed=1,
    cached=1,
    tie="stays",
    batches=None,
    last=0,
    shift=0,
    only=None,
    first_tie="a",
):
    def time(model, batch):
        read = (
            fixed * model["fixed_bytes"] + experts(model, batch) * model["expert_bytes"]
        )
        read += cached * caches(batch) * model["cache_bytes"]
        return longer(read / bandwidth, work(batch) * model["flops"] / flop_rate)

    found = []
    for batch in batches(most) if batches else range(1, most + 1 + last):
        of_a, of_b = time(a, batch), time(b, batch)
        faster = "a" if of_a < of_b else "b"
        if of_a == of_b:
            if not found:
                faster = first_tie
            elif tie == "stays":
                faster = found[-1][1]
            elif tie == "a":
                faster = "a"
        if not found or faster != found[-1][1]:
            found.append((batch - shift if found else batch, faster))
    return found[:only]


def powers_of_two(most):
    return [1 << i for i in range(most.bit_length())]


def grid(most):
    """The package's: eight steps from one power of two to the next."""
    points = sorted({round(2 ** (i / 8)) for i in range(8 * 16 + 1)} | {1, most})
    return [batch for batch in points if batch <= most]


def leading_by_halves(a, b, bandwidth, flop_rate, most):
    """One change at most, found by halving."""

    def leader(batch):
        return leading(a, b, bandwidth, flop_rate, batch)[-1][1]

    first = leader(1)
    if leader(most) == first:
        return [(1, first)]
    low, high = 1, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if leader(middle) == first else (low, middle)
    return [(1, first), (high, leader(high))]


def leading_on_grid(a, b, bandwidth, flop_rate, most):
    """Between two points of the grid, halving."""
    points, found = grid(most), []
    whole = leading(a, b, bandwidth, flop_rate, most)

    def leader(batch):
        return [who for first, who in whole if first <= batch][-1]

    for low, high in zip([1, *points], points, strict=False):
        if leader(low) == leader(high):
            continue
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if leader(middle) == leader(low) else (low, middle)  # fmt: skip
        found.append((high, leader(high)))
    return [(1, leader(1)), *found]


def leading_in_numpy(a, b, bandwidth, flop_rate, most):
    batch = np.arange(1, most + 1)

    def times(model):
        missed = 1 - model["k"] / max(1, model["experts"])
        read = model["expert_bytes"] * model["experts"] * (1 - missed**batch)
        read += model["fixed_bytes"] + batch * model["cache_bytes"]
        return np.maximum(read / bandwidth, batch * (model["flops"] / flop_rate))

    difference = np.sign(times(b) - times(a))
    found = [(1, "b" if difference[0] < 0 else "a")]
    for place in np.flatnonzero(difference):
        who = "a" if difference[place] > 0 else "b"
        if who != found[-1][1]:
            found.append((int(place) + 1, who))
    return found


def leading_by_groups(a, b, bandwidth, flop_rate, most):
    @cache
    def time(name, batch):
        model = {"a": a, "b": b}[name]
        expected, left = 0.0, 1.0
        if model["experts"] > 0:
            left = (1 - model["k"] / model["experts"]) ** batch
            expected = model["experts"] - model["experts"] * left
        nbytes = sum(
            (
                model["fixed_bytes"],
                expected * model["expert_bytes"],
                batch * model["cache_bytes"],
            )
        )
        return max(nbytes / bandwidth, model["flops"] * batch / flop_rate)

    leaders, now = [], "a" if time("a", 1) <= time("b", 1) else "b"
    for batch in range(1, most + 1):
        other = "b" if now == "a" else "a"
        if time(other, batch) < time(now, batch):
            now = other
        leaders.append((now, batch))
    return [[next(group)[1], who] for who, group in groupby(leaders, key=lambda e: e[0])]  # fmt: skip


def leading_by_names(a, b, bandwidth, flop_rate, most):
    """Batches alone."""
    return [first for first, _ in leading(a, b, bandwidth, flop_rate, most)]


def leading_each_batch(a, b, bandwidth, flop_rate, most):
    found = []
    for batch in range(1, most + 1):
        found.append((batch, leading(a, b, bandwidth, flop_rate, batch)[-1][1]))
    return found


def leading_without_the_first(a, b, bandwidth, flop_rate, most):
    return leading(a, b, bandwidth, flop_rate, most)[1:]


def leading_experts_wanted(a, b, bandwidth, flop_rate, most):
    """0/0 where a model is dense."""

    def experts(model, batch):
        return model["experts"] * (1 - (1 - model["k"] / model["experts"]) ** batch)

    return leading(a, b, bandwidth, flop_rate, most, experts=experts)


def leading_sparse_is_a(a, b, bandwidth, flop_rate, most):
    """Takes the experts of a for both."""

    def experts(model, batch):
        return touched(a, batch) if model["experts"] else 0

    return leading(a, b, bandwidth, flop_rate, most, experts=experts)


def leading_changes_its_argument(a, b, bandwidth, flop_rate, most):
    found = leading(a, b, bandwidth, flop_rate, most)
    a["fixed_bytes"] = b["fixed_bytes"]
    a["seen"] = 1
    return found


def leading_by_the_package(a, b, bandwidth, flop_rate, most):
    def experts(model, batch):
        if not model["experts"]:
            return 0.0
        return costs.expected_distinct_experts(model["experts"], model["k"], batch)

    return leading(a, b, bandwidth, flop_rate, most, experts=experts)


# 04.4


def gqa_numbers(a):
    return 2 * a["kv_heads"] * a["head_dim"]


def mla_numbers(a):
    return a["kv_rank"] + a["rope_dim"]


def room(
    attention,
    layers,
    windowed,
    window,
    context,
    params,
    weight_bits,
    cache_bits,
    devices,
    device_gb,
    reserve_gib,
    *,
    gqa=gqa_numbers,
    mla=mla_numbers,
    giga=10**9,
    gibi=2**30,
    reserves=None,
    weight_byte=8,
    cache_byte=8,
    kept=lambda la, w, n, c: (la - w) * c + w * min(n, c),
    round_=math.floor,
    least=0,
    whole_bits=False,
    split=True,
):
    numbers = gqa(attention) if attention["kind"] == "gqa" else mla(attention)
    tokens = kept(layers, windowed, window, context)
    each = numbers * tokens * cache_bits / cache_byte
    if whole_bits:
        weight_bits = int(weight_bits)
    stored = params * weight_bits / weight_byte * (1 if split else devices)
    free = devices * device_gb * giga - (devices if reserves is None else reserves) * reserve_gib * gibi - stored  # fmt: skip
    return max(least, round_(free / each))


def room_in_integers(
    attention, layers, windowed, window, context, params, weight_bits, cache_bits, devices, device_gb, reserve_gib
):  # fmt: skip
    """In sixty-fourths of a bit."""
    if attention["kind"] == "mla":
        a_token = attention["kv_rank"] + attention["rope_dim"]
    else:
        a_token = attention["kv_heads"] * attention["head_dim"] * 2
    bits = 0
    for layer in range(layers):
        bits += a_token * cache_bits * (min(window, context) if layer < windowed else context)  # fmt: skip
    space = 8 * devices * (device_gb * 1_000_000_000 - reserve_gib * 1024**3)
    left = 64 * space - int(64 * weight_bits) * params
    return left // (64 * bits) if left > 0 else 0


def room_by_device(
    attention, layers, windowed, window, context, params, weight_bits, cache_bits, devices, device_gb, reserve_gib
):  # fmt: skip
    per_layer = {"gqa": gqa_numbers, "mla": mla_numbers}[attention["kind"]](attention)
    tokens = layers * context - windowed * max(0, context - window)
    sequence = per_layer * tokens * cache_bits // 8
    total = (device_gb * 10**9 - reserve_gib * 2**30) * devices
    fits, _ = divmod(total - math.ceil(params * weight_bits / 8), sequence)
    return fits if fits > 0 else 0


def room_in_gb(**case):
    """In GB, and back: what just fits falls short, or what does not fits."""
    attention = case["attention"]
    numbers = gqa_numbers(attention) if attention["kind"] == "gqa" else mla_numbers(attention)  # fmt: skip
    tokens = (case["layers"] - case["windowed"]) * case["context"]
    tokens += case["windowed"] * min(case["window"], case["context"])
    each = numbers * tokens * case["cache_bits"] / 8 / 1e9 * (1 + 1e-15)
    free = case["devices"] * (case["device_gb"] - case["reserve_gib"] * 1.073741824)
    return max(0, int((free - case["params"] * case["weight_bits"] / 8e9) / each))


def room_one_attention(**case):
    """Latent attention taken for grouped heads."""
    attention = case["attention"]
    if attention["kind"] == "mla":
        attention = {"kind": "gqa", "kv_heads": attention["heads"], "head_dim": attention["head_dim"]}  # fmt: skip
    return room(**case | {"attention": attention})


def room_each_device(**case):
    """Sequences of one device, times devices: rounded down on each."""
    one = case | {"devices": 1, "params": case["params"] / case["devices"]}
    return case["devices"] * room(**one)


def room_by_the_package(**case):
    a = case["attention"]
    attention = (
        GQA(a["heads"], a["kv_heads"], a["head_dim"])
        if a["kind"] == "gqa"
        else MLA(a["heads"], None, a["kv_rank"], a["head_dim"], a["rope_dim"], a["head_dim"])
    )  # fmt: skip
    spec = ModelSpec("answer", case["layers"], 1024, 1000, attention, FFN(1024))
    each = costs.cache_bytes(spec, 1, case["context"])
    return int(case["devices"] * case["device_gb"] * 10**9 // each)


# 04.5


def four_bits(
    weight,
    group,
    *,
    most=7,
    offset=8,
    low_first=False,
    signed=False,
    dtype=torch.float16,
    fill=8,
    pad=False,
    nan=False,
    halves=False,
    truncate=False,
    dim=1,
    bits=None,
    wide=True,
    stored=True,
    clamp=True,
    absolute=True,
):
    numbers = weight.float() if wide else weight
    columns = numbers.shape[1]
    parts = numbers.split(group, dim=1)
    own = [(p.abs() if absolute else p).amax(1) / most for p in parts]
    scales = torch.stack(own, 1).to(dtype)
    used = scales.float() if stored else torch.stack(own, 1).float()
    of_each = used.repeat_interleave(group, 1)[:, :columns]
    ratio = numbers.float() / of_each
    if not nan:
        ratio = ratio.nan_to_num(0.0, 0.0, 0.0)
    whole = ratio.trunc() if truncate else ratio.round()
    if clamp:
        whole = whole.clamp(-most, most)
    codes = whole.to(torch.int64) & 0xF if signed else whole + offset
    filler = 0 if signed else fill
    if pad:
        codes = F.pad(codes, (0, -columns % group), value=filler)
    codes = F.pad(codes, (0, codes.shape[1] % 2), value=filler).to(torch.uint8)
    if halves:
        first, second = codes.chunk(2, 1)
    else:
        first, second = codes[:, ::2], codes[:, 1::2]
    packed = second << 4 | first if low_first else first << 4 | second
    cost = 8 * (packed.nbytes + scales.nbytes) / weight.numel()
    return packed, scales, cost if bits is None else bits(weight, packed, scales, group)


def four_bits_by_loop(weight, group):
    table, scales = [], []
    for row in weight.double().tolist():
        integers, of_row = [], []
        for start in range(0, len(row), group):
            chunk = row[start : start + group]
            scale = float(np.float16(np.float32(max(max(chunk), -min(chunk))) / np.float32(7)))  # fmt: skip
            of_row.append(scale)
            for number in chunk:
                near = math.floor(number / scale + 0.5) if scale else 0
                integers.append(min(15, max(1, near + 8)))
        if len(integers) % 2:
            integers.append(8)
        table.append(
            [16 * x + y for x, y in zip(integers[::2], integers[1::2], strict=False)]
        )
        scales.append(of_row)
    packed = torch.tensor(table, dtype=torch.uint8)
    scales = torch.tensor(scales, dtype=torch.half)
    stored = packed.numel() + 2 * scales.numel()
    return packed, scales, stored * 8 / weight.numel()


def four_bits_by_padding(weight, group):
    """Padded to whole groups for the arithmetic, cut for storage."""
    rows, columns = weight.shape
    padded = F.pad(weight.to(torch.float32), (0, -columns % group))
    grouped = padded.view(rows, -1, group)
    scales = (grouped.abs().max(dim=-1).values / 7).to(torch.float16)
    safe = scales.float().masked_fill(scales == 0, 1.0).unsqueeze(-1)
    codes = torch.clip(torch.round(grouped / safe), -7, 7).add(8).view(rows, -1)
    codes = codes[:, : columns + columns % 2] if padded.shape[1] > columns else codes[:, :columns]  # fmt: skip
    if codes.shape[1] % 2:
        codes = torch.cat([codes, torch.full((rows, 1), 8.0)], 1)
    packed = (16 * codes[:, 0::2] + codes[:, 1::2]).to(torch.uint8)
    bits = (packed.numel() * 8 + scales.numel() * 16) / (rows * columns)
    return [packed, scales, bits]


def four_bits_in_numpy(weight, group):
    w = weight.float().numpy()
    starts = np.arange(0, w.shape[1], group)
    scales = (np.maximum.reduceat(np.abs(w), starts, axis=1) / np.float32(7)).astype(np.float16)  # fmt: skip
    each = np.repeat(scales.astype(np.float32), group, axis=1)[:, : w.shape[1]]
    safe = np.where(each == 0, 1, each)
    codes = np.clip(np.rint(w / safe), -7, 7).astype(np.int16) + 8
    if codes.shape[1] % 2:
        codes = np.pad(codes, ((0, 0), (0, 1)), constant_values=8)
    packed = (codes[:, ::2] * 16 + codes[:, 1::2]).astype(np.uint8)
    cost = 8 * (packed.size + 2 * scales.size) / w.size
    return torch.from_numpy(packed), torch.from_numpy(scales), cost


def four_bits_flat(weight, group):
    """Groups and bytes run on from row to row."""
    packed, scales, bits = four_bits(weight.reshape(1, -1), group)
    rows = len(weight)
    if packed.numel() % rows or scales.numel() % rows:
        return packed, scales, bits
    return packed.view(rows, -1), scales.view(rows, -1), bits


def four_bits_flat_bytes(weight, group):
    """Rows share a byte where they are odd."""
    columns = weight.shape[1]
    packed, scales, bits = four_bits(weight, group)
    codes = torch.stack([packed >> 4, packed & 15], -1).flatten(1)[:, :columns]
    flat = F.pad(codes.flatten(), (0, codes.numel() % 2), value=8)
    joint = flat[::2] << 4 | flat[1::2]
    if joint.numel() != packed.numel():
        return joint[None], scales, bits
    return joint.view_as(packed), scales, bits


def four_bits_one_scale(weight, group):
    packed, scales, bits = four_bits(weight, weight.shape[1])
    return packed, scales.expand(-1, -(-weight.shape[1] // group)).clone(), bits


def four_bits_last_group_borrows(weight, group):
    """A short last group has no scale of its own, but that of the group before."""
    packed, scales, bits = four_bits(weight, group)
    if weight.shape[1] % group and scales.shape[1] > 1:
        scales[:, -1] = scales[:, -2]
    return packed, scales, bits


def four_bits_changes_its_argument(weight, group):
    answer = four_bits(weight, group)
    weight.mul_(0.5)
    return answer


def four_bits_by_the_package(weight, group):
    stored = quant.quantise(weight.float(), 4, group)
    packed = (stored.values << 4 | stored.values >> 4) ^ 0x88
    return packed, stored.scales.half(), 8 * stored.nbytes() / weight.numel()


# 04.6


def splits(
    expert_ids,
    rank_of,
    row_bytes,
    *,
    slots=False,
    transpose=False,
    same=False,
    own=False,
    home=None,
    dropped=True,
    keep_dropped=False,
    arriving=False,
    ranks=None,
    dtype=torch.int64,
    minus=True,
    both=False,
    first=False,
    real_only=False,
):
    number = ranks or len(expert_ids)
    sent = torch.zeros(number, number, dtype=torch.int64)
    where = rank_of if home is None else home(len(rank_of), number)
    for i, ids in enumerate(expert_ids):
        for row in ids.tolist():
            if real_only and -1 in row:
                continue
            to = [int(where[e]) for e in row if not dropped or e >= 0]
            if keep_dropped and not to:
                to = [i]
            to = to[:1] if first else to if slots else set(to)
            for j in to:
                sent[i, j] += 1
    if own:
        sent = sent - sent.diag().diag()
    if transpose:
        sent = sent.T.contiguous()
    received = sent.clone() if same else sent.T.contiguous()
    away = (received if arriving else sent).clone()
    leaving = (away.sum(1) - minus * away.diagonal()) * row_bytes
    if both:
        leaving = leaving + (received.sum(1) - received.diagonal()) * row_bytes
    return sent.to(dtype), received.to(dtype), leaving.to(dtype)


def splits_by_one_hot(expert_ids, rank_of, row_bytes):
    ranks = len(expert_ids)
    places = torch.cat([rank_of, torch.tensor([ranks])])  # of -1: nowhere
    rows = []
    for ids in expert_ids:
        hot = F.one_hot(places[ids.long()], ranks + 1)[..., :ranks]  # [T, K, R]
        rows.append(hot.amax(1).sum(0) if len(ids) else torch.zeros(ranks).long())
    sent = torch.stack(rows)
    away = sent.clone().fill_diagonal_(0)
    return sent, sent.T, away.sum(1) * row_bytes


def splits_by_scatter(expert_ids, rank_of, row_bytes):
    ranks, lines = len(expert_ids), []
    for ids in expert_ids:
        goes = torch.zeros(len(ids), ranks + 1, dtype=torch.bool)
        to = torch.where(ids < 0, ranks, rank_of[ids.long().clamp(min=0)])
        goes.scatter_(1, to, True)
        lines.append(goes[:, :ranks].sum(0).tolist())
    sent = torch.tensor(lines)
    leaving = [row_bytes * (sum(line) - line[i]) for i, line in enumerate(lines)]
    return (
        sent,
        torch.tensor(list(map(list, zip(*lines, strict=False)))),
        torch.tensor(leaving),
    )


def splits_in_numpy(expert_ids, rank_of, row_bytes):
    ranks, home = len(expert_ids), rank_of.numpy()
    sent = np.zeros((ranks, ranks), dtype=np.int64)
    for i, ids in enumerate(expert_ids):
        for row in ids.numpy():
            np.add.at(sent, (i, np.unique(home[row[row >= 0]])), 1)
    leaving = (sent.sum(1) - np.diag(sent)) * row_bytes
    return [torch.from_numpy(part.copy()) for part in (sent, sent.T, leaving)]


def splits_contiguous(num_experts, ranks):
    each = -(-num_experts // ranks)
    return [e // each for e in range(num_experts)]


def splits_round_robin(num_experts, ranks):
    return [e % ranks for e in range(num_experts)]


def splits_ranks_of_experts(expert_ids, rank_of, row_bytes):
    """As many ranks as hold experts."""
    return splits(expert_ids, rank_of, row_bytes, ranks=int(rank_of.max()) + 1)


def splits_need_tokens(expert_ids, rank_of, row_bytes):
    for ids in expert_ids:
        ids.max()
    return splits(expert_ids, rank_of, row_bytes)


def splits_unique_experts(expert_ids, rank_of, row_bytes):
    """Once for each different expert of a rank's tokens together."""
    merged = [torch.unique(ids)[:, None] for ids in expert_ids]
    return splits(merged, rank_of, row_bytes, slots=True)


def splits_merged_neighbours(expert_ids, rank_of, row_bytes):
    """unique_consecutive, without sorting."""
    sent = torch.zeros(len(expert_ids), len(expert_ids), dtype=torch.int64)
    for i, ids in enumerate(expert_ids):
        for row in ids.tolist():
            for j, _ in groupby(int(rank_of[e]) for e in row if e >= 0):
                sent[i, j] += 1
    return sent, sent.T, (sent.sum(1) - sent.diagonal()) * row_bytes


def splits_mask_after(expert_ids, rank_of, row_bytes):
    """Takes off the dropped ones from the last expert's rank, also where they were counted once or twice."""
    sent, _, _ = splits(expert_ids, rank_of, row_bytes, dropped=False)
    for i, ids in enumerate(expert_ids):
        sent[i, int(rank_of[-1])] -= (ids < 0).sum()
    away = (sent.sum(1) - sent.diagonal()) * row_bytes
    return sent, sent.T.contiguous(), away


def splits_lists(expert_ids, rank_of, row_bytes):
    return tuple(part.tolist() for part in splits(expert_ids, rank_of, row_bytes))


def splits_by_the_package(expert_ids, rank_of, row_bytes):
    sent, received, leaving = splits(expert_ids, rank_of, row_bytes)
    costs.all_to_all_bytes(len(expert_ids[0]), row_bytes, 1, len(expert_ids), 1)
    return sent, received, leaving


# 04.7


def waited(loads, placed, ranks):
    return sum(
        max(
            sum(x for x, r in zip(batch, placed, strict=False) if r == rank)
            for rank in range(ranks)
        )
        for batch in loads
    )


def exchange(loads, placed, ranks):
    placed = list(placed)
    least, again = waited(loads, placed, ranks), True
    while again:
        again = False
        for a, b in combinations(range(len(placed)), 2):
            placed[a], placed[b] = placed[b], placed[a]
            now = waited(loads, placed, ranks)
            if now < least:
                least, again = now, True
            else:
                placed[a], placed[b] = placed[b], placed[a]
    return placed


def greedy(loads, ranks, *, limit=True, key=sum, spread=False):
    """Heaviest expert first, to where the sum of the fullest ranks grows least."""
    experts = len(loads[0])
    room = experts // ranks if limit else experts
    totals = np.zeros((len(loads), ranks))
    held, placed = [0] * ranks, [0] * experts
    columns = list(zip(*loads, strict=False))
    for e in sorted(range(experts), key=lambda e: -key(columns[e])):
        best = None
        for rank in range(ranks):
            if held[rank] == room:
                continue
            after = totals.copy()
            after[:, rank] += columns[e]
            score = (after.max(1).sum(), after[:, rank].sum())
            if best is None or score < best[0]:
                best = (score, rank, after)
        _, rank, totals = best
        placed[e] = rank
        held[rank] += 1
    return placed


def place_greedy(loads, ranks):
    return greedy(loads, ranks)


def place_mended_greedy(loads, ranks):
    return exchange(loads, greedy(loads, ranks), ranks)


def place_many_starts(loads, ranks):
    """From random placements; the best of some."""
    rng, found = np.random.default_rng(0), []
    array = np.array(loads)

    def cost(placed):
        hot = np.eye(ranks, dtype=int)[placed]
        return (array @ hot).max(1).sum()

    for _ in range(6):
        placed = rng.permutation(np.arange(array.shape[1]) % ranks)
        least, again = cost(placed), True
        while again:
            again = False
            for a in range(len(placed)):
                for b in range(a):
                    placed[[a, b]] = placed[[b, a]]
                    now = cost(placed)
                    if now < least:
                        least, again = now, True
                    else:
                        placed[[a, b]] = placed[[b, a]]
        found.append((least, placed.tolist()))
    return min(found)[1]


def place_steepest(loads, ranks):
    """Always the exchange that helps most; in torch."""
    table = torch.tensor(loads, dtype=torch.float64)
    placed = torch.arange(table.shape[1]) % ranks

    def cost(placed):
        totals = table.new_zeros(len(table), ranks).index_add(1, placed, table)
        return totals.amax(1).sum().item()

    while True:
        least, best = cost(placed), None
        for a, b in combinations(range(len(placed)), 2):
            other = placed.clone()
            other[a], other[b] = placed[b], placed[a]
            if cost(other) < least:
                least, best = cost(other), other
        if best is None:
            return placed.tolist()
        placed = best


def contiguous(loads, ranks):
    experts = len(loads[0])
    return [e * ranks // experts for e in range(experts)]


def round_robin(loads, ranks):
    return [e % ranks for e in range(len(loads[0]))]


def pooled(loads, ranks):
    """Heaviest first by the sum over batches: what the package does, written out."""
    sums = [sum(column) for column in zip(*loads, strict=False)]
    room, totals, placed = len(sums) // ranks, [0] * ranks, [0] * len(sums)
    held = [0] * ranks
    for e in sorted(range(len(sums)), key=lambda e: -sums[e]):
        rank = min((r for r in range(ranks) if held[r] < room), key=lambda r: totals[r])
        placed[e] = rank
        totals[rank] += sums[e]
        held[rank] += 1
    return placed


def pooled_and_exchanged(loads, ranks):
    sums = [[sum(column) for column in zip(*loads, strict=False)]]
    return exchange(sums, pooled(loads, ranks), ranks)


def first_batch(loads, ranks):
    return exchange(loads[:1], round_robin(loads, ranks), ranks)


def last_batch(loads, ranks):
    return exchange(loads[-1:], round_robin(loads, ranks), ranks)


def snake(loads, ranks):
    sums = [sum(column) for column in zip(*loads, strict=False)]
    placed = [0] * len(sums)
    for place, e in enumerate(sorted(range(len(sums)), key=lambda e: -sums[e])):
        lap, at = divmod(place, ranks)
        placed[e] = at if lap % 2 == 0 else ranks - 1 - at
    return placed


def random_placement(loads, ranks):
    placed = round_robin(loads, ranks)
    random.Random(0).shuffle(placed)
    return placed


def unlimited(loads, ranks):
    """As many experts on a rank as please it."""
    return greedy(loads, ranks, limit=False)


def by_rank(loads, ranks):
    """The experts of each rank, not the rank of each expert."""
    placed = place_mended_greedy(loads, ranks)
    return [[e for e, r in enumerate(placed) if r == rank] for rank in range(ranks)]


def from_one(loads, ranks):
    return [rank + 1 for rank in place_mended_greedy(loads, ranks)]


def as_tensor(loads, ranks):
    return torch.tensor(place_mended_greedy(loads, ranks))


def of_numpy(loads, ranks):
    return list(np.array(place_mended_greedy(loads, ranks)))


def least_total(loads, ranks):
    """Exchanges for the even sum of squares of all loads: the same for every batch together."""
    sums = [sum(column) for column in zip(*loads, strict=False)]
    return exchange([sums], round_robin(loads, ranks), ranks)


def worst_batch_only(loads, ranks):
    """Looks at the batch with the most load alone."""
    return exchange([max(loads, key=sum)], round_robin(loads, ranks), ranks)


def one_pass(loads, ranks):
    """Exchanges neighbours once."""
    placed = pooled(loads, ranks)
    for a in range(len(placed) - 1):
        other = list(placed)
        other[a], other[a + 1] = placed[a + 1], placed[a]
        if waited(loads, other, ranks) < waited(loads, placed, ranks):
            placed = other
    return placed


def needs_two_ranks(loads, ranks):
    if ranks == 1:
        return [1 for _ in loads[0]]
    return place_mended_greedy(loads, ranks)


def small_only(loads, ranks):
    """The best of a small case; of a large one, what comes first."""
    if len(loads[0]) > 10:
        return contiguous(loads, ranks)
    return place_mended_greedy(loads, ranks)


def fails_without_load(loads, ranks):
    placed = place_mended_greedy(loads, ranks)
    return placed[: int(len(placed) * max(map(max, loads)) / max(map(max, loads)))]


def changes_loads(loads, ranks):
    placed = place_mended_greedy(loads, ranks)
    loads[0][0] += 1
    return placed


def placed_by_the_package(loads, ranks):
    sums = [sum(column) for column in zip(*loads, strict=False)]
    return placement.by_load(sums, ranks)


TIME_1 = (
    "adds up kernels, each as long as the longer of its two times, and their launches"
)
BOUND_1 = "says where most of the time goes, of ties and of no kernels, too"
VALUES_2 = "is the sum over experts of the chance that some token has it"
LIMITS_2 = "at the edges: no tokens, every expert for each, one that nobody has"
CHANGE_3, SHORT_3, LIMITS_3 = (
    "names each leader with its first batch, in three regimes",
    "misses no lead, however short or late",
    "at the edges: ties, dense models, every expert for each, one batch",
)
GQA_4, MLA_4, LIMITS_4 = (
    "counts caches of grouped-query attention beside the weights",
    "counts one latent and one rotary key for latent attention",
    "is exact where it just fits, and 0 where the weights do not",
)
PACKED_5, RAGGED_5, BITS_5 = (
    "stores integers plus 8, the first of two in the high half, and a scale for each group",
    "takes ragged groups, odd rows and groups of zeros",
    "counts every stored bit: integers, scales, fillings",
)
SENT_6, BACK_6, LIMITS_6 = (
    "sends each token once to each rank that holds one of its experts",
    "receives what others send, and counts the bytes that leave",
    "at the edges: no tokens, one rank, dropped choices, idle ranks",
)
HOT_7, MENDED_7, LIMITS_7 = (
    "parts experts that are hot at the same time",
    "is nearly the best where a greedy rule is not",
    "at the edges: one rank, one expert a rank, no load",
)


def but(function, **other):
    return partial(function, **other)


WRONG = {
    "04.1": [
        ("the roofline of the whole step", step_roofline, TIME_1),
        ("both times added up", but(step, each=lambda c, m, launch: c + m + launch), TIME_1),
        ("the shorter time", but(step, each=lambda c, m, launch: min(c, m) + launch), TIME_1),
        ("arithmetic alone", but(step, each=lambda c, m, launch: c + launch), TIME_1),
        ("traffic alone", but(step, each=lambda c, m, launch: m + launch), TIME_1),
        ("launching hidden", but(step, each=lambda c, m, launch: max(c, m, launch)), TIME_1),
        ("launching hidden behind arithmetic", but(step, each=lambda c, m, launch: max(c + launch, m)), TIME_1),
        ("launching forgotten", but(step, each=lambda c, m, launch: max(c, m)), TIME_1),
        ("launches in milliseconds", but(step, micro=1e-3), TIME_1),
        ("launches in nanoseconds", but(step, micro=1e-9), TIME_1),
        ("GiB/s", but(step, giga=2**30), TIME_1),
        ("tera of 2^40", but(step, tera=2**40), TIME_1),
        ("binary units", but(step, tera=2**40, giga=2**30), TIME_1),
        ("giga for tera", but(step, tera=1e9), TIME_1),
        ("milliseconds", but(step, scale=1e3), TIME_1),
        ("seconds alone", lambda **c: step(**c)[0], TIME_1),
        ("numpy's floats", lambda **c: (np.float64(step(**c)[0]), step(**c)[1]), TIME_1),
        ("a tensor", lambda **c: (torch.tensor(step(**c)[0]), step(**c)[1]), TIME_1),
        ("the bound first", lambda **c: step(**c)[::-1], TIME_1),
        ("0 kernels at least", lambda **c: (0.0, "memory"), TIME_1),
        ("changes its argument", step_changes_its_argument, TIME_1),
        ("always memory", lambda **c: (step(**c)[0], "memory"), BOUND_1),
        ("the bound of the sums", but(step, sums=True), BOUND_1),
        ("the bound of most kernels", but(step, count=True), BOUND_1),
        ("the bound of the longest kernel", step_of_longest, BOUND_1),
        ("launching is no bound", but(step, order=("memory", "compute")), BOUND_1),
        ("one launch", but(step, launches=1), BOUND_1),
        ("more than half of the time", step_by_majority, BOUND_1),
        ("equal kernels once", lambda **c: step(**c | {"kernels": list(dict.fromkeys(c["kernels"]))}), TIME_1),
        ("ties are compute's", but(step, tie="compute"), BOUND_1),
        ("another order", but(step, order=("compute", "memory", "launch")), BOUND_1),
        ("an order from launch", but(step, order=("launch", "memory", "compute")), BOUND_1),
        ("no kernels are launching", step_never_empty, BOUND_1),
        ("no kernels are an error", step_fails_when_empty, BOUND_1),
        ("capitals", lambda **c: (step(**c)[0], step(**c)[1].title()), BOUND_1),
        (PACKAGE, step_by_the_package, TIME_1),
    ],
    "04.2": [
        ("B·k", lambda shares, tokens, k: float(k * sum(tokens)), VALUES_2),
        ("B·k, up to E", lambda shares, tokens, k: float(min(len(shares[0]), k * sum(tokens))), VALUES_2),
        ("draws with repetition", but(distinct, chance=lambda s, k: s, power=lambda n, k: n * k), VALUES_2),
        ("one choice", but(distinct, chance=lambda s, k: s), VALUES_2),
        ("one token at least", but(distinct, power=lambda n, k: max(1, n)), LIMITS_2),
        ("k twice", but(distinct, power=lambda n, k: n * k), VALUES_2),
        ("e^-x for (1 - p)^n", but(distinct, chance=lambda s, k: 1 - math.exp(-k * s)), VALUES_2),
        ("even popularity", but(distinct, even=True), VALUES_2),
        ("1 - (1 - s)^k a token", but(distinct, chance=lambda s, k: 1 - (1 - s) ** k), VALUES_2),
        ("one token fewer", but(distinct, power=lambda n, k: max(0, n - 1)), VALUES_2),
        ("a token of each domain", but(distinct, power=lambda n, k: 1), VALUES_2),
        ("pooled domains", but(distinct, join="pooled"), VALUES_2),
        ("averaged domains", but(distinct, join="averaged"), VALUES_2),
        ("a sum over domains", but(distinct, join="sum"), VALUES_2),
        ("the largest domain", but(distinct, join="max"), VALUES_2),
        ("the last domain", but(distinct, join="last"), VALUES_2),
        ("chances to be read added", but(distinct, join="added chances"), VALUES_2),
        ("the largest chance", but(distinct, join="largest chance"), VALUES_2),
        ("simulated", distinct_by_simulation, VALUES_2),
        ("rounded", distinct_rounded, VALUES_2),
        ("in float32", distinct_in_float32, VALUES_2),
        ("how many are missed", lambda **c: len(c["shares"][0]) - distinct(**c), VALUES_2),
        ("a tensor", lambda **c: torch.tensor(distinct(**c), dtype=torch.float64), VALUES_2),
        ("numpy's float", lambda **c: np.float64(distinct(**c)), VALUES_2),
        ("a share of all experts", lambda **c: distinct(**c) / len(c["shares"][0]), VALUES_2),
        ("log of 0", distinct_by_logarithms, LIMITS_2),
        ("k at least", distinct_at_least_k, LIMITS_2),
        ("a chance of 1 cut", but(distinct, chance=lambda s, k: min(0.999, k * s)), LIMITS_2),
        (PACKAGE, distinct_by_the_package, VALUES_2),
    ],
    "04.3": [
        ("all stored experts", but(leading, experts=lambda m, b: m["experts"]), CHANGE_3),
        ("k experts", but(leading, experts=lambda m, b: m["k"]), CHANGE_3),
        ("B·k experts, up to all", but(leading, experts=lambda m, b: min(b * m["k"], m["experts"])), CHANGE_3),
        ("B·k experts", but(leading, experts=lambda m, b: b * m["k"]), CHANGE_3),
        ("experts drawn with repetition", but(leading, experts=lambda m, b: m["experts"] and m["experts"] * (
            1 - (1 - 1 / m["experts"]) ** (m["k"] * b))), CHANGE_3),
        ("one expert for k", but(leading, experts=lambda m, b: m["experts"] and m["experts"] * (
            1 - (1 - 1 / m["experts"]) ** b)), CHANGE_3),
        ("a share of the experts", but(leading, experts=lambda m, b: touched(m, b) / max(1, m["experts"])), CHANGE_3),
        ("times added up", but(leading, longer=lambda m, c: m + c), CHANGE_3),
        ("bytes alone", but(leading, longer=lambda m, c: m), CHANGE_3),
        ("FLOPs alone", but(leading, longer=lambda m, c: c), CHANGE_3),
        ("the shorter time", but(leading, longer=min), CHANGE_3),
        ("one sequence computes", but(leading, work=lambda b: 1), CHANGE_3),
        ("fixed bytes forgotten", but(leading, fixed=0), CHANGE_3),
        ("fixed bytes twice", but(leading, fixed=2), CHANGE_3),
        ("one sequence's cache", but(leading, caches=lambda b: 1), CHANGE_3),
        ("caches forgotten", but(leading, cached=0), CHANGE_3),
        ("one batch later", but(leading, shift=-1), CHANGE_3),
        ("the last of the old leader", but(leading, shift=1), CHANGE_3),
        ("the first change only", but(leading, only=2), CHANGE_3),
        ("changes alone", leading_without_the_first, CHANGE_3),
        ("batches alone", leading_by_names, CHANGE_3),
        ("every batch", leading_each_batch, CHANGE_3),
        ("powers of two", but(leading, batches=powers_of_two), CHANGE_3),
        ("the other's name", lambda **c: leading(**c | {"a": c["b"], "b": c["a"]}), CHANGE_3),
        ("0/0 for dense models", leading_experts_wanted, CHANGE_3),
        ("a's experts for both", leading_sparse_is_a, CHANGE_3),
        ("a search by halves", leading_by_halves, CHANGE_3),
        ("changes its argument", leading_changes_its_argument, CHANGE_3),
        ("numpy's integers", lambda **c: [(np.int64(n), who) for n, who in leading(**c)], CHANGE_3),
        ("floats", lambda **c: [(float(n), who) for n, who in leading(**c)], CHANGE_3),
        ("halves on a grid", leading_on_grid, SHORT_3),
        ("three regimes and no more", but(leading, only=3), SHORT_3),
        ("up to batch 200", lambda **c: leading(**c | {"most": min(200, c["most"])}), SHORT_3),
        ("a tie is a's", but(leading, tie="a"), LIMITS_3),
        ("a tie is b's", but(leading, tie="b"), LIMITS_3),
        ("a tie at batch 1 is b's", but(leading, first_tie="b"), LIMITS_3),
        ("up to most, without it", but(leading, last=-1), LIMITS_3),
        ("one more than most", but(leading, last=1), LIMITS_3),
        (PACKAGE, leading_by_the_package, CHANGE_3),
    ],
    "04.4": [
        ("no factor 2", but(room, gqa=lambda a: a["kv_heads"] * a["head_dim"]), GQA_4),
        ("query heads", but(room, gqa=lambda a: 2 * a["heads"] * a["head_dim"]), GQA_4),
        ("head dimension forgotten", but(room, gqa=lambda a: 2 * a["kv_heads"]), GQA_4),
        ("keys of query heads", but(room, gqa=lambda a: (a["heads"] + a["kv_heads"]) * a["head_dim"]), GQA_4),
        ("GiB devices", but(room, giga=2**30), GQA_4),
        ("GB reserves", but(room, gibi=10**9), GQA_4),
        ("units exchanged", but(room, giga=2**30, gibi=10**9), GQA_4),
        ("a reserve of MiB", but(room, gibi=2**20), GQA_4),
        ("one reserve", but(room, reserves=1), GQA_4),
        ("no reserve", but(room, reserves=0), GQA_4),
        ("weights in bits", but(room, weight_byte=1), GQA_4),
        ("caches in bits", but(room, cache_byte=1), GQA_4),
        ("caches of 16 bits", lambda **c: room(**c | {"cache_bits": 16}), GQA_4),
        ("weights of 16 bits", lambda **c: room(**c | {"weight_bits": 16}), GQA_4),
        ("weights of whole bits", but(room, whole_bits=True), GQA_4),
        ("weights rounded down to bytes", lambda **c: room(
            **c | {"params": c["params"] * c["weight_bits"] // 8, "weight_bits": 8}), LIMITS_4),
        ("weights on each device", but(room, split=False), GQA_4),
        ("weights forgotten", lambda **c: room(**c | {"params": 0}), GQA_4),
        ("one device", lambda **c: room(**c | {"devices": 1}), GQA_4),
        ("no windows", but(room, kept=lambda la, w, n, c: la * c), GQA_4),
        ("all windows", but(room, kept=lambda la, w, n, c: la * min(n, c)), GQA_4),
        ("the others have windows", but(room, kept=lambda la, w, n, c: w * c + (la - w) * min(n, c)), GQA_4),
        ("windows cache nothing", but(room, kept=lambda la, w, n, c: (la - w) * c), GQA_4),
        ("one layer", but(room, kept=lambda la, w, n, c: c), GQA_4),
        ("windows on top", but(room, kept=lambda la, w, n, c: la * c + w * n), GQA_4),
        ("rounded up", but(room, round_=math.ceil), GQA_4),
        ("a float", but(room, round_=lambda x: x), GQA_4),
        ("a whole float", but(room, round_=lambda x: float(math.floor(x))), GQA_4),
        ("numpy's integer", lambda **c: np.int64(room(**c)), GQA_4),
        ("a latent for keys and one for values", but(room, mla=lambda a: 2 * a["kv_rank"] + a["rope_dim"]), MLA_4),
        ("latents twice", but(room, mla=lambda a: 2 * (a["kv_rank"] + a["rope_dim"])), MLA_4),
        ("no rotary key", but(room, mla=lambda a: a["kv_rank"]), MLA_4),
        ("a rotary key a head", but(room, mla=lambda a: a["kv_rank"] + a["heads"] * a["rope_dim"]), MLA_4),
        ("a latent a head", but(room, mla=lambda a: a["heads"] * (a["kv_rank"] + a["rope_dim"])), MLA_4),
        ("heads are kept", room_one_attention, MLA_4),
        ("grouped heads alone", but(room, mla=lambda a: 2 * a["kv_heads"] * a["head_dim"]), MLA_4),
        ("one at least", but(room, least=1), LIMITS_4),
        ("below 0", but(room, least=-(10**9)), LIMITS_4),
        ("windows longer than the context", but(room, kept=lambda la, w, n, c: (la - w) * c + w * n), LIMITS_4),
        ("rounded to the nearest", but(room, round_=round), GQA_4),
        ("in GB, rounded", room_in_gb, LIMITS_4),
        ("just fits does not", but(room, round_=lambda x: math.ceil(x) - 1), LIMITS_4),
        ("rounded on each device", room_each_device, GQA_4),
        (PACKAGE, room_by_the_package, GQA_4),
    ],
    "04.5": [
        ("the first in the low half", but(four_bits, low_first=True), PACKED_5),
        ("two's complement", but(four_bits, signed=True), PACKED_5),
        ("the package's layout", but(four_bits, signed=True, low_first=True), PACKED_5),
        ("7 added", but(four_bits, offset=7, fill=7), PACKED_5),
        ("over 8", but(four_bits, most=8), PACKED_5),
        ("over 7.5", but(four_bits, most=7.5), PACKED_5),
        ("over 15", but(four_bits, most=15), PACKED_5),
        ("cut, not rounded", but(four_bits, truncate=True), PACKED_5),
        ("the largest number, not magnitude", but(four_bits, absolute=False), PACKED_5),
        ("float32 scales", but(four_bits, dtype=torch.float32), PACKED_5),
        ("bfloat16 scales", but(four_bits, dtype=torch.bfloat16), PACKED_5),
        ("computed in bfloat16", but(four_bits, wide=False), PACKED_5),
        ("halves of a row", but(four_bits, halves=True), PACKED_5),
        ("one scale a row", four_bits_one_scale, PACKED_5),
        ("signed bytes", lambda **c: (four_bits(**c)[0].to(torch.int8), *four_bits(**c)[1:]), PACKED_5),
        ("two results", lambda **c: four_bits(**c)[:2], PACKED_5),
        ("changes its argument", four_bits_changes_its_argument, PACKED_5),
        ("groups run on", four_bits_flat, RAGGED_5),
        ("rows share bytes", four_bits_flat_bytes, RAGGED_5),
        ("padded groups", but(four_bits, pad=True), RAGGED_5),
        ("odd rows end in 0", but(four_bits, fill=0), RAGGED_5),
        ("NaN for zeros", but(four_bits, nan=True), RAGGED_5),
        ("a borrowed scale", four_bits_last_group_borrows, RAGGED_5),
        ("divided by a scale that is not stored", but(four_bits, stored=False), RAGGED_5),
        ("not clamped", but(four_bits, clamp=False), RAGGED_5),
        ("4 bits", but(four_bits, bits=lambda w, p, s, g: 4.0), BITS_5),
        ("without scales", but(four_bits, bits=lambda w, p, s, g: 8 * p.numel() / w.numel()), BITS_5),
        ("4 + 16 / group", but(four_bits, bits=lambda w, p, s, g: 4 + 16 / g), BITS_5),
        ("scales of 32 bits", but(four_bits, bits=lambda w, p, s, g: (8 * p.numel() + 32 * s.numel()) / w.numel()), BITS_5),
        ("without fillings", but(four_bits, bits=lambda w, p, s, g: 4 + 16 * s.numel() / w.numel()), BITS_5),
        ("whole groups alone", but(four_bits, bits=lambda w, p, s, g: (8 * p.nbytes + 16 * len(w) * (w.shape[1] // g)) / w.numel()), BITS_5),
        ("bytes", but(four_bits, bits=lambda w, p, s, g: (p.nbytes + s.nbytes) / w.numel()), BITS_5),
        ("all bits", but(four_bits, bits=lambda w, p, s, g: 8 * (p.nbytes + s.nbytes)), BITS_5),
        ("elements for bytes", but(four_bits, bits=lambda w, p, s, g: 8 * (p.numel() + s.numel()) / w.numel()), BITS_5),
        ("of each stored half byte", but(four_bits, bits=lambda w, p, s, g: 4 * (p.nbytes + s.nbytes) / p.numel()), BITS_5),
        ("a tensor", but(four_bits, bits=lambda w, p, s, g: torch.tensor(8 * (p.nbytes + s.nbytes) / w.numel())), BITS_5),
        ("whole bits", but(four_bits, bits=lambda w, p, s, g: 8 * (p.nbytes + s.nbytes) // w.numel()), BITS_5),
        (PACKAGE, four_bits_by_the_package, PACKED_5),
    ],
    "04.6": [
        ("one row a choice", but(splits, slots=True), SENT_6),
        ("received for sent", but(splits, transpose=True), SENT_6),
        ("E/R neighbours on a rank", but(splits, home=splits_contiguous), SENT_6),
        ("dealt out", but(splits, home=splits_round_robin), SENT_6),
        ("without its own", but(splits, own=True), SENT_6),
        ("equal neighbours among the choices merged", splits_merged_neighbours, SENT_6),
        ("first choices", but(splits, first=True), SENT_6),
        ("different experts of all tokens", splits_unique_experts, SENT_6),
        ("lists", splits_lists, SENT_6),
        ("int32", but(splits, dtype=torch.int32), SENT_6),
        ("floats", but(splits, dtype=torch.float64), SENT_6),
        ("received as sent", but(splits, same=True), BACK_6),
        ("what stays leaves", but(splits, minus=False), BACK_6),
        ("what arrives leaves", but(splits, arriving=True), BACK_6),
        ("both ways", but(splits, both=True), BACK_6),
        ("rows, not bytes", lambda expert_ids, rank_of, row_bytes: splits(expert_ids, rank_of, 1), BACK_6),
        ("-1 is the last expert", but(splits, dropped=False), LIMITS_6),
        ("tokens with a dropped choice stay", but(splits, real_only=True), LIMITS_6),
        ("tokens without choices stay", but(splits, keep_dropped=True), LIMITS_6),
        ("dropped ones taken off again", splits_mask_after, LIMITS_6),
        ("as many ranks as hold experts", splits_ranks_of_experts, LIMITS_6),
        ("no rank without tokens", splits_need_tokens, LIMITS_6),
        ("rows in 8 bits", lambda **c: (splits(**c)[0].to(torch.uint8).long(), *splits(**c)[1:]), LIMITS_6),
        ("bytes in 32 bits", lambda **c: (*splits(**c)[:2], splits(**c)[2].int().long()), LIMITS_6),
        (PACKAGE, splits_by_the_package, SENT_6),
    ],
    "04.7": [
        ("neighbours", contiguous, HOT_7),
        ("dealt out", round_robin, HOT_7),
        ("sums over batches", pooled, HOT_7),
        ("sums over batches, exchanged", pooled_and_exchanged, HOT_7),
        ("a snake", snake, HOT_7),
        ("the first batch", first_batch, HOT_7),
        ("the last batch", last_batch, HOT_7),
        ("the heaviest batch", worst_batch_only, HOT_7),
        ("at random", random_placement, HOT_7),
        ("even sums", least_total, HOT_7),
        ("all on rank 0", lambda loads, ranks: [0] * len(loads[0]), HOT_7),
        ("as many on a rank as please", unlimited, HOT_7),
        ("experts by rank", by_rank, HOT_7),
        ("ranks from 1", from_one, HOT_7),
        ("a tensor", as_tensor, HOT_7),
        ("numpy's integers", of_numpy, HOT_7),
        ("changes its argument", changes_loads, HOT_7),
        ("greedy by batches", place_greedy, MENDED_7),
        ("one rank begins at 1", needs_two_ranks, LIMITS_7),
        ("small cases only", small_only, HOT_7),
        ("divides by the load", fails_without_load, LIMITS_7),
        (PACKAGE, placed_by_the_package, HOT_7),
    ],
}  # fmt: skip

RIGHT = {
    "04.1": [step, step_in_microseconds, step_in_numpy, step_by_intensity],
    "04.2": [distinct, distinct_in_torch, distinct_in_numpy, distinct_token_by_token],
    "04.3": [leading, leading_in_numpy, leading_by_groups],
    "04.4": [room, room_in_integers, room_by_device],
    "04.5": [four_bits, four_bits_by_loop, four_bits_by_padding, four_bits_in_numpy],
    "04.6": [splits, splits_by_one_hot, splits_by_scatter, splits_in_numpy],
    "04.7": [place_mended_greedy, place_many_starts, place_steepest],
}
