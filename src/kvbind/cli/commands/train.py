"""`kvbind train`: one training run."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from kvbind.cli import output
from kvbind.cli.arguments import TASK_NAMES, Data, Overrides, Verbose, with_data
from kvbind.screen import Screen, duration
from kvbind.tasks import TASKS, preset_files


def command(
    task: Annotated[str, typer.Argument(help=f"What to train: {TASK_NAMES}.")],
    overrides: Overrides = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="A YAML file, or a shipped configuration; default the smallest, of one's own pictures photos. "
            + " ".join(f"{task.capitalize()}: {', '.join(preset_files(task))}." for task in TASKS),
            show_default=False,
        ),
    ] = None,
    data: Data = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the run; default runs/TASK-PRESET-HASH, the hash telling configurations apart.",
            show_default=False,
        ),
    ] = None,
    fresh: Annotated[
        bool,
        typer.Option(
            "--fresh",
            help="Start anew, instead of going on where the folder's run stopped. That is kept until the new one has a "
            "checkpoint.",
        ),
    ] = False,
    accept_changed_data: Annotated[
        bool,
        typer.Option(
            "--accept-changed-data",
            help="Go on though files of the data were edited, removed or added since, and write that down in the folder.",
        ),
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Train a model, or go on with a run that was interrupted.

    Ctrl-C leaves a checkpoint, from which the same command goes on. A larger train.steps in the same --out goes on longer.

    For example: [bold]kvbind train language --preset tiny model.inner.update=last train.steps=500[/], or on text of your own
    [bold]kvbind train language --data book.txt[/]

    On several GPUs: [bold]torchrun --nproc-per-node 8 -m kvbind train language --preset 760m[/]
    """
    from kvbind import provenance
    from kvbind.experiments.training.run_folders import CONFIG, WEIGHTS, open_run
    from kvbind.experiments.training.runs import begun_before, run_name, train_run
    from kvbind.tasks import open_task_module
    from kvbind.tasks.contents import RECORD, check_unchanged
    from kvbind.train.bars import progress_bars
    from kvbind.train.checkpoint import checkpoints
    from kvbind.train.config import read_config, to_yaml
    from kvbind.train.loop import pick_device
    from kvbind.train.ranks import connected, rank

    edits = with_data(overrides, "source", data)
    module = open_task_module(task)
    suited = getattr(module, "suited_preset", lambda edits: None)
    preset = preset or suited(edits) or module.SMALLEST
    config = read_config(module.Config, module.PRESETS, preset, edits)
    as_before = getattr(module, "as_before", None)
    if as_before is not None and out is not None and not fresh and (out / CONFIG).is_file():
        trained_on, before = open_run(out)
        config = as_before(config, before) if trained_on == task else config
    config = module.resolve(config)
    folder = out or Path("runs") / run_name(task, config).replace(task, f"{task}-{Path(preset).stem}", 1)
    earlier = begun_before(task, config, folder) if out is None else None
    with connected(config.train.device):
        first = rank() == 0
        screen = output.console() if first else Screen(quiet=True)

        def begun(parameters: int) -> None:
            if verbose:
                screen.print(to_yaml(config), style="dim", soft_wrap=True)
            screen.print(
                f"{task}, preset {preset}: {parameters:,} parameters, {config.train.steps:,} steps, on "
                f"{pick_device(config.train.device)}",
                soft_wrap=True,
            )
            screen.print(f"run folder: {folder} (the configuration is in its {CONFIG})", soft_wrap=True)
            if earlier is not None:
                tell_earlier(screen, *earlier, config.train.steps)

        with output.continuable(), progress_bars(screen if first else None) as add:
            bar = add("training", config.train.steps)
            run = train_run(
                task, config, folder, bar, fresh=fresh, accept_changed_data=accept_changed_data,
                begun=begun, made_by=provenance.command(),
            )  # fmt: skip
        if run.reused and first and not accept_changed_data and (folder / RECORD).is_file():
            check_unchanged(folder, module.Task(config).contents(), checkpoints(folder))
    if run.reused:
        screen.print(f"{folder} holds this run, finished earlier: nothing was trained (--fresh trains anew)", soft_wrap=True)
    output.show_metrics(screen, run.result["held_out"])
    result, unit = run.result, run.result["unit"]
    speed = f"{run.speed(unit):,.0f} {unit}/s at the median step"
    screen.print(f"{result['steps']} steps in {duration(result['training_seconds'])} ({speed}), {result['skipped']} skipped")
    screen.print(f"model: {folder / WEIGHTS}", soft_wrap=True)
    output.say_next(screen, task, folder)


def tell_earlier(screen: Console, run: Path, steps: int, wanted: int) -> None:
    """That a run begins anew though `run` might have gone on, and how to do that instead."""
    quoted = shlex.quote(str(run))
    if steps < wanted:
        text = f"a new run: {run} is the same with {steps:,} steps, and the same command with --out {quoted} goes on from it"
    else:
        text = (
            f"a new run: {run} is the same on data that have changed since, and the same command with --out {quoted} "
            "--accept-changed-data goes on with it"
        )
    screen.print(text, soft_wrap=True)
