"""Checks of exercise 03: balancing losses, capacity, the bias, reading loads, and a router that is to be cured.

The oracles here are loops over tokens and experts in plain Python, and fractions where a rule has a threshold; they do
not call moe_course.balance. What 03.8 has trained is measured here, on tokens that it has not seen.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
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
    mismatch,
    same,
    shown,
)
from moe_course.grading.tensors import (
    compare,
    differing,
    expect_tensor,
    generator,
    normal,
    taking_gradients,
)


def _ids(rng: Random, tokens: int, k: int, experts: int) -> Tensor:
    """Distinct random choices for each token."""
    rows = [rng.sample(range(experts), k) for _ in range(tokens)]
    return torch.tensor(rows, dtype=torch.int64).reshape(tokens, k)


def _expect_gradient(
    answer: Answer, case: dict[str, Any], name: str, oracle: Callable[..., Tensor]
) -> None:
    """The answer, a scalar, has the oracle's gradient in the argument `name`."""

    def gradient(function: Callable[..., Any]) -> Any:
        leaf = case[name].clone().requires_grad_()
        value = function(**case | {name: leaf})
        return value, torch.autograd.grad(value, leaf, allow_unused=True)[0]

    with taking_gradients(describe(**case)):
        value, got = gradient(answer.function)
    if got is None:
        raise Failure(f"{describe(**case)}:\n    no gradient reaches {name}")
    right, want = gradient(oracle)
    compare(value, right.detach(), describe(**case))
    compare(got, want, f"{describe(**case)}, gradient of {name}")


# 03.1


def _switch(logits: Tensor, expert_ids: Tensor, divide_by_k: bool) -> Tensor:
    tokens, experts = logits.shape
    loss = logits.new_zeros(())
    if not tokens:
        return loss
    flat = expert_ids.flatten().tolist()
    probs = [torch.softmax(row, dim=0) for row in logits]
    for e in range(experts):
        f = flat.count(e) / (len(flat) if divide_by_k else tokens)
        loss = loss + f * sum(p[e] for p in probs) / tokens
    return experts * loss


def _switch_mistake(got: Any, case: dict[str, Any]) -> str:
    """Which of the mistakes that have shipped elsewhere gives this value, if any does."""
    logits, experts = case["logits"], case["logits"].shape[1]
    right, probs = _switch(**case), logits.softmax(dim=-1)
    other = _switch(**case | {"divide_by_k": not case["divide_by_k"]})
    k = 1 if case["divide_by_k"] else case["expert_ids"].shape[1]
    flat = case["expert_ids"].flatten()
    served = len(flat) if case["divide_by_k"] else len(logits)
    in_float32 = flat.bincount(minlength=experts) / max(1, served)
    mistakes = {
        "with f in float32, where torch puts a quotient of integers: convert the counts first": experts
        * (in_float32 * probs.mean(dim=0)).sum(),
        "the mean over the experts; the loss is E times their sum": right / experts**2,
        "E times too small: sum over the experts, do not average": right / experts,
        "the loss with a second softmax, of probabilities": _switch(
            **case | {"logits": probs}
        ),
        "what counts of probabilities give; f counts assignments": k
        * experts
        * probs.mean(dim=0).square().sum(),
        "the other convention: look at divide_by_k": other,
    }
    if type(got) is Tensor and got.shape == right.shape and got.dtype == right.dtype:
        for text, value in mistakes.items():
            if not bool(differing(Tensor.detach(got), value)):
                return f"\n    that is {text}"
    return ""


def _switch_case(
    rng: Random, tokens: int, experts: int, k: int, divide_by_k: bool
) -> dict[str, Any]:
    # Ids of their own: whoever chooses again, or counts probabilities, counts others.
    return {
        "logits": 2 * normal(rng, tokens, experts),
        "expert_ids": _ids(rng, tokens, k, experts),
        "divide_by_k": divide_by_k,
    }


def _switch_values(answer: Answer, rng: Random) -> None:
    # Three undecided tokens with expert 0, one certain of expert 1: 0.875.
    below_one: dict[str, Any] = {
        "logits": torch.tensor([[0.0, 0.0]] * 3 + [[-100.0, 0.0]]),
        "expert_ids": torch.tensor([[0], [0], [0], [1]]),
        "divide_by_k": True,
    }
    cases = [below_one]
    for tokens, experts, k in ((3, 4, 2), (5, 3, 1), (13, 7, 3), (30, 6, 4)):
        for divide in (True, False):
            cases.append(_switch_case(rng, tokens, experts, k, divide))
    for case in cases:
        got = answer(**case)
        try:
            compare(got, _switch(**case), describe(**case))
        except Failure as failure:
            text = f"{failure}{_switch_mistake(got, case)}"
            raise Failure(text, failure.hint) from None


def _switch_gradient(answer: Answer, rng: Random) -> None:
    for size in ((2, 3, 1), (9, 5, 2)):
        for divide in (True, False):
            case = _switch_case(rng, *size, divide)
            _expect_gradient(answer, case, "logits", _switch)


def _switch_limits(answer: Answer, rng: Random) -> None:
    cases = [
        _switch_case(rng, 0, 4, 2, True),
        _switch_case(rng, 0, 4, 2, False),
        _switch_case(rng, 5, 1, 1, True),
        _switch_case(rng, 4, 3, 3, False),
    ]
    # All on one expert, and certain of it: E. exp(1000) overflows.
    certain = torch.full((6, 5), -1000.0, dtype=torch.float64)
    certain[:, 2] = 1000.0
    one = {"logits": certain, "expert_ids": torch.full((6, 1), 2), "divide_by_k": True}
    # The last expert serves nobody, in float32.
    idle = _switch_case(rng, 7, 4, 2, False)
    idle |= {"logits": idle["logits"].float(), "expert_ids": _ids(rng, 7, 2, 3)}
    expect_tensor(answer, [*cases, one, idle], _switch)


# 03.2


def _importance(expert_ids: Tensor, weights: Tensor, num_experts: int) -> Tensor:
    sums = [weights.new_zeros(()) for _ in range(num_experts)]
    for ids, row in zip(expert_ids.tolist(), weights, strict=True):
        for e, weight in zip(ids, row, strict=True):
            sums[e] = sums[e] + weight
    mean = sum(sums, weights.new_zeros(())) / num_experts
    if mean == 0:
        return 0 * mean
    squares = [(s / mean - 1) ** 2 for s in sums]
    return sum(squares, weights.new_zeros(())) / num_experts


def _importance_case(
    rng: Random, tokens: int, k: int, experts: int, served: int = 0
) -> dict[str, Any]:
    return {
        "expert_ids": _ids(rng, tokens, k, served or experts),
        "weights": normal(rng, tokens, k).sigmoid(),  # their sum is not 1
        "num_experts": experts,
    }


def _importance_values(answer: Answer, rng: Random) -> None:
    sizes = ((2, 1, 2), (3, 2, 4), (7, 1, 5), (12, 3, 8))
    cases = [_importance_case(rng, *size) for size in sizes]
    small, tiny = _importance_case(rng, 5, 2, 4), _importance_case(rng, 5, 2, 4)
    small["weights"] = 1e-9 * small["weights"]
    tiny["weights"] = 1e-30 * tiny["weights"]
    single = _importance_case(rng, 6, 2, 5)
    single["weights"] = single["weights"].float()
    cases += [_importance_case(rng, 9, 2, 6, served=4), small, tiny, single]
    expect_tensor(answer, cases, _importance)


def _importance_gradient(answer: Answer, rng: Random) -> None:
    # Perfectly even: the gradient is 0, that of a square root would be infinite.
    even = {
        "expert_ids": torch.tensor([[0, 1], [2, 0], [1, 2]]),
        "weights": torch.full((3, 2), 0.5, dtype=torch.float64),
        "num_experts": 3,
    }
    random = [_importance_case(rng, *size) for size in ((3, 1, 3), (8, 2, 5))]
    for case in (*random, even):
        _expect_gradient(answer, case, "weights", _importance)


def _importance_limits(answer: Answer, rng: Random) -> None:
    silent = _importance_case(rng, 3, 2, 4)
    silent["weights"] = torch.zeros(3, 2, dtype=torch.float64)
    one = _importance_case(rng, 4, 1, 3) | {"expert_ids": torch.full((4, 1), 1)}
    cases = [
        _importance_case(rng, 0, 2, 3),
        silent,
        one,
        _importance_case(rng, 3, 1, 1),
        _importance_case(rng, 4, 3, 3),
    ]
    expect_tensor(answer, cases, _importance)
    leaf = silent["weights"].clone().requires_grad_()
    value = answer.function(**silent | {"weights": leaf})
    if not value.requires_grad:
        return  # a constant 0 has no gradient, so none of NaN
    (got,) = torch.autograd.grad(value, leaf, allow_unused=True)
    if got is not None and not bool(got.isfinite().all()):
        raise Failure(
            f"{describe(**silent)}, gradient of weights:\n    expected finite numbers, got {shown(got)}"
        )


# 03.3


def _z_loss(logits: Tensor) -> Tensor:
    if logits.dtype != torch.float64:
        logits = logits.float()
    loss = logits.new_zeros(())
    for row in logits:
        top = row.detach().max()
        loss = loss + (top + (row - top).exp().sum().log()) ** 2
    return loss / max(1, len(logits))


def _z_values(answer: Answer, rng: Random) -> None:
    cases = [{"logits": torch.tensor([[0.0, 0.0], [2.0, 2.0]])}]
    for tokens, experts in ((2, 3), (1, 4), (6, 5), (11, 1), (17, 9)):
        cases.append({"logits": 3 * normal(rng, tokens, experts)})
    expect_tensor(answer, cases, _z_loss)
    _expect_gradient(answer, cases[3], "logits", _z_loss)


def _z_large(answer: Answer, rng: Random) -> None:
    large = torch.tensor([[1000.0, 999.0, -1000.0], [-1000.0, -1001.0, -1000.0]])
    cases = [{"logits": large}, {"logits": large.double()}]
    for dtype in (torch.float16, torch.bfloat16):
        cases.append({"logits": torch.tensor([[300.0, 300.0]], dtype=dtype)})
        cases.append({"logits": 4 * normal(rng, 7, 5, dtype=dtype)})
    expect_tensor(answer, cases, _z_loss)


def _z_limits(answer: Answer, rng: Random) -> None:
    forbidden = 2 * normal(rng, 5, 4)
    forbidden[0, 1], forbidden[1:3, 2:] = -torch.inf, -torch.inf
    cases = [{"logits": forbidden}]
    cases += [{"logits": torch.zeros(0, 3, dtype=d)} for d in (torch.float32, torch.float16)]  # fmt: skip
    expect_tensor(answer, cases, _z_loss)
    _expect_gradient(answer, cases[0], "logits", _z_loss)


# 03.4


def _kept(expert_ids: Tensor, num_experts: int, capacity: int, real: Tensor) -> Tensor:
    keep = torch.zeros(expert_ids.shape, dtype=torch.bool)
    taken = [0] * num_experts
    for t, row in enumerate(expert_ids.tolist()):
        for j, e in enumerate(row):
            if bool(real[t]) and taken[e] < capacity:
                keep[t, j] = True
                taken[e] += 1
    return keep


def _kept_case(
    rng: Random, tokens: int, k: int, experts: int, capacity: int, padding: float = 0.0
) -> dict[str, Any]:
    real = torch.tensor([rng.random() >= padding for _ in range(tokens)])
    if padding and tokens > 1:
        real[0], real[-1] = False, True  # padding in front: it takes no place
    return {
        "expert_ids": _ids(rng, tokens, k, experts),
        "num_experts": experts,
        "capacity": capacity,
        "real": real.bool().reshape(tokens),
    }


def _one_popular(rng: Random, tokens: int, experts: int) -> dict[str, Any]:
    """Everybody wants one expert, as first or as second choice; the other choice always fits."""
    popular, *rest = rng.sample(range(experts), experts)
    capacity = -(-tokens // len(rest))
    others = (rest * capacity)[:tokens]
    rng.shuffle(others)
    pairs = [[popular, e] if rng.random() < 0.5 else [e, popular] for e in others]
    return {
        "expert_ids": torch.tensor(pairs),
        "num_experts": experts,
        "capacity": capacity,
        "real": torch.ones(tokens, dtype=torch.bool),
    }


def _kept_positions(answer: Answer, rng: Random) -> None:
    cases = [_one_popular(rng, *size) for size in ((4, 3), (7, 4), (20, 6))]
    # The second choice of an earlier token goes before the first of a later one.
    early = {
        "expert_ids": torch.tensor([[0, 1], [1, 2]]),
        "num_experts": 3,
        "capacity": 1,
        "real": torch.ones(2, dtype=torch.bool),
    }
    expect_tensor(answer, [early, *cases], _kept)


def _kept_padding(answer: Answer, rng: Random) -> None:
    # One choice for each token, and room for all that is real: the padding alone goes.
    roomy = [_kept_case(rng, *size, padding=0.4) for size in ((4, 1, 2, 4), (9, 2, 3, 9))]  # fmt: skip
    in_front = {
        "expert_ids": torch.tensor([[1], [1], [1], [0]]),
        "num_experts": 2,
        "capacity": 1,
        "real": torch.tensor([False, False, True, True]),
    }
    tight = [_kept_case(rng, *size, padding=0.4) for size in ((11, 1, 3, 2), (16, 1, 4, 3))]  # fmt: skip
    # Two choices, and each expert has a place for just those that are real.
    both = {
        "expert_ids": torch.tensor([[0, 1], [1, 0], [1, 0], [0, 1]]),
        "num_experts": 2,
        "capacity": 2,
        "real": torch.tensor([False, True, False, True]),
    }
    expect_tensor(answer, [in_front, both, *roomy, *tight], _kept)


def _kept_combined(answer: Answer, rng: Random) -> None:
    cases = [
        _kept_case(rng, 3, 1, 2, 0),
        _kept_case(rng, 6, 1, 1, 2),
        _kept_case(rng, 5, 3, 3, 2),
        _kept_case(rng, 0, 2, 3, 1),
        _kept_case(rng, 12, 2, 3, 2, padding=0.3),
        _kept_case(rng, 4, 2, 5, 100),
        _kept_case(rng, 5, 2, 4, 2) | {"real": torch.zeros(5, dtype=torch.bool)},
        _kept_case(rng, 5, 1, 1, 5),  # room for just all
        # bfloat16 counts to 256 only, float16 to 2048
        _kept_case(rng, 300, 1, 1, 299),
        _kept_case(rng, 2100, 1, 1, 2099),
    ]
    for case in cases:
        keep, want = answer(**case), _kept(**case)
        what = describe(**case)
        if type(keep) is not Tensor or keep.dtype != torch.bool:
            compare(keep, want, what)  # says what is amiss
        if keep.shape != want.shape:
            compare(keep, want, what)
        tokens, k = case["expert_ids"].shape
        outputs, weights = normal(rng, tokens, k, 2), normal(rng, tokens, k).sigmoid()
        got, right = (
            torch.where(mask[:, :, None], weights[:, :, None] * outputs, 0.0).sum(dim=1)
            for mask in (keep, want)
        )
        lost = ~want.any(dim=1)
        if bool(got[lost].any()):
            t = int((got.any(dim=1) & lost).nonzero()[0])
            raise Failure(
                f"{what}:\n    token {t} lost all of its assignments: its combined output is to be exactly 0, "
                f"your mask gives {shown(got[t])}"
            )
        compare(got, right, f"{what}, the sum over what is kept")
        compare(keep, want, what)


# 03.5


def _biased(
    scores: Tensor, bias: Tensor, k: int, step: float
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, experts = scores.shape
    ids = []
    for row in (scores.detach() + bias).tolist():
        ids.append(sorted(range(experts), key=lambda e: (-row[e], e))[:k])
    expert_ids = torch.tensor(ids, dtype=torch.int64).reshape(tokens, k)
    rows = [row[kept] / row[kept].sum() for row, kept in zip(scores, ids, strict=True)]
    weights = torch.stack(rows) if rows else scores.new_zeros(0, k)
    mean = Fraction(tokens * k, experts)
    moved = bias.clone()
    for e in range(experts):
        load = sum(e in kept for kept in ids)
        moved[e] += step * ((load < mean) - (load > mean))
    return expert_ids, weights, moved


# Steps are powers of 2: no type rounds them.
def _biased_case(
    rng: Random, tokens: int, experts: int, k: int, dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    return {
        "scores": normal(rng, tokens, experts, dtype=dtype).sigmoid(),
        "bias": 0.5 * normal(rng, experts, dtype=dtype),
        "k": k,
        "step": 2.0 ** -rng.randint(4, 10),
    }


def _returned(got: object) -> str:
    """How many came, where it is their number that is amiss."""
    return f"{len(got)} results" if isinstance(got, tuple | list) else shown(got)


def _three(got: Any, case: dict[str, Any]) -> tuple[Any, ...]:
    if not isinstance(got, tuple | list) or len(got) != 3:
        raise Failure(
            f"{describe(**case)}:\n    expected expert_ids, weights and the next bias, got {_returned(got)}",
            hint=False,
        )
    return tuple(got)


def _biased_choice(answer: Answer, rng: Random) -> None:
    by_hand = {
        "scores": torch.tensor([[0.2, 0.5, 0.8]]),
        "bias": torch.tensor([1.0, 0.0, 0.0]),
        "k": 2,
        "step": 0.015625,
    }
    cases = [by_hand, _biased_case(rng, 3, 4, 1)]
    for tokens, experts in ((2, 3), (6, 5), (11, 8)):
        cases.append(_biased_case(rng, tokens, experts, rng.randint(2, experts - 1)))
    for case in cases:
        got, want = _three(answer(**case), case), _biased(**case)
        compare(got[:2], want[:2], describe(**case))


def _biased_update(answer: Answer, rng: Random) -> None:
    even: dict[str, Any] = {
        "scores": 0.5 + 0.4 * torch.eye(3, dtype=torch.float64).repeat(2, 1),
        "bias": torch.zeros(3, dtype=torch.float64),
        "k": 1,
        "step": 0.015625,
    }
    # Loads 2, 1 and 0: less, just, and more than the mean.
    mixed = even | {"scores": even["scores"][[0, 0, 1]]}
    # Two choices of each token, and all loads even: 2 of 6.
    pairs = even | {"scores": 0.9 - even["scores"][:3], "k": 2}
    # Loads even by count, though not by weight; and loads that only the bias makes uneven.
    weighed = pairs | {"scores": torch.tensor([[9, 5, 1], [1, 9, 8], [9, 1, 8]]).double()}  # fmt: skip
    pushed = even | {"bias": torch.tensor([0.5, 0.0, 0.0], dtype=torch.float64)}
    # Even, and in floating point 5 times 1/45 is not 1/9.
    rounded = {
        "scores": 0.5 + 0.4 * torch.eye(9, dtype=torch.float64).repeat(5, 1),
        "bias": torch.zeros(9, dtype=torch.float64),
        "k": 1,
        "step": 0.015625,
    }
    cases = [even, mixed, pairs, weighed, pushed, rounded]
    # Loads just beside a mean of 1.25 and of 1.75, on the side where its rounding or the middle is not.
    for loads in ((3, 1, 1, 0), (5, 2, 0, 0)):
        served = torch.arange(4).repeat_interleave(torch.tensor(loads))
        scores = 0.5 + 0.4 * torch.eye(4, dtype=torch.float64)[served]
        cases.append(even | {"scores": scores, "bias": 0 * scores[0]})
    for tokens, experts, k in ((5, 4, 1), (7, 5, 2), (64, 6, 2), (21, 9, 3)):
        cases.append(_biased_case(rng, tokens, experts, k))
    cases.append(_biased_case(rng, 8, 4, 2, torch.float32))
    for case in cases:
        got = _three(answer(**case), case)[2]
        compare(got, _biased(**case)[2], f"{describe(**case)}, the next bias")


def _biased_limits(answer: Answer, rng: Random) -> None:
    ties = {
        "scores": torch.full((3, 40), 0.5, dtype=torch.float64),
        "bias": torch.zeros(40, dtype=torch.float64),
        "k": 6,
        "step": 0.015625,
    }
    cases = [
        _biased_case(rng, 0, 4, 2),
        _biased_case(rng, 4, 1, 1),
        _biased_case(rng, 3, 4, 4),
        ties,
        _biased_case(rng, 5, 3, 2, torch.float32),
    ]
    for case in cases:
        compare(_three(answer(**case), case), _biased(**case), describe(**case))
    case, direction = _biased_case(rng, 5, 4, 2), normal(rng, 5, 2)

    def gradient(function: Callable[..., Any]) -> tuple[Tensor, bool]:
        leaf = case["scores"].clone().requires_grad_()
        _, weights, moved = function(**case | {"scores": leaf})
        (found,) = torch.autograd.grad((weights * direction).sum(), leaf)
        return found, moved.requires_grad

    with taking_gradients(describe(**case)):
        got, attached = gradient(answer.function)
    compare(got, gradient(_biased)[0], f"{describe(**case)}, gradient of the scores")
    if attached:
        raise Failure(
            f"{describe(**case)}:\n    the next bias hangs on the graph of this batch; counts have no gradient"
        )


# 03.6


def _dead(load: list[int]) -> int:
    return sum(100 * len(load) * c <= sum(load) for c in load)


def _violation(load: list[int]) -> Fraction:
    return Fraction(max(load) * len(load), sum(load)) - 1


def _report(counts: Tensor) -> tuple[Tensor, Tensor]:
    layers = counts.tolist()
    violation = [float(_violation(load)) if sum(load) else float("nan") for load in layers]  # fmt: skip
    return (
        torch.tensor(violation, dtype=torch.float64),
        torch.tensor([_dead(load) for load in layers], dtype=torch.int64),
    )


def _expect_report(answer: Answer, counts: Tensor) -> None:
    """As `compare`, but where a layer is empty a NaN is asked for."""
    got, want = answer(counts=counts), _report(counts)
    what = describe(counts=counts)
    if not isinstance(got, tuple | list) or len(got) != 2:
        raise Failure(f"{what}:\n    expected 2 tensors, got {shown(got)}", hint=False)
    empty, violation = want[0].isnan(), got[0]
    if (
        type(violation) is Tensor
        and violation.shape == want[0].shape
        and violation.dtype == want[0].dtype
    ):
        hidden = empty & ~violation.isnan()
        if bool(hidden.any()):
            layer = int(hidden.nonzero()[0])
            raise Failure(
                f"{what}:\n    layer {layer} has no assignments: expected nan, got {violation[layer].item()}"
            )
        violation = violation.detach().masked_fill(empty, 0.0)
    compare((violation, got[1]), (want[0].masked_fill(empty, 0.0), want[1]), what)


def _loads(rng: Random, layers: int, experts: int) -> Tensor:
    """Layers of unlike size, each with one expert far above the others, one idle, and one on each side of 1 %."""
    rows = []
    for _ in range(layers):
        most = rng.randint(400, 4000)
        row = [rng.randint(most // 8, most) for _ in range(experts)]
        top, idle, *near = rng.sample(range(experts), min(4, experts))
        row[top] = 2 * most
        for place in (idle, *near):
            row[place] = 0
        # At most 1 % of the mean, and 2 more is above.
        dead = sum(row) // (100 * experts)
        for place, count in zip(near, (dead, dead + 2), strict=False):
            row[place] = count
        rows.append(row)
    return torch.tensor(rows)


def _report_layers(answer: Answer, rng: Random) -> None:
    # Four layers, each on a pair of experts of its own: pooled, a perfect balance.
    apart = torch.zeros(4, 8, dtype=torch.int64)
    for layer in range(4):
        apart[layer, 2 * layer : 2 * layer + 2] = 16
    sizes = ((1, 3), (2, 4), (3, 7), (6, 16))
    for counts in (apart, *(_loads(rng, *size) for size in sizes)):
        _expect_report(answer, counts)


def _report_limits(answer: Answer, rng: Random) -> None:
    # The mean is 100: 1 is just dead, 2 is not.
    edge = torch.tensor([[1, 199, 100], [2, 198, 100]])
    empty = torch.tensor([[0, 0, 0], [5, 5, 5]])
    alone = torch.tensor([[7], [0], [1]])
    below = torch.tensor([[0, 10, 10, 10]])  # far below the mean, a little above it
    few = torch.tensor([[1, 13, 13, 13]])  # a single one may be above 1 %
    # Between 1 % of the mean and 1 % of: the busiest load, the middle load, the mean of those that serve.
    others = torch.tensor([[3, 397, 200, 200], [2, 151, 300, 347], [0, 3, 497, 500]])
    one = torch.zeros(2, 6, dtype=torch.int64)
    one[0, 5], one[1, 0] = 1, 10**15 + 1
    for counts in (
        edge,
        below,
        few,
        others,
        empty,
        alone,
        one,
        torch.zeros(0, 4, dtype=torch.int64),
    ):
        _expect_report(answer, counts)


# 03.7


def _diagnosis(counts: Tensor) -> str:
    sequences = counts.tolist()
    layers = range(counts.shape[1])
    batch = [[sum(c) for c in zip(*(s[i] for s in sequences), strict=True)] for i in layers]  # fmt: skip
    used = [i for i in layers if sum(batch[i])]
    if not used:
        return "no tokens"
    uneven = [_violation(batch[i]) > 1 for i in used]
    if any(uneven):
        return "collapsed" if all(uneven) else "some layers"
    if any(_dead(batch[i]) for i in used):
        return "dead experts"
    for i in used:
        alone = [_violation(s[i]) > 1 for s in sequences if sum(s[i])]
        if 2 * sum(alone) >= len(alone):
            return "sequences"
    return "healthy"


def _even(rng: Random, experts: int) -> list[int]:
    return [rng.randint(30, 40) for _ in range(experts)]


def _ill(rng: Random, what: str, sequences: int, layers: int, experts: int) -> Tensor:
    """Loads with that diagnosis, else at random; experts are at least 4."""
    made = [[_even(rng, experts) for _ in range(layers)] for _ in range(sequences)]
    sick = rng.sample(range(layers), rng.randint(1, max(1, layers - 1)))
    if what == "collapsed":
        sick = list(range(layers))
    if what == "sequences":  # of all layers together, half as well
        sick = rng.sample(range(layers), (layers + 1) // 2)
    for layer in sick:
        busy, idle = rng.sample(range(experts), 2)
        first = rng.randrange(experts)
        for b in range(sequences):
            row = made[b][layer]
            if what in ("collapsed", "some layers"):
                # Each layer has a favourite of its own: all pooled, the load may be even.
                row[(busy + layer) % experts] = 40 * experts
            if what == "dead experts":
                row[idle] = 0
            if what == "sequences":
                # Each sequence has favourites, and every expert is one equally often.
                row[(first + b) % experts] = 40 * experts
    return torch.tensor(made)


_SICK = ("collapsed", "some layers", "dead experts", "sequences", "healthy")


def _expect_diagnosis(answer: Answer, counts: Tensor) -> None:
    want, got = _diagnosis(counts), answer(counts=counts)
    if not same(got, want):
        raise mismatch(got, want, describe(counts=counts))


def _diagnosis_words(answer: Answer, rng: Random) -> None:
    by_hand = (
        [[[9, 7, 8, 8]], [[6, 9, 8, 9]]],
        [[[31, 0, 1, 0]], [[29, 2, 1, 0]]],
        [[[14, 9, 9, 0]], [[11, 12, 9, 0]]],
        # Two layers, collapsed onto experts of their own: pooled, nothing is uneven.
        [[[20, 0, 1, 0], [0, 0, 1, 20]]],
        [[[8, 8, 8, 8], [1, 30, 1, 1]]],
        [[[1, 30, 1, 1], [8, 8, 8, 8], [30, 1, 1, 1]]],
        # Even together, uneven each.
        [[[30, 1, 1, 1]], [[1, 30, 1, 1]], [[1, 1, 30, 1]], [[1, 1, 1, 30]]],
    )
    cases = [torch.tensor(counts) for counts in by_hand]
    for what in _SICK * 2:
        experts = rng.randint(4, 7)
        layers = rng.randint(2, 4)
        cases.append(_ill(rng, what, experts, layers, experts))
    for counts in sorted(cases, key=lambda c: c.numel()):
        _expect_diagnosis(answer, counts)


def _diagnosis_limits(answer: Answer, rng: Random) -> None:
    cases = [
        torch.zeros(2, 3, 4, dtype=torch.int64),
        torch.zeros(0, 2, 4, dtype=torch.int64),
        torch.tensor([[[5]], [[3]]]),  # one expert is never uneven
        # The busiest has just twice the mean: not uneven.
        torch.tensor([[[16, 5, 5, 6]]]),
        torch.tensor([[[17, 5, 5, 6]]]),
        # Just 1 % of the mean, and just above it.
        torch.tensor([[[1, 199, 100]]]),
        torch.tensor([[[2, 198, 100]]]),
        torch.tensor([[[1, 13, 13, 13]]]),
        # Between 1 % of the mean and 1 % of the busiest load, or of the middle one.
        torch.tensor([[[3, 397, 200, 200]]]),
        torch.tensor([[[2, 151, 300, 347]]]),
        # Layers of unlike size: each is measured by its own mean.
        torch.tensor([[[9, 2, 2, 3], [40, 40, 40, 40]]]),
        torch.tensor([[[3, 3, 3, 3], [900, 900, 900, 900]]]),
        torch.tensor([[[7, 900, 900, 900], [5, 5, 5, 5]]]),
        # An empty layer is left out: what remains has collapsed, or is healthy.
        torch.tensor([[[40, 1, 1, 1], [0, 0, 0, 0]]]),
        torch.tensor([[[9, 9, 8, 9], [0, 0, 0, 0]]]),
        # Half of the sequences, less than half, and an empty one that does not count.
        torch.tensor([[[20, 3, 3, 3]], [[6, 9, 9, 9]]]),
        torch.tensor([[[20, 3, 3, 3]], [[7, 9, 9, 9]], [[7, 9, 9, 9]]]),
        torch.tensor([[[20, 3, 3, 3]], [[6, 9, 9, 9]], [[0, 0, 0, 0]]]),
        # Empty in that layer alone.
        torch.tensor([[[20, 3, 3, 3], [9, 9, 9, 9]], [[6, 9, 9, 9], [9, 9, 9, 9]], [[0, 0, 0, 0], [9, 9, 9, 9]]]),
        # A short sequence is measured by its own mean: not that of the batch, nor of its other layers.
        torch.tensor([[[4, 0, 0, 0]], [[20, 22, 21, 21]]]),
        torch.tensor([[[4, 0, 0, 0], [20, 20, 20, 20]], [[2, 3, 3, 3], [20, 20, 20, 20]]]),
        # Half of the sequences in one layer, none in the other.
        torch.tensor([[[20, 3, 3, 3], [9, 9, 9, 9]], [[6, 9, 9, 9], [9, 9, 9, 9]]]),
        # Dead, and uneven in each sequence: the first line that fits.
        torch.tensor([[[30, 2, 2, 0]], [[2, 30, 2, 0]], [[2, 2, 30, 0]]]),
        # Dead and uneven: the first line that fits. Idle in one sequence: not dead.
        torch.tensor([[[40, 10, 10, 0], [10, 10, 10, 0]]]),
        torch.tensor([[[12, 12, 12, 0]], [[10, 11, 12, 9]]]),
        # Two layers in which half of the sequences would be uneven, if they were pooled.
        torch.tensor([[[20, 3, 3, 3], [9, 9, 9, 9]], [[7, 9, 9, 9], [3, 20, 3, 3]], [[7, 9, 9, 9], [9, 9, 9, 9]]]),
    ]  # fmt: skip
    for counts in cases:
        _expect_diagnosis(answer, counts)


# 03.8

MOST_VIOLATION, MOST_ERROR = 0.75, 0.36


def _task(
    rng: Random, kinds: int, width: int = 8
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(what is handed to the learner, held-out x and y).

    Tokens of a kind lie around a centre; those of opposite centres ask for different matrices, so that no one matrix
    does. All share a direction, and the router leans along it: every token goes to one expert.
    """
    draw = generator(rng)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    directions = torch.linalg.qr(normal(width, width)).Q
    pairs = (kinds + 1) // 2
    centres = torch.cat([directions[:pairs], -directions[:pairs]])[:kinds]
    shared = directions[pairs]
    maps = normal(kinds, width, width) / width**0.5

    def tokens(of_each: int) -> dict[str, Tensor]:
        kind = torch.arange(kinds).repeat(of_each)
        kind = kind[torch.randperm(len(kind), generator=draw)]
        x = 2 * centres[kind] + 2 * shared + 0.4 * normal(len(kind), width)
        return {"x": x, "y": torch.einsum("tij,tj->ti", maps[kind], x)}

    router = 0.02 * normal(kinds, width)
    router[rng.randrange(kinds)] += 1.5 * shared
    experts = normal(kinds, width, width) / width**0.5
    return tokens(64) | {"router": router, "experts": experts}, tokens(128)


def _measured(
    x: Tensor, y: Tensor, router: Tensor, bias: Tensor, experts: Tensor
) -> tuple[float, float]:
    """Max violation, and mean squared error over the variance of y, of the layer as the question defines it."""
    probs = torch.softmax(x @ router.T, dim=-1)
    chosen = (probs + bias).sort(dim=-1, descending=True, stable=True).indices[:, 0]
    output = torch.zeros_like(y)
    for e in range(len(router)):
        mine = chosen == e
        output[mine] = probs[mine, e, None] * (x[mine] @ experts[e].T)
    load = [int((chosen == e).sum()) for e in range(len(router))]
    error = (output - y).square().mean() / (y - y.mean(dim=0)).square().mean()
    return float(_violation(load)), float(error)


def _cured(answer: Answer, rng: Random, kinds: int) -> None:
    given, unseen = _task(rng, kinds)
    got = answer(**given)
    what = describe(**given)
    if not isinstance(got, tuple | list) or len(got) != 3:
        raise Failure(
            f"{what}:\n    expected router, bias and experts, got {_returned(got)}",
            hint=False,
        )
    wanted = {
        "router": given["router"],
        "bias": given["router"][:, 0],
        "experts": given["experts"],
    }
    trained = []
    for (name, like), tensor in zip(wanted.items(), got, strict=True):
        if (
            type(tensor) not in (Tensor, torch.nn.Parameter)
            or not tensor.is_floating_point()
        ):
            raise Failure(
                f"{what}:\n    expected {name} as a tensor of floats, got {shown(tensor)}",
                hint=False,
            )
        if tensor.shape != like.shape:
            raise Failure(
                f"{what}:\n    expected {name} of shape {list(like.shape)}, got {list(tensor.shape)}",
                hint=False,
            )
        plain = Tensor.detach(tensor).double()
        if not bool(plain.isfinite().all()):
            raise Failure(
                f"{what}:\n    {name} holds NaN or infinity: the training diverged",
                hint=False,
            )
        trained.append(plain)
    violation, error = _measured(unseen["x"].double(), unseen["y"].double(), *trained)
    bars = (
        ("max violation", violation, MOST_VIOLATION),
        ("mean squared error over the variance of y", error, MOST_ERROR),
    )
    # `not <=`: an error beyond all numbers is NaN or infinite.
    if not all(value <= bar for _, value, bar in bars):
        lines = [
            f"\n    {name}: expected at most {bar}, got {value:.2f}"
            for name, value, bar in bars
        ]
        raise Failure(f"{what}, measured on {len(unseen['x'])} new tokens:" + "".join(lines))  # fmt: skip


def _cured_once(answer: Answer, rng: Random) -> None:
    _cured(answer, rng, 8)


def _cured_again(answer: Answer, rng: Random) -> None:
    _cured(answer, rng, 7)


_LOSSES = "book/balancing/losses"
_CAPACITY = "book/balancing/capacity"
_COLLAPSE = "book/balancing/collapse"

EXERCISE = Exercise(
    number="03",
    topic="balancing",
    title="Balancing a router",
    next_step="all of exercise 03 is done; its hand-graded question is the last cell",
    questions=(
        Question(
            "03.1",
            "The load-balancing loss",
            "switch_loss",
            2,
            15,
            f"{_LOSSES}, section 'The Switch loss'",
            (
                Invariant(
                    "is E times the sum over experts of share times mean probability, in both conventions",
                    2,
                    _switch_values,
                    "A sum over experts, not a mean; one softmax, over the logits; f counts the given ids, not "
                    "probabilities. Nothing forbids a value below 1.",
                ),
                Invariant(
                    "passes a gradient through the probabilities alone",
                    1,
                    _switch_gradient,
                    "f counts decisions and has no gradient: no straight-through estimate. P is not detached.",
                ),
                Invariant(
                    "at the edges: no tokens, one expert, every expert for each, all on one",
                    1,
                    _switch_limits,
                    "Without tokens the loss is 0, not 0/0. An expert that nobody chose counts with f = 0: "
                    "bincount(minlength=E). torch.softmax takes off each row's maximum.",
                ),
            ),
        ),
        Question(
            "03.2",
            "Even importance",
            "importance_cv2",
            1,
            15,
            f"{_LOSSES}, section 'Importance and load'",
            (
                Invariant(
                    "is the variance of the summed weights over their squared mean",
                    1,
                    _importance_values,
                    "Sum weights, not counts, for each of the num_experts. The variance divides by E (torch.var "
                    "divides by E - 1), and there is no epsilon: the ratio does not depend on the weights' scale.",
                ),
                Invariant(
                    "passes a gradient to the weights",
                    1,
                    _importance_gradient,
                    "Stay with differentiable operations: index_add or scatter_add, not float(...). No root: its "
                    "gradient is infinite where all are even.",
                ),
                Invariant(
                    "is 0 where all importances are 0, without NaN in value or gradient",
                    1,
                    _importance_limits,
                    "torch.where alone keeps NaN out of the value only: its gradient is 0 times infinity. Branch, or "
                    "divide by a mean that is never 0.",
                ),
            ),
        ),
        Question(
            "03.3",
            "The z-loss",
            "router_z_loss",
            1,
            10,
            f"{_LOSSES}, section 'The z-loss'",
            (
                Invariant(
                    "is the mean over tokens of logsumexp squared",
                    1,
                    _z_values,
                    "Square each token's logsumexp first, then take the mean over tokens.",
                ),
                Invariant(
                    "survives logits of 1000 and of half precision",
                    1,
                    _z_large,
                    "exp(1000) is infinite: torch.logsumexp takes off the maximum. float16 ends at 65504: convert to "
                    "float32 before, not after.",
                ),
                Invariant(
                    "takes forbidden experts and no tokens, gradient included",
                    1,
                    _z_limits,
                    "A logit of minus infinity adds 0 to the sum. The mean of nothing is NaN: divide the sum by "
                    "max(1, T).",
                ),
            ),
        ),
        Question(
            "03.4",
            "Who fits in",
            "kept_slots",
            2,
            20,
            f"{_CAPACITY}, section 'How many fit'",
            (
                Invariant(
                    "keeps the first `capacity` assignments of each expert",
                    1,
                    _kept_positions,
                    "Number the slots row by row, t·K + j; the place of each is how many earlier slots chose the same "
                    "expert. The second choice of token 0 goes before the first of token 1.",
                ),
                Invariant(
                    "gives padding no place",
                    1,
                    _kept_padding,
                    "Take padding out before you count places, not only from the result.",
                ),
                Invariant(
                    "lets what is dropped contribute exactly 0, at the edges too",
                    1,
                    _kept_combined,
                    "A token that has lost everything keeps nothing: no pass-through and no last resort. A capacity "
                    "may be 0, and may be above T; counts need integers.",
                ),
            ),
        ),
        Question(
            "03.5",
            "A bias instead of a loss",
            "biased_step",
            2,
            20,
            f"{_LOSSES}, section 'A bias instead of a loss'",
            (
                Invariant(
                    "chooses with the bias and weighs without it",
                    2,
                    _biased_choice,
                    "The bias decides who serves. The weights are the scores of those chosen, without the bias, "
                    "divided by their sum.",
                ),
                Invariant(
                    "moves each bias by one step against its excess of load",
                    1,
                    _biased_update,
                    "Only the sign counts, and it may be 0: compare E times the count with T·K, in integers. Loads "
                    "are counts of ids, not sums of scores.",
                ),
                Invariant(
                    "breaks ties, takes no tokens, and lets the gradient reach the scores",
                    1,
                    _biased_limits,
                    "torch.topk promises no order among equal scores: sort stably. Without tokens no bias moves. "
                    "Choose from detached scores, weigh with those in the graph.",
                ),
            ),
        ),
        Question(
            "03.6",
            "Layer by layer",
            "load_report",
            1,
            10,
            f"{_COLLAPSE}, section 'Four numbers for a load'",
            (
                Invariant(
                    "reports each layer by itself",
                    1,
                    _report_layers,
                    "No sum over layers: the mean load is that of the layer, and so is the 1 % of it.",
                ),
                Invariant(
                    "at the edges: just 1 %, one expert, an empty layer",
                    1,
                    _report_limits,
                    "At most 1 % is dead, not less than 1 %. An empty layer's violation is 0/0: leave the NaN, and "
                    "all its experts are dead.",
                ),
            ),
        ),
        Question(
            "03.7",
            "A diagnosis",
            "diagnose",
            2,
            20,
            f"{_COLLAPSE}, section 'Four numbers for a load'",
            (
                Invariant(
                    "names what is the matter, layer by layer and sequence by sequence",
                    1,
                    _diagnosis_words,
                    "Sum over sequences, never over layers. Ask in the order of the table and return the first that "
                    "fits; only the last question looks at single sequences.",
                ),
                Invariant(
                    "draws the lines where the table draws them",
                    1,
                    _diagnosis_limits,
                    "Above twice the mean, at most 1 %, at least half. Leave out empty layers and empty sequences. In "
                    "integers no rounding moves a line: max · E > 2 · sum.",
                ),
            ),
        ),
        Question(
            "03.8",
            "Cure a router",
            "train_balanced",
            3,
            30,
            f"{_COLLAPSE}, section 'A router left alone'",
            (
                Invariant(
                    "has a small error and an even load on tokens that it has not seen",
                    3,
                    _cured_once,
                    "Uneven: add a balancing loss of about the size of the error (03.1), or move a bias after each "
                    "step (03.5). A large error at an even load: the router must go on learning from the task.",
                ),
                Invariant(
                    "and again with another number of kinds",
                    1,
                    _cured_again,
                    "Take sizes from the arguments, and leave the cure some room: it should not pass by luck.",
                ),
            ),
        ),
    ),
)
