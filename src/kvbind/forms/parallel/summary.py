"""What a span of tokens does to the state where writes add up: an affine map, found without reading any output.

Stack the last layer `S` and, with momentum, the buffer `D` into `X`. Over complete chunks, `X_end = P X_start + E`:

- dot product: `P` is a number for each pair of parts, a product of gates, and `E` sums `phi(k)^T lr v` with such products
  as weights;
- squared error (the delta rule), and whatever has fields beyond the six lines: `P` is a matrix on the features. The rule is
  linear in values and state together, so one run with values `[v, 0]` from the state `[0, I]` ends in `[E, P]`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvbind.forms.parallel.blockwise import advance
from kvbind.forms.parallel.scan import linear_scan, product_of, products_after
from kvbind.forms.tokens import Tokens
from kvbind.inner.gates import decays
from kvbind.inner.network import gated
from kvbind.inner.rule import FastWeights
from kvbind.inner.spec import InnerLoop


def is_dense(spec: InnerLoop) -> bool:
    """Whether `P` is a matrix on the features."""
    return spec.loss == "squared" or bool(spec.extensions)


def stacked(spec: InnerLoop, fast: FastWeights) -> Tensor:
    """`X`: `[B, H, 1 or 2, F Dv]`, or `[B, H, F or 2 F, Dv]` where `P` is a matrix on the features."""
    parts = [fast.weights["out"], *fast.momentum.values()]
    if is_dense(spec):
        return torch.cat(parts, dim=2)
    return torch.stack([x.flatten(2) for x in parts], dim=2)


def unstacked(spec: InnerLoop, x: Tensor, fast: FastWeights) -> FastWeights:
    """`fast` with the last layer and the buffer that `stacked` made one."""
    shape = fast.weights["out"].shape
    count = 1 + bool(spec.momentum)
    parts = x.chunk(count, dim=2) if is_dense(spec) else [part.reshape(shape) for part in x.unbind(2)]
    return FastWeights(dict(fast.weights) | {"out": parts[0]}, {"out": parts[1]} if spec.momentum else {}, fast.norms)


def block_summary(spec: InnerLoop, tokens: Tokens, fast: FastWeights) -> tuple[Tensor, Tensor]:
    """`E` and `P` of tokens that are complete chunks.

    Args:
        spec: an inner loop whose parallel form is blockwise.
        tokens: whole chunks, or none.
        fast: the fast weights, whose features do not change.

    Returns:
        `E` as `stacked` has it, and `P`, square, of as many rows.
    """
    return (_dense_summary if is_dense(spec) else _dot_summary)(spec, tokens, fast)


def _dot_summary(spec: InnerLoop, tokens: Tokens, fast: FastWeights) -> tuple[Tensor, Tensor]:
    out, weights, network = fast.weights["out"], fast.weights, spec.network
    assert spec.chunk is not None
    count = len(tokens) // spec.chunk
    ones = out.new_ones(*out.shape[:2], count)

    def per_chunk(gate: Tensor | None) -> Tensor:
        return ones if gate is None else gate.unflatten(2, (count, spec.chunk)).mean(-1)

    momentum, decay = (per_chunk(gate) for gate in decays(tokens.gates))
    in_state = products_after(decay)
    rows = [[product_of(decay)]]
    shares = [in_state]
    if spec.momentum:
        # a write stays in the buffer, from where each later chunk adds it to the state once more
        behind = F.pad(momentum[..., 1:], (0, 1)) if count else momentum
        start = in_state.new_zeros(*in_state.shape[:2], 1)
        in_state = linear_scan(behind.flip(-1), in_state.flip(-1)[..., None], start).squeeze(-1).flip(-1)
        of_buffer = (momentum * in_state)[..., :1].sum(-1)
        rows = [[rows[0][0], spec.sign * of_buffer], [torch.zeros_like(of_buffer), product_of(momentum)]]
        shares = [in_state, products_after(momentum)]
    reach = torch.stack([torch.stack(row, -1) for row in rows], -2)

    k, v = tokens.k.to(out.dtype), tokens.v.to(out.dtype)
    features = network.features(weights, k)
    g = tokens.column_rates()["out"] * gated(network.gate(weights, k), v)
    ends = []
    for share, sign in zip(shares, (spec.sign, 1), strict=False):
        weight = share.repeat_interleave(spec.chunk, dim=-1)
        ends.append((sign * (features * weight[..., None]).mT @ g).flatten(2))
    return torch.stack(ends, 2), reach


def _dense_summary(spec: InnerLoop, tokens: Tokens, fast: FastWeights) -> tuple[Tensor, Tensor]:
    out = fast.weights["out"]
    width, parts = out.shape[-2], 1 + bool(spec.momentum)
    eye = torch.eye(width * parts, dtype=out.dtype, device=out.device).expand(*out.shape[:2], -1, -1)
    # columns: those of E, then of P
    start = torch.cat((torch.zeros_like(out).repeat(1, 1, parts, 1), eye), dim=3)
    values = F.pad(tokens.v, (0, width * parts))
    begun = unstacked(spec, start, FastWeights(fast.weights, {}, {}))
    end = advance(spec, Tokens(tokens.k, values, tokens.rates, tokens.gates), begun)
    x = stacked(spec, end)
    return x[..., : out.shape[-1]], x[..., out.shape[-1] :]
