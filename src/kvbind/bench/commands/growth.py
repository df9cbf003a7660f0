"""`kvbind bench growth`: rounding by length."""

from __future__ import annotations

from dataclasses import asdict

from kvbind.bench.options import Chunk, Heads, Out, Tokens, Width
from kvbind.bench.output import show_table, write_results


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
    from kvbind.bench.verify.growth import bench_growth

    rows = [asdict(row) for row in bench_growth(Size(1, tokens // chunk * chunk, heads, width), chunk)]
    places = [2**i for i in range(tokens // chunk) if 2**i < tokens // chunk]
    show_table(
        f"relative distance from float64 in the n-th chunk of {chunk} tokens, {heads} heads of width {width}",
        ("rung", "evaluation", *map(str, places), "per chunk", "seconds"),
        [
            (
                x["rung"],
                x["evaluation"],
                *(f"{x['errors'][i]:.0e}" for i in places),
                f"{x['per_chunk']:.2f}",
                f"{x['seconds']:.2f}",
            )
            for x in rows
        ],
        left=2,
    )
    config = {"tokens": tokens, "chunk": chunk, "heads": heads, "width": width}
    write_results(out, torch.device("cpu"), {"config": config, "rows": rows})
