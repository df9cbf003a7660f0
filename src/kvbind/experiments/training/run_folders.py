"""What the folder of a training run holds, and how it is opened again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvbind.files import read_tensors, shortened
from kvbind.models import saving
from kvbind.tasks import open_task_module
from kvbind.train import latest_checkpoint
from kvbind.train.config import load_config
from kvbind.train.files import read_json
from kvbind.train.unfinished import CONFIG, RESULT, WEIGHTS, task_of, unfinished

MADE_BY = "# made by: "
"""How the second line of a configuration file begins, where the command that made the run is known."""


def config_header(task: str, made_by: str) -> str:
    """The lines above a run's configuration: its task, and the command that made it.

    Args:
        task: its name.
        made_by: the command; empty where none is known. One that does not fit a line of text is left out.
    """
    return f"# kvbind train {task}\n" + (f"{MADE_BY}{made_by}\n" if made_by and made_by.isprintable() else "")


def result_of(folder: Path) -> dict[str, Any] | None:
    """What the run in a folder came to when it was last finished; None where it never was.

    Raises:
        ValueError: a file that is no run's result.
    """
    path = folder / RESULT
    if not path.is_file():
        return None
    result = read_json(path)
    if not isinstance(result, dict) or not isinstance(result.get("steps"), int):
        raise ValueError(f"{path} must be a run's result, with its steps; it holds {shortened(result)}")
    return result


def exported(folder: Path) -> bool:
    """Whether a run has left its model."""
    return any((folder / WEIGHTS / name).is_file() for name in (saving.WEIGHTS, saving.INDEX))


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
    """The model that a finished run has left in `model/`, on the CPU.

    Raises:
        ValueError: a run that is not finished, or a task whose model has other parameters than the run's.
    """
    if not exported(folder):
        raise ValueError(f"run must be finished; {unfinished(folder)}")
    weights = {name: x for path in saving.weight_files(folder / WEIGHTS) for name, x in read_tensors(path)[0].items()}
    return with_weights(task.build(), weights, folder)


def trained_model(folder: Path, task: Any) -> Any:
    """The model of one's own run as its newest checkpoint has it, on the CPU."""
    saved = latest_checkpoint(folder, ("model",))
    if saved is None:
        raise ValueError(f"run must have a checkpoint; {str(folder)!r} has none")
    return with_weights(task.build(), saved["model"], folder)


def with_weights(model: Any, weights: dict[str, Any], folder: Path) -> Any:
    """A model in evaluation mode, with the weights that a run in `folder` has left."""
    own = model.state_dict()
    # of tensors that are one, a file holds one
    held = {x.data_ptr() for name, x in own.items() if name in weights}
    shapes = {name: tuple(x.shape) for name, x in own.items() if name in weights or x.data_ptr() not in held}
    differing = sorted(shapes.items() ^ {name: tuple(x.shape) for name, x in weights.items()}.items())
    if differing:
        raise ValueError(
            f"the configuration's edits must leave the parameters that {str(folder)!r} was trained with; "
            f"{differing[0][0]} differs"
        )
    model.load_state_dict(weights, strict=False)
    return model.eval()
