"""The benchmark of window attention, on a CPU."""

import json

import pytest
import torch
from typer.testing import CliRunner

from kvbind.bench.layers.window_attention import bench_attention
from kvbind.cli import app
from kvbind.layers.attention import window_attention as module


def test_times_attention_in_blocks_with_keys_ahead_and_without(tmp_path):
    arguments = ["--tokens", "300", "--heads", "2", "--width", "8", "--window", "40", "--seconds", "0", "--device", "cpu"]
    done = CliRunner().invoke(app, ["bench", "attention", *arguments, "--out", str(tmp_path / "a.json")])
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["complete"]
    assert record["config"]["window"] == 40
    assert [(row["kernel"], row["ahead"]) for row in record["rows"]] == [("blocks", 0), ("blocks", 128)]
    assert all(row[f"{name}_seconds"] > 0 for row in record["rows"] for name in ("first", "forward", "training"))


@pytest.mark.parametrize("failing", [False, True])
def test_leaves_what_is_compiled_for_which_length_as_it_was(monkeypatch, failing):
    monkeypatch.setattr(module, "_OWN", {(5, 5)})
    rows = bench_attention(60, 1, 4, 7, torch.device("cpu"), seconds=0)
    if failing:
        next(rows)
        rows.close()
    else:
        list(rows)
    assert [*module._OWN] == [(5, 5)]
    assert module.OWN_KERNELS > 0
