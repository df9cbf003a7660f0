"""Softmax attention by PyTorch, also where its fused kernels cannot go."""

from __future__ import annotations

import torch
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


def is_for_flash(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `flash_in_window` takes operands of this width and dtype, on this device."""
    narrow = q.dtype in (torch.bfloat16, torch.float16) and q.dtype == k.dtype == v.dtype
    if not q.is_cuda or not narrow or q.shape[-1] % 8 or q.shape[-1] > 256 or not all(map(_in_vectors, (q, k, v))):
        return False
    known = torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.is_flash_attention_available()
    return known and torch.cuda.get_device_capability(q.device) >= (8, 0)


def _in_vectors(x: Tensor) -> bool:
    """Whether rows of 2-byte numbers begin at multiples of 16 bytes: so FlashAttention loads them, and does not check."""
    *others, last = (stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1)
    return last == 1 and x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in others)


def flash_in_window(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """PyTorch's FlashAttention with the window that `scaled_dot_product_attention` has no argument for.

    Args:
        q: `[B, H, T, D]` on a GPU, such as `is_for_flash` says.
        k: `[B, H, S, D]`, S at least T; the last T are the queries' own.
        v: `[B, H, S, D]`.
        window: how many keys a query sees, the last one its own.

    Returns:
        `[B, H, T, D]`.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    output: Tensor = torch.ops.aten._flash_attention_forward(
        q, k, v, None, None, q.shape[1], k.shape[1], 0.0, True, False, window_size_left=window - 1, window_size_right=0
    )[0]
    return output.transpose(1, 2)
