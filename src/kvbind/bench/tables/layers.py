"""The tables of `kvbind bench layer`, `attention` and `step`, as texts: for a terminal and for the documentation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvbind.bench.harness.profiler import short
from kvbind.bench.tables.grid import Grid

LEAST_SHARE = 0.02
"""Of a step's time, for a kernel to be listed."""


def layer_grid(record: Mapping[str, Any]) -> Grid:
    """The table of a record of `kvbind bench layer`: kernels and PyTorch's operators side by side."""
    config, found = record["config"], {(row["piece"], row["by"]): row for row in record["rows"]}
    header = ("", *(f"{x} {by}" for x in ("fwd us", "f+b us") for by in ("kernels", "PyTorch")), "fwd TB/s", "f+b TB/s")
    lines = []
    for piece in dict.fromkeys(piece for piece, _ in found):
        ours, theirs = (found.get((piece, by)) for by in ("kernels", "PyTorch"))
        rates = (
            [f"{ours[f'{x}_bytes'] / _seconds(ours, x) / 1e12:.2f}" for x in ("forward", "training")] if ours else ["-"] * 2
        )
        times = [f"{1e6 * _seconds(row, x):.0f}" if row else "-" for x in ("forward", "training") for row in (ours, theirs)]
        lines.append((piece, *times, *rates))
    at = f"{config['dtype']}, batch {config['batch']}, {config['heads']} heads x {config['width']}, T = {config['tokens']}"
    note = (
        "Replays of CUDA graphs where there are, plain calls elsewhere; TB/s: of the kernels, by what they must read and "
        "write: operands and results forward, and backward operands and gradients of both"
    )
    return Grid("layer", f"Elementwise work of a layer; {at}", header, tuple(lines), left=1, note=note)


def _seconds(row: Mapping[str, Any], name: str) -> float:
    timed = row[name]
    return float(timed["graph_seconds"] or timed["seconds"])


def step_grids(record: Mapping[str, Any]) -> list[Grid]:
    """The tables of a record of `kvbind bench step`: speeds, and what a step's time goes to where that was asked."""
    config, device = record["config"], record["device"]
    lines = []
    for row in record["rows"]:
        peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.2f}"
        lines.append((row["rung"], row["form"], f"{row['tokens_per_second']:.0f}", peak))
    title = f"training step of {config['preset']} at {config['tokens']} tokens, {device}"
    grids = [Grid("step", title, ("rung", "form", "tokens/s", "peak GiB"), tuple(lines))]
    if any(row.get("profile") for row in record["rows"]):
        grids.append(_spent(record))
    return grids


def _spent(record: Mapping[str, Any]) -> Grid:
    lines: list[tuple[str, ...]] = []
    for row in record["rows"]:
        spent = row.get("profile")
        if not spent:
            continue
        lines.append((row["rung"], "all", f"{spent['launches']:.0f}", f"{spent['device_ms']:.0f}", "100%"))
        lines += [
            (row["rung"], short(x["name"]).strip("_"), f"{x['launches']:.0f}", f"{x['ms']:.0f}", f"{x['share']:.0%}")
            for x in spent["kernels"]
            if x["share"] >= LEAST_SHARE
        ]
    note = f"Of one step, summed over launches; kernels of at least {LEAST_SHARE:.0%}"
    return Grid("profile", "Time on the device", ("rung", "kernel", "launches", "ms", "share"), tuple(lines), note=note)


def attention_grid(record: Mapping[str, Any], place: object) -> Grid:
    """The table of `kvbind bench attention`.

    Args:
        record: with `config` and `rows`.
        place: the device, for the title.
    """
    config, times = record["config"], ("first_seconds", "forward_seconds", "training_seconds")
    return Grid(
        "attention",
        f"window attention: T = {config['tokens']}, {config['heads']} heads of {config['width']}, window "
        f"{config['window']}, {place}",
        ("kernel", "keys ahead", "first ms", "forward ms", "forward and backward ms"),
        tuple((x["kernel"], str(x["ahead"]), *(f"{1e3 * x[name]:.2f}" for name in times)) for x in record["rows"]),
        left=1,
    )
