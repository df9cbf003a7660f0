"""A run of `kvbind train` as a part of a page: curves, samples of what it learned, and its configuration."""

from __future__ import annotations

import json
import logging
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvbind.experiments import plotting
from kvbind.experiments.outcomes.table import CURVE, SMOOTHING
from kvbind.experiments.report import charts
from kvbind.experiments.report.charts import Chart, Points
from kvbind.experiments.report.contents import PagePart, PageTable, Picture, facts, shown
from kvbind.experiments.report.page_cache import PageCache
from kvbind.experiments.subjects import NONE, SUBJECTS
from kvbind.experiments.training.run_folders import MADE_BY
from kvbind.files import check_regular, inside, read_json
from kvbind.screen import duration
from kvbind.tasks import NEXT
from kvbind.train.metrics import FILE, row_of

log = logging.getLogger("kvbind.report")

RUN = "run"
"""Its experiment, among parts."""

SHARED = "trained"
"""Folder of the runs that experiments train: their results show them."""

CONFIG, RESULT, MODEL, PICTURES = "config.yaml", "result.json", "model", "pictures"

HEADER = "# kvbind train "

TOKENS, PROMPT = 160, "\n"
"""Of a sample of text."""

LARGEST = 200e6
"""Parameters of the largest model that a sample is drawn from while a page is made."""


def find_runs(folder: Path) -> Iterator[Path]:
    """Folders below one, itself among them, that `kvbind train` made, as paths that begin as `folder` does.

    Those that experiments share are not among them.
    """
    for file in sorted(folder.rglob(FILE)):
        place = file.parent
        own = SHARED not in place.relative_to(folder).parts
        if own and not place.name.startswith(".") and task_of(place) is not None:
            yield place


def task_of(place: Path) -> str | None:
    """What the run in a folder trains, as its configuration says in the first line; None where it holds no run."""
    try:
        with check_regular(inside(place, CONFIG)).open(encoding="utf-8") as file:
            line = file.readline(200).strip()
    except (OSError, ValueError):
        return None
    task = line.removeprefix(HEADER)
    return task if line.startswith(HEADER) and task in SUBJECTS else None


def run_part(place: Path, typed: Path, cache: PageCache) -> PagePart:
    """The run in a folder, finished or not.

    Args:
        place: the folder.
        typed: the same as a user would type it.
        cache: where a sample of what its model writes may be.

    Raises:
        ValueError: files that `kvbind train` does not write so, or that lead out of the folder.
    """
    task = task_of(place)
    if task is None:
        raise ValueError(f"{place} must be a run of kvbind train, with its {CONFIG}")
    made_by, config = without_header(check_regular(inside(place, CONFIG)).read_text(encoding="utf-8"))
    result = read_json(inside(place, RESULT)) if (place / RESULT).is_file() else {}
    if not isinstance(result, dict):
        raise ValueError(f"{place / RESULT} must hold a run's result")
    rows = [row for line in check_regular(inside(place, FILE)).read_bytes().split(b"\n") if (row := row_of(line))]
    found = facts({"task": task, "scale": "", "machine": result.get("machine"), "versions": result.get("versions")})
    return PagePart(
        experiment=RUN,
        title=f"Run: {task}, {shown(place.name)}",
        lead=lead(task, rows, result),
        verdicts=[],
        grids=grids(task, rows),
        charts=draw(task, rows),
        pictures=[Picture(file.stem, inside(place, f"{PICTURES}/{file.name}"), f"{file.stem} of the run {shown(place.name)}")
                  for file in sorted((place / PICTURES).glob("*.png"))],
        command=made_by,
        details={"configuration": config, "versions and machine": json.dumps(
            [result.get("versions"), result.get("machine")], indent=2)},
        place=place,
        samples=samples(place, typed, task, result, cache),
        next_command=next_command(typed, task),
        **found,
    )  # fmt: skip


def without_header(config: str) -> tuple[str, str]:
    """The command that made a run, as its configuration file says, else empty; and the configuration alone."""
    _, _, rest = config.partition("\n")
    if not rest.startswith(MADE_BY):
        return "", rest
    command, _, rest = rest.partition("\n")
    return command.removeprefix(MADE_BY).strip(), rest


def lead(task: str, rows: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> str:
    """How large, how long, and how far."""
    steps = max((row["step"] for row in rows if "loss" in row), default=0)
    if not result:
        return f"Not finished: {steps:,} steps so far."
    unit = SUBJECTS[task].speed.unit
    said = [f"{result.get('steps', steps):,} steps"]
    if isinstance(result.get("parameters"), int):
        said.insert(0, f"{result['parameters'] / 1e6:,.1f} million parameters")
    if isinstance(result.get(unit), int):
        said.append(f"{result[unit]:,} {unit}")
    if isinstance(result.get("training_seconds"), int | float):
        said.append(f"{duration(result['training_seconds'])} of training")
    return f"{', '.join(said)}."


def held_out(task: str, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The held-out metrics of each evaluation, with its step; the last of each step."""
    found: dict[int, dict[str, Any]] = {}
    for row in rows:
        own = {name.removeprefix("held_out/"): x for name, x in row.items() if name.startswith("held_out/")}
        if own:
            found[row["step"]] = {"step": row["step"], **own}
    return [found[step] for step in sorted(found)]


def grids(task: str, rows: Sequence[Mapping[str, Any]]) -> list[PageTable]:
    """The held-out metrics before, during and after training."""
    subject, evaluations = SUBJECTS[task], held_out(task, rows)
    metrics = [metric for metric in (subject.metric, *subject.others) if any(metric.name in one for one in evaluations)]
    lines = [
        [f"{one['step']:,}", *(number(one.get(metric.name), metric.digits) for metric in metrics)] for one in evaluations
    ]
    return [PageTable("Held-out data", ["step", *(metric.label for metric in metrics)], lines)] if metrics else []


def number(value: object, digits: int) -> str:
    """A metric in a cell."""
    return f"{value:.{digits}f}" if isinstance(value, int | float) and math.isfinite(value) else NONE


def draw(task: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Chart]]:
    """Loss, held-out metric, rate of learning and speed by step, and the last evaluation's curves."""
    subject, evaluations = SUBJECTS[task], held_out(task, rows)
    metric, speed = subject.metric, f"{subject.speed.unit}_per_second"

    def line(title: str, points: Points, y: str, tone: str, markers: bool = False) -> list[Chart]:
        return (
            [charts.lines({y: points}, title=title, x="step", y=y, tones=[tone], markers=markers)] if len(points) > 1 else []
        )

    smooth = plotting.smoothed(losses(rows), SMOOTHING)
    training = line("Training loss, smoothed", plotting.pooled(smooth, CURVE), subject.loss, "blue")
    quality = [(float(one["step"]), float(one[metric.name])) for one in evaluations if finite(one.get(metric.name))]
    # before training a metric is so far off that nothing else would show
    training += line(f"Held out, {metric.better} is better", quality[1:], metric.title, "orange", markers=True)
    pace = [*line("Learning rate", series(rows, "learning_rate"), "learning rate", "green"),
            *line("Speed", series(rows, speed)[1:], f"{subject.speed.unit} per second", "purple")]  # fmt: skip
    found = {"Training": training, "Learning rate and speed": pace}
    for own in subject.series:
        points = evaluations[-1].get(own.name) if evaluations else None
        if isinstance(points, list) and len(points) > 1:
            pooled = plotting.pooled(points, 32)
            found[own.heading] = [charts.lines({own.y: pooled}, title=own.title, x=own.x, y=own.y, tones=["blue"])]
    return {heading: drawn for heading, drawn in found.items() if drawn}


def finite(value: object) -> bool:
    """Whether a value is a number that has a place."""
    return isinstance(value, int | float) and math.isfinite(value)


def losses(rows: Sequence[Mapping[str, Any]]) -> list[float | None]:
    """The training loss of each step from the first; None where it has no line, or no number."""
    known = {row["step"]: row["loss"] for row in rows if finite(row.get("loss"))}
    return [known.get(step) for step in range(1, max(known, default=0) + 1)]


def series(rows: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    """A number of each step, averaged down to as many points as a chart shows."""
    return plotting.pooled([(float(row["step"]), float(row[name])) for row in rows if finite(row.get(name))], CURVE)


def next_command(typed: Path, task: str) -> str:
    """The command that shows more of what a run learned."""
    run, picture = (shown(shlex.quote(str(path))) for path in (typed, typed / PICTURES / "attention.png"))
    return NEXT.get(task, "kvbind eval {run}").format(run=run, picture=picture)


def samples(place: Path, typed: Path, task: str, result: Mapping[str, Any], cache: PageCache) -> dict[str, str]:
    """A text that a language model writes, where it is finished and small enough.

    Weights are read from safetensors alone.
    """
    model, size = place / MODEL, result.get("parameters")
    if task != "language" or not model.is_dir() or not isinstance(size, int) or size > LARGEST:
        return {}
    try:
        files = [[shown(file.name), (found := file.stat()).st_size, found.st_mtime_ns] for file in sorted(model.iterdir())]
        text = cache.made(
            f"sampling text from {typed}", lambda: written(place), lambda found: isinstance(found, str),
            "sample", shown(str(place)), result.get("steps"), files,
        )  # fmt: skip
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        log.warning("%s: no sample, as %s", place, error)
        return {}
    return {"A sample": text}


def written(place: Path) -> str:
    """What a language model writes from an empty line, the same at every call."""
    import torch

    from kvbind.tasks.language import open_trained

    model, words = open_trained(place)
    ids = torch.from_numpy(words.encode(PROMPT))[None]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        found = model.generate(
            ids, max_new_tokens=TOKENS, pad_token_id=words.end, eos_token_id=words.end, do_sample=True, temperature=0.8,
            top_p=0.95, top_k=0,
        )  # fmt: skip
    text: str = words.decode(found[0].tolist())
    return text.strip("\n")
