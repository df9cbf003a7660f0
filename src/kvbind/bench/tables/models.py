"""The tables of `kvbind bench models`, `views` and `vision`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvbind.bench.tables.grid import Grid


def model_grids(record: Mapping[str, Any]) -> list[Grid]:
    """The tables of a record: all rows, and what decoding is like."""

    def text(x: float | None, form: str) -> str:
        return "-" if x is None else format(x, form)

    def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
        number = ",.0f" if row["higher_is_better"] else ".2f"
        peer = "-" if row["peer"] is None else f"{row['peer']:{number}}"
        memory = None if row["peak_bytes"] is None else row["peak_bytes"] / 2**30
        return (
            row["name"], row["unit"], row["peer_name"] + (f" ({row['peer_by']})" if row["peer_by"] else ""),
            text(row["ours"], number), peer, text(row["ratio"], ".2f"), text(row["graphs_off"], number),
            text(row["mfu"], ".1%"), text(memory, ".1f"), text(row["first_seconds"], ".1f"),
        )  # fmt: skip

    header = ("row", "unit", "peer, its best", "ours", "peer", "x", "ours without graphs", "MFU", "GiB", "first s")
    note = (
        "x: how many times better ours is; ours: with CUDA graphs or without, whichever is faster; MFU: of the datasheet's "
        "dense bfloat16 rate; GiB: the most held in a step; first s: the first step, or the first token and its capture"
    )
    title = "Training (AdamW, bfloat16 autocast) and decoding, beside softmax attention"
    rows = record["rows"]
    grids = [Grid("models", title, header, tuple(map(cells, rows)), left=3, note=note)]
    lines = []
    for row in rows:
        if row["part"] != "decode":
            continue
        for side, called in (("ours", "LaCT, rung 2"), ("beside", "LaCT"), ("peer", "Llama")):
            for way, x in row[f"{side}_ways"].items():
                if "value" not in x:
                    continue
                batch = round(x["tokens_per_second"] * x["queued_ms"] / 1e3)
                lines.append((
                    f"{called}, {way}", f"{batch} x {x['prompt']}", *(f"{x[name]:.2f}" for name in ("p50_ms", "p99_ms")),
                    f"{x['slowest_ms']:.1f}", str(x["tokens"]), f"{x['tokens_per_second']:,.0f}",
                    f"{x['prefill_seconds']:.2f}", f"{x['cache_bytes'] / batch / 2**20:,.0f}", f"{x['first_seconds']:.2f}",
                ))  # fmt: skip
    if lines:
        header = ("model", "prompt", "p50 ms", "p99 ms", "slowest ms", "of tokens", "tokens/s", "prefill s", "cache MiB",
                  "first s")  # fmt: skip
        note = "ms: of tokens that are each waited for; tokens/s: of tokens that are not; cache: of one sequence"
        grids.append(Grid("decoding", "Decoding, bfloat16, greedy", header, tuple(lines), note=note))
    return grids


def views_grid(record: Mapping[str, Any], place: object) -> Grid:
    """The table of `kvbind bench views`.

    Args:
        record: with `config` and `rows`.
        place: the device, for the title.
    """
    config = record["config"]
    lines = [
        (
            row["model"],
            str(row["views"]),
            f"{row['read_seconds']:.3f}" if row["fits"] else "does not fit",
            f"{row['frames_per_second']:.1f}" if row["fits"] else "-",
            *(f"{row[name] / 2**30:.2f}" if row["fits"] else "-" for name in ("read_bytes", "render_bytes")),
            f"{row['scene_bytes'] / 2**20:.1f}" if row["fits"] else "-",
        )
        for row in record["rows"]
    ]
    header = ("model", "views", "read s", "frames/s", "read GiB", "render GiB", "scene MiB")
    title = f"{config['preset']}, {config['size']} x {config['size']} pixels, {place}"
    return Grid("views", title, header, tuple(lines), left=1)


def vision_grid(rows: Sequence[Mapping[str, Any]], place: object) -> Grid:
    """The table of `kvbind bench vision`.

    Args:
        rows: of a record.
        place: the device, for the title.
    """
    lines = []
    for row in rows:
        speeds = [f"{row[name]:.1f}" for name in ("forward", "training")]
        memory = [f"{row[name] / 2**20:.1f}" for name in ("forward_bytes", "training_bytes")]
        lines.append((row["model"], str(row["size"]), str(row["batch"]), *speeds, *memory))
    header = ("model", "size", "batch", "forward", "training", "forward MiB", "training MiB")
    return Grid("vision", f"images per second and memory per image, {place}", header, tuple(lines), left=1)
