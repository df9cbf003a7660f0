"""`kvbind probe`: the paper's four probes on a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="Data whose held-out part to probe the model on; default what it was trained on, where that is known.",
            metavar="PATH",
        ),
    ] = None,
    steps: Annotated[
        int, typer.Option(help="The most steps of the inner loop; 1, 2, 4 ... up to so many are tried.", min=1)
    ] = 8,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the report; default probe/ in the run's, or runs/probe-NAME for a model alone.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Try on a trained model what a memory of keys and values could not bear: the paper's four probes, at test time.

    More steps of the inner loop, its gradient the other way, keys in the place of queries; and whether queries lie among
    the keys, and outputs among the values. Nothing is trained. Any saved model of language, images or views.

    For example: [bold]kvbind probe runs/mine[/], or of a converted release
    [bold]kvbind probe mine --data book.txt data.evaluation_samples=16[/]
    """
    from kvbind.experiments.request import Request
    from kvbind.experiments.saved_models.probe import probe as run_probes
    from kvbind.experiments.saved_models.saved_model import open_saved

    check_folder("--out", out)
    saved = open_saved(model, data, overrides or [])
    screen = output.console()
    results = run_probes(saved, Request(task=saved.task, scale="own", console=screen, out=out), model, steps)
    output.show_tables(screen, results)
