"""`kvbind render`: pictures of a trained view synthesis model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvbind.cli import output
from kvbind.cli.arguments import with_data


def command(
    run: Annotated[Path, typer.Argument(help="Folder of a training run of task views.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder to write to; default `pictures` in the run's.", show_default=False)
    ] = None,
    scenes: Annotated[int, typer.Option(help="How many held-out scenes, at the most.", min=1)] = 4,
    frames: Annotated[int, typer.Option(help="Of the turntable.", min=1)] = 48,
    data: Annotated[
        str | None,
        typer.Option("--data", help="Other scenes to show: a folder or JSON file of posed images.", metavar="PATH"),
    ] = None,
) -> None:
    """Draw what a trained view synthesis model sees: inputs, predictions and errors, and a camera moving around scenes."""
    from kvbind.experiments.training.runs import load_model, open_run
    from kvbind.tasks.views import Task
    from kvbind.tasks.views.render import write_pictures
    from kvbind.train.loop import pick_device

    trained_on, config = open_run(run, with_data(None, "held_out_source", data))
    if trained_on != "views":
        raise ValueError(f"run must be one of task 'views'; {str(run)!r} is one of {trained_on!r}")
    opened = Task(config, training=False)
    model = load_model(run, opened).to(pick_device(config.train.device))
    for path in write_pictures(model, opened, out or run / "pictures", scenes=scenes, frames=frames):
        output.console().print(f"wrote {path}", soft_wrap=True)
