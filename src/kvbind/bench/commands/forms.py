"""`kvbind bench forms`: recurrent and parallel forms of the ladder."""

from __future__ import annotations

from typing import Annotated

import typer

from kvbind.bench.options import Batch, Chunk, Device, Heads, Out, Tokens, Width, open_device
from kvbind.bench.output import show_table, write_results


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

    place = open_device(device)
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype == "auto":
        dtype = "float32" if place.type == "cpu" else "bfloat16"
    if dtype not in kinds:
        raise typer.BadParameter(f"dtype must be float32, bfloat16 or auto; got {dtype!r}")
    size = Size(batch, tokens, heads, width)
    rows = as_data(bench_forms(size, chunk, place, kinds[dtype], seconds=seconds))

    title = f"{dtype} on {place}: T = {tokens}, chunk {chunk}, {batch} x {heads} heads of width {width}"
    note = "ktok/s of the recurrent (rec) and the parallel form (par), and par / rec; peak MiB of training"
    header = ("rung", "fwd rec", "fwd par", "x", "train rec", "train par", "x", "MiB rec", "MiB par")
    lines = []
    by_form = {(row["rung"], row["form"]): row for row in rows}
    for rung in dict.fromkeys(row["rung"] for row in rows):
        recurrent, parallel = by_form[rung, "recurrent"], by_form.get((rung, "parallel"))
        cells = [rung]
        for work in ("forward", "training"):
            cells.append(f"{recurrent[work] / 1e3:.0f}")
            cells += [f"{parallel[work] / 1e3:.0f}", f"{parallel[f'{work}_over_recurrent']:.2f}"] if parallel else ["-", "-"]
        cells.append(f"{recurrent['training_bytes'] / 2**20:.0f}")
        cells.append(f"{parallel['training_bytes'] / 2**20:.0f}" if parallel else "-")
        lines.append(cells)
    show_table(title, header, lines, left=1, note=note)
    config = {"batch": batch, "tokens": tokens, "chunk": chunk, "heads": heads, "width": width, "dtype": dtype}
    write_results(out, place, {"config": config, "rows": rows})
