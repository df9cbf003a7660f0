"""What one head does on one input, small enough for a page: its token mixing, effective queries and keys, and inner loss."""

from __future__ import annotations

import base64
import math
import statistics
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from kvbind import DepthwiseConv, InnerLoop, explain, inner_loss, linearize
from kvbind.experiments.layer_calls import LayerCall
from kvbind.inner.gates import DECLARED, GATES

Look = dict[str, Any]
"""As the page's script reads it:

- "name": of the head.
- "size": n, the number of cells; a cell is a token, or some that lie together.
- "codes": base64 of int8 `[n, n]`, and "most": the weight of a code c is `most sign(c) (c / 127)^2`.
- "q", "k": places of effective queries and keys on two principal components, `[2][count]`; "k_at": the keys' cells.
- "shares": of the variance, of either component.
- "before", "after": the inner loss of each chunk at the weights before and after its own update.
- "steps": pairs of a number of steps and the inner loss after them, averaged over chunks; of 0, at the starting weights.
"""

HEADS = 3
"""Heads that are looked at, in each layer."""

LEVELS = 127

STEPS = (1, 2, 4, 8)

NAMES = ("lr", *(gate.name for gate in GATES), "update_tokens")
"""The arguments of a call, besides its operands, that its linear attention depends on."""


def spec_data(spec: InnerLoop) -> dict[str, str | None]:
    """What is said of an inner loop: itself, and what stands in the way of its parallel form, None for nothing."""
    obstacles = explain(spec).obstacles
    return {"spec": repr(spec), "obstacle": str(obstacles[0]) if obstacles else None}


def head_of(call: LayerCall, head: int) -> LayerCall:
    """The call of one head alone, whose matrices of all tokens fit the memory of a device."""

    def own(x: Any) -> Any:
        return x[:, :, head : head + 1] if isinstance(x, Tensor) else x

    rates = call.options.get("lr", 1.0)
    options = {name: own(call.options.get(name)) for name in call.spec.gates}
    options["lr"] = {name: own(x) for name, x in rates.items()} if isinstance(rates, Mapping) else own(rates)
    options["update_tokens"] = call.options.get("update_tokens")
    vectors = call.spec.network.vectors
    weights = {
        name: x[..., head : head + 1, :] if name in vectors else x[..., head : head + 1, :, :]
        for name, x in call.weights.items()
    }
    return replace(call, weights=weights, q=own(call.q), k=own(call.k), v=own(call.v), options=options)


@torch.no_grad()
def look_at(call: LayerCall, cells: Tensor) -> list[Look]:
    """Look at the heads of a call of one sequence, `HEADS` of them at most, or at a depthwise convolution as a whole.

    As linear attention a convolution's channels are heads of their own; they are averaged.

    Args:
        call: of a layer.
        cells: the cell of each token, int64 `[T]`, from 0 without gaps.
    """
    conv = isinstance(call.spec.network, DepthwiseConv)
    found = losses(call)
    parts = {"convolution": call} if conv else {f"head {i}": head_of(call, i) for i in range(min(call.q.shape[2], HEADS))}
    return [{"name": name, **mixing(part, cells), **found[i]} for i, (name, part) in enumerate(parts.items())]


def arguments_of(call: LayerCall) -> dict[str, Any]:
    """The keyword arguments that `linearize` and `inner_loss` take of a call's."""
    return {name: call.options[name] for name in NAMES if call.options.get(name) is not None}


def mixing(call: LayerCall, cells: Tensor) -> Look:
    """The linear attention of a call of one head: its matrix, and effective queries and keys of each cell's first token."""
    attention = linearize(call.spec, call.weights, call.q, call.k, call.v, **arguments_of(call))
    cells = cells.to(attention.q.device)
    writes = attention.v[0].flatten(1).abs().amax(1) > 0
    # a token that does not write has no effective value for its weights to count
    codes, most = quantized(gathered(attention.matrix()[0].mean(0) * writes, cells))
    first = [int((cells == cell).nonzero()[0]) for cell in range(len(codes))]
    k_at = [cell for cell, token in enumerate(first) if writes[token]]
    q, k = attention.q[0, first].flatten(1), attention.k[0, [first[cell] for cell in k_at]].flatten(1)
    places, shares = principal(torch.cat((q, k)))
    return {
        "size": len(codes),
        "codes": base64.b64encode(codes.numpy().tobytes()).decode(),
        "most": short(most),
        "q": [[short(x) for x in axis] for axis in places[: len(q)].T.tolist()],
        "k": [[short(x) for x in axis] for axis in places[len(q) :].T.tolist()],
        "k_at": k_at,
        "shares": [short(x) for x in shares],
    }


def losses(call: LayerCall) -> list[Look]:
    """The inner loss of each head: by chunk, before and after its update, and by steps."""
    spec, options = call.spec, arguments_of(call)

    def loss(spec: InnerLoop, at: Literal["before", "after"]) -> list[list[float | None]]:
        """By head and chunk."""
        given = {name: x for name, x in options.items() if name not in DECLARED or name in spec.gates}
        found = inner_loss(spec, call.weights, call.k, call.v, at=at, **given)
        return [[short(x) for x in own] for own in found.mean(0).tolist()]

    at_start = spec.one_write()
    alone = spec.read_rate or "refresh" in spec.extensions or (spec.visibility == "token" and spec.chunk != 1)
    possible = [steps for steps in STEPS if steps == 1 or not alone]
    by_steps = {0: loss(at_start, "before")} | {steps: loss(spec.replace(steps=steps), "after") for steps in possible}
    before, after = loss(spec, "before"), loss(spec, "after")
    return [
        {
            "before": before[i],
            "after": after[i],
            "steps": [[steps, short(statistics.fmean(math.nan if x is None else x for x in found[i]))]
                      for steps, found in by_steps.items()],
        }
        for i in range(len(before))
    ]  # fmt: skip


def gathered(matrix: Tensor, cells: Tensor) -> Tensor:
    """Weights `[T, T]` between cells: summed over the tokens of a cell that are read, averaged over those that read."""
    sizes = cells.bincount()
    count = len(sizes)
    columns = matrix.new_zeros(len(matrix), count).index_add(1, cells, matrix)
    rows = matrix.new_zeros(count, count).index_add(0, cells, columns)
    return rows / sizes[:, None]


def quantized(matrix: Tensor) -> tuple[Tensor, float]:
    """Weights as codes of -127 to 127, int8, on a scale of roots, where small ones differ too; and the largest."""
    most = float(matrix.abs().max())
    if not most:
        return torch.zeros(matrix.shape, dtype=torch.int8), 0.0
    roots = matrix.sign() * (matrix.abs() / most).sqrt()
    return (LEVELS * roots).round().to(torch.int8).cpu(), most


def weights_of(codes: Tensor, most: float) -> Tensor:
    """The weights of codes, as the page reads them."""
    return most * codes.sign() * (codes.double() / LEVELS) ** 2


def principal(points: Tensor) -> tuple[Tensor, list[float]]:
    """Vectors `[n, D]` on their first two principal components, `[n, 2]`, and the components' shares of the variance."""
    centred = (points - points.mean(0)).double().cpu()
    u, sizes, _ = torch.linalg.svd(centred, full_matrices=False)
    wide = torch.zeros(len(points), 2, dtype=torch.float64)
    kept = min(2, len(sizes))
    wide[:, :kept] = u[:, :kept] * sizes[:kept]
    total = float(sizes.square().sum()) or 1.0
    return wide, [float(sizes[i].square()) / total if i < kept else 0.0 for i in range(2)]


def short(x: float) -> float | None:
    """A number in four digits; None of one that is not finite, as a loss is that ascent has let grow without bound."""
    return float(f"{x:.4g}") if math.isfinite(x) else None
