"""`kvbind reproduce all`: one plan for the training runs of all tables and figures, then every report.

Runs are trained once, whoever asks for them, and the most telling first: every row of every task from seed 0, then further
seeds of the language model's telling rows, then the others. With a limit of minutes training stops in time and the reports
are written of what is there, the quickest first, so that a machine that is taken away costs the slow ones alone; the same
command later goes on.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvbind.experiments import EXPERIMENTS, open_experiment, theorems
from kvbind.experiments.figures import figure1, figure4
from kvbind.experiments.report.command import make_report
from kvbind.experiments.request import Request
from kvbind.experiments.results.files import write_json
from kvbind.experiments.subjects import ALL, SUBJECTS, named_subject
from kvbind.experiments.tables import table2
from kvbind.experiments.training.jobs import VISIBLE, TrainingJob, visible_gpus
from kvbind.experiments.training.plans import RunsPlan, plan_runs, report_folder
from kvbind.experiments.training.runs import Fingerprints, Run
from kvbind.experiments.training.workers import train_all
from kvbind.screen import duration
from kvbind.train.files import read_json

THEOREMS = "theorems"

TASKS_OF = {"figure1": figure1.TASKS, "figure2": ("language",), "figure3": ("language",), "figure4": (figure4.TASK,)}
"""The tasks of each figure; tables have all."""

TELLING = ("rung0", "rung1", "rung2", "rung6", "ascent", "key_for_query")
"""Rows of the language model whose further seeds go first."""

ALONE = ("sizes", "chunks", "capacity", "systems", "simplify")
"""Experiments with runs that no other has, made by their own command alone."""

TIMED = {("table2", "language")}
"""Reports that time something themselves, and wait until the machine is free."""

SLOW = ("figure4", "explorer", "figure2", THEOREMS, "figure1")
"""Reports that are written behind all others, which take seconds. Figure 1 evaluates every model eight times."""

CORES = 4
"""CPU cores that a report is given where several are written at once."""


@dataclass(frozen=True)
class Report:
    """A report to write.

    Attributes:
        experiment: its name.
        request: what it is asked.
        folder: where it goes.
    """

    experiment: str
    request: Request
    folder: Path

    @property
    def title(self) -> str:
        """What the report is called on a terminal."""
        return f"{self.experiment}, {self.request.task}" if self.experiment != THEOREMS else self.experiment


def reproduce(**options: Any) -> dict[str, Any]:
    """Train what every experiment needs, then write every report, and a list of all verdicts.

    Args:
        options: the fields of `kvbind.experiments.request.Request`. `out` holds a folder for each report, and `trained/`;
            without it they are where each experiment puts its own. The task "all" is each of them.

    Returns:
        What `results.json` holds: verdicts by report, and reports that could not be written.

    Raises:
        ValueError: an unknown task or scale, or an edit that does not fit.
    """
    request = Request(**options)
    tasks = list(SUBJECTS) if request.task == ALL else [request.task]
    for task in tasks:
        named_subject(task)
    out = request.out or report_folder("all", request.task, request.scale)
    out.mkdir(parents=True, exist_ok=True)
    trained = request.trained or (request.out / "trained" if request.out else Path("runs/trained"))
    shared = replace(request, trained=trained)
    reports = [report_on(name, task, shared) for name, task in wanted(tasks, request)]
    if request.measure is None:
        train_everything(tasks, shared)
        # from here on nothing is trained
        reports = [replace(x, request=replace(x.request, fresh=False, minutes=0.0)) for x in reports]
    unfinished = dict.fromkeys((one.title for one in reports), "not written yet")
    results = write_list(out, reports, unfinished, request)
    for one, why in write_reports(in_writing_order(reports), request):
        if why is None:
            del unfinished[one.title]
        else:
            unfinished[one.title] = why
        results = write_list(out, reports, unfinished, request)
    return conclude(out, reports, results, request)


def wanted(tasks: Sequence[str], request: Request) -> Iterator[tuple[str, str]]:
    """The experiments and their tasks, in the order in which they are listed.

    Where steps are measured in place of training, those alone that do so and whose rows no other has.
    """
    for name in EXPERIMENTS:
        if name in ALONE:
            continue
        if request.measure is not None and name not in ("table2", "figure4"):
            continue
        if name == THEOREMS:
            if request.scale in theorems.SETTINGS:
                yield name, "language"
        else:
            yield from ((name, task) for task in TASKS_OF.get(name, tuple(SUBJECTS)) if task in tasks)


def report_on(name: str, task: str, request: Request) -> Report:
    """A report, and what it is asked."""
    if name == THEOREMS:  # which trains nothing, whatever the data
        folder = request.out and request.out / name
        asked = replace(request, task=task, out=folder, seeds=1, data=None, overrides=(), trained=None)
        return Report(name, asked, folder or Path(f"runs/{name}-{request.scale}"))
    out = request.out and request.out / f"{name}-{task}"
    return Report(name, replace(request, task=task, out=out), out or report_folder(name, task, request.scale))


def train_everything(tasks: Sequence[str], request: Request) -> None:
    """Train the union of all experiments' runs: those of table 2, and both of figure 4's."""
    plans = plans_of(tasks, request)
    jobs = [replace(job, fresh=request.fresh) for row, job in ordered(plans) if request.trains(row)]
    workers = request.workers or max(plan.workers for plan in plans)
    request.say(f"{len(jobs)} training runs, {workers} at once" + (f", {request.minutes:g} min" if request.minutes else ""))
    longest = max(len(job.title) for job in jobs)

    def finished(job: TrainingJob, run: Run) -> None:
        metric = named_subject(job.task).metric
        value = run.result["held_out"][metric.name]
        request.say(f"{job.title:<{longest}} {metric.title} {value:.{metric.digits}f}, {run.time_note}")

    broken: list[TrainingJob] = []

    def failed(job: TrainingJob, error: Exception) -> None:
        broken.append(job)
        request.say(f"{job.title:<{longest}} failed: {error}")

    done = train_all(jobs, workers, request.console, finished, deadline=request.deadline, failed=failed)
    if broken and workers > 1:  # there may have been too many on one GPU
        again, broken = broken, []
        done += train_all(again, workers // 2, request.console, finished, deadline=request.deadline, failed=failed)
    there = {run.folder for run in done if run is not None}
    missing = [job.title for job in jobs if job.folder not in there]
    if missing:
        request.say(f"unfinished: {', '.join(missing)}; the same command goes on with them")


def plans_of(tasks: Sequence[str], request: Request) -> list[RunsPlan]:
    """The plans of the union of all experiments' runs."""
    known, plans = Fingerprints(request.trained), []
    for task in tasks:
        plans.append(plan_runs("table2", table2.TABLE.rows, replace(request, task=task), known))
    if figure4.TASK in tasks:
        plans.append(figure4.plan_both(replace(request, task=figure4.TASK), known))
    return plans


def planned(request: Request) -> list[tuple[str, TrainingJob]]:
    """The runs that `reproduce` would take, in their order, each with the name of its row."""
    tasks = list(SUBJECTS) if request.task == ALL else [request.task]
    trained = request.trained or (request.out / "trained" if request.out else Path("runs/trained"))
    return ordered(plans_of(tasks, replace(request, trained=trained)))


def ordered(plans: Sequence[RunsPlan]) -> list[tuple[str, TrainingJob]]:
    """The jobs of all plans with the names of their rows, the most telling first, and then in the order of the plans."""
    ranked: list[tuple[int, str, TrainingJob]] = []
    for plan in plans:
        for (row, seed), job in plan.jobs.items():
            telling = job.task == "language" and row in TELLING
            title = job.title if job.alone else f"{job.task} {row} seed {seed}"
            ranked.append((0 if not seed else 1 if telling else 1 + seed, row, replace(job, title=title)))
    return [(row, job) for _, row, job in sorted(ranked, key=lambda one: one[0])]


def in_writing_order(reports: Sequence[Report]) -> list[Report]:
    """Those that time something, for which the machine must be free, then the quick ones, then the slow ones."""

    def rank(one: Report) -> int:
        if (one.experiment, one.request.task) in TIMED:
            return -1
        return SLOW.index(one.experiment) + 1 if one.experiment in SLOW else 0

    return sorted(reports, key=rank)


def write_reports(reports: Sequence[Report], request: Request) -> Iterator[tuple[Report, str | None]]:
    """Write every report.

    Those that time something are written one after another in this process. On a machine with GPUs all others are written at
    once, each in a process, in turn over the GPUs; elsewhere they follow.

    Args:
        reports: in their order.
        request: what was asked.

    Yields:
        Each report as soon as it is there, and None; or why it could not be written.
    """
    gpus = visible_gpus() if request.workers != 1 and request.measure is None else []
    beside = [x for x in reports if gpus and (x.experiment, x.request.task) not in TIMED]
    for one in (x for x in reports if x not in beside):
        yield one, write_here(one, request)
    at_once = max(min(len(beside), (os.cpu_count() or 1) // CORES), 1)
    threads = ThreadPoolExecutor(at_once)
    try:
        turns = {threads.submit(write_beside, x, gpus[i % len(gpus)]): x for i, x in enumerate(beside)}
        for turn in as_completed(turns):
            shown, why = turn.result()
            request.say(shown)
            yield turns[turn], why
    finally:  # after Ctrl-C, without those that wait
        threads.shutdown(cancel_futures=True)


def write_here(one: Report, request: Request) -> str | None:
    """Write a report in this process; why it could not be written, or None."""
    now = time.monotonic()
    minutes = None if one.request.deadline is None else max(one.request.deadline - now, 0.0) / 60
    try:
        open_experiment(one.experiment).reproduce(**{**vars(one.request), "minutes": minutes, "started": now})
    except (ValueError, ImportError, OSError, RuntimeError) as error:  # the others are still worth writing
        request.say(f"{one.title}: {error}")
        return str(error)
    return None


def write_beside(one: Report, gpu: str) -> tuple[str, str | None]:
    """Write a report in a process of its own; what it said, and its error or None."""
    asked = one.request
    words = [one.experiment, "--task", asked.task, "--scale", asked.scale, "--seeds", str(asked.seeds), "--workers", "1",
             "--minutes", str(asked.minutes or 0)]  # fmt: skip
    for option, folder in (("--out", asked.out), ("--trained", asked.trained)):
        words += [option, str(folder)] if folder else []
    if one.experiment != THEOREMS:
        source = asked.source(asked.task)
        words += ["--data", source] if source else []
        words += asked.overrides
    done = subprocess.run(
        [sys.executable, "-m", "kvbind", "reproduce", *words],
        env=os.environ | {VISIBLE: gpu, "OMP_NUM_THREADS": str(CORES), "COLUMNS": "120"},
        capture_output=True,
        text=True,
        check=False,
    )
    shown = f"{one.title}:\n{done.stdout.strip()}"
    if not done.returncode:
        return shown, None
    error = next((line for line in done.stderr.splitlines() if line.startswith("error:")), done.stderr.strip()[-2000:])
    return f"{shown}\n{error}", error


def write_list(out: Path, reports: Sequence[Report], unfinished: Mapping[str, str], request: Request) -> dict[str, Any]:
    """A file on all reports: where each is, and what it says of the paper's claims; or why it is not there."""
    listed = []
    for one in reports:
        if one.title not in unfinished:
            found = read_json(one.folder / "results.json")
            listed.append({"experiment": one.experiment, "task": found["task"], "folder": one.folder.as_posix(),
                           "verdicts": found.get("verdicts", [])})  # fmt: skip
    results = {
        "scale": request.scale,
        "seeds": list(range(request.seeds)),
        "wall_seconds": round(time.monotonic() - request.started, 1),
        "reports": listed,
        "unfinished": dict(unfinished),
    }
    write_json(out / "all.json", results)
    return results


def conclude(out: Path, reports: Sequence[Report], results: dict[str, Any], request: Request) -> dict[str, Any]:
    """Say what all reports came to, and write the page on them; returns the results."""
    listed, unfinished = results["reports"], results["unfinished"]
    said = [verdict["holds"] for entry in listed for verdict in entry["verdicts"]]
    request.say(
        f"{len(listed)} reports, {len(unfinished)} unfinished; of {len(said)} claims {said.count(True)} hold, "
        f"{said.count(False)} do not, {said.count(None)} are not decided at this scale. "
        f"{duration(results['wall_seconds'])}; {out / 'all.json'} lists them"
    )
    there = [one.folder for one in reports if one.title not in unfinished]
    if not there:
        return results
    try:
        request.say(f"One page on all of it: {make_report(there, out / 'report.html', request.say)}")
    except ImportError as error:
        request.say(f"No page on all of it: {error}")
    return results
