"""`kvbind bench accuracy`: the error of each form in working precision, against the recurrent form in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvbind.bench.harness.operands import DrawnOperands, Size
from kvbind.forms.evaluate import Form
from kvbind.forms.obstacles import parallel_obstacles
from kvbind.forms.parallel.scan import linear_scan
from kvbind.inner.orthogonalize import NewtonSchulz
from kvbind.inner.spec import InnerLoop
from kvbind.inner.systems import lact_llm, ladder


@dataclass(frozen=True)
class Error:
    """The error of one form of one rung.

    Attributes:
        rung: its name.
        form: "recurrent" or "parallel".
        dtype: of q, k, v and the output.
        newton_schulz: precision of Newton-Schulz, or None where there is none.
        error: relative error in norm over all outputs, against float64 on the same rounded inputs.
    """

    rung: str
    form: Form
    dtype: str
    newton_schulz: str | None
    error: float


def relative_error(x: Tensor, reference: Tensor) -> float:
    """`||x - reference|| / ||reference||`."""
    return float((x.double() - reference.double()).norm() / reference.double().norm())


def bench_accuracy(size: Size, chunk: int, device: torch.device) -> list[Error]:
    """Errors of every rung and form with float32 and bfloat16 operands.

    Args:
        size: of the operands.
        chunk: tokens in a chunk.
        device: where the measured forms run; the reference runs in float64 on the same device.
    """
    errors = []
    full = lact_llm(chunk)
    for dtype, precision in (
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ):
        for name, rung in ladder(full).items():
            if rung.orthogonalize is None and precision == torch.bfloat16:
                continue
            spec, exact = with_precision(rung, precision), with_precision(rung, torch.float64)
            low = DrawnOperands.draw(spec, size).to(device, dtype, torch.float32)
            reference = low.to(device, torch.float64, torch.float64).run(exact, "recurrent")
            forms: list[Form] = ["recurrent"] if parallel_obstacles(spec) else ["recurrent", "parallel"]
            for form in forms:
                precision_name = None if rung.orthogonalize is None else _name(precision)
                error = relative_error(low.run(spec, form), reference)
                errors.append(Error(name, form, _name(dtype), precision_name, error))
    return errors


def with_precision(spec: InnerLoop, dtype: torch.dtype) -> InnerLoop:
    """`spec` with its Newton-Schulz, if any, in `dtype`."""
    return spec if spec.orthogonalize is None else spec.replace(orthogonalize=NewtonSchulz(dtype=dtype))


def scan_errors(counts: list[int], device: torch.device, state: int = 256) -> list[dict[str, float]]:
    """The float32 error of the momentum scan with gates near 1/2, against float64, for each number of chunks.

    Beside it the error of the division by a cumulative product, `cumprod` then `cumsum`.
    """
    rows = []
    for count in counts:
        generator = torch.Generator().manual_seed(0)
        gates = torch.sigmoid(0.2 * torch.randn(1, 1, count, generator=generator, dtype=torch.float64)).to(device)
        writes = torch.randn(1, 1, count, state, generator=generator, dtype=torch.float64).to(device)
        zero = writes.new_zeros(1, 1, state)
        exact = linear_scan(gates, writes, zero)
        low = linear_scan(gates.float(), writes.float(), zero.float())
        product = gates.float().cumprod(-1)[..., None]
        divided = (writes.float() / product).cumsum(2) * product
        rows.append(
            {
                "chunks": count,
                "by_products": relative_error(low, exact),
                "by_division": relative_error(divided.nan_to_num(0, 0, 0), exact),
            }
        )
    return rows


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
