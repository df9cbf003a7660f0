"""`kvbind report`: one page on everything that was reproduced."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kvbind.experiments.report.explorer.untrained import untrained_models
from kvbind.experiments.report.page import find_parts, write_page
from kvbind.experiments.report.server import open_server
from kvbind.provenance import versions

__all__ = ["make_report", "open_server"]

NAME = "report.html"


def make_report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page on the results below some folders.

    Args:
        folders: with results of `kvbind reproduce`.
        out: the page; default `report.html` in the first folder.

    Returns:
        Where it is.

    Raises:
        ValueError: a folder that is none, no result in any of them, or one that is damaged or leads out of its folder.
        ImportError: plotly is not installed.
    """
    parts, models = find_parts(folders)
    if not parts and not models:
        raise ValueError(f"folders must hold results of kvbind reproduce; found none below {', '.join(map(str, folders))}")
    path = (out or folders[0] / NAME).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_page(path, parts, [*models, *untrained_models()], versions())
    return path
