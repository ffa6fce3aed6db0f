"""What is looked at around a call: whether arguments changed, and what it cost."""

from __future__ import annotations

import pytest
import torch

from moe_course.grading.calls import cost, unchanged

X = torch.tensor([1.0, float("nan"), 3.0])


@pytest.mark.parametrize(
    "value", [X, [1, X], {"a": (X, "b")}, 3, "x", None, torch.empty(0), len]
)
def test_what_is_as_it_was(value):
    copy = value.clone() if isinstance(value, torch.Tensor) else value
    assert unchanged(copy, value)


@pytest.mark.parametrize(
    ("now", "before"),
    [
        (X.double(), X),
        (X[:2], X),
        (X[None], X),
        (X + 1, X),
        (torch.zeros(3), X),
        (None, X),
        ([1, 2], [1]),
        ({"a": 1, "b": 2}, {"a": 1}),
        ({"b": 1}, {"a": 1}),
        ((X, X + 1), (X, X)),
        (4, 3),
    ],
)
def test_what_has_changed(now, before):
    assert not unchanged(now, before)


def test_the_cost_is_the_largest_storage_and_the_products():
    a, b = torch.ones(4, 5), torch.ones(5, 6)

    def call():
        big = torch.zeros(100)
        return big[:1].expand(10**6).sum() + (a @ b).sum()  # a view counts once

    result, entries, flops = cost(call)
    assert (result, entries, flops) == (120, 100, 2 * 4 * 5 * 6)
