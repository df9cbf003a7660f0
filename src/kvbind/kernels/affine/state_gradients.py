"""The gradient of the state, chunk after chunk from the end, and of residuals.

With G the gradient of a chunk's outputs and D that of the state behind it,

    gradient of U              dU = A^T G + diag(b_C / b) K D
    of R = r o (v - c o (e S)) dR = T^T dU
    of S                       b_C D + (b o Q)^T G - (r o c o E)^T dR

D is held as its transpose and parts of a sequence run at once, as in `kvbind.kernels.affine.states`, whose maps of parts go
the other way by their transposes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvbind.kernels.affine.states import chunks_of, kept, key_rows, stored_state, turned_state
from kvbind.kernels.causal.segments import finite
from kvbind.kernels.launching.launcher import Launcher


@triton.jit
def _back(
    state, d_out, q, k, e, solved, reads, shares, reaches, tails, place, token, rows, at, inner, columns, keep,
    d_token, q_token, k_token, e_token, C: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr,
    DELTA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The transposes of dR of a chunk (dU without residuals), and of the gradient of the state before it."""
    dtype: tl.constexpr = d_out.dtype.element_ty
    square = place * (C * C) + at[:, None] * C + at[None, :]
    g = tl.load(
        d_out + token[None, :].to(tl.int64) * d_token + columns[:, None],
        mask=rows[None, :] & (columns < DV)[:, None], other=0.0,
    )  # fmt: skip
    y = finite(key_rows(k, token, k_token, rows, inner, DK, BD))
    x = tl.dot(state.to(dtype), tl.trans(y), input_precision=PRECISION)
    x *= tl.load(tails + place * C + at)[None, :]
    x = tl.dot(g, tl.load(reads + square), x, input_precision=PRECISION)
    reach = tl.load(reaches + place * C + at)
    g = (g.to(tl.float32) * tl.where(reach < float("inf"), reach, 0.0)[None, :]).to(dtype)
    z = finite(key_rows(q, token, q_token, rows, inner, DK, BD))
    state = tl.dot(g, z, state * keep, input_precision=PRECISION)
    if DELTA:
        if e is not None:
            y = finite(key_rows(e, token, e_token, rows, inner, DK, BD))
        x = tl.dot(x.to(dtype), tl.load(solved + square), input_precision=PRECISION)
        share = tl.load(shares + place * C + at)[None, :]
        state = tl.dot((x * -share).to(dtype), y, state, input_precision=PRECISION)
    return x.to(dtype), state


@triton.jit(do_not_specialize=["tokens", "each", "parts"])
def _part_gradients_kernel(
    d_out, q, k, e, solved, reads, shares, reaches, tails, keeps, d_final, ends, table, offsets, tokens, each, heads, parts,
    d_row, d_token, d_head, q_row, q_token, q_head, k_row, k_token, k_head,
    e_row, e_token, e_head,
    DK: tl.constexpr, DV: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, DELTA: tl.constexpr,
    CHANNEL: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One part of a sequence but the first, head and block of value columns."""
    NV: tl.constexpr = (DV + BV - 1) // BV
    program = tl.program_id(0)
    columns = (program % NV) * BV + tl.arange(0, BV)
    head = ((program // NV) % heads).to(tl.int64)
    part = (program // (NV * heads)) % (parts - 1) + 1
    sequence = program // (NV * heads * (parts - 1))
    begin, count, row, start, stop = chunks_of(sequence, table, offsets, tokens, each, C)
    size = (count + parts - 1) // parts
    first, last = tl.minimum(part * size, count), tl.minimum((part + 1) * size, count)
    at, inner = tl.arange(0, C), tl.arange(0, BD)
    d_out += row * d_row + head * d_head + start.to(tl.int64) * d_token
    q += row * q_row + head * q_head + start.to(tl.int64) * q_token
    k += row * k_row + head * k_head + start.to(tl.int64) * k_token
    if e is not None:
        e += row * e_row + head * e_head + start.to(tl.int64) * e_token
    base = (sequence.to(tl.int64) * heads + head) * (DK * DV)

    state = tl.zeros((BV, BD), tl.float32)
    if d_final is not None:  # noqa: SIM102 - one is known when compiling
        if part == parts - 1:
            state = turned_state(d_final, base, inner, columns, DK, DV, BD, BV)
    keep = kept(keeps, (begin + last - 1).to(tl.int64) * heads + head, first < last, inner, DK, CHANNEL, True)
    for step in tl.range(0, last - first, num_stages=STAGES):
        index = last - 1 - step
        place = (begin + index).to(tl.int64) * heads + head
        token = index * C + at
        _narrow, state = _back(
            state, d_out, q, k, e, solved, reads, shares, reaches, tails, place, token, token < stop - start, at, inner,
            columns, keep, d_token, q_token, k_token, e_token, C, DK, DV, BD, DELTA, PRECISION,
        )  # fmt: skip
        keep = kept(keeps, place - heads, index > first, inner, DK, CHANNEL, True)
    index = ((sequence * parts + part).to(tl.int64)) * heads + head
    inside = (columns < DV)[:, None] & (inner < DK)[None, :]
    tl.store(ends + index * (DV * DK) + columns[:, None] * DK + inner[None, :], state, mask=inside)


@triton.jit(do_not_specialize=["tokens", "each", "parts"])
def _state_gradients_kernel(
    d_out, q, k, e, solved, reads, shares, reaches, tails, keeps, d_states, d_right, d_final, d_initial, ends,
    table, offsets, tokens, each, heads, parts, d_row, d_token, d_head, q_row, q_token, q_head, k_row, k_token, k_head,
    e_row, e_token, e_head,
    DK: tl.constexpr, DV: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, DELTA: tl.constexpr,
    CHANNEL: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One part of a sequence, head and block of value columns."""
    NV: tl.constexpr = (DV + BV - 1) // BV
    program = tl.program_id(0)
    columns = (program % NV) * BV + tl.arange(0, BV)
    head = ((program // NV) % heads).to(tl.int64)
    part = (program // (NV * heads)) % parts
    sequence = program // (NV * heads * parts)
    begin, count, row, start, stop = chunks_of(sequence, table, offsets, tokens, each, C)
    size = (count + parts - 1) // parts
    first, last = tl.minimum(part * size, count), tl.minimum((part + 1) * size, count)
    at, inner = tl.arange(0, C), tl.arange(0, BD)
    dtype: tl.constexpr = d_out.dtype.element_ty
    d_out += row * d_row + head * d_head + start.to(tl.int64) * d_token
    q += row * q_row + head * q_head + start.to(tl.int64) * q_token
    k += row * k_row + head * k_head + start.to(tl.int64) * k_token
    if e is not None:
        e += row * e_row + head * e_head + start.to(tl.int64) * e_token
    base = (sequence.to(tl.int64) * heads + head) * (DK * DV)
    inside = (columns < DV)[:, None] & (inner < DK)[None, :]

    if part == parts - 1:
        state = turned_state(d_final, base, inner, columns, DK, DV, BD, BV)
    else:
        state = stored_state(ends, (sequence * parts + part + 1).to(tl.int64) * heads + head, inner, columns, DK, DV)
    keep = kept(keeps, (begin + last - 1).to(tl.int64) * heads + head, first < last, inner, DK, CHANNEL, True)
    for step in tl.range(0, last - first, num_stages=STAGES):
        index = last - 1 - step
        place = (begin + index).to(tl.int64) * heads + head
        token = index * C + at
        where = place * (DV * DK) + columns[:, None] * DK + inner[None, :]
        tl.store(d_states + where, state.to(dtype), mask=inside)
        narrow, state = _back(
            state, d_out, q, k, e, solved, reads, shares, reaches, tails, place, token, token < stop - start, at, inner,
            columns, keep, d_token, q_token, k_token, e_token, C, DK, DV, BD, DELTA, PRECISION,
        )  # fmt: skip
        where = place * (C * DV) + at[None, :] * DV + columns[:, None]
        tl.store(d_right + where, narrow, mask=(columns < DV)[:, None])
        keep = kept(keeps, place - heads, index > first, inner, DK, CHANNEL, True)
    if d_initial is not None:  # noqa: SIM102 - one is known when compiling
        if part == 0:
            tl.store(d_initial + base + inner[None, :] * DV + columns[:, None], state, mask=inside)


part_gradients = Launcher(_part_gradients_kernel)
state_gradients = Launcher(_state_gradients_kernel)
