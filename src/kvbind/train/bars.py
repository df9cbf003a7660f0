"""How far work is: progress bars in a terminal, and elsewhere, such as in a log, a line every so often."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import progress
from rich.console import Console

from kvbind.screen import at_rest, duration

Watch = Callable[[int, str], None]
"""Told how many steps are done and what to show beside them: after every step, where a run goes on, before its first, and
with a note that begins with `BEFORE`, while something else has to be done before that."""

BEFORE = "before training: "
"""How notes begin on what is done before a run's first step."""

RESUMED = "goes on from a checkpoint"
"""What is shown beside the step that a run goes on from."""

SECONDS = 10.0
"""Between lines on a run where there is no terminal."""


@contextmanager
def progress_bars(
    console: Console | None, seconds: float = SECONDS, unit: str = "step"
) -> Iterator[Callable[[str, int], Watch]]:
    """Room for progress bars below what the console prints; they are gone when the block ends.

    Args:
        console: where to draw, or where it is no terminal, to print lines; None for nowhere.
        seconds: between two lines on a run; its first step and its last have one always.
        unit: what lines count.

    Yields:
        A function of a title and a number of steps that adds a bar and returns what moves it. A full bar goes away.
    """
    if console is None:
        yield lambda title, steps: lambda step, note: None
        return
    if console.is_terminal:
        with at_rest(), bars(console) as add:
            yield add
        return

    def add_lines(title: str, steps: int) -> Watch:
        return lines(console, title, steps, seconds, unit)

    yield add_lines


def went_on(title: str, step: int, steps: int) -> str:
    """Says from where a run goes on."""
    return f"{title}: goes on from the checkpoint at step {step:,} of {steps:,}"


@contextmanager
def bars(console: Console) -> Iterator[Callable[[str, int], Watch]]:
    """`progress_bars` of a terminal."""
    narrow = console.width < 100
    columns = [
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(bar_width=10 if narrow else None),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[note]}", markup=False),
        *([] if narrow else [progress.TimeElapsedColumn()]),
        progress.TimeRemainingColumn(compact=narrow),
    ]
    with progress.Progress(*columns, console=console, transient=True, expand=not narrow) as shown:

        def add(title: str, steps: int) -> Watch:
            line = shown.add_task(title, total=steps, note="")

            def watch(step: int, note: str) -> None:
                if note == RESUMED:
                    console.print(went_on(title, step, steps), markup=False, soft_wrap=True)
                    # what was done earlier says nothing of what a step takes now
                    shown.reset(line, total=steps, completed=step)
                    return
                shown.update(line, completed=step, note=note.removeprefix(BEFORE), visible=step < steps)

            return watch

        yield add


def lines(console: Console, title: str, steps: int, seconds: float, unit: str) -> Watch:
    """What prints a line on a run every so often."""
    begun: tuple[int, float] | None = None
    printed = printed_before = float("-inf")

    def watch(step: int, note: str) -> None:
        nonlocal begun, printed, printed_before
        now = time.monotonic()
        if note == RESUMED:
            console.print(went_on(title, step, steps), markup=False, soft_wrap=True)
            begun = (step, now)
            return
        if note.startswith(BEFORE):
            if begun is not None:  # what steps take is counted from here
                begun = (step, now)
            if now - printed_before >= seconds:
                console.print(f"{title}, {note}", markup=False, soft_wrap=True)
                printed_before = now
            return
        begun = begun or (step, now)
        if now - printed < seconds and step < steps:
            return
        taken = step - begun[0]
        left = f"{duration((steps - step) * (now - begun[1]) / taken)} left" if taken and step < steps else ""
        said = (f"{title}: {unit} {step:,} of {steps:,}", note, left)
        console.print("  ".join(part for part in said if part), markup=False, soft_wrap=True)
        printed = now

    return watch
