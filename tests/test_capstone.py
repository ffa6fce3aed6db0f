"""The capstone: designs are read strictly, cost what they cost, train alike anywhere; the bar is the record's."""

from __future__ import annotations

import importlib
import json
import math
import statistics
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_course import records
from moe_course.specs import accelerators
from moe_course.training import capstone

checks = importlib.import_module("moe_course.grading.checks.07_capstone")
TINY = replace(
    capstone.DESIGNS["8 large experts, 2 used"], width=16, hidden=8, batch=8, steps=20 * capstone.PART
)  # fmt: skip


@st.composite
def designs(draw):
    experts = draw(st.integers(1, 64))
    heads = draw(st.integers(1, 4))
    gate = draw(st.sampled_from(list(capstone.GATES)))
    cures = capstone.CURES if gate == "sigmoid" else ("none", "loss")
    points = sorted(draw(st.sets(st.integers(1, 99), max_size=5)))
    return capstone.Design(
        width=2 * heads * draw(st.integers(8, 16)),
        layers=draw(st.integers(1, 6)),
        heads=heads,
        experts=experts,
        k=draw(st.integers(1, experts)),
        hidden=draw(st.integers(1, 200)),
        shared=draw(st.integers(0, 100)) if experts > 1 else 0,
        gate=gate,
        cure=draw(st.sampled_from(cures)),
        strength=draw(st.floats(0.001, 10)),
        batch=draw(st.integers(8, 64)),
        steps=draw(st.integers(4, 1900)),
        peak_lr=draw(st.floats(1e-5, 0.1)),
        schedule=((0.0, 0.0), *((p / 100, 0.5) for p in points), (1.0, 1.0)),
        weight_decay=draw(st.floats(0, 1)),
    )


@given(designs())
def test_a_design_survives_being_plain_data(design):
    assert capstone.read(capstone.plain(design)) == design
    assert capstone.read(json.loads(json.dumps(capstone.plain(design)))) == design


@given(designs())
def test_costs_are_those_of_the_checks_own_arithmetic(design):
    claims = checks.true_claims(design)
    spec = design.spec()
    assert claims["stored_params"] == spec.total_params()
    used = spec.active_params(include_embedding=False)
    assert claims["used_params"] == used
    assert claims["training_flops"] == design.flops()
    for batch in (1, 64, 500):
        mine = max(checks._decode_ms(design, batch))
        assert mine == pytest.approx(1e3 * capstone.decode_seconds(design, batch))


@given(designs(), st.integers(1, 50))
def test_rates_follow_the_schedule(design, steps):
    for step in {0, steps // 2, steps - 1}:
        want = checks._rate(step, steps, design.peak_lr, design.schedule)
        assert design.rate(step, steps) == pytest.approx(float(want))


def test_the_device_is_none_that_can_be_bought():
    assert capstone.DEVICE.name not in accelerators


def test_a_transformer_has_the_parameters_that_its_design_counts():
    for design in (TINY, capstone.BASELINE, *capstone.DESIGNS.values()):
        model = capstone.transformer(design)
        assert sum(p.numel() for p in model.parameters()) == design.spec().total_params()  # fmt: skip


def test_largest_takes_all_that_the_budget_and_the_text_allow():
    for design in (capstone.BASELINE, *capstone.DESIGNS.values(), *capstone.SEARCH):
        assert capstone.read(capstone.plain(design)) == design
        more = replace(design, steps=design.steps + 1)
        assert design.flops() <= capstone.BUDGET
        assert more.flops() > capstone.BUDGET or more.steps > capstone.most_steps(more)


# --- Training ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """TINY trained apart, in a folder; and the steps that it told of."""
    told = []
    folder = tmp_path_factory.mktemp("runs")
    result = capstone.train_apart(TINY, 7, folder=folder, on_step=lambda *n: told.append(n))  # fmt: skip
    return folder, result, told


def test_a_run_apart_is_the_run_here(once):
    _, result, told = once
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    here = capstone.train(TINY, 7)
    torch.set_num_threads(threads)
    assert result | here == result  # the same numbers, to the last digit
    assert told[-1] == (20, 20)
    assert math.isclose(result["bits"], statistics.mean(result["domains"].values()))
    tokens = len(capstone.DOMAINS) * capstone.HELD_OUT_BYTES
    assert [sum(layer) for layer in result["counts"]] == [TINY.k * tokens]


def test_what_is_patched_here_changes_nothing_there(once, monkeypatch):
    _, result, _ = once
    monkeypatch.setattr(capstone, "train", lambda *args: {"bits": 0.0})
    monkeypatch.setattr(capstone, "evaluate", lambda *args: (0.0, None))
    monkeypatch.setenv("PYTHONSTARTUP", "/nowhere")
    assert capstone.train_apart(TINY, 7)["bits"] == result["bits"]


def test_a_finished_run_is_read_and_another_is_not(once, monkeypatch, capsys):
    folder, result, _ = once
    monkeypatch.setattr(capstone, "_run", lambda *args: pytest.fail("trained again"))
    assert capstone.train_apart(TINY, 7, folder=folder) == result
    for job in ((TINY, 8), (replace(TINY, peak_lr=0.01), 7)):
        with pytest.raises(pytest.fail.Exception, match="trained again"):
            capstone.train_apart(*job, folder=folder)
    raw = capstone.plain(TINY) | {"claims": {}}
    assert capstone.compare(raw, seeds=(7,), folder=folder) == [result["bits"]]
    said = capsys.readouterr().out
    assert f"{result['bits']:.4f} bits per byte" in said
    assert f"{capstone.BAR:.3f}" in said


def test_a_run_that_was_stopped_goes_on(once, tmp_path):
    _, result, _ = once

    class StopError(Exception):
        pass

    def stop(steps, done):
        if done == 10:
            raise StopError

    with pytest.raises(StopError):
        capstone.train_apart(TINY, 7, folder=tmp_path, on_step=stop)
    (checkpoint,) = tmp_path.iterdir()
    assert checkpoint.suffix == ".pt"
    told = []
    again = capstone.train_apart(TINY, 7, folder=tmp_path, on_step=lambda *n: told.append(n))  # fmt: skip
    assert again["bits"] == result["bits"]
    assert told == [(20, 20)]
    assert not checkpoint.exists()


def test_what_diverges_and_what_hangs_is_said():
    wild = replace(TINY, peak_lr=0.1, schedule=((0.0, 1.0), (1.0, 1.0)))
    job = {"design": capstone.plain(wild) | {"peak_lr": 1e30}, "seed": 0, "part": 4, "checkpoint": None}  # fmt: skip
    with pytest.raises(ValueError, match="peak_lr must be a plain number"):
        capstone._run(job, None, 60)
    with pytest.raises(RuntimeError, match=r"ended: stopped after 0 s at most"):
        capstone.train_apart(TINY, 0, most_seconds=0.2)


# --- The record ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(root):
    return records.load(root / capstone.RECORD).rows


@pytest.fixture(scope="module")
def root(request):
    return request.config.rootpath


def test_the_constants_are_those_of_the_record(rows):
    dense = capstone.bits(rows, "dense")
    assert len(dense) >= 5
    assert round(statistics.mean(dense), 4) == capstone.DENSE_BITS
    assert capstone.bar(rows) == capstone.BAR


def test_the_record_is_of_these_designs(rows):
    for row, (name, design, seed) in zip(rows, capstone.arms(), strict=True):
        assert (row["name"], row["seed"]) == (name, seed)
        assert row["flops"] <= capstone.BUDGET // capstone.PART
        assert {key: row[key] for key in ("experts", "k", "hidden", "peak_lr")} == {
            key: getattr(design, key) for key in ("experts", "k", "hidden", "peak_lr")
        }


def test_no_dense_model_of_the_search_is_better_than_the_baseline(rows):
    search = capstone.bits(rows, "search")
    dense = capstone.bits(rows, "dense")
    assert min(search) > min(dense) - statistics.stdev(dense)


def test_the_bar_lies_three_deviations_from_either_side(rows):
    dense = capstone.bits(rows, "dense")
    spread = statistics.stdev(dense)
    assert statistics.mean(dense) - capstone.BAR >= 3 * spread
    for name in capstone.DESIGNS:
        found = capstone.bits(rows, name)
        assert capstone.BAR - statistics.mean(found) >= 3 * statistics.stdev(found), name  # fmt: skip
    for row in rows:
        if row["experts"] == 1:
            assert row["held_out_bits"] > capstone.BAR + spread
        else:
            assert row["max_violation"] <= checks.MOST_VIOLATION
            assert row["dead_experts"] == 0


def test_the_exercise_prints_the_limits_and_the_record(root, rows):
    text = (root / "solutions" / "07_capstone.py").read_text("utf-8")
    said = " ".join(line.removeprefix("# ") for line in text.splitlines())
    dense = capstone.bits(rows, "dense")
    for what in (
        f"a loss of at most {capstone.BAR:.3f} bits per byte",
        f"{statistics.mean(dense):.3f} ± {statistics.stdev(dense):.3f}",
        "8 · 10¹¹ FLOPs",
        f"{capstone.MEMORY:,} bytes of training state",
        f"{1e3 * capstone.DECODE[1]:g} ms at batch 1, and {1e3 * capstone.DECODE[64]:g} ms at batch 64",
        "0.2 GB/s and 2 GFLOP/s",
        f"a max violation of at most {checks.MOST_VIOLATION:g}",
        f"to {checks.WITHIN:.0%}".replace("%", " %"),
        f"2 passes over {capstone.TRAIN_BYTES:,} bytes",
        "a quarter of its steps",
    ):
        assert what in said, what
    assert (capstone.BUDGET, capstone.PART, capstone.PASSES) == (8 * 10**11, 4, 2)
    assert (capstone.DEVICE.bandwidth, capstone.DEVICE.bf16) == (0.2e9, 2e9)
