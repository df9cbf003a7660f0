"""The figures of a reproduced table."""

from __future__ import annotations

from pathlib import Path

from kvbind.experiments import plotting
from kvbind.experiments.outcomes.table import SMOOTHING, TableOutcome
from kvbind.experiments.outcomes.text import NOT_APPLICABLE, UNFINISHED

Pictures = dict[str, tuple[str, str]]
"""A file and a description by heading."""


def headings(outcome: TableOutcome) -> Pictures:
    """The figures of a table, in their order on a page."""
    what = "ladder" if outcome.table.rungs else "rows"
    found = {f"The {what}": (f"{what}.png", f"{outcome.subject.metric.title} by row, in the paper and here")}
    if outcome.table.speed:
        found["Throughput"] = ("throughput.png", "throughput by row")
    found["Training"] = ("loss.png", "training loss by step")
    return found | {series.heading: (series.file, series.title) for series in outcome.subject.series}


def draw_all(out: Path, outcome: TableOutcome) -> None:
    """Draw every figure of a table.

    Args:
        out: folder to write.
        outcome: the table.
    """
    quality_figure(out / ("ladder.png" if outcome.table.rungs else "rows.png"), outcome)
    if outcome.table.speed:
        speed_figure(out / "throughput.png", outcome)
    names = {row.name: row.label if i is None else f"{i}  {row.label}" for i, row in outcome.numbered()}
    rungs = max(sum(row.applies for row in outcome.rows[: outcome.table.rungs]), 1)
    seed = ", seed 0" if len(outcome.results["seeds"]) > 1 else ""
    plotting.curves(
        out / "loss.png",
        {names[row.name]: plotting.smoothed(row.runs[0].losses(), SMOOTHING) for row in outcome.trained},
        title=f"Training loss, smoothed{seed}", x="step", y=outcome.subject.loss, rungs=rungs,
    )  # fmt: skip
    for series in outcome.subject.series:
        plotting.curves(
            out / series.file,
            {names[row.name]: plotting.pooled(row.runs[0].result["held_out"][series.name], 16)
             for row in outcome.trained},
            title=f"{series.title}{seed}", x=series.x, y=series.y, rungs=rungs,
        )  # fmt: skip


def quality_figure(path: Path, outcome: TableOutcome) -> None:
    """The metric by row, the paper's and ours side by side."""
    subject, rows = outcome.subject, outcome.rows
    metric, rungs = subject.metric, outcome.table.rungs
    labels = [row.label if i is None else f"{row.label}  {i}" for i, row in outcome.numbered()]
    errors = [row.error(metric.name) or 0.0 for row in rows]
    millions = outcome.trained[0].runs[0].result["parameters"] / 1e6
    size = f"{millions:.0f}M" if millions >= 10 else f"{millions:.2g}M"
    with plotting.picture(path, 9.2, 0.36 * len(rows) + 0.9) as fig:
        left, right = fig.subplots(1, 2, sharey=True)
        plotting.rung_dots(
            left, labels, [row.published for row in rows],
            title=f"Paper: {metric.title}, {subject.paper_model}", colour=plotting.MUTED, joined=rungs,
            hollow=[i for i, row in enumerate(rows) if row.paper and not row.paper.applies],
        )  # fmt: skip
        plotting.rung_dots(
            right, labels, [row.mean(metric.name) for row in rows], title=f"Here: {metric.title}, {size}",
            colour=plotting.BLUE, joined=rungs, spread=errors if any(errors) else None,
            notes={i: UNFINISHED if row.applies else NOT_APPLICABLE for i, row in enumerate(rows) if not row.runs},
        )  # fmt: skip
        for ax in (left, right):
            if rungs:
                ax.axhline(rungs - 0.5, color=plotting.GRID, linewidth=1.0)
            ax.set_xlabel(f"{metric.better} is better")


def speed_figure(path: Path, outcome: TableOutcome) -> None:
    """Throughput by row, ours beside the paper's where it has some, and then in its unit."""
    speed, setting, numbered = outcome.subject.speed, outcome.results["throughput"], list(outcome.numbered())
    shown = [(i, row) for i, row in numbered if i is not None and (row.applies or any(row.paper_speeds.values()))]
    sides = {"Here": [{name: speed.compared(x, setting) for name, x in row.speeds.items()} for _, row in shown]}
    if any(x for _, row in shown for x in row.paper_speeds.values()):
        sides = {"Paper": [dict(row.paper_speeds) for _, row in shown], **sides}
    colours = (plotting.ORANGE, plotting.BLUE) if len(speed.columns) > 1 else (plotting.BLUE,)
    with plotting.picture(path, 9.2, 0.36 * len(shown) + 1.1) as fig:
        axes = fig.subplots(1, len(sides), sharey=True, squeeze=False)[0]
        for ax, (title, values) in zip(axes, sides.items(), strict=True):
            height = 0.68 / len(speed.columns)
            for j, (name, heading) in enumerate(speed.columns.items()):
                shift = (j - (len(speed.columns) - 1) / 2) * (height + 0.02)
                there = [(i + shift, row[name]) for i, row in enumerate(values) if row.get(name) is not None]
                ax.barh([i for i, _ in there], [x for _, x in there], height=height, color=colours[j], label=heading)
            ax.set_yticks(range(len(shown)), [f"{row.label}  {i}" for i, row in shown])
            ax.set_ylim(len(shown) - 0.5, -0.5)
            ax.grid(axis="y", visible=False)
            ax.set_title(title)
            ax.set_xlabel(speed.axis)
            if len(speed.columns) > 1:  # forms differ by orders of magnitude
                plotting.log_axis(ax)
        if len(speed.columns) > 1:
            axes[-1].legend(loc="upper right")
