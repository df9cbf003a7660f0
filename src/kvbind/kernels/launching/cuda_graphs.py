"""Work that repeats with the same shapes, captured once as a CUDA graph and replayed.

A step owns the buffers that it reads and writes; callers copy operands into them and results out of them. What is captured
is one chunk's work, so a graph serves sequences of every length. `KVBIND_GRAPHS=0` turns graphs off.
"""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Generic, Protocol, TypeVar

import torch

from kvbind.kernels.launching.warm_up import warming_up

CAPACITY = 8
"""Steps stored with their buffers and graphs; the one unused for longest goes first."""

REMEMBERED = 64
"""Keys remembered as seen once."""


class RepeatedStep(Protocol):
    """Work on buffers of its own."""

    def run(self) -> None:
        """Launch the work."""


S = TypeVar("S", bound=RepeatedStep)


class _Captured(Generic[S]):
    """A step and its graph. The buffers are free again for a next user's stream once `done` has passed."""

    def __init__(self, step: S) -> None:
        self.step, self.lock, self.done = step, threading.Lock(), torch.cuda.Event()
        self.graph: torch.cuda.CUDAGraph | None = None
        self.dropped = False

    def drop(self) -> None:
        """Wait for its last user; whoever uses it now waits at the end.

        Its memory goes back to the stream that it was made on, while others may be at work on it.
        """
        self.dropped = True
        self.done.synchronize()

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
    if os.environ.get("KVBIND_GRAPHS", "1") == "0":
        return False
    # builds of PyTorch without CUDA cannot be asked
    return not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())


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
    if device.type != "cuda" or warming_up() or not switched_on():
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
                if entry.dropped:
                    entry.done.synchronize()


def _find(key: Hashable, make: Callable[[], S]) -> _Captured[S] | None:
    """What is stored for a key, made now if the key was seen before; None the first time."""
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
            _captured.popitem(last=False)[1].drop()
        return entry


def capture(work: Callable[[], object], device: torch.device, stream: Any, pool: Any) -> Callable[[], object]:
    """What replays `work`, captured on `stream` into the memory of `pool`; it executes nothing.

    All that it reads by address must outlive the graph: what was made before, and not by it.

    Raises:
        RuntimeError: whatever cannot be captured. The stream, the allocator and the generator are then as before.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    generator, current = torch.cuda.default_generators[index], torch.cuda.current_stream(device)
    before = generator.clone_state()
    graph, collecting = torch.cuda.CUDAGraph(), gc.isenabled()
    # what the collector would free belongs to other work
    gc.disable()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            work()
    except Exception as error:
        del graph
        torch.cuda.set_stream(current)
        generator.graphsafe_set_state(before)
        with contextlib.suppress(Exception):
            torch._C._cuda_endAllocateToPool(index, pool)
        for _ in range(2):  # the first call after an error may be told of it
            with contextlib.suppress(Exception):
                torch.cuda.synchronize(device)
                torch.zeros(1, device=device)
        # the end of a capture that failed fails too
        reason = error.__context__ or error
        raise RuntimeError(" ".join(str(reason).split())[:200] or type(reason).__name__) from error
    finally:
        if collecting:
            gc.enable()
    return graph.replay


def clear() -> None:
    """Drop all graphs and their buffers."""
    with _lock:
        for entry in _captured.values():
            entry.drop()
        _captured.clear()
        _seen.clear()
