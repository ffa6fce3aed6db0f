"""What crosses between judge and worker: exact, bounded, and nothing that was sent by an enemy does harm."""

from __future__ import annotations

import gc
import json
import math
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_course.grading import wire
from moe_course.grading.wire import Opaque, WireError, decode, encode

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner)
    ),
    max_leaves=20,
)


def there_and_back(value):
    blobs = []
    header_and_body = wire.pack({"value": encode(value, blobs)}, blobs)
    header = header_and_body[: wire.HEADER.size]
    message, raw = wire.unpack(header, header_and_body[wire.HEADER.size :])
    return decode(message["value"], raw)


def identical(a, b):
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return a == b or (math.isnan(a) and math.isnan(b))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(identical, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(identical(a[k], b[k]) for k in a)
    return a == b


@given(plain)
def test_plain_values_come_back_with_their_types(value):
    assert identical(there_and_back(value), value)


@given(
    st.sampled_from(wire.DTYPES),
    st.lists(st.integers(0, 4), max_size=4),
    st.integers(0, 99),
)
def test_tensors_come_back_bit_by_bit(dtype, shape, seed):
    torch.manual_seed(seed)
    tensor = (10 * torch.randn(shape)).to(getattr(torch, dtype))
    back = there_and_back((tensor.mT if len(shape) > 1 else tensor, [tensor]))
    assert torch.equal(back[0], tensor.mT if len(shape) > 1 else tensor)
    assert back[1][0].dtype == tensor.dtype
    assert back[1][0].shape == tensor.shape


class Liar(int):
    def __eq__(self, other):
        return True

    __hash__ = int.__hash__


class LyingTensor(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "value",
    [
        Liar(3),
        {1, 2},
        object(),
        torch.zeros(3).to_sparse(),
        torch.zeros(3, device="meta"),
        torch.zeros(3).as_subclass(LyingTensor),
        type("S", (str,), {})("x"),
        type("L", (list,), {})([1]),
    ],
)
def test_what_is_not_plain_arrives_as_a_name_equal_to_nothing(value):
    back = there_and_back(value)
    assert type(back) is Opaque
    assert back != value
    assert back != 3


def test_requires_grad_is_told():
    blobs, wanted = [], []
    coded = encode([torch.ones(2), torch.ones(2, requires_grad=True)], blobs)
    back = decode(coded, memoryview(b"".join(blobs)), wants_grad=wanted)
    assert len(wanted) == 1
    assert wanted[0] is back[1]


def cyclic():
    x = []
    x.append(x)
    return x


def deep():
    x = []
    for _ in range(10_000):
        x = [x]
    return x


@pytest.mark.parametrize(
    "value",
    [
        cyclic(),
        deep(),
        1 << 20_000,
        "x" * (wire.LONGEST_TEXT + 1),
        torch.zeros(1).expand(2**30),
    ],
    ids=["cyclic", "deep", "number", "text", "tensor"],
)
def test_what_is_too_large_is_refused(value):
    with pytest.raises(WireError):
        encode(value, [])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=12,
)
kinds = st.sampled_from(
    [
        "none",
        "bool",
        "int",
        "float",
        "str",
        "list",
        "tuple",
        "dict",
        "tensor",
        "opaque",
        "object",
        "callback",
        "x",
    ]
)
coded_values = st.recursive(
    st.tuples(kinds, json_values).map(list) | json_values,
    lambda inner: st.tuples(kinds, st.lists(inner, max_size=4)).map(list),
    max_leaves=8,
)


@given(coded_values, st.binary(max_size=64))
def test_nonsense_is_a_wire_error_or_a_plain_value(coded, raw):
    try:
        value = decode(coded, memoryview(raw))
    except WireError:
        return
    assert type(value) in (
        *(type(None), bool, int, float, str),
        *(list, tuple, dict, Opaque, torch.Tensor),
    )


@given(
    st.lists(
        st.tuples(
            st.sampled_from(wire.DTYPES),
            st.lists(st.integers(-2, 2**41), max_size=3),
            st.integers(-5, 2**50),
        ),
        max_size=2,
    ),
    st.binary(max_size=64),
)
def test_a_tensor_never_reads_past_what_was_sent(tensors, raw):
    coded = ["list", [["tensor", d, shape, size, False] for d, shape, size in tensors]]
    try:
        value = decode(coded, memoryview(raw))
    except WireError:
        return
    assert sum(t.nbytes for t in value) <= len(raw)


@given(st.binary(max_size=200), st.integers(0, 2**63), st.integers(0, 2**32 - 1))
def test_any_bytes_are_a_message_or_an_error(body, size, text):
    try:
        message, _ = wire.unpack(wire.HEADER.pack(size, text), body)
    except WireError:
        return
    assert isinstance(message, dict)


def test_deep_json_is_an_error_not_a_crash():
    body = b"[" * 100_000
    with pytest.raises(WireError):
        wire.unpack(wire.HEADER.pack(len(body), len(body)), body)
    coded = json.loads("[" * 900 + "]" * 900)
    with pytest.raises(WireError):
        decode(coded, memoryview(b""))


def test_nothing_of_a_message_waits_for_the_garbage_collector():
    blobs = []
    coded = wire.encode([torch.ones(3, requires_grad=True)], blobs)
    gc.collect()
    gc.disable()
    try:
        needing = []
        (tensor,) = wire.decode(coded, memoryview(b"".join(blobs)), None, needing)
        gone = weakref.ref(tensor)
        del tensor, needing
        assert gone() is None
    finally:
        gc.enable()
