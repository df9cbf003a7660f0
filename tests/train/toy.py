"""A small model and task for the loop: dropout, so that random numbers matter; a position, so that data order does."""

import time

import torch
from torch import nn

from kvbind.train import TrainConfig
from kvbind.train.ranks import WHOLE


class Toy:
    """Regression on noise; `faults` maps a batch's number to what happens there: a factor on the loss, or an exception."""

    unit, batch = "rows", 8

    def __init__(self, faults=None, pause=0.0):
        self.faults, self.pause, self.drawn = faults or {}, pause, 0

    def batches(self, position, share=WHOLE):
        self.drawn = position["next"] if position else 0
        while True:
            number = self.drawn + share.turn
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(number))[share.rows(8)]
            self.drawn += share.turns
            yield {"x": x, "number": number}, {"next": self.drawn}

    def size(self, batch):
        return len(batch["x"])

    def weight(self, batch):
        return 1.0

    def blocks(self, model):
        return [module for module in model.modules() if isinstance(module, nn.Linear)]

    def loss(self, model, batch):
        fault = self.faults.get(batch["number"], 1.0)
        if isinstance(fault, BaseException):
            raise fault
        time.sleep(self.pause)
        return fault * (model(batch["x"]) - batch["x"].sum(1, keepdim=True)).square().mean()

    def evaluate(self, model, share=WHOLE):
        torch.rand(3)  # must not disturb what training draws
        x = torch.randn(64, 4, generator=torch.Generator().manual_seed(10**6))
        return {"error": float((model(x) - x.sum(1, keepdim=True)).square().mean())}


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.LayerNorm(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 1))


def config(**fields):
    return TrainConfig(
        **({"steps": 20, "warmup": 3, "learning_rate": 1e-2, "device": "cpu", "checkpoint_every": 4} | fields)
    )
