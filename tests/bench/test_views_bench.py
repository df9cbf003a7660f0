import json

import pytest
import torch
from typer.testing import CliRunner

from kvbind.bench.app import app
from kvbind.bench.models.views import FullAttentionNvs
from kvbind.models.lact_nvs import LactNvsConfig
from kvbind.tasks.views.procedural import Cameras, make_cameras


def test_full_attention_renders_from_its_scene_what_one_pass_over_all_tokens_gives():
    torch.manual_seed(0)
    model = FullAttentionNvs(LactNvsConfig(dim=16, layers=2, patch_size=4, head_dim=8, fast_head_dim=16)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    c2w, intrinsics = make_cameras("train", 1, 5, (8, 8), Cameras())
    image = torch.rand(1, 3, 3, 8, 8)
    with torch.no_grad():
        scene = model.read(image, c2w[:, :3], intrinsics[:, :3])
        shown = model.view(scene, c2w[:, 3:], intrinsics[:, 3:], (8, 8))
        # targets neither see one another nor are seen
        alone = model.view(scene, c2w[:, 4:], intrinsics[:, 4:], (8, 8))
        fewer = model.view(model.read(image[:, :2], c2w[:, :2], intrinsics[:, :2]), c2w[:, 3:], intrinsics[:, 3:], (8, 8))
        order = [2, 0, 1]
        permuted = model.view(
            model.read(image[:, order], c2w[:, order], intrinsics[:, order]), c2w[:, 3:], intrinsics[:, 3:], (8, 8)
        )
    assert shown.shape == (1, 2, 3, 8, 8)
    torch.testing.assert_close(alone, shown[:, 1:])
    torch.testing.assert_close(permuted, shown)
    assert (fewer - shown).abs().max() > 1e-3
    assert scene[0][0].shape == (1, 2, 3 * 4, 8)


def test_bench_views_measures_both_models_at_every_number_of_views(tmp_path):
    out = tmp_path / "views.json"
    arguments = ["views", "--preset", "tiny", "--views", "2,4", "--size", "16", "--frames", "2", "--seconds", "0"]
    result = CliRunner().invoke(app, [*arguments, "--device", "cpu", "--out", str(out)])
    assert result.exit_code == 0, result.output
    data = json.loads(out.read_text())
    assert {"command", "machine", "versions", "config"} <= data.keys()
    assert data["complete"]
    rows = {(row["model"], row["views"]): row for row in data["rows"]}
    assert list(rows) == [(name, views) for views in (2, 4) for name in ("LaCT", "full attention")]
    for row in rows.values():
        assert row["fits"]
        assert min(row["read_seconds"], row["frames_per_second"], row["read_bytes"], row["render_bytes"]) > 0
    # a scene of fast weights has one size; keys and values grow with the views
    assert rows["LaCT", 2]["scene_bytes"] == rows["LaCT", 4]["scene_bytes"]
    assert 2 * rows["full attention", 2]["scene_bytes"] == rows["full attention", 4]["scene_bytes"]


def test_a_model_that_does_not_fit_is_not_tried_on_more_views(monkeypatch):
    from kvbind.bench.models import views as bench

    def read(self, image, *cameras):
        if image.shape[1] >= 4:
            raise torch.OutOfMemoryError("full")
        return original(self, image, *cameras)

    original = FullAttentionNvs.read
    monkeypatch.setattr(FullAttentionNvs, "read", read)
    config = LactNvsConfig(dim=16, layers=1, patch_size=4, head_dim=8, fast_head_dim=16)
    rows = list(bench.bench_views(config, [2, 4, 8], (8, 8), torch.device("cpu"), frames=1, seconds=0))
    assert [(row.model, row.fits) for row in rows] == [
        ("LaCT", True), ("full attention", True), ("LaCT", True), ("full attention", False), ("LaCT", True),
        ("full attention", False),
    ]  # fmt: skip
    assert rows[-1].read_seconds is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "tinny"], "tiny"),
        (["--preset", "tiny", "--size", "20"], "multiple"),
        (["--preset", "tiny", "--views", "2,x"], "whole numbers"),
        (["--preset", "tiny", "--views", "0"], "whole numbers"),
    ],
)
def test_unknown_presets_sizes_and_numbers_are_refused(arguments, message):
    result = CliRunner().invoke(app, ["views", "--device", "cpu", *arguments])
    assert result.exit_code == 2
    assert message in result.output


def test_what_was_measured_before_an_interruption_is_written(monkeypatch, tmp_path):
    from kvbind.bench.models import views as bench

    def measure(row, *_):
        if row.views > 2:
            raise KeyboardInterrupt
        return row

    monkeypatch.setattr(bench, "_measure", measure)
    out = tmp_path / "views.json"
    arguments = ["views", "--preset", "tiny", "--views", "2,4", "--size", "16", "--device", "cpu", "--out", str(out)]
    assert CliRunner().invoke(app, arguments).exit_code != 0
    data = json.loads(out.read_text())
    assert [row["views"] for row in data["rows"]] == [2, 2]
    assert not data["complete"]
