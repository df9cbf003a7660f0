"""Operands as kernels take them: their dtypes, their layout in memory, and the precision in which they are multiplied."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Of operands that kernels take."""


def last_contiguous(x: Tensor) -> Tensor:
    """`x` with the numbers of its last axis side by side, copied where they are not."""
    return x if x.stride(-1) == 1 else x.contiguous()


_shared: dict[tuple[torch.device, int, float], Tensor] = {}


def zeros(device: torch.device, count: int) -> Tensor:
    """float32 zeros that whoever asks shares; never written."""
    return filled(device, count, 0.0)


def filled(device: torch.device, count: int, value: float) -> Tensor:
    """One float32 number, so many times, that whoever asks shares; never written."""
    found = _shared.get((device, count, value))
    if found is None:
        with torch.inference_mode(False):
            found = torch.full((count,), value, dtype=torch.float32, device=device)
        if device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                # a graph fills them when it is replayed, and never those of others
                return found
            # who asks next may be on another stream
            torch.cuda.current_stream(device).synchronize()
        _shared[device, count, value] = found
    return found


def laid_out(x: Tensor, strides: Sequence[int]) -> Tensor:
    """A tensor as launches that are bound to strides take it, at an address that is a multiple of 16."""
    found = x.stride()
    if not x.data_ptr() % 16 and (
        found == strides or all(x.shape[i] == 1 or found[i] == strides[i] for i in range(x.dim()))
    ):
        return x
    # of numbers that stand for many, one
    once = x[tuple(slice(None if stride else 1) for stride in strides)]
    return torch.empty_strided(once.shape, strides, dtype=x.dtype, device=x.device).copy_(once).expand(x.shape)


def ready(x: Tensor) -> Tensor:
    """A gradient as launches take it: contiguous, at an address that is a multiple of 16."""
    return x if x.is_contiguous() and not x.data_ptr() % 16 else x.clone(memory_format=torch.contiguous_format)


def dot_precision(dtype: torch.dtype) -> str:
    """Triton's `input_precision` for products of operands of `dtype`.

    Narrow operands are exact in any mode; float32 is multiplied in float32 unless PyTorch is told to use TF32
    (`torch.set_float32_matmul_precision`).
    """
    return "tf32" if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"


def cdiv(a: int, b: int) -> int:
    """`a / b`, rounded up; `triton.cdiv` is slower on the host than all else that a launch computes there."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The least power of two that is no less than `n`; `triton.next_power_of_2` takes the host 4 us."""
    return 1 << (n - 1).bit_length()


def sequence_count(name: str, boundaries: Tensor | None, batch: int) -> int:
    """How many sequences a call has: the rows of its batch, or those between boundaries in one row.

    Args:
        name: of the boundaries' argument.
        boundaries: `[n + 1]`, or None.
        batch: rows.

    Raises:
        TypeError: boundaries that are no whole numbers.
        ValueError: boundaries of another shape, or of more rows than one.
    """
    if boundaries is None:
        return batch
    if boundaries.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64; got {boundaries.dtype}")
    if boundaries.dim() != 1 or len(boundaries) < 2:
        raise ValueError(f"{name} must be [n + 1] for n >= 1 sequences; got shape {list(boundaries.shape)}")
    if batch != 1:
        raise ValueError(f"{name} must come with B = 1, sequences packed into one row; got B = {batch}")
    return len(boundaries) - 1
