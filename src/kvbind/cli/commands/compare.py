"""`kvbind compare`: in what two inner loops differ."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from kvbind.cli import output
from kvbind.cli.arguments import inner_loops


def command(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="SYSTEM [FIELD=VALUE]... [SYSTEM [FIELD=VALUE]...]",
            help="Two named systems or YAML files of inner loops, each with edits behind it; or one, and edits of it.",
            show_default=False,
        ),
    ],
) -> None:
    """Say field by field in what two inner loops differ, or what edits change of one; of equal ones, how layers differ.

    For example: [bold]kvbind compare kda gdn2[/], [bold]kvbind compare titans mine.yaml[/],
    [bold]kvbind compare lact_llm update=last lact_video[/], or [bold]kvbind compare lact_llm momentum=false chunk=64[/]
    """
    from kvbind.inner.systems.layers import PROJECTIONS
    from kvbind.inner.systems.registry import named_or_file

    loops = inner_loops(words, 2)
    if len(loops) == 1 and len(words) > 1:
        loops = [(words[0], named_or_file(words[0])), *loops]
    if len(loops) == 1:
        raise ValueError(f"compare takes two inner loops, or edits of one, such as update=last; got {words[0]!r} alone")
    (first, one), (second, other) = loops
    differing = one.differences(other)
    if not differing:
        if {first, second} <= set(PROJECTIONS):
            differing = PROJECTIONS[first].differences(PROJECTIONS[second])
        said = ", in layers that make its operands in other ways:" if differing else ""
        output.console().print(f"{first} and {second} are the same inner loop{said}", soft_wrap=True)
        if not differing:
            return
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in ("field", first, second):
        table.add_column(name, no_wrap=name == "field", overflow="fold")
    for name, values in differing.items():
        table.add_row(Text(name, "bold"), *("-" if value is None else repr(value) for value in values))
    output.console().print(table)
