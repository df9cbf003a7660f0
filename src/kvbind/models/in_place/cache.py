"""The cache that generation keeps: the attention's keys and values, and what fast weights hold."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig

from kvbind.layers.in_place.layer import InPlaceState


class InPlaceCache(DynamicCache):
    """transformers' `DynamicCache` for the attention, and for each fast layer what was written and the pending tokens.

    `generate` makes one by itself. It cannot be cropped, as fast weights do not unlearn.

    Args:
        config: the configuration of the language model inside (`InPlaceConfig.text_config`).

    Attributes:
        states: one `InPlaceState` per fast layer, by its number; empty before the first token.
        seen: how many tokens each sequence has had, without padding; empty before the first.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config=config)
        self.config = config
        self.states: dict[int, InPlaceState] = {}
        self.seen: tuple[int, ...] = ()

    def advance(self, states: dict[int, InPlaceState], lengths: tuple[int, ...]) -> None:
        """Take over where the fast layers stopped after further `lengths` tokens of each sequence."""
        self.states = states
        self.seen = tuple(old + new for old, new in zip(self.seen or (0,) * len(lengths), lengths, strict=True))

    def _select(self, indices: Tensor) -> None:
        rows = indices.tolist()
        if rows == list(range(len(self.seen))):
            return
        self.states = {layer: state.select(indices) for layer, state in self.states.items()}
        self.seen = tuple(self.seen[i] for i in rows)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Keep the sequences at `beam_idx`, in that order."""
        super().reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences at `indices`, in that order."""
        super().batch_select_indices(indices)
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Have every sequence `repeats` times, copies side by side."""
        super().batch_repeat_interleave(repeats)
        self._select(torch.arange(len(self.seen)).repeat_interleave(repeats))

    def reset(self) -> None:
        """Forget all tokens and states."""
        super().__init__(config=self.config)
        self.states, self.seen = {}, ()

    def crop(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: what complete chunks wrote cannot be taken back.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "InPlaceCache cannot be cropped: its fast weights have taken in every complete chunk and cannot unlearn the "
            "last tokens. Keep a copy.deepcopy of the cache from before them, and go on from that."
        )

    @property
    def is_croppable(self) -> bool:
        """False: a state does not say what it was some tokens ago."""
        return False

    @property
    def is_compileable(self) -> bool:
        """False: its states are replaced, not written in place."""
        return False
