"""`kvbind bench growth`: how the distance between two evaluations of one inner loop grows from chunk to chunk.

An evaluation in float64 is the reference. Others differ from it by a small change of the starting weights, which tells how
the inner loop itself magnifies what is small, or by the precision in which some of it is computed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kvbind.bench.harness.operands import DrawnOperands, Size
from kvbind.bench.verify.accuracy import with_precision
from kvbind.inner.rule import FastWeights, apply_update, gradient
from kvbind.inner.spec import InnerLoop
from kvbind.inner.systems import lact_llm, ladder

CHANGES = (1e-15, 1e-12, 1e-8)
"""Relative changes of the starting weights."""

SATURATED = 1e-2
"""Relative distances above this are of two trajectories that have parted, and tell nothing of growth."""


@dataclass(frozen=True)
class Growth:
    """The distance of one evaluation from the reference.

    Attributes:
        rung: of the ladder.
        evaluation: what is changed, or what is computed in which precision.
        errors: relative distance in norm of the outputs of each chunk, to three digits.
        per_chunk: the factor by which it grows from a chunk to the next, of a line through its logarithms.
        seconds: that the evaluation took.
    """

    rung: str
    evaluation: str
    errors: list[float]
    per_chunk: float
    seconds: float


def wide_updates(spec: InnerLoop, o: DrawnOperands, chunk: int) -> Tensor:
    """The recurrent form with the products of keys, values and queries in float32, and all that enters the state in float64.

    Summing, momentum, Newton-Schulz and norms are exact to float64: as much as any wider accumulation of updates can give.
    """
    fast = FastWeights.start(spec, {name: x.double()[None] for name, x in o.weights.items()})
    q, k, v = (x.float().transpose(1, 2) for x in (o.q, o.k, o.v))
    rates, momentum = o.gates["lr"].float().transpose(1, 2)[..., None], o.gates["momentum"].double().transpose(1, 2)
    outputs = []
    for start in range(0, k.shape[2], chunk):
        part = slice(start, start + chunk)
        narrow = {name: x.float() for name, x in fast.weights.items()}
        outputs.append(spec.network.apply(narrow, q[:, :, part]))
        each = dict.fromkeys(spec.updated, rates[:, :, part])
        updates = gradient(spec, narrow, k[:, :, part], v[:, :, part], each)
        gate = momentum[:, :, part].mean(2)[..., None, None]
        fast = apply_update(spec, fast, {name: x.double() for name, x in updates.items()}, {"momentum": gate})
    return torch.cat(outputs, dim=2).transpose(1, 2)


def changed(o: DrawnOperands, relative: float) -> DrawnOperands:
    """Operands whose starting weights have other last digits."""
    generator = torch.Generator().manual_seed(1)

    def change(x: Tensor) -> Tensor:
        return x + relative * x.std() * torch.randn(x.shape, generator=generator, dtype=x.dtype)

    return DrawnOperands({name: change(x) for name, x in o.weights.items()}, o.q, o.k, o.v, o.gates)


def factor(errors: list[float]) -> float:
    """The growth from a chunk to the next while distances are small; 1 where fewer than three are."""
    small = [math.log(x) for x in errors[1:] if 0 < x < SATURATED]
    if len(small) < 3:
        return 1.0
    places = range(len(small))
    middle, mean = sum(places) / len(small), sum(small) / len(small)
    slope = sum((i - middle) * (y - mean) for i, y in enumerate(small)) / sum((i - middle) ** 2 for i in places)
    return math.exp(slope)


def evaluations(spec: InnerLoop, o: DrawnOperands, chunk: int) -> dict[str, Callable[[], Tensor]]:
    """What is held to the reference, by name; `o` in float64, its numbers such that float32 has them too."""
    exact, single = with_precision(spec, torch.float64), with_precision(spec, torch.float32)
    low = o.map(torch.Tensor.float)
    return {
        **{f"float64, weights changed by {x:.0e}": partial(changed(o, x).run, exact, "recurrent") for x in CHANGES},
        "float32": partial(low.run, single, "recurrent"),
        "float32, Newton-Schulz in float64": partial(low.run, exact, "recurrent"),
        "products in float32, updates and state in float64": partial(wide_updates, exact, o, chunk),
    }


def bench_growth(size: Size, chunk: int, rungs: tuple[str, ...] = ("rung0", "rung1", "rung2")) -> Iterator[Growth]:
    """Distances for some rungs, on the CPU.

    Args:
        size: of the operands.
        chunk: tokens in a chunk.
        rungs: names of the ladder.
    """
    for rung in rungs:
        spec = ladder(lact_llm(chunk))[rung]
        o = DrawnOperands.draw(spec, size).map(torch.Tensor.float).map(torch.Tensor.double)
        begin = time.perf_counter()
        reference = o.run(with_precision(spec, torch.float64), "recurrent").unflatten(1, (-1, chunk)).flatten(2)
        yield Growth(rung, "float64", [0.0] * reference.shape[1], 1.0, time.perf_counter() - begin)
        for name, evaluate in evaluations(spec, o, chunk).items():
            begin = time.perf_counter()
            output = evaluate()
            seconds = time.perf_counter() - begin
            apart = output.double().unflatten(1, (-1, chunk)).flatten(2) - reference
            errors = (apart.norm(dim=-1) / reference.norm(dim=-1))[0].tolist()
            yield Growth(rung, name, [float(f"{x:.3g}") for x in errors], round(factor(errors), 3), seconds)
