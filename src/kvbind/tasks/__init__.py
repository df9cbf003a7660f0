"""What models are trained on: each task joins data, model, loss and metric.

A task's module offers `Config` (a dataclass with a field `train`), `resolve` (which spells its defaults out), `Task` and
`PRESETS`; `open_task_module` finds it by name.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from kvbind.inner.value import nearest

TASKS = {"language": "kvbind.tasks.language"}
"""The modules of the tasks, by name."""


def open_task_module(name: str) -> ModuleType:
    """The module of the task of that name.

    Raises:
        ValueError: an unknown name; the message gives the nearest known one.
    """
    if name not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}; got {name!r}{nearest(name, TASKS)}")
    return importlib.import_module(TASKS[name])
