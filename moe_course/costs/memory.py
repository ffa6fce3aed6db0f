"""What a model keeps in memory: weights, cache, and in training gradients, optimiser and activations. GB = 10^9
bytes.

Chapters: book/bandwidth/roofline, book/bandwidth/economics.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from moe_course.specs.model import MLA, ModelSpec


@dataclass(frozen=True)
class Precision:
    """Bytes of one stored weight, scales included; `experts` and `cache` (per number of the KV cache) may differ.

    Four bits with a 16-bit scale per group of 32 are 4/8 + 2/32 = 0.5625 bytes.
    """

    weights: float = 2.0
    experts: float | None = None
    cache: float = 2.0

    def __post_init__(self) -> None:
        if not all(0 < b < inf for b in (self.weights, self.cache, self.expert_bytes)):
            raise ValueError(f"bytes of a number must be positive, got {self}")

    @property
    def expert_bytes(self) -> float:
        return self.weights if self.experts is None else self.experts


BF16 = Precision()


def weight_bytes(spec: ModelSpec, precision: Precision = BF16) -> float:
    """Bytes of all stored weights."""
    experts = spec.breakdown()["experts"].total
    rest = spec.total_params() - experts
    return rest * precision.weights + experts * precision.expert_bytes


def cache_numbers_per_token(spec: ModelSpec) -> int:
    """Numbers that one token of context adds to the KV cache, over all layers.

    GQA: 2 · kv_heads · head_dim a layer (keys and values). MLA: the latent and the shared rotary key, kv_rank +
    rope_dim (arXiv:2405.04434, section 2.1). Sliding windows, which keep less, are not known to a ModelSpec.
    """
    a = spec.attention
    if isinstance(a, MLA):
        return spec.layers * (a.kv_rank + a.rope_dim)
    return spec.layers * 2 * a.kv_heads * a.head_dim


def cache_bytes(
    spec: ModelSpec, batch: int, context: float, precision: Precision = BF16
) -> float:
    """Bytes of the KV cache of `batch` sequences of `context` tokens."""
    return batch * context * cache_numbers_per_token(spec) * precision.cache


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on one device while training."""

    weights: float
    gradients: float
    optimiser: float
    activations: float

    def total(self) -> float:
        return self.weights + self.gradients + self.optimiser + self.activations


def training_memory(
    spec: ModelSpec,
    tokens: int,
    devices: int = 1,
    expert_parallel: int = 1,
    shard: str = "none",
    recompute: bool = False,
    weight: float = 2.0,
    gradient: float = 2.0,
    optimiser: float = 12.0,
    copies: int = 2,
) -> TrainingMemory:
    """Bytes on one device: mixed precision with AdamW unless told otherwise.

    tokens: on one device, in one micro-batch.
    devices: in data parallelism; experts are split over `expert_parallel` of them, everything else is on each. Tensor
        and pipeline parallelism, which split more, are not counted.
    shard: what data parallelism splits instead of copying (ZeRO, arXiv:1910.02054, section 5): "none", "optimiser"
        (stage 1), "gradients" (2) or "weights" (3). Experts are split over the devices / expert_parallel that hold
        the same. Stage 3 also holds the layer that it is working on, gathered: not counted.
    recompute: keep the input of each layer alone (2·D bytes, arXiv:2205.05198, table 2), and compute the rest again
        (one more forward pass). While a layer is at work its own activations are there besides: not counted.
    weight, gradient, optimiser: bytes a parameter: 2 + 2 + 12 (a float32 copy and two moments; the same, section 3.1).
    copies: vectors of D that dispatch keeps for each of a token's K choices. 2 as usual: the gathered input, which the
        gradient of the first matrices needs, and the expert's output, which that of the gate weight needs. 0 for
        kernels that gather on load and weigh in front of the down-projection.

    Activations in bytes, two a number; attention without its T x T scores (FlashAttention keeps none), no dropout. A
    layer keeps D for each norm's input and 2·D for its two blocks'; queries, keys, values and output of attention, and
    what norms inside it read; (1 + gated)·F in front of and F behind each activation, K times for routed experts.
    With four times the width behind one activation that is 32·D bytes a token, the 34·D of arXiv:2205.05198
    (equation 1) less two dropout masks. Experts are taken to be evenly loaded. Logits come once: 4·V bytes.

    Raises ValueError on an unknown shard and on sizes that do not divide.
    """
    stages = ("none", "optimiser", "gradients", "weights")
    if shard not in stages:
        raise ValueError(f"shard must be one of {', '.join(stages)}, got {shard!r}")
    if copies < 0:
        raise ValueError(f"copies must not be negative, got {copies}")
    if min(tokens, devices, expert_parallel) < 1 or devices % expert_parallel:
        raise ValueError(
            "tokens, devices and expert_parallel must be at least 1 and expert_parallel divide devices, got "
            f"{tokens}, {devices} and {expert_parallel}"
        )
    if spec.moe is not None and spec.moe.experts % expert_parallel:
        raise ValueError(
            f"expert_parallel must divide the {spec.moe.experts} experts, got {expert_parallel}"
        )
    stored, experts = spec.total_params(), spec.breakdown()["experts"].total
    copied = stored - experts + experts / expert_parallel
    level = stages.index(shard)

    def held(bytes_each: float, stage: int) -> float:
        return bytes_each * (copied if level < stage else stored / devices)

    return TrainingMemory(
        weights=held(weight, 3),
        gradients=held(gradient, 2),
        optimiser=held(optimiser, 1),
        activations=tokens * _activation_bytes_per_token(spec, recompute, copies),
    )


def _activation_bytes_per_token(spec: ModelSpec, recompute: bool, copies: int) -> float:
    if recompute:
        return 2 * spec.layers * spec.width + 4 * spec.vocab
    a = spec.attention
    if isinstance(a, MLA):
        inner = 2 * a.heads * (a.nope_dim + a.rope_dim) + 2 * a.heads * a.v_dim
        # Latents are read by a norm, and normalised by an up-projection.
        inner += 2 * a.kv_rank + a.rope_dim + 2 * (a.q_rank or 0)
    else:
        inner = 2 * (a.heads + a.kv_heads) * a.head_dim
        if a.qk_norm != "none":
            inner += (a.heads + a.kv_heads) * a.head_dim
    sparse = len(spec.moe_layers)
    numbers = spec.layers * ((spec.norms_per_layer + 2) * spec.width + inner)
    if spec.ffn is not None:
        numbers += (spec.layers - sparse) * (2 + spec.ffn.gated) * spec.ffn.hidden
    if spec.moe is not None:
        one = (2 + spec.moe.expert.gated) * spec.moe.expert.hidden
        numbers += sparse * spec.moe.k * (one + copies * spec.width)
        if spec.moe.shared is not None:
            numbers += sparse * (2 + spec.moe.shared.gated) * spec.moe.shared.hidden
    return 2 * numbers + 4 * spec.vocab
