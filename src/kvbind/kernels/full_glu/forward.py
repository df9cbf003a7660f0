"""The forward kernel: sum the update over tiles of tokens, enter it into the weights, and read them."""

import triton
import triton.language as tl

from kvbind.kernels.common.activations import activate, slope
from kvbind.kernels.full_glu.tiles import READ, WRITE, add_write, matrix_tile, narrowed, rate_column, token_tile
from kvbind.kernels.full_glu.weight_update import enter


@triton.jit(do_not_specialize=["heads", "writers", "readers", "write_span", "read_span", "ro_batch", "rg_batch"])
def forward_kernel(
    q, k, v, w, wg, rate_out, rate_gate, o, new, newg, norms, partial,
    scale_out, scale_gate, sign, heads, writers, readers, write_span, read_span,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    w_batch, w_head, w_row, wg_batch, wg_head, wg_row, ro_batch, ro_row, ro_head, rg_batch, rg_row, rg_head,
    STAGE: tl.constexpr, GATE: tl.constexpr, UPDATE_GATE: tl.constexpr, CLIP: tl.constexpr, SQUARED: tl.constexpr,
    RATED_OUT: tl.constexpr, RATED_GATE: tl.constexpr, PRECISION_K: tl.constexpr, PRECISION_Q: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """A sequence and head, or a part of its tokens: writes first, then reads."""
    program, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, head = program // heads, program % heads
    q += batch * q_batch + head * q_head
    o += batch * readers * heads * DV + head * DV
    norms += program * (2 if UPDATE_GATE else 1) * DV
    w_at, w_there = matrix_tile(w + batch * w_batch + head * w_head, w_row, DK, DV, BK, BV)
    wg_at, w_there = matrix_tile(wg + batch * wg_batch + head * wg_head, wg_row, DK, DV, BK, BV)
    new_at, w_there = matrix_tile(new + program * DK * DV, DV, DK, DV, BK, BV)
    newg_at, w_there = matrix_tile(newg + program * DK * DV, DV, DK, DV, BK, BV)

    if STAGE != READ:
        k += batch * k_batch + head * k_head
        v += batch * v_batch + head * v_head
        rate_out += batch * ro_batch + head * ro_head
        rate_gate += batch * rg_batch + head * rg_head
        start = part * write_span
        stop = tl.minimum(start + write_span, writers)
        if UPDATE_GATE or SQUARED:
            wn, ws = narrowed(tl.load(w_at, mask=w_there, other=0.0), k.dtype.element_ty)
        if GATE:
            gn, gs = narrowed(tl.load(wg_at, mask=w_there, other=0.0), k.dtype.element_ty)
        update = tl.zeros((BK, BV), tl.float32)
        updateg = tl.zeros((BK, BV), tl.float32)
        for t in range(start, stop, BT):
            k_at, k_there = token_tile(k, t, stop, k_row, DK, BT, BK)
            v_at, v_there = token_tile(v, t, stop, v_row, DV, BT, BV)
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
                x *= rate_column(rate_out, t, stop, ro_row, BT)
            update = add_write(update, kt, x, PRECISION_K)
            if UPDATE_GATE:
                x = g * z * slope(u, "silu")
                if RATED_GATE:
                    x *= rate_column(rate_gate, t, stop, rg_row, BT)
                updateg = add_write(updateg, kt, x, PRECISION_K)

        if STAGE == WRITE:
            MATRICES: tl.constexpr = 2 if UPDATE_GATE else 1
            at, w_there = matrix_tile(
                partial + (program * tl.num_programs(1) + part) * MATRICES * DK * DV, DV, DK, DV, BK, BV
            )
            tl.store(at, update * scale_out, mask=w_there)
            if UPDATE_GATE:
                tl.store(at + DK * DV, updateg * scale_gate, mask=w_there)
        else:
            # read anew, which costs less than keeping them in registers through the loop
            matrix = tl.load(w_at, mask=w_there, other=0.0)
            matrix = enter(matrix, update * scale_out, sign, norms, 0, CLIP, DV, BV)
            tl.store(new_at, matrix, mask=w_there)
            if GATE:
                gate = tl.load(wg_at, mask=w_there, other=0.0)
                if UPDATE_GATE:
                    gate = enter(gate, updateg * scale_gate, sign, norms + DV, 0, CLIP, DV, BV)
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
        wn, ws = narrowed(matrix, q.dtype.element_ty)
        if GATE:
            gn, gs = narrowed(gate, q.dtype.element_ty)
        for t in range(start, stop, BT):
            q_at, q_there = token_tile(q, t, stop, q_row, DK, BT, BK)
            qt = tl.load(q_at, mask=q_there, other=0.0)
            y = ws * tl.dot(qt, wn, input_precision=PRECISION_Q)
            if GATE:
                y *= activate(gs * tl.dot(qt, gn, input_precision=PRECISION_Q), "silu")
            o_at, o_there = token_tile(o, t, stop, heads * DV, DV, BT, BV)
            tl.store(o_at, y.to(o.dtype.element_ty), mask=o_there)
