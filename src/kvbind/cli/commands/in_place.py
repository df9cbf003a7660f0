"""`kvbind in-place`: MLPs of a saved language model as fast weights."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from kvbind.cli import output


def command(
    source: Annotated[
        Path, typer.Argument(help="Folder of a language model of transformers, or of a released In-Place TTT checkpoint.")
    ],
    target: Annotated[Path, typer.Argument(help="Folder to write.")],
    layers: Annotated[
        str | None,
        typer.Option(
            help="Which MLPs become fast weights: every n-th, or numbers such as 0,6,12. Default: every 6th.",
            metavar="N|N,N,...",
            show_default=False,
        ),
    ] = None,
    chunk: Annotated[
        int | None, typer.Option(help="Tokens between updates. Default: 4096.", min=1, show_default=False)
    ] = None,
    lr: Annotated[float | None, typer.Option(help="The inner learning rate. Default: 3.", show_default=False)] = None,
    values: Annotated[
        Literal["hidden", "embeddings"] | None,
        typer.Option(help="What values are made of: the MLP's input, or embeddings. Default: hidden.", show_default=False),
    ] = None,
) -> None:
    """Turn MLPs of a saved Llama, Qwen3 or the like into fast weights.

    The model written says what the one read says, until it is trained. A
    released In-Place TTT checkpoint has its own settings, and takes no options.

    For example: [bold]kvbind in-place Qwen3-8B mine --layers 6 --chunk 4096[/]
    """
    from kvbind.models.in_place import InPlaceConfig
    from kvbind.models.in_place import in_place as run_conversion

    numbers: Any = None
    if layers is not None:
        parts = layers.split(",")
        if not all(part.strip().isdecimal() for part in parts):
            raise typer.BadParameter(
                f"must be a number or numbers with commas between them; got {layers!r}", param_hint="--layers"
            )
        numbers = int(layers) if len(parts) == 1 else [int(part) for part in parts]
    given = {"layers": numbers, "chunk": chunk, "lr": lr, "values": values}
    written = run_conversion(source, target, **{name: x for name, x in given.items() if x is not None})
    made, screen = InPlaceConfig.from_pretrained(written), output.console()
    inside, numbers = made.text_config, ", ".join(map(str, made.fast_layers))
    screen.print(f"wrote {written}", soft_wrap=True)
    screen.print(
        f"a {inside.model_type} of {inside.num_hidden_layers} layers; the MLPs of layers {numbers} are fast weights "
        f"(In-Place TTT), written every {made.chunk:,} tokens",
        soft_wrap=True,
    )
    quoted = shlex.quote(str(written))
    output.say(screen, [f'kvbind generate {quoted} --prompt "The "'])
    screen.print(
        f"in Python: kvbind.models.InPlaceForCausalLM.from_pretrained({str(written)!r}), to train it", soft_wrap=True
    )
