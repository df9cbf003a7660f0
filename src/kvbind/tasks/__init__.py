"""What models are trained on: each task joins data, model, loss and metric.

A task's module offers `Config` (a dataclass with fields `seed`, `model`, `data` and `train`), `resolve` (which spells its
defaults out), `Task`, `PRESETS`, `SMALLEST` (the preset that is taken where none is named), `rows` (what `model.inner` is in
each row of the paper's tables that applies to it), `baselines` (edits of `model.fields` for models without fast weights) and
`describe` (the configuration of a run whose model is a saved one); `open_task_module` finds it by name.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

TASKS = {
    "language": "kvbind.tasks.language",
    "images": "kvbind.tasks.images",
    "views": "kvbind.tasks.views",
    "recall": "kvbind.tasks.recall",
}
"""The modules of the tasks, by name."""

NEXT = {
    "language": 'kvbind generate {run} --prompt "The "',
    "images": "kvbind show {run} --out {picture}",
    "views": "kvbind render {run}",
}
"""The command that shows more of what a run's model learned, by task; `{picture}` is a file to write."""


def open_task_module(name: str) -> ModuleType:
    """The module of the task of that name.

    Raises:
        ValueError: an unknown name; the message gives the nearest known one.
    """
    # imported here so that the names alone, for a help text, do not wait for PyTorch
    from kvbind.inner.value import nearest

    if name not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}; got {name!r}{nearest(name, TASKS)}")
    return importlib.import_module(TASKS[name])


def preset_files(task: str) -> dict[str, Path]:
    """The shipped configurations of a task, YAML files by name."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "presets" / task).glob("*.yaml"))}
