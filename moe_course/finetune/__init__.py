"""Fine-tuning of sparse models: adapters on stacked experts, budgets, drift, what is trained, upcycling."""

from moe_course.costs.budget import (
    Budget,
    full_budget,
    lora_budget,
    lora_params,
    part_params,
    recipe_budget,
)
from moe_course.finetune.drift import (
    Drift,
    drift_of,
    relevant_experts,
    replayed_routes,
    router_drift,
    router_kl,
)
from moe_course.finetune.lora import (
    LoRAExpertAdapter,
    LoRALinear,
    LowRank,
    apply_lora_to_moe,
    count_trainable_params,
    from_peft,
    load_adapters,
    merge,
    save_adapters,
    to_peft,
    unmerge,
)
from moe_course.finetune.select import (
    parts_of,
    spare_idle_experts,
    train_experts,
    train_only,
)
from moe_course.finetune.upcycle import upcycle, upcycled_spec

__all__ = [
    "Budget",
    "Drift",
    "LoRAExpertAdapter",
    "LoRALinear",
    "LowRank",
    "apply_lora_to_moe",
    "count_trainable_params",
    "drift_of",
    "from_peft",
    "full_budget",
    "load_adapters",
    "lora_budget",
    "lora_params",
    "merge",
    "part_params",
    "parts_of",
    "recipe_budget",
    "relevant_experts",
    "replayed_routes",
    "router_drift",
    "router_kl",
    "save_adapters",
    "spare_idle_experts",
    "to_peft",
    "train_experts",
    "train_only",
    "unmerge",
    "upcycle",
    "upcycled_spec",
]
