"""View synthesis where views come in chunks: PSNR by how many, plain and elastic (Elastic TTT, arXiv 2604.07350).

The paper's system reads all input views in one update. Where they come one after another it makes several, and what later
ones write may overwrite earlier ones; an anchor draws the weights back. Each case is trained from scratch as it is
evaluated.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kvbind.experiments import plotting
from kvbind.experiments.outcomes.claims import Verdict
from kvbind.experiments.outcomes.verdicts import ERRORS, beyond
from kvbind.experiments.report.findings import Findings, write_findings
from kvbind.experiments.request import Request
from kvbind.experiments.studies.trends import mean_and_error
from kvbind.experiments.subjects import Metric, named_subject
from kvbind.experiments.training.jobs import TrainingJob
from kvbind.experiments.training.plans import RunsPlan, UnfinishedError, configuration, data_edits, plan_runs, with_inner
from kvbind.experiments.training.runs import Fingerprints, run_name
from kvbind.experiments.training.trained_rows import sentence
from kvbind.experiments.training.workers import train_all
from kvbind.inner import systems
from kvbind.inner.value import check_choice
from kvbind.tasks.views.config import inner_loop, model_config
from kvbind.train.config import to_plain

TASK = "views"

CHUNKS = (1, 2, 4, 8)

SYSTEMS = {"plain": "one update after another", "elastic": "drawn back to an anchor (Elastic TTT)"}

INPUTS = f"data.inputs={max(CHUNKS)}"
"""As many views as chunks at the most, so that no view is divided."""

Values = dict[tuple[str, int], dict[int, float]]
"""A metric by system, number of chunks, and seed."""


def planned(request: Request) -> tuple[RunsPlan, dict[tuple[str, int, int], TrainingJob]]:
    """The full system's plan, and the runs by system, number of chunks and seed, seeds outermost.

    Raises:
        ValueError: another task, an unknown scale, or an edit that does not fit.
    """
    check_choice("task", request.task, (TASK,))
    request.refuse_measuring("chunks")
    known = Fingerprints(request.trained)
    plan = plan_runs("chunks", ["rung0"], replace(request, rows=None), known, [INPUTS])
    edits = [INPUTS, *request.overrides, *data_edits(TASK, request.source(TASK))]
    anchor, jobs = systems.elastic_lact().anchor, {}
    for seed in range(request.seeds):
        config = configuration(TASK, request.scale, seed, edits)
        full, patch = inner_loop(config.model), model_config(config.model).patch_size
        tokens = config.data.inputs * config.data.size[0] * config.data.size[1] // patch**2
        for system in SYSTEMS:
            for count in CHUNKS:
                inner = full.replace(
                    chunk=None if count == 1 else tokens // count, anchor=anchor if system == "elastic" else None
                )
                own = with_inner(TASK, config, inner.to_dict())
                title = f"{system}, {count} chunk(s) seed {seed}"
                jobs[system, count, seed] = TrainingJob(TASK, own, plan.trained / run_name(TASK, own, known), title)
    return plan, jobs


def planned_jobs(request: Request) -> list[tuple[str, TrainingJob]]:
    """The runs in their order, each with the name of the row that it is most like."""
    return [("rung0", job) for job in planned(request)[1].values()]


def reproduce(**options: Any) -> dict[str, Any]:
    """Train every case, or read what it came to, and write the report.

    Args:
        options: the fields of `kvbind.experiments.request.Request`; the task is "views".

    Returns:
        What `results.json` holds.

    Raises:
        ValueError: another task, an unknown scale, or an edit that does not fit.
        UnfinishedError: no run is finished.
        TrainingStoppedError: as `kvbind.train.train`.
    """
    request = Request(**options)
    plan, jobs = planned(request)
    metric = named_subject(TASK).metric
    request.say(f"chunks, scale {request.scale}: {len(jobs)} training run(s) on {plan.device}; report in {plan.out}")
    every = [replace(job, fresh=request.fresh) for job in jobs.values()]
    found = train_all(every, plan.workers, request.console, lambda job, run: None, deadline=request.deadline)
    done = {key: run for key, run in zip(jobs, found, strict=True) if run is not None}
    if not done:
        raise UnfinishedError("no training run of chunks is finished yet; the same command goes on with them")
    values: Values = {}
    for (system, count, seed), run in done.items():
        values.setdefault((system, count), {})[seed] = float(run.result["held_out"][metric.name])
    named = {f"{system} {count}": (system, count) for system, count, _ in jobs}
    seeds = {name: (range(request.seeds), list(values.get(key, {}))) for name, key in named.items()}
    plan.out.mkdir(parents=True, exist_ok=True)
    draw(plan.out / "chunks.png", values, metric)
    lines = [[f"{system}: {about}", *(cell(values.get((system, count), {}), metric) for count in CHUNKS)]
             for system, about in SYSTEMS.items()]  # fmt: skip
    findings = Findings(
        experiment="chunks",
        title=f"Views in chunks, scale {request.scale}",
        lead=f"{metric.title} of the full system by the number of chunks in which {max(CHUNKS)} input views are read, each "
        f"trained so from scratch; mean and standard error over {request.seeds} seed(s); {metric.better} is better."
        f"{sentence('Unfinished', seeds)}",
        config=to_plain(plan.config),
        data={
            "metric": metric.name,
            "cases": [{"system": system, "chunks": count, "by_seed": {str(seed): x for seed, x in own.items()}}
                      for (system, count), own in values.items()],
            "runs": {f"{system} {count} seed {seed}": run.folder.as_posix() for (system, count, seed), run in done.items()},
        },
        verdicts=judge(values, metric),
        tables={"By chunks": (["", *(f"{count} chunk{'s' * (count > 1)}" for count in CHUNKS)], lines)},
        pictures={"By chunks": ("chunks.png", f"{metric.title} by the number of chunks, plain and elastic")},
    )  # fmt: skip
    return write_findings(plan.out, request, findings, plan.device)


def cell(values: dict[int, float], metric: Metric) -> str:
    """A mean with its standard error."""
    if not values:
        return "unfinished"
    mean, error = mean_and_error(list(values.values()))
    return f"{mean:.{metric.digits}f}" + ("" if error is None else f" ± {error:.{metric.digits}f}")


def judge(values: Values, metric: Metric) -> list[Verdict]:
    """Whether chunks cost something, and whether an anchor helps against it."""
    last = max(CHUNKS)
    pairs = {
        f"reading views in {last} chunks costs {metric.title}": (("plain", 1), ("plain", last)),
        f"with {last} chunks the elastic system is better than the plain one": (("elastic", last), ("plain", last)),
    }
    verdicts = []
    for claim, (better, worse) in pairs.items():
        rule = (
            f"{better[0]} with {better[1]} chunk(s) is above {worse[0]} with {worse[1]} by {ERRORS} standard errors or more "
            "of the differences seed by seed; it does not hold if it is below by as much; one seed decides nothing"
        )
        one, other = values.get(better, {}), values.get(worse, {})
        differences = [one[seed] - other[seed] for seed in one if seed in other]
        if not differences:
            verdicts.append(Verdict(claim, rule, None, "unfinished"))
            continue
        mean, error = mean_and_error(differences)
        spread = "" if error is None else f" ± {error:.2f}"
        holds = None if error is None else beyond(mean, error)
        verdicts.append(Verdict(claim, rule, holds, f"{mean:+.2f}{spread}, {len(differences)} seed(s)"))
    return verdicts


def draw(path: Any, values: Values, metric: Metric) -> None:
    """A line for each system, with error bars."""
    with plotting.picture(path, 6.4, 3.4) as fig:
        ax = fig.subplots()
        for system, colour in zip(SYSTEMS, (plotting.ORANGE, plotting.BLUE), strict=True):
            points = [(i, *mean_and_error(list(values[system, count].values())))
                      for i, count in enumerate(CHUNKS) if (system, count) in values]  # fmt: skip
            ax.errorbar([i for i, _, _ in points], [mean for _, mean, _ in points], yerr=[e or 0.0 for _, _, e in points],
                        fmt="o-", color=colour, label=system, capsize=2.5, linewidth=1.4, markersize=5)  # fmt: skip
        ax.set_xticks(range(len(CHUNKS)), [str(count) for count in CHUNKS])
        ax.set_xlabel("chunks in which the input views are read")
        ax.set_ylabel(metric.title)
        ax.legend()
