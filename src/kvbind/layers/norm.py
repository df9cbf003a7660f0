"""RMS normalization under mixed precision, alone and of a residual stream that is added to."""

from __future__ import annotations

import torch
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
        dtype = narrowed(x.dtype, x.device.type)
        if runs_on(x.device) and self.eps is not None:
            from kvbind.kernels.add_norm import add_norm, takes

            if takes(x, delta, self.weight):
                return add_norm(x, delta, self.weight, self.eps, dtype)
        x = x if delta is None else x + delta
        return x, super().forward(x).to(dtype)


def narrowed(dtype: torch.dtype, device: str) -> torch.dtype:
    """The dtype of products of float32 operands under autocast, or `dtype` itself."""
    autocast = dtype == torch.float32 and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast else dtype
