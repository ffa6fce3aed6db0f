"""The choice of a model: rules against hand-made figures, orders that must hold for any needs, and the command."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from statistics import mean

import nbformat
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_course import cli, records
from moe_course.costs import Precision, choice
from moe_course.costs.choice import CRITERIA, RULES, Needs, Quality, judge, rank
from moe_course.specs import FFN, GQA, ModelSpec, RoutedExperts, accelerators, zoo
from moe_course.specs.zoo import hf_configs

H100, RTX, L4 = (accelerators[name] for name in ("H100-SXM", "RTX-4090", "L4"))
MODELS = ("mistral-7b", "mixtral-8x7b", "llama-2-70b", "deepseek-v3")
FEW = settings(max_examples=25)  # each judges several models many times
SPECS = [zoo[name] for name in MODELS]
FOUR_BITS = Precision(4.5 / 8)


def check(judgement, rule):
    return next(c for c in judgement.checks if c.rule == rule)


def names(judgements, met=(True, None, False)):
    return [j.spec.name for j in judgements if j.met in met]


def small(name="small", **changes):
    """A model whose every figure fits on a line."""
    return replace(
        ModelSpec(name, 2, 8, 100, GQA(2, 1, 4), FFN(16)), **changes
    )  # 8-wide, 2 heads of 4, one key and value head


# Against figures by hand.


def test_memory_by_hand():
    # 2 x (8·8·2 + 8·4·2 attention, 3·8·16 FFN, 2·8 norms) + 8 norm + 2·100·8 embedding and head
    weights = 2 * (128 + 64 + 384 + 16) + 8 + 1600
    assert small().total_params() == weights
    # cache: 2 layers · (key and value) · 1 head · 4 numbers · 2 bytes = 32 bytes a token
    bytes_ = 2 * weights + 3 * 10 * 32
    needs = Needs(memory=1e4, batch=3, context=10)
    memory = check(judge(small(), needs), "memory")
    assert memory.figure == pytest.approx(bytes_ / 1e9, rel=1e-12)
    assert memory.limit == pytest.approx(1e4 / 1e9)
    exactly = replace(needs, memory=float(bytes_))
    assert judge(small(), exactly).met is True
    assert judge(small(), replace(exactly, memory=bytes_ - 1.0)).met is False


def test_mixtral_on_one_card_by_hand():
    needs = Needs(RTX, context=8192, precision=FOUR_BITS, latency_ms=50)
    judged = judge(zoo["mixtral-8x7b"], needs)
    weights = 46_702_792_704 * 4.5 / 8
    cache = 8192 * 32 * 2 * 8 * 128 * 2
    memory = check(judged, "memory")
    assert memory.figure == pytest.approx((weights + cache) / 1e9)
    assert memory.devices == 2
    bits = 8 * (24e9 - cache) / 46_702_792_704
    assert memory.remedy == f"2 devices or {bits:.2f} bits a weight"
    # One token reads all but six of eight experts, and one row of the input embedding.
    active = 12_879_925_248 - 32000 * 4096 + 4096
    read = active * 4.5 / 8 + cache
    latency = check(judged, "latency")
    assert latency.figure == pytest.approx(read / 1008e9 * 1e3)
    assert (latency.met, memory.met, judged.met) == (True, False, False)
    # What does not fit has no speed, however fast it would be.
    assert (judged.step_s, judged.tokens_per_s, judged.cost) == (None, None, None)


def test_no_advice_to_store_a_weight_in_less_than_two_bits():
    spec = zoo["mistral-7b"]
    for room, advice in ((2.01, "2.01 bits a weight"), (1.99, "")):
        needs = Needs(memory=room / 8 * spec.total_params(), context=0)
        assert check(judge(spec, needs), "memory").remedy == advice


def test_cost_by_hand():
    needs = Needs(H100, devices=2, batch=4, context=0, price=3.0)
    judged = judge(zoo["mistral-7b"], needs)
    spec = zoo["mistral-7b"]
    read = 2 * (spec.total_params() - 32000 * 4096 + 4 * 4096)
    seconds = read / 2 / 3350e9
    assert judged.step_s == pytest.approx(seconds)
    assert judged.tokens_per_s == pytest.approx(4 / seconds)
    assert judged.cost == pytest.approx(2 * 3.0 / 3600 * seconds / 4 * 1e6)
    assert judged.read_share == pytest.approx(read / 2 / spec.total_params())


def test_load_is_the_busy_share_of_the_devices():
    from moe_course.costs import decode_step, prefill

    spec = zoo["llama-3.1-8b"]
    needs = Needs(H100, requests_per_s=3.0, context=1500, answer=500, latency_ms=20)
    batch = choice.largest_batch(spec, needs)
    fits = (80e9 - 2 * spec.total_params()) // (1500 * 32 * 2 * 8 * 128 * 2)
    step = decode_step(spec, H100, batch, 1250)
    late = decode_step(spec, H100, batch + 1, 1250).time_s > 0.020
    assert batch <= fits
    assert step.time_s <= 0.020
    assert batch + 1 > fits or late
    seconds = prefill(spec, H100, 1000, batch).time_s + 500 * step.time_s
    load = check(judge(spec, needs), "load")
    assert load.figure == pytest.approx(3.0 * seconds / batch)
    assert judge(spec, needs).tokens_per_s == pytest.approx(500 * batch / seconds)


def test_caches_fill_the_memory_where_no_time_limits_the_batch():
    spec = zoo["mistral-7b"]
    needs = Needs(H100, devices=2, requests_per_s=1.0, context=1000, answer=10)
    each = 1000 * 32 * 2 * 8 * 128 * 2
    assert (
        choice.largest_batch(spec, needs) == (160e9 - 2 * spec.total_params()) // each
    )
    # The caches of 64-bit numbers take four times as much.
    wide = replace(needs, precision=Precision(2.0, cache=8.0))
    most = (160e9 - 2 * spec.total_params()) // (4 * each)
    assert choice.largest_batch(spec, wide) == most
    assert choice.largest_batch(zoo["llama-3.1-70b"], replace(needs, devices=1)) == 0


def test_a_request_without_a_prompt_only_writes():
    needs = Needs(H100, requests_per_s=1.0, context=100, answer=100)
    judged = judge(small(), needs)
    assert judged.batch == choice.MOST_BATCH  # nothing else limits so small a model
    assert judged.tokens_per_s == pytest.approx(judged.batch / judged.step_s)


def test_tuning_and_training_by_hand():
    spec = small()
    total = spec.total_params()
    kept = 128 * (2 * spec.layers * spec.width + 4 * spec.vocab)
    needs = Needs(H100, devices=4, context=128, tuning="full", training_flops=1e6)
    judged = judge(spec, needs)
    for rule in ("tuning", "training"):
        assert check(judged, rule).figure == pytest.approx((4 * total + kept) / 1e9)
        assert check(judged, rule).limit == 80.0
    # LoRA, rank 16: attention 8x8, 8x4, 8x4, 8x8 and the FFN's three 8x16 in each of two layers
    adapters = 2 * 16 * (16 + 12 + 12 + 16 + 3 * 24)
    lora = check(judge(spec, replace(needs, tuning="lora")), "tuning").figure
    assert lora == pytest.approx(((2 * total + 16 * adapters) / 4 + kept) / 1e9)
    # 6 FLOPs per weight but the embedding, 12 per layer, head, its width and half the context
    each = 6 * (total - 800) + 12 * 2 * 2 * 4 * 64
    assert judged.training_tokens == pytest.approx(1e6 / each)


def test_published_precision_unless_told_otherwise():
    oss = zoo["gpt-oss-120b"]
    needs = Needs(H100, context=0)
    experts = oss.breakdown()["experts"].total
    published = experts * 4.25 / 8 + (oss.total_params() - experts) * 2
    assert judge(oss, needs).stored_bytes == pytest.approx(published)
    assert judge(oss, needs).met is True  # the model card's claim: one GPU of 80 GB
    wide = judge(oss, replace(needs, precision=Precision(2.0)))
    assert wide.stored_bytes == 2 * oss.total_params()
    assert wide.met is False


# Orders that must hold.

needs_of_any_kind = st.builds(
    Needs,
    accelerator=st.sampled_from([L4, RTX, H100]),
    devices=st.integers(1, 16),
    batch=st.none() | st.integers(1, 512),
    context=st.integers(0, 20_000),
    latency_ms=st.none() | st.floats(0.5, 200),
    tuning=st.sampled_from(["none", "lora", "full"]),
    training_flops=st.none() | st.floats(1e18, 1e25),
    precision=st.sampled_from([None, FOUR_BITS, Precision(1.0)]),
)
rated_needs = st.builds(
    Needs,
    accelerator=st.sampled_from([RTX, H100]),
    devices=st.integers(1, 16),
    requests_per_s=st.floats(0.01, 100),
    context=st.integers(2000, 4000),
    answer=st.integers(1, 2000),
    latency_ms=st.none() | st.floats(0.5, 200),
    precision=st.sampled_from([None, FOUR_BITS]),
)
any_needs = needs_of_any_kind | rated_needs


def roomier(needs, factor):
    chip = needs.accelerator
    return replace(needs, accelerator=replace(chip, capacity=factor * chip.capacity))


@FEW
@given(any_needs, st.floats(1, 10))
def test_more_memory_never_makes_a_model_that_met_all_miss_one(needs, factor):
    before, after = rank(needs, SPECS), rank(roomier(needs, factor), SPECS)
    assert set(names(before, [True])) <= set(names(after, [True]))


@FEW
@given(any_needs, st.floats(0.1, 1), st.floats(1, 100))
def test_a_shorter_time_never_adds_a_candidate(needs, share, latency):
    slow = replace(needs, latency_ms=latency)
    quick = replace(needs, latency_ms=share * latency)
    assert set(names(rank(quick, SPECS), [True])) <= set(
        names(rank(slow, SPECS), [True])
    )


@FEW
@given(any_needs, st.integers(1, 16))
def test_more_devices_never_lose_a_candidate(needs, more):
    larger = replace(needs, devices=needs.devices + more)
    assert set(names(rank(needs, SPECS), [True])) <= set(
        names(rank(larger, SPECS), [True])
    )


@FEW
@given(rated_needs, st.floats(1, 10))
def test_more_requests_never_add_a_candidate(needs, factor):
    busier = replace(needs, requests_per_s=factor * needs.requests_per_s)
    assert set(names(rank(busier, SPECS), [True])) <= set(
        names(rank(needs, SPECS), [True])
    )


@FEW
@given(any_needs, st.permutations(SPECS), st.sampled_from(sorted(CRITERIA)))
def test_the_order_of_the_candidates_does_not_matter(needs, shuffled, by):
    assert rank(needs, shuffled, by) == rank(needs, SPECS, by)


@FEW
@given(any_needs, st.sampled_from(sorted(CRITERIA)))
def test_ranked_by_group_then_criterion_with_the_unknown_last(needs, by):
    quality = Quality("a measure", {"mistral-7b": 1.0, "mixtral-8x7b": 2.0})
    judged = rank(replace(needs, quality=quality), SPECS, by)
    groups = [{True: 0, None: 1, False: 2}[j.met] for j in judged]
    assert groups == sorted(groups)
    for met in (True, None):
        figures = [CRITERIA[by].of(j) for j in judged if j.met is met]
        known = [f for f in figures if f is not None]
        assert figures[: len(known)] == known  # None only behind
        assert known == sorted(known, reverse=CRITERIA[by].highest_first)
    off = [max(c.share for c in j.missed) for j in judged if j.met is False]
    assert off == sorted(off)


@FEW
@given(any_needs)
def test_a_remedy_is_enough_and_no_more_than_needed(needs):
    for spec in SPECS:
        for missed in judge(spec, needs).missed:
            if missed.devices is None:
                continue

            def met(devices, spec=spec, rule=missed.rule):
                return choice._check(rule, spec, replace(needs, devices=devices)).met

            assert missed.devices > needs.devices
            assert met(missed.devices) is True
            assert met(missed.devices - 1) is False


@FEW
@given(any_needs, st.integers(4, 400), st.integers(1, 4))
def test_a_dense_model_in_disguise_is_judged_as_dense(needs, hidden, layers):
    dense = small(layers=layers, ffn=FFN(hidden))
    bank = RoutedExperts(1, 1, FFN(hidden))
    disguised = replace(dense, ffn=None, moe=bank)
    one, other = judge(dense, needs), judge(disguised, needs)
    assert not one.sparse
    assert not other.sparse
    assert one.met == other.met
    # All that differs is its router: a row of the width in each layer, read by every token.
    router = layers * dense.width * needs.precision_of(dense).weights
    more = check(other, "memory").figure - check(one, "memory").figure
    assert 1e9 * more == pytest.approx(router, abs=0.1)
    if one.step_s is not None:
        assert other.read_share == pytest.approx(one.read_share, rel=0.1)
        # the largest batch may be another one, by what the router takes
        assert other.cost == pytest.approx(one.cost, rel=0.1)
        assert other.cost >= one.cost * (1 - 1e-9)


@FEW
@given(any_needs)
def test_every_expert_used_is_no_sparsity(needs):
    moe = RoutedExperts(4, 4, FFN(8))
    assert not judge(small(ffn=None, moe=moe), needs).sparse
    assert judge(small(ffn=None, moe=replace(moe, k=3)), needs).sparse


# What is not known.


def test_a_plain_memory_leaves_times_unknown():
    needs = Needs(memory=100e9, latency_ms=10)
    judged = judge(zoo["mistral-7b"], needs)
    assert judged.met is None
    assert check(judged, "latency").figure is None
    assert (judged.step_s, judged.tokens_per_s, judged.cost) == (None, None, None)
    assert check(judge(zoo["llama-2-70b"], needs), "memory").remedy.endswith("a weight")
    assert judge(zoo["llama-2-70b"], needs).met is False
    text = choice.table(needs, rank(needs, SPECS))
    assert "Undecided, since a figure is unknown: 2" in text
    assert re.search(r"mistral-7b .* \?", text)


def test_quality_is_yours_or_unknown():
    quality = Quality("MMLU", {"mistral-7b": 62.5, "mixtral-8x7b": 70.6}, least=65)
    needs = Needs(H100, devices=8, quality=quality)
    judged = {j.spec.name: j for j in rank(needs, SPECS[:3], "quality")}
    assert judged["mixtral-8x7b"].met is True
    assert judged["mistral-7b"].met is False
    assert check(judged["mistral-7b"], "quality").share == pytest.approx(65 / 62.5)
    assert judged["llama-2-70b"].met is None
    assert judged["llama-2-70b"].quality is None
    assert judged["llama-2-70b"].value is None
    best = judged["mixtral-8x7b"]
    assert best.value == pytest.approx(70.6 / best.cost)


@pytest.mark.parametrize(
    ("given_", "said"),
    [
        ({"accelerator": None}, "an accelerator or a memory"),
        ({"memory": 1e9}, "an accelerator or a memory"),
        ({"devices": 0}, "devices must be an integer of at least 1, got 0"),
        ({"devices": 1.5}, "devices must be an integer of at least 1, got 1.5"),
        ({"batch": 0}, "batch must be an integer"),
        ({"batch": True}, "batch must be an integer"),
        ({"batch": 2, "requests_per_s": 1.0, "answer": 5}, "not both"),
        ({"context": -1}, "context must be an integer of at least 0"),
        ({"requests_per_s": 1.0}, "answer must be 1..4096 (the context), got 0"),
        ({"answer": 5000}, "answer must be 0..4096 (the context), got 5000"),
        ({"latency_ms": 0}, "latency_ms must be positive, got 0"),
        ({"training_flops": float("nan")}, "training_flops must be positive, got nan"),
        (
            {"tuning": "some"},
            "tuning must be one of 'none', 'lora', 'full', got 'some'",
        ),
        ({"data": "odd"}, "data must be one of 'one domain', 'diverse', got 'odd'"),
        ({"price": -1}, "price must be not negative"),
        ({"accelerator": None, "memory": -1.0}, "memory must be positive, got -1.0"),
        ({"accelerator": None, "memory": 1e9, "devices": 2}, "must be 1, got 2"),
    ],
)
def test_needs_that_make_no_sense(given_, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        Needs(**({"accelerator": H100} | given_))


def test_orders_and_names_that_make_no_sense():
    needs = Needs(H100)
    with pytest.raises(ValueError, match=r"by must be one of cost, .*got 'taste'"):
        rank(needs, SPECS, "taste")
    with pytest.raises(ValueError, match="two models are called 'mistral-7b'"):
        rank(needs, [*SPECS, zoo["mistral-7b"]])
    with pytest.raises(ValueError, match="name of its measure"):
        Quality(" ", {})
    with pytest.raises(ValueError, match="the quality of x must be not negative"):
        Quality("m", {"x": float("nan")})
    stranger = replace(needs, quality=Quality("m", {"x": 1.0}))
    with pytest.raises(ValueError, match="figure for 'x', but no such model"):
        rank(stranger, SPECS)
    with pytest.raises(ValueError, match="must be positive"):
        Precision(float("nan"))


def test_nothing_fits_and_it_says_why_and_what_would_do():
    needs = Needs(L4, batch=64, context=32768, latency_ms=10)
    judged = rank(needs, SPECS)
    assert all(j.met is False for j in judged)
    text = choice.table(needs, judged)
    assert "No model meets every rule." in text
    for judgement in judged:
        for missed in judgement.missed:
            assert missed.remedy, (judgement.spec.name, missed.rule)
    nearest = judged[0].missed[0]
    assert f"{nearest.devices} devices" in text


def test_a_batch_in_time_is_offered():
    needs = Needs(H100, devices=4, batch=4096, context=0, latency_ms=10)
    missed = check(judge(zoo["llama-3.1-8b"], needs), "latency")
    batch = int(re.search(r"a batch of ([\d,]+)", missed.remedy)[1].replace(",", ""))
    spec = zoo["llama-3.1-8b"]
    assert check(judge(spec, replace(needs, batch=batch)), "latency").met is True
    assert check(judge(spec, replace(needs, batch=batch + 1)), "latency").met is False


def test_no_batch_is_offered_where_one_sequence_is_late():
    needs = Needs(L4, batch=8, context=0, latency_ms=1)
    missed = check(judge(zoo["mistral-7b"], needs), "latency")
    assert missed.remedy == f"{missed.devices} devices"


def test_activations_that_no_number_of_devices_splits():
    needs = Needs(L4, context=10**8, tuning="lora")
    missed = check(judge(zoo["mistral-7b"], needs), "tuning")
    assert missed.devices is None
    assert missed.remedy == "more than 4,096 devices"


# What is shown.


@FEW
@given(any_needs, st.sampled_from(sorted(CRITERIA)), st.integers(72, 120))
def test_the_table_holds_every_part_in_its_width(needs, by, width):
    needs = replace(needs, quality=Quality("a measure " * 20, {"mistral-7b": 5.0}))
    judged = rank(needs, SPECS, by)
    text = choice.table(needs, judged, by, width)
    assert max(map(len, text.splitlines())) <= width
    assert CRITERIA[by].text in text
    for spec in SPECS:
        assert spec.name in text
    for judgement in judged:
        # Of a model that is out, what it misses; of the others, all.
        for each in judgement.missed or judgement.checks:
            assert each.evidence in text
            assert choice._number(each.figure) in text
            assert each.remedy in text.replace("\n" + 22 * " ", " ")


def test_a_long_name_is_cut_and_stays_in_the_json():
    spec = small("a-very-long-name-of-a-model")
    needs = Needs(H100)
    judged = rank(needs, [spec])
    assert "a-very-long-name-…" in choice.table(needs, judged)
    listed = choice.as_dict(needs, judged)["models"]
    assert [m["name"] for m in listed] == ["a-very-long-name-of-a-model"]


@FEW
@given(any_needs)
def test_the_dictionary_is_json_and_says_the_same(needs):
    judged = rank(needs, SPECS)
    told = json.loads(json.dumps(choice.as_dict(needs, judged), allow_nan=False))
    assert [m["name"] for m in told["models"]] == names(judged)
    for model, judgement in zip(told["models"], judged, strict=True):
        assert model["meets_all"] is judgement.met
        assert [c["figure"] for c in model["checks"]] == [
            c.figure for c in judgement.checks
        ]
    assert set(told["rules"]) == {
        name for name, rule in RULES.items() if rule.asked(needs)
    }


def slug(heading):
    """The anchor that the book gives a heading."""
    kept = re.sub(r"[^\w\s-]", "", heading.lower())
    return re.sub(r"[\s-]+", "-", kept).strip("-")


def test_every_figure_has_a_place_in_the_book(root):
    needs = Needs(H100, tuning="lora", training_flops=1e20, data="diverse")
    places = {rule.evidence for rule in RULES.values()}
    places |= {remark.evidence for remark in choice.remarks(needs)}
    assert len(places) >= 8
    for place in places:
        page, anchor = place.split("#")
        notebook = nbformat.read(root / "book" / f"{page}.ipynb", as_version=4)
        text = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
        headings = [slug(h) for h in re.findall(r"^#+ (.*)$", text, re.MULTILINE)]
        assert anchor in headings, place


def test_the_remark_on_data_is_what_was_recorded():
    record = records.load("compute_equivalence")
    last = max(row["step"] for row in record.rows)

    def losses(data, experts):
        rows = [
            r
            for r in record.rows
            if (r["data"], r["experts"], r["step"], r["peak_lr"], r["hidden"])
            == (data, experts, last, 3e-3, 384)
            and r["k"] == (2 if experts > 1 else 1)
        ]
        return [r["held_out_bits"] for r in sorted(rows, key=lambda r: r["seed"])]

    gains = {
        data: 100
        * mean(1 - s / d for s, d in zip(losses(data, 8), losses(data, 1), strict=True))
        for data in ("many", "one")
    }
    text = next(
        r.text for r in choice.remarks(Needs(H100, data="diverse")) if "data" in r.text
    )
    assert f"{gains['many']:.1f} % of the loss on six domains" in text
    assert f"{gains['one']:.1f} % on one" in text
    assert (
        max(losses("one", 1)) - min(losses("one", 1)) > mean(losses("one", 1)) * 0.011
    )


# The command.


def choose(capsys, *words, code=0):
    assert cli.main(["choose", *words]) == code
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_the_command_prints_the_table(capsys):
    out = choose(
        capsys, "--gpu", "RTX-4090", "--bits", "4.5", "--context", "8192",
        "--latency", "50", "--tuning", "lora", "--data", "diverse",
    )  # fmt: skip
    needs = Needs(
        RTX, context=8192, latency_ms=50, tuning="lora", data="diverse",
        precision=FOUR_BITS,
    )  # fmt: skip
    assert out == choice.table(needs, rank(needs, zoo.values())) + "\n"
    assert max(map(len, out.splitlines())) <= 100


def test_the_command_reads_every_option(capsys, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(dict(hf_configs["olmoe-1b-7b"])))
    (tmp_path / "other.json").write_text(json.dumps(dict(hf_configs["mistral-7b"])))
    out = choose(
        capsys, "--gpu", "H100-SXM", "--gpus", "8", "--requests", "5", "--context", "2000",
        "--answer", "300", "--latency", "40", "--training-flops", "1e22", "--tuning", "full",
        "--bits", "16", "--expert-bits", "4.25", "--cache-bits", "8", "--price", "2.5",
        "--quality", "mine=55.5", "--quality", "dbrx=73.7", "--measure", "MMLU",
        "--least-quality", "40", "--by", "value", "--model", "dbrx", "--model", "mixtral-8x7b",
        "--config", str(folder / "config.json"), "--config", str(tmp_path / "other.json"),
        "--json",
    )  # fmt: skip
    needs = Needs(
        H100, 8, requests_per_s=5.0, context=2000, answer=300, latency_ms=40.0,
        training_flops=1e22, tuning="full", precision=Precision(2.0, 4.25 / 8, 1.0), price=2.5,
        quality=Quality("MMLU", {"mine": 55.5, "dbrx": 73.7}, 40.0),
    )  # fmt: skip
    specs = [
        zoo["dbrx"], zoo["mixtral-8x7b"], replace(zoo["olmoe-1b-7b"], name="mine"),
        replace(zoo["mistral-7b"], name="other"),
    ]  # fmt: skip
    wanted = choice.as_dict(needs, rank(needs, specs, "value"), "value")
    assert json.loads(out) == json.loads(json.dumps(wanted))


def test_the_command_says_when_nothing_is_left(capsys):
    out = choose(capsys, "--memory", "1", code=1)
    assert "Needs: 1.0 GB, batch 1" in out
    assert "No model meets every rule." in out
    choose(capsys, "--memory", "20", "--latency", "5", code=0)  # undecided, not out


def test_help_names_every_criterion(capsys):
    with pytest.raises(SystemExit):
        cli.main(["choose", "--help"])
    out = capsys.readouterr().out
    for by in CRITERIA:
        assert re.search(rf"\b{by}\b", out)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "choose needs --gpu or --memory, one of the two"),
        (["--gpu", "L4", "--memory", "9"], "choose needs --gpu or --memory"),
        (["--gpu", "TPU"], "--gpu TPU is unknown: it is one of A100-40GB"),
        (
            ["--gpu", "L4", "--gpus", "0"],
            "devices must be an integer of at least 1, got 0",
        ),
        (["--gpu", "L4", "--bits", "nan"], "bytes of a number must be positive"),
        (["--gpu", "L4", "--expert-bits", "4"], "need --bits"),
        (["--gpu", "L4", "--quality", "high"], "--quality is MODEL=NUMBER, got 'high'"),
        (["--gpu", "L4", "--quality", "=3"], "--quality is MODEL=NUMBER, got '=3'"),
        (["--gpu", "L4", "--quality", "dbrx=3"], "needs the name of its measure"),
        (["--gpu", "L4", "--least-quality", "3"], "needs the name of its measure"),
        (["--gpu", "L4", "--model", "gpt-5"], "--model gpt-5 is not in the zoo"),
        (["--gpu", "L4", "--by", "taste"], "by must be one of cost"),
        (["--gpu", "L4", "--config", "none.json"], "cannot read none.json"),
        (["--memory", "nan"], "memory must be positive, got nan"),
        (["--gpu", "L4", "--requests", "1"], "answer must be 1..4096"),
    ],
)
def test_the_command_says_what_is_wrong(capsys, words, said):
    assert cli.main(["choose", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("moe-course: ")
    assert err.count("\n") == 1
    assert said in err


def test_a_config_that_is_none_is_one_line(capsys, tmp_path):
    bad = tmp_path / "config.json"
    bad.write_text('{"model_type": "rnn"}')
    assert cli.main(["choose", "--gpu", "L4", "--config", str(bad)]) == 2
    err = capsys.readouterr().err
    assert "unknown model_type 'rnn'" in err
    assert err.count("\n") == 1


def test_choosing_needs_the_standard_library_alone():
    code = (
        "import sys, moe_course.costs.choice\n"
        "print([m for m in ('torch', 'numpy', 'jaxtyping') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
