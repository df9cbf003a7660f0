"""Mini-batches of TTT-Linear, TTT-MLP and Titans as one kernel, against a plain loop in float64."""

import math
import os

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("kernels need a GPU or TRITON_INTERPRET=1", allow_module_level=True)

import kvbind
from kvbind.forms.on_kernels.kernel_calls.mini_batches import shares_of
from kvbind.forms.tokens import Tokens
from kvbind.kernels.mini_batches import operator as module
from kvbind.kernels.mini_batches.operator import covers, mini_batches
from strategies import operands

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-4


@pytest.fixture(autouse=True)
def _exact():
    """float32 products in float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


ACTIVATIONS = {
    "gelu": F.gelu, "gelu_tanh": lambda u: F.gelu(u, approximate="tanh"), "silu": F.silu, "relu": F.relu, "tanh": torch.tanh,
    "identity": lambda u: u,
}  # fmt: skip


def layers_of(state, key, hidden, value, bias):
    """Matrices and biases of a state in one piece, hidden layer first; biases that are not there are zeros."""
    found = []
    for rows, columns in ((key, hidden), (hidden or key, value)):
        if columns:
            matrix, state = state.split((rows * columns, state.shape[-1] - rows * columns), -1)
            found.append(matrix.unflatten(-1, (rows, columns)))
            found.append(state.new_zeros(*state.shape[:-1], columns))
            if bias:
                found[-1], state = state.split((columns, state.shape[-1] - columns), -1)
    return found


def plain(q, k, v, state, rates, *, size, hidden=0, activation="identity", bias=False, head=None, read_rate=None,
          retention=None, momentum=None, squared=True, in_loss=True, in_read=True, residual=True):  # fmt: skip
    """Token after token, gradients automatic."""
    widths = k.shape[-1], hidden, v.shape[-1], bias
    act = ACTIVATIONS[activation]
    buffer = torch.zeros_like(state)
    if momentum is not None:
        state, buffer = state.chunk(2, -1)

    def network(weights, x, headed):
        z, layers = x, layers_of(weights, *widths)
        for i in range(0, len(layers), 2):
            z = (z[..., None, :] @ layers[i]).squeeze(-2) + layers[i + 1]
            z = act(z) if i + 2 < len(layers) else z
        if head is None or not headed:
            return z
        y = F.layer_norm(z, z.shape[-1:], eps=EPS) * head[:, :, 0] + head[:, :, 1]
        return x + y if residual else y

    # the learning rate of each number of a state
    ones, count = torch.ones_like(state), 2 if hidden else 1
    own = rates.shape[-1] > count
    places = layers_of(torch.arange(state.shape[-1], device=state.device).expand_as(state).double(), *widths)

    def by_number(rate):
        found = ones
        for i, place in enumerate(places):
            which = i // 2 + (count if own and i % 2 else 0)
            if i % 2 == 0 or bias:
                found = found.scatter(-1, place.flatten(2).long(), rate[..., which, None].expand_as(place.flatten(2)))
        return found

    outputs = []
    for start in range(0, q.shape[1], size):
        begun, written = state, torch.zeros_like(state)
        for t in range(start, start + size):

            def loss(weights, t=t):
                f = network(weights, k[:, t], in_loss)
                return 0.5 * ((f - v[:, t]) ** 2).sum() if squared else -(f * v[:, t]).sum()

            write = -by_number(rates[:, t]) * torch.func.grad(loss)(begun)
            if read_rate is not None:
                written = written + write
                state = begun + read_rate[:, t, :, None] * written
            else:
                buffer = write if momentum is None else momentum[:, t, :, None] * buffer + write
                state = (1.0 if retention is None else retention[:, t, :, None]) * state + buffer
            outputs.append(network(state, q[:, t], in_read))
    return torch.stack(outputs, 1), state if momentum is None else torch.cat((state, buffer), -1)


def by_kernel(q, k, v, state, rates, *, size, read_rate=None, retention=None, momentum=None, **options):
    """The operator, of gates as tokens have them."""
    gates = {"read_rate": read_rate, "retention": retention, "momentum": momentum}
    gates = {name: gate.transpose(1, 2) for name, gate in gates.items() if gate is not None}
    spec = kvbind.InnerLoop(kvbind.Linear(), chunk=1, visibility="token", refresh=size, **dict.fromkeys(gates, True))
    shares = shares_of(spec, size, Tokens(k.transpose(1, 2), v.transpose(1, 2), {}, gates))
    return mini_batches(q, k, v, state, rates, size=size, shares=shares, eps=EPS, **options)


def draw(tokens, key, value, dtype, *, hidden=0, bias=True, own=False, gates=("read_rate",), head=True, batch=2, heads=2):
    g = torch.Generator().manual_seed(0)

    def normal(*shape, scale=1.0):
        return scale * torch.randn(*shape, generator=g)

    def unit(*shape):
        return 0.3 + 0.7 * torch.rand(*shape, generator=g)

    numbers = key * hidden + (hidden or key) * value + bias * (hidden + value)
    made = {
        "q": normal(batch, tokens, heads, key, scale=key**-0.5).to(dtype),
        "k": normal(batch, tokens, heads, key, scale=key**-0.5).to(dtype),
        "v": normal(batch, tokens, heads, value).to(dtype),
        "state": normal(batch, heads, numbers * (2 if "momentum" in gates else 1), scale=0.3),
        "rates": 0.2 * unit(batch, tokens, heads, (2 if hidden else 1) * (2 if own else 1)),
    }
    made |= {name: unit(batch, tokens, heads) for name in gates}
    if head:
        made["head"] = torch.stack((unit(batch, heads, value), normal(batch, heads, value, scale=0.2)), dim=2)
    return {name: x.to(DEVICE) for name, x in made.items()}


def outcome(function, o, **options):
    """Outputs, ends and the gradients of all operands, of a random projection."""
    o = {name: x.detach().clone().requires_grad_() for name, x in o.items()}
    found = function(**o, **options)
    g = torch.Generator().manual_seed(1)
    slopes = [torch.randn(x.shape, generator=g, dtype=torch.float64).to(x) for x in found]
    grads = torch.autograd.grad(found, list(o.values()), slopes, allow_unused=True, materialize_grads=True)
    return dict(zip(("out", "end"), found, strict=True)) | dict(zip(o, grads, strict=True))


TITANS = {"gates": ("retention", "momentum"), "bias": False, "head": False}
CASES = {
    "TTT-Linear": ({}, {}, (16, 16, 16)),
    "wide": ({}, {}, (16, 64, 64)),
    "a short mini-batch": ({}, {}, (5, 16, 16)),
    "a long one": ({}, {}, (32, 16, 32)),
    "rates of its own for the bias": ({"own": True}, {}, (16, 16, 16)),
    "no bias": ({"bias": False}, {}, (16, 16, 16)),
    "no gate": ({"gates": ()}, {}, (16, 16, 16)),
    "a head in the loss alone": ({}, {"in_read": False}, (16, 16, 16)),
    "a head in what is read alone": ({}, {"in_loss": False}, (8, 32, 32)),
    "no residual": ({}, {"residual": False}, (16, 16, 32)),
    "no head": ({"head": False}, {}, (16, 16, 32)),
    "the dot product": ({}, {"squared": False, "residual": False}, (16, 32, 16)),
    "the dot product without a head": ({"head": False}, {"squared": False}, (16, 32, 16)),
    "momentum and retention": (TITANS, {}, (8, 16, 32)),
    "momentum alone, with a bias": ({"gates": ("momentum",), "own": True}, {}, (8, 16, 16)),
    "retention alone": ({"gates": ("retention",)}, {}, (16, 16, 16)),
    "TTT-MLP": ({"hidden": 64}, {"activation": "gelu_tanh"}, (16, 16, 16)),
    "TTT-MLP, rates of its own for biases": ({"hidden": 32, "own": True}, {"activation": "gelu_tanh"}, (5, 16, 16)),
    "Titans": ({"hidden": 32} | TITANS, {"activation": "silu"}, (8, 16, 32)),
    "Titans with all there is": (
        {"hidden": 32, "gates": ("retention", "momentum"), "own": True}, {"activation": "gelu"}, (8, 16, 16)
    ),
    "an MLP with retention": ({"hidden": 16, "gates": ("retention",)}, {"activation": "tanh"}, (8, 16, 16)),
    "an MLP, the dot product": ({"hidden": 16, "head": False}, {"activation": "relu", "squared": False}, (8, 32, 16)),
    "an MLP without an activation": ({"hidden": 16, "gates": ()}, {"in_loss": False}, (8, 16, 16)),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "dtype"), [(name, torch.float32) for name in CASES] + [(name, torch.bfloat16) for name in list(CASES)[::3]]
)
def test_it_is_the_loop_with_its_gradients(name, dtype):
    which, options, (size, key, value) = CASES[name]
    if dtype == torch.bfloat16 and options.get("activation") == "relu":
        pytest.skip("its slope jumps where the input is rounded to the other side of zero")
    hidden = which.get("hidden", 0)
    if not which.get("head", True):
        options = options | {"residual": False}
    elif options.get("residual", True) and key != value:
        key = value
    o = draw(3 * size, key, value, dtype, batch=1, **which)
    options = options | {"size": size, "hidden": hidden, "bias": which.get("bias", True)}
    found = outcome(by_kernel, o, **options)
    expected = outcome(plain, {name: x.double() for name, x in o.items()}, **options)
    limit = 2e-5 if dtype == torch.float32 else 4e-2
    for part, x in expected.items():
        assert found[part].dtype == (dtype if part in ("q", "k", "v", "out") else torch.float32), part
        assert (found[part].double() - x).norm() <= limit * x.norm().clamp(min=1e-2), part


@pytest.mark.parametrize("hidden", [0, 16])
def test_stretches_of_several_mini_batches(hidden):
    o = draw(11 * 4, 16, 16, torch.float32, hidden=hidden, batch=1)
    options = {"size": 4, "hidden": hidden, "bias": True, "activation": "silu"}
    found = outcome(by_kernel, o, **options)
    expected = outcome(plain, {name: x.double() for name, x in o.items()}, **options)
    for part, x in expected.items():
        assert (found[part].double() - x).norm() <= 5e-5 * x.norm().clamp(min=1e-2), part


MADE = {
    "TTT-MLP": {"hidden": 16},
    "TTT-Linear": {},
    "Titans": {"gates": ("retention", "momentum"), "hidden": 16},
}


@pytest.mark.parametrize(
    ("where", "value"),
    [(name, math.nan) for name in ("k", "v", "q", "read_rate", "retention", "momentum")]
    + [("k", math.inf), ("rates", math.inf)],
)
@pytest.mark.parametrize("name", list(MADE))
def test_what_is_not_finite_reaches_only_what_sees_it(name, where, value):
    o = draw(24, 16, 16, torch.float32, **MADE[name])
    if where not in o:
        pytest.skip("it has no such gate")
    options = {"size": 8, "hidden": MADE[name].get("hidden", 0), "bias": True, "activation": "gelu"}
    y, end = by_kernel(**o, **options)
    spoilt = {name: x.clone() for name, x in o.items()}
    spoilt[where][1, 11, 0, ...].view(-1)[-1] = value
    z, after = by_kernel(**spoilt, **options)
    assert torch.equal(z[0], y[0])
    assert torch.equal(z[1, :, 1], y[1, :, 1])
    assert torch.equal(z[1, :11, 0], y[1, :11, 0])
    assert not z[1, 11, 0].isfinite().any()
    if where != "q":
        assert not z[1, 11:, 0].isfinite().any()
        assert not after[1, 0].isfinite().any()
    else:
        assert torch.equal(z[1, 12:, 0], y[1, 12:, 0])
        assert torch.equal(after, end)


CALLS = {
    "TTT-Linear": kvbind.systems.ttt_linear(8),
    "step rates, ascent": kvbind.systems.ttt_linear(4).replace(direction="ascent", step_rate=True),
    "no bias, a head in the loss": kvbind.systems.ttt_linear(8).replace(
        network=kvbind.Linear(head=kvbind.LayerNormHead(True, "loss"))
    ),
    "TTT-MLP": kvbind.systems.ttt_mlp(8),
    "Titans": kvbind.systems.titans(8),
    "Titans, step rates, ascent": kvbind.systems.titans(8).replace(direction="ascent", step_rate=True),
    "Titans, one matrix": kvbind.systems.titans(8).replace(network=kvbind.Linear()),
    "Titans, one matrix and a head": kvbind.systems.titans(8).replace(network=kvbind.Linear(head=kvbind.LayerNormHead())),
}


@pytest.mark.parametrize("name", list(CALLS))
def test_calls_with_tokens_pending_run_on_it(name, monkeypatch):
    """Two calls whose states go on, the kernel running whole mini-batches and the dual form the rest."""
    spec, ran = CALLS[name], []
    o = operands(spec, tokens=29, key_width=16, value_width=16, hidden=16, dtype=torch.float32, rate=0.1)
    rates = {name: x.to(DEVICE) for name, x in o.options.pop("lr").items()}
    gates = {name: x.to(DEVICE) for name, x in o.options.items()}
    weights = {name: x.to(DEVICE) for name, x in o.weights.items()}
    tensors = dict(zip("qkv", (x.to(DEVICE).requires_grad_() for x in (o.q, o.k, o.v)), strict=True))
    launched = module.mini_batches

    def noted(*arguments, **options):
        ran.append(1)
        return launched(*arguments, **options)

    monkeypatch.setattr(module, "mini_batches", noted)

    def run(kernels):
        monkeypatch.setenv("KVBIND_KERNELS", kernels)
        state, outputs = None, []
        for part in (slice(0, 13), slice(13, 29)):
            options = {name: x[:, part] for name, x in gates.items()} | {"lr": {n: x[:, part] for n, x in rates.items()}}
            y, state = kvbind.ttt(spec, weights, *(x[:, part] for x in tensors.values()), state=state, **options)
            outputs.append(y)
        y = torch.cat(outputs, 1)
        grads = torch.autograd.grad(y.square().sum(), list(tensors.values()))
        return {"y": y, **dict(zip(tensors, grads, strict=True)), **state.tensors}

    expected = run("0")
    assert not ran
    found = run("force" if DEVICE == "cpu" else "1")
    assert len(ran) == 2
    assert list(found) == list(expected)
    for part, x in expected.items():
        assert (found[part] - x).norm() <= 1e-4 * x.norm().clamp(min=1e-2), part


def test_operands_that_it_does_not_take_are_refused():
    o = draw(16, 16, 16, torch.float32, gates=())
    operands = [o[name] for name in ("q", "k", "v", "state", "rates")]
    with pytest.raises(ValueError, match="positive multiple of size=6 tokens; got 16"):
        mini_batches(*operands, size=6)
    with pytest.raises(ValueError, match="size from 2 to 64"):
        mini_batches(*operands, size=128)
    with pytest.raises(ValueError, match="hidden=24"):
        mini_batches(*operands, size=8, hidden=24)


def test_states_and_tiles_that_registers_do_not_hold_are_not_taken():
    assert covers(torch.bfloat16, 16, 64, 256, 64)
    assert not covers(torch.bfloat16, 16, 64, 512, 64)
    assert covers(torch.bfloat16, 16, 64, 128, 64, momentum=True)
    assert not covers(torch.bfloat16, 16, 64, 256, 64, momentum=True)
    assert covers(torch.bfloat16, 32, 64, 256, 64)
    assert not covers(torch.bfloat16, 64, 64, 256, 64)
    assert not covers(torch.float64, 16, 16, 0, 16)
    # of a block with less shared memory
    assert covers(torch.bfloat16, 16, 64, 256, 64, roomy=False)
    assert covers(torch.bfloat16, 64, 128, 0, 128, roomy=False)
    assert not covers(torch.bfloat16, 64, 128, 0, 128, momentum=True, roomy=False)
