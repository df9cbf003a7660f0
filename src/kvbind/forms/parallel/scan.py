"""First-order scans `y_c = g_c y_{c-1} + x_c` by products alone.

Dividing by a cumulative product of gates (`cumprod`, then `cumsum`) loses the sum as soon as that product underflows.
Here no quantity is ever divided, in gradients neither: a gate's product over a span underflows only where its contribution
does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvbind.forms.parallel.finite import seen_product

BLOCK = 32


@dataclass(frozen=True)
class ScanGate:
    """Gates as numbers or, where these would underflow, as their logarithms.

    Attributes:
        values: the numbers, of any shape.
        log: they are logarithms.
    """

    values: Tensor
    log: bool = False

    def map(self, change: Callable[[Tensor], Tensor]) -> ScanGate:
        """The same gates with their numbers changed in shape."""
        return ScanGate(change(self.values), self.log)

    def factor(self) -> Tensor:
        """What the gates multiply by."""
        return self.values.exp() if self.log else self.values

    def join(self, x: Tensor, y: Tensor) -> Tensor:
        """Numbers of this kind for the products of two."""
        return x + y if self.log else x * y

    @property
    def neutral(self) -> float:
        """The number of a gate that changes nothing."""
        return 0.0 if self.log else 1.0


def decay_matrix(gates: Tensor, log: bool = False) -> Tensor:
    """Products of gates over every span: `L[i, j] = prod_{s=j+1..i} g_s` for `j <= i`, else 0.

    Built by doubling: the matrix of two neighbouring spans is those of each and, in the corner, the product over the
    rest of the first span times the product over the beginning of the second.

    Args:
        gates: `[..., n]`.
        log: gates are given as their logarithms. These are added up span by span as gates are multiplied, and never
            subtracted: a difference of two sums from the start has the rounding errors of the larger.

    Returns:
        `[..., n, n]`, lower triangular with ones on the diagonal.
    """
    kind, n = ScanGate(gates, log), gates.shape[-1]
    size = 1 << max(n - 1, 0).bit_length()
    gates = F.pad(gates, (0, size - n), value=kind.neutral)
    spans = torch.full_like(gates, kind.neutral)[..., None, None]
    nothing = -math.inf if log else 0.0
    length = 1
    while length < size:
        first, second = spans[..., 0::2, :, :], spans[..., 1::2, :, :]
        reach = kind.join(gates[..., length :: 2 * length, None], second[..., 0])
        corner = kind.join(reach[..., :, None], first[..., -1:, :])
        upper = torch.cat((first, torch.full_like(first, nothing)), dim=-1)
        spans = torch.cat((upper, torch.cat((corner, second), dim=-1)), dim=-2)
        length *= 2
    matrix = spans[..., 0, :n, :n]
    return matrix.exp() if log else matrix


def up_to(matrix: Tensor) -> Tensor:
    """Which columns each row of a lower triangular `[..., n, n]` sees, bool `[n, n]`."""
    return torch.ones(matrix.shape[-2:], dtype=torch.bool, device=matrix.device).tril()


def products_after(gates: Tensor) -> Tensor:
    """The product of all gates behind each of `[B, H, N]`, along the last axis: `prod_{s>c} g_s`, 1 for the last."""
    behind = F.pad(gates[..., 1:], (0, 1), value=1.0) if gates.shape[-1] else gates
    # the gradients of `cumprod` and `prod` divide by gates
    nothing, one = torch.zeros_like(gates)[..., None], gates.new_ones(*gates.shape[:2], 1)
    return linear_scan(behind.flip(-1), nothing, one).squeeze(-1).flip(-1)


def product_of(gates: Tensor) -> Tensor:
    """The product of all gates `[B, H, N]`, `[B, H]`."""
    return (gates[..., :1] * products_after(gates)[..., :1]).prod(-1)


def linear_scan(gates: Tensor, writes: Tensor, initial: Tensor) -> Tensor:
    """All states of `y_c = g_c y_{c-1} + x_c`.

    Args:
        gates: `[B, H, N]`.
        writes: `x`, `[B, H, N, ...]`.
        initial: the state before the first write, `[B, H, ...]`.

    Returns:
        `y`, `[B, H, N, ...]`.
    """
    shape = writes.shape
    flat, carry = writes.flatten(3), initial.flatten(2)
    states = []
    for start in range(0, shape[2], BLOCK):
        inside = decay_matrix(gates[:, :, start : start + BLOCK])
        reach = gates[:, :, start : start + 1] * inside[..., 0]
        writing = flat[:, :, start : start + BLOCK]
        block = seen_product(inside, writing, up_to(inside)) + reach[..., None] * carry[:, :, None]
        states.append(block)
        carry = block[:, :, -1]
    return torch.cat(states, dim=2).reshape(shape) if states else writes
