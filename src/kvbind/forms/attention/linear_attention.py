"""`LinearAttention`: the linear attention that an inner loop is, as an object (arXiv 2602.21204, theorems 5.1 to 5.3).

`kvbind.linearize` makes it. It computes outputs and token-mixing weights from its operands alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kvbind.forms.attention.factors import Anchored, OutputHead, Partial, SeenShare
from kvbind.forms.parallel.scan import decay_matrix
from kvbind.inner.network import gated
from kvbind.inner.orthogonalize import NewtonSchulz


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
    share: SeenShare | None = None
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
            channel: the value channel; None for the mean over channels.

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
            channel: the value channel; None for the mean over channels, which is every channel's where
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
            channel: the value channel; None for the mean over channels.
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
