import json
from contextlib import closing

import pytest
import torch

from kvbind.train import checkpoint
from kvbind.train.metrics import Metrics, read_metrics


def save(folder, step, keep=2):
    with closing(checkpoint.Saver(folder, keep)) as saver:
        saver.save(step, {"model": {"weight": torch.full((3,), float(step))}}, {"step": step})


def names(folder):
    return sorted(p.name for p in (folder / "checkpoints").iterdir())


def test_the_newest_is_read_and_the_last_few_are_kept(tmp_path):
    for step in (9, 10, 100):
        save(tmp_path, step)
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == names(tmp_path) == ["step-00000010", "step-00000100"]
    newest = checkpoint.latest_checkpoint(tmp_path)
    assert newest["step"] == 100
    assert torch.equal(newest["model"]["weight"], torch.full((3,), 100.0))


def test_a_run_without_checkpoints_has_no_latest(tmp_path):
    assert checkpoint.latest_checkpoint(tmp_path) is None


def test_parts_are_read_alone(tmp_path):
    tensors = {"model": {"a.weight": torch.randn(2, 3)}, "optimizer": {"a.weight.step": torch.tensor(3.0)}}
    with closing(checkpoint.Saver(tmp_path, 1)) as saver:
        saver.save(1, tensors, {"done": {"step": 1}})
    assert checkpoint.latest_checkpoint(tmp_path).keys() == {"model", "optimizer", "done"}
    found = checkpoint.latest_checkpoint(tmp_path, ("model",))
    assert found.keys() == {"model", "done"}
    assert torch.equal(found["model"]["a.weight"], tensors["model"]["a.weight"])


def test_what_is_saved_is_what_there_was_when_it_was_asked_for(tmp_path):
    weight = torch.zeros(1000, 100)
    with closing(checkpoint.Saver(tmp_path, 1)) as saver:
        saver.save(1, {"model": {"weight": weight}}, {})
        weight += 1
    assert not checkpoint.latest_checkpoint(tmp_path)["model"]["weight"].any()


@pytest.mark.parametrize("broken", ["mark", "remove"])
def test_a_write_that_breaks_off_leaves_the_one_before_and_is_cleared_away_later(tmp_path, monkeypatch, broken):
    save(tmp_path, 1, keep=1)

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        if broken == "mark":  # everything but the mark is on disk
            patch.setattr(checkpoint, "mark", fail)
        else:  # the new one is whole, and the old one half gone
            whole, patience = checkpoint.remove, iter(range(10))
            patch.setattr(checkpoint, "remove", lambda path: whole(path) if next(patience) < 2 else fail())
        with pytest.raises(OSError, match="disk full"):
            save(tmp_path, 2, keep=1)
    assert checkpoint.latest_checkpoint(tmp_path)["step"] == (1 if broken == "mark" else 2)
    left = ["step-00000001"] if broken == "mark" else [".step-00000001.partial", "step-00000002"]
    assert names(tmp_path) == left
    save(tmp_path, 3, keep=2)
    assert names(tmp_path) == [left[-1], "step-00000003"]


def test_the_mark_is_written_when_everything_else_is_on_disk(tmp_path, monkeypatch):
    events = []
    fsync, replace = checkpoint.os.fsync, checkpoint.Path.replace
    rename = checkpoint.Path.rename
    monkeypatch.setattr(checkpoint.os, "fsync", lambda handle: (events.append("sync"), fsync(handle))[1])
    monkeypatch.setattr(checkpoint.Path, "replace", lambda a, b: (events.append(b.name), replace(a, b))[1])
    monkeypatch.setattr(checkpoint.Path, "rename", lambda a, b: (events.append(b.name), rename(a, b))[1])
    save(tmp_path, 1)
    files = {p.name for p in (tmp_path / "checkpoints" / "step-00000001").iterdir()}
    assert files == {"complete", "plain.pt", "index.json", "shard-00000.bin"}
    assert events[-5:] == ["sync", "complete", "sync", "step-00000001", "sync"]
    # plain data, tensors and their index, and the folder behind each name
    assert [events[: events.index(name)].count("sync") for name in ("plain.pt", "index.json")] == [2, 5]


def test_random_states_survive_a_checkpoint(tmp_path):
    import random

    import numpy as np

    def draw():
        return torch.rand(2).tolist(), random.random(), float(np.random.rand())

    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    draw()
    with closing(checkpoint.Saver(tmp_path, 1)) as saver:
        saver.save(1, {"model": {"weight": torch.zeros(1)}}, {"random": checkpoint.random_states()})
    expected = draw()
    draw()
    checkpoint.restore_random_states(checkpoint.latest_checkpoint(tmp_path)["random"], stream=0)
    assert draw() == expected


def test_metrics_after_the_checkpoint_are_dropped_on_resume(tmp_path):
    metrics = Metrics(tmp_path)
    for step in range(1, 6):
        metrics.write(step, loss=float(step))
    metrics.close()
    Metrics(tmp_path, step=3).close()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    Metrics(tmp_path).close()
    assert read_metrics(tmp_path) == []


def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0}) + '\n{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]


def test_processes_that_take_over_another_number_of_states_draw_each_otherwise_and_always_the_same():
    states = [checkpoint.random_state() | {"cuda": None} for _ in range(3)]

    def first_draw(stream):
        torch.manual_seed(stream)  # whatever it was before
        checkpoint.restore_random_states(states, stream)
        return torch.rand(1).item()

    draws = [first_draw(stream) for stream in range(4)]
    assert len(set(draws)) == 4
    assert draws == [first_draw(stream) for stream in range(4)]
