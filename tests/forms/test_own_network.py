"""Fast networks that users define beside the library's."""

from dataclasses import dataclass

import pytest
import torch

import kvbind
from kvbind import InnerLoop, Network
from kvbind.inner.networks import NETWORKS
from strategies import error


@dataclass(frozen=True, repr=False)
class Gated(Network):
    """`f(x) = sigmoid(x G) * (relu(x) W)`, which says nothing on the gradient of its gate."""

    @property
    def matrices(self):
        return ("gate", "out")

    def shapes(self, key_width, value_width, hidden):
        return {"gate": (key_width, value_width), "out": (key_width, value_width)}

    def features(self, weights, x):
        return torch.relu(x)

    def gate(self, weights, x):
        return torch.sigmoid(x @ weights["gate"])


@pytest.fixture
def operands():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 70, 2, 4, generator=g, dtype=torch.float64) for _ in range(3))
    return Gated().initial(2, 4, 4, generator=g, dtype=torch.float64), q, k, v


@pytest.mark.parametrize("loss", ["dot", "squared"])
@pytest.mark.parametrize(("visibility", "chunk"), [("past", 8), ("token", 1), ("full", None)])
def test_a_gate_of_ones_own_is_run_alike_in_every_form(operands, loss, visibility, chunk):
    spec = InnerLoop(network=Gated(), loss=loss, update="last", visibility=visibility, chunk=chunk)
    fast, _ = kvbind.ttt(spec, *operands, lr=0.05)
    slow, _ = kvbind.ttt(spec, *operands, lr=0.05, form="recurrent")
    assert error(fast, slow) < 1e-10
    assert error(kvbind.linearize(spec, *operands, lr=0.05).output(), slow) < 1e-9
    assert kvbind.explain(spec).parallel == (loss == "dot")
    assert "o_t   = gate(q_t) * q^_t S" in str(kvbind.explain(spec))


def test_a_gates_last_layer_has_the_gradient_of_torch_func(operands):
    weights, _, k, v = operands
    own, x, g = {name: m[0] for name, m in weights.items()}, k[0, :, 0], v[0, :, 0]
    expected = torch.func.grad(lambda m: (Gated().apply({**own, "out": m}, x) * g).sum())(own["out"])
    assert torch.allclose(Gated().gradients(own, x, g, {"out": 1.0}, ("out",))["out"], expected, rtol=1e-10)


def test_updating_what_has_no_gradient_is_refused(operands):
    with pytest.raises(NotImplementedError, match=r"Gated must define gradients to update gate; update='last'"):
        kvbind.ttt(InnerLoop(network=Gated(), chunk=8), *operands, lr=0.05)


def test_a_network_that_is_entered_among_the_known_ones_is_read_back(operands, monkeypatch, tmp_path):
    monkeypatch.setitem(NETWORKS, "Gated", Gated)
    spec = InnerLoop(network=Gated(), update="last", chunk=8)
    assert InnerLoop.from_yaml(spec.to_yaml()) == spec
    _, state = kvbind.ttt(spec, *operands, lr=0.05)
    state.save(tmp_path / "state.safetensors")
    assert kvbind.State.load(tmp_path / "state.safetensors").spec == spec
