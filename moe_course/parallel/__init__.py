"""Layers over several processes, on `torch.distributed`: gloo on CPUs, NCCL on GPUs."""

from moe_course.parallel.expert_parallel import (
    ExpertParallelMoE,
    Traffic,
    reduce_gradients,
    shard,
)
from moe_course.parallel.launch import Place, run_ranks, torchrun_ranks

__all__ = [
    "ExpertParallelMoE",
    "Place",
    "Traffic",
    "reduce_gradients",
    "run_ranks",
    "shard",
    "torchrun_ranks",
]
