"""`kvbind plan`: memory, time and price of training on many GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvbind.cli import output
from kvbind.cli.arguments import Overrides
from kvbind.commands import check_file
from kvbind.tasks import preset_files


def command(
    overrides: Overrides = None,
    preset: Annotated[
        str, typer.Option(help=f"A YAML file, or a shipped configuration: {', '.join(preset_files('language'))}.")
    ] = "760m",
    gpus: Annotated[str, typer.Option(help="How many; several numbers with commas between them for a comparison.")] = "8",
    tokens: Annotated[
        int | None, typer.Option(min=2, help="Tokens in a sequence; default the configuration's.", show_default=False)
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Sequences in a step; default as many as keep its tokens the same.", show_default=False),
    ] = None,
    hardware: Annotated[str, typer.Option(help="Which GPUs: h100, h200, a100 or a100-40gb, eight to a node.")] = "h100",
    recompute: Annotated[
        str, typer.Option(help="What is computed again in the backward pass: block, offload, selective or none.")
    ] = "block",
    budget: Annotated[
        float | None, typer.Option(help="Tokens to train on, such as 15e9; default the configuration's.", show_default=False)
    ] = None,
    price: Annotated[float | None, typer.Option(min=0.0, help="Of an hour of one GPU.", show_default=False)] = None,
    calibrate: Annotated[
        list[Path] | None,
        typer.Option(
            help="Results of kvbind bench step, scaling or models, for this and later plans; may be given several times.",
            show_default=False,
            metavar="FILE",
        ),
    ] = None,
    write: Annotated[Path | None, typer.Option("--json", help="Also write everything to this file.", metavar="FILE")] = None,
) -> None:
    """Plan the training of a language model: mesh, memory, communication, time and price, for any number of GPUs.

    A model of time and memory whose error on measured steps is printed below it.

    For example: [bold]kvbind plan --preset 760m --gpus 64 --tokens 1048576[/], or with edits of the configuration such as
    [bold]model.inner.update=last model.inner.normalize=false[/]
    """
    from kvbind.plan.command import run_plan

    check_file("--json", write)
    run_plan(
        preset, gpus, overrides or [], output.console(), tokens=tokens, batch=batch, hardware=hardware, recompute=recompute,
        budget=budget, price=price, calibrate=calibrate or [], write=write,
    )  # fmt: skip
