"""Matrix products over equal chunks, their operands fetched by the tensor memory accelerator (compute capability 9.0 up).

The same products as in `kvbind.kernels.chunked.span_products`, for sequences that all have the same length and chunks that
all have the same. Tiles need no tables then: a persistent grid, a block or two to a multiprocessor, walks over them and
stores one tile while it fetches the next. Its step is a constant of the kernel, the number of tiles, which grows with a
sequence, is not. Tokens are `[B, T, H, D]` views of any strides (the last axis contiguous, the others multiples of 16
bytes), so that neither layout of heads and tokens is copied. Rows past the last read as zeros and are not stored.

Operands are bfloat16 or float16, sums float32. Each function of this module binds a launch
(`kvbind.kernels.launching.bound_kernel`) to shapes and strides; its docstring says which tensors the launch takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvbind.kernels.common.activations import activate, slope
from kvbind.kernels.common.devices import capability, interpreted, multiprocessors, shared_memory
from kvbind.kernels.common.operands import cdiv, power_of_2
from kvbind.kernels.launching.bound_kernel import BoundKernel, View

LEAST_CAPABILITY = (9, 0)
"""Compute capability of the first devices with a tensor memory accelerator."""

LEAST_SHARED = 227 << 10
"""Bytes of shared memory to a block, which tiles are sized for; some devices with the accelerator have less than half."""

DEPTH = 64
"""Channels, or tokens, of one step of a product; chunks and hidden widths are multiples of it."""


class TokenRows(NamedTuple):
    """Tokens `[B, T, H, D]` without their numbers.

    Attributes:
        shape: B, T, H, D.
        strides: of those axes, in elements; the last is 1.
    """

    shape: Sequence[int]
    strides: Sequence[int]

    @staticmethod
    def of(x: Tensor) -> TokenRows:
        """Those of a tensor."""
        return TokenRows(tuple(x.shape), x.stride())

    def like(self, width: int) -> TokenRows:
        """As many contiguous tokens of another width."""
        batch, length, heads, _ = self.shape
        return TokenRows((batch, length, heads, width), (length * heads * width, heads * width, width, 1))

    def by_head(self, width: int) -> TokenRows:
        """As many tokens of another width, without gaps, head by head."""
        batch, length, heads, _ = self.shape
        return TokenRows((batch, length, heads, width), (length * heads * width, width, length * width, 1))

    def first(self, length: int) -> TokenRows:
        """The first tokens of each sequence, where they lie."""
        batch, _, heads, width = self.shape
        return TokenRows((batch, length, heads, width), self.strides)

    def empty(self, like: Tensor) -> Tensor:
        """Room for such tokens, of a tensor's dtype and device."""
        return torch.empty_strided(self.shape, self.strides, dtype=like.dtype, device=like.device)

    def view(self, rows: int, columns: int) -> View:
        """In blocks of one head's."""
        (batch, length, heads, width), (b, t, h, _) = self.shape, self.strides
        return View((batch, heads, length, width), (b, h, t, 1), (1, 1, rows, columns))


def matrices(count: int, height: int, width: int, rows: int, columns: int) -> View:
    """Contiguous matrices `[count, height, width]` in blocks of one of them."""
    return View((count, height, width), (height * width, width, 1), (1, rows, columns))


def fits(chunk: int, *tokens: Tensor) -> bool:
    """Whether these products take chunks of this length, and tokens like these `[B, T, H, D]`."""
    x = tokens[0]
    if chunk % DEPTH or x.dtype not in (torch.bfloat16, torch.float16):
        return False
    index = x.device.index
    able = capability(index) >= LEAST_CAPABILITY and shared_memory(index) >= LEAST_SHARED if x.is_cuda else interpreted()
    return able and all(_fetched(x) for x in tokens)


def _fetched(x: Tensor) -> bool:
    # what the accelerator asks of an address and of strides, of 2-byte elements; repeated tokens have strides of zero
    *others, last = x.stride()
    apart = all(s % 8 == 0 and (s > 0 or n == 1) for s, n in zip(others, x.shape, strict=False))
    return last == 1 and x.data_ptr() % 16 == 0 and x.shape[-1] % 16 == 0 and apart


def _rows_of(chunk: int, most: int) -> int:
    # the most rows of a tile, up to `most`, of which a chunk has a whole number
    rows = most
    while chunk % rows:
        rows //= 2
    return rows


@triton.jit
def _tile_of(tile, across: tl.constexpr, down, heads):
    # column tile, row tile, head and sequence; column tiles side by side, so that rows are fetched once
    n = tile % across
    rest = tile // across
    z = rest // down
    return n, rest % down, z % heads, z // heads


@triton.jit
def _put(y, value, b, h, row, column, BM: tl.constexpr, BN: tl.constexpr):
    # a tile's left and right half, which take half the room where they are staged to be stored
    low, high = tl.split(tl.permute(tl.reshape(value.to(y.dtype), (BM, 2, BN // 2)), (0, 2, 1)))
    y.store([b, h, row, column], tl.reshape(low, (1, 1, BM, BN // 2)))
    y.store([b, h, row, column + BN // 2], tl.reshape(high, (1, 1, BM, BN // 2)))


@triton.jit
def _rates_at(rates, b, h, row, length, rate_b, rate_t, rate_h, BM: tl.constexpr):
    tokens = row + tl.arange(0, BM)
    return tl.load(rates + b.to(tl.int64) * rate_b + h * rate_h + tokens * rate_t, mask=tokens < length, other=0.0)


@triton.jit
def _put_dots(partial, dots, b, h, row, n, length, heads, across: tl.constexpr, BM: tl.constexpr):
    tokens = row + tl.arange(0, BM)
    tl.store(partial + ((b.to(tl.int64) * length + tokens) * heads + h) * across + n, dots, mask=tokens < length)


@triton.jit(
    do_not_specialize=[
        "batch",
        "heads",
        "length",
        "chunk",
        "states",
        "by_chunk",
        "by_head",
        "own",
        "rate_b",
        "rate_t",
        "rate_h",
    ]
)
def _product_kernel(
    x, w, y, z, rates, partial, batch, heads, length, chunk, states, by_chunk, by_head, own, rate_b, rate_t, rate_h,
    K: tl.constexpr, N: tl.constexpr, TRANSPOSED: tl.constexpr, RATED: tl.constexpr, DOT: tl.constexpr,
    PROGRAMS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    across: tl.constexpr = (N + BN - 1) // BN
    down = tl.cdiv(length, BM)
    for tile in tl.range(tl.program_id(0), across * down * heads * batch, PROGRAMS, flatten=True):
        n, m, h, b = _tile_of(tile, across, down, heads)
        row = m * BM
        which = b * states * heads + tl.minimum(row // chunk + own, states - 1) * by_chunk + h * by_head
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(0, K, BK):
            left = tl.reshape(x.load([b, h, row, k]), (BM, BK))
            if TRANSPOSED:
                right = tl.trans(tl.reshape(w.load([which, n * BN, k]), (BN, BK)))
            else:
                right = tl.reshape(w.load([which, k, n * BN]), (BK, BN))
            acc = tl.dot(left, right, acc)
        if DOT:
            other = tl.reshape(z.load([b, h, row, n * BN]), (BM, BN)).to(tl.float32)
            _put_dots(partial, tl.sum(acc * other, axis=1), b, h, row, n, length, heads, across, BM)
        if RATED:
            acc *= _rates_at(rates, b, h, row, length, rate_b, rate_t, rate_h, BM)[:, None]
        _put(y, acc, b, h, row, n * BN, BM, BN)


def product(
    x: TokenRows,
    y: TokenRows,
    chunk: int,
    states: int,
    device: Tensor,
    *,
    by_head: bool = False,
    own: bool = False,
    transposed: bool = False,
    rates: Sequence[int] | None = None,
    against: TokenRows | None = None,
) -> BoundKernel:
    """Tokens times their chunk's matrix.

    The launch takes x `[B, T, H, K]`; w `[B, states, H, K, N]`, or `[B, H, states, K, N]` if `by_head`, K and N the other
    way round if `transposed`; where to write
    y `[B, T, H, N]`; z `[B, T, H, N]`, to be multiplied row by row with the result (before `rates`) and summed; rates,
    float32 `[B, T, H]`, that multiply the result; and float32 `[B, T, H, ceil(N / 128)]` for those sums in parts. Any tensor
    stands in for z, rates and sums that are not asked for.

    Args:
        x: what is multiplied.
        y: the result.
        chunk: tokens in a chunk, a multiple of `DEPTH`.
        states: matrices of each sequence; chunk c takes number c, or c + 1 if `own`, and those past the last the last.
        device: a tensor on the device.
        by_head: a head's matrices lie side by side.
        own: chunk c takes the matrix behind it.
        transposed: multiply by the transposes.
        rates: strides of the rates, or None.
        against: z, or None.
    """
    batch, length, heads, inner = x.shape
    width = y.shape[3]
    bm, bn, stages = _rows_of(chunk, 256), 128, 4
    if bm == 256 and against is not None:
        bm = 128
    tiles = cdiv(width, bn) * cdiv(length, bm) * heads * batch
    programs = multiprocessors(device)
    matrix = (batch * states * heads, width, inner) if transposed else (batch * states * heads, inner, width)
    block = (bn, DEPTH) if transposed else (DEPTH, bn)
    views: list[View | None] = [x.view(bm, DEPTH), matrices(*matrix, *block), y.view(bm, bn // 2)]
    views += [None if against is None else against.view(bm, bn), None, None]
    return BoundKernel(
        _product_kernel, views, (min(programs, tiles),),
        (batch, heads, length, chunk, states, *((1, states) if by_head else (heads, 1)), int(own), *(rates or (0, 0, 0))),
        K=inner, N=width, TRANSPOSED=transposed, RATED=rates is not None, DOT=against is not None,
        PROGRAMS=programs, BM=bm, BN=bn, BK=DEPTH, num_warps=4 if bm == 64 else 8, num_stages=stages,
    )  # fmt: skip


@triton.jit(do_not_specialize=["batch", "heads", "chunk", "parts", "by_chunk", "by_head"])
def _write_kernel(
    x, g, y, batch, heads, chunk, parts, by_chunk, by_head,
    M: tl.constexpr, N: tl.constexpr, PROGRAMS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    across: tl.constexpr = (N + BN - 1) // BN
    down: tl.constexpr = (M + BM - 1) // BM
    for tile in tl.range(tl.program_id(0), across * down * parts * heads * batch, PROGRAMS, flatten=True):
        n = tile % across
        m = tile // across % down
        z = tile // (across * down)
        h = z % heads
        c = z // heads % parts
        b = z // heads // parts
        acc = tl.zeros((BM, BN), tl.float32)
        for t in range(0, chunk, BT):
            row = c * chunk + t
            left = tl.trans(tl.reshape(x.load([b, h, row, m * BM]), (BT, BM)))
            acc = tl.dot(left, tl.reshape(g.load([b, h, row, n * BN]), (BT, BN)), acc)
        to = b * parts * heads + c * by_chunk + h * by_head
        low, high = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))
        y.store([to, m * BM, n * BN], tl.reshape(low, (1, BM, BN // 2)))
        y.store([to, m * BM, n * BN + BN // 2], tl.reshape(high, (1, BM, BN // 2)))


def write(x: TokenRows, g: TokenRows, chunk: int, parts: int, device: Tensor, *, by_head: bool = False) -> BoundKernel:
    """The sum over each chunk's tokens of `x^T g`.

    The launch takes x `[B, T, H, M]`, g `[B, T, H, N]` and where to write y, float32 `[B, parts, H, M, N]`, or `[B, H,
    parts, M, N]` if `by_head`.

    Args:
        x: the left factor.
        g: the right one.
        chunk: tokens in a chunk, a multiple of `DEPTH`.
        parts: how many chunks of a sequence; the last may end after the last token.
        device: a tensor on the device.
        by_head: a head's matrices lie side by side.
    """
    batch, _, heads, height = x.shape
    width, bm, bn = g.shape[3], 128, 128
    tiles = cdiv(height, bm) * cdiv(width, bn) * parts * heads * batch
    programs = multiprocessors(device)
    views = [x.view(DEPTH, bm), g.view(DEPTH, bn), matrices(batch * parts * heads, height, width, bm, bn // 2)]
    return BoundKernel(
        _write_kernel, views, (min(programs, tiles),),
        (batch, heads, chunk, parts, *((1, parts) if by_head else (heads, 1))),
        M=height, N=width, PROGRAMS=programs, BM=bm, BN=bn, BT=DEPTH, num_warps=8, num_stages=5,
    )  # fmt: skip


@triton.jit(do_not_specialize=["batch", "heads", "length", "sets", "rate_b", "rate_t", "rate_h"])
def _features_kernel(
    x, w, y, rates, batch, heads, length, sets, rate_b, rate_t, rate_h,
    D: tl.constexpr, F: tl.constexpr, ACTIVATION: tl.constexpr, UP: tl.constexpr, RATED: tl.constexpr,
    PROGRAMS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    across: tl.constexpr = (F + BN - 1) // BN
    down = tl.cdiv(length, BM)
    for tile in tl.range(tl.program_id(0), across * down * heads * batch, PROGRAMS, flatten=True):
        n, m, h, b = _tile_of(tile, across, down, heads)
        row = m * BM
        which = tl.minimum(b, sets - 1) * heads + h
        u, p = tl.zeros((BM, BN), tl.float32), tl.zeros((BM, BN), tl.float32)
        for k in range(0, D, BK):
            left = tl.reshape(x.load([b, h, row, k]), (BM, BK))
            u = tl.dot(left, tl.reshape(w.load([which, k, n * BN]), (BK, BN)), u)
            if UP:
                p = tl.dot(left, tl.reshape(w.load([sets * heads + which, k, n * BN]), (BK, BN)), p)
        value = activate(u, ACTIVATION)
        if UP:
            value *= p
        if RATED:
            value *= _rates_at(rates, b, h, row, length, rate_b, rate_t, rate_h, BM)[:, None]
        _put(y, value, b, h, row, n * BN, BM, BN)


class Theta(NamedTuple):
    """The matrices before the last, as features take them: `[factors, sets, H, D, F]`, contiguous.

    Attributes:
        factors: 2 where there is a second factor, else 1.
        sets: one for each sequence, or one for all.
        hidden: F.
        activation: a name that `kvbind.kernels.common.activations` knows.
    """

    factors: int
    sets: int
    hidden: int
    activation: str


def features(
    x: TokenRows, theta: Theta, device: Tensor, rates: Sequence[int] | None = None, out: TokenRows | None = None
) -> BoundKernel:
    """`rates * act(x W) * (x W_up)`, or without the second factor.

    The launch takes x `[B, T, H, D]`, the matrices in x's dtype, where to write y `[B, T, H, F]`, and rates, float32
    `[B, T, H]`, or any tensor in their place.

    Args:
        x: the tokens.
        theta: the matrices.
        device: a tensor on the device.
        rates: strides of the rates, or None.
        out: y; contiguous where it is None.
    """
    batch, length, heads, width = x.shape
    hidden, bm, bn = theta.hidden, 128, 64
    tiles = cdiv(hidden, bn) * cdiv(length, bm) * heads * batch
    programs = 2 * multiprocessors(device)
    stored = matrices(theta.factors * theta.sets * heads, width, hidden, DEPTH, bn)
    return BoundKernel(
        _features_kernel, [x.view(bm, DEPTH), stored, (out or x.like(hidden)).view(bm, bn // 2), None],
        (min(programs, tiles),),
        (batch, heads, length, theta.sets, *(rates or (0, 0, 0))),
        D=width, F=hidden, ACTIVATION=theta.activation, UP=theta.factors == 2, RATED=rates is not None,
        PROGRAMS=programs, BM=bm, BN=bn, BK=DEPTH, num_warps=8, num_stages=3,
    )  # fmt: skip


@triton.jit(do_not_specialize=["batch", "heads", "length", "sets", "rate_b", "rate_t", "rate_h"])
def _features_backward_kernel(
    x, w, dh, y, du, rates, partial, batch, heads, length, sets, rate_b, rate_t, rate_h,
    D: tl.constexpr, F: tl.constexpr, ACTIVATION: tl.constexpr, UP: tl.constexpr, RATED: tl.constexpr,
    PROGRAMS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    across: tl.constexpr = (F + BN - 1) // BN
    down = tl.cdiv(length, BM)
    for tile in tl.range(tl.program_id(0), across * down * heads * batch, PROGRAMS, flatten=True):
        n, m, h, b = _tile_of(tile, across, down, heads)
        row = m * BM
        which = tl.minimum(b, sets - 1) * heads + h
        u, p = tl.zeros((BM, BN), tl.float32), tl.zeros((BM, BN), tl.float32)
        for k in range(0, D, BK):
            left = tl.reshape(x.load([b, h, row, k]), (BM, BK))
            u = tl.dot(left, tl.reshape(w.load([which, k, n * BN]), (BK, BN)), u)
            if UP:
                p = tl.dot(left, tl.reshape(w.load([sets * heads + which, k, n * BN]), (BK, BN)), p)
        d = tl.reshape(dh.load([b, h, row, n * BN]), (BM, BN)).to(tl.float32)
        a = activate(u, ACTIVATION)
        value = a
        if UP:
            value = a * p
        if RATED:
            # columns past the last are zeros of both factors
            _put_dots(partial, tl.sum(value * d, axis=1), b, h, row, n, length, heads, across, BM)
            rate = _rates_at(rates, b, h, row, length, rate_b, rate_t, rate_h, BM)[:, None]
            d *= rate
            value *= rate
        _put(y, value, b, h, row, n * BN, BM, BN)
        if UP:
            _put(du, d * a, b, h, row, F + n * BN, BM, BN)
            d *= p
        _put(du, d * slope(u, ACTIVATION), b, h, row, n * BN, BM, BN)


def features_backward(
    x: TokenRows, theta: Theta, device: Tensor, rates: Sequence[int] | None = None, hiddens: TokenRows | None = None
) -> BoundKernel:
    """The gradient of `features`, which are computed anew.

    The launch takes x `[B, T, H, D]`; the matrices; the gradient of the features before rates, `[B, T, H, F]`; where to
    write the features, `[B, T, H, F]`, and the gradients of `x W` and `x W_up` side by side, contiguous `[B, T, H, F or 2
    F]`, all in x's dtype; rates; and float32 `[B, T, H, F / 64]` for their gradient in parts.

    Args:
        x: the tokens.
        theta: the matrices; F is a multiple of `DEPTH`.
        device: a tensor on the device.
        rates: strides of the rates, or None.
        hiddens: the features and their gradient; contiguous where it is None.
    """
    batch, length, heads, width = x.shape
    hidden, bm, bn = theta.hidden, 64, 64
    hiddens = hiddens or x.like(hidden)
    tiles = cdiv(hidden, bn) * cdiv(length, bm) * heads * batch
    programs = 2 * multiprocessors(device)
    stored = matrices(theta.factors * theta.sets * heads, width, hidden, DEPTH, bn)
    views: list[View | None] = [x.view(bm, DEPTH), stored, hiddens.view(bm, bn), hiddens.view(bm, bn // 2)]
    views += [x.like(theta.factors * hidden).view(bm, bn // 2), None, None]
    return BoundKernel(
        _features_backward_kernel, views, (min(programs, tiles),),
        (batch, heads, length, theta.sets, *(rates or (0, 0, 0))),
        D=width, F=hidden, ACTIVATION=theta.activation, UP=theta.factors == 2, RATED=rates is not None,
        PROGRAMS=programs, BM=bm, BN=bn, BK=DEPTH, num_warps=4, num_stages=3,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["rows", "heads", "length", "x_b", "x_t", "x_h", "rate_b", "rate_t", "rate_h", "y_b", "y_t", "y_h"]
)
def _rated_kernel(
    x, rates, y, rows, heads, length, x_b, x_t, x_h, rate_b, rate_t, rate_h, y_b, y_t, y_h,
    D: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    # rows are tokens of all sequences, heads innermost
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    h, t, b = (row % heads).to(tl.int64), (row // heads % length).to(tl.int64), (row // heads // length).to(tl.int64)
    rate = tl.load(rates + b * rate_b + t * rate_t + h * rate_h, mask=row < rows, other=0.0)
    columns = tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (columns < D)[None, :]
    value = tl.load(x + (b * x_b + t * x_t + h * x_h)[:, None] + columns[None, :], mask=inside, other=0.0) * rate[:, None]
    tl.store(y + (b * y_b + t * y_t + h * y_h)[:, None] + columns[None, :], value.to(y.dtype.element_ty), mask=inside)


def rated(x: TokenRows, rates: Sequence[int], out: TokenRows) -> BoundKernel:
    """`rates * x`. The launch takes x `[B, T, H, D]`, rates, float32 `[B, T, H]`, and where to write y `[B, T, H, D]`.

    Args:
        x: the tokens.
        rates: strides of the rates.
        out: y.
    """
    batch, length, heads, width = x.shape
    rows, bm = batch * length * heads, 16
    return BoundKernel(
        _rated_kernel, [None] * 3, (cdiv(rows, bm),), (rows, heads, length, *x.strides[:3], *rates, *out.strides[:3]),
        D=width, WIDTH=power_of_2(width), BM=bm, num_warps=4, num_stages=1,
    )  # fmt: skip
