"""`kvbind show`: what a trained image model attends to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvbind.cli import output
from kvbind.cli.arguments import check_file, run_and_rest


def command(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[TASK] RUN",
            help="Folder of the training run; the task, images, may stand before it.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="PNG to write.")],
    image: Annotated[int, typer.Option(help="Number of the held-out image.", min=0)] = 0,
    at: Annotated[
        list[str] | None,
        typer.Option(
            help="A query's place, as fractions of the image's height and width; may be given several times. Default: three "
            "places down the middle.",
            metavar="Y,X",
            show_default=False,
        ),
    ] = None,
    layer: Annotated[
        list[int] | None,
        typer.Option(
            help="A layer to draw, from 0; may be given several times. Default: up to four over the depth.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Draw what a trained image model attends to: the linear attention that each layer's inner loops are.

    For example: [bold]kvbind show runs/mine --out picture.png --image 7 --at 0.3,0.6[/]
    """
    from kvbind.experiments.saved_models.attention_maps import PLACES, read_place
    from kvbind.experiments.saved_models.attention_maps import show as draw

    check_file("--out", out)
    task, run, rest = run_and_rest(words)
    if task not in (None, "images"):
        raise ValueError(f"task must be 'images'; got {task!r}")
    if rest:
        raise ValueError(f"show takes a run alone; got {' '.join(rest)!r} behind it")
    places = [read_place(text) for text in at] if at else PLACES
    answer = draw(run, out, image=image, places=places, layers=layer or ())
    output.console().print(f"class {answer['class']}, predicted {answer['predicted']}; wrote {out}", soft_wrap=True)
