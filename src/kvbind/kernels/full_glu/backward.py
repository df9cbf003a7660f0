"""The backward kernel: the reads' gradient, through the update, to keys, values, rates and the starting weights."""

import triton
import triton.language as tl

from kvbind.kernels.common.activations import activate, slope
from kvbind.kernels.full_glu.tiles import READ, WRITE, add_back, add_write, matrix_tile, narrowed, rate_column, token_tile
from kvbind.kernels.full_glu.weight_update import enter_backward


@triton.jit(do_not_specialize=["heads", "writers", "readers", "write_span", "read_span", "ro_batch", "rg_batch"])
def backward_kernel(
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
    """A sequence and head, or a part of its tokens: reads first, then writes."""
    program, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, head = program // heads, program % heads
    norms += program * (2 if UPDATE_GATE else 1) * DV
    w_at, w_there = matrix_tile(w + batch * w_batch + head * w_head, w_row, DK, DV, BK, BV)
    wg_at, w_there = matrix_tile(wg + batch * wg_batch + head * wg_head, wg_row, DK, DV, BK, BV)
    new_at, w_there = matrix_tile(new + program * DK * DV, DV, DK, DV, BK, BV)
    newg_at, w_there = matrix_tile(newg + program * DK * DV, DV, DK, DV, BK, BV)
    # the matrices side by side that a program, or a part of it, has the gradients of
    MATRICES: tl.constexpr = 2 if GATE else 1
    flat, w_there = matrix_tile(0, DV, DK, DV, BK, BV)
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
        wn, ws = narrowed(tl.load(new_at, mask=w_there, other=0.0), q.dtype.element_ty)
        if UPDATE_GATE:
            gn, gs = narrowed(tl.load(newg_at, mask=w_there, other=0.0), q.dtype.element_ty)
        elif GATE:
            gn, gs = narrowed(tl.load(wg_at, mask=w_there, other=0.0), q.dtype.element_ty)
        for t in range(start, stop, BT):
            q_at, q_there = token_tile(q, t, stop, q_row, DK, BT, BK)
            do_at, do_there = token_tile(do, t, stop, do_row, DV, BT, BV)
            qt = tl.load(q_at, mask=q_there, other=0.0)
            dy = tl.load(do_at, mask=do_there, other=0.0).to(tl.float32)
            dqt = tl.zeros((BT, BK), tl.float32)
            if GATE:
                y = ws * tl.dot(qt, wn, input_precision=PRECISION_Q)
                p = gs * tl.dot(qt, gn, input_precision=PRECISION_Q)
                dp = dy * y * slope(p, "silu")
                dy *= activate(p, "silu")
                dqt = add_back(dqt, dp, gn, gs, PRECISION_Q)
                accg = add_write(accg, qt, dp, PRECISION_Q)
            dqt = add_back(dqt, dy, wn, ws, PRECISION_Q)
            acc = add_write(acc, qt, dy, PRECISION_Q)
            dq_at, q_there = token_tile(dq, t, stop, heads * DK, DK, BT, BK)
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
            d = enter_backward(acc, old, entered, sign, scale_out, norms, 0, CLIP, DV, BV)
        dn, ds = narrowed(d, k.dtype.element_ty)
        if UPDATE_GATE or SQUARED:
            wn, ws = narrowed(tl.load(w_at, mask=w_there, other=0.0), k.dtype.element_ty)
        if GATE:
            if STAGE == WRITE:
                accg = tl.load(dread + pair_at + DK * DV, mask=first, other=0.0)
            elif NEWG_USED:
                accg += tl.load(dnewg + flat, mask=w_there, other=0.0)
            gn, gs = narrowed(tl.load(wg_at, mask=w_there, other=0.0), k.dtype.element_ty)
        if UPDATE_GATE:
            if STAGE == WRITE:
                d = tl.load(dupdate + pair_at + DK * DV, mask=w_there, other=0.0)
            else:
                old = tl.load(wg_at, mask=w_there, other=0.0)
                entered = tl.load(newg_at, mask=w_there, other=0.0)
                d = enter_backward(accg, old, entered, sign, scale_gate, norms + DV, 0, CLIP, DV, BV)
            dgn, dgs = narrowed(d, k.dtype.element_ty)

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
            k_at, k_there = token_tile(k, t, stop, k_row, DK, BT, BK)
            v_at, v_there = token_tile(v, t, stop, v_row, DV, BT, BV)
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
                rate = rate_column(rate_out, t, stop, ro_row, BT)
                tl.store(drate_out + tokens * heads, tl.sum(x * e, axis=1), mask=tokens < stop)
                x *= rate
                e *= rate
            dkt = add_back(dkt, x, dn, ds, PRECISION_K)
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
                    rate = rate_column(rate_gate, t, stop, rg_row, BT)
                    tl.store(drate_gate + tokens * heads, tl.sum(x * e, axis=1), mask=tokens < stop)
                    x *= rate
                    e *= rate
                dkt = add_back(dkt, x, dgn, dgs, PRECISION_K)
                dgt += e * z * slope(u, "silu")
                dz = e * g * slope(u, "silu")
                du += e * g * z * curve
            dv_at, v_there = token_tile(dv, t, stop, heads * DV, DV, BT, BV)
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
                dkt = add_back(dkt, dz, wn, ws, PRECISION_K)
                acc = add_write(acc, kt, dz, PRECISION_K)
            if GATE:
                dkt = add_back(dkt, du, gn, gs, PRECISION_K)
                accg = add_write(accg, kt, du, PRECISION_K)
            dk_at, k_there = token_tile(dk, t, stop, heads * DK, DK, BT, BK)
            tl.store(dk_at, dkt.to(dk.dtype.element_ty), mask=k_there)
        tl.store(dw + part_at, acc, mask=w_there)
        if GATE:
            tl.store(dw + part_at + DK * DV, accg, mask=w_there)
