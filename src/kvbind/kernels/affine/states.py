"""The state before each chunk: `S' = b_C o S + M S + Q`, chunk after chunk, and the same for its gradient from the end.

The gradient D of the loss with respect to the state goes backwards by the transpose of the same M,
`D = b_C o D' + M^T D' + Q'` (`kvbind.kernels.affine.backward`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvbind.kernels.causal.segments import initial_state, store_state
from kvbind.kernels.launching.launcher import Launcher


@triton.jit
def _move(moves, up, down, state, held, inner, DK: tl.constexpr, BK: tl.constexpr, TRANSPOSED: tl.constexpr,
          PRECISION: tl.constexpr):  # fmt: skip
    """A block of the state with what the chunk makes of another block added."""
    if TRANSPOSED:
        where = (down + inner)[:, None] * DK + (up + inner)[None, :]
    else:
        where = (up + inner)[:, None] * DK + (down + inner)[None, :]
    if DK % BK == 0:
        x = tl.load(moves + where)
    elif TRANSPOSED:
        x = tl.load(moves + where, mask=(down + inner < DK)[:, None] & (up + inner < DK)[None, :], other=0.0)
    else:
        x = tl.load(moves + where, mask=(up + inner < DK)[:, None] & (down + inner < DK)[None, :], other=0.0)
    if TRANSPOSED:
        return tl.dot(tl.trans(x), held, state, input_precision=PRECISION)
    else:
        return tl.dot(x, held, state, input_precision=PRECISION)


@triton.jit
def _moved(moves, writes, keep, up, state, h0, h1, h2, h3, inner, columns, DK: tl.constexpr, DV: tl.constexpr,
           BK: tl.constexpr, NK: tl.constexpr, DELTA: tl.constexpr, TRANSPOSED: tl.constexpr,
           PRECISION: tl.constexpr):  # fmt: skip
    """A block of the state behind a chunk."""
    where = (up + inner)[:, None] * DV + columns[None, :]
    inside = (up + inner < DK)[:, None] & (columns < DV)[None, :]
    state = keep * state + tl.load(writes + where, mask=inside, other=0.0).to(tl.float32)
    if DELTA:
        state = _move(moves, up, 0, state, h0, inner, DK, BK, TRANSPOSED, PRECISION)
        if NK > 1:
            state = _move(moves, up, BK, state, h1, inner, DK, BK, TRANSPOSED, PRECISION)
        if NK > 2:
            state = _move(moves, up, 2 * BK, state, h2, inner, DK, BK, TRANSPOSED, PRECISION)
        if NK > 3:
            state = _move(moves, up, 3 * BK, state, h3, inner, DK, BK, TRANSPOSED, PRECISION)
    return state


@triton.jit
def _kept(keeps, place, exists, block, inner, DK: tl.constexpr, REVERSE: tl.constexpr, CHANNEL: tl.constexpr):
    """The product of a chunk's gates; NaN where something in the chunk is not finite, which gradients leave out."""
    if CHANNEL:
        keep = tl.load(keeps + place * DK + block + inner, mask=exists & (block + inner < DK), other=1.0)[:, None]
    else:
        keep = tl.load(keeps + place, mask=exists, other=1.0)
    if REVERSE:
        keep = tl.where(keep < float("inf"), keep, 0.0)
    return keep


@triton.jit(do_not_specialize=["each"])
def _states_kernel(
    writes, moves, keeps, states, initial, final, offsets, each, heads,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, NK: tl.constexpr, BV: tl.constexpr, DELTA: tl.constexpr,
    REVERSE: tl.constexpr, CHANNEL: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One sequence, head and block of value columns; the state's rows are `NK` blocks of `BK`, all in registers."""
    NV: tl.constexpr = (DV + BV - 1) // BV
    program = tl.program_id(0)
    columns = (program % NV) * BV + tl.arange(0, BV)
    head = ((program // NV) % heads).to(tl.int64)
    sequence = program // (NV * heads)
    inner = tl.arange(0, BK)
    dtype: tl.constexpr = states.dtype.element_ty
    if offsets is None:
        begin, count = sequence * each, each
    else:
        begin = tl.load(offsets + sequence)
        count = tl.load(offsets + sequence + 1) - begin
    base = (sequence.to(tl.int64) * heads + head) * (DK * DV)
    s0 = initial_state(initial, base, inner, columns, DK, DV, BK, BV, False)
    s1, s2, s3 = s0, s0, s0
    if NK > 1:
        s1 = initial_state(initial, base, BK + inner, columns, DK, DV, BK, BV, False)
    if NK > 2:
        s2 = initial_state(initial, base, 2 * BK + inner, columns, DK, DV, BK, BV, False)
    if NK > 3:
        s3 = initial_state(initial, base, 3 * BK + inner, columns, DK, DV, BK, BV, False)

    # gates are loaded one chunk ahead, as nothing else hides how long that takes
    first = (begin + (count - 1 if REVERSE else 0)).to(tl.int64) * heads + head
    k0 = _kept(keeps, first, count > 0, 0, inner, DK, REVERSE, CHANNEL)
    k1, k2, k3 = k0, k0, k0
    if CHANNEL:
        if NK > 1:
            k1 = _kept(keeps, first, count > 0, BK, inner, DK, REVERSE, CHANNEL)
        if NK > 2:
            k2 = _kept(keeps, first, count > 0, 2 * BK, inner, DK, REVERSE, CHANNEL)
        if NK > 3:
            k3 = _kept(keeps, first, count > 0, 3 * BK, inner, DK, REVERSE, CHANNEL)
    # with a number of its own, a loop has all its loads made early, and not those of products alone
    for step in tl.range(0, count, num_stages=STAGES):
        place = (begin + (count - 1 - step if REVERSE else step)).to(tl.int64) * heads + head
        after = place + (-heads if REVERSE else heads)
        h0, h1, h2, h3 = s0.to(dtype), s1.to(dtype), s2.to(dtype), s3.to(dtype)
        at, its_moves, its_writes = states + place * (DK * DV), moves, writes + place * (DK * DV)
        if DELTA:
            its_moves += place * (DK * DK)
        store_state(at, 0, h0, inner, columns, DK, DV)
        s0 = _moved(its_moves, its_writes, k0, 0, s0, h0, h1, h2, h3, inner, columns, DK, DV, BK, NK, DELTA, REVERSE,
                    PRECISION)  # fmt: skip
        k0 = _kept(keeps, after, step + 1 < count, 0, inner, DK, REVERSE, CHANNEL)
        if NK > 1:
            store_state(at, 0, h1, BK + inner, columns, DK, DV)
            s1 = _moved(its_moves, its_writes, k1, BK, s1, h0, h1, h2, h3, inner, columns, DK, DV, BK, NK, DELTA, REVERSE,
                        PRECISION)  # fmt: skip
            k1 = _kept(keeps, after, step + 1 < count, BK, inner, DK, REVERSE, CHANNEL)
        if NK > 2:
            store_state(at, 0, h2, 2 * BK + inner, columns, DK, DV)
            s2 = _moved(its_moves, its_writes, k2, 2 * BK, s2, h0, h1, h2, h3, inner, columns, DK, DV, BK, NK, DELTA,
                        REVERSE, PRECISION)  # fmt: skip
            k2 = _kept(keeps, after, step + 1 < count, 2 * BK, inner, DK, REVERSE, CHANNEL)
        if NK > 3:
            store_state(at, 0, h3, 3 * BK + inner, columns, DK, DV)
            s3 = _moved(its_moves, its_writes, k3, 3 * BK, s3, h0, h1, h2, h3, inner, columns, DK, DV, BK, NK, DELTA,
                        REVERSE, PRECISION)  # fmt: skip
            k3 = _kept(keeps, after, step + 1 < count, 3 * BK, inner, DK, REVERSE, CHANNEL)
    if final is not None:
        store_state(final, base, s0, inner, columns, DK, DV)
        if NK > 1:
            store_state(final, base, s1, BK + inner, columns, DK, DV)
        if NK > 2:
            store_state(final, base, s2, 2 * BK + inner, columns, DK, DV)
        if NK > 3:
            store_state(final, base, s3, 3 * BK + inner, columns, DK, DV)


states = Launcher(_states_kernel)
