"""A depthwise 3x3 convolution of tokens that lie on a grid, as vision transformers put positions in.

With zeros outside,

    y[p] = x[p] + bias + sum over i, j of weight[i, j] x[p + (i - 1, j - 1)]

per channel; x itself only where it is asked for. PyTorch's convolution wants images with channels first, which tokens are
not: two transposed copies for each call. One launch each way; the backward pass makes the gradient of x and, for each
program, ten float32 sums per channel, of the nine weights and the bias, which a sum over programs completes. All arithmetic
is in float32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvbind.kernels.common.devices import multiprocessors, on_device_of
from kvbind.kernels.common.grid_tiles import (
    PART,
    channels_per_program,
    grid_places,
    one_weight,
    program_channels,
    shifted,
    weight_places,
)
from kvbind.kernels.common.operands import DTYPES
from kvbind.kernels.launching import dispatcher
from kvbind.kernels.launching.launcher import Launcher


def token_conv(x: Tensor, weight: Tensor, bias: Tensor | None, grid: tuple[int, int], *, add: bool = False) -> Tensor:
    """A depthwise 3x3 convolution of tokens, with zeros outside the grid; see `covers`.

    Args:
        x: tokens `[B, T, C]`, the rows of the grid one after another.
        weight: `[C, 1, 3, 3]`, as of `nn.Conv2d`.
        bias: `[C]`, or None.
        grid: height and width, `T = height * width`.
        add: add x to the result.

    Returns:
        `[B, T, C]` in x's dtype.
    """
    output: Tensor = dispatcher.call(_token_conv, x, weight, bias, *grid, add)
    return output


def covers(x: Tensor, weight: Tensor, bias: Tensor | None, grid: tuple[int, int]) -> bool:
    """Whether `token_conv` takes these."""
    known = all(tensor.dtype in DTYPES for tensor in (x, weight, *(() if bias is None else (bias,))))
    return known and x.dim() == 3 and x.numel() > 0 and grid[0] * grid[1] == x.shape[1]


@Launcher
@triton.jit(do_not_specialize=["height", "width", "span"])
def _forward_kernel(
    x, weight, bias, y, height, width, span,
    D: tl.constexpr, ADD: tl.constexpr, BIASED: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """A part of the places of one image, some channels."""
    image, _, _, channels, inside = program_channels(1, D, BC)
    places = height * width
    start = tl.program_id(1) * span
    stop = tl.minimum(start + span, places)
    at, there = weight_places(channels, inside)
    w = tl.load(weight + at, mask=there, other=0.0).to(tl.float32)
    k00, k01, k02 = one_weight(w, 0), one_weight(w, 1), one_weight(w, 2)
    k10, k11, k12 = one_weight(w, 3), one_weight(w, 4), one_weight(w, 5)
    k20, k21, k22 = one_weight(w, 6), one_weight(w, 7), one_weight(w, 8)
    if ADD:
        k11 += 1.0
    x += image * places * D
    y += image * places * D
    for t in range(start, stop, BT):
        p, r, c = grid_places(t, stop, width, BT)
        z = k00 * shifted(x, D, x, 0, p, r, c, -1, -1, height, width, channels, inside, False)
        z += k01 * shifted(x, D, x, 0, p, r, c, -1, 0, height, width, channels, inside, False)
        z += k02 * shifted(x, D, x, 0, p, r, c, -1, 1, height, width, channels, inside, False)
        z += k10 * shifted(x, D, x, 0, p, r, c, 0, -1, height, width, channels, inside, False)
        z += k11 * shifted(x, D, x, 0, p, r, c, 0, 0, height, width, channels, inside, False)
        z += k12 * shifted(x, D, x, 0, p, r, c, 0, 1, height, width, channels, inside, False)
        z += k20 * shifted(x, D, x, 0, p, r, c, 1, -1, height, width, channels, inside, False)
        z += k21 * shifted(x, D, x, 0, p, r, c, 1, 0, height, width, channels, inside, False)
        z += k22 * shifted(x, D, x, 0, p, r, c, 1, 1, height, width, channels, inside, False)
        if BIASED:
            z += tl.load(bias + channels, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + p.to(tl.int64) * D + channels, z.to(y.dtype.element_ty), mask=(r >= 0) & inside)


@Launcher
@triton.jit(do_not_specialize=["height", "width", "span"])
def _backward_kernel(
    dy, x, weight, dx, sums, height, width, span,
    D: tl.constexpr, ADD: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The gradients that a part of the places of one image gives, some channels."""
    image, _, program, channels, inside = program_channels(1, D, BC)
    places = height * width
    start = tl.program_id(1) * span
    stop = tl.minimum(start + span, places)
    at, there = weight_places(channels, inside)
    w = tl.load(weight + at, mask=there, other=0.0).to(tl.float32)
    k00, k01, k02 = one_weight(w, 0), one_weight(w, 1), one_weight(w, 2)
    k10, k11, k12 = one_weight(w, 3), one_weight(w, 4), one_weight(w, 5)
    k20, k21, k22 = one_weight(w, 6), one_weight(w, 7), one_weight(w, 8)
    if ADD:
        k11 += 1.0
    x += image * places * D
    dy += image * places * D
    dx += image * places * D
    a00 = tl.zeros((BT, BC), tl.float32)
    a01, a02, a10, a11, a12, a20, a21, a22, total = a00, a00, a00, a00, a00, a00, a00, a00, a00
    for t in range(start, stop, BT):
        p, r, c = grid_places(t, stop, width, BT)
        own = shifted(x, D, x, 0, p, r, c, 0, 0, height, width, channels, inside, False)
        # what a place gave to its neighbours, which lie opposite
        g = shifted(dy, D, x, 0, p, r, c, 1, 1, height, width, channels, inside, False)
        z = k00 * g
        a00 += own * g
        g = shifted(dy, D, x, 0, p, r, c, 1, 0, height, width, channels, inside, False)
        z += k01 * g
        a01 += own * g
        g = shifted(dy, D, x, 0, p, r, c, 1, -1, height, width, channels, inside, False)
        z += k02 * g
        a02 += own * g
        g = shifted(dy, D, x, 0, p, r, c, 0, 1, height, width, channels, inside, False)
        z += k10 * g
        a10 += own * g
        g = shifted(dy, D, x, 0, p, r, c, 0, 0, height, width, channels, inside, False)
        z += k11 * g
        a11 += own * g
        total += g
        g = shifted(dy, D, x, 0, p, r, c, 0, -1, height, width, channels, inside, False)
        z += k12 * g
        a12 += own * g
        g = shifted(dy, D, x, 0, p, r, c, -1, 1, height, width, channels, inside, False)
        z += k20 * g
        a20 += own * g
        g = shifted(dy, D, x, 0, p, r, c, -1, 0, height, width, channels, inside, False)
        z += k21 * g
        a21 += own * g
        g = shifted(dy, D, x, 0, p, r, c, -1, -1, height, width, channels, inside, False)
        z += k22 * g
        a22 += own * g
        tl.store(dx + p.to(tl.int64) * D + channels, z.to(dx.dtype.element_ty), mask=(r >= 0) & inside)
    sums += (program * tl.num_programs(1) + tl.program_id(1)) * 10 * D + channels
    tl.store(sums, tl.sum(a00, axis=0)[None, :], mask=inside)
    tl.store(sums + D, tl.sum(a01, axis=0)[None, :], mask=inside)
    tl.store(sums + 2 * D, tl.sum(a02, axis=0)[None, :], mask=inside)
    tl.store(sums + 3 * D, tl.sum(a10, axis=0)[None, :], mask=inside)
    tl.store(sums + 4 * D, tl.sum(a11, axis=0)[None, :], mask=inside)
    tl.store(sums + 5 * D, tl.sum(a12, axis=0)[None, :], mask=inside)
    tl.store(sums + 6 * D, tl.sum(a20, axis=0)[None, :], mask=inside)
    tl.store(sums + 7 * D, tl.sum(a21, axis=0)[None, :], mask=inside)
    tl.store(sums + 8 * D, tl.sum(a22, axis=0)[None, :], mask=inside)
    tl.store(sums + 9 * D, tl.sum(total, axis=0)[None, :], mask=inside)


def _cut(x: Tensor) -> tuple[tuple[int, int], int, dict[str, int]]:
    """The grid of programs, how many places each has, and its tile."""
    batch, places, width = x.shape
    columns = channels_per_program(width)
    programs = batch * -(-width // columns)
    parts = max(1, min(-(-4 * multiprocessors(x) // programs), places // PART))
    return (programs, parts), -(-places // parts), {"D": width, "BC": columns, "BT": max(1, 1024 // columns), "num_warps": 4}


@torch.library.custom_op("kvbind::token_conv", mutates_args=())
def _token_conv(x: Tensor, weight: Tensor, bias: Tensor | None, height: int, width: int, add: bool) -> Tensor:
    """The convolution of `[B, T, C]`."""
    x, weight = x.contiguous(), weight.contiguous()
    y = torch.empty_like(x)
    grid, span, tile = _cut(x)
    with on_device_of(x):
        _forward_kernel[grid](
            x, weight, weight if bias is None else bias.contiguous(), y, height, width, span,
            **tile, ADD=add, BIASED=bias is not None,
        )  # fmt: skip
    return y


@_token_conv.register_fake
def _(x, weight, bias, height, width, add):
    return x.new_empty(x.shape)


@torch.library.custom_op("kvbind::token_conv_backward", mutates_args=())
def _token_conv_backward(
    dy: Tensor, x: Tensor, weight: Tensor, height: int, width: int, add: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of the weight `[C, 1, 3, 3]` and of a bias."""
    dy, x, weight = dy.contiguous(), x.contiguous(), weight.contiguous()
    grid, span, tile = _cut(x)
    sums = x.new_empty((x.shape[0] * grid[1], 10, x.shape[2]), dtype=torch.float32)
    dx = torch.empty_like(x)
    with on_device_of(x):
        _backward_kernel[grid](dy, x, weight, dx, sums, height, width, span, **tile, ADD=add)
    total = sums.sum(0)
    return dx, total[:9].mT.reshape(weight.shape).to(weight.dtype), total[9].clone()


@_token_conv_backward.register_fake
def _(dy, x, weight, height, width, add):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), x.new_empty(x.shape[2:], dtype=torch.float32)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, bias, *ctx.numbers = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight)


def _gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dx, dweight, dbias = dispatcher.call(_token_conv_backward, dy, *ctx.saved_tensors, *ctx.numbers)
    return dx, dweight, None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype), None, None, None


_token_conv.register_autograd(_gradient, setup_context=_setup)
