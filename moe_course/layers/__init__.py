"""Reference layers: complete, short, and equal to what production models run."""

from moe_course.layers.dispatch import expert_capacity, slots_from_routing
from moe_course.layers.experts import Experts
from moe_course.layers.ffn import DenseFFN, SwiGLU
from moe_course.layers.moe import MoE
from moe_course.layers.routing import (
    ExpertChoiceRouter,
    Groups,
    Routing,
    Slots,
    TopKRouter,
    balanced_random,
    base_assignment,
    expert_choice,
    hash_table,
    hashed,
    noisy_top_k,
    renormalised,
    sigmoid_top_k,
    sinkhorn_top_k,
    softmax_top_k,
    top_k_softmax,
)
from moe_course.layers.soft_moe import SoftMoE
from moe_course.layers.transformer import DecoderBlock, Transformer

__all__ = [
    "DecoderBlock",
    "DenseFFN",
    "ExpertChoiceRouter",
    "Experts",
    "Groups",
    "MoE",
    "Routing",
    "Slots",
    "SoftMoE",
    "SwiGLU",
    "TopKRouter",
    "Transformer",
    "balanced_random",
    "base_assignment",
    "expert_capacity",
    "expert_choice",
    "hash_table",
    "hashed",
    "noisy_top_k",
    "renormalised",
    "sigmoid_top_k",
    "sinkhorn_top_k",
    "slots_from_routing",
    "softmax_top_k",
    "top_k_softmax",
]
