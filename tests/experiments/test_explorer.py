import base64
import json
import math

import numpy as np
import pytest
import torch

from kvbind import linearize
from kvbind.experiments.inspection.examples import pictures
from kvbind.experiments.inspection.heads import HEADS, weights_of
from kvbind.experiments.layer_calls import seen_calls
from kvbind.experiments.report.page import find_parts
from kvbind.experiments.studies import explorer
from kvbind.experiments.training.run_folders import load_model, open_run
from kvbind.tasks import language

LANGUAGE = [
    "model.fields.hidden_size=16", "model.fields.num_hidden_layers=5", "model.fields.num_attn_heads=4",
    "model.fields.num_lact_heads=4", "model.fields.window_size=8", "model.fields.intermediate_size=16",
    "model.inner.chunk=8", "data.length=96", "data.batch=2", "data.window=8", "data.evaluation_samples=2", "train.steps=2",
    "train.warmup=1", "train.device=cpu",
]  # fmt: skip

IMAGES = ["model.fields.embed_dim=16", "model.fields.depth=2", "model.fields.num_heads=2", "model.fields.patch_size=2",
          "train.steps=2", "train.warmup=1", "train.device=cpu", "data.batch=16"]  # fmt: skip

VIEWS = [
    "model.fields.dim=32", "model.fields.head_dim=16", "model.fields.fast_head_dim=32", "model.fields.layers=2",
    "data.size=[16,16]", "data.procedural.scenes=6", "data.procedural.views=8", "data.inputs=3", "data.targets=2",
    "data.batch=2", "data.evaluation_scenes=3", "train.device=cpu", "train.steps=2", "train.warmup=1",
]  # fmt: skip


def prepared(folder, task, overrides, **options):
    results = explorer.reproduce(task=task, out=folder, overrides=overrides, workers=1, **options)
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(results))
    parts, models = find_parts([folder])
    assert parts == []
    assert len(models) == 1
    return results, models[0]


def matrix_of(look):
    codes = np.frombuffer(base64.b64decode(look["codes"]), dtype=np.int8).reshape(look["size"], look["size"])
    return weights_of(torch.from_numpy(codes.copy()), look["most"])


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "book.txt").write_text("it was the best of times, it was the worst of times. " * 80)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder, *prepared(folder / "out", "language", LANGUAGE, data="book.txt")


def test_every_row_of_the_ladder_is_there_with_what_it_came_to(text):
    _, results, model = text
    assert [row["name"] for row in model["rows"]] == [*(f"rung{i}" for i in range(7)), "ascent", "key_for_query"]
    assert [row["label"] for row in model["rows"]][::4] == ["0 the full system", "4 no per-token rate", "key for query"]
    assert all(row["found"].startswith("perplexity ") for row in model["rows"])
    assert model["rows"][0]["obstacle"].startswith("update='all'")
    assert model["rows"][6]["obstacle"] is None
    assert results["verdicts"] == []


def test_layers_are_the_first_and_the_last_and_heads_are_few(text):
    for row in text[2]["rows"]:
        assert [layer["name"] for layer in row["layers"]] == ["layer 0", "layer 4"]
        assert all(
            [look["name"] for look in layer["heads"]] == [f"head {i}" for i in range(HEADS)] for layer in row["layers"]
        )


def test_the_text_is_the_held_out_one_in_whole_chunks(text):
    tokens = text[2]["example"]["tokens"]
    assert len(tokens) == 8 * 8
    assert "".join(tokens) in "it was the best of times, it was the worst of times. " * 80


def test_a_matrix_is_that_of_the_trained_model(text):
    place, results, model = text
    run = place / results["runs"]["rung2"][0]
    _, config = open_run(run)
    task = language.Task(config, training=False)
    calls = []
    model_of_run = load_model(run, task)
    with torch.no_grad(), seen_calls(model_of_run, calls.append):
        model_of_run(input_ids=task.evaluation[0]["input_ids"][:1, :64], use_cache=False)
    call = calls[4]
    options = {name: call.options[name] for name in ("lr", "momentum") if name in call.options}
    whole = linearize(call.spec, call.weights, call.q, call.k, call.v, **options).matrix()[0]
    shown = model["rows"][2]["layers"][1]
    for head, look in enumerate(shown["heads"]):
        assert (matrix_of(look) - whole[head]).abs().max() <= 0.011 * whole[head].abs().max()
        assert len(look["before"]) == len(look["after"]) == 8
        assert all(math.isfinite(loss) for _, loss in look["steps"])


def test_images_show_heads_and_the_convolution(tmp_path):
    pytest.importorskip("sklearn")
    _, model = prepared(tmp_path, "images", IMAGES)
    assert [row["name"] for row in model["rows"]] == ["rung0", "rung1", "rung3", "rung6", "ascent", "key_for_query"]
    assert model["example"]["grid"] == [4, 4]
    assert [panel["caption"][:6] for panel in model["example"]["panels"]] == ["class "]
    for row in model["rows"]:
        assert len(row["layers"]) == 2
        for layer in row["layers"]:
            assert [look["name"] for look in layer["heads"]] == ["head 0", "head 1", "convolution"]
            assert {look["size"] for look in layer["heads"]} == {16}


def test_views_are_written_by_inputs_and_read_by_all(tmp_path):
    _, model = prepared(tmp_path, "views", VIEWS)
    example = model["example"]
    assert [panel["caption"] for panel in example["panels"]] == ["input 1", "input 2", "input 3", "target 1", "target 2"]
    cells = example["grid"][0] * example["grid"][1]
    for row in model["rows"]:
        for look in (look for layer in row["layers"] for look in layer["heads"]):
            matrix = matrix_of(look)
            assert look["size"] == 5 * cells
            assert matrix[:, : 3 * cells].abs().max() > 0
            assert not matrix[:, 3 * cells :].any()
            assert look["k_at"] == list(range(3 * cells))


def test_pictures_of_a_panel_are_pngs_of_their_pixels():
    import io

    from PIL import Image

    pixels = torch.randint(0, 256, (3, 6, 4), dtype=torch.uint8)
    example, _ = pictures([("a", pixels), ("b", pixels[:1])], (3, 2))
    for panel, own in zip(example["panels"], (pixels, pixels[:1]), strict=True):
        with Image.open(io.BytesIO(base64.b64decode(panel["source"].partition(",")[2]))) as picture:
            found = np.array(picture)
        assert np.array_equal(found.reshape(6, 4, -1), own.permute(1, 2, 0).numpy())
