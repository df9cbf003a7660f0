"""What each chunk needs to go from the state before it to the one behind it, all chunks at once.

With residuals `U_t = r_t (v_t - e_t M_t)`, where M_t is the state before token t, decayed by its gate or not yet, a chunk
that starts from S has `(1 + L) U = r o (v - c o (e S))`, `L_tj = r_t (c_t / b_j) <e_t, k_j>` for j < t, c_t being `b_t` or
`b_(t-1)`. With `T = (1 + L)^-1` it writes `U = T (r o V - r o c o (E S))`, and is read through the scores of queries and
keys times what is left of each write, `A_tj = (b_t / b_j) <q_t, k_j>` for j <= t.

Stored are T and A, and which tokens hold what is not finite.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvbind.kernels.affine.tiles import between, marked_rows
from kvbind.kernels.causal.segments import any_wrong, finite, read_rows, rows_wrong, segment
from kvbind.kernels.launching.launcher import Launcher


@triton.jit
def _corner(low, mine, other, H: tl.constexpr):
    """What is between the halves of stretches of 2 H of a strictly lower triangle, else 0."""
    return tl.where((mine // (2 * H) == other // (2 * H)) & (mine // H != other // H), low, 0.0)


@triton.jit
def _exact_inverse(low, C: tl.constexpr, PRECISION: tl.constexpr):
    """`unit_inverse` of products of float32, blocks of 16 x 16 all at once."""
    N: tl.constexpr = C // 16
    block, at, place = tl.arange(0, N), tl.arange(0, 16), tl.arange(0, C)
    same = block[:, None, None, None] == block[None, None, :, None]
    inside = tl.sum(tl.where(same, tl.reshape(low, (N, 16, N, 16)), 0.0), 2)
    row, column = at[None, :, None], at[None, None, :]
    solved = tl.where(row == column, 1.0, -_corner(inside, row, column, 1))
    for level in tl.static_range(1, 4):
        half = tl.dot(solved, _corner(inside, row, column, 1 << level), input_precision=PRECISION)
        solved -= tl.dot(half, solved, input_precision=PRECISION)
    whole = tl.reshape(tl.where(same, solved[:, :, None, :], 0.0), (C, C))
    mine, other = place[:, None], place[None, :]
    for level in tl.static_range(4, 6):
        if (1 << level) < C:
            half = tl.dot(whole, _corner(low, mine, other, 1 << level), input_precision=PRECISION)
            whole -= tl.dot(half, whole, input_precision=PRECISION)
    return whole


@triton.jit
def unit_inverse(low, C: tl.constexpr, PRECISION: tl.constexpr, NARROW: tl.constexpr):
    """The inverse of `1 + low` for a strictly lower triangular `[C, C]`.

    The inverse of a stretch is that of its halves, and between them `-T_2 L_21 T_1`. Powers of `low`, which would need fewer
    products, grow beyond float32 where keys repeat. With `NARROW` products are of float16, which holds 11 bits of numbers
    below 65504; larger ones come about only where rates and keys let states grow with every token.
    """
    if NARROW:
        place = tl.arange(0, C)
        mine, other = place[:, None], place[None, :]
        whole = tl.where(mine == other, 1.0, -_corner(low, mine, other, 1))
        for level in tl.static_range(1, 6):
            if (1 << level) < C:
                half = tl.dot(whole.to(tl.float16), _corner(low, mine, other, 1 << level).to(tl.float16))
                whole -= tl.dot(half.to(tl.float16), whole.to(tl.float16))
        if tl.max(tl.where(tl.abs(whole) < 30000.0, 0, 1)) > 0:
            whole = _exact_inverse(low, C, PRECISION)
        return whole
    else:
        return _exact_inverse(low, C, PRECISION)


@triton.jit
def _pairs(q, k, e, at, rows, q_token, k_token, e_token, DK: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
           DELTA: tl.constexpr, CLEAN: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """`<q, k>` and `<e, k>`; with `CLEAN` of what is finite alone, and which rows of q, and of k and e, are not."""
    inner, mine = tl.arange(0, BK), at[:, None]
    scores = tl.zeros((C, C), tl.float32)
    low = tl.zeros((C, C), tl.float32)
    unread = tl.zeros((C,), tl.int32)
    wrong = tl.zeros((C,), tl.int32)
    for block in range(0, DK, BK):
        x = read_rows(q + block, mine * q_token + inner[None, :], rows, block + inner, DK, BK)
        y = read_rows(k + block, mine * k_token + inner[None, :], rows, block + inner, DK, BK)
        z = y
        if DELTA and e is not None:
            z = read_rows(e + block, mine * e_token + inner[None, :], rows, block + inner, DK, BK)
        if CLEAN:
            unread = tl.maximum(unread, rows_wrong(x))
            wrong = tl.maximum(wrong, tl.maximum(rows_wrong(y), rows_wrong(z)))
            x, y, z = finite(x), finite(y), finite(z)
        scores = tl.dot(x, tl.trans(y), scores, input_precision=PRECISION)
        if DELTA:
            low = tl.dot(z, tl.trans(y), low, input_precision=PRECISION)
    return scores, low, unread, wrong


@triton.jit(do_not_specialize=["tokens", "each"])
def _prepare_kernel(
    q, k, e, v, wholes, rests, seen_wholes, seen_rests, weights, residuals, solved, reads, reaches, keeps, marks,
    table, tokens, each, heads,
    q_row, q_token, q_head, k_row, k_token, k_head, e_row, e_token, e_head, v_row, v_token, v_head,
    DK: tl.constexpr, DV: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, DELTA: tl.constexpr, CHANNEL: tl.constexpr,
    PRECISION: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """One chunk and head.

    With `CHANNEL` A and `L / r` are there, q and e come scaled by b and c, and there are no gates.
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
    q += row * q_row + head * q_head + token * q_token
    k += row * k_row + head * k_head + token * k_token
    v += row * v_row + head * v_head + token * v_token
    if e is not None:
        e += row * e_row + head * e_head + token * e_token
    dtype: tl.constexpr = v.dtype.element_ty
    inner = tl.arange(0, BK)
    mine, other = at[:, None], at[None, :]

    # NaN where something is not finite, else 0
    odd = tl.zeros((C, BK), tl.float32)
    for block in range(0, DV, BK):
        odd += 0.0 * read_rows(v + block, mine * v_token + inner[None, :], rows, block + inner, DV, BK).to(tl.float32)
    wrong = tl.maximum(marked_rows(marks, places, rows), rows_wrong(odd))
    unread = tl.zeros((C,), tl.int32)
    if not CHANNEL:
        scores, low, _none, _none = _pairs(
            q, k, e, at, rows, q_token, k_token, e_token, DK, C, BK, DELTA, False, PRECISION
        )  # fmt: skip
        if any_wrong(tl.abs(scores) + tl.abs(low)) > 0:
            scores, low, unread, its = _pairs(
                q, k, e, at, rows, q_token, k_token, e_token, DK, C, BK, DELTA, True, PRECISION
            )  # fmt: skip
            wrong = tl.maximum(wrong, its)
    # outputs that see a token in which something is not finite are none, and so is the state behind it
    tl.store(marks + places, wrong.to(tl.int8), mask=rows)
    unseen = (tl.cumsum(wrong, 0) > 0) | (unread > 0)
    tl.store(reaches + place * C + at, float("nan"), mask=unseen)
    if tl.max(wrong, 0) > 0:
        if CHANNEL:
            for block in range(0, DK, BK):
                nothing = tl.full((BK,), float("nan"), tl.float32)
                tl.store(keeps + place * DK + block + inner, nothing, mask=block + inner < DK)
        else:
            tl.store(keeps + place, float("nan"))
    if not CHANNEL:
        scores *= between(wholes, rests, wholes, rests, place, C, False, False)
        tl.store(reads + place * (C * C) + mine * C + other, scores.to(dtype))
    if DELTA:
        if CHANNEL:
            low = tl.load(residuals + place * (C * C) + mine * C + other)
        else:
            low *= between(wholes, rests, seen_wholes, seen_rests, place, C, False, True)
        inverse = unit_inverse(low * tl.load(weights + place * C + mine), C, PRECISION, NARROW)
        tl.store(solved + place * (C * C) + mine * C + other, inverse.to(dtype))


prepare = Launcher(_prepare_kernel)
