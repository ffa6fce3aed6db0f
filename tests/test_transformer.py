"""The transformer: parameters against the spec, attention against formulas, logits against production."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from moe_course.layers import (
    DecoderBlock,
    Groups,
    SwiGLU,
    Transformer,
    hash_table,
    hashed,
    renormalised,
    sigmoid_top_k,
    softmax_top_k,
)
from moe_course.layers.transformer import causal_attention, rope
from moe_course.specs import FFN, GQA, MLA, ModelSpec, RoutedExperts, zoo

FFNS = st.builds(FFN, st.integers(1, 9), st.booleans(), st.booleans())


@st.composite
def attentions(draw):
    size, flag = st.integers(1, 4), st.booleans()
    if draw(st.integers(0, 3)) == 0:
        return draw(
            st.builds(
                MLA,
                heads=size,
                q_rank=st.none() | size,
                kv_rank=size,
                nope_dim=size,
                rope_dim=st.sampled_from([2, 4]),
                v_dim=size,
                bias=flag,
            )
        )
    kv_heads = draw(st.integers(1, 3))
    return GQA(
        kv_heads * draw(st.integers(1, 3)),
        kv_heads,
        2 * draw(st.integers(1, 3)),
        draw(flag),
        draw(flag),
        draw(st.sampled_from(["none", "head", "full"])),
        draw(flag),
    )


@st.composite
def specs(draw):
    experts = draw(st.integers(1, 5))
    shared = draw(st.none() | FFNS)
    moe = RoutedExperts(
        experts,
        draw(st.integers(1, experts)),
        draw(FFNS),
        shared,
        shared is not None and draw(st.booleans()),
        draw(st.booleans()),
    )
    return ModelSpec(
        "random",
        layers=draw(st.integers(1, 4)),
        width=draw(st.integers(1, 9)),
        vocab=draw(st.integers(1, 20)),
        attention=draw(attentions()),
        ffn=draw(FFNS),
        moe=draw(st.none() | st.just(moe)),
        first_dense=draw(st.integers(0, 2)),
        moe_every=draw(st.integers(1, 2)),
        norms_per_layer=draw(st.sampled_from([2, 4])),
        tied_embeddings=draw(st.booleans()),
    )


def _count(model):
    return sum(p.numel() for p in model.parameters())


def _ids(spec, *shape):
    return torch.randint(0, spec.vocab, shape)


ATTENTIONS = {
    "gqa": GQA(4, 2, 4, qkv_bias=True, qk_norm="head", sinks=True),
    "mla": MLA(2, 6, 5, nope_dim=3, rope_dim=4, v_dim=5),
}


def _spec(attention="gqa", **options):
    moe = RoutedExperts(4, 2, FFN(8), FFN(6), shared_gate=True)
    sizes = {"layers": 2, "width": 8, "vocab": 11, "ffn": FFN(12), "moe": moe}
    sizes |= {"attention": ATTENTIONS[attention], "first_dense": 1}
    return ModelSpec("tiny", **sizes | options)


def _model(spec, **options):
    """Random in every weight, so that nothing is hidden by a zero or a one."""
    torch.manual_seed(0)
    model = Transformer(spec, **options).double()
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.7)
    return model


# --- Parameters --------------------------------------------------------------


@given(specs())
def test_parameters_are_those_that_the_spec_counts(spec):
    model = Transformer(spec)
    assert _count(model) == spec.total_params()
    logits, routings = model(_ids(spec, 2, 3))
    assert logits.shape == (2, 3, spec.vocab)
    assert len(routings) == len(spec.moe_layers)
    assert all(r.expert_ids.shape == (6, spec.moe.k) for r in routings)


@pytest.mark.parametrize("name", zoo)
def test_every_model_of_the_zoo_can_be_built(name):
    with torch.device("meta"):  # shapes without numbers: a terabyte of them
        model = Transformer(zoo[name])
    assert _count(model) == zoo[name].total_params()


def test_sparse_layers_lie_where_the_spec_says():
    spec = _spec(layers=6, first_dense=0, moe_every=2, dense_layers=(3,))
    sparse = [
        i
        for i, block in enumerate(Transformer(spec).blocks)
        if block.ffn.__class__.__name__ == "MoE"
    ]
    assert tuple(sparse) == spec.moe_layers == (1, 5)


def test_the_bias_of_a_sigmoid_router_is_its_correction():
    moe = RoutedExperts(4, 2, FFN(8), router_bias=True)
    model = Transformer(_spec(moe=moe), sigmoid_top_k, scale=2.5)
    router = model.blocks[1].ffn.router
    assert router.bias is None
    assert _count(model) + router.correction.numel() == _spec(moe=moe).total_params()
    assert router.options == {"scale": 2.5}


def test_tied_embeddings_are_one_tensor():
    model = Transformer(_spec(tied_embeddings=True))
    assert model.head.weight is model.embedding.weight
    assert Transformer(_spec()).head.weight is not model.embedding.weight


@pytest.mark.parametrize("norms", [0, 1, 3])
def test_an_unknown_number_of_norms_is_refused(norms, unchecked_shapes):
    with pytest.raises(ValueError, match=f"norms must be 2 .* or 4 .*, got {norms}"):
        Transformer(_spec(norms_per_layer=norms))


# --- Position ----------------------------------------------------------------


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 100))
def test_rope_turns_pairs_by_angles_that_grow_with_position(length, pairs, start):
    x = torch.randn(2, length, 2 * pairs, dtype=torch.float64)
    got = rope(x, theta=100.0, start=start)
    for p in range(length):
        for i in range(pairs):
            angle = (start + p) * 100 ** (-2 * i / (2 * pairs))
            turn = complex(math.cos(angle), math.sin(angle))
            for b in range(2):
                want = complex(x[b, p, i], x[b, p, i + pairs]) * turn
                have = complex(got[b, p, i], got[b, p, i + pairs])
                assert abs(have - want) < 1e-9


@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 5000))
def test_rope_makes_products_depend_on_distance_alone(a, b, shift):
    torch.manual_seed(a)
    q, k = torch.randn(2, 1, 8, dtype=torch.float64)

    def product(m, n):
        return (rope(q, start=m) * rope(k, start=n)).sum()

    torch.testing.assert_close(product(a, b), product(a + shift, b + shift))


def test_rope_is_computed_in_float32_or_better():
    x = torch.ones(301, 2)
    want = rope(x.double()).to(torch.bfloat16)
    assert torch.equal(
        rope(x.bfloat16()), want
    )  # in bfloat16, 300 and 301 are the same position


def test_rope_refuses_an_odd_size(unchecked_shapes):
    with pytest.raises(ValueError, match="must be even, got 3"):
        rope(torch.randn(2, 3))


# --- Attention ---------------------------------------------------------------


def _attention_written_out(q, k, v, sinks):
    batch, heads, length, size = q.shape
    y = torch.zeros(batch, heads, length, v.shape[-1], dtype=q.dtype)
    for b in range(batch):
        for h in range(heads):
            mine = h // (heads // k.shape[1])  # neighbours share a key head
            for t in range(length):
                logits = [q[b, h, t] @ k[b, mine, s] / size**0.5 for s in range(t + 1)]
                if sinks is not None:
                    logits.append(sinks[h])
                weights = torch.stack(logits).softmax(0)[: t + 1]
                y[b, h, t] = weights @ v[b, mine, : t + 1]
    return y


@settings(max_examples=30)
@given(
    st.integers(1, 2),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(1, 5),
    st.booleans(),
)
def test_attention_equals_its_formula(batch, kv_heads, groups, length, sinks):
    torch.manual_seed(length)
    heads = kv_heads * groups
    q = torch.randn(batch, heads, length, 4, dtype=torch.float64)
    k = torch.randn(batch, kv_heads, length, 4, dtype=torch.float64)
    v = torch.randn(batch, kv_heads, length, 3, dtype=torch.float64)
    sink = torch.randn(heads, dtype=torch.float64) if sinks else None
    torch.testing.assert_close(
        causal_attention(q, k, v, sink), _attention_written_out(q, k, v, sink)
    )


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_no_token_sees_the_future(attention):
    spec = _spec(attention)
    model = _model(spec)
    ids = _ids(spec, 2, 7)
    before = model(ids)[0]
    for place in range(7):
        changed = ids.clone()
        changed[0, place] = (ids[0, place] + 1) % spec.vocab
        after = model(changed)[0]
        torch.testing.assert_close(
            after[0, :place], before[0, :place], rtol=1e-10, atol=1e-10
        )
        torch.testing.assert_close(after[1], before[1], rtol=1e-10, atol=1e-10)
        different = (after[0, place:] - before[0, place:]).abs().amax(dim=-1)
        assert (different > 1e-8).all()  # and every later token sees it


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_token_mask_ends_a_sequence(attention):
    spec = _spec(attention)
    model = _model(spec, capacity_factor=1.0)
    ids = _ids(spec, 2, 6)
    mask = torch.tensor([[True] * 4 + [False] * 2] * 2)
    short, _ = model(ids[:, :4])
    torch.testing.assert_close(model(ids, mask)[0][:, :4], short)


# --- Blocks ------------------------------------------------------------------


@pytest.mark.parametrize("norms", [2, 4])
def test_a_block_is_two_residual_steps(norms):
    torch.manual_seed(0)
    block = DecoderBlock(6, nn.Linear(6, 6), SwiGLU(6, 5), norms).double()
    for weight in block.parameters():
        nn.init.normal_(weight)

    def norm(x, layer):
        x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return x * layer.weight

    x = torch.randn(2, 3, 6, dtype=torch.float64)
    a = block.attention(norm(x, block.attention_norm))
    a = norm(a, block.attention_out_norm) if norms == 4 else a
    f = block.ffn(norm(x + a, block.ffn_norm))
    f = norm(f, block.ffn_out_norm) if norms == 4 else f
    y, routing = block(x)
    torch.testing.assert_close(y, x + a + f)
    assert routing is None


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_every_weight_learns(attention):
    spec = _spec(attention, norms_per_layer=4)
    model = _model(spec)
    ids = _ids(spec, 4, 9)
    logits = model(ids)[0]
    nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    ).backward()
    idle = [
        name
        for name, p in model.named_parameters()
        if p.grad is None or not p.grad.any()
    ]
    assert idle == []


@pytest.mark.parametrize("dispatch", ["dense", "loop", "einsum"])
def test_the_dispatch_makes_no_difference(dispatch):
    spec = _spec()
    ids = _ids(spec, 2, 5)
    torch.testing.assert_close(
        _model(spec, dispatch=dispatch)(ids)[0], _model(spec)(ids)[0]
    )


def test_token_ids_reach_a_router_that_hashes_them():
    table = hash_table(11, 4, 2)
    ids = _ids(_spec(), 2, 5)
    routing = Transformer(_spec(), hashed, table=table)(ids)[1][0]
    want = table[ids.flatten()].sort().values
    assert torch.equal(routing.expert_ids.sort().values, want)


def test_the_model_runs_in_bfloat16():
    model = Transformer(_spec()).bfloat16()
    logits, routings = model(_ids(model.spec, 2, 5))
    assert logits.dtype == torch.bfloat16
    assert routings[0].logits.dtype == torch.float32


# --- Production --------------------------------------------------------------

TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 29,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 6,
    "kv_lora_rank": 5,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 7,
    "rope_interleave": False,
    "rms_norm_eps": 1e-6,  # the one value that the norms on the latents know
}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
FAMILIES = {
    "Llama": ({"intermediate_size": 24}, renormalised, {}),
    "Mixtral": (
        {"intermediate_size": 12, "num_local_experts": 5, "sliding_window": None},
        renormalised,
        {},
    ),
    "Qwen3Moe": (
        EXPERTS | {"intermediate_size": 24, "head_dim": 6, "mlp_only_layers": [0]},
        softmax_top_k,
        {},
    ),
    "Qwen2Moe": (
        EXPERTS | {"shared_expert_intermediate_size": 20, "qkv_bias": True},
        softmax_top_k,
        {},
    ),
    "Olmoe": (
        {"intermediate_size": 12, "num_experts": 5, "num_experts_per_tok": 2},
        softmax_top_k,
        {},
    ),
    "DeepseekV3": (
        LATENT
        | {"intermediate_size": 24, "moe_intermediate_size": 12, "n_routed_experts": 6}
        | {"num_experts_per_tok": 2, "n_shared_experts": 2, "first_k_dense_replace": 1}
        | {"n_group": 3, "topk_group": 2, "routed_scaling_factor": 1.5},
        sigmoid_top_k,
        {"scale": 1.5, "groups": Groups(3, 2, best=2)},
    ),
}
NAMES = [
    (r"^model\.", ""),
    (r"embed_tokens", "embedding"),
    (r"layers\.", "blocks."),
    (r"lm_head", "head"),
    (r"self_attn\.", "attention."),
    (r"q_a_proj", "q_down"),
    (r"q_a_layernorm", "q_norm"),
    (r"q_b_proj", "q_up"),
    (r"kv_a_proj_with_mqa", "kv_down"),
    (r"kv_a_layernorm", "kv_norm"),
    (r"kv_b_proj", "kv_up"),
    (r"\bo_proj", "out"),
    (r"input_layernorm", "attention_norm"),
    (r"post_attention_layernorm", "ffn_norm"),
    (r"mlp\.gate\.e_score_correction_bias", "ffn.router.correction"),
    (r"mlp\.gate\.weight", "ffn.router.weight"),
    (r"shared_experts?\.", "shared."),
    (r"experts\.gate_up_proj", "experts.w_up"),
    (r"experts\.down_proj", "experts.w_down"),
    (r"shared_expert_gate", "shared_gate"),
    (r"mlp\.", "ffn."),
    (r"_proj", ""),
]


def _renamed(name):
    for pattern, ours in NAMES:
        name = re.sub(pattern, ours, name)
    return name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_logits_equal_those_of_production_models(family, tied):
    transformers = pytest.importorskip("transformers")
    options, gate, router_options = FAMILIES[family]
    config = getattr(transformers, f"{family}Config")(
        **TINY | options, tie_word_embeddings=tied
    )
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, weight in theirs.state_dict().items():
        nn.init.normal_(weight, std=0.3)
        assert "inv_freq" not in name

    spec = ModelSpec.from_hf_config(options | config.to_dict(), family)
    theta = config.rope_parameters["rope_theta"]
    ours = Transformer(
        spec, gate, rope_theta=theta, norm_eps=config.rms_norm_eps, **router_options
    )
    state = {_renamed(name): value for name, value in theirs.state_dict().items()}
    ours.load_state_dict(state)  # strict: every weight has its place

    ids = _ids(spec, 2, 9)
    logits, routings = ours(ids)
    want = theirs(ids)
    torch.testing.assert_close(logits, want.logits, rtol=1e-5, atol=1e-5)
    assert want.logits.std() > 0.1
    assert len(routings) == len(spec.moe_layers)
    for model, out in ((ours, logits), (theirs, want.logits)):
        model.zero_grad()
        out.square().mean().backward()
    grads = dict(ours.named_parameters())
    for name, weight in theirs.named_parameters():
        torch.testing.assert_close(
            grads[_renamed(name)].grad,
            weight.grad,
            rtol=1e-4,
            atol=1e-5,
            msg=lambda m, name=name: f"{name}: {m}",
        )
