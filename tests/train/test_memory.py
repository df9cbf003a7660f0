"""How many blocks are recomputed where `train.activation_checkpointing` is "auto", on a GPU that is told of."""

import itertools
import logging
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvbind.train import graphs, loop, memory, train
from kvbind.train.metrics import read_metrics
from kvbind.train.recompute import recompute, that_fit
from train.toy import Toy, config, make_model

EXTRA = 100_000
"""Bytes that each block is said to keep."""


@pytest.fixture
def gpu(monkeypatch):
    """A GPU's memory: every other time it is asked, `EXTRA` more is taken; `free` bytes are left."""
    told = SimpleNamespace(free=0, fraction=1.0, peak=1000, asked=itertools.count())
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: EXTRA * (next(told.asked) % 2))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: told.peak)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (told.free, 10 * EXTRA))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 0)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    # PyTorch's takes numbers alone
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda number: [told.fraction][number], raising=False)
    monkeypatch.setattr(loop, "initial", lambda what, device: memory.initial(what, torch.device("cuda")))
    monkeypatch.setattr(loop, "recompute", lambda blocks, what: told.__dict__.setdefault("blocks", recompute(blocks, what)))
    return told


def run(folder, **fields):
    model = make_model()
    train(model, Toy(), config(steps=5, **fields), folder)
    return [x.detach() for x in model.parameters()], [row.get("loss") for row in read_metrics(folder)]


@pytest.mark.parametrize(
    ("free", "fraction", "kept"), [(0, 1.0, 0), (150_000, 1.0, 1), (900_000, 1.0, 2), (900_000, 0.02, 0)]
)
def test_as_many_blocks_keep_their_activations_as_fit_and_the_run_is_the_same(gpu, tmp_path, free, fraction, kept, caplog):
    gpu.free, gpu.fraction = free, fraction
    with caplog.at_level(logging.INFO, "kvbind.train"):
        found = run(tmp_path / "auto")
    assert [block.on for block in gpu.blocks] == [True] * (2 - kept) + [False] * kept
    assert all(EXTRA - 1000 < block.extra < EXTRA for block in gpu.blocks)
    assert ("blocks are computed again" in caplog.text) == (kept < 2)
    plain = run(tmp_path / "none", activation_checkpointing="none")
    assert all(torch.equal(x, y) for x, y in zip(found[0], plain[0], strict=True))
    assert found[1] == plain[1]


def test_averages_that_the_optimizer_has_yet_to_make_are_counted(gpu, tmp_path):
    gpu.free, gpu.peak = 2 * EXTRA + 10_000, 1000
    gpu.free = round(gpu.free / memory.SHARE)
    run(tmp_path / "fits")
    assert not any(block.on for block in gpu.blocks)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    count = sum(x.numel() for x in model.parameters())
    assert memory.missing_averages(optimizer) == 8 * count
    sum(x.sum() for x in model.parameters()).backward()
    optimizer.step()
    assert memory.missing_averages(optimizer) == 0


def test_off_gpus_nothing_is_recomputed():
    assert memory.initial("auto", torch.device("cpu")) == "none"
    assert memory.initial("block", torch.device("cpu")) == "block"
    assert memory.initial("auto", torch.device("cuda")) == "block"


@given(st.lists(st.integers(0, 100), max_size=8), st.floats(-10, 500))
def test_the_last_blocks_are_kept_up_to_the_room(extra, room):
    count = that_fit(extra, room)
    assert count == 0 or sum(extra[len(extra) - count :]) <= room
    assert count == len(extra) or sum(extra[len(extra) - count - 1 :]) > room


def test_a_graph_that_does_not_fit_is_captured_anew_with_all_blocks_recomputed(monkeypatch):
    """The first capture runs out of memory; the second, of blocks that are all recomputed, does not."""
    blocks = recompute([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)], "block")
    blocks[1].on = False
    tried = []

    def work(batch):
        tried.append([block.on for block in blocks])
        if not all(tried[-1]):
            raise torch.OutOfMemoryError("no room")

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, fake in {
        "default_generators": [SimpleNamespace(clone_state=lambda: None, graphsafe_set_state=lambda state: None)],
        "current_device": lambda: 0, "current_stream": lambda device: stream, "Stream": lambda device: stream,
        "stream": lambda other: nullcontext(), "set_stream": lambda other: None, "graph_pool_handle": lambda: 1,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: tried.append("replayed")),
        "graph": lambda *args, **kwargs: nullcontext(), "empty_cache": lambda: None, "synchronize": lambda device: None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    device, asked = torch.device("cuda"), []
    monkeypatch.setattr(graphs, "to_device", lambda batch, device: batch)
    monkeypatch.setattr(graphs, "alive", lambda device: [])

    def relieve():
        asked.append(1)
        return memory.all_recomputed(blocks)

    replays = graphs.Replays(work, device, relieve=relieve)
    shape = SimpleNamespace(batch={}, read=[])
    replay = replays._capture(shape)
    assert tried == [[True, False], [True, True]]
    assert replays.broken is None
    assert asked == [1]
    replay()
    assert tried[-1] == "replayed"
    blocks[0].on = False
    monkeypatch.setattr(memory, "all_recomputed", lambda blocks: False)
    assert replays._capture(shape) is None
    assert "no room" in replays.broken
