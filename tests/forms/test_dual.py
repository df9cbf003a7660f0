"""The dual form inside spans against a plain loop whose gradients are automatic."""

import math
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
import torch.nn.functional as nnf
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbind.forms.parallel import affine_blocks
from kvbind.forms.parallel.affine_operands import AffineRule, Columns, Gates
from kvbind.forms.parallel.dual import DualState, Layers, dual
from kvbind.forms.parallel.scan import ScanGate

B, H, D, HIDDEN = 2, 2, 3, 4


def tanh_slope(u):
    return 1 - u.tanh().square()


ACTIVATIONS = {
    "tanh": (torch.tanh, tanh_slope),
    "silu": (nnf.silu, lambda u: u.sigmoid() * (1 + u * (1 - u.sigmoid()))),
}


@dataclass(frozen=True)
class Norm:
    """Layer normalization, whose gradient is automatic."""

    residual: bool
    where: str
    fast: bool

    def apply(self, weights, z, x):
        y = nnf.layer_norm(z, z.shape[-1:], eps=1e-3)
        y = y * (1 + weights["gamma"]) if self.fast else y * weights["gamma"] + weights["beta"]
        return x + y if self.residual else y

    def pull(self, weights, z, g):
        gamma = weights["gamma"].expand(z.shape)

        def output(z, gamma):
            return self.apply({**weights, "gamma": gamma}, z, torch.zeros_like(z))

        return torch.func.vjp(output, z, gamma)[1](g)


def forward(layers, weights, x, loss):
    h = x
    for name in layers.names:
        z = h @ weights[name]
        z = z + weights[f"{name}.bias"] if layers.bias else z
        h = z if layers.activation is None else layers.activation[0](z)
    head = layers.head
    return z if head is None or head.where == ("read" if loss else "loss") else head.apply(weights, z, x)


def plain(rule, layers, q, columns, rates, gates, state):
    """Update after update, with a weight matrix for every token that is read."""
    total, chunk = len(columns), rule.chunk
    span = rule.refresh or max(total, 1)
    columns_e = columns.k if columns.e is None else columns.e
    each = {n: r if torch.is_tensor(r) else torch.full((B, H, total), r, dtype=columns.k.dtype) for n, r in rates.items()}
    w, at, earlier, outputs = dict(state.weights), dict(state.weights), [], []
    d = {n: list(x.flip(2).unbind(2)) for n, x in state.buffers.items()}
    kept, travelled = (dict(w), {n: list(x) for n, x in d.items()}), dict.fromkeys(rates, 0.0)

    def gate(x, n):
        if x is None:
            return None
        return (x.factor() if isinstance(x, ScanGate) else x)[:, :, n, None, None]

    def gradient(parts):
        found = {n: torch.zeros_like(w[n]) for n in rates}
        for tokens in parts:
            k, e, v = (columns_x[:, :, tokens] for columns_x in (columns.k, columns_e, columns.v))
            g = v if rule.loss == "dot" else v - forward(layers, at, e, True)
            for n in rates:
                for t in range(k.shape[2]):
                    pull = torch.func.vjp(
                        lambda x, n=n, t=t, k=k: forward(layers, {**at, n: x}, k[:, :, t : t + 1], True), at[n]
                    )[1]
                    found[n] = found[n] + each[n][:, :, tokens][:, :, t, None, None] * pull(g[:, :, t : t + 1])[0]
        return found

    def shaped(momentum, g, rate):
        new = {n: x if momentum is None else x + momentum * d[n][-1] for n, x in g.items()}
        up = {n: x + sum(d[n][len(d[n]) - rule.lags :]) if rule.lags else x for n, x in new.items()}
        return new, {n: rule.sign * (x if rate is None else rate * x) for n, x in up.items()}

    for n in range(math.ceil(total / chunk)):
        start, stop = n * chunk, min((n + 1) * chunk, total)
        a, m, eta = gate(gates.decay, n), gate(gates.momentum, n), gate(gates.step_rate, n)
        if start % span == 0:
            at, travelled = dict(w), dict.fromkeys(rates, 0.0)
        if rule.before and a is not None:
            at = {**w, **{name: a * w[name] for name in rates}}
        mine = slice(start, stop)
        window = earlier[len(earlier) - rule.history // chunk :] if rule.history else []
        old = dict(w)
        new, up = shaped(m, gradient([*window, mine]), eta)
        if gates.read_rate is None:
            w = {**w, **{name: up[name] + (w[name] if a is None else a * w[name]) for name in rates}}
        for t in range(start, stop):
            if gates.read_rate is not None:
                its = eta if gates.partial_step_rate is None else gate(gates.partial_step_rate, t)
                _, own = shaped(None, gradient([*window, slice(start, t + 1)]), its)
                share = gates.read_rate[:, :, t, None, None]
                seen = {**w, **{name: w[name] + share * (travelled[name] + own[name]) for name in rates}}
            elif rule.sees == "past":
                seen = old
            elif rule.sees == "chunk" or chunk == 1:
                seen = w
            else:
                _, part = shaped(
                    gate(gates.partial_momentum, t),
                    gradient([*window, slice(start, t + 1)]),
                    gate(gates.partial_step_rate, t),
                )
                a_t = gate(gates.partial_decay, t)
                seen = {**old, **{name: part[name] + (old[name] if a_t is None else a_t * old[name]) for name in rates}}
            outputs.append(forward(layers, seen, q[:, :, t : t + 1], False))
        travelled = {name: travelled[name] + up[name] for name in rates}
        left = w
        if gates.read_rate is not None:
            share = gates.read_rate[:, :, stop - 1, None, None]
            left = {**w, **{name: w[name] + share * travelled[name] for name in rates}}
            w = left if rule.refresh is not None and stop % span == 0 else w
        for name in rates:
            d[name].append(new[name])
        earlier.append(mine)
        if stop - start == chunk if rule.refresh is None else stop % span == 0:
            kept = dict(left), {name: list(x) for name, x in d.items()}
    buffers = {
        name: torch.stack(x[::-1][: state.buffers[name].shape[2]], 2)
        for name, x in kept[1].items()
        if state.buffers[name].shape[2]
    }
    return torch.cat(outputs, 2) if outputs else q, kept[0], {name: buffers.get(name, state.buffers[name]) for name in rates}


@st.composite
def cases(draw):
    chunk = draw(st.sampled_from([1, 1, 2]))
    refresh = draw(st.sampled_from([chunk, 2 * chunk, 4 * chunk, None]))
    sees = draw(st.sampled_from(["past", "chunk", "token"]))
    reader = sees == "token" and draw(st.booleans())
    rule = AffineRule(
        loss=draw(st.sampled_from(["squared", "squared", "dot"])),
        chunk=chunk,
        refresh=refresh,
        before=refresh == chunk and draw(st.booleans()),
        window=draw(st.sampled_from([1, 1, 3])),
        window_on=draw(st.sampled_from(["gradient", "update"])),
        sees=sees,
        sign=draw(st.sampled_from([1, -1])),
    )
    names = draw(st.sampled_from([("out",), ("in", "out"), ("in.0", "in.1", "out")]))
    head = draw(
        st.one_of(st.none(), st.builds(Norm, st.booleans(), st.sampled_from(["loss", "both", "read"]), st.booleans()))
    )
    if head is not None and head.fast and head.where == "read":
        head = Norm(head.residual, "both", True)
    layers = Layers(names, ACTIVATIONS[draw(st.sampled_from(list(ACTIVATIONS)))], draw(st.booleans()), head)
    which = {name: draw(st.booleans()) for name in ("decay", "momentum", "step_rate")}
    which |= {"decay": False, "momentum": False} if reader else {}
    which |= {"read_rate": reader, "erase": draw(st.booleans()), "last": draw(st.booleans()), "rate": draw(st.booleans())}
    return rule, layers, which, draw(st.integers(1, 11)), draw(st.integers(0, 2**20))


def operands(rule, layers, which, total, seed, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(B, H, *shape, generator=g, dtype=torch.float64).to(dtype)

    def unit(*shape):
        return (0.2 + 0.8 * torch.rand(B, H, *shape, generator=g, dtype=torch.float64)).to(dtype)

    widths = (D, *(HIDDEN,) * (len(layers.names) - 1), D)
    weights = {name: 0.5 * normal(widths[i], widths[i + 1]) for i, name in enumerate(layers.names)}
    if layers.bias:
        weights |= {f"{name}.bias": normal(1, widths[i + 1]) for i, name in enumerate(layers.names)}
    updated = layers.names[-1:] if which["last"] else layers.names
    updated = [*updated, *(f"{name}.bias" for name in updated if layers.bias)]
    if layers.head is not None:
        weights |= {"gamma": normal(1, D)} if layers.head.fast else {"gamma": normal(1, D), "beta": normal(1, D)}
        updated += ["gamma"] if layers.head.fast else []
    steps, partial = math.ceil(total / rule.chunk), rule.sees == "token" and rule.chunk > 1

    def pair(name, make, wrap=lambda x: x):
        there = which[name]
        return (wrap(make(steps)) if there else None), (make(total) if there and partial else None)

    (decay, kept), (momentum, carried) = pair("decay", unit, ScanGate), pair("momentum", unit, ScanGate)
    step_rate, its = pair("step_rate", unit)
    gates = Gates(decay, momentum, step_rate, kept, carried, its, normal(total) if which["read_rate"] else None)
    held = max(rule.lags, which["momentum"])
    buffers = {name: 0.3 * normal(held, *weights[name].shape[2:]) for name in updated}
    rates = {name: 0.1 * unit(total) if which["rate"] else 0.1 for name in updated}
    columns = Columns(normal(total, D), normal(total, D), 1.0, normal(total, D) if which["erase"] else None)
    return normal(total, D), columns, rates, gates, DualState(weights, buffers)


def close(found, expected, tolerance=1e-10):
    return (found - expected).norm() <= tolerance * expected.norm().clamp(min=1)


@settings(max_examples=60)
@given(cases(), st.sampled_from([4, 64]))
def test_it_is_the_loop_that_the_specification_states(case, size):
    rule, layers, which, total, seed = case
    o = operands(rule, layers, which, total, seed)
    y, weights, buffers = plain(rule, layers, *o)
    with mock.patch.object(affine_blocks, "BLOCK", size):
        z, after = dual(rule, layers, *o)
    assert close(z, y)
    assert all(close(after.weights[name], x) for name, x in weights.items())
    assert all(close(after.buffers[name], x) for name, x in buffers.items())


@settings(max_examples=40)
@given(cases(), st.sampled_from([4, 64]))
def test_it_has_the_gradients_of_the_loop(case, size):
    rule, layers, which, total, seed = case
    o = operands(rule, layers, which, total, seed)
    tensors = {f"{i}.{path}": x for i, part in enumerate(o) for path, x in named(part).items()}

    def with_gradients(function):
        outcome = function(*o)
        g, loss = torch.Generator().manual_seed(1), 0.0
        for x in outcome:
            loss = loss + (x * torch.randn(x.shape, generator=g, dtype=x.dtype)).sum()
        return torch.autograd.grad(loss, list(tensors.values()), allow_unused=True, materialize_grads=True)

    def loop(*o):
        y, weights, buffers = plain(rule, layers, *o)
        return y, *(weights[name] for name in o[2]), *(buffers[name] for name in o[2])

    def parallel(*o):
        z, after = dual(rule, layers, *o)
        return z, *(after.weights[name] for name in o[2]), *(after.buffers[name] for name in o[2])

    for x in tensors.values():
        x.requires_grad_()
    expected = with_gradients(loop)
    with mock.patch.object(affine_blocks, "BLOCK", size):
        found = with_gradients(parallel)
    for name, x, y in zip(tensors, found, expected, strict=True):
        assert (x - y).norm() <= 1e-8 * y.norm().clamp(min=1e-3), name


def named(x):
    """Every tensor in some operands, mappings included."""
    if isinstance(x, torch.Tensor):
        return {"": x}
    children = x if isinstance(x, dict) else {f: getattr(x, f) for f in getattr(x, "__dataclass_fields__", ())}
    return {f"{key}.{path}": y for key, child in children.items() for path, y in named(child).items()}


def mini_batches(names, refresh=4, dtype=torch.float64, total=10):
    """TTT-Linear or TTT-MLP."""
    rule = AffineRule(loss="squared", refresh=refresh)
    layers = Layers(names, ACTIVATIONS["tanh"], True, Norm(True, "both", False))
    which = dict.fromkeys(("decay", "momentum", "step_rate", "erase", "last"), False) | {"read_rate": True, "rate": True}
    return rule, layers, operands(rule, layers, which, total, 0, dtype)


@pytest.mark.parametrize("names", [("out",), ("in", "out")], ids=["linear", "mlp"])
def test_calls_one_after_another_are_one_call(names):
    rule, layers, (q, columns, rates, gates, state) = mini_batches(names)

    def part(start, stop):
        its = {name: x[:, :, start:stop] for name, x in rates.items()}
        return q[:, :, start:stop], columns.span(start, stop), its, Gates(read_rate=gates.read_rate[:, :, start:stop])

    y, end = dual(rule, layers, q, columns, rates, gates, state)
    first, between = dual(rule, layers, *part(0, 4), state)
    second, after = dual(rule, layers, *part(4, 10), between)
    assert close(torch.cat((first, second), 2), y)
    assert all(close(after.weights[name], x) for name, x in end.weights.items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("names", [("out",), ("in", "out")], ids=["linear", "mlp"])
def test_what_is_not_finite_changes_nothing_before_it(names, value):
    rule, layers, (q, columns, rates, gates, state) = mini_batches(names)
    expected, _ = dual(rule, layers, q, columns, rates, gates, state)
    for change in ("k", "v"):
        spoilt = {"k": columns.k.clone(), "v": columns.v.clone()}
        spoilt[change][:, :, 6] = value
        found, after = dual(rule, layers, q, Columns(**spoilt), rates, gates, state)
        assert torch.equal(found[:, :, :6], expected[:, :, :6])
        assert not found[:, :, 6:].isfinite().any()
        assert not after.weights["out"].isfinite().all()


@pytest.mark.parametrize("names", [("out",), ("in", "out")], ids=["linear", "mlp"])
def test_narrow_operands_are_computed_in_float32(names):
    rule, layers, o = mini_batches(names, dtype=torch.bfloat16)
    y, after = dual(rule, layers, *o)
    assert y.dtype == after.weights["out"].dtype == torch.float32
    assert y.isfinite().all()


def test_gates_by_channel_are_refused():
    rule, layers, (q, columns, rates, _, state) = mini_batches(("out",))
    with pytest.raises(ValueError, match=r"decay must be \[B, H, S\]"):
        dual(rule, layers, q, columns, rates, Gates(ScanGate(columns.k)), state)
