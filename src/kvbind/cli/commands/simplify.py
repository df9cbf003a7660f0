"""`kvbind simplify`: a trained model with a simpler inner loop."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from kvbind.cli import output
from kvbind.cli.arguments import Overrides
from kvbind.commands import check_folder


def command(
    model: Annotated[
        Path,
        typer.Argument(help="Folder of a finished training run, or of a model of this library.", show_default=False),
    ],
    overrides: Overrides = None,
    to: Annotated[
        str | None,
        typer.Option(
            help="What its inner loop becomes: rung0 to rung6 of its own ladder, ascent, key_for_query, a named system, or "
            "a YAML file of an inner loop. Edits such as model.inner.update=last hold on top of it, or alone.",
            show_default=False,
            metavar="NAME|FILE",
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Of fine-tuning.", min=1)] = 100,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="Data to fine-tune on, a part of which is held out; default what the model was trained on, where that is "
            "known.",
            metavar="PATH",
        ),
    ] = None,
    targets: Annotated[
        Literal["data", "outputs"],
        typer.Option(help="What is learned: the task's own targets, or what the model said before (distillation)."),
    ] = "data",
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run; default runs/simplify-TASK-HASH.", show_default=False)
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start anew, instead of going on where the folder's run stopped.")
    ] = False,
    accept_changed_data: Annotated[
        bool,
        typer.Option("--accept-changed-data", help="Go on though files of the data were edited, removed or added since."),
    ] = False,
) -> None:
    """Give a trained model a simpler inner loop, fine-tune it, and say what that costs and gains.

    Every weight that still has a meaning is kept. The report has the quality before, after the edit and after each tenth of
    the steps, and the speed of both models. Ctrl-C leaves a checkpoint, from which the same command goes on; the model that
    is left in the run's folder opens like any other.

    For example: [bold]kvbind simplify runs/mine --to rung2 --steps 200[/], or of a converted release
    [bold]kvbind simplify mine --to rung2 --data book.txt --targets outputs train.learning_rate=1e-4[/]
    """
    from kvbind.experiments.request import Request
    from kvbind.experiments.saved_models.simplification import simplify as run_edit
    from kvbind.experiments.saved_models.simplification_plan import plan as plan_edit
    from kvbind.experiments.training.run_folders import WEIGHTS

    check_folder("--out", out)
    planned = plan_edit(model, to, steps, data=data, targets=targets, out=out, overrides=overrides or [])
    screen = output.console()
    with output.continuable():
        request = Request(task=planned.saved.task, scale="own", console=screen, fresh=fresh)
        results = run_edit(planned, request, accept_changed_data=accept_changed_data)
    output.show_tables(screen, results)
    screen.print(f"model: {planned.folder / WEIGHTS}", soft_wrap=True)
    output.say_next(screen, planned.saved.task, planned.folder)
