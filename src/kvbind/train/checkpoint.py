"""Checkpoints: written whole or not at all, so that a kill at any moment leaves a loadable latest one."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

FOLDER = "checkpoints"
_PREFIX, _SUFFIX, _TEMPORARY = "step-", ".pt", ".partial"


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A file to write that appears under `path` complete and on disk, or not at all."""
    partial = path.with_name(path.name + _TEMPORARY)
    with partial.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Put a folder's own entries, such as a rename, on disk."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def save_checkpoint(folder: Path, step: int, content: dict[str, Any], keep: int) -> Path:
    """Write a run's checkpoint and delete all but the newest `keep`.

    Args:
        folder: of the run.
        step: optimizer steps done.
        content: tensors and plain data.
        keep: how many checkpoints stay.
    """
    home = folder / FOLDER
    home.mkdir(parents=True, exist_ok=True)
    path = home / f"{_PREFIX}{step:08d}{_SUFFIX}"
    with atomic_write(path) as file:
        torch.save(content, file)
    for old in checkpoints(folder)[:-keep]:
        old.unlink()
    for leftover in home.glob(f"*{_TEMPORARY}"):
        leftover.unlink()
    return path


def checkpoints(folder: Path) -> list[Path]:
    """A run's checkpoints, oldest first."""
    return sorted((folder / FOLDER).glob(f"{_PREFIX}*{_SUFFIX}"))


def latest_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The content of a run's newest checkpoint, on the CPU, or None where it has none."""
    found = checkpoints(folder)
    return torch.load(found[-1], map_location="cpu", weights_only=True) if found else None


def random_state() -> dict[str, Any]:
    """The state of every generator that training may draw from: torch's, Python's, and numpy's."""
    kind, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Put back what `random_state` gave."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        # a run may go on on a machine of fewer GPUs
        torch.cuda.set_rng_state_all([x.cpu() for x in state["cuda"][: torch.cuda.device_count()]])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), *rest))


def write_text(path: Path, text: str) -> None:
    """Write a small file atomically."""
    with atomic_write(path) as file:
        file.write(text.encode())


def write_with(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a file under a temporary name with the same suffix, then move it to `path`."""
    partial = path.with_name(f".{path.name}{_TEMPORARY}{path.suffix}")
    write(partial)
    partial.replace(path)
