"""How much of a step GPUs spend communicating, and how much of that beside nothing else."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from kvbind.bench.harness.timing import synchronize

Interval = tuple[float, float]


def communication(work: Callable[[], object], device: torch.device) -> dict[str, float] | None:
    """Profile one run of `work`; the fractions of its time on this GPU that NCCL's kernels take.

    A kernel that waits for a slower rank counts as communicating.

    Args:
        work: what to run; once, as all ranks do.
        device: where; elsewhere than on a GPU it is run and nothing is said.

    Returns:
        "busy", any kernel of NCCL's running; "exposed", such a kernel and no other. None elsewhere than on a GPU.
    """
    if device.type != "cuda":
        work()
        return None
    synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        work()
        synchronize(device)
    with tempfile.TemporaryDirectory(prefix="kvbind-profile-") as folder:
        path = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return shares(*kernels(events))


def kernels(events: Iterable[Mapping[str, Any]]) -> tuple[list[Interval], list[Interval]]:
    """When NCCL's kernels ran, and when others and copies did, by the events of a trace; microseconds."""
    talking: list[Interval] = []
    computing: list[Interval] = []
    for event in events:
        # annotations of ranges are on the GPU's timeline too, but nothing runs there
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            span = (float(event["ts"]), float(event["ts"]) + float(event["dur"]))
            (talking if event["name"].startswith("nccl") else computing).append(span)
    return talking, computing


def shares(talking: list[Interval], computing: list[Interval]) -> dict[str, float] | None:
    """The fractions of the time from the first to the last interval in which there is any of `talking`, and nothing else.

    Args:
        talking: start and stop of each exchange.
        computing: start and stop of everything else.

    Returns:
        "busy" and "exposed"; None where there are no intervals.
    """
    both = talking + computing
    if not both:
        return None
    whole = max(stop for _, stop in both) - min(start for start, _ in both)
    return {"busy": covered(talking) / whole, "exposed": (covered(both) - covered(computing)) / whole}


def covered(intervals: Iterable[Interval]) -> float:
    """The length of a union of intervals."""
    total, end = 0.0, None
    for start, stop in sorted(intervals):
        if end is None or start > end:
            total, end = total + stop - start, stop
        elif stop > end:
            total, end = total + stop - end, stop
    return total
