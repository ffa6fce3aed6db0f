"""Costs against the sources' own figures, against sums written out, and against chance itself."""

from __future__ import annotations

import itertools
import json
import math
import random
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moe_course import costs
from moe_course.costs import placement
from moe_course.costs.memory import BF16, Precision
from moe_course.specs import zoo
from moe_course.specs.hardware import accelerators
from moe_course.specs.model import FFN, GQA, MLA, ModelSpec, RoutedExperts

A100 = accelerators["A100-80GB"]
MIXTRAL, LLAMA = zoo["mixtral-8x7b"], zoo["llama-2-70b"]
TWO_TB = {"bandwidth": 2e12, "flops": 312e12}  # what the sources reckon with


# ---- The sources' functions --------------------------------------------------


@pytest.fixture(scope="module")
def source_figures(root):
    """What the sources' own samples computed and printed, run once with their indentation restored."""
    return json.loads((root / "moe_course/data/source_figures.json").read_text())


def test_the_efficiency_analysis_gives_the_sources_figures(source_figures, capsys):
    got = costs.moe_efficiency_analysis(
        dense_params_B=70,
        moe_total_params_B=47,
        moe_active_params_B=13,
        tokens_per_day=1e12,
        gpu_count=64,
    )
    assert got == source_figures["moe_efficiency_analysis"]
    assert capsys.readouterr().out == source_figures["printed"]
    assert got["memory_overhead"] < 1  # the "penalty" is a saving
    assert got["memory_dense_GB"] == pytest.approx(140e9 / 2**30)  # GiB, labelled GB


def test_the_latency_estimate_gives_the_sources_figures(source_figures):
    sizes = {"dense": (70, 70), "moe": (47, 13)}
    rows = source_figures["estimate_inference_latency"]
    assert len(rows) == 18
    for row in rows:
        total, active = sizes[row["model"]]
        got = costs.estimate_inference_latency(total, active, row["batch"], 1)
        assert {"model": row["model"], "batch": row["batch"]} | got == row
    printed = [row["total_time_ms"] for row in rows[:8]]
    assert printed == pytest.approx([70.0] * 4 + [47.0] * 4)


# ---- Touched experts ---------------------------------------------------------


@settings(max_examples=30)
@given(E=st.integers(1, 12), data=st.data())
def test_distinct_experts_are_what_chance_touches(E, data):
    K = data.draw(st.integers(1, E))
    B = data.draw(st.integers(0, 8))
    rng = random.Random(E * 1000 + K * 10 + B)
    trials = 3000
    seen = sum(
        len({e for _ in range(B) for e in rng.sample(range(E), K)})
        for _ in range(trials)
    )
    expected = costs.expected_distinct_experts(E, K, B)
    assert seen / trials == pytest.approx(expected, abs=0.12)
    even = [K / E] * E
    assert costs.expected_distinct_experts(E, K, B, even) == pytest.approx(expected)


def test_distinct_experts_in_numbers():
    got = [costs.expected_distinct_experts(8, 2, b) for b in (1, 2, 4, 8, 16, 32)]
    assert got == pytest.approx([2, 3.5, 5.47, 7.20, 7.92, 8.00], abs=5e-3)


@settings(max_examples=50)
@given(E=st.integers(1, 300), exponent=st.floats(0, 4), data=st.data())
def test_uneven_popularity_touches_fewer(E, exponent, data):
    K = data.draw(st.integers(1, E))
    chances = costs.zipf_inclusion(E, K, exponent)
    assert sum(chances) == pytest.approx(K)
    assert all(0 <= p <= 1 for p in chances)
    assert chances == sorted(chances, reverse=True)
    for tokens in (1, 5, 50):
        uneven = costs.expected_distinct_experts(E, K, tokens, chances)
        assert uneven <= costs.expected_distinct_experts(E, K, tokens) * (1 + 1e-9)
    below = [p for p in chances if p < 1]
    if len(below) > 1:  # in the proportions of the law
        rank = len(chances) - len(below)
        ratio = ((rank + 1) / (rank + 2)) ** exponent
        assert below[1] / below[0] == pytest.approx(ratio)


def test_bad_chances_are_refused():
    with pytest.raises(ValueError, match="must sum to k = 2"):
        costs.expected_distinct_experts(4, 2, 1, [0.1] * 4)
    with pytest.raises(ValueError, match="4 chances between 0 and 1"):
        costs.expected_distinct_experts(4, 2, 1, [2, 0, 0, 0])
    with pytest.raises(ValueError, match=r"k must lie in 1\.\.4 .*got 5"):
        costs.expected_distinct_experts(4, 5, 1)
    with pytest.raises(ValueError, match="tokens must not be negative"):
        costs.expected_distinct_experts(4, 1, -1)
    with pytest.raises(ValueError, match="exponent"):
        costs.zipf_inclusion(4, 2, -1)


# ---- Latency -----------------------------------------------------------------


def test_one_token_reads_the_active_weights_and_many_read_all():
    one = costs.touched_weights(MIXTRAL, 1)
    embedding = 2 * (MIXTRAL.vocab - 1) * MIXTRAL.width  # but one row
    assert one == pytest.approx(2 * MIXTRAL.active_params() - embedding)
    assert costs.touched_weights(MIXTRAL, 1e6) == pytest.approx(
        2 * MIXTRAL.total_params()
    )
    assert costs.touched_weights(LLAMA, LLAMA.vocab) == 2 * LLAMA.total_params()


def test_a_tied_embedding_is_read_whole():
    spec = ModelSpec("tied", 1, 64, 1000, GQA(2, 2, 32), FFN(128), tied_embeddings=True)
    assert costs.touched_weights(spec, 1) == 2 * spec.total_params()


def times(batch, context=0):
    return [
        costs.decode_step(spec, A100, batch, context, **TWO_TB).time_s * 1e3
        for spec in (MIXTRAL, LLAMA)
    ]


def test_the_sources_table_corrected():
    """The sources: 47.0 ms at every batch, and an advantage that begins at large ones."""
    assert times(1)[0] == pytest.approx(12.75, abs=0.01)
    ratios = {
        batch: times(batch)[1] / times(batch)[0]
        for batch in (1, 2, 4, 8, 16, 128, 512, 600)
    }
    assert ratios[1] == pytest.approx(5.39, abs=0.01)
    assert ratios[128] == pytest.approx(1.48, abs=0.01)
    assert ratios[1] > ratios[2] > ratios[4] > ratios[8] > ratios[16] > ratios[128]
    assert ratios[128] < ratios[512] < ratios[600]


def test_three_regimes():
    found = costs.regimes(MIXTRAL, LLAMA, A100, **TWO_TB)
    assert found.all_read == pytest.approx(math.log(0.01) / math.log(0.75))
    assert found.dense_compute == pytest.approx(156, abs=1)
    assert found.sparse_compute == pytest.approx(570, abs=1)
    for batch, bound in ((569, "memory"), (571, "compute")):
        assert costs.decode_step(MIXTRAL, A100, batch, **TWO_TB).bound == bound
    with pytest.raises(ValueError, match="no routed experts"):
        costs.regimes(LLAMA, LLAMA, A100)


def test_ridges():
    assert costs.ridge_tokens(A100, **TWO_TB) == pytest.approx(156)
    for name, tokens in (
        ("mixtral-8x7b", 624),
        ("qwen3-30b-a3b", 2496),
        ("deepseek-v3", 4992),
    ):
        moe = zoo[name].moe
        got = costs.ridge_tokens(A100, moe.experts, moe.k, **TWO_TB)
        assert got == pytest.approx(tokens)
    assert costs.ridge_tokens(A100, bytes_per_weight=1, **TWO_TB) == pytest.approx(78)


def test_the_cache_is_read_and_stored():
    context = 4096
    step = costs.decode_step(LLAMA, A100, 128, context, **TWO_TB)
    assert step.cache_bytes == 128 * context * 80 * 2 * 8 * 128 * 2  # 172 GB
    plain = costs.decode_step(LLAMA, A100, 128, **TWO_TB)
    assert (step.memory_s - plain.memory_s) * 1e3 == pytest.approx(85.9, abs=0.1)
    assert not step.fits
    assert costs.decode_step(zoo["llama-3.1-8b"], A100, 1, context).fits
    mla = zoo["deepseek-v3"]
    assert costs.cache_numbers_per_token(mla) == 61 * (512 + 64)
    # 103 sequences of 4096 tokens weigh as much as Llama 2 70B.
    assert costs.cache_bytes(LLAMA, 103, 4096) == pytest.approx(
        costs.weight_bytes(LLAMA), rel=0.01
    )


def test_flops_of_a_step_are_what_a_sum_gives():
    spec = ModelSpec("tiny", 2, 8, 50, GQA(2, 1, 4), FFN(16))
    batch, context = 3, 5
    step = costs.decode_step(spec, A100, batch, context)
    weights = spec.active_params(include_embedding=False)
    attention = (
        2 * 2 * (2 * 2 * 4 * context)
    )  # layers, (scores and values), heads · dim
    assert step.flops == batch * (2 * weights + attention)
    prompt = costs.prefill(spec, A100, 10, 2)
    head = spec.vocab * spec.width
    body = 2 * (weights - head) * 20 + 2 * head * 2
    assert prompt.flops == body + costs.attention_flops(spec, 20, 5)
    assert prompt.tokens == 20


def test_activations_count_every_ffn():
    spec = zoo[
        "deepseek-v3"
    ]  # 58 layers with a shared expert of 2048 besides 8 of 2048
    without = replace(spec, moe=replace(spec.moe, shared=None))
    more = costs.activation_traffic(spec, 5) - costs.activation_traffic(without, 5)
    assert more == 2 * 5 * 58 * 2 * 3 * 2048


def test_rates_and_limits_must_make_sense():
    for rates in ({"bandwidth": 0}, {"bandwidth": -1.0}, {"flops": 0.0}):
        with pytest.raises(ValueError, match="bandwidth and flops must be positive"):
            costs.decode_step(MIXTRAL, A100, 1, **rates)
    with pytest.raises(ValueError, match="most must be at least 1"):
        costs.crossovers(MIXTRAL, LLAMA, A100, most=0)
    with pytest.raises(ValueError, match="above 100"):
        costs.zipf_inclusion(8, 2, 2000.0)
    assert sum(costs.zipf_inclusion(8, 2, 100.0)) == pytest.approx(2)


def test_a_check_of_drafts_counts_the_head_for_every_token():
    checked = costs.speculative(MIXTRAL, A100, 300, drafted=3, acceptance=0.8).step
    assert checked.compute_s == pytest.approx(checked.flops / A100.bf16)
    plain = costs.decode_step(MIXTRAL, A100, 1200)
    assert checked.flops == pytest.approx(plain.flops)


def test_latent_attention_decodes_on_the_latent_and_reads_prompts_unfolded():
    spec = zoo[
        "deepseek-v3"
    ]  # 61 layers, 128 heads, latent 512, rope 64, nope 128, v 128
    body = spec.active_params(include_embedding=False) - spec.vocab * spec.width
    step = costs.decode_step(spec, A100, 3, 1000)
    scores = 61 * 3 * 1000 * 2 * 128 * (512 + 64 + 512)
    assert step.flops == 2 * 3 * (body + spec.vocab * spec.width) + scores
    prompt = costs.prefill(spec, A100, 1000)
    scores = 61 * 1000 * 500 * 2 * 128 * (128 + 64 + 128)
    assert prompt.flops == 2 * (1000 * body + spec.vocab * spec.width) + scores


def test_precision_splits_experts_from_the_rest():
    four_bit = Precision(weights=2, experts=0.5625)
    parts = MIXTRAL.breakdown()
    experts = parts["experts"].total
    want = 2 * (MIXTRAL.total_params() - experts) + 0.5625 * experts
    assert costs.weight_bytes(MIXTRAL, four_bit) == want
    assert costs.touched_weights(MIXTRAL, 1e9, four_bit) == pytest.approx(want)
    assert BF16.expert_bytes == 2
    with pytest.raises(ValueError, match="must be positive"):
        Precision(weights=0)


def test_devices_share_the_work():
    one = costs.decode_step(MIXTRAL, A100, 64, 1000)
    four = costs.decode_step(MIXTRAL, A100, 64, 1000, devices=4, network_s=1.0)
    assert four.memory_s == pytest.approx(one.memory_s / 4)
    assert four.compute_s == pytest.approx(one.compute_s / 4)
    assert four.bound == "network"
    assert four.time_s == pytest.approx(1 + one.time_s / 4)
    with pytest.raises(ValueError, match="batch must be positive"):
        costs.decode_step(MIXTRAL, A100, 0)
    with pytest.raises(ValueError, match="at least 1"):
        costs.prefill(MIXTRAL, A100, 0)


def test_crossovers_are_where_the_leader_changes():
    dense = zoo["llama-3.1-8b"]
    found = costs.crossovers(MIXTRAL, dense, A100, most=4096, **TWO_TB)

    def leads(batch):
        first, second = (
            costs.decode_step(s, A100, batch, **TWO_TB).time_s for s in (MIXTRAL, dense)
        )
        return first < second

    brute = [b for b in range(2, 4097) if leads(b) != leads(b - 1)]
    assert found == brute
    equal_total = ModelSpec(
        "as large", 32, 4096, 32000, MIXTRAL.attention, FFN(14336 * 8)
    )
    # Where all experts are read, the sparse model reads its router besides: 0.005 %.
    assert costs.crossovers(MIXTRAL, equal_total, A100, most=2048, **TWO_TB) == [
        38,
        157,
    ]
    assert costs.crossovers(dense, dense, A100) == []


def test_offloading_fetches_what_is_touched():
    link = 25e9
    step = costs.offloaded_step(MIXTRAL, A100, 1, 0.0, link)
    experts = 2 * MIXTRAL.breakdown()["experts"].active
    assert step.memory_s == pytest.approx(experts / link)
    assert step.stored_bytes == pytest.approx(
        2 * (MIXTRAL.total_params() - MIXTRAL.breakdown()["experts"].total)
    )
    everything = costs.offloaded_step(MIXTRAL, A100, 1, 1.0, link)
    assert everything.time_s == costs.decode_step(MIXTRAL, A100, 1).time_s
    with pytest.raises(ValueError, match="resident"):
        costs.offloaded_step(MIXTRAL, A100, 1, 2.0, link)


def test_speculation_reads_more_experts():
    plain = costs.speculative(MIXTRAL, A100, 1, 0, 0.5)
    assert plain.tokens_per_step == 1
    assert plain.speedup == pytest.approx(1)
    sure = costs.speculative(LLAMA, A100, 1, 3, 1.0)
    assert sure.tokens_per_step == 4
    assert sure.speedup == pytest.approx(4, rel=0.01)
    sparse = costs.speculative(MIXTRAL, A100, 1, 3, 1.0)
    assert sparse.step.weight_bytes == pytest.approx(costs.touched_weights(MIXTRAL, 4))
    assert sparse.speedup < 2
    half = costs.speculative(LLAMA, A100, 1, 3, 0.5)
    assert half.tokens_per_step == pytest.approx((1 - 0.5**4) / 0.5)
    with pytest.raises(ValueError, match="acceptance"):
        costs.speculative(LLAMA, A100, 1, 3, 1.5)


# ---- Memory and training -----------------------------------------------------


def test_training_memory_by_stage():
    spec, n = LLAMA, LLAMA.total_params()
    plain = costs.training_memory(spec, 1)
    assert plain.weights + plain.gradients + plain.optimiser == 16 * n
    wanted = {
        "none": 16,
        "optimiser": 4 + 12 / 8,
        "gradients": 2 + 14 / 8,
        "weights": 2,
    }
    for stage, each in wanted.items():
        got = costs.training_memory(spec, 1, devices=8, shard=stage)
        assert got.weights + got.gradients + got.optimiser == pytest.approx(each * n)
    light = costs.training_memory(spec, 1000, recompute=True).activations
    assert light == 1000 * (2 * 80 * 8192 + 4 * 32000)
    assert light < costs.training_memory(spec, 1000).activations
    with pytest.raises(ValueError, match="shard must be one of"):
        costs.training_memory(spec, 1, shard="zero")
    with pytest.raises(ValueError, match="divide devices"):
        costs.training_memory(spec, 1, devices=4, expert_parallel=3)


def test_expert_parallelism_splits_the_experts_alone():
    experts = MIXTRAL.breakdown()["experts"].total
    rest = MIXTRAL.total_params() - experts
    got = costs.training_memory(MIXTRAL, 1, devices=8, expert_parallel=8)
    assert got.weights == pytest.approx(2 * (rest + experts / 8))
    full = costs.training_memory(
        MIXTRAL, 1, devices=16, expert_parallel=8, shard="weights"
    )
    assert full.weights == pytest.approx(2 * (rest / 16 + experts / 16))


def test_activations_are_what_autograd_keeps_in_an_ffn():
    """The FFN's part of the formula, against saved tensors; attention's kernels differ too much to count."""
    import torch

    from moe_course.layers.ffn import SwiGLU

    ffn, x = SwiGLU(16, 40), torch.randn(5, 16, requires_grad=True)
    kept = {}

    def pack(t):
        kept[t.data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        ffn(x)
    weights = {p.data_ptr() for p in ffn.parameters()}
    numbers = sum(n for pointer, n in kept.items() if pointer not in weights)
    # x, gate, silu(gate), up and the product: a fused SwiGLU keeps one of F fewer.
    assert numbers == 5 * (16 + 4 * 40)


def test_tokens_per_day_and_price():
    got = costs.training_tokens_per_day(LLAMA, A100, 64, 0.45)
    weights = LLAMA.active_params(include_embedding=False)
    assert got == pytest.approx(0.45 * 64 * 312e12 * 86400 / (6 * weights))
    assert costs.training_flops_per_token(LLAMA, 4096) == pytest.approx(
        6 * weights + 3 * 80 * 4 * 64 * 128 * 2048
    )
    cost = costs.serving_cost(1000, 2, 3.0, busy=0.5)
    assert cost.per_million_tokens == pytest.approx(6 / (1000 * 3600 * 0.5) * 1e6)
    with pytest.raises(ValueError, match="mfu"):
        costs.training_tokens_per_day(LLAMA, A100, 64, 0)
    with pytest.raises(ValueError, match="busy"):
        costs.serving_cost(1000, 1, 1, busy=2)


def test_training_flops_are_those_that_deepseek_prints():
    """arXiv:2505.09343, table 2, at 4,096 tokens: MLA trains unfolded, and causally. The latent form gives 324."""
    for name, printed in (("deepseek-v2", 155), ("deepseek-v3", 250)):
        got = costs.training_flops_per_token(zoo[name], 4096) / 1e9
        assert got == pytest.approx(printed, abs=1), name


def test_training_flops_without_causality_are_those_of_palm():
    """6N + 12LHQT (arXiv:2204.02311, appendix B), with N the weights that multiply."""
    weights = LLAMA.active_params(include_embedding=False)
    want = 6 * weights + 12 * 80 * 64 * 128 * 4096
    assert costs.training_flops_per_token(LLAMA, 4096, causal=False) == want


def test_implied_mfu_is_what_deepseek_measured():
    """arXiv:2505.09343, table 4: 272.80 billion tokens a day on 2,048 H800, whose tensor cores are an H100's."""
    day = costs.training_mfu(
        zoo["deepseek-v3"], accelerators["H100-SXM"], 272.80e9, 2048 * 24, 4096
    )
    assert day == pytest.approx(0.3894, abs=0.002)
    full = costs.training_mfu(
        zoo["deepseek-v3"], accelerators["H100-SXM"], 272.80e9, 2048 * 24, 4096,
        causal=False,
    )  # fmt: skip
    assert full == pytest.approx(0.4373, abs=0.002)


@settings(max_examples=30)
@given(
    name=st.sampled_from(sorted(zoo)),
    mfu=st.floats(0.01, 1),
    devices=st.integers(1, 10_000),
    context=st.integers(0, 131_072),
    causal=st.booleans(),
)
def test_implied_mfu_undoes_tokens_per_day(name, mfu, devices, context, causal):
    spec = zoo[name]
    tokens = costs.training_tokens_per_day(spec, A100, devices, mfu, context, causal)
    implied = costs.training_mfu(spec, A100, tokens, devices * 24, context, causal)
    assert implied == pytest.approx(mfu)


def test_bad_trainings_and_prices_are_refused():
    with pytest.raises(ValueError, match="devices must be at least 1"):
        costs.training_tokens_per_day(LLAMA, A100, 0, 0.4)
    with pytest.raises(ValueError, match="device_hours must be positive"):
        costs.training_mfu(LLAMA, A100, 1e12, 0)
    with pytest.raises(ValueError, match="devices must be at least 1"):
        costs.serving_cost(1000, 0, 1.0)
    with pytest.raises(ValueError, match="price not negative"):
        costs.serving_cost(1000, 1, -1.0)
    with pytest.raises(ValueError, match="copies"):
        costs.training_memory(MIXTRAL, 1, copies=-1)
    with pytest.raises(ValueError, match="divide the 8 experts"):
        costs.training_memory(MIXTRAL, 1, devices=16, expert_parallel=16)


def activation_bytes(spec, **options):
    """Of one token in one layer, the logits aside."""
    kept = costs.training_memory(spec, 1, **options).activations - 4 * spec.vocab
    return kept / spec.layers


def test_activations_of_a_gpt_are_those_of_korthikanti():
    """34·D bytes less the masks of two dropouts, one byte each (arXiv:2205.05198, section 4.1)."""
    D = 64
    gpt = ModelSpec("gpt", 3, D, 100, GQA(4, 4, 16), FFN(4 * D, gated=False))
    assert activation_bytes(gpt) == 34 * D - 2 * D
    assert activation_bytes(gpt, recompute=True) == 2 * D


def test_activations_of_latent_attention_written_out():
    a = MLA(heads=4, q_rank=24, kv_rank=32, nope_dim=16, rope_dim=8, v_dim=12)
    spec = ModelSpec("latent", 2, 64, 100, a, FFN(128))
    numbers = [64, 64, 64, 64]  # in front of two norms and of two blocks
    numbers += [24, 24, 32 + 8, 32]  # latents: before and behind their norms
    numbers += [4 * 24, 4 * 24, 4 * 12, 4 * 12]  # queries, keys, values, output
    numbers += [128, 128, 128]  # gate, up, product
    assert activation_bytes(spec) == 2 * sum(numbers)


def test_norms_on_queries_and_keys_keep_what_they_read():
    plain, normed = (
        ModelSpec("q", 1, 64, 100, GQA(4, 2, 16, qk_norm=norm), FFN(128))
        for norm in ("none", "head")
    )
    assert activation_bytes(normed) - activation_bytes(plain) == 2 * (4 + 2) * 16


@settings(max_examples=20, deadline=None)
@given(T=st.integers(2, 12), E=st.integers(1, 5), data=st.data())
def test_activations_of_experts_are_what_autograd_keeps(T, E, data):
    """Per choice: the gathered input, the hidden numbers, and the output that the gate weight multiplies."""
    import torch

    K = data.draw(st.integers(1, E))
    D, F = 6, 10
    w1, w3 = torch.randn(2, E, F, D, requires_grad=True)
    w2 = torch.randn(E, D, F, requires_grad=True)
    x = torch.randn(T, D, requires_grad=True)
    gates = torch.rand(T, K, requires_grad=True)
    ids = torch.rand(T, E).argsort(dim=1)[:, :K].flatten()
    order = ids.argsort(stable=True)
    owners = [w.untyped_storage().data_ptr() for w in (w1, w2, w3, x, gates)]
    kept = {}

    def pack(t):
        pointer = t.untyped_storage().data_ptr()
        if t.is_floating_point() and pointer not in owners:
            kept[pointer] = t  # held, so that no other tensor takes its place
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        rows = x[order // K]
        out = []
        for e, mine in enumerate(rows.split(torch.bincount(ids, minlength=E).tolist())):
            hidden = torch.nn.functional.silu(mine @ w1[e].T) * (mine @ w3[e].T)
            out.append(hidden @ w2[e].T)
        weighed = torch.cat(out) * gates.flatten()[order, None]
        weighed[order.argsort()].view(T, K, D).sum(dim=1)
    # A fused SwiGLU does not keep silu(gate): F numbers fewer. The gathered gates are one number a choice.
    numbers = sum(t.untyped_storage().nbytes() // 4 for t in kept.values())
    numbers -= T * K * (F + 1)
    moe = RoutedExperts(E, K, FFN(F))
    spec = ModelSpec("sparse", 1, D, 100, GQA(1, 1, D), moe=moe)
    dense = ModelSpec("dense", 1, D, 100, GQA(1, 1, D), FFN(F))
    block = activation_bytes(spec) - activation_bytes(dense) + 2 * 3 * F
    assert 2 * numbers == T * block
    without = activation_bytes(spec) - activation_bytes(spec, copies=0)
    assert without == 2 * 2 * K * D


@settings(max_examples=40)
@given(
    name=st.sampled_from(["mixtral-8x7b", "llama-2-70b", "deepseek-v3"]),
    nodes=st.integers(1, 8),
    ep=st.sampled_from([1, 2, 4, 8]),
    shard=st.sampled_from(["none", "optimiser", "gradients", "weights"]),
)
def test_shards_of_all_devices_hold_everything(name, nodes, ep, shard):
    """Over all devices: each copied byte as often as it is copied, each sharded one once."""
    spec, devices = zoo[name], 8 * nodes
    got = costs.training_memory(spec, 1, devices, ep, shard)
    experts = spec.breakdown()["experts"].total
    copied = (spec.total_params() - experts) * devices + experts * devices / ep
    level = ["none", "optimiser", "gradients", "weights"].index(shard)
    for stage, each, held in (
        (3, 2, got.weights), (2, 2, got.gradients), (1, 12, got.optimiser),
    ):  # fmt: skip
        want = copied if level < stage else spec.total_params()
        assert held * devices == pytest.approx(each * want)


# ---- Network and placement ---------------------------------------------------


def test_all_to_all_bytes_count_what_leaves():
    T, D, K, R = 4096, 4096, 2, 8
    assert costs.all_to_all_bytes(T, D, K, R) == pytest.approx(58.7e6, rel=1e-3)
    assert costs.all_to_all_bytes(T, D, K, 1) == 0
    both = 2 * costs.all_to_all_bytes(T / R, D, K, R)
    assert both / costs.tensor_parallel_bytes(T, D, R) == pytest.approx(K / R)
    with pytest.raises(ValueError, match="ranks"):
        costs.all_to_all_bytes(1, 1, 1, 0)


@settings(max_examples=25)
@given(R=st.sampled_from([1, 2, 4, 8]), each=st.integers(1, 6), data=st.data())
def test_distinct_ranks_by_counting_all_choices(R, each, data):
    E = R * each
    K = data.draw(st.integers(1, min(E, 4)))
    if math.comb(E, K) > 20000:
        return
    choices = list(itertools.combinations(range(E), K))
    mean = sum(len({e // each for e in c}) for c in choices) / len(choices)
    assert costs.expected_distinct_ranks(E, K, R) == pytest.approx(mean)


def test_deepseek_v3_in_ranks_and_nodes():
    assert costs.expected_distinct_ranks(256, 8, 64) == pytest.approx(7.676, abs=5e-4)
    assert costs.expected_distinct_ranks(256, 8, 8) == pytest.approx(5.295, abs=5e-4)
    free = costs.deduplicated_bytes(1, 7168, 256, 8, 8)
    limited = costs.deduplicated_bytes(1, 7168, 256, 8, 8, limit=4)
    assert limited == 7168 * 2 * 4 * 7 / 8 < free


@settings(max_examples=25)
@given(
    nodes=st.integers(1, 4), node=st.integers(1, 2), each=st.integers(1, 2),
    data=st.data(),
)  # fmt: skip
def test_two_levels_by_counting_every_hop(nodes, node, each, data):
    """Every sender, every choice of experts: a hop for each node that is needed and not one's own, then one for each
    rank that is needed and not where the token landed.
    """
    R, E = nodes * node, nodes * node * each
    K = data.draw(st.integers(1, min(E, 3)))
    between = inside = tokens = 0
    for sender in range(R):
        for choice in itertools.combinations(range(E), K):
            tokens += 1
            reached = {e // each for e in choice}
            needed = {rank // node for rank in reached}
            between += len(needed - {sender // node})
            landed = {n * node + sender % node for n in needed}
            inside += len(reached - landed)
    found = costs.two_level_bytes(10, 4, E, K, R, node, 1)
    assert found.between == pytest.approx(10 * 4 * between / tokens)
    assert found.inside == pytest.approx(10 * 4 * inside / tokens)


@settings(max_examples=25)
@given(
    R=st.integers(1, 4), each=st.integers(1, 3), data=st.data(),
)  # fmt: skip
def test_distinct_ranks_within_a_limit_by_counting(R, each, data):
    limit = data.draw(st.integers(1, R))
    K = data.draw(st.integers(1, min(4, limit * each)))
    found = []
    for allowed in itertools.combinations(range(R), limit):
        experts = [e for e in range(R * each) if e // each in allowed]
        found += [
            len({e // each for e in c}) for c in itertools.combinations(experts, K)
        ]
    mean = sum(found) / len(found)
    assert costs.expected_distinct_ranks(R * each, K, R, limit) == pytest.approx(mean)


def test_limits_and_levels_that_make_no_sense():
    for arguments, words in (
        ((8, 2, 3), "ranks must divide num_experts, got 3 and 8"),
        ((8, 9, 4), r"k must lie in 1\.\.8"),
        ((8, 3, 4, 1), r"k must lie in 1\.\.2"),
        ((8, 2, 4, 5), r"limit must lie in 1\.\.4"),
    ):
        with pytest.raises(ValueError, match=words):
            costs.expected_distinct_ranks(*arguments)
    with pytest.raises(ValueError, match="node must divide ranks, got 3 and 8"):
        costs.two_level_bytes(1, 1, 8, 2, 8, 3)
    link = costs.Link("any", 1e-6, 1e9)
    with pytest.raises(ValueError, match="bytes must not be negative"):
        costs.all_to_all_time(-1, 2, link)
    limited = costs.two_level_bytes(4096, 7168, 256, 8, 64, 8, 1, limit=4)
    free = costs.two_level_bytes(4096, 7168, 256, 8, 64, 8, 1)
    assert limited.between == 4096 * 7168 * 4 * 7 / 8 < free.between
    assert limited.inside == free.inside  # an upper bound
    one = costs.two_level_bytes(1, 1, 8, 2, 4, 4)  # one node: nothing crosses
    assert one.between == 0
    assert one.inside == costs.deduplicated_bytes(1, 1, 8, 2, 4)


@settings(max_examples=50)
@given(
    alpha=st.floats(1e-7, 1e-2), beta=st.floats(1e6, 1e12), messages=st.integers(1, 9),
    sizes=st.lists(st.integers(0, 10**8), min_size=2, max_size=6, unique=True),
)  # fmt: skip
def test_a_link_is_found_from_its_times(alpha, beta, messages, sizes):
    times = [messages * alpha + s / beta for s in sizes]
    # Two that a line cannot tell apart in floating point say nothing about it.
    assume(max(times) > 1.01 * min(times))
    assume(max(sizes) / beta > 0.01 * messages * alpha)
    found = costs.fit_link("x", sizes, times, messages)
    assert found.latency == pytest.approx(alpha, rel=1e-3, abs=1e-5 * max(times))
    assert found.bandwidth == pytest.approx(beta, rel=1e-3)


def test_a_fit_weighs_each_time_by_its_size():
    """Small and large times disagree by a tenth: each gives way by as much, relatively."""
    sizes = [0, 10**9]
    both = costs.fit_link("x", sizes * 2, [1e-6, 1.0, 1.1e-6, 1.1])
    assert both.latency == pytest.approx(1.05e-6, rel=0.01)
    assert both.bandwidth == pytest.approx(1e9 / 1.05, rel=0.01)
    for sent, seconds in (
        ([1, 1], [1, 2]),
        ([1, 2], [0, 1]),
        ([1], [1]),
        ([1, 2], [1]),
    ):
        with pytest.raises(ValueError, match="two sizes at least"):
            costs.fit_link("x", sent, seconds)
    with pytest.raises(ValueError, match="no latency and bandwidth fit"):
        costs.fit_link("x", [1, 2], [2.0, 1.0])  # faster for more
    with pytest.raises(ValueError, match="no latency and bandwidth fit"):
        costs.fit_link("x", [1, 2], [1.0, 3.0])  # faster than proportional


def test_flops_per_byte_need_neither_width_nor_experts():
    assert costs.flops_per_byte(14336) == 21504
    assert costs.flops_per_byte(2048, 1, 2) == 4096
    assert costs.flops_per_byte(14336, gated=False) == 4 * 14336 / 4
    D, F = 64, 96
    assert costs.flops_per_byte(F) == 6 * D * F / (2 * D * 2)


def test_time_of_an_exchange():
    fast, slow = costs.Link("NVLink", 1e-6, 300e9), costs.Link("IB", 5e-6, 25e9)
    assert costs.all_to_all_time(3e9, 4, fast) == pytest.approx(3e-6 + 0.01)
    assert costs.all_to_all_time(3e9, 1, fast) == 0
    across = costs.all_to_all_time(15e9, 16, fast, slow, node=8)
    assert across == pytest.approx(8 * 5e-6 + 15e9 * 8 / 15 / 25e9)
    with pytest.raises(ValueError, match="node must divide"):
        costs.all_to_all_time(1, 16, fast, slow, node=5)
    assert costs.overlapped(3, 2, 1) == 3
    assert costs.overlapped(2, 3, 0) == 5
    with pytest.raises(ValueError, match="share"):
        costs.overlapped(1, 1, 2)
    assert fast.time(300e9) == 1 + 1e-6


@settings(max_examples=40)
@given(
    shape=st.sampled_from([(2, 1), (2, 2), (4, 1), (4, 2), (2, 3), (3, 2), (1, 4)]),
    data=st.data(),
)
def test_placement_by_load_is_near_the_best(shape, data):
    ranks, each = shape
    E = ranks * each
    loads = data.draw(st.lists(st.integers(0, 50), min_size=E, max_size=E))
    placed = placement.by_load(loads, ranks)
    assert sorted(placed) == sorted(placement.contiguous(E, ranks))
    # By an oracle that knows nothing of the package: every order of the places.
    slots = [r for r in range(ranks) for _ in range(each)]
    mean = sum(loads) / ranks
    best = min(
        max(sum(x for x, r in zip(loads, p, strict=True) if r == rank) for rank in range(ranks))
        for p in set(itertools.permutations(slots))
    ) / mean if mean else 1.0  # fmt: skip
    assert placement.best(loads, ranks) == pytest.approx(best)
    # For three a rank the greedy rule is known to be within 4/3 - 1/(3R) of the best (Kellerer and Woeginger, 1993).
    got = placement.imbalance(loads, placed, ranks)
    assert best - 1e-9 <= got <= (4 / 3 - 1 / (3 * ranks)) * best + 1e-9


def test_all_placements_come_once():
    found = [tuple(p) for p in placement.placements(6, 3)]
    assert len(found) == len(set(found)) == 15  # 6! / (2!^3 3!)
    assert all(sorted(p) == [0, 0, 1, 1, 2, 2] for p in found)
    assert list(placement.placements(3, 1)) == [[0, 0, 0]]


def test_copies_of_hot_experts():
    loads = [100, 10, 10, 10]
    assert placement.copies(loads, 4) == [1, 1, 1, 1]
    assert placement.copies(loads, 6) == [3, 1, 1, 1]
    assert placement.copies(loads, 6, most=2) == [2, 2, 1, 1]
    # Two ranks have no use for a third copy.
    held = placement.replicated(loads, 2, 6)
    assert sorted(e for experts in held for e in experts) == [0, 0, 1, 1, 2, 3]
    spread = placement.replicated_imbalance(loads, held)
    alone = placement.imbalance(loads, placement.by_load(loads, 2), 2)
    assert spread == pytest.approx(1.0)
    assert alone > 1.5
    with pytest.raises(ValueError, match="at least as many places"):
        placement.copies(loads, 3)
    with pytest.raises(ValueError, match="at most 2 times"):
        placement.copies(loads, 9, most=2)
    with pytest.raises(ValueError, match="share the experts' places evenly"):
        placement.by_load(loads, 3)
    with pytest.raises(ValueError, match=r"no rank holds the experts \[3\]"):
        placement.replicated_imbalance(loads, [[0, 1], [0, 2]])
    assert placement.imbalance([0, 0], [0, 1], 2) == 1.0


@settings(max_examples=60)
@given(
    loads=st.lists(st.integers(0, 100), min_size=1, max_size=12),
    ranks=st.integers(1, 5),
    more=st.integers(0, 12),
)
def test_replicas_use_every_place(loads, ranks, more):
    slots = -(-(len(loads) + more) // ranks) * ranks
    slots = min(slots, len(loads) * ranks)
    held = placement.replicated(loads, ranks, slots)
    assert [len(h) for h in held] == [slots // ranks] * ranks
    assert {e for h in held for e in h} == set(range(len(loads)))
    if slots == len(loads) * ranks:
        assert all(sorted(h) == list(range(len(loads))) for h in held)
    for e in range(len(loads)):
        assert sum(h.count(e) for h in held) <= ranks


def test_two_copies_do_not_share_a_rank():
    # By load alone the second copy of expert 0 (50 each) would join the first: that rank has 50, the other 60.
    held = placement.replicated([60, 100, 1], 2, 4)
    assert [1 in h for h in held] == [True, True]


def test_ranks_per_token():
    chosen = {(0, 1): 6, (2, 3): 3, (0, 3): 1}
    assert placement.ranks_per_token(chosen, [0, 0, 1, 1]) == pytest.approx(1.1)
    assert placement.ranks_per_token(chosen, [0, 1, 0, 1]) == pytest.approx(2.0)
    assert placement.ranks_per_token({}, [0, 1]) == 0
    E, K, R = 8, 3, 4
    everything = dict.fromkeys(itertools.combinations(range(E), K), 1)
    found = placement.ranks_per_token(everything, placement.contiguous(E, R))
    assert found == pytest.approx(costs.expected_distinct_ranks(E, K, R))


@settings(max_examples=30)
@given(
    loads=st.lists(st.integers(0, 100), min_size=1, max_size=4), extra=st.integers(0, 8)
)
def test_copies_minimise_the_heaviest_copy(loads, extra):
    counts = placement.copies(loads, len(loads) + extra)
    assert sum(counts) == len(loads) + extra
    heaviest = max(load / n for load, n in zip(loads, counts, strict=True))
    for other in itertools.product(range(1, extra + 2), repeat=len(loads)):
        if sum(other) == len(loads) + extra:
            assert (
                heaviest <= max(a / n for a, n in zip(loads, other, strict=True)) + 1e-9
            )


def test_costs_need_the_standard_library_alone():
    code = (
        "import sys, moe_course.costs, moe_course.costs.placement\n"
        "print([m for m in ('torch', 'numpy', 'jaxtyping') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
