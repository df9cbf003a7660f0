"""Gates per key channel: what they make of queries and keys, and the way back.

A score of a read t and a write j is `sum_f q_tf k_jf exp(B_tf - B_jf)`, where B are the summed logarithms of gates. Scaling
all of a chunk to one boundary divides by products of gates, which overflow. Here a chunk is halved, its halves are halved,
and so on (as in `kvbind.forms.channels`): the reads of every second half meet the writes of the first at the boundary
between them, reads scaled by the product of gates from there on, writes by that of the gates up to it. All factors are
products over stretches that begin or end at a boundary, and sums of logarithms are never subtracted.

With the scores and with queries and keys scaled to the chunk's own ends, the other kernels need know nothing of channels.

The gradient of a gate goes the other way, from the chunk to its halves. What hangs on a stretch is a sum of three kinds of
terms: `z` times the product of all its gates, `x_t` times that up to token t, `y_j` times that behind token j. For its
first half, z is the second's product times its own, and the second's x, each with its product, are added; and likewise for
the second. At single tokens, what is left of z and x is the gradient. Nothing is divided by a gate.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvbind.kernels.affine.tiles import marked_rows
from kvbind.kernels.causal.segments import SHUT, finite, read_rows, rows_wrong, segment, without
from kvbind.kernels.launching.launcher import Launcher


@triton.jit
def _logarithms(gates, places, live):
    """Logarithms (base 2) of gates, 0 where there are none, infinite where they are not finite; and the least of them."""
    gate = tl.load(gates + places, mask=live, other=1.0)
    # a little above float32's least normal number, which is a number of float64 and would make such of all
    open_ = gate >= 1.1754944e-38
    logs = tl.where(open_, tl.log2(tl.where(open_, gate, 1.0)), SHUT)
    real = tl.abs(gate) < float("inf")
    return tl.where(real, logs, float("inf")), tl.min(tl.min(tl.where(real, logs, 0.0), 1), 0)


@triton.jit
def _open(logs):
    """Logarithms with gates that are not finite as 1."""
    return tl.where(logs < float("inf"), logs, 0.0)


@triton.jit
def _row(x, at, ROW: tl.constexpr):
    """A row of a tile."""
    return tl.sum(tl.where((at == ROW)[:, None], x, 0.0), 0)[None, :]


@triton.jit
def _rows(x, at, STRETCH: tl.constexpr, ROW: tl.constexpr, GATHER: tl.constexpr):
    """At each row, what a row of its stretch has."""
    rows: tl.constexpr = x.shape[0]
    if GATHER:
        return tl.gather(x, (at // STRETCH * STRETCH + ROW)[:, None] + tl.zeros(x.shape, tl.int32), 0)
    else:
        found = _row(x, at, ROW)
        for stretch in tl.static_range(1, rows // STRETCH):
            found = tl.where((at // STRETCH == stretch)[:, None], _row(x, at, STRETCH * stretch + ROW), found)
        return found


@triton.jit
def _mild_scores_between(scores, erased, x, y, z, own, sums, at, dtype: tl.constexpr, H: tl.constexpr, BEFORE: tl.constexpr,
                         DELTA: tl.constexpr, GATHER: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Scores of reads in second halves of stretches of 2 H with writes in first ones, added."""
    rows: tl.constexpr = own.shape[0]
    if rows > H:
        reach = sums - _rows(sums, at, 2 * H, H - 1, GATHER)
        second = (at // H % 2 == 1)[:, None]
        factor = tl.exp2(tl.where(second, reach, -reach))
        meet = _meet(at[:, None], at[None, :], H)
        keys = tl.trans((y * factor).to(dtype))
        scores += tl.where(meet, tl.dot((x * factor).to(dtype), keys, input_precision=PRECISION), 0.0)
        if DELTA:
            if not BEFORE:
                factor = tl.exp2(tl.where(second, reach - own, 0.0))
            erased += tl.where(meet, tl.dot((z * factor).to(dtype), keys, input_precision=PRECISION), 0.0)
    return scores, erased


@triton.jit
def _mild_scores(scores, erased, x, y, z, own, at, dtype: tl.constexpr, BEFORE: tl.constexpr, DELTA: tl.constexpr,
                 GATHER: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Scores of a chunk whose gates are all mild, added; and factors as of `_factors`.

    In stretches of 16 writes are divided by products of gates, which float16 is too narrow for.
    """
    wide: tl.constexpr = tl.float32 if dtype == tl.float16 else dtype
    mine, other = at[:, None], at[None, :]
    sums = tl.cumsum(own, 0)
    for level in tl.static_range(0, 2):
        scores, erased = _mild_scores_between(
            scores, erased, x, y, z, own, sums, at, dtype, 32 >> level, BEFORE, DELTA, GATHER, PRECISION
        )
    reach = sums - _rows(sums, at, 16, 0, GATHER)
    meet = (mine // 16 == other // 16) & (mine > other)
    keys = tl.trans((y * tl.exp2(-reach)).to(wide))
    factor = tl.exp2(reach)
    scores += tl.where(meet, tl.dot((x * factor).to(wide), keys, input_precision=PRECISION), 0.0)
    if DELTA:
        if not BEFORE:
            factor = tl.exp2(reach - own)
        erased += tl.where(meet, tl.dot((z * factor).to(wide), keys, input_precision=PRECISION), 0.0)
    reach = tl.exp2(sums)
    seen = reach
    if not BEFORE:
        seen = tl.exp2(sums - own)
    return scores, erased, reach, seen, tl.exp2(tl.sum(own, 0)[None, :] - sums)


@triton.jit
def _up_to(logs, H: tl.constexpr):
    """Sums of rows of each stretch of H up to every row, its own included."""
    if H == 1:
        return logs
    else:
        rows: tl.constexpr = logs.shape[0]
        width: tl.constexpr = logs.shape[1]
        return tl.reshape(tl.cumsum(tl.reshape(logs, (rows // H, H, width)), 1), (rows, width))


@triton.jit
def _from(logs, H: tl.constexpr):
    """Sums of rows of each stretch of H from every row on, its own included."""
    if H == 1:
        return logs
    else:
        rows: tl.constexpr = logs.shape[0]
        width: tl.constexpr = logs.shape[1]
        return tl.reshape(tl.cumsum(tl.reshape(logs, (rows // H, H, width)), 1, reverse=True), (rows, width))


@triton.jit
def _factors(own, earlier, later, at, H: tl.constexpr, BEFORE: tl.constexpr):
    """Of stretches of H: products of gates up to each row; those that a residual sees; those behind each row."""
    reach = tl.exp2(_up_to(own, H))
    seen = reach
    if not BEFORE:
        seen = tl.exp2(_up_to(tl.where((at % H == 0)[:, None], 0.0, earlier), H))
    return reach, seen, tl.exp2(_from(tl.where((at % H == H - 1)[:, None], 0.0, later), H))


@triton.jit
def _meet(mine, other, H: tl.constexpr):
    """Whether a row is in the second half of a stretch of 2 H and a column in its first."""
    return (mine // (2 * H) == other // (2 * H)) & (mine // H > other // H)


@triton.jit
def _scores_between(scores, erased, x, y, z, own, earlier, later, at, dtype: tl.constexpr, H: tl.constexpr,
                    BEFORE: tl.constexpr, DELTA: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Scores of reads in second halves of stretches of 2 H with writes in first ones, added."""
    if H > 0:
        reach, seen, behind = _factors(own, earlier, later, at, H, BEFORE)
        meet = _meet(at[:, None], at[None, :], H)
        keys = tl.trans((y * behind).to(dtype))
        scores += tl.where(meet, tl.dot((x * reach).to(dtype), keys, input_precision=PRECISION), 0.0)
        if DELTA:
            erased += tl.where(meet, tl.dot((z * seen).to(dtype), keys, input_precision=PRECISION), 0.0)
    return scores, erased


@triton.jit(do_not_specialize=["tokens", "each"])
def _scale_kernel(
    q, k, e, gates, scaled_q, scaled_k, scaled_e, reads, residuals, keeps, marks, steep, table, tokens, each, heads,
    q_row, q_token, q_head, k_row, k_token, k_head, e_row, e_token, e_head,
    DK: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BEFORE: tl.constexpr, DELTA: tl.constexpr,
    PRECISION: tl.constexpr, MILD: tl.constexpr, STEEP: tl.constexpr, GATHER: tl.constexpr,
):  # fmt: skip
    """Scores and scaled queries and keys of one chunk and head."""
    program = tl.program_id(0)
    head = (program % heads).to(tl.int64)
    index = program // heads
    row, sequence, start, stop, _ends = segment(index, table, tokens, C, each, False)
    if sequence < 0:
        return
    token = start.to(tl.int64)
    place = index.to(tl.int64) * heads + head
    if STEEP:  # noqa: SIM102 - one is known when compiling
        if tl.load(steep + place) == 0:
            return
    at = tl.arange(0, C)
    rows = at < stop - token
    places = ((row * tokens + token) + at) * heads + head
    q += row * q_row + head * q_head + token * q_token
    k += row * k_row + head * k_head + token * k_token
    if e is not None:
        e += row * e_row + head * e_head + token * e_token
    base = ((row * tokens + token) * heads + head) * DK
    dtype: tl.constexpr = q.dtype.element_ty
    inner = tl.arange(0, BK)
    mine, other = at[:, None], at[None, :]
    gate_places = mine * (heads * DK) + inner[None, :]

    wrong = marked_rows(marks, places, rows)
    steepest = 0.0
    scores = tl.zeros((C, C), tl.float32)
    erased = tl.zeros((C, C), tl.float32)
    for block in range(0, DK, BK):
        inside = (block + inner < DK)[None, :]
        logs, stored = gates + base + block, rows[:, None] & inside
        own, least = _logarithms(logs, gate_places, stored)
        x = read_rows(q + block, mine * q_token + inner[None, :], rows, block + inner, DK, BK).to(tl.float32)
        y = read_rows(k + block, mine * k_token + inner[None, :], rows, block + inner, DK, BK).to(tl.float32)
        wrong = tl.maximum(wrong, tl.maximum(rows_wrong(y), rows_wrong(own)))
        own, y = _open(own), finite(y)
        z = y
        if e is not None:
            z = read_rows(e + block, mine * e_token + inner[None, :], rows, block + inner, DK, BK).to(tl.float32)
            wrong = tl.maximum(wrong, rows_wrong(z))
            z = finite(z)
        real = finite(x)
        scores += tl.where(mine == other, tl.sum(real * y, 1)[:, None], 0.0)
        if not STEEP:
            steepest = tl.minimum(steepest, least)
            scores, erased, reach, seen, behind = _mild_scores(
                scores, erased, real, y, z, own, at, dtype, BEFORE, DELTA, GATHER, PRECISION
            )
        else:
            behind_rows = ((at + 1 < stop - token) & (at + 1 < C))[:, None] & inside
            later, _least = _logarithms(logs, gate_places + heads * DK, behind_rows)
            later = _open(later)
            earlier = own
            if not BEFORE:
                earlier, _least = _logarithms(logs, gate_places - heads * DK, ((at > 0) & rows)[:, None] & inside)
                earlier = _open(earlier)
            for level in tl.static_range(0, 6):
                scores, erased = _scores_between(
                    scores, erased, real, y, z, own, earlier, later, at, dtype, (C // 2) >> level, BEFORE, DELTA, PRECISION
                )
            reach, seen, behind = _factors(own, earlier, later, at, C, BEFORE)
        where = base + block + gate_places
        # queries keep what is not finite, as it is theirs alone
        tl.store(scaled_q + where, (x * reach).to(dtype), mask=stored)
        tl.store(scaled_k + where, (y * behind).to(dtype), mask=stored)
        if DELTA:
            tl.store(scaled_e + where, (z * seen).to(dtype), mask=stored)
        tl.store(keeps + place * DK + block + inner, tl.exp2(tl.sum(own, 0)), mask=block + inner < DK)
    tl.store(marks + places, wrong.to(tl.int8), mask=rows)
    if not STEEP:
        tl.store(steep + place, (steepest < MILD).to(tl.int8))
    tl.store(reads + place * (C * C) + mine * C + other, scores.to(dtype))
    if DELTA:
        tl.store(residuals + place * (C * C) + mine * C + other, erased)


@triton.jit
def _halves(x, H: tl.constexpr):
    """Sums over the rows of each first and of each second half of stretches of 2 H, at every row of the other half."""
    rows: tl.constexpr = x.shape[0]
    width: tl.constexpr = x.shape[1]
    second = (tl.arange(0, 2) > 0)[None, :, None, None]
    parted = tl.reshape(x, (rows // (2 * H), 2, H, width))
    of_first = tl.sum(tl.sum(tl.where(second, 0.0, parted), 2), 1)[:, None, None, :]
    of_second = tl.sum(tl.sum(tl.where(second, parted, 0.0), 2), 1)[:, None, None, :]
    return tl.reshape(tl.where(second, of_first, of_second) + tl.zeros_like(parted), (rows, width))


@triton.jit
def _gradients_between(
    dq, dk, de, x, x_before, y_behind, through, q, k, e, own, earlier, later, d_reads, d_residuals, turned_reads,
    turned_residuals, at, dtype: tl.constexpr, H: tl.constexpr, BEFORE: tl.constexpr, DELTA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What pairs that meet in stretches of 2 H add to gradients, and what hangs on their halves.

    What hangs on stretches of 2 H: x multiplies products up to each row, its own included, `x_before` those without it,
    `y_behind` products behind it, and `through` the product of all. Gradients of scores have rows of the writes, and turned
    of the reads.
    """
    if H > 0:
        reach, seen, behind = _factors(own, earlier, later, at, H, BEFORE)
        second = (at // H % 2 == 1)[:, None]
        # products of the other half
        whole = tl.exp2(_halves(own, H))
        through = through * whole + _halves(tl.where(second, x * reach, y_behind * behind), H)
        if not BEFORE:
            through += _halves(tl.where(second, x_before * seen, 0.0), H)
            x_before = tl.where(second, x_before * whole, x_before)
        x = tl.where(second, x * whole, x)
        y_behind = tl.where(second, y_behind, y_behind * whole)

        # rows are of the writes
        meet = _meet(at[None, :], at[:, None], H)
        keys, queries = (k * behind).to(dtype), (q * reach).to(dtype)
        turned = _meet(at[:, None], at[None, :], H)
        found = tl.dot(tl.where(turned, turned_reads, 0.0).to(dtype), keys, input_precision=PRECISION)
        dq += found * reach
        x += found * q
        found = tl.dot(tl.where(meet, d_reads, 0.0).to(dtype), queries, input_precision=PRECISION)
        if DELTA:
            shares = tl.where(meet, d_residuals, 0.0).to(dtype)
            found = tl.dot(shares, (e * seen).to(dtype), found, input_precision=PRECISION)
        dk += found * behind
        y_behind += found * k
        if DELTA:
            found = tl.dot(tl.where(turned, turned_residuals, 0.0).to(dtype), keys, input_precision=PRECISION)
            de += found * seen
            if BEFORE:
                x += found * e
            else:
                x_before += found * e
    return dq, dk, de, x, x_before, y_behind, through


@triton.jit
def _half_sums(x, at, H: tl.constexpr):
    """Sums over the rows of each first and of each second half of stretches of 2 H, at every row of the other half."""
    rows: tl.constexpr = x.shape[0]
    found = tl.zeros_like(x)
    for half in tl.static_range(0, rows // H):
        total = tl.sum(tl.where((at // H == half)[:, None], x, 0.0), 0)[None, :]
        found = tl.where((at // H == half + 1 - 2 * (half % 2))[:, None], total, found)
    return found


@triton.jit
def _mild_gradients_between(
    dq, dk, de, x, x_before, y_behind, through, q, k, e, own, sums, d_reads, d_residuals, scores, back, at,
    dtype: tl.constexpr, H: tl.constexpr, BEFORE: tl.constexpr, DELTA: tl.constexpr, GATHER: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What `_gradients_between` returns, of a chunk whose gates are all mild."""
    rows: tl.constexpr = own.shape[0]
    if rows > H:
        reach = sums - _rows(sums, at, 2 * H, H - 1, GATHER)
        second = (at // H % 2 == 1)[:, None]
        factor = tl.exp2(tl.where(second, reach, -reach))
        seen = factor
        if not BEFORE:
            seen = tl.exp2(tl.where(second, reach - own, 0.0))
        whole = tl.exp2(_half_sums(own, at, H))
        hung = tl.where(second, x, y_behind) * factor
        if not BEFORE:
            hung += tl.where(second, x_before * seen, 0.0)
            x_before = tl.where(second, x_before * whole, x_before)
        through = through * whole + _half_sums(hung, at, H)
        x = tl.where(second, x * whole, x)
        y_behind = tl.where(second, y_behind, y_behind * whole)
        meet, turned = _meet(at[None, :], at[:, None], H), _meet(at[:, None], at[None, :], H)
        keys, queries = (k * factor).to(dtype), (q * factor).to(dtype)
        found = tl.dot(tl.load(d_reads + back, mask=turned, other=0.0), keys, input_precision=PRECISION)
        dq += found * factor
        x += found * q
        found = tl.dot(tl.load(d_reads + scores, mask=meet, other=0.0), queries, input_precision=PRECISION)
        if DELTA:
            shares = tl.load(d_residuals + scores, mask=meet, other=0.0)
            found = tl.dot(shares, (e * seen).to(dtype), found, input_precision=PRECISION)
        dk += found * factor
        y_behind += found * k
        if DELTA:
            found = tl.dot(tl.load(d_residuals + back, mask=turned, other=0.0), keys, input_precision=PRECISION)
            de += found * seen
            if BEFORE:
                x += found * e
            else:
                x_before += found * e

    return dq, dk, de, x, x_before, y_behind, through


@triton.jit
def _mild_gradients(
    dq, dk, de, x, x_before, y_behind, through, q, k, e, own, d_reads, d_residuals, scores, back, at,
    dtype: tl.constexpr, BEFORE: tl.constexpr, DELTA: tl.constexpr, GATHER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of a chunk whose gates are all mild: gradients with what pairs add to them, and those of gates."""
    wide: tl.constexpr = tl.float32 if dtype == tl.float16 else dtype
    mine, other = at[:, None], at[None, :]
    sums = tl.cumsum(own, 0)
    for level in tl.static_range(0, 2):
        dq, dk, de, x, x_before, y_behind, through = _mild_gradients_between(
            dq, dk, de, x, x_before, y_behind, through, q, k, e, own, sums, d_reads, d_residuals, scores,
            back, at, dtype, 32 >> level, BEFORE, DELTA, GATHER, PRECISION,
        )  # fmt: skip

    # stretches of 16: what hangs on products from their first row on, or up to their last
    middle = sums - _rows(sums, at, 16, 0, GATHER)
    first = sums - own
    ahead = tl.exp2(sums - _rows(first, at, 16, 0, GATHER))
    behind = tl.exp2(_rows(sums, at, 16, 15, GATHER) - sums)
    up, down, seen = tl.exp2(middle), tl.exp2(-middle), tl.exp2(middle - own)
    meet = (mine // 16 == other // 16) & (mine < other)
    turned = (mine // 16 == other // 16) & (mine > other)
    # from numbers as they enter products, so that pairs on one side of a gate cancel
    keys, queries = (k * down).to(wide), (q * up).to(wide)
    found = tl.dot(tl.load(d_reads + back, mask=turned, other=0.0).to(wide), keys, input_precision=PRECISION)
    dq += found * up
    late = x * ahead + found * queries.to(tl.float32)
    found = tl.dot(tl.load(d_reads + scores, mask=meet, other=0.0).to(wide), queries, input_precision=PRECISION)
    later = tl.zeros_like(late)
    if DELTA:
        erased = (e * (up if BEFORE else seen)).to(wide)
        shares = tl.load(d_residuals + scores, mask=meet, other=0.0).to(wide)
        found = tl.dot(shares, erased, found, input_precision=PRECISION)
    dk += found * down
    late -= found * keys.to(tl.float32)
    if DELTA:
        found = tl.dot(tl.load(d_residuals + back, mask=turned, other=0.0).to(wide), keys, input_precision=PRECISION)
        if BEFORE:
            de += found * up
            late += found * erased.to(tl.float32)
        else:
            de += found * seen
            later = x_before * ahead * tl.exp2(-own) + found * erased.to(tl.float32)
    # sums over a stretch's rows from each gate on, and of those before it
    early = y_behind * behind - late - later
    summed = tl.cumsum(early, 0) - early
    total = _own_sums(late + later, at) - _rows(summed, at, 16, 0, GATHER)
    d_gates = through * tl.exp2(_own_sums(own, at)) + total + summed - later
    return dq, dk, de, d_gates * tl.exp2(-own)


@triton.jit
def _own_sums(x, at):
    """Sums over the rows of each stretch of 16, at each row."""
    rows: tl.constexpr = x.shape[0]
    found = tl.zeros_like(x)
    for stretch in tl.static_range(0, rows // 16):
        its = (at // 16 == stretch)[:, None]
        found = tl.where(its, tl.sum(tl.where(its, x, 0.0), 0)[None, :], found)
    return found


@triton.jit(do_not_specialize=["tokens", "each", "plane"])
def _channel_gradients_kernel(
    d_out, q, k, e, weights, gates, marks, steep, states, d_states, written, d_right, d_reads, d_residuals, given, d_gates,
    d_q, d_k, d_e, table, tokens, each, plane, heads,
    d_row, d_token, d_head, q_row, q_token, q_head, k_row, k_token, k_head, e_row, e_token, e_head,
    DK: tl.constexpr, DV: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BEFORE: tl.constexpr,
    DELTA: tl.constexpr, RATES: tl.constexpr, PRECISION: tl.constexpr, STEEP: tl.constexpr, GATHER: tl.constexpr,
):  # fmt: skip
    """Gradients of queries, keys and gates of one chunk, head and block of key channels, and what it gives to rates."""
    NK: tl.constexpr = (DK + BK - 1) // BK
    program = tl.program_id(0)
    up = (program % NK) * BK
    head = ((program // NK) % heads).to(tl.int64)
    index = program // (NK * heads)
    row, sequence, start, stop, _ends_here = segment(index, table, tokens, C, each, False)
    if sequence < 0:
        return
    token = start.to(tl.int64)
    place = index.to(tl.int64) * heads + head
    if (tl.load(steep + place) > 0) != STEEP:
        return
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
    dtype: tl.constexpr = q.dtype.element_ty
    inner, columns = tl.arange(0, BK), tl.arange(0, BV)
    mine, other = at[:, None], at[None, :]

    wrong = marked_rows(marks, places, rows)
    base = ((row * tokens + token) * heads + head) * DK + up
    where = mine * (heads * DK) + inner[None, :]
    inside = (up + inner < DK)[None, :]
    live = rows[:, None] & inside
    own, _least = _logarithms(gates + base, where, live)
    own = _open(own)
    x_q = finite(read_rows(q + up, mine * q_token + inner[None, :], rows, up + inner, DK, BK)).to(tl.float32)
    x_k = without(read_rows(k + up, mine * k_token + inner[None, :], rows, up + inner, DK, BK), wrong).to(tl.float32)
    x_e = x_k
    if e is not None:
        x_e = read_rows(e + up, mine * e_token + inner[None, :], rows, up + inner, DK, BK)
        x_e = without(x_e, wrong).to(tl.float32)

    # the whole chunk: queries and keys as they meet states
    dq = tl.zeros((C, BK), tl.float32)
    dk = tl.zeros((C, BK), tl.float32)
    de = tl.zeros((C, BK), tl.float32)
    anchor = tl.zeros((BK,), tl.float32)
    for block in range(0, DV, BV):
        within = (block + columns < DV)[None, :]
        its = (block + columns)[:, None] * DK + (up + inner)[None, :]
        there = (block + columns < DV)[:, None] & (up + inner < DK)[None, :]
        state = tl.load(states + its, mask=there, other=0.0)
        d_state = tl.load(d_states + its, mask=there, other=0.0)
        g = read_rows(d_out + block, mine * d_token + columns[None, :], rows, block + columns, DV, BV)
        x = tl.load(written + mine * DV + (block + columns)[None, :], mask=within, other=0.0)
        dq = tl.dot(g, state, dq, input_precision=PRECISION)
        dk = tl.dot(x, d_state, dk, input_precision=PRECISION)
        if DELTA:
            x = tl.load(d_right + mine * DV + (block + columns)[None, :], mask=within, other=0.0)
            de = tl.dot(x, state, de, input_precision=PRECISION)
        anchor += tl.sum(state.to(tl.float32) * d_state.to(tl.float32), 0)
    scores, back = place * (C * C) + mine * C + other, place * (C * C) + other * C + mine
    through = anchor[None, :] + tl.zeros((C, BK), tl.float32)
    if not STEEP:
        sums = tl.cumsum(own, 0)
        reach, behind = tl.exp2(sums), tl.exp2(tl.sum(own, 0)[None, :] - sums)
        seen = reach
        if not BEFORE:
            seen = tl.exp2(sums - own)
    else:
        earlier = own
        behind_rows = ((at + 1 < stop - token) & (at + 1 < C))[:, None] & inside
        later, _least = _logarithms(gates + base, where + heads * DK, behind_rows)
        later = _open(later)
        if not BEFORE:
            earlier, _least = _logarithms(gates + base, where - heads * DK, ((at > 0) & rows)[:, None] & inside)
            earlier = _open(earlier)
        reach, seen, behind = _factors(own, earlier, later, at, C, BEFORE)
    x, y_behind, x_before = dq * x_q, dk * x_k, tl.zeros((C, BK), tl.float32)
    dq *= reach
    dk *= behind
    if DELTA:
        if RATES:
            tl.store(given + (2 + 3 * (program % NK)) * plane.to(tl.int64) + place * C + at, tl.sum(de * seen * x_e, 1))
        de *= -tl.load(weights + place * C + mine)
        if BEFORE:
            x += de * x_e
        else:
            x_before = de * x_e
        de *= seen
    if not STEEP:
        dq, dk, de, x = _mild_gradients(
            dq, dk, de, x, x_before, y_behind, through, x_q, x_k, x_e, own, d_reads, d_residuals, scores, back, at,
            dtype, BEFORE, DELTA, GATHER, PRECISION,
        )  # fmt: skip
    else:
        shares, turned = tl.load(d_reads + scores), tl.load(d_reads + back)
        taken, turned_taken = shares, turned
        if DELTA:
            taken, turned_taken = tl.load(d_residuals + scores), tl.load(d_residuals + back)
        for level in tl.static_range(0, 6):
            dq, dk, de, x, x_before, y_behind, through = _gradients_between(
                dq, dk, de, x, x_before, y_behind, through, x_q, x_k, x_e, own, earlier, later, shares, taken, turned,
                turned_taken, at, dtype, (C // 2) >> level, BEFORE, DELTA, PRECISION,
            )  # fmt: skip
        x += through
    # each query with its own token's key, between which there is no gate
    alone = tl.load(d_reads + place * (C * C) + at * (C + 1)).to(tl.float32)[:, None]
    dq += alone * x_k
    dk += alone * x_q
    if DELTA:
        if e is None:
            dk += de
        else:
            tl.store(d_e + base + where, de.to(dtype), mask=live)
    tl.store(d_q + base + where, dq.to(dtype), mask=live)
    tl.store(d_k + base + where, dk.to(dtype), mask=live)
    tl.store(d_gates + base + where, x, mask=live)


scale = Launcher(_scale_kernel)
channel_gradients = Launcher(_channel_gradients_kernel)
