"""What an experiment leaves behind: numbers, as JSON and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvbind.train.files import laid_out, spelled, write_text


def write_json(path: Path, data: Any) -> None:
    """Write plain data, as `kvbind.train.files.read_json` reads it."""
    write_text(path, laid_out(spelled(data)) + "\n")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows under the union of their keys, in the order in which keys first appear."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, buffer.getvalue())
