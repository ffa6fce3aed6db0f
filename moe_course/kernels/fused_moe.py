"""The whole layer, from tokens, expert ids and gate weights to the output, as one differentiable operator.

Chapter: book/kernels/fused_moe.
"""

from __future__ import annotations

import os

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe_course.kernels import INTERPRETED
from moe_course.kernels import grouped_gemm as gemm
from moe_course.kernels.decode import decode, fits_decode
from moe_course.kernels.routing import SortedSlots, max_tiles, sort_by_expert
from moe_course.kernels.tiles import Tiles, choose

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ACTIVATIONS = (*gemm.GATED, "gelu", "relu")
Saved = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _tiles(x: Tensor, w_down: Tensor, expert_ids: Tensor, activation: str) -> Tiles:
    num_experts, width, hidden = w_down.shape
    halves = 2 if activation in gemm.GATED else 1
    return choose(
        expert_ids.numel(), num_experts, width, hidden, halves, x.dtype, x.device
    )


def forward(
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    b_up: Tensor | None,
    b_down: Tensor | None,
    activation: str,
    save: bool,
) -> tuple[Tensor, Saved]:
    """The launches of the forward pass: y, and what the backward pass needs besides its inputs (empty unless save)."""
    (tokens, k), num_experts = expert_ids.shape, len(w_up)
    if not save and fits_decode(tokens, k, num_experts) and tokens * k:
        y = decode(x, w_up, w_down, expert_ids, weights, b_up, b_down, activation)
        return y, _nothing_saved(x)
    t = _tiles(x, w_down, expert_ids, activation)
    s = sort_by_expert(expert_ids, num_experts, t.up.block_m)
    if tokens * k == 0:
        return torch.zeros_like(x), (x.new_empty(0, w_up.shape[1]), *s)
    act, hidden = gemm.up_projection(x, w_up, b_up, s, k, activation, save, t.up)
    rows = gemm.row_products(act, w_down, b_down, s, True, t.down)
    y = gemm.combine(rows, s.inverse, weights, tokens, k)
    return y, (hidden, *s) if save else _nothing_saved(x)


def _nothing_saved(x: Tensor) -> Saved:
    a, b, c, d, e = (x.new_empty(0, dtype=torch.int32) for _ in range(5))
    return x.new_empty(0, 0), a, b, c, d, e


def backward(
    dy: Tensor,
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    weights: Tensor,
    b_down: Tensor | None,
    saved: Saved,
    activation: str,
    bias_up: bool,
    frozen: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The launches of the backward pass: gradients of x, w_up, w_down, weights, b_up and b_down.

    Those of biases that there are none of are empty; frozen: so are those of all the experts' parameters.
    """
    bias_up, bias_down = bias_up and not frozen, b_down is not None and not frozen
    none = x.new_empty(0)
    hidden, s = saved[0], SortedSlots(*saved[1:])
    tokens, k = weights.shape
    if tokens * k == 0:
        dx, dweights = torch.zeros_like(x), torch.zeros_like(weights)
        dw_up, dw_down = (
            none.clone() if frozen else torch.zeros_like(w) for w in (w_up, w_down)
        )
        db_up = x.new_zeros(w_up.shape[:2]) if bias_up else none
        db_down = x.new_zeros(w_down.shape[:2]) if bias_down else none.clone()
        return dx, dw_up, dw_down, dweights, db_up, db_down
    t = _tiles(x, w_down, weights, activation)
    dhidden, scaled, dweights = gemm.activation_gradient(
        dy, w_down, b_down, hidden, weights, s, activation, t.dact
    )
    dw_up, dw_down, db_up, db_down = (none.clone() for _ in range(4))
    if not frozen:
        dw_down = gemm.weight_gradient(dy, scaled, s, k, t.dw, gather_p=True)
        dw_up = gemm.weight_gradient(dhidden, x, s, k, t.dw, gather_q=True)
    del scaled
    if bias_up:
        db_up = gemm.bias_gradient(dhidden, None, s, k)
    if bias_down:
        db_down = gemm.bias_gradient(dy, weights, s, k)
    rows = gemm.row_products(dhidden, w_up, None, s, False, t.dx)
    dx = gemm.combine(rows, s.inverse, None, tokens, k)
    return dx, dw_up, dw_down, dweights.to(weights.dtype), db_up, db_down


# ---- The operator -----------------------------------------------------------------------------------------------


@torch.library.custom_op("moe_course::fused_moe", mutates_args=())
def _forward_op(
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    b_up: Tensor | None,
    b_down: Tensor | None,
    activation: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    y, saved = forward(
        x, w_up, w_down, expert_ids, weights, b_up, b_down, activation, save
    )
    return y, *saved


@_forward_op.register_fake
def _(x, w_up, w_down, expert_ids, weights, b_up, b_down, activation, save):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not save:
        return y, *_nothing_saved(x)
    slots, num_experts = expert_ids.numel(), len(w_up)
    block_m = _tiles(x, w_down, expert_ids, activation).up.block_m
    ids = expert_ids.new_empty
    sizes = (
        slots,
        slots,
        num_experts + 1,
        num_experts + 1,
        max_tiles(slots, num_experts, block_m),
    )
    hidden = x.new_empty(slots, w_up.shape[1])
    return y, hidden, *(ids(size, dtype=torch.int32) for size in sizes)


@torch.library.custom_op("moe_course::fused_moe_backward", mutates_args=())
def _backward_op(
    dy: Tensor,
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    weights: Tensor,
    b_down: Tensor | None,
    saved: list[Tensor],
    activation: str,
    bias_up: bool,
    frozen: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    hidden, order, inverse, offsets, tile_offsets, tile_expert = saved
    return backward(
        dy, x, w_up, w_down, weights, b_down,
        (hidden, order, inverse, offsets, tile_offsets, tile_expert),
        activation, bias_up, frozen,
    )  # fmt: skip


@_backward_op.register_fake
def _(dy, x, w_up, w_down, weights, b_down, saved, activation, bias_up, frozen):
    def empty(given: Tensor) -> Tensor:
        return torch.empty_like(given, memory_format=torch.contiguous_format)

    dw_up, dw_down = (x.new_empty(0) if frozen else empty(w) for w in (w_up, w_down))
    db_up = x.new_empty(w_up.shape[:2] if bias_up and not frozen else 0)
    bias_down = b_down is not None and not frozen
    db_down = x.new_empty(w_down.shape[:2] if bias_down else 0)
    return empty(x), dw_up, dw_down, empty(weights), db_up, db_down


def _setup(ctx, inputs, output) -> None:
    x, w_up, w_down, _, weights, b_up, b_down, ctx.activation, _ = inputs
    _, *saved = output
    ctx.mark_non_differentiable(*saved)
    ctx.bias_up = b_up is not None
    ctx.save_for_backward(x, w_up, w_down, weights, b_down, *saved)


def _autograd(ctx, dy, *_):
    x, w_up, w_down, weights, b_down, *saved = ctx.saved_tensors
    dy = dy if dy.stride(-1) == 1 else dy.contiguous()
    # A gradient of the experts is a product as large as each of the others, and as large as the experts.
    frozen = not any(ctx.needs_input_grad[i] for i in (1, 2, 5, 6))
    dx, dw_up, dw_down, dweights, db_up, db_down = _backward_op(
        dy, x, w_up, w_down, weights, b_down, saved,
        ctx.activation, ctx.bias_up, frozen,
    )  # fmt: skip
    if frozen:
        return dx, None, None, None, dweights, None, None, None, None
    return (
        dx, dw_up, dw_down, None, dweights,
        db_up if ctx.bias_up else None, None if b_down is None else db_down,
        None, None,
    )  # fmt: skip


_forward_op.register_autograd(_autograd, setup_context=_setup)


def _check(
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    activation: str,
    b_up: Tensor | None,
    b_down: Tensor | None,
) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}"
        )
    if x.ndim != 2 or w_down.ndim != 3:
        raise ValueError(
            f"x must be [T, D] and w_down [E, D, F], got {list(x.shape)} and {list(w_down.shape)}"
        )
    tokens, width = x.shape
    num_experts, _, hidden = w_down.shape
    if min(num_experts, w_down.shape[1], hidden) < 1:
        raise ValueError(f"w_down must not be empty, got {list(w_down.shape)}")
    rows = hidden * (2 if activation in gemm.GATED else 1)
    k = expert_ids.shape[1] if expert_ids.ndim == 2 else 0
    wanted = {
        "w_down": (w_down, (num_experts, width, hidden)),
        "w_up": (w_up, (num_experts, rows, width)),
        "expert_ids": (expert_ids, (tokens, k)),
        "weights": (weights, (tokens, k)),
        "b_up": (b_up, (num_experts, rows)),
        "b_down": (b_down, (num_experts, width)),
    }
    for name, (given, shape) in wanted.items():
        if given is None:
            continue
        if given.shape != shape:
            raise ValueError(
                f"{name} must be {list(shape)} for x {list(x.shape)}, {num_experts} experts of width {hidden} and "
                f"activation {activation!r}, got {list(given.shape)}"
            )
        if given.device != x.device:
            raise ValueError(
                f"{name} is on {given.device} and x on {x.device}: move both to one device"
            )
    for name, given in (
        ("x", x), ("w_up", w_up), ("w_down", w_down), ("b_up", b_up), ("b_down", b_down),
    ):  # fmt: skip
        if given is not None and (given.dtype not in DTYPES or given.dtype != x.dtype):
            raise ValueError(
                "x, the expert weights and their biases must share one dtype of float32, float16 and bfloat16, "
                f"got {name} in {given.dtype} and x in {x.dtype}"
            )
    if weights.dtype not in DTYPES:
        raise ValueError(
            f"weights must be float32, float16 or bfloat16, got {weights.dtype}"
        )
    if expert_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"expert_ids must be int32 or int64, got {expert_ids.dtype}")
    if INTERPRETED is False and not x.is_cuda:
        raise ValueError(
            f"the compiled kernels need tensors on a GPU, got {x.device}: move them there, or set TRITON_INTERPRET=1 "
            "before the first import to run them on the CPU"
        )
    if os.environ.get("MOE_COURSE_DEBUG") == "1" and expert_ids.numel():
        low, high = expert_ids.min().item(), expert_ids.max().item()
        if low < 0 or high > num_experts:
            raise ValueError(
                f"expert ids must lie in 0..{num_experts} ({num_experts} skips the slot), got {low}..{high}"
            )


def fused_moe(
    x: Float[Tensor, "T D"],
    w_up: Float[Tensor, "E rows D"],
    w_down: Float[Tensor, "E D F"],
    expert_ids: Int[Tensor, "T K"],
    weights: Float[Tensor, "T K"],
    *,
    activation: str = "swiglu",
    b_up: Float[Tensor, "E rows"] | None = None,
    b_down: Float[Tensor, "E D"] | None = None,
) -> Float[Tensor, "T D"]:
    """The weighted sum over each token's experts.

        y_t = sum over k of weights[t, k] · (W_down act(W_up x_t + b_up) + b_down)     of expert expert_ids[t, k]

    activation: "swiglu", "clamped_swiglu" (gpt-oss), w_up [E, 2F, D] with the gate's rows first; "gelu" (the exact one)
        and "relu", w_up [E, F, D].
    expert_ids: an id of E skips its slot, which then contributes exactly 0; so does any other id that is no expert,
        unless MOE_COURSE_DEBUG=1 is set: then it is an error (at the price of a look at the ids).

    Differentiable in x, both weights, both biases and `weights`, once. x, weights and biases in float32, float16 or
    bfloat16; products are summed in float32 (float32 ones by three tf32 products on a GPU) and each intermediate result
    is rounded to the dtype of x (for few tokens without gradients, the activation is not). No atomics decide anything:
    the same input gives the same bits. Nothing waits for the host: it can be captured in a CUDA graph.

    For the backward pass it keeps x (2·T·D bytes in 16 bits), what stands before the activation (2·T·K·rows bytes) and
    the order of the slots; the activation is computed again (arXiv:2512.14080, section 3).

    Raises ValueError on shapes, dtypes or devices that do not fit, before anything runs.
    """
    _check(x, w_up, w_down, expert_ids, weights, activation, b_up, b_down)
    if INTERPRETED and torch.bfloat16 in (x.dtype, weights.dtype):
        # Triton's interpreter multiplies the raw bits of bfloat16: compute in float32, round at the end.
        y = fused_moe(
            x.float(), w_up.float(), w_down.float(), expert_ids, weights.float(),
            activation=activation,
            b_up=None if b_up is None else b_up.float(),
            b_down=None if b_down is None else b_down.float(),
        )  # fmt: skip
        return y.to(x.dtype)
    x = x if x.stride(1) == 1 else x.contiguous()
    if expert_ids.dtype == torch.int64:  # whose upper half a cast would drop
        expert_ids = expert_ids.clamp(-1, len(w_up)).to(torch.int32)
    inputs = [
        None if given is None else given.contiguous()
        for given in (w_up, w_down, expert_ids, weights, b_up, b_down)
    ]
    save = torch.is_grad_enabled() and any(
        given is not None and given.requires_grad for given in (x, *inputs)
    )
    y, *_ = _forward_op(x, *inputs, activation, save)
    return y
