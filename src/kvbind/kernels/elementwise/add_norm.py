"""Add to the residual stream and normalize it: `y = x + delta`, `h = y / rms(y) * weight + bias`, and their gradients.

With `centred` the mean over channels is subtracted first, which makes RMS norm layer norm. One launch each way. Forward, a
program has one token, reads it once and writes the sum and the norm, which may be of another dtype. Backward, a program goes
over many tokens, makes their norms again, and keeps its sums of the gradients of weight and bias, which a sum over programs
completes. All arithmetic is in float32, with one rounding at the end of each result.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvbind.kernels.common.devices import on_device_of
from kvbind.kernels.common.operands import DTYPES, power_of_2
from kvbind.kernels.launching import dispatcher
from kvbind.kernels.launching.launcher import Launcher

WIDEST = 8192
"""The most channels: what a program holds at once."""

PROGRAMS = 528
"""Programs of a backward pass at the most: four for a multiprocessor."""


def add_norm(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    eps: float,
    dtype: torch.dtype,
    *,
    bias: Tensor | None = None,
    centred: bool = False,
) -> tuple[Tensor, Tensor]:
    """`x + delta`, and its RMS norm or layer norm times `weight`; see `covers`.

    Args:
        x: `[..., D]`.
        delta: `[..., D]`, or None for x alone.
        weight: `[D]`.
        eps: added to the mean square, or to the variance.
        dtype: of the norm.
        bias: `[D]`, added to the norm; None for none.
        centred: subtract the mean over channels first, which makes it layer norm.

    Returns:
        The sum, in the wider dtype of x and delta (x itself without delta), and the norm.
    """
    y, h = dispatcher.call(_add_norm, x, delta, weight, bias, eps, dtype, centred)
    return x if delta is None else y, h


def covers(x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether `add_norm` takes these."""
    if not x.numel() or x.shape[-1] > WIDEST or weight.dtype not in DTYPES:
        return False
    if bias is not None and bias.dtype != weight.dtype:
        return False
    return x.dtype in DTYPES and (delta is None or (delta.shape == x.shape and delta.dtype in DTYPES))


@Launcher
@triton.jit
def _norm_forward(
    x, delta, weight, bias, y, h, eps, D: tl.constexpr, BD: tl.constexpr, ADDED: tl.constexpr, CENTRED: tl.constexpr,
    BIASED: tl.constexpr,
):  # fmt: skip
    """One token: added, then normalized."""
    channel = tl.arange(0, BD)
    inside = channel < D
    at = tl.program_id(0).to(tl.int64) * D + channel
    a = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if ADDED:
        total = (a + tl.load(delta + at, mask=inside, other=0.0).to(tl.float32)).to(y.dtype.element_ty)
        tl.store(y + at, total, mask=inside)
        a = total.to(tl.float32)
    if CENTRED:
        a = tl.where(inside, a - tl.sum(a, axis=0) / D, 0.0)
    a *= tl.rsqrt(tl.sum(a * a, axis=0) / D + eps)
    a *= tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    if BIASED:
        a += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(h + at, a.to(h.dtype.element_ty), mask=inside)


@Launcher
@triton.jit(do_not_specialize=["rows"])
def _norm_backward(
    dy, dh, y, weight, dx, ddelta, sums, eps, rows,
    D: tl.constexpr, BD: tl.constexpr, ADDED: tl.constexpr, PASSED: tl.constexpr, CENTRED: tl.constexpr,
    BIASED: tl.constexpr,
):  # fmt: skip
    """Every so many-th token; `PASSED` where the sum has a gradient of its own."""
    channel = tl.arange(0, BD)
    inside = channel < D
    w = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    summed = tl.zeros((BD,), tl.float32)
    summed_bias = tl.zeros((BD,), tl.float32)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        at = tl.cast(row, tl.int64) * D + channel
        a = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(dh + at, mask=inside, other=0.0).to(tl.float32)
        if CENTRED:
            a = tl.where(inside, a - tl.sum(a, axis=0) / D, 0.0)
        scale = tl.rsqrt(tl.sum(a * a, axis=0) / D + eps)
        a *= scale
        summed += d * a
        if BIASED:
            summed_bias += d
        d *= w
        along = tl.sum(d * a, axis=0) / D
        if CENTRED:
            d -= tl.sum(d, axis=0) / D
        d = scale * (d - a * along)
        if PASSED:
            d += tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + at, d.to(dx.dtype.element_ty), mask=inside)
        if ADDED:
            tl.store(ddelta + at, d.to(ddelta.dtype.element_ty), mask=inside)
    own = sums + tl.program_id(0) * (D + D * BIASED) + channel
    tl.store(own, summed, mask=inside)
    if BIASED:
        tl.store(own + D, summed_bias, mask=inside)


def _tile(width: int) -> dict[str, int]:
    block = power_of_2(width)
    return {"D": width, "BD": block, "num_warps": min(max(block // 512, 1), 8)}


@torch.library.custom_op("kvbind::add_norm", mutates_args=())
def _add_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype, centred: bool
) -> tuple[Tensor, Tensor]:
    """The sum (empty without delta) and its norm."""
    y, h = _outputs(x, delta, dtype)
    x, weight = x.contiguous(), weight.contiguous()
    with on_device_of(x):
        _norm_forward[x.numel() // x.shape[-1],](
            x, x if delta is None else delta.contiguous(), weight, weight if bias is None else bias.contiguous(), y, h, eps,
            **_tile(x.shape[-1]), ADDED=delta is not None, CENTRED=centred, BIASED=bias is not None,
        )  # fmt: skip
    return y, h


def _outputs(x: Tensor, delta: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    added = x.new_empty(0) if delta is None else x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, delta.dtype))
    return added, x.new_empty(x.shape, dtype=dtype)


@_add_norm.register_fake
def _(x, delta, weight, bias, eps, dtype, centred):
    return _outputs(x, delta, dtype)


@torch.library.custom_op("kvbind::add_norm_backward", mutates_args=())
def _add_norm_backward(
    dy: Tensor | None,
    dh: Tensor,
    y: Tensor,
    weight: Tensor,
    eps: float,
    x_dtype: torch.dtype,
    delta_dtype: torch.dtype | None,
    centred: bool,
    biased: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, of delta (empty where there was none), of the weight, and of the bias (likewise)."""
    dx, ddelta, _, _ = _gradients(y, weight, x_dtype, delta_dtype, biased)
    y = y.contiguous()
    width = y.shape[-1]
    rows = y.numel() // width
    programs = min(rows, PROGRAMS)
    partial = y.new_empty((programs, 1 + biased, width), dtype=torch.float32)
    with on_device_of(y):
        _norm_backward[programs,](
            dh if dy is None else dy.contiguous(), dh.contiguous(), y, weight.contiguous(), dx, ddelta, partial, eps, rows,
            **_tile(width), ADDED=delta_dtype is not None, PASSED=dy is not None, CENTRED=centred, BIASED=biased,
        )  # fmt: skip
    sums = partial.sum(0).to(weight.dtype)
    return dx, ddelta, sums[0], sums[1].clone() if biased else weight.new_empty(0)


def _gradients(
    y: Tensor, weight: Tensor, x_dtype: torch.dtype, delta_dtype: torch.dtype | None, biased: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ddelta = y.new_empty(0) if delta_dtype is None else y.new_empty(y.shape, dtype=delta_dtype)
    dbias = weight.new_empty(weight.shape if biased else 0)
    return y.new_empty(y.shape, dtype=x_dtype), ddelta, weight.new_empty(weight.shape), dbias


@_add_norm_backward.register_fake
def _(dy, dh, y, weight, eps, x_dtype, delta_dtype, centred, biased):
    return _gradients(y, weight, x_dtype, delta_dtype, biased)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, delta, weight, bias, ctx.eps, _, ctx.centred = inputs
    ctx.x_dtype, ctx.delta_dtype = x.dtype, None if delta is None else delta.dtype
    ctx.biased = bias is not None
    ctx.save_for_backward(x if delta is None else output[0], weight)


def _gradient(ctx: Any, dy: Tensor | None, dh: Tensor) -> tuple[Tensor | None, ...]:
    y, weight = ctx.saved_tensors
    dy = None if ctx.delta_dtype is None else dy
    dx, ddelta, dweight, dbias = dispatcher.call(
        _add_norm_backward, dy, dh, y, weight, ctx.eps, ctx.x_dtype, ctx.delta_dtype, ctx.centred, ctx.biased
    )
    return dx, None if ctx.delta_dtype is None else ddelta, dweight, dbias if ctx.biased else None, None, None, None


_add_norm.register_autograd(_gradient, setup_context=_setup)
