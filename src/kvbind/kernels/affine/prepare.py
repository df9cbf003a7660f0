"""What each chunk does to the state, all chunks at once.

With residuals `U_t = r_t (v_t - e_t M_t)`, where M_t is the state before token t, decayed by its gate or not yet, a chunk
that starts from S has `(1 + L) U = r o (v - c o (e S))`, `L_tj = r_t (c_t / b_j) <e_t, k_j>` for j < t, c_t being `b_t` or
`b_(t-1)`. With `T = (1 + L)^-1` the state behind it is

    S' = b_C S + M S + Q,    M = -K^T diag(b_C / b) T diag(r c) E,    Q = K^T diag(b_C / b) T diag(r) V

so that going through chunks in order takes one product each. Stored are T, M, Q and `b_C`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvbind.kernels.affine.tiles import between, gates_wrong, rates_of, summed_logarithms, unit_inverse
from kvbind.kernels.causal_segments import finite, read_rows, rows_wrong, segment
from kvbind.kernels.common import Launcher


@triton.jit(do_not_specialize=["tokens", "each"])
def _prepare_kernel(
    k, e, v, rates, gates, residuals, solved, moves, writes, keeps, marks, table, tokens, each, heads,
    k_row, k_token, k_head, e_row, e_token, e_head, v_row, v_token, v_head,
    DK: tl.constexpr, DV: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BEFORE: tl.constexpr,
    DELTA: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One chunk and head. With `residuals`, `L / r` is given and keys come scaled, e by c and k by `b_C / b`."""
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

    whole, rest, wholes, rests = summed_logarithms(gates, places, rows)
    tail = tl.exp2((tl.sum(whole, 0) - wholes) + (tl.sum(rest, 0) - rests))
    seen_whole, seen_rest = wholes, rests
    if not BEFORE:
        seen_whole, seen_rest = wholes - whole, rests - rest
    seen = tl.exp2(seen_whole + seen_rest)
    rate, wrong = rates_of(rates, places, rows)
    wrong = tl.maximum(wrong, gates_wrong(gates, places, rows))

    if residuals is None:
        low = tl.zeros((C, C), tl.float32)
        for block in range(0, DK, BK):
            y = read_rows(k + block, mine * k_token + inner[None, :], rows, block + inner, DK, BK)
            wrong = tl.maximum(wrong, rows_wrong(y))
            if DELTA:
                x = y
                if e is not None:
                    x = read_rows(e + block, mine * e_token + inner[None, :], rows, block + inner, DK, BK)
                    wrong = tl.maximum(wrong, rows_wrong(x))
                low = tl.dot(finite(x), tl.trans(finite(y)), low, input_precision=PRECISION)
        low *= between(seen_whole, seen_rest, wholes, rests, mine > other)
    else:
        wrong = tl.maximum(wrong, tl.load(marks + places, mask=rows, other=0).to(tl.int32))
        if DELTA:
            low = tl.load(residuals + place * (C * C) + mine * C + other)
    if DELTA:
        inverse = unit_inverse(low * rate[:, None], C, EXACT)
        tl.store(solved + place * (C * C) + mine * C + other, inverse.to(dtype))
        by_value = (inverse * rate[None, :]).to(dtype)

    for block in range(0, DV, BV):
        y = read_rows(v + block, mine * v_token + columns[None, :], rows, block + columns, DV, BV)
        wrong = tl.maximum(wrong, rows_wrong(y))
        if DELTA:
            written = tl.dot(by_value, finite(y), input_precision=PRECISION)
        else:
            written = finite(y).to(tl.float32) * rate[:, None]
        written = (written * tail[:, None]).to(dtype)
        for up in range(0, DK, BK):
            x = read_rows(k + up, mine * k_token + inner[None, :], rows, up + inner, DK, BK)
            result = tl.dot(tl.trans(finite(x)), written, input_precision=PRECISION)
            where = (up + inner)[:, None] * DV + (block + columns)[None, :]
            inside = (up + inner < DK)[:, None] & (block + columns < DV)[None, :]
            tl.store(writes + place * (DK * DV) + where, result.to(dtype), mask=inside)
    if DELTA:
        by_key = (inverse * (rate * seen)[None, :]).to(dtype)
        for block in range(0, DK, BK):
            if e is not None:
                y = read_rows(e + block, mine * e_token + inner[None, :], rows, block + inner, DK, BK)
            else:
                y = read_rows(k + block, mine * k_token + inner[None, :], rows, block + inner, DK, BK)
            read = (tl.dot(by_key, finite(y), input_precision=PRECISION) * -tail[:, None]).to(dtype)
            for up in range(0, DK, BK):
                x = read_rows(k + up, mine * k_token + inner[None, :], rows, up + inner, DK, BK)
                result = tl.dot(tl.trans(finite(x)), read, input_precision=PRECISION)
                where = (up + inner)[:, None] * DK + (block + inner)[None, :]
                inside = (up + inner < DK)[:, None] & (block + inner < DK)[None, :]
                tl.store(moves + place * (DK * DK) + where, result.to(dtype), mask=inside)

    tl.store(marks + places, wrong.to(tl.int8), mask=rows)
    spoilt = tl.max(wrong, 0)
    if residuals is None:
        keep = tl.exp2(tl.sum(whole, 0) + tl.sum(rest, 0))
        tl.store(keeps + place, tl.where(spoilt > 0, float("nan"), keep))
    elif spoilt > 0:
        for block in range(0, DK, BK):
            tl.store(keeps + place * DK + block + inner, tl.full((BK,), float("nan"), tl.float32), mask=block + inner < DK)


prepare = Launcher(_prepare_kernel)
