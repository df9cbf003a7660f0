import math

import torch
from torch import nn

from kvbind.bench.training import cuda_graphs


def test_both_kinds_of_steps_are_timed_and_what_fails_is_told(monkeypatch, tmp_path, capsys):
    plain = cuda_graphs.cases

    def some(sizes):
        for case in plain(sizes):
            if "rung6" in case.name or "nvs" in case.name:
                yield case

    monkeypatch.setattr(cuda_graphs, "cases", some)

    def fails(case, device, how, seconds, plain=cuda_graphs.speed):
        if how == "off" and "nvs" in case.name:
            raise RuntimeError("no room")
        return plain(case, device, how, seconds)

    monkeypatch.setattr(cuda_graphs, "speed", fails)
    record = cuda_graphs.main(tmp_path / "a.json", "cpu", sizes="tiny", seconds=0.0)
    language, views = record["rows"]
    assert record["complete"]
    assert language["on"]["captured"] == 1
    assert language["off"]["captured"] == 0
    assert language["on"]["loss"] == language["off"]["loss"]
    assert language["on"]["per_second"] > 0
    assert views["off"] == {"failed": "RuntimeError: no room"}
    printed = capsys.readouterr().out
    assert "no room" in printed
    assert "tokens/s" in printed


def test_compared_losses_are_those_of_whole_runs_and_of_runs_that_changed_their_kind():
    def draw(number):
        return {"x": torch.randn(4, 3, generator=torch.Generator().manual_seed(number))}

    def build():
        return nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.1))

    case = cuda_graphs.TrainingCase(
        "toy", "rows", 4, build, draw, lambda model, batch: model(batch["x"]).square().mean(), lambda _: [], 35
    )
    found = cuda_graphs.compare(case, torch.device("cpu"))
    assert found["steps"] == 35
    assert found["relative"] == {"replayed": 0.0, "eager_then_replayed": 0.0, "replayed_then_eager": 0.0}
    assert not found["said"]


def test_what_has_no_time_says_so():
    record = cuda_graphs.main(None, "cpu", sizes="tiny", budget=0.0, only="rung6")
    (row,) = record["rows"]
    assert row["skipped"] == "no time left"
    assert not record["complete"]
    assert math.isfinite(row["seconds"])
