"""What a page shows of one experiment, as plain values: claims, tables, charts, pictures and how they were made."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvbind.experiments.report.charts import Chart
from kvbind.files import check_regular

PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class PageTable:
    """A table of texts; the first column names the rows.

    Attributes:
        heading: the line above it.
        header: of the columns, a line break between a name and where its numbers are from.
        rows: of texts, one per column.
        numbers: of the rows, left of their names; none where rows have no numbers.
        rule: how many rows stand above a line; 0 for no line.
    """

    heading: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Sequence[int | None] = ()
    rule: int = 0


@dataclass(frozen=True)
class Picture:
    """A PNG.

    Attributes:
        heading: the line above it.
        file: its path.
        about: what it shows, for who cannot see it.
    """

    heading: str
    file: Path
    about: str

    @property
    def source(self) -> str:
        """The picture itself, as a data URI.

        Raises:
            ValueError: a file that is none: a page that is passed on must not carry others.
            OSError: a file that cannot be read.
        """
        content = check_regular(self.file).read_bytes()
        if not content.startswith(PNG):
            raise ValueError(f"{self.file} must be a PNG; it is none")
        return f"data:image/png;base64,{base64.b64encode(content).decode()}"


@dataclass(frozen=True)
class PagePart:
    """One experiment on a page.

    Attributes:
        experiment: its name.
        title: for people.
        lead: a few sentences below it.
        verdicts: claims, as `results.json` holds them: "claim", "rule", "holds" (None where that is open) and "found".
        grids: tables.
        charts: what can be drawn from the data, by heading.
        pictures: what was drawn already.
        command: that made it, or empty where that is not known.
        details: texts that open on demand, by title.
        place: its folder.
        task: of the paper's three, or empty.
        scale: as `kvbind reproduce` names it, or empty.
        seeds: how many.
        table: the table whose steps were measured, where it is not one itself; else empty.
        device: that did the work, or empty.
        made: versions that made it, by package.
        date: of the result, where it holds one.
        samples: texts that a model wrote, by heading.
        next_command: the one that shows more of what a model learned, or empty.
    """

    experiment: str
    title: str
    lead: str
    verdicts: Sequence[Mapping[str, Any]]
    grids: Sequence[PageTable]
    charts: Mapping[str, Sequence[Chart]]
    pictures: Sequence[Picture]
    command: str
    details: Mapping[str, str]
    place: Path
    task: str = ""
    scale: str = ""
    seeds: int = 1
    table: str = ""
    device: str = ""
    made: Mapping[str, str] = field(default_factory=dict)
    date: str = ""
    samples: Mapping[str, str] = field(default_factory=dict)
    next_command: str = ""

    @property
    def at(self) -> str:
        """Its scale and seeds."""
        what = "measured steps" if self.table else f"{self.seeds} seed{'' if self.seeds == 1 else 's'}"
        return f"scale {self.scale}, {what}" if self.scale else what

    @property
    def undrawn(self) -> list[Picture]:
        """The pictures that no chart stands for."""
        return [picture for picture in self.pictures if picture.heading not in self.charts]


def shown(path: str) -> str:
    """A path as text: bytes that are none are replaced."""
    return os.fsencode(path).decode("utf-8", errors="replace")


def facts(results: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a part that every `results.json` holds in the same place."""
    seeds, machine, made = (results.get(name) for name in ("seeds", "machine", "versions"))
    return {
        "task": str(results.get("task") or ""),
        "scale": str(results["scale"]),
        "seeds": len(seeds) if isinstance(seeds, list) else 1,
        "device": str(machine.get("device") or "") if isinstance(machine, Mapping) else "",
        "made": {str(name): str(x) for name, x in made.items()} if isinstance(made, Mapping) else {},
        "date": str(results.get("date") or ""),
    }
