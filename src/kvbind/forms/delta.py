"""Recurrences of one matrix that tokens correct one by one, on operators: which calls these take, and which operator runs.

The delta rule and its kin (arXiv 2406.06484, 2412.06464, 2510.26692): a linear network, one write of a token at a time,
gradients renewed at each, gates per head or per key channel, before the gradient or after it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from kvbind.forms import fla
from kvbind.forms.state import State
from kvbind.forms.validation import Operands
from kvbind.inner.spec import InnerLoop

log = logging.getLogger(__name__)

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


def beside(spec: InnerLoop, call: Operands, own: Choice) -> Choice:
    """What runs a call in the parallel form: what the library has for it, or flash-linear-attention's operator.

    That one runs where it takes the call, and either was measured to be faster or is the only one (`kvbind.forms.fla`).

    Args:
        spec: the inner loop.
        call: its sequences are of equal length, or packed.
        own: of the library's kernels; PyTorch where its name is None.
    """
    reason = fla.obstacle(spec, call)
    if reason is not None:
        return own._replace(why=f"{own.why}; flash-linear-attention: {reason}")
    operator = fla.operator_of(spec)
    assert isinstance(operator, fla.Operator)
    why = own.why if own.name is None else fla.preferred(operator, call)
    if why is None:
        return own._replace(why=f"{own.why}; {operator.name} was not measured to be faster")
    return Choice(f"{operator.name} of {fla.PACKAGE} {fla.installed()}", why, fla.fla_form)


_said: set[tuple[str, str | None]] = set()


def say(spec: InnerLoop, choice: Choice) -> None:
    """Log what runs an inner loop where that might have been another package, once for each of both."""
    if (spec.text, choice.name) in _said or isinstance(fla.operator_of(spec), str) or fla.installed() is None:
        return
    _said.add((spec.text, choice.name))
    log.info("%s runs on %s: %s", spec, choice.name or "PyTorch", choice.why)
