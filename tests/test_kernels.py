"""The kernels in Triton's interpreter, against a float64 oracle that computes every expert.

Tiles are made tiny, so that small shapes have many of them, ragged on every side. Memory that nobody wrote is poisoned:
torch fills what it allocates with NaN.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="there is no triton for this system")

from moe_course.kernels import (
    INTERPRETED,
    fused_moe,
    grouped_gemm,
    routing,
    sort_by_expert,
    tiles,
    top_k_gate,
)
from moe_course.kernels import fused_moe as _public
from moe_course.kernels.decode import fits_decode
from moe_course.kernels.tiles import Tile
from moe_course.kernels.trace import trace
from moe_course.layers import Experts, MoE, TopKRouter
from moe_course.layers import routing as reference
from moe_course.layers.experts import ACTIVATIONS, GATED

layer_module = sys.modules[_public.__module__]
pytestmark = pytest.mark.skipif(
    not INTERPRETED, reason="these run in the interpreter; make gpu checks the GPU"
)

TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3}
NAMES = ("y", "x", "w_up", "w_down", "weights", "b_up", "b_down")


@pytest.fixture(autouse=True)
def poison():
    """What is allocated without a value holds NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def tiny_tiles(monkeypatch):
    """16 x 16 x 16, two row tiles a group."""
    tile = Tile(16, 16, 16, group_m=2)
    everything = tiles.Tiles(tile, tile, tile, tile, Tile(16, 32, 16, group_m=2))
    monkeypatch.setattr(layer_module, "choose", lambda *_: everything)


def oracle(x, w_up, w_down, ids, weights, activation, b_up=None, b_down=None):
    """Every expert on every token, in the dtype of the arguments."""
    y = torch.zeros_like(x)
    for e in range(len(w_up)):
        z = x @ w_up[e].T + (0 if b_up is None else b_up[e])
        out = ACTIVATIONS[activation](z) @ w_down[e].T
        out = out + (0 if b_down is None else b_down[e])
        for k in range(ids.shape[1]):
            y = y + torch.where((ids[:, k] == e)[:, None], weights[:, k, None] * out, 0)
    return y


def make(T, D, F, E, K, activation="swiglu", bias=False, dtype=torch.float32, seed=0):
    """Random arguments of a layer; some slots are skipped, some tokens have one expert twice."""
    rng = torch.Generator().manual_seed(seed)
    rows = 2 * F if activation in GATED else F

    def normal(*shape, scale=1.0):
        value = scale * torch.randn(shape, generator=rng, dtype=torch.float64)
        return value.to(dtype).requires_grad_()

    ids = torch.randint(0, E + 1, (T, K), generator=rng, dtype=torch.int32)
    return {
        "x": normal(T, D),
        "w_up": normal(E, rows, D, scale=2 * D**-0.5),
        "w_down": normal(E, D, F, scale=F**-0.5),
        "expert_ids": ids,
        "weights": torch.rand(T, K, generator=rng).requires_grad_(),
        "activation": activation,
        "b_up": normal(E, rows) if bias else None,
        "b_down": normal(E, D) if bias else None,
    }


def gradient(y):
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(1))


def run(args):
    """y and every gradient, for a gradient of y that is the same on every call."""
    y = fused_moe(**args)
    inputs = [args[name] for name in NAMES[1:] if args[name] is not None]
    dy = gradient(y).to(y.dtype)
    return [y, *torch.autograd.grad(y, inputs, dy)]


def expected(args):
    wide = {
        name: value.detach().double().requires_grad_()
        if name in NAMES and value is not None
        else value
        for name, value in args.items()
    }
    y = oracle(
        wide["x"], wide["w_up"], wide["w_down"], wide["expert_ids"], wide["weights"],
        wide["activation"], wide["b_up"], wide["b_down"],
    )  # fmt: skip
    inputs = [wide[name] for name in NAMES[1:] if wide[name] is not None]
    dy = gradient(y).to(args["x"].dtype).double()
    return [y, *torch.autograd.grad(y, inputs, dy, allow_unused=True)]


def compare(got, want, args, tolerance):
    names = [name for name in NAMES if name == "y" or args[name] is not None]
    for name, a, b in zip(names, got, want, strict=True):
        b = torch.zeros_like(a) if b is None else b
        assert a.shape == b.shape, name
        error = (a.double() - b).norm() / b.norm().clamp(min=1e-30)
        if b.norm() == 0:
            error = a.double().norm()
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


sizes = st.fixed_dictionaries(
    {
        "T": st.integers(0, 70),
        "D": st.integers(1, 40),
        "F": st.integers(1, 40),
        "E": st.integers(1, 6),
        "K": st.integers(1, 3),
        "activation": st.sampled_from(sorted(ACTIVATIONS)),
        "bias": st.booleans(),
        "dtype": st.sampled_from([torch.float32, torch.float16]),
        "seed": st.integers(0, 9),
    }
)


@pytest.mark.parametrize(
    "capability", [(8, 0), (9, 0)], ids=["pointers", "descriptors"]
)
def test_forward_and_backward_agree_with_every_expert_in_float64(
    capability, tiny_tiles, monkeypatch
):
    monkeypatch.setattr(tiles, "capability", lambda device: capability)
    described = []
    real = tiles.weights

    def weights(w, block):
        result = real(w, block)
        described.append(result[1])
        return result

    monkeypatch.setattr(tiles, "weights", weights)

    @settings(max_examples=12)
    @given(sizes)
    def check(case):
        args = make(**case)
        compare(run(args), expected(args), args, TOLERANCE[case["dtype"]])

    check()
    # Rows of a multiple of 16 bytes, which descriptors need: hypothesis need not have drawn any.
    for dtype in TOLERANCE:
        args = make(37, 24, 40, 5, 2, dtype=dtype)
        compare(run(args), expected(args), args, TOLERANCE[dtype])
    assert any(described) == (capability >= (9, 0))


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_every_activation_with_the_tiles_of_the_table(activation):
    for bias in (False, True):
        args = make(75, 72, 88, 3, 2, activation, bias)
        compare(run(args), expected(args), args, 1e-6)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_few_tokens_take_the_path_of_their_own(activation, monkeypatch):
    def no_sort(*_):
        raise AssertionError("sorted")

    for T, E, K, bias in [
        (1, 3, 2, False),
        (1, 1, 1, True),
        (2, 18, 2, True),
        (5, 64, 3, False),
    ]:
        assert fits_decode(T, K, E)
        args = make(T, 70, 33, E, K, activation, bias)
        want = expected(args)[0]
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(layer_module, "sort_by_expert", no_sort)
            got = fused_moe(**args)
        assert (got - want).norm() <= 1e-6 * want.norm()
    assert not fits_decode(3, 2, 8)


def test_a_call_that_needs_no_gradient_gives_the_same_bits():
    args = make(40, 24, 32, 3, 2)
    with torch.no_grad():
        without = fused_moe(**args)
    assert torch.equal(without, fused_moe(**args))


EDGES = {
    "no tokens": {"T": 0},
    "one expert": {"E": 1, "K": 1},
    "every expert": {"E": 3, "K": 3},
    "one column": {"D": 1, "F": 1},
}


@pytest.mark.parametrize("edge", EDGES)
def test_edges(edge, tiny_tiles):
    args = make(
        **({"T": 20, "D": 8, "F": 8, "E": 4, "K": 2, "bias": True} | EDGES[edge])
    )
    compare(run(args), expected(args), args, 1e-6)


@pytest.mark.parametrize(
    "ids", [4, 1, 0], ids=["all skipped", "all on one", "all on the first"]
)
def test_idle_experts_get_zeros_and_skipped_slots_give_zeros(ids, tiny_tiles):
    args = make(33, 24, 24, 4, 2, bias=True)
    args["expert_ids"].fill_(ids)
    got = run(args)
    compare(got, expected(args), args, 1e-6)
    for grad in (got[2], got[3], got[5], got[6]):
        idle = [e for e in range(4) if e != ids]
        assert not grad[idle].any()
    if ids == 4:
        assert not got[0].any()
        assert not got[4].any()


def test_no_choices_at_all():
    args = make(5, 8, 8, 2, 1)
    args["expert_ids"], args["weights"] = (
        args["expert_ids"][:, :0],
        args["weights"].detach()[:, :0].requires_grad_(),
    )
    got = run(args)
    assert not got[0].any()
    assert got[4].shape == (5, 0)


def test_ids_that_are_no_expert_are_skipped_or_in_debug_mode_refused(monkeypatch):
    args = make(20, 8, 8, 4, 2)
    want = expected(args)[0]
    bad = args["expert_ids"].clone()
    bad[bad == 4] = torch.tensor(
        [-1, 5, 2**31 - 1, -(2**31)], dtype=torch.int32
    ).repeat(99)[: (bad == 4).sum()]
    assert (fused_moe(**(args | {"expert_ids": bad})) - want).norm() < 1e-5
    wide = bad.long()
    wide[bad == 5] = 2**32  # which is 0 in its lower 32 bits
    assert (fused_moe(**(args | {"expert_ids": wide})) - want).norm() < 1e-5
    monkeypatch.setenv("MOE_COURSE_DEBUG", "1")
    fused_moe(**args)
    with pytest.raises(
        ValueError, match=r"must lie in 0\.\.4 .*got -2147483648\.\.2147483647"
    ):
        fused_moe(**(args | {"expert_ids": bad}))


def test_a_token_that_is_not_finite_stays_apart(tiny_tiles):
    args = make(40, 24, 24, 3, 2)
    good = fused_moe(**args).detach()
    args["x"] = args["x"].detach().clone()
    args["x"][7, 3], args["x"][8] = float("nan"), float("inf")
    args["x"].requires_grad_()
    y, dx, *_ = run(args)
    others = [t for t in range(40) if t not in (7, 8)]
    assert torch.equal(y[others], good[others])
    assert dx[others].isfinite().all()
    if (args["expert_ids"][7] < 3).any():
        assert y[7].isnan().any()


def test_an_expert_that_is_not_finite_spoils_its_own_tokens_alone(tiny_tiles):
    args = make(40, 20, 20, 3, 2)
    good = run(args)
    for name in ("w_up", "w_down"):
        args[name] = args[name].detach().clone()
        args[name][1] = float("nan")
        args[name].requires_grad_()
    y, dx, *_ = run(args)
    apart = (args["expert_ids"] != 1).all(1)
    assert apart.any()
    assert torch.equal(y[apart], good[0][apart])
    assert torch.equal(dx[apart], good[1][apart])


def test_inputs_need_not_be_contiguous(tiny_tiles):
    args = make(30, 24, 16, 3, 2)
    want = run(args)
    wide = torch.full((30, 64), float("nan"))
    wide[:, 8:32] = args["x"].detach()
    variants = {
        "x": [wide[:, 8:32], args["x"].detach().T.contiguous().T],
        "w_up": [args["w_up"].detach().mT.contiguous().mT],
        "w_down": [args["w_down"].detach().mT.contiguous().mT],
        "expert_ids": [args["expert_ids"].long(), args["expert_ids"].T.contiguous().T],
        "weights": [args["weights"].detach().T.contiguous().T],
    }
    for name, given_ in variants.items():
        for value in given_:
            if value.is_floating_point():
                value.requires_grad_()
            for a, b in zip(run(args | {name: value}), want, strict=True):
                assert torch.equal(a, b), name
    y = fused_moe(**args)
    y.sum().backward()  # an expanded gradient, stride 0
    dy = torch.randn(24, 30).T
    got = torch.autograd.grad(fused_moe(**args), args["x"], dy)
    assert torch.equal(
        got[0], torch.autograd.grad(fused_moe(**args), args["x"], dy.contiguous())[0]
    )


@pytest.mark.parametrize("T", [0, 20])
def test_frozen_experts_cost_no_product_of_their_own(T, monkeypatch):
    args = make(T, 16, 24, 3, 2, bias=True)
    want = run(args)
    for name in ("w_up", "w_down", "b_up", "b_down"):
        args[name] = args[name].detach()

    def no_product(*_, **__):
        raise AssertionError("a gradient that nobody asked for")

    for name in ("weight_gradient", "bias_gradient"):
        monkeypatch.setattr(grouped_gemm, name, no_product)
    y = fused_moe(**args)
    got = torch.autograd.grad(y, [args["x"], args["weights"]], gradient(y))
    assert torch.equal(got[0], want[1])
    assert torch.equal(got[1], want[4])


def test_bfloat16_is_computed_in_float32_by_the_interpreter():
    args = make(20, 16, 16, 3, 2, dtype=torch.bfloat16)
    got = run(args)
    assert got[0].dtype == got[1].dtype == torch.bfloat16
    compare(got, expected(args), args, 4e-3)


def test_what_is_kept_for_the_backward_pass_is_what_was_promised():
    T, D, F, E, K = 64, 32, 48, 4, 2
    args = make(T, D, F, E, K, dtype=torch.float16)
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fused_moe(**args)
    given_ = {
        v.data_ptr() for n, v in args.items() if n in ("w_up", "w_down", "weights")
    }
    kept = [tensor for pointer, tensor in kept.items() if pointer not in given_]
    activations = sum(t.nbytes for t in kept if t.is_floating_point())
    indices = sum(t.nbytes for t in kept if not t.is_floating_point())
    assert activations == 2 * T * D + 4 * T * K * F
    assert indices <= 4 * (2 * T * K + 2 * (E + 1) + T * K)


def test_offsets_beyond_two_to_the_31():
    # Memory that nobody touches costs nothing: of 4.3 GB, two experts' weights are written.
    torch.use_deterministic_algorithms(False)
    E, F, D = 4100, 512, 512
    w_up = torch.empty(E, 2 * F, D, dtype=torch.float16)
    w_down = torch.empty(2 * E, D, F, dtype=torch.float16)
    rng = torch.Generator().manual_seed(0)
    assert w_up.numel() > 2**31
    last = E - 1
    w_up[last] = torch.randn(2 * F, D, generator=rng) / D**0.5
    w_down[last] = torch.randn(D, F, generator=rng) / F**0.5
    w_down[-1] = w_down[last]
    x = torch.randn(3, D, generator=rng).half()
    ids, weights = torch.full((3, 1), last, dtype=torch.int32), torch.ones(3, 1)
    args = (x, w_up, w_down[:E], ids, weights, None, None, "swiglu")
    hidden = x.double() @ w_up[last].double().T
    act = ACTIVATIONS["swiglu"](hidden)
    want = act @ w_down[last].double().T

    def close(got, reference):
        return (got.double() - reference).norm() <= 2e-3 * reference.norm()

    assert fits_decode(3, 1, E)
    assert close(layer_module.forward(*args, False)[0], want)
    tile = Tile(16, 512, 512)
    s = sort_by_expert(ids, E, 16)
    for capability in ((8, 0), (9, 0)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tiles, "capability", lambda device, c=capability: c)
            got, kept = grouped_gemm.up_projection(
                x, w_up, None, s, 1, "swiglu", True, tile
            )
            assert close(got, act)
            assert close(kept, hidden)
            assert close(
                grouped_gemm.row_products(got, w_down[:E], None, s, True, tile), want
            )
            back = grouped_gemm.row_products(kept, w_up, None, s, False, tile)
            assert close(back, kept.double() @ w_up[last].double())
    # The last of 8200 matrices: 2^31 and more elements in, for the down-projection too.
    twice = torch.full((3, 1), 2 * E - 1, dtype=torch.int32)
    s = sort_by_expert(twice, 2 * E, 16)
    got = grouped_gemm.row_products(act.half(), w_down, None, s, True, tile)
    assert close(got, want)


def refusals():
    args = make(4, 8, 6, 3, 2, bias=True)
    yield "activation must be one of", {"activation": "tanh"}
    yield r"x must be \[T, D\]", {"x": args["x"][0]}
    yield r"w_up must be \[3, 12, 8\]", {"w_up": args["w_up"][:, :6]}
    yield r"w_down must be \[3, 9, 6\]", {"x": torch.randn(4, 9)}
    yield r"expert_ids must be \[4, 2\]", {"expert_ids": args["expert_ids"][:3]}
    yield r"weights must be \[4, 2\]", {"weights": args["weights"][:, :1]}
    yield r"b_up must be \[3, 12\]", {"b_up": args["b_down"]}
    yield r"b_down must be \[3, 8\]", {"b_down": args["b_up"]}
    yield "share one dtype.*w_down in torch.float16", {"w_down": args["w_down"].half()}
    yield (
        "share one dtype.*x in torch.float64",
        {
            name: args[name].double()
            for name in ("x", "w_up", "w_down", "b_up", "b_down")
        },
    )
    yield "weights must be float32", {"weights": args["weights"].double()}
    yield (
        "expert_ids must be int32 or int64",
        {"expert_ids": args["expert_ids"].float()},
    )
    yield "w_down is on meta and x on cpu", {"w_down": args["w_down"].to("meta")}
    yield "must not be empty", {"w_down": args["w_down"][:0]}


@pytest.mark.parametrize(
    ("message", "change"),
    list(refusals()),
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_bad_arguments_are_refused_before_anything_runs(message, change):
    with pytest.raises(ValueError, match=message):
        fused_moe(**(make(4, 8, 6, 3, 2, bias=True) | change))


def test_the_operators_pass_opcheck():
    torch.use_deterministic_algorithms(False)
    for bias in (False, True):
        args = make(9, 16, 8, 3, 2, bias=bias)
        # Rows of skipped slots are never written, nor read: opcheck would compare them.
        args["expert_ids"] %= 3
        words = (
            args["x"], args["w_up"], args["w_down"], args["expert_ids"], args["weights"],
            args["b_up"], args["b_down"], "swiglu",
        )  # fmt: skip
        torch.library.opcheck(torch.ops.moe_course.fused_moe.default, (*words, True))
        alone = tuple(
            w.detach() if isinstance(w, torch.Tensor) and n not in (0, 4) else w
            for n, w in enumerate(words)
        )
        torch.library.opcheck(torch.ops.moe_course.fused_moe.default, (*alone, True))
        frozen = tuple(w.detach() if isinstance(w, torch.Tensor) else w for w in words)
        torch.library.opcheck(torch.ops.moe_course.fused_moe.default, (*frozen, False))
    logits = torch.randn(5, 4, requires_grad=True)
    torch.library.opcheck(torch.ops.moe_course.top_k_gate.default, (logits, 2, True))


def test_the_layer_traces_into_one_graph():
    args = make(9, 16, 8, 3, 2)
    compiled = torch.compile(
        lambda x: fused_moe(**(args | {"x": x})), backend="aot_eager", fullgraph=True
    )
    assert torch.equal(compiled(args["x"]), fused_moe(**args))


@pytest.mark.parametrize("T", [1, 37], ids=["decode", "tiles"])
def test_no_program_touches_what_is_not_its_own(T):
    """An access outside a tensor is refused even where its value is masked away later."""
    args = make(T, 21, 19, 3, 2, bias=True)
    # Behind the last expert nothing is left that a read could fall on unseen.
    args["expert_ids"][0] = torch.tensor([2, 0])
    with torch.no_grad():
        want = fused_moe(**args)
        with trace() as seen:
            got = fused_moe(**args)
    torch.testing.assert_close(got, want)  # watched sums run in another order
    assert seen.races == []
    if T > 1:
        with trace() as seen:
            run(args)
        assert seen.races == []


# ---- Sort -------------------------------------------------------------------------------------------------------


def check_sorted(ids, num_experts, block_m):
    s = sort_by_expert(ids, num_experts, block_m)
    flat = ids.flatten()
    wanted = (flat >= 0) & (flat < num_experts)
    key = torch.where(wanted, flat, num_experts)
    count = int(wanted.sum())
    order = key.argsort(stable=True)[:count]
    assert torch.equal(s.order[:count], order.int())
    inverse = torch.full_like(flat, -1)
    inverse[order] = torch.arange(count, dtype=flat.dtype)
    assert torch.equal(s.inverse, inverse.int())
    counts = torch.bincount(key, minlength=num_experts + 1)[:num_experts].tolist()
    assert s.offsets.tolist() == [0, *itertools.accumulate(counts)]
    in_tiles = [-(-n // block_m) for n in counts]
    assert s.tile_offsets.tolist() == [0, *itertools.accumulate(in_tiles)]
    total = sum(in_tiles)
    assert (
        total
        <= len(s.tile_expert)
        == routing.max_tiles(len(flat), num_experts, block_m)
    )
    experts = [e for e, n in enumerate(in_tiles) for _ in range(n)]
    assert s.tile_expert[:total].tolist() == experts


@settings(max_examples=25)
@given(
    T=st.integers(0, 300),
    K=st.integers(1, 4),
    E=st.integers(1, 70),
    block_m=st.sampled_from([16, 64, 128]),
    seed=st.integers(0, 99),
    odd=st.booleans(),
)
def test_the_counting_sort_is_stable_and_maps_tiles_to_experts(
    T, K, E, block_m, seed, odd
):
    rng = torch.Generator().manual_seed(seed)
    low, high = (-2, E + 3) if odd else (0, E)
    ids = torch.randint(low, high, (T, K), generator=rng, dtype=torch.int32)
    check_sorted(ids, E, block_m)


def test_the_sort_with_many_slots_a_block_and_many_blocks(monkeypatch):
    monkeypatch.setattr(routing, "SUB", 16)
    monkeypatch.setattr(routing, "MAX_BLOCKS", 7)
    rng = torch.Generator().manual_seed(0)
    for E in (3, 600):  # 600: a chunk holds fewer blocks of counts than there are
        check_sorted(torch.randint(0, E + 1, (123, 4), generator=rng), E, 16)
    check_sorted(torch.zeros(123, 4, dtype=torch.int32), 5, 16)


# ---- Gate -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("renormalise", [True, False])
@settings(max_examples=20)
@given(
    T=st.integers(0, 40),
    E=st.integers(1, 37),
    seed=st.integers(0, 99),
    ties=st.booleans(),
    data=st.data(),
)
def test_the_gate_chooses_and_weights_as_the_routers_do(
    renormalise, T, E, seed, ties, data
):
    K = data.draw(st.integers(1, E))
    rng = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(T, E, generator=rng)
    if ties:
        logits = logits.round()
    logits.requires_grad_()
    ids, weights = top_k_gate(logits, K, renormalise=renormalise)
    wide = logits.detach().double().requires_grad_()
    gate = reference.top_k_softmax if renormalise else reference.softmax_top_k
    want = gate(wide, K)
    assert ids.dtype == torch.int32
    assert torch.equal(ids.long(), want.expert_ids)
    torch.testing.assert_close(weights.double(), want.weights, rtol=1e-5, atol=1e-7)
    dw = torch.randn(T, K, generator=rng)
    (got,) = torch.autograd.grad(weights, logits, dw)
    (grad,) = torch.autograd.grad(want.weights, wide, dw.double())
    torch.testing.assert_close(got.double(), grad, rtol=1e-4, atol=1e-6)


def test_the_gate_ranks_what_is_not_finite_as_a_stable_sort_does():
    inf, nan = float("inf"), float("nan")
    logits = torch.tensor(
        [
            [0.0, nan, inf, 1.0],
            [-inf, -inf, 0.0, -0.0],
            [-inf] * 4,
            [nan] * 4,
            [-0.0, 0.0, -0.0, 0.0],
            [-nan, 1, 2, 3],
        ]
    )
    ids, _ = top_k_gate(logits, 3)
    want = logits.sort(dim=-1, descending=True, stable=True).indices[:, :3]
    assert torch.equal(ids.long(), want)


def test_the_gate_refuses_what_it_cannot_choose_from():
    with pytest.raises(ValueError, match=r"k must lie in 1\.\.4 .*got 5"):
        top_k_gate(torch.randn(2, 4), 5)
    with pytest.raises(ValueError, match="float matrix"):
        top_k_gate(torch.ones(2, 4, dtype=torch.int32), 1)
    ids, _ = top_k_gate(torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16), 1)
    assert ids.item() == 1


# ---- Around the kernels -----------------------------------------------------------------------------------------


def test_moe_runs_the_kernel_and_agrees_with_the_loop():
    torch.manual_seed(0)
    layer = MoE(TopKRouter(16, 4, 2), Experts(4, 16, 24, bias=True), dispatch="triton")
    x = torch.randn(2, 15, 16)
    mask = torch.rand(2, 15) < 0.8
    results = []
    for dispatch in ("triton", "loop"):
        layer.dispatch = dispatch
        layer.zero_grad()
        y, _, _ = layer(x, token_mask=mask)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad.clone() for p in layer.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_triton_imported_by_somebody_else_first():
    code = (
        "import os; del os.environ['TRITON_INTERPRET']\n"
        "import triton, torch\n"
        "from moe_course.kernels import INTERPRETED, sort_by_expert\n"
        "print(INTERPRETED, sort_by_expert(torch.tensor([[1], [0]]), 2).order.tolist())"
    )
    done = python(code, CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET="1")
    assert done.stdout.strip() == "True [1, 0]", done.stderr


def test_compiled_kernels_refuse_tensors_of_the_cpu():
    code = (
        "import torch\nfrom moe_course.kernels import fused_moe\n"
        "z = torch.zeros\n"
        "try: fused_moe(z(1, 4), z(2, 8, 4), z(2, 4, 4), z(1, 1, dtype=torch.int32), z(1, 1))\n"
        "except ValueError as error: print(error)"
    )
    done = python(code, TRITON_INTERPRET="0")
    assert "need tensors on a GPU, got cpu" in done.stdout, done.stderr


def test_without_triton_there_is_one_clear_sentence():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "try: import moe_course.kernels\n"
        "except ImportError as error: print(error)"
    )
    done = python(code)
    assert "needs triton, which is not installed here" in done.stdout, done.stderr


def test_a_layer_has_one_block_m():
    tile = Tile(16, 16, 16)
    with pytest.raises(ValueError, match="share one block_m"):
        tiles.Tiles(tile, dataclasses.replace(tile, block_m=32), tile, tile, tile)
