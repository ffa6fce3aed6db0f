"""What expert parallelism sends, and how long that takes at least.

Derived, and compared with bytes on the wire, in book/bandwidth/expert_parallel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """A connection between ranks: time = latency + bytes / bandwidth (the alpha-beta model). Seconds and bytes/s."""

    name: str
    latency: float
    bandwidth: float  # of one rank, in one direction

    def time(self, size: float) -> float:
        return self.latency + size / self.bandwidth


def fit_link(
    name: str, sent: Sequence[float], seconds: Sequence[float], messages: int = 1
) -> Link:
    """The link whose line runs closest to measured times: least squares of the relative error.

        minimise the sum over i of (1 - (messages · alpha + sent_i / beta) / seconds_i)^2

    Relative, or the longest times alone would decide, and alpha with them. messages: how many each exchange sends, one
    after the other (R - 1 of an all-to-all). Raises ValueError on fewer than two sizes, on times that are not positive,
    and where the fit gives no positive latency and bandwidth, because no such line describes the times.
    """
    if len(sent) != len(seconds) or len(set(sent)) < 2 or min(seconds) <= 0:
        raise ValueError(
            f"a line needs two sizes at least, each with a positive time, got {list(sent)} and {list(seconds)}"
        )
    # With a = messages/t and b = sent/t, solve for u = alpha, v = 1/beta:  u·a + v·b = 1.
    a = [messages / t for t in seconds]
    b = [s / t for s, t in zip(sent, seconds, strict=True)]
    aa, bb = sum(x * x for x in a), sum(x * x for x in b)
    ab = sum(x * y for x, y in zip(a, b, strict=True))
    determinant = aa * bb - ab * ab
    alpha = (sum(a) * bb - sum(b) * ab) / determinant
    inverse = (sum(b) * aa - sum(a) * ab) / determinant
    if alpha <= 0 or inverse <= 0:
        raise ValueError(
            f"no latency and bandwidth fit these times: {list(seconds)} s for {list(sent)} bytes"
        )
    return Link(name, alpha, 1 / inverse)


def all_to_all_bytes(
    tokens: float, width: int, k: int, ranks: int, bytes_per_number: float = 2.0
) -> float:
    """Bytes that one rank sends to others to dispatch its tokens to their experts, in one layer.

        T · K · D · b · (R - 1) / R

    tokens: of this rank. Experts lie evenly on `ranks` ranks and are chosen evenly; each of a token's K choices is sent
    on its own, also where two go to one rank (`deduplicated_bytes` sends one). Combine returns as much, and the
    backward pass does both once more: four times this a layer and training step. Raises ValueError on negative tokens
    and unless the rest is positive.
    """
    if tokens < 0 or min(width, k, ranks) < 1 or bytes_per_number <= 0:
        raise ValueError(
            f"tokens must not be negative and width, k, ranks and bytes be positive, got {tokens}, {width}, {k}, "
            f"{ranks} and {bytes_per_number}"
        )
    return tokens * k * width * bytes_per_number * (ranks - 1) / ranks


def expected_distinct_ranks(
    num_experts: int, k: int, ranks: int, limit: int | None = None
) -> float:
    """Expected number of ranks that hold at least one of a token's K experts, chosen evenly without repetition.

        R · (1 - C(E - E/R, K) / C(E, K))

    limit: the experts lie on so many ranks, chosen evenly beforehand: the same with E·limit/R experts on `limit` ranks.
        A router that keeps the ranks of its highest scores, as DeepSeek-V3 does (arXiv:2412.19437, section 2.1.2),
        reaches a little more of them than this, and at most `limit`.

    Ranks may stand for nodes. Raises ValueError unless ranks divide num_experts, limit lies in 1..ranks and k in
    1..(the experts that remain).
    """
    if min(num_experts, ranks) < 1 or num_experts % ranks:
        raise ValueError(
            f"ranks must divide num_experts, got {ranks} and {num_experts}"
        )
    if limit is not None and not 1 <= limit <= ranks:
        raise ValueError(f"limit must lie in 1..{ranks} (the ranks), got {limit}")
    each = num_experts // ranks
    ranks = ranks if limit is None else limit
    if not 1 <= k <= each * ranks:
        raise ValueError(
            f"k must lie in 1..{each * ranks} (the experts to choose from), got {k}"
        )
    missed = math.comb(each * ranks - each, k) / math.comb(each * ranks, k)
    return ranks * (1 - missed)


def deduplicated_bytes(
    tokens: float,
    width: int,
    num_experts: int,
    k: int,
    ranks: int,
    bytes_per_number: float = 2.0,
    limit: int | None = None,
) -> float:
    """Bytes that one rank sends when a token goes once to each rank (or node) that holds any of its experts.

        T · D · b · (distinct ranks) · (R - 1) / R

    limit: at most so many ranks, as node-limited routing has it (M in DeepSeek-V3, arXiv:2412.19437, section 2.1.2);
        all of them are counted, an upper bound.
    """
    distinct = expected_distinct_ranks(num_experts, k, ranks)
    if limit is not None:
        distinct = min(distinct, limit)
    return tokens * width * bytes_per_number * distinct * (ranks - 1) / ranks


@dataclass(frozen=True)
class TwoLevels:
    """Bytes that one rank sends: to other nodes, and to other ranks of a node."""

    between: float
    inside: float


def two_level_bytes(
    tokens: float,
    width: int,
    num_experts: int,
    k: int,
    ranks: int,
    node: int,
    bytes_per_number: float = 2.0,
    limit: int | None = None,
) -> TwoLevels:
    """Dispatch in two hops: a token crosses once to each node that it needs, and is handed on there.

        between = T · D · b · (distinct nodes) · (N - 1) / N            N = R / node
        inside  = T · D · b · (distinct ranks) · (node - 1) / node

    It lands on the rank that has the sender's place in its node, which is one of `node` equally likely destinations;
    only to the others is it sent on (arXiv:2412.19437, section 3.2.2). limit: at most so many nodes, as in
    `deduplicated_bytes`; both counts are then upper bounds.
    """
    if node < 1 or ranks % node:
        raise ValueError(f"node must divide ranks, got {node} and {ranks}")
    nodes = ranks // node
    distinct = expected_distinct_ranks(num_experts, k, ranks)
    return TwoLevels(
        deduplicated_bytes(
            tokens, width, num_experts, k, nodes, bytes_per_number, limit
        ),
        tokens * width * bytes_per_number * distinct * (node - 1) / node,
    )


def all_to_all_time(
    sent: float,
    ranks: int,
    link: Link,
    between: Link | None = None,
    node: int | None = None,
) -> float:
    """Seconds for every rank to exchange `sent` bytes with the others, evenly.

        alpha · (R - 1) + sent / beta

    between, node: ranks stand `node` to a machine; what crosses machines goes over `between`, at the same time as the
        rest, so the slower of the two counts.

    One message to each peer is charged its latency in turn. Raises ValueError on negative bytes, fewer than one rank,
    and a node that does not divide the ranks.
    """
    if sent < 0 or ranks < 1:
        raise ValueError(
            f"bytes must not be negative and ranks be at least 1, got {sent} and {ranks}"
        )
    if ranks == 1:
        return 0.0
    if between is None:
        return link.latency * (ranks - 1) + sent / link.bandwidth
    if node is None or node < 1 or ranks % node:
        raise ValueError(
            f"node must divide ranks when ranks span machines, got {node} and {ranks}"
        )
    inside, outside = (node - 1) / (ranks - 1), (ranks - node) / (ranks - 1)
    return max(
        link.latency * (node - 1) + sent * inside / link.bandwidth,
        between.latency * (ranks - node) + sent * outside / between.bandwidth,
    )


def flops_per_byte(
    hidden: int,
    dispatch_bytes: float = 2.0,
    combine_bytes: float = 2.0,
    gated: bool = True,
) -> float:
    """Expert FLOPs for each byte that dispatch and combine send, every token remote and none sent twice.

        6·F / (b_dispatch + b_combine) with three matrices, 4·F / (...) with two

    A slot costs 6·D·F FLOPs and D·(b_d + b_c) bytes: the width cancels, and neither E nor K matters. Above the ratio
    of a chip's FLOP rate to its link's bandwidth, arithmetic takes longer than the network.
    """
    return (6 if gated else 4) * hidden / (dispatch_bytes + combine_bytes)


def overlapped(compute_s: float, network_s: float, share: float = 1.0) -> float:
    """Time of arithmetic and network when `share` of the shorter is hidden behind the longer: 0 none of it, 1 all."""
    if not 0 <= share <= 1:
        raise ValueError(f"share must lie in 0..1, got {share}")
    shorter, longer = sorted((compute_s, network_s))
    return longer + (1 - share) * shorter


def tensor_parallel_bytes(
    tokens: float, width: int, ranks: int, bytes_per_number: float = 2.0
) -> float:
    """Bytes that one rank sends in the all-reduce of one layer's FFN under tensor parallelism, by a ring.

        2 · T · D · b · (R - 1) / R        T: tokens of all ranks, each of which holds them all

    For the same tokens, expert parallelism sends 2 · (T/R) · K · D · b · (R - 1)/R in dispatch and combine together:
    K/R of it.
    """
    return 2 * tokens * width * bytes_per_number * (ranks - 1) / ranks
