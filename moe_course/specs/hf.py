"""Read the `config.json` of published models into the fields of a `ModelSpec`.

Families: llama, mistral, mixtral, qwen2_moe, qwen3, qwen3_moe, olmoe, deepseek_v2, deepseek_v3, gpt_oss, llama4,
dbrx, kimi_k2. One small function each. The rules (which bias exists, which layer is sparse) are those of the model
classes in `transformers`; tests/test_parity.py holds them to the last parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from moe_course.specs.model import FFN, GQA, MLA, MOST_LAYERS, RoutedExperts

_REQUIRED = object()


class _Config:
    """A config.json whose missing keys are named in the error."""

    def __init__(self, raw: Mapping[str, Any], path: str = "") -> None:
        self.raw, self.path = raw, path

    def __call__(self, key: str, default: Any = _REQUIRED) -> Any:
        value = self.raw.get(key)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise ValueError(
                f"config.json of model_type {self.raw.get('model_type', self.path)!r} lacks the key "
                f"'{self.path}{key}', which fixes the parameter count: add it as the model's authors publish it"
            )
        return default

    def nullable(self, key: str) -> Any:
        """A key that must be there, though its value may be null: leaving it out means a default elsewhere."""
        return None if self.raw.get(key, _REQUIRED) is None else self(key)

    def size(self, key: str, default: Any = _REQUIRED) -> int:
        """A positive integer, where its value is computed with before a ModelSpec can check it."""
        value = self(key, default)
        if type(value) is not int or value < 1:
            raise ValueError(
                f"'{self.path}{key}' must be an integer of at least 1, got {value!r}"
            )
        return value

    def depth(self) -> int:
        """The number of layers, where they are gone through one by one before a ModelSpec can refuse too many."""
        layers = self.size("num_hidden_layers")
        if layers > MOST_LAYERS:
            raise ValueError(
                f"'{self.path}num_hidden_layers' must be at most {MOST_LAYERS}, got {layers}"
            )
        return layers

    def part(self, key: str) -> _Config:
        value = self(key)
        if not isinstance(value, Mapping):
            raise ValueError(
                f"'{self.path}{key}' must be an object with the sizes of that part, got {value!r}"
            )
        return _Config(value, f"{self.path}{key}.")


def _common(c: _Config) -> dict[str, Any]:
    return {
        "layers": c("num_hidden_layers"),
        "width": c("hidden_size"),
        "vocab": c("vocab_size"),
        "tied_embeddings": c("tie_word_embeddings", False),
    }


def _head_dim(c: _Config) -> int:
    width, heads = c.size("hidden_size"), c.size("num_attention_heads")
    return c.size("head_dim", width // heads)


def _gqa(c: _Config, kv_default: Any = _REQUIRED, **options: Any) -> GQA:
    return GQA(
        heads=c("num_attention_heads"),
        kv_heads=c("num_key_value_heads", kv_default),
        head_dim=_head_dim(c),
        **options,
    )


def _llama(c: _Config) -> dict[str, Any]:
    bias = c("attention_bias", False)
    heads = c("num_attention_heads")
    return _common(c) | {
        "attention": _gqa(c, kv_default=heads, qkv_bias=bias, out_bias=bias),
        "ffn": FFN(c("intermediate_size"), bias=c("mlp_bias", False)),
    }


def _mistral(c: _Config) -> dict[str, Any]:
    return _common(c) | {"attention": _gqa(c), "ffn": FFN(c("intermediate_size"))}


def _mixtral(c: _Config) -> dict[str, Any]:
    experts = RoutedExperts(
        c("num_local_experts"), c("num_experts_per_tok"), FFN(c("intermediate_size"))
    )
    return _common(c) | {"attention": _gqa(c), "moe": experts}


def _qwen_layers(c: _Config) -> dict[str, Any]:
    return {
        "ffn": FFN(c("intermediate_size")),
        "moe_every": c("decoder_sparse_step", 1),
        "dense_layers": tuple(c("mlp_only_layers", ())),
    }


def _qwen2_moe(c: _Config) -> dict[str, Any]:
    experts = RoutedExperts(
        c("num_experts"),
        c("num_experts_per_tok"),
        FFN(c("moe_intermediate_size")),
        shared=FFN(c("shared_expert_intermediate_size")),
        shared_gate=True,
    )
    attention = _gqa(c, qkv_bias=c("qkv_bias", True))
    return _common(c) | _qwen_layers(c) | {"attention": attention, "moe": experts}


def _qwen3_attention(c: _Config) -> GQA:
    c("head_dim")  # not hidden_size / heads in this family: it must be given
    bias = c("attention_bias", False)
    return _gqa(c, qkv_bias=bias, out_bias=bias, qk_norm="head")


def _qwen3(c: _Config) -> dict[str, Any]:
    return _common(c) | {
        "attention": _qwen3_attention(c),
        "ffn": FFN(c("intermediate_size")),
    }


def _qwen3_moe(c: _Config) -> dict[str, Any]:
    experts = RoutedExperts(
        c("num_experts"), c("num_experts_per_tok"), FFN(c("moe_intermediate_size"))
    )
    return (
        _common(c)
        | _qwen_layers(c)
        | {"attention": _qwen3_attention(c), "moe": experts}
    )


def _olmoe(c: _Config) -> dict[str, Any]:
    bias = c("attention_bias", False)
    return _common(c) | {
        "attention": _gqa(
            c,
            kv_default=c("num_attention_heads"),
            qkv_bias=bias,
            out_bias=bias,
            qk_norm="full",
        ),
        "moe": RoutedExperts(
            c("num_experts"), c("num_experts_per_tok"), FFN(c("intermediate_size"))
        ),
    }


def _deepseek(c: _Config, router_bias: bool, mlp_bias: Any = False) -> dict[str, Any]:
    expert_hidden = c.size("moe_intermediate_size")
    shared = c.size("n_shared_experts") if c.nullable("n_shared_experts") else 0
    every, layers = c.size("moe_layer_freq", 1), c.depth()
    return _common(c) | {
        "attention": MLA(
            heads=c("num_attention_heads"),
            q_rank=c.nullable("q_lora_rank"),
            kv_rank=c("kv_lora_rank"),
            nope_dim=c("qk_nope_head_dim"),
            rope_dim=c("qk_rope_head_dim"),
            v_dim=c("v_head_dim"),
            bias=c("attention_bias", False),
        ),
        "ffn": FFN(c("intermediate_size"), bias=mlp_bias),
        "moe": RoutedExperts(
            c("n_routed_experts"),
            c("num_experts_per_tok"),
            FFN(expert_hidden),
            # Several shared experts are stored as one FFN of their summed width.
            shared=FFN(shared * expert_hidden, bias=mlp_bias) if shared else None,
            router_bias=router_bias,
        ),
        "first_dense": c("first_k_dense_replace"),
        # DeepSeek's own code asks i mod moe_layer_freq = 0, other families (i + 1) mod n = 0.
        "dense_layers": tuple(i for i in range(layers) if every > 1 and i % every),
    }


def _deepseek_v2(c: _Config) -> dict[str, Any]:
    return _deepseek(
        c, router_bias=False, mlp_bias=c("mlp_bias", False)
    )  # version 3 has no such key


def _deepseek_v3(c: _Config) -> dict[str, Any]:
    # e_score_correction_bias: one stored number per expert that only load balancing writes.
    return _deepseek(c, router_bias=c("topk_method", "noaux_tc") == "noaux_tc")


def _gpt_oss(c: _Config) -> dict[str, Any]:
    c("head_dim")  # 64 beside a width of 2880 and 64 heads: not hidden_size / heads
    bias = c("attention_bias", True)
    return _common(c) | {
        "attention": _gqa(c, qkv_bias=bias, out_bias=bias, sinks=True),
        "moe": RoutedExperts(
            c("num_local_experts"),
            c("num_experts_per_tok"),
            FFN(c("intermediate_size"), bias=True),
            router_bias=True,
        ),
    }


def _llama4_text(c: _Config) -> dict[str, Any]:
    c("head_dim")  # 128 where nothing else is said, not hidden_size / heads
    bias = c("attention_bias", False)
    layers, hidden = c.depth(), c("intermediate_size")
    sparse = c("moe_layers", None)
    if sparse is None:
        every = c.size("interleave_moe_layer_step")
        sparse = range(every - 1, layers, every)
    elif any(type(i) is not int for i in sparse):
        raise ValueError(
            f"'{c.path}moe_layers' must hold layer indices, got {sparse!r}"
        )
    return _common(c) | {
        "attention": _gqa(
            c, qkv_bias=bias, out_bias=bias
        ),  # its QK norm has no weights
        "ffn": FFN(c("intermediate_size_mlp")),
        "moe": RoutedExperts(
            c("num_local_experts"),
            c("num_experts_per_tok"),
            FFN(hidden),
            shared=FFN(hidden),
        ),
        "dense_layers": tuple(sorted(set(range(layers)) - set(sparse))),
    }


def _llama4(c: _Config) -> dict[str, Any]:
    return _llama4_text(c.part("text_config"))


def _dbrx(c: _Config) -> dict[str, Any]:
    attention, ffn = c.part("attn_config"), c.part("ffn_config")
    width, heads = c.size("d_model"), c.size("n_heads")
    return {
        "layers": c("n_layers"),
        "width": width,
        "vocab": c("vocab_size"),
        "tied_embeddings": c("tie_word_embeddings", False),
        "attention": GQA(heads, attention("kv_n_heads"), width // heads),
        "moe": RoutedExperts(
            ffn("moe_num_experts"), ffn("moe_top_k"), FFN(ffn("ffn_hidden_size"))
        ),
    }


_FAMILIES: dict[str, Callable[[_Config], dict[str, Any]]] = {
    "dbrx": _dbrx,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
    "gpt_oss": _gpt_oss,
    "kimi_k2": _deepseek_v3,
    "llama": _llama,
    "llama4": _llama4,
    "llama4_text": _llama4_text,
    "mistral": _mistral,
    "mixtral": _mixtral,
    "olmoe": _olmoe,
    "qwen2_moe": _qwen2_moe,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
}


def read_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a ModelSpec (all but its name) from a published config.json."""
    if not isinstance(config, Mapping):
        raise ValueError(f"a config.json holds one object, got {type(config).__name__}")
    family = config.get("model_type")
    if not isinstance(family, str) or family not in _FAMILIES:
        known = ", ".join(sorted(_FAMILIES))
        raise ValueError(
            f"unknown model_type {family!r}: the families read here are {known}; "
            "describe another one with ModelSpec(...) directly"
        )
    try:
        return _FAMILIES[family](_Config(config))
    except (TypeError, ZeroDivisionError) as error:
        raise ValueError(
            f"config.json of model_type {family!r} has a value of the wrong type: {error}"
        ) from error
