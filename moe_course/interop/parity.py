"""How close a block of `transformers` and the MoE that `from_hf` makes of it are, over random configurations.

    python -m moe_course.interop.parity [--configs 20] [--record]       the table, in about half a minute

Everything is computed when asked for; what is random follows from a seed.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from moe_course import records
from moe_course.interop.huggingface import from_hf, load_transformers
from moe_course.layers.moe import MoE
from moe_course.layers.routing import (
    Routing,
    TopKRouter,
    select,
    sigmoid_top_k,
    softmax_top_k,
)

RECORD = records.FOLDER / "parity.json"

Config = dict[str, Any]
MARGIN = 1e-5  # a token whose k-th and next score are closer is a tie: either is right


# --- Random blocks -------------------------------------------------------------------


def random_block(name: str, seed: int) -> nn.Module:
    """A block of `transformers`, for instance "GptOssMLP", of random size, options and float32 weights, in eval mode.

    Raises KeyError on a name that is not in BLOCKS, ImportError without transformers.
    """
    r = Random(f"{name} {seed}")
    folder, config_class, draw = BLOCKS[name]
    transformers = load_transformers()
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    config = getattr(transformers, config_class)(**draw(r))
    config._experts_implementation = "eager"
    block: nn.Module = getattr(module, name)(config)
    # Their own are empty or zero. A wide first matrix reaches the clamp of gpt-oss.
    generator = torch.Generator().manual_seed(r.randrange(2**32))
    gain = r.choice([1.0, 4.0])
    for key, weight in [*block.named_parameters(), *block.named_buffers()]:
        fan_in = weight.shape[-2 if name == "GptOssMLP" and weight.ndim == 3 else -1]
        std = gain * fan_in**-0.5 if "experts" in key else fan_in**-0.5
        if weight.ndim == 1 or "bias" in key:
            std = 0.3
        weight.data.normal_(0, std, generator=generator)
    return block.eval()


def _sizes(r: Random) -> Config:
    return {"hidden_size": r.randint(3, 40)}


def _experts(r: Random, key: str) -> Config:
    experts = r.choice([1, 2, 3, 4, 8, 13, 16, 64])
    return {key: experts, "num_experts_per_tok": r.randint(1, min(experts, 8))}


def _hidden(r: Random) -> int:
    return r.randint(1, 40)


def _coin(r: Random) -> bool:
    return r.random() < 0.5


def _mixtral(r: Random) -> Config:
    hidden = {"intermediate_size": _hidden(r)}
    return _sizes(r) | _experts(r, "num_local_experts") | hidden


def _qwen(r: Random) -> Config:
    options = {"moe_intermediate_size": _hidden(r), "norm_topk_prob": _coin(r)}
    return _sizes(r) | _experts(r, "num_experts") | options


def _qwen2_moe(r: Random) -> Config:
    return _qwen(r) | {"shared_expert_intermediate_size": _hidden(r)}


def _olmoe(r: Random) -> Config:
    options = {"intermediate_size": _hidden(r), "norm_topk_prob": _coin(r)}
    return _sizes(r) | _experts(r, "num_experts") | options


def _deepseek(r: Random) -> Config:
    groups = r.choice([1, 2, 4, 8])
    size = r.randint(2, 5)  # version 3 scores a group by its best two
    kept = r.randint(1, groups)
    return _sizes(r) | {
        "num_attention_heads": 1,
        "n_routed_experts": groups * size,
        "n_group": groups,
        "topk_group": kept,
        "num_experts_per_tok": r.randint(1, min(kept * size, 8)),
        "moe_intermediate_size": _hidden(r),
        "n_shared_experts": r.randint(1, 3),
        "routed_scaling_factor": r.choice([1.0, 2.5, 16.0]),
    }


def _deepseek_v2(r: Random) -> Config:
    method = r.choice(["greedy", "group_limited_greedy"])
    return _deepseek(r) | {"topk_method": method, "mlp_bias": _coin(r)}


def _deepseek_v3(r: Random) -> Config:
    return _deepseek(r) | {"norm_topk_prob": _coin(r)}


def _switch(r: Random) -> Config:
    return {
        "d_model": r.randint(3, 40),
        "d_ff": _hidden(r),
        "num_experts": r.choice([1, 2, 3, 4, 8, 13, 16, 64]),
        "expert_capacity": r.choice([1, 2, 5, 64]),
        "router_bias": _coin(r),
        "dense_act_fn": r.choice(["relu", "gelu"]),
    }


BLOCKS: dict[str, tuple[str, str, Callable[[Random], Config]]] = {
    "MixtralSparseMoeBlock": ("mixtral", "MixtralConfig", _mixtral),
    "Qwen2MoeSparseMoeBlock": ("qwen2_moe", "Qwen2MoeConfig", _qwen2_moe),
    "Qwen3MoeSparseMoeBlock": ("qwen3_moe", "Qwen3MoeConfig", _qwen),
    "OlmoeSparseMoeBlock": ("olmoe", "OlmoeConfig", _olmoe),
    "DeepseekV2Moe": ("deepseek_v2", "DeepseekV2Config", _deepseek_v2),
    "DeepseekV3MoE": ("deepseek_v3", "DeepseekV3Config", _deepseek_v3),
    "GptOssMLP": ("gpt_oss", "GptOssConfig", _mixtral),
    "SwitchTransformersSparseMLP": (
        "switch_transformers",
        "SwitchTransformersConfig",
        _switch,
    ),
}


def random_tokens(moe: MoE, seed: int) -> Tensor:
    """x [B, tokens of a sequence, D], standard normal, in which no token's choice is a tie.

    At a tie both choices are right, and rounding decides.
    """
    r = Random(seed)
    shape = (*r.choice([(1, 1), (1, 2), (2, 7), (3, 11), (1, 33), (5, 13)]), -1)
    generator = torch.Generator().manual_seed(seed)
    assert isinstance(moe.router, TopKRouter)
    while True:
        x = torch.randn(*shape[:2], moe.experts.width, generator=generator)
        if margin(moe.router, moe.router(x.flatten(0, 1))) >= MARGIN:
            return x


@torch.no_grad()
def margin(router: TopKRouter, routing: Routing) -> float:
    """The least gap of any token between what is chosen last and the best that is not: experts, and groups before."""
    scores = routing.probs
    if router.gate is sigmoid_top_k:
        assert router.correction is not None
        scores = routing.logits.sigmoid() + router.correction
    gap, groups = torch.inf, router.options.get("groups")
    if groups is not None:
        by_group = scores.unflatten(1, (groups.count, -1))
        group_scores = by_group.topk(groups.best).values.sum(2)
        gap = _gap(group_scores, groups.kept)
        kept = torch.zeros_like(group_scores, dtype=torch.bool)
        kept = kept.scatter(1, select(group_scores, groups.kept), True)
        scores = by_group.masked_fill(~kept[:, :, None], -torch.inf).flatten(1)
    return min(gap, _gap(scores, router.k))


def _gap(scores: Tensor, k: int) -> float:
    best = scores.sort(dim=1, descending=True).values
    if k == scores.shape[1]:
        return torch.inf
    return float((best[:, k - 1] - best[:, k]).min())


# --- The comparison ------------------------------------------------------------------


@dataclass(frozen=True)
class Parity:
    """How far a block and its MoE are apart: largest difference over largest value, unless it says otherwise."""

    same_experts: bool  # of every token
    output_error: float
    output_rms_error: (
        float  # root mean square of the difference over that of the output
    )
    gradient_error: float  # the worst of x and all parameters
    worst: str  # whose gradient that is


def compare(
    block: nn.Module,
    seed: int,
    dispatch: str = "grouped",
    dtype: torch.dtype = torch.float32,
) -> Parity:
    """The same random tokens, and the same gradient of the output, through a block and through its MoE.

    In bfloat16 both are given the experts and weights that the MoE's router chooses: the routers of most blocks round
    their logits, and choose others near a tie. The routers' own gradients are left out then.
    """
    x = random_tokens(from_hf(block), seed)
    theirs = copy.deepcopy(block).to(dtype)
    ours = from_hf(theirs)
    ours.dispatch = dispatch
    if dtype == torch.bfloat16:
        _give_both_the_same_routing(ours, theirs, x.to(dtype))
    x_ours, x_theirs = (x.to(dtype, copy=True).requires_grad_() for _ in range(2))
    y_ours, _, slots = ours(x_ours)
    y_theirs, their_choice = _run(theirs, x_theirs)
    our_choice = torch.zeros_like(their_choice)
    our_choice[slots.token, slots.expert] = True

    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    y_ours.backward(upstream.to(dtype))
    y_theirs.backward(upstream.to(dtype))
    in_our_layout = dict(from_hf(_of_gradients(theirs)).named_parameters())
    assert x_ours.grad is not None
    assert x_theirs.grad is not None
    gradients = {"x": (x_ours.grad, x_theirs.grad)}
    for name, weight in ours.named_parameters():
        if dtype == torch.bfloat16 and name.startswith("router"):
            continue  # it had no part in it
        assert weight.grad is not None
        gradients[name] = (weight.grad, in_our_layout[name])
    largest = max(
        float(theirs.detach().abs().max()) for _, theirs in gradients.values()
    )
    errors = {
        name: _error(*pair, largest if _is_zero(name, ours.router) else None)
        for name, pair in gradients.items()
    }
    worst = max(errors, key=lambda name: errors[name])
    return Parity(
        torch.equal(our_choice, their_choice),
        _error(y_ours, y_theirs),
        _rms_error(y_ours, y_theirs),
        errors[worst],
        worst,
    )


def _run(block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The block's output, and which experts it computes for which token: [T, E], true or false."""
    seen: list[Any] = []
    hook = _router(block).register_forward_hook(
        lambda module, inputs, output: seen.append(output)
    )
    y = block(x)
    hook.remove()
    if type(block).__name__ == "SwitchTransformersSparseMLP":
        choice = seen[0][0].flatten(0, 1).bool()
    else:
        logits, _, expert_ids = seen[0]
        choice = torch.zeros_like(logits, dtype=torch.bool).scatter(1, expert_ids, True)
    if isinstance(y, tuple):  # gpt-oss returns its scores, too
        y = y[0]
    return y, choice


def _router(block: Any) -> Any:
    return block.gate if hasattr(block, "gate") else block.router


def _give_both_the_same_routing(ours: MoE, theirs: nn.Module, x: Tensor) -> None:
    _, routing, slots = ours(x)
    assert routing is not None
    fixed = Routing(
        routing.expert_ids, routing.weights.detach(), routing.probs, routing.logits
    )
    for_them = (fixed.logits, fixed.weights, fixed.expert_ids)
    if type(theirs).__name__ == "SwitchTransformersSparseMLP":
        kept = torch.zeros_like(fixed.logits, dtype=torch.int64)
        kept[slots.token, slots.expert] = 1
        kept, weights = (each.view(*x.shape[:2], -1) for each in (kept, fixed.weights))
        for_them = (kept, weights, fixed.logits)
    ours.router.forward = lambda x, token_ids=None: fixed
    _router(theirs).forward = lambda x: for_them


def _of_gradients(block: nn.Module) -> nn.Module:
    """A copy of the block that holds gradients for weights, so that `from_hf` brings them into our layout."""
    holder = copy.deepcopy(block)
    for held, weight in zip(holder.parameters(), block.parameters(), strict=True):
        held.data.zero_()
        if weight.grad is not None:
            held.data.copy_(weight.grad)
    return holder


def _is_zero(name: str, router: Any) -> bool:
    """Whether this gradient is 0 but for rounding: a single renormalised weight is 1, whatever the router says."""
    free = router.gate is softmax_top_k or not router.options.get("normalise", True)
    return name.startswith("router") and router.k == 1 and not free


def _error(ours: Tensor, theirs: Tensor, scale: float | None = None) -> float:
    """The largest difference over `scale`, the largest of their values unless given."""
    difference = float((ours.detach().double() - theirs.detach().double()).abs().max())
    scale = float(theirs.detach().abs().max()) if scale is None else scale
    error = difference / scale if scale else difference
    return math.inf if math.isnan(error) else error  # max() and <= overlook NaN


def _rms_error(ours: Tensor, theirs: Tensor) -> float:
    # In bfloat16 the steadier one: a unit in the last place of one value is up to 1/128 of it.
    reference = theirs.detach().double()
    error = float((ours.detach().double() - reference).norm() / reference.norm())
    return math.inf if math.isnan(error) else error


# --- The table -----------------------------------------------------------------------


def parity_table(configs: int = 20) -> list[dict[str, Any]]:
    """One row for each block, over so many random configurations of it, each through grouped and loop dispatch."""
    rows = []
    for name in BLOCKS:
        found = [
            compare(random_block(name, seed), seed, dispatch)
            for seed in range(configs)
            for dispatch in ("grouped", "loop")
        ]
        rounded = [
            compare(random_block(name, seed), seed, dtype=torch.bfloat16)
            for seed in range(configs)
        ]
        rows.append(
            {
                "block": name,
                "configs": configs,
                "same_experts": all(p.same_experts for p in found),
                "output_error": max(p.output_error for p in found),
                "gradient_error": max(p.gradient_error for p in found),
                "output_rms_error_bf16": max(p.output_rms_error for p in rounded),
            }
        )
    return rows


def _print(rows: list[dict[str, Any]]) -> None:
    names = list(rows[0])
    print("| " + " | ".join(names) + " |")
    print("|" + "---|" * len(names))
    for row in rows:
        cells = [f"{v:.1e}" if isinstance(v, float) else str(v) for v in row.values()]
        print("| " + " | ".join(cells) + " |")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m moe_course.interop.parity")
    parser.add_argument("--configs", type=int, default=20, help="of each block")
    parser.add_argument("--record", action="store_true", help=f"write {RECORD}")
    options = parser.parse_args(arguments)
    if options.configs < 1:
        parser.error(f"--configs must be at least 1, got {options.configs}")
    rows = parity_table(options.configs)
    _print(rows)
    if options.record:
        command = (
            f"python -m moe_course.interop.parity --configs {options.configs} --record"
        )
        packages = ("torch", "transformers")
        records.save(records.measure("parity", command, rows, packages), RECORD)
    return 0


if __name__ == "__main__":
    sys.exit(main())
