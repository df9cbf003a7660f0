"""Kernels: nine products of a part of the grid, the read with the updated weights, and the gradient."""

import triton
import triton.language as tl

from kvbind.kernels.common.grid_tiles import grid_places, one_weight, program_channels, shifted, weight_places


@triton.jit(do_not_specialize=["heads", "height", "width", "span", "rate_batch"])
def products_kernel(
    x, y, rate, partial, scale, heads, height, width, span,
    x_batch, x_row, x_head, y_batch, y_row, y_head, rate_batch, rate_row, rate_head,
    D: tl.constexpr, RATED: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Nine sums over a part of the places: x at a neighbour, times y and its rate."""
    batch, head, program, channels, inside = program_channels(heads, D, BC)
    part = tl.program_id(1)
    x += batch * x_batch + head * x_head
    y += batch * y_batch + head * y_head
    rate += batch * rate_batch + head * rate_head
    start = part * span
    stop = tl.minimum(start + span, height * width)
    a00 = tl.zeros((BT, BC), tl.float32)
    a01, a02, a10, a11, a12, a20, a21, a22 = a00, a00, a00, a00, a00, a00, a00, a00
    for t in range(start, stop, BT):
        p, r, c = grid_places(t, stop, width, BT)
        g = shifted(y, y_row, rate, rate_row, p, r, c, 0, 0, height, width, channels, inside, RATED)
        a00 += g * shifted(x, x_row, rate, rate_row, p, r, c, -1, -1, height, width, channels, inside, False)
        a01 += g * shifted(x, x_row, rate, rate_row, p, r, c, -1, 0, height, width, channels, inside, False)
        a02 += g * shifted(x, x_row, rate, rate_row, p, r, c, -1, 1, height, width, channels, inside, False)
        a10 += g * shifted(x, x_row, rate, rate_row, p, r, c, 0, -1, height, width, channels, inside, False)
        a11 += g * shifted(x, x_row, rate, rate_row, p, r, c, 0, 0, height, width, channels, inside, False)
        a12 += g * shifted(x, x_row, rate, rate_row, p, r, c, 0, 1, height, width, channels, inside, False)
        a20 += g * shifted(x, x_row, rate, rate_row, p, r, c, 1, -1, height, width, channels, inside, False)
        a21 += g * shifted(x, x_row, rate, rate_row, p, r, c, 1, 0, height, width, channels, inside, False)
        a22 += g * shifted(x, x_row, rate, rate_row, p, r, c, 1, 1, height, width, channels, inside, False)
    at = partial + (program * tl.num_programs(1) + part) * 9 * D + channels
    tl.store(at, scale * tl.sum(a00, axis=0)[None, :], mask=inside)
    tl.store(at + D, scale * tl.sum(a01, axis=0)[None, :], mask=inside)
    tl.store(at + 2 * D, scale * tl.sum(a02, axis=0)[None, :], mask=inside)
    tl.store(at + 3 * D, scale * tl.sum(a10, axis=0)[None, :], mask=inside)
    tl.store(at + 4 * D, scale * tl.sum(a11, axis=0)[None, :], mask=inside)
    tl.store(at + 5 * D, scale * tl.sum(a12, axis=0)[None, :], mask=inside)
    tl.store(at + 6 * D, scale * tl.sum(a20, axis=0)[None, :], mask=inside)
    tl.store(at + 7 * D, scale * tl.sum(a21, axis=0)[None, :], mask=inside)
    tl.store(at + 8 * D, scale * tl.sum(a22, axis=0)[None, :], mask=inside)


@triton.jit
def _total(partial, program, channels, inside, D: tl.constexpr, BC: tl.constexpr):
    """The sum of all parts' products, as a tile of weights."""
    weights = tl.arange(0, 16)[:, None]
    parts = tl.num_programs(1)
    total = tl.zeros((16, BC), tl.float32)
    for part in range(0, parts):
        at = partial + (program * parts + part) * 9 * D + weights * D + channels
        total += tl.load(at, mask=inside & (weights < 9), other=0.0)
    return total


@triton.jit
def _convolve(
    kernel, x, x_row, y, y_row, rate, rate_row, v, v_row, dots, dots_row, start, stop, height, width, channels, inside,
    S: tl.constexpr, RATE_IN: tl.constexpr, RATE_OUT: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Store in y the convolution of x (`S` = 1) or its transpose, which takes from the neighbours opposite (`S` = -1).

    `RATE_IN` multiplies x by its places' rates. `RATE_OUT` multiplies the result by them, when its dot products with v are
    stored in `dots`.
    """
    k00, k01, k02 = one_weight(kernel, 0), one_weight(kernel, 1), one_weight(kernel, 2)
    k10, k11, k12 = one_weight(kernel, 3), one_weight(kernel, 4), one_weight(kernel, 5)
    k20, k21, k22 = one_weight(kernel, 6), one_weight(kernel, 7), one_weight(kernel, 8)
    for t in range(start, stop, BT):
        p, r, c = grid_places(t, stop, width, BT)
        z = k00 * shifted(x, x_row, rate, rate_row, p, r, c, -S, -S, height, width, channels, inside, RATE_IN)
        z += k01 * shifted(x, x_row, rate, rate_row, p, r, c, -S, 0, height, width, channels, inside, RATE_IN)
        z += k02 * shifted(x, x_row, rate, rate_row, p, r, c, -S, S, height, width, channels, inside, RATE_IN)
        z += k10 * shifted(x, x_row, rate, rate_row, p, r, c, 0, -S, height, width, channels, inside, RATE_IN)
        z += k11 * shifted(x, x_row, rate, rate_row, p, r, c, 0, 0, height, width, channels, inside, RATE_IN)
        z += k12 * shifted(x, x_row, rate, rate_row, p, r, c, 0, S, height, width, channels, inside, RATE_IN)
        z += k20 * shifted(x, x_row, rate, rate_row, p, r, c, S, -S, height, width, channels, inside, RATE_IN)
        z += k21 * shifted(x, x_row, rate, rate_row, p, r, c, S, 0, height, width, channels, inside, RATE_IN)
        z += k22 * shifted(x, x_row, rate, rate_row, p, r, c, S, S, height, width, channels, inside, RATE_IN)
        there, places = r >= 0, p.to(tl.int64)
        if RATE_OUT:
            own = shifted(v, v_row, rate, rate_row, p, r, c, 0, 0, height, width, channels, inside, False)
            tl.store(dots + places * dots_row, tl.sum(z * own, axis=1)[:, None], mask=there)
            z *= tl.load(rate + places * rate_row, mask=there, other=0.0)
        tl.store(y + places * y_row + channels, z.to(y.dtype.element_ty), mask=there & inside)


@triton.jit(do_not_specialize=["heads", "height", "width", "span"])
def read_kernel(
    q, kernel, partial, o, new, norms, sign, heads, height, width, span,
    q_batch, q_row, q_head, kernel_batch, kernel_head,
    D: tl.constexpr, CLIP: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Enter the summed update into the kernel, and read a part of the places with it."""
    batch, head, program, channels, inside = program_channels(heads, D, BC)
    part = tl.program_id(1)
    at, there = weight_places(channels, inside)
    k = tl.load(kernel + batch * kernel_batch + head * kernel_head + at, mask=there, other=0.0)
    update = _total(partial, program, channels, inside, D, BC)
    if CLIP:
        largest = tl.max(tl.abs(update), axis=0)[None, :]
        unit = tl.where(largest > 0.0, largest, 1.0)
        scaled = update / unit
        norm = unit * tl.sqrt(tl.sum(scaled * scaled, axis=0)[None, :])
        tl.store(norms + program * D + channels, norm, mask=inside & (part == 0))
        update /= norm + 1.0
    k += sign * update
    tl.store(new + program * D * 9 + at, k, mask=there & (part == 0))
    start = part * span
    stop = tl.minimum(start + span, height * width)
    q += batch * q_batch + head * q_head
    o += batch * height * width * heads * D + head * D
    _convolve(k, q, q_row, o, heads * D, q, 0, q, 0, o, 0, start, stop, height, width, channels, inside, 1, False, False, BT)


@triton.jit(do_not_specialize=["heads", "height", "width", "span", "rate_batch"])
def backward_kernel(
    k, v, do, kernel, rate, new, norms, dnew, partial, dq, dk, dv, dkernel, drate, scale, sign, heads, height, width, span,
    k_batch, k_row, k_head, v_batch, v_row, v_head, do_batch, do_row, do_head, kernel_batch, kernel_head,
    rate_batch, rate_row, rate_head,
    D: tl.constexpr, CLIP: tl.constexpr, RATED: tl.constexpr, NEW_USED: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Take the summed gradient of the new kernel through the update, and from there to a part of the places."""
    batch, head, program, channels, inside = program_channels(heads, D, BC)
    part = tl.program_id(1)
    at, there = weight_places(channels, inside)
    entered = tl.load(new + program * D * 9 + at, mask=there, other=0.0)
    d = _total(partial, program, channels, inside, D, BC)
    if NEW_USED:
        d += tl.load(dnew + program * D * 9 + at, mask=there, other=0.0)
    tl.store(dkernel + program * D * 9 + at, d, mask=there & (part == 0))
    d *= sign
    if CLIP:
        norm = tl.load(norms + program * D + channels, mask=inside, other=0.0)
        old = tl.load(kernel + batch * kernel_batch + head * kernel_head + at, mask=there, other=0.0)
        clipped = sign * (entered - old)
        along = tl.sum(d * clipped, axis=0)[None, :] / tl.where(norm > 0.0, norm, 1.0)
        d = d / (norm + 1.0) - clipped * along
    d *= scale

    start = part * span
    stop = tl.minimum(start + span, height * width)
    first = batch * height * width * heads
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    do += batch * do_batch + head * do_head
    rate += batch * rate_batch + head * rate_head
    dq += (first + head) * D
    dk += (first + head) * D
    dv += (first + head) * D
    # programs that share a head leave their channels' sums beside each other
    tiles: tl.constexpr = (D + BC - 1) // BC
    drate += (first + head) * tiles + tl.program_id(0) % tiles
    row = heads * D
    _convolve(entered, do, do_row, dq, row, rate, rate_row, v, v_row, drate, heads * tiles, start, stop, height, width,
              channels, inside, -1, False, False, BT)  # fmt: skip
    _convolve(d, k, k_row, dv, row, rate, rate_row, v, v_row, drate, heads * tiles, start, stop, height, width,
              channels, inside, 1, False, RATED, BT)  # fmt: skip
    _convolve(d, v, v_row, dk, row, rate, rate_row, v, v_row, drate, heads * tiles, start, stop, height, width,
              channels, inside, -1, RATED, False, BT)  # fmt: skip
