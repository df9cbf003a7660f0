"""The backward pass over mini-batches, from the last to the first: a program for each sequence and head.

Kept for it are the operands and the state before every so many mini-batches, a *stretch*; a stretch is walked through
forward once more, for the states before each, then backward with the state's gradient in registers. Gradients are
closed-form; those of reads and steps are the same for both layers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvbind.kernels.common.activations import activate, curvature, slope
from kvbind.kernels.mini_batches.parts import (
    across,
    descent,
    load_bias,
    load_state,
    load_tile,
    normalized,
    product,
    rates_of,
    read_hidden,
    read_last,
    rows_of,
    scores_of,
    shares_of,
    step_hidden,
    step_last,
    store_bias,
    store_rows,
    store_state,
    store_tile,
    through,
)


@triton.jit
def _last_gradients(
    x, asked, features, matrix, bias, buffer, bias_buffer, scores, written, shifted,
    seen, end, on_state, on_buffer, state_left, buffer_in_state, entering, buffer_left,
    grad, low_grad, bias_grad, buffer_grad, low_buffer_grad, bias_buffer_grad, sees,
    DH: tl.constexpr, BIAS: tl.constexpr, OWN: tl.constexpr, FLOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Through the last layer's read and step, from the gradients `x` of what was read and `grad`, ... of the layer behind them.

    Returns:
        Gradients of `asked`, `features`, `written` and `shifted`, of the layer and its buffer before the mini-batch; of
        `seen`, `end`, `on_state`, `on_buffer` (both as reads take them), `entering`, and of what is left of the state, of
        the buffer in the state and of the buffer.
    """
    low = asked.dtype
    low_x = x.to(low)
    pairs = product(low_x, tl.trans(written.to(low)), PRECISION)
    d_seen = tl.where(sees, pairs * scores, 0.0)
    d_scores = (seen * pairs).to(low)
    x_state = x
    if FLOW >= 2:
        x_state = on_state[:, None] * x
    low_state = x_state.to(low)
    d_asked = product(matrix, tl.trans(low_state), PRECISION) + product(features, tl.trans(d_scores), PRECISION)
    d_features = product(low_grad, tl.trans((end[:, None] * written).to(low)), PRECISION)
    d_features += product(asked, d_scores, PRECISION)
    drawn = through(features, low_grad, DH, PRECISION)
    if BIAS and not OWN:
        drawn += bias_grad[None, :]
    d_written = product(tl.trans((seen * scores).to(low)), low_x, PRECISION) + end[:, None] * drawn
    d_end = tl.sum(written * drawn, 1)
    d_shifted = d_written
    if OWN:
        d_shifted = product(tl.trans(seen.to(low)), low_x, PRECISION) + end[:, None] * bias_grad[None, :]
        d_seen += tl.where(sees, product(low_x, tl.trans(shifted.to(low)), PRECISION), 0.0)
        d_end += tl.sum(shifted * bias_grad[None, :], 1)
    d_on_state, d_on_buffer, d_entering, d_left = d_end, d_end, d_end, tl.sum(d_end, 0)
    d_buffer_in_state, d_buffer_left = d_left, d_left
    if FLOW >= 2:
        d_on_state = tl.sum(x * (through(asked, matrix, DH, PRECISION) + bias[None, :]), 1)
        d_left = tl.sum(tl.sum(matrix.to(tl.float32) * grad, 1), 0)
        if BIAS:
            d_left += tl.sum(bias * bias_grad, 0)
    if FLOW == 3:
        d_on_buffer = tl.sum(x * (through(asked, buffer, DH, PRECISION) + bias_buffer[None, :]), 1)
        wide_buffer = buffer.to(tl.float32)
        d_buffer_in_state = tl.sum(tl.sum(wide_buffer * grad, 1), 0)
        d_buffer_left = tl.sum(tl.sum(wide_buffer * buffer_grad, 1), 0)
        x_buffer = on_buffer[:, None] * x
        d_asked += product(buffer, tl.trans(x_buffer.to(low)), PRECISION)
        drawn = through(features, low_buffer_grad, DH, PRECISION)
        if BIAS and not OWN:
            drawn += bias_buffer_grad[None, :]
        d_written += entering[:, None] * drawn
        d_entering = tl.sum(written * drawn, 1)
        d_features += product(low_buffer_grad, tl.trans((entering[:, None] * written).to(low)), PRECISION)
        if OWN:
            d_shifted += entering[:, None] * bias_buffer_grad[None, :]
            d_entering += tl.sum(shifted * bias_buffer_grad[None, :], 1)
        if BIAS:
            d_buffer_in_state += tl.sum(bias_buffer * bias_grad, 0)
            d_buffer_left += tl.sum(bias_buffer * bias_buffer_grad, 0)
            bias_buffer_grad = buffer_in_state * bias_grad + buffer_left * bias_buffer_grad + tl.sum(x_buffer, 0)
        buffer_grad = buffer_in_state * grad + buffer_left * buffer_grad
        buffer_grad += product(asked, x_buffer.to(low), PRECISION)
    if FLOW >= 2:
        grad = state_left * grad
    grad += product(asked, low_state, PRECISION)
    if BIAS:
        if FLOW >= 2:
            bias_grad = state_left * bias_grad
        bias_grad += tl.sum(x_state, 0)
    return (
        d_asked, d_features, d_written, d_shifted, grad, bias_grad, buffer_grad, bias_buffer_grad,
        d_seen, d_end, d_on_state, d_on_buffer, d_entering, d_left, d_buffer_in_state, d_buffer_left,
    )  # fmt: skip


@triton.jit
def _hidden_gradients(
    x, q, k, matrix, bias, buffer, bias_buffer, scores, written, shifted,
    seen, end, on_state, on_buffer, state_left, buffer_in_state, entering, buffer_left,
    grad, low_grad, bias_grad, buffer_grad, low_buffer_grad, bias_buffer_grad, sees,
    BIAS: tl.constexpr, OWN: tl.constexpr, FLOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As `_last_gradients`, of the hidden layer, with rows for channels and columns for tokens in what leaves it."""
    low = q.dtype
    low_x, low_written = x.to(low), written.to(low)
    pairs = product(tl.trans(low_x), low_written, PRECISION)
    d_seen = tl.where(sees, pairs * scores, 0.0)
    d_scores = (seen * pairs).to(low)
    x_state = x
    if FLOW >= 2:
        x_state = on_state[None, :] * x
    low_state = x_state.to(low)
    d_q = through(low_state, matrix, 1, PRECISION) + product(d_scores, k, PRECISION)
    d_k = through((end[None, :] * written).to(low), low_grad, 1, PRECISION)
    d_k += product(tl.trans(d_scores), q, PRECISION)
    drawn = product(low_grad, tl.trans(k), PRECISION)
    if BIAS and not OWN:
        drawn += bias_grad[:, None]
    d_written = product(low_x, (seen * scores).to(low), PRECISION) + end[None, :] * drawn
    d_end = tl.sum(written * drawn, 0)
    d_shifted = d_written
    if OWN:
        d_shifted = product(low_x, seen.to(low), PRECISION) + end[None, :] * bias_grad[:, None]
        d_seen += tl.where(sees, product(tl.trans(low_x), shifted.to(low), PRECISION), 0.0)
        d_end += tl.sum(shifted * bias_grad[:, None], 0)
    d_on_state, d_on_buffer, d_entering, d_left = d_end, d_end, d_end, tl.sum(d_end, 0)
    d_buffer_in_state, d_buffer_left = d_left, d_left
    if FLOW >= 2:
        d_on_state = tl.sum(x * (product(matrix, tl.trans(q), PRECISION) + bias[:, None]), 0)
        d_left = tl.sum(tl.sum(matrix.to(tl.float32) * grad, 1), 0)
        if BIAS:
            d_left += tl.sum(bias * bias_grad, 0)
    if FLOW == 3:
        d_on_buffer = tl.sum(x * (product(buffer, tl.trans(q), PRECISION) + bias_buffer[:, None]), 0)
        wide_buffer = buffer.to(tl.float32)
        d_buffer_in_state = tl.sum(tl.sum(wide_buffer * grad, 1), 0)
        d_buffer_left = tl.sum(tl.sum(wide_buffer * buffer_grad, 1), 0)
        x_buffer = on_buffer[None, :] * x
        d_q += through(x_buffer.to(low), buffer, 1, PRECISION)
        drawn = product(low_buffer_grad, tl.trans(k), PRECISION)
        if BIAS and not OWN:
            drawn += bias_buffer_grad[:, None]
        d_written += entering[None, :] * drawn
        d_entering = tl.sum(written * drawn, 0)
        d_k += through((entering[None, :] * written).to(low), low_buffer_grad, 1, PRECISION)
        if OWN:
            d_shifted += entering[None, :] * bias_buffer_grad[:, None]
            d_entering += tl.sum(shifted * bias_buffer_grad[:, None], 0)
        if BIAS:
            d_buffer_in_state += tl.sum(bias_buffer * bias_grad, 0)
            d_buffer_left += tl.sum(bias_buffer * bias_buffer_grad, 0)
            bias_buffer_grad = buffer_in_state * bias_grad + buffer_left * bias_buffer_grad + tl.sum(x_buffer, 1)
        buffer_grad = buffer_in_state * grad + buffer_left * buffer_grad
        buffer_grad += product(x_buffer.to(low), q, PRECISION)
    if FLOW >= 2:
        grad = state_left * grad
    grad += product(low_state, q, PRECISION)
    if BIAS:
        if FLOW >= 2:
            bias_grad = state_left * bias_grad
        bias_grad += tl.sum(x_state, 1)
    return (
        d_q, d_k, d_written, d_shifted, grad, bias_grad, buffer_grad, bias_buffer_grad,
        d_seen, d_end, d_on_state, d_on_buffer, d_entering, d_left, d_buffer_in_state, d_buffer_left,
    )  # fmt: skip


@triton.jit
def _keep(
    room, bias_room, w, b, m, bm, w1, b1, m1, bm1,
    DK: tl.constexpr, DH: tl.constexpr, DV: tl.constexpr, BIAS: tl.constexpr, FLOW: tl.constexpr,
):  # fmt: skip
    """Store a state as products read it, matrices in the dtype of operands."""
    DF: tl.constexpr = DH if DH else DK
    store_tile(room + DH * DK, w, DF, DV)
    store_bias(bias_room + DH, b, DV, BIAS)
    if DH:
        store_tile(room, w1, DH, DK)
        store_bias(bias_room, b1, DH, BIAS)
    if FLOW == 3:
        room, bias_room = room + DH * DK + DF * DV, bias_room + DH + DV
        store_tile(room + DH * DK, m, DF, DV)
        store_bias(bias_room + DH, bm, DV, BIAS)
        if DH:
            store_tile(room, m1, DH, DK)
            store_bias(bias_room, bm1, DH, BIAS)


@triton.jit
def _kept(
    room, bias_room, DK: tl.constexpr, DH: tl.constexpr, DV: tl.constexpr, BIAS: tl.constexpr, FLOW: tl.constexpr
):  # fmt: skip
    """What `_keep` stored, as `load_state` returns a state."""
    DF: tl.constexpr = DH if DH else DK
    w, b = load_tile(room + DH * DK, DF, DV), load_bias(bias_room + DH, DV, BIAS)
    m, bm, w1, b1, m1, bm1 = w, b, w, b, w, b
    if DH:
        w1, b1 = load_tile(room, DH, DK), load_bias(bias_room, DH, BIAS)
        m1, bm1 = w1, b1
    if FLOW == 3:
        room, bias_room = room + DH * DK + DF * DV, bias_room + DH + DV
        m, bm = load_tile(room + DH * DK, DF, DV), load_bias(bias_room + DH, DV, BIAS)
        if DH:
            m1, bm1 = load_tile(room, DH, DK), load_bias(bias_room, DH, BIAS)
    return w, b, m, bm, w1, b1, m1, bm1


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


@triton.jit(do_not_specialize=["tokens", "stretch", "stretches"])
def backward_kernel(
    d_out, q, k, v, rates, head, flow, starts, room, bias_room, dq, dk, dv, d_state, d_rates, d_head, d_flow,
    tokens, heads, stretch, stretches, eps,
    SIZE: tl.constexpr, L: tl.constexpr, DK: tl.constexpr, DH: tl.constexpr, DV: tl.constexpr, ACTIVATION: tl.constexpr,
    BIAS: tl.constexpr, OWN: tl.constexpr, RATES: tl.constexpr, FLOW: tl.constexpr, HEAD: tl.constexpr,
    SQUARED: tl.constexpr, IN_LOSS: tl.constexpr, IN_READ: tl.constexpr, RESIDUAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All mini-batches of a sequence and head, from the last to the first; `d_state` enters as that of the last state."""
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
    room += z_place * stretch * MATRICES
    bias_room += z_place * stretch * BIASES
    count = tokens // SIZE
    for s in range(stretches):
        begun = (stretches - 1 - s) * stretch
        ended = tl.minimum(begun + stretch, count)
        # forward once more, for the states before each mini-batch
        place = starts + (z_place * stretches + stretches - 1 - s) * WHOLE
        w, b, m, bm, w1, b1, m1, bm1 = load_state(place, DK, DH, DV, BIAS, FLOW)
        for n in range(begun, ended):
            spot, bias_spot = room + (n - begun) * MATRICES, bias_room + (n - begun) * BIASES
            _keep(spot, bias_spot, w, b, m, bm, w1, b1, m1, bm1, DK, DH, DV, BIAS, FLOW)
            at = n * SIZE
            its_k = rows_of(k, at, heads * DK, rows, keys, inside)
            its_v = rows_of(v, at, heads * DV, rows, values, inside)
            rate, bias_rate = rates_of(rates, at, heads, rows, inside, RATES, MINE, OWN)
            seen, end, on_state, on_buffer, state_left, buffer_in_state, entering, buffer_left = shares_of(
                flow, at, heads, rows, inside, sees, SIZE, FLOW
            )
            read, features = w.to(low), tl.trans(its_k)
            if DH:
                u = product(w1.to(low), features, PRECISION) + b1[:, None]
                features = activate(u, ACTIVATION).to(low)
            z = through(features, read, DH, PRECISION) + b[None, :]
            d, _, _, _ = descent(its_k, its_v, z, gain, shift, eps, SQUARED, IN_LOSS, RESIDUAL, DV)
            if DH:
                rate1, bias_rate1 = rates_of(rates, at, heads, rows, inside, RATES, 0, OWN)
                d1 = product(read, tl.trans(d.to(low)), PRECISION) * slope(u, ACTIVATION)
                w1, b1, m1, bm1 = step_hidden(
                    w1, b1, m1, bm1, its_k, rate1[None, :] * d1, bias_rate1[None, :] * d1, end, state_left,
                    buffer_in_state, entering, buffer_left, BIAS, FLOW, PRECISION,
                )  # fmt: skip
            w, b, m, bm = step_last(
                w, b, m, bm, features, rate[:, None] * d, bias_rate[:, None] * d, end, state_left, buffer_in_state,
                entering, buffer_left, BIAS, FLOW, PRECISION,
            )  # fmt: skip
        # other threads read what these have stored
        tl.debug_barrier()
        # between stretches gradients are in memory, to leave registers to the states
        grad, bias_grad, m_grad, bm_grad, grad1, bias_grad1, m_grad1, bm_grad1 = load_state(d_state, DK, DH, DV, BIAS, FLOW)
        low_grad, low_m_grad, low_grad1, low_m_grad1 = grad.to(low), m_grad.to(low), grad1.to(low), m_grad1.to(low)
        for back in range(ended - begun):
            n = ended - 1 - back
            at = n * SIZE
            spot, bias_spot = room + (n - begun) * MATRICES, bias_room + (n - begun) * BIASES
            read, b, m_read, bm, read1, b1, m_read1, bm1 = _kept(spot, bias_spot, DK, DH, DV, BIAS, FLOW)
            its_q = rows_of(q, at, heads * DK, rows, keys, inside)
            its_k = rows_of(k, at, heads * DK, rows, keys, inside)
            its_v = rows_of(v, at, heads * DV, rows, values, inside)
            d_y = rows_of(d_out, at, heads * DV, rows, values, inside).to(tl.float32)
            rate, bias_rate = rates_of(rates, at, heads, rows, inside, RATES, MINE, OWN)
            seen, end, on_state, on_buffer, state_left, buffer_in_state, entering, buffer_left = shares_of(
                flow, at, heads, rows, inside, sees, SIZE, FLOW
            )

            # forward: what tokens write, and what queries read
            asked, features = tl.trans(its_q), tl.trans(its_k)
            if DH:
                u = product(read1, features, PRECISION) + b1[:, None]
                features = activate(u, ACTIVATION).to(low)
            z = through(features, read, DH, PRECISION) + b[None, :]
            d, g, y, deviation = descent(its_k, its_v, z, gain, shift, eps, SQUARED, IN_LOSS, RESIDUAL, DV)
            written, shifted = rate[:, None] * d, bias_rate[:, None] * d
            if DH:
                rate1, bias_rate1 = rates_of(rates, at, heads, rows, inside, RATES, 0, OWN)
                error1 = product(read, tl.trans(d.to(low)), PRECISION)
                slope1 = slope(u, ACTIVATION)
                d1 = error1 * slope1
                written1, shifted1 = rate1[None, :] * d1, bias_rate1[None, :] * d1
                scores1 = scores_of(its_q, tl.trans(its_k), sees, PLUS, PRECISION)
                u_asked = read_hidden(
                    its_q, read1, b1, m_read1, bm1, scores1, written1, shifted1, seen, on_state, on_buffer,
                    OWN, FLOW, PRECISION,
                )  # fmt: skip
                asked = activate(u_asked, ACTIVATION).to(low)
            scores = scores_of(tl.trans(asked), features, sees, PLUS, PRECISION)

            # through the head that outputs pass
            d_z = d_y
            if IN_READ:
                z_asked = read_last(
                    asked, read, b, m_read, bm, scores, written, shifted, seen, on_state, on_buffer,
                    DH, OWN, FLOW, PRECISION,
                )  # fmt: skip
                y_asked, its_deviation = normalized(z_asked, eps, DV)
                gain_grad += tl.sum(d_y * y_asked, 0)
                shift_grad += tl.sum(d_y, 0)
                d_z = across(d_y * gain[None, :], y_asked, DV) / its_deviation[:, None]

            # through reads and the state's step to what tokens write, layer by layer
            (
                d_asked, d_features, d_written, d_shifted, grad, bias_grad, m_grad, bm_grad,
                d_seen, d_end, d_on_state, d_on_buffer, d_entering, d_left, d_buffer_in_state, d_buffer_left,
            ) = _last_gradients(
                d_z, asked, features, read, b, m_read, bm, scores, written, shifted,
                seen, end, on_state, on_buffer, state_left, buffer_in_state, entering, buffer_left,
                grad, low_grad, bias_grad, m_grad, low_m_grad, bm_grad, sees, DH, BIAS, OWN, FLOW, PRECISION,
            )  # fmt: skip
            d_d = rate[:, None] * d_written
            d_rate = tl.sum(d * d_written, 1)
            if OWN:
                d_d += bias_rate[:, None] * d_shifted
                tl.store(d_rates + (at + rows) * heads * RATES + RATES // 2 + MINE, tl.sum(d * d_shifted, 1), mask=inside)
            tl.store(d_rates + (at + rows) * heads * RATES + MINE, d_rate, mask=inside)
            d_q, d_k = tl.trans(d_asked), tl.trans(d_features)
            if DH:
                (
                    d_q, d_k, d_written1, d_shifted1, grad1, bias_grad1, m_grad1, bm_grad1,
                    d_seen1, d_end1, d_on_state1, d_on_buffer1, d_entering1, d_left1, d_buffer_in_state1, d_buffer_left1,
                ) = _hidden_gradients(
                    d_asked * slope(u_asked, ACTIVATION), its_q, its_k, read1, b1, m_read1, bm1, scores1, written1, shifted1,
                    seen, end, on_state, on_buffer, state_left, buffer_in_state, entering, buffer_left,
                    grad1, low_grad1, bias_grad1, m_grad1, low_m_grad1, bm_grad1, sees, BIAS, OWN, FLOW, PRECISION,
                )  # fmt: skip
                d_seen, d_end, d_left = d_seen + d_seen1, d_end + d_end1, d_left + d_left1
                d_on_state, d_on_buffer, d_entering = (
                    d_on_state + d_on_state1,
                    d_on_buffer + d_on_buffer1,
                    d_entering + d_entering1,
                )
                d_buffer_in_state, d_buffer_left = d_buffer_in_state + d_buffer_in_state1, d_buffer_left + d_buffer_left1
                d_d1 = rate1[None, :] * d_written1
                d_rate1 = tl.sum(d1 * d_written1, 0)
                if OWN:
                    d_d1 += bias_rate1[None, :] * d_shifted1
                    tl.store(d_rates + (at + rows) * heads * RATES + RATES // 2, tl.sum(d1 * d_shifted1, 0), mask=inside)
                tl.store(d_rates + (at + rows) * heads * RATES, d_rate1, mask=inside)
                # from the hidden layer's writes back to the last layer
                low_error = (d_d1 * slope1).to(low)
                d_u = d_d1 * error1 * curvature(u, ACTIVATION)
                d_d += through(low_error, read, DH, PRECISION)
                grad += product(low_error, d.to(low), PRECISION)
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
                grad += product(features, low_before, PRECISION)
                if BIAS:
                    bias_grad += tl.sum(d_before, 0)
                back_in = product(read, tl.trans(low_before), PRECISION)
                if DH:
                    d_features += back_in
                else:
                    d_k += tl.trans(back_in)
            if DH:
                d_u += d_features * slope1
                low_u = d_u.to(low)
                d_k += through(low_u, read1, DH, PRECISION)
                grad1 += product(low_u, its_k, PRECISION)
                if BIAS:
                    bias_grad1 += tl.sum(d_u, 1)
            if IN_READ and RESIDUAL:
                d_q += d_y
            low_grad, low_m_grad, low_grad1, low_m_grad1 = grad.to(low), m_grad.to(low), grad1.to(low), m_grad1.to(low)
            store_rows(dq, at, heads * DK, rows, keys, inside, d_q)
            store_rows(dk, at, heads * DK, rows, keys, inside, d_k)
        store_state(d_state, grad, bias_grad, m_grad, bm_grad, grad1, bias_grad1, m_grad1, bm_grad1, DK, DH, DV, BIAS, FLOW)
        tl.debug_barrier()
    if HEAD:
        d_head += z_place * 2 * DV
        tl.store(d_head + values, gain_grad)
        tl.store(d_head + DV + values, shift_grad)
