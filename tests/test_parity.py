"""Counts against the model classes of `transformers`, built from the same configuration on the meta device.

Multi-token-prediction modules and vision towers are outside a ModelSpec, and outside these classes.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from moe_course.specs import ModelSpec, zoo
from moe_course.specs.zoo import hf_configs

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

Config = dict[str, Any]


def _real_model(config: Config) -> Any:
    keys = dict(config)
    family = keys.pop("model_type")
    if family == "kimi_k2":
        family = "deepseek_v3"  # the same architecture; transformers has no class of its own for it
    if family == "dbrx":
        # No weight depends on it, but the attention of this version reads it without a default.
        keys["attn_config"] = {"rope_theta": 5e5, **keys["attn_config"]}
    real = transformers.AutoConfig.for_model(family, **keys)
    for key in ("num_mtp_layers", "num_nextn_predict_layers"):
        if hasattr(real, key):
            setattr(real, key, 0)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(real)


def _component(name: str) -> str:
    """Which component of ModelSpec.breakdown() a parameter of these classes belongs to."""
    parts = name.split(".")
    if "embed_tokens" in parts or "wte" in parts:
        return "input_embedding"
    if "lm_head" in parts:
        return "output_head"
    if "self_attn" in parts or "attn" in parts:
        return "attention"
    if {"shared_expert", "shared_experts", "shared_expert_gate"} & set(parts):
        return "shared"
    if "experts" in parts:
        return "experts"
    if "gate" in parts or "router" in parts:
        return "router"
    if any("norm" in part for part in parts[-2:]):
        return "norms"
    assert {"mlp", "feed_forward"} & set(parts), f"{name} is in no component"
    return "dense_ffn"


def _real_counts(config: Config) -> dict[str, int]:
    model = _real_model(config)
    # DeepSeek-V3 stores the balancing bias of its router as a buffer; tied weights are listed once.
    stored = [*model.named_parameters()]
    stored += [
        item
        for item in model.named_buffers()
        if item[0].endswith("e_score_correction_bias")
    ]
    counts: Counter[str] = Counter()
    for name, tensor in stored:
        counts[_component(name)] += tensor.numel()
    return counts


def _assert_same(config: Config, spec: ModelSpec) -> None:
    real = _real_counts(config)
    counted = {name: count.total for name, count in spec.breakdown().items()}
    assert counted == {name: real[name] for name in counted}
    assert spec.total_params() == real.total()


@pytest.mark.parametrize("name", hf_configs)
def test_zoo_counts_equal_the_real_class(name):
    _assert_same(hf_configs[name], zoo[name])


def _base(r: random.Random) -> Config:
    heads = r.choice([1, 2, 4, 6])
    return {
        "hidden_size": heads * r.randint(1, 6) * 2,
        "num_hidden_layers": r.randint(1, 5),
        "vocab_size": r.randint(3, 60),
        "num_attention_heads": heads,
        "tie_word_embeddings": r.random() < 0.5,
        "pad_token_id": None,  # some families' own default lies outside these small vocabularies
    }


def _grouped(r: random.Random, base: Config) -> Config:
    heads = base["num_attention_heads"]
    return {
        "num_key_value_heads": r.choice(
            [n for n in range(1, heads + 1) if heads % n == 0]
        )
    }


def _maybe(r: random.Random, **keys: Any) -> Config:
    """Each key half of the time; the other half its default holds."""
    return {key: value for key, value in keys.items() if r.random() < 0.5}


def _coin(r: random.Random) -> bool:
    return r.random() < 0.5


def _hidden(r: random.Random) -> int:
    return r.randint(1, 20)


def _llama(r: random.Random, base: Config) -> Config:
    options = _maybe(
        r,
        head_dim=2 * r.randint(1, 5),
        attention_bias=_coin(r),
        mlp_bias=_coin(r),
        **_grouped(r, base),
    )
    return options | {"intermediate_size": _hidden(r)}


def _mistral(r: random.Random, base: Config) -> Config:
    return (
        _grouped(r, base)
        | _maybe(r, head_dim=2 * r.randint(1, 5))
        | {"intermediate_size": _hidden(r)}
    )


def _experts(r: random.Random, key: str) -> Config:
    experts = r.randint(1, 6)
    return {key: experts, "num_experts_per_tok": r.randint(1, experts)}


def _mixtral(r: random.Random, base: Config) -> Config:
    return _mistral(r, base) | _experts(r, "num_local_experts")


def _some_layers(r: random.Random, base: Config) -> list[int]:
    return sorted(
        r.sample(
            range(base["num_hidden_layers"]), r.randint(0, base["num_hidden_layers"])
        )
    )


def _qwen_sparse(r: random.Random, base: Config) -> Config:
    optional = _maybe(
        r, decoder_sparse_step=r.randint(1, 4), mlp_only_layers=_some_layers(r, base)
    )
    sizes = {"intermediate_size": _hidden(r), "moe_intermediate_size": _hidden(r)}
    return sizes | optional | _experts(r, "num_experts") | _grouped(r, base)


def _qwen2_moe(r: random.Random, base: Config) -> Config:
    shared = {"shared_expert_intermediate_size": _hidden(r)}
    return (
        _qwen_sparse(r, base)
        | shared
        | _maybe(r, qkv_bias=_coin(r), head_dim=2 * r.randint(1, 5))
    )


def _qwen3(r: random.Random, base: Config) -> Config:
    sizes = {"head_dim": 2 * r.randint(1, 5), "intermediate_size": _hidden(r)}
    return sizes | _grouped(r, base) | _maybe(r, attention_bias=_coin(r))


def _qwen3_moe(r: random.Random, base: Config) -> Config:
    return (
        _qwen_sparse(r, base)
        | {"head_dim": 2 * r.randint(1, 5)}
        | _maybe(r, attention_bias=_coin(r))
    )


def _olmoe(r: random.Random, base: Config) -> Config:
    optional = _maybe(r, attention_bias=_coin(r), **_grouped(r, base))
    return optional | _experts(r, "num_experts") | {"intermediate_size": _hidden(r)}


def _deepseek(r: random.Random, base: Config) -> Config:
    return _experts(r, "n_routed_experts") | {
        "intermediate_size": _hidden(r),
        "moe_intermediate_size": _hidden(r),
        "n_shared_experts": r.randint(1, 3),
        "first_k_dense_replace": r.randint(0, base["num_hidden_layers"] + 1),
        "q_lora_rank": r.choice([None, r.randint(1, 9)]),
        "kv_lora_rank": r.randint(1, 9),
        "qk_nope_head_dim": r.randint(1, 9),
        "qk_rope_head_dim": 2 * r.randint(1, 4),
        "v_head_dim": r.randint(1, 9),
        **_maybe(
            r, attention_bias=_coin(r), mlp_bias=_coin(r)
        ),  # mlp_bias: a key of version 2 only
    }


def _gpt_oss(r: random.Random, base: Config) -> Config:
    sizes = {"head_dim": 2 * r.randint(1, 5), "intermediate_size": _hidden(r)}
    return (
        sizes
        | _grouped(r, base)
        | _experts(r, "num_local_experts")
        | _maybe(r, attention_bias=_coin(r))
    )


def _llama4_text(r: random.Random, base: Config) -> Config:
    return {
        "head_dim": 2 * r.randint(1, 5),
        "intermediate_size": _hidden(r),
        "intermediate_size_mlp": _hidden(r),
        "interleave_moe_layer_step": r.randint(1, 4),
        **_grouped(r, base),
        **_experts(r, "num_local_experts"),
        **_maybe(r, attention_bias=_coin(r), moe_layers=_some_layers(r, base)),
    }


def _dbrx(r: random.Random, base: Config) -> Config:
    renamed = {
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
    }
    for old, new in renamed.items():
        base[new] = base.pop(old)
    base["tie_word_embeddings"] = False  # the class refuses to tie
    experts = _experts(r, "moe_num_experts")
    return {
        "attn_config": {
            "kv_n_heads": r.choice([n for n in range(1, 7) if base["n_heads"] % n == 0])
        },
        "ffn_config": {
            "ffn_hidden_size": _hidden(r),
            "moe_num_experts": experts["moe_num_experts"],
            "moe_top_k": experts["num_experts_per_tok"],
        },
    }


FAMILIES: dict[str, Callable[[random.Random, Config], Config]] = {
    "dbrx": _dbrx,
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
    "gpt_oss": _gpt_oss,
    "kimi_k2": _deepseek,
    "llama": _llama,
    "llama4_text": _llama4_text,
    "mistral": _mistral,
    "mixtral": _mixtral,
    "olmoe": _olmoe,
    "qwen2_moe": _qwen2_moe,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_random_small_models_equal_the_real_class(family):
    r = random.Random(family)
    for _ in range(30):
        base = _base(r)
        config = FAMILIES[family](r, base) | base | {"model_type": family}
        try:
            _assert_same(config, ModelSpec.from_hf_config(config))
        except Exception as error:
            error.add_note(f"configuration: {config}")
            raise


def test_every_family_that_is_read_is_compared():
    with pytest.raises(ValueError, match="the families read here are") as caught:
        ModelSpec.from_hf_config({"model_type": "?"})
    named = str(caught.value).partition("are ")[2].partition(";")[0].split(", ")
    assert set(named) == set(FAMILIES) | {
        "llama4"
    }  # llama4 wraps llama4_text: test_hf_config.py


# The real class has a number of its own for each key; where the reader asks for the key instead, it names it.
@pytest.mark.parametrize("name", hf_configs)
def test_what_may_be_left_out_has_the_default_of_the_real_class(name):
    asked_for = []
    for key in set(hf_configs[name]) - {"model_type"}:
        config = {k: v for k, v in hf_configs[name].items() if k != key}
        try:
            spec = ModelSpec.from_hf_config(config)
        except ValueError as error:
            asked_for.append(key)
            message = str(error)
        else:
            _assert_same(config, spec)
            continue
        assert f"lacks the key '{key}'" in message
    assert {"vocab_size"} <= set(asked_for) < set(hf_configs[name]) - {"model_type"}
