"""`kvbind bench graphs`: training steps replayed as CUDA graphs beside eager ones, of each family of models.

The steps are those of `kvbind.train.train`, on random batches. First that both kinds come to the same losses, through an
evaluation, and a checkpoint from which the other kind goes on; then how fast they are.
"""

from __future__ import annotations

import gc
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kvbind.bench.harness.record import OUT_OF_TIME, growing, provenance, save
from kvbind.bench.harness.timing import now
from kvbind.bench.training.cases import Random, TrainingCase, build, cases, configuration
from kvbind.kernels.launching import cuda_graphs as inner_graphs
from kvbind.precision import matmul_precision
from kvbind.train import train
from kvbind.train.metrics import read_metrics
from kvbind.train.optimizer import make_optimizer
from kvbind.train.parallel import Distributed, MeshLayout
from kvbind.train.ranks import WHOLE
from kvbind.train.step import TrainingStep

EVALUATED, SAVED, GOES_ON = 20, 25, 30
"""In a comparison: after which steps there is an evaluation and a checkpoint, and in which the first process ends."""


FIRST = 8
"""Steps of each kind at the least, of which the last one's loss is told."""


def give_back(device: torch.device) -> None:
    """Free what earlier work has left on a GPU."""
    inner_graphs.clear()
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


@contextmanager
def warnings_of_training() -> Iterator[list[str]]:
    """What training says about graphs."""
    said: list[str] = []

    class SaidLines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logger, handler = logging.getLogger("kvbind.train"), SaidLines()
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)


def losses(
    case: TrainingCase, device: torch.device, folder: Path, kinds: tuple[str, ...], steps: int
) -> dict[str, list[float]]:
    """Losses of a run, and of its evaluations; with two kinds the first is interrupted and the second goes on."""
    fields = {"steps": steps, "evaluate_every": EVALUATED, "checkpoint_every": SAVED if len(kinds) > 1 else 0}
    for i, how in enumerate(kinds):
        give_back(device)
        last = i == len(kinds) - 1
        try:
            task = Random(case, None if last else GOES_ON)
            train(build(case, device), task, configuration(device, how, **fields), folder)
        except KeyboardInterrupt:
            if last:
                raise
    rows = read_metrics(folder)
    return {name: [row[name] for row in rows if row.get(name) is not None] for name in ("loss", "held_out/loss")}


def compare(case: TrainingCase, device: torch.device) -> dict[str, Any]:
    """How far the losses of replayed steps are from those of eager ones, and from a second eager run's where they differ."""

    def apart(a: dict[str, list[float]], b: dict[str, list[float]]) -> float:
        pairs = [pair for name in a for pair in zip(a[name], b[name], strict=False)]
        return max(abs(x - y) / max(abs(x), 1e-9) for x, y in pairs)

    with tempfile.TemporaryDirectory() as place, warnings_of_training() as said:
        folder = Path(place)
        eager = losses(case, device, folder / "eager", ("off",), case.compared)
        found: dict[str, Any] = {}
        for name, kinds in {
            "replayed": ("on",),
            "eager_then_replayed": ("off", "on"),
            "replayed_then_eager": ("on", "off"),
        }.items():
            found[name] = apart(eager, losses(case, device, folder / name, kinds, case.compared))
        if any(found.values()):
            found["eager_again"] = apart(eager, losses(case, device, folder / "again", ("off",), case.compared))
    return {"steps": case.compared, "relative": found, "said": said}


def timed(case: TrainingCase, device: torch.device, seconds: float, step: Callable[[], Any]) -> dict[str, Any]:
    """Take steps and say how long they took.

    Args:
        case: what is trained.
        device: where the steps run.
        seconds: how long to go on, after four.
        step: takes one, and returns its loss.

    Returns:
        "per_second", the units of a median step; "first_seconds", of the first step; "capture_seconds", of the third, in
        which replayed steps are captured; "peak_bytes" since peaks were reset; "steps"; "loss" of step `FIRST`.
    """
    times: list[float] = []
    loss = float("nan")
    began = time.perf_counter()
    while len(times) < FIRST or (time.perf_counter() - began < seconds and len(times) < 200):
        start = now(device)
        found = step()
        times.append(now(device) - start)
        if len(times) == FIRST:
            loss = float(found)
        if len(times) == 4:
            began = time.perf_counter()
    return {
        "per_second": case.units / statistics.median(times[4:]),
        "first_seconds": times[0],
        "capture_seconds": times[2],
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "steps": len(times),
        "loss": loss,
    }


def speed(case: TrainingCase, device: torch.device, how: str, seconds: float) -> dict[str, Any]:
    """Time steps of one kind.

    Returns:
        As `timed`, and "captured", how many graphs there are; "said".
    """
    give_back(device)
    with warnings_of_training() as said, matmul_precision("high"):
        model, config = build(case, device), configuration(device, how)
        together = Distributed(model, case.blocks(model), MeshLayout(), config, device)
        task = Random(case)
        optimizer = make_optimizer(model, config)
        step = TrainingStep(model, together, task, config, optimizer, None, task.batches(None), WHOLE, device)
        found = timed(case, device, seconds, lambda: step(1e-4, 0.0, more=True).loss)
        graphs = 0 if step.replayed is None else step.replayed.work.captured
    return {**found, "captured": graphs, "said": said}


def measured(
    device: torch.device, chosen: Iterable[TrainingCase], seconds: float, budget: float
) -> Iterator[dict[str, Any]]:
    """A row for each case: what was compared, and both kinds' speeds; what failed says why."""
    began = time.perf_counter()
    for case in chosen:
        row: dict[str, Any] = {"name": case.name, "unit": case.unit, "units": case.units}
        works: dict[str, Callable[[], dict[str, Any]]] = {
            how: partial(speed, case, device, how, seconds) for how in ("on", "off")
        }
        if case.compared:
            works["same"] = partial(compare, case, device)
        for name, work in works.items():
            if time.perf_counter() - began > budget:
                row["skipped"] = OUT_OF_TIME
                break
            try:
                row[name] = work()
            except Exception as error:  # the next case may do better
                row[name] = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        row["seconds"] = round(time.perf_counter() - began, 1)
        give_back(device)
        yield row


def main(
    out: str | Path | None = None,
    device: str = "auto",
    *,
    sizes: str = "full",
    only: str = "",
    seconds: float = 1.5,
    budget: float = 165.0,
) -> dict[str, Any]:
    """Compare and time all cases, and print a line for each as it comes.

    Args:
        out: a JSON file for the record, written as it grows; None for none.
        device: where; "auto" for a GPU where there is one.
        sizes: "full", or "tiny" for a look on a CPU.
        only: part of the names of the cases to run; all of them by default.
        seconds: how long to time each kind of steps, after four.
        budget: begin nothing more after this, seconds.

    Returns:
        The record.
    """
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    place = torch.device(name)
    about = provenance(place, ("triton",)) | {"config": {"sizes": sizes, "seconds": seconds}}
    record: dict[str, Any] = {}
    chosen = [case for case in cases(sizes) if only in case.name]
    for record in growing(about, len(chosen), measured(place, chosen, seconds, budget)):
        save(None if out is None else Path(out), record)
        if record["rows"]:
            print(line_of(record["rows"][-1]), flush=True)
    return record


def line_of(row: dict[str, Any]) -> str:
    """A row in one line of text, and one for everything that was said or has failed."""
    parts, told = [f"{row['name']:18}"], []
    for how in ("on", "off"):
        found = row.get(how, {})
        if "per_second" in found:
            peak = "" if found["peak_bytes"] is None else f", {found['peak_bytes'] / 2**30:.1f} GiB"
            graphs = f", {found['captured']} graphs, capture {found['capture_seconds']:.2f} s" if how == "on" else ""
            speed = f"{found['per_second']:,.0f} {row['unit']}/s"
            parts.append(f"{how}: {speed}, first {found['first_seconds']:.1f} s{graphs}{peak}, loss {found['loss']:.5f}")
        told += [f"    {how}: {x}" for x in (*found.get("said", ()), *([found["failed"]] if "failed" in found else []))]
    same = row.get("same", {})
    if "relative" in same:
        parts.append("same: " + ", ".join(f"{name} {x:.1e}" for name, x in same["relative"].items()))
    told += [
        f"    same: {x}" for x in (*dict.fromkeys(same.get("said", ())), *([same["failed"]] if "failed" in same else []))
    ]
    if "skipped" in row:
        parts.append(row["skipped"])
    return "\n".join([" | ".join(parts), *told])
