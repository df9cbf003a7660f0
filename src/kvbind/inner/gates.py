"""Gates: what tokens bring to the update rule beside keys, values and rates, each declared once.

A declaration says by which name an inner loop asks for a gate and `ttt` takes it, what shape it has, where in the rule it
acts and how the tokens of a chunk share it. Validation, tokens, states, packing, ranks, layers and benchmarks carry the
gates of an inner loop, `InnerLoop.gates`, as one mapping by name.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from kvbind.files import shortened

T = TypeVar("T")

LEAST = -sys.float_info.max
"""The least number that is one."""


@dataclass(frozen=True)
class Gate:
    """One gate.

    Attributes:
        name: of the field of `InnerLoop` that asks for it, and of the argument of `ttt` that gives it.
        acts: what it does in the rule, for messages and documentation.
        per: "head", `[B, T, H]`, or "key", one number for each key channel, `[B, T, H, Dk]`.
        chunk: what a chunk takes of its tokens' gates: their "mean", or the "last"; "own" for what stays with each token.
        writes: whose it is where a token writes several times: of its "first" write (the others take 1), of "each" alike, or
            given for every write by "itself".
        neutral: what leaves weights and buffers as they are.
        start: what a learned gate is near before training; None where layers leave that to its projection.
    """

    name: str
    acts: str
    per: Literal["head", "key"] = "head"
    chunk: Literal["mean", "last", "own"] = "mean"
    writes: Literal["first", "each", "itself"] = "each"
    neutral: float = 1.0
    start: float | None = None

    @property
    def axes(self) -> str:
        """Its shape, in words."""
        return "[B, T, H, Dk]" if self.per == "key" else "[B, T, H]"

    def of(self, value: Any) -> Gate:
        """This gate as a field's value asks for it."""
        return replace(self, per=getattr(value, "per", self.per))


GATES: tuple[Gate, ...] = (
    Gate("momentum", "line 2: what is left of the buffer"),
    Gate("retention", "line 5: what is left of the weights", writes="first", start=0.99),
    Gate("erase", "line 1: the key at which the residual reads", per="key", chunk="own", writes="itself"),
    Gate("read_rate", "how much of its span's writes a token sees", chunk="last"),
    Gate("step_rate", "line 3': a factor on the finished update", neutral=0.0),
)
"""Every gate, in the order in which states and layers hold them."""

DECLARED = {gate.name: gate for gate in GATES}


def decays(gates: Mapping[str, T]) -> tuple[T | None, T | None]:
    """What multiplies the momentum buffer and the weights: the two gates that parallel forms and kernels are made for."""
    return gates.get("momentum"), gates.get("retention")


def given_gates(log_retention: Any = None, **gates: Any) -> dict[str, Any]:
    """The gates that were given, by name.

    Args:
        log_retention: the logarithm of that gate in its place, or None.
        gates: gates by name; None for those that were not given.

    Raises:
        ValueError: a gate that was given as it is and as a logarithm.
        TypeError: a logarithm that is neither a number nor a floating-point tensor.
    """
    given = {}
    for name, gate in gates.items():
        if gate is not None:
            given[name] = gate
    log = log_retention
    if log is None:
        return given
    if "retention" in given:
        raise ValueError("log_retention must be None beside retention, of which it is the logarithm; got both")
    if isinstance(log, int | float) and not isinstance(log, bool):
        if not log <= 0:
            raise ValueError(f"log_retention must be at most 0, as a retention is at most 1; got {shortened(log)}")
        # an int may be too large for a float, which is all that `exp` takes
        return given | {"retention": math.exp(max(log, LEAST))}
    if not isinstance(log, Tensor) or not log.is_floating_point():
        found = log.dtype if isinstance(log, Tensor) else type(log).__name__
        raise TypeError(f"log_retention must be a number or a floating-point tensor; got {found}")
    return given | {"retention": log.to(torch.promote_types(log.dtype, torch.float32)).exp()}
