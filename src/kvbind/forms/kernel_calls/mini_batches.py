"""Mini-batches of one layer (TTT-Linear) on the kernel that runs them whole, and what is left of a call in PyTorch."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kvbind.forms.finite import guarded
from kvbind.forms.spanwise import in_spans
from kvbind.forms.state import State
from kvbind.forms.tokens import Tokens
from kvbind.forms.validation import Operands
from kvbind.inner.head import LayerNormHead
from kvbind.inner.rule import FastWeights
from kvbind.inner.spec import InnerLoop


def run_mini_batches(spec: InnerLoop, call: Operands) -> tuple[Tensor, State]:
    """What `kvbind.forms.spanwise.in_spans` returns, for a call that `fits`, outputs in q's dtype."""
    assert isinstance(spec.refresh, int)
    state, pending = call.state, call.state.pending()
    earlier = 0 if pending is None else len(pending)
    joined = call.tokens if pending is None else pending.append(call.tokens)
    # pending tokens were read in an earlier call: zeros keep their places, and what they read is dropped
    q = F.pad(call.q, (0, 0, earlier, 0))
    total = len(joined)
    whole = total // spec.refresh * spec.refresh
    output, fast = _whole(spec, spec.refresh, q[:, :, :whole], joined.span(0, whole), state.fast)
    after = State.of(spec, fast, joined.span(whole, total), total - whole)
    if whole < total:
        begun = State.of(spec, fast, None, 0)
        rest, after = guarded(in_spans, spec, q[:, :, whole:].to(state.dtype), joined.span(whole, total), begun)
        output = torch.cat((output, rest.to(output.dtype)), dim=2)
    return output[:, :, earlier:], after


def _whole(spec: InnerLoop, size: int, q: Tensor, tokens: Tokens, fast: FastWeights) -> tuple[Tensor, FastWeights]:
    """Outputs of whole spans of `size` tokens, and the fast weights behind them."""
    from kvbind.kernels.mini_batches.operator import mini_batches

    step = tokens.gates["step_rate"] if spec.step_rate else 1.0

    def tokens_first(x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous()

    def rates(name: str) -> Tensor:
        rate = tokens.rates[name] * (step * spec.sign)
        if not isinstance(rate, Tensor):
            rate = torch.full(q.shape[:3], rate, device=q.device)
        return tokens_first(rate.float())

    weights, biased = fast.weights, spec.network.has_bias
    own = biased and tokens.rates["out.bias"] is not tokens.rates["out"]
    head = spec.network.output_head or LayerNormHead(residual=False)
    gamma, beta = (weights[name].squeeze(-2) if spec.network.output_head else None for name in ("gamma", "beta"))
    output, matrix, bias = mini_batches(
        tokens_first(q),
        tokens_first(tokens.k),
        tokens_first(tokens.v),
        weights["out"],
        rates("out"),
        size=size,
        bias=weights["out.bias"].squeeze(-2) if biased else None,
        bias_rates=rates("out.bias") if own else None,
        read_rate=tokens_first(tokens.gates["read_rate"].float()) if spec.read_rate else None,
        gamma=gamma,
        beta=beta,
        eps=head.eps,
        squared=spec.loss == "squared",
        in_loss=head.where != "read",
        in_read=head.where != "loss",
        residual=head.residual,
    )
    after = {"out": matrix} | ({} if bias is None else {"out.bias": bias.unsqueeze(-2)})
    return output.transpose(1, 2), replace(fast, weights=dict(weights) | after)
