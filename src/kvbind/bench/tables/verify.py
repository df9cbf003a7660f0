"""The tables of `kvbind bench verify`, as texts: for a terminal and for the documentation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvbind.bench.tables.grid import Grid, Row


def verify_grid(record: Mapping[str, Any]) -> Grid:
    """The table of a record of `kvbind bench verify`."""
    header = ("case", "operands", "by", "output", "state", "gradients", "of", "/ PyTorch", "")
    lines = []
    for row in record["rows"]:
        result = "PASS" if row["passed"] else "FAIL"
        if "errors" not in row:
            lines.append((row["case"], row["dtype"], "-", *["-"] * 5, result))
            continue
        ours = row["errors"]
        worst = max(ours["gradients"], key=ours["gradients"].__getitem__)
        lines.append(
            (
                row["case"],
                row["dtype"],
                "kernels" if row["operators"] else "PyTorch",
                f"{ours['output']:.1e}",
                f"{ours['state']:.1e}",
                f"{ours['gradients'][worst]:.1e}",
                worst,
                f"{_over_pytorch(row):.2f}",
                result,
            )
        )
    failed = [row for row in record["rows"] if not row["passed"]]
    said = [f"{row['case']}, {row['dtype']}: {'; '.join(row['problems'])}" for row in failed]
    title = "Relative errors in norm against the PyTorch form in float64 on the same operands"
    said.insert(
        0,
        "gradients: the largest error of any, and whose it is; / PyTorch: output's or that gradient's over PyTorch's own in "
        "that precision",
    )
    return Grid("verify", title, header, tuple(lines), left=3, note="\n".join(said))


def promises_grid(record: Mapping[str, Any]) -> Grid:
    """The table of a record of `kvbind bench verify --what models`."""
    header, lines = ("promise", "seconds", "found", ""), []
    for row in record["rows"]:
        found = ", ".join(f"{name} {x:.2g}" for name, x in row.get("found", {}).items())
        said = "; ".join(row["problems"]) if row["problems"] else found
        lines.append((row["case"], f"{row.get('seconds', 0):.1f}", said, "PASS" if row["passed"] else "FAIL"))
    kept = sum(row["passed"] for row in record["rows"])
    title = f"{kept} of {record['planned']} promises kept"
    return Grid("promises", title, header, tuple(lines), left=1, note=record["rules"])


def _over_pytorch(row: Row) -> float:
    """The error of the output or of the worst gradient, whichever is larger, in units of PyTorch's own.

    Records of before the field had its name call it "twin_errors".
    """
    ours, own = row["errors"], row.get("pytorch_errors") or row["twin_errors"]
    worst = max(ours["gradients"], key=ours["gradients"].__getitem__)
    pairs = (ours["output"], own["output"]), (ours["gradients"][worst], own["gradients"][worst])
    return max((x / y for x, y in pairs if y > 0), default=float("nan"))


def summary_grid(record: Mapping[str, Any]) -> Grid:
    """The worst of a record of `kvbind bench verify`, by dtype and by whether updates are orthogonalized."""
    header = (
        "operands",
        "Newton-Schulz",
        "cases",
        "on kernels",
        "failed",
        "output",
        "state",
        "gradients",
        "/ PyTorch",
    )
    lines = []
    kinds = dict.fromkeys((row["dtype"], row["newton_schulz"]) for row in record["rows"])
    for dtype, shaped in kinds:
        rows = [row for row in record["rows"] if (row["dtype"], row["newton_schulz"]) == (dtype, shaped)]
        measured = [row for row in rows if "errors" in row]
        errors = [row["errors"] for row in measured]
        lines.append(
            (
                dtype,
                "with" if shaped else "without",
                f"{len(rows)}",
                f"{sum(bool(row['operators']) for row in measured)}",
                f"{sum(not row['passed'] for row in rows)}",
                *(f"{max((e[name] for e in errors), default=float('nan')):.1e}" for name in ("output", "state")),
                f"{max((max(e['gradients'].values()) for e in errors), default=float('nan')):.1e}",
                f"{max(map(_over_pytorch, measured), default=float('nan')):.2f}",
            )
        )
    note = "the largest relative error of any case; / PyTorch: the largest quotient of one and PyTorch's own there"
    return Grid("summary", "Errors against float64", header, tuple(lines), note=note)
