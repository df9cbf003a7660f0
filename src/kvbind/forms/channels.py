"""Shares in a state whose every key channel has a gate of its own, without a matrix for each channel.

A score of a read t and a column j is `sum_f q_tf G_tj,f k_jf`. With a boundary c between the two, `G_tj,f` is what reaches c of
j times what reaches t of c, so that scores are products of scaled features (arXiv 2312.06635, section 4). Scaling all of a
block to one boundary divides by products of gates, which overflow. Here a block is halved, its halves are halved, and so on: the
reads of every second half meet the columns of the first at the boundary between them. All factors are products of gates
over stretches that begin or end there, at most 1 each, and nothing is ever divided.

With momentum what passes a boundary is two numbers, the channel's share in the state and the update's in the buffer, and
features are twice as wide.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvbind.forms.scan import Gate


@dataclass(frozen=True)
class _Stretch:
    """`P` neighbouring stretches of `h` updates each.

    Attributes:
        decay: what multiplies the state up to each place, of the gates' kind, `[..., P, h + 1, F]`.
        released: share of the buffer before the stretch in the state at each place, `[..., P, h + 1, F]`; None without
            momentum.
        carried: its share in the buffer, `[..., P, h + 1]`; None likewise.
        onward: what multiplies each update's entry up to the end, of the gates' kind, `[..., P, h, F]`.
        entered: share of each update's gradient in the state at the end, `[..., P, h, F]`; None without momentum, where it
            is `onward` times the update's rate.
        kept: its share in the buffer at the end, `[..., P, h]`; None likewise.
    """

    decay: Tensor
    onward: Tensor
    released: Tensor | None = None
    carried: Tensor | None = None
    entered: Tensor | None = None
    kept: Tensor | None = None


class ChannelFlow:
    """Shares of blocks of `N` updates in states of `F` key channels.

    Args:
        retention: gates `[..., N, F]`.
        momentum: gates `[..., N]`, or None.
        rate: what multiplies each update as it enters, `[..., N]`.
    """

    def __init__(self, retention: Gate, momentum: Gate | None, rate: Tensor) -> None:
        self.count, self.gate = retention.values.shape[-2], retention
        self.size = 1 << (self.count - 1).bit_length()
        short = self.size - self.count
        gates = F.pad(retention.values, (0, 0, 0, short), value=retention.neutral)[..., None, :]
        self.rate = F.pad(rate, (0, short))[..., None]
        decay = torch.cat((torch.full_like(gates, retention.neutral), gates), dim=-2)
        stretch = _Stretch(decay, torch.full_like(gates, retention.neutral))
        if momentum is not None:
            m = F.pad(momentum.factor(), (0, short), value=1.0)[..., None]
            stretch = _Stretch(
                stretch.decay,
                stretch.onward,
                released=F.pad((self.rate * m)[..., None], (0, 0, 1, 0)).expand(decay.shape),
                carried=F.pad(m, (1, 0), value=1.0),
                entered=self.rate[..., None].expand(gates.shape),
                kept=torch.ones_like(m),
            )
        self.levels = [stretch]
        while self.levels[-1].onward.shape[-2] < self.size:
            self.levels.append(self._joined(self.levels[-1]))

    def _value(self, x: Tensor) -> Tensor:
        return x.exp() if self.gate.log else x

    def _joined(self, halves: _Stretch) -> _Stretch:
        """Stretches of twice the length."""
        join = self.gate.join
        first, second = _each(halves, lambda x: x[..., 0::2, :, :]), _each(halves, lambda x: x[..., 1::2, :, :])
        reach, rest = first.decay[..., -1:, :], second.decay[..., -1:, :]
        decay = torch.cat((first.decay, join(second.decay[..., 1:, :], reach)), dim=-2)
        onward = torch.cat((join(first.onward, rest), second.onward), dim=-2)
        if halves.released is None:
            return _Stretch(decay, onward)
        assert first.released is not None and first.carried is not None and first.entered is not None and first.kept is not None
        assert second.released is not None and second.carried is not None and second.entered is not None
        assert second.kept is not None
        kept, carried = first.kept, first.carried[..., -1:]
        released = self._value(second.decay[..., 1:, :]) * first.released[..., -1:, :]
        released = released + second.released[..., 1:, :] * carried[..., None]
        entered = self._value(rest) * first.entered + second.released[..., -1:, :] * kept[..., None]
        return _Stretch(
            decay,
            onward,
            torch.cat((first.released, released), dim=-2),
            torch.cat((first.carried, second.carried[..., 1:] * carried), dim=-1),
            torch.cat((entered, second.entered), dim=-2),
            torch.cat((kept * second.carried[..., -1:], second.kept), dim=-1),
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
        entering = columns * self.rate[..., None]
        scores = reads @ entering.mT if after else reads.new_zeros(*reads.shape[:-1], columns.shape[-2])
        place = slice(1, None) if after else slice(None, -1)
        for stretch in self.levels[:-1]:
            length = stretch.onward.shape[-2]

            def halves(y: Tensor, which: int, length: int = length) -> Tensor:
                return y.unflatten(-3, (-1, 2, length))[..., which, :, :, :]

            second = self._value(stretch.decay[..., 1::2, place, :])[..., None, :] * halves(reads, 1)
            if stretch.entered is None or stretch.released is None or stretch.kept is None:
                first = self._value(stretch.onward[..., 0::2, :, :])[..., None, :] * halves(entering, 0)
            else:
                second = torch.cat((second, stretch.released[..., 1::2, place, None, :] * halves(reads, 1)), dim=-1)
                its = halves(columns, 0)
                first = torch.cat(
                    (stretch.entered[..., 0::2, :, None, :] * its, stretch.kept[..., 0::2, :, None, None] * its), dim=-1
                )
            corner = second.flatten(-3, -2) @ first.flatten(-3, -2).mT
            upper = torch.cat((scores[..., 0::2, :, :], torch.zeros_like(corner)), dim=-1)
            scores = torch.cat((upper, torch.cat((corner, scores[..., 1::2, :, :]), dim=-1)), dim=-2)
        whole = self.levels[-1]
        on_state = self._value(whole.decay[..., 0, place, :])[..., None, :] * reads
        on_buffers = [] if whole.released is None else [whole.released[..., 0, place, None, :] * reads]
        count, width = x.shape[-2], k.shape[-2]
        return (
            on_state.flatten(-3, -2)[..., :count, :],
            [y.flatten(-3, -2)[..., :count, :] for y in on_buffers],
            scores[..., 0, :count, :width],
        )

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
        """Shares in the state behind the block: of the state `[..., F, 1]`, of buffers `[..., F, W]`, of updates `[..., N, F]`."""
        whole = self.levels[-1]
        keep = self._value(whole.decay[..., 0, -1, :])[..., None]
        if whole.released is None or whole.entered is None:
            return keep, keep[..., :0], (self._value(whole.onward[..., 0, :, :]) * self.rate)[..., : self.count, :]
        return keep, whole.released[..., 0, -1, :, None], whole.entered[..., 0, : self.count, :]

    def _by_update(self, x: Tensor) -> Tensor:
        """Rows by update, `[..., size, rows of each, F]`."""
        each = x.shape[-2] // self.count
        return F.pad(x, (0, 0, 0, (self.size - self.count) * each)).unflatten(-2, (self.size, each))


def _each(stretch: _Stretch, change: Callable[[Tensor], Tensor]) -> _Stretch:
    """A stretch with `change` applied to all: to what has no channels, as with one."""

    def plain(x: Tensor | None) -> Tensor | None:
        return None if x is None else change(x[..., None])[..., 0]

    return _Stretch(
        change(stretch.decay),
        change(stretch.onward),
        None if stretch.released is None else change(stretch.released),
        plain(stretch.carried),
        None if stretch.entered is None else change(stretch.entered),
        plain(stretch.kept),
    )
