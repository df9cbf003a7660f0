"""Matrix products over spans of tokens: features of a fast network, reads of states, writes, and their gradients.

A *span* is a run of tokens that shares its matrices. Tables of spans are int32 `[spans, 4]`: first row, number of rows, row
of the states or updates that it goes with, and row of the network's other matrices. Rows of `[rows, heads, width]` tensors
are tokens; sequences of any lengths are spans of one table, and a launch does all of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvbind.kernels.common.activations import activate, slope
from kvbind.kernels.common.devices import on_device_of
from kvbind.kernels.common.operands import cdiv, dot_precision
from kvbind.kernels.launching.autotuning import tuned

STATE, THETA = 2, 3
"""The columns of a table of spans that name matrices."""


@triton.jit
def _tile(spans, tiles_m, tiles_n):
    """The span, row tile and column tile of this program; column tiles side by side, so that rows are read once."""
    index = tl.program_id(0)
    n = index % tiles_n
    m = (index // tiles_n) % tiles_m
    return spans + (index // (tiles_n * tiles_m)) * 4, m, n


@triton.jit
def _accumulate(
    acc, x, x_row, rows, w, w_in, w_out, columns,
    K: tl.constexpr, N: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`acc + x[rows] @ w[:, columns]`, with pointers at the head's first element."""
    inner = tl.arange(0, BK)
    # columns past the last are never stored, so that any address inside will do
    columns = columns % N
    xs = x + rows[:, None] * x_row + inner[None, :]
    ws = w + inner[:, None] * w_in + columns[None, :] * w_out
    for k in range(0, K, BK):
        if K % BK == 0:
            a = tl.load(xs)
            b = tl.load(ws)
        else:
            within = k + inner < K
            a = tl.load(xs, mask=within[None, :], other=0.0)
            b = tl.load(ws, mask=within[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        xs += BK
        ws += BK * w_in
    return acc


PART = tl.constexpr(32)
"""Columns of the narrowest tile."""


@triton.jit
def _store_dots(partial, partial_tile, at, dots, inside, n, N: tl.constexpr, BN: tl.constexpr):
    """Sums over the columns of tile `n`, in the place of the tile's first part, and zeros in those of its others.

    So every place is written whatever the width of the tiles: tuning tries several on the same memory.
    """
    for i in tl.static_range(BN // PART):
        part = n * (BN // PART) + i
        there = inside & (part * PART < N)
        tl.store(partial + part.to(tl.int64) * partial_tile + at, dots if i == 0 else tl.zeros_like(dots), mask=there)


_CONFIGS = [
    triton.Config({"BM": 128, "BN": 128, "BK": 64}, num_warps=4, num_stages=3),
    triton.Config({"BM": 128, "BN": 128, "BK": 64}, num_warps=8, num_stages=3),
    triton.Config({"BM": 128, "BN": 64, "BK": 64}, num_warps=4, num_stages=4),
]
_WIDE = triton.Config({"BM": 64, "BN": 32, "BK": 32}, num_warps=4, num_stages=2)


@tuned(_CONFIGS, ["K", "N", "COLUMN", "w_out"], _WIDE)
@triton.jit(do_not_specialize=["longest", "partial_tile"])
def _product_kernel(
    x, w, y, z, rates, partial, spans, longest,
    x_row, x_head, w_index, w_head, w_in, w_out, y_row, y_head, z_row, z_head, partial_tile, partial_row,
    K: tl.constexpr, N: tl.constexpr, COLUMN: tl.constexpr, RATED: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    span, m, n = _tile(spans, tl.cdiv(longest, BM), tl.cdiv(N, BN))
    head = tl.program_id(1).to(tl.int64)
    first, length, index = tl.load(span).to(tl.int64), tl.load(span + 1), tl.load(span + COLUMN).to(tl.int64)
    if m * BM >= length:
        return
    local = m * BM + tl.arange(0, BM)
    inside, rows = local < length, first + tl.minimum(local, length - 1)
    columns = n * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    acc = _accumulate(acc, x + head * x_head, x_row, rows, w + index * w_index + head * w_head, w_in, w_out, columns,
                      K, N, BK, PRECISION)  # fmt: skip
    stored = inside[:, None] & (columns < N)[None, :]
    if DOT:
        other = tl.load(z + rows[:, None] * z_row + head * z_head + columns[None, :], mask=stored, other=0.0)
        dots = tl.sum(acc * other.to(tl.float32), axis=1)
        _store_dots(partial, partial_tile, rows * partial_row + head, dots, inside, n, N, BN)
    if RATED:
        acc *= tl.load(rates + rows * partial_row + head, mask=inside, other=0.0)[:, None]
    tl.store(y + rows[:, None] * y_row + head * y_head + columns[None, :], acc.to(y.dtype.element_ty), mask=stored)


def product(
    x: Tensor,
    w: Tensor,
    spans: Tensor,
    longest: int,
    *,
    column: int = STATE,
    transposed: bool = False,
    rates: Tensor | None = None,
    against: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`x @ w` for each span's own `w`.

    Args:
        x: rows `[rows, heads, K]`, the last axis contiguous.
        w: `[matrices, heads, K, N]`, or `[matrices, heads, N, K]` if `transposed`, in x's dtype.
        spans: the table, int32 `[spans, 4]`; together they must hold all rows, each once.
        longest: at least the number of rows in any span.
        column: of the table, which matrix a span takes.
        transposed: multiply by the transposes.
        rates: float32 `[rows, heads]` that multiply the result, rounded after it.
        against: `[rows, heads, N]`, to be multiplied row by row with the result (before `rates`) and summed.
        dtype: of the result; default x's.

    Returns:
        `[rows, heads, N]`, and the float32 sums `[rows, heads]` or None.
    """
    rows, heads, inner = x.shape
    w_in, w_out = (w.stride(3), w.stride(2)) if transposed else (w.stride(2), w.stride(3))
    width = w.shape[2] if transposed else w.shape[3]
    y = torch.empty(rows, heads, width, dtype=dtype or x.dtype, device=x.device)
    partial = (
        torch.zeros(cdiv(width, PART.value), rows, heads, dtype=torch.float32, device=x.device)
        if against is not None
        else None
    )

    def grid(meta: dict[str, int]) -> tuple[int, int]:
        return len(spans) * cdiv(longest, meta["BM"]) * cdiv(width, meta["BN"]), heads

    if rows and len(spans):
        other = x if against is None else against
        with on_device_of(x):
            _product_kernel[grid](
                x, w, y, other, x if rates is None else rates, x if partial is None else partial, spans, longest,
                x.stride(0), x.stride(1), w.stride(0), w.stride(1), w_in, w_out, y.stride(0), y.stride(1),
                other.stride(0), other.stride(1), rows * heads, heads,
                K=inner, N=width, COLUMN=column, RATED=rates is not None, DOT=against is not None,
                PRECISION=dot_precision(x.dtype),
            )  # fmt: skip
    return y, None if partial is None else partial.sum(0)


@triton.jit
def _preactivations(
    x, x_row, rows, w, w_up, w_in, columns, D: tl.constexpr, F: tl.constexpr, UP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`x[rows] @ w[:, columns]`, and the same of `w_up` if `UP`; matrices with contiguous rows."""
    inner, columns = tl.arange(0, BK), columns % F
    xs = x + rows[:, None] * x_row + inner[None, :]
    ws = w + inner[:, None] * w_in + columns[None, :]
    ups = w_up + inner[:, None] * w_in + columns[None, :]
    u, p = tl.zeros((BM, BN), tl.float32), tl.zeros((BM, BN), tl.float32)
    for k in range(0, D, BK):
        if D % BK == 0:
            a = tl.load(xs)
            u = tl.dot(a, tl.load(ws), u, input_precision=PRECISION)
            if UP:
                p = tl.dot(a, tl.load(ups), p, input_precision=PRECISION)
        else:
            within = k + inner < D
            a = tl.load(xs, mask=within[None, :], other=0.0)
            u = tl.dot(a, tl.load(ws, mask=within[:, None], other=0.0), u, input_precision=PRECISION)
            if UP:
                p = tl.dot(a, tl.load(ups, mask=within[:, None], other=0.0), p, input_precision=PRECISION)
        xs += BK
        ws += BK * w_in
        ups += BK * w_in
    return u, p


_FEATURES_CONFIGS = [
    triton.Config({"BM": 128, "BN": 64, "BK": 64}, num_warps=4, num_stages=3),
    triton.Config({"BM": 128, "BN": 64, "BK": 64}, num_warps=8, num_stages=3),
]


@tuned(_FEATURES_CONFIGS, ["D", "F", "UP"], _WIDE)
@triton.jit(do_not_specialize=["longest"])
def _features_kernel(
    x, w, w_up, y, rates, spans, longest,
    x_row, x_head, w_index, w_head, w_in, y_row, y_head, rate_row,
    D: tl.constexpr, F: tl.constexpr, ACTIVATION: tl.constexpr, UP: tl.constexpr, RATED: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    span, m, n = _tile(spans, tl.cdiv(longest, BM), tl.cdiv(F, BN))
    head = tl.program_id(1).to(tl.int64)
    first, length, index = tl.load(span).to(tl.int64), tl.load(span + 1), tl.load(span + 3).to(tl.int64)
    if m * BM >= length:
        return
    local = m * BM + tl.arange(0, BM)
    inside, rows = local < length, first + tl.minimum(local, length - 1)
    columns = n * BN + tl.arange(0, BN)
    offset = index * w_index + head * w_head
    u, p = _preactivations(x + head * x_head, x_row, rows, w + offset, w_up + offset, w_in, columns,
                           D, F, UP, BM, BN, BK, PRECISION)  # fmt: skip
    h = activate(u, ACTIVATION)
    if UP:
        h *= p
    if RATED:
        h *= tl.load(rates + rows * rate_row + head, mask=inside, other=0.0)[:, None]
    stored = inside[:, None] & (columns < F)[None, :]
    tl.store(y + rows[:, None] * y_row + head * y_head + columns[None, :], h.to(y.dtype.element_ty), mask=stored)


def features(x: Tensor, theta: Tensor, spans: Tensor, longest: int, activation: str, rates: Tensor | None = None) -> Tensor:
    """`rates * act(x W) * (x W_up)`, or without the second factor.

    Args:
        x: rows `[rows, heads, D]`, the last axis contiguous.
        theta: `W` and, where there is one, `W_up`: `[1 or 2, sequences, heads, D, F]` in x's dtype.
        spans: the table, as `product` takes it.
        longest: at least the number of rows in any span.
        activation: a name that `kvbind.kernels.common.activations` knows.
        rates: float32 `[rows, heads]`.

    Returns:
        `[rows, heads, F]` in x's dtype.
    """
    rows, heads, width = x.shape
    hidden = theta.shape[-1]
    y = torch.empty(rows, heads, hidden, dtype=x.dtype, device=x.device)

    def grid(meta: dict[str, int]) -> tuple[int, int]:
        return len(spans) * cdiv(longest, meta["BM"]) * cdiv(hidden, meta["BN"]), heads

    if rows and len(spans):
        with on_device_of(x):
            _features_kernel[grid](
                x, theta[0], theta[-1], y, x if rates is None else rates, spans, longest,
                x.stride(0), x.stride(1), theta.stride(1), theta.stride(2), theta.stride(3), y.stride(0), y.stride(1), heads,
                D=width, F=hidden, ACTIVATION=activation, UP=len(theta) == 2, RATED=rates is not None,
                PRECISION=dot_precision(x.dtype),
            )  # fmt: skip
    return y


_BACKWARD_CONFIGS = [
    triton.Config({"BM": 64, "BN": 64, "BK": 64}, num_warps=4, num_stages=4),
    triton.Config({"BM": 128, "BN": 64, "BK": 64}, num_warps=8, num_stages=3),
]


@tuned(_BACKWARD_CONFIGS, ["D", "E", "F", "UP"], _WIDE)
@triton.jit(do_not_specialize=["longest", "partial_tile"])
def _features_backward_kernel(
    x, w, w_up, g, m, y, du, rates, partial, spans, longest,
    x_row, x_head, w_index, w_head, w_in, g_row, g_head, m_index, m_head, m_row, y_row, y_head, du_row, du_head,
    partial_tile, partial_row,
    D: tl.constexpr, E: tl.constexpr, F: tl.constexpr, ACTIVATION: tl.constexpr, UP: tl.constexpr, RATED: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    span, tile, n = _tile(spans, tl.cdiv(longest, BM), tl.cdiv(F, BN))
    head = tl.program_id(1).to(tl.int64)
    first, length = tl.load(span).to(tl.int64), tl.load(span + 1)
    index, other = tl.load(span + 2).to(tl.int64), tl.load(span + 3).to(tl.int64)
    if tile * BM >= length:
        return
    local = tile * BM + tl.arange(0, BM)
    inside, rows = local < length, first + tl.minimum(local, length - 1)
    columns = n * BN + tl.arange(0, BN)

    # the gradient of the features: g times the transposed state or update
    dh = tl.zeros((BM, BN), tl.float32)
    dh = _accumulate(dh, g + head * g_head, g_row, rows, m + index * m_index + head * m_head, 1, m_row, columns,
                     E, F, BK, PRECISION)  # fmt: skip

    offset = other * w_index + head * w_head
    u, p = _preactivations(x + head * x_head, x_row, rows, w + offset, w_up + offset, w_in, columns,
                           D, F, UP, BM, BN, BK, PRECISION)  # fmt: skip
    s = activate(u, ACTIVATION)
    h = s
    if UP:
        h = s * p
    stored = inside[:, None] & (columns < F)[None, :]
    if RATED:
        rate = tl.load(rates + rows * partial_row + head, mask=inside, other=0.0)[:, None]
        dots = tl.sum(tl.where(stored, h * dh, 0.0), axis=1)
        _store_dots(partial, partial_tile, rows * partial_row + head, dots, inside, n, F, BN)
        dh *= rate
        h *= rate
    tl.store(y + rows[:, None] * y_row + head * y_head + columns[None, :], h.to(y.dtype.element_ty), mask=stored)
    place = du + rows[:, None] * du_row + head * du_head + columns[None, :]
    d = dh * slope(u, ACTIVATION)
    if UP:
        tl.store(place + F, (dh * s).to(du.dtype.element_ty), mask=stored)
        d *= p
    tl.store(place, d.to(du.dtype.element_ty), mask=stored)


def features_backward(
    x: Tensor,
    theta: Tensor,
    g: Tensor,
    matrices: Tensor,
    spans: Tensor,
    longest: int,
    activation: str,
    rates: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradient of `features` where theirs is `g @ matrices^T`, span by span; the features are computed anew.

    Args:
        x: as `features` took it.
        theta: as `features` took it.
        g: rows `[rows, heads, E]` in x's dtype.
        matrices: `[matrices, heads, F, E]` in x's dtype, rows contiguous; the table's column 2 names a span's.
        spans: as `features` took it.
        longest: as `features` took it.
        activation: as `features` took it.
        rates: as `features` took it.

    Returns:
        The features, `[rows, heads, F]`; the gradients of `x W` and `x W_up` side by side, `[rows, heads, F or 2 F]`, both
        in x's dtype; and the gradient of the rates, float32 `[rows, heads]`, or None.
    """
    rows, heads, width = x.shape
    hidden, count = theta.shape[-1], len(theta)
    y = torch.empty(rows, heads, hidden, dtype=x.dtype, device=x.device)
    du = torch.empty(rows, heads, count * hidden, dtype=x.dtype, device=x.device)
    partial = (
        torch.zeros(cdiv(hidden, PART.value), rows, heads, dtype=torch.float32, device=x.device)
        if rates is not None
        else None
    )

    def grid(meta: dict[str, int]) -> tuple[int, int]:
        return len(spans) * cdiv(longest, meta["BM"]) * cdiv(hidden, meta["BN"]), heads

    if rows and len(spans):
        with on_device_of(x):
            _features_backward_kernel[grid](
                x, theta[0], theta[-1], g, matrices, y, du, x if rates is None else rates, x if partial is None else partial,
                spans, longest, x.stride(0), x.stride(1), theta.stride(1), theta.stride(2), theta.stride(3),
                g.stride(0), g.stride(1), matrices.stride(0), matrices.stride(1), matrices.stride(2),
                y.stride(0), y.stride(1), du.stride(0), du.stride(1), rows * heads, heads,
                D=width, E=g.shape[-1], F=hidden, ACTIVATION=activation, UP=count == 2, RATED=rates is not None,
                PRECISION=dot_precision(x.dtype),
            )  # fmt: skip
    return y, du, None if partial is None else partial.sum(0)


@tuned(_CONFIGS, ["M", "N", "RATED"], _WIDE)
@triton.jit
def _write_kernel(
    x, g, y, rates, spans,
    x_row, x_head, g_row, g_head, y_span, y_head, rate_row,
    M: tl.constexpr, N: tl.constexpr, RATED: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    index, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tiles: tl.constexpr = tl.cdiv(M, BM) * tl.cdiv(N, BN)
    span, tile = index // tiles, index % tiles
    m, n = tile // tl.cdiv(N, BN), tile % tl.cdiv(N, BN)
    first, length = tl.load(spans + span * 4).to(tl.int64), tl.load(spans + span * 4 + 1)
    channels, columns = m * BM + tl.arange(0, BM), n * BN + tl.arange(0, BN)
    tokens = tl.arange(0, BK)
    xs = x + head * x_head + (first + tokens)[:, None] * x_row + (channels % M)[None, :]
    gs = g + head * g_head + (first + tokens)[:, None] * g_row + (columns % N)[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    whole = length // BK * BK
    for t in range(0, whole, BK):
        b = tl.load(gs)
        if RATED:
            b = (b * tl.load(rates + (first + t + tokens) * rate_row + head)[:, None]).to(x.dtype.element_ty)
        acc = tl.dot(tl.trans(tl.load(xs)), b, acc, input_precision=PRECISION)
        xs += BK * x_row
        gs += BK * g_row
    if whole < length:
        inside = tokens < length - whole
        b = tl.load(gs, mask=inside[:, None], other=0.0)
        if RATED:
            rate = tl.load(rates + (first + whole + tokens) * rate_row + head, mask=inside, other=0.0)
            b = (b * rate[:, None]).to(x.dtype.element_ty)
        acc = tl.dot(tl.trans(tl.load(xs, mask=inside[:, None], other=0.0)), b, acc, input_precision=PRECISION)
    place = y + span.to(tl.int64) * y_span + head * y_head + channels[:, None] * N + columns[None, :]
    tl.store(place, acc, mask=(channels < M)[:, None] & (columns < N)[None, :])


def write(x: Tensor, g: Tensor, spans: Tensor, rates: Tensor | None = None) -> Tensor:
    """The sum over each span's rows of `x^T (rates * g)`.

    Args:
        x: rows `[rows, heads, M]`, the last axis contiguous.
        g: rows `[rows, heads, N]` in x's dtype, the last axis contiguous.
        spans: the table, as `product` takes it.
        rates: float32 `[rows, heads]`.

    Returns:
        float32 `[spans, heads, M, N]`.
    """
    heads, width, columns = x.shape[1], x.shape[2], g.shape[2]
    y = torch.empty(len(spans), heads, width, columns, dtype=torch.float32, device=x.device)

    def grid(meta: dict[str, int]) -> tuple[int, int]:
        return len(spans) * cdiv(width, meta["BM"]) * cdiv(columns, meta["BN"]), heads

    if len(spans):
        with on_device_of(x):
            _write_kernel[grid](
                x, g, y, x if rates is None else rates, spans,
                x.stride(0), x.stride(1), g.stride(0), g.stride(1), y.stride(0), y.stride(1), heads,
                M=width, N=columns, RATED=rates is not None, PRECISION=dot_precision(x.dtype),
            )  # fmt: skip
    return y
