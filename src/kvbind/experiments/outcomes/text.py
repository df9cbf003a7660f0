"""A reproduced table in words and numbers: its columns, a few sentences on it, and how a terminal shows it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table as TerminalTable

from kvbind.experiments.outcomes.table import TableOutcome, TableRow
from kvbind.experiments.subjects import NONE, Metric
from kvbind.screen import column_groups

NOT_APPLICABLE, UNFINISHED = "does not apply", "unfinished"
TERMINAL = 80
"""Columns of the terminal that tables are made for."""


@dataclass(frozen=True)
class Column:
    """One column: its heading, and a text for each row."""

    heading: str
    cells: list[str]


def quality_columns(outcome: TableOutcome) -> list[Column]:
    """The held-out metrics, here and in the paper."""
    label, (ours, change, paper, paper_change) = outcome.subject.metric.label, comparison(outcome)
    others = [
        Column(f"{other.label}\nhere", [value_cell(row, other, error=False) for row in outcome.rows])
        for other in outcome.subject.others
    ]
    return [
        Column(f"{label}\nhere", ours), *others, Column("change\nhere", change),
        Column(f"{label}\npaper", paper), Column("change\npaper", paper_change),
    ]  # fmt: skip


def comparison(outcome: TableOutcome) -> tuple[list[str], list[str], list[str], list[str]]:
    """The metric here, its change, the paper's, its change: a text for each row."""
    metric, rows = outcome.subject.metric, outcome.rows
    first, published = rows[0].mean(metric.name), rows[0].published
    ours = [(value_cell(row, metric) if row.runs else UNFINISHED) if row.applies else NOT_APPLICABLE for row in rows]
    # the full system against itself is no change worth a number, nor is a figure in brackets, whose row changes nothing
    change = [metric.changed(row.mean(metric.name), first) if row is not rows[0] else NONE for row in rows]
    paper_change = [
        metric.changed(row.published, published) if row is not rows[0] and row.paper and row.paper.applies else NONE
        for row in rows
    ]
    return ours, change, [str(row.paper) if row.paper else NONE for row in rows], paper_change


def value_cell(row: TableRow, metric: Metric, error: bool = True) -> str:
    """A metric's mean, with its standard error where there are several seeds, and how many where some are missing."""
    mean, spread = row.mean(metric.name), row.error(metric.name) if error else None
    if mean is None:
        return NONE
    of = f" ({len(row.runs)} of {len(row.runs) + len(row.missing)})" if error and row.missing else ""
    return f"{mean:.{metric.digits}f}" + (f" ± {spread:.{metric.digits}f}" if spread is not None else "") + of


def speed_columns(outcome: TableOutcome) -> list[Column]:
    """Throughput, here and beside the paper's; none of a table without."""
    return own_speed_columns(outcome) + compared_speed_columns(outcome)


def own_speed_columns(outcome: TableOutcome) -> list[Column]:
    """Throughput here, in the task's own unit."""
    if not outcome.table.speed:
        return []
    speed, rows = outcome.subject.speed, outcome.rows
    return [
        Column(f"{heading}\nhere", [number_cell(row.speeds.get(name), speed.per, speed.pattern) for row in rows])
        for name, heading in speed.columns.items()
    ]


def compared_speed_columns(outcome: TableOutcome) -> list[Column]:
    """Throughput here and in the paper, in the paper's unit; none where the paper has none."""
    speed, rows, setting = outcome.subject.speed, outcome.rows, outcome.results["throughput"]
    columns = []
    for where in ("here", "paper"):
        for name in rows[0].paper_speeds if outcome.table.speed else ():
            own = [speed.compared(row.speeds.get(name), setting) for row in rows]
            numbers, pattern = (own, speed.pattern) if where == "here" else ([row.paper_speeds[name] for row in rows], ".2f")
            heading = f"{speed.columns[name]}\n{speed.compared_unit}\n{where}"
            columns.append(Column(heading, [number_cell(x, 1.0, pattern) for x in numbers]))
    return columns


def number_cell(x: float | None, per: float, pattern: str) -> str:
    """A number in its unit, or a dash."""
    return NONE if x is None else f"{x / per:{pattern}}"


def row_names(outcome: TableOutcome, labels: Mapping[str, str]) -> list[str]:
    """A label for each row, rungs with their number and the others aligned with them."""
    blank = "   " if outcome.table.rungs else ""
    return [f"{blank if i is None else f'{i}  '}{labels[row.name]}" for i, row in outcome.numbered()]


def as_grid(names: Sequence[str], columns: Sequence[Column]) -> tuple[list[str], list[list[str]]]:
    """A header and rows of texts."""
    lines = [[name, *(column.cells[i] for column in columns)] for i, name in enumerate(names)]
    return ["", *(column.heading for column in columns)], lines


def width(names: Sequence[str], columns: Sequence[Column]) -> int:
    """Characters across a table with two spaces between its columns."""
    texts = [names, *([*column.heading.split("\n"), *column.cells] for column in columns)]
    return sum(max(map(len, of_column)) for of_column in texts) + 2 * len(columns)


def count(x: int) -> str:
    """A number of things, short where it is large."""
    return f"{x:,}" if x < 100_000 else f"{x / 1e6:.2f}M" if x < 1e9 else f"{x / 1e9:.1f}B"


def describe(outcome: TableOutcome) -> str:
    """A few sentences on what was run, out of the results themselves."""
    subject, results, first = outcome.subject, outcome.results, outcome.trained[0]
    run, metric = first.runs[0].result, subject.metric
    seeds = len(results["seeds"])
    counts = [f"{count(run['parameters'])} parameters"]
    counts.append(f"{count(run[run['unit']])} training {run['unit']} per row")
    if run["unit"] in run["held_out"]:
        counts.append(f"{count(run['held_out'][run['unit']])} held-out {run['unit']}")
    counts.append(f"{seeds} seed" if seeds == 1 else f"{seeds} seeds (mean ± standard error)")
    untrained = statistics.fmean(first.values(metric.name, "untrained"))
    named = metric.title if metric.label in metric.title else f"{metric.title} ({metric.label})"
    before = f"Before training, {named} is {untrained:.{2 if untrained < 100 else 0}f}"
    if subject.baseline is not None:
        name, what = subject.baseline
        before += f"; {what} has {run['held_out'][name]:.{metric.digits}f}"
    sentences = [", ".join(counts) + ".", f"{before}."]
    if outcome.missing:
        sentences.append(f"Unfinished, so that figures are of fewer seeds or missing: {outcome.missing}.")
    if not all(row.applies for row in outcome.rows):
        sentences.append("Where a change does not apply to this task, the paper's figure is in brackets.")
    sentences += [outcome.table.about, f"Change is of {metric.title} against the full system; {metric.better} is better."]
    if outcome.table.speed:
        trained_on = {run.result["machine"]["device"] for row in outcome.trained for run in row.runs}
        device = results["machine"]["device"] if subject.speed.measured_now else " and ".join(sorted(trained_on))
        sentences.append(subject.speed.about(results["throughput"], device))
    return " ".join(sentences)


def terminal_tables(outcome: TableOutcome, terminal: int = TERMINAL) -> Iterator[TerminalTable]:
    """The table for a terminal: quality, then throughput, side by side where there is room, and each in parts where not.

    Args:
        outcome: the table.
        terminal: columns of the terminal; no more than `TERMINAL` are used.
    """
    terminal = min(terminal, TERMINAL)
    quality, speed, names = quality_columns(outcome), own_speed_columns(outcome), row_names(outcome, outcome.labels)
    title = f"{outcome.table.title}, {outcome.results['task']}, scale {outcome.results['scale']}"
    parts = {f"{title}: {outcome.subject.metric.title} on {outcome.subject.held_out}": quality}
    if speed and width(names, quality + speed) <= terminal:
        parts = {next(iter(parts)): quality + speed}
    elif speed:
        parts[f"{title}: {outcome.subject.speed.title}"] = speed
    if compared := compared_speed_columns(outcome):
        parts[f"{title}: {outcome.subject.speed.compared_title}"] = compared
    for heading, columns in parts.items():
        header, lines = as_grid(names, columns)
        for i, group in enumerate(column_groups(header, lines, terminal)):
            shown = TerminalTable(
                title=heading if i == 0 else None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD,
                pad_edge=False, padding=(0, 1, 0, 0), min_width=min(terminal, len(heading)) if i == 0 else None,
            )  # fmt: skip
            for column in group:
                shown.add_column(header[column], justify="right" if column else "left", no_wrap=bool(column))
            for number, line in enumerate(lines, start=1):
                shown.add_row(*(line[column] for column in group), end_section=number == outcome.table.rungs)
            yield shown
