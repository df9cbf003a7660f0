"""`kvbind reproduce all`, on a toy task whose runs take milliseconds, and figure 4, which only it plans beside others."""

import json
import math
import threading

import pytest
import toy_task
from rich.console import Console
from test_tables import TOY

from kvbind import tasks
from kvbind.experiments import reproduce_all
from kvbind.experiments.figures import figure4
from kvbind.experiments.figures.figure4 import ClockedRun, judge
from kvbind.experiments.reproduce_all import Report, ordered, train_everything, wanted, write_beside
from kvbind.experiments.request import Measure, Request
from kvbind.experiments.subjects import SUBJECTS
from kvbind.experiments.tables import table2
from kvbind.experiments.training.plans import UnfinishedError, plan_runs

SMALL = [
    "model.fields.hidden_size=16", "model.fields.num_hidden_layers=1", "model.fields.num_attn_heads=2",
    "model.fields.num_lact_heads=1", "model.fields.window_size=8", "model.fields.intermediate_size=16",
    "model.inner.chunk=8", "data.length=32", "data.batch=2", "data.window=8", "data.evaluation_samples=2",
    "train.steps=12", "train.warmup=1", "train.device=cpu",
]  # fmt: skip


@pytest.fixture(autouse=True)
def toy(tmp_path, monkeypatch):
    preset = tmp_path / "toy.yaml"
    preset.write_text("train: {steps: 9, warmup: 1, learning_rate: 0.1, device: cpu}\n")
    monkeypatch.setitem(toy_task.PRESETS, "toy", preset)
    monkeypatch.setitem(tasks.TASKS, "toy", "toy_task")
    monkeypatch.setitem(SUBJECTS, "toy", TOY)
    monkeypatch.setattr(reproduce_all, "EXPERIMENTS", {"table1": "", "table2": ""})
    # the page on all reports, which looks into untrained models for seconds, is tested with kvbind report
    monkeypatch.setattr(reproduce_all, "make_report", lambda folders, out, say: f"{out} on {len(folders)} reports")
    monkeypatch.chdir(tmp_path)


def run(**options):
    console = Console(record=True, width=100, force_terminal=False)
    results = reproduce_all.reproduce(**{"task": "toy", "workers": 1, "console": console} | options)
    return results, " ".join(console.export_text().split())


def test_runs_are_trained_once_and_every_report_is_written(tmp_path):
    results, shown = run(seeds=2, out=tmp_path / "all")
    assert [(x["experiment"], x["task"]) for x in results["reports"]] == [("table1", "toy"), ("table2", "toy")]
    assert len(list((tmp_path / "all" / "trained").glob("*/result.json"))) == 2 * len(toy_task.ROWS)
    for one in results["reports"]:
        written = json.loads((tmp_path / "all" / f"{one['experiment']}-toy" / "results.json").read_text())
        assert one["verdicts"] == written["verdicts"]
        assert len(written["verdicts"]) >= 2
    assert json.loads((tmp_path / "all" / "all.json").read_text()) == json.loads(json.dumps(results))
    assert results["unfinished"] == {}
    assert "12 training runs" in shown
    assert "report.html on 2 reports" in shown
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    train_everything(["toy"], Request(seeds=2, workers=1, trained=tmp_path / "all" / "trained"))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")} == before


def test_without_time_nothing_is_trained_and_that_is_said(tmp_path):
    results, shown = run(minutes=0.0)
    assert results["reports"] == []
    assert set(results["unfinished"]) == {"table1, toy", "table2, toy"}
    assert "unfinished: toy rung0 seed 0" in shown
    assert not list(tmp_path.rglob("result.json"))


def test_rows_that_there_was_no_time_for_are_said_and_a_later_call_finishes_them(tmp_path, monkeypatch):
    whole, begun = toy_task.Task.build, []

    def build(self):
        begun.append(self.config.model.inner["slope"])
        if begun.count(3.0):  # rung 6 and what comes behind it
            raise ValueError("out of luck")
        return whole(self)

    monkeypatch.setattr(toy_task.Task, "build", build)
    monkeypatch.setattr(reproduce_all, "EXPERIMENTS", {"table2": ""})
    _, shown = run(out=tmp_path / "all")
    assert "toy rung6 seed 0 failed: out of luck" in shown
    table = json.loads((tmp_path / "all" / "table2-toy" / "results.json").read_text())
    rows = {row["name"]: row for row in table["rows"]}
    assert rows["rung3"]["unfinished_seeds"] == []
    assert rows["rung6"]["unfinished_seeds"] == [0]
    assert rows["rung6"]["applies"]
    assert rows["rung6"]["score"] is None
    assert not rows["rung2"]["applies"]
    assert "Unfinished, so that figures are of fewer seeds or missing: rung6 (seed 0), ascent (seed 0)" in shown
    assert (tmp_path / "all" / "table2-toy" / "ladder.svg").is_file()
    monkeypatch.setattr(toy_task.Task, "build", whole)
    train_everything(["toy"], Request(workers=1, trained=tmp_path / "all" / "trained"))
    assert len(list(tmp_path.rglob("result.json"))) == len(toy_task.ROWS)


def test_the_first_seed_of_every_row_comes_first_and_then_the_telling_rows(tmp_path):
    (tmp_path / "book.txt").write_text("it was the best of times, it was the worst of times. " * 60)
    request = Request(seeds=3, workers=1, data={"language": "book.txt"}, overrides=["train.device=cpu"])
    plans = [plan_runs("table2", table2.TABLE.rows, Request(**{**vars(request), "task": task, "overrides": edits}))
             for task, edits in (("language", SMALL), ("toy", ()))]  # fmt: skip
    titles = [job.title for _, job in ordered(plans)]
    assert len(titles) == 3 * (11 + 6)
    assert {title.rpartition(" ")[2] for title in titles[:17]} == {"0"}
    assert set(titles[17:29]) == {f"language {row} seed {seed}" for row in reproduce_all.TELLING for seed in (1, 2)}
    assert {title.rpartition(" ")[2] for title in titles[29:40]} == {"1"}


def test_every_experiment_has_its_tasks(monkeypatch):
    names = {"table1": "", "table2": "", "theorems": "", "figure1": "", "figure2": "", "figure4": ""}
    monkeypatch.setattr(reproduce_all, "EXPERIMENTS", names)
    every = list(wanted(["language", "images", "views"], Request()))
    assert every == [
        ("table1", "language"), ("table1", "images"), ("table1", "views"),
        ("table2", "language"), ("table2", "images"), ("table2", "views"),
        ("theorems", "language"), ("figure1", "language"), ("figure1", "views"), ("figure2", "language"),
        ("figure4", "language"),
    ]  # fmt: skip
    assert [name for name, _ in wanted(["language"], Request(measure=Measure()))] == ["table2", "figure4"]


def test_quick_reports_are_written_first_and_the_list_after_each(tmp_path, monkeypatch):
    names = ("table1", "table2", "theorems", "figure1", "figure2", "figure3", "figure4", "explorer")
    monkeypatch.setattr(reproduce_all, "EXPERIMENTS", dict.fromkeys(names, ""))
    monkeypatch.setattr(reproduce_all, "train_everything", lambda tasks, request: None)
    seen = []

    def write_here(one, request):
        listed = json.loads((tmp_path / "all.json").read_text())
        seen.append((one.title, [x["experiment"] for x in listed["reports"]], dict(listed["unfinished"])))
        if one.experiment == "figure2":
            return "no scikit-learn"
        if one.experiment == "figure1":
            raise KeyboardInterrupt
        one.folder.mkdir(parents=True)
        (one.folder / "results.json").write_text(json.dumps({"task": one.request.task}))
        return None

    monkeypatch.setattr(reproduce_all, "write_here", write_here)
    with pytest.raises(KeyboardInterrupt):
        reproduce_all.reproduce(task="language", out=tmp_path, workers=1)
    titles = [title.partition(",")[0] for title, _, _ in seen]
    assert titles == ["table2", "table1", "figure3", "figure4", "explorer", "figure2", "theorems", "figure1"]
    listed, unfinished = seen[-1][1:]
    assert listed == ["table1", "table2", "theorems", "figure3", "figure4", "explorer"]
    assert unfinished == {"figure1, language": "not written yet", "figure2, language": "no scikit-learn"}


def test_reports_that_are_written_at_once_are_listed_as_they_come(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce_all, "visible_gpus", lambda: ["4", "7"])
    listed, places = threading.Event(), {}

    def write_beside(one, gpu):
        places[one.title] = gpu
        if one.experiment == "table1":
            listed.wait()
        return f"{one.title}: done", None

    monkeypatch.setattr(reproduce_all, "write_beside", write_beside)
    monkeypatch.setattr(reproduce_all.os, "cpu_count", lambda: 64)
    request = Request(task="toy")
    reports = [Report(name, request, tmp_path) for name in ("table1", "table2")]
    found = reproduce_all.write_reports(reports, request)
    first, _ = next(found)
    listed.set()
    assert first.experiment == "table2"
    assert [one.experiment for one, _ in found] == ["table1"]
    assert places == {"table1, toy": "4", "table2, toy": "7"}


def test_reports_that_measure_share_the_time_there_is(tmp_path, monkeypatch):
    asked = []

    class Experiment:
        reproduce = staticmethod(lambda **options: asked.append(Request(**options)))

    monkeypatch.setattr(reproduce_all, "open_experiment", lambda name: Experiment)
    request = Request(task="toy", minutes=60.0, measure=Measure(), workers=1)
    for one, why in reproduce_all.write_reports([Report(name, request, tmp_path) for name in ("table1", "table2")], request):
        assert why is None
        assert asked[-1].deadline == pytest.approx(request.deadline, abs=1e-6)
        assert one.request is request


def test_a_report_of_its_own_process_says_why_it_could_not_be_written(tmp_path):
    one = Report("figure3", Request(task="images", workers=1, minutes=0.0), tmp_path)
    shown, why = write_beside(one, "0")
    assert "task must be" in why
    assert why in shown


def measured(tmp_path, **options):
    return figure4.reproduce(out=tmp_path / "figure4", overrides=SMALL, workers=1, **options)


def test_figure_4_trains_the_same_model_in_both_forms(tmp_path):
    (tmp_path / "book.txt").write_text("it was the best of times, it was the worst of times. " * 60)
    results = measured(tmp_path, data="book.txt")
    forms = results["forms"]
    assert list(forms) == list(results["runs"]) == ["recurrent", "parallel"]
    assert len(set(results["runs"].values())) == 2
    for form in forms.values():
        assert len(form["losses"]) == len(form["seconds"]) == 12
        assert all(seconds > 0 for seconds in form["seconds"])
    assert forms["recurrent"]["losses"] == pytest.approx(forms["parallel"]["losses"], abs=1e-4)
    assert results["verdicts"][0]["holds"]
    assert (tmp_path / "figure4" / "forms.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "figure4" / "forms.svg").read_text()
    with pytest.raises(UnfinishedError):
        measured(tmp_path / "other", data="book.txt", minutes=0.0)


def test_figure_4_measures_steps_on_generated_tokens_where_training_would_take_too_long(tmp_path):
    results = measured(tmp_path, measure=Measure(steps=8))
    assert [len(form["losses"]) for form in results["forms"].values()] == [8, 8]
    assert results["runs"] == {}
    assert results["verdicts"][0]["holds"]


def test_a_form_that_was_measured_is_not_measured_again_after_an_interruption(tmp_path, monkeypatch):
    whole, begun = figure4.measure_steps, []

    def measure_steps(task, config, device, count):
        begun.append(config.model.ttt_form)
        if len(begun) == 2:
            raise KeyboardInterrupt
        return whole(task, config, device, count)

    monkeypatch.setattr(figure4, "measure_steps", measure_steps)
    with pytest.raises(KeyboardInterrupt):
        measured(tmp_path, measure=Measure(steps=4))
    with pytest.raises(UnfinishedError):
        measured(tmp_path, measure=Measure(steps=4), minutes=0.0)
    results = measured(tmp_path, measure=Measure(steps=4))
    assert begun == ["recurrent", "parallel", "parallel"]
    assert [len(form["losses"]) for form in results["forms"].values()] == [4, 4]


def course(seconds, losses=(2.0,) * 40):
    return ClockedRun(losses, [seconds * (1 + 0.01 * (i % 5)) for i in range(len(losses))])


@pytest.mark.parametrize(("seconds", "holds"), [(0.5, True), (1.001, None), (2.0, False)])
def test_figure_4_judges_by_the_time_of_most_steps(seconds, holds):
    verdicts = judge({"recurrent": course(1.0), "parallel": course(seconds)})
    assert [verdict.holds for verdict in verdicts] == [True, holds]
    assert f"{1 / seconds:.2f} times" in verdicts[1].found


def test_figure_4_knows_other_runs_from_the_same():
    other = course(1.0, (2.0, 2.2) * 20)
    assert judge({"recurrent": course(1.0), "parallel": other})[0].holds is False
    skipped = course(1.0, (2.0, math.nan) * 20)
    assert judge({"recurrent": course(1.0), "parallel": skipped})[0].found.endswith("over 20 steps")


def test_the_clock_starts_behind_the_steps_that_compile():
    one = ClockedRun([2.0] * 40, [100.0] * 10 + [1.0] * 30)
    assert one.start == 10
    assert [clock for clock, _ in one.by_clock()] == [float(i) for i in range(1, 31)]


def test_runs_that_fail_are_tried_again_with_fewer_at_once(monkeypatch):
    asked = []

    def train_all(jobs, count, console, finished, *, deadline, failed):
        asked.append((len(jobs), count))
        if len(asked) == 1:
            failed(jobs[0], RuntimeError("too many"))
        return []

    monkeypatch.setattr(reproduce_all, "train_all", train_all)
    run(workers=4, minutes=0.0)
    assert asked == [(6, 4), (1, 2)]
