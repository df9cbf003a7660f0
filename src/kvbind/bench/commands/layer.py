"""`kvbind bench layer`: elementwise work around an inner loop."""

from __future__ import annotations

from typing import Annotated

import typer

from kvbind.bench.options import Device, Heads, Out, Tokens, Width, open_device
from kvbind.bench.output import say_written, show_grid, write_growing


def command(
    tokens: Tokens = 16384,
    width: Width = 384,
    heads: Heads = 4,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
    seconds: Annotated[float, typer.Option(min=0.0, help="How long to time each pass, and each again as a graph.")] = 0.2,
    device: Device = "auto",
    out: Out = None,
) -> None:
    """Time the elementwise work around an inner loop, two sequences at once, with kernels and on PyTorch's operators."""
    import torch

    from kvbind.bench.harness.record import growing, provenance
    from kvbind.bench.layers.elementwise import BY, bench_layer
    from kvbind.bench.layers.operators import pieces
    from kvbind.bench.tables.layers import layer_grid

    place, found = open_device(device), pieces(tokens, heads, width)
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype not in kinds:
        raise typer.BadParameter(f"dtype must be float32 or bfloat16; got {dtype!r}")
    config = {"batch": 2, "tokens": tokens, "heads": heads, "width": width, "dtype": dtype}
    rows = bench_layer(found, kinds[dtype], place, seconds=seconds)
    about = provenance(place, ("triton",)) | {"config": config, "device": str(place)}
    record = write_growing(growing(about, len(BY) * len(found), rows), out)
    show_grid(layer_grid(record))
    say_written(out)
