"""The states before every mini-batch: a program for each sequence and head, with the state in registers."""

from __future__ import annotations

import triton
import triton.language as tl

from kvbind.kernels.common.activations import activate, slope
from kvbind.kernels.mini_batches.parts import (
    descent,
    keep_state,
    load_state,
    product,
    rates_of,
    rows_of,
    shares_of,
    step,
    store_state,
)


@triton.jit(do_not_specialize=["begun_stride", "tokens", "first", "count", "stretch", "stretches"])
def states_kernel(
    k, v, rates, head, flow, begun, end_state, room, bias_room, starts,
    begun_stride, tokens, heads, first, count, stretch, stretches, eps,
    SIZE: tl.constexpr, L: tl.constexpr, DK: tl.constexpr, DH: tl.constexpr, DV: tl.constexpr, ACTIVATION: tl.constexpr,
    BIAS: tl.constexpr, OWN: tl.constexpr, RATES: tl.constexpr, FLOW: tl.constexpr, HEAD: tl.constexpr,
    SQUARED: tl.constexpr, IN_LOSS: tl.constexpr, IN_READ: tl.constexpr, RESIDUAL: tl.constexpr, KEEP: tl.constexpr,
    END: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Those of `count` mini-batches from `first` on, into `room`; with `KEEP` also those before stretches, into `starts`."""
    z_place = tl.program_id(0).to(tl.int64)
    batch, its_head = z_place // heads, z_place % heads
    rows, keys, values = tl.arange(0, L), tl.arange(0, DK), tl.arange(0, DV)
    inside = rows < SIZE
    sees = (rows[:, None] >= rows[None, :]) & inside[None, :]
    low = k.dtype.element_ty
    DF: tl.constexpr = DH if DH else DK
    BUFFERS: tl.constexpr = 2 if FLOW == 3 else 1
    MATRICES: tl.constexpr = (DK * DH + DF * DV) * BUFFERS
    BIASES: tl.constexpr = (DH + DV) * BUFFERS
    WHOLE: tl.constexpr = MATRICES + BIASES * BIAS
    FLOWS: tl.constexpr = 0 if FLOW == 0 else 1 if FLOW == 1 else SIZE + 1 if FLOW == 2 else SIZE + 4
    first_token = batch * tokens * heads + its_head
    k += first_token * DK
    v += first_token * DV
    rates += first_token * RATES
    flow += first_token * FLOWS
    room += z_place * count * MATRICES
    bias_room += z_place * count * BIASES
    w, b, m, bm, w1, b1, m1, bm1 = load_state(begun + z_place * begun_stride, DK, DH, DV, BIAS, FLOW)
    gain, shift = b, b
    if HEAD:
        head += z_place * 2 * DV
        gain, shift = tl.load(head + values), tl.load(head + DV + values)
    for i in range(count):
        n = first + i
        if KEEP:  # noqa: SIM102, as the other condition is none of the compiler's
            if n % stretch == 0:
                place = starts + (z_place * stretches + n // stretch) * WHOLE
                store_state(place, w, b, m, bm, w1, b1, m1, bm1, DK, DH, DV, BIAS, FLOW)
        keep_state(room + i * MATRICES, bias_room + i * BIASES, w, b, m, bm, w1, b1, m1, bm1, DK, DH, DV, BIAS, FLOW)
        at = n * SIZE
        its_k = rows_of(k, at, heads * DK, rows, keys, inside)
        its_v = rows_of(v, at, heads * DV, rows, values, inside)
        rate, bias_rate = rates_of(rates, at, heads, rows, inside, RATES, 1 if DH else 0, OWN)
        _, end, on_state, _, state_left, buffer_in_state, entering, buffer_left = shares_of(
            flow, at, heads, rows, inside, sees, SIZE, FLOW
        )
        read, features = w.to(low), its_k
        if DH:
            u = product(its_k, w1.to(low), PRECISION) + b1[None, :]
            features = activate(u, ACTIVATION).to(low)
        z = product(features, read, PRECISION) + b[None, :]
        d, _, _, _ = descent(its_k, its_v, z, gain, shift, eps, SQUARED, IN_LOSS, RESIDUAL, DV)
        # what is not finite in a token makes NaN of the state behind it, also where nothing of it is written
        spoils = on_state * 0.0
        if OWN:
            spoils += bias_rate * 0.0
        if DH:
            rate1, bias_rate1 = rates_of(rates, at, heads, rows, inside, RATES, 0, OWN)
            spoils += tl.sum(u * 0.0, 1) + rate1 * 0.0
            if OWN:
                spoils += bias_rate1 * 0.0
        elif not (SQUARED or IN_LOSS):
            spoils += tl.sum(z * 0.0, 1)
        d += spoils[:, None]
        if DH:
            d1 = product(d.to(low), tl.trans(read), PRECISION) * slope(u, ACTIVATION)
            w1, b1, m1, bm1 = step(
                w1, b1, m1, bm1, its_k, rate1[:, None] * d1, bias_rate1[:, None] * d1, end, state_left,
                buffer_in_state, entering, buffer_left, BIAS, FLOW, PRECISION,
            )  # fmt: skip
        w, b, m, bm = step(
            w, b, m, bm, features, rate[:, None] * d, bias_rate[:, None] * d, end, state_left, buffer_in_state,
            entering, buffer_left, BIAS, FLOW, PRECISION,
        )  # fmt: skip
    if END:
        store_state(end_state + z_place * WHOLE, w, b, m, bm, w1, b1, m1, bm1, DK, DH, DV, BIAS, FLOW)
