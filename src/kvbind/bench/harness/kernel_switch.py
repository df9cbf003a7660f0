"""Kernels on and off, and which of them ran."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

VARIABLE = "KVBIND_KERNELS"
"""The environment variable that `ttt` reads at each call; "0" makes it use PyTorch alone."""

FLA = "KVBIND_FLA"
"""Likewise, of flash-linear-attention's operators: "0" for none, "force" for each that takes a call."""


@contextmanager
def switched(variable: str, value: str) -> Iterator[None]:
    """An environment variable has this value inside."""
    before = os.environ.get(variable)
    os.environ[variable] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def without_kernels() -> AbstractContextManager[None]:
    """`ttt` uses PyTorch alone inside."""
    return switched(VARIABLE, "0")


def operators_of(work: Callable[[], object]) -> tuple[str, ...]:
    """The names of the library's own operators that `work` ran, sorted; empty where PyTorch's alone did it."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        work()
    results = profile.profiler.kineto_results if profile.profiler is not None else None
    if results is None:
        raise RuntimeError("the profiler kept no record of operators")
    names = {event.name() for event in results.events()}
    return tuple(sorted(name.removeprefix("kvbind::") for name in names if name.startswith("kvbind::")))
