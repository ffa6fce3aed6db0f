"""Expectations on answers that return tensors: values, types, gradients, memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

import torch
from torch import Tensor

from moe_course.grading import calls
from moe_course.grading.core import Answer, Failure, describe, shown

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5}  # relative to the largest entry


def generator(rng: Random) -> torch.Generator:
    """Torch's random numbers, drawn from those of a check."""
    return torch.Generator().manual_seed(rng.getrandbits(62))


def normal(rng: Random, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=generator(rng), dtype=torch.float64).to(dtype)


@contextmanager
def taking_gradients(what: str) -> Iterator[None]:
    """Around a call of an answer and its backward: a Failure that says what went wrong.

    Such a call goes to `answer.function`: Answer hands over copies, and the gradients would be theirs.
    """
    try:
        yield
    except Exception as error:
        raise Failure(
            f"{what}: no gradient flows back ({type(error).__name__}: {error})"
        ) from error


def expect_tensor(
    answer: Answer,
    cases: Iterable[dict[str, Any]],
    oracle: Callable[..., Any],
    name: str = "",
) -> None:
    """The answer equals the oracle in shape, type and values on every case, given in order of size.

    A tuple of tensors is compared entry by entry.
    """
    for case in cases:
        compare(answer(**case), oracle(**case), f"{describe(**case)}{name}")


def compare(got: Any, want: Any, what: str) -> None:
    if isinstance(want, tuple):
        if not isinstance(got, tuple | list) or len(got) != len(want):
            raise Failure(
                f"{what}:\n    expected {len(want)} tensors, got {shown(got)}",
                hint=False,
            )
        for place, (g, w) in enumerate(zip(got, want, strict=True)):
            compare(g, w, f"{what}, result {place}")
        return
    if got is None:
        raise Failure(
            f"{what}:\n    returned None (is a `return` missing on some path?)",
            hint=False,
        )
    if type(got) is not Tensor:  # a subclass may define its own equality
        raise Failure(f"{what}:\n    expected a tensor, got {shown(got)}", hint=False)
    if got.shape != want.shape:
        raise Failure(
            f"{what}:\n    expected shape {list(want.shape)}, got {list(got.shape)}"
        )
    if got.dtype != want.dtype:
        raise Failure(
            f"{what}:\n    expected {want.dtype}, got {got.dtype}", hint=False
        )
    got = Tensor.detach(got)  # got.detach() could be an attribute of the object
    wrong = differing(got, want)
    if bool(wrong.any()):
        text = f"{what}:\n    expected {shown(want)},\n    got      {shown(got)}"
        if shown(got) == shown(want):  # too large to spell out, or alike when rounded
            at = tuple(wrong.nonzero()[0].tolist())
            entries = f"expected {want[at].item()}, got {got[at].item()}"
            text += f"\n    first different at {list(at)}: {entries}"
        raise Failure(text)


def differing(got: Tensor, want: Tensor) -> Tensor:
    """Where two tensors of one shape and type are not equal, up to rounding; a NaN is equal to nothing."""
    if not want.is_floating_point():
        return got != want
    scale = float(want.abs().max()) if want.numel() else 0.0
    tolerance = TOLERANCE[want.dtype] * max(scale, 1e-3)
    return ~((got - want).abs() <= tolerance)


def cost(function: Callable[..., Any], **case: Any) -> tuple[int, int]:
    """Entries of the largest tensor that a call makes, and FLOPs of its products, wherever the function runs."""
    elsewhere = getattr(function, "cost", None)
    if elsewhere is not None:
        largest, flops = elsewhere(**case)
        return int(largest), int(flops)
    return calls.cost(lambda: function(**case))[1:]
