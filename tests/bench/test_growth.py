"""How distances grow from chunk to chunk, and the time that compilers take."""

import json

import pytest
import torch
from typer.testing import CliRunner

from kvbind import systems
from kvbind.bench.app import app
from kvbind.bench.harness.operands import DrawnOperands, Size
from kvbind.bench.training import compile_time
from kvbind.bench.verify.accuracy import with_precision
from kvbind.bench.verify.growth import bench_growth, factor, wide_updates

SIZE = Size(1, 20 * 16, 1, 16)


def test_the_full_system_magnifies_a_change_whatever_its_size_and_rung_2_does_not():
    rows = {(row.rung, row.evaluation): row for row in bench_growth(SIZE, 16, ("rung0", "rung2"))}
    by_size = [rows["rung0", f"float64, weights changed by {x}"] for x in ("1e-12", "1e-08")]
    assert by_size[0].per_chunk > 1.05
    assert by_size[0].per_chunk == pytest.approx(by_size[1].per_chunk, rel=0.02)
    assert by_size[1].errors[10] / by_size[0].errors[10] == pytest.approx(1e4, rel=0.1)
    assert rows["rung2", "float32"].per_chunk < 1.02
    # wider updates are worth no more than a few chunks
    single, wide = (rows["rung0", name] for name in ("float32", "products in float32, updates and state in float64"))
    assert wide.errors[15] > single.errors[10]


@pytest.mark.parametrize("rung", ["rung0", "rung2"])
def test_wide_updates_are_the_recurrent_form(rung):
    spec = with_precision(systems.ladder(systems.lact_llm(16))[rung], torch.float64)
    o = DrawnOperands.draw(spec, Size(1, 48, 2, 16))
    expected = o.run(spec, "recurrent")
    assert (wide_updates(spec, o, 16).double() - expected).norm() < 1e-5 * expected.norm()


def test_growth_is_the_slope_of_what_is_not_saturated():
    assert factor([0.0, *(1e-9 * 2.0**i for i in range(12)), 0.5, 0.7]) == pytest.approx(2)
    assert factor([0.0, 1e-3, 1.0]) == 1


def test_the_commands_write_records(tmp_path, monkeypatch):
    out = tmp_path / "growth.json"
    result = CliRunner().invoke(app, ["growth", "--tokens", "64", "--chunk", "16", "--width", "8", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert {len(row["errors"]) for row in json.loads(out.read_text())["rows"]} == {4}

    asked = []

    def quick(job, fields, environment, limit):
        asked.append((job.__name__, fields["rung"], fields["way"], environment["TORCHINDUCTOR_FORCE_DISABLE_CACHES"]))
        if fields["way"] == "blocks":
            raise compile_time.TookTooLongError("no result after 5 s")
        times = dict.fromkeys(("first_seconds", "processor_seconds", "again_seconds", "new_length_seconds"), 1.0)
        return {**times, "graphs": 1, "nodes": 2}

    monkeypatch.setattr(compile_time, "in_fresh_process", quick)
    out = tmp_path / "compile.json"
    result = CliRunner().invoke(app, ["compile", "--rungs", "2", "--device", "cpu", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert asked == [("compiled_step", "rung2", way, "1") for way in compile_time.WAYS]
    record = json.loads(out.read_text())
    assert [row.get("error") for row in record["rows"]] == [None, "no result after 5 s"]


def test_a_compiled_step_is_timed():
    config = {"rung": "rung2", "way": "blocks", "layers": 1, "width": 8, "chunk": 4, "tokens": 9, "device": "cpu"}
    found = compile_time.compiled_step(config, backend="eager")
    assert found["graphs"] == 2
    assert found["first_seconds"] > 0
