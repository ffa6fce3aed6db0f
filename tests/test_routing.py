"""Gates and routers against loops written out in float64, brute force, and the routers of production models."""

from __future__ import annotations

import itertools
import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from moe_course.layers import (
    ExpertChoiceRouter,
    Groups,
    SoftMoE,
    SwiGLU,
    TopKRouter,
    balanced_random,
    base_assignment,
    expert_choice,
    hash_table,
    hashed,
    noisy_top_k,
    renormalised,
    sigmoid_top_k,
    sinkhorn_top_k,
    softmax_top_k,
    top_k_softmax,
)
from moe_course.layers.routing import jittered, router_logits, select, sinkhorn_log_plan

INF, NAN = math.inf, math.nan
SEEDS = st.integers(0, 10**6)


# --- Oracles: lists and loops ------------------------------------------------


def best_first(scores, k, allowed=None):
    """The k ids of highest score, the lowest id first among equal ones."""
    allowed = range(len(scores)) if allowed is None else allowed
    return sorted(allowed, key=lambda i: (-scores[i], i))[:k]


def allowed_by(groups, scores):
    """The experts of the kept groups."""
    size = len(scores) // groups.count
    members = [range(g * size, (g + 1) * size) for g in range(groups.count)]
    totals = [
        sum(sorted((scores[i] for i in group), reverse=True)[: groups.best])
        for group in members
    ]
    return [i for g in best_first(totals, groups.kept) for i in members[g]]


def softmax(row):
    top = max(row)
    if top == -INF:
        return [1 / len(row)] * len(row)
    exps = [math.exp(v - top) for v in row]
    return [e / sum(exps) for e in exps]


def sigmoid(v):
    return 1 / (1 + math.exp(-v)) if v > -700 else 0.0


def softmax_oracle(row, k, scale=1.0, groups=None):
    p = softmax(row)
    ids = best_first(p, k, allowed_by(groups, p)) if groups else best_first(row, k)
    return ids, [scale * p[i] for i in ids], p


def renormalised_oracle(row, k, scale=1.0, groups=None):
    ids, weights, p = softmax_oracle(row, k, 1.0, groups)
    return ids, [scale * w / sum(weights) for w in weights], p


def top_k_softmax_oracle(row, k):
    ids = best_first(row, k)
    return ids, softmax([row[i] for i in ids]), softmax(row)


def sigmoid_oracle(row, k, correction=None, normalise=True, scale=1.0, groups=None):
    s = [sigmoid(v) for v in row]
    bias = [0.0] * len(row) if correction is None else correction.tolist()
    biased = [a + b for a, b in zip(s, bias, strict=True)]
    ids = best_first(biased, k, allowed_by(groups, biased) if groups else None)
    divisor = sum(s[i] for i in ids) + 1e-20 if normalise else 1.0
    return (
        ids,
        [scale * s[i] / divisor for i in ids],
        [v / (sum(s) + 1e-20) for v in s],
    )


ORACLES = {
    softmax_top_k: softmax_oracle,
    renormalised: renormalised_oracle,
    top_k_softmax: top_k_softmax_oracle,
    sigmoid_top_k: sigmoid_oracle,
    noisy_top_k: top_k_softmax_oracle,  # without noise
}
PLAIN = list(ORACLES)
by_name = lambda gate: gate.__name__  # noqa: E731


@st.composite
def cases(draw, most_tokens=5, most_experts=9, masked=True):
    """Logits [T, E] in float64, some with ties and some with forbidden experts, and k."""
    tokens, experts = (
        draw(st.integers(0, most_tokens)),
        draw(st.integers(1, most_experts)),
    )
    k = draw(st.integers(1, experts))
    kinds = ["random", "ties", "equal"] + ["masked"] * masked
    kind = draw(st.sampled_from(kinds))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    logits = 2 * torch.randn(tokens, experts, generator=generator, dtype=torch.float64)
    if kind == "ties":
        logits = logits.round()
    elif kind == "equal":
        logits = torch.full_like(logits, 0.3)
    elif kind == "masked":
        logits[torch.rand(logits.shape, generator=generator) < 0.5] = -INF
    return logits, k


def randn(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype)


def assert_equals_oracle(routing, logits, k, oracle, **options):
    for t, row in enumerate(logits.tolist()):
        ids, weights, probs = oracle(row, k, **options)
        assert routing.expert_ids[t].tolist() == ids
        assert routing.weights[t].tolist() == pytest.approx(weights, rel=1e-9)
        assert routing.probs[t].tolist() == pytest.approx(probs, rel=1e-9)
    assert routing.expert_ids.shape == routing.weights.shape == (len(logits), k)
    assert routing.probs.shape == logits.shape
    assert routing.logits is logits


# --- Selection ---------------------------------------------------------------

ODD_VALUES = [0.0, -0.0, 1.0, -1.0, INF, -INF, 1.5, -1.5, 1e-40, -1e-40, 6e4, 0.5]


@given(
    st.lists(st.sampled_from(ODD_VALUES), min_size=1, max_size=40),
    st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    st.data(),
)
def test_selection_is_by_score_then_by_id(values, dtype, data):
    scores = torch.tensor([values], dtype=dtype)
    k = data.draw(st.integers(1, len(values)))
    ids = select(scores, k)
    assert ids[0].tolist() == best_first(scores[0].tolist(), k)
    assert ids.is_contiguous()  # kernels read it with a stride of 1


def test_only_the_rows_with_ties_are_sorted_and_all_come_out_right():
    scores = randn(200, 20, dtype=torch.float32)
    scores[::3] = scores[::3].round()
    scores[1::3, 7] = scores[1::3].sort(dim=1).values[:, -3]  # for the last place
    for k in (1, 2, 3, 4, 20):
        expected = [best_first(row, k) for row in scores.tolist()]
        assert select(scores, k).tolist() == expected


@given(SEEDS, st.integers(1, 300), st.booleans())
def test_selection_in_float32_is_the_stable_sort(seed, experts, neighbours):
    scores = randn(3, experts, seed=seed, dtype=torch.float32)
    if neighbours:  # values one unit in the last place apart, of both signs
        step = torch.randint(-2, 3, scores.shape, dtype=torch.int32)
        scores = ((scores.sign() * 1.25).view(torch.int32) + step).view(torch.float32)
    k = min(8, experts)
    expected = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(select(scores, k), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gate", PLAIN, ids=by_name)
def test_all_equal_logits_choose_the_lowest_ids(gate, dtype):
    logits = torch.full((50, 33), -0.7, dtype=dtype)
    for k in (1, 2, 8, 33):
        assert torch.equal(
            gate(logits, k).expert_ids, torch.arange(k).expand(len(logits), k)
        )


def test_ties_between_groups_go_to_the_lowest_id():
    logits = torch.zeros(4, 12)
    for best in (1, 2, 3):
        routing = sigmoid_top_k(logits, 5, groups=Groups(4, kept=2, best=best))
        assert routing.expert_ids.tolist() == [[0, 1, 2, 3, 4]] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tie_across_kept_groups_goes_to_the_lowest_id(dtype):
    correction = torch.tensor([0.5, 0.0, 0.5, 0.25], dtype=dtype)  # group 1 is better
    logits = torch.zeros(1, 4, dtype=dtype)
    routing = sigmoid_top_k(logits, 2, correction=correction, groups=Groups(2, 2, 2))
    assert routing.expert_ids.tolist() == [[0, 2]]


@given(SEEDS, st.data())
def test_only_experts_of_the_kept_groups_are_chosen(seed, data):
    count, size = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    groups = Groups(
        count, data.draw(st.integers(1, count)), data.draw(st.integers(1, size))
    )
    k = data.draw(st.integers(1, groups.kept * size))
    logits, correction = randn(4, count * size, seed=seed), randn(count * size, seed=1)
    if data.draw(st.booleans()):
        logits, correction = logits.round(), correction.round()
    scale = data.draw(st.sampled_from([1.0, 2.5]))
    common = {"scale": scale, "groups": groups}
    for gate, options in [
        (softmax_top_k, common),
        (renormalised, common),
        (sigmoid_top_k, common | {"correction": correction}),
        (sigmoid_top_k, common | {"normalise": False}),
    ]:
        routing = gate(logits, k, **options)
        if not torch.equal(logits, logits.round()):  # equal sums may round differently
            assert_equals_oracle(routing, logits, k, ORACLES[gate], **options)
        for ids in routing.expert_ids.tolist():
            assert len(set(ids)) == k
            assert len({i // size for i in ids}) <= groups.kept


def test_a_group_is_judged_by_its_best_experts():
    #                 group 0            group 1
    p = torch.tensor([[0.4, 0.01, 0.01, 0.3, 0.25, 0.03]], dtype=torch.float64)
    by_max = softmax_top_k(p.log(), 2, groups=Groups(2, kept=1, best=1))
    by_sum = softmax_top_k(p.log(), 2, groups=Groups(2, kept=1, best=2))
    assert by_max.expert_ids.tolist() == [[0, 1]]
    assert by_sum.expert_ids.tolist() == [[3, 4]]


def test_the_correction_takes_part_in_the_choice_of_groups():
    logits = torch.tensor([[2.0, 2.0, 0.0, 0.0]])
    groups = Groups(2, kept=1, best=2)
    bias = torch.tensor([0.0, 0.0, 1.0, 1.0])
    assert sigmoid_top_k(logits, 1, groups=groups).expert_ids.item() == 0
    moved = sigmoid_top_k(logits, 1, groups=groups, correction=bias)
    assert moved.expert_ids.item() == 2


def test_an_expert_of_a_dropped_group_is_not_chosen_even_beside_forbidden_ones():
    correction = torch.tensor([0.0, 0.0, 5.0, -INF])
    routing = sigmoid_top_k(
        torch.zeros(1, 4), 2, correction=correction, groups=Groups(2, 1, 1)
    )
    assert routing.expert_ids.tolist() == [[2, 3]]


# --- Token-choice gates ------------------------------------------------------


@pytest.mark.parametrize("gate", PLAIN, ids=by_name)
@given(cases())
def test_gate_equals_its_formula(gate, case):
    logits, k = case
    assert_equals_oracle(gate(logits, k), logits, k, ORACLES[gate])


@given(cases(), SEEDS, st.booleans(), st.sampled_from([1.0, 2.5]))
def test_sigmoid_gate_with_a_correction_equals_its_formula(
    case, seed, normalise, scale
):
    logits, k = case
    options = {
        "correction": randn(logits.shape[1], seed=seed),
        "normalise": normalise,
        "scale": scale,
    }
    assert_equals_oracle(
        sigmoid_top_k(logits, k, **options), logits, k, sigmoid_oracle, **options
    )


def gradient(gate, logits, k, upstream):
    logits = logits.clone().requires_grad_()
    (gate(logits, k).weights * upstream).sum().backward()
    return logits.grad


@given(cases(masked=False), SEEDS)
def test_renormalised_is_top_k_softmax_in_value_and_gradient(case, seed):
    logits, k = case
    upstream = randn(len(logits), k, seed=seed)
    ours, other = renormalised(logits, k), top_k_softmax(logits, k)
    assert torch.equal(ours.expert_ids, other.expert_ids)
    torch.testing.assert_close(ours.weights, other.weights, rtol=1e-12, atol=0)
    grads = [gradient(g, logits, k, upstream) for g in (renormalised, top_k_softmax)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-14)
    outside = torch.ones_like(logits).scatter(1, other.expert_ids, 0.0).bool()
    assert (grads[1][outside] == 0).all()
    assert grads[0][outside].abs().le(1e-15).all()


def test_without_renormalisation_the_gradient_reaches_every_logit():
    assert (gradient(softmax_top_k, randn(6, 8), 2, 1.0) != 0).all()


@given(cases())
def test_with_one_expert_top_k_softmax_has_weight_1_and_no_gradient(case):
    logits, _ = case
    assert (top_k_softmax(logits, 1).weights == 1).all()
    assert (gradient(top_k_softmax, logits, 1, 3.0) == 0).all()


@given(SEEDS, st.integers(2, 9), st.data())
def test_correction_moves_the_choice_but_not_the_weights(seed, experts, data):
    k = data.draw(st.integers(1, experts - 1))
    logits = randn(5, experts, seed=seed)
    plain = sigmoid_top_k(logits, k)
    push = torch.zeros(experts, dtype=torch.float64)
    push[-1] = 10.0
    pushed = sigmoid_top_k(logits, k, correction=push)
    assert (pushed.expert_ids[:, 0] == experts - 1).all()
    # The same for all experts moves nothing: not the choice, and not the weights either.
    for shift in (3.0, -0.5):
        same = sigmoid_top_k(logits, k, correction=torch.full_like(push, shift))
        assert torch.equal(same.expert_ids, plain.expert_ids)
        assert torch.equal(same.weights, plain.weights)
    assert torch.equal(pushed.probs, plain.probs)


def test_correction_gets_no_gradient():
    correction = torch.randn(6, requires_grad=True)
    logits = torch.randn(4, 6, requires_grad=True)
    routing = sigmoid_top_k(logits, 3, correction=correction)
    routing.weights.square().sum().backward()
    assert correction.grad is None
    assert logits.grad.abs().sum() > 0


GRADCHECKED = {
    "softmax_top_k": lambda v: softmax_top_k(v, 3, scale=1.5),
    "softmax_top_k in groups": lambda v: softmax_top_k(v, 3, groups=Groups(2, 1, 1)),
    "renormalised": lambda v: renormalised(v, 3),
    "top_k_softmax": lambda v: top_k_softmax(v, 3),
    "sigmoid_top_k": lambda v: sigmoid_top_k(v, 3, scale=2.5, groups=Groups(2, 1, 2)),
    "sigmoid_top_k raw": lambda v: sigmoid_top_k(v, 3, normalise=False),
    "sinkhorn, k = 1": lambda v: sinkhorn_top_k(v, 1),
    "sinkhorn, k = 2": lambda v: sinkhorn_top_k(v, 2),
    "base": lambda v: base_assignment(v, 1),
    "hashed": lambda v: hashed(
        v, 2, token_ids=torch.arange(5), table=hash_table(5, 6, 2)
    ),
    "expert_choice": lambda v: expert_choice(v, 2),
}


@pytest.mark.parametrize("name", GRADCHECKED)
def test_gradients_are_those_of_the_weights(name):
    logits = randn(5, 6, seed=3).requires_grad_()

    def outputs(v):
        torch.manual_seed(0)
        out = GRADCHECKED[name](v)
        return (out.weights, out.probs) if hasattr(out, "probs") else out.weight

    assert torch.autograd.gradcheck(outputs, (logits,))


def test_gradients_of_noisy_top_k_reach_both_matrices():
    inputs = randn(4, 5, seed=1).requires_grad_(), randn(4, 5, seed=2).requires_grad_()

    def outputs(logits, noise_logits):
        torch.manual_seed(0)
        routing = noisy_top_k(logits, 2, noise_logits=noise_logits)
        return routing.weights, routing.noisy_logits, routing.noise_std

    assert torch.autograd.gradcheck(outputs, inputs)


def test_noise_has_the_size_that_softplus_of_the_noise_logits_gives():
    torch.manual_seed(0)
    logits, noise = torch.randn(1, 4).double(), torch.tensor([[-2.0, 0.0, 1.0, 3.0]])
    tokens = 200_000
    routing = noisy_top_k(
        logits.expand(tokens, 4), 2, noise_logits=noise.double().expand(tokens, 4)
    )
    expected = [math.log1p(math.exp(v)) for v in noise[0].tolist()]
    assert routing.noise_std[0].tolist() == pytest.approx(expected)
    added = routing.noisy_logits - logits
    assert added.std(0).tolist() == pytest.approx(expected, rel=0.01)
    errors = (added.mean(0).abs() / routing.noise_std[0]) * math.sqrt(tokens)
    assert (errors < 4).all()
    z = added / routing.noise_std  # normal: kurtosis 3, independent across experts
    assert (z**4).mean(0).tolist() == pytest.approx([3.0] * 4, abs=0.1)
    assert (torch.corrcoef(z.T) - torch.eye(4)).abs().max() < 0.01
    for t, row in enumerate(routing.noisy_logits[:50].tolist()):
        ids, weights, _ = top_k_softmax_oracle(row, 2)
        assert routing.expert_ids[t].tolist() == ids
        assert routing.weights[t].tolist() == pytest.approx(weights)
    assert torch.equal(routing.expert_ids, select(routing.noisy_logits, 2))
    assert torch.equal(routing.probs, routing.logits.softmax(1))


def test_noise_is_off_in_evaluation():
    torch.manual_seed(0)
    router = TopKRouter(5, 8, 2, noisy_top_k).double()
    nn.init.normal_(router.noise_weight)
    x = torch.randn(30, 5).double()
    trained = [router(x) for _ in range(2)]
    assert not torch.equal(trained[0].noisy_logits, trained[1].noisy_logits)
    expected = nn.functional.softplus(x @ router.noise_weight.T)
    torch.testing.assert_close(trained[0].noise_std, expected)
    router.eval()
    calm = [router(x) for _ in range(2)]
    assert torch.equal(calm[0].weights, calm[1].weights)
    assert calm[0].noisy_logits is None
    assert calm[0].noise_std is None
    assert_equals_oracle(calm[0], calm[0].logits, 2, top_k_softmax_oracle)


def test_jitter_stays_in_its_bounds_and_in_training():
    torch.manual_seed(0)
    x = torch.randn(200, 50, dtype=torch.bfloat16)
    before = x.clone()
    factor = jittered(x, 0.1) / x.float()
    assert torch.equal(x, before)
    assert factor.dtype == torch.float32
    assert factor.min() >= 0.9 - 1e-6
    assert factor.max() <= 1.1 + 1e-6
    assert factor.min() < 0.901
    assert factor.max() > 1.099
    assert abs(factor.mean() - 1) < 0.003
    assert factor[0].unique().numel() > 40  # drawn for each number, not for each token

    router = TopKRouter(50, 4, 1, softmax_top_k, jitter=0.1)
    x = torch.randn(20, 50)
    assert not torch.equal(router(x).logits, router(x).logits)
    router.eval()
    assert torch.equal(router(x).logits, x @ router.weight.T)


@given(
    cases(masked=False, most_experts=6), st.integers(1, 20), st.booleans(), st.data()
)
def test_hashed_experts_are_looked_up(case, vocab, learned, data):
    logits, k = case
    table = hash_table(vocab, logits.shape[1], k)
    ids = data.draw(
        st.lists(
            st.integers(0, vocab - 1), min_size=len(logits), max_size=len(logits)
        ).map(lambda v: torch.tensor(v, dtype=torch.int64))
    )
    routing = hashed(logits, k, token_ids=ids, table=table, learned=learned)
    other = hashed(logits + 1e6 * torch.randn(1), k, token_ids=ids, table=table)
    assert torch.equal(routing.expert_ids, other.expert_ids)
    for t, row in enumerate(logits.tolist()):
        expected = table[ids[t]].tolist()
        assert routing.expert_ids[t].tolist() == expected
        weights = [softmax(row)[e] for e in expected] if learned else [1 / k] * k
        assert routing.weights[t].tolist() == pytest.approx(weights)


@given(st.integers(1, 60), st.integers(1, 7), st.data())
def test_a_hash_table_spreads_the_vocabulary_evenly(vocab, experts, data):
    k = data.draw(st.integers(1, experts))
    table = hash_table(vocab, experts, k)
    assert table.shape == (vocab, k)
    assert all(len(set(row)) == k for row in table.tolist())
    counts = table.flatten().bincount(minlength=experts)
    # Each of the k columns is even up to one row.
    assert counts.max() - counts.min() <= k
    if vocab % experts == 0:
        assert counts.max() == counts.min() == vocab * k // experts


@given(cases(masked=False, most_tokens=30))
def test_balanced_random_is_even_for_every_k(case):
    logits, k = case
    routing = balanced_random(logits, k)
    counts = routing.expert_ids.flatten().bincount(minlength=logits.shape[1])
    assert counts.max() - counts.min() <= 1
    assert all(len(set(ids)) == k for ids in routing.expert_ids.tolist())
    expected = logits.softmax(1).gather(1, routing.expert_ids)
    torch.testing.assert_close(routing.weights, expected)
    again = [balanced_random(torch.zeros(40, 8), 2).expert_ids for _ in range(2)]
    assert not torch.equal(*again)


# --- Sinkhorn and BASE -------------------------------------------------------


@given(SEEDS, st.integers(1, 12), st.integers(1, 6), st.sampled_from([0.1, 1.0, 4.0]))
@settings(max_examples=40)
def test_the_plan_of_sinkhorn_has_even_margins_and_is_a_scaling(
    seed, tokens, experts, size
):
    logits = size * randn(tokens, experts, seed=seed)
    log_plan = sinkhorn_log_plan(logits, tolerance=1e-9, max_iterations=3000)
    plan = log_plan.exp()
    torch.testing.assert_close(
        plan.sum(1), torch.full((tokens,), 1 / tokens).double(), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(
        plan.sum(0), torch.full((experts,), 1 / experts).double(), rtol=1e-6, atol=0
    )
    # log Π - l = log u_t + log v_e: what is left after the means of rows and columns is 0.
    rest = log_plan - logits
    rest = rest - rest.mean(0, keepdim=True)
    rest = rest - rest.mean(1, keepdim=True)
    assert rest.abs().max() < 1e-9


def test_sinkhorn_survives_logits_whose_exponential_overflows():
    logits = 300 * randn(16, 4, dtype=torch.float32)
    assert sinkhorn_log_plan(logits).isfinite().all()
    assert sinkhorn_top_k(logits, 2).weights.isfinite().all()


def test_sinkhorn_leaves_a_forbidden_expert_and_a_forbidden_token_out():
    logits = randn(12, 4)
    logits[:, 1] = logits[5] = -INF
    plan = sinkhorn_log_plan(logits, max_iterations=50).exp()
    assert plan.isfinite().all()
    assert (plan[:, 1] == 0).all()
    assert (plan[5] == 0).all()
    alone = logits[[0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]][:, [0, 2, 3]]
    expected = torch.tensor([0, 2, 3])[sinkhorn_top_k(alone, 2).expert_ids]
    chosen = sinkhorn_top_k(logits, 2).expert_ids
    assert torch.equal(torch.cat([chosen[:5], chosen[6:]]), expected)


@pytest.mark.parametrize("k", [1, 3])
def test_sinkhorn_chooses_by_the_plan_and_weighs_by_the_logits(k):
    logits = randn(60, 6) + torch.linspace(0, 4, 6, dtype=torch.float64)  # skewed
    routing = sinkhorn_top_k(logits, k)
    assert torch.equal(routing.expert_ids, select(sinkhorn_log_plan(logits), k))
    for t, row in enumerate(logits.tolist()):
        score = [sigmoid(v) for v in row] if k == 1 else softmax(row)
        expected = [score[e] for e in routing.expert_ids[t].tolist()]
        assert routing.weights[t].tolist() == pytest.approx(expected)
    greedy = sinkhorn_top_k(logits, k, greedy=True)
    assert torch.equal(greedy.expert_ids, select(logits, k))

    def most(r):
        return r.expert_ids.flatten().bincount(minlength=6).max() / (60 * k / 6)

    assert most(routing) < 1.5 < most(greedy)


@given(
    SEEDS,
    st.sampled_from([(1, 3), (2, 2), (3, 2), (4, 2), (5, 3), (6, 3), (5, 4), (4, 1)]),
)
@settings(max_examples=60)
def test_base_is_the_best_of_all_even_assignments(seed, shape):
    tokens, experts = shape
    logits = randn(tokens, experts, seed=seed)
    routing = base_assignment(logits, 1)
    chosen = routing.expert_ids[:, 0].tolist()
    low, high = tokens // experts, -(-tokens // experts)

    def value(assignment):
        return sum(logits[t, e].item() for t, e in enumerate(assignment))

    even = [
        a
        for a in itertools.product(range(experts), repeat=tokens)
        if all(low <= a.count(e) <= high for e in range(experts))
    ]
    assert tuple(chosen) in even
    assert value(chosen) == pytest.approx(max(value(a) for a in even))
    expected = [sigmoid(logits[t, e].item()) for t, e in enumerate(chosen)]
    assert routing.weights[:, 0].tolist() == pytest.approx(expected)
    greedy = base_assignment(logits, 1, greedy=True)
    assert torch.equal(greedy.expert_ids, select(logits, 1))


def test_base_is_even_under_a_heavy_skew():
    logits = torch.randn(96, 8) + 10 * torch.arange(8)
    counts = base_assignment(logits, 1).expert_ids.flatten().bincount(minlength=8)
    assert counts.tolist() == [12] * 8


def test_base_names_what_it_cannot_do(monkeypatch):
    with pytest.raises(ValueError, match="k must be 1, got 2"):
        base_assignment(torch.zeros(4, 4), 2)
    with pytest.raises(ValueError, match="finite logits"):
        base_assignment(torch.tensor([[0.0, -INF]]), 1)
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match="pip install scipy"):
        base_assignment(torch.zeros(4, 4), 1)
    assert base_assignment(torch.zeros(4, 4), 1, greedy=True).weights.shape == (4, 1)


def test_balanced_choices_are_greedy_in_evaluation_only():
    x = randn(24, 5)
    for gate in (sinkhorn_top_k, base_assignment):
        router = TopKRouter(5, 4, 1, gate).double()
        nn.init.normal_(router.weight)
        logits = x @ router.weight.T
        assert torch.equal(router(x).expert_ids, gate(logits, 1).expert_ids)
        greedy = router.eval()(x).expert_ids
        assert torch.equal(greedy, select(logits, 1))
        assert not torch.equal(greedy, gate(logits, 1).expert_ids)


# --- Expert choice -----------------------------------------------------------


@given(cases(most_tokens=8, most_experts=5), st.data())
def test_each_expert_takes_the_tokens_that_want_it_most(case, data):
    logits, _ = case
    tokens, experts = logits.shape
    capacity = data.draw(st.integers(0, tokens))
    slots = expert_choice(logits, capacity)
    expected = []
    columns = list(zip(*[softmax(row) for row in logits.tolist()], strict=True))
    for e in range(experts):
        column = columns[e] if tokens else []
        expected += [(e, t, column[t]) for t in sorted(best_first(column, capacity))]
    assert slots.expert.tolist() == [e for e, _, _ in expected]
    assert slots.token.tolist() == [t for _, t, _ in expected]
    assert slots.weight.tolist() == pytest.approx([w for _, _, w in expected])


def test_expert_choice_in_float32_breaks_ties_by_the_first_token():
    slots = expert_choice(torch.zeros(40, 3), 5)
    assert slots.token.tolist() == [0, 1, 2, 3, 4] * 3


def test_a_later_token_takes_an_earlier_ones_place():
    logits = randn(6, 3)
    logits[-1] = 0.0
    logits[-1, 0] = -9.0
    before = expert_choice(logits, 2)
    logits[-1, 0] = 9.0
    after = expert_choice(logits, 2)
    mine = [set(s.token[s.expert == 0].tolist()) for s in (before, after)]
    assert 5 not in mine[0]
    assert 5 in mine[1]
    assert mine[0] - mine[1]


@pytest.mark.parametrize("capacity", [-1, 5])
def test_expert_choice_names_an_impossible_capacity(capacity):
    with pytest.raises(ValueError, match=rf"0\.\.4 .*got {capacity}"):
        expert_choice(torch.zeros(4, 2), capacity)


@pytest.mark.parametrize(("tokens", "per_expert"), [(0, 0), (1, 1), (8, 4), (9, 5)])
def test_expert_choice_router_fills_its_capacity(tokens, per_expert):
    router = ExpertChoiceRouter(3, 6, k=3)
    slots = router(torch.randn(tokens, 3, dtype=torch.bfloat16))
    assert slots.expert.bincount(minlength=6).tolist() == [per_expert] * 6
    assert slots.weight.dtype == torch.float32
    double = ExpertChoiceRouter(3, 6, k=3, capacity_factor=4.0)(torch.randn(tokens, 3))
    assert double.expert.bincount(minlength=6).tolist() == [tokens] * 6
    with pytest.raises(ValueError, match=r"k must lie in 1\.\.6 .*got 7"):
        ExpertChoiceRouter(3, 6, k=7)
    with pytest.raises(ValueError, match="must be positive, got 0"):
        ExpertChoiceRouter(3, 6, k=1, capacity_factor=0.0)


# --- Soft MoE ----------------------------------------------------------------


def soft_moe(width, experts, slots, normalise):
    ffns = [SwiGLU(width, 4) for _ in range(experts)]
    layer = SoftMoE(width, ffns, slots, normalise).double()
    if normalise:
        nn.init.constant_(layer.scale, 1.7)
    return layer


def soft_moe_oracle(layer, x, keep=None):
    """Sums over tokens and slots, one number at a time, for a sequence [T, D]."""
    tokens, width = x.shape
    keep = [True] * tokens if keep is None else keep
    phi = layer.phi.detach().reshape(-1, width).tolist()
    per_expert = layer.phi.shape[1]
    logits = [[0.0] * len(phi) for _ in range(tokens)]
    for t, row in enumerate(x.tolist()):
        for j, slot in enumerate(phi):
            dot = sum(a * b for a, b in zip(row, slot, strict=True))
            if layer.scale is not None:
                lengths = math.hypot(*row) * math.hypot(*slot)
                dot *= layer.scale.item() / lengths
            logits[t][j] = dot
    outputs = []
    for j in range(len(phi)):
        column = softmax([logits[t][j] if keep[t] else -INF for t in range(tokens)])
        mean = sum(p * row for p, row in zip(column, x, strict=True))
        outputs.append(layer.experts[j // per_expert](mean[None])[0].detach())
    rows = [
        sum(p * out for p, out in zip(softmax(logits[t]), outputs, strict=True))
        * keep[t]
        for t in range(tokens)
    ]
    return torch.stack(rows)


@given(
    SEEDS,
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 4),
    st.booleans(),
)
@settings(max_examples=40)
def test_soft_moe_equals_its_sums(seed, tokens, experts, slots, width, normalise):
    torch.manual_seed(seed)
    layer = soft_moe(width, experts, slots, normalise)
    x = randn(2, tokens, width, seed=seed)
    y = layer(x)
    mask = torch.rand(2, tokens) < 0.6
    mask[:, 0] = True
    masked = layer(x, mask)
    for b in range(2):
        torch.testing.assert_close(y[b], soft_moe_oracle(layer, x[b]))
        expected = soft_moe_oracle(layer, x[b], mask[b].tolist())
        torch.testing.assert_close(masked[b], expected)


@pytest.mark.parametrize("normalise", [True, False])
def test_gradients_of_soft_moe(normalise):
    torch.manual_seed(0)
    layer = soft_moe(3, 2, 2, normalise)
    names = [name for name, _ in layer.named_parameters()]

    def run(x, *weights):
        params = dict(zip(names, weights, strict=True))
        return torch.func.functional_call(layer, params, x)

    weights = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    x = randn(4, 3).requires_grad_()
    assert torch.autograd.gradcheck(run, (x, *weights))


def test_padding_leaves_soft_moe_as_it_would_be_without_it():
    torch.manual_seed(0)
    layer = soft_moe(4, 3, 2, True)
    x = randn(7, 4)
    padded = torch.cat([x, 100 * randn(3, 4, seed=1)])
    y = layer(padded, torch.arange(10) < 7)
    torch.testing.assert_close(y[:7], layer(x))
    assert (y[7:] == 0).all()
    assert (layer(padded, torch.zeros(10, dtype=torch.bool)) == 0).all()


def test_soft_moe_keeps_shape_dtype_and_count():
    for dtype in (torch.bfloat16, torch.float32):
        layer = SoftMoE(4, [SwiGLU(4, 8) for _ in range(3)], 2).to(dtype)
        for shape in ((0, 4), (2, 0, 4), (0, 5, 4), (1, 4), (2, 3, 5, 4)):
            y = layer(torch.randn(shape, dtype=dtype))
            assert y.shape == shape
            assert y.dtype == dtype
    own = sum(p.numel() for n, p in layer.named_parameters() if "experts" not in n)
    assert own == 3 * 2 * 4 + 1
    for experts, slots in (([], 1), ([SwiGLU(4, 8)], 0)):
        with pytest.raises(ValueError, match=f"got {len(experts)} experts and {slots}"):
            SoftMoE(4, experts, slots)


def test_soft_moe_computes_its_logits_in_float32():
    torch.manual_seed(0)
    layer = SoftMoE(64, [SwiGLU(64, 4) for _ in range(3)], 2)
    x = torch.randn(10, 64, dtype=torch.bfloat16)
    logits = layer._logits(x)
    assert logits.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer._logits(x), logits)
    torch.testing.assert_close(logits.double(), layer.double()._logits(x.double()))


# --- Extremes ----------------------------------------------------------------

ALL = {
    "softmax_top_k": softmax_top_k,
    "renormalised": renormalised,
    "top_k_softmax": top_k_softmax,
    "sigmoid_top_k": sigmoid_top_k,
    "noisy_top_k": noisy_top_k,
    "noise": lambda v, k: noisy_top_k(v, k, noise_logits=torch.zeros_like(v)),
    "balanced_random": balanced_random,
    "sinkhorn_top_k": sinkhorn_top_k,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ALL)
def test_no_tokens_one_expert_and_every_expert(name, dtype):
    gate = ALL[name]
    for tokens, experts, k in [(0, 4, 2), (3, 1, 1), (1, 1, 1), (5, 4, 4), (0, 1, 1)]:
        logits = torch.randn(tokens, experts, dtype=dtype, requires_grad=True)
        routing = gate(logits, k)
        assert routing.expert_ids.shape == routing.weights.shape == (tokens, k)
        assert routing.weights.dtype == routing.probs.dtype == dtype
        if k == experts:
            everyone = torch.arange(experts).expand(tokens, experts)
            assert torch.equal(routing.expert_ids.sort(dim=1).values, everyone)
        routing.weights.sum().backward()
        assert logits.grad.isfinite().all()
    empty = base_assignment(torch.zeros(0, 3), 1)
    assert empty.expert_ids.shape == empty.weights.shape == (0, 1)


FORBIDDING = [name for name in ALL if name != "balanced_random"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FORBIDDING)
def test_a_forbidden_expert_is_taken_last_with_weight_0(name, dtype):
    logits = torch.tensor(
        [[-INF, 1.0, -INF, -3.0], [-INF, -INF, 2.0, -INF], [0.0, 1.0, 2.0, 3.0]],
        dtype=dtype,
        requires_grad=True,
    )
    routing = ALL[name](logits, 2)
    forbidden = logits.gather(1, routing.expert_ids) == -INF
    assert forbidden.sum(1).tolist() == [0, 1, 0]
    assert (routing.weights[forbidden] == 0).all()
    assert (routing.weights[~forbidden] > 0).all()
    assert (routing.probs[logits == -INF] == 0).all()
    (routing.weights.square().sum() + routing.probs.square().sum()).backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("name", FORBIDDING)
def test_a_row_that_forbids_everything_is_finite(name):
    logits = torch.randn(3, 4)
    logits[1] = -INF
    logits.requires_grad_()
    routing = ALL[name](logits, 2)
    assert routing.expert_ids[1].tolist() == [0, 1]
    assert routing.weights.isfinite().all()
    assert routing.probs.isfinite().all()
    (routing.weights.square().sum() + routing.probs.square().sum()).backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ALL)
def test_nan_shows_in_the_weights_and_the_ids_stay_valid(name, dtype):
    logits = torch.randn(3, 5, dtype=dtype)
    logits[1, 3] = NAN
    logits[2, 3] = torch.tensor(NAN, dtype=dtype).neg()  # 0/0 has this sign on x86
    for k in (2, 5):
        routing = ALL[name](logits, k)
        assert all(len(set(ids)) == k for ids in routing.expert_ids.tolist())
        assert routing.expert_ids.min() >= 0
        assert routing.expert_ids.max() < 5
        assert routing.weights[1:].isnan().any(dim=1).all()
        assert routing.weights[0].isfinite().all()


@pytest.mark.parametrize("k", [0, -1, 5])
@pytest.mark.parametrize("name", ALL)
def test_an_impossible_k_is_named(name, k):
    with pytest.raises(ValueError, match=rf"k must lie in 1\.\.4 .*got {k}"):
        ALL[name](torch.zeros(2, 4), k)
    with pytest.raises(ValueError, match=rf"k must lie in 1\.\.4 .*got {k}"):
        TopKRouter(3, 4, k)
    with pytest.raises(ValueError, match=rf"k must lie in 1\.\.4 .*got {k}"):
        hash_table(10, 4, k)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (lambda: Groups(2, kept=3, best=1), r"kept must lie in 1\.\.2 .*got 3"),
        (lambda: Groups(2, kept=0, best=1), r"kept must lie in 1\.\.2 .*got 0"),
        (lambda: Groups(0, kept=0, best=1), r"kept must lie in 1\.\.0 .*got 0"),
        (lambda: Groups(2, kept=1, best=0), "best must be at least 1, got 0"),
        (lambda: Groups(4, kept=1, best=1), "4 groups do not divide 6 experts"),
        (lambda: Groups(3, kept=1, best=3), r"best must lie in 1\.\.2 .*got 3"),
        (lambda: Groups(3, kept=1, best=1), "1 groups of 2 experts .*k = 3"),
    ],
)
def test_groups_that_do_not_fit_are_named(groups, message):
    with pytest.raises(ValueError, match=message):
        softmax_top_k(torch.zeros(2, 6), 3, groups=groups())


# --- Routers -----------------------------------------------------------------


@given(
    st.integers(0, 5),
    st.integers(1, 6),
    st.integers(1, 6),
    st.booleans(),
    st.sampled_from(PLAIN),
    st.data(),
)
def test_router_is_a_matrix_and_a_gate(tokens, width, experts, bias, gate, data):
    k = data.draw(st.integers(1, experts))
    router = TopKRouter(width, experts, k, gate, bias=bias).double().eval()
    x = randn(tokens, width, seed=width)
    if bias:
        nn.init.normal_(router.bias)
    weight = router.weight.tolist()
    routing = router(x)
    for t, row in enumerate(x.tolist()):
        for e in range(experts):
            logit = sum(a * b for a, b in zip(weight[e], row, strict=True))
            logit += router.bias[e].item() if bias else 0.0
            assert routing.logits[t, e].item() == pytest.approx(logit, abs=1e-12)
    assert_equals_oracle(routing, routing.logits, k, ORACLES[gate])


def test_gradients_of_the_router():
    torch.manual_seed(0)
    router = TopKRouter(3, 6, 2, softmax_top_k, bias=True).double()

    def run(x, weight, bias):
        params = {"weight": weight, "bias": bias}
        return torch.func.functional_call(router, params, x).weights

    inputs = randn(4, 3), randn(6, 3, seed=1), randn(6, seed=2)
    assert torch.autograd.gradcheck(run, [v.requires_grad_() for v in inputs])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", ["low", "float32"])
def test_low_precision_input_is_routed_in_float32(dtype, weights):
    torch.manual_seed(0)
    router = TopKRouter(64, 16, 2, bias=True, jitter=0.01)
    nn.init.normal_(router.bias)
    if weights == "low":
        router = router.to(dtype)
    x = torch.randn(100, 64).to(dtype)
    exact = x.double() @ router.weight.double().T + router.bias.double()
    for jitter in (False, True):
        routing = router.train(jitter)(x)
        assert routing.logits.dtype == routing.weights.dtype == torch.float32
        assert routing.probs.dtype == torch.float32
    error = (router.eval()(x).logits - exact).abs().max()
    assert error < 2e-6  # a product in bfloat16 is off by 1e-3
    with torch.autocast("cpu", torch.bfloat16):
        inside = router(x).logits
    assert torch.equal(inside, router(x).logits)


def test_float64_stays_float64():
    routing = TopKRouter(4, 3, 2).double()(torch.randn(5, 4).double())
    assert routing.logits.dtype == routing.weights.dtype == torch.float64
    mixed = TopKRouter(4, 3, 2)(torch.randn(5, 4).double())
    assert mixed.logits.dtype == torch.float64


def test_what_each_gate_needs_is_in_the_router():
    def keys(**kwargs):
        return set(TopKRouter(4, 3, 2, **kwargs).state_dict())

    assert keys() == {"weight"}
    assert keys(bias=True) == {"weight", "bias"}
    assert keys(gate=noisy_top_k) == {"weight", "noise_weight"}
    assert keys(gate=sigmoid_top_k) == {"weight", "correction"}
    assert keys(gate=hashed, table=hash_table(9, 3, 2)) == {"weight", "table"}
    router = TopKRouter(4, 3, 2, sigmoid_top_k, bias=True)
    assert sum(p.numel() for p in router.parameters()) == 4 * 3 + 3


def test_router_passes_the_correction_and_the_options_on():
    torch.manual_seed(0)
    groups = Groups(2, kept=1, best=2)
    router = TopKRouter(4, 6, 2, sigmoid_top_k, scale=2.5, groups=groups).double()
    router.correction.copy_(torch.randn(6))
    x = randn(20, 4)
    routing = router(x)
    options = {"scale": 2.5, "groups": groups, "correction": router.correction}
    assert_equals_oracle(routing, routing.logits, 2, sigmoid_oracle, **options)
    assert "gate=sigmoid_top_k, scale=2.5, groups=Groups(count=2" in repr(router)


@pytest.mark.parametrize("cast", ["bfloat16", "half"])
def test_the_correction_stays_in_float32(cast):
    router = TopKRouter(4, 3, 2, sigmoid_top_k)
    router.correction.fill_(1.001)
    router = getattr(router, cast)()
    assert router.weight.dtype != torch.float32
    assert router.correction.dtype == torch.float32
    assert router.correction[0].item() == pytest.approx(1.001, abs=1e-7)
    assert "correction" in router.state_dict()
    meta = TopKRouter(4, 3, 2, sigmoid_top_k).to("meta").bfloat16()
    assert meta.correction.is_meta
    assert meta(torch.empty(5, 4, device="meta")).weights.shape == (5, 2)
    real = meta.to_empty(device="cpu")
    real.reset_parameters()
    assert real.correction.tolist() == [0.0] * 3


def test_hashed_router_reads_token_ids():
    table = hash_table(9, 4, 2)
    router = TopKRouter(3, 4, 2, hashed, table=table, learned=False)
    ids = torch.tensor([8, 0, 8])
    routing = router(torch.randn(3, 3), ids)
    assert torch.equal(routing.expert_ids, table[ids])
    assert (routing.weights == 0.5).all()
    with pytest.raises(ValueError, match="needs token_ids, got None"):
        router(torch.randn(3, 3))


def test_a_gate_of_ones_own_gets_its_options():
    def reversed_gate(logits, k, *, scale=1.0):
        return top_k_softmax(-scale * logits, k)

    router = TopKRouter(3, 4, 1, reversed_gate, scale=2.0)
    x = torch.randn(5, 3)
    expected = (x @ router.weight.T).argmin(1)
    assert torch.equal(router(x).expert_ids[:, 0], expected)


def test_routers_name_bad_arguments(unchecked_shapes):
    with pytest.raises(ValueError, match=r"x must be \[T, 4\], got \[2, 3\]"):
        TopKRouter(4, 3, 2)(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"x must be \[T, 4\], got \[1, 2, 4\]"):
        router_logits(torch.zeros(1, 2, 4), torch.zeros(3, 4))
    for jitter in (-0.1, 1.0):
        with pytest.raises(ValueError, match=rf"jitter .* got {jitter}"):
            TopKRouter(4, 3, 2, jitter=jitter)
    with pytest.raises(ValueError, match="table is what the gate `hashed` needs"):
        TopKRouter(4, 3, 2, hashed)
    with pytest.raises(ValueError, match="table is what the gate `hashed` needs"):
        TopKRouter(4, 3, 2, table=hash_table(9, 3, 2))
    for table in (hash_table(9, 3, 1), hash_table(9, 4, 2), torch.zeros(3).long()):
        with pytest.raises(ValueError, match=r"table must be \[V, 2\] .* 0\.\.2"):
            TopKRouter(4, 3, 2, hashed, table=table)
    ids = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"table must be \[V, K\] with K = k = 2"):
        hashed(torch.zeros(2, 3), 2, token_ids=ids, table=hash_table(9, 3, 1))


# --- Production routers ------------------------------------------------------


PRODUCTION = {
    "Mixtral": ("mixtral", "MixtralTopKRouter", renormalised, {}, {}),
    "Qwen3-MoE": (
        "qwen3_moe",
        "Qwen3MoeTopKRouter",
        renormalised,
        {"norm_topk_prob": True},
        {},
    ),
    "Qwen3-MoE, raw": (
        "qwen3_moe",
        "Qwen3MoeTopKRouter",
        softmax_top_k,
        {"norm_topk_prob": False},
        {},
    ),
    "OLMoE": ("olmoe", "OlmoeTopKRouter", softmax_top_k, {"norm_topk_prob": False}, {}),
    "OLMoE, normed": (
        "olmoe",
        "OlmoeTopKRouter",
        renormalised,
        {"norm_topk_prob": True},
        {},
    ),
    "Qwen2-MoE": (
        "qwen2_moe",
        "Qwen2MoeTopKRouter",
        softmax_top_k,
        {"norm_topk_prob": False},
        {},
    ),
    "gpt-oss": ("gpt_oss", "GptOssTopKRouter", top_k_softmax, {}, {"bias": True}),
    "DeepSeek-V2-Lite": (
        "deepseek_v2",
        "DeepseekV2TopkRouter",
        softmax_top_k,
        {"topk_method": "greedy", "routed_scaling_factor": 1.0},
        {},
    ),
    "DeepSeek-V2": (
        "deepseek_v2",
        "DeepseekV2TopkRouter",
        softmax_top_k,
        {
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 16.0,
            "n_group": 4,
            "topk_group": 2,
        },
        {"scale": 16.0, "groups": Groups(4, kept=2, best=1)},
    ),
    "DeepSeek-V3": (
        "deepseek_v3",
        "DeepseekV3TopkRouter",
        sigmoid_top_k,
        {
            "routed_scaling_factor": 2.5,
            "n_group": 4,
            "topk_group": 2,
            "norm_topk_prob": True,
        },
        {"scale": 2.5, "groups": Groups(4, kept=2, best=2)},
    ),
    "DeepSeek-V3, raw": (
        "deepseek_v3",
        "DeepseekV3TopkRouter",
        sigmoid_top_k,
        {
            "routed_scaling_factor": 1.0,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": False,
        },
        {"normalise": False},
    ),
}


@pytest.mark.parametrize("k", [1, 2, 6])
@pytest.mark.parametrize("name", PRODUCTION)
def test_router_agrees_with_production(name, k):
    transformers = pytest.importorskip("transformers")
    family, class_name, gate, config, options = PRODUCTION[name]
    width, experts, tokens = 24, 16, 400
    sizes = {
        "hidden_size": width,
        "num_attention_heads": 2,
        "num_experts_per_tok": k,
        "num_experts": experts,
        "num_local_experts": experts,
        "n_routed_experts": experts,
    }
    modeling = getattr(getattr(transformers.models, family), f"modeling_{family}")
    config_class = next(
        value
        for key, value in vars(modeling).items()
        if key.endswith("Config") and value.__module__.endswith(family)
    )
    theirs = getattr(modeling, class_name)(config_class(**sizes, **config))
    assert theirs.weight.shape == (experts, width)
    assert theirs.top_k == k
    ours = TopKRouter(width, experts, k, gate, **options)
    torch.manual_seed(k)
    nn.init.normal_(ours.weight, std=0.3)
    if ours.bias is not None:
        nn.init.normal_(ours.bias)
    if ours.correction is not None:
        nn.init.normal_(ours.correction, std=0.2)
    theirs.load_state_dict(
        {
            key.replace("correction", "e_score_correction_bias"): value
            for key, value in ours.state_dict().items()
        }
    )
    x = torch.randn(tokens, width)
    routing = ours(x)
    logits, weights, ids = theirs(x)
    torch.testing.assert_close(routing.logits, logits, rtol=1e-6, atol=1e-6)

    # Away from ties: no two scores of a token nearly equal.
    scores = routing.logits.sigmoid() if gate is sigmoid_top_k else routing.probs
    if ours.correction is not None:
        scores = scores + ours.correction
    clear = scores.sort(dim=1).values.diff(dim=1).min(dim=1).values > 1e-7
    assert clear.sum() > 0.95 * tokens
    order, other = routing.expert_ids.argsort(dim=1), ids.argsort(dim=1)
    mine, peer = routing.expert_ids.gather(1, order), ids.gather(1, other)
    assert torch.equal(mine[clear], peer[clear])
    torch.testing.assert_close(
        routing.weights.gather(1, order)[clear],
        weights.gather(1, other)[clear],
        rtol=1e-6,
        atol=1e-6,
    )
