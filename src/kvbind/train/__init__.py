"""The training loop: knows no model and no task by name."""

from kvbind.train.checkpoint import latest_checkpoint
from kvbind.train.config import ParallelConfig, TrainConfig
from kvbind.train.graphs import GraphedStep, graph_trainer
from kvbind.train.loop import Progress, Task, TrainingStoppedError, train
from kvbind.train.ranks import Share

__all__ = [
    "GraphedStep",
    "ParallelConfig",
    "Progress",
    "Share",
    "Task",
    "TrainConfig",
    "TrainingStoppedError",
    "graph_trainer",
    "latest_checkpoint",
    "train",
]
