"""Gradients of a chunk's operands, all chunks at once.

With G the gradient of the outputs, U what a chunk writes, D the gradient of the state behind it and dR that of
`R = r o (v - c o (e S))` (`kvbind.kernels.affine.state_gradients`):

    gradient of v   r o dR
    of A            G U^T,          of L   -dR U^T
    of b o q        G S^T,          of (b_C / b) o k   U D^T,          of r c o e   -dR S^T

Two kernels: what pairs of tokens have to do with each other, with values, rates and gates; then queries and keys, with what
rates and gates have to do with states; a third adds up what rates and gates are given.

Gates enter as products over spans of tokens. The gradient of one gate is a sum over the spans that hold it, divided by the
gate, or by 2^-64 where it is smaller: a floor that products of the gradient alone have too. No sums are subtracted, so that
gradients of small gates are as exact as others.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvbind.kernels.affine.tiles import (
    between,
    floored_logarithms,
    marked_rows,
    rates_of,
    seen_logarithms,
    summed_logarithms,
)
from kvbind.kernels.causal.segments import finite, logarithms, read_rows, segment, without
from kvbind.kernels.launching.launcher import Launcher


@triton.jit(do_not_specialize=["tokens", "each"])
def _pair_gradients_kernel(
    d_out, q, k, e, v, rates, gates, residuals, marks, written, d_right, d_v, d_reads, d_residuals, d_rates, d_gates,
    table, tokens, each, heads,
    d_row, d_token, d_head, q_row, q_token, q_head, k_row, k_token, k_head, e_row, e_token, e_head, v_row, v_token, v_head,
    DK: tl.constexpr, DV: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BEFORE: tl.constexpr,
    DELTA: tl.constexpr, CHANNEL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the scores of one chunk and head, of its values, and what pairs give to its rates and gates.

    Rows are of the writes, columns of the reads. Without `CHANNEL` the gradients left are of `<q, k>` and `<e, k>`; with it
    those of A and of `L / r`, which is given.
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

    rate, _wrong = rates_of(rates, places, rows)
    wrong = marked_rows(marks, places, rows)
    given = tl.zeros((C, C), tl.float32)
    taken = tl.zeros((C, C), tl.float32)
    on_rate = tl.zeros((C,), tl.float32)
    for block in range(0, DV, BV):
        within = (block + columns < DV)[None, :]
        where = base + mine * DV + (block + columns)[None, :]
        g = read_rows(d_out + block, mine * d_token + columns[None, :], rows, block + columns, DV, BV)
        x = tl.load(written + where, mask=within, other=0.0)
        given = tl.dot(x, tl.trans(g), given, input_precision=PRECISION)
        dx = tl.load(d_right + where, mask=within, other=0.0)
        if DELTA:
            taken = tl.dot(x, tl.trans(dx), taken, input_precision=PRECISION)
        dx = dx.to(tl.float32)
        if d_rates is not None:
            y = without(read_rows(v + block, mine * v_token + columns[None, :], rows, block + columns, DV, BV), wrong)
            on_rate += tl.sum(dx * y.to(tl.float32), 1)
        where = mine * (heads * DV) + (block + columns)[None, :]
        tl.store(d_v + where, (dx * rate[:, None]).to(dtype), mask=rows[:, None] & within)
    whole, rest, wholes, rests = summed_logarithms(gates, places, rows)
    seen_whole, seen_rest = seen_logarithms(whole, rest, wholes, rests, BEFORE)
    reach = between(-wholes, -rests, -wholes, -rests, mine <= other)
    tl.store(d_reads + scores, (given * reach).to(dtype))
    if DELTA:
        reach = between(-wholes, -rests, -seen_whole, -seen_rest, mine < other)
        tl.store(d_residuals + scores, (taken * reach * -rate[None, :]).to(dtype))

    if d_rates is not None or d_gates is not None:
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
                if d_gates is not None:
                    x = finite(read_rows(q + block, mine * q_token + inner[None, :], rows, block + inner, DK, BK))
                    matched = tl.dot(y, tl.trans(x), matched, input_precision=PRECISION)
                if DELTA:
                    x = y
                    if e is not None:
                        x = read_rows(e + block, mine * e_token + inner[None, :], rows, block + inner, DK, BK)
                        x = without(x, wrong)
                    erased = tl.dot(y, tl.trans(x), erased, input_precision=PRECISION)
        if d_rates is not None:
            if DELTA:
                on_rate -= tl.sum(reach * erased * taken, 0)
            tl.store(d_rates + places, on_rate, mask=rows)
        if d_gates is not None:
            # of each gate, sums over pairs of a write before it and a read from it on; no sums are subtracted
            whole, rest, wholes, rests = floored_logarithms(gates, places, rows)
            pairs = matched * given * between(-wholes, -rests, -wholes, -rests, mine < other)
            if DELTA:
                seen_whole, seen_rest = seen_logarithms(whole, rest, wholes, rests, BEFORE)
                taken *= erased * -rate[None, :] * between(-wholes, -rests, -seen_whole, -seen_rest, mine < other)
                if BEFORE:
                    pairs += taken
            crossing = tl.cumsum(pairs, 1, reverse=True)
            if DELTA and not BEFORE:
                crossing = tl.dot(taken, tl.where(mine > other, 1.0, 0.0), crossing, input_precision=PRECISION)
            tl.store(d_gates + places, tl.sum(tl.where(mine < other, crossing, 0.0), 0), mask=rows)


@triton.jit(do_not_specialize=["tokens", "each", "all_tokens"])
def _key_gradients_kernel(
    d_out, q, k, e, rates, gates, written, d_right, states, d_states, marks, d_reads, d_residuals, d_q, d_k, d_e,
    on_rates, on_gates, table, tokens, each, all_tokens, heads,
    d_row, d_token, d_head, q_row, q_token, q_head, k_row, k_token, k_head, e_row, e_token, e_head,
    DK: tl.constexpr, DV: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BEFORE: tl.constexpr,
    DELTA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of queries and keys of one chunk, head and block of key channels, and what states give to rates and gates."""
    NK: tl.constexpr = (DK + BK - 1) // BK
    program = tl.program_id(0)
    up = (program % NK) * BK
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

    rate, _wrong = rates_of(rates, places, rows)
    whole, rest, wholes, rests = summed_logarithms(gates, places, rows)
    wrong = marked_rows(marks, places, rows)
    tail = tl.exp2((tl.sum(whole, 0) - wholes) + (tl.sum(rest, 0) - rests))
    seen_whole, seen_rest = seen_logarithms(whole, rest, wholes, rests, BEFORE)
    seen = tl.exp2(seen_whole + seen_rest)
    started = tl.exp2(wholes + rests)
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
        if on_gates is not None:
            anchor += tl.sum(state.to(tl.float32) * d_state.to(tl.float32), 0)
    where, inside = mine * (heads * DK) + (up + inner)[None, :], rows[:, None] & (up + inner < DK)[None, :]
    x = finite(read_rows(q + up, mine * q_token + inner[None, :], rows, up + inner, DK, BK))
    y = without(read_rows(k + up, mine * k_token + inner[None, :], rows, up + inner, DK, BK), wrong)
    z = y
    if e is not None:
        z = without(read_rows(e + up, mine * e_token + inner[None, :], rows, up + inner, DK, BK), wrong)
    stride = (program % NK) * (all_tokens.to(tl.int64) * heads)
    if DELTA:
        on_residual = tl.sum(de * z.to(tl.float32), 1)
        if on_rates is not None:
            tl.store(on_rates + stride + places, -seen * on_residual, mask=rows)
    if on_gates is not None:
        whole, rest, wholes, rests = floored_logarithms(gates, places, rows)
        tail_of_all = (tl.sum(whole, 0) - wholes) + (tl.sum(rest, 0) - rests)
        late = tl.sum(dq * x.to(tl.float32), 1) * tl.exp2(wholes + rests)
        early = tl.sum(dk * y.to(tl.float32), 1) * tl.exp2(tail_of_all)
        found = tl.sum(anchor, 0) * tl.exp2(tl.sum(whole, 0) + tl.sum(rest, 0)) + tl.zeros((C,), tl.float32)
        if DELTA:
            seen_whole, seen_rest = seen_logarithms(whole, rest, wholes, rests, BEFORE)
            on_residual *= -rate * tl.exp2(seen_whole + seen_rest)
            if BEFORE:
                late += on_residual
            else:
                found += tl.sum(tl.where(mine > other, on_residual[:, None], 0.0), 0)
        # not a sum less its last number, which is of another size where a gate is small
        found += tl.cumsum(late, 0, reverse=True) + tl.sum(tl.where(mine < other, early[:, None], 0.0), 0)
        tl.store(on_gates + stride + places, found, mask=rows)
    dq *= started[:, None]
    dk *= tail[:, None]
    dq = tl.dot(tl.load(d_reads + turned), y, dq, input_precision=PRECISION)
    dk = tl.dot(tl.load(d_reads + scores), x, dk, input_precision=PRECISION)
    if DELTA:
        de *= -(rate * seen)[:, None]
        de = tl.dot(tl.load(d_residuals + turned), y, de, input_precision=PRECISION)
        dk = tl.dot(tl.load(d_residuals + scores), z, dk, input_precision=PRECISION)
        if e is None:
            dk += de
        else:
            tl.store(d_e + wide + where, de.to(dtype), mask=inside)
    tl.store(d_q + wide + where, dq.to(dtype), mask=inside)
    tl.store(d_k + wide + where, dk.to(dtype), mask=inside)


@triton.jit(do_not_specialize=["count"])
def _gate_gradients_kernel(
    marks, gates, on_rates, on_gates, d_rates, d_gates, count, PARTS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Gradients of rates and gates, from what pairs and what each block of key channels gives to them."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    if d_rates is not None:
        found = tl.load(d_rates + at, mask=inside, other=0.0)
        for part in range(0, PARTS):
            found += tl.load(on_rates + part * count.to(tl.int64) + at, mask=inside, other=0.0)
        tl.store(d_rates + at, found, mask=inside)
    if d_gates is not None:
        found = tl.load(d_gates + at, mask=inside, other=0.0)
        for part in range(0, PARTS):
            found += tl.load(on_gates + part * count.to(tl.int64) + at, mask=inside, other=0.0)
        whole, rest = logarithms(gates, at, inside, True)
        tl.store(d_gates + at, found * tl.exp2(-tl.maximum(whole, -64.0) - rest), mask=inside)


pair_gradients = Launcher(_pair_gradients_kernel)
key_gradients = Launcher(_key_gradients_kernel)
gate_gradients = Launcher(_gate_gradients_kernel)
