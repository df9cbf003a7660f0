"""What took long to find for a report: on disk as soon as it is found, so that the same command does not find it twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from kvbind.experiments.results.files import write_json
from kvbind.provenance import machine, versions
from kvbind.train.config import config_hash
from kvbind.train.files import read_json


class ResultCache:
    """Plain data in a JSON file, by a hash of all that they depend on, this machine and the versions on it included.

    Args:
        path: of the file, in a folder that exists.
        device: where the data come from.
        fresh: forget what the file holds; the first `put` replaces it.

    Raises:
        ValueError: the file holds something else.
    """

    def __init__(self, path: Path, device: torch.device, fresh: bool = False) -> None:
        self.path, self._here = path, [machine(device), versions()]
        self._found: dict[str, Any] = {} if fresh or not path.is_file() else read(path)

    def get(self, *depends: Any) -> Any:
        """What was put with the same plain data; None where nothing was."""
        return self._found.get(config_hash([*depends, *self._here]))

    def put(self, found: Any, *depends: Any) -> None:
        """Write data, with the plain data that they depend on."""
        self._found[config_hash([*depends, *self._here])] = found
        write_json(self.path, self._found)


def read(path: Path) -> dict[str, Any]:
    """The data in a file, by hash."""
    try:
        found = read_json(path)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold what was kept for an earlier report; remove it, or begin anew with --fresh")
    # in older files data stand beside their hash, its "key": alone, or several of them under names
    old = [x for x in (found, *found.values()) if isinstance(x, dict) and len(x) == 2 and "key" in x]
    return {x.pop("key"): x.popitem()[1] for x in old} if old else found
