import json

import pytest
import torch

from kvbind.train import checkpoint
from kvbind.train.metrics import Metrics, read_metrics


def save(folder, step, keep=2):
    return checkpoint.save_checkpoint(folder, step, {"step": step, "weight": torch.full((3,), float(step))}, keep)


def test_the_newest_is_read_and_the_last_few_are_kept(tmp_path):
    for step in (9, 10, 100):
        save(tmp_path, step)
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step-00000010.pt", "step-00000100.pt"]
    assert torch.equal(checkpoint.latest_checkpoint(tmp_path)["weight"], torch.full((3,), 100.0))


def test_a_run_without_checkpoints_has_no_latest(tmp_path):
    assert checkpoint.latest_checkpoint(tmp_path) is None


def test_a_write_that_breaks_off_leaves_the_one_before_and_is_cleared_away_later(tmp_path, monkeypatch):
    save(tmp_path, 1)
    whole = torch.save

    def half(content, file):
        file.write(b"PK\x03\x04 half a checkpoint")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2)
    assert checkpoint.latest_checkpoint(tmp_path)["step"] == 1
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
    monkeypatch.setattr(torch, "save", whole)
    save(tmp_path, 3)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000001.pt", "step-00000003.pt"]


def test_the_file_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    events = []
    fsync, replace = checkpoint.os.fsync, checkpoint.Path.replace
    monkeypatch.setattr(checkpoint.os, "fsync", lambda handle: (events.append("sync"), fsync(handle))[1])
    monkeypatch.setattr(checkpoint.Path, "replace", lambda a, b: (events.append("rename"), replace(a, b))[1])
    save(tmp_path, 1)
    assert events == ["sync", "rename", "sync"]


def test_random_states_survive_a_checkpoint(tmp_path):
    import random

    import numpy as np

    def draw():
        return torch.rand(2).tolist(), random.random(), float(np.random.rand())

    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    draw()
    checkpoint.save_checkpoint(tmp_path, 1, {"random": checkpoint.random_state()}, keep=1)
    expected = draw()
    draw()
    checkpoint.restore_random_state(checkpoint.latest_checkpoint(tmp_path)["random"])
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


def test_a_run_of_many_gpus_goes_on_on_a_machine_of_one(monkeypatch):
    given = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", list)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", given.extend)
    state = checkpoint.random_state() | {"cuda": [torch.zeros(2), torch.ones(2)]}
    checkpoint.restore_random_state(state)
    assert [x.tolist() for x in given] == [[0, 0]]
