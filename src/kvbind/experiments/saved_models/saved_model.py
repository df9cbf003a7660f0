"""A saved model of any family with the task that it is for: what a training run has left, or a folder of a model alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvbind.experiments.training.run_folders import CONFIG, WEIGHTS, exported, open_run
from kvbind.models.carry import layers_of
from kvbind.models.lact import LactForCausalLM
from kvbind.models.lact_nvs import LactNvs
from kvbind.models.opening import open_exported
from kvbind.models.vittt import VitttForImageClassification
from kvbind.tasks import open_task_module
from kvbind.tasks.start import StartConfig
from kvbind.train.config import edited
from kvbind.train.unfinished import unfinished

TASK_OF: dict[type, str] = {LactForCausalLM: "language", VitttForImageClassification: "images", LactNvs: "views"}
"""What each family is trained on."""


@dataclass(frozen=True)
class Saved:
    """A saved model.

    Attributes:
        task: its task's name.
        config: of that task, everything spelled out: as it was trained, or as its folder describes it, with edits.
        folder: the model's own, with `config.json` and weights.
        model: on the CPU, in evaluation mode, float32.
    """

    task: str
    config: Any
    folder: Path
    model: Any

    def open_task(self, training: bool) -> Any:
        """Its task.

        Args:
            training: whether training data will be read.

        Raises:
            ValueError, OSError, ImportError: as the task does whose data cannot be opened; or data or edits that ask for a
                model of other sizes.
        """
        opened = open_task_module(self.task).Task(self.config, training=training)
        with torch.device("meta"):
            wanted = {name: list(x.shape) for name, x in opened.build().state_dict().items()}
        own = {name: list(x.shape) for name, x in self.model.state_dict().items()}
        for name in own.keys() | wanted.keys():
            if own.get(name) != wanted.get(name):
                raise ValueError(
                    f"data and edits must leave the model in {str(self.folder)!r} as it is; its {name} is "
                    f"{own.get(name, 'not there')}, and {wanted.get(name, 'none')} is asked for"
                )
        return opened


def open_saved(where: Path, data: str | None = None, overrides: Sequence[str] = ()) -> Saved:
    """Open a saved model, and say what it is trained and evaluated on.

    Args:
        where: the folder of a finished training run or its `model/`, or of a model of this library, such as
            `kvbind convert` writes.
        data: what to take it on, as `data.source`; default what the run was trained on. Of a model alone nobody knows.
        overrides: further `key=value` edits of the run's configuration.

    Raises:
        ValueError: a folder that holds no such model, or one of another family or without fast weights, a run that is not
            finished, no data where none are known, or edits that do not fit.
        OSError: a file that cannot be read.
    """
    if data == "":
        raise ValueError(f"data must name a file, a folder or hub:NAME; got {data!r}")
    home = where.parent if where.name == WEIGHTS and (where.parent / CONFIG).is_file() else where
    run = (home / CONFIG).is_file()
    folder = home / WEIGHTS if run else where
    if run and not exported(home):
        raise ValueError(f"model must be of a finished run; {unfinished(home)}")
    if not folder.is_dir():
        raise ValueError(f"model must be the folder of a training run or of a model; there is no {str(where)!r}")
    model = open_exported(folder).float()
    if type(model) not in TASK_OF:
        known = ", ".join(kind.__name__ for kind in TASK_OF)
        raise ValueError(f"model must be one of {known}; {str(folder)!r} holds a {type(model).__name__}")
    if not layers_of(model):
        raise ValueError(f"model must have fast weights; {str(folder)!r} holds one without")
    task = TASK_OF[type(model)]
    module = open_task_module(task)
    if run:
        trained_on, config = open_run(home)
        if trained_on != task:
            raise ValueError(
                f"model must be of a run of {', '.join(TASK_OF.values())}; {str(home)!r} is one of {trained_on!r}"
            )
    else:
        config = module.describe(model, folder)
    # what it once started from is in its weights
    config.start = StartConfig()
    chosen = any(edit.startswith(("data.source=", "data.held_out_source=")) for edit in overrides)
    if data is not None:
        config.data.source = data
        if getattr(config.data, "held_out_source", None) is not None:
            config.data.held_out_source = None
    elif not run and not chosen:
        raise ValueError(
            f"data must name what to take the model on (--data), as {str(folder)!r} does not say what it was trained on; "
            f"{module.Config().data.source!r} would be at hand"
        )
    return Saved(task, module.resolve(edited(config, overrides)), folder, model)
