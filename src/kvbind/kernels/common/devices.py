"""What every kernel shares: where kernels run, how they are tuned, and in which precision they multiply."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kvbind.kernels.common.tracing import is_transformed

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


def by_warpgroups(x: Tensor) -> bool:
    """Whether products on the device of `x` take operands from shared memory: compute capability 9 to 11; off GPUs, so."""
    return not x.is_cuda or 9 <= capability(x.device.index)[0] < 12


_HERE = contextlib.nullcontext()


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device; this makes it that of `x`."""
    # where there is a tensor on a GPU, nothing need be initialized to ask for the current one
    elsewhere = x.is_cuda and x.device.index != torch._C._cuda_getDevice()
    return torch.cuda.device(x.device) if elsewhere else _HERE


@cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(x: Tensor, elsewhere: int = 132) -> int:
    """How many multiprocessors the device of `x` has; off GPUs `elsewhere`, by default as many as an H100."""
    return _multiprocessors(x.device.index) if x.is_cuda else elsewhere
