"""Options that benchmarks share, and what is read out of their words."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from kvbind.commands import at_home, check_file

Tokens = Annotated[int, typer.Option(min=1, help="Tokens per sequence.")]

Chunk = Annotated[int, typer.Option(min=1, help="Tokens in a chunk.")]

Width = Annotated[int, typer.Option(min=1, help="Channels per head of keys, values and the hidden layer.")]

Heads = Annotated[int, typer.Option(min=1, help="Fast heads.")]

Batch = Annotated[int, typer.Option(min=1, help="Sequences.")]

Device = Annotated[str, typer.Option(help="cpu, cuda, or auto for a GPU where there is one.")]


def can_be_written(out: Path | None) -> Path | None:
    """A file to write to, with the user's home for `~`; an error where it cannot be written."""
    found = at_home(out)
    check_file("--out", found)
    return found


Out = Annotated[
    Path | None,
    typer.Option(help="A JSON file to write results, machine, versions and command to.", callback=can_be_written),
]


def numbers_of(text: str, option: str) -> list[int]:
    """Numbers with commas between them, rising."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise typer.BadParameter(f"{option} must be whole numbers of at least 1 with commas between them; got {text!r}")
    return sorted(map(int, parts))


def some_of(names: str, known: Iterable[str], option: str) -> tuple[Any, ...]:
    """Names with commas between them, or all of those known."""
    from kvbind.inner.value import nearest

    known = tuple(known)
    if names == "all":
        return known
    chosen = tuple(x.strip() for x in names.split(","))
    for name in chosen:
        if name not in known:
            raise typer.BadParameter(f"{option} must be of {', '.join(known)}; got {name!r}{nearest(name, known)}")
    return chosen


def known_preset(name: str) -> str:
    """A size of the language model, or an error that names the nearest."""
    from kvbind.inner.value import nearest
    from kvbind.models import PRESETS

    if name not in PRESETS:
        raise typer.BadParameter(f"preset must be one of {', '.join(PRESETS)}; got {name!r}{nearest(name, PRESETS)}")
    return name


def open_device(name: str) -> Any:
    """The device of that name; of "auto" a GPU where there is one. An error where it cannot be had."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as problem:
        raise typer.BadParameter(f"device must be cpu, cuda or auto; got {name!r}") from problem
    if device.type == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("device cuda was asked for, and PyTorch sees no GPU")
    return device
