"""Figure 1: more steps of the inner loop at test time.

A memory that is written better should be read better. The full system, trained with one step per chunk, is evaluated with up
to eight: the inner loss, of which every step is a gradient step, against the metric of the task.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from kvbind import inner_loss
from kvbind.experiments import plotting
from kvbind.experiments.layer_calls import LayerCall, changed, seen_calls
from kvbind.experiments.outcomes.claims import Verdict
from kvbind.experiments.plotting import picture
from kvbind.experiments.report.findings import Findings, write_findings
from kvbind.experiments.request import Request
from kvbind.experiments.results.cache import ResultCache
from kvbind.experiments.subjects import Metric
from kvbind.experiments.training.trained_rows import train_rows
from kvbind.layers.vittt import VitttLayer
from kvbind.models.carry import LAYERS
from kvbind.train.loop import evaluate

ROW, TASKS = "rung0", ("language", "views")

STEPS = range(1, 9)

CACHE = "evaluated.json"
"""Beside the report: what each seed's model came to."""


@dataclass(frozen=True)
class AtSteps:
    """A trained model with some number of steps at test time.

    Attributes:
        steps: how many.
        metric: the task's.
        inner_loss: after the update of each chunk, averaged over chunks, heads, held-out data and layers.
        by_layer: the same of each layer.
    """

    steps: int
    metric: float
    inner_loss: float
    by_layer: tuple[float, ...]


def reproduce(**options: Any) -> dict[str, Any]:
    """Evaluate the full system with more steps than it was trained with, and write the report.

    Args:
        options: the fields of `kvbind.experiments.request.Request`; the task is among `TASKS`.

    Returns:
        What `results.json` holds.

    Raises:
        ValueError: another task, an unknown scale, or an edit that does not fit.
        UnfinishedError: no run is finished, or none has its weights here.
    """
    request = Request(**options)
    trained = train_rows("figure1", [ROW], TASKS, request, weights=True)
    metric = trained.subject.metric
    found: list[list[AtSteps]] = []
    cache = ResultCache(trained.out / CACHE, trained.device, request.fresh)
    for seed, run in trained.runs[ROW].items():
        own = cache.get(run.result)
        if own is None:
            model, task, job = trained.open(ROW, seed)
            own = [asdict(evaluated(model, task, job.config, trained.device, steps, metric.name)) for steps in STEPS]
            cache.put(own, run.result)
        found.append([AtSteps(**one | {"by_layer": tuple(one["by_layer"])}) for one in own])
        request.say(f"seed {seed}: {metric.title} " + ", ".join(f"{x.metric:.{metric.digits}f}" for x in found[-1]))
    means = [mean_of(own) for own in zip(*found, strict=True)]
    draw(trained.out / "steps.png", means, metric)
    lines = [[str(x.steps), f"{x.inner_loss:.5g}", f"{x.metric:.{metric.digits}f}"] for x in means]
    findings = Findings(
        experiment="figure1",
        title=f"Figure 1: steps of the inner loop, {request.task}, scale {request.scale}",
        lead="The full system, trained with one step per chunk, evaluated with more. The inner loss is that of the weights "
        f"after each chunk's update, on held-out data, averaged over layers and {len(found)} seed(s), in PyTorch's float32 "
        f"throughout; {metric.title}: {metric.better} is "
        f"better.{trained.missing}",
        config=trained.config,
        data={
            "metric": metric.name,
            "steps": [asdict(x) for x in means],
            "by_seed": {str(seed): [asdict(x) for x in own] for seed, own in zip(trained.runs[ROW], found, strict=True)},
            "runs": trained.folders(),
        },
        verdicts=judge(found, metric),
        tables={"By steps": (["steps", "inner loss", metric.label], lines)},
        pictures={"By steps": ("steps.png", f"inner loss and {metric.title} by steps of the inner loop")},
    )
    return write_findings(trained.out, request, findings, trained.device)


def evaluated(model: nn.Module, task: Any, config: Any, device: torch.device, steps: int, metric: str) -> AtSteps:
    """Evaluate a model with `steps` steps in every layer.

    Kernels round the state where they read it, and are for one step; so that numbers of steps differ in nothing else, none
    runs on them.
    """
    with changed(model, steps=steps):
        value, by_layer = metric_and_losses(model, task, config, device, metric)
    return AtSteps(steps, value, statistics.fmean(by_layer), by_layer)


def metric_and_losses(
    model: nn.Module, task: Any, config: Any, device: torch.device, metric: str
) -> tuple[float, tuple[float, ...]]:
    """A held-out metric of a model, without kernels, and the inner loss of each of its layers meanwhile."""
    losses: dict[int, list[float]] = {}
    layers = [module for module in model.modules() if isinstance(module, LAYERS)]
    each = sum(2 if isinstance(layer, VitttLayer) else 1 for layer in layers) // len(layers)
    made = 0

    def see(call: LayerCall) -> None:
        # every batch runs through the layers in their order
        nonlocal made
        losses.setdefault(made // each % len(layers), []).append(loss_after(call))
        made += 1

    with patch.dict(os.environ, KVBIND_KERNELS="0"), seen_calls(model, see):
        held_out = evaluate(model, task, config.train, device)
    return float(held_out[metric]), tuple(statistics.fmean(losses[i]) for i in range(len(layers)))


@torch.no_grad()
def loss_after(call: LayerCall) -> float:
    """The inner loss of a call at the weights after each chunk's update, averaged over chunks, heads and sequences."""
    rates, total, tokens = call.options.get("lr", 1.0), 0.0, 0
    bounds = call.options.get("cu_seqlens")
    bounds = [0, call.k.shape[1]] if bounds is None else torch.as_tensor(bounds).tolist()
    for start, stop in pairwise(bounds):

        def own(x: Any, start: int = start, stop: int = stop) -> Any:
            return x[:, start:stop] if isinstance(x, Tensor) else x

        loss = inner_loss(
            call.spec,
            call.weights,
            own(call.k),
            own(call.v),
            lr={name: own(x) for name, x in rates.items()} if isinstance(rates, dict) else own(rates),
            **{name: own(call.options[name]) for name in call.spec.gates},
            update_tokens=call.options.get("update_tokens"),
        )
        total, tokens = total + float(loss.mean()) * (stop - start), tokens + stop - start
    return total / tokens


def mean_of(seeds: Sequence[AtSteps]) -> AtSteps:
    """Averaged over seeds."""
    layers = tuple(statistics.fmean(own) for own in zip(*(x.by_layer for x in seeds), strict=True))
    return AtSteps(
        seeds[0].steps, statistics.fmean(x.metric for x in seeds), statistics.fmean(x.inner_loss for x in seeds), layers
    )


def judge(seeds: Sequence[Sequence[AtSteps]], metric: Metric) -> list[Verdict]:
    """Whether steps do to the inner loss what they are for, and whether that serves the task.

    Args:
        seeds: of each seed, what was found with 1 step and with more.
        metric: the task's.
    """
    sign = 1 if metric.better == "lower" else -1
    lowered = [all(b.inner_loss < a.inner_loss for a, b in pairwise(found)) for found in seeds]
    worse = [[x.steps for x in found[1:] if sign * (x.metric - found[0].metric) > 0] for found in seeds]
    worsened = [len(own) == len(found) - 1 for own, found in zip(worse, seeds, strict=True)]
    means = [mean_of(own) for own in zip(*seeds, strict=True)]
    first, last, losses = means[0], means[-1], [x.inner_loss for x in means]
    agreed = f"so in {{}} of {len(seeds)} seed(s)"
    return [
        Verdict(
            "more steps lower the inner loss",
            "it is lower with every further step, in every seed; it does not hold if in none",
            unanimous(lowered),
            f"{first.inner_loss:.5g} after 1 step, {last.inner_loss:.5g} after {last.steps}, lowest {min(losses):.5g}; "
            + agreed.format(sum(lowered)),
        ),
        Verdict(
            f"more steps worsen {metric.title}",
            "with any number of further steps it is worse than with the one step of training, in every seed; it does not "
            "hold if in none",
            unanimous(worsened),
            f"{first.metric:.{metric.digits}f} with 1 step, {last.metric:.{metric.digits}f} with {last.steps}; worse than "
            f"with 1 in {sum(map(len, worse))} of {sum(len(found) - 1 for found in seeds)} cases; "
            + agreed.format(sum(worsened)),
        ),
    ]


def unanimous(answers: Sequence[bool]) -> bool | None:
    """What all answers are; None where they differ."""
    return answers[0] if len(set(answers)) == 1 else None


def draw(path: Path, found: Sequence[AtSteps], metric: Metric, trained: int = 1) -> None:
    """The inner loss and the metric, side by side; `trained` is how many steps there were in training."""
    steps = [x.steps for x in found]
    sides: Mapping[str, tuple[list[float], str]] = {
        "Inner loss, mean over layers": ([x.inner_loss for x in found], plotting.BLUE),
        f"{metric.title[0].upper()}{metric.title[1:]}": ([x.metric for x in found], plotting.ORANGE),
    }
    with picture(path, 9.2, 3.4) as fig:
        for ax, (title, (values, colour)) in zip(fig.subplots(1, 2), sides.items(), strict=True):
            ax.plot(steps, values, "o-", color=colour, linewidth=1.4, markersize=5)
            ax.set_xticks(steps)
            ax.set_xlabel(f"steps per chunk at test time ({trained} in training)")
            ax.set_title(f"{title}: {'lower' if colour == plotting.BLUE else metric.better} is better")
