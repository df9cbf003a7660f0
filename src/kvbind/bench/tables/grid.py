"""What a table is: a title, a header, rows of texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Grid:
    """One table.

    Attributes:
        key: a short name.
        title: the line above the table.
        header: of the columns; the first `left` of them are words, the others numbers.
        rows: of texts.
        left: how many columns are words.
        note: the lines below the table, if any.
    """

    key: str
    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int = 2
    note: str = ""


Row = Mapping[str, Any]
