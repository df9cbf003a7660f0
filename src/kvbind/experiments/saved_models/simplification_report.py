"""The report on a simplified model: what it costs and gains, and the verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from kvbind.experiments import plotting
from kvbind.experiments.outcomes.claims import Verdict
from kvbind.experiments.plotting import picture
from kvbind.experiments.report.findings import Findings, write_findings
from kvbind.experiments.request import Request
from kvbind.experiments.saved_models.simplification_plan import SimplificationPlan
from kvbind.experiments.subjects import NONE, Metric, named_subject
from kvbind.experiments.training.runs import Run
from kvbind.models.carry import Carried
from kvbind.tasks import open_task_module
from kvbind.train.config import to_plain
from kvbind.train.metrics import read_metrics

BEFORE, AFTER = "before", "after"


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
