"""Kernels bound to everything but their tensors, so that launching one again costs the host microseconds.

A call whose shapes, strides and dtypes were met before launches the same kernels on the same grids with the same numbers;
nothing but addresses differs. What is looked up and derived for a launch is therefore stored with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvbind.kernels.common.devices import interpreted
from kvbind.kernels.launching.warm_up import warming_up


class Block:
    """A tensor as the tensor memory accelerator sees it: an address, a shape, strides and the block that one fetch brings.

    What Triton's `TensorDescriptor` holds, of 3.6 and 3.7, without its checks, which whoever binds a launch has made once.
    """

    __slots__ = ("base", "block_shape", "padding", "round_f32_to_tf32", "shape", "strides")

    def __init__(self, base: Tensor, shape: Sequence[int], strides: Sequence[int], block_shape: Sequence[int]) -> None:
        self.base, self.shape, self.strides, self.block_shape = base, shape, strides, block_shape
        self.padding, self.round_f32_to_tf32 = "zero", False


class View:
    """How a tensor becomes a `Block`: all of it but the address."""

    __slots__ = ("block_shape", "shape", "strides")

    def __init__(self, shape: Sequence[int], strides: Sequence[int], block_shape: Sequence[int]) -> None:
        self.shape, self.strides, self.block_shape = list(shape), list(strides), list(block_shape)

    def __call__(self, base: Tensor) -> Block:
        return Block(base, self.shape, self.strides, self.block_shape)


class BoundKernel:
    """A `triton.jit` kernel bound to a grid, integers and constants; called with its tensors.

    Args:
        kernel: the kernel; its first arguments are the tensors.
        views: for each tensor a `View`, or None where the kernel takes its address, or is given none. Addresses must be
            multiples of 16.
        grid: programs along each axis.
        numbers: the arguments after the tensors.
        constants: of the compiler, with `num_warps` and `num_stages`.
    """

    __slots__ = ("compiled", "constants", "function", "grid", "kernel", "numbers", "packed", "rest", "run", "views")

    def __init__(
        self, kernel: Any, views: Sequence[View | None], grid: Sequence[int], numbers: Sequence[Any], **constants: Any
    ) -> None:
        self.kernel, self.views, self.numbers, self.constants = kernel, tuple(views), tuple(numbers), constants
        self.grid = (*grid, 1, 1)[:3]
        self.compiled: Any = None
        self.rest = (*numbers, *(constants[name] for name in kernel.arg_names if name in constants))

    def __call__(self, stream: int, *tensors: Any) -> None:
        """Launch on a stream of the current device, which is that of the tensors; in a warm-up, compile."""
        if self.compiled is None:
            self._first([x if view is None else view(x) for view, x in zip(self.views, tensors, strict=True)])
        else:
            # of an address given as a number Triton does not ask the driver whether the device can reach it
            args = [
                x if x is None else x.data_ptr() if view is None else view(x)
                for view, x in zip(self.views, tensors, strict=True)
            ]
            self.run(*self.grid, stream, self.function, self.packed, None, None, None, *args, *self.rest)

    def _first(self, args: list[Any]) -> None:
        from triton.tools.tensor_descriptor import TensorDescriptor

        described = [
            TensorDescriptor(x.base, x.shape, x.strides, x.block_shape) if isinstance(x, Block) else x for x in args
        ]
        if warming_up():
            self.kernel.warmup(*described, *self.numbers, grid=self.grid, **self.constants)
            return
        compiled = self.kernel[self.grid](*described, *self.numbers, **self.constants)
        # the interpreter has none to give, nor has what compiles for GPUs that are not there
        if compiled is None or interpreted():
            return
        self.run, self.function, self.packed = compiled.run, compiled.function, compiled.packed_metadata
        self.compiled = compiled


def stream_of(device: int) -> int:
    """The handle of a CUDA device's current stream; 0 off GPUs, where kernels are interpreted."""
    return torch._C._cuda_getCurrentRawStream(device) if device >= 0 else 0
