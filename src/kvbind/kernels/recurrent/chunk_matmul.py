"""Two products that know chunks: over a chunk's tokens, and of a chunk's tokens with its own matrices.

Tokens are `[B, T, H, D]` views with any strides and a contiguous last axis; T is a whole number of chunks. Matrices are
`[..., chunks, B*H, in * out]` views with a contiguous last axis: slices of packed weights
(`packed_weights`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvbind.kernels.common.devices import on_device_of
from kvbind.kernels.common.operands import cdiv, dot_precision
from kvbind.kernels.launching.launcher import Launcher


class Tile(NamedTuple):
    """How a product is cut: rows and columns of the output and depth of a step, warps, and stages of its pipeline."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


WIDE = Tile(128, 128, 64, 8, 3)
NARROW = Tile(64, 64, 64, 4, 4)
FULL_PRECISION = Tile(64, 32, 32, 4, 2)
"""For float32, whose operands take twice the room and whose products are unrolled."""

FILLS = 96
"""Programs from which large tiles keep a device busy; below, smaller ones do better."""


def tile_for(dtype: torch.dtype, programs: int, rows: int) -> Tile:
    """The tile for outputs of `rows` rows that `WIDE` cuts into `programs`."""
    if dtype == torch.float32:
        return FULL_PRECISION
    return WIDE if programs >= FILLS and rows > 64 else NARROW


@triton.jit
def _over_tokens(left, left_t, right, right_t, i, j, length, M: tl.constexpr, N: tl.constexpr, BT: tl.constexpr,
                 PRECISION: tl.constexpr):  # fmt: skip
    # columns past the last are never stored, so that any address inside will do
    tokens = tl.arange(0, BT)
    ls = left + tokens[:, None] * left_t + (i % M)[None, :]
    rs = right + tokens[:, None] * right_t + (j % N)[None, :]
    acc = tl.zeros((i.shape[0], j.shape[0]), tl.float32)
    for t in range(0, length, BT):
        inside = tokens[:, None] < length - t
        a = tl.load(ls, mask=inside, other=0.0)
        b = tl.load(rs, mask=inside, other=0.0)
        acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)
        ls += BT * left_t
        rs += BT * right_t
    return acc


@triton.jit
def _finish(acc, i, j, z, out, add, copy, gates, M: tl.constexpr, N: tl.constexpr, ADD: tl.constexpr, GATED: tl.constexpr,
            COPY: tl.constexpr):  # fmt: skip
    place = i[:, None] * N + j[None, :]
    inside = (i < M)[:, None] & (j < N)[None, :]
    if ADD:
        more = tl.load(add + place, mask=inside, other=0.0)
        if GATED:
            more *= tl.load(gates + z)
        acc += more
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=inside)
    if COPY:
        tl.store(copy + place, acc.to(copy.dtype.element_ty), mask=inside)


@Launcher
@triton.jit(do_not_specialize=["heads", "chunk"])
def _outer_kernel(
    x, a, h, y, theta, last, add_theta, add_last, copy_theta, copy_last, gates, heads, chunk,
    x_b, x_t, x_h, a_j, a_b, a_t, a_h, h_b, h_t, h_h, y_b, y_t, y_h, theta_c, theta_z, last_c, last_z,
    KEY: tl.constexpr, HIDDEN: tl.constexpr, VALUE: tl.constexpr, THETA: tl.constexpr, LAST: tl.constexpr,
    ADD: tl.constexpr, GATED: tl.constexpr, COPY: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    across: tl.constexpr = (HIDDEN + BN - 1) // BN
    columns: tl.constexpr = (VALUE + BN - 1) // BN
    each: tl.constexpr = THETA * ((KEY + BM - 1) // BM) * across
    both: tl.constexpr = 2 * each
    tiles: tl.constexpr = both + LAST * ((HIDDEN + BM - 1) // BM) * columns
    c, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    z = tl.program_id(1).to(tl.int64)
    b, head, first = z // heads, z % heads, c * chunk
    if THETA:  # noqa: SIM102 (one is known when compiled)
        if tile < both:
            which = tile // each
            i = (tile % each) // across * BM + tl.arange(0, BM)
            j = (tile % each) % across * BN + tl.arange(0, BN)
            acc = _over_tokens(x + b * x_b + head * x_h + first * x_t, x_t,
                               a + which * a_j + b * a_b + head * a_h + first * a_t, a_t,
                               i, j, chunk, KEY, HIDDEN, BT, PRECISION)  # fmt: skip
            offset = c * theta_c + z * theta_z + which * (KEY * HIDDEN)
            _finish(
                acc, i, j, z, theta + offset, add_theta + offset, copy_theta + offset, gates, KEY, HIDDEN, ADD, GATED, COPY
            )
    if LAST:  # noqa: SIM102
        if tile >= both:
            i = (tile - both) // columns * BM + tl.arange(0, BM)
            j = (tile - both) % columns * BN + tl.arange(0, BN)
            acc = _over_tokens(h + b * h_b + head * h_h + first * h_t, h_t, y + b * y_b + head * y_h + first * y_t, y_t,
                               i, j, chunk, HIDDEN, VALUE, BT, PRECISION)  # fmt: skip
            offset = c * last_c + z * last_z
            _finish(
                acc, i, j, z, last + offset, add_last + offset, copy_last + offset, gates, HIDDEN, VALUE, ADD, GATED, COPY
            )


def outer(
    chunk: int,
    *,
    theta: tuple[Tensor, Tensor, Tensor] | None = None,
    last: tuple[Tensor, Tensor, Tensor] | None = None,
    add: tuple[Tensor | None, Tensor | None] | None = None,
    gates: Tensor | None = None,
    copy: tuple[Tensor | None, Tensor | None] | None = None,
) -> None:
    """Sums over each chunk's tokens of `left^T right`, for the first layers, the last, or all of them in one launch.

    Args:
        chunk: tokens in a chunk.
        theta: keys `[B, T, H, Dk]`, the two factors `[2, B, T, H, Dh]`, and the output `[chunks, B*H, 2 * Dk * Dh]`.
        last: features `[B, T, H, Dh]`, values `[B, T, H, Dv]`, and the output `[chunks, B*H, Dh * Dv]`.
        add: what to add to the theta and last outputs; float32, laid out as they are. It may be the output itself.
        gates: float32 `[B*H]` that multiply what is added.
        copy: where to write the outputs a second time, laid out as they are.
    """
    any_left, any_right, any_out = theta or last  # type: ignore[misc]
    x, a, theta_out = theta or (any_left, any_right.unsqueeze(0), any_out)
    h, y, last_out = last or (any_left, any_right[0], any_out)
    batch, tokens, heads, _ = any_left.shape
    key, hidden = x.shape[-1], (a if theta else h).shape[-1]
    value = y.shape[-1]
    z, chunks = batch * heads, tokens // chunk

    def tiles(tile: Tile) -> int:
        first = 2 * cdiv(key, tile.rows) * cdiv(hidden, tile.columns) if theta else 0
        return first + (cdiv(hidden, tile.rows) * cdiv(value, tile.columns) if last else 0)

    tile = tile_for(x.dtype, tiles(WIDE) * z * chunks, key)
    added, copied = add or (None, None), copy or (None, None)
    with on_device_of(any_left):
        _outer_kernel[(tiles(tile) * chunks, z)](
            x, a, h, y, theta_out, last_out, *(theta_out if t is None else t for t in (*added, *copied)),
            theta_out if gates is None else gates, heads, chunk,
            *x.stride()[:3], *a.stride()[:4], *h.stride()[:3], *y.stride()[:3],
            *theta_out.stride()[:2], *last_out.stride()[:2],
            KEY=key, HIDDEN=hidden, VALUE=value, THETA=theta is not None, LAST=last is not None, ADD=add is not None,
            GATED=gates is not None, COPY=copy is not None, PRECISION=dot_precision(x.dtype),
            BM=tile.rows, BN=tile.columns, BT=tile.depth, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


@Launcher
@triton.jit(do_not_specialize=["heads", "chunk"])
def _rows_kernel(
    x, matrices, out, heads, chunk, x_j, x_b, x_t, x_h, m_bank, m_c, m_z, m_j, out_b, out_t, out_h,
    K: tl.constexpr, N: tl.constexpr, SOURCES: tl.constexpr, EACH: tl.constexpr, TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    columns: tl.constexpr = (N + BN - 1) // BN
    steps: tl.constexpr = (K + BK - 1) // BK
    n, index = tl.program_id(0) % columns, tl.program_id(0) // columns
    tiles = tl.cdiv(chunk, BM)
    c, m = (index // tiles).to(tl.int64), index % tiles
    z = tl.program_id(1).to(tl.int64)
    b, head, first = z // heads, z % heads, c * chunk + m * BM
    rows, inner, j = tl.arange(0, BM), tl.arange(0, BK), n * BN + tl.arange(0, BN)
    inside = (rows < chunk - m * BM)[:, None]
    xs = x + b * x_b + head * x_h + first * x_t + rows[:, None] * x_t + inner[None, :]
    place = (j % N)[None, :] * K + inner[:, None] if TRANSPOSED else inner[:, None] * N + (j % N)[None, :]
    ms = matrices + c * m_c + z * m_z + place
    x_j = x_j.to(tl.int64)
    acc = tl.zeros((BM, BN), tl.float32)
    for step in range(0, SOURCES * steps):
        source, k = step // steps, step % steps * BK
        left = xs + source * x_j + k
        right = ms + source // EACH * m_bank + (source % EACH) * m_j + (k if TRANSPOSED else k * N)
        if K % BK == 0:
            p = tl.load(left, mask=inside, other=0.0)
            w = tl.load(right)
        else:
            p = tl.load(left, mask=inside & (inner < K - k)[None, :], other=0.0)
            w = tl.load(right, mask=(inner < K - k)[:, None], other=0.0)
        acc = tl.dot(p, w, acc, input_precision=PRECISION)
    out += b * out_b + head * out_h + first * out_t
    tl.store(out + rows[:, None] * out_t + j[None, :], acc.to(out.dtype.element_ty), mask=inside & (j < N)[None, :])


def rows(x: Tensor, matrices: Tensor, out: Tensor, chunk: int, *, transposed: bool = False) -> Tensor:
    """Tokens times their chunk's matrices, summed over sources: `out = sum_s x_s M_s`.

    Args:
        x: `[S, B, T, H, K]`.
        matrices: `[P, chunks, B*H, S / P, K * N]`; sources run through the first of P packed weights, then the next. Chunks
            may have stride 0.
        out: where to write, `[B, T, H, N]`.
        chunk: tokens in a chunk.
        transposed: matrices are stored `[N, K]`.

    Returns:
        `out`.
    """
    sources, batch, tokens, heads, inner = x.shape
    width, chunks = out.shape[-1], tokens // chunk
    programs = cdiv(chunk, WIDE.rows) * cdiv(width, WIDE.columns) * chunks * batch * heads
    tile = tile_for(x.dtype, programs, chunk)
    m_bank, m_c, m_z, m_j = matrices.stride()[:4]
    with on_device_of(x):
        _rows_kernel[(cdiv(width, tile.columns) * cdiv(chunk, tile.rows) * chunks, batch * heads)](
            x, matrices, out, heads, chunk, *x.stride()[:4], m_bank, m_c, m_z, m_j, *out.stride()[:3],
            K=inner, N=width, SOURCES=sources, EACH=sources // matrices.shape[0], TRANSPOSED=transposed,
            PRECISION=dot_precision(x.dtype), BM=tile.rows, BN=tile.columns, BK=tile.depth,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out
