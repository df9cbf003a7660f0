"""`kvbind probe`: the paper's four probes of one saved model, at test time (arXiv 2602.21204, section 4).

What fast weights that store keys and values would do, and a linear attention need not: read better where they were written
with more steps; unlearn under ascent; be read where they were written, so that queries lie among keys and outputs among
values; and answer otherwise when asked with the key in place of the query. Figures 1 and 2 and table 1 train models to ask
this; here nothing is trained, so that inner loops of the second and fourth kind are none that the model was trained with.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvbind.experiments.figures import figure1, figure2
from kvbind.experiments.figures.figure1 import AtSteps, evaluated, metric_and_losses
from kvbind.experiments.figures.figure2 import MOST_LAYERS, PAIRS, POINTS, held_out_sets, look
from kvbind.experiments.layer_calls import changed
from kvbind.experiments.outcomes.claims import Verdict
from kvbind.experiments.report.findings import Findings, write_findings
from kvbind.experiments.request import Request
from kvbind.experiments.saved_models.saved_model import Saved
from kvbind.experiments.subjects import NONE, Metric, named_subject
from kvbind.experiments.training.run_folders import CONFIG, WEIGHTS
from kvbind.inner import InnerLoop
from kvbind.inner.value import check_positive_int
from kvbind.models.carry import layers_of
from kvbind.train.config import to_plain
from kvbind.train.loop import pick_device

OTHER = {"descent": "ascent", "ascent": "descent", "query": "key", "key": "query"}
"""The other direction of the inner loop, and the other place to read it at."""


@dataclass(frozen=True)
class Edited:
    """A model with an inner loop that it was not trained with.

    Attributes:
        name: what is other about it.
        metric: the task's; None where the layers cannot run it.
        inner_loss: averaged over chunks, heads, held-out data and layers; likewise.
        refused: why they cannot; empty where they can.
    """

    name: str
    metric: float | None
    inner_loss: float | None
    refused: str = ""


def probe(saved: Saved, request: Request, where: Path, most: int = 8) -> dict[str, Any]:
    """Probe a model, and write the report.

    Args:
        saved: the model.
        request: the report's folder, where progress is shown. By default the report goes to `probe/` in the run's folder, or
            to `runs/probe-NAME` for a model alone.
        where: the model's folder, as it was named.
        most: steps of the inner loop are tried by powers of two up to so many.

    Returns:
        What `results.json` holds.

    Raises:
        ValueError: data that do not fit the model.
        ImportError: scikit-learn is not installed.
    """
    check_positive_int("steps", most)
    figure2.check_sklearn("probe")
    subject, config = named_subject(saved.task), saved.config
    metric, device = subject.metric, pick_device(config.train.device)
    opened, model = saved.open_task(training=False), saved.model.to(device)
    home = saved.folder.parent
    run = saved.folder.name == WEIGHTS and (home / CONFIG).is_file()
    out = request.out or (home / "probe" if run else Path("runs") / f"probe-{where.resolve().name}")
    out.mkdir(parents=True, exist_ok=True)

    inner: InnerLoop = next(iter(layers_of(model).values())).inner
    own = AtSteps(inner.steps, *of_layers(*metric_and_losses(model, opened, config, device, metric.name)))
    at_steps, edited = [own], []
    for steps in counts(inner.steps, most):
        try:
            at_steps.append(evaluated(model, opened, config, device, steps, metric.name))
        except ValueError as error:
            edited.append(Edited(f"{steps} steps", None, None, str(error)))
            break
    for name, fields, conv in (
        (f"gradient {OTHER[inner.direction]}", {"direction": OTHER[inner.direction]}, False),
        (f"{OTHER[inner.query]} for {inner.query}", {"query": OTHER[inner.query]}, True),
    ):
        try:
            with changed(model, conv, **fields):
                value, loss, _ = of_layers(*metric_and_losses(model, opened, config, device, metric.name))
            edited.append(Edited(name, value, loss))
        except ValueError as error:
            edited.append(Edited(name, None, None, str(error)))
    request.say(f"{metric.title} {own.metric:.{metric.digits}f}; with other inner loops done")

    sets = held_out_sets(model, opened, config, device, saved.task)
    chosen = sorted({round(x) for x in np.linspace(0, len(sets) - 1, min(len(sets), MOST_LAYERS))})
    layers = [look(i, sets[i], draw=True) for i in chosen]
    figure2.draw(out / "sets.png", layers)
    pictures = {"t-SNE": ("sets.png", "t-SNE of queries and keys, and of outputs and values, one head, by layer")}
    if len(at_steps) > 1:
        figure1.draw(out / "steps.png", at_steps, metric, trained=own.steps)
        pictures = {"By steps": ("steps.png", f"inner loss and {metric.title} by steps of the inner loop")} | pictures
    numbers = {(layer.number, pair): layer.numbers[pair] for layer in layers for pair in PAIRS}
    findings = Findings(
        experiment="probe",
        title=f"Probes of {where.as_posix()}",
        lead=f"A {saved.task} model, trained with {own.steps} step(s) per chunk, gradient {inner.direction} and reads at "
        f"the {inner.query}, evaluated on {subject.held_out} with other inner loops and the same weights, without kernels. "
        "The inner loss is that of the weights after each chunk's update, averaged over layers. " + figure2.about(1),
        config=to_plain(config),
        data={
            "model": saved.folder.as_posix(),
            "metric": metric.name,
            "steps": [asdict(x) for x in at_steps],
            "edited": [asdict(x) for x in edited],
            "layers": [{"layer": layer, "sets": pair, **asdict(x)} for (layer, pair), x in numbers.items()],
            "maps": [figure2.as_map(layer, pair) for layer in layers for pair in PAIRS],
            "points": POINTS,
        },
        verdicts=[
            *(figure1.judge([at_steps], metric) if len(at_steps) > 1 else []),
            *(judge(x, own, metric) for x in edited if x.metric is not None),
            *figure2.judge(numbers),
        ],
        tables={
            "Other inner loops": (
                ["", metric.label, "against\nas it is", "inner loss"], lines_of(at_steps, edited, own, metric)
            ),
            "Queries and keys, outputs and values": (figure2.HEADER, figure2.lines_of(numbers)),
        },
        pictures=pictures,
    )  # fmt: skip
    return write_findings(out, request, findings, device)


def counts(own: int, most: int) -> list[int]:
    """The further numbers of steps to try, by powers of two above the model's own."""
    return [own * 2**i for i in range(1, most.bit_length()) if own * 2**i <= most]


def of_layers(metric: float, by_layer: Sequence[float]) -> tuple[float, float, tuple[float, ...]]:
    """A metric, the inner loss averaged over layers, and that of each."""
    return metric, statistics.fmean(by_layer), tuple(by_layer)


def lines_of(at_steps: Sequence[AtSteps], edited: Sequence[Edited], own: AtSteps, metric: Metric) -> list[list[str]]:
    """The table of other inner loops, as texts."""
    named = [(f"{x.steps} step{'s' * (x.steps > 1)}" + (", as it is" if x is own else ""), x.metric, x.inner_loss)
             for x in at_steps]  # fmt: skip
    named += [(x.name if not x.refused else f"{x.name}: {x.refused}", x.metric, x.inner_loss) for x in edited]  # type: ignore[misc]
    return [
        [
            name,
            NONE if value is None else f"{value:.{metric.digits}f}",
            metric.changed(value, own.metric),
            NONE if loss is None else f"{loss:.5g}",
        ]
        for name, value, loss in named
    ]


def judge(found: Edited, own: AtSteps, metric: Metric) -> Verdict:
    """Whether the model bears an inner loop that it was not trained with."""
    assert found.metric is not None
    sign = 1 if metric.better == "lower" else -1
    worse = sign * (100 * (found.metric / own.metric - 1) if metric.change == "ratio" else found.metric - own.metric)
    return Verdict(
        f"at test time, {found.name} costs little",
        f"{metric.title} is worse by no more than {metric.margin:g}{metric.unit}",
        worse <= metric.margin,
        f"{own.metric:.{metric.digits}f} as it is, {found.metric:.{metric.digits}f} with it",
    )
