"""`kvbind bench kernels`: speed and memory of `ttt` with kernels, beside PyTorch's forms, other libraries and the limit.

Everything is measured through `kvbind.ttt`; the environment variable `KVBIND_KERNELS` alone decides what runs inside.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch

from kvbind.bench.harness.ceilings import Ceilings, attention_work, forward_work, measure_ceilings, training_work
from kvbind.bench.harness.device_time import first_line
from kvbind.bench.harness.fresh_process import in_fresh_process
from kvbind.bench.harness.record import growing, provenance
from kvbind.bench.harness.timing import release
from kvbind.bench.kernels import own_processes
from kvbind.bench.kernels.cases import PASSES, SpeedCase, SpeedSettings, What, plan
from kvbind.bench.kernels.goals import SOURCE, goal_of
from kvbind.bench.kernels.measure import measure
from kvbind.forms.on_kernels import fla


def bench_kernels(
    cases: Sequence[SpeedCase],
    ceilings: Ceilings,
    device: torch.device,
    *,
    seconds: float = 0.2,
    compile_limit: float = 60.0,
    deadline: float = math.inf,
) -> Iterator[dict[str, Any]]:
    """Measure cases one after another; those left when `deadline` passes are not measured.

    Args:
        cases: from `plan`.
        ceilings: of this device.
        device: where to run.
        seconds: how long to time each pass, and each again as a graph.
        compile_limit: seconds after which a process of its own is given up on: each first call, `torch.compile` and fla.
        deadline: by `time.monotonic`.

    Yields:
        A row for each case: its fields, what was measured, and under "error" why something was not. Rates are in
        Mtok/s, TFLOP/s and TB/s; `of_limit` is a pass's shortest possible time (`ceilings`) over its own.
    """
    for case in cases:
        left = deadline - time.monotonic()
        if left <= 0:
            return
        try:
            if case.what == "first":
                row = first_call_row(case, device, min(left, compile_limit))
            elif case.by in ("compiled", "fla"):
                # both compile for long at first, and nothing here can stop them
                release()
                fields = {"case": asdict(case), "device": str(device), "seconds": seconds}
                row = in_fresh_process(own_processes.measured, fields, {"KVBIND_KERNELS": "0"}, min(left, compile_limit))
            else:
                row = measure(case, device, seconds)
        except Exception as problem:  # one case that fails must not stop the others
            row = asdict(case) | {"error": first_line(problem)}
        release()
        yield with_rates(row, ceilings)


def measured(
    what: Sequence[What],
    settings: SpeedSettings,
    device: torch.device,
    *,
    seconds: float,
    compile_limit: float,
    budget: float,
) -> Iterator[dict[str, Any]]:
    """Measure parts of the benchmark; the record as it is `growing`.

    Args:
        what: parts, as `plan` takes them.
        settings: what to measure at.
        device: where to run.
        seconds: as `bench_kernels` takes it.
        compile_limit: as `bench_kernels` takes it.
        budget: seconds after which no further row is begun. The record then says `complete: false`.
    """
    deadline = time.monotonic() + budget
    dtype = getattr(torch, settings.dtype)
    cases, ceilings = plan(what, settings), measure_ceilings(device, dtype)
    about = provenance(device, ("triton", *fla.PACKAGES)) | {
        "config": asdict(settings.size) | {"chunk": settings.chunk, "dtype": settings.dtype, "what": list(what)},
        "goals": SOURCE,
        "ceilings": asdict(ceilings),
    }
    rows = bench_kernels(cases, ceilings, device, seconds=seconds, compile_limit=compile_limit, deadline=deadline)
    return growing(about, len(cases), rows)


def first_call_row(case: SpeedCase, device: torch.device, limit: float) -> dict[str, Any]:
    """First calls in two fresh processes that share a cache of compiled kernels: empty for one, filled for the next."""
    release()
    fields = {"case": asdict(case), "device": str(device)}
    row: dict[str, Any] = asdict(case)
    with tempfile.TemporaryDirectory() as cache:
        for state in ("cold", "warm"):
            row[state] = in_fresh_process(own_processes.first_calls, fields, {"TRITON_CACHE_DIR": cache}, limit)
    return row


def with_rates(row: dict[str, Any], ceilings: Ceilings) -> dict[str, Any]:
    """A row with what follows from its times: rates, the part of the limit reached, and measured over goal."""
    if not any(name in row for name in PASSES):
        return row
    case = SpeedCase.of({name: row[name] for name in SpeedCase.__dataclass_fields__})
    size, dtype = case.size, case.torch_dtype
    if case.by == "sdpa":
        needs = dict(zip(PASSES, attention_work(size, dtype), strict=True))
    else:
        forward = forward_work(case.spec, size, dtype)
        needs = {"forward": forward, "training": training_work(forward, size, dtype)}
    goal = goal_of(case.name, case.form, size, case.chunk, case.dtype) if case.by == "kvbind" else None
    tokens, row = size.batch * size.tokens, dict(row)
    for name, need in needs.items():
        if name not in row:
            continue
        timed, aim = row[name], getattr(goal, name, None)
        taken, graph = timed["seconds"], timed["graph_seconds"]
        row[name] = timed | {
            "mtok_per_s": tokens / taken / 1e6,
            "graph_mtok_per_s": None if graph is None else tokens / graph / 1e6,
            "tflop_per_s": need.flops / taken / 1e12,
            "tb_per_s": need.bytes / taken / 1e12,
            "limit_mtok_per_s": tokens / need.limit(ceilings) / 1e6,
            "of_limit": need.limit(ceilings) / taken,
            "goal_mtok_per_s": aim,
            "of_goal": None if aim is None else tokens / taken / 1e6 / aim,
            "peer_mtok_per_s": getattr(goal, f"peer_{name}", None),
        }
    return row
