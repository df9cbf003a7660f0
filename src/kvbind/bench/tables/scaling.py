"""Tables of a record of `kvbind bench scaling`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from kvbind.bench.tables.grid import Grid
from kvbind.hardware import peak_flops

Row = Mapping[str, Any]


def scaling_grids(record: Mapping[str, Any]) -> list[Grid]:
    """The tables of the parts that a record has rows of: "fsdp", "sequence", "equality", and "skipped"."""
    rows, config, found = record["rows"], record["config"], []
    of = f"{config['preset']}, {config['rung'].replace('rung', 'rung ')}, {config['form']} form"
    peak = peak_flops(record["machine"]["device"])
    titles = {
        "fsdp": f"One sequence of {config['fsdp_length']:,} tokens on each GPU, weights in shards ({of})",
        "sequence": f"One sequence cut over all GPUs ({of})",
    }
    for what, title in titles.items():
        chosen = [row for row in rows if row["what"] == what and "tokens_per_second" in row]
        if chosen:
            cells = [speed_cells(row, chosen, peak) for row in sorted(chosen, key=lambda r: (r["length"], r["gpus"]))]
            found.append(Grid(what, title, SPEED_HEADER, tuple(cells), left=0))
    if found:
        found[-1] = replace(found[-1], note=SPEED_NOTE)
    if record.get("equality"):
        cells = [
            (
                "sequence" if one["mesh"]["sequence"] > 1 else "fsdp",
                str(one["gpus"]),
                str(one["steps"]),
                f"{one['largest']:.1e}",
            )
            for one in record["equality"]
        ]
        title = (
            f"Losses of several GPUs beside those of one ({config['equality_preset']}, {config['equality_length']:,} tokens)"
        )
        found.append(Grid("equality", title, ("cut", "GPUs", "steps", "largest relative difference"), tuple(cells), left=1))
    skipped = [row for row in rows if "skipped" in row]
    if skipped:
        cells = [(row["what"], row["skipped"], str(row["gpus"]), f"{row['length']:,}") for row in skipped]
        found.append(Grid("skipped", "Not measured", ("what", "why", "GPUs", "tokens"), tuple(cells), left=2))
    return found


SPEED_HEADER = (
    "tokens", "GPUs", "tokens/s", "tokens/s/GPU", "of linear", "MFU", "GiB", "communicating", "exposed", "MB per layer",
)  # fmt: skip

SPEED_NOTE = (
    "GiB: the fullest GPU's peak. Of linear: per GPU, against the fewest GPUs that ran this. Communicating: the part of a "
    "step in which the first GPU runs a collective; exposed: in which it runs nothing else. MB per layer: what a GPU "
    "receives for the sequence, forward, again forward where blocks are recomputed, and backward"
)


def speed_cells(row: Row, rows: Sequence[Row], peak: float | None) -> tuple[str, ...]:
    """One row under `SPEED_HEADER`."""
    share, sent = row.get("communication"), row.get("sequence_bytes")
    return (
        f"{row['length']:,}",
        str(row["gpus"]),
        f"{row['tokens_per_second']:,.0f}",
        f"{row['tokens_per_second'] / row['gpus']:,.0f}",
        f"{of_linear(row, rows):.1%}",
        f"{row['flops_per_second_per_gpu'] / peak:.1%}" if peak else "-",
        f"{row['peak_bytes'] / 2**30:.1f}" if row["peak_bytes"] is not None else "-",
        f"{share['busy']:.1%}" if share else "-",
        f"{share['exposed']:.1%}" if share else "-",
        f"{sum(sent['received_per_layer'].values()) / 1e6:.1f}" if sent else "-",
    )


def of_linear(row: Row, rows: Sequence[Row]) -> float:
    """Tokens per second and GPU, over those of the fewest GPUs among `rows` that ran the same length."""
    base = min((r for r in rows if r["length"] == row["length"]), key=lambda r: int(r["gpus"]))
    ratio: float = row["tokens_per_second"] / row["gpus"] / (base["tokens_per_second"] / base["gpus"])
    return ratio
