"""What stays the same from call to call: the rule, its orthogonalization, and how many chunks are worked on at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvbind.kernels.newton_schulz.operator import newton_schulz_backward, newton_schulz_forward
from kvbind.kernels.recurrent.packed_weights import PackedWeights

SEGMENT_ROWS = 1 << 16
"""Tokens times heads whose reads, and their gradients, are computed at once, at most."""

SEGMENT_ELEMENTS = 1 << 24
"""Elements of the weights that they read, at most."""

Saved = tuple[Tensor, Tensor]
"""What Newton-Schulz keeps for its gradient."""


@dataclass(frozen=True)
class ChunkRule:
    """What stays the same from call to call.

    Attributes:
        chunk: tokens in a chunk.
        packing: the layout of the updated matrices.
        swiglu: features are SwiGLU's, not the keys themselves.
        sign: what updates are multiplied by.
        own_chunk: tokens read the weights after their chunk, not before it.
        coefficients: of Newton-Schulz, three per iteration; none without it.
        precision: of Newton-Schulz.
    """

    chunk: int
    packing: PackedWeights
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
        return _joined(
            [newton_schulz_forward(part, self.triples, self.precision, False)[0] for part in self.packing.groups(x)]
        )

    def saved(self, x: Tensor) -> list[Saved]:
        """What the gradient of `orthogonalize` needs, for each group of matrices of one shape."""
        if not self.coefficients:
            return []
        return [newton_schulz_forward(part, self.triples, self.precision, True)[1] for part in self.packing.groups(x)]

    def orthogonalize_backward(self, saved: Sequence[Saved], grad: Tensor) -> Tensor:
        """The gradient of `orthogonalize`, float32."""
        if not self.coefficients:
            return grad
        groups = zip(saved, self.packing.groups(grad), strict=True)
        return _joined([newton_schulz_backward(x, d, self.triples, self.precision, torch.float32) for x, d in groups])

    def segment(self, heads: int) -> int:
        """How many chunks of so many sequences and heads are worked on at once."""
        return max(1, min(SEGMENT_ROWS // (self.chunk * heads), SEGMENT_ELEMENTS // (self.packing.size * heads)))

    def segments(self, chunks: int, heads: int) -> list[tuple[int, int]]:
        """Ranges of chunks that are worked on at once."""
        step = self.segment(heads)
        return [(start, min(start + step, chunks)) for start in range(0, chunks, step)]


def chunk_of(saved: Sequence[Saved], place: int, count: int) -> list[Saved]:
    """One chunk's part of what `ChunkRule.saved` gave for `count` chunks."""
    parts = []
    for states, squares in saved:
        each = len(squares) // count
        here = slice(place * each, (place + 1) * each)
        parts.append((states[:, here], squares[here]))
    return parts


def _joined(groups: Sequence[Tensor]) -> Tensor:
    flat = [x.flatten(-3) for x in groups]
    return flat[0] if len(flat) == 1 else torch.cat(flat, -1)
