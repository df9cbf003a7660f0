"""torch.func's transforms of the models' losses and of `ttt` itself, with kernels wherever they would run."""

import copy

import pytest
import torch
from lact_small import small_model, tokens
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vmap

import kvbind
from checkpointing import enable_checkpointing
from kvbind.models import vittt
from kvbind.models.lact_nvs import LactNvs, LactNvsConfig

IDS = tokens(2, 12)
CAMERAS = (torch.eye(4).expand(1, 2, 4, 4), torch.tensor([8.0, 8, 4, 4]).expand(1, 2, 4))
PICTURES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Loss(torch.nn.Module):
    """A model and its loss of one input."""

    def __init__(self, model, loss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, x):
        return self.loss(self.model, x)


def language():
    inner = kvbind.systems.lact_llm(chunk=4).replace(orthogonalize=None)
    model = small_model(inner, num_hidden_layers=1, hidden_size=16, num_attn_heads=2)
    return Loss(model, lambda model, ids: model(ids, labels=ids).loss), IDS


def images():
    torch.manual_seed(0)
    model = vittt.Vittt(8, 1, 2, 4, num_classes=2, initializer_range=0.3).eval()
    return Loss(model, lambda model, x: model(x).square().mean()), PICTURES


def hierarchical():
    torch.manual_seed(0)
    model = vittt.HierarchicalVittt((8, 8), (1, 1), (2, 2), num_classes=2, initializer_range=0.3).eval()
    return Loss(model, lambda model, x: model(x).square().mean()), PICTURES


def views():
    torch.manual_seed(0)
    inner = kvbind.systems.lact_nvs().replace(orthogonalize=None)
    config = LactNvsConfig(dim=16, layers=1, patch_size=4, head_dim=8, fast_head_dim=16, inner=inner)
    model = LactNvs(config).eval()
    return Loss(model, lambda model, x: model(x[None], *CAMERAS, *CAMERAS).square().mean()), PICTURES


FAMILIES = {f.__name__: f for f in (language, images, hierarchical, views)}


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    # a GPU's choices on the CPU: transforms must not meet kernels, which know none of them
    monkeypatch.setenv("KVBIND_KERNELS", "force")
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture
def plainly(monkeypatch):
    """What is expected comes from PyTorch alone."""

    def call(function, *args):
        with monkeypatch.context() as context:
            context.setenv("KVBIND_KERNELS", "0")
            return function(*args)

    return call


def weights_of(model):
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_grad_and_jacrev_are_the_gradient(family, plainly):
    model, x = FAMILIES[family]()
    gradients = plainly(lambda: torch.autograd.grad(model(x), list(model.parameters()), materialize_grads=True))
    expected = dict(zip(weights_of(model), gradients, strict=True))

    def loss(weights):
        return functional_call(model, weights, (x,))

    for transform in (grad, jacrev):
        torch.testing.assert_close(transform(loss)(weights_of(model)), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("family", FAMILIES)
def test_jvp_is_the_gradient_along_a_direction(family):
    model, x = FAMILIES[family]()
    weights = weights_of(model)
    along = {name: torch.randn_like(w) for name, w in weights.items()}

    def loss(weights):
        return functional_call(model, weights, (x,))

    slopes = grad(loss)(weights)
    expected = sum((slopes[name] * along[name]).sum() for name in weights)
    torch.testing.assert_close(jvp(loss, (weights,), (along,))[1], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_vmap_runs_stacked_weights_and_gives_gradients_of_samples(family, plainly):
    model, x = FAMILIES[family]()
    others = [model, copy.deepcopy(model)]
    with torch.no_grad():
        for p in others[1].parameters():
            p.mul_(1.1)
    stacked, buffers = stack_module_state(others)

    def loss(weights, buffers, x):
        return functional_call(model, (weights, buffers), (x,))

    expected = plainly(lambda: torch.stack([other(x) for other in others]))
    torch.testing.assert_close(vmap(loss, (0, 0, None))(stacked, buffers, x), expected, rtol=1e-4, atol=1e-6)

    # one sample each, of a batch of its own
    samples = [x[:1], x[1:]] if family != "views" else [x, x.flip(-1)]
    one = {name: w[0] for name, w in stacked.items()}, {name: b[0] for name, b in buffers.items()}
    found = vmap(grad(loss), (None, None, 0))(*one, torch.stack(samples))
    for i, sample in enumerate(samples):
        alone = grad(loss)(*one, sample)
        torch.testing.assert_close({name: g[i] for name, g in found.items()}, alone, rtol=1e-3, atol=1e-6)


SYSTEMS = {
    "linear attention": kvbind.systems.linear_attention(4),
    "delta rule": kvbind.systems.delta_net(),
    "momentum": kvbind.systems.titans(chunk=4),
    "convolution": kvbind.systems.vittt("conv").replace(network=kvbind.DepthwiseConv((2, 4))),
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_transforms_of_ttt_are_its_derivatives(name, plainly):
    spec, (batch, length, heads, width) = SYSTEMS[name], (2, 8, 1, 4)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    q, k, v = (draw(batch, length, heads, width) for _ in range(3))
    network = spec.network
    shapes = network.shapes(width, width, (width,) * network.hidden_layers)
    weights = {x: 0.3 * draw(*network.stored_shape(heads, shape)) for x, shape in shapes.items()}
    gates = {x: draw(batch, length, heads).sigmoid() for x in ("momentum", "retention") if getattr(spec, x)}
    lr = 0.1 * draw(batch, length, heads).sigmoid() if spec.token_lr else 0.1

    def outputs(weights, k):
        return kvbind.ttt(spec, weights, q, k, v, lr=lr, **gates)[0]

    def loss(weights, k):
        return outputs(weights, k).square().sum()

    leaves = [x.clone().requires_grad_() for x in (*weights.values(), k)]
    gradients = plainly(lambda: torch.autograd.grad(loss(dict(zip(weights, leaves, strict=False)), leaves[-1]), leaves))
    by_weights, by_keys = grad(loss, (0, 1))(weights, k)
    torch.testing.assert_close((*by_weights.values(), by_keys), gradients, rtol=1e-4, atol=1e-5)

    two = {x: torch.stack((w, 1.1 * w)) for x, w in weights.items()}
    expected = plainly(lambda: torch.stack([outputs({x: w[i] for x, w in two.items()}, k) for i in range(2)]))
    torch.testing.assert_close(vmap(outputs, (0, None))(two, k), expected, rtol=1e-4, atol=1e-5)

    direction = torch.ones_like(k)
    _, tangent = jvp(lambda k: outputs(weights, k), (k,), (direction,))
    slope = jacrev(lambda k: outputs(weights, k).sum())(k)
    torch.testing.assert_close(tangent.sum(), slope.sum(), rtol=1e-3, atol=1e-4)


def test_forward_mode_loses_no_tangent():
    q = torch.randn(1, 8, 1, 4)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, q)
        y, _ = kvbind.ttt(SYSTEMS["linear attention"], {"out": torch.eye(4)[None]}, dual, q, q, lr=0.1)
        value, tangent = torch.autograd.forward_ad.unpack_dual(y)
    # linear in its queries
    torch.testing.assert_close(tangent, value)


def test_what_transforms_cannot_do_is_refused_by_name():
    model, ids = language()
    with pytest.raises(ValueError, match="attention_mask must be the same"):
        vmap(lambda mask: model.model(ids, attention_mask=mask).logits)(torch.ones(2, 2, 12))
    model.train()
    enable_checkpointing(model.model)
    with pytest.raises(ValueError, match="gradient checkpointing must be off"):
        grad(lambda weights: functional_call(model, weights, (ids,)))(weights_of(model))
    for family in (images, views):
        other, x = family()
        other.train().model.set_grad_checkpointing()
        with pytest.raises(ValueError, match="gradient checkpointing must be off"):
            grad(lambda weights, other=other, x=x: functional_call(other, weights, (x,)))(weights_of(other))
