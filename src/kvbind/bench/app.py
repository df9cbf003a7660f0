"""The commands `kvbind bench ...`."""

from __future__ import annotations

import typer

from kvbind.bench import commands
from kvbind.commands import add_commands

app = typer.Typer(no_args_is_help=True, help="Measure speed, memory and exactness on the device at hand.")
add_commands(app, commands, commands.ORDER)
