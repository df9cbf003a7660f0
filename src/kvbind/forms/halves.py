"""float32 numbers as two halves: the nearest bfloat16, which decoding reads, and what it leaves, which updates need too.

Together they have the bits of the number and take no more memory than it does.
"""

from __future__ import annotations

import torch
from torch import Tensor


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers, float32, as bfloat16 and what is left, int16.

    Halfway cases are rounded away from zero, as what is left could not tell them apart otherwise. What is no number becomes
    the one that PyTorch writes.
    """
    # a number that is filled in needs no copy from the host, which a CUDA graph could not hold
    bits = x.masked_fill(x.isnan(), torch.nan).view(torch.int32)
    upper = (bits + 0x8000) >> 16
    return upper.to(torch.int16).view(torch.bfloat16), (bits - (upper << 16)).to(torch.int16)


def join(upper: Tensor, lower: Tensor) -> Tensor:
    """What `split` took apart."""
    return ((upper.view(torch.int16).to(torch.int32) << 16) + lower).view(torch.float32)
