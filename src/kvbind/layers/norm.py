"""RMS normalization under mixed precision, alone and of a residual stream that is added to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvbind.kernels.common import runs_on


class RMSNorm(nn.RMSNorm):
    """`x / rms(x) * weight` over the last axis, computed in the weight's dtype and returned in x's.

    PyTorch's own has no fused kernel where the two differ, as they do under autocast.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `[..., D]`."""
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class ResidualNorm(RMSNorm):
    """Add to a residual stream, and normalize it for products: under autocast in their dtype, for all of them at once."""

    def forward(self, x: Tensor, delta: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """The stream and its norm.

        Args:
            x: the stream `[..., D]`.
            delta: what is added to it, likewise.

        Returns:
            `x + delta`, or x, and its norm.
        """
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        return residual_norm(x, delta, self.weight, eps, narrowed(x.dtype, x.device.type))


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
        from kvbind.kernels.add_norm import add_norm, takes

        if takes(x, delta, weight):
            return add_norm(x, delta, weight, eps, dtype)
    x = x if delta is None else x + delta
    return x, F.rms_norm(x.to(weight.dtype), weight.shape, weight, eps).to(x.dtype).to(dtype)


def narrowed(dtype: torch.dtype, device: str) -> torch.dtype:
    """The dtype of products of float32 operands under autocast, or `dtype` itself."""
    autocast = dtype == torch.float32 and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast else dtype
