"""Activation checkpointing, from outside a model: blocks whose activations are made again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from kvbind.train.offload import HostMemory

_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}
_ATTENTION = ("_scaled_dot_product", "flex_attention")
_CHEAP = {"layer_operands", "gated_output", "swiglu", "add_norm", "silu_unit", "token_conv"}
"""Kernels of this library without a matrix product."""


@dataclass
class Recomputed:
    """How a block is recomputed.

    Attributes:
        options: of `checkpoint`.
        kept_by: what its inputs are kept by.
        on: whether it is; else it keeps all its activations.
        draws: whether it was seen to draw random numbers on a GPU.
        measured_by: tells the bytes that tensors take; with it, the next call finds out `extra`.
        extra: bytes that the block keeps for the backward pass where it is not recomputed, beyond its inputs.
    """

    options: dict[str, Any]
    kept_by: Callable[[], AbstractContextManager[object]]
    on: bool = True
    draws: bool = False
    measured_by: Callable[[], int] | None = None
    extra: int = 0


def recompute(blocks: Iterable[nn.Module], what: str) -> list[Recomputed]:
    """Let blocks keep fewer activations for the backward pass; what they compute stays the same to the last bit.

    Parameter names stay as they are: only the blocks' own `forward` is replaced.

    Args:
        blocks: modules that are called one after another.
        what: "none"; "block", to keep each block's inputs alone; "selective", to keep in addition what is dear to compute:
            the outputs of matrix products, of softmax attention and of this library's kernels; "offload", to keep the
            inputs alone, and those in host memory: a GPU then holds two of them, however many blocks there are.

    Returns:
        How each block is, in their order; what can be changed later.
    """
    if what == "none":
        return []
    options: dict[str, Any] = {"use_reentrant": False}
    kept_by: Callable[[], AbstractContextManager[object]] = HostMemory().hooks if what == "offload" else nullcontext
    if what == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    found = []
    for block in blocks:
        found.append(Recomputed(options, kept_by))
        block.forward = partial(_forward, block.forward, found[-1])
    return found


def _forward(forward: Any, how: Recomputed, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled() or not how.on:
        return forward(*args, **kwargs)
    if how.measured_by is not None:
        measure, how.measured_by = how.measured_by, None
        before = measure()
        output = forward(*args, **kwargs)
        kept = sum(x.untyped_storage().nbytes() for x in tree_leaves(output) if isinstance(x, torch.Tensor))
        how.extra = max(0, measure() - before - kept)
        del output
    options = how.options
    # inside, checkpointing's own hooks see what the block keeps; these see its inputs
    with how.kept_by():
        if torch.compiler.is_compiling() or not torch.cuda.is_initialized():
            return checkpoint(forward, *args, **options, **kwargs)
        if torch.cuda.is_current_stream_capturing():
            # a graph cannot read the state of random numbers, which a block that draws none does not need
            return checkpoint(forward, *args, preserve_rng_state=how.draws, **options, **kwargs)
        state = None if how.draws else torch.cuda.get_rng_state()
        found = checkpoint(forward, *args, **options, **kwargs)
        if state is not None:
            how.draws = not torch.equal(state, torch.cuda.get_rng_state())
        return found


def that_fit(extra: Sequence[int], room: float) -> int:
    """How many of the last blocks may keep their activations, `extra` bytes each, within `room` bytes.

    The last ones, as their backward passes come first and are over when earlier blocks are recomputed.
    """
    for count, taken in enumerate(accumulate(reversed(extra))):
        if taken > room:
            return count
    return len(extra)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = operator.__name__ if not hasattr(operator, "overloadpacket") else operator.overloadpacket.__name__
    own = getattr(operator, "namespace", "") == "kvbind" and name not in _CHEAP
    dear = own or name in _PRODUCTS or name.startswith(_ATTENTION)
    return CheckpointPolicy.MUST_SAVE if dear else CheckpointPolicy.PREFER_RECOMPUTE
