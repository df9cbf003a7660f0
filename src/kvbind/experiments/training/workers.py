"""Training runs side by side: processes of one CPU thread each.

A small model gains little from a second thread, and loses it again where the machine has other work to do. Rows of a table
are independent, so a CPU trains as many at once as it has cores; and numbers then do not depend on how many those are. GPUs,
which small models leave idle most of the time, are shared by as many as are asked for, in turn over all that are visible.

A worker is `python -m kvbind.experiments.training.workers`: jobs come in and progress goes out as lines of JSON. One whose
parent has died notices at its next step, when nobody reads any more, and ends.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from kvbind.experiments.training.runs import RESULT, InterruptedRunError, OutOfTimeError, Run, train_run
from kvbind.tasks import open_task_module
from kvbind.train import TrainingStoppedError
from kvbind.train.bars import Watch, progress_bars
from kvbind.train.config import from_plain, to_plain

log = logging.getLogger("kvbind.experiments")

MOST_WORKERS = 4
"""A process takes some 600 MB before it does anything, so that more are started only where they are asked for."""

LIVES = 3
"""How many processes may be killed over one run."""

GRACE = 45.0
"""Seconds behind a deadline for steps, evaluations and checkpoints that are under way, before processes are ended."""

LEAVING = 20.0
"""Seconds for a process that is ended to finish its step and leave a checkpoint."""

VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class TrainingJob:
    """A run to train.

    Attributes:
        task: its name.
        config: of that task.
        folder: of the run.
        title: beside its progress bar.
        alone: its speed is what matters, so that nothing else runs on its device meanwhile.
        fresh: train it anew, whatever there is.
    """

    task: str
    config: Any
    folder: Path
    title: str
    alone: bool = False
    fresh: bool = False

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to train."""
        return not self.fresh and (self.folder / RESULT).is_file()


def visible_gpus() -> list[str]:
    """The GPUs that this process sees, by the names that `CUDA_VISIBLE_DEVICES` takes."""
    named = [name.strip() for name in os.environ.get(VISIBLE, "").split(",") if name.strip()]
    return [named[i] if i < len(named) else str(i) for i in range(torch.cuda.device_count())]


def default_workers(device: torch.device) -> int:
    """How many runs to train at once: one on each GPU, on a CPU one for each usable core up to `MOST_WORKERS`."""
    if device.type != "cpu":
        return max(len(visible_gpus()), 1) if device.type == "cuda" and device.index is None else 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, MOST_WORKERS)


ERRORS: dict[str, type[Exception]] = {
    "time": OutOfTimeError,
    "stopped": TrainingStoppedError,
    "value": ValueError,
    "memory": torch.OutOfMemoryError,
    "system": OSError,
    "import": ImportError,
}
"""What a run may raise that its parent should hear of, by the word for it in a message."""


class WorkerKilledError(RuntimeError):
    """The system, or somebody, has killed the process that trained a run."""


AddBar = Callable[[str, int], Watch]
Finished = Callable[[TrainingJob, Run], None]
Failed = Callable[[TrainingJob, Exception], None]


def train_all(
    jobs: Sequence[TrainingJob],
    workers: int,
    console: Console | None,
    finished: Finished,
    *,
    deadline: float | None = None,
    failed: Failed | None = None,
) -> list[Run | None]:
    """Train every job, or read what it came to earlier.

    Args:
        jobs: runs, the most urgent first; those of the same folder are one.
        workers: how many at once; a single one runs in this process, with all its threads.
        console: where progress is drawn; None for nowhere.
        finished: called with each job and its run as soon as there is one.
        deadline: by `time.monotonic`, when unfinished runs leave a checkpoint and end, and no other begins.
        failed: called with a job that raised, in place of ending all others; no longer `fresh` where it had begun anew.

    Returns:
        The runs, in the order of the jobs; None for one that was not finished in time, or failed.

    Raises:
        TrainingStoppedError, ValueError, torch.OutOfMemoryError: as a run did, unless `failed` takes it.
        WorkerKilledError: a run whose processes were killed `LIVES` times, unless `failed` takes it.
        RuntimeError: a worker ended otherwise without a word, unless `failed` takes it.
    """
    unique = {job.folder: job for job in jobs}
    with progress_bars(console) as add:
        work = JobQueue(list(unique.values()), add, finished, deadline, failed)
        if workers == 1:
            one_by_one(work)
        else:
            in_turns(work, workers)
    return [work.runs.get(job.folder) for job in jobs]


@dataclass
class JobQueue:
    """Jobs that are waiting, and what came of the others.

    Attributes:
        jobs: all of them.
        add: adds a progress bar.
        finished: told of each run.
        deadline: by `time.monotonic`, or None.
        failed: told of each error, in place of raising it; or None.
        runs: those finished, by folder.
        waiting: jobs that anybody may take.
        alone: jobs that want a device to themselves.
    """

    jobs: Sequence[TrainingJob]
    add: AddBar
    finished: Finished
    deadline: float | None
    failed: Failed | None
    runs: dict[Path, Run] = field(default_factory=dict)
    waiting: deque[TrainingJob] = field(init=False)
    alone: deque[TrainingJob] = field(init=False)

    def __post_init__(self) -> None:
        self.waiting = deque(job for job in self.jobs if not job.alone or job.finished)
        self.alone = deque(job for job in self.jobs if job.alone and not job.finished)

    @property
    def over(self) -> bool:
        """Whether the deadline has come."""
        return self.deadline is not None and time.monotonic() >= self.deadline

    def take(self, train: Callable[[TrainingJob, Watch], None], queue: deque[TrainingJob]) -> None:
        """Take jobs from a queue, one after another, until it is empty; those finished earlier are read.

        Args:
            train: trains a job to its end.
            queue: of this work.
        """
        while True:
            try:
                job = queue.popleft()
            except IndexError:
                return
            known = job.finished
            if self.over and not known:
                continue
            try:
                if not known:
                    begun = Begun(job, self.add(job.title, job.config.train.steps))
                    try:
                        outlive(begun, train)
                    finally:
                        job = begun.job
                self.runs[job.folder] = replace(train_run(job.task, job.config, job.folder), reused=known)
            except OutOfTimeError:
                continue
            except Exception as error:
                if self.failed is None:
                    raise
                self.failed(job, error)
                continue
            self.finished(job, self.runs[job.folder])


class Begun:
    """Watches a job, which is no longer to be trained anew when it has taken a step.

    Args:
        job: the job.
        watch: told of every step.
    """

    def __init__(self, job: TrainingJob, watch: Watch) -> None:
        self.job, self.watch = job, watch

    def __call__(self, step: int, note: str) -> None:
        if self.job.fresh:
            self.job = replace(self.job, fresh=False)
        self.watch(step, note)


def outlive(begun: Begun, train: Callable[[TrainingJob, Watch], None]) -> None:
    """Train a job to its end, by another process where one is killed."""
    for _ in range(LIVES - 1):
        try:
            return train(begun.job, begun)
        except WorkerKilledError as error:
            log.warning("%s; another goes on with it", error)
    train(begun.job, begun)


def one_by_one(work: JobQueue) -> None:
    """Train in this process."""

    def train(job: TrainingJob, watch: Watch) -> None:
        train_run(job.task, job.config, job.folder, watch, work.deadline, job.fresh)

    work.take(train, work.waiting)
    work.take(train, work.alone)


def in_turns(work: JobQueue, workers: int) -> None:
    """Train in processes, each of which takes the next job when it has finished one.

    Processes are bound to GPUs in turn. Jobs that want a device to themselves go first, one after another, on the last of
    several GPUs, whose other processes wait for them; where there is one device, they come last.
    """
    gpus = visible_gpus() if any(job.config.train.device in ("auto", "cuda") for job in work.jobs) else []
    reserved = len(gpus) - 1 if len(gpus) > 1 and work.alone else None
    crew: list[Worker] = []
    stopping, free = threading.Event(), threading.Event()

    def serve(number: int) -> None:
        worker: Worker | None = None

        def train(job: TrainingJob, watch: Watch) -> None:
            nonlocal worker
            if worker is None or worker.process.poll() is not None:
                worker = Worker(gpus[number % len(gpus)] if gpus else None)
                crew.append(worker)
            if stopping.is_set():  # too late to be among those that are stopped below
                worker.stop()
            try:
                worker.train(job, watch, work.deadline)
            except WorkerKilledError as error:
                if stopping.is_set():  # by ourselves: there is no time for another try
                    raise OutOfTimeError(str(error)) from error
                raise

        if reserved is not None and number % len(gpus) == reserved:
            if number == reserved:
                try:
                    work.take(train, work.alone)
                finally:
                    free.set()
            free.wait()
        work.take(train, work.waiting)

    threads = ThreadPoolExecutor(workers)
    try:
        turns = [threads.submit(serve, i) for i in range(workers)]
        patience = None if work.deadline is None else max(work.deadline - time.monotonic(), 0) + GRACE
        for turn in wait(turns, patience, FIRST_EXCEPTION).done:
            turn.result()
        if work.alone and not work.over:  # on the one device, which is free now
            work.waiting, work.alone = work.alone, deque()
            threads.submit(serve, 0).result()
    finally:
        # at the end they are idle; after an error or Ctrl-C they leave checkpoints
        stopping.set()
        free.set()
        work.waiting.clear()
        work.alone.clear()
        threads.shutdown(wait=False, cancel_futures=True)
        overdue = work.deadline is not None and time.monotonic() > work.deadline + GRACE
        try:
            for worker in crew:
                worker.end()
            until = time.monotonic() + (0 if overdue else LEAVING)
            for worker in crew:
                worker.wait(until)
        finally:
            for worker in crew:
                worker.stop()
        threads.shutdown()


THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS")
"""What says how many threads, or processes that compile, a worker has: one, as there are many workers."""


class Worker:
    """A process that trains one job after another.

    Args:
        gpu: the one GPU that it sees, by its name in `CUDA_VISIBLE_DEVICES`; None for what this process sees.
    """

    def __init__(self, gpu: str | None = None) -> None:
        place = {} if gpu is None else {VISIBLE: gpu}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kvbind.experiments.training.workers"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | dict.fromkeys(THREADS, "1") | place,
        )

    def train(self, job: TrainingJob, watch: Watch, deadline: float | None = None) -> None:
        """Train a job to its end.

        Raises:
            OutOfTimeError: the deadline, by `time.monotonic`, came first.
            TrainingStoppedError, ValueError, torch.OutOfMemoryError: as the run did.
            OSError, ImportError: likewise.
            WorkerKilledError: a signal has ended the process.
            RuntimeError: the process failed otherwise.
        """
        left = None if deadline is None else deadline - time.monotonic()
        order = {"task": job.task, "config": to_plain(job.config), "folder": str(job.folder), "seconds": left,
                 "fresh": job.fresh}  # fmt: skip
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
        code = self.process.wait()
        who = f"the process that trained {job.title} ({self.process.pid})"
        if code < 0:
            raise WorkerKilledError(f"{who} was killed by {signal.Signals(-code).name}")
        raise RuntimeError(f"{who} ended with code {code}")

    def end(self) -> None:
        """Ask the process to end, with a checkpoint where it is at one's steps."""
        self.process.terminate()

    def wait(self, until: float) -> None:
        """Wait for the process to end, but no longer than until a time by `time.monotonic`."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(max(until - time.monotonic(), 0))

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
            if torch.cuda.is_available() and config.train.device in ("auto", "cuda"):
                config.train.device = "cuda:0"
            left = job.get("seconds")
            deadline = None if left is None else time.monotonic() + left
            try:
                train_run(job["task"], config, Path(job["folder"]), watch, deadline, job.get("fresh", False))
            except InterruptedRunError as error:  # by the parent, which ends this process
                send(error=str(error), kind="time")
                return
            except tuple(ERRORS.values()) as error:
                kind = next(name for name, known in ERRORS.items() if isinstance(error, known))
                send(error=str(error), kind=kind)
            else:
                send(done=True)
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()  # others share the device, and the next run may want less of it


if __name__ == "__main__":
    main()
