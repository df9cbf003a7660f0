"""Commands found by listing a package, one module per command; and the paths that they are given."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import pkgutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import typer

from kvbind.interrupt import is_interrupt


def add_commands(app: typer.Typer, package: ModuleType, order: Sequence[str] = ()) -> None:
    """Add every module of a package as a command of its name, with dashes for underscores.

    A module's function `command` is what runs; its docstring is the help. Where the module has `SETTINGS`, click takes
    them as `context_settings`. In paths that a command is given, `~` stands for the user's home, which no shell puts
    there in `--out=~/run`.

    Args:
        app: what the commands are added to.
        package: its modules must import little, as all of them are imported for `--help`.
        order: names of modules in the order of the help; others follow, by name.
    """
    found = [module.name for module in pkgutil.iter_modules(package.__path__)]
    for name in sorted(found, key=lambda name: (order.index(name) if name in order else len(order), name)):
        module = importlib.import_module(f"{package.__name__}.{name}")
        settings = getattr(module, "SETTINGS", None)
        add = app.command(name.replace("_", "-"), help=help_of(module.command), context_settings=settings)
        add(as_run(module.command))


def help_of(command: Callable[..., None]) -> str:
    """A command's docstring, each paragraph one line: where lines end is the terminal's to say, not the source's."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in (inspect.getdoc(command) or "").split("\n\n"))


def as_run(command: Callable[..., None]) -> Callable[..., None]:
    """`command`, given `at_home` of every argument; of a Ctrl-C that something made another error of, it is one again."""

    @functools.wraps(command)
    def run(*values: Any, **named: Any) -> None:
        try:
            command(*map(at_home, values), **{name: at_home(x) for name, x in named.items()})
        except Exception as error:
            if is_interrupt(error):
                raise KeyboardInterrupt from error
            raise

    return run


def at_home(value: Any) -> Any:
    """A path, or paths in a list, with the user's home for `~`; anything else as it is."""
    if isinstance(value, list):
        return [at_home(x) for x in value]
    return value.expanduser() if isinstance(value, Path) else value


def check_file(option: str, path: Path | None) -> None:
    """Raise where a file could not be written, before the work whose result it is to hold.

    Args:
        option: that names it.
        path: of the file; None for none.

    Raises:
        ValueError: a folder is there, or something that is no folder is above it.
        PermissionError: the folder that it would be in may not be written to.
    """
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"{option} must be a file to write; {str(path)!r} is a folder")
    above = _first_there(path.absolute().parents)
    if not above.is_dir():
        raise ValueError(f"{option} must be a file to write; {str(above)!r} is no folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise PermissionError(f"{option} must be a file to write; {str(above)!r} may not be written to")


def check_folder(option: str, path: Path | None) -> None:
    """Raise where a folder could not be made, before the work whose results it is to hold.

    Args:
        option: that names it.
        path: of the folder; None for none.

    Raises:
        ValueError: something that is no folder is there, or above it.
    """
    if path is None:
        return
    there = _first_there((path.absolute(), *path.absolute().parents))
    if not there.is_dir():
        raise ValueError(f"{option} must be a folder; {str(there)!r} is none")


def _first_there(paths: Iterable[Path]) -> Path:
    return next(path for path in paths if path.exists())
