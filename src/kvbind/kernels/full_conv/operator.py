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
from torch import Tensor

from kvbind.kernels.common.devices import multiprocessors, on_device_of
from kvbind.kernels.common.grid_tiles import PART, channels_per_program
from kvbind.kernels.common.operands import DTYPES, last_contiguous
from kvbind.kernels.full_conv.kernels import backward_kernel, products_kernel, read_kernel

MAX_WIDTH = 1024
"""The widest head."""


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


def covers(width: int, *dtypes: torch.dtype) -> bool:
    """Whether `full_conv` takes heads of this width and queries, keys and values of these dtypes."""
    return 0 < width <= MAX_WIDTH and all(dtype in DTYPES for dtype in dtypes)


def _cut(x: Tensor) -> tuple[tuple[int, int], int, dict[str, int]]:
    """The grid of programs, how many places each has, and the tile that it goes over them with."""
    batch, places, heads, width = x.shape
    columns = channels_per_program(width)
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
    products_kernel[programs, parts](
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
        read_kernel[grid](
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
        backward_kernel[grid](
            k, v, do, kernel, rates, new, norms, new if dnew is None else dnew.contiguous(), partial, *gradients,
            scale, sign, q.shape[2], height, width, span, *k.stride()[:3], *v.stride()[:3], *do.stride()[:3],
            *kernel.stride()[:2], *rates.stride()[:3],
            CLIP=clip, RATED=rate is not None, NEW_USED=dnew is not None, **tile, num_warps=4,
        )  # fmt: skip
    return gradients


def _gradients(q: Tensor, k: Tensor, v: Tensor, rate: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, places, heads, width = q.shape
    tiles = -(-width // channels_per_program(width))
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
    q, k, v, kernel, rate, *saved = ctx.saved_tensors
    if do is None:
        do = torch.zeros_like(q)
    dq, dk, dv, dkernel, drate = _full_conv_backward(do, dnew, q, k, v, kernel, rate, *saved, *ctx.numbers)
    return dq, dk, dv, dkernel, None if rate is None else drate.sum(-1), *(None for _ in ctx.numbers)


_full_conv.register_autograd(_backward, setup_context=_save)
