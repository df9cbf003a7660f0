"""Calls of `kvbind.kernels.affine`: the delta rule and its kin."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvbind.forms.on_kernels.kernel_calls.operands import of_each_token
from kvbind.forms.state import State
from kvbind.forms.validation import Operands
from kvbind.inner.rule import FastWeights
from kvbind.inner.spec import InnerLoop


def run_affine(spec: InnerLoop, call: Operands) -> tuple[Tensor, State]:
    """The parallel form on `kvbind.kernels.affine`, of sequences of equal length or packed.

    Args:
        spec: an inner loop without `obstacle`.
        call: its operands.

    Returns:
        Outputs `[B, H, T, Dv]`, and the state after this call.
    """
    from kvbind.kernels.affine.operator import affine_chunks

    q, tokens, each = call.q.transpose(1, 2), call.tokens, spec.writes
    if each > 1:
        # reads behind a token's last write, and zeros behind the others
        q = F.pad(q.unsqueeze(2), (0, 0, 0, 0, each - 1, 0)).flatten(1, 2)
    signed, gates = tokens.rates["out"] * spec.sign, tokens.gates
    rate = of_each_token(signed, tokens) if isinstance(signed, Tensor) or signed != 1 else None
    bounds = None if call.cu_seqlens is None else each * torch.tensor(call.cu_seqlens, device=q.device)

    def rows(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.transpose(1, 2)

    output, end = affine_chunks(
        q, tokens.k.transpose(1, 2), tokens.v.transpose(1, 2), rate=rows(rate), erase=rows(gates.get("erase")),
        gate=rows(gates.get("retention")), gate_acts="before" if spec.decays_before else "after",
        residual=spec.loss == "squared", state=call.state.weights["out"], boundaries=bounds,
    )  # fmt: skip
    after = State.of(spec, FastWeights({"out": end}, {}, {}), None, 0)
    return output[:, each - 1 :: each].transpose(1, 2), after
