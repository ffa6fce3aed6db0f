"""The shape of a language model, dense or sparse, and its exact parameter counts.

Every count is an integer number of weights, as they would be stored: no estimate, no
rounding. Counts agree to the last parameter with the model classes of `transformers`
built from the same configuration (tests/test_parity.py),
where it has one. Modules for multi-token
prediction and vision towers are outside a `ModelSpec`.

Chapter: book/concepts/two_bets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, NamedTuple

MOST_LAYERS = 10_000  # beyond this a configuration is broken, not large


class Count(NamedTuple):
    """Parameters of a component: all that are stored, those that one token meets."""

    total: int
    active: int


def _require_sizes(obj: object, *names: str, least: int = 1) -> None:
    for name in names:
        value = getattr(obj, name)
        if type(value) is not int or value < least:
            raise ValueError(
                f"{type(obj).__name__}.{name} must be an integer of at least {least}, got {value!r}"
            )


def _require_parts(obj: object, kind: type, *names: str) -> None:
    for name in names:
        value = getattr(obj, name)
        if not isinstance(value, kind):
            raise ValueError(
                f"{type(obj).__name__}.{name} must be {kind.__name__}(...), got {value!r}"
            )


def _require_flags(obj: object, *names: str) -> None:
    # Counts multiply by these: "false" or 2 would be a wrong number, not an error.
    for name in names:
        value = getattr(obj, name)
        if type(value) is not bool:
            raise ValueError(
                f"{type(obj).__name__}.{name} must be True or False, got {value!r}"
            )


@dataclass(frozen=True)
class GQA:
    """Grouped-query attention (arXiv:2305.13245).

    `heads` query heads share `kv_heads` key and value heads: kv_heads = heads is
    ordinary multi-head attention, kv_heads = 1 multi-query attention.
    """

    heads: int
    kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    out_bias: bool = False
    # RMSNorm on queries and keys. "head": head_dim weights each (Qwen3); "full": one
    # weight for each number of all heads (OLMoE).
    qk_norm: str = "none"
    sinks: bool = False  # a learned logit per head that attention may go to (gpt-oss)

    def __post_init__(self) -> None:
        _require_sizes(self, "heads", "kv_heads", "head_dim")
        _require_flags(self, "qkv_bias", "out_bias", "sinks")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})"
            )
        if self.qk_norm not in ("none", "head", "full"):
            raise ValueError(
                f"qk_norm must be 'none', 'head' or 'full', got {self.qk_norm!r}"
            )

    def params(self, width: int) -> int:
        """Weights of one layer: W_q and W_o are D x H·d, W_k and W_v D x H_kv·d."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        weights = 2 * width * q + 2 * width * kv
        biases = self.qkv_bias * (q + 2 * kv) + self.out_bias * width
        norms = {"none": 0, "head": 2 * self.head_dim, "full": q + kv}[self.qk_norm]
        return weights + biases + norms + self.sinks * self.heads


@dataclass(frozen=True)
class MLA:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1).

    Keys and values are stored as one latent vector of `kv_rank` plus a rotary key of
    `rope_dim` shared by all heads; queries pass through a latent of `q_rank`, or
    directly where q_rank is None (DeepSeek-V2-Lite).
    """

    heads: int
    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    bias: bool = False  # on the two down-projections and the output projection

    def __post_init__(self) -> None:
        _require_sizes(self, "heads", "kv_rank", "nope_dim", "rope_dim", "v_dim")
        _require_flags(self, "bias")
        if self.q_rank is not None:
            _require_sizes(self, "q_rank")

    def params(self, width: int) -> int:
        """Weights of one layer, with the norms on the latents."""
        q_out = self.heads * (self.nope_dim + self.rope_dim)
        query = width * q_out
        if self.q_rank is not None:
            query = (width + self.bias + 1 + q_out) * self.q_rank  # + 1: the norm
        kv_down = (width + self.bias) * (self.kv_rank + self.rope_dim)
        kv_up = self.kv_rank + self.kv_rank * self.heads * (self.nope_dim + self.v_dim)
        out = (self.heads * self.v_dim + self.bias) * width
        return query + kv_down + kv_up + out


@dataclass(frozen=True)
class FFN:
    """A feed-forward network: two matrices, three if gated (arXiv:2002.05202)."""

    hidden: int
    gated: bool = True
    bias: bool = False

    def __post_init__(self) -> None:
        _require_sizes(self, "hidden")
        _require_flags(self, "gated", "bias")

    def params(self, width: int) -> int:
        """(2 + gated)·D·F weights, and (1 + gated)·F + D biases where there are any."""
        inputs = 1 + self.gated
        weights = (inputs + 1) * width * self.hidden
        return weights + self.bias * (inputs * self.hidden + width)


@dataclass(frozen=True)
class RoutedExperts:
    """`experts` equal FFNs, of which a router picks `k` for each token.

    `shared` is an FFN that every token passes through as well (several shared experts
    of width F add up to one of their summed width); `shared_gate` is the sigmoid gate
    that Qwen2-MoE puts on it, a vector of D weights. `router_bias` is one number per
    expert, learned (gpt-oss) or set by load balancing (DeepSeek-V3).
    """

    experts: int
    k: int
    expert: FFN
    shared: FFN | None = None
    shared_gate: bool = False
    router_bias: bool = False

    def __post_init__(self) -> None:
        _require_sizes(self, "experts", "k")
        _require_flags(self, "shared_gate", "router_bias")
        _require_parts(self, FFN, "expert", *(["shared"] if self.shared else []))
        if self.k > self.experts:
            raise ValueError(
                f"k ({self.k}) must not exceed the number of experts ({self.experts})"
            )
        if self.shared_gate and self.shared is None:
            raise ValueError(
                "shared_gate needs a shared expert to gate: give `shared`, or leave it out"
            )

    def router_params(self, width: int) -> int:
        return width * self.experts + self.router_bias * self.experts

    def shared_params(self, width: int) -> int:
        expert = self.shared.params(width) if self.shared else 0
        return expert + self.shared_gate * width


@dataclass(frozen=True)
class ModelSpec:
    """The shape of a decoder-only transformer language model.

    Layer i (from 0) is sparse when `moe` is given and

        i >= first_dense   and   (i + 1) mod moe_every = 0   and   i not in dense_layers

    else it holds the dense `ffn`. So first_dense=3 is DeepSeek-V3, moe_every=2 is
    GShard and GLaM. Raises ValueError on sizes that are no positive
    integers and on layers left without an FFN.
    """

    name: str
    layers: int
    width: int
    vocab: int
    attention: GQA | MLA
    ffn: FFN | None = None
    moe: RoutedExperts | None = None
    first_dense: int = 0
    moe_every: int = 1
    dense_layers: tuple[int, ...] = ()
    norms_per_layer: int = 2  # weight vectors of width D: 2 for pre-norm, 4 in Grok-1
    tied_embeddings: bool = False

    def __post_init__(self) -> None:
        _require_sizes(self, "layers", "width", "vocab", "moe_every")
        _require_sizes(self, "first_dense", "norms_per_layer", least=0)
        _require_flags(self, "tied_embeddings")
        if self.layers > MOST_LAYERS:
            raise ValueError(
                f"ModelSpec.layers must be at most {MOST_LAYERS}, got {self.layers}"
            )
        if not isinstance(self.attention, GQA | MLA):
            raise ValueError(
                f"ModelSpec.attention must be GQA(...) or MLA(...), got {self.attention!r}"
            )
        for name, kind in (("ffn", FFN), ("moe", RoutedExperts)):
            if getattr(self, name) is not None:
                _require_parts(self, kind, name)
        if any(type(i) is not int for i in self.dense_layers):
            raise ValueError(
                f"ModelSpec.dense_layers must hold layer indices, got {self.dense_layers!r}"
            )
        if self.ffn is None and len(self.moe_layers) < self.layers:
            raise ValueError(
                f"{self.name}: {self.layers - len(self.moe_layers)} of {self.layers} layers are dense, "
                "but no dense `ffn` is given"
            )

    @cached_property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the sparse layers."""
        if self.moe is None:
            return ()
        return tuple(
            i
            for i in range(self.layers)
            if i >= self.first_dense
            and (i + 1) % self.moe_every == 0
            and i not in self.dense_layers
        )

    def breakdown(self) -> dict[str, Count]:
        """Parameters by component, as (total, active).

        Active: all weights but those of the experts a token does not select. The input
        embedding counts whole in both, though a token reads one row of it;
        `active_params(include_embedding=False)` leaves it out. A tied output head
        stores nothing of its own. Norms inside attention count as attention.
        """
        sparse = len(self.moe_layers)
        dense = self.layers - sparse

        def used(n: int) -> Count:
            return Count(n, n)

        experts, shared, router = Count(0, 0), 0, 0
        if self.moe:
            one = sparse * self.moe.expert.params(self.width)  # over all layers
            experts = Count(self.moe.experts * one, self.moe.k * one)
            shared = sparse * self.moe.shared_params(self.width)
            router = sparse * self.moe.router_params(self.width)
        return {
            "input_embedding": used(self.vocab * self.width),
            "attention": used(self.layers * self.attention.params(self.width)),
            "dense_ffn": used(dense * self.ffn.params(self.width) if self.ffn else 0),
            "experts": experts,
            "shared": used(shared),
            "router": used(router),
            "norms": used((self.layers * self.norms_per_layer + 1) * self.width),
            "output_head": used(0 if self.tied_embeddings else self.vocab * self.width),
        }

    def total_params(self) -> int:
        """Every stored weight."""
        return self._sums.total

    def active_params(self, include_embedding: bool = True) -> int:
        """Weights that one token meets: all but the experts it does not select.

        With include_embedding=False the input embedding is left out, since a token
        looks up one row of it and multiplies by none; where it is tied to the output
        head it stays, because there it is multiplied.
        """
        active = self._sums.active
        if include_embedding or self.tied_embeddings:
            return active
        return active - self.vocab * self.width

    @cached_property
    def _sums(self) -> Count:
        counts = self.breakdown().values()
        return Count(sum(c.total for c in counts), sum(c.active for c in counts))

    @classmethod
    def from_hf_config(
        cls, config: Mapping[str, Any], name: str | None = None
    ) -> ModelSpec:
        """Read the `config.json` that a model is published with.

        Keys that fix the count must be there; those that `transformers` derives
        (head_dim, num_key_value_heads) or defaults for the family may be absent. Raises
        ValueError that names the unknown `model_type` or the missing key.
        """
        from moe_course.specs.hf import read_config

        shape = read_config(config)
        label = name or str(config.get("_name_or_path") or config["model_type"])
        return cls(name=label, **shape)

    def __str__(self) -> str:
        parts = [
            f"{f.name}={getattr(self, f.name)}"
            for f in fields(self)
            if f.name != "name"
        ]
        return f"{self.name}: " + ", ".join(parts)
