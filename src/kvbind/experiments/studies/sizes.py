"""The gap against size: rungs 0, 2 and 6 of the language model at three widths and depths, on the same text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kvbind.experiments.outcomes.text import count
from kvbind.experiments.report.findings import Findings, write_findings
from kvbind.experiments.request import Request
from kvbind.experiments.studies import trends
from kvbind.experiments.studies.trends import Gaps
from kvbind.experiments.subjects import named_subject
from kvbind.experiments.subjects.rows import row_labels
from kvbind.experiments.training.jobs import TrainingJob
from kvbind.experiments.training.plans import RunsPlan, UnfinishedError, plan_runs
from kvbind.experiments.training.runs import Fingerprints
from kvbind.experiments.training.trained_rows import seeds_of, sentence
from kvbind.experiments.training.workers import train_all
from kvbind.inner.value import check_choice
from kvbind.train.config import to_plain

TASK, ROWS = "language", ("rung0", "rung2", "rung6")

OWN = "the scale's own size"

SIZES = {
    "half": {"hidden_size": 0.5, "num_hidden_layers": 0.5, "num_attn_heads": 0.5},
    OWN: {},
    "one and a half": {"hidden_size": 1.5, "num_hidden_layers": 1.5, "num_attn_heads": 1.5},
}
"""Fields of the model, as multiples of what the scale has."""


def planned(request: Request) -> dict[str, RunsPlan]:
    """The runs of each size.

    Raises:
        ValueError: another task, an unknown scale, or an edit that does not fit.
    """
    check_choice("task", request.task, (TASK,))
    request.refuse_measuring("sizes")
    known = Fingerprints(request.trained)
    own = plan_runs("sizes", ROWS, request, known)
    fields, found = own.config.model.fields, {}
    for size, factors in SIZES.items():
        edits = [f"model.fields.{name}={max(round(fields[name] * factor), 1)}" for name, factor in factors.items()]
        found[size] = plan_runs("sizes", ROWS, replace(request, overrides=[*request.overrides, *edits]), known)
    return found


def planned_jobs(request: Request) -> list[tuple[str, TrainingJob]]:
    """The runs of all sizes, each with the name of its row."""
    return in_order(planned(request))


def in_order(sizes: Mapping[str, RunsPlan]) -> list[tuple[str, TrainingJob]]:
    """The runs of all sizes, the first seed of every size first, each with the name of its row."""
    every = [
        (seed, row, replace(job, title=f"{size}, {job.title}"))
        for size, plan in sizes.items()
        for (row, seed), job in plan.jobs.items()
    ]
    return [(row, job) for _, row, job in sorted(every, key=lambda one: one[0])]


def reproduce(**options: Any) -> dict[str, Any]:
    """Train the rows at every size, or read what they came to, and write the report.

    Args:
        options: the fields of `kvbind.experiments.request.Request`; the task is "language".

    Returns:
        What `results.json` holds.

    Raises:
        ValueError: another task, an unknown scale, or an edit that does not fit.
        UnfinishedError: no size has its full system and another row.
        TrainingStoppedError: as `kvbind.train.train`.
    """
    request = Request(**options)
    subject, sizes = named_subject(TASK), planned(request)
    plan = sizes[OWN]
    metric, labels = subject.metric, row_labels(ROWS, subject)
    every = [replace(job, fresh=request.fresh) for row, job in in_order(sizes) if request.trains(row) or job.finished]
    request.say(f"sizes, scale {request.scale}: {len(every)} training run(s) on {plan.device}; report in {plan.out}")
    trained = train_all(every, plan.workers, request.console, lambda job, run: None, deadline=request.deadline)
    done = {job.folder: run for job, run in zip(every, trained, strict=True) if run is not None}
    rows: dict[str, dict[float, dict[int, float]]] = {row: {} for row in ROWS[1:]}
    missing = ""
    for size, own in sizes.items():
        runs = {key: done[job.folder] for key, job in own.jobs.items() if job.folder in done}
        missing += sentence(f"Unfinished at {size}", {row: (seeds_of(own.jobs, row), seeds_of(runs, row)) for row in ROWS})
        for row, seed in (key for key in runs if key[0] in rows and (ROWS[0], key[1]) in runs):
            value, full = (runs[name, seed].result["held_out"][metric.name] for name in (row, ROWS[0]))
            # of the full system, as rungs differ in a few of them
            place = float(runs[ROWS[0], seed].result["parameters"])
            rows[row].setdefault(place, {})[seed] = trends.worse_by(value, full, metric)
    if not any(rows.values()):
        raise UnfinishedError("no size has its full system and another row yet; the same command goes on with them")
    gaps: dict[str, Gaps] = {row: own for row, own in rows.items() if own}
    places = sorted({place for own in gaps.values() for place in own})
    found = {row: trends.fit(own) for row, own in gaps.items()}
    plan.out.mkdir(parents=True, exist_ok=True)
    trends.draw(
        plan.out / "sizes.png", {labels[row]: own for row, own in gaps.items()}, metric, rungs=len(gaps),
        places={place: count(round(place)) for place in places}, x="parameters of the full system",
        title=f"{metric.title}: the gap to the full system",
    )  # fmt: skip
    lines = [[labels[row], *trends.cells(own, places, metric)] for row, own in gaps.items()]
    findings = Findings(
        experiment="sizes",
        title=f"The gap against size, scale {request.scale}",
        lead=f"How much worse than the full system of the same size in {metric.title}, after the same training; mean and "
        f"standard error of the differences seed by seed.{missing}",
        config=to_plain(plan.config),
        data={
            "metric": metric.name,
            "rows": [{"name": row, "label": labels[row], "trend": None if found[row] is None else vars(found[row]),
                      "gaps": [{"parameters": place, "by_seed": {str(seed): x for seed, x in own[place].items()}}
                               for place in sorted(own)]} for row, own in gaps.items()],
            "sizes": {size: [job.folder.as_posix() for job in own.jobs.values()] for size, own in sizes.items()},
        },
        verdicts=[trends.judge(labels[row], found[row], metric, "with larger models") for row in gaps],
        tables={"By size": (["", *(f"{count(round(place))} parameters" for place in places)], lines)},
        pictures={"The gap": ("sizes.png", f"{metric.title} against the full system, by size")},
    )  # fmt: skip
    return write_findings(plan.out, request, findings, plan.device)
