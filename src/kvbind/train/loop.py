"""The training loop, from the first line of this file to the last.

A step: `accumulate` batches forward and backward, one clipped AdamW step at the schedule's rate (`kvbind.train.step`), and
one line of metrics. A step whose loss or gradient is not finite, or that would leave such weights, changes nothing, no
running statistics either, and is counted. Every so often a checkpoint holds all that the next step depends on, so that a run
that was interrupted goes on exactly as if it had not been.
Where an average of the weights is kept, it is what evaluations see, what a checkpoint calls "model", and what is left in the
model in the end.

Several processes, started by `torchrun`, take the steps that a single one would: they divide the rows of each step among
them, gradients are means over all, and every decision follows from numbers that all of them have.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from kvbind.hardware import peak_flops
from kvbind.inner.value import unchecked_values
from kvbind.train.average import Average, local
from kvbind.train.bars import BEFORE, RESUMED, Watch
from kvbind.train.checkpoint import (
    Saver,
    empty_optimizer_state,
    load_into,
    newest_whole,
    optimizer_tensors,
    part_ways,
    random_state,
    random_states,
    read_plain,
    restore_random_state,
    restore_random_states,
)
from kvbind.train.config import TrainConfig, step_at
from kvbind.train.memory import initial, keep_what_fits
from kvbind.train.metrics import Metrics, Silence
from kvbind.train.optimizer import learning_rate, make_optimizer
from kvbind.train.parallel import Distributed, MeshLayout, reshard
from kvbind.train.ranks import WHOLE, Share, barrier, connected, from_all, rank, ranks, united
from kvbind.train.recompute import recompute
from kvbind.train.step import TrainingStep, in_bfloat16, precision

Model = TypeVar("Model", bound=nn.Module, contravariant=True)


log = logging.getLogger("kvbind.train")


class TrainingStoppedError(RuntimeError):
    """Too many steps in a row were skipped, as their numbers were not finite."""


class EndedEarlyError(RuntimeError):
    """A run was asked to end before its last step, and has left a checkpoint."""


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        step: optimizer steps, skipped ones included.
        skipped: steps whose loss, gradient or new weights were not finite.
        skipped_in_a_row: those since the last finite one.
        units: tokens, images or whatever the task counts, in finite steps.
        seconds: spent in steps; evaluations and checkpoints aside.
        position: where the data go on.
        held_out: the last evaluation.
        lengths: `[step, steps]`: how long the run was to be, from which step on; more than one where that was raised.
    """

    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    units: int = 0
    seconds: float = 0.0
    position: dict[str, Any] | None = None
    held_out: dict[str, Any] = field(default_factory=dict)
    lengths: list[list[int]] = field(default_factory=list)


class Task(Protocol[Model]):
    """What the loop asks of a task: batches, a loss, and an evaluation.

    A task whose samples are sequences may have a method `cut(batch, group)`, for ranks that divide each sequence: it gives
    this rank's part of a batch, and a context in which the parts' losses add up to that of the whole. By a method
    `flops(model)`, the operations that a unit takes in training, the utilization of GPUs is known.

    What takes long and is done once, such as making its data, a task may do in a method `make_ready(device, tell)`, which is
    called before the first batch and evaluation; `tell` takes what to show meanwhile.

    A step that is replayed as a CUDA graph depends on a batch's tensors alone. Where a loss depends on something else, such
    as a seed, a method `prepare(batch, device)` makes a batch of which that is no longer so, and `loss` takes both kinds.
    What is no tensor in it must have few values. A method `uncapturable(batch)` says why a batch is not captured, or None.
    """

    unit: str
    """What the size of a batch counts, such as "tokens"."""

    batch: int
    """Rows of a batch, which data ranks may divide."""

    def batches(self, position: dict[str, Any] | None, share: Share = WHOLE) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Endless batches (pytrees of tensors), each with the position behind it: plain data to go on from.

        The shares of all data ranks make up what `WHOLE` is. At the end of a step their positions, united key by key, are
        one from which any number of ranks can go on.
        """
        ...

    def size(self, batch: Any) -> int:
        """How many units a batch holds."""
        ...

    def weight(self, batch: Any) -> float:
        """How much the loss of a batch counts beside others of its step: in proportion to what it is a mean over."""
        ...

    def loss(self, model: Model, batch: Any) -> Tensor:
        """The loss of one batch, a scalar."""
        ...

    def evaluate(self, model: Model, share: Share = WHOLE) -> dict[str, Any]:
        """Held-out metrics, the first of them the one to show; called without gradients, under the run's precision.

        Every rank calls `model` equally often, and returns the same: metrics of all shares together.
        """
        ...

    def blocks(self, model: Model) -> Iterable[nn.Module]:
        """The model's repeated parts, which are sharded and checkpointed one by one."""
        ...


def train(
    model: nn.Module,
    task: Task[Any],
    config: TrainConfig,
    folder: Path,
    watch: Watch | None = None,
    begin: Callable[[], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> Progress:
    """Train `model` on `task`, or go on from the newest checkpoint in `folder`.

    Under `torchrun` every process calls this with the same arguments.

    Args:
        model: any module, the same on every process; moved to the device. In the end it holds the weights that were
            evaluated, in shards (DTensors) where `config.parallel` shards it.
        task: its data, loss and evaluation.
        config: steps, optimizer, precision, checkpoints and meshes.
        folder: of the run; metrics and checkpoints go there. All processes must see the same.
        watch: told of every step, of the one that a run goes on from, and of what is done before;
            `kvbind.train.bars.progress_bars` makes one that draws.
        begin: called by the first process when everything else has been checked, before anything of the run is read.
        stop: asked at every step whether it is to be the last, behind which a checkpoint is left; the first process's
            answer counts.

    Returns:
        What was done, over all interruptions; its `held_out` is the evaluation after the last step.

    Raises:
        EndedEarlyError: `stop` said so.
        TrainingStoppedError: `config.max_skipped` steps in a row were not finite.
        ValueError: processes among which a step's rows cannot be divided, or checkpoints of which not one is whole.
        OSError: a checkpoint or the metrics could not be written, as on a full disk; earlier ones are as they were.
    """
    with connected(config.device), unchecked_values():
        return _train(model, task, config, folder, watch, begin, stop)


def _train(
    model: nn.Module,
    task: Task[Any],
    config: TrainConfig,
    folder: Path,
    watch: Watch | None,
    begin: Callable[[], None] | None,
    stop: Callable[[], bool] | None,
) -> Progress:
    device = pick_device(config.device)
    if device.type == "cuda":
        if device.index is not None:
            torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
    if config.gather == "bfloat16" and not in_bfloat16(config, device):
        raise ValueError(f"train.gather must be float32 where products are; got {config.gather!r} with {config.precision!r}")
    layout = MeshLayout.of(config.parallel, device)
    sequences = layout.sequence[1]
    cut = getattr(task, "cut", None)
    if sequences > 1 and cut is None:
        raise ValueError(f"train.parallel.sequence must be 1 for a task whose samples are not cut; got {sequences}")
    share = layout.share(task.batch, config.accumulate)

    average = Average(model, config.ema) if config.ema else None
    if average is not None:
        Distributed(average.module, task.blocks(average.module), layout, config, device, trained=False)
    evaluated = model if average is None else average.module
    recomputed = recompute(task.blocks(model), initial(config.activation_checkpointing, device))
    together = Distributed(model.train(), task.blocks(model), layout, config, device)
    optimizer = make_optimizer(model, config)
    fastest = peak_rate(task, model, device)
    first = rank() == 0
    if first:
        folder.mkdir(parents=True, exist_ok=True)
        if begin is not None:
            begin()
    barrier()

    def state() -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds of tensors, in place."""
        trained = {} if average is None else {"trained": model.state_dict()}
        return {"model": evaluated.state_dict(), "optimizer": optimizer_tensors(model, optimizer), **trained}

    on_the_way = {step_at(fraction, config.steps) for fraction in config.evaluate_at}
    done = Progress()
    path, broken = newest_whole(folder)
    if path is None:
        part_ways(layout.data[0])
    else:
        plain = read_plain(path)
        empty_optimizer_state(model, optimizer, path)
        load_into(path, state())
        if average is not None:
            average.updates = plain["averaged"]
        done = Progress(**plain["done"])
        restore_random_states(plain["random"], layout.data[0])
        if watch is not None:
            watch(done.step, RESUMED)
    if not done.lengths or done.lengths[-1][1] != config.steps:
        done.lengths.append([done.step, config.steps])
    make_ready = getattr(task, "make_ready", None)
    if make_ready is not None:

        def tell(note: str) -> None:
            if watch is not None:
                watch(done.step, BEFORE + note)

        make_ready(device, tell)
    batches = task.batches(done.position, share)
    step = TrainingStep(model, together, task, config, optimizer, average, batches, share, device)
    if config.activation_checkpointing == "auto" and recomputed:
        keep_what_fits(step, recomputed)
    last_saved = time.monotonic()

    with (
        closing(Saver(folder, config.keep, broken)) as saver,
        closing(Metrics(folder, done.step, config.tensorboard) if first else Silence()) as metrics,
    ):
        if path is None:
            done.held_out = evaluate(evaluated, task, config, device, share)
            metrics.write(0, **{f"held_out/{name}": value for name, value in done.held_out.items()})

        alone = ranks() == 1
        while done.step < config.steps:
            started = time.perf_counter()
            rate = learning_rate(config, done.step)
            # a time without end asks for the last checkpoint, of all processes alike
            unsaved = math.inf if stop is not None and stop() else time.monotonic() - last_saved
            found = step(rate, unsaved, more=done.step + 1 < config.steps)
            done.position = found.position
            if found.finite:
                done.units, done.skipped_in_a_row = done.units + round(found.size), 0
            else:
                done.skipped, done.skipped_in_a_row = done.skipped + 1, done.skipped_in_a_row + 1
            took = time.perf_counter() - started
            done.step, done.seconds = done.step + 1, done.seconds + took

            metrics.write(
                done.step,
                loss=found.loss if found.finite else None,
                learning_rate=rate,
                gradient_norm=found.norm if found.finite else None,
                skipped=done.skipped,
                seconds=round(done.seconds, 3),
                **{f"{task.unit}_per_second": round(found.size / took, 1)},
                data_wait=round(found.waited / took, 4),
                **({"mfu": round(found.size / took / fastest, 4)} if fastest else {}),
                **({"peak_memory_gib": round(found.peak, 3)} if device.type == "cuda" else {}),
            )
            unheard: BaseException | None = None
            if watch is not None:
                try:
                    watch(done.step, f"loss {found.loss:.3f}  {found.size / took:,.0f} {task.unit}/s")
                except (OSError, SystemExit) as error:  # a full disk or a closed pipe, at which rich ends the process
                    if not alone:
                        raise
                    unheard = error
            if done.skipped_in_a_row >= config.max_skipped:
                raise TrainingStoppedError(
                    f"stopped at step {done.step}: loss, gradient or new weights not finite in {done.skipped_in_a_row} "
                    f"steps in a row (last loss {found.loss}, gradient norm {found.norm}); a lower train.learning_rate, a "
                    "longer train.warmup or train.precision=float32 may help"
                )
            last = done.step == config.steps
            if last or done.step in on_the_way or every(config.evaluate_every, done.step):
                done.held_out = evaluate_beside(step, evaluated, share)
                metrics.write(done.step, **{f"held_out/{name}": value for name, value in done.held_out.items()})
            # by the first process's clock, and as it was told: all must agree
            unsaved = time.monotonic() - last_saved if alone else found.unsaved
            ending = math.isinf(found.unsaved) or (alone and stop is not None and stop()) or unheard is not None
            overdue = 0 < 60 * config.checkpoint_minutes <= unsaved
            if last or ending or overdue or every(config.checkpoint_every, done.step):
                done.position = united(from_all(done.position))
                metrics.sync()
                plain = {"done": asdict(done), "random": random_states()}
                saver.save(done.step, state(), plain | ({} if average is None else {"averaged": average.updates}))
                last_saved = time.monotonic()
            if unheard is not None:
                raise unheard
            if ending and not last:
                raise EndedEarlyError(f"{folder} was stopped after step {done.step} of {config.steps}")
    if average is not None:
        with torch.no_grad():
            for mine, theirs in zip(model.state_dict().values(), evaluated.state_dict().values(), strict=True):
                local(mine).copy_(local(theirs))
    return done


def peak_rate(task: Task[Any], model: nn.Module, device: torch.device) -> float | None:
    """Units per second at which all GPUs would compute at their peak, which model FLOP utilization (MFU) is a fraction of.

    Returns:
        None where the task does not tell its operations, or the GPU's peak is not known.
    """
    flops = getattr(task, "flops", None)
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return ranks() * peak / flops(model) if peak and flops is not None else None


def every(interval: int, step: int) -> bool:
    """Whether something that happens each `interval` steps (0: never) happens at `step`."""
    return interval > 0 and step % interval == 0


def evaluate(
    model: nn.Module, task: Task[Any], config: TrainConfig, device: torch.device, share: Share = WHOLE
) -> dict[str, Any]:
    """The task's held-out metrics; leaves the model in training mode, and random numbers as they were."""
    before = random_state()
    model.eval()
    try:
        with torch.no_grad(), precision(config, device), unchecked_values():
            return task.evaluate(model, share)
    finally:
        reshard(model)
        model.train()
        restore_random_state(before)


def evaluate_beside(step: TrainingStep, model: nn.Module, share: Share) -> dict[str, Any]:
    """As `evaluate`, of a run whose captured steps give up their memory where there is not enough."""
    try:
        return evaluate(model, step.task, step.config, step.device, share)
    except torch.OutOfMemoryError:
        # what failed lives as long as its error
        if not step.release():
            raise
    log.info("captured steps gave up their memory for an evaluation")
    return evaluate(model, step.task, step.config, step.device, share)


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is the current GPU where there is one.

    Raises:
        ValueError: a name that torch does not know, or a GPU where there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"train.device must be 'auto' or a torch device such as 'cpu' or 'cuda:0'; got {name!r}") from error
    gpus = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise ValueError(f"train.device must be a device of this machine, which has {gpus} GPUs for PyTorch; got {name!r}")
    return device
