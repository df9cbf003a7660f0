"""The kernels of `swiglu`: tiles of rows and up to 1024 channels, every element read and written once."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from kvbind.kernels.common.activations import activate, slope
from kvbind.kernels.common.devices import on_device_of
from kvbind.kernels.common.operands import cdiv, last_contiguous, power_of_2
from kvbind.kernels.launching.launcher import Launcher

WIDEST_TILE = 1024
"""The most channels of a tile."""

TILE = 2048
"""Elements of a tile: with four warps, two vectors of 16 bytes per thread of each bfloat16 operand."""

VECTOR = 8
"""Elements of the widest vector that a thread loads: 16 bytes of a narrow dtype."""

_VECTOR = tl.constexpr(VECTOR)


@triton.jit
def _row(row, stride, ALIGNED: tl.constexpr):
    """Where rows start; `ALIGNED` says that vectors fit there, which the compiler cannot know of strides that vary."""
    start = row * stride
    if ALIGNED:
        start = start // _VECTOR * _VECTOR
    return start[:, None]


@triton.jit
def _tile(rows, W: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """A program's rows, its channels `[1, BC]`, and which of the tile is there."""
    ACROSS: tl.constexpr = (W + BC - 1) // BC
    row = (tl.program_id(0) // ACROSS).to(tl.int64) * BR + tl.arange(0, BR)
    channel = (tl.program_id(0) % ACROSS * BC + tl.arange(0, BC))[None, :]
    return row, channel, (row < rows)[:, None] & (channel < W)


@Launcher
@triton.jit(do_not_specialize=["rows", "gate_row", "up_row"])
def _swiglu_forward(
    gate, up, y, rows, gate_row, up_row, W: tl.constexpr, ALIGNED: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr
):
    """A tile of the result."""
    row, channel, there = _tile(rows, W, BR, BC)
    u = tl.load(gate + _row(row, gate_row, ALIGNED) + channel, mask=there, other=0.0).to(tl.float32)
    x = tl.load(up + _row(row, up_row, ALIGNED) + channel, mask=there, other=0.0).to(tl.float32)
    tl.store(y + _row(row, W, ALIGNED) + channel, (activate(u, "silu") * x).to(y.dtype.element_ty), mask=there)


@Launcher
@triton.jit(do_not_specialize=["rows", "dy_row", "gate_row", "up_row"])
def _swiglu_backward(
    dy, gate, up, dgate, dup, rows, dy_row, gate_row, up_row,
    W: tl.constexpr, ALIGNED: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """A tile of both gradients."""
    row, channel, there = _tile(rows, W, BR, BC)
    d = tl.load(dy + _row(row, dy_row, ALIGNED) + channel, mask=there, other=0.0).to(tl.float32)
    u = tl.load(gate + _row(row, gate_row, ALIGNED) + channel, mask=there, other=0.0).to(tl.float32)
    x = tl.load(up + _row(row, up_row, ALIGNED) + channel, mask=there, other=0.0).to(tl.float32)
    at = _row(row, W, ALIGNED) + channel
    tl.store(dgate + at, (d * x * slope(u, "silu")).to(dgate.dtype.element_ty), mask=there)
    tl.store(dup + at, (d * activate(u, "silu")).to(dup.dtype.element_ty), mask=there)


def _launch(kernel: Any, sources: tuple[Tensor, ...], results: tuple[Tensor, ...]) -> None:
    """Launch on the rows of tensors `[..., W]` with elements; `results` are contiguous."""
    width = sources[0].shape[-1]
    rows = results[0].numel() // width
    # views where rows are evenly spaced, else copies
    sources = tuple(last_contiguous(x).reshape(rows, width) for x in sources)
    strides = [x.stride(0) for x in sources]
    columns = min(WIDEST_TILE, power_of_2(width))
    at_once = TILE // columns
    with on_device_of(sources[0]):
        kernel[cdiv(rows, at_once) * cdiv(width, columns),](
            *sources, *results, rows, *strides,
            W=width, ALIGNED=all(n % VECTOR == 0 for n in (width, *strides)), BR=at_once, BC=columns, num_warps=4,
        )  # fmt: skip


def forward(gate: Tensor, up: Tensor, y: Tensor) -> None:
    """Write the result into y."""
    _launch(_swiglu_forward, (gate, up), (y,))


def backward(dy: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor) -> None:
    """Write the gradients into dgate and dup."""
    _launch(_swiglu_backward, (dy, gate, up), (dgate, dup))
