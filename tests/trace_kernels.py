"""Small kernels that test_trace.py watches: triton reads the source of a kernel from its file."""

import numpy as np

from moe_course.grading.interpreter import tl, triton


@triton.jit
def copy(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < n), mask=at < n)


@triton.jit
def copy_all(x, y, BLOCK: tl.constexpr):
    """Without a mask."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at))


@triton.jit
def shifted(x, y, shift, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at + shift))


@triton.jit
def row_sums(x, y, D, OTHER: tl.constexpr, BLOCK: tl.constexpr):
    row, d = tl.program_id(0), tl.arange(0, BLOCK)
    other = 0.0 if OTHER else None
    v = tl.load(x + row * D + d, mask=d < D, other=other)
    tl.store(y + row, tl.sum(v, axis=0))


@triton.jit
def scalar(x, y, zero: tl.constexpr):
    """A masked load of one element."""
    nothing = tl.program_id(0) < 0
    if zero:
        tl.store(y, tl.load(x, mask=nothing, other=0.0))
    else:
        tl.store(y, tl.load(x, mask=nothing))


@triton.jit
def same_place(y, BLOCK: tl.constexpr):
    """Every program stores the same elements."""
    at = tl.arange(0, BLOCK)
    tl.store(y + at, tl.program_id(0) + at * 0)


@triton.jit
def chain(y):
    """Each program reads what the one before has stored."""
    i = tl.program_id(0)
    before = tl.load(y + i - 1, mask=i > 0, other=0)
    tl.store(y + i, before + 1)


@triton.jit
def from_the_next(x, y, BLOCK: tl.constexpr):
    """Each program loads the block of x that the next one stores."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at + BLOCK))
    tl.store(x + at, tl.load(x + at))


@triton.jit
def column_sums(x, y, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    c = tl.arange(0, COLUMNS)
    value = tl.load(x + tl.arange(0, ROWS)[:, None] * COLUMNS + c[None, :])
    tl.store(y + c, tl.sum(value, axis=0))


SIZE = 4
FIXED = tl.constexpr(4)


def plain(x):
    return x + 1


@triton.jit
def helper(x):
    return plain(x) if SIZE else x


@triton.jit
def foreign(x, y):
    at = tl.arange(0, FIXED)
    sizes = {"one": 1}
    value = helper(tl.load(x + at)) * sizes["one"]
    for _ in range(3):
        value.handle.data = np.abs(value.handle.data)
        break
    tl.store(y + at, value + sum((0, 0)))


@triton.jit
def known(x, y, n: tl.constexpr = SIZE):
    """All of this is Triton's."""
    parts = [tl.load(x + i) for i in tl.static_range(n)]
    first, *_rest = 0, 1
    assert n > 0, f"{n} numbers"
    for i in range(first, max(n, 1)):
        if i % 2 == 0 and not (i > 8):
            tl.store(y + i, parts[0] if n == 1 else tl.load(x + i))
        else:
            pass
    while first < 1:
        first += 1


@triton.jit
def grid_numbers(y, X: tl.constexpr, Y: tl.constexpr):
    a, b, c = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tl.store(y + a + X * (b + Y * c), 1)


@triton.jit
def add_up(x, y, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(y, tl.sum(tl.load(x + at), axis=0))


@triton.jit
def swap(flag):
    tl.atomic_cas(flag, 0, 7)


@triton.jit
def product(x, y, z, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(x + m[:, None] * K + k[None, :])
    b = tl.load(y + k[:, None] * N + n[None, :])
    tl.store(z + m[:, None] * N + n[None, :], tl.dot(a, b))


@triton.jit
def columns(x, y, R, stride, BLOCK: tl.constexpr):
    """One column of a matrix."""
    r = tl.arange(0, BLOCK)
    v = tl.load(x + r * stride + tl.program_id(0), mask=r < R)
    tl.store(y + tl.program_id(0) * R + r, v, mask=r < R)


@triton.jit
def pick(x, y, index, stride, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    at = tl.arange(0, BLOCK)
    i = tl.load(index)
    if WIDE:
        i = i.to(tl.int64)
    tl.store(y + at, tl.load(x + i * stride + at))


@triton.jit
def block_pointers(x, y, R, C, BLOCK: tl.constexpr):
    shape = (BLOCK, BLOCK)
    source = tl.make_block_ptr(x, (R, C), (C, 1), (0, 0), shape, (1, 0))
    target = tl.make_block_ptr(y, (R, C), (C, 1), (0, 0), shape, (1, 0))
    v = tl.load(source, boundary_check=(0, 1), padding_option="zero")
    tl.store(target, v, boundary_check=(0, 1))


@triton.jit
def descriptors(x, y, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    at = tl.program_id(0) * ROWS
    y.store([at, 0], x.load([at, 0]))


@triton.jit
def fails(x, y):
    tl.store(y, tl.load(x) + 1)
    raise ValueError("of its own")
