"""Calls of `kvbind.kernels.chunked`: chunks whose writes add up, whole rows, packed rows and slices of rows."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvbind.forms.on_kernels.kernel_calls.operands import (
    activation_of,
    as_rows,
    contiguous_matrices,
    glu_operands,
    rate_column,
    state_after,
    static_layers,
)
from kvbind.forms.state import State
from kvbind.forms.tokens import Tokens
from kvbind.forms.validation import Operands
from kvbind.inner.gates import decays
from kvbind.inner.network import Network, gated
from kvbind.inner.rule import FastWeights
from kvbind.inner.spec import InnerLoop
from kvbind.sequence.shard import SequenceShard

if TYPE_CHECKING:
    from kvbind.kernels.chunked.rank_exchange import RankExchange
    from kvbind.kernels.chunked.span_tables import SpanTables
    from kvbind.sequence.boundaries import Chunks


Engine = Callable[[InnerLoop, Operands], tuple[Tensor, State]]


def run_chunked(spec: InnerLoop, call: Operands) -> tuple[Tensor, State]:
    """The chunkwise parallel form on kernels; under `visibility="full"`, all tokens that write are one chunk.

    Args:
        spec: an inner loop that `chunked_fits`.
        call: its sequences all have equally much pending; packed ones nothing.

    Returns:
        Outputs `[B, H, T, Dv]`, and the state after this call.
    """
    pending = call.state.pending()
    joined = call.tokens if pending is None else pending.append(call.tokens)
    earlier = 0 if pending is None else len(pending)
    sequences = call.q.shape[0] if call.cu_seqlens is None else len(call.cu_seqlens) - 1
    return _chunked(spec, call, joined, (earlier,) * sequences)


def run_chunked_slice(
    spec: InnerLoop, call: Operands, joined: Tokens, earlier: int, shard: SequenceShard
) -> tuple[Tensor, State]:
    """The chunkwise parallel form on kernels of a slice of a row.

    Args:
        spec: an inner loop that `chunked_fits`.
        call: the slice.
        joined: its tokens behind `earlier` others of the first document (or of every row).
        earlier: how many.
        shard: how the row is cut.

    Returns:
        As `run_chunked`.
    """
    if call.cu_seqlens is None:
        return _chunked(spec, call, joined, (earlier,) * call.q.shape[0], shard)
    return _chunked(spec, call, joined, (earlier,) + (0,) * (len(call.cu_seqlens) - 2), shard)


def _rank_exchange(shard: SequenceShard, writers: tuple[int, ...], chunk: int, own: bool, packed: bool) -> RankExchange:
    """Where a slice's first and last sequences go on, of `writers` tokens each; `own` as `chunked_layout` takes it."""
    from kvbind.kernels.chunked.rank_exchange import RankExchange

    here, count = shard.here, 1 if packed else len(writers)
    starts = list(itertools.accumulate((-(-n // chunk) if own else n // chunk for n in writers), initial=0))
    return RankExchange(
        group=shard.group_name,
        rank=shard.rank,
        size=shard.size,
        first=here.first,
        last=here.last,
        alone=len(here.bounds) == 2,
        count=count,
        complete=writers[-1] // chunk,
        chunks=tuple(starts[len(writers) - count : -1]),
    )


def _chunked(
    spec: InnerLoop, call: Operands, joined: Tokens, earlier: tuple[int, ...], shard: SequenceShard | None = None
) -> tuple[Tensor, State]:
    """What `run_chunked` says, of tokens behind those that each sequence has had pending."""
    from kvbind.kernels.chunked.span_tables import chunk_means, chunked_layout

    q, state, bounds = call.q, call.state, call.cu_seqlens
    lengths = (q.shape[2],) * q.shape[0] if bounds is None else tuple(b - a for a, b in itertools.pairwise(bounds))
    writers = (
        tuple(old + n for old, n in zip(earlier, lengths, strict=True)) if spec.chunk else (len(joined),) * len(lengths)
    )
    theta, shared = static_layers(spec.network, state.fast)
    own = spec.visibility != "past"
    layout = chunked_layout(lengths, earlier, writers, spec.chunk or len(joined), own, shared, _programs(q, state), q.device)
    across = (
        _rank_exchange(shard, writers, spec.chunk, own, bounds is not None) if shard is not None and spec.chunk else None
    )
    output, after = _launched(spec, q, joined, state.fast, theta, layout, partial(chunk_means, layout), across)
    return output, state_after(spec, after, joined, lengths, earlier, bounds)


def chunked_documents(spec: InnerLoop, call: Operands, chunks: Chunks) -> Tensor:
    """The chunkwise parallel form on kernels of documents whose boundaries the device reads.

    Args:
        spec: an inner loop under `visibility="past"` that `chunked_fits`.
        call: one row, with the one state that all documents start from.
        chunks: where the documents' chunks lie.

    Returns:
        Outputs `[1, H, T, Dv]`.
    """
    from kvbind.kernels.chunked.span_tables import packed_layout

    programs, state = _programs(call.q, call.state), call.state
    layout = chunks.boundaries.once(("layout", chunks.size, programs), lambda: packed_layout(chunks, programs))
    documents, fast = chunks.boundaries.capacity, state.fast

    def each(x: Tensor) -> Tensor:
        return x.expand(documents, *x.shape[1:])

    weights = dict(fast.weights) | {"out": each(fast.weights["out"])}
    starts = FastWeights(weights, {name: each(x) for name, x in fast.momentum.items()}, fast.norms)
    theta, _ = static_layers(spec.network, fast)
    return _launched(spec, call.q, call.tokens, starts, theta, layout, chunks.means)[0]


def _programs(q: Tensor, state: State) -> int:
    """How many programs one span of queries keeps busy."""
    from kvbind.kernels.chunked.span_tables import TILE

    out = state.tensors["weights.out"]
    return q.shape[1] * -(-out.shape[-2] // TILE) * -(-out.shape[-1] // TILE)


def _launched(
    spec: InnerLoop,
    q: Tensor,
    tokens: Tokens,
    fast: FastWeights,
    theta: Tensor | None,
    layout: SpanTables,
    means: Callable[[Tensor], Tensor],
    across: RankExchange | None = None,
) -> tuple[Tensor, FastWeights]:
    """The kernels on a layout's tables.

    Args:
        spec: the inner loop.
        q: queries `[B, H, T, Dk]`.
        tokens: all that write.
        fast: where each sequence starts.
        theta: of these, as `static_layers` gives it.
        layout: which rows belong together.
        means: per-token gates `[rows, heads]` averaged over each chunk that writes.
        across: how the first and last sequences go on over ranks.

    Returns:
        Outputs `[B, H, T, Dv]`, and the weights after each sequence's last complete chunk.
    """
    from kvbind.kernels.chunked.operator import chunked

    network, orthogonalize = spec.network, spec.orthogonalize

    def per_chunk(gate: Tensor | None) -> Tensor | None:
        return None if gate is None else means(as_rows(gate).float())

    rate, (momentum, decay) = rate_column(tokens.rates["out"], tokens), decays(tokens.gates)
    output_gate, gated_tokens = glu_operands(network, fast, q, tokens)
    output, end, velocity = chunked(
        as_rows(q), as_rows(gated_tokens.k), as_rows(gated_tokens.v), layout, contiguous_matrices(fast.weights["out"]),
        theta=theta, activation=activation_of(network),
        rates=None if rate is None else as_rows(rate).contiguous(),
        momentum=per_chunk(momentum), velocity=contiguous_matrices(fast.momentum["out"]) if spec.momentum else None,
        decay=per_chunk(decay), coefficients=orthogonalize.coefficients if orthogonalize else (),
        orthogonal_dtype=orthogonalize.dtype if orthogonalize else torch.bfloat16, sign=spec.sign, across=across,
    )  # fmt: skip
    after = FastWeights(dict(fast.weights) | {"out": end}, {"out": velocity} if spec.momentum else {}, fast.norms)
    return gated(output_gate, output.unflatten(0, (q.shape[0], q.shape[2])).transpose(1, 2)), after


def read_network(network: Network, fast: FastWeights, q: Tensor) -> Tensor:
    """The fast network at queries `[B, H, T, Dk]` on kernels, `[B, H, T, Dv]`."""
    from kvbind.kernels.chunked.operator import chunked
    from kvbind.kernels.chunked.span_tables import chunked_layout

    theta, shared = static_layers(network, fast)
    batch, heads, length, _ = q.shape
    layout = chunked_layout((length,) * batch, (0,) * batch, (0,) * batch, 1, False, shared, heads, q.device)
    out = fast.weights["out"]
    none = q.new_empty(0, heads, q.shape[3]), q.new_empty(0, heads, out.shape[-1])
    output, _, _ = chunked(
        as_rows(q), *none, layout, contiguous_matrices(out), theta=theta, activation=activation_of(network)
    )
    return output.unflatten(0, (batch, length)).transpose(1, 2)
