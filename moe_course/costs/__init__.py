"""Costs in closed form, with the standard library alone: latency, memory, network, placement, training, scaling
laws.
"""

from moe_course.costs.latency import (
    Regimes,
    Speculation,
    Step,
    activation_traffic,
    attention_flops,
    crossovers,
    decode_step,
    offloaded_step,
    prefill,
    regimes,
    ridge_tokens,
    speculative,
    touched_weights,
)
from moe_course.costs.memory import (
    Precision,
    TrainingMemory,
    cache_bytes,
    cache_numbers_per_token,
    training_memory,
    weight_bytes,
)
from moe_course.costs.network import (
    Link,
    all_to_all_bytes,
    all_to_all_time,
    deduplicated_bytes,
    expected_distinct_ranks,
    flops_per_byte,
    overlapped,
    tensor_parallel_bytes,
)
from moe_course.costs.scaling import (
    CLARK,
    ClarkLaw,
    clark_loss,
    effective_parameters,
    krajewski_dense_loss,
    krajewski_loss,
)
from moe_course.costs.sources import (
    estimate_inference_latency,
    moe_efficiency_analysis,
)
from moe_course.costs.touched import expected_distinct_experts, zipf_inclusion
from moe_course.costs.training import (
    ServingCost,
    serving_cost,
    training_flops_per_token,
    training_mfu,
    training_tokens_per_day,
)

__all__ = [
    "CLARK",
    "ClarkLaw",
    "Link",
    "Precision",
    "Regimes",
    "ServingCost",
    "Speculation",
    "Step",
    "TrainingMemory",
    "activation_traffic",
    "all_to_all_bytes",
    "all_to_all_time",
    "attention_flops",
    "cache_bytes",
    "cache_numbers_per_token",
    "clark_loss",
    "crossovers",
    "decode_step",
    "deduplicated_bytes",
    "effective_parameters",
    "estimate_inference_latency",
    "expected_distinct_experts",
    "expected_distinct_ranks",
    "flops_per_byte",
    "krajewski_dense_loss",
    "krajewski_loss",
    "moe_efficiency_analysis",
    "offloaded_step",
    "overlapped",
    "prefill",
    "regimes",
    "ridge_tokens",
    "serving_cost",
    "speculative",
    "tensor_parallel_bytes",
    "touched_weights",
    "training_flops_per_token",
    "training_memory",
    "training_mfu",
    "training_tokens_per_day",
    "weight_bytes",
    "zipf_inclusion",
]
