import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbind import MLP, DepthwiseConv
from kvbind.inner.activations import ACTIVATIONS
from reference import forward
from strategies import NETWORKS, error

EVERY = [*NETWORKS, DepthwiseConv(), *(MLP(activation=name) for name in ACTIVATIONS)]


@settings(max_examples=150)
@given(st.sampled_from(EVERY), st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**20))
def test_closed_form_gradients_are_those_of_torch_func_grad(network, heads, width, seed):
    g = torch.Generator().manual_seed(seed)
    tokens = 9
    conv = isinstance(network, DepthwiseConv)
    value_width = width if conv else 3
    stored = network.initial(heads, width, value_width, 4, generator=g, dtype=torch.float64)
    weights = {
        name: x.reshape(heads, *shape)
        for (name, x), shape in zip(
            stored.items(), network.shapes(width, value_width, (4,) * network.hidden_layers).values(), strict=True
        )
    }
    x = torch.randn(heads, tokens, width, generator=g, dtype=torch.float64)
    d = torch.randn(heads, tokens, value_width, generator=g, dtype=torch.float64)
    rates = {name: torch.rand(heads, tokens, 1, generator=g, dtype=torch.float64) for name in network.matrices}
    found = network.gradients(weights, x, d, rates, network.matrices)
    assert (
        error(
            network.apply(weights, x),
            torch.stack([forward(network, {n: w[h] for n, w in weights.items()}, x[h]) for h in range(heads)]),
        )
        < 1e-12
    )
    for name in network.matrices:
        for h in range(heads):
            own = {n: w[h] for n, w in weights.items()}
            expected = torch.func.grad(
                lambda m, own=own, h=h, name=name: (rates[name][h] * forward(network, {**own, name: m}, x[h]) * d[h]).sum()
            )(own[name])
            assert torch.allclose(found[name][h], expected, rtol=1e-10, atol=1e-12), name


def test_updating_the_last_layer_alone_gives_its_gradient_alone():
    for network in NETWORKS:
        weights = network.initial(2, 3, 3, 4)
        x = torch.randn(2, 5, 3)
        rates = dict.fromkeys(network.matrices, 1.0)
        every = network.gradients(weights, x, x, rates, network.matrices)
        last = network.gradients(weights, x, x, rates, ("out",))
        assert list(last) == ["out"]
        assert torch.equal(last["out"], every["out"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MLP(activation="gellu"), "did you mean 'gelu'"),
        (lambda: MLP(depth=0), "depth must be an int of at least 1; got 0"),
        (lambda: MLP(depth=True), "depth must be an int"),
        (lambda: DepthwiseConv(grid=(3,)), "grid must be"),
        (lambda: DepthwiseConv(grid=(3, 0)), "grid's height and width"),
        (lambda: DepthwiseConv(grid=(2, 5)).grid_of(9), "needs 2 x 5 = 10 tokens; got 9"),
        (lambda: DepthwiseConv().grid_of(8), "a square number of tokens; got 8"),
        (lambda: MLP().initial(0, 4, 4), "heads must be an int of at least 1; got 0"),
        (lambda: MLP().initial(2, 4, 4, hidden=-3), "hidden must be an int of at least 1; got -3"),
        (lambda: MLP(depth=2).initial(2, 4, 4, hidden=[8]), r"one width for each of 2 hidden layers; got \[8\]"),
    ],
)
def test_bad_networks_are_refused(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()
