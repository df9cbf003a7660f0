"""Queries and keys of a layer's two paths: rotated for attention; scaled, normalized and rotated for the fast weights.

With channels c of attention heads rotated against each other by halves (arXiv 2104.09864), and the L2 norm over the channels
of a fast head (arXiv 2505.23884),

    attention = rotate(x)        y = silu(x scale_c + offset_c)        fast = rotate(y / (|y| + eps))

One launch each way. Programs have queries or keys of one fast head, whose channels are whole attention heads, and some
tokens. In the forward pass nothing but x and the outputs crosses memory. Backward, a program goes over many tokens and keeps
its sums of the gradients of scale and offset, which a sum over programs completes. All arithmetic is in float32, with one
rounding at the end.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvbind.kernels.activations import activate, slope
from kvbind.kernels.common import DTYPES, Launcher, cdiv, last_contiguous, on_device_of

WIDEST = 1024
"""The greatest width of a fast head, counted in attention heads and halves of them rounded up to powers of two."""

FORWARD_TILE, BACKWARD_TILE = 1024, 512
"""Pairs of channels that are rotated against each other, times tokens, of a tile."""

PROGRAMS = 1056
"""Programs of a backward pass at the most, each with tokens and partial sums of its own: eight for a multiprocessor."""


def covers(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, attention_heads: int, fast_heads: int) -> bool:
    """Whether `layer_operands` takes these `[B, T, d]`, with tables in float32.

    Fast heads must be made of whole attention heads.
    """
    if q.dtype not in DTYPES or len({q.dtype, k.dtype, v.dtype}) > 1 or not q.numel():
        return False
    if attention_heads % fast_heads or cos.dtype != torch.float32 or q.stride(-1) != 1 or k.stride(-1) != 1:
        return False
    halves = _halves(q.shape[-1], attention_heads, fast_heads)
    return 2 * halves["R2"] * halves["H2"] <= WIDEST


@triton.jit
def _channels(R2: tl.constexpr, H2: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr):
    """First halves of a fast head's channels `[1, attention heads, half a head]`, and which of the tile is there."""
    r = tl.arange(0, R2)[None, :, None]
    j = tl.arange(0, H2)[None, None, :]
    return (tl.program_id(1) * R + r) * 2 * HALF + j, (r < R) & (j < HALF)


@triton.jit
def _rows(start, stop, cosines, sines, table_length, H2: tl.constexpr, HALF: tl.constexpr, BT: tl.constexpr):
    """A tile's tokens `[BT, 1, 1]`, which of them are there, and their cosines and sines."""
    row = (start + tl.arange(0, BT).to(tl.int64))[:, None, None]
    j = tl.arange(0, H2)[None, None, :]
    angle, known = (row % table_length) * HALF + j, (row < stop) & (j < HALF)
    return row, row < stop, tl.load(cosines + angle, mask=known, other=0.0), tl.load(sines + angle, mask=known, other=0.0)


@triton.jit
def _unit(x, there, scale, offset, own, inside, HALF: tl.constexpr, SILU: tl.constexpr):
    """Both halves of x, their products with the scale plus the offset, what activation makes of them, and its norm."""
    a = tl.load(x, mask=there, other=0.0).to(tl.float32)
    b = tl.load(x + HALF, mask=there, other=0.0).to(tl.float32)
    za = a * tl.load(scale + own, mask=inside, other=0.0).to(tl.float32)
    zb = b * tl.load(scale + own + 2 * HALF, mask=inside, other=0.0).to(tl.float32)
    za += tl.load(offset + own, mask=inside, other=0.0).to(tl.float32)
    zb += tl.load(offset + own + 2 * HALF, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        ya, yb = activate(za, "silu"), activate(zb, "silu")
    else:
        ya, yb = za, zb
    norm = tl.sqrt(tl.sum(tl.sum(ya * ya + yb * yb, axis=2), axis=1))[:, None, None]
    return a, b, za, zb, ya, yb, norm


# strides are specialized on, as vectors are loaded where widths are known to divide them; new lengths compile nothing
@Launcher
@triton.jit(do_not_specialize=["rows", "length", "table_length"])
def _forward(
    q, k, scale, offset, cosines, sines, q_rotated, k_rotated, q_fast, k_fast, eps, rows, length, table_length,
    q_batch, q_row, k_batch, k_row,
    D: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, R2: tl.constexpr, H2: tl.constexpr, SILU: tl.constexpr,
    ROTARY: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Queries or keys of a tile of tokens."""
    place = tl.program_id(2)
    if place == 0:
        x, x_batch, x_row, rotated, fast = q, q_batch, q_row, q_rotated, q_fast
    else:
        x, x_batch, x_row, rotated, fast = k, k_batch, k_row, k_rotated, k_fast
    channel, inside = _channels(R2, H2, R, HALF)
    row, real, cos, sin = _rows(tl.program_id(0) * BT, rows, cosines, sines, table_length, H2, HALF, BT)
    there = inside & real
    x += row // length * x_batch + row % length * x_row + channel
    a, b, _, _, ya, yb, norm = _unit(x, there, scale, offset, 2 * channel + place, inside, HALF, SILU)
    at = row * D + channel
    tl.store(rotated + at, (a * cos - b * sin).to(q.dtype.element_ty), mask=there)
    tl.store(rotated + at + HALF, (b * cos + a * sin).to(q.dtype.element_ty), mask=there)
    ua, ub = ya / (norm + eps), yb / (norm + eps)
    if ROTARY:
        ra, rb = ua * cos - ub * sin, ub * cos + ua * sin
    else:
        ra, rb = ua, ub
    tl.store(fast + at, ra.to(q.dtype.element_ty), mask=there)
    tl.store(fast + at + HALF, rb.to(q.dtype.element_ty), mask=there)


@Launcher
@triton.jit(do_not_specialize=["rows", "length", "table_length"])
def _backward(
    q, k, scale, offset, cosines, sines, dq_rotated, dk_rotated, dq_fast, dk_fast, dq, dk, dscale, doffset, eps,
    rows, length, table_length, q_batch, q_row, k_batch, k_row, dq_batch, dq_row, dq_head, dk_batch, dk_row, dk_head,
    D: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, R2: tl.constexpr, H2: tl.constexpr, SILU: tl.constexpr,
    ROTARY: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Queries or keys of every so many-th tile of tokens."""
    place = tl.program_id(2)
    if place == 0:
        x, x_batch, x_row, dx, dfast = q, q_batch, q_row, dq, dq_fast
        drotated, g_batch, g_row, g_head = dq_rotated, dq_batch, dq_row, dq_head
    else:
        x, x_batch, x_row, dx, dfast = k, k_batch, k_row, dk, dk_fast
        drotated, g_batch, g_row, g_head = dk_rotated, dk_batch, dk_row, dk_head
    channel, inside = _channels(R2, H2, R, HALF)
    own = 2 * channel + place
    scale_a = tl.zeros((1, R2, H2), tl.float32)
    scale_b, offset_a, offset_b = scale_a, scale_a, scale_a
    for tile in range(tl.program_id(0), tl.cdiv(rows, BT), tl.num_programs(0)):
        row, real, cos, sin = _rows(tile * BT, rows, cosines, sines, table_length, H2, HALF, BT)
        there = inside & real
        batch, token, at = row // length, row % length, row * D + channel
        a, b, za, zb, ya, yb, norm = _unit(
            x + batch * x_batch + token * x_row + channel, there, scale, offset, own, inside, HALF, SILU)  # fmt: skip
        ga = tl.load(dfast + at, mask=there, other=0.0).to(tl.float32)
        gb = tl.load(dfast + at + HALF, mask=there, other=0.0).to(tl.float32)
        if ROTARY:
            ua, ub = ga * cos + gb * sin, gb * cos - ga * sin
        else:
            ua, ub = ga, gb
        along = tl.sum(tl.sum(ua * ya + ub * yb, axis=2), axis=1)[:, None, None]
        # a head of zeros has no direction to lose
        along /= tl.where(norm > 0.0, norm, 1.0) * (norm + eps) * (norm + eps)
        ua = ua / (norm + eps) - ya * along
        ub = ub / (norm + eps) - yb * along
        if SILU:
            ua *= slope(za, "silu")
            ub *= slope(zb, "silu")
        scale_a += tl.sum(ua * a, axis=0)[None]
        scale_b += tl.sum(ub * b, axis=0)[None]
        offset_a += tl.sum(ua, axis=0)[None]
        offset_b += tl.sum(ub, axis=0)[None]
        ua *= tl.load(scale + own, mask=inside, other=0.0).to(tl.float32)
        ub *= tl.load(scale + own + 2 * HALF, mask=inside, other=0.0).to(tl.float32)
        turned = (
            drotated + batch * g_batch + token * g_row + (channel // (2 * HALF)).to(tl.int64) * g_head + channel % (2 * HALF)
        )
        ga = tl.load(turned, mask=there, other=0.0).to(tl.float32)
        gb = tl.load(turned + HALF, mask=there, other=0.0).to(tl.float32)
        tl.store(dx + at, (ua + ga * cos + gb * sin).to(q.dtype.element_ty), mask=there)
        tl.store(dx + at + HALF, (ub + gb * cos - ga * sin).to(q.dtype.element_ty), mask=there)
    at = tl.program_id(0) * 2 * D + own
    tl.store(dscale + at, scale_a, mask=inside)
    tl.store(dscale + at + 2 * HALF, scale_b, mask=inside)
    tl.store(doffset + at, offset_a, mask=inside)
    tl.store(doffset + at + 2 * HALF, offset_b, mask=inside)


def _halves(width: int, attention_heads: int, fast_heads: int) -> dict[str, int]:
    """How a fast head is laid out: attention heads, half the width of one, and both rounded up to powers of two."""
    together, half = attention_heads // fast_heads, width // attention_heads // 2
    r2, h2 = triton.next_power_of_2(together), triton.next_power_of_2(half)
    return {"D": width, "R": together, "HALF": half, "R2": r2, "H2": h2}


def _tile(most: int, *sizes: int) -> dict[str, int]:
    """The same, and how many tokens a tile has."""
    halves = _halves(*sizes)
    return halves | {"BT": max(most // (halves["R2"] * halves["H2"]), 1)}


@torch.library.custom_op("kvbind::layer_operands", mutates_args=())
def layer_operands(
    q: Tensor, k: Tensor, scale: Tensor, offset: Tensor, cos: Tensor, sin: Tensor, attention_heads: int, fast_heads: int,
    eps: float, silu: bool, rotary: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As `kvbind.layers.operands.make_operands`, of what `covers` says yes to."""
    outputs = _outputs(q, attention_heads, fast_heads)
    length, width = q.shape[1:]
    rows, tile = q.shape[0] * length, _tile(FORWARD_TILE, width, attention_heads, fast_heads)
    with on_device_of(q):
        _forward[cdiv(rows, tile["BT"]), fast_heads, 2](
            q, k, scale.contiguous(), offset.contiguous(), cos.contiguous(), sin.contiguous(), *outputs, eps, rows, length,
            cos.shape[0] * length, *q.stride()[:2], *k.stride()[:2], **tile, SILU=silu, ROTARY=rotary, num_warps=4,
        )  # fmt: skip
    return outputs


def _outputs(q: Tensor, *heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # apart by heads here, so that gradients need not be brought together before they come
    rotated, fast = ((*q.shape[:2], n, q.shape[2] // n) for n in heads)
    return q.new_empty(rotated), q.new_empty(rotated), q.new_empty(fast), q.new_empty(fast)


@layer_operands.register_fake
def _(q, k, scale, offset, cos, sin, attention_heads, fast_heads, *_):
    return _outputs(q, attention_heads, fast_heads)


@torch.library.custom_op("kvbind::layer_operands_backward", mutates_args=())
def _layer_operands_backward(
    dq_rotated: Tensor, dk_rotated: Tensor, dq_fast: Tensor, dk_fast: Tensor, q: Tensor, k: Tensor, scale: Tensor,
    offset: Tensor, cos: Tensor, sin: Tensor, attention_heads: int, fast_heads: int, eps: float, silu: bool, rotary: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k `[B, T, d]`, scale and offset `[d, 2]`."""
    dq, dk = q.new_empty(q.shape), k.new_empty(k.shape)
    length, width = q.shape[1:]
    rows, tile = q.shape[0] * length, _tile(BACKWARD_TILE, width, attention_heads, fast_heads)
    programs = min(cdiv(rows, tile["BT"]), cdiv(PROGRAMS, 2 * fast_heads))
    dscale, doffset = q.new_empty((2, programs, width, 2), dtype=torch.float32)
    turned = [last_contiguous(x) for x in (dq_rotated, dk_rotated)]
    with on_device_of(q):
        _backward[programs, fast_heads, 2](
            q, k, scale.contiguous(), offset.contiguous(), cos.contiguous(), sin.contiguous(), *turned, dq_fast.contiguous(),
            dk_fast.contiguous(), dq, dk, dscale, doffset, eps, rows, length, cos.shape[0] * length, *q.stride()[:2],
            *k.stride()[:2], *turned[0].stride()[:3], *turned[1].stride()[:3], **tile, SILU=silu, ROTARY=rotary, num_warps=4,
        )  # fmt: skip
    return dq, dk, dscale.sum(0).to(scale.dtype), doffset.sum(0).to(offset.dtype)


@_layer_operands_backward.register_fake
def _(dq_rotated, dk_rotated, dq_fast, dk_fast, q, k, scale, offset, *_):
    return q.new_empty(q.shape), k.new_empty(k.shape), scale.new_empty(scale.shape), offset.new_empty(offset.shape)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.attention_heads, ctx.fast_heads, ctx.eps, ctx.silu, ctx.rotary = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    q, k, scale, offset, cos, sin = ctx.saved_tensors
    found = _layer_operands_backward(
        *gradients, q, k, scale, offset, cos, sin, ctx.attention_heads, ctx.fast_heads, ctx.eps, ctx.silu,
        ctx.rotary,
    )  # fmt: skip
    return *found, None, None, None, None, None, None, None


layer_operands.register_autograd(_gradient, setup_context=_setup)
