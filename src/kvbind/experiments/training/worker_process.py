"""A process that trains runs one after another, as `python -m kvbind.experiments.training.worker_process`.

Jobs come in and progress goes out as lines of JSON. One whose parent has died notices at its next step, when
nobody reads any more, and ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from kvbind.experiments.training.jobs import VISIBLE, TrainingJob, WorkerKilledError
from kvbind.experiments.training.runs import InterruptedRunError, OutOfTimeError, train_run
from kvbind.tasks import open_task_module
from kvbind.train import TrainingStoppedError
from kvbind.train.bars import Watch
from kvbind.train.config import from_plain, to_plain

ERRORS: dict[str, type[Exception]] = {
    "time": OutOfTimeError,
    "stopped": TrainingStoppedError,
    "value": ValueError,
    "memory": torch.OutOfMemoryError,
    "system": OSError,
    "import": ImportError,
}
"""What a run may raise that its parent should hear of, by the word for it in a message."""

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
            [sys.executable, "-m", "kvbind.experiments.training.worker_process"],
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
