"""What each chunk's queries read, all chunks at once: `O = b o (Q S) + A U`, `U = T (r o (V - c o (E S)))`.

A are the scores of queries and keys times what is left of each write, `A_tj = (b_t / b_j) <q_t, k_j>` for j <= t.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvbind.kernels.affine.tiles import between, marked_rows, rates_of, seen_logarithms, summed_logarithms
from kvbind.kernels.causal.segments import read_rows, segment, without
from kvbind.kernels.launching.launcher import Launcher


@triton.jit(do_not_specialize=["tokens", "each"])
def _outputs_kernel(
    q, k, e, v, rates, gates, reads, solved, states, marks, out, table, tokens, each, heads,
    q_row, q_token, q_head, k_row, k_token, k_head, e_row, e_token, e_head, v_row, v_token, v_head,
    DK: tl.constexpr, DV: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BEFORE: tl.constexpr,
    DELTA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk, head and block of value columns. With `reads`, A is given and q and e come scaled by b and c."""
    NV: tl.constexpr = (DV + BV - 1) // BV
    program = tl.program_id(0)
    column = (program % NV) * BV
    head = ((program // NV) % heads).to(tl.int64)
    index = program // (NV * heads)
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
    states += place * (DK * DV)
    dtype: tl.constexpr = v.dtype.element_ty
    inner, columns = tl.arange(0, BK), column + tl.arange(0, BV)
    mine, other = at[:, None], at[None, :]

    whole, rest, wholes, rests = summed_logarithms(gates, places, rows)
    rate, _wrong = rates_of(rates, places, rows)
    wrong = marked_rows(marks, places, rows)
    scores = tl.zeros((C, C), tl.float32)
    read = tl.zeros((C, BV), tl.float32)
    foretold = tl.zeros((C, BV), tl.float32)
    for block in range(0, DK, BK):
        x = read_rows(q + block, mine * q_token + inner[None, :], rows, block + inner, DK, BK)
        inside = (block + inner < DK)[:, None] & (columns < DV)[None, :]
        state = tl.load(states + (block + inner)[:, None] * DV + columns[None, :], mask=inside, other=0.0)
        read = tl.dot(x, state, read, input_precision=PRECISION)
        if reads is None:
            y = without(read_rows(k + block, mine * k_token + inner[None, :], rows, block + inner, DK, BK), wrong)
            scores = tl.dot(x, tl.trans(y), scores, input_precision=PRECISION)
            if DELTA:
                if e is not None:
                    y = without(read_rows(e + block, mine * e_token + inner[None, :], rows, block + inner, DK, BK), wrong)
                foretold = tl.dot(y, state, foretold, input_precision=PRECISION)
        elif DELTA:
            y = without(read_rows(e + block, mine * e_token + inner[None, :], rows, block + inner, DK, BK), wrong)
            foretold = tl.dot(y, state, foretold, input_precision=PRECISION)
    if reads is None:
        scores *= between(wholes, rests, wholes, rests, mine >= other)
        read *= tl.exp2(wholes + rests)[:, None]
    else:
        scores = tl.load(reads + place * (C * C) + mine * C + other)
    written = without(read_rows(v + column, mine * v_token + tl.arange(0, BV)[None, :], rows, columns, DV, BV), wrong)
    if DELTA:
        seen_whole, seen_rest = seen_logarithms(whole, rest, wholes, rests, BEFORE)
        seen = tl.exp2(seen_whole + seen_rest)
        inverse = tl.load(solved + place * (C * C) + mine * C + other)
        by_value = (inverse.to(tl.float32) * rate[None, :]).to(dtype)
        residual = (written.to(tl.float32) - foretold * seen[:, None]).to(dtype)
        written = tl.dot(by_value, residual, input_precision=PRECISION).to(dtype)
    else:
        written = (written.to(tl.float32) * rate[:, None]).to(dtype)
    read = tl.dot(scores.to(dtype), written, read, input_precision=PRECISION)
    # tokens that see one in which something is not finite
    read = tl.where((tl.cumsum(wrong, 0) > 0)[:, None], float("nan"), read)
    out += ((row * tokens + token) * heads + head) * DV
    tl.store(out + mine * (heads * DV) + columns[None, :], read.to(dtype), mask=rows[:, None] & (columns < DV)[None, :])


outputs = Launcher(_outputs_kernel)
