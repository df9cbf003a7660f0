"""Gradients of what queries read: a program for each mini-batch of a sequence and head, given the state before it.

What they are to the state's own step, which goes from the last mini-batch to the first, is left in `wide` and `narrow`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvbind.kernels.common.activations import activate, curvature, slope
from kvbind.kernels.mini_batches.parts import (
    across,
    descent,
    keep_rows,
    kept_state,
    normalized,
    product,
    rates_of,
    read_layer,
    rows_of,
    scores_of,
    shares_of,
    store_rows,
)


@triton.jit
def _through_read(
    x, asked, features, matrix, bias, buffer, bias_buffer, scores, written, shifted, seen, on_state, on_buffer, sees,
    OWN: tl.constexpr, FLOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Through a layer's read, from the gradient `x` of what was read.

    Returns:
        Gradients of `asked`, `features`, `written` and `shifted`; those of what the state and its buffer give; of `seen`,
        `on_state` and `on_buffer`.
    """
    low = asked.dtype
    low_x = x.to(low)
    pairs = product(low_x, tl.trans(written.to(low)), PRECISION)
    d_seen = pairs * scores
    if OWN:
        # not the last of all products: Triton 3.6 shares out warps by that one, and this is no wider than it is tall
        d_seen += product(low_x, tl.trans(shifted.to(low)), PRECISION)
    d_seen = tl.where(sees, d_seen, 0.0)
    d_scores = (seen * pairs).to(low)
    x_state = low_x
    if FLOW >= 2:
        x_state = (on_state[:, None] * x).to(low)
    d_asked = product(d_scores, features, PRECISION) + product(x_state, tl.trans(matrix), PRECISION)
    d_features = product(tl.trans(d_scores), asked, PRECISION)
    d_written = product(tl.trans((seen * scores).to(low)), low_x, PRECISION)
    d_shifted = d_written
    if OWN:
        d_shifted = product(tl.trans(seen.to(low)), low_x, PRECISION)
    d_on_state = tl.sum(d_seen, 1)
    d_on_buffer, x_buffer = d_on_state, x_state
    if FLOW >= 2:
        d_on_state = tl.sum(x * (product(asked, matrix, PRECISION) + bias[None, :]), 1)
    if FLOW == 3:
        d_on_buffer = tl.sum(x * (product(asked, buffer, PRECISION) + bias_buffer[None, :]), 1)
        x_buffer = (on_buffer[:, None] * x).to(low)
        d_asked += product(x_buffer, tl.trans(buffer), PRECISION)
    return d_asked, d_features, d_written, d_shifted, x_state, x_buffer, d_seen, d_on_state, d_on_buffer


@triton.jit(do_not_specialize=["tokens", "first", "count"])
def read_gradients_kernel(
    d_out, q, k, v, rates, head, flow, room, bias_room, wide, narrow, dq, d_flow, tokens, heads, first, count, eps,
    SIZE: tl.constexpr, L: tl.constexpr, DK: tl.constexpr, DH: tl.constexpr, DV: tl.constexpr, ACTIVATION: tl.constexpr,
    BIAS: tl.constexpr, OWN: tl.constexpr, RATES: tl.constexpr, FLOW: tl.constexpr, HEAD: tl.constexpr,
    SQUARED: tl.constexpr, IN_LOSS: tl.constexpr, IN_READ: tl.constexpr, RESIDUAL: tl.constexpr, WIDE: tl.constexpr,
    NARROW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of `count` mini-batches from `first` on."""
    z_place, i = tl.program_id(0).to(tl.int64), tl.program_id(1)
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
    FLOWS: tl.constexpr = 0 if FLOW == 0 else 1 if FLOW == 1 else SIZE + 1 if FLOW == 2 else SIZE + 4
    first_token = batch * tokens * heads + its_head
    q += first_token * DK
    k += first_token * DK
    v += first_token * DV
    dq += first_token * DK
    d_out += first_token * DV
    rates += first_token * RATES
    flow += first_token * FLOWS
    d_flow += first_token * FLOWS
    spot = z_place * count + i
    read, b, m_read, bm, read1, b1, m_read1, bm1 = kept_state(
        room + spot * MATRICES, bias_room + spot * BIASES, DK, DH, DV, BIAS, FLOW
    )
    # in the order of `wide` and `narrow`
    wide += spot * WIDE
    narrow += spot * NARROW
    gain, shift = b, b
    if HEAD:
        head += z_place * 2 * DV
        gain, shift = tl.load(head + values), tl.load(head + DV + values)
    at = (first + i) * SIZE
    its_q = rows_of(q, at, heads * DK, rows, keys, inside)
    its_k = rows_of(k, at, heads * DK, rows, keys, inside)
    its_v = rows_of(v, at, heads * DV, rows, values, inside)
    d_y = rows_of(d_out, at, heads * DV, rows, values, inside).to(tl.float32)
    rate, bias_rate = rates_of(rates, at, heads, rows, inside, RATES, 1 if DH else 0, OWN)
    seen, _, on_state, on_buffer, _, _, _, _ = shares_of(flow, at, heads, rows, inside, sees, SIZE, FLOW)

    # forward: what tokens write, and what queries read
    asked, features = its_q, its_k
    if DH:
        u = product(its_k, read1, PRECISION) + b1[None, :]
        features = activate(u, ACTIVATION).to(low)
    z = product(features, read, PRECISION) + b[None, :]
    d, g, y, deviation = descent(its_k, its_v, z, gain, shift, eps, SQUARED, IN_LOSS, RESIDUAL, DV)
    keep_rows(wide, d, L, DV)
    keep_rows(wide + L * DV, g, L, DV)
    keep_rows(wide + 2 * L * DV, y, L, DV)
    written, shifted = rate[:, None] * d, bias_rate[:, None] * d
    if DH:
        rate1, bias_rate1 = rates_of(rates, at, heads, rows, inside, RATES, 0, OWN)
        error1 = product(d.to(low), tl.trans(read), PRECISION)
        slope1 = slope(u, ACTIVATION)
        d1 = error1 * slope1
        written1, shifted1 = rate1[:, None] * d1, bias_rate1[:, None] * d1
        scores1 = scores_of(its_q, its_k, sees, PLUS, PRECISION)
        u_asked = read_layer(
            its_q,
            read1,
            b1,
            m_read1,
            bm1,
            scores1,
            written1.to(low),
            shifted1,
            seen,
            on_state,
            on_buffer,
            OWN,
            FLOW,
            PRECISION,
        )
        asked = activate(u_asked, ACTIVATION).to(low)
    scores = scores_of(asked, features, sees, PLUS, PRECISION)

    # through the head that outputs pass
    d_z = d_y
    gain_grad, shift_grad = tl.zeros((DV,), tl.float32), tl.zeros((DV,), tl.float32)
    if IN_READ:
        z_asked = read_layer(
            asked, read, b, m_read, bm, scores, written.to(low), shifted, seen, on_state, on_buffer, OWN, FLOW, PRECISION
        )
        y_asked, its_deviation = normalized(z_asked, eps, DV)
        gain_grad = tl.sum(d_y * y_asked, 0)
        shift_grad = tl.sum(d_y, 0)
        d_z = across(d_y * gain[None, :], y_asked, DV) / its_deviation[:, None]

    # through both layers
    d_asked, d_features, d_written, d_shifted, x_state, x_buffer, d_seen, d_on_state, d_on_buffer = _through_read(
        d_z, asked, features, read, b, m_read, bm, scores, written, shifted, seen, on_state, on_buffer, sees,
        OWN, FLOW, PRECISION,
    )  # fmt: skip
    keep_rows(wide + 3 * L * DV, d_written, L, DV)
    if OWN:
        keep_rows(wide + 4 * L * DV, d_shifted, L, DV)
    keep_rows(narrow, x_state, L, DV)
    if FLOW == 3:
        keep_rows(narrow + L * DV, x_buffer, L, DV)
    d_q, d_k = d_asked, d_features
    of_keys = wide + 5 * L * DV
    of_hidden = of_keys + L * DK
    if DH:
        d_q, d_k, d_written1, d_shifted1, x_state1, x_buffer1, d_seen1, d_on_state1, d_on_buffer1 = _through_read(
            d_asked * slope(u_asked, ACTIVATION), its_q, its_k, read1, b1, m_read1, bm1, scores1, written1, shifted1,
            seen, on_state, on_buffer, sees, OWN, FLOW, PRECISION,
        )  # fmt: skip
        d_seen, d_on_state, d_on_buffer = d_seen + d_seen1, d_on_state + d_on_state1, d_on_buffer + d_on_buffer1
        keep_rows(of_hidden, slope1, L, DH)
        keep_rows(of_hidden + L * DH, d1, L, DH)
        keep_rows(of_hidden + 2 * L * DH, error1 * curvature(u, ACTIVATION), L, DH)
        keep_rows(of_hidden + 3 * L * DH, d_written1, L, DH)
        keep_rows(of_hidden + 4 * L * DH, d_features, L, DH)
        if OWN:
            keep_rows(of_hidden + 5 * L * DH, d_shifted1, L, DH)
        keep_rows(narrow + 2 * L * DV, asked, L, DH)
        keep_rows(narrow + 2 * L * DV + L * DH, features, L, DH)
        keep_rows(narrow + 2 * L * DV + 2 * L * DH, x_state1, L, DH)
        if FLOW == 3:
            keep_rows(narrow + 2 * L * DV + 3 * L * DH, x_buffer1, L, DH)
    keep_rows(of_keys, d_k, L, DK)
    last = of_hidden + 6 * L * DH
    tl.store(last + rows, deviation)
    tl.store(last + L + values, gain_grad)
    tl.store(last + L + DV + values, shift_grad)
    if IN_READ and RESIDUAL:
        d_q += d_y
    store_rows(dq, at, heads * DK, rows, keys, inside, d_q)
    if FLOW == 1:
        tl.store(d_flow + (at + rows) * heads, tl.sum(d_seen, 1), mask=inside)
    if FLOW >= 2:
        place = d_flow + (at + rows) * heads * FLOWS
        tl.store(place[:, None] + rows[None, :], d_seen, mask=inside[:, None] & inside[None, :])
        tl.store(place + SIZE, d_on_state, mask=inside)
    if FLOW == 3:
        tl.store(place + SIZE + 1, d_on_buffer, mask=inside)
