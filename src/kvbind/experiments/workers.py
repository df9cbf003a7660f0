"""Training runs side by side: processes of one CPU thread each.

A small model gains little from a second thread, and loses it again where the machine has other work to do. Rows of a table
are independent, so a CPU trains as many at once as it has cores; and numbers then do not depend on how many those are. On a
GPU, which a small model leaves idle most of the time, as many share it as are asked for.

A worker is `python -m kvbind.experiments.workers`: jobs come in and progress goes out as lines of JSON. One whose parent has
died notices at its next step, when nobody reads any more, and ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from kvbind.experiments.runs import RESULT, Run, train_run
from kvbind.tasks import open_task_module
from kvbind.train import TrainingStoppedError
from kvbind.train.bars import Watch, progress_bars
from kvbind.train.config import from_plain, to_plain

MOST_WORKERS = 4
"""A process takes some 600 MB before it does anything, so that more are started only where they are asked for."""


@dataclass(frozen=True)
class Job:
    """A run to train.

    Attributes:
        task: its name.
        config: of that task.
        folder: of the run.
        title: beside its progress bar.
    """

    task: str
    config: Any
    folder: Path
    title: str


def default_workers(device: torch.device) -> int:
    """How many runs to train at once: one on a GPU, on a CPU one for each usable core up to `MOST_WORKERS`."""
    if device.type != "cpu":
        return 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, MOST_WORKERS)


ERRORS: dict[str, type[Exception]] = {
    "stopped": TrainingStoppedError,
    "value": ValueError,
    "memory": torch.OutOfMemoryError,
}
"""What a run may raise that its parent should hear of, by the word for it in a message."""

AddBar = Callable[[str, int], Watch]
Finished = Callable[[Job, Run], None]


def train_all(jobs: Sequence[Job], workers: int, console: Console | None, finished: Finished) -> list[Run]:
    """Train every job, or read what it came to earlier.

    Args:
        jobs: runs; those of the same folder are one.
        workers: how many at once; a single one runs in this process, with all its threads.
        console: where progress is drawn; None for nowhere.
        finished: called with each job and its run as soon as there is one.

    Returns:
        The runs, in the order of the jobs.

    Raises:
        TrainingStoppedError, ValueError, torch.OutOfMemoryError: as a run did.
        RuntimeError: a worker ended without a word.
    """
    unique = {job.folder: job for job in jobs}
    with progress_bars(console) as add:
        found = (
            one_by_one(unique.values(), add, finished) if workers == 1 else in_turns(unique.values(), workers, add, finished)
        )
    runs = dict(zip(unique, found, strict=True))
    return [runs[job.folder] for job in jobs]


def one_by_one(jobs: Iterable[Job], add: AddBar, finished: Finished) -> list[Run]:
    """Train in this process."""
    runs = []
    for job in jobs:
        runs.append(train_run(job.task, job.config, job.folder, add(job.title, job.config.train.steps)))
        finished(job, runs[-1])
    return runs


def in_turns(jobs: Iterable[Job], workers: int, add: AddBar, finished: Finished) -> list[Run]:
    """Train in processes, each of which takes the next job when it has finished one."""
    crew: list[Worker] = []
    own, stopping = threading.local(), threading.Event()

    def one(job: Job) -> Run:
        known = (job.folder / RESULT).is_file()
        if not known:
            if not hasattr(own, "worker"):
                own.worker = Worker()
                crew.append(own.worker)
            if stopping.is_set():  # too late to be among those that are stopped below
                own.worker.stop()
            own.worker.train(job, add(job.title, job.config.train.steps))
        run = replace(train_run(job.task, job.config, job.folder), reused=known)
        finished(job, run)
        return run

    threads = ThreadPoolExecutor(workers)
    try:
        return list(threads.map(one, jobs))
    finally:
        # at the end they are idle; after an error or Ctrl-C their checkpoints are what counts
        stopping.set()
        threads.shutdown(wait=False, cancel_futures=True)
        for worker in crew:
            worker.stop()
        threads.shutdown()


class Worker:
    """A process that trains one job after another."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kvbind.experiments.workers"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        )

    def train(self, job: Job, watch: Watch) -> None:
        """Train a job to its end.

        Raises:
            TrainingStoppedError, ValueError, torch.OutOfMemoryError: as the run did.
            RuntimeError: the process failed otherwise.
        """
        order = {"task": job.task, "config": to_plain(job.config), "folder": str(job.folder)}
        with contextlib.suppress(BrokenPipeError):
            self._in.write(json.dumps(order) + "\n")
            self._in.flush()
        for line in self._out:
            message = json.loads(line)
            if "step" in message:
                watch(message["step"], message["note"])
            elif "error" in message:
                raise ERRORS[message["kind"]](message["error"])
            else:
                return
        raise RuntimeError(f"the process that trained {job.title} ended with code {self.process.wait()}")

    def stop(self) -> None:
        """End the process, whatever it does."""
        self.process.kill()
        self.process.wait()

    @property
    def _in(self) -> Any:
        return self.process.stdin

    @property
    def _out(self) -> Any:
        return self.process.stdout


def main() -> None:
    """Train the jobs that come in on stdin."""
    # stdout carries messages alone; whatever else is printed goes where errors go
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends this process
    torch.set_num_threads(1)

    def send(**message: Any) -> None:
        channel.write(json.dumps(message) + "\n")

    def watch(step: int, note: str) -> None:
        send(step=step, note=note)

    with contextlib.suppress(BrokenPipeError):
        for line in sys.stdin:
            job = json.loads(line)
            config = from_plain(open_task_module(job["task"]).Config, job["config"])
            try:
                train_run(job["task"], config, Path(job["folder"]), watch)
            except tuple(ERRORS.values()) as error:
                kind = next(name for name, known in ERRORS.items() if isinstance(error, known))
                send(error=str(error), kind=kind)
            else:
                send(done=True)
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()  # others share the device, and the next run may want less of it


if __name__ == "__main__":
    main()
