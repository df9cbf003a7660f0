"""Runs whose processes are killed go on by themselves, and the command under `torchrun`."""

import json
import random
from pathlib import Path

import torch
from launching import torchrun, torchrun_on_nodes

from kvbind.models import LactForCausalLM
from kvbind.tasks.language import open_trained
from kvbind.train import latest_checkpoint
from kvbind.train.metrics import read_metrics

HERE = Path(__file__).parent


def rows(folder):
    varying = {"seconds", "rows_per_second", "data_wait"}
    return [{name: x for name, x in row.items() if name not in varying} for row in read_metrics(folder)]


def test_a_run_whose_ranks_are_killed_in_a_step_and_in_a_save_goes_on_and_ends_like_one_that_was_not(tmp_path):
    number = random.Random().randrange(4, 8)  # the step in which the first process dies; checkpoints come every two
    code, _, errors = torchrun(2, HERE / "killed_run.py", tmp_path, number, restarts=3)
    assert code == 0, errors[-4000:]

    for rank in range(2):
        first, second, third = (line.split() for line in (tmp_path / f"attempts-{rank}").read_text().splitlines())
        assert first == ["0", "-"]
        # the newest checkpoint may still have been under way
        latest = number - number % 2
        assert second[0] == "1"
        assert second[1] in {f"step-{latest:08d}", f"step-{latest - 2:08d}"}
        assert third == ["2", "step-00000006"]
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-00000010", "step-00000012"]

    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    found, expected = (latest_checkpoint(tmp_path / name) for name in ("run", "whole"))
    for part in ("model", "trained", "optimizer"):
        assert found[part].keys() == expected[part].keys()
        assert all(torch.equal(x, expected[part][name]) for name, x in found[part].items())


def test_a_restart_is_known_on_nodes_where_nothing_failed(tmp_path):
    """Or `--fresh` would discard what the first attempt has trained, where a process of another node died."""
    assert torchrun_on_nodes(2, HERE / "restarted_run.py", tmp_path, restarts=1) == [0, 0]
    spared, failed = ((tmp_path / f"rank-{rank}").read_text().splitlines() for rank in range(2))
    # restarted, and how often processes of the node itself have failed
    assert spared == ["False 0", "True 0"]
    assert failed == ["False 0", "True 1"]


def test_the_command_trains_under_torchrun_and_leaves_a_model_for_transformers(tmp_path):
    (tmp_path / "text").mkdir()
    for i in range(12):
        (tmp_path / "text" / f"{i}.txt").write_text("the quick brown fox jumps over the lazy dog. " * (3 + i))
    edits = [
        "model.fields.hidden_size=32", "model.fields.num_hidden_layers=1", "model.fields.num_attn_heads=2",
        "model.fields.window_size=16", "model.inner.chunk=16", "data.length=32", "data.batch=2", "data.window=8",
        "data.evaluation_samples=2", "train.device=cpu", "train.steps=3", "train.parallel.strategy=fsdp",
    ]  # fmt: skip
    run = tmp_path / "run"
    command = ["-m", "kvbind", "train", "language", "--data", tmp_path / "text", "--out", run, "--fresh", *edits]
    code, printed, errors = torchrun(2, *command)
    assert code == 0, errors[-4000:]
    assert printed.count("run folder:") == printed.count("3 steps in") == 1
    assert json.loads((run / "result.json").read_text())["processes"] == 2
    exported, (trained, _) = LactForCausalLM.from_pretrained(run / "model"), open_trained(run)
    for name, x in exported.state_dict().items():
        assert torch.equal(x, trained.state_dict()[name])
    assert len(exported.state_dict()) > 10
