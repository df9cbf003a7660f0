"""`kvbind convert`: checkpoints of the released code, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from kvbind.cli import output

Layout = Literal["kvbind", "released"]


def command(
    source: Annotated[
        Path, typer.Argument(help="A checkpoint: its folder, or a file of weights with its configuration beside it.")
    ],
    target: Annotated[Path, typer.Argument(help="Folder to write.")],
    to: Annotated[
        Layout, typer.Option(help="What to write: a model of this library, or one for the released code.")
    ] = "kvbind",
    config: Annotated[
        str | None,
        typer.Option(
            help="The released configuration, where it is not beside the weights: a JSON or YAML file, or a published size, "
            "such as vittt_base or 24x768.",
            show_default=False,
            metavar="FILE|NAME",
        ),
    ] = None,
) -> None:
    """Convert a checkpoint of the released code to this library's, or back.

    LaCT language models, ViTTT and LaCT view synthesis are told apart by their
    parameters. ViTTT's weights say all sizes; a language model needs its JSON
    file, view synthesis its YAML file.

    For example: [bold]kvbind convert vittt_base.pth mine[/], or
    [bold]kvbind convert lact.pt mine --config lact_l24_d768_ttt2x.yaml[/]
    """
    from kvbind.models.convert import convert as run_conversion

    output.console().print(f"wrote {run_conversion(source, target, to=to, config=config)}", soft_wrap=True)
