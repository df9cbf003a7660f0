"""Gates: what tokens bring to the update rule beside keys, values and rates, each declared once.

A declaration says by which name an inner loop asks for a gate and `ttt` takes it, what shape it has, where in the rule it
acts and how the tokens of a chunk share it. Validation, tokens, states, packing, ranks, layers and benchmarks carry the
gates of an inner loop, `InnerLoop.gates`, as one mapping by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Gate:
    """One gate.

    Attributes:
        name: of the field of `InnerLoop` that asks for it, and of the argument of `ttt` that gives it.
        acts: what it does in the rule, for messages and documentation.
        start: what a learned gate is near before training; None where layers leave that to its projection.
    """

    name: str
    acts: str
    start: float | None = None

    @property
    def axes(self) -> str:
        """Its shape, in words."""
        return "[B, T, H]"


GATES: tuple[Gate, ...] = (
    Gate("momentum", "line 2: what is left of the buffer, averaged over each chunk"),
    Gate("retention", "line 5: what is left of the weights, averaged over each chunk", start=0.99),
)
"""Every gate, in the order in which states and layers hold them."""


def decays(gates: Mapping[str, T]) -> tuple[T | None, T | None]:
    """What multiplies the momentum buffer and the weights: the two gates that parallel forms and kernels are made for."""
    return gates.get("momentum"), gates.get("retention")


def given_gates(**gates: T | None) -> dict[str, T]:
    """The gates that were given, by name."""
    return {name: gate for name, gate in gates.items() if gate is not None}
