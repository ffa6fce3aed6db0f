"""Rates of this machine and decode steps on it: what the cost model is held against.

Everything runs on one CPU thread in float32, and a time is CPU time of that thread: other work on the machine then
costs what is shared, bandwidth, caches and clock rate. Contenders take turns, and medians count.

Chapter: book/bandwidth/roofline.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch

from moe_course.costs import expected_distinct_experts
from moe_course.layers import Transformer
from moe_course.specs import FFN, GQA, ModelSpec, RoutedExperts

BYTES = 4  # of a float32


def decode_specs(
    layers: int = 4, width: int = 1024, hidden: int = 2816, vocab: int = 4096
) -> dict[str, ModelSpec]:
    """A sparse model (8 experts, 2 used), and dense ones of its total and active size.

    As they are, 1.2, 1.2 and 0.35 GB in float32.
    """
    attention = GQA(width // 64, max(1, width // 256), 64)
    shaped = partial(
        ModelSpec, layers=layers, width=width, vocab=vocab, attention=attention
    )
    return {
        "sparse": shaped("sparse", moe=RoutedExperts(8, 2, FFN(hidden))),
        "equal total": shaped("equal total", ffn=FFN(8 * hidden)),
        "equal active": shaped("equal active", ffn=FFN(2 * hidden)),
    }


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread, and as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def take_turns(
    functions: Mapping[str, Callable[[], object]], rounds: int
) -> dict[str, list[float]]:
    """Seconds of CPU time of each function in each round, on one thread; one round before them warms up."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    with one_thread(), torch.no_grad():
        for turn in range(rounds + 1):
            for name, function in functions.items():
                start = time.thread_time()
                function()
                if turn:
                    times[name].append(time.thread_time() - start)
    return times


def _median(function: Callable[[], object], rounds: int) -> float:
    return statistics.median(take_turns({"it": function}, rounds)["it"])


def read_bandwidth(size: int = 2**29, rounds: int = 5) -> float:
    """Bytes/s at which a matrix of `size` bytes, larger than the caches, goes through a matrix-vector product."""
    width = 2048
    matrix = torch.full((size // BYTES // width, width), 0.5)
    vector = torch.ones(width)
    return matrix.nbytes / _median(lambda: matrix @ vector, rounds)


def flop_rate(n: int = 1024, rounds: int = 5) -> float:
    """FLOP/s of a product of two n x n matrices."""
    a, b = torch.full((n, n), 0.5), torch.full((n, n), 0.5)
    return 2 * n**3 / _median(lambda: a @ b, rounds)


def seconds_per_weight(
    rows: Sequence[int],
    width: int = 1024,
    hidden: int = 2816,
    size: int = 2**29,
    rounds: int = 3,
) -> dict[int, float]:
    """Seconds for each weight of x Wᵀ, for every number of rows of x, the weights coming from memory each time.

    So many matrices of hidden x width as fill `size` bytes are multiplied in turn.
    """
    count = max(1, size // (BYTES * width * hidden))
    matrices = [torch.full((hidden, width), 0.5) for _ in range(count)]
    inputs = {n: torch.ones(n, width) for n in rows}
    weights = count * width * hidden
    times = {}
    for n, x in inputs.items():

        def products(x: torch.Tensor = x) -> None:
            for matrix in matrices:
                x @ matrix.T

        times[n] = _median(products, rounds) / weights
    return times


def decode_seconds(
    specs: Mapping[str, ModelSpec], batches: Sequence[int], rounds: int = 3
) -> dict[int, dict[str, float]]:
    """Median seconds of a decode step of random models of these shapes, by batch.

    One token for each of the batch, without context.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        models = {name: Transformer(spec).eval() for name, spec in specs.items()}
        vocab = min(spec.vocab for spec in specs.values())
        found = {}
        for batch in batches:

            def step(model: Transformer, batch: int = batch) -> None:
                model(torch.randint(vocab, (batch, 1)))

            times = take_turns(
                {name: partial(step, model) for name, model in models.items()}, rounds
            )
            found[batch] = {n: statistics.median(values) for n, values in times.items()}
    return found


def step_from_products(
    spec: ModelSpec, batch: int, each_weight: Mapping[int, float]
) -> float:
    """Seconds of a decode step, from what products with so many rows cost.

        time = (weights that every token meets) · s(B)
             + (distinct experts) · (weights of one) · s(B·K / distinct)

    s: seconds for each weight of a product with so many rows (`seconds_per_weight`);
    between the measured ones a straight line between the logarithms of both. Raises
    ValueError for rows outside of what was measured.
    """
    measured = sorted(each_weight)
    costs = [each_weight[n] for n in measured]

    def s(n: float) -> float:
        # 1 may come out as 1 + 1e-16 of B·K / distinct.
        if not measured[0] * (1 - 1e-9) <= n <= measured[-1] * (1 + 1e-9):
            raise ValueError(
                f"products were measured with {measured[0]} to {measured[-1]} rows, "
                f"this step needs {n:g}"
            )
        return float(np.exp(np.interp(np.log(n), np.log(measured), np.log(costs))))

    parts = spec.breakdown()
    experts = parts["experts"].total
    embedding = 0 if spec.tied_embeddings else parts["input_embedding"].total
    time = (spec.total_params() - experts - embedding) * s(batch)
    if spec.moe is not None:
        e, k = spec.moe.experts, spec.moe.k
        distinct = expected_distinct_experts(e, k, batch)
        time += experts * distinct / e * s(batch * k / distinct)
    return time
