"""Work that repeats with the same shapes, captured once as a CUDA graph and replayed.

A step owns the buffers that it reads and writes; callers copy operands into them and results out of them. What is captured
is one chunk's work, so a graph serves sequences of every length. `KVBIND_GRAPHS=0` turns graphs off.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, Protocol, TypeVar

import torch

from kvbind.kernels.ahead import rehearsing

CAPACITY = 8
"""Steps kept with their buffers and graphs; the one unused for longest goes first."""

REMEMBERED = 64
"""Keys remembered as seen once."""


class Step(Protocol):
    """Work on buffers of its own."""

    def run(self) -> None:
        """Launch the work."""


S = TypeVar("S", bound=Step)


class _Captured(Generic[S]):
    """A step and its graph. The buffers are free again for a next user's stream once `done` has passed."""

    def __init__(self, step: S) -> None:
        self.step, self.lock, self.done = step, threading.Lock(), torch.cuda.Event()
        self.graph: torch.cuda.CUDAGraph | None = None

    def run(self) -> None:
        """Replay the graph, captured before its first replay. To capture executes nothing."""
        if self.graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
                self.step.run()
            self.graph = graph
        self.graph.replay()


_captured: OrderedDict[Hashable, _Captured] = OrderedDict()
_seen: OrderedDict[Hashable, None] = OrderedDict()
_lock = threading.Lock()


def switched_on() -> bool:
    """Whether graphs may be captured and replayed now."""
    return os.environ.get("KVBIND_GRAPHS", "1") != "0" and not torch.cuda.is_current_stream_capturing()


@contextlib.contextmanager
def repeated(key: Hashable, device: torch.device, make: Callable[[], S]) -> Iterator[tuple[S, Callable[[], None]]]:
    """A step, and what runs it.

    The first use of a key runs its kernels one by one, which compiles them; from the second on they are replayed. A step is
    used by one caller at a time.

    Args:
        key: what the step's buffers and kernels depend on, the device apart.
        device: where it runs.
        make: makes the step.
    """
    if device.type != "cuda" or rehearsing() or not switched_on():
        step = make()
        yield step, step.run
        return
    key = (device, key)
    with torch.cuda.device(device):
        entry = _find(key, make)
        if entry is None:
            step = make()
            yield step, step.run
            return
        with entry.lock:
            stream = torch.cuda.current_stream()
            stream.wait_event(entry.done)
            try:
                yield entry.step, entry.run
            finally:
                entry.done.record(stream)


def _find(key: Hashable, make: Callable[[], S]) -> _Captured[S] | None:
    """What is kept for a key, made now if the key was seen before; None the first time."""
    with _lock:
        if key in _captured:
            _captured.move_to_end(key)
            return _captured[key]
        if key not in _seen:
            _seen[key] = None
            if len(_seen) > REMEMBERED:
                _seen.popitem(last=False)
            return None
        # buffers made for inference serve training too
        with torch.inference_mode(False):
            entry = _captured[key] = _Captured(make())
        if len(_captured) > CAPACITY:
            _captured.popitem(last=False)
        return entry


def clear() -> None:
    """Drop all graphs and their buffers."""
    with _lock:
        _captured.clear()
        _seen.clear()
