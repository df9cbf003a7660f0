"""Calls of `ttt` like earlier ones, which go straight to their launches.

What a call may be and what runs it depend on its inner loop and on shapes, strides and dtypes, not on numbers. The first
call of a kind is checked and analysed as any other; if its kernels can be planned (`kvbind.kernels.equal_chunks`, and under
token visibility `causal` and `affine`), the plan is kept under all that it depended on, and later calls look it up.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from kvbind.forms.on_kernels import dispatch, fla
from kvbind.forms.on_kernels.kernel_calls.causal import run_causal
from kvbind.forms.on_kernels.kernel_calls.operands import activation_of, contiguous_matrices
from kvbind.forms.state import Deferred, State
from kvbind.forms.tokens import Tokens
from kvbind.forms.validation import Engine, LearningRate, Operands, PerToken
from kvbind.inner.gates import decays
from kvbind.inner.networks import GLU
from kvbind.inner.rule import FastWeights
from kvbind.inner.spec import InnerLoop
from kvbind.kernels.common import tracing
from kvbind.kernels.common.devices import runs_on

LARGEST = torch.finfo(torch.float32).max
"""Rates beyond it are refused where states are in float32."""

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
    planned: Planned | PlannedByToken | None


_kinds: dict[Key, Kind] = {}
_plans: dict[Key, Planned | PlannedByToken] = {}
"""By the inner loop itself in place of its identity."""

T = TypeVar("T")


class Planned:
    """What runs calls of one kind.

    Args:
        spec: the inner loop.
        call: a checked call of this kind.
        lr: its rates as they were given.
        weights: its weights as they were given.
    """

    def __init__(self, spec: InnerLoop, call: Operands, lr: LearningRate, weights: Mapping[str, Tensor]) -> None:
        from kvbind.kernels.equal_chunks.call_shapes import CallShapes
        from kvbind.kernels.equal_chunks.operator import LaunchPlan
        from kvbind.kernels.equal_chunks.tma_products import Theta, TokenRows

        assert spec.chunk is not None
        q, k, v = (x.transpose(1, 2) for x in (call.q, call.tokens.k, call.tokens.v))
        self.spec, self.theta = spec, tuple(spec.network.theta)
        self.batch, self.rest = q.shape[0], q.shape[1] % spec.chunk
        self.heads = q.shape[2]
        # tokens like the call's without keeping them, for states with none pending
        self.none = call.tokens.map(lambda x: x[:, :, :0].detach().clone())
        rates = as_rates(lr["out"] if isinstance(lr, Mapping) else lr, k)
        theta = None
        # the others are cast where they are joined
        start = weights["out"]
        self.dense = start.dtype == torch.float32 and contiguous_matrices(start) is start and start.data_ptr() % 16 == 0
        start = self._start(weights)
        if self.theta:
            first = weights[self.theta[0]]
            sets = first.shape[0] if first.dim() == 4 else 1
            theta = Theta(len(self.theta), sets, first.shape[-1], activation_of(spec.network))
        strides = (start.stride(0), start.stride(1)) if start.dim() == 4 else (0, start.stride(0))
        muon, (momentum, decay) = spec.orthogonalize, decays(spec.gates)
        self.plan = LaunchPlan(
            CallShapes(
                TokenRows.of(q), TokenRows.of(k), TokenRows.of(v),
                spec.chunk, spec.visibility != "past", spec.sign, theta, strides,
                None if rates is None else rates.stride(), momentum is not None, decay is not None,
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
        gates: Mapping[str, Tensor],
    ) -> tuple[Tensor, State]:
        """What `ttt` returns."""
        rate = lr["out"] if isinstance(lr, Mapping) else lr
        rates = as_rates(rate, k)
        read = k if self.spec.query == "key" else q
        theta = [weights[name] for name in self.theta]
        output, end, velocity = self.plan.run(read, k, v, rates, *decays(gates), self._start(weights), theta)
        if output.dtype != q.dtype:
            output = output.to(q.dtype)
        moved = {} if velocity is None else {"out": velocity}

        def state(pending: Tokens) -> State:
            kept = {name: weights[name].float().expand(self.batch, self.heads, -1, -1) for name in self.theta}
            return State.of(self.spec, FastWeights(kept | {"out": end}, moved, {}), pending, self.rest)

        if self.rest:
            # made at once, as the call's tensors may be written over
            each = rate.transpose(1, 2) if isinstance(rate, Tensor) else float(rate)
            kept = {name: gates[name].transpose(1, 2).float() for name in self.spec.gates}
            tokens = Tokens(k.transpose(1, 2), v.transpose(1, 2), {"out": each}, kept)
            return output, state(tokens.span(len(tokens) - self.rest, len(tokens)))
        differentiated = torch.is_grad_enabled()

        def tensors() -> Mapping[str, Tensor]:
            with torch.inference_mode(False), torch.set_grad_enabled(differentiated):
                return state(self.none).tensors

        return output, State(self.spec, Deferred(tensors), (0,) * self.batch)


class PlannedByToken:
    """What runs calls of one kind under token visibility: the engine that the table of kernels has for them, without checks.

    Args:
        spec: an inner loop of one matrix that each token writes once.
        engine: of such a call.
    """

    def __init__(self, spec: InnerLoop, engine: Engine) -> None:
        self.spec, self.engine, self.attention = spec, engine, None
        if engine is run_causal:
            from kvbind.kernels.causal.operator import unchecked

            self.attention = unchecked

    def __call__(
        self,
        weights: Mapping[str, Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lr: LearningRate,
        gates: Mapping[str, Tensor],
    ) -> tuple[Tensor, State]:
        """What `ttt` returns."""
        rate, start = lr["out"] if isinstance(lr, Mapping) else lr, weights["out"].float()
        if start.dim() == 3:
            start = start.expand(q.shape[0], -1, -1, -1)
        if self.attention is not None:
            (_, decay), read = decays(gates), k if self.spec.query == "key" else q
            output, end = self.attention(read, k, v, as_rates(rate, k), decay, start, 1, "token", None, self.spec.sign, True)
            # between single tokens nothing is pending
            assert end is not None
            if output.dtype != q.dtype:
                output = output.to(q.dtype)
            return output, State(self.spec, {"weights.out": end}, (0,) * q.shape[0])
        each = rate.transpose(1, 2).float() if isinstance(rate, Tensor) else float(rate)
        kept = {name: gates[name].transpose(1, 2).float() for name in self.spec.gates}
        tokens = Tokens(k.transpose(1, 2), v.transpose(1, 2), {"out": each}, kept)
        state = State.of(self.spec, FastWeights({"out": start}, {}, {}), None, 0)
        read = (k if self.spec.query == "key" else q).transpose(1, 2)
        output, state = self.engine(self.spec, Operands(read, tokens, state, None))
        return output.transpose(1, 2).to(q.dtype), state


def as_rates(rate: Tensor | float, k: Tensor) -> Tensor | None:
    """A rate as launches take it, float32 `[B, T, H]`, or None for 1."""
    if isinstance(rate, Tensor):
        return rate
    return None if rate == 1 else torch.full((), float(rate), device=k.device).expand(k.shape[:3])


def key_of(
    spec: InnerLoop,
    weights: Mapping[str, Tensor] | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: LearningRate,
    gates: Mapping[str, PerToken],
    form: str,
) -> Key | None:
    """All that the handling of a call depends on, or None where it cannot be told from outside.

    Weights' names come in the order in which they were given. Of rates that are numbers it matters whether they are 1.
    """
    if type(weights) is not dict or type(form) is not str:
        return None
    # plans take a gate of each token
    if gates and not all(isinstance(gate, Tensor) and gate.dim() > 2 for gate in gates.values()):
        return None
    if type(lr) is dict:
        rates: tuple[Any, ...] = (*lr, *lr.values())
    else:
        rates = (lr,)
    switches = os.environ.get("KVBIND_KERNELS"), os.environ.get("KVBIND_FLA")
    # how many weights there are tells their names from those of gates
    key: list[Any] = [id(spec), form, *switches, len(weights), *weights, *gates]
    try:
        for x in (q, k, v, *weights.values(), *gates.values(), *rates):
            if isinstance(x, Tensor):
                if type(x) not in tracing.PLAIN:
                    return None
                # float32 operands besides the tokens are taken by address, which must be aligned
                key += (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16)
            elif x is None or type(x) is str:
                key.append(x)
            elif type(x) in (int, float) and abs(x) <= LARGEST:
                key.append(1 if x == 1 else float)
            else:
                return None
    except (RuntimeError, OverflowError):
        # neither sparse nor nested tensors have strides and addresses; an int may be too large for a float
        return None
    return tuple(key)


def known(key: Key | None) -> Kind | None:
    """What is known of a kind of calls."""
    return None if key is None else _kinds.get(key)


def learn(key: Key, spec: InnerLoop, call: Operands, lr: LearningRate, weights: Mapping[str, Tensor], form: str) -> Kind:
    """Find what runs a kind of calls, of which `call` is a checked one, and remember it."""
    # an inner loop that is made anew for every call has the plan of its equal
    same = (spec, *key[1:])
    planned = _plans.get(same)
    if planned is None and can_plan(spec, call, lr, weights, form):
        planned = _kept(_plans, same, Planned(spec, call, lr, weights))
    elif planned is None and (engine := engine_by_token(spec, call, lr, form)) is not None:
        planned = _kept(_plans, same, PlannedByToken(spec, engine))
    return _kept(_kinds, key, Kind(spec, planned))


def _kept(known: dict[Key, T], key: Key, new: T) -> T:
    if len(known) >= MOST:
        known.clear()
    known[key] = new
    return new


def can_plan(spec: InnerLoop, call: Operands, lr: LearningRate, weights: Mapping[str, Tensor], form: str) -> bool:
    """Whether a call runs in the parallel form on whole chunks of equal length, by products that take its operands."""
    q, k, v = (x.transpose(1, 2) for x in (call.q, call.tokens.k, call.tokens.v))
    if spec.chunk is None or q.shape[1] < spec.chunk or not runs_on(q.device) or not dispatch.fits_matrix_units(call):
        return False
    if form == "recurrent" or (form == "auto" and q.shape[1] == spec.chunk):
        return False
    if spec.visibility not in ("past", "chunk") or not dispatch.is_chunked(spec) or isinstance(spec.network, GLU):
        return False
    if spec.visibility == "chunk" and q.shape[1] % spec.chunk:
        return False
    rate = lr["out"] if isinstance(lr, Mapping) else lr
    if isinstance(rate, Tensor) and (rate.dtype != torch.float32 or rate.data_ptr() % 16 or rate.dim() != 3):
        return False
    if len({weights[name].shape for name in spec.network.theta}) > 1:
        return False
    from kvbind.kernels.equal_chunks.tma_products import DEPTH, fits

    start = weights["out"]
    return (
        fits(spec.chunk, q, k, v) and start.shape[-1] % 16 == 0 and (not spec.network.theta or start.shape[-2] % DEPTH == 0)
    )


def engine_by_token(spec: InnerLoop, call: Operands, lr: LearningRate, form: str) -> Engine | None:
    """What runs a call of several tokens, each of which writes once, if that is the library's own kernels and no others."""
    if spec.visibility != "token" or spec.chunk != 1 or spec.writes > 1 or isinstance(spec.network, GLU):
        return None
    # between renewals tokens are pending, and there may be more of a state than its matrix
    if spec.refresh not in (None, 1):
        return None
    if form not in ("auto", "parallel") or call.q.shape[2] < 2 or call.tokens.mask is not None or fla.considered():
        return None
    rate = lr["out"] if isinstance(lr, Mapping) else lr
    if isinstance(rate, Tensor) and rate.dim() != 3:
        return None
    return dispatch.own_engine(spec, call, "parallel")
