"""Cases of a benchmark over several processes that share a device."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch

from kvbind.bench.harness.device_time import first_line


def spread(
    run: Callable[..., dict[str, Any]], jobs: Sequence[tuple[tuple[Any, ...], dict[str, Any]]], workers: int, deadline: float
) -> Iterator[dict[str, Any]]:
    """The rows of cases that are run in several processes, as they are done.

    Args:
        run: a module's function that gives the row of a case.
        jobs: for each case, what `run` is called with, and what its row says if its process is lost.
        workers: processes, at least 2.
        deadline: by `time.monotonic`, after which no further case is begun.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        begun = {pool.submit(run, *arguments): described for arguments, described in jobs}
        try:
            for done in as_completed(begun, timeout=max(0.0, deadline - time.monotonic())):
                lost = done.exception()
                yield begun[done] | {"passed": False, "problems": [first_line(lost)]} if lost else done.result()
        except TimeoutError:
            pass
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
