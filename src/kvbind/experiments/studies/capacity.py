"""Capacity: how much each system recalls for the bytes of its state, in associative recall (arXiv 2312.04927).

The paper ends on linear attention with more capacity. Here the rungs of its ladder, every causal system and softmax
attention are mixers of the same small models, all behind the same short convolution. Each is trained at several widths,
and so with states of several sizes, and at several learning rates, of which validation rows choose. What comes out is a
curve per mixer, accuracy by bytes of state; a verdict asks which lie above that of plain linear attention.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
import yaml

from kvbind.experiments import plotting
from kvbind.experiments.report.charts import ladder_tones
from kvbind.experiments.report.findings import Findings, Verdict, write_findings
from kvbind.experiments.request import Request
from kvbind.experiments.studies.state_bytes import state_bytes
from kvbind.experiments.tables.table import unfinished
from kvbind.experiments.tables.verdicts import ERRORS, beyond
from kvbind.experiments.training.plans import RunsPlan, plan_configs
from kvbind.experiments.training.runs import Run
from kvbind.experiments.training.workers import TrainingJob
from kvbind.inner.systems import RUNGS, SYSTEMS
from kvbind.inner.value import check_choice
from kvbind.layers.fitting import check_fits_causal_layer
from kvbind.models.lact.cache import CACHE
from kvbind.tasks import recall
from kvbind.train.config import read_config, to_plain

TASK = "recall"

REFERENCE, SOFTMAX = "linear_attention", "softmax"

WIDTH, RATE = "model.fields.hidden_size", "train.learning_rate"
"""What is tried at several values; an edit of one gives others, one or a list."""

SOLVED = 95.0
"""Percent of answers, from which on softmax attention counts as having learned the task."""


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


@dataclass(frozen=True)
class CapacityPoint:
    """A mixer at one width, at the learning rate that validation chose.

    Attributes:
        width: of the model.
        bytes: of the state of one row, of all layers, in float32.
        rate: the learning rate.
        accuracy: in percent, by seed.
        by_pairs: number of pairs and accuracy, averaged over seeds.
        untried: learning rates of which not one run was finished.
    """

    width: int
    bytes: int
    rate: float
    accuracy: Mapping[int, float]
    by_pairs: Sequence[Sequence[float]]
    untried: tuple[float, ...] = ()

    @property
    def mean(self) -> float:
        """Accuracy over seeds."""
        return statistics.fmean(self.accuracy.values())

    @property
    def error(self) -> float | None:
        """Its standard error; None of a single seed."""
        values = list(self.accuracy.values())
        return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


Key = tuple[str, int, float, int]
"""A run: mixer, width, learning rate, seed."""

Curves = Mapping[str, Sequence[CapacityPoint]]
"""The points of each mixer."""


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
        held_out, note = (
            run.result["held_out"],
            "finished earlier" if run.reused else f"{run.result['training_seconds']:.0f} s",
        )
        request.say(f"{job.title}: {held_out['accuracy']:.1f}% recalled, {note}")

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


@dataclass(frozen=True)
class Gain:
    """By how much a mixer recalls more than plain linear attention, over the bytes that both have.

    Attributes:
        low: the least bytes that both have.
        high: the most.
        points: of accuracy, mean over log bytes between the two, by seed.
    """

    low: float
    high: float
    points: Sequence[float]

    @property
    def mean(self) -> float:
        """The mean over seeds."""
        return statistics.fmean(self.points)

    @property
    def error(self) -> float | None:
        """Its standard error; None of a single seed."""
        return statistics.stdev(self.points) / len(self.points) ** 0.5 if len(self.points) > 1 else None


def gain(own: Sequence[CapacityPoint], reference: Sequence[CapacityPoint]) -> Gain | None:
    """A mixer's gain over the reference, seed by seed; None where no two widths of one reach the bytes of the other.

    Between two widths accuracy is linear in the logarithm of bytes.
    """
    low, high = (
        choose(side(point.bytes for point in curve) for curve in (own, reference))
        for choose, side in ((max, min), (min, max))
    )
    seeds = set.intersection(*({*point.accuracy} for point in (*own, *reference)))
    if not low < high or not seeds:
        return None

    def level(curve: Sequence[CapacityPoint], seed: int) -> float:
        known = sorted((math.log2(point.bytes), point.accuracy[seed]) for point in curve)
        ends = [math.log2(low), math.log2(high)]
        places = [ends[0], *(x for x, _ in known if ends[0] < x < ends[1]), ends[1]]
        area = sum((b - a) * (at(known, a) + at(known, b)) / 2 for a, b in pairwise(places))
        return area / (ends[1] - ends[0])

    return Gain(low, high, [level(own, seed) - level(reference, seed) for seed in sorted(seeds)])


def at(known: Sequence[tuple[float, float]], x: float) -> float:
    """The value at `x` of the line through points in ascending order."""
    for (x0, y0), (x1, y1) in pairwise(known):
        if x0 <= x <= x1 and x0 < x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return next(y for place, y in known if place == x)


def judge(curves: Curves) -> list[Verdict]:
    """Whether softmax attention has learned the task, and of each other mixer whether it holds more than the reference."""
    verdicts = []
    if SOFTMAX in curves:
        worst = min(point.mean for point in curves[SOFTMAX])
        verdicts.append(
            Verdict(
                "softmax attention, whose cache holds every token, solves the task",
                f"at every width at least {SOLVED:g}% of all answers are right; where it does not hold, models are trained "
                "too little, and nothing else here says much",
                worst >= SOLVED,
                f"{worst:.1f}% at the width where it is worst",
            )
        )
    if REFERENCE not in curves:
        return verdicts
    rule = (
        "accuracy, as a mean over the logarithm of bytes between the least and the most that both have, is above that of "
        f"linear_attention by at least {ERRORS} standard errors of the differences seed by seed; it does not hold if it is "
        "below by as much; one seed decides nothing, and neither do states of no common size"
    )
    for name, curve in curves.items():
        if name not in (REFERENCE, SOFTMAX):
            found = gain(curve, curves[REFERENCE])
            holds, text = None, "no sizes of state in common"
            if found is not None:
                holds = None if found.error is None or not found.mean else beyond(found.mean, found.error)
                spread = "" if found.error is None else f" ± {found.error:.1f}"
                text = (
                    f"{found.mean:+.1f}{spread} points from {kib(found.low)} to {kib(found.high)} KiB, "
                    f"{len(found.points)} seed{'s' * (len(found.points) > 1)}"
                )
            verdicts.append(Verdict(f"{name} holds more per byte than plain linear attention", rule, holds, text))
    return verdicts


def kib(size: float) -> str:
    """Bytes in KiB, for people."""
    return f"{size / 1024:.3g}"


def findings(curves: Curves, plan: RunsPlan, request: Request, missing: str, seconds: float) -> Findings:
    """What came out, of runs that took so many seconds."""
    data = plan.config.data
    lines = []
    for name, points in curves.items():
        for point in points:
            spread = "" if point.error is None else f" ± {point.error:.1f}"
            each = " / ".join(f"{accuracy:.0f}" for _, accuracy in point.by_pairs)
            lines.append([name, str(point.width), kib(point.bytes), f"{point.rate:g}", f"{point.mean:.1f}{spread}", each])
    pairs = " / ".join(map(str, data.pairs))
    left_out = f" Unfinished, and left out: {missing}." if missing else ""
    return Findings(
        experiment="capacity",
        title=f"Capacity: associative recall by bytes of state, scale {request.scale}",
        lead=f"Rows of {data.length} tokens out of {data.vocabulary} with {pairs.replace(' / ', ', ')} pairs; accuracy is "
        f"the share of keys whose value is said, a mean over these and over {request.seeds} seed(s). Two layers, each "
        "behind a short convolution; of each mixer and width the learning rate that is best on validation rows. Bytes are "
        "those of one row's state in all layers, in float32, tokens that wait for the end of a chunk "
        f"included.{left_out}",
        config=to_plain(plan.config),
        data={
            "curves": [{"name": name, "points": [asdict(point) for point in points]} for name, points in curves.items()],
            "panels": panels(list(curves)),
            "unfinished": missing,
            "training_seconds": round(seconds, 1),
        },
        verdicts=judge(curves),
        tables={"Each width": (["mixer", "width", "state KiB", "learning rate", "recalled, %", f"of {pairs} pairs"], lines)},
        pictures={"Recall by bytes of state": ("capacity.png", "accuracy by bytes of state, a curve for each mixer")},
    )


def panels(names: Sequence[str]) -> dict[str, list[list[str]]]:
    """Which curves stand side by side, by title: the ladder's and the systems', and those that they are compared with."""
    compared = [name for name in (REFERENCE, SOFTMAX) if name in names]
    rungs = [name for name in names if name in RUNGS]
    systems = [name for name in names if name not in (*RUNGS, *compared)]
    found = {"The ladder": rungs, "Systems": systems}
    return {title: [own, compared] for title, own in found.items() if own} or {"Systems": [[], compared]}


def draw(path: Path, curves: Curves) -> None:
    """Accuracy by bytes of state, a curve for each mixer."""
    sides = panels(list(curves))
    named = {"orange": plotting.ORANGE, "purple": plotting.RED}
    with plotting.picture(path, 5.6 * len(sides), 4.4) as fig:
        axes = fig.subplots(1, len(sides), sharey=True, squeeze=False)[0]
        for ax, (title, (own, compared)) in zip(axes, sides.items(), strict=True):
            tones = ladder_tones(len(own) + len(compared), len(own))
            for i, (name, tone) in enumerate(zip([*own, *compared], tones, strict=True)):
                points = sorted(curves[name], key=lambda point: point.bytes)
                ax.errorbar(
                    [point.bytes / 1024 for point in points], [point.mean for point in points],
                    yerr=[point.error or 0.0 for point in points], label=name, marker="osD^vPX"[i % 7], markersize=4.5,
                    linestyle="--" if isinstance(tone, str) else "-", linewidth=1.3, capsize=2,
                    color=named[tone] if isinstance(tone, str) else plotting.shade(tone),
                )  # fmt: skip
            plotting.log_axis(ax)
            ax.set_title(title)
            ax.set_xlabel("state of one row, KiB")
            ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
        axes[0].set_ylabel("keys whose value is recalled, %")
