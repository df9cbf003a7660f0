"""`torchrun`, as tests start it."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent.parent


def torchrun(count, *arguments, restarts=0):
    """Start so many processes of one thread each; what they print and how they end.

    Args:
        count: of processes.
        arguments: a script and its own.
        restarts: how often all are started anew when one dies.

    Returns:
        The exit code, and stdout and stderr together.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    options = [f"--max-restarts={restarts}", "--monitor-interval=0.1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    done = subprocess.run(
        [*command, *options, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    return done.returncode, done.stdout, done.stderr
