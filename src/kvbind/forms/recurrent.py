"""The recurrent form: the definition. Chunk after chunk, the update rule as section 1 of the specification states it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kvbind.forms.state import State
from kvbind.forms.tokens import Tokens, as_factor
from kvbind.inner.rule import FastWeights, apply_update, gradient
from kvbind.inner.spec import InnerLoop


@dataclass(frozen=True)
class Chunk:
    """One chunk of sequences that have equally many tokens.

    Attributes:
        old: those of its writers that earlier calls left pending.
        own: this call's writers.
        queries: the place in this call's queries of the chunk's own, `queries.start` to `queries.stop`.
        complete: the chunk has all its tokens, so that it updates the weights for good.
    """

    old: Tokens
    own: Tokens
    queries: slice
    complete: bool

    @property
    def tokens(self) -> Tokens:
        """All its writers, in order."""
        return self.old.append(self.own)


def chunks(spec: InnerLoop, tokens: Tokens, pending: Tokens | None) -> Iterator[Chunk]:
    """Cut this call's tokens, behind those pending, into chunks; the last may be incomplete."""
    assert spec.chunk is not None
    kept = 0 if pending is None else len(pending)
    total = kept + len(tokens)
    for start in range(0, total, spec.chunk):
        stop = min(start + spec.chunk, total)
        own = slice(max(start - kept, 0), stop - kept)
        old = pending if pending is not None and start == 0 else tokens.span(0, 0)
        yield Chunk(old, tokens.span(own.start, own.stop), own, complete=stop - start == spec.chunk)


def recurrent(spec: InnerLoop, q: Tensor, tokens: Tokens, state: State) -> tuple[Tensor, State]:
    """Run the inner loop one chunk after another.

    Args:
        spec: the inner loop.
        q: what is read, `[B, H, T, Dk]` in the state's dtype (the keys where the inner loop says so).
        tokens: what writes: T tokens, or fewer under `visibility="full"`.
        state: where the sequences stopped, all with equally many pending tokens.

    Returns:
        Outputs `[B, H, T, Dv]` in the state's dtype, and the state after this call.
    """
    fast, network = state.fast, spec.network
    if spec.visibility == "full":
        fast = full_update(spec, fast, tokens)
        return network.apply(fast.weights, q), State.of(spec, fast, None, 0)

    outputs, rest, completed = [], None, False
    for chunk in chunks(spec, tokens, state.pending()):
        queries = q[:, :, chunk.queries]
        after = fast
        if chunk.complete or spec.visibility == "chunk":
            after = chunk_update(spec, fast, chunk.tokens)
        if spec.visibility == "past":
            outputs.append(network.apply(fast.weights, queries))
        elif spec.visibility == "chunk" or spec.chunk == 1:
            outputs.append(network.apply(after.weights, queries))
        else:
            each = prefix_updates(spec, fast, chunk)
            outputs.append(network.apply(each.weights, queries.unsqueeze(-2)).squeeze(-2))
        if chunk.complete:
            fast, completed = after, True
        else:
            rest = chunk
    output = torch.cat(outputs, dim=2) if outputs else q.new_empty(*q.shape[:3], tokens.v.shape[-1])
    if state.has_room and not completed:
        return output, state.append(tokens)
    pending = tokens.span(0, 0) if rest is None else rest.tokens
    return output, State.of(spec, fast, pending, len(pending))


def chunk_update(spec: InnerLoop, fast: FastWeights, tokens: Tokens) -> FastWeights:
    """Apply the update rule to one chunk, `spec.steps` times."""
    out = fast.weights["out"]
    k, v, rates = tokens.k.to(out.dtype), tokens.v.to(out.dtype), tokens.column_rates()
    gates = chunk_gates(tokens, out)
    for _ in range(spec.steps):
        updates = gradient(spec, fast.weights, k, v, rates)
        fast = apply_update(spec, fast, updates, gates)
    return fast


def chunk_gates(tokens: Tokens, matrix: Tensor) -> dict[str, Tensor]:
    """The gates of one chunk, shaped to multiply `matrix`."""
    return {name: as_factor(tokens.mean(gate), matrix) for name, gate in tokens.gates.items()}


def full_update(spec: InnerLoop, fast: FastWeights, tokens: Tokens) -> FastWeights:
    """One update from all update tokens; sequences without any stay as they are."""
    if not len(tokens):
        return fast
    after = chunk_update(spec, fast, tokens)
    if tokens.mask is None:
        return after
    writes = tokens.mask.any(2)

    def settle(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(as_factor(writes, new), new, old)

    return FastWeights(
        {name: settle(x, fast.weights[name]) for name, x in after.weights.items()},
        {name: settle(x, fast.momentum[name]) for name, x in after.momentum.items()},
        fast.norms,
        {name: settle(x, fast.accumulated[name]) for name, x in after.accumulated.items()},
    )


def prefix_updates(spec: InnerLoop, fast: FastWeights, chunk: Chunk) -> FastWeights:
    """The weights that each of a chunk's own tokens sees under `visibility="token"`.

    For the token at place t these come from the update rule over the chunk's tokens up to t, with gradients taken at the
    chunk's starting weights and gates averaged over those tokens alone.

    Returns:
        Weights with a token axis behind the heads, `[B, H, T, in, out]`.
    """
    dtype = fast.weights["out"].dtype
    each = fast.map(lambda x: x.unsqueeze(2))
    tokens, old, own = chunk.tokens, chunk.old, chunk.own
    rates = {name: r[..., None] if isinstance(r, Tensor) else r for name, r in own.column_rates().items()}
    k, v = own.k.to(dtype).unsqueeze(-2), own.v.to(dtype).unsqueeze(-2)
    updates = {name: g.cumsum(2) for name, g in gradient(spec, each.weights, k, v, rates).items()}
    if len(old):
        held = gradient(spec, fast.weights, old.k.to(dtype), old.v.to(dtype), old.column_rates())
        updates = {name: g + held[name].unsqueeze(2) for name, g in updates.items()}
    out = updates["out"]
    gates = {name: as_factor(prefix_means(gate)[:, :, len(old) :], out) for name, gate in tokens.gates.items()}
    return apply_update(spec, each, updates, gates)


def prefix_means(gate: Tensor) -> Tensor:
    """The mean of a gate over the tokens up to each, along the last axis."""
    count = torch.arange(1, gate.shape[-1] + 1, device=gate.device, dtype=gate.dtype)
    return gate.cumsum(-1) / count
