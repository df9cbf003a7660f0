"""`SequenceShard`: how one row of tokens is cut over the ranks of a group. All of it is known on every rank's host."""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Self

import torch.distributed as dist
from torch import Tensor

from kvbind.inner.value import check_choice, check_positive_int

Schedule = Literal["auto", "scan", "ring"]


@dataclass(frozen=True)
class Slice:
    """One rank's part of a row, and how its first and last documents go on beyond it.

    A slice without tokens has one document without tokens.

    Attributes:
        start: its first token's place in the row.
        length: its tokens.
        bounds: boundaries of its documents, from 0 to `length`.
        before: tokens of its first document on earlier ranks.
        first: the rank on which its first document starts; its own where `before` is 0.
        last: the last rank that its last document reaches; its own where the document ends here.
    """

    start: int
    length: int
    bounds: tuple[int, ...]
    before: int
    first: int
    last: int


@dataclass(frozen=True, eq=False)
class SequenceShard:
    """One row of tokens (or several rows of equal length), cut along its tokens over the ranks of a group.

    Every rank makes the same value, from the same numbers; ranks differ only in `rank`. Slices may be of any lengths, also
    shorter than a chunk or a window, or empty.

    Attributes:
        group: the process group, or None for all processes.
        lengths: the tokens of each rank's slice, in the order of the group's ranks.
        cu_seqlens: boundaries of the documents packed into the whole row, from 0 to the sum of `lengths`; None for one
            document, or for several rows of one document each.
        schedule: how fast weights are run: "scan" (every rank at once, with an exclusive scan across ranks, which needs a
            parallel form), "ring" (rank after rank: any causal inner loop), or "auto": "scan" where that can be.

    Raises:
        ValueError: lengths that are not one for each rank, or boundaries that do not fit them.
    """

    group: dist.ProcessGroup | None
    lengths: tuple[int, ...]
    cu_seqlens: tuple[int, ...] | None = None
    schedule: Schedule = "auto"

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        lengths: Sequence[int],
        cu_seqlens: Tensor | Sequence[int] | None = None,
        schedule: Schedule = "auto",
    ) -> None:
        check_choice("schedule", schedule, ("auto", "scan", "ring"))
        lengths = tuple(int(n) for n in lengths)
        size = dist.get_world_size(group)
        if len(lengths) != size:
            raise ValueError(f"lengths must have one entry for each of {size} ranks; got {len(lengths)}")
        if min(lengths) < 0:
            raise ValueError(f"lengths must not be negative; got {list(lengths)}")
        bounds = None
        if cu_seqlens is not None:
            bounds = tuple(int(x) for x in (cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else cu_seqlens))
            if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != sum(lengths):
                raise ValueError(f"cu_seqlens must go from 0 to the row's {sum(lengths)} tokens; got {list(bounds)}")
            if any(b < a for a, b in itertools.pairwise(bounds)):
                raise ValueError(f"cu_seqlens must never fall; got {list(bounds)}")
        for name, value in (("group", group), ("lengths", lengths), ("cu_seqlens", bounds), ("schedule", schedule)):
            object.__setattr__(self, name, value)

    @classmethod
    def even(
        cls,
        tokens: int,
        group: dist.ProcessGroup | None = None,
        *,
        cu_seqlens: Tensor | Sequence[int] | None = None,
        multiple: int = 1,
        schedule: Schedule = "auto",
    ) -> Self:
        """Slices as equal as they can be whose starts are multiples of `multiple`.

        Args:
            tokens: tokens of the whole row.
            group: the ranks that share the row, as `SequenceShard` takes it.
            cu_seqlens: where documents start and the last ends, as `SequenceShard` takes it.
            multiple: best the inner loop's `span`, its chunk where gradients are renewed at each: then no document that
                starts at a multiple of it leaves one incomplete at the end of a slice.
            schedule: how ranks exchange, as `SequenceShard` takes it.

        Raises:
            ValueError: a number below 1.
        """
        check_positive_int("tokens", tokens)
        check_positive_int("multiple", multiple)
        size, units = dist.get_world_size(group), -(-tokens // multiple)
        stops = [min((units * (i + 1) // size) * multiple, tokens) for i in range(size)]
        return cls(group, [b - a for a, b in itertools.pairwise([0, *stops])], cu_seqlens, schedule)

    @cached_property
    def rank(self) -> int:
        """This process's rank in the group."""
        return dist.get_rank(self.group)

    @property
    def size(self) -> int:
        """The number of ranks."""
        return len(self.lengths)

    @property
    def group_name(self) -> str:
        """The group's name, as functional collectives take it."""
        group = self.group if self.group is not None else dist.group.WORLD
        return str(group.group_name)  # type: ignore[union-attr]

    @property
    def tokens(self) -> int:
        """Tokens of the whole row."""
        return sum(self.lengths)

    @property
    def here(self) -> Slice:
        """This rank's slice."""
        return self.slices[self.rank]

    @cached_property
    def slices(self) -> tuple[Slice, ...]:
        """The slice of every rank."""
        bounds = sorted(set(self.cu_seqlens or (0, self.tokens)))
        starts = [0, *itertools.accumulate(self.lengths)]
        found: list[Slice] = []
        for rank, length in enumerate(self.lengths):
            start, stop = starts[rank], starts[rank + 1]
            opened = bounds[bisect_right(bounds, start) - 1]
            inside = [b - start for b in bounds[bisect_right(bounds, start) : bisect_left(bounds, stop)]]
            # the last rank, of those that start at or before the document, is the one that holds its first token
            first = rank if opened == start else bisect_right(starts, opened) - 1
            found.append(Slice(start, length, (0, *inside, length), start - opened, first, rank))
        for rank, place in enumerate(found):
            for earlier in range(place.first, rank):
                found[earlier] = _reaching(found[earlier], rank)
        return tuple(found)

    @property
    def connected(self) -> bool:
        """Whether any document crosses from one rank to another."""
        return any(place.before for place in self.slices)

    def pending(self, chunk: int) -> tuple[int, ...]:
        """For each rank, how many tokens of its first document's incomplete chunk earlier ranks hold."""
        return tuple(place.before % chunk for place in self.slices)

    def reaching(self, most: int) -> tuple[int, ...]:
        """For each rank, how many of the last `most` tokens before it belong to its first document."""
        return tuple(min(place.before, most) for place in self.slices)

    def take(self, x: Tensor, axis: int = 1, rows: int = 1) -> Tensor:
        """This rank's part of a tensor of the whole row, with so many `rows` for each token, as of several writes.

        Raises:
            ValueError: a tensor of another length.
        """
        if x.shape[axis] != rows * self.tokens:
            each = f"{rows} rows for each of " if rows > 1 else ""
            raise ValueError(
                f"x must have {each}the row's {self.tokens} tokens along axis {axis}; got shape {list(x.shape)}"
            )
        return x.narrow(axis, rows * self.here.start, rows * self.here.length)


def _reaching(place: Slice, rank: int) -> Slice:
    return Slice(place.start, place.length, place.bounds, place.before, place.first, max(place.last, rank))


# a list and no context variable, which torch.compile cannot read
_CURRENT: list[SequenceShard | None] = [None]


def current_shard() -> SequenceShard | None:
    """The shard of the innermost `sequence_parallel`, or None outside."""
    return _CURRENT[-1]


@contextmanager
def sequence_parallel(shard: SequenceShard | None) -> Iterator[None]:
    """Inside, a language model's input is this rank's slice of a row, and its layers see the whole row.

    Only the forward pass needs to be inside: what it makes knows its shard. None changes nothing.

    Args:
        shard: how the row is cut; the same on every rank of its group, all of which must call the model.

    Raises:
        TypeError: `shard` is something else.
    """
    if not isinstance(shard, SequenceShard | None):
        raise TypeError(f"shard must be a kvbind.SequenceShard or None; got {type(shard).__name__}")
    _CURRENT.append(shard if shard is not None else current_shard())
    try:
        yield
    finally:
        _CURRENT.pop()
