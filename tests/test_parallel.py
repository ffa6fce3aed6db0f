"""Expert parallelism on real processes, against one process that computes everything."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import ranks
import torch

from moe_course import costs
from moe_course.layers import Experts
from moe_course.parallel import run_ranks, shard

CASES = {
    "one rank": (1, [5], {}),
    "even": (2, [6, 6], {}),
    "uneven": (2, [4, 9], {"k": 3, "bias": True}),
    "no tokens on one": (2, [7, 0], {}),
    "no tokens at all": (2, [0, 0], {}),
    "four ranks": (4, [3, 0, 5, 2], {"experts": 8, "k": 2}),
    "almost all on one expert": (4, [8, 8, 8, 8], {"tilt": 50.0, "k": 1}),
    "padding": (2, [7, 5], {"masked": True}),
    "gelu, loop": (2, [5, 4], {"activation": "gelu", "dispatch": "loop"}),
}


@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_are_those_of_one_process(case):
    n, counts, options = CASES[case]
    found = run_ranks(ranks.step_with, n, counts, options)
    y, x, router, experts = ranks.single(counts, n, **options)

    def close(a, b):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)

    close(torch.cat([f["y"] for f in found]), y)
    close(torch.cat([f["x"] for f in found]), x)
    for f in found:
        for a, b in zip(f["router"], router, strict=True):
            close(a, torch.zeros_like(a) if b is None else b)
    for i, b in enumerate(experts):
        close(torch.cat([f["experts"][i] for f in found]), b)


def test_float32_agrees_to_rounding():
    options = {"dtype": torch.float32, "experts": 8, "width": 32, "hidden": 24}
    found = run_ranks(ranks.step_with, 2, [40, 30], options)
    y, *_ = ranks.single([40, 30], 2, **options)
    torch.testing.assert_close(
        torch.cat([f["y"] for f in found]), y, rtol=1e-5, atol=1e-6
    )


def test_bytes_sent_are_those_of_the_formula():
    width, k = 8, 2
    counts = [16, 16, 16, 16]
    found = run_ranks(ranks.evenly_routed, 4, counts)
    for f in found:
        want = costs.all_to_all_bytes(16, width, k, 4, bytes_per_number=8)
        assert f["dispatch"] == f["combine"] == want
        assert f["backward"] == 2 * want
        assert f["counts"] == 8 * 8 * 3 / 4  # 8 experts, 8 bytes each


def test_experts_with_data_parallelism():
    counts = [3, 5, 2, 4]
    found = run_ranks(ranks.data_parallel, 4, counts, 2)
    y, x, router, experts = ranks.single(counts, 4)
    torch.testing.assert_close(torch.cat([f["y"] for f in found]), y)
    torch.testing.assert_close(torch.cat([f["x"] for f in found]), x)
    for first in (0, 2):  # both copies hold the whole gradient
        for i, b in enumerate(experts):
            pair = torch.cat([f["experts"][i] for f in found[first : first + 2]])
            torch.testing.assert_close(pair, b)
    for f in found:
        torch.testing.assert_close(f["router"], router)


@pytest.mark.parametrize("how", ["kill", "raise", "sleep"])
def test_a_rank_that_is_lost_ends_all_with_a_reason(how):
    started = time.monotonic()
    reason = {
        "kill": "rank 1 died",
        "raise": "rank 1 failed: ZeroDivisionError: on purpose",
        "sleep": "rank 0 failed",
    }
    with pytest.raises(RuntimeError, match=reason[how]):
        run_ranks(ranks.one_dies, 2, how, timeout=4.0)
    assert time.monotonic() - started < 60


def test_nothing_is_left_running_after_a_failure():
    with pytest.raises(RuntimeError):
        run_ranks(ranks.one_dies, 2, "raise", timeout=4.0)
    own = os.getpid()
    children = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                process = Path("/proc") / entry
                fields = (process / "stat").read_text().rsplit(")", 1)[1].split()
                command = (process / "cmdline").read_text()
            except OSError:
                continue
            if int(fields[1]) == own and "spawn_main" in command:
                children.append(entry)
    assert children == []


def test_layers_that_do_not_fit_together_are_refused():
    with pytest.raises(
        RuntimeError, match=r"must agree in number, width, hidden.*rank 1: \(2, 8, 7"
    ):
        run_ranks(ranks.mismatched, 2)
    with pytest.raises(
        RuntimeError,
        match="router chooses among 6 experts, but 2 ranks with 2 each hold 4",
    ):
        run_ranks(ranks.wrong_router, 2)


def test_shards_and_their_refusal():
    whole = Experts(6, 4, 5, bias=True)
    parts = [shard(whole, r, 3) for r in range(3)]
    for name, value in whole.named_parameters():
        assert torch.equal(
            torch.cat([dict(p.named_parameters())[name] for p in parts]), value
        )
    with pytest.raises(ValueError, match="6 experts do not spread evenly over 4 ranks"):
        shard(whole, 0, 4)
    with pytest.raises(ValueError, match="ranks must be at least 1"):
        run_ranks(ranks.rank, 0)


def test_answers_come_by_rank():
    assert run_ranks(ranks.rank, 3) == [0, 1, 2]
