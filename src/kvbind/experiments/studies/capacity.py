"""Capacity: how much each system recalls for the bytes of its state, in associative recall (arXiv 2312.04927).

The paper ends on linear attention with more capacity. Here the rungs of its ladder, every causal system and softmax
attention are mixers of the same small models, all behind the same short convolution. Each is trained at several widths,
and so with states of several sizes, and at several learning rates, of which validation rows choose. What comes out is a
curve per mixer, accuracy by bytes of state; a verdict asks which lie above that of plain linear attention.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
import yaml

from kvbind.experiments.report.findings import write_findings
from kvbind.experiments.request import Request
from kvbind.experiments.studies.capacity_findings import SOFTMAX, CapacityPoint, draw, findings
from kvbind.experiments.studies.state_bytes import state_bytes
from kvbind.experiments.training.jobs import TrainingJob
from kvbind.experiments.training.plans import RunsPlan, plan_configs
from kvbind.experiments.training.runs import Run
from kvbind.experiments.training.trained_rows import unfinished
from kvbind.inner.systems import RUNGS, SYSTEMS
from kvbind.inner.value import check_choice
from kvbind.layers.fitting import check_fits_causal_layer
from kvbind.models.lact.cache import CACHE
from kvbind.tasks import recall
from kvbind.train.config import read_config

TASK = "recall"


WIDTH, RATE = "model.fields.hidden_size", "train.learning_rate"
"""What is tried at several values; an edit of one gives others, one or a list."""


@dataclass(frozen=True)
class CapacityScale:
    """How large the comparison is.

    Attributes:
        preset: of the task.
        widths: of the models.
        rates: learning rates.
    """

    preset: str
    widths: tuple[int, ...]
    rates: tuple[float, ...]


SCALES = {
    "smoke": CapacityScale("tiny", (8, 16, 32), (1e-2, 2e-2)),
    "small": CapacityScale("small", (32, 64, 128), (1e-3, 3e-3, 1e-2)),
    "large": CapacityScale("large", (64, 128, 256), (1e-3, 3e-3)),
}


def is_causal(system: str) -> bool:
    """Whether a language model can have that inner loop."""
    try:
        check_fits_causal_layer(SYSTEMS[system]())
    except ValueError:
        return False
    return True


MIXERS = (SOFTMAX, *RUNGS, *(name for name in SYSTEMS if name != "lact_llm" and is_causal(name)))
"""What is compared: softmax attention, the ladder from `lact_llm` down, and every other causal system."""


Key = tuple[str, int, float, int]
"""A run: mixer, width, learning rate, seed."""


def reproduce(**options: Any) -> dict[str, Any]:
    """Train every mixer at every width and learning rate, and write the report.

    Args:
        options: the fields of `kvbind.experiments.request.Request`; the task is "recall", rows are those of
            `MIXERS` that are compared.

    Returns:
        What `results.json` holds.

    Raises:
        ValueError: another task, an unknown scale or mixer, or an edit that does not fit.
        UnfinishedError: there was not time enough for a single run.
    """
    request = Request(**options)
    plan, jobs = plan_runs(request)
    request.say(f"capacity, scale {request.scale}: {len(jobs)} runs on {plan.device}; report in {plan.out}")

    def finished(job: TrainingJob, run: Run) -> None:
        request.say(f"{job.title}: {run.result['held_out']['accuracy']:.1f}% recalled, {run.time_note}")

    done = plan.train(replace(request, rows=None), finished)
    runs = {key: done[name] for key, name in jobs.items() if name in done}
    curves = {mixer: points for mixer in dict.fromkeys(key[0] for key in jobs)
              if (points := list(points_of(mixer, jobs, runs, plan)))}  # fmt: skip
    plan.out.mkdir(parents=True, exist_ok=True)
    draw(plan.out / "capacity.png", curves)
    missing = unfinished({
        f"{mixer} at width {width}": (
            {key[3] for key in jobs if key[:2] == (mixer, width)},
            {key[3] for key in runs if key[:2] == (mixer, width)},
        )
        for mixer, width in dict.fromkeys(key[:2] for key in jobs)
    })  # fmt: skip
    seconds = sum(run.result["training_seconds"] for run in runs.values())
    return write_findings(plan.out, request, findings(curves, plan, request, missing, seconds), plan.device)


def plan_runs(request: Request) -> tuple[RunsPlan, dict[Key, tuple[str, int]]]:
    """The runs, and by mixer, width, learning rate and seed which of them it is.

    Widths come before mixers, seeds before both, so that a comparison that ends early is one of some widths.

    Raises:
        ValueError: an unknown scale or mixer, or an edit that does not fit.
    """
    check_choice("task", request.task, (TASK,))
    check_choice("scale", request.scale, tuple(SCALES))
    request.refuse_measuring("capacity")
    scale, edits = SCALES[request.scale], list(request.overrides)
    if request.source(TASK) is not None:
        raise ValueError(f"data must be None, as rows of recall are drawn; got {request.source(TASK)!r}")
    for edit in edits:
        if edit.startswith(("seed=", "model.mixer=", "model.inner.system=")):
            raise ValueError(f"overrides must leave {edit.partition('=')[0]} to the comparison; got {edit!r}")
    widths, rates = (taken(edits, key, usual) for key, usual in ((WIDTH, scale.widths), (RATE, scale.rates)))
    mixers = MIXERS if request.rows is None else request.rows
    for name in mixers:
        check_choice("rows", name, MIXERS)
    made = {mixer: configured(scale.preset, edits, mixer) for mixer in mixers}
    keys, configs = {}, {}
    for seed, width, mixer, rate in product(range(request.seeds), widths, mixers, rates):
        row = f"{mixer}, width {width}, rate {rate:g}"
        keys[mixer, width, rate, seed] = (row, seed)
        configs[row, seed] = sized(made[mixer], width, rate, seed)
    return plan_configs("capacity", recall.resolve(made[mixers[0]]), configs, request), keys


def planned_jobs(request: Request) -> list[tuple[str, TrainingJob]]:
    """The runs in their order, each with its mixer."""
    plan, keys = plan_runs(request)
    return [(key[0], plan.jobs[name]) for key, name in keys.items()]


def taken(edits: list[str], key: str, usual: Sequence[Any]) -> Sequence[Any]:
    """The values to try of a key: those of its edits, which are removed, or the usual ones.

    Raises:
        ValueError: an edit to something else than a number above 0, or a list of them.
    """
    own = [edit for edit in edits if edit.partition("=")[0] == key]
    if not own:
        return usual
    edits[:] = [edit for edit in edits if edit not in own]
    edit = own[-1]
    found = yaml.safe_load(edit.partition("=")[2])
    values = found if isinstance(found, list) else [found]
    kind = type(usual[0])
    try:
        numbers = [kind(x) for x in values if not isinstance(x, bool)]
    except (TypeError, ValueError):
        numbers = []
    if not numbers or [float(x) for x in values] != numbers or min(numbers) <= 0:
        raise ValueError(f"{key} must be a number above 0 ({kind.__name__}) or a list of some; got {edit!r}")
    return numbers


def configured(preset: str, edits: Sequence[str], mixer: str) -> Any:
    """The configuration of a mixer's runs, of the preset's own width and learning rate.

    Edits of the inner loop are those of the ladder's; other systems have their chunk, where they have any.
    """
    full = read_config(recall.Config, recall.PRESETS, preset, edits)
    if mixer in RUNGS:
        full.model.inner = recall.rows(full)[mixer]
        return full
    others = [edit for edit in edits if not edit.startswith("model.inner.")]
    if mixer == SOFTMAX:
        own = ["model.mixer=softmax"]
    else:
        own = [f"model.inner.system={mixer}"]
        if (SYSTEMS[mixer]().chunk or 1) > 1:
            own.append(f"model.inner.chunk={recall.inner_loop(full.model).chunk}")
    return read_config(recall.Config, recall.PRESETS, preset, [*others, *own])


def sized(config: Any, width: int, rate: float, seed: int) -> Any:
    """A run of a mixer, everything spelled out: MLPs in proportion, and residual streams that start with unit entries."""
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "initializer_range": width**-0.5}
    model = replace(config.model, fields={**config.model.fields, **sizes})
    return recall.resolve(replace(config, seed=seed, model=model, train=replace(config.train, learning_rate=rate)))


def points_of(
    mixer: str, keys: Mapping[Key, tuple[str, int]], runs: Mapping[Key, Run], plan: RunsPlan
) -> Iterator[CapacityPoint]:
    """A mixer's points by width: at each, the learning rate of the best validation accuracy over most seeds."""
    own = [key for key in keys if key[0] == mixer]
    for width in dict.fromkeys(key[1] for key in own):
        rates = list(dict.fromkeys(key[2] for key in own if key[1] == width))
        there = {rate: {key[3]: run for key, run in runs.items() if key[:3] == (mixer, width, rate)} for rate in rates}
        tried = {rate: found for rate, found in there.items() if found}
        if not tried:
            continue

        def merit(rate: float, tried: Mapping[float, Mapping[int, Run]] = tried) -> tuple[int, float]:
            validation = [run.result["held_out"]["validation_accuracy"] for run in tried[rate].values()]
            return len(validation), statistics.fmean(validation)

        best = max(tried, key=merit)
        held_out = {seed: run.result["held_out"] for seed, run in tried[best].items()}
        by_pairs = zip(*(one["accuracy_by_pairs"] for one in held_out.values()), strict=True)
        job = plan.jobs[keys[mixer, width, best, next(iter(held_out))]]
        yield CapacityPoint(
            width,
            bytes_of(job.config),
            best,
            {seed: one["accuracy"] for seed, one in held_out.items()},
            [[each[0][0], statistics.fmean(x for _, x in each)] for each in by_pairs],
            tuple(rate for rate in rates if rate not in tried),
        )


@torch.no_grad()
def bytes_of(config: Any) -> int:
    """Of the state of one row, of all layers, in float32."""
    model = recall.build_model(config).eval()
    attention = [block.attn for block in model.model.layers if isinstance(block.attn, recall.SoftmaxMixer)]
    if attention:
        return sum(mixer.state_bytes(config.data.length) for mixer in attention)
    return state_bytes(getattr(model(torch.zeros(1, 1, dtype=torch.long), use_cache=True), CACHE))
