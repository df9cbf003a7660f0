"""What holds for the tables of every task, on a toy task whose rows do not all apply, and on the real ones."""

import csv
import json
import math
import re
import statistics

import matplotlib.image
import pytest
import toy_task
from rich.console import Console

from kvbind import tasks
from kvbind.experiments import subjects
from kvbind.experiments.subjects import NONE, ON_THE_WAY, SUBJECTS, Metric, Series, Subject, TaskScale
from kvbind.experiments.subjects.published import INNER_LOOP_SPEED, Published
from kvbind.experiments.subjects.rows import BASELINES, LABELS
from kvbind.experiments.subjects.throughput import TrainingSpeed
from kvbind.experiments.tables import reproduce as module
from kvbind.experiments.tables import table1, table2
from kvbind.experiments.training import runs
from kvbind.experiments.training.plans import configuration, with_inner
from kvbind.experiments.training.runs import Run
from kvbind.tasks import open_task_module
from kvbind.train.metrics import read_metrics

TOY = Subject(
    metric=Metric("score", "score", "score (dB)", "higher"),
    held_out="held-out points",
    paper={"rung0": Published(20.0), "rung1": Published(20.25), "rung2": Published(20.25, applies=False),
           "rung6": Published(19.0), "ascent": Published(20.5), "key_for_query": Published(19.5)},
    paper_model="9M",
    scales={"smoke": TaskScale("toy", ("train.steps=3",), "a moment")},
    speed=TrainingSpeed("points"),
    loss="squared error",
    others=(Metric("error", "error", "squared error", "lower", digits=3),),
    series=(Series("curve", "Curve", "Error by place", x="place", y="error", file="curve.png"),),
    baseline=("zero_score", "no line at all"),
    labels={"rung6": "nothing left"},
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def toy(tmp_path_factory):
    preset = tmp_path_factory.mktemp("presets") / "toy.yaml"
    preset.write_text("train: {steps: 9, warmup: 1, learning_rate: 0.1, device: cpu}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(toy_task.PRESETS, "toy", preset)
        patch.setitem(tasks.TASKS, "toy", "toy_task")
        patch.setitem(SUBJECTS, "toy", TOY)
        yield


def run(experiment, out, **options):
    console = Console(record=True, width=80, force_terminal=False)
    results = experiment.reproduce(**{"task": "toy", "out": out, "workers": 1, "console": console} | options)
    return results, console.export_text()


@pytest.fixture(scope="module")
def ladder(tmp_path_factory, toy):
    out = tmp_path_factory.mktemp("ladder")
    return out, *run(table2, out, seeds=3)


def rows_of(results):
    return {row["name"]: row for row in results["rows"]}


def test_rows_that_do_not_apply_are_there_and_say_so(ladder):
    out, results, shown = ladder
    rows = rows_of(results)
    assert tuple(rows) == table2.TABLE.rows
    assert {name for name, row in rows.items() if row["applies"]} == set(toy_task.ROWS)
    assert rows["rung2"]["runs"] == []
    assert rows["rung2"]["score"] is None
    assert rows["rung2"]["paper"] == {"score": 20.25, "in_brackets": True}
    line = next(line for line in shown.splitlines() if "no weight normalization" in line)
    assert re.search(rf"does not apply +{NONE} +{NONE} +\(20\.25\)", line)
    assert "the paper's figure is in brackets" in " ".join(shown.split())
    page = (out / "index.html").read_text()
    assert page.count("does not apply") == 5 + 5 + 1  # in the table, among the inner loops, in the text above
    with (out / "results.csv").open() as file:
        assert [row["score"] == "" for row in csv.DictReader(file)] == [not row["applies"] for row in rows.values()]


def test_changes_are_differences_from_the_full_system(ladder):
    _, results, shown = ladder
    rows, table = rows_of(results), shown[shown.index("Table 2, toy, scale smoke: score") :].splitlines()
    lines = {name: next(line for line in table if TOY.labels.get(name, LABELS[name]) in line) for name in rows}
    assert re.search(rf" {NONE} +20\.00 +{NONE}", lines["rung0"])
    for name in ("rung1", "rung3", "rung6", "ascent", "key_for_query"):
        assert f" {rows[name]['score'] - rows['rung0']['score']:+.2f} " in lines[name]
    assert "+0.50" in lines["ascent"]
    assert "no orthogonalization" not in shown  # worded by the task


def test_means_come_with_the_standard_error_over_seeds(ladder):
    _, results, shown = ladder
    row = rows_of(results)["rung3"]
    scores = [run["held_out"]["score"] for run in row["runs"]]
    assert len(set(scores)) == 3
    assert row["score"] == pytest.approx(statistics.fmean(scores))
    assert row["score_std"] == pytest.approx(statistics.stdev(scores))
    assert row["score_standard_error"] == pytest.approx(statistics.stdev(scores) / math.sqrt(3))
    assert f"{row['score']:.2f} ± {row['score_standard_error']:.2f}" in shown
    assert "3 seeds (mean ± standard error)" in " ".join(shown.split())


def test_training_throughput_is_of_the_median_step_of_each_of_the_rows_runs(ladder):
    place, results, _ = ladder
    for row in results["rows"]:
        if row["applies"]:
            assert sum(run["points"] for run in row["runs"]) == 3 * 3 * 8
            steps = [read_metrics(place / run["folder"]) for run in row["runs"]]
            rates = [[x["points_per_second"] for x in one if "loss" in x] for one in steps]
            assert row["training_points_per_second"] == pytest.approx(statistics.fmean(map(statistics.median, rates)))


def test_the_speed_of_a_run_does_not_count_its_first_steps(tmp_path):
    run = Run(tmp_path, {"points": 12, "training_seconds": 6.0}, reused=True)
    assert run.speed("points") == 2
    rates = [*[0.1] * 10, *[6.0] * 4, *[8.0] * 26]
    lines = [json.dumps({"step": i, "points_per_second": x}) for i, x in enumerate(rates, start=1)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert run.speed("points") == 8


def test_a_terminal_of_80_columns_is_wide_enough(ladder):
    _, results, shown = ladder
    tables = shown[shown.index("Table 2, toy, scale smoke: score") :]
    assert max(map(len, tables.splitlines())) <= 80
    for label in (TOY.labels.get(name, LABELS[name]) for name in table2.TABLE.rows):
        assert label in tables
    assert results["command"]


def test_what_a_report_says_of_itself(ladder):
    _, _, shown = ladder
    text = " ".join(shown.split())
    assert "2 parameters, 24 training points per row, 5 held-out points, 3 seeds" in text
    assert "; no line at all has 3.00." in text
    assert "Change is of score (dB) against the full system; higher is better." in text


def test_every_picture_is_drawn_and_in_the_page(ladder):
    out, _, _ = ladder
    names = {path.name for path in out.glob("*.png")}
    assert names == {"table.png", "ladder.png", "throughput.png", "loss.png", "curve.png"}
    for name in names:
        picture = matplotlib.image.imread(out / name)
        assert picture.shape[0] > 200
        assert picture[..., :3].std() > 0.02
    # two charts each of quality, training and curve; of throughput one, as the paper has none
    page = (out / "index.html").read_text()
    assert page.count('<svg class="chart"') == 3 * 2 + 1
    assert "<img" not in page


def test_inner_loops_are_told_by_what_differs(ladder):
    page = (ladder[0] / "index.html").read_text()
    assert "rung0: the same\nrung1: slope: 1.0\nrung2: does not apply\nrung3: slope: 2.0" in page


def test_table_1_takes_its_rows_from_the_runs_of_table_2(ladder, monkeypatch):
    out, results, _ = ladder
    monkeypatch.setattr(runs, "train", None)
    first, shown = run(table1, out, seeds=3)
    assert [row["name"] for row in first["rows"]] == ["rung0", "ascent", "key_for_query"]
    ladder_rows = rows_of(results)
    for row in first["rows"]:
        assert row["score"] == ladder_rows[row["name"]]["score"]
        assert not any("per_second" in key for key in row)
    assert first["throughput"] is None
    assert shown.count("finished earlier") == 9
    assert {path.name for path in out.glob("*.png")} >= {"rows.png", "loss.png"}


def test_throughput_is_said_to_be_of_the_machines_that_trained(tmp_path):
    run(table2, tmp_path)
    for number, path in enumerate(sorted(tmp_path.glob("trained/*/result.json"))):
        result = json.loads(path.read_text())
        result["machine"]["device"] = ("Abacus", "Slide rule")[number % 2]
        path.write_text(json.dumps(result))
    _, shown = run(table2, tmp_path)
    assert "on Abacus and Slide rule." in " ".join(shown.split())


def test_all_tasks_stand_side_by_side_and_keep_their_own_reports(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SUBJECTS", {"toy": TOY})
    results, shown = run(table1, tmp_path, task="all")
    assert list(results) == ["toy"]
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(results))
    page = (tmp_path / "index.html").read_text()
    assert (tmp_path / re.search(r'href="([^"]+)"', page)[1]).samefile(tmp_path / "toy" / "index.html")
    for row in results["toy"]["rows"]:
        assert f"{row['score']:.2f}" in page
    assert "20.50" in page
    assert "All tasks side by side" in shown
    with pytest.raises(ValueError, match=r"data must be None or name a task"):
        run(table1, tmp_path, task="all", data="elsewhere")


def test_other_data_are_another_run(ladder):
    out, results, _ = ladder
    changed, _ = run(table1, out, data="elsewhere")
    assert changed["data"] == {"train": "elsewhere"}
    assert changed["rows"][0]["runs"][0]["folder"] != rows_of(results)["rung0"]["runs"][0]["folder"]


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [
        (SUBJECTS["language"].metric, 16.80, "+2.3%"),
        (SUBJECTS["images"].metric, 16.80, "+0.37"),
        (SUBJECTS["views"].metric, 16.43, "+0.00"),
        (SUBJECTS["views"].metric, None, NONE),
    ],
)
def test_a_change_is_written_as_the_metric_has_it(metric, value, text):
    assert metric.changed(value, 16.43) == text


REAL = [name for name in SUBJECTS if name != "toy"]


@pytest.mark.parametrize("task", REAL)
def test_the_rows_of_a_task_are_those_the_paper_has_without_brackets(task):
    config = configuration(task, "smoke")
    rows = open_task_module(task).rows(config)
    applying = {name for name, published in SUBJECTS[task].paper.items() if published.applies}
    assert set(rows) == applying
    assert set(SUBJECTS[task].paper) == set(table2.TABLE.rows) - set(BASELINES)
    assert len({json.dumps(with_inner(task, config, inner).model.inner, sort_keys=True) for inner in rows.values()}) == len(
        rows
    )
    assert with_inner(task, config, rows["rung0"]) == open_task_module(task).resolve(config)


@pytest.mark.parametrize("task", REAL)
@pytest.mark.parametrize("scale", ["smoke", "small", "large", "paper"])
def test_every_scale_is_a_preset_that_reads(task, scale):
    assert list(SUBJECTS[task].scales) == ["smoke", "small", "large", "paper"]
    config = configuration(task, scale, 3)
    assert config.seed == 3
    longer = {"train.steps=180", "train.warmup=18", "epochs=100", "warmup_epochs=2"}
    assert set(subjects.SUBJECTS[task].scales[scale].overrides) <= {*longer, ON_THE_WAY}


def test_published_numbers_are_the_papers():
    # arXiv 2602.21204, tables 1 and 2
    assert [str(x) for x in SUBJECTS["language"].paper.values()] == [
        "16.43", "15.93", "16.31", "16.23", "16.12", "15.97", "16.80", "16.19", "16.18",
    ]  # fmt: skip
    assert [str(x) for x in SUBJECTS["views"].paper.values()] == [
        "25.94", "25.97", "25.93", "25.71", "(25.70)", "(25.70)", "25.73", "25.85", "25.95",
    ]  # fmt: skip
    assert [str(x) for x in SUBJECTS["images"].paper.values()] == [
        "79.34", "79.63", "(79.63)", "79.39", "(79.39)", "(79.39)", "79.54", "79.61", "79.18",
    ]  # fmt: skip
    assert list(INNER_LOOP_SPEED) == list(table2.TABLE.rows)[:7]


TINY = {
    "images": ["model.fields.depth=1", "model.fields.embed_dim=12", "model.fields.num_heads=2"],
    "views": ["data.procedural.scenes=2", "data.procedural.views=8", "data.evaluation_scenes=1", "data.batch=1"],
}


@pytest.mark.parametrize("task", TINY)
def test_table_1_of_the_other_tasks_comes_out_whole(task, tmp_path):
    if task == "images":
        pytest.importorskip("sklearn")
    results, shown = run(
        table1, tmp_path, task=task, overrides=["train.steps=1", "train.warmup=1", "train.device=cpu", *TINY[task]]
    )
    subject = SUBJECTS[task]
    for row in results["rows"]:
        assert math.isfinite(row[subject.metric.name])
        assert f"{row[subject.metric.name]:.2f}" in shown
        assert all(math.isfinite(row[other.name]) for other in subject.others)
    assert f"held-out {subject.speed.unit}" in shown
