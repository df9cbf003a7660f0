"""Cross-entropy of rows of logits, which their gradient takes the place of.

For a row of logits x with label y,

    loss = log(sum_j exp(x_j)) - x_y        dx_j = exp(x_j) / sum_i exp(x_i) - [j = y]

One launch, a program per row, which reads its row twice and writes it once; the second time it comes from the cache. All
arithmetic is in float32, with one rounding of the gradient at the end.

This module needs no Triton before the first call that takes the kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvbind.kernels.common.devices import runs_on
from kvbind.kernels.common.operands import DTYPES


def cross_entropy_(logits: Tensor, labels: Tensor, ignored: int, gradient: bool) -> Tensor:
    """The loss of each row of `logits`; where `gradient`, its gradient is written in their place.

    Args:
        logits: `[N, vocab]`, contiguous.
        labels: `[N]`, int64. On the kernel a row whose label is neither in the vocabulary nor `ignored` has the loss NaN.
        ignored: the label of rows that have no loss.
        gradient: whether it is wanted.

    Returns:
        `[N]`, float32 or wider.

    Raises:
        ValueError: `logits` are not contiguous.
    """
    if not logits.is_contiguous():
        raise ValueError(f"logits must be contiguous; got strides {logits.stride()} of shape {tuple(logits.shape)}")
    on_kernel = runs_on(logits.device) and logits.dtype in DTYPES
    losses: Tensor = (_cross_entropy if on_kernel else reference)(logits, labels, ignored, gradient)
    return losses


def reference(logits: Tensor, labels: Tensor, ignored: int, gradient: bool) -> Tensor:
    """The definition in PyTorch, for any dtypes; changes `logits` like `cross_entropy_`."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    counted = labels != ignored
    target = labels.where(counted, 0)[:, None]
    logarithms = wide.log_softmax(-1)
    losses = -logarithms.gather(1, target)[:, 0].where(counted, 0)
    if gradient:
        slopes = logarithms.exp_().scatter_add_(1, target, wide.new_full(target.shape, -1.0))
        logits.copy_(slopes.where(counted[:, None], 0))
    return losses


@torch.library.custom_op("kvbind::cross_entropy_", mutates_args=("logits",))
def _cross_entropy(logits: Tensor, labels: Tensor, ignored: int, gradient: bool) -> Tensor:
    from kvbind.kernels.elementwise.cross_entropy_kernels import launch

    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    if logits.numel():
        launch(logits, labels.contiguous(), losses, ignored, gradient)
    return losses


@_cross_entropy.register_fake
def _(logits, labels, ignored, gradient):
    return torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
