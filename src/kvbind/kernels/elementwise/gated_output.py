"""How the output of fast weights joins another's: RMS-normed per head, gated per head, and added (arXiv 2505.23884).

For each token and head, with x its D channels of the fast weights' output and u the logit of its gate,

    y = mixed + n w silu(u)        n = x r        r = (mean(x^2) + eps)^(-1/2)

and with d the gradient of y and `a = sum over channels of d n w`,

    du = a silu'(u)        dw = sum over tokens and heads of d n silu(u)        dx = r silu(u) (d w - n a / D)

One launch each way, bound by memory: both read two tensors and write one, as backward computes n anew. All arithmetic is in
float32, with one rounding at the end.

This module needs no Triton before the first call that takes the kernels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvbind.kernels.common.devices import runs_on
from kvbind.kernels.common.operands import DTYPES, last_contiguous
from kvbind.kernels.launching import dispatcher

MAX_WIDTH = 8192
"""The widest head."""


def gated_output(fast: Tensor, weight: Tensor, gate: Tensor | None, mixed: Tensor, eps: float) -> Tensor:
    """`mixed + (rms_norm(fast) * weight * silu(gate)).flatten(2)`, on kernels where `takes` says so, else by `reference`.

    Args:
        fast: `[B, T, H, D]`, normalized over D. On the kernels any strides will do; channels that are not side by side are
            copied first, here and in `mixed`.
        weight: of the norm, `[D]`.
        gate: logits `[B, T, H]`, or None for no factor.
        mixed: `[B, T, H * D]`.
        eps: added to the mean square.

    Returns:
        `[B, T, H * D]` in the dtype of `mixed`, or that to which the reference promotes; contiguous from the kernels, and
        differentiable once.
    """
    args = fast, weight, gate, mixed, eps
    output: Tensor = dispatcher.call(_gated_output, *args) if takes(*args[:4]) else reference(*args)
    return output


def reference(fast: Tensor, weight: Tensor, gate: Tensor | None, mixed: Tensor, eps: float) -> Tensor:
    """The definition in PyTorch, for any dtypes."""
    return add_gated(F.rms_norm(fast.to(weight.dtype), weight.shape, weight, eps).to(fast.dtype), gate, mixed)


def add_gated(normed: Tensor, gate: Tensor | None, mixed: Tensor) -> Tensor:
    """`mixed + (normed * silu(gate)).flatten(2)`: what is left to do where the norm is done."""
    if gate is not None:
        normed = normed * F.silu(gate).unsqueeze(-1)
    return mixed + normed.flatten(2)


def takes(fast: Tensor, weight: Tensor, gate: Tensor | None, mixed: Tensor) -> bool:
    """Whether `gated_output` takes these on the kernels.

    The gate and the fast weights' output must be no wider than `mixed`, and the norm's weight in float32 or the output's
    dtype.
    """
    if not runs_on(fast.device) or fast.dtype not in DTYPES or not 0 < fast.shape[-1] <= MAX_WIDTH:
        return False
    added = fast.dtype if gate is None else torch.promote_types(fast.dtype, gate.dtype)
    known = mixed.dtype in DTYPES and torch.promote_types(added, mixed.dtype) == mixed.dtype
    return known and weight.dtype in (torch.float32, fast.dtype)


@torch.library.custom_op("kvbind::gated_output", mutates_args=())
def _gated_output(fast: Tensor, weight: Tensor, gate: Tensor | None, mixed: Tensor, eps: float) -> Tensor:
    from kvbind.kernels.elementwise.gated_output_kernels import forward

    y = mixed.new_empty(mixed.shape)
    if y.numel():
        forward(last_contiguous(fast), last_contiguous(weight), gate, last_contiguous(mixed), y, eps)
    return y


@_gated_output.register_fake
def _(fast, weight, gate, mixed, eps):
    return mixed.new_empty(mixed.shape)


@torch.library.custom_op("kvbind::gated_output_backward", mutates_args=())
def _gated_output_backward(
    dy: Tensor, fast: Tensor, weight: Tensor, gate: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the fast weights' output, the norm's weight and the gate (empty without one)."""
    from kvbind.kernels.elementwise.gated_output_kernels import backward

    dfast, dgate = _gradients(fast, gate)
    if not fast.numel():
        return dfast, weight.new_zeros(weight.shape), dgate
    dweight = backward(last_contiguous(dy), last_contiguous(fast), last_contiguous(weight), gate, dfast, dgate, eps)
    return dfast, dweight.to(weight.dtype), dgate


def _gradients(fast: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor]:
    return fast.new_empty(fast.shape), fast.new_empty(0) if gate is None else gate.new_empty(gate.shape)


@_gated_output_backward.register_fake
def _(dy, fast, weight, gate, eps):
    dfast, dgate = _gradients(fast, gate)
    return dfast, weight.new_empty(weight.shape), dgate


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, _, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    fast, weight, gate = ctx.saved_tensors
    if not any(ctx.needs_input_grad[:3]):
        return None, None, None, dy, None
    dfast, dweight, dgate = dispatcher.call(_gated_output_backward, dy, fast, weight, gate, ctx.eps)
    return dfast, dweight, None if gate is None else dgate, dy, None


_gated_output.register_autograd(_backward, setup_context=_save)
