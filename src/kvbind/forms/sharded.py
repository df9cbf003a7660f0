"""An inner loop over a row that is cut over ranks (`kvbind.SequenceShard`), in one of two schedules.

- *scan*: every rank runs its own tokens at once. The tokens of a chunk that an earlier rank left incomplete come in front
  of its own (a halo); what its first document starts from comes from an exclusive scan, across ranks, of pairs of a
  transition and a write: once for momentum, whose buffers are orthogonalized, and once for the state. It takes an inner
  loop that has a parallel form, and messages are of a state's size.
- *ring*: a rank waits for the state of the rank before it, runs its tokens, and hands its own state on. It takes any causal
  inner loop.

Both are exact and differentiable: backward, the scan and the ring run from the last rank to the first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from kvbind.forms.explained.analysis import sequence_schedule
from kvbind.forms.on_kernels import dispatch
from kvbind.forms.on_kernels.kernel_calls.chunked import run_chunked_slice
from kvbind.forms.parallel.form import runs_blockwise, segment
from kvbind.forms.parallel.scan import product_of, products_after
from kvbind.forms.parallel.summary import block_summary, stacked, unstacked
from kvbind.forms.state import State
from kvbind.forms.tokens import Tokens
from kvbind.forms.validation import Engine, Operands
from kvbind.inner.rule import FastWeights
from kvbind.inner.spec import InnerLoop
from kvbind.sequence.exchanges import Exchanges
from kvbind.sequence.shard import SequenceShard


def sharded(spec: InnerLoop, call: Operands, shard: SequenceShard, form: str, run: Engine) -> tuple[Tensor, State]:
    """Run this rank's slice of a row.

    Args:
        spec: a causal inner loop.
        call: its tokens; one starting state for each of the slice's documents (or rows).
        shard: how the row is cut.
        form: the form that `ttt` was asked for; "recurrent" has the schedule "ring".
        run: evaluates a call whose sequences lie on this rank alone, in that form.

    Returns:
        Outputs `[B, H, T, Dv]`, and the state of each document of the slice after its last token here.
    """
    schedule = sequence_schedule(spec, shard.schedule, form)
    named = call.tokens.tensors()
    wide = [call.q, named.pop("k"), named.pop("v")]
    exchanges = Exchanges(shard, wide, [*named.values(), *call.state.tensors.values()])
    if not shard.connected:
        output, state = run(spec, call)
    elif schedule == "ring":
        output, state = _ring(spec, call, exchanges, run)
    else:
        output, state = _scan(spec, call, exchanges, run)
    return exchanges.tie(output), state


def _split(call: Operands, tokens: Tokens, earlier: int) -> tuple[Operands, Operands | None]:
    """The first document (or all rows, where they are not packed), and the others.

    Args:
        call: the slice.
        tokens: its tokens behind `earlier` others of the first document.
        earlier: how many.
    """
    if call.cu_seqlens is None or len(call.cu_seqlens) == 2:
        return Operands(call.q, tokens, call.state, None), None
    stop = call.cu_seqlens[1]
    edge = earlier + call.state.spec.writes * stop
    first = Operands(call.q[:, :, :stop], tokens.span(0, edge), call.state[:1], None)
    bounds = tuple(b - stop for b in call.cu_seqlens[1:])
    others = Operands(call.q[:, :, stop:], tokens.span(edge, len(tokens)), call.state[1:], bounds)
    return first, others


def _together(first: tuple[Tensor, State], others: tuple[Tensor, State] | None) -> tuple[Tensor, State]:
    """Outputs and states of the first document and the others, where there are any."""
    if others is None:
        return first
    return torch.cat((first[0], others[0].to(first[0].dtype)), dim=2), State.cat([first[1], others[1]])


def _roomy(spec: InnerLoop, state: State, tokens: Tokens) -> State:
    """A starting state with places for pending tokens, as every state that was handed on has."""
    started = State.of(spec, state.fast, tokens.span(0, 0), 0)
    return State(spec, started.tensors, state.pending_lengths)


def _in_order(state: State) -> list[Tensor]:
    """A state's tensors in the one order that every rank has them in."""
    return [state.tensors[name] for name in sorted(state.tensors)]


def _ring(spec: InnerLoop, call: Operands, exchanges: Exchanges, run: Engine) -> tuple[Tensor, State]:
    shard, place = exchanges.shard, exchanges.shard.here
    assert spec.chunk is not None
    first, others = _split(call, call.tokens, 0)
    later = None
    if others is not None:
        later = run(spec, others)
        if place.last > shard.rank:
            exchanges.send(_in_order(later[1][-1:]))
    if place.before:
        blank = _roomy(spec, first.state, first.tokens)
        tensors = dict(zip(sorted(blank.tensors), exchanges.receive(_in_order(blank)), strict=True))
        first = replace(first, state=State(spec, tensors, (place.before % (spec.room + 1),) * blank.batch))
    output, state = run(spec, first)
    if others is None and place.last > shard.rank:
        exchanges.send(_in_order(state))
    return _together((output, state), later)


def _scan(spec: InnerLoop, call: Operands, exchanges: Exchanges, run: Engine) -> tuple[Tensor, State]:
    shard, place = exchanges.shard, exchanges.shard.here
    assert spec.span is not None
    # a state stops where gradients are renewed; where a token writes several times, that is behind every token
    wanted = shard.pending(spec.span)
    earlier, given = wanted[shard.rank], call.tokens.tensors()
    extended = dict(zip(given, exchanges.extended(list(given.values()), wanted, axis=2), strict=True))
    tokens = Tokens.of(extended)
    tokens = replace(tokens, rates=dict(call.tokens.rates) | tokens.rates)

    if dispatch.chunked_takes_slice(spec, call):
        return run_chunked_slice(spec, call, tokens, earlier, shard)
    if runs_blockwise(spec):
        return _blockwise(spec, call, tokens, earlier, exchanges, run)
    assert spec.chunk is not None
    first, others = _split(call, tokens, earlier)
    later = None if others is None else run(spec, others)
    carry = _Across(exchanges, None if later is None else later[1][-1:].fast, place.before >= spec.chunk)
    q, pending, own = first.q.to(call.state.dtype), tokens.span(0, earlier), first.tokens.span(earlier, len(first.tokens))
    output, fast, rest = segment(spec, spec.chunk, q, own, first.state.fast, pending, carry)
    return _together((output, State.of(spec, fast, rest, len(rest))), later)


class _Across:
    """A `Carry` by exclusive scans across ranks.

    Args:
        exchanges: those of this call.
        last: the weights after this rank's last document, where that is another than its first.
        renormalizes: the first document has completed chunks on earlier ranks.
    """

    def __init__(self, exchanges: Exchanges, last: FastWeights | None, renormalizes: bool) -> None:
        self.exchanges, self.last, self.renormalizes = exchanges, last, renormalizes

    def momentum(self, gates: Tensor, writes: Tensor, start: Tensor) -> Tensor:
        """The momentum before each chunk, from what came over from the ranks before: `Carry.momentum`."""
        return self._enter(gates, writes, start, None if self.last is None else self.last.momentum["out"])

    def state(self, gates: Tensor | None, writes: Tensor, start: Tensor, meanwhile: Callable[[], None] | None) -> Tensor:
        """The state before each chunk, from what came over from the ranks before: `Carry.state`."""
        end = None if self.last is None else self.last.accumulated.get("out", self.last.weights["out"])
        return self._enter(gates, writes, start, end, meanwhile)

    def _enter(
        self,
        gates: Tensor | None,
        writes: Tensor,
        start: Tensor,
        end: Tensor | None,
        meanwhile: Callable[[], None] | None = None,
    ) -> Tensor:
        reach = start.new_ones(start.shape[:2]) if gates is None else product_of(gates)
        continues = self.exchanges.shard.here.before > 0
        if end is None:
            end = writes.sum(2) if gates is None else torch.einsum("bhn,bhnij->bhij", products_after(gates), writes)
            if not continues:
                end = end + reach[..., None, None] * start
        incoming = self.exchanges.prefix(end.flatten(2).unsqueeze(2), reach[..., None, None], meanwhile)
        return incoming.reshape(start.shape) if continues else start


def _blockwise(
    spec: InnerLoop, call: Operands, tokens: Tokens, earlier: int, exchanges: Exchanges, run: Engine
) -> tuple[Tensor, State]:
    """Where writes add up: what the last document's complete spans do to its state, then the ordinary forms."""
    place = exchanges.shard.here
    assert spec.span is not None
    opened = place.bounds[-2]
    alone = len(place.bounds) == 2
    last = tokens if alone else tokens.span(earlier + spec.writes * opened, len(tokens))
    fast = (call.state if call.cu_seqlens is None else call.state[-1:]).fast
    end, reach = block_summary(spec, last.span(0, len(last) // spec.span * spec.span), fast)
    start = stacked(spec, fast)
    if not (alone and place.before):
        end = end + reach @ start
    incoming = exchanges.prefix(end, reach)
    state = call.state
    if place.before:
        first = state if call.cu_seqlens is None else state[:1]
        goes_on = State.of(spec, unstacked(spec, incoming, first.fast), tokens.span(0, earlier), earlier)
        state = goes_on if state.batch == goes_on.batch else State.cat([goes_on, _roomy(spec, state[1:], tokens)])
    return run(spec, replace(call, state=state))
