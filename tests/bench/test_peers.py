"""`kvbind bench peers`: peers compute what `ttt` computes, and rows, rates and tables say what was measured."""

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from fla_stand_in import StandIn
from kvbind import NewtonSchulz, systems
from kvbind.bench.app import app
from kvbind.bench.harness.ceilings import Ceilings
from kvbind.bench.harness.named_operands import LAYOUTS, draw_leaves, in_precision, laid_out, run
from kvbind.bench.harness.operands import Size
from kvbind.bench.kernels import peers
from kvbind.bench.kernels.goals import SIZE
from kvbind.bench.kernels.span_peer import span_peer, span_step
from kvbind.bench.tables.peers import peer_grids
from kvbind.forms.on_kernels import fla
from kvbind.inner.systems import RUNGS

CPU = torch.device("cpu")
SMALL = Size(batch=2, tokens=32, heads=2, width=16)
LADDER = systems.ladder(systems.lact_llm(8))
PARALLEL = [name for name in RUNGS if name not in ("rung0", "rung1")]
CEILINGS = Ceilings(matmul_flops=1e12, matmul_size=1024, dtype="bfloat16", copy_bytes=1e11)


def leaves_of(spec, dtype=torch.float32):
    return in_precision(draw_leaves(spec, SMALL, CPU, dtype=torch.float64), dtype, dtype)


def error(found, expected):
    return peers.error_of(found, expected)


@pytest.fixture
def exact_products(monkeypatch):
    """Newton-Schulz of peers in the operands' precision, as that of the inner loop is here."""

    def orthogonal(x, coefficients):
        return NewtonSchulz(coefficients=tuple(coefficients), dtype=torch.float64)(x)

    monkeypatch.setattr(peers, "orthogonal", orthogonal)


def exact(spec):
    return spec.replace(orthogonalize=spec.orthogonalize and spec.orthogonalize.replace(dtype=torch.float64))


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", PARALLEL)
def test_the_parallel_peer_computes_what_ttt_computes_with_every_gradient(name, layout):
    spec = exact(LADDER[name])
    # momentum by a cumulative product loses digits, which float64 has to spare
    leaves = {n: x.requires_grad_() for n, x in laid_out(leaves_of(spec, torch.float64), layout).items()}
    ours, theirs = run(spec, leaves, "recurrent")[0], peers.parallel_peer(leaves, spec)
    # the peer's writes are in float32, as in the released code
    assert error(theirs, ours) < 1e-5
    slope = torch.randn_like(ours)
    for x, y in zip(*(torch.autograd.grad(out, list(leaves.values()), slope) for out in (theirs, ours)), strict=True):
        assert error(x, y) < 1e-4


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("name", ["rung0", "rung1"])
def test_the_recurrent_peer_computes_what_ttt_computes(name):
    spec = exact(LADDER[name])
    leaves = leaves_of(spec, torch.float64)
    found = peers.recurrent_peer(leaves, spec, peers.chunk_step)
    assert error(found, run(spec, leaves, "recurrent")[0]) < 1e-4


def test_peers_orthogonalize_in_bfloat16_as_released():
    x = torch.randn(3, 8, 12)
    found, rule = peers.orthogonal(x, LADDER["rung2"].orthogonalize.coefficients), LADDER["rung2"].orthogonalize
    assert found.dtype == torch.bfloat16
    assert error(found, rule(x)) < 3e-2


def test_peers_are_what_a_user_would_run(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda f: compiled.append(f) or f)
    assert all(peers.peer_of(systems.named(name)).func is peers.fla_peer for name in peers.TOKEN_SIZES)
    assert compiled == []
    parallel = peers.peer_of(LADDER["rung6"])
    assert parallel.func is compiled[-1].func is peers.parallel_peer
    assert peers.peer_of(LADDER["rung0"]).func is peers.recurrent_peer
    assert compiled[-1] is peers.chunk_step


def test_rows_are_every_rung_both_layouts_small_calls_and_token_visibility():
    rows = peers.plan(tuple(RUNGS))
    assert len({row.name for row in rows}) == len(rows)
    named = {row.name: row for row in rows}
    assert set(RUNGS) < set(named)
    assert {row.layout for row in rows} == set(LAYOUTS)
    assert [row.name for row in rows if row.host] == [f"host-{name}" for name in reversed(PARALLEL)]
    assert {row.rung for row in rows if row.layout == "tokens"} == {*PARALLEL, *peers.TOKEN_SIZES, *peers.MINI_BATCHES}
    assert named["rung6"].spec == systems.ladder(systems.lact_llm(2048))["rung6"]
    assert named["linear_attention-12x128"].spec == systems.linear_attention(1)
    delta = {name: named[name].spec for name in ("delta_net-12x128", "gated_delta_net-16x128", "kda-16x128")}
    assert delta == {f"{spec}": systems.named(spec.split("-")[0]) for spec in delta}
    assert not any(row.rung in peers.TOKEN_SIZES for row in peers.plan(("rung6",), replace(SIZE, tokens=64)))


def test_layouts_hold_the_same_numbers():
    leaves = leaves_of(LADDER["rung3"])
    heads = laid_out(leaves, "heads")
    assert all(torch.equal(heads[name], x) for name, x in leaves.items())
    assert heads["q"].transpose(1, 2).is_contiguous()
    assert leaves["q"].is_contiguous()


@pytest.mark.parametrize("host", [False, True])
def test_a_row_compares_rates_errors_and_what_calls_cost_the_host(host, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f: f)
    monkeypatch.setattr(peers, "host_seconds", lambda work, device: 1e-6 * (work() is not None))
    row = peers.PeerRow("rung6", "rung6", SMALL, 8, host=host)
    forward, training = peers.compare(row, CEILINGS, CPU, seconds=0.0)
    assert (forward["pass"], training["pass"]) == ("forward", "training")
    assert forward["difference"] < 2e-2
    for found in (forward, training):
        assert found["ratio_plain"] == found["ours_plain"] / found["peer_plain"]
        assert found["ours_graph"] is None
        assert found["of_limit"] is None
        assert all((f"ours_{what}_us" in found) == host for what in ("host", "host_alone"))


def test_a_peer_that_fails_is_named_and_stops_nothing(monkeypatch):
    def broken(leaves):
        raise RuntimeError("not installed")

    monkeypatch.setattr(peers, "peer_of", lambda spec: broken)
    found = list(peers.compare(peers.PeerRow("rung6", "rung6", SMALL, 8), CEILINGS, CPU, seconds=0.0))
    assert [row["peer_error"] for row in found] == ["RuntimeError: not installed"] * 2
    assert all(row["ours_plain"] and row["ratio_plain"] is None for row in found)


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(fla, "version", lambda name: "0.6.0")
    monkeypatch.setattr(fla, "runs_on", lambda device: True)
    fla.installed.cache_clear()
    fla.loaded.cache_clear()
    with StandIn() as package:
        yield package
    fla.installed.cache_clear()
    fla.loaded.cache_clear()


@pytest.mark.parametrize("name", peers.TOKEN_SIZES)
def test_token_rows_have_the_operator_as_their_peer_and_run_without_it_themselves(name, installed):
    row = peers.PeerRow(f"{name}-2x16", name, SMALL, 1, "tokens")
    forward, training = peers.compare(row, CEILINGS, CPU, seconds=0.0)
    assert forward["difference"] < 1e-2
    for found in (forward, training):
        assert found["name"] == f"{name}-2x16"
        assert found["ratio_plain"] == found["ours_plain"] / found["peer_plain"]
        assert "ours_error" not in found
        assert "peer_error" not in found
    # the peer alone called it: logarithms of gates are made before, as layers make them, and nothing is scaled
    assert all(called["scale"] == 1.0 for _, called in installed.calls)
    assert all((called["g"] is not None) == bool(row.spec.retention) for _, called in installed.calls)
    assert not any(called["q"].requires_grad for _, called in installed.calls[:1])


def test_gradients_of_the_peer_are_those_of_ttt(installed):
    spec = systems.kda()
    leaves = in_precision(leaves_of(spec), torch.bfloat16, torch.float32, grad=True)
    theirs = peers.fla_peer(peers.peer_leaves(leaves, spec), spec)
    ours, slope = run(spec, leaves, "recurrent")[0], torch.randn_like(theirs)
    for x, y in zip(*(torch.autograd.grad(out, list(leaves.values()), slope) for out in (theirs, ours)), strict=True):
        assert error(x, y) < 2e-2


def test_a_token_row_says_why_it_has_no_peer(monkeypatch):
    monkeypatch.setattr(fla, "installed", lambda: "0.5.1")
    (forward, _) = peers.compare(peers.PeerRow("kda-2x16", "kda", SMALL, 1, "tokens"), CEILINGS, CPU, seconds=0.0)
    assert forward["peer_error"].startswith("ImportError: fla-core must be at least 0.6.0 and below 0.7")
    assert forward["ours_plain"]


def test_tables_set_ours_beside_the_peers_and_show_what_is_missing():
    whole = {
        "name": "rung6", "pass": "forward", "ours_plain": 100.0, "peer_plain": 50.0, "ours_graph": 120.0, "peer_graph": 60.0,
        "limit": 240.0, "goal": 90.0,
    }  # fmt: skip
    partial = {
        "name": "rung5",
        "pass": "training",
        "ours_plain": 10.0,
        "peer_error": "ValueError: x",
        "limit": 20.0,
        "goal": None,
    }
    host = whole | {"name": "host-rung6", "ours_host_us": 61.4, "peer_host_us": 80.0, "ours_host_alone_us": 50.0}
    grids = peer_grids({"rows": [row | peers.ratios(row) for row in (whole, partial, host)]})
    table, small = grids
    cells = dict(zip(table.header, table.rows[0], strict=True))
    assert cells["x plain"] == cells["x graph"] == "2.00"
    assert (cells["plain / graph"], cells["goal"], cells["of limit"]) == ("0.83", "90", "50%")
    assert dict(zip(table.header, table.rows[1], strict=True))["x plain"] == "-"
    assert small.rows == (("host-rung6", "fwd", "61", "80", "50", "-"),)
    assert [grid.key for grid in grids] == ["peers", "host"]


def test_the_command_writes_a_record(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "measure_ceilings", lambda *_: CEILINGS)
    monkeypatch.setattr(torch, "compile", lambda f: f)
    out = tmp_path / "peers.json"
    options = ["--tokens", "32", "--chunk", "8", "--width", "16", "--heads", "1", "--seconds", "0", "--device", "cpu"]
    monkeypatch.setattr(peers, "HOST_SIZE", SMALL)
    result = CliRunner().invoke(app, ["peers", "--only", "rung6-tokens", *options, "--out", str(out)])
    assert result.exit_code == 0, result.output
    record = json.loads(out.read_text())
    assert record["complete"]
    assert [row["name"] for row in record["rows"]] == ["rung6-tokens"] * 2
    result = CliRunner().invoke(app, ["peers", "--only", "rung9", *options])
    assert result.exit_code == 2
    assert "only must be in the name of a row" in result.output


@pytest.mark.parametrize("name", peers.MINI_BATCHES)
def test_the_peer_of_mini_batches_computes_what_ttt_computes_with_every_gradient(name):
    spec = systems.named(name)
    leaves = {n: x.requires_grad_() for n, x in leaves_of(spec, torch.float64).items()}
    ours, theirs = run(spec, leaves, "recurrent")[0], span_peer(leaves, spec, span_step)
    assert error(theirs, ours) < 1e-12
    slope = torch.randn_like(ours)
    for x, y in zip(*(torch.autograd.grad(out, list(leaves.values()), slope) for out in (theirs, ours)), strict=True):
        assert error(x, y) < 1e-10


def test_a_row_of_mini_batches_stands_beside_the_form_in_pytorch(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f: f)
    row = peers.PeerRow("ttt_mlp-32", "ttt_mlp", SMALL, 1, "tokens", hidden=32)
    found = list(peers.compare(row, CEILINGS, CPU, seconds=0.0))
    assert found[0]["difference"] < 2e-2
    assert all(row["ratio_form_plain"] == row["ours_plain"] / row["form_plain"] for row in found)
    table = next(grid for grid in peer_grids({"rows": found}) if grid.key == "mini_batches")
    assert [line[:2] for line in table.rows] == [("ttt_mlp-32", "fwd"), ("ttt_mlp-32", "f+b")]
