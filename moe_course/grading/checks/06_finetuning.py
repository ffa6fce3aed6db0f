"""Checks of exercise 06: LoRA on stacked experts, merging, names, budgets, drift, upcycling, idle experts.

The oracles here are loops over rows, experts and matrices; they do not call moe_course.finetune. An upcycled layer is
run here, on tokens and with a k that the answer has not seen.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
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
from moe_course.grading.tensors import (
    compare,
    cost,
    expect_tensor,
    normal,
    taking_gradients,
)

FLOATS = (torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)


def _several(
    got: Any, number: int, case: dict[str, Any], names: str
) -> tuple[Any, ...]:
    if not isinstance(got, tuple | list) or len(got) != number:
        came = f"{len(got)} results" if isinstance(got, tuple | list) else shown(got)
        raise Failure(
            f"{describe(**case)}:\n    expected {names}, got {came}", hint=False
        )
    return tuple(got)


def _named(got: Any, mistakes: dict[str, Callable[..., Any]], want: Any) -> str:
    """Which of the usual mistakes gives this tensor; none where it is the right one as well."""
    if type(got) is not Tensor or got.shape != want.shape or got.dtype != want.dtype:
        return ""
    plain, scale = Tensor.detach(got).double(), float(want.abs().max())

    def is_like(other: Tensor) -> bool:
        far = (plain - other.double()).abs().max()
        return bool(far <= 1e-4 * scale)

    if is_like(want):
        return "\n    nearly: compute in the type of the arguments, float32 rounds in the seventh digit"
    for text, mistake in mistakes.items():
        if is_like(mistake()):
            return f"\n    that is {text}"
    return ""


# 06.1


def _act(h: Tensor) -> Tensor:
    gate, up = h.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


def _owners(ends: Tensor) -> list[int]:
    """The expert of each row."""
    owners: list[int] = []
    for e, end in enumerate(ends.tolist()):
        owners += [e] * (end - len(owners))
    return owners


def _hidden(
    x: Tensor, ends: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float
) -> Tensor:
    rows = [
        _act(weight[e] @ row + scale * (b[e] @ (a[e] @ row)))
        for row, e in zip(x, _owners(ends), strict=True)
    ]
    return torch.stack(rows) if rows else x.new_zeros(0, weight.shape[1] // 2)


def _lora_case(
    rng: Random,
    counts: list[int],
    width: int,
    hidden: int,
    rank: int,
    scale: float = 0.0,
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    experts, dtype = len(counts), dtype or rng.choice(FLOATS)
    ends = [sum(counts[: e + 1]) for e in range(experts)]
    return {
        "x": normal(rng, sum(counts), width, dtype=dtype),
        "ends": torch.tensor(ends, dtype=rng.choice(INTEGERS)),
        "weight": normal(rng, experts, 2 * hidden, width, dtype=dtype) / width**0.5,
        "a": normal(rng, experts, rank, width, dtype=dtype) / width**0.5,
        "b": normal(rng, experts, 2 * hidden, rank, dtype=dtype) / rank**0.5,
        "scale": scale or rng.choice([0.5, 1.5, 2.25, 3.7]),
    }


def _lora_mistakes(
    case: dict[str, Any],
) -> dict[str, Callable[[], Tensor]]:
    weight, a, b = case["weight"], case["a"], case["b"]

    def after() -> Tensor:
        plain, low = _hidden(**case | {"scale": 0.0}), []
        for row, e in zip(case["x"], _owners(case["ends"]), strict=True):
            low.append(case["scale"] * (b[e] @ (a[e] @ row))[: plain.shape[1]])
        return plain + torch.stack(low)

    return {
        "what the experts give without LoRA": lambda: _hidden(**case | {"scale": 0.0}),
        "without the scale": lambda: _hidden(**case | {"scale": 1.0}),
        "with the scale divided by the rank once more": lambda: _hidden(
            **case | {"scale": case["scale"] / a.shape[1]}
        ),
        "what LoRA gives alone; the weights are to be added": lambda: _hidden(
            **case | {"weight": 0 * weight}
        ),
        "with LoRA added after the non-linearity": after,
        "with up in place of gate; the first F rows are the gate": lambda: _hidden(
            **case | {"weight": weight.roll(weight.shape[1] // 2, 1), "b": b.roll(b.shape[1] // 2, 1)}
        ),
        "with the adapter of expert 0 for all": lambda: _hidden(
            **case | {"a": a[:1].expand_as(a), "b": b[:1].expand_as(b)}
        ),
    }  # fmt: skip


def _lora_values(answer: Answer, rng: Random) -> None:
    sizes = (
        ([1, 1], 2, 1, 2),
        ([2, 1, 3], 5, 3, 2),
        ([4, 2, 5, 3], 7, 4, 3),
        ([9, 3], 6, 6, 5),
    )
    for number, (counts, width, hidden, rank) in enumerate(sizes):
        dtype = FLOATS[number % 2]
        case = _lora_case(rng, counts, width, hidden, rank, dtype=dtype)
        got, want = answer(**case), _hidden(**case)
        try:
            compare(got, want, describe(**case))
        except Failure as failure:
            text = f"{failure}{_named(got, _lora_mistakes(case), want)}"
            raise Failure(text, failure.hint) from None


def _lora_cost(answer: Answer, rng: Random) -> str:
    # Two rows an expert, and a rank of 8: B A of each expert costs four times the rows' own products.
    experts, each, rank, width, hidden = 8, 2, 8, 64, 32
    case = _lora_case(
        rng, [each] * experts, width, hidden, rank, dtype=torch.float32
    )  # fmt: skip
    expect_tensor(answer, [case], _hidden)
    _, done = cost(answer.function, **case)
    rows = each * experts
    needed = 2 * rows * (2 * hidden * width + rank * (width + 2 * hidden))
    # All adapters on all rows would be 1.7 times as much.
    if done > 1.5 * needed:
        raise Failure(
            f"{describe(**case)}:\n    your matrix products take {done:,} FLOPs; those of the rows take {needed:,}. "
            f"The products B A alone would take {2 * experts * 2 * hidden * rank * width:,}"
        )
    # Eight rows an expert: a weight for each row would be eight times the weights.
    each, rank, width, hidden = 8, 16, 32, 16
    case = _lora_case(rng, [each] * experts, width, hidden, rank, dtype=torch.float32)
    expect_tensor(answer, [case], _hidden)
    most, _ = cost(answer.function, **case)
    weights = case["weight"].numel()
    if most > 2 * weights:
        raise Failure(
            f"{describe(**case)}:\n    your largest tensor has {most:,} entries; all weights together have {weights:,}"
        )
    return f"{done / needed:.1f} times the FLOPs of the rows' products"


def _lora_limits(answer: Answer, rng: Random) -> None:
    cases = [
        _lora_case(rng, [0, 3], 3, 2, 2),
        _lora_case(rng, [2, 0, 0, 1], 4, 3, 2),
        _lora_case(rng, [0, 0, 4, 0], 4, 2, 1),
        _lora_case(rng, [0, 0, 0], 3, 2, 2),
        _lora_case(rng, [3], 1, 1, 1),
        _lora_case(rng, [1, 0, 2], 3, 2, 6),  # a rank above the sizes
    ]
    expect_tensor(answer, cases, _hidden)
    start = _lora_case(rng, [2, 0, 3], 4, 3, 2, dtype=torch.float64)
    start["b"] = torch.zeros_like(start["b"])
    for case in (start, _lora_case(rng, [3, 0, 2], 5, 2, 3, dtype=torch.float64)):
        upstream = normal(rng, len(case["x"]), case["weight"].shape[1] // 2)

        def gradients(
            function: Callable[..., Any],
            case: dict[str, Any] = case,
            upstream: Tensor = upstream,
        ) -> Any:
            leaves = {n: case[n].clone().requires_grad_() for n in ("x", "a", "b")}
            value = (function(**case | leaves) * upstream).sum()
            return torch.autograd.grad(value, list(leaves.values()), allow_unused=True)

        with taking_gradients(describe(**case)):
            found = gradients(answer.function)
        for name, got, want in zip(("x", "a", "b"), found, gradients(_hidden), strict=True):  # fmt: skip
            if got is None:
                raise Failure(f"{describe(**case)}:\n    no gradient reaches {name}")
            compare(got, want, f"{describe(**case)}, gradient of {name}")


# 06.2


def _delta(a: Tensor, b: Tensor, experts: int) -> Tensor:
    """B A of each expert in float64, entry by entry of the rank."""
    rank = len(a) // experts
    a, b = a.double(), b.double()
    whole = torch.zeros(experts, len(b), a.shape[1], dtype=torch.float64)
    for e in range(experts):
        for j in range(rank):
            whole[e] += torch.outer(b[:, j * experts + e], a[e * rank + j])
    return whole


def _exact(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    return weight.double() + scale * _delta(lora_a, lora_b, len(weight))


def _expect_merged(answer: Answer, case: dict[str, Any]) -> None:
    weight, a, b = case["weight"], case["lora_a"], case["lora_b"]
    exact, what, got = _exact(**case), describe(**case), answer(**case)
    nearest = exact.to(weight.dtype)
    if weight.dtype != torch.bfloat16:
        experts, rank = len(weight), len(a) // len(weight)
        slow = b.unflatten(1, (experts, rank)).movedim(2, 1).flatten(1)
        fast = a.unflatten(0, (rank, experts)).movedim(1, 0).flatten(0, 1)
        mistakes = {
            "with r neighbouring columns of lora_b for each expert; there the expert is the fast index": case
            | {"lora_b": slow},
            "with every E-th row of lora_a for each expert; there the expert is the slow index": case
            | {"lora_a": fast},
            "with the expert slow in lora_b and fast in lora_a; it is the other way round": case
            | {"lora_a": fast, "lora_b": slow},
            "without the scale": case | {"scale": 1.0},
            "the addition alone": case | {"weight": 0 * weight},
        }
        try:
            compare(got, nearest, what)
        except Failure as failure:
            tried = {t: lambda c=c: _exact(**c) for t, c in mistakes.items()}
            raise Failure(f"{failure}{_named(got, tried, nearest)}", failure.hint) from None  # fmt: skip
        return
    if type(got) is not Tensor or got.dtype != nearest.dtype or got.shape != nearest.shape:  # fmt: skip
        compare(got, nearest, what)  # says what is amiss
    off = (Tensor.detach(got).double() - exact).abs()
    # What float32 may have lost before it was rounded.
    allowed = (nearest.double() - exact).abs() + 1e-6 * float(exact.abs().max())
    if not bool((off <= allowed).all()):
        at = tuple((~(off <= allowed)).nonzero()[0].tolist())
        raise Failure(
            f"{what}:\n    at {list(at)}, where it is {exact[at].item():.7g}: the nearest bfloat16 is "
            f"{nearest[at].item():.7g}, got {got[at].item():.7g}"
        )


def _merge_case(
    rng: Random,
    experts: int,
    rows: int,
    columns: int,
    rank: int,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Any]:
    adapters = torch.float32 if dtype == torch.bfloat16 else dtype
    return {
        "weight": normal(rng, experts, rows, columns, dtype=dtype),
        "lora_a": normal(rng, experts * rank, columns, dtype=adapters),
        "lora_b": normal(rng, rows, rank * experts, dtype=adapters),
        "scale": rng.choice([0.25, 0.75, 1.5, 2.6]),
    }


def _merge_values(answer: Answer, rng: Random) -> None:
    by_hand: dict[str, Any] = {
        "weight": torch.zeros(2, 1, 1),
        "lora_a": torch.tensor([[1.0], [2.0], [3.0], [4.0]]),
        "lora_b": torch.tensor([[10.0, 20.0, 30.0, 40.0]]),
        "scale": 1.0,
    }
    _expect_merged(answer, by_hand)
    sizes = ((3, 2, 4, 2), (2, 5, 3, 3), (3, 3, 3, 3), (4, 7, 5, 2))
    for number, size in enumerate(sizes):
        _expect_merged(answer, _merge_case(rng, *size, dtype=FLOATS[number % 2]))


def _merge_limits(answer: Answer, rng: Random) -> None:
    _expect_merged(answer, _merge_case(rng, 2, 6, 5, 2, torch.bfloat16))
    _expect_merged(answer, _merge_case(rng, 4, 16, 9, 3, torch.bfloat16))
    small = _merge_case(rng, 3, 16, 16, 4, torch.bfloat16) | {"scale": 0.01}
    _expect_merged(answer, small)
    # Past float16: 70000 is a bfloat16.
    large = _merge_case(rng, 2, 3, 4, 2, torch.bfloat16)
    _expect_merged(answer, large | {"weight": large["weight"] * 1e5})
    for size in ((1, 3, 2, 2), (3, 2, 4, 1), (5, 1, 1, 2), (1, 1, 1, 1)):
        _expect_merged(answer, _merge_case(rng, *size))
    start = _merge_case(rng, 2, 3, 4, 2)
    _expect_merged(answer, start | {"lora_b": torch.zeros_like(start["lora_b"])})
    _expect_merged(answer, start | {"scale": 0.0})


# 06.3

PARTS = ("attention", "router", "experts", "shared")
_INSIDE = (
    (re.compile(r"self_attn\."), "attention"),
    (re.compile(r"mlp\.gate\."), "router"),
    (re.compile(r"mlp\.experts\."), "experts"),
    (re.compile(r"mlp\.shared_expert(_gate)?\."), "shared"),
)


def _trained(
    names: list[str], lora: list[str], full: list[str], layers: list[int] | None
) -> list[str]:
    found = []
    for name in names:
        place = re.search(r"(?:^|\.)layers\.(\d+)\.(.*)", name)
        if place is None or (layers is not None and int(place[1]) not in layers):
            continue
        part = [part for begins, part in _INSIDE if begins.match(place[2])]
        adapter = re.search(r"\.lora_[AB](\.|$)", name) is not None
        if part and part[0] in (lora if adapter else full):
            found.append(name)
    return found


def _with_lora(*paths: str) -> Iterator[str]:
    """Names of linear maps that have adapters."""
    for path in paths:
        yield f"{path}.base_layer.weight"
        yield f"{path}.lora_A.default.weight"
        yield f"{path}.lora_B.default.weight"


def _inside(sparse: bool, plain: bool) -> list[str]:
    """What a layer holds, look-alikes only where it is not to be plain."""
    names = ["input_layernorm.weight", "post_attention_layernorm.weight"]
    names += _with_lora("self_attn.q_proj", "self_attn.o_proj")
    if not plain:
        names += ["self_attn.q_norm.weight", "self_attn.k_proj.bias"]
        names += ["self_attn.k_proj.lora_A", "self_attn.k_proj.lora_B"]
        names += ["self_attn_layer_norm.weight", "self_attn_layer_norm.bias"]
    if not sparse:
        maps = ["mlp.up_proj", "mlp.down_proj"]
        return [*names, *_with_lora(*maps, *([] if plain else ["mlp.gate_proj"]))]
    names += ["mlp.gate.weight"]
    names += ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    names += ["mlp.experts.lora_A.default.weight", "mlp.experts.lora_B.default.weight"]
    if not plain:
        names += _with_lora(
            *("mlp.gate", "mlp.experts.0.gate_proj", "mlp.experts.17.up_proj"),
            *("mlp.shared_expert.gate_proj", "mlp.shared_expert.down_proj"),
        )
        names += ["mlp.shared_expert_gate.weight", "mlp.gate_up_proj.weight"]
        names += ["mlp.experts_norm.weight", "mlp.shared_experts_norm.weight"]
    return names


def _name_case(
    rng: Random, numbers: list[int], prefix: str, plain: bool
) -> dict[str, Any]:
    names = [f"{prefix}embed_tokens.weight"]
    for number in numbers:
        inside = _inside(number % 5 != 0, plain)
        if not plain:
            inside = rng.sample(inside, len(inside))
        names += [f"{prefix}layers.{number}.{name}" for name in inside]
    names += [f"{prefix}norm.weight", f"{prefix}lm_head.weight"]
    if not plain:
        names += _with_lora(f"{prefix}lm_head", f"{prefix}vision.self_attn.q_proj")
        names += [f"{prefix}projector.mlp.gate.weight", "layers"]

    def some() -> list[str]:
        return rng.sample(PARTS, rng.randint(0, 3))

    layers = None if rng.random() < 0.4 else rng.sample(numbers, rng.randint(1, len(numbers)))  # fmt: skip
    return {"names": names, "lora": some(), "full": some(), "layers": layers}


def _expect_names(answer: Answer, case: dict[str, Any]) -> None:
    got, want = answer(**case), _trained(**case)
    if same(got, want):
        return
    asked = {key: value for key, value in case.items() if key != "names"}
    what = f"{len(case['names'])} names, {describe(**asked)}"
    if type(got) is not list or not all(type(name) is str for name in got):
        raise mismatch(got, want, what)
    missing = [name for name in want if name not in got]
    more = [name for name in got if name not in want]
    if more:
        text = f"trained, and not asked for: {more[0]} ({len(more)} such)"
    elif missing:
        text = f"asked for, and not trained: {missing[0]} ({len(missing)} such)"
    else:
        text = "the right names, but not in their order, or not once each"
    raise Failure(f"{what}:\n    {text}")


def _names_frozen(answer: Answer, rng: Random) -> None:
    plain = _name_case(rng, [0, 1], "model.", True)
    requests: list[dict[str, Any]] = [
        {"lora": ["experts"], "full": [], "layers": None},
        {"lora": ["experts"], "full": ["router"], "layers": None},
        {"lora": ["attention"], "full": ["experts"], "layers": None},
        {"lora": [], "full": [], "layers": None},
        {"lora": ["attention", "experts"], "full": ["attention"], "layers": [1]},
    ]
    for request in requests:
        _expect_names(answer, plain | request)
    for _ in range(20):
        _expect_names(answer, _name_case(rng, [0, 1, 2], "model.", True))


def _names_alike(answer: Answer, rng: Random) -> None:
    numbers, few = [0, 1, 2, 10, 11, 21], [0, 1, 11]
    # The letters of "lora_" and of parts, and digits, where they mean nothing.
    prefixes = ("model.", "", "base_model.model.model.", "flora_v2.", "experts11.")
    for number in numbers:
        case = _name_case(rng, numbers, rng.choice(prefixes), False)
        _expect_names(answer, case | {"layers": [number], "lora": list(PARTS)})
    for part in PARTS:
        for prefix in prefixes:
            case = _name_case(rng, few, prefix, False) | {"layers": None}
            _expect_names(answer, case | {"lora": [part], "full": []})
            _expect_names(answer, case | {"lora": [], "full": [part]})
    for prefix in prefixes:
        for _ in range(4):
            _expect_names(answer, _name_case(rng, few, prefix, False))
    none = _name_case(rng, numbers, "model.", False)
    _expect_names(answer, none | {"layers": [], "lora": list(PARTS)})
    _expect_names(answer, none | {"layers": [99, 1], "full": list(PARTS)})
    _expect_names(answer, none | {"names": []})


# 06.4

Matrix = tuple[str, int, int]  # part, inputs, outputs


def _matrices(shape: dict[str, int]) -> Iterator[Matrix]:
    """Every matrix of the model that a LoRA could be put on, one by one."""
    d = shape["width"]
    for layer in range(shape["layers"]):
        q = shape["heads"] * shape["head_dim"]
        kv = shape["kv_heads"] * shape["head_dim"]
        for part, hidden, times in (
            ("dense", shape["dense_hidden"], layer < shape["dense_layers"]),
            ("experts", shape["hidden"], (layer >= shape["dense_layers"]) * shape["experts"]),
            ("shared", shape["shared_hidden"], (layer >= shape["dense_layers"]) and shape["shared_hidden"] > 0),
        ):  # fmt: skip
            for _ in range(times):
                yield part, d, hidden
                yield part, d, hidden
                yield part, hidden, d
        yield "attention", d, q
        yield "attention", d, kv
        yield "attention", d, kv
        yield "attention", q, d


def _bytes(
    shape: dict[str, int], ranks: dict[str, int], joint: bool, frozen_bits: int
) -> tuple[int, int, int]:
    d, sparse = shape["width"], shape["layers"] - shape["dense_layers"]
    total = shape["vocab"] * d * (1 if shape["tied"] else 2)
    total += d * (1 + 2 * shape["layers"]) + sparse * shape["experts"] * d
    trained = 0
    for part, inputs, outputs in _matrices(shape):
        total += inputs * outputs
        trained += ranks.get(part, 0) * (inputs + outputs)
    if joint and "experts" in ranks:
        trained -= sparse * shape["experts"] * ranks["experts"] * d
    adapters, bits = 16 * trained, total * frozen_bits
    return trained, math.ceil(Fraction(bits, 8)) + adapters, 16 * total


def _shape(rng: Random, layers: int, dense: int, shared: bool) -> dict[str, int]:
    kv = rng.randint(1, 3)
    return {
        "vocab": rng.randint(11, 60),
        "width": rng.choice([3, 5, 7, 9, 12]),
        "tied": rng.randint(0, 1),
        "layers": layers,
        "dense_layers": dense,
        "heads": kv * rng.randint(2, 4),
        "kv_heads": kv,
        "head_dim": rng.choice([2, 3, 5]),
        "experts": rng.randint(2, 6),
        "hidden": rng.choice([2, 4, 6, 11]),
        "shared_hidden": rng.choice([3, 8, 13]) if shared else 0,
        "dense_hidden": rng.choice([10, 14, 17]),
    }


QWEN = {
    "vocab": 151936, "width": 2048, "tied": 0, "layers": 48, "dense_layers": 0, "heads": 32, "kv_heads": 4,
    "head_dim": 128, "experts": 128, "hidden": 768, "shared_hidden": 0, "dense_hidden": 6144,
}  # fmt: skip


def _expect_bytes(
    answer: Answer, cases: list[dict[str, Any]], results: tuple[int, ...]
) -> None:
    names = ("trained numbers", "bytes with LoRA", "bytes of training everything")
    for case in cases:
        got = _several(answer(**case), 3, case, ", ".join(names))
        want = _bytes(**case)
        for place in results:
            if not same(got[place], want[place]):
                raise mismatch(
                    got[place], want[place], f"{describe(**case)}, {names[place]}"
                )


def _bytes_case(rng: Random, shape: dict[str, int], **more: Any) -> dict[str, Any]:
    drawn = {
        "ranks": {part: rng.randint(1, 9) for part in ("attention", "experts", "shared")},
        "joint": False,
        "frozen_bits": 16,
    }  # fmt: skip
    return {"shape": shape} | drawn | more


def _trained_numbers(answer: Answer, rng: Random) -> None:
    cases = []
    for part in ("attention", "experts", "shared"):
        shape = _shape(rng, 2, 0, True)
        cases.append(_bytes_case(rng, shape, ranks={part: rng.randint(2, 5)}))
    for layers, dense in ((1, 0), (3, 1), (5, 2)):
        cases.append(_bytes_case(rng, _shape(rng, layers, dense, True)))
    cases.append(_bytes_case(rng, _shape(rng, 3, 1, True), ranks={"experts": 4, "attention": 8}))  # fmt: skip
    _expect_bytes(answer, cases, (0,))


def _trained_joint(answer: Answer, rng: Random) -> None:
    cases = [
        _bytes_case(rng, _shape(rng, 2, 0, False), ranks={"experts": 3}, joint=True)
    ]
    for layers, dense in ((2, 0), (4, 1), (3, 2)):
        cases.append(_bytes_case(rng, _shape(rng, layers, dense, True), joint=True))
    # Joint or not, where no routed expert is adapted.
    for joint in (True, False):
        alone = {"attention": 2, "shared": 5}
        cases.append(_bytes_case(rng, _shape(rng, 2, 1, True), ranks=alone, joint=joint))  # fmt: skip
    _expect_bytes(answer, cases, (0,))


def _all_bytes(answer: Answer, rng: Random) -> None:
    cases = []
    for tied in (0, 1):
        for bits in (16, 8, 4):
            shape = _shape(rng, rng.randint(1, 4), rng.randint(0, 1), True)
            shape["tied"] = tied
            cases.append(_bytes_case(rng, shape, frozen_bits=bits))
    # No shared expert, all layers dense, nothing adapted, an odd number of halves of a byte.
    cases.append(_bytes_case(rng, _shape(rng, 2, 1, False)))
    cases.append(_bytes_case(rng, _shape(rng, 3, 3, True), joint=True))
    cases.append(_bytes_case(rng, _shape(rng, 2, 0, True), ranks={}, joint=True))
    while sum(case["frozen_bits"] == 4 for case in cases) < 7:
        drawn = _bytes_case(rng, _shape(rng, 2, 1, True), frozen_bits=4)
        if _bytes(**drawn)[2] // 16 % 2:
            cases.append(drawn)
    ranks = {"experts": 16, "attention": 64}
    cases.append(_bytes_case(rng, QWEN, ranks=ranks, frozen_bits=4, joint=True))
    _expect_bytes(answer, cases, (0, 1, 2))


# 06.5


def _agreement(before: Tensor, after: Tensor, experts: int) -> float:
    had = kept = 0
    for row, new in zip(before.tolist(), after.tolist(), strict=True):
        own = [e for e in row if e < experts]
        had += len(own)
        kept += sum(e in new for e in own)
    return kept / had if had else 1.0


def _log_probs(logits: list[float]) -> list[float]:
    top = max(logits)
    log_sum = top + math.log(math.fsum(math.exp(z - top) for z in logits))
    return [z - log_sum for z in logits]


def _kl(before: Tensor, logits_before: Tensor, logits_after: Tensor) -> float:
    experts, each = logits_before.shape[1], []
    for ids, old, new in zip(
        *(t.tolist() for t in (before, logits_before.double(), logits_after.double())),
        strict=True,
    ):
        if all(e >= experts for e in ids):
            continue
        pairs = zip(_log_probs(old), _log_probs(new), strict=True)
        each.append(math.fsum(math.exp(p) * (p - q) for p, q in pairs if p > -math.inf))
    return math.fsum(each) / len(each) if each else 0.0


def _drift_pair(answer: Answer, case: dict[str, Any]) -> tuple[Any, ...]:
    got = _several(answer(**case), 2, case, "the pair (agreement, KL)")
    for number in got:
        if type(number) not in (int, float):
            raise Failure(
                f"{describe(**case)}:\n    expected two plain numbers, got {shown(number)}; use .item()",
                hint=False,
            )
    return got


def _expect_agreement(answer: Answer, case: dict[str, Any]) -> None:
    got, _ = _drift_pair(answer, case)
    before, after = case["ids_before"], case["ids_after"]
    want = _agreement(before, after, case["logits_before"].shape[1])
    if not abs(got - want) <= 1e-9:
        text = (
            f"{describe(**case)}:\n    agreement: expected {want:.10g}, got {got:.10g}"
        )
        if abs(got - want) <= 1e-6:
            text += "\n    nearly: float32 rounds in the seventh digit"
        raise Failure(text)


def _expect_kl(answer: Answer, case: dict[str, Any]) -> None:
    _, got = _drift_pair(answer, case)
    first, second = case["logits_before"], case["logits_after"]
    want = _kl(case["ids_before"], first, second)
    # Of 1e-7, float64 has lost the last digits as well.
    if abs(got - want) <= 1e-9 * abs(want) + 1e-14:
        return
    text = f"{describe(**case)}:\n    KL: expected {want:.8g}, got {got:.8g}"
    if abs(got - want) <= 1e-5:
        text += "\n    nearly: float32 has lost it; convert the logits to float64 before anything else"
    elif abs(got - _kl(case["ids_before"], second, first)) <= 1e-6 * abs(got):
        text += "\n    that is the other direction, KL(after ‖ before)"
    elif abs(got - want / math.log(2)) <= 1e-6 * abs(got):
        text += "\n    that is in bits"
    elif abs(got - want / first.shape[1]) <= 1e-6 * abs(got):
        text += "\n    that is the mean over experts; sum over experts, then the mean over tokens"
    elif abs(got - want * len(first)) <= 1e-6 * abs(got):
        text += "\n    that is the sum over tokens"
    raise Failure(text)


def _drift_case(
    rng: Random,
    tokens: int,
    k: int,
    experts: int,
    moved: float = 1.0,
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Ids of their own: whoever chooses again from the logits gets others."""
    dtype, kind = dtype or rng.choice(FLOATS), rng.choice(INTEGERS)
    before = [rng.sample(range(experts), k) for _ in range(tokens)]
    after = []
    for row in before:
        other = rng.sample(range(experts), k)
        kept = rng.sample(row, rng.randint(0, k))
        new = kept + [e for e in other if e not in kept]
        after.append(rng.sample(new[:k], k))
    logits = 2 * normal(rng, tokens, experts)
    return {
        "ids_before": torch.tensor(before, dtype=kind).reshape(tokens, k),
        "ids_after": torch.tensor(after, dtype=kind).reshape(tokens, k),
        "logits_before": logits.to(dtype),
        "logits_after": (logits + moved * normal(rng, tokens, experts)).to(dtype),
    }


def _drift_agreement(answer: Answer, rng: Random) -> None:
    cases = [
        _drift_case(rng, *size)
        for size in ((1, 2, 4), (2, 1, 3), (3, 2, 4), (7, 3, 6), (30, 4, 12))
    ]
    turned = _drift_case(rng, 3, 3, 5)
    turned["ids_after"] = turned["ids_before"].flip(1).contiguous()
    for case in (*cases, turned):
        _expect_agreement(answer, case)


def _drift_kl(answer: Answer, rng: Random) -> None:
    for size in ((1, 1, 2), (2, 2, 3), (5, 2, 4), (11, 3, 8)):
        _expect_kl(answer, _drift_case(rng, *size))
    for dtype in FLOATS:
        # Of 1e-7, where float32 has rounding errors of that size.
        for _ in range(3):
            _expect_kl(answer, _drift_case(rng, 6, 2, 16, moved=5e-4, dtype=dtype))
    large = _drift_case(rng, 4, 2, 5, dtype=torch.float64)
    # exp(1000) overflows, exp(-1000) is 0, and the expert that had all of a token has nothing of it now.
    for name in ("logits_before", "logits_after"):
        large[name] = 300 * large[name]
    large["logits_before"][0, 1] = large["logits_after"][0, 2] = 3000.0
    _expect_kl(answer, large)
    still = _drift_case(rng, 3, 2, 4)
    _expect_kl(answer, still | {"logits_after": still["logits_before"].clone()})


def _dropped(
    rng: Random, case: dict[str, Any], padding: int, share: float
) -> dict[str, Any]:
    """Some choices dropped, before and after each on its own, and some tokens padding."""
    case = {name: tensor.clone() for name, tensor in case.items()}
    before, after = case["ids_before"], case["ids_after"]
    (tokens, k), experts = before.shape, case["logits_before"].shape[1]
    for t in range(tokens):
        for j in range(k):
            if rng.random() < share and int((before[t] < experts).sum()) > 1:
                before[t, j] = experts
            if rng.random() < share:
                after[t, j] = experts
    for t in rng.sample(range(tokens), padding):
        before[t] = experts
        if rng.random() < 0.5:
            after[t] = experts
        case["logits_before"][t] = rng.choice([math.nan, 3.0, -math.inf])
        case["logits_after"][t] = rng.choice([math.nan, 1.0, math.inf])
    return case


def _drift_limits(answer: Answer, rng: Random) -> None:
    by_hand: dict[str, Any] = {
        "ids_before": torch.tensor([[0, 1], [2, 4], [4, 4]]),
        "ids_after": torch.tensor([[1, 3], [4, 2], [0, 1]]),
        "logits_before": normal(rng, 3, 4),
        "logits_after": normal(rng, 3, 4),
    }
    cases = [by_hand]
    for tokens, k, experts, padding, share in (
        (3, 2, 4, 0, 0.5),
        (4, 2, 3, 2, 0.0),
        (12, 3, 6, 4, 0.3),
        (20, 2, 5, 5, 0.4),
    ):
        drawn = _drift_case(rng, tokens, k, experts)
        cases.append(_dropped(rng, drawn, padding, share))
    lost = _drift_case(rng, 3, 2, 4)  # a token that loses all afterwards counts
    lost["ids_after"][1] = 4
    cases.append(lost)
    forbidden = _drift_case(rng, 5, 2, 6)
    for name in ("logits_before", "logits_after"):
        forbidden[name][0, 1], forbidden[name][2:4, 3:] = -torch.inf, -torch.inf
    cases.append(forbidden)
    cases.append(_drift_case(rng, 4, 3, 3))
    cases.append(_drift_case(rng, 2, 1, 1))
    # Nobody counts.
    cases.append(_drift_case(rng, 0, 2, 3))
    cases.append(_dropped(rng, _drift_case(rng, 3, 2, 4), 3, 0.0))
    for case in cases:
        _expect_agreement(answer, case)
        _expect_kl(answer, case)


# 06.6


def _upcycled(
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    router: Tensor,
    pieces: int,
    shared: int,
    factor: float,
) -> tuple[Tensor, ...]:
    hidden = (len(gate) - shared) // pieces
    rows, ups, downs = [], [], []
    for row in router:
        for piece in range(pieces):
            first = shared + piece * hidden
            own = slice(first, first + hidden)
            rows.append(row)
            ups.append(torch.cat([gate[own], up[own]]))
            downs.append(down[:, own] * (pieces / factor))
    return (
        torch.stack(rows),
        torch.stack(ups),
        torch.stack(downs),
        torch.cat([gate[:shared], up[:shared]]),
        down[:, :shared],
    )


def _dense(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return _act(torch.cat([x @ gate.T, x @ up.T], dim=1)) @ down.T


def _sparse(x: Tensor, layer: tuple[Tensor, ...], chosen: int, factor: float) -> Tensor:
    router, w_up, w_down, shared_up, shared_down = layer
    # Row by row: equal rows have equal scores, to the last bit.
    scores = torch.stack([(x * row).sum(dim=1) for row in router], dim=1).sigmoid()
    ids = scores.sort(dim=1, descending=True, stable=True).indices[:, :chosen]
    y = _act(x @ shared_up.T) @ shared_down.T
    for t, own in enumerate(ids.tolist()):
        total = sum(scores[t, e] for e in own)
        for e in own:
            share = factor * scores[t, e] / total
            y[t] = y[t] + share * (w_down[e] @ _act(w_up[e] @ x[t]))
    return y


def _layer(answer: Answer, case: dict[str, Any]) -> tuple[Tensor, ...]:
    """What the answer returns, of the right shapes and types."""
    names = ("router", "w_up", "w_down", "shared_up", "shared_down")
    got = _several(answer(**case), 5, case, ", ".join(names))
    for name, tensor, want in zip(names, got, _upcycled(**case), strict=True):
        alike = type(tensor) is Tensor and tensor.shape == want.shape
        if not alike or tensor.dtype != want.dtype:
            compare(tensor, want, f"{describe(**case)}, {name}")
    return tuple(Tensor.detach(tensor) for tensor in got)


def _upcycle_case(
    rng: Random,
    copies: int,
    pieces: int,
    shared: int,
    each: int,
    width: int,
    factor: float = 0.0,
) -> dict[str, Any]:
    hidden, dtype = shared + pieces * each, rng.choice(FLOATS)
    return {
        "gate": normal(rng, hidden, width, dtype=dtype),
        "up": normal(rng, hidden, width, dtype=dtype),
        "down": normal(rng, width, hidden, dtype=dtype),
        "router": normal(rng, copies, width, dtype=dtype),
        "pieces": pieces,
        "shared": shared,
        "factor": factor or rng.choice([0.5, 1.5, 2.5, 4.0]),
    }


def _expect_same_function(answer: Answer, rng: Random, case: dict[str, Any]) -> None:
    layer = [tensor.double() for tensor in _layer(answer, case)]
    wide = {n: case[n].double() for n in ("gate", "up", "down")}
    x = normal(rng, 9, case["gate"].shape[1])
    for k in sorted({1, min(2, len(case["router"])), len(case["router"])}):
        got = _sparse(x, tuple(layer), k * case["pieces"], case["factor"])
        want = _dense(x, **wide)
        off = (got - want).abs().max().item()
        if not off <= 1e-5 * want.abs().max().item():
            # What the routed experts add, and how many times too much of it.
            kept = case["shared"]
            alone = _dense(x, wide["gate"][:kept], wide["up"][:kept], wide["down"][:, :kept])  # fmt: skip
            added, right, ratio = got - alone, want - alone, ""
            times = (added * right).sum() / right.square().sum()
            if bool((added - times * right).abs().max() <= 1e-5 * right.abs().max()):
                ratio = f"\n    the routed experts add {times.item():.4g} times what they should"
            raise Failure(
                f"{describe(**case)}, k={k}:\n    for x={shown(x[:1])} expected {shown(want[:1])},\n"
                f"    got {shown(got[:1])}{ratio}"
            )


def _upcycle_function(answer: Answer, rng: Random) -> None:
    for size in ((2, 2, 1, 1, 2), (3, 2, 2, 3, 4), (4, 3, 1, 2, 5), (2, 4, 3, 1, 3)):
        _expect_same_function(answer, rng, _upcycle_case(rng, *size))


def _upcycle_layout(answer: Answer, rng: Random) -> None:
    for size in ((2, 2, 1, 2, 3), (3, 3, 2, 2, 4), (4, 2, 5, 3, 2)):
        case = _upcycle_case(rng, *size)
        names = ("router", "w_up", "w_down", "shared_up", "shared_down")
        got, wanted = _layer(answer, case), _upcycled(**case)
        for name, tensor, want in zip(names, got, wanted, strict=True):
            compare(tensor, want, f"{describe(**case)}, {name}")


def _upcycle_limits(answer: Answer, rng: Random) -> None:
    cases = [
        _upcycle_case(rng, 3, 1, 0, 4, 3, factor=1.0),
        _upcycle_case(rng, 2, 1, 2, 3, 3),
        _upcycle_case(rng, 4, 3, 0, 2, 4),
        _upcycle_case(rng, 1, 2, 1, 2, 3),
        _upcycle_case(rng, 1, 1, 0, 1, 1),
        _upcycle_case(rng, 2, 2, 3, 0, 4),  # all of it is shared
    ]
    for case in cases:
        _expect_same_function(answer, rng, case)
        compare(_layer(answer, case), _upcycled(**case), describe(**case))


# 06.7


def _step(
    weight: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    steps: Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    decay: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    new = [t.clone() for t in (weight, m, v, steps)]
    for e in range(len(weight)):
        if not any(entry != 0 for entry in grad[e].flatten().tolist()):
            continue
        t = int(steps[e]) + 1
        w, g = weight[e].double(), grad[e].double()
        first = betas[0] * m[e].double() + (1 - betas[0]) * g
        second = betas[1] * v[e].double() + (1 - betas[1]) * g * g
        m_hat, v_hat = first / (1 - betas[0] ** t), second / (1 - betas[1] ** t)
        new[0][e] = w - lr * decay * w - lr * m_hat / (v_hat.sqrt() + eps)
        new[1][e], new[2][e], new[3][e] = first, second, t
    return new[0], new[1], new[2], new[3]


def _step_case(
    rng: Random,
    shape: tuple[int, ...],
    idle: list[int],
    dtype: torch.dtype | None = None,
    fresh: tuple[int, ...] = (),
) -> dict[str, Any]:
    dtype = dtype or rng.choice(FLOATS)
    grad, m = normal(rng, *shape, dtype=dtype), normal(rng, *shape, dtype=dtype)
    v = normal(rng, *shape, dtype=dtype).square()
    steps = torch.tensor([rng.randint(1, 30) for _ in range(shape[0])])
    for e in fresh:
        m[e], v[e], steps[e] = 0.0, 0.0, 0
    grad[idle] = 0.0
    return {
        "weight": normal(rng, *shape, dtype=dtype),
        "grad": grad,
        "m": m,
        "v": v,
        "steps": steps,
        "lr": rng.choice([0.05, 0.1, 0.3]),
        "betas": rng.choice([(0.9, 0.99), (0.8, 0.95), (0.9, 0.999)]),
        "eps": rng.choice([1e-8, 1e-2]),
        "decay": rng.choice([0.1, 0.5]),
    }


def _expect_step(answer: Answer, case: dict[str, Any]) -> None:
    names = ("weight", "m", "v", "steps")
    got = _several(answer(**case), 4, case, "weight, m, v and steps")
    wanted = _step(**case)
    for name, tensor, want in zip(names, got, wanted, strict=True):
        compare(tensor, want, f"{describe(**case)}, new {name}")
        tensor = Tensor.detach(tensor)
        for e in range(len(want)):
            if not case["grad"][e].any() and not torch.equal(tensor[e], case[name][e]):
                raise Failure(
                    f"{describe(**case)}:\n    expert {e} is idle, and its {name} has changed by rounding; keep it to "
                    "the last bit"
                )


def _steps_idle(answer: Answer, rng: Random) -> None:
    sizes: tuple[tuple[tuple[int, ...], list[int]], ...] = (
        ((2, 2), [1]),
        ((3, 2, 2), [0]),
        ((4, 3, 5), [1, 3]),
        ((6, 2, 7), [0, 2, 5]),
        ((3, 4), [0, 1, 2]),
        ((3, 4), []),
    )
    for number, (shape, idle) in enumerate(sizes):
        case = _step_case(rng, shape, idle, dtype=FLOATS[number % 2])
        # One that is seen, and one that is usual.
        _expect_step(answer, case | {"eps": (1e-2, 1e-8)[number // 2 % 2]})


def _steps_limits(answer: Answer, rng: Random) -> None:
    # Entries that cancel, a single one, ones whose square vanishes, a zero with a sign.
    cancel = _step_case(rng, (2, 4), [1])
    cancel["grad"][0] = torch.tensor([1.0, -1.0, 2.0, -2.0])
    single = _step_case(rng, (3, 3, 4), [0, 1])
    single["grad"][1, 2, 3] = 0.7
    tiny = _step_case(rng, (3, 3), [2], dtype=torch.float32, fresh=(1,))
    tiny["grad"][0:2] *= 1e-30
    signed = _step_case(rng, (2, 3), [1])
    signed["grad"][1] = -0.0
    one_sign = _step_case(rng, (3, 3), [2])
    one_sign["grad"] = one_sign["grad"].abs()
    one_sign["grad"][0] *= -1
    one_sign["grad"][:2, 1] = 0.0  # now 0 is the largest of one, the least of the other
    row = _step_case(rng, (2, 3, 3), [])
    row["grad"][0, 1], row["grad"][1, :, 2] = 0.0, 0.0
    cases = [
        *(cancel, single, tiny, signed, one_sign, row),
        # The first steps, of some and of all.
        _step_case(rng, (3, 2), [1], fresh=(0, 1)),
        _step_case(rng, (2, 3, 2), [], fresh=(0, 1)),
        _step_case(rng, (1, 4), [0], fresh=(0,)),
        _step_case(rng, (1, 1, 1), []),
        _step_case(rng, (2, 5), [0]) | {"decay": 0.0},
        _step_case(rng, (2, 2, 1, 3), [1]),
    ]
    for case in cases:
        _expect_step(answer, case)


_LORA = "book/finetuning/lora"
_DRIFT = "book/finetuning/drift"
_UPCYCLING = "book/finetuning/upcycling"

EXERCISE = Exercise(
    number="06",
    topic="finetuning",
    title="Fine-tuning",
    next_step="all of exercise 06 is done; its hand-graded question is the last cell",
    questions=(
        Question(
            "06.1",
            "LoRA on stacked experts",
            "expert_hidden",
            2,
            20,
            _LORA,
            (
                Invariant(
                    "adds scale · B A x of each row's own expert, before the non-linearity",
                    2,
                    _lora_values,
                    "For the rows of expert e: h = x W_e^T + scale · (x A_e^T) B_e^T, gate and up alike; then silu of "
                    "the first half times the second. The scale is given, divide it by nothing.",
                ),
                Invariant(
                    "forms no B A and no weight for each row",
                    1,
                    _lora_cost,
                    "Multiply by A first: the parentheses in B (A x) are the saving. Only the rows of an expert meet "
                    "its weights, and weight[expert_of_row] copies a matrix for each row.",
                ),
                Invariant(
                    "takes experts without rows, and passes gradients to x, A and B",
                    1,
                    _lora_limits,
                    "Rows of an idle expert are a slice of length 0, also at the beginning and the end. No detach and "
                    "no .data: where B is 0, its gradient is not.",
                ),
            ),
        ),
        Question(
            "06.2",
            "Merge what PEFT has trained",
            "merged",
            2,
            15,
            _LORA,
            (
                Invariant(
                    "takes expert e's rows of lora_a in a run, its columns of lora_b E apart",
                    2,
                    _merge_values,
                    "lora_a is [E, r, in], flattened: expert e has rows e·r to (e + 1)·r. lora_b is [out, r, E], "
                    "flattened: expert e has the columns e, e + E, e + 2·E, ...",
                ),
                Invariant(
                    "rounds once where weights are bfloat16; at the edges, too",
                    1,
                    _merge_limits,
                    "Convert the weight to float32 (or let it be promoted), add, and convert the sum back. Nothing "
                    "else is to be rounded on the way: neither A and B nor their product.",
                ),
            ),
        ),
        Question(
            "06.3",
            "What is really trained",
            "trained_names",
            1,
            15,
            _LORA,
            (
                Invariant(
                    "trains what was asked for, and nothing else",
                    2,
                    _names_frozen,
                    "Everything is frozen until it is asked for. Adapters are trained where their part is in lora, "
                    "other weights where it is in full; norms, embeddings and dense FFNs never.",
                ),
                Invariant(
                    "is not taken in by names that look alike",
                    1,
                    _names_alike,
                    "Split at the dots and compare whole steps: mlp.gate is not mlp.gate_proj, layer 1 is not 11, "
                    "experts is not shared_expert, and lora may be part of a model's name.",
                ),
            ),
        ),
        Question(
            "06.4",
            "What it takes",
            "training_bytes",
            2,
            25,
            _LORA,
            (
                Invariant(
                    "counts r · (in + out) of every matrix that is adapted",
                    2,
                    _trained_numbers,
                    "Key and value projection have kv_heads · head_dim outputs, the output projection heads · "
                    "head_dim inputs. Routed experts: three matrices, times experts, times sparse layers. Attention "
                    "is in all layers.",
                ),
                Invariant(
                    "has one A for gate and up where they are one matrix",
                    1,
                    _trained_joint,
                    "r · (width + 2 · hidden) for both together, in routed experts alone: the shared one keeps three.",
                ),
                Invariant(
                    "counts bytes of what is frozen, of what is trained, and of training everything",
                    1,
                    _all_bytes,
                    "The frozen model is all of it: embeddings (twice unless tied), norms, routers, dense layers. "
                    "Adapters come on top, 16 bytes each; round up the frozen bytes at the end, once. There may be no "
                    "shared expert.",
                ),
            ),
        ),
        Question(
            "06.5",
            "How far a router has moved",
            "router_drift",
            2,
            20,
            _DRIFT,
            (
                Invariant(
                    "agreement is the share of experts that are kept, in whatever order",
                    1,
                    _drift_agreement,
                    "Compare every choice before with every choice after of the same token, not place by place. Look "
                    "at the ids, not at the logits.",
                ),
                Invariant(
                    "KL is that of before to after, in nats, and survives a small one",
                    2,
                    _drift_kl,
                    "log_softmax of float64 logits; p (ln p - ln q), summed over experts; the mean over tokens. "
                    "softmax and then log loses what is small, and float32 all of it.",
                ),
                Invariant(
                    "leaves out what was dropped, padding and forbidden experts",
                    1,
                    _drift_limits,
                    "An id of E equals no expert, not even another E. Take the tokens without an expert before out "
                    "first: a NaN times 0 is NaN. 0 · (ln 0 - ln 0) is NaN, too: torch.where.",
                ),
            ),
        ),
        Question(
            "06.6",
            "Upcycling, with a shared expert",
            "upcycled",
            3,
            25,
            _UPCYCLING,
            (
                Invariant(
                    "computes what the dense layer computes, whoever is chosen",
                    2,
                    _upcycle_function,
                    "The weights of all chosen pieces sum to factor. Piece j of all chosen copies together gets "
                    "factor / pieces of it, so its down projection is multiplied by pieces / factor. The shared "
                    "expert has weight 1: no correction. Equal router rows for the pieces of a copy, side by side.",
                ),
                Invariant(
                    "has pieces and copies where they belong, and the router's own rows",
                    1,
                    _upcycle_layout,
                    "Expert c · pieces + j is piece j of copy c: repeat_interleave for router rows, repeat for the "
                    "stacks. gate rows above up rows, of the same hidden numbers; corrections in w_down alone.",
                ),
                Invariant(
                    "at the edges: one piece, one copy, nothing shared, everything shared",
                    1,
                    _upcycle_limits,
                    "With shared = 0 the shared expert is empty, [0, D] and [D, 0], not missing. [-0:] is everything: "
                    "count from the front.",
                ),
            ),
        ),
        Question(
            "06.7",
            "An optimiser that lets idle experts be",
            "sparse_adamw",
            2,
            20,
            _DRIFT,
            (
                Invariant(
                    "leaves idle experts as they were, and moves the others as AdamW does",
                    2,
                    _steps_idle,
                    "Idle: no decay of the weight, none of the moments, no step counted. The others: decay is applied "
                    "to the weight and not added to the gradient, eps stands outside the root, and t is the "
                    "expert's own count, this step included.",
                ),
                Invariant(
                    "tells idle from nearly idle, and takes first steps",
                    1,
                    _steps_limits,
                    "Idle means that every entry is exactly 0: sums cancel, and squares of 1e-30 vanish. An expert "
                    "that took part moves as a whole, entries without gradient too.",
                ),
            ),
        ),
    ),
)
