"""What expert parallelism sends, and how long that takes at least."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """A connection between ranks: time = latency + bytes / bandwidth (the alpha-beta model). Seconds and bytes/s."""

    name: str
    latency: float
    bandwidth: float  # of one rank, in one direction

    def time(self, size: float) -> float:
        return self.latency + size / self.bandwidth


def all_to_all_bytes(
    tokens: float, width: int, k: int, ranks: int, bytes_per_number: float = 2.0
) -> float:
    """Bytes that one rank sends to others to dispatch its tokens to their experts, in one layer.

        T · K · D · b · (R - 1) / R

    tokens: of this rank. Experts lie evenly on `ranks` ranks and are chosen evenly; each of a token's K choices is sent
    on its own, also where two go to one rank (`deduplicated_bytes` sends one). Combine returns as much, and the
    backward pass does both once more: four times this a layer and training step. Raises ValueError unless all are
    positive.
    """
    if tokens < 0 or min(width, k, ranks) < 1 or bytes_per_number <= 0:
        raise ValueError(
            f"tokens must not be negative and width, k, ranks and bytes be positive, got {tokens}, {width}, {k}, "
            f"{ranks} and {bytes_per_number}"
        )
    return tokens * k * width * bytes_per_number * (ranks - 1) / ranks


def expected_distinct_ranks(num_experts: int, k: int, ranks: int) -> float:
    """Expected number of ranks that hold at least one of a token's K experts, chosen evenly without repetition.

    R · (1 - C(E - E/R, K) / C(E, K))
    """
    if min(num_experts, k, ranks) < 1 or num_experts % ranks or k > num_experts:
        raise ValueError(
            f"ranks must divide num_experts and k lie in 1..num_experts, got {num_experts}, {k} and {ranks}"
        )
    elsewhere = num_experts - num_experts // ranks
    missed = math.comb(elsewhere, k) / math.comb(num_experts, k)
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
        the
    count is then an upper bound.
    """
    distinct = expected_distinct_ranks(num_experts, k, ranks)
    if limit is not None:
        distinct = min(distinct, limit)
    return tokens * width * bytes_per_number * distinct * (ranks - 1) / ranks


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
        rest,
    so the slower of the two counts. One message to each peer is charged its latency in turn.
    """
    if ranks == 1:
        return 0.0
    if between is None:
        return link.latency * (ranks - 1) + sent / link.bandwidth
    if node is None or ranks % node:
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
