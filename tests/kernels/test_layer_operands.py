"""Queries and keys of both paths of a layer, as kernels, against the layer's own definition in PyTorch."""

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("kernels need a GPU or TRITON_INTERPRET=1", allow_module_level=True)

from hypothesis import given, settings
from hypothesis import strategies as st

from kvbind import InnerLoop, Linear
from kvbind.kernels.elementwise import layer_operands as module
from kvbind.kernels.elementwise.layer_operands import covers
from kvbind.layers.lact.layer import LactLayer
from kvbind.layers.operands import Paths, make_operands, plain_operands
from kvbind.layers.rotary import rotary_tables

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def on_kernels(monkeypatch):
    monkeypatch.setenv("KVBIND_KERNELS", "force" if DEVICE == "cpu" else "1")


def make(batch=2, length=5, attention_heads=4, fast_heads=2, half=4, dtype=torch.float32, joined=True, shared=True, seed=0):
    """q and k (views of one projection, if joined), scale, offset, and tables."""
    generator = torch.Generator().manual_seed(seed)
    width = attention_heads * 2 * half

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE)

    q, k, _ = normal(batch, length, 3 * width).to(dtype).chunk(3, dim=-1)
    if not joined:
        q, k = q.contiguous(), normal(length, batch, width).to(dtype).transpose(0, 1)
    positions = torch.randint(100, (1 if shared else batch, length), generator=generator).to(DEVICE)
    return [q, k, 1 + 0.3 * normal(width, 2), 0.3 * normal(width, 2), *rotary_tables(positions, 2 * half, 100.0)]


def on_kernel(q, k, scale, offset, tables, paths):
    assert covers(q, k, q, tables[0], paths.attention_heads, paths.fast_heads)
    return make_operands(q, k, q, scale, offset, tables, paths)


def evaluate(function, inputs, paths, dtype=None, seed=1):
    """Outputs, and gradients of a fixed random combination of them, in float64."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs[:4]]
    tables = [x if dtype is None else x.to(dtype) for x in inputs[4:]]
    outputs = function(*leaves, tables, paths)
    generator = torch.Generator().manual_seed(seed)
    loss = sum((y.double() * torch.randn(y.shape, generator=generator).to(DEVICE)).sum() for y in outputs)
    return [x.detach().double() for x in (*outputs, *torch.autograd.grad(loss, leaves))]


def distance(x, y):
    return float((x - y).norm() / y.norm().clamp(min=1e-12))


def by_pytorch(q, k, *others):
    return [x.to(q.dtype) for x in plain_operands(q, k, *others)]


def compare(inputs, paths):
    dtype = inputs[0].dtype
    exact = evaluate(by_pytorch, inputs, paths, torch.float64)
    found = evaluate(on_kernel, inputs, paths)
    own = evaluate(by_pytorch, inputs, paths)
    names = ["q rotated", "k rotated", "q fast", "k fast", "dq", "dk", "dscale", "doffset"]
    for name, x, y, z in zip(names, found, exact, own, strict=True):
        error = distance(x, y)
        assert error < BOUNDS[dtype], name
        assert dtype == torch.float32 or error <= 2 * distance(z, y) + 1e-6, name


@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("rotary", [True, False])
def test_equals_the_definition(dtype, silu, rotary):
    compare(make(dtype=dtype), Paths(4, 2, 1e-5, silu, rotary))


@given(
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 9),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=15)
def test_takes_any_number_of_tokens_and_heads_of_any_width(batch, length, fast_heads, together, half, joined, shared):
    heads = fast_heads * together
    inputs = make(batch, length, heads, fast_heads, half, joined=joined, shared=shared, seed=length)
    compare(inputs, Paths(heads, fast_heads, 1e-5))


@pytest.mark.parametrize("shared", [True, False])
def test_results_do_not_depend_on_how_many_tokens_a_program_has(monkeypatch, shared):
    for name in ("FORWARD_PROGRAMS", "BACKWARD_PROGRAMS"):
        monkeypatch.setattr(module, name, 8)
    monkeypatch.setattr(module, "TILE", 16)
    compare(make(2, 23, shared=shared), Paths(4, 2, 1e-5))


def test_a_head_of_zeros_has_no_direction_and_finite_gradients():
    inputs = make()
    inputs[0] = torch.zeros_like(inputs[0])
    inputs[3] = torch.zeros_like(inputs[3])
    paths = Paths(4, 2, 1e-5)
    found, exact = evaluate(on_kernel, inputs, paths), evaluate(by_pytorch, inputs, paths, torch.float64)
    for x, y in zip(found, exact, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5 * float(y.abs().max()) + 1e-9)


def test_is_an_operator_that_pytorch_can_trace():
    inputs = [x.requires_grad_() if i < 4 else x for i, x in enumerate(x.detach() for x in make(1, 3))]
    torch.library.opcheck(torch.ops.kvbind.layer_operands.default, (*inputs, 4, 2, 1e-5, True, True))


def test_leaves_to_pytorch_what_it_does_not_cover():
    q, k, _, _, cos, _ = make()
    assert covers(q, k, q, cos, 4, 2)
    assert not covers(q, k, q, cos, 2, 4)  # attention heads across fast heads
    assert not covers(q.double(), k.double(), q.double(), cos, 4, 2)
    assert not covers(q, k.bfloat16(), q, cos, 4, 2)
    assert not covers(q, k, q, cos.double(), 4, 2)
    assert not covers(q[:, :0], k[:, :0], q, cos, 4, 2)
    assert not covers(q.mT.contiguous().mT, k, q, cos, 4, 2)
    wide = torch.empty(1, 1, 4096, device=DEVICE)
    assert not covers(wide, wide, wide, cos, 64, 1)


@pytest.mark.parametrize("options", [{}, {"silu_qk": False, "rotary": False}, {"num_lact_heads": 4, "num_attn_heads": 2}])
def test_the_layer_is_the_same_with_kernels_and_without(options, monkeypatch):
    torch.manual_seed(0)
    spec = InnerLoop(network=Linear(), chunk=64, token_lr=True)
    layer = LactLayer(64, **{"num_attn_heads": 4, "num_lact_heads": 2, "inner": spec, "window_size": 5} | options).to(DEVICE)
    with torch.no_grad():
        layer.qk_scale.add_(0.3 * torch.randn_like(layer.qk_scale))
        layer.qk_offset.add_(0.3 * torch.randn_like(layer.qk_offset))
    x = torch.randn(1, 70, 64, device=DEVICE, requires_grad=True)

    def results():
        output, _ = layer(x)
        gradients = torch.autograd.grad(output.square().sum(), [x, *layer.parameters()])
        return [output.detach(), *gradients]

    found = results()
    monkeypatch.setenv("KVBIND_KERNELS", "0")
    for got, wanted in zip(found, results(), strict=True):
        assert distance(got.double(), wanted.double()) < 1e-5


def test_compiles_into_one_graph():
    inputs = [x.requires_grad_() if i < 4 else x for i, x in enumerate(x.detach() for x in make())]

    def function(q, k, scale, offset, *tables):
        return make_operands(q, k, q, scale, offset, tables, Paths(4, 2, 1e-5))

    found, wanted = torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs), function(*inputs)
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)
    gradients = [torch.autograd.grad(sum(y.square().sum() for y in outputs), inputs[:4]) for outputs in (found, wanted)]
    for x, y in zip(*gradients, strict=True):
        torch.testing.assert_close(x, y)
