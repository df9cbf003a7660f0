"""Runs to train, and how many at once."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvbind.experiments.training.run_folders import RESULT
from kvbind.experiments.training.runs import Run
from kvbind.train.bars import Watch

MOST_WORKERS = 4
"""A process takes some 600 MB before it does anything, so that more are started only where they are asked for."""

VISIBLE = "CUDA_VISIBLE_DEVICES"
"""What says which GPUs a process sees."""


@dataclass(frozen=True)
class TrainingJob:
    """A run to train.

    Attributes:
        task: its name.
        config: of that task.
        folder: of the run.
        title: beside its progress bar.
        alone: its speed is what matters, so that nothing else runs on its device meanwhile.
        fresh: train it anew, whatever there is.
    """

    task: str
    config: Any
    folder: Path
    title: str
    alone: bool = False
    fresh: bool = False

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to train."""
        return not self.fresh and (self.folder / RESULT).is_file()


def visible_gpus() -> list[str]:
    """The GPUs that this process sees, by the names that `CUDA_VISIBLE_DEVICES` takes."""
    named = [name.strip() for name in os.environ.get(VISIBLE, "").split(",") if name.strip()]
    return [named[i] if i < len(named) else str(i) for i in range(torch.cuda.device_count())]


def default_workers(device: torch.device) -> int:
    """How many runs to train at once: one on each GPU, on a CPU one for each usable core up to `MOST_WORKERS`."""
    if device.type != "cpu":
        return max(len(visible_gpus()), 1) if device.type == "cuda" and device.index is None else 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, MOST_WORKERS)


class WorkerKilledError(RuntimeError):
    """The system, or somebody, has killed the process that trained a run."""


AddBar = Callable[[str, int], Watch]

Finished = Callable[[TrainingJob, Run], None]

Failed = Callable[[TrainingJob, Exception], None]
