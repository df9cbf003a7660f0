"""Reproduce a table: train, evaluate and time every row, then write the report."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from kvbind.experiments.provenance import command, machine, versions
from kvbind.experiments.runs import Run, discard, run_name
from kvbind.experiments.speed import Speeds
from kvbind.experiments.subjects import ALL, SUBJECTS, Subject, named_subject
from kvbind.experiments.table_report import write_overview, write_report
from kvbind.experiments.table_text import describe, terminal_tables
from kvbind.experiments.tables import Outcome, Row, Table, as_data, row_labels
from kvbind.experiments.workers import Job, default_workers, train_all
from kvbind.inner.value import check_choice, check_positive_int
from kvbind.tasks import open_task_module
from kvbind.train.config import read_config, to_plain, to_yaml
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
    folder = out or Path(f"runs/{table.name}-{ALL}-{scale}")
    places = {name: out / name if out else report_folder(table, name, scale) for name in SUBJECTS}
    outcomes = {name: reproduce_task(table, name, out=out and places[name], data=None, **options) for name in SUBJECTS}
    folder.mkdir(parents=True, exist_ok=True)
    write_overview(folder, outcomes, places)
    if console:
        console.print(f"All tasks side by side: {folder / 'index.html'}")
    return {name: outcome.results for name, outcome in outcomes.items()}


def report_folder(table: Table, task: str, scale: str) -> Path:
    """Where a report goes that was not given a folder."""
    return Path(f"runs/{table.name}-{task}-{scale}")


def plan_runs(
    table: Table, task: str, scale: str, seeds: int, edits: Sequence[str], trained: Path
) -> dict[tuple[str, int], Job]:
    """The runs of every row that applies to the task, by row and seed."""
    inners = open_task_module(task).rows(configuration(task, scale, 0, edits))
    names = [name for name in table.rows if name in inners]
    jobs = {}
    for seed in range(seeds):
        for number, name in enumerate(names, start=1):
            config = with_inner(task, configuration(task, scale, seed, edits), inners[name])
            title = f"{number}/{len(names)} {name}" + (f" seed {seed}" if seeds > 1 else "")
            jobs[name, seed] = Job(task, config, trained / run_name(task, config), title)
    return jobs


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
    subject, module = named_subject(task), open_task_module(task)
    for name, value in (("seeds", seeds), ("workers", 1 if workers is None else workers)):
        check_positive_int(name, value)
    edits = [*overrides, *([f"data.source={json.dumps(data)}"] if data else [])]
    base = module.resolve(configuration(task, scale, 0, edits))
    device = pick_device(base.train.device)
    trained = out / "trained" if out else Path("runs/trained")
    out = out or report_folder(table, task, scale)
    jobs = plan_runs(table, task, scale, seeds, edits, trained)
    if console:
        console.print(
            f"[bold]{table.title}, {task}, scale {scale}[/]: {len(jobs) // seeds} rows x {seeds} seed(s) on {device}; "
            f"report in {out}"
        )
        console.print(to_yaml(base), style="dim", highlight=False, markup=False, soft_wrap=True)
    if fresh:
        for job in jobs.values():
            discard(job.folder)
    longest = max(len(job.title) for job in jobs.values())

    def finished(job: Job, run: Run) -> None:
        if console:
            note = "finished earlier" if run.reused else f"{run.result['training_seconds']:.0f} s"
            value = run.result["held_out"][subject.metric.name]
            shown = f"{subject.metric.title} {value:.{subject.metric.digits}f}"
            console.print(f"{job.title:<{longest}} {shown}, {note}", soft_wrap=True)

    done = train_all(list(jobs.values()), workers or default_workers(device), console, finished)
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
        "config": to_plain(base),
        "throughput": subject.speed.setting(base) if table.speed else None,
        "rows": [as_data(row, subject, trained.parent) for row in rows],
    }
    outcome = Outcome(table, subject, rows, results, to_yaml(base))
    write_report(out, outcome)
    if console:
        for part in terminal_tables(outcome):
            console.print(part)
        console.print(describe(outcome))
        console.print(f"{results['wall_seconds']:.0f} s. Everything is in {out}; start with {out / 'index.html'}")
    return outcome
