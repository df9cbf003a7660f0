"""Operands like those a trained layer gives to `ttt`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvbind.forms.api import Form, ttt
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


def draw_gate(gate: Gate, noise: Tensor) -> Tensor:
    """A gate of standard normal `noise`: near 1/2, or near 1 where learned ones start there."""
    return torch.sigmoid(noise if gate.start is None else noise + 4)


@dataclass(frozen=True)
class Operands:
    """The tensors of one call of `ttt`."""

    weights: dict[str, Tensor]
    q: Tensor
    k: Tensor
    v: Tensor
    gates: dict[str, Any]

    @staticmethod
    def draw(spec: InnerLoop, size: Size, seed: int = 0) -> Operands:
        """Random operands in float64: unit-norm silu'd queries and keys, rates near 0.02, gates near 1/2."""
        generator = torch.Generator().manual_seed(seed)
        shape = (size.batch, size.tokens, size.heads)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        gates: dict[str, Any] = {"lr": F.softplus(normal(*shape) - 4) if spec.token_lr else 1.0}
        gates |= {name: draw_gate(gate, normal(*shape)) for name, gate in spec.gates.items()}
        hidden = None if isinstance(spec.network, DepthwiseConv) else size.width
        weights = spec.network.initial(size.heads, size.width, size.width, hidden, generator=generator, dtype=torch.float64)
        q, k = (F.normalize(F.silu(normal(*shape, size.width)), dim=-1) for _ in range(2))
        return Operands(weights, q, k, F.silu(normal(*shape, size.width)), gates)

    def map(self, change: Any) -> Operands:
        """These operands with every tensor changed."""
        gates = {name: change(x) if isinstance(x, Tensor) else x for name, x in self.gates.items()}
        weights = {name: change(x) for name, x in self.weights.items()}
        return Operands(weights, change(self.q), change(self.k), change(self.v), gates)

    def to(self, device: torch.device, dtype: torch.dtype, wide: torch.dtype) -> Operands:
        """q, k and v in `dtype`, weights, rates and gates in `wide`."""
        moved = self.map(lambda x: x.to(device, wide))
        return replace(moved, q=moved.q.to(dtype), k=moved.k.to(dtype), v=moved.v.to(dtype))

    def leaves(self) -> list[Tensor]:
        """Every tensor."""
        gates = [x for x in self.gates.values() if isinstance(x, Tensor)]
        return [*self.weights.values(), self.q, self.k, self.v, *gates]

    def run(self, spec: InnerLoop, form: Form = "auto") -> Tensor:
        """The outputs of `ttt` on these operands."""
        return ttt(spec, self.weights, self.q, self.k, self.v, form=form, **self.gates)[0]
