"""`kvbind simplify`: a trained model with a simpler inner loop, fine-tuned, and what that costs and gains.

The model that is left is the outcome of a training run like any other, which starts from the saved model's weights
(`kvbind.tasks.start`): it goes on where it was interrupted, and what it leaves opens as every run does. Beside it stands a
report: the quality before, after the edit and after each tenth of the steps, and the speed of both models.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from kvbind.bench.harness.device_time import duration
from kvbind.bench.harness.timing import median_seconds
from kvbind.experiments.request import Request
from kvbind.experiments.results.cache import ResultCache
from kvbind.experiments.saved_models.simplification_plan import SimplificationPlan
from kvbind.experiments.saved_models.simplification_report import AFTER, BEFORE, carried_lines, report
from kvbind.experiments.subjects import named_subject
from kvbind.experiments.training.runs import check_folder, check_same_config, train_run
from kvbind.inner.value import unchecked_values
from kvbind.provenance import command
from kvbind.tasks import open_task_module
from kvbind.train.bars import progress_bars
from kvbind.train.config import what_matters
from kvbind.train.graphs import to_device
from kvbind.train.loop import evaluate, pick_device
from kvbind.train.step import precision

CACHE = "measured.json"
"""In the run's folder: what the model came to before, and the speeds."""

SECONDS = 4.0
"""Spent on measuring speeds, all of them together; on a GPU a second for each."""


def simplify(planned: SimplificationPlan, request: Request, *, accept_changed_data: bool = False) -> dict[str, Any]:
    """Fine-tune a model with another inner loop, or go on with that, and write the report.

    Args:
        planned: what, from `plan`.
        request: where progress is shown, and whether to begin anew.
        accept_changed_data: as `train_run` takes it.

    Returns:
        What `results.json` holds, beside the run in its folder.

    Raises:
        ValueError: data or edits that do not fit the model, an inner loop that its layers cannot run, a folder that holds
            something else, or several processes, for which `kvbind train` takes the same run.
        InterruptedRunError, TrainingStoppedError: as `train_run`.
    """
    task, folder, config = planned.saved.task, planned.folder, planned.config
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "simplify measures and trains in one process, and was started in several; kvbind train takes the same run to "
            f"them, by the edits start.model={planned.saved.folder} and model.inner=..."
        )
    check_folder(task, folder)
    if not request.fresh:
        check_same_config(config, folder)
    device = pick_device(config.train.device)
    measured = measure(planned, device, request)
    for line in carried_lines(measured["carried"]):
        request.say(line)
    metric = named_subject(task).metric
    request.say(f"{metric.title} before: {measured[BEFORE][metric.name]:.{metric.digits}f}; run folder: {folder}")
    with progress_bars(request.console) as add:
        bar = add("fine-tuning", config.train.steps)
        run = train_run(
            task, config, folder, bar, fresh=request.fresh, accept_changed_data=accept_changed_data, made_by=command()
        )
    return report(planned, request, run, measured, device)


def measure(planned: SimplificationPlan, device: torch.device, request: Request) -> dict[str, Any]:
    """What there is to know before any training: quality before, what becomes of the weights, and speeds.

    It is measured once, and kept in the run's folder.

    Returns:
        "before", held-out metrics; "carried", numbers of weights by name, "kept", "dropped" and "new"; "speeds", as
        `measured_speeds` gives them.
    """
    planned.folder.mkdir(parents=True, exist_ok=True)
    cache = ResultCache(planned.folder / CACHE, device, request.fresh)
    known = cache.get(what_matters(planned.config))
    if known is not None:
        return dict(known)
    saved, train = planned.saved, planned.config.train
    opened = saved.open_task(training=True)
    changed = open_task_module(saved.task).Task(planned.config)
    model = changed.build()
    original = saved.model.to(device)
    before = evaluate(original, opened, train, device)
    found = {
        BEFORE: before,
        "carried": asdict(changed.start.carried),
        "speeds": measured_speeds({BEFORE: original, AFTER: model}, opened, train, device),
    }
    cache.put(found, what_matters(planned.config))
    return found


def measured_speeds(
    models: Mapping[str, nn.Module], task: Any, config: Any, device: torch.device, seconds: float = SECONDS
) -> dict[str, dict[str, float | None]]:
    """How fast models are on one training batch, in units of the task per second.

    The loss forward alone, in evaluation mode; and forward and backward, in training mode. On a CPU all take turns. On a GPU
    each is timed as Python launches it, and as a replayed CUDA graph where it can be captured ("graph_..."). Nothing is
    computed again in backward passes.

    Args:
        models: by name; moved to the device.
        task: that has training data.
        config: of training, for its precision.
        device: where the models run.
        seconds: about how long.
    """
    batch, _ = next(iter(task.batches(None)))
    units, batch = task.size(batch), to_device(batch, device)
    prepare = getattr(task, "prepare", None)

    def forward(model: nn.Module) -> Callable[[], object]:
        def work() -> object:
            model.eval()
            with torch.no_grad(), precision(config, device):
                return task.loss(model, batch)

        return work

    def training(model: nn.Module) -> Callable[[], object]:
        def work() -> object:
            model.train()
            model.zero_grad(set_to_none=True)
            with precision(config, device):
                loss = task.loss(model, batch)
            loss.backward()
            return loss

        return work

    works = {(name, kind): make(model.to(device)) for name, model in models.items()
             for kind, make in (("forward", forward), ("training", training))}  # fmt: skip
    found: dict[str, dict[str, float | None]] = {name: {} for name in models}
    with unchecked_values():
        if prepare is not None:
            with torch.no_grad(), precision(config, device):
                batch = prepare(batch, device)
        trained = {name: [p.requires_grad for p in model.parameters()] for name, model in models.items()}
        for model in models.values():
            model.requires_grad_(True)
        if device.type == "cuda":
            for (name, kind), work in works.items():
                taken = duration(work, device, seconds=1.0)
                found[name][kind] = units / taken.seconds
                found[name][f"graph_{kind}"] = None if taken.graph_seconds is None else units / taken.graph_seconds
        else:
            for (name, kind), each in zip(works, median_seconds(list(works.values()), device, seconds=seconds), strict=True):
                found[name][kind] = units / each
        for name, model in models.items():
            model.zero_grad(set_to_none=True)
            for p, wanted in zip(model.parameters(), trained[name], strict=True):
                p.requires_grad_(wanted)
            model.eval()
    return found
