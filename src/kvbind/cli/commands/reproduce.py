"""`kvbind reproduce`: tables and figures of the paper."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from kvbind.cli import output
from kvbind.cli.arguments import TASK_NAMES, Overrides, Verbose
from kvbind.commands import check_folder
from kvbind.tasks import TASKS


def command(
    experiment: Annotated[
        str,
        typer.Argument(
            help="Which: table1 (gradient ascent, and keys for queries), table2 (the ladder), theorems, figure1 (more inner "
            "steps at test time), figure2 (queries beside keys), figure3 (loss by position), figure4 (the forms by the "
            "clock), gaps (each row's gap to the full system along training), sizes (the same by size), chunks "
            "(views in several updates), capacity (recall by bytes of state), systems (language models side by side), "
            "simplify (how much of training from scratch fine-tuning a simplified model saves), "
            "explorer (models to look into), or all."
        ),
    ],
    task: Annotated[
        str | None,
        typer.Option(
            help=f"What is trained: {TASK_NAMES}, or all; default language, of capacity recall.", show_default=False
        ),
    ] = None,
    scale: Annotated[
        str, typer.Option(help="smoke (minutes on two CPU cores), small (one GPU), large (ten times as much), or paper.")
    ] = "smoke",
    seeds: Annotated[int, typer.Option(help="Training runs per row, each from another seed.", min=1)] = 1,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the report; default runs/EXPERIMENT-TASK-SCALE.", show_default=False)
    ] = None,
    trained: Annotated[
        Path | None,
        typer.Option(help="Folder of the training runs; default trained/ in --out, or runs/trained.", show_default=False),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume/--fresh", help="Keep what is finished and go on with the rest, or train everything anew."),
    ] = True,
    minutes: Annotated[
        float | None,
        typer.Option(
            help="Train no longer than this: unfinished runs leave a checkpoint, and the report is on those that are "
            "finished. 0 only writes reports.",
            min=0.0,
            show_default=False,
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Runs trained at once, in turn over all GPUs; default one per GPU, or per CPU core up to 4. Several small "
            "runs may share a GPU.",
            min=1,
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            help="Data in place of the configuration's; for several tasks TASK=PATH, once for each.",
            metavar="PATH",
            show_default=False,
        ),
    ] = None,
    measure_steps: Annotated[
        int | None,
        typer.Option(
            help="Time this many steps of each row on generated data instead of training, and project the whole; at --scale "
            "paper 20, unless --train is given.",
            min=1,
            show_default=False,
        ),
    ] = None,
    really_train: Annotated[
        bool, typer.Option("--train", help="At --scale paper: train indeed, which takes months of one GPU.")
    ] = False,
    rows: Annotated[
        str | None,
        typer.Option(
            help="Rows to train, or to measure steps of, with commas between them, such as rung0,rung2,window; default all. "
            "Others are reported where they are finished.",
            show_default=False,
        ),
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Train nothing: list the runs, how far each is, and how long the rest takes.")
    ] = False,
    price: Annotated[float, typer.Option(help="Of a GPU for an hour, for projections.", min=0.0, max=1e6)] = 2.5,
    efficiency: Annotated[
        float, typer.Option(help="Of several GPUs over as many times one, for projections; assumed.", min=0.01, max=1.0)
    ] = 0.9,
    verbose: Verbose = False,
    overrides: Overrides = None,
) -> None:
    """Reproduce a table or figure of the paper, or all of them: train, evaluate, time, and write the report.

    [bold]kvbind reproduce table2 --task language --scale smoke[/] trains all seven
    rungs of the ladder and two controls on the Python standard library's own
    source, on a laptop, in minutes. Interrupt it and run it again: it goes on.
    Rows that tables share are trained once; [bold]kvbind reproduce all[/] plans
    them together and fills all GPUs.
    """
    from kvbind.experiments import EXPERIMENTS, open_experiment
    from kvbind.experiments.progress import plan_experiment
    from kvbind.experiments.request import Measure
    from kvbind.inner.value import nearest

    known = (*EXPERIMENTS, "all")
    if experiment not in known:
        raise ValueError(f"experiment must be one of {', '.join(known)}; got {experiment!r}{nearest(experiment, known)}")
    check_folder("--out", out)
    check_folder("--trained", trained)
    steps = measure_steps or (20 if scale == "paper" and not (really_train or plan) else None)
    module = open_experiment("reproduce_all" if experiment == "all" else experiment)
    usual = "all" if experiment == "all" else getattr(module, "TASK", "language")
    named, task = sources(data or []), task or usual
    if isinstance(named, dict) and task != "all" and set(named) != {task}:
        raise ValueError(f"data must be of the task {task}; got data for {', '.join(named)}")
    chosen = None if rows is None else tuple(name.strip() for name in rows.split(","))
    asked: dict[str, Any] = {
        "task": task,
        "scale": scale,
        "seeds": seeds,
        "out": out,
        "trained": trained,
        "fresh": not resume,
        "minutes": minutes,
        "rows": chosen,
        "data": named,
        "workers": workers,
        "measure": None if steps is None else Measure(steps, chosen, price, efficiency),
        "overrides": overrides or [],
        "console": output.console(),
        "verbose": verbose,
    }
    if plan:
        plan_experiment(experiment, **asked)
        return
    with output.continuable():
        module.reproduce(**asked)


def sources(words: Sequence[str]) -> str | dict[str, str] | None:
    """What `--data` says: a path, or one for each task that is named.

    Raises:
        ValueError: several paths without tasks, or a task twice.
    """
    named = [word.partition("=") for word in words]
    if len(words) == 1 and named[0][0] not in TASKS:
        return words[0]
    for task, _, _ in named:
        if task not in TASKS:
            raise ValueError(f"data must be one path, or TASK=PATH with a task among {TASK_NAMES}; got {list(words)}")
    found = {task: path for task, _, path in named}
    if len(found) < len(named):
        raise ValueError(f"data must name each task once; got {list(words)}")
    return found or None
