"""Trained rows for figures: the training runs of the tables, found where they are and trained where they are not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvbind.experiments.findings import Request
from kvbind.experiments.plan import plan_runs
from kvbind.experiments.runs import Run, load_model
from kvbind.experiments.subjects import Subject, named_subject
from kvbind.experiments.tables import row_labels
from kvbind.experiments.workers import Job
from kvbind.inner.value import check_choice
from kvbind.tasks import open_task_module
from kvbind.train.config import to_plain


@dataclass(frozen=True)
class Trained:
    """The finished runs that an experiment looks at.

    Attributes:
        subject: their task, as tables show it.
        labels: what each row changes, by row.
        runs: one per seed, by row.
        jobs: the same, with their configurations.
        config: of all of them, but for their inner loop, as plain data.
        device: where they were trained, and are looked at.
        out: folder of the report, which exists.
    """

    subject: Subject
    labels: Mapping[str, str]
    runs: Mapping[str, Sequence[Run]]
    jobs: Mapping[str, Sequence[Job]]
    config: Any
    device: torch.device
    out: Path

    def folders(self) -> dict[str, list[str]]:
        """Where the runs are, by row."""
        return {name: [run.folder.as_posix() for run in runs] for name, runs in self.runs.items()}

    def open(self, row: str, seed: int) -> tuple[Any, Any, Job]:
        """A trained model on the device, its task without training data, and its job."""
        job = self.jobs[row][seed]
        task = open_task_module(job.task).Task(job.config, training=False)
        return load_model(job.folder, task).to(self.device), task, job


def train_rows(name: str, rows: Sequence[str], tasks: Sequence[str], request: Request) -> Trained:
    """Train rows of the paper's tables, or read what they came to earlier.

    Args:
        name: of the experiment, whose folder the report goes to.
        rows: names among `kvbind.experiments.tables.LABELS`.
        tasks: those that the experiment is made for.
        request: what was asked.

    Raises:
        ValueError: another task, an unknown scale, or an edit that does not fit.
        TrainingStoppedError: as `kvbind.train.train`.
    """
    check_choice("task", request.task, tuple(tasks))
    task, scale = request.task, request.scale
    plan = plan_runs(
        name, rows, task, scale=scale, seeds=request.seeds, out=request.out, data=request.data, workers=request.workers,
        overrides=request.overrides,
    )  # fmt: skip
    request.say(f"{name}, {task}, scale {scale}: {len(plan.jobs)} training run(s) on {plan.device}; report in {plan.out}")

    def finished(job: Job, run: Run) -> None:
        note = "finished earlier" if run.reused else f"{run.result['training_seconds']:.0f} s"
        request.say(f"{job.title}: {note}")

    done = plan.train(request.fresh, request.console, finished)
    own_runs: dict[str, list[Run]] = {}
    own_jobs: dict[str, list[Job]] = {}
    for ((row, _), job), run in zip(plan.jobs.items(), done, strict=True):
        own_runs.setdefault(row, []).append(run)
        own_jobs.setdefault(row, []).append(job)
    plan.out.mkdir(parents=True, exist_ok=True)
    subject = named_subject(task)
    labels = {row: label for row, label in row_labels(rows, subject).items() if row in own_runs}
    return Trained(subject, labels, own_runs, own_jobs, to_plain(plan.config), plan.device, plan.out)
