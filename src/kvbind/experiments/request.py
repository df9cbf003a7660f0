"""What a command asks of an experiment."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from kvbind.inner.value import check_positive_int


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
