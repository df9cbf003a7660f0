"""Causal depthwise convolutions over a few tokens, which go on from where earlier calls stopped."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvbind.sequence.exchanges import Exchanges
from kvbind.sequence.shard import SequenceShard


class ShortConvolution(nn.Module):
    """`y_t = sum_(j < width) w_j x_(t - width + 1 + j) (+ b)` for each channel; tokens before a sequence's first count as 0.

    Args:
        channels: C.
        width: tokens that are seen, the token itself among them.
        bias: whether there is b.
    """

    def __init__(self, channels: int, width: int, bias: bool = False) -> None:
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def reset_parameters(self) -> None:
        """Draw weights as PyTorch's convolutions do, uniform up to `1 / sqrt(width)`; biases 0."""
        bound = 1 / math.sqrt(self.width)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, seen: Tensor, places: Tensor | None = None) -> Tensor:
        """Convolve.

        Args:
            seen: `[B, width - 1 + T, C]`, the tokens behind those before them.
            places: how many tokens of its sequence come before each, int64 `[B, T]` or `[1, T]`, where what stands before a
                sequence's first is not 0: in a packed row. None elsewhere.

        Returns:
            `[B, T, C]`.
        """
        if places is None and seen.shape[1] >= self.width:
            return F.conv1d(seen.mT, self.weight.to(seen.dtype)[:, None], _as(self.bias, seen), groups=seen.shape[-1]).mT
        length = seen.shape[1] - self.width + 1
        output = None
        for back in range(self.width):
            x = shifted(seen, self.width - 1, back, length, places) * self.weight[:, self.width - 1 - back].to(seen.dtype)
            output = x if output is None else output + x
        assert output is not None
        return output if self.bias is None else output + self.bias.to(seen.dtype)


def _as(x: Tensor | None, like: Tensor) -> Tensor | None:
    return None if x is None else x.to(like.dtype)


def shifted(seen: Tensor, ahead: int, back: int, length: int, places: Tensor | None) -> Tensor:
    """For each of `length` tokens the one `back` places before it, 0 before its sequence's first.

    Args:
        seen: `[B, ahead + length, C]`.
        ahead: tokens in front of those.
        back: at most `ahead`.
        length: T.
        places: as `ShortConvolution.forward` takes them.
    """
    x = seen[:, ahead - back : ahead - back + length]
    return x if places is None else x.masked_fill((places < back)[..., None], 0)


def last_of(seen: Tensor, count: int, lengths: tuple[int, ...] | None) -> Tensor:
    """The last `count` tokens of each row, for the next call.

    Args:
        seen: `[B, count + T, C]`, this call's tokens behind those before them.
        count: how many.
        lengths: how many of each row's T tokens are no padding; None for all.
    """
    if lengths is None:
        # a view would keep all of a long prompt alive
        return seen[:, seen.shape[1] - count :].clone()
    starts = torch.tensor(lengths, device=seen.device)[:, None]
    where = starts + torch.arange(count, device=seen.device)
    return seen.take_along_dim(where[..., None], dim=1)


class Behind(Protocol):
    """What a layer reads of the tokens before those of a call."""

    def behind(self, name: str, x: Tensor, count: int) -> Tensor:
        """A call's tokens `[B, T, C]`, each sequence's behind the `count` tokens before it, of which the last are kept."""
        ...

    def own(self, y: Tensor, count: int) -> Tensor:
        """Of what was computed at each token of `behind` but the first `count`, that of the call's own: `[B, T, C]`."""
        ...


@dataclass
class Tails:
    """The same of calls on rows.

    Attributes:
        before: of earlier calls `[B, count, C]`; None at the start of sequences, where it counts as 0.
        lengths: as `last_of` takes them.
        latest: filled with the same for the next call; None where there is none.
    """

    before: Mapping[str, Tensor] | None = None
    lengths: tuple[int, ...] | None = None
    latest: dict[str, Tensor] | None = None

    def behind(self, name: str, x: Tensor, count: int) -> Tensor:
        """`x` `[B, T, C]` behind the `count` tokens before it: `[B, count + T, C]`."""
        ahead = x.new_zeros(x.shape[0], count, x.shape[2]) if self.before is None else self.before[name].to(x.dtype)
        seen = torch.cat((ahead, x), dim=1)
        if self.latest is not None:
            self.latest[name] = last_of(seen, count, self.lengths)
        return seen

    def own(self, y: Tensor, count: int) -> Tensor:
        """Of what was computed at each token of `behind` but the first `count`, that of the call's own: `[B, T, C]`."""
        return y


class OnRanks:
    """What stands before a slice of a row that is cut over ranks: tokens that earlier ranks have, as `Behind` gives them.

    Args:
        shard: how the row is cut.

    Attributes:
        exchanges: those that were made; None before the first.
    """

    def __init__(self, shard: SequenceShard) -> None:
        self.shard = shard
        self.exchanges: Exchanges | None = None

    def behind(self, name: str, x: Tensor, count: int) -> Tensor:
        """`x` `[B, T, C]` behind the `count` tokens before it, or zeros: `[B, count + T, C]`."""
        if not count:
            return x
        if self.exchanges is None:
            self.exchanges = Exchanges(self.shard, (x,))
        (seen,) = self.exchanges.extended((x,), self.shard.reaching(count), axis=1)
        return F.pad(seen, (0, 0, count + x.shape[1] - seen.shape[1], 0))

    def own(self, y: Tensor, count: int) -> Tensor:
        """What was computed at each token of `behind` but the first `count`."""
        return y
