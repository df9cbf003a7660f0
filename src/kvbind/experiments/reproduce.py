"""Reproduce a table: train, evaluate and time every row, then write the report."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from kvbind.experiments.plan import plan_runs, report_folder
from kvbind.experiments.provenance import command, machine, versions
from kvbind.experiments.runs import Run
from kvbind.experiments.speed import Speeds
from kvbind.experiments.subjects import ALL, SUBJECTS, Subject, named_subject
from kvbind.experiments.table_report import write_overview, write_report
from kvbind.experiments.table_text import describe, terminal_tables
from kvbind.experiments.tables import Outcome, Row, Table, as_data, row_labels
from kvbind.experiments.workers import Job
from kvbind.train.config import to_plain, to_yaml


def reproduce_table(
    table: Table,
    *,
    task: str = "language",
    scale: str = "smoke",
    seeds: int = 1,
    out: Path | None = None,
    fresh: bool = False,
    data: str | None = None,
    workers: int | None = None,
    overrides: Sequence[str] = (),
    console: Console | None = None,
) -> dict[str, Any]:
    """Train, evaluate and time every row of a table, then write the report.

    Finished rows are kept and an unfinished one goes on from its last checkpoint, so that the same call continues what was
    interrupted. Rows of other tables that are the same training run are found where they are.

    Args:
        table: which.
        task: one of `kvbind.experiments.subjects.SUBJECTS`, or "all" for each in turn and a page on all together.
        scale: one of the task's scales: "smoke", "small" or "paper".
        seeds: how many, counted from 0.
        out: the report's folder, whose `trained/` holds the training runs; default `runs/TABLE-TASK-SCALE`, with the runs in
            `runs/trained`, where other experiments find them.
        fresh: train everything anew.
        data: another source of data.
        workers: rows trained at once, each in a process with one CPU thread; 1 for in this process, one after another.
            Default: one for each CPU core up to `kvbind.experiments.workers.MOST_WORKERS`, and 1 on a GPU, which several
            small runs may share.
        overrides: further `key=value` edits of every row's configuration.
        console: where progress and the table are shown; None for nowhere.

    Returns:
        What `results.json` holds; of "all", by task.

    Raises:
        ValueError: an unknown task or scale, or an edit that does not fit.
    """
    options: dict[str, Any] = {"scale": scale, "seeds": seeds, "fresh": fresh, "workers": workers, "overrides": overrides,
                               "console": console}  # fmt: skip
    if task != ALL:
        return dict(reproduce_task(table, task, out=out, data=data, **options).results)
    if data is not None:
        raise ValueError(f"data must be None for task={ALL!r}, as each task has data of its own; got {data!r}")
    folder = out or report_folder(table.name, ALL, scale)
    places = {name: out / name if out else report_folder(table.name, name, scale) for name in SUBJECTS}
    outcomes = {name: reproduce_task(table, name, out=out and places[name], data=None, **options) for name in SUBJECTS}
    folder.mkdir(parents=True, exist_ok=True)
    write_overview(folder, outcomes, places)
    if console:
        console.print(f"All tasks side by side: {folder / 'index.html'}")
    return {name: outcome.results for name, outcome in outcomes.items()}


def gather_rows(
    table: Table,
    subject: Subject,
    jobs: Mapping[tuple[str, int], Job],
    done: Sequence[Run],
    device: torch.device,
    kept: Path,
    fresh: bool,
) -> tuple[Row, ...]:
    """All rows of the table, timed where it has throughput.

    Args:
        table: which.
        subject: of what task.
        jobs: by row and seed, seeds outermost.
        done: their runs, in the same order.
        device: where they were trained.
        kept: where a throughput that takes measuring is kept.
        fresh: measure it anew.
    """
    runs: dict[str, list[Run]] = {}
    for (name, _), run in zip(jobs, done, strict=True):
        runs.setdefault(name, []).append(run)
    configs = {name: jobs[name, 0].config for name in runs}
    speeds: Speeds = subject.speed.measure(configs, runs, device, kept, fresh) if table.speed else {}
    return tuple(
        Row(
            name,
            label,
            subject.paper.get(name),
            configs[name].model.inner if name in configs else None,
            tuple(runs.get(name, ())),
            speeds.get(name, {}),
            subject.speed.published(name) if table.speed else {},
        )
        for name, label in row_labels(table.rows, subject).items()
    )


def reproduce_task(
    table: Table,
    task: str,
    *,
    scale: str,
    seeds: int,
    out: Path | None,
    fresh: bool,
    data: str | None,
    workers: int | None,
    overrides: Sequence[str],
    console: Console | None,
) -> Outcome:
    """`reproduce_table` of one task."""
    started = time.monotonic()
    subject = named_subject(task)
    plan = plan_runs(
        table.name, table.rows, task, scale=scale, seeds=seeds, out=out, data=data, workers=workers, overrides=overrides
    )
    jobs, device, out = plan.jobs, plan.device, plan.out
    if console:
        console.print(
            f"[bold]{table.title}, {task}, scale {scale}[/]: {len(jobs) // seeds} rows x {seeds} seed(s) on {device}; "
            f"report in {out}"
        )
        console.print(to_yaml(plan.config), style="dim", highlight=False, markup=False, soft_wrap=True)
    longest = max(len(job.title) for job in jobs.values())

    def finished(job: Job, run: Run) -> None:
        if console:
            note = "finished earlier" if run.reused else f"{run.result['training_seconds']:.0f} s"
            value = run.result["held_out"][subject.metric.name]
            shown = f"{subject.metric.title} {value:.{subject.metric.digits}f}"
            console.print(f"{job.title:<{longest}} {shown}, {note}", soft_wrap=True)

    done = plan.train(fresh, console, finished)
    out.mkdir(parents=True, exist_ok=True)
    rows = gather_rows(table, subject, jobs, done, device, out / "throughput.json", fresh)
    results = {
        "experiment": table.name,
        "task": task,
        "scale": scale,
        "seeds": list(range(seeds)),
        "command": command(),
        "wall_seconds": round(time.monotonic() - started, 1),
        "training_seconds": round(sum(run.result["training_seconds"] for run in done), 1),
        "versions": versions(),
        "machine": machine(device),
        "data": done[0].result["data"],
        "config": to_plain(plan.config),
        "throughput": subject.speed.setting(plan.config) if table.speed else None,
        "rows": [as_data(row, subject, plan.trained.parent) for row in rows],
    }
    outcome = Outcome(table, subject, rows, results, to_yaml(plan.config))
    write_report(out, outcome)
    if console:
        for part in terminal_tables(outcome):
            console.print(part)
        console.print(describe(outcome))
        console.print(f"{results['wall_seconds']:.0f} s. Everything is in {out}; start with {out / 'index.html'}")
    return outcome
