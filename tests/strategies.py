"""Hypothesis strategies: inner loops over all their fields, and operands that fit them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st

from kvbind import (
    GLU,
    MLP,
    Anchor,
    DepthwiseConv,
    InnerLoop,
    LayerNormHead,
    Linear,
    NewtonSchulz,
    Retention,
    SwiGLU,
    Window,
)
from kvbind.forms.obstacles import parallel_in_spans, parallel_obstacles
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
def specs(draw, visibilities=("past", "chunk", "token", "full"), networks=NETWORKS, valid=True, **fixed):
    """Any valid inner loop with `fixed` fields; unless `valid`, fields by name, which may exclude each other."""
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
    fields = {"network": network, "chunk": chunk, "visibility": visibility} | fields | fixed
    return InnerLoop(**fields) if valid else fields


def memory(chunk):
    """An MLP under squared error with momentum and retention, one write per chunk."""
    return InnerLoop(network=MLP("silu"), loss="squared", momentum=True, retention=True, chunk=chunk)


HEADS = [LayerNormHead(residual, where, 1e-3) for residual in (True, False) for where in ("both", "loss", "read")]
HEADS += [LayerNormHead(True, "both", 1e-3, fast=True), LayerNormHead(False, "loss", 1e-3, fast=True)]

ANCHORS = [
    Anchor(),
    Anchor(importance="absolute", strength=0.3, follow=1.0, start=1e-3),
    Anchor(importance="square", weight="rest", decay=0.4, strength=0.2, follow=0.8),
    Anchor(follow=0.3, detach=("importance", "start")),
    Anchor(importance="square", weight="rest", strength=0.2, detach=("importance", "follow")),
]


@st.composite
def general_specs(draw, visibilities=("past", "chunk", "token", "full"), **fixed):
    """Any valid inner loop with fields beyond the six lines on whole chunks, several at once."""
    networks = [
        *NETWORKS,
        *(Linear(bias=bias, head=draw(st.sampled_from([None, *HEADS]))) for bias in (True, False)),
        MLP("tanh", bias=True, head=draw(st.sampled_from([None, *HEADS]))),
        MLP("silu", 2, bias=draw(st.booleans()), head=draw(st.sampled_from(HEADS))),
    ]
    spec = draw(specs(visibilities=visibilities, networks=networks, valid=False))
    if spec["visibility"] == "full":
        spec["chunk"] = draw(st.sampled_from([None, 2, 3]))
    retention = draw(
        st.sampled_from([False, True, *(Retention(p, o) for p in ("head", "key") for o in ("after", "before"))])
    )
    changes = {
        "retention": retention,
        "refresh": draw(
            st.sampled_from([None, None, "call", *([] if spec["chunk"] is None else [n * spec["chunk"] for n in (2, 3)])])
        ),
        "erase": draw(st.booleans()),
        "writes": draw(st.sampled_from([1, 1, 2, 3])),
        "read_rate": draw(st.sampled_from([False, False, True])),
        "step_rate": draw(st.booleans()),
        "window": draw(st.sampled_from([1, 1, 2, 3, Window(2, "update"), Window(3, "update")])),
        "anchor": draw(st.sampled_from([None, None, *ANCHORS])),
        "detach_norms": draw(st.booleans()),
    }
    # what few others go with comes first now and then
    first = draw(st.sampled_from([None, None, "read_rate", "writes", "retention"]))
    if first == "read_rate" and "token" in visibilities:
        spec |= {"visibility": "token", "chunk": spec["chunk"] or 2}
        changes |= {"read_rate": True}
    elif first == "writes" and spec["visibility"] != "full":
        spec |= {"chunk": 1, "query": "query"}
        changes |= {"writes": draw(st.sampled_from([2, 3])), "refresh": None}
    elif first == "retention":
        spec |= {"network": draw(st.sampled_from([Linear(), GLU()]))}
    # fields that exclude each other: the later one gives way
    found = InnerLoop(**(spec | {"network": Linear(), "orthogonalize": None, "clip": False, "normalize": False, "steps": 1}))
    found = found.replace(momentum=False, retention=False)
    whole = draw(st.permutations([*changes, *(name for name in spec if name not in changes)]))
    for name in [name for name in (first,) if name] + whole:
        value = (spec | changes)[name]
        try:
            found = found.replace(**{name: value})
        except ValueError:
            continue
    return found.replace(**fixed)


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


@st.composite
def affine_specs(draw):
    """Any inner loop of `general_specs` that has a parallel form by its writes adding up."""
    spec = draw(general_specs(visibilities=("past", "chunk", "token")))
    spec = spec.replace(anchor=None, normalize=False, orthogonalize=None, clip=False, steps=1)
    for obstacle in parallel_obstacles(spec):
        if obstacle.field == "network.head":
            spec = spec.replace(**obstacle.edit)
    if spec.update == "all" and spec.network.theta:
        spec = spec.replace(update="last")
    if any(obstacle.field == "loss" for obstacle in parallel_obstacles(spec)):
        spec = spec.replace(loss="dot", erase=False)
    assert not parallel_obstacles(spec), spec
    return spec


@st.composite
def shaped_specs(draw):
    """Any inner loop with fields beyond the six lines whose writes are orthogonalized, clipped or read normalized."""
    spec = draw(general_specs(visibilities=("past", "chunk", "token"), loss="dot", erase=False))
    update = {"update": "last"} if spec.network.theta else {}
    spec = spec.replace(anchor=None, normalize=False, steps=1, refresh=None, writes=1, read_rate=False, **update)
    for obstacle in parallel_obstacles(spec):
        spec = spec.replace(**obstacle.edit)
    if spec.network.has_bias:
        spec = spec.replace(network=spec.network.replace(bias=False))
    if spec.visibility == "token" and spec.chunk != 1:
        spec = spec.replace(visibility="chunk")
    if spec.orthogonalize is None and not spec.clip:
        before = spec.decays_before
        spec = spec.replace(
            **draw(st.sampled_from([{"clip": True}, {"normalize": "read"}] if not before else [{"clip": True}]))
        )
    assert not parallel_obstacles(spec), spec
    return spec


@st.composite
def span_specs(draw):
    """Any inner loop of `general_specs` that has a parallel form inside spans alone."""
    spec = draw(general_specs(visibilities=("past", "chunk", "token")))
    spec = spec.replace(anchor=None, normalize=False, orthogonalize=None, clip=False, steps=1, writes=1)
    if isinstance(spec.retention, Retention) and spec.retention.per == "key":
        spec = spec.replace(retention=Retention("head", spec.retention.order))
    if type(spec.network) not in (Linear, MLP):
        spec = spec.replace(network=draw(st.sampled_from([MLP("silu"), MLP("gelu_tanh", 2), MLP("tanh", bias=True)])))
    if not parallel_obstacles(spec):
        spec = spec.replace(
            network=spec.network.replace(head=draw(st.sampled_from([h for h in HEADS if h.where != "read"])))
        )
    if not parallel_in_spans(spec):
        changes = [{"visibility": "token", "chunk": 3}, {"refresh": 3 * spec.chunk}, {"refresh": "call"}]
        if spec.decays_before:
            spec = spec.replace(retention=True)
        change = draw(st.sampled_from(changes))
        spec = spec.replace(refresh=None).replace(**change)
    assert parallel_obstacles(spec), spec
    assert parallel_in_spans(spec), spec
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
        tokens, rates = self.q.shape[1], self.options["lr"]

        def cut(x):
            # a token may have several rows
            each = x.shape[1] // tokens if tokens else 1
            return x[:, start * each : None if stop is None else stop * each]

        options = {
            **{name: cut(x) for name, x in self.options.items() if name != "lr"},
            "lr": {name: cut(x) for name, x in rates.items()} if isinstance(rates, dict) else cut(rates),
        }
        return Operands(self.weights, cut(self.q), cut(self.k), cut(self.v), options)


def operands(spec, batch=2, tokens=7, heads=2, key_width=3, value_width=4, hidden=5, seed=0, dtype=torch.float64, rate=0.3):
    """Random operands that fit `spec`; rates by matrix, gates in (0.2, 1)."""
    g = torch.Generator().manual_seed(seed)
    head = spec.network.output_head
    if isinstance(spec.network, DepthwiseConv) or (head is not None and head.residual):
        key_width = value_width
    rows = tokens * spec.writes

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    def gate(*shape):
        return (0.2 + 0.8 * torch.rand(*(shape or (batch, tokens, heads)), generator=g, dtype=torch.float64)).to(dtype)

    weights = {
        name: x.to(dtype)
        for name, x in spec.network.initial(heads, key_width, value_width, hidden, generator=g, dtype=torch.float64).items()
    }
    weights |= {name: weights[name] + 0.3 * normal(*weights[name].shape) for name in spec.network.vectors}
    options = {"lr": {name: rate * gate(batch, rows, heads) for name in spec.updated}}
    for name, declared in spec.gates.items():
        if declared.writes == "itself":
            options[name] = 0.5 * normal(batch, rows, heads, key_width)
        else:
            options[name] = gate(batch, tokens, heads, *([key_width] if declared.per == "key" else []))
    q, k, v = (
        normal(batch, tokens, heads, key_width),
        normal(batch, rows, heads, key_width),
        normal(batch, rows, heads, value_width),
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
