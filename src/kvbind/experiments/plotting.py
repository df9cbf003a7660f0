"""Figures: one style, legible at half a page's width, colours that a colour-blind reader tells apart."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, ScalarFormatter
from PIL import Image

from kvbind.experiments.scales import digits_apart, widened
from kvbind.train.files import write_with

INK, MUTED, GRID = "#1b1f24", "#6a737d", "#e3e6ea"
BLUE, ORANGE, GREEN, RED = "#0072b2", "#d55e00", "#009e73", "#cc79a7"

_PATCH = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
"""Behind a text, so that no line crosses it."""

_STYLE: Any = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


COLOURS = 128
"""In a PNG: lines, texts and colour maps look the same in these as in all, in a quarter of the bytes."""


def write_png(path: Path, image: Image.Image) -> None:
    """Write a picture as PNG, in `COLOURS` colours chosen from its own.

    Args:
        path: of the PNG.
        image: the picture.
    """
    few = image.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    write_with(path, lambda partial: few.save(partial, "PNG", optimize=True))


@contextmanager
def figure(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure in the house style, written to `path`.

    Args:
        path: of the PNG.
        width: in inches.
        height: in inches.
    """
    with mpl.rc_context(_STYLE):
        # without pyplot: nothing global, no display
        fig = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(fig)
        yield fig
        drawn = io.BytesIO()
        fig.savefig(drawn, format="png", dpi=160)
        write_png(path, Image.open(drawn))


@contextmanager
def picture(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure in the house style, written as PNG to `path` and as SVG beside it.

    Args:
        path: ends in .png.
        width: in inches.
        height: in inches.
    """
    with figure(path, width, height) as fig:
        yield fig
        # without a date and with names that repeat, so that the same data make the same file
        with mpl.rc_context({"svg.hashsalt": "kvbind"}):
            write_with(path.with_suffix(".svg"), lambda partial: fig.savefig(partial, metadata={"Date": None}))


def smoothed(values: Sequence[float | None], weight: float) -> list[tuple[int, float]]:
    """An exponential average of what is there, by index from 1, without the bias of its beginning."""
    total, mass, points = 0.0, 0.0, []
    for i, value in enumerate(values, start=1):
        if value is not None:
            total, mass = weight * total + (1 - weight) * value, weight * mass + (1 - weight)
            points.append((i, total / mass))
    return points


def rung_dots(
    ax: Axes,
    labels: Sequence[str],
    values: Sequence[float | None],
    *,
    title: str,
    colour: str,
    spread: Sequence[float] | None = None,
    digits: int = 2,
    joined: int = 0,
    hollow: Collection[int] = (),
    notes: Mapping[int, str] | None = None,
) -> None:
    """One dot per row, rows from top to bottom, the first row's value as a dashed line.

    Args:
        ax: the axes to draw on.
        labels: of the rows.
        values: of the rows; None for a row without.
        title: the line above the picture.
        colour: of the dots.
        spread: half-length of each row's error bar.
        digits: after the point, in the numbers beside the dots; more where numbers that differ would look alike.
        joined: how many rows from the top a line joins.
        hollow: rows whose dots are circles.
        notes: texts in rows without a value.
    """
    rows = range(len(labels))
    there = [(x, row) for row, x in enumerate(values) if x is not None]
    ax.set_yticks(list(rows), labels)
    ax.set_ylim(len(labels) - 0.4, -0.6)
    ax.grid(axis="y", visible=False)
    if values[0] is not None:
        ax.axvline(values[0], color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
    digits = digits_apart((float(f"{x:.5g}") for x, _ in there), digits)
    line = [(x, row) for x, row in there if row < joined]
    ax.plot([x for x, _ in line], [row for _, row in line], color=colour, linewidth=1.2, alpha=0.5)
    if spread is not None:
        ax.errorbar(
            [x for x, _ in there], [row for _, row in there], xerr=[spread[row] for _, row in there], fmt="none",
            ecolor=colour, elinewidth=1.2, capsize=2.5,
        )  # fmt: skip
    for x, row in there:
        ax.plot(x, row, "o", color=colour, markersize=7, markerfacecolor="white" if row in hollow else colour)
    for x, row in there:
        ax.annotate(
            f"{x:.{digits}f}",
            (x, row),
            (0, 7),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=MUTED,
            bbox=_PATCH,
        )
    for row, text in (notes or {}).items():
        ax.annotate(
            text,
            (0.5, row),
            xycoords=("axes fraction", "data"),
            ha="center",
            va="center",
            fontsize=8,
            color=MUTED,
            bbox=_PATCH,
        )
    if there:
        reach = [spread[row] if spread is not None else 0.0 for _, row in there]
        low = min(x - bar for (x, _), bar in zip(there, reach, strict=True))
        high = max(x + bar for (x, _), bar in zip(there, reach, strict=True))
        low, high = widened(low, high) if high > low else (low, high)
        pad = 0.12 * (high - low) or 0.05 * abs(high) or 1.0
        ax.set_xlim(low - pad, high + pad)
    ax.xaxis.set_major_locator(MaxNLocator(6))
    ax.set_title(title)


def curves(
    path: Path,
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    title: str,
    x: str,
    y: str,
    rungs: int,
) -> None:
    """Lines of one quantity, one per run: as they are, and against the first, where small differences show.

    Args:
        path: PNG to write; an SVG goes beside it.
        series: points by label; all lines have the first one's places on the horizontal axis, or some of them.
        title: the line above the picture.
        x: of the horizontal axis.
        y: of the vertical axis.
        rungs: how many lines from the first are rungs of a ladder, in the order of a colour map; the others are dashed.
    """
    first_label, first = next(iter(series.items()))
    reference = dict(first)
    with picture(path, 11.5, 4.2) as fig:
        left, right = fig.subplots(1, 2)
        for i, (label, points) in enumerate(series.items()):
            colour = shade(i / max(rungs - 1, 1)) if i < rungs else (ORANGE, RED)[(i - rungs) % 2]
            style = "-" if i < rungs else "--"
            left.plot([p[0] for p in points], [p[1] for p in points], style, color=colour, linewidth=1.4, label=label)
            shared = [(at, value - reference[at]) for at, value in points if at in reference]
            right.plot([p[0] for p in shared], [p[1] for p in shared], style, color=colour, linewidth=1.4)
        for ax in (left, right):
            values = [float(value) for line in ax.lines for value in line.get_ydata() if math.isfinite(value)] or [0.0]
            low, high = widened(min(values), max(values))
            pad = 0.06 * (high - low) or 0.1
            ax.set_ylim(low - pad, high + pad)
            plain = ScalarFormatter(useOffset=False)
            plain.set_powerlimits((-6, 6))
            ax.yaxis.set_major_formatter(plain)
            ax.set_xlabel(x)
        left.set_ylabel(y)
        left.set_title(title)
        right.set_title(f"against: {first_label}")
        fig.legend(loc="outside right center", fontsize=8.5)


def shade(place: float) -> Any:
    """The colour at a place from 0 to 1 of the scale of ladders."""
    return mpl.colormaps["viridis"](0.95 * place)


def pooled(points: Sequence[tuple[float, float]], count: int) -> list[tuple[float, float]]:
    """Neighbouring points averaged, down to `count` at most; none of none."""
    size = max(-(-len(points) // count), 1)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(p[0] for p in group) / len(group), sum(p[1] for p in group) / len(group)) for group in groups]


def log_axis(ax: Axes) -> None:
    """A logarithmic horizontal axis with plain numbers at 1, 2 and 5."""
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_locator(NullLocator())


def table_image(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]], *, title: str, note: str = "") -> None:
    """A table as a picture: the first column left-aligned, the others right-aligned.

    Args:
        path: PNG to write; an SVG goes beside it.
        header: of the columns.
        rows: of texts, one per column.
        title: the line above the picture.
        note: below, small.
    """
    head = [name.split("\n") for name in header]
    widths = [
        max(max(len(part) for part in head[i]), *(len(row[i]) for row in rows)) + (2 if i else 1) for i in range(len(header))
    ]
    total, lines = sum(widths), max(len(parts) for parts in head)
    lines_of_note = textwrap.wrap(note, int(1.5 * total))
    height = 0.27 * (len(rows) + lines + 1.9 + 0.65 * len(lines_of_note))
    with picture(path, 0.088 * total + 0.3, height) as fig:
        ax = fig.subplots()
        ax.set_axis_off()
        ax.set_xlim(0, total)
        ax.set_ylim(len(rows) + 0.6 + 0.65 * len(lines_of_note), -lines - 1.2)
        ax.text(0, -lines - 0.6, title, fontsize=11, fontweight="bold", va="center")
        edge = 0
        for i, width in enumerate(widths):
            x, align = (edge, "left") if i == 0 else (edge + width, "right")
            for j, part in enumerate(head[i]):
                ax.text(x, -len(head[i]) + j + 0.35, part, ha=align, va="center", fontsize=9, color=MUTED)
            for r, row in enumerate(rows):
                ax.text(x, r + 0.6, row[i], ha=align, va="center", fontsize=9.5)
            edge += width
        ax.hlines([0, len(rows) + 0.2], 0, total, color=MUTED, linewidth=0.8)
        ax.text(0, len(rows) + 0.5, "\n".join(lines_of_note), fontsize=7.5, color=MUTED, va="top", linespacing=1.5)
