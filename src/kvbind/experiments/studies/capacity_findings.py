"""What capacity by bytes of state says: gains, verdicts and the picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from kvbind.experiments import plotting
from kvbind.experiments.outcomes.claims import Verdict
from kvbind.experiments.outcomes.verdicts import ERRORS, beyond
from kvbind.experiments.report.charts import ladder_tones
from kvbind.experiments.report.findings import Findings
from kvbind.experiments.request import Request
from kvbind.experiments.training.plans import RunsPlan
from kvbind.inner.systems import RUNGS
from kvbind.train.config import to_plain

SOLVED = 95.0
"""Percent of answers, from which on softmax attention counts as having learned the task."""


@dataclass(frozen=True)
class CapacityPoint:
    """A mixer at one width, at the learning rate that validation chose.

    Attributes:
        width: of the model.
        bytes: of the state of one row, of all layers, in float32.
        rate: the learning rate.
        accuracy: in percent, by seed.
        by_pairs: number of pairs and accuracy, averaged over seeds.
        untried: learning rates of which not one run was finished.
    """

    width: int
    bytes: int
    rate: float
    accuracy: Mapping[int, float]
    by_pairs: Sequence[Sequence[float]]
    untried: tuple[float, ...] = ()

    @property
    def mean(self) -> float:
        """Accuracy over seeds."""
        return statistics.fmean(self.accuracy.values())

    @property
    def error(self) -> float | None:
        """Its standard error; None of a single seed."""
        values = list(self.accuracy.values())
        return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


Curves = Mapping[str, Sequence[CapacityPoint]]
"""The points of each mixer."""


@dataclass(frozen=True)
class Gain:
    """By how much a mixer recalls more than plain linear attention, over the bytes that both have.

    Attributes:
        low: the least bytes that both have.
        high: the most.
        points: of accuracy, mean over log bytes between the two, by seed.
    """

    low: float
    high: float
    points: Sequence[float]

    @property
    def mean(self) -> float:
        """The mean over seeds."""
        return statistics.fmean(self.points)

    @property
    def error(self) -> float | None:
        """Its standard error; None of a single seed."""
        return statistics.stdev(self.points) / len(self.points) ** 0.5 if len(self.points) > 1 else None


def gain(own: Sequence[CapacityPoint], reference: Sequence[CapacityPoint]) -> Gain | None:
    """A mixer's gain over the reference, seed by seed; None where no two widths of one reach the bytes of the other.

    Between two widths accuracy is linear in the logarithm of bytes.
    """
    low, high = (
        choose(side(point.bytes for point in curve) for curve in (own, reference))
        for choose, side in ((max, min), (min, max))
    )
    seeds = set.intersection(*({*point.accuracy} for point in (*own, *reference)))
    if not low < high or not seeds:
        return None

    def level(curve: Sequence[CapacityPoint], seed: int) -> float:
        known = sorted((math.log2(point.bytes), point.accuracy[seed]) for point in curve)
        ends = [math.log2(low), math.log2(high)]
        places = [ends[0], *(x for x, _ in known if ends[0] < x < ends[1]), ends[1]]
        area = sum((b - a) * (at(known, a) + at(known, b)) / 2 for a, b in pairwise(places))
        return area / (ends[1] - ends[0])

    return Gain(low, high, [level(own, seed) - level(reference, seed) for seed in sorted(seeds)])


def at(known: Sequence[tuple[float, float]], x: float) -> float:
    """The value at `x` of the line through points in ascending order."""
    for (x0, y0), (x1, y1) in pairwise(known):
        if x0 <= x <= x1 and x0 < x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return next(y for place, y in known if place == x)


def judge(curves: Curves) -> list[Verdict]:
    """Whether softmax attention has learned the task, and of each other mixer whether it holds more than the reference."""
    verdicts = []
    if SOFTMAX in curves:
        worst = min(point.mean for point in curves[SOFTMAX])
        verdicts.append(
            Verdict(
                "softmax attention, whose cache holds every token, solves the task",
                f"at every width at least {SOLVED:g}% of all answers are right; where it does not hold, models are trained "
                "too little, and nothing else here says much",
                worst >= SOLVED,
                f"{worst:.1f}% at the width where it is worst",
            )
        )
    if REFERENCE not in curves:
        return verdicts
    rule = (
        "accuracy, as a mean over the logarithm of bytes between the least and the most that both have, is above that of "
        f"linear_attention by at least {ERRORS} standard errors of the differences seed by seed; it does not hold if it is "
        "below by as much; one seed decides nothing, and neither do states of no common size"
    )
    for name, curve in curves.items():
        if name not in (REFERENCE, SOFTMAX):
            found = gain(curve, curves[REFERENCE])
            holds, text = None, "no sizes of state in common"
            if found is not None:
                holds = None if found.error is None or not found.mean else beyond(found.mean, found.error)
                spread = "" if found.error is None else f" ± {found.error:.1f}"
                text = (
                    f"{found.mean:+.1f}{spread} points from {kib(found.low)} to {kib(found.high)} KiB, "
                    f"{len(found.points)} seed{'s' * (len(found.points) > 1)}"
                )
            verdicts.append(Verdict(f"{name} holds more per byte than plain linear attention", rule, holds, text))
    return verdicts


def kib(size: float) -> str:
    """Bytes in KiB, for people."""
    return f"{size / 1024:.3g}"


def findings(curves: Curves, plan: RunsPlan, request: Request, missing: str, seconds: float) -> Findings:
    """What came out, of runs that took so many seconds."""
    data = plan.config.data
    lines = []
    for name, points in curves.items():
        for point in points:
            spread = "" if point.error is None else f" ± {point.error:.1f}"
            each = " / ".join(f"{accuracy:.0f}" for _, accuracy in point.by_pairs)
            lines.append([name, str(point.width), kib(point.bytes), f"{point.rate:g}", f"{point.mean:.1f}{spread}", each])
    pairs = " / ".join(map(str, data.pairs))
    left_out = f" Unfinished, and left out: {missing}." if missing else ""
    return Findings(
        experiment="capacity",
        title=f"Capacity: associative recall by bytes of state, scale {request.scale}",
        lead=f"Rows of {data.length} tokens out of {data.vocabulary} with {pairs.replace(' / ', ', ')} pairs; accuracy is "
        f"the share of keys whose value is said, a mean over these and over {request.seeds} seed(s). Two layers, each "
        "behind a short convolution; of each mixer and width the learning rate that is best on validation rows. Bytes are "
        "those of one row's state in all layers, in float32, tokens that wait for the end of a chunk "
        f"included.{left_out}",
        config=to_plain(plan.config),
        data={
            "curves": [{"name": name, "points": [asdict(point) for point in points]} for name, points in curves.items()],
            "panels": panels(list(curves)),
            "unfinished": missing,
            "training_seconds": round(seconds, 1),
        },
        verdicts=judge(curves),
        tables={"Each width": (["mixer", "width", "state KiB", "learning rate", "recalled, %", f"of {pairs} pairs"], lines)},
        pictures={"Recall by bytes of state": ("capacity.png", "accuracy by bytes of state, a curve for each mixer")},
    )


def panels(names: Sequence[str]) -> dict[str, list[list[str]]]:
    """Which curves stand side by side, by title: the ladder's and the systems', and those that they are compared with."""
    compared = [name for name in (REFERENCE, SOFTMAX) if name in names]
    rungs = [name for name in names if name in RUNGS]
    systems = [name for name in names if name not in (*RUNGS, *compared)]
    found = {"The ladder": rungs, "Systems": systems}
    return {title: [own, compared] for title, own in found.items() if own} or {"Systems": [[], compared]}


def draw(path: Path, curves: Curves) -> None:
    """Accuracy by bytes of state, a curve for each mixer."""
    sides = panels(list(curves))
    named = {"orange": plotting.ORANGE, "purple": plotting.RED}
    with plotting.picture(path, 5.6 * len(sides), 4.4) as fig:
        axes = fig.subplots(1, len(sides), sharey=True, squeeze=False)[0]
        for ax, (title, (own, compared)) in zip(axes, sides.items(), strict=True):
            tones = ladder_tones(len(own) + len(compared), len(own))
            for i, (name, tone) in enumerate(zip([*own, *compared], tones, strict=True)):
                points = sorted(curves[name], key=lambda point: point.bytes)
                ax.errorbar(
                    [point.bytes / 1024 for point in points], [point.mean for point in points],
                    yerr=[point.error or 0.0 for point in points], label=name, marker="osD^vPX"[i % 7], markersize=4.5,
                    linestyle="--" if isinstance(tone, str) else "-", linewidth=1.3, capsize=2,
                    color=named[tone] if isinstance(tone, str) else plotting.shade(tone),
                )  # fmt: skip
            plotting.log_axis(ax)
            ax.set_title(title)
            ax.set_xlabel("state of one row, KiB")
            ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
        axes[0].set_ylabel("keys whose value is recalled, %")


REFERENCE, SOFTMAX = "linear_attention", "softmax"
