r"""Newton-Schulz orthogonalization of batches of matrices; the twin of `kvbind.inner.orthogonalize.NewtonSchulz`.

Every matrix is held wide, `m` rows by `k >= m` columns. One iteration with coefficients `(a, b, c)`, and its gradient from
`D = dL/dX'`, are

    A = X X^T,   B = b A + c A A,   X' = a X + B X
    E = D X^T + X D^T,   F = b E + c (E A + A E),   dL/dX = a D + B D + F X

A, B, E and F are symmetric: their tiles on and below the diagonal are computed and written twice. X after each iteration is
all that is kept for the gradient.

There are two ways through. Matrices that fit one program (`fits_one_program`) run all their iterations in a single launch,
forward and backward. Larger ones take a launch per product, of one kernel, `_product`. There the input is only cast to the
low precision, and the squares of its pieces are summed; the first iteration multiplies by powers of `1 / (||G||_F + 1e-7)`
where it writes its results, so that no pass over the input has to wait for its norm. All sums run in a fixed order: results
repeat bit by bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvbind.kernels.common import Launcher, cdiv, dot_precision, multiprocessors, on_device_of

EPSILON = 1e-7
"""What is added to the norm, as in the twin."""

PIECE = (64, 128)
"""Rows and columns, at most, of the pieces in which a large matrix is cast and its squares are summed."""

LOW = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
"""Precisions of the iteration, as Triton names them."""

_EPSILON = tl.constexpr(EPSILON)


class Plan(NamedTuple):
    """How `_product` is launched: a square output tile, the depth of a step, warps, and stages of its pipeline."""

    tile: int
    depth: int
    warps: int
    stages: int


def plan(tiles: int, rows: int, dtype: torch.dtype, multiprocessors: int) -> Plan:
    """Choose tiles by how many there are: large ones reuse operands best, but only if they fill the card.

    Args:
        tiles: tiles of 128 x 128 in the outputs of one launch, over all matrices.
        rows: rows of a matrix held wide.
        dtype: precision of the products.
        multiprocessors: multiprocessors of the device.
    """
    if dtype == torch.float32:
        return Plan(64, 32, 4, 2)
    if rows > 64 and tiles >= multiprocessors:
        return Plan(128, 64, 8, 3)
    return Plan(64, 64, 4, 4)


def fits_one_program(rows: int, columns: int, dtype: torch.dtype) -> bool:
    """Whether one program holds a matrix (`rows <= columns`) of `dtype` through all its iterations.

    Float32 products outside the matrix units are unrolled in full, so that fewer fit.
    """
    return columns <= (32 if dtype == torch.float32 else 128)


@triton.jit
def _inverse_norm(squares, PARTS: tl.constexpr):
    # 1 / (norm + epsilon) and the norm, of a matrix whose pieces' sums of squares start at `squares`
    parts = tl.arange(0, triton.next_power_of_2(PARTS))
    norm = tl.sqrt(tl.sum(tl.load(squares + parts, mask=parts < PARTS, other=0.0), 0))
    return 1.0 / (norm + _EPSILON), norm


@Launcher
@triton.jit
def _cast(
    x, out, squares, stride_batch, stride_row, stride_column,
    M: tl.constexpr, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    # out [n, M, N] <- x in out's dtype; squares [n, pieces] <- sums of squares, unless None
    ACROSS: tl.constexpr = (N + BN - 1) // BN
    PARTS: tl.constexpr = (M + BM - 1) // BM * ACROSS
    program = tl.program_id(0)
    batch = (program // PARTS).to(tl.int64)
    piece = program % PARTS
    rows = piece // ACROSS * BM + tl.arange(0, BM)
    columns = piece % ACROSS * BN + tl.arange(0, BN)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    x += batch * stride_batch + rows.to(tl.int64)[:, None] * stride_row + columns.to(tl.int64)[None, :] * stride_column
    value = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + batch * (M * N) + rows[:, None] * N + columns[None, :], value.to(out.dtype.element_ty), mask=inside)
    if squares is not None:
        tl.store(squares + program, tl.sum(tl.sum(value * value, 1), 0))


@Launcher
@triton.jit(do_not_specialize=["power"])
def _product(
    c, l1, r1, l2, r2, p, squares, dots, alpha, beta, power,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, SYMMETRIC: tl.constexpr, C_ROW: tl.constexpr,
    C_COLUMN: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # c [n, M, N] <- s^power (alpha p + beta (l1 r1 + l2 r2)), s the inverse norm; p, l2 and r2 may be None.
    # SYMMETRIC: r1 and r2 are [n, N, K] and transposed, M = N, and the result is known to be symmetric.
    # Unless dots is None, s multiplies l1 r1, and dots [n, tiles] <- sums of c * r1 over the tiles.
    ACROSS: tl.constexpr = (N + TILE - 1) // TILE
    DOWN: tl.constexpr = (M + TILE - 1) // TILE
    TILES: tl.constexpr = DOWN * (DOWN + 1) // 2 if SYMMETRIC else DOWN * ACROSS
    STEPS: tl.constexpr = (K + BK - 1) // BK
    program = tl.program_id(0)
    batch = (program // TILES).to(tl.int64)
    t = program % TILES
    if SYMMETRIC:
        # t = i (i + 1) / 2 + j with j <= i; the small addend outweighs the rounding of the root
        i = ((tl.sqrt(8.0 * t + 1.0) - 1.0) * 0.5 + 1e-3).to(tl.int32)
        j = t - i * (i + 1) // 2
    else:
        i = t // ACROSS
        j = t % ACROSS
    rows = i * TILE + tl.arange(0, TILE)
    columns = j * TILE + tl.arange(0, TILE)
    ks = tl.arange(0, BK)
    inside = (rows < M)[:, None] & (columns < N)[None, :]

    # rows and columns past the last are never stored, so that any address inside will do
    at_l = (rows % M)[:, None] * K + ks[None, :]
    at_r = (columns % N)[None, :] * K + ks[:, None] if SYMMETRIC else ks[:, None] * N + (columns % N)[None, :]
    STEP_R: tl.constexpr = BK if SYMMETRIC else BK * N
    to_l, to_r = batch * (M * K), batch * (K * N)
    if dots is not None:
        inverse, _ = _inverse_norm(squares + batch * PARTS, PARTS)
    acc = tl.zeros((TILE, TILE), tl.float32)
    for step in range(0, STEPS if l2 is None else 2 * STEPS):
        if l2 is None:
            left, right, k = l1 + to_l, r1 + to_r, step
        else:
            # both products in one loop keep its pipeline full
            later = step >= STEPS
            left, right = tl.where(later, l2, l1) + to_l, tl.where(later, r2, r1) + to_r
            k = step - tl.where(later, STEPS, 0)
        if K % BK == 0:
            x = tl.load(left + k * BK + at_l)
            y = tl.load(right + k * STEP_R + at_r)
        else:
            x = tl.load(left + k * BK + at_l, mask=(ks < K - k * BK)[None, :], other=0.0)
            y = tl.load(right + k * STEP_R + at_r, mask=(ks < K - k * BK)[:, None], other=0.0)
        if dots is not None:
            acc *= tl.where(step == STEPS, inverse, 1.0)
        acc = tl.dot(x, y, acc, input_precision=PRECISION)

    acc *= beta
    at = batch * (M * N) + rows[:, None] * N + columns[None, :]
    if p is not None:
        acc += alpha * tl.load(p + at, mask=inside, other=0.0).to(tl.float32)
    if power > 0:
        scale, _ = _inverse_norm(squares + batch * PARTS, PARTS)
        acc *= tl.where(power == 2, scale * scale, scale)
    c += batch * (M * N)
    value = acc.to(c.dtype.element_ty)
    tl.store(c + rows[:, None] * C_ROW + columns[None, :] * C_COLUMN, value, mask=inside)
    if SYMMETRIC:  # noqa: SIM102 - known when compiling, unlike the next
        if i > j:
            tl.store(c + rows[:, None] * C_COLUMN + columns[None, :] * C_ROW, value, mask=inside)
    if dots is not None:
        other = tl.load(r1 + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dots + program, tl.sum(tl.sum(acc * other, 1), 0))


@Launcher
@triton.jit
def _undo_norm(
    out, grad, x, squares, dots,
    M: tl.constexpr, N: tl.constexpr, OUT_ROW: tl.constexpr, OUT_COLUMN: tl.constexpr, PARTS: tl.constexpr,
    DOTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    # out [n, M, N] <- the gradient of s x, s = 1 / (norm + epsilon), from grad = dL/d(s x) and dots, the pieces of <grad, x>
    ACROSS: tl.constexpr = (N + BN - 1) // BN
    PIECES: tl.constexpr = (M + BM - 1) // BM * ACROSS
    program = tl.program_id(0)
    batch = (program // PIECES).to(tl.int64)
    piece = program % PIECES
    scale, norm = _inverse_norm(squares + batch * PARTS, PARTS)
    parts = tl.arange(0, triton.next_power_of_2(DOTS))
    dot = tl.sum(tl.load(dots + batch * DOTS + parts, mask=parts < DOTS, other=0.0), 0)
    along = tl.where(norm > 0, dot * scale * scale / tl.where(norm > 0, norm, 1.0), 0.0)
    rows = piece // ACROSS * BM + tl.arange(0, BM)
    columns = piece % ACROSS * BN + tl.arange(0, BN)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    at = batch * (M * N) + rows[:, None] * N + columns[None, :]
    value = scale * tl.load(grad + at, mask=inside, other=0.0)
    value -= along * tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    out += batch * (M * N)
    tl.store(out + rows[:, None] * OUT_ROW + columns[None, :] * OUT_COLUMN, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _coefficient(values: tl.constexpr, iteration, WHICH: tl.constexpr):
    # values[3 * iteration + WHICH] with a run-time iteration, so that the loop over iterations stays a loop
    value = 0.0
    for i in tl.static_range(len(values) // 3):
        value = tl.where(iteration == i, values[3 * i + WHICH], value)
    return value


@Launcher
@triton.jit(do_not_specialize=["n"])
def _whole_forward(
    x, out, kept, squares, n, stride_batch, stride_row, stride_column,
    COEFFICIENTS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, OUT_ROW: tl.constexpr, OUT_COLUMN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # all iterations of one matrix; kept [iterations, n, M, N] and squares [n] are written unless None
    batch = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, BM)
    columns = tl.arange(0, BN)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    x += batch * stride_batch + rows.to(tl.int64)[:, None] * stride_row + columns.to(tl.int64)[None, :] * stride_column
    value = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    square = tl.sum(tl.sum(value * value, 1), 0)
    if kept is not None:
        tl.store(squares + batch, square)
    value *= 1.0 / (tl.sqrt(square) + _EPSILON)
    for i in range(0, len(COEFFICIENTS) // 3):
        low = value.to(TYPE)
        if kept is not None:
            tl.store(kept + (i * n + batch) * (M * N) + rows[:, None] * N + columns[None, :], low, mask=inside)
        gram = tl.dot(low, tl.trans(low), input_precision=PRECISION).to(TYPE)
        poly = tl.dot(gram, gram, input_precision=PRECISION) * _coefficient(COEFFICIENTS, i, 2)
        poly += _coefficient(COEFFICIENTS, i, 1) * gram.to(tl.float32)
        value = tl.dot(poly.to(TYPE), low, input_precision=PRECISION)
        value += _coefficient(COEFFICIENTS, i, 0) * low.to(tl.float32)
    out += batch * (M * N)
    tl.store(out + rows[:, None] * OUT_ROW + columns[None, :] * OUT_COLUMN, value.to(out.dtype.element_ty), mask=inside)


@Launcher
@triton.jit(do_not_specialize=["n"])
def _whole_backward(
    kept, squares, grad, out, n, stride_batch, stride_row, stride_column,
    COEFFICIENTS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, OUT_ROW: tl.constexpr, OUT_COLUMN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # the gradient of `_whole_forward`, one matrix per program
    ITERATIONS: tl.constexpr = len(COEFFICIENTS) // 3
    batch = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, BM)
    columns = tl.arange(0, BN)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    grad += batch * stride_batch + rows.to(tl.int64)[:, None] * stride_row + columns.to(tl.int64)[None, :] * stride_column
    value = tl.load(grad, mask=inside, other=0.0).to(tl.float32)
    at = rows[:, None] * N + columns[None, :]
    for back in range(0, ITERATIONS):
        i = ITERATIONS - 1 - back
        low = value.to(TYPE)
        x = tl.load(kept + (i * n + batch) * (M * N) + at, mask=inside, other=0.0)
        b = _coefficient(COEFFICIENTS, i, 1)
        c = _coefficient(COEFFICIENTS, i, 2)
        gram = tl.dot(x, tl.trans(x), input_precision=PRECISION).to(TYPE)
        e = tl.dot(low, tl.trans(x), input_precision=PRECISION)
        e = tl.dot(x, tl.trans(low), e, input_precision=PRECISION).to(TYPE)
        f = tl.dot(e, gram, input_precision=PRECISION)
        f = tl.dot(gram, e, f, input_precision=PRECISION)
        # f is used up before the last product's factor is formed, which saves registers
        f = (c * f + b * e.to(tl.float32)).to(TYPE)
        value = tl.dot(f, x, input_precision=PRECISION)
        value += _coefficient(COEFFICIENTS, i, 0) * low.to(tl.float32)
        poly = (c * tl.dot(gram, gram, input_precision=PRECISION) + b * gram.to(tl.float32)).to(TYPE)
        value = tl.dot(poly, low, value, input_precision=PRECISION)
    scale, norm = _inverse_norm(squares + batch, 1)
    x = tl.load(kept + batch * (M * N) + at, mask=inside, other=0.0).to(tl.float32)
    along = tl.where(norm > 0, tl.sum(tl.sum(value * x, 1), 0) / tl.where(norm > 0, norm, 1.0), 0.0)
    value = scale * value - along * x
    out += batch * (M * N)
    tl.store(out + rows[:, None] * OUT_ROW + columns[None, :] * OUT_COLUMN, value.to(out.dtype.element_ty), mask=inside)


def _wide(x: Tensor) -> tuple[Tensor, bool]:
    """`x` as `[n, m, k]` with `m <= k`, a view wherever one exists, and whether that transposed it."""
    rows, columns = x.shape[-2:]
    x = x.reshape(-1, rows, columns)
    return (x.mT, True) if rows > columns else (x, False)


def _strides(tall: bool, rows: int, columns: int) -> tuple[int, int]:
    """Strides by which a wide matrix is written to contiguous memory, transposed back if it was tall."""
    return (1, rows) if tall else (columns, 1)


def _piece(rows: int, columns: int) -> tuple[int, int]:
    return min(PIECE[0], triton.next_power_of_2(rows)), min(PIECE[1], triton.next_power_of_2(columns))


def _pieces(rows: int, columns: int) -> int:
    height, width = _piece(rows, columns)
    return cdiv(rows, height) * cdiv(columns, width)


def _tiles(rows: int, columns: int, tile: int, symmetric: bool) -> int:
    down = cdiv(rows, tile)
    return down * (down + 1) // 2 if symmetric else down * cdiv(columns, tile)


def _whole_options(rows: int, columns: int, dtype: torch.dtype) -> dict[str, Any]:
    """Launch options of the kernels that hold a whole matrix."""
    height, width = (max(16, triton.next_power_of_2(size)) for size in (rows, columns))
    return {
        "BM": height,
        "BN": width,
        "TYPE": LOW[dtype],
        "PRECISION": dot_precision(dtype),
        "num_warps": 8 if width > 64 else 4,
        "num_stages": 1,
    }


class _Products:
    """Launches of `_product` for one batch of wide matrices `[n, m, k]`."""

    def __init__(self, n: int, rows: int, columns: int, dtype: torch.dtype, squares: Tensor) -> None:
        self.n, self.rows, self.columns, self.dtype, self.squares = n, rows, columns, dtype, squares
        self.plans = {
            s: plan(n * _tiles(rows, rows if s else columns, 128, s), rows, dtype, multiprocessors(squares))
            for s in (True, False)
        }
        self.fixed = {"M": rows, "PARTS": squares.shape[1], "PRECISION": dot_precision(dtype)}

    def _launch(self, symmetric: bool, columns: int, depth: int, strides: tuple[int, int], *arguments: Any) -> None:
        tile, step, warps, stages = self.plans[symmetric]
        _product[(self.n * _tiles(self.rows, columns, tile, symmetric),)](
            *arguments, N=columns, K=depth, SYMMETRIC=symmetric, C_ROW=strides[0], C_COLUMN=strides[1], TILE=tile,
            BK=step, num_warps=warps, num_stages=stages, **self.fixed,
        )  # fmt: skip

    def symmetric(
        self,
        out: Tensor,
        left: Tensor,
        right: Tensor | None = None,
        *,
        p: Tensor | None = None,
        alpha: float = 0.0,
        beta: float = 1.0,
        power: int = 0,
    ) -> None:
        """`out <- s^power (alpha p + beta S)`, where S is `left left^T`, or `left right^T + right left^T`."""
        m, depth = self.rows, left.shape[2]
        pair = (left, left, None, None) if right is None else (left, right, right, left)
        self._launch(True, m, depth, (m, 1), out, *pair, p, self.squares, None, alpha, beta, power)

    def general(
        self,
        out: Tensor,
        pairs: Sequence[Tensor],
        p: Tensor,
        alpha: float,
        *,
        power: int = 0,
        tall: bool = False,
        dots: Tensor | None = None,
    ) -> None:
        """`out <- s^power (alpha p + l1 r1 + l2 r2)`, `pairs` being `l1, r1` or all four; `dots` as in the kernel."""
        m, k = self.rows, self.columns
        l1, r1, l2, r2 = (*pairs, None, None)[:4]
        self._launch(False, k, m, _strides(tall, m, k), out, l1, r1, l2, r2, p, self.squares, dots, alpha, 1.0, power)

    def tiles(self) -> int:
        """Tiles of one matrix in `general`."""
        return _tiles(self.rows, self.columns, self.plans[False].tile, False)


def _cast_pieces(x: Tensor, out: Tensor, squares: Tensor | None) -> None:
    n, rows, columns = x.shape
    height, width = _piece(rows, columns)
    _cast[(n * _pieces(rows, columns),)](x, out, squares, *x.stride(), M=rows, N=columns, BM=height, BN=width)


def _check(x: Tensor, coefficients: Sequence[Sequence[float]], dtype: torch.dtype, out_dtype: torch.dtype | None) -> None:
    if x.dim() < 2:
        raise ValueError(f"x must be a matrix or a batch of them, [..., M, N]; got shape {tuple(x.shape)}")
    for name, value in (
        ("x's dtype", x.dtype),
        ("dtype", dtype),
        ("out_dtype", x.dtype if out_dtype is None else out_dtype),
    ):
        if value not in LOW:
            raise TypeError(f"{name} must be torch.bfloat16, torch.float16 or torch.float32; got {value}")
    if not coefficients or any(not isinstance(row, Sequence) or len(row) != 3 for row in coefficients):
        raise ValueError(f"coefficients must be a non-empty sequence of (a, b, c) triples; got {coefficients!r}")


def newton_schulz_forward(
    x: Tensor,
    coefficients: Sequence[Sequence[float]],
    dtype: torch.dtype,
    keep: bool,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Orthogonalize without autograd, for use inside other operators.

    Args:
        x: `[..., M, N]`, float32, bfloat16 or float16, of any strides.
        coefficients: one `(a, b, c)` per iteration.
        dtype: precision of the products' operands; sums are in float32.
        keep: whether `newton_schulz_backward` will be called.
        out_dtype: dtype of the result; default that of `x`.

    Returns:
        The result `[..., M, N]`, contiguous, and what the gradient needs: the wide matrix before each iteration
        `[iterations, n, min(M, N), max(M, N)]` in `dtype`, and sums of squares `[n, pieces]` in float32. Both are new
        tensors, with no elements unless `keep`.
    """
    wide, tall = _wide(x)
    n, m, k = wide.shape
    out = torch.empty(x.shape, dtype=out_dtype or x.dtype, device=x.device)
    kept = torch.empty(_kept_shape(wide.shape, len(coefficients), keep), dtype=dtype, device=x.device)
    squares = torch.empty(_squares_shape(wide.shape, dtype, keep), dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return out, (kept, squares)
    row, column = _strides(tall, m, k)
    with on_device_of(x):
        if fits_one_program(m, k, dtype):
            _whole_forward[(n,)](
                wide, out, kept if keep else None, squares if keep else None, n, *wide.stride(),
                COEFFICIENTS=_flat(coefficients), M=m, N=k, OUT_ROW=row, OUT_COLUMN=column, **_whole_options(m, k, dtype),
            )  # fmt: skip
            return out, (kept, squares)
        sums = squares if keep else squares.new_empty(n, _pieces(m, k))
        states = kept.unbind() if keep else kept.new_empty(min(2, len(coefficients)), n, m, k).unbind()
        gram, poly = kept.new_empty(2, n, m, m).unbind()
        _cast_pieces(wide, states[0], sums)
        products = _Products(n, m, k, dtype, sums)
        for i, (a, b, c) in enumerate(coefficients):
            state, last = states[i % len(states)], i + 1 == len(coefficients)
            products.symmetric(gram, state, power=2 if i == 0 else 0)
            products.symmetric(poly, gram, p=gram, alpha=b, beta=c)
            following = out if last else states[(i + 1) % len(states)]
            products.general(following, (poly, state), state, a, power=int(i == 0), tall=tall and last)
    return out, (kept, squares)


def newton_schulz_backward(
    kept: Sequence[Tensor],
    grad: Tensor,
    coefficients: Sequence[Sequence[float]],
    dtype: torch.dtype,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The gradient of `newton_schulz_forward` with respect to `x`.

    At `x = 0` the norm counts as constant, as in the twin: the result is then the finite gradient of `x / 1e-7`.

    Args:
        kept: the second value that `newton_schulz_forward` returned with `keep=True`.
        grad: gradient of the result, `[..., M, N]`, of any floating-point dtype of 32 bits or fewer and any strides.
        coefficients: as in the forward call.
        dtype: as in the forward call.
        out_dtype: dtype of the gradient returned; default that of `grad`.

    Returns:
        `[..., M, N]`, contiguous.
    """
    states, squares = kept
    wide, tall = _wide(grad)
    n, m, k = wide.shape
    out = torch.empty(grad.shape, dtype=out_dtype or grad.dtype, device=grad.device)
    if grad.numel() == 0:
        return out
    row, column = _strides(tall, m, k)
    with on_device_of(grad):
        if fits_one_program(m, k, dtype):
            _whole_backward[(n,)](
                states, squares, wide, out, n, *wide.stride(), COEFFICIENTS=_flat(coefficients), M=m, N=k, OUT_ROW=row,
                OUT_COLUMN=column, **_whole_options(m, k, dtype),
            )  # fmt: skip
            return out
        products = _Products(n, m, k, dtype, squares)
        gram, poly, e, f = states.new_empty(4, n, m, m).unbind()
        outer, inner = states.new_empty(2, n, m, k).unbind()
        # the gradient of the normalization subtracts near-equal parts, so what goes into it is not rounded
        first = torch.empty(n, m, k, dtype=torch.float32, device=grad.device)
        dots = torch.empty(n, products.tiles(), dtype=torch.float32, device=grad.device)
        _cast_pieces(wide, outer, None)
        for i, (a, b, c) in reversed(list(enumerate(coefficients))):
            state, power = states[i], int(i == 0)
            products.symmetric(gram, state, power=2 * power)
            products.symmetric(poly, gram, p=gram, alpha=b, beta=c)
            products.symmetric(e, outer, state, power=power)
            products.symmetric(f, e, gram, p=e, alpha=b, beta=c)
            following = inner if i else first
            products.general(following, (f, state, poly, outer), outer, a, dots=None if i else dots)
            outer, inner = inner, outer
        height, width = _piece(m, k)
        _undo_norm[(n * _pieces(m, k),)](
            out, first, states[0], squares, dots, M=m, N=k, OUT_ROW=row, OUT_COLUMN=column, PARTS=squares.shape[1],
            DOTS=dots.shape[1], BM=height, BN=width,
        )  # fmt: skip
    return out


def _flat(coefficients: Sequence[Sequence[float]]) -> tuple[float, ...]:
    return tuple(float(value) for row in coefficients for value in row)


def _triples(values: Sequence[float]) -> list[tuple[float, ...]]:
    return [tuple(values[i : i + 3]) for i in range(0, len(values), 3)]


def _kept_shape(wide: Sequence[int], iterations: int, keep: bool) -> tuple[int, ...]:
    return (iterations, *wide) if keep else (0,)


def _squares_shape(wide: Sequence[int], dtype: torch.dtype, keep: bool) -> tuple[int, ...]:
    if not keep:
        return (0,)
    # widths are compiled into the kernels: where a trace has them as symbols, it takes their values
    m, k = int(wide[1]), int(wide[2])
    return (wide[0], 1 if fits_one_program(m, k, dtype) else _pieces(m, k))


def kept_shapes(
    shape: Sequence[int], iterations: int, dtype: torch.dtype, keep: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of what `newton_schulz_forward` keeps of matrices `[..., M, N]`."""
    rows, columns = sorted(shape[-2:])
    wide = (math.prod(shape[:-2]), rows, columns)
    return _kept_shape(wide, iterations, keep), _squares_shape(wide, dtype, keep)


@torch.library.custom_op("kvbind::newton_schulz", mutates_args=())
def _newton_schulz(
    x: Tensor, coefficients: Sequence[float], dtype: torch.dtype, out_dtype: torch.dtype, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    out, kept = newton_schulz_forward(x, _triples(coefficients), dtype, keep, out_dtype)
    return out, *kept


@_newton_schulz.register_fake
def _(
    x: Tensor, coefficients: Sequence[float], dtype: torch.dtype, out_dtype: torch.dtype, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    wide, _ = _wide(x)
    return (
        x.new_empty(x.shape, dtype=out_dtype),
        x.new_empty(_kept_shape(wide.shape, len(coefficients) // 3, keep), dtype=dtype),
        x.new_empty(_squares_shape(wide.shape, dtype, keep), dtype=torch.float32),
    )


@torch.library.custom_op("kvbind::newton_schulz_backward", mutates_args=())
def _newton_schulz_backward(
    states: Tensor, squares: Tensor, grad: Tensor, coefficients: Sequence[float], dtype: torch.dtype, out_dtype: torch.dtype
) -> Tensor:
    return newton_schulz_backward((states, squares), grad, _triples(coefficients), dtype, out_dtype)


@_newton_schulz_backward.register_fake
def _(
    states: Tensor, squares: Tensor, grad: Tensor, coefficients: Sequence[float], dtype: torch.dtype, out_dtype: torch.dtype
) -> Tensor:
    return grad.new_empty(grad.shape, dtype=out_dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, ctx.coefficients, ctx.dtype, _, ctx.keep = inputs
    ctx.x_dtype = x.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])


def _backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, None, None, None, None]:
    if grad is None:
        return None, None, None, None, None
    if not ctx.keep:
        raise RuntimeError("kvbind::newton_schulz was called with keep=False, so that it has no gradient")
    states, squares = ctx.saved_tensors
    return _newton_schulz_backward(states, squares, grad, ctx.coefficients, ctx.dtype, ctx.x_dtype), None, None, None, None


_newton_schulz.register_autograd(_backward, setup_context=_setup_context)


def newton_schulz(
    x: Tensor,
    coefficients: Sequence[Sequence[float]],
    dtype: torch.dtype = torch.bfloat16,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Map every matrix of a batch towards its nearest semi-orthogonal one (Muon; arXiv 2505.23884 for its use here).

    `X = x / (||x||_F + 1e-7)`, then for each `(a, b, c)`: `A = X X^T`, `X <- a X + (b A + c A A) X`. A matrix with more
    rows than columns is read and written transposed.

    Args:
        x: `[..., M, N]`, float32, bfloat16 or float16, of any strides.
        coefficients: one `(a, b, c)` per iteration.
        dtype: precision of the operands of all products, and to which X is rounded before each of them; sums are in float32.
            In float32, products obey `torch.set_float32_matmul_precision`. The last X is not rounded to it.
        out_dtype: dtype of the result; default that of `x`.

    Returns:
        `[..., M, N]`, contiguous; differentiable once.

    Raises:
        TypeError: a dtype other than bfloat16, float16 and float32.
        ValueError: `x` is no matrix, or `coefficients` are no triples.
    """
    _check(x, coefficients, dtype, out_dtype)
    keep = torch.is_grad_enabled() and x.requires_grad
    return _newton_schulz(x, _flat(coefficients), dtype, out_dtype or x.dtype, keep)[0]
