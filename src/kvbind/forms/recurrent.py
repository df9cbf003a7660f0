"""The recurrent form: the definition. Write after write, the update rule as section 1 of the specification states it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvbind.forms.state import State
from kvbind.forms.tokens import Tokens, as_factor
from kvbind.inner.gates import DECLARED
from kvbind.inner.network import Rates, Weights
from kvbind.inner.rule import FastWeights, apply_update, decayed, gradient, seen_share, set_off
from kvbind.inner.spec import InnerLoop


@dataclass(frozen=True)
class Chunk:
    """One chunk of sequences that have equally many tokens: what one write takes.

    Attributes:
        old: those of its writers that earlier calls left pending.
        own: this call's writers.
        queries: the place in this call's queries of the chunk's own, `queries.start` to `queries.stop`.
        complete: the chunk has all its tokens, so that it updates the weights for good.
        renews: gradients are renewed before it: it is the first of its span.
        closes: a state can stop after it: it is the last of its span, or spans have no end before the call's.
    """

    old: Tokens
    own: Tokens
    queries: slice
    complete: bool
    renews: bool = True
    closes: bool = True

    @property
    def tokens(self) -> Tokens:
        """All its writers, in order."""
        return self.old.append(self.own)


def chunks(spec: InnerLoop, tokens: Tokens, pending: Tokens | None) -> Iterator[Chunk]:
    """Cut this call's tokens, behind those pending, into chunks; the last may be incomplete.

    Where tokens write several times, `tokens` holds as many rows of each.
    """
    assert spec.chunk is not None
    span, each = spec.span or spec.chunk, spec.writes
    earlier = 0 if pending is None else len(pending) // each
    total = earlier + len(tokens) // each
    for start in range(0, total, spec.chunk):
        stop = min(start + spec.chunk, total)
        own = slice(max(start - earlier, 0), max(stop - earlier, 0))
        old = (
            tokens.span(0, 0)
            if pending is None or start >= earlier
            else pending.span(start * each, min(stop, earlier) * each)
        )
        yield Chunk(
            old,
            tokens.span(own.start * each, own.stop * each),
            own,
            complete=stop - start == spec.chunk,
            renews=start % span == 0 and spec.refresh != "call",
            closes=stop % span == 0,
        )


def recurrent(spec: InnerLoop, q: Tensor, tokens: Tokens, state: State) -> tuple[Tensor, State]:
    """Run the inner loop one write after another.

    Args:
        spec: the inner loop.
        q: what is read, `[B, H, T, Dk]` in the state's dtype (the keys where the inner loop says so).
        tokens: what writes: T tokens (times `spec.writes`), or fewer under `visibility="full"`.
        state: where the sequences stopped, all with equally many pending tokens.

    Returns:
        Outputs `[B, H, T, Dv]` in the state's dtype, and the state after this call.
    """
    network = spec.network
    if spec.visibility == "full":
        fast = full_update(spec, state.fast, tokens)
        return network.apply(fast.weights, q), State.of(spec, fast, None, 0)

    # gradients are taken at `point`, and a state stops at `stopped`
    fast = point = stopped = set_off(spec, state.fast)
    pending, outputs, done = state.pending(), [], 0
    earlier = 0 if pending is None else len(pending)
    for chunk in chunks(spec, tokens, pending):
        if chunk.renews:
            point = fast
        after = fast
        if chunk.complete or spec.visibility == "chunk":
            after = write(spec, fast, chunk.tokens, point.weights)
        if chunk.queries.start < chunk.queries.stop:
            queries = q[:, :, chunk.queries]
            if spec.visibility == "past":
                outputs.append(network.apply(fast.weights, queries))
            elif spec.visibility == "chunk" or spec.chunk == 1:
                outputs.append(network.apply(seen_weights(spec, after, chunk.tokens), queries))
            else:
                each = prefix_updates(spec, fast, chunk, point.weights)
                outputs.append(network.apply(each.weights, queries.unsqueeze(-2)).squeeze(-2))
        if chunk.complete:
            fast = after
        if chunk.complete and chunk.closes:
            stopped, done = closed(spec, fast, chunk.tokens), earlier + chunk.queries.stop * spec.writes
            if spec.refresh != "call":
                fast = stopped
    output = torch.cat(outputs, dim=2) if outputs else q.new_empty(*q.shape[:3], tokens.v.shape[-1])
    if state.has_room and not done:
        return output, state.append(tokens)
    if not spec.room:
        return output, State.of(spec, stopped, None, 0)
    left = tokens.span(max(done - earlier, 0), len(tokens))
    if pending is not None and done < earlier:
        left = pending.span(done, earlier).append(left)
    return output, State.of(spec, stopped, left, len(left))


def write(spec: InnerLoop, fast: FastWeights, tokens: Tokens, at: Weights) -> FastWeights:
    """One write from all tokens of a chunk, or `spec.writes` one after another; sequences without writers stay as they are.

    Args:
        spec: the inner loop.
        fast: weights before.
        tokens: the chunk.
        at: the weights that gradients are taken at, those of the last renewal.
    """
    after = chunk_update(spec, fast, tokens, at)
    if tokens.mask is None:
        return after
    writes = tokens.mask.any(2)
    return after.join(fast, lambda new, old: torch.where(as_factor(writes, new), new, old))


def chunk_update(spec: InnerLoop, fast: FastWeights, tokens: Tokens, at: Weights) -> FastWeights:
    """Apply the update rule to one chunk, `spec.steps` times; arguments as `write` takes them."""
    if spec.writes > 1 and len(tokens) > 1:
        for row in range(len(tokens)):
            fast = chunk_update(spec, fast, tokens.span(row, row + 1), fast.weights if row else at)
        return fast
    gates = chunk_gates(tokens, fast.weights["out"])
    for step in range(spec.steps):
        updates = key_gradient(spec, fast, tokens, decayed(spec, fast.weights if step else at, gates))
        fast = apply_update(spec, fast, updates, gates)
    return slid(spec, fast, tokens)


def key_gradient(spec: InnerLoop, fast: FastWeights, tokens: Tokens, at: Weights) -> dict[str, Tensor]:
    """Line 1 over the tokens of a chunk, and those of earlier writes that a window holds, at the weights `at`."""
    k, v, rates, erase = writers_of(spec, fast, tokens, at["out"].dtype)
    return gradient(spec, at, k, v, rates, erase)


def writers_of(
    spec: InnerLoop, fast: FastWeights, tokens: Tokens, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Rates, Tensor | None]:
    """Keys, values, rates and where residuals read of the tokens of a chunk, behind those that a window holds."""
    k, v, rates, erase = tokens.k, tokens.v, tokens.column_rates(), tokens.gates.get("erase")
    if fast.window and not spec.sums_updates:
        joined = {name: torch.cat((fast.window[name], x.to(dtype)), dim=2) for name, x in tokens.of_keys().items()}
        k, v, erase = joined["k"], joined["v"], joined.get("erase")
        rates = {name: joined[f"rates.{name}"][..., None] for name in rates}
    return k.to(dtype), v.to(dtype), rates, None if erase is None else erase.to(dtype)


def slid(spec: InnerLoop, fast: FastWeights, tokens: Tokens) -> FastWeights:
    """With a window over gradients, these weights with the chunk's tokens in it and as many earlier ones out of it."""
    if not fast.window or spec.sums_updates:
        return fast
    held, short = {}, (spec.chunk or 1) - len(tokens)
    for name, x in tokens.of_keys().items():
        before = fast.window[name]
        # an incomplete chunk, which only a last one can be, counts as a whole write
        filled = torch.cat((before, x.to(before.dtype), before.new_zeros(*x.shape[:2], short, *x.shape[3:])), dim=2)
        held[name] = filled[:, :, -before.shape[2] :]
    return replace(fast, window=held)


def chunk_gates(tokens: Tokens, matrix: Tensor) -> dict[str, Tensor]:
    """The gates of one write, shaped to multiply `matrix`: means over the chunk, or the last token's."""
    kinds = {name: DECLARED[name].chunk for name in tokens.gates}
    return {
        name: as_factor(tokens.mean(gate) if kinds[name] == "mean" else gate[:, :, -1], matrix)
        for name, gate in tokens.gates.items()
        if kinds[name] != "own"
    }


def last_share(tokens: Tokens, matrix: Tensor) -> Tensor:
    """The share of its span's writes that a chunk's last token sees, shaped to multiply `matrix`."""
    return as_factor(tokens.gates["read_rate"][:, :, -1], matrix)


def closed(spec: InnerLoop, fast: FastWeights, tokens: Tokens) -> FastWeights:
    """What a span leaves whose last chunk has these tokens."""
    return set_off(spec, fast, last_share(tokens, fast.weights["out"])) if spec.read_rate else fast


def seen_weights(spec: InnerLoop, fast: FastWeights, tokens: Tokens) -> Weights:
    """The weights that a chunk's last token sees."""
    return seen_share(fast, last_share(tokens, fast.weights["out"])) if spec.read_rate else fast.weights


def full_update(spec: InnerLoop, fast: FastWeights, tokens: Tokens) -> FastWeights:
    """The updates from all tokens that write, in one write or chunk after chunk; sequences without any stay as they are."""
    if tokens.count == 0:
        return fast
    if spec.chunk is None:
        return write(spec, fast, tokens, fast.weights)
    point = fast
    for chunk in chunks(spec, tokens, None):
        if chunk.renews:
            point = fast
        fast = write(spec, fast, chunk.own, point.weights)
    return fast


def prefix_updates(spec: InnerLoop, fast: FastWeights, chunk: Chunk, at: Weights) -> FastWeights:
    """The weights that each of a chunk's own tokens sees under `visibility="token"`.

    For the token at place t these come from the update rule over the chunk's tokens up to t, with gradients taken at the
    weights `at` of the last renewal and gates averaged over those tokens alone.

    Returns:
        Weights with a token axis behind the heads, `[B, H, T, in, out]`.
    """
    dtype = fast.weights["out"].dtype
    each = fast.map(lambda x: x.unsqueeze(2))
    tokens, old, own = chunk.tokens, chunk.old, chunk.own
    rates = {name: r[..., None] if isinstance(r, Tensor) else r for name, r in own.column_rates().items()}
    k, v = own.k.to(dtype).unsqueeze(-2), own.v.to(dtype).unsqueeze(-2)
    erase = own.gates["erase"].to(dtype).unsqueeze(-2) if "erase" in own.gates else None
    at_each = {name: x.unsqueeze(2) for name, x in at.items()}
    updates = {name: g.cumsum(2) for name, g in gradient(spec, at_each, k, v, rates, erase).items()}
    if len(old) or (fast.window and not spec.sums_updates):
        held = key_gradient(spec, fast, old, at)
        updates = {name: g + held[name].unsqueeze(2) for name, g in updates.items()}

    out, first = updates["out"], len(old)
    gates = {
        name: as_factor(prefix_gates(name, gate, tokens.mask)[:, :, first:], out)
        for name, gate in tokens.gates.items()
        if DECLARED[name].chunk != "own"
    }
    found = apply_update(spec, each, updates, gates)
    if tokens.mask is not None:
        writes = (tokens.mask.cumsum(2) > 0)[:, :, first:]

        def settled(part: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: torch.where(as_factor(writes, x), x, before[name]) for name, x in part.items()}

        weights, travelled = settled(found.weights, each.weights), settled(found.travelled, each.travelled)
        found = replace(found, weights=weights, travelled=travelled)
    return replace(found, weights=seen_share(found, gates["read_rate"])) if spec.read_rate else found


def prefix_gates(name: str, gate: Tensor, mask: Tensor | None) -> Tensor:
    """What a chunk takes of its tokens' gates `[B, H, T, ...]`, for the tokens up to each: the same shape."""
    if DECLARED[name].chunk == "last":
        return gate
    if mask is None:
        return prefix_means(gate.movedim(2, -1)).movedim(-1, 2)
    mask = mask.reshape(*mask.shape, *(1,) * (gate.dim() - 3))
    return (gate * mask).cumsum(2) / mask.cumsum(2).clamp(min=1)


def prefix_means(gate: Tensor) -> Tensor:
    """The mean of a gate over the tokens up to each, along the last axis."""
    count = torch.arange(1, gate.shape[-1] + 1, device=gate.device, dtype=gate.dtype)
    return gate.cumsum(-1) / count
