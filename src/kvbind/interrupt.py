"""Ctrl-C where nothing handles it better: a word, and the exit code that shells expect. Imports nothing that takes time."""

from __future__ import annotations

import sys

CODE = 130
"""Of a process that Ctrl-C ended."""


def is_interrupt(error: BaseException) -> bool:
    """Whether an error is a Ctrl-C, or comes from one, as Python 3.11 makes an error of it while a class is made."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, KeyboardInterrupt):
        cause = cause.__cause__
    return cause is not None


def say_interrupted() -> None:
    """The word, on stderr."""
    print("\ninterrupted", file=sys.stderr)
