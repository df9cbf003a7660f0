"""How state and buffers at every place of a block follow from those before it and from its columns: coefficients of both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvbind.forms.parallel.affine_blocks import BlockLayout
from kvbind.forms.parallel.affine_operands import AffineRule, Gates
from kvbind.forms.parallel.channels import ChannelFlow
from kvbind.forms.parallel.finite import seen_product
from kvbind.forms.parallel.scan import ScanGate, decay_matrix, up_to

Rows = tuple[Tensor, list[Tensor], Tensor]
"""What rows of features take: features for the state `[..., R, F]`, such for each buffer, and scores `[..., R, L]`."""


@dataclass(frozen=True)
class Flow:
    """How state and buffers at every place of a block follow from those before it and from its columns.

    Places are `N + 1`, from before the first update to behind the last, and of buffers `W - 1` more before these.

    Attributes:
        layout: of the block.
        gates: of its updates and reads.
        buffers: share of each buffer of the start in the buffer at a place, `[..., W - 1 + N + 1, W]`.
        columns: share of each column in it, `[..., W - 1 + N + 1, L]`.
        state: the same of the state, and how features and columns take part in it.
        end: share of the state, of the buffers and of each column in the state behind the block: `[..., X, 1]`,
            `[..., X, W]`, `[..., L, X]`, where X is the number of channels, or 1.
    """

    layout: BlockLayout
    gates: Gates
    buffers: Tensor
    columns: Tensor
    state: _Coefficients | ChannelFlow
    end: tuple[Tensor, Tensor, Tensor]

    @property
    def before(self) -> int:
        """Places of buffers before the block's start."""
        return max(self.buffers.shape[-1] - 1, 0)

    def rows(self, x: Tensor, places: Tensor, k: Tensor) -> Rows:
        """What rows of features `[..., R, F]` take of the state at `places`."""
        if isinstance(self.state, _Coefficients):
            return self.state.rows(x, places, k)
        return self.state.rows(x, k, after=False)

    def reads(self, q: Tensor, k: Tensor) -> Rows:
        """What reads `[..., R, F]` take of the state that each sees."""
        layout, gates = self.layout, self.gates
        x = q
        if layout.partial and gates.partial_decay is not None:
            kept = gates.partial_decay
            x = q * (kept if kept.dim() == 5 else kept[..., None])
        if isinstance(self.state, _Coefficients):
            on_state, on_buffers, on_columns = self.state.rows(x, layout.reads, k)
        else:
            on_state, on_buffers, on_columns = self.state.reads(x, k, layout.after, layout.rule.writes)
        if not layout.partial:
            return on_state, on_buffers, on_columns
        scores = q @ k.mT
        rate = layout.rule.sign * (1.0 if gates.partial_step_rate is None else gates.partial_step_rate[..., None])
        assert layout.own is not None
        on_columns = on_columns + rate * torch.where(layout.own, scores, 0.0)
        for lag in range(max(layout.rule.lags, 0 if gates.partial_momentum is None else 1)):
            share = rate * (1.0 if lag < layout.rule.lags else 0.0)
            if lag == 0 and gates.partial_momentum is not None:
                share = share + rate * gates.partial_momentum[..., None]
            place = layout.reads + self.before - lag
            on_columns = on_columns + share * self.columns[..., place, :] * scores
            on_buffers = [x + share * self.buffers[..., place, i, None] * q for i, x in enumerate(on_buffers)]
        return on_state, on_buffers, on_columns

    def moves(self, blocks: int) -> Iterator[Move]:
        """How state and buffers move over each of so many blocks."""
        held = self.buffers.shape[-1]
        behind = (x[..., x.shape[-2] - held :, :].flip(-2) for x in (self.buffers, self.columns))
        return (Move(*x) for x in zip(*(apart(x, blocks) for x in (*self.end, *behind)), strict=True))


@dataclass(frozen=True)
class Move:
    """What state and buffers behind a block are made of.

    Attributes:
        state, buffers, columns: `end` of `Flow` for one block.
        of_buffers, of_columns: shares in the buffers, newest first, `[..., W, W]` and `[..., W, L]`.
    """

    state: Tensor
    buffers: Tensor
    columns: Tensor
    of_buffers: Tensor
    of_columns: Tensor

    def step(self, k: Tensor, own: Tensor, weights: Tensor, buffers: Tensor) -> tuple[Tensor, Tensor]:
        """State and buffers behind a block whose columns `[B, H, L, F]` write `own`, `[B, H, L, Dv]`."""
        after = self.state * weights + (self.columns * k).mT @ own
        if not buffers.shape[2]:
            return after, buffers
        after = after + (self.buffers.movedim(-1, 2)[..., None] * buffers).sum(2)
        written = k.mT.unsqueeze(2) @ (self.of_columns[..., None] * own.unsqueeze(2))
        return after, written + (self.of_buffers @ buffers.flatten(3)).unflatten(3, buffers.shape[3:])


def apart(x: Tensor | float | None, blocks: int) -> Sequence[Any]:
    """The parts of each of so many blocks, of a tensor `[B, H, n, ...]` or `[B, H, 1, ...]`; anything else is of all."""
    if not isinstance(x, Tensor):
        return [x] * blocks
    return x.unbind(2) if x.shape[2] == blocks else [x.squeeze(2)] * blocks


def flow_of(rule: AffineRule, gates: Gates, layout: BlockLayout, k: Tensor, held: int) -> Flow:
    """The flow of blocks with columns `[B, H, n, L, F]` and `held` buffers."""
    count = layout.part.count
    eye = torch.eye(count, dtype=k.dtype, device=k.device).expand(1, 1, 1, count, count)
    chain = eye if gates.momentum is None else decay_matrix(gates.momentum.values, gates.momentum.log)
    reach = torch.zeros_like(chain[..., 0])
    if gates.momentum is not None:
        reach = gates.momentum.factor()[..., :1] * chain[..., 0]
    # of buffers, which stand newest first, those at places before the first update and at its start; without any, one place
    before = max(held, 1)
    begun = torch.eye(before, held, dtype=k.dtype, device=k.device).flip(0).expand(*chain.shape[:3], before, held)
    of_buffers = torch.cat((begun, F.pad(reach[..., None], (0, held - 1))), dim=-2)
    of_updates = F.pad(chain, (0, 0, before, 0))

    step = gates.step_rate if gates.step_rate is None else rule.sign * gates.step_rate
    scale = k.new_full((1, 1, 1, 1), rule.sign) if step is None else step
    if gates.decay is not None and gates.decay.values.dim() == 5 and not layout.part.by_channel:
        state: _Coefficients | ChannelFlow = ChannelFlow(gates.decay, gates.momentum, scale.expand(*scale.shape[:3], count))
        keep, keep_buffers, into = state.end
        end = keep, keep_buffers, into[..., layout.update, :]
        return Flow(layout, gates, of_buffers, layout.by_column(of_updates), state, end)
    update = torch.arange(count, device=k.device)
    behind = update[:, None] + before - torch.arange(before + count, device=k.device)
    entering = ((behind >= 0) & (behind <= rule.lags)).to(k.dtype)
    enter_buffers, enter_updates = (
        scale[..., None] * (seen_product(entering, x, behind >= 0) if rule.lags else x[..., before:, :])
        for x in (of_buffers, of_updates)
    )
    state = _Coefficients.of(layout, gates.decay, enter_buffers, enter_updates)
    return Flow(layout, gates, of_buffers, layout.by_column(of_updates), state, state.end)


@dataclass(frozen=True)
class _Coefficients:
    """Shares in the state at each of `N + 1` places of a block; `X` is an axis of channels, or none.

    Attributes:
        state: of the state before the block, `[..., X, N + 1]`.
        buffers: of the buffers before it, `[..., X, N + 1, W]`.
        columns: of its columns, `[..., X, N + 1, L]`.
    """

    state: Tensor
    buffers: Tensor
    columns: Tensor

    @staticmethod
    def of(layout: BlockLayout, decay: ScanGate | None, enter_buffers: Tensor, enter_updates: Tensor) -> _Coefficients:
        """Shares from what enters the state at each update: of buffers `[..., N, W]`, of updates `[..., N, N]`."""
        count = enter_updates.shape[-1]
        if decay is None:
            keep = enter_updates.new_ones(count, count).tril().expand(1, 1, 1, count, count)
            reach = torch.ones_like(keep[..., 0])
        else:
            values, first = decay.values, decay.factor()
            if values.dim() == 5:
                values, first = values.mT, first.mT
                enter_buffers, enter_updates = enter_buffers.unsqueeze(3), enter_updates.unsqueeze(3)
            keep = decay_matrix(values, decay.log)
            reach = first[..., :1] * keep[..., 0]
        buffers, updates = (seen_product(keep, x, up_to(keep)) for x in (enter_buffers, enter_updates))
        return _Coefficients(
            F.pad(reach, (1, 0), value=1.0), F.pad(buffers, (0, 0, 1, 0)), layout.by_column(F.pad(updates, (0, 0, 1, 0)))
        )

    @property
    def by_channel(self) -> bool:
        """Whether shares differ from channel to channel."""
        return self.columns.dim() == 6

    def rows(self, x: Tensor, places: Tensor, k: Tensor) -> Rows:
        """What rows of features `[..., R, F]` take of the state at `places`, `[R]`."""

        def share(shares: Tensor) -> Tensor:
            return (shares.mT if self.by_channel else shares[..., None]) * x

        on_columns = self.columns[..., places, :]
        scores = (
            (on_columns * (x.mT[..., None] * k.mT[..., None, :])).sum(-3) if self.by_channel else on_columns * (x @ k.mT)
        )
        on_buffers = [share(self.buffers[..., places, i]) for i in range(self.buffers.shape[-1])]
        return share(self.state[..., places]), on_buffers, scores

    @property
    def end(self) -> tuple[Tensor, Tensor, Tensor]:
        """Shares in the state behind the block: `[..., X, 1]`, `[..., X, W]`, and of columns, `[..., L, X]`."""
        columns = self.columns[..., -1, :]
        columns = columns.mT if self.by_channel else columns[..., None]
        state, buffers = self.state[..., -1], self.buffers[..., -1, :]
        return (
            (state[..., None], buffers, columns)
            if self.by_channel
            else (state[..., None, None], buffers.unsqueeze(-2), columns)
        )
