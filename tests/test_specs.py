"""ModelSpec against the list of its weight tensors, written out one by one."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_course.specs import FFN, GQA, MLA, ModelSpec, RoutedExperts

SIZE = st.integers(1, 9)
FLAG = st.booleans()
FFNS = st.builds(FFN, SIZE, gated=FLAG, bias=FLAG)


@st.composite
def _gqa(draw) -> GQA:
    kv_heads = draw(SIZE)
    qk_norm = draw(st.sampled_from(["none", "head", "full"]))
    return GQA(
        kv_heads * draw(SIZE),
        kv_heads,
        draw(SIZE),
        draw(FLAG),
        draw(FLAG),
        qk_norm,
        draw(FLAG),
    )


@st.composite
def _experts(draw) -> RoutedExperts:
    experts = draw(st.integers(1, 8))
    shared = draw(st.none() | FFNS)
    gate = shared is not None and draw(FLAG)
    return RoutedExperts(
        experts, draw(st.integers(1, experts)), draw(FFNS), shared, gate, draw(FLAG)
    )


MLAS = st.builds(MLA, SIZE, st.none() | SIZE, SIZE, SIZE, SIZE, SIZE, FLAG)
SPECS = st.builds(
    ModelSpec,
    name=st.just("random"),
    layers=SIZE,
    width=SIZE,
    vocab=SIZE,
    attention=_gqa() | MLAS,
    ffn=FFNS,
    moe=st.none() | _experts(),
    first_dense=st.integers(0, 10),
    moe_every=st.integers(1, 4),
    dense_layers=st.lists(st.integers(0, 9), max_size=3).map(tuple),
    norms_per_layer=st.integers(0, 4),
    tied_embeddings=FLAG,
)
SPARSE_SPECS = SPECS.filter(lambda spec: spec.moe is not None)


def _attention_shapes(a: GQA | MLA, d: int) -> Iterator[tuple[int, ...]]:
    if isinstance(a, GQA):
        yield from [
            (a.heads, a.head_dim, d),
            (a.kv_heads, a.head_dim, d),
            (a.kv_heads, a.head_dim, d),
        ]
        yield (d, a.heads, a.head_dim)
        if a.qkv_bias:
            yield from [
                (a.heads, a.head_dim),
                (a.kv_heads, a.head_dim),
                (a.kv_heads, a.head_dim),
            ]
        if a.out_bias:
            yield (d,)
        if a.qk_norm == "head":
            yield from [(a.head_dim,), (a.head_dim,)]
        if a.qk_norm == "full":
            yield from [(a.heads, a.head_dim), (a.kv_heads, a.head_dim)]
        if a.sinks:
            yield (a.heads,)
        return
    if a.q_rank is None:
        yield (a.heads, a.nope_dim + a.rope_dim, d)
    else:
        yield from [
            (a.q_rank, d),
            (a.q_rank,),
            (a.heads, a.nope_dim + a.rope_dim, a.q_rank),
        ]
    yield from [
        (a.kv_rank + a.rope_dim, d),
        (a.kv_rank,),
        (a.heads, a.nope_dim + a.v_dim, a.kv_rank),
    ]
    yield (d, a.heads, a.v_dim)
    if a.bias:
        yield from [(a.kv_rank + a.rope_dim,), (d,)]
        if a.q_rank is not None:
            yield (a.q_rank,)


def _ffn_shapes(f: FFN, d: int) -> Iterator[tuple[int, ...]]:
    for _ in ("gate", "up") if f.gated else ("up",):
        yield (f.hidden, d)
        if f.bias:
            yield (f.hidden,)
    yield (d, f.hidden)
    if f.bias:
        yield (d,)


def _tensors(s: ModelSpec) -> Iterator[tuple[str, bool, tuple[int, ...]]]:
    """Every weight tensor of a model: component, whether one token meets it, shape."""
    d = s.width
    yield "input_embedding", True, (s.vocab, d)
    for layer in range(s.layers):
        for shape in _attention_shapes(s.attention, d):
            yield "attention", True, shape
        for _ in range(s.norms_per_layer):
            yield "norms", True, (d,)
        moe = s.moe
        if (
            moe is None
            or layer < s.first_dense
            or layer % s.moe_every != s.moe_every - 1
            or layer in s.dense_layers
        ):
            for shape in _ffn_shapes(s.ffn, d):
                yield "dense_ffn", True, shape
            continue
        for expert in range(moe.experts):
            for shape in _ffn_shapes(moe.expert, d):
                yield "experts", expert < moe.k, shape
        for shape in _ffn_shapes(moe.shared, d) if moe.shared else ():
            yield "shared", True, shape
        if moe.shared_gate:
            yield "shared", True, (1, d)
        yield "router", True, (moe.experts, d)
        if moe.router_bias:
            yield "router", True, (moe.experts,)
    yield "norms", True, (d,)
    if not s.tied_embeddings:
        yield "output_head", True, (s.vocab, d)


def _with_k(spec: ModelSpec, k: int) -> ModelSpec:
    return dataclasses.replace(spec, moe=dataclasses.replace(spec.moe, k=k))


@given(SPECS)
def test_counts_equal_the_list_of_tensors(spec):
    total, active = Counter(), Counter()
    for component, met, shape in _tensors(spec):
        total[component] += math.prod(shape)
        active[component] += met * math.prod(shape)
    assert {name: tuple(count) for name, count in spec.breakdown().items()} == {
        name: (total[name], active[name]) for name in spec.breakdown()
    }
    assert set(total) <= set(spec.breakdown())
    assert (spec.total_params(), spec.active_params()) == (
        total.total(),
        active.total(),
    )
    assert type(spec.total_params()) is int
    assert type(spec.active_params()) is int


@given(SPECS)
def test_totals_are_the_sum_of_the_breakdown(spec):
    counts = spec.breakdown().values()
    assert all(type(n) is int and n >= 0 for count in counts for n in count)
    assert spec.total_params() == sum(count.total for count in counts)
    assert spec.active_params() == sum(count.active for count in counts)


@given(SPARSE_SPECS)
def test_k_changes_only_what_is_active(spec):
    by_k = [_with_k(spec, k) for k in range(1, spec.moe.experts + 1)]
    assert {s.total_params() for s in by_k} == {spec.total_params()}
    assert by_k[-1].active_params() == spec.total_params()
    active = [s.active_params() for s in by_k]
    step = len(spec.moe_layers) * sum(
        math.prod(shape) for shape in _ffn_shapes(spec.moe.expert, spec.width)
    )
    assert active == [
        spec.total_params() - (spec.moe.experts - s.moe.k) * step for s in by_k
    ]
    assert active == sorted(active)
    assert len(set(active)) == len(active) or step == 0


@given(SPECS)
def test_a_dense_model_is_all_active(spec):
    dense = dataclasses.replace(spec, moe=None)
    assert dense.active_params() == dense.total_params()
    assert dense.moe_layers == ()


@given(SPECS)
def test_leaving_out_the_embedding_takes_it_off_unless_it_is_the_head_too(spec):
    off = spec.active_params() - spec.active_params(include_embedding=False)
    assert off == (0 if spec.tied_embeddings else spec.vocab * spec.width)


@pytest.mark.parametrize(
    ("options", "sparse"),
    [
        ({}, (0, 1, 2, 3, 4, 5)),
        ({"first_dense": 3}, (3, 4, 5)),  # DeepSeek-V3
        ({"moe_every": 2}, (1, 3, 5)),  # GShard, Llama 4 Maverick
        ({"first_dense": 2, "moe_every": 3}, (2, 5)),
        ({"dense_layers": (0, 5)}, (1, 2, 3, 4)),
        ({"first_dense": 6}, ()),
    ],
)
def test_which_layers_are_sparse(options, sparse):
    spec = ModelSpec(
        "m",
        6,
        4,
        8,
        GQA(2, 1, 2),
        ffn=FFN(4),
        moe=RoutedExperts(4, 2, FFN(4)),
        **options,
    )
    assert spec.moe_layers == sparse


GOOD = {
    GQA: {"heads": 4, "kv_heads": 2, "head_dim": 8},
    MLA: {
        "heads": 4,
        "q_rank": 3,
        "kv_rank": 2,
        "nope_dim": 4,
        "rope_dim": 2,
        "v_dim": 4,
    },
    FFN: {"hidden": 16},
    RoutedExperts: {"experts": 4, "k": 2, "expert": FFN(4)},
    ModelSpec: {
        "name": "m",
        "layers": 2,
        "width": 8,
        "vocab": 9,
        "attention": GQA(2, 2, 4),
        "ffn": FFN(4),
    },
}
SIZES = [
    (cls, field)
    for cls, good in GOOD.items()
    for field, value in good.items()
    if type(value) is int
]
SIZES += [(ModelSpec, "moe_every")]
FLAGS = [
    (cls, f.name) for cls in GOOD for f in dataclasses.fields(cls) if f.default is False
]


@pytest.mark.parametrize("bad", [0, -3, 2.0, True, "12"])
@pytest.mark.parametrize(("cls", "field"), SIZES)
def test_a_size_that_is_no_positive_integer_is_refused(cls, field, bad):
    with pytest.raises(
        ValueError, match=rf"{cls.__name__}\.{field} must .*got {bad!r}"
    ):
        cls(**GOOD[cls] | {field: bad})


@pytest.mark.parametrize("bad", ["false", 2, 0, None])
@pytest.mark.parametrize(("cls", "field"), [*FLAGS, (FFN, "gated")])
def test_a_flag_that_is_no_bool_is_refused(cls, field, bad):
    with pytest.raises(
        ValueError, match=rf"{cls.__name__}\.{field} must .*got {bad!r}"
    ):
        cls(**GOOD[cls] | {field: bad})


@pytest.mark.parametrize(
    ("cls", "changes", "message"),
    [
        (
            GQA,
            {"heads": 6, "kv_heads": 4},
            r"heads \(6\) must be a multiple of kv_heads \(4\)",
        ),
        (GQA, {"qk_norm": "rms"}, "qk_norm must be .*'rms'"),
        (RoutedExperts, {"k": 5}, r"k \(5\) must not exceed .*\(4\)"),
        (RoutedExperts, {"shared_gate": True}, "shared_gate needs a shared expert"),
        (ModelSpec, {"ffn": None}, "2 of 2 layers are dense"),
        (
            ModelSpec,
            {"ffn": None, "moe": RoutedExperts(4, 2, FFN(4)), "first_dense": 1},
            "1 of 2 layers are dense",
        ),
        (ModelSpec, {"first_dense": -1}, "first_dense must .*-1"),
        (ModelSpec, {"norms_per_layer": 2.5}, r"norms_per_layer must .*2\.5"),
        (
            ModelSpec,
            {"dense_layers": ("1",)},
            "dense_layers must hold layer indices, got",
        ),
        (ModelSpec, {"attention": None}, "attention must be GQA.*got None"),
        (ModelSpec, {"ffn": 16}, r"ffn must be FFN\(...\), got 16"),
        (ModelSpec, {"moe": FFN(4)}, "moe must be RoutedExperts.*got FFN"),
        (RoutedExperts, {"expert": 16}, r"expert must be FFN\(...\), got 16"),
        (RoutedExperts, {"shared": 16}, r"shared must be FFN\(...\), got 16"),
    ],
)
def test_contradictory_shapes_are_refused(cls, changes, message):
    with pytest.raises(ValueError, match=message):
        cls(**GOOD[cls] | changes)


def test_a_fully_sparse_model_needs_no_dense_ffn():
    spec = ModelSpec(
        **GOOD[ModelSpec] | {"ffn": None, "moe": RoutedExperts(4, 2, FFN(4))}
    )
    assert spec.breakdown()["dense_ffn"] == (0, 0)


def _python(code: str, root, *options: str) -> str:
    done = subprocess.run(
        [sys.executable, *options, "-c", code],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_specs_need_only_the_standard_library(root):
    # -S: no site-packages, so that anything but the standard library is missing. The browser has no more.
    code = "import moe_course.specs as s; print(s.zoo['mixtral-8x7b'].total_params())"
    assert _python(code, root, "-S") == "46702792704\n"


def test_importing_the_package_is_cheap(root):
    code = (
        "import time, sys; t = time.perf_counter(); import moe_course; print(time.perf_counter() - t);"
        "assert not {'torch', 'numpy', 'moe_course.layers'} & set(sys.modules)"
    )
    seconds = min(float(_python(code, root)) for _ in range(5))
    assert seconds < 0.050
