"""The training loop: knows no model and no task by name."""

from kvbind.train.checkpoint import latest_checkpoint
from kvbind.train.config import ParallelConfig, TrainConfig
from kvbind.train.loop import Progress, Task, TrainingStoppedError, train
from kvbind.train.ranks import Share

__all__ = [
    "ParallelConfig",
    "Progress",
    "Share",
    "Task",
    "TrainConfig",
    "TrainingStoppedError",
    "latest_checkpoint",
    "train",
]
