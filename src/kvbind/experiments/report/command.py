"""`kvbind report`: one page on everything that was reproduced or trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvbind import systems
from kvbind.experiments.inspection.untrained import untrained_models
from kvbind.experiments.report.checks import are_models
from kvbind.experiments.report.page import find_parts, write_page
from kvbind.experiments.report.page_cache import PageCache, Say
from kvbind.experiments.report.server import open_server
from kvbind.provenance import versions

__all__ = ["make_report", "open_server"]

NAME = "report.html"


def make_report(folders: Sequence[Path], out: Path | None = None, say: Say | None = None) -> Path:
    """Write the page on the results and runs below some folders.

    Args:
        folders: with results of `kvbind reproduce`, or runs of `kvbind train`.
        out: the page; default `report.html` in the first folder. What took long to make is in `report.cache.json` beside it,
            and is not made again.
        say: told in a line of everything that takes long; None for nobody.

    Returns:
        Where it is.

    Raises:
        ValueError: a folder that is none, neither a result nor a run in any of them, or one that is damaged or leads out
            of its folder.
    """
    path = (out or folders[0] / NAME).resolve()
    cache = PageCache(path, say)
    parts, models = find_parts(folders, cache)
    if not parts and not models:
        raise ValueError(
            "folders must hold results of kvbind reproduce or runs of kvbind train; found none below "
            f"{', '.join(map(str, folders))}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_page(path, parts, [*models, *random_models(cache)], versions())
    return path


def random_models(cache: PageCache) -> list[dict[str, Any]]:
    """The named systems with random weights, as the explorer shows them."""
    found: list[dict[str, Any]] = cache.made(
        "computing the explorer's systems with random weights",
        untrained_models,
        are_models,
        "explorer",
        {name: repr(make()) for name, make in systems.SYSTEMS.items()},
    )
    return found
