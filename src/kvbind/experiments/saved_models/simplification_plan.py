"""What simplifying a saved model comes to: the inner loop it gets, and the run that fine-tunes it."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvbind.experiments.saved_models.saved_model import Saved, open_saved
from kvbind.experiments.training.runs import run_name
from kvbind.inner import InnerLoop
from kvbind.inner.networks import DepthwiseConv
from kvbind.inner.systems import SYSTEMS
from kvbind.inner.systems.registry import named_or_file
from kvbind.inner.value import check_positive_int, nearest
from kvbind.tasks import open_task_module
from kvbind.tasks.inner_loops import edited as edited_inner
from kvbind.tasks.start import StartConfig
from kvbind.train.config import edited

RATE = 0.3
"""The peak of the learning rate, over that of the training before: weights that are good already need less."""

PARTS = 10
"""The fine-tuning is evaluated behind each of so many parts of its steps, rounded up to whole steps."""


@dataclass(frozen=True)
class SimplificationPlan:
    """What is to be done.

    Attributes:
        saved: the model.
        config: of the run that fine-tunes it.
        folder: of that run.
        to: what the inner loop becomes, in words.
    """

    saved: Saved
    config: Any
    folder: Path
    to: str


def plan(
    where: Path,
    to: str | None,
    steps: int,
    *,
    data: str | None = None,
    targets: str = "data",
    out: Path | None = None,
    overrides: Sequence[str] = (),
) -> SimplificationPlan:
    """Say what a model becomes, and how it is fine-tuned.

    Args:
        where: the model, as `kvbind.experiments.saved_models.saved_model.open_saved` takes it.
        to: what its inner loop becomes: a row of the paper's tables ("rung0" to "rung6", "ascent", "key_for_query"), a named
            system, or a YAML file of one. None where edits of `model.inner` say it.
        steps: of fine-tuning.
        data: what to fine-tune on; default what the model was trained on.
        targets: "data" for the task's own loss, or "outputs" for the divergence from what the model said before.
        out: folder of the run; default `runs/simplify-TASK-HASH`.
        overrides: further `key=value` edits of the run's configuration. Those of `model.inner` hold after `to`. Without
            others the learning rate's peak is `RATE` times what it was, and a tenth of the steps warm it up.

    Raises:
        ValueError: a target that the model is already or that it cannot run, or as `open_saved` does.
    """
    check_positive_int("steps", steps)
    if any(edit.startswith("train.steps=") for edit in overrides):
        raise ValueError("overrides must not set train.steps, which steps (--steps) says")
    of_inner = [edit for edit in overrides if edit.startswith("model.inner")]
    others = [edit for edit in overrides if edit not in of_inner]
    if to is None and not of_inner:
        raise ValueError("to must say what the inner loop becomes (--to rung2), or edits of model.inner must; got neither")
    saved = open_saved(where, data, others)
    module, own = open_task_module(saved.task), saved.config
    changed = copy.deepcopy(own)
    changed.model.inner = own.model.inner if to is None else target(module, own, to)
    changed = module.resolve(edited(changed, of_inner))
    name = " ".join([*([] if to is None else [to]), *of_inner])
    if changed.model.inner == own.model.inner:
        raise ValueError(f"to must be another inner loop than the model's own; {name!r} is what it is already")
    if "released_parameters" in changed.model.fields:  # those that the new inner loop has no use for are left out
        changed.model.fields["released_parameters"] = False
    config = fine_tuning(saved.task, changed, saved.folder, steps, targets, others)
    return SimplificationPlan(saved, config, out or Path("runs") / f"simplify-{run_name(saved.task, config)}", name)


def fine_tuning(
    task: str, config: Any, model: Path, steps: int, targets: str = "data", overrides: Sequence[str] = ()
) -> Any:
    """The run that fine-tunes a saved model with the inner loop of a configuration.

    Args:
        task: its name.
        config: of that task: the model as it is to be, and how it would be trained from scratch. The peak of the learning
            rate becomes `RATE` times that, a tenth of the steps warm it up, and each of `PARTS` parts is evaluated.
        model: folder of the saved model.
        steps: of fine-tuning.
        targets: as `StartConfig` takes them.
        overrides: further `key=value` edits, which hold against all of this.
    """
    module = open_task_module(task)
    train = replace(
        config.train, steps=steps, warmup=steps // 10, learning_rate=RATE * config.train.learning_rate,
        evaluate_every=math.ceil(steps / PARTS),
    )  # fmt: skip
    changed = replace(config, train=train, start=StartConfig(str(model), targets=targets))
    return module.resolve(edited(changed, overrides))


def target(module: Any, config: Any, to: str) -> Any:
    """What `config.model.inner` becomes, as plain data.

    Args:
        module: of the task.
        config: the model's own.
        to: as `plan` takes it. Of an image model, a system is its heads' inner loop, or the convolution's where it is one of
            a convolution.

    Raises:
        ValueError: neither a row, nor a system, nor a file of one.
    """
    rows = module.rows(config)
    if to in rows:
        return rows[to]
    if to not in SYSTEMS and not to.endswith((".yaml", ".yml")):
        known = (*rows, *SYSTEMS)
        raise ValueError(f"to must be one of {', '.join(known)}, or a YAML file; got {to!r}{nearest(to, known)}")
    inner, own = named_or_file(to), config.model.inner
    branch = None if "heads" not in own else "conv" if isinstance(inner.network, DepthwiseConv) else "heads"
    if to in SYSTEMS:  # the system that it is already keeps its chunk
        inner = edited_inner(InnerLoop.from_dict(own if branch is None else own[branch]), {"system": to})
    return inner.to_dict() if branch is None else own | {branch: inner.to_dict()}
