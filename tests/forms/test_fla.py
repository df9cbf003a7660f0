"""Inner loops on flash-linear-attention's operators: the right one, called by its conventions, or a reason why not.

Its kernels run on GPUs alone. Here a stand-in computes what they promise; on a GPU with the package, they run themselves.
"""

import importlib.util
import json
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvbind
from fla_stand_in import StandIn
from kvbind import Linear, systems
from kvbind.bench.harness.named_operands import arguments, draw_leaves, in_precision, weights_of
from kvbind.bench.harness.operands import Size
from kvbind.forms.on_kernels import dispatch, fla
from kvbind.forms.state import State
from kvbind.forms.validation import check_operands
from kvbind.inner.gates import given_gates
from kvbind.inner.systems.registry import SYSTEMS as SYSTEMS_BY_NAME

GATED = systems.linear_attention().replace(token_lr=True)
SYSTEMS = {
    "linear_attention": systems.linear_attention(),
    "rated_linear_attention": GATED,
    "simple_gla": systems.simple_gla(),
    "gla": systems.gla(),
    "delta_net": systems.delta_net(),
    "ascending_delta_net": systems.delta_net().replace(direction="ascent"),
    "gated_delta_net": systems.gated_delta_net(),
    "kda": systems.kda(),
    "gla_before": systems.gla().replace(retention=systems.kda().retention),
    "linear_attention_of_keys": GATED.replace(query="key", direction="ascent"),
}
FUNCTIONS = {
    "linear_attention": "chunk_simple_gla",
    "simple_gla": "chunk_simple_gla",
    "gla": "chunk_gla",
    "delta_net": "chunk_delta_rule",
    "gated_delta_net": "chunk_gated_delta_rule",
    "kda": "chunk_kda",
}
REFUSED = {
    "gdn2": "erase=True",
    "comba": "erase=True",
    "rwkv7": "writes=2",
    "delta_product": "writes=2",
    "titans": "network is MLP",
    "ttt_mlp": "network is MLP",
    "lact_llm": "network is SwiGLU",
    "ttt_linear": "network is Linear(bias=True",
}


FOUND_OUT = (fla.installed, fla.loaded)


@pytest.fixture(autouse=True)
def _forgotten(monkeypatch):
    """What was found out about the package is found out anew in each test."""
    monkeypatch.delenv("KVBIND_FLA", raising=False)
    for function in FOUND_OUT:
        function.cache_clear()
    yield
    for function in FOUND_OUT:
        function.cache_clear()


@pytest.fixture
def standin(monkeypatch):
    monkeypatch.setattr(fla, "version", lambda name: "0.6.0")
    monkeypatch.setattr(fla, "runs_on", lambda device: True)
    with StandIn() as package:
        yield package


SMALL = Size(2, 13, 2, 16)


def leaves_of(spec, size=SMALL, values=24, seed=0):
    """Operands that bfloat16 holds exactly, in float64."""
    drawn = draw_leaves(spec, size, torch.device("cpu"), value_width=values, dtype=torch.float64, seed=seed)
    return {name: x.bfloat16().double() for name, x in drawn.items()}


def call_of(spec, leaves, state=None, cu_seqlens=None):
    given_ = arguments(spec, leaves)
    q, k, v, lr = (given_.pop(name) for name in ("q", "k", "v", "lr"))
    weights = None if state is not None else weights_of(leaves)
    return check_operands(spec, weights, q, k, v, lr, given_gates(**given_), state, cu_seqlens, None)


def on_operator(spec, leaves, **options):
    call = call_of(spec, leaves, **options)
    assert fla.obstacle(spec, call) is None
    output, state = fla.run_fla(spec, call)
    return output.transpose(1, 2), state


def by_definition(spec, leaves, **options):
    weights = None if "state" in options else weights_of(leaves)
    return kvbind.ttt(spec, weights, **arguments(spec, leaves), form="recurrent", **options)


def error(found, exact):
    return ((found.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-30)).item()


def gradients(run, spec, leaves, slopes):
    asked = {name: x.detach().clone().requires_grad_() for name, x in leaves.items() if name != "q" or spec.query == "query"}
    output, state = run(spec, leaves | asked)
    found = torch.autograd.grad((output, state.weights["out"]), list(asked.values()), [s.to(x) for s, x in zip(
        slopes, (output, state.weights["out"]), strict=True)])  # fmt: skip
    return dict(zip(asked, found, strict=True))


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_states_and_gradients_are_those_of_the_definition(name, dtype, standin, monkeypatch):
    spec, leaves = SYSTEMS[name], leaves_of(SYSTEMS[name])
    monkeypatch.setattr(fla, "DTYPES", (torch.float32, torch.bfloat16))
    if dtype == torch.float32 and name.endswith("delta_net") and spec.loss == "squared" and not spec.retention:
        pytest.skip("refused by the operator")
    exact, end = by_definition(spec, leaves)
    output, state = on_operator(spec, in_precision(leaves, dtype, torch.float32))
    assert output.dtype == dtype
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    assert error(output, exact) < bound
    assert error(state.weights["out"], end.weights["out"]) < bound
    slopes = [torch.randn(x.shape, dtype=torch.float64) for x in (exact, end.weights["out"])]
    expected = gradients(by_definition, spec, leaves, slopes)
    for leaf, found in gradients(on_operator, spec, in_precision(leaves, dtype, torch.float32), slopes).items():
        assert error(found, expected[leaf]) < 2 * bound, leaf
    assert all(called["scale"] == 1.0 for _, called in standin.calls)
    if name in FUNCTIONS:
        assert {called for called, _ in standin.calls} == {FUNCTIONS[name]}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_call_goes_on_from_a_state(name, standin):
    spec, leaves = SYSTEMS[name], leaves_of(SYSTEMS[name])
    narrow = in_precision(leaves, torch.bfloat16, torch.float32)

    def cut(leaves, start, stop):
        return {n: x if n.startswith("weights.") else x[:, start:stop] for n, x in leaves.items()}

    exact, end = by_definition(spec, leaves)
    first, state = on_operator(spec, cut(narrow, 0, 5))
    second, state = on_operator(spec, cut(narrow, 5, 13), state=state)
    assert error(torch.cat((first, second), 1), exact) < 1e-2
    assert error(state.weights["out"], end.weights["out"]) < 1e-2
    assert isinstance(state, State)
    state.check()
    # a state is the library's own, whatever made it
    assert by_definition(spec, cut(narrow, 0, 3), state=state)[0].isfinite().all()


@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4), name=st.sampled_from(sorted(FUNCTIONS)))
def test_packed_sequences_are_those_of_calls_of_their_own(lengths, name):
    spec, bounds = SYSTEMS[name], [0, *torch.tensor(lengths).cumsum(0).tolist()]
    leaves = leaves_of(spec, Size(1, bounds[-1], 2, 16))
    leaves["weights.out"] = torch.randn(len(lengths), *leaves["weights.out"].shape).bfloat16().double()
    narrow = in_precision(leaves, torch.bfloat16, torch.float32)
    with pytest.MonkeyPatch.context() as patch, StandIn():
        for function in FOUND_OUT:
            function.cache_clear()
        patch.setattr(fla, "version", lambda name: "0.6.0")
        patch.setattr(fla, "runs_on", lambda device: True)
        output, state = on_operator(spec, narrow, cu_seqlens=bounds)
    for i, (start, stop) in enumerate(pairwise(bounds)):
        own = {n: x[i] if n.startswith("weights.") else x[:, start:stop] for n, x in leaves.items()}
        exact, end = by_definition(spec, own)
        assert error(output[:, start:stop], exact) < 1e-2
        assert error(state.weights["out"][i], end.weights["out"][0]) < 1e-2


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("where", ["k", "lr.out", "retention", "q", "weights.out"])
def test_what_is_not_finite_reaches_what_sees_it_alone(where, packed, standin):
    spec = SYSTEMS["gated_delta_net"]
    leaves = in_precision(leaves_of(spec, Size(1, 13, 2, 16)), torch.bfloat16, torch.float32)
    bounds = [0, 4, 9, 13] if packed else None
    sequences = 3 if packed else 1
    leaves["weights.out"] = leaves["weights.out"].expand(sequences, -1, -1, -1).clone()
    clean, _ = on_operator(spec, leaves, cu_seqlens=bounds)
    wrong = {name: x.clone() for name, x in leaves.items()}
    if where == "weights.out":
        # the second sequence of those packed; values are looked at before a call on a CPU, states are not
        call = call_of(spec, leaves, cu_seqlens=bounds)
        call.state.tensors["weights.out"][sequences // 2, 0, 0, 0] = torch.inf
        output, state = fla.run_fla(spec, call)
        output = output.transpose(1, 2)
    else:
        wrong[where][0, 6, 0] = torch.nan
        output, state = on_operator(spec, wrong, cu_seqlens=bounds)
    sees = torch.zeros(13, dtype=torch.bool)
    start, stop = (4, 9) if packed else (0, 13)
    sees[{"q": slice(6, 7), "weights.out": slice(start, stop)}.get(where, slice(6, stop))] = True
    assert output[0, sees, 0].isnan().all()
    assert torch.equal(output[0, ~sees], clean[0, ~sees])
    assert torch.equal(output[0, :, 1], clean[0, :, 1])
    ends = state.weights["out"].isnan().flatten(2).all(-1)
    expected = torch.zeros(sequences, 2, dtype=torch.bool)
    expected[sequences // 2, 0] = where != "q"
    assert torch.equal(ends, expected)


def test_gates_are_logarithms_down_to_none(standin):
    spec = SYSTEMS["kda"]
    leaves = in_precision(leaves_of(spec, Size(1, 4, 1, 16)), torch.bfloat16, torch.float32)
    leaves["retention"] = (
        torch.tensor([1.0, 1e-30, 0.0, 0.5])[None, :, None, None].expand(1, 4, 1, 16).clone().requires_grad_()
    )
    output, _ = on_operator(spec, leaves)
    g = standin.calls[-1][1]["g"]
    assert g.dtype == torch.float32
    assert torch.allclose(g[0, :, 0, 0], torch.tensor([0.0, -69.0776, -69.0776, -0.6931]), atol=1e-3)
    assert torch.autograd.grad(output.float().square().sum(), leaves["retention"])[0].isfinite().all()


@pytest.mark.parametrize("name", sorted(SYSTEMS_BY_NAME))
def test_each_system_has_an_operator_or_a_reason(name):
    spec = systems.named(name)
    found = fla.operator_of(spec)
    assert isinstance(found, str) == (name not in {*FUNCTIONS, "retnet", "mamba2"}), name
    if name in REFUSED:
        assert REFUSED[name] in found
    if isinstance(found, str):
        assert fla.obstacle(spec) == found


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        ({"network": kvbind.GLU()}, "network is GLU"),
        ({"visibility": "past"}, "visibility='past'"),
        ({"chunk": 4}, "chunk=4"),
        ({"momentum": True}, "momentum=True"),
        ({"clip": True}, "clip=True"),
        ({"steps": 2}, "steps=2"),
        ({"retention": True}, "before their decay"),
        ({"step_rate": True}, "step_rate=True"),
        ({"refresh": 4}, "refresh=4"),
        ({"window": 2}, "window=2"),
        ({"network": Linear(bias=True)}, "network is Linear(bias=True"),
    ],
)
def test_a_field_that_no_operator_has_is_named(edit, reason):
    assert reason in fla.operator_of(SYSTEMS["delta_net"].replace(**edit))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda x: {n: y.float() for n, y in x.items()},
            "must all be bfloat16 or all float16; got float32, float32, float32",
        ),
        (lambda x: x | {"k": x["k"].float()}, "got bfloat16, float32, bfloat16"),
        (lambda x: x | {"weights.out": x["weights.out"].double()}, None),
        (lambda x: leaves_of(SYSTEMS["kda"], Size(1, 4, 1, 272)), "got float64"),
    ],
)
def test_operands_that_no_operator_takes_are_named(change, reason, standin):
    leaves = change(in_precision(leaves_of(SYSTEMS["kda"], Size(1, 4, 1, 16)), torch.bfloat16, torch.float32))
    found = fla.obstacle(SYSTEMS["kda"], call_of(SYSTEMS["kda"], leaves))
    assert (reason in found) if reason else found is None


def test_wide_heads_and_tokens_that_do_not_write_are_named(standin):
    spec = SYSTEMS["kda"]
    wide = in_precision(leaves_of(spec, Size(1, 4, 1, 272)), torch.bfloat16, torch.float32)
    assert "at most 256 channels; got 272" in fla.obstacle(spec, call_of(spec, wide))
    narrow = in_precision(leaves_of(spec, Size(1, 4, 1, 16)), torch.bfloat16, torch.float32)
    assert "packed sequences must each have a token" in fla.obstacle(spec, call_of(spec, narrow, cu_seqlens=[0, 0, 4]))
    given_ = arguments(spec, narrow)
    q, k, v, lr = (given_.pop(name) for name in ("q", "k", "v", "lr"))
    call = check_operands(spec, weights_of(narrow), q, k, v, lr, given_gates(**given_), None, None, slice(0, 2))
    assert "all tokens must write" in fla.obstacle(spec, call)


@pytest.mark.parametrize(
    ("found", "fits"), [("0.6.0", True), ("0.6.3", True), ("0.5.1", False), ("0.7", False), ("x", False)]
)
def test_another_version_is_named_and_not_imported(found, fits, standin, monkeypatch):
    monkeypatch.setattr(fla, "version", lambda name: found)
    reason = fla.obstacle(SYSTEMS["kda"])
    if fits:
        assert reason is None
    else:
        assert reason == f"fla-core must be at least 0.6.0 and below 0.7, of which calls are known; {found} is installed"
        assert fla.loaded.cache_info().misses == 0


def test_an_operator_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(fla, "version", lambda name: "0.6.0")
    with StandIn(without=("kda",)):
        reason = fla.obstacle(SYSTEMS["kda"])
        assert "fla.ops.kda.chunk_kda of fla-core 0.6.0 cannot be imported" in reason
        assert "chunk_kda" in reason
        assert fla.obstacle(SYSTEMS["delta_net"]) is None


def test_the_switch_and_an_environment_without_the_package(monkeypatch, standin):
    monkeypatch.setenv("KVBIND_FLA", "0")
    assert fla.obstacle(SYSTEMS["kda"]) == "KVBIND_FLA=0"
    monkeypatch.setenv("KVBIND_FLA", "1")
    assert fla.obstacle(SYSTEMS["kda"]) is None


@pytest.mark.skipif(importlib.util.find_spec("fla") is not None, reason="the package is installed")
def test_without_the_package_nothing_is_imported():
    assert fla.obstacle(SYSTEMS["kda"]) == "flash-linear-attention is not installed"
    assert not any(name == "fla" or name.startswith("fla.") for name in sys.modules)


@pytest.mark.parametrize(
    ("name", "triton", "tilelang", "capability", "refused"),
    [
        ("gated_delta_net", "3.6.0", False, (9, 0), "Triton 3.7.1 or tilelang would give them"),
        ("gated_delta_net", "3.6.0", True, (9, 0), None),
        ("gated_delta_net", "3.7.1", False, (9, 0), None),
        ("gated_delta_net", "3.3.1", False, (9, 0), None),
        ("gated_delta_net", "3.6.0", False, (8, 0), None),
        ("simple_gla", "3.6.0", True, (9, 0), "Triton 3.7.1 would give them"),
        ("linear_attention", "3.6.0", False, (9, 0), None),
        ("delta_net", "3.6.0", False, (9, 0), None),
        ("kda", "3.6.0", False, (9, 0), None),
        ("gla", "3.6.0", False, (9, 0), None),
    ],
)
def test_gradients_that_are_wrong_on_hopper_are_refused(name, triton, tilelang, capability, refused, monkeypatch):
    monkeypatch.setattr(fla, "_triton", lambda: fla.Version(triton))
    monkeypatch.setattr(fla, "_has_tilelang", lambda: tilelang)
    monkeypatch.setattr(fla, "capability", lambda index: capability)
    monkeypatch.delenv("FLA_TILELANG", raising=False)
    found = fla.gradients_refused(fla.operator_of(SYSTEMS[name]), torch.device("cuda:0"))
    assert found is None if refused is None else refused in found
    assert fla.gradients_refused(fla.operator_of(SYSTEMS[name]), torch.device("cpu")) is None
    if tilelang:
        monkeypatch.setenv("FLA_TILELANG", "0")
        assert fla.gradients_refused(fla.operator_of(SYSTEMS[name]), torch.device("cuda:0")) is not None


def test_calls_run_on_it_where_nothing_of_the_library_does(standin, monkeypatch, caplog):
    fla._said.clear()
    caplog.set_level("INFO", logger="kvbind")
    spec = SYSTEMS["kda"]
    monkeypatch.setattr(dispatch, "own_engine", lambda spec, call, form: None)
    leaves = in_precision(leaves_of(spec), torch.bfloat16, torch.float32)
    exact, _ = by_definition(spec, leaves_of(spec))
    for _ in range(2):
        output, state = kvbind.ttt(spec, weights_of(leaves), **arguments(spec, leaves))
    assert error(output, exact) < 1e-2
    assert [name for name, _ in standin.calls] == ["chunk_kda"] * 2
    (line,) = [record.getMessage() for record in caplog.records]
    assert "runs on fla.ops.kda.chunk_kda of fla-core 0.6.0: no kernel of the library takes it" in line
    # one token after another is the recurrent form, which it does not run
    one = {name: x if name.startswith("weights.") else x[:, :1] for name, x in leaves.items()}
    kvbind.ttt(spec, None, **arguments(spec, one), state=state)
    kvbind.ttt(spec, weights_of(leaves), **arguments(spec, leaves), form="recurrent")
    assert len(standin.calls) == 2
    monkeypatch.setenv("KVBIND_FLA", "0")
    off, _ = kvbind.ttt(spec, weights_of(leaves), **arguments(spec, leaves))
    assert error(off, exact) < 1e-2
    assert len(standin.calls) == 2


@given(lengths=st.lists(st.integers(0, 6), min_size=1, max_size=4))
def test_a_packed_call_runs_on_it_in_one_go_or_falls_back(lengths):
    spec, bounds = SYSTEMS["gated_delta_net"], [0, *torch.tensor(lengths).cumsum(0).tolist()]
    leaves = in_precision(leaves_of(spec, Size(1, bounds[-1], 2, 16)), torch.bfloat16, torch.float32)
    with pytest.MonkeyPatch.context() as patch, StandIn() as package:
        for function in FOUND_OUT:
            function.cache_clear()
        patch.setattr(fla, "version", lambda name: "0.6.0")
        patch.setattr(fla, "runs_on", lambda device: True)
        patch.setattr(dispatch, "own_engine", lambda spec, call, form: None)
        output, state = kvbind.ttt(spec, weights_of(leaves), **arguments(spec, leaves), cu_seqlens=bounds)
        whole = bounds[-1] > 1 and all(lengths)
        assert not whole or [len(called["cu_seqlens"]) for _, called in package.calls] == [len(bounds)]
    exact, end = by_definition(spec, leaves, cu_seqlens=bounds)
    if bounds[-1]:
        assert error(output, exact) < 1e-2
    assert error(state.weights["out"], end.weights["out"]) < 1e-2


@pytest.mark.parametrize("faster", [(), ("forward",), ("forward", "training")])
def test_the_faster_one_runs(faster, standin, monkeypatch):
    spec = SYSTEMS["delta_net"]
    operators = [replace(x, faster=faster) if x.module == "delta_rule" else x for x in fla.OPERATORS]
    monkeypatch.setattr(fla, "OPERATORS", tuple(operators))
    leaves = in_precision(leaves_of(spec), torch.bfloat16, torch.float32)

    def ours(spec, call):
        raise AssertionError

    assert (fla.faster_of(spec, call_of(spec, leaves), ours).run is ours) == (not faster)
    trained = fla.faster_of(spec, call_of(spec, {n: x.requires_grad_() for n, x in leaves.items()}), ours)
    assert (trained.run is ours) == ("training" not in faster)
    assert "measured to be faster" in trained.why
    float32 = fla.faster_of(spec, call_of(spec, {n: x.float() for n, x in leaves.items()}), ours)
    assert float32.run is ours
    assert "it fits; flash-linear-attention: q, k and v must all be bfloat16" in float32.why
    assert fla.faster_of(SYSTEMS["kda"].replace(momentum=True), call_of(spec, leaves), ours).run is ours
    monkeypatch.setenv("KVBIND_FLA", "force")
    assert fla.faster_of(spec, call_of(spec, leaves), ours).why == "KVBIND_FLA=force"


def test_what_is_said_to_be_faster_was_measured():
    record = json.loads((Path(__file__).parents[2] / "results/bench/peers-h200.json").read_text())
    measured = {}
    for row in record["rows"]:
        name = row["name"].rpartition("-")[0]
        if name in FUNCTIONS and row["ratio_plain"] is not None:
            measured.setdefault((FUNCTIONS[name], row["pass"]), []).append(row["ratio_plain"])
    for operator in fla.OPERATORS:
        # rows of linear attention have no decay
        assert operator.faster == () or operator.module != "simple_gla" or operator.gate is None
        for name in operator.faster:
            assert max(measured[operator.function, name]) < 1, operator


@pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("fla") is None, reason="needs a GPU and the package"
)
@pytest.mark.parametrize("bounds", [None, [0, 3, 70, 200]])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_operators_themselves(name, bounds, monkeypatch):
    monkeypatch.setenv("KVBIND_FLA", "force")
    spec, count = SYSTEMS[name], 1 if bounds is None else len(bounds) - 1
    leaves = leaves_of(spec, Size(1, 200, 2, 64), values=64)
    leaves["weights.out"] = torch.randn(count, *leaves["weights.out"].shape).bfloat16().double()
    narrow = {n: x.cuda() for n, x in in_precision(leaves, torch.bfloat16, torch.float32).items()}
    slopes = [torch.randn(1, 200, 2, 64, dtype=torch.float64), torch.randn(count, 2, 64, 64, dtype=torch.float64)]

    def on_gpu(spec, leaves):
        return kvbind.ttt(spec, weights_of(leaves), **arguments(spec, leaves), cu_seqlens=bounds)

    exact, end = by_definition(spec, leaves, cu_seqlens=bounds)
    with torch.no_grad():
        assert fla.obstacle(spec, call_of(spec, narrow, cu_seqlens=bounds)) is None
        output, state = on_gpu(spec, narrow)
    assert error(output.cpu(), exact) < 1e-2
    assert error(state.weights["out"].cpu(), end.weights["out"]) < 1e-2
    refused = fla.gradients_refused(fla.operator_of(spec), torch.device("cuda"))
    found = gradients(on_gpu, spec, narrow, slopes)
    trained = call_of(spec, {n: x.detach().requires_grad_() for n, x in narrow.items()}, cu_seqlens=bounds)
    assert fla.obstacle(spec, trained) == refused
    expected = gradients(lambda spec, leaves: by_definition(spec, leaves, cu_seqlens=bounds), spec, leaves, slopes)
    for leaf, x in found.items():
        # of gates by their logarithm, whose error is divided by the gate
        assert error(x.cpu(), expected[leaf]) < (5e-2 if leaf == "retention" else 2e-2), leaf
