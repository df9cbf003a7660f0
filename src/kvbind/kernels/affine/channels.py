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

from kvbind.kernels.affine.tiles import marked_rows, rates_of
from kvbind.kernels.causal.segments import SHUT, finite, read_rows, rows_wrong, segment, without
from kvbind.kernels.launching.launcher import Launcher


@triton.jit
def _logarithms(gates, places, live):
    """Logarithms (base 2) of gates, 0 where there are none."""
    gate = tl.load(gates + places, mask=live, other=1.0)
    # a little above float32's least normal number, which is a number of float64 and would make such of all
    open_ = (gate >= 1.1754944e-38) & (gate < float("inf"))
    return tl.where(open_, tl.log2(tl.where(open_, gate, 1.0)), SHUT)


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
    q, k, e, rates, gates, scaled_q, scaled_k, scaled_e, reads, residuals, keeps, marks, table, tokens, each, heads,
    q_row, q_token, q_head, k_row, k_token, k_head, e_row, e_token, e_head,
    DK: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BEFORE: tl.constexpr, DELTA: tl.constexpr,
    PRECISION: tl.constexpr,
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

    _rate, wrong = rates_of(rates, places, rows)
    for block in range(0, DK, BK):
        y = read_rows(k + block, mine * k_token + inner[None, :], rows, block + inner, DK, BK)
        wrong = tl.maximum(wrong, rows_wrong(y))
        if e is not None:
            z = read_rows(e + block, mine * e_token + inner[None, :], rows, block + inner, DK, BK)
            wrong = tl.maximum(wrong, rows_wrong(z))
        live = rows[:, None] & (block + inner < DK)[None, :]
        wrong = tl.maximum(wrong, rows_wrong(tl.load(gates + base + block + gate_places, mask=live, other=1.0)))
    tl.store(marks + places, wrong.to(tl.int8), mask=rows)
    spoilt = tl.max(wrong, 0)

    scores = tl.zeros((C, C), tl.float32)
    erased = tl.zeros((C, C), tl.float32)
    for block in range(0, DK, BK):
        inside = (block + inner < DK)[None, :]
        logs = gates + base + block
        own = _logarithms(logs, gate_places, rows[:, None] & inside)
        later = _logarithms(logs, gate_places + heads * DK, ((at + 1 < stop - token) & (at + 1 < C))[:, None] & inside)
        earlier = own
        if not BEFORE:
            earlier = _logarithms(logs, gate_places - heads * DK, ((at > 0) & rows)[:, None] & inside)
        x = finite(read_rows(q + block, mine * q_token + inner[None, :], rows, block + inner, DK, BK)).to(tl.float32)
        y = read_rows(k + block, mine * k_token + inner[None, :], rows, block + inner, DK, BK)
        y = without(y, wrong).to(tl.float32)
        z = y
        if e is not None:
            z = read_rows(e + block, mine * e_token + inner[None, :], rows, block + inner, DK, BK)
            z = without(z, wrong).to(tl.float32)
        scores += tl.where(mine == other, tl.sum(x * y, 1)[:, None], 0.0)
        for level in tl.static_range(0, 6):
            scores, erased = _scores_between(
                scores, erased, x, y, z, own, earlier, later, at, dtype, (C // 2) >> level, BEFORE, DELTA, PRECISION
            )
        reach, seen, behind = _factors(own, earlier, later, at, C, BEFORE)
        where, stored = base + block + gate_places, rows[:, None] & inside
        # queries keep what is not finite, as it is theirs alone
        x = read_rows(q + block, mine * q_token + inner[None, :], rows, block + inner, DK, BK).to(tl.float32)
        tl.store(scaled_q + where, (x * reach).to(dtype), mask=stored)
        tl.store(scaled_k + where, (y * behind).to(dtype), mask=stored)
        if DELTA:
            tl.store(scaled_e + where, (z * seen).to(dtype), mask=stored)
        keep = tl.exp2(tl.sum(own, 0))
        tl.store(keeps + place * DK + block + inner, tl.where(spoilt > 0, float("nan"), keep), mask=block + inner < DK)
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


@triton.jit(do_not_specialize=["tokens", "each"])
def _channel_gradients_kernel(
    q, k, e, gates, keeps, marks, states, d_states, d_reads, d_residuals, d_q, d_k, d_e, d_gates, out_q, out_k, out_e,
    table, tokens, each, heads,
    q_row, q_token, q_head, k_row, k_token, k_head, e_row, e_token, e_head,
    DK: tl.constexpr, DV: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BEFORE: tl.constexpr,
    DELTA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of queries, keys and gates, of one chunk, head and block of key channels, from those of what was scaled."""
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
    q += row * q_row + head * q_head + token * q_token + up
    k += row * k_row + head * k_head + token * k_token + up
    if e is not None:
        e += row * e_row + head * e_head + token * e_token + up
    base = ((row * tokens + token) * heads + head) * DK + up
    dtype: tl.constexpr = q.dtype.element_ty
    inner, columns = tl.arange(0, BK), tl.arange(0, BV)
    mine, other = at[:, None], at[None, :]
    where = mine * (heads * DK) + inner[None, :]
    inside = (up + inner < DK)[None, :]
    live = rows[:, None] & inside

    wrong = marked_rows(marks, ((row * tokens + token) + at) * heads + head, rows)
    own = _logarithms(gates + base, where, live)
    later = _logarithms(gates + base, where + heads * DK, ((at + 1 < stop - token) & (at + 1 < C))[:, None] & inside)
    earlier = own
    if not BEFORE:
        earlier = _logarithms(gates + base, where - heads * DK, ((at > 0) & rows)[:, None] & inside)
    x_q = finite(read_rows(q, mine * q_token + inner[None, :], rows, up + inner, DK, BK)).to(tl.float32)
    x_k = without(read_rows(k, mine * k_token + inner[None, :], rows, up + inner, DK, BK), wrong).to(tl.float32)
    x_e = x_k
    if e is not None:
        x_e = without(read_rows(e, mine * e_token + inner[None, :], rows, up + inner, DK, BK), wrong).to(tl.float32)

    # the whole chunk: queries and keys as they meet states
    reach, seen, behind = _factors(own, earlier, later, at, C, BEFORE)
    dq = tl.load(d_q + base + where, mask=live, other=0.0).to(tl.float32)
    dk = tl.load(d_k + base + where, mask=live, other=0.0).to(tl.float32)
    x, y_behind, x_before, de = dq * x_q, dk * x_k, tl.zeros((C, BK), tl.float32), tl.zeros((C, BK), tl.float32)
    dq *= reach
    dk *= behind
    if DELTA:
        de = tl.load(d_e + base + where, mask=live, other=0.0).to(tl.float32)
        if BEFORE:
            x += de * x_e
        else:
            x_before = de * x_e
        de *= seen
    anchor = tl.zeros((BK,), tl.float32)
    states += place * (DK * DV)
    d_states += place * (DK * DV)
    for block in range(0, DV, BV):
        its = (up + inner)[:, None] * DV + (block + columns)[None, :]
        there = (up + inner < DK)[:, None] & (block + columns < DV)[None, :]
        state = tl.load(states + its, mask=there, other=0.0).to(tl.float32)
        anchor += tl.sum(state * tl.load(d_states + its, mask=there, other=0.0).to(tl.float32), 1)
    through = anchor[None, :] + tl.zeros((C, BK), tl.float32)

    scores = place * (C * C) + mine * C + other
    back = place * (C * C) + other * C + mine
    shares, turned = tl.load(d_reads + scores), tl.load(d_reads + back)
    taken, turned_taken = shares, turned
    if DELTA:
        taken, turned_taken = tl.load(d_residuals + scores), tl.load(d_residuals + back)
    for level in tl.static_range(0, 6):
        dq, dk, de, x, x_before, y_behind, through = _gradients_between(
            dq, dk, de, x, x_before, y_behind, through, x_q, x_k, x_e, own, earlier, later, shares, taken, turned,
            turned_taken, at, dtype, (C // 2) >> level, BEFORE, DELTA, PRECISION,
        )  # fmt: skip
    # each query with its own token's key, between which there is no gate
    alone = tl.sum(tl.where(mine == other, shares.to(tl.float32), 0.0), 1)[:, None]
    dq += alone * x_k
    dk += alone * x_q
    if DELTA:
        if e is None:
            dk += de
        else:
            tl.store(out_e + base + where, de.to(dtype), mask=live)
    tl.store(out_q + base + where, dq.to(dtype), mask=live)
    tl.store(out_k + base + where, dk.to(dtype), mask=live)
    if d_gates is not None:
        tl.store(d_gates + base + where, through + x, mask=live)


scale = Launcher(_scale_kernel)
channel_gradients = Launcher(_channel_gradients_kernel)
