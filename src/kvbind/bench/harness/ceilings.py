"""What the device can do at the most: the measured ceilings that the limit of a call is counted from."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvbind.bench.harness.device_time import duration
from kvbind.bench.harness.operands import Size
from kvbind.forms.explained.costs import Shapes, cost
from kvbind.inner.spec import InnerLoop


@dataclass(frozen=True)
class Ceilings:
    """Rates of one device, measured.

    Attributes:
        matmul_flops: floating-point operations per second of one square matrix product.
        matmul_size: its rows and columns.
        dtype: of its operands.
        copy_bytes: bytes per second, read and written, of a copy on the device.
    """

    matmul_flops: float
    matmul_size: int
    dtype: str
    copy_bytes: float


def measure_ceilings(device: torch.device, dtype: torch.dtype, *, seconds: float = 0.5) -> Ceilings:
    """Time a matrix product (8192^3 on a GPU, 512^3 elsewhere) and a copy (1 GiB on a GPU, 16 MiB elsewhere)."""
    cuda = device.type == "cuda"
    size, count = (8192, 1 << 30) if cuda else (512, 1 << 24)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    matmul = duration(lambda: a @ b, device, seconds=seconds, graph=False).seconds
    source = torch.zeros(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = duration(lambda: target.copy_(source), device, seconds=seconds, graph=False).seconds
    return Ceilings(2 * size**3 / matmul, size, str(dtype).removeprefix("torch."), 2 * count / copy)


@dataclass(frozen=True)
class LeastWork:
    """What one call needs at the least.

    Attributes:
        flops: floating-point operations of its matrix products.
        bytes: what it must read and write.
    """

    flops: float
    bytes: float

    def limit(self, ceilings: Ceilings) -> float:
        """The shortest time, seconds: operations at the matrix product's rate or bytes at the copy's, what is longer."""
        return max(self.flops / ceilings.matmul_flops, self.bytes / ceilings.copy_bytes)


def forward_work(spec: InnerLoop, size: Size, dtype: torch.dtype, hidden: int | None = None) -> LeastWork:
    """A forward pass, as `kvbind.explain` counts it.

    At rung 2 that is `12 Dk Dh` operations per token and head and, for Newton-Schulz, `30 D^3` per chunk and head; at rung
    3 `4 D^2` and the same; at rung 6 `4 Dk Dv`. Each of q, k, v, rates and gates is read once, the output written once.
    """
    needs = cost(spec, Shapes(size.heads, size.width, size.width, hidden or size.width, size.tokens, dtype))
    tokens = size.batch * size.tokens
    return LeastWork(needs.flops_per_token * tokens, needs.bytes_per_token * tokens)


def training_work(forward: LeastWork, size: Size, dtype: torch.dtype) -> LeastWork:
    """A forward and a backward pass.

    Each matrix product has two in the backward pass, and nothing is computed twice: three times the operations. Backward
    reads what forward read and the output's gradient, and writes a gradient for each of what was read: three times the
    bytes less one output.
    """
    output = size.batch * size.tokens * size.heads * size.width * dtype.itemsize
    return LeastWork(3 * forward.flops, 3 * forward.bytes - output)


def attention_work(size: Size, dtype: torch.dtype) -> tuple[LeastWork, LeastWork]:
    """A forward pass, and a forward and backward pass, of causal softmax attention.

    Forward has two products over half of `T x T`, backward five (the scores are computed again).
    """
    channels = size.batch * size.heads * size.width
    product, row = size.tokens**2 * channels, size.tokens * channels * dtype.itemsize
    return LeastWork(2 * product, 4 * row), LeastWork(7 * product, 11 * row)
