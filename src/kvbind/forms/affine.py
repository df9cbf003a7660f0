"""The parallel form of inner loops whose state is an affine function of their writes: one triangular system per block.

Where the last layer alone is trained, once per update and without renormalization, state and momentum buffer after any
number of updates are sums of what they started from and of the writes so far, with products of gates as coefficients:

    M_t = b_t S + f_t D + sum_(j <= t) G_tj k_j^T U_j

A write under the dot loss is `U_i = r_i v_i`. Under the squared loss it reads the state, `U_i = r_i (v_i - e_i M_p(i))`,
where p(i) is the last point up to i at which gradients are renewed. Putting the first equation into the second gives one
unit lower triangular system for a block of tokens, `(I + N) U = r (v - e (b S + f D))`. Reads are then attention to the
block's own writes plus a read of S and D, and S and D after the block are linear in U.

Instances: the delta rule in its WY representation (arXiv 2406.06484), gated (2412.06464), with gates per key channel
(2312.06635, 2510.26692), products of several steps per token (2502.10297), mini-batches with a rate of the reader
(2407.04620), momentum (2501.00663), windows (2505.23735).

Nothing here knows an inner loop: operands are features of the last layer, and `AffineRule` says how they are combined.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kvbind.forms.channels import ChannelFlow
from kvbind.forms.finite import known_finite, seen_product, spoilt
from kvbind.forms.scan import Gate, decay_matrix, up_to

BLOCK = 64
"""Columns in a block, or one update where that has more. A block's scores and its triangular system cost as many operations
per column as the block has columns, a block's state as many as a head has channels, and heads have 64 to 128 of them."""

CHANNEL_BLOCK = 16
"""Columns in a block whose coefficients are held channel by channel: this many numbers per column and channel."""


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

    decay: Gate | None = None
    momentum: Gate | None = None
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

        def gate(x: Gate | None) -> Gate | None:
            return None if x is None else Gate(x.values[:, :, updates].to(dtype).unflatten(2, (part.blocks, -1)), x.log)

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


def affine(
    rule: AffineRule, q: Tensor | None, columns: Columns, gates: Gates, state: AffineState
) -> tuple[Tensor, AffineState]:
    """Run columns from a refresh point on.

    Computed in the weights' dtype, or in float32 where that is narrower.

    Args:
        rule: how columns enter the state and are read.
        q: features that are read, `[B, H, N / writes, F]`; None to read nothing.
        columns: the N columns.
        gates: theirs.
        state: the state at the first column, which is a refresh point.

    Returns:
        Outputs `[B, H, N / writes, Dv]` (empty where nothing is read), and the state at the last refresh point, or with
        `refresh=None` after the last complete update: columns behind it have been read but are still to be written.

    Raises:
        ValueError: gates that the rule excludes.
    """
    check(rule, len(columns), gates, state.buffers.shape[2])
    dtype = torch.promote_types(state.weights.dtype, torch.float32)
    columns = columns.map(lambda x: x.to(dtype))
    if rule.history:
        columns = columns.after(state.recent, rule.history)
    run = _Run(rule, None if q is None else q.to(dtype), columns, gates, state.weights.to(dtype), state.buffers.to(dtype))
    total, outputs = len(columns) - rule.history, []
    end, whole = run, 0
    for part in parts(rule, total, gates):
        output, run = run.part(part)
        outputs.append(output)
        if part.complete:
            end, whole = run, part.stop
    weights = end.weights
    if gates.read_rate is not None and rule.refresh is None and end.renewed is not None:
        weights = end.renewed + left_by(rule, gates, whole) * (weights - end.renewed)
    recent = columns.span(whole, whole + rule.history) if rule.history else None
    output = torch.cat(outputs, dim=2) if outputs and q is not None else columns.v[:, :, :0]
    return output, AffineState(weights, end.buffers, recent)


def left_by(rule: AffineRule, gates: Gates, whole: int) -> Tensor:
    """What share of its writes a span leaves whose state stops behind `whole` columns, `[B, H, 1, 1]`."""
    assert gates.read_rate is not None
    return gates.read_rate[:, :, whole // rule.writes - 1, None, None]


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


@dataclass(frozen=True)
class _Run:
    """A call under way: its operands, and the state where it stands.

    Attributes:
        rule, q, columns, gates: of the call, the columns behind those of the window.
        weights: the last layer.
        buffers: those of `AffineState`.
        renewed: the last layer at the last refresh point; None before the first.
    """

    rule: AffineRule
    q: Tensor | None
    columns: Columns
    gates: Gates
    weights: Tensor
    buffers: Tensor
    renewed: Tensor | None = None

    def part(self, part: Part) -> tuple[Tensor, _Run]:
        """Outputs `[B, H, R, Dv]` of one part, and where the call then stands."""
        rule, layout = self.rule, Layout(self.rule, part, self.weights.device)
        columns = self.columns.map(layout.windows)
        k, v, e = columns.k, columns.v, columns.k if columns.e is None else columns.e
        rate = columns.rate[..., None] if isinstance(columns.rate, Tensor) else columns.rate
        gates = self.gates.of(rule, part, self.weights.dtype)
        flow = flow_of(rule, gates, layout, k, self.buffers.shape[2])

        solved: tuple[Tensor, ...] = ()
        free = rule.loss == "dot"
        if free:
            v = rate * v
        else:
            if rule.before and gates.decay is not None:
                factor = gates.decay.factor()
                e = e * (factor if factor.dim() == 5 else factor[..., None])[..., layout.update, :]
            if part.spans > 1:
                solved = _writes(flow.rows(e, layout.residuals, k), v, rate, layout.first < layout.residuals[:, None])

        weights, buffers, renewed = self.weights, self.buffers, self.renewed
        rates = None if gates.read_rate is None else gates.read_rate[..., None]
        # taken apart at once: the gradient of taking one block out of a tensor is as large as the tensor
        count = part.blocks
        per_block = zip(*(apart(x, count) for x in (k, v, e, rate, rates)), *(apart(x, count) for x in solved), strict=True)
        states, renewals, buffered, writes = [], [], [], []
        for b, (moved, (its_k, own, its_e, its_rate, its_read_rate, *its_solved)) in enumerate(
            zip(flow.moves(count), per_block, strict=True)
        ):
            if part.renews == "all" or (part.renews == "first" and not b):
                renewed = weights
            states.append(weights)
            buffered.append(buffers)
            if its_solved:
                own, on_state, *on_buffers = its_solved
                own = own - on_state @ weights
                for x, buffer in zip(on_buffers, buffers.unbind(2), strict=True):
                    own = own - x @ buffer
            elif not free:
                assert renewed is not None
                own = its_rate * (own - its_e @ renewed)
            writes.append(own)
            weights, buffers = moved.step(its_k, own, weights, buffers)
            if rates is not None:
                assert renewed is not None
                renewals.append(renewed)
                if part.ends and (part.renews == "all" or b == count - 1):
                    weights = renewed + its_read_rate[:, :, -1:] * (weights - renewed)
        after = replace(self, weights=weights, buffers=buffers, renewed=renewed)
        if self.q is None:
            return v[:, :, 0, :0], after

        q = layout.blocks(self.q[:, :, part.start // rule.writes : part.stop // rule.writes])
        on_state, on_buffers, on_writes = flow.reads(q, k)
        output = seen_product(torch.where(layout.seen, on_writes, 0.0), torch.stack(writes, 2), layout.seen)
        started = torch.stack(states, 2)
        for x, held in zip(on_buffers, torch.stack(buffered, 2).unbind(3), strict=True):
            output = output + x @ held
        if rates is None:
            output = output + on_state @ started
        else:
            base = torch.stack(renewals, 2)
            output = q @ base + rates * (output + on_state @ (started - base))
        return output.flatten(2, 3), after


class Layout:
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

    layout: Layout
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


def flow_of(rule: AffineRule, gates: Gates, layout: Layout, k: Tensor, held: int) -> Flow:
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
    def of(layout: Layout, decay: Gate | None, enter_buffers: Tensor, enter_updates: Tensor) -> _Coefficients:
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


def _writes(rows: Rows, v: Tensor, rate: Tensor | float, seen: Tensor) -> tuple[Tensor, ...]:
    """What the columns of blocks write: of their values, and per unit of state and of each buffer before the block.

    Args:
        rows: what their residuals read.
        v: values `[..., L, Dv]`.
        rate: a number or `[..., L, 1]`.
        seen: which columns each residual sees, bool `[L, L]`.

    Returns:
        `[..., L, Dv]`, then `[..., L, F]` for the state and each buffer.
    """
    on_state, on_buffers, among = rows
    right = [v, on_state, *on_buffers]
    solved = _solved(rate * torch.where(seen, among, 0.0), rate * torch.cat(right, dim=-1), seen)
    return solved.split([x.shape[-1] for x in right], dim=-1)


def _solved(among: Tensor, right: Tensor, seen: Tensor) -> Tensor:
    """`x` of `x + among x = right`, of which row i depends on the rows that it sees alone.

    Args:
        among: `[..., L, L]`, 0 where a row does not see.
        right: `[..., L, m]`.
        seen: bool `[L, L]`, below the diagonal.
    """
    if known_finite(among, right):
        return torch.linalg.solve_triangular(among, right, upper=False, unitriangular=True)
    wrong = ~(right.isfinite().all(-1) & among.isfinite().all(-1))
    among, right = (x.masked_fill(wrong[..., None], 0.0) for x in (among, right))
    solved = torch.linalg.solve_triangular(among, right, upper=False, unitriangular=True)
    # rows pass it on to all that see them
    return spoilt(solved, (wrong | (seen & wrong[..., None, :]).any(-1))[..., None])
