"""The training runs that an experiment asks for: planned, and trained where they are not finished."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kvbind.experiments.request import Request
from kvbind.experiments.subjects import named_subject
from kvbind.experiments.subjects.rows import LABELS
from kvbind.experiments.training.jobs import Finished, TrainingJob, default_workers
from kvbind.experiments.training.run_folders import RESULT
from kvbind.experiments.training.runs import Fingerprints, Run, run_name
from kvbind.experiments.training.workers import train_all
from kvbind.inner.value import check_choice
from kvbind.tasks import open_task_module
from kvbind.train.config import read_config
from kvbind.train.loop import pick_device


def configuration(task: str, scale: str, seed: int = 0, overrides: Sequence[str] = ()) -> Any:
    """The training run of the full system, as its preset and edits say it.

    Raises:
        ValueError: an unknown task or scale, or an edit that does not fit, such as one of the seed.
    """
    subject = named_subject(task)
    check_choice("scale", scale, tuple(subject.scales))
    if any(edit.startswith("seed=") for edit in overrides):
        raise ValueError("overrides must not set seed: seeds says how many there are, counted from 0")
    module, chosen = open_task_module(task), subject.scales[scale]
    config = read_config(module.Config, module.PRESETS, chosen.preset, [*chosen.overrides, *overrides])
    config.seed = seed
    return config


def with_inner(task: str, config: Any, inner: Any) -> Any:
    """`config` with another inner loop (what the task's `rows` gives for it), everything spelled out."""
    changed = copy.deepcopy(config)
    changed.model.inner = inner
    return open_task_module(task).resolve(changed)


def row_configs(task: str, config: Any) -> dict[str, Any]:
    """The configuration of each row that applies to a task, everything spelled out: the paper's, then the baselines.

    Args:
        task: its name.
        config: the full system's.
    """
    module = open_task_module(task)
    found = {row: with_inner(task, config, inner) for row, inner in module.rows(config).items()}
    for row, fields in module.baselines(config).items():
        changed = copy.deepcopy(config)
        changed.model.fields = {**changed.model.fields, **fields}
        found[row] = module.resolve(changed)
    return found


def report_folder(name: str, task: str, scale: str) -> Path:
    """Where a report goes that was not given a folder."""
    return Path(f"runs/{name}-{task}-{scale}")


@dataclass(frozen=True)
class RunsPlan:
    """The runs of some rows, and where they and the report on them go.

    Attributes:
        config: of all of them, but for their inner loop.
        device: where they are trained.
        out: folder of the report.
        trained: folder of the training runs.
        jobs: by row and seed, seeds outermost.
        workers: how many are trained at once.
    """

    config: Any
    device: torch.device
    out: Path
    trained: Path
    jobs: dict[tuple[str, int], TrainingJob]
    workers: int

    @property
    def rows(self) -> list[str]:
        """The rows that apply to the task."""
        return list(dict.fromkeys(row for row, _ in self.jobs))

    def by_row(self) -> list[tuple[str, TrainingJob]]:
        """The runs in their order, each with the name of its row."""
        return [(row, job) for (row, _), job in self.jobs.items()]

    def train(self, request: Request, finished: Finished) -> dict[tuple[str, int], Run]:
        """Train every run, or read what it came to earlier.

        Args:
            request: what was asked.
            finished: called with each job and its run as soon as there is one.

        Returns:
            The finished runs by row and seed: all of them, unless the request's time was too short or it is of some rows.

        Raises:
            UnfinishedError: not one was finished in time.
            TrainingStoppedError: as `kvbind.train.train`.
        """
        jobs = {
            (row, seed): replace(job, fresh=request.fresh and request.trains(row))
            for (row, seed), job in self.jobs.items()
            if request.trains(row) or job.finished
        }
        found = train_all(list(jobs.values()), self.workers, request.console, finished, deadline=request.deadline)
        done = {key: run for key, run in zip(jobs, found, strict=True) if run is not None}
        if not done:
            others = len(list(self.trained.glob(f"*/{RESULT}")))
            raise UnfinishedError(
                f"no training run of {self.out.name} is finished yet; the same command goes on with them"
                + f" ({self.trained} has {others} finished run(s), all of other configurations or data)" * bool(others)
            )
        return done


def planned_jobs(name: str, rows: Sequence[str], request: Request) -> list[tuple[str, TrainingJob]]:
    """The runs of some rows in their order, each with the name of its row; arguments as `plan_runs` takes them."""
    return plan_runs(name, rows, request).by_row()


def data_edits(task: str, source: str | None) -> list[str]:
    """Edits that take another source of data, and, where it has one of its own, what is evaluated on with it."""
    if not source:
        return []
    others = named_subject(task).held_out_of.get(source)
    return [f"data.source={json.dumps(source)}"] + ([f"data.held_out_source={json.dumps(others)}"] if others else [])


class UnfinishedError(ValueError):
    """There was not time enough for a single training run that a report could be about."""


def plan_runs(
    name: str, rows: Sequence[str], request: Request, known: Fingerprints | None = None, edits: Sequence[str] = ()
) -> RunsPlan:
    """The runs of every row that applies to a task.

    Args:
        name: of the experiment.
        rows: names among `kvbind.experiments.subjects.rows.LABELS`.
        request: what was asked.
        known: fingerprints of data that were read already.
        edits: of every run's configuration, before those that were asked for.

    Raises:
        ValueError: an unknown task or scale, or an edit that does not fit.
    """
    task, scale, data = request.task, request.scale, request.source(request.task)
    module = open_task_module(task)
    for row in request.rows or ():
        check_choice("rows", row, tuple(LABELS))
    edits = [*edits, *request.overrides, *data_edits(task, data)]
    configs: dict[tuple[str, int], Any] = {}
    for seed in range(request.seeds):
        own = row_configs(task, configuration(task, scale, seed, edits))
        configs |= {(row, seed): own[row] for row in rows if row in own}
    return plan_configs(name, module.resolve(configuration(task, scale, 0, edits)), configs, request, known)


def plan_configs(
    name: str,
    config: Any,
    configs: Mapping[tuple[str, int], Any],
    request: Request,
    known: Fingerprints | None = None,
) -> RunsPlan:
    """The runs of some configurations.

    Args:
        name: of the experiment, whose folder the report goes to.
        config: what they have in common, as the report shows it.
        configs: by row and seed, everything spelled out, in the order in which they are trained.
        request: what was asked.
        known: fingerprints of data that were read already.
    """
    task, out = request.task, request.out
    device = pick_device(config.train.device)
    trained = request.trained or (out / "trained" if out else Path("runs/trained"))
    known = known or Fingerprints(trained)
    numbers = {row: number for number, row in enumerate(dict.fromkeys(row for row, _ in configs), start=1)}
    jobs = {}
    for (row, seed), own in configs.items():
        title = f"{numbers[row]}/{len(numbers)} {row}" + (f" seed {seed}" if request.seeds > 1 else "")
        jobs[row, seed] = TrainingJob(task, own, trained / run_name(task, own, known), title)
    workers = request.workers or default_workers(device)
    return RunsPlan(config, device, out or report_folder(name, task, request.scale), trained, jobs, workers)
