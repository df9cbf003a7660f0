"""`torchrun`, as tests start it."""

import os
import socket
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent.parent
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--monitor-interval=0.1"]


def torchrun(count, *arguments, restarts=0):
    """Start so many processes of one thread each; what they print and how they end.

    Args:
        count: of processes.
        arguments: a script and its own.
        restarts: how often all are started anew when one dies.

    Returns:
        The exit code, and stdout and stderr together.
    """
    command = [*LAUNCHER, "--standalone", f"--nproc-per-node={count}", f"--max-restarts={restarts}"]
    done = subprocess.run(
        [*command, *map(str, arguments)], env=environment(), capture_output=True, text=True, timeout=500, check=False
    )
    return done.returncode, done.stdout, done.stderr


def torchrun_on_nodes(nodes, *arguments, restarts=0):
    """Start one process on each of so many nodes, all of them this machine; the exit codes of their launchers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = f"--rdzv-endpoint=127.0.0.1:{free.getsockname()[1]}"
    command = [*LAUNCHER, f"--nnodes={nodes}", "--rdzv-backend=c10d", meeting, f"--max-restarts={restarts}"]
    launchers = [
        subprocess.Popen([*command, *map(str, arguments)], env=environment(), stderr=subprocess.DEVNULL)
        for _ in range(nodes)
    ]
    try:
        return [launcher.wait(500) for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.terminate()  # it ends its processes


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
