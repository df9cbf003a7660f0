"""Queries and keys of a layer's two paths: rotated for attention; scaled, normalized and rotated for the fast weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvbind.kernels.common import runs_on
from kvbind.layers.rotary import rotate

Operands = tuple[Tensor, Tensor, Tensor, Tensor]
"""Queries and keys of attention, then those of the fast weights."""


def make_operands(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor,
    offset: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    attention_heads: int,
    fast_heads: int,
    eps: float,
    silu: bool,
    rotary: bool,
) -> Operands:
    """Queries and keys of both paths, on a kernel where one takes them.

    Args:
        q: `[B, T, d]`.
        k: `[B, T, d]`.
        v: `[B, T, d]`, whose dtype the results have.
        scale: `[d, 2]`, of queries and of keys.
        offset: `[d, 2]`, likewise.
        cos: `[B or 1, T, 1, d / attention heads / 2]`.
        sin: likewise.
        attention_heads: heads that are rotated.
        fast_heads: heads that are normalized.
        eps: added to norms.
        silu: apply SiLU before the norm.
        rotary: rotate the fast queries and keys too.

    Returns:
        In v's dtype, `[B, T, heads, d / heads]` of either kind.
    """
    options: dict[str, Any] = {
        "attention_heads": attention_heads,
        "fast_heads": fast_heads,
        "eps": eps,
        "silu": silu,
        "rotary": rotary,
    }
    if runs_on(q.device):
        from kvbind.kernels.layer_operands import layer_operands, takes

        if takes(q, k, v, cos, attention_heads, fast_heads):
            return layer_operands(q, k, scale, offset, cos, sin, **options)
    a, b, c, d = (x.to(v.dtype) for x in plain_operands(q, k, scale, offset, cos, sin, **options))
    return a, b, c, d


def plain_operands(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    offset: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    attention_heads: int,
    fast_heads: int,
    eps: float,
    silu: bool,
    rotary: bool,
) -> Operands:
    """What `make_operands` returns, in PyTorch; those of attention in their own dtypes, others in float32 or wider."""

    def turned(x: Tensor) -> Tensor:
        return rotate(split_heads(x, attention_heads), (cos, sin))

    fast = []
    for place, x in enumerate((q, k)):
        y = x * scale[:, place] + offset[:, place]
        y = unit(split_heads(F.silu(y) if silu else y, fast_heads), eps)
        # attention heads may cut across fast heads; rotation knows the former alone
        fast.append(split_heads(turned(y.flatten(2)).flatten(2), fast_heads) if rotary else y)
    return turned(q), turned(k), fast[0], fast[1]


def split_heads(x: Tensor, heads: int) -> Tensor:
    """`[B, T, H D]` to `[B, T, H, D]`."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


def wide(x: Tensor) -> Tensor:
    """The same tensor in float32, or in its own dtype where that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unit(x: Tensor, eps: float) -> Tensor:
    """Vectors `[..., D]` brought to L2 norm 1, up to eps; float32 or wider."""
    x = wide(x)
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / (norm + eps)
