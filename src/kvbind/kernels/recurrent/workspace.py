"""Memory that a call works in: its sizes, tensors of them, layouts that kernels take, and copies of many tensors at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvbind.kernels.recurrent.update_rule import ChunkRule

TOGETHER = 1 << 24
"""Elements from which one launch for several tensors keeps a GPU busy: it has a block for every 2^16."""

ALONE = 1 << 20
"""Elements from which a tensor is copied by itself where one launch would not."""


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


def _by_token(hidden: Tensor, batch: int) -> Tensor:
    """`[S, B*H, T, D]` as `[S, B, T, H, D]`; a view."""
    return hidden.unflatten(1, (batch, -1)).transpose(2, 3)


def aligned(x: Tensor) -> Tensor:
    """Tokens with a contiguous last axis and rows that start on 16 bytes."""
    step = 16 // x.element_size()
    strides = [stride for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1]
    return x if x.stride(-1) == 1 and all(stride % step == 0 for stride in strides) else x.contiguous()


def by_chunk(gate: Tensor | None) -> Tensor | None:
    """`[B, H, N]` as contiguous `[N, B*H]`."""
    return None if gate is None else gate.flatten(0, 1).T.contiguous()


class Workspace:
    """Sizes of a call, and room for tensors of them."""

    def __init__(self, rule: ChunkRule, q: Tensor) -> None:
        self.rule, self.packing, self.device, self.low = rule, rule.packing, q.device, q.dtype
        self.batch, self.tokens, self.heads, _ = q.shape
        self.z, self.chunks = self.batch * self.heads, self.tokens // rule.chunk

    def key(self, *more: Any) -> tuple[Any, ...]:
        """What a chunk's work depends on."""
        return (self.rule, self.batch, self.heads, self.low, torch.get_float32_matmul_precision(), *more)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or torch.float32, device=self.device)

    def rows(self, tokens: int, width: int) -> Tensor:
        return self.empty(self.batch, tokens, self.heads, width, dtype=self.low)

    def hidden(self, count: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Room for `count` factors of so many tokens, and the same by token."""
        x = self.empty(count, self.z, tokens, self.packing.hidden, dtype=self.low)
        return x, _by_token(x, self.batch)

    def span(self, x: Tensor, start: int, stop: int, axis: int = 1) -> Tensor:
        """The tokens of chunks `start` up to `stop`."""
        return x.narrow(axis, start * self.rule.chunk, (stop - start) * self.rule.chunk)
