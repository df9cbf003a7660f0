"""The image task: a ViTTT classifier, DeiT's augmentation, top-1 accuracy on held-out images."""

from kvbind.tasks.images.config import PRESETS, ImagesConfig, as_before, inner_loops, resolve, suited_preset
from kvbind.tasks.images.model import build_model, describe
from kvbind.tasks.images.table_rows import baselines, rows
from kvbind.tasks.images.task import ImagesTask

Config = ImagesConfig
Task = ImagesTask

__all__ = [
    "PRESETS", "Config", "ImagesConfig", "ImagesTask", "Task", "as_before", "baselines", "build_model", "describe",
    "inner_loops", "resolve", "rows", "suited_preset",
]  # fmt: skip
