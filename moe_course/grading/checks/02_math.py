"""Checks of exercise 02: gates, dispatch, gradients and FLOPs of a sparse layer.

The oracles here are loops over tokens and experts in plain Python; they do not call moe_course.layers.
"""

from __future__ import annotations

from random import Random
from typing import Any

import torch
from torch import Tensor

from moe_course.grading.core import (
    Answer,
    Exercise,
    Failure,
    Invariant,
    Question,
    describe,
    expect_count,
    shown,
)
from moe_course.grading.tensors import (
    compare,
    cost,
    expect_tensor,
    generator,
    normal,
    taking_gradients,
)


def _best(scores: Tensor, k: int) -> list[int]:
    """The k largest, of equal ones those with the lowest index."""
    values = scores.tolist()
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]


# 02.1


def _gate_matrix(logits: Tensor, k: int) -> Tensor:
    gate = torch.zeros_like(logits)
    for t, row in enumerate(logits):
        kept = _best(row, k)
        gate[t, kept] = torch.softmax(row[kept], dim=0)
    return gate


def _gate_values(answer: Answer, rng: Random) -> None:
    cases: list[dict[str, Any]] = [{"logits": torch.tensor([[0.0, 1.0, 2.0]]), "k": 2}]
    for tokens, experts in ((2, 3), (5, 4), (1, 7), (13, 9)):
        cases.append(
            {
                "logits": 3 * normal(rng, tokens, experts),
                "k": rng.randint(2, experts - 1),
            }
        )
    expect_tensor(answer, cases, _gate_matrix)


def _gate_limits(answer: Answer, rng: Random) -> None:
    ties = torch.tensor([[1.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    cases = [{"logits": ties, "k": k} for k in (1, 2, 3, 4)]
    # Nearly equal is not equal: no tie to be broken by a small number added to each logit.
    nearly = torch.tensor([[0.0, 1e-12, 2e-12]], dtype=torch.float64)
    # exp overflows unless each row's own maximum is taken off, and -999 is no minus infinity
    large = torch.tensor(
        [[1000.0, 999.0, -1000.0], [-1000.0, -1001.0, -1002.0]], dtype=torch.float64
    )
    cases += [{"logits": nearly, "k": 1}, {"logits": large, "k": 2}]
    cases.append({"logits": torch.zeros(0, 5), "k": 2})
    # 17 equal logits and more: from there on torch.argsort no longer keeps their order
    cases.append({"logits": torch.zeros(3, 64), "k": 8})
    expect_tensor(answer, cases, _gate_matrix)


# 02.2


def _biased_gate(logits: Tensor, bias: Tensor, k: int, scale: float) -> Tensor:
    scores = torch.sigmoid(logits)
    gate = torch.zeros_like(logits)
    for t in range(len(logits)):
        kept = _best(scores[t] + bias, k)
        gate[t, kept] = scale * scores[t, kept] / scores[t, kept].sum()
    return gate


def _biased_values(answer: Answer, rng: Random) -> None:
    by_hand = {
        "logits": torch.tensor([[0.0, 1.0, 2.0]]),
        "bias": torch.tensor([2.0, 0.0, 0.0]),
        "k": 2,
        "scale": 1.0,
    }
    # All biased scores negative, and sigmoid and softmax pick different experts.
    negative = torch.tensor([-1.0, -1.2, -1.3])
    # Sigmoids near 0: nothing may be added to their sum.
    small = {
        "logits": torch.tensor([[-20.0, -21.0, -30.0]], dtype=torch.float64),
        "bias": torch.zeros(3, dtype=torch.float64),
    }
    cases: list[dict[str, Any]] = [
        by_hand,
        by_hand | {"k": 1, "scale": 2.5},
        by_hand | {"bias": negative},
        by_hand | small,
    ]
    for tokens, experts in ((2, 3), (6, 5), (11, 8)):
        case = {"logits": normal(rng, tokens, experts), "bias": normal(rng, experts)}
        cases.append(case | {"k": rng.randint(1, experts - 1), "scale": 2.5})
    expect_tensor(answer, cases, _biased_gate)


def _bias_gradient(answer: Answer, rng: Random) -> None:
    logits = normal(rng, 4, 5).requires_grad_()
    bias = normal(rng, 5).requires_grad_()
    case: dict[str, Any] = {"logits": logits, "bias": bias, "k": 2, "scale": 2.5}
    given: dict[str, Any] = {
        name: v.detach().clone().requires_grad_() if isinstance(v, Tensor) else v
        for name, v in case.items()
    }
    weights = normal(rng, 4, 5)
    with taking_gradients(describe(**case)):
        (answer.function(**given) * weights).sum().backward()
    (_biased_gate(**case) * weights).sum().backward()
    if given["bias"].grad is not None and bool(given["bias"].grad.any()):
        raise Failure(
            f"{describe(**case)}:\n    the bias has a gradient; load balancing sets it, not the loss"
        )
    if given["logits"].grad is None:
        raise Failure(f"{describe(**case)}:\n    no gradient reaches the logits")
    compare(
        given["logits"].grad, logits.grad, f"{describe(**case)}, gradient of the logits"
    )


# 02.3


def _combine(outputs: Tensor, weights: Tensor, keep: Tensor) -> Tensor:
    tokens, _, width = outputs.shape
    y = torch.zeros(tokens, width, dtype=outputs.dtype)
    for t in range(tokens):
        for j in range(outputs.shape[1]):
            if keep[t, j]:
                y[t] = y[t] + weights[t, j] * outputs[t, j]
    return y


def _combine_case(
    rng: Random, tokens: int, k: int, width: int, dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    keep = torch.rand(tokens, k, generator=generator(rng)) < 0.6
    if tokens > 1:
        keep[0], keep[-1] = False, True  # nothing of a token was kept, all of another
    outputs, weights = (
        normal(rng, tokens, k, width, dtype=dtype),
        normal(rng, tokens, k, dtype=dtype).sigmoid(),  # their sum is not 1
    )
    return {"outputs": outputs, "weights": weights, "keep": keep}


def _combine_values(answer: Answer, rng: Random) -> None:
    sizes = ((1, 1, 2), (2, 2, 3), (5, 1, 2), (5, 3, 4), (9, 4, 7))
    expect_tensor(answer, [_combine_case(rng, *size) for size in sizes], _combine)


def _combine_limits(answer: Answer, rng: Random) -> None:
    cases = [_combine_case(rng, 0, 2, 3), _combine_case(rng, 4, 2, 3, torch.float32)]
    # What an expert never computed may hold anything.
    for anything in (float("nan"), float("inf")):
        broken = _combine_case(rng, 3, 2, 2)
        broken["keep"] = torch.tensor([[False, False], [True, False], [False, True]])
        broken["outputs"][~broken["keep"]] = anything
        cases.append(broken)
    expect_tensor(answer, cases, _combine)

    # ... but a NaN that was computed is news, and has to show.
    diverged = _combine_case(rng, 2, 2, 2)
    diverged["keep"] = torch.tensor([[True, False], [True, True]])
    diverged["outputs"][1, 0] = float("nan")
    got = answer(**diverged)
    compare(got[:1], _combine(**diverged)[:1], f"{describe(**diverged)}, token 0")
    if not bool(got[1].isnan().all()):
        raise Failure(
            f"{describe(**diverged)}:\n    token 1 kept a slot that holds NaN: expected NaN, got {shown(got[1])}"
        )


# 02.4


def _sort_slots(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    flat = expert_ids.flatten().tolist()
    order = sorted(range(len(flat)), key=lambda slot: flat[slot])
    counts = [flat.count(e) for e in range(num_experts)]
    offsets = [sum(counts[:e]) for e in range(num_experts + 1)]
    return torch.tensor(order, dtype=torch.int64), torch.tensor(
        offsets, dtype=torch.int64
    )


def _ids(rng: Random, tokens: int, k: int, experts: int) -> Tensor:
    """Random choices; the last expert is never idle, that is a case of its own."""
    rows = [rng.sample(range(experts), k) for _ in range(tokens)]
    if rows and experts - 1 not in rows[-1]:
        rows[-1][0] = experts - 1
    return torch.tensor(rows, dtype=torch.int64).reshape(tokens, k)


def _sort_order(answer: Answer, rng: Random) -> None:
    sizes = ((2, 1, 2), (3, 2, 4), (8, 2, 5), (40, 3, 6))
    expect_tensor(
        answer,
        [{"expert_ids": _ids(rng, *s), "num_experts": s[2]} for s in sizes],
        _sort_slots,
    )


def _sort_idle(answer: Answer, rng: Random) -> None:
    cases = [
        {"expert_ids": _ids(rng, 6, 2, 3) + shift, "num_experts": 7}
        for shift in (0, 2, 4)
    ]
    cases.append({"expert_ids": torch.full((5, 1), 2), "num_experts": 4})
    expect_tensor(answer, cases, _sort_slots)


def _sort_nothing(answer: Answer, rng: Random) -> None:
    expect_tensor(
        answer,
        [{"expert_ids": torch.zeros(0, 2, dtype=torch.int64), "num_experts": 3}],
        _sort_slots,
    )


# 02.5


def _sorted_moe(
    x: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
) -> Tensor:
    y = []
    for t in range(len(x)):
        total = torch.zeros_like(x[t])
        for j, e in enumerate(expert_ids[t].tolist()):
            gate, up = w_gate[e] @ x[t], w_up[e] @ x[t]
            total = total + weights[t, j] * (
                w_down[e] @ (gate * torch.sigmoid(gate) * up)
            )
        y.append(total)
    return torch.stack(y) if y else torch.zeros_like(x)


def _moe_case(
    rng: Random, tokens: int, k: int, experts: int, width: int, hidden: int
) -> dict[str, Any]:
    return {
        "x": normal(rng, tokens, width),
        "expert_ids": _ids(rng, tokens, k, experts),
        "weights": normal(rng, tokens, k).sigmoid(),  # their sum is not 1
        "w_gate": normal(rng, experts, hidden, width) / width**0.5,
        "w_up": normal(rng, experts, hidden, width) / width**0.5,
        "w_down": normal(rng, experts, width, hidden) / hidden**0.5,
    }


def _moe_values(answer: Answer, rng: Random) -> None:
    sizes = ((1, 1, 2, 2, 3), (3, 2, 3, 4, 5), (17, 2, 5, 6, 3), (30, 3, 4, 5, 7))
    cases = [_moe_case(rng, *size) for size in sizes]
    single = {
        n: v.float() if v.is_floating_point() else v
        for n, v in _moe_case(rng, 2, 1, 3, 2, 3).items()
    }
    expect_tensor(answer, [*cases, single], _sorted_moe)


def _moe_limits(answer: Answer, rng: Random) -> None:
    one_expert = _moe_case(rng, 7, 1, 6, 3, 4) | {"expert_ids": torch.full((7, 1), 3)}
    cases = [
        _moe_case(rng, 0, 2, 3, 4, 5),
        one_expert,
        _moe_case(rng, 5, 3, 3, 4, 2),
        _moe_case(rng, 4, 1, 1, 3, 2),
    ]
    expect_tensor(answer, cases, _sorted_moe)


def _moe_gradients(answer: Answer, rng: Random) -> None:
    case = _moe_case(rng, 9, 2, 4, 3, 5)
    leaves = [name for name, value in case.items() if value.is_floating_point()]
    direction = normal(rng, 9, 3)

    def gradients(function: Any) -> tuple[Tensor, ...]:
        given = {
            n: v.clone().requires_grad_() if n in leaves else v.clone()
            for n, v in case.items()
        }
        (function(**given) * direction).sum().backward()
        return tuple(
            torch.zeros_like(given[n]) if given[n].grad is None else given[n].grad
            for n in leaves
        )

    with taking_gradients(describe(**case)):
        got = gradients(answer.function)
    for name, mine, right in zip(leaves, got, gradients(_sorted_moe), strict=True):
        compare(mine, right, f"{describe(**case)}, gradient of {name}")


def _moe_work(answer: Answer, rng: Random) -> None:
    tokens, k, experts, width, hidden = 256, 2, 16, 16, 32
    case = _moe_case(rng, tokens, k, experts, width, hidden)
    expect_tensor(answer, [case], _sorted_moe)
    most, done = cost(answer.function, **case)
    # Rows of slots or the experts' own weights are fine; a copy of weights for each slot is not.
    allowed = 4 * max(tokens * k * hidden, experts * hidden * width)
    if most > allowed:
        raise Failure(
            f"{describe(**case)}:\n    your largest tensor has {most:,} entries; "
            f"all slots' hidden rows together are {tokens * k * hidden:,}"
        )
    # Every expert on every token would be experts / k = 8 times as much; rows padded to the longest run are fine.
    needed = 2 * tokens * k * 3 * hidden * width
    if done > 3 * needed:
        raise Failure(
            f"{describe(**case)}:\n    your matrix products take {done:,} FLOPs; those of the slots take {needed:,}"
        )


# 02.6


def _dispatch_tensor(expert_ids: Tensor, num_experts: int, capacity: int) -> Tensor:
    mask = torch.zeros(len(expert_ids), num_experts, capacity)
    taken = [0] * num_experts
    for t, e in enumerate(expert_ids.tolist()):
        if taken[e] < capacity:
            mask[t, e, taken[e]] = 1.0
        taken[e] += 1
    return mask


def _dispatch_case(
    rng: Random, tokens: int, experts: int, capacity: int
) -> dict[str, Any]:
    ids = torch.tensor(
        [rng.randrange(experts) for _ in range(tokens)], dtype=torch.int64
    )
    return {"expert_ids": ids, "num_experts": experts, "capacity": capacity}


def _dispatch_places(answer: Answer, rng: Random) -> None:
    expect_tensor(
        answer,
        [_dispatch_case(rng, t, e, t) for t, e in ((2, 2), (5, 3), (12, 4))],
        _dispatch_tensor,
    )


def _dispatch_drops(answer: Answer, rng: Random) -> None:
    cases = [
        _dispatch_case(rng, *size)
        for size in ((4, 2, 1), (9, 3, 2), (20, 4, 3), (0, 3, 2))
    ]
    late = torch.tensor([0, 0, 0, 0, 0, 1])  # the last token finds an empty buffer
    cases.append({"expert_ids": late, "num_experts": 2, "capacity": 2})
    # bfloat16 counts to 256 only
    many = torch.zeros(300, dtype=torch.int64)
    cases.append({"expert_ids": many, "num_experts": 2, "capacity": 299})
    expect_tensor(answer, cases, _dispatch_tensor)


# 02.7


def _gate_gradient(logits: Tensor, k: int, grad_weights: Tensor) -> Tensor:
    leaf = logits.detach().clone().requires_grad_()
    with torch.enable_grad():
        rows = [torch.softmax(row[_best(row.detach(), k)], dim=0) for row in leaf]
        total = sum((w * g).sum() for w, g in zip(rows, grad_weights, strict=True))
        return torch.autograd.grad(total, leaf)[0] if rows else torch.zeros_like(logits)


def _gradient_values(answer: Answer, rng: Random) -> None:
    cases: list[dict[str, Any]] = []
    for tokens, experts, k in ((1, 3, 2), (2, 4, 3), (6, 8, 2), (5, 5, 5)):
        cases.append(
            {
                "logits": normal(rng, tokens, experts),
                "k": k,
                "grad_weights": normal(rng, tokens, k),
            }
        )
    single = {
        "logits": normal(rng, 2, 4, dtype=torch.float32),
        "k": 2,
        "grad_weights": normal(rng, 2, 2, dtype=torch.float32),
    }
    # A common offset changes nothing, except for finite differences: they drown in rounding.
    offset = cases[1] | {"logits": cases[1]["logits"] + 1e5}
    for case in [*cases, single, offset]:
        want = _gate_gradient(**case)
        with torch.inference_mode():  # the closed form is asked for, not autograd
            got = answer(**case)
        compare(got, want, describe(**case))


def _gradient_of_one(answer: Answer, rng: Random) -> None:
    case = {
        "logits": normal(rng, 4, 6),
        "k": 1,
        "grad_weights": 10 * normal(rng, 4, 1),
    }
    with torch.inference_mode():
        got = answer(**case)
    compare(got, torch.zeros(4, 6, dtype=torch.float64), describe(**case))
    if bool(got.any()):
        raise Failure(
            f"{describe(**case)}:\n    expected exactly 0 everywhere, got {shown(got)}"
        )


# 02.8


def _layer_flops(
    width: int,
    hidden: int,
    experts: int,
    k: int,
    shared: int,
    tokens: int,
    training: bool,
) -> int:
    multiplications = tokens * (width * experts + (k + shared) * 3 * width * hidden)
    return 2 * multiplications * (3 if training else 1)


def _flops_cases(rng: Random, training: bool) -> list[dict[str, Any]]:
    cases = [{"width": 2, "hidden": 3, "experts": 4, "k": 1, "shared": 0, "tokens": 1}]
    for _ in range(12):
        experts = rng.randint(2, 64)
        sizes = {
            "width": rng.randint(2, 500),
            "hidden": rng.randint(2, 900),
            "experts": experts,
        }
        cases.append(
            sizes
            | {
                "k": rng.randint(1, experts),
                "shared": rng.randint(0, 3),
                "tokens": rng.randint(1, 99),
            }
        )
    # Of a whole training run: an odd count beyond 2^53 does not survive a float.
    run = {"width": 511, "hidden": 301, "experts": 65, "k": 3, "shared": 1}
    cases.append(run | {"tokens": 10**13 + 1})
    return [case | {"training": training} for case in cases]


def _flops_forward(answer: Answer, rng: Random) -> None:
    expect_count(answer, _flops_cases(rng, training=False), _layer_flops)


def _flops_training(answer: Answer, rng: Random) -> None:
    expect_count(answer, _flops_cases(rng, training=True), _layer_flops)


_ROUTING = "book/math/routing"
_DISPATCH = "book/math/dispatch"

EXERCISE = Exercise(
    number="02",
    topic="math",
    title="Gates and dispatch",
    next_step="all of exercise 02 is done; its hand-graded question is the last cell",
    questions=(
        Question(
            "02.1",
            "A gate as a matrix",
            "gate_matrix",
            1,
            10,
            f"{_ROUTING}, section 'Three gates'",
            (
                Invariant(
                    "keeps the k largest and lets their weights sum to 1",
                    2,
                    _gate_values,
                    "Softmax over the kept logits alone; all other entries are 0, not a softmax over zeros.",
                ),
                Invariant(
                    "breaks ties by the lowest expert, and survives large logits",
                    1,
                    _gate_limits,
                    "torch.topk promises no order among equal logits: sort stably. What is not kept counts as minus "
                    "infinity, and torch.softmax takes off each row's maximum.",
                ),
            ),
        ),
        Question(
            "02.2",
            "Bias in the selection only",
            "biased_gate",
            2,
            15,
            f"{_ROUTING}, section 'Sigmoid and bias'",
            (
                Invariant(
                    "selects with the bias and weighs without it",
                    2,
                    _biased_values,
                    "The bias decides who is selected. The weights are the selected sigmoids without it, "
                    "divided by their sum, times scale.",
                ),
                Invariant(
                    "the loss reaches the logits and not the bias",
                    1,
                    _bias_gradient,
                    "An index has no gradient, so a bias that only selects has none. Keep the logits in the graph.",
                ),
            ),
        ),
        Question(
            "02.3",
            "Two bugs in a combine",
            "combine",
            1,
            10,
            f"{_DISPATCH}, section 'What a dropped token gets'",
            (
                Invariant(
                    "sums what was kept, and adds nothing for what was dropped",
                    2,
                    _combine_values,
                    "A dropped slot contributes exactly 0: no identity, and no renormalising of the others.",
                ),
                Invariant(
                    "works for no tokens, in float32, and ignores what was never computed, and only that",
                    1,
                    _combine_limits,
                    "0 times NaN is NaN: select by `keep`, with torch.where or masked_fill, before you multiply. "
                    "nan_to_num would also hide a NaN that an expert did compute.",
                ),
            ),
        ),
        Question(
            "02.4",
            "Sort by expert",
            "sort_slots",
            2,
            15,
            f"{_DISPATCH}, section 'Sort, then multiply'",
            (
                Invariant(
                    "puts the slots of each expert together, in their old order",
                    2,
                    _sort_order,
                    "Flatten to T·K slots, then a stable argsort. Offsets are where each expert's run begins.",
                ),
                Invariant(
                    "gives an idle expert an empty run",
                    1,
                    _sort_idle,
                    "There are always num_experts + 1 offsets: count with bincount(minlength=num_experts).",
                ),
                Invariant(
                    "works for no tokens at all",
                    1,
                    _sort_nothing,
                    "All offsets are 0 then.",
                ),
            ),
        ),
        Question(
            "02.5",
            "A sorted sparse layer",
            "sorted_moe",
            3,
            30,
            f"{_DISPATCH}, section 'Sort, then multiply'",
            (
                Invariant(
                    "equals the definition",
                    2,
                    _moe_values,
                    "y_t = sum of weight·FFN_e(x_t) over the token's choices. The weight multiplies the output "
                    "of the expert, after the non-linearity; slot s belongs to token s // K.",
                ),
                Invariant(
                    "at the edges: no tokens, one expert for all, every expert for each",
                    1,
                    _moe_limits,
                    "An expert without rows still has to run through: a matrix product with 0 rows is fine.",
                ),
                Invariant(
                    "has the gradients of the definition",
                    1,
                    _moe_gradients,
                    "Stay with differentiable operations: index_add, not item assignment on detached data.",
                ),
                Invariant(
                    "copies no weights for each token, and runs no expert on the others' tokens",
                    1,
                    _moe_work,
                    "w_up[expert_ids] copies T·K matrices of F·D; every expert on every token is E/K times the "
                    "work. Take each expert's own rows.",
                ),
            ),
        ),
        Question(
            "02.6",
            "Dispatch as a tensor",
            "dispatch_tensor",
            2,
            15,
            f"{_DISPATCH}, section 'One-hot and einsum'",
            (
                Invariant(
                    "gives each token its place in its expert's buffer",
                    1,
                    _dispatch_places,
                    "The place is how many earlier tokens chose the same expert: a cumulative sum of the one-hot.",
                ),
                Invariant(
                    "drops what comes after the capacity",
                    1,
                    _dispatch_drops,
                    "A dropped token's slice is all zeros; first come, first served.",
                ),
            ),
        ),
        Question(
            "02.7",
            "Gradient through the gate",
            "gate_gradient",
            3,
            20,
            f"{_ROUTING}, section 'Who learns from which token'",
            (
                Invariant(
                    "is the softmax's Jacobian on the kept logits and 0 elsewhere",
                    2,
                    _gradient_values,
                    "dw_i/dl_j = w_i (1[i = j] - w_j) among the kept; scatter the result back to [T, E].",
                ),
                Invariant(
                    "is exactly 0 at k = 1",
                    1,
                    _gradient_of_one,
                    "With one expert kept its weight is 1 whatever the logits are.",
                ),
            ),
        ),
        Question(
            "02.8",
            "FLOPs of a sparse layer",
            "layer_flops",
            1,
            10,
            f"{_DISPATCH}, section 'Counting the work'",
            (
                Invariant(
                    "counts router, selected and shared experts",
                    1,
                    _flops_forward,
                    "2 FLOPs per weight that a token is multiplied by: the whole router, k + shared experts of 3·D·F. "
                    "Integers only: a float rounds from 2^53 on.",
                ),
                Invariant(
                    "counts three times as much for training",
                    1,
                    _flops_training,
                    "The backward pass multiplies twice as much as the forward: once for the inputs' gradient, "
                    "once for the weights'.",
                ),
            ),
        ),
    ),
)
