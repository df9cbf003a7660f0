import importlib.util
import json
import os
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from kvbind import NewtonSchulz, systems
from kvbind.bench.app import app
from kvbind.bench.harness import fla_tuning, profiler
from kvbind.bench.harness.ceilings import Ceilings, attention_work, forward_work, training_work
from kvbind.bench.harness.device_time import duration
from kvbind.bench.harness.fresh_process import TookTooLongError, in_fresh_process
from kvbind.bench.harness.kernel_switch import VARIABLE, operators_of, without_kernels
from kvbind.bench.harness.named_operands import draw_leaves, in_precision, run
from kvbind.bench.harness.operands import Size
from kvbind.bench.kernels import measure, own_processes, profiles, speed
from kvbind.bench.kernels.cases import WHATS, SpeedCase, SpeedSettings, plan
from kvbind.bench.kernels.goals import CHUNK, GOALS, SIZE, TOKEN_PEERS, goal_of
from kvbind.bench.kernels.speed import bench_kernels, with_rates
from kvbind.bench.layers.operators import LayerOperator
from kvbind.bench.tables.kernels import speed_grids
from kvbind.bench.tables.verify import summary_grid, verify_grid
from kvbind.bench.verify import operators
from kvbind.bench.verify.cases import FULL, SMALL
from kvbind.bench.verify.cases import cases as verify_cases
from kvbind.kernels.common.devices import has_triton, interpreted

CPU = torch.device("cpu")
H100 = Ceilings(matmul_flops=700e12, matmul_size=8192, dtype="bfloat16", copy_bytes=3.0e12)
TINY = SpeedSettings(Size(1, 32, 1, 12), 8, "float32", ("rung0", "rung2"))
SMALL_CASES = {case.name: case for case in verify_cases(SMALL)}


def tiny(name="rung2", by="kvbind", form="parallel", **fields):
    fields = {"batch": 1, "tokens": 32, "heads": 1, "width": 8, "chunk": 8, "dtype": "float32"} | fields
    return SpeedCase("targets", name, by, form, **fields)


@pytest.fixture
def documentation():
    """The script that writes tables into the documentation."""
    path = Path(__file__).parents[2] / "docs" / "tables.py"
    spec = importlib.util.spec_from_file_location("documentation_tables", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# what is measured


def test_limits_at_the_layer_of_the_760m_model_are_those_of_the_goals_table():
    mtok = {}
    for name in ("rung0", "rung2", "rung3", "rung6"):
        spec = systems.ladder(systems.lact_llm(CHUNK))[name]
        mtok[name] = SIZE.tokens / forward_work(spec, SIZE, torch.bfloat16).limit(H100) / 1e6
    assert mtok == pytest.approx({"rung0": 35, "rung2": 67, "rung3": 120, "rung6": 244}, rel=0.04)


def test_operations_are_those_counted_by_hand():
    d, tokens = 384, SIZE.tokens * SIZE.heads
    rungs = systems.ladder(systems.lact_llm(CHUNK))
    shaping = tokens / CHUNK * 30 * d**3
    for name, count in {"rung2": 12 * d * d, "rung3": 4 * d * d, "rung6": 4 * d * d}.items():
        expected = count * tokens + (0 if name == "rung6" else shaping)
        assert forward_work(rungs[name], SIZE, torch.bfloat16).flops == pytest.approx(expected)


def test_training_moves_every_operand_in_and_its_gradient_out():
    row = 10 * 2 * 8 * 4  # bytes of one of q, k, v and the output
    size = Size(1, 10, 2, 8)
    forward = forward_work(systems.linear_attention(), size, torch.float32)
    assert forward.bytes == 4 * row
    training = training_work(forward, size, torch.float32)
    assert (training.bytes, training.flops) == (11 * row, 3 * forward.flops)
    assert [work.bytes for work in attention_work(size, torch.float32)] == [4 * row, 11 * row]


def test_the_plan_measures_every_goal_at_the_call_it_was_set_for():
    cases = plan(WHATS, SpeedSettings(SIZE, CHUNK, "bfloat16"))
    with_goal = {
        (case.name, case.form, case.heads, case.width)
        for case in cases
        if case.by == "kvbind" and goal_of(case.name, case.form, case.size, case.chunk, case.dtype)
    }
    assert {(name, form, 4, 384) for name, form in GOALS} <= with_goal
    assert {("linear_attention", "parallel", *shape) for shape in TOKEN_PEERS} <= with_goal
    spans = {part: [case for case in cases if case.what == part] for part in WHATS}
    assert {case.tokens for case in spans["lengths"]} == {2048 << i for i in range(9)}
    assert {case.chunk for case in spans["chunks"]} == {256, 512, 1024, 2048, 4096}
    assert {(case.heads, case.width) for case in spans["widths"]} == {
        (24, 64), (12, 128), (8, 192), (6, 256), (4, 384), (3, 512)
    }  # fmt: skip
    assert [(case.name, case.form) for case in spans["first"]] == [("rung2", "parallel"), ("rung0", "recurrent")]
    assert [case.by for case in spans["token"]] == ["kvbind"] * 3 + ["sdpa"] * 3 + ["fla"] * 3
    assert [case.name for case in spans["compiled"]] == ["rung2", "rung3", "rung4", "rung5", "rung6", "rung0", "rung1"]
    assert {case.by for case in spans["compiled"]} == {"compiled"}
    assert len(cases) == len(set(cases))


def test_the_rungs_chosen_are_those_measured_kernels_first():
    cases = plan(["targets"], TINY)
    assert [case.by for case in cases] == ["kvbind"] * 3 + ["sdpa"] + ["pytorch"] * 3
    assert {case.name for case in cases} == {"rung0", "rung2", "softmax_attention"}


def test_goals_hold_at_their_own_call_alone():
    assert goal_of("rung2", "parallel", SIZE, CHUNK, "bfloat16").forward == 56
    assert goal_of("linear_attention", "parallel", Size(1, 32768, 12, 128), 1, "bfloat16").training == pytest.approx(20.3)
    assert goal_of("rung2", "parallel", SIZE, 1024, "bfloat16") is None
    assert goal_of("rung2", "parallel", SIZE, CHUNK, "float32") is None
    assert goal_of("rung2", "parallel", replace(SIZE, batch=2), CHUNK, "bfloat16") is None


def test_rates_follow_from_times():
    case = SpeedCase("targets", "rung2", "kvbind", "parallel", 1, 32768, 4, 384, 2048, "bfloat16")
    timed = {"seconds": 1e-3, "graph_seconds": 5e-4, "peak_bytes": 0}
    row = with_rates(asdict(case) | {"forward": timed, "operators": ()}, H100)["forward"]
    assert row["mtok_per_s"] == pytest.approx(32.768)
    assert row["graph_mtok_per_s"] == pytest.approx(65.536)
    assert row["of_goal"] == pytest.approx(32.768 / 56)
    assert row["of_limit"] == pytest.approx(32.768 / row["limit_mtok_per_s"])
    assert row["tflop_per_s"] / 700 == pytest.approx(row["of_limit"])  # bound by operations
    assert row["peer_mtok_per_s"] == 21.7


def test_a_duration_is_of_the_work_alone():
    calls = []
    timed = duration(lambda: calls.append(1), CPU, seconds=0, least=3)
    assert len(calls) == 1 + 3
    assert timed.seconds >= 0
    assert (timed.graph_seconds, timed.not_capturable) == (None, "not on a GPU")


def test_operators_of_the_library_are_seen_by_name_in_both_passes():
    @torch.library.custom_op("kvbind::test_bench_double", mutates_args=())
    def double(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    @torch.library.custom_op("kvbind::test_bench_double_backward", mutates_args=())
    def backward(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    double.register_autograd(lambda ctx, grad: backward(grad))
    x = torch.ones(2, requires_grad=True)
    assert operators_of(lambda: double(x).sum().backward()) == ("test_bench_double", "test_bench_double_backward")
    assert operators_of(lambda: (x * 2).sum().backward()) == ()


@pytest.mark.parametrize("before", [None, "1", "force"])
def test_kernels_are_off_inside_and_as_before_outside(monkeypatch, before):
    monkeypatch.delenv(VARIABLE, raising=False)
    if before is not None:
        monkeypatch.setenv(VARIABLE, before)
    with without_kernels():
        assert os.environ[VARIABLE] == "0"
    assert os.environ.get(VARIABLE) == before
    with pytest.raises(RuntimeError, match="inside"), without_kernels():
        raise RuntimeError("inside")
    assert os.environ.get(VARIABLE) == before


def test_one_case_that_fails_does_not_stop_the_others(monkeypatch):
    works = measure.works

    def failing(case, device):
        if case.name == "rung3":
            raise RuntimeError("no such kernel\nmore of it")
        forward, training, facts = works(case, device)

        def memory():
            raise torch.OutOfMemoryError("too much")

        return forward, memory if case.name == "rung6" else training, facts

    monkeypatch.setattr(measure, "works", failing)
    cases = [tiny("rung3"), tiny("rung6"), tiny("rung2")]
    lost, half, whole = bench_kernels(cases, H100, CPU, seconds=0)
    assert lost["error"] == "RuntimeError: no such kernel"
    assert "forward" not in lost
    assert half["error"] == "training: OutOfMemoryError: too much"
    assert half["forward"]["mtok_per_s"] > 0
    assert "error" not in whole
    assert whole["training"]["mtok_per_s"] > 0


def test_without_kernels_means_the_switch_is_off_while_measuring(monkeypatch):
    seen = {}
    works = measure.works

    def watched(case, device):
        seen[case.by] = os.environ.get(VARIABLE)
        return works(case, device)

    monkeypatch.setenv(VARIABLE, "1")
    monkeypatch.setattr(measure, "works", watched)
    list(bench_kernels([tiny(by="kvbind"), tiny(by="pytorch")], H100, CPU, seconds=0))
    assert seen == {"kvbind": "1", "pytorch": "0"}


def test_softmax_attention_takes_the_next_width_that_the_backend_supports(monkeypatch):
    whole = torch.nn.functional.scaled_dot_product_attention

    def narrow(q, k, v, **options):
        if q.shape[-1] > 16:
            raise RuntimeError("head width")
        return whole(q, k, v, **options)

    monkeypatch.setattr(measure.F, "scaled_dot_product_attention", narrow)
    row = measure.measure(tiny("softmax_attention", "sdpa", "auto", heads=2, width=24), CPU, 0)
    assert (row["heads"], row["width"], row["refused_widths"]) == (3, 16, [24])
    assert row["forward"]["seconds"] > 0


def test_bench_kernels_writes_every_row_with_where_it_comes_from(tmp_path):
    out = tmp_path / "kernels.json"
    arguments = ["kernels", "--what", "targets,chunks", "--rungs", "6", "--tokens", "32", "--chunk", "8", "--width", "8"]
    arguments += ["--heads", "1", "--dtype", "float32", "--seconds", "0", "--device", "cpu", "--out", str(out)]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "120", VARIABLE: None})
    assert result.exit_code == 0, result.output
    data = json.loads(out.read_text())
    assert {"command", "machine", "versions", "config", "ceilings", "goals"} <= data.keys()
    assert data["complete"]
    assert len(data["rows"]) == data["planned"] == 4 + 1 + 5
    for row in data["rows"]:
        assert "error" not in row, row
        for name in ("forward", "training"):
            timed = row[name]
            assert timed["mtok_per_s"] == pytest.approx(row["batch"] * row["tokens"] / timed["seconds"] / 1e6)
            assert timed["peak_bytes"] > 0
    assert "rung 6" in result.output
    assert "no kernel" in result.output


def test_bench_kernels_stops_at_its_budget_and_keeps_what_it_has(tmp_path):
    out = tmp_path / "kernels.json"
    arguments = [
        "kernels",
        "--rungs",
        "6",
        "--tokens",
        "16",
        "--chunk",
        "8",
        "--width",
        "8",
        "--heads",
        "1",
        "--budget",
        "0",
    ]
    result = CliRunner().invoke(app, [*arguments, "--dtype", "float32", "--device", "cpu", "--out", str(out)])
    assert result.exit_code == 0, result.output
    data = json.loads(out.read_text())
    assert (data["complete"], data["rows"]) == (False, [])
    assert f"0 of {data['planned']} rows" in result.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["kernels", "--what", "target"], "did you mean 'targets'"),
        (["kernels", "--rungs", "7"], "rung7"),
        (["kernels", "--dtype", "float8"], "float32 or bfloat16"),
        (["kernels", "--profile", "profile.json"], "the device is cpu"),
        (["verify", "--dtype", "float16"], "float32, bfloat16"),
    ],
)
def test_mistakes_are_named(words, message):
    result = CliRunner().invoke(app, [*words, "--device", "cpu"])
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", "").split())


def test_first_calls_are_timed_in_a_fresh_process():
    case = asdict(tiny("rung6", tokens=64))
    result = in_fresh_process(own_processes.first_calls, {"case": case, "device": "cpu"}, {"OMP_NUM_THREADS": "1"}, 1e5)
    assert result["again_seconds"] > 0
    assert result["first_seconds"] > 0
    assert set(result["new_length_seconds"]) == {"72", "69", "63"}


def test_a_job_that_takes_too_long_is_ended_and_one_that_fails_says_why():
    with pytest.raises(TookTooLongError, match="no result after 50 ms"):
        in_fresh_process(own_processes.first_calls, {"case": asdict(tiny()), "device": "cpu"}, {}, 0.05)
    with pytest.raises(RuntimeError, match="KeyError: 'case'"):
        in_fresh_process(own_processes.first_calls, {}, {}, 60)


def test_whatever_may_compile_for_long_has_a_process_and_a_limit_of_its_own(monkeypatch):
    asked = []

    def refuse(job, fields, environment, limit):
        asked.append((job.__name__, fields["case"]["by"], limit))
        raise TookTooLongError("no result after 7 s")

    monkeypatch.setattr(speed, "in_fresh_process", refuse)
    cases = [tiny(by="fla"), tiny(by="compiled"), replace(tiny(), what="first")]
    rows = list(bench_kernels(cases, H100, CPU, compile_limit=7.0))
    assert asked == [("measured", "fla", 7.0), ("measured", "compiled", 7.0), ("first_calls", "kvbind", 7.0)]
    assert {row["error"] for row in rows} == {"TookTooLongError: no result after 7 s"}


def test_configurations_are_compiled_together_before_an_autotuner_chooses(monkeypatch):
    pytest.importorskip("triton")
    from triton.runtime.autotuner import Autotuner

    from kvbind.kernels.launching.warm_up import warming_up

    class Choices:
        def warmup(self, *args, **kwargs):
            done.append(("compiled", warming_up(), args, kwargs))

    done: list[tuple] = []
    monkeypatch.setattr(Autotuner, "run", lambda self, *args, **kwargs: done.append(("run", warming_up(), args, kwargs)))
    before, choices = Autotuner.run, Choices()
    with fla_tuning.compiling_configurations():
        for x in (1, 2):
            Autotuner.run(choices, x, grid=(4,), warmup=False)
    assert Autotuner.run is before
    launched = {"grid": (4,), "warmup": False}
    expected = [("compiled", True, (1,), {"grid": (4,)}), ("run", False, (1,), launched), ("run", False, (2,), launched)]
    assert done == expected


def test_kernels_of_pytorch_have_short_names():
    inside = "at::native::(anonymous namespace)::"
    assert (
        profiler.short(f"void {inside}multi_tensor_apply_kernel<{inside}Copy<2>>({inside}Copy<2>)")
        == "multi_tensor_apply_kernel"
    )
    assert profiler.short("_product_kernel") == "_product_kernel"


# the tables


def test_tables_show_what_the_record_says(documentation, tmp_path):
    timed = {"seconds": 1e-3, "graph_seconds": None, "not_capturable": "RuntimeError: a stream", "peak_bytes": 2**30}
    case = SpeedCase("targets", "rung2", "kvbind", "parallel", 1, 32768, 4, 384, 2048, "bfloat16")
    done = with_rates(
        asdict(case) | {"forward": timed, "training": timed, "operators": ["chunked"], "operand_bytes": 2**29}, H100
    )
    lost = asdict(replace(case, by="compiled")) | {"error": "TookTooLongError: no result after 60 s"}
    first = asdict(replace(case, what="first")) | {
        "cold": {"first_seconds": 9.0, "again_seconds": 0.01, "new_length_seconds": {"1": 0.02, "2": 0.03}}
    }
    record = {
        "config": asdict(SIZE) | {"chunk": CHUNK, "dtype": "bfloat16"},
        "rows": [done, lost, first],
        "command": "kvbind bench kernels",
        "machine": {"device": "a GPU"},
        "versions": {"torch": "2"},
        "ceilings": asdict(H100),
        "complete": True,
    }
    speed, calls = speed_grids(record)
    cells = dict(zip(speed.header, speed.rows[0], strict=True))
    assert cells["rung"] == "rung 2"
    assert cells["by"] == "kernels"
    assert (cells["fwd Mtok/s"], cells["fwd / goal"], cells["GiB"]) == ("32.8", "0.59", "1.50")
    assert "-" in speed.rows[1]
    assert "no graph: RuntimeError: a stream" in speed.note
    assert "no result after 60 s" in speed.note
    assert calls.rows[0][2:5] == ("cold", "9.00", "15")

    (tmp_path / "r.json").write_text(json.dumps(record))
    page = "before\n<!-- table: r.json targets -->\nold\n<!-- end -->\nbetween\n"
    text = documentation.fill(page, tmp_path)
    assert "| rung 2 | parallel | kernels | 32.8 |" in text
    assert "old" not in text
    assert text.startswith("before\n<!-- table: r.json targets -->\n")
    assert documentation.fill(text, tmp_path) == text
    shown = documentation.pictures(record | {"rows": [asdict(replace(case, what="lengths"))]}, "r.json")
    assert "images/kernels-lengths.png" in shown
    assert "chunks" not in shown
    with pytest.raises(ValueError, match="has no table 'widths'"):
        documentation.fill(page.replace("targets", "widths"), tmp_path)


def test_the_documentation_counts_rows_that_had_no_time_as_missing(documentation):
    rows = [{"seconds": 1}, {"skipped": "out of memory"}, {"skipped": "no time left"}]
    record = {"command": "kvbind bench scaling", "machine": {"device": "a GPU"}, "versions": {}, "planned": 3, "rows": rows}
    assert documentation.source(record | {"complete": False}, "r.json").endswith(" Stopped by its budget: 2 of 3 rows.")


def test_the_documentation_holds_the_tables_of_its_data(documentation):
    for page in documentation.PAGES:
        text = page.read_text(encoding="utf-8")
        assert documentation.fill(text, documentation.DOCS.parent) == text, f"{page.name}: run python docs/tables.py"


def event(name, microseconds, grid, **more):
    given = {"grid": grid, "block": [128, 1, 1], "registers per thread": 90, "shared memory": 1024} | more
    return {"name": name, "dur": microseconds, "args": given}


def test_a_profile_sums_launches_by_kernel_and_shows_those_that_take_longest(documentation, tmp_path):
    events = [
        event("_product_kernel", 200, [64, 4, 1]),
        event("_product_kernel", 400, [96, 4, 1]),
        event("void at::native::elementwise_kernel<128, float>(int, float)", 30, [7, 1, 1]),
        {"name": "Memset (Device)", "dur": 2, "args": {}},
    ]
    found = profiler.summary(events, 2)
    assert found["device_ms"] == pytest.approx(0.316)
    assert found["launches"] == 2
    product, elementwise, fill = found["kernels"]
    assert (product["name"], product["launches"], product["ms"]) == ("_product_kernel", 1, pytest.approx(0.3))
    assert (product["programs"], product["threads"], product["registers"]) == (384, 128, 90)
    assert product["share"] == pytest.approx(600 / 632)
    assert elementwise["name"] == "elementwise_kernel"
    assert (fill["programs"], fill["registers"]) == (0, None)

    record = {
        "config": asdict(SIZE) | {"chunk": CHUNK, "dtype": "bfloat16"},
        "multiprocessors": 132, "rows": [asdict(tiny()) | {"pass": "forward"} | found], "planned": 1, "complete": True,
        "command": "kvbind bench kernels", "machine": {"device": "a GPU"}, "versions": {"torch": "2"},
    }  # fmt: skip
    (tmp_path / "p.json").write_text(json.dumps(record))
    text = documentation.table("p.json", "profile", tmp_path)
    assert "| rung 2 | parallel | fwd | product_kernel | 1 | 0.300 | 95% | 384 | 90 | 1 |" in text
    assert "elementwise" not in text


def test_every_rung_is_profiled_once_in_its_fastest_form():
    cases = profiles.to_profile(SpeedSettings(SIZE, CHUNK, "bfloat16"))
    assert {case.name: case.form for case in cases} == {"rung0": "recurrent", "rung1": "recurrent"} | {
        f"rung{i}": "parallel" for i in range(2, 7)
    }
    with pytest.raises(ValueError, match="device must be cuda"):
        next(profiles.profiled(TINY, CPU))


# verification

CHECKED = [
    "rung 0, state through four calls, recurrent",
    "rung 0, packed sequences, recurrent",
    "rung 2, ragged end, parallel",
    "rung 2, values half as wide, parallel",
    "rung 6, batch 2, parallel",
    "MLP, momentum and retention, recurrent",
    "linear attention, packed sequences, parallel",
    "linear attention, state through three calls, parallel",
    "DeltaNet, parallel",
    "LaCT view synthesis, recurrent",
    "ViTTT, depthwise convolution, recurrent",
]

INTERPRETED = has_triton() and interpreted()

PIECES = [name for name, case in SMALL_CASES.items() if isinstance(case, LayerOperator)]


@pytest.mark.parametrize("dtype", operators.DTYPES)
@pytest.mark.parametrize("name", CHECKED)
def test_the_pytorch_forms_keep_to_the_rules_for_kernels(name, dtype):
    with without_kernels():
        row = operators.verify(SMALL_CASES[name], dtype, CPU)
    assert row["passed"], row["problems"]
    assert set(row["errors"]["gradients"]) >= {"q", "k", "v", "weights.out"}
    assert row["operators"] == ()


@pytest.mark.parametrize("dtype", operators.DTYPES)
@pytest.mark.parametrize("name", PIECES)
def test_pieces_of_the_layer_keep_to_the_rules_with_kernels_and_without(name, dtype, monkeypatch):
    monkeypatch.setenv(VARIABLE, "force" if INTERPRETED else "0")
    row = operators.verify(SMALL_CASES[name], dtype, CPU)
    assert row["passed"], row["problems"]
    assert set(row["errors"]["gradients"]) == set(SMALL_CASES[name].shapes)
    assert all(error < 0.02 for error in row["errors"]["gradients"].values())
    assert bool(row["operators"]) == INTERPRETED


def test_a_piece_of_the_layer_that_is_wrong_fails():
    right = SMALL_CASES["layer: SwiGLU"]

    def slipping(x, dtype):
        return tuple(y * (1 if dtype == torch.float64 else 1.03) for y in right.call(x, dtype))

    problems = operators.verify(replace(right, call=slipping), "float32", CPU)["problems"]
    assert {problem.partition(":")[0] for problem in problems} == {"output", "gradient of gate", "gradient of up"}


@pytest.mark.parametrize("dtype", operators.DTYPES)
@pytest.mark.parametrize("wrong", ["output", "state", "pending", "gradient", "nan"])
def test_a_kernel_that_is_wrong_somewhere_fails(monkeypatch, dtype, wrong):
    exact = operators.ttt

    class Slip(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return 1.03 * grad

    def slipping(spec, weights, *, q, state, **given):
        if os.environ.get(VARIABLE) == "0":
            return exact(spec, weights, q=q, state=state, **given)
        y, after = exact(spec, weights, q=Slip.apply(q) if wrong == "gradient" else q, state=state, **given)
        change = {"state": "weights.out", "pending": "pending.v"}.get(wrong)
        if change:
            after = replace(after, tensors={n: x * 1.03 if n == change else x for n, x in after.tensors.items()})
        return {"output": 1.03 * y, "nan": y * float("nan")}.get(wrong, y), after

    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(operators, "ttt", slipping)
    row = operators.verify(SMALL_CASES["rung 6, ragged end, parallel"], dtype, CPU)
    assert not row["passed"]
    named = {"pending": "norms and pending tokens", "gradient": "gradient of q", "nan": "output"}.get(wrong, wrong)
    assert any(problem.startswith(named) for problem in row["problems"]), row["problems"]


@pytest.mark.parametrize("form", ["recurrent", "parallel"])
def test_pytorch_computes_in_the_precision_it_is_asked_for(form):
    spec = systems.ladder(systems.lact_llm(8))["rung3"].replace(orthogonalize=NewtonSchulz(dtype=torch.float32))
    leaves = in_precision(draw_leaves(spec, Size(1, 40, 2, 16), CPU), torch.float32, torch.float32)
    given = operators.arguments(spec, leaves)
    weights = operators.weights_of(leaves)
    exact, _ = run(spec, leaves, form)
    same, _ = operators.pytorch_in(torch.float32)(spec, weights, state=None, form=form, **given)
    low, state = operators.pytorch_in(torch.bfloat16)(spec, weights, state=None, form=form, **given)
    assert (same - exact).norm() <= 1e-6 * exact.norm()
    assert (low - exact).norm() > 1e-3 * exact.norm()
    assert {x.dtype for x in state.tensors.values()} == {torch.bfloat16}


def test_several_processes_verify_what_one_does():
    places = {case.name: place for place, case in enumerate(verify_cases(SMALL))}
    chosen = [(places[name], "float32") for name in ("rung 6, packed sequences, parallel", "DeltaNet, parallel")]
    one, several = (
        {
            row["case"]: row
            for row in operators.attempts(chosen, CPU, small=True, workers=workers, deadline=time.monotonic() + 1e6)
        }
        for workers in (1, 2)
    )
    assert one.keys() == several.keys()
    assert len(one) == 2
    for case, row in one.items():
        assert row["passed"] == several[case]["passed"]
        assert several[case]["errors"]["output"] < 1e-5
    assert not list(operators.attempts(chosen, CPU, small=True, workers=1, deadline=0))


def test_cases_cover_every_rung_visibility_network_and_way_to_call():
    for scale in (FULL, SMALL):
        listed = verify_cases(scale)
        assert len({case.name for case in listed}) == len(listed)
        pieces = [case for case in listed if isinstance(case, LayerOperator)]
        assert {name for piece in pieces for name in piece.shapes} >= {"q", "fast", "gate", "delta", "stream"}
        cases = [case for case in listed if case not in pieces]
        assert {case.spec.visibility for case in cases} == {"past", "chunk", "token", "full"}
        assert {type(case.spec.network).__name__ for case in cases} == {"Linear", "SwiGLU", "GLU", "MLP", "DepthwiseConv"}
        assert {case.size.width for case in cases} >= {scale.width, scale.narrow, scale.odd}
        assert {case.size.batch for case in cases} >= {1, scale.many}
        for way in ("splits", "cu_seqlens", "update_tokens", "hidden", "value_width"):
            assert any(getattr(case, way) for case in cases), way
        equal = [case for case in cases if case.name.startswith("equal chunks")]
        assert {case.layout for case in equal} == {"heads", "tokens"}
        assert all(case.spec.chunk % 64 == 0 and "float16" in case.also for case in equal)
        for name in ("rung0", "rung6"):
            spec = systems.ladder(systems.lact_llm(scale.chunk))[name]
            assert any(case.spec == spec for case in cases)


def test_verify_says_that_kernels_are_off_where_none_runs(tmp_path):
    out = tmp_path / "verify.json"
    result = CliRunner().invoke(app, ["verify", "--small", "--device", "cpu", "--out", str(out)], env={VARIABLE: "0"})
    assert result.exit_code == 1
    assert "kernels are off on cpu" in result.output
    assert json.loads(out.read_text())["rows"] == []


def test_a_record_of_verify_has_its_rows_in_the_order_of_cases(monkeypatch):
    monkeypatch.setattr(operators, "why_off", lambda device: None)
    listed = verify_cases(SMALL)

    def attempts(chosen, *args, **options):
        return (operators.described(listed[index], dtype) for index, dtype in reversed(chosen))

    monkeypatch.setattr(operators, "attempts", attempts)
    records = list(operators.verified(CPU, dtypes=["float32"], small=True, only="rung 6, width"))
    names = [case.name for case in listed if "rung 6, width" in case.name]
    assert [[row["case"] for row in record["rows"]] for record in records] == [names[n:] for n in range(len(names), -1, -1)]
    assert [record["complete"] for record in records] == [False] * len(names) + [True]


def test_cases_are_verified_in_the_dtypes_that_they_ask_for_besides(monkeypatch):
    monkeypatch.setattr(operators, "why_off", lambda device: None)
    monkeypatch.setattr(operators, "interpreted", lambda: False)
    monkeypatch.setattr(operators, "attempts", lambda chosen, *_, **__: iter(()))

    def planned(**options):
        return next(operators.verified(CPU, small=True, only="equal chunks, rung 6, head", **options))["planned"]

    assert planned() == 3
    assert planned(dtypes=["bfloat16"]) == 1


def test_verify_refuses_a_name_that_no_case_has():
    with pytest.raises(ValueError, match="only must be part of a case's name"):
        list(operators.verified(CPU, small=True, only="rung 9"))


def test_verify_reports_and_fails_on_the_first_wrong_case(monkeypatch, tmp_path):
    monkeypatch.setattr(operators, "why_off", lambda device: None)
    real = operators.verify

    def some(case, dtype, device):
        if "parallel" in case.name:
            raise RuntimeError("a kernel that does not launch")
        return real(case, dtype, device)

    monkeypatch.setattr(operators, "verify", some)
    out = tmp_path / "verify.json"
    arguments = ["verify", "--small", "--only", "rung 6, width", "--device", "cpu", "--dtype", "float32", "--out", str(out)]
    with without_kernels():
        result = CliRunner().invoke(app, arguments, env={"COLUMNS": "160"})
    assert result.exit_code == 1, result.output
    record = json.loads(out.read_text())
    assert [row["passed"] for row in record["rows"]] == [True, False, True, False]
    assert "a kernel that does not launch" in " ".join(result.output.split())
    assert [row[-1] for row in verify_grid(record).rows] == ["PASS", "FAIL", "PASS", "FAIL"]
    assert summary_grid(record).rows[0][:5] == ("float32", "without", "4", "0", "2")


def test_interpreted_kernels_keep_to_the_rules(monkeypatch):
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs TRITON_INTERPRET=1")
    monkeypatch.setenv(VARIABLE, "force")
    records = list(operators.verified(CPU, small=True, only="rung 6, batch 2, parallel"))
    assert [len(record["rows"]) for record in records] == [0, 1]
    (row,) = records[-1]["rows"]
    assert (row["dtype"], records[-1]["complete"]) == ("float32", True)
    assert row["operators"]
    assert row["passed"], row["problems"]
    with pytest.raises(ValueError, match="dtype must be float32 under TRITON_INTERPRET"):
        list(operators.verified(CPU, dtypes=["bfloat16"], small=True))
