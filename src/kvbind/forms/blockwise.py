"""The blockwise schedule of the parallel form: attention inside blocks of tokens, a state between them.

Where writes add up, the state before any chunk of a block is a linear function of the state `S` and momentum buffer `D`
before the block and of the block's writes; its coefficients are products of gates. An output is therefore attention to the
block's own tokens, weighted by those coefficients, plus a read of `S` and `D`.

Under squared error a write also reads the state: `g_i = v_i - phi_i S_c(i)`. With the same coefficients this is one
triangular system for each block, `(I + N) g = v - phi (coefficients of S and D)`: the WY representation of the delta rule
(arXiv 2406.06484), here for any chunk length, with both gates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvbind.forms.finite import known_finite, seen_product, spoilt
from kvbind.forms.recurrent import prefix_means
from kvbind.forms.scan import decay_matrix, up_to
from kvbind.forms.state import State
from kvbind.forms.tokens import Tokens
from kvbind.inner.gates import decays
from kvbind.inner.networks import gated
from kvbind.inner.rule import FastWeights
from kvbind.inner.spec import InnerLoop

BLOCK = 64
"""Tokens in a block, or one chunk where that is longer."""


@dataclass(frozen=True)
class Coefficients:
    """What state and momentum buffer are made of, before each chunk of a block and after the last.

    Rows are the `n + 1` places between the block's `n` chunks, columns its chunks' summed writes.

    Attributes:
        state_state, state_momentum: share of the block's starting state and buffer in the state, `[..., n + 1]`.
        state_writes: share of each chunk's write in the state, `[..., n + 1, n]`.
        momentum_momentum: share of the starting buffer in the buffer, `[..., n + 1]`.
        momentum_writes: share of each chunk's write in the buffer, `[..., n + 1, n]`.
    """

    state_state: Tensor
    state_momentum: Tensor
    state_writes: Tensor
    momentum_momentum: Tensor
    momentum_writes: Tensor

    @staticmethod
    def of(sign: int, momentum: Tensor | None, decay: Tensor | None, count: int, like: Tensor) -> Coefficients:
        """Coefficients from the chunks' gates `[..., n]`, either of which may be missing."""
        eye = torch.eye(count, dtype=like.dtype, device=like.device)
        ones = eye.new_ones(count)
        if momentum is None:
            buffer, buffer_reach = eye, torch.zeros_like(ones)
        else:
            buffer = decay_matrix(momentum)
            buffer_reach = momentum[..., :1] * buffer[..., 0]
        if decay is None:
            keep, keep_reach = eye.new_ones(count, count).tril(), ones
        else:
            keep = decay_matrix(decay)
            keep_reach = decay[..., :1] * keep[..., 0]
        state_momentum = sign * seen_product(keep, buffer_reach[..., None], up_to(keep))[..., 0]
        return Coefficients(
            F.pad(keep_reach, (1, 0), value=1.0),
            F.pad(state_momentum, (1, 0)),
            F.pad(sign * seen_product(keep, buffer, up_to(keep)), (0, 0, 1, 0)),
            F.pad(buffer_reach, (1, 0), value=0.0 if momentum is None else 1.0),
            F.pad(buffer, (0, 0, 1, 0)),
        )


def blockwise(spec: InnerLoop, chunk: int, q: Tensor, tokens: Tokens, state: State) -> tuple[Tensor, State]:
    """Run an inner loop whose writes add up, in chunks of `chunk` tokens; the rest is as for `recurrent`."""
    pending = state.pending()
    kept = 0 if pending is None else len(pending)
    joined = tokens if pending is None else pending.append(tokens)
    # pending tokens were read in an earlier call: zeros keep their places, and what they read is dropped
    q = F.pad(q, (0, 0, kept, 0))
    fast, outputs, start = state.fast, [], 0
    for part in _folded(joined, chunk):
        length = part.k.shape[2] * part.k.shape[3]
        queries = q[:, :, start : start + length].unflatten(2, part.k.shape[2:4])
        output, fast = _blocks(spec, chunk, queries, part, fast)
        outputs.append(output.flatten(2, 3))
        start += length
    total = len(joined)
    rest = joined.span(total - total % chunk, total)
    output = torch.cat(outputs, dim=2) if outputs else q.new_empty(*q.shape[:3], tokens.v.shape[-1])
    return output[:, :, kept:], State.of(spec, fast, rest, len(rest))


def advance(spec: InnerLoop, tokens: Tokens, fast: FastWeights) -> FastWeights:
    """The fast weights after some complete chunks, of which nothing is read."""
    assert spec.chunk is not None
    for part in _folded(tokens, spec.chunk):
        fast = _blocks(spec, spec.chunk, None, part, fast)[1]
    return fast


def _folded(tokens: Tokens, chunk: int) -> Iterator[Tokens]:
    """Tokens in blocks, `[B, H, n, L]`: the whole ones together, then the rest."""
    total, size = len(tokens), chunk * max(1, BLOCK // chunk)
    blocks = total // size * size
    if blocks:
        yield tokens.span(0, blocks).map(lambda x: x.unflatten(2, (-1, size)))
    if blocks < total:
        yield tokens.span(blocks, total).map(lambda x: x.unsqueeze(2))


def _blocks(spec: InnerLoop, chunk: int, q: Tensor | None, tokens: Tokens, fast: FastWeights) -> tuple[Tensor, FastWeights]:
    """Blocks of equal length, one after another.

    Args:
        spec: the inner loop.
        chunk: tokens in a chunk.
        q: what is read, `[B, H, n, L, Dk]` for `n` blocks of `L` tokens; None to read nothing.
        tokens: what writes, with the same axes.
        fast: weights before the first block.

    Returns:
        Outputs `[B, H, n, L, Dv]`, empty where nothing is read, and the weights after the last complete chunk.
    """
    network = spec.network
    dtype, length = fast.weights["out"].dtype, tokens.k.shape[3]
    weights = {name: x.unsqueeze(2) for name, x in fast.weights.items()}
    k, v = tokens.k.to(dtype), tokens.v.to(dtype)
    write = network.features(weights, k)
    g = gated(network.gate(weights, k), v)
    rate = tokens.column_rates()["out"]

    # an incomplete last chunk has a column like any other, but the state that goes on stands before it
    count, complete = -(-length // chunk), length // chunk
    place = torch.arange(length, device=k.device) // chunk
    momentum_gate, decay = decays(tokens.gates)
    share = Coefficients.of(spec.sign, _chunk_means(momentum_gate, chunk), _chunk_means(decay, chunk), count, v)
    interacting = count > 1 or spec.visibility != "past"

    solved_state = solved_momentum = None
    if spec.loss == "squared":
        on_state, on_momentum = (
            share.state_state[..., place, None] * write,
            share.state_momentum[..., place, None] * write,
        )
        if count > 1:
            among = share.state_writes[..., place, :][..., place] * (write @ write.mT)
            if isinstance(rate, Tensor):
                among = among * rate.mT
            elif rate != 1.0:
                among = among * rate
            right = torch.cat((g, on_state, on_momentum), dim=-1)
            solved = _solved(among, right, place[:, None] > place[None, :])
            g, on_state, on_momentum = solved.split((g.shape[-1], write.shape[-1], write.shape[-1]), dim=-1)
        solved_state, solved_momentum = on_state, on_momentum if spec.momentum else None

    # of tokens in complete chunks; the others are pending
    whole = complete * chunk
    its_rate = rate[..., :whole, :] if isinstance(rate, Tensor) else rate
    into_state = its_rate * share.state_writes[..., complete, place[:whole], None]
    into_momentum = its_rate * share.momentum_writes[..., complete, place[:whole], None] if spec.momentum else None
    keep = share.state_state[..., complete, None, None], share.state_momentum[..., complete, None, None]
    keep_momentum = share.momentum_momentum[..., complete, None, None]

    def block(x: Tensor, b: int) -> Tensor:
        """Block b of a coefficient that may be the same for all."""
        return x[:, :, b] if x.dim() == 5 else x

    state, momentum = fast.weights["out"], fast.momentum.get("out")
    states, momenta, descents = [], [], []
    for b in range(k.shape[2]):
        states.append(state)
        own = g[:, :, b]
        if solved_state is not None:
            own = own - solved_state[:, :, b] @ state
        if momentum is not None:
            momenta.append(momentum)
            if solved_momentum is not None:
                own = own - solved_momentum[:, :, b] @ momentum
        descents.append(own)
        columns, enters = write[:, :, b, :whole].mT, own[:, :, :whole]
        state = block(keep[0], b) * state + columns @ (block(into_state, b) * enters)
        if momentum is not None and into_momentum is not None:
            state = state + block(keep[1], b) * momenta[-1]
            momentum = block(keep_momentum, b) * momentum + columns @ (block(into_momentum, b) * enters)

    end = FastWeights(dict(fast.weights) | {"out": state}, {} if momentum is None else {"out": momentum}, fast.norms)
    if q is None:
        return v.new_empty(0), end
    read = network.features(weights, q)
    on_state, on_momentum, on_tokens = _reads(spec, chunk, share, place, tokens)
    output = on_state[..., None] * (read @ torch.stack(states, 2))
    if momenta:
        output = output + on_momentum[..., None] * (read @ torch.stack(momenta, 2))
    if interacting:
        seen = _seen(spec, place)
        attention = torch.where(seen, on_tokens * (read @ write.mT), 0.0)
        output = output + seen_product(attention, rate * torch.stack(descents, 2), seen)
    return gated(network.gate(weights, q), output), end


def _seen(spec: InnerLoop, place: Tensor) -> Tensor:
    """Which of its block's tokens, in the chunks that `place` tells, each token sees: bool `[L, L]`."""
    ahead = place[:, None] - place[None, :]
    if spec.visibility == "token":
        token = torch.arange(len(place), device=place.device)
        return token[:, None] >= token[None, :]
    return ahead > 0 if spec.visibility == "past" else ahead >= 0


def _solved(among: Tensor, right: Tensor, seen: Tensor) -> Tensor:
    """`x` of `x + among x = right`, of which row i depends on the rows that it sees alone.

    Args:
        among: `[..., L, L]`, of which only what rows see is read.
        right: `[..., L, m]`.
        seen: bool `[L, L]`, below the diagonal.
    """
    among = torch.where(seen, among, 0.0)
    if known_finite(among, right):
        return torch.linalg.solve_triangular(among, right, upper=False, unitriangular=True)
    wrong = ~(right.isfinite().all(-1) & among.isfinite().all(-1))
    among, right = (x.masked_fill(wrong[..., None], 0.0) for x in (among, right))
    solved = torch.linalg.solve_triangular(among, right, upper=False, unitriangular=True)
    # rows pass it on to all that see them
    return spoilt(solved, (wrong | (seen & wrong[..., None, :]).any(-1))[..., None])


def _chunk_means(gate: Tensor | None, chunk: int) -> Tensor | None:
    """A per-token gate `[B, H, n, L]` averaged over each chunk, the last of which may be shorter: `[B, H, n, N]`."""
    if gate is None:
        return None
    return torch.stack([part.mean(-1) for part in gate.split(chunk, dim=-1)], dim=-1)


def _reads(spec: InnerLoop, chunk: int, share: Coefficients, place: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
    """What each token's output takes from the state, the buffer and the tokens of its block.

    Returns:
        `[..., L]`, `[..., L]` and `[..., L, L]`.
    """
    if spec.visibility != "token":
        row = place if spec.visibility == "past" else place + 1
        return (
            share.state_state[..., row],
            share.state_momentum[..., row],
            share.state_writes[..., row, :][..., place],
        )
    on_state, on_momentum = share.state_state[..., place], share.state_momentum[..., place]
    on_tokens = share.state_writes[..., place, :][..., place]
    momentum, decay = decays(tokens.gates)
    if decay is not None:
        kept = _chunk_prefix_means(decay, chunk)
        on_state, on_momentum, on_tokens = kept * on_state, kept * on_momentum, kept[..., None] * on_tokens
    if momentum is not None:
        carried = spec.sign * _chunk_prefix_means(momentum, chunk)
        on_momentum = on_momentum + carried * share.momentum_momentum[..., place]
        on_tokens = on_tokens + carried[..., None] * share.momentum_writes[..., place, :][..., place]
    own = (place[:, None] == place[None, :]).tril()
    return on_state, on_momentum, on_tokens + spec.sign * own


def _chunk_prefix_means(gate: Tensor, chunk: int) -> Tensor:
    """A per-token gate `[B, H, n, L]` averaged over its chunk's tokens up to each: the same shape."""
    return torch.cat([prefix_means(part) for part in gate.split(chunk, dim=-1)], dim=-1)
