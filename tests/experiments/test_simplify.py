"""Saved models of the three families: probed, given simpler inner loops, fine-tuned; and how much of training that saves."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbind.experiments.request import Request
from kvbind.experiments.saved_models import probe as probing
from kvbind.experiments.saved_models import simplification
from kvbind.experiments.saved_models.saved_model import open_saved
from kvbind.experiments.saved_models.simplification_plan import plan
from kvbind.experiments.studies import simplify
from kvbind.experiments.studies.simplify import FineTuned
from kvbind.experiments.subjects import SUBJECTS
from kvbind.experiments.training.plans import UnfinishedError
from kvbind.experiments.training.run_folders import load_model, open_run
from kvbind.experiments.training.runs import InterruptedRunError, train_run
from kvbind.models.carry import carry_over, layers_of
from kvbind.models.lact import LactForCausalLM
from kvbind.models.lact_nvs import LactNvs
from kvbind.models.opening import open_exported
from kvbind.models.vittt import VitttForImageClassification
from kvbind.tasks import open_task_module
from kvbind.tasks.start import StartConfig, divergence
from kvbind.train.config import read_config, what_matters

LANGUAGE = [
    "model.fields.hidden_size=16", "model.fields.num_hidden_layers=1", "model.fields.num_attn_heads=2",
    "model.fields.num_lact_heads=2", "model.fields.window_size=8", "model.fields.intermediate_size=16",
    "model.inner.chunk=8", "data.source=book.txt", "data.length=32", "data.batch=2", "data.window=8",
    "data.evaluation_samples=4",
]  # fmt: skip
VIEWS = [
    "model.fields.dim=32", "model.fields.head_dim=16", "model.fields.fast_head_dim=16", "model.fields.layers=2",
    "data.size=[16,16]", "data.procedural.scenes=4", "data.procedural.views=6", "data.inputs=3", "data.targets=2",
    "data.batch=2", "data.evaluation_scenes=2",
]  # fmt: skip
IMAGES = [
    "model.fields.embed_dim=12", "model.fields.depth=1", "model.fields.num_heads=2", "data.batch=16", "data.held_out=0.02",
]  # fmt: skip
SMALL = {"language": ("tiny", LANGUAGE), "views": ("tiny", VIEWS), "images": ("digits", IMAGES)}
CLASSES = {"language": LactForCausalLM, "views": LactNvs, "images": VitttForImageClassification}
BRIEF = ["train.steps=3", "train.warmup=1", "train.device=cpu", "train.checkpoint_every=0"]


def configured(task, *edits):
    module = open_task_module(task)
    preset, small = SMALL[task]
    return module.resolve(read_config(module.Config, module.PRESETS, preset, [*small, *BRIEF, *edits]))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where there is a text and a trained model of each family."""
    folder = tmp_path_factory.mktemp("simplify")
    (folder / "book.txt").write_text("it was the best of times, it was the worst of times. " * 80)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for task in SMALL:
            train_run(task, configured(task), folder / task)
    return folder


@pytest.fixture(autouse=True)
def at_place(place, monkeypatch):
    monkeypatch.chdir(place)
    # speeds are measured, and no number of them is looked at
    monkeypatch.setattr(simplification, "SECONDS", 0.0)


def built(task, row=None, seed=1):
    """A model of a row, from a seed of its own, and the row's inner loop."""
    module, config = open_task_module(task), configured(task, f"seed={seed}")
    if row is not None:
        config.model.inner = module.rows(config)[row]
    return module.Task(module.resolve(config), training=False).build()


def outputs(task, model, opened):
    with torch.no_grad():
        return opened.evaluate(model.eval())


@pytest.mark.parametrize("task", SMALL)
def test_an_edit_that_changes_nothing_leaves_outputs_bit_for_bit(task, place):
    opened = open_task_module(task).Task(configured(task), training=False)
    old, new = load_model(place / task, opened), built(task)
    before = outputs(task, old, opened)
    assert outputs(task, new, opened) != before
    carried = carry_over(old, new)
    assert outputs(task, new, opened) == before
    assert not carried.dropped
    assert not carried.new
    assert sum(carried.kept.values()) == len(torch.cat([p.flatten() for p in old.parameters()]))
    assert all(torch.equal(x, y) for x, y in zip(old.state_dict().values(), new.state_dict().values(), strict=True))


@pytest.mark.parametrize("task", SMALL)
def test_every_weight_is_kept_dropped_or_new_and_kept_ones_are_equal(task, place):
    module, opened = open_task_module(task), open_task_module(task).Task(configured(task), training=False)
    old = load_model(place / task, opened)
    for row in module.rows(configured(task)):
        new, fresh = built(task, row), built(task, row)
        carried = carry_over(old, new)
        counts = [sum(x.values()) for x in (carried.kept, carried.dropped, carried.new)]
        assert counts[0] + counts[1] == sum(p.numel() for p in old.parameters())
        assert counts[0] + counts[2] == sum(p.numel() for p in new.parameters())
        # what is not the old model's is as it was drawn
        given, drawn = old.state_dict(), fresh.state_dict()
        for name, x in new.state_dict().items():
            if name in given and given[name].shape == x.shape and name.rpartition(".")[2] not in carried.new:
                assert torch.equal(x, given[name]), (row, name)
            elif "lr_" not in name:
                assert torch.equal(x, drawn[name]), (row, name)


@pytest.mark.parametrize("task", ["language", "views"])
def test_a_fast_matrix_keeps_its_own_learned_rates(task, place):
    opened = open_task_module(task).Task(configured(task), training=False)
    old, new = load_model(place / task, opened), built(task, "rung1")
    carry_over(old, new)
    layers = [next(m for m in model.modules() if hasattr(m, "rate_names")) for model in (old, new)]
    assert [len(layer.rate_names) for layer in layers] == [3, 1]
    x = torch.randn(2, 8, 16 if task == "language" else 32)
    rates = [layer.learning_rates(x)["out"] for layer in layers]
    # products of other widths are rounded otherwise on some processors
    torch.testing.assert_close(*rates)


def test_weights_of_other_models_are_not_carried(place):
    narrow = built("language")
    config = configured("language", "model.fields.hidden_size=32")
    wide = open_task_module("language").Task(config, training=False).build()
    with pytest.raises(ValueError, match=r"models must differ in their inner loops alone; .* is \[\d+, 16\] in one"):
        carry_over(narrow, wide)
    other = configured("language", "model.inner.system=delta_net", "model.inner.chunk=1")
    with pytest.raises(
        ValueError, match=r"must be one that runs in the model's own layers, 1 LactLayer; the new one takes 1 Fast"
    ):
        carry_over(narrow, open_task_module("language").Task(other, training=False).build())


@pytest.mark.parametrize(("task", "to", "targets"), [
    ("language", "rung2", "data"), ("language", "rung5", "outputs"), ("views", "rung2", "outputs"),
    ("images", "rung6", "data"),
])  # fmt: skip
def test_a_simplified_model_opens_like_any_other(task, to, targets, place, tmp_path):
    planned = plan(place / task, to, 4, targets=targets, out=tmp_path / "new")
    results = simplification.simplify(planned, Request(task=task, scale="own"))
    metric = SUBJECTS[task].metric.name
    run = json.loads((place / task / "result.json").read_text())
    assert results["before"][metric] == pytest.approx(run["held_out"][metric], rel=1e-6)
    points = results["courses"][metric]
    assert [step for step, _ in points] == [0, 1, 2, 3, 4]
    assert points[-1][1] == results["held_out"][metric]
    # the model in the folder is the one that the last point is of, whoever opens it
    name, config = open_run(tmp_path / "new")
    opened = open_task_module(name).Task(config, training=False)
    for model in (CLASSES[task].from_pretrained(tmp_path / "new" / "model"), load_model(tmp_path / "new", opened)):
        assert outputs(task, model, opened)[metric] == pytest.approx(points[-1][1], rel=1e-6)
    # and what step 0 saw is the old weights under the new inner loop
    edited = carried_by_hand(task, to, place)
    assert outputs(task, edited, opened)[metric] == pytest.approx(points[0][1], rel=1e-6)
    assert {"forward", "training"} == set(results["speeds"]["before"]) == set(results["speeds"]["after"])
    assert (tmp_path / "new" / "simplified.png").read_bytes().startswith(b"\x89PNG")
    assert "after the edit" in (tmp_path / "new" / "index.html").read_text()


def carried_by_hand(task, to, place):
    new = built(task, to, seed=0)
    carry_over(open_exported(place / task / "model"), new)
    return new


def test_an_interrupted_run_goes_on_exactly(place, tmp_path, monkeypatch):
    whole = simplification.simplify(plan(place / "language", "rung2", 4, out=tmp_path / "whole"), Request(scale="own"))
    straight = simplification.train_run

    def interrupted(task, config, folder, watch, **options):
        def counted(step, note):
            watch(step, note)
            if step == 3:  # behind the checkpoint at 2
                raise KeyboardInterrupt

        return straight(task, config, folder, counted, **options)

    monkeypatch.setattr(simplification, "train_run", interrupted)
    edits = ["train.checkpoint_every=2"]
    planned = plan(place / "language", "rung2", 4, out=tmp_path / "cut", overrides=edits)
    with pytest.raises((KeyboardInterrupt, InterruptedRunError)):
        simplification.simplify(planned, Request(scale="own"))
    monkeypatch.setattr(simplification, "train_run", straight)
    monkeypatch.setattr(simplification, "measured_speeds", None)  # what was measured is kept
    again = plan(place / "language", "rung2", 4, out=tmp_path / "cut", overrides=edits)
    assert simplification.simplify(again, Request(scale="own"))["courses"] == whole["courses"]


def test_targets_are_the_outputs_of_the_model_that_is_started_from(place):
    """Of a model that is unchanged there is nothing to learn, whatever the batch."""
    for task in SMALL:
        config = configured(task)
        config.start = StartConfig(str(place / task / "model"), targets="outputs").resolved()
        opened = open_task_module(task).Task(config)
        model = opened.build().eval()
        batch = next(iter(opened.batches(None)))[0]
        assert opened.loss(model, batch).item() == pytest.approx(0.0, abs=1e-6)
        with torch.no_grad():
            [p for p in model.parameters() if p.ndim > 1][-1].mul_(1.5)
        loss = opened.loss(model, batch)
        assert loss.item() > 1e-6
        loss.backward()
        assert not any(p.requires_grad for p in opened.start._original.parameters())


@settings(max_examples=25)
@given(rows=st.integers(1, 9), classes=st.integers(2, 5), size=st.integers(1, 10), seed=st.integers(0, 2**16))
def test_the_divergence_is_that_of_the_definition(rows, classes, size, seed):
    draw = torch.Generator().manual_seed(seed)
    logits, wanted = (torch.randn(rows, 2, classes, generator=draw, dtype=torch.float64) for _ in range(2))
    counted = torch.rand(rows, 2, generator=draw) < 0.5
    counted[0, 0] = True
    p, q = wanted.softmax(-1), logits.softmax(-1)
    each = (p * (p.log() - q.log())).sum(-1)
    assert float(divergence(logits, wanted, rows=size)) == pytest.approx(float(each.mean()), abs=1e-5)
    assert float(divergence(logits, wanted, counted, rows=size)) == pytest.approx(float(each[counted].mean()), abs=1e-5)


def test_a_start_is_told_apart_by_its_weights_and_leaves_other_runs_where_they_are(place, tmp_path):
    plain = what_matters(configured("language"))
    assert "start" not in plain
    config = configured("language")
    config.start = StartConfig(str(place / "language" / "model")).resolved()
    shutil.copytree(place / "language" / "model", tmp_path / "moved")
    moved = configured("language")
    moved.start = StartConfig(str(tmp_path / "moved")).resolved()
    assert what_matters(config) == what_matters(moved) != plain
    moved.start = StartConfig(str(place / "views" / "model"), weights=config.start.weights)
    with pytest.raises(
        ValueError, match=r"start\.model must be the model that the run began with, of hash \w{12}; .* holds"
    ):
        open_task_module("language").Task(moved)
    with pytest.raises(ValueError, match=r"start\.model must be the folder of a model"):
        StartConfig(str(tmp_path)).resolved()
    with pytest.raises(ValueError, match=r"start\.model must name the model whose outputs are the targets"):
        StartConfig(targets="outputs")


@pytest.mark.parametrize(("task", "to", "edits", "message"), [
    ("language", "rung0", [], r"to must be another inner loop than the model's own; 'rung0' is what it is already"),
    ("views", None, ["model.inner.update=all"], r"'model\.inner\.update=all' is what it is already"),
    ("language", None, [], r"to must say what the inner loop becomes \(--to rung2\)"),
    ("views", "rung4", [], r"to must be one of rung0, .* or a YAML file; got 'rung4'"),
    ("language", "rung22", [], r"did you mean 'rung2'"),
    ("language", "vittt", [], r"inner's visibility must be 'past' or 'token'"),
    ("language", "none.yaml", [], r"there is no 'none\.yaml'"),
    ("language", "rung2", ["train.steps=9"], r"overrides must not set train\.steps"),
    ("nowhere", "rung2", [], r"there is no 'nowhere'"),
    ("language", "rung2", ["model.fields.hidden_size=32"], r"data and edits must leave the model in .* as it is"),
])  # fmt: skip
def test_a_target_that_is_none_is_named(task, to, edits, message, tmp_path, place):
    def tried():
        planned = plan(Path(task), to, 2, out=tmp_path / "x", overrides=edits)
        simplification.simplify(planned, Request(scale="own"))

    with pytest.raises(ValueError, match=message):
        tried()


def test_a_model_alone_must_be_told_its_data(place, tmp_path):
    for task, data, edits in (("language", "book.txt", ["data.length=32", "data.evaluation_samples=4"]),
                              ("views", "procedural", ["data.size=[16,16]", "data.evaluation_scenes=2"]),
                              ("images", "digits", [])):  # fmt: skip
        folder = shutil.copytree(place / task / "model", tmp_path / task)
        with pytest.raises(ValueError, match=r"data must name what to take the model on \(--data\)"):
            open_saved(folder)
        saved = open_saved(folder, data, edits)
        assert saved.task == task
        module, own = open_task_module(task), open_run(place / task)[1]
        assert saved.config.model.inner == module.resolve(own).model.inner
        saved.open_task(training=False)
    other = open_saved(tmp_path / "images", "digits", ["model.fields.mlp_ratio=3"])
    with pytest.raises(ValueError, match=r"must leave the model in .* as it is; its vittt\.blocks\.0\.mlp"):
        other.open_task(training=False)


def test_models_of_other_kinds_are_named(place, tmp_path):
    train_run("views", configured("views", "model.fields.fast_weights=false"), tmp_path / "plain")
    with pytest.raises(ValueError, match=r"model must have fast weights; .* holds one without"):
        open_saved(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"there is no 'nowhere'"):
        open_saved(Path("nowhere"))
    (tmp_path / "views").mkdir()
    (tmp_path / "views" / "config.yaml").write_text((place / "views" / "config.yaml").read_text())
    with pytest.raises(ValueError, match=r"model must be of a finished run"):
        open_saved(tmp_path / "views")


def test_a_vocabulary_may_be_larger_than_the_tokenizers(place):
    config = configured("language", "model.fields.vocab_size=300")
    assert open_task_module("language").Task(config, training=False).build().config.vocab_size == 300
    assert open_task_module("language").resolve(config).model.fields["vocab_size"] == 300
    with pytest.raises(ValueError, match=r"vocab_size of at least 256, as data\.tokenizer has; got 3"):
        open_task_module("language").Task(configured("language", "model.fields.vocab_size=3"), training=False).build()


@pytest.mark.parametrize("task", SMALL)
def test_probes_leave_the_model_as_it_was_and_find_what_evaluation_finds(task, place, tmp_path, monkeypatch):
    monkeypatch.setattr("kvbind.experiments.figures.figure2.tsne", lambda points: points[:, :2])
    saved = open_saved(place / task)
    before = {name: x.clone() for name, x in saved.model.state_dict().items()}
    loops = [layer.inner for layer in layers_of(saved.model).values()]
    results = probing.probe(saved, Request(task=task, scale="own", out=tmp_path / "probe"), place / task, most=2)
    assert all(torch.equal(x, before[name]) for name, x in saved.model.state_dict().items())
    assert loops == [layer.inner for layer in layers_of(saved.model).values()]
    run = json.loads((place / task / "result.json").read_text())
    metric = SUBJECTS[task].metric.name
    assert results["steps"][0]["metric"] == pytest.approx(run["held_out"][metric], rel=1e-5)
    assert [x["steps"] for x in results["steps"]] == [1, 2]
    assert [x["name"] for x in results["edited"]] == ["gradient ascent", "key for query"]
    # the probe is the model of that row with these weights
    opened = saved.open_task(training=False)
    for found, row in zip(results["edited"], ("ascent", "key_for_query"), strict=True):
        model = built(task, row)
        carry_over(saved.model, model)
        assert found["metric"] == pytest.approx(outputs(task, model, opened)[metric], rel=1e-4)
    one, other = results["steps"][0]["inner_loss"], results["edited"][0]["inner_loss"]
    assert results["steps"][1]["inner_loss"] < one < other
    assert len(results["layers"]) == 2 * len(loops)
    assert all(0 <= x["near"] <= 1 and 0 <= x["probe"] <= 1 for x in results["layers"])
    assert json.loads((tmp_path / "probe" / "results.json").read_text())["versions"]


def test_the_experiment_says_which_share_of_the_steps_is_enough(tmp_path, monkeypatch):
    monkeypatch.setattr(simplify, "TARGETS", {"language": ("rung2", "rung6")})
    monkeypatch.setattr(simplify, "SHARES", (1 / 4, 1 / 2))
    edits = [edit for edit in LANGUAGE if not edit.startswith("data.source")]
    asked = {"data": "book.txt", "workers": 1, "out": tmp_path / "report",
             "overrides": [*edits, "train.steps=4", "train.warmup=1", "train.device=cpu"]}  # fmt: skip
    with pytest.raises(UnfinishedError):
        simplify.reproduce(**asked, minutes=0.0)
    results = simplify.reproduce(**asked)
    assert list(results["courses"]) == ["rung2", "rung6"]
    assert results["steps"] == {"rung0": 4, "rung2": 4, "rung6": 4}
    for (one,) in results["courses"].values():
        assert [share for share, _ in one["shares"]] == [1 / 4, 1 / 2]
    # everything is there: nothing is trained again
    assert simplify.reproduce(**asked, minutes=0.0)["courses"] == results["courses"]


def test_verdicts_on_shares_follow_their_rule():
    metric = SUBJECTS["language"].metric

    def course(*values, scratch=10.0):
        return FineTuned(0, 9.0, scratch, 12.0, dict(zip(simplify.SHARES, values, strict=False)))

    quick, slow, never, short = course(11, 10, 9, 9), course(11, 11, 11, 10), course(11, 11, 11, 11), course(11, 11)
    assert [x.needed(metric) for x in (quick, slow, never, short)] == [1 / 8, 1 / 2, None, None]
    assert simplify.judge("rung2", [quick], metric).holds is True
    assert simplify.judge("rung2", [quick, slow], metric).holds is None
    assert simplify.judge("rung2", [never], metric).holds is False
    assert simplify.judge("rung2", [short], metric).holds is None
    assert simplify.judge("rung2", [quick, never], metric).holds is None
    higher = SUBJECTS["views"].metric
    assert course(9, 9, 10, 11).needed(higher) == 1 / 4
