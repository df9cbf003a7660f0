"""Gaps along training and size, views in chunks, and plans: from runs of a toy and of the smallest models."""

import json
import math
from dataclasses import replace

import pytest
import toy_task
from rich.console import Console
from test_figures_1_to_3 import SMALL, VIEWS
from test_tables import TOY

from kvbind import tasks
from kvbind.experiments import progress
from kvbind.experiments.request import Request
from kvbind.experiments.studies import chunks, gaps, sizes
from kvbind.experiments.subjects import FRACTIONS, ON_THE_WAY, SUBJECTS, TaskScale
from kvbind.experiments.tables import table2
from kvbind.experiments.training.plans import UnfinishedError, configuration, plan_runs, row_configs
from kvbind.experiments.training.runs import train_run
from kvbind.provenance import processor
from kvbind.train.metrics import read_metrics

STEPS = 32
TOY_GAPS = replace(TOY, scales={"smoke": TaskScale("toy", (f"train.steps={STEPS}", ON_THE_WAY), "a moment")})


@pytest.fixture(scope="module", autouse=True)
def toy(tmp_path_factory):
    preset = tmp_path_factory.mktemp("presets") / "toy.yaml"
    preset.write_text("train: {steps: 9, warmup: 1, learning_rate: 0.1, device: cpu}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(toy_task.PRESETS, "toy", preset)
        patch.setitem(tasks.TASKS, "toy", "toy_task")
        patch.setitem(SUBJECTS, "toy", TOY_GAPS)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory, toy):
    out = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gaps, "SUBJECTS", SUBJECTS)
        return out, gaps.reproduce(task="toy", out=out, workers=1, seeds=3)


def test_every_run_is_evaluated_on_its_way(made):
    out, results = made
    for folders in results["runs"].values():
        for folder in folders:
            rows = read_metrics(out / "trained" / folder.rpartition("/")[2])
            steps = [row["step"] for row in rows if "held_out/score" in row]
            assert steps == [0, *(round(fraction * STEPS) for fraction in FRACTIONS), STEPS]


def test_gaps_are_differences_at_the_same_step_and_seed(made):
    out, results = made
    assert [row["name"] for row in results["rows"]] == [name for name in toy_task.ROWS if name != "rung0"]

    def scores(row, seed):
        folder = out / "trained" / results["runs"][row][seed].rpartition("/")[2]
        return {x["step"]: x["held_out/score"] for x in read_metrics(folder) if "held_out/score" in x}

    for row in results["rows"]:
        assert [gap["fraction"] for gap in row["gaps"]] == [*FRACTIONS, 1.0]
        for gap in row["gaps"]:
            step = round(gap["fraction"] * STEPS)
            for seed in range(3):
                # a higher score is better, and a gap is how much worse a row is
                expected = scores("rung0", seed)[step] - scores(row["name"], seed)[step]
                assert gap["by_seed"][str(seed)] == pytest.approx(expected)
        assert row["trend"]["seeds"] == [0, 1, 2] or row["trend"]["seeds"] == (0, 1, 2)


def test_the_report_has_a_verdict_for_each_row_a_table_and_a_picture(made):
    out, results = made
    assert len(results["verdicts"]) == len(results["rows"])
    assert json.loads((out / "results.json").read_text())["verdicts"] == results["verdicts"]
    (table,) = results["tables"]
    assert table["header"] == ["", "1/16", "1/8", "1/4", "1/2", "1"]
    assert all(" ± " in cell for row in table["rows"] for cell in row[1:])
    assert (out / "gaps.png").is_file()
    assert "those of the whole schedule" in results["lead"]


def test_runs_without_evaluations_on_the_way_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(gaps, "SUBJECTS", SUBJECTS)
    results = gaps.reproduce(task="toy", out=tmp_path, workers=1, overrides=["train.evaluate_at=[]"])
    assert "Trained without evaluations on the way: rung0 seed 0, rung1 seed 0" in results["lead"]
    assert all(verdict["holds"] is None for verdict in results["verdicts"])


def test_evaluations_on_the_way_change_no_runs_name():
    names = {plan_runs("x", ["rung0"], Request(task="toy", overrides=edits)).jobs["rung0", 0].folder
             for edits in ([], ["train.evaluate_at=[]"], ["train.evaluate_at=[0.5]"])}  # fmt: skip
    assert len(names) == 1


def test_a_plan_says_what_is_left_by_the_time_of_runs_like_it(tmp_path, monkeypatch):
    asked = {"task": "toy", "out": tmp_path, "workers": 1, "seeds": 2}
    table2.reproduce(**asked, rows=("rung0", "rung1"))
    console = Console(record=True, width=120, force_terminal=False)
    found = progress.plan_experiment("table2", **asked, console=console)
    shown = console.export_text()
    left = {x["run"]: x for x in found["runs"]}
    assert [x["steps_done"] for name, x in left.items() if " rung0 " in name or " rung1 " in name] == [STEPS] * 4
    assert all(x["steps_done"] == 0 for name, x in left.items() if " rung3 " in name)
    # on a CPU, others are as slow as the slowest that was finished here
    finished = [json.loads(path.read_text()) for path in (tmp_path / "trained").glob("*/result.json")]
    steps = [progress.seconds_per_step(path.parent) for path in (tmp_path / "trained").glob("*/result.json")]
    for name, x in left.items():
        if x["steps_done"] == 0:
            assert x["basis"] == progress.OTHERS
            assert x["seconds"] == pytest.approx(STEPS * max(steps)), name
    assert all(x["machine"]["device"] == processor() for x in finished)
    assert " of training are left, one run after another. Starts" in shown
    assert "GPU" not in shown
    assert "H200" not in shown
    (tmp_path / "trained").joinpath(left["1/6 rung0 seed 1"]["folder"].rpartition("/")[2], "result.json").unlink()
    again = progress.plan_experiment("table2", **asked)
    steps = [progress.seconds_per_step(path.parent) for path in (tmp_path / "trained").glob("*/result.json")]
    not_begun = sum(x["steps_done"] == 0 for x in left.values())
    # its last checkpoint is behind its last step, but it is none of those that were finished
    assert again["seconds"] == pytest.approx(not_begun * STEPS * max(steps), abs=1e-6)
    for path in (tmp_path / "trained").glob("*/checkpoints"):
        path.rename(path.with_name("elsewhere"))
    again = {x["run"]: x for x in progress.plan_experiment("table2", **asked)["runs"]}
    own = again["1/6 rung0 seed 1"]
    assert own["steps_done"] == 0
    assert own["basis"] == progress.HERE
    assert 0 < own["seconds"] < 60


def test_without_a_gpu_no_time_is_known_until_a_run_of_the_scale_is_finished_on_this_processor(tmp_path):
    def planned(*edits):
        console = Console(record=True, width=200, force_terminal=False)
        found = progress.plan_experiment("table1", task="views", out=tmp_path, console=console, overrides=[*VIEWS, *edits])
        return found, console.export_text()

    found, shown = planned()
    assert {x["seconds"] for x in found["runs"]} == {None}
    assert "No time is known for this processor: nothing on the scale of these runs was finished on it." in shown
    assert "GPU" not in shown
    assert "H200" not in shown

    config = configuration("views", "smoke", overrides=[*VIEWS, "train.steps=3"])
    own = row_configs("views", config)["rung0"]
    folder = tmp_path / "trained" / "views-shorter"
    run = train_run("views", own, folder)
    found, shown = planned()
    left = {x["run"].split()[1]: x for x in found["runs"]}
    each = run.result["training_seconds"] / 3
    assert [left[row]["basis"] for row in ("rung0", "ascent")] == [progress.HERE, progress.OTHERS]
    assert all(x["seconds"] == pytest.approx(each * x["steps"], rel=1e-3) for x in left.values())
    assert " of training are left" in shown
    assert {x["seconds"] for x in planned("data.batch=1")[0]["runs"]} == {None}  # another scale

    result = json.loads((folder / "result.json").read_text())
    result["machine"]["device"] = "NVIDIA H200"
    (folder / "result.json").write_text(json.dumps(result))
    assert {x["seconds"] for x in planned()[0]["runs"]} == {None}


@pytest.mark.parametrize(
    ("known", "unknown", "gpu", "said"),
    [
        (40, 0, True, "40 s of one GPU are left, 0.1 pieces of ten minutes"),
        (40, 1, True, "; of 1 run(s) nothing is known. Starts"),
        (
            40,
            1,
            False,
            "40 s of training are left, one run after another; of 1 run(s) no time is known for this processor. ",
        ),
        (0, 2, False, "nothing on the scale of what is left of 2 run(s) was finished on it."),
        (0, 0, False, "0 s of training are left"),
    ],
)
def test_a_plans_sum_is_of_the_device_that_trains(known, unknown, gpu, said):
    assert said in progress.summary(known, unknown, 3, gpu)


def test_rows_that_are_not_asked_for_are_not_trained_and_reported_where_they_are_finished(tmp_path):
    asked = {"task": "toy", "out": tmp_path, "workers": 1}
    results = table2.reproduce(**asked, rows=("rung0", "rung6"))
    assert len(list((tmp_path / "trained").iterdir())) == 2
    rows = {row["name"]: row for row in results["rows"]}
    assert rows["rung6"]["runs"]
    assert rows["rung1"]["unfinished_seeds"] == [0]
    results = table2.reproduce(**asked, rows=("ascent",))
    assert [row["name"] for row in results["rows"] if row["runs"]] == ["rung0", "rung6", "ascent"]
    with pytest.raises(ValueError, match=r"rows must be .*got 'rung9'"):
        table2.reproduce(**asked, rows=("rung9",))


def test_a_plan_of_the_language_model_goes_by_measured_speeds_at_equal_flops(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "on_gpu", lambda job: True)
    (tmp_path / "book.txt").write_text("it was the best of times, it was the worst of times. " * 3000)
    request = Request(scale="small", data=str(tmp_path / "book.txt"), trained=tmp_path / "t",
                      overrides=["data.held_out_source=null"])  # fmt: skip
    found = progress.estimate(progress.rows_of(table2.planned_jobs(request)))
    seconds = {left.job.title.split()[1]: left.seconds for left in found}
    assert all(left.basis == progress.MEASURED for left in found)
    # 9.83 million tokens at 325k to 1.2M tokens/s, of a model that is somewhat larger than the one that was timed
    assert 1.0 < seconds["rung0"] / (400 * 3 * 8192 / progress.TOKENS["rung0"]) < 2.5
    assert 1.0 < seconds["rung6"] / (400 * 3 * 8192 / progress.TOKENS["rung6"]) < 2.5
    assert seconds["rung0"] > seconds["rung2"] > seconds["rung6"]
    assert seconds["softmax"] > seconds["window"]


def test_plans_are_refused_where_there_is_nothing_to_plan():
    with pytest.raises(ValueError, match="plan must be of an experiment on trained rows; theorems has none"):
        progress.plan_experiment("theorems")
    with pytest.raises(ValueError, match="task must be one task"):
        progress.plan_experiment("table2", task="all")


def test_the_kernel_comes_with_its_own_held_out_text(tmp_path, monkeypatch):
    from kvbind.experiments.training.plans import data_edits

    assert data_edits("language", "linux") == ['data.source="linux"', 'data.held_out_source="linux-others"']
    assert data_edits("language", "book.txt") == ['data.source="book.txt"']
    assert data_edits("views", None) == []
    config = configuration("language", "large")
    assert (config.data.source, config.data.held_out_source) == ("linux", "linux-others")
    assert config.data.length >= 8192
    assert config.train.steps * config.data.batch * config.data.length >= 60e6


@pytest.mark.parametrize("task", ["language", "images", "views"])
def test_large_is_at_least_six_times_small(task):
    small, large = (configuration(task, scale) for scale in ("small", "large"))
    amounts = [config.epochs if task == "images" else config.train.steps * config.data.batch for config in (small, large)]
    assert amounts[1] >= 6 * amounts[0]
    assert small.train.evaluate_at == large.train.evaluate_at == list(FRACTIONS)


def test_sizes_compares_rungs_with_the_full_system_of_their_size(tmp_path):
    (tmp_path / "book.txt").write_text("it was the best of times, it was the worst of times. " * 80)
    edits = [edit for edit in SMALL if "intermediate_size" not in edit]
    results = sizes.reproduce(
        out=tmp_path, workers=1, data=str(tmp_path / "book.txt"), overrides=[*edits, "train.steps=2", "train.evaluate_at=[]"]
    )
    assert set(results["sizes"]) == set(sizes.SIZES)
    assert all(len(folders) == 3 for folders in results["sizes"].values())
    for row in results["rows"]:
        assert len(row["gaps"]) == 3
        assert row["gaps"][0]["parameters"] < row["gaps"][1]["parameters"] < row["gaps"][2]["parameters"]
        assert row["trend"] is not None
    assert [verdict["claim"].endswith("closes with larger models") for verdict in results["verdicts"]] == [True, True]
    with pytest.raises(ValueError, match="task must be"):
        sizes.reproduce(task="views")


def test_views_in_chunks_are_trained_plain_and_elastic(tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNKS", (1, 2))
    monkeypatch.setattr(chunks, "INPUTS", "data.inputs=4")
    edits = [*(edit for edit in VIEWS if "inputs" not in edit), "train.evaluate_at=[]"]
    plan, jobs = chunks.planned(Request(task="views", overrides=edits, out=tmp_path))
    inners = {key[:2]: job.config.model.inner for key, job in jobs.items()}
    tokens = 4 * (16 // plan.config.model.fields["patch_size"]) ** 2
    assert {key: (inner["chunk"], inner.get("anchor") is None) for key, inner in inners.items()} == {
        ("plain", 1): (None, True), ("plain", 2): (tokens // 2, True),
        ("elastic", 1): (None, False), ("elastic", 2): (tokens // 2, False),
    }  # fmt: skip
    results = chunks.reproduce(task="views", overrides=edits, out=tmp_path, workers=1)
    assert len(results["cases"]) == 4
    assert len({case["by_seed"]["0"] for case in results["cases"]}) == 4
    assert all(math.isfinite(case["by_seed"]["0"]) for case in results["cases"])
    assert [verdict["holds"] for verdict in results["verdicts"]] == [None, None]
    with pytest.raises(UnfinishedError):
        chunks.reproduce(task="views", overrides=edits, out=tmp_path / "none", workers=1, minutes=0)


def test_chunks_are_judged_seed_by_seed():
    metric = SUBJECTS["views"].metric
    values = {("plain", 1): {0: 20.0, 1: 21.0}, ("plain", 8): {0: 19.0, 1: 20.1},
              ("elastic", 8): {0: 18.0, 1: 19.0}}  # fmt: skip
    costs, helps = chunks.judge(values, metric)
    assert costs.holds is True
    assert costs.found == "+0.95 ± 0.05, 2 seed(s)"
    assert helps.holds is False
    assert [verdict.holds for verdict in chunks.judge({("plain", 1): {0: 1.0}}, metric)] == [None, None]
