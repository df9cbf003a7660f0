"""What of a page takes long to make, in a file beside it, from which the next page takes it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kvbind.experiments.results.cache import ResultCache

log = logging.getLogger("kvbind.report")

Say = Callable[[str], None]

SUFFIX = ".cache.json"
"""Of the file: `report.cache.json` beside `report.html`."""


class PageCache:
    """Plain data that were made for a page, by all that they depend on.

    Args:
        page: the page; None to store nothing.
        say: told in a line of everything that has to be made; None for nobody.
    """

    def __init__(self, page: Path | None = None, say: Say | None = None) -> None:
        self._say = say
        self._cache = None if page is None else opened(page.with_suffix(SUFFIX))

    def made(self, what: str, make: Callable[[], Any], fits: Callable[[Any], bool], *depends: Any) -> Any:
        """What was made of the same before, or is made now.

        Args:
            what: the line that says what is being made.
            make: makes plain data.
            fits: whether data from the file, which others may have written, are such.
            depends: plain data on which the result depends.
        """
        found = None if self._cache is None else self._cache.get(*depends)
        if found is not None and fits(found):
            return found
        if self._say is not None:
            self._say(what)
        found = make()
        if self._cache is not None:
            self._cache.path.parent.mkdir(parents=True, exist_ok=True)
            self._cache.put(found, *depends)
        return found


def opened(path: Path) -> ResultCache:
    """The cache in a file, on the CPU; an empty one where the file is damaged, as everything in it can be made again."""
    device = torch.device("cpu")
    try:
        return ResultCache(path, device)
    except ValueError:
        log.warning("%s is damaged: what it held is made anew", path)
        return ResultCache(path, device, fresh=True)
