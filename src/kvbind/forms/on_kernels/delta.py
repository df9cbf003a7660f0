"""Recurrences of one matrix that tokens correct one by one: why an inner loop, or a call, is none that an operator takes.

The delta rule and its kin (arXiv 2406.06484, 2412.06464, 2510.26692): a linear network, one write of a token at a time, or
several, gradients renewed at each, gates per head or per key channel, before the gradient or after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kvbind.forms.validation import Operands
from kvbind.inner.fields import Retention
from kvbind.inner.networks import Linear
from kvbind.inner.spec import InnerLoop
from kvbind.kernels.common.devices import runs_on
from kvbind.kernels.common.operands import DTYPES

WIDTHS = range(16, 257)
"""Of keys and values: those that `kvbind.kernels.affine` takes."""

WIDEST_BY_CHANNEL = 128
"""Of both, where channels decay apart and writes read the state: wider ones were never right on a GPU."""


def unlike_recurrence(spec: InnerLoop, visibilities: Sequence[str], extensions: Sequence[str]) -> str | None:
    """Why an inner loop is not one matrix that each token writes and then reads; None where it is.

    Args:
        spec: the inner loop.
        visibilities: under which an operator reads.
        extensions: fields beyond the six lines of the rule that it computes.
    """
    if type(spec.network) is not Linear or spec.network.has_bias or spec.network.output_head is not None:
        return f"its network is {spec.network!r}, where the state must be one matrix, Linear()"
    if spec.chunk != 1 or spec.visibility not in visibilities:
        return f"it reads visibility={spec.visibility!r} with chunk={spec.chunk}, where each token must write and then read"
    absent: dict[str, Any] = {"momentum": False, "orthogonalize": None, "clip": False, "normalize": False, "steps": 1}
    other = [name for name, value in absent.items() if getattr(spec, name) != value]
    other += [name for name in spec.extensions if name not in extensions]
    return f"it has {', '.join(f'{name}={getattr(spec, name, None)!r}' for name in other)}" if other else None


def obstacle(spec: InnerLoop) -> str | None:
    """Why an inner loop is none that `kvbind.kernels.affine` computes; None where it is."""
    reason = unlike_recurrence(spec, ("token", "chunk"), ("retention", "erase", "writes"))
    if reason is not None:
        return reason
    if spec.loss == "dot" and not by_channel(spec):
        return "its writes do not read the state, nor do its channels decay apart (kvbind.kernels.causal)"
    return None


def by_channel(spec: InnerLoop) -> bool:
    """Whether each key channel decays by a gate of its own."""
    return isinstance(spec.retention, Retention) and spec.retention.per == "key"


def call_obstacle(spec: InnerLoop, call: Operands) -> str | None:
    """Why `kvbind.kernels.affine` does not take the operands of a call; None where it does."""
    q, tokens = call.q, call.tokens
    if not runs_on(q.device):
        return f"kernels do not run on {q.device}, or not now"
    if q.dtype not in DTYPES or {tokens.k.dtype, tokens.v.dtype} != {q.dtype} or call.state.dtype != torch.float32:
        return f"q, k and v must have one dtype that kernels take; got {q.dtype}, {tokens.k.dtype}, {tokens.v.dtype}"
    if q.shape[-1] not in WIDTHS or tokens.v.shape[-1] not in WIDTHS:
        most = f"{WIDTHS.start} to {WIDTHS.stop - 1}"
        return f"keys and values must have {most} channels; got {q.shape[-1]} and {tokens.v.shape[-1]}"
    if by_channel(spec) and spec.loss != "dot" and max(q.shape[-1], tokens.v.shape[-1]) > WIDEST_BY_CHANNEL:
        return f"with gates per channel at most {WIDEST_BY_CHANNEL}; got {q.shape[-1]} and {tokens.v.shape[-1]}"
    if not q.numel():
        return "there must be tokens; got none"
    return None if tokens.mask is None else "all tokens must write; got update_tokens"
