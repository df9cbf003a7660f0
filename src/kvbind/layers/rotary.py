"""Rotary position embedding (arXiv 2104.09864), rotating the two halves of each head against each other."""

from __future__ import annotations

import torch
from torch import Tensor

Tables = tuple[Tensor, Tensor]
"""Cosines and sines of each token's angles, float32 `[B, T, 1, D / 2]`; `B` is 1 where all rows share positions."""


def rotary_tables(positions: Tensor, width: int, theta: float) -> Tables:
    """The angles `position * theta^(-2 i / width)` of every token, as cosines and sines.

    Args:
        positions: `[B, T]`, integers.
        width: channels of a head, even.
        theta: the base of the wavelengths.
    """
    exponents = torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) / width
    angles = positions.to(torch.float32)[:, :, None, None] * (1.0 / theta**exponents)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, tables: Tables) -> Tensor:
    """Rotate heads `[B, T, H, D]`; computed in float32 or wider, returned in x's dtype."""
    cos, sin = tables
    first, second = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
