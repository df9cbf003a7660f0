"""Newton-Schulz of matrices that fit one program, which runs all iterations of its matrix; `operator` has the equations."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from kvbind.kernels.common.devices import capability, is_roomy
from kvbind.kernels.common.operands import dot_precision, power_of_2
from kvbind.kernels.launching.launcher import Launcher
from kvbind.kernels.newton_schulz.tiled import EPSILON, coefficient, inverse_norm

LOW = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
"""Precisions of the iteration, as Triton names them."""


def has_room(device: torch.device) -> bool:
    """Whether a program of a device may have 128 KiB of shared memory, and sums of so many products outside tensor memory.

    Of compute capability 10 and 11 sums are there, and these have no place: Triton 3.6 and 3.7 make an empty kernel.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return True
    index = torch.cuda.current_device() if device.index is None else device.index
    return is_roomy(device) and capability(index)[0] not in (10, 11)


def fits_one_program(rows: int, columns: int, dtype: torch.dtype, roomy: bool = True) -> bool:
    """Whether one program holds a matrix (`rows <= columns`) of `dtype` through all its iterations.

    Float32 products outside the matrix units are unrolled in full, so that fewer fit; and the gradient of the largest asks
    for what not all devices have (`has_room`).
    """
    return columns <= (32 if dtype == torch.float32 else 128 if roomy else 64)


@Launcher
@triton.jit(do_not_specialize=["n"])
def whole_forward(
    x, out, saved, squares, n, stride_batch, stride_row, stride_column,
    COEFFICIENTS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, OUT_ROW: tl.constexpr, OUT_COLUMN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All iterations of one matrix."""
    # saved [iterations, n, M, N] and squares [n] are written unless None
    batch = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, BM)
    columns = tl.arange(0, BN)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    x += batch * stride_batch + rows.to(tl.int64)[:, None] * stride_row + columns.to(tl.int64)[None, :] * stride_column
    value = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    square = tl.sum(tl.sum(value * value, 1), 0)
    if saved is not None:
        tl.store(squares + batch, square)
    value *= 1.0 / (tl.sqrt(square) + EPSILON)
    for i in range(0, len(COEFFICIENTS) // 3):
        low = value.to(TYPE)
        if saved is not None:
            tl.store(saved + (i * n + batch) * (M * N) + rows[:, None] * N + columns[None, :], low, mask=inside)
        gram = tl.dot(low, tl.trans(low), input_precision=PRECISION).to(TYPE)
        poly = tl.dot(gram, gram, input_precision=PRECISION) * coefficient(COEFFICIENTS, i, 2)
        poly += coefficient(COEFFICIENTS, i, 1) * gram.to(tl.float32)
        value = tl.dot(poly.to(TYPE), low, input_precision=PRECISION)
        value += coefficient(COEFFICIENTS, i, 0) * low.to(tl.float32)
    out += batch * (M * N)
    tl.store(out + rows[:, None] * OUT_ROW + columns[None, :] * OUT_COLUMN, value.to(out.dtype.element_ty), mask=inside)


@Launcher
@triton.jit(do_not_specialize=["n"])
def whole_backward(
    saved, squares, grad, out, n, stride_batch, stride_row, stride_column,
    COEFFICIENTS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, OUT_ROW: tl.constexpr, OUT_COLUMN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of `whole_forward`, one matrix per program."""
    ITERATIONS: tl.constexpr = len(COEFFICIENTS) // 3
    batch = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, BM)
    columns = tl.arange(0, BN)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    grad += batch * stride_batch + rows.to(tl.int64)[:, None] * stride_row + columns.to(tl.int64)[None, :] * stride_column
    value = tl.load(grad, mask=inside, other=0.0).to(tl.float32)
    at = rows[:, None] * N + columns[None, :]
    for back in range(0, ITERATIONS):
        i = ITERATIONS - 1 - back
        low = value.to(TYPE)
        x = tl.load(saved + (i * n + batch) * (M * N) + at, mask=inside, other=0.0)
        b = coefficient(COEFFICIENTS, i, 1)
        c = coefficient(COEFFICIENTS, i, 2)
        gram = tl.dot(x, tl.trans(x), input_precision=PRECISION).to(TYPE)
        e = tl.dot(low, tl.trans(x), input_precision=PRECISION)
        e = tl.dot(x, tl.trans(low), e, input_precision=PRECISION).to(TYPE)
        f = tl.dot(e, gram, input_precision=PRECISION)
        f = tl.dot(gram, e, f, input_precision=PRECISION)
        # f is used up before the last product's factor is formed, which saves registers
        f = (c * f + b * e.to(tl.float32)).to(TYPE)
        value = tl.dot(f, x, input_precision=PRECISION)
        value += coefficient(COEFFICIENTS, i, 0) * low.to(tl.float32)
        poly = (c * tl.dot(gram, gram, input_precision=PRECISION) + b * gram.to(tl.float32)).to(TYPE)
        value = tl.dot(poly, low, value, input_precision=PRECISION)
    scale, norm = inverse_norm(squares + batch, 1)
    x = tl.load(saved + batch * (M * N) + at, mask=inside, other=0.0).to(tl.float32)
    # over both axes at once: of products one after the other does not compile for capability 10.0 (Triton 3.6, 3.7)
    along = tl.where(norm > 0, tl.sum(value * x) / tl.where(norm > 0, norm, 1.0), 0.0)
    value = scale * value - along * x
    out += batch * (M * N)
    tl.store(out + rows[:, None] * OUT_ROW + columns[None, :] * OUT_COLUMN, value.to(out.dtype.element_ty), mask=inside)


def whole_options(rows: int, columns: int, dtype: torch.dtype) -> dict[str, Any]:
    """Launch options of the kernels that hold a whole matrix."""
    height, width = (max(16, power_of_2(size)) for size in (rows, columns))
    return {
        "BM": height,
        "BN": width,
        "TYPE": LOW[dtype],
        "PRECISION": dot_precision(dtype),
        "num_warps": 8 if width > 64 else 4,
        "num_stages": 1,
    }
