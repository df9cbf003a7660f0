"""Time on the device: CUDA events around plain calls, and replays of a call captured as a CUDA graph."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

import torch

from kvbind.bench.harness.timing import Work, median_seconds, synchronize

ROUNDS = 200
"""Calls at the most that one median is taken over."""


@dataclass(frozen=True)
class Duration:
    """How long one piece of work takes.

    Attributes:
        seconds: median over plain calls, as Python launches them.
        rounds: how many calls that is the median of.
        graph_seconds: median over replays of the call captured as a CUDA graph; None where it was not captured.
        not_capturable: why it was not, or None.
    """

    seconds: float
    rounds: int
    graph_seconds: float | None = None
    not_capturable: str | None = None


def duration(work: Work, device: torch.device, *, seconds: float = 0.25, least: int = 5, graph: bool = True) -> Duration:
    """Time `work` for about `seconds`, and as long again as a graph.

    Calls are queued one behind another. Where the device is slower than the launches this is the device's own time; where
    it is faster, gaps between launches count. The first two calls are not counted, and work that takes longer than
    `seconds` is timed once.

    Args:
        work: what to time; it has nothing to do with the result of an earlier call.
        device: where it runs. Off a GPU the clock of the machine is read.
        seconds: how long to measure.
        least: calls at the least.
        graph: also capture and replay it.
    """
    if device.type != "cuda":
        return Duration(median_seconds([work], device, least=least, seconds=seconds)[0], least, None, "not on a GPU")
    taken, rounds = _events(work, seconds, least)
    if not graph:
        return Duration(taken, rounds, None, "not tried")
    try:
        return Duration(taken, rounds, _replayed(work, device, seconds, least))
    except Exception as problem:  # whatever stands in the way, plain calls were timed
        synchronize(device)
        return Duration(taken, rounds, None, first_line(problem))


def first_line(problem: BaseException) -> str:
    """What went wrong, in one line."""
    text = str(problem).strip().splitlines()
    return f"{type(problem).__name__}: {text[0][:300]}" if text else type(problem).__name__


def _events(work: Work, seconds: float, least: int) -> tuple[float, int]:
    work()
    once = _queued(work, 1)[0]
    if once > seconds:
        return once, 1
    rounds = min(ROUNDS, max(least, math.ceil(seconds / once)))
    return statistics.median(_queued(work, rounds)), rounds


def _queued(work: Work, rounds: int) -> list[float]:
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    torch.cuda.synchronize()
    for before, after in marks:
        before.record()
        work()
        after.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in marks]


def _replayed(work: Work, device: torch.device, seconds: float, least: int) -> float:
    # a capture needs streams and workspaces that exist already, on a stream that is not the default one
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        work()
    taken = _events(graph.replay, seconds, least)[0]
    synchronize(device)
    return taken
