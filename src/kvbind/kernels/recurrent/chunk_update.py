"""One chunk's update of all matrices, and its gradient: what a CUDA graph replays, chunk after chunk."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvbind.kernels.recurrent.chunk_matmul import outer, rows
from kvbind.kernels.recurrent.swiglu_gradients import factors, second_factors
from kvbind.kernels.recurrent.update_rule import Saved
from kvbind.kernels.recurrent.weight_update import apply, apply_backward, momentum_backward
from kvbind.kernels.recurrent.workspace import Workspace


class ChunkUpdate:
    """One chunk's update of all matrices; `run` is the one that a graph replays, on buffers of its own.

    Filled by callers of `run`: `k`, `v`, `rates`, `gates` (momentum, decay); by `start` the rest.
    Results: `state`, `velocities`, `found`; `weights` and `velocity` go on.
    """

    def __init__(self, workspace: Workspace, with_momentum: bool, with_decay: bool, normalize: bool) -> None:
        rule, packing, z, chunk = workspace.rule, workspace.packing, workspace.z, workspace.rule.chunk
        self.rule, self.with_momentum, self.with_decay, self.normalize = rule, with_momentum, with_decay, normalize
        self.k, self.v = workspace.rows(chunk, packing.key), workspace.rows(chunk, packing.value)
        self.rates = workspace.empty(3, workspace.batch, chunk, workspace.heads)
        # each at a multiple of 16 bytes, as where callers of `update` have them: a graph may load no other kernels
        self.gates = workspace.empty(2, z + -z % 4)[:, :z]
        self.weights, self.velocity = workspace.empty(z, packing.size), workspace.empty(z, packing.size)
        self.state = workspace.empty(1, z, packing.size, dtype=workspace.low)
        self.velocities = workspace.empty(1, z, packing.size, dtype=rule.velocity_dtype)
        self.norms, self.found = workspace.empty(z, packing.channels), workspace.empty(1, z, packing.channels)
        self.hidden, self.by_token = workspace.hidden(3, chunk)

    def start(self, weights: Tensor, velocity: Tensor | None, norms: Tensor | None) -> None:
        """Begin a sequence."""
        self.weights.copy_(weights)
        self.state[0].copy_(weights)
        if velocity is not None:
            self.velocity.copy_(velocity)
        if norms is not None:
            self.norms.copy_(norms)

    def run(self) -> None:
        momentum, decay = self.gates[0], self.gates[1:]
        self.update(self.k, self.v, self.rates, momentum, decay, self.state, self.state, self.velocities, self.found)

    def update(
        self, k: Tensor, v: Tensor, rates: Tensor, momentum: Tensor | None, decay: Tensor | None, before: Tensor,
        after: Tensor, velocities: Tensor, found: Tensor,
    ) -> None:  # fmt: skip
        """The update on tensors anywhere.

        Args:
            k: the chunk's keys `[B, chunk, H, Dk]`.
            v: its values `[B, chunk, H, Dv]`.
            rates: float32 `[3, B, chunk, H]`.
            momentum: its gate, float32 `[B*H]`; read where there is momentum.
            decay: its gate, float32 `[1, B*H]`; read where there is decay.
            before: the packed weights before it, `[1, B*H, P]` in the operands' dtype.
            after: where to put those after it; may be the same.
            velocities: where to put the writes with momentum, `[1, B*H, P]` in `ChunkRule.velocity_dtype`.
            found: where to put channels' norms, `[1, B*H, channels]`, where they are normalized.
        """
        rule, packing, chunk = self.rule, self.rule.packing, self.rule.chunk
        theta, last = packing.split(before)
        factors(k, theta, self.hidden, chunk, y=v, last=last, rates=rates)
        stored = packing.split(velocities)
        running = packing.split(self.velocity.unsqueeze(0))
        target = running if self.with_momentum else stored
        outer(
            chunk,
            theta=(k, self.by_token[:2], target[0]),
            last=(self.by_token[2], v, target[1]),
            add=running if self.with_momentum else None,
            gates=momentum if self.with_momentum else None,
            copy=stored if self.with_momentum else None,
        )
        updates = rule.orthogonalize(velocities)
        normed = (self.norms, found) if self.normalize else (None, None)
        apply(packing, self.weights, updates, after, rule.sign, decay if self.with_decay else None, *normed)


class ChunkUpdateBackward:
    """The gradient of `ChunkUpdate`, on buffers of its own.

    Filled by callers: `k`, `v`, `rates` and `gates` as those of `ChunkUpdate`, `states` (before and after the chunk),
    `velocity` (before it), `saved` (by `keep`), `found`, `reads` (the gradient of the weights that its tokens read), and by
    `start`. Results: `dk`, `dv`, `d_rates`, `d_gates`; `grad`, `d_velocity` and `d_norms` go on.
    """

    def __init__(self, workspace: Workspace, with_momentum: bool, with_decay: bool, normalize: bool) -> None:
        rule, packing, z, chunk = workspace.rule, workspace.packing, workspace.z, workspace.rule.chunk
        self.rule, self.with_momentum, self.with_decay, self.normalize = rule, with_momentum, with_decay, normalize
        self.k, self.v = workspace.rows(chunk, packing.key), workspace.rows(chunk, packing.value)
        self.dk, self.dv = torch.empty_like(self.k), torch.empty_like(self.v)
        self.rates, self.d_rates = (workspace.empty(3, workspace.batch, chunk, workspace.heads) for _ in range(2))
        self.gates, self.d_gates = workspace.empty(2, z), workspace.empty(2, z)
        self.packed = workspace.empty(3, z, packing.size, dtype=workspace.low)
        self.d_written, self.states = self.packed[:1], self.packed[1:]
        self.velocity = workspace.empty(1, z, packing.size, dtype=rule.velocity_dtype)
        self.saved: list[Saved] = []
        self.d_updates = workspace.empty(1, z, packing.size, dtype=rule.velocity_dtype)
        self.reads = workspace.empty(1, z, packing.size)
        self.grad, self.carry, self.d_velocity = (workspace.empty(z, packing.size) for _ in range(3))
        self.norms, self.d_norms, self.found = (workspace.empty(*lead, z, packing.channels) for lead in ((), (), (1,)))
        self.hidden, self.by_token = workspace.hidden(6, chunk)

    def keep(self, saved: Sequence[Saved]) -> list[tuple[Tensor, Tensor]]:
        """What to copy for this chunk's part of `ChunkRule.saved` to be here; at first, it is copied at once."""
        if not self.saved:
            self.saved = [
                (states.clone(memory_format=torch.contiguous_format), squares.clone()) for states, squares in saved
            ]
            return []
        pairs = []
        for (here, here_squares), (there, there_squares) in zip(self.saved, saved, strict=True):
            pairs += [*zip(here, there, strict=True), (here_squares, there_squares)]
        return pairs

    def start(self, grad: Tensor, d_velocity: Tensor, norms: Tensor | None) -> None:
        """Begin at a sequence's end."""
        self.grad.copy_(grad)
        self.d_velocity.copy_(d_velocity)
        self.d_norms.zero_()
        if norms is not None:
            self.norms.copy_(norms)

    def run(self) -> None:
        rule, packing, chunk = self.rule, self.rule.packing, self.rule.chunk
        normed = (self.norms, self.found, self.d_norms) if self.normalize else (None, None, None)
        decay = self.gates[1:] if self.with_decay else None
        d_decay = apply_backward(
            packing,
            self.grad,
            self.carry,
            self.states,
            self.reads,
            self.d_updates,
            rule.sign,
            rule.own_chunk,
            decay,
            *normed,
        )
        if d_decay is not None:
            self.d_gates[1:].copy_(d_decay)
        d_velocities = rule.orthogonalize_backward(self.saved, self.d_updates)
        if self.with_momentum:
            found = momentum_backward(self.d_velocity, d_velocities, self.velocity, self.gates[:1], self.d_written)
            self.d_gates[:1].copy_(found)
        else:
            self.d_written.copy_(d_velocities)

        weights, grads = packing.split(self.packed[1]), packing.split(self.packed[0])
        d_rates = second_factors(self.k, self.v, weights, grads, self.rates, self.hidden)
        self.d_rates.copy_(d_rates.unflatten(1, (self.k.shape[0], -1)).transpose(2, 3))
        d_theta, d_last = packing.split(self.grad.unsqueeze(0))
        outer(
            chunk,
            theta=(self.k, self.by_token[2:4], d_theta),
            last=(self.by_token[5], self.v, d_last),
            add=packing.split(self.carry.unsqueeze(0)),
        )
        theta, last = packing.split(self.packed[:2].unsqueeze(1))
        rows(self.by_token[:4], theta.unflatten(-1, (2, -1)), self.dk, chunk, transposed=True)
        rows(self.by_token[4:], last.unsqueeze(3), self.dv, chunk)
