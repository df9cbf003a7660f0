"""Where sequences stopped in a layer, in tensors that stay where they are: what a captured decoding step reads and writes.

`LactState` is a value: a call makes the next one and leaves the last as it was. A CUDA graph knows addresses alone, so that
here each row has its place, and a token changes what lies there:

- keys and values of the window lie in a ring: that of the token at position p at p modulo the window, over the one that has
  just left it. Nothing moves when a token comes.
- a chunk's tokens lie at their place in the chunk, as many as it has: also the last, which `LactState` never holds.
- values of a chunk that the ring has are nowhere else: they are made of those in the ring when the chunk ends.
- where a row stands is a number on the device (`DecodeStep`); no shape, and nothing the host decides, depends on it. A
  chunk's update is work of its own (`Slots.complete`), for rows that the host, which can count, knows to be due.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvbind.forms.halves import join, split
from kvbind.forms.pending import PendingState, alike, changed, completed, of_all_rows, read, read_rounded
from kvbind.forms.state import State
from kvbind.forms.tokens import Tokens
from kvbind.inner.spec import InnerLoop
from kvbind.kernels.common.devices import runs_on
from kvbind.kernels.common.tracing import is_eager
from kvbind.layers.attention.softmax import softmax_attention
from kvbind.layers.attention.window_cache import WindowCache
from kvbind.layers.lact.token_writer import ValueWriter


@dataclass(frozen=True)
class DecodeStep:
    """Where the token that each row is about to have goes; made on the device, once for all layers.

    Attributes:
        positions: how many tokens each row has had, int64 `[B, 1]`.
        slot: its place in the ring, int64 `[B, 1]`.
        place: its place in the chunk, int64 `[B, 1]`.
        first: where the earliest key that it sees lies, int32 `[B]`.
        count: how many keys it sees, its own among them, int32 `[B]`.
    """

    positions: Tensor
    slot: Tensor
    place: Tensor
    first: Tensor
    count: Tensor

    @staticmethod
    def of(seen: Tensor, window: int, chunk: int) -> DecodeStep:
        """The places of tokens behind `seen` others, int64 `[B]`."""
        positions = seen[:, None]
        count = (seen + 1).clamp(max=window)
        first = (seen + 1 - count).remainder(window)
        return DecodeStep(positions, positions.remainder(window), positions.remainder(chunk), first.int(), count.int())


class Slots:
    """The rows of one layer.

    Args:
        spec: the inner loop.
        window: how many tokens a token sees, itself among them.
        fast: by dotted name, tensors like those of a `State` that are no pending tokens; `[B, ...]`.
        cache: keys and values like those of the rows, `[B, S, H, D]`.
        tokens: tokens like those that write, `[B, H, T, ...]`.
        values: makes a chunk's values of those in the ring; None where that does not have them all.
        rounds: tokens read float32 fast weights rounded to bfloat16, which lie beside what rounding leaves of them.
    """

    def __init__(
        self,
        spec: InnerLoop,
        window: int,
        fast: Mapping[str, Tensor],
        cache: WindowCache,
        tokens: Tokens,
        values: ValueWriter | None,
        rounds: bool = False,
    ) -> None:
        assert spec.chunk is not None
        self.spec, self.window, self.chunk, self.value_writer = spec, window, spec.chunk, values
        batch, _, heads, width = cache.keys.shape
        self.keys = cache.keys.new_zeros(batch, heads, window, width)
        self.values = torch.zeros_like(self.keys)
        self.rounds = rounds and fast["weights.out"].dtype == torch.float32
        self.alike = {f"weights.{name}" for name in alike(spec)} if self.rounds else set()
        self.fast, self.rest = dict[str, Tensor](), dict[str, Tensor]()
        for name, x in fast.items():
            halves = self.rounds and name.startswith("weights.")
            shape = x[:1].shape if name in self.alike else x.shape
            self.fast[name] = torch.empty(shape, dtype=torch.bfloat16 if halves else x.dtype, device=x.device)
            if halves:
                self.rest[name] = torch.empty(shape, dtype=torch.int16, device=x.device)
        self.pending = {
            name: x.new_zeros(batch, x.shape[1], spec.chunk, *x.shape[3:])
            for name, x in tokens.spread().tensors().items()
            if name != "v" or values is None
        }
        self.weights = {name.removeprefix("weights."): x for name, x in self.fast.items() if name.startswith("weights.")}

    def load(self, state: State, cache: WindowCache, seen: Sequence[int]) -> None:
        """Put rows here.

        Args:
            state: their fast weights and pending tokens.
            cache: the last keys and values that they had.
            seen: how many tokens each has had.
        """
        for name in self.fast:
            x = state.tensors[name]
            if name in self.alike:
                if not of_all_rows(x):
                    raise ValueError(f"a state's {name!r} must be the same for all rows, as nothing updates it")
                x = x[:1]
            self._keep(name, x, None)
        for name, x in self.pending.items():
            if state.has_room:
                x[:, :, : self.chunk - 1].copy_(state.tensors[f"pending.{name}"])
        room = cache.keys.shape[1]
        if room:
            after, places = torch.tensor(seen, device=self.keys.device)[:, None], self._places()
            age = (after - 1 - places).remainder(self.window)
            there = (age < room) & (age < after)
            where = (room - 1 - age).clamp(min=0)[:, None, :, None]
            for ring, x in ((self.keys, cache.keys), (self.values, cache.values)):
                found = x.transpose(1, 2).take_along_dim(where, dim=2)
                ring.copy_(found.masked_fill_(~there[:, None, :, None], 0))

    def state(self, seen: Sequence[int]) -> tuple[PendingState, WindowCache]:
        """What rows that have had `seen` tokens left, in tensors of their own."""
        lengths = tuple(n % self.chunk for n in seen)
        tensors = {name: self._whole(name, None) if name in self.rest else x.clone() for name, x in self.fast.items()}
        device = self.keys.device
        if self.chunk > 1:
            unfilled = torch.arange(self.chunk - 1, device=device) >= torch.tensor(lengths, device=device)[:, None]
            for name, x in self.pending.items():
                empty = unfilled[:, None].reshape(len(seen), 1, -1, *(1,) * (x.dim() - 3))
                tensors[f"pending.{name}"] = x[:, :, : self.chunk - 1].masked_fill(empty, 0)
        room = self.window - 1
        after, places = torch.tensor(seen, device=device)[:, None], torch.arange(room, device=device)
        where = (after - room + places).remainder(self.window)[:, None, :, None]
        there = (after - room + places >= 0)[:, :, None, None]

        def latest(ring: Tensor) -> Tensor:
            found = ring.take_along_dim(where, dim=2).transpose(1, 2).contiguous()
            return found.masked_fill_(~there, 0)

        cache = WindowCache(latest(self.keys), latest(self.values), tuple(min(n, room) for n in seen))
        return PendingState.of(State(self.spec, tensors, lengths)), cache

    def tensors(self) -> list[Tensor]:
        """All that it holds."""
        return [self.keys, self.values, *self.fast.values(), *self.rest.values(), *self.pending.values()]

    def move(self, source: Tensor, target: Tensor) -> None:
        """Have at rows `target` (int64 `[n]`) what rows `source` hold now."""
        each = [x for held in (self.fast, self.rest) for name, x in held.items() if name not in self.alike]
        for x in (self.keys, self.values, *each, *self.pending.values()):
            x.index_copy_(0, target, x.index_select(0, source))

    def attend(self, step: DecodeStep, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Take one token's key and value into the ring, and attend to what it sees; all `[B, 1, H, D]`."""
        slot = step.slot[:, None, :, None].expand(-1, self.keys.shape[1], 1, self.keys.shape[3])
        self.keys.scatter_(2, slot, k.transpose(1, 2))
        self.values.scatter_(2, slot, v.transpose(1, 2))
        if runs_on(q.device) and is_eager():
            from kvbind.kernels.elementwise.decode_attention import covers, decode_attention

            if covers(q[:, 0], self.keys, self.values):
                return decode_attention(q[:, 0], self.keys, self.values, step.first, step.count)[:, None]
        age = (step.positions - self._places()).remainder(self.window)
        seen = (age < step.count[:, None])[:, None, None, :]
        return softmax_attention(q.transpose(1, 2), self.keys, self.values, seen).transpose(1, 2)

    def read(self, q: Tensor, k: Tensor) -> Tensor:
        """What the fast weights say of one token, `[B, 1, H, D]` each."""
        return (read_rounded if self.rounds else read)(self.spec, self.weights, q, k)

    def put(self, step: DecodeStep, tokens: Tokens) -> None:
        """Take in one token of each row as a writer, `[B, H, 1, ...]`."""
        made = tokens.spread().tensors()
        for name, held in self.pending.items():
            x = made[name]
            place = step.place[:, None].reshape(-1, 1, 1, *(1,) * (x.dim() - 3)).expand(x.shape)
            held.scatter_(2, place, x)

    def complete(self, seen: Tensor, rows: Tensor | None, store: bool = True) -> None:
        """Update the fast weights of rows that have all tokens of a chunk.

        Args:
            seen: how many tokens each row has had, int64 `[B]`.
            rows: which, int64 `[n]`; None for all of them.
            store: False to throw away what comes of it, which compiles what a capture may not.
        """

        def take(x: Tensor) -> Tensor:
            return x if rows is None else x.index_select(0, rows)

        held = {name: self._whole(name, rows).contiguous() for name in self.fast}
        fast = State(self.spec, held, ()).fast
        pending = {name: take(x) for name, x in self.pending.items()}
        if self.value_writer is not None:
            pending["v"] = self._chunk_values(take(seen), take(self.values))
        after = completed(self.spec, fast, Tokens.of(pending))
        for name, x in changed(self.spec, after).items() if store else ():
            self._keep(name, x, rows)

    def _whole(self, name: str, rows: Tensor | None) -> Tensor:
        """One of the fast weights or what belongs to them, of all rows or of some."""
        count, own = (len(self.keys), None) if rows is None else (len(rows), None if name in self.alike else rows)

        def some(x: Tensor) -> Tensor:
            return x if own is None else x.index_select(0, own)

        whole = some(self.fast[name])
        if name in self.rest:
            whole = join(whole, some(self.rest[name]))
        return whole.expand(count, *whole.shape[1:])

    def _keep(self, name: str, x: Tensor, rows: Tensor | None) -> None:
        """Put one of them in its place, of all rows or of some."""
        parts = (
            zip((self.fast[name], self.rest[name]), split(x), strict=True) if name in self.rest else ((self.fast[name], x),)
        )
        for held, part in parts:
            if rows is None:
                held.copy_(part)
            else:
                held.index_copy_(0, rows, part)

    def _chunk_values(self, seen: Tensor, ring: Tensor) -> Tensor:
        """What rows' last `chunk` tokens are written with, `[B, H, chunk, D]` in one piece, of a ring of values."""
        assert self.value_writer is not None
        places = torch.arange(self.chunk, device=ring.device)
        where = (seen[:, None] - self.chunk + places).remainder(self.window)
        found = ring.take_along_dim(where[:, None, :, None], dim=2)
        return self.value_writer.make(found.transpose(1, 2)).transpose(1, 2).contiguous()

    def _places(self) -> Tensor:
        return torch.arange(self.window, device=self.keys.device)
