"""Softmax attention in the place of fast weights: what models are compared with. Widths around it stay as they are.

`WindowAttention` stands for a `LactLayer` without its fast weights, causal and over a window; `FullAttention` for the fast
weights of images and of views, whose tokens see everything that is read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from kvbind.inner.value import check_positive_int
from kvbind.layers.attention.softmax import softmax_attention
from kvbind.layers.attention.window_attention import window_attention
from kvbind.layers.attention.window_cache import WindowCache, window_cache_after
from kvbind.layers.inner_call import check_state
from kvbind.layers.layout import Layout
from kvbind.layers.norm import RMSNorm
from kvbind.layers.operands import split_heads
from kvbind.layers.rotary import Tables, rotary_tables, rotate

NORM_EPS = 1e-5
"""Of the norms of queries and keys in `WindowAttention`, that of `LactLayer`."""


@dataclass(frozen=True)
class AttentionState:
    """Where some sequences stopped in one layer: the keys and values that later tokens may see. A pytree of them.

    Attributes:
        cache: the last `window - 1` keys and values.
        seen: how many tokens each sequence has had.
    """

    cache: WindowCache
    seen: tuple[int, ...]

    def tensors(self) -> list[Tensor]:
        """All that it holds."""
        return [self.cache.keys, self.cache.values]

    def select(self, index: Tensor) -> AttentionState:
        """The sequences at `index` (int64 `[n]`), in that order, as often as they are named."""
        rows = index.tolist()
        return AttentionState(self.cache.select(rows, index.to(self.cache.keys.device)), tuple(self.seen[i] for i in rows))


pytree.register_pytree_node(
    AttentionState,
    lambda state: ([state.cache], state.seen),
    lambda parts, seen: AttentionState(*parts, seen),  # type: ignore[call-arg]
    serialized_type_name="kvbind.AttentionState",
)


class WindowAttention(nn.Module):
    """Causal softmax attention over a window with rotary positions: a `LactLayer` less its fast weights.

    A window as long as the text is full attention.

    Args:
        hidden_size: width d of the residual stream.
        heads: of attention.
        window_size: tokens that a token sees, itself among them.
        qkv_bias: a bias in the `qkv` projection.
        qk_norm: RMS norms over all channels of q and of k.
        rope_theta: base of the rotary wavelengths.

    Raises:
        ValueError: heads that do not divide the width, or leave an odd one.
    """

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        window_size: int,
        *,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        rope_theta: float = 1e6,
    ) -> None:
        super().__init__()
        for name, value in (("hidden_size", hidden_size), ("heads", heads), ("window_size", window_size)):
            check_positive_int(name, value)
        if hidden_size % (2 * heads):
            raise ValueError(f"heads must leave an even width of hidden_size = {hidden_size}; got {heads}")
        self.hidden_size, self.heads, self.window_size, self.rope_theta = hidden_size, heads, window_size, rope_theta
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=qkv_bias)
        self.q_norm = RMSNorm(hidden_size, eps=NORM_EPS) if qk_norm else None
        self.k_norm = RMSNorm(hidden_size, eps=NORM_EPS) if qk_norm else None
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(
        self,
        x: Tensor,
        layout: Layout | None = None,
        tables: Tables | None = None,
        state: AttentionState | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, AttentionState | None]:
        """Mix the tokens of `x`; arguments and results as `LactLayer.forward` has them.

        Raises:
            ValueError: a state together with packed sequences, or of another batch; a slice of a row that is cut over ranks.
            TypeError: a state of another kind of layer.
        """
        if layout is not None and layout.sequence is not None:
            raise ValueError("layout must be of whole rows, as attention alone is not cut over ranks; got a slice")
        batch, length, _ = x.shape
        seen = check_state(x, layout, state, AttentionState, return_state)
        if layout is None:
            layout = Layout.rows(length, x.device, seen)
        if tables is None:
            tables = rotary_tables(layout.positions, self.hidden_size // self.heads, self.rope_theta)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (split_heads(part, self.heads) for part in (q, k, v))
        q, k = (rotate(part, tables).to(v.dtype) for part in (q, k))
        cache = None if state is None else state.cache
        if cache is not None:
            k, v = cache.extend(k, v)
        ahead, held = k.shape[1] - length, None if cache is None else cache.held
        mixed = window_attention(q, k, v, self.window_size, cu_seqlens=layout.cu_seqlens, ahead=ahead, held=held)
        output = self.o_proj(mixed.flatten(2))
        if not return_state:
            return output, None
        after = window_cache_after(cache, k, v, self.window_size, length, layout.lengths)
        return output, AttentionState(after, layout.after(seen or (0,) * batch, length))

    def extra_repr(self) -> str:
        """What `print` shows beside the modules."""
        return f"heads={self.heads}, window_size={self.window_size}"


KeysAndValues = tuple[Tensor, Tensor]


class FullAttention(nn.Module):
    """Softmax attention of all tokens to those that are read, as the fast weights of images and views see them.

    Args:
        dim: width d.
        head_dim: width of a head.
        bias: biases in both projections.
        qk_norm: RMS norms of each head's queries and keys.

    Raises:
        ValueError: a head's width that does not divide d.
    """

    def __init__(self, dim: int, head_dim: int, *, bias: bool = False, qk_norm: bool = True) -> None:
        super().__init__()
        check_positive_int("head_dim", head_dim)
        if dim % head_dim:
            raise ValueError(f"head_dim must divide dim = {dim}; got {head_dim}")
        self.heads = dim // head_dim
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.c_proj = nn.Linear(dim, dim, bias=bias)
        self.q_norm = RMSNorm(head_dim) if qk_norm else None
        self.k_norm = RMSNorm(head_dim) if qk_norm else None

    def forward(
        self, x: Tensor, update_tokens: slice | Tensor | None = None, state: KeysAndValues | None = None
    ) -> tuple[Tensor, KeysAndValues]:
        """On tokens `[B, T, d]`.

        Args:
            x: normalized input.
            update_tokens: which tokens are read from; None for all. With a state they must be none: it alone is read.
            state: keys and values `[B, H, T', D]` of an earlier call.

        Returns:
            `[B, T, d]`, and the keys and values that were read.
        """
        q, k, v = (split_heads(part, self.heads) for part in self.to_qkv(x).chunk(3, dim=-1))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        if state is None:
            state = (k, v) if update_tokens is None else (k[:, :, update_tokens], v[:, :, update_tokens])
        mixed = softmax_attention(q, *state)
        output: Tensor = self.c_proj(mixed.transpose(1, 2).flatten(2))
        return output, state


def grid_positions(grid: tuple[int, int], dim: int, device: torch.device | None = None) -> Tensor:
    """Fixed positions of a grid's tokens: sines and cosines of row and column, float32 `[height * width, dim]`.

    The wavelengths rise from 2 pi to 20,000 pi, as in the plain vision transformer of arXiv 2205.01580.

    Args:
        grid: height and width.
        dim: channels, a multiple of 4.
        device: of the result.

    Raises:
        ValueError: another number of channels.
    """
    if dim % 4:
        raise ValueError(f"dim must be a multiple of 4 for positions on a grid; got {dim}")
    rates = 10000.0 ** -(torch.arange(dim // 4, device=device, dtype=torch.float32) / max(dim // 4 - 1, 1))
    rows, columns = (torch.arange(n, device=device, dtype=torch.float32)[:, None] * rates for n in grid)
    places = [x[:, None].expand(*grid, -1) for x in (rows.sin(), rows.cos())]
    places += [x[None].expand(*grid, -1) for x in (columns.sin(), columns.cos())]
    return torch.cat(places, dim=-1).flatten(0, 1)
