import csv
import json
import re

import pytest
from rich.console import Console

from kvbind import InnerLoop, explain, systems
from kvbind.experiments.report.table_contents import read_outcome, speed_charts
from kvbind.experiments.subjects import SUBJECTS, throughput
from kvbind.experiments.subjects.published import LANGUAGE
from kvbind.experiments.subjects.rows import BASELINES, LABELS
from kvbind.experiments.tables.table2 import TABLE, reproduce
from kvbind.experiments.training import runs
from kvbind.experiments.training.plans import configuration, with_inner
from kvbind.experiments.training.run_folders import open_run
from kvbind.experiments.training.runs import run_name, train_run
from kvbind.tasks import language
from kvbind.train import latest_checkpoint
from kvbind.train.metrics import read_metrics

NAMES = ["rung0", "rung1", "rung2", "rung3", "rung4", "rung5", "rung6", "ascent", "key_for_query"]
SMALL = [
    "model.fields.hidden_size=16", "model.fields.num_hidden_layers=1", "model.fields.num_attn_heads=2",
    "model.fields.num_lact_heads=1", "model.fields.window_size=8", "model.fields.intermediate_size=16",
    "model.inner.chunk=8",
    "data.length=32", "data.batch=2", "data.window=8", "data.evaluation_samples=2", "train.steps=4", "train.warmup=1",
    "train.checkpoint_every=1", "train.device=cpu",
]  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    whole = throughput.tokens_per_second
    monkeypatch.setattr(throughput, "tokens_per_second", lambda *args: whole(*args, rounds=1))


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text("it was the best of times, it was the worst of times. " * 60)
    return str(path)


def small(out, book, **options):
    return reproduce(out=out, data=book, overrides=SMALL, **{"workers": 1} | options)


@pytest.fixture(scope="module")
def made(book, tmp_path_factory):
    out = tmp_path_factory.mktemp("made")
    console = Console(record=True, width=200, force_terminal=False)
    with pytest.MonkeyPatch.context() as patch:
        whole = throughput.tokens_per_second
        patch.setattr(throughput, "tokens_per_second", lambda *args: whole(*args, rounds=1))
        results = small(out, book, console=console, seeds=2)
    return out, results, console.export_text()


def test_every_row_is_the_row_above_with_one_change():
    config = configuration("language", "smoke", 0, ["model.inner.chunk=32"])
    system = language.inner_loop(config.model)
    assert system.chunk == 32
    rows = {name: InnerLoop.from_dict(inner) for name, inner in language.rows(config).items()}
    assert tuple(rows) == tuple(NAMES)
    assert (*NAMES, *BASELINES) == TABLE.rows == tuple(LABELS)
    assert {name: rows[name] for name in NAMES[:7]} == systems.ladder(system)
    assert rows["ascent"] == system.replace(direction="ascent")
    assert rows["key_for_query"] == system.replace(query="key")


def test_rows_differ_in_their_inner_loop_alone():
    config = configuration("language", "smoke", 3)
    one, other = (with_inner("language", config, inner) for inner in list(language.rows(config).values())[:2])
    assert one.model.inner != other.model.inner
    other.model.inner = one.model.inner
    assert one == other
    assert config == configuration("language", "smoke", 3)


def test_all_rows_are_trained_evaluated_and_timed(made):
    _, results, _ = made
    assert [row["name"] for row in results["rows"]] == [*NAMES, *BASELINES]
    for row in results["rows"]:
        assert len(row["runs"]) == 2
        assert row["perplexity"] == pytest.approx(sum(run["held_out"]["perplexity"] for run in row["runs"]) / 2)
        assert row["perplexity_std"] > 0
        assert all(run["steps"] == 4 for run in row["runs"])
        assert row["perplexity"] != row["untrained_perplexity"]
        if row["name"] in BASELINES:
            assert row["inner"] == {"fast_weights": False}
            assert "recurrent_tokens_per_second" not in row
            continue
        assert row["recurrent_tokens_per_second"] > 0
        parallel = explain(InnerLoop.from_dict(row["inner"])).parallel
        assert (row["parallel_tokens_per_second"] is not None) == parallel
    assert len({row["perplexity"] for row in results["rows"]}) == len(NAMES) + len(BASELINES)


def test_all_rows_read_the_same_text_from_the_same_seed(made):
    _, results, _ = made
    assert len({json.dumps(run["data"]) for row in results["rows"] for run in row["runs"]}) == 1
    firsts = [run["untrained"]["perplexity"] for run in (results["rows"][0]["runs"][0], results["rows"][7]["runs"][0])]
    assert firsts[0] == pytest.approx(firsts[1], rel=0.05)


def test_the_papers_numbers_stand_beside_ours(made):
    _, results, shown = made
    assert {row["name"]: row["paper"]["perplexity"] for row in results["rows"]} == {
        **{name: LANGUAGE[name].value for name in NAMES}, **dict.fromkeys(BASELINES)
    }  # fmt: skip
    for number in ("16.43", "15.93", "16.31", "16.23", "16.12", "15.97", "16.80", "16.19", "16.18", "124.60", "4.30"):
        assert number in shown
    for row in results["rows"]:
        assert f"{row['perplexity']:.3f}" in shown


def test_results_are_written_with_where_they_come_from(made):
    out, results, _ = made
    written = json.loads((out / "results.json").read_text())
    assert written == json.loads(json.dumps(results))
    assert {"torch", "kvbind", "python"} <= set(written["versions"])
    assert {"device", "cores"} <= set(written["machine"])
    assert written["seeds"] == [0, 1]
    assert written["wall_seconds"] > 0
    assert written["config"]["train"]["steps"] == 4
    assert written["command"]
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [*NAMES, *BASELINES]
    assert [float(row["perplexity"]) for row in rows] == [row["perplexity"] for row in results["rows"]]
    assert rows[0]["paper_parallel_mtok"] == ""
    for row in results["rows"]:
        for run in row["runs"]:
            assert (out / run["folder"] / "config.yaml").is_file()


@pytest.mark.parametrize("name", ["table.png", "ladder.png", "throughput.png", "loss.png", "positions.png"])
def test_figures_are_pictures(made, name):
    import matplotlib.image

    picture = matplotlib.image.imread(made[0] / name)
    assert picture.shape[0] > 300
    assert picture[..., :3].std() > 0.02


def test_the_page_needs_no_other_file(made):
    out, results, _ = made
    page = (out / "index.html").read_text()
    assert re.findall(r'(?:src|href)="', page) == []
    assert page.count('<svg class="chart"') == 4 * 2
    assert f"{results['rows'][3]['perplexity']:.3f}" in page


def test_a_second_call_trains_and_measures_nothing(made, book, monkeypatch):
    out, results, _ = made
    monkeypatch.setattr(runs, "train", None)
    monkeypatch.setattr(throughput, "tokens_per_second", None)
    again = small(out, book, seeds=2)
    assert again["rows"] == results["rows"]


def test_an_interrupted_table_keeps_finished_rows_and_goes_on_inside_the_unfinished_one(tmp_path, book, monkeypatch):
    from kvbind.tasks.language import LanguageTask

    whole, calls = LanguageTask.loss, []

    def loss(self, model, batch):
        calls.append(1)
        if len(calls) == 7:  # two steps into the second row
            raise KeyboardInterrupt
        return whole(self, model, batch)

    monkeypatch.setattr(LanguageTask, "loss", loss)
    with pytest.raises(KeyboardInterrupt):
        small(tmp_path / "parts", book)
    folders = sorted((tmp_path / "parts" / "trained").iterdir(), key=lambda p: (p / "config.yaml").stat().st_mtime_ns)
    assert [(p / "result.json").is_file() for p in folders] == [True, False]
    assert latest_checkpoint(folders[1])["done"]["step"] == 2
    results = small(tmp_path / "parts", book)
    assert len(calls) == 7 + 2 + 9 * 4  # seven rungs, two controls and two baselines
    monkeypatch.setattr(LanguageTask, "loss", whole)
    fresh = small(tmp_path / "parts", book, fresh=True)
    assert [row["perplexity"] for row in results["rows"]] == [row["perplexity"] for row in fresh["rows"]]


def test_a_fresh_table_is_trained_anew(made, book, monkeypatch, tmp_path):
    import shutil

    shutil.copytree(made[0], tmp_path / "copy")
    asked = []
    monkeypatch.setattr(runs, "train", lambda *args, **kwargs: asked.append(1) or (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        small(tmp_path / "copy", book, seeds=2, fresh=True)
    assert asked


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"scale": "smok"},
            r"scale must be one of 'smoke', 'small', 'large', 'paper'; got 'smok' \(did you mean 'smoke'\?\)",
        ),
        (
            {"task": "languag"},
            r"task must be one of language, images, views, all; got 'languag' \(did you mean 'language'\?\)",
        ),
        ({"seeds": 0}, r"seeds must be an int of at least 1; got 0"),
        ({"workers": 0}, r"workers must be an int of at least 1; got 0"),
        ({"overrides": ["seed=3"]}, r"overrides must not set seed"),
        ({"overrides": ["train.step=1"]}, r"did you mean 'train\.steps'"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        reproduce(out=tmp_path, **options)


def test_a_run_is_named_by_its_configuration_and_its_text(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).write_text(f"{name} text. " * 100)
    one, other = (
        configuration("language", "smoke", 0, [*SMALL, f"data.source={tmp_path / name}"]) for name in ("one", "two")
    )
    assert run_name("language", one) == run_name("language", one)
    before = run_name("language", one)
    (tmp_path / "one").write_text("three text. " * 100)
    assert len({before, run_name("language", one), run_name("language", other)}) == 3


def test_a_folder_keeps_to_one_configuration(tmp_path, book):
    config = configuration("language", "smoke", 0, [*SMALL, f"data.source={book}"])
    run = train_run("language", config, tmp_path)
    assert not run.reused
    assert train_run("language", config, tmp_path).reused
    assert open_run(tmp_path)[0] == "language"
    assert len(run.losses()) == 4
    assert [row["step"] for row in read_metrics(tmp_path) if "held_out/perplexity" in row] == [0, 1, 2, 4]
    config.train.warmup += 1
    with pytest.raises(ValueError, match=r"holds a run of another configuration \(train\.warmup was"):
        train_run("language", config, tmp_path)


def test_a_folder_is_trained_in_by_one_process_at_a_time(tmp_path, book):
    import fcntl

    config = configuration("language", "smoke", 0, [*SMALL, f"data.source={book}"])
    with (tmp_path / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process is training in"):
            train_run("language", config, tmp_path)
    assert train_run("language", config, tmp_path).result["steps"] == 4


def test_throughput_beside_the_papers_counts_tokens_times_heads_as_it_does(made):
    out, results, shown = made
    heads = results["throughput"]["heads"]
    assert SUBJECTS["language"].speed.compared(9.9e6, {"heads": 4}) == pytest.approx(39.6)
    timed = [row for row in results["rows"] if "recurrent_tokens_per_second" in row]
    # baselines have no inner loop
    assert {row["name"] for row in results["rows"]} - {row["name"] for row in timed} == {"window", "softmax"}
    for row in timed:
        for form in ("recurrent", "parallel"):
            speed = row[f"{form}_tokens_per_second"]
            ours = None if speed is None else pytest.approx(speed / 1e6 * heads)
            assert row[f"{form}_mtok_x_heads"] == ours
            assert row["paper"]["speed_unit"] == "million tokens x heads per second"
            assert speed is None or f"{speed / 1e6 * heads:.3f}" in shown
    assert "counts tokens times heads (4 heads of 384, 32,768 tokens, forward without gradients)" in " ".join(shown.split())
    page = (out / "index.html").read_text()
    assert page.count("<small>x heads</small><br><small>paper</small>") == 2
    assert page.count("<small>x heads</small><br><small>here</small>") == 2
    charts = speed_charts(read_outcome(results))
    assert len(charts) == 2
    assert all("million tokens x heads per second" in json.dumps(chart) for chart in charts)
