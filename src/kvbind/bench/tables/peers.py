"""The tables of `kvbind bench peers`."""

from __future__ import annotations

from typing import Any

from kvbind.bench.kernels.peers import HOST_SIZE
from kvbind.bench.tables.grid import Grid


def peer_grids(record: dict[str, Any]) -> list[Grid]:
    """The tables of a record: calls at the shape of a layer, then what small calls cost the host."""

    def text(x: float | None, form: str = ".3g") -> str:
        return "-" if x is None else format(x, form)

    lines, forms, host = [], [], []
    for row in record["rows"]:
        short = {"forward": "fwd", "training": "f+b"}[row["pass"]]
        if "ours_host_us" in row:
            times = [row.get(f"{who}_{what}_us") for what in ("host", "host_alone") for who in ("ours", "peer")]
            host.append((row["name"], short, *(text(x, ".0f") for x in times)))
            continue
        numbers = [row.get(f"{who}_{how}") for how in ("plain", "graph") for who in ("ours", "peer")]
        shares = [row["ratio_plain"], row["ratio_graph"], row["plain_of_graph"]]
        line = [row["name"], short, *map(text, numbers), *(text(x, ".2f") for x in shares)]
        lines.append((*line, text(row["goal"]), text(row["of_limit"], ".0%")))
        if "form_plain" in row:
            rates = [text(row.get(f"{who}_{how}")) for how in ("plain", "graph") for who in ("ours", "form")]
            factors = [text(row[f"ratio_form_{how}"], ".1f") for how in ("plain", "graph")]
            forms.append((row["name"], short, *rates, *factors))
    header = ("rung", "pass", "ours plain", "peer plain", "ours graph", "peer graph", "x plain", "x graph", "plain / graph",
              "goal", "of limit")  # fmt: skip
    note = "plain: calls from Python; graph: replays of a CUDA graph; x: ours over the peer's; of limit: ours, of replays"
    grids = [Grid("peers", "Beside compiled PyTorch, Mtok/s", header, tuple(lines), note=note)]
    if forms:
        names = ("system", "pass", "ours plain", "PyTorch plain", "ours graph", "PyTorch graph", "x plain", "x graph")
        grids.append(Grid("mini_batches", "Mini-batches beside the dual form in PyTorch, Mtok/s", names, tuple(forms)))
    if host:
        title = f"What a small call costs the host, us: {HOST_SIZE.batch} x {HOST_SIZE.tokens}, {HOST_SIZE.heads} heads of "
        columns = ("rung", "pass", "ours", "peer", "ours, one thread", "peer, one thread")
        note = "one thread: under `torch.autograd.set_multithreading_enabled(False)`"
        grids.append(Grid("host", f"{title}{HOST_SIZE.width}", columns, tuple(host), note=note))
    return grids


def short_grid(record: dict[str, Any]) -> Grid:
    """The rungs of a record alone, forward and with backward, plain calls: ours and the peer's."""
    rows = {(row["name"], row["pass"]): row for row in record["rows"] if row["name"].startswith("rung")}
    names = dict.fromkeys(name for name, _ in rows if "-" not in name)

    def cells(name: str) -> tuple[str, ...]:
        found = []
        for work in ("forward", "training"):
            row = rows[name, work]
            found += [f"{row['ours_plain']:.3g}", f"{row['peer_plain']:.3g}", f"{row['ratio_plain']:.2f}"]
        return (name.replace("rung", "rung "), *found)

    header = ("", "forward", "compiled PyTorch", "x", "with backward", "compiled PyTorch", "x")
    return Grid("short", "Calls of `ttt`, millions of tokens per second", header, tuple(map(cells, sorted(names))), left=1)
