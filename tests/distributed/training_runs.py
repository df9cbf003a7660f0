"""Runs of the three tasks that one process and several take alike."""

import json
import math
import multiprocessing
import multiprocessing.connection
import os
import socket
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from kvbind.tasks import open_task_module
from kvbind.train import train
from kvbind.train.config import ParallelConfig, read_config
from kvbind.train.parallel import is_sharded
from kvbind.train.ranks import connected, rank
from train import toy
from train.toy import Toy

EDITS = {
    "language": [
        "model.fields.hidden_size=32", "model.fields.num_hidden_layers=2", "model.fields.num_attn_heads=2",
        "model.fields.window_size=16", "model.inner.chunk=16", "data.length=48", "data.batch=4", "data.window=16",
        "data.streams=2", "data.evaluation_samples=5", "data.evaluation_batch=2", "train.accumulate=2",
    ],
    "images": [
        "model.fields.embed_dim=16", "model.fields.depth=2", "model.fields.num_heads=2", "model.fields.patch_size=4",
        "data.batch=8", "data.evaluation_batch=10", "augment.flip=0.5", "augment.erasing=0.5", "augment.mixup=0.5",
        "augment.cutmix=0.5", "augment.smoothing=0.1", "train.ema=0.5",
    ],
    "views": [
        "model.fields.dim=32", "model.fields.head_dim=16", "model.fields.fast_head_dim=32", "model.fields.layers=2",
        "data.size=[16,16]", "data.procedural.scenes=6", "data.procedural.views=8", "data.inputs=3", "data.targets=2",
        "data.batch=1", "data.evaluation_scenes=3", "train.accumulate=4",
    ],
}  # fmt: skip
PRESETS = {"language": "tiny", "images": "digits", "views": "tiny"}
COMMON = ["train.device=cpu", "train.steps=4", "train.warmup=2", "train.learning_rate=1e-3", "train.checkpoint_every=2"]

WAYS = {
    "ddp": ParallelConfig("ddp"),
    "fsdp": ParallelConfig("fsdp"),
    "hsdp": ParallelConfig("fsdp", shard=2, reshard=False),
    "sequence": ParallelConfig("fsdp", sequence=2),
}
"""How several processes may hold a model."""


def configuration(task, sources, *edits):
    module = open_task_module(task)
    source = [f"data.source={sources[task]}"] if task in sources else []
    return module.resolve(
        read_config(module.Config, module.PRESETS, PRESETS[task], [*EDITS[task], *COMMON, *source, *edits])
    )


def run(task, sources, folder, way=None, *edits, stop=None):
    """Train a task's small model; with `stop`, only up to a step, as an interruption would leave it."""
    config = configuration(task, sources, *edits)
    how = replace(config.train, parallel=WAYS[way]) if way else config.train
    opened = open_task_module(task).Task(config)
    model = opened.build()

    def watch(step, note):
        if step == stop:
            raise KeyboardInterrupt

    try:
        return model, train(model, opened, how, folder, watch)
    except KeyboardInterrupt:
        return model, None


RUNS = {
    2: [
        *((task, way) for task in EDITS for way in ("ddp", "fsdp")),
        ("language", "sequence"),
        # documents that stay apart: ranks predict different numbers of tokens
        ("language", "ddp", "data.separate=true"),
        ("language", "fsdp", "train.activation_checkpointing=block"),
        ("language", "fsdp", "train.activation_checkpointing=selective"),
        ("language", "fsdp", "train.activation_checkpointing=offload"),
        ("language", "sequence", "train.activation_checkpointing=offload"),
    ],
    4: [
        *((task, "hsdp") for task in EDITS),
        ("language", "ddp"),
        ("language", "sequence"),
        ("language", "sequence", "data.separate=true"),
    ],
}
"""By number of processes: a task, how its model is held, and edits of its configuration."""


class Poisoned(Toy):
    """Rows of one rank alone are not finite in two steps."""

    def loss(self, model, batch):
        x = batch["x"] * math.nan if batch["number"] in (1, 2) and rank() == 1 else batch["x"]
        return super().loss(model, batch | {"x": x})


def poisoned(folder, strategy):
    """A run with running statistics and an average of the weights, through steps that are skipped."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
    train(model, Poisoned(), toy.config(steps=6, ema=0.5, parallel=ParallelConfig(strategy)), folder)
    return model


def folder_of(root, count, task, way, *edits):
    return root / "-".join([task, way or "alone", str(count), *(edit.partition("=")[2] for edit in edits)])


def together(root, count, number, port):
    """What one of `count` processes does."""
    sources = json.loads((root / "sources.json").read_text())
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with connected("cpu"):
        for task, way, *edits in RUNS[count]:
            model, _ = run(task, sources, folder_of(root, count, task, way, *edits), way, *edits)
            assert is_sharded(model) == (way != "ddp")
        # go on with what others have begun
        if count == 4:
            run("images", sources, root / "begun-by-4", "hsdp", stop=3)
        else:
            for strategy in ("ddp", "fsdp"):
                poisoned(root / f"poisoned-{strategy}", strategy)
            run("images", sources, root / "begun-by-4", "fsdp")
            run("language", sources, root / "begun-by-1", "fsdp")


def main(root):
    """All runs, by forks of this process, which has imported everything once and computed nothing."""
    torch.set_num_threads(1)
    for count in (4, 2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        forked = multiprocessing.get_context("fork")
        processes = [forked.Process(target=together, args=(root, count, i, port)) for i in range(count)]
        for process in processes:
            process.start()
        waiting = {process.sentinel: process for process in processes}
        while waiting:
            for sentinel in multiprocessing.connection.wait(list(waiting)):
                if waiting.pop(sentinel).exitcode:  # the others would wait for it
                    for process in processes:
                        process.kill()
                    sys.exit(f"one of {count} processes failed")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
