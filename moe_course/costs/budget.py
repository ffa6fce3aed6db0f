"""What fine-tuning trains and stores, for a model that need not be there.

Chapter: book/finetuning/lora.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from moe_course.specs.model import FFN, MLA, ModelSpec

PARTS = ("router", "experts", "shared", "rest")


def checked_parts(parts: Iterable[str]) -> set[str]:
    """These of `PARTS`. Raises ValueError on others."""
    wanted = set(parts)
    if unknown := wanted - set(PARTS):
        raise ValueError(
            f"parts must be among {', '.join(PARTS)}, got {', '.join(sorted(unknown))}"
        )
    return wanted


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


def part_params(spec: ModelSpec) -> dict[str, int]:
    """Parameters of each of `PARTS`; a router's bias counts with it, whether gradients or a rule set it."""
    total = {name: count.total for name, count in spec.breakdown().items()}
    found = {part: total.pop(part) for part in PARTS if part in total}
    return {**found, "rest": sum(total.values())}


def recipe_budget(
    spec: ModelSpec, parts: Iterable[str] = PARTS, chosen: int | None = None
) -> Budget:
    """Some of `PARTS` are trained, all else is frozen in 16 bits.

    chosen: so many routed experts of each sparse layer are trained, no others. The bytes are those of an optimiser that
        holds state for these alone; with weights in one stack (`train_experts`) it holds state for all.

    Raises ValueError on other parts, and on `chosen` outside 0..E or without "experts" among the parts.
    """
    wanted = checked_parts(parts)
    params = part_params(spec)
    if chosen is not None:
        most = spec.moe.experts if spec.moe else 0
        if "experts" not in wanted or not 0 <= chosen <= most:
            raise ValueError(
                f"chosen needs experts among the parts and must lie in 0..{most}, got {chosen} and {sorted(wanted)}"
            )
        params["experts"] = params["experts"] // max(1, most) * chosen
    trainable = sum(params[part] for part in wanted)
    return Budget(trainable, spec.total_params() - trainable)


def full_budget(spec: ModelSpec) -> Budget:
    """Everything is trained: 16 bytes a parameter, idle experts included."""
    return recipe_budget(spec)


def lora_budget(spec: ModelSpec, rank: int = 16, **where: bool) -> Budget:
    """LoRA over a frozen model in 16 bits; `where` as in `lora_params`.

    16 bytes a trained number, whether it is held in 16 bits with a float32 copy or, as `apply_lora_to_moe` does it, in
    float32 with a gradient in float32: 2 + 2 + 4 + 8 or 4 + 4 + 8.
    """
    return Budget(lora_params(spec, rank, **where), spec.total_params())
