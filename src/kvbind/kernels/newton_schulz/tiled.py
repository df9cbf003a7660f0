r"""Newton-Schulz of matrices too large for one program: all products of all iterations in one launch, tile by tile.

The equations are those of `kvbind.kernels.newton_schulz`. A launch per product would leave a part of the device idle at the
end of each, and a small batch would wait for launches. Instead, the tiles of all products are put in one order, and every
program takes the next of them, its *ticket*. A tile needs its own matrix only: its program waits until the earlier products
of that matrix are finished, by a count of the matrix's finished tiles, computes, stores, and adds one to the count. Whoever
waits waits for lower tickets, which programs that run already hold, so that waiting ends however many programs the device
runs at once, and whatever else runs there. Only the schedule varies: every sum has its order, and results repeat bit by bit.

Tickets go by groups of matrices, in a group by *stage*, in a stage by matrix. Stages are what a matrix has to finish one
after another: in the forward launch the products A, B and X' of every iteration; in the backward launch E, F and dL/dX,
where the first two stages also compute A and B for the iteration that comes next, as those wait for nothing.

Symmetric products are computed on and below the diagonal, and their tiles written twice. On the diagonal, X X^T reads its
rows once, and E = D X^T + (D X^T)^T is one product instead of two; so is F, as A and E are symmetric.

The input is only cast to the low precision, and the squares of its pieces are summed; the first iteration multiplies by
powers of `1 / (||G||_F + 1e-7)` where it writes its results, so that no pass over the input has to wait for its norm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvbind.kernels.common.devices import multiprocessors
from kvbind.kernels.common.operands import cdiv, dot_precision, power_of_2
from kvbind.kernels.launching.launcher import Launcher

EPSILON = tl.constexpr(1e-7)
"""What is added to the norm, as in the reference implementation."""

PIECE = (64, 128)
"""Rows and columns, at most, of the pieces in which a matrix is cast and its squares are summed."""

REGISTERS = 128
"""Of a thread: as few as let 16 warps share a multiprocessor, some of which compute while others wait."""

LINE = 32
"""Counts that share a cache line; a matrix's count has a line of its own."""

_LINE = tl.constexpr(LINE)


class TilePlan(NamedTuple):
    """How products are launched: a square output tile, the depth of a step, warps, stages of its pipeline, and registers."""

    tile: int
    depth: int
    warps: int
    stages: int
    registers: int = REGISTERS


def plan(tiles: int, rows: int, dtype: torch.dtype, multiprocessors: int) -> TilePlan:
    """Choose tiles by how many there are: large ones reuse operands best, but only if they fill the card.

    Args:
        tiles: tiles of 128 x 128 of a symmetric product, over all matrices.
        rows: rows of a matrix held wide.
        dtype: precision of the products.
        multiprocessors: multiprocessors of the device.
    """
    if dtype == torch.float32:
        return TilePlan(64, 32, 4, 2)
    if rows > 64 and tiles >= multiprocessors:
        # one program to a multiprocessor has all registers, if few have to wait for a place
        return TilePlan(128, 64, 8, 3, REGISTERS if tiles >= 2 * multiprocessors else 255)
    return TilePlan(64, 64, 4, 4)


def group_size(n: int, tiles: int, warps: int, multiprocessors: int) -> int:
    """How many of `n` matrices go through all products before the next do.

    Few, so that what they read and write stays in the L2 cache; but enough that a stage has a third more tiles than programs
    run at once: with fewer, tiles would often come up before the last ones they need are finished.

    Args:
        n: number of matrices.
        tiles: tiles of one matrix in the stage that has the fewest.
        warps: warps of a program.
        multiprocessors: multiprocessors of the device.
    """
    least = cdiv(4 * multiprocessors * (16 // warps), 3 * tiles)
    return cdiv(n, max(1, n // least))


@triton.jit
def inverse_norm(squares, PARTS: tl.constexpr):
    """`1 / (norm + epsilon)` and the norm, of a matrix whose pieces' sums of squares start at `squares`."""
    parts = tl.arange(0, triton.next_power_of_2(PARTS))
    norm = tl.sqrt(tl.sum(tl.load(squares + parts, mask=parts < PARTS, other=0.0), 0))
    return 1.0 / (norm + EPSILON), norm


@triton.jit
def coefficient(values: tl.constexpr, iteration, WHICH: tl.constexpr):
    """`values[3 * iteration + WHICH]` with a run-time iteration, so that code is not repeated for each."""
    value = 0.0
    for i in tl.static_range(len(values) // 3):
        value = tl.where(iteration == i, values[3 * i + WHICH], value)
    return value


@Launcher
@triton.jit
def _cast(
    x, out, squares, counts, stride_batch, stride_row, stride_column,
    M: tl.constexpr, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    # out [n, M, N] <- x in out's dtype; squares [n, pieces] <- sums of squares, unless None; all counts <- 0
    ACROSS: tl.constexpr = (N + BN - 1) // BN
    PARTS: tl.constexpr = (M + BM - 1) // BM * ACROSS
    program = tl.program_id(0)
    batch = (program // PARTS).to(tl.int64)
    piece = program % PARTS
    if program == 0:
        tl.store(counts, 0)
    if piece == 0:
        tl.store(counts + (1 + batch) * _LINE, 0)
    rows = piece // ACROSS * BM + tl.arange(0, BM)
    columns = piece % ACROSS * BN + tl.arange(0, BN)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    x += batch * stride_batch + rows.to(tl.int64)[:, None] * stride_row + columns.to(tl.int64)[None, :] * stride_column
    value = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + batch * (M * N) + rows[:, None] * N + columns[None, :], value.to(out.dtype.element_ty), mask=inside)
    if squares is not None:
        tl.store(squares + program, tl.sum(tl.sum(value * value, 1), 0))


@triton.jit
def _item(ticket, n, group, ITERATIONS: tl.constexpr, S: tl.constexpr, G: tl.constexpr, AHEAD: tl.constexpr):
    # What a ticket stands for: matrix, step, stage, tile, and how many tiles of the matrix all stages before it have.
    # S and G are the tiles of a symmetric product and of a general one. A step has a stage of each of two symmetric
    # products, and one of the general product. If AHEAD, the symmetric stages have S tiles more, for the next step's
    # products that need not wait. Those of the first step make up step -1, and the last step has none.
    WIDTH: tl.constexpr = 2 * S if AHEAD else S
    BEFORE: tl.constexpr = 2 * S if AHEAD else 0
    STEP: tl.constexpr = 2 * WIDTH + G
    first = ticket // (group * (ITERATIONS * STEP)) * group
    ticket -= first * (ITERATIONS * STEP)
    size = tl.minimum(group, n - first)
    before = size * BEFORE
    ahead = ticket < before
    step = tl.where(ahead, -1, (ticket - before) // (size * STEP))
    ticket -= tl.where(ahead, 0, before + step * (size * STEP))
    width = tl.where(ahead | (step == ITERATIONS - 1), S, WIDTH)
    stage = tl.minimum(ticket // (size * width), 2)
    ticket -= stage * (size * width)
    tiles = tl.where(stage == 2, G, width)
    need = tl.where(ahead, 0, BEFORE + step * STEP) + stage * width
    return (first + ticket // tiles).to(tl.int64), step, stage, ticket % tiles, need


@triton.jit
def _wait(count, tiles):
    # until so many tiles are finished; what was stored before they were counted is then seen by all threads
    if tiles > 0:
        while tl.atomic_add(count, 0, sem="acquire") < tiles:
            pass


@triton.jit
def _finish(count):
    # counts a tile once all threads have stored theirs of it
    tl.debug_barrier()
    tl.atomic_add(count, 1, sem="release")


@triton.jit
def _norm_power(squares, power, PARTS: tl.constexpr):
    # the inverse norm to the power of 0, 1 or 2
    scale = 1.0
    if power > 0:
        inverse, _ = inverse_norm(squares, PARTS)
        scale = tl.where(power == 2, inverse * inverse, inverse)
    return scale


@triton.jit
def _symmetric(
    c, left, right, paired, added, alpha, beta, depth, t,
    M: tl.constexpr, N: tl.constexpr, PAIRS: tl.constexpr, TILE: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # c [M, M] <- alpha left + beta S, tile t of it and the one mirrored. S = left left^T, or if paired, which takes PAIRS,
    # left right^T + right left^T; depth is the columns of both. If not added, there is no alpha left, and left need not be
    # [M, M].
    # t = i (i + 1) / 2 + j with j <= i; the small addend outweighs the rounding of the root
    i = ((tl.sqrt(8.0 * t + 1.0) - 1.0) * 0.5 + 1e-3).to(tl.int32)
    j = t - i * (i + 1) // 2
    rows = i * TILE + tl.arange(0, TILE)
    columns = j * TILE + tl.arange(0, TILE)
    ks = tl.arange(0, BK)
    # rows and columns past the last are never stored, so that any address inside will do
    at_l = (rows % M)[:, None] * depth + ks[None, :]
    at_r = (columns % M)[None, :] * depth + ks[:, None]
    steps = (depth + BK - 1) // BK
    acc = tl.zeros((TILE, TILE), tl.float32)
    if (i == j) & (paired == 0):
        for k in range(0, steps):
            if M % BK == 0 and N % BK == 0:
                x = tl.load(left + k * BK + at_l)
            else:
                x = tl.load(left + k * BK + at_l, mask=(ks < depth - k * BK)[None, :], other=0.0)
            acc = tl.dot(x, tl.trans(x), acc, input_precision=PRECISION)
    else:
        for step in range(0, tl.where((paired != 0) & (i > j), 2 * steps, steps) if PAIRS else steps):
            if PAIRS:
                # both products in one loop keep its pipeline full
                later = step >= steps
                first, second = tl.where(later, right, left), tl.where(later, left, right)
                k = step - tl.where(later, steps, 0)
            else:
                first, second, k = left, left, step
            if M % BK == 0 and N % BK == 0:
                x = tl.load(first + k * BK + at_l)
                y = tl.load(second + k * BK + at_r)
            else:
                x = tl.load(first + k * BK + at_l, mask=(ks < depth - k * BK)[None, :], other=0.0)
                y = tl.load(second + k * BK + at_r, mask=(ks < depth - k * BK)[:, None], other=0.0)
            acc = tl.dot(x, y, acc, input_precision=PRECISION)
    if PAIRS:  # noqa: SIM102 - known when compiling, unlike the next
        if (i == j) & (paired != 0):
            acc += tl.trans(acc)
    acc *= beta
    inside = (rows < M)[:, None] & (columns < M)[None, :]
    at = rows[:, None] * M + columns[None, :]
    if added:
        acc += alpha * tl.load(left + at, mask=inside, other=0.0).to(tl.float32)
    value = acc.to(c.dtype.element_ty)
    tl.store(c + at, value, mask=inside)
    if i > j:
        tl.store(c + columns[None, :] * M + rows[:, None], value, mask=inside)


@triton.jit
def _general(
    l1, r1, l2, r2, halves, between, i, j,
    M: tl.constexpr, N: tl.constexpr, TILE: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Tile i, j of l1 r1 + l2 r2, of [M, M] and [M, N]; l2 and r2 may be None. In two halves, between multiplies l1 r1;
    # in one, both products keep one pipeline full.
    STEPS: tl.constexpr = (M + BK - 1) // BK
    ks = tl.arange(0, BK)
    at_l = ((i * TILE + tl.arange(0, TILE)) % M)[:, None] * M + ks[None, :]
    at_r = ks[:, None] * N + ((j * TILE + tl.arange(0, TILE)) % N)[None, :]
    acc = tl.zeros((TILE, TILE), tl.float32)
    for half in range(0, 1 if l2 is None else halves):
        if l2 is not None:
            acc *= tl.where(half > 0, between, 1.0)
        for step in range(half * STEPS, STEPS if l2 is None else tl.where(half + 1 < halves, STEPS, 2 * STEPS)):
            if l2 is None:
                left, right, k = l1, r1, step
            else:
                later = step >= STEPS
                left, right = tl.where(later, l2, l1), tl.where(later, r2, r1)
                k = step - tl.where(later, STEPS, 0)
            if M % BK == 0:
                x = tl.load(left + k * BK + at_l)
                y = tl.load(right + k * BK * N + at_r)
            else:
                x = tl.load(left + k * BK + at_l, mask=(ks < M - k * BK)[None, :], other=0.0)
                y = tl.load(right + k * BK * N + at_r, mask=(ks < M - k * BK)[:, None], other=0.0)
            acc = tl.dot(x, y, acc, input_precision=PRECISION)
    return acc


@Launcher
@triton.jit(do_not_specialize=["n", "group", "slots"])
def _products_forward(
    out, states, scratch, squares, counts, n, group, slots,
    COEFFICIENTS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, OUT_ROW: tl.constexpr, OUT_COLUMN: tl.constexpr,
    PARTS: tl.constexpr, TILE: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # out [n, M, N] <- all iterations from states[0]; states [slots, n, M, N] are written round and round;
    # scratch [2, n, M, M] is for A and B
    ITERATIONS: tl.constexpr = len(COEFFICIENTS) // 3
    DOWN: tl.constexpr = (M + TILE - 1) // TILE
    ACROSS: tl.constexpr = (N + TILE - 1) // TILE
    ticket = tl.atomic_add(counts, 1, sem="relaxed")
    batch, i, stage, t, need = _item(ticket, n, group, ITERATIONS, DOWN * (DOWN + 1) // 2, DOWN * ACROSS, False)
    count = counts + (1 + batch) * _LINE
    _wait(count, need)
    x = states + (i % slots * n + batch) * (M * N)
    gram = scratch + batch * (M * M)
    poly = scratch + (n + batch) * (M * M)
    squares += batch * PARTS
    if stage < 2:
        left = tl.where(stage == 0, x, gram)
        scale = _norm_power(squares, tl.where((i == 0) & (stage == 0), 2, 0), PARTS)
        _symmetric(
            tl.where(stage == 0, gram, poly), left, left, 0, stage == 1, coefficient(COEFFICIENTS, i, 1),
            tl.where(stage == 0, scale, coefficient(COEFFICIENTS, i, 2)), N if M == N else tl.where(stage == 0, N, M), t,
            M, N, False, TILE, BK, PRECISION,
        )  # fmt: skip
    else:
        acc = _general(poly, x, None, None, 1, 1.0, t // ACROSS, t % ACROSS, M, N, TILE, BK, PRECISION)
        rows = t // ACROSS * TILE + tl.arange(0, TILE)
        columns = t % ACROSS * TILE + tl.arange(0, TILE)
        inside = (rows < M)[:, None] & (columns < N)[None, :]
        at = rows[:, None] * N + columns[None, :]
        acc += coefficient(COEFFICIENTS, i, 0) * tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        # each branch has a last multiplication of its own, or else the compiler moves what they do to acc out of both
        scale = _norm_power(squares, tl.where(i == 0, 1, 0), PARTS)
        if i == ITERATIONS - 1:
            result = out + batch * (M * N) + rows[:, None] * OUT_ROW + columns[None, :] * OUT_COLUMN
            tl.store(result, (acc * scale).to(out.dtype.element_ty), mask=inside)
        else:
            following = states + ((i + 1) % slots * n + batch) * (M * N)
            tl.store(following + at, (acc * scale).to(states.dtype.element_ty), mask=inside)
    _finish(count)


@Launcher
@triton.jit(do_not_specialize=["n", "group"])
def _products_backward(
    first, dots, grads, states, scratch, squares, counts, n, group,
    COEFFICIENTS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr,
    BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # From grads[0] of grads [2, n, M, N], the gradient of the result, that of the first iteration's X. With s the inverse
    # norm, that X is s states[0]; first [n, M, N] <- s dL/dX, and dots [n, tiles] <- sums over tiles of states[0] dL/dX.
    # scratch [6, n, M, M] is for E, F, A twice and B twice.
    ITERATIONS: tl.constexpr = len(COEFFICIENTS) // 3
    DOWN: tl.constexpr = (M + TILE - 1) // TILE
    ACROSS: tl.constexpr = (N + TILE - 1) // TILE
    S: tl.constexpr = DOWN * (DOWN + 1) // 2
    ticket = tl.atomic_add(counts, 1, sem="relaxed")
    batch, step, stage, t, need = _item(ticket, n, group, ITERATIONS, S, DOWN * ACROSS, True)
    count = counts + (1 + batch) * _LINE
    _wait(count, need)
    d = grads + (step % 2 * n + batch) * (M * N)
    e = scratch + batch * (M * M)
    f = scratch + (n + batch) * (M * M)
    squares += batch * PARTS
    i = ITERATIONS - 1 - step
    if stage < 2:
        ahead = (step < 0) | (t >= S)
        i -= tl.where(ahead, 1, 0)
        x = states + (i * n + batch) * (M * N)
        gram = scratch + ((2 + i % 2) * n + batch) * (M * M)
        poly = scratch + ((4 + i % 2) * n + batch) * (M * M)
        power = tl.where((i == 0) & (stage == 0), tl.where(ahead, 2, 1), 0)
        scale = _norm_power(squares, power, PARTS)
        _symmetric(
            tl.where(stage == 0, tl.where(ahead, gram, e), tl.where(ahead, poly, f)),
            tl.where(stage == 0, tl.where(ahead, x, d), tl.where(ahead, gram, e)), tl.where(stage == 0, x, gram),
            tl.where(ahead, 0, 1), stage == 1, coefficient(COEFFICIENTS, i, 1),
            tl.where(stage == 0, scale, coefficient(COEFFICIENTS, i, 2)), N if M == N else tl.where(stage == 0, N, M),
            t % S, M, N, True, TILE, BK, PRECISION,
        )  # fmt: skip
    else:
        x = states + (i * n + batch) * (M * N)
        poly = scratch + ((4 + i % 2) * n + batch) * (M * M)
        last = i == 0
        scale = _norm_power(squares, tl.where(last, 1, 0), PARTS)
        halves = tl.where(last, 2, 1)
        acc = _general(f, x, poly, d, halves, scale, t // ACROSS, t % ACROSS, M, N, TILE, BK, PRECISION)
        rows = t // ACROSS * TILE + tl.arange(0, TILE)
        columns = t % ACROSS * TILE + tl.arange(0, TILE)
        inside = (rows < M)[:, None] & (columns < N)[None, :]
        at = rows[:, None] * N + columns[None, :]
        acc += coefficient(COEFFICIENTS, i, 0) * tl.load(d + at, mask=inside, other=0.0).to(tl.float32)
        if last:
            # the gradient of the normalization subtracts near-equal parts, so what goes into it is not rounded
            tl.store(first + batch * (M * N) + at, acc * scale, mask=inside)
            other = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(dots + batch * (DOWN * ACROSS) + t, tl.sum(acc * other))
        else:
            following = grads + ((step + 1) % 2 * n + batch) * (M * N)
            tl.store(following + at, acc.to(grads.dtype.element_ty), mask=inside)
    _finish(count)


@Launcher
@triton.jit
def _undo_norm(
    out, grad, x, squares, dots,
    M: tl.constexpr, N: tl.constexpr, OUT_ROW: tl.constexpr, OUT_COLUMN: tl.constexpr, PARTS: tl.constexpr,
    DOTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    # out [n, M, N] <- the gradient of s x, s = 1 / (norm + epsilon), from grad = s dL/d(s x) and dots, the pieces of
    # <dL/d(s x), x>
    ACROSS: tl.constexpr = (N + BN - 1) // BN
    PIECES: tl.constexpr = (M + BM - 1) // BM * ACROSS
    program = tl.program_id(0)
    batch = (program // PIECES).to(tl.int64)
    piece = program % PIECES
    scale, norm = inverse_norm(squares + batch * PARTS, PARTS)
    parts = tl.arange(0, triton.next_power_of_2(DOTS))
    dot = tl.sum(tl.load(dots + batch * DOTS + parts, mask=parts < DOTS, other=0.0), 0)
    along = tl.where(norm > 0, dot * scale * scale / tl.where(norm > 0, norm, 1.0), 0.0)
    rows = piece // ACROSS * BM + tl.arange(0, BM)
    columns = piece % ACROSS * BN + tl.arange(0, BN)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    at = batch * (M * N) + rows[:, None] * N + columns[None, :]
    value = tl.load(grad + at, mask=inside, other=0.0)
    value -= along * tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    out += batch * (M * N)
    tl.store(out + rows[:, None] * OUT_ROW + columns[None, :] * OUT_COLUMN, value.to(out.dtype.element_ty), mask=inside)


class _Call(NamedTuple):
    """A launch but for its tensors: `kernel[grid](*tensors, *numbers, **constants)`."""

    grid: tuple[int, ...]
    numbers: tuple[int, ...]
    constants: dict[str, Any]


class TiledCalls:
    """The launches for one batch of matrices.

    Args:
        shape: `[n, m, k]`, `m <= k`.
        strides: of what is read.
        out_strides: of a row and of a column in a matrix of the result.
        coefficients: three per iteration.
        dtype: precision of the products.
        processors: multiprocessors of the device.
    """

    def __init__(
        self,
        shape: Sequence[int],
        strides: Sequence[int],
        out_strides: tuple[int, int],
        coefficients: tuple[float, ...],
        dtype: torch.dtype,
        processors: int,
    ) -> None:
        n, m, k = shape
        down = cdiv(m, 128)
        tile, depth, warps, stages, registers = plan(n * down * (down + 1) // 2, m, dtype, processors)
        down, across = cdiv(m, tile), cdiv(k, tile)
        height, width = _piece(m, k)
        self.n, self.tiles = n, down * across
        self.out = {"OUT_ROW": out_strides[0], "OUT_COLUMN": out_strides[1]}
        self.block = {"M": m, "N": k, "BM": height, "BN": width}
        self.parts = pieces(m, k)
        self.cast = _Call((n * self.parts,), tuple(strides), self.block)

        def products(ahead: bool) -> _Call:
            symmetric = down * (down + 1) // 2 * (2 if ahead else 1)
            constants = {
                "COEFFICIENTS": coefficients, "M": m, "N": k, "PARTS": self.parts, "TILE": tile, "BK": depth,
                "PRECISION": dot_precision(dtype), "num_warps": warps, "num_stages": stages,
                "maxnreg": REGISTERS if ahead else registers,
            }  # fmt: skip
            items = n * len(coefficients) // 3 * (2 * symmetric + down * across)
            group = group_size(n, min(symmetric, down * across), warps, processors)
            return _Call((items,), (n, group), constants)

        self.products = products

    def forward(self, slots: int) -> _Call:
        """That of `_products_forward`, with so many places for X."""
        grid, numbers, constants = self.products(False)
        return _Call(grid, (*numbers, slots), self.out | constants)

    def backward(self) -> tuple[_Call, _Call]:
        """Those of `_products_backward` and `_undo_norm`."""
        undo = self.block | self.out | {"PARTS": self.parts, "DOTS": self.tiles}
        return self.products(True), _Call((self.n * self.parts,), (), undo)


def _piece(rows: int, columns: int) -> tuple[int, int]:
    return min(PIECE[0], power_of_2(rows)), min(PIECE[1], power_of_2(columns))


def pieces(rows: int, columns: int) -> int:
    """Sums of squares of a matrix."""
    height, width = _piece(rows, columns)
    return cdiv(rows, height) * cdiv(columns, width)


def _calls(x: Tensor, strides: tuple[int, int], coefficients: tuple[float, ...], dtype: torch.dtype) -> TiledCalls:
    return TiledCalls(x.shape, x.stride(), strides, coefficients, dtype, multiprocessors(x))


def _unbound(launcher: Launcher, tensors: int, call: _Call) -> Callable[..., None]:
    def launch(stream: int, *given: Any) -> None:
        launcher[call.grid](*given, *call.numbers, **call.constants)

    return launch


def _bound(launcher: Launcher, tensors: int, call: _Call) -> Callable[..., None]:
    return launcher.bound(tensors, *call[:2], **call.constants)


def new_counts(n: int, like: Tensor) -> Tensor:
    """Room for the counts of tickets and of n matrices' finished tiles, on a tensor's device."""
    return torch.empty((1 + n) * LINE, dtype=torch.int32, device=like.device)


class TiledForward:
    """`forward` of matrices of one shape; launches are bound, or else look up what they need each time.

    Args:
        calls: the launches.
        slots: places for X.
        bound: the shape comes again.
    """

    def __init__(self, calls: TiledCalls, slots: int, *, bound: bool) -> None:
        how = _bound if bound else _unbound
        self.calls = calls
        self.cast = how(_cast, 4, calls.cast)
        self.products = how(_products_forward, 5, calls.forward(slots))

    def __call__(self, stream: int, x: Tensor, out: Tensor, states: Tensor, squares: Tensor) -> None:
        """Launch on the current stream."""
        counts = new_counts(self.calls.n, squares)
        rows = self.calls.block["M"]
        scratch = states.new_empty(2, self.calls.n, rows, rows)
        # only its first place is written
        self.cast(stream, x, states, squares, counts)
        self.products(stream, out, states, scratch, squares, counts)


class TiledBackward:
    """`backward` of matrices of one shape.

    Args:
        calls: the launches.
        bound: the shape comes again.
    """

    def __init__(self, calls: TiledCalls, *, bound: bool) -> None:
        how = _bound if bound else _unbound
        self.calls = calls
        products, undo = calls.backward()
        self.cast = how(_cast, 4, calls.cast)
        self.products, self.undo = how(_products_backward, 7, products), how(_undo_norm, 5, undo)

    def __call__(self, stream: int, grad: Tensor, out: Tensor, states: Tensor, squares: Tensor) -> None:
        """Launch on the current stream."""
        n, rows, columns = self.calls.n, self.calls.block["M"], self.calls.block["N"]
        counts = new_counts(self.calls.n, squares)
        grads, scratch = states.new_empty(2, n, rows, columns), states.new_empty(6, n, rows, rows)
        first, dots = squares.new_empty(n, rows, columns), squares.new_empty(n, self.calls.tiles)
        self.cast(stream, grad, grads, None, counts)
        self.products(stream, first, dots, grads, states, scratch, squares, counts)
        self.undo(stream, out, first, states, squares, dots)


def forward(
    x: Tensor, out: Tensor, strides: tuple[int, int], states: Tensor, squares: Tensor, coefficients: tuple[float, ...]
) -> None:
    """Orthogonalize wide matrices.

    Args:
        x: `[n, m, k]`, `m <= k`, of any strides.
        out: contiguous, n matrices; gets the result.
        strides: of a row and of a column in a matrix of `out`.
        states: `[iterations, n, m, k]`, contiguous, in the precision of the products; gets X before each iteration. With
            two places, or one for a single iteration, they are used in turn.
        squares: `[n, pieces(m, k)]` in float32; gets sums of squares of x.
        coefficients: three per iteration.
    """
    TiledForward(_calls(x, strides, coefficients, states.dtype), len(states), bound=False)(0, x, out, states, squares)


def backward(
    grad: Tensor, out: Tensor, strides: tuple[int, int], states: Tensor, squares: Tensor, coefficients: tuple[float, ...]
) -> None:
    """The gradient of `forward` with respect to `x`.

    Args:
        grad: gradient of the result, `[n, m, k]`, of any strides.
        out: contiguous, n matrices; gets the gradient.
        strides: of a row and of a column in a matrix of `out`.
        states: as `forward` wrote them, one per iteration.
        squares: as `forward` wrote them.
        coefficients: as in the forward call.
    """
    TiledBackward(_calls(grad, strides, coefficients, states.dtype), bound=False)(0, grad, out, states, squares)
