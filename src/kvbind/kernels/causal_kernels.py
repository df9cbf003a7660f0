"""Kernels of token-causal linear attention: one sweep over the tokens of a segment, in either direction.

Sequences are cut into *segments*, as many as fill the card. A sweep walks through a segment tile by tile with the state in
registers: it reads the state, attends to the tile's own tokens, and adds their writes. Outputs and the gradients of queries,
keys and values are four sweeps that differ in operands and direction:

| sweep | reads with | keys | values | state | direction |
|---|---|---|---|---|---|
| outputs | q | k | v | S | forward |
| gradient of q | dO | v | k | S^T | forward |
| gradient of k | v | dO | q | D^T | reverse |
| gradient of v | k | q | dO | D | reverse |

with `D` the gradient of the loss with respect to the state. States between segments come from the segments' writes, summed
by a scan; nothing else is stored, so that memory does not grow with tiles.

Gates multiply, inside a tile as powers of two of differences of summed logarithms. Gates below `CLOSED` count as 0 and are
counted rather than logged: what lies before one is dropped exactly, and the logarithms stay small.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvbind.kernels.common import cdiv, dot_precision, on_device_of

TILE = 64
"""Tokens of one tile."""

CLOSED = tl.constexpr(1e-18)
"""A gate below this is 0: what it keeps is beyond float32's reach."""

_SCAN_BLOCK = 512
_GATE_BLOCK = 128


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

    @property
    def single(self) -> bool:
        """Every sequence is one segment."""
        return self.table is None and self.each == 1


@triton.jit
def _segment(index, table, tokens, length, each, REVERSE: tl.constexpr):
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
def _summed_logs(gates, places, live):
    """Logarithms (base 2) of gates, summed up to and including each token of a tile, and the number of closed ones.

    Returns:
        The two sums `[tile]`, and both over the whole tile.
    """
    gate = tl.load(gates + places, mask=live, other=1.0)
    closed = gate < CLOSED
    logs = tl.log2(tl.where(closed, 1.0, gate))
    resets = closed.to(tl.int32)
    return tl.cumsum(logs, 0), tl.cumsum(resets, 0), tl.sum(logs, 0), tl.sum(resets, 0)


@triton.jit
def _read(pointer, places, rows, columns, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of a tile; where blocks do not divide the width, zeros behind the last column."""
    if WIDTH % BLOCK == 0:
        return tl.load(pointer + places, mask=rows[:, None], other=0.0)
    else:
        return tl.load(pointer + places, mask=rows[:, None] & (columns < WIDTH)[None, :], other=0.0)


@triton.jit
def _state_places(inner, columns, DK: tl.constexpr, DV: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Where elements of a state `[DK, DV]`, or of one stored as its transpose, lie in memory, and which there are."""
    inside = (inner < DK)[:, None] & (columns < DV)[None, :]
    if TRANSPOSED:
        return columns[None, :] * DK + inner[:, None], inside
    else:
        return inner[:, None] * DV + columns[None, :], inside


@triton.jit
def _initial(states, base, inner, columns, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
             TRANSPOSED: tl.constexpr):  # fmt: skip
    """A block of a state, zeros where there is none."""
    if states is None:
        return tl.zeros((BK, BV), tl.float32)
    else:
        places, inside = _state_places(inner, columns, DK, DV, TRANSPOSED)
        return tl.load(states + base + places, mask=inside, other=0.0)


@triton.jit
def _leave(end, base, state, inner, columns, DK: tl.constexpr, DV: tl.constexpr):
    """Store a block of the state in which a sweep ends."""
    places, inside = _state_places(inner, columns, DK, DV, False)
    tl.store(end + base + places, state, mask=inside)


@triton.jit
def _inner_product(starts, base, state, inner, columns, DK: tl.constexpr, DV: tl.constexpr):
    """`sum(state * starts)` over a block."""
    places, inside = _state_places(inner, columns, DK, DV, False)
    return tl.sum(tl.sum(state * tl.load(starts + base + places, mask=inside, other=0.0), 1), 0)


@triton.jit(do_not_specialize=["tokens", "length", "each", "all_tokens"])
def _sweep_kernel(
    read, key, value, primal, out, dots, rates, gates, states, end, starts, anchors, table,
    tokens, length, each, all_tokens, heads,
    read_row, read_token, read_head, key_row, key_token, key_head,
    value_row, value_token, value_head, primal_row, primal_token, primal_head,
    DK: tl.constexpr, DV: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, CHUNK: tl.constexpr, STRICT: tl.constexpr,
    REVERSE: tl.constexpr, TRANSPOSED: tl.constexpr, SIGN: tl.constexpr, PRECISION: tl.constexpr,
    BK: tl.constexpr, NK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One segment, head and block of value columns; the state's rows are `NK` blocks of `BK`, all in registers."""
    NV: tl.constexpr = (DV + BV - 1) // BV
    program = tl.program_id(0)
    block = program % NV
    head = ((program // NV) % heads).to(tl.int64)
    index = program // (NV * heads)
    row, sequence, start, stop, ends = _segment(index, table, tokens, length, each, REVERSE)
    if sequence < 0:
        return
    dtype: tl.constexpr = read.dtype.element_ty

    at = tl.arange(0, TILE)
    columns = block * BV + tl.arange(0, BV)
    inner = tl.arange(0, BK)
    # every state is [segments or sequences, heads, DK * DV]
    base = (index.to(tl.int64) * heads + head) * (DK * DV)
    s0 = _initial(states, base, inner, columns, DK, DV, BK, BV, TRANSPOSED)
    if NK > 1:
        s1 = _initial(states, base, BK + inner, columns, DK, DV, BK, BV, TRANSPOSED)
    if NK > 2:
        s2 = _initial(states, base, 2 * BK + inner, columns, DK, DV, BK, BV, TRANSPOSED)
    if NK > 3:
        s3 = _initial(states, base, 3 * BK + inner, columns, DK, DV, BK, BV, TRANSPOSED)

    mine, other = (at // CHUNK)[:, None], (at // CHUNK)[None, :]
    ahead = other - mine if REVERSE else mine - other
    visible = ahead > 0 if STRICT else ahead >= 0

    read += row * read_row + head * read_head
    key += row * key_row + head * key_head
    value += row * value_row + head * value_head
    read_places = at[:, None] * read_token + inner[None, :]
    key_places = at[:, None] * key_token + inner[None, :]
    value_places = at[:, None] * value_token + columns[None, :]
    out_places = at[:, None] * (heads * DV) + columns[None, :]

    count = tl.cdiv(stop - start, STEP)
    for step in range(0, count):
        token = (start + ((count - 1 - step) if REVERSE else step) * STEP).to(tl.int64)
        rows = at < tl.minimum(STEP, stop - token)
        places = ((row * tokens + token) + at) * heads + head
        read_tile, key_tile = read + token * read_token, key + token * key_token

        x = _read(read_tile, read_places, rows, inner, DK, BK)
        y0 = _read(key_tile, key_places, rows, inner, DK, BK)
        z = _read(value + token * value_token, value_places, rows, columns, DV, BV)
        scores = tl.dot(x, tl.trans(y0), input_precision=PRECISION)
        acc = tl.dot(x, s0.to(dtype), input_precision=PRECISION)
        if NK > 1:
            x = _read(read_tile + BK, read_places, rows, BK + inner, DK, BK)
            y1 = _read(key_tile + BK, key_places, rows, BK + inner, DK, BK)
            scores = tl.dot(x, tl.trans(y1), scores, input_precision=PRECISION)
            acc = tl.dot(x, s1.to(dtype), acc, input_precision=PRECISION)
        if NK > 2:
            x = _read(read_tile + 2 * BK, read_places, rows, 2 * BK + inner, DK, BK)
            y2 = _read(key_tile + 2 * BK, key_places, rows, 2 * BK + inner, DK, BK)
            scores = tl.dot(x, tl.trans(y2), scores, input_precision=PRECISION)
            acc = tl.dot(x, s2.to(dtype), acc, input_precision=PRECISION)
        if NK > 3:
            x = _read(read_tile + 3 * BK, read_places, rows, 3 * BK + inner, DK, BK)
            y3 = _read(key_tile + 3 * BK, key_places, rows, 3 * BK + inner, DK, BK)
            scores = tl.dot(x, tl.trans(y3), scores, input_precision=PRECISION)
            acc = tl.dot(x, s3.to(dtype), acc, input_precision=PRECISION)

        # forward sweeps weight what writes, reverse sweeps what is read: the rate and the sign belong to the key's token
        rate = tl.full((TILE,), SIGN, tl.float32)
        if rates is not None:
            rate *= tl.load(rates + places, mask=rows, other=0.0)
        weight = rate
        seen = visible
        if gates is not None:
            logs, resets, all_logs, all_resets = _summed_logs(gates, places, rows)
            from_start = tl.where(resets == 0, tl.exp2(logs), 0.0)
            to_end = tl.where(resets == all_resets, tl.exp2(all_logs - logs), 0.0)
            keep = tl.where(all_resets == 0, tl.exp2(all_logs), 0.0)
            # pairs that are not seen may have huge exponents
            seen = seen & (resets[:, None] == resets[None, :])
            if REVERSE:
                acc *= to_end[:, None]
                scores *= tl.exp2(tl.minimum(logs[None, :] - logs[:, None], 0.0))
                weight = from_start
            else:
                acc *= from_start[:, None]
                scores *= tl.exp2(tl.minimum(logs[:, None] - logs[None, :], 0.0))
                weight = rate * to_end
        if not REVERSE and (rates is not None or SIGN < 0):
            scores *= rate[None, :]
        scores = tl.where(seen, scores, 0.0)
        acc = tl.dot(scores.to(dtype), z, acc, input_precision=PRECISION)

        if REVERSE and SIGN < 0:
            acc = -acc
        if dots is not None:
            given = primal + row * primal_row + head * primal_head + token * primal_token
            original = _read(given, at[:, None] * primal_token + columns[None, :], rows, columns, DV, BV)
            tl.store(
                dots + block * (all_tokens.to(tl.int64) * heads) + places,
                tl.sum(acc * original.to(tl.float32), 1),
                mask=rows,
            )
        if REVERSE and rates is not None:
            acc *= tl.load(rates + places, mask=rows, other=0.0)[:, None]
        stored = rows[:, None] if DV % BV == 0 else rows[:, None] & (columns < DV)[None, :]
        out_tile = out + ((row * tokens + token) * heads + head) * DV
        tl.store(out_tile + out_places, acc.to(out.dtype.element_ty), mask=stored)

        if gates is not None or (not REVERSE and (rates is not None or SIGN < 0)):
            z = (z.to(tl.float32) * weight[:, None]).to(dtype)
        if gates is not None:
            s0 *= keep
            if NK > 1:
                s1 *= keep
            if NK > 2:
                s2 *= keep
            if NK > 3:
                s3 *= keep
        s0 = tl.dot(tl.trans(y0), z, s0, input_precision=PRECISION)
        if NK > 1:
            s1 = tl.dot(tl.trans(y1), z, s1, input_precision=PRECISION)
        if NK > 2:
            s2 = tl.dot(tl.trans(y2), z, s2, input_precision=PRECISION)
        if NK > 3:
            s3 = tl.dot(tl.trans(y3), z, s3, input_precision=PRECISION)

    if anchors is not None:
        product = _inner_product(starts, base, s0, inner, columns, DK, DV)
        if NK > 1:
            product += _inner_product(starts, base, s1, BK + inner, columns, DK, DV)
        if NK > 2:
            product += _inner_product(starts, base, s2, 2 * BK + inner, columns, DK, DV)
        if NK > 3:
            product += _inner_product(starts, base, s3, 3 * BK + inner, columns, DK, DV)
        tl.store(anchors + (index.to(tl.int64) * heads + head) * NV + block, product)
    if end is not None:  # noqa: SIM102 (known when compiled, unlike the next)
        if ends:
            base = (sequence.to(tl.int64) * heads + head) * (DK * DV)
            _leave(end, base, s0, inner, columns, DK, DV)
            if NK > 1:
                _leave(end, base, s1, BK + inner, columns, DK, DV)
            if NK > 2:
                _leave(end, base, s2, 2 * BK + inner, columns, DK, DV)
            if NK > 3:
                _leave(end, base, s3, 3 * BK + inner, columns, DK, DV)


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
    row, sequence, start, stop, ends = _segment(index, table, tokens, length, each, REVERSE)
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
        y = _read(key + token * key_token, key_places, rows, inner, DK, BK)
        z = _read(value + token * value_token, value_places, rows, columns, DV, BV)
        weight = tl.full((TILE,), SIGN, tl.float32)
        if rates is not None:
            weight *= tl.load(rates + places, mask=rows, other=0.0)
        if gates is not None:
            logs, resets, all_logs, all_resets = _summed_logs(gates, places, rows)
            keep = tl.where(all_resets == 0, tl.exp2(all_logs), 0.0)
            if REVERSE:
                weight *= tl.where(resets == 0, tl.exp2(logs), 0.0)
            else:
                weight *= tl.where(resets == all_resets, tl.exp2(all_logs - logs), 0.0)
            acc *= keep
            kept *= keep
        if rates is not None or gates is not None or SIGN < 0:
            z = (z.to(tl.float32) * weight[:, None]).to(z.dtype)
        acc = tl.dot(tl.trans(y), z, acc, input_precision=PRECISION)
    place = index.to(tl.int64) * heads + head
    _leave(writes, place * (DK * DV), acc, inner, columns, DK, DV)
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


@triton.jit(do_not_specialize=["tokens", "length", "each", "all_tokens"])
def _gate_gradient_kernel(
    read_dots, write_dots, rates, gates, anchors, out, table, tokens, length, each, all_tokens, heads,
    READ_PARTS: tl.constexpr, WRITE_PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of the gates of one segment and head.

    `a_t dL/da_t` sums over all pairs of a write before t and a read from t on. Where the segment starts that is the inner
    product of the state and its gradient; each token then adds the pairs in which it writes and drops those it reads.
    """
    program = tl.program_id(0)
    head, index = program % heads, program // heads
    row, sequence, start, stop, _ends = _segment(index, table, tokens, length, each, False)
    if sequence < 0:
        return
    straddling = 0.0
    if anchors is not None:
        for part in range(0, WRITE_PARTS):
            straddling += tl.load(anchors + (index.to(tl.int64) * heads + head) * WRITE_PARTS + part)
    at = tl.arange(0, BLOCK)
    for token in range(start, stop, BLOCK):
        rows = at < stop - token
        places = ((row * tokens + token) + at) * heads + head
        wrote = tl.zeros((BLOCK,), tl.float32)
        for part in range(0, WRITE_PARTS):
            wrote += tl.load(write_dots + part * (all_tokens.to(tl.int64) * heads) + places, mask=rows, other=0.0)
        if rates is not None:
            wrote *= tl.load(rates + places, mask=rows, other=0.0)
        for part in range(0, READ_PARTS):
            wrote -= tl.load(read_dots + part * (all_tokens.to(tl.int64) * heads) + places, mask=rows, other=0.0)
        gate = tl.load(gates + places, mask=rows, other=1.0)
        through = straddling + tl.cumsum(wrote, 0) - wrote
        open_ = gate >= CLOSED
        tl.store(out + places, tl.where(open_, through / tl.where(open_, gate, 1.0), 0.0), mask=rows)
        straddling += tl.sum(wrote, 0)


@dataclass(frozen=True)
class Blocks:
    """How a sweep over operands of given widths is cut.

    Attributes:
        rows: rows of the state in one of its blocks, `BK`.
        row_blocks: blocks of rows, all in one program, `NK`.
        columns: columns of the state in one program, `BV`.
        warps: warps of a program.
        stages: depth of the pipeline of loads.
        resident: programs that fit on one multiprocessor of an H100.
    """

    rows: int
    row_blocks: int
    columns: int
    warps: int
    stages: int
    resident: int


def sweep_blocks(dtype: torch.dtype, read_width: int, value_width: int) -> Blocks:
    """The blocks for a sweep."""
    fits = ((n * b, -b, n) for b in (16, 32, 64, 128) for n in (1, 2, 3, 4) if n * b >= read_width)
    rows, negative, row_blocks = min(fits)
    # 64 rows of a tile are one warp group; with two, both would multiply the same rows
    narrow = dtype.itemsize == 2
    most = 64 if narrow and rows <= 256 else 32

    def cost(columns: int) -> int:
        return cdiv(value_width, columns) * (TILE * (rows + columns) + 2 * rows * columns)

    columns = min((b for b in (64, 32, 16) if b <= most), key=cost)
    if not narrow:
        return Blocks(-negative, row_blocks, columns, 8, 1, 1)
    return Blocks(-negative, row_blocks, columns, 4, 2 if rows <= 384 else 1, 2 if rows <= 128 else 1)


def write_block(width: int) -> int:
    """Block of a state's rows or columns where a program sums one block alone."""
    return next((b for b in (128, 64, 32) if cdiv(width, b) * b * 3 <= width * 4), 16)


def _precision(dtype: torch.dtype) -> str:
    """Triton's `input_precision`; float32 products as three of TF32, which lose no more than float32's sums do.

    In IEEE mode these kernels' products, with no matrix units, would neither fit registers nor compile in reasonable time.
    """
    precision = dot_precision(dtype)
    return "tf32x3" if dtype == torch.float32 and precision == "ieee" else precision


def _strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(1), x.stride(2)


def sweep(
    segments: Segments,
    read: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    states: Tensor | None,
    rates: Tensor | None,
    gates: Tensor | None,
    chunk: int,
    strict: bool,
    sign: int,
    reverse: bool = False,
    transposed: bool = False,
    end: Tensor | None = None,
    primal: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """One sweep over all segments.

    Args:
        segments: how sequences are cut.
        read: what reads, `[B, T, H, DK]`.
        key: what it is matched with, `[B, T, H, DK]`.
        value: what it gets, `[B, T, H, DV]`.
        states: float32 `[segments, H, DK, DV]` in which each segment's sweep starts, None for zeros.
        rates: weights of the keys' tokens, float32 `[B, T, H]`, contiguous, or None.
        gates: retention of each token, the same.
        chunk: tokens that share their visibility.
        strict: a chunk does not see itself.
        sign: 1 or -1, of every write.
        reverse: sweep from the last token to the first; the rates then belong to what reads.
        transposed: states are stored as `[DV, DK]`.
        end: where to put the state after each sequence's sweep, `[sequences, H, DK, DV]`.
        primal: what the result is the gradient of, `[B, T, H, DV]`; asks for the inner products of the two.
        starts: other states `[segments, H, DK, DV]`; asks for the inner products with the states that sweeps end in.

    Returns:
        The result `[B, T, H, DV]`; its inner products with `primal` before rates, `[blocks, B, T, H]`, each of which sums
        over some columns; and those with `starts`, `[segments, H, blocks]`.
    """
    batch, tokens, heads, width = value.shape
    blocks = sweep_blocks(read.dtype, read.shape[-1], width)
    parts = cdiv(width, blocks.columns)
    out = torch.empty_like(value, memory_format=torch.contiguous_format)
    dots = None if primal is None else value.new_empty((parts, batch, tokens, heads), dtype=torch.float32)
    anchors = None if starts is None else value.new_empty((segments.count, heads, parts), dtype=torch.float32)
    grid = (segments.count * heads * parts,)
    if grid[0]:
        given = value if primal is None else primal
        with on_device_of(read):
            _sweep_kernel[grid](
                read, key, value, given, out, dots, rates, gates, states, end, starts, anchors, segments.table,
                tokens, segments.length, segments.each, batch * tokens, heads,
                *_strides(read), *_strides(key), *_strides(value), *_strides(given),
                DK=read.shape[-1], DV=width, TILE=TILE, STEP=TILE // chunk * chunk, CHUNK=chunk, STRICT=strict,
                REVERSE=reverse, TRANSPOSED=transposed, SIGN=sign, PRECISION=_precision(read.dtype),
                BK=blocks.rows, NK=blocks.row_blocks, BV=blocks.columns,
                num_warps=blocks.warps, num_stages=blocks.stages,
            )  # fmt: skip
    return out, dots, anchors


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
        gates: retention of each token, the same.
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
                tokens, segments.length, segments.each, heads, *_strides(key), *_strides(value),
                DK=inner, DV=width, TILE=TILE if key.dtype != torch.float32 else 32, REVERSE=reverse, SIGN=sign,
                PRECISION=_precision(key.dtype), BK=bk, BV=bv, num_warps=8 if bk * bv > 64 * 64 else 4,
                num_stages=3 if key.dtype != torch.float32 else 2,
            )  # fmt: skip
            _scan_kernel[(segments.sequences * heads * cdiv(inner * width, _SCAN_BLOCK),)](
                states, keeps, initial, segments.offsets, segments.each, heads,
                SIZE=inner * width, REVERSE=reverse, BLOCK=_SCAN_BLOCK, num_warps=4,
            )  # fmt: skip
    return states


def gate_gradients(
    segments: Segments, read_dots: Tensor, write_dots: Tensor, rates: Tensor | None, gates: Tensor, anchors: Tensor | None
) -> Tensor:
    """Gradients with respect to retention gates, 0 for those below `CLOSED`.

    Args:
        segments: how sequences are cut.
        read_dots: inner products of queries and their gradients, `[parts, B, T, H]`.
        write_dots: those of keys and their gradients, before rates.
        rates: float32 `[B, T, H]`, contiguous, or None.
        gates: the same.
        anchors: inner products of the state and its gradient where each segment starts, `[segments, H, parts]`, or None
            for zeros.

    Returns:
        float32 `[B, T, H]`.
    """
    batch, tokens, heads = gates.shape
    out = torch.empty_like(gates)
    if segments.count * heads:
        with on_device_of(gates):
            _gate_gradient_kernel[(segments.count * heads,)](
                read_dots, write_dots, rates, gates, anchors, out, segments.table,
                tokens, segments.length, segments.each, batch * tokens, heads,
                READ_PARTS=len(read_dots), WRITE_PARTS=len(write_dots), BLOCK=_GATE_BLOCK, num_warps=4,
            )  # fmt: skip
    return out
