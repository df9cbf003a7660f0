"""Time and memory of a piece of work."""

from __future__ import annotations

import gc
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from kvbind.screen import duration

Work = Callable[[], object]


class DeadlineError(BaseException):
    """Work did not end within its time. No `Exception`, as compilers swallow those and go on."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Inside, work that goes on for longer is ended, as soon as Python has its turn.

    Only a process's first thread can be ended so, and only where there are Unix signals; elsewhere work goes on.

    Raises:
        TookTooLongError: it took longer.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def end(*_: Any) -> None:
        raise DeadlineError(f"no result after {duration(seconds)}")

    before = signal.signal(signal.SIGALRM, end)
    # again and again, as an error in a destructor is lost
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), 2.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def now(device: torch.device) -> float:
    """The machine's clock when the device has done all its work, seconds."""
    synchronize(device)
    return time.perf_counter()


def median_seconds(works: Sequence[Work], device: torch.device, *, least: int = 5, seconds: float = 1.0) -> list[float]:
    """The median time of each work, seconds.

    Works take turns, so that a machine that slows down slows all of them; each ran once before.

    Args:
        works: what to time.
        device: where they run.
        least: rounds at the least.
        seconds: how long to go on, all works together.
    """
    for work in works:
        work()
    times: list[list[float]] = [[] for _ in works]
    begin = time.perf_counter()
    while len(times[0]) < least or (seconds and time.perf_counter() - begin < seconds):
        for work, taken in zip(works, times, strict=True):
            start = now(device)
            work()
            taken.append(now(device) - start)
    return [statistics.median(taken) for taken in times]


def peak_bytes(work: Work, device: torch.device) -> int:
    """The most memory that `work` held at once beyond what was held before it, bytes.

    On a GPU, by the caching allocator's own count; on a CPU, by the profiler's record of allocations.
    """
    if device.type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    results = profile.profiler.kineto_results if profile.profiler is not None else None
    if results is None:
        raise RuntimeError("the profiler kept no record of memory")
    held = peak = 0
    for event in sorted(results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def release() -> None:
    """Give memory that nothing holds back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
