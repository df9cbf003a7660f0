"""Reproduce a table: train, evaluate and time every row, then write the report."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from kvbind.experiments.outcomes.table import Table, TableOutcome, TableRow, as_data
from kvbind.experiments.outcomes.text import describe, terminal_tables
from kvbind.experiments.outcomes.verdicts import judge
from kvbind.experiments.request import Request
from kvbind.experiments.subjects import ALL, SUBJECTS, Subject, named_subject
from kvbind.experiments.subjects.rows import BASELINES, NO_FAST_WEIGHTS, row_labels
from kvbind.experiments.subjects.throughput import Speeds
from kvbind.experiments.tables.output import write_overview, write_report
from kvbind.experiments.tables.projection import measure_rows
from kvbind.experiments.training.jobs import TrainingJob
from kvbind.experiments.training.plans import RunsPlan, UnfinishedError, plan_runs, report_folder
from kvbind.experiments.training.runs import Run
from kvbind.provenance import command, machine, today, versions
from kvbind.screen import duration
from kvbind.train.config import to_plain, to_yaml


def reproduce_table(table: Table, **options: Any) -> dict[str, Any]:
    """Train, evaluate and time every row of a table, then write the report.

    Finished rows are kept and an unfinished one goes on from its last checkpoint, so that the same call continues what was
    interrupted. Rows of other tables that are the same training run are found where they are.

    Args:
        table: whose rows are trained.
        options: the fields of `kvbind.experiments.request.Request`; the task may be "all", for each in turn and a page on
            all together.

    Returns:
        What `results.json` holds; of "all", by task.

    Raises:
        ValueError: an unknown task or scale, or an edit that does not fit.
        UnfinishedError: there was not time enough for a single row.
    """
    request = Request(**options)
    if request.measure is not None:
        return measure_rows(table.name, table.rows, request)
    if request.task != ALL:
        return dict(reproduce_task(table, request).results)
    if isinstance(request.data, str):
        raise ValueError(
            f"data must be None or name a task, such as language=PATH, for task={ALL!r}, as each task has data of its own; "
            f"got {request.data!r}"
        )
    out, outcomes = request.out, {}
    places = {name: out / name if out else report_folder(table.name, name, request.scale) for name in SUBJECTS}
    for name in SUBJECTS:
        own = replace(request, task=name, out=out and places[name])
        try:
            outcomes[name] = reproduce_task(table, own)
        except UnfinishedError as error:
            request.say(str(error))
    if not outcomes:
        raise UnfinishedError(f"no training run of {table.name} is finished yet; the same command goes on with them")
    folder = out or report_folder(table.name, ALL, request.scale)
    folder.mkdir(parents=True, exist_ok=True)
    write_overview(folder, outcomes, {name: places[name] for name in outcomes})
    request.say(f"All tasks side by side: {folder / 'index.html'}")
    return {name: outcome.results for name, outcome in outcomes.items()}


def gather_rows(
    table: Table, subject: Subject, plan: RunsPlan, done: Mapping[tuple[str, int], Run], fresh: bool
) -> tuple[TableRow, ...]:
    """All rows of the table, timed where it has throughput.

    Args:
        table: whose rows are trained.
        subject: of what task.
        plan: of its runs.
        done: those that are finished, by row and seed.
        fresh: measure a throughput anew that takes measuring, even where it is known.
    """
    configs: dict[str, Any] = {}
    for (name, _), job in plan.jobs.items():
        configs.setdefault(name, job.config)
    seeds = {name: [seed for row, seed in done if row == name] for name in configs}
    runs = {name: [done[name, seed] for seed in seeds[name]] for name in configs if seeds[name]}
    speeds: Speeds = {}
    if table.speed:
        timed = {name: x for name, x in configs.items() if not (subject.speed.measured_now and name in BASELINES)}
        speeds = subject.speed.measure(timed, runs, plan.device, plan.out / "throughput.json", fresh)
    return tuple(
        TableRow(
            name,
            label,
            subject.paper.get(name),
            None if name not in configs else NO_FAST_WEIGHTS if name in BASELINES else configs[name].model.inner,
            tuple(runs.get(name, ())),
            speeds.get(name, {}),
            subject.speed.published(name) if table.speed else {},
            tuple(seeds.get(name, ())),
            tuple(seed for row, seed in plan.jobs if row == name and (row, seed) not in done),
        )
        for name, label in row_labels(table.rows, subject).items()
    )


def reproduce_task(table: Table, request: Request) -> TableOutcome:
    """`reproduce_table` of one task.

    Raises:
        UnfinishedError: there was not time enough for a single row.
    """
    started, task, scale, console = time.monotonic(), request.task, request.scale, request.console
    subject = named_subject(task)
    plan = plan_runs(table.name, table.rows, request)
    if console:
        console.print(
            f"{table.title}, {task}, scale {scale}: {len(plan.rows)} rows x {request.seeds} seed(s) on {plan.device}; "
            f"report in {plan.out}",
            style="bold",
            markup=False,
            soft_wrap=True,
        )
        if request.verbose:
            console.print(to_yaml(plan.config), style="dim", highlight=False, markup=False, soft_wrap=True)
    longest = max(len(job.title) for job in plan.jobs.values())

    def finished(job: TrainingJob, run: Run) -> None:
        if console:
            value = run.result["held_out"][subject.metric.name]
            shown = f"{subject.metric.title} {value:.{subject.metric.digits}f}"
            console.print(f"{job.title:<{longest}} {shown}, {run.time_note}", markup=False, soft_wrap=True)

    done = plan.train(request, finished)
    plan.out.mkdir(parents=True, exist_ok=True)
    if table.speed and subject.speed.measured_now:
        request.say("timing the inner loops of the rows")
    rows = gather_rows(table, subject, plan, done, request.fresh)
    verdicts = judge(table, subject, rows)
    setting = subject.speed.setting(plan.config) if table.speed else None
    results = {
        "experiment": table.name,
        "task": task,
        "scale": scale,
        "seeds": list(range(request.seeds)),
        "command": command(),
        "date": today(),
        "wall_seconds": round(time.monotonic() - started, 1),
        "training_seconds": round(sum(run.result["training_seconds"] for run in done.values()), 1),
        "versions": versions(),
        "machine": machine(plan.device),
        "data": next(iter(done.values())).result["data"],
        "config": to_plain(plan.config),
        "throughput": setting,
        "verdicts": [asdict(verdict) for verdict in verdicts],
        "rows": [as_data(row, subject, plan.trained.parent, setting) for row in rows],
    }
    outcome = TableOutcome(table, subject, rows, results, to_yaml(plan.config))
    write_report(plan.out, outcome)
    if console:
        for part in terminal_tables(outcome, console.width):
            console.print(part)
        console.print(describe(outcome), markup=False)
        for verdict in verdicts:
            console.print(f"{verdict.word}: {verdict.claim}: {verdict.found}", markup=False)
        where = f"Everything is in {plan.out}; start with {plan.out / 'index.html'}"
        console.print(f"{duration(results['wall_seconds'])}. {where}", markup=False)
    return outcome
