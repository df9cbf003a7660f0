"""The language task: packed text, a LaCT language model, next-token loss, perplexity on held-out documents."""

from kvbind.tasks.language.config import PRESETS, LanguageConfig, inner_loop, model_fields, resolve
from kvbind.tasks.language.model import build_model, describe, open_trained
from kvbind.tasks.language.table_rows import baselines, rows
from kvbind.tasks.language.task import LanguageTask

Config = LanguageConfig
Task = LanguageTask

__all__ = [
    "PRESETS", "Config", "LanguageConfig", "LanguageTask", "Task", "baselines", "build_model", "describe", "inner_loop",
    "model_fields", "open_trained", "resolve", "rows",
]  # fmt: skip
