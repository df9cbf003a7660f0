"""Operators called past PyTorch's dispatcher where it has nothing to do.

The dispatcher takes an operator that is written in Python through autograd, wrappers against tracing and checks of aliases,
which costs the host more than a launch. Without gradients, tracing or modes that watch operators, all that is left of it is
a call of the operator's body.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch.library import CustomOpDef

from kvbind.kernels.common.tracing import is_plain


def call(operator: CustomOpDef, *args: Any) -> Any:
    """What `operator(*args)` returns.

    Args:
        operator: of `torch.library.custom_op`.
        *args: its arguments.
    """
    body = getattr(operator, "_init_fn", None)
    return body(*args) if body is not None and is_plain(args) else operator(*args)


def asked(needs: Sequence[bool], *gradients: Any) -> tuple[Any, ...]:
    """What a backward returns: the gradients that autograd asks for, and None for all other inputs.

    Args:
        needs: `ctx.needs_input_grad`.
        *gradients: of the first inputs, in their order.
    """
    found = tuple(x if wanted else None for x, wanted in zip(gradients, needs, strict=False))
    return found + (None,) * (len(needs) - len(found))


_UNMARKED = contextlib.nullcontext()


def marked(name: str) -> contextlib.AbstractContextManager[Any]:
    """A mark in profiles, `kvbind::name`, of what is no operator; where nothing profiles it costs nothing."""
    return torch.profiler.record_function(f"kvbind::{name}") if torch.autograd._profiler_enabled() else _UNMARKED
