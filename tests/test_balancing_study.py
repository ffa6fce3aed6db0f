"""The balancing study: every cure trains, results are kept and resumed, the record is whole."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch

from moe_course import balance, records
from moe_course.training import balancing, data
from moe_course.training.balancing import CURES, Run, Setup

TINY = Setup(
    width=16, heads=2, hidden=8, context=16, batch_size=2, steps=6, every=2, held_out=96
)


# Not importance and load with k = 1: a softmax over one kept logit teaches the router nothing.
@pytest.mark.parametrize(
    ("cure", "k"),
    [(c, k) for c in CURES for k in (1, 2) if (c, k) != ("importance + load", 1)],
)
def test_every_cure_trains_and_counts_every_token(cure, k):
    run = Run(cure, 0.01, experts=4, k=k)
    model, result = balancing.train(run, TINY)
    history = torch.tensor(result["history"])  # [3, layers, experts]
    assert history.shape == (3, 2, 4)
    assert (history.sum(dim=2) == 2 * 2 * 16 * k).all()
    for domain in result["held_out"].values():
        assert 0 < domain["bits"] < 20
        assert [sum(layer) for layer in domain["counts"]] == [96 * k] * 2
    moved = [
        block.ffn.router.correction
        for block in model.blocks
        if block.ffn.router.correction is not None
    ]
    assert bool(moved) == cure.startswith("bias")
    assert all(correction.abs().max() > 0 for correction in moved)


def test_the_loss_of_a_cure_takes_part_in_training():
    _, light = balancing.train(Run("switch", 1e-6, experts=4), TINY)
    _, heavy = balancing.train(Run("switch", 10.0, experts=4), TINY)
    _, none = balancing.train(Run("none", experts=4), TINY)
    bits = [r["held_out"]["c"]["bits"] for r in (light, heavy, none)]
    assert bits[0] == pytest.approx(bits[2], abs=1e-3)
    assert abs(bits[1] - bits[2]) > 1e-3


def test_a_row_says_what_the_counts_say():
    _, result = balancing.train(Run("none", experts=4), TINY)
    row = balancing.row(result, history=True)
    counts = torch.tensor([d["counts"] for d in result["held_out"].values()])
    for layer in range(2):
        whole = counts[:, layer].sum(dim=0)
        assert row["max_violation"][layer] == round(balance.max_violation(whole), 3)
        assert row["dead_experts"][layer] == balance.dead_experts(whole)
        told = balance.mutual_information(counts[:, layer])
        assert row["domain_bits"][layer] == round(told, 4)
    bits = [d["bits"] for d in result["held_out"].values()]
    assert row["held_out_bits"] == round(sum(bits) / 6, 4)
    assert torch.tensor(row["by_domain"]).shape == (len(data.DOMAINS), 2, 4)
    assert "history" not in balancing.row(result)


def test_rows_are_selected_by_setting():
    rows = [
        {"cure": "none", "strength": 0.0, "experts": e, "k": k, "seed": s}
        for e in (8, 16)
        for k in (1, 2)
        for s in (0, 1)
    ]
    assert balancing.select(rows, "none") == rows[:2]
    assert balancing.select(rows, "none", experts=16, k=2) == rows[6:]
    assert balancing.select(rows, "switch", 0.01) == []


def test_a_study_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    which = [Run("none", experts=4, seed=s) for s in range(2)]
    first = balancing.work(which[0], TINY, tmp_path)
    rows = balancing.study(which, TINY, tmp_path, 1)
    assert rows[0] == balancing.row(first)
    assert not list(tmp_path.glob("*.partial"))

    def not_again(*_):
        raise AssertionError("a finished run was made again")

    monkeypatch.setattr(balancing, "train", not_again)
    assert balancing.study(which, TINY, tmp_path, 1) == rows
    with pytest.raises(ValueError, match="of another setup"):
        balancing.study(which, replace(TINY, steps=8), tmp_path, 1)


def test_the_study_covers_what_the_chapters_say():
    runs = balancing.runs()
    names = [run.name for run in runs]
    assert len(names) == len(set(names)) == 93
    assert {run.cure for run in runs} == set(CURES)
    sweep = Counter(
        run.strength for run in runs if run.cure == "switch" and run.experts == 8
    )
    assert len(sweep) == 8
    assert all(count >= 3 for count in sweep.values())


def test_the_record_is_of_this_study(root):
    record = records.load(root / "moe_course/data/records/balancing.json")
    wanted = [json.loads(json.dumps(vars(run))) for run in balancing.runs()]
    fields = list(wanted[0])
    assert [{key: row[key] for key in fields} for row in record.rows] == wanted
    assert {row["steps"] for row in record.rows} == {Setup().steps}
    kept = [row for row in record.rows if "history" in row]
    assert [(row["cure"], row["strength"]) for row in kept] == [
        ("none", 0.0),
        ("switch", 0.01),
        ("switch", 10.0),
        ("bias", 0.01),
    ]
    assert "changes" not in record.revision
