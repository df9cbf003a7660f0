"""What an experiment leaves behind: numbers, as JSON and CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvbind.train.files import to_json, write_text

NUMBERS = re.compile(r"\[\n\s+(?:(?:-?[0-9][0-9.eE+-]*|null),\n\s+)*(?:-?[0-9][0-9.eE+-]*|null)\n\s+\]")
"""A list of numbers, as it stands over several lines; within a text there are no ends of lines."""


def write_json(path: Path, data: Any) -> None:
    """Write plain data, as `kvbind.train.files.read_json` reads it; lists of numbers are one line each."""
    write_text(path, NUMBERS.sub(lambda found: f"[{' '.join(found[0][1:-1].split())}]", to_json(data, indent=2)) + "\n")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows under the union of their keys, in the order in which keys first appear."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, buffer.getvalue())
