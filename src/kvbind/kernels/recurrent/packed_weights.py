"""Packed weights: all the matrices that an update rule changes, of one sequence and head, in one row of memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import triton
from torch import Tensor

from kvbind.kernels.common.operands import cdiv


@dataclass(frozen=True)
class PackedWeights:
    """The layout of `[..., P]`: W_gate and W_up, if they are updated, then the last layer; each row by row.

    Attributes:
        key: width of keys, Dk.
        hidden: width of the features that the last layer takes, Dh (Dk where that is the only layer).
        value: width of values, Dv.
        theta: whether W_gate and W_up `[Dk, Dh]` are part of it, or the last layer `[Dh, Dv]` is all.
    """

    key: int
    hidden: int
    value: int
    theta: bool

    @property
    def widths(self) -> dict[str, int]:
        """As kernels take them."""
        return {"KEY": self.key, "HIDDEN": self.hidden, "VALUE": self.value, "THETA": int(self.theta)}

    @property
    def first(self) -> int:
        """Elements before the last layer."""
        return 2 * self.key * self.hidden if self.theta else 0

    @property
    def size(self) -> int:
        """P, elements in all."""
        return self.first + self.hidden * self.value

    @property
    def channels(self) -> int:
        """Q, output channels in all."""
        return self.value + (2 * self.hidden if self.theta else 0)

    @property
    def longest(self) -> int:
        """A power of two that no matrix has more rows than."""
        return triton.next_power_of_2(max(self.key, self.hidden) if self.theta else self.hidden)

    def blocks(self, columns: int) -> int:
        """How many blocks of so many columns the matrices have."""
        each = cdiv(self.hidden, columns) if self.theta else 0
        return 2 * each + cdiv(self.value, columns)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`[..., P]` as W_gate with W_up, `[..., 2 * Dk * Dh]`, and the last layer, `[..., Dh * Dv]`; views."""
        return x[..., : self.first], x[..., self.first :]

    def groups(self, x: Tensor) -> Iterator[Tensor]:
        """`[..., P]` as batches of matrices of one shape, `[..., matrices, in, out]`; views."""
        if self.theta and self.key == self.hidden == self.value:
            yield x.unflatten(-1, (3, self.key, self.key))
            return
        first, last = self.split(x)
        if self.theta:
            yield first.unflatten(-1, (2, self.key, self.hidden))
        yield last.unflatten(-1, (1, self.hidden, self.value))
