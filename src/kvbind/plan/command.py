"""What `kvbind plan` does: read a configuration, plan it for some numbers of GPUs, and show that."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from kvbind.files import shortened
from kvbind.hardware import accelerator
from kvbind.models import LactConfig
from kvbind.plan.calibration import SHIPPED, Calibration, load_calibration, read_points, rung_name, save_calibration
from kvbind.plan.calibration import calibrate as fit
from kvbind.plan.costs import PlannedTraining
from kvbind.plan.planner import MeshPlan, plan
from kvbind.plan.planner import overrides as edits_of
from kvbind.plan.report import Budget, as_data, show
from kvbind.provenance import command
from kvbind.tasks import language
from kvbind.train.config import read_config
from kvbind.train.files import write_text

MOST_GPUS = 2**20
MOST_TOKENS = 2**50
"""Of a step, and of all training: a thousand million million, beyond which figures have no meaning."""
MOST_PRICE = 1e6


def job_of(
    preset: str, overrides: Sequence[str], tokens: int | None, batch: int | None, recompute: str
) -> tuple[PlannedTraining, int]:
    """What a configuration of the language task trains, and the tokens of all its steps.

    The vocabulary is that of the model's size: to know the tokenizer's, it would have to be opened.

    Args:
        preset: a shipped configuration of the task, or a YAML file.
        overrides: `key=value` edits of it.
        tokens: in a sequence, in place of the configuration's.
        batch: sequences in a step; default as many as keep a step's tokens what they are, and at least one.
        recompute: as `PlannedTraining` takes it.

    Raises:
        ValueError, TypeError: a configuration that does not fit, or more tokens in a step than `MOST_TOKENS`.
    """
    config = read_config(language.LanguageConfig, language.PRESETS, preset, overrides)
    inner = language.inner_loop(config.model)
    fields = language.model_fields(config.model) | {"inner": inner, "ttt_form": config.model.ttt_form}
    per_step = config.data.length * config.data.batch * config.train.accumulate
    length = tokens or config.data.length
    sequences = batch or max(1, per_step // length)
    if length * sequences > MOST_TOKENS:
        raise ValueError(
            f"tokens times batch must be at most {MOST_TOKENS:,} in a step; got {length} in each of {sequences} sequences"
        )
    size = config.model.size if not config.model.fields else ""
    gather = 2 if getattr(config.train, "gather", "float32") == "bfloat16" else 4
    job = PlannedTraining(
        LactConfig(**fields),
        length,
        sequences,
        recompute=recompute,
        gather_bytes=gather,
        preset=size,
        rung=rung_name(config.model.size, inner),
    )
    return job, config.train.steps * per_step


@dataclass(frozen=True)
class PlannedCounts:
    """Plans of one configuration for some numbers of GPUs.

    Attributes:
        plans: one per number.
        title: what is trained, and on what.
        budget: for how long.
        calibration: what efficiencies were taken from.
        training: the command that trains, to which a plan's overrides are added.
    """

    plans: list[MeshPlan]
    title: str
    budget: Budget
    calibration: Calibration
    training: str


def make_plans(
    preset: str,
    gpus: str,
    overrides: Sequence[str] = (),
    *,
    tokens: int | None = None,
    batch: int | None = None,
    hardware: str = "h100",
    recompute: str = "block",
    budget: float | None = None,
    price: float | None = None,
) -> PlannedCounts:
    """Plan a configuration of the language task; see the options of `kvbind plan`.

    Raises:
        ValueError, TypeError: an option that does not fit; the message names it.
    """
    calibration = load_calibration()
    counts = [part.strip() for part in gpus.split(",")]
    # a text of thousands of digits is no number to Python
    if not all(part.isdecimal() and len(part) < 20 and 1 <= int(part) <= MOST_GPUS for part in counts):
        raise ValueError(
            f"gpus must be whole numbers from 1 to {MOST_GPUS:,} with commas between them; got {shortened(gpus)}"
        )
    if len({int(part) for part in counts}) < len(counts):
        raise ValueError(f"gpus must be different numbers; got {gpus}")
    device = accelerator(hardware)
    job, planned = job_of(preset, overrides, tokens, batch, recompute)
    spent = Budget(planned if budget is None else budget, price)
    if not 0 < spent.tokens <= MOST_TOKENS:
        raise ValueError(f"budget must be above 0 and at most {MOST_TOKENS:.3g} tokens; got {spent.tokens}")
    if price is not None and not 0 <= price <= MOST_PRICE:
        raise ValueError(f"price must be from 0 to {MOST_PRICE:,.0f} for an hour of one GPU; got {price}")
    everything, _ = job.parameters
    rung = f", {job.rung.replace('rung', 'rung ')}" if job.rung else ""
    title = (
        f"{preset}{rung}, {job.form} form: {amount(everything)} parameters, {job.length:,} tokens, {device.title}, "
        f"{amount(spent.tokens)} tokens in all"
    )
    plans = [plan(job, int(count), hardware, device, calibration) for count in counts]
    decided = {edit.partition("=")[0] for one in plans for edit in edits_of(one.options[0])}
    kept = [edit for edit in overrides if edit.partition("=")[0] not in decided]
    training = " ".join([f"kvbind train language --preset {preset}", *kept])
    return PlannedCounts(plans, title, spent, calibration, training)


def amount(number: float) -> str:
    """A number of parameters or tokens for people."""
    for unit, size in (("billion", 1e9), ("million", 1e6)):
        if number >= size:
            count = number / size
            return f"{count:.3g} {unit}" if count < 1000 else f"{count:,.0f} {unit}"
    return f"{number:,.0f}"


def run_plan(
    preset: str,
    gpus: str,
    overrides: Sequence[str],
    console: Console,
    *,
    calibrate: Sequence[Path] = (),
    write: Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Plan and show.

    Args:
        preset: as `make_plans` takes it, like the further options.
        gpus: numbers of GPUs, as `make_plans` takes them.
        overrides: edits of the preset, as `make_plans` takes them.
        console: where to show.
        calibrate: results to calibrate from first.
        write: a JSON file to write everything to.
        **options: as there.

    Returns:
        What is written as JSON.

    Raises:
        ValueError, TypeError: as there, or files that hold no measured steps.
    """
    if calibrate:
        save_calibration(fit([point for path in calibrate for point in read_points(path)]))
        console.print(f"written to {SHIPPED}, which all later plans take", soft_wrap=True, markup=False)
    made = make_plans(preset, gpus, overrides, **options)
    show(made.plans, made.title, made.budget, made.calibration, made.training, console)
    found = {"command": command(), "preset": preset, "overrides": list(overrides)}
    found |= as_data(made.plans, made.budget, made.calibration)
    if write is not None:
        write_text(write, json.dumps(found, indent=1) + "\n")
    return found
