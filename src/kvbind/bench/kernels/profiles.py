"""What a call spends its time on, on a GPU: its kernels by name, from the device's own record."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch

from kvbind.bench.harness.profiler import CALLS, launches, summary
from kvbind.bench.harness.record import growing, provenance
from kvbind.bench.harness.timing import release
from kvbind.bench.kernels.cases import PASSES, SpeedCase, SpeedSettings, plan
from kvbind.bench.kernels.measure import works


def to_profile(settings: SpeedSettings) -> list[SpeedCase]:
    """Every rung on kernels in its fastest form."""
    fastest: dict[str, SpeedCase] = {}
    for case in plan(["targets"], settings):
        if case.by == "kvbind" and (case.name not in fastest or case.form == "parallel"):
            fastest[case.name] = case
    return list(fastest.values())


def profiled(settings: SpeedSettings, device: torch.device) -> Iterator[dict[str, Any]]:
    """Profile every rung; the record as it is `growing`, by case and pass.

    Args:
        settings: what to call.
        device: a GPU.

    Returns:
        The records: where it comes from, and rows of a case's fields, the pass, `device_ms` per call (the sum over its
        kernels), how many `launches` it has, and its longest `kernels`: name, launches, milliseconds, share of the sum, and
        of their largest launch blocks (`programs`), threads in a block, registers per thread and bytes of shared memory.

    Raises:
        ValueError: the device is no GPU.
    """
    if device.type != "cuda":
        raise ValueError(f"profiles are of a GPU's kernels, so device must be cuda; got {device}")
    cases = to_profile(settings)
    about = provenance(device, ("triton",)) | {
        "config": asdict(settings.size) | {"chunk": settings.chunk, "dtype": settings.dtype},
        "multiprocessors": torch.cuda.get_device_properties(device).multi_processor_count,
    }
    return growing(about, len(PASSES) * len(cases), bench_profiles(cases, device))


def bench_profiles(cases: Sequence[SpeedCase], device: torch.device) -> Iterator[dict[str, Any]]:
    """The rows of `profiled`."""
    for case in cases:
        forward, training, _ = works(case, device)
        for name, work in zip(PASSES, (forward, training), strict=True):
            # the first call compiles and tunes, the second may capture graphs
            for _ in range(3):
                work()
            yield asdict(case) | {"pass": name} | summary(launches(work, device), CALLS)
        del forward, training, work
        release()
