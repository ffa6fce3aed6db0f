"""Adapters, budgets, drift, selection and upcycling, each against an oracle of its own."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from moe_course import finetune
from moe_course.layers import (
    DenseFFN,
    Experts,
    MoE,
    SwiGLU,
    TopKRouter,
    Transformer,
    softmax_top_k,
)
from moe_course.layers.dispatch import slots_from_routing
from moe_course.specs import FFN, GQA, MLA, ModelSpec, RoutedExperts, zoo


def layer(E=4, K=2, D=8, F=12, activation="swiglu", bias=False, dtype=torch.float64):
    torch.manual_seed(E * 100 + K)
    router = TopKRouter(D, E, K)
    return MoE(router, Experts(E, D, F, activation, bias)).to(dtype)


def stir(module, seed=1):
    """B is zero at the start: give it something to say."""
    rng = torch.Generator().manual_seed(seed)
    for low_rank in module.modules():
        if isinstance(low_rank, finetune.LowRank):
            with torch.no_grad():
                used = low_rank.scale[:, None] != 0
                noise = torch.randn(low_rank.b.shape, generator=rng).to(low_rank.b)
                low_rank.b.copy_(0.1 * noise * used)


def written_out(moe, x, rank, alpha, joint, rs=False):
    """Every token and expert on its own, with W + s·B A as dense matrices of numbers."""
    adapter = moe.experts
    bank = adapter.experts
    ranks = [rank] * bank.num_experts if isinstance(rank, int) else rank
    place = [e for e, r in enumerate(ranks) if r]

    def weights(stack, low_rank, parts):
        out = []
        for e, r in enumerate(ranks):
            w = stack[e].clone()
            if r:
                i, most = place.index(e), max(ranks)
                s = alpha / (r**0.5 if rs else r)
                rows = len(w) // parts
                for p in range(parts):
                    a = low_rank.a[i, p * most : p * most + r]
                    b = low_rank.b[i, p * rows : (p + 1) * rows, :r]
                    w[p * rows : (p + 1) * rows] += s * b @ a
            out.append(w)
        return out

    parts = 2 if bank.activation == "swiglu" and not joint else 1
    up = weights(bank.w_up, adapter.up, parts)
    down = weights(bank.w_down, adapter.down, 1)
    routing = moe.router(x)
    y = 0 * x
    for t in range(len(x)):
        for e, w in zip(
            routing.expert_ids[t].tolist(), routing.weights[t], strict=True
        ):
            h = up[e] @ x[t] + (0 if bank.b_up is None else bank.b_up[e])
            o = down[e] @ bank.activate(h)
            y[t] += w * (o + (0 if bank.b_down is None else bank.b_down[e]))
    return y


@settings(max_examples=40)
@given(
    T=st.integers(0, 9),
    E=st.integers(1, 5),
    data=st.data(),
    activation=st.sampled_from(["swiglu", "gelu"]),
    bias=st.booleans(),
    joint=st.booleans(),
    rs=st.booleans(),
)
def test_adapted_experts_are_experts_with_other_weights(
    T, E, data, activation, bias, joint, rs
):
    K = data.draw(st.integers(1, E))
    rank = data.draw(
        st.one_of(
            st.integers(1, 5),
            st.lists(st.integers(0, 4), min_size=E, max_size=E).filter(any),
        )
    )
    moe = layer(E, K, activation=activation, bias=bias)
    x = torch.randn(T, 8, dtype=torch.float64, requires_grad=True)
    plain = moe(x)[0]
    finetune.apply_lora_to_moe(moe, rank, alpha=3.0, joint=joint, rs=rs)
    torch.testing.assert_close(moe(x)[0], plain)  # B = 0
    stir(moe)
    want = written_out(moe, x, rank, 3.0, joint, rs)
    torch.testing.assert_close(moe(x)[0], want)
    inputs = [x, *(p for p in moe.parameters() if p.requires_grad)]
    g = torch.randn_like(want)
    got = torch.autograd.grad(moe(x)[0], inputs, g, allow_unused=True)
    expected = torch.autograd.grad(want, inputs, g, allow_unused=True)
    for a, b, p in zip(got, expected, inputs, strict=True):
        zero = torch.zeros_like(p)
        torch.testing.assert_close(zero if a is None else a, zero if b is None else b)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("rank", [4, [3, 0, 1, 2]])
def test_merging_is_the_same_function_and_can_be_taken_back(joint, rank):
    moe = layer(bias=True)
    before = moe.experts.w_up.clone()
    finetune.apply_lora_to_moe(moe, rank, joint=joint)
    stir(moe)
    x = torch.randn(7, 8, dtype=torch.float64)
    y = moe(x)[0]
    for _ in range(2):  # a second time changes nothing
        finetune.merge(moe)
        torch.testing.assert_close(moe(x)[0], y)
    assert (moe.experts.experts.w_up - before).abs().max() > 1e-3
    for _ in range(2):
        finetune.unmerge(moe)
        torch.testing.assert_close(moe.experts.experts.w_up, before)
    torch.testing.assert_close(moe(x)[0], y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merged_weights_are_rounded_once(dtype):
    moe = finetune.apply_lora_to_moe(layer(dtype=dtype), 4)
    stir(moe)
    adapter = moe.experts
    pairs = ((adapter.experts.w_up, adapter.up), (adapter.experts.w_down, adapter.down))
    want = []
    for weight, low_rank in pairs:
        wide = copy.deepcopy(low_rank).double()
        want.append((weight.double() + wide.delta()).to(dtype))
    finetune.merge(moe)
    for (weight, _), exact in zip(pairs, want, strict=True):
        # float32 on the way moves a weight only where it lies at the middle of two.
        assert (weight != exact).float().mean() < 0.01


def test_adapters_over_16_bits_are_kept_in_float32():
    """A step of a thousandth moves them, and what they add is rounded once, with the product."""
    moe = finetune.apply_lora_to_moe(layer(dtype=torch.bfloat16), 4)
    stir(moe)
    adapters = [p for p in moe.parameters() if p.requires_grad]
    assert {p.dtype for p in adapters} == {torch.float32}
    bank, up, down = moe.experts.experts, moe.experts.up, moe.experts.down
    x = torch.randn(9, 8).bfloat16()
    slots = slots_from_routing(moe.router(x), 4)
    rows = x[slots.token]
    with torch.no_grad():
        product = torch.stack(
            [bank.w_up[e] @ r for e, r in zip(slots.expert, rows, strict=True)]
        )
        added = up.delta()[slots.expert] @ rows.float()[:, :, None]
        hidden = (product + added[:, :, 0]).bfloat16()
        inner = bank.activate(hidden)
        product = torch.stack(
            [bank.w_down[e] @ r for e, r in zip(slots.expert, inner, strict=True)]
        )
        added = down.delta()[slots.expert] @ inner.float()[:, :, None]
        out = (product + added[:, :, 0]).bfloat16()
        want = torch.zeros(9, 8).index_add(
            0, slots.token, out.float() * slots.weight[:, None].float()
        )
    y = moe.experts(x, slots)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), want, atol=2e-2, rtol=2e-2)
    y.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in adapters)
    before = up.b.detach().clone()
    with torch.no_grad():
        up.b.mul_(1 + 1e-3)
    assert (up.b != before)[before != 0].all()
    model = finetune.apply_lora_to_moe(
        Transformer(small()).bfloat16(), 3, attention=True, shared=True
    )
    assert model(torch.arange(12).view(2, 6))[0].dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def small(moe=None, attention=None, ffn=None):
    return ModelSpec(
        "small",
        2,
        16,
        32,
        attention or GQA(2, 1, 8),
        ffn,
        moe or RoutedExperts(4, 2, FFN(12), shared=FFN(12)),
    )


TRAINED = {
    "experts alone": (
        {},
        {"experts.up.a", "experts.up.b", "experts.down.a", "experts.down.b"},
    ),
    "router too": (
        {"train_router": True},
        {
            "experts.up.a",
            "experts.up.b",
            "experts.down.a",
            "experts.down.b",
            "router.weight",
        },
    ),
    "shared alone": (
        {"experts": False, "shared": True},
        {
            f"shared.experts.{m}.lora.{ab}"
            for m in ("gate", "up", "down")
            for ab in "ab"
        },
    ),
    "attention alone": (
        {"experts": False, "attention": True},
        {f"attention.{m}.lora.{ab}" for m in ("q", "k", "v", "out") for ab in "ab"},
    ),
}


@pytest.mark.parametrize("case", TRAINED)
def test_exactly_what_was_asked_for_is_trained(case):
    options, wanted = TRAINED[case]
    model = Transformer(small())
    ids = torch.randint(32, (2, 5))
    plain = model(ids)[0]
    assert finetune.apply_lora_to_moe(model, 2, **options) is model
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    prefix = "attention" if "attention" in case else "ffn"
    ends = {n.split(".", 2)[2].removeprefix("ffn.") for n in trained}
    assert {n.split(".")[1] for n in trained} == {"0", "1"}
    assert ends == wanted, prefix
    torch.testing.assert_close(model(ids)[0], plain)
    stir(model)
    out = model(ids)[0]
    if case != "router too":
        assert (out - plain).abs().max() > 1e-3
    out.sum().backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == (name in trained), name
    total, trainable = finetune.count_trainable_params(model)
    assert trainable == sum(model.get_parameter(n).numel() for n in trained)
    assert total > trainable


@pytest.mark.parametrize("name", ["mixtral", "qwen with shared", "latent"])
def test_budgets_are_what_the_model_holds(name):
    spec = {
        "mixtral": small(RoutedExperts(4, 2, FFN(12))),
        "qwen with shared": small(),
        "latent": small(attention=MLA(2, 12, 8, 6, 4, 5)),
    }[name]
    for options in (
        {},
        {"joint": True},
        {"shared": True, "attention": True},
        {"experts": False, "attention": True},
    ):
        if name == "mixtral" and options.get("shared"):
            continue
        model = finetune.apply_lora_to_moe(Transformer(spec), 3, **options)
        _, trainable = finetune.count_trainable_params(model)
        assert trainable == finetune.lora_params(spec, 3, **options), options


@pytest.mark.parametrize("parts", [("router",), ("experts",), ("shared", "rest"), ()])
def test_the_budget_of_a_recipe_is_what_it_trains(parts):
    spec = small()
    model = finetune.train_only(Transformer(spec), parts)
    total, trainable = finetune.count_trainable_params(model)
    budget = finetune.recipe_budget(spec, parts)
    assert (budget.trainable, budget.frozen) == (trainable, total - trainable)
    assert budget.bytes == 16 * trainable + 2 * (total - trainable)
    by_part = finetune.part_params(spec)
    assert sum(by_part[part] for part in parts) == trainable
    assert sum(by_part.values()) == total


def test_budgets_of_chosen_experts():
    spec = small()
    names = finetune.parts_of(model := Transformer(spec))
    every = sum(p.numel() for n, p in model.named_parameters() if names[n] == "experts")
    e = spec.moe.experts
    for chosen in range(e + 1):
        budget = finetune.recipe_budget(spec, ("experts",), chosen)
        assert budget.trainable * e == every * chosen
        assert budget.trainable + budget.frozen == spec.total_params()
    router = finetune.recipe_budget(spec, ("router",)).trainable
    both = finetune.recipe_budget(spec, ("router", "experts"), 1).trainable
    assert both == router + every // e
    for parts, chosen in ((("experts",), e + 1), (("experts",), -1), (("router",), 1)):
        with pytest.raises(ValueError, match="chosen needs experts among the parts"):
            finetune.recipe_budget(spec, parts, chosen)
    with pytest.raises(ValueError, match="parts must be among"):
        finetune.recipe_budget(spec, ("expert",))
    dense = ModelSpec("dense", 2, 16, 32, GQA(2, 2, 8), FFN(24))
    assert finetune.part_params(dense)["rest"] == dense.total_params()
    assert finetune.recipe_budget(dense, ("experts",)).trainable == 0


def test_budgets_in_numbers():
    mixtral = zoo["mixtral-8x7b"]
    assert finetune.lora_params(mixtral, 16) == 226_492_416
    assert (
        finetune.lora_params(mixtral, 16, experts=False, attention=True) == 13_631_488
    )
    assert finetune.full_budget(mixtral).bytes == 16 * mixtral.total_params()
    budget = finetune.lora_budget(mixtral, 16)
    assert budget.training_bytes == pytest.approx(3.6239e9, rel=1e-3)
    assert budget.bytes == 2 * mixtral.total_params() + budget.training_bytes
    with pytest.raises(ValueError, match="rank must be at least 1"):
        finetune.lora_params(mixtral, 0)
    # By hand: FFNs of one dense layer in V3's first three, of one shared expert in the other 58.
    v3 = zoo["deepseek-v3"]
    one = 3 * 16 * (7168 + 2048)
    assert finetune.lora_params(v3, 16) == 58 * 256 * one
    assert finetune.lora_params(v3, 16, experts=False, shared=True) == 58 * one
    dense = finetune.lora_params(v3, 16, experts=False, dense=True)
    assert dense == 3 * 3 * 16 * (7168 + 18432)
    assert finetune.lora_params(zoo["llama-2-70b"], 16) == 0


@pytest.mark.parametrize("ffn", [SwiGLU(8, 12), DenseFFN(8, 12, "gelu", bias=True)])
def test_a_single_expert_can_be_adapted(ffn):
    ffn = copy.deepcopy(ffn).double()
    names = [n for n, _ in ffn.named_children()]
    x = torch.randn(3, 4, 8, dtype=torch.float64)
    plain = ffn(x)
    weights = {n: m.weight.clone() for n, m in ffn.named_children()}
    adapter = finetune.LoRAExpertAdapter(ffn, rank=2, alpha=6.0)
    torch.testing.assert_close(adapter(x), plain)
    stir(adapter)
    y = adapter(x)
    assert (y - plain).abs().max() > 1e-3
    other = type(ffn)(8, 12, *(("gelu", True) if "gate" not in names else ())).double()
    state = {
        k.replace(".linear", ""): v
        for k, v in ffn.state_dict().items()
        if "lora" not in k
    }
    for n in names:
        lora = getattr(ffn, n).lora
        state[f"{n}.weight"] = weights[n] + 3.0 * lora.b[0] @ lora.a[0]
    other.load_state_dict(state)
    torch.testing.assert_close(y, other(x))
    finetune.merge(adapter)
    torch.testing.assert_close(adapter(x), y)


def test_dropout_is_of_the_input_and_off_in_evaluation():
    low_rank = finetune.LowRank(1, 400, 3, 2, alpha=2.0, dropout=0.5)
    low_rank.requires_grad_(False)
    nn.init.ones_(low_rank.b)
    x, first = torch.ones(1, 400), torch.zeros(1, dtype=torch.int64)
    low_rank.eval()
    whole = low_rank(x, first)
    torch.testing.assert_close(whole, (low_rank.a[0].sum(1).sum() * torch.ones(1, 3)))
    low_rank.train()
    torch.manual_seed(0)
    many = torch.cat([low_rank(x, first) for _ in range(200)])
    assert many.std() > 0
    # Each of 400 inputs is kept with chance 1/2 and doubled: variance = sum of (column sums)^2.
    spread = low_rank.a[0].sum(0).square().sum().sqrt()
    assert many[:, 0].std() == pytest.approx(spread.item(), rel=0.25)


def test_adapters_are_saved_and_read(tmp_path):
    one, two = (
        finetune.apply_lora_to_moe(layer(bias=True), [1, 2, 0, 3], train_router=True)
        for _ in range(2)
    )
    stir(one)
    with torch.no_grad():
        one.router.weight += 1
    file = tmp_path / "adapters.safetensors"
    finetune.save_adapters(one, file)
    assert file.stat().st_size < 8 * finetune.count_trainable_params(one)[1] + 2000
    x = torch.randn(5, 8, dtype=torch.float64)
    finetune.load_adapters(two, file)
    assert torch.equal(one(x)[0], two(x)[0])
    half = finetune.apply_lora_to_moe(
        layer(bias=True, dtype=torch.bfloat16), [1, 2, 0, 3], train_router=True
    )
    finetune.load_adapters(half, file)  # in another dtype, too
    assert torch.equal(half.experts.up.b, one.experts.up.b.float())
    without = finetune.apply_lora_to_moe(layer(bias=True), [1, 2, 0, 3])
    finetune.save_adapters(without, tmp_path / "without")
    with pytest.raises(ValueError, match=r"lacks router\.weight"):
        finetune.load_adapters(two, tmp_path / "without")
    finetune.merge(two)
    with pytest.raises(ValueError, match="unmerge them first"):
        finetune.load_adapters(two, file)
    # The same shapes, and another function: other experts, another scale.
    for ranks, alpha in (([0, 1, 2, 3], 32.0), ([1, 2, 0, 3], 16.0)):
        moe = finetune.apply_lora_to_moe(
            layer(bias=True), ranks, alpha, train_router=True
        )
        before = copy.deepcopy(moe.state_dict())
        with pytest.raises(ValueError, match="mean something else"):
            finetune.load_adapters(moe, file)
        assert all(torch.equal(v, before[k]) for k, v in moe.state_dict().items())
    other = finetune.apply_lora_to_moe(layer(), 5)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="of shape"):
        finetune.load_adapters(other, file)
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())
    finetune.save_adapters(
        finetune.apply_lora_to_moe(
            Transformer(small()), 2, experts=False, attention=True
        ),
        file,
    )
    with pytest.raises(ValueError, match="lacks"):
        finetune.load_adapters(other, file)


def test_bad_requests_are_refused():
    with pytest.raises(ValueError, match="no sparse layer"):
        finetune.apply_lora_to_moe(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="nothing to train"):
        finetune.apply_lora_to_moe(layer(), 2, experts=False)
    with pytest.raises(ValueError, match="no shared expert"):
        finetune.apply_lora_to_moe(layer(), 2, shared=True)
    with pytest.raises(ValueError, match="no attention"):
        finetune.apply_lora_to_moe(layer(), 2, attention=True)
    with pytest.raises(ValueError, match="has LoRA already"):
        finetune.apply_lora_to_moe(finetune.apply_lora_to_moe(layer(), 2), 2)
    with pytest.raises(ValueError, match="no linear map"):
        finetune.LoRAExpertAdapter(nn.Sequential(nn.ReLU()), 2)
    for ranks in (0, [1, 2], [0, 0, 0, 0], [1, 1, 1, -1]):
        with pytest.raises(ValueError, match="ranks must be"):
            finetune.apply_lora_to_moe(layer(), ranks)
    with pytest.raises(ValueError, match="one rank"):
        finetune.LoRAExpertAdapter(SwiGLU(4, 4), [1, 2])
    with pytest.raises(ValueError, match="needs slots"):
        finetune.LoRAExpertAdapter(Experts(2, 4, 4), 1)(torch.zeros(1, 4))
    for bad in ({"joint": False}, {"joint": True, "rank": [1, 2, 1, 1]}):
        moe = finetune.apply_lora_to_moe(layer(), **{"rank": 2, **bad})
        with pytest.raises(ValueError, match="PEFT"):
            finetune.to_peft(moe.experts.up)


# ---- Drift -------------------------------------------------------------------


def routing(logits, k=1):
    return softmax_top_k(torch.as_tensor(logits, dtype=torch.float64), k)


def test_drift_of_a_router_in_numbers():
    before = routing([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0]], 2)
    assert finetune.drift_of(before, before).agreement == 1
    assert finetune.drift_of(before, before).kl == 0
    after = routing([[1.0, 2.0, 0.0], [2.0, 1.0, 0.0]], 2)
    drift = finetune.drift_of(before, after)
    assert drift.agreement == (1 + 0.5) / 2  # order does not count
    assert drift.load_before == [0.25, 0.5, 0.25]
    assert drift.load_after == [0.5, 0.5, 0]
    p, q = before.logits.softmax(-1), after.logits.softmax(-1)
    want = (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(finetune.router_kl(before.logits, after.logits), want)
    assert drift.kl == pytest.approx(want.mean().item())
    one_way = (
        routing([[3.0, 1.0, 0.0]]),
        routing([[0.0, 0.0, 0.5]]),
    )  # KL is not symmetric
    p, q = (r.logits.softmax(-1) for r in one_way)
    want = (p * (p / q).log()).sum().item()
    assert finetune.drift_of(*one_way).kl == pytest.approx(want)
    dropped = replace(
        before, expert_ids=torch.tensor([[0, 3], [2, 1]])
    )  # 3 is no expert
    assert finetune.drift_of(dropped, before).load_before == pytest.approx([1 / 3] * 3)
    shifted = routing(before.logits + 5, 2)  # the same probabilities
    assert finetune.drift_of(before, shifted).kl == pytest.approx(0, abs=1e-12)


def test_replayed_routes_are_used_with_the_weights_of_their_own_logits():
    torch.manual_seed(0)
    spec = ModelSpec(
        "tiny", 2, 16, 32, GQA(2, 2, 8), moe=RoutedExperts(4, 2, FFN(8, gated=True))
    )
    model, other = Transformer(spec).double(), Transformer(spec).double()
    ids = torch.randint(32, (3, 7))
    own, routes = model(ids)[1], other(ids)[1]
    plain = model(ids)[0]
    with finetune.replayed_routes(model, own):
        assert torch.equal(model(ids)[1][0].expert_ids, own[0].expert_ids)
        torch.testing.assert_close(model(ids)[0], plain)
    with finetune.replayed_routes(model, routes):
        logits, seen = model(ids)
    for used, wanted in zip(seen, routes, strict=True):
        assert torch.equal(used.expert_ids, wanted.expert_ids)
        chosen = used.logits.gather(1, wanted.expert_ids).exp()
        torch.testing.assert_close(used.weights, chosen / chosen.sum(1, keepdim=True))
    assert not torch.allclose(logits, plain)
    assert torch.equal(model(ids)[0], plain)  # and afterwards all is as it was
    # What they compute: the experts that were replayed, one by one.
    moe, x = model.blocks[0].ffn, torch.randn(21, 16, dtype=torch.float64)
    first = routes[0]
    with finetune.replayed_routes(moe, [first]):
        y, routing, _ = moe(x)
    for token in range(21):
        want = sum(
            w * F.linear(F.silu(gate) * up, moe.experts.w_down[e])
            for e, w in zip(
                first.expert_ids[token], routing.weights[token], strict=True
            )
            for gate, up in [F.linear(x[token], moe.experts.w_up[e]).chunk(2)]
        )
        torch.testing.assert_close(y[token], want)


def test_replayed_routes_refuse_what_does_not_fit_and_leave_no_trace():
    moe = layer()
    x = torch.randn(5, 8, dtype=torch.float64)
    routing = moe(x)[1]
    with (
        pytest.raises(ValueError, match="has 1 sparse layers, got routings of 2"),
        finetune.replayed_routes(moe, [routing] * 2),
    ):
        pass
    with (
        pytest.raises(ValueError, match="of 5 tokens and 4 experts, the layer has 4"),
        finetune.replayed_routes(moe, [routing]),
    ):
        moe(x[:4])
    moe(x[:4])
    # No expert is chosen: nothing is computed for the token.
    none = replace(routing, expert_ids=torch.full((5, 2), 4))
    with finetune.replayed_routes(moe, [none]):
        assert torch.equal(moe(x)[0], torch.zeros_like(x))


def test_a_frozen_router_drifts_with_what_it_sees():
    torch.manual_seed(0)
    before = Transformer(small())
    after = copy.deepcopy(before)
    with torch.no_grad():
        after.embedding.weight += torch.randn_like(after.embedding.weight)
    ids = torch.randint(32, (4, 9))
    drifts = finetune.router_drift(before, after, ids)
    assert len(drifts) == 2
    assert all(d.agreement < 1 and d.kl > 0 for d in drifts)
    assert before.training
    assert all(d.agreement == 1 for d in finetune.router_drift(before, before, ids))


@given(
    counts=st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(any),
    share=st.floats(0, 1),
)
def test_relevant_experts_are_the_fewest_that_carry_the_share(counts, share):
    import itertools

    E = len(counts)
    ids = torch.tensor([e for e, n in enumerate(counts) for _ in range(n)])
    logits = torch.nn.functional.one_hot(ids, E).double() * 3
    chosen = finetune.relevant_experts(routing(logits), share, by="tokens")
    total = sum(counts)

    def carries(some):
        return sum(counts[e] for e in some) >= share * total - 1e-9

    got = [e for e in range(E) if chosen[e]]
    assert carries(got)
    fewest = next(
        n
        for n in range(E + 1)
        if any(map(carries, itertools.combinations(range(E), n)))
    )
    assert len(got) == fewest


def test_relevant_experts_by_weight_and_refusals():
    r = routing([[4.0, 0.0, 0.0], [4.0, 0.0, 0.0], [0.0, 0.1, 0.0]])
    assert finetune.relevant_experts(r, 0.8).tolist() == [True, False, False]
    assert finetune.relevant_experts(r, 0.8, "tokens").tolist() == [True, True, False]
    with pytest.raises(ValueError, match="share"):
        finetune.relevant_experts(r, 1.2)
    with pytest.raises(ValueError, match="by must be"):
        finetune.relevant_experts(r, 0.5, "luck")


# ---- What is trained ---------------------------------------------------------


def test_parts_cover_every_parameter_once():
    model = Transformer(small())
    parts = finetune.parts_of(model)
    assert set(parts) == {n for n, _ in model.named_parameters()}
    breakdown = model.spec.breakdown()
    sizes = dict.fromkeys(("router", "experts", "shared"), 0)
    for name, part in parts.items():
        if part in sizes:
            sizes[part] += model.get_parameter(name).numel()
    assert sizes == {part: breakdown[part].total for part in sizes}
    gated = replace(small().moe, shared_gate=True)
    model_with_gate = Transformer(small(gated))
    of = finetune.parts_of(model_with_gate)
    assert {of[n] for n in of if "shared_gate" in n} == {"shared"}
    finetune.train_only(model, ["router", "rest"])
    assert {parts[n] for n, p in model.named_parameters() if p.requires_grad} == {
        "router",
        "rest",
    }
    with pytest.raises(ValueError, match="parts must be among"):
        finetune.train_only(model, ["routers"])


def one_step(moe, optimizer, chosen=0):
    """All tokens to one expert."""
    x = torch.randn(6, 8, dtype=torch.float64)
    decision = moe.router(x)
    decision = replace(
        decision, expert_ids=torch.full_like(decision.expert_ids, chosen)
    )
    slots = slots_from_routing(decision, 4)
    optimizer.zero_grad()
    moe.experts(x, slots).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD])
def test_idle_experts_stay_what_they_were(make):
    """AdamW moves them by decay and by old gradients; spared, they keep weights and memory."""
    options = {"lr": 0.1, "weight_decay": 0.1} | (
        {"momentum": 0.9} if make is torch.optim.SGD else {}
    )

    def run(spare):
        torch.manual_seed(0)
        moe = layer(K=1)
        optimizer = make(moe.parameters(), **options)
        if spare:
            finetune.spare_idle_experts(optimizer, [moe.experts])
        for expert in (1, 0, 0):
            one_step(moe, optimizer, expert)
            if expert == 1:
                after_first = copy.deepcopy(moe.experts.w_up.detach())
                memory = [
                    v[1].clone()
                    for v in optimizer.state[moe.experts.w_up].values()
                    if v is not None and v.ndim
                ]
        state = [
            v[1]
            for v in optimizer.state[moe.experts.w_up].values()
            if v is not None and v.ndim
        ]
        return moe.experts.w_up.detach(), after_first, memory, state

    free, first, *_ = run(spare=False)
    assert (free[1] != first[1]).any(), "the optimiser moves an idle expert"
    assert (free[2] != layer(K=1).experts.w_up[2]).any()
    spared, first, memory, state = run(spare=True)
    assert torch.equal(spared[1], first[1])
    assert all(torch.equal(a, b) for a, b in zip(memory, state, strict=True))
    assert torch.equal(spared[2], layer(K=1).experts.w_up[2]), "never used, never moved"
    assert (spared[0] != first[0]).any(), "the busy one learns"


def test_sparing_leaves_other_optimisers_alone():
    """Weights and biases in optimisers of their own, and one that keeps no state."""
    moe = layer(bias=True)
    bank = moe.experts
    first = torch.optim.AdamW([bank.w_up, bank.w_down], lr=0.1)
    second = torch.optim.SGD([bank.b_up, bank.b_down], lr=0.1)
    for optimizer in (first, second):
        finetune.spare_idle_experts(optimizer, [bank])
    moe(torch.randn(6, 8, dtype=torch.float64))[0].sum().backward()
    first.step()
    second.step()
    assert set(first.state) == {bank.w_up, bank.w_down}
    assert not second.state
    first.state_dict()


def test_frozen_weights_have_nothing_to_mask():
    bank = layer(bias=True).experts
    bank.b_up.requires_grad_(False)
    chosen = torch.tensor([True, False, True, False])
    assert len(finetune.train_experts(bank, chosen)) == 3


def test_counts_of_relevant_experts_do_not_saturate():
    """bfloat16 counts to 256: the weights may be of that type, the sums may not."""
    ids = torch.tensor([0] * 3500 + [1] * 596 + [2] * 3000 + [3] * 1096)[:, None]
    r = routing(torch.nn.functional.one_hot(ids[:, 0], 4).double())
    r = replace(r, expert_ids=ids, weights=torch.ones(len(ids), 1).bfloat16())
    for by in ("weight", "tokens"):
        chosen = finetune.relevant_experts(r, 0.5, by)
        assert chosen.tolist() == [True, False, True, False]


def test_only_chosen_experts_learn():
    moe = layer()
    start = copy.deepcopy(moe.experts.state_dict())
    handles = finetune.train_experts(
        moe.experts, torch.tensor([True, False, False, True])
    )
    optimizer = torch.optim.AdamW(moe.parameters(), lr=0.1, weight_decay=0.1)
    spared = finetune.spare_idle_experts(optimizer, [moe.experts])
    x = torch.randn(40, 8, dtype=torch.float64)
    for _ in range(3):
        optimizer.zero_grad()
        moe(x)[0].square().sum().backward()
        optimizer.step()
    for name, weight in moe.experts.state_dict().items():
        same = (weight == start[name]).flatten(1).all(1).tolist()
        assert same == [False, True, True, False], name
    for handle in handles + spared:
        handle.remove()
    optimizer.zero_grad()
    moe(x)[0].square().sum().backward()
    optimizer.step()
    assert (moe.experts.w_up[1] != start["w_up"][1]).any()
    with pytest.raises(ValueError, match="yes or no for 4"):
        finetune.train_experts(moe.experts, torch.tensor([True]))


# ---- Upcycling ---------------------------------------------------------------


@settings(max_examples=25)
@given(
    gated=st.booleans(),
    bias=st.booleans(),
    experts=st.integers(1, 4),
    data=st.data(),
    granularity=st.sampled_from([1, 2, 3]),
    every=st.integers(1, 2),
)
def test_an_upcycled_model_computes_what_the_dense_one_does(
    gated, bias, experts, data, granularity, every
):
    k = data.draw(st.integers(1, experts))
    torch.manual_seed(experts)
    spec = ModelSpec("dense", 2, 8, 20, GQA(2, 1, 4), FFN(12, gated=gated, bias=bias))
    dense = Transformer(spec).double()
    sparse = finetune.upcycle(dense, experts, k, granularity, every)
    assert sum(p.numel() for p in sparse.parameters()) == sparse.spec.total_params()
    assert sparse.spec.moe.experts == experts * granularity
    ids = torch.randint(20, (2, 6))
    torch.testing.assert_close(sparse(ids)[0], dense(ids)[0])
    # Its FFNs cost k of the dense ones.
    one = spec.breakdown()["dense_ffn"].total / 2
    active = sparse.spec.breakdown()["experts"].active / len(sparse.spec.moe_layers)
    extra = (
        k * granularity * 8 - k * 8 if bias else 0
    )  # each piece has the output's bias
    assert active == k * one + extra


def test_where_upcycling_is_not_exact():
    torch.manual_seed(0)
    spec = ModelSpec("dense", 2, 8, 20, GQA(2, 1, 4), FFN(12))
    dense = Transformer(spec).double()
    ids = torch.randint(20, (2, 6))
    y = dense(ids)[0]
    unnormalised = finetune.upcycle(dense, 4, 2, gate=softmax_top_k)
    assert (unnormalised(ids)[0] - y).abs().max() > 1e-3  # weights sum to less than 1
    noisy = finetune.upcycle(dense, 4, 2, noise=0.01)
    difference = (noisy(ids)[0] - y).abs().max()
    assert 1e-6 < difference < 0.1
    bank = noisy.blocks[0].ffn.experts.requires_grad_(False)
    assert (bank.w_up[0] - bank.w_up[1]).std() / bank.w_up.std() == pytest.approx(
        0.01 * 2**0.5, rel=0.2
    )
    equal = finetune.upcycle(dense, 4, 2).blocks[0].ffn.experts
    assert torch.equal(equal.w_up[0], equal.w_up[1])
    assert torch.equal(dense(ids)[0], y)
    with pytest.raises(ValueError, match="not dense"):
        finetune.upcycle(noisy, 4, 2)
    with pytest.raises(ValueError, match=r"every must lie in 1\.\.2"):
        finetune.upcycle(dense, 4, 2, every=3)
    assert not finetune.upcycle(dense.eval(), 4, 2).training
    with pytest.raises(ValueError, match="granularity must divide"):
        finetune.upcycle(dense, 4, 2, granularity=5)


# ---- Against PEFT --------------------------------------------------------------


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_values_and_gradients_are_those_of_peft(family):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    from moe_course.interop import from_hf

    shape = {
        "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "num_experts_per_tok": 2,
    }  # fmt: skip
    if family == "mixtral":
        config = transformers.MixtralConfig(
            **shape, intermediate_size=24, num_local_experts=4
        )
        model = transformers.MixtralForCausalLM(config)
    else:
        config = transformers.Qwen3MoeConfig(
            **shape, moe_intermediate_size=24, num_experts=4, head_dim=8
        )
        model = transformers.Qwen3MoeForCausalLM(config)
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    moe = from_hf(model.model.layers[0].mlp)
    finetune.apply_lora_to_moe(moe, 4, alpha=8.0, joint=True)
    lora = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=[],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )  # fmt: skip
    theirs = peft.get_peft_model(model, lora)
    block = theirs.base_model.model.model.layers[0].mlp
    down, up = block.experts, block.experts.base_layer
    for wrapper in (up, down):
        nn.init.normal_(wrapper.lora_B["default"].weight, std=0.2)
    pairs = ((moe.experts.up, up), (moe.experts.down, down))
    for ours, wrapper in pairs:
        a, b = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
        finetune.from_peft(ours, a, b)
        for back, original in zip(finetune.to_peft(ours), (a, b), strict=True):
            assert torch.equal(back, original)
    x = torch.randn(1, 11, 16)
    mine, other = moe(x)[0], block(x)
    other = other[0] if isinstance(other, tuple) else other
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
    g = torch.randn_like(mine)
    mine.backward(g)
    other.backward(g)
    for ours, wrapper in pairs:
        e, r = len(ours.a), ours.a.shape[1]
        a = wrapper.lora_A["default"].weight.grad.unflatten(0, (e, r))
        b = wrapper.lora_B["default"].weight.grad.unflatten(1, (r, e)).permute(2, 0, 1)
        torch.testing.assert_close(ours.a.grad, a, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(ours.b.grad, b, rtol=1e-3, atol=1e-3)
