"""`kvbind bench forms`: recurrent and parallel forms of every rung, forward and backward."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from kvbind.bench.operands import Operands, Size
from kvbind.bench.timing import median_seconds, peak_bytes
from kvbind.forms.analysis import parallel_obstacles
from kvbind.forms.api import Form
from kvbind.inner.orthogonalize import NewtonSchulz
from kvbind.inner.spec import InnerLoop
from kvbind.inner.systems import RUNGS, lact_llm, ladder


@dataclass(frozen=True)
class Row:
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
) -> list[Row]:
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
        o = Operands.draw(spec, size).to(device, dtype, torch.float32)
        leaves = o.map(lambda x: x.clone().requires_grad_())
        forward = median_seconds([partial(_forward, spec, o, form) for form in forms], device, seconds=seconds)
        works = [partial(_train, spec, leaves, form) for form in forms]
        training = median_seconds(works, device, seconds=seconds)
        tokens = size.batch * size.tokens
        for form, work, fast, slow in zip(forms, works, forward, training, strict=True):
            rows.append(Row(name, form, tokens / fast, tokens / slow, peak_bytes(work, device)))
    return rows


def _forward(spec: InnerLoop, o: Operands, form: Form) -> None:
    with torch.no_grad():
        o.run(spec, form)


def _train(spec: InnerLoop, o: Operands, form: Form) -> None:
    y = o.run(spec, form)
    torch.autograd.grad(y, o.leaves(), torch.ones_like(y))


def as_data(rows: list[Row]) -> list[dict[str, Any]]:
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
