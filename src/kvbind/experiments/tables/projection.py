"""Steps in place of training: a configuration as it is, some steps of it measured, and what the whole would take.

The paper's own runs take months of one GPU. This trains each row's exact model for a few steps on data of the exact shapes,
made by chance, and says from their time what the configured number of steps comes to on one GPU and on more.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from kvbind.bench.harness.timing import now
from kvbind.experiments import plotting
from kvbind.experiments.report.findings import Findings, write_findings
from kvbind.experiments.request import Measure, Request
from kvbind.experiments.results.cache import ResultCache
from kvbind.experiments.subjects import ALL, NONE, SUBJECTS, Subject, named_subject
from kvbind.experiments.subjects.rows import row_labels
from kvbind.experiments.training.plans import configuration, report_folder, row_configs
from kvbind.inner.value import check_choice
from kvbind.precision import matmul_precision
from kvbind.screen import duration
from kvbind.tasks import open_task_module
from kvbind.train.config import to_plain
from kvbind.train.graphs import to_device
from kvbind.train.loop import pick_device
from kvbind.train.memory import initial
from kvbind.train.optimizer import make_optimizer
from kvbind.train.recompute import recompute
from kvbind.train.step import precision

GPUS = (1, 8, 64)

WARM_UP = 2
"""Steps before those that are measured: they compile, tune and allocate."""

AT_ONCE = {"images": 128}
"""Samples in a batch at most, by task; larger batches are made of several, whose gradients are added up."""

SCENES = 64
"""How many procedural scenes stand in for a data set of views."""

CACHE = "steps.json"
"""Beside a report: the steps that were measured for it."""

Loss = Callable[[nn.Module, int], Tensor]
"""The loss of the batch of that number."""


@dataclass(frozen=True)
class Steps:
    """Some measured steps of one configuration.

    Attributes:
        parameters: of the model.
        samples: in a batch.
        units: in a batch: tokens, images or views.
        batches: of each optimizer step, as configured.
        steps: optimizer steps, as configured.
        batch_seconds: forward and backward of each measured batch.
        optimizer_seconds: clipping and the optimizer's step, behind each.
        losses: of each batch, those of the warm-up among them.
        peak_bytes: the most memory held at once; None on a CPU.
    """

    parameters: int
    samples: int
    units: int
    batches: int
    steps: int
    batch_seconds: list[float]
    optimizer_seconds: list[float]
    losses: list[float]
    peak_bytes: int | None

    def seconds(self, gpus: int, efficiency: float) -> float:
        """The whole training, with the samples of each step divided among GPUs of that efficiency."""
        share = self.batches / (gpus * efficiency if gpus > 1 else 1)
        return self.steps * (share * statistics.median(self.batch_seconds) + statistics.median(self.optimizer_seconds))


def measure_steps(task: str, config: Any, device: torch.device, steps: int) -> Steps:
    """Train a configuration's own model for some steps, each of one batch of generated data.

    Args:
        task: its name.
        config: of that task, as its `resolve` gives it.
        device: where to train.
        steps: measured, after `WARM_UP` more.
    """
    most = AT_ONCE.get(task, config.data.batch)
    samples = most if config.data.batch % most == 0 else config.data.batch
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    with tf32(config.train, device):
        model, loss, units = GENERATED[task](config, samples, device)
        recompute(
            open_task_module(task).Task.blocks(model), initial(config.train.activation_checkpointing, torch.device("cpu"))
        )
        model.to(device).train()
        optimizer = make_optimizer(model, config.train)
        batch_seconds, optimizer_seconds, losses = [], [], []
        for number in range(WARM_UP + steps):
            start = now(device)
            with precision(config.train, device):
                value = loss(model, number)
            value.backward()
            middle = now(device)
            nn.utils.clip_grad_norm_(model.parameters(), config.train.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            batch_seconds.append(middle - start)
            optimizer_seconds.append(now(device) - middle)
            losses.append(float(value.detach()))
    return Steps(
        parameters=sum(p.numel() for p in model.parameters()),
        samples=samples,
        units=units,
        batches=config.train.accumulate * config.data.batch // samples,
        steps=config.train.steps,
        batch_seconds=batch_seconds[WARM_UP:],
        optimizer_seconds=optimizer_seconds[WARM_UP:],
        losses=losses,
        peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    )


def generated_tokens(config: Any, samples: int, device: torch.device) -> tuple[nn.Module, Loss, int]:
    """The language model on tokens drawn evenly from its vocabulary."""
    from kvbind.models.presets import PRESETS
    from kvbind.tasks.language import build_model

    vocabulary = 257 if config.data.tokenizer == "bytes" else PRESETS[config.model.size]["vocab_size"]
    with device:  # where there are many weights, a CPU takes long to draw them
        model = build_model(config, SimpleNamespace(vocab_size=vocabulary, end=vocabulary - 1))

    def loss(model: nn.Module, number: int) -> Tensor:
        random = torch.Generator().manual_seed(number)
        ids = torch.randint(vocabulary, (samples, config.data.length), generator=random).to(device)
        value: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
        return value

    return model, loss, samples * config.data.length


def generated_images(config: Any, samples: int, device: torch.device) -> tuple[nn.Module, Loss, int]:
    """The classifier on noise, varied as training images are behind their decoding."""
    from kvbind.tasks.images import build_model
    from kvbind.tasks.images.augment import Augment

    data, names = config.data, [str(i) for i in range(1000 if config.data.images else 10)]
    model = build_model(config, names)
    augment = Augment(config.augment, data.mean, data.std, len(names))
    generator = torch.Generator(device).manual_seed(0)
    images = torch.randint(256, (samples, data.channels, data.size, data.size), generator=generator, device=device)
    labels = torch.randint(len(names), (samples,), generator=generator, device=device)
    pixels = images.to(torch.uint8)

    def loss(model: nn.Module, number: int) -> Tensor:
        x, targets = augment(pixels, labels, number)
        value: Tensor = model(x, labels=targets).loss
        return value

    return model, loss, samples


def generated_views(config: Any, samples: int, device: torch.device) -> tuple[nn.Module, Loss, int]:
    """The view synthesis model on procedural scenes, in pictures of the configured size."""
    from kvbind.tasks.views import Task

    data = config.data
    scenes = replace(data.procedural, scenes=max(SCENES, samples), views=data.inputs + data.targets)
    data = replace(data, source="procedural", held_out_source=None, procedural=scenes, batch=samples, workers=0, span=0)
    task = Task(replace(config, data=data))
    batches = task.batches(None)

    def loss(model: nn.Module, number: int) -> Tensor:
        return task.loss(model, to_device(next(batches)[0], device))  # type: ignore[arg-type]

    return task.build(), loss, samples * data.views


GENERATED = {"language": generated_tokens, "images": generated_images, "views": generated_views}
"""By task: the model, the loss of a batch, and how many units a batch holds."""


@contextmanager
def tf32(config: Any, device: torch.device) -> Iterator[None]:
    """The precision of float32 products in training."""
    with matmul_precision("high" if config.tf32 and device.type == "cuda" else "highest"):
        yield


def measure_rows(name: str, rows: Sequence[str], request: Request) -> dict[str, Any]:
    """Measure steps of the rows of a table, and write what their training would take.

    Args:
        name: of the table.
        rows: names of the table's rows.
        request: what was asked, with its `measure`; of the task "all", each in turn.

    Returns:
        What `results.json` holds; of "all", by task. It is written after every row. What an earlier call measured of the
        same configuration on this machine is in it too, and not measured again, unless `request.fresh`.

    Raises:
        ValueError: an unknown task, scale or row, or an edit that does not fit.
    """
    if request.task == ALL:
        places = {task: request.out and request.out / task for task in SUBJECTS}
        return {task: measure_rows(name, rows, replace(request, task=task, out=places[task])) for task in SUBJECTS}
    measure, task, subject = request.measure or Measure(), request.task, named_subject(request.task)
    for row in measure.rows or ():
        check_choice("rows", row, tuple(rows))
    full = configuration(task, request.scale, 0, request.overrides)
    device = pick_device(full.train.device)
    out = request.out or report_folder(name, task, request.scale)
    out.mkdir(parents=True, exist_ok=True)
    request.say(f"{name}, {task}, scale {request.scale}: {measure.steps} steps of each row on {device}; report in {out}")

    cache = ResultCache(out / CACHE, device, request.fresh)
    configs = {row: config for row, config in row_configs(task, full).items() if row in rows}
    asked = measure.rows or tuple(rows)
    found = {row: Steps(**x) for row, config in configs.items() if (x := cache.get(to_plain(config), measure.steps))}
    left_out = {row: "not measured yet" if row in configs else "does not apply" for row in asked if row not in found}

    def written(request: Request) -> dict[str, Any]:
        ordered = {row: found[row] for row in rows if row in found}
        return write(name, ordered, left_out, full, request, measure, out, device)

    for row in asked:
        if row in found:
            request.say(f"{sentence(row, found[row], subject, measure)}; measured earlier")
        elif row in configs and request.deadline is not None and time.monotonic() >= request.deadline:
            left_out[row] = "no time left"
        elif row in configs:
            try:
                found[row] = measure_steps(task, configs[row], device, measure.steps)
            except torch.OutOfMemoryError as error:
                left_out[row] = str(error).partition(".")[0]
                request.say(f"{row}: {left_out[row]}")
            else:
                del left_out[row]
                cache.put(asdict(found[row]), to_plain(configs[row]), measure.steps)
                request.say(sentence(row, found[row], subject, measure))
                written(replace(request, console=None))  # a row may take minutes, and the next one may be interrupted
    return written(request)


def sentence(row: str, steps: Steps, subject: Subject, measure: Measure) -> str:
    """What was measured of a row, and what it comes to."""
    per_second = steps.units / statistics.median(steps.batch_seconds)
    days = ", ".join(f"{duration(steps.seconds(n, measure.efficiency))} on {n}" for n in GPUS)
    return f"{row}: {per_second:,.0f} {subject.speed.unit}/s; {days}"


def write(
    name: str,
    found: dict[str, Steps],
    left_out: dict[str, str],
    config: Any,
    request: Request,
    measure: Measure,
    out: Any,
    device: torch.device,
) -> dict[str, Any]:
    """The report: numbers, a picture, and a page."""
    subject, efficiency = named_subject(request.task), measure.efficiency
    labels = row_labels(tuple(found), subject)
    header = ["", f"{subject.speed.unit}/s", "per\nbatch", "peak\nGiB", *(f"time\non {n}" for n in GPUS),
              *(f"cost\non {n}" for n in GPUS)]  # fmt: skip
    lines, rows = [], []
    for row, steps in found.items():
        seconds = {n: steps.seconds(n, efficiency) for n in GPUS}
        cost = {n: n * seconds[n] / 3600 * measure.price for n in GPUS}
        batch = statistics.median(steps.batch_seconds)
        lines.append([
            labels[row], f"{steps.units / batch:,.0f}", duration(batch),
            NONE if steps.peak_bytes is None else f"{steps.peak_bytes / 2**30:.1f}",
            *(duration(x) for x in seconds.values()), *(f"{x:,.0f}" for x in cost.values()),
        ])  # fmt: skip
        rows.append({"name": row, "label": labels[row], **asdict(steps), "projected_seconds": seconds, "cost": cost})
    if found:
        speeds = {labels[row]: steps.units / statistics.median(steps.batch_seconds) for row, steps in found.items()}
        draw(out / "steps.png", speeds, subject)
    first = next(iter(found.values()), None)
    size = "" if first is None else (
        f" {first.parameters / 1e6:,.1f} million parameters; {first.steps:,} steps of {first.batches * first.samples} "
        f"samples, measured in batches of {first.samples}."
    )  # fmt: skip
    without = "".join(f" {row}: {why}." for row, why in left_out.items())
    findings = Findings(
        experiment="steps",
        title=f"What {name} takes: {request.task}, scale {request.scale}",
        lead=f"The exact configurations for {measure.steps} measured steps each, on generated data, and what the whole "
        f"would take.{size} Assumed, not measured: several GPUs at {efficiency:.0%} of as many times one, and "
        f"{measure.price:g} per GPU and hour; reading data and evaluations cost nothing.{without}",
        config=to_plain(config),
        data={"table": name, "measure": asdict(measure), "measured": rows, "left_out": left_out},
        verdicts=[],
        tables={"Measured and projected": (header, lines)},
        pictures={"Speed": ("steps.png", f"{subject.speed.unit} per second of training, by row")} if found else {},
    )
    return write_findings(out, replace(request, seeds=1), findings, device)


def draw(path: Any, speeds: dict[str, float], subject: Subject) -> None:
    """A bar per row."""
    with plotting.picture(path, 7.2, 0.34 * len(speeds) + 1.0) as fig:
        ax = fig.subplots()
        ax.barh(range(len(speeds)), list(speeds.values()), height=0.6, color=plotting.BLUE)
        ax.set_yticks(range(len(speeds)), list(speeds))
        ax.set_ylim(len(speeds) - 0.5, -0.5)
        ax.grid(axis="y", visible=False)
        ax.set_xlabel(f"{subject.speed.unit} per second, forward and backward")
        ax.set_title("Training on one device")
