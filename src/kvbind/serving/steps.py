"""One step of a serving engine for the fast weights of a layer: pieces of many sequences, each from where it stopped.

A piece may start and stop anywhere in a chunk. What is to be done follows from positions alone, so that it is planned once
for all layers, on the host.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from kvbind.forms.api import ttt
from kvbind.forms.evaluate import Form
from kvbind.forms.pending import completed, read, read_rounded
from kvbind.forms.state import State
from kvbind.forms.tokens import Tokens
from kvbind.inner.spec import InnerLoop
from kvbind.serving.states import Pages, Pool, StateLayout

Piece = tuple[int, int, int, int]
"""A sequence, the first of the step's tokens that are its, the position of that in the sequence, and how many there are."""


@dataclass(frozen=True)
class PackedPart:
    """Pieces of some of a step's sequences, packed.

    Attributes:
        rows: which sequences, int64 `[n]`.
        tokens: which of the step's tokens, int64 `[T]`.
        bounds: where each piece starts among them, and T.
        starts: at which token of its sequence the pending tokens before each piece start, int64 `[n]`.
        pending: how many those are.
        places: of each token its place in its chunk, int64 `[T]`.
    """

    rows: Tensor
    tokens: Tensor
    bounds: tuple[int, ...]
    starts: Tensor
    pending: tuple[int, ...]
    places: Tensor

    @staticmethod
    def of(pieces: Sequence[Piece], chunk: int, device: torch.device) -> PackedPart | None:
        """From pieces; None of none."""
        if not pieces:
            return None
        bounds, tokens, places = [0], list[int](), list[int]()
        for _, first, position, length in pieces:
            bounds.append(bounds[-1] + length)
            tokens += range(first, first + length)
            places += [x % chunk for x in range(position, position + length)]
        pending = tuple(position % chunk for _, _, position, _ in pieces)
        starts = [position - held for (_, _, position, _), held in zip(pieces, pending, strict=True)]
        numbers = [[row for row, *_ in pieces], tokens, starts, places]
        rows, where, begins, at = (torch.tensor(x).to(device, non_blocking=True) for x in numbers)
        return PackedPart(rows, where, tuple(bounds), begins, pending, at)

    def of_all(self, tokens: Tokens, length: int) -> Tokens:
        """The part's own of what a step's `length` tokens bring, `[1, length, H, ...]` or a row for each write of one."""

        def own(x: Tensor) -> Tensor:
            each = x.shape[1] // length
            return x[:, self.tokens] if each == 1 else x.unflatten(1, (length, each))[:, self.tokens].flatten(1, 2)

        return tokens.map(own)


@dataclass(frozen=True)
class StepPlan:
    """What one step does with the states of its sequences, in this order.

    Attributes:
        due: the last token of each chunk whose update is due; pieces of one token.
        fresh: pieces of sequences from their first token on.
        later: pieces of other sequences.
        last: of those pieces the last tokens, one of each that ends with a chunk.
        reads: pieces that bring no chunk to an end before their last token, by their length.
    """

    due: PackedPart | None
    fresh: PackedPart | None
    later: PackedPart | None
    last: PackedPart | None
    reads: tuple[tuple[int, PackedPart], ...]

    @staticmethod
    def of(layout: StateLayout, bounds: Sequence[int], seen: Sequence[int], device: torch.device) -> StepPlan:
        """Plan a step.

        Args:
            layout: of the states.
            bounds: where each sequence's piece starts among the step's tokens, and their number.
            seen: how many tokens each sequence has had before.
            device: where the step runs.
        """
        chunk = layout.places or 1
        due, fresh, later, last = list[Piece](), list[Piece](), list[Piece](), list[Piece]()
        reads: dict[int, list[Piece]] = defaultdict(list)
        for row, position in enumerate(seen):
            first, length = bounds[row], bounds[row + 1] - bounds[row]
            if not length:
                continue
            if layout.deferred:
                if position and position % chunk == 0:
                    due.append((row, first, position - 1, 1))
                if position and position % chunk + length <= chunk:
                    reads[length].append((row, first, position, length))
                    continue
                if (position + length) % chunk == 0:
                    length -= 1
                    last.append((row, first + length, position + length, 1))
            (later if position else fresh).append((row, first, position, length))

        def part(pieces: Sequence[Piece]) -> PackedPart | None:
            return PackedPart.of(pieces, chunk, device)

        grouped = ((length, part(pieces)) for length, pieces in sorted(reads.items()))
        return StepPlan(part(due), part(fresh), part(later), part(last), tuple((n, x) for n, x in grouped if x is not None))


@dataclass(frozen=True)
class Pieces:
    """Where the pieces of all of a step's sequences start and end, for what reads the tokens before them.

    Attributes:
        bounds: where each sequence's piece starts among the step's tokens, and their number, int64 `[n + 1]`.
        rows: of each token its sequence, int64 `[T]`.
        begun: sequences whose first tokens these are, bool `[n]`; None where slots hold zeros for them.
    """

    bounds: Tensor
    rows: Tensor
    begun: Tensor | None

    @staticmethod
    def of(bounds: Sequence[int], seen: Sequence[int], device: torch.device) -> Pieces:
        """From numbers, as `StepPlan.of` takes them."""
        numbers = bounds, [row for row, (a, b) in enumerate(pairwise(bounds)) for _ in range(a, b)], [not x for x in seen]
        edges, rows, begun = (torch.tensor(x).to(device, non_blocking=True) for x in numbers)
        return Pieces(edges, rows, begun)


@dataclass(frozen=True)
class PieceTails:
    """What stands before the pieces of a step, of which slots keep the last tokens, as `Tails` of a layer.

    Attributes:
        pieces: the pieces.
        slots: each sequence's slot, int64 `[n]`.
        pool: the slots.
    """

    pieces: Pieces
    slots: Tensor
    pool: Pool

    def behind(self, name: str, x: Tensor, count: int) -> Tensor:
        """Each piece of `x` `[1, T, C]` behind the `count` tokens before it: `[1, T + n count, C]`. Its last are kept."""
        pieces, n, steps = self.pieces, len(self.slots), torch.arange(count, device=x.device)
        held = self.pool.tail(name, self.slots).to(x.dtype)
        if pieces.begun is not None:
            # what an earlier sequence left there may be no number
            held = held.masked_fill(pieces.begun[:, None, None], 0)
        seen = x.new_empty(1, x.shape[1] + n * count, x.shape[2])
        before = torch.arange(n, device=x.device)[:, None] * count + steps
        seen[0, pieces.bounds[:-1, None] + before] = held
        seen[:, self._own(x.shape[1], count) + count] = x
        self.pool.put_tail(name, self.slots, seen[0, pieces.bounds[1:, None] + before])
        return seen

    def own(self, y: Tensor, count: int) -> Tensor:
        """Of what was computed at each token of `behind` but the first `count`, that of the step's own: `[1, T, C]`."""
        return y[:, self._own(len(self.pieces.rows), count)]

    def _own(self, length: int, count: int) -> Tensor:
        return torch.arange(length, device=self.slots.device) + self.pieces.rows * count


@dataclass(frozen=True)
class ServedStep:
    """A plan, and where the step's states and pages are.

    Attributes:
        plan: the plan.
        slots: each sequence's slot, int64 `[n]`.
        pages: pending keys and values; None where no pages hold any.
    """

    plan: StepPlan
    slots: Tensor
    pages: Pages | None


def advance(step: ServedStep, pool: Pool, q: Tensor, tokens: Tokens, form: Form = "auto") -> Tensor:
    """Outputs of a step's tokens `[1, T, H, Dv]`; states and pages are left where the step stops.

    Args:
        step: the step.
        pool: the states.
        q: queries `[1, T, H, Dk]`.
        tokens: writers `[1, T, H, ...]`, or as many more rows as a token has writes.
        form: as `kvbind.ttt` takes it.
    """
    plan, pages, spec = step.plan, step.pages, pool.layout.spec
    if pages is not None:
        pages.put(tokens.k[0], tokens.v[0])
    if plan.due is not None:
        settle(plan.due, step.slots, pages, pool)
    output = q.new_empty(*q.shape[:3], tokens.v.shape[3])
    for part in (plan.fresh, plan.later):
        if part is None:
            continue
        slots, state = step.slots[part.rows], None
        if part is plan.later:
            state = pool.load(slots, pages, part.rows, part.starts, part.pending)
        weights = pool.start if state is None else None
        found, after = packed(spec, weights, q[:, part.tokens], part.of_all(tokens, q.shape[1]), part.bounds, state, form)
        pool.save(after, slots)
        output[:, part.tokens] = found
    # pieces of one token are of answers, which may be read in bfloat16; the rest is of prompts
    every = [(length, part, length == 1) for length, part in plan.reads]
    for length, part, alone in (*every, (1, plan.last, False)):
        if part is None:
            continue
        slots, own = step.slots[part.rows], part.of_all(tokens, q.shape[1])
        output[:, part.tokens] = _read(pool, slots, part.places, length, q[:, part.tokens], own, alone)
    return output


def _read(pool: Pool, slots: Tensor, places: Tensor, length: int, q: Tensor, tokens: Tokens, alone: bool) -> Tensor:
    """Outputs `[1, n * length, H, Dv]` of pieces of one length that bring no chunk to an end before their last token."""
    queries, keys = (x[0].unflatten(0, (-1, length)) for x in (q, tokens.k))
    if pool.rounds and alone:
        found = read_rounded(pool.layout.spec, pool.rounded(slots), queries, keys)
    else:
        found = read(pool.layout.spec, pool.weights(slots), queries, keys)
    pool.put(tokens.map(lambda x: x.transpose(1, 2)), slots.repeat_interleave(length), places)
    return found.flatten(0, 1)[None]


@dataclass(frozen=True)
class Decoding:
    """A step that brings one token to each of its sequences, by tensors alone, so that a device can replay it.

    Attributes:
        slots: each sequence's slot, int64 `[n]`.
        places: of each token its place in its chunk, int64 `[n]`.
    """

    slots: Tensor
    places: Tensor

    @staticmethod
    def is_for(layout: StateLayout) -> bool:
        """Whether one token is done alike wherever in its chunk it is."""
        return layout.deferred or not layout.places

    def advance(self, pages: Pages | None, pool: Pool, q: Tensor, tokens: Tokens, form: Form = "auto") -> Tensor:
        """As `advance`, behind `prepare`."""
        if pages is not None:
            pages.put(tokens.k[0], tokens.v[0])
        if pool.layout.deferred:
            return _read(pool, self.slots, self.places, 1, q, tokens, alone=True)
        rows = torch.zeros_like(self.slots)
        state = pool.load(self.slots, None, rows, rows, (0,) * len(rows))
        each = tokens.map(lambda x: x[0].unflatten(0, (len(rows), -1)))
        found, after = call(pool.layout.spec, None, q.transpose(0, 1), each, state=state, form=form)
        pool.save(after, self.slots)
        return found.transpose(0, 1)


@dataclass(frozen=True)
class Preparation:
    """What a `Decoding` step takes for granted: chunks are brought to an end, and sequences have a state.

    Attributes:
        due: as in `StepPlan`.
        begun: sequences whose first token this is, int64 `[n]`.
    """

    due: PackedPart | None
    begun: Tensor | None

    @staticmethod
    def of(layout: StateLayout, seen: Sequence[int], device: torch.device) -> Preparation:
        """What sequences that have had so many tokens need."""
        chunk = layout.places or 1
        ends = [(row, row, x - 1, 1) for row, x in enumerate(seen) if layout.deferred and x and x % chunk == 0]
        begun = [row for row, x in enumerate(seen) if not x]
        return Preparation(
            PackedPart.of(ends, chunk, device), torch.tensor(begun).to(device, non_blocking=True) if begun else None
        )

    def run(self, slots: Tensor, pages: Pages | None, pool: Pool) -> None:
        """Do it; arguments as `ServedStep` has them."""
        if self.due is not None:
            settle(self.due, slots, pages, pool)
        if self.begun is not None:
            pool.begin(slots[self.begun])


def settle(part: PackedPart, slots: Tensor, pages: Pages | None, pool: Pool) -> None:
    """Bring to an end the chunks whose update is due."""
    own, chunk = slots[part.rows], pool.layout.places
    # kernels take operands in one piece
    state = pool.load(own, pages, part.rows, part.starts, (chunk,) * len(own), chunk).map(torch.Tensor.contiguous)
    after = completed(pool.layout.spec, state.fast, Tokens.of(state.group("pending.")))
    pool.save(State.of(pool.layout.spec, after, None, 0), own)


def packed(
    spec: InnerLoop,
    weights: Mapping[str, Tensor] | None,
    q: Tensor,
    tokens: Tokens,
    bounds: tuple[int, ...],
    state: State | None,
    form: Form,
) -> tuple[Tensor, State]:
    """`kvbind.ttt` on sequences packed into one row, from starting weights or from states."""
    return call(spec, weights, q, tokens, cu_seqlens=bounds, state=state, form=form)


def call(
    spec: InnerLoop, weights: Mapping[str, Tensor] | None, q: Tensor, tokens: Tokens, **further: Any
) -> tuple[Tensor, State]:
    """`kvbind.ttt` with what tokens write, heads behind the token axis."""
    rates: Any = tokens.rates
    gates: dict[str, Any] = dict(tokens.gates)
    return ttt(spec, weights, q, tokens.k, tokens.v, lr=rates, **gates, **further)
