"""Tables of trained rows, as values: which rows there are, and what came out of them."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvbind.experiments import plotting
from kvbind.experiments.subjects import Subject
from kvbind.experiments.subjects.published import Published
from kvbind.experiments.subjects.rows import BASELINES
from kvbind.experiments.training.runs import Run
from kvbind.experiments.training.trained_rows import unfinished

SMOOTHING, CURVE = 0.95, 100
"""How training losses are shown: the weight of what came before, and the number of points."""


@dataclass(frozen=True)
class Table:
    """A table of the paper whose rows are models trained from scratch that differ in their inner loop alone.

    Attributes:
        name: of its module, and of its folder.
        title: for people.
        rows: names among `LABELS`; the first is what the others are compared with.
        rungs: how many of them, from the first, are rungs of a ladder.
        speed: whether throughput has its place in it.
        about: a sentence or two on the rows.
    """

    name: str
    title: str
    rows: tuple[str, ...]
    rungs: int
    speed: bool
    about: str


@dataclass(frozen=True)
class TableRow:
    """One row.

    Attributes:
        name: among `LABELS`.
        label: what it changes.
        paper: what the paper has for it, or None.
        inner: its inner loop, as the task's configuration holds it; of a baseline `NO_FAST_WEIGHTS`.
        runs: finished training runs, one per seed; none where the row does not apply to the task.
        speeds: units per second, by column.
        paper_speeds: what the paper has for those.
        seeds: of the runs.
        missing: seeds whose runs were not finished in time.
    """

    name: str
    label: str
    paper: Published | None
    inner: Any
    runs: tuple[Run, ...]
    speeds: Mapping[str, float | None]
    paper_speeds: Mapping[str, float | None]
    seeds: tuple[int, ...] = ()
    missing: tuple[int, ...] = ()

    @property
    def published(self) -> float | None:
        """The paper's figure, in brackets or not."""
        return None if self.paper is None else self.paper.value

    @property
    def baseline(self) -> bool:
        """Whether it is none of the paper's."""
        return self.name in BASELINES

    @property
    def applies(self) -> bool:
        """Whether the row's change is one for this task."""
        return self.inner is not None

    def values(self, metric: str, when: str = "held_out") -> list[float]:
        """A metric, seed by seed; `when` is "held_out" after training or "untrained" before it."""
        return [run.result[when][metric] for run in self.runs]

    def mean(self, metric: str, when: str = "held_out") -> float | None:
        """A metric, averaged over seeds."""
        return statistics.fmean(self.values(metric, when)) if self.runs else None

    def deviation(self, metric: str) -> float | None:
        """Its standard deviation over seeds; None of a single one."""
        return statistics.stdev(self.values(metric)) if len(self.runs) > 1 else None

    def error(self, metric: str) -> float | None:
        """The standard error of its mean; None of a single seed."""
        deviation = self.deviation(metric)
        return None if deviation is None else deviation / len(self.runs) ** 0.5


@dataclass(frozen=True)
class TableOutcome:
    """A table that was reproduced.

    Attributes:
        table: what was reproduced.
        subject: of what task.
        rows: of the table.
        results: what `results.json` holds.
        config: of all rows, but for their inner loop, as YAML.
    """

    table: Table
    subject: Subject
    rows: tuple[TableRow, ...]
    results: Mapping[str, Any]
    config: str

    @property
    def title(self) -> str:
        """Of the report."""
        return f"{self.table.title}: {self.results['task']}, scale {self.results['scale']}"

    @property
    def labels(self) -> dict[str, str]:
        """What each row changes, in the task's words."""
        return {row.name: row.label for row in self.rows}

    @property
    def trained(self) -> list[TableRow]:
        """The rows that apply and of which there is a finished run."""
        return [row for row in self.rows if row.runs]

    @property
    def missing(self) -> str:
        """Runs that there was no time for, in words; empty where there are none."""
        return unfinished({row.name: ((*row.seeds, *row.missing), row.seeds) for row in self.rows})

    def numbered(self) -> Iterator[tuple[int | None, TableRow]]:
        """The rows, each with the number of its rung."""
        for i, row in enumerate(self.rows):
            yield (i if i < self.table.rungs else None), row


def as_data(row: TableRow, subject: Subject, home: Path, setting: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A row as `results.json` holds it; runs are named by their place below `home`.

    Where the paper has throughput, ours is there in its unit too, millions of tokens times heads per second.

    Args:
        row: the row.
        subject: its task.
        home: of the folders of runs.
        setting: what throughput was measured at; None without.
    """
    metric, speed = subject.metric.name, subject.speed
    published: dict[str, Any] = {metric: row.published}
    if row.paper and not row.paper.applies:
        published["in_brackets"] = True
    published |= {f"{column}_mtok": x for column, x in row.paper_speeds.items()}
    if row.paper_speeds:
        published["speed_unit"] = "million tokens x heads per second"
    compared = (
        {} if setting is None else {column: speed.compared(row.speeds.get(column), setting) for column in row.paper_speeds}
    )
    return {
        "name": row.name,
        "label": row.label,
        "applies": row.applies,
        metric: row.mean(metric),
        f"{metric}_std": row.deviation(metric),
        f"{metric}_standard_error": row.error(metric),
        **{other.name: row.mean(other.name) for other in subject.others},
        f"untrained_{metric}": row.mean(metric, "untrained"),
        **{f"{column}_{speed.unit}_per_second": x for column, x in row.speeds.items()},
        **{f"{column}_mtok_x_heads": x for column, x in compared.items()},
        "paper": published,
        "inner": row.inner,
        "runs": [
            {"seed": seed, "folder": run.folder.relative_to(home).as_posix(), "training_loss": curve(run), **run.result}
            for seed, run in zip(row.seeds, row.runs, strict=True)
        ],
        "unfinished_seeds": list(row.missing),
    }


def curve(run: Run) -> list[list[float]]:
    """The training loss of a run, smoothed: step and loss, `CURVE` points at most."""
    points = plotting.pooled(plotting.smoothed(run.losses(), SMOOTHING), CURVE)
    return [[float(f"{x:.5g}") for x in point] for point in points]


def as_csv(data: Mapping[str, Any]) -> dict[str, Any]:
    """A row of `results.json` as `results.csv` holds it: numbers alone."""
    flat = {
        name: value for name, value in data.items() if name not in ("paper", "inner", "runs", "applies", "unfinished_seeds")
    }
    if data["runs"]:
        flat["training_seconds"] = sum(run["training_seconds"] for run in data["runs"])
    return flat | {f"paper_{name}": value for name, value in data["paper"].items()}
