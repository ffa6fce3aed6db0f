"""One MoE layer, computed by others: what the kernels are compared with.

Every peer gets the same tensors, contiguous and in one dtype; nothing is copied or converted inside the call. A peer
that is not installed, or cannot do a layer, says why instead.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_course.kernels import INTERPRETED
from moe_course.layers.experts import ACTIVATIONS


@dataclass(frozen=True)
class Layer:
    """Everything that a layer reads."""

    x: Tensor  # [T, D]
    w_up: Tensor  # [E, 2F or F, D]
    w_down: Tensor  # [E, D, F]
    ids: Tensor  # [T, K] int32
    weights: Tensor  # [T, K]
    activation: str = "swiglu"
    b_up: Tensor | None = None
    b_down: Tensor | None = None

    def leaves(self) -> list[Tensor]:
        """What has a gradient."""
        given = (self.x, self.w_up, self.w_down, self.weights, self.b_up, self.b_down)
        return [tensor for tensor in given if tensor is not None]


Peer = Callable[[Layer], Tensor]


class Unavailable(Exception):
    """Why a peer does not take part."""


def grouped_product(rows: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """rows of expert e times w[e]^T by torch's own grouped product; offsets are the ends, [E] int32."""
    grouped = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
    return grouped(rows, w.transpose(1, 2), offs=offsets)


def looped_product(rows: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """The same, one matrix product for each expert: for the shapes and dtypes that torch's grouped product refuses."""
    ends = [0, *offsets.tolist()]
    parts = [
        rows[begin:end] @ matrix.T
        for matrix, begin, end in zip(w.unbind(0), ends, ends[1:], strict=False)
    ]
    return torch.cat(parts)


def torch_pipeline(
    layer: Layer, product: Callable[..., Tensor] = grouped_product
) -> Tensor:
    """Sort, gather, grouped product, activation, grouped product, weighted sum: the best of plain torch."""
    tokens, k = layer.ids.shape
    experts = len(layer.w_up)
    sorted_ids, order = layer.ids.reshape(-1).sort(stable=True)
    bounds = torch.arange(experts, device=layer.x.device, dtype=sorted_ids.dtype)
    offsets = torch.searchsorted(sorted_ids, bounds, right=True, out_int32=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    z = product(layer.x[order // k], layer.w_up, offsets)
    if layer.b_up is not None:
        z = z + layer.b_up[sorted_ids]
    rows = product(ACTIVATIONS[layer.activation](z), layer.w_down, offsets)
    if layer.b_down is not None:
        rows = rows + layer.b_down[sorted_ids]
    chosen = rows[inverse].view(tokens, k, -1)
    return torch.bmm(layer.weights.to(rows.dtype)[:, None, :], chosen)[:, 0]


def transformers_experts(layer: Layer) -> Peer:
    """The experts of a production block of `transformers`, which take their turn through torch's grouped product."""
    try:
        from transformers import GptOssConfig, Qwen3MoeConfig
        from transformers.integrations.moe import grouped_mm_experts_forward
        from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
    except ImportError as error:
        raise Unavailable(f"no transformers with grouped experts ({error})") from error
    experts, width, hidden = layer.w_down.shape
    sizes = {
        "hidden_size": width, "intermediate_size": hidden, "moe_intermediate_size": hidden,
        "num_experts": experts, "num_local_experts": experts,
    }  # fmt: skip
    given = {"gate_up_proj": layer.w_up, "down_proj": layer.w_down}
    if layer.activation == "clamped_swiglu" and layer.b_up is not None:
        config, module_type = GptOssConfig(**sizes), GptOssExperts
        assert layer.b_down is not None
        if layer.w_up.requires_grad:
            raise Unavailable("its weights are laid out otherwise: forward only")
        interleaved = layer.w_up.view(experts, 2, hidden, width).permute(0, 3, 2, 1)
        given = {
            "gate_up_proj": interleaved.reshape(experts, width, 2 * hidden),
            "gate_up_proj_bias": layer.b_up.view(experts, 2, hidden).mT.reshape(experts, -1),
            "down_proj": layer.w_down.mT.contiguous(),
            "down_proj_bias": layer.b_down,
        }  # fmt: skip
    elif layer.activation == "swiglu" and layer.b_up is None:
        config, module_type = Qwen3MoeConfig(**sizes), Qwen3MoeExperts
    else:
        raise Unavailable(f"has no experts with {layer.activation} and these biases")
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        module = module_type(config)
    module._parameters.update(given)  # the very tensors, not copies
    ids = layer.ids.long()
    # Not module(...): importing scattermoe replaces the forward of gpt-oss.
    return lambda given: grouped_mm_experts_forward(module, given.x, ids, given.weights)


def liger(layer: Layer) -> Peer:
    """LigerFusedMoEFunction of liger-kernel, which tunes itself on the first call of a shape."""
    if INTERPRETED:  # there is no clock to tune by
        os.environ.setdefault("LIGER_FUSED_MOE_AUTOTUNE", "0")
    try:
        from liger_kernel.ops.fused_moe import LigerFusedMoEFunction
    except ImportError as error:
        raise Unavailable(f"liger-kernel is not installed ({error})") from error
    _plain_swiglu(layer)
    _shorter_tuning("liger_kernel.ops.fused_moe_kernels")
    apply = LigerFusedMoEFunction.apply
    return lambda given: apply(
        given.x, given.w_up, given.w_down, given.ids, given.weights
    )


def scattermoe(layer: Layer) -> Peer:
    """Two parallel_linear of scattermoe, as in its GLUMLP, with the halves in our order."""
    try:
        from scattermoe.parallel_experts import flatten_sort_count, parallel_linear
    except ImportError as error:
        raise Unavailable(f"scattermoe is not installed ({error})") from error
    _plain_swiglu(layer)
    experts, k = len(layer.w_up), layer.ids.shape[1]
    ids = layer.ids.long()

    def run(given: Layer) -> Tensor:
        sort = flatten_sort_count(ids, num_experts=experts)
        w_up, w_down = given.w_up.permute(0, 2, 1), given.w_down.permute(0, 2, 1)
        z = parallel_linear(given.x, w_up, k, *sort, grouped_out=True)
        act = ACTIVATIONS["swiglu"](z)
        return parallel_linear(
            act, w_down, 1, *sort, gates=given.weights, grouped_in=True
        )

    return run


def triton_kernels(layer: Layer) -> Peer:
    try:
        import triton_kernels  # noqa: F401
    except ImportError as error:
        raise Unavailable(f"triton_kernels is not installed ({error})") from error
    raise Unavailable("triton_kernels is here, but this file has no adapter for it")


def _plain_swiglu(layer: Layer) -> None:
    if layer.activation != "swiglu" or layer.b_up is not None:
        raise Unavailable("plain SwiGLU without biases only")


def _shorter_tuning(module: str) -> None:
    """Triton's autotuner spends 125 ms on each candidate; 25 tell them apart as well, at these sizes."""
    import triton
    from triton.runtime.autotuner import Autotuner

    def bench(call: Callable[[], object], quantiles: object) -> object:
        return triton.testing.do_bench(call, warmup=5, rep=20, quantiles=quantiles)

    for kernel in vars(sys.modules[module]).values():
        if isinstance(kernel, Autotuner):
            kernel._do_bench = bench


# A contender's name -> how to get it for a layer. Sorted by where they can be had: in torch, then beside it.
PEERS: dict[str, Callable[[Layer], Peer]] = {
    "torch grouped_mm": lambda layer: torch_pipeline,
    "transformers": transformers_experts,
    "liger": liger,
    "scattermoe": scattermoe,
    "triton_kernels": triton_kernels,
}
# Reads a count back to the host: no CUDA graph can hold it.
SYNCHRONISES = {"liger"}


def plain(layer: Layer) -> Layer:
    """The same sizes with plain SwiGLU and no biases, for peers that know nothing else."""
    return replace(layer, activation="swiglu", b_up=None, b_down=None)
