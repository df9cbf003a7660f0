"""The benchmark of what is around an inner loop, on a CPU."""

import json

import pytest
from typer.testing import CliRunner

from kvbind.bench.harness.profiler import summary
from kvbind.bench.layers.elementwise import BY
from kvbind.bench.tables.layers import step_grids
from kvbind.cli import app


def test_every_piece_is_timed_with_kernels_and_without(tmp_path):
    out = tmp_path / "layer.json"
    arguments = ["--tokens", "8", "--width", "24", "--heads", "2", "--dtype", "float32", "--seconds", "0", "--device", "cpu"]
    done = CliRunner().invoke(app, ["bench", "layer", *arguments, "--out", str(out)])
    assert done.exit_code == 0, done.output
    record = json.loads(out.read_text())
    assert record["complete"]
    rows = {(row["piece"], row["by"]): row for row in record["rows"]}
    assert {by for _, by in rows} == set(BY)
    # three operands read and a result written, in float32; then both of the former again, and four tensors of gradients
    swiglu = rows["SwiGLU", "kernels"]
    size = 2 * 8 * (8 * 48 // 3) * 4
    assert (swiglu["forward_bytes"], swiglu["training_bytes"]) == (3 * size, 8 * size)
    assert all(row[name]["seconds"] > 0 for row in rows.values() for name in ("forward", "training"))


def test_layer_refuses_dtypes_that_it_has_no_case_for():
    done = CliRunner().invoke(app, ["bench", "layer", "--dtype", "float64", "--device", "cpu"])
    assert done.exit_code == 2
    assert "dtype must be float32 or bfloat16; got 'float64'" in done.output


def test_a_steps_profile_lists_kernels_by_their_share():
    def event(name, microseconds):
        return {"name": name, "dur": microseconds, "args": {"grid": [3, 1, 1], "block": [32, 1, 1]}}

    events = [event("void a::large<float>(int)", 6000.0)] * 2 + [event("small", 100.0), event("medium", 3000.0)]
    row = {"rung": "rung2", "form": "parallel", "tokens_per_second": 7.0, "peak_bytes": 2**30, "profile": summary(events, 1)}
    record = {"config": {"preset": "tiny", "tokens": 8}, "device": "cuda", "rows": [row, row | {"profile": None}]}
    speeds, spent = step_grids(record)
    assert speeds.rows[0] == ("rung2", "parallel", "7", "1.00")
    assert [line[1:] for line in spent.rows] == [
        ("all", "4", "15", "100%"),
        ("large", "2", "12", "79%"),
        ("medium", "1", "3", "20%"),
    ]
    assert len(step_grids({**record, "rows": [row | {"profile": None}]})) == 1


@pytest.mark.parametrize("command", ["step", "kernels"])
def test_profiles_are_refused_where_there_is_no_gpu(command):
    flag = ["--profile"] if command == "step" else ["--profile", "x.json"]
    done = CliRunner().invoke(app, ["bench", command, *flag, "--device", "cpu"])
    assert done.exit_code == 2
    assert "profile is of a GPU" in done.output
