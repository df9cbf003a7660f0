"""The views task: posed images in, new views out."""

from kvbind.tasks.views.config import PRESETS, SMALLEST, ViewsConfig, baselines, describe, inner_loop, resolve, rows
from kvbind.tasks.views.task import ViewsTask

Config = ViewsConfig
Task = ViewsTask

__all__ = [
    "PRESETS",
    "SMALLEST",
    "Config",
    "Task",
    "ViewsConfig",
    "ViewsTask",
    "baselines",
    "describe",
    "inner_loop",
    "resolve",
    "rows",
]
