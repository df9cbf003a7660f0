"""Result files of benchmarks: where the numbers come from, then the numbers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import torch

from kvbind.files import blaming, read_json, shortened
from kvbind.provenance import command, machine, versions
from kvbind.train.files import laid_out, write_text

T = TypeVar("T")

DIGITS = 8
"""Of measured numbers in a file; no table shows more."""

OUT_OF_TIME = "no time left"
"""What a row whose case had no time says under "skipped"."""


def provenance(device: torch.device, packages: tuple[str, ...] = ()) -> dict[str, Any]:
    """Command, time, machine and versions, those of `packages` included where they are installed."""
    found = versions()
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "command": command(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine(device),
        "versions": found,
    }


def resumed(path: Path, about: Mapping[str, Any], take: Callable[[list[dict[str, Any]]], T]) -> T:
    """What a command goes on with of an earlier record of its own.

    Args:
        path: of the record.
        about: `provenance` of now, under which its rows will stand.
        take: what makes use of the rows; fails where they are none.

    Raises:
        ValueError: no such record, or one of another machine or of other versions.
        OSError: a file that cannot be read.
    """
    record = read_json(path, finite=False)
    with blaming(path, "what this command wrote, to go on with"):
        if not isinstance(record, dict) or not isinstance(record.get("rows"), list):
            raise ValueError(f"it holds {shortened(record)}, no rows with their machine and versions")
        then = {**record["machine"], **record["versions"]}
        taken = take(record["rows"])
    now = {**about["machine"], **about["versions"]}
    other = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    if other:
        was, is_now = (", ".join(f"{name} {shortened(x.get(name))}" for name in other) for x in (then, now))
        raise ValueError(f"{path} must be of this machine and these versions, to go on with; it has {was}; here is {is_now}")
    return taken


def growing(
    about: Mapping[str, Any], planned: int, rows: Iterable[dict[str, Any]], kept: Iterable[dict[str, Any]] = ()
) -> Iterator[dict[str, Any]]:
    """A record as its rows come: first without them, then after each, so that what was stopped has lost nothing.

    Args:
        about: where it comes from, and what was asked for.
        planned: how many rows there are to be.
        rows: as they are measured.
        kept: those of an earlier record, which come first.

    Yields:
        The record so far, `complete` where all planned rows are `answered`.
    """
    for found in accumulate(([row] for row in rows), initial=list(kept)):
        record = {**about, "planned": planned, "complete": False, "rows": found}
        yield record | {"complete": answered(record) == planned}


def answered(record: Mapping[str, Any]) -> int:
    """How many rows of a record were measured, or say why that cannot be: all but those that had no time."""
    return sum(row.get("skipped") != OUT_OF_TIME for row in record["rows"])


def save(path: Path | None, record: dict[str, Any]) -> None:
    """Write a record as JSON, whole or not at all; nothing where there is no path."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, laid_out(rounded(record)) + "\n")


def rounded(data: Any) -> Any:
    """Plain data whose fractions have `DIGITS` digits."""
    if isinstance(data, float):
        return float(f"{data:.{DIGITS}g}")
    if isinstance(data, dict):
        return {key: rounded(value) for key, value in data.items()}
    return [rounded(value) for value in data] if isinstance(data, list | tuple) else data
