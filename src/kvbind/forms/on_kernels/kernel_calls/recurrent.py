"""Calls of `kvbind.kernels.recurrent`: an update of every matrix, chunk after chunk, or one from all tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from kvbind.forms.on_kernels.kernel_calls.chunked import read_network
from kvbind.forms.on_kernels.kernel_calls.operands import heads_last, of_each_token, rate_column
from kvbind.forms.recurrent import recurrent
from kvbind.forms.state import State
from kvbind.forms.tokens import Tokens
from kvbind.forms.validation import Operands
from kvbind.inner.gates import decays
from kvbind.inner.rule import FastWeights
from kvbind.inner.spec import InnerLoop


def run_recurrent(spec: InnerLoop, call: Operands) -> tuple[Tensor, State]:
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
    earlier = 0 if pending is None else len(pending)
    if earlier:
        # the chunk's earlier queries were answered in earlier calls
        q = torch.cat((q.new_zeros(*q.shape[:2], earlier, q.shape[3]), q), dim=2)
    whole = len(joined) // spec.chunk * spec.chunk
    output, after = recurrent_chunks(spec, q[:, :, :whole], joined.span(0, whole), call.state.fast, spec.chunk)
    rest = joined.span(whole, len(joined))
    if not len(rest):
        return output[:, :, earlier:], State.of(spec, after, rest, 0)
    start = State.of(spec, after, None, 0)
    last, state = recurrent(spec, q[:, :, whole:].to(start.dtype), rest, start)
    return torch.cat((output[:, :, earlier:], last.to(output.dtype)), dim=2), state


def run_full_recurrent(spec: InnerLoop, call: Operands) -> tuple[Tensor, State]:
    """One update of every matrix from all tokens that write, and a read by all queries, on kernels.

    Args:
        spec: an inner loop under `visibility="full"` that `recurrent_fits`.
        call: its operands.

    Returns:
        Outputs `[B, H, T, Dv]`, and the state after this call.
    """
    q, count = call.q, len(call.tokens)
    first, after = recurrent_chunks(spec, q[:, :, :count], call.tokens, call.state.fast, count)
    if q.shape[2] == count:
        return first, State.of(spec, after, None, 0)
    last = read_network(spec.network, after, q[:, :, count:])
    return torch.cat((first, last), dim=2), State.of(spec, after, None, 0)


def recurrent_chunks(
    spec: InnerLoop, q: Tensor, tokens: Tokens, fast: FastWeights, chunk: int
) -> tuple[Tensor, FastWeights]:
    """Whole chunks of the recurrent form on kernels; queries `[B, H, T, Dk]` of as many tokens, or of fewer."""
    from kvbind.kernels.recurrent.operator import recurrent_swiglu

    missing = len(tokens) - q.shape[2]
    padded = torch.cat((q, q.new_zeros(*q.shape[:2], missing, q.shape[3])), dim=2) if missing else q
    weights, updated = fast.weights, spec.updated

    def per_chunk(gate: Tensor | None) -> Tensor | None:
        return None if gate is None else gate.unflatten(2, (-1, chunk)).mean(3)

    rates: dict[str, Tensor] = {}
    for name in updated:
        rate = rate_column(tokens.rates[name], tokens)
        rates[name] = heads_last(of_each_token(1.0 if rate is None else rate, tokens)).contiguous()
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
