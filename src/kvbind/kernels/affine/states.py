"""The state, chunk after chunk, and what queries read: `S' = b_C o S + K^T diag(b_C / b) U`, `O = b o (Q S) + A U`.

The state is held as its transpose, `[values, keys]`: so it is the first operand of all products, and stays in registers.

A sequence is cut into parts that run at once, as there are fewer heads than multiprocessors. A part is an affine map of the
state that it starts from, `S -> F S + H`: `parts` finds H of each from a state of zeros and F from the identity, of the
first the state behind it itself; `chain` finds from these the state behind each part; and `states` starts from that.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvbind.kernels.launching.launcher import Launcher


@triton.jit
def chunks_of(sequence, table, offsets, tokens, each, C: tl.constexpr):
    """Of a sequence: its first chunk and their number, its row, first token, and token after the last."""
    if offsets is None:
        return sequence * each, each, sequence.to(tl.int64), sequence * 0, tokens
    else:
        begin = tl.load(offsets + sequence)
        count = tl.load(offsets + sequence + 1) - begin
        start = tl.load(table + begin * 4 + 1)
        return begin, count, (sequence * 0).to(tl.int64), start, tl.load(table + (begin + count - 1) * 4 + 2)


@triton.jit
def kept(keeps, place, exists, inner, DK: tl.constexpr, CHANNEL: tl.constexpr, FINITE: tl.constexpr):
    """The product of a chunk's gates; NaN where something in the chunk is not finite, or with `FINITE` 0."""
    if CHANNEL:
        keep = tl.load(keeps + place * DK + inner, mask=exists & (inner < DK), other=1.0)[None, :]
    else:
        keep = tl.load(keeps + place, mask=exists, other=1.0)
    if FINITE:
        keep = tl.where(keep < float("inf"), keep, 0.0)
    return keep


@triton.jit
def turned_state(states, base, inner, columns, DK: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr):
    """Columns of a state `[DK, DV]` in memory, as its transpose; zeros where there is none."""
    if states is None:
        return tl.zeros((BV, BD), tl.float32)
    else:
        inside = (columns < DV)[:, None] & (inner < DK)[None, :]
        return tl.load(states + base + inner[None, :] * DV + columns[:, None], mask=inside, other=0.0)


@triton.jit
def stored_state(ends, place, inner, columns, DK: tl.constexpr, DV: tl.constexpr):
    """Columns of a state that is stored as its transpose."""
    inside = (columns < DV)[:, None] & (inner < DK)[None, :]
    return tl.load(ends + place * (DV * DK) + columns[:, None] * DK + inner[None, :], mask=inside, other=0.0)


@triton.jit
def key_rows(pointer, token, stride, rows, inner, DK: tl.constexpr, BD: tl.constexpr):
    """Rows of keys of a chunk, all channels."""
    places = token[:, None].to(tl.int64) * stride + inner[None, :]
    if DK == BD:
        return tl.load(pointer + places, mask=rows[:, None], other=0.0)
    else:
        return tl.load(pointer + places, mask=rows[:, None] & (inner < DK)[None, :], other=0.0)


@triton.jit
def value_columns(v, token, v_token, rows, columns, there):
    """Columns of values of a chunk, as rows, in float32."""
    places = token[None, :].to(tl.int64) * v_token + columns[:, None]
    return tl.load(v + places, mask=rows[None, :] & there[:, None], other=0.0).to(tl.float32)


@triton.jit
def _written(state, x, y, solved, weights, shares, place, at, C: tl.constexpr, DELTA: tl.constexpr, PRECISION: tl.constexpr):
    """U of a chunk, from its values x, the keys y at which residuals read, and the state before it."""
    x *= tl.load(weights + place * C + at)[None, :]
    if DELTA:
        x -= tl.dot(state, tl.trans(y), input_precision=PRECISION) * tl.load(shares + place * C + at)[None, :]
    # what is not finite would reach tokens before it
    x = tl.where(tl.abs(x) < float("inf"), x, 0.0)
    if DELTA:
        inverse = tl.load(solved + place * (C * C) + at[:, None] * C + at[None, :])
        x = tl.dot(x.to(state.dtype), tl.trans(inverse), input_precision=PRECISION)
    return x


@triton.jit(do_not_specialize=["tokens", "each", "parts"])
def _parts_kernel(
    k, e, v, solved, weights, shares, tails, keeps, initial, ends, moves, table, offsets, tokens, each, heads, parts,
    k_row, k_token, k_head, e_row, e_token, e_head, v_row, v_token, v_head,
    DK: tl.constexpr, DV: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, DELTA: tl.constexpr,
    CHANNEL: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One part of a sequence, head, and block of value columns, or of columns of the identity."""
    NV: tl.constexpr = (DV + BV - 1) // BV
    NI: tl.constexpr = (DK + BV - 1) // BV
    program = tl.program_id(0)
    block = program % (NV + NI)
    head = ((program // (NV + NI)) % heads).to(tl.int64)
    part = (program // ((NV + NI) * heads)) % (parts - 1)
    sequence = program // ((NV + NI) * heads * (parts - 1))
    unit = block >= NV
    if unit & (part == 0):
        return
    begin, count, row, start, stop = chunks_of(sequence, table, offsets, tokens, each, C)
    size = (count + parts - 1) // parts
    first, last = tl.minimum(part * size, count), tl.minimum((part + 1) * size, count)
    at, inner = tl.arange(0, C), tl.arange(0, BD)
    columns = tl.where(unit, block - NV, block) * BV + tl.arange(0, BV)
    exist = columns < tl.where(unit, 0, DV)
    dtype: tl.constexpr = v.dtype.element_ty
    k += row * k_row + head * k_head + start.to(tl.int64) * k_token
    v += row * v_row + head * v_head + start.to(tl.int64) * v_token
    if e is not None:
        e += row * e_row + head * e_head + start.to(tl.int64) * e_token
    base = (sequence.to(tl.int64) * heads + head) * (DK * DV)

    state = tl.where((columns[:, None] == inner[None, :]) & unit, 1.0, tl.zeros((BV, BD), tl.float32))
    if initial is not None:  # noqa: SIM102 - one is known when compiling
        if part == 0:
            state = turned_state(initial, base, inner, columns, DK, DV, BD, BV)
    keep = kept(keeps, (begin + first).to(tl.int64) * heads + head, first < last, inner, DK, CHANNEL, False)
    for index in tl.range(first, last, num_stages=STAGES):
        place = (begin + index).to(tl.int64) * heads + head
        token = index * C + at
        rows = token < stop - start
        y = key_rows(k, token, k_token, rows, inner, DK, BD)
        z = y
        if DELTA and e is not None:
            z = key_rows(e, token, e_token, rows, inner, DK, BD)
        x = value_columns(v, token, v_token, rows, columns, exist)
        x = _written(state.to(dtype), x, z, solved, weights, shares, place, at, C, DELTA, PRECISION)
        x *= tl.load(tails + place * C + at)[None, :]
        state = tl.dot(x.to(dtype), y, state * keep, input_precision=PRECISION)
        keep = kept(keeps, place + heads, index + 1 < last, inner, DK, CHANNEL, False)
    index = ((sequence * parts + part).to(tl.int64)) * heads + head
    if unit:
        inside = (columns < DK)[:, None] & (inner < DK)[None, :]
        tl.store(moves + index * (DK * DK) + columns[:, None] * DK + inner[None, :], state, mask=inside)
    else:
        inside = (columns < DV)[:, None] & (inner < DK)[None, :]
        tl.store(ends + index * (DV * DK) + columns[:, None] * DK + inner[None, :], state, mask=inside)


@triton.jit(do_not_specialize=["tokens", "each", "parts"])
def _states_kernel(
    q, k, e, v, solved, reads, weights, shares, reaches, tails, keeps, out, states, written, initial, final, ends,
    table, offsets, tokens, each, heads, parts, q_row, q_token, q_head, k_row, k_token, k_head, e_row, e_token, e_head,
    v_row, v_token, v_head,
    DK: tl.constexpr, DV: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, DELTA: tl.constexpr,
    CHANNEL: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One part of a sequence, head and block of value columns."""
    NV: tl.constexpr = (DV + BV - 1) // BV
    program = tl.program_id(0)
    columns = (program % NV) * BV + tl.arange(0, BV)
    head = ((program // NV) % heads).to(tl.int64)
    part = (program // (NV * heads)) % parts
    sequence = program // (NV * heads * parts)
    begin, count, row, start, stop = chunks_of(sequence, table, offsets, tokens, each, C)
    size = (count + parts - 1) // parts
    first, last = tl.minimum(part * size, count), tl.minimum((part + 1) * size, count)
    at, inner = tl.arange(0, C), tl.arange(0, BD)
    dtype: tl.constexpr = v.dtype.element_ty
    q += row * q_row + head * q_head + start.to(tl.int64) * q_token
    k += row * k_row + head * k_head + start.to(tl.int64) * k_token
    v += row * v_row + head * v_head + start.to(tl.int64) * v_token
    if e is not None:
        e += row * e_row + head * e_head + start.to(tl.int64) * e_token
    out += ((row * tokens + start) * heads + head) * DV
    base = (sequence.to(tl.int64) * heads + head) * (DK * DV)

    if part == 0:
        state = turned_state(initial, base, inner, columns, DK, DV, BD, BV)
    else:
        state = stored_state(ends, (sequence * parts + part - 1).to(tl.int64) * heads + head, inner, columns, DK, DV)
    keep = kept(keeps, (begin + first).to(tl.int64) * heads + head, first < last, inner, DK, CHANNEL, False)
    for index in tl.range(first, last, num_stages=STAGES):
        place = (begin + index).to(tl.int64) * heads + head
        token = index * C + at
        rows = token < stop - start
        held = state.to(dtype)
        if states is not None:
            inside = (columns < DV)[:, None] & (inner < DK)[None, :]
            tl.store(states + place * (DV * DK) + columns[:, None] * DK + inner[None, :], held, mask=inside)
        y = key_rows(k, token, k_token, rows, inner, DK, BD)
        z = y
        if DELTA and e is not None:
            z = key_rows(e, token, e_token, rows, inner, DK, BD)
        x = value_columns(v, token, v_token, rows, columns, columns < DV)
        x = _written(held, x, z, solved, weights, shares, place, at, C, DELTA, PRECISION)
        narrow = x.to(dtype)
        if written is not None:
            where = place * (C * DV) + at[None, :] * DV + columns[:, None]
            tl.store(written + where, narrow, mask=(columns < DV)[:, None])
        queries = key_rows(q, token, q_token, rows, inner, DK, BD)
        read = tl.dot(held, tl.trans(queries), input_precision=PRECISION) * tl.load(reaches + place * C + at)[None, :]
        scores = tl.load(reads + place * (C * C) + at[:, None] * C + at[None, :])
        read = tl.dot(narrow, tl.trans(scores), read, input_precision=PRECISION)
        where = token[None, :].to(tl.int64) * (heads * DV) + columns[:, None]
        tl.store(out + where, read.to(dtype), mask=rows[None, :] & (columns < DV)[:, None])
        x *= tl.load(tails + place * C + at)[None, :]
        state = tl.dot(x.to(dtype), y, state * keep, input_precision=PRECISION)
        keep = kept(keeps, place + heads, index + 1 < last, inner, DK, CHANNEL, False)
    if part == parts - 1:
        inside = (columns < DV)[:, None] & (inner < DK)[None, :]
        tl.store(final + base + inner[None, :] * DV + columns[:, None], state, mask=inside)


@triton.jit
def _moved(moves, x, y, behind, up, inner, DK: tl.constexpr, BK: tl.constexpr, WIDE: tl.constexpr, REVERSE: tl.constexpr,
           PRECISION: tl.constexpr):  # fmt: skip
    """A block of key channels of a state, x and y being the blocks of the one before, by F or its transpose."""
    if REVERSE:
        where, step = (up + inner)[None, :] * DK + inner[:, None], BK
    else:
        where, step = inner[:, None] * DK + (up + inner)[None, :], BK * DK
    there = (up + inner < DK)[None, :]
    move = tl.load(moves + where, mask=there & (inner < DK)[:, None], other=0.0)
    if REVERSE:
        # a part in which something is not finite hands no gradient on
        move = tl.where(tl.abs(move) < float("inf"), move, 0.0)
    behind = tl.dot(x, move, behind, input_precision=PRECISION)
    if WIDE:
        move = tl.load(moves + step + where, mask=there & (BK + inner < DK)[:, None], other=0.0)
        if REVERSE:
            move = tl.where(tl.abs(move) < float("inf"), move, 0.0)
        behind = tl.dot(y, move, behind, input_precision=PRECISION)
    return behind


@triton.jit(do_not_specialize=["parts"])
def _chain_kernel(
    ends, moves, heads, parts,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """States behind parts, from what they make of none: of one sequence, head, and block of value columns, in place."""
    NV: tl.constexpr = (DV + BV - 1) // BV
    WIDE: tl.constexpr = DK > BK
    program = tl.program_id(0)
    columns, inner = (program % NV) * BV + tl.arange(0, BV), tl.arange(0, BK)
    head = (program // NV) % heads
    sequence = program // (NV * heads)
    where = columns[:, None] * DK + inner[None, :]
    inside, wide = (columns < DV)[:, None] & (inner < DK)[None, :], (columns < DV)[:, None] & (BK + inner < DK)[None, :]
    place = ((sequence * parts + (parts - 1 if REVERSE else 0)) * heads + head).to(tl.int64)
    x = tl.load(ends + place * (DV * DK) + where, mask=inside, other=0.0)
    y = x
    if WIDE:
        y = tl.load(ends + place * (DV * DK) + BK + where, mask=wide, other=0.0)
    for _step in range(1, parts - 1):
        place += -heads if REVERSE else heads
        its, at = moves + place * (DK * DK), ends + place * (DV * DK)
        behind = tl.load(at + where, mask=inside, other=0.0)
        behind = _moved(its, x, y, behind, 0, inner, DK, BK, WIDE, REVERSE, PRECISION)
        if WIDE:
            other = tl.load(at + BK + where, mask=wide, other=0.0)
            y = _moved(its, x, y, other, BK, inner, DK, BK, WIDE, REVERSE, PRECISION)
            tl.store(at + BK + where, y, mask=wide)
        x = behind
        tl.store(at + where, x, mask=inside)


parts = Launcher(_parts_kernel)
chain = Launcher(_chain_kernel)
states = Launcher(_states_kernel)
