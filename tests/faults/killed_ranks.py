"""The toy of `tests/train` on two processes that are killed: one in a step, then one while a checkpoint is written.

In the end a bit of the second process's part of the newest checkpoint is flipped, and both go on.
"""

import os
import shutil
import signal
import sys
from pathlib import Path

import torch

from kvbind.train import train
from kvbind.train.checkpoint import checkpoints, newest_whole
from kvbind.train.config import ParallelConfig
from kvbind.train.ranks import barrier, connected, rank, restarted
from kvbind.train.storage import Writer
from train.toy import Toy, config, make_model

HOW = config(steps=12, checkpoint_every=2, ema=0.5, parallel=ParallelConfig("fsdp"))


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


class Killed(Toy):
    def __init__(self, number):
        super().__init__()
        self.number = number

    def loss(self, model, batch):
        if batch["number"] == self.number and rank() == 1 and not restarted():
            kill()
        return super().loss(model, batch)


def kill_in_a_save():
    """Die in the attempt behind the first, when the tensors of one checkpoint are on disk and its index is not."""
    whole = Writer.finish

    def finish(writer, metadata, results):
        if os.environ["TORCHELASTIC_RESTART_COUNT"] == "1" and "step-00000008" in str(writer.folder):
            kill()
        whole(writer, metadata, results)

    Writer.finish = finish


def main(folder, number):
    torch.set_num_threads(1)
    if not restarted():
        train(make_model(), Toy(), HOW, folder / "whole")
    kill_in_a_save()
    with (folder / f"attempts-{rank()}").open("a") as file:
        found = checkpoints(folder / "run")
        file.write(f"{os.environ['TORCHELASTIC_RESTART_COUNT']} {found[-1].name if found else '-'}\n")
    barrier()
    train(make_model(), Killed(number), HOW, folder / "run")
    flip(folder)


def flip(folder):
    """Go on with a copy of the run, one bit of whose newest checkpoint is another."""
    copied = folder / "flipped"
    if rank() == 0:
        shutil.copytree(folder / "run", copied)
        shard = copied / "checkpoints" / "step-00000012" / "shard-00001.bin"
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    barrier()
    path, broken = newest_whole(copied)
    (folder / f"flipped-{rank()}").write_text(f"{path.name} {broken}")
    train(make_model(), Toy(), HOW, copied)


if __name__ == "__main__":
    with connected("cpu"):
        main(Path(sys.argv[1]), int(sys.argv[2]))
