import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from kvbind.bench.app import app
from kvbind.bench.harness.operands import Size
from kvbind.bench.harness.timing import peak_bytes
from kvbind.bench.tables.decoding import decoding_grid, decoding_rows
from kvbind.bench.verify.accuracy import bench_accuracy

# the bounds of docs/accuracy.md
BOUNDS = {("float32", "float32"): 3e-6, ("bfloat16", "float32"): 4e-3, ("bfloat16", "bfloat16"): 5e-2}


def test_working_precision_stays_within_the_documented_bounds():
    errors = bench_accuracy(Size(1, 256, 2, 32), 64, torch.device("cpu"))
    assert {e.form for e in errors} == {"recurrent", "parallel"}
    for e in errors:
        bound = BOUNDS[e.dtype, e.newton_schulz or "float32"]
        # the full system feeds errors of one chunk into the features of the next
        assert e.error < (100 * bound if e.rung == "rung0" and e.newton_schulz == e.dtype else bound), e


def test_bench_forms_writes_every_row_with_where_it_comes_from(tmp_path):
    out = tmp_path / "forms.json"
    arguments = ["forms", "--tokens", "64", "--chunk", "16", "--width", "8", "--seconds", "0", "--device", "cpu"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(out)])
    assert result.exit_code == 0, result.output
    data = json.loads(out.read_text())
    assert [(row["rung"], row["form"]) for row in data["rows"] if row["form"] == "recurrent"] == [
        (f"rung{i}", "recurrent") for i in range(7)
    ]
    assert sum(row["form"] == "parallel" for row in data["rows"]) == 5
    assert all(row["forward"] > 0 and row["training"] > 0 and row["training_bytes"] > 0 for row in data["rows"])
    assert {"command", "machine", "versions", "config"} <= data.keys()


def test_bench_accuracy_writes_its_results(tmp_path):
    out = tmp_path / "accuracy.json"
    result = CliRunner().invoke(
        app, ["accuracy", "--tokens", "64", "--chunk", "16", "--width", "8", "--device", "cpu", "--out", str(out)]
    )
    assert result.exit_code == 0, result.output
    data = json.loads(out.read_text())
    assert len(data["errors"]) == 12 + 12 + 10
    assert [row["chunks"] for row in data["scan"]] == [16, 32, 64, 128, 256, 1024]


@pytest.mark.parametrize(
    "arguments", [["forms", "--dtype", "float8"], ["forms", "--device", "abacus"], ["accuracy", "--device", "x"]]
)
def test_unknown_devices_and_dtypes_are_refused(arguments):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2


def test_peak_memory_counts_what_is_held_at_once():
    def work():
        a = torch.ones(1 << 18)
        b = a + 1
        del a
        return b + 1

    assert 2 << 20 <= peak_bytes(work, torch.device("cpu")) < 2.5 * (1 << 20)


def test_bench_decode_times_a_token_with_the_cache_and_without(tmp_path):
    out = tmp_path / "decode.json"
    arguments = ["decode", "--prompts", "64,256", "--tokens", "40", "--piece", "50", "--device", "cpu", "--out", str(out)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    record = json.loads(out.read_text())
    short, long = record["rows"]
    assert record["complete"]
    # half a chunk before the end of one
    assert (short["prompt"], long["prompt"]) == (32, 224)
    assert short["cache_bytes"] <= long["cache_bytes"] < 1.2 * short["cache_bytes"]
    for row in (short, long):
        assert 0 < row["p50_ms"] <= row["p99_ms"] <= row["slowest_ms"]
        assert (row["tokens"], row["batch"], row["graphs"], row["captured"]) == (40, 1, False, False)
        assert row["tokens_per_second"] > 0
        assert row["reread_seconds"] > 0


def test_bench_decode_refuses_graphs_where_there_are_none_and_reads_no_prompt_of_several_again(tmp_path):
    arguments = ["decode", "--prompts", "64", "--tokens", "2", "--device", "cpu"]
    refused = CliRunner().invoke(app, [*arguments, "--graphs", "both"])
    assert refused.exit_code == 2
    assert "graphs must be off or auto" in refused.output
    out = tmp_path / "decode.json"
    assert CliRunner().invoke(app, [*arguments, "--batch", "3", "--out", str(out)]).exit_code == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert (row["batch"], row["tokens"], row["reread_seconds"]) == (3, 2, None)


def test_bench_decode_times_named_systems_and_weighs_their_states(tmp_path):
    out = tmp_path / "decode.json"
    arguments = ["decode", "--prompts", "40", "--tokens", "2", "--device", "cpu", "--out", str(out)]
    result = CliRunner().invoke(app, [*arguments, "--system", "kda,ttt_linear,lact_llm"])
    assert result.exit_code == 0, result.output
    rows = {row["system"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == ["kda", "ttt_linear", "lact_llm"]
    # two layers of two heads of 64: one matrix of float32; with a bias and a head's two weights, and 15 tokens of 2 x 64
    # channels, rates of matrix and bias and a read rate that may wait
    matrix, heads = 4 * 64 * 64, 2 * 2
    assert rows["kda"]["state_bytes"] == heads * matrix
    waiting = 15 * 4 * (2 * 64 + 2 + 1)
    assert rows["ttt_linear"]["state_bytes"] == heads * (matrix + 4 * 3 * 64 + waiting)
    assert all(row["state_bytes"] <= row["cache_bytes"] and row["p50_ms"] > 0 for row in rows.values())
    assert "state MiB" in result.output
    refused = CliRunner().invoke(app, [*arguments, "--system", "lact_nvs"])
    assert refused.exit_code == 2
    assert "system must be of" in refused.output


@pytest.mark.parametrize("name", ["decode-cpu", "decode-125m-h100", "decode-760m-h200"])
def test_records_of_decoding_from_before_graphs_are_read_as_those_of_today(name):
    record = json.loads((Path(__file__).parents[2] / "results" / "bench" / f"{name}.json").read_text())
    for row, old in zip(decoding_rows(record), record["rows"], strict=True):
        assert row["p50_ms"] == 1e3 * old["token_seconds"]
        assert row["slowest_ms"] == 1e3 * old["slowest_token_seconds"]
        assert (row["batch"], row["tokens"], row["graphs"], row["p99_ms"]) == (1, 64, False, None)
    grid = decoding_grid(record)
    assert [line[:2] for line in grid.rows] == [(f"1 x {old['prompt']}", "off") for old in record["rows"]]
    assert all(len(line) == len(grid.header) for line in grid.rows)


def test_bench_step_trains_each_rung_in_its_form(tmp_path):
    out = tmp_path / "step.json"
    result = CliRunner().invoke(app, ["step", "--tokens", "128", "--steps", "1", "--device", "cpu", "--out", str(out)])
    assert result.exit_code == 0, result.output
    rows = json.loads(out.read_text())["rows"]
    assert [(row["rung"], row["form"]) for row in rows] == [
        ("rung0", "recurrent"),
        ("rung2", "recurrent"),
        ("rung2 parallel", "parallel"),
    ]
    assert rows[1]["loss"] == pytest.approx(rows[2]["loss"], rel=1e-4)


def test_unknown_presets_get_the_nearest():
    result = CliRunner().invoke(app, ["decode", "--preset", "tin"])
    assert result.exit_code == 2
    assert "did you mean 'tiny'" in result.output
