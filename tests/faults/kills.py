"""Runs that are killed at random moments, again and again, until all kills are spent; each must end as if it had not been.

Usage: `python kills.py FOLDER COUNT SEED`. Every life is a fork of this process, which has imported everything and computed
nothing.
"""

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from faults import small

LONGEST = 0.6
"""Seconds from the start of a life to its end, at the most; a run takes about as long."""


def life(folder, pause):
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # a resume that had to report something is seen in what it leaves
    small.run(folder, lambda step, note: time.sleep(pause), steps=40)


def main(root, count, seed):
    torch.set_num_threads(1)
    draw, forked = random.Random(seed), multiprocessing.get_context("fork")
    whole = forked.Process(target=life, args=(root / "whole", 0.0))
    whole.start()
    whole.join()
    assert whole.exitcode == 0
    kills, runs = [], 0
    while len(kills) < count or (root / f"run-{runs}").exists():
        folder = root / f"run-{runs}"
        one = forked.Process(target=life, args=(folder, 0.005))
        one.start()
        if len(kills) < count:
            moment = draw.random() * LONGEST
            one.join(moment)
            if one.is_alive():
                os.kill(one.pid, signal.SIGKILL)
                kills.append(moment)
        one.join()
        if one.exitcode == 0:
            assert small.left(folder) == small.left(root / "whole"), f"{folder} after kills at {kills}"
            runs += 1
        else:
            assert one.exitcode == -signal.SIGKILL, f"{folder} ended with {one.exitcode} after kills at {kills}"
    print(json.dumps({"kills": len(kills), "runs": runs}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
