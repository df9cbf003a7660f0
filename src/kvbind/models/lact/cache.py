"""The cache that generation keeps: constant size, whatever the prompt's length."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from kvbind.layers.attention.modules import AttentionState
from kvbind.layers.fast_weights.state import FastWeightState
from kvbind.layers.lact.layer import LactState

if TYPE_CHECKING:
    from kvbind.models.lact.decoding import Rows

MixerState = LactState | FastWeightState | AttentionState
"""What one layer keeps of some sequences."""

CACHE_NAMES = ("past_key_values", "cache")
"""What transformers calls the cache: the first before version 5.24, the second since."""

CACHE = next(name for name in CACHE_NAMES if name in {field.name for field in fields(BaseModelOutputWithPast)})
"""What the installed transformers calls the cache: an argument of its models, and a field of what they return."""


class LactCache(Cache):
    """For each layer the fast weights with their pending chunk, and the last `window - 1` keys and values.

    Of layers without attention, the fast weights and what their convolutions read of the last tokens.

    transformers' `generate` makes one by itself, returns it as `cache` (`past_key_values` before transformers 5.24), and
    takes it back to go on. It reads and reorders sequences; it cannot be cropped, as fast weights do not unlearn. A pytree
    of its tensors.

    While single tokens are decoded as CUDA graphs, what it holds lies in the graphs' own tensors (`rows`), and comes back,
    the same as if it had never been there, when it is asked for.

    Attributes:
        columns: how many columns of input it has read, padding included; the number by which transformers slices inputs.
        rows: where the graphs of a model have it, or None.
        moves: how often another cache has taken its place there.
        refused: why it is not decoded by graphs, where that was found out.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self._states: list[MixerState] = []
        self.columns = 0
        self.rows: Rows | None = None
        self.moves = 0
        self.refused: str | None = None

    @property
    def states(self) -> list[MixerState]:
        """One state per layer; empty before the first token."""
        self.settle()
        return self._states

    @states.setter
    def states(self, states: list[MixerState]) -> None:
        self._leave()
        self._states = states

    @property
    def nbytes(self) -> int:
        """The bytes of memory that it takes, of all sequences, wherever they lie."""
        layers = self._states if self.rows is None else self.rows.layers
        held = [x.untyped_storage() for layer in layers for x in layer.tensors()]
        return sum({x.data_ptr(): x.nbytes() for x in held}.values())

    @property
    def seen(self) -> tuple[int, ...]:
        """How many tokens each sequence has had, without padding; empty before the first."""
        if self.rows is not None:
            return self.rows.seen
        return self._states[0].seen if self._states else ()

    def settle(self) -> None:
        """Have all that it holds in tensors of its own."""
        if self.rows is not None:
            rows, self.rows = self.rows, None
            self._states = rows.release()

    def move_into(self, rows: Rows, model: Any) -> None:
        """Have all that it holds where the graphs of `model` read it."""
        leaving: list[MixerState | None] = [*self.states]
        self._states = []
        try:
            rows.admit(model, self, leaving)
        except Exception:
            self._states = [state for state in leaving if state is not None]
            raise
        self.rows = rows

    def _leave(self) -> None:
        """Give up what lies elsewhere."""
        if self.rows is not None:
            self.rows.holder = None
            self.rows = None

    def __getstate__(self) -> dict[str, Any]:
        # copies and files have tensors of their own
        self.settle()
        return self.__dict__

    def advance(self, states: list[MixerState], columns: int) -> None:
        """Take over where all layers stopped after `columns` further columns of input."""
        self.states = states
        self.columns += columns

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many columns of input were read, padding included."""
        return self.columns

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the sequences at `beam_idx`, in that order."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences at `indices`, in that order."""
        # once for all layers: each reads the numbers on the host
        indices = indices.cpu()
        if self.rows is not None and len(indices) == len(self.seen):
            self.rows.reorder(torch.arange(len(indices))[indices].tolist())
            return
        self.states = [state.select(indices) for state in self.states]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Have every sequence `repeats` times, copies side by side."""
        self.batch_select_indices(torch.arange(len(self.seen)).repeat_interleave(repeats))

    def reset(self) -> None:
        """Forget all tokens and states."""
        self.states, self.columns, self.refused = [], 0, None

    def crop(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: fast weights hold all tokens at once and cannot give back the latest.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "LactCache cannot be cropped: its fast weights have taken in every token and cannot unlearn the last ones. "
            "Keep a copy.deepcopy of the cache from before them, and go on from that."
        )

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: the model hands over whole states, see `advance`.

        Raises:
            ValueError: always.
        """
        raise ValueError("LactCache takes no single keys and values; the model updates it through advance()")

    @property
    def batch_size(self) -> int:
        """The number of sequences, or -1 before the first token."""
        return len(self.seen) or -1

    @property
    def is_initialized(self) -> bool:
        """Whether any token was read."""
        return bool(self.seen)

    @property
    def is_croppable(self) -> bool:
        """False: a state does not say what it was some tokens ago."""
        return False

    @property
    def is_linear(self) -> list[bool]:
        """False for each layer: it counts the tokens it has read, by which `generate` knows those that are new."""
        # never empty, as all() of an empty list is True
        return [False] * max(len(self), 1)

    @property
    def is_compileable(self) -> bool:
        """False: its states are replaced, not written in place."""
        return False

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: no length is too long."""
        return -1

    def __len__(self) -> int:
        return len(self._states) if self.rows is None else len(self.rows.layers)

    def __repr__(self) -> str:
        return f"LactCache({len(self)} layers, {len(self.seen)} sequences, {self.columns} columns read)"


def _cache_of(states: Any, columns: int) -> LactCache:
    cache = LactCache()
    cache.states, cache.columns = list(states), columns
    return cache


pytree.register_pytree_node(
    LactCache, lambda cache: (cache.states, cache.columns), _cache_of, serialized_type_name="kvbind.LactCache"
)


Kind = TypeVar("Kind", bound=Cache)


def given_cache(past_key_values: Any, cache: Any, kind: type[Kind]) -> Kind | None:
    """The cache that a model was given under either of its names.

    Args:
        past_key_values: under the one.
        cache: under the other.
        kind: the model's cache.

    Raises:
        TypeError: it is of another class.
        ValueError: two of them.
    """
    if past_key_values is not None and cache is not None:
        raise ValueError("cache must be None beside past_key_values: they are two names of one argument; got both")
    name, found = ("cache", cache) if past_key_values is None else ("past_key_values", past_key_values)
    if found is not None and not isinstance(found, kind):
        raise TypeError(f"{name} must be a kvbind {kind.__name__}, which holds fast weights; got {type(found).__name__}")
    return found
