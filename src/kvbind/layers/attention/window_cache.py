"""The keys and values that attention over a sliding window keeps from call to call: as many as later tokens may see."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class WindowCache:
    """Keys and values of some sequences; a pytree of the two.

    Attributes:
        keys: `[B, S, H, D]`, the latest at the end, rotated already.
        values: `[B, S, H, D]`.
        held: how many of each row's S places are filled, from the end.
    """

    keys: Tensor
    values: Tensor
    held: tuple[int, ...]

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """These keys and values, and those of the tokens behind them `[B, T, H, D]`."""
        return torch.cat((self.keys, k), dim=1), torch.cat((self.values, v), dim=1)

    def select(self, rows: list[int], where: Tensor) -> WindowCache:
        """The sequences at `rows`, which `where` has as a tensor."""
        keys, values = self.keys.index_select(0, where), self.values.index_select(0, where)
        return WindowCache(keys, values, tuple(self.held[i] for i in rows))


pytree.register_pytree_node(
    WindowCache,
    lambda cache: ([cache.keys, cache.values], cache.held),
    lambda leaves, held: WindowCache(*leaves, held),  # type: ignore[call-arg]
    serialized_type_name="kvbind.KeptKeys",
)


def window_cache_after(
    cache: WindowCache | None, k: Tensor, v: Tensor, window: int, length: int, lengths: tuple[int, ...] | None
) -> WindowCache:
    """The last `window - 1` keys and values of each row, as later tokens will see them.

    Places before a row's first are of no meaning.

    Args:
        cache: of earlier calls, or None.
        k: those keys and this call's `[B, S + T, H, D]`.
        v: their values.
        window: how many tokens a token sees, itself among them.
        length: T.
        lengths: how many of each row's T tokens are no padding; None for all.
    """
    batch, ahead = k.shape[0], k.shape[1] - length
    lengths = lengths or (length,) * batch
    # always room for all of them, so that every decoding step has the same shapes
    size = window - 1
    now = tuple(min(old + new, size) for old, new in zip(cache.held if cache else (0,) * batch, lengths, strict=True))
    if min(lengths) == max(lengths):
        stop = ahead + lengths[0]
        missing = max(size - stop, 0)
        # a view would keep every key of a long prompt alive; behind what is stored, one token is one key more
        decoding = cache is not None and k.shape[1] <= window

        def latest(x: Tensor) -> Tensor:
            x = x[:, stop - size + missing : stop]
            return F.pad(x, (0, 0, 0, 0, missing, 0)) if missing else x if decoding else x.clone()

        return WindowCache(latest(k), latest(v), now)
    stops = torch.tensor([ahead + n for n in lengths], device=k.device)
    places = (stops[:, None] - size + torch.arange(size, device=k.device)).clamp(min=0)
    rows = torch.arange(batch, device=k.device)[:, None]
    return WindowCache(k[rows, places], v[rows, places], now)
