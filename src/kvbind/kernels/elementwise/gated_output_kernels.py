"""The kernels of `gated_output`: tiles of whole heads, every element read and written once.

A tile's row is one head of one token; rows are numbered token after token. Widths that are three times a power of two are
held in three parts, which leaves no lane idle. A program has every so many-th tile, and backward a sum of its own of the
weight's gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvbind.kernels.common.activations import activate, slope
from kvbind.kernels.common.devices import multiprocessors, on_device_of
from kvbind.kernels.common.operands import cdiv, power_of_2
from kvbind.kernels.launching.launcher import Launcher

FORWARD_PROGRAMS, BACKWARD_PROGRAMS = 32, 8
"""Programs per multiprocessor, at most: forward, as many as keep it busy to the end; backward each leaves a partial sum."""

MOST_ROWS = 128
"""The most rows of a tile: one for each thread."""

VECTOR = 8
"""Elements of the widest vector that a thread loads: 16 bytes of a narrow dtype."""

_VECTOR = tl.constexpr(VECTOR)


@triton.jit
def _rows(tile, rows, length, H: tl.constexpr, BR: tl.constexpr):
    """A tile's rows, 64-bit: their numbers, sequences, tokens and heads, and which are there."""
    row = tl.cast(tile, tl.int64) * BR + tl.arange(0, BR)
    token = row // H
    return row, token // length, token % length, row % H, (row < rows)[:, None]


@triton.jit
def _start(batch, token, head, x_batch, x_token, x_head, ALIGNED: tl.constexpr):
    """Where rows start; `ALIGNED` says that vectors fit there, which the compiler cannot know of strides that vary."""
    start = batch * x_batch + token * x_token + head * x_head
    if ALIGNED:
        start = start // _VECTOR * _VECTOR
    return start[:, None]


@triton.jit
def _channels(part: tl.constexpr, BD: tl.constexpr):
    return (part * BD + tl.arange(0, BD))[None, :]


@triton.jit
def _load(x, start, real, D: tl.constexpr, PARTS: tl.constexpr, BD: tl.constexpr):
    """Rows in float32, part after part."""
    parts = ()
    for part in tl.static_range(PARTS):
        channel = _channels(part, BD)
        loaded = tl.load(x + start + channel, mask=real & (channel < D), other=0.0)
        parts += (loaded.to(tl.float32),)  # type: ignore[assignment]
    return parts


@triton.jit
def _store(x, row, part: tl.constexpr, value, real, D: tl.constexpr, BD: tl.constexpr):
    """A part of rows of a contiguous result."""
    channel = _channels(part, BD)
    tl.store(x + row[:, None] * D + channel, value.to(x.dtype.element_ty), mask=real & (channel < D))


@triton.jit
def _inverse_rms(x, eps, D: tl.constexpr, PARTS: tl.constexpr):
    """What rows are normalized by."""
    squares = x[0] * x[0]
    for part in tl.static_range(1, PARTS):
        squares += x[part] * x[part]
    return tl.rsqrt(tl.sum(squares, axis=1) / D + eps)


@triton.jit
def _logits(gate, batch, token, head, gate_batch, gate_token, gate_head, real):
    """The gate's logits, one for each row."""
    at = batch * gate_batch + token * gate_token + head * gate_head
    return tl.load(gate + at[:, None], mask=real, other=0.0).to(tl.float32)


@Launcher
@triton.jit(do_not_specialize=[
    "rows", "length", "fast_batch", "fast_token", "fast_head", "gate_batch", "gate_token", "gate_head", "mixed_batch",
    "mixed_token",
])  # fmt: skip
def _gated_forward(
    fast, weight, gate, mixed, y, eps, rows, length, fast_batch, fast_token, fast_head, gate_batch, gate_token, gate_head,
    mixed_batch, mixed_token,
    H: tl.constexpr, D: tl.constexpr, ALIGNED: tl.constexpr, BR: tl.constexpr, PARTS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Tiles of the result."""
    w = _load(weight, 0, True, D, PARTS, BD)
    for tile in range(tl.program_id(0), tl.cdiv(rows, BR), tl.num_programs(0)):
        row, batch, token, head, real = _rows(tile, rows, length, H, BR)
        x = _load(fast, _start(batch, token, head, fast_batch, fast_token, fast_head, ALIGNED), real, D, PARTS, BD)
        z = _load(mixed, _start(batch, token, head, mixed_batch, mixed_token, D, ALIGNED), real, D, PARTS, BD)
        factor = _inverse_rms(x, eps, D, PARTS)[:, None]
        if gate is not None:
            factor *= activate(_logits(gate, batch, token, head, gate_batch, gate_token, gate_head, real), "silu")
        for part in tl.static_range(PARTS):
            _store(y, row, part, z[part] + x[part] * w[part] * factor, real, D, BD)


@Launcher
@triton.jit(do_not_specialize=[
    "rows", "length", "dy_batch", "dy_token", "fast_batch", "fast_token", "fast_head", "gate_batch", "gate_token",
    "gate_head",
])  # fmt: skip
def _gated_backward(
    dy, fast, weight, gate, dfast, dweight, dgate, eps, rows, length, dy_batch, dy_token, fast_batch, fast_token, fast_head,
    gate_batch, gate_token, gate_head,
    H: tl.constexpr, D: tl.constexpr, ALIGNED: tl.constexpr, BR: tl.constexpr, PARTS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Tiles of the gradients of the fast weights' output and of the gate, and a partial sum of the weight's."""
    w = _load(weight, 0, True, D, PARTS, BD)
    total = ()
    for _ in tl.static_range(PARTS):
        total += (tl.zeros((BR, BD), tl.float32),)  # type: ignore[assignment]
    for tile in range(tl.program_id(0), tl.cdiv(rows, BR), tl.num_programs(0)):
        row, batch, token, head, real = _rows(tile, rows, length, H, BR)
        x = _load(fast, _start(batch, token, head, fast_batch, fast_token, fast_head, ALIGNED), real, D, PARTS, BD)
        d = _load(dy, _start(batch, token, head, dy_batch, dy_token, D, ALIGNED), real, D, PARTS, BD)
        inverse = _inverse_rms(x, eps, D, PARTS)[:, None]
        products = x[0] * w[0] * d[0]
        for part in tl.static_range(1, PARTS):
            products += x[part] * w[part] * d[part]
        along = tl.sum(products, axis=1)[:, None] * inverse
        factor = inverse
        if gate is not None:
            u = _logits(gate, batch, token, head, gate_batch, gate_token, gate_head, real)
            factor *= activate(u, "silu")
            tl.store(dgate + row[:, None], (along * slope(u, "silu")).to(dgate.dtype.element_ty), mask=real)
        back = along * inverse * factor / D
        sums = ()
        for part in tl.static_range(PARTS):
            scaled = d[part] * factor
            sums += (total[part] + x[part] * scaled,)  # type: ignore[assignment]
            _store(dfast, row, part, scaled * w[part] - x[part] * back, real, D, BD)
        total = sums
    for part in tl.static_range(PARTS):
        channel = _channels(part, BD)
        tl.store(dweight + tl.program_id(0) * D + channel, tl.sum(total[part], axis=0)[None, :], mask=channel < D)


def _tile(width: int) -> dict[str, int]:
    """How heads of this width are held: with four warps or more, 16 or 24 channels per thread."""
    thirds = width % 3 == 0 and (width // 3).bit_count() == 1
    columns = width // 3 if thirds else power_of_2(width)
    rows, per_warp = (1024, 256) if thirds else (2048, 512)
    return {
        "D": width, "BR": min(max(rows // columns, 1), MOST_ROWS), "PARTS": 3 if thirds else 1, "BD": columns,
        "num_warps": max(4, columns // per_warp),
    }  # fmt: skip


def _programs(x: Tensor, tiles: int, per_multiprocessor: int) -> int:
    return min(tiles, per_multiprocessor * multiprocessors(x, elsewhere=1))


def _aligned(width: int, *strides: int) -> bool:
    """Whether vectors fit at the start of every row."""
    return all(n % VECTOR == 0 for n in (width, *strides))


def forward(fast: Tensor, weight: Tensor, gate: Tensor | None, mixed: Tensor, y: Tensor, eps: float) -> None:
    """Write the result into y, contiguous; nothing is empty, and channels are side by side."""
    batch, length, heads, width = fast.shape
    rows, tile = batch * length * heads, _tile(width)
    of_fast, of_gate, of_mixed = fast.stride()[:3], (0, 0, 0) if gate is None else gate.stride(), mixed.stride()[:2]
    with on_device_of(fast):
        _gated_forward[_programs(fast, cdiv(rows, tile["BR"]), FORWARD_PROGRAMS),](
            fast, weight, gate, mixed, y, eps, rows, length, *of_fast, *of_gate, *of_mixed,
            H=heads, ALIGNED=_aligned(width, *of_fast, *of_mixed), **tile,
        )  # fmt: skip


def backward(
    dy: Tensor, fast: Tensor, weight: Tensor, gate: Tensor | None, dfast: Tensor, dgate: Tensor, eps: float
) -> Tensor:
    """Write gradients into dfast and dgate, contiguous; the weight's is returned, float32 `[D]`."""
    batch, length, heads, width = fast.shape
    rows, tile = batch * length * heads, _tile(width)
    of_dy, of_fast, of_gate = dy.stride()[:2], fast.stride()[:3], (0, 0, 0) if gate is None else gate.stride()
    programs = _programs(fast, cdiv(rows, tile["BR"]), BACKWARD_PROGRAMS)
    partial = torch.empty(programs, width, dtype=torch.float32, device=fast.device)
    with on_device_of(fast):
        _gated_backward[programs,](
            dy, fast, weight, gate, dfast, partial, dgate, eps, rows, length, *of_dy, *of_fast, *of_gate,
            H=heads, ALIGNED=_aligned(width, *of_dy, *of_fast), **tile,
        )  # fmt: skip
    return partial.sum(0)
