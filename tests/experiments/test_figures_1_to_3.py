import builtins
import json
import math
import shutil
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from kvbind import inner_loss, systems
from kvbind.experiments.figures import figure1, figure2, figure3
from kvbind.experiments.figures.figure1 import AtSteps, loss_after
from kvbind.experiments.figures.figure2 import Numbers, energy_distance, measure
from kvbind.experiments.figures.figure3 import Along
from kvbind.experiments.layer_calls import seen_calls
from kvbind.experiments.subjects import SUBJECTS
from kvbind.experiments.tables import table1
from kvbind.experiments.training.plans import UnfinishedError
from kvbind.layers.lact import layer as lact
from kvbind.layers.layout import Layout

SMALL = [
    "model.fields.hidden_size=16", "model.fields.num_hidden_layers=2", "model.fields.num_attn_heads=2",
    "model.fields.num_lact_heads=2", "model.fields.window_size=8", "model.fields.intermediate_size=16",
    "model.inner.chunk=8",
    "data.length=32", "data.batch=2", "data.window=8", "data.evaluation_samples=4", "train.steps=3", "train.warmup=1",
    "train.device=cpu",
]  # fmt: skip

VIEWS = [
    "model.fields.dim=32", "model.fields.head_dim=16", "model.fields.fast_head_dim=32", "model.fields.layers=2",
    "data.size=[16,16]", "data.procedural.scenes=6", "data.procedural.views=8", "data.inputs=3", "data.targets=2",
    "data.batch=2", "data.evaluation_scenes=3", "train.device=cpu", "train.steps=2", "train.warmup=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures")
    (folder / "book.txt").write_text("it was the best of times, it was the worst of times. " * 80)
    return folder


@pytest.fixture(autouse=True)
def at_place(place, monkeypatch):
    monkeypatch.chdir(place)


def small(figure, **options):
    return figure.reproduce(**{"data": "book.txt", "overrides": SMALL, "workers": 1} | options)


@pytest.fixture(scope="module")
def third(place):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        return small(figure3, seeds=2)


def check_report(folder, results, *pictures):
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(results))
    assert {"config", "seeds", "versions", "machine", "wall_seconds", "command", "verdicts"} <= set(results)
    page = (folder / "index.html").read_text()
    for verdict in results["verdicts"]:
        assert verdict["rule"].partition(";")[0] in page
    for name in pictures:
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (folder / f"{name}.svg").read_text()


def test_figure_3_averages_every_rows_losses_by_position_over_seeds(third, place):
    check_report(place / "runs/figure3-language-smoke", third, "positions")
    assert [row["name"] for row in third["rows"]] == list(figure3.TABLE.rows)
    for row in third["rows"]:
        runs = [json.loads((place / folder / "result.json").read_text()) for folder in third["runs"][row["name"]]]
        assert len(runs) == 2
        curves = [run["held_out"]["loss_by_position"] for run in runs]
        assert row["loss_by_position"][5] == [curves[0][5][0], pytest.approx((curves[0][5][1] + curves[1][5][1]) / 2)]
        assert row["overall"] == pytest.approx(sum(run["held_out"]["loss"] for run in runs) / 2)


def falling(late, overall):
    return Along([(float(i), 4.0 - (4.0 - late) * (i >= 6)) for i in range(8)], overall)


def test_figure_3_judges_by_its_rules():
    context, order = figure3.judge({"a": falling(2.0, 2.0), "b": falling(3.0, 2.5), "c": falling(3.5, 3.0)})
    assert context.holds
    assert order.holds
    context, order = figure3.judge({"a": falling(2.0, 2.0), "b": falling(3.0, 1.5), "c": falling(4.5, 3.0)})
    assert not context.holds
    assert "c, gains -0.500" in context.found
    assert not order.holds
    assert order.found.startswith("2 of 3")


def test_figure_3_does_not_decide_by_a_gain_within_the_scatter_of_positions():
    rough = Along([(float(i), 3.0 + (-1) ** i - 0.01 * (i >= 6)) for i in range(8)], 3.0)
    assert 0 < rough.gain < rough.gain_error
    assert [verdict.holds for verdict in figure3.judge({"a": falling(2.0, 2.0), "b": rough})] == [None, True]
    assert figure3.judge({"a": rough, "b": falling(5.0, 5.0)})[0].holds is False


def test_figure_3_reads_further_than_its_models_were_trained(third, place, monkeypatch):
    scales = SUBJECTS["language"].scales
    monkeypatch.setitem(scales, "smoke", replace(scales["smoke"], long=128))
    monkeypatch.setattr(figure3, "SAMPLES", 3)
    asked = {"seeds": 2, "out": place / "further", "trained": place / "runs/trained"}
    results = small(figure3, **asked)
    assert set(results["further"]) == set(figure3.FURTHER)
    for curve in results["further"].values():
        assert [at for at, _ in curve] == list(range(0, 128, 2))
        assert all(math.isfinite(loss) for _, loss in curve)
    claims = [verdict["claim"] for verdict in results["verdicts"] if "beyond the length of training" in verdict["claim"]]
    assert len(claims) == len(figure3.FURTHER)
    assert "trained at 32 tokens; lower by " in results["verdicts"][-1]["found"]
    check_report(place / "further", results, "positions", "further")
    monkeypatch.setattr(figure3, "evaluate", None)  # a second time nothing is evaluated
    assert small(figure3, **asked)["further"] == results["further"]


def test_figure_3_judges_what_is_beyond_the_length_of_training():
    def curve(late):
        return Along([(float(i), 3.0 + 0.01 * (-1) ** i - late * (i >= 8)) for i in range(16)], 3.0)

    verdicts = [figure3.judge_further("rung", curve(late), 8) for late in (0.5, -0.5, 0.0)]
    assert [verdict.holds for verdict in verdicts] == [True, False, None]
    assert verdicts[0].found.startswith("trained at 8 tokens; lower by 0.500 ± 0.00")


def test_figure_1_evaluates_the_shared_run_with_more_steps(third, place):
    before = {path: path.stat().st_mtime_ns for path in (place / "runs/trained").rglob("*.safetensors")}
    results = small(figure1)
    assert before
    assert {path: path.stat().st_mtime_ns for path in (place / "runs/trained").rglob("*.safetensors")} == before
    check_report(place / "runs/figure1-language-smoke", results, "steps")
    assert [x["steps"] for x in results["steps"]] == list(range(1, 9))
    run = json.loads((place / third["runs"]["rung0"][0] / "result.json").read_text())
    assert results["runs"]["rung0"] == third["runs"]["rung0"][:1]
    assert results["steps"][0]["metric"] == pytest.approx(run["held_out"]["perplexity"], rel=1e-5)
    assert len({x["metric"] for x in results["steps"]}) == 8
    assert results["by_seed"]["0"] == results["steps"]
    assert all(len(x["by_layer"]) == 2 and math.isfinite(x["inner_loss"]) for x in results["steps"])


def test_figure_1_evaluates_no_seed_twice(third, place, monkeypatch):
    whole, begun = figure1.evaluated, []

    def evaluated(*arguments):
        begun.append(arguments[2].seed)
        if len(begun) == 10:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(figure1, "evaluated", evaluated)
    with pytest.raises(KeyboardInterrupt):
        small(figure1, seeds=2, out=place / "interrupted", trained=place / "runs/trained")
    results = small(figure1, seeds=2, out=place / "interrupted", trained=place / "runs/trained")
    assert begun == [0] * 8 + [1] * 2 + [1] * 8
    assert list(results["by_seed"]) == ["0", "1"]
    means = [statistics.fmean(x["metric"] for x in own) for own in zip(*results["by_seed"].values(), strict=True)]
    assert [x["metric"] for x in results["steps"]] == pytest.approx(means)


def test_figure_1_takes_views_too(place):
    results = figure1.reproduce(task="views", overrides=VIEWS, workers=1)
    check_report(place / "runs/figure1-views-smoke", results, "steps")
    run = json.loads((place / results["runs"]["rung0"][0] / "result.json").read_text())
    assert results["metric"] == "psnr"
    assert results["steps"][0]["metric"] == pytest.approx(run["held_out"]["psnr"], rel=1e-5)
    assert results["steps"][7]["inner_loss"] != results["steps"][0]["inner_loss"]


@pytest.mark.parametrize(("task", "worse"), [("language", 1.0), ("views", -1.0)])
def test_figure_1_knows_which_way_is_worse(task, worse):
    metric = SUBJECTS[task].metric
    found = [AtSteps(steps, 10 + worse * steps, -float(steps), ()) for steps in range(1, 9)]
    assert [verdict.holds for verdict in figure1.judge([found], metric)] == [True, True]
    other = [*found[:3], AtSteps(4, 10 - worse, 0.0, ()), *found[4:]]
    assert [verdict.holds for verdict in figure1.judge([other], metric)] == [False, False]
    both = figure1.judge([found, other], metric)
    assert [verdict.holds for verdict in both] == [None, None]
    assert "1 of 2 seed(s)" in both[0].found


def layer_and_input():
    torch.manual_seed(0)
    layer = lact.LactLayer(16, 2, 2, systems.lact_llm(chunk=4), window_size=4)
    return layer, torch.randn(2, 10, 16)


def test_seen_calls_are_the_layers_own_and_change_nothing():
    layer, x = layer_and_input()
    expected = layer(x)[0]
    calls = []
    with seen_calls(layer, calls.append):
        assert torch.equal(layer(x)[0], expected)
    assert not layer._forward_pre_hooks
    (call,) = calls
    assert torch.equal(call.output(), layer.call(x).run()[0])
    gates = {name: call.options[name] for name in ("lr", "momentum")}
    expected_loss = inner_loss(call.spec, call.weights, call.k, call.v, **gates).mean()
    assert loss_after(call) == pytest.approx(expected_loss.item(), rel=1e-6)


def test_a_layer_that_goes_on_from_a_state_is_not_looked_at():
    layer, x = layer_and_input()
    _, state = layer(x, return_state=True)
    with seen_calls(layer, list), pytest.raises(ValueError, match="state must be None"):
        layer(x, state=state)
    assert not layer._forward_pre_hooks


def test_the_inner_loss_of_packed_sequences_is_that_of_each_by_itself():
    layer, x = layer_and_input()
    one, twice = [], []
    with torch.no_grad():
        with seen_calls(layer, one.append):
            layer(x[:1, :6])
        with seen_calls(layer, twice.append):
            layer(torch.cat([x[:1, :6]] * 2, dim=1), Layout.packed([0, 6, 12], 1, 12, x.device))
    assert twice[0].options["cu_seqlens"] == (0, 6, 12)
    assert loss_after(twice[0]) == pytest.approx(loss_after(one[0]), rel=1e-6)


def test_figure_2_measures_and_draws_every_layer(third, place):
    pytest.importorskip("sklearn")
    results = small(figure2)
    check_report(place / "runs/figure2-language-smoke", results, "sets")
    assert [(x["layer"], x["sets"]) for x in results["layers"]] == [(i, pair) for i in range(2) for pair in figure2.PAIRS]
    assert all(0 <= x["probe"] <= 1 and 0 <= x["near"] <= 1 and 0 <= x["energy"] <= 1 for x in results["layers"])
    assert results["runs"]["rung0"] == third["runs"]["rung0"][:1]
    assert [list(x["sets"]) for x in results["maps"]] == [["Q", "K"], ["O", "V"]] * 2
    assert all(len(points) == 128 for x in results["maps"] for points in x["sets"].values())


def clouds(shift, copies=1):
    random = np.random.default_rng(0)
    one, other = random.normal(size=(300, 4)), random.normal(size=(300, 4))
    one[:, 0] += shift
    return one, np.repeat(other[: 300 // copies], copies, axis=0)


def test_numbers_say_that_sets_of_one_kind_are():
    pytest.importorskip("sklearn")
    found = measure(*clouds(0.0))
    assert 0.4 < found.probe < 0.6
    assert found.energy < 2 * found.energy_of_halves
    assert 0.85 < found.near <= 1


def test_numbers_say_that_sets_lie_apart():
    pytest.importorskip("sklearn")
    found = measure(*clouds(20.0))
    assert found.probe == 1
    assert found.energy > 0.5
    assert found.near == 0


def test_keys_that_occur_twice_do_not_make_every_query_far():
    pytest.importorskip("sklearn")
    assert measure(*clouds(0.0, copies=3)).near > 0.85


def test_the_energy_distance_is_none_to_itself_and_knows_no_scale():
    one, other = clouds(1.0)
    assert energy_distance(one, one) == pytest.approx(0, abs=1e-12)
    assert energy_distance(one, other) == pytest.approx(energy_distance(other, one))
    assert energy_distance(7 * one, 7 * other) == pytest.approx(energy_distance(one, other))


def test_figure_2_judges_by_the_worst_layer():
    apart, mixed = Numbers(0.99, 0.5, 0.01, 0.1), Numbers(0.7, 0.1, 0.01, 0.8)
    every = {(layer, pair): apart for layer in range(2) for pair in figure2.PAIRS}
    assert all(verdict.holds for verdict in figure2.judge(every))
    every[1, "queries and keys"] = mixed
    assert [verdict.holds for verdict in figure2.judge(every)] == [False, False, True, True]


def test_figure_2_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **options):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        figure2.reproduce()


@pytest.mark.parametrize(("figure", "task"), [(figure1, "images"), (figure2, "views"), (figure3, "images")])
def test_tasks_that_a_figure_is_not_made_for_are_refused(figure, task):
    with pytest.raises(ValueError, match=f"task must be .*got '{task}'"):
        figure.reproduce(task=task)


@pytest.fixture
def brought(third, place, tmp_path):
    """A folder with the finished runs of another machine: their configurations, results and metrics, and no weights."""
    for run in (place / folder for folders in third["runs"].values() for folder in folders):
        home = tmp_path / run.name
        home.mkdir()
        for name in ("config.yaml", "result.json", "metrics.jsonl"):
            shutil.copy(run / name, home / name)
    return tmp_path


def test_tables_and_figure_3_are_written_from_numbers_alone(third, place, brought, tmp_path_factory, monkeypatch):
    before = sorted(brought.rglob("*"))
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))  # where there is no book.txt
    options = {"trained": brought, "seeds": 2, "minutes": 0.0}
    table = small(table1, out=place / "brought-table", **options)
    assert [row["name"] for row in table["rows"]] == list(table1.TABLE.rows)
    for row in table["rows"]:
        assert row["unfinished_seeds"] == []
        assert len(row["runs"]) == 2
    again = small(figure3, out=place / "brought-figure", **options)
    assert again["rows"] == third["rows"]
    assert sorted(brought.rglob("*")) == before
    with pytest.raises(ValueError, match=r"book\.txt"):
        small(figure3, **options | {"trained": place / "none"})


def test_figures_of_models_take_those_whose_weights_are_here(third, place, brought):
    with pytest.raises(UnfinishedError, match="weights of figure1's finished runs are not here"):
        small(figure1, trained=brought, seeds=2)
    second = Path(third["runs"]["rung0"][1])
    shutil.copytree(place / second / "checkpoints", brought / second.name / "checkpoints")
    console = Console(record=True, width=200, force_terminal=False)
    results = small(figure1, trained=brought, seeds=2, out=place / "brought-steps", console=console)
    assert list(results["by_seed"]) == ["1"]
    assert results["runs"]["rung0"] == [(brought / second.name).as_posix()]
    assert "Weights not here, and left out: rung0 (seed 0)." in results["lead"]
    assert "Weights not here, and left out: rung0 (seed 0)." in console.export_text()
