"""Packed documents whose boundaries the host does not read: what `ttt(cu_seqlens=...)` computes, with fixed sizes.

All documents start from the same weights. Queries read the weights before their chunk, so that what an incomplete chunk
would write concerns nobody: there are at most `T // chunk` writes, whatever the documents. Two ways lead to them, as for
one sequence:

- *chunkwise*, on `kvbind.kernels.chunked`, by tables that the device makes (`packed_layout`);
- one chunk after another, of all documents in turn; a document's first chunk starts from the starting weights again.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import itemgetter

import torch
from torch import Tensor

from kvbind.forms import fused
from kvbind.forms.analysis import NoParallelFormError, explain, parallel_obstacles
from kvbind.forms.autocast import without_autocast
from kvbind.forms.parallel import SHORT_CHUNK
from kvbind.forms.recurrent import write
from kvbind.forms.tokens import Tokens
from kvbind.forms.validation import LearningRate, Operands, check_operands
from kvbind.inner.rule import FastWeights
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
    gates: Mapping[str, Tensor] | None = None,
    form: str = "auto",
) -> Tensor:
    """The outputs of `ttt` for documents packed into one row.

    Args:
        spec: an inner loop that `uncovered` says nothing against.
        weights: starting fast weights of every document, `[H, in, out]` by matrix name.
        q: `[1, T, H, Dk]`; and k, v, rates and gates as `ttt` takes them.
        k: likewise.
        v: likewise.
        boundaries: of the documents.
        lr: as `ttt` takes it.
        gates: by name.
        form: as `ttt` takes it.

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
    call = check_operands(spec, weights, q, k, v, lr, gates or {}, None, None, None)
    assert spec.chunk is not None
    chunks = boundaries.chunks(spec.chunk)
    on_kernels = fused.operands_fit(call) and fused.wide_enough(call)
    with without_autocast(q.device.type):
        if on_kernels and form != "recurrent" and fused.chunked_fits(spec):
            output = fused.chunked_documents(spec, call, chunks)
        else:
            output = in_turn(spec, call, chunks, on_kernels and fused.recurrent_fits(spec, call))
    return output.transpose(1, 2).to(q.dtype)


def in_turn(spec: InnerLoop, call: Operands, chunks: Chunks, on_kernels: bool) -> Tensor:
    """One chunk after another, then what is left of all documents at once; outputs `[1, H, T, Dv]`."""
    network, start = spec.network, call.state.fast
    q = call.q if on_kernels else call.q.to(call.state.dtype)
    queries, rests = chunks.take(q), chunks.take_rests(q)
    writers = call.tokens.map(chunks.take)
    outputs, fast = [], start
    kept = {name: [start.weights[name]] for name in spec.updated}
    for c in range(len(chunks)):
        if c:
            fast = _renewed(fast, start, chunks.opens[c])
        here = slice(c, c + 1)
        output, fast = _chunk(spec, queries[here], writers.map(itemgetter(here)), fast, on_kernels)
        outputs.append(output)
        for name, states in kept.items():
            states.append(fast.weights[name])
    # the weights after each document's last complete chunk
    ends = {name: torch.cat(states).index_select(0, chunks.before_rests) for name, states in kept.items()}
    shared = {name: x.expand(len(rests), *x.shape[1:]) for name, x in start.weights.items() if name not in ends}
    last = {name: ends[name] if name in ends else shared[name] for name in start.weights}
    left = fused.read(network, FastWeights(last, {}, {}), rests) if on_kernels else network.apply(last, rests)
    whole = torch.cat(outputs) if outputs else left.new_empty(0, left.shape[1], chunks.size, left.shape[3])
    return chunks.put_back(whole, left)


def _renewed(fast: FastWeights, start: FastWeights, where: Tensor) -> FastWeights:
    """The weights that a chunk meets: those of the start, where (bool, a scalar) it is a document's first."""
    return fast.join(start, lambda running, first: torch.where(where, first, running))


def _chunk(spec: InnerLoop, q: Tensor, tokens: Tokens, fast: FastWeights, on_kernels: bool) -> tuple[Tensor, FastWeights]:
    """What a chunk's queries read before its write, and the weights after it."""
    if on_kernels:
        return fused.sweep(spec, q, tokens, fast, len(tokens))
    return spec.network.apply(fast.weights, q), write(spec, fast, tokens, fast.weights)
