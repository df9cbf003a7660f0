"""`kvbind reproduce ... --plan`: the training runs of a command, how far each is, and about how long the rest takes.

Where a run, or another of its kind, has taken steps here, what is left of it is counted by their time. Without a GPU, the
slowest finished run of the same scale counts next, if there is one: of the same data and sizes, with another inner loop.
On a GPU, it is what was measured on one NVIDIA H200: for the language model, whole steps as CUDA graphs
(`results/bench/models-h200.json`), at equal model FLOPs per second for sizes and rows that are near a measured one; for
images and views, the runs of `--scale small` (`results/table2-images-small`, `results/table2-views-small`), several of which
shared a GPU: the most that it may take.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table as TerminalTable

from kvbind.experiments.training.jobs import TrainingJob, visible_gpus
from kvbind.experiments.training.run_folders import CONFIG, RESULT, open_run, result_of
from kvbind.provenance import machine
from kvbind.screen import duration
from kvbind.tasks.inner_loops import SOFTMAX, WINDOW
from kvbind.train.checkpoint import checkpoints, step_of
from kvbind.train.config import config_hash, what_matters
from kvbind.train.loop import pick_device
from kvbind.train.metrics import read_metrics

HERE, OTHERS, MEASURED, MOST = "timed here", "by the slowest like it here", "as on an H200", "at most, as on an H200"
"""Where a time comes from."""

TOKENS = {"rung0": 327_394.0, "rung2": 862_873.0, "rung6": 1_190_293.0, SOFTMAX: 570_297.0}
"""Tokens per second of training the preset "30m" on bytes, 3 x 8192 at once, by row; of attention, a Llama."""

BESIDE = {"images": 3_680.0, "views": 951.0}
"""Images or views per second of the slowest row of `--scale small`, beside other runs."""

LIKE = {"rung1": "rung0", "ascent": "rung0", "key_for_query": "rung0", "rung3": "rung2", "rung4": "rung2", "rung5": "rung2",
        WINDOW: "rung6"}  # fmt: skip
"""By row, a measured one of as many model FLOPs per second, or fewer."""

ENOUGH = 20
"""Steps from which on a run's own time counts; the first ones compile and tune."""


@dataclass(frozen=True)
class Left:
    """What is left of a run.

    Attributes:
        job: the run.
        done: steps behind which it has a checkpoint; all of them of one that is finished.
        seconds: that the rest takes; NaN where nothing is known.
        basis: where they come from.
    """

    job: TrainingJob
    done: int
    seconds: float
    basis: str

    @property
    def steps(self) -> int:
        """How many there are in all."""
        return int(self.job.config.train.steps)


def estimate(jobs: Mapping[Path, tuple[str, TrainingJob]]) -> list[Left]:
    """What is left of each run.

    Args:
        jobs: with the names of their rows, by folder.
    """
    kinds: dict[str, float] = {}
    for _, job in jobs.values():
        begun = (job.folder / CONFIG).is_file() and trained_here(job.folder, pick_device(job.config.train.device))
        timed = seconds_per_step(job.folder) if begun else None
        if timed is not None:
            kinds[kind(job)] = max(timed, kinds.get(kind(job), 0.0))
    alike = seconds_by_scale(job for _, job in jobs.values() if not on_gpu(job))
    found = []
    for row, job in jobs.values():
        done = steps_done(job)
        left = int(job.config.train.steps) - done
        if not left:
            found.append(Left(job, done, 0.0, "finished"))
        elif kind(job) in kinds:
            found.append(Left(job, done, left * kinds[kind(job)], HERE))
        elif not on_gpu(job):
            own, scale = (alike.get(scale_of(job.task, job.config, inner), math.nan) for inner in (True, False))
            seconds, basis = (scale, OTHERS) if math.isnan(own) else (own, HERE)
            found.append(Left(job, done, left * seconds, "" if math.isnan(seconds) else basis))
        else:
            speed = measured(job, row)
            if speed is None:
                found.append(Left(job, done, math.nan, ""))
            else:
                basis = MOST if job.task in BESIDE else MEASURED
                found.append(Left(job, done, left * units_of_step(job) / speed, basis))
    return found


def kind(job: TrainingJob) -> str:
    """What runs have in common that take equal steps: everything but the seed."""
    return config_hash([job.task, {**what_matters(job.config), "seed": 0}])


def on_gpu(job: TrainingJob) -> bool:
    """Whether a run would be trained on a GPU that the measurements may stand for."""
    return pick_device(job.config.train.device).type == "cuda"


def trained_here(folder: Path, device: torch.device) -> bool:
    """Whether a run, as far as its result says, was trained on a device like this one."""
    result = result_of(folder)
    return result is None or result.get("machine", {}).get("device") == machine(device)["device"]


def scale_of(task: str, config: Any, inner: bool) -> str:
    """What runs have in common whose steps are alike, however many they are and from whichever seed.

    Args:
        task: its name.
        config: of that task.
        inner: whether the inner loop counts.
    """
    plain = what_matters(config)
    plain["train"] = {key: x for key, x in plain["train"].items() if key not in ("steps", "warmup")}
    if not inner:
        plain["model"] = {key: x for key, x in plain["model"].items() if key != "inner"}
    return config_hash([task, inner, {**plain, "seed": 0}])


def seconds_by_scale(jobs: Iterable[TrainingJob]) -> dict[str, float]:
    """The seconds of a step of the slowest run that was finished on this processor, by both of its `scale_of`.

    Args:
        jobs: runs beside which finished ones are looked for.
    """
    found: dict[str, float] = {}
    for home, task in sorted({(job.folder.parent, job.task) for job in jobs}):
        for path in home.glob(f"{task}-*/{RESULT}"):
            with suppress(ValueError, TypeError, OSError):  # what is none, or an earlier version's
                result, (_, config) = result_of(path.parent) or {}, open_run(path.parent)
                took, steps = result.get("training_seconds"), result.get("steps")
                if not took or not steps or not trained_here(path.parent, torch.device("cpu")):
                    continue
                seconds = seconds_per_step(path.parent) or float(took) / steps
                for inner in (True, False):
                    scale = scale_of(task, config, inner)
                    found[scale] = max(seconds, found.get(scale, 0.0))
    return found


def steps_done(job: TrainingJob) -> int:
    """Steps that a run need not take again."""
    if job.fresh:
        return 0
    if (job.folder / RESULT).is_file():
        return int(job.config.train.steps)
    there = checkpoints(job.folder)
    return min(step_of(there[-1]), int(job.config.train.steps)) if there else 0


def seconds_per_step(folder: Path) -> float | None:
    """The time of a run's steps, after its first ones; None of too few."""
    rows = [row for row in read_metrics(folder) if "seconds" in row]
    if len(rows) < ENOUGH:
        return None
    first, last = rows[len(rows) // 2], rows[-1]
    return float((last["seconds"] - first["seconds"]) / (last["step"] - first["step"]))


def units_of_step(job: TrainingJob) -> int:
    """Tokens, images or views that a step reads."""
    data = job.config.data
    each = {"language": lambda: data.length, "views": lambda: data.inputs + data.targets}.get(job.task, lambda: 1)
    return int(data.batch * each() * job.config.train.accumulate)


def measured(job: TrainingJob, row: str) -> float | None:
    """Tokens, images or views per second of a run of that row, from measurements on an H200; None where there are none."""
    if job.task in BESIDE:
        return BESIDE[job.task]
    near = LIKE.get(row, row)
    if job.task != "language" or near not in TOKENS:
        return None
    from kvbind.inner.systems import RUNGS, ladder
    from kvbind.models import LactConfig
    from kvbind.models.flops import lact_flops
    from kvbind.models.presets import PRESETS
    from kvbind.tasks.language import inner_loop, model_fields

    def per_token(config: LactConfig, length: int) -> float:
        return sum(lact_flops(config, length).values()) / length

    sizes, length = PRESETS["30m"], 8192
    which = {"inner": ladder(sizes["inner"])[near]} if near in RUNGS else {"fast_weights": False, "window_size": length}
    timed = LactConfig(**{**sizes, **which, "vocab_size": 256})
    fields = {**model_fields(job.config.model), "inner": inner_loop(job.config.model)}
    own = LactConfig(**{**fields, "vocab_size": 257 if job.config.data.tokenizer == "bytes" else fields["vocab_size"]})
    return TOKENS[near] * per_token(timed, length) / per_token(own, job.config.data.length)


def rows_of(jobs: Sequence[tuple[str, TrainingJob]]) -> dict[Path, tuple[str, TrainingJob]]:
    """Runs by folder, as `estimate` takes them; those that share a folder are one."""
    found: dict[Path, tuple[str, TrainingJob]] = {}
    for row, job in jobs:
        found.setdefault(job.folder, (row, job))
    return found


def show(title: str, jobs: Sequence[tuple[str, TrainingJob]], console: Console | None) -> dict[str, Any]:
    """Say what a command would train, and how long that takes.

    Args:
        title: of the plan.
        jobs: its runs, in their order, each with the name of its row.
        console: where it is printed; None for nowhere.

    Returns:
        The same as plain data.
    """
    found = estimate(rows_of(jobs))
    known = sum(x.seconds for x in found if not math.isnan(x.seconds))
    unknown = sum(math.isnan(x.seconds) for x in found)
    if console is not None:
        table = TerminalTable(box=box.SIMPLE_HEAD, pad_edge=False)
        for heading in ("run", "steps done", "of", "left", ""):
            table.add_column(heading, justify="left" if heading in ("run", "") else "right", no_wrap=True)
        for x in found:
            left = "unknown" if math.isnan(x.seconds) else duration(x.seconds)
            table.add_row(x.job.title, f"{x.done:,}", f"{x.steps:,}", left, x.basis)
        console.print(title, style="bold", markup=False)
        console.print(table)
        in_all = summary(known, unknown, len(found), any(on_gpu(x.job) for x in found))
        console.print(f"{in_all} --minutes ends in time, and the same command goes on.", markup=False, soft_wrap=True)
    return {
        "seconds": known,
        "runs": [
            {"run": x.job.title, "folder": x.job.folder.as_posix(), "steps_done": x.done, "steps": x.steps,
             "seconds": None if math.isnan(x.seconds) else x.seconds, "basis": x.basis}
            for x in found
        ],
    }  # fmt: skip


def summary(known: float, unknown: int, runs: int, gpu: bool) -> str:
    """How long all runs take together, in words.

    Args:
        known: seconds of the runs of which something is known.
        unknown: how many others there are.
        runs: how many there are in all.
        gpu: whether they would be trained on a GPU.
    """
    aside = "Starts, evaluations and reports are not in it."
    if gpu:
        gpus = len(visible_gpus())
        return (
            f"{duration(known)} of one GPU are left, {known / 600:,.1f} pieces of ten minutes"
            + (f"; about {duration(known / gpus)} on the {gpus} that are here" if gpus > 1 else "")
            + (f"; of {unknown} run(s) nothing is known" if unknown else "")
            + f". {aside}"
        )
    if unknown and not known:
        left = f"what is left of {unknown} run(s)" if unknown < runs else "these runs"
        return f"No time is known for this processor: nothing on the scale of {left} was finished on it."
    others = f"; of {unknown} run(s) no time is known for this processor" if unknown else ""
    return f"{duration(known)} of training are left, one run after another{others}. {aside}"


def plan_experiment(experiment: str, **options: Any) -> dict[str, Any]:
    """What `kvbind reproduce EXPERIMENT` would train.

    Args:
        experiment: among `kvbind.experiments.EXPERIMENTS`, or "all".
        options: the fields of `kvbind.experiments.request.Request`.

    Raises:
        ValueError: an experiment without training runs that are known beforehand, an unknown task or scale, or an edit that
            does not fit.
    """
    from kvbind.experiments import open_experiment, reproduce_all
    from kvbind.experiments.request import Request
    from kvbind.experiments.subjects import ALL

    request = Request(**options)
    if experiment == "all":
        jobs = reproduce_all.planned(request)
    else:
        module = open_experiment(experiment)
        if not hasattr(module, "planned_jobs"):
            raise ValueError(f"plan must be of an experiment on trained rows; {experiment} has none of its own")
        if request.task == ALL:
            raise ValueError("task must be one task in a plan of one experiment; got 'all' (kvbind reproduce all plans all)")
        jobs = module.planned_jobs(request)
    jobs = [(row, job) for row, job in jobs if request.trains(row)]
    return show(f"{experiment}, {request.task}, scale {request.scale}, {request.seeds} seed(s)", jobs, request.console)
