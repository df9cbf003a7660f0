"""Recomputing blocks in the backward pass, and where it cannot be."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl

from kvbind.kernels.common.tracing import is_transformed


def check_recomputing() -> None:
    """Refuse to recompute where PyTorch cannot.

    Raises:
        ValueError: inside a transform of `torch.func`.
    """
    if is_transformed():
        raise ValueError(
            "gradient checkpointing must be off inside torch.func's transforms, which cannot recompute: call "
            "gradient_checkpointing_disable() or set_grad_checkpointing(False) of the model"
        )


def is_recomputed(block: nn.Module) -> bool:
    """Whether transformers has a block recomputed as things stand."""
    return block.training and bool(getattr(block, "gradient_checkpointing", False))


def is_reentrant(block: nn.Module) -> bool:
    """Whether a block runs under a checkpoint that knows gradients of tensors alone, not of those inside other arguments."""
    if getattr(block, "checkpoint_impl", None) is CheckpointImpl.REENTRANT:
        return True
    given: Any = getattr(block, "_gradient_checkpointing_func", None)
    # what is left open is reentrant, too
    return is_recomputed(block) and getattr(given, "keywords", {}).get("use_reentrant") is not False
