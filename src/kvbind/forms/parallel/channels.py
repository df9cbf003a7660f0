"""Shares in a state whose every key channel has a gate of its own, without a matrix for each channel.

A score of a read t and a column j is `sum_f q_tf G_tj,f k_jf`. With a boundary c between the two, `G_tj,f` is what reaches c
of j times what reaches t of c, so that scores are products of scaled features (arXiv 2312.06635, section 4). Scaling all of
a block to one boundary divides by products of gates, which overflow. Here a block is halved, its halves are halved, and so
on: the reads of every second half meet the columns of the first at the boundary between them. All factors are products of
gates over stretches that begin or end there, and nothing is ever divided.

With momentum what passes a boundary is two numbers, the channel's share in the state and the update's in the buffer, and
features are twice as wide.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvbind.forms.parallel.scan import ScanGate


@dataclass(frozen=True)
class _Momentum:
    """The part of the momentum buffer in `P` neighbouring stretches of `h` updates each.

    Attributes:
        released: share of the buffer before the stretch in the state at each place, `[..., P, h + 1, F]`.
        carried: its share in the buffer there, `[..., P, h + 1, 1]`.
        entered: share of each update's gradient in the state at the end, `[..., P, h, F]`.
        kept: its share in the buffer there, `[..., P, h, 1]`.
    """

    released: Tensor
    carried: Tensor
    entered: Tensor
    kept: Tensor


@dataclass(frozen=True)
class _Stretch:
    """`P` neighbouring stretches of `h` updates each.

    Attributes:
        decay: what multiplies the state up to each place, of the gates' kind, `[..., P, h + 1, F]`.
        onward: what multiplies each update's entry from there to the end, of the gates' kind, `[..., P, h, F]`.
        momentum: the buffer's part; None without momentum, where a gradient enters once and whole.
    """

    decay: Tensor
    onward: Tensor
    momentum: _Momentum | None


class ChannelFlow:
    """Shares of blocks of `N` updates in states of `F` key channels.

    Args:
        decay: gates `[..., N, F]`.
        momentum: gates `[..., N]`, or None.
        rate: what multiplies each update as it enters, `[..., N]`.
    """

    def __init__(self, decay: ScanGate, momentum: ScanGate | None, rate: Tensor) -> None:
        self.count, self.gate = decay.values.shape[-2], decay
        self.size = 1 << (self.count - 1).bit_length()
        # updates behind the last, which enter nothing and change nothing
        short = self.size - self.count
        gates = F.pad(decay.values, (0, 0, 0, short), value=decay.neutral)[..., None, :]
        self.rate = F.pad(rate, (0, short))[..., None, None]
        neutral = torch.full_like(gates, decay.neutral)
        buffer = None
        if momentum is not None:
            m = F.pad(momentum.factor(), (0, short), value=1.0)[..., None, None]
            released = F.pad(self.rate * m, (0, 0, 1, 0)).expand(*gates.shape[:-2], 2, gates.shape[-1])
            buffer = _Momentum(
                released, F.pad(m, (0, 0, 1, 0), value=1.0), self.rate.expand(gates.shape), torch.ones_like(m)
            )
        self.levels = [_Stretch(torch.cat((neutral, gates), dim=-2), neutral, buffer)]
        while self.levels[-1].onward.shape[-2] < self.size:
            self.levels.append(self._joined(self.levels[-1]))

    def _value(self, x: Tensor) -> Tensor:
        return x.exp() if self.gate.log else x

    def _joined(self, halves: _Stretch) -> _Stretch:
        """Stretches of twice the length."""
        (decay, later), (onward, last) = _pairs(halves.decay), _pairs(halves.onward)
        join, reach, rest = self.gate.join, decay[..., -1:, :], later[..., -1:, :]
        buffer = None
        if halves.momentum is not None:
            its = halves.momentum
            (released, later_released), (carried, later_carried) = _pairs(its.released), _pairs(its.carried)
            (entered, last_entered), (kept, last_kept) = _pairs(its.entered), _pairs(its.kept)
            moved = (
                self._value(later)[..., 1:, :] * released[..., -1:, :] + later_released[..., 1:, :] * carried[..., -1:, :]
            )
            arrived = self._value(rest) * entered + later_released[..., -1:, :] * kept
            buffer = _Momentum(
                torch.cat((released, moved), dim=-2),
                torch.cat((carried, later_carried[..., 1:, :] * carried[..., -1:, :]), dim=-2),
                torch.cat((arrived, last_entered), dim=-2),
                torch.cat((kept * later_carried[..., -1:, :], last_kept), dim=-2),
            )
        return _Stretch(
            torch.cat((decay, join(later[..., 1:, :], reach)), dim=-2),
            torch.cat((join(onward, rest), last), dim=-2),
            buffer,
        )

    def rows(self, x: Tensor, k: Tensor, after: bool) -> tuple[Tensor, list[Tensor], Tensor]:
        """What rows take, equally many of each update, at the place before it or after it.

        Args:
            x: features of rows, `[..., R, F]` with R a multiple of N.
            k: features of columns, `[..., L, F]` likewise.
            after: rows stand behind their update.

        Returns:
            Features for the state `[..., R, F]`, for the buffer in a list that is empty without momentum, and scores
            `[..., R, L]`.
        """
        reads, columns = self._by_update(x), self._by_update(k)
        entering = columns * self.rate
        place = slice(1, None) if after else slice(None, -1)
        scores = reads @ entering.mT if after else reads.new_zeros(*reads.shape[:-1], columns.shape[-2])
        for halves in self.levels[:-1]:
            length = halves.onward.shape[-2]
            # reads of second halves and columns of first ones, `[..., P / 2, h, rows of each, F]`
            later = reads.unflatten(-3, (-1, 2, length))[..., 1, :, :, :]
            earlier = (entering if halves.momentum is None else columns).unflatten(-3, (-1, 2, length))[..., 0, :, :, :]
            second = self._value(halves.decay[..., 1::2, place, None, :]) * later
            if halves.momentum is None:
                first = self._value(halves.onward[..., 0::2, :, None, :]) * earlier
            else:
                its = halves.momentum
                second = torch.cat((second, its.released[..., 1::2, place, None, :] * later), dim=-1)
                entered, kept = its.entered[..., 0::2, :, None, :], its.kept[..., 0::2, :, None, :]
                first = torch.cat((entered * earlier, kept * earlier), dim=-1)
            corner = second.flatten(-3, -2) @ first.flatten(-3, -2).mT
            upper, lower = _pairs(scores)
            upper = torch.cat((upper, torch.zeros_like(corner)), dim=-1)
            scores = torch.cat((upper, torch.cat((corner, lower), dim=-1)), dim=-2)
        whole, count = self.levels[-1], x.shape[-2]

        def scaled(share: Tensor) -> Tensor:
            return (share[..., 0, place, None, :] * reads).flatten(-3, -2)[..., :count, :]

        on_buffers = [] if whole.momentum is None else [scaled(whole.momentum.released)]
        return scaled(self._value(whole.decay)), on_buffers, scores[..., 0, :count, : k.shape[-2]]

    def reads(self, q: Tensor, k: Tensor, after: bool, every: int) -> tuple[Tensor, list[Tensor], Tensor]:
        """`rows` of reads of which one stands before, or after, each group of `every` updates."""
        if every == 1:
            return self.rows(q, k, after)
        where = slice(every - 1, None, every) if after else slice(None, None, every)
        aside = (every - 1, 0) if after else (0, every - 1)
        spread = F.pad(q.unsqueeze(-2), (0, 0, *aside)).flatten(-3, -2)
        on_state, on_buffers, scores = self.rows(spread, k, after)
        return on_state[..., where, :], [x[..., where, :] for x in on_buffers], scores[..., where, :]

    @property
    def end(self) -> tuple[Tensor, Tensor, Tensor]:
        """Shares in the state behind a block: its own `[..., F, 1]`, of buffers `[..., F, W]`, of updates `[..., N, F]`."""
        whole = self.levels[-1]
        keep = self._value(whole.decay[..., 0, -1, :])[..., None]
        if whole.momentum is None:
            entered = self._value(whole.onward[..., 0, :, :]) * self.rate[..., 0]
            return keep, keep[..., :0], entered[..., : self.count, :]
        return keep, whole.momentum.released[..., 0, -1, :, None], whole.momentum.entered[..., 0, : self.count, :]

    def _by_update(self, x: Tensor) -> Tensor:
        """Rows by update, `[..., size, rows of each, F]`."""
        each = x.shape[-2] // self.count
        return F.pad(x, (0, 0, 0, (self.size - self.count) * each)).unflatten(-2, (self.size, each))


def _pairs(x: Tensor) -> tuple[Tensor, Tensor]:
    """The first and the second of each two neighbours, `[..., P, h, F]` to two of `[..., P / 2, h, F]`."""
    return x[..., 0::2, :, :], x[..., 1::2, :, :]
