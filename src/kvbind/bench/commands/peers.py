"""`kvbind bench peers`: `ttt` beside other libraries."""

from __future__ import annotations

from typing import Annotated

import typer

from kvbind.bench.options import Chunk, Device, Heads, Out, Tokens, Width, open_device
from kvbind.bench.output import say_written, show_grid, write_growing


def command(
    only: Annotated[
        str, typer.Option(help="Only rows whose name has this in it: rung6, host, linear, delta_net, kda, mini, titans.")
    ] = "",
    tokens: Tokens = 32768,
    chunk: Chunk = 2048,
    width: Width = 384,
    heads: Heads = 4,
    seconds: Annotated[float, typer.Option(min=0.0, help="How long to time each pass, and each again as a graph.")] = 0.2,
    budget: Annotated[float, typer.Option(min=0.0, help="Begin no further row after this, seconds.")] = 540,
    device: Device = "auto",
    out: Out = None,
) -> None:
    """Time `ttt` beside what a user would run instead: compiled PyTorch for every rung, flash-linear-attention by token."""
    from kvbind.bench.harness.operands import Size
    from kvbind.bench.kernels.peers import measured, plan
    from kvbind.bench.tables.peers import peer_grids
    from kvbind.inner.systems import RUNGS

    rows = [row for row in plan(tuple(RUNGS), Size(1, tokens, heads, width), chunk) if only in row.name]
    if not rows:
        raise typer.BadParameter(f"only must be in the name of a row; got {only!r}")
    record = write_growing(measured(rows, open_device(device), seconds, budget), out)
    for grid in peer_grids(record):
        show_grid(grid)
    say_written(out)
