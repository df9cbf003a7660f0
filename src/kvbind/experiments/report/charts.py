"""Charts as plain data: what a page's script draws, in the colours of its theme.

A chart is a dict with its "kind", "title", "about" (what it shows, for who cannot see it), the titles "x" and "y" of its
axes and its "series". Each series has a "name", its numbers, and a "tone": a colour's name, or a place from 0 to 1 on a
scale that runs through a ladder's rungs.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from kvbind.experiments.scales import digits_apart

Chart = dict[str, Any]

Points = Sequence[tuple[float, float]]


def rounded(values: Iterable[float | None], digits: int = 5) -> list[float | None]:
    """Numbers short enough for a page; None for those that are not finite."""
    return [float(f"{x:.{digits}g}") if x is not None and math.isfinite(x) else None for x in values]


def lines(
    series: Mapping[str, Points],
    *,
    title: str,
    x: str,
    y: str,
    tones: Sequence[str | float],
    markers: bool = False,
    log: bool = False,
) -> Chart:
    """A line per series; those whose tone is a colour's name are dashed beside a ladder's.

    Args:
        series: points by name.
        title: the line above the chart.
        x: of the horizontal axis.
        y: of the vertical axis.
        tones: of the series.
        markers: draw the points too.
        log: the horizontal axis is logarithmic.
    """
    ladder = any(isinstance(tone, float) for tone in tones)
    return {
        "kind": "lines",
        "title": title,
        "about": f"{title}: {y} by {x}, for {', '.join(series)}.",
        "x": x,
        "y": y,
        "markers": markers,
        "log": log,
        "series": [
            {"name": name, "x": rounded(p[0] for p in points), "y": rounded(p[1] for p in points), "tone": tone,
             "dash": ladder and isinstance(tone, str)}
            for (name, points), tone in zip(series.items(), tones, strict=True)
        ],
    }  # fmt: skip


def against_first(series: Mapping[str, Points]) -> dict[str, list[tuple[float, float]]]:
    """Every series less the first one, at the places that both have."""
    reference = dict(next(iter(series.values())))
    return {name: [(at, y - reference[at]) for at, y in points if at in reference] for name, points in series.items()}


def dots(
    rows: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    *,
    title: str,
    x: str,
    tones: Sequence[str],
    errors: Sequence[float | None] | None = None,
    joined: int = 0,
    hollow: Collection[int] = (),
    hollow_series: Collection[str] = (),
    digits: int | None = None,
    log: bool = False,
    limits: Sequence[float] = (),
) -> Chart:
    """Dots in rows, from top to bottom.

    Args:
        rows: their names.
        series: a number per row, or None, by name.
        title: the line above the chart.
        x: of the axis.
        tones: of the series.
        errors: half-length of each row's error bar, in the first series.
        joined: how many rows from the top a line joins, in the first series.
        hollow: rows whose dots are circles.
        hollow_series: series all of whose dots are circles.
        digits: after the point, where numbers stand beside the dots; more where numbers that differ would look alike.
        log: a logarithmic axis.
        limits: where vertical lines are.
    """
    places = {name: rounded(values) for name, values in series.items()}
    if digits is not None:
        digits = digits_apart((x for own in places.values() for x in own if x is not None), digits)
    return {
        "kind": "dots",
        "title": title,
        "about": f"{title}: {x}, a row each for {', '.join(rows)}.",
        "x": x,
        "rows": list(rows),
        "joined": joined,
        "hollow": sorted(hollow),
        "digits": digits,
        "log": log,
        "limits": list(limits),
        "series": [
            {"name": name, "x": values, "tone": tone, "errors": rounded(errors) if errors and i == 0 else None,
             "hollow": name in hollow_series}
            for i, ((name, values), tone) in enumerate(zip(places.items(), tones, strict=True))
        ],
    }  # fmt: skip


def bars(
    rows: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    *,
    title: str,
    x: str,
    tones: Sequence[str],
    log: bool,
) -> Chart:
    """Horizontal bars, a group for each row.

    Args:
        rows: their names.
        series: a number per row, or None, by name.
        title: the line above the chart.
        x: of the axis.
        tones: of the series.
        log: a logarithmic axis.
    """
    return dots(rows, series, title=title, x=x, tones=tones, log=log) | {"kind": "bars"}


def points(series: Mapping[str, Points], *, title: str, tones: Sequence[str], about: str) -> Chart:
    """Places without axes, as t-SNE gives them.

    Args:
        series: places by name.
        title: the line above the chart.
        tones: of the series.
        about: what it shows.
    """
    drawn = [
        {"name": name, "x": rounded((p[0] for p in places), 4), "y": rounded((p[1] for p in places), 4), "tone": tone}
        for (name, places), tone in zip(series.items(), tones, strict=True)
    ]
    return {"kind": "points", "title": title, "about": about, "x": "", "y": "", "series": drawn}


def ladder_tones(count: int, rungs: int) -> list[str | float]:
    """Tones of a table's rows: those of the ladder on its scale, the others by name."""
    others = ("orange", "purple")
    return [i / max(rungs - 1, 1) if i < rungs else others[(i - rungs) % 2] for i in range(count)]
