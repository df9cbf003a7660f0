"""Calls of `kvbind.kernels.causal`: attention to single tokens, or inside short chunks."""

from __future__ import annotations

import torch
from torch import Tensor

from kvbind.forms.on_kernels.kernel_calls.operands import glu_operands, rate_column, state_after
from kvbind.forms.state import State
from kvbind.forms.validation import Operands
from kvbind.inner.gates import decays
from kvbind.inner.network import gated
from kvbind.inner.rule import FastWeights
from kvbind.inner.spec import InnerLoop


def run_causal(spec: InnerLoop, call: Operands) -> tuple[Tensor, State]:
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
    output_gate, gated_tokens = glu_operands(spec.network, fast, q, tokens)
    rates, (_, decay) = rate_column(tokens.rates["out"], tokens), decays(tokens.gates)
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
    return gated(output_gate, output.transpose(1, 2)), state_after(spec, after, tokens, counts, (0,) * len(counts), None)
