"""`kvbind bench forms`: recurrent and parallel forms of the ladder."""

from __future__ import annotations

from typing import Annotated

import typer

from kvbind.bench.options import Batch, Chunk, Device, Heads, Out, Tokens, Width, open_device
from kvbind.bench.output import show_grid, write_results


def command(
    tokens: Tokens = 4096,
    chunk: Chunk = 256,
    width: Width = 128,
    heads: Heads = 1,
    batch: Batch = 1,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16; default float32 on a CPU, bfloat16 on a GPU.")] = "auto",
    seconds: Annotated[float, typer.Option(min=0.0, help="How long to time each rung, forward and training each.")] = 3.0,
    out: Out = None,
) -> None:
    """Time the recurrent and parallel forms of every rung of the ladder, forward and backward."""
    import torch

    from kvbind.bench.harness.operands import Size
    from kvbind.bench.kernels.forms import as_data, bench_forms
    from kvbind.bench.tables.forms import forms_grid

    place = open_device(device)
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype == "auto":
        dtype = "float32" if place.type == "cpu" else "bfloat16"
    if dtype not in kinds:
        raise typer.BadParameter(f"dtype must be float32, bfloat16 or auto; got {dtype!r}")
    size = Size(batch, tokens, heads, width)
    rows = as_data(bench_forms(size, chunk, place, kinds[dtype], seconds=seconds))
    config = {"batch": batch, "tokens": tokens, "chunk": chunk, "heads": heads, "width": width, "dtype": dtype}
    results = {"config": config, "rows": rows}
    show_grid(forms_grid(results, place))
    write_results(out, place, results)
