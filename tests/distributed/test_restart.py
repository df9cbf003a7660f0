"""Restarts by `torchrun`, and the command under it."""

import json
from pathlib import Path

import torch
from launching import torchrun, torchrun_on_nodes

from kvbind.models import LactForCausalLM
from kvbind.tasks.language import open_trained

HERE = Path(__file__).parent


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
