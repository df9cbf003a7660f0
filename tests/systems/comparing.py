"""Two ways of computing one thing, held against each other: outputs, states, and the gradients of all operands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten_with_path, tree_map

Run = Callable[[Mapping[str, Any]], tuple[Tensor, Mapping[str, Tensor]]]
"""Operands to outputs and state."""


class InDouble(TorchFunctionMode):
    """Code that casts to float32 or bfloat16 on its own computes in float64 instead; everything else in it stays."""

    def __enter__(self) -> InDouble:
        self.default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        torch.set_default_dtype(self.default)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def lifted(x: Any) -> Any:
            return torch.float64 if x is torch.float32 or x is torch.bfloat16 else x

        if func in (torch.Tensor.float, torch.Tensor.bfloat16):
            return args[0].double()
        return func(*map(lifted, args), **{name: lifted(x) for name, x in (kwargs or {}).items()})


@dataclass(frozen=True)
class Difference:
    """Largest differences, each relative to the largest entry of the tensor it is of; the largest over tensors.

    Attributes:
        output: of outputs.
        state: of states, over those that both have; None where there are none.
        gradients: of a fixed random sum of outputs and common states, over all operands.
        at: the operand whose gradient differs most.
    """

    output: float
    state: float | None
    gradients: float
    at: str

    @property
    def largest(self) -> float:
        return max(self.output, self.state or 0.0, self.gradients)


def relative(x: Tensor, reference: Tensor) -> float:
    """Infinite where shapes differ or anything is not finite."""
    if x.shape != reference.shape or not bool(x.isfinite().all()) or not bool(reference.isfinite().all()):
        return float("inf")
    return float((x - reference).abs().max() / reference.abs().max().clamp(min=1e-300))


def differentiated(run: Run, operands: Mapping[str, Any], names: list[str] | None) -> Any:
    """Outputs, state and gradients by operand; `names` are the states that enter the sum, all where None."""
    leaves = tree_map(lambda x: x.detach().clone().requires_grad_(), dict(operands))
    output, state = run(leaves)
    named = sorted(state) if names is None else names
    generator = torch.Generator().manual_seed(7)
    total = sum(
        (x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for x in (output, *(state[n] for n in named))
    )
    flat, _ = tree_flatten_with_path(leaves)
    gradients = torch.autograd.grad(total, [x for _, x in flat], allow_unused=True, materialize_grads=True)
    paths = [".".join(str(getattr(key, "key", key)) for key in path) for path, _ in flat]
    return output.detach(), {n: state[n].detach() for n in named}, dict(zip(paths, gradients, strict=True))


def difference(found: Run, expected: Run, operands: Mapping[str, Any]) -> Difference:
    """How far `found` is from `expected` on the same operands."""
    with torch.no_grad():
        names = sorted(set(found(operands)[1]) & set(expected(operands)[1]))
    output, state, gradients = differentiated(found, operands, names)
    output_, state_, gradients_ = differentiated(expected, operands, names)
    apart = {
        name: relative(x, gradients_[name]) for name, x in gradients.items() if bool(gradients_[name].any()) or bool(x.any())
    }
    at = max(apart, key=apart.__getitem__)
    return Difference(
        relative(output, output_), max((relative(state[n], state_[n]) for n in names), default=None), apart[at], at
    )
