"""Training runs side by side: processes of one CPU thread each.

A small model gains little from a second thread, and loses it again where the machine has other work to do. Rows of a table
are independent, so a CPU trains as many at once as it has cores; and numbers then do not depend on how many those are. GPUs,
which small models leave idle most of the time, are shared by as many as are asked for, in turn over all that are visible.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console

from kvbind.experiments.training.jobs import AddBar, Failed, Finished, TrainingJob, WorkerKilledError, visible_gpus
from kvbind.experiments.training.runs import OutOfTimeError, Run, train_run
from kvbind.experiments.training.worker_process import Worker
from kvbind.train.bars import BEFORE, Watch, progress_bars

log = logging.getLogger("kvbind.experiments")


LIVES = 3
"""How many processes may be killed over one run."""

GRACE = 45.0
"""Seconds behind a deadline for steps, evaluations and checkpoints that are under way, before processes are ended."""

LEAVING = 20.0
"""Seconds for a process that is ended to finish its step and leave a checkpoint."""


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
        if self.job.fresh and not note.startswith(BEFORE):
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
