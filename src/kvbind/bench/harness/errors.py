"""What an evaluation of something to verify gave, and how far it is from another."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class Evaluation:
    """What one evaluation of a case gave.

    Attributes:
        output: of any shape.
        states: the tensors of the last state, by name.
        gradients: by leaf; zeros where nothing reaches one.
    """

    output: Tensor
    states: dict[str, Tensor]
    gradients: dict[str, Tensor] = field(default_factory=dict)


def relative_errors(result: Evaluation, reference: Evaluation) -> dict[str, Any]:
    """Relative errors of the output, of each gradient, and of the worst of the state's tensors.

    Those of "state" are the fast weights and what else updates enter; of "kept", norms and pending tokens, which none does.
    """
    states = {name: _relative(x, reference.states[name]) for name, x in result.states.items()}
    return {
        "output": _relative(result.output, reference.output),
        "state": max((error for name, error in states.items() if moves(name)), default=0.0),
        "kept": max((error for name, error in states.items() if not moves(name)), default=0.0),
        "gradients": {name: _relative(x, reference.gradients[name]) for name, x in result.gradients.items()},
    }


def moves(name: str) -> bool:
    """Whether updates enter a state's tensor of that name."""
    return name.partition(".")[0] in ("weights", "momentum", "accumulated")


def _relative(x: Tensor, reference: Tensor) -> float:
    size = float(reference.double().norm())
    # what is zero in exact arithmetic, such as the gradient of an unused gate, must be zero
    return float((x.double() - reference.double()).norm()) / (size or 1.0)
