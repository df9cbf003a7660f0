"""What benchmarks print and write: tables on the terminal, records in files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from kvbind.screen import GAP, Screen, column_groups, progress_screen

if TYPE_CHECKING:
    from kvbind.bench.tables.grid import Grid

console = Screen()


def write_growing(records: Iterable[dict[str, Any]], out: Path | None) -> dict[str, Any]:
    """Write a record as it grows, say how far it is, and give it whole."""
    from kvbind.bench.harness.record import save
    from kvbind.train.bars import progress_bars

    each = iter(records)
    record = next(each)
    save(out, record)
    with progress_bars(progress_screen(console), unit="row") as add:
        watch = add("measuring", record["planned"])
        for record in each:
            save(out, record)
            watch(len(record["rows"]), "")
    return record


def show_grid(grid: Grid) -> None:
    """Show a table, in parts one below another where it is too wide."""
    groups = column_groups(grid.header, grid.rows, console.width - GAP, grid.left)
    for group in groups:
        table = Table(
            title=grid.title if group is groups[0] else None, caption=grid.note if group is groups[-1] else None,
            caption_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0),
        )  # fmt: skip
        for i in group:
            table.add_column(grid.header[i], justify="left" if i < grid.left else "right", no_wrap=0 < i < grid.left)
        for row in grid.rows:
            table.add_row(*(row[i] for i in group))
        console.print(table)


def write_results(out: Path | None, device: Any, results: dict[str, Any], packages: tuple[str, ...] = ()) -> None:
    """Write results with machine, versions and command; of `packages`, too, which version is installed."""
    from kvbind.bench.harness.record import provenance, save

    save(out, provenance(device, packages) | results)
    say_written(out)


def say_written(out: Path | None) -> None:
    """Where results are, if anywhere."""
    if out is not None:
        console.print(f"written to {out}")
