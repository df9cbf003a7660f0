"""The parallel form of the affine class against a plain loop over updates, written from the specification's lines."""

import math
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbind.forms.parallel import affine_blocks
from kvbind.forms.parallel.affine import affine
from kvbind.forms.parallel.affine_operands import AffineRule, AffineState, Columns, Gates
from kvbind.forms.parallel.scan import ScanGate
from strategies import error

B, H, F, DV = 2, 2, 3, 4


def plain(rule, q, columns, gates, weights, buffers, recent=()):
    """Update after update: outputs, and weights, buffers and recent columns after the last refresh point.

    Of columns behind the last complete stretch those are read, not kept. `buffers` and `recent` are lists, newest last.
    """
    total, chunk = len(columns), rule.chunk
    span = rule.refresh or max(total, 1)
    rate = (
        columns.rate
        if torch.is_tensor(columns.rate)
        else torch.full(columns.k.shape[:3], columns.rate, dtype=columns.k.dtype)
    )
    e = columns.k if columns.e is None else columns.e
    earlier = list(recent)  # of the window's earlier updates, each (k, e, v, rate)
    m, d = weights, list(buffers)
    at, partial_sum, kept, outputs = weights, 0.0, (weights, list(buffers), list(recent)), []

    def gate(x, n):
        if x is None:
            return None
        values = x.factor()[:, :, n] if isinstance(x, ScanGate) else x[:, :, n]
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
        a, mo, eta = gate(gates.decay, n), gate(gates.momentum, n), gate(gates.step_rate, n)
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
                g = gradient([*window, [x[:, :, : t - start + 1] for x in mine]])
                partial = eta if gates.partial_step_rate is None else gate(gates.partial_step_rate, t)
                up_to = partial_sum + shaped(None, g, partial)[1]
                outputs.append(query @ (m + gates.read_rate[:, :, r, None, None] * up_to))
            elif rule.sees == "past":
                assert rule.writes == 1
                outputs.append(query @ old)
            elif rule.sees == "chunk" or chunk == 1:
                outputs.append(query @ m)
            else:
                g = gradient([*window, [x[:, :, : t - start + 1] for x in mine]])
                kept_t = gate(gates.partial_decay, t)
                _, up = shaped(gate(gates.partial_momentum, t), g, gate(gates.partial_step_rate, t))
                outputs.append(query @ ((old if kept_t is None else kept_t * old) + up))
        if gates.read_rate is not None:
            partial_sum = partial_sum + update
            left = m + gates.read_rate[:, :, (stop - 1) // rule.writes, None, None] * partial_sum
            if rule.refresh is not None and stop % span == 0:
                m, partial_sum = left, 0.0
        d.append(new)
        earlier.append(mine)
        if stop - start == chunk if rule.refresh is None else stop % span == 0:
            kept = m if gates.read_rate is None else left, list(d), list(earlier)
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
    refresh = {
        "chunk": chunk,
        "two": 2 * chunk * writes,
        "four": 4 * chunk * writes,
        "many": 21 * chunk * writes,
        "call": None,
    }[refresh]
    sees = "token" if writes > 1 else draw(st.sampled_from(["past", "chunk", "token"]))
    whole = refresh is None or refresh % writes == 0
    read_rate = sees == "token" and whole and draw(st.integers(0, 5)) == 0
    window = draw(st.sampled_from([1, 1, 2, 3]))
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
        "decay": draw(st.sampled_from(["none", "head", "key"])),
        "log": draw(st.booleans()),
        "momentum": draw(st.booleans()),
        "step_rate": draw(st.booleans()),
        "erase": draw(st.booleans()),
        "rate": draw(st.booleans()),
    }
    if read_rate:
        gates |= {"decay": "none", "momentum": False}
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
    width = (F,) if which["decay"] == "key" else ()

    def gate(*shape):
        return ScanGate(unit(*shape).log(), True) if which["log"] else ScanGate(unit(*shape))

    kept, momentum, rate = which["decay"] != "none", which["momentum"], which["step_rate"]
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
        normal(total, F),
        normal(total, DV),
        0.3 * unit(total) if which["rate"] else 0.3,
        normal(total, F) if which["erase"] else None,
    )
    buffers = normal(max(rule.lags, momentum), F, DV)
    return normal(reads, F), columns, gates, AffineState(normal(F, DV), buffers)


def oracle(rule, q, columns, gates, state):
    buffers = [state.buffers[:, :, i] for i in reversed(range(state.buffers.shape[2]))]
    return plain(rule, q, columns, gates, state.weights, buffers)


@contextmanager
def blocks_of(size):
    """Blocks small enough for short sequences to need several."""
    with mock.patch.multiple(affine_blocks, BLOCK=size, CHANNEL_BLOCK=min(size, 8)):
        yield


@settings(max_examples=200)
@given(cases(), st.sampled_from([4, 16, 64]))
def test_it_is_the_loop_that_the_specification_states(case, size):
    rule, which, total, seed = case
    o = operands(rule, which, total, seed)
    y, *end = oracle(rule, *o)
    with blocks_of(size):
        z, after = affine(rule, *o)
    assert z.shape == y.shape
    assert (z - y).norm() <= 1e-10 * y.norm().clamp(min=1)
    same_state(rule, after, *end)


def leaves(x, name=""):
    """Every tensor in some operands, by path."""
    if isinstance(x, torch.Tensor):
        return {name: x}
    children = {f.name: getattr(x, f.name) for f in fields(x)} if is_dataclass(x) else {}
    children = dict(enumerate(x)) if isinstance(x, tuple) else children
    return {path: y for key, child in children.items() for path, y in leaves(child, f"{name}.{key}").items()}


def gradients(o, outcome):
    """Gradients of a random projection of what `outcome(*o)` returns, by operand."""
    tensors = leaves(o)
    for x in tensors.values():
        x.requires_grad_()
    g, loss = torch.Generator().manual_seed(1), 0.0
    for x in outcome(*o):
        loss = loss + (x * torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype)).sum()
    found = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(tensors, found, strict=True))


@settings(max_examples=100)
@given(cases(), st.sampled_from([4, 16, 64]))
def test_it_has_the_gradients_of_the_loop(case, size):
    rule, which, total, seed = case
    o = operands(rule, which, total, seed)

    def loop(*o):
        y, weights, buffers, _ = oracle(rule, *o)
        return y, weights, *(buffers[len(buffers) - 1 - i] for i in range(o[3].buffers.shape[2]))

    def parallel(*o):
        z, after = affine(rule, *o)
        return z, after.weights, *after.buffers.unbind(2)

    expected = gradients(o, loop)
    with blocks_of(size):
        found = gradients(o, parallel)
    for name, x in expected.items():
        assert (found[name] - x).norm() <= 1e-8 * x.norm().clamp(min=1e-3), name


@settings(max_examples=100)
@given(cases(), st.floats(0, 1), st.sampled_from([4, 64]))
def test_calls_one_after_another_are_one_call(case, share, size):
    rule, which, total, seed = case
    if rule.refresh is None:
        return  # a call is the stretch
    q, columns, gates, state = operands(rule, which, total, seed)
    unit = math.lcm(rule.refresh, rule.writes)
    cut = int(share * total) // unit * unit

    def part(start, stop):
        updates = slice(start // rule.chunk, math.ceil(stop / rule.chunk))
        reads = slice(start // rule.writes, stop // rule.writes)
        its = {}
        for f in fields(gates):
            x, where = getattr(gates, f.name), reads if f.name.startswith(("partial", "read")) else updates
            its[f.name] = (
                x.map(lambda y, w=where: y[:, :, w]) if isinstance(x, ScanGate) else x if x is None else x[:, :, where]
            )
        return q[:, :, reads], columns.span(start, stop), Gates(**its)

    with blocks_of(size):
        y, end = affine(rule, q, columns, gates, state)
        first, between = affine(rule, *part(0, cut), state)
        second, after = affine(rule, *part(cut, total), between)
        _, blind = affine(rule, None, *part(cut, total)[1:], between)
    assert (torch.cat((first, second), 2) - y).norm() <= 1e-10 * y.norm().clamp(min=1)
    for found in (after, blind):
        for name, x in leaves(end).items():
            assert (leaves(found)[name] - x).norm() <= 1e-10 * x.norm().clamp(min=1), name


# what the named systems are in this class, with the gates that each has
SYSTEMS = {
    "gated linear attention": (AffineRule(), {"decay": "key"}),
    "delta rule": (AffineRule(loss="squared"), {}),
    "gated delta rule": (AffineRule(loss="squared", before=True), {"decay": "head"}),
    "gated delta rule by channel": (AffineRule(loss="squared", before=True), {"decay": "key", "erase": True}),
    "two writes": (AffineRule(loss="squared", writes=2), {"decay": "key", "erase": True}),
    "mini-batches": (AffineRule(loss="squared", refresh=4), {"momentum": True, "decay": "head"}),
    "mini-batches by channel": (AffineRule(loss="squared", refresh=4), {"momentum": True, "decay": "key"}),
    "momentum by channel": (AffineRule(loss="squared"), {"momentum": True, "decay": "key"}),
    "reader's rate": (AffineRule(loss="squared", refresh=4), {"read_rate": True}),
    "window": (AffineRule(loss="squared", window=3), {"momentum": True, "step_rate": True}),
    "window by channel": (AffineRule(loss="squared", window=3, window_on="update"), {"decay": "key"}),
    "chunks": (AffineRule(loss="squared", chunk=3, refresh=3), {"momentum": True, "decay": "head"}),
}
NONE = dict.fromkeys(("momentum", "step_rate", "erase", "read_rate", "log"), False) | {"decay": "none", "rate": True}


def system(name, total, dtype=torch.float64):
    rule, which = SYSTEMS[name]
    return rule, operands(rule, NONE | which, total, 0, dtype)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e200], ids=str)
@pytest.mark.parametrize("name", SYSTEMS)
def test_what_is_not_finite_or_huge_changes_nothing_before_it(name, value):
    rule, o = system(name, 36)
    at = 22
    reads = at // rule.writes
    for path, x in leaves(o).items():
        if path == ".3.weights" or path.startswith(".3.buffers"):
            continue
        # the entry that column `at`, its update or its read has
        place = {True: at // rule.chunk, False: at}[path.startswith((".2.decay", ".2.momentum", ".2.step"))]
        place = reads if path.startswith((".2.partial", ".2.read", ".0")) else place
        changed = x.clone()
        changed[0, 0, place] = value
        it = exchanged(o, path, changed)
        with blocks_of(8):
            expected, found = (affine(rule, *y)[0][0, 0] for y in (o, it))
        # gates, rates of steps and of the reader act on the whole update, or stretch, that they are of
        first = {True: at - at % (rule.refresh or 1), False: at}[
            path.startswith((".2.ret", ".2.mom", ".2.step"))
        ] // rule.writes
        assert torch.equal(found[:first], expected[:first]), path
        assert found[:first].isfinite().all()
        if not math.isfinite(value) and not path.startswith((".0", ".2.read", ".2.partial")):
            assert not found[reads + 1 :].isfinite().all(), path


def exchanged(x, path, tensor, name=""):
    """Operands with the tensor at a path replaced."""
    if name == path:
        return tensor
    if isinstance(x, tuple):
        return tuple(exchanged(y, path, tensor, f"{name}.{i}") for i, y in enumerate(x))
    if is_dataclass(x):
        return type(x)(*(exchanged(getattr(x, f.name), path, tensor, f"{name}.{f.name}") for f in fields(x)))
    return x


def double(x):
    """The same operands in float64."""
    for path, tensor in leaves(x).items():
        x = exchanged(x, path, tensor.detach().double())
    return x


@pytest.mark.parametrize("log", [True, False], ids=["logarithms", "numbers"])
@pytest.mark.parametrize("per", ["head", "key"])
@pytest.mark.parametrize("rule", [AffineRule(), AffineRule(loss="squared", before=True)], ids=["dot", "squared"])
def test_small_gates_are_as_exact_as_others_in_float32(rule, per, log):
    """Over 4096 tokens, of which some forget nearly all, some next to nothing; gradients of gates included."""
    q, columns, _, state = operands(rule, NONE, 4096, 0, torch.float32)
    columns = Columns(torch.nn.functional.normalize(columns.k, dim=-1), columns.v, columns.rate)
    g = torch.Generator().manual_seed(0)
    decay = 1e-3 * torch.rand(B, H, 4096, *([F] if per == "key" else []), generator=g)
    for i, small in enumerate((90.0, 88.0, 20.0, 3.0)):
        decay[:, :, 5 + i :: 37] = small
    decay[:, :, 1000:1100] = 90.0
    decay = ScanGate(-decay, True) if log else ScanGate((-decay).exp())
    o = q, columns, Gates(decay), state

    def parallel(*o):
        z, after = affine(rule, *o)
        return z, after.weights

    def loop(*o):
        return oracle(rule, *o)[:2]

    wide = double(o)
    for x, y in zip(parallel(*o), loop(*wide), strict=True):
        assert error(x.double(), y) < 1e-5
    found, expected = gradients(o, parallel), gradients(wide, loop)
    for name, x in expected.items():
        assert found[name].isfinite().all()
        assert error(found[name].double(), x) < 1e-5, name


@pytest.mark.parametrize("value", [0.5, 1e-4, 1e-8, 1e-30, 0.0])
@pytest.mark.parametrize("per", ["head", "key"])
def test_gradients_of_equal_small_gates_are_exact_in_float32(per, value):
    """Of which products of two underflow where those of the others do not."""
    rule = AffineRule()
    q, columns, _, state = operands(rule, NONE, 150, 0, torch.float32)
    o = q, columns, Gates(ScanGate(torch.full((B, H, 150, F) if per == "key" else (B, H, 150), value))), state
    found = gradients(o, lambda *o: affine(rule, *o)[:1])
    expected = gradients(double(o), lambda *o: oracle(rule, *o)[:1])
    for name, x in expected.items():
        assert error(found[name].double(), x) < 1e-5, name


@pytest.mark.parametrize("name", ["gated delta rule by channel", "mini-batches", "window"])
def test_it_compiles_as_one_graph(name):
    rule, o = system(name, 6)
    tensors = leaves(o)
    torch._dynamo.reset()

    def call(*values):
        its = o
        for path, x in zip(tensors, values, strict=True):
            its = exchanged(its, path, x)
        y, after = affine(rule, *its)
        return y, after.weights, after.buffers

    def all_of(function):
        values = [x.detach().clone().requires_grad_() for x in tensors.values()]
        outcome = function(*values)
        loss = sum(x.square().sum() for x in outcome)
        return *outcome, *torch.autograd.grad(loss, values, allow_unused=True, materialize_grads=True)

    with blocks_of(4):
        expected = all_of(call)
        found = all_of(torch.compile(call, fullgraph=True, backend="aot_eager"))
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("name", SYSTEMS)
def test_transforms_see_through_it(name):
    """`vmap` over values of several losses' gradients, as `torch.func` has them."""
    rule, o = system(name, 10)
    q, columns, gates, state = o

    def loss(v):
        y, after = affine(rule, q, Columns(columns.k, v, columns.rate, columns.e), gates, state)
        return y.square().sum() + after.weights.sum()

    several = torch.stack((columns.v, 2 * columns.v))
    with blocks_of(4):
        found = torch.func.vmap(torch.func.grad(loss))(several)
        expected = torch.stack([torch.func.grad(loss)(v) for v in several])
    assert error(found, expected) < 1e-10


def test_narrow_operands_are_computed_in_float32():
    rule, o = system("gated delta rule by channel", 40, torch.bfloat16)
    y, after = affine(rule, *o)
    z, end = affine(rule, *(exchanged_all(x, torch.float32) for x in o))
    assert y.dtype == after.weights.dtype == torch.float32
    assert torch.equal(y, z)
    assert torch.equal(after.weights, end.weights)


def exchanged_all(x, dtype):
    for path, tensor in leaves(x).items():
        x = exchanged(x, path, tensor.to(dtype))
    return x


@pytest.mark.parametrize("name", ["delta rule", "gated delta rule by channel", "mini-batches", "window"])
def test_memory_grows_with_length_alone(name):
    def largest(total):
        rule, o = system(name, total, torch.float32)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            affine(rule, *o)
        return max(event.self_cpu_memory_usage for event in profile.events())

    assert largest(1024) < 2.1 * largest(512)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk": 2, "refresh": 3}, "refresh must be a multiple of chunk=2; got 3"),
        ({"before": True, "refresh": 4}, "before needs refresh to be chunk=1; got 4"),
        ({"writes": 2, "chunk": 2, "refresh": 2}, "writes=2 needs chunk to be 1; got 2"),
        ({"writes": 2, "refresh": 3}, "refresh must be None, 1 or a multiple of writes=2; got 3"),
    ],
)
def test_rules_that_contradict_themselves_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        AffineRule(**change)


@pytest.mark.parametrize(
    ("rule", "which", "message"),
    [
        (AffineRule(sees="past"), {"read_rate": True}, "read_rate needs sees='token'"),
        (AffineRule(), {"read_rate": True, "momentum": True}, "neither decay nor momentum"),
        (AffineRule(writes=2), {"read_rate": True}, "read_rate needs refresh to be a multiple of writes=2; got 1"),
    ],
)
def test_gates_that_a_rule_excludes_are_refused(rule, which, message):
    with pytest.raises(ValueError, match=message):
        affine(rule, *operands(rule, NONE | which, 4, 0))


def test_states_and_columns_that_do_not_fit_are_refused():
    rule, (q, columns, gates, state) = system("mini-batches", 8)
    with pytest.raises(ValueError, match="state must have a buffer where momentum is given"):
        affine(rule, q, columns, gates, AffineState(state.weights, state.buffers[:, :, :0]))
    with pytest.raises(ValueError, match="columns must be a multiple of writes=3; got 8"):
        affine(AffineRule(writes=3), q, columns, Gates(), state)
    with pytest.raises(ValueError, match="momentum and partial_momentum must be given together"):
        affine(AffineRule(chunk=2, refresh=2), q, columns, Gates(momentum=gates.momentum), state)
    with pytest.raises(ValueError, match="state must have 2 buffers"):
        affine(AffineRule(window=3, window_on="update"), q, columns, Gates(), state)


def test_a_sequence_starts_with_the_buffers_that_its_rule_needs():
    w, m = torch.randn(B, H, F, DV), torch.randn(B, H, F, DV)
    assert AffineState.start(AffineRule(), w).buffers.shape[2] == 0
    held = AffineState.start(AffineRule(window=3, window_on="update"), w, m).buffers
    assert held.shape[2] == 2
    assert torch.equal(held[:, :, 0], m)
    assert not held[:, :, 1].any()
