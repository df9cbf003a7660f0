"""Operators called past PyTorch's dispatcher where it has nothing to do.

The dispatcher takes an operator that is written in Python through autograd, wrappers against tracing and checks of aliases,
which costs the host more than a launch. Without gradients, tracing or modes that watch operators, all that is left of it is
a call of the operator's body.
"""

from __future__ import annotations

import contextlib
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


_UNMARKED = contextlib.nullcontext()


def marked(name: str) -> contextlib.AbstractContextManager[Any]:
    """A mark in profiles, `kvbind::name`, of what is no operator; where nothing profiles it costs nothing."""
    return torch.profiler.record_function(f"kvbind::{name}") if torch.autograd._profiler_enabled() else _UNMARKED
