"""How long a step takes at least: FLOPs over the FLOP rate, bytes over the bandwidth, whichever is longer.

A bound, not a forecast: perfect overlap of arithmetic with memory, peak rates unless you pass measured ones, no launch
overhead. It counts what the sources' `estimate_inference_latency` leaves out: only the experts that some token chose
are read, the KV cache is read, attention computes, activations are written and read, several devices exchange tokens.

Derived, and held against measurement, in book/bandwidth/roofline.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

from moe_course.costs.memory import (
    BF16,
    Precision,
    cache_bytes,
    cache_numbers_per_token,
    weight_bytes,
)
from moe_course.costs.touched import expected_distinct_experts
from moe_course.specs.hardware import Accelerator
from moe_course.specs.model import MLA, ModelSpec


@dataclass(frozen=True)
class Step:
    """One step of a model: what it reads and computes on one device, and how long that takes at least. Bytes,
    seconds.
    """

    tokens: float  # that the whole step computes
    flops: float
    weight_bytes: float
    cache_bytes: float
    activation_bytes: float
    memory_s: float
    compute_s: float
    network_s: float
    stored_bytes: float  # weights and cache on one device
    capacity: float  # bytes of one device

    @property
    def time_s(self) -> float:
        """Arithmetic and memory side by side, the network after them."""
        return max(self.memory_s, self.compute_s) + self.network_s

    @property
    def bound(self) -> str:
        """One of "memory", "compute" and "network", whichever the step waits for."""
        if self.network_s > max(self.memory_s, self.compute_s):
            return "network"
        return "memory" if self.memory_s >= self.compute_s else "compute"

    @property
    def fits(self) -> bool:
        return self.stored_bytes <= self.capacity

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.time_s


def touched_weights(
    spec: ModelSpec,
    tokens: float,
    precision: Precision = BF16,
    inclusion: Sequence[float] | None = None,
) -> float:
    """Bytes of weights that a step of so many tokens reads.

    Everything but the routed experts once, of those the expected number of distinct
    ones in each layer; of the input embedding one row a token (at most all of it),
    unless it is tied to the output head, which is read whole.
    """
    parts = spec.breakdown()
    experts = 0.0
    if spec.moe is not None:
        distinct = expected_distinct_experts(
            spec.moe.experts, spec.moe.k, tokens, inclusion
        )
        experts = parts["experts"].total * distinct / spec.moe.experts
    embedding = parts["input_embedding"].total
    rest: float = spec.total_params() - parts["experts"].total
    if not spec.tied_embeddings:
        rest += min(tokens, spec.vocab) * spec.width - embedding
    return rest * precision.weights + experts * precision.expert_bytes


def attention_flops(
    spec: ModelSpec, queries: float, context: float, absorbed: bool = True
) -> float:
    """FLOPs of scores and weighted values, for `queries` tokens that each look at `context` others, over all layers.

    4 · heads · head_dim · context a token and layer.

    absorbed: MLA as it decodes, on the latent itself, with its up-projections absorbed into queries and outputs
        (arXiv:2405.04434, section 2.1.2): 2 · heads · (2 · kv_rank + rope_dim). False: with keys and values unfolded
        once for all queries, as in prompts and in training: 2 · heads · (nope_dim + rope_dim + v_dim).
    """
    a = spec.attention
    if not isinstance(a, MLA):
        each = 4 * a.heads * a.head_dim
    elif absorbed:
        each = 2 * a.heads * (2 * a.kv_rank + a.rope_dim)
    else:
        each = 2 * a.heads * (a.nope_dim + a.rope_dim + a.v_dim)
    return spec.layers * queries * context * each


def activation_traffic(spec: ModelSpec, tokens: float) -> float:
    """Bytes of activations written and read, two a number: 8·D a block and layer, and 2 · (2 + gated) · F for each FFN.

    Kernels that fuse more move less; it is small beside the weights until batches are large.
    """
    numbers = spec.layers * 2 * 8 * spec.width
    sparse = len(spec.moe_layers)
    if spec.ffn is not None:
        hidden = (2 + spec.ffn.gated) * spec.ffn.hidden
        numbers += (spec.layers - sparse) * 2 * hidden
    if spec.moe is not None:
        hidden = (2 + spec.moe.expert.gated) * spec.moe.expert.hidden
        numbers += sparse * spec.moe.k * (2 * hidden + 2 * spec.width)
        if spec.moe.shared is not None:
            shared = spec.moe.shared
            numbers += sparse * 2 * (2 + shared.gated) * shared.hidden
    return 2 * tokens * numbers


def decode_step(
    spec: ModelSpec,
    accelerator: Accelerator,
    batch: float,
    context: float = 0,
    *,
    precision: Precision = BF16,
    bandwidth: float | None = None,
    flops: float | None = None,
    devices: int = 1,
    network_s: float = 0.0,
    inclusion: Sequence[float] | None = None,
    activations: bool = False,
) -> Step:
    """One decode step: every one of `batch` sequences, `context` tokens long, gets one more token.

        memory  = (touched weights + KV cache [+ activations]) / bandwidth
        compute = (2 · active weights · batch + attention) / FLOP rate

    batch: may be a fraction, between the integers that mean something.
    bandwidth, flops: bytes/s and FLOP/s of one device, to put measured rates in the place of the data sheet's.
    devices: weights, cache and arithmetic are split evenly over them, as if each held whole sequences (heads split over
        more devices than there are key and value heads, and MLA's latent, are copied instead); pass what they exchange
        as network_s (`costs.network`).
    inclusion: how popular the experts are (`costs.zipf_inclusion`); evenly unless given.
    activations: count their traffic too.

    Raises ValueError unless batch > 0, context >= 0, devices >= 1 and the rates are positive.
    """
    if batch <= 0 or context < 0 or devices < 1:
        raise ValueError(
            f"batch must be positive, context not negative and devices at least 1, got {batch}, {context} and {devices}"
        )
    return _step(
        spec, accelerator, batch, batch, context, precision, bandwidth, flops, devices,
        network_s, inclusion, activations,
    )  # fmt: skip


def prefill(
    spec: ModelSpec,
    accelerator: Accelerator,
    prompt: int,
    batch: int = 1,
    *,
    precision: Precision = BF16,
    bandwidth: float | None = None,
    flops: float | None = None,
    devices: int = 1,
    network_s: float = 0.0,
    inclusion: Sequence[float] | None = None,
    activations: bool = False,
) -> Step:
    """A prompt in one go: batch · prompt tokens, each looking at those before it (half the prompt on average).

    The head computes the last token of each sequence alone. Arguments as in `decode_step`.
    """
    if prompt < 1 or batch < 1 or devices < 1:
        raise ValueError(
            f"prompt, batch and devices must be at least 1, got {prompt}, {batch} and {devices}"
        )
    return _step(
        spec, accelerator, batch * prompt, batch, prompt / 2, precision, bandwidth, flops,
        devices, network_s, inclusion, activations, written=prompt,
    )  # fmt: skip


def _step(
    spec: ModelSpec,
    accelerator: Accelerator,
    tokens: float,
    sequences: float,
    context: float,
    precision: Precision,
    bandwidth: float | None,
    flops: float | None,
    devices: int,
    network_s: float,
    inclusion: Sequence[float] | None,
    activations: bool,
    written: float | None = None,
) -> Step:
    weights = touched_weights(spec, tokens, precision, inclusion) / devices
    each = cache_numbers_per_token(spec) * precision.cache
    length = context if written is None else written
    # Decode reads the whole cache; prefill writes it, and keeps what it reads on the chip.
    cache = sequences * each * length / devices
    traffic = activation_traffic(spec, tokens) / devices if activations else 0.0
    head = spec.vocab * spec.width
    body = spec.active_params(include_embedding=False) - head
    work = 2 * (body * tokens + head * sequences)
    work += attention_flops(spec, tokens, context, absorbed=written is None)
    stored = weight_bytes(spec, precision) + sequences * each * length
    bandwidth = accelerator.bandwidth if bandwidth is None else bandwidth
    flops = accelerator.bf16 if flops is None else flops
    if min(bandwidth, flops) <= 0:
        raise ValueError(
            f"bandwidth and flops must be positive, got {bandwidth} and {flops}"
        )
    return Step(
        tokens=tokens,
        flops=work / devices,
        weight_bytes=weights,
        cache_bytes=cache,
        activation_bytes=traffic,
        memory_s=(weights + cache + traffic) / bandwidth,
        compute_s=work / devices / flops,
        network_s=network_s,
        stored_bytes=stored / devices,
        capacity=accelerator.capacity,
    )


def ridge_tokens(
    accelerator: Accelerator,
    num_experts: int = 1,
    k: int = 1,
    bytes_per_weight: float = 2.0,
    bandwidth: float | None = None,
    flops: float | None = None,
) -> float:
    """Tokens in a batch from which a weight that is read is used often enough to be compute-bound.

        dense: ridge · bytes/2     one expert: that · E/K, since it sees only K/E of the tokens

    A weight of b bytes gives 2 FLOPs a token, so the ridge of F FLOP per byte is reached at F · b/2 tokens.
    """
    if not 1 <= k <= num_experts:
        raise ValueError(
            f"k must lie in 1..{num_experts} (the number of experts), got {k}"
        )
    bandwidth = accelerator.bandwidth if bandwidth is None else bandwidth
    ridge = (accelerator.bf16 if flops is None else flops) / bandwidth
    return ridge * bytes_per_weight / 2 * num_experts / k


@dataclass(frozen=True)
class Regimes:
    """Batches between which a sparse model changes its ways against a dense one that reads all its weights."""

    all_read: float  # from here on 99 % of the experts are read: the gain is gone
    dense_compute: float  # the dense model turns compute-bound: the gain returns
    sparse_compute: float  # the sparse one does too: the gain is whole


def regimes(
    sparse: ModelSpec,
    dense: ModelSpec,
    accelerator: Accelerator,
    bandwidth: float | None = None,
    flops: float | None = None,
) -> Regimes:
    """The three regimes of decoding (weights alone, no cache): the batches at which one gives way to the next."""
    if sparse.moe is None:
        raise ValueError(f"{sparse.name} has no routed experts")
    e, k = sparse.moe.experts, sparse.moe.k
    all_read = math.log(0.01) / math.log(1 - k / e) if k < e else 1.0
    turns = partial(
        compute_bound_from, accelerator=accelerator, bandwidth=bandwidth, flops=flops
    )
    return Regimes(all_read, turns(dense), turns(sparse))


def compute_bound_from(
    spec: ModelSpec,
    accelerator: Accelerator,
    context: float = 0,
    *,
    precision: Precision = BF16,
    bandwidth: float | None = None,
    flops: float | None = None,
) -> float:
    """The batch from which a decode step waits for arithmetic, to a millionth; inf above 10^9.

    With a cache to read there may be none: cache and arithmetic both grow with the batch. How many devices share the
    work makes no difference. Arguments as in `decode_step`.
    """

    def compute_bound(batch: float) -> bool:
        step = decode_step(
            spec, accelerator, batch, context,
            precision=precision, bandwidth=bandwidth, flops=flops,
        )  # fmt: skip
        return step.compute_s >= step.memory_s

    return _first(compute_bound)


def crossovers(
    a: ModelSpec,
    b: ModelSpec,
    accelerator: Accelerator,
    context: float = 0,
    most: int = 65536,
    bandwidth: float | None = None,
    flops: float | None = None,
    devices: int = 1,
    precision: Precision = BF16,
) -> list[int]:
    """Batches, up to `most`, at which the faster of two models changes in decoding: the first batch of each new leader.

    bandwidth, flops, devices, precision: as in `decode_step`. Raises ValueError unless most >= 1.
    """
    if most < 1:
        raise ValueError(f"most must be at least 1, got {most}")

    def time(spec: ModelSpec, batch: int) -> float:
        return decode_step(
            spec, accelerator, batch, context, precision=precision,
            bandwidth=bandwidth, flops=flops, devices=devices,
        ).time_s  # fmt: skip

    def leads(batch: int) -> bool:
        return time(a, batch) < time(b, batch)

    # Taken for granted: between two neighbours of this grid the leader changes at most once. (The tests compare with
    # every batch.)
    octaves = most.bit_length()
    grid = sorted({round(2 ** (i / 8)) for i in range(8 * octaves + 1)} | {1, most})
    grid = [batch for batch in grid if batch <= most]
    found = []
    for (low, before), (high, after) in pairwise((b, leads(b)) for b in grid):
        if before != after:
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if leads(middle) == before else (low, middle)
            found.append(high)
    return found


def _first(holds: Callable[[float], bool]) -> float:
    """The least number at which a property that stays true becomes true, to a millionth; inf above 10^9."""
    low, high = 0.0, 1.0
    while not holds(high):
        low, high = high, 2 * high
        if high > 1e9:
            return math.inf
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def offloaded_step(
    spec: ModelSpec,
    accelerator: Accelerator,
    batch: float,
    resident: float,
    link_bandwidth: float,
    context: float = 0,
    precision: Precision = BF16,
) -> Step:
    """A decode step with a share of the experts in the memory of the host, fetched over a link each time they are
    touched.

    resident: share of the routed experts' weights that stay on the device, 0 to 1, chosen without knowing the routing.
    link_bandwidth: bytes/s from host to device. The fetch runs beside arithmetic and memory, so the longest of the
        three counts; it stands in the step's memory_s. A model without routed experts fetches nothing.

    Raises ValueError unless 0 <= resident <= 1 and link_bandwidth > 0.
    """
    if not 0 <= resident <= 1 or link_bandwidth <= 0:
        raise ValueError(
            f"resident must lie in 0..1 and link_bandwidth be positive, got {resident} and {link_bandwidth}"
        )
    whole = decode_step(spec, accelerator, batch, context, precision=precision)
    if spec.moe is None:
        return whole
    stored = spec.breakdown()["experts"].total * precision.expert_bytes
    distinct = expected_distinct_experts(spec.moe.experts, spec.moe.k, batch)
    fetched = (1 - resident) * stored * distinct / spec.moe.experts
    return replace(
        whole,
        memory_s=max(whole.memory_s, fetched / link_bandwidth),
        stored_bytes=whole.stored_bytes - (1 - resident) * stored,
    )


@dataclass(frozen=True)
class Speculation:
    """What a draft of some tokens, checked in one step, gains."""

    tokens_per_step: float  # expected for each sequence: (1 - a^(n+1)) / (1 - a)
    step: Step  # of the model that checks: all tokens it computes; its network_s is the time of drafting
    speedup: float  # tokens/s against plain decoding, the draft's own time included


def speculative(
    spec: ModelSpec,
    accelerator: Accelerator,
    batch: float,
    drafted: int,
    acceptance: float,
    context: float = 0,
    draft_s: float = 0.0,
    precision: Precision = BF16,
) -> Speculation:
    """Speculative decoding (arXiv:2211.17192, section 3.1): `drafted` tokens a sequence are checked in one step.

    Each is accepted with chance `acceptance`, independently, up to the first that is not; one more token comes from the
    check itself. A sparse model reads more experts for drafted + 1 tokens than for one: that is its price.
    draft_s: seconds that drafting takes in each step.

    Raises ValueError unless drafted >= 0 and 0 <= acceptance <= 1.
    """
    if drafted < 0 or not 0 <= acceptance <= 1:
        raise ValueError(
            f"drafted must not be negative and acceptance lie in 0..1, got {drafted} and {acceptance}"
        )
    expected = sum(acceptance**i for i in range(drafted + 1))
    plain = decode_step(spec, accelerator, batch, context, precision=precision)
    wide = batch * (drafted + 1)
    checked = _step(
        spec, accelerator, wide, batch, context, precision, None, None, 1, draft_s, None,
        False,
    )  # fmt: skip
    # _step computes the head for one token of each sequence; a check needs all of them.
    head = 2 * spec.vocab * spec.width * (wide - batch)
    checked = replace(
        checked,
        flops=checked.flops + head,
        compute_s=checked.compute_s + head / accelerator.bf16,
    )
    speedup = expected * plain.time_s / checked.time_s
    return Speculation(expected, checked, speedup)


__all__ = [
    "Regimes",
    "Speculation",
    "Step",
    "activation_traffic",
    "attention_flops",
    "cache_bytes",
    "compute_bound_from",
    "crossovers",
    "decode_step",
    "offloaded_step",
    "prefill",
    "regimes",
    "ridge_tokens",
    "speculative",
    "touched_weights",
]
