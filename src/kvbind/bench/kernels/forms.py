"""`kvbind bench forms`: recurrent and parallel forms of every rung, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from kvbind.bench.harness.operands import DrawnOperands, Size
from kvbind.bench.harness.timing import median_seconds, peak_bytes
from kvbind.forms.evaluate import Form
from kvbind.forms.obstacles import parallel_obstacles
from kvbind.inner.orthogonalize import NewtonSchulz
from kvbind.inner.spec import InnerLoop
from kvbind.inner.systems import RUNGS, lact_llm, ladder


@dataclass(frozen=True)
class FormRow:
    """One form of one rung.

    Attributes:
        rung: its name.
        form: "recurrent" or "parallel".
        forward: tokens per second of a forward pass without gradients.
        training: tokens per second of a forward and backward pass with gradients of every operand.
        training_bytes: the most memory that pass held beyond its operands.
    """

    rung: str
    form: Form
    forward: float
    training: float
    training_bytes: int


def bench_forms(
    size: Size, chunk: int, device: torch.device, dtype: torch.dtype, *, seconds: float = 2.0, rungs: list[str] | None = None
) -> list[FormRow]:
    """Measure the forms of the ladder of the LaCT language model.

    Args:
        size: of the operands.
        chunk: tokens in a chunk.
        device: where to run.
        dtype: of q, k and v; weights, rates and gates are in float32. Newton-Schulz runs in `dtype`.
        seconds: how long to measure each rung, for each of forward and training.
        rungs: names of the rungs to measure; None for all.
    """
    full = lact_llm(chunk).replace(orthogonalize=NewtonSchulz(dtype=dtype))
    rows = []
    for name, spec in ladder(full).items():
        if rungs is not None and name not in rungs:
            continue
        forms: list[Form] = ["recurrent"] if parallel_obstacles(spec) else ["recurrent", "parallel"]
        o = DrawnOperands.draw(spec, size).to(device, dtype, torch.float32)
        leaves = o.map(lambda x: x.clone().requires_grad_())
        forward = median_seconds([partial(_forward, spec, o, form) for form in forms], device, seconds=seconds)
        works = [partial(_train, spec, leaves, form) for form in forms]
        training = median_seconds(works, device, seconds=seconds)
        tokens = size.batch * size.tokens
        for form, work, fast, slow in zip(forms, works, forward, training, strict=True):
            rows.append(FormRow(name, form, tokens / fast, tokens / slow, peak_bytes(work, device)))
    return rows


def tokens_per_second(
    cases: Sequence[tuple[InnerLoop, Form]], size: Size, device: torch.device, *, rounds: int = 9
) -> list[float]:
    """Tokens per second of a forward and backward pass of each inner loop in its form, the median over rounds of all.

    Operands are float32 on a CPU and bfloat16 elsewhere; gradients are taken of every one of them.

    Args:
        cases: inner loops and forms.
        size: of the operands.
        device: where to run.
        rounds: passes of each, in turn.
    """
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    works = []
    for spec, form in cases:
        leaves = DrawnOperands.draw(spec, size).to(device, dtype, torch.float32).map(lambda x: x.requires_grad_())
        works.append(partial(_train, spec, leaves, form))
    return [size.batch * size.tokens / taken for taken in median_seconds(works, device, least=rounds, seconds=0)]


def _forward(spec: InnerLoop, o: DrawnOperands, form: Form) -> None:
    with torch.no_grad():
        o.run(spec, form)


def _train(spec: InnerLoop, o: DrawnOperands, form: Form) -> None:
    y = o.run(spec, form)
    # q is unused where the key is read, and a gate in its last chunk
    torch.autograd.grad(y, o.leaves(), torch.ones_like(y), allow_unused=True)


def as_data(rows: list[FormRow]) -> list[dict[str, Any]]:
    """Rows as plain data, each with what its rung changes and its speed over the recurrent form of the same rung."""
    recurrent = {row.rung: row for row in rows if row.form == "recurrent"}
    return [
        asdict(row)
        | {
            "change": RUNGS[row.rung],
            "forward_over_recurrent": row.forward / recurrent[row.rung].forward,
            "training_over_recurrent": row.training / recurrent[row.rung].training,
        }
        for row in rows
    ]
