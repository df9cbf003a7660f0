"""One update of a depthwise convolution and a read, as kernels, against the definition in `forms.recurrent`."""

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("kernels need a GPU or TRITON_INTERPRET=1", allow_module_level=True)

from hypothesis import given, settings
from hypothesis import strategies as st

from kvbind.forms.recurrent import full_update
from kvbind.forms.tokens import Tokens
from kvbind.inner.networks import DepthwiseConv
from kvbind.inner.rule import FastWeights
from kvbind.inner.spec import InnerLoop
from kvbind.kernels.full_conv import operator as module
from kvbind.kernels.full_conv.operator import covers, full_conv

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def by_pytorch(q, k, v, kernel, rate, *, grid, clip, sign):
    """The definition, in the operands' dtype."""
    direction = "descent" if sign > 0 else "ascent"
    spec = InnerLoop(network=DepthwiseConv(grid), clip=clip, direction=direction, visibility="full")
    batch, _, heads, width = q.shape
    if kernel.dim() < 5:
        kernel = kernel.unflatten(-3, (heads, width))
    rates = {"out": rate.transpose(1, 2) if isinstance(rate, torch.Tensor) else rate}
    fast = FastWeights.start(spec, {"out": kernel.expand(batch, heads, width, 3, 3)})
    fast = full_update(spec, fast, Tokens(k.transpose(1, 2), v.transpose(1, 2), rates))
    return spec.network.apply(fast.weights, q.transpose(1, 2)).transpose(1, 2), fast.weights["out"]


def operands(*, dtype=torch.float32, grid=(4, 5), heads=1, width=16, batch=2, batched=False, rated=False, seed=0):
    """q, k, v (views of one projection), kernel and rate."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE)

    places = grid[0] * grid[1]
    q, k, v = normal(batch, places, 3 * heads * width + 3).to(dtype)[..., 3:].split(heads * width, dim=-1)
    q, k, v = (x.unflatten(-1, (heads, width)) for x in (q, k, v))
    kernel = normal(*([batch] if batched else []), heads * width, 3, 3) / 3
    rate = 1 / places**0.5
    if rated:
        # some tokens do not write
        rate = normal(batch, heads, places).abs().transpose(1, 2) * 0.1
        rate[:, ::5] = 0
    return [q, k, v, kernel, rate]


def evaluate(function, inputs, dtypes, *, new=True, read=True, **flags):
    """Outputs, and gradients of a fixed random combination of those asked for, in float64."""
    leaves = [
        x.detach().to(dtype).requires_grad_() if isinstance(x, torch.Tensor) else x
        for x, dtype in zip(inputs, dtypes, strict=True)
    ]
    outputs = function(*leaves, **flags)
    generator = torch.Generator().manual_seed(1)
    parts = [(y * torch.randn(y.shape, generator=generator).to(y)).sum() for y in outputs]
    total = sum(part for part, used in zip(parts, (read, new), strict=True) if used)
    tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
    grads = torch.autograd.grad(total, tensors, allow_unused=True, materialize_grads=True)
    return [y.detach().double().cpu() for y in (*outputs, *grads)]


def errors(found, exact):
    return [((a - b).norm() / b.norm().clamp(min=1e-9)).item() for a, b in zip(found, exact, strict=True)]


def compare(inputs, *, least=1e-5, **flags):
    own = [x.dtype if isinstance(x, torch.Tensor) else None for x in inputs]
    exact = evaluate(by_pytorch, inputs, [torch.float64] * len(inputs), **flags)
    found = evaluate(full_conv, inputs, own, **flags)
    assert max(errors(found, exact)) < least
    return found, exact


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_float32_agrees_with_the_definition(clip, sign):
    compare(operands(), grid=(4, 5), clip=clip, sign=sign)


@pytest.mark.parametrize("batched", [True, False])
def test_rates_by_token_agree_and_have_gradients(batched):
    compare(operands(rated=True, heads=2, batched=batched), grid=(4, 5), clip=True, sign=1.0)


@pytest.mark.parametrize(("new", "read"), [(True, False), (False, True)])
def test_gradients_of_either_output_alone_agree(new, read):
    compare(operands(), grid=(4, 5), clip=True, sign=1.0, new=new, read=read)


@settings(max_examples=4)
@given(height=st.integers(1, 5), width=st.integers(1, 5), channels=st.sampled_from([1, 5, 24]), rated=st.booleans())
def test_any_grid_and_width(height, width, channels, rated):
    grid = (height, width)
    compare(operands(grid=grid, width=channels, batch=1, rated=rated), grid=grid, clip=True, sign=1.0)


@pytest.mark.parametrize("width", [16, 48])
def test_parts_of_a_grid_add_up(monkeypatch, width):
    # 42 places in 4 parts, which end inside rows; 48 channels are three tiles, whose shares of the rate's gradient add up
    monkeypatch.setattr(module, "PART", 10)
    compare(operands(grid=(7, 6), width=width, batch=1, rated=True), grid=(7, 6), clip=True, sign=1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_operands_lose_only_the_rounding_of_what_is_stored(dtype):
    inputs = operands(dtype=dtype)
    found, exact = compare(inputs, least=1e-2, grid=(4, 5), clip=True, sign=1.0)
    assert errors(found, exact)[1] < 1e-5
    rounded = [x.to(dtype).double() for x in exact]
    assert errors(found, exact)[0] < 1.5 * errors(rounded, exact)[0]


def test_operands_have_dtypes_of_their_own():
    q, k, v, kernel, rate = operands()
    compare([q, k.bfloat16(), v.half(), kernel, rate], least=1e-2, grid=(4, 5), clip=True, sign=1.0)


@pytest.mark.parametrize("clip", [True, False])
def test_large_float16_activations_do_not_overflow(clip):
    q, k, v, kernel, _ = operands(dtype=torch.float16)
    # what is read leaves float16's range too, the gradients of k and v do not
    inputs = [10 * q.float(), k * 1e3, v * 1e3, kernel, 1e-3]
    found, exact = compare(inputs, least=1e-2, grid=(4, 5), clip=clip, sign=1.0, new=False)
    assert all(x.isfinite().all() for x in found)
    assert errors(found, exact)[1] < 1e-5


def test_keys_of_zero_have_finite_gradients():
    q, k, v, kernel, rate = operands()
    compare([q, torch.zeros_like(k), v, kernel, rate], grid=(4, 5), clip=True, sign=1.0)


def test_kernels_come_in_the_three_shapes_of_a_call_and_a_state():
    q, k, v, kernel, rate = operands(heads=2)
    flags = {"grid": (4, 5), "clip": True, "sign": 1.0}
    o, new = full_conv(q, k, v, kernel, rate, **flags)
    batched = kernel.expand(2, -1, -1, -1)
    for same in (batched, batched.unflatten(1, (2, 16)), batched.unflatten(1, (2, 16)).transpose(3, 4).contiguous().mT):
        again = full_conv(q, k, v, same, rate, **flags)
        assert torch.equal(again[0], o)
        assert torch.equal(again[1], new)
    assert new.shape == (2, 2, 16, 3, 3)


@pytest.mark.parametrize("rated", [True, False])
def test_operators_pass_pytorchs_own_checks(rated):
    inputs = operands(grid=(3, 4), batch=1, rated=rated)
    leaves = [x.detach().clone().requires_grad_() if isinstance(x, torch.Tensor) else x for x in inputs]
    q, k, v, kernel, rate = leaves
    kernel = kernel.detach().unflatten(0, (1, 16)).expand(1, 1, 16, 3, 3).clone().requires_grad_()
    torch.library.opcheck(
        torch.ops.kvbind.full_conv, (q, k, v, kernel, rate if rated else None, 1.0 if rated else rate, 3, 4, True, 1.0)
    )


def test_what_is_covered():
    assert covers(48, torch.bfloat16, torch.float32)
    assert not covers(2048, torch.bfloat16)
    assert not covers(64, torch.float64)


def test_what_does_not_fit_is_refused():
    q, k, v, kernel, rate = operands()
    with pytest.raises(ValueError, match="float64"):
        full_conv(q.double(), k, v, kernel, rate, grid=(4, 5), clip=True, sign=1.0)
    with pytest.raises(ValueError, match="grid must have as many places as there are tokens, 20; got 4 x 4"):
        full_conv(q, k, v, kernel, rate, grid=(4, 4), clip=True, sign=1.0)
