"""Queries and keys of a layer's two paths: rotated for attention; scaled, normalized and rotated for the fast weights.

With channels c of attention heads rotated against each other by halves (arXiv 2104.09864), and the L2 norm over the channels
of a fast head (arXiv 2505.23884),

    attention = rotate(x)        y = silu(x scale_c + offset_c)        fast = rotate(y / (|y| + eps))

One launch each way. A program goes over tokens with the queries or keys of one fast head, whose channels are whole attention
heads. Backward it keeps its sums of the gradients of scale and offset, which a sum over programs completes; beside those and
the angles nothing but x, outputs and gradients crosses memory. All arithmetic is in float32, with one
rounding at the end.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvbind.kernels.common.activations import activate, slope
from kvbind.kernels.common.devices import on_device_of
from kvbind.kernels.common.operands import DTYPES, cdiv, last_contiguous, power_of_2
from kvbind.kernels.launching import dispatcher
from kvbind.kernels.launching.launcher import Launcher

WIDEST = 1024
"""The greatest width of a fast head, counted in attention heads and halves of them rounded up to powers of two."""

TILE = 256
"""Pairs of channels that are rotated against each other, times tokens, of a tile that one warp holds: eight for a thread. It
has a token of its own where a head is that wide, and adds up its norm without waiting for another."""

FORWARD_PROGRAMS, BACKWARD_PROGRAMS = 8448, 2112
"""Programs at the most, about: each has tokens, and backward partial sums, of its own."""


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
def _channels(R2: tl.constexpr, H2: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, BT: tl.constexpr):
    """Of a tile `[attention heads, BT, half a head]`, first halves: attention heads, channels within them, what is there.

    Tiles that meet in arithmetic are loaded in one shape, broadcast before they are: so each thread has the same places of
    all, and nothing goes through shared memory but sums.
    """
    r = tl.arange(0, R2)[:, None, None]
    j = tl.arange(0, H2)[None, None, :]
    head, j = tl.broadcast_to(tl.program_id(1) * R + r, (R2, BT, H2)), tl.broadcast_to(j, (R2, BT, H2))
    return head, j, tl.broadcast_to((r < R), (R2, BT, H2)) & (j < HALF)


@triton.jit
def _place(tile, across, length, table_batch, cosines, sines, j, inside, HALF: tl.constexpr, BT: tl.constexpr):
    """A tile's row, its tokens `[1, BT, 1]`, which of the tile is there, and its cosines and sines."""
    batch = (tile // across).to(tl.int64)
    token = tile % across * BT + tl.arange(0, BT)[None, :, None]
    there = inside & (token < length)
    angle = batch * table_batch + token.to(tl.int64) * HALF + j
    cos, sin = tl.load(cosines + angle, mask=there, other=0.0), tl.load(sines + angle, mask=there, other=0.0)
    return batch, token.to(tl.int64), there, cos, sin


@triton.jit
def _both(pointers, there, HALF: tl.constexpr):
    """Both halves of heads, in float32."""
    a = tl.load(pointers, mask=there, other=0.0).to(tl.float32)
    return a, tl.load(pointers + HALF, mask=there, other=0.0).to(tl.float32)


@triton.jit
def _unit(za, zb, eps, SILU: tl.constexpr):
    """What activation makes of both halves, its norm, and one over that with eps added."""
    if SILU:
        ya, yb = activate(za, "silu"), activate(zb, "silu")
    else:
        ya, yb = za, zb
    norm = tl.sqrt(tl.sum(tl.sum(ya * ya + yb * yb, axis=2), axis=0))[None, :, None]
    return ya, yb, norm, 1.0 / (norm + eps)


# strides are specialized on, as vectors are loaded where widths are known to divide them; new lengths compile nothing
@Launcher
@triton.jit(do_not_specialize=["tiles", "across", "length", "table_batch"])
def _operands_forward(
    q, k, scale, offset, cosines, sines, q_rotated, k_rotated, q_fast, k_fast, eps, tiles, across, length, table_batch,
    q_batch, q_row, k_batch, k_row,
    D: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, R2: tl.constexpr, H2: tl.constexpr, SILU: tl.constexpr,
    ROTARY: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Queries or keys of every so many-th tile of tokens."""
    place = tl.program_id(2)
    if place == 0:
        x, x_batch, x_row, rotated, fast = q, q_batch, q_row, q_rotated, q_fast
    else:
        x, x_batch, x_row, rotated, fast = k, k_batch, k_row, k_rotated, k_fast
    head, j, inside = _channels(R2, H2, R, HALF, BT)
    channel = head * 2 * HALF + j
    scale_a, scale_b = _both(scale + 2 * channel + place, inside, 2 * HALF)
    offset_a, offset_b = _both(offset + 2 * channel + place, inside, 2 * HALF)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        batch, token, there, cos, sin = _place(
            tile, across, length, table_batch, cosines, sines, j, inside, HALF, BT)  # fmt: skip
        a, b = _both(x + batch * x_batch + token * x_row + channel, there, HALF)
        ya, yb, _, inverse = _unit(a * scale_a + offset_a, b * scale_b + offset_b, eps, SILU)
        at = (batch * length + token) * D + channel
        tl.store(rotated + at, (a * cos - b * sin).to(q.dtype.element_ty), mask=there)
        tl.store(rotated + at + HALF, (b * cos + a * sin).to(q.dtype.element_ty), mask=there)
        ua, ub = ya * inverse, yb * inverse
        if ROTARY:
            ra, rb = ua * cos - ub * sin, ub * cos + ua * sin
        else:
            ra, rb = ua, ub
        tl.store(fast + at, ra.to(q.dtype.element_ty), mask=there)
        tl.store(fast + at + HALF, rb.to(q.dtype.element_ty), mask=there)


@Launcher
@triton.jit(do_not_specialize=["tiles", "across", "length", "table_batch"])
def _operands_backward(
    q, k, scale, offset, cosines, sines, dq_rotated, dk_rotated, dq_fast, dk_fast, dq, dk, dscale, doffset, eps,
    tiles, across, length, table_batch, q_batch, q_row, k_batch, k_row, dq_batch, dq_row, dq_head, dk_batch, dk_row, dk_head,
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
    head, j, inside = _channels(R2, H2, R, HALF, BT)
    channel, turned = head * 2 * HALF + j, head.to(tl.int64) * g_head + j
    scale_a, scale_b = _both(scale + 2 * channel + place, inside, 2 * HALF)
    offset_a, offset_b = _both(offset + 2 * channel + place, inside, 2 * HALF)
    # sums over tokens of a tile are left to the end: until then each thread keeps its own
    to_scale_a = tl.zeros((R2, BT, H2), tl.float32)
    to_scale_b, to_offset_a, to_offset_b = to_scale_a, to_scale_a, to_scale_a
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        batch, token, there, cos, sin = _place(
            tile, across, length, table_batch, cosines, sines, j, inside, HALF, BT)  # fmt: skip
        at = (batch * length + token) * D + channel
        a, b = _both(x + batch * x_batch + token * x_row + channel, there, HALF)
        za, zb = a * scale_a + offset_a, b * scale_b + offset_b
        ya, yb, norm, inverse = _unit(za, zb, eps, SILU)
        ga, gb = _both(dfast + at, there, HALF)
        if ROTARY:
            ua, ub = ga * cos + gb * sin, gb * cos - ga * sin
        else:
            ua, ub = ga, gb
        along = tl.sum(tl.sum(ua * ya + ub * yb, axis=2), axis=0)[None, :, None]
        # a head of zeros has no direction to lose
        along *= inverse * inverse / tl.where(norm > 0.0, norm, 1.0)
        ua = ua * inverse - ya * along
        ub = ub * inverse - yb * along
        if SILU:
            ua *= slope(za, "silu")
            ub *= slope(zb, "silu")
        to_scale_a += ua * a
        to_scale_b += ub * b
        to_offset_a += ua
        to_offset_b += ub
        ga, gb = _both(drotated + batch * g_batch + token * g_row + turned, there, HALF)
        tl.store(dx + at, (ua * scale_a + ga * cos + gb * sin).to(q.dtype.element_ty), mask=there)
        tl.store(dx + at + HALF, (ub * scale_b + gb * cos - ga * sin).to(q.dtype.element_ty), mask=there)
    head, j, inside = _channels(R2, H2, R, HALF, 1)
    at = tl.program_id(0) * 2 * D + 2 * (head * 2 * HALF + j) + place
    tl.store(dscale + at, tl.sum(to_scale_a, axis=1)[:, None], mask=inside)
    tl.store(dscale + at + 2 * HALF, tl.sum(to_scale_b, axis=1)[:, None], mask=inside)
    tl.store(doffset + at, tl.sum(to_offset_a, axis=1)[:, None], mask=inside)
    tl.store(doffset + at + 2 * HALF, tl.sum(to_offset_b, axis=1)[:, None], mask=inside)


def _halves(width: int, attention_heads: int, fast_heads: int) -> dict[str, int]:
    """How a fast head is laid out: attention heads, half the width of one, and both rounded up to powers of two."""
    together, half = attention_heads // fast_heads, width // attention_heads // 2
    r2, h2 = power_of_2(together), power_of_2(half)
    return {"D": width, "R": together, "HALF": half, "R2": r2, "H2": h2}


def _launch(q: Tensor, cos: Tensor, programs: int, *heads: int) -> tuple[tuple[int, int, int], list[int], dict[str, int]]:
    """A grid of at most about so many programs, what it says of tokens, and how a tile is laid out."""
    batch, length, width = q.shape
    halves = _halves(width, *heads)
    tokens = max(TILE // (halves["R2"] * halves["H2"]), 1)
    across = cdiv(length, tokens)
    grid = min(batch * across, cdiv(programs, 2 * heads[1])), heads[1], 2
    rows = [batch * across, across, length, 0 if cos.shape[0] == 1 else length * halves["HALF"]]
    return grid, rows, halves | {"BT": tokens, "num_warps": cdiv(tokens * halves["R2"] * halves["H2"], TILE)}


@torch.library.custom_op("kvbind::layer_operands", mutates_args=())
def layer_operands(
    q: Tensor, k: Tensor, scale: Tensor, offset: Tensor, cos: Tensor, sin: Tensor, attention_heads: int, fast_heads: int,
    eps: float, silu: bool, rotary: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As `kvbind.layers.operands.make_operands`, of what `covers` says yes to."""
    outputs = _outputs(q, attention_heads, fast_heads)
    grid, rows, tile = _launch(q, cos, FORWARD_PROGRAMS, attention_heads, fast_heads)
    with on_device_of(q):
        _operands_forward[grid](
            q, k, scale.contiguous(), offset.contiguous(), cos.contiguous(), sin.contiguous(), *outputs, eps, *rows,
            *q.stride()[:2], *k.stride()[:2], **tile, SILU=silu, ROTARY=rotary,
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
    grid, rows, tile = _launch(q, cos, BACKWARD_PROGRAMS, attention_heads, fast_heads)
    dscale, doffset = q.new_empty((2, grid[0], q.shape[2], 2), dtype=torch.float32)
    turned = [last_contiguous(x) for x in (dq_rotated, dk_rotated)]
    with on_device_of(q):
        _operands_backward[grid](
            q, k, scale.contiguous(), offset.contiguous(), cos.contiguous(), sin.contiguous(), *turned, dq_fast.contiguous(),
            dk_fast.contiguous(), dq, dk, dscale, doffset, eps, *rows, *q.stride()[:2], *k.stride()[:2],
            *turned[0].stride()[:3], *turned[1].stride()[:3], **tile, SILU=silu, ROTARY=rotary,
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
    found = dispatcher.call(
        _layer_operands_backward, *gradients, q, k, scale, offset, cos, sin, ctx.attention_heads, ctx.fast_heads, ctx.eps,
        ctx.silu, ctx.rotary,
    )  # fmt: skip
    return *found, None, None, None, None, None, None, None


layer_operands.register_autograd(_gradient, setup_context=_setup)
