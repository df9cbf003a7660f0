"""The command `kvbind`.

Commands import what they need when they run, so that `kvbind --help` answers at once.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer

from kvbind.bench.app import app as bench
from kvbind.cli import commands, output
from kvbind.commands import add_commands
from kvbind.interrupt import CODE, say_interrupted
from kvbind.screen import LogLines, heard_of

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(bench, name="bench")

USAGE: type[Exception] = typer.BadParameter.__mro__[1]
"""What typer raises for a command line that is none, which has no public name of its own."""


USERS_MISTAKE = 2
"""The exit code."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command, and leave with its exit code; a user's mistake ends it with one line on stderr and code 2."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    lines = logging.getLogger("kvbind")
    if not lines.handlers:
        lines.addHandler(LogLines())
    for stream in (sys.stdout, sys.stderr):
        # a terminal without a letter gets its number, not an error
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError):  # what is written first will say what is wrong with it
                stream.reconfigure(errors="backslashreplace")
    traceback = "--traceback" in words
    try:
        check_utf8(words)
        words = [word for word in words if word != "--traceback"]
        with contextlib.nullcontext() if os.environ.get("RANK", "0") != "0" else heard_of(named(words)):
            code = app(words, prog_name="kvbind", standalone_mode=False)
    except USAGE as error:
        fail_usage(error)
    except (ValueError, TypeError, ImportError, OSError) as error:
        if traceback:
            raise
        fail(error, USERS_MISTAKE)
    except RuntimeError as error:
        if traceback or type(error).__name__ not in ("TrainingStoppedError", "OutOfMemoryError", "WorkerKilledError"):
            raise
        fail(error, 1)
    else:
        if code == CODE:
            say_interrupted()
        # commands return nothing, and what ends them early its code
        sys.exit(code or 0)


def named(words: Sequence[str]) -> str:
    """A command's name, of its command line."""
    return " ".join(["kvbind", *words[: 2 if words[:1] == ["bench"] else 1]])


def check_utf8(words: Sequence[str]) -> None:
    """Raise `ValueError` for a word that is not UTF-8, as YAML, JSON and files of weights have no such names."""
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise ValueError(f"words on the command line must be UTF-8, in a locale that reads it; got {word!r}") from None


def fail_usage(error: Any) -> NoReturn:
    """Say in one line what is wrong with the command line, and leave. Without any word, the help is there already."""
    said = " ".join(error.format_message().replace("Value error, ", "").split())
    if said and type(error).__name__ != "NoArgsIsHelpError":
        command = "kvbind" if error.ctx is None else error.ctx.command_path
        output.say_error(f"{said[0].lower()}{said[1:].rstrip('.')} ({command} --help says what it takes)")
    sys.exit(error.exit_code)


def fail(error: Exception, code: int) -> NoReturn:
    """Say what went wrong in one line, and leave; of what is no user's mistake also how to see where."""
    output.say_error(str(error))
    if code != USERS_MISTAKE:
        output.say_error("(--traceback shows where)", "", "dim")
    sys.exit(code)


def show_version(wanted: bool) -> None:
    """Print the version and leave."""
    if wanted:
        from kvbind import __version__

        output.console().print(f"kvbind {__version__}")
        raise typer.Exit


@app.callback(epilog="Errors are one line; [bold]--traceback[/] anywhere on the command line shows where they came from.")
def kvbind(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=show_version, is_eager=True)
    ] = False,
) -> None:
    """Test-time training with key-value binding, run as the linear attention it is (arXiv 2602.21204)."""


add_commands(app, commands, commands.ORDER)
