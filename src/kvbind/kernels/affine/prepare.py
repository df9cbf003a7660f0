"""What each chunk needs to go from the state before it to the one behind it, all chunks at once.

With `T = (1 + L)^-1` (`kvbind.kernels.affine.solve`) a chunk that starts from S writes

    U = P - W S,    P = T diag(r) V,    W = T diag(r c) E

and is read through the scores of queries and keys times what is left of each write, `A_tj = (b_t / b_j) <q_t, k_j>` for
j <= t. Stored are P, -W, A, and of each token `b` and `b_C / b`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvbind.kernels.affine.tiles import between, marked_rows, rates_of, seen_logarithms, summed_logarithms
from kvbind.kernels.causal.segments import finite, read_rows, rows_wrong, segment, without
from kvbind.kernels.launching.launcher import Launcher


@triton.jit(do_not_specialize=["tokens", "each"])
def _prepare_kernel(
    q, k, e, v, rates, gates, solved, removed, planned, reads, reaches, tails, keeps, marks, table, tokens, each, heads,
    q_row, q_token, q_head, k_row, k_token, k_head, e_row, e_token, e_head, v_row, v_token, v_head,
    DK: tl.constexpr, DV: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BEFORE: tl.constexpr,
    DELTA: tl.constexpr, CHANNEL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk and head. With `CHANNEL` A is there, q and e come scaled by b and c, and there are no gates."""
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
    q += row * q_row + head * q_head + token * q_token
    k += row * k_row + head * k_head + token * k_token
    v += row * v_row + head * v_head + token * v_token
    if e is not None:
        e += row * e_row + head * e_head + token * e_token
    dtype: tl.constexpr = v.dtype.element_ty
    inner, columns = tl.arange(0, BK), tl.arange(0, BV)
    mine, other = at[:, None], at[None, :]

    rate, _wrong = rates_of(rates, places, rows)
    wrong = marked_rows(marks, places, rows)
    whole, rest, wholes, rests = summed_logarithms(gates, places, rows)
    if DELTA:
        seen_whole, seen_rest = seen_logarithms(whole, rest, wholes, rests, BEFORE)
        seen = tl.exp2(seen_whole + seen_rest)
        inverse = tl.load(solved + place * (C * C) + mine * C + other).to(tl.float32)
        # what is scaled is T, before it multiplies
        by_value = (inverse * rate[None, :]).to(dtype)
        by_key = (inverse * -(rate * seen)[None, :]).to(dtype)

    scores = tl.zeros((C, C), tl.float32)
    unread = tl.zeros((C,), tl.int32)
    for block in range(0, DK, BK):
        x = read_rows(q + block, mine * q_token + inner[None, :], rows, block + inner, DK, BK)
        unread = tl.maximum(unread, rows_wrong(x))
        if DELTA or not CHANNEL:
            y = without(read_rows(k + block, mine * k_token + inner[None, :], rows, block + inner, DK, BK), wrong)
        if not CHANNEL:
            scores = tl.dot(finite(x), tl.trans(y), scores, input_precision=PRECISION)
        if DELTA:
            if e is not None:
                y = without(read_rows(e + block, mine * e_token + inner[None, :], rows, block + inner, DK, BK), wrong)
            result = tl.dot(by_key, y, input_precision=PRECISION)
            where = mine * DK + (block + inner)[None, :]
            tl.store(removed + place * (C * DK) + where, result.to(dtype), mask=(block + inner < DK)[None, :])
    if not CHANNEL:
        scores *= between(wholes, rests, wholes, rests, mine >= other)
        tl.store(reads + place * (C * C) + mine * C + other, scores.to(dtype))

    spoilt = wrong
    for block in range(0, DV, BV):
        y = read_rows(v + block, mine * v_token + columns[None, :], rows, block + columns, DV, BV)
        spoilt = tl.maximum(spoilt, rows_wrong(y))
        y = finite(y)
        result = tl.dot(by_value, y, input_precision=PRECISION) if DELTA else y.to(tl.float32) * rate[:, None]
        where = mine * DV + (block + columns)[None, :]
        tl.store(planned + place * (C * DV) + where, result.to(dtype), mask=(block + columns < DV)[None, :])

    # outputs that see a token in which something is not finite are none, and so is the state behind it
    unseen = (tl.cumsum(spoilt, 0) > 0) | (unread > 0)
    tl.store(reaches + place * C + at, tl.where(unseen, float("nan"), tl.exp2(wholes + rests)))
    if tails is not None:
        tail = tl.exp2((tl.sum(whole, 0) - wholes) + (tl.sum(rest, 0) - rests))
        tl.store(tails + place * C + at, tl.where(wrong > 0, 0.0, tail))
    tl.store(marks + places, spoilt.to(tl.int8), mask=rows)
    if tl.max(spoilt, 0) > 0:
        if CHANNEL:
            for block in range(0, DK, BK):
                nothing = tl.full((BK,), float("nan"), tl.float32)
                tl.store(keeps + place * DK + block + inner, nothing, mask=block + inner < DK)
        else:
            tl.store(keeps + place, float("nan"))


prepare = Launcher(_prepare_kernel)
