"""How columns are cut into blocks that are alike, and where a block's columns and reads stand among its updates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from kvbind.forms.parallel.affine_operands import AffineRule, Gates

BLOCK = 64
"""Columns in a block, or one update where that has more. A block's scores and its triangular system cost as many operations
per column as the block has columns, a block's state as many as a head has channels, and heads have 64 to 128 of them."""

CHANNEL_BLOCK = 16
"""Columns in a block whose coefficients are held channel by channel: this many numbers per column and channel."""


@dataclass(frozen=True)
class Part:
    """Some columns cut into equal blocks.

    Attributes:
        start: its first column.
        blocks: how many blocks.
        spans: in each block, stretches at whose starts gradients are renewed.
        updates: in each stretch.
        chunk: columns of an update; the last of a call may have fewer than the rule says.
        renews: blocks start at refresh points, the "first" or "all" of them.
        ends: the last block ends its span.
        complete: the state after it goes on to the next call.
        by_channel: coefficients are held channel by channel.
    """

    start: int
    blocks: int
    spans: int
    updates: int
    chunk: int
    renews: Literal["none", "first", "all"]
    ends: bool
    complete: bool
    by_channel: bool = False

    @property
    def count(self) -> int:
        """Updates of a block."""
        return self.spans * self.updates

    @property
    def stop(self) -> int:
        """The column behind the last."""
        return self.start + self.blocks * self.count * self.chunk


def parts(rule: AffineRule, total: int, gates: Gates, linear: bool = True) -> Iterator[Part]:
    """Cut columns into parts, so that all blocks of one are alike.

    Args:
        rule: how columns enter the state.
        total: how many there are.
        gates: theirs.
        linear: gradients are linear in the state; where they are not, a block is of one stretch.
    """
    chunk, span = rule.chunk, rule.refresh
    whole = total // chunk * chunk if span is None else total // span * span
    channels = gates.decay is not None and gates.decay.values.dim() == 4
    by_channel = channels and rule.window > 1
    limit = CHANNEL_BLOCK if by_channel else BLOCK
    if linear and rule.loss == "dot" and gates.read_rate is None:
        # nothing reads the state, so that it does not matter where
        yield from _stretch(rule, 0, whole, limit, True, "none", by_channel)
        yield from _stretch(rule, whole, total, limit, False, "none", by_channel)
        return
    if span is None:
        yield from _stretch(rule, 0, whole, limit, True, "first", by_channel)
        yield from _stretch(rule, whole, total, limit, False, "none" if whole else "first", by_channel)
        return
    if channels and span > chunk:
        by_channel = by_channel or span < CHANNEL_BLOCK
        limit = CHANNEL_BLOCK if by_channel else BLOCK
    if span > max(limit, chunk):
        for start in range(0, whole, span):
            yield from _stretch(rule, start, start + span, limit, True, "first", by_channel)
    else:
        # reads of one stretch take its own rate for what is in it, so that several do not mix
        alone = not linear or gates.read_rate is not None or (channels and not by_channel and span > chunk)
        spans = 1 if alone else max(1, limit // (rule.history + span))
        if rule.writes > 1:
            spans = -(-spans * span // rule.writes) * rule.writes // span or 1
        blocks, rest = divmod(whole // span, spans)
        updates = span // chunk
        if blocks:
            yield Part(0, blocks, spans, updates, chunk, "all", True, True, by_channel)
        if rest:
            yield Part(blocks * spans * span, 1, rest, updates, chunk, "all", True, True, by_channel)
    yield from _stretch(rule, whole, total, limit, False, "first", by_channel)


def _stretch(
    rule: AffineRule, start: int, stop: int, limit: int, complete: bool, renews: Literal["none", "first"], by_channel: bool
) -> Iterator[Part]:
    """Parts of a stretch of columns in which gradients are renewed at its start, if at all."""
    updates, left = divmod(stop - start, rule.chunk)
    size = max(1, (limit - rule.history) // rule.chunk, rule.history // rule.chunk)
    size = -(-size // rule.writes) * rule.writes
    blocks, rest = divmod(updates, size)
    for count, its_updates, chunk in ((blocks, size, rule.chunk), (1, rest, rule.chunk), (1, 1, left)):
        if count and its_updates and chunk:
            part = Part(start, count, 1, its_updates, chunk, renews, False, complete, by_channel)
            # without renewals there is no end before the call's
            yield replace(part, ends=part.stop == stop and rule.refresh is not None)
            start, renews = part.stop, "none"


class BlockLayout:
    """Where a block's columns and reads stand among its updates; places are counted in updates done.

    Attributes:
        update: the update that each column is of, `[L]`; of a window's earlier columns, the stretch's first.
        first: the update by which each column enters first, `[L]`.
        entering: which columns each update enters, `[N, L]`; None where these are its own.
        residuals: the place at which each column's gradient is taken, `[L]`.
        reads: the place of the state that each read starts from, `[R]`.
        own: which columns each read sees besides, entering on the way to the next place, bool `[R, L]`; None for none.
        seen: which columns each read sees, bool `[R, L]`.
    """

    def __init__(self, rule: AffineRule, part: Part, device: torch.device) -> None:
        self.rule, self.part = rule, part
        history = rule.history
        size = history + part.updates * part.chunk
        self.size = size
        place = torch.arange(part.spans * size, device=device)
        span, within = place // size, place % size - history
        # earlier columns come in updates of the rule's length, the call's last update may be shorter
        local = torch.where(within < 0, torch.div(within, rule.chunk, rounding_mode="floor"), within // part.chunk)
        self.update = span * part.updates + local.clamp(min=0)
        self.first = self.update
        self.residuals = span * part.updates
        window = history // rule.chunk + 1
        update = torch.arange(part.count, device=device)
        behind = update[:, None] % part.updates - local
        entering = (update[:, None] // part.updates == span) & (behind >= 0) & (behind < window)
        self.entering = entering if history else None

        reads = torch.arange(part.count * part.chunk // rule.writes, device=device)
        last = (reads + 1) * rule.writes - 1
        its = last // part.chunk
        self.partial = rule.sees == "token" and rule.chunk > 1
        self.after = rule.sees == "chunk" or (rule.sees == "token" and rule.chunk == 1)
        self.reads = its + 1 if self.after else reads * rule.writes // part.chunk
        self.seen = self.first < self.reads[:, None]
        self.own: Tensor | None = None
        if self.partial:
            # the ordinal of each own column in the block; earlier columns of a window come before all
            ordinal = torch.where(within < 0, -1, span * part.updates * part.chunk + within)
            self.own = entering[its] & (ordinal <= last[:, None])
            self.seen = self.seen | self.own

    def windows(self, x: Tensor) -> Tensor:
        """Columns of the whole call, behind those of the window, as this part's blocks `[B, H, n, L, ...]`."""
        part, history = self.part, self.rule.history
        own = x[:, :, part.start : part.stop + history]
        if not history:
            return own.unflatten(2, (part.blocks, -1))
        step = self.size - history
        column = torch.arange(self.size, device=x.device)
        span = torch.arange(part.blocks * part.spans, device=x.device)
        chosen = own.index_select(2, (span[:, None] * step + column).flatten())
        return chosen.unflatten(2, (part.blocks, -1))

    def blocks(self, x: Tensor) -> Tensor:
        """Reads of this part as its blocks, `[B, H, n, R, ...]`."""
        return x.unflatten(2, (self.part.blocks, -1))

    def by_column(self, shares: Tensor) -> Tensor:
        """Shares of updates' gradients, `[..., N]`, as shares of columns, `[..., L]`."""
        return shares[..., self.update] if self.entering is None else shares @ self.entering.to(shares.dtype)
