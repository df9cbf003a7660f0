"""Repairs of Triton 3.6's interpreter, which runs kernels on a CPU for tests (`TRITON_INTERPRET=1`).

It holds bfloat16 as 16-bit integers: it multiplies those in `tl.dot`, and cuts float32 off where GPUs round to nearest. Of a
number and NaN it takes NaN for the maximum and the minimum, where GPUs take the number.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def _widened(handle: Any) -> Any:
    if handle.dtype.scalar != tl.bfloat16:
        return handle.data.astype(np.float32)
    return (handle.data.astype(np.uint32) << 16).view(np.float32)


def repair() -> None:
    """Make the interpreter multiply, round and compare as GPUs do; a second call changes nothing."""
    if getattr(InterpreterBuilder, "rounds_bfloat16", False):
        return
    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            bits = torch.from_numpy(np.array(source.data)).bfloat16().view(torch.int16).numpy().view(np.uint16)
            return TensorHandle(bits, tl.bfloat16)
        return cast(self, source, target)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        if a.dtype.scalar in (tl.bfloat16, tl.float16):
            return TensorHandle(_widened(a) @ _widened(b) + d.data, d.dtype.scalar)
        return dot(self, a, b, d, *rest)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast_impl, create_dot
    InterpreterBuilder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    InterpreterBuilder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
    InterpreterBuilder.rounds_bfloat16 = True
