"""Calls of `ttt` like earlier ones, which go straight to their launches.

What a call may be and what runs it depend on its inner loop and on shapes, strides and dtypes, not on numbers. The first
call of a kind is checked and analysed as any other; if its kernels can be planned (`kvbind.kernels.equal_chunks`, and under
token visibility `causal` and `affine`), the plan is kept under all that it depended on, and later calls look it up.
A call like the last one of its inner loop is told by PyTorch's own guards, which take a tenth of the time of a key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial, reduce
from operator import or_
from os import environ
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


class Last(NamedTuple):
    """The last call of an inner loop that something planned ran.

    Attributes:
        kind: its kind.
        form: the one that it asked for.
        switches: what the environment said of kernels.
        named: names of its weights, gates and rates.
        rate: 1 or `float` for a rate that is a number, else None.
        check: whether tensors are like its own in type, shape, strides, dtype, device and `requires_grad`, and seen by the
            same parts of PyTorch: none that traces, transforms or casts them.
    """

    kind: Kind
    form: str
    switches: tuple[Any, Any]
    named: Key
    rate: Any
    check: Callable[..., bool]


_kinds: dict[Key, Kind] = {}
_plans: dict[Key, Planned | PlannedByToken] = {}
"""By the inner loop itself in place of its identity."""
_last: dict[int, Last] = {}
"""By the identity of the inner loop."""

# not of PyTorch's public interface: where it is missing, every call is looked up by its key
_Guards: Any = getattr(getattr(getattr(torch._C, "_dynamo", None), "guards", None), "TensorGuards", None)

K = TypeVar("K")
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
        self.heads, self.nothing, self.reads_keys = q.shape[2], (0,) * q.shape[0], spec.query == "key"
        # tokens like the call's without keeping them, for states with none pending
        self.none = call.tokens.map(lambda x: x[:, :, :0].detach().clone())
        rates = as_rates(rate_of(lr), k)
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
        rate = rate_of(lr)
        output, end, velocity = self.plan.run(
            k if self.reads_keys else q, k, v, as_rates(rate, k), *decays(gates),
            weights["out"] if self.dense else self._start(weights), [weights[name] for name in self.theta],
        )  # fmt: skip
        if self.reads_keys:
            output = output.to(q.dtype)
        if self.rest:
            # made at once, as the call's tensors may be written over
            each = rate.transpose(1, 2) if isinstance(rate, Tensor) else float(rate)
            kept = {name: gates[name].transpose(1, 2).float() for name in self.spec.gates}
            tokens = Tokens(k.transpose(1, 2), v.transpose(1, 2), {"out": each}, kept)
            return output, self._state(weights, end, velocity, tokens.span(len(tokens) - self.rest, len(tokens)))
        # those of the call: who called may put others in their places, or write over them
        kept = {name: x if (x := weights[name]).dtype == torch.float32 else x.float() for name in self.theta}
        later = Deferred(partial(self._tensors, kept, end, velocity, torch.is_grad_enabled()))
        return output, State(self.spec, later, self.nothing)

    def _state(self, weights: Mapping[str, Tensor], end: Tensor, velocity: Tensor | None, pending: Tokens) -> State:
        kept = {name: weights[name].float().expand(self.batch, self.heads, -1, -1) for name in self.theta}
        moved = {} if velocity is None else {"out": velocity}
        return State.of(self.spec, FastWeights(kept | {"out": end}, moved, {}), pending, self.rest)

    def _tensors(
        self, weights: Mapping[str, Tensor], end: Tensor, velocity: Tensor | None, differentiated: bool
    ) -> Mapping[str, Tensor]:
        """Those of the state, made as they would have been in the call."""
        with torch.inference_mode(False), torch.set_grad_enabled(differentiated):
            return self._state(weights, end, velocity, self.none).tensors


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
        rate, start = rate_of(lr), weights["out"].float()
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


def rate_of(lr: LearningRate) -> Tensor | float:
    """That of the one matrix that is updated."""
    if isinstance(lr, Tensor) or type(lr) is float:
        return lr
    return lr["out"] if isinstance(lr, Mapping) else lr


def as_rates(rate: Tensor | float, k: Tensor) -> Tensor | None:
    """A rate as launches take it, float32 `[B, T, H]`, or None for 1."""
    if isinstance(rate, Tensor):
        return rate
    return None if rate == 1 else torch.full((), float(rate), dtype=torch.float32, device=k.device).expand(k.shape[:3])


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
    # how many weights there are tells their names from those of gates
    key: list[Any] = [id(spec), form, *_switches(), len(weights), *weights, *gates]
    try:
        for x in (q, k, v, *weights.values(), *gates.values(), *rates):
            if isinstance(x, Tensor):
                # kernels read memory, where numbers of a negated view have the other sign
                if type(x) not in tracing.PLAIN or x.is_neg():
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


def again(
    spec: InnerLoop,
    weights: Mapping[str, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: LearningRate,
    gates: Mapping[str, Tensor],
    form: str,
) -> Planned | PlannedByToken | None:
    """What runs a call like the last one of its inner loop, if that was planned; None for all others."""
    last = _last.get(id(spec))
    if last is None or type(weights) is not dict or last.form != form or last.switches != _switches():
        return None
    named, rate, tensors = _told(weights, q, k, v, lr, gates)
    if named != last.named or rate != last.rate or not last.check(*tensors) or not _aligned(tensors):
        return None
    return last.kind.planned


def remember(
    kind: Kind, weights: Mapping[str, Tensor], q: Tensor, k: Tensor, v: Tensor, lr: LearningRate, gates: Any, form: str
) -> None:
    """Let calls like this one, of a kind that is planned, be known by `again`."""
    named, rate, tensors = _told(weights, q, k, v, lr, gates)
    if _Guards is None or not all(isinstance(x, Tensor) for x in tensors) or not _aligned(tensors):
        return
    shapes, strides = [list(x.shape) for x in tensors], [list(x.stride()) for x in tensors]
    guards = _Guards(*tensors, dynamic_dims_sizes=shapes, dynamic_dims_strides=strides)
    _kept(_last, id(kind.spec), Last(kind, form, _switches(), named, rate, guards.check))


def _told(
    weights: Mapping[str, Tensor], q: Tensor, k: Tensor, v: Tensor, lr: LearningRate, gates: Mapping[str, Tensor]
) -> tuple[Key, Any, tuple[Any, ...]]:
    """Names of a call's tensors and how many of them are weights, what its rate is if a number, and the tensors."""
    number: Any = lr
    named: Key = (len(weights), *weights, *gates)
    rate: Any = None
    rates: tuple[Any, ...] = (lr,)
    if type(lr) is dict:
        named, rates = (*named, None, *lr), (*lr.values(),)
    # no bool, which is an int too
    elif type(lr) in (int, float) and abs(number) <= LARGEST:
        rate, rates = 1 if number == 1 else float, ()
    return named, rate, (q, k, v, *weights.values(), *gates.values(), *rates)


# what `environ` keeps, as it keeps it: of a variable that is not set, asking itself takes two exceptions
_variables: Mapping[Any, Any] = getattr(environ, "_data", environ)
_encoded = environ.encodekey if _variables is not environ else str
_KERNELS, _FLA = _encoded("KVBIND_KERNELS"), _encoded("KVBIND_FLA")


def _switches() -> tuple[Any, Any]:
    """What the environment says of kernels."""
    return _variables.get(_KERNELS), _variables.get(_FLA)


def _aligned(tensors: Iterable[Tensor]) -> bool:
    """Whether all addresses are as those of a fetch must be."""
    return not reduce(or_, map(Tensor.data_ptr, tensors)) % 16


def straight(q: Tensor) -> bool:
    """Whether values of operands are not checked, so that all that is checked of a call is in its key."""
    return q.is_cuda


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


def _kept(known: dict[K, T], key: K, new: T) -> T:
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
    rate = rate_of(lr)
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
    rate = rate_of(lr)
    if isinstance(rate, Tensor) and rate.dim() != 3:
        return None
    return dispatch.own_engine(spec, call, "parallel")
