"""`kvbind bench layer`: the elementwise work around an inner loop, on kernels and on PyTorch's operators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from kvbind.bench.harness.device_time import duration
from kvbind.bench.harness.kernel_switch import without_kernels
from kvbind.bench.harness.named_operands import Leaves
from kvbind.bench.layers.operators import LayerOperator, slopes

BY = ("kernels", "PyTorch")


def bench_layer(
    pieces: list[LayerOperator], dtype: torch.dtype, device: torch.device, *, seconds: float = 0.2
) -> Iterator[dict[str, Any]]:
    """Time pieces of a layer forward, and forward and backward with gradients of every operand.

    Args:
        pieces: of a layer, such as `kvbind.bench.layers.operators.pieces` makes.
        dtype: the working precision.
        device: where to run.
        seconds: how long to time each pass, and each again as a CUDA graph.

    Yields:
        A row for each piece, by each of `BY`: its name; `forward_bytes`, each operand read once and each result written
        once; `training_bytes`, that, each operand and each gradient of a result read once more, and each gradient of an
        operand written once; `forward` and `training`, the fields of a `Duration`.
    """
    for piece in pieces:
        own = piece.operands(piece.draw(device, dtype), dtype)
        for by in BY:
            with nullcontext() if by == "kernels" else without_kernels():
                timed = _timed(piece, own, dtype, device, seconds)
            yield {"piece": piece.name.removeprefix("layer: "), "by": by, **timed}


def _timed(piece: LayerOperator, own: Leaves, dtype: torch.dtype, device: torch.device, seconds: float) -> dict[str, Any]:
    @torch.no_grad()
    def forward() -> tuple[Tensor, ...]:
        return piece.call(own, dtype)

    def training() -> object:
        return torch.autograd.grad(piece.call(own, dtype), list(own.values()), arriving)

    results = forward()
    arriving = slopes(results)
    read, written = (sum(x.nbytes for x in tensors) for tensors in (own.values(), results))
    del results
    return {
        "forward_bytes": read + written,
        "training_bytes": 3 * read + 2 * written,
        "forward": asdict(duration(forward, device, seconds=seconds)),
        "training": asdict(duration(training, device, seconds=seconds)),
    }
