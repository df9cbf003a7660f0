"""What each chunk does to the state, all chunks at once.

With `T = (1 + L)^-1` (`kvbind.kernels.affine.solve`) the state behind a chunk that starts from S is

    S' = b_C o S + M S + Q,    M = -K^T diag(b_C / b) T diag(r c) E,    Q = K^T diag(b_C / b) T diag(r) V

so that going through chunks in order takes one product each.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvbind.kernels.affine.tiles import (
    marked_rows,
    rates_of,
    read_columns,
    seen_logarithms,
    summed_logarithms,
    without_columns,
)
from kvbind.kernels.causal.segments import finite, read_rows, rows_wrong, segment, without
from kvbind.kernels.launching.launcher import Launcher


@triton.jit(do_not_specialize=["tokens", "each"])
def _prepare_kernel(
    k, e, v, rates, gates, solved, moves, writes, keeps, marks, table, tokens, each, heads,
    k_row, k_token, k_head, e_row, e_token, e_head, v_row, v_token, v_head,
    DK: tl.constexpr, DV: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BEFORE: tl.constexpr,
    DELTA: tl.constexpr, CHANNEL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk and head. With `CHANNEL` keys come scaled, k by `b_C / b` and e by c, and there are no gates."""
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
    tail = tl.exp2((tl.sum(whole, 0) - wholes) + (tl.sum(rest, 0) - rests))
    if DELTA:
        seen_whole, seen_rest = seen_logarithms(whole, rest, wholes, rests, BEFORE)
        seen = tl.exp2(seen_whole + seen_rest)
        inverse = tl.load(solved + place * (C * C) + mine * C + other).to(tl.float32)
    else:
        inverse = tl.where(mine == other, 1.0, tl.zeros((C, C), tl.float32))
        seen = tail
    # what is scaled is T, before it multiplies
    by_value = (inverse * (tail[:, None] * rate[None, :])).to(dtype)
    by_key = (inverse * (-tail[:, None] * (rate * seen)[None, :])).to(dtype)

    spoilt = wrong
    for block in range(0, DV, BV):
        y = read_rows(v + block, mine * v_token + columns[None, :], rows, block + columns, DV, BV)
        spoilt = tl.maximum(spoilt, rows_wrong(y))
        written = tl.dot(by_value, finite(y), input_precision=PRECISION).to(dtype)
        for up in range(0, DK, BK):
            x = without_columns(read_columns(k + up, at, k_token, rows, up + inner, DK, BK), wrong)
            result = tl.dot(x, written, input_precision=PRECISION)
            where = (up + inner)[:, None] * DV + (block + columns)[None, :]
            inside = (up + inner < DK)[:, None] & (block + columns < DV)[None, :]
            tl.store(writes + place * (DK * DV) + where, result.to(dtype), mask=inside)
    if DELTA:
        for block in range(0, DK, BK):
            if e is not None:
                y = read_rows(e + block, mine * e_token + inner[None, :], rows, block + inner, DK, BK)
            else:
                y = read_rows(k + block, mine * k_token + inner[None, :], rows, block + inner, DK, BK)
            read = tl.dot(by_key, without(y, wrong), input_precision=PRECISION).to(dtype)
            for up in range(0, DK, BK):
                x = without_columns(read_columns(k + up, at, k_token, rows, up + inner, DK, BK), wrong)
                result = tl.dot(x, read, input_precision=PRECISION)
                where = (up + inner)[:, None] * DK + (block + inner)[None, :]
                inside = (up + inner < DK)[:, None] & (block + inner < DK)[None, :]
                tl.store(moves + place * (DK * DK) + where, result.to(dtype), mask=inside)

    # a chunk in which something is not finite leaves no state that is
    tl.store(marks + places, spoilt.to(tl.int8), mask=rows)
    if tl.max(spoilt, 0) > 0:
        if CHANNEL:
            for block in range(0, DK, BK):
                nothing = tl.full((BK,), float("nan"), tl.float32)
                tl.store(keeps + place * DK + block + inner, nothing, mask=block + inner < DK)
        else:
            tl.store(keeps + place, float("nan"))


prepare = Launcher(_prepare_kernel)
