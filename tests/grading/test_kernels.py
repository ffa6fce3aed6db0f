"""Kernels of a submission run, and are watched, in its own process."""

from __future__ import annotations

import pytest
import torch
from hostile import solution

from moe_course.grading.calls import Kernels, spread
from moe_course.grading.core import RemoteError
from moe_course.grading.judge import judge
from moe_course.grading.sandbox import Limits, Sandbox, why_not
from moe_course.grading.session import Remote, Session

pytest.importorskip("triton", reason="triton is not installed: no kernels to run")

LIMITS = Limits(call_seconds=20)

CELL = """
import torch
from moe_course.grading.interpreter import tl, triton

@triton.jit
def add_kernel(x, y, n, BLOCK: tl.constexpr):
    zero = 0
    zero = zero.to(tl.float32)  # a tensor, as on a GPU, where the source of the kernel was found
    at = tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < n) + zero, mask=at < n)

def add(x, n):
    y = torch.zeros(8)
    add_kernel[(1,)](x, y, n, BLOCK=8)
    return y

def strides(x):
    return list(x.stride()), x.sum(), x.fill_(7)
"""

FIRST = """
from moe_judge import calls
def nonsense(function, case, apart, trace):
    return function(**case), {"programs": "many"}
calls.watch = nonsense
"""


@pytest.fixture(scope="module")
def remote():
    reason = why_not()
    if reason is not None:
        pytest.skip(f"no sandbox here: {reason}")
    one = Session([CELL], lambda: Sandbox(LIMITS), LIMITS)
    yield one
    assert not one.troubles
    one.close()


def test_a_kernel_is_watched_where_it_runs(remote):
    x = torch.arange(8.0)
    got, account = Remote(remote, "add").watch({"x": x, "n": 5}, {})
    assert torch.equal(got, torch.cat([x[:5], torch.zeros(3)]))
    assert (account.programs, account.loads, account.launches) == (1, 1, [1])
    assert account.read == {"x": 5}
    assert account.stored.tolist() == [True] * 5 + [False] * 3


def test_an_access_outside_is_told_with_the_learner_s_line(remote):
    says = r"1 element past the end of x(.|\n)*line 10 of your cell: tl.store"
    with pytest.raises(RemoteError, match=says):
        Remote(remote, "add").watch({"x": torch.ones(4), "n": 5}, {})
    assert not remote.lost


def test_arguments_are_laid_out_apart_and_changes_seen(remote):
    x = torch.arange(6).view(3, 2)
    with pytest.raises(AssertionError, match="changed its arguments"):
        Remote(remote, "strides").watch({"x": x}, {"x": 2**28})
    y = torch.arange(8.0)
    _, account = Remote(remote, "add").watch({"x": y, "n": 8}, {})
    assert account.apart
    wide = spread(x, 100)
    assert wide.stride() == (100, 1)
    assert torch.equal(wide, x)


GOOD = Kernels(
    1, 2, 3, 0, 5, 6, [1], [[16, 16, 16]], [], [], [], {"x": 1}, [], True, None
)


@pytest.mark.parametrize(
    "change",
    [
        {"programs": True},
        {"loads": 1.0},
        {"launches": [1.5]},
        {"dots": [[16, 16]]},
        {"dots": [16]},
        {"races": [3]},
        {"unwritten": "none"},
        {"refused": [1]},
        {"read": {"x": "all"}},
        {"read": [1]},
        {"apart": 1},
        {"stored": [True]},
        {"more": 1},
    ],
    ids=str,
)
def test_nonsense_is_no_account_of_kernels(change):
    assert Kernels.of(GOOD.plain()) == GOOD
    with pytest.raises(ValueError, match="no account"):
        Kernels.of(GOOD.plain() | change)
    with pytest.raises(ValueError, match="no account"):
        Kernels.of(None)


@pytest.mark.usefixtures("remote")
def test_a_submission_that_sends_nonsense_about_kernels_loses_those_questions():
    cells = [FIRST, *(source for _, source in solution("05"))]
    result = judge(cells, "05", lambda: Sandbox(LIMITS), limits=LIMITS)
    assert result.status == "needs-review"
    for verdict in result.verdicts:
        kernel = verdict.question >= "05.4"
        assert verdict.points == (0 if kernel else verdict.out_of), verdict
        assert ("nonsense" in verdict.reason) == kernel


@pytest.mark.usefixtures("remote")
def test_an_unmasked_kernel_fails_where_others_pass():
    cells = [source for _, source in solution("05")]
    (place,) = [i for i, c in enumerate(cells) if "def swiglu_kernel" in c]
    cells[place] = cells[place].replace("inside = column < F", "inside = column >= 0")
    result = judge(cells, "05", lambda: Sandbox(LIMITS), limits=LIMITS)
    assert result.status == "graded"
    by_id = {v.question: v for v in result.verdicts}
    assert by_id["05.4"].points == 3  # all but the edges
    assert "out of bounds" in by_id["05.4"].reason
    assert "line" in by_id["05.4"].reason
    assert result.points == 24
