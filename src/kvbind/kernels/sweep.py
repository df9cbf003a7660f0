"""The parts of a sweep through chunks: one chunk's update and its gradient, reads, and writes to a last layer alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvbind.kernels.bank import Bank
from kvbind.kernels.chunk_matmul import outer, rows
from kvbind.kernels.newton_schulz import newton_schulz_backward, newton_schulz_forward
from kvbind.kernels.swiglu_write import factors, second_factors
from kvbind.kernels.weight_update import apply, apply_backward, momentum_backward

SEGMENT_ROWS = 1 << 16
"""Tokens times heads whose reads, and their gradients, are computed at once, at most."""

SEGMENT_ELEMENTS = 1 << 24
"""Elements of the weights that they read, at most."""

TOGETHER = 1 << 24
"""Elements from which one launch for several tensors keeps a GPU busy: it has a block for every 2^16."""

ALONE = 1 << 20
"""Elements from which a tensor is copied by itself where one launch would not."""

Kept = tuple[Tensor, Tensor]
"""What Newton-Schulz keeps for its gradient."""


@dataclass(frozen=True)
class Rule:
    """What stays the same from call to call.

    Attributes:
        chunk: tokens in a chunk.
        bank: the layout of the updated matrices.
        swiglu: features are SwiGLU's, not the keys themselves.
        sign: what updates are multiplied by.
        own_chunk: tokens read the weights after their chunk, not before it.
        coefficients: of Newton-Schulz, three per iteration; none without it.
        precision: of Newton-Schulz.
    """

    chunk: int
    bank: Bank
    swiglu: bool
    sign: float
    own_chunk: bool
    coefficients: tuple[float, ...]
    precision: torch.dtype

    @property
    def velocity_dtype(self) -> torch.dtype:
        """In which updates are stored before orthogonalization."""
        return self.precision if self.coefficients else torch.float32

    @property
    def triples(self) -> list[tuple[float, ...]]:
        """The coefficients, an iteration each."""
        return [self.coefficients[i : i + 3] for i in range(0, len(self.coefficients), 3)]

    def orthogonalize(self, x: Tensor) -> Tensor:
        """`[chunks, B*H, P]` orthogonalized, or as it is."""
        if not self.coefficients:
            return x
        return _joined([newton_schulz_forward(part, self.triples, self.precision, False)[0] for part in self.bank.groups(x)])

    def kept(self, x: Tensor) -> list[Kept]:
        """What the gradient of `orthogonalize` needs, for each group of matrices of one shape."""
        if not self.coefficients:
            return []
        return [newton_schulz_forward(part, self.triples, self.precision, True)[1] for part in self.bank.groups(x)]

    def orthogonalize_backward(self, kept: Sequence[Kept], grad: Tensor) -> Tensor:
        """The gradient of `orthogonalize`, float32."""
        if not self.coefficients:
            return grad
        groups = zip(kept, self.bank.groups(grad), strict=True)
        return _joined([newton_schulz_backward(x, d, self.triples, self.precision, torch.float32) for x, d in groups])

    def segment(self, heads: int) -> int:
        """How many chunks of so many sequences and heads are worked on at once."""
        return max(1, min(SEGMENT_ROWS // (self.chunk * heads), SEGMENT_ELEMENTS // (self.bank.size * heads)))

    def segments(self, chunks: int, heads: int) -> list[tuple[int, int]]:
        """Ranges of chunks that are worked on at once."""
        step = self.segment(heads)
        return [(start, min(start + step, chunks)) for start in range(0, chunks, step)]


def chunk_of(kept: Sequence[Kept], place: int, count: int) -> list[Kept]:
    """One chunk's part of what `Rule.kept` gave for `count` chunks."""
    parts = []
    for states, squares in kept:
        each = len(squares) // count
        here = slice(place * each, (place + 1) * each)
        parts.append((states[:, here], squares[here]))
    return parts


def copy(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy tensors to (first) from (second); those that are contiguous in a launch per dtype, or alone if that is faster."""
    to: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in pairs:
        if target.dtype == source.dtype and target.is_contiguous() and source.is_contiguous():
            targets, sources = to.setdefault(target.dtype, ([], []))
            # of equal strides, too, where an axis of one place has any
            targets.append(target.view(-1))
            sources.append(source.view(-1))
        else:
            target.copy_(source)
    for targets, sources in to.values():
        if sum(x.numel() for x in targets) < TOGETHER:
            large = [i for i, x in enumerate(targets) if x.numel() >= ALONE]
            for i in reversed(large):
                targets.pop(i).copy_(sources.pop(i))
        if targets:
            torch._foreach_copy_(targets, sources)


def _joined(groups: Sequence[Tensor]) -> Tensor:
    flat = [x.flatten(-3) for x in groups]
    return flat[0] if len(flat) == 1 else torch.cat(flat, -1)


def _by_token(hidden: Tensor, batch: int) -> Tensor:
    """`[S, B*H, T, D]` as `[S, B, T, H, D]`; a view."""
    return hidden.unflatten(1, (batch, -1)).transpose(2, 3)


def aligned(x: Tensor) -> Tensor:
    """Tokens with a contiguous last axis and rows that start on 16 bytes."""
    step = 16 // x.element_size()
    strides = [stride for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1]
    return x if x.stride(-1) == 1 and all(stride % step == 0 for stride in strides) else x.contiguous()


def _matrices(x: Tensor, count: int) -> Tensor:
    """A slice of banks `[chunks, B*H, count * in * out]` as `rows` takes it."""
    return x.unflatten(-1, (count, -1)).unsqueeze(0)


def by_chunk(gate: Tensor | None) -> Tensor | None:
    """`[B, H, N]` as contiguous `[N, B*H]`."""
    return None if gate is None else gate.flatten(0, 1).T.contiguous()


class Shape:
    """Sizes of a call, and room for tensors of them."""

    def __init__(self, rule: Rule, q: Tensor) -> None:
        self.rule, self.bank, self.device, self.low = rule, rule.bank, q.device, q.dtype
        self.batch, self.tokens, self.heads, _ = q.shape
        self.z, self.chunks = self.batch * self.heads, self.tokens // rule.chunk

    def key(self, *more: Any) -> tuple[Any, ...]:
        """What a chunk's work depends on."""
        return (self.rule, self.batch, self.heads, self.low, torch.get_float32_matmul_precision(), *more)

    def room(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or torch.float32, device=self.device)

    def rows(self, tokens: int, width: int) -> Tensor:
        return self.room(self.batch, tokens, self.heads, width, dtype=self.low)

    def hidden(self, count: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Room for `count` factors of so many tokens, and the same by token."""
        x = self.room(count, self.z, tokens, self.bank.hidden, dtype=self.low)
        return x, _by_token(x, self.batch)

    def span(self, x: Tensor, start: int, stop: int, axis: int = 1) -> Tensor:
        """The tokens of chunks `start` up to `stop`."""
        return x.narrow(axis, start * self.rule.chunk, (stop - start) * self.rule.chunk)


class Write:
    """One chunk's update of all matrices, on buffers of its own.

    Filled by callers: `k`, `v`, `rates`, `gates` (momentum, decay), and by `start`.
    Results: `state`, `velocities`, `found`; `weights` and `velocity` go on.
    """

    def __init__(self, shape: Shape, with_momentum: bool, with_decay: bool, normalize: bool) -> None:
        rule, bank, z, chunk = shape.rule, shape.bank, shape.z, shape.rule.chunk
        self.rule, self.with_momentum, self.with_decay, self.normalize = rule, with_momentum, with_decay, normalize
        self.k, self.v = shape.rows(chunk, bank.key), shape.rows(chunk, bank.value)
        self.rates = shape.room(3, shape.batch, chunk, shape.heads)
        self.gates = shape.room(2, z)
        self.weights, self.velocity = shape.room(z, bank.size), shape.room(z, bank.size)
        self.state = shape.room(1, z, bank.size, dtype=shape.low)
        self.velocities = shape.room(1, z, bank.size, dtype=rule.velocity_dtype)
        self.norms, self.found = shape.room(z, bank.channels), shape.room(1, z, bank.channels)
        self.hidden, self.by_token = shape.hidden(3, chunk)

    def start(self, weights: Tensor, velocity: Tensor | None, norms: Tensor | None) -> None:
        """Begin a sequence."""
        self.weights.copy_(weights)
        self.state[0].copy_(weights)
        if velocity is not None:
            self.velocity.copy_(velocity)
        if norms is not None:
            self.norms.copy_(norms)

    def run(self) -> None:
        rule, bank, chunk = self.rule, self.rule.bank, self.rule.chunk
        theta, last = bank.split(self.state)
        factors(self.k, theta, self.hidden, chunk, y=self.v, last=last, rates=self.rates)
        stored = bank.split(self.velocities)
        running = bank.split(self.velocity.unsqueeze(0))
        target = running if self.with_momentum else stored
        outer(
            chunk,
            theta=(self.k, self.by_token[:2], target[0]),
            last=(self.by_token[2], self.v, target[1]),
            add=running if self.with_momentum else None,
            gates=self.gates[0] if self.with_momentum else None,
            copy=stored if self.with_momentum else None,
        )
        updates = rule.orthogonalize(self.velocities)
        decay = self.gates[1:] if self.with_decay else None
        normed = (self.norms, self.found) if self.normalize else (None, None)
        apply(bank, self.weights, updates, self.state, rule.sign, decay, *normed)


class WriteBackward:
    """The gradient of `Write`, on buffers of its own.

    Filled by callers: `k`, `v`, `rates` and `gates` as those of `Write`, `states` (before and after the chunk), `velocity`
    (before it), `kept` (by `keep`), `found`, `reads` (the gradient of the weights that its tokens read), and by `start`.
    Results: `dk`, `dv`, `d_rates`, `d_gates`; `grad`, `d_velocity` and `d_norms` go on.
    """

    def __init__(self, shape: Shape, with_momentum: bool, with_decay: bool, normalize: bool) -> None:
        rule, bank, z, chunk = shape.rule, shape.bank, shape.z, shape.rule.chunk
        self.rule, self.with_momentum, self.with_decay, self.normalize = rule, with_momentum, with_decay, normalize
        self.k, self.v = shape.rows(chunk, bank.key), shape.rows(chunk, bank.value)
        self.dk, self.dv = torch.empty_like(self.k), torch.empty_like(self.v)
        self.rates, self.d_rates = (shape.room(3, shape.batch, chunk, shape.heads) for _ in range(2))
        self.gates, self.d_gates = shape.room(2, z), shape.room(2, z)
        self.banks = shape.room(3, z, bank.size, dtype=shape.low)
        self.d_written, self.states = self.banks[:1], self.banks[1:]
        self.velocity = shape.room(1, z, bank.size, dtype=rule.velocity_dtype)
        self.kept: list[Kept] = []
        self.d_updates = shape.room(1, z, bank.size, dtype=rule.velocity_dtype)
        self.reads = shape.room(1, z, bank.size)
        self.grad, self.carry, self.d_velocity = (shape.room(z, bank.size) for _ in range(3))
        self.norms, self.d_norms, self.found = (shape.room(*lead, z, bank.channels) for lead in ((), (), (1,)))
        self.hidden, self.by_token = shape.hidden(6, chunk)

    def keep(self, kept: Sequence[Kept]) -> list[tuple[Tensor, Tensor]]:
        """What to copy for this chunk's part of `Rule.kept` to be here; at first, it is copied at once."""
        if not self.kept:
            self.kept = [(states.clone(memory_format=torch.contiguous_format), squares.clone()) for states, squares in kept]
            return []
        pairs = []
        for (here, here_squares), (there, there_squares) in zip(self.kept, kept, strict=True):
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
        rule, bank, chunk = self.rule, self.rule.bank, self.rule.chunk
        normed = (self.norms, self.found, self.d_norms) if self.normalize else (None, None, None)
        decay = self.gates[1:] if self.with_decay else None
        d_decay = apply_backward(
            bank,
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
        d_velocities = rule.orthogonalize_backward(self.kept, self.d_updates)
        if self.with_momentum:
            found = momentum_backward(self.d_velocity, d_velocities, self.velocity, self.gates[:1], self.d_written)
            self.d_gates[:1].copy_(found)
        else:
            self.d_written.copy_(d_velocities)

        weights, grads = bank.split(self.banks[1]), bank.split(self.banks[0])
        d_rates = second_factors(self.k, self.v, weights, grads, self.rates, self.hidden)
        self.d_rates.copy_(d_rates.unflatten(1, (self.k.shape[0], -1)).transpose(2, 3))
        d_theta, d_last = bank.split(self.grad.unsqueeze(0))
        outer(
            chunk,
            theta=(self.k, self.by_token[2:4], d_theta),
            last=(self.by_token[5], self.v, d_last),
            add=bank.split(self.carry.unsqueeze(0)),
        )
        theta, last = bank.split(self.banks[:2].unsqueeze(1))
        rows(self.by_token[:4], theta.unflatten(-1, (2, -1)), self.dk, chunk, transposed=True)
        rows(self.by_token[4:], last.unsqueeze(3), self.dv, chunk)


class Reader:
    """What tokens read, for many chunks at once."""

    def __init__(self, shape: Shape, theta: Tensor | None) -> None:
        self.shape, self.bank, self.chunk, self.swiglu = shape, shape.bank, shape.rule.chunk, shape.rule.swiglu
        self.static = None if theta is None else theta.flatten(0, 1).to(shape.low).unsqueeze(0)

    def weights(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """The first layers and the last of some chunks."""
        theta, last = self.bank.split(states)
        return (theta if self.static is None else self.static.expand(len(states), -1, -1)), last

    def forward(self, q: Tensor, states: Tensor, out: Tensor) -> None:
        """Read `q` from the states of its chunks."""
        theta, last = self.weights(states)
        if self.swiglu:
            hidden, features = self.shape.hidden(1, q.shape[1])
            factors(q, theta, hidden, self.chunk)
        else:
            features = q.unsqueeze(0)
        rows(features, _matrices(last, 1), out, self.chunk)

    def backward(self, q: Tensor, states: Tensor, grad: Tensor, dq: Tensor) -> tuple[Tensor, Tensor | None]:
        """Write the gradient of `q`; return those of the states, `[chunks, B*H, P]`, and of `theta`, if that is static."""
        theta, last = self.weights(states)
        reads = self.shape.room(len(states), self.shape.z, self.bank.size)
        d_theta, d_last = self.bank.split(reads)
        if not self.swiglu:
            rows(grad.unsqueeze(0), _matrices(last, 1), dq, self.chunk, transposed=True)
            outer(self.chunk, last=(q, grad, d_last))
            return reads, None
        if self.static is not None:
            d_theta = self.shape.room(len(states), self.shape.z, self.static.shape[-1])
        hidden, by_token = self.shape.hidden(3, q.shape[1])
        factors(q, theta, hidden, self.chunk, y=grad, last=last)
        outer(self.chunk, theta=(q, by_token[:2], d_theta), last=(by_token[2], grad, d_last))
        rows(by_token[:2], _matrices(theta, 2), dq, self.chunk, transposed=True)
        return reads, None if self.static is None else d_theta.sum(0)


class LastLayer:
    """Writes to the last layer alone, for many chunks at once."""

    def __init__(self, shape: Shape, reader: Reader) -> None:
        self.shape, self.bank, self.chunk, self.reader = shape, shape.bank, shape.rule.chunk, reader

    def _rated(self, k: Tensor, rates: Tensor) -> Tensor:
        return (k * rates[0].unsqueeze(-1)).to(k.dtype)

    def forward(self, k: Tensor, v: Tensor, rates: Tensor, out: Tensor) -> None:
        """Sum each chunk's writes into `out`, `[chunks, B*H, P]`."""
        if self.shape.rule.swiglu:
            hidden, features = self.shape.hidden(1, k.shape[1])
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
        if not self.shape.rule.swiglu:
            pulled = torch.empty_like(k, dtype=torch.float32, memory_format=torch.contiguous_format)
            rows(v.unsqueeze(0), last, pulled, self.chunk, transposed=True)
            rows(self._rated(k, rates).unsqueeze(0), last, dv, self.chunk)
            dk.copy_(pulled * rates[0].unsqueeze(-1))
            return (pulled * k).sum(-1), None
        theta, _ = self.reader.weights(grads)
        hidden, by_token = self.shape.hidden(3, k.shape[1])
        sums = factors(k, theta, hidden, self.chunk, y=v, last=grads, rates=rates.expand(3, -1, -1, -1), sums=True)
        assert sums is not None
        d_theta = self.shape.room(len(grads), self.shape.z, theta.shape[-1])
        outer(self.chunk, theta=(k, by_token[:2], d_theta))
        rows(by_token[:2], _matrices(theta, 2), dk, self.chunk, transposed=True)
        rows(by_token[2:], last, dv, self.chunk)
        return sums.unflatten(0, (self.shape.batch, -1)).transpose(1, 2), d_theta.sum(0)
