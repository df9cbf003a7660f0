"""The calls of `kvbind.ttt` that a model's layers make, seen from outside: real operands, whatever the layer around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from torch import Tensor

from kvbind.forms.api import ttt
from kvbind.forms.state import State
from kvbind.inner.spec import InnerLoop
from kvbind.layers import full, lact

LAYERS = (lact, full)
"""The modules whose layers call `ttt`."""


@dataclass(frozen=True)
class Call:
    """A call of `ttt`, and what it gave.

    Attributes:
        spec: the inner loop.
        weights: starting fast weights by matrix name; None where the call goes on from a state.
        q: queries `[B, T, H, Dk]`.
        k: keys `[B, T, H, Dk]`.
        v: values `[B, T, H, Dv]`.
        options: the keyword arguments.
        output: `[B, T, H, Dv]`.
    """

    spec: InnerLoop
    weights: dict[str, Tensor] | None
    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Any]
    output: Tensor


@contextmanager
def seen_calls(see: Callable[[Call], None]) -> Iterator[None]:
    """Show every call that layers make, in their order, to `see`; what they compute stays the same."""

    def seeing(
        spec: InnerLoop, weights: dict[str, Tensor] | None, q: Tensor, k: Tensor, v: Tensor, **options: Any
    ) -> tuple[Tensor, State]:
        output, state = ttt(spec, weights, q, k, v, **options)
        see(Call(spec, weights, q, k, v, options, output))
        return output, state

    with ExitStack() as stack:
        for module in LAYERS:
            stack.enter_context(patch.object(module, "ttt", seeing))
        yield
