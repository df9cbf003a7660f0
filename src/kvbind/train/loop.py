"""The training loop, from the first line of this file to the last.

A step: `accumulate` batches forward and backward, one clipped AdamW step at the schedule's rate, one line of metrics. A step
whose loss or gradient is not finite changes nothing, no running statistics either, and is counted. Every so often a
checkpoint holds all that the next step depends on, so that a run that was interrupted goes on exactly as if it had not been.
Where an average of the weights is kept, it is what evaluations see, what a checkpoint calls "model", and what is left in the
model in the end.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils import _pytree as pytree

from kvbind.train.bars import Watch
from kvbind.train.checkpoint import latest_checkpoint, random_state, restore_random_state, save_checkpoint
from kvbind.train.config import TrainConfig
from kvbind.train.metrics import Metrics
from kvbind.train.optimizer import learning_rate, make_optimizer

Model = TypeVar("Model", bound=nn.Module, contravariant=True)


class TrainingStoppedError(RuntimeError):
    """Too many steps in a row had a non-finite loss or gradient."""


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        step: optimizer steps, skipped ones included.
        skipped: steps whose loss or gradient was not finite.
        skipped_in_a_row: those since the last finite one.
        units: tokens, images or whatever the task counts, in finite steps.
        seconds: spent in steps; evaluations and checkpoints aside.
        position: where the data go on.
        held_out: the last evaluation.
    """

    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    units: int = 0
    seconds: float = 0.0
    position: dict[str, Any] | None = None
    held_out: dict[str, Any] = field(default_factory=dict)


class Task(Protocol[Model]):
    """What the loop asks of a task: batches, a loss, and an evaluation."""

    unit: str
    """What the size of a batch counts, such as "tokens"."""

    def batches(self, position: dict[str, Any] | None) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Endless batches (pytrees of tensors), each with the position behind it: plain data to go on from."""
        ...

    def size(self, batch: Any) -> int:
        """How many units a batch holds."""
        ...

    def loss(self, model: Model, batch: Any) -> Tensor:
        """The loss of one batch, a scalar."""
        ...

    def evaluate(self, model: Model) -> dict[str, Any]:
        """Held-out metrics, the first of them the one to show; called without gradients, under the run's precision."""
        ...


def train(
    model: nn.Module,
    task: Task[Any],
    config: TrainConfig,
    folder: Path,
    watch: Watch | None = None,
) -> Progress:
    """Train `model` on `task`, or go on from the newest checkpoint in `folder`.

    Args:
        model: any module; moved to the device. In the end it holds the weights that were evaluated.
        task: its data, loss and evaluation.
        config: how.
        folder: of the run; metrics and checkpoints go there.
        watch: told of every step; `kvbind.train.bars.progress_bars` makes one that draws.

    Returns:
        What was done, over all interruptions; its `held_out` is the evaluation after the last step.

    Raises:
        TrainingStoppedError: `config.max_skipped` steps in a row were not finite.
    """
    device = pick_device(config.device)
    model.to(device).train()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
    optimizer = make_optimizer(model, config)
    folder.mkdir(parents=True, exist_ok=True)

    average = averaged(model, config.ema) if config.ema else None
    evaluated = model if average is None else average.module

    done = Progress()
    saved = latest_checkpoint(folder)
    resumed = saved is not None
    if saved is not None:
        evaluated.load_state_dict(saved["model"])
        if average is not None:
            model.load_state_dict(saved["trained"])
            average.n_averaged.fill_(saved["averaged"])
        optimizer.load_state_dict(saved["optimizer"])
        restore_random_state(saved["random"])
        done = Progress(**saved["done"])
    del saved  # as large as the model and its optimizer together
    batches = task.batches(done.position)
    last_saved = time.monotonic()

    with closing(Metrics(folder, done.step, config.tensorboard)) as metrics:
        if not resumed:
            done.held_out = evaluate(evaluated, task, config, device)
            metrics.write(0, **{f"held_out/{name}": value for name, value in done.held_out.items()})

        while done.step < config.steps:
            started = time.perf_counter()
            rate = learning_rate(config, done.step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss, size = torch.zeros((), device=device), 0
            buffers = [x.clone() for x in model.buffers()]
            for _ in range(config.accumulate):
                batch, done.position = next(batches)
                batch = to_device(batch, device)
                with precision(config, device):
                    part = task.loss(model, batch) / config.accumulate
                part.backward()
                loss, size = loss + part.detach(), size + task.size(batch)
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip)

            # one transfer for both numbers, as each would make a GPU wait
            loss_value, norm_value = torch.stack([loss.float(), norm.float()]).tolist()
            finite = math.isfinite(loss_value) and math.isfinite(norm_value)
            if finite:
                optimizer.step()
                if average is not None:
                    average.update_parameters(model)
                done.units, done.skipped_in_a_row = done.units + size, 0
            else:
                for buffer, before in zip(model.buffers(), buffers, strict=True):
                    buffer.copy_(before)
                done.skipped, done.skipped_in_a_row = done.skipped + 1, done.skipped_in_a_row + 1
            optimizer.zero_grad(set_to_none=True)
            took = time.perf_counter() - started
            done.step, done.seconds = done.step + 1, done.seconds + took

            metrics.write(
                done.step,
                loss=loss_value if finite else None,
                learning_rate=rate,
                gradient_norm=norm_value if finite else None,
                skipped=done.skipped,
                seconds=round(done.seconds, 3),
                **{f"{task.unit}_per_second": round(size / took, 1)},
            )
            if watch is not None:
                watch(done.step, f"loss {loss_value:.3f}  {size / took:,.0f} {task.unit}/s")
            if done.skipped_in_a_row >= config.max_skipped:
                raise TrainingStoppedError(
                    f"stopped at step {done.step}: loss or gradient not finite in {done.skipped_in_a_row} steps in a row "
                    f"(last loss {loss_value}, gradient norm {norm_value}); a lower train.learning_rate, a longer "
                    "train.warmup or train.precision=float32 may help"
                )
            last = done.step == config.steps
            if last or every(config.evaluate_every, done.step):
                done.held_out = evaluate(evaluated, task, config, device)
                metrics.write(done.step, **{f"held_out/{name}": value for name, value in done.held_out.items()})
            overdue = 0 < 60 * config.checkpoint_minutes <= time.monotonic() - last_saved
            if last or overdue or every(config.checkpoint_every, done.step):
                content: dict[str, Any] = {
                    "model": evaluated.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "random": random_state(),
                    "done": asdict(done),
                }
                if average is not None:
                    content |= {"trained": model.state_dict(), "averaged": int(average.n_averaged)}
                save_checkpoint(folder, done.step, content, config.keep)
                last_saved = time.monotonic()
    if average is not None:
        model.load_state_dict(evaluated.state_dict())
    return done


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential average of a model's weights and buffers, which `update_parameters` moves by one step."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


def every(interval: int, step: int) -> bool:
    """Whether something that happens each `interval` steps (0: never) happens at `step`."""
    return interval > 0 and step % interval == 0


def evaluate(model: nn.Module, task: Task[Any], config: TrainConfig, device: torch.device) -> dict[str, Any]:
    """The task's held-out metrics; leaves the model in training mode, and random numbers as they were."""
    before = random_state()
    model.eval()
    with torch.no_grad(), precision(config, device):
        held_out = task.evaluate(model)
    model.train()
    restore_random_state(before)
    return held_out


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is the current GPU where there is one.

    Raises:
        ValueError: a name that torch does not know.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"train.device must be 'auto' or a torch device such as 'cpu' or 'cuda:0'; got {name!r}") from error


def precision(config: TrainConfig, device: torch.device) -> torch.autocast:
    """The autocast context that `config.precision` means on `device`."""
    low = config.precision == "bfloat16" or (config.precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=low)


def to_device(batch: Any, device: torch.device) -> Any:
    """A pytree with its tensors on `device`."""
    return pytree.tree_map_only(Tensor, lambda x: x.to(device, non_blocking=True), batch)
