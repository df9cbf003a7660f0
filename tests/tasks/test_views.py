"""The views task: presets, rows, training, evaluation, exact resumption, pictures."""

import json
import pickle
import sys
from types import ModuleType

import pytest
import torch
from PIL import Image
from torch import nn

from kvbind import Linear, systems
from kvbind.experiments.training.run_folders import load_model, open_run
from kvbind.experiments.training.runs import run_name, train_run
from kvbind.inner import InnerLoop
from kvbind.models.lact_nvs import LactNvs, LactNvsConfig
from kvbind.tasks import open_task_module, views
from kvbind.tasks.views import pool
from kvbind.tasks.views.config import LossConfig, ProceduralConfig, ViewsModelConfig
from kvbind.tasks.views.metrics import nearest_inputs, psnr, ssim
from kvbind.tasks.views.raycast import render
from kvbind.tasks.views.render import first_scenes, turntable, write_pictures
from kvbind.tasks.views.task import predict
from kvbind.train import train
from kvbind.train.bars import BEFORE
from kvbind.train.checkpoint import latest_checkpoint
from kvbind.train.config import read_config, to_yaml
from kvbind.train.metrics import read_metrics

SMALL = [
    "model.fields.dim=32", "model.fields.head_dim=16", "model.fields.fast_head_dim=32", "model.fields.layers=1",
    "data.size=[16,16]", "data.procedural.scenes=6", "data.procedural.views=8", "data.inputs=3", "data.targets=2",
    "data.batch=2", "data.evaluation_scenes=3", "train.device=cpu", "train.steps=6", "train.warmup=2",
]  # fmt: skip


def small(*edits):
    return views.resolve(read_config(views.Config, views.PRESETS, "tiny", [*SMALL, *edits]))


def interrupting(at):
    """What a run is watched by that is interrupted in a step."""

    def watch(step, note):
        if step == at:
            raise KeyboardInterrupt

    return watch


@pytest.mark.parametrize("preset", views.PRESETS)
def test_every_preset_is_a_whole_configuration_that_reads_back_the_same(preset, tmp_path):
    config = views.resolve(read_config(views.Config, views.PRESETS, preset))
    (tmp_path / "saved.yaml").write_text(to_yaml(config))
    assert read_config(views.Config, {}, str(tmp_path / "saved.yaml")) == config
    assert views.resolve(config) == config


def test_the_114m_preset_is_the_papers_setup():
    config = views.resolve(read_config(views.Config, views.PRESETS, "114m"))
    fields = config.model.fields
    assert {name: fields[name] for name in ("dim", "layers", "patch_size")} == {"dim": 768, "layers": 12, "patch_size": 8}
    assert views.inner_loop(config.model) == systems.lact_nvs()
    assert (config.train.steps, config.data.size, config.loss.perceptual) == (20000, (128, 128), 0.0)
    assert config.data.batch * config.train.accumulate == 64


def test_rows_are_the_steps_of_the_ladder_that_apply():
    rows = views.rows(read_config(views.Config, views.PRESETS, "114m"))
    loops = {name: InnerLoop.from_dict(row) for name, row in rows.items()}
    full = systems.lact_nvs()
    assert list(rows) == ["rung0", "rung1", "rung2", "rung3", "rung6", "ascent", "key_for_query"]
    assert loops["rung0"] == full
    assert loops["rung1"] == full.replace(update="last")
    assert loops["rung3"] == full.replace(update="last", normalize=False, network=Linear())
    assert loops["rung6"] == loops["rung3"].replace(token_lr=False, orthogonalize=None)
    assert loops["ascent"] == full.replace(direction="ascent")
    assert loops["key_for_query"] == full.replace(query="key")
    several = read_config(views.Config, views.PRESETS, "tiny", ["model.inner.steps=3"])
    assert all(InnerLoop.from_dict(row).steps == 3 for row in views.rows(several).values())


@pytest.mark.parametrize("row", views.rows(read_config(views.Config, views.PRESETS, "tiny")))
def test_every_row_is_a_model_that_trains(row, tmp_path):
    config = small("train.steps=2")
    config.model.inner = views.rows(config)[row]
    done = train_run("views", views.resolve(config), tmp_path / row)
    assert done.result["skipped"] == 0
    assert done.result["views"] == 2 * 2 * 5
    assert next(iter(done.result["held_out"])) == "psnr"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (ViewsModelConfig(size="tinny"), r"model\.size must be one of .*\(did you mean 'tiny'\?\)"),
        (ViewsModelConfig(inner={"updat": "last"}), r"did you mean 'update'"),
        (ViewsModelConfig(inner={"momentum": True}), "momentum"),
        (ViewsModelConfig(fields={"dims": 3}), r"did you mean 'dim'"),
        (ViewsModelConfig(fields={"inner": {}}), r"model\.fields must not hold 'inner', which model\.inner gives"),
    ],
)
def test_a_wrong_model_is_named(model, message):
    with pytest.raises((ValueError, TypeError), match=message):
        views.inner_loop(model)


def test_sizes_that_patches_do_not_tile_are_refused():
    with pytest.raises(ValueError, match=r"data\.size must be multiples of the model's patch_size, 4; got \[18, 16\]"):
        views.Task(small("data.size=[18,16]"))


def test_training_learns_the_scenes(tmp_path):
    config = small(
        "train.steps=60", "train.learning_rate=1e-2", "data.procedural.scenes=2", "train.warmup=5", "data.normalize=none"
    )
    task = views.Task(config)
    train(task.build(), task, config.train, tmp_path)
    losses = [row["loss"] for row in read_metrics(tmp_path) if "loss" in row]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


def test_an_interrupted_run_goes_on_exactly(tmp_path):
    whole, parts = small("train.steps=6", "train.checkpoint_every=2"), small("train.steps=6", "train.checkpoint_every=2")
    task = views.Task(whole)
    train(task.build(), task, whole.train, tmp_path / "whole")

    with pytest.raises(KeyboardInterrupt):
        train_run("views", parts, tmp_path / "parts", interrupting(5))
    train_run("views", parts, tmp_path / "parts")
    curves = [[row["loss"] for row in read_metrics(tmp_path / name) if "loss" in row] for name in ("whole", "parts")]
    assert curves[0] == curves[1]
    ends = [latest_checkpoint(tmp_path / name)["model"] for name in ("whole", "parts")]
    assert all(torch.equal(x, ends[1][name]) for name, x in ends[0].items())


def test_the_evaluation_is_that_of_each_target_by_itself():
    task = views.Task(small(), training=False)
    model = task.build().eval()
    with torch.no_grad():
        found = task.evaluate(model)
        assert task.evaluate(model) == found
        batch = first_scenes(task, 3)
        inputs, true = (task.held_out.pixels(batch[name], torch.device("cpu")) for name in ("image", "target_image"))
        predicted = predict(model, inputs, batch)
    errors = (predicted - true).square().mean((2, 3, 4))
    assert found["mse"] == pytest.approx(float(errors.mean()), rel=1e-5)
    assert found["psnr"] == pytest.approx(float((-10 * errors.log10()).mean()), rel=1e-5)
    assert (found["views"], found["scenes"]) == (6, 3)
    distance = torch.cdist(batch["target_c2w"][..., :3, 3], batch["c2w"][..., :3, 3])
    distance = distance + (batch["target_c2w"][:, :, None, :3, 2] - batch["c2w"][:, None, :, :3, 2]).norm(dim=-1)
    copies = torch.stack([inputs[i, distance[i].argmin(1)] for i in range(3)])
    nearest = -10 * (copies - true).square().mean((2, 3, 4)).log10()
    assert found["nearest_view_psnr"] == pytest.approx(float(nearest.mean()), rel=1e-5)


def test_evaluation_runs_in_bfloat16_with_cameras_in_full():
    task = views.Task(small(), training=False)
    model = task.build().eval()
    with torch.no_grad():
        full = task.evaluate(model)
        other = views.Task(small(), training=False)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = other.evaluate(model)
    assert low["nearest_view_psnr"] == full["nearest_view_psnr"]
    assert low["psnr"] == pytest.approx(full["psnr"], abs=0.05)


def test_scenes_are_rendered_before_the_first_step_and_stay_out_of_readers(monkeypatch):
    task = views.Task(small())
    task.batches(None)
    batch = task.scenes.read(1, [0, 2])
    known = task.scenes.pixels(batch["image"], torch.device("cpu"))
    copy = pickle.loads(pickle.dumps(task.scenes))
    assert len(pickle.dumps(task.scenes)) < 6 * 8 * 3 * 16 * 16  # the pictures alone are more
    assert torch.equal(copy.pixels(batch["image"], torch.device("cpu")), known)
    monkeypatch.setattr(pool, "render", None)
    assert torch.equal(task.scenes.pixels(batch["image"], torch.device("cpu")), known)


def test_runs_on_the_same_scenes_render_them_once_and_say_so(tmp_path, monkeypatch):
    rendered, told = [], []

    def counted(world, *cameras):
        rendered.append(len(world.sun))
        return render(world, *cameras)

    monkeypatch.setattr(pool, "_kept", {})
    monkeypatch.setattr(pool, "render", counted)
    first, second = small("train.steps=1"), small("train.steps=1", "seed=1")
    train_run("views", first, tmp_path / "first", lambda step, note: told.append((step, note)))
    assert rendered == [6, 3]
    assert told[0] == (0, f"{BEFORE}rendering 9 scenes")
    assert [note for _, note in told if note.endswith("done")] == [
        f"{BEFORE}rendering 9 scenes, {done} done" for done in (6, 9)
    ]
    assert told[-2] == (0, f"{BEFORE}9 scenes are rendered")
    assert told[-1][0] == 1
    train_run("views", second, tmp_path / "second", lambda step, note: told.append((step, note)))
    assert rendered == [6, 3]
    assert sum(note.startswith(BEFORE) for _, note in told) == 4

    # pictures are those of a pool by itself, and what they depend on is told apart
    shared = views.Task(first).scenes.pixels(torch.arange(48), torch.device("cpu"))
    assert rendered == [6, 3]
    pool._kept.clear()
    assert torch.equal(views.Task(first).scenes.pixels(torch.arange(48), torch.device("cpu")), shared)
    for edit in ("data.procedural.sector=40", "data.procedural.samples=2", "data.size=[8,8]", "data.procedural.scenes=5"):
        other = views.Task(small(edit)).scenes
        assert not other.prepared(torch.device("cpu"))
        other.prepare(torch.device("cpu"))
    assert rendered == [6, 3, 6, 6, 6, 6, 5]
    assert list(pool._kept) == ["train"]  # the last alone
    monkeypatch.setattr(pool, "MOST_KEPT", 5 * 8 * 3 * 16 * 16 - 1)
    pool._kept.clear()
    other = views.Task(small("data.procedural.scenes=5"))
    other.scenes.prepare(torch.device("cpu"))
    assert other.scenes.prepared(torch.device("cpu"))
    assert not pool._kept


def test_a_run_goes_on_with_another_number_of_workers(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train_run("views", small("train.checkpoint_every=1"), tmp_path, interrupting(3))
    assert train_run("views", small("data.workers=1"), tmp_path).result["steps"] == 6
    assert run_name("views", small()) == run_name("views", small("data.workers=2"))
    with pytest.raises(ValueError, match=r"data\.batch was 2, is 3"):
        train_run("views", small("data.batch=3"), tmp_path)


def test_the_nearest_view_of_an_input_is_itself():
    batch = first_scenes(views.Task(small(), training=False), 3)
    assert nearest_inputs(batch | {"target_c2w": batch["c2w"].flip(1)}).tolist() == [[2, 1, 0]] * 3


def test_psnr_and_ssim_know_equal_images_and_known_errors():
    true = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.8
    assert psnr(true, true).tolist() == [100, 100]
    assert psnr(true + 0.1, true).tolist() == pytest.approx([20, 20], abs=1e-3)
    assert ssim(true, true).tolist() == pytest.approx([1, 1])
    assert (ssim(1 - true, true) < 0.2).all()


def test_training_and_held_out_scenes_are_told_apart():
    one = views.Task(small()).fingerprint()
    assert one["train"] != one["held_out"]
    assert views.Task(small()).fingerprint() == one
    assert views.Task(small("data.procedural.sector=40")).fingerprint() != one
    with pytest.raises(ValueError, match="training=False"):
        views.Task(small(), training=False).batches(None)


def test_the_perceptual_loss_needs_its_package_and_counts_from_its_step(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ImportError, match=r"loss\.perceptual above 0 needs the packages 'lpips'"):
        views.Task(small("loss.perceptual=0.5"))

    class Lpips(nn.Module):
        def __init__(self, net, verbose):
            super().__init__()

        def forward(self, predicted, true, normalize):
            assert normalize
            return (predicted - true).abs().amax((1, 2, 3))

    stand_in = ModuleType("lpips")
    stand_in.LPIPS = Lpips
    monkeypatch.setitem(sys.modules, "lpips", stand_in)
    plain, task = views.Task(small()), views.Task(small("loss.perceptual=0.5", "loss.perceptual_from=2"))
    model = task.build()
    batches = task.batches(None)
    for number in range(4):
        batch, _ = next(batches)
        more = (task.loss(model, batch) - plain.loss(model, batch)).item()
        assert (more > 0.05) == (number >= 2)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (views.Config, {"seed": -1}, "seed must be at least 0; got -1"),
        (LossConfig, {"perceptual": -1}, r"loss\.perceptual must be at least 0"),
        (ProceduralConfig, {"sector": 400}, r"data\.procedural\.sector must be above 0 and at most 360"),
        (ProceduralConfig, {"views": 1}, r"data\.procedural\.views must be at least 2"),
    ],
)
def test_settings_that_do_not_fit_are_refused(kind, fields, message):
    with pytest.raises(ValueError, match=message):
        kind(**fields)


def test_a_run_is_drawn_and_its_model_reads_back(tmp_path):
    config = small()
    train_run("views", config, tmp_path)
    name, opened = open_run(tmp_path)
    assert name == "views"
    task = open_task_module(name).Task(opened, training=False)
    model = load_model(tmp_path, task)
    written = write_pictures(model, task, tmp_path / "pictures", scenes=2, frames=5)
    assert {path.name for path in written} >= {"sheet.png", "turntable.gif"}
    with Image.open(tmp_path / "pictures" / "turntable.gif") as moving:
        assert moving.n_frames == 5
        assert moving.size == (2 * 128 + 4, 128)
    with Image.open(tmp_path / "pictures" / "sheet.png") as page:
        assert page.size == (6 * 132 + 4, 18 + 2 * 146)
    # what was saved is the same model, and knows the scenes of the other
    saved = LactNvs.from_pretrained(tmp_path / "model")
    batch = first_scenes(task, 1)
    inputs = task.held_out.pixels(batch["image"], torch.device("cpu"))
    with torch.no_grad():
        scene = model.reconstruct(inputs, batch["c2w"], batch["fxfycxcy"])
        cameras = batch["target_c2w"], batch["target_fxfycxcy"]
        assert torch.equal(saved.render(scene, *cameras), model.render(scene, *cameras))


def test_a_turntable_shows_what_the_model_renders():
    task = views.Task(small(), training=False)
    frames = turntable(task.build().eval(), task, first_scenes(task, 2), 3)
    assert len(frames) == 3
    with pytest.raises(ValueError, match="scenes must be an int of at least 1"):
        write_pictures(task.build(), task, None, scenes=0)


def test_a_saved_model_reads_back_with_its_inner_loop(tmp_path):
    torch.manual_seed(0)
    model = LactNvs(LactNvsConfig(dim=16, layers=2, patch_size=4, head_dim=8, fast_head_dim=16))
    model.inner = model.inner.replace(update="last", normalize=False)
    model.save_pretrained(tmp_path)
    back = LactNvs.from_pretrained(tmp_path)
    assert back.inner == model.inner
    assert not back.training
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in back.state_dict().items())
    model.mixers[1].inner = systems.lact_nvs()
    with pytest.raises(ValueError, match="must have one inner loop in all layers to be saved"):
        model.save_pretrained(tmp_path)


def test_folders_that_hold_no_such_model_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"folder must be one that LactNvs\.save_pretrained wrote"):
        LactNvs.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match=r"folder must be one that LactNvs\.save_pretrained wrote"):
        LactNvs.from_pretrained(tmp_path)
