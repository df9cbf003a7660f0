"""RMS normalization under mixed precision."""

from __future__ import annotations

from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """`x / rms(x) * weight` over the last axis, computed in the weight's dtype and returned in x's.

    PyTorch's own has no fused kernel where the two differ, as they do under autocast.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `[..., D]`."""
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)
