"""Which rank holds which expert: balanced loads without moving tokens about, and copies of hot experts."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import permutations


def contiguous(num_experts: int, ranks: int) -> list[int]:
    """Expert e on rank e // (E/R): what is done without looking at loads. Returns each expert's rank."""
    _check(num_experts, ranks)
    return [e // (num_experts // ranks) for e in range(num_experts)]


def by_load(loads: Sequence[float], ranks: int) -> list[int]:
    """Heaviest expert first, each to the least loaded rank with room: E/R experts a rank. Returns each expert's rank.

    The greedy rule LPT (Graham, 1969) with equal numbers on each rank; a rank that is full is out. Ties: lowest number.
    """
    _check(len(loads), ranks)
    room = len(loads) // ranks
    heap = [(0.0, rank, 0) for rank in range(ranks)]
    placed = [0] * len(loads)
    for expert in sorted(range(len(loads)), key=lambda e: (-loads[e], e)):
        load, rank, held = heapq.heappop(heap)
        placed[expert] = rank
        if held + 1 < room:
            heapq.heappush(heap, (load + loads[expert], rank, held + 1))
    return placed


def copies(loads: Sequence[float], slots: int) -> list[int]:
    """How many copies of each expert fill `slots` places: one more, again and again, for the expert whose copies
    carry most.

    A copy takes an even share of its expert's load (as in DeepSeek's expert-parallel load balancer). Ties: lowest
    number. Raises ValueError where there are fewer places than experts.
    """
    if slots < len(loads):
        raise ValueError(
            f"{len(loads)} experts need at least as many places, got {slots}"
        )
    counts = [1] * len(loads)
    heap = [(-load, e) for e, load in enumerate(loads)]
    heapq.heapify(heap)
    for _ in range(slots - len(loads)):
        _, e = heapq.heappop(heap)
        counts[e] += 1
        heapq.heappush(heap, (-loads[e] / counts[e], e))
    return counts


def replicated(loads: Sequence[float], ranks: int, slots: int) -> list[list[int]]:
    """Experts on each rank, `slots` places in all, hot experts more than once: copies first, then `by_load`."""
    _check(slots, ranks)
    counts = copies(loads, slots)
    experts = [e for e, n in enumerate(counts) for _ in range(n)]
    shares = [loads[e] / counts[e] for e in experts]
    ranks_of = by_load(shares, ranks)
    return [
        [e for e, rank in zip(experts, ranks_of, strict=True) if rank == r]
        for r in range(ranks)
    ]


def imbalance(loads: Sequence[float], placed: Sequence[int], ranks: int) -> float:
    """Load of the fullest rank over the mean: 1 is even. All wait for the fullest, so it is also the slowdown."""
    totals = [0.0] * ranks
    for load, rank in zip(loads, placed, strict=True):
        totals[rank] += load
    mean = sum(totals) / ranks
    return max(totals) / mean if mean else 1.0


def replicated_imbalance(
    loads: Sequence[float], held: Sequence[Sequence[int]]
) -> float:
    """`imbalance` where experts have copies: each takes an even share of its expert's load."""
    counts = [0] * len(loads)
    for experts in held:
        for e in experts:
            counts[e] += 1
    totals = [sum(loads[e] / counts[e] for e in experts) for experts in held]
    mean = sum(totals) / len(totals)
    return max(totals) / mean if mean else 1.0


def best(loads: Sequence[float], ranks: int) -> float:
    """The least imbalance of any placement with E/R experts a rank, by trying all: for small cases (E up to about
    8).
    """
    _check(len(loads), ranks)
    slots = sorted(contiguous(len(loads), ranks))
    return min(imbalance(loads, p, ranks) for p in set(permutations(slots)))


def _check(slots: int, ranks: int) -> None:
    if ranks < 1 or slots < 1 or slots % ranks:
        raise ValueError(
            f"the ranks must share the experts' places evenly, got {slots} places and {ranks} ranks"
        )
