"""`kvbind explain`: which linear attention an inner loop is."""

from __future__ import annotations

from typing import Annotated

import typer

from kvbind.cli import output
from kvbind.cli.arguments import inner_loops


def command(
    system: Annotated[
        str, typer.Argument(help="A named system (`kvbind systems` lists them), or a YAML file of an inner loop.")
    ],
    edits: Annotated[
        list[str] | None,
        typer.Argument(metavar="[FIELD=VALUE]...", help="Edits of the inner loop, such as update=last.", show_default=False),
    ] = None,
    rung: Annotated[
        int | None, typer.Option(help="Take this rung of its ladder, 0 (itself) to 6 (linear attention).", min=0, max=6)
    ] = None,
    chunk: Annotated[int | None, typer.Option(help="Tokens in a chunk, instead of the system's own.")] = None,
    heads: Annotated[int | None, typer.Option(help="Heads, for the costs; default 4.", show_default=False)] = None,
    key_width: Annotated[
        int | None, typer.Option(help="Channels of keys and queries per head; default 384.", show_default=False)
    ] = None,
    value_width: Annotated[int | None, typer.Option(help="Channels of values per head; default as the keys.")] = None,
    hidden: Annotated[int | None, typer.Option(help="Hidden width of the fast network; default as the keys.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens in a sequence; default 32768.", show_default=False)] = None,
) -> None:
    """Say which linear attention an inner loop is, whether it has a parallel form and if not why, and what it costs.

    For example: [bold]kvbind explain lact_llm --rung 2[/], [bold]kvbind explain titans momentum=false[/], or
    [bold]kvbind explain mine.yaml[/] with a file such as

    [dim]{network: SwiGLU, momentum: true, chunk: 512}[/]
    """
    from kvbind.forms.explained.analysis import explain as analyse
    from kvbind.forms.explained.costs import Shapes
    from kvbind.inner.systems import ladder

    ((_, inner),) = inner_loops([system, *(edits or [])], 1)
    if rung is not None:
        inner = list(ladder(inner).values())[rung]
    if chunk is not None:
        inner = inner.replace(chunk=chunk)
    usual = Shapes()
    assumed = [name for name, size in {"heads": heads, "key-width": key_width, "tokens": tokens}.items() if size is None]
    heads, tokens = (usual.heads if heads is None else heads), (usual.tokens if tokens is None else tokens)
    key_width = usual.key_width if key_width is None else key_width
    value_width, hidden = (key_width if width is None else width for width in (value_width, hidden))
    shapes = Shapes(heads, key_width, value_width, hidden, tokens)
    screen = output.console()
    # a terminal's lines break between words, a file's are left whole
    screen.print(str(analyse(inner, shapes)), soft_wrap=not screen.is_terminal)
    if assumed:
        options = ", ".join(f"--{name}" for name in assumed)
        screen.print(
            f"  assumed: the sizes of a layer of the 760M language model, where {options} would say others",
            soft_wrap=not screen.is_terminal,
        )
