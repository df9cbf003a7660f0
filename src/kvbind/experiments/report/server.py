"""A server of one page and the results that it links to: an explicit list of files, and nothing beside it."""

from __future__ import annotations

import re
import socket
from collections.abc import Collection
from html.parser import HTMLParser
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urljoin, urlsplit

from kvbind.files import check_regular

LOOPBACK = "127.0.0.1"

LOCAL = frozenset({"localhost", "127.0.0.1", "[::1]"})
"""The names by which requests may address the server: another one means a page from elsewhere whose name was bound to this
address (DNS rebinding)."""

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}

TYPES = {".html": "text/html; charset=utf-8", ".json": "application/json"}


class Links(HTMLParser):
    """What a page links to beside itself, and its policy."""

    def __init__(self) -> None:
        super().__init__()
        self.hrefs: list[str] = []
        self.policy = "default-src 'none'"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep the addresses of links, and the content of the policy."""
        given = dict(attrs)
        if tag == "a" and given.get("href"):
            self.hrefs.append(given["href"] or "")
        if tag == "meta" and given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given.get("content") or self.policy


def served_files(page: Path) -> tuple[dict[str, Path], str]:
    """What a server of `page` has, by the path of its address, and the page's policy.

    These are the page and the files named `results.json` that it links to, unless they are links of the file system.
    """
    links = Links()
    links.feed(page.read_text(encoding="utf-8"))
    address = f"http://localhost/{quote(page.name)}"
    found = {f"/{page.name}": page}
    for href in links.hrefs:
        there = urlsplit(href)
        if there.scheme or there.netloc or not there.path.endswith("results.json"):
            continue
        path = page.parent / unquote(there.path)
        real = path.resolve()
        if real.name == "results.json" and real == path.parent.resolve() / path.name:
            # an address has no place above its root: a browser leaves out what would lead there
            found.setdefault(unquote(urlsplit(urljoin(address, href)).path), real)
    return found, links.policy


class Server(ThreadingHTTPServer):
    """Answers with files of a fixed list.

    Args:
        page: where `/` leads.
        bind: the address to listen at.
        port: 0 for a free one.
        hosts: further names by which requests may address it.

    Raises:
        OSError: an address that cannot be had.
    """

    def __init__(self, page: Path, bind: str, port: int, hosts: Collection[str]) -> None:
        self.page = page.resolve()
        self.files, self.policy = served_files(self.page)
        own = () if bind in ("", "0.0.0.0", "::") else (bind,)
        self.hosts = LOCAL | {bracketed(name).lower() for name in (*own, *hosts)}
        self.address_family = socket.AF_INET6 if ":" in bind else socket.AF_INET
        super().__init__((bind, port), Handler)


class Handler(BaseHTTPRequestHandler):
    """GET and HEAD of the server's files, without a line on the terminal for each."""

    server: Server
    timeout = 30
    server_version, sys_version = "kvbind", ""

    def do_GET(self) -> None:
        """Answer with a file of the list, or with 404."""
        self.answer()

    def do_HEAD(self) -> None:
        """The headers of a file."""
        self.answer()

    def answer(self) -> None:
        """A file of the list, to a request that addresses this server."""
        named = self.headers.get_all("Host") or []
        if len(named) != 1 or host_of(named[0]) not in self.server.hosts:
            return self.send_error(HTTPStatus.FORBIDDEN, explain="the Host header names another server (see --host)")
        path = unquote(urlsplit(self.path).path) if self.path.startswith("/") else ""
        if path == "/":
            return self.reply(HTTPStatus.FOUND, b"", "text/plain", Location=f"/{quote(self.server.page.name)}")
        file = self.server.files.get(path)
        try:
            # not through a link that has come since
            content = check_regular(file).read_bytes() if file is not None and file.resolve() == file else None
        except (OSError, ValueError):
            content = None
        if file is None or content is None:
            return self.send_error(HTTPStatus.NOT_FOUND)
        self.reply(HTTPStatus.OK, content, TYPES.get(file.suffix, "text/html; charset=utf-8"))

    def reply(self, status: HTTPStatus, content: bytes, kind: str, **more: str) -> None:
        """Send an answer."""
        self.send_response(status)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(content)),
            "Content-Security-Policy": f"{self.server.policy}; frame-ancestors 'none'",
            **HEADERS,
            **more,
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Say what is wrong with a request, in text that repeats nothing of it."""
        # the library's word for a method that has no function here
        status = HTTPStatus.METHOD_NOT_ALLOWED if code == HTTPStatus.NOT_IMPLEMENTED else HTTPStatus(code)
        self.close_connection = True
        allow = {"Allow": "GET, HEAD"} if status == HTTPStatus.METHOD_NOT_ALLOWED else {}
        text = f"{status.value} {status.phrase}{f': {explain}' if explain else ''}\n"
        self.reply(status, text.encode(), "text/plain; charset=utf-8", **allow)

    def log_message(self, format: str, *args: Any) -> None:
        """Write nothing to the terminal for requests."""


def host_of(header: str) -> str | None:
    """The name in a Host header, without its port; None of one that is none."""
    found = re.fullmatch(r"(\[[0-9a-f:.]+\]|[^\s:/@\[\]]+)(?::\d*)?", header.strip().lower())
    return found[1] if found else None


def bracketed(name: str) -> str:
    """A host as a header has it: IPv6 addresses in brackets."""
    return f"[{name}]" if ":" in name and not name.startswith("[") else name


def open_server(path: Path, port: int, *, bind: str = LOOPBACK, hosts: Collection[str] = ()) -> tuple[Server, str]:
    """A server of a page and the results that it links to, by default for this machine alone, and the page's address.

    Args:
        path: the page.
        port: 0 for a free one.
        bind: the address to listen at.
        hosts: names by which requests may address it, beside those of this machine.

    Raises:
        ValueError: a port that is taken, or not for this user, or an address that is not this machine's.
    """
    try:
        server = Server(path, bind, port, hosts)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"port must be one that is free, or 0 for any, and bind an address of this machine; {port} at {bind!r} is not: "
            f"{reason}"
        ) from error
    return server, f"http://{bracketed(bind)}:{server.server_port}/{quote(server.page.name)}"
