"""TTT-Linear's mini-batches as one kernel, against a plain loop in float64."""

import os

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("kernels need a GPU or TRITON_INTERPRET=1", allow_module_level=True)

import kvbind
from kvbind.kernels.mini_batches import operator as module
from kvbind.kernels.mini_batches.operator import mini_batches
from strategies import operands

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("q", "k", "v", "weights", "bias", "gamma", "beta", "rates", "bias_rates", "read_rate")
EPS = 1e-4


@pytest.fixture(autouse=True)
def _exact():
    """float32 products in float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def plain(q, k, v, weights, rates, *, size, bias=None, bias_rates=None, read_rate=None, gamma=None, beta=None, squared=True,
          in_loss=True, in_read=True, residual=True):  # fmt: skip
    """Token after token, gradients automatic."""

    def head(z, x):
        y = F.layer_norm(z, z.shape[-1:], eps=EPS) * gamma + beta
        return x + y if residual else y

    def layer(w, b, x):
        z = (x[..., None, :] @ w).squeeze(-2)
        return z if b is None else z + b

    outputs, bias_rates = [], rates if bias_rates is None else bias_rates
    for start in range(0, q.shape[1], size):
        far, bias_far = torch.zeros_like(weights), None if bias is None else torch.zeros_like(bias)
        for t in range(start, start + size):
            x, y = k[:, t], v[:, t]

            def loss(w, b, x=x, y=y):
                f = layer(w, b, x)
                f = head(f, x) if in_loss and gamma is not None else f
                return 0.5 * ((f - y) ** 2).sum() if squared else -(f * y).sum()

            if bias is None:
                far = far - rates[:, t, :, None, None] * torch.func.grad(loss)(weights, None)
            else:
                dw, db = torch.func.grad(loss, (0, 1))(weights, bias)
                far = far - rates[:, t, :, None, None] * dw
                bias_far = bias_far - bias_rates[:, t, :, None] * db
            share = q.new_ones(rates[:, t].shape) if read_rate is None else read_rate[:, t]
            w = weights + share[..., None, None] * far
            b = None if bias is None else bias + share[..., None] * bias_far
            z = layer(w, b, q[:, t])
            outputs.append(head(z, q[:, t]) if in_read and gamma is not None else z)
        weights, bias = w, b
    return torch.stack(outputs, 1), weights, bias


def draw(tokens, key, value, dtype, *, bias=True, bias_rates=False, read_rate=True, head=True, seed=0, batch=2, heads=2):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return scale * torch.randn(*shape, generator=g)

    def unit(*shape):
        return 0.3 + 0.7 * torch.rand(*shape, generator=g)

    made = {
        "q": normal(batch, tokens, heads, key, scale=key**-0.5).to(dtype),
        "k": normal(batch, tokens, heads, key, scale=key**-0.5).to(dtype),
        "v": normal(batch, tokens, heads, value).to(dtype),
        "weights": normal(batch, heads, key, value, scale=0.3),
        "rates": 0.3 * unit(batch, tokens, heads),
    }
    if bias:
        made["bias"] = normal(batch, heads, value, scale=0.2)
        if bias_rates:
            made["bias_rates"] = 0.2 * unit(batch, tokens, heads)
    if read_rate:
        made["read_rate"] = unit(batch, tokens, heads)
    if head:
        made |= {"gamma": unit(batch, heads, value), "beta": normal(batch, heads, value, scale=0.2)}
    return {name: x.to(DEVICE) for name, x in made.items()}


def outcome(function, o, **options):
    """Outputs, ends and the gradients of all operands, of a random projection."""
    o = {name: x.detach().clone().requires_grad_() for name, x in o.items()}
    found = function(*(o[name] for name in ("q", "k", "v", "weights", "rates")), **options,
                     **{name: x for name, x in o.items() if name not in ("q", "k", "v", "weights", "rates")})  # fmt: skip
    found = [x for x in found if x is not None]
    g = torch.Generator().manual_seed(1)
    slopes = [torch.randn(x.shape, generator=g, dtype=torch.float64).to(x) for x in found]
    grads = torch.autograd.grad(found, list(o.values()), slopes, allow_unused=True, materialize_grads=True)
    return dict(zip(("out", "end", "bias_end"), found, strict=False)) | dict(zip(o, grads, strict=True))


CASES = {
    "TTT-Linear": ({}, {}, (16, 16, 16)),
    "wide": ({}, {}, (16, 64, 64)),
    "a short mini-batch": ({}, {}, (5, 16, 16)),
    "a long one": ({}, {}, (32, 16, 32)),
    "rates of its own for the bias": ({"bias_rates": True}, {}, (16, 16, 16)),
    "no bias": ({"bias": False}, {}, (16, 16, 16)),
    "no reader's rate": ({"read_rate": False}, {}, (16, 16, 16)),
    "a head in the loss alone": ({}, {"in_read": False}, (16, 16, 16)),
    "a head in what is read alone": ({}, {"in_loss": False}, (8, 32, 32)),
    "no residual": ({}, {"residual": False}, (16, 16, 32)),
    "no head": ({"head": False}, {}, (16, 16, 32)),
    "the dot product": ({}, {"squared": False, "residual": False}, (16, 32, 16)),
    "the dot product without a head": ({"head": False}, {"squared": False}, (16, 32, 16)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(CASES))
def test_it_is_the_loop_with_its_gradients(name, dtype):
    which, options, (size, key, value) = CASES[name]
    if dtype == torch.float32:
        key, value = min(key, 32), min(value, 32)
    if not (options.get("residual", True) and which.get("head", True)):
        options = options | {"residual": False}
    elif key != value:
        key = value
    o = draw(3 * size, key, value, dtype, **which)
    found = outcome(mini_batches, o, size=size, eps=EPS, **options)
    expected = outcome(plain, {name: x.double() for name, x in o.items()}, size=size, **options)
    limit = 2e-5 if dtype == torch.float32 else 4e-2
    for part, x in expected.items():
        assert found[part].dtype == (dtype if part in ("q", "k", "v", "out") else torch.float32), part
        assert (found[part].double() - x).norm() <= limit * x.norm().clamp(min=1e-2), part


def test_stretches_of_several_mini_batches():
    o = draw(11 * 4, 16, 16, torch.float32, batch=1)
    found = outcome(mini_batches, o, size=4, eps=EPS)
    expected = outcome(plain, {name: x.double() for name, x in o.items()}, size=4)
    for part, x in expected.items():
        assert (found[part].double() - x).norm() <= 5e-5 * x.norm().clamp(min=1e-2), part


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["k", "v", "rates", "read_rate", "q"])
def test_what_is_not_finite_reaches_only_what_sees_it(where, value):
    o = draw(24, 16, 16, torch.float32)
    options = {name: o[name] for name in ("bias", "read_rate", "gamma", "beta")}
    operands = [o[name] for name in ("q", "k", "v", "weights", "rates")]
    y, end, _ = mini_batches(*operands, size=8, eps=EPS, **options)
    spoilt = {name: x.clone() for name, x in o.items()}
    spoilt[where][1, 11, 0, ...].view(-1)[-1] = value
    options = {name: spoilt[name] for name in ("bias", "read_rate", "gamma", "beta")}
    z, after, _ = mini_batches(*(spoilt[name] for name in ("q", "k", "v", "weights", "rates")), size=8, eps=EPS, **options)
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
}


@pytest.mark.parametrize("name", list(CALLS))
def test_calls_with_tokens_pending_run_on_it(name, monkeypatch):
    """Two calls whose states go on, the kernel running whole mini-batches and the dual form the rest."""
    spec, ran = CALLS[name], []
    o = operands(spec, tokens=29, key_width=16, value_width=16, dtype=torch.float32, rate=0.1)
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
    o = draw(16, 16, 16, torch.float32)
    operands = [o[name] for name in ("q", "k", "v", "weights", "rates")]
    with pytest.raises(ValueError, match="positive multiple of size=6 tokens; got 16"):
        mini_batches(*operands, size=6)
    with pytest.raises(ValueError, match="size from 2 to 64"):
        mini_batches(*operands, size=128)
