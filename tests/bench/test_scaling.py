import json
import sys
import textwrap
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from kvbind import cli
from kvbind.bench.app import app
from kvbind.bench.tables.scaling import of_linear, scaling_grids
from kvbind.bench.training import scaling
from kvbind.bench.training.overlap import covered, kernels, shares
from kvbind.bench.training.scaling import ScalingSettings, cases, equality, finished, measured
from kvbind.bench.training.scaling_worker import OUT_OF_MEMORY, ScalingCase
from kvbind.inner.systems import ladder
from kvbind.layers.attention.window_attention import halo_of
from kvbind.models import PRESETS, LactConfig
from kvbind.plan.calibration import calibrate, read_points
from kvbind.plan.costs import Mesh, PlannedTraining, traffic

SMALL = ScalingSettings(
    preset="tiny",
    fsdp_length=256,
    lengths=(256, 128),
    equality_preset="tiny",
    equality_length=256,
    equality_steps=3,
    seconds=0.0,
)


def test_every_number_of_gpus_gets_its_cases_shorter_sequences_first():
    planned = cases(("fsdp", "sequence", "equality"), (1, 4), SMALL)
    assert [case.gpus for case in planned] == [1] * 5 + [4] * 4
    assert list(dict.fromkeys(case.gpus for case in cases(("fsdp",), (1, 2, 4, 8), SMALL))) == [1, 8, 4, 2]
    assert [case.length for case in planned if case.what == "sequence"] == [128, 256, 256]
    assert all(case.shard * case.sequence == case.gpus for case in planned)
    sharded = [case for case in planned if case.what == "equality" and case.sequence == 1]
    assert {case.batch for case in sharded if case.shard == 4 or case.gpus == 1} == {1, 4}


def test_the_command_measures_two_processes_beside_one(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("KVBIND_KERNELS", "0")
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "scaling.json"
    sizes = [
        "--preset",
        "tiny",
        "--equality-preset",
        "tiny",
        "--tokens",
        "128",
        "--lengths",
        "128",
        "--equality-tokens",
        "128",
        "--recompute",
        "offload",
    ]
    with pytest.raises(SystemExit, match="0"):
        cli.main(
            [
                "bench",
                "scaling",
                "--gpus",
                "1,2",
                *sizes,
                "--steps",
                "3",
                "--seconds",
                "0",
                "--device",
                "cpu",
                "--out",
                str(out),
            ]
        )
    record = json.loads(out.read_text())
    assert record["complete"]
    assert not [row["skipped"] for row in record["rows"] if "skipped" in row]
    speeds = [row for row in record["rows"] if row["what"] != "equality"]
    assert [(row["what"], row["gpus"]) for row in speeds] == [("fsdp", 1), ("sequence", 1), ("fsdp", 2), ("sequence", 2)]
    assert all(row["tokens_per_second"] > 0 and row["flops_per_second_per_gpu"] > 0 for row in speeds)
    # one state of each other rank in two rounds, momentum and sums; twice forward as blocks are recomputed, and backward
    scanned = speeds[-1]["sequence_bytes"]["received_per_layer"]["scan"]
    assert scanned == pytest.approx(3 * 2 * 4 * 2 * 64 * 64, rel=0.01)
    config = LactConfig(**{**PRESETS["tiny"], "inner": ladder(PRESETS["tiny"]["inner"])["rung2"]})
    planned = traffic(PlannedTraining(config, 128), Mesh(1, 1, 2))
    assert scanned == pytest.approx(planned.states / config.num_hidden_layers, rel=0.01)
    # keys and values in float32, of the rank that has a halo: twice forward
    halo = speeds[-1]["sequence_bytes"]["received_per_layer"]["halo"]
    assert halo == 2 * 2 * 4 * config.hidden_size * min(64, halo_of(config.window_size))
    assert {row["recompute"] for row in record["rows"]} == {"offload"}
    assert len(record["equality"]) == 2
    assert all(one["steps"] == 3 and one["largest"] < 1e-4 for one in record["equality"])
    assert "linear" in capsys.readouterr().out  # of the table's heading, which may wrap


def outcomes(monkeypatch, *runs):
    """Let `_run` give these outcomes, run by run; what it was asked for."""
    asked, given = [], iter(runs)

    def run(waiting, *args):
        asked.append([(case.what, case.length) for case in waiting])
        yield from next(given)

    monkeypatch.setattr(scaling, "_run", run)
    return asked


def test_what_needs_more_memory_than_what_ran_out_of_it_is_not_tried(monkeypatch):
    planned = [ScalingCase("sequence", 2, 1, 2, "tiny", "rung2", "parallel", n, 1) for n in (128, 256, 512)]
    planned.append(replace(planned[0], what="fsdp", shard=2, sequence=1, batch=2))
    asked = outcomes(monkeypatch, [{"seconds": 1}, {"skipped": OUT_OF_MEMORY}], [{"seconds": 2}])
    rows = list(measured(planned, "cpu", budget=1e6, limit=1e6))
    assert [(row["what"], row["length"], row.get("skipped")) for row in rows] == [
        ("sequence", 128, None),
        ("sequence", 256, "out of memory"),
        ("sequence", 512, "a shorter one ran out of memory"),
        ("fsdp", 128, None),
    ]
    assert asked == [[("sequence", 128), ("sequence", 256), ("sequence", 512), ("fsdp", 128)], [("fsdp", 128)]]


def test_other_cases_go_on_after_one_that_failed(monkeypatch):
    planned = [ScalingCase("fsdp", n, n, 1, "tiny", "rung2", "parallel", 128, n) for n in (1, 2)]
    outcomes(monkeypatch, [{"skipped": "failed: ValueError: no"}], [{"seconds": 1}])
    rows = measured(planned, "cpu", budget=1e6, limit=1e6)
    assert [row.get("skipped") for row in rows] == ["failed: ValueError: no", None]


def test_what_cannot_fit_is_not_tried(monkeypatch):
    planned = [ScalingCase("sequence", 1, 1, 1, "760m", "rung2", "parallel", n, 1) for n in (32768, 1 << 20)]
    asked = outcomes(monkeypatch, [{"seconds": 1}])
    rows = list(measured(planned, "cuda", budget=1e6, limit=1e6, memory_bytes=80e9))
    assert {row["length"]: row.get("skipped") for row in rows} == {32768: None, 1 << 20: "needs more memory, by kvbind plan"}
    assert asked == [[("sequence", 32768)]]


def test_what_had_no_time_or_failed_is_measured_again_and_nothing_else():
    planned = [ScalingCase("fsdp", n, n, 1, "tiny", "rung2", "parallel", 128, n) for n in (1, 2, 4, 8)]
    outcomes = (
        {"seconds": 1},
        {"skipped": "no time left"},
        {"skipped": OUT_OF_MEMORY},
        {"skipped": "failed: ValueError: no"},
    )
    rows = [case.row() | outcome for case, outcome in zip(planned, outcomes, strict=True)]
    assert finished(rows, planned) == {0: rows[0], 2: rows[2]}
    assert not finished(rows, [replace(case, preset="30m") for case in planned])


def test_resuming_measures_what_is_missing_behind_what_is_there(monkeypatch, tmp_path):
    out, arguments = tmp_path / "scaling.json", ["scaling", "--what", "fsdp", "--preset", "tiny", "--tokens", "128"]

    def command(gpus, *more):
        result = CliRunner().invoke(app, [*arguments, "--gpus", gpus, "--device", "cpu", "--out", str(out), *more])
        assert result.exit_code == 0, result.output
        return json.loads(out.read_text())

    asked = outcomes(monkeypatch, [{"losses": [1]}], [{"losses": [2]}])
    first = command("1", "--budget", "1e6")
    assert (first["planned"], first["complete"], len(first["rows"])) == (1, True, 1)
    late = command("1,2", "--resume", "--budget", "0")
    assert (late["planned"], late["complete"]) == (2, False)
    assert [row.get("skipped") for row in late["rows"]] == [None, "no time left"]
    whole = command("1,2", "--resume", "--budget", "1e6")
    assert whole["rows"] == [first["rows"][0], whole["rows"][1]]
    assert whole["rows"][1]["losses"] == [2]
    assert whole["complete"]
    assert list(whole)[-4:] == ["planned", "complete", "rows", "equality"]
    # where nothing is missing, the record stays that of the command that measured
    before = out.read_bytes()
    command("1", "--resume", "--budget", "1e6")
    assert out.read_bytes() == before
    assert len(asked) == 2


def test_nothing_runs_beyond_the_budget(monkeypatch):
    asked = outcomes(monkeypatch)
    rows = list(measured(cases(("fsdp",), (1, 2), SMALL), "cpu", budget=0, limit=60))
    assert [row["skipped"] for row in rows] == ["no time left"] * 2
    assert not asked


def processes(monkeypatch, tmp_path, body):
    """Let a script stand in for the processes of a run; it knows `write`."""
    script = tmp_path / "stand_in.py"
    head = """
    import json, sys, time
    def write(**line):
        with open(sys.argv[2], "a") as file:
            file.write(json.dumps(line) + "\\n")
    """
    script.write_text(textwrap.dedent(head) + textwrap.dedent(body))
    monkeypatch.setattr(scaling, "_command", lambda gpus, described, lines: [sys.executable, str(script), described, lines])
    return [ScalingCase("sequence", 1, 1, 1, "tiny", "rung2", "parallel", n, 1) for n in (128, 256)]


def test_rows_come_as_processes_write_them_and_errors_are_quoted(monkeypatch, tmp_path):
    planned = processes(
        monkeypatch,
        tmp_path,
        """
        if len(json.load(open(sys.argv[1]))["cases"]) == 2:
            write(case=0, began=0)
            write(case=0, row={"seconds": 1})
        raise ValueError("too long")
        """,
    )
    rows = list(measured(planned, "cpu", budget=1e6, limit=1e6))
    assert rows[0]["seconds"] == 1
    assert rows[1]["skipped"] == "failed: ValueError: too long"


def test_a_case_that_takes_too_long_is_ended(monkeypatch, tmp_path):
    planned = processes(monkeypatch, tmp_path, "time.sleep(600)")
    rows = list(measured(planned[:1], "cpu", budget=1e6, limit=0.5))
    assert rows[0]["skipped"] == "took more than 500 ms"


def test_communication_is_exposed_where_nothing_else_runs():
    assert covered([(0, 4), (2, 6), (10, 11)]) == 7
    # 2 of 10 beside computing, 3 alone, 1 idle
    assert shares([(4, 6), (7, 10)], [(0, 7 - 1)]) == {"busy": 0.5, "exposed": 0.3}
    assert shares([], []) is None


def test_kernels_are_told_from_collectives_and_from_mere_annotations():
    events = [
        {"cat": "kernel", "name": "ncclDevKernel_AllGather_RING_LL", "ts": 5.0, "dur": 2.0},
        {"cat": "kernel", "name": "gemm", "ts": 0.0, "dur": 6.0},
        {"cat": "gpu_user_annotation", "name": "FSDP::all_gather", "ts": 0.0, "dur": 99.0},
        {"cat": "gpu_memcpy", "name": "Memcpy DtoD", "ts": 7.0, "dur": 1.0},
        {"name": "process_name"},
    ]
    assert kernels(events) == ([(5.0, 7.0)], [(0.0, 6.0), (7.0, 8.0)])


def row(what, gpus, length, speed, **fields):
    case = ScalingCase(what, gpus, 1, gpus, "760m", "rung2", "parallel", length, 1)
    measured = {"tokens_per_second": speed, "peak_bytes": 1 << 30, "flops_per_second_per_gpu": 1e14}
    return case.row() | measured | fields


def made_record():
    """A record as if it had been measured."""
    rows = [
        row("sequence", 1, 131072, 1e5),
        row("sequence", 2, 131072, 1.9e5),
        row("sequence", 4, 1 << 20, 4e5),
        row("sequence", 8, 1 << 20, 7.6e5, communication={"busy": 0.1, "exposed": 0.02}),
        ScalingCase("sequence", 1, 1, 1, "760m", "rung2", "parallel", 1 << 20, 1).row() | {"skipped": OUT_OF_MEMORY},
    ]
    losses = [{"losses": [2.0, 1.0]}, {"losses": [2.002, 1.0]}]
    for n, found in zip((1, 2), losses, strict=True):
        rows.append(ScalingCase("equality", n, n, 1, "125m", "rung2", "parallel", 32768, 2, steps=2).row() | found)
    from dataclasses import asdict

    return {
        "machine": {"device": "NVIDIA H200"}, "config": asdict(ScalingSettings()) | {"gpus": [1, 2]}, "rows": rows,
        "equality": equality(rows), "planned": 7, "complete": True, "command": "kvbind bench scaling", "versions": {},
    }  # fmt: skip


def test_scaling_is_told_against_the_fewest_gpus_of_the_same_length():
    rows = made_record()["rows"]
    assert of_linear(rows[1], rows[:4]) == pytest.approx(0.95)
    assert of_linear(rows[3], rows[:4]) == pytest.approx(0.95)


def test_equality_is_the_largest_relative_difference_of_losses():
    (found,) = made_record()["equality"]
    assert (found["gpus"], found["steps"]) == (2, 2)
    assert found["largest"] == pytest.approx(1e-3)


def test_tables_hold_what_was_measured_and_what_was_not():
    grids = {grid.key: grid for grid in scaling_grids(made_record())}
    assert list(grids) == ["sequence", "equality", "skipped"]
    assert grids["sequence"].rows[-1][:7] == ("1,048,576", "8", "760,000", "95,000", "95.0%", "10.1%", "1.0")
    assert grids["sequence"].rows[-1][7:9] == ("10.0%", "2.0%")
    assert grids["equality"].rows == (("fsdp", "2", "2", "1.0e-03"),)
    assert grids["skipped"].rows == (("sequence", "out of memory", "1", "1,048,576"),)


def test_a_plan_can_be_calibrated_by_a_record(tmp_path):
    path = tmp_path / "scaling-h200.json"
    path.write_text(json.dumps(made_record()))
    points = read_points(path)
    assert [(point.mesh, point.length) for point in points] == [
        ((1, 1, 1), 131072), ((1, 1, 2), 131072), ((1, 1, 4), 1 << 20), ((1, 1, 8), 1 << 20),
    ]  # fmt: skip
    assert list(calibrate(points).efficiency) == ["h200 rung2 parallel"]


def test_offloaded_inputs_that_the_machine_cannot_hold_are_not_tried(monkeypatch):
    def tried(case, host):
        monkeypatch.setattr(scaling, "host_memory", lambda: host)
        return not scaling.too_large(case, 141e9)

    million = cases(("sequence",), (2,), replace(ScalingSettings(), lengths=(1 << 20,), recompute="offload"))[0]
    pinned = 4 * 24 * 1536 * (1 << 20)  # on both GPUs together
    assert tried(million, 1.3 * pinned)
    assert not tried(million, 1.2 * pinned)
    # what stays on GPUs takes nothing of the machine's
    short = replace(million, length=1 << 18, recompute="block")
    assert tried(short, 1.0)
    assert not tried(replace(million, length=1 << 21, recompute="block"), 1e15)


def test_the_machines_memory_is_what_its_control_group_allows(monkeypatch, tmp_path):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(scaling, "MEMORY_LIMIT", limit)
    present = scaling.host_memory()
    assert present > 1e8
    for text, expected in (("max\n", present), ("4096\n", 4096.0), (f"{2 * int(present)}\n", present)):
        limit.write_text(text)
        assert scaling.host_memory() == expected
