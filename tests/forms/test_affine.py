"""The parallel form of the affine class against a plain loop over updates, written from the specification's lines."""

import math
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbind.forms import affine as form
from kvbind.forms.affine import AffineRule, AffineState, Columns, Gates, affine
from kvbind.forms.scan import Gate
from strategies import error

B, H, F, DV = 2, 2, 3, 4


def plain(rule, q, columns, gates, weights, buffers, recent=()):
    """Update after update: outputs, and weights, buffers and recent columns after the last refresh point.

    Of columns behind the last complete stretch those are read, not kept. `buffers` and `recent` are lists, newest last.
    """
    total, chunk = len(columns), rule.chunk
    span = rule.refresh or max(total, 1)
    rate = columns.rate if torch.is_tensor(columns.rate) else torch.full(columns.k.shape[:3], columns.rate, dtype=columns.k.dtype)
    e = columns.k if columns.e is None else columns.e
    earlier = list(recent)  # of the window's earlier updates, each (k, e, v, rate)
    m, d = weights, list(buffers)
    at, partial_sum, kept, outputs = weights, 0.0, (weights, list(buffers), list(recent)), []

    def gate(x, n):
        if x is None:
            return None
        values = x.factor()[:, :, n] if isinstance(x, Gate) else x[:, :, n]
        return values[..., None] if values.dim() == 3 else values[..., None, None]

    def gradient(parts):
        g = torch.zeros_like(m)
        for k, erase, v, r in parts:
            residual = v if rule.loss == "dot" else v - erase @ at
            g = g + k.mT @ (r[..., None] * residual)
        return g

    def shaped(momentum, g, rate):
        new = g if momentum is None else g + momentum * d[-1]
        update = new if rule.window_on == "gradient" else new + sum(d[len(d) - rule.window + 1 :])
        return new, rule.sign * (update if rate is None else rate * update)

    for n in range(math.ceil(total / chunk)):
        start, stop = n * chunk, min((n + 1) * chunk, total)
        a, mo, eta = gate(gates.retention, n), gate(gates.momentum, n), gate(gates.step_rate, n)
        if start % span == 0:
            at, partial_sum = m, 0.0
        if rule.before and a is not None:
            at = a * m
        mine = [(x[:, :, start:stop]) for x in (columns.k, e, columns.v, rate)]
        window = earlier[len(earlier) - rule.window + 1 :] if rule.window_on == "gradient" and rule.window > 1 else []
        old = m
        new, update = shaped(mo, gradient([*window, mine]), eta)
        if gates.read_rate is None:
            m = update + (old if a is None else a * old)
        for t in range(start, stop):
            if (t + 1) % rule.writes:
                continue
            r = t // rule.writes
            query = q[:, :, r : r + 1]
            if gates.read_rate is not None:
                up_to = partial_sum + rule.sign * gradient([[x[:, :, : t - start + 1] for x in mine]])
                outputs.append(query @ (m + gates.read_rate[:, :, r, None, None] * up_to))
            elif rule.sees == "past":
                assert rule.writes == 1
                outputs.append(query @ old)
            elif rule.sees == "chunk" or chunk == 1:
                outputs.append(query @ m)
            else:
                g = gradient([*window, [x[:, :, : t - start + 1] for x in mine]])
                kept_t = gate(gates.partial_retention, t)
                _, up = shaped(gate(gates.partial_momentum, t), g, gate(gates.partial_step_rate, t))
                outputs.append(query @ ((old if kept_t is None else kept_t * old) + up))
        if gates.read_rate is not None:
            partial_sum = partial_sum + rule.sign * new
            if stop % span == 0 or (stop == total and rule.refresh is None):
                m = m + gates.read_rate[:, :, (stop - 1) // rule.writes, None, None] * partial_sum
                partial_sum = 0.0
        d.append(new)
        earlier.append(mine)
        if stop - start == chunk if rule.refresh is None else stop % span == 0:
            kept = m, list(d), list(earlier)
    output = torch.cat(outputs, dim=2) if outputs else q.new_zeros(*q.shape[:3], DV)
    return output, *kept


def same_state(rule, found, weights, buffers, recent, tolerance=1e-10):
    assert error(found.weights, weights) < tolerance
    for i in range(found.buffers.shape[2]):
        expected = buffers[len(buffers) - 1 - i]
        assert (found.buffers[:, :, i] - expected).norm() <= tolerance * expected.norm().clamp(min=1)
    if rule.history:
        assert len(found.recent) == rule.history
        k = torch.cat([torch.zeros(B, H, rule.history, F).double(), *(part[0] for part in recent)], 2)
        assert error(found.recent.k, k[:, :, k.shape[2] - rule.history :]) < tolerance


@st.composite
def cases(draw):
    """A rule, which operands there are, and how many columns."""
    loss = draw(st.sampled_from(["squared", "squared", "dot"]))
    writes = draw(st.sampled_from([1, 1, 2, 3]))
    chunk = 1 if writes > 1 else draw(st.sampled_from([1, 1, 2, 3, 5]))
    refresh = draw(st.sampled_from(["chunk", "chunk", "two", "four", "many", "call"]))
    refresh = {"chunk": chunk, "two": 2 * chunk * writes, "four": 4 * chunk * writes, "many": 21 * chunk * writes, "call": None}[refresh]
    sees = "token" if writes > 1 else draw(st.sampled_from(["past", "chunk", "token"]))
    whole = chunk == 1 if refresh is None else refresh % writes == 0
    read_rate = sees == "token" and whole and draw(st.integers(0, 5)) == 0
    window = 1 if read_rate else draw(st.sampled_from([1, 1, 2, 3]))
    rule = AffineRule(
        loss=loss,
        chunk=chunk,
        refresh=refresh,
        before=refresh == chunk and draw(st.booleans()),
        window=window,
        window_on=draw(st.sampled_from(["gradient", "update"])),
        sees=sees,
        writes=writes,
        sign=draw(st.sampled_from([1, -1])),
    )
    gates = {
        "retention": draw(st.sampled_from(["none", "head", "key"])),
        "log": draw(st.booleans()),
        "momentum": draw(st.booleans()),
        "step_rate": draw(st.booleans()),
        "erase": draw(st.booleans()),
        "rate": draw(st.booleans()),
    }
    if read_rate:
        gates |= {"retention": "none", "momentum": False, "step_rate": False}
    total = draw(st.integers(0, 40)) * writes
    return rule, gates | {"read_rate": read_rate}, total, draw(st.integers(0, 2**20))


def operands(rule, which, total, seed, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(B, H, *shape, generator=g, dtype=torch.float64).to(dtype)

    def unit(*shape):
        return (0.2 + 0.8 * torch.rand(B, H, *shape, generator=g, dtype=torch.float64)).to(dtype)

    steps, reads = math.ceil(total / rule.chunk), total // rule.writes
    partial = rule.sees == "token" and rule.chunk > 1
    width = (F,) if which["retention"] == "key" else ()

    def gate(*shape):
        return Gate(unit(*shape).log(), True) if which["log"] else Gate(unit(*shape))

    kept, momentum, rate = which["retention"] != "none", which["momentum"], which["step_rate"]
    gates = Gates(
        gate(steps, *width) if kept else None,
        gate(steps) if momentum else None,
        normal(steps) if rate else None,
        unit(reads, *width) if kept and partial else None,
        unit(reads) if momentum and partial else None,
        normal(reads) if rate and partial else None,
        normal(reads) if which["read_rate"] else None,
    )
    columns = Columns(
        normal(total, F), normal(total, DV), 0.3 * unit(total) if which["rate"] else 0.3, normal(total, F) if which["erase"] else None
    )
    buffers = normal(max(rule.lags, momentum), F, DV)
    return normal(reads, F), columns, gates, AffineState(normal(F, DV), buffers)


def oracle(rule, q, columns, gates, state):
    buffers = [state.buffers[:, :, i] for i in reversed(range(state.buffers.shape[2]))]
    return plain(rule, q, columns, gates, state.weights, buffers)


@pytest.fixture(params=[4, 16, 64], ids=lambda size: f"blocks of {size}")
def blocks(request, monkeypatch):
    monkeypatch.setattr(form, "BLOCK", request.param)
    monkeypatch.setattr(form, "CHANNEL_BLOCK", min(request.param, 16))


@settings(max_examples=300)
@given(cases(), st.sampled_from([4, 16, 64]))
def test_it_is_the_loop_that_the_specification_states(case, size):
    rule, which, total, seed = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(form, "BLOCK", size)
        patch.setattr(form, "CHANNEL_BLOCK", min(size, 8))
        o = operands(rule, which, total, seed)
        y, *end = oracle(rule, *o)
        z, after = affine(rule, *o)
    assert z.shape == y.shape
    assert (z - y).norm() <= 1e-10 * y.norm().clamp(min=1)
    same_state(rule, after, *end)
