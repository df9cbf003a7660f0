"""Kernels compiled many at once, before the call that needs them one after another.

Triton compiles a kernel at its first launch, in a second or so, and a forward and backward call has some thirty. Compilation
releases the interpreter's lock, so that threads compile as many at a time as there are cores. To know what to compile, an
operator is warmed up: its body runs once with launches that only compile (`warmed_up`), and what it computes is thrown away;
then it runs again with launches that run.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

MOST = 64
"""Kinds of calls of one operator that are warmed up; more come about only where widths or chunks change between calls."""

R = TypeVar("R")


class _WarmUp(threading.local):
    noted: set[Hashable] | None = None


_here = _WarmUp()


def warming_up() -> bool:
    """Whether launches of this thread are to compile and not to run."""
    return _here.noted is not None


def is_new(key: Hashable) -> bool:
    """Whether `key` is met for the first time in this warm-up."""
    assert _here.noted is not None
    if key in _here.noted:
        return False
    _here.noted.add(key)
    return True


@contextlib.contextmanager
def compiling_ahead() -> Iterator[None]:
    """Inside, launches compile in threads and nothing runs; at the end all is compiled.

    What fails to compile is left to the launch that needs it, which says why.
    """
    from triton import AsyncCompileMode

    with ThreadPoolExecutor(os.cpu_count()) as threads, AsyncCompileMode(threads, ignore_errors=True):
        _here.noted = set()
        try:
            yield
        finally:
            _here.noted = None


def can_warm_up(args: Sequence[Any]) -> bool:
    """Whether a call of these arguments is one on a GPU that launches at once, outside of any warm-up."""
    on_gpu = any(isinstance(x, Tensor) and x.is_cuda for x in args)
    return on_gpu and not warming_up() and not torch.cuda.is_current_stream_capturing()


def _kind(x: Any) -> Hashable:
    if isinstance(x, Tensor):
        return x.dtype, x.device, x.shape[-1:]
    return tuple(x) if isinstance(x, list) else x


def warmed_up(*lengths: str, unless: str = "") -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Make an operator's body compile all its kernels before its first call of a kind, and before any of them runs.

    Calls are of one kind where tensors agree in dtype, device and last axis, and everything else in value. The body must
    not change what it is given, nor decide anything by values that kernels compute.

    Args:
        lengths: names of arguments that vary with the number of tokens; of them it matters only whether they are given.
        unless: name of an argument; calls that give it are not warmed up.
    """

    def decorate(body: Callable[..., R]) -> Callable[..., R]:
        # an operator's schema is read from the annotations themselves, as this module lacks some of the body's names
        signature = inspect.signature(body, eval_str=True)
        vary = [name in lengths for name in signature.parameters]
        stops = list(signature.parameters).index(unless) if unless else None
        met: set[Hashable] = set()

        @wraps(body)
        def run(*args: Any) -> R:
            if len(met) < MOST and (stops is None or not args[stops]):
                kind = tuple(x is None if varies else _kind(x) for x, varies in zip(args, vary, strict=True))
                # asked last, as every call comes by here
                if kind not in met and can_warm_up(args):
                    met.add(kind)
                    with compiling_ahead():
                        body(*args)
            return body(*args)

        run.__signature__ = signature  # type: ignore[attr-defined]
        return run

    return decorate
