"""RMS normalization under mixed precision, alone and of a residual stream that is added to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvbind.forms.autocast import autocasts
from kvbind.kernels.common import runs_on


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
        from kvbind.kernels.add_norm import add_norm, covers

        if covers(x, delta, weight):
            return add_norm(x, delta, weight, eps, dtype)
    x = x if delta is None else x + delta
    return x, rms_norm(x, weight, eps).to(dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float | None) -> Tensor:
    """`x / rms(x) * weight` over the last axis, computed in the weight's dtype and returned in x's."""
    return F.rms_norm(x.to(weight.dtype), weight.shape, weight, eps).to(x.dtype)


def narrowed(dtype: torch.dtype, device: str) -> torch.dtype:
    """The dtype of products of float32 operands under autocast, or `dtype` itself."""
    autocast = dtype == torch.float32 and autocasts(device)
    return torch.get_autocast_dtype(device) if autocast else dtype
