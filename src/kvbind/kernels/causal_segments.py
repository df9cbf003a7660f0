"""What the kernels of `kvbind.kernels.causal` share: how sequences are cut, how a tile is read, where segments start."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvbind.kernels.common import cdiv, dot_precision, on_device_of

TILE = 64
"""Tokens of one tile."""

LEAST_GATE = tl.constexpr(1.17549435e-38)
"""A gate below this, float32's least normal number, is 0."""

SHUT = tl.constexpr(-65536.0)
"""The logarithm of a gate that is 0: two to the power of any sum with it is exactly 0."""

_SCAN_BLOCK = 512


@dataclass(frozen=True)
class Segments:
    """How sequences are cut.

    Attributes:
        length: tokens of a segment, the last of a sequence aside.
        each: segments of every sequence, where all are equally long.
        count: segments of all sequences, or a bound on it.
        sequences: number of sequences.
        table: where lengths differ, int32 `[count, 4]`: sequence (-1 for none), first token, token after the last, and 1 for
            a sequence's first segment plus 2 for its last.
        offsets: where lengths differ, int32 `[sequences + 1]`: the first segment of each sequence.
    """

    length: int
    each: int
    count: int
    sequences: int
    table: Tensor | None
    offsets: Tensor | None

    def tiles_each(self, tokens: int) -> int:
        """How far apart sequences' tiles are numbered: a tile's number is `sequence * tiles_each + token // TILE`."""
        return cdiv(tokens, TILE) if self.table is None else 1

    def tiles(self, tokens: int) -> int:
        """How many numbers tiles have, of `tokens` tokens in a row."""
        return self.sequences * cdiv(tokens, TILE) if self.table is None else tokens // TILE + self.sequences

    @property
    def single(self) -> bool:
        """Every sequence is one segment."""
        return self.table is None and self.each == 1


@triton.jit
def segment(index, table, tokens, length, each, REVERSE: tl.constexpr):
    """Row of the batch, sequence, first token, token after the last, and whether a sequence's sweep ends in this segment."""
    if table is None:
        sequence = index // each
        place = index % each
        start = place * length
        stop = tl.minimum(start + length, tokens)
        row = sequence.to(tl.int64)
        ends = place == (0 if REVERSE else each - 1)
    else:
        sequence = tl.load(table + index * 4)
        start = tl.load(table + index * 4 + 1)
        stop = tl.load(table + index * 4 + 2)
        edges = tl.load(table + index * 4 + 3)
        row = 0
        ends = (edges & (1 if REVERSE else 2)) != 0
    return row, sequence, start, stop, ends


@triton.jit
def logarithms(gates, places, live, FINITE: tl.constexpr):
    """Logarithms (base 2) of a tile's gates: whole numbers, and remainders of at most a half.

    Sums of whole numbers are exact and sums of remainders small, so that a difference of two sums is as exact for gates of
    1e-30 as for gates near 1. With `FINITE`, gates that are not finite count as 0.
    """
    gate = tl.load(gates + places, mask=live, other=1.0)
    if FINITE:
        gate = tl.where(gate < float("inf"), gate, 0.0)
    shut = gate < LEAST_GATE
    bits = tl.where(shut, 1.0, gate).to(tl.int32, bitcast=True)
    mantissa = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    upper = mantissa > 1.4142135
    whole = ((bits >> 23) - 127 + upper.to(tl.int32)).to(tl.float32)
    rest = tl.log2(tl.where(upper, 0.5 * mantissa, mantissa))
    if not FINITE:
        rest = tl.where(gate < float("inf"), rest, float("nan"))
    return tl.where(shut, SHUT, whole), rest


@triton.jit
def rows_wrong(x):
    """1 for rows of a tile that hold a number that is not finite, else 0."""
    return tl.max(tl.where(tl.abs(x.to(tl.float32)) < float("inf"), 0, 1), 1)


@triton.jit
def rows_silent(x):
    """1 for rows of a tile that are all zeros, else 0."""
    return 1 - tl.max(tl.where(x == 0, 0, 1), 1)


@triton.jit
def finite(x):
    """A tile with zeros in place of what is not finite."""
    return tl.where(tl.abs(x.to(tl.float32)) < float("inf"), x, 0.0).to(x.dtype)


@triton.jit
def without(x, rows):
    """A tile with zeros in the rows that are marked with 1."""
    return tl.where(rows[:, None] > 0, 0.0, x).to(x.dtype)


@triton.jit
def read_rows(pointer, places, rows, columns, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of a tile; where blocks do not divide the width, zeros behind the last column."""
    if WIDTH % BLOCK == 0:
        return tl.load(pointer + places, mask=rows[:, None], other=0.0)
    else:
        return tl.load(pointer + places, mask=rows[:, None] & (columns < WIDTH)[None, :], other=0.0)


@triton.jit
def state_places(inner, columns, DK: tl.constexpr, DV: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Where elements of a state `[DK, DV]`, or of one stored as its transpose, lie in memory, and which there are."""
    inside = (inner < DK)[:, None] & (columns < DV)[None, :]
    if TRANSPOSED:
        return columns[None, :] * DK + inner[:, None], inside
    else:
        return inner[:, None] * DV + columns[None, :], inside


@triton.jit
def initial_state(states, base, inner, columns, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
             TRANSPOSED: tl.constexpr):  # fmt: skip
    """A block of a state, zeros where there is none."""
    if states is None:
        return tl.zeros((BK, BV), tl.float32)
    else:
        places, inside = state_places(inner, columns, DK, DV, TRANSPOSED)
        return tl.load(states + base + places, mask=inside, other=0.0)


@triton.jit
def leave(end, base, state, inner, columns, DK: tl.constexpr, DV: tl.constexpr):
    """Store a block of the state in which a sweep ends."""
    places, inside = state_places(inner, columns, DK, DV, False)
    tl.store(end + base + places, state, mask=inside)


@triton.jit(do_not_specialize=["tokens", "length", "each"])
def _write_kernel(
    key, value, rates, gates, writes, keeps, table, tokens, length, each, heads,
    key_row, key_token, key_head, value_row, value_token, value_head,
    DK: tl.constexpr, DV: tl.constexpr, TILE: tl.constexpr, REVERSE: tl.constexpr, SIGN: tl.constexpr,
    PRECISION: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """What a segment adds to the state behind it (before it in a reverse sweep), and the product of its gates."""
    NK: tl.constexpr = (DK + BK - 1) // BK
    NV: tl.constexpr = (DV + BV - 1) // BV
    program = tl.program_id(0)
    block_v = program % NV
    block_k = (program // NV) % NK
    head = ((program // (NV * NK)) % heads).to(tl.int64)
    index = program // (NV * NK * heads)
    row, sequence, start, stop, ends = segment(index, table, tokens, length, each, REVERSE)
    # nobody reads what the sweep's last segment, or one that does not exist, would write
    if ends or sequence < 0:
        stop = start

    at = tl.arange(0, TILE)
    inner, columns = block_k * BK + tl.arange(0, BK), block_v * BV + tl.arange(0, BV)
    key += row * key_row + head * key_head
    value += row * value_row + head * value_head
    key_places = at[:, None] * key_token + inner[None, :]
    value_places = at[:, None] * value_token + columns[None, :]
    acc = tl.zeros((BK, BV), tl.float32)
    kept = 1.0
    count = tl.cdiv(stop - start, TILE)
    for step in range(0, count):
        token = (start + ((count - 1 - step) if REVERSE else step) * TILE).to(tl.int64)
        rows = at < stop - token
        places = ((row * tokens + token) + at) * heads + head
        y = read_rows(key + token * key_token, key_places, rows, inner, DK, BK)
        z = read_rows(value + token * value_token, value_places, rows, columns, DV, BV)
        if REVERSE:
            # where there is no gradient, queries may be anything
            y = without(y, rows_silent(z))
        weight = tl.full((TILE,), SIGN, tl.float32)
        if rates is not None:
            weight *= tl.load(rates + places, mask=rows, other=0.0)
        if gates is not None:
            whole, rest = logarithms(gates, places, rows, REVERSE)
            wholes, rests = tl.cumsum(whole, 0), tl.cumsum(rest, 0)
            all_wholes, all_rests = tl.sum(whole, 0), tl.sum(rest, 0)
            keep = tl.exp2(all_wholes + all_rests)
            if REVERSE:
                weight *= tl.exp2(wholes + rests)
            else:
                weight *= tl.exp2((all_wholes - wholes) + (all_rests - rests))
            acc *= keep
            kept *= keep
        if rates is not None or gates is not None or SIGN < 0:
            z = (z.to(tl.float32) * weight[:, None]).to(z.dtype)
        acc = tl.dot(tl.trans(y), z, acc, input_precision=PRECISION)
    place = index.to(tl.int64) * heads + head
    leave(writes, place * (DK * DV), acc, inner, columns, DK, DV)
    if gates is not None:  # noqa: SIM102
        if block_k + block_v == 0:
            tl.store(keeps + place, kept)


@triton.jit(do_not_specialize=["each"])
def _scan_kernel(
    writes, keeps, initial, offsets, each, heads, SIZE: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Turn the segments' writes into the states in which sweeps start, in place."""
    BLOCKS: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    element = (program % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    head = ((program // BLOCKS) % heads).to(tl.int64)
    sequence = program // (BLOCKS * heads)
    inside = element < SIZE
    if offsets is None:
        begin, count = sequence * each, each
    else:
        begin = tl.load(offsets + sequence)
        count = tl.load(offsets + sequence + 1) - begin
    state = tl.zeros((BLOCK,), tl.float32)
    if initial is not None:
        state = tl.load(initial + (sequence.to(tl.int64) * heads + head) * SIZE + element, mask=inside, other=0.0)
    # by fours, so that four loads are under way at once
    for step in range(0, count, 4):
        p0 = (begin + (count - 1 - step if REVERSE else step)).to(tl.int64) * heads + head
        hop = -heads if REVERSE else heads
        p1, p2, p3 = p0 + hop, p0 + 2 * hop, p0 + 3 * hop
        i1, i2, i3 = inside & (step + 1 < count), inside & (step + 2 < count), inside & (step + 3 < count)
        w0 = tl.load(writes + p0 * SIZE + element, mask=inside, other=0.0)
        w1 = tl.load(writes + p1 * SIZE + element, mask=i1, other=0.0)
        w2 = tl.load(writes + p2 * SIZE + element, mask=i2, other=0.0)
        w3 = tl.load(writes + p3 * SIZE + element, mask=i3, other=0.0)
        a0, a1, a2, a3 = 1.0, 1.0, 1.0, 1.0
        if keeps is not None:
            a0 = tl.load(keeps + p0)
            a1 = tl.load(keeps + p1, mask=step + 1 < count, other=1.0)
            a2 = tl.load(keeps + p2, mask=step + 2 < count, other=1.0)
            a3 = tl.load(keeps + p3, mask=step + 3 < count, other=1.0)
        tl.store(writes + p0 * SIZE + element, state, mask=inside)
        state = a0 * state + w0
        tl.store(writes + p1 * SIZE + element, state, mask=i1)
        state = a1 * state + w1
        tl.store(writes + p2 * SIZE + element, state, mask=i2)
        state = a2 * state + w2
        tl.store(writes + p3 * SIZE + element, state, mask=i3)
        state = a3 * state + w3


def write_block(width: int) -> int:
    """Block of a state's rows or columns where a program sums one block alone."""
    return next((b for b in (128, 64, 32) if cdiv(width, b) * b * 3 <= width * 4), 16)


def product_precision(dtype: torch.dtype) -> str:
    """Triton's `input_precision`; float32 products as three of TF32, which lose no more than float32's sums do.

    In IEEE mode these kernels' products, with no matrix units, would neither fit registers nor compile in reasonable time.
    """
    precision = dot_precision(dtype)
    return "tf32x3" if dtype == torch.float32 and precision == "ieee" else precision


def token_strides(x: Tensor) -> tuple[int, int, int]:
    """The strides of rows, tokens and heads."""
    return x.stride(0), x.stride(1), x.stride(2)


def segment_states(
    segments: Segments,
    key: Tensor,
    value: Tensor,
    initial: Tensor | None,
    *,
    rates: Tensor | None,
    gates: Tensor | None,
    sign: int,
    reverse: bool = False,
) -> Tensor:
    """The states in which the sweeps of all segments start.

    Args:
        segments: how sequences are cut.
        key: `[B, T, H, DK]`.
        value: `[B, T, H, DV]`.
        initial: the state in which each sequence's sweep starts, float32 `[sequences, H, DK, DV]`, or None for zeros.
        rates: weights of tokens, float32 `[B, T, H]`, contiguous, or None.
        gates: decay of each token, the same.
        sign: 1 or -1, of every write.
        reverse: sweep from the last token to the first.

    Returns:
        float32 `[segments, H, DK, DV]`.
    """
    tokens, heads, inner, width = key.shape[1], key.shape[2], key.shape[3], value.shape[3]
    states = key.new_empty((segments.count, heads, inner, width), dtype=torch.float32)
    keeps = None if gates is None else states.new_empty((segments.count, heads))
    bk, bv = write_block(inner), write_block(width)
    grid = (segments.count * heads * cdiv(inner, bk) * cdiv(width, bv),)
    if grid[0]:
        with on_device_of(key):
            _write_kernel[grid](
                key, value, rates, gates, states, keeps, segments.table,
                tokens, segments.length, segments.each, heads, *token_strides(key), *token_strides(value),
                DK=inner, DV=width, TILE=TILE if key.dtype != torch.float32 else 32, REVERSE=reverse, SIGN=sign,
                PRECISION=product_precision(key.dtype), BK=bk, BV=bv, num_warps=8 if bk * bv > 64 * 64 else 4,
                num_stages=3 if key.dtype != torch.float32 else 2,
            )  # fmt: skip
            _scan_kernel[(segments.sequences * heads * cdiv(inner * width, _SCAN_BLOCK),)](
                states, keeps, initial, segments.offsets, segments.each, heads,
                SIZE=inner * width, REVERSE=reverse, BLOCK=_SCAN_BLOCK, num_warps=4,
            )  # fmt: skip
    return states
