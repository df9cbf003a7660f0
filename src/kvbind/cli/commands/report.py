"""`kvbind report`: one page of all results."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from kvbind.cli import output
from kvbind.commands import check_file
from kvbind.screen import at_rest


def command(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Folders with results of kvbind reproduce; default runs.", metavar="[FOLDER]...", show_default=False
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The page; default report.html in the first folder.", show_default=False, metavar="FILE"),
    ] = None,
    serve: Annotated[
        bool, typer.Option("--serve", help="Show the page at an address of this machine, until Ctrl-C.")
    ] = False,
    port: Annotated[int, typer.Option(help="Of that address; 0 for a free one.", min=0, max=65535)] = 8000,
    bind: Annotated[
        str, typer.Option(help="Where to listen; another address lets whoever reaches it read the page and its results.")
    ] = "127.0.0.1",
    host: Annotated[
        list[str] | None,
        typer.Option(
            help="A further name by which browsers reach the address, such as a proxy's; may be given several times.",
            metavar="NAME",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Make one page of all results: claims with verdicts, tables beside the paper's, figures, and models to look into.

    The page is one file that needs no network. Trained models are in it where [bold]kvbind reproduce explorer[/] was run.

    For example: [bold]kvbind report runs --serve[/]
    """
    from kvbind.experiments.report.command import make_report, open_server

    check_file("--out", out)
    screen = output.console()
    path = make_report(folders or [Path("runs")], out, lambda text: screen.print(text, soft_wrap=True))
    screen.print(f"wrote {path}, {path.stat().st_size / 1e6:.1f} MB", soft_wrap=True)
    if serve:
        server, address = open_server(path, port, bind=bind, hosts=host or ())
        screen.print(f"{address} (Ctrl-C ends it)", soft_wrap=True)
        with server, at_rest(), contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
