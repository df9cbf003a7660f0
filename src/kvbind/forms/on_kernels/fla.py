"""Linear recurrences on flash-linear-attention's kernels, where that package is installed.

Its operators (arXiv 2406.06484, 2412.06464, 2312.06635, 2510.26692) compute the inner loops of one matrix that writes once
per token: linear attention with and without decay, and the delta rules. Here is which operator an inner loop is, whether it
takes a call, and how a call's operands become its own. Its conventions are other ones: queries come as they are (`scale=1`),
gates as logarithms, states `[N, H, Dk, Dv]` in float32.

Nothing is imported before the first call that an operator takes, and nothing at all with `KVBIND_FLA=0` or where the package
is missing. `faster_of` decides between these and the library's own kernels.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, NamedTuple

import torch
from packaging.version import InvalidVersion, Version
from torch import Tensor

from kvbind.forms.on_kernels.delta import unlike_recurrence
from kvbind.forms.on_kernels.kernel_calls.operands import of_each_token
from kvbind.forms.parallel.finite import guarded, guarded_packed
from kvbind.forms.state import State
from kvbind.forms.tokens import Tokens
from kvbind.forms.validation import Engine, Operands
from kvbind.inner.fields import Retention
from kvbind.inner.rule import FastWeights
from kvbind.inner.spec import InnerLoop
from kvbind.kernels.common.devices import capability, runs_on

log = logging.getLogger(__name__)

PACKAGE = "fla-core"
"""The distribution that holds the operators; `flash-linear-attention` adds layers and models to it."""

PACKAGES = (PACKAGE, "tilelang")
"""Distributions whose versions say how fast it is: some gradients are made by the second where that is installed."""

OLDEST, BEFORE = Version("0.6.0"), Version("0.7")
"""Versions whose conventions these are."""

HOPPER = (9, 0)
WRONG_TRITON = (Version("3.4.0"), Version("3.7.1"))
"""From the first up to the second, gradients with gates are wrong on `HOPPER`, and the package refuses to compute them."""

DTYPES = (torch.bfloat16, torch.float16)
"""Of operands: those of float32 are multiplied in TF32, or refused."""

LEAST_GATE = 1e-30
"""Gates below have no gradient, as zero has no logarithm. Those above have that of their logarithm over the gate: the error
of the one, over the gate, is the error of the other. Behind an exponential or a sigmoid it is no larger than elsewhere."""


class Choice(NamedTuple):
    """What runs a call.

    Attributes:
        name: of the runner, or None where no operator takes the call.
        why: the reason, in words.
        run: the runner.
    """

    name: str | None
    why: str
    run: Engine | None = None


@dataclass(frozen=True)
class Operator:
    """One operator.

    Attributes:
        module: below `fla.ops`.
        function: its name there.
        loss: "dot", writes add up; or "squared", the delta rule.
        gate: whether the state decays: None, per "head" or per "key" channel.
        widest: the most channels of keys and queries; None for any.
        hopper: what gradients take on `HOPPER` with a Triton from `WRONG_TRITON`: "triton" as elsewhere, "tilelang" that
            package, or "none" where there are none.
        faster: the passes in which it was measured to be faster than the library's own kernels
            (`results/bench/peers-h200.json`).
    """

    module: str
    function: str
    loss: Literal["dot", "squared"]
    gate: Literal["head", "key"] | None = None
    widest: int | None = None
    hopper: Literal["triton", "tilelang", "none"] = "triton"
    faster: tuple[Literal["forward", "training"], ...] = ()

    @property
    def name(self) -> str:
        """As it is imported."""
        return f"fla.ops.{self.module}.{self.function}"


OPERATORS = (
    Operator("simple_gla", "chunk_simple_gla", "dot"),
    Operator("simple_gla", "chunk_simple_gla", "dot", "head", hopper="none"),
    Operator("gla", "chunk_gla", "dot", "key"),
    Operator("delta_rule", "chunk_delta_rule", "squared", widest=256),
    Operator(
        "gated_delta_rule", "chunk_gated_delta_rule", "squared", "head", widest=256, hopper="tilelang", faster=("forward",)
    ),
    Operator("kda", "chunk_kda", "squared", "key", widest=256, faster=("forward",)),
)


def operator_of(spec: InnerLoop) -> Operator | str:
    """The operator that an inner loop is, or why there is none."""
    different = unlike_recurrence(spec, ("token",), ("retention",))
    if different is not None:
        return different
    gate: Literal["head", "key"] | None = None
    if spec.retention:
        gate = spec.retention.per if isinstance(spec.retention, Retention) else "head"
        if spec.loss == "squared" and not spec.decays_before:
            return f"its residual reads the weights before their decay, retention={spec.retention!r}"
    return next(operator for operator in OPERATORS if (operator.loss, operator.gate) == (spec.loss, gate))


def switched_off() -> bool:
    """Whether `KVBIND_FLA=0` asks for none of these operators."""
    return os.environ.get("KVBIND_FLA", "1") == "0"


@cache
def installed() -> str | None:
    """The version of the package, whatever it is; None where it is not installed."""
    try:
        found = version(PACKAGE)
    except PackageNotFoundError:
        return None
    # metadata may outlive the files
    return found if importlib.util.find_spec("fla") is not None else None


def unusable() -> str | None:
    """Why none of the operators can be called on this machine; None where they can."""
    if switched_off():
        return "KVBIND_FLA=0"
    found = installed()
    if found is None:
        return "flash-linear-attention is not installed"
    try:
        fits = OLDEST <= Version(found) < BEFORE
    except InvalidVersion:
        fits = False
    if fits:
        return None
    return f"{PACKAGE} must be at least {OLDEST} and below {BEFORE}, of which calls are known; {found} is installed"


@cache
def loaded(operator: Operator) -> Callable[..., Any] | str:
    """The operator itself, or why it cannot be imported."""
    try:
        function = getattr(importlib.import_module(f"fla.ops.{operator.module}"), operator.function)
    except (ImportError, AttributeError) as error:
        return f"{operator.name} of {PACKAGE} {installed()} cannot be imported: {error}"
    except Exception as error:
        return f"{operator.name} of {PACKAGE} {installed()} fails while it is imported: {type(error).__name__}: {error}"
    return function if callable(function) else f"{operator.name} of {PACKAGE} {installed()} is no function"


@cache
def _triton() -> Version:
    return Version(version("triton"))


@cache
def _has_tilelang() -> bool:
    return importlib.util.find_spec("tilelang") is not None


def gradients_refused(operator: Operator, device: torch.device) -> str | None:
    """Why an operator has no gradients on a device; None where it has."""
    if operator.hopper == "triton" or device.type != "cuda":
        return None
    index = device.index if device.index is not None else torch.cuda.current_device()
    if capability(index)[0] != HOPPER[0] or not WRONG_TRITON[0] <= _triton() < WRONG_TRITON[1]:
        return None
    tilelang = operator.hopper == "tilelang"
    if tilelang and _has_tilelang() and os.environ.get("FLA_TILELANG", "1") != "0":
        return None
    cure = f"Triton {WRONG_TRITON[1]}" + (" or tilelang" if tilelang else "")
    return (
        f"{operator.function} refuses gradients with gates on a GPU of compute capability 9 with Triton {_triton()}; "
        f"{cure} would give them"
    )


def differentiated(call: Operands) -> bool:
    """Whether gradients may be asked of a call."""
    tensors = (call.q, *call.tokens.tensors().values(), *call.state.tensors.values())
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def considered() -> bool:
    """Whether calls may run on the operators at all; those that are being compiled, to which they are opaque, do not."""
    return not torch.compiler.is_compiling() and unusable() is None


def obstacle(spec: InnerLoop, call: Operands | None = None) -> str | None:
    """Why no operator runs an inner loop, or this call of it; None where one does.

    Nothing is imported where it is another reason.

    Args:
        spec: the inner loop.
        call: a call whose sequences are of equal length, or packed; None for any that fits.
    """
    operator = operator_of(spec)
    if isinstance(operator, str):
        return operator
    reason = unusable()
    if reason is None and call is not None:
        reason = _call_obstacle(operator, call)
    if reason is None:
        function = loaded(operator)
        reason = function if isinstance(function, str) else None
    return reason


def _call_obstacle(operator: Operator, call: Operands) -> str | None:
    q, tokens = call.q, call.tokens
    if not q.shape[2]:
        return "there must be tokens; got none"
    if not runs_on(q.device):
        return f"kernels do not run on {q.device}, or not now"
    if q.dtype not in DTYPES or {tokens.k.dtype, tokens.v.dtype} != {q.dtype}:
        found = ", ".join(str(x.dtype).removeprefix("torch.") for x in (q, tokens.k, tokens.v))
        return f"q, k and v must all be bfloat16 or all float16; got {found}"
    if call.state.dtype != torch.float32:
        return f"the state must be float32; got {call.state.dtype}"
    if operator.widest is not None and q.shape[-1] > operator.widest:
        return f"{operator.function} takes heads of at most {operator.widest} channels; got {q.shape[-1]}"
    if tokens.mask is not None:
        return "all tokens must write; got update_tokens"
    bounds = call.cu_seqlens
    if bounds is not None and any(a == b for a, b in itertools.pairwise(bounds)):
        return "packed sequences must each have a token"
    if bounds is not None and q.is_cuda and torch.cuda.is_current_stream_capturing():
        return "tables of packed sequences are made on the host, which a CUDA graph does not capture"
    return gradients_refused(operator, q.device) if differentiated(call) else None


def preferred(operator: Operator, call: Operands) -> str | None:
    """Why an operator that takes a call runs it in place of the library's own kernels; None where it does not."""
    if os.environ.get("KVBIND_FLA") == "force":
        return "KVBIND_FLA=force"
    passes = "training" if differentiated(call) else "forward"
    return f"it was measured to be faster in {passes}" if passes in operator.faster else None


def faster_of(spec: InnerLoop, call: Operands, own: Engine | None) -> Choice:
    """What runs a call in the parallel form: an operator that takes it and is the only one, or was measured to be faster.

    Which it is, and why, is logged once for each inner loop.

    Args:
        spec: the inner loop.
        call: its sequences are of equal length, or packed.
        own: the library's kernels for it; None where it has none, and PyTorch would run it.
    """
    name = None if own is None else f"{own.__module__}.{own.__name__}"
    choice = Choice(name, "no kernel of the library takes it" if own is None else "it fits", own)
    operator, reason = operator_of(spec), obstacle(spec, call)
    if isinstance(operator, str):
        return choice
    why = choice.why if own is None else preferred(operator, call)
    if reason is not None:
        choice = choice._replace(why=f"{choice.why}; flash-linear-attention: {reason}")
    elif why is None:
        choice = choice._replace(why=f"{choice.why}; {operator.name} was not measured to be faster")
    else:
        choice = Choice(f"{operator.name} of {PACKAGE} {installed()}", why, run_fla)
    if (spec.text, choice.name) not in _said:
        _said.add((spec.text, choice.name))
        log.info("%s runs on %s: %s", spec, choice.name or "PyTorch", choice.why)
    return choice


_said: set[tuple[str, str | None]] = set()
"""Inner loops and what ran them, as it was logged."""


def run_fla(spec: InnerLoop, call: Operands) -> tuple[Tensor, State]:
    """Run a call that has no `obstacle`, of sequences of equal length or packed.

    Args:
        spec: an inner loop that an operator is.
        call: its operands.

    Returns:
        Outputs `[B, H, T, Dv]`, and the state after this call.
    """
    if call.cu_seqlens is None:
        return guarded(_evaluate, spec, call.q, call.tokens, call.state)
    evaluate = partial(_evaluate, bounds=call.cu_seqlens)
    return guarded_packed(evaluate, spec, call.q, call.tokens, call.state, call.cu_seqlens)


def _evaluate(
    spec: InnerLoop, q: Tensor, tokens: Tokens, state: State, bounds: tuple[int, ...] | None = None
) -> tuple[Tensor, State]:
    """What `run_fla` returns, of operands that are all finite."""
    operator = operator_of(spec)
    assert isinstance(operator, Operator)
    function = loaded(operator)
    assert not isinstance(function, str)
    named = _named(operator, spec.sign, q, tokens)
    if bounds is not None:
        lengths = torch.tensor(bounds, dtype=torch.long)
        named |= {"cu_seqlens": lengths.to(q.device), "cu_seqlens_cpu": lengths}
    start = state.weights["out"]
    output, end = function(**named, scale=1.0, initial_state=start.contiguous(), output_final_state=True)
    after = FastWeights({"out": end.to(start.dtype)}, {}, {})
    return output.transpose(1, 2), State.of(spec, after, None, 0)


def _named(operator: Operator, sign: int, q: Tensor, tokens: Tokens) -> dict[str, Any]:
    """Operands `[B, H, T, ...]` as an operator names and lays them out."""
    rate, gate = tokens.rates["out"], tokens.gates.get("retention")
    named: dict[str, Any] = {"q": q.transpose(1, 2), "k": tokens.k.transpose(1, 2), "v": tokens.v.transpose(1, 2)}
    if gate is not None:
        named["g"] = gate.transpose(1, 2).float().clamp(min=LEAST_GATE).log()
    if operator.loss == "squared":
        named["beta"] = sign * of_each_token(rate, tokens).transpose(1, 2).float()
    elif isinstance(rate, Tensor) or sign * rate != 1:
        column = rate.transpose(1, 2)[..., None] if isinstance(rate, Tensor) else rate
        named["v"] = (sign * column * named["v"]).to(q.dtype)
    return named
