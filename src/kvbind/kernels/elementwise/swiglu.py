"""The elementwise half of a SwiGLU MLP, `silu(gate) * up` (arXiv 2002.05202), and its gradient.

    dgate = dy up s (1 + gate (1 - s))        dup = dy gate s        s = sigmoid(gate)

One launch each way, bound by memory: forward reads two tensors and writes one, backward reads three and writes two, and only
the operands are saved in between. All arithmetic is in float32, with one rounding at the end.

This module needs no Triton before the first call that takes the kernels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvbind.kernels.common.devices import runs_on
from kvbind.kernels.common.operands import DTYPES
from kvbind.kernels.launching import dispatcher


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, on the kernels where `takes` says so and by `reference` elsewhere.

    Args:
        gate: `[..., W]`. On the kernels rows may be strided; where they are not evenly spaced, or channels not side by side,
            they are copied.
        up: `[..., W]`, laid out as freely as `gate`.

    Returns:
        `[..., W]` in the operands' dtype; contiguous from the kernels, and differentiable once.
    """
    output: Tensor = dispatcher.call(_swiglu, gate, up) if takes(gate, up) else reference(gate, up)
    return output


def reference(gate: Tensor, up: Tensor) -> Tensor:
    """The definition in PyTorch, for any dtypes."""
    return F.silu(gate) * up


def takes(gate: Tensor, up: Tensor) -> bool:
    """Whether `swiglu` takes these on the kernels: of one shape, in one dtype of `DTYPES`."""
    if not runs_on(gate.device) or gate.dtype not in DTYPES or gate.dim() == 0:
        return False
    return up.dtype == gate.dtype and up.shape == gate.shape and up.device == gate.device


@torch.library.custom_op("kvbind::swiglu", mutates_args=())
def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    from kvbind.kernels.elementwise.swiglu_kernels import forward

    y = gate.new_empty(gate.shape)
    if y.numel():
        forward(gate, up, y)
    return y


@_swiglu.register_fake
def _(gate, up):
    return gate.new_empty(gate.shape)


@torch.library.custom_op("kvbind::swiglu_backward", mutates_args=())
def _swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    from kvbind.kernels.elementwise.swiglu_kernels import backward

    gradients = gate.new_empty(gate.shape), gate.new_empty(gate.shape)
    if gate.numel():
        backward(dy, gate, up, *gradients)
    return gradients


@_swiglu_backward.register_fake
def _(dy, gate, up):
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = dispatcher.call(_swiglu_backward, dy, *ctx.saved_tensors)
    return found


_swiglu.register_autograd(_gradients, setup_context=_save)
