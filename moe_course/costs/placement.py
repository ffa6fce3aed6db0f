"""Which rank holds which expert: balanced loads without moving tokens about, copies of hot experts, and experts that
are chosen together side by side.

Chapter: book/bandwidth/expert_parallel.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations


def contiguous(num_experts: int, ranks: int) -> list[int]:
    """Expert e on rank e // (E/R): what is done without looking at loads. Returns each expert's rank."""
    _check(num_experts, ranks)
    return [e // (num_experts // ranks) for e in range(num_experts)]


def by_load(loads: Sequence[float], ranks: int) -> list[int]:
    """Heaviest expert first, each to the least loaded rank with room: E/R experts a rank. Returns each expert's rank.

    The greedy rule LPT (Graham, 1969) with equal numbers on each rank; a rank that is full is out. Ties: lowest number.
    """
    return _packed(loads, range(len(loads)), ranks)


def _packed(loads: Sequence[float], experts: Sequence[int], ranks: int) -> list[int]:
    """`by_load` of places that hold `experts`, two of one expert on different ranks as long as there is room."""
    _check(len(loads), ranks)
    room = len(loads) // ranks
    totals = [0.0] * ranks
    held: list[list[int]] = [[] for _ in range(ranks)]
    placed = [0] * len(loads)
    for place in sorted(range(len(loads)), key=lambda p: (-loads[p], p)):
        expert = experts[place]
        rank = min(
            (r for r in range(ranks) if len(held[r]) < room),
            key=lambda r: (expert in held[r], totals[r], r),
        )
        placed[place] = rank
        totals[rank] += loads[place]
        held[rank].append(expert)
    return placed


def copies(loads: Sequence[float], slots: int, most: int | None = None) -> list[int]:
    """How many copies of each expert fill `slots` places: one more, again and again, for the expert whose copies
    carry most.

    A copy takes an even share of its expert's load (as in DeepSeek's expert-parallel load balancer,
    github.com/deepseek-ai/EPLB). most: of one expert, where more would be of no use. Ties: lowest number. Raises
    ValueError where there are fewer places than experts, or more than `most` copies of each can fill.
    """
    experts = len(loads)
    if slots < experts or (most is not None and slots > most * experts):
        raise ValueError(
            f"{experts} experts need at least as many places and fill at most {most or 'any number of'} times as "
            f"many, got {slots}"
        )
    counts = [1] * experts
    heap = [(-load, e) for e, load in enumerate(loads) if most is None or most > 1]
    heapq.heapify(heap)
    for _ in range(slots - experts):
        _, e = heapq.heappop(heap)
        counts[e] += 1
        if most is None or counts[e] < most:
            heapq.heappush(heap, (-loads[e] / counts[e], e))
    return counts


def replicated(loads: Sequence[float], ranks: int, slots: int) -> list[list[int]]:
    """Experts on each rank, `slots` places in all, hot experts more than once: copies first, at most one for each
    rank, then as `by_load`, two of one expert on different ranks as long as there is room.
    """
    _check(slots, ranks)
    counts = copies(loads, slots, most=ranks)
    experts = [e for e, n in enumerate(counts) for _ in range(n)]
    shares = [loads[e] / counts[e] for e in experts]
    ranks_of = _packed(shares, experts, ranks)
    return [
        [e for e, rank in zip(experts, ranks_of, strict=True) if rank == r]
        for r in range(ranks)
    ]


def imbalance(loads: Sequence[float], placed: Sequence[int], ranks: int) -> float:
    """Load of the fullest rank over the mean: 1 is even. All wait for the fullest, so it is also the slowdown of what
    is computed and received.
    """
    totals = [0.0] * ranks
    for load, rank in zip(loads, placed, strict=True):
        totals[rank] += load
    return _most_over_mean(totals)


def replicated_imbalance(
    loads: Sequence[float], held: Sequence[Sequence[int]]
) -> float:
    """`imbalance` where experts have copies: each takes an even share of its expert's load.

    Raises ValueError where an expert with load is held nowhere.
    """
    counts = [0] * len(loads)
    for experts in held:
        for e in experts:
            counts[e] += 1
    lost = [e for e, n in enumerate(counts) if n == 0 and loads[e]]
    if lost:
        raise ValueError(f"no rank holds the experts {lost}, which have load")
    return _most_over_mean([sum(loads[e] / counts[e] for e in row) for row in held])


def _most_over_mean(totals: Sequence[float]) -> float:
    mean = sum(totals) / len(totals)
    return max(totals) / mean if mean else 1.0


def placements(num_experts: int, ranks: int) -> Iterator[list[int]]:
    """All ways to put E/R experts on each rank, ranks without names: for small cases (2,627,625 for 16 on 4)."""
    _check(num_experts, ranks)
    each = num_experts // ranks

    def spread(left: tuple[int, ...], rank: int) -> Iterator[dict[int, int]]:
        if not left:
            yield {}
            return
        # The first expert that is left opens the next rank, so that no way comes twice.
        for others in combinations(left[1:], each - 1):
            mine = (left[0], *others)
            rest = tuple(e for e in left if e not in mine)
            for further in spread(rest, rank + 1):
                yield dict.fromkeys(mine, rank) | further

    for ranks_of in spread(tuple(range(num_experts)), 0):
        yield [ranks_of[e] for e in range(num_experts)]


def best(loads: Sequence[float], ranks: int) -> float:
    """The least imbalance of any placement with E/R experts a rank, by trying all: for small cases."""
    return min(imbalance(loads, p, ranks) for p in placements(len(loads), ranks))


def ranks_per_token(
    chosen: Mapping[tuple[int, ...], float], placed: Sequence[int]
) -> float:
    """Mean number of ranks that hold any of a token's experts: what a placement by affinity lowers.

    chosen: how many tokens chose each set of experts.
    """
    tokens = sum(chosen.values())
    reached = sum(n * len({placed[e] for e in ids}) for ids, n in chosen.items())
    return reached / tokens if tokens else 0.0


def _check(slots: int, ranks: int) -> None:
    if ranks < 1 or slots < 1 or slots % ranks:
        raise ValueError(
            f"the ranks must share the experts' places evenly, got {slots} places and {ranks} ranks"
        )
