"""`kvbind bench models`: whole models beside what a user would pick instead."""

from __future__ import annotations

from typing import Annotated

import typer

from kvbind.bench.options import Device, Out, open_device, some_of
from kvbind.bench.output import say_written, show_grid


def command(
    what: Annotated[
        str, typer.Option(help="language, small, vision, views, decode; some of them, in that order, or all.")
    ] = "all",
    sizes: Annotated[str, typer.Option(help="full, for a GPU, or tiny, for a look on a CPU.")] = "full",
    seconds: Annotated[float, typer.Option(min=0.0, help="How long to time each kind of steps at the most.")] = 1.5,
    budget: Annotated[float, typer.Option(min=0.0, help="End after this, seconds.")] = 540,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep what is in the file, of this machine and versions; measure the rest.")
    ] = False,
    device: Device = "auto",
    out: Out = None,
) -> None:
    """Train and decode whole models, each beside what a user would pick instead: Llama, ViT, full attention to all views.

    Every row gets a measurement of both first; the other ways, compiled ones last, have what time is left. The same command
    with --resume measures those that had none.
    """
    from kvbind.bench.models.beside_peers import main
    from kvbind.bench.models.plans import PARTS, SIZES
    from kvbind.bench.tables.models import model_grids
    from kvbind.inner.value import check_choice

    check_choice("sizes", sizes, tuple(SIZES))
    parts = some_of(what, PARTS, "what")
    record = main(out, str(open_device(device)), parts, budget, sizes=sizes, seconds=seconds, resume=resume)
    for grid in model_grids(record):
        show_grid(grid)
    say_written(out)
