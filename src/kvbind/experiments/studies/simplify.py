"""How much of training from scratch fine-tuning a simplified model saves.

The full system is trained, and so is each simpler inner loop, from scratch: those are rows of table 2. Then the full
system's model is given each simpler inner loop and fine-tuned, for several shares of the steps that training from scratch
took, each with a schedule of its own from warm-up to end. The smallest share that comes to what training from scratch came
to is what a simpler system costs whoever has a full one already.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvbind.experiments import plotting
from kvbind.experiments.outcomes.claims import Verdict
from kvbind.experiments.plotting import picture
from kvbind.experiments.report.findings import Findings, write_findings
from kvbind.experiments.request import Request
from kvbind.experiments.saved_models.simplification_plan import fine_tuning
from kvbind.experiments.subjects import NONE, Metric
from kvbind.experiments.subjects.rows import LABELS
from kvbind.experiments.training.jobs import TrainingJob, default_workers
from kvbind.experiments.training.plans import UnfinishedError
from kvbind.experiments.training.run_folders import WEIGHTS
from kvbind.experiments.training.runs import Fingerprints, Run, run_name
from kvbind.experiments.training.trained_rows import Trained, train_rows
from kvbind.experiments.training.workers import train_all

FULL = "rung0"

TARGETS = {"language": ("rung1", "rung2", "rung5", "rung6"), "views": ("rung2",)}
"""What the full system becomes, by task."""

SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
"""Lengths of fine-tuning, over that of training from scratch."""

SAVED = 1 / 4
"""The most that fine-tuning may take where it is said to save most of training from scratch."""


@dataclass(frozen=True)
class FineTuned:
    """What fine-tuning to one inner loop came to, of one seed.

    Attributes:
        seed: of all its runs.
        full: the metric of the full system.
        scratch: that of the simpler one, trained from scratch.
        edited: that of the full system's weights with the simpler inner loop, before any step; None where no run is done.
        shares: by length of fine-tuning, over that of training from scratch, the metric behind it.
    """

    seed: int
    full: float
    scratch: float
    edited: float | None
    shares: Mapping[float, float]

    def needed(self, metric: Metric) -> float | None:
        """The smallest share that is as good as training from scratch; None where no length that was tried is."""
        sign = 1 if metric.better == "lower" else -1
        return next((share for share, x in sorted(self.shares.items()) if sign * (x - self.scratch) <= 0), None)


def reproduce(**options: Any) -> dict[str, Any]:
    """Train, edit and fine-tune, and write the report.

    Args:
        options: the fields of `kvbind.experiments.request.Request`; the task is among `TARGETS`.

    Returns:
        What `results.json` holds.

    Raises:
        ValueError: another task, an unknown scale, or an edit that does not fit.
        UnfinishedError: there was not time enough for a single comparison.
    """
    request = Request(**options)
    rows = (FULL, *TARGETS.get(request.task, ()))
    trained = train_rows("simplify", rows, tuple(TARGETS), request, weights=True)
    jobs = fine_tunings(trained, request)
    found: dict[tuple[str, int, float], Run] = {}
    if jobs:
        workers = request.workers or default_workers(trained.device)

        def tell(job: TrainingJob, run: Run) -> None:
            value = run.result["held_out"][trained.subject.metric.name]
            request.say(f"{job.title}: {trained.subject.metric.title} {value:.{trained.subject.metric.digits}f}")

        done = train_all(list(jobs.values()), workers, request.console, tell, deadline=request.deadline)
        found = {key: run for key, run in zip(jobs, done, strict=True) if run is not None}
    courses = {row: of_row(row, trained, found) for row in rows[1:]}
    courses = {row: own for row, own in courses.items() if own}
    if not courses:
        raise UnfinishedError("no fine-tuning of simplify is finished yet; the same command goes on with them")
    missing = [job.title for key, job in jobs.items() if key not in found]
    return write(courses, trained, found, missing, request)


def fine_tunings(trained: Trained, request: Request) -> dict[tuple[str, int, float], TrainingJob]:
    """The runs that fine-tune: by row, seed and share, short ones first; where the row and the full system are trained."""
    jobs: dict[tuple[str, int, float], TrainingJob] = {}
    known = Fingerprints()
    for share in SHARES:
        for row in (row for row in trained.jobs if row != FULL):
            for seed in sorted(trained.jobs[row].keys() & trained.jobs.get(FULL, {}).keys()):
                scratch, full = trained.jobs[row][seed], trained.jobs[FULL][seed]
                steps = max(round(share * scratch.config.train.steps), 1)
                config = fine_tuning(scratch.task, scratch.config, full.folder / WEIGHTS, steps)
                folder = full.folder.parent / run_name(scratch.task, config, known)
                title = f"{FULL} to {row}, {share:.3g} of the steps, seed {seed}"
                jobs[row, seed, share] = TrainingJob(scratch.task, config, folder, title, fresh=request.fresh)
    return jobs


def of_row(row: str, trained: Trained, found: Mapping[tuple[str, int, float], Run]) -> list[FineTuned]:
    """What fine-tuning to a row came to, by seed; those of which no run is done are left out."""
    name, courses = trained.subject.metric.name, []
    for seed, scratch in trained.runs.get(row, {}).items():
        own = {share: run for (of, at, share), run in found.items() if (of, at) == (row, seed)}
        if own:
            first = next(iter(own.values()))
            courses.append(
                FineTuned(
                    seed,
                    trained.runs[FULL][seed].result["held_out"][name],
                    scratch.result["held_out"][name],
                    first.result["untrained"][name],
                    {share: run.result["held_out"][name] for share, run in own.items()},
                )
            )
    return courses


def write(
    courses: Mapping[str, Sequence[FineTuned]],
    trained: Trained,
    found: Mapping[tuple[str, int, float], Run],
    missing: Sequence[str],
    request: Request,
) -> dict[str, Any]:
    """Write the report: what fine-tuning came to beside training from scratch, and the verdicts."""
    metric = trained.subject.metric
    draw(trained.out / "simplify.png", courses, metric)
    header = [
        "to",
        "full\nsystem",
        "from\nscratch",
        "after\nthe edit",
        *(f"{share:.3g} of\nthe steps" for share in SHARES),
        "needed",
    ]
    rows = [[f"{row}, {LABELS[row]}", *line(own, metric)] for row, own in courses.items()]
    left_out = f" Unfinished, and left out: {', '.join(missing)}." if missing else ""
    steps = {row: next(iter(jobs.values())).config.train.steps for row, jobs in trained.jobs.items()}
    findings = Findings(
        experiment="simplify",
        title=f"Simplifying a trained model: {request.task}, scale {request.scale}",
        lead=f"The trained full system is given a simpler inner loop and fine-tuned, for shares of the steps that training "
        f"that one from scratch takes, each with a whole schedule; {metric.title}: {metric.better} is better, averaged over "
        "seeds. Needed: the smallest share as good as training from scratch, of each seed. The full system's own training, "
        f"which whoever simplifies a model has behind them, does not count.{trained.missing}{left_out}",
        config=trained.config,
        data={
            "metric": metric.name,
            "steps": steps,
            "courses": {
                row: [
                    {"seed": x.seed, "full": x.full, "scratch": x.scratch, "edited": x.edited, "needed": x.needed(metric),
                     "shares": [[share, value] for share, value in sorted(x.shares.items())]}
                    for x in own
                ]
                for row, own in courses.items()
            },
            "runs": trained.folders(),
            "fine_tuned": {f"{row}, seed {seed}, {share:.3g}": run.folder.as_posix()
                           for (row, seed, share), run in found.items()},
        },
        verdicts=[judge(row, own, metric) for row, own in courses.items()],
        tables={"By share of the steps": (header, rows)},
        pictures={"By share of the steps": ("simplify.png", f"{metric.title} by share of the steps from scratch")},
    )  # fmt: skip
    return write_findings(trained.out, request, findings, trained.device)


def line(own: Sequence[FineTuned], metric: Metric) -> list[str]:
    """The cells of a row behind its name."""

    def mean(values: Sequence[float | None]) -> str:
        there = [x for x in values if x is not None]
        return f"{statistics.fmean(there):.{metric.digits}f}" if there else NONE

    needed = [(x.needed(metric), max(x.shares)) for x in own]
    return [
        mean([x.full for x in own]), mean([x.scratch for x in own]), mean([x.edited for x in own]),
        *(mean([x.shares.get(share) for x in own]) for share in SHARES),
        ", ".join(f"> {most:.3g}" if share is None else f"{share:.3g}" for share, most in needed),
    ]  # fmt: skip


def judge(row: str, own: Sequence[FineTuned], metric: Metric) -> Verdict:
    """Whether fine-tuning to a row saves most of training it from scratch."""
    needed = [x.needed(metric) for x in own]
    enough = [share is not None and share <= SAVED for share in needed]
    tried = [max(x.shares) for x in own]
    # where shorter ones alone were tried, longer ones might do
    failed = [share is None and most >= SHARES[-1] for share, most in zip(needed, tried, strict=True)]
    words = [f"more than {most:.3g}" if share is None else f"{share:.3g}" for share, most in zip(needed, tried, strict=True)]
    return Verdict(
        f"fine-tuning {FULL} to {row} saves most of training {row} from scratch",
        f"at most {SAVED:g} of the steps from scratch come to at least as good a {metric.title}, in every seed; it does not "
        f"hold if in none {SHARES[-1]:g} of them do",
        True if all(enough) else False if all(failed) else None,
        f"{', '.join(words)} of the steps needed, by seed",
    )


def draw(path: Path, courses: Mapping[str, Sequence[FineTuned]], metric: Metric) -> None:
    """A panel per row: the metric by share of the steps, beside that of the full system and of training from scratch."""
    with picture(path, 3.2 * len(courses) + 0.6, 3.4) as fig:
        for ax, (row, own) in zip(fig.subplots(1, len(courses), squeeze=False)[0], courses.items(), strict=True):
            for i, one in enumerate(own):
                named = {"label": "fine-tuned"} if i == 0 else {}
                points = sorted(one.shares.items())
                ax.plot(*zip(*points, strict=True), "o-", color=plotting.BLUE, linewidth=1.2, markersize=4, **named)
            for values, colour, text in (
                ([x.scratch for x in own], plotting.ORANGE, "from scratch"),
                ([x.full for x in own], plotting.MUTED, "full system"),
            ):
                ax.axhline(statistics.fmean(values), color=colour, linewidth=1.2, linestyle=(0, (4, 3)), label=text)
            ax.set_xscale("log", base=2)
            ax.set_xticks(SHARES, [f"1/{round(1 / share)}" for share in SHARES])
            ax.set_xlabel("steps over those from scratch")
            ax.set_title(f"{row}: {metric.title}")
        fig.axes[-1].legend(fontsize=8)
