"""A reproduced table as a part of a page, made from its `results.json` alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from kvbind.experiments import open_experiment, plotting
from kvbind.experiments.outcomes.plots import headings
from kvbind.experiments.outcomes.table import TableOutcome, TableRow
from kvbind.experiments.outcomes.text import NOT_APPLICABLE, as_grid, describe, quality_columns, speed_columns
from kvbind.experiments.report import charts
from kvbind.experiments.report.charts import Chart, Points
from kvbind.experiments.report.contents import PagePart, PageTable, Picture, facts
from kvbind.experiments.subjects import named_subject
from kvbind.experiments.subjects.published import Published
from kvbind.experiments.training.runs import Run, flatten
from kvbind.files import inside


def read_outcome(results: Mapping[str, Any]) -> TableOutcome:
    """A table as it was when its `results.json` was written; the folders of its runs may be gone."""
    table, subject = open_experiment(results["experiment"]).TABLE, named_subject(results["task"])
    metric, speed = subject.metric.name, subject.speed
    rows = []
    for data in results["rows"]:
        paper, runs = data["paper"], data["runs"]
        known = paper.get(metric) is not None
        rows.append(
            TableRow(
                name=data["name"],
                label=data["label"],
                paper=Published(paper[metric], not paper.get("in_brackets", False)) if known else None,
                inner=data["inner"],
                # results of 0.1.0 leave the unit out, and call the setting of the throughput its shape
                runs=tuple(Run(Path(run["folder"]), {"unit": speed.unit, **run}, reused=True) for run in runs),
                speeds={name: data.get(f"{name}_{speed.unit}_per_second") for name in speed.columns} if table.speed else {},
                paper_speeds={name: paper[f"{name}_mtok"] for name in speed.columns if f"{name}_mtok" in paper},
                seeds=tuple(run["seed"] for run in runs),
                missing=tuple(data.get("unfinished_seeds", ())),
            )
        )
    config = yaml.safe_dump(results["config"], sort_keys=False)
    return TableOutcome(table, subject, tuple(rows), {"throughput": results.get("throughput_shape"), **results}, config)


def table_part(outcome: TableOutcome, place: Path) -> PagePart:
    """A table beside the paper's, with everything that is drawn of it.

    Args:
        outcome: the table.
        place: its folder, where its pictures are.
    """
    results = outcome.results
    columns = quality_columns(outcome) + speed_columns(outcome)
    header, lines = as_grid([row.label for row in outcome.rows], columns)
    grid = PageTable("Table", header, lines, [i for i, _ in outcome.numbered()], outcome.table.rungs)
    pictures = [Picture(name, inside(place, file), text) for name, (file, text) in headings(outcome).items()]
    seeds = len(results["seeds"])
    return PagePart(
        experiment=outcome.table.name,
        title=outcome.title + (f", {seeds} seeds" if seeds > 1 else ""),
        lead=describe(outcome),
        verdicts=results.get("verdicts", ()),
        grids=[grid],
        charts=draw(outcome),
        pictures=[picture for picture in pictures if picture.file.is_file()],
        command=results["command"],
        details={
            "configuration": outcome.config,
            "versions and machine": json.dumps([results["versions"], results["machine"]], indent=2),
            "inner loops: what differs from the first row's": "\n".join(differences(outcome)),
        },
        place=place,
        **facts(results),
    )


def differences(outcome: TableOutcome) -> Iterator[str]:
    """A line per row: the fields of its inner loop that are not the first row's."""
    first = flatten(outcome.rows[0].inner)
    for row in outcome.rows:
        if row.baseline and row.applies:
            yield f"{row.name}: no fast weights"
            continue
        own = flatten(row.inner) if row.applies else {}
        changed = [f"{key}: {own.get(key)}" for key in {**first, **own} if own.get(key) != first.get(key)]
        what = ", ".join(changed) if row.applies else NOT_APPLICABLE
        yield f"{row.name}: {what or 'the same'}"


def draw(outcome: TableOutcome) -> dict[str, list[Chart]]:
    """The charts of a table, by the headings that its pictures have."""
    subject, table = outcome.subject, outcome.table
    of = headings(outcome)
    quality, *rest = of
    found = {quality: quality_charts(outcome)}
    if table.speed:
        found[rest.pop(0)] = speed_charts(outcome)
    rungs = max(sum(row.applies for row in outcome.rows[: table.rungs]), 1)
    names = {row.name: row.label if i is None else f"{i} {row.label}" for i, row in outcome.numbered()}
    seed = ", seed 0" if len(outcome.results["seeds"]) > 1 else ""
    shown = {"Training": ("Training loss, smoothed", "step", subject.loss)}
    shown |= {series.heading: (series.title, series.x, series.y) for series in subject.series}
    lines = {series.heading: series.name for series in subject.series}
    losses = {data["name"]: data["runs"][0].get("training_loss") for data in outcome.results["rows"] if data["runs"]}
    for heading in rest:
        title, x, y = shown[heading]
        drawn: dict[str, Points] = {}
        for row in outcome.trained:
            run = row.runs[0].result
            if heading in lines:
                drawn[names[row.name]] = plotting.pooled(run["held_out"][lines[heading]], 16)
            elif losses.get(row.name):
                drawn[names[row.name]] = losses[row.name]
        if drawn:
            found[heading] = curve_charts(drawn, f"{title}{seed}", x, y, rungs)
    return found


def curve_charts(series: Mapping[str, Points], title: str, x: str, y: str, rungs: int) -> list[Chart]:
    """Lines as they are, and against the first, where small differences show."""
    tones = charts.ladder_tones(len(series), rungs)
    against = f"against: {next(iter(series))}"
    return [
        charts.lines(series, title=title, x=x, y=y, tones=tones),
        charts.lines(charts.against_first(series), title=against, x=x, y=y, tones=tones),
    ]


def quality_charts(outcome: TableOutcome) -> list[Chart]:
    """The metric by row, the paper's and ours."""
    metric, rungs, rows = outcome.subject.metric, outcome.table.rungs, outcome.rows
    labels = [row.label if i is None else f"{row.label} {i}" for i, row in outcome.numbered()]
    bracketed = [i for i, row in enumerate(rows) if row.paper and not row.paper.applies]
    axis = f"{metric.title}, {metric.better} is better"
    paper = charts.dots(
        labels, {"paper": [row.published for row in rows]}, title=f"Paper, {outcome.subject.paper_model}", x=axis,
        tones=["muted"], joined=rungs, hollow=bracketed, digits=2,
    )  # fmt: skip
    here = charts.dots(
        labels, {"here": [row.mean(metric.name) for row in rows]}, title="Here", x=axis, tones=["blue"],
        errors=[row.error(metric.name) for row in rows], joined=rungs, digits=2,
    )  # fmt: skip
    return [paper, here]


def speed_charts(outcome: TableOutcome) -> list[Chart]:
    """Throughput by row: ours, and the paper's where it has some, both then in its unit."""
    speed, setting = outcome.subject.speed, outcome.results["throughput"]
    shown = [(i, row) for i, row in outcome.numbered() if i is not None and (row.applies or any(row.paper_speeds.values()))]
    labels = [f"{row.label} {i}" for i, row in shown]
    tones, log = ["orange", "blue"][-len(speed.columns) :], len(speed.columns) > 1

    def chart(title: str, numbers: list[dict[str, float | None]]) -> Chart:
        series = {heading: [row.get(name) for row in numbers] for name, heading in speed.columns.items()}
        return charts.bars(labels, series, title=title, x=speed.axis, tones=tones, log=log)

    paper = [dict(row.paper_speeds) for _, row in shown]
    here = [{name: speed.compared(x, setting) for name, x in row.speeds.items()} for _, row in shown]
    given = any(x for row in paper for x in row.values())
    return [*([chart("Paper", paper)] if given else []), chart("Here", here)]
