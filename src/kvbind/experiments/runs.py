"""Training runs that experiments share: one folder per configuration, trained once."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvbind.experiments.provenance import machine, versions
from kvbind.models.saving import without_bars
from kvbind.tasks import open_task_module
from kvbind.tasks.contents import accepted, check_unchanged
from kvbind.train import latest_checkpoint, train
from kvbind.train.bars import Watch
from kvbind.train.checkpoint import checkpoints, write_text
from kvbind.train.config import TrainConfig, config_hash, load_config, to_plain, to_yaml, what_matters
from kvbind.train.loop import pick_device
from kvbind.train.metrics import read_metrics
from kvbind.train.parallel import is_sharded
from kvbind.train.ranks import connected, rank, ranks, restarted

CONFIG, RESULT, WEIGHTS = "config.yaml", "result.json", "model"

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

    def losses(self) -> list[float | None]:
        """The training loss of each step, None for a skipped one."""
        return [row["loss"] for row in read_metrics(self.folder) if "loss" in row]


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
                yield json.loads(path.read_text(encoding="utf-8"))["data"]


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
    accept_changed_data: bool = False,
) -> Run:
    """Train a configuration in `folder`, or go on where an interruption left it, or read what it came to.

    Args:
        task: its name.
        config: of that task.
        folder: of the run.
        watch: told of every step.
        deadline: by `time.monotonic`, when to leave a checkpoint and end; None for never.
        accept_changed_data: go on with other data than the run was trained on, and write that down in its folder.

    Raises:
        OutOfTimeError: the deadline came first.
        ValueError: the folder holds a run of another configuration, or one whose data have changed since, or another process
            trains in it.
        TrainingStoppedError: as `kvbind.train.train`.
    """
    check_same_config(task, config, folder)
    if (folder / RESULT).is_file():
        return Run(folder, json.loads((folder / RESULT).read_text(encoding="utf-8")), reused=True)
    if deadline is not None and time.monotonic() >= deadline:
        raise OutOfTimeError(f"{folder} was not finished in time; the same command goes on with it")
    opened = open_task_module(task).Task(config)
    model = opened.build()
    how = replace(config.train)
    with connected(config.train.device):
        first, processes = rank() == 0, ranks()
        folder.mkdir(parents=True, exist_ok=True)
        with only_one(folder) if first else nullcontext():
            if first:
                check_unchanged(folder, opened.contents(), checkpoints(folder), accept_changed_data)
                write_text(folder / CONFIG, f"# kvbind train {task}\n{to_yaml(config)}")
            done = train(model, opened, how, folder, watch if deadline is None else ending(how, folder, deadline, watch))
            if first:
                with without_bars():
                    opened.save(load_model(folder, opened) if is_sharded(model) else model, folder / WEIGHTS)
    untrained = next((row for row in read_metrics(folder) if row["step"] == 0), {})
    result = {
        "task": task,
        "held_out": done.held_out,
        "untrained": {name.removeprefix("held_out/"): x for name, x in untrained.items() if name.startswith("held_out/")},
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": done.step,
        "skipped": done.skipped,
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
        write_text(folder / RESULT, json.dumps(result, indent=2) + "\n")
    return Run(folder, result, reused=False)


def ending(config: TrainConfig, folder: Path, deadline: float, watch: Watch | None) -> Watch:
    """What watches a run that ends at a deadline: a checkpoint behind the first step after it, and no step more.

    Args:
        config: the run's own, which is edited to ask for that checkpoint.
        folder: of the run.
        deadline: by `time.monotonic`.
        watch: told of every step.
    """
    overdue = False

    def own(step: int, note: str) -> None:
        nonlocal overdue
        if watch is not None:
            watch(step, note)
        if overdue and step < config.steps:
            raise OutOfTimeError(f"{folder} was stopped in time behind step {step - 1}; the same command goes on with it")
        if time.monotonic() >= deadline:
            config.checkpoint_minutes, overdue = 1e-9, True

    return own


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold a run's folder against other processes; the system lets go of it however this one ends.

    Raises:
        ValueError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows, where nothing is held
        yield
        return
    # readers that a killed process has left behind hold its lock until they notice, some seconds later
    until = time.monotonic() + (PATIENCE if restarted() else 0)
    with (folder / ".lock").open("w") as file:
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


def check_same_config(task: str, config: Any, folder: Path) -> None:
    """Raise `ValueError` where `folder` holds a run of another task, or of a configuration that differs in what matters."""
    path = folder / CONFIG
    if not path.is_file():
        return
    if (held := task_of(path)) not in (task, None):
        raise ValueError(f"{folder} holds a run of task {held!r}; name another folder")
    old, new = (flatten(what_matters(x)) for x in (load_config(type(config), path), config))
    changed = [f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in {**old, **new} if old.get(key) != new.get(key)]
    if changed:
        raise ValueError(f"{folder} holds a run of another configuration ({'; '.join(changed)}); name another folder")


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested dicts, by dotted key."""
    if not isinstance(tree, dict):
        return {prefix.rstrip("."): tree}
    return {key: value for name, sub in tree.items() for key, value in flatten(sub, f"{prefix}{name}.").items()}


def discard(folder: Path) -> None:
    """Delete a run, if it is one."""
    if (folder / CONFIG).is_file():
        shutil.rmtree(folder)


def task_of(config: Path) -> str | None:
    """The task that a run's configuration file names in its first line; None of a file that names none."""
    head, mark, task = config.read_text(encoding="utf-8").partition("\n")[0].partition("# kvbind train ")
    return task.strip() if mark and not head else None


def open_run(folder: Path, overrides: Sequence[str] = ()) -> tuple[str, Any]:
    """The task's name and the configuration of a run.

    Raises:
        ValueError: a folder that holds no run.
    """
    path = folder / CONFIG
    task = task_of(path) if path.is_file() else None
    if task is None:
        raise ValueError(f"run must be the folder of a training run, which holds {CONFIG}; got {str(folder)!r}")
    return task, load_config(open_task_module(task).Config, path, overrides)


def load_model(folder: Path, task: Any) -> Any:
    """The model of a run as its newest checkpoint has it, on the CPU.

    Raises:
        ValueError: a run without checkpoints yet, or a task whose model has other parameters than the run's.
    """
    saved = latest_checkpoint(folder, ("model",))
    if saved is None:
        raise ValueError(f"run must have a checkpoint; {str(folder)!r} has none yet")
    model, weights = task.build(), saved["model"]
    shapes = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    differing = sorted(shapes.items() ^ {name: tuple(x.shape) for name, x in weights.items()}.items())
    if differing:
        raise ValueError(
            f"the configuration's edits must leave the parameters that {str(folder)!r} was trained with; "
            f"{differing[0][0]} differs"
        )
    model.load_state_dict(weights)
    return model.eval()
