import json
import sys
import types

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from kvbind.bench.app import app
from kvbind.bench.models import vision
from kvbind.bench.models.vision import VisionRow, bench_vision, compare, crossing, fitting_batch

CPU = torch.device("cpu")
SMALL = ["vision", "--model", "vittt_tiny", "--sizes", "32,48", "--batch", "2", "--seconds", "0", "--device", "cpu"]


class Softmax(nn.Module):
    """What stands in for timm's transformer: one layer of attention to all patches."""

    def __init__(self, size):
        super().__init__()
        self.size = size
        self.embed = nn.Conv2d(3, 16, 16, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, vision.CLASSES)

    def forward(self, images):
        assert images.shape[-2:] == (self.size, self.size)
        x = self.embed(images).flatten(2).mT
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


@pytest.fixture
def timm(monkeypatch):
    made = []

    def create_model(name, pretrained, img_size, num_classes):
        made.append((name, pretrained, img_size, num_classes))
        return Softmax(img_size)

    module = types.ModuleType("timm")
    module.create_model = create_model
    monkeypatch.setitem(sys.modules, "timm", module)
    return made


def test_both_models_are_measured_at_every_size_with_one_batch(timm, tmp_path):
    out = tmp_path / "vision.json"
    result = CliRunner().invoke(app, [*SMALL, "--peer", "vit_stand_in", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert timm == [("vit_stand_in", False, size, 1000) for size in (32, 48)]
    data = json.loads(out.read_text())
    rows = data["rows"]
    assert [(row["size"], row["tokens"], row["model"], row["batch"]) for row in rows] == [
        (32, 4, "vittt_tiny", 2), (32, 4, "vit_stand_in", 2), (48, 9, "vittt_tiny", 2), (48, 9, "vit_stand_in", 2)
    ]  # fmt: skip
    for row in rows:
        assert row["forward"] > 0
        assert row["training"] > 0
        assert row["training_bytes"] > row["forward_bytes"] > 0
    assert {"command", "machine", "versions", "config"} <= data.keys()
    assert data["compared"]["training"]["speed"].keys() == {"32", "48"}
    assert data["compared"]["forward"]["speed"]["32"] == pytest.approx(rows[0]["forward"] / rows[1]["forward"])


def test_without_a_peer_timm_is_not_needed(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "timm", None)
    out = tmp_path / "vision.json"
    result = CliRunner().invoke(app, [*SMALL, "--sizes", "32", "--peer", "none", "--out", str(out)])
    assert result.exit_code == 0, result.output
    data = json.loads(out.read_text())
    assert [row["model"] for row in data["rows"]] == ["vittt_tiny"]
    assert data["compared"] is None
    with pytest.raises(ImportError, match="package 'timm', which is not installed; --peer none"):
        bench_vision("vittt_tiny", "vit_base_patch16_224", [32], CPU, batch=1, seconds=0)


def test_a_batch_that_does_not_fit_is_halved_for_all_models(timm, monkeypatch):
    plain = vision.training_step

    def step_with_little_memory(model, device):
        step = plain(model, device)

        def limited(images, labels):
            # the second model is the one that runs out
            if isinstance(model, Softmax) and len(images) > 2:
                raise torch.cuda.OutOfMemoryError
            step(images, labels)

        return limited

    monkeypatch.setattr(vision, "training_step", step_with_little_memory)
    rows = bench_vision("vittt_tiny", "vit_stand_in", [32], CPU, batch=8, seconds=0)
    assert [row.batch for row in rows] == [2, 2]


def test_sizes_and_models_that_do_not_fit_are_refused(monkeypatch):
    # before any is measured
    monkeypatch.setattr(vision, "_bench_size", None)
    with pytest.raises(ValueError, match="sizes must be multiples of the patch's side, 16; got 40"):
        bench_vision("vittt_tiny", None, [32, 40], CPU)
    with pytest.raises(ValueError, match="model must be one of vittt_tiny, vittt_small, vittt_base; got 'h_vittt_tiny'"):
        bench_vision("h_vittt_tiny", None, [32], CPU)


@pytest.mark.parametrize(("tokens", "batch"), [(196, 256), (1024, 32), (4096, 8), (50176, 1), (60000, 1)])
def test_batches_hold_about_as_many_patches(tokens, batch):
    assert fitting_batch(tokens) == batch


def test_the_crossing_is_where_the_ratio_is_one():
    assert crossing({100: 0.5, 400: 2.0}) == pytest.approx(200)
    assert crossing({100: 0.25, 200: 0.5, 800: 2.0}) == pytest.approx(400)
    assert crossing({100: 2.0, 400: 0.5}) == pytest.approx(200)
    assert crossing({100: 1.1, 200: 1.5}) is None
    assert crossing({100: 0.9}) is None


def test_comparisons_are_of_the_same_size():
    rows = [VisionRow("a", 100, 1, 1, 2.0, 1.0, 10, 20), VisionRow("b", 100, 1, 1, 4.0, 2.0, 40, 40),
            VisionRow("a", 400, 1, 1, 2.0, 1.0, 10, 20), VisionRow("b", 400, 1, 1, 1.0, 4.0, 5, 10)]  # fmt: skip
    found = compare(rows, "a", "b")
    assert found["forward"]["speed"] == {100: 0.5, 400: 2.0}
    assert found["forward"]["crossing"] == pytest.approx(200)
    assert found["training"]["memory"] == {100: 0.5, 400: 2.0}
    assert found["training"]["crossing"] is None
