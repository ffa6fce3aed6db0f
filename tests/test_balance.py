"""Balancing losses, the bias and the metrics, against sums written out, production code and gradcheck."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from moe_course import balance
from moe_course.layers import Experts, MoE, Routing, TopKRouter, slots_from_routing
from moe_course.layers.routing import (
    noisy_top_k,
    renormalised,
    sigmoid_top_k,
    softmax_top_k,
)

SIZES = st.tuples(st.integers(0, 12), st.integers(1, 8)).flatmap(
    lambda te: st.tuples(st.just(te[0]), st.just(te[1]), st.integers(1, te[1]))
)


def drawn(tokens, experts, k, seed=0, gate=renormalised, grad=False):
    torch.manual_seed(seed)
    logits = torch.randn(tokens, experts, dtype=torch.float64)
    return gate(logits.requires_grad_(grad), k)


def as_if(routing, **changed):
    return Routing(**{**vars(routing), **changed})


def collapsed(tokens, experts, expert):
    logits = torch.full((tokens, experts), -200.0, dtype=torch.float64)
    logits[:, expert] = 200.0
    return softmax_top_k(logits, 1)


# --- Counts --------------------------------------------------------------------------


@given(SIZES, st.integers(0, 99))
def test_assignments_count_every_choice_of_every_token(size, seed):
    routing = drawn(*size, seed)
    mask = torch.rand(size[0]) < 0.5
    for given_mask, rows in (
        (None, routing.expert_ids.tolist()),
        (mask, routing.expert_ids[mask].tolist()),
    ):
        expected = [sum(e in row for row in rows) for e in range(size[1])]
        assert balance.assignments(routing, given_mask).tolist() == expected


def test_a_choice_of_no_expert_counts_for_none():
    ids = torch.tensor([[0, 3], [3, 3]])  # three experts
    routing = as_if(drawn(2, 3, 2), expert_ids=ids)
    assert balance.assignments(routing).tolist() == [1, 0, 0]
    assert balance.load_balancing_loss(routing, 3).item() == pytest.approx(
        3 * 0.25 * routing.probs[:, 0].mean().item()
    )


# --- Losses --------------------------------------------------------------------------


@given(SIZES, st.integers(0, 99))
def test_the_two_conventions_differ_by_k(size, seed):
    routing = drawn(*size, seed)
    divided = balance.load_balancing_loss(routing, size[1])
    whole = balance.load_balancing_loss(routing, size[1], divide_by_k=False)
    assert whole.item() == pytest.approx(size[2] * divided.item())


@given(SIZES.filter(lambda size: size[0] > 0), st.integers(0, 99))
def test_without_the_division_it_is_that_of_transformers(size, seed):
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    tokens, experts, k = size
    routing = drawn(tokens, experts, k, seed)
    theirs = load_balancing_loss_func((routing.logits,), experts, k)
    ours = balance.load_balancing_loss(routing, experts, divide_by_k=False)
    assert ours.item() == pytest.approx(float(theirs))
    # With padding, as their attention mask leaves it out.
    mask = torch.rand(tokens) < 0.6
    if mask.any():
        theirs = load_balancing_loss_func(
            (routing.logits,), experts, k, mask[None].long()
        )
        ours = balance.load_balancing_loss(
            routing, experts, mask=mask, divide_by_k=False
        )
        assert ours.item() == pytest.approx(float(theirs))


def test_pooled_over_layers_as_in_transformers_collapse_looks_perfect():
    """Four layers, each collapsed on a pair of experts of its own."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = torch.full((4, 16, 8), -200.0, dtype=torch.float64)
    for layer in range(4):
        logits[layer, :, 2 * layer : 2 * layer + 2] = 200.0
    pooled = load_balancing_loss_func(tuple(logits), 8, 2)
    layers = [renormalised(one, 2) for one in logits]
    each = [balance.load_balancing_loss(r, 8, divide_by_k=False) for r in layers]
    assert float(pooled) == pytest.approx(2.0)  # that of a perfect balance, k
    assert [loss.item() for loss in each] == pytest.approx([8.0] * 4)


def test_padding_counts_for_nothing():
    routing = drawn(10, 4, 2)
    mask = torch.tensor([True] * 6 + [False] * 4)
    part = as_if(
        routing,
        **{
            name: value[:6]
            for name, value in vars(routing).items()
            if value is not None
        },
    )
    for loss in (
        lambda r, m: balance.load_balancing_loss(r, 4, mask=m),
        lambda r, m: balance.z_loss(r.logits, m),
    ):
        assert torch.equal(loss(routing, mask), loss(part, None))
    nothing = torch.zeros(10, dtype=torch.bool)
    assert balance.load_balancing_loss(routing, 4, mask=nothing) == 0
    assert balance.z_loss(routing.logits, nothing) == 0


@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 99))
def test_below_uniform_where_load_and_probability_disagree(tokens, experts, seed):
    """E · sum f P = 1 + E · sum (f - 1/E)(P - 1/E)."""
    routing = drawn(tokens, experts, 1, seed)
    f = balance.assignments(routing) / tokens
    p = routing.probs.mean(dim=0)
    expected = 1 + experts * ((f - 1 / experts) * (p - 1 / experts)).sum()
    loss = balance.load_balancing_loss(routing, experts)
    torch.testing.assert_close(loss, expected)


def test_no_gradient_where_the_load_is_even():
    logits = torch.eye(4, dtype=torch.float64).repeat(3, 1).requires_grad_()
    balance.load_balancing_loss(softmax_top_k(logits, 1), 4).backward()
    assert logits.grad.abs().max() < 1e-16


@given(st.integers(1, 4), st.integers(0, 5), st.integers(1, 6), st.data())
def test_the_loss_of_sequences_is_the_mean_of_theirs(sequences, length, experts, draw):
    k = draw.draw(st.integers(1, experts))
    routing = drawn(sequences * length, experts, k, seed=length)
    each = [
        balance.load_balancing_loss(
            as_if(
                routing,
                **{
                    name: value[i * length : (i + 1) * length]
                    for name, value in vars(routing).items()
                    if value is not None
                },
            ),
            experts,
        )
        for i in range(sequences)
    ]
    loss = balance.sequence_balancing_loss(routing, experts, sequences)
    torch.testing.assert_close(loss, torch.stack(each).mean())


def test_even_in_the_batch_is_not_even_in_each_sequence():
    ids = torch.tensor([[0]] * 4 + [[1]] * 4)
    logits = torch.zeros(8, 2, dtype=torch.float64)
    logits[:4, 0] = logits[4:, 1] = 200.0
    routing = as_if(softmax_top_k(logits, 1), expert_ids=ids)
    assert balance.load_balancing_loss(routing, 2).item() == pytest.approx(1.0)
    assert balance.sequence_balancing_loss(routing, 2, 2).item() == pytest.approx(2.0)


@pytest.mark.parametrize("sequences", [0, 3, -1])
def test_sequences_that_do_not_divide_are_refused(sequences):
    with pytest.raises(ValueError, match="sequences of equal length"):
        balance.sequence_balancing_loss(drawn(8, 4, 2), 4, sequences)
    with pytest.raises(ValueError, match="has 4 experts, num_experts is 5"):
        balance.sequence_balancing_loss(drawn(8, 4, 2), 5, 2)


@given(st.integers(0, 9), st.sampled_from([(6, 1), (6, 2), (6, 3), (6, 6), (4, 2)]))
def test_the_loss_of_devices_is_its_sum(tokens, shape):
    experts, devices = shape
    routing = drawn(tokens, experts, 2, seed=tokens)
    per, expected = experts // devices, 0.0
    for d in range(devices):
        mine = range(d * per, (d + 1) * per)
        counts = [sum(e in row for row in routing.expert_ids.tolist()) for e in mine]
        f = sum(experts * c / max(1, 2 * tokens) for c in counts) / per
        expected += f * sum(
            routing.probs[:, e].sum().item() / max(1, tokens) for e in mine
        )
    loss = balance.device_balancing_loss(routing, devices)
    assert loss.item() == pytest.approx(expected)
    if devices == experts:
        assert loss.item() == pytest.approx(
            balance.load_balancing_loss(routing, experts).item()
        )


def test_devices_even_experts_not():
    # All on experts 0 and 2 of four, one on each of two devices.
    logits = torch.full((8, 4), -200.0, dtype=torch.float64)
    logits[:4, 0] = logits[4:, 2] = 200.0
    routing = softmax_top_k(logits, 1)
    assert balance.device_balancing_loss(routing, 2).item() == pytest.approx(1.0)
    assert balance.load_balancing_loss(routing, 4).item() == pytest.approx(2.0)
    with pytest.raises(ValueError, match="3 devices do not divide 4"):
        balance.device_balancing_loss(routing, 3)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=9))
def test_squared_cv(values):
    got = balance.squared_cv(torch.tensor(values, dtype=torch.float64)).item()
    mean = math.fsum(values) / len(values)
    if mean < 1e-100:
        assert got == 0 or mean > 0
    else:
        spread = math.fsum((v - mean) ** 2 for v in values) / len(values)
        assert got == pytest.approx(spread / mean**2, rel=1e-6, abs=1e-12)


def test_cv_at_its_ends():
    assert balance.squared_cv(torch.tensor([0.0, 0, 0, 5])).item() == pytest.approx(3)
    zeros = torch.zeros(4, requires_grad=True)
    balance.squared_cv(zeros).backward()
    assert zeros.grad.isfinite().all()


@given(SIZES, st.integers(0, 99))
def test_importance_is_the_sum_of_weights(size, seed):
    routing = drawn(*size, seed, gate=softmax_top_k)
    sums = [0.0] * size[1]
    for ids, weights in zip(
        routing.expert_ids.tolist(), routing.weights.tolist(), strict=True
    ):
        for e, w in zip(ids, weights, strict=True):
            sums[e] += w
    expected = balance.squared_cv(torch.tensor(sums, dtype=torch.float64))
    torch.testing.assert_close(balance.importance_loss(routing), expected)


def test_equal_importance_hides_unequal_load():
    """One token of weight 0.9 for expert 0, three of weight 0.3 for expert 1."""
    ids, weights = (
        torch.tensor([[0], [1], [1], [1]]),
        torch.tensor([[0.9], [0.3], [0.3], [0.3]], dtype=torch.float64),
    )
    routing = as_if(drawn(4, 2, 1), expert_ids=ids, weights=weights)
    assert balance.importance_loss(routing).item() == pytest.approx(0, abs=1e-12)
    assert balance.load_cv(balance.assignments(routing)) == pytest.approx(0.5)


@given(
    st.integers(1, 6),
    st.sampled_from([(2, 1), (4, 1), (4, 3), (5, 2)]),
    st.integers(0, 99),
)
def test_the_smooth_load_is_a_probability_by_hand(tokens, shape, seed):
    experts, k = shape
    torch.manual_seed(seed)
    logits = torch.randn(tokens, experts, dtype=torch.float64)
    routing = noisy_top_k(logits, k, noise_logits=torch.randn_like(logits))
    load = [0.0] * experts
    for t in range(tokens):
        noisy = routing.noisy_logits[t].tolist()
        for e in range(experts):
            others = sorted((v for i, v in enumerate(noisy) if i != e), reverse=True)
            z = (logits[t, e].item() - others[k - 1]) / routing.noise_std[t, e].item()
            load[e] += 0.5 * (1 + math.erf(z / math.sqrt(2)))
    expected = balance.squared_cv(torch.tensor(load, dtype=torch.float64))
    torch.testing.assert_close(balance.load_loss(routing), expected)


def test_the_smooth_load_is_the_mean_of_counts_over_draws_of_one_noise():
    """Drawn again for one expert alone, it is chosen as often as the estimate says."""
    torch.manual_seed(0)
    logits = torch.randn(1, 5, dtype=torch.float64)
    spread = torch.randn(1, 5, dtype=torch.float64)
    routing = noisy_top_k(logits, 2, noise_logits=spread)
    e, draws = 3, 200_000
    many = routing.noisy_logits.repeat(draws, 1)
    many[:, e] = (
        logits[0, e]
        + torch.randn(draws, dtype=torch.float64) * (routing.noise_std[0, e])
    )
    chosen = (many.topk(2, dim=1).indices == e).any(dim=1).double().mean().item()
    others = sorted(
        (v for i, v in enumerate(routing.noisy_logits[0].tolist()) if i != e),
        reverse=True,
    )
    z = (logits[0, e].item() - others[1]) / routing.noise_std[0, e].item()
    assert chosen == pytest.approx(0.5 * (1 + math.erf(z / 2**0.5)), abs=0.005)


def test_the_load_loss_needs_noise_and_is_0_where_all_are_chosen():
    with pytest.raises(ValueError, match="needs the noise"):
        balance.load_loss(drawn(4, 3, 2))
    logits = torch.randn(4, 3, requires_grad=True)
    routing = noisy_top_k(logits, 3, noise_logits=torch.zeros(4, 3))
    loss = balance.load_loss(routing)
    loss.backward()
    assert loss == 0
    assert (logits.grad == 0).all()


@given(st.integers(0, 9), st.integers(1, 8))
def test_the_z_loss_is_that_of_transformers(tokens, experts):
    from transformers.models.switch_transformers.modeling_switch_transformers import (
        router_z_loss_func,
    )

    logits = torch.randn(tokens, experts, dtype=torch.float64) * 3
    ours = balance.z_loss(logits)
    if tokens:
        torch.testing.assert_close(ours, router_z_loss_func(logits[None]))
    else:
        assert ours == 0


def test_the_z_loss_does_not_overflow():
    assert balance.z_loss(torch.tensor([[1000.0, 0.0]])).item() == pytest.approx(1e6)
    half = torch.tensor([[300.0, 300.0]], dtype=torch.float16)
    assert balance.z_loss(half).item() == pytest.approx((300 + math.log(2)) ** 2)


@pytest.mark.parametrize("name", ["switch", "sequence", "device", "importance", "z"])
def test_gradients(name):
    def loss(logits):
        routing = renormalised(logits, 2)
        return {
            "switch": lambda: balance.load_balancing_loss(routing, 4),
            "sequence": lambda: balance.sequence_balancing_loss(routing, 4, 2),
            "device": lambda: balance.device_balancing_loss(routing, 2),
            "importance": lambda: balance.importance_loss(routing),
            "z": lambda: balance.z_loss(logits),
        }[name]()

    torch.manual_seed(5)
    logits = torch.randn(6, 4, dtype=torch.float64) + torch.tensor([2.0, 0, 0, -1])
    logits.requires_grad_()
    assert torch.autograd.gradcheck(loss, logits)
    (slope,) = torch.autograd.grad(loss(logits), logits)
    assert slope.abs().max() > 1e-4


def test_the_gradient_of_the_load_loss():
    torch.manual_seed(4)
    noise = torch.randn(6, 4, dtype=torch.float64)

    def loss(logits, spread):
        std = torch.nn.functional.softplus(spread)
        noisy = logits + noise * std
        ids = noisy.topk(2, dim=1).indices
        probs = logits.softmax(1)
        routing = Routing(ids, probs.gather(1, ids), probs, logits, noisy, std)
        return balance.load_loss(routing)

    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    spread = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (logits, spread))


# --- More than one rank --------------------------------------------------------------


def _rank(rank, world, file, queue):
    dist.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=world
    )
    routing = collapsed(4, 2, rank)
    counts = balance.global_counts(routing)
    loss = balance.load_balancing_loss(routing, 2, counts=counts)
    layer = MoE(TopKRouter(4, 2, 1, sigmoid_top_k), Experts(2, 4, 4))
    balance.update_corrections(layer, [routing], 0.1)
    queue.put((counts.tolist(), loss.item(), layer.router.correction.tolist()))
    dist.destroy_process_group()


def test_counts_of_all_ranks_are_summed(tmp_path):
    """Two ranks, each collapsed on an expert of its own: one by one 2.0, together even."""
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    ranks = [
        context.Process(target=_rank, args=(rank, 2, tmp_path / "meet", queue))
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    found = [queue.get(timeout=120) for _ in ranks]
    for process in ranks:
        process.join()
    assert found == [([4, 4], 1.0, [0.0, 0.0])] * 2


def test_micro_batches_add_up():
    first, second = collapsed(4, 2, 0), collapsed(4, 2, 1)
    counts = balance.global_counts(second, before=balance.global_counts(first))
    assert counts.tolist() == [4, 4]
    alone = balance.load_balancing_loss(second, 2)
    together = balance.load_balancing_loss(second, 2, counts=counts)
    assert (alone.item(), together.item()) == pytest.approx((2.0, 1.0))


# --- The bias ------------------------------------------------------------------------


@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=8),
    st.floats(1e-4, 1),
    st.booleans(),
    st.integers(0, 9),
)
def test_the_bias_is_updated_by_the_rule(counts, step, centred, seed):
    torch.manual_seed(seed)
    before = torch.randn(len(counts), dtype=torch.float64)
    mean = sum(counts) / len(counts)
    sign = [(mean > c) - (mean < c) for c in counts]
    share = [(mean - c) / mean if mean else 0.0 for c in counts]
    for rule, change in (("sign", sign), ("proportional", share)):
        if centred:
            change = [c - sum(change) / len(change) for c in change]
        after = balance.updated_correction(
            before, torch.tensor(counts), step, rule, centred=centred
        )
        expected = [b + step * c for b, c in zip(before.tolist(), change, strict=True)]
        assert after.tolist() == pytest.approx(expected)


def test_the_bias_evens_a_load_that_no_gradient_touches():
    """Logits fixed and skewed: the rule alone, applied often enough, evens the load."""
    torch.manual_seed(0)
    logits = torch.randn(512, 8) + torch.linspace(2, -2, 8)
    layer = MoE(TopKRouter(8, 8, 2, sigmoid_top_k), Experts(8, 8, 8))
    router = layer.router
    before = sigmoid_top_k(logits, 2, correction=router.correction)
    for _ in range(400):
        routing = sigmoid_top_k(logits, 2, correction=router.correction)
        balance.update_corrections(layer, [routing], 0.005)
    assert balance.max_violation(balance.assignments(before)) > 1
    assert balance.max_violation(balance.assignments(routing)) < 0.1
    # The weights are of the scores alone.
    scores = logits.sigmoid().gather(1, routing.expert_ids)
    torch.testing.assert_close(routing.weights, scores / scores.sum(1, keepdim=True))


def test_routers_without_a_bias_are_left_alone_and_layers_must_match():
    layer = MoE(TopKRouter(4, 4, 1), Experts(4, 4, 4))
    balance.update_corrections(layer, [drawn(4, 4, 1)], 0.1)
    assert layer.router.correction is None
    with pytest.raises(ValueError, match="1 sparse layers, 0 routings"):
        balance.update_corrections(layer, [], 0.1)


@pytest.mark.parametrize(
    ("options", "says"),
    [({"rule": "adam"}, "rule must be"), ({"step": 0.0}, "step must be positive")],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_a_rule_that_is_none_is_refused(options, says):
    with pytest.raises(ValueError, match=says):
        balance.updated_correction(
            torch.zeros(2), torch.tensor([1, 2]), **{"step": 0.1, **options}
        )


# --- Capacity ------------------------------------------------------------------------


@given(
    st.integers(0, 10),
    st.integers(1, 5),
    st.integers(0, 6),
    st.sampled_from(["position", "probs", "prioritised"]),
    st.data(),
)
def test_who_is_dropped(tokens, experts, capacity, drop, draw):
    k = draw.draw(st.integers(1, experts))
    routing = drawn(tokens, experts, k, seed=tokens, gate=softmax_top_k)
    mask = torch.rand(tokens) < 0.8
    wishes = [
        (t, j, e, routing.weights[t, j].item())
        for t in range(tokens)
        for j, e in enumerate(routing.expert_ids[t].tolist())
        if mask[t]
    ]
    order = {
        "position": lambda wish: (wish[0], wish[1]),
        "probs": lambda wish: (-wish[3], wish[0], wish[1]),
        "prioritised": lambda wish: (
            wish[1],
            -routing.weights[wish[0]].max().item(),
            wish[0],
        ),
    }[drop]
    taken, expected = [0] * experts, set()
    for t, _, e, _ in sorted(wishes, key=order):
        if taken[e] < capacity:
            taken[e] += 1
            expected.add((t, e))
    slots = slots_from_routing(routing, experts, mask, capacity, drop)
    got = list(zip(slots.token.tolist(), slots.expert.tolist(), strict=True))
    assert len(got) == len(set(got))
    assert set(got) == expected
    lost = len(wishes) - len(expected)
    assert balance.drop_rate(routing, slots, mask) == pytest.approx(
        lost / len(wishes) if wishes else 0.0
    )


def test_who_wanted_no_expert_is_not_dropped():
    ids = torch.tensor([[0, 2], [0, 2], [1, 2]])  # two experts; id 2: none
    routing = as_if(drawn(3, 2, 2), expert_ids=ids)
    slots = slots_from_routing(routing, 2, capacity=1)
    assert balance.drop_rate(routing, slots) == pytest.approx(1 / 3)


@pytest.mark.parametrize("drop", ["position", "probs", "prioritised"])
def test_a_layer_drops_as_it_is_told_and_dropped_tokens_get_exactly_0(drop):
    torch.manual_seed(1)
    layer = MoE(
        TopKRouter(8, 4, 1, softmax_top_k),
        Experts(4, 8, 8),
        capacity_factor=0.5,
        drop=drop,
    ).double()
    x = torch.randn(40, 8, dtype=torch.float64)
    y, routing, slots = layer(x)
    kept = slots_from_routing(routing, 4, capacity=5, drop=drop)
    assert torch.equal(slots.token, kept.token)
    dropped = torch.ones(40, dtype=torch.bool)
    dropped[slots.token] = False
    assert dropped.any()
    assert (y[dropped] == 0).all()
    assert (y[~dropped] != 0).any(dim=1).all()


def test_with_capacity_a_token_depends_on_its_neighbours():
    torch.manual_seed(2)
    tight = MoE(TopKRouter(8, 2, 1), Experts(2, 8, 8), capacity_factor=0.5).double()
    free = MoE(tight.router, tight.experts)
    x = torch.randn(6, 8, dtype=torch.float64)
    alone, together = free(x[-1:])[0], free(x)[0][-1:]
    torch.testing.assert_close(alone, together)
    crowd = x[-1:].repeat(6, 1)
    assert (tight(crowd)[0][-1] == 0).all()  # behind five like it
    assert (tight(crowd)[0][0] != 0).any()


# --- Metrics -------------------------------------------------------------------------


@pytest.mark.parametrize("experts", [1, 2, 8])
def test_metrics_at_their_ends(experts):
    even = torch.full((experts,), 7)
    one = torch.zeros(experts, dtype=torch.int64)
    one[-1] = 7
    assert balance.load_entropy(even) == pytest.approx(1)
    assert balance.max_violation(even) == pytest.approx(0)
    assert balance.load_cv(even) == pytest.approx(0)
    assert balance.dead_experts(even) == 0
    assert balance.load_entropy(one) == pytest.approx(1.0 if experts == 1 else 0.0)
    assert balance.max_violation(one) == pytest.approx(experts - 1)
    assert balance.load_cv(one) == pytest.approx(math.sqrt(experts - 1))
    assert balance.dead_experts(one) == experts - 1


@given(st.lists(st.integers(0, 99), min_size=2, max_size=9).filter(any))
def test_metrics_do_not_depend_on_the_order_or_the_size_of_the_batch(counts):
    metrics = (
        balance.load_entropy,
        balance.max_violation,
        balance.load_cv,
        balance.dead_experts,
    )
    for metric in metrics:
        value = metric(torch.tensor(counts))
        assert metric(torch.tensor(counts[::-1])) == pytest.approx(value)
        assert metric(torch.tensor(counts) * 10) == pytest.approx(value)
    shares = [c / sum(counts) for c in counts]
    entropy = -sum(s * math.log(s) for s in shares if s) / math.log(len(counts))
    assert balance.load_entropy(torch.tensor(counts)) == pytest.approx(entropy)


@given(SIZES, st.integers(1, 4), st.integers(0, 99))
def test_classes_are_counted(size, classes, seed):
    routing = drawn(*size, seed)
    of = torch.randint(classes, (size[0],))
    table = balance.class_counts(routing, of, classes)
    expected = [[0] * size[1] for _ in range(classes)]
    for c, row in zip(of.tolist(), routing.expert_ids.tolist(), strict=True):
        for e in row:
            expected[c][e] += 1
    assert table.tolist() == expected


def test_classes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="one class for each of 4 tokens, got 3"):
        balance.class_counts(drawn(4, 2, 1), torch.zeros(3, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match=r"in 0\.\.1, got 0\.\.2"):
        balance.class_counts(drawn(4, 2, 1), torch.tensor([0, 1, 2, 0]), 2)


def test_mutual_information():
    known = torch.eye(4, dtype=torch.int64) * 5
    assert balance.mutual_information(known) == pytest.approx(2)
    independent = torch.tensor([[1, 2], [2, 4], [10, 20]])
    assert balance.mutual_information(independent) == pytest.approx(0, abs=1e-12)
    assert balance.mutual_information(torch.zeros(2, 2, dtype=torch.int64)) == 0
    # By hand: p = ((.5, 0), (.25, .25)).
    table = torch.tensor([[2, 0], [1, 1]])
    expected = 0.5 * math.log2(0.5 / 0.375) + 0.25 * math.log2(0.25 / 0.375)
    expected += 0.25 * math.log2(0.25 / 0.125)
    assert balance.mutual_information(table) == pytest.approx(expected)


def test_mutual_information_of_chance_is_what_miller_says():
    torch.manual_seed(0)
    n, classes, experts = 2000, 4, 8
    found = []
    for _ in range(50):
        pairs = torch.randint(classes, (n,)) * experts + torch.randint(experts, (n,))
        table = torch.bincount(pairs, minlength=classes * experts)
        found.append(balance.mutual_information(table.view(classes, experts)))
    expected = (classes - 1) * (experts - 1) / (2 * n * math.log(2))
    assert sum(found) / 50 == pytest.approx(expected, rel=0.1)


@given(st.integers(1, 8), st.integers(1, 6), st.data())
def test_saturation_counts_what_stayed(tokens, experts, draw):
    k = draw.draw(st.integers(1, experts))
    torch.manual_seed(tokens)
    a, b = (torch.rand(tokens, experts).argsort(1)[:, :k] for _ in range(2))
    expected = sum(
        len(set(x) & set(y)) / k for x, y in zip(a.tolist(), b.tolist(), strict=True)
    )
    got = balance.router_saturation(a, b).item()
    assert got == pytest.approx(expected / tokens)
    shuffled = a[:, torch.randperm(k)]
    assert balance.router_saturation(a, shuffled) == 1


@pytest.mark.usefixtures("unchecked_shapes")
def test_saturation_is_of_the_same_tokens():
    ids = torch.zeros(2, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="same tokens"):
        balance.router_saturation(ids, ids[:1])


def test_co_activation_is_over_all_pairs():
    """Three choices: the first and the third are a pair like any other."""
    ids = torch.tensor([list(p) for p in permutations(range(3))])
    ids = torch.cat([ids, torch.tensor([[0, 1, 3]])])
    routing = as_if(drawn(7, 4, 3), expert_ids=ids)
    got = balance.co_activation(routing)
    assert got.diagonal().tolist() == [1, 1, 1, 1]
    assert got[0, 2].item() == pytest.approx(6 / 7)
    assert got[2, 0].item() == pytest.approx(1)
    assert got[3].tolist() == pytest.approx([1, 1, 0, 1])
    none = as_if(drawn(1, 4, 2), expert_ids=torch.tensor([[0, 1]]))
    assert balance.co_activation(none)[3].tolist() == [0, 0, 0, 0]


def test_repeats():
    ids = torch.tensor([[[0], [0], [1]], [[1], [1], [1]]])
    assert balance.repeat_rate(ids) == pytest.approx(3 / 4)


def test_experts_with_their_units_in_another_order_are_the_same():
    torch.manual_seed(0)
    experts = Experts(3, 6, 8).double()
    order = torch.randperm(8)
    with torch.no_grad():
        up = experts.w_up[0].view(-1, 8, 6)[:, order].reshape_as(experts.w_up[0])
        experts.w_up[1], experts.w_down[1] = up, experts.w_down[0][:, order]
    got = balance.output_similarity(experts, torch.randn(20, 6, dtype=torch.float64))
    assert got[0, 1].item() == pytest.approx(1)
    assert got.diagonal().tolist() == pytest.approx([1, 1, 1])
    assert abs(got[0, 2].item()) < 0.8
    assert torch.equal(got, got.T)
