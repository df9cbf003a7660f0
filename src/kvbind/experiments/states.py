"""How many bytes a language model keeps of one sequence, whatever mixes its tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from kvbind.layers.attention import AttentionState
from kvbind.models.lact.cache import LactCache, MixerState


def state_bytes(cache: Any) -> int:
    """What a cache of one sequence holds that another sequence's would not, in bytes.

    Of fast weights that is updated weights, momentum, windows, and the most tokens that wait for the end of a chunk; not
    weights that no token changes, nor starting norms. Of attention it is the keys and values that are there.

    Args:
        cache: a `LactCache`, an `InPlaceCache`, or a cache of transformers.
    """
    if isinstance(cache, LactCache):
        return sum(mixer_bytes(state) for state in cache.states)
    states = pytree.tree_leaves([(state.written, vars(state.pending)) for state in getattr(cache, "states", {}).values()])
    held = [*states, *(x for layer in cache.layers for x in (layer.keys, layer.values))]
    return sum(x.nbytes for x in held if isinstance(x, Tensor))


def mixer_bytes(state: MixerState) -> int:
    """Likewise of one layer of the LaCT language model."""
    if isinstance(state, AttentionState):
        return sum(x.nbytes for x in state.tensors())
    fast = state.fast
    still = {f"weights.{name}" for name in fast.weights if name not in fast.spec.updated}
    alike = {id(x) for name, x in fast.tensors.items() if name in still or name.startswith("norms.")}
    return sum(x.nbytes for x in state.tensors() if id(x) not in alike)
