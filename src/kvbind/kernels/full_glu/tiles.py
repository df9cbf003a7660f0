"""Tiles of tokens and matrices inside kernels, and products that keep to float16's range."""

import triton
import triton.language as tl

ALL, WRITE, READ = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""What a launch does: the whole, or one half for one part of the tokens."""


@triton.jit
def narrowed(x, dtype: tl.constexpr):
    """Float32 `x` in `dtype`, and by what it was divided first: 1 unless `dtype` has too little range."""
    scale = tl.full((), 1.0, tl.float32)
    if dtype == tl.float16:
        largest = tl.max(tl.abs(x))
        scale = tl.where(largest > 0.0, largest, scale)
        x = x / scale
    return x.to(dtype), scale


@triton.jit
def add_write(acc, x, y, PRECISION: tl.constexpr):
    """`acc + x^T y` for operands `x` and float32 `y`."""
    narrow, scale = narrowed(y, x.dtype)
    if x.dtype == tl.float16:
        acc += scale * tl.dot(tl.trans(x), narrow)
    else:
        acc = tl.dot(tl.trans(x), narrow, acc, input_precision=PRECISION)
    return acc


@triton.jit
def add_back(acc, y, w, w_scale, PRECISION: tl.constexpr):
    """`acc + y (w_scale w)^T` for float32 `y` and operands `w`."""
    narrow, scale = narrowed(y, w.dtype)
    if w.dtype == tl.float16:
        acc += scale * w_scale * tl.dot(narrow, tl.trans(w))
    else:
        acc = tl.dot(narrow, tl.trans(w), acc, input_precision=PRECISION)
    return acc


@triton.jit
def token_tile(x, start, stop, row, WIDTH: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr):
    """Where a tile of tokens from `start` lies, and which of it is there."""
    rows, columns = tl.arange(0, TILE), tl.arange(0, COLUMNS)
    there = (rows < stop - start)[:, None]
    if WIDTH != COLUMNS:
        there = there & (columns < WIDTH)[None, :]
    # offsets inside a tile are small and the same for all: only its start needs 64 bits
    return x + (tl.zeros((), tl.int64) + start) * row + (rows[:, None] * row + columns[None, :]), there


@triton.jit
def matrix_tile(x, row, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Where a matrix lies, and which of its padded tile is there."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    return x + rows[:, None] * row + columns[None, :], (rows < HEIGHT)[:, None] & (columns < WIDTH)[None, :]


@triton.jit
def rate_column(rate, start, stop, row, TILE: tl.constexpr):
    """The rates of a tile of tokens, as a column."""
    rows = tl.arange(0, TILE)
    return tl.load(rate + (tl.zeros((), tl.int64) + start) * row + rows * row, mask=rows < stop - start, other=0.0)[:, None]


@triton.jit
def column_norms(x):
    """The norm of each column, whatever its magnitude."""
    largest = tl.max(tl.abs(x), axis=0)
    scale = tl.where(largest > 0.0, largest, 1.0)
    x = x / scale[None, :]
    return scale * tl.sqrt(tl.sum(x * x, axis=0))
