"""Inner loops on the kernels of `kvbind.kernels`: which of them a call can take, and how its operands become theirs.

A kernel is taken where it computes the same form of the same inner loop. Its products take operands in q's dtype (bfloat16,
float16 or float32) with sums, scans, gates and states in float32; the PyTorch forms first turn operands into float32.
`KVBIND_KERNELS=0` keeps to those.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvbind.forms import delta, fla, mini_batches
from kvbind.forms.analysis import parallel_obstacles
from kvbind.forms.parallel import SHORT_CHUNK
from kvbind.forms.recurrent import recurrent
from kvbind.forms.state import State
from kvbind.forms.tokens import Tokens
from kvbind.forms.validation import Operands
from kvbind.inner.gates import decays
from kvbind.inner.networks import GLU, MLP, DepthwiseConv, Linear, Network, SwiGLU, gated
from kvbind.inner.orthogonalize import NewtonSchulz
from kvbind.inner.rule import FastWeights
from kvbind.inner.spec import InnerLoop
from kvbind.kernels.common.devices import runs_on
from kvbind.kernels.common.operands import DTYPES
from kvbind.sequence.shard import SequenceShard

if TYPE_CHECKING:
    from kvbind.kernels.chunked.rank_exchange import RankExchange
    from kvbind.kernels.chunked.span_tables import SpanTables
    from kvbind.sequence.boundaries import Chunks

Engine = Callable[[InnerLoop, Operands], tuple[Tensor, State]]

WIDEST_CAUSAL = 512
"""The greatest width of a head that `kvbind.kernels.causal` takes."""

MOST_RECURRENT = 65535
"""The most sequences times heads that `kvbind.kernels.recurrent` takes, as many as an axis of a grid."""

NARROWEST = 16
"""The least width of an operand of a matrix unit."""


def engine(spec: InnerLoop, call: Operands, form: str) -> Engine | None:
    """What runs this call on kernels in this form ("recurrent", "parallel" or "dual"), or None where nothing does."""
    if form == "dual" and mini_batches.fits(spec, call):
        return mini_batches.run
    own = None
    if call.cu_seqlens is None or own_takes_packed(spec, call, form):
        own = own_engine(spec, call, form)
    if form != "parallel" or not fla.considered():
        return own
    return fla.beside(spec, call, own).run


def own_engine(spec: InnerLoop, call: Operands, form: str) -> Engine | None:
    """What runs this call on the library's own kernels in this form, or None where nothing does."""
    if form == "parallel":
        choice = delta.runner(spec, call)
        if choice.run is not None:
            return choice.run
    if not operands_fit(call):
        return None
    if spec.visibility == "full":
        if glu_fits(spec, call):
            return glu_form
        if conv_fits(spec, call):
            return conv_form
        gated_mask = call.tokens.mask is not None and bool(spec.gates)
        if gated_mask or call.tokens.count == 0 or not wide_enough(call):
            return None
        return chunked_form if chunked_fits(spec) else full_form if recurrent_fits(spec, call) else None
    if form == "parallel" and wide_enough(call):
        if chunked_fits(spec):
            return chunked_form
        if causal_fits(spec, call) and not any(call.state.pending_lengths):
            return causal_form
    if form == "recurrent" and wide_enough(call) and recurrent_fits(spec, call):
        completes = spec.chunk is not None and call.state.pending_lengths[0] + len(call.tokens) >= spec.chunk
        return recurrent_form if completes else None
    return None


def takes_packed(spec: InnerLoop, call: Operands, form: str) -> bool:
    """Whether packed sequences of any lengths run in one go: on kernels, where none has tokens pending."""
    if own_takes_packed(spec, call, form):
        return True
    return form == "parallel" and fla.considered() and fla.obstacle(spec, call) is None


def own_takes_packed(spec: InnerLoop, call: Operands, form: str) -> bool:
    """Whether packed sequences of any lengths run in one go on the library's own kernels."""
    if form == "recurrent" or spec.visibility == "full" or parallel_obstacles(spec) or isinstance(spec.network, GLU):
        return False
    if delta.runner(spec, call).run is not None:
        return True
    fits = chunked_fits(spec) or (causal_fits(spec, call) and spec.chunk == 1)
    return fits and not any(call.state.pending_lengths) and operands_fit(call) and wide_enough(call)


def parallel_kernels(spec: InnerLoop) -> str:
    """What runs the parallel form of an inner loop on GPUs, for people; empty where that is PyTorch alone.

    Whether a call fits depends on its operands too; `kvbind.forms.fla` logs what ran.
    """
    own = None
    if delta.obstacle(spec) is None:
        own = "kvbind.kernels.affine"
    elif not spec.extensions and chunked_fits(spec):
        own = "kvbind.kernels.chunked"
    elif not spec.extensions and is_causal(spec):
        own = "kvbind.kernels.causal"
    operator = fla.operator_of(spec)
    if isinstance(operator, str):
        return own or ""
    reason = fla.unusable()
    if reason is not None:
        return f"{own or 'PyTorch'} ({operator.name} not: {reason})"
    other = f"{operator.name} of {fla.PACKAGE} {fla.installed()}"
    return other if own is None else f"{own}, or {other} where that was measured to be faster or takes a call alone"


def operands_fit(call: Operands) -> bool:
    """Whether kernels run on a call's device and dtypes at all."""
    q, tokens = call.q, call.tokens
    if call.state.spec.extensions:
        # kernels are of the six lines on whole chunks
        return False
    if not runs_on(q.device) or q.dtype not in DTYPES or len({q.dtype, tokens.k.dtype, tokens.v.dtype}) > 1:
        return False
    return call.state.dtype == torch.float32 and q.numel() > 0


def wide_enough(call: Operands) -> bool:
    """Whether every width is one that a matrix unit takes."""
    return min(call.q.shape[-1], *call.state.tensors["weights.out"].shape[-2:]) >= NARROWEST


def is_a(network: Network, *kinds: type[Network]) -> bool:
    """Whether a network is of one of these classes itself; one derived from them may compute anything."""
    return type(network) in kinds


def writes_add_up(spec: InnerLoop) -> bool:
    """Whether the last layer alone is updated, once per chunk, by writes that do not read it."""
    theta = spec.network.theta if spec.update == "all" else ()
    return not theta and spec.loss == "dot" and spec.steps == 1 and not spec.clip and not spec.normalize


def chunked_fits(spec: InnerLoop) -> bool:
    """Whether an inner loop is one of `kvbind.kernels.chunked`."""
    network = spec.network
    known = is_a(network, Linear, SwiGLU, GLU) or (is_a(network, MLP) and network.hidden_layers == 1)
    long = spec.chunk is None or spec.chunk >= SHORT_CHUNK
    return known and long and products_fit(spec.orthogonalize) and spec.visibility != "token" and writes_add_up(spec)


def bare(spec: InnerLoop) -> bool:
    """Whether nothing but clipping stands between a gradient and the weights, and there is one step."""
    return not spec.gates and not spec.normalize and spec.steps == 1


def glu_fits(spec: InnerLoop, call: Operands) -> bool:
    """Whether an inner loop under `visibility="full"` is one of `kvbind.kernels.full_glu`: ViTTT's heads."""
    network, tokens = spec.network, call.tokens
    if not (is_a(network, GLU) or (is_a(network, Linear) and spec.clip)) or tokens.count == 0:
        return False
    if not bare(spec) or spec.orthogonalize is not None or (spec.loss == "squared" and not isinstance(network, GLU)):
        return False
    from kvbind.kernels.full_glu.operator import covers

    return covers(tokens.k.shape[-1], tokens.v.shape[-1], call.q.dtype)


def conv_fits(spec: InnerLoop, call: Operands) -> bool:
    """Whether an inner loop under `visibility="full"` is one of `kvbind.kernels.full_conv`: ViTTT's convolution."""
    if not is_a(spec.network, DepthwiseConv) or call.tokens.count != call.q.shape[2]:
        return False
    if not bare(spec) or spec.loss != "dot":
        return False
    from kvbind.kernels.full_conv.operator import covers

    return covers(call.q.shape[-1], call.q.dtype)


def recurrent_fits(spec: InnerLoop, call: Operands) -> bool:
    """Whether an inner loop is one of `kvbind.kernels.recurrent`."""
    if not is_a(spec.network, SwiGLU, Linear) or spec.loss != "dot" or spec.steps > 1 or spec.clip:
        return False
    if spec.normalize == "read" or spec.visibility == "token" or (spec.chunk is not None and spec.chunk < SHORT_CHUNK):
        return False
    if not products_fit(spec.orthogonalize):
        return False
    if call.q.shape[0] * call.q.shape[1] > MOST_RECURRENT:
        return False
    from kvbind.kernels.recurrent.operator import covers

    return covers(call.q.dtype, call.q.shape[-1], *call.state.tensors["weights.out"].shape[-2:])


def causal_fits(spec: InnerLoop, call: Operands) -> bool:
    """Whether a call is one of `kvbind.kernels.causal`."""
    return max(call.q.shape[-1], call.tokens.v.shape[-1]) <= WIDEST_CAUSAL and is_causal(spec)


def is_causal(spec: InnerLoop) -> bool:
    """Whether an inner loop is one of `kvbind.kernels.causal`."""
    short = spec.visibility == "token" or (spec.chunk is not None and spec.chunk < SHORT_CHUNK)
    gates = not spec.gates or (not spec.momentum and spec.visibility == "token" and spec.chunk == 1)
    known = is_a(spec.network, Linear, GLU) and spec.visibility != "full" and spec.orthogonalize is None
    return known and short and gates and writes_add_up(spec)


def products_fit(rule: NewtonSchulz | None) -> bool:
    """Whether kernels have products in the precision of Newton-Schulz, where there is one."""
    return rule is None or rule.dtype in (torch.bfloat16, torch.float16, torch.float32)


def as_rows(x: Tensor) -> Tensor:
    """`[B, H, T, ...]` as the kernels take it: `[B * T, H, ...]`, channels side by side."""
    rows = x.transpose(1, 2).flatten(0, 1)
    return rows if rows.dim() == 2 or rows.stride(-1) == 1 else rows.contiguous()


def column_of(rate: Tensor | float, tokens: Tokens) -> Tensor | None:
    """A rate as kernels take it, `[B, H, T]` float32, zero for tokens that do not write; None for the constant 1."""
    if not isinstance(rate, Tensor):
        if rate == 1 and tokens.mask is None:
            return None
        rate = torch.full(tokens.k.shape[:3], float(rate), device=tokens.k.device)
    return rate if tokens.mask is None else rate * tokens.mask


def between_gates(network: Network, fast: FastWeights, q: Tensor, tokens: Tokens) -> tuple[Tensor | None, Tokens]:
    """What multiplies the outputs of a GLU, or None for other networks, and its tokens with gated values."""
    if not isinstance(network, GLU):
        return None, tokens
    values = gated(network.gate(fast.weights, tokens.k.float()), tokens.v.float()).to(tokens.v.dtype)
    return network.gate(fast.weights, q.float()), replace(tokens, v=values)


def chunked_form(spec: InnerLoop, call: Operands) -> tuple[Tensor, State]:
    """The chunkwise parallel form on kernels; under `visibility="full"`, all tokens that write are one chunk.

    Args:
        spec: an inner loop that `chunked_fits`.
        call: its sequences all have equally much pending; packed ones nothing.

    Returns:
        Outputs `[B, H, T, Dv]`, and the state after this call.
    """
    pending = call.state.pending()
    joined = call.tokens if pending is None else pending.append(call.tokens)
    kept = 0 if pending is None else len(pending)
    sequences = call.q.shape[0] if call.cu_seqlens is None else len(call.cu_seqlens) - 1
    return _chunked(spec, call, joined, (kept,) * sequences)


def chunked_across(spec: InnerLoop, call: Operands) -> bool:
    """Whether the slice of a row that is cut over ranks runs on `kvbind.kernels.chunked`, exchanges included."""
    # a GLU's gates are made by each sequence's own matrix, without tables
    alike = call.cu_seqlens is None or len(call.cu_seqlens) == 2 or not isinstance(spec.network, GLU)
    return alike and chunked_fits(spec) and operands_fit(call) and wide_enough(call)


def chunked_shard(spec: InnerLoop, call: Operands, joined: Tokens, kept: int, shard: SequenceShard) -> tuple[Tensor, State]:
    """The chunkwise parallel form on kernels of a slice of a row.

    Args:
        spec: an inner loop that `chunked_fits`.
        call: the slice.
        joined: its tokens behind `kept` others of the first document (or of every row).
        kept: as said.
        shard: how the row is cut.

    Returns:
        As `chunked_form`.
    """
    if call.cu_seqlens is None:
        return _chunked(spec, call, joined, (kept,) * call.q.shape[0], shard)
    return _chunked(spec, call, joined, (kept,) + (0,) * (len(call.cu_seqlens) - 2), shard)


def _across(shard: SequenceShard, writers: tuple[int, ...], chunk: int, own: bool, packed: bool) -> RankExchange:
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
    spec: InnerLoop, call: Operands, joined: Tokens, kept: tuple[int, ...], shard: SequenceShard | None = None
) -> tuple[Tensor, State]:
    """What `chunked_form` says, of tokens behind those that each sequence has had pending."""
    from kvbind.kernels.chunked.span_tables import chunk_means, chunked_layout

    q, state, bounds = call.q, call.state, call.cu_seqlens
    lengths = (q.shape[2],) * q.shape[0] if bounds is None else tuple(b - a for a, b in itertools.pairwise(bounds))
    writers = tuple(old + n for old, n in zip(kept, lengths, strict=True)) if spec.chunk else (len(joined),) * len(lengths)
    theta, shared = theta_of(spec.network, state.fast)
    own = spec.visibility != "past"
    layout = chunked_layout(lengths, kept, writers, spec.chunk or len(joined), own, shared, _programs(q, state), q.device)
    across = _across(shard, writers, spec.chunk, own, bounds is not None) if shard is not None and spec.chunk else None
    output, after = _launched(spec, q, joined, state.fast, theta, layout, partial(chunk_means, layout), across)
    return output, settle(spec, after, joined, lengths, kept, bounds)


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
    theta, _ = theta_of(spec.network, fast)
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
        theta: of these, as `theta_of` gives it.
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

    rate, (momentum, decay) = column_of(tokens.rates["out"], tokens), decays(tokens.gates)
    output_gate, gated_tokens = between_gates(network, fast, q, tokens)
    output, end, velocity = chunked(
        as_rows(q), as_rows(gated_tokens.k), as_rows(gated_tokens.v), layout, dense(fast.weights["out"]),
        theta=theta, activation=activation_of(network),
        rates=None if rate is None else as_rows(rate).contiguous(),
        momentum=per_chunk(momentum), velocity=dense(fast.momentum["out"]) if spec.momentum else None,
        decay=per_chunk(decay), coefficients=orthogonalize.coefficients if orthogonalize else (),
        orthogonal_dtype=orthogonalize.dtype if orthogonalize else torch.bfloat16, sign=spec.sign, across=across,
    )  # fmt: skip
    after = FastWeights(dict(fast.weights) | {"out": end}, {"out": velocity} if spec.momentum else {}, fast.norms)
    return gated(output_gate, output.unflatten(0, (q.shape[0], q.shape[2])).transpose(1, 2)), after


def causal_form(spec: InnerLoop, call: Operands) -> tuple[Tensor, State]:
    """Attention inside blocks of tokens on kernels: `visibility="token"`, and short chunks.

    Args:
        spec: an inner loop that `causal_fits`.
        call: its sequences have nothing pending; packed ones have `spec.chunk == 1`.

    Returns:
        Outputs `[B, H, T, Dv]`, and the state after this call.
    """
    from kvbind.kernels.causal.operator import causal_linear_attention

    chunk = spec.chunk or 1
    q, tokens, state, bounds = call.q, call.tokens, call.state, call.cu_seqlens
    fast, length = state.fast, q.shape[2]
    output_gate, gated_tokens = between_gates(spec.network, fast, q, tokens)
    rates, (_, decay) = column_of(tokens.rates["out"], tokens), decays(tokens.gates)
    packed = None if bounds is None else torch.tensor(bounds, device=q.device)
    rest = length % chunk if bounds is None else 0

    def run(start: int, stop: int, before: Tensor) -> tuple[Tensor, Tensor | None]:
        def part(x: Tensor) -> Tensor:
            return x[:, :, start:stop].transpose(1, 2)

        return causal_linear_attention(
            part(q), part(gated_tokens.k), part(gated_tokens.v), None if rates is None else part(rates),
            None if decay is None else part(decay), before,
            chunk=1 if spec.visibility == "token" else chunk, mode=spec.visibility, cu_seqlens=packed,
            sign=spec.sign, return_state=stop == length - rest,
        )  # fmt: skip

    output, end = run(0, length - rest, fast.weights["out"])
    assert end is not None
    if rest:
        output = torch.cat((output, run(length - rest, length, end)[0]), dim=1)
    after = FastWeights(dict(fast.weights) | {"out": end}, {}, {})
    counts = (0,) * state.batch if bounds is not None else (length,) * state.batch
    return gated(output_gate, output.transpose(1, 2)), settle(spec, after, tokens, counts, (0,) * len(counts), None)


def glu_form(spec: InnerLoop, call: Operands) -> tuple[Tensor, State]:
    """One update of a gated linear unit from all tokens, and a read, on kernels.

    Args:
        spec: an inner loop that `glu_fits`.
        call: its operands.

    Returns:
        Outputs `[B, H, T, Dv]`, and the state after this call.
    """
    from kvbind.kernels.full_glu.operator import full_glu

    tokens, weights = call.tokens, call.state.weights
    both = "gate" in spec.updated
    output, out, gate = full_glu(
        heads_last(call.q), heads_last(tokens.k), heads_last(tokens.v), weights["out"], weights.get("gate"),
        masked_rate(tokens, "out"), masked_rate(tokens, "gate") if both else 1.0, update_gate=both, clip=spec.clip,
        sign=spec.sign, squared=spec.loss == "squared",
    )  # fmt: skip
    after = {"out": out} if gate is None else {"gate": gate, "out": out}
    return output.transpose(1, 2), State.of(spec, FastWeights(after, {}, {}), None, 0)


def conv_form(spec: InnerLoop, call: Operands) -> tuple[Tensor, State]:
    """One update of depthwise kernels from a grid of tokens, and a read, on kernels.

    Args:
        spec: an inner loop that `conv_fits`.
        call: its operands.

    Returns:
        Outputs `[B, H, T, D]`, and the state after this call.
    """
    from kvbind.kernels.full_conv.operator import full_conv

    assert isinstance(spec.network, DepthwiseConv)
    tokens = call.tokens
    output, kernel = full_conv(
        heads_last(call.q), heads_last(tokens.k), heads_last(tokens.v), call.state.weights["out"],
        masked_rate(tokens, "out"), grid=spec.network.grid_of(call.q.shape[2]), clip=spec.clip, sign=spec.sign,
    )  # fmt: skip
    return output.transpose(1, 2), State.of(spec, FastWeights({"out": kernel}, {}, {}), None, 0)


def heads_last(x: Tensor) -> Tensor:
    """`[B, H, T, ...]` to `[B, T, H, ...]`, channels side by side."""
    x = x.transpose(1, 2)
    return x if x.dim() == 3 or x.stride(-1) == 1 else x.contiguous()


def masked_rate(tokens: Tokens, matrix: str) -> Tensor | float:
    """A matrix's rate, a number or `[B, T, H]`, zero for tokens that do not write."""
    rate = tokens.rates[matrix]
    if tokens.mask is None:
        return heads_last(rate) if isinstance(rate, Tensor) else float(rate)
    column = column_of(rate, tokens)
    assert column is not None
    return heads_last(column).contiguous()


def recurrent_form(spec: InnerLoop, call: Operands) -> tuple[Tensor, State]:
    """The recurrent form on kernels; an incomplete last chunk is run on PyTorch behind them.

    Args:
        spec: an inner loop that `recurrent_fits`.
        call: its sequences all have equally much pending, and at least one chunk to complete.

    Returns:
        Outputs `[B, H, T, Dv]`, and the state after this call.
    """
    assert spec.chunk is not None
    q, pending = call.q, call.state.pending()
    joined = call.tokens if pending is None else pending.append(call.tokens)
    kept = 0 if pending is None else len(pending)
    if kept:
        # the chunk's earlier queries were answered in earlier calls
        q = torch.cat((q.new_zeros(*q.shape[:2], kept, q.shape[3]), q), dim=2)
    whole = len(joined) // spec.chunk * spec.chunk
    output, after = sweep(spec, q[:, :, :whole], joined.span(0, whole), call.state.fast, spec.chunk)
    rest = joined.span(whole, len(joined))
    if not len(rest):
        return output[:, :, kept:], State.of(spec, after, rest, 0)
    start = State.of(spec, after, None, 0)
    last, state = recurrent(spec, q[:, :, whole:].to(start.dtype), rest, start)
    return torch.cat((output[:, :, kept:], last.to(output.dtype)), dim=2), state


def full_form(spec: InnerLoop, call: Operands) -> tuple[Tensor, State]:
    """One update of every matrix from all tokens that write, and a read by all queries, on kernels.

    Args:
        spec: an inner loop under `visibility="full"` that `recurrent_fits`.
        call: its operands.

    Returns:
        Outputs `[B, H, T, Dv]`, and the state after this call.
    """
    q, count = call.q, len(call.tokens)
    first, after = sweep(spec, q[:, :, :count], call.tokens, call.state.fast, count)
    if q.shape[2] == count:
        return first, State.of(spec, after, None, 0)
    last = read(spec.network, after, q[:, :, count:])
    return torch.cat((first, last), dim=2), State.of(spec, after, None, 0)


def sweep(spec: InnerLoop, q: Tensor, tokens: Tokens, fast: FastWeights, chunk: int) -> tuple[Tensor, FastWeights]:
    """Whole chunks of the recurrent form on kernels; queries `[B, H, T, Dk]` of as many tokens, or of fewer."""
    from kvbind.kernels.recurrent.operator import recurrent_swiglu

    missing = len(tokens) - q.shape[2]
    padded = torch.cat((q, q.new_zeros(*q.shape[:2], missing, q.shape[3])), dim=2) if missing else q
    weights, updated = fast.weights, spec.updated

    def per_chunk(gate: Tensor | None) -> Tensor | None:
        return None if gate is None else gate.unflatten(2, (-1, chunk)).mean(3)

    rates: dict[str, Tensor] = {}
    for name in updated:
        rate = column_of(tokens.rates[name], tokens)
        full = torch.ones(tokens.k.shape[:3], device=q.device) if rate is None else rate
        rates[name] = heads_last(full).contiguous()
    momentum, decay = decays(tokens.gates)
    output, gate, up, out, velocity = recurrent_swiglu(
        heads_last(padded), heads_last(tokens.k), heads_last(tokens.v), weights.get("gate"), weights.get("up"),
        weights["out"], rates.get("gate"), rates.get("up"), rates["out"], per_chunk(momentum),
        per_chunk(decay), [fast.momentum[name] for name in updated] if spec.momentum else None,
        [fast.norms[name] for name in updated] if spec.normalize else None, chunk=chunk, update_all=len(updated) > 1,
        normalize=bool(spec.normalize), coefficients=spec.orthogonalize.coefficients if spec.orthogonalize else None,
        sign=spec.sign, own_chunk=spec.visibility != "past",
        precision=spec.orthogonalize.dtype if spec.orthogonalize else torch.bfloat16,
    )  # fmt: skip
    after = {name: x for name, x in (("gate", gate), ("up", up), ("out", out)) if x is not None}
    moved = dict(zip(updated, velocity, strict=True)) if velocity is not None else {}
    return output.transpose(1, 2)[:, :, : q.shape[2]], FastWeights(after, moved, fast.norms)


def read(network: Network, fast: FastWeights, q: Tensor) -> Tensor:
    """The fast network at queries `[B, H, T, Dk]` on kernels, `[B, H, T, Dv]`."""
    from kvbind.kernels.chunked.operator import chunked
    from kvbind.kernels.chunked.span_tables import chunked_layout

    theta, shared = theta_of(network, fast)
    batch, heads, length, _ = q.shape
    layout = chunked_layout((length,) * batch, (0,) * batch, (0,) * batch, 1, False, shared, heads, q.device)
    out = fast.weights["out"]
    none = q.new_empty(0, heads, q.shape[3]), q.new_empty(0, heads, out.shape[-1])
    output, _, _ = chunked(as_rows(q), *none, layout, dense(out), theta=theta, activation=activation_of(network))
    return output.unflatten(0, (batch, length)).transpose(1, 2)


def theta_of(network: Network, fast: FastWeights) -> tuple[Tensor | None, bool]:
    """The matrices before the last, `[1 or 2, S or 1, H, D, F]`, and whether all sequences share them."""
    matrices = [fast.weights[name] for name in network.theta] if isinstance(network, SwiGLU | MLP) else []
    shared = all(x.shape[0] == 1 or x.stride(0) == 0 for x in matrices)
    if not matrices:
        return None, True
    return torch.stack([x[:1] if shared else x for x in matrices]), shared


def activation_of(network: Network) -> str:
    """The activation of a network's features, as kernels name it."""
    return "silu" if isinstance(network, SwiGLU) else network.activation if isinstance(network, MLP) else "identity"


def dense(matrices: Tensor) -> Tensor:
    """Matrices `[S, H, F, Dv]` that are each contiguous; sequences that share one go on doing so."""
    if matrices.stride(-1) == 1 and matrices.stride(-2) == matrices.shape[-1]:
        return matrices
    if matrices.stride(0) == 0:
        return matrices[:1].contiguous().expand(matrices.shape)
    return matrices.contiguous()


def settle(
    spec: InnerLoop,
    fast: FastWeights,
    tokens: Tokens,
    lengths: tuple[int, ...],
    kept: tuple[int, ...],
    bounds: tuple[int, ...] | None,
) -> State:
    """The state after a call: the weights, and the tokens of each sequence's incomplete chunk.

    Args:
        spec: the inner loop.
        fast: the weights.
        tokens: what wrote: of each sequence those that were pending and the call's.
        lengths: the call's tokens of each sequence.
        kept: how many of each were pending before; of packed ones only the first's.
        bounds: boundaries of the call's packed sequences.
    """
    if spec.chunk is None:
        return State.of(spec, fast, None, 0)
    chunk = spec.chunk
    if bounds is None:
        rest = (kept[0] + lengths[0]) % chunk
        return State.of(spec, fast, tokens.span(len(tokens) - rest, len(tokens)) if rest else tokens, rest)
    rests = [(old + n) % chunk for old, n in zip(kept, lengths, strict=True)]
    if not any(rests):
        return State.of(spec, fast, tokens, 0)
    spread, device = tokens.spread(), tokens.k.device
    stops, counts = torch.tensor(bounds[1:], device=device) + kept[0], torch.tensor(rests, device=device)
    places = torch.arange(chunk - 1, device=device)
    rows = (stops - counts)[:, None] + places
    there = places < counts[:, None]
    rows = torch.where(there, rows, 0)

    def gather(x: Tensor) -> Tensor:
        picked = x[0][:, rows].transpose(0, 1)
        mask = there[:, None].reshape(there.shape[0], 1, -1, *(1,) * (picked.dim() - 3))
        return torch.where(mask, picked, torch.zeros((), dtype=x.dtype, device=device))

    state = State.of(spec, fast, spread.map(gather), chunk - 1)
    return State(spec, state.tensors, tuple(rests))
