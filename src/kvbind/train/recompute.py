"""Activation checkpointing, from outside a model: blocks whose activations are made again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from kvbind.train.offload import HostMemory

_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}
_ATTENTION = ("_scaled_dot_product", "flex_attention")
_CHEAP = {"layer_operands", "gated_output", "swiglu", "add_norm", "silu_unit", "token_conv"}
"""Kernels of this library without a matrix product."""


def recompute(blocks: Iterable[nn.Module], what: str) -> None:
    """Let blocks keep fewer activations for the backward pass; what they compute stays the same to the last bit.

    Parameter names stay as they are: only the blocks' own `forward` is replaced.

    Args:
        blocks: modules that are called one after another.
        what: "none"; "block", to keep each block's inputs alone; "selective", to keep in addition what is dear to compute:
            the outputs of matrix products, of softmax attention and of this library's kernels; "offload", to keep the
            inputs alone, and those in host memory: a GPU then holds two of them, however many blocks there are.
    """
    if what == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    kept_by: Callable[[], AbstractContextManager[object]] = HostMemory().hooks if what == "offload" else nullcontext
    if what == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    for block in blocks:
        block.forward = partial(_forward, block.forward, options, kept_by, _Draws())


@dataclass
class _Draws:
    """Whether a block was seen to draw random numbers on a GPU."""

    seen: bool = False


def _forward(
    forward: Any,
    options: dict[str, Any],
    kept_by: Callable[[], AbstractContextManager[object]],
    draws: _Draws,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # inside, checkpointing's own hooks see what the block keeps; these see its inputs
    with kept_by():
        if torch.compiler.is_compiling() or not torch.cuda.is_initialized():
            return checkpoint(forward, *args, **options, **kwargs)
        if torch.cuda.is_current_stream_capturing():
            # a graph cannot read the state of random numbers, which a block that draws none does not need
            return checkpoint(forward, *args, preserve_rng_state=draws.seen, **options, **kwargs)
        before = None if draws.seen else torch.cuda.get_rng_state()
        found = checkpoint(forward, *args, **options, **kwargs)
        if before is not None:
            draws.seen = not torch.equal(before, torch.cuda.get_rng_state())
        return found


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = operator.__name__ if not hasattr(operator, "overloadpacket") else operator.overloadpacket.__name__
    own = getattr(operator, "namespace", "") == "kvbind" and name not in _CHEAP
    dear = own or name in _PRODUCTS or name.startswith(_ATTENTION)
    return CheckpointPolicy.MUST_SAVE if dear else CheckpointPolicy.PREFER_RECOMPUTE
