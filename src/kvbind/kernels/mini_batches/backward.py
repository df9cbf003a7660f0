"""The backward pass over mini-batches, from the last to the first: a program for each sequence and head.

Kept for it are the operands and the state before every so many mini-batches, a *stretch*. Stretch after stretch, `states`
walks through it once more, and then this goes back with the state's gradient in registers. Gradients are closed-form; those
of reads and steps are the same for both layers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvbind.kernels.common.activations import activate, curvature, slope
from kvbind.kernels.mini_batches.parts import (
    across,
    descent,
    kept_state,
    load_state,
    normalized,
    product,
    rates_of,
    read_layer,
    rows_of,
    scores_of,
    shares_of,
    store_rows,
    store_state,
)


@triton.jit
def _layer_gradients(
    x, asked, features, matrix, bias, buffer, bias_buffer, scores, written, shifted,
    seen, end, on_state, on_buffer, state_left, buffer_in_state, entering, buffer_left,
    grad, bias_grad, buffer_grad, bias_buffer_grad, sees, rows,
    SIZE: tl.constexpr, BIAS: tl.constexpr, OWN: tl.constexpr, FLOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Through a layer's read and step, from the gradients `x` of what was read and `grad`, ... of the layer behind them.

    Returns:
        Gradients of `asked`, `features`, `written` and `shifted`, of the layer and its buffer before the mini-batch; of
        `seen`, `end` (for each token), `on_state`, `on_buffer` (both as reads take them), `entering`, and of what is left of
        the state, of the buffer in the state and of the buffer.
    """
    low = asked.dtype
    low_x, low_grad = x.to(low), grad.to(low)
    spread = (seen * scores).to(low)
    pairs = product(low_x, tl.trans(written.to(low)), PRECISION)
    d_seen = tl.where(sees, pairs * scores, 0.0)
    d_scores = (seen * pairs).to(low)
    x_state = x
    if FLOW >= 2:
        x_state = on_state[:, None] * x
    low_state = x_state.to(low)
    d_asked = product(d_scores, features, PRECISION) + product(low_state, tl.trans(matrix), PRECISION)
    d_features = product(tl.trans(d_scores), asked, PRECISION)
    d_features += product((end * written).to(low), tl.trans(low_grad), PRECISION)
    drawn = product(features, low_grad, PRECISION)
    if BIAS and not OWN:
        drawn += bias_grad[None, :]
    d_written = product(tl.trans(spread), low_x, PRECISION) + end * drawn
    d_end = tl.sum(written * drawn, 1)
    d_shifted = d_written
    if OWN:
        d_shifted = product(tl.trans(seen.to(low)), low_x, PRECISION) + end * bias_grad[None, :]
        d_seen += tl.where(sees, product(low_x, tl.trans(shifted.to(low)), PRECISION), 0.0)
        d_end += tl.sum(shifted * bias_grad[None, :], 1)
    d_on_state, d_on_buffer, d_entering = d_end, d_end, d_end
    d_left = tl.sum(d_end, 0)
    d_buffer_in_state, d_buffer_left = d_left, d_left
    if FLOW >= 2:
        d_on_state = tl.sum(x * (product(asked, matrix, PRECISION) + bias[None, :]), 1)
        d_left = tl.sum(tl.sum(matrix.to(tl.float32) * grad, 1), 0)
        if BIAS:
            d_left += tl.sum(bias * bias_grad, 0)
    if FLOW == 3:
        d_on_buffer = tl.sum(x * (product(asked, buffer, PRECISION) + bias_buffer[None, :]), 1)
        wide_buffer = buffer.to(tl.float32)
        d_buffer_in_state = tl.sum(tl.sum(wide_buffer * grad, 1), 0)
        d_buffer_left = tl.sum(tl.sum(wide_buffer * buffer_grad, 1), 0)
        low_buffer_grad = buffer_grad.to(low)
        x_buffer = on_buffer[:, None] * x
        d_asked += product(x_buffer.to(low), tl.trans(buffer), PRECISION)
        drawn = product(features, low_buffer_grad, PRECISION)
        if BIAS and not OWN:
            drawn += bias_buffer_grad[None, :]
        d_written += entering[:, None] * drawn
        d_entering = tl.sum(written * drawn, 1)
        d_features += product((entering[:, None] * written).to(low), tl.trans(low_buffer_grad), PRECISION)
        if OWN:
            d_shifted += entering[:, None] * bias_buffer_grad[None, :]
            d_entering += tl.sum(shifted * bias_buffer_grad[None, :], 1)
        if BIAS:
            d_buffer_in_state += tl.sum(bias_buffer * bias_grad, 0)
            d_buffer_left += tl.sum(bias_buffer * bias_buffer_grad, 0)
            bias_buffer_grad = buffer_in_state * bias_grad + buffer_left * bias_buffer_grad + tl.sum(x_buffer, 0)
        buffer_grad = buffer_in_state * grad + buffer_left * buffer_grad
        buffer_grad += product(tl.trans(asked), x_buffer.to(low), PRECISION)
    if FLOW >= 2:
        grad = state_left * grad
    grad += product(tl.trans(asked), low_state, PRECISION)
    if BIAS:
        if FLOW >= 2:
            bias_grad = state_left * bias_grad
        bias_grad += tl.sum(x_state, 0)
    return (
        d_asked, d_features, d_written, d_shifted, grad, bias_grad, buffer_grad, bias_buffer_grad,
        d_seen, d_end, d_on_state, d_on_buffer, d_entering, d_left, d_buffer_in_state, d_buffer_left,
    )  # fmt: skip


@triton.jit
def _store_shares(
    d_flow, first, heads, rows, inside, d_seen, d_end, d_on_state, d_on_buffer, d_entering, d_left, d_buffer_in_state,
    d_buffer_left, SIZE: tl.constexpr, FLOW: tl.constexpr,
):  # fmt: skip
    """The gradient of what `shares_of` reads."""
    final = rows == SIZE - 1
    if FLOW == 1:
        total = tl.sum(d_seen, 1) + tl.where(final, tl.sum(d_end, 0), 0.0)
        tl.store(d_flow + (first + rows) * heads, total, mask=inside)
    if FLOW >= 2:
        WIDTH: tl.constexpr = SIZE + 1 if FLOW == 2 else SIZE + 4
        place = d_flow + (first + rows) * heads * WIDTH
        d_seen += tl.where(final[:, None], d_end[None, :], 0.0)
        tl.store(place[:, None] + rows[None, :], d_seen, mask=inside[:, None] & inside[None, :])
        tl.store(place + SIZE, d_on_state + tl.where(final, d_left, 0.0), mask=inside)
    if FLOW == 3:
        tl.store(place + SIZE + 1, d_on_buffer + tl.where(final, d_buffer_in_state, 0.0), mask=inside)
        tl.store(place + SIZE + 2, d_entering, mask=inside)
        tl.store(place + SIZE + 3, tl.where(final, d_buffer_left, 0.0), mask=inside)


@triton.jit(do_not_specialize=["tokens", "first", "count"])
def backward_kernel(
    d_out, q, k, v, rates, head, flow, room, bias_room, dq, dk, dv, d_state, d_rates, d_head, d_flow,
    tokens, heads, first, count, eps,
    SIZE: tl.constexpr, L: tl.constexpr, DK: tl.constexpr, DH: tl.constexpr, DV: tl.constexpr, ACTIVATION: tl.constexpr,
    BIAS: tl.constexpr, OWN: tl.constexpr, RATES: tl.constexpr, FLOW: tl.constexpr, HEAD: tl.constexpr,
    SQUARED: tl.constexpr, IN_LOSS: tl.constexpr, IN_READ: tl.constexpr, RESIDUAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`count` mini-batches from `first` on, the last one first; `d_state` enters as that of the state behind them."""
    z_place = tl.program_id(0).to(tl.int64)
    batch, its_head = z_place // heads, z_place % heads
    rows, keys, values = tl.arange(0, L), tl.arange(0, DK), tl.arange(0, DV)
    inside = rows < SIZE
    sees = (rows[:, None] >= rows[None, :]) & inside[None, :]
    low = q.dtype.element_ty
    PLUS: tl.constexpr = BIAS and not OWN
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
    v += first_token * DV
    dq += first_token * DK
    dk += first_token * DK
    dv += first_token * DV
    d_out += first_token * DV
    rates += first_token * RATES
    d_rates += first_token * RATES
    flow += first_token * FLOWS
    d_flow += first_token * FLOWS
    d_state += z_place * WHOLE
    gain, shift = tl.zeros((DV,), tl.float32), tl.zeros((DV,), tl.float32)
    if HEAD:
        head += z_place * 2 * DV
        gain, shift = tl.load(head + values), tl.load(head + DV + values)
    gain_grad, shift_grad = tl.zeros((DV,), tl.float32), tl.zeros((DV,), tl.float32)
    room += z_place * count * MATRICES
    bias_room += z_place * count * BIASES
    grad, bias_grad, m_grad, bm_grad, grad1, bias_grad1, m_grad1, bm_grad1 = load_state(d_state, DK, DH, DV, BIAS, FLOW)
    for back in range(count):
        i = count - 1 - back
        at = (first + i) * SIZE
        read, b, m_read, bm, read1, b1, m_read1, bm1 = kept_state(
            room + i * MATRICES, bias_room + i * BIASES, DK, DH, DV, BIAS, FLOW
        )
        its_q = rows_of(q, at, heads * DK, rows, keys, inside)
        its_k = rows_of(k, at, heads * DK, rows, keys, inside)
        its_v = rows_of(v, at, heads * DV, rows, values, inside)
        d_y = rows_of(d_out, at, heads * DV, rows, values, inside).to(tl.float32)
        rate, bias_rate = rates_of(rates, at, heads, rows, inside, RATES, MINE, OWN)
        seen, end, on_state, on_buffer, state_left, buffer_in_state, entering, buffer_left = shares_of(
            flow, at, heads, rows, inside, sees, SIZE, FLOW
        )

        # forward: what tokens write, and what queries read
        asked, features = its_q, its_k
        if DH:
            u = product(its_k, read1, PRECISION) + b1[None, :]
            features = activate(u, ACTIVATION).to(low)
        z = product(features, read, PRECISION) + b[None, :]
        d, g, y, deviation = descent(its_k, its_v, z, gain, shift, eps, SQUARED, IN_LOSS, RESIDUAL, DV)
        written, shifted = rate[:, None] * d, bias_rate[:, None] * d
        if DH:
            rate1, bias_rate1 = rates_of(rates, at, heads, rows, inside, RATES, 0, OWN)
            error1 = product(d.to(low), tl.trans(read), PRECISION)
            slope1 = slope(u, ACTIVATION)
            d1 = error1 * slope1
            written1, shifted1 = rate1[:, None] * d1, bias_rate1[:, None] * d1
            scores1 = scores_of(its_q, its_k, sees, PLUS, PRECISION)
            u_asked = read_layer(
                its_q, read1, b1, m_read1, bm1, scores1, written1.to(low), shifted1, seen, on_state, on_buffer,
                OWN, FLOW, PRECISION,
            )  # fmt: skip
            asked = activate(u_asked, ACTIVATION).to(low)
        scores = scores_of(asked, features, sees, PLUS, PRECISION)

        # through the head that outputs pass
        d_z = d_y
        if IN_READ:
            z_asked = read_layer(
                asked, read, b, m_read, bm, scores, written.to(low), shifted, seen, on_state, on_buffer,
                OWN, FLOW, PRECISION,
            )  # fmt: skip
            y_asked, its_deviation = normalized(z_asked, eps, DV)
            gain_grad += tl.sum(d_y * y_asked, 0)
            shift_grad += tl.sum(d_y, 0)
            d_z = across(d_y * gain[None, :], y_asked, DV) / its_deviation[:, None]

        # through reads and the state's step to what tokens write, layer by layer
        (
            d_asked, d_features, d_written, d_shifted, grad, bias_grad, m_grad, bm_grad,
            d_seen, d_end, d_on_state, d_on_buffer, d_entering, d_left, d_buffer_in_state, d_buffer_left,
        ) = _layer_gradients(
            d_z, asked, features, read, b, m_read, bm, scores, written, shifted,
            seen, end, on_state, on_buffer, state_left, buffer_in_state, entering, buffer_left,
            grad, bias_grad, m_grad, bm_grad, sees, rows, SIZE, BIAS, OWN, FLOW, PRECISION,
        )  # fmt: skip
        d_d = rate[:, None] * d_written
        d_rate = tl.sum(d * d_written, 1)
        if OWN:
            d_d += bias_rate[:, None] * d_shifted
            tl.store(d_rates + (at + rows) * heads * RATES + RATES // 2 + MINE, tl.sum(d * d_shifted, 1), mask=inside)
        tl.store(d_rates + (at + rows) * heads * RATES + MINE, d_rate, mask=inside)
        d_q, d_k = d_asked, d_features
        if DH:
            (
                d_q, d_k, d_written1, d_shifted1, grad1, bias_grad1, m_grad1, bm_grad1,
                d_seen1, d_end1, d_on_state1, d_on_buffer1, d_entering1, d_left1, d_buffer_in_state1, d_buffer_left1,
            ) = _layer_gradients(
                d_asked * slope(u_asked, ACTIVATION), its_q, its_k, read1, b1, m_read1, bm1, scores1, written1, shifted1,
                seen, end, on_state, on_buffer, state_left, buffer_in_state, entering, buffer_left,
                grad1, bias_grad1, m_grad1, bm_grad1, sees, rows, SIZE, BIAS, OWN, FLOW, PRECISION,
            )  # fmt: skip
            d_seen, d_end, d_left = d_seen + d_seen1, d_end + d_end1, d_left + d_left1
            d_on_state, d_on_buffer, d_entering = (
                d_on_state + d_on_state1,
                d_on_buffer + d_on_buffer1,
                d_entering + d_entering1,
            )
            d_buffer_in_state, d_buffer_left = d_buffer_in_state + d_buffer_in_state1, d_buffer_left + d_buffer_left1
            d_d1 = rate1[:, None] * d_written1
            d_rate1 = tl.sum(d1 * d_written1, 1)
            if OWN:
                d_d1 += bias_rate1[:, None] * d_shifted1
                tl.store(d_rates + (at + rows) * heads * RATES + RATES // 2, tl.sum(d1 * d_shifted1, 1), mask=inside)
            tl.store(d_rates + (at + rows) * heads * RATES, d_rate1, mask=inside)
            # from the hidden layer's writes back to the last layer
            low_error = (d_d1 * slope1).to(low)
            d_u = d_d1 * error1 * curvature(u, ACTIVATION)
            d_d += product(low_error, read, PRECISION)
            grad += product(tl.trans(low_error), d.to(low), PRECISION)
        _store_shares(
            d_flow, at, heads, rows, inside, d_seen, d_end, d_on_state, d_on_buffer, d_entering, d_left,
            d_buffer_in_state, d_buffer_left, SIZE, FLOW,
        )  # fmt: skip

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
        if IN_READ and RESIDUAL:
            d_q += d_y
        store_rows(dq, at, heads * DK, rows, keys, inside, d_q)
        store_rows(dk, at, heads * DK, rows, keys, inside, d_k)
    store_state(d_state, grad, bias_grad, m_grad, bm_grad, grad1, bias_grad1, m_grad1, bm_grad1, DK, DH, DV, BIAS, FLOW)
    if HEAD:
        d_head += z_place * 2 * DV
        tl.store(d_head + values, tl.load(d_head + values) + gain_grad)
        tl.store(d_head + DV + values, tl.load(d_head + DV + values) + shift_grad)
