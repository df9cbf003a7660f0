"""Trained rows for figures: the training runs of the tables, found where they are and trained where they are not."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvbind.experiments.request import Request
from kvbind.experiments.subjects import Subject, named_subject
from kvbind.experiments.subjects.rows import row_labels
from kvbind.experiments.training.jobs import TrainingJob
from kvbind.experiments.training.plans import UnfinishedError, plan_runs
from kvbind.experiments.training.run_folders import WEIGHTS, exported, load_model
from kvbind.experiments.training.runs import Run
from kvbind.inner.value import check_choice
from kvbind.tasks import open_task_module
from kvbind.train.config import to_plain


@dataclass(frozen=True)
class Trained:
    """The finished runs that an experiment looks at.

    Attributes:
        subject: their task, as tables show it.
        labels: what each row changes, by row.
        runs: by row and seed; a row is there if one of its runs is.
        jobs: the same, with their configurations.
        missing: sentences, to stand behind others, on runs that there was no time for or whose weights are elsewhere; empty
            where there are none.
        config: of all of them, but for their inner loop, as plain data.
        device: where they were trained, and are looked at.
        out: folder of the report, which exists.
    """

    subject: Subject
    labels: Mapping[str, str]
    runs: Mapping[str, Mapping[int, Run]]
    jobs: Mapping[str, Mapping[int, TrainingJob]]
    missing: str
    config: Any
    device: torch.device
    out: Path

    def folders(self) -> dict[str, list[str]]:
        """Where the runs are, by row."""
        return {name: [run.folder.as_posix() for run in runs.values()] for name, runs in self.runs.items()}

    def open(self, row: str, seed: int, config: Any = None) -> tuple[Any, Any, TrainingJob]:
        """A trained model on the device, its task without training data, and its job; `config` takes other held-out data."""
        job = self.jobs[row][seed]
        task = open_task_module(job.task).Task(config or job.config, training=False)
        return load_model(job.folder, task).to(self.device), task, job


def train_rows(name: str, rows: Sequence[str], tasks: Sequence[str], request: Request, *, weights: bool = False) -> Trained:
    """Train rows of the paper's tables, or read what they came to earlier.

    Args:
        name: of the experiment, whose folder the report goes to.
        rows: names among `kvbind.experiments.subjects.rows.LABELS`.
        tasks: those that the experiment is made for.
        request: what was asked.
        weights: whether the experiment looks into models, so that runs that came without their weights are left out.

    Raises:
        ValueError: another task, an unknown scale, or an edit that does not fit.
        UnfinishedError: no run was finished in time, or none has its weights here.
        TrainingStoppedError: as `kvbind.train.train`.
    """
    check_choice("task", request.task, tuple(tasks))
    request.refuse_measuring(name)
    plan = plan_runs(name, rows, request)
    request.say(
        f"{name}, {request.task}, scale {request.scale}: {len(plan.jobs)} training run(s) on {plan.device}; "
        f"report in {plan.out}"
    )

    def tell(job: TrainingJob, run: Run) -> None:
        if not run.reused:
            request.say(f"{job.title}: {run.time_note}")

    done = plan.train(request, tell)
    elsewhere = {key for key, run in done.items() if weights and not exported(run.folder)}
    if len(elsewhere) == len(done):
        raise UnfinishedError(
            f"the weights of {name}'s finished runs are not here: no folder of them in {plan.trained} has {WEIGHTS}/; bring "
            "those, or train anew with --fresh"
        )
    own_runs: dict[str, dict[int, Run]] = {}
    own_jobs: dict[str, dict[int, TrainingJob]] = {}
    for (row, seed), run in ((key, run) for key, run in done.items() if key not in elsewhere):
        own_runs.setdefault(row, {})[seed] = run
        own_jobs.setdefault(row, {})[seed] = plan.jobs[row, seed]
    plan.out.mkdir(parents=True, exist_ok=True)
    subject = named_subject(request.task)
    labels = {row: label for row, label in row_labels(rows, subject).items() if row in own_runs}
    runs = {row: own_runs[row] for row in labels}
    finished = {row: seeds_of(done, row) for row in plan.rows}
    missing = sentence("Unfinished", {row: (seeds_of(plan.jobs, row), own) for row, own in finished.items()})
    missing += sentence("Weights not here", {row: (own, runs.get(row, ())) for row, own in finished.items()})
    if elsewhere:
        request.say(missing.strip())
    return Trained(subject, labels, runs, own_jobs, missing, to_plain(plan.config), plan.device, plan.out)


def seeds_of(keys: Iterable[tuple[str, int]], row: str) -> list[int]:
    """The seeds of a row, among pairs of rows and seeds."""
    return [seed for name, seed in keys if name == row]


def sentence(why: str, rows: Mapping[str, tuple[Iterable[int], Container[int]]]) -> str:
    """A sentence on runs that are left out, given as `unfinished` takes them; empty where there are none."""
    which = unfinished(rows)
    return f" {why}, and left out: {which}." if which else ""


def unfinished(rows: Mapping[str, tuple[Iterable[int], Container[int]]]) -> str:
    """Runs that are missing, in words; empty where there are none.

    Args:
        rows: by name, the seeds that were planned and those of them that are finished.
    """
    missing = {name: sorted(seed for seed in planned if seed not in there) for name, (planned, there) in rows.items()}
    return ", ".join(
        f"{name} (seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))})" for name, seeds in missing.items() if seeds
    )
