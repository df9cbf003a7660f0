"""Queries, keys and values of the view synthesis layer from one projection.

All go through SiLU, queries and keys are then brought to L2 norm 1 per head (arXiv 2505.23884): with `s = silu(x)` and n the
L2 norm of s over the channels of a head,

    q, k = s / (n + eps)        v = s
    ds = dq / (n + eps) - s <dq, s> / (n (n + eps)^2)        dx = ds silu'(x)

One launch each way, a program for the queries, keys or values of a head of a token. The backward pass writes the gradient of
the projection in one piece. All arithmetic is in float32, with one rounding at the end.
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
"""The most channels of a head: what a program holds at once."""


def silu_unit(qkv: Tensor, heads: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """SiLU of a projection, and queries and keys of it brought to L2 norm 1 per head; see `covers`.

    Args:
        qkv: `[B, T, 3 H D]`, queries, keys and values one after another.
        heads: H.
        eps: added to norms.

    Returns:
        Queries, keys and values, `[B, T, H, D]` in qkv's dtype.
    """
    found: tuple[Tensor, Tensor, Tensor] = dispatcher.call(_silu_unit, qkv, heads, eps)
    return found


def covers(qkv: Tensor, heads: int) -> bool:
    """Whether `silu_unit` takes these."""
    return qkv.dtype in DTYPES and qkv.dim() == 3 and qkv.numel() > 0 and qkv.shape[-1] // (3 * heads) <= WIDEST


@Launcher
@triton.jit
def _forward(x, q, k, v, eps, H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    row, head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    channel = tl.arange(0, BD)
    inside = channel < D
    a = tl.load(x + (row * 3 + part) * H * D + head * D + channel, mask=inside, other=0.0).to(tl.float32)
    a *= tl.sigmoid(a)
    at = row * H * D + head * D + channel
    if part == 2:
        tl.store(v + at, a.to(v.dtype.element_ty), mask=inside)
    else:
        a /= tl.sqrt(tl.sum(a * a, axis=0)) + eps
        if part == 0:
            tl.store(q + at, a.to(q.dtype.element_ty), mask=inside)
        else:
            tl.store(k + at, a.to(k.dtype.element_ty), mask=inside)


@Launcher
@triton.jit
def _backward(dq, dk, dv, x, dx, eps, H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    row, head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    channel = tl.arange(0, BD)
    inside = channel < D
    at = row * H * D + head * D + channel
    place = (row * 3 + part) * H * D + head * D + channel
    u = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    sig = tl.sigmoid(u)
    s = u * sig
    if part == 2:
        d = tl.load(dv + at, mask=inside, other=0.0).to(tl.float32)
    else:
        d = tl.load((dq if part == 0 else dk) + at, mask=inside, other=0.0).to(tl.float32)
        norm = tl.sqrt(tl.sum(s * s, axis=0))
        scale = 1.0 / (norm + eps)
        d *= scale
        # of a head of zeros the norm has no slope
        d -= s * (tl.sum(d * s, axis=0) * scale / tl.where(norm > 0.0, norm, 1.0))
    d *= sig * (1.0 + u * (1.0 - sig))
    tl.store(dx + place, d.to(dx.dtype.element_ty), mask=inside)


def _tile(width: int) -> dict[str, int]:
    block = power_of_2(width)
    return {"D": width, "BD": block, "num_warps": min(max(block // 512, 1), 8)}


@torch.library.custom_op("kvbind::silu_unit", mutates_args=())
def _silu_unit(qkv: Tensor, heads: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values `[B, T, H, D]`."""
    qkv = qkv.contiguous()
    q, k, v = outputs = _outputs(qkv, heads)
    with on_device_of(qkv):
        _forward[qkv.shape[0] * qkv.shape[1], heads, 3](qkv, q, k, v, eps, H=heads, **_tile(q.shape[-1]))
    return outputs


def _outputs(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    shape = (*qkv.shape[:2], heads, qkv.shape[-1] // (3 * heads))
    return qkv.new_empty(shape), qkv.new_empty(shape), qkv.new_empty(shape)


@_silu_unit.register_fake
def _(qkv, heads, eps):
    return _outputs(qkv, heads)


@torch.library.custom_op("kvbind::silu_unit_backward", mutates_args=())
def _silu_unit_backward(dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, heads: int, eps: float) -> Tensor:
    """The gradient of the projection."""
    dq, dk, dv, qkv = (x.contiguous() for x in (dq, dk, dv, qkv))
    dx = torch.empty_like(qkv)
    with on_device_of(qkv):
        _backward[qkv.shape[0] * qkv.shape[1], heads, 3](dq, dk, dv, qkv, dx, eps, H=heads, **_tile(dq.shape[-1]))
    return dx


@_silu_unit_backward.register_fake
def _(dq, dk, dv, qkv, heads, eps):
    return qkv.new_empty(qkv.shape)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    qkv, ctx.heads, ctx.eps = inputs
    ctx.save_for_backward(qkv)


def _gradient(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    return dispatcher.call(_silu_unit_backward, *gradients, *ctx.saved_tensors, ctx.heads, ctx.eps), None, None


_silu_unit.register_autograd(_gradient, setup_context=_setup)
