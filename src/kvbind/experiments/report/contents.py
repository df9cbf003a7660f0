"""What a page shows of one experiment, as plain values: claims, tables, charts, pictures and how they were made."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from kvbind.experiments.report.charts import Chart
from kvbind.files import check_regular

PNG = b"\x89PNG\r\n\x1a\n"

STATES = {True: "holds", False: "does not hold", None: "not decided at this scale"}
"""What is said of a verdict, by whether the claim holds."""


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
        command: that made it.
        details: texts that open on demand, by title.
        place: its folder.
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

    @property
    def by_rule(self) -> list[tuple[str, list[Mapping[str, Any]]]]:
        """The verdicts, those together that follow each other and have one rule."""
        return [(rule, list(own)) for rule, own in groupby(self.verdicts, lambda verdict: str(verdict["rule"]))]

    @property
    def undrawn(self) -> list[Picture]:
        """The pictures that no chart stands for."""
        return [picture for picture in self.pictures if picture.heading not in self.charts]

    def state(self, verdict: Mapping[str, Any]) -> str:
        """What a page says of a verdict."""
        return STATES[verdict["holds"]]
