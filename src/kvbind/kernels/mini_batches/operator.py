"""The operator of mini-batches: its checks, its registrations with PyTorch, and its launches."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kvbind.kernels.common.devices import on_device_of
from kvbind.kernels.common.operands import cdiv, dot_precision, power_of_2
from kvbind.kernels.launching import dispatcher
from kvbind.kernels.launching.launcher import Launcher
from kvbind.kernels.mini_batches.kernels import backward_kernel, forward_kernel

MOST_TOKENS = 64
"""The longest mini-batch."""

LEAST_TOKENS = 16
"""Tokens of the smallest tile of a matrix unit."""

MOST_WIDTH = {torch.bfloat16: 128, torch.float16: 128, torch.float32: 32}
"""The widest head whose state and its gradient are held in registers, where products of float32 have operands too."""


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
    out, end, bias_end, *_ = dispatcher.call(
        _forward, *(None if x is None else x.contiguous() for x in operands), size, float(eps), squared, in_loss and head,
        in_read and head, residual and head, keep,
    )  # fmt: skip
    return out, end, None if bias is None else bias_end


def covers(dtype: torch.dtype, size: int, key_width: int, value_width: int) -> bool:
    """Whether `mini_batches` takes operands of `dtype` and of these widths, in mini-batches of `size` tokens."""
    most = MOST_WIDTH.get(dtype, 0)
    widths = all(16 <= width <= most and width == power_of_2(width) for width in (key_width, value_width))
    return 1 < size <= MOST_TOKENS and widths


_launch_forward, _launch_backward = Launcher(forward_kernel), Launcher(backward_kernel)


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
    """Mini-batches of a stretch, and how many stretches there are: about as many of both, so that least is saved."""
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
    found = dispatcher.call(_backward, d_out, d_end, d_bias_end if bias is not None else None, *saved, *ctx.static)
    given = (True, True, True, True, *(x is not None for x in (bias, gamma, beta)), True, bias_rates is not None)
    wanted = (*given, read_rate is not None)
    return *(d if there else None for d, there in zip(found, wanted, strict=True)), *(None,) * (len(ctx.static) + 1)


_forward.register_autograd(_differentiate, setup_context=_setup_context)
