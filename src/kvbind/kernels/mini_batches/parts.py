"""What the passes over mini-batches share: operands and coefficients of a mini-batch, layers, the head and the loss.

`FLOW` says what reads and states take of what tokens write: 0, all of it; 1, the share of the one who reads; 2 and 3, what
gates leave of it, without and with a momentum buffer.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """`a @ b` in float32, of operands of one dtype."""
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def rows_of(base, first, stride, rows, columns, inside):
    """Some rows of a matrix; zeros where they are not `inside`."""
    return tl.load(base + (first + rows)[:, None] * stride + columns[None, :], mask=inside[:, None], other=0.0)


@triton.jit
def store_rows(base, first, stride, rows, columns, inside, x):
    """The opposite of `rows_of`."""
    tl.store(base + (first + rows)[:, None] * stride + columns[None, :], x.to(base.dtype.element_ty), mask=inside[:, None])


@triton.jit
def load_layer(base, of_bias, FROM: tl.constexpr, TO: tl.constexpr, BIAS: tl.constexpr):
    """A layer: matrix `[FROM, TO]`, and bias, zeros without one."""
    columns = tl.arange(0, TO)
    matrix = tl.load(base + tl.arange(0, FROM)[:, None] * TO + columns[None, :])
    bias = tl.zeros((TO,), tl.float32)
    if BIAS:
        bias = tl.load(of_bias + columns)
    return matrix, bias


@triton.jit
def store_layer(base, of_bias, matrix, bias, FROM: tl.constexpr, TO: tl.constexpr, BIAS: tl.constexpr):
    """The opposite of `load_layer`."""
    columns = tl.arange(0, TO)
    tl.store(base + tl.arange(0, FROM)[:, None] * TO + columns[None, :], matrix.to(base.dtype.element_ty))
    if BIAS:
        tl.store(of_bias + columns, bias)


@triton.jit
def load_state(base, DK: tl.constexpr, DH: tl.constexpr, DV: tl.constexpr, BIAS: tl.constexpr, FLOW: tl.constexpr):
    """A state as it lies in one piece: hidden layer if any, last layer; then their buffers if any, likewise.

    Returns:
        Matrix and bias of the last layer, its buffer, then the hidden layer and its buffer; others stand for what there is
        not.
    """
    DF: tl.constexpr = DH if DH else DK
    LAST: tl.constexpr = DK * DH + DH * BIAS
    BUFFER: tl.constexpr = LAST + DF * DV + DV * BIAS
    w, b = load_layer(base + LAST, base + LAST + DF * DV, DF, DV, BIAS)
    m, bm, w1, b1, m1, bm1 = w, b, w, b, w, b
    if DH:
        w1, b1 = load_layer(base, base + DK * DH, DK, DH, BIAS)
        m1, bm1 = w1, b1
    if FLOW == 3:
        base += BUFFER
        m, bm = load_layer(base + LAST, base + LAST + DF * DV, DF, DV, BIAS)
        if DH:
            m1, bm1 = load_layer(base, base + DK * DH, DK, DH, BIAS)
    return w, b, m, bm, w1, b1, m1, bm1


@triton.jit
def store_state(base, w, b, m, bm, w1, b1, m1, bm1, DK: tl.constexpr, DH: tl.constexpr, DV: tl.constexpr,
                BIAS: tl.constexpr, FLOW: tl.constexpr):  # fmt: skip
    """The opposite of `load_state`."""
    DF: tl.constexpr = DH if DH else DK
    LAST: tl.constexpr = DK * DH + DH * BIAS
    BUFFER: tl.constexpr = LAST + DF * DV + DV * BIAS
    store_layer(base + LAST, base + LAST + DF * DV, w, b, DF, DV, BIAS)
    if DH:
        store_layer(base, base + DK * DH, w1, b1, DK, DH, BIAS)
    if FLOW == 3:
        base += BUFFER
        store_layer(base + LAST, base + LAST + DF * DV, m, bm, DF, DV, BIAS)
        if DH:
            store_layer(base, base + DK * DH, m1, bm1, DK, DH, BIAS)


@triton.jit
def keep_state(
    room, bias_room, w, b, m, bm, w1, b1, m1, bm1,
    DK: tl.constexpr, DH: tl.constexpr, DV: tl.constexpr, BIAS: tl.constexpr, FLOW: tl.constexpr,
):  # fmt: skip
    """Store a state as products read it: matrices in the dtype of operands, biases apart."""
    DF: tl.constexpr = DH if DH else DK
    store_layer(room + DK * DH, bias_room + DH, w, b, DF, DV, BIAS)
    if DH:
        store_layer(room, bias_room, w1, b1, DK, DH, BIAS)
    if FLOW == 3:
        room, bias_room = room + DK * DH + DF * DV, bias_room + DH + DV
        store_layer(room + DK * DH, bias_room + DH, m, bm, DF, DV, BIAS)
        if DH:
            store_layer(room, bias_room, m1, bm1, DK, DH, BIAS)


@triton.jit
def kept_state(
    room, bias_room, DK: tl.constexpr, DH: tl.constexpr, DV: tl.constexpr, BIAS: tl.constexpr, FLOW: tl.constexpr
):  # fmt: skip
    """What `keep_state` stored, in the order of `load_state`."""
    DF: tl.constexpr = DH if DH else DK
    w, b = load_layer(room + DK * DH, bias_room + DH, DF, DV, BIAS)
    m, bm, w1, b1, m1, bm1 = w, b, w, b, w, b
    if DH:
        w1, b1 = load_layer(room, bias_room, DK, DH, BIAS)
        m1, bm1 = w1, b1
    if FLOW == 3:
        room, bias_room = room + DK * DH + DF * DV, bias_room + DH + DV
        m, bm = load_layer(room + DK * DH, bias_room + DH, DF, DV, BIAS)
        if DH:
            m1, bm1 = load_layer(room, bias_room, DK, DH, BIAS)
    return w, b, m, bm, w1, b1, m1, bm1


@triton.jit
def rates_of(rates, first, heads, rows, inside, COUNT: tl.constexpr, MINE: tl.constexpr, OWN: tl.constexpr):
    """Learning rates of a layer's matrix and bias, of `COUNT` for each token, biases last; 0 behind the mini-batch."""
    place = rates + (first + rows) * heads * COUNT
    rate = tl.load(place + MINE, mask=inside, other=0.0)
    of_bias = rate
    if OWN:
        of_bias = tl.load(place + COUNT // 2 + MINE, mask=inside, other=0.0)
    return rate, of_bias


@triton.jit
def last_of(x, rows, SIZE: tl.constexpr):
    """The number of the mini-batch's last token."""
    return tl.sum(tl.where(rows == SIZE - 1, x, 0.0), 0)


@triton.jit
def shares_of(flow, first, heads, rows, inside, sees, SIZE: tl.constexpr, FLOW: tl.constexpr):
    """What reads and the state behind a mini-batch take of the state before it and of what tokens write.

    Returns:
        `seen[t, j]`, of what j writes in what t reads; `end[j]`, the same in the state, one number where `FLOW` is below 2;
        `on_state[t]`, `on_buffer[t]`, of the state and of the buffer before the mini-batch in what t reads; of these two in
        the state behind it, where `entering[j]`, of what j writes, and a share of the buffer are in the buffer.
    """
    own = tl.where(inside, 1.0, 0.0)
    if FLOW < 2:
        if FLOW == 1:
            own = tl.load(flow + (first + rows) * heads, mask=inside, other=0.0)
        seen = tl.where(sees, own[:, None], 0.0)
        on_state, on_buffer, entering = own, own, own
        end = last_of(own, rows, SIZE)
        state_left, buffer_in_state, buffer_left = end, end, end
    else:
        WIDTH: tl.constexpr = SIZE + 1 if FLOW == 2 else SIZE + 4
        place = flow + (first + rows) * heads * WIDTH
        seen = tl.load(place[:, None] + rows[None, :], mask=sees & inside[:, None], other=0.0)
        end = tl.sum(tl.where(rows[:, None] == SIZE - 1, seen, 0.0), 0)[:, None]
        on_state = tl.load(place + SIZE, mask=inside, other=0.0)
        state_left = last_of(on_state, rows, SIZE)
        on_buffer, entering, buffer_in_state, buffer_left = own, own, state_left, state_left
        if FLOW == 3:
            on_buffer = tl.load(place + SIZE + 1, mask=inside, other=0.0)
            buffer_in_state = last_of(on_buffer, rows, SIZE)
            entering = tl.load(place + SIZE + 2, mask=inside, other=0.0)
            buffer_left = last_of(tl.load(place + SIZE + 3, mask=inside, other=0.0), rows, SIZE)
    return seen, end, on_state, on_buffer, state_left, buffer_in_state, entering, buffer_left


@triton.jit
def scores_of(x, features, counts, PLUS: tl.constexpr, PRECISION: tl.constexpr):
    """The scores of what reads to what writes, 1 more where a bias takes the same rates, zeros where nothing `counts`."""
    scores = product(x, tl.trans(features), PRECISION)
    if PLUS:
        scores += 1.0
    return tl.where(counts, scores, 0.0)


@triton.jit
def read_layer(
    x, matrix, bias, buffer, bias_buffer, scores, written, shifted, seen, on_state, on_buffer,
    OWN: tl.constexpr, FLOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What rows `x` read of a layer as each sees it; matrices and `written` in the dtype of `x`."""
    z = product(x, matrix, PRECISION) + bias[None, :]
    if FLOW >= 2:
        z = on_state[:, None] * z
    if FLOW == 3:
        z += on_buffer[:, None] * (product(x, buffer, PRECISION) + bias_buffer[None, :])
    z += product((seen * scores).to(x.dtype), written, PRECISION)
    if OWN:
        z += product(seen.to(x.dtype), shifted.to(x.dtype), PRECISION)
    return z


@triton.jit
def step(
    matrix, bias, buffer, bias_buffer, features, written, shifted, end, state_left, buffer_in_state, entering, buffer_left,
    BIAS: tl.constexpr, FLOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A layer and its buffer behind a mini-batch whose tokens write `features^T written`, `shifted` into the bias."""
    low = features.dtype
    across = tl.trans(features)
    update = product(across, (end * written).to(low), PRECISION)
    if FLOW >= 2:
        matrix = state_left * matrix
    if FLOW == 3:
        matrix += buffer_in_state * buffer
        buffer = buffer_left * buffer + product(across, (entering[:, None] * written).to(low), PRECISION)
    matrix += update
    if BIAS:
        if FLOW >= 2:
            bias = state_left * bias
        if FLOW == 3:
            bias += buffer_in_state * bias_buffer
            bias_buffer = buffer_left * bias_buffer + tl.sum(entering[:, None] * shifted, 0)
        bias += tl.sum(end * shifted, 0)
    return matrix, bias, buffer, bias_buffer


@triton.jit
def normalized(z, eps, DV: tl.constexpr):
    """LN(z), and the standard deviation that it divides by."""
    centred = z - (tl.sum(z, 1) / DV)[:, None]
    deviation = tl.sqrt(tl.sum(centred * centred, 1) / DV + eps)
    return centred / deviation[:, None], deviation


@triton.jit
def across(x, y, DV: tl.constexpr):
    """`x` without its mean and its part along `y`: LN's Jacobian at `y`, times the deviation."""
    return x - (tl.sum(x, 1) / DV)[:, None] - y * (tl.sum(x * y, 1) / DV)[:, None]


@triton.jit
def descent(
    k, v, z, gain, shift, eps, SQUARED: tl.constexpr, IN_LOSS: tl.constexpr, RESIDUAL: tl.constexpr, DV: tl.constexpr
):  # fmt: skip
    """`-dL/dz` of each token, and on the way to it `-dL/df`, LN(z) and its deviation (those of nothing without a head)."""
    g = v.to(tl.float32)
    y, deviation = z, tl.sum(z, 1)
    if IN_LOSS:
        y, deviation = normalized(z, eps, DV)
    if SQUARED:
        f = z
        if IN_LOSS:
            f = y * gain[None, :] + shift[None, :]
            if RESIDUAL:
                f += k.to(tl.float32)
        g -= f
    d = g
    if IN_LOSS:
        d = across(g * gain[None, :], y, DV) / deviation[:, None]
    return d, g, y, deviation


@triton.jit
def load_rows(base, L: tl.constexpr, D: tl.constexpr):
    """A tile of rows that lie one after another."""
    return tl.load(base + tl.arange(0, L)[:, None] * D + tl.arange(0, D)[None, :])


@triton.jit
def keep_rows(base, x, L: tl.constexpr, D: tl.constexpr):
    """The opposite of `load_rows`."""
    tl.store(base + tl.arange(0, L)[:, None] * D + tl.arange(0, D)[None, :], x.to(base.dtype.element_ty))
