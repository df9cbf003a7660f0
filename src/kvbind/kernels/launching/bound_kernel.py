"""Kernels bound to everything but their tensors, so that launching one again costs the host microseconds.

A call whose shapes, strides and dtypes were met before launches the same kernels on the same grids with the same numbers;
nothing but addresses differs. What is looked up and derived for a launch is therefore stored with it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from types import BuiltinFunctionType
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

    __slots__ = ("constants", "grid", "kernel", "launch", "numbers", "views")

    def __init__(
        self, kernel: Any, views: Sequence[View | None], grid: Sequence[int], numbers: Sequence[Any], **constants: Any
    ) -> None:
        self.kernel, self.views, self.numbers, self.constants = kernel, tuple(views), tuple(numbers), constants
        self.grid = (*grid, 1, 1)[:3]
        self.launch: Callable[..., None] | None = None

    def __call__(self, stream: int, *tensors: Any) -> None:
        """Launch on a stream of the current device, which is that of the tensors; in a warm-up, compile."""
        if self.launch is None:
            self._first(tensors)
        else:
            self.launch(stream, tensors)

    def _first(self, tensors: Sequence[Any]) -> None:
        from triton.tools.tensor_descriptor import TensorDescriptor

        described = [
            x if view is None else TensorDescriptor(x, view.shape, view.strides, view.block_shape)
            for view, x in zip(self.views, tensors, strict=True)
        ]
        if warming_up():
            self.kernel.warmup(*described, *self.numbers, grid=self.grid, **self.constants)
            return
        compiled = self.kernel[self.grid](*described, *self.numbers, **self.constants)
        # the interpreter has none to give, nor has what compiles for GPUs that are not there
        if compiled is None or interpreted():
            return
        rest = (*self.numbers, *(self.constants[name] for name in self.kernel.arg_names if name in self.constants))
        self.launch = _straight(compiled, self.grid, self.views, rest) or _usual(compiled, self.grid, self.views, rest)


def _usual(compiled: Any, grid: tuple[int, ...], views: Sequence[View | None], rest: tuple[Any, ...]) -> Callable[..., None]:
    """A launch through Triton's launcher of a compiled kernel."""
    run, function, packed = compiled.run, compiled.function, compiled.packed_metadata

    def launch(stream: int, tensors: Sequence[Any]) -> None:
        # of an address given as a number Triton does not ask the driver whether the device can reach it
        args = [
            x if x is None else x.data_ptr() if view is None else view(x) for view, x in zip(views, tensors, strict=True)
        ]
        run(*grid, stream, function, packed, None, None, None, *args, *rest)

    return launch


def _straight(
    compiled: Any, grid: tuple[int, ...], views: Sequence[View | None], rest: tuple[Any, ...]
) -> Callable[..., None] | None:
    """A launch by the function that Triton 3.6 made in C for a kernel's signature; None where things are not as there.

    Triton's own wrappers around it encode a descriptor for every tensor of every launch. Here each tensor's descriptors are
    kept by address: the allocator gives the same ones again.
    """
    run = compiled.run
    made: Any = getattr(run, "launch", None)
    metas: Sequence[Any] = ()
    if any(views):
        around = inspect.getclosurevars(made).nonlocals if inspect.isfunction(made) else {}
        made, metas = around.get("launcher"), around.get("tensordesc_meta") or ()
    known = isinstance(made, BuiltinFunctionType) and made.__module__ == "__triton_launcher"
    scratch = getattr(run, "global_scratch_size", 1) or getattr(run, "profile_scratch_size", 1)
    if not known or scratch or len(metas) != sum(view is not None for view in views) or not all(metas):
        return None
    queue = iter(metas)
    encoders = [None if view is None else _Encoder(*_descriptors(), view, next(queue)) for view in views]
    before = (run.launch_cooperative_grid, run.launch_pdl, None, None, compiled.packed_metadata, None, None, None)
    function = compiled.function

    def launch(stream: int, tensors: Sequence[Any]) -> None:
        args: list[Any] = []
        for encoder, x in zip(encoders, tensors, strict=True):
            if encoder is None:
                args.append(x if x is None else x.data_ptr())
            else:
                args += encoder(x.data_ptr())
        made(*grid, stream, function, *before, *args, *rest)

    return launch


def _descriptors() -> tuple[Any, Any]:
    """What encodes a descriptor, and the numbers that it has for kinds of elements."""
    from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST
    from triton.runtime.driver import driver

    return driver.active.utils.fill_tma_descriptor, TMA_DTYPE_DEVICE_TO_HOST


class _Encoder:
    """The arguments that stand for one tensor that a kernel takes by descriptor, by its address."""

    MOST = 64
    """Addresses that are remembered."""

    __slots__ = ("build", "known", "shape")

    def __init__(self, encode: Any, kinds: Any, view: View, meta: Any) -> None:
        if meta["fp4_padded"]:
            raise TypeError("no kernel of this library takes 4-bit numbers by descriptor")
        about = meta["swizzle"], meta["elem_size"], kinds[meta["elem_type"]], meta["block_size"]
        self.build = lambda address: encode(address, *about, view.shape, view.strides, 0)
        self.shape = (*view.shape, *view.strides)
        self.known: dict[int, tuple[Any, ...]] = {}

    def __call__(self, address: int) -> tuple[Any, ...]:
        found = self.known.get(address)
        if found is None:
            if len(self.known) >= self.MOST:
                self.known.clear()
            found = self.known[address] = self.build(address), *self.shape
        return found


def stream_of(device: int) -> int:
    """The handle of a CUDA device's current stream; 0 off GPUs, where kernels are interpreted."""
    return torch._C._cuda_getCurrentRawStream(device) if device >= 0 else 0
