"""Mini-batches (TTT-Linear, TTT-MLP, Titans) on the kernel that runs them whole, and what is left of a call in PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvbind.forms.parallel.finite import guarded, seen_product
from kvbind.forms.parallel.scan import up_to
from kvbind.forms.parallel.spanwise import in_spans
from kvbind.forms.state import State
from kvbind.forms.tokens import Tokens
from kvbind.forms.validation import Operands
from kvbind.inner.head import LayerNormHead
from kvbind.inner.networks import MLP
from kvbind.inner.rule import FastWeights
from kvbind.inner.spec import InnerLoop


def run_mini_batches(spec: InnerLoop, call: Operands) -> tuple[Tensor, State]:
    """What `kvbind.forms.parallel.spanwise.in_spans` returns, for a call that `fits`, outputs in q's dtype."""
    assert isinstance(spec.refresh, int)
    state, pending = call.state, call.state.pending()
    earlier = 0 if pending is None else len(pending)
    joined = call.tokens if pending is None else pending.append(call.tokens)
    # pending tokens were read in an earlier call: zeros keep their places, and what they read is dropped
    q = F.pad(call.q, (0, 0, earlier, 0)) if earlier else call.q
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

    network, weights = spec.network, fast.weights
    # as the operator has them in one piece
    order = [name + kind for name in network.matrices for kind in (("", ".bias") if network.has_bias else ("",))]
    held = [weights[name] for name in order] + ([fast.momentum[name] for name in order] if spec.momentum else [])
    # what a buffer takes has neither sign nor step rate
    factor = 1.0 if spec.momentum else spec.sign * (tokens.gates["step_rate"] if spec.step_rate else 1.0)

    def tokens_first(x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous()

    def rates(names: Sequence[str]) -> list[Tensor]:
        found = (tokens.rates[name] * factor for name in names)
        return [x if isinstance(x, Tensor) else q.new_full(q.shape[:3], x, dtype=torch.float32) for x in found]

    biases = [f"{name}.bias" for name in network.matrices] if network.has_bias else []
    own = any(tokens.rates[name] is not tokens.rates[network.rate_of(name)] for name in biases)
    head = network.output_head or LayerNormHead(residual=False)
    output, state = mini_batches(
        tokens_first(q),
        tokens_first(tokens.k),
        tokens_first(tokens.v),
        torch.cat([x.flatten(2) for x in held], dim=-1) if len(held) > 1 else held[0].flatten(2),
        torch.stack(rates((*network.matrices, *(biases if own else ()))), dim=-1).float().transpose(1, 2),
        size=size,
        hidden=weights["out"].shape[-2] if network.theta else 0,
        activation=network.activation if isinstance(network, MLP) else "identity",
        bias=network.has_bias,
        shares=shares_of(spec, size, tokens),
        head=torch.cat([weights[name] for name in ("gamma", "beta")], dim=-2) if network.output_head else None,
        eps=head.eps,
        squared=spec.loss == "squared",
        in_loss=head.where != "read",
        in_read=head.where != "loss",
        residual=head.residual,
    )
    left = [x.view(like.shape) for x, like in zip(state.split([x[0, 0].numel() for x in held], -1), held, strict=True)]
    after = dict(zip(order, left, strict=False))
    momentum = dict(zip(order, left[len(order) :], strict=True)) if spec.momentum else {}
    return output.transpose(1, 2), replace(fast, weights=dict(weights) | after, momentum=momentum)


def shares_of(spec: InnerLoop, size: int, tokens: Tokens) -> Tensor | None:
    """What tokens see of their span's writes, of the state and of its buffer, as the operator takes it."""
    if spec.read_rate:
        return tokens.gates["read_rate"].float().transpose(1, 2).unsqueeze(-1)
    if not (spec.momentum or spec.retention):
        return None

    def spans(name: str) -> Tensor:
        return tokens.gates[name].float().unflatten(2, (-1, size))

    if not spec.momentum:
        on_state, keep = _products(spans("retention")).split((1, size), -1)
        return torch.cat((keep, on_state), dim=-1).flatten(2, 3).transpose(1, 2)
    momentum = spans("momentum")
    decay = spans("retention") if spec.retention else torch.ones_like(momentum)
    decays, chains = _products(torch.stack((decay, momentum))).unbind()
    (on_state, keep), (reach, chain) = decays.split((1, size), -1), chains.split((1, size), -1)
    entered = torch.cat((chain, reach), dim=-1)
    if spec.step_rate:
        entered = spans("step_rate")[..., None] * entered
    seen = spec.sign * seen_product(keep, entered, up_to(keep))
    columns = (seen[..., :-1], on_state, seen[..., -1:], chain[..., -1, :, None], reach)
    return torch.cat(columns, dim=-1).flatten(2, 3).transpose(1, 2)


class _Products(torch.autograd.Function):
    """Products of gates, gradients by products alone too; those of `cumprod` divide, and look for zeros on the host."""

    @staticmethod
    def forward(gates: Tensor) -> Tensor:
        size = gates.shape[-1]
        row, column = (torch.arange(n, device=gates.device) for n in (size, size + 1))
        row = row[:, None]
        made = torch.where(column <= row, gates[..., None], 1.0).cumprod(-2)
        return made.masked_fill(column > row + 1, 0.0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (made,) = ctx.saved_tensors
        begun = torch.zeros_like(made[..., :1, :])
        begun[..., 0] = 1.0
        before = torch.cat((begun, made[..., :-1, :]), dim=-2)
        return ((made[..., 1:].mT @ grad) * before).sum(-1)


def _products(gates: Tensor) -> Tensor:
    """Of gates `[..., n]` the products `[..., n, n + 1]`: of all up to t, then of those behind j up to t, 0 for j > t."""
    made: Tensor = _Products.apply(gates)
    return made
