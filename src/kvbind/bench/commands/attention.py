"""`kvbind bench attention`: window attention in training."""

from __future__ import annotations

from typing import Annotated

import typer

from kvbind.bench.options import Device, Out, open_device
from kvbind.bench.output import say_written, show_grid, write_growing


def command(
    tokens: Annotated[int, typer.Option(min=1, help="Tokens in the row.")] = 65536,
    heads: Annotated[int, typer.Option(min=1, help="Heads.")] = 24,
    width: Annotated[int, typer.Option(min=1, help="Width of a head.")] = 64,
    window: Annotated[int, typer.Option(min=1, help="Tokens that a token sees.")] = 2048,
    seconds: Annotated[float, typer.Option(min=0.0, help="How long to time each way.")] = 1.0,
    device: Device = "auto",
    out: Out = None,
) -> None:
    """Time window attention in training: compiled for its length or for any, and with keys of another rank ahead."""
    from kvbind.bench.harness.record import growing, provenance
    from kvbind.bench.layers.window_attention import bench_attention
    from kvbind.bench.tables.layers import attention_grid

    place = open_device(device)
    config = {"tokens": tokens, "heads": heads, "width": width, "window": window}
    rows = bench_attention(tokens, heads, width, window, place, seconds=seconds)
    planned = 4 if place.type == "cuda" else 2
    record = write_growing(growing(provenance(place, ("triton",)) | {"config": config}, planned, rows), out)
    show_grid(attention_grid(record, place))
    say_written(out)
