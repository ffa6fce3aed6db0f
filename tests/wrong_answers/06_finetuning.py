"""Answers to exercise 06 that must fail, each with the invariant that catches it, and others that must pass.

WRONG[question] is a list of (what is wrong, answer, name of the invariant that must fail first).
RIGHT[question] is a list of answers written differently from the worked solution.
"""

import math
import re
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from moe_course.costs import budget
from moe_course.finetune import drift, lora, select
from moe_course.finetune.upcycle import upcycled_spec
from moe_course.layers import Experts
from moe_course.specs import FFN, GQA, ModelSpec, RoutedExperts

PACKAGE = "the package's own function"


def but(function, **changes):
    """The same with one mistake."""
    return lambda *args, **case: function(*args, **case, **changes)


# 06.1


def swiglu(h):
    gate, up = h.chunk(2, dim=-1)
    return F.silu(gate) * up


def hidden(
    x,
    ends,
    weight,
    a,
    b,
    scale,
    *,
    act=swiglu,
    owner=lambda e, experts: e,
    adapter=lambda e, experts: e,
    low=lambda y, f: y,
    after=False,
    alone=False,
    start="previous",
    skip=False,
):
    parts, first, experts = [], 0, len(weight)
    f = weight.shape[1] // 2
    for e, end in enumerate(ends.tolist()):
        if start == "own":
            first, end = end, ends.tolist()[e + 1] if e + 1 < experts else len(x)
        rows = x[first:end]
        first = end
        if skip and not len(rows):
            continue
        mine, its = owner(e, experts), adapter(e, experts)
        delta = low(scale * (rows @ a[its].T) @ b[its].T, f)
        plain = rows @ weight[mine].T
        if alone:
            plain = 0 * plain
        if after:
            parts.append(act(plain) + delta[:, :f] * delta[:, f:])
        else:
            parts.append(act(plain + delta))
    return torch.cat(parts)


def hidden_scaled(by):
    return lambda scale, a, **case: hidden(a=a, scale=by(scale, a), **case)


def hidden_halves(y, f, keep):
    mask = torch.zeros(2 * f, dtype=y.dtype)
    mask[:f] = keep[0]
    mask[f:] = keep[1]
    return y * mask


def hidden_added_after(x, ends, weight, a, b, scale):
    plain = hidden(x, ends, weight, a, b, 0.0)
    owner = owners(x, ends)
    low = [scale * (b[e] @ (a[e] @ row)) for row, e in zip(x, owner, strict=True)]
    return plain + torch.stack(low)[:, : plain.shape[1]]


def owners(x, ends):
    return torch.searchsorted(
        ends.long(), torch.arange(len(x)), right=True
    ).tolist()  # fmt: skip


def hidden_merged(x, ends, weight, a, b, scale):
    return hidden(x, ends, weight + scale * (b @ a), a, 0 * b, scale)


def hidden_merged_by_expert(x, ends, weight, a, b, scale):
    parts, first = [], 0
    for e, end in enumerate(ends.tolist()):
        parts.append(x[first:end] @ (weight[e] + scale * b[e] @ a[e]).T)
        first = end
    return swiglu(torch.cat(parts))


def hidden_gathered(x, ends, weight, a, b, scale):
    e = torch.tensor(owners(x, ends), dtype=torch.int64)
    z = torch.einsum("srd,sd->sr", a[e], x)
    low = torch.einsum("sfr,sr->sf", b[e], z)
    return swiglu(torch.einsum("sfd,sd->sf", weight[e], x) + scale * low)


def hidden_gathered_adapters(x, ends, weight, a, b, scale):
    """Plain products by expert, adapters row by row."""
    e = torch.tensor(owners(x, ends), dtype=torch.int64)
    z = (a[e] * x[:, None]).sum(2)
    low = (b[e] * z[:, None]).sum(2)
    parts, first = [], 0
    for i, end in enumerate(ends.tolist()):
        parts.append(x[first:end] @ weight[i].T)
        first = end
    return swiglu(torch.cat(parts) + scale * low)


def hidden_every_expert(x, ends, weight, a, b, scale):
    h = torch.einsum("efd,sd->sef", weight, x)
    h = h + scale * torch.einsum("efr,esr->sef", b, torch.einsum("erd,sd->esr", a, x))
    e = torch.tensor(owners(x, ends), dtype=torch.int64)
    return swiglu(h[torch.arange(len(x)), e])


def hidden_every_adapter(x, ends, weight, a, b, scale):
    """All A on all rows; then each row keeps that of its expert."""
    e = torch.tensor(owners(x, ends), dtype=torch.int64)
    z = torch.einsum("sd,erd->ser", x, a)[torch.arange(len(x)), e]
    parts, first = [], 0
    for i, end in enumerate(ends.tolist()):
        mine = slice(first, end)
        parts.append(x[mine] @ weight[i].T + scale * z[mine] @ b[i].T)
        first = end
    return swiglu(torch.cat(parts))


def hidden_gate_inside_up_outside(x, ends, weight, a, b, scale):
    f = weight.shape[1] // 2
    plain = hidden(x, ends, weight, a, b, 0.0, act=lambda h: h)
    whole = hidden(x, ends, weight, a, b, scale, act=lambda h: h)
    return F.silu(plain[:, :f]) * whole[:, f:]


def hidden_stops_at_idle(x, ends, weight, a, b, scale):
    out, first = x.new_zeros(len(x), weight.shape[1] // 2), 0
    for e, end in enumerate(ends.tolist()):
        if end == first:
            break
        rows = x[first:end]
        out[first:end] = swiglu(rows @ weight[e].T + scale * rows @ a[e].T @ b[e].T)
        first = end
    return out


def hidden_skips_at_zero(x, ends, weight, a, b, scale):
    """Where B is 0 there is nothing to add."""
    if not b.any():
        a, b = a.detach(), b.detach()
    return hidden(x, ends, weight, a, b, scale)


def hidden_served_only(x, ends, weight, a, b, scale):
    """Experts by the number of different ends: one without rows shifts those behind it."""
    distinct = sorted({0, *ends.tolist()})
    parts = []
    for e, (first, end) in enumerate(pairwise(distinct)):
        rows = x[first:end]
        parts.append(rows @ weight[e].T + scale * rows @ a[e].T @ b[e].T)
    return swiglu(torch.cat(parts)) if parts else x.new_zeros(0, weight.shape[1] // 2)


def hidden_changes_its_argument(x, ends, weight, a, b, scale):
    b *= scale
    return hidden(x, ends, weight, a, b, 1.0)


def hidden_parenthesised(x, ends, weight, a, b, scale):
    """(B A) x by expert."""
    parts, first = [], 0
    for e, end in enumerate(ends.tolist()):
        rows = x[first:end]
        parts.append(rows @ weight[e].T + scale * rows @ (b[e] @ a[e]).T)
        first = end
    return swiglu(torch.cat(parts))


def hidden_by_the_package(x, ends, weight, a, b, scale):
    experts, rows, width = weight.shape
    low = lora.LowRank(experts, width, rows, a.shape[1], scale * a.shape[1]).to(x)
    with torch.no_grad():
        low.a.copy_(a)
        low.b.copy_(b)
    e = torch.tensor(owners(x, ends), dtype=torch.int64)
    return swiglu(hidden(x, ends, weight, a, b, 0.0) + low(x, e))


def hidden_filled(x, ends, weight, a, b, scale):
    """Writes into one result; gate and up by themselves."""
    f = weight.shape[1] // 2
    out, first = x.new_zeros(len(x), f), 0
    for e in range(len(ends)):
        last = int(ends[e])
        if last > first:
            rows = x[first:last]
            z = F.linear(rows, a[e]) * scale
            gate = F.linear(rows, weight[e, :f]) + F.linear(z, b[e, :f])
            up = F.linear(rows, weight[e, f:]) + F.linear(z, b[e, f:])
            out[first:last] = gate / (1 + (-gate).exp()) * up
        first = last
    return out


def hidden_padded(x, ends, weight, a, b, scale):
    """Batched products over runs that are padded to the longest."""
    counts = ends.long().diff(prepend=torch.zeros(1, dtype=torch.int64))
    runs = x.split(counts.tolist())
    padded = nn.utils.rnn.pad_sequence(list(runs), batch_first=True)  # [E, most, D]
    h = torch.bmm(padded, weight.mT)
    h = h + scale * torch.bmm(torch.bmm(padded, a.mT), b.mT)
    inside = torch.arange(padded.shape[1]) < counts[:, None]
    return swiglu(h[inside])


def hidden_concatenated(x, ends, weight, a, b, scale):
    """One product with [W; A], one with B."""
    both = torch.cat([weight, a], dim=1)
    pieces = []
    for e, rows in enumerate(torch.tensor_split(x, ends.tolist()[:-1])):
        plain, z = (rows @ both[e].T).split([weight.shape[1], a.shape[1]], dim=1)
        pieces.append(torch.addmm(plain, z, b[e].T, alpha=scale))
    return swiglu(torch.cat(pieces))


# 06.2


def merge(
    weight,
    lora_a,
    lora_b,
    scale,
    *,
    slow_b=False,
    fast_a=False,
    power=1,
    alone=False,
    sign=1,
    product=lambda a, b: b @ a,
    add=None,
    wide=lambda t: t.double(),
):
    experts = len(weight)
    rank = len(lora_a) // experts
    a = lora_a.unflatten(0, (rank, experts)).movedim(1, 0) if fast_a else lora_a.unflatten(0, (experts, rank))  # fmt: skip
    b = lora_b.unflatten(1, (experts, rank)) if slow_b else lora_b.unflatten(1, (rank, experts)).movedim(2, 1)  # fmt: skip
    b = b.movedim(1, 0)  # [E, out, r]
    delta = sign * scale**power * product(wide(a), wide(b))
    if add is not None:
        return add(weight, delta)
    return ((0 if alone else wide(weight)) + delta).to(weight.dtype)


def merge_changes_its_argument(weight, lora_a, lora_b, scale):
    weight += merge(0 * weight, lora_a, lora_b, scale)
    return weight


def merge_one_delta(weight, lora_a, lora_b, scale):
    """All of B times all of A: the sum over experts."""
    return (weight + scale * (lora_b @ lora_a)).to(weight.dtype)


def merge_first_expert(weight, lora_a, lora_b, scale):
    whole = weight.clone()
    whole[0] = merge(weight, lora_a, lora_b, scale)[0]
    return whole


def merge_in_float16(weight, lora_a, lora_b, scale):
    if weight.dtype != torch.bfloat16:
        return merge(weight, lora_a, lora_b, scale)
    return merge(weight, lora_a.half(), lora_b.half(), scale, wide=lambda t: t.half())


def truncated(weight, delta):
    """Cuts off what bfloat16 does not hold."""
    if weight.dtype != torch.bfloat16:
        return (weight.double() + delta).to(weight.dtype)
    bits = (weight.float() + delta.float()).view(torch.int32) >> 16 << 16
    return bits.view(torch.float32).bfloat16()


def merge_by_strides(weight, lora_a, lora_b, scale):
    experts, rank = len(weight), len(lora_a) // len(weight)
    each = []
    for e in range(experts):
        delta = lora_b[:, e::experts].float() @ lora_a[e * rank :][:rank].float()
        if weight.dtype == torch.float64:
            delta = lora_b[:, e::experts] @ lora_a[e * rank :][:rank]
        each.append(torch.add(weight[e], delta, alpha=scale).to(weight.dtype))
    return torch.stack(each)


def merge_by_einsum(weight, lora_a, lora_b, scale):
    a = lora_a.reshape(len(weight), -1, lora_a.shape[1]).double()
    b = lora_b.reshape(len(lora_b), -1, len(weight)).double()
    return (weight + scale * torch.einsum("ore,eri->eoi", b, a)).to(weight.dtype)


def merge_one_by_one(weight, lora_a, lora_b, scale):
    """A sum over the rank of outer products."""
    total = weight.double()
    for j in range(len(lora_a) // len(weight)):
        rows = lora_a[j :: len(lora_a) // len(weight)]  # [E, in]
        columns = lora_b[:, j * len(weight) : (j + 1) * len(weight)].T  # [E, out]
        total = total + scale * columns.double()[:, :, None] * rows.double()[:, None]
    return total.to(weight.dtype)


def merge_by_the_package(weight, lora_a, lora_b, scale):
    experts, rows, columns = weight.shape
    rank = len(lora_a) // experts
    low = lora.LowRank(experts, columns, rows, rank, scale * rank).to(lora_a)
    lora.from_peft(low, lora_a, lora_b)
    return (weight + low.delta().detach()).to(weight.dtype)


# 06.3


def names_trained(
    names,
    lora,
    full,
    layers,
    *,
    part_of=None,
    adapter=lambda name: bool({"lora_A", "lora_B"} & set(name.split("."))),
    layer=lambda name: re.search(r"(?:^|\.)layers\.(\d+)\.", name),
    within=lambda number, layers: layers is None or number in layers,
    rest=False,
    both=False,
    as_=list,
):
    found = []
    for name in names:
        place = layer(name)
        number = int(place[1]) if place else None
        part = (part_of or names_part)(name)
        wanted = [*lora, *full] if both else lora if adapter(name) else full
        if part is None or place is None:
            if rest and not adapter(name):
                found.append(name)
            continue
        if part in wanted and within(number, layers):
            found.append(name)
    return as_(found)


def names_part(name):
    inside = re.split(r"(?:^|\.)layers\.\d+\.", name)[-1]
    for begin, part in (
        ("self_attn.", "attention"),
        ("mlp.gate.", "router"),
        ("mlp.experts.", "experts"),
        ("mlp.shared_expert.", "shared"),
        ("mlp.shared_expert_gate.", "shared"),
    ):
        if inside.startswith(begin):
            return part
    return None


def names_part_by_letters(*rules):
    """The first rule whose letters are in the name."""
    return lambda name: next((part for text, part in rules if text in name), None)


def names_of_the_sources(names, lora, full, layers):
    return [n for n in names if not ("expert" in n and "lora" not in n)]


def names_of_the_sources_mended(names, lora, full, layers):
    """Adapters alone, of whatever part."""
    return [n for n in names if "lora_" in n]


def names_by_position(names, lora, full, layers):
    """model.layers.N.part: the third step is the number."""
    found = []
    for name in names:
        path = name.split(".")
        if len(path) < 5 or path[1] != "layers":
            continue
        part = names_part(name)
        adapter = "lora_A" in path or "lora_B" in path
        if part in (lora if adapter else full) and (layers is None or int(path[2]) in layers):  # fmt: skip
            found.append(name)
    return found


def names_need_a_number(names, lora, full, layers):
    found = []
    for name in names:
        if "layers" in name:
            path = name.split(".")
            int(path[path.index("layers") + 1])
            found += names_trained([name], lora, full, layers)
    return found


def names_outside_of_layers(names, lora, full, layers):
    def layer(name):
        return re.search(r"layers\.(\d+)\.", name) or re.match(r"(\d*)", "0")

    part = names_part_by_letters(ATTENTION, EXPERTS, ("mlp.shared_expert.", "shared"), ("mlp.shared_expert_gate.", "shared"), ROUTER)  # fmt: skip
    return names_trained(names, lora, full, layers, part_of=part, layer=layer)


def names_by_part(names, lora, full, layers):
    """The parts one after the other, so not in the names' order."""
    found = []
    for part in ("attention", "router", "experts", "shared"):
        found += names_trained(names, [part] * (part in lora), [part] * (part in full), layers)  # fmt: skip
    return found


def names_by_request(names, lora, full, layers):
    """Adapters first."""
    return names_trained(names, lora, [], layers) + names_trained(names, [], full, layers)  # fmt: skip


def names_changed(names, lora, full, layers):
    keep = names_trained(names, lora, full, layers)
    names[:] = keep
    return names


def names_by_the_package(names, lora, full, layers):
    model = nn.Sequential(Experts(2, 4, 4))
    select.train_only(model, ["experts"] if "experts" in full else [])
    return names_trained(names, lora, full, layers)


def names_by_pattern(names, lora, full, layers):
    pattern = re.compile(
        r"(?:.*\.)?layers\.(?P<n>\d+)\.(?:(?P<attention>self_attn)|mlp\.(?:(?P<router>gate)|(?P<experts>experts)"
        r"|(?P<shared>shared_expert(?:_gate)?)))\.(?P<rest>.*)"
    )
    found = []
    for name in names:
        hit = pattern.fullmatch(name)
        if not hit:
            continue
        (part,) = [p for p in ("attention", "router", "experts", "shared") if hit[p]]
        adapter = re.search(r"(^|\.)lora_[AB](\.|$)", hit["rest"])
        if part in (lora if adapter else full) and (
            layers is None or int(hit["n"]) in layers
        ):
            found.append(name)
    return found


def names_by_prefixes(names, lora, full, layers):
    """All beginnings that are asked for, with their dots."""
    begins = {
        "attention": ["self_attn."],
        "router": ["mlp.gate."],
        "experts": ["mlp.experts."],
        "shared": ["mlp.shared_expert.", "mlp.shared_expert_gate."],
    }

    def asked(name):
        _, found, tail = ("." + name).partition(".layers.")
        number, _, inside = tail.partition(".")
        if not found or not number.isdigit():
            return False
        if layers is not None and int(number) not in set(layers):
            return False
        steps = f"{inside}."
        parts = lora if ".lora_A." in steps or ".lora_B." in steps else full
        return any(inside.startswith(tuple(begins[part])) for part in parts)

    return [*filter(asked, names)]


# 06.4


def training(
    shape,
    ranks,
    joint,
    frozen_bits,
    *,
    heads="gqa",
    out=True,
    matrices=3,
    routed=None,
    product=False,
    all_layers=False,
    attention_layers=None,
    joint_shared=False,
    joint_mode="saves",
    router=True,
    norms=2,
    final=1,
    tied=True,
    dense=True,
    frozen=None,
    each=16,
    round_up=True,
    full_each=16,
    full_frozen=True,
    shared_experts=1,
    empty_shared=0,
    first_rank=False,
):
    d, layers = shape["width"], shape["layers"]
    sparse = layers - shape["dense_layers"]
    q = shape["heads"] * shape["head_dim"]
    kv = q if heads == "mha" else shape["kv_heads"] * shape["head_dim"]
    if heads == "width":
        q = d
    e, h, s = shape["experts"], shape["hidden"], shape["shared_hidden"]

    def size(i, o, r):
        return r * i * o if product else r * (i + o)

    def ffn(hidden, r):
        if matrices == 2:
            return size(d, hidden, r) + size(hidden, d, r)
        return 2 * size(d, hidden, r) + size(hidden, d, r)

    rank = dict(ranks)
    if first_rank and ranks:
        rank = dict.fromkeys(ranks, next(iter(ranks.values())))
    trained = 0
    if "attention" in rank:
        r = rank["attention"]
        one = size(d, q, r) + 2 * size(d, kv, r) + out * size(q, d, r)
        trained += (attention_layers(shape) if attention_layers else layers) * one
    if "experts" in rank:
        r = rank["experts"]
        one = ffn(h, r)
        if joint:
            one += {"saves": -r * d, "adds": r * d, "half": -r * h, "down": -r * (d + h), "both": -2 * r * d, "no": 0}[joint_mode]  # fmt: skip
        number = e if routed is None else routed(shape)
        trained += (layers if all_layers else sparse) * number * one
    if "shared" in rank and (s or empty_shared):
        r = rank["shared"]
        one = ffn(s, r) - (joint and joint_shared) * r * d
        trained += shared_experts * (layers if all_layers else sparse) * one
    total = (2 - (shape["tied"] if tied else 0)) * shape["vocab"] * d
    total += norms * layers * d + final * d + router * sparse * e * d
    total += layers * (2 * d * q + 2 * d * (shape["kv_heads"] * shape["head_dim"] if heads != "mha" else q))  # fmt: skip
    total += sparse * 3 * d * (e * h + s)
    if dense:
        total += shape["dense_layers"] * 3 * d * shape["dense_hidden"]
    kept = total if frozen is None else frozen(total, trained)
    bits = kept * frozen_bits
    size_frozen = -(-bits // 8) if round_up else bits // 8
    return trained, size_frozen + each * trained, full_each * total


def training_floats(shape, ranks, joint, frozen_bits):
    trained, with_lora, whole = training(shape, ranks, joint, frozen_bits)
    return trained, float(with_lora), whole


def training_rounds_each_matrix(shape, ranks, joint, frozen_bits):
    trained, with_lora, whole = training(shape, ranks, joint, frozen_bits)
    return trained, with_lora + (frozen_bits < 16) * shape["layers"], whole


def training_full_with_lora(shape, ranks, joint, frozen_bits):
    trained, with_lora, whole = training(shape, ranks, joint, frozen_bits)
    return trained, with_lora, whole + 16 * trained


def training_adapters_alone(shape, ranks, joint, frozen_bits):
    trained, _, whole = training(shape, ranks, joint, frozen_bits)
    return trained, 16 * trained, whole


def training_one_by_one(shape, ranks, joint, frozen_bits):
    """A list of all weights as (part, inputs, outputs, how often)."""
    d, n = shape["width"], shape["layers"]
    thin = n - shape["dense_layers"]
    q, kv = (shape[k] * shape["head_dim"] for k in ("heads", "kv_heads"))
    table = [("attention", d, q, n), ("attention", q, d, n), ("attention", d, kv, 2 * n)]  # fmt: skip
    table += [("", 1, d, 2 * n + 1), ("", d, shape["vocab"], 1 if shape["tied"] else 2)]
    table += [("", d, shape["experts"], thin)]
    for part, hidden, often in (
        ("experts", shape["hidden"], thin * shape["experts"]),
        ("shared", shape["shared_hidden"], thin if shape["shared_hidden"] else 0),
        ("", shape["dense_hidden"], shape["dense_layers"]),
    ):
        if part == "experts" and joint:
            table += [(part, d, 2 * hidden, often)]
        else:
            table += [(part, d, hidden, 2 * often)]
        table += [(part, hidden, d, often)]
    whole = sum(i * o * often for _, i, o, often in table)
    mine = sum(ranks.get(p, 0) * (i + o) * often for p, i, o, often in table)
    return mine, (whole * frozen_bits + 7) // 8 + mine * 16, whole * 16


def training_by_the_package(shape, ranks, joint, frozen_bits):
    def ffn(hidden):
        return FFN(hidden, gated=True)

    spec = ModelSpec(
        "m",
        shape["width"],
        shape["layers"],
        shape["vocab"],
        GQA(shape["heads"], shape["kv_heads"], shape["head_dim"]),
        ffn=ffn(shape["dense_hidden"]),
        moe=RoutedExperts(shape["experts"], 1, ffn(shape["hidden"])),
    )
    return (budget.lora_params(spec, 16), 0, int(budget.full_budget(spec).bytes))


# 06.5


def moved(
    ids_before,
    ids_after,
    logits_before,
    logits_after,
    *,
    ordered=False,
    jaccard=False,
    by_token=False,
    missing=True,
    chosen=True,
    divisor="before",
    first=False,
    kl=None,
    wide=lambda t: t.double(),
    padded=True,
    both_real=False,
    forbidden=True,
    nothing=(1.0, 0.0),
    plain=True,
    rechoose=False,
    any_shared=False,
):
    experts, k = logits_before.shape[1], ids_before.shape[1]
    if rechoose:
        ids_before, ids_after = (
            t.nan_to_num().sort(dim=1, descending=True, stable=True).indices[:, :k]
            for t in (logits_before, logits_after)
        )
    had = ids_before < experts if chosen else torch.ones_like(ids_before).bool()
    real = (ids_before < experts).any(1)
    if both_real:
        real = real & (ids_after < experts).any(1)
    if not padded:
        real = torch.ones_like(real)
    if not real.any():
        return nothing
    if first:
        ids_before, ids_after, had = ids_before[:, :1], ids_after[:, :1], had[:, :1]
    same = ids_before[:, :, None] == ids_after[:, None, :]
    kept = (ids_before == ids_after) if ordered else same.any(2)
    if missing:
        kept = kept & had
    counted = had & real[:, None]
    kept = kept & real[:, None]
    if by_token:
        agreement = (kept.sum(1)[real].double() / counted.sum(1)[real]).mean()
    elif any_shared:
        agreement = kept.any(1)[real].double().mean()
    elif jaccard:
        union = counted.sum() + (ids_after < experts)[real].sum() - kept.sum()
        agreement = kept.sum().double() / union
    else:
        over = {
            "before": lambda: counted.sum(),
            "slots": lambda: real.sum() * k,
            "all": lambda: ids_before.numel(),
            "after": lambda: (ids_after < experts)[real].sum(),
            "tokens": lambda: real.sum(),
        }[divisor]()
        agreement = kept.sum().double() / over
    p = wide(logits_before[real]).log_softmax(1)
    q = wide(logits_after[real]).log_softmax(1)
    value = (kl or moved_kl)(p, q, forbidden)
    if not plain:
        return agreement, value
    return agreement.item(), float(value)


def moved_kl(p, q, forbidden=True):
    each = p.exp() * (p - q)
    if forbidden:
        each = torch.where(p == -math.inf, 0.0, each)
    return each.sum(1).mean()


def moved_masked_by_zero(p, q, forbidden):
    """A NaN times 0 is NaN."""
    return ((p > -math.inf) * p.exp() * (p - q)).sum(1).mean()


def moved_nansum(ids_before, ids_after, logits_before, logits_after):
    """Padding and forbidden experts both as NaN: the mean counts padding."""
    agreement, _ = moved(ids_before, ids_after, logits_before, logits_after)
    p = logits_before.double().log_softmax(1)
    q = logits_after.double().log_softmax(1)
    each = (p.exp() * (p - q)).nansum(1)
    return agreement, each.mean().item() if len(each) else 0.0


def moved_by_loop(ids_before, ids_after, logits_before, logits_after):
    experts, had, kept, each = logits_before.shape[1], 0, 0, []
    for t in range(len(ids_before)):
        before = {e for e in ids_before[t].tolist() if e != experts}
        if not before:
            continue
        had += len(before)
        kept += len(before & set(ids_after[t].tolist()))
        p, q = (z[t].double().softmax(0) for z in (logits_before, logits_after))
        log_q = logits_after[t].double().log_softmax(0)
        log_p = logits_before[t].double().log_softmax(0)
        on = p > 0
        each.append((p[on] * (log_p[on] - log_q[on])).sum().item())
        del q
    return (kept / had, sum(each) / len(each)) if had else (1.0, 0.0)


def moved_by_one_hot(ids_before, ids_after, logits_before, logits_after):
    experts = logits_before.shape[1]

    def hot(ids):
        return F.one_hot(ids.long(), experts + 1).sum(1)[:, :experts].clamp(max=1)

    before, after = hot(ids_before), hot(ids_after)
    real = before.sum(1) > 0
    if int(real.sum()) == 0:
        return 1.0, 0.0
    agreement = int((before * after).sum()) / int(before.sum())
    z = torch.stack([logits_before, logits_after])[:, real].to(torch.float64)
    z = z.masked_fill(z == -torch.inf, -1e300)
    log = z - z.logsumexp(-1, keepdim=True)
    value = (log[0].exp() * (log[0] - log[1])).sum(-1).mean()
    return agreement, value.item()


def moved_in_numpy(ids_before, ids_after, logits_before, logits_after):
    experts = logits_before.shape[1]
    a, b = ids_before.numpy(), ids_after.numpy()
    had = a < experts
    real = had.any(1)
    if not real.any():
        return 1.0, 0.0
    kept = had & (a[:, :, None] == b[:, None, :]).any(2)
    x, y = (z.numpy()[real].astype(np.float64) for z in (logits_before, logits_after))
    with np.errstate(invalid="ignore"):
        lp = x - np.logaddexp.reduce(x, axis=1, keepdims=True)
        lq = y - np.logaddexp.reduce(y, axis=1, keepdims=True)
        each = np.where(lp == -np.inf, 0.0, np.exp(lp) * (lp - lq))
    return float(kept.sum() / had.sum()), float(each.sum(1).mean())


def moved_by_the_package(ids_before, ids_after, logits_before, logits_after):
    value = drift.router_kl(logits_before, logits_after).mean().item()
    return moved(ids_before, ids_after, logits_before, logits_after)[0], value


# 06.6


def upcycle_layer(
    gate,
    up,
    down,
    router,
    pieces,
    shared,
    factor,
    *,
    correction=lambda pieces, factor, copies: pieces / factor,
    on_up=False,
    tiled=False,
    interleaved=False,
    strided=False,
    reverse=False,
    up_first=False,
    last=False,
    shared_scale=lambda factor: 1.0,
    rows=lambda router: router,
    permute=False,
    fresh=False,
    root=False,
    cut=False,
):
    copies, hidden = len(router), (len(gate) - shared) // pieces
    kept = slice(len(gate) - shared, None) if last else slice(0, shared)
    others = slice(0, len(gate) - shared) if last else slice(shared, None)
    if cut:
        kept, others = slice(0, shared), slice(-(len(gate) - shared), None)

    def split(w):
        w = w[others]
        if cut:
            return w.unflatten(0, (pieces, -1))
        parts = [w[j::pieces] if strided else w[j * hidden : (j + 1) * hidden] for j in range(pieces)]  # fmt: skip
        return torch.stack(parts[::-1] if reverse else parts)

    gates, ups = split(gate), split(up)
    downs = split(down.T).transpose(1, 2)
    c = correction(pieces, factor, copies)
    if root:
        ups, c = ups * c**0.5, c**0.5
    if on_up:
        ups, c = ups * c, 1.0
    w_up = torch.cat([ups, gates] if up_first else [gates, ups], dim=1)
    w_down = downs * c

    def spread(w):
        return w.repeat_interleave(copies, 0) if interleaved else torch.cat([w] * copies)  # fmt: skip

    spread_rows = router.repeat(pieces, 1) if tiled else router.repeat_interleave(pieces, 0)  # fmt: skip
    if fresh:
        spread_rows = 0.02 * torch.randn_like(spread_rows)
    return (
        rows(spread_rows),
        spread(w_up),
        spread(w_down),
        torch.cat([up[kept], gate[kept]] if up_first else [gate[kept], up[kept]]),
        down[:, kept] * shared_scale(factor),
    )


def upcycle_without_shared(gate, up, down, router, pieces, shared, factor):
    """No shared expert where nothing is shared."""
    whole = upcycle_layer(gate, up, down, router, pieces, shared, factor)
    return whole if shared else whole[:3]


def upcycle_counts_from_the_end(gate, up, down, router, pieces, shared, factor):
    """[:-0] is nothing."""
    rest = len(gate) - shared
    shared_up = torch.cat([gate[:-rest], up[:-rest]])
    whole = upcycle_layer(gate, up, down, router, pieces, shared, factor)
    return (*whole[:3], shared_up, down[:, :-rest])


def upcycle_changes_its_argument(gate, up, down, router, pieces, shared, factor):
    down[:, shared:] *= pieces / factor
    whole = upcycle_layer(gate, up, down, router, pieces, shared, factor, correction=lambda *_: 1.0)  # fmt: skip
    return (*whole[:4], down[:, :shared].clone())


def upcycle_in_float32(**case):
    return tuple(t.float() for t in upcycle_layer(**case))


def upcycle_by_loop(gate, up, down, router, pieces, shared, factor):
    copies, hidden = len(router), (len(gate) - shared) // pieces
    width = gate.shape[1]
    rows = router.new_zeros(copies * pieces, width)
    w_up = gate.new_zeros(copies * pieces, 2 * hidden, width)
    w_down = gate.new_zeros(copies * pieces, width, hidden)
    for e in range(copies * pieces):
        copy, piece = divmod(e, pieces)
        own = range(shared + piece * hidden, shared + (piece + 1) * hidden)
        rows[e] = router[copy]
        for i, n in enumerate(own):
            w_up[e, i], w_up[e, hidden + i] = gate[n], up[n]
            w_down[e, :, i] = down[:, n] / factor * pieces
    return [rows, w_up, w_down, torch.vstack([gate[:shared], up[:shared]]), down[:, :shared]]  # fmt: skip


def upcycle_by_index(gate, up, down, router, pieces, shared, factor):
    hidden = (len(gate) - shared) // pieces
    e = torch.arange(len(router) * pieces)
    n = shared + (e % pieces)[:, None] * hidden + torch.arange(hidden)  # [E, H]
    w_up = torch.cat([gate[n], up[n]], dim=1)
    w_down = down.T[n].mT.contiguous() * (pieces / factor)
    first = torch.arange(shared)
    return router[e // pieces], w_up, w_down, torch.cat([gate[first], up[first]]), down[:, first]  # fmt: skip


def upcycle_by_the_package(gate, up, down, router, pieces, shared, factor):
    upcycled_spec(ModelSpec("m", 4, 1, 8, GQA(2, 1, 2), ffn=FFN(8, gated=True)), 2, 1)
    return upcycle_layer(gate, up, down, router, pieces, shared, factor)


# 06.7


def step(
    weight,
    grad,
    m,
    v,
    steps,
    lr,
    betas,
    eps,
    decay,
    *,
    idle=lambda g: (g == 0).flatten(1).all(1),
    spare=("weight", "m", "v", "steps"),
    coupled=False,
    eps_inside=False,
    decay_last=False,
    correct=True,
    clock=None,
    by_entry=False,
    no_decay=False,
    add_one=True,
    nesterov=False,
    amplified=False,
    multiply=False,
    own_steps=False,
    undo=False,
    decay_plain=False,
):
    along = (-1, *[1] * (grad.ndim - 1))
    off = idle(grad)
    entry = (grad == 0) if by_entry else off.view(along)
    g = grad + decay * weight if coupled else grad
    t = steps + 1 if add_one else steps
    t_new = torch.where(off, steps, t) if "steps" in spare else t
    if multiply:
        t = t_new if own_steps else t
    count = (clock(t) if clock else t).to(weight.dtype).view(along)
    m1 = betas[0] * m + (1 - betas[0]) * g
    v1 = betas[1] * v + (1 - betas[1]) * g * g
    m_hat, v_hat = m1, v1
    if correct:
        m_hat, v_hat = m1 / (1 - betas[0] ** count), v1 / (1 - betas[1] ** count)
    root = (v_hat + eps).sqrt() if eps_inside else v_hat.sqrt() + eps
    move = lr * m_hat / root
    if coupled or no_decay:
        w1 = weight - move
    elif decay_plain:
        w1 = weight * (1 - decay) - move
    elif decay_last:
        w1 = (weight - move) * (1 - lr * decay)
    else:
        w1 = weight * (1 - lr * decay) - move
    if multiply:
        on = 1 - entry.to(weight.dtype)
        w, new_m, new_v = (
            old * (1 - on) + on * new for old, new in ((weight, w1), (m, m1), (v, v1))
        )
        return w, new_m, new_v, t_new
    if undo:
        shrunk = 1 - lr * decay
        return torch.where(entry, weight * shrunk / shrunk, w1), *step(weight, grad, m, v, steps, lr, betas, eps, decay)[1:]  # fmt: skip
    return (
        torch.where(entry, weight, w1) if "weight" in spare else w1,
        torch.where(entry, m, m1) if "m" in spare else m1,
        torch.where(entry, v, v1) if "v" in spare else v1,
        t_new,
    )


def step_by_products(**case):
    return step(**case, multiply=True)


def step_in_place(weight, grad, m, v, steps, **rest):
    new = step(weight, grad, m, v, steps, **rest)
    weight.copy_(new[0])
    return new


def step_last_wins(weight, grad, m, v, steps, lr, betas, eps, decay):
    """Idle where the last expert dimension's rows are."""
    return step(weight, grad, m, v, steps, lr, betas, eps, decay, by_entry=False, idle=lambda g: (g[:, 0].reshape(len(g), -1) == 0).all(1))  # fmt: skip


def step_of_torch(weight, grad, m, v, steps, lr, betas, eps, decay):
    """torch.optim.AdamW over the whole stack."""
    p = nn.Parameter(weight.clone())
    p.grad = grad
    adam = torch.optim.AdamW([p], lr, betas, eps, decay)
    adam.state[p] = {
        "step": torch.tensor(float(steps.max())),
        "exp_avg": m.clone(),
        "exp_avg_sq": v.clone(),
    }
    adam.step()
    state = adam.state[p]
    return p.detach(), state["exp_avg"], state["exp_avg_sq"], steps + 1


def step_by_expert(weight, grad, m, v, steps, lr, betas, eps, decay):
    """torch's AdamW for each expert that took part."""
    new = [t.clone() for t in (weight, m, v, steps)]
    for e in range(len(weight)):
        if torch.count_nonzero(grad[e]) == 0:
            continue
        p = nn.Parameter(weight[e].clone())
        p.grad = grad[e].clone()
        adam = torch.optim.AdamW([p], lr, betas, eps, decay)
        adam.state[p] = {
            "step": torch.tensor(float(steps[e])),
            "exp_avg": m[e].clone(),
            "exp_avg_sq": v[e].clone(),
        }
        adam.step()
        state = adam.state[p]
        new[0][e], new[1][e] = p.detach(), state["exp_avg"]
        new[2][e], new[3][e] = state["exp_avg_sq"], steps[e] + 1
    return tuple(new)


def step_of_rows(weight, grad, m, v, steps, lr, betas, eps, decay):
    """Only the rows of those that took part are taken out, moved and put back."""
    on = grad.ne(0).reshape(len(grad), -1).any(1).nonzero().squeeze(1)
    t = (steps[on] + 1).double()
    shape = (-1, *[1] * (weight.ndim - 1))
    g = grad[on]
    m1 = torch.lerp(m[on], g, 1 - betas[0])
    v1 = v[on].mul(betas[1]).addcmul(g, g, value=1 - betas[1])
    rate = (lr / (1 - betas[0] ** t)).to(weight.dtype).reshape(shape)
    root = (1 - betas[1] ** t).sqrt().to(weight.dtype).reshape(shape)
    w1 = weight[on] - lr * decay * weight[on] - rate * m1 / (v1.sqrt() / root + eps)
    out = [
        old.index_copy(0, on, new)
        for old, new in ((weight, w1), (m, m1), (v, v1), (steps, steps[on] + 1))
    ]
    return out[0], out[1], out[2], out[3]


def step_by_the_package(weight, grad, m, v, steps, lr, betas, eps, decay):
    bank = nn.Module()
    bank.w = nn.Parameter(weight.clone())
    bank.w.grad = grad.clone()
    adam = torch.optim.AdamW([bank.w], lr, betas, eps, decay)
    select.spare_idle_experts(adam, [bank])
    adam.step()
    return step(weight, grad, m, v, steps, lr, betas, eps, decay)


LORA_1 = "adds scale · B A x of each row's own expert, before the non-linearity"
COST_1 = "forms no B A and no weight for each row"
LIMITS_1 = "takes experts without rows, and passes gradients to x, A and B"
LAYOUT_2 = "takes expert e's rows of lora_a in a run, its columns of lora_b E apart"
ROUNDS_2 = "rounds once where weights are bfloat16; at the edges, too"
ASKED_3 = "trains what was asked for, and nothing else"
ALIKE_3 = "is not taken in by names that look alike"
COUNT_4 = "counts r · (in + out) of every matrix that is adapted"
JOINT_4 = "has one A for gate and up where they are one matrix"
BYTES_4 = (
    "counts bytes of what is frozen, of what is trained, and of training everything"
)
KEPT_5 = "agreement is the share of experts that are kept, in whatever order"
KL_5 = "KL is that of before to after, in nats, and survives a small one"
LIMITS_5 = "leaves out what was dropped, padding and forbidden experts"
SAME_6 = "computes what the dense layer computes, whoever is chosen"
LAYOUT_6 = "has pieces and copies where they belong, and the router's own rows"
LIMITS_6 = "at the edges: one piece, one copy, nothing shared, everything shared"
IDLE_7 = "leaves idle experts as they were, and moves the others as AdamW does"
NEARLY_7 = "tells idle from nearly idle, and takes first steps"

ATTENTION = ("self_attn.", "attention")
SHARED = ("mlp.shared_expert", "shared")
EXPERTS = ("mlp.experts.", "experts")
ROUTER = ("mlp.gate.", "router")

WRONG = {
    "06.1": [
        ("no LoRA", hidden_scaled(lambda s, a: 0.0), LORA_1),
        ("no scale", hidden_scaled(lambda s, a: 1.0), LORA_1),
        ("divided by the rank", hidden_scaled(lambda s, a: s / a.shape[1]), LORA_1),
        ("divided by its root", hidden_scaled(lambda s, a: s / a.shape[1] ** 0.5), LORA_1),
        ("scaled twice", hidden_scaled(lambda s, a: s * s), LORA_1),
        ("subtracted", hidden_scaled(lambda s, a: -s), LORA_1),
        ("LoRA alone", but(hidden, alone=True), LORA_1),
        ("after the non-linearity, multiplied", but(hidden, after=True), LORA_1),
        ("after the non-linearity", hidden_added_after, LORA_1),
        ("up first", but(hidden, act=lambda h: swiglu(h.roll(h.shape[-1] // 2, -1))), LORA_1),
        ("gelu", but(hidden, act=lambda h: F.gelu(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1]), LORA_1),
        ("sigmoid", but(hidden, act=lambda h: h.chunk(2, -1)[0].sigmoid() * h.chunk(2, -1)[1]), LORA_1),
        ("no up", but(hidden, act=lambda h: F.silu(h.chunk(2, -1)[0])), LORA_1),
        ("no non-linearity", but(hidden, act=lambda h: h.chunk(2, -1)[0] * h.chunk(2, -1)[1]), LORA_1),
        ("gate and up row by row", but(hidden, act=lambda h: F.silu(h[..., ::2]) * h[..., 1::2]), LORA_1),
        ("silu of all", but(hidden, act=F.silu), LORA_1),
        ("the adapter of expert 0", but(hidden, adapter=lambda e, n: 0), LORA_1),
        ("the next expert's adapter", but(hidden, adapter=lambda e, n: (e + 1) % n), LORA_1),
        ("the weights of expert 0", but(hidden, owner=lambda e, n: 0), LORA_1),
        ("LoRA on the gate alone", but(hidden, low=lambda y, f: hidden_halves(y, f, (1, 0))), LORA_1),
        ("LoRA on up alone", but(hidden, low=lambda y, f: hidden_halves(y, f, (0, 1))), LORA_1),
        ("rows behind their ends", but(hidden, start="own"), LORA_1),
        ("in float64", lambda **c: hidden(**c).double(), LORA_1),
        ("in float32", lambda **c: hidden(**c).float(), LORA_1),
        ("changes its argument", hidden_changes_its_argument, LORA_1),
        ("merged first", hidden_merged, COST_1),
        ("merged by expert", hidden_merged_by_expert, COST_1),
        ("B A first", hidden_parenthesised, COST_1),
        ("a weight for each row", hidden_gathered, COST_1),
        ("adapters for each row", hidden_gathered_adapters, COST_1),
        ("every expert on every row", hidden_every_expert, COST_1),
        ("every adapter on every row", hidden_every_adapter, COST_1),
        ("gate without LoRA", hidden_gate_inside_up_outside, LORA_1),
        ("ends as counts", lambda ends, **c: hidden(ends=ends.cumsum(0).clamp(max=len(c["x"])), **c), LORA_1),
        ("a whole scale", hidden_scaled(lambda s, a: int(s)), LORA_1),
        ("stops at an idle expert", hidden_stops_at_idle, LIMITS_1),
        ("nothing to concatenate", but(hidden, skip=True), LIMITS_1),
        ("experts with rows alone", hidden_served_only, LIMITS_1),
        ("nothing to learn at B = 0", hidden_skips_at_zero, LIMITS_1),
        ("A without gradient", lambda a, **c: hidden(a=a.detach(), **c), LIMITS_1),
        ("B without gradient", lambda b, **c: hidden(b=b.detach(), **c), LIMITS_1),
        ("x without gradient", lambda x, **c: hidden(x=x.detach(), **c), LIMITS_1),
        ("no gradient at all", torch.no_grad()(hidden), LIMITS_1),
        (PACKAGE, hidden_by_the_package, LORA_1),
    ],
    "06.2": [
        ("lora_b by expert", but(merge, slow_b=True), LAYOUT_2),
        ("lora_a by rank", but(merge, fast_a=True), LAYOUT_2),
        ("both the other way round", but(merge, slow_b=True, fast_a=True), LAYOUT_2),
        ("no scale", but(merge, power=0), LAYOUT_2),
        ("scaled twice", but(merge, power=2), LAYOUT_2),
        ("without the weight", but(merge, alone=True), LAYOUT_2),
        ("unmerged", but(merge, sign=-1), LAYOUT_2),
        ("the sum over experts", merge_one_delta, LAYOUT_2),
        ("expert 0 alone", merge_first_expert, LAYOUT_2),
        ("not at all", lambda weight, **_: weight.clone(), LAYOUT_2),
        ("the first of the rank", but(merge, product=lambda a, b: b[..., :1] @ a[:, :1]), LAYOUT_2),
        ("in float32", but(merge, wide=lambda t: t.float()), LAYOUT_2),
        ("in bfloat16", but(merge, wide=lambda t: t.bfloat16()), LAYOUT_2),
        ("as float64", lambda **c: merge(**c).double(), LAYOUT_2),
        ("experts below each other", lambda **c: merge(**c).flatten(0, 1), LAYOUT_2),
        ("changes its argument", merge_changes_its_argument, LAYOUT_2),
        ("transposed", lambda **c: merge(**c).mT, LAYOUT_2),
        ("rounded twice", but(merge, add=lambda w, d: w + d.to(w.dtype)), ROUNDS_2),
        ("adapters rounded", lambda weight, lora_a, lora_b, scale: merge(weight, lora_a.to(weight), lora_b.to(weight), scale), ROUNDS_2),
        ("A rounded", lambda weight, lora_a, lora_b, scale: merge(weight, lora_a.to(weight), lora_b, scale), ROUNDS_2),
        ("all in the weight's type", lambda weight, lora_a, lora_b, scale: merge(weight, lora_a.to(weight), lora_b.to(weight), scale, wide=lambda t: t), ROUNDS_2),
        ("in float16", merge_in_float16, ROUNDS_2),
        ("cut off", but(merge, add=truncated), ROUNDS_2),
        ("not rounded", but(merge, add=lambda w, d: (w.float() if w.dtype == torch.bfloat16 else w) + d.to(torch.float32 if w.dtype == torch.bfloat16 else w.dtype)), ROUNDS_2),
        ("one expert squeezed", lambda **c: merge(**c).squeeze(), LAYOUT_2),
        (PACKAGE, merge_by_the_package, LAYOUT_2),
    ],
    "06.3": [
        ("the sources' loop", names_of_the_sources, ASKED_3),
        ("all adapters", names_of_the_sources_mended, ASKED_3),
        ("the rest as well", but(names_trained, rest=True), ASKED_3),
        ("all of a part", but(names_trained, both=True), ASKED_3),
        ("all layers", but(names_trained, within=lambda n, layers: True), ASKED_3),
        ("the other layers", but(names_trained, within=lambda n, layers: layers is None or n not in layers), ASKED_3),
        ("no adapters", but(names_trained, adapter=lambda name: False), ASKED_3),
        ("B alone is an adapter", but(names_trained, adapter=lambda name: "lora_B" in name), ASKED_3),
        ("what is frozen", lambda names, **c: [n for n in names if n not in names_trained(names, **c)], ASKED_3),
        ("sorted", but(names_trained, as_=sorted), ASKED_3),
        ("a tuple", but(names_trained, as_=tuple), ASKED_3),
        ("a set", but(names_trained, as_=set), ASKED_3),
        ("part by part", names_by_part, ASKED_3),
        ("adapters first", names_by_request, ASKED_3),
        ("changes its argument", names_changed, ASKED_3),
        ("lora and full exchanged", lambda names, lora, full, layers: names_trained(names, full, lora, layers), ASKED_3),
        ("no router", but(names_trained, part_of=lambda n: {"router": None}.get(names_part(n), names_part(n))), ASKED_3),
        ("layer 0 is none", but(names_trained, within=lambda n, layers: layers is None or (n and n in layers)), ASKED_3),
        ("gate is gate_proj", but(names_trained, part_of=names_part_by_letters(ATTENTION, EXPERTS, SHARED, ("mlp.gate", "router"))), ALIKE_3),
        ("any gate is the router", but(names_trained, part_of=names_part_by_letters(ATTENTION, EXPERTS, (".gate", "router"), SHARED)), ALIKE_3),
        ("shared experts are experts", but(names_trained, part_of=names_part_by_letters(ATTENTION, ("expert", "experts"), ROUTER)), ALIKE_3),
        ("experts without a dot", but(names_trained, part_of=names_part_by_letters(ATTENTION, ("experts", "experts"), SHARED, ROUTER)), ALIKE_3),
        ("attention without a dot", but(names_trained, part_of=names_part_by_letters(("self_attn", "attention"), EXPERTS, ("mlp.shared_expert.", "shared"), ("mlp.shared_expert_gate.", "shared"), ROUTER)), ALIKE_3),
        ("shared without a dot", but(names_trained, part_of=names_part_by_letters(ATTENTION, EXPERTS, SHARED, ROUTER)), ALIKE_3),
        ("no gate of the shared one", but(names_trained, part_of=lambda n: None if "shared_expert_gate" in n else names_part(n)), ALIKE_3),
        ("lora anywhere", but(names_trained, adapter=lambda name: "lora" in name), ALIKE_3),
        ("lora_ anywhere", but(names_trained, adapter=lambda name: "lora_" in name), ALIKE_3),
        ("layers by their digits", but(names_trained, within=lambda n, layers: layers is None or any(str(n).startswith(str(m)) for m in layers)), ALIKE_3),
        ("layers of one digit", but(names_trained, layer=lambda name: re.search(r"(?:^|\.)layers\.(\d)", name)), ALIKE_3),
        ("no layers are all", but(names_trained, within=lambda n, layers: not layers or n in layers), ALIKE_3),
        ("a dot before layers", but(names_trained, layer=lambda name: re.search(r"\.layers\.(\d+)\.", name)), ALIKE_3),
        ("the third step", names_by_position, ALIKE_3),
        ("a number behind every layers", names_need_a_number, ALIKE_3),
        ("outside of layers", names_outside_of_layers, ALIKE_3),
        (PACKAGE, names_by_the_package, ASKED_3),
    ],
    "06.4": [
        ("multi-head attention", but(training, heads="mha"), COUNT_4),
        ("heads as wide as the model", but(training, heads="width"), COUNT_4),
        ("no output projection", but(training, out=False), COUNT_4),
        ("two matrices", but(training, matrices=2), COUNT_4),
        ("r · in · out", but(training, product=True), COUNT_4),
        ("experts in dense layers", but(training, all_layers=True), COUNT_4),
        ("attention in sparse layers", but(training, attention_layers=lambda s: s["layers"] - s["dense_layers"]), COUNT_4),
        ("one expert", but(training, routed=lambda s: 1), COUNT_4),
        ("two experts", but(training, routed=lambda s: 2), COUNT_4),
        ("one rank for all", but(training, first_rank=True), COUNT_4),
        ("as many shared as routed", lambda shape, **c: training(shape, **c, shared_experts=shape["experts"]), COUNT_4),
        ("two results", lambda **c: training(**c)[:2], COUNT_4),
        ("never joint", but(training, joint_mode="no"), JOINT_4),
        ("an A more", but(training, joint_mode="adds"), JOINT_4),
        ("one B", but(training, joint_mode="half"), JOINT_4),
        ("no up projection", but(training, joint_mode="down"), JOINT_4),
        ("one A for all three", but(training, joint_mode="both"), JOINT_4),
        ("the shared one joint, too", but(training, joint_shared=True), JOINT_4),
        ("always joint", lambda joint, **c: training(joint=True, **c), COUNT_4),
        ("no router", but(training, router=False), BYTES_4),
        ("one norm", but(training, norms=1), BYTES_4),
        ("no final norm", but(training, final=0), BYTES_4),
        ("no norms", but(training, norms=0, final=0), BYTES_4),
        ("never tied", but(training, tied=False), BYTES_4),
        ("no dense layers", but(training, dense=False), BYTES_4),
        ("2 bytes of a trained one", but(training, each=2), BYTES_4),
        ("12 bytes of a trained one", but(training, each=12), BYTES_4),
        ("18 bytes of a trained one", but(training, each=18), BYTES_4),
        ("2 bytes of everything", but(training, full_each=2), BYTES_4),
        ("frozen less trained", but(training, frozen=lambda total, trained: total - trained), BYTES_4),
        ("adapters frozen as well", but(training, frozen=lambda total, trained: total + trained), BYTES_4),
        ("adapters alone", training_adapters_alone, BYTES_4),
        ("everything, and adapters", training_full_with_lora, BYTES_4),
        ("rounded down", but(training, round_up=False), BYTES_4),
        ("rounded up in each layer", training_rounds_each_matrix, BYTES_4),
        ("adapters of no shared expert", but(training, empty_shared=1), BYTES_4),
        ("floats", training_floats, BYTES_4),
        ("16 bits", lambda frozen_bits, **c: training(frozen_bits=16, **c), BYTES_4),
        (PACKAGE, training_by_the_package, COUNT_4),
    ],
    "06.5": [
        ("place by place", but(moved, ordered=True), KEPT_5),
        ("Jaccard", but(moved, jaccard=True), KEPT_5),
        ("the first choice", but(moved, first=True), KEPT_5),
        ("any in common", but(moved, any_shared=True), KEPT_5),
        ("experts a token", but(moved, divisor="tokens"), KEPT_5),
        ("chosen again from the logits", but(moved, rechoose=True), KEPT_5),
        ("tensors", but(moved, plain=False), KEPT_5),
        ("agreement in float32", lambda **c: (float(torch.tensor(moved(**c)[0]).float()), moved(**c)[1]), KEPT_5),
        ("drift, not agreement", lambda **c: (1 - moved(**c)[0], moved(**c)[1]), KEPT_5),
        ("one result", lambda **c: moved(**c)[0], KEPT_5),
        ("after to before", but(moved, kl=lambda p, q, _: moved_kl(q, p)), KL_5),
        ("bits", but(moved, kl=lambda p, q, _: moved_kl(p, q) / math.log(2)), KL_5),
        ("the mean over experts", but(moved, kl=lambda p, q, _: moved_kl(p, q) / p.shape[1]), KL_5),
        ("the sum over tokens", but(moved, kl=lambda p, q, _: moved_kl(p, q) * len(p)), KL_5),
        ("symmetric", but(moved, kl=lambda p, q, _: (moved_kl(p, q) + moved_kl(q, p)) / 2), KL_5),
        ("Jensen-Shannon", but(moved, kl=lambda p, q, _: moved_kl(p, (p.exp() + q.exp()).log() - math.log(2))), KL_5),
        ("cross-entropy", but(moved, kl=lambda p, q, _: -(p.exp() * q).sum(1).mean()), KL_5),
        ("total variation", but(moved, kl=lambda p, q, _: (p.exp() - q.exp()).abs().sum(1).mean() / 2), KL_5),
        ("of the mean probabilities", but(moved, kl=lambda p, q, _: moved_kl(p.exp().mean(0).log()[None], q.exp().mean(0).log()[None])), KL_5),
        ("in the logits' type", but(moved, wide=lambda t: t), KL_5),
        ("in float32", but(moved, wide=lambda t: t.float()), KL_5),
        ("softmax, then log", but(moved, kl=lambda p, q, _: (p.exp() * (p.exp() / q.exp()).log()).sum(1).mean()), KL_5),
        ("an epsilon", but(moved, kl=lambda p, q, _: (p.exp() * ((p.exp() + 1e-9) / (q.exp() + 1e-9)).log()).sum(1).mean()), KL_5),
        ("of probabilities twice", but(moved, kl=lambda p, q, _: moved_kl(p.exp().log_softmax(1), q.exp().log_softmax(1))), KL_5),
        ("in float32 at last", lambda **c: (moved(**c)[0], float(np.float32(moved(**c)[1]))), KL_5),
        ("nothing below -30", but(moved, kl=lambda p, q, _: moved_kl(p.clamp(min=-30), q.clamp(min=-30))), KL_5),
        ("what softmax has left", but(moved, kl=lambda p, q, _: (p.exp() * (p.exp().log() - q.exp().log())).nan_to_num(0, 0, 0).sum(1).mean()), KL_5),
        ("never below 1e-6", but(moved, kl=lambda p, q, _: moved_kl(p, q).clamp(min=1e-6)), KL_5),
        ("E agrees with E", but(moved, missing=False), LIMITS_5),
        ("E is an expert", but(moved, missing=False, chosen=False), LIMITS_5),
        ("token by token", but(moved, by_token=True), LIMITS_5),
        ("of all K", but(moved, divisor="slots"), LIMITS_5),
        ("of all T · K", but(moved, divisor="all"), LIMITS_5),
        ("of those after", but(moved, divisor="after"), LIMITS_5),
        ("padding counts", but(moved, padded=False), LIMITS_5),
        ("tokens that lost all count nowhere", but(moved, both_real=True), LIMITS_5),
        ("forbidden experts are NaN", but(moved, forbidden=False), LIMITS_5),
        ("masked by a product", but(moved, kl=moved_masked_by_zero), LIMITS_5),
        ("nansum", moved_nansum, LIMITS_5),
        ("NaN of nothing", but(moved, nothing=(math.nan, math.nan)), LIMITS_5),
        ("0 of nothing", but(moved, nothing=(0.0, 0.0)), LIMITS_5),
        (PACKAGE, moved_by_the_package, KEPT_5),
    ],
    "06.6": [
        ("no correction", but(upcycle_layer, correction=lambda p, f, n: 1.0), SAME_6),
        ("pieces alone", but(upcycle_layer, correction=lambda p, f, n: p), SAME_6),
        ("factor alone", but(upcycle_layer, correction=lambda p, f, n: 1 / f), SAME_6),
        ("times factor", but(upcycle_layer, correction=lambda p, f, n: p * f), SAME_6),
        ("upside down", but(upcycle_layer, correction=lambda p, f, n: f / p), SAME_6),
        ("times copies", but(upcycle_layer, correction=lambda p, f, n: n * p / f), SAME_6),
        ("by copies", but(upcycle_layer, correction=lambda p, f, n: n / f), SAME_6),
        ("rows dealt out", but(upcycle_layer, tiled=True), SAME_6),
        ("pieces side by side", but(upcycle_layer, interleaved=True), SAME_6),
        ("the shared one corrected", but(upcycle_layer, shared_scale=lambda f: 1 / f), SAME_6),
        ("the shared one times factor", but(upcycle_layer, shared_scale=lambda f: f), SAME_6),
        ("up first", but(upcycle_layer, up_first=True), SAME_6),
        ("a new router", but(upcycle_layer, fresh=True), SAME_6),
        ("noise in the router", but(upcycle_layer, rows=lambda r: r + 0.1 * torch.randn_like(r)), SAME_6),
        ("corrected before the non-linearity", lambda gate, up, down, router, pieces, shared, factor: upcycle_layer(gate * (pieces / factor), up, down, router, pieces, shared, factor, correction=lambda *_: 1.0), SAME_6),
        ("pieces of the whole", lambda gate, up, down, router, pieces, shared, factor: upcycle_layer(gate.roll(1, 0), up, down, router, pieces, shared, factor), SAME_6),
        ("float32", upcycle_in_float32, SAME_6),
        ("float64", lambda **c: tuple(t.double() for t in upcycle_layer(**c)), SAME_6),
        ("four tensors", lambda **c: upcycle_layer(**c)[:4], SAME_6),
        ("changes its argument", upcycle_changes_its_argument, SAME_6),
        ("corrected in w_up", but(upcycle_layer, on_up=True), LAYOUT_6),
        ("half of it in w_up", but(upcycle_layer, root=True), LAYOUT_6),
        ("every pieces-th hidden number", but(upcycle_layer, strided=True), LAYOUT_6),
        ("the last piece first", but(upcycle_layer, reverse=True), LAYOUT_6),
        ("the last ones shared", but(upcycle_layer, last=True), LAYOUT_6),
        ("a router of zeros", but(upcycle_layer, rows=lambda r: 0 * r), LAYOUT_6),
        ("a scaled router", but(upcycle_layer, rows=lambda r: 0.1 * r), LAYOUT_6),
        ("copies in another order", but(upcycle_layer, rows=lambda r: r.flip(0)), LAYOUT_6),
        ("one row for all", but(upcycle_layer, rows=lambda r: r[:1].expand_as(r).clone()), LAYOUT_6),
        ("nothing shared, nothing returned", upcycle_without_shared, LIMITS_6),
        ("[:-0]", upcycle_counts_from_the_end, LIMITS_6),
        ("[-0:]", but(upcycle_layer, cut=True), LIMITS_6),
        (PACKAGE, upcycle_by_the_package, SAME_6),
    ],
    "06.7": [
        ("torch's AdamW", step_of_torch, IDLE_7),
        ("nobody is idle", but(step, idle=lambda g: torch.zeros(len(g), dtype=torch.bool)), IDLE_7),
        ("weights decay", but(step, spare=("m", "v", "steps")), IDLE_7),
        ("m decays", but(step, spare=("weight", "v", "steps")), IDLE_7),
        ("v decays", but(step, spare=("weight", "m", "steps")), IDLE_7),
        ("idle steps count", but(step, spare=("weight", "m", "v")), IDLE_7),
        ("weights alone", but(step, spare=("weight",)), IDLE_7),
        ("moments alone", but(step, spare=("m", "v")), IDLE_7),
        ("decay in the gradient", but(step, coupled=True), IDLE_7),
        ("no decay", but(step, no_decay=True), IDLE_7),
        ("decay without lr", but(step, decay_plain=True), IDLE_7),
        ("decay last", but(step, decay_last=True), IDLE_7),
        ("eps under the root", but(step, eps_inside=True), IDLE_7),
        ("no bias correction", but(step, correct=False), IDLE_7),
        ("one clock for all", but(step, clock=lambda t: t.max().expand_as(t)), IDLE_7),
        ("the step before", but(step, clock=lambda t: (t - 1).clamp(min=1)), IDLE_7),
        ("no step counted", but(step, add_one=False, clock=lambda t: t + 1), IDLE_7),
        ("changes its argument", step_in_place, IDLE_7),
        ("three results", lambda *a, **c: step(*a, **c)[:3], IDLE_7),
        ("steps as floats", lambda *a, **c: (*step(*a, **c)[:3], step(*a, **c)[3].double()), IDLE_7),
        ("steps in 32 bits", lambda *a, **c: (*step(*a, **c)[:3], step(*a, **c)[3].int()), IDLE_7),
        ("in float64", lambda *a, **c: (step(*a, **c)[0].double(), *step(*a, **c)[1:]), IDLE_7),
        ("decay undone", but(step, undo=True), IDLE_7),
        ("NaN times 0", but(step, multiply=True, own_steps=True), NEARLY_7),
        ("sums cancel", but(step, idle=lambda g: g.flatten(1).sum(1) == 0), NEARLY_7),
        ("norms vanish", but(step, idle=lambda g: g.flatten(1).square().sum(1) == 0), NEARLY_7),
        ("nearly 0 is 0", but(step, idle=lambda g: g.flatten(1).abs().amax(1) < 1e-12), NEARLY_7),
        ("the largest is 0", but(step, idle=lambda g: g.flatten(1).amax(1) == 0), NEARLY_7),
        ("the least is 0", but(step, idle=lambda g: g.flatten(1).amin(1) == 0), NEARLY_7),
        ("any 0 is idle", but(step, idle=lambda g: (g == 0).flatten(1).any(1)), NEARLY_7),
        ("the first entry", but(step, idle=lambda g: g.flatten(1)[:, 0] == 0), NEARLY_7),
        ("the first row", step_last_wins, NEARLY_7),
        ("entry by entry", but(step, by_entry=True), NEARLY_7),
        (PACKAGE, step_by_the_package, IDLE_7),
    ],
}  # fmt: skip

RIGHT = {
    "06.1": [hidden, hidden_filled, hidden_padded, hidden_concatenated],
    "06.2": [merge, merge_by_strides, merge_by_einsum, merge_one_by_one],
    "06.3": [names_trained, names_by_pattern, names_by_prefixes],
    "06.4": [training, training_one_by_one],
    "06.5": [moved, moved_by_loop, moved_by_one_hot, moved_in_numpy],
    "06.6": [upcycle_layer, upcycle_by_loop, upcycle_by_index],
    "06.7": [step, step_by_products, step_by_expert, step_of_rows],
}
