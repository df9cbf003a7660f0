"""One update of a depthwise 3x3 convolution from all tokens, then a read: ViTTT's second branch (arXiv 2512.01643).

Tokens are the places of a grid, row after row. For each sequence and channel, with zeros outside the grid,

    G[y, x] = sum over places p of k[p + (y - 1, x - 1)] r[p] v[p]        K' = K + sign G / (|G| + 1)
    o[p] = sum over y, x of q[p + (y - 1, x - 1)] K'[y, x]

with the norm over the nine weights, or `K' = K + sign G` unclipped (specification, section 1).

Two launches each way, whose programs have some channels and some places. The first leaves float32 sums of nine products per
program and channel; programs of the second add those of their channels, always in the same order. The gradient of the kernel
that was read is the first launch again, with q and the output's gradient for k and v. All arithmetic is in float32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvbind.kernels.common import DTYPES, last_contiguous, multiprocessors, on_device_of

MAX_WIDTH = 1024
"""The widest head."""

PART = 64
"""The fewest places in a part of the grid."""


def covers(width: int, *dtypes: torch.dtype) -> bool:
    """Whether `full_conv` takes heads of this width and queries, keys and values of these dtypes."""
    return 0 < width <= MAX_WIDTH and all(dtype in DTYPES for dtype in dtypes)


@triton.jit
def _places(start, stop, width, BT: tl.constexpr):
    """A tile of places: numbers, rows and columns, each `[BT, 1]`; rows past `stop` are far outside the grid."""
    p = (start + tl.arange(0, BT))[:, None]
    return p, tl.where(p < stop, p // width, -4), p % width


@triton.jit
def _shifted(
    x, x_row, rate, rate_row, p, row, column, down: tl.constexpr, right: tl.constexpr, height, width, channels, inside,
    RATED: tl.constexpr,
):  # fmt: skip
    """Float32 `x`, times its places' rates if `RATED`, at the neighbours of a tile of places; zero outside the grid."""
    row, column = row + down, column + right
    there = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    p = (p + (down * width + right)).to(tl.int64)
    y = tl.load(x + p * x_row + channels, mask=there & inside, other=0.0).to(tl.float32)
    if RATED:
        y *= tl.load(rate + p * rate_row, mask=there, other=0.0)
    return y


@triton.jit
def _program(heads, D: tl.constexpr, BC: tl.constexpr):
    """What a program has: which sequence and head, their number, and some channels."""
    TILES: tl.constexpr = (D + BC - 1) // BC
    program = (tl.program_id(0) // TILES).to(tl.int64)
    channels = (tl.program_id(0) % TILES) * BC + tl.arange(0, BC)[None, :]
    return program // heads, program % heads, program, channels, channels < D


@triton.jit(do_not_specialize=["heads", "height", "width", "span", "rate_batch"])
def _products_kernel(
    x, y, rate, partial, scale, heads, height, width, span,
    x_batch, x_row, x_head, y_batch, y_row, y_head, rate_batch, rate_row, rate_head,
    D: tl.constexpr, RATED: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Nine sums over a part of the places: x at a neighbour, times y and its rate."""
    batch, head, program, channels, inside = _program(heads, D, BC)
    part = tl.program_id(1)
    x += batch * x_batch + head * x_head
    y += batch * y_batch + head * y_head
    rate += batch * rate_batch + head * rate_head
    start = part * span
    stop = tl.minimum(start + span, height * width)
    a00 = tl.zeros((BT, BC), tl.float32)
    a01, a02, a10, a11, a12, a20, a21, a22 = a00, a00, a00, a00, a00, a00, a00, a00
    for t in range(start, stop, BT):
        p, r, c = _places(t, stop, width, BT)
        g = _shifted(y, y_row, rate, rate_row, p, r, c, 0, 0, height, width, channels, inside, RATED)
        a00 += g * _shifted(x, x_row, rate, rate_row, p, r, c, -1, -1, height, width, channels, inside, False)
        a01 += g * _shifted(x, x_row, rate, rate_row, p, r, c, -1, 0, height, width, channels, inside, False)
        a02 += g * _shifted(x, x_row, rate, rate_row, p, r, c, -1, 1, height, width, channels, inside, False)
        a10 += g * _shifted(x, x_row, rate, rate_row, p, r, c, 0, -1, height, width, channels, inside, False)
        a11 += g * _shifted(x, x_row, rate, rate_row, p, r, c, 0, 0, height, width, channels, inside, False)
        a12 += g * _shifted(x, x_row, rate, rate_row, p, r, c, 0, 1, height, width, channels, inside, False)
        a20 += g * _shifted(x, x_row, rate, rate_row, p, r, c, 1, -1, height, width, channels, inside, False)
        a21 += g * _shifted(x, x_row, rate, rate_row, p, r, c, 1, 0, height, width, channels, inside, False)
        a22 += g * _shifted(x, x_row, rate, rate_row, p, r, c, 1, 1, height, width, channels, inside, False)
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
def _kernels(channels, inside):
    """The places of the nine weights of some channels, as a tile `[16, channels]`, and which of it is there."""
    weights = tl.arange(0, 16)[:, None]
    return channels * 9 + weights, inside & (weights < 9)


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
def _weight(kernel, index: tl.constexpr):
    """One of the nine weights of each channel, from a tile of them."""
    return tl.sum(tl.where((tl.arange(0, 16) == index)[:, None], kernel, 0.0), axis=0)[None, :]


@triton.jit
def _convolve(
    kernel, x, x_row, y, y_row, rate, rate_row, v, v_row, dots, dots_row, start, stop, height, width, channels, inside,
    S: tl.constexpr, RATE_IN: tl.constexpr, RATE_OUT: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Store in y the convolution of x (`S` = 1) or its transpose, which takes from the neighbours opposite (`S` = -1).

    `RATE_IN` multiplies x by its places' rates. `RATE_OUT` multiplies the result by them, when its dot products with v are
    stored in `dots`.
    """
    k00, k01, k02 = _weight(kernel, 0), _weight(kernel, 1), _weight(kernel, 2)
    k10, k11, k12 = _weight(kernel, 3), _weight(kernel, 4), _weight(kernel, 5)
    k20, k21, k22 = _weight(kernel, 6), _weight(kernel, 7), _weight(kernel, 8)
    for t in range(start, stop, BT):
        p, r, c = _places(t, stop, width, BT)
        z = k00 * _shifted(x, x_row, rate, rate_row, p, r, c, -S, -S, height, width, channels, inside, RATE_IN)
        z += k01 * _shifted(x, x_row, rate, rate_row, p, r, c, -S, 0, height, width, channels, inside, RATE_IN)
        z += k02 * _shifted(x, x_row, rate, rate_row, p, r, c, -S, S, height, width, channels, inside, RATE_IN)
        z += k10 * _shifted(x, x_row, rate, rate_row, p, r, c, 0, -S, height, width, channels, inside, RATE_IN)
        z += k11 * _shifted(x, x_row, rate, rate_row, p, r, c, 0, 0, height, width, channels, inside, RATE_IN)
        z += k12 * _shifted(x, x_row, rate, rate_row, p, r, c, 0, S, height, width, channels, inside, RATE_IN)
        z += k20 * _shifted(x, x_row, rate, rate_row, p, r, c, S, -S, height, width, channels, inside, RATE_IN)
        z += k21 * _shifted(x, x_row, rate, rate_row, p, r, c, S, 0, height, width, channels, inside, RATE_IN)
        z += k22 * _shifted(x, x_row, rate, rate_row, p, r, c, S, S, height, width, channels, inside, RATE_IN)
        there, places = r >= 0, p.to(tl.int64)
        if RATE_OUT:
            own = _shifted(v, v_row, rate, rate_row, p, r, c, 0, 0, height, width, channels, inside, False)
            tl.store(dots + places * dots_row, tl.sum(z * own, axis=1)[:, None], mask=there)
            z *= tl.load(rate + places * rate_row, mask=there, other=0.0)
        tl.store(y + places * y_row + channels, z.to(y.dtype.element_ty), mask=there & inside)


@triton.jit(do_not_specialize=["heads", "height", "width", "span"])
def _read_kernel(
    q, kernel, partial, o, new, norms, sign, heads, height, width, span,
    q_batch, q_row, q_head, kernel_batch, kernel_head,
    D: tl.constexpr, CLIP: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Enter the summed update into the kernel, and read a part of the places with it."""
    batch, head, program, channels, inside = _program(heads, D, BC)
    part = tl.program_id(1)
    at, there = _kernels(channels, inside)
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
def _backward_kernel(
    k, v, do, kernel, rate, new, norms, dnew, partial, dq, dk, dv, dkernel, drate, scale, sign, heads, height, width, span,
    k_batch, k_row, k_head, v_batch, v_row, v_head, do_batch, do_row, do_head, kernel_batch, kernel_head,
    rate_batch, rate_row, rate_head,
    D: tl.constexpr, CLIP: tl.constexpr, RATED: tl.constexpr, NEW_USED: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Take the summed gradient of the new kernel through the update, and from there to a part of the places."""
    batch, head, program, channels, inside = _program(heads, D, BC)
    part = tl.program_id(1)
    at, there = _kernels(channels, inside)
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


def _channels(width: int) -> int:
    """How many channels a program has: the most, up to 64, that divide the width, unless these are few."""
    return next((n for n in (64, 32, 16) if width % n == 0), min(64, triton.next_power_of_2(width)))


def _cut(x: Tensor) -> tuple[tuple[int, int], int, dict[str, int]]:
    """The grid of programs, how many places each has, and the tile that it goes over them with."""
    batch, places, heads, width = x.shape
    columns = _channels(width)
    programs = batch * heads * -(-width // columns)
    at_once = 4 * multiprocessors(x)
    parts = max(1, min(-(-at_once // max(programs, 1)), places // PART))
    return (programs, parts), -(-places // parts), {"D": width, "BC": columns, "BT": max(1, 1024 // columns)}


def _inner_contiguous(kernel: Tensor) -> Tensor:
    return kernel if kernel.stride()[2:] == (9, 3, 1) else kernel.contiguous()


def _products(x: Tensor, y: Tensor, rate: Tensor | None, scale: float, grid: tuple[int, int]) -> Tensor:
    """Each program's nine sums, float32 `[B * H, parts, 9, D]`."""
    (programs, parts), span, tile = _cut(x)
    partial = torch.empty(x.shape[0] * x.shape[2], parts, 9, x.shape[3], dtype=torch.float32, device=x.device)
    rates = partial if rate is None else rate
    _products_kernel[programs, parts](
        x, y, rates, partial, scale, x.shape[2], *grid, span, *x.stride()[:3], *y.stride()[:3], *rates.stride()[:3],
        RATED=rate is not None, **tile, num_warps=4,
    )  # fmt: skip
    return partial


@torch.library.custom_op("kvbind::full_conv", mutates_args=())
def _full_conv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel: Tensor,
    rate: Tensor | None,
    scale: float,
    height: int,
    width: int,
    clip: bool,
    sign: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, the new kernels, and the norms of their updates."""
    o, new, norms = _outputs(q, clip)
    if not o.numel():
        return o, new, norms
    q, k, v, kernel = *map(last_contiguous, (q, k, v)), _inner_contiguous(kernel)
    grid, span, tile = _cut(q)
    with on_device_of(q):
        partial = _products(k, v, rate, scale, (height, width))
        _read_kernel[grid](
            q, kernel, partial, o, new, norms, sign, q.shape[2], height, width, span,
            *q.stride()[:3], *kernel.stride()[:2], CLIP=clip, **tile, num_warps=4,
        )  # fmt: skip
    return o, new, norms


def _outputs(q: Tensor, clip: bool) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, heads, width = q.shape
    return (
        q.new_empty(q.shape),
        q.new_empty((batch, heads, width, 3, 3), dtype=torch.float32),
        q.new_empty((batch, heads, width if clip else 0), dtype=torch.float32),
    )


@_full_conv.register_fake
def _(q, k, v, kernel, rate, scale, height, width, clip, *_):
    return _outputs(q, clip)


@torch.library.custom_op("kvbind::full_conv_backward", mutates_args=())
def _full_conv_backward(
    do: Tensor,
    dnew: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel: Tensor,
    rate: Tensor | None,
    new: Tensor,
    norms: Tensor,
    scale: float,
    height: int,
    width: int,
    clip: bool,
    sign: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, of the kernels, and of the rate, `[B, T, H, tiles of channels]` (empty for a number)."""
    gradients = _gradients(q, k, v, rate)
    if not q.numel():
        return gradients
    q, k, v, do, kernel = *map(last_contiguous, (q, k, v, do)), _inner_contiguous(kernel)
    rates = new if rate is None else rate
    grid, span, tile = _cut(q)
    with on_device_of(q):
        partial = _products(q, do, None, 1.0, (height, width))
        _backward_kernel[grid](
            k, v, do, kernel, rates, new, norms, new if dnew is None else dnew.contiguous(), partial, *gradients,
            scale, sign, q.shape[2], height, width, span, *k.stride()[:3], *v.stride()[:3], *do.stride()[:3],
            *kernel.stride()[:2], *rates.stride()[:3],
            CLIP=clip, RATED=rate is not None, NEW_USED=dnew is not None, **tile, num_warps=4,
        )  # fmt: skip
    return gradients


def _gradients(q: Tensor, k: Tensor, v: Tensor, rate: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, places, heads, width = q.shape
    tiles = -(-width // _channels(width))
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        q.new_empty((batch, heads, width, 3, 3), dtype=torch.float32),
        q.new_empty((0,) if rate is None else (batch, places, heads, tiles), dtype=torch.float32),
    )


@_full_conv_backward.register_fake
def _(do, dnew, q, k, v, kernel, rate, *_):
    return _gradients(q, k, v, rate)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:5], *output[1:])
    ctx.numbers = inputs[5:]
    # a gradient of the new kernels that nobody asks for is not made of zeros
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, do: Tensor | None, dnew: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, kernel, rate, *kept = ctx.saved_tensors
    if do is None:
        do = torch.zeros_like(q)
    dq, dk, dv, dkernel, drate = _full_conv_backward(do, dnew, q, k, v, kernel, rate, *kept, *ctx.numbers)
    return dq, dk, dv, dkernel, None if rate is None else drate.sum(-1), *(None for _ in ctx.numbers)


_full_conv.register_autograd(_backward, setup_context=_save)


def full_conv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel: Tensor,
    rate: float | Tensor,
    *,
    grid: tuple[int, int],
    clip: bool,
    sign: float,
) -> tuple[Tensor, Tensor]:
    """Update depthwise 3x3 kernels once from all keys and values, and read them with all queries.

    Differentiable in every tensor, also through the new kernels. The loss is the dot product.

    Args:
        q: queries `[B, T, H, D]`, the rows of the grid one after another; float16, bfloat16 or float32.
        k: keys `[B, T, H, D]`, likewise, in a dtype of their own.
        v: values `[B, T, H, D]`, likewise.
        kernel: float32 `[C, 3, 3]` or `[B, C, 3, 3]` with `C = H * D`, or `[B, H, D, 3, 3]`.
        rate: learning rate, a number or float32 `[B, T, H]`, zero for tokens that do not write.
        grid: height and width, `T = height * width`.
        clip: divide the update of each channel by its norm plus one.
        sign: 1 for descent, -1 for ascent.

    Returns:
        Outputs `[B, T, H, D]` in q's dtype, and the new kernels, float32 `[B, H, D, 3, 3]`.

    Raises:
        ValueError: a width or dtypes that `covers` refuses, or a grid that T tokens do not fill.
    """
    dtypes = (q.dtype, k.dtype, v.dtype)
    if not covers(q.shape[3], *dtypes):
        raise ValueError(
            f"q, k and v must have heads of at most {MAX_WIDTH} channels in float16, bfloat16 or float32; got width "
            f"{q.shape[3]} in {', '.join(map(str, dtypes))}"
        )
    batch, places, heads, width = q.shape
    if not places or grid[0] * grid[1] != places:
        raise ValueError(f"grid must have as many places as there are tokens, {places}; got {grid[0]} x {grid[1]}")
    if kernel.dim() < 5:
        kernel = kernel.unflatten(-3, (heads, width))
    kernel = kernel.expand(batch, heads, width, 3, 3)
    rated = isinstance(rate, Tensor)
    scale = 1.0 if rated else float(rate)
    o, new, _ = _full_conv(q, k, v, kernel, rate if rated else None, scale, *grid, clip, float(sign))
    return o, new
