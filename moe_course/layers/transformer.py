"""A decoder-only transformer, dense, sparse or interleaved, with exactly the parameters that its `ModelSpec` counts.

Chapter: book/concepts/anatomy; parameters against `transformers` in tests/test_transformer.py.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moe_course.layers.experts import Experts
from moe_course.layers.ffn import DenseFFN, SwiGLU
from moe_course.layers.moe import MoE
from moe_course.layers.routing import (
    Gate,
    Routing,
    TopKRouter,
    renormalised,
    sigmoid_top_k,
)
from moe_course.specs import FFN, GQA, MLA, ModelSpec


def rope(
    x: Float[Tensor, "*B S d"], theta: float = 10_000.0, start: int = 0
) -> Float[Tensor, "*B S d"]:
    """Rotary position embedding (arXiv:2104.09864, section 3.2.2).

    Turns the pair (x_i, x_{i+d/2}) at position p = start, start + 1, ... by the angle p·theta^(-2i/d), so that a
    product of query and key depends on their distance alone. Pairs lie half a vector apart, as in the weights of Llama
    and its descendants on the Hub; the paper, and DeepSeek, pair neighbours. Raises ValueError when d is odd.
    """
    length, size = x.shape[-2:]
    if size % 2:
        raise ValueError(f"rope turns pairs: the size must be even, got {size}")
    dtype = torch.promote_types(x.dtype, torch.float32)  # bfloat16 counts to 256
    speed = theta ** (-torch.arange(0, size, 2, dtype=dtype, device=x.device) / size)
    place = torch.arange(start, start + length, dtype=dtype, device=x.device)
    angle = place[:, None] * speed  # [S, d/2]
    cos, sin = angle.cos(), angle.sin()
    a, b = x.to(dtype).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def causal_attention(
    q: Float[Tensor, "B H S d"],
    k: Float[Tensor, "B G S d"],
    v: Float[Tensor, "B G S v"],
    sinks: Float[Tensor, " H"] | None = None,
) -> Float[Tensor, "B H S v"]:
    """softmax(q k^T / sqrt(d)) v over the past and the present; H/G query heads share a key head (arXiv:2305.13245).

    sinks: one more logit per head in the softmax, whose value is 0 (gpt-oss, arXiv:2508.10925): attention may go
        nowhere.
    """
    if sinks is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    length = q.shape[-2]
    # The sink is a key of zeros in front, whose logit the mask adds, with a value of zeros.
    past = torch.full((length, length), -torch.inf, device=q.device).triu(1)
    mask = torch.cat(
        [
            sinks.view(-1, 1, 1).expand(-1, length, 1),
            past.to(q.dtype).expand(len(sinks), -1, -1),
        ],
        dim=-1,
    )  # [H, S, 1 + S]
    k, v = F.pad(k, (0, 0, 1, 0)), F.pad(v, (0, 0, 1, 0))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


class GroupedQueryAttention(nn.Module):
    """Causal self-attention with RoPE, as a `GQA` spec describes it (arXiv:2305.13245)."""

    def __init__(self, width: int, spec: GQA, rope_theta: float, eps: float) -> None:
        super().__init__()
        self.spec, self.rope_theta = spec, rope_theta
        q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        self.q = nn.Linear(width, q, bias=spec.qkv_bias)
        self.k = nn.Linear(width, kv, bias=spec.qkv_bias)
        self.v = nn.Linear(width, kv, bias=spec.qkv_bias)
        self.out = nn.Linear(q, width, bias=spec.out_bias)
        self.q_norm = self.k_norm = None
        if spec.qk_norm != "none":
            per_head = spec.qk_norm == "head"
            self.q_norm = nn.RMSNorm(spec.head_dim if per_head else q, eps)
            self.k_norm = nn.RMSNorm(spec.head_dim if per_head else kv, eps)
        self.sinks = nn.Parameter(torch.zeros(spec.heads)) if spec.sinks else None

    def forward(self, x: Float[Tensor, "B S D"]) -> Float[Tensor, "B S D"]:
        q = rope(self._heads(self.q(x), self.q_norm), self.rope_theta)
        k = rope(self._heads(self.k(x), self.k_norm), self.rope_theta)
        y = causal_attention(q, k, self._heads(self.v(x)), self.sinks)
        return self.out(y.transpose(1, 2).flatten(2))

    def _heads(
        self, x: Float[Tensor, "B S all"], norm: nn.RMSNorm | None = None
    ) -> Float[Tensor, "B H S d"]:
        heads = x.unflatten(-1, (-1, self.spec.head_dim))  # [B, S, H, d]
        if norm is not None:
            # Over one head, or over all of them at once.
            heads = norm(heads if self.spec.qk_norm == "head" else x).view_as(heads)
        return heads.transpose(1, 2)


class LatentAttention(nn.Module):
    """Causal multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1), as an `MLA` spec describes it.

    Keys and values of all heads come out of one latent vector; position enters by a rotary key that all heads share.
    """

    def __init__(self, width: int, spec: MLA, rope_theta: float, eps: float) -> None:
        super().__init__()
        self.spec, self.rope_theta = spec, rope_theta
        q = spec.heads * (spec.nope_dim + spec.rope_dim)
        self.q_down = self.q_norm = None
        if spec.q_rank is not None:
            self.q_down = nn.Linear(width, spec.q_rank, bias=spec.bias)
            self.q_norm = nn.RMSNorm(spec.q_rank, eps)
        self.q_up = nn.Linear(spec.q_rank or width, q, bias=False)
        self.kv_down = nn.Linear(width, spec.kv_rank + spec.rope_dim, bias=spec.bias)
        self.kv_norm = nn.RMSNorm(spec.kv_rank, eps)
        kv = spec.heads * (spec.nope_dim + spec.v_dim)
        self.kv_up = nn.Linear(spec.kv_rank, kv, bias=False)
        self.out = nn.Linear(spec.heads * spec.v_dim, width, bias=spec.bias)

    def forward(self, x: Float[Tensor, "B S D"]) -> Float[Tensor, "B S D"]:
        spec = self.spec
        latent = x
        if self.q_down is not None and self.q_norm is not None:
            latent = self.q_norm(self.q_down(x))  # [B, S, q_rank]
        q_nope, q_rope = self._heads(self.q_up(latent), spec.nope_dim, spec.rope_dim)
        kv, k_rope = self.kv_down(x).split_with_sizes((spec.kv_rank, spec.rope_dim), -1)
        k_nope, v = self._heads(
            self.kv_up(self.kv_norm(kv)), spec.nope_dim, spec.v_dim
        )  # [B, H, S, ...]
        k_rope = rope(k_rope, self.rope_theta)[:, None].expand_as(q_rope)
        q = torch.cat([q_nope, rope(q_rope, self.rope_theta)], dim=-1)
        y = causal_attention(q, torch.cat([k_nope, k_rope], dim=-1), v)
        return self.out(y.transpose(1, 2).flatten(2))

    def _heads(
        self, x: Float[Tensor, "B S all"], *sizes: int
    ) -> tuple[Float[Tensor, "B H S _"], ...]:
        heads = x.unflatten(-1, (self.spec.heads, -1)).transpose(1, 2)
        return heads.split_with_sizes(sizes, -1)


class DecoderBlock(nn.Module):
    """Attention, then an FFN, dense or sparse, each added to the residual stream (pre-norm, arXiv:2002.04745).

        x = x + attention(norm(x))          x = x + ffn(norm(x))

    norms=4 puts a norm behind each of the two as well, before it is added (Grok-1). Raises ValueError on another number
    of norms.
    """

    def __init__(
        self,
        width: int,
        attention: nn.Module,
        ffn: nn.Module,
        norms: int = 2,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if norms not in (2, 4):
            raise ValueError(f"norms must be 2 (before) or 4 (and after), got {norms}")
        self.attention, self.ffn = attention, ffn
        self.attention_norm = nn.RMSNorm(width, eps)
        self.ffn_norm = nn.RMSNorm(width, eps)
        after = norms == 4
        self.attention_out_norm = nn.RMSNorm(width, eps) if after else nn.Identity()
        self.ffn_out_norm = nn.RMSNorm(width, eps) if after else nn.Identity()

    def forward(
        self,
        x: Float[Tensor, "B S D"],
        token_mask: Bool[Tensor, "B S"] | None = None,
        token_ids: Int[Tensor, "B S"] | None = None,
    ) -> tuple[Float[Tensor, "B S D"], Routing | None]:
        x = x + self.attention_out_norm(self.attention(self.attention_norm(x)))
        normed, routing = self.ffn_norm(x), None
        if isinstance(self.ffn, MoE):
            y, routing, _ = self.ffn(normed, token_mask, token_ids)
        else:
            y = self.ffn(normed)
        return x + self.ffn_out_norm(y), routing


class Transformer(nn.Module):
    """A decoder-only language model of a given shape: its parameters number `spec.total_params()`.

    RMSNorm, RoPE, SwiGLU where the FFN is gated and GELU where it is not. What a spec leaves open is given here:

    gate, router_options: how each sparse layer's `TopKRouter` turns logits into a choice.
    dispatch, capacity_factor: as in `MoE`.
    rope_theta, norm_eps: as `rope_theta` and `rms_norm_eps` in a published configuration.

    A `router_bias` is learned, except with the gate `sigmoid_top_k` (DeepSeek-V3): there it is the router's buffer
    `correction`, which is not among the parameters. Raises ValueError on norms_per_layer other than 2 and 4.
    """

    def __init__(
        self,
        spec: ModelSpec,
        gate: Gate = renormalised,
        dispatch: str = "grouped",
        capacity_factor: float | None = None,
        rope_theta: float = 10_000.0,
        norm_eps: float = 1e-6,
        **router_options: Any,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.embedding = nn.Embedding(spec.vocab, spec.width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList()
        for layer in range(spec.layers):
            if layer in spec.moe_layers:
                router = _router(spec, gate, router_options)
                ffn: nn.Module = _sparse(spec, router, dispatch, capacity_factor)
            else:
                ffn = _dense(spec.width, spec.ffn)
            attention = _attention(spec, rope_theta, norm_eps)
            self.blocks.append(
                DecoderBlock(spec.width, attention, ffn, spec.norms_per_layer, norm_eps)
            )
        self.norm = nn.RMSNorm(spec.width, norm_eps)
        self.head = nn.Linear(spec.width, spec.vocab, bias=False)
        if spec.tied_embeddings:
            self.head.weight = self.embedding.weight

    def forward(
        self,
        token_ids: Int[Tensor, "B S"],
        token_mask: Bool[Tensor, "B S"] | None = None,
    ) -> tuple[Float[Tensor, "B S V"], list[Routing]]:
        """The logits of each next token, and what the router of each sparse layer decided, over T = B·S tokens.

        token_mask: False marks padding behind the end of a sequence: it takes no slot, and no token before it sees it.
        """
        x = self.embedding(token_ids)
        routings = []
        for block in self.blocks:
            x, routing = block(x, token_mask, token_ids)
            if routing is not None:
                routings.append(routing)
        return self.head(self.norm(x)), routings


def _attention(spec: ModelSpec, rope_theta: float, eps: float) -> nn.Module:
    if isinstance(spec.attention, GQA):
        return GroupedQueryAttention(spec.width, spec.attention, rope_theta, eps)
    return LatentAttention(spec.width, spec.attention, rope_theta, eps)


def _dense(width: int, spec: FFN | None) -> nn.Module:
    assert spec is not None  # ModelSpec sees to it
    if spec.gated:
        return SwiGLU(width, spec.hidden, spec.bias)
    return DenseFFN(width, spec.hidden, "gelu", spec.bias)


def _router(spec: ModelSpec, gate: Gate, options: dict[str, Any]) -> TopKRouter:
    moe = spec.moe
    assert moe is not None
    bias = moe.router_bias and gate is not sigmoid_top_k
    return TopKRouter(spec.width, moe.experts, moe.k, gate, bias=bias, **options)


def _sparse(
    spec: ModelSpec, router: nn.Module, dispatch: str, capacity_factor: float | None
) -> MoE:
    moe = spec.moe
    assert moe is not None
    one, activation = moe.expert, "swiglu" if moe.expert.gated else "gelu"
    experts = Experts(moe.experts, spec.width, one.hidden, activation, one.bias)
    shared = _dense(spec.width, moe.shared) if moe.shared else None
    shared_gate = nn.Linear(spec.width, 1, bias=False) if moe.shared_gate else None
    return MoE(router, experts, shared, shared_gate, dispatch, capacity_factor)
