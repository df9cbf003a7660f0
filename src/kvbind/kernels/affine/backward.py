"""Gradients of a chunk's operands, all chunks at once, and what each chunk adds to the gradient of the state.

With G the gradient of the outputs and D that of the state behind a chunk (`kvbind.kernels.affine.states`):

    gradient of U              dU = A^T G + diag(b_C / b) K D
    of R = r o (v - c o (e S)) dR = T^T dU,   of v: r o dR
    of A                       G U^T,         of L: -dR U^T
    of S                       b_C D + M^T D + Q',   Q' = (b o Q)^T G - (r c o E)^T T^T A^T G

Four kernels: Q' of each chunk; then, with D known, U, dR and values; what pairs of tokens have to do with each other, and
with them rates and gates; queries and keys.

Gates enter as products over spans of tokens. The gradient of one gate is a sum over the spans that hold it, of what the
whole product is multiplied by times the product of the others: products before it and behind it, and nothing is divided by
a gate (as in `kvbind.kernels.causal.gate_gradients`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvbind.kernels.affine.tiles import (
    between,
    marked_rows,
    rates_of,
    read_columns,
    seen_logarithms,
    summed_logarithms,
    without_columns,
)
from kvbind.kernels.causal.segments import finite, read_rows, segment, without
from kvbind.kernels.launching.launcher import Launcher


@triton.jit(do_not_specialize=["tokens", "each"])
def _state_gradients_kernel(
    d_out, q, k, e, rates, gates, reads, solved, marks, writes, table, tokens, each, heads,
    d_row, d_token, d_head, q_row, q_token, q_head, k_row, k_token, k_head, e_row, e_token, e_head,
    DK: tl.constexpr, DV: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BEFORE: tl.constexpr,
    DELTA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`Q'` of one chunk and head. With `reads`, A is given and q and e come scaled."""
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
    q += row * q_row + head * q_head + token * q_token
    k += row * k_row + head * k_head + token * k_token
    if e is not None:
        e += row * e_row + head * e_head + token * e_token
    dtype: tl.constexpr = d_out.dtype.element_ty
    inner, columns = tl.arange(0, BK), tl.arange(0, BV)
    mine, other = at[:, None], at[None, :]

    whole, rest, wholes, rests = summed_logarithms(gates, places, rows)
    started = tl.exp2(wholes + rests)
    wrong = marked_rows(marks, places, rows)
    if DELTA:
        rate, _wrong = rates_of(rates, places, rows)
        seen_whole, seen_rest = seen_logarithms(whole, rest, wholes, rests, BEFORE)
        seen = tl.exp2(seen_whole + seen_rest)
        if reads is None:
            # rows are of the writes, columns of the reads: the transpose of a product is no operand of another on Hopper
            scores = tl.zeros((C, C), tl.float32)
            for block in range(0, DK, BK):
                x = read_rows(q + block, mine * q_token + inner[None, :], rows, block + inner, DK, BK)
                y = without(read_rows(k + block, mine * k_token + inner[None, :], rows, block + inner, DK, BK), wrong)
                scores = tl.dot(y, tl.trans(finite(x)), scores, input_precision=PRECISION)
            shares = (scores * between(-wholes, -rests, -wholes, -rests, mine <= other)).to(dtype)
        else:
            shares = tl.load(reads + place * (C * C) + other * C + mine)
        inverse = tl.load(solved + place * (C * C) + other * C + mine)
    for block in range(0, DV, BV):
        g = read_rows(d_out + block, mine * d_token + columns[None, :], rows, block + columns, DV, BV)
        if DELTA:
            own = tl.dot(shares, g, input_precision=PRECISION).to(dtype)
            own = (tl.dot(inverse, own, input_precision=PRECISION) * -(rate * seen)[:, None]).to(dtype)
        g = (g.to(tl.float32) * started[:, None]).to(dtype)
        for up in range(0, DK, BK):
            x = read_columns(q + up, at, q_token, rows, up + inner, DK, BK)
            result = tl.dot(finite(x), g, input_precision=PRECISION)
            if DELTA:
                if e is not None:
                    y = read_columns(e + up, at, e_token, rows, up + inner, DK, BK)
                else:
                    y = read_columns(k + up, at, k_token, rows, up + inner, DK, BK)
                result = tl.dot(without_columns(y, wrong), own, result, input_precision=PRECISION)
            where = (up + inner)[:, None] * DV + (block + columns)[None, :]
            inside = (up + inner < DK)[:, None] & (block + columns < DV)[None, :]
            tl.store(writes + place * (DK * DV) + where, result.to(dtype), mask=inside)


@triton.jit(do_not_specialize=["tokens", "each", "all_tokens"])
def _value_gradients_kernel(
    d_out, q, k, e, v, rates, gates, reads, solved, states, d_states, marks, written, d_right, d_v, sums, anchors,
    table, tokens, each, all_tokens, heads,
    d_row, d_token, d_head, q_row, q_token, q_head, k_row, k_token, k_head, e_row, e_token, e_head,
    v_row, v_token, v_head,
    DK: tl.constexpr, DV: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BEFORE: tl.constexpr,
    DELTA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """U, dR and the gradients of values, of one chunk and head.

    Of each token are left, for rates and gates, sums over value columns: of dR and R / r, of G and Q S, of -r dR and E S, of
    U and K D; of each chunk that of S and D. With `reads`, A is given, and q, e and k come scaled by b, c and `b_C / b`.
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
    q += row * q_row + head * q_head + token * q_token
    k += row * k_row + head * k_head + token * k_token
    v += row * v_row + head * v_head + token * v_token
    if e is not None:
        e += row * e_row + head * e_head + token * e_token
    states += place * (DK * DV)
    d_states += place * (DK * DV)
    base = ((row * tokens + token) * heads + head) * DV
    dtype: tl.constexpr = v.dtype.element_ty
    inner, columns = tl.arange(0, BK), tl.arange(0, BV)
    mine, other = at[:, None], at[None, :]

    whole, rest, wholes, rests = summed_logarithms(gates, places, rows)
    seen_whole, seen_rest = seen_logarithms(whole, rest, wholes, rests, BEFORE)
    seen = tl.exp2(seen_whole + seen_rest)
    tail = tl.exp2((tl.sum(whole, 0) - wholes) + (tl.sum(rest, 0) - rests))
    rate, _wrong = rates_of(rates, places, rows)
    wrong = marked_rows(marks, places, rows)
    if reads is None:
        scores = tl.zeros((C, C), tl.float32)
        for block in range(0, DK, BK):
            x = finite(read_rows(q + block, mine * q_token + inner[None, :], rows, block + inner, DK, BK))
            y = without(read_rows(k + block, mine * k_token + inner[None, :], rows, block + inner, DK, BK), wrong)
            scores = tl.dot(y, tl.trans(x), scores, input_precision=PRECISION)
        shares = (scores * between(-wholes, -rests, -wholes, -rests, mine <= other)).to(dtype)
    else:
        shares = tl.load(reads + place * (C * C) + other * C + mine)
    if DELTA:
        by_value = tl.load(solved + place * (C * C) + mine * C + other).to(tl.float32)
        by_value = (by_value * rate[None, :]).to(dtype)
        inverse = tl.load(solved + place * (C * C) + other * C + mine)

    on_rate = tl.zeros((C,), tl.float32)
    on_read, on_residual, on_write = on_rate, on_rate, on_rate
    anchor = 0.0
    for block in range(0, DV, BV):
        value_inside = (block + columns < DV)[None, :]
        read = tl.zeros((C, BV), tl.float32)
        foretold = tl.zeros((C, BV), tl.float32)
        returned = tl.zeros((C, BV), tl.float32)
        for up in range(0, DK, BK):
            inside = (up + inner < DK)[:, None] & value_inside
            where = (up + inner)[:, None] * DV + (block + columns)[None, :]
            state = tl.load(states + where, mask=inside, other=0.0)
            d_state = tl.load(d_states + where, mask=inside, other=0.0)
            y = without(read_rows(k + up, mine * k_token + inner[None, :], rows, up + inner, DK, BK), wrong)
            returned = tl.dot(y, d_state, returned, input_precision=PRECISION)
            if DELTA:
                if e is not None:
                    y = without(read_rows(e + up, mine * e_token + inner[None, :], rows, up + inner, DK, BK), wrong)
                foretold = tl.dot(y, state, foretold, input_precision=PRECISION)
            if gates is not None:
                x = finite(read_rows(q + up, mine * q_token + inner[None, :], rows, up + inner, DK, BK))
                read = tl.dot(x, state, read, input_precision=PRECISION)
                anchor += tl.sum(tl.sum(state.to(tl.float32) * d_state.to(tl.float32), 1), 0)
        value = without(read_rows(v + block, mine * v_token + columns[None, :], rows, block + columns, DV, BV), wrong)
        residual = value.to(tl.float32)
        g = read_rows(d_out + block, mine * d_token + columns[None, :], rows, block + columns, DV, BV)
        if gates is not None:
            on_read += tl.sum(g.to(tl.float32) * read, 1)
        d_written = tl.dot(shares, g, returned * tail[:, None], input_precision=PRECISION)
        if DELTA:
            residual -= foretold * seen[:, None]
            x = tl.dot(by_value, residual.to(dtype), input_precision=PRECISION)
            dx = tl.dot(inverse, d_written.to(dtype), input_precision=PRECISION)
        else:
            x = residual * rate[:, None]
            dx = d_written
        on_rate += tl.sum(dx * residual, 1)
        if gates is not None:
            on_residual -= rate * tl.sum(dx * foretold, 1)
            on_write += tl.sum(x * returned, 1)
        where, inside = mine * (heads * DV) + (block + columns)[None, :], rows[:, None] & value_inside
        tl.store(written + base + where, x.to(dtype), mask=inside)
        if DELTA:
            tl.store(d_right + base + where, dx.to(dtype), mask=inside)
        tl.store(d_v + base + where, (dx * rate[:, None]).to(dtype), mask=inside)

    stride = all_tokens.to(tl.int64) * heads
    tl.store(sums + places, on_rate, mask=rows)
    if gates is not None:
        tl.store(sums + stride + places, on_read, mask=rows)
        tl.store(sums + 2 * stride + places, on_residual, mask=rows)
        tl.store(sums + 3 * stride + places, on_write, mask=rows)
        tl.store(anchors + place, anchor)


@triton.jit(do_not_specialize=["tokens", "each", "all_tokens"])
def _pair_gradients_kernel(
    d_out, q, k, e, rates, gates, residuals, marks, written, d_right, sums, anchors, d_reads, d_residuals, d_rates, d_gates,
    table, tokens, each, all_tokens, heads,
    d_row, d_token, d_head, q_row, q_token, q_head, k_row, k_token, k_head, e_row, e_token, e_head,
    DK: tl.constexpr, DV: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BEFORE: tl.constexpr,
    DELTA: tl.constexpr, CHANNEL: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Gradients of the scores of one chunk and head, of its rates and of its gates.

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
    base = ((row * tokens + token) * heads + head) * DV
    dtype: tl.constexpr = written.dtype.element_ty
    inner, columns = tl.arange(0, BK), tl.arange(0, BV)
    mine, other = at[:, None], at[None, :]
    scores = place * (C * C) + mine * C + other

    given = tl.zeros((C, C), tl.float32)
    taken = tl.zeros((C, C), tl.float32)
    for block in range(0, DV, BV):
        g = read_rows(d_out + block, mine * d_token + columns[None, :], rows, block + columns, DV, BV)
        x = read_rows(written + base + block, mine * (heads * DV) + columns[None, :], rows, block + columns, DV, BV)
        given = tl.dot(x, tl.trans(g), given, input_precision=PRECISION)
        if DELTA:
            dx = read_rows(d_right + base + block, mine * (heads * DV) + columns[None, :], rows, block + columns, DV, BV)
            taken = tl.dot(x, tl.trans(dx), taken, input_precision=PRECISION)
    rate, _wrong = rates_of(rates, places, rows)
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
            wrong = marked_rows(marks, places, rows)
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
            d_rate = tl.load(sums + places, mask=rows, other=0.0)
            if DELTA:
                d_rate -= tl.sum(reach * erased * taken, 0)
            tl.store(d_rates + places, d_rate, mask=rows)
        if d_gates is not None:
            stride = all_tokens.to(tl.int64) * heads
            on_read = tl.load(sums + stride + places, mask=rows, other=0.0)
            on_residual = tl.load(sums + 2 * stride + places, mask=rows, other=0.0)
            on_write = tl.load(sums + 3 * stride + places, mask=rows, other=0.0)
            # rows are of the reads of pairs, then of their writes; columns of gates
            before = tl.exp2((wholes - whole) + (rests - rest))
            tail = tl.exp2((tl.sum(whole, 0) - wholes) + (tl.sum(rest, 0) - rests))
            to_gate = between(-wholes, -rests, whole - wholes, rest - rests, mine < other)
            from_gate = between(wholes, rests, wholes, rests, mine >= other)
            pairs = tl.where(mine < other, matched * given, 0.0)
            if DELTA and BEFORE:
                pairs -= tl.where(mine < other, erased * taken * rate[None, :], 0.0)
                on_read += on_residual
            found = before * (tail * tl.load(anchors + place) + tl.sum(from_gate * on_read[:, None], 0))
            inside = tl.dot(pairs, from_gate, on_write[:, None] * tail[None, :], input_precision=EXACT)
            if DELTA and not BEFORE:
                pairs = tl.where(mine < other, -erased * taken * rate[None, :], 0.0)
                from_gate = between(wholes - whole, rests - rest, wholes, rests, mine > other)
                found += before * tl.sum(from_gate * on_residual[:, None], 0)
                inside = tl.dot(pairs, from_gate, inside, input_precision=EXACT)
            found += tl.sum(to_gate * inside, 0)
            tl.store(d_gates + places, found, mask=rows)


@triton.jit(do_not_specialize=["tokens", "each"])
def _key_gradients_kernel(
    d_out, q, k, e, rates, gates, written, d_right, states, d_states, marks, d_reads, d_residuals, d_q, d_k, d_e,
    table, tokens, each, heads,
    d_row, d_token, d_head, q_row, q_token, q_head, k_row, k_token, k_head, e_row, e_token, e_head,
    DK: tl.constexpr, DV: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BEFORE: tl.constexpr,
    DELTA: tl.constexpr, CHANNEL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of queries and keys of one chunk, head and block of key channels.

    With `CHANNEL`, those of scaled queries and keys, as far as states go.
    """
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
    states += place * (DK * DV)
    d_states += place * (DK * DV)
    base = ((row * tokens + token) * heads + head) * DV
    dtype: tl.constexpr = written.dtype.element_ty
    inner, columns = tl.arange(0, BK), tl.arange(0, BV)
    mine, other = at[:, None], at[None, :]

    dq = tl.zeros((C, BK), tl.float32)
    dk = tl.zeros((C, BK), tl.float32)
    de = tl.zeros((C, BK), tl.float32)
    for block in range(0, DV, BV):
        inside = (up + inner < DK)[:, None] & (block + columns < DV)[None, :]
        where = (up + inner)[:, None] * DV + (block + columns)[None, :]
        state = tl.trans(tl.load(states + where, mask=inside, other=0.0))
        d_state = tl.trans(tl.load(d_states + where, mask=inside, other=0.0))
        g = read_rows(d_out + block, mine * d_token + columns[None, :], rows, block + columns, DV, BV)
        x = read_rows(written + base + block, mine * (heads * DV) + columns[None, :], rows, block + columns, DV, BV)
        dq = tl.dot(g, state, dq, input_precision=PRECISION)
        dk = tl.dot(x, d_state, dk, input_precision=PRECISION)
        if DELTA:
            dx = read_rows(d_right + base + block, mine * (heads * DV) + columns[None, :], rows, block + columns, DV, BV)
            de = tl.dot(dx, state, de, input_precision=PRECISION)
    rate, _wrong = rates_of(rates, places, rows)
    wide = (row * tokens + token) * (heads * DK) + head * DK
    where, inside = mine * (heads * DK) + (up + inner)[None, :], rows[:, None] & (up + inner < DK)[None, :]
    if CHANNEL:
        if DELTA:
            de *= -rate[:, None]
    else:
        whole, rest, wholes, rests = summed_logarithms(gates, places, rows)
        wrong = marked_rows(marks, places, rows)
        q += row * q_row + head * q_head + token * q_token + up
        k += row * k_row + head * k_head + token * k_token + up
        scores, turned = place * (C * C) + mine * C + other, place * (C * C) + other * C + mine
        tail = tl.exp2((tl.sum(whole, 0) - wholes) + (tl.sum(rest, 0) - rests))
        x = finite(read_rows(q, mine * q_token + inner[None, :], rows, up + inner, DK, BK))
        y = without(read_rows(k, mine * k_token + inner[None, :], rows, up + inner, DK, BK), wrong)
        dq *= tl.exp2(wholes + rests)[:, None]
        dk *= tail[:, None]
        dq = tl.dot(tl.load(d_reads + turned), y, dq, input_precision=PRECISION)
        dk = tl.dot(tl.load(d_reads + scores), x, dk, input_precision=PRECISION)
        if DELTA:
            seen_whole, seen_rest = seen_logarithms(whole, rest, wholes, rests, BEFORE)
            seen = tl.exp2(seen_whole + seen_rest)
            shares = tl.load(d_residuals + scores)
            de *= -(rate * seen)[:, None]
            de = tl.dot(tl.load(d_residuals + turned), y, de, input_precision=PRECISION)
            if e is None:
                dk = tl.dot(shares, y, dk + de, input_precision=PRECISION)
            else:
                e += row * e_row + head * e_head + token * e_token + up
                z = without(read_rows(e, mine * e_token + inner[None, :], rows, up + inner, DK, BK), wrong)
                dk = tl.dot(shares, z, dk, input_precision=PRECISION)
    tl.store(d_q + wide + where, dq.to(dtype), mask=inside)
    tl.store(d_k + wide + where, dk.to(dtype), mask=inside)
    if d_e is not None:
        tl.store(d_e + wide + where, de.to(dtype), mask=inside)


state_gradients = Launcher(_state_gradients_kernel)
value_gradients = Launcher(_value_gradients_kernel)
pair_gradients = Launcher(_pair_gradients_kernel)
key_gradients = Launcher(_key_gradients_kernel)
