"""Where the tokens of a batch sit: whose they are, at which position, and which columns are padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from kvbind.forms.validation import check_cu_seqlens
from kvbind.sequence.boundaries import Boundaries
from kvbind.sequence.shard import SequenceShard


@dataclass(frozen=True)
class Layout:
    """The places of a batch's tokens, `[B, T]`, in one of three arrangements.

    Rows of equal length (neither of `cu_seqlens` and `lengths` is set), sequences packed into one row (`cu_seqlens`), or
    rows of different lengths with their tokens at the left and padding behind them (`lengths`). The first two may be this
    rank's slice of longer rows (`sequence`).

    Attributes:
        positions: each token's place in its sequence, int64 `[B, T]`, or `[1, T]` where all rows agree.
        cu_seqlens: boundaries of packed sequences, from 0 to T, or as the device alone knows them; then `B` is 1.
        lengths: how many tokens of each row are no padding.
        sequence: how longer rows are cut over ranks, of which these tokens are one slice.
    """

    positions: Tensor
    cu_seqlens: tuple[int, ...] | Boundaries | None = None
    lengths: tuple[int, ...] | None = None
    sequence: SequenceShard | None = None

    @staticmethod
    def rows(length: int, device: torch.device, seen: Sequence[int] = ()) -> Layout:
        """Rows of `length` tokens each, behind the `seen` tokens that each row has had before."""
        steps = torch.arange(length, device=device)[None]
        if not any(seen):
            return Layout(steps)
        if len(set(seen)) == 1:
            return Layout(steps + seen[0])
        return Layout(steps + torch.tensor(list(seen), device=device)[:, None])

    @staticmethod
    def packed(cu_seqlens: Tensor | Sequence[int] | Boundaries, batch: int, length: int, device: torch.device) -> Layout:
        """Sequences packed into one row, as in FlashAttention; positions count from 0 in each.

        Raises:
            ValueError: boundaries that do not go from 0 to `length`, or more than one row.
        """
        bounds: tuple[int, ...] | Boundaries | None
        if isinstance(cu_seqlens, Boundaries):
            if (batch, length) != (1, cu_seqlens.length):
                raise ValueError(
                    f"the input must be one row of {cu_seqlens.length} tokens, as boundaries; got {[batch, length]}"
                )
            bounds = cu_seqlens
        else:
            bounds = check_cu_seqlens(cu_seqlens, batch, length)
        if bounds is None:
            raise ValueError("cu_seqlens must be boundaries of packed sequences, [n + 1]; got None")
        starts = sequence_starts(bounds, device)
        return Layout((torch.arange(length, device=device) - starts)[None], bounds)

    @staticmethod
    def sharded(shard: SequenceShard, batch: int, length: int, device: torch.device) -> Layout:
        """This rank's slice of rows that are cut over ranks.

        Raises:
            ValueError: another length than the slice's, or more than one packed row.
        """
        here = shard.here
        if length != here.length:
            raise ValueError(f"the input must be the {here.length} tokens of rank {shard.rank}'s slice; got {length}")
        bounds = check_cu_seqlens(None if shard.cu_seqlens is None else here.bounds, batch, length)
        places = torch.arange(length, device=device)
        if bounds is not None:
            places = places - sequence_starts(bounds, device)
        # the first document has had tokens on earlier ranks
        first = here.bounds[1]
        places = torch.cat((places[:first] + here.before, places[first:]))
        return Layout(places[None], bounds, sequence=shard)

    def places(self, seen: Sequence[int], length: int) -> Tensor:
        """How many tokens of its sequence come before each of `length`, int64 `[B, T]` or `[1, T]`.

        Positions, unless those that a caller gave start elsewhere.
        """
        if self.sequence is not None:
            return self.positions
        device = self.positions.device
        if self.cu_seqlens is not None:
            return (torch.arange(length, device=device) - sequence_starts(self.cu_seqlens, device))[None]
        return Layout.rows(length, device, seen).positions

    @property
    def known_bounds(self) -> tuple[int, ...] | None:
        """Boundaries of packed sequences, which the host has read.

        Raises:
            ValueError: those that the device alone knows.
        """
        if isinstance(self.cu_seqlens, Boundaries):
            raise ValueError("layout must have boundaries that the host reads; got such as the device alone knows")
        return self.cu_seqlens

    def after(self, seen: Sequence[int], length: int) -> tuple[int, ...]:
        """How many tokens each row has had after this batch, of `seen` before it."""
        added = self.lengths or (length,) * len(seen)
        return tuple(old + new for old, new in zip(seen, added, strict=True))


def sequence_starts(cu_seqlens: tuple[int, ...] | Boundaries, device: torch.device) -> Tensor:
    """For each token of a packed row, where its sequence starts: int64 `[T]`."""
    if isinstance(cu_seqlens, Boundaries):
        return cu_seqlens.starts
    bounds = torch.tensor(cu_seqlens, device=device)
    lengths = torch.tensor([b - a for a, b in pairwise(cu_seqlens)], device=device)
    return bounds[:-1].repeat_interleave(lengths, output_size=cu_seqlens[-1])
