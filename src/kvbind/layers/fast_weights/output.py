"""From what a `FastWeightLayer` has made of its input, and what fast weights say to it, to its output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvbind.inner.projections import Projections
from kvbind.layers.norm import RMSNorm


@dataclass(frozen=True)
class Made:
    """What a layer has made of its input for one call.

    Attributes:
        q: queries `[B, T, H, Dk]`.
        k: keys `[B, T n, H, Dk]`, n writes of a token side by side.
        v: values, likewise.
        lr: rates `[B, T n, H]`, or a number.
        gates: arguments of `ttt` by name.
        beside: what passes the fast weights by, before the output's norm ("value") or behind it ("bonus"), `[B, T, H, Dv]`.
        gate: what multiplies the output, `[B, T, H, Dv]`, or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    lr: Tensor | float
    gates: dict[str, Tensor]
    beside: dict[str, Tensor]
    gate: Tensor | None


GATINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "linear": lambda x: x,
}


def output_norm(projections: Projections, heads: int, width: int) -> nn.Module | None:
    """The norm behind fast weights of `heads` heads of `width` channels, or None."""
    kind, eps, channels = projections.output_norm, projections.output_eps, heads * width
    if kind == "rms":
        return RMSNorm(width, eps=eps)
    if kind == "rms_all":
        return RMSNorm(channels, eps=eps)
    if kind == "layer":
        return nn.LayerNorm(channels, eps=eps)
    if kind == "group":
        return nn.GroupNorm(heads, channels, eps=eps * width)
    return None


def joined(fast: Tensor, made: Made, projections: Projections, norm: nn.Module | None) -> Tensor:
    """The output of fast weights `[B, T, H, Dv]`, normed and gated: `[B, T, H Dv]`."""
    if "value" in made.beside:
        fast = fast + made.beside["value"].to(fast.dtype)
    gate = None if made.gate is None else GATINGS[projections.output_gate](made.gate)
    if gate is not None and projections.gate_first:
        fast = fast * gate
    if isinstance(norm, nn.GroupNorm):
        shape = fast.shape
        fast = norm(fast.flatten(2).flatten(0, 1)).to(fast.dtype).reshape(shape)
    elif norm is not None and projections.output_norm != "rms":
        fast = norm(fast.flatten(2)).to(fast.dtype).reshape(fast.shape)
    elif norm is not None:
        fast = norm(fast)
    if "bonus" in made.beside:
        fast = fast + made.beside["bonus"].to(fast.dtype)
    if gate is not None and not projections.gate_first:
        fast = fast * gate
    return fast.flatten(2)
