"""ModelSpec.from_hf_config on configurations that are incomplete or wrong. Right ones: test_zoo, test_parity."""

from __future__ import annotations

import pytest

from moe_course.specs import ModelSpec, zoo
from moe_course.specs.zoo import hf_configs

# Keys that may be absent, because model code derives them or its family has this default.
DERIVED = {
    "attention_bias", "decoder_sparse_step", "mlp_only_layers", "moe_layer_freq", "tie_word_embeddings",
    "topk_method",
}  # fmt: skip
# Null is a value of its own here: no query latent, no shared experts.
NULLABLE = {"q_lora_rank", "n_shared_experts"}

KEYS = [
    (name, key)
    for name, config in hf_configs.items()
    for key in config
    if key != "model_type"
]


def _without(config, key):
    return {k: v for k, v in config.items() if k != key}


@pytest.mark.parametrize(("name", "key"), KEYS)
def test_every_key_is_required_by_name_or_has_a_harmless_default(name, key):
    config = hf_configs[name]
    # Multi-head attention is what these families have where nothing else is said.
    derived = DERIVED | (
        {"num_key_value_heads"} if config["model_type"] in ("llama", "olmoe") else set()
    )
    if key in derived:
        short = ModelSpec.from_hf_config(_without(config, key), name)
        if key != "num_key_value_heads":
            assert short == zoo[name]
        else:
            assert short.attention.kv_heads == short.attention.heads
        return
    with pytest.raises(ValueError, match=f"lacks the key '{key}'"):
        ModelSpec.from_hf_config(_without(config, key))
    if key not in NULLABLE:
        with pytest.raises(ValueError, match=f"lacks the key '{key}'"):
            ModelSpec.from_hf_config({**config, key: None})


@pytest.mark.parametrize(
    ("name", "key"), [case for case in KEYS if case[1] != "topk_method"]
)
def test_a_value_of_the_wrong_type_is_refused(name, key):
    right = hf_configs[name][key]
    wrong = {
        bool: ["false", 1, []],
        int: ["7", 7.0, -7, [7], {"a": 1}],
        list: ["3", 3, [0.5], ["0"]],
        dict: ["no object", 3, []],
        type(None): ["7", 7.0, -7, [7]],
    }[type(right)]
    for value in wrong:
        with pytest.raises(ValueError, match=r"must|wrong type"):
            ModelSpec.from_hf_config({**hf_configs[name], key: value})


@pytest.mark.parametrize("name", ["llama-4-scout", "llama-4-maverick"])
def test_llama4_with_vision_is_read_by_its_text_part(name):
    text = hf_configs[name]
    assert (
        ModelSpec.from_hf_config({"model_type": "llama4", "text_config": text}, name)
        == zoo[name]
    )
    with pytest.raises(ValueError, match=r"lacks the key 'text_config\.hidden_size'"):
        ModelSpec.from_hf_config(
            {"model_type": "llama4", "text_config": _without(text, "hidden_size")}
        )
    with pytest.raises(ValueError, match="lacks the key 'text_config'"):
        ModelSpec.from_hf_config({"model_type": "llama4"})
    with pytest.raises(ValueError, match="'text_config' must be an object"):
        ModelSpec.from_hf_config({"model_type": "llama4", "text_config": [1]})


def test_llama4_layers_may_be_listed_instead_of_spaced():
    config = _without(hf_configs["llama-4-maverick"], "interleave_moe_layer_step")
    assert ModelSpec.from_hf_config({**config, "moe_layers": [3, 7]}).moe_layers == (
        3,
        7,
    )
    with pytest.raises(
        ValueError, match=r"'moe_layers' must hold layer indices, got \['0'\]"
    ):
        ModelSpec.from_hf_config({**config, "moe_layers": ["0"]})
    with pytest.raises(
        ValueError, match=r"'interleave_moe_layer_step' must be .*got 0"
    ):
        ModelSpec.from_hf_config({**config, "interleave_moe_layer_step": 0})


def test_deepseek_keys_that_transformers_does_not_have():
    config = {
        **hf_configs["deepseek-v3"],
        "num_hidden_layers": 9,
        "first_k_dense_replace": 3,
    }
    every_other = ModelSpec.from_hf_config({**config, "moe_layer_freq": 2})
    assert every_other.moe_layers == (4, 6, 8)
    assert every_other.moe.router_bias
    assert not ModelSpec.from_hf_config(
        {**config, "topk_method": "greedy"}
    ).moe.router_bias
    assert (
        ModelSpec.from_hf_config({**config, "n_shared_experts": None}).moe.shared
        is None
    )


@pytest.mark.parametrize("family", ["gpt2", "", None, 7, ["llama"]])
def test_an_unknown_family_is_named(family):
    with pytest.raises(
        ValueError, match=r"unknown model_type .*: the families read here are dbrx, "
    ) as caught:
        ModelSpec.from_hf_config({**hf_configs["mistral-7b"], "model_type": family})
    assert repr(family) in str(caught.value)


@pytest.mark.parametrize("config", [[], None, "config.json", 3])
def test_what_is_no_object_is_refused(config):
    with pytest.raises(
        ValueError, match=f"holds one object, got {type(config).__name__}"
    ):
        ModelSpec.from_hf_config(config)


def test_the_name_comes_from_the_caller_the_config_or_the_family():
    config = hf_configs["mistral-7b"]
    assert ModelSpec.from_hf_config(config, "mine").name == "mine"
    assert ModelSpec.from_hf_config({**config, "_name_or_path": "a/b"}).name == "a/b"
    assert ModelSpec.from_hf_config(config).name == "mistral"
