"""The recurrent form's kernels against its definition in float64."""

from __future__ import annotations

import contextlib
import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("needs TRITON_INTERPRET=1 or a GPU", allow_module_level=True)

import kvbind
from kvbind import InnerLoop, Linear, NewtonSchulz, SwiGLU
from kvbind.kernels.launching import cuda_graphs
from kvbind.kernels.launching.launcher import Launcher
from kvbind.kernels.recurrent import operator, update_rule, workspace
from kvbind.kernels.recurrent.operator import covers, recurrent_swiglu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXACT = NewtonSchulz(dtype=torch.float32)


def operands(spec, batch=1, chunks=3, heads=1, key=16, hidden=32, value=16, dtype=torch.float32, seed=0):
    """What a call takes, by name; float32 where it is no q, k or v."""
    g = torch.Generator().manual_seed(seed)
    tokens = chunks * spec.chunk

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    def gate():
        return 0.2 + 0.8 * torch.rand(batch, tokens, heads, generator=g)

    widths = {"q": key, "k": key, "v": value}
    o = {name: normal(batch, tokens, heads, width).to(dtype) for name, width in widths.items()}
    shapes = spec.network.shapes(key, value, (hidden,))
    o |= {f"weights.{name}": normal(batch, heads, *shape) / shape[0] ** 0.5 for name, shape in shapes.items()}
    o |= {f"lr.{name}": 0.3 * gate() for name in spec.updated}
    o |= {name: gate() for name in ("momentum", "retention") if getattr(spec, name)}
    return {name: x.to(DEVICE) for name, x in o.items()}


def group(o, prefix):
    return {name.removeprefix(prefix): x for name, x in o.items() if name.startswith(prefix)}


def by_pytorch(spec, o):
    """Outputs, weights and momentum by the definition."""
    gates = {name: o[name] for name in ("momentum", "retention") if name in o}
    y, state = kvbind.ttt(spec, group(o, "weights."), o["q"], o["k"], o["v"], lr=group(o, "lr."), form="recurrent", **gates)
    return {"y": y} | {name: x for name, x in state.tensors.items() if name.startswith(("weights.", "momentum."))}


def fused(spec, o):
    """Outputs, weights and momentum by the kernels."""
    means = {
        name: o[name].unflatten(1, (-1, spec.chunk)).mean(2).transpose(1, 2)
        for name in ("momentum", "retention")
        if name in o
    }
    shaping = spec.orthogonalize
    given = [tuple(x[name] for name in spec.updated) if (x := group(o, part)) else None for part in ("moving.", "norms.")]
    y, gate, up, down, moved = recurrent_swiglu(
        o["q"], o["k"], o["v"], o.get("weights.gate"), o.get("weights.up"), o["weights.out"],
        o.get("lr.gate"), o.get("lr.up"), o["lr.out"], means.get("momentum"), means.get("retention"),
        *given,
        chunk=spec.chunk, update_all=spec.update == "all" and len(spec.updated) > 1, normalize=spec.normalize,
        coefficients=None if shaping is None else shaping.coefficients, sign=spec.sign,
        own_chunk=spec.visibility == "chunk", precision=torch.float32 if shaping is None else shaping.dtype,
    )  # fmt: skip
    found = {"y": y, "weights.gate": gate, "weights.up": up, "weights.out": down}
    found |= dict(zip((f"momentum.{name}" for name in spec.updated), moved or (), strict=bool(moved)))
    return {name: x for name, x in found.items() if x is not None}


def with_gradients(run, spec, o):
    """What a run gives, and the gradients of a random projection of all of it."""
    o = {name: x.detach().clone().requires_grad_() for name, x in o.items()}
    found = run(spec, o)
    g, loss = torch.Generator().manual_seed(1), 0
    for name in sorted(found):
        x = found[name]
        loss = loss + (x * torch.randn(x.shape, generator=g).to(DEVICE, x.dtype)).sum()
    grads = torch.autograd.grad(loss, list(o.values()), allow_unused=True, materialize_grads=True)
    return found | {f"d {name}": x for name, x in zip(o, grads, strict=True)}


def errors(found, reference):
    assert found.keys() == reference.keys()
    return {
        name: float((found[name].detach().double() - x.detach().double()).norm() / x.double().norm().clamp(min=1e-30))
        for name, x in reference.items()
    }


def in_float64(spec, o):
    exact = spec.replace(orthogonalize=spec.orthogonalize and spec.orthogonalize.replace(dtype=torch.float64))
    return with_gradients(by_pytorch, exact, {name: x.double() for name, x in o.items()})


LACT = InnerLoop(network=SwiGLU(), chunk=20, momentum=True, orthogonalize=EXACT, normalize=True)
SPECS = {
    "full LaCT": LACT,
    "all, retention, no momentum, own chunk": LACT.replace(momentum=False, retention=True, visibility="chunk"),
    "all, plain ascent": LACT.replace(momentum=False, normalize=False, orthogonalize=None, direction="ascent"),
    "all, momentum, retention": LACT.replace(orthogonalize=None, retention=True, normalize=False),
    "last": LACT.replace(update="last"),
    "last, own chunk, retention": LACT.replace(update="last", visibility="chunk", retention=True),
    "last, no momentum": LACT.replace(update="last", momentum=False, normalize=False),
    "last, plain ascent": LACT.replace(update="last", momentum=False, orthogonalize=None, direction="ascent"),
    "linear": LACT.replace(network=Linear()),
    "linear, plain": LACT.replace(network=Linear(), orthogonalize=None, momentum=False, retention=True, normalize=False),
}


@pytest.mark.parametrize("name", SPECS)
def test_outputs_end_and_gradients_are_those_of_the_definition(name):
    spec = SPECS[name]
    several = {"full LaCT": (2, 1), "last": (2, 2), "linear": (1, 2)}
    batch, heads = several.get(name, (1, 1))
    o = operands(spec, batch, 2, heads, seed=list(SPECS).index(name))
    exact = in_float64(spec, o)
    # Newton-Schulz magnifies rounding, the definition's as ours
    own = errors(with_gradients(by_pytorch, spec, o), exact)
    for what, error in errors(with_gradients(fused, spec, o), exact).items():
        assert error < max(1e-5, 5 * own[what]), what


@pytest.mark.parametrize("name", ["full LaCT", "all, momentum, retention", "last, own chunk, retention", "linear"])
def test_bfloat16_errs_by_its_rounding(name):
    spec = SPECS[name].replace(orthogonalize=SPECS[name].orthogonalize and NewtonSchulz())
    o = operands(spec, chunks=2, dtype=torch.bfloat16, seed=5)
    exact = in_float64(spec, o)
    own = errors(with_gradients(by_pytorch, spec, o), exact)
    for what, error in errors(with_gradients(fused, spec, o), exact).items():
        assert error < max(1.5e-2, 2 * own[what]), what


WIDTHS = {"equal": (48, 48, 48), "all different": (16, 48, 32)}


@pytest.mark.parametrize("widths", WIDTHS)
def test_any_multiple_of_16_is_a_width(widths):
    key, hidden, value = WIDTHS[widths]
    spec = LACT.replace(chunk=5, orthogonalize=NewtonSchulz(((1.5, -0.5, 0.0),), torch.float32))
    o = operands(spec, chunks=2, key=key, hidden=hidden, value=value)
    for what, error in errors(with_gradients(fused, spec, o), in_float64(spec, o)).items():
        assert error < 1e-5, what


def test_operands_may_be_slices_of_larger_tensors():
    spec = LACT.replace(chunk=6, orthogonalize=None)
    o = operands(spec, heads=2, chunks=2, hidden=16)
    dense = fused(spec, o)
    together = torch.stack((o["q"], o["k"], o["v"]), 2)
    o |= {"q": together[:, :, 0], "k": together[:, :, 1], "v": together[:, :, 2].mT.contiguous().mT}
    o["lr.gate"] = torch.stack((o["lr.gate"], o["lr.gate"]), -1)[..., 1]
    assert not any(o[name].is_contiguous() for name in ("q", "k", "v", "lr.gate"))
    for name, x in fused(spec, o).items():
        assert torch.equal(x, dense[name]), name


@pytest.mark.parametrize("update", ["all", "last"])
def test_a_sequence_may_be_split_between_chunks(update):
    spec = LACT.replace(update=update, chunk=6, orthogonalize=None, retention=True)
    o = operands(spec, chunks=3, hidden=16)

    def split(spec, o):
        whole = {name: x for name, x in o.items() if name.startswith("weights.")}
        first = fused(spec, whole | {name: x[:, :6] for name, x in o.items() if name not in whole})
        norms = {name: torch.linalg.vector_norm(o[f"weights.{name}"], dim=-2, keepdim=True) for name in spec.updated}
        second = {name: x[:, 6:] for name, x in o.items() if name not in whole}
        second |= {name: first[name] for name in whole} | {f"norms.{name}": x for name, x in norms.items()}
        second |= {f"moving.{name}": first[f"momentum.{name}"] for name in spec.updated}
        second = fused(spec, second)
        return second | {"y": torch.cat((first["y"], second["y"]), 1)}

    for what, error in errors(with_gradients(split, spec, o), with_gradients(fused, spec, o)).items():
        assert error < 1e-5, what


@pytest.mark.parametrize("name", ["full LaCT", "last, own chunk, retention"])
def test_segments_change_nothing(name, monkeypatch):
    spec = SPECS[name].replace(chunk=5, orthogonalize=None)
    o = operands(spec, chunks=3, hidden=16)
    expected, plain = with_gradients(fused, spec, o), fused(spec, o)
    monkeypatch.setattr(update_rule, "SEGMENT_ROWS", 10)
    for found, reference in ((with_gradients(fused, spec, o), expected), (fused(spec, o), plain)):
        for what, error in errors(found, reference).items():
            assert error < 1e-6, what
    for what, x in plain.items():
        assert torch.equal(x, expected[what]), what


@pytest.mark.parametrize("update", ["all", "last"])
def test_the_operator_keeps_the_rules_of_operators(update):
    spec = LACT.replace(update=update, chunk=4, orthogonalize=None, retention=True)
    o = {name: x.requires_grad_() for name, x in operands(spec, chunks=1, hidden=16).items()}
    calls = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "kvbind":
                calls.append((function, args))
            return function(*args, **(kwargs or {}))

    with Record():
        found = fused(spec, o)
        sum(x.sum() for x in found.values()).backward()
    assert [function._opname for function, _ in calls] == ["recurrent_swiglu", "recurrent_swiglu_backward"]
    for function, args in calls:
        fresh = [
            x.detach().clone().requires_grad_(x.is_floating_point() and "backward" not in function._opname)
            if isinstance(x, torch.Tensor)
            else x
            for x in args
        ]
        torch.library.opcheck(function, tuple(fresh))


def test_channels_that_start_at_zero_stay_there():
    spec = LACT.replace(chunk=6)
    o = operands(spec, chunks=2)
    o["weights.out"][..., 3] = 0
    found = with_gradients(fused, spec, o)
    assert all(x.isfinite().all() for x in found.values())
    assert not found["weights.out"][..., 3].any()


def test_what_is_covered():
    assert covers(torch.bfloat16, 384, 384, 384)
    assert covers(torch.float32, 16, 1024, 48)
    assert not covers(torch.float64, 64, 64, 64)
    assert not covers(torch.bfloat16, 64, 40, 64)
    assert not covers(torch.bfloat16, 64, 4096, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (1, 7, 1, 16)}, "multiple of chunk=6 tokens; got 7"),
        ({"weights.up": None}, "gate and up"),
        ({"lr.up": None}, "rate_gate and rate_up"),
    ],
)
def test_operands_that_do_not_fit_are_named(change, message):
    spec = LACT.replace(chunk=6)
    o = operands(spec, chunks=2)
    o |= {name: None if shape is None else torch.zeros(shape, device=DEVICE) for name, shape in change.items()}
    with pytest.raises(ValueError, match=message):
        fused(spec, o)


def kinds_of(launches):
    """By what Triton compiles a kernel of its own for each of some launches."""

    def kind(x):
        if isinstance(x, torch.Tensor):
            return x.dtype, x.data_ptr() % 16 == 0
        return (x == 1, x % 16 == 0, x >= 2**31) if isinstance(x, int) else type(x)

    return {
        (launcher.kernel.fn.__name__, *map(kind, args), *sorted(constants.items(), key=str))
        for launcher, args, constants in launches
    }


@pytest.mark.parametrize("layout", ["tokens", "heads", "slices"])
@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (1, 3), (2, 2)])
def test_chunks_where_they_lie_are_updated_by_the_kernels_of_graphs(monkeypatch, batch, heads, layout):
    spec = SPECS["full LaCT"].replace(retention=True)
    o = operands(spec, batch=batch, heads=heads)
    if layout == "heads":
        o |= {name: o[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("q", "k", "v")}
    elif layout == "slices":
        o |= {name: torch.cat((o[name], o[name][..., :4]), -1)[..., :-4] for name in ("q", "k", "v")}
    launches, launch = [], Launcher.launch

    def noted(self, grid, *args, **constants):
        launches.append((self, args, constants))
        launch(self, grid, *args, **constants)

    monkeypatch.setattr(Launcher, "launch", noted)
    expected, here = fused(spec, o), kinds_of(launches)
    launches.clear()
    # a graph replays a step's run
    monkeypatch.setattr(operator._CallOperands, "repeated", copied)
    found = fused(spec, o)
    assert here == kinds_of(launches)
    assert all(torch.equal(found[name], x) for name, x in expected.items())


@contextlib.contextmanager
def copied(call, make):
    step = make(call.workspace, *call.flags)
    yield step, lambda: step.run()


@pytest.mark.skipif(DEVICE != "cuda", reason="graphs are CUDA's")
@pytest.mark.parametrize("name", ["full LaCT", "all, momentum, retention"])
def test_graphs_replay_what_was_launched(name, monkeypatch):
    spec = SPECS[name]
    runs = [operands(spec, batch=2, heads=2, chunks=3 + i % 2, seed=i) for i in range(5)]
    cuda_graphs.clear()
    monkeypatch.setenv("KVBIND_GRAPHS", "0")
    expected = [with_gradients(fused, spec, o) for o in runs]
    assert not cuda_graphs._captured
    monkeypatch.setenv("KVBIND_GRAPHS", "1")
    found = [with_gradients(fused, spec, o) for o in runs]
    assert len(cuda_graphs._captured) == 2
    for one, reference in zip(found, expected, strict=True):
        for what, error in errors(one, reference).items():
            assert error < 1e-6, what


@pytest.mark.parametrize("together", [0, 1 << 30], ids=["in one launch", "large ones alone"])
def test_copies_reach_every_tensor_whether_they_share_a_launch_or_not(monkeypatch, together):
    monkeypatch.setattr(workspace, "TOGETHER", together)
    monkeypatch.setattr(workspace, "ALONE", 20)
    sources = [torch.randn(shape) for shape in ((5, 4), (3,), (6, 7), (2, 2))] + [torch.randn(4, 6).T, torch.arange(25)]
    targets = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in sources]
    workspace.copy(list(zip(targets, sources, strict=True)))
    assert all(torch.equal(x, y) for x, y in zip(targets, sources, strict=True))
