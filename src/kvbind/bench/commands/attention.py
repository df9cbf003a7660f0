"""`kvbind bench attention`: window attention in training."""

from __future__ import annotations

from typing import Annotated

import typer

from kvbind.bench.options import Device, Out, open_device
from kvbind.bench.output import say_written, show_table, write_growing


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

    place = open_device(device)
    config = {"tokens": tokens, "heads": heads, "width": width, "window": window}
    rows = bench_attention(tokens, heads, width, window, place, seconds=seconds)
    planned = 4 if place.type == "cuda" else 2
    record = write_growing(growing(provenance(place, ("triton",)) | {"config": config}, planned, rows), out)
    times = ("first_seconds", "forward_seconds", "training_seconds")
    lines = [(x["kernel"], str(x["ahead"]), *(f"{1e3 * x[name]:.2f}" for name in times)) for x in record["rows"]]
    header = ("kernel", "keys ahead", "first ms", "forward ms", "forward and backward ms")
    show_table(f"window attention: T = {tokens}, {heads} heads of {width}, window {window}, {place}", header, lines, left=1)
    say_written(out)
