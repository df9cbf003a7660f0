"""What becomes of a row's gap to the full system along a scale, of training or of size. One rule for all of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
from matplotlib.ticker import FixedLocator, NullLocator

from kvbind.experiments import plotting
from kvbind.experiments.outcomes.claims import Verdict
from kvbind.experiments.outcomes.verdicts import ERRORS
from kvbind.experiments.subjects import NONE, Metric

LEAST = 3
"""Places that a line is fitted through."""

Gaps = Mapping[float, Mapping[int, float]]
"""By place on the scale and seed: how much worse than the full system, in the metric's own way of comparing."""


@dataclass(frozen=True)
class Trend:
    """A straight line through gaps, against the logarithm of their places: the mean over seeds of each one's own line.

    Attributes:
        slope: per doubling.
        error: its standard error over seeds; None of a single one.
        start: the line at the first place.
        end: the line at the last.
        doublings: between the two.
        seeds: that have a gap at every place.
    """

    slope: float
    error: float | None
    start: float
    end: float
    doublings: float
    seeds: tuple[int, ...]


def worse_by(value: float, full: float, metric: Metric) -> float:
    """How much worse a value is than the full system's, in percent or as a difference; negative where it is better."""
    sign = 1 if metric.better == "lower" else -1
    return sign * (100 * (value / full - 1) if metric.change == "ratio" else value - full)


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and its standard error; None of a single value."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return statistics.fmean(values), error


def fit(gaps: Gaps) -> Trend | None:
    """The trend of gaps; None where there are not places enough, or no seed has them all.

    Points of one seed depend on each other, so that each seed has a line of its own, and what these differ by is the error.
    """
    seeds = sorted(set.intersection(*(set(own) for own in gaps.values()))) if gaps else []
    if len(gaps) < LEAST or not seeds:
        return None
    places = sorted(gaps)
    x = [math.log2(place) for place in places]
    lines = [statistics.linear_regression(x, [gaps[place][seed] for place in places]) for seed in seeds]
    slope, error = mean_and_error([line.slope for line in lines])
    at = [slope * end + statistics.fmean(line.intercept for line in lines) for end in (x[0], x[-1])]
    return Trend(slope, error, at[0], at[1], x[-1] - x[0], tuple(seeds))


def direction(trend: Trend, margin: float) -> str | None:
    """Whether a gap "closes", "grows" or "stays"; None where it is not decided.

    Args:
        trend: the gap's places and means.
        margin: a change from the first place to the last that would count.
    """
    if trend.error is None:
        return None
    if abs(trend.slope) >= ERRORS * trend.error and trend.slope:
        nearer = trend.slope * trend.start < 0 and (trend.end * trend.start >= 0 or abs(trend.end) < abs(trend.start))
        return "closes" if nearer else "grows"
    change, spread = abs(trend.slope) * trend.doublings, trend.error * trend.doublings
    return "stays" if change + ERRORS * spread < margin else None


def judge(label: str, trend: Trend | None, metric: Metric, scale: str) -> Verdict:
    """Whether a row's gap closes.

    Args:
        label: of the row.
        trend: of its gap.
        metric: that is compared.
        scale: what the places are on, as in "with more training".
    """
    unit = metric.unit
    claim = f"the gap of {label} to the full system closes {scale}"
    rule = (
        f"a line through the gaps, against the logarithm of their places, has a slope {ERRORS} standard errors over seeds "
        "from 0 or more, towards no gap; it does not hold if it is as far from 0 away from no gap (the gap grows), or if "
        f"the change along the whole line is below {metric.margin:g}{unit} by {ERRORS} standard errors (it stays); one seed "
        "decides nothing"
    )
    if trend is None:
        return Verdict(claim, rule, None, f"fewer than {LEAST} places that a seed has all of")
    word = direction(trend, metric.margin)
    spread = "" if trend.error is None else f" ± {trend.error:.2f}"
    found = (
        f"{word or 'not decided'}: worse by {trend.start:+.2f}{unit} at the line's beginning, {trend.end:+.2f}{unit} at its "
        f"end; {trend.slope:+.2f}{spread}{unit} per doubling, {len(trend.seeds)} seed(s)"
    )
    return Verdict(claim, rule, None if word is None else word == "closes", found)


def cells(gaps: Gaps, places: Sequence[float], metric: Metric) -> list[str]:
    """A gap at each place, with its standard error over seeds; a dash where there is none."""
    texts = []
    for place in places:
        values = list(gaps.get(place, {}).values())
        if not values:
            texts.append(NONE)
            continue
        mean, error = mean_and_error(values)
        texts.append(f"{mean:+.2f}" + ("" if error is None else f" ± {error:.2f}") + metric.unit)
    return texts


def draw(
    path: Path, rows: Mapping[str, Gaps], metric: Metric, *, rungs: int, places: Mapping[float, str], title: str, x: str
) -> None:
    """A line per row with error bars, on a logarithmic axis; above 0 a row is worse than the full system.

    Args:
        path: PNG to write; an SVG goes beside it.
        rows: gaps by label.
        metric: that is compared.
        rungs: how many rows from the first are rungs; the others are dashed.
        places: of the ticks, with their names.
        title: the line above the picture.
        x: of the horizontal axis.
    """
    shades = mpl.colormaps["viridis"]
    with plotting.picture(path, 9.2, 4.4) as fig:
        ax = fig.subplots()
        ax.axhline(0.0, color=plotting.MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
        for i, (label, gaps) in enumerate(rows.items()):
            points = [(place, *mean_and_error(list(own.values()))) for place, own in sorted(gaps.items()) if own]
            beside = (plotting.ORANGE, plotting.RED, plotting.GREEN, plotting.BLUE)[(i - rungs) % 4]
            # side by side, so that bars do not hide each other
            shift = 1.012 ** (i - len(rows) / 2)
            ax.errorbar(
                [place * shift for place, _, _ in points], [mean for _, mean, _ in points],
                yerr=[error or 0.0 for _, _, error in points], fmt="o-" if i < rungs else "o--", markersize=3.5,
                color=shades(0.95 * (i + 1) / max(rungs, 1)) if i < rungs else beside, linewidth=1.3, elinewidth=0.9,
                capsize=2, label=label,
            )  # fmt: skip
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(FixedLocator(list(places)))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xticklabels(list(places.values()))
        ax.set_xlabel(x)
        ax.set_ylabel(f"worse than the full system, {metric.unit or metric.label}")
        ax.set_title(title)
        fig.legend(loc="outside right center", fontsize=8.5)
