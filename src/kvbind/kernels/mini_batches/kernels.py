"""TTT-Linear as one kernel: the dual form of mini-batches (arXiv 2407.04620), a program for each sequence and head.

A program walks through its mini-batches with the state, a matrix and maybe a bias, in registers. Of a mini-batch's tokens

    z = k W + b,  d = -dL/dz,  D = r d
    o = head(q W + b + c (tril(q k^T) D + tril(1) D_b), q)
    W <- W + c_last k^T D,  b <- b + c_last sum D_b

where the loss is `-<f(k), v>` or `1/2 ||f(k) - v||^2`, `f` is `z` or layer normalization of it with a gain and a shift, with
or without `k` added, and r, r_b, c are numbers for each token. Gradients are closed-form, as those of
`kvbind.inner.head.LayerNormHead`.

The backward pass goes from the last mini-batch to the first. Kept for it are the operands and the state before every so many
mini-batches, a *stretch*; a stretch is walked through forward once more, then backward. Products take operands in the dtype
of q, k and v, a state is rounded to it where it is read, all else is in float32.

What is not finite in a token reaches only the outputs from there on, which are NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _normalized(z, eps, DV: tl.constexpr):
    """LN(z), and the standard deviation that it divides by."""
    centred = z - (tl.sum(z, 1) / DV)[:, None]
    deviation = tl.sqrt(tl.sum(centred * centred, 1) / DV + eps)
    return centred / deviation[:, None], deviation


@triton.jit
def _across(x, y, DV: tl.constexpr):
    """`x` without its mean and its part along `y`: LN's Jacobian at `y`, times the deviation."""
    return x - (tl.sum(x, 1) / DV)[:, None] - y * (tl.sum(x * y, 1) / DV)[:, None]


@triton.jit
def _rows(base, first, stride, rows, columns, inside):
    return tl.load(base + (first + rows)[:, None] * stride + columns[None, :], mask=inside[:, None], other=0.0)


@triton.jit
def _loss(
    k, v, z, gamma, beta, eps, SQUARED: tl.constexpr, IN_LOSS: tl.constexpr, RESIDUAL: tl.constexpr, DV: tl.constexpr
):  # fmt: skip
    """`-dL/dz` of each token, and on the way to it `-dL/df`, LN(z) and its deviation (those of nothing without a head)."""
    g = v.to(tl.float32)
    y, deviation = z, tl.sum(z, 1)
    if IN_LOSS:
        y, deviation = _normalized(z, eps, DV)
    if SQUARED:
        f = z
        if IN_LOSS:
            f = y * gamma[None, :] + beta[None, :]
            if RESIDUAL:
                f += k.to(tl.float32)
        g -= f
    d = g
    if IN_LOSS:
        d = _across(g * gamma[None, :], y, DV) / deviation[:, None]
    return d, g, y, deviation


@triton.jit
def _per_token(base, first, heads, rows, inside, GIVEN: tl.constexpr):
    """What `[B, T, H]` has for the tokens of a tile, or 1 without it; 0 behind the mini-batch."""
    return tl.load(base + (first + rows) * heads, mask=inside, other=0.0) if GIVEN else tl.where(inside, 1.0, 0.0)


@triton.jit
def _last(x, rows, SIZE: tl.constexpr):
    """The number of the mini-batch's last token."""
    return tl.sum(tl.where(rows == SIZE - 1, x, 0.0), 0)


@triton.jit(do_not_specialize=["tokens", "stretch", "stretches"])
def forward_kernel(
    q, k, v, weights, bias, gamma, beta, rates, bias_rates, read_rate, out, end, bias_end, starts, bias_starts,
    tokens, heads, stretch, stretches, eps,
    SIZE: tl.constexpr, L: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BIAS: tl.constexpr, BIAS_RATES: tl.constexpr,
    READ_RATE: tl.constexpr, HEAD: tl.constexpr, SQUARED: tl.constexpr, IN_LOSS: tl.constexpr, IN_READ: tl.constexpr,
    RESIDUAL: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All mini-batches of a sequence and head."""
    z_place = tl.program_id(0).to(tl.int64)
    batch, head = z_place // heads, z_place % heads
    rows, keys, values = tl.arange(0, L), tl.arange(0, DK), tl.arange(0, DV)
    inside = rows < SIZE
    sees = (rows[:, None] >= rows[None, :]) & inside[None, :]
    low = q.dtype.element_ty
    ones = tl.where(sees, 1.0, 0.0).to(low)
    first_token = batch * tokens * heads + head
    q += first_token * DK
    k += first_token * DK
    v += first_token * DV
    out += first_token * DV
    rates += first_token
    bias_rates += first_token
    read_rate += first_token
    places = keys[:, None] * DV + values[None, :]
    state = tl.load(weights + z_place * DK * DV + places)
    shift = tl.zeros((DV,), tl.float32)
    if BIAS:
        shift = tl.load(bias + z_place * DV + values)
    gain, offset = shift, shift
    if HEAD:
        gain, offset = tl.load(gamma + z_place * DV + values), tl.load(beta + z_place * DV + values)
    wrong_before = 0
    for n in range(tokens // SIZE):
        if KEEP:  # noqa: SIM102, as the other condition is none of the compiler's
            if n % stretch == 0:
                place = z_place * stretches + n // stretch
                tl.store(starts + place * DK * DV + places, state)
                if BIAS:
                    tl.store(bias_starts + place * DV + values, shift)
        at = n * SIZE
        its_q = _rows(q, at, heads * DK, rows, keys, inside)
        its_k = _rows(k, at, heads * DK, rows, keys, inside)
        its_v = _rows(v, at, heads * DV, rows, values, inside)
        rate = _per_token(rates, at, heads, rows, inside, True)
        share = _per_token(read_rate, at, heads, rows, inside, READ_RATE)
        read = state.to(low)
        z = tl.dot(its_k, read, input_precision=PRECISION) + shift[None, :]
        d, _, _, _ = _loss(its_k, its_v, z, gain, offset, eps, SQUARED, IN_LOSS, RESIDUAL, DV)
        written = rate[:, None] * d
        # a token that is not finite writes nothing, and spoils what sees it
        wrong = (tl.sum(written * 0.0, 1) + tl.sum(its_k.to(tl.float32) * 0.0, 1) + share * 0.0 != 0.0) & inside
        written = tl.where(wrong[:, None], 0.0, written)
        so_far = wrong_before + tl.cumsum(wrong.to(tl.int32), 0)
        wrong_before += tl.sum(wrong.to(tl.int32), 0)
        clean_k = tl.where(wrong[:, None], 0.0, its_k.to(tl.float32)).to(low)
        scores = tl.dot(its_q, tl.trans(its_k), input_precision=PRECISION)
        scores = tl.where(sees & (wrong[None, :] == 0), scores, 0.0).to(low)
        low_written = written.to(low)
        own = tl.dot(scores, low_written, input_precision=PRECISION)
        left = _last(share, rows, SIZE)
        new_shift = shift
        if BIAS:
            shifted = written
            if BIAS_RATES:
                bias_rate = _per_token(bias_rates, at, heads, rows, inside, True)
                shifted = tl.where(wrong[:, None], 0.0, bias_rate[:, None] * d)
            own += tl.dot(ones, shifted.to(low), input_precision=PRECISION)
            new_shift = shift + left * tl.sum(shifted, 0)
        y = tl.dot(its_q, read, input_precision=PRECISION) + shift[None, :] + share[:, None] * own
        if IN_READ:
            y, _ = _normalized(y, eps, DV)
            y = y * gain[None, :] + offset[None, :]
            if RESIDUAL:
                y += its_q.to(tl.float32)
        y = tl.where((so_far > 0)[:, None], float("nan"), y)
        tl.store(out + (at + rows)[:, None] * (heads * DV) + values[None, :], y.to(low), mask=inside[:, None])
        state += left * tl.dot(tl.trans(clean_k), low_written, input_precision=PRECISION)
        shift = new_shift
    spoilt = tl.where(wrong_before > 0, float("nan"), 0.0)
    tl.store(end + z_place * DK * DV + places, state + spoilt)
    if BIAS:
        tl.store(bias_end + z_place * DV + values, shift + spoilt)


@triton.jit(do_not_specialize=["tokens", "stretch", "stretches"])
def backward_kernel(
    d_out, d_end, d_bias_end, q, k, v, gamma, beta, rates, bias_rates, read_rate, starts, bias_starts, room, bias_room,
    dq, dk, dv, d_weights, d_bias, d_gamma, d_beta, d_rates, d_bias_rates, d_read_rate,
    tokens, heads, stretch, stretches, eps,
    SIZE: tl.constexpr, L: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BIAS: tl.constexpr, BIAS_RATES: tl.constexpr,
    READ_RATE: tl.constexpr, HEAD: tl.constexpr, SQUARED: tl.constexpr, IN_LOSS: tl.constexpr, IN_READ: tl.constexpr,
    RESIDUAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All mini-batches of a sequence and head, from the last to the first."""
    z_place = tl.program_id(0).to(tl.int64)
    batch, head = z_place // heads, z_place % heads
    rows, keys, values = tl.arange(0, L), tl.arange(0, DK), tl.arange(0, DV)
    inside = rows < SIZE
    sees = (rows[:, None] >= rows[None, :]) & inside[None, :]
    low = q.dtype.element_ty
    ones = tl.where(sees, 1.0, 0.0).to(low)
    first_token = batch * tokens * heads + head
    q += first_token * DK
    k += first_token * DK
    v += first_token * DV
    dq += first_token * DK
    dk += first_token * DK
    dv += first_token * DV
    d_out += first_token * DV
    rates += first_token
    bias_rates += first_token
    read_rate += first_token
    d_rates += first_token
    d_bias_rates += first_token
    d_read_rate += first_token
    places = keys[:, None] * DV + values[None, :]
    grad = tl.load(d_end + z_place * DK * DV + places)
    shift_grad = tl.zeros((DV,), tl.float32)
    if BIAS:
        shift_grad = tl.load(d_bias_end + z_place * DV + values)
    gain, offset = tl.zeros((DV,), tl.float32), tl.zeros((DV,), tl.float32)
    if HEAD:
        gain, offset = tl.load(gamma + z_place * DV + values), tl.load(beta + z_place * DV + values)
    gain_grad, offset_grad = tl.zeros((DV,), tl.float32), tl.zeros((DV,), tl.float32)
    room += z_place * stretch * DK * DV
    bias_room += z_place * stretch * DV
    count = tokens // SIZE
    for s in range(stretches):
        begun = (stretches - 1 - s) * stretch
        ended = tl.minimum(begun + stretch, count)
        # forward once more, for the states before each mini-batch
        place = z_place * stretches + stretches - 1 - s
        state = tl.load(starts + place * DK * DV + places)
        shift = tl.zeros((DV,), tl.float32)
        if BIAS:
            shift = tl.load(bias_starts + place * DV + values)
        for n in range(begun, ended):
            tl.store(room + (n - begun) * DK * DV + places, state.to(low))
            if BIAS:
                tl.store(bias_room + (n - begun) * DV + values, shift)
            at = n * SIZE
            its_k = _rows(k, at, heads * DK, rows, keys, inside)
            its_v = _rows(v, at, heads * DV, rows, values, inside)
            rate = _per_token(rates, at, heads, rows, inside, True)
            share = _per_token(read_rate, at, heads, rows, inside, READ_RATE)
            z = tl.dot(its_k, state.to(low), input_precision=PRECISION) + shift[None, :]
            d, _, _, _ = _loss(its_k, its_v, z, gain, offset, eps, SQUARED, IN_LOSS, RESIDUAL, DV)
            left, written = _last(share, rows, SIZE), rate[:, None] * d
            if BIAS:
                shifted = written
                if BIAS_RATES:
                    shifted = _per_token(bias_rates, at, heads, rows, inside, True)[:, None] * d
                shift += left * tl.sum(shifted, 0)
            state += left * tl.dot(tl.trans(its_k), written.to(low), input_precision=PRECISION)
        # other threads read what these have stored
        tl.debug_barrier()
        for back in range(ended - begun):
            n = ended - 1 - back
            read = tl.load(room + (n - begun) * DK * DV + places)
            shift = tl.zeros((DV,), tl.float32)
            if BIAS:
                shift = tl.load(bias_room + (n - begun) * DV + values)
            at = n * SIZE
            its_q = _rows(q, at, heads * DK, rows, keys, inside)
            its_k = _rows(k, at, heads * DK, rows, keys, inside)
            its_v = _rows(v, at, heads * DV, rows, values, inside)
            d_y = _rows(d_out, at, heads * DV, rows, values, inside).to(tl.float32)
            rate = _per_token(rates, at, heads, rows, inside, True)
            share = _per_token(read_rate, at, heads, rows, inside, READ_RATE)
            bias_rate = rate
            if BIAS_RATES:
                bias_rate = _per_token(bias_rates, at, heads, rows, inside, True)
            z = tl.dot(its_k, read, input_precision=PRECISION) + shift[None, :]
            d, g, y, deviation = _loss(its_k, its_v, z, gain, offset, eps, SQUARED, IN_LOSS, RESIDUAL, DV)
            written = (rate[:, None] * d).to(low)
            scores = tl.where(sees, tl.dot(its_q, tl.trans(its_k), input_precision=PRECISION), 0.0).to(low)
            own = tl.dot(scores, written, input_precision=PRECISION)
            shifted = bias_rate[:, None] * d
            if BIAS:
                own += tl.dot(ones, shifted.to(low), input_precision=PRECISION)
            left = _last(share, rows, SIZE)

            # through the head that outputs pass
            d_z = d_y
            d_q = tl.zeros((L, DK), tl.float32)
            if IN_READ:
                u = tl.dot(its_q, read, input_precision=PRECISION) + shift[None, :] + share[:, None] * own
                u, its_deviation = _normalized(u, eps, DV)
                gain_grad += tl.sum(d_y * u, 0)
                offset_grad += tl.sum(d_y, 0)
                d_z = _across(d_y * gain[None, :], u, DV) / its_deviation[:, None]
                if RESIDUAL:
                    d_q += d_y
            low_d_z = d_z.to(low)
            d_share = tl.sum(d_z * own, 1)
            d_own = (share[:, None] * d_z).to(low)

            # through reads and the state's step to what tokens write
            low_grad = grad.to(low)
            from_state = tl.dot(its_k, low_grad, input_precision=PRECISION)
            d_scores = tl.where(sees, tl.dot(d_own, tl.trans(written), input_precision=PRECISION), 0.0).to(low)
            d_q += tl.dot(d_scores, its_k, input_precision=PRECISION)
            d_q += tl.dot(low_d_z, tl.trans(read), input_precision=PRECISION)
            d_k = tl.dot(tl.trans(d_scores), its_q, input_precision=PRECISION)
            d_k += left * tl.dot(written, tl.trans(low_grad), input_precision=PRECISION)
            d_written = tl.dot(tl.trans(scores), d_own, input_precision=PRECISION) + left * from_state
            d_left = tl.sum(tl.sum(written.to(tl.float32) * from_state, 1), 0)
            grad += tl.dot(tl.trans(its_q), low_d_z, input_precision=PRECISION)
            d_d = rate[:, None] * d_written
            d_rate = tl.sum(d * d_written, 1)
            if BIAS:
                d_shifted = tl.dot(tl.trans(ones), d_own, input_precision=PRECISION) + left * shift_grad[None, :]
                d_left += tl.sum(tl.sum(shifted, 0) * shift_grad, 0)
                shift_grad += tl.sum(d_z, 0)
                d_d += bias_rate[:, None] * d_shifted
                if BIAS_RATES:
                    its_rate = tl.sum(d * d_shifted, 1)
                    tl.store(d_bias_rates + (at + rows) * heads, its_rate, mask=inside)
                else:
                    d_rate += tl.sum(d * d_shifted, 1)
            tl.store(d_rates + (at + rows) * heads, d_rate, mask=inside)
            if READ_RATE:
                d_share += tl.where(rows == SIZE - 1, d_left, 0.0)
                tl.store(d_read_rate + (at + rows) * heads, d_share, mask=inside)

            # through the loss
            d_g = d_d
            d_norm = tl.zeros((L, DV), tl.float32)
            d_deviation = tl.zeros((L,), tl.float32)
            if IN_LOSS:
                pulled = g * gain[None, :]
                across = _across(d_d, y, DV) / deviation[:, None]
                along, its_along = tl.sum(d_d * y, 1) / DV, tl.sum(pulled * y, 1) / DV
                d_norm = -(pulled * along[:, None] + d_d * its_along[:, None]) / deviation[:, None]
                d_deviation = -tl.sum(d_d * d, 1) / deviation
                gain_grad += tl.sum(across * g, 0)
                d_g = across * gain[None, :]
            if SQUARED and IN_LOSS:
                gain_grad -= tl.sum(d_g * y, 0)
                offset_grad -= tl.sum(d_g, 0)
                d_norm -= d_g * gain[None, :]
                if RESIDUAL:
                    d_k -= d_g
            tl.store(dv + (at + rows)[:, None] * (heads * DV) + values[None, :], d_g.to(low), mask=inside[:, None])
            d_before = -d_g
            if IN_LOSS:
                d_before = (_across(d_norm, y, DV)) / deviation[:, None] + (d_deviation / DV)[:, None] * y
            if SQUARED or IN_LOSS:
                low_before = d_before.to(low)
                d_k += tl.dot(low_before, tl.trans(read), input_precision=PRECISION)
                grad += tl.dot(tl.trans(its_k), low_before, input_precision=PRECISION)
                if BIAS:
                    shift_grad += tl.sum(d_before, 0)
            tl.store(dq + (at + rows)[:, None] * (heads * DK) + keys[None, :], d_q.to(low), mask=inside[:, None])
            tl.store(dk + (at + rows)[:, None] * (heads * DK) + keys[None, :], d_k.to(low), mask=inside[:, None])
        tl.debug_barrier()
    tl.store(d_weights + z_place * DK * DV + places, grad)
    if BIAS:
        tl.store(d_bias + z_place * DV + values, shift_grad)
    if HEAD:
        tl.store(d_gamma + z_place * DV + values, gain_grad)
        tl.store(d_beta + z_place * DV + values, offset_grad)
