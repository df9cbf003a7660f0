"""Scans over chunks that go on across ranks: each rank's end from nothing, one exchange, and what each starts from.

The first or last documents of a slice are the first or last `count` sequences of a layout: one, or all rows where rows are
not packed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvbind.kernels.chunked.prefix_sums import scan
from kvbind.sequence.collectives import begin_gather, compose, gathered


@dataclass(frozen=True)
class PendingMessage:
    """A message of each rank under way.

    Attributes:
        raw: as `begin_gather` returned it.
        shapes: of a state, and of the product of gates.
    """

    raw: Tensor
    shapes: tuple[torch.Size, torch.Size]


@dataclass(frozen=True)
class RankExchange:
    """Where a rank's slice lies among those of its group, in numbers.

    Attributes:
        group: the group's name.
        rank: this rank.
        size: ranks of the group.
        first: the rank on which this slice's first document starts.
        last: the rank that its last document reaches.
        alone: the first document is the last.
        count: sequences in a document's place.
        complete: complete chunks of each of the last `count` sequences.
        chunks: the first chunk of each of them.
    """

    group: str
    rank: int
    size: int
    first: int
    last: int
    alone: bool
    count: int
    complete: int
    chunks: tuple[int, ...]

    @staticmethod
    def of(group: str, numbers: Sequence[int]) -> RankExchange | None:
        """What `numbers` wrote down; None without a group."""
        if not group:
            return None
        rank, size, first, last, alone, count, complete, *chunks = numbers
        return RankExchange(group, rank, size, first, last, bool(alone), count, complete, tuple(chunks))

    def numbers(self) -> list[int]:
        """All but the group's name, as operators take it."""
        head = [self.rank, self.size, self.first, self.last, int(self.alone), self.count, self.complete]
        return [*head, *self.chunks]

    @property
    def continues(self) -> bool:
        """Whether the first document starts on an earlier rank."""
        return self.first < self.rank

    def send_end(
        self,
        parts: Tensor,
        pieces: Tensor,
        sequences: Tensor,
        gates: Tensor | None,
        start: Tensor | None = None,
        sign: float = 1.0,
    ) -> PendingMessage:
        """Start to exchange where the last documents end.

        Args:
            parts: partial sums of writes `[parts, heads, M, N]`.
            pieces: which of them make up each chunk's write.
            sequences: the layout's table.
            gates: what the running sum is multiplied by before each write, float32 `[chunks, heads]`; None for 1.
            start: what sequences start from, float32 `[S, heads, M, N]`; None for zero.
            sign: what writes are multiplied by.
        """
        heads, height, width = parts.shape[1:]
        factors = torch.ones(len(pieces), heads, dtype=torch.float32, device=parts.device) if gates is None else gates
        nothing = torch.zeros(1, 1, height, width, dtype=torch.float32, device=parts.device).expand(
            self.count, heads, -1, -1
        )
        end = scan(
            parts, pieces, sequences[-self.count :], state=None, sign=1.0, rows=0, dtype=torch.float32, momentum=factors,
            velocity=nothing, keep=False,
        )[2]  # fmt: skip
        end = end if sign > 0 else -end
        if start is not None and not (self.alone and self.continues):
            end = end + self.reach(factors)[..., None, None] * start[-self.count :]
        return self._send(end, factors)

    def receive_start(self, sent: PendingMessage, start: Tensor) -> Tensor:
        """`start` `[S, heads, M, N]` of all sequences, the first documents' replaced by what earlier ranks left of them."""
        incoming = self._composed(sent, range(self.first, self.rank))
        if not self.continues:
            return start
        return torch.cat((incoming, start[self.count :])) if len(start) > self.count else incoming

    def send_start_gradient(self, gradient: Tensor, gates: Tensor | None) -> PendingMessage:
        """Start to exchange the gradients of what `receive_start` put in place, `[count, heads, M, N]`."""
        if gates is None:
            gates = torch.ones(
                self.chunks[-1] + self.complete, gradient.shape[1], dtype=torch.float32, device=gradient.device
            )
        return self._send(gradient, gates)

    def receive_end_gradient(self, sent: PendingMessage, gradient: Tensor) -> Tensor:
        """`gradient` `[S, heads, M, N]` of all sequences' ends, with what later ranks add to the last documents'."""
        later = self._composed(sent, range(self.last, self.rank, -1))
        if self.last == self.rank:
            return gradient
        return torch.cat((gradient[: -self.count], gradient[-self.count :] + later))

    def without_start(self, gradient: Tensor) -> Tensor:
        """The gradient of starts `[S, heads, M, N]`, of which those that were replaced have none."""
        if self.continues:
            gradient[: self.count] = 0
        return gradient

    def reach(self, gates: Tensor) -> Tensor:
        """The product of each last document's gates `[chunks, heads]` over its complete chunks: `[count, heads]`."""
        return torch.stack([gates[c : c + self.complete].prod(0) for c in self.chunks])

    def _send(self, x: Tensor, gates: Tensor) -> PendingMessage:
        reach = self.reach(gates)
        return PendingMessage(begin_gather((x, reach), self.group, self.size), (x.shape, reach.shape))

    def _composed(self, sent: PendingMessage, order: range) -> Tensor:
        states, reaches = gathered(sent.raw, sent.shapes, self.size)
        flat = compose(states.flatten(3).unsqueeze(3), reaches[..., None, None], order)
        return flat.reshape(sent.shapes[0])
