"""`kvbind bench kernels`: `ttt` with kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvbind.bench.options import Batch, Chunk, Device, Heads, Out, Tokens, Width, open_device, some_of
from kvbind.bench.output import console, say_written, show_grid, write_growing
from kvbind.screen import duration


def command(
    what: Annotated[
        str, typer.Option(help="targets, token, lengths, chunks, widths, first, compiled; some of them, or all.")
    ] = "targets",
    rungs: Annotated[str, typer.Option(help="Rungs of the ladder, such as 0,2,6.")] = "0,1,2,3,4,5,6",
    tokens: Tokens = 32768,
    chunk: Chunk = 2048,
    width: Width = 384,
    heads: Heads = 4,
    batch: Batch = 1,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
    seconds: Annotated[float, typer.Option(min=0.0, help="How long to time each pass, and each again as a graph.")] = 0.2,
    compile_limit: Annotated[
        float, typer.Option(min=1.0, help="Give up on a process for first calls, torch.compile or fla after this, seconds.")
    ] = 60,
    budget: Annotated[float, typer.Option(min=0.0, help="Begin no further row after this, seconds.")] = 300,
    profile: Annotated[
        Path | None, typer.Option(help="Afterwards profile every rung on kernels, into this JSON file.")
    ] = None,
    device: Device = "auto",
    out: Out = None,
) -> None:
    """Time `ttt` with kernels: every rung, by length, chunk and width, beside PyTorch, peers and the device's limit."""
    from kvbind.bench.harness.operands import Size
    from kvbind.bench.harness.record import answered
    from kvbind.bench.kernels.cases import WHATS, SpeedSettings
    from kvbind.bench.kernels.speed import measured
    from kvbind.bench.tables.kernels import speed_grids
    from kvbind.inner.systems import RUNGS

    place = open_device(device)
    if dtype not in ("float32", "bfloat16"):
        raise typer.BadParameter(f"dtype must be float32 or bfloat16; got {dtype!r}")
    if profile is not None and place.type != "cuda":
        raise typer.BadParameter(f"profile is of a GPU's kernels; the device is {place}")
    chosen = some_of(",".join(f"rung{x.strip().removeprefix('rung')}" for x in rungs.split(",")), RUNGS, "rungs")
    settings = SpeedSettings(Size(batch, tokens, heads, width), chunk, dtype, chosen)
    parts = some_of(what, WHATS, "what")
    records = measured(parts, settings, place, seconds=seconds, compile_limit=compile_limit, budget=budget)
    record = write_growing(records, out)
    if profile is not None:
        from kvbind.bench.kernels.profiles import profiled

        write_growing(profiled(settings, place), profile)
    for grid in speed_grids(record):
        show_grid(grid)
    if not record["complete"]:
        console.print(f"stopped after {duration(budget)}: {answered(record)} of {record['planned']} rows")
    say_written(out)
