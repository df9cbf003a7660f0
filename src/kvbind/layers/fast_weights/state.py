"""Where sequences stopped in a `FastWeightLayer`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.utils import _pytree as pytree

from kvbind.forms.state import State


@dataclass(frozen=True)
class FastWeightState:
    """Where some sequences stopped in one layer: of constant size.

    Attributes:
        fast: fast weights and pending tokens, as `kvbind.ttt` returns them.
        tails: what the convolution ("conv", `[B, width - 1, C]`) and mixing with the token before ("shift", `[B, 1, d]`)
            read of the last tokens.
        seen: how many tokens each sequence has had.

    A pytree of the two.
    """

    fast: State
    tails: Mapping[str, Tensor]
    seen: tuple[int, ...]

    def tensors(self) -> list[Tensor]:
        """All that it holds."""
        return [*self.fast.tensors.values(), *self.tails.values()]

    def select(self, index: Tensor) -> FastWeightState:
        """The sequences at `index` (int64 `[n]`), in that order, as often as they are named."""
        rows = index.tolist()
        tails = {name: x.index_select(0, index.to(x.device)) for name, x in self.tails.items()}
        return FastWeightState(self.fast[index], tails, tuple(self.seen[i] for i in rows))


pytree.register_pytree_node(
    FastWeightState,
    lambda state: ([state.fast, dict(state.tails)], state.seen),
    lambda leaves, seen: FastWeightState(*leaves, seen),  # type: ignore[call-arg]
    serialized_type_name="kvbind.FastWeightState",
)
