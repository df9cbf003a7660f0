import math

import pytest
import torch
import torch.nn.functional as F

import reference as spec_reference
from kvbind import MLP, Anchor, Linear, NewtonSchulz, systems
from kvbind.layers.lact_nvs import LactNvsLayer
from kvbind.models.lact_nvs import INNER_LOOPS

FULL = systems.lact_nvs()

VARIANTS = {
    "full": {},
    "ascent": {"ascent": True},
    "key": {"key": True},
    "rung1": {"last": True},
    "rung2": {"last": True, "normalize": False},
    "rung3": {"linear": True, "normalize": False},
    "rung6": {"linear": True, "normalize": False, "orthogonalize": False, "constant": True},
    "steps2": {"steps": 2},
    "steps4": {"steps": 4},
}


def exact(inner):
    """The same inner loop with its Newton-Schulz in full precision."""
    if inner.orthogonalize is None:
        return inner
    return inner.replace(orthogonalize=inner.orthogonalize.replace(dtype=torch.float32))


def layer_and_input(inner=FULL, dim=12, head_dim=6, tokens=9, inter_multi=2):
    torch.manual_seed(0)
    layer = LactNvsLayer(dim, head_dim, exact(inner), inter_multi=inter_multi)
    for parameter in layer.parameters():
        parameter.data = torch.randn_like(parameter) * 0.5
    return layer.double().eval(), torch.randn(2, tokens, dim).double()


def newton_schulz(g):
    x = g / (torch.sqrt((g * g).sum()) + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def reference(
    layer, x, writers, ascent=False, key=False, last=False, linear=False, normalize=True, orthogonalize=True, **more
):
    """The layer on one scene `[T, d]`, from the specification: gradients from autograd, one head and token at a time."""
    steps, constant = more.get("steps", 1), more.get("constant", False)
    d, heads, width = layer.dim, layer.heads, layer.head_dim
    qkv = x @ layer.to_qkv.weight.T
    qkv = qkv / (1 + torch.exp(-qkv))
    names = ["w1"] if linear else ["w0", "w1", "w2"]
    if not constant:
        logits = x @ layer.lr_fc.weight.T + layer.lr_fc.bias
        # softplus, shifted so that it is 0.01 at 0
        rates = torch.log1p(torch.exp(logits + math.log(math.expm1(0.01))))
    outputs = []
    for head in range(heads):
        q, k, v = (qkv[:, part * d + head * width : part * d + (head + 1) * width] for part in range(3))
        q, k = (y / (y.norm(dim=1, keepdim=True) + 1e-5) for y in (q, k))

        def network(y, w):
            if linear:
                return y @ w["w1"]
            u = y @ w["w0"]
            return (u / (1 + torch.exp(-u)) * (y @ w["w2"])) @ w["w1"]

        start = {name: layer.get_parameter(name)[head].detach() for name in names}
        weights = dict(start)
        updated = ["w1"] if last or linear else names
        for _ in range(steps):
            leaves = {name: w.clone().requires_grad_() for name, w in weights.items()}
            updates = dict.fromkeys(updated, 0)
            for t in writers:
                loss = -(network(k[t], leaves) * v[t]).sum()
                gradients = torch.autograd.grad(loss, [leaves[name] for name in updated])
                for name, gradient in zip(updated, gradients, strict=True):
                    rate = 1.0 if constant else rates[t, updated.index(name) * heads + head]
                    updates[name] = updates[name] - rate * gradient
            for name, update in updates.items():
                step = newton_schulz(update) if orthogonalize else update
                new = weights[name] - step if ascent else weights[name] + step
                if normalize:
                    new = new / (new.norm(dim=0, keepdim=True) + 1e-5) * start[name].norm(dim=0, keepdim=True)
                weights[name] = new
        out = network(k if key else q, weights)
        outputs.append(out / torch.sqrt((out * out).mean(1, keepdim=True) + 1e-5) * layer.o_norm.weight)
    return torch.cat(outputs, dim=1) @ layer.c_proj.weight.T


@pytest.mark.parametrize("row", VARIANTS)
def test_every_row_computes_what_the_specification_says(row):
    layer, x = layer_and_input(INNER_LOOPS[row])
    with torch.no_grad():
        output, _ = layer(x, slice(0, 6))
    for scene in range(2):
        expected = reference(layer, x[scene].detach(), range(6), **VARIANTS[row]).detach()
        torch.testing.assert_close(output[scene], expected, rtol=0, atol=1e-9)
        # that the comparison could tell a row from the others of its kind
        others = {"rung2": {"last": True}, "rung3": {**VARIANTS["rung3"], "orthogonalize": False}}
        if row in (*others, "ascent", "key", "steps2", "steps4"):
            plain = reference(layer, x[scene].detach(), range(6), **others.get(row, {})).detach()
            assert (plain - expected).abs().max() > 1e-2


def test_parameters_have_the_released_names_and_shapes():
    layer = LactNvsLayer(64, 32, inter_multi=2)
    assert {name: tuple(x.shape) for name, x in layer.state_dict().items()} == {
        "w0": (2, 32, 64),
        "w1": (2, 64, 32),
        "w2": (2, 32, 64),
        "to_qkv.weight": (192, 64),
        "c_proj.weight": (64, 64),
        "lr_fc.weight": (6, 64),
        "lr_fc.bias": (6,),
        "o_norm.weight": (32,),
    }


def test_only_what_an_inner_loop_needs_is_built():
    layer = LactNvsLayer(64, 32, INNER_LOOPS["rung6"])
    assert sorted(name for name in layer.state_dict() if name[0] in "wl") == ["w1"]
    assert LactNvsLayer(64, 32, INNER_LOOPS["rung1"]).lr_fc.out_features == 2


def test_starting_weights_keep_the_norm_of_their_input():
    torch.manual_seed(0)
    layer = LactNvsLayer(256, 256, inter_multi=2)
    for name, inputs in (("w0", 256), ("w1", 512), ("w2", 256)):
        assert layer.get_parameter(name).std().item() == pytest.approx(math.sqrt(2 / inputs), rel=0.02)


def test_a_rate_starts_at_the_base_rate():
    layer = LactNvsLayer(16, 8, base_lr=0.03)
    for parameter in layer.lr_fc.parameters():
        torch.nn.init.zeros_(parameter)
    rates = layer.learning_rates(torch.randn(1, 4, 16))
    assert sorted(rates) == ["gate", "out", "up"]
    for rate in rates.values():
        torch.testing.assert_close(rate, torch.full((1, 4, 2), 0.03))


def test_an_assigned_inner_loop_takes_the_rates_of_its_own_matrices():
    layer, x = layer_and_input()
    before = layer.learning_rates(x)
    layer.inner = exact(FULL.replace(update="last"))
    after = layer.learning_rates(x)
    assert list(after) == ["out"]
    assert (before["out"] - before["gate"]).abs().max() > 1e-3
    torch.testing.assert_close(after["out"], before["out"])


def test_tokens_that_only_read_change_nothing_for_the_others():
    layer, x = layer_and_input()
    output, state = layer(x, slice(0, 6))
    changed = torch.cat((x[:, :6], torch.randn_like(x[:, 6:])), dim=1)
    again, after = layer(changed, slice(0, 6))
    torch.testing.assert_close(again[:, :6], output[:, :6])
    torch.testing.assert_close(after.weights["out"], state.weights["out"])


def test_reading_later_gives_the_same_as_reading_at_once():
    layer, x = layer_and_input()
    output, _ = layer(x, slice(0, 6))
    written, state = layer(x[:, :6])
    read, after = layer(x[:, 6:], slice(0, 0), state)
    torch.testing.assert_close(torch.cat((written, read), dim=1), output, rtol=0, atol=1e-12)
    torch.testing.assert_close(after.weights["gate"], state.weights["gate"], rtol=0, atol=0)


def test_a_second_write_goes_on_from_the_first():
    layer, x = layer_and_input()
    _, first = layer(x[:, :6])
    _, second = layer(x[:, 6:], None, first)
    assert (second.weights["out"] - first.weights["out"]).abs().max() > 1e-2
    # normalization still refers to the scene's start
    for name, norm in first.norms.items():
        torch.testing.assert_close(second.weights[name].norm(dim=-2, keepdim=True), norm, rtol=1e-4, atol=0)
        torch.testing.assert_close(second.norms[name], norm)


REFUSED = {
    "causal": (FULL.replace(visibility="past", chunk=4), ValueError, "inner's visibility must be 'full'"),
    "momentum": (FULL.replace(momentum=True), ValueError, "momentum=False"),
    "a grid": (systems.vittt("conv"), ValueError, "DepthwiseConv reads a grid"),
    "another network": (FULL.replace(network=MLP()), ValueError, "'in'.*has none of that name"),
    "another shape": (
        FULL.replace(network=Linear()),
        ValueError,
        r"'out' of shape \[8, 8\]; this layer has it as \[16, 8\]",
    ),
    "a class": (NewtonSchulz(), TypeError, "inner must be a kvbind.InnerLoop; got NewtonSchulz"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_inner_loops_that_do_not_fit_are_refused_and_change_nothing(case):
    inner, error, message = REFUSED[case]
    layer = LactNvsLayer(16, 8, inter_multi=2)
    with pytest.raises(error, match=message):
        layer.inner = inner
    assert layer.inner == FULL


def test_an_inner_loop_that_needs_rates_is_refused_by_a_layer_without():
    layer = LactNvsLayer(16, 8, INNER_LOOPS["rung1"])
    with pytest.raises(ValueError, match=r"token_lr=True and updates 'gate'.*learned rates for out"):
        layer.inner = FULL
    layer.inner = FULL.replace(token_lr=False)


def test_widths_and_rates_are_checked():
    with pytest.raises(ValueError, match="head_dim must divide dim = 16; got 5"):
        LactNvsLayer(16, 5)
    with pytest.raises(ValueError, match="base_lr must be above 0; got 0"):
        LactNvsLayer(16, 8, base_lr=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_near_full_precision_and_keeps_a_float32_state(dtype):
    layer, x = layer_and_input(INNER_LOOPS["rung1"])
    layer, x = layer.float(), x.float()
    expected, _ = layer(x, slice(0, 6))
    with torch.autocast("cpu", dtype=dtype):
        output, state = layer(x, slice(0, 6))
    assert output.dtype == dtype
    assert state.weights["out"].dtype == torch.float32
    assert (output.float() - expected).norm() / expected.norm() < 0.05
    output.float().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters() if parameter.grad is not None)


def test_the_layer_compiles_as_one_graph():
    layer, x = layer_and_input()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected, _ = layer(x, slice(0, 6))
    output, _ = compiled(x, slice(0, 6))
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-9)
    F.mse_loss(output, torch.zeros_like(output)).backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


ELASTIC = FULL.replace(chunk=3, detach_norms=True)


@pytest.mark.parametrize(
    "anchor",
    [
        None,
        Anchor(detach=("importance", "start")),
        Anchor("absolute", decay=0.3, strength=0.2, follow=1.0, start=1e-6),
        Anchor("square", "rest", decay=0.5, strength=0.05, follow=0.8, detach=("importance", "follow")),
    ],
)
@pytest.mark.parametrize("writers", [slice(0, 7), slice(2, 9), slice(0, 0)])
def test_chunks_of_writers_and_anchors_are_the_specification(anchor, writers):
    inner = ELASTIC.replace(anchor=anchor)
    layer, x = layer_and_input(inner)
    q, k, v = (F.silu(part).unflatten(-1, (2, 6)) for part in layer.to_qkv(x).chunk(3, dim=-1))
    q, k = (y / (y.norm(dim=-1, keepdim=True) + 1e-5) for y in (q, k))
    # matrices outermost, in the released order
    rates = F.softplus(layer.lr_fc(x) + math.log(math.expm1(0.01))).chunk(3, dim=-1)
    lr = dict(zip(("gate", "out", "up"), rates, strict=True))
    read = spec_reference.run(exact(inner), layer.start_weights(), q, k, v, lr, update_tokens=writers)[0]
    normed = read / (read.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.o_norm.weight
    plain = layer.c_proj(normed.flatten(2))
    output, state = layer(x, writers)
    torch.testing.assert_close(output, plain, rtol=1e-7, atol=1e-7)
    assert ("anchor.out" in state.tensors) == (anchor is not None)
    if writers.stop:
        for ours, theirs in zip(
            *(torch.autograd.grad(y.square().sum(), list(layer.parameters()), retain_graph=True) for y in (output, plain)),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


def test_a_later_call_writes_on_with_the_anchor_it_left():
    layer, x = layer_and_input(ELASTIC.replace(anchor=Anchor()))
    with torch.no_grad():
        together, whole = layer(x, slice(0, 6))
        _, first = layer(x[:, :3])
        _, second = layer(x[:, 3:6], state=first)
        read, _ = layer(x, slice(0, 0), state=second)
    torch.testing.assert_close(read, together)
    for name, tensor in whole.tensors.items():
        torch.testing.assert_close(second.tensors[name], tensor, msg=name)
