"""Repairs of Triton 3.6's interpreter, which runs kernels on a CPU for tests (`TRITON_INTERPRET=1`).

It holds bfloat16 as 16-bit integers: it multiplies those in `tl.dot`, and cuts float32 off where GPUs round to nearest. Of a
number and NaN it takes NaN for the maximum and the minimum, where GPUs take the number. What GPUs leave open it decides:
programs run in their order, and a masked load without `other` brings zeros.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def _widened(handle: Any) -> Any:
    if handle.dtype.scalar != tl.bfloat16:
        return handle.data.astype(np.float32)
    return (handle.data.astype(np.uint32) << 16).view(np.float32)


def _anything(pointers: Any) -> Any:
    """NaN, or a large number of integers, in the shape of some pointers."""
    dtype = pointers.get_element_ty()
    if dtype.is_floating():
        numbers = np.full(pointers.data.shape, np.nan, np.float32)
        return InterpreterBuilder.cast_impl(InterpreterBuilder(), TensorHandle(numbers, tl.float32), dtype)
    bits = np.full(pointers.data.shape, 1 << 30, np.int32)
    return InterpreterBuilder.cast_impl(InterpreterBuilder(), TensorHandle(bits, tl.int32), dtype)


def _scattered(place: int, count: int) -> int:
    """The program that runs in a place of the order: each in one, far from those that are next to it."""
    step = round(0.618 * count)
    while math.gcd(step, count) != 1:
        step += 1
    return (place * step + count // 2) % count


def repair() -> None:
    """Make the interpreter multiply, round and compare as GPUs do, and decide nothing that they leave open; once."""
    if getattr(InterpreterBuilder, "rounds_bfloat16", False):
        return
    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot
    load, go_to = InterpreterBuilder.create_masked_load, InterpreterBuilder.set_grid_idx

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            bits = torch.from_numpy(np.array(source.data)).bfloat16().view(torch.int16).numpy().view(np.uint16)
            return TensorHandle(bits, tl.bfloat16)
        return cast(self, source, target)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        if a.dtype.scalar in (tl.bfloat16, tl.float16):
            return TensorHandle(_widened(a) @ _widened(b) + d.data, d.dtype.scalar)
        return dot(self, a, b, d, *rest)

    def create_masked_load(self: Any, pointers: Any, mask: Any, other: Any, *rest: Any, **named: Any) -> Any:
        if other is None and not np.all(mask.data):
            other = _anything(pointers)
        return load(self, pointers, mask, other, *rest, **named)

    def set_grid_idx(self: Any, x: int, y: int, z: int) -> None:
        _, height, depth = self.grid_dim
        index = _scattered((x * height + y) * depth + z, math.prod(self.grid_dim))
        go_to(self, index // (height * depth), index // depth % height, index % depth)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast_impl, create_dot
    InterpreterBuilder.create_masked_load, InterpreterBuilder.set_grid_idx = create_masked_load, set_grid_idx
    InterpreterBuilder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    InterpreterBuilder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
    InterpreterBuilder.rounds_bfloat16 = True
