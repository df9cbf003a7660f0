"""The state that `ttt` returns and takes: fast weights, momentum, starting norms and pending tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils import _pytree as pytree

from kvbind.files import parse_json, read_tensors, shortened
from kvbind.forms.tokens import Tokens
from kvbind.inner.gates import Gate
from kvbind.inner.rule import FastWeights
from kvbind.inner.spec import InnerLoop


class Deferred(Mapping[str, Tensor]):
    """Named tensors that are made when the first of them is asked for.

    Args:
        make: makes all of them.
    """

    def __init__(self, make: Callable[[], Mapping[str, Tensor]]) -> None:
        self._make: Callable[[], Mapping[str, Tensor]] | None = make
        self._made: Mapping[str, Tensor] = {}

    def _all(self) -> Mapping[str, Tensor]:
        make = self._make
        if make is not None:
            # threads that meet here make the same
            self._made, self._make = make(), None
        return self._made

    def __getitem__(self, name: str) -> Tensor:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def __reduce__(self) -> tuple[type, tuple[dict[str, Tensor]]]:
        return dict, (dict(self._all()),)


@dataclass(frozen=True, eq=False)
class State:
    """Where some sequences stopped: constant size, whatever their length.

    A pytree whose leaves are the tensors. `state[i]`, `state[[2, 0, 0]]`, `state[1:]` and an index tensor choose
    sequences (beam search); an int keeps the batch axis.

    Attributes:
        spec: the inner loop that this is a state of.
        tensors: by dotted name: "weights.M", "momentum.M", "norms.M", "accumulated.M", "anchor.M", "importance.M"
            `[B, H, in, out]` and "window.M" or "window.k", ... (`FastWeights`), those that the inner loop has, in float32
            (float64 for float64 inputs); and, where `spec.room`, the most tokens that can be pending, is not 0, "pending.k",
            "pending.v" `[B, H, room, D]`, "pending.rates.M" and "pending.G" of each gate G `[B, H, room]`, and where some
            of the tokens do not write "pending.mask" `[B, 1, room]`.
        pending_lengths: how many of the pending places each sequence fills; the rest are zeros.

    Inside a cache "pending.v" may be left out, where a layer holds the same values elsewhere (`values_apart`).
    """

    spec: InnerLoop
    tensors: Mapping[str, Tensor]
    pending_lengths: tuple[int, ...]

    @staticmethod
    def of(spec: InnerLoop, fast: FastWeights, pending: Tokens | None, length: int) -> State:
        """A state of sequences that all have `length` tokens pending, or none, with `pending` any tokens like theirs."""
        tensors = {f"{part}.{name}": x for part, group in fast.parts().items() if part in KEPT for name, x in group.items()}
        if pending is not None and spec.room:
            batch, room = tensors["weights.out"].shape[0], spec.room
            kept = pending.padded(room) if length else pending.blank(batch, room)
            tensors |= {f"pending.{name}": x for name, x in kept.tensors().items()}
        batch = tensors["weights.out"].shape[0]
        # of a batch that is a symbol, one number for all; once it is a number, `_unflatten` says it of each
        return State(spec, tensors, (length,) if isinstance(batch, torch.SymInt) else (length,) * batch)

    def group(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under a dotted prefix, by the rest of their names."""
        return {name.removeprefix(prefix): x for name, x in self.tensors.items() if name.startswith(prefix)}

    @property
    def weights(self) -> dict[str, Tensor]:
        """The fast weights, `[B, H, in, out]` by matrix name."""
        return self.group("weights.")

    @property
    def momentum(self) -> dict[str, Tensor]:
        """The momentum buffers, `[B, H, in, out]` by matrix name; empty without momentum."""
        return self.group("momentum.")

    @property
    def norms(self) -> dict[str, Tensor]:
        """The starting norm of each output channel, by matrix name; empty without normalization."""
        return self.group("norms.")

    @property
    def fast(self) -> FastWeights:
        """Everything but the pending tokens, as the update rule takes it."""
        parts: dict[str, dict[str, Tensor]] = {part: {} for part in KEPT}
        for name, x in self.tensors.items():
            part, _, rest = name.partition(".")
            if part in parts:
                parts[part][rest] = x
        return FastWeights(**parts)

    @property
    def batch(self) -> int:
        """The number of sequences."""
        return len(self.pending_lengths)

    @property
    def dtype(self) -> torch.dtype:
        """What the fast weights are held in and the PyTorch forms compute in."""
        return self.tensors["weights.out"].dtype

    def pending(self) -> Tokens | None:
        """The pending tokens, of sequences that all have equally many; None where there are none."""
        length = self.pending_lengths[0] if self.pending_lengths else 0
        if not length:
            return None
        return Tokens.of(self.group("pending.")).span(0, length)

    @property
    def has_room(self) -> bool:
        """Whether this state holds places for pending tokens; the state before a sequence's first token does not."""
        return "pending.k" in self.tensors

    def values_apart(self) -> State:
        """This state without the values of its pending tokens, for who has them elsewhere; `with_values` puts them back."""
        tensors = {name: x for name, x in self.tensors.items() if name != "pending.v"}
        return State(self.spec, tensors, self.pending_lengths)

    def with_values(self, v: Tensor) -> State:
        """This state with values `[B, H, room, Dv]` of its pending tokens, zeros in places that are not filled."""
        tensors = {}
        for name, x in self.tensors.items():
            tensors[name] = x
            if name == "pending.k":
                tensors["pending.v"] = v
        return State(self.spec, tensors, self.pending_lengths)

    def in_own_memory(self) -> State:
        """This state, of which nothing keeps more memory alive than its own, as a view of the states of all chunks would."""
        held: dict[int, int] = {}
        for x in self.tensors.values():
            place = x.untyped_storage().data_ptr()
            held[place] = held.get(place, 0) + x.numel() * x.element_size()

        def own(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            return x.clone() if storage.nbytes() > held[storage.data_ptr()] else x

        return self.map(own)

    def append(self, tokens: Tokens) -> State:
        """This state with more tokens of every sequence pending, which complete no chunk."""
        if tokens.mask is not None or "pending.mask" in self.tensors:
            return self._masked()._append(tokens.masked())
        return self._append(tokens)

    def _masked(self) -> State:
        """This state with a mask of its pending tokens, of which all write where there was none."""
        if "pending.mask" in self.tensors:
            return self
        keys = self.tensors["pending.k"]
        ones = torch.ones(self.batch, 1, keys.shape[2], dtype=torch.bool, device=keys.device)
        return State(self.spec, dict(self.tensors) | {"pending.mask": ones}, self.pending_lengths)

    def _append(self, tokens: Tokens) -> State:
        lengths, more = self.pending_lengths, len(tokens)

        def put(held: Tensor, x: Tensor, length: int) -> Tensor:
            return torch.cat((held[:, :, :length], x, held[:, :, length + more :]), dim=2)

        tensors = dict(self.tensors)
        for name, x in tokens.spread().tensors().items():
            if name == "v" and "pending.v" not in tensors:
                continue
            held = tensors[f"pending.{name}"]
            if len(set(lengths)) == 1:
                filled = put(held, x, lengths[0])
            else:
                rows = zip(held.split(1), x.split(1), lengths, strict=True)
                filled = torch.cat([put(*row) for row in rows])
            tensors[f"pending.{name}"] = filled
        return State(self.spec, tensors, tuple(length + more for length in lengths))

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """This state with every tensor changed."""
        return type(self)(self.spec, {name: change(x) for name, x in self.tensors.items()}, self.pending_lengths)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """This state moved, as by `torch.Tensor.to`."""
        return self.map(lambda x: x.to(*args, **kwargs))

    def detach(self) -> Self:
        """This state cut from the autograd graph."""
        return self.map(torch.Tensor.detach)

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> Self:
        if isinstance(index, Tensor):
            # a mask or an index, of any integer type
            index = torch.arange(self.batch)[index.cpu()].reshape(-1).tolist()
        if isinstance(index, int):
            index = [index]
        places = range(self.batch)
        rows = list(places[index]) if isinstance(index, slice) else [places[i] for i in index]
        where = torch.tensor(rows, dtype=torch.long, device=self.tensors["weights.out"].device)
        picked = self.map(lambda x: x.index_select(0, where))
        return type(self)(self.spec, picked.tensors, tuple(self.pending_lengths[i] for i in rows))

    @staticmethod
    def cat(states: Sequence[State]) -> State:
        """The sequences of several states of one inner loop, one after another.

        Raises:
            ValueError: no states, or states of different inner loops.
        """
        if not states:
            raise ValueError("states must hold at least one state; got none")
        first = states[0]
        other = next((state.spec for state in states if not state.spec.same_as(first.spec)), None)
        if other is not None:
            raise ValueError(f"states must be of one inner loop; theirs differ in {', '.join(first.spec.differing(other))}")
        if any("pending.mask" in state.tensors for state in states):
            states = [state._masked() for state in states]
            first = states[0]
        tensors = {name: torch.cat([state.tensors[name] for state in states]) for name in first.tensors}
        return State(first.spec, tensors, tuple(n for state in states for n in state.pending_lengths))

    def save(self, path: str | Path) -> None:
        """Write this state as a safetensors file, its inner loop and lengths in the metadata."""
        metadata = {"inner": json.dumps(self.spec.to_dict()), "pending_lengths": json.dumps(self.pending_lengths)}
        save_file({name: x.detach().contiguous() for name, x in self.tensors.items()}, str(path), metadata=metadata)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> Self:
        """Read what `save` wrote.

        Raises:
            OSError: a file that cannot be read.
            ValueError: a file that holds no state, or one whose tensors do not fit its inner loop and each other.
        """
        try:
            tensors, metadata = read_tensors(path, device)
            if not {"inner", "pending_lengths"} <= metadata.keys():
                raise ValueError(f"{path} holds no inner loop")
            spec = InnerLoop.from_dict(parse_json(metadata["inner"], "its inner loop"))
            lengths = parse_json(metadata["pending_lengths"], "its pending_lengths")
            if not isinstance(lengths, list):
                raise ValueError(f"its pending_lengths must be a list; got {shortened(lengths)}")
            state = cls(spec, tensors, tuple(lengths))
            state.check()
        except (TypeError, ValueError) as error:
            raise ValueError(f"path must be a file that State.save wrote; {path} is not: {error}") from error
        return state

    def check(self) -> None:
        """Refuse a state that no call of `ttt` can have returned.

        Raises:
            ValueError: tensors that the inner loop does not have, or lacks; shapes that do not fit each other; dtypes that
                are not floating point, or differ among the fast weights; numbers of pending tokens for which there is no
                place.
        """
        spec, held = self.spec, self.tensors
        needed = _shapes_of(spec, held, len(self.pending_lengths))
        mask = held.get("pending.mask")
        if mask is not None and "pending.k" in needed:
            needed["pending.mask"] = [len(self.pending_lengths), 1, spec.room]
        if differing := sorted(needed.keys() ^ held.keys()):
            found = "lacks" if differing[0] in needed else "has"
            raise ValueError(
                f"a state of {spec!r} must have {', '.join(needed)}; this one {found} {shortened(differing[0])}"
            )
        fast = held["weights.out"].dtype
        for name, shape in needed.items():
            x = held[name]
            if list(x.shape) != shape:
                raise ValueError(f"a state's {name!r} must be {shape}, as its other tensors are; got {list(x.shape)}")
            if name == "pending.mask" and x.dtype == torch.bool:
                continue
            if x.dtype not in _DTYPES or not (name.startswith("pending.") or x.dtype == fast):
                raise ValueError(
                    f"a state's {name!r} must be floating point, and all fast weights alike, here {fast}; got {x.dtype}"
                )
        room = held["pending.k"].shape[2] if "pending.k" in held else 0
        for length in self.pending_lengths:
            if isinstance(length, bool) or not isinstance(length, int) or not 0 <= length <= room:
                raise ValueError(f"a state's pending_lengths must be integers from 0 to {room}; got {shortened(length)}")

    def __repr__(self) -> str:
        size = sum(x.numel() * x.element_size() for x in self.tensors.values())
        return f"State({self.batch} sequences, {size / self.batch / 1024:.1f} KiB each, of {self.spec!r})"


KEPT = ("weights", "momentum", "norms", "accumulated", "window", "anchor", "importance")
"""The parts of `FastWeights` that a state keeps; the rest is of a span that has begun, whose tokens are pending."""

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""What a state may be held in: what `ttt` returns, and what it may have been moved to."""


def _shapes_of(spec: InnerLoop, tensors: Mapping[str, Tensor], batch: int) -> dict[str, list[int]]:
    """The shape of each tensor of a state of `spec`, its sizes taken from the fast weights.

    Raises:
        ValueError: fast weights that are missing, or have another number of axes.
    """
    network = spec.network
    axes = 2 + len(network.input_axes) + 1
    for name in network.matrices:
        x = tensors.get(f"weights.{name}")
        if x is None or x.dim() != axes:
            found = "it is missing" if x is None else f"got {list(x.shape)}"
            raise ValueError(f"a state's 'weights.{name}' must have {axes} axes; {found}")
    first, out = tensors[f"weights.{network.matrices[0]}"], tensors["weights.out"]
    heads, keys, values = out.shape[1], first.shape[2], out.shape[2 if axes > 4 else 3]
    weights = {name: tensors[f"weights.{name}"] for name in network.matrices}
    matrices = {
        name: [batch, heads, *shape] for name, shape in network.shapes(keys, values, network.hidden_widths(weights)).items()
    }
    vectors = network.vector_shapes(keys, values, network.hidden_widths(weights))
    channels = {name: list(shape) for name, shape in matrices.items()}
    for shape in channels.values():
        for axis in network.input_axes:
            shape[axis] = 1
    each = matrices | {name: [batch, heads, 1, *shape] for name, shape in vectors.items()}
    needed = {f"weights.{name}": shape for name, shape in each.items()}
    if spec.momentum:
        needed |= {f"momentum.{name}": each[name] for name in spec.updated}
    if spec.normalize:
        needed |= {f"norms.{name}": channels[name] for name in spec.updated if name in channels}
    if spec.normalize == "read":
        needed |= {f"accumulated.{name}": each[name] for name in spec.updated}
    if spec.anchor is not None:
        needed |= {f"{part}.{name}": each[name] for part in ("anchor", "importance") for name in spec.updated}

    def of_tokens(group: str, room: int, gates: Mapping[str, Gate]) -> dict[str, list[int]]:
        places = [batch, heads, room]
        shapes = {"k": [*places, keys], "v": [*places, values]} | {f"rates.{name}": places for name in spec.updated}
        shapes |= {name: [*places, keys] if gate.per == "key" else places for name, gate in gates.items()}
        return {f"{group}.{name}": shape for name, shape in shapes.items()}

    earlier = spec.window_size - 1
    if earlier and spec.sums_updates:
        needed |= {f"window.{name}": [*each[name][:2], earlier, *each[name][2:]] for name in spec.updated}
    elif earlier:
        of_keys = {name: gate for name, gate in spec.gates.items() if gate.chunk == "own"}
        needed |= of_tokens("window", earlier * (spec.chunk or 1), of_keys)
    # the state before a sequence's first token has no places yet
    if spec.room and any(name.startswith("pending.") for name in tensors):
        needed |= of_tokens("pending", spec.room, spec.gates)
    return needed


def _flatten(state: State) -> tuple[list[Tensor], tuple[InnerLoop, tuple[str, ...], tuple[int, ...]]]:
    return list(state.tensors.values()), (state.spec, tuple(state.tensors), state.pending_lengths)


def _unflatten(leaves: Any, context: tuple[InnerLoop, tuple[str, ...], tuple[int, ...]]) -> State:
    spec, names, lengths = context
    tensors = dict(zip(names, leaves, strict=True))
    out = tensors.get("weights.out")
    if len(lengths) == 1 and isinstance(out, Tensor):
        lengths *= out.shape[0]
    return State(spec, tensors, lengths)


pytree.register_pytree_node(State, _flatten, _unflatten, serialized_type_name="kvbind.State")
