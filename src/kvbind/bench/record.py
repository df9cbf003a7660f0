"""Result files of benchmarks: where the numbers come from, then the numbers."""

from __future__ import annotations

import json
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from kvbind.experiments.provenance import command, machine, versions
from kvbind.train.checkpoint import write_text


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


def save(path: Path | None, record: dict[str, Any]) -> None:
    """Write a record as JSON, whole or not at all; nothing where there is no path."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(record, indent=1) + "\n")
