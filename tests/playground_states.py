"""Random states of the playground, for CPython (test_playground.py) and for the page (test_book.py)."""

from __future__ import annotations

import json
import random

from moe_course.costs.playground import FIELDS
from moe_course.specs import accelerators, zoo

CONFIGS = [
    {
        "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
    {
        "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
        "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True,
    },
    {
        "model_type": "deepseek_v3", "hidden_size": 1024, "intermediate_size": 4096,
        "moe_intermediate_size": 512, "num_hidden_layers": 12, "first_k_dense_replace": 2,
        "num_attention_heads": 16, "q_lora_rank": 384, "kv_lora_rank": 256,
        "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64,
        "n_routed_experts": 64, "n_shared_experts": 1, "num_experts_per_tok": 6,
        "vocab_size": 50000,
    },
]  # fmt: skip


def model(rng: random.Random, prefix: str) -> dict[str, str]:
    """The fields of one model, with the choice itself under "" ."""
    kind = rng.choice(["zoo", "typed", "config"])
    if kind == "zoo":
        return {"": rng.choice(list(zoo))}
    if kind == "config":
        config = dict(rng.choice(CONFIGS))
        config["num_hidden_layers"] = rng.randint(4, 90)
        indent = rng.choice([None, 2])
        return {"": "config", f"{prefix}config": json.dumps(config, indent=indent)}
    kv_heads = rng.randint(1, 16)
    experts = rng.choice([0, 1, rng.randint(2, 300)])
    shape = {
        "layers": rng.randint(1, 100),
        "width": rng.randint(1, 9000),
        "vocab": rng.randint(1, 200_000),
        "heads": kv_heads * rng.randint(1, 8),
        "kv_heads": kv_heads,
        "head_dim": rng.randint(1, 256),
        "experts": experts,
        "k": rng.randint(1, max(1, experts)),
        "hidden": rng.randint(1, 20_000),
        "shared": rng.randint(0, 3),
        "first_dense": rng.randint(0, 5),
        "dense_hidden": rng.randint(1, 60_000),
    }
    return {"": "typed"} | {f"{prefix}{name}": str(n) for name, n in shape.items()}


def states(seed: int, count: int) -> list[dict[str, str]]:
    """So many states without errors, all kinds of models, machines and loads among them."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        first, second = model(rng, ""), model(rng, "other_")
        state = {"model": first.pop(""), **first}
        if rng.random() < 0.8:
            state |= {"other": second.pop(""), **second}
        else:
            state["other"] = ""
        state["gpu"] = rng.choice([*accelerators, "typed"])
        if state["gpu"] == "typed":
            state |= {
                name: f"{rng.uniform(0.1, 3000):.3f}"
                for name in ("tflops", "tflops8", "bandwidth", "capacity", "link")
            }
        for name in ("weights", "experts_in", "cache"):
            state[name] = rng.choice(FIELDS[name].choices)[0]
        fast = state["gpu"] == "typed" or accelerators[state["gpu"]].fp8
        state["arithmetic"] = rng.choice(["16", "8"]) if fast else "16"
        state["gpus"] = str(rng.choice([1, 2, 8, rng.randint(1, 999)]))
        state["price"] = rng.choice(["0", "1", f"{rng.uniform(0.1, 20):.2f}"])
        state["busy"] = rng.choice(["100", f"{rng.uniform(1, 99):.1f}"])
        state["batch"] = str(rng.choice([1, 2**12, 65536, rng.randint(1, 3000)]))
        state["context"] = str(rng.choice([0, 1, 4096, rng.randint(1, 200_000)]))
        found.append(state)
    return found
