"""Two processes, each on a node of its own; the second dies the first time, which the first, busy, does not notice."""

import os
import signal
import sys
import time
from pathlib import Path

from kvbind.train.ranks import barrier, connected, rank, restarted


def main(folder):
    with (folder / f"rank-{rank()}").open("a") as file:
        file.write(f"{restarted()} {os.environ['TORCHELASTIC_RESTART_COUNT']}\n")
    barrier()
    if not restarted():
        if rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(100)


if __name__ == "__main__":
    with connected("cpu"):
        main(Path(sys.argv[1]))
