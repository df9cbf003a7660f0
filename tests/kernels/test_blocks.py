"""Kernels of vision models: depthwise convolution of tokens and operands of views, against PyTorch in float64."""

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("kernels need a GPU or TRITON_INTERPRET=1", allow_module_level=True)

import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kvbind.bench.harness.kernel_switch import operators_of
from kvbind.kernels.common.interpreter import repair
from kvbind.kernels.elementwise.depthwise import token_conv
from kvbind.kernels.elementwise.silu_unit import silu_unit
from kvbind.layers.grid import add_convolution

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5


@pytest.fixture(autouse=True)
def on_kernels(monkeypatch):
    monkeypatch.setenv("KVBIND_KERNELS", "force" if DEVICE == "cpu" else "1")
    repair()


def evaluate(function, inputs, exact=False):
    """Results, and gradients of a fixed random combination of them, in float64."""
    leaves = [None if x is None else x.detach().to(torch.float64 if exact else x.dtype).requires_grad_() for x in inputs]
    outputs = function(*leaves)
    generator = torch.Generator().manual_seed(1)
    slopes = [torch.randn(y.shape, generator=generator).bfloat16().to(y) for y in outputs]
    gradients = torch.autograd.grad(outputs, [x for x in leaves if x is not None], slopes)
    return [x.detach().double() for x in (*outputs, *gradients)]


def compare(function, definition, inputs):
    exact, own = evaluate(definition, inputs, exact=True), evaluate(definition, inputs)
    for got, wanted, rounded in zip(evaluate(function, inputs), exact, own, strict=True):
        scale = wanted.norm().clamp(min=1e-12)
        assert (got - wanted).norm() / scale < max(1e-5, 2 * float((rounded - wanted).norm() / scale))


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def convolution(grid, add):
    def definition(x, weight, bias):
        kind = torch.promote_types(x.dtype, weight.dtype)
        image = x.to(kind).mT.reshape(x.shape[0], -1, *grid)
        y = F.conv2d(image, weight.to(kind), None if bias is None else bias.to(kind), padding=1, groups=x.shape[2])
        y = y.flatten(2).mT.to(x.dtype)
        return (x + y if add else y,)

    return definition


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("grid", "width", "add", "biased"), [((3, 5), 16, True, True), ((14, 14), 72, False, False)])
def test_the_convolution_of_tokens_is_that_of_their_image(grid, width, add, biased, dtype):
    x = normal(2, grid[0] * grid[1], width).to(dtype)
    inputs = [x, normal(width, 1, 3, 3, seed=1), normal(width, seed=2) if biased else None]
    compare(lambda *given: (token_conv(*given, grid, add=add),), convolution(grid, add), inputs)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 40), st.integers(1, 3))
@settings(max_examples=10)
def test_grids_of_any_shape_are_convolved(height, width, channels, batch):
    inputs = [normal(batch, height * width, channels), normal(channels, 1, 3, 3, seed=1), normal(channels, seed=2)]
    compare(lambda *x: (token_conv(*x, (height, width), add=True),), convolution((height, width), True), inputs)


def test_a_convolution_that_is_something_else_is_called():
    x, grid = normal(2, 12, 8), (3, 4)
    plain = nn.Conv2d(8, 8, 3, padding=1, groups=8, device=DEVICE)
    others = [
        nn.Conv2d(8, 8, 3, padding=1, groups=4, device=DEVICE),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, device=DEVICE, padding_mode="circular"),
        nn.Conv2d(8, 8, 5, padding=2, groups=8, device=DEVICE),
        nn.Sequential(plain),
    ]
    assert operators_of(lambda: add_convolution(x, plain, grid)) == ("token_conv",)
    for conv in others:
        assert operators_of(lambda conv=conv: add_convolution(x, conv, grid)) == ()
        image = x.mT.reshape(2, 8, *grid)
        torch.testing.assert_close(add_convolution(x, conv, grid), x + conv(image).flatten(2).mT)
    plain.register_forward_hook(lambda *_: torch.zeros(2, 8, *grid, device=DEVICE))
    torch.testing.assert_close(add_convolution(x, plain, grid), x)


def definition_of_operands(heads):
    def definition(qkv):
        q, k, v = (part.unflatten(-1, (heads, -1)) for part in F.silu(qkv).chunk(3, -1))
        wide = torch.promote_types(qkv.dtype, torch.float32)
        q, k = ((x.to(wide) / (x.to(wide).norm(dim=-1, keepdim=True) + EPS)).to(qkv.dtype) for x in (q, k))
        return q, k, v

    return definition


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "width"), [(1, 48), (3, 20)])
def test_operands_of_views_are_their_definition(heads, width, dtype):
    qkv = normal(2, 5, 3 * heads * width).to(dtype)
    compare(lambda x: silu_unit(x, heads, EPS), definition_of_operands(heads), [qkv])


def test_a_head_of_zeros_has_no_slope_of_its_norm():
    qkv = torch.zeros(1, 2, 3 * 16, device=DEVICE, requires_grad=True)
    q, k, v = silu_unit(qkv, 1, EPS)
    (q.sum() + k.sum() + v.sum()).backward()
    assert not q.any()
    assert not k.any()
    assert bool(qkv.grad.isfinite().all())
    # silu'(0) = 1/2, and the norm's eps alone divides
    torch.testing.assert_close(qkv.grad[0, 0, 0], torch.tensor(0.5 / EPS, device=DEVICE))


def test_they_are_operators_that_pytorch_can_trace():
    x, weight, bias = normal(2, 12, 8), normal(8, 1, 3, 3), normal(8)
    inputs = tuple(leaf.requires_grad_() for leaf in (x, weight, bias))
    torch.library.opcheck(torch.ops.kvbind.token_conv.default, (*inputs, 3, 4, True))
    torch.library.opcheck(torch.ops.kvbind.silu_unit.default, (normal(2, 3, 24).requires_grad_(), 2, EPS))
