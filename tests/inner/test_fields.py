"""What fields exclude each other, how they are written, and how values that mean the same are one value."""

import json
import math
from dataclasses import dataclass

import pytest
import torch

import kvbind
from kvbind import GLU, MLP, Anchor, InnerLoop, LayerNormHead, Linear, NewtonSchulz, Retention, SwiGLU, Window

TOKEN = InnerLoop(Linear(), loss="squared", chunk=1, visibility="token")


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"refresh": 0}, ValueError, "refresh must be an int of at least 1; got 0"),
        ({"refresh": "never"}, ValueError, "refresh must be an int, 'call' or None; got 'never'"),
        ({"refresh": 2.0}, TypeError, "refresh must be an int"),
        ({"chunk": 4, "refresh": 6}, ValueError, "refresh must be a multiple of chunk = 4; got 6"),
        ({"visibility": "full", "chunk": None, "refresh": 4}, ValueError, "refresh must be None where there are no chunks"),
        ({"refresh": 4, "steps": 2}, ValueError, "steps must be 1 where gradients are renewed less"),
        ({"retention": "key"}, TypeError, "retention .* must be True or False; got 'key'"),
        ({"retention": Retention("key"), "network": SwiGLU()}, ValueError, "retention per key channel needs matrices whose"),
        ({"retention": Retention("key"), "network": Linear(bias=True)}, ValueError, "without bias or fast head"),
        (
            {"retention": Retention("head", "before"), "refresh": 4},
            ValueError,
            "retention before the gradient needs refresh",
        ),
        ({"retention": Retention("head", "before"), "chunk": 4}, ValueError, "before the gradient needs chunk=1"),
        ({"retention": Retention("head", "before"), "normalize": "read"}, ValueError, "exclude each other"),
        ({"erase": True, "loss": "dot"}, ValueError, "erase is where the residual of loss='squared' reads; got loss='dot'"),
        (
            {"writes": 2, "chunk": 4},
            ValueError,
            "writes above 1 need chunk=1 and a causal visibility; got writes=2, chunk=4",
        ),
        ({"writes": 2, "refresh": 4}, ValueError, "writes above 1 need refresh=None"),
        ({"writes": 2, "query": "key"}, ValueError, "writes above 1 need query='query'"),
        ({"read_rate": True, "visibility": "chunk"}, ValueError, "read_rate needs visibility='token'; got 'chunk'"),
        *(
            ({"read_rate": True} | other, ValueError, "read_rate and .* exclude each other")
            for other in (
                {"momentum": True},
                {"retention": True},
                {"normalize": True},
                {"orthogonalize": NewtonSchulz()},
                {"clip": True},
                {"anchor": Anchor()},
                {"steps": 2},
                {"writes": 2},
            )
        ),
        ({"window": 0}, ValueError, "window .* must be an int of at least 1; got 0"),
        ({"window": 2, "steps": 2}, ValueError, "window and several steps on a chunk exclude each other"),
        ({"window": 2, "visibility": "full", "chunk": None}, ValueError, "window needs chunks"),
        ({"anchor": 0.5}, TypeError, "anchor must be an Anchor or None; got 0.5"),
        ({"anchor": Anchor(), "chunk": 2}, ValueError, "anchor acts on whole chunks of writes"),
        ({"network": Linear(bias=True), "normalize": True}, ValueError, "normalize is of matrices: it excludes"),
        ({"network": Linear(bias=True), "orthogonalize": NewtonSchulz()}, ValueError, "orthogonalize is of matrices"),
        ({"network": Linear(head=LayerNormHead(fast=True)), "clip": True}, ValueError, "clip is of matrices"),
        ({"step_rate": 1.0}, TypeError, "step_rate must be True or False; got 1.0"),
    ],
)
def test_what_does_not_go_together_is_refused(fields, error, message):
    with pytest.raises(error, match=message):
        TOKEN.replace(**fields)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Retention("row"), ValueError, "retention's per must be one of 'head', 'key'"),
        (lambda: Retention(order="never"), ValueError, "retention's order must be one of"),
        (lambda: Window(2, "weights"), ValueError, "window's on must be one of"),
        (lambda: Anchor(strength=-1), ValueError, "anchor's strength must be 0 or more and finite; got -1"),
        (lambda: Anchor(decay=2), ValueError, "anchor's decay must be from 0 to 1; got 2"),
        (lambda: Anchor(follow="copied"), TypeError, "anchor's follow must be a number"),
        (lambda: Anchor(detach=("norms",)), ValueError, "anchor's detach must be one of"),
        (lambda: LayerNormHead(where="nowhere"), ValueError, "where must be one of"),
        (lambda: LayerNormHead(where="read", fast=True), ValueError, "fast needs a head in the loss"),
        (lambda: LayerNormHead(eps=0), ValueError, "eps must be a finite number above 0"),
        (lambda: Linear(head=True), TypeError, "head must be a LayerNormHead or None; got True"),
        (lambda: MLP(bias=1), TypeError, "bias must be True or False"),
    ],
)
def test_bad_values_are_refused_by_name(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_values_that_mean_the_same_are_one_value():
    assert TOKEN.replace(retention=Retention()) == TOKEN.replace(retention=True)
    assert TOKEN.replace(window=Window(3)) == TOKEN.replace(window=3)
    assert TOKEN.replace(window=Window(1, "update")) == TOKEN
    assert Anchor(detach=("start", "importance")) == Anchor(detach=["importance", "start", "start"])


def test_defaults_of_later_fields_are_not_written():
    """Runs are shared by a hash of what is written."""
    first = list(InnerLoop.field_names()[: InnerLoop.field_names().index("token_lr") + 1])
    assert list(TOKEN.to_dict()) == first
    assert TOKEN.to_dict()["network"] == {"kind": "Linear"}
    assert MLP().to_dict() == {"kind": "MLP", "activation": "gelu", "depth": 1}
    full = TOKEN.replace(
        network=MLP(bias=True, head=LayerNormHead(fast=True)), retention=Retention(order="before"), erase=True,
        window=Window(2, "update"), anchor=Anchor(detach=("start",)), step_rate=True,
    )  # fmt: skip
    assert InnerLoop.from_dict(json.loads(json.dumps(full.to_dict()))) == full
    assert InnerLoop.from_yaml(full.to_yaml()) == full
    assert hash(full) == hash(InnerLoop.from_yaml(full.to_yaml()))


def operands(spec, tokens=5, width=4):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, tokens, 2, width, generator=g, dtype=torch.float64) for _ in range(3))
    return spec.network.initial(2, width, width, generator=g, dtype=torch.float64), q, k, v


def test_a_gate_may_be_given_as_its_logarithm():
    spec = TOKEN.replace(retention=Retention("key"))
    weights, q, k, v = operands(spec)
    logs = -2 * torch.rand(2, 5, 2, 4, dtype=torch.float64)
    y, _ = kvbind.ttt(spec, weights, q, k, v, lr=0.1, retention=logs.exp())
    z, _ = kvbind.ttt(spec, weights, q, k, v, lr=0.1, log_retention=logs)
    assert torch.equal(y, z)
    with pytest.raises(ValueError, match="log_retention must be None beside retention"):
        kvbind.ttt(spec, weights, q, k, v, lr=0.1, retention=logs.exp(), log_retention=logs)
    y, _ = kvbind.ttt(spec, weights, q, k, v, lr=0.1, retention=math.exp(-0.5))
    z, _ = kvbind.ttt(spec, weights, q, k, v, lr=0.1, log_retention=-0.5)
    assert torch.equal(y, z)
    with pytest.raises(TypeError, match="log_retention must be a number or a floating-point tensor; got str"):
        kvbind.ttt(spec, weights, q, k, v, lr=0.1, log_retention="-0.5")
    for log in (0.1, float("nan"), 1e4):
        with pytest.raises(ValueError, match="log_retention must be at most 0, as a retention is at most 1; got"):
            kvbind.ttt(spec, weights, q, k, v, lr=0.1, log_retention=log)
    with pytest.raises(ValueError, match="retention must be None, as the inner loop has retention=False"):
        kvbind.ttt(TOKEN, weights, q, k, v, lr=0.1, log_retention=logs)


@pytest.mark.parametrize(
    ("fields", "given", "message"),
    [
        ({"retention": Retention("key")}, {"retention": (2, 5, 2)}, r"retention must be \[B, T, H, Dk\] = \[2, 5, 2, 4\]"),
        ({"erase": True}, {}, r"erase must be a tensor \[B, T, H, Dk\], as the inner loop has erase=True; got None"),
        ({"step_rate": True}, {"step_rate": (2, 5, 2, 1)}, r"step_rate must be \[B, T, H\] = \[2, 5, 2\]"),
        ({}, {"read_rate": (2, 5, 2)}, "read_rate must be None, as the inner loop has read_rate=False; got a gate"),
        ({"writes": 2}, {}, "k must have 2 rows for each token of q, as the inner loop has writes=2"),
    ],
)
def test_gates_are_there_in_their_shape_exactly_when_they_are_asked_for(fields, given, message):
    spec = TOKEN.replace(**fields)
    weights, q, k, v = operands(spec)
    gates = {name: torch.ones(shape, dtype=torch.float64) for name, shape in given.items()}
    with pytest.raises(ValueError, match=message):
        kvbind.ttt(spec, weights, q, k, v, lr=0.1, **gates)


def test_a_number_for_a_gate_that_is_not_there_is_named():
    weights, q, k, v = operands(TOKEN)
    with pytest.raises(ValueError, match=r"momentum must be None, as the inner loop has momentum=False; got 0\.9"):
        kvbind.ttt(TOKEN, weights, q, k, v, lr=0.1, momentum=0.9)


def test_biases_take_the_rate_of_their_matrix_unless_they_have_one():
    spec = TOKEN.replace(network=MLP("tanh", bias=True), loss="dot")
    weights, q, k, v = operands(spec)
    rate = torch.rand(2, 5, 2, dtype=torch.float64)
    of_matrices = {"in": 0.3, "out": rate}
    y, _ = kvbind.ttt(spec, weights, q, k, v, lr=of_matrices)
    z, _ = kvbind.ttt(spec, weights, q, k, v, lr=of_matrices | {"in.bias": 0.3, "out.bias": rate})
    assert torch.equal(y, z)
    other, _ = kvbind.ttt(spec, weights, q, k, v, lr=of_matrices | {"out.bias": 0.0})
    assert not torch.allclose(y, other)
    with pytest.raises(ValueError, match="lr lacks 'in'; as a dict it needs in, out"):
        kvbind.ttt(spec, weights, q, k, v, lr={"out": 0.1, "out.bias": 0.1})
    with pytest.raises(ValueError, match=r"weights lacks 'in\.bias'; MLP needs in, out, in\.bias, out\.bias"):
        kvbind.ttt(spec, {name: x for name, x in weights.items() if name != "in.bias"}, q, k, v)


@pytest.mark.parametrize(
    "spec",
    [
        TOKEN.replace(erase=True, clip=True),
        TOKEN.replace(retention=Retention(order="before"), normalize=True),
        TOKEN.replace(loss="dot", orthogonalize=NewtonSchulz(), refresh=4),
        TOKEN.replace(loss="dot", orthogonalize=NewtonSchulz(), writes=2),
        TOKEN.replace(anchor=Anchor()),
        TOKEN.replace(network=Linear(head=LayerNormHead())),
        InnerLoop(SwiGLU(), update="last", visibility="full", chunk=4),
    ],
    ids=lambda spec: ", ".join(spec.extensions),
)
def test_what_has_no_parallel_form_says_so_field_by_field(spec):
    found = kvbind.explain(spec)
    (name,) = spec.extensions
    assert not found.parallel
    assert found.obstacles[0].field == name
    assert f"{name}=" in str(found)
    assert not found.nearest.extensions
    weights, q, k, v = operands(spec)
    k, v = (x.repeat_interleave(spec.writes, dim=1) for x in (k, v))
    shapes = {name: (2, 5, 2, 4) if gate.per == "key" else (2, 5, 2) for name, gate in spec.gates.items()}
    gates = {name: torch.ones(shape, dtype=torch.float64) for name, shape in shapes.items()}
    with pytest.raises(kvbind.NoParallelFormError, match=name.replace(".", r"\.")):
        kvbind.ttt(spec, weights, q, k, v, form="parallel", **gates)


@pytest.mark.parametrize(
    "spec",
    [
        TOKEN.replace(erase=True),
        TOKEN.replace(retention=Retention(order="before")),
        TOKEN.replace(retention=Retention(per="key")),
        TOKEN.replace(refresh=4),
        TOKEN.replace(step_rate=True),
        TOKEN.replace(window=2),
        TOKEN.replace(network=Linear(bias=True)),
    ],
    ids=lambda spec: ", ".join(spec.extensions),
)
def test_fields_beside_which_writes_add_up_leave_a_parallel_form(spec):
    assert kvbind.explain(spec).parallel


@dataclass(frozen=True, repr=False)
class Residual(Linear):
    """`f(x) = x + LN(x W)`, which says nothing on its gradient."""

    def apply(self, weights, x):
        return x + torch.nn.functional.layer_norm(x @ weights["out"], weights["out"].shape[-1:], eps=1e-6)


def test_a_network_that_applies_itself_is_honoured_or_refused():
    """It is what `Linear` is with a head whose gamma and beta stay at 1 and 0."""
    for loss, visibility, chunk in (("squared", "token", 1), ("dot", "past", 3), ("squared", "full", None)):
        spec = InnerLoop(Residual(), loss=loss, visibility=visibility, chunk=chunk)
        same = spec.replace(network=Linear(head=LayerNormHead()))
        weights, q, k, v = operands(same, tokens=7)
        own = {"out": weights["out"].requires_grad_()}
        y, _ = kvbind.ttt(spec, own, q, k, v, lr=0.1)
        z, _ = kvbind.ttt(same, weights, q, k, v, lr=0.1)
        assert torch.allclose(y, z, atol=1e-12)
        slopes = [torch.autograd.grad(x.square().sum(), own["out"])[0] for x in (y, z)]
        assert torch.allclose(*slopes, atol=1e-10)
        assert not kvbind.explain(spec).parallel
        assert "an apply of its own" in str(kvbind.explain(spec))
        with pytest.raises(ValueError, match="an apply of its own"):
            kvbind.ttt(spec, own, q, k, v, lr=0.1, form="parallel")
        with pytest.raises(ValueError, match="network must be one whose apply"):
            kvbind.linearize(spec, own, q, k, v, lr=0.1)


def test_a_residual_head_needs_equal_widths():
    spec = TOKEN.replace(network=Linear(head=LayerNormHead()))
    weights = spec.network.initial(2, 4, 3, dtype=torch.float64)
    q, k, v = (torch.zeros(1, 2, 2, width, dtype=torch.float64) for width in (4, 4, 3))
    with pytest.raises(ValueError, match="a head with residual=True needs Dk = Dv; got Dk = 4 and Dv = 3"):
        kvbind.ttt(spec, weights, q, k, v)


def test_starting_norms_may_carry_no_gradient():
    spec = InnerLoop(GLU(), normalize=True, visibility="full", detach_norms=True)
    weights, q, k, v = operands(spec)
    leaf = weights["out"].requires_grad_()
    detached, kept = (
        torch.autograd.grad(kvbind.ttt(s, weights, q, k, v, lr=0.1)[0].sum(), leaf)[0]
        for s in (spec, spec.replace(detach_norms=False))
    )
    assert not torch.allclose(detached, kept)
