"""A figure or a check of the paper as a part of a page, made from its `results.json` and the pictures beside it."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml

from kvbind.experiments import EXPERIMENTS, plotting
from kvbind.experiments.outcomes.table import CURVE, SMOOTHING
from kvbind.experiments.report import charts
from kvbind.experiments.report.charts import Chart
from kvbind.experiments.report.contents import PagePart, PageTable, Picture, facts
from kvbind.experiments.subjects import named_subject
from kvbind.files import inside

Results = Mapping[str, Any]

EQUAL = 1e-18
"""Where outputs are drawn that are equal bit for bit."""

Drawn = dict[str, list[Chart]]
"""Charts by the heading of the picture that they stand for."""


def findings_part(results: Results, place: Path) -> PagePart:
    """A figure or a check, whatever it is.

    Args:
        results: what its `results.json` holds.
        place: its folder.
    """
    name, task = str(results["experiment"]), results["task"]
    of = f"{task}, " if task else ""
    drawn = DRAW[name](results) if name in DRAW else {}
    file = place / "results.json"
    pictures = [Picture(x["heading"], inside(place, x["file"], file), x["text"]) for x in results.get("pictures", ())]
    if "pictures" not in results and not drawn:
        drawings = [inside(place, png.name) for png in sorted(place.glob("*.png"))]
        pictures = [Picture(png.stem, png, f"{name}: {png.stem}") for png in drawings]
    return PagePart(
        experiment=name,
        title=results.get("title", f"{name.capitalize().replace('Figure', 'Figure ')}: {of}scale {results['scale']}"),
        lead=results.get("lead", f"{EXPERIMENTS.get(name, name).capitalize()}."),
        verdicts=results.get("verdicts", ()),
        grids=[PageTable(x["heading"], x["header"], x["rows"]) for x in results.get("tables", ())],
        charts=drawn,
        pictures=[picture for picture in pictures if picture.file.is_file()],
        command=results["command"],
        details={
            "configuration": yaml.safe_dump(results["config"], sort_keys=False),
            "versions and machine": json.dumps([results["versions"], results["machine"]], indent=2),
        },
        place=place,
        table=str(results["table"]) if name == "steps" else "",
        **facts(results),
    )


def figure1(results: Results) -> Drawn:
    """The inner loss and the metric by steps of the inner loop."""
    metric, found = named_subject(results["task"]).metric, results["steps"]
    x = f"steps per chunk at test time ({found[0]['steps']} in training)"
    layers = {f"layer {i}": [(own["steps"], own["by_layer"][i]) for own in found] for i in range(len(found[0]["by_layer"]))}
    sides = [
        charts.lines(
            {name: [(own["steps"], own[key]) for own in found]}, title=title, x=x, y=name, tones=[tone], markers=True
        )
        for key, name, title, tone in (
            ("inner_loss", "inner loss", "Inner loss, mean over layers: lower is better", "blue"),
            ("metric", metric.title, f"{metric.title[0].upper()}{metric.title[1:]}: {metric.better} is better", "orange"),
        )
    ]
    tones = charts.ladder_tones(len(layers), len(layers))
    each = charts.lines(layers, title="Inner loss of each layer", x=x, y="inner loss", tones=tones, markers=True)
    return {"By steps": [*sides, each]}


def figure2(results: Results) -> Drawn:
    """t-SNE maps of queries beside keys, and of outputs beside values."""
    tones = {"Q": "blue", "K": "orange", "O": "green", "V": "purple"}
    drawn = [
        charts.points(
            one["sets"],
            title=f"Layer {one['layer']}: {' and '.join(one['sets'])}",
            tones=[tones[name] for name in one["sets"]],
            about=f"t-SNE of one head's vectors in layer {one['layer']}, {' and '.join(one['sets'])}.",
        )
        for one in results.get("maps", ())
    ]
    return {"t-SNE": drawn} if drawn else {}


def figure3(results: Results) -> Drawn:
    """Every row's loss along the sequence."""
    rows = results["rows"]
    rungs = sum(row["name"].startswith("rung") for row in rows)
    names = [f"{i} {row['label']}" if i < rungs else row["label"] for i, row in enumerate(rows)]
    series = {name: plotting.pooled(row["loss_by_position"], 16) for name, row in zip(names, rows, strict=True)}
    tones = charts.ladder_tones(len(rows), rungs)
    x, y = "position in the sequence", "nats per token"
    return {
        "Along the sequence": [
            charts.lines(series, title="Held-out loss by position", x=x, y=y, tones=tones),
            charts.lines(charts.against_first(series), title=f"against: {names[0]}", x=x, y=y, tones=tones),
        ]
    }


def figure4(results: Results) -> Drawn:
    """The loss by the clock in both forms, and how far apart they are at each step."""
    by_clock = {}
    for form, own in results["forms"].items():
        first, losses = own["first_step"], [x if math.isfinite(x) else None for x in own["losses"]]
        clock = dict(enumerate(accumulate(own["seconds"][first:]), start=first + 1))
        smooth = plotting.smoothed(losses, SMOOTHING)
        by_clock[form] = plotting.pooled([(clock[step], loss) for step, loss in smooth if step in clock], CURVE)
    slow, fast = (own["losses"] for own in results["forms"].values())
    apart = [(float(step), b - a) for step, (a, b) in enumerate(zip(slow, fast, strict=True), start=1)]
    title, y = "Loss of the step: parallel less recurrent", "nats per token"
    return {
        "By the clock": [
            charts.lines(by_clock, title="Training loss by the clock, smoothed", x="seconds of training", y=y,
                         tones=["orange", "blue"]),
            charts.lines({"difference": apart}, title=title, x="step", y=y, tones=["green"]),
        ]
    }  # fmt: skip


def systems(results: Results) -> Drawn:
    """Every system's loss along the sequence."""
    series = {str(row["label"]): plotting.pooled(row["loss_by_position"], 16) for row in results["rows"]}
    tones, x, y = charts.ladder_tones(len(series), len(series)), "position in the sequence", "nats per token"
    return {"Along the sequence": [charts.lines(series, title="Held-out loss by position", x=x, y=y, tones=tones)]}


def capacity(results: Results) -> Drawn:
    """Accuracy by bytes of state: the ladder, and the systems."""
    curves = {
        str(one["name"]): sorted((x["bytes"] / 1024, statistics.fmean(x["accuracy"].values())) for x in one["points"])
        for one in results["curves"]
    }
    x, y = "state of one row, KiB", "keys whose value is recalled, %"
    return {
        "Recall by bytes of state": [
            charts.lines({name: curves[name] for name in (*own, *compared)}, title=title, x=x, y=y,
                         tones=charts.ladder_tones(len(own) + len(compared), len(own)), markers=True, log=True)
            for title, (own, compared) in results["panels"].items()
        ]
    }  # fmt: skip


def probe(results: Results) -> Drawn:
    """Both figures of one model; the first where more steps could be tried."""
    return (figure1(results) if len(results["steps"]) > 1 else {}) | figure2(results)


def simplified(results: Results) -> Drawn:
    """The metric of a model whose inner loop was edited, by steps of fine-tuning."""
    metric, points = named_subject(results["task"]).metric, results["courses"][results["metric"]]
    before = results["before"][results["metric"]]
    series = {"edited": points, "before the edit": [(points[0][0], before), (points[-1][0], before)]}
    title = f"{metric.title[0].upper()}{metric.title[1:]}: {metric.better} is better"
    tones = ["blue", "orange"]
    return {
        "Course": [charts.lines(series, title=title, x="steps of fine-tuning", y=metric.title, tones=tones, markers=True)]
    }


def theorems(results: Results) -> Drawn:
    """Each way of evaluating an inner loop's linear attention, in each precision."""
    cases = results["cases"]
    series = {
        f"{kind}, {precision}": [
            None if case["draws"][0][precision][kind] is None else max(draw[precision][kind] for draw in case["draws"])
            for case in cases
        ]
        for kind in ("state", "matrix", "parallel")
        for precision in ("float64", "float32")
    }
    tones = [tone for tone in ("blue", "orange", "green") for _ in range(2)]
    chart = charts.dots(
        [case["name"] for case in cases],
        # what is equal bit for bit has a place on a logarithmic axis too
        {name: [None if x is None else max(x, EQUAL) for x in values] for name, values in series.items()},
        title="Relative errors against the recurrent form", x=f"relative error; at {EQUAL:g} none at all", tones=tones,
        hollow_series=[name for name in series if "float32" in name], log=True, limits=(1e-10, 1e-3),
    )  # fmt: skip
    return {"Errors": [chart]}


DRAW: dict[str, Callable[[Results], Drawn]] = {
    "figure1": figure1,
    "figure2": figure2,
    "figure3": figure3,
    "figure4": figure4,
    "probe": probe,
    "simplified": simplified,
    "theorems": theorems,
    "capacity": capacity,
    "systems": systems,
}
"""By experiment."""
