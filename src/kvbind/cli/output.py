"""What commands print alike: metrics, tables, and what to type next."""

from __future__ import annotations

import contextlib
import shlex
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kvbind.interrupt import CODE
from kvbind.screen import Screen
from kvbind.tasks import NEXT


def console() -> Console:
    """Where commands write what they were asked for."""
    return Screen()


@contextlib.contextmanager
def continuable() -> Iterator[None]:
    """Ctrl-C ends a long run with a word on how to go on."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        said = str(interrupt) or "interrupted; the same command goes on from the last checkpoint, if there is one"
        say_error(f"\n{said}{', without --fresh' if '--fresh' in sys.argv else ''}", mark="")
        sys.exit(CODE)  # not typer's `Exit`, which with this code stands for a Ctrl-C that nobody has said anything of


def say_error(text: str, mark: str = "error: ", style: str | None = None) -> None:
    """Write a line on stderr; where that cannot be written to, the exit code alone says it.

    Args:
        text: the line.
        mark: what stands before it, in red.
        style: of the text, by rich's name.
    """
    stderr = Screen(stderr=True)
    with contextlib.suppress(OSError, SystemExit):  # rich ends the process where a pipe is closed
        stderr.print(mark, style="bold red", end="")
        stderr.print(text, style=style, soft_wrap=True)


def say_next(screen: Console, task: str, run: Path) -> None:
    """The next commands to type, a line each."""
    quoted = shlex.quote(str(run))
    shown = [NEXT[task].format(run=quoted, picture="attention.png")] if task in NEXT else []
    say(screen, [*shown, f"kvbind eval {quoted}"])


def say(screen: Console, commands: Sequence[str]) -> None:
    """Commands to type next, a line each."""
    for i, command in enumerate(commands):
        screen.print(f"{'' if i else 'next:':<5} {command}", soft_wrap=True)


def show_metrics(screen: Console, metrics: dict[str, Any]) -> None:
    """Held-out metrics: numbers one per line, then series."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in metrics.items():
        if not isinstance(value, list):
            table.add_row(name.replace("_", " "), f"{value:,}" if isinstance(value, int) else f"{value:.4f}")
    screen.print(table)
    for name, value in metrics.items():
        if isinstance(value, list):
            every = max(len(value) // 8, 1)
            # lines end between the pairs: textwrap takes a non-breaking space for a part of a word
            series = "  ".join(f"{place}:\N{NO-BREAK SPACE}{x:.3f}" for place, x in value[::every])
            for line in textwrap.wrap(f"{name.replace('_', ' ')}: {series}", screen.width):
                screen.print(line.replace("\N{NO-BREAK SPACE}", " "), soft_wrap=True)


def show_tables(screen: Console, results: dict[str, Any]) -> None:
    """The tables of a report."""
    for one in results["tables"]:
        table = Table(title=one["heading"], title_justify="left", box=None, header_style="dim", pad_edge=False)
        for i, name in enumerate(one["header"]):
            table.add_column(name, justify="right" if i else "left")
        for row in one["rows"]:
            table.add_row(*row)
        screen.print(table)
