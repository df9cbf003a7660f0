import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbind.bench.verify.accuracy import scan_errors
from kvbind.forms.parallel.scan import decay_matrix, linear_scan, product_of, products_after
from strategies import error


@settings(max_examples=60)
@given(st.integers(1, 80), st.integers(0, 2**20), st.booleans())
def test_scan_is_the_recurrence_it_states(count, seed, with_zero):
    g = torch.Generator().manual_seed(seed)
    gates = torch.rand(2, 2, count, generator=g, dtype=torch.float64)
    if with_zero:
        gates[..., count // 2] = 0.0
    writes = torch.randn(2, 2, count, 3, 2, generator=g, dtype=torch.float64)
    y = torch.randn(2, 2, 3, 2, generator=g, dtype=torch.float64)
    found = linear_scan(gates, writes, y)
    for c in range(count):
        y = gates[:, :, c, None, None] * y + writes[:, :, c]
        assert torch.allclose(found[:, :, c], y, rtol=1e-10, atol=1e-12)


@settings(max_examples=30)
@given(st.integers(1, 20), st.integers(0, 2**20))
def test_decay_matrix_holds_the_product_over_every_span(count, seed):
    gates = torch.rand(2, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    matrix = decay_matrix(gates)
    for i in range(count):
        for j in range(count):
            expected = gates[:, j + 1 : i + 1].prod(-1) if j <= i else torch.zeros(2, dtype=torch.float64)
            assert torch.allclose(matrix[:, i, j], expected, rtol=1e-12, atol=0)


def test_scan_of_1024_chunks_with_gates_near_one_half_is_exact_in_float32():
    for row in scan_errors([16, 32, 64, 1024], torch.device("cpu")):
        assert row["by_products"] < 1e-5
    assert row["by_division"] > 0.1  # what the scan avoids


def test_scan_has_finite_gradients_at_gates_of_zero():
    gates = torch.tensor([[[0.5, 0.0, 0.3]]], requires_grad=True)
    writes, initial = torch.ones(1, 1, 3, 2, requires_grad=True), torch.ones(1, 1, 2, requires_grad=True)
    linear_scan(gates, writes, initial).sum().backward()
    assert torch.isfinite(gates.grad).all()
    assert error(gates.grad, torch.tensor([[[2.0, 1.5 * 2 * 1.3, 1.0 * 2]]])) < 1e-6


@pytest.mark.parametrize("gates", [[0.5, 1e-30, 1e-20, 0.3], [0.5, 0.0, 1e-30, 0.3], [0.0, 0.0, 2.0], [0.7], []])
def test_products_of_gates_have_exact_gradients_at_any_gate(gates):
    """In float32, of which the product of two gates may be too small where that of the others is not."""
    low = torch.tensor([[gates]], requires_grad=True)
    products = torch.cat((product_of(low)[..., None], products_after(low)), -1)
    n = len(gates)
    for i in range(n + 1):
        spans = range(n) if i == 0 else range(i, n)
        (found,) = torch.autograd.grad(products[0, 0, i], low, retain_graph=True, allow_unused=True, materialize_grads=True)
        for t in range(n):
            others = math.prod(gates[s] for s in spans if s != t) if t in spans else 0.0
            assert found[0, 0, t].item() == pytest.approx(others, rel=1e-5, abs=1e-45)


def test_a_scan_keeps_what_is_not_finite_from_what_comes_before_it():
    gates, writes, initial = torch.full((1, 1, 80), 0.5), torch.ones(1, 1, 80, 3), torch.ones(1, 1, 3)
    expected = linear_scan(gates, writes, initial)
    for x in (gates, writes):
        changed = x.clone()
        changed[0, 0, 50] = math.inf
        found = linear_scan(*(changed if y is x else y for y in (gates, writes)), initial)
        assert torch.equal(found[:, :, :50], expected[:, :, :50])
        assert not found[:, :, 50:].isfinite().any()
