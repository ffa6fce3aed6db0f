"""`make gpu` without a GPU: the same programs, on tiny layers in Triton's interpreter; and what its pieces promise."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="there is no triton for this system")

from moe_course import records


def run(root, *words):
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "benchmarks/gpu_suite.py", *words]
    return subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True
    )


@pytest.fixture
def suite(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    return importlib.import_module("gpu_suite")


def test_a_dry_run_proves_times_and_records(root, tmp_path):
    done = run(root, "--dry-run", "--records", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    proof = records.load(tmp_path / "kernels_gpu_correct.json")
    assert {row["check"] for row in proof.rows} >= {"accuracy", "same bits", "graph"}
    assert all(row["ok"] is not False for row in proof.rows)
    unrun = {row["check"] for row in proof.rows if row["ok"] is None}
    assert unrun == {"graph", "memcheck", "racecheck"}  # what needs a GPU says so
    timed = records.load(tmp_path / "kernels_gpu.json")
    assert timed.command == "make gpu"
    layers = [row for row in timed.rows if row["what"] == "layer"]
    ours = [row for row in layers if row["contender"] == "ours"]
    assert [row["passes"] for row in ours] == ["forward", "forward+backward"]
    for row in ours:
        assert row["time_us"] > row["floor_us"] > 0
        assert row["best_peer"] in {"torch grouped_mm", "transformers"}
        flops = 18 if "backward" in row["passes"] else 6
        assert row["flops"] == flops * row["T"] * row["K"] * row["D"] * row["F"]
    for row in layers:
        assert row["time_us"] or row["note"]  # nobody is absent without a reason
    assert len([row for row in timed.rows if row["what"] == "stage"]) == 10
    for word in ("correctness: {", "no time for liger", "NOT RUN: memcheck"):
        assert word in done.stdout


def test_a_dry_run_stays_out_of_the_book(root):
    done = run(root, "--dry-run", "--records", "moe_course/data/records")
    assert done.returncode == 2
    assert "does not write among the book's records" in done.stderr


def test_without_a_gpu_it_says_so(root):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run(root)
    assert done.returncode == 1
    assert "no NVIDIA GPU" in done.stderr


WORKER = """
import os, sys, time
sys.path.insert(0, {folder!r})
import gpu_suite

def do(name):
    yield {{"begun": name}}
    if name == "die":
        os._exit(7)
    if name == "hang":
        time.sleep(60)
    if name == "break":
        gpu_suite._gpu_is_broken = lambda: True
        raise RuntimeError("illegal memory access")
    if name == "fail":
        raise ValueError("two\\nlines")
    print("a word between")
    yield {{"ended": name}}

gpu_suite.serve(do)
"""


def test_a_task_that_dies_hangs_or_fails_takes_no_other_with_it(
    suite, root, tmp_path, capfd
):
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(folder=str(root / "benchmarks")))
    worker = suite.Worker([str(script)])
    rows, deaths = [], []
    for task in ("one", "die", "two", "fail", "break", "three", "hang", "four"):
        try:
            rows += worker.ask(task, 4 if task == "hang" else 60)
        except suite.Died as death:
            deaths.append(str(death))
    worker.stop()
    assert [row["ended"] for row in rows if "ended" in row] == [
        "one",
        "two",
        "three",
        "four",
    ]
    assert {"begun": "die"} in rows  # what came before the death is kept
    assert deaths == [
        "the process ended with code 7",
        "ValueError: two",
        "RuntimeError: illegal memory access",
        "no end within 4 s",
    ]
    assert "a word between" in capfd.readouterr().out


def test_precompilation_reports_what_does_not_compile(suite, capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    suite.precompile([(json.dumps, ({},)), (json.loads, ("{",))])
    out = capsys.readouterr().out
    assert "not compiled ahead: loads('{',): JSONDecodeError" in out
    assert "compiled ahead: 2 jobs" in out
    assert os.environ["TRITON_INTERPRET"] == "1"


def test_decoding_turns_over_copies_of_the_weights_in_a_graph(suite, monkeypatch):
    """The path that a GPU alone takes, with a stand-in for graphs and events."""
    moe_kernels = importlib.import_module("moe_kernels")
    replayed, timed = [], []

    def captured(calls):
        replayed.append(len(calls))
        return lambda: [call() for call in calls]

    def rounds(calls, seconds):
        for name, call in calls.items():
            call()
            timed.append(name)
        return {name: [8.0, 8.0, 80.0] for name in calls}

    task = moe_kernels.Task("tiny", 8)
    monkeypatch.setattr(moe_kernels, "captured", captured)
    monkeypatch.setattr(moe_kernels, "rounds", rounds)
    monkeypatch.setattr(moe_kernels, "peak_mib", lambda call: 1.0)
    monkeypatch.setattr(moe_kernels, "DEVICE", "cuda")
    layers = moe_kernels.layers_of(task)
    assert len(layers) == 4
    assert len({layer.w_up.data_ptr() for layer in layers}) == 4
    assert not layers[0].ids.equal(layers[1].ids)
    monkeypatch.setitem(
        moe_kernels.moe_peers.PEERS, "liger", lambda layer: moe_kernels.ours
    )
    monkeypatch.setitem(
        moe_kernels.moe_peers.PEERS, "wrong", lambda layer: lambda given: 2 * given.x
    )
    rows = {row["contender"]: row for row in moe_kernels.measure(task, {})}
    assert timed == ["ours", "ours eager", "torch grouped_mm", "transformers", "liger"]
    assert replayed == [4, 4, 4]  # ours, torch, transformers: liger waits for the host
    assert rows["ours"]["time_us"] == 2.0  # a replay holds four layers
    assert (rows["ours"]["mode"], rows["ours eager"]["mode"]) == ("graph", "eager")
    assert rows["liger"]["mode"] == "eager"
    assert rows["liger"]["time_us"] == 8.0
    assert rows["ours eager"]["ratio_to_best_peer"] == 4.0
    assert rows["wrong"]["time_us"] is None
    assert "differs from ours" in rows["wrong"]["note"]
