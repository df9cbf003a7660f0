"""What the affine form takes: the rule, the columns that are written, their gates, and the state between calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kvbind.forms.parallel.scan import ScanGate

if TYPE_CHECKING:
    from kvbind.forms.parallel.affine_blocks import Part


@dataclass(frozen=True)
class AffineRule:
    """How columns, which are tokens or the several writes of each, enter the state and are read.

    Attributes:
        loss: "dot" or "squared".
        chunk: columns of one update. Gates act once per update.
        refresh: columns between two points at which gradients are renewed, in whole updates; None for at the call's start.
        before: gradients see the state already decayed by the update's gate; needs `refresh == chunk`.
        window: how many updates, the own one included, a gradient or an update is summed over.
        window_on: "gradient", summed before momentum and all taken at the own refresh point, or "update", summed after it.
        sees: what is read: the state before the own update ("past"), after it ("chunk"), or with its columns up to the own
            ("token").
        writes: columns of each read; needs `chunk == 1` where it is above 1.
        sign: 1 for descent, -1 for ascent.
    """

    loss: Literal["dot", "squared"] = "dot"
    chunk: int = 1
    refresh: int | None = 1
    before: bool = False
    window: int = 1
    window_on: Literal["gradient", "update"] = "gradient"
    sees: Literal["past", "chunk", "token"] = "token"
    writes: int = 1
    sign: int = 1

    def __post_init__(self) -> None:
        if self.refresh is not None and self.refresh % self.chunk:
            raise ValueError(f"refresh must be a multiple of chunk={self.chunk}; got {self.refresh}")
        if self.before and self.refresh != self.chunk:
            raise ValueError(f"before needs refresh to be chunk={self.chunk}; got {self.refresh}")
        if self.writes > 1 and self.chunk > 1:
            raise ValueError(f"writes={self.writes} needs chunk to be 1; got {self.chunk}")
        if self.writes > 1 and self.refresh not in (None, 1) and self.refresh % self.writes:
            raise ValueError(f"refresh must be None, 1 or a multiple of writes={self.writes}; got {self.refresh}")

    @property
    def history(self) -> int:
        """How many earlier columns an update's gradient is summed over."""
        return (self.window - 1) * self.chunk if self.window_on == "gradient" else 0

    @property
    def lags(self) -> int:
        """How many earlier updates enter the state again."""
        return self.window - 1 if self.window_on == "update" else 0


@dataclass(frozen=True)
class Columns:
    """What is written; the axis of columns is axis 2.

    Attributes:
        k: features that writes go through, `[B, H, N, F]`.
        v: values `[B, H, N, Dv]`.
        rate: learning rate of each, a number or `[B, H, N]`.
        e: features by which the squared loss reads the state, `[B, H, N, F]`; None where these are `k`.
    """

    k: Tensor
    v: Tensor
    rate: Tensor | float = 1.0
    e: Tensor | None = None

    def __len__(self) -> int:
        return self.k.shape[2]

    def map(self, change: Callable[[Tensor], Tensor]) -> Columns:
        """These columns with every tensor changed."""
        rate = change(self.rate) if isinstance(self.rate, Tensor) else self.rate
        return Columns(change(self.k), change(self.v), rate, None if self.e is None else change(self.e))

    def span(self, start: int, stop: int) -> Columns:
        """The columns from `start` up to `stop`."""
        return self.map(lambda x: x[:, :, start:stop])

    def after(self, earlier: Columns | None, count: int) -> Columns:
        """These columns behind the last `count` earlier ones."""
        rate, before = self.rates(), None if earlier is None else earlier.rates()
        k, v = (None, None) if earlier is None else (earlier.k, earlier.v)
        e = k if earlier is None or earlier.e is None else earlier.e
        return Columns(
            behind(k, self.k, count),
            behind(v, self.v, count),
            behind(before, rate, count),
            None if self.e is None else behind(e, self.e, count),
        )

    def rates(self) -> Tensor:
        """The rate of each, `[B, H, N]`."""
        return self.rate if isinstance(self.rate, Tensor) else self.v.new_full(self.k.shape[:3], self.rate)


def behind(earlier: Tensor | None, x: Tensor, count: int) -> Tensor:
    """What columns `[B, H, N, ...]` have, behind that of the last `count` earlier; zeros stand for what there is not."""
    known = x[:, :, :0] if earlier is None else earlier[:, :, max(earlier.shape[2] - count, 0) :].to(x.dtype)
    return F.pad(torch.cat((known, x), dim=2), (0, 0) * (x.dim() - 3) + (count - known.shape[2], 0))


@dataclass(frozen=True)
class Gates:
    """What multiplies updates and reads; every one may be missing.

    The first three have one entry per update, of `S = ceil(N / chunk)`; the others one per read, of `R = N / writes`.

    Attributes:
        decay: what is left of the state, `[B, H, S]` or, one per key channel, `[B, H, S, F]`.
        momentum: decay of the momentum buffer, `[B, H, S]`.
        step_rate: factor of what enters the state, `[B, H, S]`.
        partial_decay, partial_momentum, partial_step_rate: the same gates of the update made of the own update's columns
            up to the own, which is what `sees="token"` reads where `chunk` is above 1: `[B, H, R]`, the first maybe
            `[B, H, R, F]`. All whose gate there is must be given.
        read_rate: with it column t sees `M_s + c_t sum_(s <= i <= t) U_i`, where s is its refresh point, and the span leaves
            `M_s + c_last sum U_i`; `[B, H, R]`. It needs `sees="token"` and excludes decay and momentum.
    """

    decay: ScanGate | None = None
    momentum: ScanGate | None = None
    step_rate: Tensor | None = None
    partial_decay: Tensor | None = None
    partial_momentum: Tensor | None = None
    partial_step_rate: Tensor | None = None
    read_rate: Tensor | None = None

    def of(self, rule: AffineRule, part: Part, dtype: torch.dtype) -> Gates:
        """Those of one part's blocks, `[B, H, n, ...]`."""
        first = part.start // rule.chunk
        updates = slice(first, first + part.blocks * part.count)
        reads = slice(part.start // rule.writes, part.stop // rule.writes)

        def cut(x: Tensor | None, where: slice) -> Tensor | None:
            return None if x is None else x[:, :, where].to(dtype).unflatten(2, (part.blocks, -1))

        def gate(x: ScanGate | None) -> ScanGate | None:
            return None if x is None else ScanGate(x.values[:, :, updates].to(dtype).unflatten(2, (part.blocks, -1)), x.log)

        return Gates(
            gate(self.decay),
            gate(self.momentum),
            cut(self.step_rate, updates),
            cut(self.partial_decay, reads),
            cut(self.partial_momentum, reads),
            cut(self.partial_step_rate, reads),
            cut(self.read_rate, reads),
        )


@dataclass(frozen=True)
class AffineState:
    """What goes on from call to call.

    Attributes:
        weights: the last layer, `[B, H, F, Dv]`.
        buffers: momentum buffer after the last update and those of the updates before it, newest first,
            `[B, H, W, F, Dv]`: W is `window - 1` with `window_on="update"`, and at least 1 with momentum. Without momentum a
            buffer is one update's gradient.
        recent: the last `(window - 1) * chunk` columns with `window_on="gradient"`; None where there are none yet.
    """

    weights: Tensor
    buffers: Tensor
    recent: Columns | None = None

    @staticmethod
    def start(rule: AffineRule, weights: Tensor, momentum: Tensor | None = None) -> AffineState:
        """The state of a sequence that has read nothing.

        Args:
            rule: how columns enter it.
            weights: the last layer, `[B, H, F, Dv]`.
            momentum: the buffer after the last update, likewise; None without momentum.
        """
        count = max(rule.lags, 0 if momentum is None else 1)
        buffers = weights.new_zeros(*weights.shape[:2], count, *weights.shape[2:])
        if momentum is not None:
            buffers = torch.cat((momentum.unsqueeze(2), buffers[:, :, 1:]), dim=2)
        return AffineState(weights, buffers)


def check(rule: AffineRule, total: int, gates: Gates, held: int) -> None:
    """Raise `ValueError` for gates, a number of columns or of buffers that a rule excludes."""
    if gates.read_rate is not None:
        if rule.sees != "token" or gates.decay is not None or gates.momentum is not None:
            raise ValueError(f"read_rate needs sees='token' and neither decay nor momentum; got {rule}")
        if rule.refresh is not None and rule.refresh % rule.writes:
            raise ValueError(f"read_rate needs refresh to be a multiple of writes={rule.writes}; got {rule.refresh}")
    if gates.momentum is not None and not held:
        raise ValueError("state must have a buffer where momentum is given; got none")
    if held < rule.lags:
        raise ValueError(f"state must have {rule.lags} buffers for {rule}; got {held}")
    if total % rule.writes:
        raise ValueError(f"columns must be a multiple of writes={rule.writes}; got {total}")
    if rule.sees == "token" and rule.chunk > 1:
        for name in ("decay", "momentum", "step_rate"):
            if (getattr(gates, name) is None) != (getattr(gates, f"partial_{name}") is None):
                raise ValueError(
                    f"{name} and partial_{name} must be given together where sees='token' and chunk={rule.chunk}"
                )
