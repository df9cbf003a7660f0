"""The triangular system of each chunk, all chunks at once.

With residuals `U_t = r_t (v_t - e_t M_t)`, where M_t is the state before token t, decayed by its gate or not yet, a chunk
that starts from S has `(1 + L) U = r o (v - c o (e S))`, `L_tj = r_t (c_t / b_j) <e_t, k_j>` for j < t, c_t being `b_t` or
`b_(t-1)`. Stored are `T = (1 + L)^-1`, the product `b_C` of a chunk's gates, and which tokens hold what is not finite.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvbind.kernels.affine.tiles import between, gates_wrong, rates_of, seen_logarithms, summed_logarithms
from kvbind.kernels.causal.segments import finite, read_rows, rows_wrong, segment
from kvbind.kernels.launching.launcher import Launcher


@triton.jit
def _corner(low, mine, other, H: tl.constexpr):
    """What is between the halves of stretches of 2 H of a strictly lower triangle, else 0."""
    return tl.where((mine // (2 * H) == other // (2 * H)) & (mine // H != other // H), low, 0.0)


@triton.jit
def unit_inverse(low, C: tl.constexpr, PRECISION: tl.constexpr, MODE: tl.constexpr = 1):
    """The inverse of `1 + low` for a strictly lower triangular `[C, C]`.

    The inverse of a stretch is that of its halves, and between them `-T_2 L_21 T_1`; blocks of 16 x 16 all at once. Powers
    of `low`, which would need fewer products, grow beyond float32 where keys repeat.
    """
    N: tl.constexpr = C // 16
    place = tl.arange(0, C)
    mine, other = place[:, None], place[None, :]
    if MODE == 2:
        whole = tl.where(mine == other, 1.0, -_corner(low, mine, other, 1))
        for level in tl.static_range(1, 4):
            half = tl.dot(whole, _corner(low, mine, other, 1 << level), input_precision=PRECISION)
            whole -= tl.dot(half, whole, input_precision=PRECISION)
    else:
        block, at = tl.arange(0, N), tl.arange(0, 16)
        same = block[:, None, None, None] == block[None, None, :, None]
        inside = tl.sum(tl.where(same, tl.reshape(low, (N, 16, N, 16)), 0.0), 2)
        row, column = at[None, :, None], at[None, None, :]
        if MODE == 1:
            solved = tl.where(row == column, 1.0, -_corner(inside, row, column, 1))
            for level in tl.static_range(1, 4):
                half = tl.dot(solved, _corner(inside, row, column, 1 << level), input_precision=PRECISION)
                solved -= tl.dot(half, solved, input_precision=PRECISION)
        else:
            solved = tl.where(row == column, 1.0, tl.zeros((N, 16, 16), tl.float32))
            for step in range(0, 15):
                factor = tl.sum(tl.where(column == step, inside, 0.0), 2)
                known = tl.sum(tl.where(row == step, solved, 0.0), 1)
                solved -= factor[:, :, None] * known[:, None, :]
        whole = tl.reshape(tl.where(same, solved[:, :, None, :], 0.0), (C, C))
    if C > 16:
        half = tl.dot(whole, _corner(low, mine, other, 16), input_precision=PRECISION)
        whole -= tl.dot(half, whole, input_precision=PRECISION)
    if C > 32:
        half = tl.dot(whole, _corner(low, mine, other, 32), input_precision=PRECISION)
        whole -= tl.dot(half, whole, input_precision=PRECISION)
    return whole


@triton.jit(do_not_specialize=["tokens", "each"])
def _solve_kernel(
    k, e, rates, gates, residuals, solved, keeps, marks, table, tokens, each, heads,
    k_row, k_token, k_head, e_row, e_token, e_head,
    DK: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BEFORE: tl.constexpr, DELTA: tl.constexpr,
    PRECISION: tl.constexpr, MODE: tl.constexpr = 1,
):  # fmt: skip
    """One chunk and head. With `residuals`, `L / r` is given, and T alone is made."""
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
    if e is not None:
        e += row * e_row + head * e_head + token * e_token
    inner = tl.arange(0, BK)
    mine, other = at[:, None], at[None, :]

    rate, wrong = rates_of(rates, places, rows)
    if residuals is None:
        wrong = tl.maximum(wrong, gates_wrong(gates, places, rows))
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
        tl.store(marks + places, wrong.to(tl.int8), mask=rows)
        whole, rest, wholes, rests = summed_logarithms(gates, places, rows)
        keep = tl.exp2(tl.sum(whole, 0) + tl.sum(rest, 0))
        tl.store(keeps + place, tl.where(tl.max(wrong, 0) > 0, float("nan"), keep))
        if DELTA:
            seen_whole, seen_rest = seen_logarithms(whole, rest, wholes, rests, BEFORE)
            low *= between(seen_whole, seen_rest, wholes, rests, mine > other)
    else:
        low = tl.load(residuals + place * (C * C) + mine * C + other)
    if DELTA:
        inverse = unit_inverse(low * rate[:, None], C, PRECISION, MODE)
        tl.store(solved + place * (C * C) + mine * C + other, inverse.to(solved.dtype.element_ty))


solve = Launcher(_solve_kernel)
