"""What `kvbind bench kernels` measures in processes of their own."""

from __future__ import annotations

import contextlib
from typing import Any

from kvbind.bench.harness.fla_tuning import compiling_configurations


def first_calls(fields: dict[str, Any]) -> dict[str, Any]:
    """Seconds of the first forward and backward pass of a case, of one more, and of the first at other lengths.

    The first contains the import of kernels, their compilation and their tuning; not that of PyTorch, nor the start of
    the device, its matrix library and autograd.
    """
    import torch

    from kvbind.bench.harness.named_operands import draw_leaves, in_precision, run
    from kvbind.bench.harness.timing import now
    from kvbind.bench.kernels.cases import SpeedCase

    case = SpeedCase.of(fields["case"])
    device = torch.device(fields["device"])
    # what PyTorch starts and imports at its own first product and gradient
    warm = torch.ones(64, 64, device=device, requires_grad=True)
    torch.autograd.grad(warm @ warm, warm, torch.ones_like(warm))

    def once(tokens: int) -> float:
        size = case.size_at(tokens)
        leaves = in_precision(draw_leaves(case.spec, size, device), case.torch_dtype, torch.float32, grad=True)
        begin = now(device)
        y, _ = run(case.spec, leaves, case.form)
        torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y), allow_unused=True)
        return now(device) - begin

    tokens = case.tokens
    first, again = once(tokens), once(tokens)
    others = {str(other): once(other) for other in (tokens + case.chunk, tokens // 2 + 37, tokens - 1)}
    return {"first_seconds": first, "again_seconds": again, "new_length_seconds": others}


def measured(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a case's row: under `torch.compile`, with the seconds of its first forward and training calls."""
    import torch

    from kvbind.bench.kernels.cases import SpeedCase
    from kvbind.bench.kernels.measure import measure

    case = SpeedCase.of(fields["case"])
    with compiling_configurations() if case.by == "fla" else contextlib.nullcontext():
        return measure(case, torch.device(fields["device"]), fields["seconds"])
