"""Queries and keys of a layer's two paths: rotated for attention; scaled, normalized and rotated for the fast weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvbind.kernels.common.devices import runs_on
from kvbind.kernels.launching import dispatcher
from kvbind.layers.rotary import Tables, rotate

Operands = tuple[Tensor, Tensor, Tensor, Tensor]
"""Queries and keys of attention, then those of the fast weights."""


@dataclass(frozen=True)
class Paths:
    """How queries and keys become those of two paths.

    Attributes:
        attention_heads: heads that are rotated.
        fast_heads: heads that are normalized.
        eps: added to norms.
        silu: apply SiLU before the norm.
        rotary: rotate the fast queries and keys too.
    """

    attention_heads: int
    fast_heads: int
    eps: float
    silu: bool = True
    rotary: bool = True


def make_operands(q: Tensor, k: Tensor, v: Tensor, scale: Tensor, offset: Tensor, tables: Tables, paths: Paths) -> Operands:
    """Queries and keys of both paths, on a kernel where one takes them.

    Args:
        q: `[B, T, d]`.
        k: `[B, T, d]`.
        v: `[B, T, d]`, whose dtype the results have.
        scale: `[d, 2]`, of queries and of keys.
        offset: `[d, 2]`, likewise.
        tables: of rotations, for heads of attention.
        paths: heads of both paths, and what is done to queries and keys on each.

    Returns:
        In v's dtype, `[B, T, heads, d / heads]` of either kind.
    """
    p = paths
    if runs_on(q.device):
        from kvbind.kernels.elementwise.layer_operands import covers, layer_operands

        if covers(q, k, v, tables[0], p.attention_heads, p.fast_heads):
            on_kernel: Operands = dispatcher.call(
                layer_operands, q, k, scale, offset, *tables, p.attention_heads, p.fast_heads, p.eps, p.silu, p.rotary
            )
            return on_kernel
    a, b, c, d = (x.to(v.dtype) for x in plain_operands(q, k, scale, offset, tables, paths))
    return a, b, c, d


def plain_operands(q: Tensor, k: Tensor, scale: Tensor, offset: Tensor, tables: Tables, paths: Paths) -> Operands:
    """What `make_operands` returns, in PyTorch; those of attention in their own dtypes, others in float32 or wider."""

    def turned(x: Tensor) -> Tensor:
        return rotate(split_heads(x, paths.attention_heads), tables)

    fast = []
    for place, x in enumerate((q, k)):
        y = x * scale[:, place] + offset[:, place]
        y = unit(split_heads(F.silu(y) if paths.silu else y, paths.fast_heads), paths.eps)
        # attention heads may cut across fast heads; rotation knows the former alone
        fast.append(split_heads(turned(y.flatten(2)).flatten(2), paths.fast_heads) if paths.rotary else y)
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
