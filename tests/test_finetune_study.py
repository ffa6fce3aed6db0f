"""The studies of fine-tuning and upcycling: every recipe does what its name says, and a stopped study goes on."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from moe_course.finetune import parts_of, study, upcycle_study
from moe_course.layers import MoE

TINY = study.Setup(
    width=16,
    hidden=8,
    experts=4,
    context=16,
    batch_size=4,
    first_steps=4,
    steps=6,
    held_out=256,
)
UP = upcycle_study.Setup(
    width=16,
    hidden=12,
    context=16,
    batch_size=4,
    first_steps=6,
    extra_steps=20,
    held_out=256,
    rows=2,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("study")


def changed(before, after):
    """Parts of the model whose weights differ, adapters and idle experts set apart."""
    kinds = parts_of(before)
    return {
        kinds[name]
        for name, p in before.named_parameters()
        if not torch.equal(p, after.get_parameter(name))
    }


def tuned(name, folder, monkeypatch):
    """The model before and after a recipe, and the result of the run."""
    models = []
    keep = study.compare
    monkeypatch.setattr(
        study, "compare", lambda *pair: models.extend(pair[:2]) or keep(*pair)
    )
    result = study.tune(name, 1e-2, 0, TINY, folder)
    monkeypatch.setattr(study, "compare", keep)
    return *models, result


WANTED = {
    "everything": {"router", "experts", "rest"},
    "everything, replay 20 %": {"router", "experts", "rest"},
    "router at 1/100 of the rate": {"router", "experts", "rest"},
    "router frozen": {"experts", "rest"},
    "router alone": {"router"},
    "experts alone": {"experts"},
    "router and experts": {"router", "experts"},
    "all but router and experts": {"rest"},
    "experts of the domain": {"experts"},
    "router and experts of the domain": {"router", "experts"},
}


@pytest.mark.parametrize("name", WANTED)
def test_a_recipe_trains_what_it_says(name, folder, monkeypatch):
    before, after, result = tuned(name, folder, monkeypatch)
    assert changed(before, after) == WANTED[name]
    assert set(result["domains"]) == {*study.OLD, study.NEW}
    first_layer = {d["agreement"][0] for d in result["domains"].values()}
    if "rest" not in WANTED[name] and "router" not in WANTED[name]:
        assert first_layer == {1.0}, "nothing before the first router has changed"
    if "of the domain" in name:
        masks = study.domain_experts(before, 0.5, TINY)
        for b, a, mask in zip(
            study.moe_layers(before), study.moe_layers(after), masks, strict=True
        ):
            same = (a.experts.w_up == b.experts.w_up).flatten(1).all(1)
            assert same[~mask].all()
            assert not same[mask].any()
            assert 0 < mask.sum() < len(mask)


@pytest.mark.parametrize("name", ["LoRA on experts", "LoRA on experts, router"])
def test_lora_leaves_the_model_itself_alone(name, folder, monkeypatch):
    before, after, result = tuned(name, folder, monkeypatch)
    own = dict(after.named_parameters())
    for key, p in before.named_parameters():
        there = own[key.replace(".experts.w_", ".experts.experts.w_")]
        same = torch.equal(p, there)
        assert same == (not ("router" in name and "router" in key)), key
    assert result["trainable"] < sum(p.numel() for p in before.parameters())
    assert all(d["bits_after"] != d["bits_before"] for d in result["domains"].values())


def test_balance_and_rates_of_the_recipes():
    base = study.RECIPES["everything"]
    assert study.RECIPES["everything, no balancing loss"] == replace(base, balance=0.0)
    assert study.RECIPES["everything, balancing loss x10"].balance == 10 * base.balance
    assert study.RECIPES["router at 1/100 of the rate"].router_rate == 0.01
    assert len(study.all_runs()) == len(study.RECIPES) * 9


def test_a_router_at_a_hundredth_of_the_rate_moves_less(folder, monkeypatch):
    def moved(name):
        weights = [
            [m.router.weight for m in model.modules() if isinstance(m, MoE)]
            for model in tuned(name, folder, monkeypatch)[:2]
        ]
        return sum((b - a).norm().item() for a, b in zip(*weights, strict=True))

    slow, fast = moved("router at 1/100 of the rate"), moved("everything")
    assert 0 < slow < fast / 20


def test_replay_is_text_of_the_old_domains(folder, monkeypatch):
    texts = []
    keep = study.data.Batches
    monkeypatch.setattr(
        study.data, "Batches", lambda text, *a: texts.append(text) or keep(text, *a)
    )
    study.tune("everything, replay 20 %", 1e-3, 0, TINY, folder)
    text, size = texts[-1], TINY.batch_size * TINY.context
    old = study.text_of(study.OLD, TINY, round(0.2 * TINY.steps))
    new = study.text_of([study.NEW], TINY, TINY.steps - round(0.2 * TINY.steps))
    assert torch.equal(text, torch.cat([new[:-1], old]))
    assert len(text) == TINY.steps * size + 1


def test_rows_and_going_on(folder):
    run = ("router alone", 1e-3, 0)
    result = study.work(run, TINY, folder)
    assert study.row(study.work(run, TINY, folder)) == study.row(result)
    row = study.row(result)
    domains = result["domains"]
    old = [domains[d]["bits_after"] for d in study.OLD]
    assert row["old_bits_after"] == pytest.approx(sum(old) / 4, abs=1e-4)
    assert row["new_bits_after"] == pytest.approx(domains["c"]["bits_after"], abs=1e-4)
    agreed = [a for d in study.OLD for a in domains[d]["agreement"]]
    assert len(agreed) == 4 * TINY.layers
    assert row["agreement_old"] == pytest.approx(sum(agreed) / 8, abs=1e-4)
    assert row["max_violation_after"]["logs"] == [
        round(v, 3) for v in domains["logs"]["violation_after"]
    ]
    with pytest.raises(ValueError, match="another setup"):
        study.work(run, replace(TINY, steps=7), folder)


def test_both_models_are_read_on_all_held_out_text(folder):
    before = study.pretrained(0, TINY, folder)
    after = copy.deepcopy(before)
    with torch.no_grad():
        after.blocks[0].ffn.router.weight.mul_(-1)
    found = study.compare(before, after, TINY)
    for domain, seen in found.items():
        text = study.data.load([domain], "held_out")[: TINY.held_out + 1]
        bits = [
            study.loop.bits_per_byte(m, text, TINY.context, 10**6)
            for m in (before, after)
        ]
        assert [seen["bits_before"], seen["bits_after"]] == pytest.approx(bits)
        # Only the first router differs: each model's routes make the other one another model.
        assert seen["bits_before_new_routes"] != seen["bits_before"]
        assert seen["bits_after_old_routes"] != seen["bits_after"]
        assert seen["agreement"][0] < 0.5
        ids = text[: TINY.held_out].view(-1, TINY.context).long()
        for model, moment in ((before, "before"), (after, "after")):
            chosen = model(ids)[1][0].expert_ids.flatten()
            busiest = torch.bincount(chosen, minlength=TINY.experts).max() / len(chosen)
            assert seen[f"violation_{moment}"][0] == pytest.approx(
                4 * busiest.item() - 1
            )
    same = study.compare(before, before, TINY)
    for seen in same.values():
        assert seen["agreement"] == [1, 1]
        assert seen["violation_before"] == seen["violation_after"]
        for key in ("after", "after_old_routes", "before_new_routes"):
            assert seen[f"bits_{key}"] == pytest.approx(seen["bits_before"], rel=1e-6)


# ---- Upcycling -----------------------------------------------------------------


@pytest.mark.parametrize("name", upcycle_study.ARMS)
def test_an_arm_begins_where_it_says_and_spends_the_same(name, folder):
    result = upcycle_study.work((name, 0), UP, folder)
    assert upcycle_study.work((name, 0), UP, folder) == result
    row = upcycle_study.row(result)
    arm = upcycle_study.ARMS[name]
    exact = arm.start == "upcycled" and not arm.noise and arm.gate == "renormalised"
    assert (abs(row["start_bits"] - row["dense_bits"]) <= 1.01e-4) == exact
    if "all compute" not in name:
        spent = UP.extra_steps * UP.batch_size * UP.context
        dense = upcycle_study.loop.flops_per_token(UP.spec(), UP.context)
        one_step = row["flops_per_token"] * UP.batch_size * UP.context
        assert abs(row["flops"][-1] - spent * dense) <= one_step


def test_no_byte_is_trained_on_twice():
    first, extra = upcycle_study.halves(UP)
    size = UP.batch_size * UP.context
    assert UP.first_steps * size - 6 <= len(first) <= UP.first_steps * size
    whole = torch.cat([first, extra])
    share = len(first) // 6
    prose = upcycle_study.data.load(["prose"], "train", 10_000)
    assert torch.equal(whole[:share], prose[:share])
    n = UP.extra_steps * size // 6
    assert torch.equal(extra[:n], prose[share : share + n])
