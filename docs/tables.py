"""Write the measured tables into the documentation: `python docs/tables.py`.

A table stands between `<!-- table: results/bench/FILE.json KEY -->` and `<!-- end -->`; it is made from that file alone.
"""

import json
import re
from pathlib import Path
from typing import Any

from kvbind.bench.kernel_tables import Grid, speed_grids, summary_grid, verify_grid

DOCS = Path(__file__).parent
BLOCK = re.compile(r"(<!-- table: (\S+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def markdown(grid: Grid) -> str:
    """A table, and below it its note."""
    lines = [f"| {' | '.join(grid.header)} |", "|" + "---|" * grid.left + "---:|" * (len(grid.header) - grid.left)]
    lines += [f"| {' | '.join(row)} |" for row in grid.rows]
    return "\n".join([f"{grid.title}:", "", *lines, *(["", f"{grid.note}."] if grid.note else [])])


def source(record: dict[str, Any], path: str) -> str:
    """Where a table's numbers come from."""
    versions = ", ".join(f"{name} {record['versions'][name]}" for name in ("torch", "triton") if name in record["versions"])
    whole = "" if record["complete"] else f" Stopped by its budget: {len(record['rows'])} of {record['planned']} rows."
    return f"`{record['command']}`, {record['machine']['device']}, {versions}; data in `{path}`.{whole}"


def ceilings(record: dict[str, Any]) -> str:
    """The limits that a run measured, in a sentence."""
    found = record["ceilings"]
    return (
        f"Ceilings measured in the same run: {found['matmul_flops'] / 1e12:.0f} TFLOP/s in a {found['matmul_size']}^3 "
        f"product of {found['dtype']}, {found['copy_bytes'] / 1e12:.2f} TB/s in a copy."
    )


def pictures(record: dict[str, Any], path: str) -> str:
    """What `docs/figures.py` draws from a record of `kvbind bench kernels`."""
    titles = {"lengths": "the number of tokens", "chunks": "the chunk", "widths": "the width of a head"}
    drawn = [f"![Speed by {title}](images/kernels-{part}.png)" for part, title in titles.items() if part in parts(record)]
    return "\n".join([*drawn, f"*Drawn by `python docs/figures.py` from `{path}`: `{record['command']}`.*"])


def parts(record: dict[str, Any]) -> set[str]:
    """The parts of the benchmark that a record has rows of."""
    return {row["what"] for row in record["rows"]}


def table(path: str, key: str, root: Path) -> str:
    """The text of one block.

    Raises:
        ValueError: the file has no such table.
    """
    if not (root / path).is_file():
        return f"*Not measured yet: `{path}` is not there.*"
    record = json.loads((root / path).read_text(encoding="utf-8"))
    if key == "ceilings":
        return ceilings(record)
    if key == "pictures":
        return pictures(record, path)
    checks = "rules" in record
    grids = {grid.key: grid for grid in ([verify_grid(record), summary_grid(record)] if checks else speed_grids(record))}
    if key not in grids:
        raise ValueError(f"{path} has no table {key!r}; it has {', '.join(grids)}")
    return f"{markdown(grids[key])}\n\n{source(record, path)}"


def fill(text: str, root: Path) -> str:
    """A page with every block made anew."""
    return BLOCK.sub(lambda block: f"{block[1]}{table(block[2], block[3], root)}\n{block[4]}", text)


if __name__ == "__main__":
    for page in sorted(DOCS.glob("*.md")):
        old = page.read_text(encoding="utf-8")
        if (new := fill(old, DOCS.parent)) != old:
            page.write_text(new, encoding="utf-8")
