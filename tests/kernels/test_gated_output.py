"""The gated output of fast weights as kernels against its PyTorch reference in float64."""

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

from kvbind.kernels.elementwise import gated_output_kernels
from kvbind.kernels.elementwise.gated_output import MAX_WIDTH, gated_output, reference, takes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Kernels run, and what they do not write is not a number."""
    monkeypatch.setenv("KVBIND_KERNELS", "force")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def operands(batch=2, length=3, heads=2, width=16, *, dtype=torch.float32, weight=torch.float32, gated=True):
    """Fast, weight, gate and mixed."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    # heads of very different size
    fast = normal(batch, length, heads, width) * torch.logspace(-2, 2, heads, device=DEVICE, dtype=dtype)[:, None]
    gate = normal(batch, length, heads) if gated else None
    return [fast, (1 + normal(width) / 2).to(weight), gate, normal(batch, length, heads * width)]


def evaluate(function, inputs, dtypes, wanted=(True,) * 4, eps=EPS):
    """The result, and gradients of a fixed random combination of it, in float64."""
    leaves = [
        x if x is None else x.detach().to(dtype).requires_grad_(grad)
        for x, dtype, grad in zip(inputs, dtypes, wanted, strict=True)
    ]
    y = function(*leaves, eps)
    # numbers that every dtype holds alike
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(inputs[3].dtype).to(y))
    given = [(leaf, grad) for leaf, grad in zip(leaves, wanted, strict=True) if leaf is not None]
    assert [leaf.grad is not None for leaf, _ in given] == [grad for _, grad in given]
    return [x.detach().double() for x in (y, *(leaf.grad for leaf, grad in given if grad))]


def errors(found, exact):
    return [((a - b).norm() / b.norm().clamp(min=1e-9)).item() for a, b in zip(found, exact, strict=True)]


def own_dtypes(inputs):
    return [None if x is None else x.dtype for x in inputs]


def compare(inputs, least=1e-5, **options):
    assert takes(*inputs)
    exact = evaluate(reference, inputs, [torch.float64] * 4, **options)
    found = evaluate(gated_output, inputs, own_dtypes(inputs), **options)
    assert max(errors(found, exact)) < least
    return found, exact


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("width", [1, 16, 20, 48, 384, 1000])
def test_float32_agrees_with_the_definition(width, gated):
    compare(operands(width=width, gated=gated))


@pytest.mark.parametrize(("batch", "length", "heads"), [(1, 1, 1), (3, 1, 4), (1, 70, 1), (2, 33, 5)])
def test_tiles_end_where_rows_do(batch, length, heads):
    compare(operands(batch, length, heads, width=48))


def test_partial_sums_of_many_programs_add_up(monkeypatch):
    # 60 rows in tiles of 2, which 7 programs take by turns
    monkeypatch.setattr(gated_output_kernels, "_programs", lambda x, tiles, most: min(tiles, 7))
    compare(operands(2, 10, 3, width=1000))


@settings(max_examples=30)
@given(
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 5), st.integers(1, 3), st.integers(1, 40)),
    gated=st.booleans(),
)
def test_any_shape(sizes, gated):
    compare(operands(*sizes, gated=gated))


def strided(fast, weight, gate, mixed):
    """The same numbers, elsewhere: longer rows, heads before tokens, gates one of three, mixed cut from longer sequences."""
    longer = torch.cat((mixed, mixed), dim=1)
    return [
        fast.transpose(1, 2).contiguous().transpose(1, 2),
        weight.repeat_interleave(2)[::2],
        torch.stack((gate, gate, gate), dim=-1)[..., 1],
        longer[:, : mixed.shape[1]],
    ]


def padded(fast, weight, gate, mixed):
    """The same numbers, where vectors do not fit."""
    return [F.pad(fast, (1, 2))[..., 1:-2], weight, F.pad(gate, (1, 0))[..., 1:], F.pad(mixed, (1, 0))[..., 1:]]


def across(fast, weight, gate, mixed):
    """The same numbers, channels not side by side."""
    return [fast.mT.contiguous().mT, weight, gate.mT.contiguous().mT, mixed.mT.contiguous().mT]


@pytest.mark.parametrize("elsewhere", [strided, padded, across])
@pytest.mark.parametrize("width", [16, 24])
def test_operands_may_be_strided(elsewhere, width):
    inputs = operands(width=width)
    moved = elsewhere(*inputs)
    assert torch.equal(gated_output(*moved, EPS), gated_output(*inputs, EPS))
    compare(moved)


def far_apart(x):
    """The same numbers with tokens 2^30 elements apart, in memory that is for the most part never touched."""
    room = 2**30 * (x.shape[1] - 1) + x[0, 0].numel()
    memory = torch.empty(room, dtype=x.dtype, device=DEVICE) if x.is_cuda else torch.from_numpy(np.empty(room, np.float32))
    return memory.as_strided(x.shape, (2**30, 2**30, *x.stride()[2:])).copy_(x)


def test_tokens_may_lie_further_apart_than_32_bits_count():
    inputs = fast, weight, gate, mixed = operands(1, 3)
    expected = gated_output(*inputs, EPS)
    assert torch.equal(gated_output(far_apart(fast), weight, gate, mixed, EPS), expected)
    assert torch.equal(gated_output(fast, weight, gate, far_apart(mixed), EPS), expected)
    assert torch.equal(gated_output(fast, weight, far_apart(gate), mixed, EPS), expected)


@pytest.mark.parametrize("width", [1000, 48])
def test_nothing_is_written_past_the_end(width):
    fast, weight, gate, mixed = operands(1, 5, 1, width=width)
    results, of_gates = (torch.full((2, 2 * x.numel()), torch.nan, device=DEVICE) for x in (fast, gate))
    y, dfast = (row[: fast.numel()].view_as(x) for row, x in zip(results, (mixed, fast), strict=True))
    gated_output_kernels.forward(fast, weight, gate, mixed, y, EPS)
    gated_output_kernels.backward(y, fast, weight, gate, dfast, of_gates[0, : gate.numel()].view_as(gate), EPS)
    assert results[:, : fast.numel()].isfinite().all()
    assert results[:, fast.numel() :].isnan().all()
    assert of_gates[0, : gate.numel()].isfinite().all()
    assert of_gates[0, gate.numel() :].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("narrow", [True, False], ids=["all narrow", "weight in float32"])
def test_narrow_operands_lose_only_the_last_rounding(dtype, narrow):
    inputs = operands(2, 9, 2, width=96, dtype=dtype, weight=dtype if narrow else torch.float32)
    found, exact = compare(inputs, least=1e-2)
    dtypes = own_dtypes([inputs[3], *inputs])
    rounded = [x.to(own).double() for x, own in zip(exact, dtypes, strict=True)]
    of_reference = errors(evaluate(reference, inputs, own_dtypes(inputs)), exact)
    for own, unavoidable, other in zip(errors(found, exact), errors(rounded, exact), of_reference, strict=True):
        assert own < 1.1 * unavoidable + 1e-6
        assert own < 2 * other + 1e-6


def test_the_result_may_be_wider_than_what_is_added():
    fast, weight, gate, mixed = operands(dtype=torch.bfloat16)
    y = gated_output(fast, weight, gate, mixed.float(), EPS)
    assert y.dtype == torch.float32
    found = evaluate(gated_output, [fast, weight, gate, mixed.float()], [torch.bfloat16, torch.float32] * 2)
    exact = evaluate(reference, [fast, weight, gate, mixed.float()], [torch.float64] * 4)
    assert errors(found, exact)[0] < 1e-6
    assert max(errors(found, exact)) < 1e-2


@pytest.mark.parametrize(
    "wanted", [tuple(i == j for i in range(4)) for j in range(4)], ids=["fast", "weight", "gate", "mixed"]
)
def test_any_operand_may_be_the_only_one_with_a_gradient(wanted):
    compare(operands(), wanted=wanted)


def test_the_gradient_may_be_one_number_for_all():
    leaves = [x.requires_grad_() for x in operands()]
    found = torch.autograd.grad(gated_output(*leaves, EPS).sum(), leaves)
    for own, exact in zip(found, torch.autograd.grad(reference(*leaves, EPS).sum(), leaves), strict=True):
        torch.testing.assert_close(own, exact, rtol=1e-4, atol=1e-5)


def test_outputs_of_zero_have_finite_gradients():
    fast, *others = operands()
    compare([torch.zeros_like(fast), *others])
    compare([torch.zeros_like(fast), *others], eps=1e-2)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("sizes", [(0, 3, 2), (2, 0, 2)])
def test_nothing_gives_nothing(sizes, gated):
    leaves = [x if x is None else x.requires_grad_() for x in operands(*sizes, gated=gated)]
    y = gated_output(*leaves, EPS)
    y.sum().backward()
    assert y.shape == leaves[3].shape
    assert torch.equal(leaves[1].grad, torch.zeros(16, device=DEVICE))


@pytest.mark.parametrize("gated", [True, False])
def test_the_operator_passes_pytorchs_own_checks(gated):
    for inputs in (operands(width=24, gated=gated), operands(length=0, gated=gated)):
        leaves = [x if x is None else x.requires_grad_() for x in inputs]
        torch.library.opcheck(torch.ops.kvbind.gated_output, (*leaves, EPS))


def test_what_is_taken(monkeypatch):
    fast, weight, gate, mixed = operands(dtype=torch.bfloat16)
    assert takes(fast, weight, gate, mixed)
    assert takes(fast, weight.bfloat16(), None, mixed.float())
    assert not takes(fast, weight, gate.float(), mixed)
    assert not takes(fast, weight, gate, mixed.half())
    assert not takes(fast, weight.half(), gate, mixed)
    assert not takes(fast.double(), weight.double(), gate.double(), mixed.double())
    wide = torch.empty(1, 1, 1, MAX_WIDTH + 1, device=DEVICE)
    assert not takes(wide, wide[0, 0, 0], None, wide[0])
    monkeypatch.setenv("KVBIND_KERNELS", "0")
    assert not takes(fast, weight, gate, mixed)


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_without_kernels_the_result_is_that_of_the_modules(monkeypatch, dtype, autocast):
    monkeypatch.setenv("KVBIND_KERNELS", "0")
    fast, weight, gate, mixed = operands(dtype=dtype, weight=torch.promote_types(dtype, torch.float32))
    norm = torch.nn.RMSNorm(16, eps=EPS, device=DEVICE, dtype=weight.dtype)
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        norm.weight.copy_(weight)
        normed = norm(fast.to(weight.dtype)).to(fast.dtype)
        assert torch.equal(gated_output(fast, weight, None, mixed, EPS), mixed + normed.flatten(2))
        expected = mixed + (normed * F.silu(gate).unsqueeze(-1)).flatten(2)
        assert torch.equal(gated_output(fast, weight, gate, mixed, EPS), expected)
