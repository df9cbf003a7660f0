"""What runs on a GPU during a call: its kernels by name, from the device's own record."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from kvbind.bench.harness.timing import Work, synchronize

CALLS = 3
"""Calls that a profile is the mean of."""

SHOWN = 16
"""Kernels of a call that are listed, those that take longest."""


def launches(work: Work, device: torch.device, calls: int = CALLS) -> list[dict[str, Any]]:
    """The kernels, copies and fills that calls run on the device, as the profiler writes them down."""
    synchronize(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            work()
        synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]


def summary(events: Iterable[Mapping[str, Any]], calls: int) -> dict[str, Any]:
    """Per call: the time on the device, the launches, and the kernels that take longest.

    Args:
        events: of a Chrome trace, with "name", "dur" in microseconds and "args".
        calls: how many calls they are of.
    """
    found: dict[str, list[Mapping[str, Any]]] = {}
    for event in events:
        found.setdefault(short(event["name"]), []).append(event)
    times = {name: sum(event["dur"] for event in those) / calls / 1e3 for name, those in found.items()}
    total = sum(times.values())
    listed = []
    for name in sorted(times, key=times.__getitem__, reverse=True)[:SHOWN]:
        largest = max(found[name], key=lambda event: _product(event["args"].get("grid", ())))
        given = largest["args"]
        listed.append(
            {
                "name": name,
                "launches": len(found[name]) / calls,
                "ms": times[name],
                "share": times[name] / total if total else 0.0,
                "programs": _product(given.get("grid", ())),
                "threads": _product(given.get("block", ())),
                "registers": given.get("registers per thread"),
                "shared_bytes": given.get("shared memory"),
            }
        )
    return {"device_ms": total, "launches": sum(map(len, found.values())) / calls, "kernels": listed}


def short(name: str) -> str:
    """A kernel's name without the types it was made for."""
    plain = name.removeprefix("void ").replace("(anonymous namespace)::", "").partition("<")[0].partition("(")[0]
    return plain.rpartition("::")[2].strip() or name


def _product(sizes: Sequence[int]) -> int:
    count = 1 if sizes else 0
    for size in sizes:
        count *= size
    return count
