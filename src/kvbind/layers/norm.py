"""Normalization under mixed precision, alone and of a residual stream that is added to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvbind.forms.autocast import autocasts
from kvbind.kernels.common.devices import runs_on
from kvbind.layers.plain_modules import WEIGHTS, is_plain

NORM_EPS = 1e-5
"""Of the norms inside LaCT's layers: queries, keys, output, and the L2 norm of fast queries and keys."""

NARROWEST = 256
"""Channels from which a norm of another dtype than its weight's goes to a kernel."""


class RMSNorm(nn.RMSNorm):
    """`x / rms(x) * weight` over the last axis, computed in the weight's dtype and returned in x's.

    PyTorch's own has no fused kernel where the two differ, as they do under autocast.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `[..., D]`."""
        return rms_norm(x, self.weight, self.eps)


class ResidualNorm(RMSNorm):
    """Add to a residual stream, and normalize it for products: under autocast in their dtype, for all of them at once."""

    eps: float

    def forward(self, x: Tensor, delta: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """The stream and its norm.

        Args:
            x: the stream `[..., D]`.
            delta: what is added to it, likewise.

        Returns:
            `x + delta`, or x, and its norm.
        """
        return residual_norm(x, delta, self.weight, self.eps, narrowed(x.dtype, x.device.type))


def residual_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`x + delta`, or x, and its RMS norm times `weight`, on a kernel where one takes them.

    Args:
        x: `[..., D]`.
        delta: likewise, or None.
        weight: `[D]`, in whose dtype the norm is computed.
        eps: added to the mean square.
        dtype: of the norm.
    """
    if runs_on(x.device):
        from kvbind.kernels.elementwise.add_norm import add_norm, covers

        if covers(x, delta, weight):
            return add_norm(x, delta, weight, eps, dtype)
    x = x if delta is None else x + delta
    return x, rms_norm(x, weight, eps).to(dtype)


def add_layer_norm(x: Tensor, delta: Tensor | None, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """`x + delta`, or x, and its layer norm, on a kernel where one takes them and `norm` is no more than it says.

    Args:
        x: `[..., D]`.
        delta: likewise, or None.
        norm: over the last axis.

    Returns:
        The sum; and its norm, on a kernel under autocast in the dtype of the products that read it, else in `norm`'s own.
    """
    if runs_on(x.device) and _is_affine(norm, x.shape[-1]):
        from kvbind.kernels.elementwise.add_norm import add_norm, covers

        if covers(x, delta, norm.weight, norm.bias):
            dtype = narrowed(x.dtype, x.device.type)
            return add_norm(x, delta, norm.weight, norm.eps, dtype, bias=norm.bias, centred=True)
    x = x if delta is None else x + delta
    return x, norm(x)


def _is_affine(norm: nn.Module, width: int) -> bool:
    """Whether a module is the layer norm of a last axis, with a weight, and nothing else."""
    if not is_plain(norm, nn.LayerNorm) or norm.normalized_shape != (width,):
        return False
    return type(norm.weight) in WEIGHTS and type(norm.bias) in (*WEIGHTS, type(None))


def rms_norm(x: Tensor, weight: Tensor, eps: float | None) -> Tensor:
    """`x / rms(x) * weight` over the last axis, computed in the weight's dtype and returned in x's."""
    # a program for each row: narrow ones are faster in PyTorch
    if eps is not None and x.dtype != weight.dtype and x.shape[-1] >= NARROWEST and runs_on(x.device):
        from kvbind.kernels.elementwise.add_norm import add_norm, covers

        if covers(x, None, weight):
            return add_norm(x, None, weight, eps, x.dtype)[1]
    return F.rms_norm(x.to(weight.dtype), weight.shape, weight, eps).to(x.dtype)


def narrowed(dtype: torch.dtype, device: str) -> torch.dtype:
    """The dtype of products of float32 operands under autocast, or `dtype` itself."""
    autocast = dtype == torch.float32 and autocasts(device)
    return torch.get_autocast_dtype(device) if autocast else dtype
