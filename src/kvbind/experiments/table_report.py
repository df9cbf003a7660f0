"""What a reproduced table leaves behind: JSON, CSV, pictures, and one page that holds everything."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from kvbind.experiments import figures, report
from kvbind.experiments.runs import flatten
from kvbind.experiments.table_figures import draw_all
from kvbind.experiments.table_text import (
    NOT_APPLICABLE,
    Column,
    as_grid,
    comparison,
    describe,
    quality_columns,
    row_names,
    speed_columns,
)
from kvbind.experiments.tables import LABELS, Outcome, as_csv
from kvbind.train.checkpoint import write_text


def write_report(out: Path, outcome: Outcome) -> None:
    """JSON, CSV, pictures, and the page."""
    results, about = outcome.results, describe(outcome)
    report.write_json(out / "results.json", results)
    report.write_csv(out / "results.csv", [as_csv(data) for data in results["rows"]])
    write_text(out / "config.yaml", outcome.config)

    header, lines = as_grid(row_names(outcome, outcome.labels), quality_columns(outcome) + speed_columns(outcome))
    figures.table_image(out / "table.png", header, lines, title=outcome.title, note=about)
    sections = {"Table": report.html_table(header, lines)}
    for heading, (file, text) in draw_all(out, outcome).items():
        sections[heading] = report.html_image(out / file, text)
    sections["How it was made"] = (
        f"<pre>{html.escape(results['command'])}</pre>"
        + report.html_details("configuration", outcome.config)
        + report.html_details("versions and machine", json.dumps([results["versions"], results["machine"]], indent=2))
        + report.html_details("inner loops: what differs from the first row's", "\n".join(differences(outcome)))
    )
    report.write_page(out / "index.html", outcome.title, about, sections)


def write_overview(out: Path, outcomes: Mapping[str, Outcome], places: Mapping[str, Path]) -> None:
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
    report.write_json(out / "results.json", {task: outcome.results for task, outcome in outcomes.items()})
    figures.table_image(out / "table.png", header, lines, title=title, note=about)
    links = [
        f'<li><a href="{html.escape(os.path.relpath(place / "index.html", out))}">{html.escape(task)}</a></li>'
        for task, place in places.items()
    ]
    sections = {"Table": report.html_table(header, lines), "Each task": f"<ul>{''.join(links)}</ul>"}
    report.write_page(out / "index.html", title, about, sections)


def differences(outcome: Outcome) -> Iterator[str]:
    """A line per row: the fields of its inner loop that are not the first row's."""
    first = flatten(outcome.rows[0].inner)
    for row in outcome.rows:
        own = flatten(row.inner) if row.applies else {}
        changed = [f"{key}: {own.get(key)}" for key in {**first, **own} if own.get(key) != first.get(key)]
        what = ", ".join(changed) if row.applies else NOT_APPLICABLE
        yield f"{row.name}: {what or 'the same'}"
