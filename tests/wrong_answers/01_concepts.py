"""Answers to exercise 01 that must fail, each with the invariant that catches it, and others that must pass.

WRONG[question] is a list of (what is wrong, answer, name of the invariant that must fail first).
RIGHT[question] is a list of answers written differently from the worked solution.
"""

from fractions import Fraction
from math import ceil

from moe_course.specs import FFN, GQA, MLA, ModelSpec, RoutedExperts, zoo

PACKAGE = "the package's own function"


def swiglu_loop(width, hidden, bias=False):
    count = 0
    for outputs, inputs in ((hidden, width), (hidden, width), (width, hidden)):
        count += outputs * inputs
        if bias:
            count += outputs
    return count


def matched_float(width, dense_hidden, multiple):
    return multiple * int(
        2 * dense_hidden / 3 / multiple + 1
    )  # one too many where it divides


def matched_llama(width, dense_hidden, multiple):
    hidden = int(
        2 * dense_hidden / 3
    )  # as in LLaMA's code: it may come out one multiple short
    return multiple * ((hidden + multiple - 1) // multiple)


def matched_search(width, dense_hidden, multiple):
    hidden = multiple
    while 3 * hidden < 2 * dense_hidden:
        hidden += multiple
    return hidden


def matched_package(width, dense_hidden, multiple):
    hidden = multiple
    while FFN(hidden).params(width) < FFN(dense_hidden, gated=False).params(width):
        hidden += multiple
    return hidden


def mla(
    width,
    heads,
    q_rank,
    kv_rank,
    nope_dim,
    rope_dim,
    v_dim,
    norms=True,
    rope_each=1,
    v_from="v",
):
    v = v_dim if v_from == "v" else nope_dim
    count = q_rank * (width + heads * (nope_dim + rope_dim))
    count += (
        (kv_rank + rope_each * rope_dim) * width
        + heads * (nope_dim + v) * kv_rank
        + width * heads * v
    )
    return count + norms * (q_rank + kv_rank)


def mla_by_rows(width, heads, q_rank, kv_rank, nope_dim, rope_dim, v_dim):
    per_head = (
        q_rank * (nope_dim + rope_dim) + kv_rank * (nope_dim + v_dim) + v_dim * width
    )
    return heads * per_head + (q_rank + kv_rank + rope_dim) * width + q_rank + kv_rank


def mla_package(width, **shape):
    return MLA(**shape).params(width)


def moe(
    width, layers, vocab, heads, kv_heads, head_dim, first_dense, dense_hidden, expert_hidden, experts, k, shared,
    embeddings=2, active_router=False, shared_scaled=False, ignore_dense=False, final_norm=1,
):  # fmt: skip
    total = active = embeddings * vocab * width + final_norm * width
    for layer in range(layers):
        common = 2 * width * head_dim * (heads + kv_heads) + 2 * width
        total += common
        active += common
        if layer < first_dense and not ignore_dense:
            total += 3 * width * dense_hidden
            active += 3 * width * dense_hidden
            continue
        expert = 3 * width * expert_hidden
        total += experts * (expert + width) + shared * expert
        active += k * expert + (k if active_router else experts) * width
        active += 0 if shared_scaled else shared * expert
    return total, active


def moe_at_least_one_sparse(**case):
    return moe(**case | {"first_dense": min(case["first_dense"], case["layers"] - 1)})


def moe_package(
    width, layers, vocab, heads, kv_heads, head_dim, first_dense, dense_hidden, expert_hidden, experts, k, shared
):  # fmt: skip
    spec = ModelSpec(
        "answer", layers, width, vocab, GQA(heads, kv_heads, head_dim), FFN(dense_hidden),
        RoutedExperts(experts, k, FFN(expert_hidden), FFN(shared * expert_hidden) if shared else None),
        first_dense=first_dense,
    )  # fmt: skip
    return spec.total_params(), spec.active_params()


def active_package(total, active, experts, k, new_k):
    for spec in zoo.values():
        if spec.total_params() == total:
            return spec.active_params()
    return active + (new_k - k) * ((total - active) // (experts - k))


FIGURES = ["total", "active", "total", "active", "total", "neither"]
QUESTIONS = [
    "size of the checkpoint on disk",
    "FLOPs to process one token",
    "memory the weights need on the accelerators",
    "weights read from memory to decode one token of one user",
    "optimiser state when every weight is trained",
    "whether it answers better than another model",
]
THREE = "counts all three matrices"
SMALLEST = "is the smallest multiple with at least as many weights"
GROUPED = "counts the four projections of grouped heads"
MATRICES = "counts the five matrices"
STORED = "counts what is stored when every layer is sparse"
DENSE_FIRST = "counts dense first layers and shared experts"
ONE_TOKEN = "counts what one token meets"
SMALLER_K = "finds the active parameters at a smaller k"
SIX = "answers all six questions"

WRONG = {
    "01.1": [
        ("two matrices", lambda width, hidden, bias=False: 2 * width * hidden, THREE),
        ("a constant", lambda width, hidden, bias=False: 176_160_768, THREE),
        ("a float", lambda width, hidden, bias=False: 3.0 * width * hidden + bias * (2 * hidden + width), THREE),
        ("no biases", lambda width, hidden, bias=False: 3 * width * hidden, "adds one bias per output of each matrix"),
        (
            "a bias of F for the down projection too",
            lambda width, hidden, bias=False: 3 * width * hidden + bias * 3 * hidden,
            "adds one bias per output of each matrix",
        ),
        (PACKAGE, lambda width, hidden, bias=False: FFN(hidden, bias=bias).params(width), THREE),
    ],
    "01.2": [
        ("rounds down", lambda width, dense_hidden, multiple: 2 * dense_hidden // 3 // multiple * multiple, SMALLEST),
        ("no rounding", lambda width, dense_hidden, multiple: -(-2 * dense_hidden // 3), SMALLEST),
        ("as wide as before", lambda width, dense_hidden, multiple: -(-dense_hidden // multiple) * multiple, SMALLEST),
        ("LLaMA's own code", matched_llama, SMALLEST),
        (
            "two thirds as a float, then rounded up",
            lambda width, dense_hidden, multiple: ceil(dense_hidden * (2 / (3 * multiple))) * multiple,
            "adds nothing where the budget is met exactly",
        ),
        ("one too many where it divides", matched_float, "adds nothing where the budget is met exactly"),
        (PACKAGE, matched_package, SMALLEST),
    ],
    "01.3": [
        ("multi-head attention", lambda width, heads, kv_heads, head_dim: 4 * width * heads * head_dim, GROUPED),
        (
            "head_dim taken to be width / heads",
            lambda width, heads, kv_heads, head_dim: 2 * width * width + 2 * width * kv_heads * (width // heads),
            GROUPED,
        ),
        (
            "no output projection",
            lambda width, heads, kv_heads, head_dim: width * head_dim * (heads + 2 * kv_heads),
            GROUPED,
        ),
        (
            "one kv projection where kv_heads = 1",
            lambda width, heads, kv_heads, head_dim: (
                2 * width * head_dim * heads + width * head_dim * (2 * kv_heads if kv_heads > 1 else 1)
            ),
            "also at kv_heads = heads and kv_heads = 1",
        ),
        (PACKAGE, lambda width, heads, kv_heads, head_dim: GQA(heads, kv_heads, head_dim).params(width), GROUPED),
    ],
    "01.4": [
        ("no norms", lambda **case: mla(**case, norms=False), "counts the norms on the two latents"),
        ("a rotary key per head", lambda **case: mla(**case, rope_each=case["heads"]), MATRICES),
        ("no rotary key", lambda **case: mla(**case, rope_each=0), MATRICES),
        ("values as wide as keys", lambda **case: mla(**case, v_from="nope"), MATRICES),
        (PACKAGE, mla_package, MATRICES),
    ],
    "01.5": [
        ("one embedding", lambda **case: moe(**case, embeddings=1), STORED),
        ("no final norm", lambda **case: moe(**case, final_norm=0), STORED),
        ("only the total", lambda **case: moe(**case)[0], STORED),
        ("every layer sparse", lambda **case: moe(**case, ignore_dense=True), DENSE_FIRST),
        ("router rows of selected experts only", lambda **case: moe(**case, active_router=True), ONE_TOKEN),
        ("at least one sparse layer", moe_at_least_one_sparse, DENSE_FIRST),
        ("the total twice", lambda **case: (moe(**case)[0],) * 2, ONE_TOKEN),
        ("shared experts not active", lambda **case: moe(**case, shared_scaled=True), ONE_TOKEN),
        (
            "active = total k / experts",
            lambda **case: (moe(**case)[0], moe(**case)[0] * case["k"] // case["experts"]),
            ONE_TOKEN,
        ),
        (PACKAGE, moe_package, STORED),
    ],
    "01.6": [
        (
            "total k / experts",
            lambda total, active, experts, k, new_k: total * new_k // experts,
            SMALLER_K,
        ),
        (
            "a share of the difference, cut off",
            lambda total, active, experts, k, new_k: int(active + (new_k - k) / (experts - k) * (total - active)),
            SMALLER_K,
        ),
        ("scaled active", lambda total, active, experts, k, new_k: active * new_k // k, SMALLER_K),
        (
            "through floats",
            lambda total, active, experts, k, new_k: active + (new_k - k) * (total - active) / (experts - k),
            SMALLER_K,
        ),
        (
            "never above what is active now",
            lambda total, active, experts, k, new_k: active + min(0, new_k - k) * ((total - active) // (experts - k)),
            "and at a larger one, up to every expert",
        ),
        (PACKAGE, active_package, SMALLER_K),
    ],
    "01.7": [
        ("all total", lambda question: "total", SIX),
        ("all active", lambda question: "active", SIX),
        ("memory follows active", lambda question: "active" if "memory" in question else "total", SIX),
        ("more is better", lambda question: dict(zip(QUESTIONS, [*FIGURES[:5], "total"], strict=True))[question], SIX),
        ("another vocabulary", lambda question: question.upper(), SIX),
        (PACKAGE, lambda question: ("total", zoo["grok-1"].total_params())[0], SIX),
    ],
}  # fmt: skip

RIGHT = {
    "01.1": [
        swiglu_loop,
        lambda width, hidden, bias=False: (
            (width + bias) * hidden * 2 + (hidden + bias) * width
        ),
    ],
    "01.2": [
        matched_search,
        lambda width, dense_hidden, multiple: (
            ceil(Fraction(2 * dense_hidden, 3 * multiple)) * multiple
        ),
    ],
    "01.3": [
        lambda width, heads, kv_heads, head_dim: (
            2 * width * head_dim * (heads + kv_heads)
        ),
        lambda width, heads, kv_heads, head_dim: sum(
            n * head_dim * width for n in (heads, kv_heads, kv_heads, heads)
        ),
    ],
    "01.4": [mla, mla_by_rows],
    "01.5": [
        moe,
        lambda **case: tuple(
            2 * case["width"] * case["vocab"]
            + (2 * case["layers"] + 1) * case["width"]
            + 2
            * case["layers"]
            * case["width"]
            * case["head_dim"]
            * (case["heads"] + case["kv_heads"])
            + 3 * case["width"] * case["first_dense"] * case["dense_hidden"]
            + (case["layers"] - case["first_dense"])
            * case["width"]
            * (case["experts"] + 3 * case["expert_hidden"] * (n + case["shared"]))
            for n in (case["experts"], case["k"])
        ),
    ],
    "01.6": [
        lambda total, active, experts, k, new_k: (
            total - (experts - new_k) * ((total - active) // (experts - k))
        ),
        lambda total, active, experts, k, new_k: int(
            active + Fraction(total - active, experts - k) * (new_k - k)
        ),
    ],
    "01.7": [
        lambda question: dict(zip(QUESTIONS, FIGURES, strict=True))[question],
        lambda question: (
            "neither"
            if "better" in question
            else "active"
            if "one token" in question
            else "total"
        ),
    ],
}
