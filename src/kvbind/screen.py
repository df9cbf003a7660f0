"""What is printed for people: names from files, folders and users appear as they are, and do nothing to a terminal."""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, ClassVar

from rich.console import Console
from rich.text import Text

_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What moves the cursor, begins an escape sequence, or turns the direction of writing; but for tabs and ends of lines."""


GAP = 2
"""Characters between the columns of a table."""


def visible(text: str) -> str:
    r"""`text` with an escape such as `\x1b` in place of every character that a terminal would obey instead of showing it."""
    return _UNSEEN.sub(lambda found: repr(found[0])[1:-1], text)


def duration(seconds: float) -> str:
    """A time for people: 47 µs, 3.1 ms, 4.4 s, 40 s, 12 min, 3.5 h, 2.1 days; wherever times of any size are printed."""
    if not seconds:
        return "0 s"
    units = ((1e-3, "µs", 1e-6), (1.0, "ms", 1e-3), (100.0, "s", 1.0), (6000.0, "min", 60.0), (172_800.0, "h", 3600.0))
    unit, size = next(((unit, size) for most, unit, size in units if seconds < most), ("days", 86_400.0))
    count = seconds / size
    # two digits at the least
    digits = 0 if count >= 9.95 else 1
    return f"{count:,.{digits}f} {unit}"


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
    """A console for which square brackets and colons are text, and control characters are shown.

    Attributes:
        spoke: when one of these last printed, by `time.monotonic`.
        resting: how many `at_rest` there are.
    """

    spoke: ClassVar[float] = 0.0
    resting: ClassVar[int] = 0

    def __init__(self, **options: Any) -> None:
        # a width of none, as some terminals without a size say, would show nothing
        environment = {name: value for name, value in os.environ.items() if (name, value) != ("COLUMNS", "0")}
        plain: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False, "_environ": environment}
        super().__init__(**(plain | options))

    def print(self, *objects: Any, **options: Any) -> None:
        """Print, as rich does; an error says to where."""
        Screen.spoke = time.monotonic()
        try:
            super().print(*objects, **options)
        except OSError as error:
            if error.filename is not None or error.errno is None:
                raise
            raise OSError(error.errno, error.strerror, "stderr" if self.stderr else "stdout") from error

    def render_str(self, text: str, **options: Any) -> Text:
        """A text as it is shown; tables ask for their cells' too."""
        return super().render_str(visible(text), **options)


def progress_screen(screen: Console) -> Console:
    """Where to say how far work is whose results `screen` will show: there in a terminal, else in lines on stderr."""
    return screen if screen.is_terminal else Screen(stderr=True, force_terminal=False)


SILENCE = 15.0
"""Seconds of silence after which a command says that it is at work; more than between lines on how far it is."""


@contextmanager
def heard_of(what: str) -> Iterator[None]:
    """Say on stderr how long the block has been running, whenever no `Screen` printed anything for `SILENCE` seconds.

    Args:
        what: it does, such as the name of a command.
    """
    begun = Screen.spoke = time.monotonic()
    over = threading.Event()

    def listen() -> None:
        while not over.wait(SILENCE / 3):
            break_silence(what, begun)

    thread = threading.Thread(target=listen, name="heard-of", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def break_silence(what: str, begun: float) -> None:
    """Say how long something has been running, if nothing was said for `SILENCE` seconds; `begun` by `time.monotonic`."""
    now = time.monotonic()
    if not Screen.resting and now - Screen.spoke >= SILENCE:
        Screen.spoke = now
        if sys.stderr is not None:
            with suppress(OSError):  # where nobody listens
                print(visible(f"{what}: {duration(now - begun)} so far"), file=sys.stderr, flush=True)


@contextmanager
def at_rest() -> Iterator[None]:
    """A block without lines of `heard_of`: something else shows how far it is, or it waits for its user."""
    Screen.resting += 1
    try:
        yield
    finally:
        Screen.resting -= 1
        Screen.spoke = time.monotonic()


class LogLines(logging.Handler):
    """Writes what the library logs to stderr, a line each."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        Screen(stderr=True).print(f"{record.levelname.lower()}: {record.getMessage()}", soft_wrap=True)
