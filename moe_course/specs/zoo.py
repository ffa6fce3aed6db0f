"""Published models: their shapes, what their authors say of their size, and where both were read.

`zoo[name]` is a ModelSpec. Where the model is published with a `config.json` of a family that
`ModelSpec.from_hf_config` reads, the entry holds that configuration's own keys; the others are written as ModelSpecs
directly. Shapes of text models: vision towers and multi-token-prediction modules are left out.

Page: book/reference/zoo.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from moe_course.specs.model import FFN, GQA, ModelSpec, RoutedExperts


@dataclass(frozen=True)
class Published:
    """What the authors of a model print about its size, in billions of parameters, and where."""

    total: float | None
    active: float | None
    # The convention of the printed active figure, stated or the only one that fits; None
    # where it is too rounded to tell.
    active_includes_embedding: bool | None
    source: str
    shape_source: str
    verified: str  # of the shape: "primary", "third party", "partly" or "from memory"
    note: str = ""


_DEEPSEEK = {
    "attention_bias": False,
    "moe_layer_freq": 1,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "tie_word_embeddings": False,
}
_LLAMA_70B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
_LLAMA4 = {
    "model_type": "llama4_text",
    "attention_bias": False,
    "head_dim": 128,
    "hidden_size": 5120,
    "intermediate_size": 8192,  # of an expert; intermediate_size_mlp is that of a dense layer
    "intermediate_size_mlp": 16384,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "num_experts_per_tok": 1,
    "vocab_size": 202048,
    "tie_word_embeddings": False,
}
_QWEN3_MOE = {
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 4,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
}
_GPT_OSS = {
    "model_type": "gpt_oss",
    "attention_bias": True,
    "head_dim": 64,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "num_experts_per_tok": 4,
    "vocab_size": 201088,
    "tie_word_embeddings": False,
}
_MIXTRAL = {
    "model_type": "mixtral",
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}

# The keys of the published config.json that fix the shape.
hf_configs: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "mixtral-8x7b": _MIXTRAL
        | {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "vocab_size": 32000,
        },
        "mixtral-8x22b": _MIXTRAL
        | {
            "hidden_size": 6144,
            "intermediate_size": 16384,
            "num_hidden_layers": 56,
            "num_attention_heads": 48,
            "vocab_size": 32768,
        },
        "dbrx": {
            "model_type": "dbrx",
            "d_model": 6144,
            "n_heads": 48,
            "n_layers": 40,
            "vocab_size": 100352,
            "tie_word_embeddings": False,
            "attn_config": {"kv_n_heads": 8},
            "ffn_config": {
                "ffn_hidden_size": 10752,
                "moe_num_experts": 16,
                "moe_top_k": 4,
            },
        },
        "deepseek-v2": _DEEPSEEK
        | {
            "model_type": "deepseek_v2",
            "hidden_size": 5120,
            "intermediate_size": 12288,
            "moe_intermediate_size": 1536,
            "num_hidden_layers": 60,
            "first_k_dense_replace": 1,
            "num_attention_heads": 128,
            "n_routed_experts": 160,
            "n_shared_experts": 2,
            "num_experts_per_tok": 6,
            "q_lora_rank": 1536,
            "vocab_size": 102400,
        },
        "deepseek-v2-lite": _DEEPSEEK
        | {
            "model_type": "deepseek_v2",
            "hidden_size": 2048,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "num_hidden_layers": 27,
            "first_k_dense_replace": 1,
            "num_attention_heads": 16,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "num_experts_per_tok": 6,
            "q_lora_rank": None,
            "vocab_size": 102400,
        },
        "deepseek-v3": _DEEPSEEK
        | {
            "model_type": "deepseek_v3",
            "hidden_size": 7168,
            "intermediate_size": 18432,
            "moe_intermediate_size": 2048,
            "num_hidden_layers": 61,
            "first_k_dense_replace": 3,
            "num_attention_heads": 128,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "q_lora_rank": 1536,
            "topk_method": "noaux_tc",
            "vocab_size": 129280,
        },
        "kimi-k2": _DEEPSEEK
        | {
            "model_type": "kimi_k2",
            "hidden_size": 7168,
            "intermediate_size": 18432,
            "moe_intermediate_size": 2048,
            "num_hidden_layers": 61,
            "first_k_dense_replace": 1,
            "num_attention_heads": 64,
            "n_routed_experts": 384,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "q_lora_rank": 1536,
            "topk_method": "noaux_tc",
            "vocab_size": 163840,
        },
        "qwen1.5-moe-a2.7b": {
            "model_type": "qwen2_moe",
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "decoder_sparse_step": 1,
            "vocab_size": 151936,
            "tie_word_embeddings": False,
        },
        "qwen3-30b-a3b": _QWEN3_MOE
        | {
            "hidden_size": 2048,
            "intermediate_size": 6144,  # of a dense layer, of which there is none
            "moe_intermediate_size": 768,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
        },
        "qwen3-235b-a22b": _QWEN3_MOE
        | {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "moe_intermediate_size": 1536,
            "num_hidden_layers": 94,
            "num_attention_heads": 64,
        },
        "olmoe-1b-7b": {
            "model_type": "olmoe",
            "attention_bias": False,
            "hidden_size": 2048,
            "intermediate_size": 1024,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "vocab_size": 50304,
            "tie_word_embeddings": False,
        },
        "gpt-oss-20b": _GPT_OSS | {"num_hidden_layers": 24, "num_local_experts": 32},
        "gpt-oss-120b": _GPT_OSS | {"num_hidden_layers": 36, "num_local_experts": 128},
        "llama-4-scout": _LLAMA4
        | {"num_local_experts": 16, "interleave_moe_layer_step": 1},
        "llama-4-maverick": _LLAMA4
        | {"num_local_experts": 128, "interleave_moe_layer_step": 2},
        "llama-2-70b": _LLAMA_70B | {"vocab_size": 32000},
        "llama-3.1-70b": _LLAMA_70B | {"vocab_size": 128256},
        "llama-3.1-8b": {
            "model_type": "llama",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "tie_word_embeddings": False,
        },
        "mistral-7b": {
            "model_type": "mistral",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 32000,
            "tie_word_embeddings": False,
        },
        "qwen3-8b": {
            "model_type": "qwen3",
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "attention_bias": False,
            "tie_word_embeddings": False,
        },
    }
)

_WITHOUT_HF_CONFIG = (
    ModelSpec(
        name="deepseekmoe-16b",
        layers=28,
        width=2048,
        vocab=102400,
        attention=GQA(heads=16, kv_heads=16, head_dim=128),
        ffn=FFN(10944),
        moe=RoutedExperts(experts=64, k=6, expert=FFN(1408), shared=FFN(2 * 1408)),
        first_dense=1,
    ),
    ModelSpec(
        name="grok-1",
        layers=64,
        width=6144,
        vocab=131072,
        attention=GQA(heads=48, kv_heads=8, head_dim=128),
        moe=RoutedExperts(experts=8, k=2, expert=FFN(32768)),
        norms_per_layer=4,
        tied_embeddings=True,
    ),
    ModelSpec(
        name="glam-64b-64e",
        layers=64,
        width=8192,
        vocab=256000,
        attention=GQA(heads=128, kv_heads=128, head_dim=128),
        ffn=FFN(32768),  # dense layers are gated, experts are not
        moe=RoutedExperts(experts=64, k=2, expert=FFN(32768, gated=False)),
        moe_every=2,
        tied_embeddings=True,
    ),
)

zoo: Mapping[str, ModelSpec] = MappingProxyType(
    {
        name: ModelSpec.from_hf_config(config, name)
        for name, config in hf_configs.items()
    }
    | {spec.name: spec for spec in _WITHOUT_HF_CONFIG}
)

_PRIMARY, _THIRD = "primary", "third party"

published: Mapping[str, Published] = MappingProxyType(
    {
        "mixtral-8x7b": Published(
            46.7,
            12.9,
            True,
            "mistral.ai/news/mixtral-of-experts (December 2023); the paper, arXiv:2401.04088, prints 47B and 13B",
            "config.json of Mixtral-8x7B-Instruct-v0.1; arXiv:2401.04088, Table 1",
            _PRIMARY,
        ),
        "mixtral-8x22b": Published(
            141,
            39,
            None,
            "mistral.ai/news/mixtral-8x22b",
            "Lightning-AI/litgpt litgpt/config.py; maxtext mixtral-8x22b.yml",
            _THIRD,
            "the first upload had a vocabulary of 32,000",
        ),
        "dbrx": Published(
            132,
            36,
            None,
            "databricks/dbrx README",
            "databricks/dbrx model/config.json and modeling_dbrx.py",
            _PRIMARY,
        ),
        "deepseek-v2": Published(
            236,
            21,
            None,
            "DeepSeek-V2 report, arXiv:2405.04434, section 3.1.2",
            "deepseek-ai/DeepSeek-V3 inference/configs/config_236B.json",
            _PRIMARY,
        ),
        "deepseek-v2-lite": Published(
            15.7,
            2.4,
            False,
            "arXiv:2405.04434, appendix B.1",
            "deepseek-ai/DeepSeek-V3 inference/configs/config_16B.json",
            _PRIMARY,
        ),
        "deepseek-v3": Published(
            671,
            37,
            None,
            "deepseek-ai/DeepSeek-V3 README",
            "deepseek-ai/DeepSeek-V3 inference/configs/config_671B.json",
            _PRIMARY,
            "README_WEIGHTS.md prints 36.7B active 'including' both embedding matrices; the shape gives 37.55B "
            "with both and 36.63B without the input embedding. The 14B multi-token-prediction module is left out",
        ),
        "kimi-k2": Published(
            1040,
            32.6,
            None,
            "Kimi K2 report, arXiv:2507.20534, Table 2; the README prints 1T and 32B",
            "MoonshotAI/Kimi-K2 README; latent ranks and dense width from maxtext kimi-k2-1t.yml",
            "partly",
            "the released checkpoint holds 1,026,408,232,448 weights: the printed total is the looser figure",
        ),
        "qwen1.5-moe-a2.7b": Published(
            14.3,
            2.7,
            True,
            "model card of Qwen1.5-MoE-A2.7B",
            "copies of its config.json; query, key and value biases and the shared expert's gate are in the model code",
            _THIRD,
        ),
        "qwen3-30b-a3b": Published(
            30.5,
            3.3,
            True,
            "model card of Qwen3-30B-A3B",
            "Qwen3 report, arXiv:2505.09388, Table 2; widths from maxtext's copy of config.json",
            "partly",
        ),
        "qwen3-235b-a22b": Published(
            235,
            22,
            None,
            "model card of Qwen3-235B-A22B; arXiv:2505.09388, Table 3",
            "arXiv:2505.09388, Table 2; widths from maxtext's copy of config.json",
            "partly",
        ),
        "olmoe-1b-7b": Published(
            6.9,
            1.3,
            True,
            "allenai/OLMoE README; arXiv:2409.02060",
            "allenai/OLMoE configs/OLMoE-1B-7B-0924.yml; config.json of the SFT model",
            _PRIMARY,
        ),
        "gpt-oss-20b": Published(
            20.91,
            3.61,
            False,
            "gpt-oss model card, arXiv:2508.10925, Table 1",
            "openai/gpt-oss gpt_oss/torch/model.py; maxtext's copy of config.json",
            "partly",
        ),
        "gpt-oss-120b": Published(
            116.83,
            5.13,
            False,
            "gpt-oss model card, arXiv:2508.10925, Table 1",
            "openai/gpt-oss gpt_oss/torch/model.py",
            _PRIMARY,
        ),
        "llama-4-scout": Published(
            109,
            17,
            True,
            "meta-llama/llama-models models/llama4/MODEL_CARD.md, vision encoder included",
            "llama-models models/llama4 (structure); sizes from copies of config.json",
            _THIRD,
            "text model only: the vision part has 871,932,416 weights more",
        ),
        "llama-4-maverick": Published(
            400,
            17,
            True,
            "meta-llama/llama-models models/llama4/MODEL_CARD.md, vision encoder included",
            "llama-models models/llama4 (structure); sizes from copies of config.json",
            _THIRD,
            "text model only: the vision part has 871,932,416 weights more",
        ),
        "llama-2-70b": Published(
            70,
            None,
            None,
            "llama-models models/llama2/MODEL_CARD.md",
            "Lightning-AI/litgpt litgpt/config.py; maxtext llama2-70b.yml",
            _THIRD,
            "70B is a name: the weights are 69.0 billion",
        ),
        "llama-3.1-70b": Published(
            70,
            None,
            None,
            "llama-models models/llama3_1/MODEL_CARD.md",
            "Lightning-AI/litgpt litgpt/config.py; maxtext's copy of config.json",
            _THIRD,
        ),
        "llama-3.1-8b": Published(
            8,
            None,
            None,
            "llama-models models/llama3_1/MODEL_CARD.md",
            "Lightning-AI/litgpt litgpt/config.py; maxtext's copy of config.json",
            _THIRD,
        ),
        "mistral-7b": Published(
            7,
            None,
            True,
            "its name; arXiv:2310.06825",
            "Lightning-AI/litgpt litgpt/config.py",
            _THIRD,
        ),
        "qwen3-8b": Published(
            8,
            None,
            None,
            "its name; arXiv:2505.09388",
            "arXiv:2505.09388, Table 1; widths from maxtext's copy of config.json",
            "partly",
        ),
        "deepseekmoe-16b": Published(
            16.4,
            2.8,
            True,
            "arXiv:2401.06066, section 5.1.2",
            "arXiv:2401.06066, section 5.1.2 and Table 7; copies of its config.json",
            _THIRD,
        ),
        "grok-1": Published(
            314,
            None,
            True,
            "xai-org/grok-1 README; x.ai/blog/grok-os says 25 % of the weights are active",
            "xai-org/grok-1 run.py and model.py",
            _PRIMARY,
            "314B is the count without the embedding matrix (314.88 billion), cut off",
        ),
        "glam-64b-64e": Published(
            1200,
            96.6,
            True,
            "GLaM, arXiv:2112.06905, abstract (1.2T); 96.6B from a transcription of its table",
            "transcriptions of its Table 4",
            _THIRD,
            "tied embeddings are an assumption; 64 heads, as one third-party file has, would give 79.4B active",
        ),
    }
)
