"""Ctrl-C and SIGTERM, as schedulers send it: noted while steps are taken, so that a run leaves a checkpoint and ends."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from kvbind.train.ranks import ranks

NOTED: dict[signal.Signals, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
"""The signals, and what they do where nobody has said otherwise."""

SAID = b"\nending after this step, with a checkpoint; a second signal ends at once\n"


@contextmanager
def noted_interrupts() -> Iterator[Callable[[], bool]]:
    """Note the first Ctrl-C or SIGTERM in here; the next one does what it always does.

    Nothing is noted before the answer is asked for the first time, as nobody would heed it, nor outside of the main thread,
    nor where somebody else handles or ignores the signal. Of several processes SIGTERM ends each at once, as `torchrun`
    sends it to those that wait for one that has died.

    Yields:
        A function that tells whether there was one.
    """
    came, asked = False, False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal came
        restore()
        if not asked:
            signal.raise_signal(number)
            return
        came = True
        with suppress(OSError):  # `tee` ends by the same Ctrl-C, and the checkpoint is for afterwards
            os.write(2, SAID)

    def restore() -> None:
        for number in taken:
            signal.signal(number, NOTED[number])

    def interrupted() -> bool:
        nonlocal asked
        asked = True
        return came

    main = threading.current_thread() is threading.main_thread()
    heeded = (signal.SIGINT,) if ranks() > 1 else tuple(NOTED)
    taken = [number for number in heeded if main and signal.getsignal(number) == NOTED[number]]
    for number in taken:
        signal.signal(number, note)
    try:
        yield interrupted
    finally:
        restore()
