"""What a table's numbers say to the paper's claims: a verdict per row, by one rule for all of them.

The paper's claim is that a change costs little or nothing, so a verdict asks whether a cost that would count can be ruled
out. What would count is the task's `margin`, a little more than the largest loss in the paper's own table; what can be
ruled out is what lies two standard errors away, seed by seed. One seed has no standard error, and decides nothing.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from kvbind.experiments.outcomes.claims import Verdict
from kvbind.experiments.outcomes.table import Table, TableRow
from kvbind.experiments.subjects import Metric, Subject

ERRORS = 2
"""Standard errors that a difference must lie away from a limit."""

FASTER = 1.05
"""How many times as fast counts as faster; repeated measurements are within that of each other."""

LADDER_SPEEDUP = 4.0
"""How many times as fast the ladder's end should be as its start; in the paper's table it is 29 times."""


def judge(table: Table, subject: Subject, rows: Sequence[TableRow]) -> list[Verdict]:
    """A verdict for every row of the paper's that changes something, on the best rung, and on forms where both were timed.

    Args:
        table: whose claims are judged.
        subject: of what task.
        rows: of the table, the full system first.
    """
    full, metric = rows[0], subject.metric
    verdicts = [costs_little(row, full, metric) for row in rows[1:] if row.applies and not row.baseline]
    if table.rungs:
        verdicts.append(last_layer_is_best([row for row in rows[: table.rungs] if row.applies], metric))
    if table.speed and "parallel" in subject.speed.columns:
        verdicts += speeds_up(rows[: table.rungs])
    return verdicts


def worsening(row: TableRow, full: TableRow, metric: Metric) -> tuple[float, float | None, int]:
    """By how much a row is worse than the full system, in the metric's own way of comparing.

    Runs of one seed read the same data in the same order, so that they are compared with each other.

    Returns:
        The mean over seeds that both have, its standard error (None of a single seed), and how many seeds these are; of
        none, the mean is NaN.
    """
    theirs = dict(zip(full.seeds, full.values(metric.name), strict=True))
    pairs = [(x, theirs[seed]) for seed, x in zip(row.seeds, row.values(metric.name), strict=True) if seed in theirs]
    sign = 1 if metric.better == "lower" else -1
    changes = [sign * (100 * (x / first - 1) if metric.change == "ratio" else x - first) for x, first in pairs]
    if not changes:
        return math.nan, None, 0
    error = statistics.stdev(changes) / len(changes) ** 0.5 if len(changes) > 1 else None
    return statistics.fmean(changes), error, len(changes)


def costs_little(row: TableRow, full: TableRow, metric: Metric) -> Verdict:
    """Whether a row's change costs less than what would count."""
    limit = f"{metric.margin:g}{metric.unit}"
    claim = f"{row.label} costs less than {limit} of {metric.title} against the full system"
    rule = (
        f"it is worse by less than {limit}, by at least {ERRORS} standard errors of the differences seed by seed; it does "
        f"not hold if it is worse by more than {limit} by as much; one seed decides nothing"
    )
    published = "the paper has none"
    if row.paper and full.published is not None:
        published = f"paper {metric.changed(row.published, full.published)}"
    worse, spread, seeds = worsening(row, full, metric)
    if not seeds:
        return Verdict(claim, rule, None, f"unfinished; {published}")
    here = f"here {-worse if metric.better == 'higher' else worse:+.2f}"
    if spread is None:
        return Verdict(claim, rule, None, f"{here}{metric.unit}, 1 seed; {published}")
    found = f"{here} ± {spread:.2f}{metric.unit}, {seeds} seeds; {published}"
    return Verdict(claim, rule, beyond(metric.margin - worse, spread), found)


def beyond(distance: float, spread: float) -> bool | None:
    """Whether a distance is above 0 or below it, by `ERRORS` times its spread; None where neither is."""
    return None if abs(distance) < ERRORS * spread else distance > 0


def last_layer_is_best(rungs: Sequence[TableRow], metric: Metric) -> Verdict:
    """Whether the rung that updates the last layer alone is the best one, as in the paper for every task."""
    claim = "updating the last layer alone is the best rung"
    rule = (
        f"rung 1 is better than every other rung by at least {ERRORS} standard errors of the differences seed by seed; it "
        "does not hold if another is better than rung 1 by as much; one seed decides nothing"
    )
    own = next((row for row in rungs if row.name == "rung1"), None)
    others = [row for row in rungs if row is not own]
    if own is None or not all(row.runs for row in rungs):
        return Verdict(claim, rule, None, "unfinished")
    sign = 1 if metric.better == "lower" else -1
    order = sorted(rungs, key=lambda row: sign * (row.mean(metric.name) or 0.0))
    found = "best to worst: " + ", ".join(f"{row.name} {row.mean(metric.name):.{metric.digits}f}" for row in order)
    differences = [worsening(row, own, metric) for row in others]
    decided = [None if spread is None else beyond(worse, spread) for worse, spread, _ in differences]
    return Verdict(claim, rule, False if False in decided else None if None in decided else True, found)


def speeds_up(rungs: Sequence[TableRow]) -> list[Verdict]:
    """Whether parallel forms are faster than recurrent ones, and the ladder's end than its start."""
    pairs = {row.name: (row.speeds.get("recurrent"), row.speeds.get("parallel")) for row in rungs}
    ratios = {name: parallel / recurrent for name, (recurrent, parallel) in pairs.items() if recurrent and parallel}
    verdicts = []
    if ratios:
        low, high = min(ratios, key=ratios.__getitem__), max(ratios, key=ratios.__getitem__)
        verdicts.append(
            Verdict(
                "the parallel form trains faster than the recurrent one, wherever there is one",
                f"at least {FASTER} times as fast on every rung that has one; it does not hold if as much slower on one",
                False if ratios[low] < 1 / FASTER else True if ratios[low] >= FASTER else None,
                f"{ratios[low]:.2f} ({low}) to {ratios[high]:.2f} ({high}) times as fast",
            )
        )
    first, last = (max((x for x in row.speeds.values() if x), default=None) for row in (rungs[0], rungs[-1]))
    if first and last:
        verdicts.append(
            Verdict(
                "linear attention trains several times as fast as the full system",
                f"its faster form is at least {LADDER_SPEEDUP:g} times as fast as the full system's",
                last >= LADDER_SPEEDUP * first,
                f"{last / first:.1f} times as fast",
            )
        )
    return verdicts
