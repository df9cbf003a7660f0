"""Where the states of many sequences lie between the steps of a serving engine: rows of numbers, and pages of tokens.

An engine keeps a pool of fixed-size slots, one per sequence, and pages of tokens that sequences are given as they grow. Of a
`kvbind.State` the slot holds fast weights, momentum, norms, and the rates and gates of pending tokens. Keys and values of
pending tokens are as large as attention's, and lie in pages beside those; in layers without attention, in whose engine a
page is as large as a slot, they lie in the slot, as does what convolutions read of the last tokens. Nothing here needs an
engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from kvbind.forms.halves import join, split
from kvbind.forms.state import State
from kvbind.forms.tokens import Tokens
from kvbind.inner.rule import FastWeights
from kvbind.inner.spec import InnerLoop
from kvbind.layers.fast_weights.layer import FastWeightLayer
from kvbind.layers.fast_weights.state import FastWeightState
from kvbind.layers.lact.layer import LactLayer

PAGED = ("k", "v")
"""What pages hold of a pending token."""

OF_TOKENS = ("pending.", "window.")
"""What states have that may be shorter in some of them."""


@dataclass(frozen=True)
class StateLayout:
    """How a slot's numbers are divided.

    Attributes:
        spec: the inner loop.
        heads: fast heads.
        widths: channels per head of keys and of values.
        fixed: shapes, heads first, of what a state holds whatever its length, by the name that `kvbind.State` gives it.
            Weights that are not updated are not among them.
        waiting: shapes, heads first, of what a slot holds of one pending token.
        places: tokens from one place where a state can stop to the next, each of which has a place; 0 where none ever wait.
        tails: shapes of what a slot holds of the last tokens for convolutions, by name: tokens and channels.
        paged: keys and values of pending tokens lie in pages.
    """

    spec: InnerLoop
    heads: int
    widths: tuple[int, int]
    fixed: Mapping[str, tuple[int, ...]]
    waiting: Mapping[str, tuple[int, ...]]
    places: int
    tails: Mapping[str, tuple[int, int]]
    paged: bool

    @staticmethod
    def of(layer: LactLayer | FastWeightLayer, ranks: int = 1) -> StateLayout:
        """The layout of a layer's states on one of `ranks` ranks that share its heads.

        Args:
            layer: a layer without sizes of its own on ranks, on the meta device.
            ranks: must divide the fast heads.

        Raises:
            ValueError: an inner loop whose states do not have this form.
        """
        inner, paged = layer.inner, isinstance(layer, LactLayer)
        if isinstance(layer, LactLayer):
            every, widths = layer.num_lact_heads, (layer.fast_width, layer.fast_width)
        else:
            every, widths = layer.heads, (layer.key_width, layer.value_width)
        heads = every // ranks
        if inner.refresh == "call":
            raise ValueError(
                "inner's refresh must not be 'call' where an engine decides what a call is; give a number of tokens"
            )
        if inner.anchor is not None and inner.anchor.peak == "batch":
            raise ValueError("inner's anchor must have its peak per sequence where batches change; got peak='batch'")
        span = inner.room + 1
        for length in dict.fromkeys((span, span + 1, 1)):
            state, tails = _state_after(layer, length)
            if state.pending_lengths != (length % span,):
                raise ValueError(
                    f"inner must leave as many tokens pending as a span of {span} has of them; {inner!r} leaves "
                    f"{state.pending_lengths[0]} of {length}"
                )
        shapes = {name: (heads, *x.shape[2:]) for name, x in state.tensors.items() if x.shape[1] == every}
        if len(shapes) < len(state.tensors):
            raise ValueError(f"inner must have states that divide over heads; {inner!r} has other ones")
        pending = {
            name.removeprefix("pending."): (heads, *shape[2:])
            for name, shape in shapes.items()
            if name.startswith("pending.")
        }
        updated = {f"weights.{name}" for name in inner.updated}
        fixed = [name for name in shapes if name in updated or not name.startswith(("pending.", "weights."))]
        # weights first, so that they are read without the rest
        fixed.sort(key=lambda name: not name.startswith("weights."))
        return StateLayout(
            inner,
            heads,
            widths,
            {name: shapes[name] for name in fixed},
            {name: shape for name, shape in pending.items() if name not in PAGED or not paged},
            span if pending else 0,
            {name: _tail_on_rank(layer, name, x, ranks) for name, x in tails.items()},
            paged,
        )

    @property
    def deferred(self) -> bool:
        """Whether a chunk's update is left to the step after it.

        Where tokens read what earlier chunks wrote alone, a step that brings no chunk to an end beyond its last token
        changes no fast weights, and is a read.
        """
        return self.places > 0 and self.spec.visibility == "past" and "refresh" not in self.spec.extensions

    @property
    def reach(self) -> int:
        """How many tokens back pages are read."""
        return self.places - (not self.deferred)

    @cached_property
    def columns(self) -> dict[str, tuple[slice, tuple[int, ...]]]:
        """By name, where in a slot numbers lie, and their shape there; pending ones `[H, places, ...]`."""
        shapes = dict(self.fixed)
        for name, shape in self.waiting.items():
            shapes[f"pending.{name}"] = (shape[0], self.places, *shape[1:])
        return _placed(shapes, 0)

    @cached_property
    def tail_columns(self) -> dict[str, tuple[slice, tuple[int, ...]]]:
        """The same of tails, behind those."""
        return _placed(self.tails, self.behind)

    @property
    def behind(self) -> int:
        """Where in a slot tails start."""
        return max(where.stop for where, _ in self.columns.values())

    @property
    def size(self) -> int:
        """Numbers in a slot, float32."""
        return max([self.behind, *(where.stop for where, _ in self.tail_columns.values())])


def _placed(shapes: Mapping[str, tuple[int, ...]], start: int) -> dict[str, tuple[slice, tuple[int, ...]]]:
    """Numbers side by side from `start` on."""
    found = {}
    for name, shape in shapes.items():
        found[name] = slice(start, start + prod(shape)), shape
        start += prod(shape)
    return found


def _state_after(layer: LactLayer | FastWeightLayer, length: int) -> tuple[State, Mapping[str, Tensor]]:
    """The state and tails that a layer leaves after some tokens; on the meta device, where nothing is computed."""
    with torch.no_grad():
        _, state = layer(torch.empty(1, length, layer.hidden_size, device="meta"), return_state=True)
    assert state is not None
    return state.fast, state.tails if isinstance(state, FastWeightState) else {}


def _tail_on_rank(layer: LactLayer | FastWeightLayer, name: str, tail: Tensor, ranks: int) -> tuple[int, int]:
    """Tokens and channels: of inputs all, of queries, keys and values those of the rank's heads."""
    assert isinstance(layer, FastWeightLayer)
    if name != "conv":
        return tail.shape[1], tail.shape[2]
    p = layer.projections
    whole = ("q", "k") if p.shared_keys else ()
    return tail.shape[1], sum(layer.widths[x] // (1 if x in whole else ranks) for x in p.conv_on)


@dataclass(frozen=True)
class Pages:
    """Keys and values of tokens, by place.

    Attributes:
        cells: `[pages, H, tokens per page, Dk + Dv]`.
        tables: the pages of each sequence, `[sequences, n]`.
        slots: of each token of a step its place, `page * tokens per page + offset`, `[T]`.
    """

    cells: Tensor
    tables: Tensor
    slots: Tensor

    def put(self, k: Tensor, v: Tensor) -> None:
        """Keep the keys and values `[T, H, D]` of a step's tokens."""
        size = self.cells.shape[2]
        # tokens that pad a step go to page 0, which no sequence has
        places = self.slots[: k.shape[0]].long().clamp(min=0)
        self.cells.transpose(1, 2)[places // size, places % size] = torch.cat((k, v), dim=-1).to(self.cells.dtype)

    def get(self, rows: Tensor, starts: Tensor, lengths: Tensor, most: int) -> Tensor:
        """Keys and values of some sequences' tokens from `starts` on, `[n, most, H, Dk + Dv]`, zeros behind `lengths`."""
        size = self.cells.shape[2]
        steps = torch.arange(most, device=self.cells.device)
        inside = steps < lengths[:, None]
        places = torch.where(inside, starts[:, None] + steps, 0)
        pages = self.tables[rows[:, None], places // size].long()
        found = self.cells.transpose(1, 2)[pages, places % size]
        return found.masked_fill(~inside[..., None, None], 0)


class Pool:
    """The states of all sequences, each in its slot.

    Args:
        layout: how a slot is divided.
        rows: float32 `[slots, layout.size]` (float64 in tests).
        start: the fast weights that sequences start from, by name as `kvbind.ttt` takes them.
        dtype: of keys and values; by default that of the rows.
        rounded_start: the same rounded to bfloat16, where single tokens read that of float32 fast weights: a slot then
            begins with them rounded, and has what rounding leaves of them behind.
    """

    def __init__(
        self,
        layout: StateLayout,
        rows: Tensor,
        start: Mapping[str, Tensor],
        dtype: torch.dtype | None = None,
        rounded_start: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.layout, self.rows, self.start, self.dtype = layout, rows, start, dtype or rows.dtype
        self.rounds = rounded_start is not None
        self.each = {name: x.to(rows.dtype) for name, x in self._as_held(start).items()}
        updated = layout.spec.updated
        self.still = {name: x for name, x in self.each.items() if name not in updated}
        self.still_rounded = {name: x for name, x in self._as_held(rounded_start or {}).items() if name not in updated}

    def _as_held(self, start: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Starting weights as states hold them, `[1, H, in, out]`."""
        vectors = self.layout.spec.network.vectors
        return {name: (x[:, None] if name in vectors else x)[None] for name, x in start.items()}

    def weights(self, slots: Tensor) -> dict[str, Tensor]:
        """The fast weights of some slots, `[n, H, in, out]`; those that are not updated `[1, H, in, out]`."""
        return self._weights(self.whole(self.rows[:, : self._end_of_weights][slots])) | self.still

    def rounded(self, slots: Tensor) -> dict[str, Tensor]:
        """The same in bfloat16, where slots begin with that."""
        halves = self.rows.view(torch.bfloat16)
        return self._weights(halves[:, : self._end_of_weights][slots]) | self.still_rounded

    def _weights(self, rows: Tensor) -> dict[str, Tensor]:
        columns = {name: place for name, place in self.layout.columns.items() if name.startswith("weights.")}
        return {name.removeprefix("weights."): _cut(rows, *place) for name, place in columns.items()}

    @property
    def _end_of_weights(self) -> int:
        """How many numbers at a slot's start are fast weights."""
        return max(where.stop for name, (where, _) in self.layout.columns.items() if name.startswith("weights."))

    def whole(self, rows: Tensor) -> Tensor:
        """Slots `[n, ...]`, or the fast weights at their start, with each number in one piece."""
        if not self.rounds:
            return rows
        end = self._end_of_weights
        upper, lower = rows[:, :end].contiguous().view(torch.int16).split(end, dim=1)
        return torch.cat((join(upper.view(torch.bfloat16), lower), rows[:, end:]), dim=1)

    def _halved(self, rows: Tensor) -> Tensor:
        """The same as slots have them."""
        if not self.rounds:
            return rows
        upper, lower = split(rows[:, : self._end_of_weights])
        halves = torch.cat((upper.view(torch.int16), lower), dim=1).view(rows.dtype)
        return torch.cat((halves, rows[:, self._end_of_weights :]), dim=1)

    def load(
        self,
        slots: Tensor,
        pages: Pages | None,
        rows: Tensor,
        starts: Tensor,
        lengths: Sequence[int],
        room: int | None = None,
    ) -> State:
        """The states in some slots.

        Args:
            slots: which, `[n]`.
            pages: where keys and values of their sequences' pending tokens lie; None where no pages hold any.
            rows: which sequences of the step they are, `[n]`.
            starts: at which token of its sequence each one's pending tokens start, `[n]`.
            lengths: how many tokens each has pending.
            room: how many may be; by default one less than there are places, as states of `kvbind.ttt` have it.
        """
        layout = self.layout
        found = self.whole(self.rows[slots])
        tensors = {name: _cut(found, *place) for name, place in layout.columns.items()}
        tensors |= {f"weights.{name}": x.expand(len(lengths), *x.shape[1:]) for name, x in self.still.items()}
        if not layout.places:
            return State(layout.spec, tensors, tuple(lengths))
        room = layout.places - 1 if room is None else room
        tensors |= {name: x[:, :, :room] for name, x in tensors.items() if name.startswith("pending.")}
        if pages is None:
            tensors |= {name: tensors[name].to(self.dtype) for name in ("pending.k", "pending.v")}
        else:
            cells = pages.get(rows, starts, torch.tensor(lengths, device=slots.device), room).transpose(1, 2)
            k, v = cells.split(layout.widths, dim=-1)
            tensors |= {"pending.k": k, "pending.v": v}
        return State(layout.spec, tensors, tuple(lengths))

    def begin(self, slots: Tensor) -> None:
        """Have some slots hold the state before a sequence's first token."""
        spec = self.layout.spec
        each = {name: x.expand(len(slots), *x.shape[1:]) for name, x in self.each.items()}
        self.save(State.of(spec, FastWeights.start(spec, each), None, 0), slots)
        self.rows[:, self.layout.behind :][slots] = 0

    def save(self, state: State, slots: Tensor) -> None:
        """Keep states; what pages hold of their pending tokens is kept there, and tails are kept by themselves."""
        parts = []
        for name, (_, shape) in self.layout.columns.items():
            x = state.tensors.get(name)
            if x is None or x.shape[1:] != shape:
                # places that a state has not, or has no tokens for
                assert name.startswith(OF_TOKENS)
                full = self.rows.new_zeros(state.batch, *shape)
                if x is not None:
                    full[:, :, : x.shape[2]] = x
                x = full
            parts.append(x.reshape(state.batch, -1).to(self.rows.dtype))
        self.rows[:, : self.layout.behind][slots] = self._halved(torch.cat(parts, dim=1))

    def put(self, tokens: Tokens, slots: Tensor, places: Tensor) -> None:
        """Keep what slots hold of pending tokens `[1, H, T, ...]`, each in its slot `[T]` and at its place in the chunk."""
        made = tokens.spread().tensors()
        for name, (where, shape) in self.layout.columns.items():
            if name.startswith("pending."):
                held = self.rows[:, where].unflatten(1, shape).transpose(1, 2)
                held[slots, places] = made[name.removeprefix("pending.")][0].transpose(0, 1).to(held.dtype)

    def tail(self, name: str, slots: Tensor) -> Tensor:
        """What convolutions read of the last tokens in some slots, `[n, tokens, channels]`."""
        return _cut(self.rows[slots], *self.layout.tail_columns[name])

    def put_tail(self, name: str, slots: Tensor, tail: Tensor) -> None:
        """Keep what convolutions read of the last tokens, as `tail` gives it."""
        self.rows[:, self.layout.tail_columns[name][0]][slots] = tail.flatten(1).to(self.rows.dtype)


def _cut(rows: Tensor, where: slice, shape: tuple[int, ...]) -> Tensor:
    return rows[:, where].unflatten(1, shape)
