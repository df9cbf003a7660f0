"""`kvbind simplify`: a trained model with a simpler inner loop, fine-tuned, and what that costs and gains.

The model that is left is the outcome of a training run like any other, which starts from the saved model's weights
(`kvbind.tasks.start`): it goes on where it was interrupted, and what it leaves opens as every run does. Beside it stands a
report: the quality before, after the edit and after each tenth of the steps, and the speed of both models.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kvbind.bench.harness.device_time import duration
from kvbind.bench.harness.timing import median_seconds
from kvbind.experiments import plotting
from kvbind.experiments.plotting import picture
from kvbind.experiments.report.findings import Findings, Verdict, write_findings
from kvbind.experiments.request import Request
from kvbind.experiments.results.cache import ResultCache
from kvbind.experiments.saved_models.saved_model import Saved, open_saved
from kvbind.experiments.subjects import NONE, Metric, named_subject
from kvbind.experiments.training.runs import Run, check_folder, check_same_config, run_name, train_run
from kvbind.inner import InnerLoop
from kvbind.inner.networks import DepthwiseConv
from kvbind.inner.systems import SYSTEMS
from kvbind.inner.systems.registry import named_or_file
from kvbind.inner.value import check_positive_int, nearest, unchecked_values
from kvbind.models.carry import Carried
from kvbind.tasks import open_task_module
from kvbind.tasks.inner_loops import edited as edited_inner
from kvbind.tasks.start import StartConfig
from kvbind.train.bars import progress_bars
from kvbind.train.config import edited, to_plain, what_matters
from kvbind.train.graphs import to_device
from kvbind.train.loop import evaluate, pick_device
from kvbind.train.metrics import read_metrics
from kvbind.train.step import precision

RATE = 0.3
"""The peak of the learning rate, over that of the training before: weights that are good already need less."""

PARTS = 10
"""The fine-tuning is evaluated behind each of so many parts of its steps, rounded up to whole steps."""

CACHE = "measured.json"
"""In the run's folder: what the model came to before, and the speeds."""

SECONDS = 4.0
"""Spent on measuring speeds, all of them together; on a GPU a second for each."""

BEFORE, AFTER = "before", "after"


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
        run = train_run(task, config, folder, bar, fresh=request.fresh, accept_changed_data=accept_changed_data)
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


def course(run: Run, name: str) -> list[tuple[int, float]]:
    """A held-out metric of a run by step, from the step 0 on, before which nothing was trained."""
    key = f"held_out/{name}"
    return [(row["step"], float(row[key])) for row in read_metrics(run.folder) if key in row]


def report(
    planned: SimplificationPlan, request: Request, run: Run, measured: Mapping[str, Any], device: torch.device
) -> dict[str, Any]:
    """Write what came out; `measured` is from `measure`."""
    saved, config = planned.saved, planned.config
    subject = named_subject(saved.task)
    metrics = (subject.metric, *subject.others)
    before, speeds = measured[BEFORE], measured["speeds"]
    courses = {metric.name: course(run, metric.name) for metric in metrics}
    steps = [step for step, _ in courses[subject.metric.name]]
    rows = [["before", *cells(metrics, before, before)]]
    for i, step in enumerate(steps):
        held_out = {name: points[i][1] for name, points in courses.items()}
        label = "after the edit" if step == 0 else f"{step / config.train.steps:.0%}, step {step:,}"
        rows.append([label, *cells(metrics, held_out, before)])
    last = {name: points[-1][1] for name, points in courses.items()}
    draw(
        planned.folder / "simplified.png", courses[subject.metric.name], before[subject.metric.name], subject.metric, speeds
    )
    unit, carried = open_task_module(saved.task).Task.unit, measured["carried"]
    learned = "the task's own loss" if config.start.targets == "data" else "what the model said before"
    findings = Findings(
        experiment="simplified",
        title=f"Simplified: {saved.folder} to {planned.to}",
        lead=f"A trained model whose inner loop was edited, fine-tuned for {config.train.steps:,} steps on {learned}. "
        + f"Weights {'; '.join(carried_lines(carried))}"
        + ". Speeds are of one training batch in one process, nothing computed again in the backward pass.",
        config=to_plain(config),
        data={
            "to": planned.to,
            "targets": config.start.targets,
            "model": saved.folder.as_posix(),
            "run": run.folder.as_posix(),
            "inner": {BEFORE: saved.config.model.inner, AFTER: config.model.inner},
            "metric": subject.metric.name,
            BEFORE: before,
            "courses": {name: [list(point) for point in points] for name, points in courses.items()},
            "held_out": run.result["held_out"],
            "training_seconds": run.result["training_seconds"],
            "carried": carried,
            "unit": unit,
            "speeds": speeds,
        },
        verdicts=judge(before, last, subject.metric, speeds),
        tables={
            "Quality": (["", *(f"{x.label}{end}" for x in metrics for end in ("", "\nagainst before"))], rows),
            "Speed": ([f"{unit}/s", *(SPEEDS[kind] for kind in speeds[BEFORE])], speed_rows(speeds)),
        },
        pictures={"Course": ("simplified.png", f"{subject.metric.title} by steps of fine-tuning, and speeds")},
    )
    return write_findings(planned.folder, request, findings, device)


SPEEDS = {
    "forward": "forward",
    "training": "forward and\nbackward",
    "graph_forward": "forward,\nreplayed",
    "graph_training": "forward and\nbackward, replayed",
}
"""What was timed, by its name in `measured_speeds`."""


def cells(metrics: Sequence[Metric], held_out: Mapping[str, float], before: Mapping[str, float]) -> list[str]:
    """Each metric and its change against `before`, as texts."""
    return [
        text for x in metrics
        for text in (f"{held_out[x.name]:.{x.digits}f}", x.changed(held_out[x.name], before[x.name]))
    ]  # fmt: skip


def speed_rows(speeds: Mapping[str, Mapping[str, float | None]]) -> list[list[str]]:
    """The speeds before and after, and by which factor they differ, as texts."""
    rows = [[name, *(NONE if x is None else f"{x:,.0f}" for x in own.values())] for name, own in speeds.items()]
    pairs = [(speeds[BEFORE][kind], speeds[AFTER][kind]) for kind in speeds[BEFORE]]
    return [*rows, ["gained", *(f"{b / a:.2f} x" if a and b else NONE for a, b in pairs)]]


def carried_lines(carried: Mapping[str, Mapping[str, int]]) -> list[str]:
    """What became of the weights, for people: a line each."""
    return Carried(**carried).lines()


def judge(
    before: Mapping[str, float], last: Mapping[str, float], metric: Metric, speeds: Mapping[str, Mapping[str, float | None]]
) -> list[Verdict]:
    """Whether the quality came back, and whether the model became faster in training."""
    sign = 1 if metric.better == "lower" else -1
    a, b = before[metric.name], last[metric.name]
    worse = 100 * sign * (b / a - 1) if metric.change == "ratio" else sign * (b - a)
    gains = [(x[BEFORE], x[AFTER]) for kind in ("graph_training", "training")
             if (x := {name: own.get(kind) for name, own in speeds.items()})[BEFORE] and x[AFTER]]  # fmt: skip
    old, new = gains[0]
    assert old is not None
    assert new is not None
    return [
        Verdict(
            f"fine-tuning brings {metric.title} back",
            f"in the end it is worse than before the edit by no more than {metric.margin:g}{metric.unit}",
            worse <= metric.margin,
            f"{a:.{metric.digits}f} before, {b:.{metric.digits}f} in the end",
        ),
        Verdict(
            "the edited model is faster in training",
            "forward and backward of one batch take less time than before, replayed as a CUDA graph where both can be",
            new > old,
            f"{new / old:.2f} times as fast",
        ),
    ]


def draw(
    path: Path, points: Sequence[tuple[int, float]], before: float, metric: Metric, speeds: Mapping[str, Mapping[str, Any]]
) -> None:
    """The metric by steps, and the speeds."""
    with picture(path, 9.2, 3.4) as fig:
        left, right = fig.subplots(1, 2, width_ratios=(3, 2))
        left.axhline(before, color=plotting.MUTED, linewidth=1.0, linestyle=(0, (4, 3)), label="before the edit")
        left.plot(*zip(*points, strict=True), "o-", color=plotting.BLUE, linewidth=1.4, markersize=5, label="edited")
        left.set_xlabel("steps of fine-tuning")
        left.set_title(f"{metric.title[0].upper()}{metric.title[1:]}: {metric.better} is better")
        left.legend()
        kinds = [kind for kind in speeds[BEFORE] if speeds[BEFORE][kind] and speeds[AFTER][kind]]
        right.barh(
            [SPEEDS[kind] for kind in kinds], [speeds[AFTER][kind] / speeds[BEFORE][kind] for kind in kinds],
            color=plotting.GREEN, height=0.5,
        )  # fmt: skip
        right.axvline(1, color=plotting.MUTED, linewidth=1.0, linestyle=(0, (4, 3)))
        right.set_title("Speed, times that before the edit")
