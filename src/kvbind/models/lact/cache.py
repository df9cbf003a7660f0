"""The cache that generation keeps: constant size, whatever the prompt's length."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from kvbind.layers.lact import LactState

CACHE_NAMES = ("past_key_values", "cache")
"""What transformers calls the cache: the first before version 5.24, the second since."""

CACHE = next(name for name in CACHE_NAMES if name in {field.name for field in fields(BaseModelOutputWithPast)})
"""What the installed transformers calls the cache: an argument of its models, and a field of what they return."""


class LactCache(Cache):
    """For each layer the fast weights with their pending chunk, and the last `window - 1` keys and values.

    transformers' `generate` makes one by itself, returns it as `cache` (`past_key_values` before transformers 5.24), and
    takes it back to go on. It reads and reorders sequences; it cannot be cropped, as fast weights do not unlearn.

    Attributes:
        states: one `LactState` per layer; empty before the first token.
        columns: how many columns of input it has read, padding included; the number by which transformers slices inputs.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.states: list[LactState] = []
        self.columns = 0

    @property
    def seen(self) -> tuple[int, ...]:
        """How many tokens each sequence has had, without padding; empty before the first."""
        return self.states[0].seen if self.states else ()

    def advance(self, states: list[LactState], columns: int) -> None:
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
        self.states = [state.select(indices) for state in self.states]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Have every sequence `repeats` times, copies side by side."""
        self.batch_select_indices(torch.arange(len(self.seen)).repeat_interleave(repeats))

    def reset(self) -> None:
        """Forget everything."""
        self.states, self.columns = [], 0

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
        return bool(self.states)

    @property
    def is_croppable(self) -> bool:
        """False."""
        return False

    @property
    def is_linear(self) -> list[bool]:
        """False for each layer: it counts the tokens it has read, by which `generate` knows those that are new."""
        # never empty, as all() of an empty list is True
        return [False] * max(len(self.states), 1)

    @property
    def is_compileable(self) -> bool:
        """False: its states are replaced, not written in place."""
        return False

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: no length is too long."""
        return -1

    def __len__(self) -> int:
        return len(self.states)

    def __repr__(self) -> str:
        return f"LactCache({len(self.states)} layers, {len(self.seen)} sequences, {self.columns} columns read)"


def given_cache(past_key_values: Any, cache: Any) -> LactCache | None:
    """The cache that a model was given under either of its names.

    Raises:
        TypeError: it is no LactCache.
        ValueError: two of them.
    """
    if past_key_values is not None and cache is not None:
        raise ValueError("cache must be None beside past_key_values: they are two names of one argument; got both")
    name, found = ("cache", cache) if past_key_values is None else ("past_key_values", past_key_values)
    if found is not None and not isinstance(found, LactCache):
        raise TypeError(f"{name} must be a kvbind LactCache, which holds fast weights; got {type(found).__name__}")
    return found
