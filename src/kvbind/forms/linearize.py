"""The theorems as an object: the linear attention that an inner loop is (arXiv 2602.21204, theorems 5.1 to 5.3).

`linearize` runs the inner loop once and reads off, along its trajectory, the effective queries, keys and values, the
starting state and every decay. `LinearAttention` then computes outputs from these alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kvbind.forms.autocast import without_autocast
from kvbind.forms.recurrent import (
    Chunk,
    chunk_gates,
    chunks,
    last_share,
    prefix_gates,
    prefix_updates,
    seen_weights,
    slid,
    writers_of,
)
from kvbind.forms.scan import decay_matrix
from kvbind.forms.tokens import Tokens, as_factor
from kvbind.forms.validation import LearningRate, check_operands
from kvbind.inner.gates import given_gates
from kvbind.inner.losses import descent_direction
from kvbind.inner.networks import DepthwiseConv, Network, gated
from kvbind.inner.orthogonalize import NewtonSchulz
from kvbind.inner.rule import (
    FastWeights,
    apply_update,
    channel_norm,
    decayed,
    gradient,
    pull,
    rescale,
    set_off,
    shape_update,
)
from kvbind.inner.spec import InnerLoop


@dataclass(frozen=True, eq=False)
class Partial:
    """Factors of each token's own under `visibility="token"`: what the rule does with its chunk's tokens up to it.

    Attributes:
        momentum: `[B, H, T]`, or None.
        retention: `[B, H, T]`, or `[B, H, T, F]` for the rows of the state, or None.
        rescaling: `[B, H, T, Dv]`, or None.
        step: `[B, H, T]`, or None.
        ahead: how many of each update's writes are of the window before its chunk, and seen by all of the chunk.
    """

    momentum: Tensor | None
    retention: Tensor | None
    rescaling: Tensor | None
    step: Tensor | None = None
    ahead: int = 0


@dataclass(frozen=True, eq=False)
class Share:
    """With a read rate: what tokens see, and spans leave, of the updates since their span began.

    Attributes:
        seen: `c_t`, `[B, H, T]`.
        closes: after how many updates each span ends.
        left: what of its updates it leaves, `[B, H, spans]`.
    """

    seen: Tensor
    closes: tuple[int, ...]
    left: Tensor


@dataclass(frozen=True, eq=False)
class Anchored:
    """With an anchor A: `S <- S - p (S - A)` before rescaling, `A <- f A + (1 - f) S` behind it; A is `S_0` at the start.

    Attributes:
        pull: `p_u`, `[B, H, U, F, Dv]`.
        follow: `f_u`, `[B, H, U]`.
        detach: what carries no gradient: A at the "start", or what it is to "follow".
    """

    pull: Tensor
    follow: Tensor
    detach: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class OutputHead:
    """Layer normalization behind the attention: `o = skip + gain LN(o) + shift`.

    Attributes:
        eps: added to the variance.
        gain: `[B, T, H, Dv]`.
        shift: `[B, T, H, Dv]`, or None.
        skip: `[B, T, H, Dv]`, or None.
    """

    eps: float
    gain: Tensor
    shift: Tensor | None
    skip: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """The head's output at `x`, `[B, T, H, Dv]`."""
        y = F.layer_norm(x, x.shape[-1:], eps=self.eps) * self.gain
        y = y if self.shift is None else y + self.shift
        return y if self.skip is None else self.skip + y


class _Place(NamedTuple):
    """What there is before an update: the state, the momentum buffer, what a window holds, and what a span has written."""

    state: Tensor
    buffer: Tensor
    held: tuple[Tensor, ...]
    travelled: Tensor


@dataclass(frozen=True, eq=False)
class LinearAttention:
    """A linear attention whose operands were read off an inner loop's trajectory.

    Writes enter in updates, one per chunk and step. With `G_u = sum of k^_i^T v^_i` over the writes of update u,

        M_u   = m_u M_u-1 + G_u                             (momentum)
        S_u+1 = r_u * (a_u S_u +/- e_u X_u(M_u + ..))       (X: orthogonalization, or a factor per value channel; e: step
                                                            rate; the sum over a window of updates)
        o_t   = head(gate_t * q^_t S)                       (S as of the updates that token t sees)

    Under `visibility="token"` a token also sees the writes of its own chunk up to itself, through factors of its own.
    A depthwise convolution is linear attention with one head per channel, 9 key channels (the 3x3 neighbourhood) and one
    value channel: H is then heads times channels. With S steps per chunk a token writes S times.

    Attributes:
        q: effective queries `phi_new(q_t)`, `[B, T, H, F]` in the state's dtype.
        k: effective keys `phi_old(k_i)`, `[B, W, H, F]`, one for each of W writes; W = T with one step per chunk.
        v: effective values, `lr_i g_i` times the GLU's input gate, `[B, W, H, Dv]`; zero for tokens that do not write.
        initial_state: `S_0`, the starting last layer, `[B, H, F, Dv]`. A bias is its last row, beside a feature of ones;
            where that has another rate than the matrix, rates are on the keys and not on the values.
        gate: the GLU's output gate, `[B, T, H, Dv]`, or None.
        write_tokens: which token makes each write, `[W]`.
        update_bounds: update u holds the writes from `update_bounds[u]` up to `update_bounds[u + 1]`; writes behind the
            last bound belong to an incomplete chunk and enter no state.
        seen_updates: how many updates each token sees whole; T ints that never fall.
        sign: 1 for descent, -1 for ascent.
        momentum: `m_u`, `[B, H, U]`, or None.
        retention: `a_u`, `[B, H, U]`, or `[B, H, U, F]` for the rows of the state, or None.
        rescaling: `r_u`, what weight normalization multiplies each value channel by, `[B, H, U, Dv]`, or None.
        read_rescaling: what it multiplies each value channel of an output by under `normalize="read"`, which leaves the
            state as it is: row n for tokens that see n updates, `[B, H, U + 1, Dv]`; None without, and where `partial`
            holds it.
        clipping: what clipping multiplies each value channel of an update by, `[B, H, U, Dv]`, or None.
        orthogonalize: the Newton-Schulz iteration that acts on each update, or None.
        partial: the factors of `visibility="token"`, or None.
        step: `e_u`, `[B, H, U]`, or None.
        window: over how many updates, momentum included, each is summed.
        anchored: the pull towards an anchor, or None.
        share: what tokens see of their span's updates, or None.
        head: what stands behind the attention, or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    initial_state: Tensor
    gate: Tensor | None
    write_tokens: Tensor
    update_bounds: tuple[int, ...]
    seen_updates: tuple[int, ...]
    sign: int
    momentum: Tensor | None
    retention: Tensor | None
    rescaling: Tensor | None
    read_rescaling: Tensor | None
    clipping: Tensor | None
    orthogonalize: NewtonSchulz | None
    partial: Partial | None
    step: Tensor | None = None
    window: int = 1
    anchored: Anchored | None = None
    share: Share | None = None
    head: OutputHead | None = None

    @property
    def updates(self) -> int:
        """U, the number of updates that enter the state."""
        return len(self.update_bounds) - 1

    def output(self) -> Tensor:
        """The attention's output `[B, T, H, Dv]` in the state's dtype; a convolution's channels are heads here."""
        read = self._read(self.v.transpose(1, 2), self.initial_state)
        return read if self.head is None else self.head(read)

    def _read(self, v: Tensor, initial: Tensor, channel: int | None = None, maps: Sequence[Tensor] | None = None) -> Tensor:
        """What outputs take before a head, `[B, T, H, D]`.

        Args:
            v: values `[B, H, W, D]`.
            initial: the starting state `[B, H, F, D]`.
            channel: the value channel whose factors act on all of them; None for each its own.
            maps: what each update is multiplied by from the left in place of orthogonalization.
        """

        def own(factor: Tensor) -> Tensor:
            return factor if channel is None else factor[..., channel : channel + 1]

        q, k = self.q.transpose(1, 2), self.k.transpose(1, 2)
        outputs, start = [], 0
        places = enumerate(self._places(k, v, initial, own, maps))
        update, place = next(places)
        for seen, members in groupby(self.seen_updates):
            while update < seen:
                update, place = next(places)
            stop = start + len(list(members))
            tokens, queries = slice(start, stop), q[:, :, start:stop]
            if self.partial is not None:
                first = self.update_bounds[seen]
                read = self._read_own_chunk(self.partial, place, queries, k, v, tokens, first, own)
            else:
                read = queries @ place.state
                if self.share is not None:
                    read = read + self.share.seen[:, :, tokens, None] * (queries @ place.travelled)
            if self.read_rescaling is not None:
                read = read * own(self.read_rescaling[:, :, seen, None])
            outputs.append(read)
            start = stop
        if not outputs:
            return self.v.new_empty(*self.q.shape[:3], v.shape[-1])
        gate = None if self.gate is None else own(self.gate)
        return gated(gate, torch.cat(outputs, dim=2).transpose(1, 2))

    def _places(
        self, k: Tensor, v: Tensor, initial: Tensor, own: Callable[[Tensor], Tensor], maps: Sequence[Tensor] | None
    ) -> Iterator[_Place]:
        """What there is before each update and after the last; arguments as `_read` has them."""
        nothing = torch.zeros_like(initial)
        state, buffer, travelled = initial, nothing, nothing
        detach = () if self.anchored is None else self.anchored.detach
        anchor = initial.detach() if "start" in detach else initial
        held: tuple[Tensor, ...] = (nothing,) * (self.window - 1)
        yield _Place(state, buffer, held, travelled)
        for u in range(self.updates):
            write, held = self._written(u, k, v, buffer, held)
            if self.momentum is not None:
                buffer = write if self.window == 1 else held[-1]
            if maps is not None:
                write = maps[u] @ write
            elif self.orthogonalize is not None:
                write = self.orthogonalize(write)
            if self.clipping is not None:
                write = write * own(self.clipping[:, :, u, None])
            if self.step is not None:
                write = self.step[:, :, u, None, None] * write
            if self.share is not None:
                travelled = travelled + self.sign * write
                if u + 1 in self.share.closes:
                    left = self.share.left[:, :, self.share.closes.index(u + 1)]
                    state, travelled = state + left[..., None, None] * travelled, nothing
                yield _Place(state, buffer, held, travelled)
                continue
            if self.retention is not None:
                decay = self.retention[:, :, u]
                state = (decay[..., None] if decay.dim() > 2 else decay[..., None, None]) * state
            state = state + self.sign * write
            if self.anchored is not None:
                state = state - own(self.anchored.pull[:, :, u]) * (state - anchor)
            if self.rescaling is not None:
                state = state * own(self.rescaling[:, :, u, None])
            if self.anchored is not None:
                follow = self.anchored.follow[:, :, u, None, None]
                anchor = follow * anchor + (1 - follow) * (state.detach() if "follow" in detach else state)
            yield _Place(state, buffer, held, travelled)

    def _written(
        self, u: int, k: Tensor, v: Tensor, buffer: Tensor, held: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """What update u sums, momentum and window included, and what the window then holds."""
        rows = slice(self.update_bounds[u], self.update_bounds[u + 1])
        write = k[:, :, rows].mT @ v[:, :, rows]
        if self.momentum is not None:
            write = self.momentum[:, :, u, None, None] * buffer + write
        if self.window == 1:
            return write, held
        return sum(held, write), (*held[1:], write)

    def _read_own_chunk(
        self,
        partial: Partial,
        place: _Place,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tokens: slice,
        first: int,
        own: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """What a chunk's `tokens` read of the state before it and of the chunk's writes, from `first` on, up to each."""
        chunk = slice(first + partial.ahead, first + partial.ahead + tokens.stop - tokens.start)
        seen = (q @ k[:, :, chunk].mT).tril() @ v[:, :, chunk]
        if partial.ahead:
            earlier = slice(first, chunk.start)
            seen = seen + (q @ k[:, :, earlier].mT) @ v[:, :, earlier]
        if partial.momentum is not None:
            seen = seen + partial.momentum[:, :, tokens, None] * (q @ place.buffer)
        for buffer in place.held:
            seen = seen + q @ buffer
        if partial.step is not None:
            seen = partial.step[:, :, tokens, None] * seen
        if self.share is not None:
            seen = self.share.seen[:, :, tokens, None] * (self.sign * seen + q @ place.travelled)
            return q @ place.state + seen
        kept = partial.retention
        if kept is not None and kept.dim() > 3:
            read = (q * kept[:, :, tokens]) @ place.state
        else:
            read = q @ place.state if kept is None else kept[:, :, tokens, None] * (q @ place.state)
        read = read + self.sign * seen
        return read if partial.rescaling is None else read * own(partial.rescaling[:, :, tokens])

    @property
    def _is_simple(self) -> bool:
        """Whether each write's share in an output is a number, alike for all rows of the state."""
        by_row = self.retention is not None and self.retention.dim() > 3
        return (
            not by_row
            and self.step is None
            and self.window == 1
            and self.anchored is None
            and self.share is None
            and (self.partial is None or not self.partial.ahead)
        )

    def _maps(self) -> list[Tensor] | None:
        """The polynomial that orthogonalization is of each update, or None without."""
        if self.orthogonalize is None:
            return None
        k, v, found = self.k.transpose(1, 2), self.v.transpose(1, 2), []
        buffer = torch.zeros_like(self.initial_state)
        held: tuple[Tensor, ...] = (buffer,) * (self.window - 1)
        for u in range(self.updates):
            write, held = self._written(u, k, v, buffer, held)
            if self.momentum is not None:
                buffer = write if self.window == 1 else held[-1]
            found.append(polynomial(self.orthogonalize, write))
        return found

    def _weights_one_by_one(self, channel: int | None) -> Tensor:
        """`weights`, from what the recurrence makes of each write alone."""
        batch, heads, features, width = self.initial_state.shape
        count = self.v.shape[1]
        units = torch.eye(count, dtype=self.v.dtype, device=self.v.device).expand(batch, heads, -1, -1)
        nothing, maps = self.initial_state.new_zeros(batch, heads, features, count), self._maps()
        channels = range(width) if channel is None else (channel,)
        found = [self._read(units, nothing, d, maps).transpose(1, 2) for d in channels]
        return torch.stack(found).mean(0)

    def initial_output(self) -> Tensor:
        """What outputs take from `S_0`, before a head, `[B, T, H, Dv]`: the part that no token wrote."""
        if not self._is_simple:
            return self._read(torch.zeros_like(self.v.transpose(1, 2)), self.initial_state, maps=self._maps())
        q = self.q.transpose(1, 2)
        kept = F.pad(self._update_decays().cumprod(2), (0, 0, 1, 0), value=1.0)
        read = (q @ self.initial_state) * kept[:, :, list(self.seen_updates)] * self._read_factor(retained=True)
        return gated(self.gate, read.transpose(1, 2))

    def decays(self, channel: int | None = None) -> Tensor:
        """How much of each write is left in each output, `[B, H, T, W]`: momentum, retention, clipping, normalization, gate.

        A write that a token does not see has 0. Under orthogonalization a write is also mapped by each update's
        polynomial, which `weights` includes and this does not.

        Args:
            channel: the value channel to look at; None for the mean over channels.

        Raises:
            ValueError: writes of which rows of the state keep different shares, or windows, step or read rates: `weights`
                has what is left of each.
        """
        if not self._is_simple:
            raise ValueError(
                "decays are of writes whose share is one number: not with retention per key channel, a window, an anchor, "
                "read_rate, step_rate or update_tokens of causal chunks; weights() has what outputs take of each write"
            )
        return self._writes_from_updates(self._shares(channel)) + self._own_chunk_decays(channel)

    def weights(self, channel: int | None = None) -> Tensor:
        """Attention weights of every output over every write, `[B, H, T, W]`.

        Before a head `output()[b, t, h, d]` is the sum over w of `weights(d)[b, h, t, w] * v[b, w, h, d]`, and
        `initial_output()[b, t, h, d]`.
        Newton-Schulz enters as the polynomial that it is, in the state's precision, whatever `dtype` it runs in.

        Args:
            channel: the value channel to look at; None for the mean over channels, which is every channel's where
                nothing acts on channels one by one.
        """
        if not self._is_simple:
            return self._weights_one_by_one(channel)
        q, k, v = (x.transpose(1, 2) for x in (self.q, self.k, self.v))
        scores, shares = q @ k.mT, self._shares(channel)
        if self.orthogonalize is None:
            return scores * (self._writes_from_updates(shares) + self._own_chunk_decays(channel))
        weights, release = scores * self._own_chunk_decays(channel), self._release()
        for u in range(self.updates):
            held = self._per_write(release[:, :, u])[:, :, None] * k.mT
            accumulated = held @ v
            mapped = (q @ polynomial(self.orthogonalize, accumulated)) @ held
            weights = weights + self.sign * shares[..., u, None] * mapped
        return weights

    def matrix(self, channel: int | None = None) -> Tensor:
        """Token-mixing weights `[B, H, T, T]`: row t says how much of each token's effective values output t holds.

        These are `weights` with the writes of a token summed; with one step per chunk a token writes once.

        Args:
            channel: the value channel to look at; None for the mean over channels.
        """
        weights = self.weights(channel)
        mixing = weights.new_zeros(*weights.shape[:3], len(self.seen_updates))
        return mixing.index_add(3, self.write_tokens, weights)

    def _update_decays(self) -> Tensor:
        """`r_u a_u`, what each update leaves of the state before it: `[B, H, U, Dv or 1]`."""
        decay = self.initial_state.new_ones(*self.initial_state.shape[:2], self.updates, 1)
        if self.retention is not None:
            decay = decay * self.retention[..., None]
        return decay if self.rescaling is None else decay * self.rescaling

    def _release(self) -> Tensor:
        """How much of each update's write momentum holds at each update, `[B, H, U, U]`."""
        if self.momentum is not None:
            return decay_matrix(self.momentum)
        eye = torch.eye(self.updates, dtype=self.q.dtype, device=self.q.device)
        return eye.expand(*self.initial_state.shape[:2], -1, -1)

    def _read_factor(self, retained: bool) -> Tensor:
        """A token's own factor on the state that it reads (`retained`) or on its own chunk: `[B, H, T, Dv or 1]`."""
        batch, tokens, heads = self.q.shape[:3]
        factor = self.q.new_ones(batch, heads, tokens, 1)
        if self.read_rescaling is not None:
            factor = factor * self.read_rescaling[:, :, list(self.seen_updates)]
        if self.partial is None:
            return factor
        if retained and self.partial.retention is not None:
            factor = factor * self.partial.retention[..., None]
        return factor if self.partial.rescaling is None else factor * self.partial.rescaling

    def _outer_factor(self, channel: int | None, inner: Tensor) -> Tensor:
        """Take one channel of gate times `inner` `[B, H, T, ..., Dv or 1]`, or the mean over channels."""
        if self.gate is not None:
            gate = self.gate.transpose(1, 2)
            inner = inner * gate.reshape(*gate.shape[:3], *(1,) * (inner.dim() - 4), gate.shape[-1])
        if channel is None or inner.shape[-1] == 1:
            return inner.mean(-1)
        return inner[..., channel]

    def _shares(self, channel: int | None) -> Tensor:
        """How much of each update's shaped write is left in each output, `[B, H, T, U]`, without the sign."""
        decay = self._update_decays()
        left = decay_matrix(decay.mT)
        if self.rescaling is not None:
            left = left * self.rescaling.mT[..., None, :]
        if self.clipping is not None:
            left = left * self.clipping.mT[..., None, :]
        # row n: what is left after n updates
        left = F.pad(left, (0, 0, 1, 0))
        seen = left[..., list(self.seen_updates), :].permute(0, 1, 3, 4, 2)
        return self._outer_factor(channel, seen * self._read_factor(retained=True).unsqueeze(3))

    def _per_write(self, by_update: Tensor) -> Tensor:
        """Values by update `[..., U]` as values by write `[..., W]`, 0 for writes that enter no state."""
        counts = torch.tensor(self.update_bounds, device=by_update.device).diff()
        entered = by_update.repeat_interleave(counts, dim=-1)
        rest = len(self.write_tokens) - self.update_bounds[-1]
        return F.pad(entered, (0, rest))

    def _writes_from_updates(self, shares: Tensor) -> Tensor:
        return self.sign * self._per_write(shares @ self._release())

    def _own_chunk_decays(self, channel: int | None) -> Tensor:
        """The part of `decays` that `partial` brings, `[B, H, T, W]` (or a zero that broadcasts to it)."""
        if self.partial is None:
            return self.q.new_zeros(())
        seen = torch.tensor(self.seen_updates, device=self.q.device)
        first = torch.tensor(self.update_bounds, device=self.q.device)[seen]
        writes = torch.arange(len(self.write_tokens), device=self.q.device)
        own = (writes >= first[:, None]) & (writes <= torch.arange(len(seen), device=self.q.device)[:, None])
        weight = own.to(self.q.dtype)
        if self.partial.momentum is not None:
            release = self._release()
            before = F.pad(release, (0, 0, 1, 0))[..., seen, :]
            weight = weight + self.partial.momentum[..., None] * self._per_write(before)
        return self.sign * weight * self._outer_factor(channel, self._read_factor(retained=False))[..., None]


def polynomial(iteration: NewtonSchulz, matrix: Tensor) -> Tensor:
    """The matrix P with `P G = NewtonSchulz(G)`: each iteration multiplies from the left by a polynomial of `X X^T`.

    Args:
        iteration: its coefficients are used, not its dtype.
        matrix: `G`, `[..., rows, columns]`.

    Returns:
        `[..., rows, rows]` in the dtype of `matrix`.
    """
    norm = torch.linalg.vector_norm(matrix, dim=(-2, -1), keepdim=True) + 1e-7
    x = matrix / norm
    eye = torch.eye(matrix.shape[-2], dtype=matrix.dtype, device=matrix.device)
    product = eye / norm
    for a, b, c in iteration.coefficients:
        gram = x @ x.mT
        factor = a * eye + b * gram + c * (gram @ gram)
        x, product = factor @ x, factor @ product
    return product


@dataclass
class _Trajectory:
    """What `linearize` notes while the inner loop runs; heads first, one entry per update or per group of reads."""

    k: list[Tensor] = field(default_factory=list)
    v: list[Tensor] = field(default_factory=list)
    q: list[Tensor] = field(default_factory=list)
    gates: list[Tensor] = field(default_factory=list)
    momentum: list[Tensor] = field(default_factory=list)
    retention: list[Tensor] = field(default_factory=list)
    rescaling: list[Tensor] = field(default_factory=list)
    clipping: list[Tensor] = field(default_factory=list)
    step: list[Tensor] = field(default_factory=list)
    pull: list[Tensor] = field(default_factory=list)
    follow: list[Tensor] = field(default_factory=list)
    left: list[Tensor] = field(default_factory=list)
    gains: list[Tensor] = field(default_factory=list)
    shifts: list[Tensor] = field(default_factory=list)
    skips: list[Tensor] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    closes: list[int] = field(default_factory=list)
    earlier: list[int] = field(default_factory=list)

    def as_read(self, spec: InnerLoop) -> Tensor | float:
        """What rescaling is where nothing is written: none, or under `normalize="read"` the last."""
        return self.rescaling[-1] if spec.normalize == "read" and self.rescaling else 1.0


def linearize(
    spec: InnerLoop,
    weights: Mapping[str, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lr: LearningRate = 1.0,
    momentum: Tensor | None = None,
    retention: Tensor | None = None,
    log_retention: Tensor | None = None,
    erase: Tensor | None = None,
    read_rate: Tensor | None = None,
    step_rate: Tensor | None = None,
    update_tokens: slice | Tensor | None = None,
) -> LinearAttention:
    """Rewrite an inner loop over given operands as the linear attention it is.

    Works for every `InnerLoop`, reducible or not: where features or decays depend on the data, they are read off the
    trajectory. Sections 2 and 3 of the specification; arXiv 2602.21204, theorems 5.1 to 5.3 and appendix I.

    Args:
        spec: the inner loop.
        weights: starting fast weights, as `ttt` takes them.
        q: queries `[B, T, H, Dk]`.
        k: keys `[B, T, H, Dk]`.
        v: values `[B, T, H, Dv]`.
        lr: as `ttt` takes it.
        momentum: as `ttt` takes it.
        retention: as `ttt` takes it.
        log_retention: as `ttt` takes it.
        erase: as `ttt` takes it.
        read_rate: as `ttt` takes it.
        step_rate: as `ttt` takes it.
        update_tokens: as `ttt` takes it; not with a window, which other tokens then slide out of in each sequence.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
    """
    if isinstance(update_tokens, slice):
        # every token keeps its row; those outside the slice write zero
        mask = torch.zeros(q.shape[1], dtype=torch.bool, device=k.device)
        mask[update_tokens] = True
        update_tokens = mask
    gates = given_gates(
        log_retention, momentum=momentum, retention=retention, erase=erase, read_rate=read_rate,
        step_rate=step_rate,
    )  # fmt: skip
    call = check_operands(spec, weights, q, k, v, lr, gates, None, None, update_tokens)
    network = spec.network
    own = [name for name in ("read", "write") if getattr(type(network), name) is not getattr(Network, name)]
    if not network.applies_itself or (own and not isinstance(network, DepthwiseConv)):
        raise ValueError(
            f"spec's network must be one whose apply is features, last layer, gate and head, which is linear attention; "
            f"{type(network).__name__} has {' and '.join(own) or 'an apply'} of its own"
        )
    if call.tokens.mask is not None and spec.window_size > 1:
        raise ValueError(f"update_tokens must be None for linearize beside window={spec.window!r}")
    with without_autocast(q.device.type):
        return _linearize(spec, call.q.to(call.state.dtype), call.tokens, call.state.fast)


def _linearize(spec: InnerLoop, q: Tensor, tokens: Tokens, fast: FastWeights) -> LinearAttention:
    earlier = 0 if spec.sums_updates else (spec.window_size - 1) * (spec.chunk or 1)
    note = _Trajectory(earlier=[0] * earlier)
    initial, total, each = _last_layer(spec, fast.weights), q.shape[2], spec.writes
    bounds, seen, partials = [0], [], []
    # with chunks of one token, what a token sees is the chunk's whole update
    own_parts = spec.visibility == "token" and spec.chunk != 1
    whole = Chunk(tokens.span(0, 0), tokens, slice(0, total), True)
    fast = point = set_off(spec, fast)
    for chunk in [whole] if spec.chunk is None else chunks(spec, tokens, None):
        if chunk.renews:
            point = fast
        queries, own = q[:, :, chunk.queries], chunk.own
        entered = chunk.complete or spec.visibility in ("chunk", "full")
        if spec.visibility == "past":
            _note_read(spec, note, fast.weights, queries)
        elif own_parts:
            prefixes = prefix_updates(spec, fast, chunk, point.weights)
            _note_read(spec, note, prefixes.weights, queries.unsqueeze(-2))
            partials.append(_partial(spec, fast, prefixes, chunk, point.weights, note.as_read(spec)))
        if spec.visibility == "past" or own_parts:
            seen += [len(bounds) - 1] * queries.shape[2]
        places = range(chunk.queries.start, chunk.queries.stop)
        for row in range(len(own)) if each > 1 else range(1):
            writers = own.span(row, row + 1) if each > 1 else own
            mine = [places[row // each]] if each > 1 else list(places)
            for step in range(spec.steps):
                at = point.weights if not row and not step else fast.weights
                fast = _note_update(spec, note, fast, writers, at, mine, entered)
                if entered:
                    bounds.append(len(note.tokens))
                elif spec.steps > 1:
                    break
            if entered:
                fast = slid(spec, fast, writers)
                short = (spec.chunk or 1) - len(mine)
                note.earlier = (note.earlier + mine + [0] * short)[-earlier:] if earlier else []
        if spec.visibility == "chunk" or (spec.visibility == "token" and not own_parts):
            _note_read(spec, note, seen_weights(spec, fast, own), queries)
            seen += [len(bounds) - 1] * queries.shape[2]
        if spec.read_rate and chunk.complete and chunk.closes and spec.refresh != "call":
            share = last_share(own, fast.weights["out"])
            note.left.append(share.reshape(share.shape[:2]))
            note.closes.append(len(bounds) - 1)
            fast = set_off(spec, fast, share)
    if spec.visibility == "full":
        _note_read(spec, note, fast.weights, q)
        seen = [len(bounds) - 1] * total
    return _assemble(spec, note, initial, bounds, seen, partials, tokens)


def _last_layer(spec: InnerLoop, weights: Mapping[str, Tensor]) -> Tensor:
    """The last layer as a state, a bias as its last row."""
    out = weights["out"]
    return torch.cat((out, weights["out.bias"]), dim=-2) if spec.network.has_bias else out


def _with_ones(spec: InnerLoop, features: Tensor) -> Tensor:
    """Features with one of ones for a bias."""
    return F.pad(features, (0, 1), value=1.0) if spec.network.has_bias else features


def _note_read(spec: InnerLoop, note: _Trajectory, weights: Mapping[str, Tensor], queries: Tensor) -> None:
    """Note the effective queries, output gates and heads of some reads; per-token weights give queries an axis more."""
    network, per_token = spec.network, queries.dim() == 5

    def flat(x: Tensor) -> Tensor:
        return x.squeeze(-2) if per_token else x

    note.q.append(flat(_with_ones(spec, network.features(weights, queries))))
    gate, head = network.gate(weights, queries), network.output_head
    if gate is not None:
        note.gates.append(flat(gate))
    if head is None or head.where == "loss":
        return
    shape = (*queries.shape[:-1], weights["out"].shape[-1])
    note.gains.append(flat(head.gain(weights).expand(shape)))
    if not head.fast:
        note.shifts.append(flat(weights["beta"].expand(shape)))
    if head.residual:
        note.skips.append(flat(queries))


def _note_update(
    spec: InnerLoop,
    note: _Trajectory,
    fast: FastWeights,
    tokens: Tokens,
    at: Mapping[str, Tensor],
    places: list[int],
    entered: bool,
) -> FastWeights:
    """Note one update's writes and, where it enters the state, its factors; returns the weights after it.

    Args:
        spec: the inner loop.
        note: where to.
        fast: the weights before.
        tokens: what writes.
        at: the weights that gradients are taken at.
        places: of the tokens among all.
        entered: whether it enters the state.
    """
    network, out, gates = spec.network, fast.weights["out"], chunk_gates(tokens, fast.weights["out"])
    momentum, retention, step = (gates.get(name) for name in ("momentum", "retention", "step_rate"))
    at = decayed(spec, at, gates)
    k, v, rates, erase = writers_of(spec, fast, tokens, out.dtype)
    prediction = network.predict(at, k if erase is None else erase) if spec.loss == "squared" else None
    g = descent_direction(spec.loss, prediction, v)
    pulled, _ = network.through_head(at, k, g)
    features, values = _with_ones(spec, network.features(at, k)), gated(network.gate(at, k), pulled).expand_as(v)
    rate = rates["out"]
    if network.has_bias and not _alike(rate, rates["out.bias"]):
        both = [torch.as_tensor(x, dtype=out.dtype, device=out.device) for x in (rate, rates["out.bias"])]
        features = torch.cat((features[..., :-1] * both[0], features[..., -1:] * both[1]), dim=-1)
        rate = 1.0 if tokens.mask is None else tokens.mask[..., None].to(out.dtype)
    note.k.append(features)
    note.v.append((rate * values).expand_as(v))
    note.tokens += note.earlier + places
    if not entered:
        return fast

    updates = gradient(spec, at, k, v, rates, erase)
    after = apply_update(spec, fast, updates, gates)
    summed = updates if momentum is None else after.momentum
    if spec.sums_updates:
        summed = {name: after.window[name][..., -1, :, :] + fast.window[name].sum(-3) for name in updates}
    lead = out.shape[:2]
    writes = out.new_ones(lead, dtype=torch.bool)
    if tokens.mask is not None:
        writes = tokens.mask.any(2).expand_as(writes)
        after = after.join(fast, lambda new, old: torch.where(as_factor(writes, new), new, old))

    def settled(factor: Tensor, idle: float) -> Tensor:
        """A factor that leaves sequences as they are in which nothing writes."""
        return torch.where(as_factor(writes, factor), factor, idle)

    if momentum is not None:
        note.momentum.append(settled(momentum.reshape(lead), 1.0))
    if retention is not None:
        kept = retention.reshape(lead) if spec.gates["retention"].per == "head" else retention.squeeze(-1)
        note.retention.append(settled(kept, 1.0))
    if step is not None or (tokens.mask is not None and spec.chunk is not None):
        note.step.append(settled(out.new_ones(lead) if step is None else step.reshape(lead), 0.0))
    if spec.clip:
        note.clipping.append(1 / (channel_norm(network, summed["out"]) + 1))
    if spec.anchor is not None:
        held = {name: pull(spec.anchor, after.importance[name]) for name in spec.updated}
        note.pull.append(settled(_last_layer(spec, held), 0.0))
        note.follow.append(settled(out.new_full(lead, spec.anchor.follow), 1.0))
    if spec.normalize:
        shaped = shape_update(spec, summed["out"])
        base = fast.accumulated.get("out", out)
        base = (base if retention is None else retention * base) + spec.sign * (shaped if step is None else step * shaped)
        if spec.anchor is not None:
            base = base - held["out"] * (base - fast.anchor["out"])
        factor = rescale(network, base, fast.norms["out"])
        note.rescaling.append(torch.where(as_factor(writes, factor), factor, note.as_read(spec)))
    return after


def _alike(a: Tensor | float, b: Tensor | float) -> bool:
    """Whether two rates are the same."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b


def _partial(
    spec: InnerLoop,
    fast: FastWeights,
    each: FastWeights,
    chunk: Chunk,
    at: Mapping[str, Tensor],
    idle_rescaling: Tensor | float,
) -> Partial:
    """A chunk's share of the factors of `visibility="token"`; `idle_rescaling` that of tokens before which none writes."""
    mask, gates = chunk.own.mask, chunk.own.gates
    found = {name: prefix_gates(name, gates[name], mask) for name in ("momentum", "retention", "step_rate") if name in gates}
    rescaling = None
    if spec.normalize:
        if spec.normalize == "read":
            before = each.accumulated["out"]
        else:
            # the weights that line 6 rescales are those of the same rule without it
            plain = replace(fast, norms={}, accumulated={})
            before = prefix_updates(spec.replace(normalize=False), plain, chunk, at).weights["out"]
        rescaling = rescale(spec.network, before, fast.norms["out"].unsqueeze(2)).squeeze(-2)
    if mask is not None:
        # tokens behind which nothing of their chunk has been written see the state as it is
        writes = (mask.cumsum(2) > 0).expand(each.weights["out"].shape[0], fast.weights["out"].shape[1], -1)
        idle = {"momentum": 0.0, "retention": 1.0, "step_rate": 0.0}
        found = {name: torch.where(as_factor(writes, x), x, idle[name]) for name, x in found.items()}
        rescaling = None if rescaling is None else torch.where(writes[..., None], rescaling, idle_rescaling)
    earlier = 0 if spec.sums_updates else (spec.window_size - 1) * (spec.chunk or 1)
    return Partial(found.get("momentum"), found.get("retention"), rescaling, found.get("step_rate"), earlier)


def _assemble(
    spec: InnerLoop,
    note: _Trajectory,
    initial: Tensor,
    bounds: list[int],
    seen: list[int],
    partials: list[Partial],
    tokens: Tokens,
) -> LinearAttention:
    """Join what was noted, in the layout of `LinearAttention`."""
    conv = isinstance(spec.network, DepthwiseConv)
    width = tokens.v.shape[-1]

    def rows(parts: list[Tensor], fill: Tensor, features: bool) -> Tensor:
        """`[B, H, T, F]` parts (a convolution: `[B, H, T, D, 9]`, values `[B, H, T, D]`) joined as `[B, T, H, F]`."""
        x = torch.cat(parts, dim=2) if parts else fill
        if conv:
            x = x.movedim(3, 2) if features else x.mT.unsqueeze(-1)
            x = x.flatten(1, 2)
        return x.transpose(1, 2)

    def factors(parts: list[Tensor]) -> Tensor | None:
        """One gate per update: `[B, H, U]`; channels of a convolution share their head's."""
        if not parts:
            return None
        x = torch.stack(parts, dim=2)
        return x.repeat_interleave(width, dim=1) if conv else x

    def heads_last(parts: list[Tensor]) -> Tensor | None:
        return torch.cat(parts, dim=2).transpose(1, 2) if parts else None

    def channel_factors(parts: list[Tensor]) -> Tensor | None:
        """One factor per update and value channel: `[B, H, U, Dv]`."""
        if not parts:
            return None
        if conv:
            return torch.stack([x.reshape(x.shape[0], -1, 1) for x in parts], dim=2)
        return torch.stack([x.squeeze(-2) for x in parts], dim=2)

    def joined(parts: list[Tensor | None]) -> Tensor | None:
        found = [x for x in parts if x is not None]
        return torch.cat(found, dim=2) if found else None

    partial = None
    if partials:
        partial = Partial(
            joined([p.momentum for p in partials]),
            joined([p.retention for p in partials]),
            joined([p.rescaling for p in partials]),
            joined([p.step for p in partials]),
            partials[0].ahead,
        )
    rescaling, read_rescaling = channel_factors(note.rescaling), None
    if spec.normalize == "read" and partial is None:
        first = initial.new_ones(*initial.shape[:2], 1, 1) if rescaling is None else torch.ones_like(rescaling[:, :, :1])
        read_rescaling = first if rescaling is None else torch.cat((first, rescaling), dim=2)
    empty = initial.new_empty(*initial.shape[:2], 0, initial.shape[-2])
    anchored = share = head = None
    if spec.anchor is not None:
        pulls = [x.flatten(3).flatten(1, 2).unsqueeze(-1) if conv else x for x in note.pull]
        none = initial.new_empty(*initial.shape[:2], 0)
        follow = factors(note.follow)
        pulled = torch.stack(pulls, dim=2) if pulls else none[..., None, None]
        anchored = Anchored(pulled, none if follow is None else follow, spec.anchor.detach)
    if spec.read_rate:
        left = torch.stack(note.left, dim=2) if note.left else initial.new_empty(*initial.shape[:2], 0)
        share = Share(tokens.gates["read_rate"], tuple(note.closes), left)
    behind = spec.network.output_head
    if behind is not None and note.gains:
        gain = torch.cat(note.gains, dim=2).transpose(1, 2)
        head = OutputHead(behind.eps, gain, heads_last(note.shifts), heads_last(note.skips))
    return LinearAttention(
        q=rows(note.q, empty, features=True),
        k=rows(note.k, empty, features=True),
        v=rows(note.v, tokens.v, features=False),
        initial_state=initial.flatten(3).flatten(1, 2).unsqueeze(-1) if conv else initial,
        gate=rows(note.gates, empty, features=False) if note.gates else None,
        write_tokens=torch.tensor(note.tokens, dtype=torch.long, device=initial.device),
        update_bounds=tuple(bounds),
        seen_updates=tuple(seen),
        sign=spec.sign,
        momentum=factors(note.momentum),
        retention=factors(note.retention),
        rescaling=None if spec.normalize == "read" else rescaling,
        read_rescaling=read_rescaling,
        clipping=channel_factors(note.clipping),
        orthogonalize=spec.orthogonalize,
        partial=partial,
        step=factors(note.step),
        window=spec.window_size if spec.sums_updates else 1,
        anchored=anchored,
        share=share,
        head=head,
    )
