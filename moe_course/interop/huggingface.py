"""Weights of MoE layers, out of the blocks of `transformers` (5.x) and back into them.

    block = model.model.layers[0].mlp      # the MoE block of one layer
    moe = from_hf(block)                   # the same function, with its own copy of the weights
    ...                                    # train it, prune it, measure it
    to_hf(moe, block)                      # and the model runs with the new weights

Each block is described twice: what it computes (a function that builds an empty MoE) and where its weights lie
(`_pairs`). Both directions read the same two descriptions, so a round trip is exact, to the bit.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_course.layers.experts import CLAMP, Experts
from moe_course.layers.ffn import SwiGLU
from moe_course.layers.moe import MoE
from moe_course.layers.routing import (
    Gate,
    Groups,
    TopKRouter,
    renormalised,
    sigmoid_top_k,
    softmax_top_k,
    top_k_softmax,
)


def from_hf(block: nn.Module) -> MoE:
    """The MoE that computes what this block of `transformers` computes, with a copy of its weights.

    block: a MixtralSparseMoeBlock, Qwen2MoeSparseMoeBlock, Qwen3MoeSparseMoeBlock, OlmoeSparseMoeBlock, DeepseekV2Moe,
        DeepseekV3MoE, GptOssMLP or SwitchTransformersSparseMLP, of any size, dtype and device.

    In float32 both choose the same experts, except at a tie, where the lowest id wins here. In bfloat16 most blocks
    round the logits and this router does not, so tokens near a tie may go elsewhere.

    Switch: tokens beyond the capacity of their sequence are dropped; transformers 5.0 and some releases after it kept
    them all (its issue 48293). In training, dropout inside the experts is left out, and jitter reaches the router
    alone, as the paper has it.

    Raises ValueError on anything but such a block, on weights whose shapes do not fit together, and on what MoE cannot
    express; ImportError without transformers.
    """
    moe = _empty(block)
    experts = next(block.experts.parameters())  # type: ignore[union-attr]
    moe.to(experts.dtype)
    moe.router.to(_their_router(block).weight.dtype)
    moe.to_empty(device=experts.device)
    _copy((pair.theirs, pair.ours) for pair in _pairs(moe, block))
    return moe.train(block.training)


def to_hf(moe: MoE, block: nn.Module) -> nn.Module:
    """Write the weights of `moe` into a block of `transformers` that computes the same function; returns the block.

    The block keeps its dtype (a narrower one rounds) and its device. `moe.dispatch` may be any: it changes no value.

    Raises ValueError when the block cannot hold this MoE (another gate, another size, a part that it lacks), naming
    every difference, and as `from_hf` does. The block is unchanged then.
    """
    if type(moe) is not MoE or type(moe.router) is not TopKRouter:
        given = _name(type(moe))
        if isinstance(moe, MoE):
            given = f"a {given} with {_name(type(moe.router))}"
        raise ValueError(f"to_hf takes a MoE with a TopKRouter, got {given}")
    theirs, ours = _facts(_empty(block)), _facts(moe)
    differences = [
        f"{fact}: {_show(theirs.get(fact))} in the block, {_show(ours.get(fact))} in the MoE"
        for fact in theirs | ours
        if theirs.get(fact) != ours.get(fact)
    ]
    if differences:
        raise ValueError(
            f"this {type(block).__name__} cannot hold this MoE ({'; '.join(differences)})"
        )
    _copy((pair.ours, pair.theirs) for pair in _checked(moe, block))
    return block


# --- What each block computes --------------------------------------------------------


def _mixtral(block: Any) -> MoE:
    if block.jitter_noise:
        raise ValueError(
            "MixtralSparseMoeBlock jitters what its experts read, MoE only what its router reads: "
            f"jitter_noise must be 0, got {block.jitter_noise}"
        )
    experts = _swiglu_experts(block.experts)
    return MoE(_router(block.gate, experts, renormalised), experts)


def _qwen3_moe(block: Any) -> MoE:
    experts = _swiglu_experts(block.experts)
    gate = renormalised if block.gate.norm_topk_prob else softmax_top_k
    return MoE(_router(block.gate, experts, gate), experts)


def _qwen2_moe(block: Any) -> MoE:
    moe = _qwen3_moe(block)
    moe.shared = _swiglu(block.shared_expert, moe.experts)
    moe.shared_gate = nn.Linear(moe.experts.width, 1, bias=False)
    return moe


def _deepseek_v2(block: Any) -> MoE:
    limited = block.gate.topk_method == "group_limited_greedy"
    groups = _groups(block.gate, best=1) if limited else None
    return _deepseek(block, softmax_top_k, groups=groups)


def _deepseek_v3(block: Any) -> MoE:
    groups, normalise = _groups(block.gate, best=2), block.gate.norm_topk_prob
    return _deepseek(block, sigmoid_top_k, groups=groups, normalise=normalise)


def _deepseek(block: Any, gate: Gate, **options: Any) -> MoE:
    experts = _swiglu_experts(block.experts)
    scale = block.gate.routed_scaling_factor
    router = _router(block.gate, experts, gate, scale=scale, **options)
    return MoE(router, experts, shared=_swiglu(block.shared_experts, experts))


def _gpt_oss(block: Any) -> MoE:
    theirs = block.experts
    if (theirs.alpha, theirs.limit) != (1.702, CLAMP):
        raise ValueError(
            f"MoE has the activation of gpt-oss with swiglu_alpha 1.702 and swiglu_limit {CLAMP}, "
            f"got {theirs.alpha} and {theirs.limit}"
        )
    num_experts, hidden, width = _sizes("down_proj", theirs.down_proj, 3)
    experts = Experts(num_experts, width, hidden, "clamped_swiglu", bias=True)
    return MoE(_router(block.router, experts, top_k_softmax, bias=True), experts)


def _switch(block: Any) -> MoE:
    theirs, first = block.router, block.experts["expert_0"]
    if theirs.dtype != torch.float32:
        raise ValueError(
            f"the router of MoE computes in float32, got router_dtype {theirs.dtype}"
        )
    hidden, width = _sizes("expert_0.wi", first.wi.weight, 2)
    activation = _activation(first.act, ["relu", "gelu"])
    experts = Experts(len(block.experts), width, hidden, activation)
    router = TopKRouter(
        width,
        len(block.experts),
        1,
        softmax_top_k,
        bias=theirs.classifier.bias is not None,
        jitter=theirs.jitter_noise,
    )
    return MoE(router, experts, sequence_capacity=theirs.expert_capacity)


def _router(theirs: Any, experts: Experts, gate: Gate, **options: Any) -> TopKRouter:
    return TopKRouter(experts.width, experts.num_experts, theirs.top_k, gate, **options)


def _groups(theirs: Any, best: int) -> Groups:
    return Groups(theirs.num_group, theirs.topk_group, best)


def _swiglu_experts(theirs: Any) -> Experts:
    _activation(theirs.act_fn, ["silu"])
    num_experts, width, hidden = _sizes("down_proj", theirs.down_proj, 3)
    return Experts(num_experts, width, hidden, "swiglu")


def _swiglu(theirs: Any, experts: Experts) -> SwiGLU:
    _activation(theirs.act_fn, ["silu"])
    hidden, _ = _sizes("the shared gate_proj", theirs.gate_proj.weight, 2)
    return SwiGLU(experts.width, hidden, bias=theirs.gate_proj.bias is not None)


def _activation(function: Any, allowed: list[str]) -> str:
    # By what it computes: transformers has several classes for one function.
    z = torch.linspace(-9, 9, 99, device="cpu")
    for name in allowed:
        if torch.equal(function(z), getattr(F, name)(z)):
            return name
    raise ValueError(
        f"MoE has such experts with {' or '.join(allowed)} only, got {function}"
    )


def _sizes(name: str, weight: Tensor, dimensions: int) -> torch.Size:
    if weight.ndim != dimensions:
        raise ValueError(
            f"{name} must have {dimensions} dimensions, got shape {list(weight.shape)}"
        )
    return weight.shape


# --- Where their weights lie ---------------------------------------------------------


class _Pair(NamedTuple):
    """One weight, or a part of it, as two views of the same shape."""

    name: str  # in the block
    ours: Tensor
    theirs: Tensor


def _pairs(moe: MoE, block: Any) -> Iterator[_Pair]:
    """Every weight of the block beside the part of `moe` that it belongs to."""
    router: Any = moe.router
    theirs = _their_router(block)
    yield _Pair("the router's weight", router.weight, theirs.weight)
    if router.bias is not None:
        yield _Pair("the router's bias", router.bias, theirs.bias)
    if router.correction is not None:
        correction = theirs.e_score_correction_bias
        yield _Pair("e_score_correction_bias", router.correction, correction)
    yield from _BLOCKS[type(block).__name__].expert_pairs(moe.experts, block.experts)
    if moe.shared is not None:
        singular = hasattr(block, "shared_expert")
        shared = block.shared_expert if singular else block.shared_experts
        for name in ("gate", "up", "down"):
            linear, layer = getattr(moe.shared, name), getattr(shared, f"{name}_proj")
            yield _Pair(f"the shared {name}_proj", linear.weight, layer.weight)
            if linear.bias is not None:
                yield _Pair(f"the shared {name}_proj's bias", linear.bias, layer.bias)
    if moe.shared_gate is not None:
        ours: Any = moe.shared_gate
        theirs = block.shared_expert_gate
        yield _Pair("shared_expert_gate", ours.weight, theirs.weight)


def _stacked(ours: Experts, theirs: Any) -> Iterator[_Pair]:
    """As here: [E, 2F, D], the rows of the gate first, and [E, D, F]."""
    yield _Pair("gate_up_proj", ours.w_up, theirs.gate_up_proj)
    yield _Pair("down_proj", ours.w_down, theirs.down_proj)


def _interleaved(ours: Experts, theirs: Any) -> Iterator[_Pair]:
    """Transposed, [E, D, 2F] and [E, F, D], and in the last dimension gate and up take turns."""
    assert ours.b_up is not None
    assert ours.b_down is not None
    for turn, name in enumerate(("gate", "up")):
        rows = slice(turn * ours.hidden, (turn + 1) * ours.hidden)
        weight = theirs.gate_up_proj[..., turn::2].mT
        bias = theirs.gate_up_proj_bias[:, turn::2]
        label = f"the {name} in gate_up_proj"
        yield _Pair(f"{label}, transposed,", ours.w_up[:, rows], weight)
        yield _Pair(f"{label}_bias", ours.b_up[:, rows], bias)
    yield _Pair("down_proj, transposed,", ours.w_down, theirs.down_proj.mT)
    yield _Pair("down_proj_bias", ours.b_down, theirs.down_proj_bias)


def _separate(ours: Experts, theirs: Any) -> Iterator[_Pair]:
    """A module for each expert."""
    for e in range(ours.num_experts):
        expert = theirs[f"expert_{e}"]
        yield _Pair(f"expert_{e}.wi", ours.w_up[e], expert.wi.weight)
        yield _Pair(f"expert_{e}.wo", ours.w_down[e], expert.wo.weight)


def _their_router(block: Any) -> Any:
    if hasattr(block, "gate"):
        return block.gate
    return getattr(block.router, "classifier", block.router)


class _Block(NamedTuple):
    build: Callable[[Any], MoE]
    expert_pairs: Callable[[Experts, Any], Iterator[_Pair]]


_BLOCKS = {
    "MixtralSparseMoeBlock": _Block(_mixtral, _stacked),
    "Qwen2MoeSparseMoeBlock": _Block(_qwen2_moe, _stacked),
    "Qwen3MoeSparseMoeBlock": _Block(_qwen3_moe, _stacked),
    "OlmoeSparseMoeBlock": _Block(_qwen3_moe, _stacked),
    "DeepseekV2Moe": _Block(_deepseek_v2, _stacked),
    "DeepseekV3MoE": _Block(_deepseek_v3, _stacked),
    "GptOssMLP": _Block(_gpt_oss, _interleaved),
    "SwitchTransformersSparseMLP": _Block(_switch, _separate),
}


# --- Checks, and the copy ------------------------------------------------------------


def load_transformers() -> Any:
    """The package, which is large and optional: imported on the first call. Raises ImportError without it."""
    try:
        return importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        raise ImportError(
            "moe_course.interop needs transformers: pip install 'moe_course[parity]'"
        ) from error


def _empty(block: Any) -> MoE:
    """The MoE of this block on the meta device: every size and option, no weights."""
    version = load_transformers().__version__
    kind = type(block)
    # Models from the hub that bring their own code have classes of these names, and other layouts.
    if kind.__name__ not in _BLOCKS or not kind.__module__.startswith("transformers."):
        raise ValueError(
            f"expected a MoE block of transformers ({', '.join(_BLOCKS)}), got {_name(kind)}; "
            "of a model, give one layer's block, for instance model.model.layers[0].mlp"
        )
    try:
        with torch.device("meta"):
            moe = _BLOCKS[kind.__name__].build(block)
        _checked(moe, block)
    except AttributeError as error:
        raise ValueError(
            f"this {kind.__name__} is not laid out as transformers 5 lays it out (quantised, wrapped, "
            f"or transformers {version} changed it): {error}"
        ) from error
    return moe


def _checked(moe: MoE, block: Any) -> list[_Pair]:
    pairs = list(_pairs(moe, block))
    for name, ours, theirs in pairs:
        if ours.shape != theirs.shape:  # copy_ would broadcast
            raise ValueError(
                f"{name} of this {type(block).__name__} must have shape {list(ours.shape)} "
                f"to go with the other weights, got {list(theirs.shape)}"
            )
    return pairs


def _facts(moe: MoE) -> dict[str, Any]:
    """All that decides which function a MoE computes, weights aside."""
    router: Any = moe.router
    experts, shared = moe.experts, moe.shared
    options = {
        name: parameter.default
        for name, parameter in inspect.signature(router.gate).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    } | router.options
    groups = options.get("groups")
    if groups is not None and groups.kept == groups.count:
        options["groups"] = None  # all are kept: no limit
    return {
        "width": experts.width,
        "experts": experts.num_experts,
        "hidden width": experts.hidden,
        "activation": experts.activation,
        "biases of the experts": experts.b_up is not None,
        "gate": router.gate,
        "k": router.k,
        **options,
        "shape of the router": list(router.weight.shape),
        "bias of the router": router.bias is not None,
        "jitter": router.jitter,
        "shared expert": None if shared is None else _layer(shared),
        "shared gate": None if moe.shared_gate is None else _layer(moe.shared_gate),
        "capacity_factor": moe.capacity_factor,
        "sequence_capacity": moe.sequence_capacity,
    }


def _layer(module: nn.Module) -> str:
    shapes = ", ".join(
        f"{name} {list(weight.shape)}" for name, weight in module.named_parameters()
    )
    return f"{type(module).__name__} ({shapes})"


def _show(fact: Any) -> str:
    return str(getattr(fact, "__name__", fact))


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


@torch.no_grad()
def _copy(weights: Iterable[tuple[Tensor, Tensor]]) -> None:
    for source, target in weights:
        target.copy_(source)
