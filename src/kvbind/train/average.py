"""An exponential average of a model's weights and buffers, whole or in shards."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class Average:
    """An exponential average, whose `module` is a model of its own.

    Attributes:
        module: the averaged model.
        updates: steps that have entered it; the first is taken as it is.

    Args:
        model: what is averaged, before it is distributed.
        decay: the weight of the past, per step.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.module, self.decay, self.updates = copy.deepcopy(model).requires_grad_(False), decay, 0

    def update(self, model: nn.Module) -> None:
        """Let a step enter the average."""
        self.move(model)
        self.updates += 1

    def tensors(self) -> list[Tensor]:
        """What this process holds of the average's parameters and buffers."""
        return [local(x) for x in (*self.module.parameters(), *self.module.buffers())]

    @torch.no_grad()
    def move(self, model: nn.Module) -> None:
        """Move the average by one step towards `model`; counters and other integers are taken as they are."""
        kept, new = self.tensors(), [local(x) for x in (*model.parameters(), *model.buffers())]
        weight = 1 - self.decay if self.updates else 1.0
        for old, now in zip(kept, new, strict=True):
            if not old.is_floating_point() or weight == 1:
                old.copy_(now)
        averaged = [i for i, x in enumerate(kept) if x.is_floating_point()] if weight != 1 else []
        if averaged:
            torch._foreach_lerp_([kept[i] for i in averaged], [new[i] for i in averaged], weight)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, in the same memory."""
    found: Tensor = tensor.detach()
    return found.to_local() if isinstance(found, DTensor) else found


def locals_of(tensors: Iterable[Tensor]) -> list[Tensor]:
    """What this process holds of some tensors."""
    return [local(x) for x in tensors]
