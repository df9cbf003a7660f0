"""`silu(gate) * up` as kernels against its PyTorch reference in float64."""

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("kernels need a GPU or TRITON_INTERPRET=1", allow_module_level=True)

import numpy as np
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbind.kernels.elementwise import swiglu_kernels
from kvbind.kernels.elementwise.swiglu import reference, swiglu, takes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Kernels run, and what they do not write is not a number."""
    monkeypatch.setenv("KVBIND_KERNELS", "force")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def operands(*shape, dtype=torch.float32, pad=0, apart=0):
    """Gate and up, views of one projection whose rows are `pad` longer, with tokens left out between batches."""
    generator = torch.Generator().manual_seed(0)
    *outer, width = shape
    if outer:
        outer[-1] += apart
    joined = torch.randn(*outer, 2 * width + pad, generator=generator).to(DEVICE, dtype)
    joined = joined[..., : outer[-1] - apart, :] if outer else joined
    return list(joined[..., pad:].chunk(2, dim=-1))


def evaluate(function, inputs, dtype, wanted=(True, True)):
    """The result, and gradients of a fixed random combination of it, in float64."""
    leaves = [x.detach().to(dtype).requires_grad_(grad) for x, grad in zip(inputs, wanted, strict=True)]
    y = function(*leaves)
    # numbers that every dtype holds alike
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(inputs[0].dtype).to(y))
    assert [leaf.grad is not None for leaf in leaves] == list(wanted)
    return [x.detach().double() for x in (y, *(leaf.grad for leaf in leaves if leaf.grad is not None))]


def errors(found, exact):
    return [((a - b).norm() / b.norm().clamp(min=1e-9)).item() for a, b in zip(found, exact, strict=True)]


def compare(inputs, least=1e-5, wanted=(True, True)):
    assert takes(*inputs)
    exact = evaluate(reference, inputs, torch.float64, wanted)
    found = evaluate(swiglu, inputs, inputs[0].dtype, wanted)
    assert max(errors(found, exact)) < least
    return found, exact


@pytest.mark.parametrize("shape", [(2, 5, 48), (3, 1, 1000), (1, 2, 2056), (7, 16), (24,), (2, 3, 4, 8)])
def test_float32_agrees_with_the_definition(shape):
    compare(operands(*shape))


@pytest.mark.parametrize(("pad", "apart"), [(0, 0), (8, 0), (3, 0), (0, 2), (5, 1)])
def test_rows_may_be_strided(pad, apart):
    gate, up = operands(2, 5, 24, pad=pad, apart=apart)
    assert torch.equal(swiglu(gate, up), swiglu(gate.clone(), up.clone()))
    compare([gate, up])


def test_channels_may_be_strided():
    gate, up = operands(4, 6, 8)
    compare([gate.mT.contiguous().mT, up])


def far_apart(x):
    """The same numbers in rows 2^30 elements apart, in memory that is for the most part never touched."""
    room = 2**30 * (len(x) - 1) + x.shape[1]
    memory = torch.empty(room, dtype=x.dtype, device=DEVICE) if x.is_cuda else torch.from_numpy(np.empty(room, np.float32))
    return memory.as_strided(x.shape, (2**30, 1)).copy_(x)


def test_rows_may_lie_further_apart_than_32_bits_count():
    gate, up = operands(3, 16)
    assert torch.equal(swiglu(far_apart(gate), up), swiglu(gate, up))


@pytest.mark.parametrize("shape", [(3, 1000), (129, 7)])
def test_nothing_is_written_past_the_end(shape):
    gate, up = (x.clone() for x in operands(*shape))
    results = torch.full((3, 2 * gate.numel()), torch.nan, device=DEVICE)
    y, dgate, dup = (row[: gate.numel()].view(shape) for row in results)
    swiglu_kernels.forward(gate, up, y)
    swiglu_kernels.backward(y, gate, up, dgate, dup)
    assert results[:, : gate.numel()].isfinite().all()
    assert results[:, gate.numel() :].isnan().all()


@settings(max_examples=30)
@given(rows=st.lists(st.integers(1, 4), max_size=3), width=st.integers(1, 40), pad=st.integers(0, 2))
def test_any_shape(rows, width, pad):
    compare(operands(*rows, width, pad=pad))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_operands_lose_only_the_last_rounding(dtype):
    inputs = operands(2, 5, 96, dtype=dtype)
    found, exact = compare(inputs, least=1e-2)
    rounded = [x.to(dtype).double() for x in exact]
    for own, unavoidable in zip(errors(found, exact), errors(rounded, exact), strict=True):
        assert own < 1.1 * unavoidable
    for own, of_reference in zip(errors(found, exact), errors(evaluate(reference, inputs, dtype), exact), strict=True):
        assert own < 2 * of_reference


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_either_operand_may_be_constant(wanted):
    compare(operands(2, 3, 8), wanted=wanted)


def test_the_gradient_may_be_one_number_for_all():
    leaves = [x.detach().requires_grad_() for x in operands(2, 3, 8)]
    found = torch.autograd.grad(swiglu(*leaves).sum(), leaves)
    for own, exact in zip(found, torch.autograd.grad(reference(*leaves).sum(), leaves), strict=True):
        torch.testing.assert_close(own, exact)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_gates_far_from_zero_are_open_or_closed():
    gate = torch.tensor([-200.0, -100.0, 0.0, 100.0, 200.0], device=DEVICE, requires_grad=True)
    y = swiglu(gate, torch.ones_like(gate))
    y.sum().backward()
    assert y.tolist() == [0, 0, 0, 100, 200]
    assert gate.grad.tolist() == [0, 0, 0.5, 1, 1]


@pytest.mark.parametrize("shape", [(2, 0, 8), (0,), (3, 0)])
def test_nothing_gives_nothing(shape):
    gate, up = (torch.empty(shape, device=DEVICE, requires_grad=True) for _ in range(2))
    y = swiglu(gate, up)
    y.sum().backward()
    assert y.shape == gate.grad.shape == up.grad.shape == shape


def test_the_operator_passes_pytorchs_own_checks():
    for gate, up in (operands(2, 3, 8), operands(2, 3, 8, pad=3), operands(0, 8)):
        torch.library.opcheck(torch.ops.kvbind.swiglu, (gate.detach().requires_grad_(), up.detach().requires_grad_()))


def test_what_the_kernels_do_not_take_goes_the_way_of_pytorch(monkeypatch):
    gate, up = operands(2, 3, 8)
    others = [(gate.double(), up.double()), (gate, up.bfloat16()), (gate, up[:, :1]), (gate[0, 0, 0], up[0, 0, 0])]
    for pair in others:
        assert not takes(*pair)
        assert torch.equal(swiglu(*pair), F.silu(pair[0]) * pair[1])
    monkeypatch.setenv("KVBIND_KERNELS", "0")
    assert not takes(gate, up)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(swiglu(gate, up.bfloat16()), F.silu(gate) * up.bfloat16())
