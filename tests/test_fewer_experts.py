"""The experiment on using fewer experts than in training, in small."""

from __future__ import annotations

import pytest
import torch

from moe_course import records
from moe_course.training import balancing, fewer_experts

TINY = balancing.Setup(
    width=8, layers=2, heads=1, hidden=8, context=16, batch_size=2, steps=2, held_out=64
)


def test_rows_cover_every_number_and_a_run_is_read_again(tmp_path, monkeypatch):
    rows = fewer_experts.work((2, 0), TINY, tmp_path)
    assert [r["used_k"] for r in rows] == list(fewer_experts.USED)
    assert len({r["held_out_bits"] for r in rows}) > 1  # the number matters
    (sets,) = [r["chosen"] for r in rows if "chosen" in r]
    # Two layers; two different experts for each byte of six domains.
    assert [sum(layer.values()) for layer in sets] == [6 * 64] * 2
    for ids in sets[0]:
        first, second = map(int, ids.split())
        assert 0 <= first < second < 8

    monkeypatch.setattr(fewer_experts, "train_and_use", None)  # must not be called
    assert fewer_experts.work((2, 0), TINY, tmp_path) == rows
    other = balancing.Setup(steps=3)
    with pytest.raises(ValueError, match="of another setup"):
        fewer_experts.work((2, 0), other, tmp_path)


def test_the_routers_use_as_many_as_they_are_told():
    torch.manual_seed(0)
    model = TINY.model(balancing.Run("switch", 0.01, k=2))
    for k in (1, 3):
        fewer_experts.use_experts(model, k)
        _, routings = model(torch.zeros(1, 16, dtype=torch.long))
        assert [r.expert_ids.shape for r in routings] == [(16, k)] * 2


def test_the_record_is_complete_and_says_what_the_page_says(root):
    record = records.load(root / fewer_experts.RECORD)
    keys = [(r["trained_k"], r["seed"], r["used_k"]) for r in record.rows]
    assert len(set(keys)) == len(keys) == 3 * 3 * 5
    for k in fewer_experts.TRAINED:
        for seed in fewer_experts.SEEDS:
            mine = {
                r["used_k"]: r["held_out_bits"]
                for r in record.rows
                if (r["trained_k"], r["seed"]) == (k, seed)
            }
            assert min(mine, key=mine.__getitem__) == k
