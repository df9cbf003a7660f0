import json
import statistics

import pytest
from rich.console import Console

from kvbind.experiments.request import Measure
from kvbind.experiments.tables import projection, table2
from kvbind.experiments.tables.projection import AT_ONCE, GPUS, WARM_UP, Steps
from kvbind.experiments.training.plans import configuration, with_inner
from kvbind.tasks import open_task_module

TINY = {
    "language": [
        "model.fields.hidden_size=16", "model.fields.num_hidden_layers=1", "model.fields.num_attn_heads=2",
        "model.fields.num_lact_heads=1", "model.fields.window_size=8", "model.fields.intermediate_size=16",
        "model.inner.chunk=8", "data.length=32", "data.batch=2", "train.steps=700", "train.accumulate=3",
    ],
    "images": ["model.fields.depth=1", "model.fields.embed_dim=12", "model.fields.num_heads=2", "data.batch=256"],
    "views": [
        "model.fields.dim=32", "model.fields.head_dim=16", "model.fields.fast_head_dim=32", "model.fields.layers=1",
        "data.size=[16,16]", "data.procedural.views=8", "data.inputs=3", "data.targets=2", "data.batch=2",
    ],
}  # fmt: skip
UNITS = {"language": 2 * 32, "images": 128, "views": 2 * 5}


def steps(**changes):
    found = {"parameters": 10, "samples": 2, "units": 64, "batches": 8, "steps": 100, "batch_seconds": [1.0, 2.0, 9.0],
             "optimizer_seconds": [0.5], "losses": [1.0], "peak_bytes": None}  # fmt: skip
    return Steps(**found | changes)


def test_a_training_is_its_steps_times_their_batches():
    assert steps().seconds(1, 0.5) == 100 * (8 * 2.0 + 0.5)
    assert steps().seconds(8, 1.0) == 100 * (2.0 + 0.5)
    assert steps().seconds(8, 0.5) == 100 * (2 * 2.0 + 0.5)


@pytest.mark.parametrize("task", TINY)
def test_steps_of_every_task_are_measured_on_generated_data_and_projected(task, tmp_path):
    if task == "images":
        pytest.importorskip("sklearn")
    results = table2.reproduce(
        task=task, out=tmp_path, measure=Measure(2, ("rung0", "rung6"), price=3.0, efficiency=0.5),
        overrides=[*TINY[task], "train.device=cpu"],
    )  # fmt: skip
    assert [row["name"] for row in results["measured"]] == ["rung0", "rung6"]
    for row in results["measured"]:
        assert row["units"] == UNITS[task]
        assert len(row["batch_seconds"]) == len(row["optimizer_seconds"]) == 2
        assert len(row["losses"]) == 2 + WARM_UP
        per_step = row["batches"] * statistics.median(row["batch_seconds"]) + statistics.median(row["optimizer_seconds"])
        assert row["projected_seconds"][1] == pytest.approx(row["steps"] * per_step)
        assert row["cost"][1] == pytest.approx(row["projected_seconds"][1] / 3600 * 3)
        assert list(row["cost"]) == list(GPUS)
    assert "Assumed, not measured: several GPUs at 50%" in (tmp_path / "index.html").read_text()
    assert "<svg" in (tmp_path / "steps.svg").read_text()
    assert not (tmp_path / "trained").exists()


def test_a_batch_too_large_is_measured_in_parts_that_make_up_the_step(tmp_path):
    pytest.importorskip("sklearn")
    options = {"task": "images", "measure": Measure(1, ("rung0",)), "overrides": [*TINY["images"], "train.device=cpu"]}
    (row,) = table2.reproduce(out=tmp_path, **options)["measured"]
    assert (row["samples"], row["batches"]) == (AT_ONCE["images"], 2)


def test_rows_that_do_not_apply_or_for_which_there_is_no_time_are_named(tmp_path):
    options = {"task": "views", "overrides": [*TINY["views"], "train.device=cpu"], "minutes": 0.0}
    results = table2.reproduce(out=tmp_path, measure=Measure(1, ("rung0", "rung4")), **options)
    assert results["measured"] == []
    assert results["left_out"] == {"rung0": "no time left", "rung4": "does not apply"}
    with pytest.raises(ValueError, match="rows must be one of"):
        table2.reproduce(out=tmp_path, measure=Measure(1, ("rung7",)), **options)


@pytest.mark.parametrize(("task", "samples"), [("language", 20000 * 32), ("views", 20000 * 64), ("images", 150120 * 512)])
def test_the_papers_configurations_need_no_data_to_be_measured(task, samples):
    full = configuration(task, "paper")
    config = with_inner(task, full, open_task_module(task).rows(full)["rung6"])
    assert config.train.steps * config.train.accumulate * config.data.batch == samples


ROWS = ("rung0", "rung1", "rung6")


@pytest.fixture
def measured(monkeypatch):
    """The inner loops that were measured, in their order; the third measurement is interrupted."""
    begun = []

    def measure_steps(task, config, device, count):
        begun.append(config.model.inner)
        if len(begun) == 3:
            raise KeyboardInterrupt
        return steps()

    monkeypatch.setattr(projection, "measure_steps", measure_steps)
    return begun


def views(out, *edits, rows=ROWS, **options):
    overrides = [*TINY["views"], "train.device=cpu", *edits]
    return table2.reproduce(task="views", out=out, measure=Measure(3, rows), overrides=overrides, **options)


def test_what_was_measured_before_an_interruption_is_written_and_not_measured_again(tmp_path, measured):
    with pytest.raises(KeyboardInterrupt):
        views(tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["name"] for row in results["measured"]] == ["rung0", "rung1"]
    assert results["left_out"] == {"rung6": "not measured yet"}
    assert "not measured yet" in (tmp_path / "index.html").read_text()
    console = Console(record=True, width=200, force_terminal=False)
    results = views(tmp_path, console=console)
    assert [row["name"] for row in results["measured"]] == list(ROWS)
    assert results["left_out"] == {}
    assert len(measured) == 4
    assert measured[2] == measured[3]
    assert console.export_text().count("measured earlier") == 2


def test_rows_that_are_measured_one_by_one_make_up_one_report(tmp_path, measured):
    for row in ("rung6", "rung0"):
        results = views(tmp_path, rows=(row,))
    assert [row["name"] for row in results["measured"]] == ["rung0", "rung6"]
    assert results["left_out"] == {}
    assert len(measured) == 2


def test_another_configuration_is_measured_anew(tmp_path, measured):
    views(tmp_path, rows=ROWS[:1])
    results = views(tmp_path, "data.inputs=2", rows=ROWS[1:2])
    assert [row["name"] for row in results["measured"]] == ["rung1"]
    with pytest.raises(KeyboardInterrupt):
        views(tmp_path, "data.inputs=2", rows=ROWS[1:2], fresh=True)
