"""Products over spans of rows, and the sums over columns that they take on the way."""

import pytest
import torch

from kvbind.kernels.common.devices import has_triton, interpreted

pytestmark = pytest.mark.skipif(
    not has_triton() or not (interpreted() or torch.cuda.is_available()), reason="needs Triton's interpreter or a GPU"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, HEADS = 40, 2


@pytest.fixture
def used_memory(monkeypatch):
    """New zeros are what a tile of another width has left there, as after a configuration that tuning has tried."""
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, **options: zeros(*shape, **options) + 7)


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def spans():
    return torch.tensor([[0, 24, 0, 0], [24, 16, 1, 0]], dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("width", [32, 80, 144])
def test_sums_of_a_product_hold_nothing_of_other_tiles(width, used_memory):
    from kvbind.kernels.chunked.span_products import product

    x, w, other = randn(ROWS, HEADS, 48, seed=0), randn(2, HEADS, 48, width, seed=1), randn(ROWS, HEADS, width, seed=2)
    y, dots = product(x, w, spans(), 24, column=2, against=other)
    each = torch.tensor([0] * 24 + [1] * 16)
    expected = torch.einsum("rhk,rhkn->rhn", x.double(), w[each.to(DEVICE)].double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dots.double(), (expected * other).sum(-1), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("hidden", [32, 80, 144])
def test_gradients_of_rates_hold_nothing_of_other_tiles(hidden, used_memory):
    from kvbind.kernels.chunked.span_products import features_backward

    x, theta = randn(ROWS, HEADS, 48, seed=0), randn(2, 1, HEADS, 48, hidden, seed=1)
    g, matrices = randn(ROWS, HEADS, 32, seed=2), randn(2, HEADS, hidden, 32, seed=3)
    rates = torch.rand(ROWS, HEADS, device=DEVICE)
    *_, d_rates = features_backward(x, theta, g, matrices, spans(), 24, "silu", rates)
    each = torch.tensor([0] * 24 + [1] * 16).to(DEVICE)
    u, p = (torch.einsum("rhd,hdf->rhf", x.double(), m[0].double()) for m in theta)
    d_features = torch.einsum("rhe,rhfe->rhf", g.double(), matrices[each].double())
    expected = (torch.nn.functional.silu(u) * p * d_features).sum(-1)
    torch.testing.assert_close(d_rates.double(), expected, rtol=1e-4, atol=1e-2)
