"""`kvbind systems`: the named inner loops."""

from __future__ import annotations

import sys
import textwrap
from typing import Any

from kvbind.cli import output


def command() -> None:
    """List the named inner loops, by family: whether each has a parallel form, and what it is built of, in short."""
    from itertools import groupby

    from kvbind.forms.obstacles import parallel_obstacles
    from kvbind.inner.systems import SYSTEMS, family

    screen = output.console()
    wide = max(map(len, SYSTEMS)) + 2
    # a line of a terminal goes on below itself, a file's is left whole
    width = screen.width if screen.is_terminal else sys.maxsize
    indent = " " * (wide + 10 if width >= 2 * (wide + 10) else 2)

    def show(line: str, style: str | None = None, behind: str = "") -> None:
        for part in textwrap.wrap(line, width, subsequent_indent=behind, break_on_hyphens=False):
            screen.print(part, style=style, soft_wrap=True)

    show(f"{'system':<{wide}}{'parallel':<10}built of", "dim")
    for title, names in groupby(SYSTEMS, lambda name: family(SYSTEMS[name])):
        screen.print()
        show(title, "bold")
        for name in names:
            inner = SYSTEMS[name]()
            parallel = "no" if parallel_obstacles(inner) else "yes"
            show(f"{name:<{wide}}{parallel:<10}{in_short(inner)}", behind=indent)
    screen.print()
    show("kvbind explain NAME says which linear attention one is, kvbind compare NAME NAME where two differ")


def in_short(inner: Any) -> str:
    """What an inner loop is built of, in words: not all, as `explain` says that, but enough to tell systems apart."""
    from kvbind.inner.value import Value

    def part(name: str, x: Any) -> str:
        if isinstance(x, Value):
            # of what is inside, choices alone: numbers and lists are for `explain`
            inside = [part(field, y) if isinstance(y, bool | Value) else y for field, y in x.said().items()]
            kind = type(x).__name__ if name in ("network", "head") else name
            return " ".join([kind, *(y for y in inside if isinstance(y, str))])
        return f"{'' if x else 'no '}{name}" if isinstance(x, bool) else f"{name} {x}"

    return ", ".join(part(name, x).replace("_", " ") for name, x in inner.said().items())
