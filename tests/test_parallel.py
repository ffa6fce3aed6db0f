"""Expert parallelism on real processes, against one process that computes everything."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import ranks
import torch
import torch.distributed as dist

from moe_course import costs
from moe_course.layers import Experts, TopKRouter
from moe_course.parallel import (
    ExpertParallelMoE,
    demo,
    run_ranks,
    shard,
    torchrun_ranks,
)

ROOT = Path(__file__).resolve().parents[1]

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


def test_a_function_of_a_notebook_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "__main__", ModuleType("__main__"))

    def mine():
        return 1

    mine.__module__ = "__main__"
    with pytest.raises(ValueError, match="mine is defined in a notebook"):
        run_ranks(mine, 2)


# ---- What the chapter and the benchmark run ----------------------------------


def test_the_demo_compares_counts_and_measures():
    sizes = demo.Sizes(tokens=32, width=16, hidden=12, experts=8, k=2)
    found = run_ranks(ranks.tour_and_steps, 4, sizes)
    one_way = costs.all_to_all_bytes(32, 16, 2, 4, bytes_per_number=4)
    for rank, f in enumerate(found):
        for case in ("even", "routed"):
            for what in ("output", "tokens", "router", "experts"):
                assert f[case][what] < 1e-5, (case, what)
            # Independently of the layer: choices of experts that are not on this rank.
            away = sum(n for e, n in enumerate(f[case]["slots"]) if e // 2 != rank)
            assert sum(f[case]["slots"]) == 32 * 2
            assert f[case]["traffic"]["dispatch"] == away * 16 * 4
            # Its count of a forward pass is what the operating system saw, less gloo's headers.
            if f[case]["written"] is not None:
                headers = f[case]["written"] - f[case]["counted"]
                assert 0 <= headers <= 3 * 3 * 1000  # exchanges, peers
        assert f["even"]["slots"] == [8] * 8
        assert f["even"]["traffic"]["dispatch"] == one_way
        assert len(f["times"]) == 3
        assert all(t > 0 for t in (*f["times"], *f["steps"].values()))
    back = sum(f["routed"]["traffic"]["combine"] for f in found)
    assert back == sum(f["routed"]["traffic"]["dispatch"] for f in found)
    assert back != 4 * one_way  # a learned router is not even


def test_a_difference_is_seen():
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0])
    assert demo._difference(a, b) == 0.5
    one, other = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    for module, grad in ((one, 1.0), (other, 3.0)):
        for p in module.parameters():
            p.grad = torch.full_like(p, grad)
    assert demo._most(one, other, slice(None)) == pytest.approx(2 / 3)


def test_the_even_router_is_even():
    ids = demo.EvenRouter(6, 4)(torch.zeros(9, 3)).expert_ids
    assert torch.bincount(ids.flatten()).tolist() == [6] * 6
    assert all(len(set(row)) == 4 for row in ids.tolist())


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank", "unchecked_shapes")
def test_tokens_that_do_not_fit_are_refused_before_anything_is_sent():
    layer = ExpertParallelMoE(TopKRouter(8, 4, 2), Experts(4, 8, 6))
    with pytest.raises(ValueError, match="tokens of width 8, got 7"):
        layer(torch.zeros(3, 7))
    with pytest.raises(ValueError, match=r"token_mask must be \[2, 3\], got \[6\]"):
        layer(torch.zeros(2, 3, 8), torch.ones(6, dtype=torch.bool))
    with pytest.raises(ValueError, match="dispatch must be one of"):
        ExpertParallelMoE(TopKRouter(8, 4, 2), Experts(4, 8, 6), dispatch="fast")
    y, _, slots = layer(torch.randn(2, 3, 8))
    assert y.shape == (2, 3, 8)
    assert len(slots.token) == 12
    assert layer.traffic.total() == 0


# ---- torchrun ----------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def torchrun(*words: str) -> subprocess.Popen[str]:
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=env,
    )  # fmt: skip


def agents(count: int, *words: str) -> list[subprocess.Popen[str]]:
    """So many machines, all of them this one: each with an agent and one rank, which meet at a free port."""
    meet = f"--rdzv-endpoint=127.0.0.1:{free_port()}"
    return [
        torchrun(
            f"--nnodes={count}", "--nproc-per-node=1", "--rdzv-backend=c10d", meet,
            "--rdzv-id=test", "--rdzv-conf=join_timeout=30", "--local-addr=127.0.0.1",
            *words,
        )
        for _ in range(count)
    ]  # fmt: skip


DEMO = ("-m", "moe_course.parallel.demo", "--tokens=64", "--rounds=1")


def output(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=90)
    finally:
        process.kill()
    return process.returncode, out, err


def check_report(text: str) -> None:
    assert "2 ranks, gloo, cpu: tokens 64, width 64" in text
    equal = re.search(r"equal to one process: (.*)", text)
    assert equal
    assert all(float(x) < 1e-5 for x in re.findall(r"to (\S+?)(?:,|$)", equal[1]))
    # Router gradients are summed by an all-reduce, which the layer does not count.
    sent = re.search(r"sent in a step, all ranks: ([\d,]+) bytes", text)
    assert sent
    slots, row = 2 * 64 * 2, 64 * 4
    assert 0 < int(sent[1].replace(",", "")) < 4 * slots * row
    assert re.search(r"[\d,]+ tokens/s; one process on the same tokens", text)


def test_torchrun_on_one_machine():
    code, out, err = output(torchrun("--nproc-per-node=2", "--standalone", *DEMO))
    assert code == 0, err
    check_report(out)


def test_two_torchrun_agents_form_one_group():
    found = [output(p) for p in agents(2, *DEMO)]
    assert [code for code, _, _ in found] == [0, 0], found
    check_report("".join(out for _, out, _ in found))
    assert sum("tokens/s" in out for _, out, _ in found) == 1  # rank 0 alone reports


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("kill", "rank 0 of 2 on .*: another rank is gone"),
        ("raise", "rank 1 of 2 on .*: ZeroDivisionError: on purpose"),
        ("sleep", r"rank 0 of 2 on .*: another rank did not answer within 4 s"),
        ("shape", "rank 0 of 2 on .*: ValueError: the ranks' experts must agree in"),
    ],
)
def test_what_goes_wrong_under_torchrun_ends_with_a_sentence(how, words):
    script = str(ROOT / "tests" / "torchrun_faults.py")
    run = torchrun("--nproc-per-node=2", "--standalone", script, how)
    code, _, err = output(run)
    assert code != 0
    assert re.search(words, err), err


def test_a_rank_that_dies_on_one_machine_ends_the_other():
    script = str(ROOT / "tests" / "torchrun_faults.py")
    found = [output(p) for p in agents(2, script, "kill")]
    assert all(code != 0 for code, _, _ in found)
    assert "another rank is gone" in "".join(err for _, _, err in found)


def test_without_torchrun_one_is_told_to_use_it(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with (
        pytest.raises(ValueError, match=r"RANK.* not set: start this with torchrun"),
        torchrun_ranks(),
    ):
        pass
