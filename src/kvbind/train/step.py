"""One optimizer step of a run: forward and backward of its batches, clipping, AdamW, and whether it counts.

Two ways lead to the same numbers. Eagerly, the host reads what gradients came to and decides. Replayed, the device decides,
by the same rule, so that nothing waits within a step: all of it is a CUDA graph (`kvbind.train.graphs`), or, where batches
are accumulated, one graph for each and one for the rest. The host still reads one line of numbers behind each step; the next
batches are read before that, while the GPU works.
"""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kvbind.train.average import Average
from kvbind.train.config import TrainConfig
from kvbind.train.graphs import Gradients, Replays, rate_dtype, skipping_step, to_device
from kvbind.train.optimizer import GuardedStep
from kvbind.train.parallel import Distributed, clip_
from kvbind.train.ranks import Share, average_, rank, ranks, stacked

if TYPE_CHECKING:
    from kvbind.train.loop import Task

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BatchPart:
    """One batch of a step.

    Attributes:
        batch: as the task gave it.
        position: where the data go on behind it.
        weight: how much its loss counts.
        size: units in it.
        waited: seconds that it took to read.
    """

    batch: Any
    position: dict[str, Any]
    weight: float
    size: int
    waited: float


@dataclass(frozen=True)
class Outcome:
    """What a step came to, on all processes together.

    Attributes:
        finite: whether it was taken.
        loss: mean over the step.
        norm: of the gradients, before they were clipped.
        size: units.
        waited: seconds for data.
        peak: the most memory that tensors have taken on a GPU so far, in GiB.
        unsaved: seconds since the last checkpoint, by the first process's clock.
        position: where the data go on.
    """

    finite: bool
    loss: float
    norm: float
    size: float
    waited: float
    peak: float
    unsaved: float
    position: dict[str, Any]


class TrainingStep:
    """Takes the steps of a run.

    Args:
        model: what is trained.
        together: the same, as the processes of the run train it.
        task: what it is trained on.
        config: of the run, for precision, clipping and graphs.
        optimizer: from `make_optimizer`, with what a checkpoint holds.
        average: of the weights, or None.
        batches: from the task.
        share: what this process reads of them.
        device: where it computes.

    Attributes:
        relieve: lets steps take less memory from now on, where they can; whether they do.
    """

    def __init__(
        self,
        model: nn.Module,
        together: Distributed,
        task: Task[Any],
        config: TrainConfig,
        optimizer: torch.optim.AdamW,
        average: Average | None,
        batches: Iterator[tuple[Any, dict[str, Any]]],
        share: Share,
        device: torch.device,
    ) -> None:
        self.model, self.together, self.task, self.config = model, together, task, config
        self.optimizer, self.average, self.batches, self.share, self.device = optimizer, average, batches, share, device
        self.accumulate = config.accumulate // share.turns
        self.sequences = 1 if share.sequence is None else torch.distributed.get_world_size(share.sequence)
        self.guarded = GuardedStep(optimizer, config)
        self.statistics = [x for x in model.buffers() if x.is_floating_point()]
        self.ahead: list[BatchPart] = []
        self.relieve: Callable[[], bool] = lambda: False
        self.replayed = Replayed(self) if replays_wanted(config, device) else None

    def __call__(self, rate: float, unsaved: float, more: bool) -> Outcome:
        """Take a step.

        Args:
            rate: the learning rate.
            unsaved: seconds since the last checkpoint.
            more: whether another step follows.
        """
        if self.device.type == "cuda":
            # what a replayed step reads has no more digits
            rate = torch.tensor(rate, dtype=rate_dtype(self.device)).item()
        if self.replayed is not None and self.replayed.possible(rate):
            return self.replayed(rate, unsaved, more)
        return self._eagerly(rate, unsaved)

    def release(self) -> bool:
        """Give up the memory of captured steps, which are captured anew; False where there are none."""
        if self.replayed is None or not self.replayed.release():
            return False
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
        return True

    def next_part(self) -> BatchPart:
        """The next batch, read now where it was not before."""
        return self.ahead.pop(0) if self.ahead else self._read()

    def first_part(self) -> BatchPart:
        """The next batch, which stays the next."""
        part = self.next_part()
        self.ahead.insert(0, part)
        return part

    def read_ahead(self) -> None:
        """Read the next step's batches."""
        while len(self.ahead) < self.accumulate:
            self.ahead.append(self._read())

    def _read(self) -> BatchPart:
        asked = time.perf_counter()
        batch, position = next(self.batches)
        waited = time.perf_counter() - asked
        return BatchPart(batch, position, self.task.weight(batch), self.task.size(batch), waited)

    def precision(self) -> torch.autocast:
        """The autocast context of the run's precision."""
        return precision(self.config, self.device)

    def backward(self, one: BatchPart, last: bool) -> Tensor:
        """Add a batch's gradients, and return its part of the step's loss.

        Args:
            one: the batch.
            last: whether it is the step's last, behind which gradients of all processes meet.
        """
        batch, inside = one.batch, nullcontext()
        cut = getattr(self.task, "cut", None)
        if self.sequences > 1 and cut is not None:
            batch, inside = cut(batch, self.share.sequence)
        batch = to_device(batch, self.device)
        with self.together.accumulating(last=last), inside:
            with self.precision():
                part = self.task.loss(self.together.module, batch) * one.weight / self.accumulate
            with self._in_one_thread():
                part.backward()
        found: Tensor = part.detach()
        return found

    def _in_one_thread(self) -> AbstractContextManager[Any]:
        """Gradients in this thread, which waits for them anyway.

        Else autograd hands a pass over a GPU to a thread of that device and takes it back, which cost the host as much as a
        small call of `ttt` with its gradients (docs/kernels.md). Where gradients of several processes meet meanwhile, or
        activations come back from the host, its threads stay.
        """
        if ranks() > 1 or self.config.activation_checkpointing == "offload":
            return nullcontext()
        return torch.autograd.set_multithreading_enabled(False)

    def _eagerly(self, rate: float, unsaved: float) -> Outcome:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss, weights, size, waited = torch.zeros((), device=self.device), 0.0, 0, 0.0
        buffers = [x.clone() for x in self.model.buffers()]
        position: dict[str, Any] = {}
        for i in range(self.accumulate):
            one = self.next_part()
            position = one.position
            size, weights, waited = size + one.size, weights + one.weight, waited + one.waited
            loss = loss + self.backward(one, last=i == self.accumulate - 1)

        # what all processes tell each other outside of gradients; a loss that is not finite makes the sum so
        # ranks that divide a sequence have the same batch, and each a part of its loss
        counted = [weights / self.accumulate / self.sequences, size / self.sequences]
        now = [*counted, waited, peak_memory(self.device), unsaved]
        own = torch.tensor(now, dtype=exact(self.device)).to(self.device)
        told = stacked(torch.cat([loss.to(own.dtype)[None], own]))
        total, most = told.sum(0), told.amax(0)
        scale = total[1] / len(told)
        norm = clip_(self.model.parameters(), self.config.clip, scale.float())
        # one transfer for all numbers, as each would make a GPU wait
        numbers = torch.stack([total[0] / total[1], norm.to(total.dtype), total[2], most[3], most[4], told[0, 5]])
        loss_value, norm_value, size, waited, peak, unsaved = numbers.tolist()
        finite = math.isfinite(loss_value) and math.isfinite(norm_value) and self.guarded(rate, norm_value)
        if finite:
            average_(self.statistics)
            if self.average is not None:
                self.average.update(self.model)
        else:
            for buffer, before in zip(self.model.buffers(), buffers, strict=True):
                buffer.copy_(before)
        self.optimizer.zero_grad(set_to_none=True)
        return Outcome(finite, loss_value, norm_value, size, waited, peak, unsaved, position)


class Replayed:
    """Steps of a single process that nothing waits within.

    Args:
        step: whose they are.
    """

    def __init__(self, step: TrainingStep) -> None:
        self.step, device = step, step.device
        self.rate = torch.zeros((), dtype=rate_dtype(device), device=device)
        self.loss = torch.zeros((), device=device)
        self.scale = torch.zeros((), dtype=exact(device), device=device)
        self.numbers = torch.zeros(3, dtype=exact(device), device=device)
        self.buffers = list(step.model.buffers())
        self.before = [x.clone() for x in self.buffers]
        self.gradients = Gradients(step.model)
        self.alone = step.accumulate == 1
        if self.alone:
            self.work = Replays(self._whole, device, self._give_up_gradients, relieve=lambda: step.relieve())
        else:
            self.work = Replays(self._part, device, self.gradients.attach, relieve=lambda: step.relieve())
            self.rest = Replays(self._finish, device)
        self._told = False

    def possible(self, rate: float) -> bool:
        """Whether the next step can be one that the host does not look into; if so, it is counted as taken."""
        if self.work.broken is not None or (not self.alone and self.rest.broken is not None):
            return False
        average = self.step.average
        # an average begins with the first weights that count
        return (average is None or average.updates > 0) and self.step.guarded.foreseen(rate)

    def __call__(self, rate: float, unsaved: float, more: bool) -> Outcome:
        """As `TrainingStep` takes them."""
        step = self.step
        for group in step.optimizer.param_groups:
            group["lr"] = self.rate
        self.rate.fill_(rate)
        if not self.alone:
            self.gradients.attach()  # an eager step gives them up
        if self.buffers:
            torch._foreach_copy_(self.before, self.buffers)
        weights, size, waited = 0.0, 0, 0.0
        position: dict[str, Any] = {}
        parts = [step.next_part() for _ in range(step.accumulate)]
        self.scale.fill_(sum(one.weight for one in parts) / step.accumulate)
        for one in parts:
            position = one.position
            size, weights, waited = size + one.size, weights + one.weight, waited + one.waited
            batch = {"batch": self._prepared(one.batch), "weight": torch.tensor(one.weight, dtype=torch.float32)}
            if self._captured(one.batch):
                self.work(batch)
            else:
                self.work.plainly(batch)
        if not self.alone:
            self.rest({})
        if more:
            step.read_ahead()
        loss, norm, finite = self.numbers.tolist()
        if finite and step.average is not None:
            step.average.updates += 1
        return Outcome(bool(finite), loss, norm, size, waited, peak_memory(step.device), unsaved, position)

    def _prepared(self, batch: Any) -> Any:
        """A batch of which all that depends on the host's numbers is done."""
        prepare = getattr(self.step.task, "prepare", None)
        if prepare is None:
            return batch
        with torch.no_grad(), self.step.precision():
            return prepare(to_device(batch, self.step.device), self.step.device)

    def _captured(self, batch: Any) -> bool:
        reason = getattr(self.step.task, "uncapturable", lambda batch: None)(batch)
        if reason is not None and not self._told:
            self._told = True
            log.warning("training steps are not replayed as CUDA graphs, or not all of them: %s", reason)
        return reason is None

    def release(self) -> bool:
        """Give up captured steps, as `TrainingStep.release` does; whether there were any."""
        works = [self.work] if self.alone else [self.work, self.rest]
        released = [work.release() for work in works]
        return any(released)

    def _give_up_gradients(self) -> None:
        self.step.optimizer.zero_grad(set_to_none=True)

    def _whole(self, batch: Any) -> None:
        self._part(batch)
        self._finish({})

    def _part(self, batch: Any) -> None:
        step = self.step
        with step.precision():
            loss = step.task.loss(step.together.module, batch["batch"])
            part = loss * batch["weight"].to(loss.dtype) / step.accumulate
        part.backward()
        self.loss += part.detach()
        if not self.alone:
            self.gradients.adopt()

    def _finish(self, batch: Any) -> None:
        """What eager steps do behind the last backward pass, with the device's own decision in place of the host's."""
        step = self.step
        norm = clip_(step.model.parameters(), step.config.clip, self.scale.float())
        told = torch.stack([self.loss.to(self.scale.dtype) / self.scale, norm.to(self.scale.dtype)])
        finite = told.isfinite().all()
        skipping_step(step.optimizer, finite)
        keep(finite, self.buffers, self.before)
        if step.average is not None:
            kept = step.average.tensors()
            before = [x.clone() for x in kept]
            step.average.move(step.model)
            keep(finite, kept, before)
        self.numbers.copy_(torch.cat([told, finite.to(told.dtype)[None]]))
        self.loss.zero_()
        if self.alone:
            self._give_up_gradients()
        else:
            self.gradients.zero()


def keep(taken: Tensor, tensors: list[Tensor], before: list[Tensor]) -> None:
    """Put back what tensors were before, where `taken` (bool, a scalar) is False."""
    for x, old in zip(tensors, before, strict=True):
        x.copy_(torch.where(taken, x, old))


def replays_wanted(config: TrainConfig, device: torch.device) -> bool:
    """Whether steps are to be replayed, as `train.graphs` and what can be captured say."""
    if config.graphs == "off" or (config.graphs == "auto" and device.type != "cuda"):
        return False
    reason = None
    if ranks() > 1:
        reason = f"gradients of {ranks()} processes meet between their kernels"
    elif config.activation_checkpointing == "offload":
        reason = "train.activation_checkpointing=offload moves activations by the host"
    if reason is not None and rank() == 0:
        log.warning("training steps are not replayed as CUDA graphs: %s", reason)
    return reason is None


def peak_memory(device: torch.device) -> float:
    """The most memory that tensors have taken on a GPU so far, in GiB; 0 elsewhere."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0


def exact(device: torch.device) -> torch.dtype:
    """The widest floating point numbers of a device."""
    return torch.float32 if device.type == "mps" else torch.float64


def precision(config: TrainConfig, device: torch.device) -> torch.autocast:
    """The autocast context that `config.precision` means on `device`."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=in_bfloat16(config, device))


def in_bfloat16(config: TrainConfig, device: torch.device) -> bool:
    """Whether matrix products run in bfloat16."""
    return config.precision == "bfloat16" or (config.precision == "auto" and device.type == "cuda")
