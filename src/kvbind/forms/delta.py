"""Recurrences of one matrix that tokens correct one by one, on operators: which calls these take, and which operator runs.

The delta rule and its kin (arXiv 2406.06484, 2412.06464, 2510.26692): a linear network, one write of a token at a time,
gradients renewed at each, gates per head or per key channel, before the gradient or after it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from kvbind.forms.state import State
from kvbind.forms.validation import Operands
from kvbind.inner.spec import InnerLoop

Engine = Callable[[InnerLoop, Operands], tuple[Tensor, State]]


class Choice(NamedTuple):
    """What runs a call.

    Attributes:
        name: of the runner, or None where no operator takes the call.
        why: the reason, in words.
        run: the runner.
    """

    name: str | None
    why: str
    run: Engine | None = None


def runner(spec: InnerLoop, call: Operands) -> Choice:
    """The fastest operator that takes a call."""
    return Choice(None, "no operator takes it")
