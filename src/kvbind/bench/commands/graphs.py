"""`kvbind bench graphs`: steps as CUDA graphs."""

from __future__ import annotations

from typing import Annotated

import typer

from kvbind.bench.options import Device, Out, open_device
from kvbind.bench.output import say_written


def command(
    only: Annotated[str, typer.Option(help="Part of the names of the models to run, such as 30m; all by default.")] = "",
    sizes: Annotated[str, typer.Option(help="full, for a GPU, or tiny, for a look on a CPU.")] = "full",
    seconds: Annotated[float, typer.Option(min=0.0, help="How long to time each kind of steps.")] = 1.5,
    budget: Annotated[float, typer.Option(min=0.0, help="Begin nothing more after this, seconds.")] = 165,
    device: Device = "auto",
    out: Out = None,
) -> None:
    """Compare and time training steps replayed as CUDA graphs beside eager ones, of each family of models."""
    from kvbind.bench.training.cuda_graphs import main

    if sizes not in ("full", "tiny"):
        raise typer.BadParameter(f"sizes must be full or tiny; got {sizes!r}")
    main(out, str(open_device(device)), sizes=sizes, only=only, seconds=seconds, budget=budget)
    say_written(out)
