"""`kvbind report`: one page on everything that was reproduced, and a server that shows it on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from kvbind.experiments.explorer.untrained import untrained_models
from kvbind.experiments.page import find_parts, write_page
from kvbind.experiments.provenance import versions

NAME, HOST = "report.html", "127.0.0.1"


def make_report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page on the results below some folders.

    Args:
        folders: with results of `kvbind reproduce`.
        out: the page; default `report.html` in the first folder.

    Returns:
        Where it is.

    Raises:
        ValueError: a folder that is none, or no result in any of them.
        ImportError: plotly is not installed.
    """
    parts, models = find_parts(folders)
    if not parts and not models:
        raise ValueError(f"folders must hold results of kvbind reproduce; found none below {', '.join(map(str, folders))}")
    path = (out or folders[0] / NAME).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_page(path, parts, [*models, *untrained_models()], versions())
    return path


class Handler(SimpleHTTPRequestHandler):
    """Files, without a line on the terminal for each."""

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


def open_server(path: Path, port: int) -> tuple[ThreadingHTTPServer, str]:
    """A server of a page's folder that only this machine reaches, and the page's address.

    Args:
        path: the page.
        port: 0 for a free one.

    Raises:
        ValueError: a port that is taken, or not for this user.
    """
    try:
        server = ThreadingHTTPServer((HOST, port), partial(Handler, directory=str(path.parent)))
    except OSError as error:
        raise ValueError(f"port must be one that is free, or 0 for any; {port} is not: {error.strerror}") from error
    return server, f"http://{HOST}:{server.server_port}/{path.name}"
