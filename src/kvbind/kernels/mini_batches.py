"""TTT-Linear as one kernel: the dual form of mini-batches (arXiv 2407.04620), a program for each sequence and head.

A program walks through its mini-batches with the state, a matrix and maybe a bias, in registers. Of a mini-batch's tokens

    z = k W + b,  d = -dL/dz,  D = r d
    o = head(q W + b + c (tril(q k^T) D + tril(1) D_b), q)
    W <- W + c_last k^T D,  b <- b + c_last sum D_b

where the loss is `-<f(k), v>` or `1/2 ||f(k) - v||^2`, `f` is `z` or layer normalization of it with a gain and a shift, with
or without `k` added, and r, r_b, c are numbers for each token. Gradients are closed-form, as those of
`kvbind.inner.networks.LayerNormHead`.

The backward pass goes from the last mini-batch to the first. Kept for it are the operands and the state before every so many
mini-batches, a *stretch*; a stretch is walked through forward once more, then backward. Products take operands in the dtype
of q, k and v, a state is rounded to it where it is read, all else is in float32.

What is not finite in a token reaches only the outputs from there on, which are NaN.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvbind.kernels import direct
from kvbind.kernels.common import Launcher, cdiv, dot_precision, on_device_of, power_of_2

MOST_TOKENS = 64
"""The longest mini-batch."""

LEAST_TOKENS = 16
"""Tokens of the smallest tile of a matrix unit."""

MOST_WIDTH = {torch.bfloat16: 128, torch.float16: 128, torch.float32: 32}
"""The widest head whose state and its gradient are held in registers, where products of float32 have operands too."""


def covers(dtype: torch.dtype, size: int, key_width: int, value_width: int) -> bool:
    """Whether `mini_batches` takes operands of `dtype` and of these widths, in mini-batches of `size` tokens."""
    most = MOST_WIDTH.get(dtype, 0)
    widths = all(16 <= width <= most and width == power_of_2(width) for width in (key_width, value_width))
    return 1 < size <= MOST_TOKENS and widths


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
def _forward_kernel(
    q, k, v, weights, bias, gamma, beta, rates, bias_rates, read_rate, out, end, bias_end, starts, bias_starts,
    tokens, heads, stretch, stretches, eps,
    SIZE: tl.constexpr, L: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BIAS: tl.constexpr, BIAS_RATES: tl.constexpr,
    READ_RATE: tl.constexpr, HEAD: tl.constexpr, SQUARED: tl.constexpr, IN_LOSS: tl.constexpr, IN_READ: tl.constexpr,
    RESIDUAL: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
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
def _backward_kernel(
    d_out, d_end, d_bias_end, q, k, v, gamma, beta, rates, bias_rates, read_rate, starts, bias_starts, room, bias_room,
    dq, dk, dv, d_weights, d_bias, d_gamma, d_beta, d_rates, d_bias_rates, d_read_rate,
    tokens, heads, stretch, stretches, eps,
    SIZE: tl.constexpr, L: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BIAS: tl.constexpr, BIAS_RATES: tl.constexpr,
    READ_RATE: tl.constexpr, HEAD: tl.constexpr, SQUARED: tl.constexpr, IN_LOSS: tl.constexpr, IN_READ: tl.constexpr,
    RESIDUAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
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


_launch_forward, _launch_backward = Launcher(_forward_kernel), Launcher(_backward_kernel)


def _warps(key_width: int, value_width: int, states: int) -> int:
    """Warps of a program that holds so many matrices of a state's size: of each, 32 registers of each thread."""
    return max(2, min(8, states * key_width * value_width // 1024))


def _constants(
    states: int, q: Tensor, v: Tensor, bias: Tensor | None, gamma: Tensor | None, bias_rates: Tensor | None,
    read_rate: Tensor | None, size: int, squared: bool, in_loss: bool, in_read: bool, residual: bool,
) -> dict[str, Any]:  # fmt: skip
    width, value_width = q.shape[-1], v.shape[-1]
    return {
        "SIZE": size, "L": max(LEAST_TOKENS, power_of_2(size)), "DK": width, "DV": value_width, "BIAS": bias is not None,
        "BIAS_RATES": bias_rates is not None, "READ_RATE": read_rate is not None, "HEAD": gamma is not None,
        "SQUARED": squared, "IN_LOSS": in_loss, "IN_READ": in_read, "RESIDUAL": residual,
        "PRECISION": dot_precision(q.dtype), "num_warps": _warps(width, value_width, states), "num_stages": 1,
    }  # fmt: skip


def _stretches(count: int) -> tuple[int, int]:
    """Mini-batches of a stretch, and how many stretches there are: about as many of both, so that least is kept."""
    each = max(1, math.isqrt(count))
    return each, cdiv(count, each)


@torch.library.custom_op("kvbind::mini_batches", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, weights: Tensor, bias: Tensor | None, gamma: Tensor | None, beta: Tensor | None,
    rates: Tensor, bias_rates: Tensor | None, read_rate: Tensor | None, size: int, eps: float, squared: bool, in_loss: bool,
    in_read: bool, residual: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    batch, tokens, heads, _ = q.shape
    out, end, bias_end, starts, bias_starts = _outcome(q, v, weights, bias, size, keep)
    each, stretches = _stretches(tokens // size)
    nothing = rates
    constants = _constants(1, q, v, bias, gamma, bias_rates, read_rate, size, squared, in_loss, in_read, residual)
    with on_device_of(q):
        _launch_forward[(batch * heads,)](
            q, k, v, weights, *(nothing if x is None else x for x in (bias, gamma, beta)), rates,
            *(nothing if x is None else x for x in (bias_rates, read_rate)), out, end, bias_end, starts, bias_starts,
            tokens, heads, each, stretches, eps, **constants, KEEP=keep,
        )  # fmt: skip
    return out, end, bias_end, starts, bias_starts


def _outcome(
    q: Tensor, v: Tensor, weights: Tensor, bias: Tensor | None, size: int, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Room for what `_forward` returns."""
    stretches = _stretches(q.shape[1] // size)[1] if keep else 0
    batch, heads = q.shape[0], q.shape[2]
    biased = bias is not None
    return (
        torch.empty_like(v, memory_format=torch.contiguous_format),
        torch.empty_like(weights, memory_format=torch.contiguous_format),
        weights.new_empty((batch, heads, v.shape[-1] if biased else 0)),
        weights.new_empty((batch, heads, stretches, *weights.shape[2:])),
        weights.new_empty((batch, heads, stretches, v.shape[-1] if biased else 0)),
    )


@_forward.register_fake
def _(
    q, k, v, weights, bias, gamma, beta, rates, bias_rates, read_rate, size, eps, squared, in_loss, in_read, residual, keep
):
    return _outcome(q, v, weights, bias, size, keep)


@torch.library.custom_op("kvbind::mini_batches_backward", mutates_args=())
def _backward(
    d_out: Tensor | None, d_end: Tensor | None, d_bias_end: Tensor | None, starts: Tensor, bias_starts: Tensor,
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, gamma: Tensor | None, beta: Tensor | None, rates: Tensor,
    bias_rates: Tensor | None, read_rate: Tensor | None, size: int, eps: float, squared: bool, in_loss: bool, in_read: bool,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    batch, tokens, heads, width = q.shape
    value_width = v.shape[-1]
    each, stretches = _stretches(tokens // size)
    found = _gradients(q, k, v, bias, gamma, rates, bias_rates, read_rate)
    d_out = torch.zeros_like(v) if d_out is None else d_out.to(v.dtype).contiguous()
    d_end = torch.zeros_like(found[3]) if d_end is None else d_end.contiguous()
    d_bias_end = torch.zeros_like(found[4]) if d_bias_end is None else d_bias_end.contiguous()
    room = q.new_empty((batch * heads, each, width, value_width))
    bias_room = rates.new_empty((batch * heads, each, value_width if bias is not None else 0))
    constants = _constants(2, q, v, bias, gamma, bias_rates, read_rate, size, squared, in_loss, in_read, residual)
    nothing = rates
    with on_device_of(q):
        _launch_backward[(batch * heads,)](
            d_out, d_end, d_bias_end, q, k, v, *(nothing if x is None else x for x in (gamma, beta)), rates,
            *(nothing if x is None else x for x in (bias_rates, read_rate)), starts, bias_starts, room, bias_room, *found,
            tokens, heads, each, stretches, eps, **constants,
        )  # fmt: skip
    return found


def _gradients(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, gamma: Tensor | None, rates: Tensor, bias_rates: Tensor | None,
    read_rate: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Room for the gradients of q, k, v, weights, bias, gamma, beta, rates, the bias's rates and the reader's."""
    batch, _, heads, width = q.shape
    value_width = v.shape[-1]

    def vector(x: Tensor | None) -> Tensor:
        return rates.new_empty((batch, heads, value_width if x is not None else 0))

    def per_token(x: Tensor | None) -> Tensor:
        return rates.new_empty(rates.shape if x is not None else (0,))

    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    matrix = rates.new_empty((batch, heads, width, value_width))
    of_tokens = per_token(rates), per_token(bias_rates), per_token(read_rate)
    return dq, dk, dv, matrix, vector(bias), vector(gamma), vector(gamma), *of_tokens


@_backward.register_fake
def _(
    d_out, d_end, d_bias_end, starts, bias_starts, q, k, v, bias, gamma, beta, rates, bias_rates, read_rate, size, eps,
    squared, in_loss, in_read, residual,
):  # fmt: skip
    return _gradients(q, k, v, bias, gamma, rates, bias_rates, read_rate)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, _, bias, gamma, beta, rates, bias_rates, read_rate, *ctx.static, ctx.keep = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[3:], q, k, v, bias, gamma, beta, rates, bias_rates, read_rate)


def _differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    if not ctx.keep:
        raise RuntimeError("kvbind::mini_batches was called with keep=False, so that it has no gradient")
    saved = ctx.saved_tensors
    d_out, d_end, d_bias_end = grads[:3]
    bias, gamma, beta, _, bias_rates, read_rate = saved[5:]
    found = direct.call(_backward, d_out, d_end, d_bias_end if bias is not None else None, *saved, *ctx.static)
    given = (True, True, True, True, *(x is not None for x in (bias, gamma, beta)), True, bias_rates is not None)
    wanted = (*given, read_rate is not None)
    return *(d if there else None for d, there in zip(found, wanted, strict=True)), *(None,) * (len(ctx.static) + 1)


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def mini_batches(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor,
    rates: Tensor,
    *,
    size: int,
    bias: Tensor | None = None,
    bias_rates: Tensor | None = None,
    read_rate: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    eps: float = 1e-6,
    squared: bool = True,
    in_loss: bool = True,
    in_read: bool = True,
    residual: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run whole mini-batches of one layer, gradients taken at each one's starting weights.

    Args:
        q: what is read, `[B, T, H, Dk]`; bfloat16, float16 or float32.
        k: keys `[B, T, H, Dk]` in q's dtype.
        v: values `[B, T, H, Dv]` in q's dtype.
        weights: starting matrix, float32 `[B, H, Dk, Dv]`.
        rates: learning rates, float32 `[B, T, H]`, negative for ascent.
        size: tokens of a mini-batch, of which T is a multiple.
        bias: starting bias, float32 `[B, H, Dv]`, or None.
        bias_rates: its own learning rates, or None for `rates`.
        read_rate: the share c of its mini-batch's writes that a token sees, float32 `[B, T, H]`, or None for 1.
        gamma: gain of the head, float32 `[B, H, Dv]`, or None for no head.
        beta: its shift, likewise.
        eps: added to the head's variance.
        squared: the loss is the squared error and not the dot product.
        in_loss: the head is in the loss.
        in_read: outputs pass the head.
        residual: the head adds the layer's input, for which Dk = Dv.

    Returns:
        Outputs `[B, T, H, Dv]` in q's dtype, and matrix and bias after the last mini-batch.

    Raises:
        ValueError: T is no positive multiple of `size`, or sizes or dtypes are not such as `covers` says.
    """
    if not covers(q.dtype, size, q.shape[-1], v.shape[-1]) or len({x.dtype for x in (q, k, v)}) > 1:
        raise ValueError(
            f"q, k and v must be of one dtype, a power of two wide from 16 to that one's {MOST_WIDTH}, and size from 2 "
            f"to {MOST_TOKENS}; got {q.dtype} {list(q.shape)}, {v.dtype} {list(v.shape)} and {size}"
        )
    if not q.shape[1] or q.shape[1] % size:
        raise ValueError(f"q must have a positive multiple of size={size} tokens; got {q.shape[1]}")
    head = gamma is not None
    operands = (q, k, v, weights, bias, gamma, beta, rates, bias_rates, read_rate)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in operands)
    out, end, bias_end, *_ = direct.call(
        _forward, *(None if x is None else x.contiguous() for x in operands), size, float(eps), squared, in_loss and head,
        in_read and head, residual and head, keep,
    )  # fmt: skip
    return out, end, None if bias is None else bias_end
