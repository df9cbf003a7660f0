"""Reading in worker processes: what every task's `DataLoader` has in common."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader


def _heedless(worker: int) -> None:
    """Leave Ctrl-C to the process that trains, which may have a step to finish; it ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def read_with(workers: int, dataset: Any, **options: Any) -> Iterator[Any]:
    """What a `DataLoader` gives, without a hand in the model's randomness, and with its workers' errors in one line.

    Args:
        workers: how many processes read; 0 for this one.
        dataset: what they read.
        options: of `torch.utils.data.DataLoader`.

    Raises:
        Exception: what reading raised; of a worker's, the message is that of the error, without the traceback that torch
            puts into it, which is the cause's.
    """
    # its own generator: the loader draws a seed for its workers, which must not come out of the model's
    loader: Any = DataLoader(
        dataset, num_workers=workers, generator=torch.Generator(), worker_init_fn=_heedless if workers else None, **options
    )
    try:
        yield from loader
    except Exception as error:
        first, _, traceback = str(error).strip().partition("\n")
        if " in DataLoader worker process " not in first or not traceback:
            raise
        name, _, message = traceback.rpartition("\n")[2].partition(": ")
        raise type(error)(message or name) from error
