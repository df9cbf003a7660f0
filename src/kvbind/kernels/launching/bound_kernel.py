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

    def __call__(self, base: Tensor) -> tuple[Block]:
        return (Block(base, self.shape, self.strides, self.block_shape),)


class BoundKernel:
    """A `triton.jit` kernel bound to a grid, integers and constants; called with its tensors.

    Args:
        kernel: the kernel; its first arguments are the tensors.
        views: for each tensor a `View`, or None where the kernel takes its address, or is given none; views come first.
            Addresses must be multiples of 16.
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
        self.launch: Callable[[int, Sequence[Any]], None] | None = None

    def __call__(self, stream: int, *tensors: Any) -> None:
        """Launch on a stream of the current device, which is that of the tensors; in a warm-up, compile.

        Of tensors, those that are None are so in every launch.
        """
        launch = self.launch
        if launch is None:
            self._first(tensors)
        else:
            launch(stream, tensors)

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
        views = [view for view in self.views if view is not None]
        self.launch = _bound(compiled, self.grid, views, rest, any(x is None for x in tensors))


def _bound(
    compiled: Any, grid: tuple[int, ...], views: Sequence[View], rest: tuple[Any, ...], partial: bool
) -> Callable[[int, Sequence[Any]], None]:
    """What launches again, of tensors that begin with those of the views; some are None if `partial`."""
    call, middle, metas = caller_of(compiled)
    makers: Sequence[Callable[[Any], Sequence[Any]]] = views
    if metas is not None and len(metas) == len(views):
        makers = [_Encoder(*_descriptors(), view, meta) for view, meta in zip(views, metas, strict=True)]
    else:
        call, middle = _usual(compiled)
    (x, y, z), count = grid, len(views)

    def launch(stream: int, tensors: Sequence[Any]) -> None:
        # an address is given as a number: Triton does not ask the driver then whether the device can reach it
        if not count and not partial:
            call(x, y, z, stream, *middle, *map(Tensor.data_ptr, tensors), *rest)
            return
        args: list[Any] = []
        for make, tensor in zip(makers, tensors, strict=False):
            args += make(tensor)
        args += [None if tensor is None else tensor.data_ptr() for tensor in tensors[count:]]
        call(x, y, z, stream, *middle, *args, *rest)

    return launch


def caller_of(compiled: Any) -> tuple[Callable[..., None], tuple[Any, ...], Sequence[Any] | None]:
    """What launches a compiled kernel, as `call(x, y, z, stream, *middle, *args)`.

    It is the function that Triton 3.6 made in C for the kernel's signature, without the wrappers around it, and where
    things are not as there, Triton's launcher.

    Returns:
        The function; what it takes between a stream and the kernel's arguments; and how each tensor that the kernel takes by
        descriptor is encoded, or None where Triton does it.
    """
    run = compiled.run
    made: Any = getattr(run, "launch", None)
    metas: Sequence[Any] = ()
    if inspect.isfunction(made):
        around = inspect.getclosurevars(made).nonlocals
        made, metas = around.get("launcher"), around.get("tensordesc_meta") or (None,)
    known = isinstance(made, BuiltinFunctionType) and made.__module__ == "__triton_launcher"
    scratch = getattr(run, "global_scratch_size", 1) or getattr(run, "profile_scratch_size", 1)
    if not known or scratch or not all(metas):
        return *_usual(compiled), None
    flags = run.launch_cooperative_grid, run.launch_pdl
    return made, (compiled.function, *flags, None, None, compiled.packed_metadata, None, None, None), metas


def _usual(compiled: Any) -> tuple[Callable[..., None], tuple[Any, ...]]:
    return compiled.run, (compiled.function, compiled.packed_metadata, None, None, None)


def _descriptors() -> tuple[Any, Any]:
    """What encodes a descriptor, and the numbers that it has for kinds of elements."""
    from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST
    from triton.runtime.driver import driver

    return driver.active.utils.fill_tma_descriptor, TMA_DTYPE_DEVICE_TO_HOST


class _Encoder:
    """The arguments that stand for one tensor that a kernel takes by descriptor.

    Descriptors are kept by address: the allocator gives the same ones again.
    """

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

    def __call__(self, x: Tensor) -> tuple[Any, ...]:
        address = x.data_ptr()
        found = self.known.get(address)
        if found is None:
            if len(self.known) >= self.MOST:
                self.known.clear()
            found = self.known[address] = self.build(address), *self.shape
        return found


def stream_of(device: int) -> int:
    """The handle of a CUDA device's current stream; 0 off GPUs, where kernels are interpreted."""
    return torch._C._cuda_getCurrentRawStream(device) if device >= 0 else 0
