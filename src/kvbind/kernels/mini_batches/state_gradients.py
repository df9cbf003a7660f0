"""Gradients of the state's steps, from the last mini-batch to the first: a program for each sequence and head.

The state's gradient is in registers; those of reads, which do not ask for it, are there from `read_gradients`. All are
closed-form.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvbind.kernels.mini_batches.parts import (
    across,
    kept_state,
    load_rows,
    load_state,
    product,
    rates_of,
    rows_of,
    shares_of,
    store_rows,
    store_state,
)


@triton.jit
def _through_step(
    features, written, shifted, d_features, d_written, d_shifted, matrix, bias, buffer, bias_buffer,
    end, state_left, buffer_in_state, entering, buffer_left, grad, bias_grad, buffer_grad, bias_buffer_grad,
    BIAS: tl.constexpr, OWN: tl.constexpr, FLOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Through a layer's step, from the gradients of the layer behind it: added to those of what it was made of.

    Returns:
        Gradients of `features`, `written` and `shifted`; of the layer and its buffer before the mini-batch, as far as these
        are in those behind it; of `end` and `entering`, for each token; of `state_left`, `buffer_in_state`, `buffer_left`.
    """
    low = features.dtype
    low_grad = grad.to(low)
    drawn = product(features, low_grad, PRECISION)
    if BIAS and not OWN:
        drawn += bias_grad[None, :]
    d_written += end * drawn
    d_end = tl.sum(written * drawn, 1)
    d_features += product((end * written).to(low), tl.trans(low_grad), PRECISION)
    if OWN:
        d_shifted += end * bias_grad[None, :]
        d_end += tl.sum(shifted * bias_grad[None, :], 1)
    d_entering, d_left = d_end, tl.sum(d_end, 0)
    d_buffer_in_state, d_buffer_left = d_left, d_left
    if FLOW >= 2:
        # over both axes at once: of products one after the other does not compile for capability 10.0 (Triton 3.6, 3.7)
        d_left = tl.sum(matrix.to(tl.float32) * grad)
        if BIAS:
            d_left += tl.sum(bias * bias_grad, 0)
    if FLOW == 3:
        low_buffer_grad, wide_buffer = buffer_grad.to(low), buffer.to(tl.float32)
        drawn = product(features, low_buffer_grad, PRECISION)
        if BIAS and not OWN:
            drawn += bias_buffer_grad[None, :]
        d_written += entering[:, None] * drawn
        d_entering = tl.sum(written * drawn, 1)
        d_features += product((entering[:, None] * written).to(low), tl.trans(low_buffer_grad), PRECISION)
        if OWN:
            d_shifted += entering[:, None] * bias_buffer_grad[None, :]
            d_entering += tl.sum(shifted * bias_buffer_grad[None, :], 1)
        d_buffer_in_state = tl.sum(wide_buffer * grad)
        d_buffer_left = tl.sum(wide_buffer * buffer_grad)
        if BIAS:
            d_buffer_in_state += tl.sum(bias_buffer * bias_grad, 0)
            d_buffer_left += tl.sum(bias_buffer * bias_buffer_grad, 0)
            bias_buffer_grad = buffer_in_state * bias_grad + buffer_left * bias_buffer_grad
        buffer_grad = buffer_in_state * grad + buffer_left * buffer_grad
    if FLOW >= 2:
        grad = state_left * grad
        if BIAS:
            bias_grad = state_left * bias_grad
    return (
        d_features, d_written, d_shifted, grad, bias_grad, buffer_grad, bias_buffer_grad,
        d_end, d_entering, d_left, d_buffer_in_state, d_buffer_left,
    )  # fmt: skip


@triton.jit
def _from_reads(grad, bias_grad, asked, x, BIAS: tl.constexpr, PRECISION: tl.constexpr):
    """Gradients of a layer with those of what `asked` read of it."""
    grad += product(tl.trans(asked), x, PRECISION)
    if BIAS:
        bias_grad += tl.sum(x.to(tl.float32), 0)
    return grad, bias_grad


@triton.jit
def _add_shares(
    d_flow, first, heads, rows, inside, d_end, d_entering, d_left, d_buffer_in_state, d_buffer_left,
    SIZE: tl.constexpr, FLOW: tl.constexpr,
):  # fmt: skip
    """Add to the gradient of what `shares_of` reads, that of the state behind the mini-batch, which its last token sees."""
    if FLOW == 1:
        place = d_flow + (first + SIZE - 1) * heads
        tl.store(place, tl.load(place) + tl.sum(d_end, 0))
    if FLOW >= 2:
        WIDTH: tl.constexpr = SIZE + 1 if FLOW == 2 else SIZE + 4
        place = d_flow + (first + SIZE - 1) * heads * WIDTH
        tl.store(place + rows, tl.load(place + rows, mask=inside, other=0.0) + d_end, mask=inside)
        tl.store(place + SIZE, tl.load(place + SIZE) + d_left)
    if FLOW == 3:
        tl.store(place + SIZE + 1, tl.load(place + SIZE + 1) + d_buffer_in_state)
        each = d_flow + (first + rows) * heads * WIDTH
        tl.store(each + SIZE + 2, d_entering, mask=inside)
        tl.store(each + SIZE + 3, tl.where(rows == SIZE - 1, d_buffer_left, 0.0), mask=inside)


@triton.jit(do_not_specialize=["tokens", "first", "count"])
def state_gradients_kernel(
    q, k, rates, head, flow, room, bias_room, wide, narrow, dk, dv, d_state, d_rates, d_head, d_flow,
    tokens, heads, first, count, eps,
    SIZE: tl.constexpr, L: tl.constexpr, DK: tl.constexpr, DH: tl.constexpr, DV: tl.constexpr, ACTIVATION: tl.constexpr,
    BIAS: tl.constexpr, OWN: tl.constexpr, RATES: tl.constexpr, FLOW: tl.constexpr, HEAD: tl.constexpr,
    SQUARED: tl.constexpr, IN_LOSS: tl.constexpr, IN_READ: tl.constexpr, RESIDUAL: tl.constexpr, WIDE: tl.constexpr,
    NARROW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`count` mini-batches from `first` on, the last one first; `d_state` enters as that of the state behind them."""
    z_place = tl.program_id(0).to(tl.int64)
    batch, its_head = z_place // heads, z_place % heads
    rows, keys, values = tl.arange(0, L), tl.arange(0, DK), tl.arange(0, DV)
    inside = rows < SIZE
    sees = (rows[:, None] >= rows[None, :]) & inside[None, :]
    low = q.dtype.element_ty
    DF: tl.constexpr = DH if DH else DK
    BUFFERS: tl.constexpr = 2 if FLOW == 3 else 1
    MATRICES: tl.constexpr = (DK * DH + DF * DV) * BUFFERS
    BIASES: tl.constexpr = (DH + DV) * BUFFERS
    WHOLE: tl.constexpr = MATRICES + BIASES * BIAS
    FLOWS: tl.constexpr = 0 if FLOW == 0 else 1 if FLOW == 1 else SIZE + 1 if FLOW == 2 else SIZE + 4
    MINE: tl.constexpr = 1 if DH else 0
    first_token = batch * tokens * heads + its_head
    q += first_token * DK
    k += first_token * DK
    dk += first_token * DK
    dv += first_token * DV
    rates += first_token * RATES
    d_rates += first_token * RATES
    flow += first_token * FLOWS
    d_flow += first_token * FLOWS
    d_state += z_place * WHOLE
    room += z_place * count * MATRICES
    bias_room += z_place * count * BIASES
    wide += z_place * count * WIDE
    narrow += z_place * count * NARROW
    gain = tl.zeros((DV,), tl.float32)
    if HEAD:
        gain = tl.load(head + z_place * 2 * DV + values)
    gain_grad, shift_grad = tl.zeros((DV,), tl.float32), tl.zeros((DV,), tl.float32)
    grad, bias_grad, m_grad, bm_grad, grad1, bias_grad1, m_grad1, bm_grad1 = load_state(d_state, DK, DH, DV, BIAS, FLOW)
    for back in range(count):
        i = count - 1 - back
        at = (first + i) * SIZE
        read, b, m_read, bm, read1, b1, m_read1, bm1 = kept_state(
            room + i * MATRICES, bias_room + i * BIASES, DK, DH, DV, BIAS, FLOW
        )
        its_wide, its_narrow = wide + i * WIDE, narrow + i * NARROW
        of_keys = its_wide + 5 * L * DV
        of_hidden = of_keys + L * DK
        of_rest = of_hidden + 6 * L * DH
        its_q = rows_of(q, at, heads * DK, rows, keys, inside)
        its_k = rows_of(k, at, heads * DK, rows, keys, inside)
        rate, bias_rate = rates_of(rates, at, heads, rows, inside, RATES, MINE, OWN)
        _, end, _, _, state_left, buffer_in_state, entering, buffer_left = shares_of(
            flow, at, heads, rows, inside, sees, SIZE, FLOW
        )
        d, g, y = load_rows(its_wide, L, DV), load_rows(its_wide + L * DV, L, DV), load_rows(its_wide + 2 * L * DV, L, DV)
        deviation = tl.load(of_rest + rows)
        gain_grad += tl.load(of_rest + L + values)
        shift_grad += tl.load(of_rest + L + DV + values)
        d_written = load_rows(its_wide + 3 * L * DV, L, DV)
        d_shifted = d_written
        if OWN:
            d_shifted = load_rows(its_wide + 4 * L * DV, L, DV)
        d_k = load_rows(of_keys, L, DK)
        asked, features, d_features = its_q, its_k, d_k
        written, shifted = rate[:, None] * d, bias_rate[:, None] * d
        if DH:
            slope1, d1 = load_rows(of_hidden, L, DH), load_rows(of_hidden + L * DH, L, DH)
            asked = load_rows(its_narrow + 2 * L * DV, L, DH)
            features = load_rows(its_narrow + 2 * L * DV + L * DH, L, DH)
            d_features = load_rows(of_hidden + 4 * L * DH, L, DH)

        (
            d_features, d_written, d_shifted, grad, bias_grad, m_grad, bm_grad,
            d_end, d_entering, d_left, d_buffer_in_state, d_buffer_left,
        ) = _through_step(
            features, written, shifted, d_features, d_written, d_shifted, read, b, m_read, bm,
            end, state_left, buffer_in_state, entering, buffer_left, grad, bias_grad, m_grad, bm_grad,
            BIAS, OWN, FLOW, PRECISION,
        )  # fmt: skip
        if not DH:
            d_k = d_features
        grad, bias_grad = _from_reads(grad, bias_grad, asked, load_rows(its_narrow, L, DV), BIAS, PRECISION)
        if FLOW == 3:
            m_grad, bm_grad = _from_reads(m_grad, bm_grad, asked, load_rows(its_narrow + L * DV, L, DV), BIAS, PRECISION)
        d_d = rate[:, None] * d_written
        tl.store(d_rates + (at + rows) * heads * RATES + MINE, tl.sum(d * d_written, 1), mask=inside)
        if OWN:
            d_d += bias_rate[:, None] * d_shifted
            tl.store(d_rates + (at + rows) * heads * RATES + RATES // 2 + MINE, tl.sum(d * d_shifted, 1), mask=inside)
        if DH:
            rate1, bias_rate1 = rates_of(rates, at, heads, rows, inside, RATES, 0, OWN)
            d_written1 = load_rows(of_hidden + 3 * L * DH, L, DH)
            d_shifted1 = d_written1
            if OWN:
                d_shifted1 = load_rows(of_hidden + 5 * L * DH, L, DH)
            (
                d_k, d_written1, d_shifted1, grad1, bias_grad1, m_grad1, bm_grad1,
                d_end1, d_entering1, d_left1, d_buffer_in_state1, d_buffer_left1,
            ) = _through_step(
                its_k, rate1[:, None] * d1, bias_rate1[:, None] * d1, d_k, d_written1, d_shifted1, read1, b1, m_read1, bm1,
                end, state_left, buffer_in_state, entering, buffer_left, grad1, bias_grad1, m_grad1, bm_grad1,
                BIAS, OWN, FLOW, PRECISION,
            )  # fmt: skip
            x1 = its_narrow + 2 * L * DV + 2 * L * DH
            grad1, bias_grad1 = _from_reads(grad1, bias_grad1, its_q, load_rows(x1, L, DH), BIAS, PRECISION)
            if FLOW == 3:
                m_grad1, bm_grad1 = _from_reads(m_grad1, bm_grad1, its_q, load_rows(x1 + L * DH, L, DH), BIAS, PRECISION)
            d_end, d_entering, d_left = d_end + d_end1, d_entering + d_entering1, d_left + d_left1
            d_buffer_in_state, d_buffer_left = d_buffer_in_state + d_buffer_in_state1, d_buffer_left + d_buffer_left1
            d_d1 = rate1[:, None] * d_written1
            tl.store(d_rates + (at + rows) * heads * RATES, tl.sum(d1 * d_written1, 1), mask=inside)
            if OWN:
                d_d1 += bias_rate1[:, None] * d_shifted1
                tl.store(d_rates + (at + rows) * heads * RATES + RATES // 2, tl.sum(d1 * d_shifted1, 1), mask=inside)
            # from the hidden layer's writes back to the last layer
            low_error = (d_d1 * slope1).to(low)
            d_u = d_d1 * load_rows(of_hidden + 2 * L * DH, L, DH)
            d_d += product(low_error, read, PRECISION)
            grad += product(tl.trans(low_error), d.to(low), PRECISION)
        _add_shares(d_flow, at, heads, rows, inside, d_end, d_entering, d_left, d_buffer_in_state, d_buffer_left, SIZE, FLOW)

        # through the loss
        d_g = d_d
        d_norm = tl.zeros((L, DV), tl.float32)
        d_deviation = tl.zeros((L,), tl.float32)
        if IN_LOSS:
            pulled = g * gain[None, :]
            crossed = across(d_d, y, DV) / deviation[:, None]
            along, its_along = tl.sum(d_d * y, 1) / DV, tl.sum(pulled * y, 1) / DV
            d_norm = -(pulled * along[:, None] + d_d * its_along[:, None]) / deviation[:, None]
            d_deviation = -tl.sum(d_d * d, 1) / deviation
            gain_grad += tl.sum(crossed * g, 0)
            d_g = crossed * gain[None, :]
        if SQUARED and IN_LOSS:
            gain_grad -= tl.sum(d_g * y, 0)
            shift_grad -= tl.sum(d_g, 0)
            d_norm -= d_g * gain[None, :]
            if RESIDUAL:
                d_k -= d_g
        store_rows(dv, at, heads * DV, rows, values, inside, d_g)
        if SQUARED or IN_LOSS:
            d_before = -d_g
            if IN_LOSS:
                d_before = across(d_norm, y, DV) / deviation[:, None] + (d_deviation / DV)[:, None] * y
            low_before = d_before.to(low)
            grad += product(tl.trans(features), low_before, PRECISION)
            if BIAS:
                bias_grad += tl.sum(d_before, 0)
            back_in = product(low_before, tl.trans(read), PRECISION)
            if DH:
                d_features += back_in
            else:
                d_k += back_in
        if DH:
            d_u += d_features * slope1
            low_u = d_u.to(low)
            d_k += product(low_u, tl.trans(read1), PRECISION)
            grad1 += product(tl.trans(its_k), low_u, PRECISION)
            if BIAS:
                bias_grad1 += tl.sum(d_u, 0)
        store_rows(dk, at, heads * DK, rows, keys, inside, d_k)
    store_state(d_state, grad, bias_grad, m_grad, bm_grad, grad1, bias_grad1, m_grad1, bm_grad1, DK, DH, DV, BIAS, FLOW)
    if HEAD:
        d_head += z_place * 2 * DV
        tl.store(d_head + values, tl.load(d_head + values) + gain_grad)
        tl.store(d_head + DV + values, tl.load(d_head + DV + values) + shift_grad)
