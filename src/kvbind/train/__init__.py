"""The training loop: knows no model and no task by name."""

from kvbind.train.checkpoint import latest_checkpoint
from kvbind.train.config import TrainConfig
from kvbind.train.loop import Progress, Task, TrainingStoppedError, train

__all__ = ["Progress", "Task", "TrainConfig", "TrainingStoppedError", "latest_checkpoint", "train"]
