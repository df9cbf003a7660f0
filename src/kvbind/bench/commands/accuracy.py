"""`kvbind bench accuracy`: errors against float64."""

from __future__ import annotations

from dataclasses import asdict

from kvbind.bench.options import Chunk, Device, Heads, Out, Tokens, Width, open_device
from kvbind.bench.output import show_grid, write_results


def command(
    tokens: Tokens = 1024,
    chunk: Chunk = 64,
    width: Width = 64,
    heads: Heads = 2,
    device: Device = "auto",
    out: Out = None,
) -> None:
    """Measure the error of every rung and form in float32 and bfloat16 against float64."""
    from kvbind.bench.harness.operands import Size
    from kvbind.bench.tables.forms import accuracy_grids
    from kvbind.bench.verify.accuracy import bench_accuracy, scan_errors

    place = open_device(device)
    errors = [asdict(error) for error in bench_accuracy(Size(1, tokens, heads, width), chunk, place)]
    scans = scan_errors([16, 32, 64, 128, 256, 1024], place)
    config = {"tokens": tokens, "chunk": chunk, "heads": heads, "width": width}
    results = {"config": config, "errors": errors, "scan": scans}
    for grid in accuracy_grids(results):
        show_grid(grid)
    write_results(out, place, results)
