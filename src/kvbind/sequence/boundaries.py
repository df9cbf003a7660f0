"""Boundaries of packed documents that only the device reads, so that what runs on them can be captured and replayed.

Sizes of all that depends on them come from a capacity: how many documents, and how many chunks, a row may hold. What a row
lacks of it is empty. Boundaries themselves, and where chunks lie, are tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

LEAST_CAPACITY = 8
"""Documents that every row has room for."""

T = TypeVar("T")


class Boundaries:
    """Where the documents of one packed row lie.

    Tables that are made of them are kept here, so that all layers of a model share them. They are as old as this object: a
    graph must make its own of the tensor that it reads.

    Args:
        bounds: `[D + 1]` integers, from 0, never falling, up to `length`. Nobody checks them. The last documents may be
            empty, which makes `D` a capacity.
        length: tokens in the row.
    """

    def __init__(self, bounds: Tensor, length: int) -> None:
        self.bounds, self.length = bounds.long(), length
        self._made: dict[Hashable, Any] = {}

    @property
    def capacity(self) -> int:
        """How many documents there can be."""
        return len(self.bounds) - 1

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.bounds.device

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` gives, made at the first call with `key`."""
        if key not in self._made:
            self._made[key] = make()
        return cast("T", self._made[key])

    @property
    def document(self) -> Tensor:
        """Whose each token is, int64 `[T]`."""
        return self.once("document", lambda: owners(self.bounds[1:], self.length)[0])

    @property
    def starts(self) -> Tensor:
        """Where each token's document starts, int64 `[T]`."""
        return self.once("starts", lambda: self.bounds[self.document])

    def chunks(self, size: int) -> Chunks:
        """The complete chunks of all documents, `size` tokens each."""
        return self.once(("chunks", size), lambda: Chunks.of(self, size))


def capacity_for(documents: int) -> int:
    """A capacity for so many documents: powers of two, so that rows of about as many share one."""
    return max(LEAST_CAPACITY, 1 << (documents - 1).bit_length())


def with_room(cu_seqlens: Tensor) -> Tensor:
    """Boundaries `[n + 1]` with empty documents behind them, up to a capacity."""
    n = len(cu_seqlens) - 1
    return torch.cat((cu_seqlens, cu_seqlens[-1:].expand(capacity_for(n) - n)))


def owners(ends: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """In which group each of `count` places lies, and whether in any; those behind the last are given to the last.

    Args:
        ends: where each group ends, int64 `[D]`, never falling.
        count: how many places.
    """
    found = torch.searchsorted(ends, torch.arange(count, device=ends.device), right=True)
    return found.clamp(max=len(ends) - 1), found < len(ends)


@dataclass(frozen=True)
class Chunks:
    """The complete chunks of the documents of a row, in order, and the tokens behind them; int64, `M` chunks at most.

    Attributes:
        boundaries: of the documents.
        size: tokens in a chunk.
        counts: complete chunks of each document, `[D]`.
        stops: how many there are up to each document's end, `[D]`.
        document: of each chunk, `[M]`.
        first: its first token; 0 where there is no such chunk.
        real: whether there is, bool.
        opens: whether it is a document's first, bool.
    """

    boundaries: Boundaries
    size: int
    counts: Tensor
    stops: Tensor
    document: Tensor
    first: Tensor
    real: Tensor
    opens: Tensor

    @staticmethod
    def of(boundaries: Boundaries, size: int) -> Chunks:
        """Those of `size` tokens each."""
        begins, ends = boundaries.bounds[:-1], boundaries.bounds[1:]
        counts = (ends - begins) // size
        stops = counts.cumsum(0)
        most = boundaries.length // size
        document, real = owners(stops, most)
        place = torch.arange(most, device=boundaries.device) - (stops - counts)[document]
        first = torch.where(real, begins[document] + place * size, 0)
        return Chunks(boundaries, size, counts, stops, document, first, real, real & (place == 0))

    def __len__(self) -> int:
        return self.boundaries.length // self.size

    @property
    def tokens(self) -> Tensor:
        """The tokens of each chunk, `[M, size]`; any of the row where there is no such chunk."""
        return self.first[:, None] + torch.arange(self.size, device=self.first.device)

    @property
    def rest(self) -> int:
        """The most tokens that a document has behind its last complete chunk."""
        return min(self.size - 1, self.boundaries.length)

    @property
    def rests(self) -> tuple[Tensor, Tensor]:
        """The tokens behind each document's last complete chunk, `[D, rest]`, and which there are, bool."""
        begins, ends = self.boundaries.bounds[:-1], self.boundaries.bounds[1:]
        tokens = (begins + self.counts * self.size)[:, None] + torch.arange(self.rest, device=begins.device)
        there = tokens < ends[:, None]
        return torch.where(there, tokens, 0), there

    @property
    def places(self) -> Tensor:
        """Of each token of the row, its place among all of `tokens` and then of `rests`, `[T]`."""
        whose = self.boundaries.document
        within = torch.arange(self.boundaries.length, device=whose.device) - self.boundaries.starts
        chunk, counts = within // self.size, self.counts[whose]
        complete = ((self.stops - self.counts)[whose] + chunk) * self.size + within % self.size
        left = len(self) * self.size + whose * self.rest + within - counts * self.size
        return torch.where(chunk < counts, complete, left)

    @property
    def before_rests(self) -> Tensor:
        """How many chunks have been up to the end of each document that has any, else 0: `[D]`."""
        return torch.where(self.counts > 0, self.stops, 0)

    def means(self, gate: Tensor) -> Tensor:
        """A gate per token, `[T, ...]`, averaged over each chunk: `[M, ...]`; 0 where there is no such chunk."""
        means = gate.index_select(0, self.tokens.flatten()).unflatten(0, (-1, self.size)).mean(1)
        return torch.where(self.real.reshape(-1, *(1,) * (means.dim() - 1)), means, 0.0)

    def take(self, x: Tensor) -> Tensor:
        """Of tokens `[1, H, T, ...]` those of each chunk, `[M, H, size, ...]`; zeros where there is no such chunk."""
        return _taken(x, self.tokens, self.real[:, None].expand(-1, self.size))

    def take_rests(self, x: Tensor) -> Tensor:
        """Of tokens `[1, H, T, ...]` those of `rests`, `[D, H, rest, ...]`; zeros where there are none."""
        return _taken(x, *self.rests)

    def put_back(self, chunks: Tensor, rests: Tensor) -> Tensor:
        """The inverse of `take` and `take_rests` together."""
        flat = torch.cat([x.transpose(0, 1).flatten(1, 2) for x in (chunks, rests)], dim=1)
        return flat.index_select(1, self.places)[None]


def _taken(x: Tensor, tokens: Tensor, there: Tensor) -> Tensor:
    """Of `[1, H, T, ...]` the tokens `[n, L]`, `[n, H, L, ...]`, with zeros where there are none."""
    picked = x[0].index_select(1, tokens.flatten()).unflatten(1, tuple(tokens.shape)).transpose(0, 1)
    mask = there[:, None].reshape(there.shape[0], 1, there.shape[1], *(1,) * (picked.dim() - 3))
    return torch.where(mask, picked, torch.zeros((), dtype=x.dtype, device=x.device))
