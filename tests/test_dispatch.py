"""Dispatch: every way of computing the sum over experts against the sum written out, token by token, in float64."""

from __future__ import annotations

import dataclasses
import math
import runpy
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe_course.layers import Experts, Routing, Slots
from moe_course.layers import dispatch as dispatch_module
from moe_course.layers.dispatch import (
    combine,
    dense,
    einsum,
    expert_capacity,
    fits_grouped_mm,
    grouped,
    loop,
    slot_ends,
    slot_table,
    slots_from_routing,
    triton,
)
from moe_course.specs import FFN

WAYS = [dense, loop, einsum, grouped]
ACTIVATIONS = ["swiglu", "clamped_swiglu", "gelu", "relu"]


def _routing(expert_ids, num_experts, dtype=torch.float64):
    weights = torch.rand(expert_ids.shape, dtype=dtype)
    weights[weights < 0.2] = 0  # a slot of weight 0 has a gradient
    scores = torch.zeros(len(expert_ids), num_experts, dtype=dtype)
    return Routing(expert_ids, weights, scores, scores)


def _experts(num_experts, width, hidden, activation="swiglu", bias=False):
    experts = Experts(num_experts, width, hidden, activation, bias).double()
    for weight in experts.parameters():  # large enough for the clamps to bind
        torch.nn.init.normal_(weight, std=2 if activation == "clamped_swiglu" else 1)
    return experts


def _activate(z, activation):
    if activation == "relu":
        return torch.where(z > 0, z, torch.zeros_like(z))
    if activation == "gelu":
        return z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))
    g, u = z[: len(z) // 2], z[len(z) // 2 :]
    if activation == "swiglu":
        return g / (1 + torch.exp(-g)) * u
    g = torch.minimum(g, torch.full_like(g, 7.0))
    u = torch.maximum(
        torch.minimum(u, torch.full_like(u, 7.0)), -7 * torch.ones_like(u)
    )
    return (u + 1) * g / (1 + torch.exp(-1.702 * g))


def _written_out(x, slots, experts):
    rows = [0 * row for row in x]
    for t, e, weight in zip(
        slots.token.tolist(), slots.expert.tolist(), slots.weight, strict=True
    ):
        z = experts.w_up[e] @ x[t]
        if experts.b_up is not None:
            z = z + experts.b_up[e]
        y = experts.w_down[e] @ _activate(z, experts.activation)
        if experts.b_down is not None:
            y = y + experts.b_down[e]
        rows[t] = rows[t] + weight * y
    return torch.stack(rows) if rows else x * 1


def _value_and_gradients(way, x, slots, experts, grad):
    """The output and the gradients of input, gate weights and every weight of the experts."""
    x = x.detach().requires_grad_()
    weight = slots.weight.detach().requires_grad_()
    experts.zero_grad()
    y = way(x, Slots(slots.token, slots.expert, weight), experts)
    inputs = [x, weight, *experts.parameters()]
    found = torch.autograd.grad(y, inputs, grad, allow_unused=True)
    zeros = [
        torch.zeros_like(i) if g is None else g
        for i, g in zip(inputs, found, strict=True)
    ]
    return [y, *zeros]


@st.composite
def cases(draw):
    """Tokens, ids (also repeated in a row, also E, which is no expert) and experts, in sizes with nothing in common."""
    num_experts, k = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    tokens = draw(st.integers(0, 12))
    width, hidden = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    torch.manual_seed(draw(st.integers(0, 999)))
    highest = num_experts + draw(st.integers(0, 1))
    ids = torch.randint(0, highest, (tokens, k))
    experts = _experts(
        num_experts,
        width,
        hidden,
        draw(st.sampled_from(ACTIVATIONS)),
        draw(st.booleans()),
    )
    x = torch.randn(tokens, width, dtype=torch.float64)
    return x, _routing(ids, num_experts), experts


# --- The same sum every way --------------------------------------------------


@settings(max_examples=50)
@given(cases())
def test_every_way_gives_the_sum_and_its_gradients(case):
    x, routing, experts = case
    slots = slots_from_routing(routing, experts.num_experts)
    grad = torch.randn_like(x)
    want = _value_and_gradients(_written_out, x, slots, experts, grad)
    for way in WAYS:
        got = _value_and_gradients(way, x, slots, experts, grad)
        torch.testing.assert_close(
            got, want, msg=lambda m, way=way: f"{way.__name__}: {m}"
        )


CORNERS = {
    "no tokens": (0, torch.zeros(0, 2, dtype=torch.int64), 3),
    "one token": (1, torch.tensor([[2, 0]]), 3),
    "one expert": (5, torch.zeros(5, 1, dtype=torch.int64), 1),
    "all tokens on one expert": (6, torch.full((6, 1), 2), 4),
    "idle experts": (3, torch.tensor([[1, 3]] * 3), 5),
    "every expert": (4, torch.arange(3).expand(4, 3), 3),
    "an expert twice in a row": (2, torch.tensor([[1, 1], [0, 1]]), 2),
    "no expert at all": (2, torch.full((2, 2), 3), 3),
}


@pytest.mark.parametrize("corner", CORNERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_corners_in_the_types_that_models_run_in(way, dtype, corner):
    torch.manual_seed(0)
    tokens, ids, num_experts = CORNERS[corner]
    experts = _experts(num_experts, 16, 8, "clamped_swiglu", bias=True)
    with torch.no_grad():  # both sides start from numbers that exist in dtype
        for weight in experts.parameters():
            weight.copy_((weight / 4).to(dtype))
    x = torch.randn(tokens, 16).to(dtype)
    slots = slots_from_routing(_routing(ids, num_experts, torch.float32), num_experts)
    exact = Slots(slots.token, slots.expert, slots.weight.double())
    grad = torch.randn_like(x)
    want = _value_and_gradients(_written_out, x.double(), exact, experts, grad.double())
    got = _value_and_gradients(way, x, slots, experts.to(dtype), grad)
    assert got[0].dtype == x.dtype
    assert got[2].dtype == torch.float32  # of the gate weights
    bound = 1e-5 if dtype == torch.float32 else 3e-2
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(
            g.double(),
            w,
            rtol=bound,
            atol=bound * max(1.0, w.abs().max().item() if w.numel() else 0),
        )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_gradients_are_those_of_the_forward_pass(way, activation, bias):
    torch.manual_seed(0)
    experts = _experts(3, 3, 2, activation, bias)
    slots = slots_from_routing(_routing(torch.tensor([[0, 2], [2, 2], [3, 0]]), 3), 3)
    names = list(dict(experts.named_parameters()))

    def run(x, weight, *params):
        swapped = dict(zip(names, params, strict=True))
        used = _experts(3, 3, 2, activation, bias)
        for name, value in swapped.items():  # plain tensors in place of parameters
            delattr(used, name)
            setattr(used, name, value)
        return way(x, Slots(slots.token, slots.expert, weight), used)

    x = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    params = [p.detach().clone().requires_grad_() for p in experts.parameters()]
    weight = slots.weight.clone().requires_grad_()
    assert torch.autograd.gradcheck(run, (x, weight, *params))


def test_sums_are_taken_in_the_type_of_the_gate_weights():
    # In bfloat16 256 + 1 is 256, and a weight of 1 + 1/512 is 1.
    out = torch.tensor([[256.0], *[[1.0]] * 8, [256.0], [-256.0]]).bfloat16()
    token = torch.tensor([0] * 9 + [1, 1])
    weight = torch.tensor([1.0] * 9 + [1 + 1 / 512, 1.0])
    slots = Slots(token, torch.zeros_like(token), weight)
    y = combine(out, slots, torch.zeros(3, 1, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert y.flatten().tolist() == [264.0, 0.5, 0.0]


def test_a_sum_has_the_same_bits_wherever_its_token_stands():
    torch.manual_seed(0)
    slots = slots_from_routing(
        _routing(torch.randint(0, 8, (32, 8)), 8, torch.float32), 8
    )
    out = torch.randn(len(slots.token), 5)
    y = combine(out, slots, torch.zeros(32, 5))
    order = torch.randperm(32)
    moved = Slots(order[slots.token], slots.expert, slots.weight)
    again = combine(out, moved, torch.zeros(32, 5))
    assert torch.equal(again[order], y)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_expert_ids_may_be_int32(way):
    experts, x = _experts(3, 4, 4), torch.randn(5, 4, dtype=torch.float64)
    routing = _routing(torch.randint(0, 3, (5, 2)), 3)
    small = dataclasses.replace(routing, expert_ids=routing.expert_ids.int())
    want = way(x, slots_from_routing(routing, 3), experts)
    torch.testing.assert_close(way(x, slots_from_routing(small, 3), experts), want)


def test_a_gradient_that_is_one_number_throughout_reaches_the_weights():
    # What sum() sends back has strides of 0, which grouped_mm refuses.
    experts, x = Experts(2, 8, 8), torch.randn(3, 8)
    slots = slots_from_routing(
        _routing(torch.tensor([[0], [1], [1]]), 2, torch.float32), 2
    )
    assert fits_grouped_mm(x, experts)
    grouped(x, slots, experts).sum().backward()
    assert experts.w_down.grad.abs().sum() > 0


# --- Experts -----------------------------------------------------------------


@given(
    st.integers(1, 5),
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from(ACTIVATIONS),
    st.booleans(),
)
def test_experts_have_the_parameters_that_specs_count(
    num_experts, width, hidden, activation, bias
):
    experts = Experts(num_experts, width, hidden, activation, bias)
    count = sum(p.numel() for p in experts.parameters())
    spec = FFN(hidden, gated="swiglu" in activation, bias=bias)
    assert count == num_experts * spec.params(width)


def test_experts_start_as_linear_layers_do():
    torch.manual_seed(0)
    experts = Experts(4, 16, 64, bias=True)
    for weight, fan_in in [
        (experts.w_up, 16),
        (experts.b_up, 16),
        (experts.w_down, 64),
        (experts.b_down, 64),
    ]:
        bound = fan_in**-0.5
        assert weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.2)


@pytest.mark.parametrize("sizes", [(0, 4, 4), (2, 0, 4), (2, 4, -1)])
def test_sizes_of_experts_are_checked(sizes, unchecked_shapes):
    with pytest.raises(ValueError, match="must be at least 1, got"):
        Experts(*sizes)


def test_an_unknown_activation_is_named(unchecked_shapes):
    with pytest.raises(
        ValueError, match="one of swiglu, clamped_swiglu, gelu, relu, got 'silu'"
    ):
        Experts(2, 4, 4, "silu")


# --- Which way grouped goes --------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "width", "hidden", "fits"),
    [
        (torch.float32, 4, 12, True),
        (torch.float32, 6, 8, False),
        (torch.float32, 8, 6, False),
        (torch.bfloat16, 8, 24, True),
        (torch.bfloat16, 12, 8, False),
        (torch.bfloat16, 8, 12, False),
        (torch.float16, 8, 8, True),
        (torch.float64, 8, 8, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("bias", [False, True])
def test_grouped_takes_grouped_mm_where_it_can(
    monkeypatch, dtype, width, hidden, fits, bias
):
    torch.manual_seed(0)
    calls = []
    grouped_mm = F.grouped_mm

    def counted(*args, **kwargs):
        calls.append(args)
        return grouped_mm(*args, **kwargs)

    monkeypatch.setattr(F, "grouped_mm", counted)
    experts = Experts(3, width, hidden, bias=bias).to(dtype)
    x = torch.randn(7, width).to(dtype).requires_grad_()
    assert fits_grouped_mm(x, experts) == fits
    slots = slots_from_routing(
        _routing(torch.randint(0, 3, (7, 2)), 3, torch.float32), 3
    )
    y = grouped(x, slots, experts)
    y.backward(torch.randn_like(y))
    assert len(calls) == 2 * fits


def test_grouped_mm_wants_one_type():
    assert not fits_grouped_mm(torch.randn(2, 8).bfloat16(), Experts(2, 8, 8))


@settings(max_examples=50)
@given(cases())
def test_the_kernel_gets_what_its_contract_says(case):
    x, routing, experts = case

    def fused_moe(x, w_up, w_down, expert_ids, weights, *, activation, b_up, b_down):
        assert expert_ids.dtype == torch.int32
        assert (w_up is experts.w_up, w_down is experts.w_down) == (True, True)
        assert (b_up is experts.b_up, b_down is experts.b_down) == (True, True)
        assert activation == experts.activation
        routing = Routing(expert_ids.long(), weights, weights, weights)
        return dense(x, slots_from_routing(routing, experts.num_experts), experts)

    kernels = ModuleType("moe_course.kernels")
    kernels.fused_moe = fused_moe
    slots = slots_from_routing(routing, experts.num_experts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "moe_course.kernels", kernels)
        torch.testing.assert_close(triton(x, slots, experts), dense(x, slots, experts))


# --- Slots -------------------------------------------------------------------


def _plain_slots(ids, weights, num_experts, mask, capacity, drop, length):
    """The definition, in plain Python."""
    found = []
    for e in range(num_experts):
        for first in range(0, len(ids), length):
            mine = [
                (t, k)
                for t in range(first, min(first + length, len(ids)))
                for k, chosen in enumerate(ids[t])
                if chosen == e and mask[t]
            ]
            if capacity is not None:
                if drop == "probs":  # sorted() keeps the order of equals
                    mine = sorted(mine, key=lambda tk: -weights[tk[0]][tk[1]])
                mine = sorted(mine[:capacity])
            found += [(t, e, weights[t][k]) for t, k in mine]
    return found


@given(
    st.integers(0, 12),
    st.integers(1, 4),
    st.integers(1, 5),
    st.none() | st.integers(0, 6),
    st.sampled_from(["position", "probs"]),
    st.none() | st.integers(1, 5),
    st.integers(0, 999),
)
@example(6, 2, 2, 3, "probs", None, 0)
@example(6, 2, 2, 1, "position", 3, 0)
def test_slots_are_those_of_the_definition(
    tokens, k, num_experts, capacity, drop, length, seed
):
    torch.manual_seed(seed)
    ids = torch.randint(0, num_experts + 1, (tokens, k))
    weights = torch.randint(0, 4, (tokens, k)) / 4  # many ties
    mask = torch.rand(tokens) < 0.7
    routing = Routing(
        ids, weights, torch.zeros(tokens, num_experts), torch.zeros(tokens, num_experts)
    )
    slots = slots_from_routing(routing, num_experts, mask, capacity, drop, length)
    got = list(
        zip(
            slots.token.tolist(),
            slots.expert.tolist(),
            slots.weight.tolist(),
            strict=True,
        )
    )
    assert got == _plain_slots(
        ids.tolist(),
        weights.tolist(),
        num_experts,
        mask.tolist(),
        capacity,
        drop,
        length or 99,
    )
    ends = slot_ends(slots, num_experts)
    assert ends.dtype == torch.int32
    assert ends.tolist() == [sum(e <= i for _, e, _ in got) for i in range(num_experts)]


def test_position_keeps_the_first_and_probs_the_heaviest():
    weights = torch.tensor([[0.1], [0.9], [0.5], [0.9]])
    scores = torch.zeros(4, 1)
    routing = Routing(torch.zeros(4, 1, dtype=torch.int64), weights, scores, scores)
    assert slots_from_routing(routing, 1, capacity=2).token.tolist() == [0, 1]
    assert slots_from_routing(routing, 1, capacity=2, drop="probs").token.tolist() == [
        1,
        3,
    ]
    assert slots_from_routing(routing, 1, capacity=1, drop="probs").token.tolist() == [
        1
    ]


@pytest.mark.parametrize("drop", ["position", "probs"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_dropped_token_contributes_exactly_nothing(way, drop):
    torch.manual_seed(0)
    experts = _experts(2, 4, 3, bias=True)
    routing = _routing(torch.tensor([[0], [0], [1], [0]]), 2)
    slots = slots_from_routing(routing, 2, capacity=1, drop=drop)
    x = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    y = way(x, slots, experts)
    y.backward(torch.ones_like(y))
    kept = sorted(slots.token.tolist())
    assert len(kept) == 2
    for t in range(4):
        assert bool(y[t].any()) == bool(x.grad[t].any()) == (t in kept)


@settings(max_examples=50)
@given(cases(), st.integers(0, 4))
def test_einsum_drops_by_position(case, capacity):
    x, routing, experts = case
    everything = slots_from_routing(routing, experts.num_experts)
    kept = slots_from_routing(routing, experts.num_experts, capacity=capacity)
    torch.testing.assert_close(
        einsum(x, everything, experts, capacity), _written_out(x, kept, experts)
    )


@settings(max_examples=50)
@given(cases())
def test_a_table_of_slots_holds_them_all(case):
    _, routing, experts = case
    slots = slots_from_routing(routing, experts.num_experts)
    ids, weights = slot_table(slots, len(routing.expert_ids), experts.num_experts)
    scores = torch.zeros(len(ids), experts.num_experts)
    again = slots_from_routing(
        Routing(ids, weights, scores, scores), experts.num_experts
    )
    for a, b in zip(vars(again).values(), vars(slots).values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("tokens", "k", "num_experts", "factor", "capacity"),
    [
        (8, 2, 4, 1.0, 4),
        (9, 2, 4, 1.0, 5),
        (50, 1, 1, 1.1, 55),  # 1.1 · 50 is 55.00000000000001
        (1, 1, 64, 1.0, 1),
        (0, 2, 4, 1.25, 0),
    ],
)
def test_capacity_rounds_up(tokens, k, num_experts, factor, capacity):
    assert expert_capacity(tokens, k, num_experts, factor) == capacity


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"drop": "random"},
            "drop must be 'position', 'probs' or 'prioritised', got 'random'",
        ),
        ({"capacity": -1}, "capacity must not be negative, got -1"),
        ({"num_experts": 2}, r"expert ids must lie in 0\.\.2 .*, got 0\.\.3"),
    ],
)
def test_arguments_of_slots_are_checked(options, message, unchecked_shapes):
    routing = _routing(torch.tensor([[0], [3]]), 4)
    with pytest.raises(ValueError, match=message):
        slots_from_routing(routing, **{"num_experts": 4} | options)


def test_a_negative_expert_id_is_refused(unchecked_shapes):
    with pytest.raises(ValueError, match=r"got -1\.\.1"):
        slots_from_routing(_routing(torch.tensor([[-1], [1]]), 2), 2)


@pytest.mark.parametrize("factor", [0, -1.0])
def test_a_capacity_factor_must_be_positive(factor, unchecked_shapes):
    with pytest.raises(ValueError, match="capacity_factor must be positive"):
        expert_capacity(8, 2, 4, factor)


# --- Memory ------------------------------------------------------------------


@pytest.fixture(scope="module")
def benchmark(request):
    root = request.config.rootpath
    return runpy.run_path(str(root / "benchmarks" / "dispatch.py"))


def _gathers_weights(x, slots, experts):
    """Right values, and a copy of its expert's weights for each slot."""
    hidden = torch.einsum("shd,sd->sh", experts.w_up[slots.expert], x[slots.token])
    out = torch.einsum(
        "sdf,sf->sd", experts.w_down[slots.expert], experts.activate(hidden)
    )
    return combine(out, slots, x)


def _growth(peak_bytes, way):
    """Bytes at the peak of a training step, for each further token."""
    torch.manual_seed(0)
    experts = Experts(4, 32, 64)

    def peak(tokens):
        experts.zero_grad()
        x = torch.randn(tokens, 32, requires_grad=True)
        ids = torch.arange(2 * tokens).view(tokens, 2) % 4  # even load
        slots = slots_from_routing(_routing(ids, 4, torch.float32), 4)
        return peak_bytes(lambda: way(x, slots, experts).sum().backward())

    return (peak(96) - peak(32)) / 64


HALF_A_COPY = 2 * 3 * 32 * 64 * 4 / 2  # of the weights that a token meets, in bytes


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_memory_does_not_grow_by_weights_for_each_token(benchmark, way):
    assert _growth(benchmark["peak_bytes"], way) < HALF_A_COPY


def test_weights_gathered_for_each_token_would_be_noticed(benchmark):
    assert _growth(benchmark["peak_bytes"], _gathers_weights) > 2 * HALF_A_COPY


@pytest.mark.parametrize("way", [dense, loop, grouped], ids=lambda way: way.__name__)
def test_the_backward_pass_makes_no_full_gradient_for_each_expert(way):
    # w_up[e] in a loop does: E tensors of E·2F·D zeros each.
    experts, made = Experts(32, 8, 8), []
    slots = slots_from_routing(
        _routing(torch.arange(32).view(32, 1), 32, torch.float32), 32
    )
    y = way(torch.randn(32, 8), slots, experts)

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made.extend(o.shape for o in [out] if isinstance(o, torch.Tensor))
            return out

    with Sizes():
        y.backward(torch.ones_like(y))
    full = [s for s in made if s in (experts.w_up.shape, experts.w_up.mT.shape)]
    assert 1 <= len(full) <= 4


# --- The benchmark -----------------------------------------------------------


def test_the_benchmark_compares_equal_layers_and_measures_them(benchmark):
    pytest.importorskip("transformers")
    rows = benchmark["compare"]((12, 8, 16, 4, 2), torch.float32, "forward+backward", 2)
    assert [row["contender"] for row in rows] == benchmark["OURS"] + benchmark["PEERS"]
    assert (
        min(row["ratio_to_best_peer"] for row in rows if "transf" in row["contender"])
        <= 1
    )
    assert all(row["cpu_time_ms"] >= 0 and row["peak_memory_mib"] > 0 for row in rows)


def test_peak_memory_is_that_of_what_lives_at_once(benchmark):
    def alive(n):
        return [torch.empty(256, 1024) for _ in range(n)]  # 1 MiB each

    def one_after_the_other():
        for _ in range(5):
            torch.empty(256, 1024)

    assert benchmark["peak_bytes"](lambda: alive(5)) == 5 * 2**20
    assert benchmark["peak_bytes"](one_after_the_other) == 2**20


def test_all_ways_are_on_offer():
    assert list(dispatch_module.DISPATCH) == [
        "dense",
        "loop",
        "einsum",
        "grouped",
        "triton",
    ]
    assert set(WAYS) < set(dispatch_module.DISPATCH.values())
