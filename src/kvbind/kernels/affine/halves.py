"""Scores and gradients of a chunk with gates per key channel that are too small to divide by.

A chunk is halved, its halves are halved, and so on (as in `kvbind.forms.parallel.channels`): the reads of every second half
meet the writes of the first at the boundary between them, reads scaled by the product of gates from there on, writes by that
of the gates up to it. All factors are products over stretches that begin or end at a boundary, and sums of logarithms are
never subtracted.

The gradient of a gate goes the other way, from the chunk to its halves. What hangs on a stretch is a sum of three kinds of
terms: `z` times the product of all its gates, `x_t` times that up to token t, `y_j` times that behind token j. For its
first half, z is the second's product times its own, and the second's x, each with its product, are added; and likewise for
the second. At single tokens, what is left of z and x is the gradient. Nothing is divided by a gate.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
def factors(own, earlier, later, at, H: tl.constexpr, BEFORE: tl.constexpr):
    """Of stretches of H: products of gates up to each row; those that a residual sees; those behind each row."""
    reach = tl.exp2(_up_to(own, H))
    seen = reach
    if not BEFORE:
        seen = tl.exp2(_up_to(tl.where((at % H == 0)[:, None], 0.0, earlier), H))
    return reach, seen, tl.exp2(_from(tl.where((at % H == H - 1)[:, None], 0.0, later), H))


@triton.jit
def meets(mine, other, H: tl.constexpr):
    """Whether a row is in the second half of a stretch of 2 H and a column in its first."""
    return (mine // (2 * H) == other // (2 * H)) & (mine // H > other // H)


@triton.jit
def scores_between(scores, erased, x, y, z, own, earlier, later, at, dtype: tl.constexpr, H: tl.constexpr,
                    BEFORE: tl.constexpr, DELTA: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Scores of reads in second halves of stretches of 2 H with writes in first ones, added."""
    if H > 0:
        reach, seen, behind = factors(own, earlier, later, at, H, BEFORE)
        meet = meets(at[:, None], at[None, :], H)
        keys = tl.trans((y * behind).to(dtype))
        scores += tl.where(meet, tl.dot((x * reach).to(dtype), keys, input_precision=PRECISION), 0.0)
        if DELTA:
            erased += tl.where(meet, tl.dot((z * seen).to(dtype), keys, input_precision=PRECISION), 0.0)
    return scores, erased


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
def gradients_between(
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
        reach, seen, behind = factors(own, earlier, later, at, H, BEFORE)
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
        meet = meets(at[None, :], at[:, None], H)
        keys, queries = (k * behind).to(dtype), (q * reach).to(dtype)
        turned = meets(at[:, None], at[None, :], H)
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
