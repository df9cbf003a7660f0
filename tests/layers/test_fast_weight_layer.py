"""Layers of published systems: each written again as its paper has it, token by token, from the layer's parameters alone."""

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

import reference
from kvbind import InnerLoop, LayerNormHead, Linear, Retention
from kvbind.inner.projections import (
    DEFAULTS,
    MAKINGS,
    Bounded,
    Constant,
    Decay,
    Learned,
    PerHead,
    Place,
    Projections,
    Sigmoid,
    Softplus,
    Step,
)
from kvbind.inner.systems import PROJECTIONS
from kvbind.layers.fast_weights.convolution import Tails
from kvbind.layers.fast_weights.layer import FastWeightLayer
from kvbind.layers.layout import Layout
from kvbind.sequence.boundaries import Boundaries, with_room
from published import SPAN, SYSTEMS

D, H, T = 8, 2, 11


def make_layer(name, **fields):
    """A layer whose every parameter matters, in float64."""
    torch.manual_seed(0)
    layer = FastWeightLayer(D, H, SYSTEMS[name], PROJECTIONS[name].replace(**fields), base_lr=0.1, hidden_multiplier=2)
    for parameter in layer.parameters():
        parameter.data = torch.randn_like(parameter) * 0.6
    return layer.double()


def make_input(batch=1, length=T, seed=1):
    return torch.randn(batch, length, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@dataclass
class Plain:
    """A layer's parameters by name, and what its papers' formulas are written with; one row `[T, d]`."""

    p: dict
    x: torch.Tensor

    def linear(self, name, x=None):
        y = (self.x if x is None else x) @ self.p[f"{name}.weight"].T
        return y + self.p[f"{name}.bias"] if f"{name}.bias" in self.p else y

    def low_rank(self, name, between=lambda y: y, x=None):
        return self.linear(f"{name}.2", between(self.linear(f"{name}.0", x)))

    def convolved(self, parts):
        """Each channel a weighted sum of its last four tokens; the weights of all parts lie side by side."""
        y, w = torch.cat(parts, dim=1), self.p["conv.weight"]
        rows = []
        for t in range(len(y)):
            row = sum(w[:, 3 - back] * y[t - back] for back in range(4) if t >= back)
            rows.append(row + self.p["conv.bias"] if "conv.bias" in self.p else row)
        return torch.stack(rows).split([part.shape[1] for part in parts], dim=1)

    def qkv(self, conv=True, silu=True):
        parts = [self.linear(f"{name}_proj") for name in "qkv"]
        parts = self.convolved(parts) if conv else parts
        return [heads(F.silu(part) if silu else part) for part in parts]

    def mamba_step(self, name, low_rank=False):
        logits = self.low_rank(f"{name}.proj") if low_rank else self.linear(f"{name}.proj")
        return F.softplus(logits + self.p[f"{name}.step_bias"])

    def mamba_decay(self, low_rank=False):
        step = self.mamba_step("makers.retention", low_rank)
        return torch.exp(-self.p["makers.retention.log_rate"].exp()[:, None] * heads(step)).squeeze(-1)

    def out(self, o, gate=None, first=False, norm=None):
        """Norm of each head, gate, projection; o `[T, H, Dv]`."""
        w = self.p["output_norm.weight"] if norm is None else None
        gate = 1 if gate is None else gate.reshape(o.shape)
        o = o * gate if first else o
        o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w if norm is None else norm(o)
        return (o if first else o * gate).flatten(1) @ self.p["o_proj.weight"].T


def heads(x, n=H):
    return x.unflatten(1, (n, -1))


def l2(x):
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def scan(q, k, v, step):
    """Outputs `[T, H, Dv]` of `S_t = step(S, t, h)`, read by q."""
    columns = []
    for h in range(q.shape[1]):
        state, rows = torch.zeros(k.shape[-1], v.shape[-1], dtype=q.dtype), []
        for t in range(len(q)):
            state = step(state, t, h)
            rows.append(q[t, h] @ state)
        columns.append(torch.stack(rows))
    return torch.stack(columns, dim=1)


def delta(state, k, v, beta):
    return state + beta * torch.outer(k, v - k @ state)


def turned(x, positions, theta=1e4):
    """Rotary positions on the halves of a head."""
    half = x.shape[-1] // 2
    angles = torch.as_tensor(positions)[:, None, None] * theta ** -(torch.arange(half) / half)
    cos, sin = angles.float().cos(), angles.float().sin()
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def retnet(m):
    q, k, v = m.qkv(conv=False, silu=False)
    q, k = (turned(y, range(len(y))) for y in (q, k))
    gate = [1 - 2.0 ** (-5 - h) for h in range(H)]
    o = scan(q / math.sqrt(q.shape[-1]), k, v, lambda s, t, h: gate[h] * s + torch.outer(k[t, h], v[t, h]))
    return m.out(o, F.silu(m.linear("output_gate")))


def simple_gla(m):
    q, k, v = m.qkv()
    gate = m.linear("makers.retention.proj").sigmoid() ** (1 / 16)
    o = scan(q / math.sqrt(q.shape[-1]), k, v, lambda s, t, h: gate[t, h] * s + torch.outer(k[t, h], v[t, h]))
    return m.out(o, F.silu(m.linear("output_gate")))


def gla(m):
    q, k, v = m.qkv(conv=False, silu=False)
    gate = heads(m.low_rank("makers.retention.proj").sigmoid() ** (1 / 16))
    o = scan(q / math.sqrt(q.shape[-1]), k, v, lambda s, t, h: gate[t, h][:, None] * s + torch.outer(k[t, h], v[t, h]))
    return m.out(o, F.silu(m.linear("output_gate")))


def mamba2(m):
    c, b, x = (F.silu(part) for part in m.convolved([m.linear(f"{name}_proj") for name in "qkv"]))
    x, step = heads(x), m.mamba_step("makers.retention")
    decay = torch.exp(-m.p["makers.retention.log_rate"].exp() * step)
    q = c[:, None].expand(-1, H, -1)
    y = scan(q, q, x, lambda s, t, h: decay[t, h] * s + torch.outer(b[t], step[t, h] * x[t, h]))
    y = y + m.p["skip"][:, None] * x

    def norm(o):
        flat = o.flatten(1)
        return (flat / (flat.square().mean(-1, keepdim=True) + 1e-5).sqrt() * m.p["output_norm.weight"]).reshape(o.shape)

    return m.out(y, F.silu(m.linear("output_gate")), first=True, norm=norm)


def delta_net(m):
    q, k, v = m.qkv()
    q, k, beta = l2(q) / math.sqrt(q.shape[-1]), l2(k), m.linear("makers.rate.proj").sigmoid()
    return m.out(scan(q, k, v, lambda s, t, h: delta(s, k[t, h], v[t, h], beta[t, h])))


def gated_delta_net(m):
    q, k, v = m.qkv()
    q, k, beta = l2(q) / math.sqrt(q.shape[-1]), l2(k), m.linear("makers.rate.proj").sigmoid()
    gate = m.mamba_decay()
    o = scan(q, k, v, lambda s, t, h: delta(gate[t, h] * s, k[t, h], v[t, h], beta[t, h]))
    return m.out(o, F.silu(m.linear("output_gate")))


def delta_product(m):
    q, k, v = (F.silu(part) for part in m.convolved([m.linear(f"{name}_proj") for name in "qkv"]))
    q, k, v = heads(q), k.unflatten(1, (2, H, -1)), v.unflatten(1, (2, H, -1))
    q, k = l2(q) / math.sqrt(q.shape[-1]), l2(k)
    beta, gate = 2 * m.linear("makers.rate.proj").sigmoid().unflatten(1, (H, 2)), m.mamba_decay()

    def step(s, t, h):
        s = gate[t, h] * s
        for n in range(2):
            s = delta(s, k[t, n, h], v[t, n, h], beta[t, h, n])
        return s

    return m.out(scan(q, k[:, 0], v[:, 0], step), F.silu(m.linear("output_gate")))


def kda(m):
    q, k, v = m.qkv()
    q, k, beta = l2(q) / math.sqrt(q.shape[-1]), l2(k), m.linear("makers.rate.proj").sigmoid()
    gate = m.mamba_decay(low_rank=True)
    o = scan(q, k, v, lambda s, t, h: delta(gate[t, h][:, None] * s, k[t, h], v[t, h], beta[t, h]))
    return m.out(o, m.low_rank("output_gate").sigmoid())


def gdn2(m):
    q, k, v = m.qkv()
    q, k, gate = l2(q) / math.sqrt(q.shape[-1]), l2(k), m.mamba_decay(low_rank=True)
    b, w = (heads(m.linear(f"makers.{name}.proj").sigmoid()) for name in ("erase", "write_gate"))

    def step(s, t, h):
        s = gate[t, h][:, None] * s
        return s + torch.outer(k[t, h], w[t, h] * v[t, h] - (b[t, h] * k[t, h]) @ s)

    return m.out(scan(q, k, v, step), m.low_rank("output_gate").sigmoid())


def comba(m):
    q, k, v = m.qkv()
    share = m.p["makers.erase.logit"].sigmoid()[:, None]
    q = l2(q - m.p["correction"][:, None] * share * k) / math.sqrt(q.shape[-1])
    k, beta, gate = l2(k), m.linear("makers.rate.proj").sigmoid(), m.mamba_decay()

    def step(s, t, h):
        return gate[t, h] * s + beta[t, h] * torch.outer(k[t, h], v[t, h] - share[h] * k[t, h] @ s)

    return m.out(scan(q, k, v, step), m.linear("output_gate").sigmoid())


def rwkv7(m):
    before = torch.cat((torch.zeros(1, D, dtype=m.x.dtype), m.x[:-1]))
    mixed = {name: m.x + (before - m.x) * m.p[f"shift.{name}"] for name in ("q", "k", "v", "retention", "removal")}
    q, k, v = (heads(m.linear(f"{name}_proj", mixed[name])) for name in "qkv")
    decay = heads(torch.exp(-math.exp(-0.5) * m.low_rank("makers.retention.proj", torch.tanh, mixed["retention"]).sigmoid()))
    x = heads(m.low_rank("makers.removal.proj", x=mixed["removal"]).sigmoid())
    r, y = l2(k * m.p["kappa"]), k * (1 + (x - 1) * m.p["alpha"])

    def step(s, t, h):
        return decay[t, h][:, None] * s - torch.outer(r[t, h] * x[t, h], r[t, h] @ s) + torch.outer(y[t, h], v[t, h])

    def norm(o):
        centred = o - o.mean(-1, keepdim=True)
        eps = 1e-5 * o.shape[-1]
        each = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        flat = each.flatten(1) * m.p["output_norm.weight"] + m.p["output_norm.bias"]
        return flat.reshape(o.shape) + (q * y * m.p["rho"]).sum(-1, keepdim=True) * v

    last = m.x + (before - m.x) * m.p["shift.output_gate"]
    return m.out(scan(q, y, v, step), m.low_rank("output_gate", torch.sigmoid, last), norm=norm)


def weights_of(m, names):
    return {name: m.p[f"weights.{name.replace('.', '_')}"] for name in names}


def run(name, weights, q, k, v, rate, **gates):
    """The inner loop of the tests' reference on one row, one rate for all weights."""
    spec = SYSTEMS[name]
    lr = dict.fromkeys(spec.updated, rate[None])
    return reference.run(spec, weights, q[None], k[None], v[None], lr, **{n: x[None] for n, x in gates.items()})[0][0]


def ttt(name, base):
    def layer(m):
        shared = m.linear("k_proj")
        q, k = m.convolved([shared, shared])
        places = [t % SPAN for t in range(len(q))]
        q, k = (turned(heads(y), places) for y in (q, k))
        v = heads(m.linear("v_proj"))
        rate = base * m.linear("makers.rate.proj").sigmoid() / v.shape[-1]
        theta = m.p["makers.read_rate.theta"]
        reader = torch.stack([(1 / (p + 1) + theta[p]).clamp(min=0) for p in places])[:, None].expand(-1, H)
        weights = weights_of(m, SYSTEMS[name].network.tensors)
        o = run(name, weights, q, k, v, rate, read_rate=reader).flatten(1)
        o = F.layer_norm(o, o.shape[1:], m.p["output_norm.weight"], m.p["output_norm.bias"], 1e-6)
        return (o * F.gelu(m.linear("output_gate"), approximate="tanh")) @ m.p["o_proj.weight"].T

    return layer


def memory(name, powers=False):
    def layer(m):
        q, k, v = m.qkv()
        q, k = l2(q), l2(k)
        if powers:
            a, b = m.p["powers"]
            q, k = (a * y + b * y * y for y in (q, k))
        rate = 2 * m.linear("makers.rate.proj").sigmoid() / v.shape[-1]
        gates = {gate: m.linear(f"makers.{gate}.proj").sigmoid() for gate in SYSTEMS[name].gates}
        o = run(name, weights_of(m, SYSTEMS[name].network.tensors), q, k, v, rate, **gates)
        return m.out(o, F.silu(m.linear("output_gate")))

    return layer


PLAIN = {
    "retnet": retnet, "simple_gla": simple_gla, "gla": gla, "mamba2": mamba2, "delta_net": delta_net,
    "gated_delta_net": gated_delta_net, "delta_product": delta_product, "kda": kda, "gdn2": gdn2, "comba": comba,
    "rwkv7": rwkv7, "ttt_linear": ttt("ttt_linear", 1), "ttt_mlp": ttt("ttt_mlp", 0.1), "titans": memory("titans"),
    "atlas": memory("atlas", powers=True),
}  # fmt: skip


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_layer_is_what_its_paper_says(name):
    layer, x = make_layer(name), make_input()
    with torch.no_grad():
        plain = PLAIN[name](Plain(dict(layer.named_parameters()), x[0]))
        torch.testing.assert_close(layer(x)[0][0], plain, rtol=1e-7, atol=1e-7)


def test_every_published_layer_is_held_to_its_paper():
    assert PROJECTIONS.keys() == PLAIN.keys()


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_layer_goes_on_where_a_call_stopped_and_packed_rows_are_apart(name):
    layer, x = make_layer(name), make_input(batch=2)
    with torch.no_grad():
        whole, state, parts = layer(x)[0], None, []
        for start, stop in itertools.pairwise((0, 2, 3, 3, 8, T)):
            part, state = layer(x[:, start:stop], state=state, return_state=True)
            parts.append(part)
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-10, atol=1e-10)
        assert state.seen == (T, T)
        bounds = (0, 2, 2, 7, T)
        packed = layer(x[:1], Layout.packed(bounds, 1, T, x.device))[0]
        alone = [layer(x[:1, a:b])[0] for a, b in itertools.pairwise(bounds) if b > a]
        torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=1e-10, atol=1e-10)


def test_packed_rows_whose_ends_the_device_alone_reads_are_apart_too():
    layer, x, bounds = make_layer("mamba2"), make_input(), torch.tensor([0, 2, 2, 7, T])
    layer.inner = layer.inner.replace(visibility="past", chunk=3)
    with torch.no_grad():
        known = layer(x, Layout.packed(bounds, 1, T, x.device))[0]
        layout = Layout.packed(Boundaries(with_room(bounds), T), 1, T, x.device)
        torch.testing.assert_close(layer(x, layout)[0], known, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="boundaries that the host reads"):
        layer.call(x, layout)
    with pytest.raises(ValueError, match=f"one row of {T} tokens"):
        Layout.packed(Boundaries(bounds, T), 2, T, x.device)


@pytest.mark.parametrize("name", ["delta_product", "rwkv7", "ttt_linear"])
def test_rows_of_different_lengths_leave_what_they_would_alone(name):
    layer, x, lengths = make_layer(name), make_input(batch=3), (T, 0, 5)
    more = make_input(batch=3, length=3, seed=2)
    with torch.no_grad():
        rows = Layout(torch.arange(T)[None], lengths=lengths)
        _, state = layer(x, rows, return_state=True)
        assert state.seen == lengths
        after = layer(more, state=state.select(torch.tensor([2, 0, 1, 1])[:3]))[0]
        for place, i in enumerate((2, 0, 1)):
            alone = layer(torch.cat((x[i : i + 1, : lengths[i]], more[place : place + 1]), dim=1))[0][:, lengths[i] :]
            torch.testing.assert_close(after[place : place + 1], alone, rtol=1e-10, atol=1e-10)


def test_constant_gates_need_no_parameters_and_small_ones_have_gradients():
    retnet, gla = make_layer("retnet"), make_layer("gla")
    assert not any("retention" in name for name, _ in retnet.named_parameters())
    for parameter in gla.makers["retention"].parameters():
        parameter.data = parameter.data - 4000 * (parameter.dim() == 1)
    gla(make_input())[0].sum().backward()
    # exp(-4000 / 16) is no float32 and hardly a gate, but its logarithm has a gradient
    assert gla.makers["retention"].proj[2].bias.grad.isfinite().all()


def test_a_call_is_what_a_layer_runs():
    layer, x = make_layer("comba"), make_input()
    with torch.no_grad():
        call = layer.call(x)
        assert set(call.gates) == {"log_retention", "erase"}
        layout = Layout.rows(T, x.device)
        made = layer._make(x, layout, layout.positions, Tails())
        torch.testing.assert_close(layer.o_proj(layer._join(call.run()[0], made)), layer(x)[0])


def test_what_an_inner_loop_needs_is_made_where_nothing_else_is_said():
    inner = InnerLoop(
        Linear(bias=True, head=LayerNormHead()), loss="squared", retention=True, erase=True, chunk=1, refresh=2,
        visibility="token", momentum=True, step_rate=True,
    )  # fmt: skip
    layer = FastWeightLayer(D, H, inner)
    kinds = {name: type(maker.making) for name, maker in layer.makers.items()}
    assert kinds == {"rate": Softplus} | dict.fromkeys(("momentum", "retention", "erase", "step_rate"), Sigmoid)
    with torch.no_grad():
        gates = layer.call(torch.zeros(1, 2, D)).gates
    torch.testing.assert_close(gates["log_retention"].exp(), torch.full((1, 2, H), 0.99))
    assert layer(make_input().float())[0].isfinite().all()


@pytest.mark.parametrize("name", SYSTEMS)
def test_projections_survive_plain_data(name):
    made = PROJECTIONS[name]
    assert Projections.from_dict(made.to_dict()) == made
    assert DEFAULTS.to_dict() == {}
    assert "conv" not in made.replace(conv=0, tied=False).to_dict()


MAKING = [
    Sigmoid(3, "tanh", scale=2.0, start=0.3), Decay("head", rate=(1, 16)), Bounded(start=(-1, 2)), Softplus(start=0.1),
    Constant(0.5), PerHead(3.0), Learned(0.0), Step(), Place(),
]  # fmt: skip


def test_makings_survive_plain_data():
    assert {type(making) for making in MAKING} == set(MAKINGS.values())
    for making in MAKING:
        fields = {key: value for key, value in making.to_dict().items() if key != "kind"}
        assert MAKINGS[type(making).__name__].from_dict(fields) == making


def projected(**fields):
    return lambda: Projections(**fields)


def built(inner, **fields):
    return lambda: FastWeightLayer(D, H, SYSTEMS.get(inner, inner), Projections(**fields))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (projected(rate=PerHead()), TypeError, "rate must be one of Sigmoid, Softplus, Constant; got PerHead"),
        (projected(retention=0.9), TypeError, r"Constant; got 0.9 \(Constant\(0.9\) is that for all tokens and heads\)"),
        (projected(removal=0.9), TypeError, "removal must be one of Sigmoid; got 0.9$"),
        (projected(retention=Constant(1.5)), ValueError, "retention must not exceed 1"),
        (projected(write_gate=Step()), ValueError, "takes its step from a retention that is a Decay"),
        (projected(retention=Sigmoid(scale=2.0)), ValueError, "retention must not exceed 1"),
        (projected(tied=True), ValueError, "tied needs a convolution on both"),
        (projected(conv_on=("x",)), ValueError, "conv_on must be one of 'q', 'k', 'v'"),
        (projected(conv=2, conv_on=()), ValueError, "conv_on must name some"),
        (projected(gate_between="tanh"), ValueError, "between needs a rank"),
        (lambda: Sigmoid(start=1.0), ValueError, "start must be between 0 and 1"),
        (lambda: Sigmoid(start=0.5, bias=False), ValueError, "start needs bias=True"),
        (lambda: Decay(rate=(2, 1)), ValueError, "rate must rise"),
        (lambda: Projections.from_dict({"rate": {"kind": "Sigmod"}}), ValueError, "did you mean 'Sigmoid'"),
        (built("gla", removal=Sigmoid()), ValueError, "removal needs an inner loop with writes=2 and erase=True"),
        (built("gla", correction=True), ValueError, "correction needs an inner loop with erase=True"),
        (built("delta_product", skip="value"), ValueError, "skip needs one value for each token"),
        (built("titans", start="zero"), ValueError, "start must be 'learned' for a network of several layers"),
        (built("gla", rotary="span"), ValueError, "rotary='span' needs spans of several tokens"),
        (built("ttt_linear", value_width=2), ValueError, "key_width = value_width for a head with residual=True"),
        (built("gla", key_width=0.01), ValueError, "key_width must leave a head at least one"),
        (built("gla", key_width=0.75, rotary="sequence"), ValueError, "key_width must be even for rotary positions"),
        (built("kda", retention=Decay(), write_gate=Step()), ValueError, "whose weights decay per head"),
        (built(InnerLoop(Linear(), visibility="full")), ValueError, "visibility must be 'past' or 'token'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_an_inner_loop_can_be_exchanged_for_one_that_needs_no_more():
    layer, x = make_layer("gated_delta_net"), make_input()
    first = layer(x)[0]
    layer.inner = SYSTEMS["delta_net"]
    assert not torch.allclose(layer(x)[0], first)
    layer.inner = SYSTEMS["gated_delta_net"]
    assert torch.equal(layer(x)[0], first)
    for inner, message in (
        (SYSTEMS["kda"], "inner has the gate retention per key"),
        (SYSTEMS["comba"].replace(retention=SYSTEMS["gated_delta_net"].retention), "inner has the gate erase per key"),
        (SYSTEMS["delta_product"].replace(retention=False), "inner must have writes=1"),
        (SYSTEMS["titans"], "start must be 'learned' for a network"),
    ):
        with pytest.raises(ValueError, match=message):
            layer.inner = inner


def test_a_state_of_another_kind_of_layer_or_batch_is_refused():
    layer = make_layer("gla")
    _, state = layer(make_input(), return_state=True)
    with pytest.raises(ValueError, match="state must be of 2 sequences"):
        layer(make_input(batch=2), state=state)
    with pytest.raises(TypeError, match="state must be a FastWeightState"):
        layer(make_input(), state=state.fast)
    with pytest.raises(ValueError, match="cu_seqlens must be None where a state"):
        layer(make_input(), Layout.packed((0, T), 1, T, torch.device("cpu")), state=state)
    with pytest.raises(ValueError, match="its spec differs in retention"):
        make_layer("simple_gla", conv=0, activation="none", key_width=0.5, output_gate="silu")(make_input(), state=state)


def test_retention_per_head_and_key_is_made_by_one_parametrization():
    per_head = FastWeightLayer(D, H, SYSTEMS["gated_delta_net"], Projections(retention=Decay()))
    per_key = FastWeightLayer(
        D, H, SYSTEMS["gated_delta_net"].replace(retention=Retention("key", "before")), Projections(retention=Decay())
    )
    x = make_input().float()
    assert per_head.call(x).gates["log_retention"].shape == (1, T, H)
    assert per_key.call(x).gates["log_retention"].shape == (1, T, H, D // H)
