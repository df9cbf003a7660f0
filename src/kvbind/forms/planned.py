"""Calls of `ttt` like earlier ones, which go straight to their launches.

What a call may be and what runs it depend on its inner loop and on shapes, strides and dtypes, not on numbers. The first
call of a kind is checked and analysed as any other; if its kernels can be planned (`kvbind.kernels.equal_chunks`), the plan
is kept under all that it depended on, and later calls look it up.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvbind.forms import fused
from kvbind.forms.state import Deferred, State
from kvbind.forms.tokens import Tokens
from kvbind.forms.validation import LearningRate, Operands
from kvbind.inner.networks import GLU
from kvbind.inner.rule import FastWeights
from kvbind.inner.spec import InnerLoop
from kvbind.kernels import direct
from kvbind.kernels.common import runs_on

MOST = 256
"""Kinds of calls that are remembered; more come about where every call has a length of its own."""

Key = tuple[Any, ...]


class Kind(NamedTuple):
    """What is known of a kind of calls.

    Attributes:
        spec: the inner loop, held so that its identity, which keys have, stays its own.
        planned: what runs them, or None where nothing planned does.
    """

    spec: InnerLoop
    planned: Planned | None


_kinds: dict[Key, Kind] = {}


class Planned:
    """What runs calls of one kind.

    Args:
        spec: the inner loop.
        call: a checked call of this kind.
        lr: its rates as they were given.
        weights: its weights as they were given.
    """

    def __init__(self, spec: InnerLoop, call: Operands, lr: LearningRate, weights: Mapping[str, Tensor]) -> None:
        from kvbind.kernels.equal_chunks import Plan, Shapes
        from kvbind.kernels.tma_products import Rows, Theta

        assert spec.chunk is not None
        q, k, v = (x.transpose(1, 2) for x in (call.q, call.tokens.k, call.tokens.v))
        self.spec, self.theta = spec, tuple(spec.network.theta)
        self.batch, self.rest = q.shape[0], q.shape[1] % spec.chunk
        rate = lr["out"] if isinstance(lr, Mapping) else lr
        self.constant = None
        if not isinstance(rate, Tensor) and rate != 1:
            self.constant = torch.full((), float(rate), device=q.device).expand(q.shape[:3])
            rate = self.constant
        # the others are cast where they are joined
        start, theta = weights["out"], None
        self.dense = start.dtype == torch.float32 and fused.dense(start) is start and start.data_ptr() % 16 == 0
        start = self._start(weights)
        if self.theta:
            first = weights[self.theta[0]]
            sets = first.shape[0] if first.dim() == 4 else 1
            theta = Theta(len(self.theta), sets, first.shape[-1], fused.activation_of(spec.network))
        strides = (start.stride(0), start.stride(1)) if start.dim() == 4 else (0, start.stride(0))
        muon = spec.orthogonalize
        self.plan = Plan(
            Shapes(
                Rows.of(q), Rows.of(k), Rows.of(v), spec.chunk, spec.visibility != "past", spec.sign, theta, strides,
                rate.stride() if isinstance(rate, Tensor) else None, spec.momentum, bool(spec.retention),
                tuple((a, b, c) for a, b, c in muon.coefficients) if muon else (), muon.dtype if muon else torch.bfloat16,
            ),
            q,
        )  # fmt: skip

    def _start(self, weights: Mapping[str, Tensor]) -> Tensor:
        """The last layer in float32, each matrix in one piece."""
        start = weights["out"]
        return start if self.dense else start.float().contiguous()

    def __call__(
        self,
        weights: Mapping[str, Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lr: LearningRate,
        momentum: Tensor | None,
        retention: Tensor | None,
    ) -> tuple[Tensor, State]:
        """What `ttt` returns."""
        rate = lr["out"] if isinstance(lr, Mapping) else lr
        rates = rate if isinstance(rate, Tensor) else self.constant
        read = k if self.spec.query == "key" else q
        theta = [weights[name] for name in self.theta]
        output, end, velocity = self.plan.run(read, k, v, rates, momentum, retention, self._start(weights), theta)
        batch, rest = self.batch, self.rest

        def tensors() -> Mapping[str, Tensor]:
            heads = k.shape[2]
            kept = {name: x.float().expand(batch, heads, *x.shape[-2:]) for name, x in weights.items() if name != "out"}
            moved = {} if velocity is None else {"out": velocity}
            after = FastWeights(kept | {"out": end}, moved, {})
            each = rates if rates is not None else rate
            turned = each.transpose(1, 2) if isinstance(each, Tensor) else float(each)
            gates = (None if x is None else x.transpose(1, 2) for x in (momentum, retention))
            tokens = Tokens(k.transpose(1, 2), v.transpose(1, 2), {"out": turned}, *gates)
            pending = tokens.span(len(tokens) - rest, len(tokens)) if rest else tokens
            return State.of(self.spec, after, pending, rest).tensors

        return output, State(self.spec, Deferred(tensors), (rest,) * batch)


def key_of(
    spec: InnerLoop,
    weights: Mapping[str, Tensor] | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: LearningRate,
    momentum: Tensor | None,
    retention: Tensor | None,
    form: str,
) -> Key | None:
    """All that the handling of a call depends on, or None where it cannot be told from outside.

    Weights' names come in the order in which they were given.
    """
    if type(weights) is not dict:
        return None
    if type(lr) is dict:
        rates: tuple[Any, ...] = (*lr, *lr.values())
    else:
        rates = (lr,)
    key: list[Any] = [id(spec), form, os.environ.get("KVBIND_KERNELS"), *weights]
    for x in (q, k, v, *weights.values(), momentum, retention, *rates):
        if isinstance(x, Tensor):
            if type(x) not in direct.PLAIN:
                return None
            # float32 operands besides the tokens are taken by address, which must be aligned
            key += (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16)
        elif x is None or type(x) in (int, float, str):
            key.append(x)
        else:
            return None
    return tuple(key)


def known(key: Key | None) -> Kind | None:
    """What is known of a kind of calls."""
    return None if key is None else _kinds.get(key)


def learn(key: Key, spec: InnerLoop, call: Operands, lr: LearningRate, weights: Mapping[str, Tensor], form: str) -> Kind:
    """Find what runs a kind of calls, of which `call` is a checked one, and remember it."""
    if len(_kinds) >= MOST:
        _kinds.clear()
    kind = Kind(spec, Planned(spec, call, lr, weights) if can_plan(spec, call, lr, weights, form) else None)
    _kinds[key] = kind
    return kind


def can_plan(spec: InnerLoop, call: Operands, lr: LearningRate, weights: Mapping[str, Tensor], form: str) -> bool:
    """Whether a call runs in the parallel form on whole chunks of equal length, by products that take its operands."""
    q, k, v = (x.transpose(1, 2) for x in (call.q, call.tokens.k, call.tokens.v))
    if spec.chunk is None or q.shape[1] < spec.chunk or not runs_on(q.device) or not fused.operands_fit(call):
        return False
    if form == "recurrent" or (form == "auto" and q.shape[1] == spec.chunk) or not fused.wide_enough(call):
        return False
    if spec.visibility not in ("past", "chunk") or not fused.chunked_fits(spec) or isinstance(spec.network, GLU):
        return False
    if spec.visibility == "chunk" and q.shape[1] % spec.chunk:
        return False
    rate = lr["out"] if isinstance(lr, Mapping) else lr
    if isinstance(rate, Tensor) and (rate.dtype != torch.float32 or rate.data_ptr() % 16 or rate.dim() != 3):
        return False
    from kvbind.kernels.tma_products import DEPTH, fits

    start = weights["out"]
    return (
        fits(spec.chunk, q, k, v) and start.shape[-1] % 16 == 0 and (not spec.network.theta or start.shape[-2] % DEPTH == 0)
    )
