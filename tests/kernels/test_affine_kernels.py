"""The delta rule and its kin, as kernels, against the recurrence in float64 and against the recurrent form of `ttt`."""

import math
import os
from itertools import pairwise

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("kernels need a GPU or TRITON_INTERPRET=1", allow_module_level=True)

from hypothesis import given, settings
from hypothesis import strategies as st

import kvbind
from kvbind.bench.harness.kernel_switch import operators_of
from kvbind.forms.on_kernels import delta
from kvbind.kernels.affine import operator
from kvbind.kernels.affine.launches import IN_ORDER, AffineCall, constants_of
from kvbind.kernels.affine.operator import affine_chunks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PLAIN = ("q", "k", "v")
EVERY = (*PLAIN, "rate", "erase", "gate", "state")
BOUNDS = (0, 1, 1, 20, 40)
GATES = {
    "near": lambda u: 0.5 + 0.5 * u,
    "small": lambda u: 10 ** (-30 * u.square()),
    "zero": lambda u: torch.where(u < 0.2, 0.0, u),
    "one": torch.ones_like,
}


@pytest.fixture(autouse=True)
def _exact():
    """Products of float32 in float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def recurrence(q, k, v, rate=None, erase=None, gate=None, state=None, *, gate_acts="before", residual=True):
    """The definition: one state after another."""
    held = q.new_zeros(q.shape[0], *q.shape[2:], v.shape[-1]) if state is None else state
    read, outputs = (k if erase is None else erase), []
    for t in range(q.shape[1]):
        kept = held
        if gate is not None:
            kept = (gate[:, t, :, None, None] if gate.dim() == 3 else gate[:, t, :, :, None]) * held
        seen = kept if gate_acts == "before" else held
        write = v[:, t] - torch.einsum("bhk,bhkv->bhv", read[:, t], seen) if residual else v[:, t]
        if rate is not None:
            write = rate[:, t, :, None] * write
        held = kept + k[:, t, :, :, None] * write[:, :, None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], held))
    return torch.stack(outputs, 1), held


def draw(tokens, names, *, key=16, value=16, batch=1, heads=1, channel=False, gates="near", sequences=None,
         dtype=torch.float32, seed=0):  # fmt: skip
    """Operands that `dtype` holds exactly, by name."""
    g = torch.Generator().manual_seed(seed)
    rows = (batch, tokens, heads)

    def unit(*shape):
        return torch.nn.functional.normalize(torch.randn(*shape, generator=g), dim=-1)

    made = {
        "q": unit(*rows, key).to(dtype),
        "k": unit(*rows, key).to(dtype),
        "v": torch.randn(*rows, value, generator=g).to(dtype),
        "rate": torch.rand(rows, generator=g),
        "erase": unit(*rows, key).to(dtype),
        "gate": GATES[gates](torch.rand((*rows, key) if channel else rows, generator=g)),
        "state": torch.randn(sequences or batch, heads, key, value, generator=g),
    }
    return {name: x.to(DEVICE) for name, x in made.items() if name in names}


def results(function, operands, options, dtype=None):
    """Outputs, end state and every gradient, by name, for cotangents that depend on shapes alone."""
    operands = {name: (x if dtype is None else x.to(dtype)).detach().requires_grad_() for name, x in operands.items()}
    found = function(**operands, **options)
    g = torch.Generator().manual_seed(7)
    cotangents = [torch.randn(x.shape, generator=g).bfloat16().to(x) for x in found]
    gradients = torch.autograd.grad(found, list(operands.values()), cotangents)
    return dict(zip(("output", "end", *operands), (*found, *gradients), strict=True))


def error(found, exact):
    return ((found.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()


def worst(found, exact):
    assert found.keys() == exact.keys()
    errors = {name: error(x, exact[name]) for name, x in found.items()}
    # not a plain maximum, which passes NaN over
    name = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
    return errors[name], name


CASES = {
    "plain": (PLAIN, {"tokens": 40}, {}),
    "rates and a state, chunks of 64": ((*PLAIN, "rate", "state"), {"tokens": 70, "heads": 2}, {"chunk": 64}),
    "one token": ((*PLAIN, "rate", "gate", "state"), {"tokens": 1}, {}),
    "erased elsewhere": ((*PLAIN, "rate", "erase"), {"tokens": 35}, {}),
    "gates before": ((*PLAIN, "rate", "gate", "state"), {"tokens": 40, "key": 24, "value": 40}, {}),
    "gates after": (EVERY, {"tokens": 40}, {"gate_acts": "after"}),
    "gates of 1": ((*PLAIN, "gate"), {"tokens": 20, "gates": "one"}, {}),
    "small gates": ((*PLAIN, "rate", "gate", "state"), {"tokens": 40, "gates": "small"}, {}),
    "small gates after": (EVERY, {"tokens": 40, "gates": "small"}, {"gate_acts": "after"}),
    "gates of 0": ((*PLAIN, "rate", "gate", "state"), {"tokens": 40, "gates": "zero"}, {}),
    "without a residual": ((*PLAIN, "rate", "gate"), {"tokens": 40}, {"residual": False}),
    "channels": ((*PLAIN, "rate", "gate", "state"), {"tokens": 36, "channel": True}, {}),
    "channels after": (EVERY, {"tokens": 36, "channel": True, "key": 24}, {"gate_acts": "after"}),
    "channels, erased elsewhere": (EVERY, {"tokens": 20, "channel": True, "heads": 2}, {}),
    "channels, small gates": ((*PLAIN, "rate", "gate"), {"tokens": 36, "channel": True, "gates": "small"}, {}),
    "channels, gates of 0": (EVERY, {"tokens": 36, "channel": True, "gates": "zero"}, {"gate_acts": "after"}),
    "channels without a residual": ((*PLAIN, "gate"), {"tokens": 36, "channel": True}, {"residual": False}),
    "channels, chunks of 64": ((*PLAIN, "gate"), {"tokens": 65, "channel": True}, {"chunk": 64}),
    "wide keys": ((*PLAIN, "rate", "gate"), {"tokens": 20, "key": 136, "value": 16}, {}),
    "two rows": ((*PLAIN, "rate", "gate", "state"), {"tokens": 20, "batch": 2, "value": 48}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_recurrence(case):
    names, sizes, options = CASES[case]
    operands = draw(names=names, **sizes)
    exact = results(recurrence, operands, {x: y for x, y in options.items() if x != "chunk"}, torch.float64)
    size, name = worst(results(affine_chunks, operands, {"chunk": 16} | options), exact)
    assert size < 1e-5, name


@pytest.mark.parametrize("channel", [False, True], ids=["heads", "channels"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_operands_lose_little(dtype, channel):
    operands = draw(40, EVERY, dtype=dtype, channel=channel)
    exact = results(recurrence, operands, {}, torch.float64)
    found = results(affine_chunks, operands, {"chunk": 32})
    assert found["output"].dtype == found["q"].dtype == dtype
    assert found["end"].dtype == found["rate"].dtype == torch.float32
    size, name = worst(found, exact)
    assert size < 1e-2, name


@pytest.mark.parametrize("channel", [False, True], ids=["heads", "channels"])
def test_packed_sequences_are_apart(channel):
    operands = draw(40, EVERY, channel=channel, sequences=4)

    def apart(state, **o):
        each = []
        for n, (start, stop) in enumerate(pairwise(BOUNDS)):
            begun = state[n : n + 1]
            part = {name: x[:, start:stop] for name, x in o.items()}
            each.append(recurrence(**part, state=begun) if stop > start else (o["v"][:, :0], begun))
        return tuple(torch.cat(x, dim) for dim, x in zip((1, 0), zip(*each, strict=True), strict=True))

    exact = results(apart, operands, {}, torch.float64)
    cu = torch.tensor(BOUNDS, dtype=torch.int32, device=DEVICE)
    size, name = worst(results(affine_chunks, operands, {"boundaries": cu, "chunk": 16}), exact)
    assert size < 1e-5, name


PARTS = {
    "delta": ((*PLAIN, "rate", "state"), {}),
    "gated": (EVERY, {}),
    "small gates": ((*PLAIN, "rate", "gate"), {"gates": "small"}),
    "no residual": ((*PLAIN, "gate", "state"), {}),
    "channels": (EVERY, {"channel": True}),
    "wide keys": ((*PLAIN, "rate", "gate"), {"key": 136}),
}


@pytest.mark.parametrize("packed", [False, True], ids=["alone", "packed"])
@pytest.mark.parametrize("case", PARTS)
def test_parts_of_a_sequence_run_at_once(case, packed, monkeypatch):
    (names, sizes), bounds = PARTS[case], (0, 1, 1, 30, 150)
    monkeypatch.setattr(operator, "parts_of", lambda *_: 4)
    operands = draw(150, names, sequences=4 if packed else None, **{"key": 16, "value": 32} | sizes)
    residual = {"residual": case != "no residual"}

    def apart(state=None, **o):
        each = []
        for n, (start, stop) in enumerate(pairwise(bounds if packed else (0, 150))):
            begun = o["q"].new_zeros(1, 1, o["q"].shape[-1], 32) if state is None else state[n : n + 1]
            part = {name: x[:, start:stop] for name, x in o.items()}
            each.append(recurrence(**part, state=begun, **residual) if stop > start else (o["v"][:, :0], begun))
        return tuple(torch.cat(x, dim) for dim, x in zip((1, 0), zip(*each, strict=True), strict=True))

    exact = results(apart, operands, {}, torch.float64)
    cu = {"boundaries": torch.tensor(bounds, device=DEVICE)} if packed else {}
    size, name = worst(results(affine_chunks, operands, {"chunk": 16} | residual | cu), exact)
    assert size < 1e-5, name


def test_operands_may_be_views():
    """Queries, keys and values side by side in one projection; heads before tokens; channels apart."""
    operands = draw(20, EVERY, heads=2)
    exact = results(recurrence, operands, {}, torch.float64)
    joined = torch.stack([operands[name] for name in PLAIN], 2)
    views = dict(zip(PLAIN, joined.unbind(2), strict=True))
    views["v"] = operands["v"].transpose(1, 2).contiguous().transpose(1, 2)
    views["erase"] = operands["erase"].mT.contiguous().mT
    views["rate"] = operands["rate"].mT.contiguous().mT
    assert not any(x.is_contiguous() for x in views.values())
    size, name = worst(results(affine_chunks, operands | views, {"chunk": 16}), exact)
    assert size < 1e-5, name


@settings(max_examples=8)
@given(
    st.integers(1, 40), st.sampled_from([16, 20]), st.sampled_from([16, 33]), st.sampled_from(["before", "after"]),
    st.sampled_from([None, False, True]), st.sampled_from(list(GATES)), st.booleans(), st.booleans(), st.integers(0, 1000),
)  # fmt: skip
def test_any_call_equals_the_recurrence(tokens, key, value, acts, channel, gates, erase, state, seed):
    names = [*PLAIN, "rate"] + [name for name, there in (("erase", erase), ("state", state)) if there]
    names += [] if channel is None else ["gate"]
    operands = draw(tokens, names, key=key, value=value, channel=bool(channel), gates=gates, seed=seed)
    exact = results(recurrence, operands, {"gate_acts": acts}, torch.float64)
    size, name = worst(results(affine_chunks, operands, {"gate_acts": acts, "chunk": 16}), exact)
    assert size < 1e-5, name


SYSTEMS = {
    "delta": kvbind.systems.delta_net(),
    "ascent": kvbind.systems.delta_net().replace(direction="ascent"),
    "gated": kvbind.systems.gated_delta_net(),
    "comba": kvbind.systems.comba(),
    "product": kvbind.systems.delta_product(),
    "kda": kvbind.systems.kda(),
    "gdn2": kvbind.systems.gdn2(),
    "rwkv7": kvbind.systems.rwkv7(),
    "gla": kvbind.systems.gla(),
}


def call(name, tokens=20, seed=0):
    """An inner loop, and the arguments of `ttt` besides its weights."""
    spec, g = SYSTEMS[name], torch.Generator().manual_seed(seed)
    rows = tokens * spec.writes

    def unit(count):
        return torch.nn.functional.normalize(torch.randn(1, count, 1, 16, generator=g), dim=-1)

    given = {"q": unit(tokens), "k": unit(rows), "v": torch.randn(1, rows, 1, 16, generator=g)}
    if spec.token_lr:
        given["lr"] = torch.rand(1, rows, 1, generator=g)
    for gate in spec.gates.values():
        if gate.chunk == "own":
            given[gate.name] = unit(rows)
        else:
            given[gate.name] = 0.5 + 0.5 * torch.rand((1, tokens, 1, *([16] if gate.per == "key" else [])), generator=g)
    return spec, {x: y.to(DEVICE) for x, y in given.items()}, torch.randn(1, 16, 16, generator=g).to(DEVICE)


@pytest.mark.parametrize(
    ("name", "packed"), [*((name, False) for name in SYSTEMS), ("gated", True), ("product", True), ("kda", True)]
)
def test_ttt_takes_it(name, packed, monkeypatch):
    spec, given, weights = call(name)
    bounds = {"cu_seqlens": (0, 3, 3, 20)} if packed else {}

    def run(weights, form="auto", **given):
        y, state = kvbind.ttt(spec, {"out": weights}, **given, **bounds, form=form)
        return y, state.weights["out"]

    monkeypatch.setenv("KVBIND_KERNELS", "force" if DEVICE == "cpu" else "1")
    assert operators_of(lambda: run(weights, **given)) == ("affine_chunks",)
    found = results(run, {"weights": weights, **given}, {})
    monkeypatch.setenv("KVBIND_KERNELS", "0")
    assert operators_of(lambda: run(weights, **given)) == ()
    exact = results(run, {"weights": weights, **given}, {"form": "recurrent"}, torch.float64)
    size, where = worst(found, exact)
    assert size < 1e-5, where


@pytest.mark.parametrize(
    ("name", "where"), [("gated", "q"), ("gated", "v"), ("gated", "lr"), ("kda", "q"), ("kda", "k"), ("kda", "retention")]
)
def test_outputs_that_do_not_see_what_is_not_finite_stay(name, where, monkeypatch):
    monkeypatch.setenv("KVBIND_KERNELS", "force" if DEVICE == "cpu" else "1")
    spec, given, weights = call(name, tokens=70)
    changed = {x: y.clone() for x, y in given.items()}
    changed[where][0, 66] = math.nan
    seen = []
    for operands in (given, changed):
        leaves = {x: y.clone().requires_grad_() for x, y in operands.items()}
        y, _ = kvbind.ttt(spec, {"out": weights}, **leaves)
        gradients = torch.autograd.grad(y[:, :66].sum(), list(leaves.values()))
        seen.append((y, [x[:, :66] for x in gradients]))
    (y, gradients), (z, after) = seen
    assert torch.equal(z[:, :66], y[:, :66])
    assert all(map(torch.equal, gradients, after))
    wrong = ~z[:, 66:].isfinite().all(-1)
    assert wrong[:, 0].all()
    assert wrong.all() == (where != "q")


def test_state_goes_on_from_call_to_call(monkeypatch):
    monkeypatch.setenv("KVBIND_KERNELS", "force" if DEVICE == "cpu" else "1")
    spec, given, weights = call("kda")
    whole, end = kvbind.ttt(spec, {"out": weights}, **given)
    state, outputs = None, []
    for start, stop in ((0, 7), (7, 8), (8, 20)):
        part = {name: x[:, start:stop] for name, x in given.items()}
        y, state = kvbind.ttt(spec, {"out": weights}, **part, state=state)
        outputs.append(y)
    assert error(torch.cat(outputs, 1), whole.double()) < 1e-5
    assert error(state.weights["out"], end.weights["out"].double()) < 1e-5


def test_what_runs_is_said(monkeypatch):
    monkeypatch.setenv("KVBIND_KERNELS", "force" if DEVICE == "cpu" else "1")
    assert delta.obstacle(kvbind.systems.kda()) is None
    assert "refresh=16" in delta.obstacle(kvbind.systems.delta_net(1).replace(refresh=16))
    assert "chunk=16" in delta.obstacle(kvbind.systems.delta_net(16))
    assert "MLP" in delta.obstacle(kvbind.systems.titans())
    assert "momentum=True" in delta.obstacle(kvbind.systems.delta_net().replace(momentum=True))
    assert "causal" in delta.obstacle(kvbind.systems.retnet())


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"k": torch.zeros(1, 4, 1, 32)}, "k must have q's shape"),
        ({"v": torch.zeros(1, 4, 1, 8)}, "width from 16 to 256; got 8"),
        ({"rate": torch.zeros(1, 4)}, "rate must be"),
        ({"gate": torch.zeros(1, 4, 1, 8)}, "gate must be"),
        ({"gate_acts": "later"}, "gate_acts must be"),
        ({"chunk": 48}, "chunk must be 16, 32 or 64; got 48"),
        ({"state": torch.zeros(1, 1, 8, 16)}, "state must be"),
        ({"boundaries": torch.tensor([4])}, "boundaries must be"),
        ({"residual": False, "erase": torch.zeros(1, 4, 1, 16)}, "erase must be None"),
    ],
)
def test_bad_arguments_are_named(changed, says):
    given = {name: torch.zeros(1, 4, 1, 16) for name in PLAIN} | changed
    with pytest.raises(ValueError, match=says):
        affine_chunks(given.pop("q"), given.pop("k"), given.pop("v"), **given)


def test_passes_have_small_blocks_and_all_registers_where_products_are_not_by_warp_groups():
    wide, narrow = (
        AffineCall(dtype, 128, 128, 64, True, True, False, True, True, "tf32", True)
        for dtype in (torch.float32, torch.bfloat16)
    )
    for kernel in IN_ORDER:
        assert "maxnreg" not in constants_of(kernel, narrow)
        without = constants_of(kernel, narrow._replace(warpgroups=False))
        assert (without["BV"], without["num_warps"], without["maxnreg"]) == (64, 4, 255)
        assert constants_of(kernel, wide)["maxnreg"] == 255
    assert "maxnreg" not in constants_of("chain", wide)
    assert constants_of("chain", wide._replace(key=256))["maxnreg"] == 255
