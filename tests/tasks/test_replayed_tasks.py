"""Every task's steps as they are replayed, on the CPU: the same losses as eager steps, bit for bit."""

import json

import pytest
import torch
from image_files import class_folders, idx_folder

from kvbind.models.lact_nvs import LactNvs
from kvbind.tasks import images, language, views
from kvbind.train import graphs, train
from kvbind.train.config import read_config
from kvbind.train.metrics import read_metrics
from tape import capture

LANGUAGE = [
    "model.fields.hidden_size=32", "model.fields.num_hidden_layers=1", "model.fields.num_attn_heads=2",
    "model.fields.window_size=16", "model.inner.chunk=16", "data.length=64", "data.batch=2", "data.evaluation_samples=4",
]  # fmt: skip
IMAGES = [
    "model.fields.embed_dim=16", "model.fields.depth=2", "model.fields.num_heads=2", "model.fields.patch_size=4",
    "data.batch=8", "data.evaluation_batch=10", "model.fields.drop_path_rate=0.2", "augment.erasing=0.5",
    "augment.mixup=0.5", "augment.cutmix=0.5", "train.ema=0.9",
]  # fmt: skip
COLOUR = [
    "data.channels=3", "data.mean=[0.5,0.5,0.5]", "data.std=[0.25,0.25,0.25]", "augment.crop=resized", "augment.shift=0",
]  # fmt: skip
VIEWS = [
    "model.fields.dim=32", "model.fields.head_dim=16", "model.fields.fast_head_dim=32", "model.fields.layers=1",
    "data.size=[16,16]", "data.procedural.scenes=6", "data.procedural.views=8", "data.inputs=3", "data.targets=2",
    "data.batch=2", "data.evaluation_scenes=3",
]  # fmt: skip
COUNTS = {"train": {"red": 9, "blue": 8, "green": 8}, "val": {"red": 3, "blue": 4, "green": 4}}


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def captured(monkeypatch):
    """How often each shape's work was captured, or would be on a GPU."""
    found, plain = [], graphs.Replays._capture

    def capture(self, shape):
        found.append(shape)
        return plain(self, shape)

    monkeypatch.setattr(graphs.Replays, "_capture", capture)
    return found


def opened(kind, folder, *edits):
    common = ["train.device=cpu", "train.steps=8", "train.warmup=2", "train.evaluate_every=3", *edits]
    if kind == "text":
        (folder / "book.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
        common += [f"data.source={folder / 'book.txt'}"]
    if kind == "packed":
        # batches of some eight documents, fewer or more
        texts = [f"{i:03} to be or not to be, that is the question: whether"[: 9 + i * i % 23] for i in range(400)]
        (folder / "books.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        common += [f"data.source={folder / 'books.jsonl'}", "data.separate=true", "data.window=4"]
    if kind in ("text", "packed"):
        return language.Task(read_config(language.Config, language.PRESETS, "tiny", [*LANGUAGE, *common]))
    if kind == "views":
        return views.Task(views.resolve(read_config(views.Config, views.PRESETS, "tiny", [*VIEWS, *common])))
    source = idx_folder(folder / "idx") if kind == "digits" else class_folders(folder / "colours", COUNTS)
    common += [f"data.source={source}", *(() if kind == "digits" else COLOUR)]
    return images.Task(images.resolve(read_config(images.Config, images.PRESETS, "digits", [*IMAGES, *common])))


def trained(kind, folder, *edits):
    folder.mkdir()
    task = opened(kind, folder, *edits)
    train(task.build(), task, task.config.train, folder / "run")
    timed = {"seconds", "data_wait", f"{task.unit}_per_second"}
    return [{name: x for name, x in row.items() if name not in timed} for row in read_metrics(folder / "run")]


@pytest.mark.parametrize(("accumulate", "shapes"), [(1, 1), (2, 2)])
@pytest.mark.parametrize("kind", ["text", "digits", "colours", "views"])
def test_replayed_steps_of_a_task_are_the_eager_ones_bit_for_bit(kind, accumulate, shapes, captured, tmp_path):
    edits = [f"train.accumulate={accumulate}"]
    eager = trained(kind, tmp_path / "a", "train.graphs=off", *edits)
    assert not captured
    assert trained(kind, tmp_path / "b", "train.graphs=on", *edits) == eager
    assert len(captured) == shapes


@pytest.mark.parametrize("kind", ["text", "packed", "digits", "views"])
def test_what_a_tasks_step_does_is_the_same_for_every_batch(kind, monkeypatch, tmp_path):
    eager = trained(kind, tmp_path / "a", "train.graphs=off")
    monkeypatch.setattr(graphs.Replays, "_capture", capture)
    monkeypatch.setattr(LactNvs, "_looks_at_values", lambda self, x: False)  # as in training on a GPU
    written = trained(kind, tmp_path / "b", "train.graphs=on")
    losses = [[row["loss"] for row in rows if "loss" in row] for rows in (eager, written)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert len(set(losses[0])) == 8


RUNGS = {
    "rung0": [],
    "rung2": ["model.inner.normalize=false", "model.inner.update=last"],
    "rung6": [
        "model.inner.normalize=false", "model.inner.update=last", "model.inner.momentum=false",
        "model.inner.orthogonalize=null", "model.inner.network=Linear", "model.inner.token_lr=false",
    ],
    "retention": ["model.inner.normalize=false", "model.inner.update=last", "model.inner.retention=true"],
}  # fmt: skip


@pytest.mark.parametrize("edits", RUNGS.values(), ids=RUNGS)
def test_packed_documents_are_replayed_by_their_capacity(edits, captured, tmp_path, caplog):
    edits = [*edits, "train.steps=14"]
    eager = trained("packed", tmp_path / "a", "train.graphs=off", *edits)
    assert trained("packed", tmp_path / "b", "train.graphs=on", *edits) == eager
    assert {len(shape.batch["batch"]["boundaries"]) - 1 for shape in captured} == {8, 16}
    assert not [x for x in caplog.records if "CUDA graphs" in x.getMessage()]


def test_packed_documents_of_an_inner_loop_that_the_host_must_cut_are_not_captured_and_that_is_said_once(
    captured, tmp_path, caplog
):
    edits = [*RUNGS["rung6"], "model.inner.chunk=1", "train.steps=4"]
    eager = trained("packed", tmp_path / "a", "train.graphs=off", *edits)
    assert trained("packed", tmp_path / "b", "train.graphs=on", *edits) == eager
    assert not captured
    (said,) = [x.getMessage() for x in caplog.records if "CUDA graphs" in x.getMessage()]
    assert "packed documents are read by the host, as the inner loop has chunks of 1 tokens" in said


@pytest.mark.parametrize("edits", RUNGS.values(), ids=RUNGS)
def test_a_prepared_batch_of_packed_documents_has_the_models_own_loss(edits, tmp_path):
    task = opened("packed", tmp_path, *edits)
    model, batches = task.build().double(), task.batches(None)
    for _ in range(3):
        batch, _ = next(batches)
        plain = model(**batch, use_cache=False).loss
        expected = torch.autograd.grad(plain, list(model.parameters()))
        found = task.loss(model, task.prepare(batch, torch.device("cpu")))
        assert found.item() == pytest.approx(plain.item(), rel=1e-12)
        for x, y in zip(torch.autograd.grad(found, list(model.parameters())), expected, strict=True):
            assert (x - y).norm() <= 1e-6 * (1e-6 + y.norm())


@pytest.mark.parametrize("kind", ["digits", "colours", "views"])
def test_a_prepared_batch_has_the_loss_of_the_batch_and_no_number_of_its_own(kind, tmp_path):
    task = opened(kind, tmp_path)
    model, batches = task.build().eval(), task.batches(None)
    shapes = set()
    for _ in range(3):
        batch, _ = next(batches)
        ready = task.prepare(batch, torch.device("cpu"))
        assert torch.equal(task.loss(model, ready), task.loss(model, batch))
        shapes.add(graphs.shape_of(ready))
    assert len(shapes) == 1
