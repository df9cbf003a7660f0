"""Softmax attention by PyTorch, also where its fused kernels cannot go."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kvbind.kernels.common.tracing import has_tangents, is_mapped


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """`scaled_dot_product_attention`, as plain products under `vmap` and forward-mode differentiation.

    Args:
        q: `[B, H, T, D]`.
        k: `[B, H, S, D]`.
        v: `[B, H, S, D]`.
        mask: bool `[T, S]`, or with axes before it, True where a query sees a key.
        is_causal: each query sees the keys up to its own, T = S.
    """
    if has_tangents() or any(map(is_mapped, (q, k, v))):
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
