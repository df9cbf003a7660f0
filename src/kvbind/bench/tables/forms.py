"""The tables of `kvbind bench forms`, `accuracy`, `growth` and `compile`: forms of an inner loop beside one another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvbind.bench.tables.grid import Grid


def forms_grid(record: Mapping[str, Any], place: object) -> Grid:
    """The table of `kvbind bench forms`.

    Args:
        record: with `config` and `rows`.
        place: the device, for the title.
    """
    config, lines = record["config"], []
    by_form = {(row["rung"], row["form"]): row for row in record["rows"]}
    for rung in dict.fromkeys(row["rung"] for row in record["rows"]):
        recurrent, parallel = by_form[rung, "recurrent"], by_form.get((rung, "parallel"))
        cells = [rung]
        for work in ("forward", "training"):
            cells.append(f"{recurrent[work] / 1e3:.0f}")
            cells += [f"{parallel[work] / 1e3:.0f}", f"{parallel[f'{work}_over_recurrent']:.2f}"] if parallel else ["-", "-"]
        cells.append(f"{recurrent['training_bytes'] / 2**20:.0f}")
        cells.append(f"{parallel['training_bytes'] / 2**20:.0f}" if parallel else "-")
        lines.append(tuple(cells))
    return Grid(
        "forms",
        f"{config['dtype']} on {place}: T = {config['tokens']}, chunk {config['chunk']}, {config['batch']} x "
        f"{config['heads']} heads of width {config['width']}",
        ("rung", "fwd rec", "fwd par", "x", "train rec", "train par", "x", "MiB rec", "MiB par"),
        tuple(lines),
        left=1,
        note="ktok/s of the recurrent (rec) and the parallel form (par), and par / rec; peak MiB of training",
    )


def accuracy_grids(record: Mapping[str, Any]) -> list[Grid]:
    """The tables of `kvbind bench accuracy`: errors of forms, and of the momentum scan."""
    config = record["config"]
    at = f"T = {config['tokens']}, chunk {config['chunk']}, {config['heads']} heads of width {config['width']}"
    errors = Grid(
        "errors",
        f"relative error against float64; {at}",
        ("rung", "form", "operands", "Newton-Schulz", "error"),
        tuple((x["rung"], x["form"], x["dtype"], x["newton_schulz"] or "-", f"{x['error']:.1e}") for x in record["errors"]),
        left=4,
    )
    scan = Grid(
        "scan",
        "momentum scan in float32, gates near 1/2",
        ("chunks", "by products (ours)", "by division (cumprod, cumsum)"),
        tuple((str(x["chunks"]), f"{x['by_products']:.1e}", f"{x['by_division']:.1e}") for x in record["scan"]),
        left=0,
    )
    return [errors, scan]


def growth_grid(record: Mapping[str, Any]) -> Grid:
    """The table of `kvbind bench growth`: errors in chunks 1, 2, 4 and so on, and their factor from chunk to chunk."""
    config = record["config"]
    chunks = config["tokens"] // config["chunk"]
    places = [2**i for i in range(chunks) if 2**i < chunks]
    return Grid(
        "growth",
        f"relative distance from float64 in the n-th chunk of {config['chunk']} tokens, {config['heads']} heads of width "
        f"{config['width']}",
        ("rung", "evaluation", *map(str, places), "per chunk", "seconds"),
        tuple(
            (
                x["rung"],
                x["evaluation"],
                *(f"{x['errors'][i]:.0e}" for i in places),
                f"{x['per_chunk']:.2f}",
                f"{x['seconds']:.2f}",
            )
            for x in record["rows"]
        ),
    )


def compile_grid(record: Mapping[str, Any]) -> Grid:
    """The table of `kvbind bench compile`: seconds, and what was compiled, or why nothing was."""
    config, times = record["config"], ("first_seconds", "processor_seconds", "again_seconds", "new_length_seconds")
    return Grid(
        "compile",
        f"a training step of {config['layers']} layers of width {config['width']}, T = {config['tokens']}, "
        f"{config['device']}",
        ("rung", "compiled", "first s", "processor s", "again s", "new length s", "graphs", "nodes"),
        tuple(
            (x["rung"], x["way"], x["error"], *["-"] * 5)
            if "error" in x
            else (x["rung"], x["way"], *(f"{x[name]:.2f}" for name in times), str(x["graphs"]), str(x["nodes"]))
            for x in record["rows"]
        ),
    )
