"""One update of a gated linear unit from all tokens, then a read: `visibility="full"`, ViTTT's heads (arXiv 2512.01643).

Each sequence and head is on its own. With `z = k W`, `u = k W_gate`, `s = silu(u)` and `g = -dL/df` (specification,
section 1):

    G_out = k^T (r_out g s)        G_gate = k^T (r_gate g z silu'(u))        M' = M + sign G / (|G| + 1)
    o = silu(q W_gate') (q W')

with norms over a column, or `M' = M + sign G` unclipped. Without a gate, `s = 1` and `o = q W'`: one linear layer.

Where sequences and heads fill the device, one program does all of one of them: it sums the update over tiles of tokens,
enters it into the weights and reads them, in one launch; the gradient likewise. Fewer and longer ones are cut into parts by
tokens, whose float32 sums are added, always in the same order, between two launches.

Operands are multiplied in their own dtypes and summed in float32; all else is float32. Float16 has too little range for
products of three activations: these are divided by their largest magnitude first, and the product multiplied by it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvbind.kernels.activations import activate, slope
from kvbind.kernels.common import DTYPES, cdiv, dot_precision, last_contiguous, multiprocessors, on_device_of

MAX_WIDTH = 64
"""The widest head, in keys and in values: the matrices of wider ones do not fit into registers."""

PART = 256
"""The fewest tokens in a part of a long sequence."""


ALL, WRITE, READ = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""What a launch does: the whole, or one half for one part of the tokens."""


def covers(key_width: int, value_width: int, *dtypes: torch.dtype) -> bool:
    """Whether `full_glu` takes heads of these widths and queries, keys and values of these dtypes."""
    return 0 < key_width <= MAX_WIDTH and 0 < value_width <= MAX_WIDTH and all(dtype in DTYPES for dtype in dtypes)


@triton.jit
def _narrow(x, dtype: tl.constexpr):
    """Float32 `x` in `dtype`, and by what it was divided first: 1 unless `dtype` has too little range."""
    scale = tl.full((), 1.0, tl.float32)
    if dtype == tl.float16:
        largest = tl.max(tl.abs(x))
        scale = tl.where(largest > 0.0, largest, scale)
        x = x / scale
    return x.to(dtype), scale


@triton.jit
def _add_write(acc, x, y, PRECISION: tl.constexpr):
    """`acc + x^T y` for operands `x` and float32 `y`."""
    narrow, scale = _narrow(y, x.dtype)
    if x.dtype == tl.float16:
        acc += scale * tl.dot(tl.trans(x), narrow)
    else:
        acc = tl.dot(tl.trans(x), narrow, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _add_back(acc, y, w, w_scale, PRECISION: tl.constexpr):
    """`acc + y (w_scale w)^T` for float32 `y` and operands `w`."""
    narrow, scale = _narrow(y, w.dtype)
    if w.dtype == tl.float16:
        acc += scale * w_scale * tl.dot(narrow, tl.trans(w))
    else:
        acc = tl.dot(narrow, tl.trans(w), acc, input_precision=PRECISION)
    return acc


@triton.jit
def _tokens(x, start, stop, row, WIDTH: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr):
    """Where a tile of tokens from `start` lies, and which of it is there."""
    rows, columns = tl.arange(0, TILE), tl.arange(0, COLUMNS)
    there = (rows < stop - start)[:, None]
    if WIDTH != COLUMNS:
        there = there & (columns < WIDTH)[None, :]
    # offsets inside a tile are small and the same for all: only its start needs 64 bits
    return x + (tl.zeros((), tl.int64) + start) * row + (rows[:, None] * row + columns[None, :]), there


@triton.jit
def _matrix(x, row, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Where a matrix lies, and which of its padded tile is there."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    return x + rows[:, None] * row + columns[None, :], (rows < HEIGHT)[:, None] & (columns < WIDTH)[None, :]


@triton.jit
def _rates(rate, start, stop, row, TILE: tl.constexpr):
    """The rates of a tile of tokens, as a column."""
    rows = tl.arange(0, TILE)
    return tl.load(rate + (tl.zeros((), tl.int64) + start) * row + rows * row, mask=rows < stop - start, other=0.0)[:, None]


@triton.jit
def _norm(x):
    """The norm of each column, whatever its magnitude."""
    largest = tl.max(tl.abs(x), axis=0)
    scale = tl.where(largest > 0.0, largest, 1.0)
    x = x / scale[None, :]
    return scale * tl.sqrt(tl.sum(x * x, axis=0))


@triton.jit
def _enter(w, update, sign, norms, width, CLIP: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """The weights after an update; the norms of its columns go to `norms`."""
    if CLIP:
        norm = _norm(update)
        columns = width + tl.arange(0, COLUMNS)
        tl.store(norms + columns, norm, mask=columns < WIDTH)
        update = update / (norm + 1.0)[None, :]
    return w + sign * update


@triton.jit
def _enter_backward(d, w, new, sign, scale, norms, width, CLIP: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """The gradient of the update, before its constant rate `scale`, from that of the new weights."""
    d = sign * d
    if CLIP:
        columns = width + tl.arange(0, COLUMNS)
        norm = tl.load(norms + columns, mask=columns < WIDTH, other=0.0)
        clipped = sign * (new - w)
        along = tl.sum(d * clipped, axis=0) / tl.where(norm > 0.0, norm, 1.0)
        d = d / (norm + 1.0)[None, :] - clipped * along[None, :]
    return scale * d


@triton.jit(do_not_specialize=["heads", "writers", "readers", "write_span", "read_span", "ro_batch", "rg_batch"])
def _forward_kernel(
    q, k, v, w, wg, rate_out, rate_gate, o, new, newg, norms, partial,
    scale_out, scale_gate, sign, heads, writers, readers, write_span, read_span,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    w_batch, w_head, w_row, wg_batch, wg_head, wg_row, ro_batch, ro_row, ro_head, rg_batch, rg_row, rg_head,
    STAGE: tl.constexpr, GATE: tl.constexpr, UPDATE_GATE: tl.constexpr, CLIP: tl.constexpr, SQUARED: tl.constexpr,
    RATED_OUT: tl.constexpr, RATED_GATE: tl.constexpr, PRECISION_K: tl.constexpr, PRECISION_Q: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    program, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, head = program // heads, program % heads
    q += batch * q_batch + head * q_head
    o += batch * readers * heads * DV + head * DV
    norms += program * (2 if UPDATE_GATE else 1) * DV
    w_at, w_there = _matrix(w + batch * w_batch + head * w_head, w_row, DK, DV, BK, BV)
    wg_at, w_there = _matrix(wg + batch * wg_batch + head * wg_head, wg_row, DK, DV, BK, BV)
    new_at, w_there = _matrix(new + program * DK * DV, DV, DK, DV, BK, BV)
    newg_at, w_there = _matrix(newg + program * DK * DV, DV, DK, DV, BK, BV)

    if STAGE != READ:
        k += batch * k_batch + head * k_head
        v += batch * v_batch + head * v_head
        rate_out += batch * ro_batch + head * ro_head
        rate_gate += batch * rg_batch + head * rg_head
        start = part * write_span
        stop = tl.minimum(start + write_span, writers)
        if UPDATE_GATE or SQUARED:
            wn, ws = _narrow(tl.load(w_at, mask=w_there, other=0.0), k.dtype.element_ty)
        if GATE:
            gn, gs = _narrow(tl.load(wg_at, mask=w_there, other=0.0), k.dtype.element_ty)
        update = tl.zeros((BK, BV), tl.float32)
        updateg = tl.zeros((BK, BV), tl.float32)
        for t in range(start, stop, BT):
            k_at, k_there = _tokens(k, t, stop, k_row, DK, BT, BK)
            v_at, v_there = _tokens(v, t, stop, v_row, DV, BT, BV)
            kt = tl.load(k_at, mask=k_there, other=0.0)
            g = tl.load(v_at, mask=v_there, other=0.0).to(tl.float32)
            if UPDATE_GATE or SQUARED:
                z = ws * tl.dot(kt, wn, input_precision=PRECISION_K)
            if GATE:
                u = gs * tl.dot(kt, gn, input_precision=PRECISION_K)
                s = activate(u, "silu")
                if SQUARED:
                    g -= s * z
                x = g * s
            else:
                if SQUARED:
                    g -= z
                x = g
            if RATED_OUT:
                x *= _rates(rate_out, t, stop, ro_row, BT)
            update = _add_write(update, kt, x, PRECISION_K)
            if UPDATE_GATE:
                x = g * z * slope(u, "silu")
                if RATED_GATE:
                    x *= _rates(rate_gate, t, stop, rg_row, BT)
                updateg = _add_write(updateg, kt, x, PRECISION_K)

        if STAGE == WRITE:
            MATRICES: tl.constexpr = 2 if UPDATE_GATE else 1
            at, w_there = _matrix(partial + (program * tl.num_programs(1) + part) * MATRICES * DK * DV, DV, DK, DV, BK, BV)
            tl.store(at, update * scale_out, mask=w_there)
            if UPDATE_GATE:
                tl.store(at + DK * DV, updateg * scale_gate, mask=w_there)
        else:
            # read anew, which costs less than keeping them in registers through the loop
            matrix = tl.load(w_at, mask=w_there, other=0.0)
            matrix = _enter(matrix, update * scale_out, sign, norms, 0, CLIP, DV, BV)
            tl.store(new_at, matrix, mask=w_there)
            if GATE:
                gate = tl.load(wg_at, mask=w_there, other=0.0)
                if UPDATE_GATE:
                    gate = _enter(gate, updateg * scale_gate, sign, norms + DV, 0, CLIP, DV, BV)
                    tl.store(newg_at, gate, mask=w_there)

    if STAGE == READ:
        matrix = tl.load(new_at, mask=w_there, other=0.0)
        if UPDATE_GATE:
            gate = tl.load(newg_at, mask=w_there, other=0.0)
        elif GATE:
            gate = tl.load(wg_at, mask=w_there, other=0.0)

    if STAGE != WRITE:
        start = part * read_span
        stop = tl.minimum(start + read_span, readers)
        wn, ws = _narrow(matrix, q.dtype.element_ty)
        if GATE:
            gn, gs = _narrow(gate, q.dtype.element_ty)
        for t in range(start, stop, BT):
            q_at, q_there = _tokens(q, t, stop, q_row, DK, BT, BK)
            qt = tl.load(q_at, mask=q_there, other=0.0)
            y = ws * tl.dot(qt, wn, input_precision=PRECISION_Q)
            if GATE:
                y *= activate(gs * tl.dot(qt, gn, input_precision=PRECISION_Q), "silu")
            o_at, o_there = _tokens(o, t, stop, heads * DV, DV, BT, BV)
            tl.store(o_at, y.to(o.dtype.element_ty), mask=o_there)


@triton.jit
def _add_parts(partial, parts, at, there, size, ROWS: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr):
    """The sum over parts, `size` apart, of what lies `at`."""
    total = tl.zeros((ROWS, BN), tl.float32)
    for first in range(0, parts, BP):
        index = first + tl.arange(0, BP)
        here = (index < parts)[:, None, None] & there[None, :, :]
        each = tl.load(partial + index[:, None, None] * size + at[None, :, :], mask=here, other=0.0)
        total += tl.sum(each, axis=0)
    return total


@triton.jit(do_not_specialize=["heads", "parts"])
def _enter_kernel(
    w, wg, new, newg, norms, partial, sign, heads, parts, w_batch, w_head, w_row, wg_batch, wg_head, wg_row,
    MATRICES: tl.constexpr, CLIP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    BK: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Add the parts of an update and enter it: a matrix and some of its columns per program."""
    program, column, which = tl.program_id(0).to(tl.int64), tl.program_id(1) * BN, tl.program_id(2)
    batch, head = program // heads, program % heads
    rows, columns = tl.arange(0, BK)[:, None], column + tl.arange(0, BN)[None, :]
    there = (rows < DK) & (columns < DV)
    at = rows * DV + columns
    partial += (program * parts * MATRICES + which) * DK * DV
    update = _add_parts(partial, parts, at, there, MATRICES * DK * DV, BK, BN, BP)
    norms += (program * MATRICES + which) * DV
    if which == 0:
        old = tl.load(w + batch * w_batch + head * w_head + rows * w_row + columns, mask=there, other=0.0)
        tl.store(new + program * DK * DV + at, _enter(old, update, sign, norms, column, CLIP, DV, BN), mask=there)
    else:
        old = tl.load(wg + batch * wg_batch + head * wg_head + rows * wg_row + columns, mask=there, other=0.0)
        tl.store(newg + program * DK * DV + at, _enter(old, update, sign, norms, column, CLIP, DV, BN), mask=there)


@triton.jit(do_not_specialize=["heads", "parts"])
def _enter_backward_kernel(
    w, wg, new, newg, norms, dnew, dnewg, partial, dread, dupdate,
    scale_out, scale_gate, sign, heads, parts, w_batch, w_head, w_row, wg_batch, wg_head, wg_row,
    MATRICES: tl.constexpr, UPDATE_GATE: tl.constexpr, NEW_USED: tl.constexpr, NEWG_USED: tl.constexpr, CLIP: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Add the parts of the new weights' gradient, `dread`, and take it through the update, `dupdate`."""
    program, column, which = tl.program_id(0).to(tl.int64), tl.program_id(1) * BN, tl.program_id(2)
    batch, head = program // heads, program % heads
    rows, columns = tl.arange(0, BK)[:, None], column + tl.arange(0, BN)[None, :]
    there = (rows < DK) & (columns < DV)
    at = rows * DV + columns
    partial += (program * parts * MATRICES + which) * DK * DV
    d = _add_parts(partial, parts, at, there, MATRICES * DK * DV, BK, BN, BP)
    norms += (program * (2 if UPDATE_GATE else 1) + which) * DV
    to = (program * MATRICES + which) * DK * DV + at
    at += program * DK * DV
    if which == 0:
        if NEW_USED:
            d += tl.load(dnew + at, mask=there, other=0.0)
        old = tl.load(w + batch * w_batch + head * w_head + rows * w_row + columns, mask=there, other=0.0)
        entered = tl.load(new + at, mask=there, other=0.0)
        x = _enter_backward(d, old, entered, sign, scale_out, norms, column, CLIP, DV, BN)
        tl.store(dupdate + to, x, mask=there)
    elif UPDATE_GATE:
        if NEWG_USED:
            d += tl.load(dnewg + at, mask=there, other=0.0)
        old = tl.load(wg + batch * wg_batch + head * wg_head + rows * wg_row + columns, mask=there, other=0.0)
        entered = tl.load(newg + at, mask=there, other=0.0)
        x = _enter_backward(d, old, entered, sign, scale_gate, norms, column, CLIP, DV, BN)
        tl.store(dupdate + to, x, mask=there)
    tl.store(dread + to, d, mask=there)


@triton.jit(do_not_specialize=["heads", "writers", "readers", "write_span", "read_span", "ro_batch", "rg_batch"])
def _backward_kernel(
    q, k, v, w, wg, rate_out, rate_gate, new, newg, norms, do, dnew, dnewg,
    dq, dk, dv, dw, drate_out, drate_gate, partial, dread, dupdate,
    scale_out, scale_gate, sign, do_batch, do_row, do_head, heads, writers, readers, write_span, read_span,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    w_batch, w_head, w_row, wg_batch, wg_head, wg_row, ro_batch, ro_row, ro_head, rg_batch, rg_row, rg_head,
    STAGE: tl.constexpr, GATE: tl.constexpr, UPDATE_GATE: tl.constexpr, CLIP: tl.constexpr, SQUARED: tl.constexpr,
    RATED_OUT: tl.constexpr, RATED_GATE: tl.constexpr, NEW_USED: tl.constexpr, NEWG_USED: tl.constexpr,
    PRECISION_K: tl.constexpr, PRECISION_Q: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    program, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, head = program // heads, program % heads
    norms += program * (2 if UPDATE_GATE else 1) * DV
    w_at, w_there = _matrix(w + batch * w_batch + head * w_head, w_row, DK, DV, BK, BV)
    wg_at, w_there = _matrix(wg + batch * wg_batch + head * wg_head, wg_row, DK, DV, BK, BV)
    new_at, w_there = _matrix(new + program * DK * DV, DV, DK, DV, BK, BV)
    newg_at, w_there = _matrix(newg + program * DK * DV, DV, DK, DV, BK, BV)
    # the matrices side by side that a program, or a part of it, has the gradients of
    MATRICES: tl.constexpr = 2 if GATE else 1
    flat, w_there = _matrix(0, DV, DK, DV, BK, BV)
    pair_at = program * MATRICES * DK * DV + flat
    part_at = (program * tl.num_programs(1) + part) * MATRICES * DK * DV + flat
    flat += program * DK * DV

    acc = tl.zeros((BK, BV), tl.float32)
    accg = tl.zeros((BK, BV), tl.float32)
    if STAGE != WRITE:
        q += batch * q_batch + head * q_head
        do += batch * do_batch + head * do_head
        dq += batch * readers * heads * DK + head * DK
        start = part * read_span
        stop = tl.minimum(start + read_span, readers)
        wn, ws = _narrow(tl.load(new_at, mask=w_there, other=0.0), q.dtype.element_ty)
        if UPDATE_GATE:
            gn, gs = _narrow(tl.load(newg_at, mask=w_there, other=0.0), q.dtype.element_ty)
        elif GATE:
            gn, gs = _narrow(tl.load(wg_at, mask=w_there, other=0.0), q.dtype.element_ty)
        for t in range(start, stop, BT):
            q_at, q_there = _tokens(q, t, stop, q_row, DK, BT, BK)
            do_at, do_there = _tokens(do, t, stop, do_row, DV, BT, BV)
            qt = tl.load(q_at, mask=q_there, other=0.0)
            dy = tl.load(do_at, mask=do_there, other=0.0).to(tl.float32)
            dqt = tl.zeros((BT, BK), tl.float32)
            if GATE:
                y = ws * tl.dot(qt, wn, input_precision=PRECISION_Q)
                p = gs * tl.dot(qt, gn, input_precision=PRECISION_Q)
                dp = dy * y * slope(p, "silu")
                dy *= activate(p, "silu")
                dqt = _add_back(dqt, dp, gn, gs, PRECISION_Q)
                accg = _add_write(accg, qt, dp, PRECISION_Q)
            dqt = _add_back(dqt, dy, wn, ws, PRECISION_Q)
            acc = _add_write(acc, qt, dy, PRECISION_Q)
            dq_at, q_there = _tokens(dq, t, stop, heads * DK, DK, BT, BK)
            tl.store(dq_at, dqt.to(dq.dtype.element_ty), mask=q_there)

    if STAGE == READ:
        tl.store(partial + part_at, acc, mask=w_there)
        if GATE:
            tl.store(partial + part_at + DK * DV, accg, mask=w_there)
    else:
        # one matrix after the other, as all of them at once do not fit into registers
        if STAGE == WRITE:
            # the first part goes on from what reading gave
            first = w_there & (part == 0)
            acc = tl.load(dread + pair_at, mask=first, other=0.0)
            d = tl.load(dupdate + pair_at, mask=w_there, other=0.0)
        else:
            if NEW_USED:
                acc += tl.load(dnew + flat, mask=w_there, other=0.0)
            old = tl.load(w_at, mask=w_there, other=0.0)
            entered = tl.load(new_at, mask=w_there, other=0.0)
            d = _enter_backward(acc, old, entered, sign, scale_out, norms, 0, CLIP, DV, BV)
        dn, ds = _narrow(d, k.dtype.element_ty)
        if UPDATE_GATE or SQUARED:
            wn, ws = _narrow(tl.load(w_at, mask=w_there, other=0.0), k.dtype.element_ty)
        if GATE:
            if STAGE == WRITE:
                accg = tl.load(dread + pair_at + DK * DV, mask=first, other=0.0)
            elif NEWG_USED:
                accg += tl.load(dnewg + flat, mask=w_there, other=0.0)
            gn, gs = _narrow(tl.load(wg_at, mask=w_there, other=0.0), k.dtype.element_ty)
        if UPDATE_GATE:
            if STAGE == WRITE:
                d = tl.load(dupdate + pair_at + DK * DV, mask=w_there, other=0.0)
            else:
                old = tl.load(wg_at, mask=w_there, other=0.0)
                entered = tl.load(newg_at, mask=w_there, other=0.0)
                d = _enter_backward(accg, old, entered, sign, scale_gate, norms + DV, 0, CLIP, DV, BV)
            dgn, dgs = _narrow(d, k.dtype.element_ty)

        k += batch * k_batch + head * k_head
        v += batch * v_batch + head * v_head
        dk += batch * writers * heads * DK + head * DK
        dv += batch * writers * heads * DV + head * DV
        rate_out += batch * ro_batch + head * ro_head
        rate_gate += batch * rg_batch + head * rg_head
        drate_out += batch * writers * heads + head
        drate_gate += batch * writers * heads + head
        start = part * write_span
        stop = tl.minimum(start + write_span, writers)
        for t in range(start, stop, BT):
            k_at, k_there = _tokens(k, t, stop, k_row, DK, BT, BK)
            v_at, v_there = _tokens(v, t, stop, v_row, DV, BT, BV)
            kt = tl.load(k_at, mask=k_there, other=0.0)
            g = tl.load(v_at, mask=v_there, other=0.0).to(tl.float32)
            dkt = tl.zeros((BT, BK), tl.float32)
            tokens = tl.zeros((), tl.int64) + t + tl.arange(0, BT)
            if UPDATE_GATE or SQUARED:
                z = ws * tl.dot(kt, wn, input_precision=PRECISION_K)
            # the update of the last layer, x = rate g s, whose gradient is e
            e = ds * tl.dot(kt, dn, input_precision=PRECISION_K)
            if GATE:
                u = gs * tl.dot(kt, gn, input_precision=PRECISION_K)
                s = activate(u, "silu")
                if SQUARED:
                    g -= s * z
                x = g * s
            else:
                if SQUARED:
                    g -= z
                x = g
            if RATED_OUT:
                rate = _rates(rate_out, t, stop, ro_row, BT)
                tl.store(drate_out + tokens * heads, tl.sum(x * e, axis=1), mask=tokens < stop)
                x *= rate
                e *= rate
            dkt = _add_back(dkt, x, dn, ds, PRECISION_K)
            dgt = e
            if GATE:
                dgt = e * s
                du = g * e * slope(u, "silu")
            if UPDATE_GATE:
                # the update of the gate, rate g z silu'(u)
                sigmoid = tl.sigmoid(u)
                curve = sigmoid * (1.0 - sigmoid) * (2.0 + u * (1.0 - 2.0 * sigmoid))
                e = dgs * tl.dot(kt, dgn, input_precision=PRECISION_K)
                x = g * z * slope(u, "silu")
                if RATED_GATE:
                    rate = _rates(rate_gate, t, stop, rg_row, BT)
                    tl.store(drate_gate + tokens * heads, tl.sum(x * e, axis=1), mask=tokens < stop)
                    x *= rate
                    e *= rate
                dkt = _add_back(dkt, x, dgn, dgs, PRECISION_K)
                dgt += e * z * slope(u, "silu")
                dz = e * g * slope(u, "silu")
                du += e * g * z * curve
            dv_at, v_there = _tokens(dv, t, stop, heads * DV, DV, BT, BV)
            tl.store(dv_at, dgt.to(dv.dtype.element_ty), mask=v_there)
            if SQUARED:
                if not UPDATE_GATE:
                    dz = tl.zeros((BT, BV), tl.float32)
                if GATE:
                    dz -= dgt * s
                    du -= dgt * z * slope(u, "silu")
                else:
                    dz -= dgt
            if UPDATE_GATE or SQUARED:
                dkt = _add_back(dkt, dz, wn, ws, PRECISION_K)
                acc = _add_write(acc, kt, dz, PRECISION_K)
            if GATE:
                dkt = _add_back(dkt, du, gn, gs, PRECISION_K)
                accg = _add_write(accg, kt, du, PRECISION_K)
            dk_at, k_there = _tokens(dk, t, stop, heads * DK, DK, BT, BK)
            tl.store(dk_at, dkt.to(dk.dtype.element_ty), mask=k_there)
        tl.store(dw + part_at, acc, mask=w_there)
        if GATE:
            tl.store(dw + part_at + DK * DV, accg, mask=w_there)


def _parts(x: Tensor, programs: int, tokens: int) -> int:
    """Into how many parts to cut the tokens, so that twice the device's multiprocessors have work."""
    at_once = 2 * multiprocessors(x)
    return max(1, min(-(-at_once // max(programs, 1)), tokens // PART))


def _padded(width: int) -> int:
    """The width of a tile that holds `width` columns: a power of two, and at least what a matrix unit takes."""
    return max(16, triton.next_power_of_2(width))


class _Call:
    """What the launches of one call share.

    Attributes:
        operands: q, k, v, weight, gate and the rates as kernels take them, the weight standing in for what is missing.
        strides: theirs; those of the matrices are also in `matrix_strides`.
        heads: how many.
        programs: sequences times heads.
        parts: into how many parts the tokens are cut.
        counts: heads, tokens that write, tokens that read, and how many of each are in a part.
        flags: compile-time arguments of kernels that go over tokens.
        enter_flags: of those that add parts.
        full: there are operands in float32.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        weight: Tensor,
        gate: Tensor | None,
        rate_out: Tensor | None,
        rate_gate: Tensor | None,
        update_gate: bool,
        clip: bool,
        squared: bool,
    ) -> None:
        batch, readers, self.heads, key_width = q.shape
        writers, value_width = v.shape[1], v.shape[3]
        flags = {
            "GATE": gate is not None,
            "UPDATE_GATE": update_gate,
            "CLIP": clip,
            "SQUARED": squared,
            "RATED_OUT": rate_out is not None,
            "RATED_GATE": rate_gate is not None,
            "PRECISION_K": dot_precision(k.dtype),
            "PRECISION_Q": dot_precision(q.dtype),
        }
        q, k, v, weight = (last_contiguous(x) for x in (q, k, v, weight))
        gate = weight if gate is None else last_contiguous(gate)
        rates = [weight if rate is None else rate for rate in (rate_out, rate_gate)]
        self.operands = (q, k, v, weight, gate, *rates)
        self.matrix_strides = (*weight.stride()[:3], *gate.stride()[:3])
        token_strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
        self.strides = (*token_strides, *self.matrix_strides, *rates[0].stride()[:3], *rates[1].stride()[:3])

        self.programs = batch * self.heads
        self.parts = _parts(q, self.programs, max(writers, readers))
        self.counts = (self.heads, writers, readers, -(-writers // self.parts), -(-readers // self.parts))
        widths = {"DK": key_width, "DV": value_width, "BK": _padded(key_width)}
        self.flags: dict[str, Any] = {**flags, **widths, "BV": _padded(value_width)}
        self.enter_flags: dict[str, Any] = {**widths, "CLIP": clip, "BN": 16, "BP": 8, "num_warps": 4}
        self.full = torch.float32 in (q.dtype, k.dtype)

    def options(self, forward: bool) -> dict[str, int]:
        """The tile of tokens, warps and stages of kernels that go over tokens: the largest that fit into registers."""
        if self.full:
            # float32 products run on the plain cores, from registers, and are unrolled
            return {"BT": 16, "num_warps": 8, "num_stages": 1}
        return {"BT": 64 if forward else 32, "num_warps": 4, "num_stages": 2}

    def over_tokens(self, kernel: Any, stage: tl.constexpr, *arguments: Any, **options: Any) -> None:
        """Launch a kernel that goes over tokens."""
        kernel[self.programs, self.parts](
            *self.operands, *arguments, *self.counts, *self.strides, STAGE=stage.value, **self.flags, **options
        )

    def over_parts(self, kernel: Any, matrices: int, *arguments: Any, **flags: bool) -> None:
        """Launch a kernel that adds the parts of `matrices` matrices of each program."""
        grid = self.programs, cdiv(self.flags["DV"], self.enter_flags["BN"]), matrices
        kernel[grid](
            *self.operands[3:5], *arguments, self.heads, self.parts, *self.matrix_strides,
            MATRICES=matrices, **flags, **self.enter_flags,
        )  # fmt: skip

    def matrices(self, count: int, parts: int = 1) -> Tensor:
        """Room for `count` matrices of each program and part."""
        shape = (self.programs, parts, count, self.flags["DK"], self.flags["DV"])
        return torch.empty(shape, dtype=torch.float32, device=self.operands[0].device)


@torch.library.custom_op("kvbind::full_glu", mutates_args=())
def _full_glu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    rate_out: Tensor | None,
    rate_gate: Tensor | None,
    scale_out: float,
    scale_gate: float,
    update_gate: bool,
    clip: bool,
    sign: float,
    squared: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs, the new matrices (that of the gate only where it is updated), and the norms of their updates' columns."""
    o, new, newg, norms = _outputs(q, v, update_gate, clip)
    call = _Call(q, k, v, weight, gate, rate_out, rate_gate, update_gate, clip, squared)
    if not call.programs:
        return o, new, newg, norms
    matrices = 2 if update_gate else 1
    partial = norms if call.parts == 1 else call.matrices(matrices, call.parts)
    tensors, numbers = (o, new, newg, norms, partial), (scale_out, scale_gate, sign)
    options = call.options(forward=True)
    with on_device_of(q):
        if call.parts == 1:
            call.over_tokens(_forward_kernel, ALL, *tensors, *numbers, **options)
        else:
            call.over_tokens(_forward_kernel, WRITE, *tensors, *numbers, **options)
            call.over_parts(_enter_kernel, matrices, new, newg, norms, partial, sign)
            call.over_tokens(_forward_kernel, READ, *tensors, *numbers, **options)
    return o, new, newg, norms


def _outputs(q: Tensor, v: Tensor, update_gate: bool, clip: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, readers, heads, key_width = q.shape
    width = v.shape[3]
    shape = (batch, heads, key_width, width)
    return (
        q.new_empty(batch, readers, heads, width),
        q.new_empty(shape, dtype=torch.float32),
        q.new_empty(shape if update_gate else (0,), dtype=torch.float32),
        q.new_empty((batch, heads, (2 if update_gate else 1) if clip else 0, width), dtype=torch.float32),
    )


@_full_glu.register_fake
def _(q, k, v, weight, gate, rate_out, rate_gate, scale_out, scale_gate, update_gate, clip, *_):
    return _outputs(q, v, update_gate, clip)


@torch.library.custom_op("kvbind::full_glu_backward", mutates_args=())
def _full_glu_backward(
    do: Tensor,
    dnew: Tensor | None,
    dnewg: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    rate_out: Tensor | None,
    rate_gate: Tensor | None,
    new: Tensor,
    newg: Tensor,
    norms: Tensor,
    scale_out: float,
    scale_gate: float,
    update_gate: bool,
    clip: bool,
    sign: float,
    squared: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, of the matrices (`[B, H, 1 or 2, Dk, Dv]`), and of the rates (empty for numbers)."""
    dq, dk, dv, dmatrices, drate_out, drate_gate = _gradients(q, k, v, gate, rate_out, rate_gate)
    call = _Call(q, k, v, weight, gate, rate_out, rate_gate, update_gate, clip, squared)
    if not call.programs:
        return dq, dk, dv, dmatrices, drate_out, drate_gate
    do = last_contiguous(do)
    dnews = [new if d is None else d.contiguous() for d in (dnew, dnewg)]
    partial, dread, dupdate = (norms,) * 3
    dparts = dmatrices
    if call.parts > 1:
        count = dmatrices.shape[2]
        partial, dread, dupdate = (call.matrices(count, n) for n in (call.parts, 1, 1))
        # by the time that parts of the weights' gradient are written, those of the new weights' are added
        dparts = partial
    used = {"NEW_USED": dnew is not None, "NEWG_USED": dnewg is not None}

    def launch(stage: tl.constexpr) -> None:
        call.over_tokens(
            _backward_kernel, stage, new, newg, norms, do, *dnews, dq, dk, dv, dparts, drate_out, drate_gate,
            partial, dread, dupdate, scale_out, scale_gate, sign, *do.stride()[:3],
            **used, **call.options(forward=False),
        )  # fmt: skip

    with on_device_of(q):
        if call.parts == 1:
            launch(ALL)
        else:
            launch(READ)
            call.over_parts(
                _enter_backward_kernel, partial.shape[2], new, newg, norms, *dnews, partial, dread, dupdate,
                scale_out, scale_gate, sign, UPDATE_GATE=update_gate, **used,
            )  # fmt: skip
            launch(WRITE)
            torch.sum(dparts, dim=1, out=dmatrices.flatten(0, 1))
    return dq, dk, dv, dmatrices, drate_out, drate_gate


def _gradients(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, rate_out: Tensor | None, rate_gate: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, _, heads, key_width = q.shape
    writers, width = v.shape[1], v.shape[3]
    drates = [
        q.new_empty((0,) if rate is None else (batch, writers, heads), dtype=torch.float32) for rate in (rate_out, rate_gate)
    ]
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        q.new_empty((batch, heads, 1 if gate is None else 2, key_width, width), dtype=torch.float32),
        drates[0],
        drates[1],
    )


@_full_glu_backward.register_fake
def _(do, dnew, dnewg, q, k, v, weight, gate, rate_out, rate_gate, *_):
    return _gradients(q, k, v, gate, rate_out, rate_gate)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:7], *output[1:])
    ctx.numbers = inputs[7:]
    # a gradient of the new weights that nobody asks for is not made of zeros
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, do: Tensor | None, dnew: Tensor | None, dnewg: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    q, k, v, weight, gate, rate_out, rate_gate, *kept = ctx.saved_tensors
    if not kept[1].numel():
        # no gate was updated
        dnewg = None
    if do is None:
        do = q.new_zeros(*q.shape[:3], v.shape[3])
    dq, dk, dv, dmatrices, drate_out, drate_gate = _full_glu_backward(
        do, dnew, dnewg, q, k, v, weight, gate, rate_out, rate_gate, *kept, *ctx.numbers
    )
    return (
        dq,
        dk,
        dv,
        dmatrices[:, :, 0],
        None if gate is None else dmatrices[:, :, 1],
        None if rate_out is None else drate_out,
        None if rate_gate is None else drate_gate,
        *(None for _ in ctx.numbers),
    )


_full_glu.register_autograd(_backward, setup_context=_save)


def full_glu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    rate_out: float | Tensor,
    rate_gate: float | Tensor,
    *,
    update_gate: bool,
    clip: bool,
    sign: float,
    squared: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Update a gated linear unit once from all keys and values, and read it with all queries.

    Differentiable in every tensor, also through the new weights.

    Args:
        q: queries `[B, Tq, H, Dk]`, float16, bfloat16 or float32.
        k: keys `[B, Tk, H, Dk]`, likewise, in a dtype of their own.
        v: values `[B, Tk, H, Dv]`, likewise.
        weight: the last layer, float32 `[H, Dk, Dv]` or `[B, H, Dk, Dv]`.
        gate: the gate, likewise; None for one linear layer.
        rate_out: the last layer's learning rate, a number or float32 `[B, Tk, H]`, zero for tokens that do not write.
        rate_gate: the gate's, likewise; only read where the gate is updated.
        update_gate: the gate is updated too; it has to be there.
        clip: divide each column of an update by its norm plus one.
        sign: 1 for descent, -1 for ascent.
        squared: the squared error, whose `g` is `v - f(k)`; else the dot product, whose `g` is `v`.

    Returns:
        Outputs `[B, Tq, H, Dv]` in q's dtype, the new weight and the new gate, float32 `[B, H, Dk, Dv]` (a view of `gate`
        where that is not updated, None where there is none).

    Raises:
        ValueError: widths or dtypes that `covers` refuses, or `update_gate` without a gate.
    """
    dtypes = (q.dtype, k.dtype, v.dtype)
    if not covers(q.shape[3], v.shape[3], *dtypes):
        raise ValueError(
            f"q, k and v must have heads of at most {MAX_WIDTH} channels in float16, bfloat16 or float32; got widths "
            f"{q.shape[3]} and {v.shape[3]} in {', '.join(map(str, dtypes))}"
        )
    if update_gate and gate is None:
        raise ValueError("update_gate must be False where gate is None")
    shape = (q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    weight = weight.expand(shape)
    gate = None if gate is None else gate.expand(shape)
    rates = [rate if isinstance(rate, Tensor) else None for rate in (rate_out, rate_gate if update_gate else 0.0)]
    scales = [1.0 if isinstance(rate, Tensor) else float(rate) for rate in (rate_out, rate_gate)]
    o, new, newg, _ = _full_glu(q, k, v, weight, gate, *rates, *scales, update_gate, clip, float(sign), squared)
    return o, new, newg if update_gate else gate
