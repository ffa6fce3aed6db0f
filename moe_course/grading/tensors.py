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

# Relative to the largest entry.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 1e-3}


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


# --- Triton kernels ------------------------------------------------------------------

MOST_LAUNCHES = 8
LEAST_DOT = 16  # the interpreter takes any size, a GPU's tensor cores do not


def watch(
    answer: Answer, case: dict[str, Any], apart: dict[str, int] | None = None
) -> tuple[Any, calls.Kernels]:
    """An answer's result and what its kernels did, wherever it runs.

    apart: arguments that are laid out with this stride of their first dimension.
    """
    from moe_course.kernels.trace import trace

    account: Any = None

    def measured(**given: Any) -> Any:
        nonlocal account
        elsewhere = getattr(answer.function, "watch", None)
        if elsewhere is not None:
            result, account = elsewhere(given, apart or {})
            return result
        result, plain = calls.watch(answer.function, given, apart or {}, trace)
        account = calls.Kernels.of(plain)
        return result

    inner = Answer(measured, answer.allowed)
    try:
        return inner(**case), account
    finally:
        answer.calls += inner.calls
        answer.empty += inner.empty


def expect_kernel(
    answer: Answer,
    case: dict[str, Any],
    want: Tensor,
    reads: dict[str, int],
    apart: dict[str, int] | None = None,
) -> calls.Kernels:
    """The answer equals `want`, kernels have computed it, and they are ones that a GPU would run as well.

    reads: how many elements of an argument must be loaded at least, by all programs together.
    """
    got, account = watch(answer, case, apart)
    what = describe(**case)

    def fail(text: str) -> Failure:
        return Failure(f"{what}:\n    {text}", hint=False)

    if got is not None and want.numel() and not account.launches:
        raise fail("no kernel ran: launch it with kernel[grid](...)")
    if len(account.launches) > MOST_LAUNCHES:
        raise fail(f"{len(account.launches)} launches; one is enough")
    if account.refused:
        raise fail(account.refused[0])
    if account.changed:
        raise fail(f"a program stores into the argument {account.changed[0]!r}")
    if account.atomics:
        raise fail(
            f"{account.atomics} atomic operations: the order of their additions differs from run to run; "
            "let one program own each output"
        )
    for dot in account.dots:
        if min(dot) < LEAST_DOT:
            raise fail(
                f"tl.dot of [{dot[0]}, {dot[2]}] and [{dot[2]}, {dot[1]}]: no side may be below {LEAST_DOT} on a GPU"
            )
    if account.races:
        raise fail(f"{account.races[0]}: on a GPU either may come first")
    if account.unwritten:
        raise fail(
            f"{account.unwritten[0]}: a kernel may load the arguments and what kernels have stored"
        )
    same_kind = (
        type(got) is Tensor and got.shape == want.shape and got.dtype == want.dtype
    )

    def require_stored() -> None:
        stored = account.stored
        if stored is None or stored.shape != want.shape:
            raise fail("what is returned is no tensor that programs could store into")
        if stored.numel() and not bool(stored.any()):
            raise fail(
                "no program has stored into the tensor that is returned: it is the kernel's to fill"
            )
        if not bool(stored.all()):
            raise fail(
                f"no program has stored the entry {(~stored).nonzero()[0].tolist()} of the result"
            )

    try:
        compare(got, want, what)
    except Failure as failure:
        if same_kind and account.stored is not None:
            require_stored()
        made = type(got) is Tensor and got.is_floating_point()
        if made and bool(got.isnan().any()) and not bool(want.isnan().any()):
            text = (
                f"{failure}\n    NaN is what a lane holds that a mask leaves out without other=, "
                "what an argument holds while no kernel runs, and inf / inf"
            )
            raise Failure(text, hint=False) from None
        raise
    require_stored()
    for name, least in reads.items():
        if account.read.get(name, 0) < least:
            raise fail(
                f"the programs have loaded {account.read.get(name, 0):,} of the {least:,} entries of {name} that the "
                "result depends on"
            )
    return account
