"""Ctrl-C where nothing handles it better: a word, and the exit code that shells expect. Imports nothing that takes time."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from typing import Any

CODE = 130
"""Of a process that Ctrl-C ended."""


def is_interrupt(error: BaseException) -> bool:
    """Whether an error is a Ctrl-C, or comes from one, as Python 3.11 makes an error of it while a class is made."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, KeyboardInterrupt):
        cause = cause.__cause__
    return cause is not None


def say_interrupted() -> None:
    """The word, on stderr; where that cannot be written to, the exit code alone says it."""
    with suppress(OSError):
        os.write(2, b"\ninterrupted\n")


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Have a Ctrl-C in the block end the process, where it is, with the word: no error passes through what it calls."""

    def end(*_: Any) -> None:
        say_interrupted()
        os._exit(CODE)

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class EndingAtOnce:
    """A finder of modules that has one of them imported `ending_at_once`.

    PyTorch's C++ calls Python while it is imported, and an error that comes out of that aborts the process.

    Args:
        name: of the module.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """The module's own spec, whose loader heeds this; None of all others."""
        if name != self.name:
            return None
        # once
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            with ending_at_once():
                load(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
