"""Whole chunks out of rows that stop anywhere: which tokens of a call complete one, and which stay pending.

Rows of a batch may have had different numbers of tokens, and a call may bring padding among them, so that their chunks end
in different columns. A `ChunkPlan` says once for all layers where every token goes; a `PendingColumns` holds those that are
pending.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor

MOST_PIECES = 64
"""Calls whose tokens are held as they came; then all are copied into one tensor."""


@dataclass(frozen=True)
class PendingColumns:
    """Tokens of incomplete chunks, at the right of as many columns as the row with most of them has.

    Attributes:
        pieces: per call, tensors `[B, n, ...]`, one for each thing held of a token.
    """

    pieces: tuple[tuple[Tensor, ...], ...] = ()

    def append(self, new: tuple[Tensor, ...]) -> PendingColumns:
        """With columns behind those there are."""
        pieces = (*self.pieces, new)
        return PendingColumns(pieces) if len(pieces) < MOST_PIECES else PendingColumns((PendingColumns(pieces).joined(),))

    def joined(self) -> tuple[Tensor, ...]:
        """All columns, of each thing held in one tensor."""
        if len(self.pieces) == 1:
            return self.pieces[0]
        return tuple(torch.cat(parts, dim=1) for parts in zip(*self.pieces, strict=True))

    def select(self, index: Tensor) -> PendingColumns:
        """The rows at `index`, in that order."""
        if not self.pieces:
            return self
        return PendingColumns((tuple(x.index_select(0, index.to(x.device)) for x in self.joined()),))


@dataclass(frozen=True)
class ChunkPlan:
    """Where the tokens of a call sit: in rows behind pending ones, or in documents packed into rows.

    "Joined" columns are those of the pending tokens and the call's behind them, P + T.

    Attributes:
        chunk: tokens of a chunk.
        before: pending tokens of each row.
        lengths: the call's tokens of each row, without padding.
        columns: T.
        real: bool `[B, T]`, False at padding; None where there is none.
        documents: boundaries of the documents in the rows laid end to end, from 0 to B T; then nothing is pending.
    """

    chunk: int
    before: tuple[int, ...]
    lengths: tuple[int, ...]
    columns: int
    real: Tensor | None = None
    documents: tuple[int, ...] | None = None

    @property
    def totals(self) -> tuple[int, ...]:
        """Tokens of each row, pending ones included."""
        return tuple(old + new for old, new in zip(self.before, self.lengths, strict=True))

    @property
    def rest(self) -> tuple[int, ...]:
        """Tokens of each row that are pending afterwards."""
        return tuple(n % self.chunk for n in self.totals)

    @property
    def pending_columns(self) -> int:
        """P, the columns of pending tokens."""
        return max(self.before, default=0)

    @cached_property
    def completing(self) -> list[int]:
        """The rows of which a chunk becomes complete."""
        return [row for row, n in enumerate(self.totals) if n >= self.chunk]

    @property
    def alike(self) -> bool:
        """Whether all rows have the same tokens in the same columns."""
        return self.real is None and len(set(self.before)) <= 1

    @cached_property
    def valid(self) -> Tensor:
        """Which joined columns hold tokens, bool `[B, P + T]`."""
        device = None if self.real is None else self.real.device
        before = torch.tensor(self.before, device=device)[:, None]
        held = torch.arange(self.pending_columns, device=device) >= self.pending_columns - before
        new = torch.ones(len(self.before), self.columns, dtype=torch.bool, device=device) if self.real is None else self.real
        return torch.cat((held, new), dim=1)

    @cached_property
    def left_over(self) -> Tensor:
        """For each row the joined columns whose last ones are pending afterwards, int64 `[B, max(rest)]`."""
        later = self.valid.flip(1).cumsum(1).flip(1)
        keep = self.valid & (later <= torch.tensor(self.rest, device=later.device)[:, None])
        most = max(self.rest)
        return torch.argsort(keep.to(torch.int8), dim=1, stable=True)[:, keep.shape[1] - most :]

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Boundaries of the sequences in which chunks become complete, laid end to end."""
        return self.documents or (0, *accumulate(self.totals[row] for row in self.completing))

    @cached_property
    def complete(self) -> Tensor:
        """Of those sequences laid end to end, the tokens in complete chunks, int64 `[chunks * chunk]`."""
        spans = [torch.arange(a, b - (b - a) % self.chunk) for a, b in pairwise(self.ends)]
        return torch.cat(spans) if spans else torch.zeros(0, dtype=torch.long)


def documents_of(position_ids: Tensor, length: int) -> tuple[int, ...] | None:
    """Where positions `[B, T]` do not rise by one, a document starts: the boundaries, or None where every row is one."""
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids.diff(dim=1) != 1
    if not bool(starts[:, 1:].any()):
        return None
    return (*starts.flatten().nonzero().flatten().tolist(), position_ids.shape[0] * length)


def plan_of(
    shape: tuple[int, int],
    chunk: int,
    seen: Sequence[int] = (),
    *,
    real: Tensor | None = None,
    documents: tuple[int, ...] | None = None,
) -> ChunkPlan:
    """The plan of a call.

    Args:
        shape: (B, T) of the call.
        chunk: tokens of a chunk.
        seen: how many tokens each row has had; empty before the first.
        real: bool `[B, T]`, False at padding.
        documents: boundaries of packed documents in the rows laid end to end.
    """
    batch, columns = shape
    before = tuple(n % chunk for n in seen) or (0,) * batch
    if real is not None and bool(real.all()):
        real = None
    lengths = (columns,) * batch if real is None else tuple(real.sum(1).tolist())
    return ChunkPlan(chunk, before, lengths, columns, real, documents)
