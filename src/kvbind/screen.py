"""What is printed for people: names from files, folders and users appear as they are, and do nothing to a terminal."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What moves the cursor, begins an escape sequence, or turns the direction of writing; but for tabs and ends of lines."""


GAP = 2
"""Characters between the columns of a table."""


def visible(text: str) -> str:
    r"""`text` with an escape such as `\x1b` in place of every character that a terminal would obey instead of showing it."""
    return _UNSEEN.sub(lambda found: repr(found[0])[1:-1], text)


def column_groups(header: Sequence[str], rows: Sequence[Sequence[str]], width: int, left: int = 1) -> list[list[int]]:
    """The columns of a table that is too wide, in groups that fit one below another.

    Args:
        header: a name for each column; one that has no line breaks may be broken between words.
        rows: a text for each column.
        width: of the terminal.
        left: how many columns, from the first, say what a row is: they are in every group.

    Returns:
        The numbers of the columns of each group; at least one besides those that are in all.
    """
    columns = [*zip(*rows, strict=True)] or [()] * len(header)
    names = [name.split("\n") if "\n" in name else name.split() for name in header]
    needed = [max(map(len, (*name, *cells)), default=0) + GAP for name, cells in zip(names, columns, strict=True)]
    own = list(range(left))
    groups: list[list[int]] = []
    for column in range(left, len(header)):
        last = groups[-1] if groups else None
        if last is None or sum(needed[i] for i in (*last, column)) > width:
            groups.append([*own, column])
        else:
            last.append(column)
    return groups or [own]


class Screen(Console):
    """A console for which square brackets and colons are text, and control characters are shown."""

    def __init__(self, **options: Any) -> None:
        # a width of none, as some terminals without a size say, would show nothing
        environment = {name: value for name, value in os.environ.items() if (name, value) != ("COLUMNS", "0")}
        plain: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False, "_environ": environment}
        super().__init__(**(plain | options))

    def render_str(self, text: str, **options: Any) -> Text:
        """A text as it is shown; tables ask for their cells' too."""
        return super().render_str(visible(text), **options)


class LogLines(logging.Handler):
    """Writes what the library logs to stderr, a line each."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        Screen(stderr=True).print(f"{record.levelname.lower()}: {record.getMessage()}", soft_wrap=True)
