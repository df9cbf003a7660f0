"""How a system is declared: a function that returns its value, the names it goes by, and its sources."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from kvbind.inner.spec import InnerLoop
from kvbind.inner.value import nearest

Make = TypeVar("Make", bound=Callable[..., InnerLoop])

SYSTEMS: dict[str, Callable[[], InnerLoop]] = {}
"""Every named system, with its published settings."""


@dataclass(frozen=True)
class Source:
    """A publication.

    Attributes:
        arxiv: its identifier at arXiv; the first two digits are the year.
        title: as published.
        author: as BibTeX takes it.
    """

    arxiv: str
    title: str
    author: str

    def bibtex(self) -> str:
        """Its BibTeX entry."""
        return (
            f"@misc{{arxiv{self.arxiv},\n  title = {{{{{self.title}}}}},\n  author = {{{self.author}}},\n"
            f"  year = {{20{self.arxiv[:2]}}},\n"
            f"  eprint = {{{self.arxiv}}},\n  archivePrefix = {{arXiv}},\n  url = {{https://arxiv.org/abs/{self.arxiv}}},\n}}"
        )


KV_BINDING = Source(
    "2602.21204", "Test-Time Training with KV Binding Is Secretly Linear Attention", "Liu, Junchen and others"
)

SOURCES: dict[str, tuple[Source, ...]] = {}
"""The sources of each named system."""


def system(*sources: Source) -> Callable[[Make], Make]:
    """Enter a function that returns an inner loop into the table of named systems, under its own name.

    Args:
        sources: where it was published.
    """

    def enter(make: Make) -> Make:
        SYSTEMS[make.__name__], SOURCES[make.__name__] = make, sources
        return make

    return enter


def family(make: Callable[..., InnerLoop]) -> str:
    """What the file in which a system is declared says first, in one sentence: the family that its systems are of."""
    module = sys.modules[make.__module__]
    return (module.__doc__ or module.__name__).strip().split("\n")[0].split(". ")[0].rstrip(".")


def named(name: str) -> InnerLoop:
    """The system of that name.

    Raises:
        ValueError: an unknown name; the message gives the nearest known one.
    """
    if not isinstance(name, str) or name not in SYSTEMS:
        raise ValueError(f"no system is named {name!r}{nearest(name, SYSTEMS)}; known: {', '.join(SYSTEMS)}")
    return SYSTEMS[name]()


def named_or_file(system: str) -> InnerLoop:
    """The inner loop of that name, or in that YAML file.

    Raises:
        ValueError: an unknown name, or a file that does not exist or holds no inner loop.
    """
    if not system.endswith((".yaml", ".yml")):
        return named(system)
    path = Path(system).expanduser()
    if not path.is_file():
        raise ValueError(f"system must be a named system or a YAML file that exists; there is no {system!r}")
    try:
        return InnerLoop.from_yaml(path)
    except (ValueError, TypeError) as error:
        raise ValueError(str(error) if system in str(error) else f"{system}: {error}") from error


SIZES = ("chunk", "refresh", "grid")
"""Fields in which a system stays the same system."""


def nearest_system(spec: InnerLoop) -> tuple[str, tuple[str, ...]]:
    """The named system that differs from `spec` in the fewest fields, chunk lengths aside, and the fields."""
    differing = {name: spec.differing(make()) for name, make in SYSTEMS.items()}
    # sizes decide between systems that differ in nothing else
    found = {name: tuple(field for field in fields if field not in SIZES) for name, fields in differing.items()}
    best = min(found, key=lambda name: (len(found[name]), len(differing[name])))
    return best, found[best]


def cite(what: InnerLoop | str) -> str:
    """BibTeX of what an inner loop comes from.

    Args:
        what: a named system, or any inner loop: then of the named system nearest to it, and where it differs from that one a
            comment says in what.

    Returns:
        One entry for each source, that of the paper behind this library last.

    Raises:
        TypeError: neither a name nor an inner loop.
        ValueError: an unknown name.
    """
    note = ""
    if isinstance(what, str):
        named(what)
        name = what
    elif isinstance(what, InnerLoop):
        name, fields = nearest_system(what)
        note = f"% nearest named system: {name}; differs in {', '.join(fields)}\n" if fields else f"% {name}\n"
    else:
        raise TypeError(f"what must be a kvbind.InnerLoop or the name of a system; got {type(what).__name__}")
    return note + "\n\n".join(source.bibtex() for source in (*SOURCES[name], KV_BINDING))
