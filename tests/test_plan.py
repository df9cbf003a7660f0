import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from kvbind import cli, systems
from kvbind.hardware import ACCELERATORS, accelerator, peak_flops, recognized
from kvbind.models import PRESETS, LactConfig, LactForCausalLM
from kvbind.plan.calibration import (
    SHIPPED,
    Calibration,
    MeasuredPoint,
    calibrate,
    load_calibration,
    read_points,
    save_calibration,
)
from kvbind.plan.command import job_of, run_plan
from kvbind.plan.costs import Mesh, PlannedTraining, bandwidth, host_bytes, memory, seconds, traffic
from kvbind.plan.planner import RESERVE, meshes, overrides, plan
from kvbind.tasks import language
from kvbind.train.config import read_config
from kvbind.train.ranks import Share

RUNG2 = ["model.inner.update=last", "model.inner.normalize=false"]
H100 = ACCELERATORS["h100"]


@pytest.fixture(scope="module")
def job():
    return job_of("760m", RUNG2, None, None, "block")[0]


@pytest.fixture(scope="module")
def calibration():
    return load_calibration()


def test_a_job_is_what_the_configuration_trains(job):
    assert (job.length, job.batch, job.preset, job.rung, job.form) == (32768, 32, "760m", "rung2", "parallel")
    longer, tokens = job_of("760m", [], 1 << 20, None, "none")
    assert (longer.length, longer.batch, longer.rung, longer.form) == (1 << 20, 1, "rung0", "recurrent")
    assert tokens == 20000 * 32 * 32768


def test_parameters_are_the_models(job):
    small = PlannedTraining(LactConfig(**PRESETS["tiny"]), 64)
    model = LactForCausalLM(small.config)
    everything = sum(p.numel() for p in model.parameters())
    assert small.parameters == (everything, sum(p.numel() for p in model.model.layers[1].parameters()))
    assert memory(small, Mesh(), 80.0).weights == 4 * everything


def test_ranks_divide_weights_activations_and_work(job):
    one, sixteen = Mesh(), Mesh(2, 4, 2)
    whole, part = (memory(job, mesh, 80.0) for mesh in (one, sixteen))
    assert part.weights == whole.weights / 8
    assert part.optimizer == whole.optimizer / 8
    assert part.kept == whole.kept / 2
    assert part.block == whole.block / 2
    alone, shared = (seconds(job, mesh, H100, 0.4, 1.0) for mesh in (one, sixteen))
    assert shared.compute == pytest.approx(alone.compute / 16)
    assert alone.weights == alone.sequence == 0
    assert shared.weights > 0
    assert shared.sequence > 0


def test_offloaded_block_inputs_take_host_memory_in_place_of_the_gpus(job):
    one, four = Mesh(), Mesh(1, 1, 4)
    there = replace(job, recompute="offload")
    inputs = 4 * 1536 * job.length
    assert memory(job, one, 80.0).total - memory(there, one, 80.0).total == pytest.approx((24 - 2) * inputs)
    assert (host_bytes(job, one), host_bytes(there, one), host_bytes(there, four)) == (0, 24 * inputs, 6 * inputs)
    # as much is computed and sent again
    assert seconds(there, four, H100, 0.4, 1.0) == seconds(job, four, H100, 0.4, 1.0)


def test_two_gpus_train_on_a_million_tokens_where_block_inputs_are_offloaded(job, calibration):
    h200 = ACCELERATORS["h200"]
    million = replace(job, length=1 << 20, batch=1)
    assert not plan(million, 2, "h200", h200, calibration).options[0].fits
    found = plan(replace(million, recompute="offload"), 2, "h200", h200, calibration)
    assert found.options[0].fits
    assert found.options[0].mesh == Mesh(1, 1, 2)
    assert "train.activation_checkpointing=offload" in overrides(found.options[0])
    assert "each GPU keeps 72 GiB of block inputs in pinned memory of its host" in found.warnings


def test_what_a_sequence_exchanges_does_not_grow_with_its_length(job):
    short, long = (traffic(replace(job, length=n, batch=1), Mesh(1, 1, 8)) for n in (1 << 17, 1 << 20))
    assert short == long
    assert short.per_layer > 0
    # one state of each other rank in two rounds, momentum and sums, and the window's keys and values, forward and backward
    state = 4 * 4 * 384 * 384
    assert short.per_layer == 2 * (2 * 7 * state + 2 * 2 * 1536 * 2047)


def test_gradients_meet_once_in_a_step_and_weights_in_every_pass(job):
    once, twice = (traffic(replace(job, batch=n), Mesh(1, 8, 1)) for n in (8, 16))
    assert twice.gather == 2 * once.gather
    assert twice.scatter == once.scatter


def test_the_recurrent_form_gains_memory_but_no_time_for_fast_weights_along_a_sequence():
    job, _ = job_of("760m", [], 1 << 17, 1, "block")
    one, eight = (seconds(job, Mesh(1, 1, n), H100, 0.1, 0.0).compute for n in (1, 8))
    fast = job.flops["fast weights"] / sum(job.flops.values())
    assert eight / one == pytest.approx(fast + (1 - fast) / 8)


def named_job(name, length=1 << 15):
    fields = {**PRESETS["125m"], "inner": systems.named(name), "projections": name}
    return PlannedTraining(LactConfig(**fields), length, 8)


def test_the_delta_rule_runs_in_blocks_of_tokens():
    job = named_job("kda")
    layers, heads, width, block = 14, 4, 192, 64
    matrix = 4 * heads * width**2
    assert job.form == "parallel"
    assert (job.write_bytes, job.states) == (matrix, block)
    # the state before each block and its gradient, not one for each token
    assert memory(job, Mesh(), 80.0).states == 2 * matrix * (job.length / block + 1)
    # a block's products in place of those of the definition: 6 with a state, pairs, and a system of two right sides
    extra = 2 * block * 2 * width + block * 2 * width
    assert job.computed_flops - sum(job.flops.values()) == pytest.approx(3 * layers * heads * job.length * extra)
    one, four = (seconds(job, Mesh(1, 1, n), H100, 0.4, 0.0).compute for n in (1, 4))
    assert one == pytest.approx(4 * four)
    # a state and the matrix by which one passes through a slice, from each other rank, forward and backward
    halo = 2 * 2 * job.config.hidden_size * (job.config.reach - 1)
    assert traffic(job, Mesh(1, 1, 4)).per_layer == 2 * (3 * 2 * matrix + halo)


def test_systems_whose_states_are_handed_on_wait_for_one_another():
    job = named_job("ttt_linear")
    assert (job.form, job.scans, job.blocks) == ("recurrent", False, None)
    assert job.computed_flops == sum(job.flops.values())
    # the matrix and its bias
    assert job.write_bytes == 4 * 4 * (192**2 + 192)
    fast = job.flops["fast weights"] / sum(job.flops.values())
    one, four = (seconds(job, Mesh(1, 1, n), H100, 0.1, 0.0).compute for n in (1, 4))
    assert four / one == pytest.approx(fast + (1 - fast) / 4)


@pytest.mark.parametrize("name", systems.PROJECTIONS)
def test_every_published_system_can_be_planned(name, calibration):
    found = plan(named_job(name), 8, "h100", H100, calibration)
    assert found.options[0].seconds.total > 0
    assert 0 < found.options[0].mfu < 1


def test_groups_inside_a_node_have_its_links_and_others_its_network():
    assert bandwidth(Mesh(1, 1, 8), "sequence", H100) == H100.link
    assert bandwidth(Mesh(1, 1, 16), "sequence", H100) == 8 * H100.network
    assert bandwidth(Mesh(16, 1, 8), "replicate", H100) == H100.network
    assert bandwidth(Mesh(2, 4, 1), "replicate", H100) == H100.link


@pytest.mark.parametrize("gpus", [1, 6, 8, 64])
def test_meshes_use_all_gpus(gpus):
    found = list(meshes(gpus, 8))
    assert {mesh.gpus for mesh in found} == {gpus}
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("gpus", [1, 8, 64, 512])
def test_plans_put_the_fastest_mesh_that_fits_first(gpus, job, calibration):
    found = plan(job, gpus, "h100", H100, calibration)
    best = found.options[0]
    assert best.fits
    assert best.memory.total <= (1 - RESERVE) * H100.memory
    asked = [option for option in found.options if option.fits and option.job.batch == job.batch]
    assert best.tokens_per_second == max(option.tokens_per_second for option in asked)
    assert 0 < best.mfu < 1
    assert all(option.passes * option.mesh.data == option.job.batch for option in found.options)
    assert f"train.parallel.sequence={best.mesh.sequence}" in overrides(best) or gpus == 1


@pytest.mark.parametrize("gpus", [1, 8, 64])
def test_what_a_plan_prints_is_a_configuration_that_says_the_same(gpus, job, calibration):
    for option in plan(job, gpus, "h100", H100, calibration).options:
        config = read_config(language.Config, language.PRESETS, "760m", [*RUNG2, *overrides(option)])
        share = Share.of(0, option.mesh.data, config.data.batch, config.train.accumulate)
        assert len(share.rows(config.data.batch)) * config.train.accumulate // share.turns == option.passes
        assert config.data.batch * config.train.accumulate == option.job.batch
        parallel = config.train.parallel
        assert gpus == 1 or (parallel.shard, parallel.sequence) == (option.mesh.shard, option.mesh.sequence)


def test_a_plan_says_where_nothing_fits_and_what_would_help(job, calibration):
    long = replace(job, length=1 << 23, batch=1)
    assert any("no mesh of so many GPUs fits" in text for text in plan(long, 8, "h100", H100, calibration).warnings)
    recurrent, _ = job_of("760m", [], 1 << 20, None, "block")
    warnings = plan(recurrent, 64, "h100", H100, calibration).warnings
    assert any(
        "with model.inner.update=last model.inner.normalize=false it has a parallel form" in text for text in warnings
    )


def test_a_plan_says_what_was_not_measured(job, calibration):
    selective = plan(replace(job, recompute="selective"), 8, "a100", ACCELERATORS["a100"], calibration)
    notes = " ".join(selective.warnings)
    for part in ("no step with 'selective' recomputation was measured", "no step of this inner loop was measured on a100"):
        assert part in notes
    assert not plan(job, 1, "h200", ACCELERATORS["h200"], calibration).warnings


def test_sequences_are_cut_into_whole_windows_and_chunks_at_the_least(job):
    short = replace(job, length=8192)
    assert short.obstacle(Mesh(1, 1, 4)) is None
    assert short.obstacle(Mesh(1, 1, 8)) == "1024 tokens on a rank are fewer than a window or a chunk, 2048"
    assert short.obstacle(Mesh(1, 1, 3)) == "8192 tokens cannot be divided among 3 ranks"


def made_points(efficiency, exposed, block_bytes):
    """Points as the formulas with these coefficients give them."""
    points = []
    for mesh, length in (((1, 1, 1), 32768), ((1, 4, 1), 32768), ((1, 1, 4), 131072), ((1, 1, 8), 262144)):
        found = MeasuredPoint("made.json", "h200", "760m", "rung2", "parallel", length, mesh[1], "block", 4, mesh, 1.0, 1)
        took = seconds(found.job, found.on, ACCELERATORS["h200"], efficiency, exposed).total
        held = round(memory(found.job, found.on, block_bytes).total)
        points.append(replace(found, tokens_per_second=found.job.tokens_per_step / took, peak_bytes=held))
    return points


def test_calibration_finds_the_coefficients_that_made_its_points():
    found = calibrate(made_points(0.3, 0.6, 90.0))
    assert found.efficiency == pytest.approx({"h200 rung2 parallel": 0.3})
    assert found.exposed == pytest.approx(0.6)
    assert found.block_bytes == pytest.approx(90.0)
    assert all(abs(speed) < 1e-6 and abs(held) < 1e-6 for speed, held in found.errors())
    assert "of 4 measured points, to which 2 numbers were fitted" in found.summary()


def test_a_calibrations_error_is_that_of_its_worst_point():
    points = made_points(0.3, 0.0, 90.0)
    points[2] = replace(points[2], tokens_per_second=points[2].tokens_per_second / 1.25)
    found = calibrate(points)
    assert max(abs(speed) for speed, _ in found.errors()) > 0.1
    worst = max(abs(speed) for speed, _ in found.errors())
    assert f"speed within {worst:.0%} of 4 measured points" in found.summary()


def test_points_without_more_points_than_coefficients_leave_the_error_unknown():
    found = calibrate(made_points(0.3, 0.0, 90.0)[:1])
    assert "leaves its error unknown" in found.summary()
    assert found.exposed is None
    assert found.shown == 1


def test_calibrations_are_read_as_they_were_written(tmp_path):
    found = calibrate(made_points(0.3, 0.6, 90.0))
    save_calibration(found, tmp_path / "c.json")
    assert load_calibration(tmp_path / "c.json") == found


def test_the_shipped_calibration_is_what_its_points_give(calibration):
    again = calibrate(calibration.points)
    assert again.efficiency == pytest.approx(calibration.efficiency)
    assert again.block_bytes == pytest.approx(calibration.block_bytes)
    results = Path(__file__).parent.parent / "results" / "bench"
    for name in {point.source for point in calibration.points}:
        # PyTorch's fused kernels and ours are measured apart: a file counts as a whole
        assert read_points(results / name) == [point for point in calibration.points if point.source == name]
    errors = [point["errors"]["tokens_per_second"] for point in json.loads(SHIPPED.read_text())["points"]]
    assert errors == pytest.approx([speed for speed, _ in calibration.errors()], abs=1e-9)


def test_whole_models_are_points_by_what_ran_fastest(tmp_path):
    def row(name, by, **ways):
        return {"name": name, "ours_by": by, "ours_ways": ways}

    eager, graphs = {"per_second": 5e4, "peak_bytes": 7}, {"per_second": 6e4, "peak_bytes": 8}
    record = {"machine": {"device": "NVIDIA H200"}, "config": {"sizes": "full"}}
    record["rows"] = [
        row("lact-760m-rung2", "graphs", eager=eager, graphs=graphs),
        row("lact-760m-rung0", "eager", eager=eager, graphs=None),
        row("lact-30m-rung2", "eager", eager=eager),
        row("decode-760m-batch1-ms", "graphs", graphs={"value": 4}),
    ]
    path = tmp_path / "models.json"
    path.write_text(json.dumps(record))
    parallel, recurrent = read_points(path)
    assert (parallel.rung, parallel.form, parallel.tokens_per_second, parallel.peak_bytes) == ("rung2", "parallel", 6e4, 8)
    assert (recurrent.rung, recurrent.form, recurrent.tokens_per_second) == ("rung0", "recurrent", 5e4)
    assert {point.recompute for point in (parallel, recurrent)} == {"none"}


def test_an_inner_loop_that_was_not_measured_takes_the_nearest_efficiency():
    found = Calibration(
        {"h100 rung0 recurrent": 0.1, "h100 rung2 parallel": 0.4, "h200 rung3 parallel": 0.5}, 80.0, None, ()
    )
    assert found.efficiency_for("h100", "rung2", "parallel") == (0.4, "h100 rung2 parallel")
    assert found.efficiency_for("h200", "rung2", "parallel") == (0.4, "h100 rung2 parallel")
    assert found.efficiency_for("a100", "rung5", "parallel") == (0.4, "h100 rung2 parallel")
    assert found.efficiency_for("h200", "", "recurrent") == (0.1, "h100 rung0 recurrent")


def test_devices_are_recognized_by_the_names_that_pytorch_gives_them():
    assert recognized("NVIDIA H100 80GB HBM3") == "h100"
    assert recognized("NVIDIA H200") == "h200"
    assert recognized("NVIDIA A100-SXM4-40GB") == "a100-40gb"
    assert recognized("AMD EPYC") is None
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("AMD EPYC") is None
    with pytest.raises(ValueError, match=r"hardware must be one of h100, .*; got 'h10' \(did you mean 'h100'"):
        accelerator("h10")


def test_the_command_prints_a_plan_and_writes_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "plan.json"
    with pytest.raises(SystemExit, match="0"):
        cli.main(["plan", "--gpus", "8,64", "--budget", "15e9", "--price", "2", "--json", str(out), *RUNG2])
    printed = capsys.readouterr().out
    written = json.loads(out.read_text())
    best = [one["options"][0] for one in written["plans"]]
    assert [one["gpus"] for one in best] == [8, 64]
    for one in best:
        assert f"{one['tokens_per_second']:,.0f}" in printed
        hours = 15e9 / one["tokens_per_second"] / 3600 * one["gpus"]
        assert one["budget"]["gpu_hours"] == pytest.approx(hours)
        assert one["budget"]["cost"] == pytest.approx(2 * hours)
        assert all(edit in printed for edit in one["overrides"])
    assert written["calibration"]["summary"] in printed


def test_on_a_narrow_terminal_numbers_stay_whole_and_decided_edits_are_said_once(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    with pytest.raises(SystemExit, match="0"):
        cli.main(["plan", "--gpus", "64", "--price", "2", "train.parallel.sequence=4", *RUNG2])
    printed = capsys.readouterr().out
    best = run_plan("760m", "64", RUNG2, Console(quiet=True), price=2)["plans"][0]["options"][0]
    assert f"{best['tokens_per_second']:,.0f}" in printed
    assert f"({best['budget']['cost']:,.0f})" in printed
    assert printed.count("train.parallel.sequence=") == 1


def test_what_does_not_fit_is_refused_by_name(tmp_path, capsys):
    for words, message in (
        (["--gpus", "8,x"], "gpus must be whole numbers from 1 to 1,048,576 with commas between them; got '8,x'"),
        (["--gpus", "8, 8"], "gpus must be different numbers; got 8, 8"),
        (["--gpus", "8,10000000000"], "gpus must be whole numbers from 1 to 1,048,576"),
        (["--gpus", "1" * 5000], "gpus must be whole numbers from 1 to 1,048,576"),
        (["--tokens", "1" + "0" * 30], "tokens times batch must be at most 1,125,899,906,842,624 in a step; got 1000"),
        (["--batch", "1" + "0" * 30], "tokens times batch must be at most"),
        (["data.length=1000000000000000000"], "tokens times batch must be at most"),
        (["--budget", "1e300"], "budget must be above 0 and at most 1.13e+15 tokens; got 1e+300"),
        (["--price", "inf"], "price must be from 0 to 1,000,000 for an hour of one GPU; got inf"),
        (["--recompute", "blocks"], "recompute must be one of 'block', 'offload', 'selective', 'none'; got 'blocks'"),
        (["--budget", "0"], "budget must be above 0 and at most 1.13e+15 tokens; got 0"),
        (["--preset", "761m"], "preset must be one of"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["plan", *words])
        assert message in " ".join(capsys.readouterr().err.split())
    other = tmp_path / "other.json"
    other.write_text("{}")
    with pytest.raises(ValueError, match="calibration files must be results of kvbind bench step, scaling or models"):
        read_points(other)
    with pytest.raises(ValueError, match="points must be at least one measured step"):
        calibrate([])


def test_the_documentations_tables_are_made_from_plans():
    path = Path(__file__).parent.parent / "docs" / "tables.py"
    described = importlib.util.spec_from_file_location("docs_tables", path)
    tables = importlib.util.module_from_spec(described)
    described.loader.exec_module(tables)
    page = "before\n<!-- plan: --gpus 8 --budget 15e9 model.inner.update=last -->\nold\n<!-- end -->\nafter"
    filled = tables.fill(page, path.parent.parent)
    assert "old" not in filled
    assert "| GPUs | replicate x shard x sequence |" in filled
    assert "760m, rung 1, recurrent form" in filled
    assert tables.fill(filled, path.parent.parent) == filled


def test_a_plan_without_the_command_returns_what_it_would_write(capsys):
    found = run_plan("tiny", "1", [], Console(file=None, quiet=True))
    assert found["plans"][0]["options"][0]["mesh"] == {"replicate": 1, "shard": 1, "sequence": 1}
    assert torch.tensor(found["plans"][0]["options"][0]["mfu"]).isfinite()
