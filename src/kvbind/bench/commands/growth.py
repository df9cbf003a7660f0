"""`kvbind bench growth`: rounding by length."""

from __future__ import annotations

from dataclasses import asdict

from kvbind.bench.options import Chunk, Heads, Out, Tokens, Width
from kvbind.bench.output import show_grid, write_results


def command(
    tokens: Tokens = 6144,
    chunk: Chunk = 64,
    width: Width = 64,
    heads: Heads = 2,
    out: Out = None,
) -> None:
    """Measure how the distance between two evaluations of rungs 0, 1 and 2 grows with the length of a sequence."""
    import torch

    from kvbind.bench.harness.operands import Size
    from kvbind.bench.tables.forms import growth_grid
    from kvbind.bench.verify.growth import bench_growth

    rows = [asdict(row) for row in bench_growth(Size(1, tokens // chunk * chunk, heads, width), chunk)]
    config = {"tokens": tokens, "chunk": chunk, "heads": heads, "width": width}
    results = {"config": config, "rows": rows}
    show_grid(growth_grid(results))
    write_results(out, torch.device("cpu"), results)
