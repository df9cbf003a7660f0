"""The table of `kvbind bench decode`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvbind.bench.tables.grid import Grid


def decoding_rows(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a record of `kvbind bench decode`; those of before graphs, which had other names, under today's."""
    rows = []
    for row in record["rows"]:
        if "token_seconds" in row:
            old = {"batch": 1, "graphs": False, "p50_ms": 1e3 * row["token_seconds"], "p99_ms": None}
            # each token was waited for
            old |= {"slowest_ms": 1e3 * row["slowest_token_seconds"], "tokens_per_second": None}
            rows.append({**row, **old, "tokens": record["config"]["tokens"]})
        else:
            rows.append(dict(row))
    return rows


def decoding_grid(record: Mapping[str, Any]) -> Grid:
    """The table of a record of `kvbind bench decode`."""

    def text(x: float | None, form: str) -> str:
        return "-" if x is None else format(x, form)

    rows = decoding_rows(record)
    by_system = any("system" in row for row in rows)
    lines = [
        (
            *((row["system"],) if by_system else ()), f"{row['batch']} x {row['prompt']}", "on" if row["graphs"] else "off",
            *(text(row[name], ".2f") for name in ("p50_ms", "p99_ms", "slowest_ms")), str(row["tokens"]),
            text(row["tokens_per_second"], ",.0f"), f"{row['prefill_seconds']:.2f}",
            text(None if row["reread_seconds"] is None else 1e3 * row["reread_seconds"], ".1f"),
            f"{row['cache_bytes'] / row['batch'] / 2**20:.2f}",
            *((f"{row['state_bytes'] / row['batch'] / 2**20:.3f}",) if by_system else ()),
        )
        for row in rows
    ]  # fmt: skip
    header: tuple[str, ...] = ("prompt", "graphs", "p50 ms", "p99 ms", "slowest ms", "of tokens", "tokens/s", "prefill s",
              "prompt read again ms", "cache MiB")  # fmt: skip
    note = "ms: of tokens that are each waited for; tokens/s: of tokens that are not; cache: of one sequence"
    if by_system:
        header = ("system", *header, "state MiB")
        note += "; state: of its fast weights, of all layers"
    config = record["config"]
    reads = f", fast weights read in {config['decode_dtype']}" if "decode_dtype" in config else ""
    return Grid("decode", f"Decoding, {config['preset']}, {config['dtype']}{reads}, greedy", header, tuple(lines), note=note)
