"""Operands like those a trained layer gives to `ttt`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvbind.forms.api import ttt
from kvbind.forms.evaluate import Form
from kvbind.inner.gates import Gate
from kvbind.inner.networks import DepthwiseConv
from kvbind.inner.spec import InnerLoop


@dataclass(frozen=True)
class Size:
    """The sizes of one call.

    Attributes:
        batch: sequences.
        tokens: per sequence.
        heads: fast heads.
        width: channels of queries, keys, values and the hidden layer, per head.
    """

    batch: int
    tokens: int
    heads: int
    width: int


def draw_gate(spec: InnerLoop, gate: Gate, size: Size, normal: Callable[..., Tensor]) -> Tensor:
    """A gate near 1/2, or near 1 where learned ones start there; keys of unit norm for those that are keys.

    Args:
        spec: the inner loop.
        gate: one of its gates.
        size: of the call.
        normal: draws standard normal numbers of a shape.
    """
    rows = size.tokens * (spec.writes if gate.writes == "itself" else 1)
    noise = normal(size.batch, rows, size.heads, *((size.width,) if gate.per == "key" else ()))
    if gate.chunk == "own":
        return F.normalize(F.silu(noise), dim=-1)
    return torch.sigmoid(noise if gate.start is None else noise + 4)


@dataclass(frozen=True)
class DrawnOperands:
    """The tensors of one call of `ttt`."""

    weights: dict[str, Tensor]
    q: Tensor
    k: Tensor
    v: Tensor
    gates: dict[str, Any]

    @staticmethod
    def draw(spec: InnerLoop, size: Size, seed: int = 0) -> DrawnOperands:
        """Random operands in float64: unit-norm silu'd queries and keys, rates near 0.02, gates near 1/2."""
        generator = torch.Generator().manual_seed(seed)
        shape = (size.batch, size.tokens, size.heads)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        rows = (size.batch, size.tokens * spec.writes, size.heads)
        gates: dict[str, Any] = {"lr": F.softplus(normal(*rows) - 4) if spec.token_lr else 1.0}
        gates |= {name: draw_gate(spec, gate, size, normal) for name, gate in spec.gates.items()}
        hidden = None if isinstance(spec.network, DepthwiseConv) else size.width
        weights = spec.network.initial(size.heads, size.width, size.width, hidden, generator=generator, dtype=torch.float64)
        q, k = (F.normalize(F.silu(normal(*x, size.width)), dim=-1) for x in (shape, rows))
        return DrawnOperands(weights, q, k, F.silu(normal(*rows, size.width)), gates)

    def map(self, change: Any) -> DrawnOperands:
        """These operands with every tensor changed."""
        gates = {name: change(x) if isinstance(x, Tensor) else x for name, x in self.gates.items()}
        weights = {name: change(x) for name, x in self.weights.items()}
        return DrawnOperands(weights, change(self.q), change(self.k), change(self.v), gates)

    def to(self, device: torch.device, dtype: torch.dtype, wide: torch.dtype) -> DrawnOperands:
        """q, k and v in `dtype`, weights, rates and gates in `wide`."""
        moved = self.map(lambda x: x.to(device, wide))
        return replace(moved, q=moved.q.to(dtype), k=moved.k.to(dtype), v=moved.v.to(dtype))

    def leaves(self) -> list[Tensor]:
        """Every tensor of the call, for gradients."""
        gates = [x for x in self.gates.values() if isinstance(x, Tensor)]
        return [*self.weights.values(), self.q, self.k, self.v, *gates]

    def run(self, spec: InnerLoop, form: Form = "auto") -> Tensor:
        """The outputs of `ttt` on these operands."""
        return ttt(spec, self.weights, self.q, self.k, self.v, form=form, **self.gates)[0]
