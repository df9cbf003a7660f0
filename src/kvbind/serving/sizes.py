"""The memory that a request takes of an engine's pool, and how many requests fit."""

from __future__ import annotations

from dataclasses import dataclass

from kvbind.models.lact.config import LactConfig
from kvbind.serving.checks import state_layout

FLOAT32 = 4


@dataclass(frozen=True)
class RequestSize:
    """What a request that has run for a while takes of one rank's pool, by layer, in pages of one size.

    vLLM's pages are all of one size: attention's grow, in whole steps, until one holds a state. Without attention a page is
    a state.

    Attributes:
        layers: of the model.
        state: bytes of a state.
        page: bytes of a page.
        block: tokens in a page of keys and values; without attention, between places where prefixes can be cached.
        states: pages for states: 1, or 2 where prefixes are cached.
        window: pages for attention's keys and values.
        pending: pages for those of pending tokens.
    """

    layers: int
    state: int
    page: int
    block: int
    states: int
    window: int
    pending: int

    @staticmethod
    def of(config: LactConfig, item: int = 2, *, ranks: int = 1, step: int = 16, cached: bool = False) -> RequestSize:
        """The size of a model's requests.

        Args:
            config: the model's.
            item: bytes of a number in the model's dtype.
            ranks: that heads are divided over.
            step: tokens by which pages grow: 16 on GPUs, 128 on CPUs.
            cached: prefixes are cached.
        """
        layout = state_layout(config, ranks)
        state, states = layout.size * FLOAT32, 1 + cached
        if not layout.paged:
            return RequestSize(config.num_hidden_layers, state, state, step, states, 0, 0)
        token = 2 * config.hidden_size // ranks * item
        block = step * -(-state // (step * token))

        def pages(back: int) -> int:
            # those a token looks back at, its own, and one more where they straddle an end of a page
            return -(-back // block) + 1

        pending = pages(layout.reach) if layout.places else 0
        window = pages(config.window_size - 1)
        return RequestSize(config.num_hidden_layers, state, block * token, block, states, window, pending)

    @property
    def bytes(self) -> int:
        """Bytes of all layers."""
        return self.layers * (self.states + self.window + self.pending) * self.page


def check_slots(slots: int, size: RequestSize, memory: int) -> None:
    """Refuse more requests at once than a pool has room for.

    Args:
        slots: how many.
        size: what one request takes.
        memory: bytes of the pool.

    Raises:
        ValueError: they do not fit.
    """
    fit = memory // size.bytes
    if slots > fit:
        raise ValueError(
            f"slots must be at most {fit}, for which {memory / 2**20:.0f} MiB have room at {size.bytes / 2**20:.1f} MiB a "
            f"request; got {slots}"
        )
