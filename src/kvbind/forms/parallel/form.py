"""The parallel form (arXiv 2602.21204, appendix H): the same outputs without a loop over chunks.

Two schedules, by what the inner loop needs:

- *chunkwise*: the writes of all chunks at once, a scan for momentum, orthogonalization or clipping of all chunks as one
  batch, a (decayed) prefix sum, and one batched read. It holds the state of every chunk.
- *blockwise* (`kvbind.forms.parallel.blockwise`), where writes simply add up: short chunks and `visibility="token"`, whose
  outputs are attention inside blocks of tokens plus a read of the state before the block, the delta rule, and what else
  `kvbind.forms.parallel.affine` takes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from kvbind.forms.parallel.blockwise import blockwise, slid
from kvbind.forms.parallel.scan import linear_scan
from kvbind.forms.recurrent import chunk_update, recurrent
from kvbind.forms.state import State
from kvbind.forms.tokens import Tokens
from kvbind.inner.gates import decays
from kvbind.inner.network import gated
from kvbind.inner.rule import FastWeights, rescale, shape_update
from kvbind.inner.spec import InnerLoop

SHORT_CHUNK = 64
"""Below this many tokens in a chunk, attention inside blocks is cheaper than a state for every chunk."""

CPU_SEGMENT_BYTES = 2 << 20
"""Bytes of one operand that a CPU works on at once. Beyond its caches, batching chunks costs more than it saves."""


class Carry(Protocol):
    """Where a sequence's first chunk starts from, when earlier chunks are on other ranks (`kvbind.forms.sharded`)."""

    def momentum(self, gates: Tensor, writes: Tensor, start: Tensor) -> Tensor:
        """The momentum buffer before the first chunk, from this rank's gates `[B, H, N]`, writes and own start."""
        ...

    def state(self, gates: Tensor | None, writes: Tensor, start: Tensor, meanwhile: Callable[[], None] | None) -> Tensor:
        """The last layer before the first chunk, likewise; `meanwhile` is called while ranks exchange it."""
        ...

    @property
    def renormalizes(self) -> bool:
        """Whether that state has had updates, after which `normalize="read"` reads it rescaled."""
        ...


def parallel(spec: InnerLoop, q: Tensor, tokens: Tokens, state: State) -> tuple[Tensor, State]:
    """Run an inner loop that has a parallel form; arguments and result are those of `recurrent`."""
    if spec.chunk is None or spec.visibility == "full":
        # one update from all tokens: there is nothing sequential to remove
        return recurrent(spec, q, tokens, state)
    return (blockwise if runs_blockwise(spec) else chunkwise)(spec, spec.chunk, q, tokens, state)


def runs_blockwise(spec: InnerLoop) -> bool:
    """Whether the parallel form of `spec` is the blockwise schedule."""
    adds_up = spec.orthogonalize is None and not spec.clip and not spec.normalize
    short = spec.chunk is not None and spec.chunk < SHORT_CHUNK
    return adds_up and (bool(spec.extensions) or spec.loss == "squared" or spec.visibility == "token" or short)


def masks_in_parallel(spec: InnerLoop) -> bool:
    """Whether the parallel form of `spec` takes causal tokens of which some do not write.

    Chunks without writers take no part there, and a window slides over as many writes as a sequence has of its own.
    """
    return runs_blockwise(spec) and spec.window_size == 1


def chunkwise(spec: InnerLoop, size: int, q: Tensor, tokens: Tokens, state: State) -> tuple[Tensor, State]:
    """All chunks of `size` tokens at once, with each state in memory; on a CPU, as many at once as its caches hold."""
    fast, rest = state.fast, state.pending() or tokens.span(0, 0)
    outputs: list[Tensor] = []
    step, start, total = _segment_tokens(size, q), 0, len(tokens)
    while start < total or not outputs:
        stop = total if step is None else min(start + step - len(rest), total)
        output, fast, rest = segment(spec, size, q[:, :, start:stop], tokens.span(start, stop), fast, rest)
        outputs.append(output)
        start = stop
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2), State.of(spec, fast, rest, len(rest))


def _segment_tokens(size: int, q: Tensor) -> int | None:
    """How many tokens to take at once, in whole chunks; None for all of them."""
    if q.device.type != "cpu":
        return None
    chunk_bytes = q.shape[0] * q.shape[1] * q.shape[3] * q.element_size() * size
    return size * max(1, CPU_SEGMENT_BYTES // max(chunk_bytes, 1))


def segment(
    spec: InnerLoop,
    size: int,
    q: Tensor,
    tokens: Tokens,
    fast: FastWeights,
    pending: Tokens,
    carry: Carry | None = None,
) -> tuple[Tensor, FastWeights, Tokens]:
    """All chunks of some tokens at once: outputs, the weights after the last complete chunk, and the tokens behind it."""
    new, earlier, joined = len(tokens), len(pending), pending.append(tokens)
    count = len(joined) // size
    complete, rest = joined.span(0, count * size), joined.span(count * size, len(joined))

    network, weights = spec.network, fast.weights
    early: list[Tensor] = []

    def read_early() -> None:
        early.append(network.features(weights, q))

    states, end = chunk_states(spec, fast, complete, count, carry, read_early)
    # row c of `seen` is what chunk c reads; an incomplete last chunk reads row `count`
    own_included = spec.visibility != "past"
    seen = states[:, :, 1:] if own_included else states
    if own_included and len(rest):
        seen = torch.cat((seen, chunk_update(spec, end, rest, end.weights).weights["out"].unsqueeze(2)), dim=2)

    features, outputs = early[0] if early else network.features(weights, q), []
    head = min(size - earlier, new) if earlier else 0
    first = 1 if earlier else 0
    whole = (new - head) // size
    end_of_whole = head + whole * size
    if head:
        outputs.append(network.read(features[:, :, :head], seen[:, :, 0]))
    if whole:
        folded = features[:, :, head:end_of_whole].unflatten(2, (whole, size))
        outputs.append(network.read(folded, seen[:, :, first : first + whole]).flatten(2, 3))
    if end_of_whole < new:
        outputs.append(network.read(features[:, :, end_of_whole:], seen[:, :, first + whole]))
    output = torch.cat(outputs, dim=2) if outputs else q.new_empty(*q.shape[:3], tokens.v.shape[-1])
    output, its_head = gated(network.gate(weights, q), output), network.output_head
    return output if its_head is None else its_head.apply(weights, output, q), end, rest


def chunk_states(
    spec: InnerLoop,
    fast: FastWeights,
    tokens: Tokens,
    count: int,
    carry: Carry | None = None,
    meanwhile: Callable[[], None] | None = None,
) -> tuple[Tensor, FastWeights]:
    """The last layer before each of `count` complete chunks and after the last, and the fast weights after it.

    Args:
        spec: an inner loop whose parallel form is chunkwise.
        fast: the fast weights before the first chunk.
        tokens: those of the chunks.
        count: how many chunks.
        carry: what tells momentum and state before the first chunk where `fast` does not.
        meanwhile: what may be done while `carry` waits for other ranks.

    Returns:
        `[B, H, count + 1, F, Dv]`, and the fast weights at the end.
    """
    start = fast.accumulated.get("out", fast.weights["out"])
    if not count and carry is None:
        return fast.weights["out"].unsqueeze(2), fast
    network, weights = spec.network, fast.weights
    k, v = tokens.k.to(start.dtype), tokens.v.to(start.dtype)
    g = tokens.column_rates()["out"] * gated(network.gate(weights, k), v)

    def fold(x: Tensor) -> Tensor:
        return x.unflatten(2, (count, spec.chunk))

    updates = network.write(fold(network.features(weights, k)), fold(g))
    window = fast.window
    if window and not spec.sums_updates:
        # under the dot loss what earlier tokens write is what they wrote
        old = window["rates.out"][..., None] * gated(network.gate(weights, window["k"]), window["v"])
        held = network.write(*(x.unflatten(2, (-1, spec.chunk)) for x in (network.features(weights, window["k"]), old)))
        updates = windowed(torch.cat((held, updates), dim=2), spec.window_size)
        window = slid(window, tokens, len(tokens))
    momentum: dict[str, Tensor] = {}
    moved, retention = (None if gate is None else fold(gate).mean(3) for gate in decays(tokens.gates))
    if moved is not None:
        before = fast.momentum["out"]
        if carry is not None:
            before = carry.momentum(moved, updates, before)
        updates = linear_scan(moved, updates, before)
        momentum = {"out": updates[:, :, -1] if count else before}
    if window and spec.sums_updates:
        joined = torch.cat((window["out"], updates), dim=2)
        updates, window = windowed(joined, spec.window_size), {"out": joined[:, :, 1 - spec.window_size :]}
    writes = spec.sign * shape_update(spec, updates)
    if spec.step_rate:
        writes = fold(tokens.gates["step_rate"]).mean(3)[..., None, None] * writes
    first = fast.weights["out"]
    if carry is not None:
        start = carry.state(retention, writes, start, meanwhile)
        first = start * rescale(network, start, fast.norms["out"]) if carry.renormalizes and spec.normalize else start
    after = start.unsqueeze(2) + writes.cumsum(2) if retention is None else decayed_scan(retention, writes, start)
    used = after
    if spec.normalize == "read":
        used = after * rescale(network, after, fast.norms["out"].unsqueeze(2))
    states = torch.cat((first.unsqueeze(2), used), dim=2)
    end = FastWeights(
        dict(fast.weights) | {"out": states[:, :, -1]},
        momentum,
        fast.norms,
        {"out": after[:, :, -1] if count else start} if fast.accumulated else {},
        window,
    )
    return states, end


def windowed(x: Tensor, size: int) -> Tensor:
    """Sums `[B, H, N, ...]` over every `size` neighbours of `[B, H, N + size - 1, ...]`."""
    count = x.shape[2] - size + 1
    return torch.stack([x[:, :, i : i + count] for i in range(size)]).sum(0)


def decayed_scan(gates: Tensor, writes: Tensor, initial: Tensor) -> Tensor:
    """`linear_scan` by gates `[B, H, N]`, or by one for each row of the matrices, `[B, H, N, F]`."""
    if gates.dim() == 3:
        return linear_scan(gates, writes, initial)
    by_row = linear_scan(gates.transpose(2, 3).flatten(1, 2), writes.transpose(2, 3).flatten(1, 2), initial.flatten(1, 2))
    return by_row.unflatten(1, initial.shape[1:3]).transpose(2, 3)
