"""A task that trains in milliseconds: a line through points, whose "inner loop" is the slope that it starts from."""

import math
from dataclasses import dataclass, field, replace

import torch
from safetensors.torch import save_file
from torch import nn

from kvbind.tasks.contents import Contents
from kvbind.train import TrainConfig

ROWS = {"rung0": 0.0, "rung1": 1.0, "rung3": 2.0, "rung6": 3.0, "ascent": -1.0, "key_for_query": 4.0}
"""Rungs 2, 4 and 5 do not apply."""

PRESETS = {}  # the tests write the file


@dataclass
class Model:
    inner: dict = field(default_factory=lambda: {"slope": 0.0})


@dataclass
class Data:
    source: str = "noise"


@dataclass
class Config:
    seed: int = 0
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    train: TrainConfig = field(default_factory=TrainConfig)


def resolve(config):
    return replace(config, model=Model({"slope": float(config.model.inner["slope"])}))


def rows(config):
    return {name: {"slope": slope} for name, slope in ROWS.items()}


def baselines(config):
    return {}


class Task:
    unit, batch = "points", 8

    def __init__(self, config, training=True):
        self.config = config

    def build(self):
        torch.manual_seed(self.config.seed)
        model = nn.Linear(1, 1)
        model.weight.data += self.config.model.inner["slope"]
        return model

    def batches(self, position, share=None):
        number = position["next"] if position else 0
        while True:
            yield torch.randn(8, 1, generator=torch.Generator().manual_seed(number)), {"next": number + 1}
            number += 1

    def size(self, batch):
        return len(batch)

    def weight(self, batch):
        return len(batch)

    def blocks(self, model):
        return []

    def loss(self, model, batch):
        return (model(batch) - 2 * batch).square().mean()

    def evaluate(self, model, share=None):
        x = torch.linspace(-1, 1, 5)[:, None]
        error = float((model(x) - 2 * x).square().mean())
        curve = [[float(at), abs(float(y))] for at, y in zip(x, model(x) - 2 * x, strict=True)]
        return {"score": -10 * math.log10(error), "error": error, "zero_score": 3.0, "points": 5, "curve": curve}

    def save(self, model, folder):
        folder.mkdir(exist_ok=True)
        save_file(model.state_dict(), folder / "model.safetensors")

    def fingerprint(self):
        return {"train": self.config.data.source}

    def contents(self):
        return Contents(others={self.config.data.source: "1"})
