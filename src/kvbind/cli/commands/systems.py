"""`kvbind systems`: the named inner loops."""

from __future__ import annotations

from typing import Any

from kvbind.cli import output


def command() -> None:
    """List the named inner loops, by family: whether each has a parallel form, and what it is built of, in short."""
    from itertools import groupby

    from kvbind.forms.obstacles import parallel_obstacles
    from kvbind.inner.systems import SYSTEMS, family

    screen = output.console()
    wide = max(map(len, SYSTEMS)) + 2
    # lines of a terminal are cut at its end, a file's are left whole
    shown: dict[str, Any] = {
        "no_wrap": True,
        "overflow": "ellipsis" if screen.is_terminal else "ignore",
        "crop": screen.is_terminal,
    }
    screen.print(f"{'system':<{wide}}{'parallel':<10}built of", style="dim", **shown)
    for title, names in groupby(SYSTEMS, lambda name: family(SYSTEMS[name])):
        screen.print(f"\n{title}", style="bold", **shown)
        for name in names:
            inner = SYSTEMS[name]()
            parallel = "no" if parallel_obstacles(inner) else "yes"
            screen.print(f"{name:<{wide}}{parallel:<10}{in_short(inner)}", **shown)
    screen.print(
        "\nkvbind explain NAME says which linear attention one is, kvbind compare NAME NAME where two differ", **shown
    )


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
