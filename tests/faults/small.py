"""The toy of `tests/train` as a task of the library, so that all that a run leaves can be broken."""

from dataclasses import dataclass, field, replace

import torch
from safetensors.torch import load_file, save_file

from kvbind import tasks
from kvbind.experiments.training.runs import train_run
from kvbind.tasks.contents import Contents
from kvbind.train import TrainConfig
from kvbind.train.metrics import read_metrics
from train import toy

tasks.TASKS["small"] = "faults.small"
PRESETS = {}
VARYING = {"seconds", "rows_per_second", "data_wait"}


@dataclass
class Data:
    source: str = "noise"


@dataclass
class Config:
    seed: int = 0
    data: Data = field(default_factory=Data)
    train: TrainConfig = field(default_factory=lambda: toy.config(ema=0.5, steps=8, checkpoint_every=1, keep=2))


class Task(toy.Toy):
    def __init__(self, config, training=True):
        super().__init__()
        self.config = config

    def build(self):
        return toy.make_model()

    def save(self, model, folder):
        save_file(model.state_dict(), folder / "model.safetensors")

    def fingerprint(self):
        return {"train": self.config.data.source}

    def contents(self):
        return Contents(others={self.config.data.source: "1"})


def config(**fields):
    return replace(Config(), train=replace(Config().train, **fields))


def run(folder, watch=None, fresh=False, **fields):
    """Train in a folder, or go on there."""
    return train_run("small", config(**fields), folder, watch, fresh=fresh)


def stop_at(step):
    """A watch that ends a run as Ctrl-C does."""

    def watch(now, note):
        if now == step:
            raise KeyboardInterrupt

    return watch


def stopped(folder, step, **fields):
    """A run that was interrupted behind a step, with checkpoints before it."""
    try:
        run(folder, stop_at(step), **fields)
    except KeyboardInterrupt:
        return folder
    raise AssertionError(f"{folder} was finished before step {step}")


def left(folder):
    """What a finished run has left, without times."""
    rows = [{name: x for name, x in row.items() if name not in VARYING} for row in read_metrics(folder)]
    weights = {name: x.tolist() for name, x in load_file(folder / "model" / "model.safetensors").items()}
    return rows, weights


torch.set_num_threads(1)
