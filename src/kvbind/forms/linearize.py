"""The theorems as an object: the linear attention that an inner loop is (arXiv 2602.21204, theorems 5.1 to 5.3).

`linearize` runs the inner loop once and reads off, along its trajectory, the effective queries, keys and values, the
starting state and every decay. `LinearAttention` then computes outputs from these alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from kvbind.forms.autocast import without_autocast
from kvbind.forms.recurrent import Chunk, chunk_gates, chunks, prefix_means, prefix_updates
from kvbind.forms.scan import decay_matrix
from kvbind.forms.tokens import Tokens
from kvbind.forms.validation import LearningRate, check_operands
from kvbind.inner.gates import decays, given_gates
from kvbind.inner.losses import descent_direction
from kvbind.inner.networks import DepthwiseConv, Network, gated
from kvbind.inner.orthogonalize import NewtonSchulz
from kvbind.inner.rule import FastWeights, apply_update, channel_norm, gradient, rescale, shape_update
from kvbind.inner.spec import InnerLoop


@dataclass(frozen=True, eq=False)
class Partial:
    """Factors of each token's own under `visibility="token"`: what the rule does with its chunk's tokens up to it.

    Attributes:
        momentum: `[B, H, T]`, or None.
        retention: `[B, H, T]`, or None.
        rescaling: `[B, H, T, Dv]`, or None.
    """

    momentum: Tensor | None
    retention: Tensor | None
    rescaling: Tensor | None


@dataclass(frozen=True, eq=False)
class LinearAttention:
    """A linear attention whose operands were read off an inner loop's trajectory.

    Writes enter in updates, one per chunk and step. With `G_u = sum of k^_i^T v^_i` over the writes of update u,

        M_u   = m_u M_u-1 + G_u                             (momentum)
        S_u+1 = r_u * (a_u S_u +/- X_u(M_u))                (X: orthogonalization, or a factor per value channel)
        o_t   = gate_t * q^_t S                             (S as of the updates that token t sees)

    Under `visibility="token"` a token also sees the writes of its own chunk up to itself, through factors of its own.
    A depthwise convolution is linear attention with one head per channel, 9 key channels (the 3x3 neighbourhood) and one
    value channel: H is then heads times channels. With S steps per chunk a token writes S times.

    Attributes:
        q: effective queries `phi_new(q_t)`, `[B, T, H, F]` in the state's dtype.
        k: effective keys `phi_old(k_i)`, `[B, W, H, F]`, one for each of W writes; W = T with one step per chunk.
        v: effective values, `lr_i g_i` times the GLU's input gate, `[B, W, H, Dv]`; zero for tokens that do not write.
        initial_state: `S_0`, the starting last layer, `[B, H, F, Dv]`.
        gate: the GLU's output gate, `[B, T, H, Dv]`, or None.
        write_tokens: which token makes each write, `[W]`.
        update_bounds: update u holds the writes from `update_bounds[u]` up to `update_bounds[u + 1]`; writes behind the
            last bound belong to an incomplete chunk and enter no state.
        seen_updates: how many updates each token sees whole; T ints that never fall.
        sign: 1 for descent, -1 for ascent.
        momentum: `m_u`, `[B, H, U]`, or None.
        retention: `a_u`, `[B, H, U]`, or None.
        rescaling: `r_u`, what weight normalization multiplies each value channel by, `[B, H, U, Dv]`, or None.
        read_rescaling: what it multiplies each value channel of an output by under `normalize="read"`, which leaves the
            state as it is: row n for tokens that see n updates, `[B, H, U + 1, Dv]`; None without, and where `partial`
            holds it.
        clipping: what clipping multiplies each value channel of an update by, `[B, H, U, Dv]`, or None.
        orthogonalize: the Newton-Schulz iteration that acts on each update, or None.
        partial: the factors of `visibility="token"`, or None.
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

    @property
    def updates(self) -> int:
        """U, the number of updates that enter the state."""
        return len(self.update_bounds) - 1

    def output(self) -> Tensor:
        """The attention's output `[B, T, H, Dv]` in the state's dtype; a convolution's channels are heads here."""
        q, k, v = (x.transpose(1, 2) for x in (self.q, self.k, self.v))
        outputs, start = [], 0
        places = enumerate(self._states(k, v))
        update, (state, buffer) = next(places)
        for seen, members in groupby(self.seen_updates):
            while update < seen:
                update, (state, buffer) = next(places)
            stop = start + len(list(members))
            queries = q[:, :, start:stop]
            read = queries @ state
            if self.read_rescaling is not None:
                read = read * self.read_rescaling[:, :, seen, None]
            if self.partial is not None:
                read = self._read_own_chunk(read, queries, buffer, k, v, slice(start, stop), self.update_bounds[seen])
            outputs.append(read)
            start = stop
        if not outputs:
            return self.v.new_empty(*self.q.shape[:3], self.v.shape[-1])
        return gated(self.gate, torch.cat(outputs, dim=2).transpose(1, 2))

    def _states(self, k: Tensor, v: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """State and momentum buffer before each update and after the last, `[B, H, F, Dv]` both."""
        state, buffer = self.initial_state, torch.zeros_like(self.initial_state)
        yield state, buffer
        for u in range(self.updates):
            own = slice(self.update_bounds[u], self.update_bounds[u + 1])
            write = k[:, :, own].mT @ v[:, :, own]
            if self.momentum is not None:
                buffer = self.momentum[:, :, u, None, None] * buffer + write
                write = buffer
            if self.orthogonalize is not None:
                write = self.orthogonalize(write)
            if self.clipping is not None:
                write = write * self.clipping[:, :, u, None]
            if self.retention is not None:
                state = self.retention[:, :, u, None, None] * state
            state = state + self.sign * write
            if self.rescaling is not None:
                state = state * self.rescaling[:, :, u, None]
            yield state, buffer

    def _read_own_chunk(
        self, read: Tensor, q: Tensor, buffer: Tensor, k: Tensor, v: Tensor, tokens: slice, first: int
    ) -> Tensor:
        """Add to a read of the state before a chunk what each of the chunk's `tokens` sees of the chunk itself."""
        if self.partial is None:
            return read
        momentum, retention, rescaling = self.partial.momentum, self.partial.retention, self.partial.rescaling
        length = tokens.stop - tokens.start
        own = slice(first, first + length)
        seen = (q @ k[:, :, own].mT).tril() @ v[:, :, own]
        if momentum is not None:
            seen = seen + momentum[:, :, tokens, None] * (q @ buffer)
        if retention is not None:
            read = retention[:, :, tokens, None] * read
        read = read + self.sign * seen
        return read if rescaling is None else read * rescaling[:, :, tokens]

    def initial_output(self) -> Tensor:
        """What outputs take from `S_0`, `[B, T, H, Dv]`: the part that no token wrote."""
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
        """
        return self._writes_from_updates(self._shares(channel)) + self._own_chunk_decays(channel)

    def weights(self, channel: int | None = None) -> Tensor:
        """Attention weights of every output over every write, `[B, H, T, W]`.

        `output()[b, t, h, d]` is `sum_w weights(d)[b, h, t, w] * v[b, w, h, d] + initial_output()[b, t, h, d]`.
        Newton-Schulz enters as the polynomial that it is, in the state's precision, whatever `dtype` it runs in.

        Args:
            channel: the value channel to look at; None for the mean over channels, which is every channel's where
                nothing acts on channels one by one.
        """
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
        update_tokens: as `ttt` takes it.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
    """
    if isinstance(update_tokens, slice):
        # every token keeps its row; those outside the slice write zero
        mask = torch.zeros(k.shape[1], dtype=torch.bool, device=k.device)
        mask[update_tokens] = True
        update_tokens = mask
    gates = given_gates(momentum=momentum, retention=retention)
    call = check_operands(spec, weights, q, k, v, lr, gates, None, None, update_tokens)
    network = spec.network
    own = [name for name in ("read", "write") if getattr(type(network), name) is not getattr(Network, name)]
    if not network.applies_itself or (own and not isinstance(network, DepthwiseConv)):
        raise ValueError(
            f"spec's network must be one whose apply is features, last layer, gate and head, which is linear attention; "
            f"{type(network).__name__} has {' and '.join(own) or 'an apply'} of its own"
        )
    if spec.extensions:
        raise ValueError(f"spec must have no {', '.join(spec.extensions)} for linearize, which knows nothing of it yet")
    if call.tokens.mask is not None and spec.visibility != "full":
        raise ValueError("update_tokens must be None for linearize unless visibility='full'")
    with without_autocast(q.device.type):
        return _linearize(spec, call.q.to(call.state.dtype), call.tokens, call.state.fast)


def _linearize(spec: InnerLoop, q: Tensor, tokens: Tokens, fast: FastWeights) -> LinearAttention:
    note = _Trajectory()
    initial, total = fast.weights["out"], q.shape[2]
    bounds, seen, partials = [0], [], []
    # with chunks of one token, what a token sees is the chunk's whole update
    own_parts = spec.visibility == "token" and spec.chunk != 1
    parts = (
        [Chunk(tokens.span(0, 0), tokens, slice(0, total), True)]
        if spec.visibility == "full"
        else chunks(spec, tokens, None)
    )
    for chunk in parts:
        queries = q[:, :, chunk.queries]
        entered = chunk.complete or spec.visibility == "chunk"
        if spec.visibility == "past" or own_parts:
            if own_parts:
                each = prefix_updates(spec, fast, chunk, fast.weights)
                _note_read(spec, note, each.weights, queries.unsqueeze(-2))
                partials.append(_partial(spec, fast, each, chunk))
            else:
                _note_read(spec, note, fast.weights, queries)
            seen += [len(bounds) - 1] * queries.shape[2]
        for _ in range(spec.steps):
            fast = _note_update(spec, note, fast, chunk.tokens, entered)
            if entered:
                bounds.append(bounds[-1] + len(chunk.tokens))
            elif spec.steps > 1:
                break
        if spec.visibility in ("chunk", "full") or (spec.visibility == "token" and not own_parts):
            _note_read(spec, note, fast.weights, queries)
            seen += [len(bounds) - 1] * queries.shape[2]
    return _assemble(spec, note, initial, bounds, seen, partials, tokens)


def _note_read(spec: InnerLoop, note: _Trajectory, weights: Mapping[str, Tensor], queries: Tensor) -> None:
    """Note the effective queries and output gates of some reads; per-token weights give queries an axis more."""
    features, gate = spec.network.features(weights, queries), spec.network.gate(weights, queries)
    per_token = queries.dim() == 5
    note.q.append(features.squeeze(-2) if per_token else features)
    if gate is not None:
        note.gates.append(gate.squeeze(-2) if per_token else gate)


def _note_update(spec: InnerLoop, note: _Trajectory, fast: FastWeights, tokens: Tokens, entered: bool) -> FastWeights:
    """Note one update's writes and, where it enters the state, its factors; returns the weights after it."""
    network, out = spec.network, fast.weights["out"]
    k, v, rates = tokens.k.to(out.dtype), tokens.v.to(out.dtype), tokens.column_rates()
    prediction = network.apply(fast.weights, k) if spec.loss == "squared" else None
    g = descent_direction(spec.loss, prediction, v)
    note.k.append(network.features(fast.weights, k))
    note.v.append((rates["out"] * gated(network.gate(fast.weights, k), g)).expand_as(v))
    if not entered:
        return fast

    gates = chunk_gates(tokens, out)
    momentum, retention = decays(gates)
    updates = gradient(spec, fast.weights, k, v, rates)
    after = apply_update(spec, fast, updates, gates)
    accumulated = after.momentum["out"] if spec.momentum else updates["out"]
    writes = out.new_ones(out.shape[:2], dtype=torch.bool)
    if tokens.mask is not None:
        writes = tokens.mask.any(2).expand_as(writes)
    if momentum is not None:
        note.momentum.append(momentum.reshape(out.shape[:2]))
    if retention is not None:
        note.retention.append(torch.where(writes, retention.reshape(out.shape[:2]), 1.0))
    if spec.clip:
        note.clipping.append(1 / (channel_norm(network, accumulated) + 1))
    if spec.normalize:
        base = fast.accumulated.get("out", out)
        kept = base if retention is None else retention * base
        factor = rescale(network, kept + spec.sign * shape_update(spec, accumulated), fast.norms["out"])
        note.rescaling.append(torch.where(writes.reshape(*writes.shape, *(1,) * (factor.dim() - 2)), factor, 1.0))
    return after


def _partial(spec: InnerLoop, fast: FastWeights, each: FastWeights, chunk: Chunk) -> Partial:
    """A chunk's share of the factors of `visibility="token"`."""
    momentum, retention = (None if gate is None else prefix_means(gate) for gate in decays(chunk.tokens.gates))
    rescaling = None
    if spec.normalize:
        if spec.normalize == "read":
            before = each.accumulated["out"]
        else:
            # the weights that line 6 rescales are those of the same rule without it
            plain = FastWeights(fast.weights, fast.momentum, {})
            before = prefix_updates(spec.replace(normalize=False), plain, chunk, plain.weights).weights["out"]
        rescaling = rescale(spec.network, before, fast.norms["out"].unsqueeze(2)).squeeze(-2)
    return Partial(momentum, retention, rescaling)


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
    width, total = tokens.v.shape[-1], len(tokens)

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
        )
    rescaling, read_rescaling = channel_factors(note.rescaling), None
    if spec.normalize == "read" and partial is None:
        first = initial.new_ones(*initial.shape[:2], 1, 1) if rescaling is None else torch.ones_like(rescaling[:, :, :1])
        read_rescaling = first if rescaling is None else torch.cat((first, rescaling), dim=2)
    places = torch.arange(total, device=initial.device)
    own = [places] if spec.chunk is None else list(places.split(spec.chunk))
    whole = spec.visibility == "chunk"
    write_tokens = [part for part in own for _ in range(spec.steps if whole or spec.chunk in (None, len(part)) else 1)]
    empty = initial.new_empty(*initial.shape[:2], 0, initial.shape[-2])
    return LinearAttention(
        q=rows(note.q, empty, features=True),
        k=rows(note.k, empty, features=True),
        v=rows(note.v, tokens.v, features=False),
        initial_state=initial.flatten(3).flatten(1, 2).unsqueeze(-1) if conv else initial,
        gate=rows(note.gates, empty, features=False) if note.gates else None,
        write_tokens=torch.cat(write_tokens) if write_tokens else places,
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
    )
