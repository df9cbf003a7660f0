"""How many bytes a language model keeps of one sequence, whatever mixes its tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from kvbind.forms.state import State
from kvbind.layers.attention.modules import AttentionState
from kvbind.layers.fast_weights.state import FastWeightState
from kvbind.models.lact.cache import LactCache, MixerState


def state_bytes(cache: Any) -> int:
    """What a cache of one sequence holds that another sequence's would not, in bytes.

    Of fast weights that is updated weights, momentum, windows, and the most tokens that wait for the end of a chunk; not
    weights that no token changes, nor starting norms. Of attention it is the keys and values that are there, and values that
    wait are counted once.

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
    if isinstance(state, FastWeightState):
        return fast_bytes(state.fast) + sum(x.nbytes for x in state.tails.values())
    kept = state.cache
    attention = (kept.keys.nbytes + kept.values.nbytes) * kept.held[0] // max(kept.keys.shape[1], 1)
    return attention + (0 if isinstance(state, AttentionState) else fast_bytes(state.held))


def fast_bytes(fast: State) -> int:
    """Likewise of fast weights."""
    still = {f"weights.{name}" for name in fast.weights if name not in fast.spec.updated}
    return sum(x.nbytes for name, x in fast.tensors.items() if name not in still and not name.startswith("norms."))
