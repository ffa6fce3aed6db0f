"""The quantisation study: sums of terms are layers, errors add up as they must, results are kept and resumed."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from moe_course import quant, records
from moe_course.layers import MoE
from moe_course.training import data, loop, quantisation
from moe_course.training.quantisation import FORMATS, Run, Setup

TINY = Setup(
    width=16, layers=2, heads=2, hidden=32, context=16, batch_size=2, steps=8,
    held_out=64, probes=40,
)  # fmt: skip
SHAPES = (Run(), Run(widening=2), Run(4, 1), Run(4, 2))


@pytest.fixture(scope="module")
def models():
    return {run: quantisation.train(run, TINY) for run in SHAPES}


def test_sparse_models_have_the_active_weights_of_the_dense_one():
    dense = Setup().spec(Run()).active_params(include_embedding=False)
    wide = Setup().spec(Run(widening=4)).total_params()
    for run in quantisation.SHAPES[2:]:
        spec = Setup().spec(run)
        routers = spec.breakdown()["router"].total
        assert spec.active_params(include_embedding=False) - routers == dense
        assert spec.total_params() - routers == wide


@pytest.mark.parametrize("run", SHAPES)
def test_a_loss_is_that_of_the_training_loop(models, run):
    text = quantisation.windows(TINY)
    assert text.shape == (6 * 4, 17)
    bits, routings = quantisation.evaluate(models[run], text, batch_size=5)
    each = [data.load([d], "held_out")[:65] for d in data.DOMAINS]
    wanted = [loop.bits_per_byte(models[run], t, 16, 4) for t in each]
    assert bits.mean().item() == pytest.approx(sum(wanted) / 6, abs=1e-5)
    _, whole = models[run](text[:, :-1])
    assert len(routings) == len(whole) == (2 if run.experts > 1 else 0)
    for got, want in zip(routings, whole, strict=True):
        assert torch.equal(got.expert_ids, want.expert_ids)
        torch.testing.assert_close(got.logits, want.logits)
    # To force what the router chose anyway changes nothing, and leaves the router as it was.
    again, _ = quantisation.evaluate(models[run], text, forced=routings, batch_size=5)
    torch.testing.assert_close(again, bits)
    torch.testing.assert_close(quantisation.evaluate(models[run], text)[0], bits)


def test_forced_experts_are_those_given(models):
    model, text = models[Run(4, 2)], quantisation.windows(TINY)
    bits, routings = quantisation.evaluate(model, text)
    other = [replace(r, expert_ids=(r.expert_ids + 1) % 4) for r in routings]
    forced, got = quantisation.evaluate(model, text, forced=other, batch_size=7)
    assert not torch.allclose(forced, bits)
    for r, o in zip(got, other, strict=True):
        assert torch.equal(r.expert_ids, o.expert_ids)
        chosen = r.logits.gather(1, r.expert_ids).softmax(-1)
        torch.testing.assert_close(r.weights, chosen)


def test_the_terms_of_a_layer_add_up_to_it(models):
    text = quantisation.windows(TINY)
    for run, model in models.items():
        inputs = quantisation.layer_inputs(model, text, 40)
        assert [x.shape for x in inputs] == [(40, 16)] * 2
        for block, x in zip(model.blocks, inputs, strict=True):
            if isinstance(block.ffn, MoE):
                y, routing, _ = block.ffn(x)
                terms = quantisation.expert_terms(block.ffn.experts, x, routing)
                assert terms.shape == (40, run.k, 16)
            else:
                y, terms = block.ffn(x), quantisation.slice_terms(block.ffn, x, 4)
                assert terms.shape == (40, 4, 16)
            torch.testing.assert_close(terms.sum(1), y, atol=1e-6, rtol=1e-4)


def test_errors_of_a_sum_follow_from_those_of_its_terms():
    rng = torch.Generator().manual_seed(0)
    f, d = torch.randn(2, 500, 4, 64, generator=rng)
    even = torch.full((500, 4), 0.25)
    # Orthogonal terms, independent errors: the sum is as wrong as each.
    got = quantisation.sum_errors(f, f + 0.1 * d, even)
    assert got["single"] == pytest.approx(0.1, rel=0.02)
    assert got["output"] == pytest.approx(0.1, rel=0.05)
    # Equal terms, independent errors: half as wrong, with four of them.
    same = f[:, :1].expand(-1, 4, -1)
    got = quantisation.sum_errors(same, same + 0.1 * d, even)
    assert got["alignment"] == pytest.approx(1)
    assert got["signal"] == pytest.approx(4)
    assert got["output"] == pytest.approx(0.05, rel=0.05)
    assert got["predicted"] == pytest.approx(0.05, rel=0.02)
    # Equal terms, equal errors: nothing averages.
    got = quantisation.sum_errors(same, 1.1 * same, even)
    assert got["noise"] == pytest.approx(4)
    assert got["output"] == pytest.approx(0.1)
    identity = got["single"] * math.sqrt(got["noise"] / got["signal"])
    assert got["output"] == pytest.approx(identity)
    # One term: the sum is the term.
    one = quantisation.sum_errors(f[:, :1], f[:, :1] + d[:, :1], even[:, :1])
    assert one["output"] == one["single"] == pytest.approx(one["predicted"])


def test_units_are_the_smallest_pieces(models):
    text = quantisation.windows(TINY)
    for run, model in models.items():
        stored = quant.quantise_parts(model, FORMATS["int4, 32"], "experts", "ffn")
        twin = quant.dequantised(model, stored)
        x = quantisation.layer_inputs(model, text, 40)[1]
        pair = [m.blocks[1].ffn for m in (model, twin)]
        routing = pair[0].router(x) if run.experts > 1 else None
        pieces = []
        for ffn in pair:
            if routing is None:
                pieces.append(quantisation.slice_terms(ffn, x, ffn.down.in_features))
                continue
            up = ffn.experts.w_up[routing.expert_ids]  # [T, K, 2F, D]
            hidden = ffn.experts.activate(torch.einsum("td,tkfd->tkf", x, up))
            down = ffn.experts.w_down[routing.expert_ids]  # [T, K, D, F]
            each = torch.einsum("tkf,tkdf,tk->tkfd", hidden, down, routing.weights)
            pieces.append(each.flatten(1, 2))
        f, d = pieces[0].double(), (pieces[1] - pieces[0]).double()
        signal, noise = quantisation.unit_errors(*pair, x, routing)
        assert signal == pytest.approx(f.square().sum().item(), rel=1e-4)
        assert noise == pytest.approx(d.square().sum().item(), rel=1e-3)
        rows = list(quantisation.errors(model, text, 40, ["int4, 32"]))
        unit = rows[1]["unit"] * (rows[1]["unit_noise"] / rows[1]["unit_signal"]) ** 0.5
        assert unit == pytest.approx(rows[1]["output"], rel=1e-4)


def test_margins_sort_tokens_by_how_near_a_tie_they_were(models):
    model, text = models[Run(4, 2)], quantisation.windows(TINY)
    _, before = quantisation.evaluate(model, text)
    twin = quant.dequantised(
        model, quant.quantise_parts(model, FORMATS["int4, row"], "router")
    )
    _, after = quantisation.evaluate(twin, text)
    got = quantisation.margins(before[0], after[0], bins=4)
    assert got["margin"] == sorted(got["margin"])
    share = quant.flipped(before[0], after[0]).double().mean().item()
    assert sum(got["flipped"]) / 4 == pytest.approx(share, abs=0.01)
    assert all(0 <= p <= 0.5 for p in got["expected"])
    assert got["expected"] == sorted(got["expected"], reverse=True)


def test_rows_of_one_model(models):
    formats = ("bf16", "int8, 64", "int4, 32")
    for run, model in models.items():
        text = quantisation.windows(TINY)
        rows = list(quantisation.losses(model, text, formats))
        loss = [r for r in rows if r["kind"] == "loss"]
        sparse = run.experts > 1
        assert [(r["format"], r["parts"]) for r in loss] == [
            (name, choice)
            for name in formats
            for choice in quantisation.CHOICES
            if (choice == "ffn" or name != "int8, 64")
            and (sparse or choice in ("ffn", "all but router"))
        ]
        by = {(r["format"], r["parts"]): r for r in loss}
        total = sum(p.numel() for p in model.parameters())
        assert all(by["bf16", c]["bytes"] == 2 * total for f, c in by if f == "bf16")
        if sparse:
            assert by["int4, 32", "ffn"]["flipped"][0] == 0  # nothing above it moved
            row = by["int4, 32", "router"]
            assert any(row["flipped"])
            small = quant.quantise_parts(model, FORMATS["int4, 32"], "router")
            twin = quant.dequantised(model, small)
            bits, routes = quantisation.evaluate(model, text)
            more = quantisation.evaluate(twin, text)[0] - bits
            kept = quantisation.evaluate(twin, text, forced=routes)[0] - bits
            assert row["more_bits"] == pytest.approx(more.mean().item())
            assert row["kept_more_bits"] == pytest.approx(kept.mean().item())
            assert not torch.allclose(more, kept, atol=1e-7)
            spread = more.var().sqrt().item() / len(text) ** 0.5
            assert row["uncertainty"] == pytest.approx(spread)
            assert {r["layer"] for r in rows if r["kind"] == "margin"} == {0, 1}
        errors = list(quantisation.errors(model, text, 40, formats))
        assert [(r["format"], r["layer"]) for r in errors] == [
            (name, layer) for name in formats for layer in range(2)
        ]
        for r in errors:
            assert 0 < r["output"] < 0.3
            assert abs(r["gain"] - 1) < 0.05
            assert r["peak"] > 1
        four = [r["weights"] for r in errors if r["format"] == "int4, 32"]
        eight = [r["weights"] for r in errors if r["format"] == "int8, 64"]
        assert min(four) > 5 * max(eight)


def test_a_study_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(quantisation.measure, "__defaults__", (("int4, 32",), None))
    which = [Run(4, 2, seed=s) for s in range(2)]
    for run in which:
        quantisation.work(run, TINY, tmp_path)
    assert not list(tmp_path.glob("*.partial"))

    def not_again(*_, **__):
        raise AssertionError("a finished run was made again")

    # A model that was trained but not measured is read from its checkpoint.
    path = tmp_path / f"{which[0].name}.json"
    before = path.read_bytes()
    path.unlink()
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", not_again)
    quantisation.work(which[0], TINY, tmp_path)
    assert path.read_bytes() == before

    monkeypatch.setattr(quantisation, "train", not_again)
    rows = quantisation.study(which, TINY, tmp_path, 1)
    assert {row["seed"] for row in rows} == {0, 1}
    assert {row["model"] for row in rows} == {"2 of 4 experts"}
    exact = [row for row in rows if row["kind"] == "exact"]
    assert all(row["steps"] == 8 and row["total_params"] > 0 for row in exact)
    with pytest.raises(ValueError, match="of another setup"):
        quantisation.study(which, replace(TINY, steps=9), tmp_path, 1)


def test_the_record_is_of_this_study(root):
    record = records.load(root / "moe_course/data/records/quantised.json")
    exact = [row for row in record.rows if row["kind"] == "exact"]
    fields = ("experts", "k", "widening", "seed")
    assert [Run(**{f: row[f] for f in fields}) for row in exact] == quantisation.runs()
    assert {row["steps"] for row in exact} == {Setup().steps}
    formats = {row["format"] for row in record.rows if row["kind"] == "loss"}
    assert formats == set(FORMATS)
