"""Operators called past PyTorch's dispatcher where it has nothing to do.

The dispatcher takes an operator that is written in Python through autograd, wrappers against tracing and checks of aliases,
which costs the host more than a launch. Without tracing or modes that watch operators, all that is left of it is a call of
the operator's body, inside an autograd function of its own where there are gradients.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch.library import CustomOpDef

from kvbind.kernels.common.tracing import is_differentiated, is_unwatched


def call(operator: CustomOpDef, *args: Any) -> Any:
    """What `operator(*args)` returns.

    Args:
        operator: of `torch.library.custom_op`.
        *args: its arguments.
    """
    body = getattr(operator, "_init_fn", None)
    if body is None or not is_unwatched(args):
        return operator(*args)
    if not is_differentiated(args):
        return body(*args)
    function = _function_of(operator)
    return operator(*args) if function is None else function.apply(*args)


@cache
def _function_of(operator: CustomOpDef) -> Any:
    """An operator with the gradient registered for it, or None where it has none, or takes or gives lists of tensors."""
    gradient: Any = getattr(operator, "_backward_fn", None)
    keep: Any = getattr(operator, "_setup_context_fn", None)
    schema = operator._opoverload._schema
    if gradient is None or any("Tensor" in str(x.type) and "List" in str(x.type) for x in schema.arguments + schema.returns):
        return None

    class Differentiated(torch.autograd.Function):
        """The operator, past the dispatcher."""

        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output = operator._init_fn(*args)
            if keep is not None:
                keep(ctx=ctx, inputs=args, output=output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return gradient(ctx, *grads)

    return Differentiated


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
