"""Upcycling: a dense model becomes a sparse one that computes the same (arXiv:2212.05055)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from moe_course.layers import DecoderBlock, MoE, Transformer
from moe_course.layers.ffn import DenseFFN, SwiGLU
from moe_course.layers.routing import Gate, TopKRouter, renormalised
from moe_course.specs import ModelSpec, RoutedExperts


def upcycled_spec(
    dense: ModelSpec, experts: int, k: int, granularity: int = 1, every: int = 1
) -> ModelSpec:
    """The shape after upcycling: `experts` · `granularity` experts, k · granularity of them used, each 1/granularity as
    wide.

    every: every how-manieth layer becomes sparse, the last of each group.
    """
    if dense.ffn is None or dense.moe is not None:
        raise ValueError(
            f"{dense.name} is not dense: upcycling begins with a dense model"
        )
    if not 1 <= every <= dense.layers:
        raise ValueError(
            f"every must lie in 1..{dense.layers} (the layers), got {every}"
        )
    if granularity < 1 or dense.ffn.hidden % granularity:
        raise ValueError(
            f"granularity must divide the FFN's {dense.ffn.hidden} hidden numbers, got {granularity}"
        )
    one = replace(dense.ffn, hidden=dense.ffn.hidden // granularity)
    moe = RoutedExperts(experts * granularity, k * granularity, one)
    ffn = dense.ffn if every > 1 else None
    return replace(
        dense, name=f"{dense.name}, upcycled", ffn=ffn, moe=moe, moe_every=every
    )


@torch.no_grad()
def upcycle(
    dense: Transformer,
    experts: int,
    k: int,
    granularity: int = 1,
    every: int = 1,
    noise: float = 0.0,
    gate: Gate = renormalised,
    **router_options: Any,
) -> Transformer:
    """A sparse model whose experts are copies of the dense one's FFNs, with new routers.

    With a gate whose weights sum to 1 it computes what the dense model computes, to
    rounding, whoever the router chooses: equal experts have equal outputs. With one
    whose weights do not, it does not.

    granularity: g > 1 cuts each copy into g pieces along its hidden numbers; the sum
        over a copy's pieces is the whole. The router starts with equal rows for the
        pieces of one copy, so that the k·g chosen ones are k whole copies (virtual
        groups: arXiv:2410.07524), and the down projections are multiplied by g,
        because each piece gets 1/g of its copy's weight.
    noise: standard deviation of what is added to the experts' weights, relative to
        that of each stack: it breaks ties between copies, which otherwise learn the
        same until their tokens differ.

    Raises ValueError on a model that is not dense and on a granularity that does not
    divide the FFN.
    """
    spec = upcycled_spec(dense.spec, experts, k, granularity, every)
    sparse = Transformer(spec, gate, **router_options)
    own = dense.state_dict()
    shared = {n: w for n, w in own.items() if n in sparse.state_dict()}
    sparse.load_state_dict(shared, strict=False)
    sparse.to(next(dense.parameters())).train(dense.training)
    ffns = [block.ffn for block in dense.blocks if isinstance(block, DecoderBlock)]
    for block, ffn in zip(sparse.blocks, ffns, strict=True):
        if isinstance(block, DecoderBlock) and isinstance(block.ffn, MoE):
            _fill(block.ffn, ffn, granularity, noise)
    return sparse


def _fill(layer: MoE, ffn: nn.Module, pieces: int, noise: float) -> None:
    assert isinstance(ffn, DenseFFN | SwiGLU)
    assert isinstance(layer.router, TopKRouter)
    router = layer.router.weight
    router.copy_(router[::pieces].repeat_interleave(pieces, 0))
    bank = layer.experts
    copies = bank.num_experts // pieces
    parts = [ffn.gate, ffn.up] if isinstance(ffn, SwiGLU) else [ffn.up]
    # Piece j of every copy holds the hidden numbers j·F/g up to (j+1)·F/g.
    up = torch.cat([p.weight.unflatten(0, (pieces, -1)) for p in parts], 1)
    down = ffn.down.weight.unflatten(1, (pieces, -1)).movedim(1, 0) * pieces
    stacks = [(bank.w_up, up), (bank.w_down, down)]
    if bank.b_up is not None and bank.b_down is not None:
        bias = torch.cat([p.bias.unflatten(0, (pieces, -1)) for p in parts], 1)
        stacks += [(bank.b_up, bias), (bank.b_down, ffn.down.bias.expand(pieces, -1))]
    for target, one in stacks:
        target.copy_(one.repeat(copies, *[1] * (one.ndim - 1)))
        if noise:
            target.add_(torch.randn_like(target), alpha=noise * target.std().item())
