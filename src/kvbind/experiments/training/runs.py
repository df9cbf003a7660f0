"""Training runs that experiments share: one folder per configuration, trained once."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvbind.experiments.training.run_folders import (
    CONFIG,
    RESULT,
    WEIGHTS,
    config_header,
    exported,
    open_run,
    result_of,
    task_of,
    trained_model,
)
from kvbind.models.saving import without_bars
from kvbind.provenance import machine, versions
from kvbind.screen import duration
from kvbind.tasks import open_task_module
from kvbind.tasks.contents import RECORD, accepted, check_unchanged
from kvbind.train import train
from kvbind.train.bars import Watch
from kvbind.train.checkpoint import checkpoints, put_aside
from kvbind.train.config import config_hash, load_config, to_plain, to_yaml, what_matters
from kvbind.train.files import open_own, read_json, to_json, write_folder, write_text
from kvbind.train.interrupt import noted_interrupts
from kvbind.train.loop import EndedEarlyError, pick_device
from kvbind.train.metrics import FILE, read_metrics
from kvbind.train.parallel import is_sharded
from kvbind.train.ranks import barrier, connected, rank, ranks, restarted

START = 10
"""Steps that compile and tune, whose speed does not count; no more than a quarter of all."""

STEPS = "train.steps"
"""The one key of what matters that may change, upwards, while a run stays where it is."""

PATIENCE = 60
"""Seconds that a run which `torchrun` has started anew waits for its folder."""


@dataclass(frozen=True)
class Run:
    """A finished training run.

    Attributes:
        folder: configuration, metrics, checkpoints, and the trained model in `model/`.
        result: held-out metrics, steps, seconds, versions and machine.
        reused: whether it was finished before it was asked for.
    """

    folder: Path
    result: dict[str, Any]
    reused: bool

    @property
    def time_note(self) -> str:
        """How long it was trained, for people: the seconds of its steps alone, or that it was finished earlier."""
        return "finished earlier" if self.reused else f"{duration(self.result['training_seconds'])} of training alone"

    def speed(self, unit: str) -> float:
        """Units per second of the median step, those aside that compile and tune.

        Args:
            unit: what the task counts, such as "tokens". Of a run whose metrics are not here, all steps count together.
        """
        rates = [row[f"{unit}_per_second"] for row in read_metrics(self.folder) if f"{unit}_per_second" in row]
        if not rates:
            return float(self.result[unit] / self.result["training_seconds"])
        return statistics.median(rates[min(START, len(rates) // 4) :])

    def losses(self) -> list[float | None]:
        """The training loss of each step, None for one that was skipped or whose line was lost."""
        known = {row["step"]: row["loss"] for row in read_metrics(self.folder) if "loss" in row}
        return [known.get(step) for step in range(1, max(known, default=0) + 1)]


class InterruptedRunError(KeyboardInterrupt):
    """A run was interrupted, by Ctrl-C or a signal, and has left a checkpoint."""


class OutOfTimeError(RuntimeError):
    """A run was to end before it was finished; it goes on from its checkpoint."""


class Fingerprints:
    """What tells data apart, read once for each: runs that differ in their model alone share them.

    Args:
        trained: a folder of runs. Where data are not on this machine, what a finished run there has recorded of the same
            ones counts, so that runs which were trained elsewhere are found.
    """

    def __init__(self, trained: Path | None = None) -> None:
        self.trained = trained
        self._known: dict[str, dict[str, str]] = {}

    def of(self, task: str, config: Any) -> dict[str, str]:
        """The fingerprint of the data of a task's configuration.

        Raises:
            ValueError, OSError, ImportError: as the task does that cannot open its data, of which no finished run tells.
        """
        data = to_plain(config).get("data")
        key = json.dumps([task, data], sort_keys=True)
        if key not in self._known:
            try:
                self._known[key] = open_task_module(task).Task(config).fingerprint()
            except (ValueError, OSError, ImportError):
                recorded = next(self._recorded(task, data), None)
                if recorded is None:
                    raise
                self._known[key] = recorded
        return self._known[key]

    def _recorded(self, task: str, data: Any) -> Iterator[dict[str, str]]:
        """The fingerprints that finished runs on the same data have recorded."""
        for path in sorted(self.trained.glob(f"{task}-*/{RESULT}")) if self.trained else ():
            if to_plain(open_run(path.parent)[1]).get("data") == data:
                yield read_json(path)["data"]


def run_name(task: str, config: Any, known: Fingerprints | None = None) -> str:
    """A folder name that differs where anything differs that the result depends on, the data themselves included.

    Args:
        task: its name.
        config: of that task.
        known: fingerprints of data that were read already.
    """
    data = (known or Fingerprints()).of(task, config)
    return f"{task}-{config_hash([what_matters(config), data])}"


def train_run(
    task: str,
    config: Any,
    folder: Path,
    watch: Watch | None = None,
    deadline: float | None = None,
    fresh: bool = False,
    accept_changed_data: bool = False,
    begun: Callable[[int], None] | None = None,
    made_by: str = "",
) -> Run:
    """Train a configuration in `folder`, or go on where an interruption left it, or read what it came to.

    A run whose `train.steps` is raised goes on from its last checkpoint, at the rates of the longer schedule from there on;
    `lengths` in its result says so.

    Args:
        task: its name.
        config: of that task.
        folder: of the run.
        watch: told of every step.
        deadline: by `time.monotonic`, when to leave a checkpoint and end; None for never.
        fresh: begin anew. An earlier run of the task in the folder, of whatever configuration, is put aside when everything
            else has been checked, and removed when the new one has a checkpoint.
        accept_changed_data: go on with other data than the run was trained on, and write that down in its folder.
        begun: called by the first process with the number of the model's parameters when everything has been checked and
            training begins; not of a finished run.
        made_by: the command line that the run is made by, for its configuration file; empty where there is none.

    Raises:
        InterruptedRunError: Ctrl-C or SIGTERM came first; there is a checkpoint behind the step that was under way.
        OutOfTimeError: the deadline came first.
        ValueError: the folder holds a run of another configuration or something else, or one whose data have changed since,
            or another process trains in it.
        TrainingStoppedError: as `kvbind.train.train`.
    """
    fresh = fresh and not restarted()
    check_folder(task, folder)
    longer = False
    if not fresh:
        try:
            check_same_config(config, folder)
        except ValueError:
            saved = checkpoints(folder)
            # how many steps epochs are follows from the data: where these have changed, that is what to say
            if saved and not accept_changed_data and differences(config, folder).keys() <= {STEPS, "train.warmup"}:
                check_unchanged(folder, open_task_module(task).Task(config).contents(), saved)
            raise
        result = result_of(folder)
        # of a run that was made longer, there is the shorter one's result until it has its own
        longer = result is not None and result["steps"] < config.train.steps
        if result is not None and not longer:
            if deadline is None and not exported(folder) and checkpoints(folder):
                export_again(task, config, folder)
            return Run(folder, result, reused=True)
    if deadline is not None and time.monotonic() >= deadline:
        raise OutOfTimeError(f"{folder} was not finished in time; the same command goes on with it")
    if longer and not checkpoints(folder):
        raise ValueError(
            f"{folder} holds a finished run without a checkpoint to go on from; name another folder, or --fresh"
        )
    opened = open_task_module(task).Task(config)
    model = opened.build()
    parameters = sum(p.numel() for p in model.parameters())

    def begin() -> None:
        check_folder(task, folder)
        if fresh:
            put_aside(folder, (RESULT, WEIGHTS), (FILE, "tensorboard", RECORD, CONFIG))
        check_unchanged(folder, opened.contents(), checkpoints(folder), accept_changed_data)
        write_text(folder / CONFIG, config_header(task, made_by) + to_yaml(config))
        if begun is not None:
            begun(parameters)

    with connected(config.train.device):
        first, processes = rank() == 0, ranks()
        with only_one(folder) if first else nullcontext():
            with noted_interrupts() as interrupted:

                def stop() -> bool:
                    return interrupted() or (deadline is not None and time.monotonic() >= deadline)

                try:
                    done = train(model, opened, config.train, folder, watch, begin, stop)
                except EndedEarlyError as error:
                    kind = InterruptedRunError if interrupted() else OutOfTimeError
                    raise kind(f"{error}, with a checkpoint; the same command goes on from there") from error
            if first:
                export(opened, trained_model(folder, opened) if is_sharded(model) else model, folder)
    untrained = next((row for row in read_metrics(folder) if row["step"] == 0), {})
    result = {
        "task": task,
        "held_out": done.held_out,
        "untrained": {name.removeprefix("held_out/"): x for name, x in untrained.items() if name.startswith("held_out/")},
        "parameters": parameters,
        "steps": done.step,
        "skipped": done.skipped,
        **({"lengths": done.lengths} if len(done.lengths) > 1 else {}),
        "unit": opened.unit,
        opened.unit: done.units,
        "training_seconds": round(done.seconds, 4),
        "data": opened.fingerprint(),
        **({"data_changed_behind": changed} if (changed := accepted(folder)) else {}),
        "versions": versions(),
        "machine": machine(pick_device(config.train.device)),
        **({"processes": processes} if processes > 1 else {}),
    }
    if first:
        write_text(folder / RESULT, to_json(result, indent=2) + "\n")
    return Run(folder, result, reused=False)


def export(task: Any, model: Any, folder: Path) -> None:
    """Write a run's model to its folder, complete and on disk or not at all."""
    with without_bars():
        write_folder(folder / WEIGHTS, lambda partial: task.save(model, partial))


def export_again(task: str, config: Any, folder: Path) -> None:
    """Write a finished run's model, which somebody has deleted, from its last checkpoint."""
    opened = open_task_module(task).Task(config, training=False)
    with connected(config.train.device):
        if rank() == 0:
            with only_one(folder):
                export(opened, trained_model(folder, opened), folder)
        barrier()


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold a run's folder against other processes; the system lets go of it however this one ends.

    Raises:
        ValueError: another process holds it.
        OSError: it cannot be made.
    """
    try:
        import fcntl
    except ImportError:  # Windows, where nothing is held
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(error.errno, f"the run's folder {str(folder)!r} cannot be made: {error.strerror}") from error
    # readers that a killed process has left behind hold its lock until they notice, some seconds later
    until = time.monotonic() + (PATIENCE if restarted() else 0)
    with os.fdopen(open_own(folder / ".lock", os.O_RDWR)) as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > until:
                    raise ValueError(f"another process is training in {folder}") from None
                time.sleep(0.5)
            else:
                break
        yield


def check_folder(task: str, folder: Path) -> None:
    """Raise `ValueError` where `folder` holds a run of another task, or a configuration that no run has written."""
    path = folder / CONFIG
    if not path.is_file():
        if (folder / RESULT).exists() or checkpoints(folder):
            raise ValueError(f"{folder} holds a run without its {CONFIG}; name another folder")
        for name in (WEIGHTS, FILE):
            # a run would write over it at its end, or go on behind it
            if (folder / name).exists() or (folder / name).is_symlink():
                raise ValueError(f"{folder} holds a {name} that is of no run of kvbind; name another folder")
        return
    held = task_of(path)
    if held is None:
        raise ValueError(f"{folder} holds a {CONFIG} that is of no run of kvbind; name another folder")
    if held != task:
        raise ValueError(f"{folder} holds a run of task {held!r}; name another folder")


def check_same_config(config: Any, folder: Path) -> None:
    """Raise `ValueError` where `folder` holds a run that differs in what matters; but `train.steps` may be raised."""
    if not (folder / CONFIG).is_file():
        return
    changed = differences(config, folder)
    if changed and not raised(changed):
        told = "; ".join(f"{key} was {before!r}, is {now!r}" for key, (before, now) in changed.items())
        hint = f" ({STEPS} may be raised, not lowered)" if changed.keys() == {STEPS} else ""
        raise ValueError(f"{folder} holds a run of another configuration ({told}); name another folder{hint}")


def differences(config: Any, folder: Path) -> dict[str, tuple[Any, Any]]:
    """Where a run's configuration differs from `config` in what matters: by dotted key its value, and that of `config`."""
    old, new = (flatten(what_matters(x)) for x in (load_config(type(config), folder / CONFIG), config))
    return {key: (old.get(key), new.get(key)) for key in {**old, **new} if old.get(key) != new.get(key)}


def raised(changed: dict[str, tuple[Any, Any]]) -> bool:
    """Whether what differs is the length alone, and that is more than it was."""
    return changed.keys() == {STEPS} and changed[STEPS][0] < changed[STEPS][1]


def begun_before(task: str, config: Any, folder: Path) -> tuple[Path, int] | None:
    """A run beside a folder that has none yet, which is the same but shorter, or on the same source before its data changed.

    Args:
        task: its name.
        config: of the run that is to begin.
        folder: where it would.

    Returns:
        That run's folder and its steps: the longest, and of several the newest; None where there is none.
    """
    found = []
    for path in () if (folder / CONFIG).is_file() else folder.parent.glob(f"{task}-*/{CONFIG}"):
        with suppress(ValueError, TypeError, OSError):  # what is none, or an earlier version's
            changed = differences(config, path.parent)
            if not changed or raised(changed):
                steps = changed[STEPS][0] if changed else config.train.steps
                found.append((steps, path.stat().st_mtime_ns, path.parent))
    if not found:
        return None
    steps, _, home = max(found)
    return home, steps


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested dicts, by dotted key."""
    if not isinstance(tree, dict):
        return {prefix.rstrip("."): tree}
    return {key: value for name, sub in tree.items() for key, value in flatten(sub, f"{prefix}{name}.").items()}
