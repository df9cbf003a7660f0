"""The agreement table: how far the loops, others' code and the library are from each other, in float64 on the CPU.

python tests/systems/agreement.py --out results/agreement-cpu.json --repositories DIR

It runs what is installed, and with `--repositories` what is released as clones at DIR/OWNER/NAME, whose code it executes;
rows that could not run say why. It stands among the tests and is no command of the library, as the loops that everything is
held against are the tests' own: a definition that ships with what it defines would be no witness.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import by_kvbind
import comparing
import loops
import public_code
import repositories
import torch
from loops import Source

from kvbind.bench.harness.record import growing, provenance, save

PACKAGES = ("fla-core", "titans-pytorch", "assoc-scan", "tensordict", "einops", "triton")
SEED = 3


def apart(found: comparing.Run, expected: comparing.Run, operands: Any) -> dict[str, Any]:
    difference = asdict(comparing.difference(found, expected, operands))
    return {name: x for name, x in difference.items() if x is not None}


def public_rows() -> Iterator[dict[str, Any]]:
    """Loops beside installed packages."""
    for c in public_code.COMPARISONS:
        row = {
            "what": "loop",
            "system": c.name,
            "against": c.package,
            "function": c.function,
            "dtype": "float64",
            "note": c.note,
        }
        missing = c.missing()
        if missing:
            yield row | {"skipped": missing}
        else:
            row["against"] = f"{c.package} {version(c.package)}"
            yield row | apart(c.theirs, c.ours, c.draw(Source(SEED)))


def released_rows(root: Path | None) -> Iterator[dict[str, Any]]:
    """Loops beside clones of repositories."""
    for c in repositories.RELEASED:
        against = f"{c.repository.name}@{c.repository.commit[:7]}"
        row = {
            "what": "loop",
            "system": c.name,
            "against": against,
            "function": c.function,
            "dtype": "float64",
            "note": c.note,
        }
        if root is None or not (root / c.repository.name).exists():
            yield row | {"skipped": f"no clone of {c.repository.name}"}
        else:
            theirs, ours, draw = c.sides(root)
            yield row | apart(theirs, ours, draw(Source(SEED)))


def library_rows() -> Iterator[dict[str, Any]]:
    """The library beside the loops, in each of its forms."""
    for system in loops.SYSTEMS:
        adapter = by_kvbind.adapter(system)
        for form in by_kvbind.FORMS:
            row = {"what": "kvbind", "system": system.name, "against": "loop", "function": f"kvbind.systems.{adapter.name}"}
            row |= {"form": form, "dtype": "float64"}
            missing = adapter.missing()
            if missing:
                yield row | {"skipped": missing}
                continue
            try:
                yield row | apart(adapter.run(system, form=form), system.run, system.draw(Source(SEED)))
            except Exception as error:  # a table says what does not work, too
                yield row | {"skipped": f"{form} failed: {type(error).__name__}: {error}", "failed": True}


def shown(row: dict[str, Any]) -> str:
    numbers = " ".join(f"{name} {row[name]:.0e}" for name in ("output", "state", "gradients") if name in row)
    return f"{row['system']}: {row['against']} {row['function']}: {row.get('skipped', numbers)}"


def main() -> int:
    parser = argparse.ArgumentParser(description="How far loops, public code and the library are from each other.")
    parser.add_argument("--out", type=Path, help="a JSON file to write results, machine, versions and command to")
    parser.add_argument("--repositories", type=Path, help="a folder of clones, OWNER/NAME, whose code is run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")

    planned = len(public_code.COMPARISONS) + len(repositories.RELEASED) + len(by_kvbind.FORMS) * len(loops.SYSTEMS)
    about = {**provenance(torch.device("cpu"), PACKAGES), "config": {"seed": SEED}}
    rows = (row for part in (public_rows(), released_rows(options.repositories), library_rows()) for row in part)
    try:
        for record in growing(about, planned, rows):
            save(options.out, record)
            if record["rows"]:
                print(shown(record["rows"][-1]), flush=True)
    except subprocess.CalledProcessError as error:
        sys.exit(f"--repositories: {error.stderr.strip() or error}")
    return int(any("failed" in row for row in record["rows"]))


if __name__ == "__main__":
    raise SystemExit(main())
