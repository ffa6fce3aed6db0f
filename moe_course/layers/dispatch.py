"""Dispatch and combine: the weighted sum over each token's experts, computed in several ways.

All take the same arguments and give the same sum, in value and in gradient:

    y_t = sum over the slots s of token t:  weight_s · expert_s(x_t)          (0 for a token without a slot)

The weight multiplies the expert's output. The sum is taken in the wider dtype of the two (float32 weights and bfloat16
outputs: float32), in the order of the slots, and returned in that of x: the same bits on every run. `dense` and
`einsum` multiply by zeros, so a token that is not finite spoils others; `loop`, `grouped` and `triton` keep it apart.

Chapter: book/math/dispatch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import repeat
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_course.layers.experts import Experts
from moe_course.layers.routing import Routing, Slots

Drop = Literal["position", "probs", "prioritised"]


def expert_capacity(
    tokens: int, k: int, num_experts: int, capacity_factor: float
) -> int:
    """C = ceil(capacity factor · T·K/E), the most slots that an expert takes (arXiv:2101.03961, section 2.2)."""
    if capacity_factor <= 0:
        raise ValueError(f"capacity_factor must be positive, got {capacity_factor}")
    # Less a billionth: 1.1 · 50 is a little more than 55 in floating point.
    return math.ceil(capacity_factor * tokens * k / num_experts - 1e-9)


def slots_from_routing(
    routing: Routing,
    num_experts: int,
    token_mask: Bool[Tensor, " T"] | None = None,
    capacity: int | None = None,
    drop: Drop = "position",
    sequence_length: int | None = None,
) -> Slots:
    """The slots of a token-choice routing, sorted by expert, within one by token.

    token_mask: False marks padding, which takes no slot and no capacity.
    capacity: the most slots of one expert. The rest is dropped: with drop="position" the last tokens (of one token
        the later choice), with "probs" those of the smallest weight, the later of equal ones; with "prioritised" later
        choices before first ones, and among equal ones tokens whose largest weight is small (batch-prioritised routing:
        V-MoE, arXiv:2106.05974, section 4).
    sequence_length: counts the capacity anew in every sequence of that many tokens.

    An expert id equal to E is a choice of no expert and takes no slot. Raises ValueError on ids outside 0..E, on a
    negative capacity and on an unknown drop.
    """
    if drop not in ("position", "probs", "prioritised"):
        raise ValueError(
            f"drop must be 'position', 'probs' or 'prioritised', got {drop!r}"
        )
    if capacity is not None and capacity < 0:
        raise ValueError(f"capacity must not be negative, got {capacity}")
    k = routing.expert_ids.shape[1]
    expert, weight = routing.expert_ids.flatten(), routing.weights.flatten()  # [T·K]
    if len(expert) and not 0 <= expert.min() <= expert.max() <= num_experts:
        raise ValueError(
            f"expert ids must lie in 0..{num_experts} ({num_experts} means no expert), "
            f"got {expert.min().item()}..{expert.max().item()}"
        )
    wanted = expert < num_experts
    if token_mask is not None:
        wanted &= token_mask.repeat_interleave(k)
    slot = wanted.nonzero().squeeze(1)  # [S], in token order
    if capacity is not None:
        if drop == "probs":
            slot = slot[weight[slot].argsort(descending=True, stable=True)]
        elif drop == "prioritised":
            best = routing.weights.detach().amax(dim=1)
            slot = slot[best[slot // k].argsort(descending=True, stable=True)]
            slot = slot[(slot % k).argsort(stable=True)]
        counter = expert
        if sequence_length is not None:
            sequence = torch.arange(len(expert), device=expert.device) // (
                k * sequence_length
            )
            counter = sequence * num_experts + expert
        slot = slot[counter[slot].argsort(stable=True)]
        slot = slot[_rank(counter[slot]) < capacity].sort().values
    slot = slot[expert[slot].argsort(stable=True)]
    return Slots(slot // k, expert[slot], weight[slot])


def slot_ends(slots: Slots, num_experts: int) -> Int[Tensor, " E"]:
    """Where each expert's run of slots ends: expert e owns rows ends[e-1] up to ends[e]."""
    ids = torch.arange(num_experts, device=slots.expert.device)
    return torch.searchsorted(slots.expert, ids, right=True, out_int32=True)


def _rank(keys: Int[Tensor, " S"]) -> Int[Tensor, " S"]:
    """The how-manieth each entry is among those equal to it, in a sorted vector."""
    return torch.arange(len(keys), device=keys.device) - torch.searchsorted(keys, keys)


def dense(
    x: Float[Tensor, "T D"], slots: Slots, experts: Experts
) -> Float[Tensor, "T D"]:
    """Every expert on every token, with weight 0 where it was not chosen.

    The oracle, at E/K times the work.
    """
    gates = slots.weight.new_zeros(len(x), experts.num_experts)
    gates = gates.index_put(
        (slots.token, slots.expert), slots.weight, accumulate=True
    )  # [T, E]
    y = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, gates.dtype))
    for gate, weights in zip(gates.unbind(1), _unstacked(experts), strict=True):
        y = y + gate[:, None] * _ffn(x, *weights, experts.activate)
    return y.to(x.dtype)


def loop(
    x: Float[Tensor, "T D"], slots: Slots, experts: Experts
) -> Float[Tensor, "T D"]:
    """One expert after the other, each on its own slots: any dtype, any size."""
    ends = slot_ends(slots, experts.num_experts)
    counts = ends.diff(prepend=ends.new_zeros(1)).tolist()
    rows = gather(x, slots).split_with_sizes(counts)
    out = [
        _ffn(mine, *weights, experts.activate)
        for mine, weights in zip(rows, _unstacked(experts), strict=True)
    ]
    return combine(torch.cat(out), slots, x)


def einsum(
    x: Float[Tensor, "T D"],
    slots: Slots,
    experts: Experts,
    capacity: int | None = None,
) -> Float[Tensor, "T D"]:
    """One-hot products, C places per expert (arXiv:2006.16668, algorithm 2).

    Every shape is known beforehand, at a price: 2·T·E·C·D multiplications, and E·C
    grows with T. Slots beyond the capacity are dropped by position and contribute
    exactly 0. Without one, C is the largest load: nothing is dropped.
    """
    position = _rank(slots.expert)
    if capacity is None:
        capacity = int(position.max()) + 1 if len(position) else 0
    kept = position < capacity
    where = (slots.token[kept], slots.expert[kept], position[kept])
    shape = (len(x), experts.num_experts, capacity)
    # No comparison of `weights` with 0 here: a slot of weight 0 still has a gradient.
    one_hot = x.new_zeros(shape).index_put(where, x.new_ones(()))  # [T, E, C]
    weights = slots.weight.new_zeros(shape).index_put(where, slots.weight[kept])

    rows = torch.einsum("tec,td->ecd", one_hot, x)
    hidden = torch.einsum("ecd,ehd->ech", rows, experts.w_up)
    if experts.b_up is not None:
        hidden = hidden + experts.b_up[:, None]
    out = torch.einsum("ecf,edf->ecd", experts.activate(hidden), experts.w_down)
    if experts.b_down is not None:
        out = out + experts.b_down[:, None]
    dtype = torch.promote_types(out.dtype, weights.dtype)
    y = torch.einsum("tec,ecd->td", weights.to(dtype), out.to(dtype))
    return y.to(x.dtype)


def grouped(
    x: Float[Tensor, "T D"], slots: Slots, experts: Experts
) -> Float[Tensor, "T D"]:
    """Two grouped matrix products over all experts at once, on rows sorted by expert.

    Falls back to `loop` where `grouped_mm` cannot go: see `fits_grouped_mm`.
    """
    if not fits_grouped_mm(x, experts):
        return loop(x, slots, experts)
    ends = slot_ends(slots, experts.num_experts)
    # grouped_mm takes no bias. An embedding, not b[expert]: its backward is faster.
    hidden = F.grouped_mm(gather(x, slots), experts.w_up.mT, offs=ends)
    if experts.b_up is not None:
        hidden = hidden + F.embedding(slots.expert, experts.b_up)
    out = F.grouped_mm(experts.activate(hidden), experts.w_down.mT, offs=ends)
    if experts.b_down is not None:
        out = out + F.embedding(slots.expert, experts.b_down)
    return combine(out, slots, x)


def product(
    rows: Float[Tensor, "S inputs"],
    weight: Float[Tensor, "E outputs inputs"],
    ends: Int[Tensor, " E"],
) -> Float[Tensor, "S outputs"]:
    """Each row times the matrix of its expert, W_e x; expert e owns the rows up to ends[e].

    One grouped product where it can be had, else one product after the other.
    """
    if _fits(rows, *weight.shape[1:]) and rows.dtype == weight.dtype:
        return F.grouped_mm(rows, weight.mT, offs=ends)
    counts = ends.diff(prepend=ends.new_zeros(1)).tolist()
    parts = zip(rows.split_with_sizes(counts), weight.unbind(0), strict=True)
    return torch.cat([F.linear(part, w) for part, w in parts])


def fits_grouped_mm(x: Float[Tensor, "T D"], experts: Experts) -> bool:
    """Whether `torch.nn.functional.grouped_mm` computes these experts.

    It wants x and weights in the same of float32, bfloat16 and float16 (no float64), rows of a multiple of 16 bytes
    (D and F multiples of 4 in float32, of 8 in bfloat16), and on a GPU compute capability 8.0.
    """
    same = x.dtype == experts.w_up.dtype
    return same and _fits(x, experts.width, experts.hidden)


def _fits(x: Tensor, *sizes: int) -> bool:
    return (
        x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and all(size * x.element_size() % 16 == 0 for size in sizes)
        and (not x.is_cuda or torch.cuda.get_device_capability(x.device) >= (8, 0))
    )


def triton(
    x: Float[Tensor, "T D"], slots: Slots, experts: Experts
) -> Float[Tensor, "T D"]:
    """The fused kernel of `moe_course.kernels`. Raises ImportError where there is no triton."""
    from moe_course.kernels import fused_moe  # exists for Linux alone

    expert_ids, weights = slot_table(slots, len(x), experts.num_experts)
    return fused_moe(
        x,
        experts.w_up,
        experts.w_down,
        expert_ids.int(),
        weights,
        activation=experts.activation,
        b_up=experts.b_up,
        b_down=experts.b_down,
    )


def slot_table(
    slots: Slots, tokens: int, num_experts: int
) -> tuple[Int[Tensor, "T K"], Float[Tensor, "T K"]]:
    """Slots as expert ids and weights per token; K is the most slots of one token, a place left over holds id E."""
    order = slots.token.argsort(stable=True)
    token = slots.token[order]
    place = _rank(token)
    shape = (tokens, int(place.max()) + 1 if len(place) else 0)
    expert_ids = slots.expert.new_full(shape, num_experts)
    weights = slots.weight.new_zeros(shape)
    return (
        expert_ids.index_put((token, place), slots.expert[order]),
        weights.index_put((token, place), slots.weight[order]),
    )


def gather(x: Float[Tensor, "T D"], slots: Slots) -> Float[Tensor, "S D"]:
    """Each slot's token: x[slots.token]."""
    # A table look-up: its backward adds in a fixed order on a GPU too, and faster than that of indexing on a CPU.
    return F.embedding(slots.token, x)


def combine(
    out: Float[Tensor, "S D"], slots: Slots, x: Float[Tensor, "T D"]
) -> Float[Tensor, "T D"]:
    """The sum over each token's slots of weight · output: 0 for a token without one."""
    dtype = torch.promote_types(out.dtype, slots.weight.dtype)
    order = slots.token.argsort(stable=True)
    starts = torch.searchsorted(
        slots.token[order], torch.arange(len(x), device=x.device)
    )
    # A bag of rows for each token, scaled and added in one pass: out * weight would store the product.
    y = F.embedding_bag(
        order,
        out.to(dtype),
        starts,
        mode="sum",
        per_sample_weights=slots.weight[order].to(dtype),
    )
    return y.to(x.dtype)


def _ffn(
    x: Float[Tensor, "N D"],
    w_up: Float[Tensor, "H D"],
    w_down: Float[Tensor, "D F"],
    b_up: Float[Tensor, " H"] | None,
    b_down: Float[Tensor, " D"] | None,
    activate: Callable[[Tensor], Tensor],
) -> Float[Tensor, "N D"]:
    return F.linear(activate(F.linear(x, w_up, b_up)), w_down, b_down)


def _unstacked(
    experts: Experts,
) -> Iterator[tuple[Tensor, Tensor, Tensor | None, Tensor | None]]:
    """Each expert's weights, as views.

    By one unbind: the gradient of w_up[e] inside a loop is a full-size tensor of zeros, for each expert.
    """
    b_up, b_down = experts.b_up, experts.b_down
    return zip(
        experts.w_up.unbind(0),
        experts.w_down.unbind(0),
        repeat(None) if b_up is None else b_up.unbind(0),
        repeat(None) if b_down is None else b_down.unbind(0),
        strict=False,  # repeat(None) never ends
    )


DISPATCH: dict[str, Callable[[Tensor, Slots, Experts], Tensor]] = {
    "dense": dense,
    "loop": loop,
    "einsum": einsum,
    "grouped": grouped,
    "triton": triton,
}
