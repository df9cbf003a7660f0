"""`torch.compile` of `ttt` and of layers: one graph, the numbers of uncompiled calls, states in and out, any length."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree

import kvbind
from kvbind import systems
from kvbind.forms import opaque
from kvbind.layers.lact.layer import LactLayer
from kvbind.layers.lact_nvs import LactNvsLayer
from kvbind.layers.vittt import VitttLayer
from strategies import error, memory, operands

LADDER = systems.ladder(systems.lact_llm(chunk=4))
SPECS = {
    **{name: LADDER[name] for name in ("rung0", "rung2")},
    "rung2, gated": LADDER["rung2"].replace(retention=True),
    "delta_net": systems.delta_net(),
    "memory": memory(4),
    "titans": systems.titans(4),
    "lact_nvs": systems.lact_nvs(),
    "vittt": systems.vittt(),
    "vittt_conv": systems.vittt("conv"),
}


def call_of(spec, **options):
    def call(o, state=None):
        return kvbind.ttt(spec, None if state else o.weights, o.q, o.k, o.v, state=state, **o.options, **options)

    return call


def compiled(function, **options):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, **options)


def with_gradients(function, spec, o):
    """Outputs, the state, and gradients of all that a call reads."""
    leaves = [o.q, o.k, o.v, *o.weights.values(), *o.options["lr"].values()]
    for x in leaves:
        x.requires_grad_()
    y, state = function(o)
    loss = y.square().sum() + state.tensors["weights.out"].square().sum()
    return y, state, torch.autograd.grad(loss, leaves, materialize_grads=True, allow_unused=True)


def check_same(found, expected, tolerance=1e-5):
    (z, after, others), (y, state, grads) = found, expected
    assert error(z, y) < tolerance
    assert after.pending_lengths == state.pending_lengths
    assert list(after.tensors) == list(state.tensors)
    for name, x in state.tensors.items():
        assert after.tensors[name].dtype == x.dtype
        assert (after.tensors[name] - x).norm() <= tolerance * x.norm(), name
    for a, b in zip(grads, others, strict=True):
        assert (a - b).norm() <= 1e-3 * a.norm().clamp(min=1e-3)


@pytest.mark.parametrize("name", SPECS)
def test_ttt_compiles_as_one_graph_forward_and_backward(name):
    o = operands(SPECS[name], tokens=9, dtype=torch.float32)
    call = call_of(SPECS[name])
    check_same(*(with_gradients(f, SPECS[name], o) for f in (compiled(call, backend="aot_eager"), call)))


@pytest.mark.parametrize("name", ["rung2", "titans"])
def test_a_graph_that_sees_every_chunk_is_right_too(name, monkeypatch):
    # as on a GPU whose kernels do not cover the inner loop
    monkeypatch.setattr(opaque, "takes", lambda spec, call: False)
    test_ttt_compiles_as_one_graph_forward_and_backward(name)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("rung2", {"cu_seqlens": [0, 3, 3, 9]}),
        ("rung2", {"form": "recurrent"}),
        ("lact_nvs", {"update_tokens": slice(0, 4)}),
        ("lact_nvs", {"update_tokens": torch.arange(9) % 2 == 0}),
    ],
)
def test_options_of_a_compiled_call_count(name, options):
    o = operands(SPECS[name], batch=1, tokens=9, dtype=torch.float32)
    call = call_of(SPECS[name], **options)
    check_same(*(with_gradients(f, SPECS[name], o) for f in (compiled(call, backend="aot_eager"), call)))


@pytest.mark.parametrize("name", ["rung0", "rung2, gated", "delta_net", "titans"])
def test_dynamic_lengths_go_on_from_a_state_in_few_graphs(name):
    spec, counter = SPECS[name], CompileCounter()
    call = call_of(spec)
    dynamic, state, held = compiled(call, backend=counter, dynamic=True), None, None
    for length in (9, 11, 14, 1, 6, 10):
        o = operands(spec, tokens=length, seed=length, dtype=torch.float32, rate=0.05)
        (y, state), (z, held) = call(o, state), dynamic(o, held)
        assert error(z, y) == 0
        assert held.pending_lengths == state.pending_lengths
        assert all(torch.equal(held.tensors[key], x) for key, x in state.tensors.items())
    # without a state and with one, and one token apart from more
    assert counter.frame_count <= 3


def test_another_inner_loop_is_not_taken_for_the_one_compiled():
    spec = SPECS["rung2"]
    o = operands(spec, tokens=9, dtype=torch.float32)
    held = {"spec": spec}

    def call():
        return kvbind.ttt(held["spec"], o.weights, o.q, o.k, o.v, **o.options)[0]

    changing = compiled(call, backend="eager")
    assert torch.equal(changing(), call())
    for change in ({"direction": "ascent"}, {"orthogonalize": spec.orthogonalize.replace(coefficients=((1.5, -0.5, 0.0),))}):
        held["spec"] = spec.replace(**change)
        assert torch.equal(changing(), call())


def lact_layer(rung):
    return LactLayer(16, 2, 2, LADDER[rung].replace(momentum=True, retention=True), window_size=6)


@pytest.mark.parametrize("rung", ["rung0", "rung2"])
def test_a_lact_layer_compiles_with_a_state_in_and_out(rung):
    torch.manual_seed(0)
    layer = lact_layer(rung)
    whole = compiled(layer, backend="eager")
    state = held = None
    with torch.no_grad():
        for length in (5, 1, 1, 9):
            x = torch.randn(2, length, 16)
            y, state = layer(x, state=state, return_state=True)
            z, held = whole(x, state=held, return_state=True)
            assert error(z, y) < 1e-6
            assert held.seen == state.seen
            assert held.fast.pending_lengths == state.fast.pending_lengths


def gradients(function, layer, *args):
    y = function(*args)
    y = y[0] if isinstance(y, tuple) else y
    return y.detach(), torch.autograd.grad(y.square().sum(), list(layer.parameters()), allow_unused=True)


@pytest.mark.parametrize(
    ("make", "args"),
    [
        (lambda: lact_layer("rung0"), [(torch.randn(2, 9, 16),)]),
        (lambda: LactNvsLayer(16, 8), [(torch.randn(2, 9, 16), slice(0, 6)), (torch.randn(2, 12, 16), slice(0, 6))]),
        (lambda: VitttLayer(16, 2), [(torch.randn(2, 12, 16), (3, 4)), (torch.randn(2, 30, 16), (5, 6))]),
    ],
    ids=["lact", "lact_nvs", "vittt"],
)
def test_a_layer_trains_compiled_at_every_size(make, args):
    torch.manual_seed(0)
    layer = make()
    whole = compiled(layer, backend="aot_eager")
    for given in args:
        (y, grads), (z, others) = (gradients(f, layer, *given) for f in (layer, whole))
        assert error(z, y) < 1e-5
        for a, b in zip(grads, others, strict=True):
            assert (a is None and b is None) or (a - b).norm() <= 1e-3 * a.norm().clamp(min=1e-6)


@pytest.mark.parametrize("form", ["auto", "recurrent"])
@pytest.mark.parametrize("name", SPECS)
def test_shapes_without_values_on_meta_and_fake_tensors(name, form):
    spec = SPECS[name]
    tokens = 9
    o = operands(spec, tokens=tokens, dtype=torch.float32)
    expected, state = call_of(spec, form=form)(o)
    again, after = call_of(spec, form=form)(o, state)
    parts = (o.weights, o.q, o.k, o.v, o.options, state)

    def check(change):
        weights, q, k, v, options, held = pytree.tree_map_only(torch.Tensor, change, parts)
        for before, output, wanted in ((None, expected, state), (held, again, after)):
            y, left = kvbind.ttt(spec, None if before else weights, q, k, v, state=before, form=form, **options)
            assert y.shape == output.shape
            assert left.pending_lengths == wanted.pending_lengths
            assert {key: (x.shape, x.dtype) for key, x in left.tensors.items()} == {
                key: (x.shape, x.dtype) for key, x in wanted.tensors.items()
            }

    check(lambda x: x.to("meta"))
    with FakeTensorMode() as mode:
        check(mode.from_tensor)
