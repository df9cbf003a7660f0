"""The table of `kvbind bench graphs`, and a line for each of its rows."""

from __future__ import annotations

from typing import Any

from kvbind.bench.tables.grid import Grid


def step_grid(record: dict[str, Any]) -> Grid:
    """Speed of replayed and of eager steps, seconds of a capture, and peak memory."""

    def cells(row: dict[str, Any]) -> tuple[str, ...]:
        on, off = row["on"], row.get("off") or {}
        eager = off.get("per_second")
        return (
            row["name"], row["unit"], f"{on['per_second']:,.0f}", "-" if eager is None else f"{eager:,.0f}",
            "-" if eager is None else f"{on['per_second'] / eager:.2f}", f"{on['capture_seconds']:.1f}",
            f"{on['peak_bytes'] / 2**30:.1f}",
        )  # fmt: skip

    header = ("model", "unit", "replayed /s", "eager /s", "x", "capture s", "peak GiB")
    rows = tuple(cells(row) for row in record["rows"] if "per_second" in row.get("on", {}))
    return Grid("steps", "Training steps as CUDA graphs and eager, bfloat16 autocast, AdamW", header, rows)
