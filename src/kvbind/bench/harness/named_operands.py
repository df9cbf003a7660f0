"""Operands of one call as named leaves, drawn on the device that uses them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvbind.bench.harness.operands import Size, draw_gate
from kvbind.forms.api import ttt
from kvbind.forms.evaluate import Form
from kvbind.forms.state import State
from kvbind.inner.networks import DepthwiseConv
from kvbind.inner.spec import InnerLoop

Leaves = dict[str, Tensor]
"""By name: "q", "k", "v", "lr.M" for each updated matrix M, gates by their own, "weights.M"."""

NARROW = ("q", "k", "v")
"""The leaves that a layer gives in its own dtype; the others stay in float32."""

LAYOUTS = ("heads", "tokens")
"""How those lie in memory: `[B, H, T, D]`, which batched products take as it is, or `[B, T, H, D]`."""


def draw_leaves(
    spec: InnerLoop,
    size: Size,
    device: torch.device,
    *,
    hidden: int | None = None,
    value_width: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Leaves:
    """Random leaves like those of a trained layer: unit-norm silu'd queries and keys, rates near 0.02, gates near 1/2 or 1.

    Under squared error rates fall with the chunk, which keeps the inner loop's steps from growing.

    Args:
        spec: the inner loop; it has one rate per updated matrix where `spec.token_lr`, none otherwise.
        size: of the call.
        device: where to draw.
        hidden: hidden width; default that of the keys.
        value_width: width of the values; default that of the keys.
        dtype: of the draw.
        seed: of the generator.
    """
    generator = torch.Generator(device).manual_seed(seed)
    shape, values = (size.batch, size.tokens, size.heads), value_width or size.width

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype, device=device)

    rows = (size.batch, size.tokens * spec.writes, size.heads)
    leaves = {name: F.normalize(F.silu(normal(*x, size.width)), dim=-1) for name, x in (("q", shape), ("k", rows))}
    leaves["v"] = F.silu(normal(*rows, values))
    if spec.token_lr:
        scale = min(1.0, 16 / (spec.chunk or size.tokens)) if spec.loss == "squared" else 1.0
        leaves |= {f"lr.{name}": scale * F.softplus(normal(*rows) - 4) for name in spec.updated}
    leaves |= {name: draw_gate(spec, gate, size, normal) for name, gate in spec.gates.items()}
    inner = None if isinstance(spec.network, DepthwiseConv) else hidden or size.width
    weights = spec.network.initial(size.heads, size.width, values, inner, generator=generator, dtype=dtype, device=device)
    return leaves | {f"weights.{name}": x for name, x in weights.items()}


def in_precision(leaves: Leaves, narrow: torch.dtype, wide: torch.dtype, *, grad: bool = False) -> Leaves:
    """Copies with queries, keys and values in `narrow` and everything else in `wide`, with gradients where asked for."""
    return {
        name: x.detach().to(narrow if name in NARROW else wide).clone().requires_grad_(grad) for name, x in leaves.items()
    }


def laid_out(leaves: Leaves, layout: str) -> Leaves:
    """The same leaves, queries, keys and values in a layout."""
    if layout == "tokens":
        return leaves
    return {name: x.transpose(1, 2).contiguous().transpose(1, 2) if name in NARROW else x for name, x in leaves.items()}


def arguments(spec: InnerLoop, leaves: Leaves, start: int = 0, stop: int | None = None) -> dict[str, Any]:
    """The keyword arguments of `ttt` for the tokens from `start` up to `stop`."""

    def cut(name: str) -> Tensor:
        x = leaves[name]
        if start == 0 and stop is None:
            return x
        each = x.shape[1] // max(leaves["q"].shape[1], 1)
        return x[:, start * each : None if stop is None else stop * each]

    rates = {name: cut(f"lr.{name}") for name in spec.updated} if spec.token_lr else 1.0
    return {name: cut(name) for name in NARROW} | {"lr": rates} | {name: cut(name) for name in spec.gates}


def weights_of(leaves: Leaves) -> Leaves:
    """The starting weights among leaves, by matrix name."""
    return {name.removeprefix("weights."): x for name, x in leaves.items() if name.startswith("weights.")}


def run(spec: InnerLoop, leaves: Leaves, form: Form, **options: Any) -> tuple[Tensor, State]:
    """`ttt` on all tokens."""
    return ttt(spec, weights_of(leaves), **arguments(spec, leaves), form=form, **options)
