"""Hypothesis strategies: inner loops over all their fields, and operands that fit them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st

from kvbind import GLU, MLP, DepthwiseConv, InnerLoop, Linear, NewtonSchulz, SwiGLU
from kvbind.inner import LANGUAGE_COEFFICIENTS, VIEWS_COEFFICIENTS

NETWORKS = [
    Linear(),
    SwiGLU(),
    GLU(),
    MLP(),
    MLP(activation="silu", depth=2),
    MLP(activation="tanh", depth=3),
    MLP(activation="gelu_tanh"),
]


@st.composite
def specs(draw, visibilities=("past", "chunk", "token", "full"), networks=NETWORKS, **fixed):
    """Any valid inner loop; `fixed` fields keep their value."""
    visibility = draw(st.sampled_from(visibilities))
    network = draw(st.sampled_from(networks))
    chunk = None if visibility == "full" else draw(st.sampled_from([1, 2, 3, 5, 8]))
    whole = visibility != "token" or chunk == 1
    shaping = draw(st.sampled_from(["none", "orthogonalize", "clip"])) if whole else "none"
    if isinstance(network, DepthwiseConv) and shaping == "orthogonalize":
        shaping = "clip"
    coefficients = draw(st.sampled_from([LANGUAGE_COEFFICIENTS, VIEWS_COEFFICIENTS, ((1.5, -0.5, 0.0),) * 3]))
    fields = {
        "loss": draw(st.sampled_from(["dot", "squared"])),
        "update": draw(st.sampled_from(["all", "last"])),
        "momentum": draw(st.booleans()),
        "retention": draw(st.booleans()),
        "normalize": draw(st.sampled_from([False, True, "read"])),
        "direction": draw(st.sampled_from(["descent", "ascent"])),
        "query": draw(st.sampled_from(["query", "query", "key"])),
        "steps": draw(st.sampled_from([1, 1, 2, 3])) if whole else 1,
        "orthogonalize": NewtonSchulz(coefficients, torch.float64) if shaping == "orthogonalize" else None,
        "clip": shaping == "clip",
    }
    return InnerLoop(network=network, chunk=chunk, visibility=visibility, **(fields | fixed))


@st.composite
def parallel_specs(draw, **fixed):
    """Any inner loop that has a parallel form."""
    squared = draw(st.booleans())
    networks = [n for n in NETWORKS if not squared or not isinstance(n, GLU)]
    update = draw(st.sampled_from(["all", "last"]))
    networks = [Linear()] if update == "all" else networks
    fields = {"loss": "squared" if squared else "dot", "update": update, "normalize": False, "steps": 1} | fixed
    if squared:
        fields |= {"orthogonalize": None, "clip": False}
    spec = draw(specs(networks=networks, **fields))
    if not squared and (spec.visibility != "token" or spec.chunk == 1) and draw(st.booleans()):
        spec = spec.replace(normalize="read")
    return spec


@dataclass
class Operands:
    """A call's arguments: `ttt(spec, o.weights, o.q, o.k, o.v, **o.options)`."""

    weights: dict[str, torch.Tensor]
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    options: dict[str, object] = field(default_factory=dict)

    def span(self, start, stop):
        """The call's tokens from start to stop."""
        cut = slice(start, stop)
        rates = self.options["lr"]
        options = {
            **{name: x[:, cut] for name, x in self.options.items() if name != "lr"},
            "lr": {name: x[:, cut] for name, x in rates.items()} if isinstance(rates, dict) else rates[:, cut],
        }
        return Operands(self.weights, self.q[:, cut], self.k[:, cut], self.v[:, cut], options)


def operands(spec, batch=2, tokens=7, heads=2, key_width=3, value_width=4, hidden=5, seed=0, dtype=torch.float64, rate=0.3):
    """Random operands that fit `spec`; rates by matrix, gates in (0.2, 1)."""
    g = torch.Generator().manual_seed(seed)
    if isinstance(spec.network, DepthwiseConv):
        key_width = value_width

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    def gate():
        return (0.2 + 0.8 * torch.rand(batch, tokens, heads, generator=g, dtype=torch.float64)).to(dtype)

    weights = {
        name: x.to(dtype)
        for name, x in spec.network.initial(heads, key_width, value_width, hidden, generator=g, dtype=torch.float64).items()
    }
    options = {"lr": {name: rate * gate() for name in spec.updated}}
    if spec.momentum:
        options["momentum"] = gate()
    if spec.retention:
        options["retention"] = gate()
    q, k, v = (
        normal(batch, tokens, heads, key_width),
        normal(batch, tokens, heads, key_width),
        normal(batch, tokens, heads, value_width),
    )
    return Operands(weights, q, k, v, options)


def leaves(o):
    """Every operand of a call by name."""
    found = {"q": o.q, "k": o.k, "v": o.v} | {f"weights.{name}": x for name, x in o.weights.items()}
    found |= {f"lr.{name}": x for name, x in o.options["lr"].items()}
    return found | {name: x for name, x in o.options.items() if name != "lr"}


def error(x, reference):
    """Relative error in norm; NaN where either has one."""
    return float(
        (x.detach().double() - reference.detach().double()).norm() / reference.detach().double().norm().clamp(min=1e-300)
    )


def small_sizes(tokens):
    """Sizes for `operands`, with up to `tokens` tokens."""
    return st.fixed_dictionaries(
        {
            "batch": st.integers(1, 2),
            "tokens": st.integers(1, tokens),
            "heads": st.integers(1, 2),
            "key_width": st.integers(1, 4),
            "value_width": st.integers(1, 4),
            "hidden": st.integers(1, 5),
            "seed": st.integers(0, 2**20),
        }
    )
