import itertools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from image_files import class_folders, idx_folder, parquet_folder
from transformers import AutoModelForImageClassification

from kvbind import InnerLoop, Linear, systems
from kvbind.models import vittt
from kvbind.tasks import images, open_task_module
from kvbind.tasks.images import PRESETS, ImagesConfig, ImagesTask, inner_loops, resolve, rows
from kvbind.tasks.images.augment import normalized
from kvbind.tasks.images.config import ImagesModelConfig
from kvbind.tasks.images.loading import Order, Reads, training_batches
from kvbind.tasks.images.sources import InMemory
from kvbind.train import latest_checkpoint, train
from kvbind.train.config import read_config, to_yaml
from kvbind.train.metrics import read_metrics

SMALL = [
    "model.fields.embed_dim=16", "model.fields.depth=2", "model.fields.num_heads=2", "model.fields.patch_size=4",
    "data.batch=8", "data.evaluation_batch=10", "train.device=cpu", "train.steps=6", "train.warmup=1",
]  # fmt: skip
COLOUR = [
    "data.channels=3", "data.mean=[0.5,0.5,0.5]", "data.std=[0.25,0.25,0.25]", "augment.crop=resized", "augment.shift=0",
    "augment.scale=[0.5,1.0]", "augment.flip=0.5",
]  # fmt: skip
COUNTS = {"train": {"red": 9, "blue": 8, "green": 8}, "val": {"red": 3, "blue": 4, "green": 4}}


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def idx(tmp_path):
    return idx_folder(tmp_path / "idx")


@pytest.fixture
def folders(tmp_path):
    return class_folders(tmp_path / "folders", COUNTS)


def small(source, *edits):
    return resolve(read_config(ImagesConfig, PRESETS, "digits", [*SMALL, f"data.source={source}", *edits]))


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_whole_configuration_that_reads_back_the_same(preset, tmp_path):
    elsewhere = {"fashion": ["data.images=60000"], "photos": ["data.source=digits"]}
    config = resolve(read_config(ImagesConfig, PRESETS, preset, elsewhere.get(preset, [])))
    (tmp_path / "saved.yaml").write_text(to_yaml(config))
    assert read_config(ImagesConfig, {}, str(tmp_path / "saved.yaml")) == config
    assert resolve(config) == config
    assert config.epochs == config.warmup_epochs == 0


def test_the_imagenet_preset_is_the_papers_setup():
    config = resolve(read_config(ImagesConfig, PRESETS, "imagenet"))
    batches = 1281167 // 512
    assert (config.train.steps, config.train.warmup) == (60 * batches, 4 * batches)
    fields, training, augment = config.model.fields, config.train, config.augment
    assert (fields["embed_dim"], fields["depth"], fields["num_heads"], fields["patch_size"]) == (768, 12, 12, 16)
    assert (fields["drop_path_rate"], training.weight_decay, training.clip) == (0.4, 0.05, 5.0)
    assert (training.learning_rate, config.data.batch, config.data.size) == (5e-4, 512, 224)
    assert (augment.crop, augment.randaugment, augment.mixup, augment.cutmix) == ("resized", 2, 0.8, 1.0)
    assert (augment.erasing, augment.smoothing, augment.flip) == (0.25, 0.1, 0.5)


def test_epochs_become_steps_of_whole_batches(idx):
    config = small(idx, "epochs=2.5", "train.steps=1000", "warmup_epochs=0.5", "train.warmup=100", "train.accumulate=2")
    assert (config.train.steps, config.train.warmup) == (10, 2)
    assert (config.epochs, config.warmup_epochs) == (0, 0)
    # 1.1 x 10 is a little more than 11 in floating point
    assert small(idx, "data.batch=6", "epochs=1.1", "train.steps=1000").train.steps == 11


def test_epochs_and_steps_together_are_refused(idx):
    with pytest.raises(ValueError, match=r"epochs=2 and train\.steps=6 both say how long; set epochs=0 to count steps"):
        small(idx, "epochs=2")
    assert small(idx, "epochs=0").train.steps == 6
    with pytest.raises(ValueError, match=r"config must count in steps"):
        ImagesTask(read_config(ImagesConfig, PRESETS, "imagenet"))


@pytest.mark.parametrize(
    ("file", "edits", "counted"),
    [
        ({"epochs": 30, "warmup_epochs": 2}, ["train.steps=300"], (0, 0, 300, 20)),
        ({"epochs": 30, "warmup_epochs": 2}, ["train.steps=4"], (0, 0, 4, 0)),
        ({"epochs": 30, "warmup_epochs": 2}, ["train.steps=300", "train.warmup=7"], (0, 0, 300, 7)),
        ({"epochs": 30, "warmup_epochs": 2}, ["train.warmup=7"], (30, 0, 1000, 7)),
        ({"epochs": 30}, ["train.steps=300"], (0, 0, 300, 100)),
        ({"epochs": 30, "warmup_epochs": 2}, ["epochs=3"], (3, 2, 1000, 100)),
        ({"train": {"steps": 40, "warmup": 5, "clip": 2.0}}, ["epochs=3", "warmup_epochs=1"], (3, 1, 1000, 100)),
        ({"train": {"steps": 40, "warmup": 5}}, ["epochs=3"], (3, 0, 1000, 5)),
    ],
)
def test_edits_of_how_long_replace_the_files_other_way_to_say_it(tmp_path, file, edits, counted):
    (tmp_path / "its.yaml").write_text(json.dumps(file))
    config = read_config(ImagesConfig, PRESETS, str(tmp_path / "its.yaml"), edits)
    assert (config.epochs, config.warmup_epochs, config.train.steps, config.train.warmup) == counted
    assert config.train.clip == file.get("train", {}).get("clip", 1.0)


def test_rows_are_the_papers():
    config = read_config(ImagesConfig, PRESETS, "digits")
    names = {
        "rung0": "full",
        "rung1": "rung1",
        "rung3": "rung3",
        "rung6": "rung6",
        "ascent": "ascent",
        "key_for_query": "key",
    }
    found = rows(config)
    assert list(found) == list(names)
    for name, released in names.items():
        loops = inner_loops(ImagesModelConfig(inner=found[name]))
        assert (loops["heads"], loops["conv"]) == vittt.INNER_LOOPS[released], name
    # one linear layer; the heads lose their clipping, the convolution keeps it
    assert inner_loops(ImagesModelConfig(inner=found["rung3"]))["heads"].network == Linear()
    last = inner_loops(ImagesModelConfig(inner=found["rung6"]))
    assert (last["heads"].clip, last["conv"].clip) == (False, True)


def test_rows_start_from_the_configured_inner_loops(idx):
    config = small(idx, "model.inner.heads.loss=squared", "model.inner.conv.loss=squared", "model.inner.heads.steps=2")
    for name, row in rows(config).items():
        loops = inner_loops(ImagesModelConfig(inner=row))
        assert (loops["heads"].loss, loops["heads"].steps, loops["conv"].loss) == ("squared", 2, "squared"), name


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (ImagesModelConfig(size="vittt_basee"), r"model\.size must be one of .*did you mean 'vittt_base'"),
        (ImagesModelConfig(fields={"dept": 3}), r"model\.fields' keys must be one of .*did you mean 'depth'"),
        (
            ImagesModelConfig("h_vittt_tiny", fields={"patch_size": 8}),
            r"must not hold 'patch_size' with model\.size='h_vittt_tiny'",
        ),
        (ImagesModelConfig(inner={"head": {}}), r"model\.inner's keys must be one of 'heads', 'conv'; got 'head'"),
        (ImagesModelConfig(inner={"heads": {"updat": "last"}}), "did you mean 'update'"),
    ],
)
def test_a_wrong_model_is_named(model, message):
    with pytest.raises((ValueError, TypeError), match=message):
        resolve(ImagesConfig(model=model))


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        (["data.size=9"], r"must be those of the images of .*, which are \[1, 8, 8\]; got 1 and 9"),
        (COLOUR, r"must be those of the images of .*, which are \[1, 8, 8\]; got 3 and 8"),
        (["augment.crop=resized", "augment.shift=0"], r"augment\.crop must be 'shift' or 'none'"),
        (["augment.randaugment=1"], r"augment\.randaugment 0 for images held in memory; got .*, randaugment=1"),
        (["data.images=63"], r"data\.images must be 0 or the number of training images, 64; got 63"),
        (["data.mean=[0.1,0.2]"], r"data\.mean must hold a number per channel, 1"),
        (["seed=-1"], r"seed must be at least 0; got -1"),
        (["data.channels=2"], r"data\.channels must be 1 or 3; got 2"),
    ],
)
def test_data_that_do_not_fit_are_refused(idx, edits, message):
    with pytest.raises(ValueError, match=message):
        ImagesTask(small(idx, *edits))


def test_a_batch_larger_than_the_images_is_refused(idx):
    with pytest.raises(ValueError, match=r"data\.batch must be at most the number of training images, 64; got 65"):
        next(ImagesTask(small(idx, "data.batch=65")).batches(None))


def test_every_epoch_sees_every_image_once_in_its_own_order():
    order = Order(20, 6, seed=3)
    batches = list(itertools.islice(order.rows(0), 7))
    assert [epoch for epoch, _ in batches] == [0, 0, 0, 1, 1, 1, 2]
    epochs = [[row for _, chosen in batches[i : i + 3] for row in chosen] for i in (0, 3)]
    assert all(len(set(epoch)) == 18 for epoch in epochs)
    assert epochs[0] != epochs[1]
    for start in range(7):
        assert list(itertools.islice(order.rows(start), 7 - start)) == batches[start:]
    assert next(Order(20, 6, seed=4).rows(0)) != batches[0]


@pytest.mark.parametrize("kind", ["folders", "parquet"])
def test_read_batches_are_the_same_whoever_reads_and_from_any_position(kind, folders, tmp_path):
    source = folders
    if kind == "parquet":
        source = parquet_folder(tmp_path / "tables", {"train": COUNTS["train"], "validation": COUNTS["val"]})
    task = ImagesTask(small(source, *COLOUR))
    alone = list(itertools.islice(task.batches(None), 5))
    assert alone[0][0]["images"].shape == (8, 3, 8, 8)
    assert not torch.equal(alone[0][0]["images"], alone[3][0]["images"])
    reads, order = task.sources["train"], Order(25, 8, 0)
    assert isinstance(reads, Reads)
    helped = list(itertools.islice(training_batches(reads, order, 2, alone[1][1]), 3))
    for (batch, position), (same, behind) in zip(alone[2:], helped, strict=True):
        assert torch.equal(batch["images"], same["images"])
        assert torch.equal(batch["labels"], same["labels"])
        assert (batch["seed"], position) == (same["seed"], behind)
    # what the image shows is what the label says: red, green or blue
    brightest = alone[0][0]["images"].float().mean((2, 3)).argmax(1)
    assert torch.equal(brightest, 2 - alone[0][0]["labels"])


def comparable(folder):
    drop = {"seconds", "images_per_second", "data_wait"}
    return [{name: x for name, x in row.items() if name not in drop} for row in read_metrics(folder)]


@pytest.mark.parametrize("stop", [2, 5])
@pytest.mark.parametrize("kind", ["memory", "files"])
def test_an_interrupted_run_goes_on_bit_for_bit(kind, stop, idx, folders, tmp_path):
    edits = ["model.fields.drop_path_rate=0.2", "train.ema=0.9", "train.checkpoint_every=2", "augment.erasing=0.5",
             "augment.mixup=0.5", "augment.cutmix=0.5"]  # fmt: skip
    config = small(idx, *edits) if kind == "memory" else small(folders, *COLOUR, *edits)

    class Interrupted(ImagesTask):
        left = stop

        def loss(self, model, batch):
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            return super().loss(model, batch)

    task = ImagesTask(config)
    whole = task.build()
    done = train(whole, task, config.train, tmp_path / "whole")
    assert done.units == 48
    broken = Interrupted(config)
    with pytest.raises(KeyboardInterrupt):
        train(broken.build(), broken, config.train, tmp_path / "parts")
    again = ImagesTask(config)
    torch.manual_seed(99)  # whatever another process starts with
    rest = again.build()
    train(rest, again, config.train, tmp_path / "parts")
    assert comparable(tmp_path / "parts") == comparable(tmp_path / "whole")
    for a, b in zip(whole.parameters(), rest.parameters(), strict=True):
        assert torch.equal(a, b)


LEARN = ["train.steps=60", "train.warmup=5", "train.learning_rate=1e-2", "model.fields.initializer_range=0.2"]


@pytest.mark.parametrize("edits", [[], ["train.precision=bfloat16"], ["train.activation_checkpointing=block"]])
def test_training_learns_the_classes(idx, tmp_path, edits):
    config = small(idx, *LEARN, *edits)
    task = ImagesTask(config)
    done = train(task.build(), task, config.train, tmp_path)
    assert done.held_out["top1"] > 95
    assert list(done.held_out) == ["top1", "loss", "images"]
    assert done.held_out["images"] == 24


def test_a_compiled_model_is_compiled_and_gives_the_same_loss(idx, monkeypatch):
    graphs, plain = [], torch.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: plain(*args, **{**kwargs, "backend": backend}))
    torch._dynamo.reset()
    losses = []
    for compiled in ("false", "true"):
        task = ImagesTask(small(idx, f"model.compile={compiled}"))
        losses.append(task.loss(task.build(), next(task.batches(None))[0]))
        assert bool(graphs) == (compiled == "true")
    torch.testing.assert_close(*losses)


def test_training_learns_from_files(folders, tmp_path):
    config = small(folders, *COLOUR, *LEARN, "train.steps=30")
    task = ImagesTask(config)
    assert train(task.build(), task, config.train, tmp_path).held_out["top1"] > 90


def test_a_hierarchical_model_trains_averages_and_reads_back(folders, tmp_path):
    edits = [*SMALL[-4:], *COLOUR, f"data.source={folders}", "data.size=16", "train.ema=0.5", "model.size=h_vittt_tiny",
             "model.fields={embed_dim: [8, 16], depth: [1, 1], num_heads: [2, 2], mlp_ratio: 2}"]  # fmt: skip
    path = tmp_path / "hierarchical.yaml"
    path.write_text("model: {}")
    config = resolve(read_config(ImagesConfig, {}, str(path), [*edits, "data.batch=8"]))
    assert "patch_size" not in config.model.fields
    task = ImagesTask(config)
    model = task.build()
    done = train(model, task, config.train, tmp_path / "run")
    task.save(model, tmp_path / "model")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        assert task.evaluate(loaded)["loss"] == pytest.approx(done.held_out["loss"], rel=1e-5)


@pytest.mark.parametrize("row", ["rung1", "rung3", "rung6", "ascent", "key_for_query"])
def test_every_row_trains(idx, tmp_path, row):
    config = small(idx)
    config.model.inner = rows(config)[row]
    task = ImagesTask(resolve(config))
    done = train(task.build(), task, config.train, tmp_path)
    assert (done.step, done.skipped) == (6, 0)


def test_the_evaluation_counts_what_the_model_gets_right(folders):
    task = ImagesTask(small(folders, *COLOUR), training=False)
    model = task.build().eval()
    held_out = task.splits["held_out"]
    batch = torch.stack([task.sources["held_out"][0, i][0] for i in range(11)]).float() / 255
    labels = torch.from_numpy(held_out.labels)
    with torch.no_grad():
        metrics = task.evaluate(model)
        logits = model((batch - 0.5) / 0.25).logits
    assert metrics["top1"] == pytest.approx(100 * float((logits.argmax(1) == labels).float().mean()))
    assert list(metrics) == ["top1", "loss", "images"]  # of three classes, the five likeliest are all
    assert metrics["loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)
    assert metrics["images"] == 11


def test_top5_is_of_the_five_likeliest():
    pytest.importorskip("sklearn")
    task = ImagesTask(resolve(read_config(ImagesConfig, PRESETS, "digits", SMALL)), training=False)

    class Ranks(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, x):
            logits = torch.arange(10.0, 0.0, -1).expand(len(x), 10)
            return type("Output", (), {"logits": logits})

    metrics = task.evaluate(Ranks())
    labels = task.splits["held_out"].labels
    assert metrics["top1"] == pytest.approx(100 * np.mean(labels == 0))
    assert metrics["top5"] == pytest.approx(100 * np.mean(labels < 5))


def test_images_in_memory_are_moved_once_and_looked_up_by_row(idx):
    task = ImagesTask(small(idx))
    (first, _), (second, _) = itertools.islice(task.batches(None), 2)
    cpu = torch.device("cpu")
    images, labels = task.pixels(first, "train", cpu)
    held = task.splits["train"]
    assert isinstance(held, InMemory)
    assert torch.equal(images, held.images[first["rows"]])
    assert torch.equal(labels, held.classes[first["rows"]])
    kept = task._resident["train", cpu][0]
    task.pixels(second, "train", cpu)
    assert task._resident["train", cpu][0] is kept
    assert task.size(first) == 8


def test_the_seed_decides_weights_order_and_augmentation(idx):
    def start(seed):
        task = ImagesTask(small(idx, f"seed={seed}"))
        batch, _ = next(task.batches(None))
        return next(task.build().parameters()), task.augment(
            *task.pixels(batch, "train", torch.device("cpu")), batch["seed"]
        )[0]

    (weight, image), (same_weight, same_image), (other_weight, other_image) = map(start, (1, 1, 2))
    assert torch.equal(weight, same_weight)
    assert torch.equal(image, same_image)
    assert not torch.equal(weight, other_weight)
    assert not torch.equal(image, other_image)


def test_the_trained_model_is_saved_as_transformers_loads_it(folders, tmp_path):
    task = ImagesTask(small(folders, *COLOUR, "model.inner.heads.update=last"))
    model = task.build().eval()
    task.save(model, tmp_path / "model")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "model").eval()
    image = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(loaded(image).logits, model(image).logits)
    assert loaded.config.id2label == {0: "blue", 1: "green", 2: "red"}
    assert loaded.vittt.inner == systems.vittt().replace(update="last")
    assert InnerLoop.from_dict(json.loads((tmp_path / "model" / "config.json").read_text())["inner"]).update == "last"


def test_evaluation_alone_reads_no_training_images(folders):
    task = ImagesTask(small(folders, *COLOUR), training=False)
    with pytest.raises(ValueError, match="training=False"):
        task.batches(None)
    assert task.fingerprint().keys() == {"held_out"}
    assert ImagesTask(small(folders, *COLOUR)).fingerprint().keys() == {"train", "held_out"}


def test_the_checkpoint_of_an_averaged_run_holds_what_was_evaluated(idx, tmp_path):
    config = small(idx, "train.ema=0.5")
    task = ImagesTask(config)
    done = train(task.build(), task, config.train, tmp_path)
    model = task.build()
    model.load_state_dict(latest_checkpoint(tmp_path)["model"])
    with torch.no_grad():
        assert task.evaluate(model.eval()) == done.held_out


def test_the_task_is_known_by_its_name():
    assert open_task_module("images") is images


def test_a_pipeline_sees_held_out_images_as_evaluation_does(folders, tmp_path):
    from PIL import Image
    from transformers import pipeline

    task = ImagesTask(small(folders, "data.size=8", *COLOUR, "data.kept=0.8"))
    model = task.build().eval()
    task.save(model, tmp_path / "model")
    processor = vittt.VitttImageProcessor.from_pretrained(tmp_path / "model")
    classify = pipeline("image-classification", model=str(tmp_path / "model"), image_processor=processor)
    assert set(classify.model.config.id2label.values()) == set(task.names)
    path = next((folders / "val").rglob("*.*"))
    with Image.open(path) as picture:
        pixels = classify.image_processor(picture, return_tensors="pt")["pixel_values"]
        seen = Reads.__getitem__(task.sources["held_out"], (0, 0))[0]
        assert pixels.shape[1:] == seen.shape
        found = {x["label"]: x["score"] for x in classify(picture)}
    scores = model(pixels).logits.softmax(-1)[0].tolist()
    assert found == pytest.approx(dict(zip(task.names, scores, strict=True)), abs=1e-5)
    every = [normalized(task.held_out_image(i)[0][None], [0.5] * 3, [0.25] * 3) for i in range(11)]
    assert any(torch.allclose(pixels, x, atol=1e-5) for x in every)
