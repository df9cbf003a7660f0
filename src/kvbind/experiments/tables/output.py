"""What a reproduced table leaves behind: JSON, CSV, pictures, and a page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from kvbind.experiments import plotting
from kvbind.experiments.outcomes.plots import draw_all
from kvbind.experiments.outcomes.table import TableOutcome, as_csv
from kvbind.experiments.outcomes.text import Column, as_grid, comparison, describe, quality_columns, row_names, speed_columns
from kvbind.experiments.report.contents import PagePart, PageTable
from kvbind.experiments.report.page import write_index
from kvbind.experiments.report.table_contents import table_part
from kvbind.experiments.results.files import write_csv, write_json
from kvbind.experiments.subjects.rows import LABELS
from kvbind.train.files import write_text


def write_report(out: Path, outcome: TableOutcome) -> None:
    """JSON, CSV, pictures, and the page."""
    results = outcome.results
    write_json(out / "results.json", results)
    write_csv(out / "results.csv", [as_csv(data) for data in results["rows"]])
    write_text(out / "config.yaml", outcome.config)

    header, lines = as_grid(row_names(outcome, outcome.labels), quality_columns(outcome) + speed_columns(outcome))
    plotting.table_image(out / "table.png", header, lines, title=outcome.title, note=describe(outcome))
    draw_all(out, outcome)
    write_index(out, table_part(outcome, out))


def write_overview(out: Path, outcomes: Mapping[str, TableOutcome], places: Mapping[str, Path]) -> None:
    """One page on a table of several tasks, as the paper shows it, with links to each task's own report.

    Args:
        out: folder to write.
        outcomes: by task, all of one table, scale and number of seeds.
        places: the folder of each task's report.
    """
    first = next(iter(outcomes.values()))
    columns = []
    for task, outcome in outcomes.items():
        label, (ours, change, paper, _) = outcome.subject.metric.label, comparison(outcome)
        columns += [Column(f"{task}\n{label}", ours), Column("\nchange", change), Column("\npaper", paper)]
    header, lines = as_grid(row_names(first, LABELS), columns)
    title = f"{first.table.title}: all tasks, scale {first.results['scale']}"
    worded = [
        f"{LABELS[name]} is \"{own}\" for {task}" for task, outcome in outcomes.items()
        for name, own in outcome.subject.labels.items() if name in first.table.rows
    ]  # fmt: skip
    seeds = len(first.results["seeds"])
    about = " ".join([
        f"{seeds} seed." if seeds == 1 else f"{seeds} seeds (mean ± standard error).",
        *(f"{task.capitalize()}: {outcome.subject.metric.title}, {outcome.subject.metric.better} is better."
          for task, outcome in outcomes.items()),
        first.table.about,
        *([f"In the tasks' own words, {' and '.join(worded)}."] if worded else []),
    ])  # fmt: skip
    write_json(out / "results.json", {task: outcome.results for task, outcome in outcomes.items()})
    plotting.table_image(out / "table.png", header, lines, title=title, note=about)
    command, grid = first.results["command"], PageTable("Table", header, lines)
    part = PagePart(first.table.name, title, about, [], [grid], {}, [], command, details={}, place=out)
    write_index(out, part, {task: place / "index.html" for task, place in places.items()})
