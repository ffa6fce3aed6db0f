"""Checks of exercise 05: sorting slots by expert, tiles, and three Triton kernels under the interpreter.

The oracles are loops over slots in plain Python, and products in float64. Kernels are watched as they run
(`tensors.expect_kernel`): what they load and store, and where, is part of the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

import torch
from torch import Tensor

from moe_course.grading.calls import Kernels
from moe_course.grading.core import (
    Answer,
    Exercise,
    Failure,
    Invariant,
    Question,
    describe,
)
from moe_course.grading.tensors import (
    compare,
    expect_kernel,
    expect_tensor,
    normal,
    watch,
)

MOST_BYTES = 4  # times those of a plain kernel


def _int(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _ids(
    rng: Random, tokens: int, k: int, experts: int, skipped: float = 0.0
) -> Tensor:
    """Distinct random choices for each token, some of them skipped, in either integer type."""
    rows = [rng.sample(range(experts), k) for _ in range(tokens)]
    rows = [[experts if rng.random() < skipped else e for e in row] for row in rows]
    dtype = rng.choice([torch.int64, torch.int32])
    return torch.tensor(rows, dtype=dtype).reshape(tokens, k)


def _ids_case(
    rng: Random, tokens: int, k: int, experts: int, skipped: float = 0.0
) -> dict[str, Any]:
    ids = _ids(rng, tokens, k, experts, skipped)
    return {"expert_ids": ids, "num_experts": experts}


def _edges(rng: Random) -> list[dict[str, Any]]:
    nobody: dict[str, Any] = {"expert_ids": torch.full((3, 2), 4), "num_experts": 4}
    one: dict[str, Any] = {"expert_ids": torch.full((5, 1), 2), "num_experts": 6}
    only: dict[str, Any] = {"expert_ids": torch.tensor([[0], [1]]), "num_experts": 1}
    return [
        only,
        {"expert_ids": torch.tensor([[0, 2], [3, 1]]), "num_experts": 3},
        _ids_case(rng, 4, 2, 5, skipped=0.4),
        _ids_case(rng, 11, 3, 4, skipped=0.3),
        _ids_case(rng, 0, 2, 3),
        nobody,
        one,
        _ids_case(rng, 4, 1, 1),
        _ids_case(rng, 2, 2, 40),
        _ids_case(rng, 1201, 2, 3, skipped=0.05),  # more than 8 or 16 bits hold
    ]


# 05.1


def _offsets(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    flat = expert_ids.flatten().tolist()
    counts = [flat.count(e) for e in range(num_experts)]
    return _int(counts), _int([sum(counts[:e]) for e in range(num_experts + 1)])


def _offsets_values(answer: Answer, rng: Random) -> None:
    sizes = ((3, 1, 2), (4, 2, 3), (9, 3, 5), (20, 2, 7))
    idle: dict[str, Any] = {
        "expert_ids": torch.tensor([[0, 1], [1, 0]]),
        "num_experts": 3,
    }
    cases = [idle, *(_ids_case(rng, *size) for size in sizes)]
    expect_tensor(answer, cases, _offsets)


def _offsets_edges(answer: Answer, rng: Random) -> None:
    expect_tensor(answer, _edges(rng), _offsets)


# 05.2


def _order(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    flat = expert_ids.flatten().tolist()
    order = [s for e in range(num_experts) for s, own in enumerate(flat) if own == e]
    row = {s: r for r, s in enumerate(order)}
    inverse = [row.get(s, -1) for s in range(len(flat))]
    return _int(order), _int(inverse).reshape(expert_ids.shape)


def _order_values(answer: Answer, rng: Random) -> None:
    small: dict[str, Any] = {
        "expert_ids": torch.tensor([[2, 0], [1, 2], [0, 1]]),
        "num_experts": 3,
    }
    sizes = ((5, 2, 3), (9, 3, 5), (40, 2, 4))
    expect_tensor(answer, [small, *(_ids_case(rng, *s) for s in sizes)], _order)


def _order_edges(answer: Answer, rng: Random) -> None:
    expect_tensor(answer, _edges(rng), _order)


# 05.3


def _tiles(offsets: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    ends = offsets.tolist()
    found = [
        (e, first, min(block, ends[e + 1] - first))
        for e in range(len(ends) - 1)
        for first in range(ends[e], ends[e + 1], block)
    ]
    return (
        _int([e for e, _, _ in found]),
        _int([first for _, first, _ in found]),
        _int([rows for _, _, rows in found]),
    )


def _tile_case(counts: list[int], block: int) -> dict[str, Any]:
    ends = [sum(counts[:e]) for e in range(len(counts) + 1)]
    return {"offsets": _int(ends), "block": block}


def _tile_values(answer: Answer, rng: Random) -> None:
    cases = [_tile_case([3, 5], 4), _tile_case([7, 2, 9], 4)]
    for experts, block in ((3, 16), (5, 8), (4, 32)):
        # No multiples of the block: those are edges.
        counts = [rng.randrange(3) * block + rng.randrange(1, block) for _ in range(experts)]  # fmt: skip
        counts[rng.randrange(experts)] = block + 1
        cases.append(_tile_case(counts, block))
    expect_tensor(answer, cases, _tiles)


def _tile_edges(answer: Answer, rng: Random) -> None:
    block = rng.choice([4, 8, 16])
    cases = [
        _tile_case([block], block),
        _tile_case([2 * block, block], block),
        _tile_case([0, 3, 0, 0, 5, 0], 4),
        _tile_case([0, 0], block),
        _tile_case([block - 1, 0, block + 1], block),
        _tile_case([3, 0, 2], 1),
        _tile_case([0] * 20 + [1] + [0] * 11, block),
    ]
    expect_tensor(answer, cases, _tiles)


# Kernels


def _bill(account: Kernels, loaded: int, written: int) -> str:
    """The cost table that a learner sees; raises Failure where a kernel moves many times the bytes of a plain one."""
    rows = (
        ("loaded", account.loaded, account.loads, loaded),
        ("stored", account.written, account.stores, written),
    )
    table = f"{account.programs} programs in {len(account.launches)} launch{'es' * (len(account.launches) > 1)}"
    for what, moved, operations, reference in rows:
        table += (
            f"\n{what:<7}{moved:>9,} bytes in {operations:,} operations"
            f" (a plain kernel: {reference:,} bytes)"
        )
    for what, moved, _, reference in rows:
        if moved > MOST_BYTES * reference:
            raise Failure(
                f"{table}\n{what}: more than {MOST_BYTES} times as many as needed; memory moves pieces of 32 bytes, "
                "however little of one is used"
            )
    return table


def _require_programs(account: Kernels, shape: Sequence[int]) -> None:
    if max(account.launches, default=0) < 2:
        raise Failure(
            f"a single program computes the whole result of {list(shape)}; a GPU has over 100 multiprocessors, "
            "and all but one would idle",
            hint=False,
        )


# 05.4


def _swiglu(h: Tensor) -> Tensor:
    gate, up = h.double().chunk(2, dim=1)
    return (gate / (1 + torch.exp(-gate)) * up).to(h.dtype)


def _expect_swiglu(answer: Answer, h: Tensor) -> Kernels:
    return expect_kernel(answer, {"h": h}, _swiglu(h), {"h": h.numel()})


def _swiglu_values(answer: Answer, rng: Random) -> None:
    _expect_swiglu(answer, 3 * normal(rng, 2, 256, dtype=torch.float32))
    # silu of -16 is below what float16 tells apart, its product with 1000 is not.
    gate = -15 - 2 * torch.rand(2, 128, generator=torch.Generator().manual_seed(rng.getrandbits(32)))  # fmt: skip
    up = 1000 + 100 * normal(rng, 2, 128, dtype=torch.float32)
    _expect_swiglu(answer, torch.cat([gate, up], dim=1).half())
    # exp of 95 is past float32; silu of 95 is 95.
    gate = 95 + torch.arange(128.0).repeat(2, 1) / 4
    _expect_swiglu(answer, torch.cat([gate, gate / 100], dim=1))


def _swiglu_ragged(answer: Answer, rng: Random) -> None:
    for rows, width in ((1, 1), (3, 5), (2, rng.randrange(129, 170)), (5, 33)):
        _expect_swiglu(answer, normal(rng, rows, 2 * width, dtype=torch.float32))
    _expect_swiglu(answer, normal(rng, 3, 2 * 70, dtype=torch.float16))
    _expect_swiglu(answer, normal(rng, 0, 2 * 20, dtype=torch.float32))


def _swiglu_cost(answer: Answer, rng: Random) -> str:
    rows, width = 3, 128
    account = _expect_swiglu(answer, normal(rng, rows, 2 * width, dtype=torch.float32))
    bill = _bill(account, 4 * 2 * rows * width, 4 * rows * width)
    # More than a program holds in its registers.
    h = normal(rng, 5, 2 * 2048, dtype=torch.float32)
    _require_programs(_expect_swiglu(answer, h), (5, 2048))
    return bill


# 05.5


def _gemm(case: dict[str, Any]) -> Tensor:
    x, w, token = case["x"].double(), case["w"].double(), case["token"].long()
    y = torch.full((len(token), w.shape[1]), torch.nan, dtype=torch.float64)
    for e, first, rows in zip(
        *(case[f"tile_{n}"].tolist() for n in ("expert", "first", "rows")), strict=True
    ):
        y[first : first + rows] = x[token[first : first + rows]] @ w[e].T
    return y.to(case["x"].dtype)


def _gemm_case(
    rng: Random,
    counts: list[int],
    width: int,
    columns: int,
    block: int = 16,
    dtype: torch.dtype = torch.float32,
    tokens: int = 0,
) -> dict[str, Any]:
    rows = sum(counts)
    tokens = tokens or rows
    # Each token at least once, and not in order.
    token = [*range(tokens), *(rng.randrange(tokens) for _ in range(rows - tokens))]
    rng.shuffle(token)
    tiles = _tiles(**_tile_case(counts, block))
    return {
        "x": normal(rng, tokens, width, dtype=dtype),
        "w": normal(rng, len(counts), columns, width, dtype=dtype),
        "token": _int(token),
        "tile_expert": tiles[0],
        "tile_first": tiles[1],
        "tile_rows": tiles[2],
        "block": block,
    }


def _expect_gemm(
    answer: Answer, case: dict[str, Any], apart: dict[str, int] | None = None
) -> Kernels:
    used = len(case["tile_expert"].unique()) * case["w"][0].numel()
    reads = {"x": case["x"].numel(), "w": used, "token": len(case["token"])}
    return expect_kernel(answer, case, _gemm(case), reads, apart)


def _gemm_values(answer: Answer, rng: Random) -> None:
    _expect_gemm(answer, _gemm_case(rng, [16, 16], 64, 64))
    _expect_gemm(answer, _gemm_case(rng, [32, 16], 128, 64, tokens=24))
    # Sums of positive numbers in float16: half of them would be lost.
    case = _gemm_case(rng, [32], 128, 64, block=32, dtype=torch.float16)
    _expect_gemm(answer, case | {"x": case["x"].abs(), "w": case["w"].abs()})
    # What the first half of the sum adds, the second takes away again, but for a little.
    case = _gemm_case(rng, [32], 128, 64, block=32, dtype=torch.float16)
    x, w = case["x"], case["w"]
    x[:, 64:], w[:, :, 64:] = -x[:, :64], w[:, :, :64] * (1 + 2**-6)
    _expect_gemm(answer, case)


def _gemm_ragged(answer: Answer, rng: Random) -> None:
    width, columns = rng.randrange(65, 96), rng.randrange(65, 96)
    for case in (
        _gemm_case(rng, [3], 5, 7),
        _gemm_case(rng, [17, 0, 1], 40, 33, tokens=9),
        _gemm_case(rng, [5, 20], width, columns, block=32),
        _gemm_case(rng, [7, 18], 33, 20, dtype=torch.float16),
        _gemm_case(rng, [0, 0], 20, 20),
    ):
        _expect_gemm(answer, case)


def _gemm_far(answer: Answer, rng: Random) -> str | None:
    """Experts 2^30 elements apart: the third lies past what 32 bits count. Untouched memory costs nothing."""
    case = _gemm_case(rng, [16, 0, 5], 32, 32, dtype=torch.float16)
    account = _expect_gemm(answer, case, {"w": 2**30 + 64})
    if not account.apart:
        return "not checked: offsets past 2^31, this machine grants no such tensor"
    return None


def _gemm_cost(answer: Answer, rng: Random) -> str:
    width, columns = 128, 64
    case = _gemm_case(rng, [32, 16, 16], width, columns)
    account = _expect_gemm(answer, case)
    tiles, rows = len(case["tile_expert"]), len(case["token"])
    loaded = 4 * (tiles * width * columns + rows * width + rows + 3 * tiles)
    bill = _bill(account, loaded, 4 * rows * columns)
    _require_programs(account, (rows, columns))
    return bill


# 05.6


def _combine(y: Tensor, inverse: Tensor, weights: Tensor) -> Tensor:
    """In float32 and in order, one addition after the other."""
    out = torch.zeros(len(inverse), y.shape[1])
    for t, rows in enumerate(inverse.tolist()):
        for k, row in enumerate(rows):
            if row >= 0:
                out[t] = out[t] + weights[t, k] * y[row].float()
    return out.to(y.dtype)


def _combine_case(
    rng: Random,
    tokens: int,
    k: int,
    width: int,
    skipped: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    experts = k + 2
    _, inverse = _order(_ids(rng, tokens, k, experts, skipped), experts)
    weights = normal(rng, tokens, k, dtype=torch.float32).sigmoid()
    # Nothing is known of the weight of a slot that was skipped.
    weights = weights.masked_fill(inverse < 0, torch.nan)
    rows = int((inverse >= 0).sum())
    y = normal(rng, rows, width, dtype=dtype)
    return {"y": y, "inverse": inverse, "weights": weights}


def _expect_combine(answer: Answer, case: dict[str, Any]) -> Kernels:
    reads = {"y": case["y"].numel(), "inverse": case["inverse"].numel()}
    return expect_kernel(answer, case, _combine(**case), reads)


def _combine_values(answer: Answer, rng: Random) -> None:
    _expect_combine(answer, _combine_case(rng, 3, 2, 128))
    _expect_combine(answer, _combine_case(rng, 4, 3, 128))


def _combine_order(answer: Answer, rng: Random) -> None:
    # 2^24 + 1 is 2^24 in float32: what is left at the end tells the order. All products are exact.
    big = float(2**24)
    values = rng.sample([[big, -big, 1.0, 0.5], [1.0, big, -big, 0.5], [0.5, 1.0, big, -big]], 3)  # fmt: skip
    y = torch.tensor(values).reshape(12, 1).repeat(1, 64)
    y = y * torch.randint(1, 4, (1, 64), generator=torch.Generator().manual_seed(rng.getrandbits(32)))  # fmt: skip
    shuffled = list(range(12))
    rng.shuffle(shuffled)
    rows = torch.empty_like(y)
    rows[shuffled] = y
    case = {
        "y": rows,
        "inverse": _int(shuffled).reshape(3, 4),
        "weights": torch.ones(3, 4),
    }
    _expect_combine(answer, case)
    # In float16, 2048 + 1 is 2048.
    y = torch.tensor([2048.0, 1.0, 1.0, 1.0, 1.0]).reshape(5, 1).repeat(1, 64).half()
    one = {"y": y, "inverse": _int([0, 1, 2, 3, 4])[None], "weights": torch.ones(1, 5)}
    _expect_combine(answer, one)
    # 2048 times what float16 loses of 0.1 is 0.05: of the weight as of the product.
    y = torch.tensor([2048.0, -2048.0, 0.25]).reshape(3, 1).repeat(1, 64).half()
    weights = torch.tensor([[0.1, float(torch.tensor(0.1).half()), 1.0]])
    _expect_combine(
        answer, {"y": y, "inverse": _int([0, 1, 2])[None], "weights": weights}
    )


def _combine_ragged(answer: Answer, rng: Random) -> None:
    for case in (
        _combine_case(rng, 1, 1, 1),
        _combine_case(rng, 3, 2, rng.randrange(129, 170), skipped=0.4),
        _combine_case(rng, 5, 3, 20, skipped=0.5),
        _combine_case(rng, 2, 2, 33, skipped=1.0),  # no rows at all
        _combine_case(rng, 4, 2, 70, skipped=0.3, dtype=torch.float16),
        _combine_case(rng, 0, 2, 20),
    ):
        _expect_combine(answer, case)
    # What a token has not asked for is not its business.
    case = _combine_case(rng, 4, 2, 20)
    case["inverse"][1, 0] = -1
    case["weights"][1, 0] = 0.5
    case["y"][0] = torch.inf
    got, want = watch(answer, case)[0], _combine(**case)
    if type(got) is not Tensor or got.shape != want.shape or got.dtype != want.dtype:
        compare(got, want, describe(**case))
    finite = want.isfinite()
    what = f"{describe(**case)}, row 0 of y infinite"
    compare(got.masked_fill(~finite, 0.0), want.masked_fill(~finite, 0.0), what)


def _combine_cost(answer: Answer, rng: Random) -> str:
    tokens, k, width = 3, 3, 128
    case = _combine_case(rng, tokens, k, width)
    account = _expect_combine(answer, case)
    bill = _bill(account, 4 * tokens * k * (width + 2), 4 * tokens * width)
    # More than a program holds in its registers.
    case = _combine_case(rng, 5, 2, 2048)
    _require_programs(_expect_combine(answer, case), (5, 2048))
    return bill


_GEMM = "book/kernels/grouped_gemm"
_FUSED = "book/kernels/fused_moe"

EXERCISE = Exercise(
    number="05",
    topic="kernels",
    title="Kernels of a sparse layer",
    next_step="all of exercise 05 is done; its hand-graded question is the last cell",
    questions=(
        Question(
            "05.1",
            "Where each expert begins",
            "expert_offsets",
            1,
            10,
            _GEMM,
            (
                Invariant(
                    "counts the slots of each expert, and where its rows begin and end",
                    2,
                    _offsets_values,
                    "bincount(minlength=E) counts experts without slots too. The offsets are E + 1: a 0, then the sums "
                    "of the counts so far. Both are int32; cumsum makes int64.",
                ),
                Invariant(
                    "at the edges: skipped slots, no tokens, experts without slots",
                    1,
                    _offsets_edges,
                    "The id E belongs to nobody: count it apart and leave it out, do not move it to the last expert.",
                ),
            ),
        ),
        Question(
            "05.2",
            "There and back",
            "stable_order",
            2,
            15,
            _GEMM,
            (
                Invariant(
                    "sorts the slots by expert, stably, and finds each again",
                    2,
                    _order_values,
                    "argsort(stable=True) of the flattened ids gives slots, t·K + k, not tokens. The inverse is no "
                    "second list of slots: inverse[order[r]] = r.",
                ),
                Invariant(
                    "at the edges: skipped slots are in no row, and their inverse is -1",
                    1,
                    _order_edges,
                    "Skipped slots sort to the end, as E is above all experts: cut them off. The inverse begins as "
                    "all -1.",
                ),
            ),
        ),
        Question(
            "05.3",
            "Tiles",
            "tile_map",
            2,
            20,
            _GEMM,
            (
                Invariant(
                    "cuts each expert's rows into tiles of its own",
                    3,
                    _tile_values,
                    "An expert with n rows has ceil(n / block) tiles, the first at its offset. The last has what is "
                    "left: rows of the next expert would be multiplied by the wrong weights.",
                ),
                Invariant(
                    "at the edges: full tiles only, experts without rows, no rows at all",
                    1,
                    _tile_edges,
                    "(n + block - 1) // block tiles: with n = block that is one, with n = 0 none.",
                ),
            ),
        ),
        Question(
            "05.4",
            "SwiGLU, masked",
            "swiglu",
            2,
            25,
            _FUSED,
            (
                Invariant(
                    "a kernel computes silu(gate) times up, in float32",
                    2,
                    _swiglu_values,
                    "Gates are the first F columns, ups the last; silu is of the gate alone. Up-cast after each load, "
                    "down-cast once, when you store.",
                ),
                Invariant(
                    "stays in its row, whatever the width",
                    1,
                    _swiglu_ragged,
                    "Mask loads and stores with column < F: past it lie the ups, the next row, or nothing.",
                ),
                Invariant(
                    "moves each element about once",
                    1,
                    _swiglu_cost,
                    "Let a program take a block of neighbouring columns: pieces of memory are 32 bytes, eight float32.",
                ),
            ),
            needs="triton",
        ),
        Question(
            "05.5",
            "A grouped product",
            "grouped_gemm",
            3,
            45,
            _GEMM,
            (
                Invariant(
                    "a kernel multiplies gathered rows by their tile's expert",
                    2,
                    _gemm_values,
                    "The rows of x are token[first + m], the weights those of tile_expert, transposed: w[e] is [N, D]. "
                    "Accumulate in float32 over all of D.",
                ),
                Invariant(
                    "masks ragged rows, columns and sums",
                    2,
                    _gemm_ragged,
                    "tile_rows bounds the rows, N the columns, D the sum. What is masked out of the sum must be 0 on "
                    "both sides: other=0.0. Round block sizes up to powers of two, at least 16.",
                ),
                Invariant(
                    "finds an expert past 2^31 elements",
                    1,
                    _gemm_far,
                    "Load the expert's id, .to(tl.int64), then multiply by w.stride(0).",
                ),
                Invariant(
                    "loads an expert's weights once per tile",
                    1,
                    _gemm_cost,
                    "One program for a tile of rows and a block of columns: tl.dot of [BM, BK] and [BK, BN] uses each "
                    "weight for all rows of the tile.",
                ),
            ),
            needs="triton",
        ),
        Question(
            "05.6",
            "The combine, without atomics",
            "combine",
            2,
            25,
            _FUSED,
            (
                Invariant(
                    "a kernel adds up each token's weighted rows, without atomics",
                    2,
                    _combine_values,
                    "One program for a token and a block of columns; a loop over k loads the row number, the weight, "
                    "then the row.",
                ),
                Invariant(
                    "adds in float32, in the order of k",
                    1,
                    _combine_order,
                    "An accumulator of zeros in tl.float32, k = 0 first; up-cast rows before the product, and leave "
                    "the weights in float32. Down-cast once, when you store.",
                ),
                Invariant(
                    "skipped slots contribute exactly 0, at ragged widths too",
                    1,
                    _combine_ragged,
                    "Row -1 lies before y: put row >= 0 into the masks, of the weight as well, with other=0.0. A "
                    "product with 0 is no mask: 0 times infinity is NaN.",
                ),
                Invariant(
                    "moves each row about once",
                    1,
                    _combine_cost,
                    "A program of one column loads row number and weight for each single entry: take a block of "
                    "columns.",
                ),
            ),
            needs="triton",
        ),
    ),
)
