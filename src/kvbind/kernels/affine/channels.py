"""Gates per key channel: what they make of queries and keys, and the way back.

A score of a read t and a write j is `sum_f q_tf k_jf exp(B_tf - B_jf)`, where B are the logarithms of gates summed from the
chunk's start on. B is stored once, so that all kernels read it at the boundaries that they need. Scores of 16 reads are
products of reads scaled by `exp(B_t - B_s)` and writes scaled by `exp(B_s - B_j)`, s being the first of the 16: at most 1
but for the writes among the 16 themselves, which are divided by products of gates. Where a gate of a chunk is too small for
that, the chunk is *steep* and goes the longer way of `kvbind.kernels.affine.halves`, in launches that do nothing elsewhere.

With the scores and with queries and keys scaled to the chunk's own ends, the other kernels need know nothing of channels.

The gradient of the logarithm of a gate is the sum over reads from it on of what they give to their B, less that over writes
from it on: pairs that lie behind the gate are in both sums, as products of the same rounded numbers, and cancel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvbind.kernels.affine.halves import factors, gradients_between, meets, scores_between
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


@triton.jit(do_not_specialize=["tokens", "each"])
def _scale_kernel(
    q, k, e, gates, sums, scaled_q, scaled_k, scaled_e, keeps, reaches, marks, steep, table, tokens, each, heads,
    q_row, q_token, q_head, k_row, k_token, k_head, e_row, e_token, e_head,
    DK: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BEFORE: tl.constexpr, DELTA: tl.constexpr, MILD: tl.constexpr,
):  # fmt: skip
    """Summed logarithms of one chunk and head, and queries and keys scaled to its ends."""
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
    if e is not None:
        e += row * e_row + head * e_head + token * e_token
    base = ((row * tokens + token) * heads + head) * DK
    dtype: tl.constexpr = q.dtype.element_ty
    inner, mine = tl.arange(0, BK), at[:, None]

    wrong = marked_rows(marks, places, rows)
    unread = tl.zeros((C,), tl.int32)
    steepest = 0.0
    for block in range(0, DK, BK):
        where, live = base + block + mine * (heads * DK) + inner[None, :], rows[:, None] & (block + inner < DK)[None, :]
        own, least = _logarithms(gates, where, live)
        steepest = tl.minimum(steepest, least)
        x = read_rows(q + block, mine * q_token + inner[None, :], rows, block + inner, DK, BK).to(tl.float32)
        y = read_rows(k + block, mine * k_token + inner[None, :], rows, block + inner, DK, BK).to(tl.float32)
        good = (tl.abs(y) < float("inf")) & (own < float("inf"))
        z = y
        if e is not None:
            z = read_rows(e + block, mine * e_token + inner[None, :], rows, block + inner, DK, BK).to(tl.float32)
            good = good & (tl.abs(z) < float("inf"))
        wrong = tl.maximum(wrong, tl.max(tl.where(good, 0, 1), 1))
        unread = tl.maximum(unread, rows_wrong(x))
        own = _open(own)
        summed = tl.cumsum(own, 0)
        total = tl.sum(own, 0)[None, :]
        tl.store(sums + where, summed, mask=live)
        reach = tl.exp2(summed)
        # queries keep what is not finite, as it is theirs alone
        tl.store(scaled_q + where, (x * reach).to(dtype), mask=live)
        tl.store(scaled_k + where, (finite(y) * tl.exp2(total - summed)).to(dtype), mask=live)
        if DELTA:
            seen = reach if BEFORE else tl.exp2(summed - own)
            tl.store(scaled_e + where, (finite(z) * seen).to(dtype), mask=live)
        tl.store(keeps + place * DK + (block + inner)[None, :], tl.exp2(total), mask=(block + inner < DK)[None, :])
    tl.store(marks + places, wrong.to(tl.int8), mask=rows)
    tl.store(reaches + place * C + at, float("nan"), mask=unread > 0)
    tl.store(steep + place, (steepest < MILD).to(tl.int8))


@triton.jit(do_not_specialize=["tokens", "each"])
def _scores_kernel(
    q, k, e, sums, reads, residuals, table, tokens, each, heads,
    q_row, q_token, q_head, k_row, k_token, k_head, e_row, e_token, e_head,
    DK: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BEFORE: tl.constexpr, DELTA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of 16 reads of one chunk and head with all writes before them, where all gates are mild.

    Reads are scaled by the product of gates from the first of the 16 on, writes by that of gates up to there; those behind
    it are divided by it, which float16 is too narrow for.
    """
    N: tl.constexpr = C // 16
    program = tl.program_id(0)
    first = (program % N) * 16
    head = ((program // N) % heads).to(tl.int64)
    index = program // (N * heads)
    row, sequence, start, stop, _ends = segment(index, table, tokens, C, each, False)
    if sequence < 0:
        return
    token = start.to(tl.int64)
    place = index.to(tl.int64) * heads + head
    at, own = tl.arange(0, C), first + tl.arange(0, 16)
    # writes behind all of the reads count as none
    rows, mine = (at < stop - token) & (at < first + 16), own < stop - token
    q += row * q_row + head * q_head + token * q_token
    k += row * k_row + head * k_head + token * k_token
    if e is not None:
        e += row * e_row + head * e_head + token * e_token
    sums += ((row * tokens + token) * heads + head) * DK
    dtype: tl.constexpr = q.dtype.element_ty
    wide: tl.constexpr = tl.float32 if dtype == tl.float16 else dtype
    inner = tl.arange(0, BK)

    scores = tl.zeros((16, C), tl.float32)
    erased = tl.zeros((16, C), tl.float32)
    for block in range(0, DK, BK):
        inside = (block + inner < DK)[None, :]
        its = sums + block + inner[None, :]
        edge = tl.load(its + first * (heads * DK), mask=inside & (first < stop - token), other=0.0)
        y = finite(read_rows(k + block, at[:, None] * k_token + inner[None, :], rows, block + inner, DK, BK))
        behind = edge - tl.load(its + at[:, None] * (heads * DK), mask=rows[:, None] & inside, other=0.0)
        keys = tl.trans((y.to(tl.float32) * tl.exp2(tl.where(rows[:, None], behind, 0.0))).to(wide))
        reach = tl.load(its + own[:, None] * (heads * DK), mask=mine[:, None] & inside, other=0.0) - edge
        reach = tl.where(mine[:, None], reach, 0.0)
        x = finite(read_rows(q + block, own[:, None] * q_token + inner[None, :], mine, block + inner, DK, BK))
        scores = tl.dot((x.to(tl.float32) * tl.exp2(reach)).to(wide), keys, scores, input_precision=PRECISION)
        if DELTA:
            if e is not None:
                z = finite(read_rows(e + block, own[:, None] * e_token + inner[None, :], mine, block + inner, DK, BK))
            else:
                z = finite(read_rows(k + block, own[:, None] * k_token + inner[None, :], mine, block + inner, DK, BK))
            if not BEFORE:
                there = (mine & (own > 0))[:, None] & inside
                reach = tl.load(its + (own - 1)[:, None] * (heads * DK), mask=there, other=0.0) - edge
                reach = tl.where(mine[:, None], reach, 0.0)
            erased = tl.dot((z.to(tl.float32) * tl.exp2(reach)).to(wide), keys, erased, input_precision=PRECISION)
    where = place * (C * C) + own[:, None] * C + at[None, :]
    tl.store(reads + where, tl.where(own[:, None] >= at[None, :], scores, 0.0).to(dtype))
    if DELTA:
        tl.store(residuals + where, tl.where(own[:, None] > at[None, :], erased, 0.0))


@triton.jit(do_not_specialize=["tokens", "each"])
def _steep_kernel(
    q, k, e, gates, scaled_q, scaled_k, scaled_e, reads, residuals, steep, table, tokens, each, heads,
    q_row, q_token, q_head, k_row, k_token, k_head, e_row, e_token, e_head,
    DK: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BEFORE: tl.constexpr, DELTA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores and scaled queries and keys of one chunk and head in which a gate is too small to divide by."""
    program = tl.program_id(0)
    head = (program % heads).to(tl.int64)
    index = program // heads
    row, sequence, start, stop, _ends = segment(index, table, tokens, C, each, False)
    if sequence < 0:
        return
    token = start.to(tl.int64)
    place = index.to(tl.int64) * heads + head
    if tl.load(steep + place) == 0:
        return
    at = tl.arange(0, C)
    rows = at < stop - token
    q += row * q_row + head * q_head + token * q_token
    k += row * k_row + head * k_head + token * k_token
    if e is not None:
        e += row * e_row + head * e_head + token * e_token
    base = ((row * tokens + token) * heads + head) * DK
    dtype: tl.constexpr = q.dtype.element_ty
    inner = tl.arange(0, BK)
    mine, other = at[:, None], at[None, :]
    gate_places = mine * (heads * DK) + inner[None, :]

    scores = tl.zeros((C, C), tl.float32)
    erased = tl.zeros((C, C), tl.float32)
    for block in range(0, DK, BK):
        inside = (block + inner < DK)[None, :]
        logs, stored = gates + base + block, rows[:, None] & inside
        own, _least = _logarithms(logs, gate_places, stored)
        x = read_rows(q + block, mine * q_token + inner[None, :], rows, block + inner, DK, BK).to(tl.float32)
        y = read_rows(k + block, mine * k_token + inner[None, :], rows, block + inner, DK, BK).to(tl.float32)
        own, y = _open(own), finite(y)
        z = y
        if e is not None:
            z = read_rows(e + block, mine * e_token + inner[None, :], rows, block + inner, DK, BK).to(tl.float32)
            z = finite(z)
        real = finite(x)
        scores += tl.where(mine == other, tl.sum(real * y, 1)[:, None], 0.0)
        behind_rows = ((at + 1 < stop - token) & (at + 1 < C))[:, None] & inside
        later, _least = _logarithms(logs, gate_places + heads * DK, behind_rows)
        later = _open(later)
        earlier = own
        if not BEFORE:
            earlier, _least = _logarithms(logs, gate_places - heads * DK, ((at > 0) & rows)[:, None] & inside)
            earlier = _open(earlier)
        for level in tl.static_range(0, 6):
            scores, erased = scores_between(
                scores, erased, real, y, z, own, earlier, later, at, dtype, (C // 2) >> level, BEFORE, DELTA, PRECISION
            )
        reach, seen, behind = factors(own, earlier, later, at, C, BEFORE)
        where = base + block + gate_places
        # queries keep what is not finite, as it is theirs alone
        tl.store(scaled_q + where, (x * reach).to(dtype), mask=stored)
        tl.store(scaled_k + where, (y * behind).to(dtype), mask=stored)
        if DELTA:
            tl.store(scaled_e + where, (z * seen).to(dtype), mask=stored)
    tl.store(reads + place * (C * C) + mine * C + other, scores.to(dtype))
    if DELTA:
        tl.store(residuals + place * (C * C) + mine * C + other, erased)


@triton.jit
def _mild_pairs(
    dq, dk, de, late, later, q, k, e, up, seen, down, meet, turned, d_reads, d_residuals, scores, back, dtype: tl.constexpr,
    BEFORE: tl.constexpr, DELTA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of queries and keys with what some pairs add, and what these give to logarithms of gates.

    Reads are scaled by `up`, or `seen` where residuals read, writes by `down`. Each gate is given `late` of the reads from
    it on, `later` of those behind it. Both are made from numbers as they enter products, so that pairs which do not cross a
    gate, being in both, cancel.
    """
    keys, queries = (k * down).to(dtype), (q * up).to(dtype)
    found = tl.dot(tl.load(d_reads + back, mask=turned, other=0.0).to(dtype), keys, input_precision=PRECISION)
    dq += found * up
    late += found * queries.to(tl.float32)
    found = tl.dot(tl.load(d_reads + scores, mask=meet, other=0.0).to(dtype), queries, input_precision=PRECISION)
    if DELTA:
        erased = (e * seen).to(dtype)
        shares = tl.load(d_residuals + scores, mask=meet, other=0.0).to(dtype)
        found = tl.dot(shares, erased, found, input_precision=PRECISION)
    dk += found * down
    late -= found * keys.to(tl.float32)
    if DELTA:
        shares = tl.load(d_residuals + back, mask=turned, other=0.0).to(dtype)
        found = tl.dot(shares, keys, input_precision=PRECISION)
        de += found * seen
        if BEFORE:
            late += found * erased.to(tl.float32)
        else:
            later += found * erased.to(tl.float32)
    return dq, dk, de, late, later


@triton.jit
def _mild_between(
    dq, dk, de, late, later, q, k, e, sums, summed, before, at, last, stride, live, d_reads, d_residuals, scores, back,
    dtype: tl.constexpr, H: tl.constexpr, BEFORE: tl.constexpr, DELTA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What pairs give that meet in stretches of 2 H, at the boundary between their halves."""
    rows: tl.constexpr = dq.shape[0]
    if rows > H:
        boundary = tl.minimum(at // (2 * H) * (2 * H) + (H - 1), last)
        edge = tl.load(sums + boundary[:, None] * stride, mask=live, other=0.0)
        second = (at // H % 2 == 1)[:, None]
        up = tl.exp2(tl.where(second, summed - edge, edge - summed))
        seen = up
        if not BEFORE:
            seen = tl.exp2(tl.where(second, before - edge, 0.0))
        dq, dk, de, late, later = _mild_pairs(
            dq, dk, de, late, later, q, k, e, up, seen, up, meets(at[None, :], at[:, None], H),
            meets(at[:, None], at[None, :], H), d_reads, d_residuals, scores, back, dtype, BEFORE, DELTA, PRECISION,
        )  # fmt: skip
    return dq, dk, de, late, later


@triton.jit(do_not_specialize=["tokens", "each", "plane"])
def _channel_gradients_kernel(
    d_out, q, k, e, weights, gates, sums, marks, steep, states, d_states, written, d_right, d_reads, d_residuals, given,
    d_gates, d_q, d_k, d_e, table, tokens, each, plane, heads,
    d_row, d_token, d_head, q_row, q_token, q_head, k_row, k_token, k_head, e_row, e_token, e_head,
    DK: tl.constexpr, DV: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BEFORE: tl.constexpr,
    DELTA: tl.constexpr, RATES: tl.constexpr, PRECISION: tl.constexpr, STEEP: tl.constexpr,
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
    if STEEP:
        earlier = own
        behind_rows = ((at + 1 < stop - token) & (at + 1 < C))[:, None] & inside
        later, _least = _logarithms(gates + base, where + heads * DK, behind_rows)
        later = _open(later)
        if not BEFORE:
            earlier, _least = _logarithms(gates + base, where - heads * DK, ((at > 0) & rows)[:, None] & inside)
            earlier = _open(earlier)
        reach, seen, behind = factors(own, earlier, later, at, C, BEFORE)
    else:
        sums += base + inner[None, :]
        stride = heads * DK
        summed = tl.load(sums + mine * stride, mask=live, other=0.0)
        before = tl.load(sums + (mine - 1) * stride, mask=live & (mine > 0), other=0.0)
        last = (tl.minimum(stop - token, C) - 1).to(tl.int32)
        whole = tl.load(sums + last * stride, mask=inside, other=0.0)
        reach, behind = tl.exp2(summed), tl.exp2(whole - summed)
        seen = reach if BEFORE else tl.exp2(before)
    if DELTA and RATES:
        tl.store(given + (2 + 3 * (program % NK)) * plane.to(tl.int64) + place * C + at, tl.sum(de * seen * x_e, 1))
    if STEEP:
        through = anchor[None, :] + tl.zeros((C, BK), tl.float32)
        x, y_behind, x_before = dq * x_q, dk * x_k, tl.zeros((C, BK), tl.float32)
        dq *= reach
        dk *= behind
        if DELTA:
            de *= -tl.load(weights + place * C + mine)
            if BEFORE:
                x += de * x_e
            else:
                x_before = de * x_e
            de *= seen
        shares, turned = tl.load(d_reads + scores), tl.load(d_reads + back)
        taken, turned_taken = shares, turned
        if DELTA:
            taken, turned_taken = tl.load(d_residuals + scores), tl.load(d_residuals + back)
        for level in tl.static_range(0, 6):
            dq, dk, de, x, x_before, y_behind, through = gradients_between(
                dq, dk, de, x, x_before, y_behind, through, x_q, x_k, x_e, own, earlier, later, shares, taken, turned,
                turned_taken, at, dtype, (C // 2) >> level, BEFORE, DELTA, PRECISION,
            )  # fmt: skip
        x += through
    else:
        wide: tl.constexpr = tl.float32 if dtype == tl.float16 else dtype
        dq *= reach
        dk *= behind
        late, early, later = dq * x_q, dk * x_k, tl.zeros((C, BK), tl.float32)
        if DELTA:
            de *= seen * -tl.load(weights + place * C + mine)
            if BEFORE:
                late += de * x_e
            else:
                later += de * x_e
        for level in tl.static_range(0, 2):
            dq, dk, de, late, later = _mild_between(
                dq, dk, de, late, later, x_q, x_k, x_e, sums, summed, before, at, last, stride, live, d_reads, d_residuals,
                scores, back, dtype, 32 >> level, BEFORE, DELTA, PRECISION,
            )  # fmt: skip
        # in stretches of 16 writes are divided by products of gates, which float16 is too narrow for
        edge = tl.load(sums + (at // 16 * 16)[:, None] * stride, mask=live, other=0.0)
        near = mine // 16 == other // 16
        up, down = tl.exp2(summed - edge), tl.exp2(edge - summed)
        dq, dk, de, late, later = _mild_pairs(
            dq, dk, de, late, later, x_q, x_k, x_e, up, up if BEFORE else tl.exp2(before - edge), down,
            near & (mine < other), near & (mine > other), d_reads, d_residuals, scores, back, wide, BEFORE, DELTA, PRECISION,
        )  # fmt: skip
        early -= late + later
        x = anchor[None, :] * tl.exp2(whole) + tl.sum(late + later, 0)[None, :] + tl.cumsum(early, 0) - early - later
        x *= tl.exp2(-own)
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
scores = Launcher(_scores_kernel)
steep_scores = Launcher(_steep_kernel)
channel_gradients = Launcher(_channel_gradients_kernel)
