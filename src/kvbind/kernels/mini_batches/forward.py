"""The forward pass over mini-batches: a program for each sequence and head, its state in registers."""

from __future__ import annotations

import triton
import triton.language as tl

from kvbind.kernels.common.activations import activate, slope
from kvbind.kernels.mini_batches.parts import (
    descent,
    load_state,
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
    store_rows,
    store_state,
    through,
)


@triton.jit(do_not_specialize=["tokens", "stretch", "stretches"])
def forward_kernel(
    q, k, v, state, rates, head, flow, out, end_state, starts,
    tokens, heads, stretch, stretches, eps,
    SIZE: tl.constexpr, L: tl.constexpr, DK: tl.constexpr, DH: tl.constexpr, DV: tl.constexpr, ACTIVATION: tl.constexpr,
    BIAS: tl.constexpr, OWN: tl.constexpr, RATES: tl.constexpr, FLOW: tl.constexpr, HEAD: tl.constexpr,
    SQUARED: tl.constexpr, IN_LOSS: tl.constexpr, IN_READ: tl.constexpr, RESIDUAL: tl.constexpr, KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """All mini-batches of a sequence and head."""
    z_place = tl.program_id(0).to(tl.int64)
    batch, its_head = z_place // heads, z_place % heads
    rows, keys, values = tl.arange(0, L), tl.arange(0, DK), tl.arange(0, DV)
    inside = rows < SIZE
    sees = (rows[:, None] >= rows[None, :]) & inside[None, :]
    low = q.dtype.element_ty
    PLUS: tl.constexpr = BIAS and not OWN
    DF: tl.constexpr = DH if DH else DK
    WHOLE: tl.constexpr = (DK * DH + DF * DV + (DH + DV) * BIAS) * (2 if FLOW == 3 else 1)
    FLOWS: tl.constexpr = 0 if FLOW == 0 else 1 if FLOW == 1 else SIZE + 1 if FLOW == 2 else SIZE + 4
    first_token = batch * tokens * heads + its_head
    q += first_token * DK
    k += first_token * DK
    v += first_token * DV
    out += first_token * DV
    rates += first_token * RATES
    flow += first_token * FLOWS
    w, b, m, bm, w1, b1, m1, bm1 = load_state(state + z_place * WHOLE, DK, DH, DV, BIAS, FLOW)
    gain, shift = b, b
    if HEAD:
        head += z_place * 2 * DV
        gain, shift = tl.load(head + values), tl.load(head + DV + values)
    # as products read them
    read, read1 = w.to(low), w1.to(low)
    wrong_before = 0
    for n in range(tokens // SIZE):
        if KEEP:  # noqa: SIM102, as the other condition is none of the compiler's
            if n % stretch == 0:
                place = starts + (z_place * stretches + n // stretch) * WHOLE
                store_state(place, w, b, m, bm, w1, b1, m1, bm1, DK, DH, DV, BIAS, FLOW)
        at = n * SIZE
        its_q = rows_of(q, at, heads * DK, rows, keys, inside)
        its_k = rows_of(k, at, heads * DK, rows, keys, inside)
        its_v = rows_of(v, at, heads * DV, rows, values, inside)
        rate, bias_rate = rates_of(rates, at, heads, rows, inside, RATES, 1 if DH else 0, OWN)
        seen, end, on_state, on_buffer, state_left, buffer_in_state, entering, buffer_left = shares_of(
            flow, at, heads, rows, inside, sees, SIZE, FLOW
        )

        # what tokens write, at the state before them
        features = tl.trans(its_k)
        if DH:
            u = product(read1, features, PRECISION) + b1[:, None]
            features = activate(u, ACTIVATION).to(low)
        z = through(features, read, DH, PRECISION) + b[None, :]
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
            d1 = product(read, tl.trans(d.to(low)), PRECISION) * slope(u, ACTIVATION)
            written1 = rate1[None, :] * d1
            spoils += tl.sum(written1 * 0.0 + u * 0.0, 0)
            shifted1 = written1
            if OWN:
                shifted1 = bias_rate1[None, :] * d1
                spoils += bias_rate1 * 0.0

        # a token that is not finite writes nothing, and spoils what sees it
        wrong = (spoils != 0.0) & inside
        counts = sees & (wrong[None, :] == 0)
        written = tl.where(wrong[:, None], 0.0, written)
        shifted = tl.where(wrong[:, None], 0.0, shifted)
        features = tl.where(wrong[None, :], 0.0, features.to(tl.float32)).to(low)
        so_far = wrong_before + tl.cumsum(wrong.to(tl.int32), 0)
        wrong_before += tl.sum(wrong.to(tl.int32), 0)

        # what queries read, each of the state that it sees, and the state behind them
        asked = tl.trans(its_q)
        if DH:
            clean_k = tl.where(wrong[:, None], 0.0, its_k.to(tl.float32)).to(low)
            written1 = tl.where(wrong[None, :], 0.0, written1)
            shifted1 = tl.where(wrong[None, :], 0.0, shifted1)
            scores = scores_of(its_q, tl.trans(clean_k), counts, PLUS, PRECISION)
            u_asked = read_hidden(
                its_q,
                read1,
                b1,
                m1.to(low),
                bm1,
                scores,
                written1,
                shifted1,
                seen,
                on_state,
                on_buffer,
                OWN,
                FLOW,
                PRECISION,
            )
            asked = activate(u_asked, ACTIVATION).to(low)
            w1, b1, m1, bm1 = step_hidden(
                w1, b1, m1, bm1, clean_k, written1, shifted1, end, state_left, buffer_in_state, entering, buffer_left,
                BIAS, FLOW, PRECISION,
            )  # fmt: skip
        scores = scores_of(tl.trans(asked), features, counts, PLUS, PRECISION)
        y = read_last(
            asked, read, b, m.to(low), bm, scores, written, shifted, seen, on_state, on_buffer, DH, OWN, FLOW, PRECISION
        )
        w, b, m, bm = step_last(
            w, b, m, bm, features, written, shifted, end, state_left, buffer_in_state, entering, buffer_left,
            BIAS, FLOW, PRECISION,
        )  # fmt: skip
        if IN_READ:
            y, _ = normalized(y, eps, DV)
            y = y * gain[None, :] + shift[None, :]
            if RESIDUAL:
                y += its_q.to(tl.float32)
        read, read1 = w.to(low), w1.to(low)
        y = tl.where((so_far > 0)[:, None], float("nan"), y)
        store_rows(out, at, heads * DV, rows, values, inside, y)
    spoilt = tl.where(wrong_before > 0, float("nan"), 0.0)
    store_state(
        end_state + z_place * WHOLE, w + spoilt, b + spoilt, m + spoilt, bm + spoilt, w1 + spoilt, b1 + spoilt, m1 + spoilt,
        bm1 + spoilt, DK, DH, DV, BIAS, FLOW,
    )  # fmt: skip
