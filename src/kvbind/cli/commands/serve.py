"""`kvbind serve`: a language model over OpenAI's protocol."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Options that are not of this command go to `vllm serve`."""


def command(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="A language model's folder, or a training run's.", show_default=False)],
    slots: Annotated[
        int | None, typer.Option(help="Requests that run at once; must fit the memory.", min=1, show_default=False)
    ] = None,
) -> None:
    """Serve a language model over OpenAI's protocol, with vLLM. Further options are those of [bold]vllm serve[/].

    For example: [bold]kvbind serve runs/mine --port 8000 --served-model-name mine[/]
    """
    from kvbind.serving.command import serve as start

    start(folder, slots, context.args)
