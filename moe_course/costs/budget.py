"""What fine-tuning trains and stores, for a model that need not be there."""

from __future__ import annotations

from dataclasses import dataclass

from moe_course.specs.model import FFN, MLA, ModelSpec


@dataclass(frozen=True)
class Budget:
    """Parameters that are trained, and bytes that are held for them and for the rest."""

    trainable: int
    frozen: int
    weight: float = 2.0  # bytes a frozen parameter
    trained: float = (
        16.0  # bytes a trained one: weight, gradient, float32 copy, two moments
    )

    @property
    def bytes(self) -> float:
        """Weights, gradients and optimiser; activations come on top."""
        return self.frozen * self.weight + self.trainable * self.trained

    @property
    def training_bytes(self) -> float:
        """Gradients, optimiser and weights of what is trained, held for that alone."""
        return self.trainable * self.trained


def _matrices(ffn: FFN, width: int) -> list[tuple[int, int]]:
    return [(width, ffn.hidden)] * (1 + ffn.gated) + [(ffn.hidden, width)]


def _low_rank(matrices: list[tuple[int, int]], rank: int) -> int:
    return sum(rank * (inputs + outputs) for inputs, outputs in matrices)


def lora_params(
    spec: ModelSpec,
    rank: int = 16,
    *,
    experts: bool = True,
    shared: bool = False,
    attention: bool = False,
    dense: bool = False,
    joint: bool = False,
) -> int:
    """Parameters of LoRA: r · (in + out) for each matrix that it is put on; 0 for what a model does not have.

    experts, shared, dense: gate, up and down projections of the routed experts, the shared ones, and the FFNs of dense
        layers. joint: gate and up projection of a routed expert share their A.
    attention: all of its projections.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    total, sparse = 0, len(spec.moe_layers)
    if spec.moe is not None:
        if experts:
            each = _low_rank(_matrices(spec.moe.expert, spec.width), rank)
            if joint and spec.moe.expert.gated:
                each -= rank * spec.width
            total += sparse * spec.moe.experts * each
        if shared and spec.moe.shared is not None:
            total += sparse * _low_rank(_matrices(spec.moe.shared, spec.width), rank)
    if dense and spec.ffn is not None:
        total += (spec.layers - sparse) * _low_rank(
            _matrices(spec.ffn, spec.width), rank
        )
    if attention:
        total += spec.layers * _low_rank(_attention(spec), rank)
    return total


def _attention(spec: ModelSpec) -> list[tuple[int, int]]:
    a, d = spec.attention, spec.width
    if not isinstance(a, MLA):
        q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
        return [(d, q), (d, kv), (d, kv), (q, d)]
    q = a.heads * (a.nope_dim + a.rope_dim)
    query = [(d, q)] if a.q_rank is None else [(d, a.q_rank), (a.q_rank, q)]
    return [
        *query,
        (d, a.kv_rank + a.rope_dim),
        (a.kv_rank, a.heads * (a.nope_dim + a.v_dim)),
        (a.heads * a.v_dim, d),
    ]


def full_budget(spec: ModelSpec) -> Budget:
    """Everything is trained: 16 bytes a parameter, idle experts included."""
    return Budget(spec.total_params(), 0)


def lora_budget(spec: ModelSpec, rank: int = 16, **where: bool) -> Budget:
    """LoRA over a frozen model in 16 bits; `where` as in `lora_params`."""
    return Budget(lora_params(spec, rank, **where), spec.total_params())
