"""Packed documents whose boundaries the host does not read: what `ttt(cu_seqlens=...)` computes, with fixed sizes.

All documents start from the same weights. Queries read the weights before their chunk, so that what an incomplete chunk
would write concerns nobody: there are at most `T // chunk` writes, whatever the documents. Three ways lead to them:

- on `kvbind.kernels.chunked`, by tables that the device makes (`packed_layout`);
- the writes of all chunks at once, and then what adds them up, chunk after chunk (`at_once`);
- one chunk after another, of all documents in turn (`in_turn`).

In the latter two a document's first chunk starts from the starting weights again, by selection.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kvbind.forms.autocast import without_autocast
from kvbind.forms.explained.analysis import NoParallelFormError, explain
from kvbind.forms.obstacles import parallel_obstacles
from kvbind.forms.on_kernels import dispatch
from kvbind.forms.on_kernels.kernel_calls.chunked import chunked_documents, read_network
from kvbind.forms.on_kernels.kernel_calls.recurrent import recurrent_chunks
from kvbind.forms.parallel.form import SHORT_CHUNK
from kvbind.forms.recurrent import write
from kvbind.forms.tokens import Tokens, as_factor
from kvbind.forms.validation import LearningRate, Operands, PerToken, check_operands
from kvbind.inner.gates import decays, given_gates
from kvbind.inner.network import gated
from kvbind.inner.rule import FastWeights, rescale, shape_update
from kvbind.inner.spec import InnerLoop
from kvbind.sequence.boundaries import Boundaries, Chunks

MOST_CHUNKS = 256
"""Short chunks of a row, above which one after another takes too long."""


def uncovered(spec: InnerLoop, length: int) -> str | None:
    """Why packed rows of `length` tokens of an inner loop cannot be run this way; None where they can."""
    if spec.extensions:
        return f"the inner loop has {', '.join(f'{name}={value!r}' for name, value in spec.extensions.items())}"
    if spec.visibility != "past" or spec.chunk is None:
        return f"the inner loop has visibility={spec.visibility!r}"
    if spec.chunk == 1 or (spec.chunk < SHORT_CHUNK and length // spec.chunk > MOST_CHUNKS):
        return f"the inner loop has chunks of {spec.chunk} tokens"
    return None


def packed(
    spec: InnerLoop,
    weights: Mapping[str, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    boundaries: Boundaries,
    *,
    lr: LearningRate = 1.0,
    form: str = "auto",
    log_retention: PerToken | None = None,
    **gates: PerToken | None,
) -> Tensor:
    """The outputs of `ttt` for documents packed into one row.

    Args:
        spec: an inner loop that `uncovered` says nothing against.
        weights: starting fast weights of every document, `[H, in, out]` by matrix name.
        q: queries `[1, T, H, Dk]`.
        k: keys `[1, T, H, Dk]`.
        v: values `[1, T, H, Dv]`.
        boundaries: of the documents.
        lr: as `ttt` takes it.
        form: as `ttt` takes it.
        log_retention: as `ttt` takes it.
        **gates: by name, as `ttt` takes them.

    Returns:
        `[1, T, H, Dv]` in q's dtype.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        NoParallelFormError: `form="parallel"` of an inner loop that has none.
    """
    if q.shape[:2] != (1, boundaries.length):
        raise ValueError(f"q must be [1, T, H, Dk] with the boundaries' T = {boundaries.length}; got {list(q.shape)}")
    reason = uncovered(spec, boundaries.length)
    if reason is not None:
        raise ValueError(f"boundaries that the device reads are for visibility='past' and longer chunks; {reason}")
    if form == "parallel" and parallel_obstacles(spec):
        raise NoParallelFormError(explain(spec))
    call = check_operands(spec, weights, q, k, v, lr, given_gates(log_retention, **gates), None, None, None)
    assert spec.chunk is not None
    chunks = boundaries.chunks(spec.chunk)
    on_kernels = dispatch.fits_matrix_units(call)
    with without_autocast(q.device.type):
        if on_kernels and form != "recurrent" and dispatch.is_chunked(spec):
            output = chunked_documents(spec, call, chunks)
        elif form != "recurrent" and spec.loss == "dot" and not parallel_obstacles(spec):
            output = at_once(spec, call, chunks)
        else:
            output = in_turn(
                spec, call, chunks, on_kernels and dispatch.is_recurrent(spec) and dispatch.recurrent_fits(spec, call)
            )
    return output.transpose(1, 2).to(q.dtype)


def at_once(spec: InnerLoop, call: Operands, chunks: Chunks) -> Tensor:
    """The writes of all chunks at once, and what is read of their sums; outputs `[1, H, T, Dv]`."""
    network, fast, dtype = spec.network, call.state.fast, call.state.dtype
    weights, first = fast.weights, fast.weights["out"]
    tokens = call.tokens.map(chunks.take)
    k, v = tokens.k.to(dtype), tokens.v.to(dtype)
    g = tokens.column_rates()["out"] * gated(network.gate(weights, k), v)
    updates = network.write(network.features(weights, k), g)
    momentum, decay = (None if gate is None else as_factor(tokens.mean(gate), updates) for gate in decays(tokens.gates))
    if momentum is not None:
        updates = _summed(updates, momentum, fast.momentum["out"], chunks.opens)
    start = fast.accumulated.get("out", first)
    after = _summed(spec.sign * shape_update(spec, updates), decay, start, chunks.opens)
    if spec.normalize == "read":
        after = after * rescale(network, after, fast.norms["out"])
    states = torch.cat((first, after))
    before = torch.where(as_factor(chunks.opens, after), first, states[:-1])

    def read(x: Tensor, seen: Tensor) -> Tensor:
        return gated(network.gate(weights, x), network.read(network.features(weights, x), seen))

    q = call.q.to(dtype)
    rests = states.index_select(0, chunks.before_rests)
    return chunks.put_back(read(chunks.take(q), before), read(chunks.take_rests(q), rests))


def _summed(writes: Tensor, gates: Tensor | None, start: Tensor, opens: Tensor) -> Tensor:
    """`y_c = g_c y_{c-1} + x_c` of writes `[M, ...]`; `y_{c-1}` is the start `[1, ...]` where chunk c `opens` a document."""
    running, found = start, []
    each = None if gates is None else gates.split(1)
    for c, added in enumerate(writes.split(1)):
        if c:
            running = torch.where(opens[c], start, running)
        running = added + (running if each is None else each[c] * running)
        found.append(running)
    return torch.cat(found) if found else writes


def in_turn(spec: InnerLoop, call: Operands, chunks: Chunks, on_kernels: bool) -> Tensor:
    """One chunk after another, then what is left of all documents at once; outputs `[1, H, T, Dv]`."""
    network, start = spec.network, call.state.fast
    q = call.q if on_kernels else call.q.to(call.state.dtype)
    rests, written = chunks.take_rests(q), call.tokens.spread().map(chunks.take).tensors()
    # taken apart at once, as the gradient of every single slice would be of all chunks' size
    queries = chunks.take(q).split(1)
    writers = [dict(zip(written, parts, strict=True)) for parts in zip(*(x.split(1) for x in written.values()), strict=True)]
    outputs, fast = [], start
    kept = {name: [start.weights[name]] for name in spec.updated}
    for c in range(len(chunks)):
        if c:
            fast = _renewed(fast, start, chunks.opens[c])
        output, fast = _chunk(spec, queries[c], Tokens.of(writers[c]), fast, on_kernels)
        outputs.append(output)
        for name, states in kept.items():
            states.append(fast.weights[name])
    # the weights after each document's last complete chunk
    ends = {name: torch.cat(states).index_select(0, chunks.before_rests) for name, states in kept.items()}
    shared = {name: x.expand(len(rests), *x.shape[1:]) for name, x in start.weights.items() if name not in ends}
    last = {name: ends[name] if name in ends else shared[name] for name in start.weights}
    left = read_network(network, FastWeights(last, {}, {}), rests) if on_kernels else network.apply(last, rests)
    whole = torch.cat(outputs) if outputs else left.new_empty(0, left.shape[1], chunks.size, left.shape[3])
    return chunks.put_back(whole, left)


def _renewed(fast: FastWeights, start: FastWeights, where: Tensor) -> FastWeights:
    """The weights that a chunk meets: those of the start, where (bool, a scalar) it is a document's first."""
    return fast.join(start, lambda running, first: first if running is first else torch.where(where, first, running))


def _chunk(spec: InnerLoop, q: Tensor, tokens: Tokens, fast: FastWeights, on_kernels: bool) -> tuple[Tensor, FastWeights]:
    """What a chunk's queries read before its write, and the weights after it."""
    if on_kernels:
        return recurrent_chunks(spec, q, tokens, fast, len(tokens))
    return spec.network.apply(fast.weights, q), write(spec, fast, tokens, fast.weights)
