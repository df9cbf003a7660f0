"""A run's numbers as they come: one JSON object per line, and TensorBoard's event files where asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kvbind.train.checkpoint import write_text

FILE = "metrics.jsonl"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """What a run has written so far; a last line cut short by a kill is left out."""
    path = folder / FILE
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class Metrics:
    """Appends to a run's metrics.

    Args:
        folder: of the run.
        step: optimizer steps of the checkpoint that the run goes on from. What was written after it is dropped: those
            steps are taken again.
        tensorboard: also write event files.
    """

    def __init__(self, folder: Path, step: int = 0, tensorboard: bool = False) -> None:
        kept = [row for row in read_metrics(folder) if row["step"] <= step] if step else []
        write_text(folder / FILE, "".join(json.dumps(row) + "\n" for row in kept))
        self.file = (folder / FILE).open("a", encoding="utf-8")
        self.events: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError(
                    "train.tensorboard=true needs the package 'tensorboard', which is not installed"
                ) from error
            self.events = SummaryWriter(str(folder / "tensorboard"), purge_step=step)

    def write(self, step: int, **values: Any) -> None:
        """Write one line: `step` and `values`."""
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        if self.events is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self.events.add_scalar(name, value, step)

    def close(self) -> None:
        """Close the files."""
        self.file.close()
        if self.events is not None:
            self.events.close()


class Silence:
    """Metrics of the processes that do not write any."""

    def write(self, step: int, **values: Any) -> None:
        """Write nothing."""

    def close(self) -> None:
        """Close nothing."""
