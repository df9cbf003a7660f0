"""Gradients of a chunk's operands, all chunks at once.

With G the gradient of the outputs, U what a chunk writes, D the gradient of the state behind it and dR that of
`R = r o (v - c o (e S))` (`kvbind.kernels.affine.state_gradients`):

    gradient of v   r o dR
    of A            G U^T,          of L   -dR U^T
    of b o q        G S^T,          of (b_C / b) o k   U D^T,          of r c o e   -dR S^T

Two kernels: what pairs of tokens have to do with each other, with values, rates and gates; then queries and keys, with what
rates and gates have to do with states. `kvbind.kernels.affine.decays` adds up what rates and gates are given.

Gates enter as products over spans of tokens. The gradient of one gate is a sum over the spans that hold it, divided by the
gate, or by 2^-64 where it is smaller: a floor that products of the gradient alone have too. No sums are subtracted, so that
gradients of small gates are as exact as others.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvbind.kernels.affine.tiles import between, marked_rows
from kvbind.kernels.causal.segments import finite, read_rows, segment, without
from kvbind.kernels.launching.launcher import Launcher


@triton.jit(do_not_specialize=["tokens", "each", "plane"])
def _pair_gradients_kernel(
    d_out, q, k, e, v, wholes, rests, seen_wholes, seen_rests, weights, residuals, marks, written, d_right, d_v, d_reads,
    d_residuals, given, table, tokens, each, plane, heads,
    d_row, d_token, d_head, q_row, q_token, q_head, k_row, k_token, k_head, e_row, e_token, e_head, v_row, v_token, v_head,
    DK: tl.constexpr, DV: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BEFORE: tl.constexpr,
    DELTA: tl.constexpr, CHANNEL: tl.constexpr, RATES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the scores of one chunk and head, of its values, and what pairs give to its rates and gates.

    Rows are of the writes, columns of the reads. Without `CHANNEL` the gradients left are of `<q, k>` and `<e, k>`; with it
    those of A and of `L / r`, which is given. Gates count as no less than 2^-64.
    """
    program = tl.program_id(0)
    head = (program % heads).to(tl.int64)
    index = program // heads
    row, sequence, start, stop, _ends = segment(index, table, tokens, C, each, False)
    if sequence < 0:
        return
    token = start.to(tl.int64)
    place = index.to(tl.int64) * heads + head
    at = tl.arange(0, C)
    rows = at < stop - token
    places = ((row * tokens + token) + at) * heads + head
    d_out += row * d_row + head * d_head + token * d_token
    v += row * v_row + head * v_head + token * v_token
    d_v += ((row * tokens + token) * heads + head) * DV
    base = place * (C * DV)
    dtype: tl.constexpr = written.dtype.element_ty
    inner, columns = tl.arange(0, BK), tl.arange(0, BV)
    mine, other = at[:, None], at[None, :]
    scores = place * (C * C) + mine * C + other

    wrong = marked_rows(marks, places, rows)
    spent = tl.zeros((C, C), tl.float32)
    taken = tl.zeros((C, C), tl.float32)
    on_rate = tl.zeros((C,), tl.float32)
    for block in range(0, DV, BV):
        within = (block + columns < DV)[None, :]
        where = base + mine * DV + (block + columns)[None, :]
        g = read_rows(d_out + block, mine * d_token + columns[None, :], rows, block + columns, DV, BV)
        x = tl.load(written + where, mask=within, other=0.0)
        spent = tl.dot(x, tl.trans(g), spent, input_precision=PRECISION)
        dx = tl.load(d_right + where, mask=within, other=0.0)
        if DELTA:
            taken = tl.dot(x, tl.trans(dx), taken, input_precision=PRECISION)
        dx = dx.to(tl.float32)
        if RATES:
            y = without(read_rows(v + block, mine * v_token + columns[None, :], rows, block + columns, DV, BV), wrong)
            on_rate += tl.sum(dx * y.to(tl.float32), 1)
        where = mine * (heads * DV) + (block + columns)[None, :]
        dx *= tl.load(weights + place * C + mine)
        tl.store(d_v + where, dx.to(dtype), mask=rows[:, None] & within)
    reach = between(wholes, rests, wholes, rests, place, C, True, False)
    spent *= reach
    tl.store(d_reads + scores, spent.to(dtype))
    if DELTA:
        if BEFORE:
            reach = tl.where(mine < other, reach, 0.0)
        else:
            reach = between(wholes, rests, seen_wholes, seen_rests, place, C, True, True)
        taken *= -reach
        rate = tl.load(weights + place * C + other)
        tl.store(d_residuals + scores, (taken * rate).to(dtype))

    if RATES or wholes is not None:
        matched = tl.zeros((C, C), tl.float32)
        erased = tl.zeros((C, C), tl.float32)
        if CHANNEL:
            if DELTA:
                erased = tl.load(residuals + place * (C * C) + other * C + mine)
        else:
            q += row * q_row + head * q_head + token * q_token
            k += row * k_row + head * k_head + token * k_token
            if e is not None:
                e += row * e_row + head * e_head + token * e_token
            for block in range(0, DK, BK):
                y = without(read_rows(k + block, mine * k_token + inner[None, :], rows, block + inner, DK, BK), wrong)
                if wholes is not None:
                    x = finite(read_rows(q + block, mine * q_token + inner[None, :], rows, block + inner, DK, BK))
                    matched = tl.dot(y, tl.trans(x), matched, input_precision=PRECISION)
                if DELTA:
                    x = y
                    if e is not None:
                        x = read_rows(e + block, mine * e_token + inner[None, :], rows, block + inner, DK, BK)
                        x = without(x, wrong)
                    erased = tl.dot(y, tl.trans(x), erased, input_precision=PRECISION)
        if DELTA:
            erased *= taken
        if RATES:
            if DELTA:
                on_rate += tl.sum(erased, 0)
            tl.store(given + place * C + at, on_rate)
        if wholes is not None:
            # of each gate, the sum over pairs of a write before it and a read from it on
            narrow: tl.constexpr = tl.float32 if dtype == tl.float32 else tl.bfloat16
            pairs = tl.where(mine < other, matched * spent, 0.0)
            if DELTA:
                erased *= rate
                if BEFORE:
                    pairs += erased
            late = tl.where(mine >= other, 1.0, tl.zeros((C, C), tl.float32)).to(narrow)
            crossing = tl.dot(pairs.to(narrow), late, input_precision=PRECISION)
            if DELTA and not BEFORE:
                late = tl.where(mine > other, 1.0, tl.zeros((C, C), tl.float32)).to(narrow)
                crossing = tl.dot(erased.to(narrow), late, crossing, input_precision=PRECISION)
            tl.store(given + plane.to(tl.int64) + place * C + at, tl.sum(tl.where(mine < other, crossing, 0.0), 0))


@triton.jit(do_not_specialize=["tokens", "each", "plane"])
def _key_gradients_kernel(
    d_out, q, k, e, reaches, tails, shares, written, d_right, states, d_states, marks, d_reads, d_residuals, d_q, d_k, d_e,
    given, anchors, table, tokens, each, plane, heads,
    d_row, d_token, d_head, q_row, q_token, q_head, k_row, k_token, k_head, e_row, e_token, e_head,
    DK: tl.constexpr, DV: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DELTA: tl.constexpr,
    RATES: tl.constexpr, GATES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of queries and keys of one chunk, head and block of key channels, and what it gives to rates and gates."""
    NK: tl.constexpr = (DK + BK - 1) // BK
    program = tl.program_id(0)
    strip = program % NK
    up = strip * BK
    head = ((program // NK) % heads).to(tl.int64)
    index = program // (NK * heads)
    row, sequence, start, stop, _ends = segment(index, table, tokens, C, each, False)
    if sequence < 0:
        return
    token = start.to(tl.int64)
    place = index.to(tl.int64) * heads + head
    at = tl.arange(0, C)
    rows = at < stop - token
    places = ((row * tokens + token) + at) * heads + head
    d_out += row * d_row + head * d_head + token * d_token
    q += row * q_row + head * q_head + token * q_token
    k += row * k_row + head * k_head + token * k_token
    if e is not None:
        e += row * e_row + head * e_head + token * e_token
    written += place * (C * DV)
    d_right += place * (C * DV)
    states += place * (DV * DK)
    d_states += place * (DV * DK)
    wide = (row * tokens + token) * (heads * DK) + head * DK
    dtype: tl.constexpr = written.dtype.element_ty
    inner, columns = tl.arange(0, BK), tl.arange(0, BV)
    mine, other = at[:, None], at[None, :]
    scores, turned = place * (C * C) + mine * C + other, place * (C * C) + other * C + mine

    wrong = marked_rows(marks, places, rows)
    anchor = tl.zeros((BK,), tl.float32)
    dq = tl.zeros((C, BK), tl.float32)
    dk = tl.zeros((C, BK), tl.float32)
    de = tl.zeros((C, BK), tl.float32)
    for block in range(0, DV, BV):
        within = (block + columns < DV)[None, :]
        where = (block + columns)[:, None] * DK + (up + inner)[None, :]
        inside = (block + columns < DV)[:, None] & (up + inner < DK)[None, :]
        state = tl.load(states + where, mask=inside, other=0.0)
        d_state = tl.load(d_states + where, mask=inside, other=0.0)
        g = read_rows(d_out + block, mine * d_token + columns[None, :], rows, block + columns, DV, BV)
        x = tl.load(written + mine * DV + (block + columns)[None, :], mask=within, other=0.0)
        dq = tl.dot(g, state, dq, input_precision=PRECISION)
        dk = tl.dot(x, d_state, dk, input_precision=PRECISION)
        if DELTA:
            dx = tl.load(d_right + mine * DV + (block + columns)[None, :], mask=within, other=0.0)
            de = tl.dot(dx, state, de, input_precision=PRECISION)
        if GATES:
            anchor += tl.sum(state.to(tl.float32) * d_state.to(tl.float32), 0)
    where, inside = mine * (heads * DK) + (up + inner)[None, :], rows[:, None] & (up + inner < DK)[None, :]
    x = finite(read_rows(q + up, mine * q_token + inner[None, :], rows, up + inner, DK, BK))
    y = without(read_rows(k + up, mine * k_token + inner[None, :], rows, up + inner, DK, BK), wrong)
    z = y
    if e is not None:
        z = without(read_rows(e + up, mine * e_token + inner[None, :], rows, up + inner, DK, BK), wrong)
    vectors = place * C + mine
    part = given + (2 + 3 * strip) * plane.to(tl.int64) + place * C + at
    if DELTA and (RATES or GATES):
        tl.store(part, tl.sum(de * z.to(tl.float32), 1))
    if GATES:
        tl.store(part + plane.to(tl.int64), tl.sum(dq * x.to(tl.float32), 1))
        tl.store(part + 2 * plane.to(tl.int64), tl.sum(dk * y.to(tl.float32), 1))
        tl.store(anchors + strip * (plane.to(tl.int64) // C) + place, tl.sum(anchor, 0))
        reach = tl.load(reaches + vectors)
        dq *= tl.where(reach < float("inf"), reach, 0.0)
        dk *= tl.load(tails + vectors)
    dq = tl.dot(tl.load(d_reads + turned), y, dq, input_precision=PRECISION)
    dk = tl.dot(tl.load(d_reads + scores), x, dk, input_precision=PRECISION)
    if DELTA:
        de *= -tl.load(shares + vectors)
        de = tl.dot(tl.load(d_residuals + turned), y, de, input_precision=PRECISION)
        dk = tl.dot(tl.load(d_residuals + scores), z, dk, input_precision=PRECISION)
        if e is None:
            dk += de
        else:
            tl.store(d_e + wide + where, de.to(dtype), mask=inside)
    tl.store(d_q + wide + where, dq.to(dtype), mask=inside)
    tl.store(d_k + wide + where, dk.to(dtype), mask=inside)


pair_gradients = Launcher(_pair_gradients_kernel)
key_gradients = Launcher(_key_gradients_kernel)
