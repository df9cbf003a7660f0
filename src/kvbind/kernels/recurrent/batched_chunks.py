"""Work on many chunks at once: what their tokens read, and writes to the last layer where it alone is updated."""

from __future__ import annotations

import torch
from torch import Tensor

from kvbind.kernels.recurrent.chunk_matmul import outer, rows
from kvbind.kernels.recurrent.swiglu_gradients import factors
from kvbind.kernels.recurrent.workspace import Workspace


class BatchedReads:
    """What tokens read, for many chunks at once."""

    def __init__(self, workspace: Workspace, theta: Tensor | None) -> None:
        self.workspace, self.packing = workspace, workspace.packing
        self.chunk, self.swiglu = workspace.rule.chunk, workspace.rule.swiglu
        self.static = None if theta is None else theta.flatten(0, 1).to(workspace.low).unsqueeze(0)

    def weights(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """The first layers and the last of some chunks."""
        theta, last = self.packing.split(states)
        return (theta if self.static is None else self.static.expand(len(states), -1, -1)), last

    def forward(self, q: Tensor, states: Tensor, out: Tensor) -> None:
        """Read `q` from the states of its chunks."""
        theta, last = self.weights(states)
        if self.swiglu:
            hidden, features = self.workspace.hidden(1, q.shape[1])
            factors(q, theta, hidden, self.chunk)
        else:
            features = q.unsqueeze(0)
        rows(features, _matrices(last, 1), out, self.chunk)

    def backward(self, q: Tensor, states: Tensor, grad: Tensor, dq: Tensor) -> tuple[Tensor, Tensor | None]:
        """Write the gradient of `q`; return those of the states, `[chunks, B*H, P]`, and of `theta`, if that is static."""
        theta, last = self.weights(states)
        reads = self.workspace.empty(len(states), self.workspace.z, self.packing.size)
        d_theta, d_last = self.packing.split(reads)
        if not self.swiglu:
            rows(grad.unsqueeze(0), _matrices(last, 1), dq, self.chunk, transposed=True)
            outer(self.chunk, last=(q, grad, d_last))
            return reads, None
        if self.static is not None:
            d_theta = self.workspace.empty(len(states), self.workspace.z, self.static.shape[-1])
        hidden, by_token = self.workspace.hidden(3, q.shape[1])
        factors(q, theta, hidden, self.chunk, y=grad, last=last)
        outer(self.chunk, theta=(q, by_token[:2], d_theta), last=(by_token[2], grad, d_last))
        rows(by_token[:2], _matrices(theta, 2), dq, self.chunk, transposed=True)
        return reads, None if self.static is None else d_theta.sum(0)


class LastLayerWrites:
    """Writes to the last layer alone, for many chunks at once."""

    def __init__(self, workspace: Workspace, reader: BatchedReads) -> None:
        self.workspace, self.packing, self.chunk, self.reader = workspace, workspace.packing, workspace.rule.chunk, reader

    def _rated(self, k: Tensor, rates: Tensor) -> Tensor:
        return (k * rates[0].unsqueeze(-1)).to(k.dtype)

    def forward(self, k: Tensor, v: Tensor, rates: Tensor, out: Tensor) -> None:
        """Sum each chunk's writes into `out`, `[chunks, B*H, P]`."""
        if self.workspace.rule.swiglu:
            hidden, features = self.workspace.hidden(1, k.shape[1])
            factors(k, self.reader.weights(out)[0], hidden, self.chunk, rates=rates)
            rated = features[0]
        else:
            rated = self._rated(k, rates)
        outer(self.chunk, last=(rated, v, out))

    def backward(
        self, k: Tensor, v: Tensor, rates: Tensor, grads: Tensor, dk: Tensor, dv: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Write the gradients of `k` and `v`; return those of the rates, `[B, T, H]`, and of `theta`."""
        last = _matrices(grads, 1)
        if not self.workspace.rule.swiglu:
            pulled = torch.empty_like(k, dtype=torch.float32, memory_format=torch.contiguous_format)
            rows(v.unsqueeze(0), last, pulled, self.chunk, transposed=True)
            rows(self._rated(k, rates).unsqueeze(0), last, dv, self.chunk)
            dk.copy_(pulled * rates[0].unsqueeze(-1))
            return (pulled * k).sum(-1), None
        theta, _ = self.reader.weights(grads)
        hidden, by_token = self.workspace.hidden(3, k.shape[1])
        sums = factors(k, theta, hidden, self.chunk, y=v, last=grads, rates=rates.expand(3, -1, -1, -1), sums=True)
        assert sums is not None
        d_theta = self.workspace.empty(len(grads), self.workspace.z, theta.shape[-1])
        outer(self.chunk, theta=(k, by_token[:2], d_theta))
        rows(by_token[:2], _matrices(theta, 2), dk, self.chunk, transposed=True)
        rows(by_token[2:], last, dv, self.chunk)
        return sums.unflatten(0, (self.workspace.batch, -1)).transpose(1, 2), d_theta.sum(0)


def _matrices(x: Tensor, count: int) -> Tensor:
    """A slice of packed weights `[chunks, B*H, count * in * out]` as `rows` takes it."""
    return x.unflatten(-1, (count, -1)).unsqueeze(0)
