"""What a figure or a check of the paper leaves behind: verdicts by stated rules, pictures in two formats, and a page."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from kvbind.experiments import page, report
from kvbind.experiments.page.findings import findings_part
from kvbind.experiments.page.parts import STATES
from kvbind.inner.value import check_positive_int
from kvbind.provenance import command, machine, versions


@dataclass(frozen=True)
class Measure:
    """What to do in place of training: some steps, their time, and what the whole would come to.

    Attributes:
        steps: measured, after a few to warm up.
        rows: of the table, by name; None for all of them.
        price: of a GPU for an hour.
        efficiency: of several GPUs, over as many times one; assumed.
    """

    steps: int = 20
    rows: tuple[str, ...] | None = None
    price: float = 2.5
    efficiency: float = 0.9

    def __post_init__(self) -> None:
        check_positive_int("measure_steps", self.steps)
        for name in ("price", "efficiency"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be greater than 0; got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What `kvbind reproduce` asks of an experiment.

    Attributes:
        task: what was trained.
        scale: how large.
        seeds: how many, counted from 0.
        out: the report's folder, whose `trained/` holds the training runs; default `runs/EXPERIMENT-TASK-SCALE`, with the
            runs in `runs/trained`, where other experiments find them.
        fresh: train everything anew.
        data: another source of data; or one for each task, by name.
        workers: rows trained at once.
        overrides: further `key=value` edits of every run's configuration.
        trained: where training runs are kept, if neither in `out` nor in `runs/trained`.
        minutes: from which on nothing is trained any more: unfinished runs leave a checkpoint, and reports are written of
            those that are finished. None for no limit, 0 for reports alone.
        rows: names of rows; others are not trained, and reported where they are finished. None for all of them.
        measure: time some steps in place of training.
        console: where progress and verdicts are shown; None for nowhere.
        verbose: show the configuration of all runs there too.
        started: by `time.monotonic`.
    """

    task: str = "language"
    scale: str = "smoke"
    seeds: int = 1
    out: Path | None = None
    fresh: bool = False
    data: str | Mapping[str, str] | None = None
    workers: int | None = None
    overrides: Sequence[str] = ()
    trained: Path | None = None
    minutes: float | None = None
    rows: tuple[str, ...] | None = None
    measure: Measure | None = None
    console: Console | None = None
    verbose: bool = False
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        check_positive_int("seeds", self.seeds)
        if self.workers is not None:
            check_positive_int("workers", self.workers)
        if self.minutes is not None and not self.minutes >= 0:
            raise ValueError(f"minutes must be at least 0; got {self.minutes}")

    @property
    def deadline(self) -> float | None:
        """When training ends, by `time.monotonic`; None where it may take what it takes."""
        return None if self.minutes is None else self.started + 60 * self.minutes

    def trains(self, row: str) -> bool:
        """Whether a row is among those that were asked for."""
        return self.rows is None or row in self.rows

    def source(self, task: str) -> str | None:
        """The data to take for a task in place of the configuration's."""
        return self.data if self.data is None or isinstance(self.data, str) else self.data.get(task)

    def refuse_measuring(self, experiment: str) -> None:
        """Say that an experiment on trained models is none without them.

        Raises:
            ValueError: steps were to be measured in place of training.
        """
        if self.measure is not None:
            raise ValueError(
                f"{experiment} looks at trained models, of which --scale {self.scale} has none without --train; table1, "
                "table2 and figure4 measure steps instead"
            )

    def say(self, text: str) -> None:
        """Show a line."""
        if self.console:
            self.console.print(text, markup=False, soft_wrap=True)


@dataclass(frozen=True)
class Verdict:
    """What the numbers say to a claim.

    Attributes:
        claim: in words.
        rule: when it holds.
        holds: whether it does; None where the numbers decide neither way.
        found: the numbers that decided.
    """

    claim: str
    rule: str
    holds: bool | None
    found: str

    @property
    def word(self) -> str:
        """What is said of it."""
        return STATES[self.holds]


@dataclass(frozen=True)
class Findings:
    """An experiment that was made.

    Attributes:
        experiment: its name.
        title: of the page.
        lead: a sentence or two below it.
        config: what it was made with, as plain data.
        data: its own numbers, as `results.json` holds them.
        verdicts: what they say.
        tables: header and lines by heading.
        pictures: a PNG's name and its description, by heading.
    """

    experiment: str
    title: str
    lead: str
    config: Any
    data: Mapping[str, Any]
    verdicts: Sequence[Verdict]
    tables: Mapping[str, tuple[Sequence[str], Sequence[Sequence[str]]]]
    pictures: Mapping[str, tuple[str, str]]


def write_findings(out: Path, request: Request, findings: Findings, device: torch.device) -> dict[str, Any]:
    """Write `results.json` and the page; the pictures are there already.

    Args:
        out: folder of the report.
        request: what was asked.
        findings: what came out.
        device: that did the work.

    Returns:
        What `results.json` holds.
    """
    results = {
        "experiment": findings.experiment,
        "task": request.task,
        "scale": request.scale,
        "seeds": list(range(request.seeds)),
        "command": command(),
        "wall_seconds": round(time.monotonic() - request.started, 1),
        "versions": versions(),
        "machine": machine(device),
        "config": findings.config,
        "verdicts": [asdict(verdict) for verdict in findings.verdicts],
        "title": findings.title,
        "lead": findings.lead,
        "tables": [{"heading": name, "header": header, "rows": rows} for name, (header, rows) in findings.tables.items()],
        "pictures": [{"heading": name, "file": file, "text": text} for name, (file, text) in findings.pictures.items()],
        **findings.data,
    }
    report.write_json(out / "results.json", results)
    page.write_index(out, findings_part(results, out))
    for verdict in findings.verdicts:
        request.say(f"{verdict.word}: {verdict.claim}: {verdict.found}")
    request.say(f"{results['wall_seconds']:.0f} s. Everything is in {out}; start with {out / 'index.html'}")
    return results
