"""Runs by 2 and 4 processes against the same by one: losses, evaluations, weights, and going on with each other's."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_runs import EDITS, RUNS, folder_of, run

from kvbind.train import latest_checkpoint
from kvbind.train.metrics import read_metrics
from tasks.image_files import idx_folder

SEPARATE = "data.separate=true"
CASES = [(count, task, way, edits) for count, runs in RUNS.items() for task, way, *edits in runs]
SCRIPT = Path(__file__).with_name("training_runs.py")
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "wizards", "mix", "liquid", "jade"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """All runs: by one process here; by four, then by two, which go on with some of the others'."""
    root = tmp_path_factory.mktemp("runs")
    (root / "text").mkdir()
    for i in range(40):
        (root / "text" / f"{i}.txt").write_text(" ".join(WORDS[(i + j * j) % len(WORDS)] for j in range(20 + 3 * i)))
    sources = {"language": str(root / "text"), "images": str(idx_folder(root / "idx"))}
    (root / "sources.json").write_text(json.dumps(sources))
    for task in EDITS:
        run(task, sources, folder_of(root, 1, task, None))
    run("language", sources, folder_of(root, 1, "language", None, SEPARATE), None, SEPARATE)
    run("language", sources, root / "begun-by-1", stop=3)
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(SCRIPT.parent.parent), *sys.path]),
    }
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(root)], env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return root


def curve(folder):
    rows = [{name: x for name, x in row.items() if name not in VARYING} for row in read_metrics(folder)]
    assert len(rows) >= 6
    return rows


VARYING = {"seconds", "tokens_per_second", "images_per_second", "views_per_second", "data_wait", "held_out/loss_by_position"}


def assert_same_curve(folder, other):
    found, expected = curve(folder), curve(other)
    assert [row.keys() for row in found] == [row.keys() for row in expected]
    for row, like in zip(found, expected, strict=True):
        assert row == pytest.approx(like, rel=2e-3, abs=1e-6), row["step"]
        if "loss" in row:
            assert row["loss"] == pytest.approx(like["loss"], rel=1e-4)


@pytest.mark.parametrize(("count", "task", "way", "edits"), CASES)
def test_several_processes_have_the_curve_of_one(root, count, task, way, edits):
    folder = folder_of(root, count, task, way, *edits)
    alone = folder_of(root, 1, task, None, *(edit for edit in edits if edit == SEPARATE))
    assert_same_curve(folder, alone)
    many, one = latest_checkpoint(folder), latest_checkpoint(alone)
    assert many["done"]["units"] == one["done"]["units"]
    for part in ("model", "optimizer"):
        assert many[part].keys() == one[part].keys()
        for name, x in many[part].items():
            torch.testing.assert_close(x, one[part][name], rtol=2e-2, atol=2e-4)


def test_recomputed_activations_change_no_number(root):
    for way, whats in (("fsdp", ("block", "selective", "offload")), ("sequence", ("offload",))):
        kept = curve(folder_of(root, 2, "language", way))
        for what in whats:
            assert curve(folder_of(root, 2, "language", way, f"train.activation_checkpointing={what}")) == kept


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_by_all(root):
    ddp, fsdp = (latest_checkpoint(root / f"poisoned-{strategy}") for strategy in ("ddp", "fsdp"))
    for saved in (ddp, fsdp):
        assert (saved["done"]["step"], saved["done"]["skipped"], saved["averaged"]) == (6, 2, 4)
        assert saved["trained"]["1.num_batches_tracked"] == 4
        assert all(x.isfinite().all() for part in ("model", "trained", "optimizer") for x in saved[part].values())
    assert [row["loss"] is None for row in read_metrics(root / "poisoned-ddp") if "loss" in row] == [0, 1, 1, 0, 0, 0]
    # running statistics, too, are those of all ranks, however the model is held
    for name, x in ddp["model"].items():
        # the norm behind it leaves the first bias no gradient but rounding, by whose sign AdamW steps; running means hold it
        if name != "0.bias":
            torch.testing.assert_close(x, fsdp["model"][name], rtol=1e-3, atol=1e-4)


def test_two_processes_go_on_with_a_run_of_one(root):
    assert_same_curve(root / "begun-by-1", folder_of(root, 1, "language", None))


def test_two_processes_go_on_with_a_run_of_four_on_another_mesh(root):
    assert_same_curve(root / "begun-by-4", folder_of(root, 1, "images", None))


def test_one_process_goes_on_with_a_run_of_several(root, tmp_path):
    sources = json.loads((root / "sources.json").read_text())
    shutil.copytree(folder_of(root, 4, "language", "hsdp"), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    run("language", sources, tmp_path / "run")
    assert_same_curve(tmp_path / "run", folder_of(root, 1, "language", None))
