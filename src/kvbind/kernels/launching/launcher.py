"""Launches that cost the host less than Triton's own way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from kvbind.kernels.common.devices import interpreted
from kvbind.kernels.launching.bound_kernel import BoundKernel, caller_of, stream_of
from kvbind.kernels.launching.warm_up import is_new, warming_up

Description = tuple[Any, Sequence[Any], dict[str, Any]]
"""A launch but for its tensors: its grid, the arguments behind them, and constants."""


class Repeated(NamedTuple):
    """A launch that comes again: `call(*grid, stream, *between, *addresses, *rest)` on a device."""

    grid: tuple[int, int, int]
    device: int
    call: Callable[..., None]
    between: tuple[Any, ...]
    rest: tuple[Any, ...]


class Launcher:
    """A `triton.jit` kernel with a shorter way to the GPU, for arguments like those of an earlier launch.

    What Triton's own way takes per launch, 40 to 60 us of Python on the machines measured, is longer than many kernels run.
    Compiled kernels are found here by constants, dtypes and integers, those left out on which Triton does not specialize;
    pointers that are not aligned, and integers beyond 32 bits, go Triton's way.
    """

    MOST = 1024
    """Kernels remembered; more come about only where strides differ from call to call."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.interpreted = kernel, interpreted()
        self.compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...] | None, tuple[Any, ...]]] = {}
        if not self.interpreted:
            self.names = kernel.arg_names
            self.plain = [parameter.do_not_specialize for parameter in kernel.params]

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return partial(self.launch, grid)

    def bound(self, tensors: int, grid: Sequence[int], numbers: Sequence[Any], **constants: Any) -> BoundKernel:
        """The kernel bound to all but its first arguments, so many addresses of contiguous tensors."""
        return BoundKernel(self.kernel, [None] * tensors, grid, numbers, **constants)

    def repeat(
        self,
        known: dict[str, Repeated],
        name: str,
        tensors: Sequence[Tensor | None],
        describe: Callable[[], Description],
    ) -> None:
        """Launch on tensors, the kernel's first arguments; all else is asked for once.

        Args:
            known: launches of calls that agree in all that this one depends on but for addresses, by name.
            name: of this launch.
            tensors: some of which may be None.
            describe: all but the tensors.
        """
        found = known.get(name)
        if found is not None and not warming_up():
            grid, device, call, between, rest = found
            addresses, together = [None if x is None else x.data_ptr() for x in tensors], 0
            for address in addresses:
                if address is not None:
                    together |= address
            if not together % 16:
                call(*grid, stream_of(device), *between, *addresses, *rest)
                return
        grid, numbers, constants = describe()
        straight = self.launch(grid, *tensors, *numbers, **constants)
        if straight is not None:
            known[name] = straight._replace(rest=(*numbers, *straight.rest))

    def launch(self, grid: Any, *args: Any, **constants: Any) -> Repeated | None:
        """Launch on `grid`, a tuple or a function of the constants; constants are given by keyword.

        Returns:
            The launch but for its arguments that are not constants; None where it went Triton's way.
        """
        if self.interpreted:
            if not warming_up():
                self.kernel[grid](*args, **constants)
            return None
        key: list[Any] = [*constants, *constants.values()]
        pointers = largest = 0
        # of an address given as a number Triton does not ask the driver whether the device can reach it
        given = list(args)
        for place, (value, plain) in enumerate(zip(args, self.plain, strict=False)):
            kind = value.__class__
            if kind is int:
                if not plain:
                    key.append(value)
                elif abs(value) > largest:
                    largest = abs(value)
            elif isinstance(value, Tensor):
                key.append(value.dtype)
                given[place] = address = value.data_ptr()
                pointers |= address
            elif value is None:
                key.append(None)
            elif hasattr(value, "block_shape"):
                # a descriptor of a tensor, whose address and strides the accelerator asks to be aligned
                key += (value.base.dtype, *value.block_shape)
            else:
                key.append(kind)
        device = (args[0] if isinstance(args[0], Tensor) else args[0].base).device.index
        key.append(device)
        fixed, ordinary = tuple(key), pointers % 16 == 0 and largest < 2**31
        if warming_up():
            if not ordinary or is_new((self, fixed)):
                self.kernel.warmup(*args, grid=grid, **constants)
            return None
        if not ordinary:
            self.kernel[grid](*args, **constants)
            return None
        found = self.compiled.get(fixed)
        if found is None:
            if len(self.compiled) >= self.MOST:
                self.compiled.clear()
            compiled = self.kernel[grid](*args, **constants)
            # Triton has none to give where something other than it compiles
            if compiled is not None:
                call, middle, metas = caller_of(compiled)
                rest = tuple(constants[name] for name in self.names[len(args) :])
                # descriptors are Triton's to encode
                straight = metas is not None and not metas
                self.compiled[fixed] = (call, middle, rest) if straight else (compiled, None, rest)
            return None
        if callable(grid):
            grid = grid(constants)
        call, between, rest = found
        x, y, z = (*grid, 1, 1)[:3]
        if between is None:
            call[x, y, z](*given, *rest)
            return None
        call(x, y, z, stream_of(device), *between, *given, *rest)
        return Repeated((x, y, z), device, call, between, rest)
