"""The cache that generation keeps: constant size, whatever the prompt's length."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import Cache

from kvbind.layers.lact import LactState


class LactCache(Cache):
    """For each layer the fast weights with their pending chunk, and the last `window - 1` keys and values.

    transformers' `generate` makes one by itself, returns it as `past_key_values`, and takes it back to go on. It reads and
    reorders sequences; it cannot be cropped, as fast weights do not unlearn.

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

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: no length is too long."""
        return -1

    def __len__(self) -> int:
        return len(self.states)

    def __repr__(self) -> str:
        return f"LactCache({len(self.states)} layers, {len(self.seen)} sequences, {self.columns} columns read)"
