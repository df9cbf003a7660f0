"""Runs that have left no model: what their folders hold, and the command that goes on."""

from __future__ import annotations

import shlex
from contextlib import suppress
from pathlib import Path

from kvbind.files import read_yaml
from kvbind.train.checkpoint import checkpoints, step_of

CONFIG, RESULT, WEIGHTS = "config.yaml", "result.json", "model"
"""In a run's folder: its configuration, what it came to, and the folder of its model."""


def task_of(config: Path) -> str | None:
    """The task that a run's configuration file names in its first line; None of a file that names none."""
    head, mark, task = config.read_text(encoding="utf-8", errors="replace").partition("\n")[0].partition("# kvbind train ")
    return task.strip() if mark and not head else None


def unfinished(folder: Path) -> str:
    """Of a run's folder without a model: how far the run is, and the command that goes on with it.

    Raises:
        OSError: a file that cannot be read.
    """
    path, name, there = folder / CONFIG, repr(str(folder)), checkpoints(folder)
    task = task_of(path)
    if task is None:
        return f"{name} has no {WEIGHTS}/ yet, which the command that trains it leaves there"
    command = shlex.join(["kvbind", "train", task, "--preset", str(path), "--out", str(folder)])
    if (folder / RESULT).is_file():
        return f"{name} has what a run came to, without its {WEIGHTS}/; {command} --fresh trains it anew"
    if not there:
        return f"{name} has no {WEIGHTS}/ and no checkpoint yet; {command} begins at its first step"
    of = ""
    with suppress(ValueError, TypeError, KeyError):  # the command refuses a configuration that is none
        of = f" of {int(read_yaml(path)['train']['steps']):,}"
    return f"{name} is at step {step_of(there[-1]):,}{of}, and has no {WEIGHTS}/ yet; {command} goes on with it"
