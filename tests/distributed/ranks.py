"""A pool of processes that are the ranks of gloo groups of 1 to 4, and run functions that tests hand them."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import wait

import torch
import torch.distributed as dist

MOST = 4
PATIENCE = 400
"""Seconds after which ranks that do not answer are taken to wait for each other forever."""


def _serve(rank, store, pipe, environment):
    os.environ.update(environment)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, MOST), rank=rank, world_size=MOST, timeout=timedelta(seconds=PATIENCE / 2)
    )
    groups = {size: dist.new_group(list(range(size))) for size in range(1, MOST + 1)}
    pipe.send(None)
    while (job := pipe.recv()) is not None:
        function, size, arguments = job
        try:
            pipe.send((True, function(groups[size], *arguments)))
        except Exception:  # the test shows it
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()


class Ranks:
    """Processes in wait. `run(function, size, *arguments)` calls `function(group, *arguments)` on `size` of them."""

    def __init__(self, processes, pipes):
        self.processes, self.pipes = processes, pipes

    def run(self, function, size, *arguments):
        """What each rank returned, in order."""
        for pipe in self.pipes[:size]:
            pipe.send((function, size, arguments))
        results, open_pipes = {}, list(self.pipes[:size])
        while open_pipes:
            ready = wait(open_pipes, timeout=PATIENCE)
            if not ready:
                raise TimeoutError(f"of {size} ranks only {sorted(results)} answered")
            for pipe in ready:
                rank = self.pipes.index(pipe)
                fine, results[rank] = pipe.recv()
                if not fine:
                    # the others may wait for it in vain
                    raise AssertionError(f"rank {rank} of {size}:\n{results[rank]}")
                open_pipes.remove(pipe)
        return [results[rank] for rank in range(size)]


@contextmanager
def started(**environment):
    """Start the pool, with `environment` in its processes."""
    context = multiprocessing.get_context("forkserver")
    # the imports are paid for once, in a process without threads
    context.set_forkserver_preload(["kvbind.models.lact.model", "torch", "kvbind.forms.on_kernels.dispatch"])
    with tempfile.TemporaryDirectory() as folder:
        ends = [context.Pipe() for _ in range(MOST)]
        processes = [
            context.Process(target=_serve, args=(rank, f"{folder}/store", theirs, environment), daemon=True)
            for rank, (_, theirs) in enumerate(ends)
        ]
        for process in processes:
            process.start()
        pipes = [ours for ours, _ in ends]
        try:
            for pipe in pipes:
                if not pipe.poll(PATIENCE):
                    raise TimeoutError("ranks did not start")
                pipe.recv()
            yield Ranks(processes, pipes)
            for pipe in pipes:
                pipe.send(None)
            for process in processes:
                process.join(5)
        finally:
            for process in processes:
                process.kill()
