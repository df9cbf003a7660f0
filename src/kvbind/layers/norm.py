"""RMS normalization under mixed precision."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """`x / rms(x) * weight` over the last axis, computed in the weight's dtype and returned in x's.

    PyTorch's own has no fused kernel where the two differ, as they do under autocast.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `[..., D]`."""
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


def narrowed(x: Tensor) -> Tensor:
    """What products make of `x` under autocast, or `x` itself: for several to share, each of which would cast it anew."""
    device = x.device.type
    if x.dtype == torch.float32 and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x
