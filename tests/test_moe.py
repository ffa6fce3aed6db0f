"""The MoE layer: what the parts do together, padding, capacity, shared experts, and a production block."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from moe_course.layers import (
    DenseFFN,
    ExpertChoiceRouter,
    Experts,
    MoE,
    Routing,
    Slots,
    SwiGLU,
    TopKRouter,
    hash_table,
    hashed,
    top_k_softmax,
)
from moe_course.specs import FFN, RoutedExperts

DISPATCHES = ["dense", "loop", "einsum", "grouped"]


def _moe(width=8, num_experts=4, k=2, *, gate=top_k_softmax, shared=False, **options):
    torch.manual_seed(0)
    router = TopKRouter(width, num_experts, k, gate)
    nn.init.normal_(router.weight)
    if shared:
        options |= {
            "shared": SwiGLU(width, 6),
            "shared_gate": nn.Linear(width, 1, bias=False),
        }
    return MoE(router, Experts(num_experts, width, 8), **options)


def _by_hand(moe, x):
    """One token after the other, one expert after the other."""
    tokens = x.reshape(-1, x.shape[-1])
    logits = tokens.double() @ moe.router.weight.double().T
    rows = []
    for token, row in zip(tokens, logits, strict=True):
        best = row.topk(moe.router.k).indices
        weights = row[best].softmax(0)
        y = torch.zeros_like(token)
        for e, w in zip(best, weights, strict=True):
            g, u = (moe.experts.w_up[e] @ token).chunk(2)
            y = y + w * (moe.experts.w_down[e] @ (g * torch.sigmoid(g) * u))
        if moe.shared is not None:
            y = y + torch.sigmoid(token @ moe.shared_gate.weight[0]) * moe.shared(token)
        rows.append(y)
    return torch.stack(rows).view_as(x) if rows else x


@pytest.mark.parametrize("shape", [(5,), (1,), (0,), (2, 3), (2, 0, 3), (2, 2, 2), ()])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_the_layer_is_router_experts_and_shared_expert(dispatch, shared, shape):
    moe = _moe(shared=shared, dispatch=dispatch).double()
    x = torch.randn(*shape, 8, dtype=torch.float64)
    y, routing, slots = moe(x)
    torch.testing.assert_close(y, _by_hand(moe, x))
    assert isinstance(routing, Routing)
    assert isinstance(slots, Slots)
    assert len(slots.token) == routing.expert_ids.numel() == 2 * x[..., 0].numel()


def test_an_ungated_shared_expert_is_added_as_it_is():
    moe = _moe(shared=True)
    x = torch.randn(3, 8)
    shared, moe.shared, moe.shared_gate = moe.shared, None, None
    routed = moe(x)[0]
    moe.shared = shared
    torch.testing.assert_close(moe(x)[0], routed + shared(x))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str
)
@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_the_type_of_x_is_kept_and_the_router_computes_in_float32(dispatch, dtype):
    moe = _moe(shared=True, dispatch=dispatch).to(dtype)
    y, routing, slots = moe(torch.randn(5, 8).to(dtype))
    exact = torch.promote_types(dtype, torch.float32)
    assert y.dtype == dtype
    assert routing.logits.dtype == routing.weights.dtype == slots.weight.dtype == exact


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_gradients_are_those_of_the_forward_pass(dispatch):
    moe = _moe(4, 3, 2, shared=True, dispatch=dispatch).double()
    names = list(dict(moe.named_parameters()))

    def run(x, *weights):
        state = dict(zip(names, weights, strict=True))
        return torch.func.functional_call(moe, state, x)[0]

    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    weights = [p.detach().clone().requires_grad_() for p in moe.parameters()]
    assert torch.autograd.gradcheck(run, (x, *weights))


# --- Padding -----------------------------------------------------------------

ROUTERS = {
    "token choice": lambda: TopKRouter(8, 4, 2),
    "expert choice": lambda: ExpertChoiceRouter(8, 4, 2, capacity_factor=0.7),
}


@given(
    st.sampled_from(list(ROUTERS)),
    st.sampled_from(DISPATCHES),
    st.none() | st.sampled_from([0.3, 0.5, 1.0]),
    st.lists(st.booleans(), max_size=12),
)
def test_padding_changes_nothing_for_the_tokens(router, dispatch, factor, mask):
    torch.manual_seed(len(mask))
    moe = MoE(
        ROUTERS[router](), Experts(4, 8, 8), dispatch=dispatch, capacity_factor=factor
    )
    mask = torch.tensor(mask, dtype=torch.bool)
    x = torch.randn(len(mask), 8)
    x[~mask] *= 100  # it would win every comparison
    y, _, slots = moe(x, mask)
    want, _, alone = moe(x[mask])
    torch.testing.assert_close(y[mask], want)
    assert not y[~mask].any()
    assert torch.equal(mask.nonzero().squeeze(1)[alone.token], slots.token)


@pytest.mark.parametrize("dispatch", ["loop", "grouped"])
def test_what_stands_in_padding_does_not_matter(dispatch):
    moe = _moe(dispatch=dispatch)
    x, mask = (
        torch.randn(2, 3, 8),
        torch.tensor([[True, True, False], [True, False, False]]),
    )
    want = moe(x, mask)[0]
    x[~mask] = torch.nan
    y = moe(x, mask)[0]
    assert torch.equal(y, want)
    assert not y[~mask].any()


def test_padding_passes_through_the_shared_expert():
    moe = _moe(shared=True)
    x = torch.randn(3, 8)
    y = moe(x, torch.tensor([True, False, False]))[0]
    torch.testing.assert_close(
        y[1:], torch.sigmoid(moe.shared_gate(x[1:])) * moe.shared(x[1:])
    )


# --- Capacity ----------------------------------------------------------------


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_what_is_over_capacity_contributes_exactly_nothing(dispatch):
    moe = _moe(num_experts=4, k=1, dispatch=dispatch, capacity_factor=1.0)
    with torch.no_grad():  # all tokens want expert 2
        moe.router.weight.zero_()[2] = 1
    x = torch.rand(8, 8, requires_grad=True)
    y, routing, slots = moe(x)
    assert routing.expert_ids.flatten().tolist() == [2] * 8
    assert slots.token.tolist() == [0, 1]  # C = ceil(1.0 · 8 · 1/4)
    assert y[:2].any(dim=1).all()
    assert not y[2:].any()
    y.sum().backward()
    assert not x.grad[2:].any()


@given(st.integers(0, 20), st.integers(1, 3), st.sampled_from([0.25, 1.0, 1.25, 4.0]))
def test_no_expert_takes_more_than_its_capacity(tokens, k, factor):
    moe = _moe(num_experts=4, k=k, capacity_factor=factor)
    slots = moe(torch.randn(tokens, 8))[2]
    loads = torch.bincount(slots.expert, minlength=4)
    assert loads.max() <= -(-factor * tokens * k // 4)
    assert factor < 4 or loads.sum() == tokens * k


# --- Routers -----------------------------------------------------------------


def test_expert_choice_builds_the_slots_itself():
    torch.manual_seed(0)
    router = ExpertChoiceRouter(8, 4, 2)
    moe = MoE(router, Experts(4, 8, 8))
    x = torch.randn(6, 8)
    y, routing, slots = moe(x)
    assert routing is None
    assert torch.bincount(slots.expert).tolist() == [3] * 4
    chosen = torch.zeros(6, dtype=torch.bool).index_fill(0, slots.token, True)
    assert torch.equal(y.any(dim=1), chosen)


def test_token_ids_reach_the_router():
    table = hash_table(10, 4, 2)
    moe = MoE(TopKRouter(8, 4, 2, hashed, table=table), Experts(4, 8, 8))
    ids = torch.tensor([[3, 9], [0, 3]])
    routing = moe(torch.randn(2, 2, 8), token_ids=ids)[1]
    assert torch.equal(
        routing.expert_ids.sort().values, table[ids.flatten()].sort().values
    )


def test_the_router_learns_through_the_gate_weights():
    moe = _moe()
    moe(torch.randn(6, 8))[0].square().sum().backward()
    assert moe.router.weight.grad.abs().sum() > 0


@given(st.integers(1, 5), st.booleans(), st.booleans(), st.booleans(), st.booleans())
def test_parameters_are_those_that_specs_count(
    num_experts, bias, gated, shared_gate, router_bias
):
    expert = FFN(7, gated, bias)
    spec = RoutedExperts(num_experts, 1, expert, FFN(5), shared_gate, router_bias)
    moe = MoE(
        TopKRouter(8, num_experts, 1, bias=router_bias),
        Experts(num_experts, 8, 7, "swiglu" if gated else "relu", bias),
        SwiGLU(8, 5),
        nn.Linear(8, 1, bias=False) if shared_gate else None,
    )
    assert sum(p.numel() for p in moe.parameters()) == (
        num_experts * expert.params(8) + spec.shared_params(8) + spec.router_params(8)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"dispatch": "sorted"},
            "one of dense, loop, einsum, grouped, triton, got 'sorted'",
        ),
        ({"shared_gate": nn.Linear(8, 1)}, "shared_gate needs a shared expert"),
        ({"capacity_factor": 0.0}, "capacity_factor must be positive, got 0.0"),
    ],
)
def test_arguments_are_checked(options, message, unchecked_shapes):
    with pytest.raises(ValueError, match=message):
        MoE(TopKRouter(8, 4, 2), Experts(4, 8, 8), **options)


def test_a_mask_of_the_wrong_shape_is_refused(unchecked_shapes):
    with pytest.raises(ValueError, match=r"token_mask must be \[2, 3\], got \[3, 2\]"):
        _moe()(torch.randn(2, 3, 8), torch.ones(3, 2, dtype=torch.bool))


def test_router_and_experts_must_agree(unchecked_shapes):
    moe = MoE(TopKRouter(8, 5, 2), Experts(4, 8, 8))
    with pytest.raises(ValueError, match="among 5 experts, but there are 4"):
        moe(torch.randn(3, 8))


# --- Production --------------------------------------------------------------


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_the_layer_equals_the_block_of_qwen2_moe(dispatch):
    pytest.importorskip("transformers")
    from transformers import Qwen2MoeConfig
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

    config = Qwen2MoeConfig(
        hidden_size=8,
        moe_intermediate_size=12,
        shared_expert_intermediate_size=20,
        num_experts=5,
        num_experts_per_tok=3,
        norm_topk_prob=True,
    )
    theirs = Qwen2MoeSparseMoeBlock(config)
    torch.manual_seed(0)
    for weight in theirs.parameters():
        nn.init.normal_(weight, std=0.3)
    ours = MoE(
        TopKRouter(8, 5, 3),
        Experts(5, 8, 12),
        SwiGLU(8, 20),
        nn.Linear(8, 1, bias=False),
        dispatch,
    )
    names = {
        "router.weight": "gate.weight",
        "experts.w_up": "experts.gate_up_proj",
        "experts.w_down": "experts.down_proj",
        "shared.gate.weight": "shared_expert.gate_proj.weight",
        "shared.up.weight": "shared_expert.up_proj.weight",
        "shared.down.weight": "shared_expert.down_proj.weight",
        "shared_gate.weight": "shared_expert_gate.weight",
    }
    state = theirs.state_dict()
    ours.load_state_dict({mine: state[name] for mine, name in names.items()})
    x = torch.randn(2, 7, 8)
    y, want = ours(x)[0], theirs(x)
    want = want[0] if isinstance(want, tuple) else want
    torch.testing.assert_close(y, want, rtol=1e-6, atol=1e-6)
    for layer, out in ((ours, y), (theirs, want)):
        layer.zero_grad()
        out.square().sum().backward()
    found, expected = dict(ours.named_parameters()), dict(theirs.named_parameters())
    for mine, name in names.items():
        grad = expected[name].grad
        torch.testing.assert_close(found[mine].grad, grad, rtol=1e-5, atol=1e-5)


def test_one_expert_with_weight_one_is_a_dense_network():
    torch.manual_seed(0)
    dense = DenseFFN(8, 12, "gelu", bias=True)
    moe = MoE(TopKRouter(8, 1, 1), Experts(1, 8, 12, "gelu", bias=True))
    with torch.no_grad():
        moe.experts.w_up[0] = dense.up.weight
        moe.experts.b_up[0] = dense.up.bias
        moe.experts.w_down[0] = dense.down.weight
        moe.experts.b_down[0] = dense.down.bias
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(moe(x)[0], dense(x))
