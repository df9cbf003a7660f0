"""Calls of `kvbind.kernels.full_glu` and `full_conv`: one update from all tokens, then a read."""

from __future__ import annotations

from torch import Tensor

from kvbind.forms.on_kernels.kernel_calls.operands import heads_last, masked_rate
from kvbind.forms.state import State
from kvbind.forms.validation import Operands
from kvbind.inner.networks import DepthwiseConv
from kvbind.inner.rule import FastWeights
from kvbind.inner.spec import InnerLoop


def run_full_glu(spec: InnerLoop, call: Operands) -> tuple[Tensor, State]:
    """One update of a gated linear unit from all tokens, and a read, on kernels.

    Args:
        spec: an inner loop that `glu_fits`.
        call: its operands.

    Returns:
        Outputs `[B, H, T, Dv]`, and the state after this call.
    """
    from kvbind.kernels.full_glu.operator import full_glu

    tokens, weights = call.tokens, call.state.weights
    both = "gate" in spec.updated
    output, out, gate = full_glu(
        heads_last(call.q), heads_last(tokens.k), heads_last(tokens.v), weights["out"], weights.get("gate"),
        masked_rate(tokens, "out"), masked_rate(tokens, "gate") if both else 1.0, update_gate=both, clip=spec.clip,
        sign=spec.sign, squared=spec.loss == "squared",
    )  # fmt: skip
    after = {"out": out} if gate is None else {"gate": gate, "out": out}
    return output.transpose(1, 2), State.of(spec, FastWeights(after, {}, {}), None, 0)


def run_full_conv(spec: InnerLoop, call: Operands) -> tuple[Tensor, State]:
    """One update of depthwise kernels from a grid of tokens, and a read, on kernels.

    Args:
        spec: an inner loop that `conv_fits`.
        call: its operands.

    Returns:
        Outputs `[B, H, T, D]`, and the state after this call.
    """
    from kvbind.kernels.full_conv.operator import full_conv

    assert isinstance(spec.network, DepthwiseConv)
    tokens = call.tokens
    output, kernel = full_conv(
        heads_last(call.q), heads_last(tokens.k), heads_last(tokens.v), call.state.weights["out"],
        masked_rate(tokens, "out"), grid=spec.network.grid_of(call.q.shape[2]), clip=spec.clip, sign=spec.sign,
    )  # fmt: skip
    return output.transpose(1, 2), State.of(spec, FastWeights({"out": kernel}, {}, {}), None, 0)
