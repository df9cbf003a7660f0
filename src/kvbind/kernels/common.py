"""What every kernel shares: where kernels run, how they are tuned, and in which precision they multiply."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import threading
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from kvbind.kernels.ahead import compiling_ahead, is_new, rehearsing
from kvbind.kernels.direct import is_transformed

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Of operands that kernels take."""

LEAST_CAPABILITY = (8, 0)
"""Compute capability that kernels need: bfloat16 matrix units."""


def interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU instead of compiling them (`TRITON_INTERPRET=1`)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


@cache
def capability(index: int) -> tuple[int, int]:
    """The compute capability of CUDA device `index`; (0, 0) of one that is not NVIDIA's."""
    return torch.cuda.get_device_capability(index) if torch.version.hip is None else (0, 0)


@cache
def shared_memory(index: int) -> int:
    """Bytes of shared memory that a block of CUDA device `index` may have."""
    # not in the annotations of PyTorch
    return int(torch.cuda.get_device_properties(index).shared_memory_per_block_optin)  # type: ignore[attr-defined]


def capable(index: int) -> bool:
    """Whether CUDA device `index` is an NVIDIA GPU of at least `LEAST_CAPABILITY`."""
    return capability(index) >= LEAST_CAPABILITY


@torch.compiler.assume_constant_result
def runs_on(device: torch.device) -> bool:
    """Whether kernels may run on tensors of `device`; `torch.compile` asks once for all calls.

    Under transforms of `torch.func` they do not, as they know neither batches of tensors nor gradients of gradients.
    `KVBIND_KERNELS=0` turns them off; `KVBIND_KERNELS=force` takes them on the CPU too, where Triton interprets them.
    """
    wanted = os.environ.get("KVBIND_KERNELS", "1")
    if wanted == "0" or not has_triton() or is_transformed():
        return False
    if device.type != "cuda":
        return wanted == "force" and interpreted()
    return capable(device.index if device.index is not None else torch.cuda.current_device())


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device; this makes it that of `x`."""
    elsewhere = x.is_cuda and x.device.index != torch.cuda.current_device()
    return torch.cuda.device(x.device) if elsewhere else contextlib.nullcontext()


def last_contiguous(x: Tensor) -> Tensor:
    """`x` with the numbers of its last axis side by side, copied where they are not."""
    return x if x.stride(-1) == 1 else x.contiguous()


@cache
def zeros(device: torch.device, count: int) -> Tensor:
    """float32 zeros that whoever asks shares; never written."""
    return torch.zeros(count, device=device)


def ready(x: Tensor) -> Tensor:
    """A gradient as launches take it: contiguous, at an address that is a multiple of 16."""
    return x if x.is_contiguous() and not x.data_ptr() % 16 else x.clone(memory_format=torch.contiguous_format)


@cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(x: Tensor, elsewhere: int = 132) -> int:
    """How many multiprocessors the device of `x` has; off GPUs `elsewhere`, by default as many as an H100."""
    return _multiprocessors(x.device.index) if x.is_cuda else elsewhere


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
        self.compiled: dict[tuple[Any, ...], tuple[Any, list[Any]]] = {}
        if not self.interpreted:
            self.names = kernel.arg_names
            self.plain = [parameter.do_not_specialize for parameter in kernel.params]

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return partial(self.launch, grid)

    def launch(self, grid: Any, *args: Any, **constants: Any) -> None:
        """Launch on `grid`, a tuple or a function of the constants; constants are given by keyword."""
        if self.interpreted:
            if not rehearsing():
                self.kernel[grid](*args, **constants)
            return
        key: list[Any] = [*constants, *constants.values()]
        pointers = largest = 0
        for value, plain in zip(args, self.plain, strict=False):
            kind = value.__class__
            if kind is int:
                if not plain:
                    key.append(value)
                elif abs(value) > largest:
                    largest = abs(value)
            elif isinstance(value, Tensor):
                key.append(value.dtype)
                pointers |= value.data_ptr()
            elif hasattr(value, "block_shape"):
                # a descriptor of a tensor, whose address and strides the accelerator asks to be aligned
                key += (value.base.dtype, *value.block_shape)
            else:
                key.append(kind)
        first = args[0] if isinstance(args[0], Tensor) else args[0].base
        key.append(first.device.index)
        fixed, ordinary = tuple(key), pointers % 16 == 0 and largest < 2**31
        if rehearsing():
            if not ordinary or is_new((self, fixed)):
                self.kernel.warmup(*args, grid=grid, **constants)
            return
        if not ordinary:
            self.kernel[grid](*args, **constants)
            return
        found = self.compiled.get(fixed)
        if found is None:
            if len(self.compiled) >= self.MOST:
                self.compiled.clear()
            compiled = self.kernel[grid](*args, **constants)
            # Triton has none to give where something other than it compiles
            if compiled is not None:
                self.compiled[fixed] = compiled, [constants[name] for name in self.names[len(args) :]]
            return
        if callable(grid):
            grid = grid(constants)
        kernel, rest = found
        kernel[(*grid, 1, 1)[:3]](*args, *rest)


class Tuned:
    """A kernel with a short list of configurations, of which each combination of widths takes the fastest.

    Triton's autotuner chooses, at the first call, and keeps its choice on disk beside the compiled kernels; later calls go
    past it, as it takes longer than a launch. What it chooses from is compiled all at once.
    """

    def __init__(self, autotuner: Any) -> None:
        self.autotuner = autotuner
        self.launcher = Launcher(autotuner.fn)
        self.chosen: dict[tuple[Any, ...], dict[str, Any]] = {}
        self.tuned: set[tuple[Any, ...]] = set()
        self.places = [place for place, name in enumerate(autotuner.arg_names) if name in autotuner.keys]
        # Triton's autotuner is for one thread, and gradients are computed in others
        self.lock = threading.Lock()

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return partial(self.launch, grid)

    def launch(self, grid: Any, *args: Any, **constants: Any) -> None:
        """Launch on `grid`, a function of the constants; constants are given by keyword."""
        chooses = [args[place] for place in self.places if place < len(args)]
        key = (args[0].dtype, args[0].device, *constants, *constants.values(), *chooses)
        config = self.chosen.get(key)
        if config is not None:
            self.launcher.launch(grid, *args, **constants, **config)
        elif not rehearsing():
            with self.lock:
                self.tune(grid, args, constants, chooses)
                self.chosen[key] = self.autotuner.best_config.all_kwargs()
        elif not self.launcher.interpreted and is_new((self, key)):
            with self.lock:
                self.autotuner.warmup(*args, grid=grid, **constants)

    def tune(self, grid: Any, args: tuple[Any, ...], constants: dict[str, Any], chooses: list[Any]) -> None:
        """Launch with what the autotuner chooses."""
        dtypes = [x.dtype for x in args if isinstance(x, Tensor)]
        choice = (*dtypes, *chooses, *(x for name, x in constants.items() if name in self.autotuner.keys))
        if choice not in self.tuned and args[0].is_cuda and not self.launcher.interpreted:
            with compiling_ahead():
                self.autotuner.warmup(*args, grid=grid, **constants)
        self.autotuner.run(*args, grid=grid, warmup=False, **constants)
        self.tuned.add(choice)


def tuned(configs: Sequence[Any], key: Sequence[str], wide: Any = None) -> Callable[[Any], Tuned]:
    """Make a kernel choose among configurations; it may run more than once on the same arguments.

    All compile-time constants must be given by keyword. `key` must name widths, which a model has few of, and never a number
    of tokens, so that a new length neither compiles nor tunes. The interpreter takes the first configuration.

    Args:
        configs: `triton.Config`s.
        key: names of kernel arguments whose values choose.
        wide: the one configuration for a first argument in float32, whose tiles take twice the room; None for those above.
    """
    import triton

    def fitting(listed: list[Any], arguments: dict[str, Any], **_: Any) -> list[Any]:
        first = next(iter(arguments.values()))
        return [wide] if wide is not None and first.dtype.itemsize > 2 else [c for c in listed if c is not wide]

    def time(call: Callable[[], Any], quantiles: Sequence[float]) -> Any:
        return triton.testing.do_bench(call, warmup=3, rep=12, quantiles=quantiles)

    def choose(kernel: Any) -> Tuned:
        if interpreted():
            return Tuned(triton.autotune(configs=list(configs)[:1], key=list(key))(kernel))
        listed = [*configs, *([wide] if wide is not None else [])]
        prune = {"early_config_prune": fitting}
        return Tuned(triton.autotune(listed, list(key), prune_configs_by=prune, do_bench=time, cache_results=True)(kernel))

    return choose
