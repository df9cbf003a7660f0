"""What queries read: a program for each mini-batch of a sequence and head, given the state before it."""

from __future__ import annotations

import triton
import triton.language as tl

from kvbind.kernels.common.activations import activate, slope
from kvbind.kernels.mini_batches.parts import (
    descent,
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


@triton.jit(do_not_specialize=["tokens", "first", "count"])
def reads_kernel(
    q, k, v, rates, head, flow, room, bias_room, out, tokens, heads, first, count, eps,
    SIZE: tl.constexpr, L: tl.constexpr, DK: tl.constexpr, DH: tl.constexpr, DV: tl.constexpr, ACTIVATION: tl.constexpr,
    BIAS: tl.constexpr, OWN: tl.constexpr, RATES: tl.constexpr, FLOW: tl.constexpr, HEAD: tl.constexpr,
    SQUARED: tl.constexpr, IN_LOSS: tl.constexpr, IN_READ: tl.constexpr, RESIDUAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs of `count` mini-batches from `first` on, of which `states_kernel` left the states."""
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
    out += first_token * DV
    rates += first_token * RATES
    flow += first_token * FLOWS
    spot = z_place * count + i
    read, b, m_read, bm, read1, b1, m_read1, bm1 = kept_state(
        room + spot * MATRICES, bias_room + spot * BIASES, DK, DH, DV, BIAS, FLOW
    )
    gain, shift = b, b
    if HEAD:
        head += z_place * 2 * DV
        gain, shift = tl.load(head + values), tl.load(head + DV + values)
    at = (first + i) * SIZE
    its_q = rows_of(q, at, heads * DK, rows, keys, inside)
    its_k = rows_of(k, at, heads * DK, rows, keys, inside)
    its_v = rows_of(v, at, heads * DV, rows, values, inside)
    rate, bias_rate = rates_of(rates, at, heads, rows, inside, RATES, 1 if DH else 0, OWN)
    seen, _, on_state, on_buffer, _, _, _, _ = shares_of(flow, at, heads, rows, inside, sees, SIZE, FLOW)

    # what tokens write, at the state before them
    features = its_k
    if DH:
        u = product(its_k, read1, PRECISION) + b1[None, :]
        features = activate(u, ACTIVATION).to(low)
    z = product(features, read, PRECISION) + b[None, :]
    d, _, _, _ = descent(its_k, its_v, z, gain, shift, eps, SQUARED, IN_LOSS, RESIDUAL, DV)
    written = rate[:, None] * d
    # not a number where anything is not finite: a key's reaches what is made of it, if not always what is written
    spoils = tl.sum(written * 0.0, 1)
    if not (DH or SQUARED or IN_LOSS):
        spoils += tl.sum(z * 0.0, 1)
    shifted = written
    if OWN:
        shifted = bias_rate[:, None] * d
        spoils += bias_rate * 0.0
    if FLOW == 1:
        spoils += on_state * 0.0
    if DH:
        rate1, bias_rate1 = rates_of(rates, at, heads, rows, inside, RATES, 0, OWN)
        d1 = product(d.to(low), tl.trans(read), PRECISION) * slope(u, ACTIVATION)
        written1 = rate1[:, None] * d1
        spoils += tl.sum(written1 * 0.0 + u * 0.0, 1)
        shifted1 = written1
        if OWN:
            shifted1 = bias_rate1[:, None] * d1
            spoils += bias_rate1 * 0.0
    # a token that is not finite writes nothing, and spoils what sees it
    wrong = (spoils != 0.0) & inside
    counts = sees & (wrong[None, :] == 0)
    written = tl.where(wrong[:, None], 0.0, written)
    shifted = tl.where(wrong[:, None], 0.0, shifted)
    features = tl.where(wrong[:, None], 0.0, features.to(tl.float32)).to(low)
    so_far = tl.cumsum(wrong.to(tl.int32), 0)

    # what queries read, each of the state that it sees
    asked = its_q
    if DH:
        written1 = tl.where(wrong[:, None], 0.0, written1)
        shifted1 = tl.where(wrong[:, None], 0.0, shifted1)
        scores = scores_of(its_q, its_k, counts, PLUS, PRECISION)
        asked = activate(
            read_layer(
                its_q, read1, b1, m_read1, bm1, scores, written1.to(low), shifted1, seen, on_state, on_buffer,
                OWN, FLOW, PRECISION,
            ),
            ACTIVATION,
        ).to(low)  # fmt: skip
    scores = scores_of(asked, features, counts, PLUS, PRECISION)
    y = read_layer(
        asked, read, b, m_read, bm, scores, written.to(low), shifted, seen, on_state, on_buffer, OWN, FLOW, PRECISION
    )
    if IN_READ:
        y, _ = normalized(y, eps, DV)
        y = y * gain[None, :] + shift[None, :]
        if RESIDUAL:
            y += its_q.to(tl.float32)
    y = tl.where((so_far > 0)[:, None], float("nan"), y)
    store_rows(out, at, heads * DV, rows, values, inside, y)
