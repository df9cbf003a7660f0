"""`kvbind bench compile`: seconds that `torch.compile` takes."""

from __future__ import annotations

from typing import Annotated

import typer

from kvbind.bench.options import Chunk, Device, Out, Tokens, Width, open_device, some_of
from kvbind.bench.output import say_written, show_grid, write_growing


def command(
    rungs: Annotated[str, typer.Option(help="Rungs of the ladder, such as 0,2.")] = "0,2",
    layers: Annotated[int, typer.Option(min=1, help="Blocks of the model.")] = 2,
    width: Width = 64,
    chunk: Chunk = 16,
    tokens: Tokens = 48,
    limit: Annotated[float, typer.Option(min=1.0, help="Give up on a process after this, seconds.")] = 300,
    device: Device = "auto",
    out: Out = None,
) -> None:
    """Time `torch.compile` of a language model's training step, with empty caches: whole, and block by block."""
    from kvbind.bench.harness.record import growing, provenance
    from kvbind.bench.tables.forms import compile_grid
    from kvbind.bench.training.compile_time import WAYS, bench_compile
    from kvbind.inner.systems import RUNGS

    place = open_device(device)
    chosen = some_of(",".join(f"rung{x.strip()}" for x in rungs.split(",")), RUNGS, "rungs")
    config = {"layers": layers, "width": width, "chunk": chunk, "tokens": tokens, "device": str(place)}
    rows = bench_compile(chosen, config, limit=limit)
    about = provenance(place, ("triton",)) | {"config": config}
    record = write_growing(growing(about, len(WAYS) * len(chosen), rows), out)
    show_grid(compile_grid(record))
    say_written(out)
