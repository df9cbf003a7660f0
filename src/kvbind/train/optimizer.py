"""AdamW and its learning rate."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kvbind.train.average import local
from kvbind.train.config import TrainConfig
from kvbind.train.ranks import from_all

MARGIN = 16.0
"""How far below the largest number of a dtype weights must stay to be updated unseen."""


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with decay on matrices (and higher) alone, which leaves out norms, biases and every other vector."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    # one fused kernel per step instead of one per tensor: on the CPU a small model's step is mostly such overhead
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)


class GuardedStep:
    """Optimizer steps that change nothing where they would leave weights or averages that are not finite.

    In a step of Adam a weight grows by no more than `rate / sqrt((1 - b1^2 / b2) (1 - b2))` (by Cauchy and Schwarz) and its
    decay. So a bound of all weights follows from the largest of them in the beginning, and most steps are safe without a
    look at any. Only where the bound or a squared gradient comes near the largest number of the weights' dtype is a copy of
    everything kept, and put back if need be.

    Every process makes one, and calls it in the same order as the others.

    Args:
        optimizer: from `make_optimizer`.
        config: of the run.
    """

    def __init__(self, optimizer: torch.optim.AdamW, config: TrainConfig) -> None:
        self.optimizer, self.config = optimizer, config
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.limit = min((torch.finfo(p.dtype).max for p in self.parameters), default=math.inf) / MARGIN
        first, second = config.betas
        self.ratio = 1 / math.sqrt((1 - first**2 / second) * (1 - second)) if first**2 < second else math.inf
        self.bound = self._largest()

    def _largest(self) -> float:
        own = [local(p).abs().amax().float() for p in self.parameters if local(p).numel()]
        found = from_all(float(torch.stack([x.cpu() for x in own]).amax()) if own else 0.0)
        return math.nan if any(math.isnan(x) for x in found) else max(found)

    def _after(self, rate: float) -> float:
        """The bound behind a step."""
        return self.bound * max(1.0, abs(1 - rate * self.config.weight_decay)) + rate * self.ratio

    def foreseen(self, rate: float) -> bool:
        """Whether a step leaves weights and averages that are finite, whatever its gradients, if those are.

        If so, it is counted as taken.
        """
        bound = self._after(rate)
        if not (bound < self.limit and self.config.clip < math.sqrt(self.limit)):
            return False
        self.bound = bound
        return True

    def __call__(self, rate: float, norm: float) -> bool:
        """Take a step.

        Args:
            rate: the learning rate.
            norm: of the gradients before they were clipped, the same on every process.

        Returns:
            Whether it was taken, the same on every process.
        """
        bound = self._after(rate)
        if bound < self.limit and min(norm, self.config.clip) < math.sqrt(self.limit):
            self.bound = bound
            self.optimizer.step()
            return True
        weights = [local(p).clone() for p in self.parameters]
        states = [{key: local(x).clone() for key, x in self.optimizer.state.get(p, {}).items()} for p in self.parameters]
        self.optimizer.step()
        if all(from_all(self._finite())):
            self.bound = self._largest()
            return True
        for p, weight, state in zip(self.parameters, weights, states, strict=True):
            local(p).copy_(weight)
            for key, x in state.items():
                local(self.optimizer.state[p][key]).copy_(x)
            if not state:
                self.optimizer.state.pop(p, None)
        return False

    def _finite(self) -> bool:
        held: list[Tensor] = [*self.parameters]
        held += [x for p in self.parameters for x in self.optimizer.state.get(p, {}).values()]
        return all(bool(local(x).isfinite().all()) for x in held)


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of step `step`, counted from 0: linear warm-up, then a cosine down to `config.final` of the peak."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(config.steps - config.warmup, 1)
    return config.learning_rate * (config.final + (1 - config.final) * 0.5 * (1 + math.cos(math.pi * progress)))
