"""Figure 4: the recurrent and the parallel form of one model, in training.

Rung 2 is the first that has a parallel form. From one seed and on the same data it is trained in both forms, one after the
other on a device of their own: their losses by step should be those of one run, and by the clock the parallel form's ahead.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from kvbind.experiments import plotting
from kvbind.experiments.outcomes.claims import Verdict
from kvbind.experiments.report.findings import Findings, write_findings
from kvbind.experiments.request import Request
from kvbind.experiments.results.cache import ResultCache
from kvbind.experiments.tables.projection import CACHE, Steps, measure_steps
from kvbind.experiments.training.jobs import TrainingJob
from kvbind.experiments.training.plans import RunsPlan, UnfinishedError, configuration, plan_runs, report_folder, with_inner
from kvbind.experiments.training.runs import Fingerprints, Run
from kvbind.inner.value import check_choice
from kvbind.screen import duration
from kvbind.tasks import open_task_module
from kvbind.train.config import to_plain
from kvbind.train.loop import pick_device
from kvbind.train.metrics import read_metrics

ROW, TASK = "rung2", "language"

FORMS = ("recurrent", "parallel")

EDITS = {"smoke": ("train.steps=60", "train.warmup=6"), "small": ("train.steps=200", "train.warmup=20")}
"""Of the configurations, by scale: so many steps tell the forms' speeds apart."""

START = 10
"""Steps whose time does not count: they compile kernels and tune them. No more than a quarter of all."""

SAME = 0.05
"""Nats of mean absolute difference between the losses of a step, up to which two runs are the same one: sums in another
order came to 0.02 on a GPU, another seed to 0.17."""

SMOOTHING = 0.9

UNFINISHED = "figure4 is not finished in both forms yet; the same command goes on with them"


@dataclass(frozen=True)
class ClockedRun:
    """A training run by the clock.

    Attributes:
        losses: of each step.
        seconds: each step took.
    """

    losses: Sequence[float]
    seconds: Sequence[float]

    @property
    def start(self) -> int:
        """The first step that counts."""
        return min(START, len(self.seconds) // 4)

    def quartiles(self) -> tuple[float, float, float]:
        """Of the seconds of a step."""
        low, middle, high = statistics.quantiles(self.seconds[self.start :], n=4)
        return low, middle, high

    def by_clock(self) -> list[tuple[float, float]]:
        """Seconds since the steps that count began, and the smoothed loss."""
        clock, points = 0.0, []
        for (step, loss), seconds in zip(plotting.smoothed(list(self.losses), SMOOTHING), self.seconds, strict=True):
            if step > self.start:
                clock += seconds
                points.append((clock, loss))
        return points


def reproduce(**options: Any) -> dict[str, Any]:
    """Train rung 2 in both forms, and write the report.

    Args:
        options: the fields of `kvbind.experiments.request.Request`; the task is "language", the seed 0. With `measure`, the
            steps are of generated data, and no more than that many.

    Returns:
        What `results.json` holds.

    Raises:
        ValueError: another task, an unknown scale, or an edit that does not fit.
        UnfinishedError: there was no time for both runs.
    """
    request = Request(**options)
    check_choice("task", request.task, (TASK,))
    if request.measure is not None:
        return measured(request)
    plan = plan_both(request)
    request.say(f"figure4, scale {request.scale}: {ROW} in both forms on {plan.device}; report in {plan.out}")

    def finished(job: TrainingJob, run: Run) -> None:
        request.say(f"{job.title}: {run.time_note}")

    done = plan.train(request, finished)
    if len(done) < len(FORMS):
        raise UnfinishedError(UNFINISHED)
    courses = {form: read(run) for (form, _), run in done.items()}
    plan.out.mkdir(parents=True, exist_ok=True)
    runs = {form: run.folder.as_posix() for (form, _), run in done.items()}
    return write(courses, plan.out, request, to_plain(plan.config), plan.device, runs)


def plan_both(request: Request, known: Fingerprints | None = None) -> RunsPlan:
    """The two runs, by form; they want their device to themselves, so that one worker trains both."""
    edits = EDITS.get(request.scale, ())
    one = replace(request, seeds=1)
    plans = {form: plan_runs("figure4", [ROW], one, known, [*edits, f"model.ttt_form={form}"]) for form in FORMS}
    jobs = {(form, 0): replace(plan.jobs[ROW, 0], title=f"figure 4, {form}", alone=True) for form, plan in plans.items()}
    return replace(plans[FORMS[0]], jobs=jobs, workers=1)


def read(run: Run) -> ClockedRun:
    """The steps of a finished run."""
    rows = [row for row in read_metrics(run.folder) if "seconds" in row]
    clock = [0.0, *(row["seconds"] for row in rows)]
    losses = [math.nan if row["loss"] is None else row["loss"] for row in rows]
    return ClockedRun(losses, [after - before for before, after in pairwise(clock)])


def measured(request: Request) -> dict[str, Any]:
    """Both forms for some steps of the exact configuration, on generated data."""
    assert request.measure is not None
    courses: dict[str, ClockedRun] = {}
    full = configuration(TASK, request.scale, 0, request.overrides)
    inner = open_task_module(TASK).rows(full)[ROW]
    device = pick_device(full.train.device)
    out = request.out or report_folder("figure4", TASK, request.scale)
    out.mkdir(parents=True, exist_ok=True)
    cache, count = ResultCache(out / CACHE, device, request.fresh), request.measure.steps
    for form in FORMS:
        edits = [*request.overrides, f"model.ttt_form={form}"]
        config = with_inner(TASK, configuration(TASK, request.scale, 0, edits), inner)
        known = cache.get(to_plain(config), count)
        if known is None:
            if request.deadline is not None and time.monotonic() >= request.deadline:
                raise UnfinishedError(UNFINISHED)
            known = asdict(measure_steps(TASK, config, device, count))
            cache.put(known, to_plain(config), count)
        steps = Steps(**known)
        seconds = [sum(pair) for pair in zip(steps.batch_seconds, steps.optimizer_seconds, strict=True)]
        courses[form] = ClockedRun(steps.losses[-len(seconds) :], seconds)
        request.say(f"{form}: {duration(statistics.median(seconds))} per step")
    return write(courses, out, request, to_plain(full), device, {})


def write(
    courses: Mapping[str, ClockedRun],
    out: Path,
    request: Request,
    config: Any,
    device: torch.device,
    runs: Mapping[str, str],
) -> dict[str, Any]:
    """Write the report: courses of both forms, how they differ, and the verdicts."""
    slow, fast = (courses[form] for form in FORMS)
    draw(out / "forms.png", courses)
    quartiles = {form: course.quartiles() for form, course in courses.items()}
    lines = [
        [
            form,
            f"{middle:.4f}",
            f"{low:.4f} to {high:.4f}",
            f"{sum(courses[form].seconds):.1f}",
            f"{courses[form].losses[-1]:.4f}",
        ]
        for form, (low, middle, high) in quartiles.items()
    ]
    what = "on generated tokens, whose loss says nothing of quality" if request.measure else "on the task's own text"
    findings = Findings(
        experiment="figure4",
        title=f"Figure 4: training in the recurrent and in the parallel form, scale {request.scale}",
        lead=f"Rung 2 from one seed, {len(slow.seconds)} steps {what}, one form after the other. By the clock, losses are "
        f"smoothed and time runs from step {slow.start} on, behind those that compile and tune kernels.",
        config=config,
        data={
            "forms": {form: {"losses": list(x.losses), "seconds": [round(s, 5) for s in x.seconds], "first_step": x.start}
                      for form, x in courses.items()},
            "speedup": statistics.median(slow.seconds[slow.start :]) / statistics.median(fast.seconds[fast.start :]),
            "runs": dict(runs),
        },
        verdicts=judge(courses),
        tables={"Each form": (["form", "s per step", "quartiles", "s in all", "last loss"], lines)},
        pictures={"By the clock": ("forms.png", "training loss by seconds, and the forms' difference by step")},
    )  # fmt: skip
    return write_findings(out, replace(request, seeds=1), findings, device)


def differences(courses: Mapping[str, ClockedRun]) -> list[float]:
    """Of the losses of each step that neither form skipped, the parallel form's less the recurrent one's."""
    pairs = zip(*(courses[form].losses for form in FORMS), strict=True)
    return [fast - slow for slow, fast in pairs if math.isfinite(slow) and math.isfinite(fast)]


def judge(courses: Mapping[str, ClockedRun]) -> list[Verdict]:
    """Whether the two are the same run, and which of them takes less time."""
    apart = statistics.fmean(map(abs, differences(courses)))
    (low, slow, _), (_, fast, high) = (courses[form].quartiles() for form in FORMS)
    verdict = (
        True if high < low else False if courses["recurrent"].quartiles()[2] < courses["parallel"].quartiles()[0] else None
    )
    return [
        Verdict(
            "both forms train the same model",
            f"the losses of a step differ by at most {SAME} nats on the average",
            apart <= SAME,
            f"{apart:.2g} nats over {len(differences(courses))} steps",
        ),
        Verdict(
            "the parallel form trains faster",
            "three quarters of its steps take less time than three quarters of the recurrent form's; it does not hold if "
            "they take more",
            verdict,
            f"{slow / fast:.2f} times as fast: {duration(slow)} per step in the recurrent form, {duration(fast)} in the "
            "parallel",
        ),
    ]


def draw(path: Path, courses: Mapping[str, ClockedRun]) -> None:
    """The loss by the clock, and the difference between the forms by step."""
    colours = dict(zip(FORMS, (plotting.ORANGE, plotting.BLUE), strict=True))
    with plotting.picture(path, 9.2, 3.4) as fig:
        left, right = fig.subplots(1, 2)
        for form, course in courses.items():
            left.plot(*zip(*course.by_clock(), strict=True), color=colours[form], linewidth=1.4, label=form)
        left.set_xlabel("seconds of training")
        left.set_title("Training loss by the clock, smoothed")
        left.legend()
        apart = differences(courses)
        right.axhline(0, color=plotting.MUTED, linewidth=0.8)
        right.plot(range(1, len(apart) + 1), apart, color=plotting.GREEN, linewidth=1.0)
        most = 1.1 * max(*map(abs, apart), SAME)
        right.set_ylim(-most, most)
        right.set_xlabel("step")
        right.set_title("Loss of the step: parallel less recurrent")
