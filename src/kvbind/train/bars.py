"""Progress bars, one line per run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import progress
from rich.console import Console

Watch = Callable[[int, str], None]
"""Told, after every step, how many are done and what to show beside them."""


@contextmanager
def progress_bars(console: Console | None) -> Iterator[Callable[[str, int], Watch]]:
    """Room for progress bars below what the console prints; they are gone when the block ends.

    Args:
        console: where to draw; None for nowhere.

    Yields:
        A function of a title and a number of steps that adds a bar and returns what moves it. A full bar goes away.
    """
    columns = (
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(bar_width=None),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[note]}", markup=False),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=console, disable=console is None, transient=True, expand=True) as shown:

        def add(title: str, steps: int) -> Watch:
            line = shown.add_task(title, total=steps, note="")

            def watch(step: int, note: str) -> None:
                shown.update(line, completed=step, note=note, visible=step < steps)

            return watch

        yield add
