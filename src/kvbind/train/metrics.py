"""A run's numbers as they come: one JSON object per line, and TensorBoard's event files where asked for."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kvbind.train.files import about, from_json, open_own, to_json, write_text

FILE = "metrics.jsonl"

log = logging.getLogger("kvbind.train")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """What a run has written so far; a line that is none is left out, and reported unless a kill has cut it short."""
    path = folder / FILE
    if not path.is_file():
        return []
    rows, broken = [], []
    lines = path.read_bytes().split(b"\n")  # behind the last end of a line is nothing, or what a kill has left
    for number, line in enumerate(lines, start=1):
        row = row_of(line)
        if row is not None:
            rows.append(row)
        elif number < len(lines):
            broken.append(number)
    if broken:
        log.warning("%s: left out what cannot be read, line %s", path, spans(broken))
    return rows


def row_of(line: bytes) -> dict[str, Any] | None:
    """The row that a line holds, or None."""
    try:
        row = from_json(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def lacking(rows: Iterable[dict[str, Any]], steps: int) -> list[int]:
    """The steps of the first `steps` of which rows do not have the loss."""
    return sorted(set(range(1, steps + 1)) - {row["step"] for row in rows if "loss" in row})


def spans(numbers: Iterable[int]) -> str:
    """Ascending numbers for people: 3, 5 to 9."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a} to {b}" for a, b in found)


class Metrics:
    """Appends to a run's metrics.

    Args:
        folder: of the run.
        step: optimizer steps of the checkpoint that the run goes on from. What was written after it is dropped: those
            steps are taken again. Steps before it that the file lacks are reported.
        tensorboard: also write event files.
    """

    def __init__(self, folder: Path, step: int = 0, tensorboard: bool = False) -> None:
        kept = [row for row in read_metrics(folder) if row["step"] <= step] if step else []
        lost = lacking(kept, step)
        if lost:
            log.warning("%s lacks steps %s of the %d before the checkpoint", folder / FILE, spans(lost), step)
        write_text(folder / FILE, "".join(to_json(row) + "\n" for row in kept))
        self.path = folder / FILE
        self.file = os.fdopen(open_own(self.path, os.O_WRONLY | os.O_APPEND), "a", encoding="utf-8")
        self.events: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                self.file.close()
                raise ImportError(
                    "train.tensorboard=true needs the package 'tensorboard', which is not installed"
                ) from error
            self.events = SummaryWriter(str(folder / "tensorboard"), purge_step=step)

    def write(self, step: int, **values: Any) -> None:
        """Write one line: `step` and `values`."""
        with about(self.path):
            self.file.write(to_json({"step": step, **values}) + "\n")
            self.file.flush()
        if self.events is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self.events.add_scalar(name, value, step)

    def sync(self) -> None:
        """Put what was written on disk: the lines of all steps that a checkpoint holds are there before it is."""
        with about(self.path):
            os.fsync(self.file.fileno())

    def close(self) -> None:
        """Close the files."""
        self.file.close()
        if self.events is not None:
            self.events.close()


class Silence:
    """Metrics of the processes that do not write any."""

    def write(self, step: int, **values: Any) -> None:
        """Write nothing: another process does."""

    def sync(self) -> None:
        """Nothing is there to be put on disk."""

    def close(self) -> None:
        """Nothing is open that could be closed."""
