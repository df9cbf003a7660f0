"""`kvbind bench accuracy`: errors against float64."""

from __future__ import annotations

from dataclasses import asdict

from kvbind.bench.options import Chunk, Device, Heads, Out, Tokens, Width, open_device
from kvbind.bench.output import show_table, write_results


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
    from kvbind.bench.verify.accuracy import bench_accuracy, scan_errors

    place = open_device(device)
    errors = [asdict(error) for error in bench_accuracy(Size(1, tokens, heads, width), chunk, place)]
    scans = scan_errors([16, 32, 64, 128, 256, 1024], place)
    show_table(
        f"relative error against float64; T = {tokens}, chunk {chunk}, {heads} heads of width {width}",
        ("rung", "form", "operands", "Newton-Schulz", "error"),
        [(x["rung"], x["form"], x["dtype"], x["newton_schulz"] or "-", f"{x['error']:.1e}") for x in errors],
        left=4,
    )
    show_table(
        "momentum scan in float32, gates near 1/2",
        ("chunks", "by products (ours)", "by division (cumprod, cumsum)"),
        [(str(scan["chunks"]), f"{scan['by_products']:.1e}", f"{scan['by_division']:.1e}") for scan in scans],
    )
    config = {"tokens": tokens, "chunk": chunk, "heads": heads, "width": width}
    write_results(out, place, {"config": config, "errors": errors, "scan": scans})
