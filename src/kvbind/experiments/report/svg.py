"""Charts as SVG: drawn once, in Python, so that they need no script, print, and take their colours from the page's theme.

Every mark is drawn in `currentColor`, which its group takes from the style sheet. The n-th series of a group of charts has
the class `s<n>`, by which the style sheet hides it where its box in the legend is not ticked.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from html import escape
from itertools import groupby
from typing import Any

from kvbind.experiments.report.charts import Chart
from kvbind.experiments.scales import widened
from kvbind.experiments.subjects import NONE

WIDTH, HEIGHT = 440, 290
ROW = 26
"""Height of a row of dots or bars."""

LABEL, LETTERS = 172, 27
"""Width of the rows' names, and how many letters fit into it."""

SERIES = 24
"""How many series of a group can be hidden; the style sheet has a rule for each."""

# viridis, without the end that is lost on a page's background
_SCALE = ("440154", "414487", "2a788e", "22a884", "7ad151", "fde725")


def draw(chart: Chart, order: Mapping[str, int]) -> str:
    """A chart as an SVG element.

    Args:
        chart: as `kvbind.experiments.report.charts` makes it.
        order: number of each series in its group, by name.
    """
    height, marks = _KINDS[chart["kind"]](chart, order)
    width = HEIGHT if chart["kind"] == "points" else WIDTH
    shape = f'viewBox="0 0 {width} {height:g}" role="img" aria-label="{escape(chart["about"])}"'
    return f'<svg class="chart" {shape}>{"".join(marks)}</svg>'


def order_of(charts: Iterable[Chart]) -> dict[str, int]:
    """The number of each series that stands in a group of charts, in the order in which they first appear."""
    return {name: i for i, name in enumerate(dict.fromkeys(one["name"] for chart in charts for one in chart["series"]))}


def legend(charts: Sequence[Chart]) -> list[dict[str, Any]]:
    """Entries of a group's legend, "name", "number" and "key", an SVG; none where no chart has two series."""
    if all(len(chart["series"]) < 2 for chart in charts):
        return []
    found: dict[str, tuple[Chart, Mapping[str, Any]]] = {}
    for chart in charts:
        for own in chart["series"]:
            found.setdefault(own["name"], (chart, own))
    return [{"name": name, "number": i, "key": key(*found[name])} for name, i in order_of(charts).items()]


def key(chart: Chart, own: Mapping[str, Any]) -> str:
    """What a series looks like, as small as a letter."""
    if chart["kind"] == "lines":
        mark = f'<path d="M0 5H24" stroke-width="3"{DASH if own["dash"] else ""}/>'
    elif chart["kind"] == "bars":
        mark = '<rect x="4" y="1" width="16" height="8" fill="currentColor"/>'
    else:
        mark = (
            f'<circle cx="12" cy="5" r="3.8" fill="{"none" if own.get("hollow") else "currentColor"}" stroke-width="1.6"/>'
        )
    return f'<svg viewBox="0 0 24 10" aria-hidden="true" style="color:{colour(own["tone"])}">{mark}</svg>'


DASH = ' stroke-dasharray="6 3"'


def colour(tone: str | float) -> str:
    """A tone in CSS: a colour of the style sheet, or a place on the ladder's scale in the light and in the dark theme."""
    if isinstance(tone, str):
        return f"var(--{tone})"
    return f"light-dark({_shade(0.82 * tone)},{_shade(0.25 + 0.75 * tone)})"


def _shade(place: float) -> str:
    """A place from 0 to 1 on the scale."""
    at = place * (len(_SCALE) - 1)
    low = min(int(at), len(_SCALE) - 2)
    ends = [[int(_SCALE[low + i][j : j + 2], 16) for j in (0, 2, 4)] for i in (0, 1)]
    return "#" + "".join(f"{round(a + (at - low) * (b - a)):02x}" for a, b in zip(*ends, strict=True))


def group(own: Mapping[str, Any], order: Mapping[str, int], marks: Iterable[str]) -> str:
    """A series: its marks, its colour, and its name for who points at it."""
    name = escape(own["name"])
    return (
        f'<g class="s s{order[own["name"]]}" style="color:{colour(own["tone"])}"><title>{name}</title>{"".join(marks)}</g>'
    )


def text(x: float, y: float, said: object, anchor: str = "start", kind: str = "") -> str:
    """A text at a place."""
    named = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{named}>{escape(str(said))}</text>'


class Axis:
    """Numbers to places along one axis, with round ticks.

    Args:
        low: the least number that is shown.
        high: the largest.
        start: place of the least.
        end: of the largest.
        log: logarithmic.
        ticks: how many, about.
    """

    def __init__(self, low: float, high: float, start: float, end: float, *, log: bool = False, ticks: int = 5) -> None:
        self.log = log
        self.low, self.high = (self._of(x) for x in (low, high))
        if self.high <= self.low:
            self.low, self.high = self.low - 0.5, self.high + 0.5
        self.start, self.end, self.count = start, end, ticks

    def _of(self, x: float) -> float:
        return math.log10(x) if self.log else x

    def __call__(self, x: float) -> float:
        """The place of a number."""
        return self.start + (self._of(x) - self.low) / (self.high - self.low) * (self.end - self.start)

    def holds(self, x: float | None) -> bool:
        """Whether a number has a place."""
        return x is not None and (not self.log or x > 0)

    def ticks(self) -> list[tuple[float, str]]:
        """Places of ticks, and their texts."""
        return [(self(x), said) for x, said in (self._decades() if self.log else self._round())]

    def _round(self) -> Iterator[tuple[float, str]]:
        span = (self.high - self.low) / self.count
        unit = 10 ** math.floor(math.log10(span))
        step = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= span * 0.999)
        digits = max(0, -math.floor(math.log10(step) + 1e-9) + (step / unit == 2.5))
        for i in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1):
            yield i * step, f"{i * step:,.{digits}f}"

    def _decades(self) -> Iterator[tuple[float, str]]:
        span = self.high - self.low
        factors = (1, 2, 5) if span <= 2 else (1,)
        every, slack = max(1, math.ceil(span / 7)), 1e-4 * span
        for power in range(math.floor(self.low), math.ceil(self.high) + 1):
            for factor in factors:
                x = factor * 10.0**power
                if self.low - slack <= math.log10(x) <= self.high + slack and power % every == 0:
                    yield x, f"{x:g}" if 1e-4 < x < 1e6 else f"{factor}e{power}"


def _span(values: Iterable[float], log: bool, pad: float, wide: bool = False) -> tuple[float, float]:
    """The least and the largest of some numbers, and a little room beside them.

    Args:
        values: the numbers.
        log: leave out those that are not positive; the room is a factor.
        pad: the room, as a share of the range.
        wide: widen a range that is small beside its numbers.
    """
    known = [x for x in values if not log or x > 0] or [1.0]
    low, high = min(known), max(known)
    if log:
        # over a factor of 4 there is always a tick
        room = max((high / low) ** pad, 2 / (high / low) ** 0.5)
        return low / room, high * room
    if wide and high > low:
        low, high = widened(low, high)
    room = pad * (high - low) if high > low else 0.5 * abs(high) or 0.5
    return low - room, high + room


def _lines(chart: Chart, order: Mapping[str, int]) -> tuple[float, Iterator[str]]:
    left, right, top, bottom = 52, 10, 24, 42
    xs = [x for own in chart["series"] for x in own["x"] if x is not None]
    ys = [y for own in chart["series"] for y in own["y"] if y is not None]
    low, high = _span(ys, False, 0.06, wide=True)
    pad = 0.04 if chart["markers"] else 0.0
    least, most = _span(xs, chart["log"], pad)
    across = Axis(least, most, 0, WIDTH - left - right, log=chart["log"])
    down = Axis(low, high, HEIGHT - top - bottom, 0)

    def marks() -> Iterator[str]:
        for place, said in down.ticks():
            yield f'<path class="grid" d="M{left} {top + place:.1f}H{WIDTH - right}"/>'
            yield text(left - 7, top + place + 4, said, "end", "tick")
        for place, said in across.ticks():
            yield f'<path class="grid" d="M{left + place:.1f} {top}V{HEIGHT - bottom + 4}"/>'
            yield text(left + place, HEIGHT - bottom + 18, said, "middle", "tick")
        yield text(0, 12, chart["y"], kind="axis")
        yield text((left + WIDTH - right) / 2, HEIGHT - 5, chart["x"], "middle", "axis")
        # an SVG inside cuts off what lies beyond the axes
        yield f'<svg x="{left}" y="{top}" width="{WIDTH - left - right}" height="{HEIGHT - top - bottom}">'
        for own in chart["series"]:
            yield group(own, order, curve(own))
        yield "</svg>"

    def curve(own: Mapping[str, Any]) -> Iterator[str]:
        places = list(zip(own["x"], own["y"], strict=True))
        pieces = []
        for known, run in groupby(places, lambda point: across.holds(point[0]) and down.holds(point[1])):
            if known:
                pieces.append("L".join(f"{across(x):.1f} {down(y):.1f}" for x, y in run))
        if pieces:
            yield f'<path class="line" d="M{"M".join(pieces)}"{DASH if own["dash"] else ""}/>'
        if chart["markers"]:
            for x, y in places:
                if across.holds(x) and down.holds(y):
                    yield f'<circle cx="{across(x):.1f}" cy="{down(y):.1f}" r="3.2" fill="currentColor"><title>'
                    yield f"{escape(own['name'])}, {cell(x)}: {cell(y)}</title></circle>"

    return HEIGHT, marks()


def _names(chart: Chart) -> tuple[list[list[str]], list[float], float]:
    """The rows' names in lines that fit, the middle of each row, and where the last one ends."""
    names = [textwrap.wrap(str(name), LETTERS) or [""] for name in chart["rows"]]
    middles, top = [], 12.0
    per = ROW if chart["kind"] == "dots" else max(ROW, 12 * len(chart["series"]) + 8)
    for lines in names:
        own = max(per, 14 * len(lines) + 6)
        middles.append(top + own / 2)
        top += own
    return names, middles, top


def _rows(
    chart: Chart, order: Mapping[str, int], marks_of: Callable[[Any, list[float], Axis], Iterator[str]], low: float | None
) -> tuple[float, Iterator[str]]:
    """What charts share whose vertical axis names rows."""
    names, middles, bottom = _names(chart)
    values = [x + sign * (error or 0) for own in chart["series"]
              for x, error in zip(own["x"], own["errors"] or [0] * len(own["x"]), strict=True) if x is not None
              for sign in (-1, 1)]  # fmt: skip
    least, most = _span([*values, *chart["limits"]], chart["log"], 0.1, wide=True)
    axis = Axis(least if low is None or chart["log"] else low, most, LABEL, WIDTH - 14, log=chart["log"])

    def marks() -> Iterator[str]:
        for place, said in axis.ticks():
            yield f'<path class="grid" d="M{place:.1f} 8V{bottom + 4:.1f}"/>'
            yield text(place, bottom + 18, said, "middle", "tick")
        for lines, y in zip(names, middles, strict=True):
            for i, line in enumerate(lines):
                yield text(LABEL - 10, y + 4 + 14 * (i - (len(lines) - 1) / 2), line, "end")
        for limit in chart["limits"]:
            yield f'<path class="limit" d="M{axis(limit):.1f} 8V{bottom:.1f}"/>'
        for own in chart["series"]:
            yield group(own, order, marks_of(own, middles, axis))
        lines = textwrap.wrap(chart["x"], 66)
        for i, line in enumerate(lines):
            yield text(WIDTH - 14, bottom + 36 + 14 * i, line, "end", "axis")

    return bottom + 42 + 14 * (len(textwrap.wrap(chart["x"], 66)) - 1), marks()


def _dots(chart: Chart, order: Mapping[str, int]) -> tuple[float, Iterator[str]]:
    def marks(own: Any, middles: list[float], axis: Axis) -> Iterator[str]:
        places = [(i, x, y) for i, (x, y) in enumerate(zip(own["x"], middles, strict=True)) if axis.holds(x)]
        if own is chart["series"][0]:
            joined = [f"{axis(x):.1f} {y:.1f}" for i, x, y in places if i < chart["joined"]]
            if joined:
                yield f'<path class="joined" d="M{"L".join(joined)}"/>'
        for i, x, y in places:
            error = own["errors"][i] if own["errors"] else None
            if error:
                yield f'<path class="error" d="M{axis(x - error):.1f} {y:.1f}H{axis(x + error):.1f}"/>'
            hollow = own["hollow"] or i in chart["hollow"]
            yield f'<circle cx="{axis(x):.1f}" cy="{y:.1f}" r="4.5" class="{"hollow" if hollow else "dot"}"><title>'
            yield f"{escape(chart['rows'][i])}, {escape(own['name'])}: {cell(x)}</title></circle>"
            if chart["digits"] is not None:
                beyond = axis(x) > WIDTH - 60
                place = axis(x) + (-1 if beyond else 1) * (8 + (axis(x + error) - axis(x) if error else 0))
                yield text(place, y + 4, f"{x:.{chart['digits']}f}", "end" if beyond else "start", "value")

    return _rows(chart, order, marks, None)


def _bars(chart: Chart, order: Mapping[str, int]) -> tuple[float, Iterator[str]]:
    count = len(chart["series"])

    def marks(own: Any, middles: list[float], axis: Axis) -> Iterator[str]:
        number = next(i for i, one in enumerate(chart["series"]) if one is own)
        for name, x, middle in zip(chart["rows"], own["x"], middles, strict=True):
            if axis.holds(x):
                y, wide = middle + 12 * (number - count / 2), max(axis(x) - LABEL, 1)
                yield f'<rect x="{LABEL}" y="{y + 1:.1f}" width="{wide:.1f}" height="10" fill="currentColor"><title>'
                yield f"{escape(name)}, {escape(own['name'])}: {cell(x)}</title></rect>"

    return _rows(chart, order, marks, 0.0)


def _points(chart: Chart, order: Mapping[str, int]) -> tuple[float, Iterator[str]]:
    every = [(x, y) for own in chart["series"] for x, y in zip(own["x"], own["y"], strict=True) if x is not None]
    across, down = (
        Axis(*_span([place[i] for place in every], False, 0.03), *ends) for i, ends in ((0, (0, HEIGHT)), (1, (HEIGHT, 0)))
    )

    def marks() -> Iterator[str]:
        yield f'<rect class="frame" x=".5" y=".5" width="{HEIGHT - 1}" height="{HEIGHT - 1}"/>'
        for own in chart["series"]:
            places = zip(own["x"], own["y"], strict=True)
            # one path of lines without length, whose round ends are the points
            path = "".join(f"M{across(x):.1f} {down(y):.1f}h0" for x, y in places if x is not None and y is not None)
            yield group(own, order, [f'<path class="points" d="{path}"/>'])

    return HEIGHT, marks()


_KINDS: Mapping[str, Callable[[Chart, Mapping[str, int]], tuple[float, Iterator[str]]]] = {
    "lines": _lines,
    "dots": _dots,
    "bars": _bars,
    "points": _points,
}


def numbers(chart: Chart) -> tuple[str, list[str], list[list[str]]] | None:
    """A chart's numbers as a table: caption, header and rows; None of places whose axes mean nothing."""
    if chart["kind"] == "points":
        return None
    named = "rows" in chart
    header = ["" if named else chart["x"], *(own["name"] for own in chart["series"])]
    caption = f"{chart['title']}: " + (chart["x"] if named else f"{chart['y']} by {chart['x']}")
    if named:
        rows = [[str(name), *(cell(own["x"][i]) for own in chart["series"])] for i, name in enumerate(chart["rows"])]
        return caption, header, rows
    at = [dict(zip(own["x"], own["y"], strict=True)) for own in chart["series"]]
    every = sorted({x for own in at for x in own if x is not None})
    return caption, header, [[cell(x), *(cell(own.get(x)) for own in at)] for x in every]


def cell(value: float | None) -> str:
    """A number in a table; a dash for none."""
    return NONE if value is None else f"{value:.5g}"
