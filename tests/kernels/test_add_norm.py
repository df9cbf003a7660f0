"""Adding to a residual stream and normalizing it, as kernels, against PyTorch."""

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("kernels need a GPU or TRITON_INTERPRET=1", allow_module_level=True)

from hypothesis import given, settings
from hypothesis import strategies as st

from kvbind.kernels.common.interpreter import repair
from kvbind.kernels.elementwise import add_norm as module
from kvbind.kernels.elementwise.add_norm import add_norm, covers
from kvbind.layers.norm import ResidualNorm, add_layer_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDE, NARROW = torch.float32, torch.bfloat16
EPS = 1e-5


@pytest.fixture(autouse=True)
def on_kernels(monkeypatch):
    monkeypatch.setenv("KVBIND_KERNELS", "force" if DEVICE == "cpu" else "1")
    repair()


def by_pytorch(x, delta, weight, eps, dtype):
    x = x if delta is None else x + delta
    return x, torch.nn.functional.rms_norm(x.to(weight.dtype), weight.shape, weight, eps).to(dtype)


def layer_norm(x, delta, weight, bias, eps, dtype):
    """The definition of the layer norm."""
    x = x if delta is None else x + delta
    wide = torch.promote_types(x.dtype, weight.dtype)
    bias = None if bias is None else bias.to(wide)
    return x, torch.nn.functional.layer_norm(x.to(wide), weight.shape, weight.to(wide), bias, eps).to(dtype)


def centred(x, delta, weight, bias, eps, dtype):
    return add_norm(x, delta, weight, eps, dtype, bias=bias, centred=True)


def evaluate(function, inputs, exact=False, dtype=WIDE, used=(True, True)):
    """The sum and its norm, and gradients of a random combination of those used, in float64."""
    leaves = [None if x is None else x.detach().to(torch.float64 if exact else x.dtype).requires_grad_() for x in inputs]
    outputs = function(*leaves, EPS, torch.float64 if exact else dtype)
    generator = torch.Generator().manual_seed(1)
    draws = [torch.randn(y.shape, generator=generator).to(DEVICE) for y in outputs]
    loss = sum((y.double() * draw).sum() for y, draw, use in zip(outputs, draws, used, strict=True) if use)
    return [x.detach().double() for x in (*outputs, *torch.autograd.grad(loss, [x for x in leaves if x is not None]))]


def draw(shape, x=WIDE, delta=WIDE, weight=WIDE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    normal = [torch.randn(s, generator=generator).to(DEVICE) for s in (shape, shape, shape[-1:])]
    return [normal[0].to(x), None if delta is None else normal[1].to(delta), (1 + 0.3 * normal[2]).to(weight)]


def distance(x, y):
    return float((x - y).norm() / y.norm().clamp(min=1e-12))


@pytest.mark.parametrize("used", [(True, True), (False, True)])
@pytest.mark.parametrize(
    ("x", "delta", "weight", "dtype"),
    [(WIDE, WIDE, WIDE, WIDE), (WIDE, NARROW, WIDE, NARROW), (WIDE, None, WIDE, NARROW), (NARROW, NARROW, NARROW, NARROW),
     (NARROW, None, NARROW, NARROW), (NARROW, WIDE, WIDE, WIDE), (torch.float16, torch.float16, WIDE, torch.float16)],
)  # fmt: skip
def test_equals_the_definition(x, delta, weight, dtype, used):
    inputs = draw((2, 7, 24), x, delta, weight)
    exact = evaluate(by_pytorch, inputs, exact=True, used=used)
    own = evaluate(by_pytorch, inputs, dtype=dtype, used=used)
    found = evaluate(add_norm, inputs, dtype=dtype, used=used)
    for got, wanted, rounded in zip(found, exact, own, strict=True):
        assert distance(got, wanted) < max(1e-5, 2 * distance(rounded, wanted))


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("x", "delta", "dtype"), [(WIDE, NARROW, NARROW), (WIDE, None, WIDE), (NARROW, NARROW, NARROW)])
def test_is_layer_norm_where_it_is_centred(x, delta, dtype, biased):
    inputs = draw((2, 7, 24), x, delta)
    # a mean that is large beside what it is taken from
    inputs[0] = inputs[0] + 3
    inputs.append(inputs[2].flip(0) if biased else None)
    exact = evaluate(layer_norm, inputs, exact=True)
    own = evaluate(layer_norm, inputs, dtype=dtype)
    found = evaluate(centred, inputs, dtype=dtype)
    assert len(found) == len(exact) == 2 + 2 + (delta is not None) + biased
    for got, wanted, rounded in zip(found, exact, own, strict=True):
        assert distance(got, wanted) < max(1e-5, 2 * distance(rounded, wanted))


@given(st.lists(st.integers(1, 5), max_size=2), st.integers(1, 130), st.booleans())
@settings(max_examples=15)
def test_takes_any_shape(before, width, added):
    inputs = draw((*before, width), delta=WIDE if added else None, seed=width)
    for got, wanted in zip(evaluate(add_norm, inputs), evaluate(by_pytorch, inputs, exact=True), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_the_weights_gradient_does_not_depend_on_how_many_tokens_a_program_has(monkeypatch):
    inputs = draw((23, 16))
    whole = evaluate(add_norm, inputs)
    monkeypatch.setattr(module, "PROGRAMS", 3)
    for got, wanted in zip(evaluate(add_norm, inputs), whole, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_operands_may_be_strided():
    x, delta, weight = draw((6, 4, 16))
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1), delta.repeat(1, 1, 2)[..., :16], weight]
    for got, wanted in zip(evaluate(add_norm, strided), evaluate(add_norm, [x, delta, weight]), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("delta", [NARROW, None])
def test_is_an_operator_that_pytorch_can_trace(delta):
    inputs = [None if x is None else x.requires_grad_() for x in draw((2, 3, 16), delta=delta)]
    torch.library.opcheck(torch.ops.kvbind.add_norm.default, (*inputs, None, EPS, NARROW, False))
    bias = torch.zeros(16, device=DEVICE, requires_grad=True)
    torch.library.opcheck(torch.ops.kvbind.add_norm.default, (*inputs, bias, EPS, NARROW, True))


@pytest.mark.parametrize("delta", [WIDE, None])
def test_the_layer_takes_it_and_gives_products_their_dtype(delta, monkeypatch):
    x, delta, weight = draw((2, 5, 24), delta=delta)
    norm = ResidualNorm(24, eps=EPS, device=DEVICE)
    norm.load_state_dict({"weight": weight})
    with torch.autocast(DEVICE, dtype=NARROW):
        y, h = norm(x, delta)
        monkeypatch.setenv("KVBIND_KERNELS", "0")
        plain_y, plain_h = norm(x, delta)
    assert (y.dtype, h.dtype) == (plain_y.dtype, plain_h.dtype) == (WIDE, NARROW)
    torch.testing.assert_close(y, plain_y, rtol=0, atol=0)
    torch.testing.assert_close(h, plain_h)
    assert norm(x)[1].dtype == WIDE


def test_a_layer_norm_that_is_more_than_that_is_called(monkeypatch):
    x, delta, _ = draw((2, 5, 24))
    norm = torch.nn.LayerNorm(24, device=DEVICE)
    y, h = add_layer_norm(x, delta, norm)
    monkeypatch.setenv("KVBIND_KERNELS", "0")
    torch.testing.assert_close((y, h), add_layer_norm(x, delta, norm))
    monkeypatch.setenv("KVBIND_KERNELS", "force")
    norm.register_forward_hook(lambda *_: torch.ones(()))
    assert float(add_layer_norm(x, delta, norm)[1]) == 1


def test_leaves_to_pytorch_what_it_does_not_cover():
    x, delta, weight = draw((2, 16))
    assert covers(x, delta, weight)
    assert covers(x, None, weight)
    assert not covers(x.double(), None, weight)
    assert not covers(x, delta[:1], weight)
    assert not covers(x[:0], None, weight)
    assert not covers(torch.empty(1, 8193, device=DEVICE), None, weight)
