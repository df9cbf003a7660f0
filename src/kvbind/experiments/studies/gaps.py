"""The gap against training: does what a change costs close, stay or grow as models are trained longer?

Every row of table 2 is evaluated on its way, at a sixteenth of its training, an eighth, and so on, and compared with the
full system at the same step, seed by seed. Rates there are those of the whole schedule, before they have come down: a model
on its way is not what a shorter training would have come to, but all rows are alike in that.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from kvbind.experiments.report.findings import Findings, write_findings
from kvbind.experiments.request import Request
from kvbind.experiments.studies import trends
from kvbind.experiments.studies.trends import Gaps
from kvbind.experiments.subjects import FRACTIONS, SUBJECTS
from kvbind.experiments.tables.table2 import TABLE
from kvbind.experiments.training import plans
from kvbind.experiments.training.runs import Run
from kvbind.experiments.training.trained_rows import Trained, train_rows
from kvbind.train.config import step_at
from kvbind.train.metrics import read_metrics

PLACES = {1 / 16: "1/16", 1 / 8: "1/8", 1 / 4: "1/4", 1 / 2: "1/2", 1.0: "1"}
"""Fractions of the training, by value."""

CAVEAT = (
    "Learning rates at a fraction of the training are those of the whole schedule, so that a model there is not what a "
    "training of that length would have come to; rows are compared at the same step."
)


planned_jobs = partial(plans.planned_jobs, "gaps", TABLE.rows)


def reproduce(**options: Any) -> dict[str, Any]:
    """Compare every row with the full system along its training, and write the report.

    Args:
        options: the fields of `kvbind.experiments.request.Request`.

    Returns:
        What `results.json` holds.

    Raises:
        ValueError: an unknown task or scale, or an edit that does not fit.
        UnfinishedError: no run is finished.
    """
    request = Request(**options)
    trained = train_rows("gaps", TABLE.rows, tuple(SUBJECTS), request)
    metric, first = trained.subject.metric, TABLE.rows[0]
    rows = gaps_of(trained, first)
    found = {name: trends.fit(gaps) for name, gaps in rows.items()}
    numbers = {name: f"{i}  " for i, name in enumerate(TABLE.rows[: TABLE.rungs])}
    names = {name: numbers.get(name, "") + trained.labels[name] for name in rows}
    verdicts = [trends.judge(trained.labels[name], found[name], metric, "with more training") for name in rows]
    trends.draw(
        trained.out / "gaps.png", {names[name]: gaps for name, gaps in rows.items()}, metric,
        rungs=sum(name in numbers for name in rows), places=PLACES, x="fraction of the training",
        title=f"{metric.title}: the gap to the full system",
    )  # fmt: skip
    lines = [[names[name], *trends.cells(gaps, list(PLACES), metric)] for name, gaps in rows.items()]
    findings = Findings(
        experiment="gaps",
        title=f"The gap against training: {request.task}, scale {request.scale}",
        lead=f"How much worse than the full system in {metric.title}, at fractions of the training, mean and standard error "
        f"of the differences seed by seed; below 0 a row is better. {CAVEAT}{without(trained)}{trained.missing}",
        config=trained.config,
        data={
            "metric": metric.name,
            "unit": metric.unit,
            "rows": [
                {"name": name, "label": trained.labels[name], "trend": None if found[name] is None else vars(found[name]),
                 "gaps": [{"fraction": place, "by_seed": {str(seed): x for seed, x in own.items()}}
                          for place, own in sorted(gaps.items())]}
                for name, gaps in rows.items()
            ],
            "runs": trained.folders(),
        },
        verdicts=verdicts,
        tables={"Along the training": (["", *PLACES.values()], lines)},
        pictures={"The gap": ("gaps.png", f"{metric.title} against the full system, by fraction of the training")},
    )  # fmt: skip
    return write_findings(trained.out, request, findings, trained.device)


def along(run: Run, metric: str) -> dict[float, float]:
    """A metric at the fractions of a run's training at which it was evaluated."""
    steps, key = run.result["steps"], f"held_out/{metric}"
    known = {row["step"]: row[key] for row in read_metrics(run.folder) if key in row}
    there = {fraction: known[step] for fraction in FRACTIONS if (step := step_at(fraction, steps)) in known}
    return {**there, 1.0: run.result["held_out"][metric]}


def gaps_of(trained: Trained, first: str) -> dict[str, Gaps]:
    """How much worse every other row is than the full system, by fraction of the training and seed."""
    metric = trained.subject.metric
    values = {name: {seed: along(run, metric.name) for seed, run in runs.items()} for name, runs in trained.runs.items()}
    full: Mapping[int, Mapping[float, float]] = values.get(first, {})

    def of(seeds: Mapping[int, Mapping[float, float]], place: float) -> dict[int, float]:
        both = [seed for seed in seeds if place in seeds[seed] and place in full.get(seed, {})]
        return {seed: trends.worse_by(seeds[seed][place], full[seed][place], metric) for seed in both}

    found = {name: {place: of(seeds, place) for place in PLACES} for name, seeds in values.items() if name != first}
    return {name: {place: own for place, own in gaps.items() if own} for name, gaps in found.items()}


def without(trained: Trained) -> str:
    """A sentence on runs that were not evaluated on their way; empty where all were."""
    metric = trained.subject.metric.name
    bare = [f"{name} seed {seed}" for name, runs in trained.runs.items() for seed, run in runs.items()
            if len(along(run, metric)) == 1]  # fmt: skip
    return f" Trained without evaluations on the way: {', '.join(bare)} (--fresh trains them with)." if bare else ""
