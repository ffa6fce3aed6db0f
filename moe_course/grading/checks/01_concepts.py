"""Checks of exercise 01: counting parameters, dense and sparse.

The oracles here multiply out the shapes of the weights; they do not call moe_course.specs.
"""

from __future__ import annotations

from fractions import Fraction
from random import Random

from moe_course.grading.core import (
    Answer,
    Exercise,
    Failure,
    Invariant,
    Question,
    case_size,
    describe,
    expect_count,
    mismatch,
    same,
    shown,
)


def _swiglu(width: int, hidden: int, bias: bool = False) -> int:
    shapes = [(hidden, width), (hidden, width), (width, hidden)]
    return sum(rows * columns + bias * rows for rows, columns in shapes)


def _matched_hidden(width: int, dense_hidden: int, multiple: int) -> int:
    hidden = multiple
    while _swiglu(width, hidden) < 2 * width * dense_hidden:
        hidden += multiple
    return hidden


def _gqa(width: int, heads: int, kv_heads: int, head_dim: int) -> int:
    query, key_value = heads * head_dim, kv_heads * head_dim
    shapes = [(query, width), (key_value, width), (key_value, width), (width, query)]
    return sum(rows * columns for rows, columns in shapes)


def _mla(
    width: int,
    heads: int,
    q_rank: int,
    kv_rank: int,
    nope_dim: int,
    rope_dim: int,
    v_dim: int,
) -> int:
    shapes = [
        (q_rank, width),
        (heads * (nope_dim + rope_dim), q_rank),
        (kv_rank + rope_dim, width),
        (heads * (nope_dim + v_dim), kv_rank),
        (width, heads * v_dim),
    ]
    norms = q_rank + kv_rank
    return sum(rows * columns for rows, columns in shapes) + norms


def _moe_totals(
    width: int,
    layers: int,
    vocab: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    first_dense: int,
    dense_hidden: int,
    expert_hidden: int,
    experts: int,
    k: int,
    shared: int,
) -> tuple[int, int]:
    everywhere = (
        layers * (_gqa(width, heads, kv_heads, head_dim) + 2 * width)
        + width
        + 2 * vocab * width
    )
    dense = min(first_dense, layers)
    sparse = layers - dense
    everywhere += dense * _swiglu(width, dense_hidden)
    everywhere += sparse * (width * experts + shared * _swiglu(width, expert_hidden))
    one = sparse * _swiglu(width, expert_hidden)
    return everywhere + experts * one, everywhere + k * one


def _active_at(total: int, active: int, experts: int, k: int, new_k: int) -> int:
    per_pick = Fraction(total - active, experts - k)
    exact = active + (new_k - k) * per_pick
    assert exact.denominator == 1
    return exact.numerator


def _cases(rng: Random, **ranges: tuple[int, int]) -> list[dict[str, int]]:
    return [
        {name: rng.randint(*bounds) for name, bounds in ranges.items()}
        for _ in range(12)
    ]


def _swiglu_no_bias(answer: Answer, rng: Random) -> None:
    by_hand = {"width": 2, "hidden": 3}
    expect_count(
        answer, [by_hand, *_cases(rng, width=(2, 40), hidden=(2, 90))], _swiglu
    )


def _swiglu_bias(answer: Answer, rng: Random) -> None:
    cases = [{"width": 2, "hidden": 3}, *_cases(rng, width=(2, 40), hidden=(2, 90))]
    both = [case | {"bias": bias} for case in cases for bias in (True, False)]
    expect_count(answer, both, _swiglu)


def _matched_enough(answer: Answer, rng: Random) -> None:
    cases = _cases(rng, width=(1, 30), dense_hidden=(1, 400), multiple=(2, 40))
    for case in cases:  # the exact cases are those of the next invariant
        case["dense_hidden"] += 2 * case["dense_hidden"] % (3 * case["multiple"]) == 0
    # A third or two thirds past a multiple: rounding 2·dense_hidden / 3 down first comes out one multiple short.
    for past in (1, 2):
        for multiple in (2, 2 * rng.randint(1, 19), 36):
            j = 2 * rng.randint(1, 4)
            over = multiple + past % 2  # so that 3·over·j + past is even
            dense_hidden = (3 * over * (j + past % 2) + past) // 2
            cases.append(
                {
                    "width": rng.randint(1, 30),
                    "dense_hidden": dense_hidden,
                    "multiple": over,
                }
            )
    expect_count(answer, cases, _matched_hidden)


def _matched_exact(answer: Answer, rng: Random) -> None:
    # dense_hidden = 3·m·j/2 meets the budget exactly at hidden = m·j: nothing may be added there.
    cases = [
        {
            "width": rng.randint(1, 30),
            "dense_hidden": 3 * half * j,
            "multiple": 2 * half,
        }
        for half, j in ((rng.randint(1, 20), rng.randint(1, 9)) for _ in range(12))
    ]
    cases.append(
        {"width": 2, "dense_hidden": 279, "multiple": 31}
    )  # 2 / (3·31)·279 is above 6 in floats
    expect_count(answer, cases, _matched_hidden)


def _gqa_cases(rng: Random, groups: tuple[int, int]) -> list[dict[str, int]]:
    cases = []
    for case in _cases(
        rng, width=(3, 60), kv_heads=(2, 6), head_dim=(2, 16), group=groups
    ):
        case["heads"] = case["kv_heads"] * case.pop("group")
        if case["heads"] * case["head_dim"] == case["width"]:
            case["width"] += (
                1  # heads·head_dim differs from the width, as in gpt-oss and Qwen3
            )
        cases.append(case)
    return cases


def _gqa_grouped(answer: Answer, rng: Random) -> None:
    by_hand = {"width": 3, "heads": 4, "kv_heads": 2, "head_dim": 2}
    expect_count(answer, [by_hand, *_gqa_cases(rng, (2, 5))], _gqa)


def _gqa_limits(answer: Answer, rng: Random) -> None:
    one_kv_head = [case | {"kv_heads": 1} for case in _gqa_cases(rng, (2, 5))]
    expect_count(answer, _gqa_cases(rng, (1, 1)) + one_kv_head, _gqa)


_MLA_RANGES = {
    "width": (8, 60),
    "heads": (2, 8),
    "q_rank": (2, 30),
    "kv_rank": (2, 30),
    "nope_dim": (2, 16),
    "rope_dim": (1, 8),
    "v_dim": (2, 20),
}


def _mla_weights(answer: Answer, rng: Random) -> None:
    """The five matrices are right, however the norms are counted yet."""
    for case in sorted(_cases(rng, **_MLA_RANGES), key=case_size):
        want, got = _mla(**case), answer(**case)
        q, kv, rope = case["q_rank"], case["kv_rank"], case["rope_dim"]
        norms = {
            0,
            q,
            kv,
            q + kv,
            q + kv + rope,
            2 * (q + kv),
        }  # q + kv is right, the others near misses
        if type(got) is not int or got - (want - q - kv) not in norms:
            what = f"{describe(**case)} (the five matrices hold {want - q - kv})"
            raise mismatch(got, want, what)


def _mla_all(answer: Answer, rng: Random) -> None:
    expect_count(answer, _cases(rng, **_MLA_RANGES), _mla)


def _moe_cases(rng: Random, **fixed: int) -> list[dict[str, int]]:
    cases = []
    for case in _cases(
        rng,
        width=(4, 24),
        layers=(2, 7),
        vocab=(10, 90),
        kv_heads=(1, 3),
        head_dim=(2, 6),
        group=(1, 3),
        first_dense=(0, 2),
        dense_hidden=(5, 60),
        expert_hidden=(3, 30),
        experts=(3, 12),
        shared=(0, 2),
    ):
        case["heads"] = case["kv_heads"] * case.pop("group")
        case["k"] = rng.randint(1, case["experts"] - 1)
        cases.append(case)
    cases[0]["first_dense"] = cases[0]["layers"]  # no sparse layer at all
    for place, (first_dense, shared) in enumerate(
        ((0, 0), (0, 2), (2, 0), (1, 1)), start=1
    ):
        cases[place] |= {"first_dense": first_dense, "shared": shared}
    return [case | fixed for case in cases]


def _part(index: int, answer: Answer, cases: list[dict[str, int]]) -> None:
    """One of the two figures is right on every case."""
    name = ("total", "active")[index]
    for case in sorted(cases, key=case_size):
        want, got = _moe_totals(**case), answer(**case)
        if not isinstance(got, tuple) or len(got) != 2:
            raise mismatch(got, want, f"{describe(**case)}, the pair (total, active)")
        if not same(got[index], want[index]):
            raise mismatch(got[index], want[index], f"{describe(**case)}, {name}")


def _moe_plain(answer: Answer, rng: Random) -> None:
    _part(0, answer, _moe_cases(rng, first_dense=0, shared=0))


def _moe_dense_layers(answer: Answer, rng: Random) -> None:
    _part(0, answer, _moe_cases(rng))


def _moe_active(answer: Answer, rng: Random) -> None:
    _part(1, answer, _moe_cases(rng))


def _moe_every_expert(answer: Answer, rng: Random) -> None:
    _part(
        1, answer, _moe_cases(rng)
    )  # returning the total twice is no answer, though it holds at k = experts
    cases = [case | {"k": case["experts"]} for case in _moe_cases(rng)]
    expect_count(answer, cases, _moe_totals)


def _published_sizes(rng: Random, up: bool) -> list[dict[str, int]]:
    cases = []
    for case in _cases(
        rng, rest=(10**3, 10**11), expert=(10**2, 10**10), experts=(4, 256)
    ):
        experts = case["experts"]
        k = rng.randint(2, experts // 2)
        new_k = rng.randint(k + 1, experts) if up else rng.randint(1, k - 1)
        cases.append(
            {
                "total": case["rest"] + experts * case["expert"],
                "active": case["rest"] + k * case["expert"],
                "experts": experts,
                "k": k,
                "new_k": new_k,
            }
        )
    return cases


def _active_fewer(answer: Answer, rng: Random) -> None:
    by_hand = [
        {"total": 100, "active": 40, "experts": 8, "k": 2, "new_k": 1},
        {"total": 100, "active": 40, "experts": 8, "k": 2, "new_k": 2},
        {"total": 106, "active": 79, "experts": 11, "k": 8, "new_k": 1},
        {
            "total": 10**13,
            "active": 10**13 - 999 * 124,
            "experts": 256,
            "k": 132,
            "new_k": 1,
        },
    ]
    expect_count(answer, by_hand + _published_sizes(rng, up=False), _active_at)


def _active_more(answer: Answer, rng: Random) -> None:
    cases = _published_sizes(rng, up=True)
    cases += [
        case | {"new_k": case["experts"] - less}
        for case in cases[:3]
        for less in (0, 1)
    ]
    cases += [
        {"total": 100, "active": 30, "experts": 8, "k": 1, "new_k": n}
        for n in (2, 7, 8)
    ]
    expect_count(answer, cases, _active_at)


FIGURES = {
    "size of the checkpoint on disk": "total",
    "FLOPs to process one token": "active",
    "memory the weights need on the accelerators": "total",
    "weights read from memory to decode one token of one user": "active",
    "optimiser state when every weight is trained": "total",
    "whether it answers better than another model": "neither",
}


def _figure_answers(answer: Answer, _rng: Random) -> None:
    answers = {question: answer(question) for question in FIGURES}
    for question, got in answers.items():
        if type(got) is not str or got not in ("total", "active", "neither"):
            raise Failure(
                f"{question!r}:\n    expected 'total', 'active' or 'neither', got {shown(got)}"
            )
    right = sum(answers[question] == FIGURES[question] for question in FIGURES)
    if right < len(FIGURES):
        # How many, not which: with three choices each, the list would be the answer.
        raise Failure(f"{right} of {len(FIGURES)} questions answered rightly")


_TWO_BETS = "book/concepts/two_bets"
_ANATOMY = "book/concepts/anatomy"

EXERCISE = Exercise(
    number="01",
    topic="concepts",
    title="Counting parameters",
    next_step="all of exercise 01 is done; its hand-graded question is the last cell",
    questions=(
        Question(
            "01.1",
            "Three matrices",
            "swiglu_params",
            difficulty=1,
            minutes=5,
            link=f"{_ANATOMY}, section 'What an expert is'",
            invariants=(
                Invariant(
                    "counts all three matrices",
                    1,
                    _swiglu_no_bias,
                    "SwiGLU has a gate, an up and a down projection. Write the shape of each, then add the products.",
                ),
                Invariant(
                    "adds one bias per output of each matrix",
                    1,
                    _swiglu_bias,
                    "A bias has as many entries as its matrix has outputs: F for gate and up, D for down.",
                ),
            ),
        ),
        Question(
            "01.2",
            "A fair swap",
            "matched_hidden",
            difficulty=2,
            minutes=10,
            link=f"{_ANATOMY}, section 'What an expert is'",
            invariants=(
                Invariant(
                    "is the smallest multiple with at least as many weights",
                    1,
                    _matched_enough,
                    "Three matrices must hold what two held: 3·D·F >= 2·D·F_dense. Solve for F, then round up, once: "
                    "int(2·F_dense / 3) before rounding up loses a third.",
                ),
                Invariant(
                    "adds nothing where the budget is met exactly",
                    1,
                    _matched_exact,
                    "Rounding up by `+ multiple` overshoots when F is already a multiple. Stay in integers: "
                    "-(-a // b) is a / b rounded up.",
                ),
            ),
        ),
        Question(
            "01.3",
            "Grouped-query attention",
            "gqa_params",
            difficulty=2,
            minutes=10,
            link=f"{_TWO_BETS}, section 'Counting Mixtral to the last parameter'",
            invariants=(
                Invariant(
                    "counts the four projections of grouped heads",
                    2,
                    _gqa_grouped,
                    "Queries and the output have heads·head_dim columns, keys and values only kv_heads·head_dim; "
                    "and heads·head_dim need not equal the width.",
                ),
                Invariant(
                    "also at kv_heads = heads and kv_heads = 1",
                    1,
                    _gqa_limits,
                    "One formula covers multi-head and multi-query attention: look for a special case or a division.",
                ),
            ),
        ),
        Question(
            "01.4",
            "Latent attention",
            "mla_params",
            difficulty=3,
            minutes=20,
            link=f"{_ANATOMY}, section 'What stays as it was'",
            invariants=(
                Invariant(
                    "counts the five matrices",
                    3,
                    _mla_weights,
                    "The rotary key is shared: kv_down makes kv_rank + rope_dim numbers, once, not per head. "
                    "kv_up makes nope_dim + v_dim per head, and the output reads heads·v_dim.",
                ),
                Invariant(
                    "counts the norms on the two latents",
                    1,
                    _mla_all,
                    "Each latent passes an RMSNorm with one weight per entry: q_rank and kv_rank more.",
                ),
            ),
        ),
        Question(
            "01.5",
            "A whole sparse model",
            "moe_params",
            difficulty=3,
            minutes=25,
            link=f"{_TWO_BETS}, section 'Counting Mixtral to the last parameter'",
            invariants=(
                Invariant(
                    "counts what is stored when every layer is sparse",
                    1,
                    _moe_plain,
                    "Per layer: attention, two norms, a router of width·experts, and all experts. "
                    "Once: two embedding-sized matrices and the final norm.",
                ),
                Invariant(
                    "counts dense first layers and shared experts",
                    1,
                    _moe_dense_layers,
                    "The first `first_dense` layers hold one SwiGLU of dense_hidden and no router; "
                    "the others hold `shared` more FFNs of expert_hidden.",
                ),
                Invariant(
                    "counts what one token meets",
                    1,
                    _moe_active,
                    "Active leaves out the experts - k unselected experts of each sparse layer, and nothing else: "
                    "the router scores every expert, so all of it is active, and so are the shared experts.",
                ),
                Invariant(
                    "at k = experts active equals total",
                    1,
                    _moe_every_expert,
                    "With every expert selected nothing is left out.",
                ),
            ),
        ),
        Question(
            "01.6",
            "From a model card",
            "active_at",
            difficulty=2,
            minutes=15,
            link=f"{_TWO_BETS}, section 'Why 8 x 7B is not 56B'",
            invariants=(
                Invariant(
                    "finds the active parameters at a smaller k",
                    2,
                    _active_fewer,
                    "total = rest + experts·x and active = rest + k·x are two equations for the two unknowns. "
                    "total·k/experts forgets the rest. Stay in integers.",
                ),
                Invariant(
                    "and at a larger one, up to every expert",
                    1,
                    _active_more,
                    "At new_k = experts the answer is the total.",
                ),
            ),
        ),
        Question(
            "01.7",
            "Which figure answers which question",
            "figure_for",
            difficulty=1,
            minutes=5,
            link=f"{_TWO_BETS}, section 'What scales with which'",
            invariants=(
                Invariant(
                    "answers all six questions",
                    2,
                    _figure_answers,
                    "Ask of each: does an expert that this token does not select still count? "
                    "And is it a question that counting can answer at all?",
                ),
            ),
        ),
    ),
)
