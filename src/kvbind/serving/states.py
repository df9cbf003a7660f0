"""Where the states of many sequences lie between the steps of a serving engine: rows of numbers, and pages of tokens.

An engine keeps a pool of fixed-size slots, one per sequence, and pages of tokens that sequences are given as they grow. Of a
`kvbind.State` the slot holds fast weights, momentum, norms, and the rates and gates of pending tokens; the pages hold the
keys and values of pending tokens, which are as large as those of attention. Nothing here needs an engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from kvbind.forms.state import State
from kvbind.forms.tokens import Tokens
from kvbind.inner.rule import FastWeights
from kvbind.inner.spec import InnerLoop
from kvbind.layers.lact import LactLayer

PAGED = ("k", "v")
"""What pages hold of a pending token."""


@dataclass(frozen=True)
class StateLayout:
    """How a slot's numbers are divided.

    Attributes:
        spec: the inner loop.
        heads: fast heads.
        widths: channels per head of keys and of values.
        fixed: shapes, heads first, of what a state holds whatever its length, by the name that `kvbind.State` gives it.
            Matrices that are not updated are not among them.
        waiting: shapes, heads first, of what a slot holds of one pending token.
        places: how many pending tokens have a place; 0 where none ever wait.
    """

    spec: InnerLoop
    heads: int
    widths: tuple[int, int]
    fixed: Mapping[str, tuple[int, ...]]
    waiting: Mapping[str, tuple[int, ...]]
    places: int

    @staticmethod
    def of(layer: LactLayer, ranks: int = 1) -> StateLayout:
        """The layout of a layer's states on one of `ranks` ranks that share its heads.

        Args:
            layer: a layer without sizes of its own on ranks, on the meta device.
            ranks: must divide the fast heads.

        Raises:
            ValueError: an inner loop whose states do not have this form.
        """
        inner, heads = layer.inner, layer.num_lact_heads // ranks
        chunk = inner.chunk or 1
        for length in dict.fromkeys((chunk, chunk + 1, 1)):
            state = _state_after(layer, length)
            if state.pending_lengths != (length % chunk,):
                raise ValueError(
                    f"inner must leave as many tokens pending as its chunk of {chunk} lacks; {inner!r} leaves "
                    f"{state.pending_lengths[0]} of {length}"
                )
        shapes = {name: (heads, *x.shape[2:]) for name, x in state.tensors.items() if x.shape[1] == layer.num_lact_heads}
        if len(shapes) < len(state.tensors):
            raise ValueError(f"inner must have states that divide over heads; {inner!r} has other ones")
        pending = {
            name.removeprefix("pending."): (heads, *shape[2:])
            for name, shape in shapes.items()
            if name.startswith("pending.")
        }
        still = {f"weights.{name}" for name in inner.network.matrices if name not in inner.updated}
        fixed = {name: shape for name, shape in shapes.items() if not name.startswith("pending.") and name not in still}
        # weights first, so that they are read without the rest
        order = sorted(fixed, key=lambda name: not name.startswith("weights."))
        return StateLayout(
            inner,
            heads,
            (layer.fast_width, layer.fast_width),
            {name: fixed[name] for name in order},
            {name: shape for name, shape in pending.items() if name not in PAGED},
            chunk if pending else 0,
        )

    @property
    def deferred(self) -> bool:
        """Whether a chunk's update is left to the step after it.

        Where tokens read what earlier chunks wrote alone, a step that brings no chunk to an end beyond its last token
        changes no fast weights, and is a read.
        """
        return self.places > 0 and self.spec.visibility == "past"

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
        found, start = {}, 0
        for name, shape in shapes.items():
            found[name] = slice(start, start + prod(shape)), shape
            start += prod(shape)
        return found

    @property
    def size(self) -> int:
        """Numbers in a slot, float32."""
        return max(columns.stop for columns, _ in self.columns.values())

    @property
    def pending_bytes(self) -> int:
        """Bytes of one pending token's keys and values per byte of a number."""
        return self.heads * sum(self.widths)


def _state_after(layer: LactLayer, length: int) -> State:
    """The state that a layer leaves after some tokens; on the meta device, where nothing is computed."""
    with torch.no_grad():
        _, state = layer(layer.qk_scale.new_empty(1, length, layer.hidden_size), return_state=True)
    assert state is not None
    return state.fast


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


class Slots:
    """States in a pool.

    Args:
        layout: how a slot is divided.
        pool: float32 `[slots, layout.size]` (float64 in tests).
        still: the matrices that are not updated, `[H, in, out]` by name.
    """

    def __init__(self, layout: StateLayout, pool: Tensor, still: Mapping[str, Tensor]) -> None:
        self.layout, self.pool = layout, pool
        self.still = {name: x.to(pool.dtype) for name, x in still.items()}

    def weights(self, slots: Tensor) -> dict[str, Tensor]:
        """The fast weights of some slots, `[n, H, in, out]`; those that are not updated `[1, H, in, out]`."""
        columns = {name: place for name, place in self.layout.columns.items() if name.startswith("weights.")}
        rows = self.pool[:, : max(where.stop for where, _ in columns.values())][slots]
        held = {name.removeprefix("weights."): _cut(rows, *place) for name, place in columns.items()}
        return held | {name: x[None] for name, x in self.still.items()}

    def load(self, slots: Tensor, pages: Pages | None, rows: Tensor, starts: Tensor, lengths: Sequence[int]) -> State:
        """The states in some slots.

        Args:
            slots: which, `[n]`.
            pages: where their sequences' pending tokens lie; None where none ever wait.
            rows: which sequences of the step they are, `[n]`.
            starts: at which token of its sequence each one's pending tokens start, `[n]`.
            lengths: how many tokens each has pending, fewer than a chunk.
        """
        layout = self.layout
        rows_of_pool = self.pool[slots]
        tensors = {name: _cut(rows_of_pool, *place) for name, place in layout.columns.items()}
        tensors |= {f"weights.{name}": x.expand(len(lengths), *x.shape) for name, x in self.still.items()}
        if pages is not None and layout.places:
            room = layout.places - 1
            tensors |= {name: x[:, :, :room] for name, x in tensors.items() if name.startswith("pending.")}
            cells = pages.get(rows, starts, torch.tensor(lengths, device=slots.device), room).transpose(1, 2)
            k, v = cells.split(layout.widths, dim=-1)
            tensors |= {"pending.k": k, "pending.v": v}
        return State(layout.spec, tensors, tuple(lengths))

    def begin(self, weights: Mapping[str, Tensor], slots: Tensor) -> None:
        """Have some slots hold the state before a sequence's first token."""
        spec = self.layout.spec
        each = {name: x.to(self.pool.dtype).expand(len(slots), *x.shape) for name, x in weights.items()}
        self.save(State.of(spec, FastWeights.start(spec, each), None, 0), slots)

    def save(self, state: State, slots: Tensor) -> None:
        """Keep states; keys and values of their pending tokens are kept by the pages."""
        parts = []
        for name, (_, shape) in self.layout.columns.items():
            x = state.tensors.get(name)
            if name.startswith("pending."):
                full = self.pool.new_zeros(state.batch, *shape)
                if x is not None:
                    full[:, :, : x.shape[2]] = x
                x = full
            assert x is not None
            parts.append(x.reshape(state.batch, -1).to(self.pool.dtype))
        self.pool[slots] = torch.cat(parts, dim=1)

    def put(self, tokens: Tokens, slots: Tensor, places: Tensor) -> None:
        """Keep rates and gates of pending tokens `[1, H, T]`, each in its slot `[T]` and at its place in the chunk `[T]`."""
        made = tokens.spread().tensors()
        for name, (where, shape) in self.layout.columns.items():
            if name.startswith("pending."):
                held = self.pool[:, where].unflatten(1, shape).transpose(1, 2)
                held[slots, places] = made[name.removeprefix("pending.")][0].transpose(0, 1).to(held.dtype)

    def token(self, slots: Tensor, pages: Pages, rows: Tensor, at: Tensor, place: int) -> Tokens:
        """One pending token of each of some sequences, `[n, H, 1]`.

        Args:
            slots: their slots, `[n]`.
            pages: where keys and values lie.
            rows: which sequences of the step they are, `[n]`.
            at: which token of its sequence each one is, `[n]`.
            place: where in its chunk.
        """
        k, v = pages.get(rows, at, torch.ones_like(at), 1).transpose(1, 2).split(self.layout.widths, dim=-1)
        found = {"k": k, "v": v}
        for name, (where, shape) in self.layout.columns.items():
            if name.startswith("pending."):
                held = self.pool[:, where].unflatten(1, shape)
                found[name.removeprefix("pending.")] = held[slots][:, :, place : place + 1]
        return Tokens.of(found)


def _cut(rows: Tensor, where: slice, shape: tuple[int, ...]) -> Tensor:
    return rows[:, where].unflatten(1, shape)
