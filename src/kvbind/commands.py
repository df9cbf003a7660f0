"""Commands found by listing a package: one module per command."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from types import ModuleType

import typer


def add_commands(app: typer.Typer, package: ModuleType, order: Sequence[str] = ()) -> None:
    """Add every module of a package as a command of its name, with dashes for underscores.

    A module's function `command` is what runs; its docstring is the help. Where the module has `SETTINGS`, click takes
    them as `context_settings`.

    Args:
        app: what the commands are added to.
        package: its modules must import little, as all of them are imported for `--help`.
        order: names of modules in the order of the help; others follow, by name.
    """
    found = [module.name for module in pkgutil.iter_modules(package.__path__)]
    for name in sorted(found, key=lambda name: (order.index(name) if name in order else len(order), name)):
        module = importlib.import_module(f"{package.__name__}.{name}")
        app.command(name.replace("_", "-"), context_settings=getattr(module, "SETTINGS", None))(module.command)
