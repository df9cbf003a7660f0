"""ViTTT, written plainly from the specification: functions of a state dict, one image at a time.

Gradients of the inner loss come from autograd, convolutions from explicit sums over shifted images, and nothing of the
library is used.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

DEFAULT = {
    "ascent": False,
    "key": False,
    "last": False,
    "linear": False,
    "clip": True,
    "squared": False,
    "conv_key": False,
    "conv_squared": False,
}


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def linear(x: Tensor, state: dict, name: str) -> Tensor:
    return x @ state[name + ".weight"].T + state[name + ".bias"]


def layer_norm(x: Tensor, state: dict, name: str, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scale = torch.sqrt((centred**2).mean(-1, keepdim=True) + eps)
    return centred / scale * state[name + ".weight"] + state[name + ".bias"]


def batch_norm(image: Tensor, state: dict, name: str) -> Tensor:
    """In evaluation, over channels first."""
    shape = (-1,) + (1,) * (image.dim() - 1)
    mean, variance = state[name + ".running_mean"].reshape(shape), state[name + ".running_var"].reshape(shape)
    scaled = (image - mean) / torch.sqrt(variance + 1e-5)
    return scaled * state[name + ".weight"].reshape(shape) + state[name + ".bias"].reshape(shape)


def depthwise(image: Tensor, kernel: Tensor) -> Tensor:
    """3x3 cross-correlation of each channel of `[C, h, w]` with `[C, 3, 3]`, zeros around."""
    _, h, w = image.shape
    padded = F.pad(image, (1, 1, 1, 1))
    return sum(padded[:, i : i + h, j : j + w] * kernel[:, i, j, None, None] for i in range(3) for j in range(3))


def depthwise_tokens(x: Tensor, grid: tuple[int, int], state: dict, name: str) -> Tensor:
    image = depthwise(x.T.reshape(-1, *grid), state[name + ".weight"][:, 0]) + state[name + ".bias"][:, None, None]
    return image.reshape(len(image), -1).T


def clipped(gradient: Tensor, axes: tuple[int, ...]) -> Tensor:
    return gradient / (gradient.square().sum(axes, keepdim=True).sqrt() + 1)


def rotated(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Neighbouring channels of `[T, d]` as complex numbers, turned by row (first half) and column (second half)."""
    quarter = x.shape[1] // 4
    turned = x.clone()
    for t in range(len(x)):
        row, column = divmod(t, grid[1])
        for i in range(2 * quarter):
            position = row if i < quarter else column
            angle = position * 10000 ** (-(i % quarter) / quarter)
            number = complex(x[t, 2 * i], x[t, 2 * i + 1]) * complex(math.cos(angle), math.sin(angle))
            turned[t, 2 * i], turned[t, 2 * i + 1] = number.real, number.imag
    return turned


def glu_branch(q: Tensor, k: Tensor, v: Tensor, value: Tensor, gate: Tensor, variant: dict) -> Tensor:
    """One head: `[T, D]` each, matrices `[D, D]`."""
    weights = {"value": value.clone().requires_grad_(), "gate": gate.clone().requires_grad_()}

    def network(x: Tensor, w: dict) -> Tensor:
        return x @ w["value"] if variant["linear"] else silu(x @ w["gate"]) * (x @ w["value"])

    prediction = network(k, weights)
    each = 0.5 * ((prediction - v) ** 2).sum(-1) if variant["squared"] else -(prediction * v).sum(-1)
    names = ["value"] if variant["last"] or variant["linear"] else ["value", "gate"]
    gradients = torch.autograd.grad(each.mean() / 3, [weights[name] for name in names])
    after = {name: x.detach() for name, x in weights.items()}
    for name, gradient in zip(names, gradients, strict=True):
        step = clipped(gradient, (0,)) if variant["clip"] else gradient
        after[name] = after[name] + step if variant["ascent"] else after[name] - step
    return network(k if variant["key"] else q, after)


def conv_branch(q: Tensor, k: Tensor, v: Tensor, kernel: Tensor, grid: tuple[int, int], variant: dict) -> Tensor:
    """`[T, D]` each, kernel `[D, 3, 3]`."""
    q, k, v = (x.T.reshape(-1, *grid) for x in (q, k, v))
    start = kernel.clone().requires_grad_()
    prediction = depthwise(k, start)
    each = 0.5 * ((prediction - v) ** 2).sum(0) if variant["conv_squared"] else -(prediction * v).sum(0)
    (gradient,) = torch.autograd.grad(each.mean() / 3, [start])
    after = kernel - clipped(gradient, (1, 2))
    return depthwise(k if variant["conv_key"] else q, after).reshape(len(kernel), -1).T


def mixer(x: Tensor, grid: tuple[int, int], state: dict, name: str, heads: int, rotary: bool, variant: dict) -> Tensor:
    d = x.shape[1]
    width = d // heads
    q, k, v, conv_q, conv_k, conv_v = linear(x, state, name + ".qkv").split([d, d, d, width, width, width], dim=1)
    if rotary:
        q, k = rotated(q, grid), rotated(k, grid)
    outputs = []
    for head in range(heads):
        own = slice(head * width, (head + 1) * width)
        gate = state[name + ".w2"][0, head] if name + ".w2" in state else torch.zeros(width, width, dtype=x.dtype)
        outputs.append(glu_branch(q[:, own], k[:, own], v[:, own], state[name + ".w1"][0, head], gate, variant))
    outputs.append(conv_branch(conv_q, conv_k, conv_v, state[name + ".w3"][:, 0], grid, variant))
    return linear(torch.cat(outputs, dim=1), state, name + ".proj")


def block(x, grid, state, name, heads, eps, hierarchical, variant):
    x = x + depthwise_tokens(x, grid, state, name + ".cpe")
    x = x + mixer(layer_norm(x, state, name + ".norm1", eps), grid, state, name + ".attn", heads, hierarchical, variant)
    h = gelu(linear(layer_norm(x, state, name + ".norm2", eps), state, name + ".mlp.fc1"))
    if hierarchical:
        h = gelu(h + depthwise_tokens(h, grid, state, name + ".mlp.dwc"))
    return x + linear(h, state, name + ".mlp.fc2")


def plain_logits(state: dict, config: dict, image: Tensor, **variant) -> Tensor:
    """Logits `[classes]` of one image `[3, H, W]`."""
    variant = {**DEFAULT, **variant}
    patches = F.conv2d(image[None], state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], config["patch_size"])[
        0
    ]
    grid, x = tuple(patches.shape[1:]), patches.flatten(1).T
    for i in range(config["depth"]):
        x = block(x, grid, state, f"blocks.{i}", config["num_heads"], 1e-6, False, variant)
    return linear(layer_norm(x, state, "norm", 1e-6).mean(0), state, "head")


def hierarchical_logits(state: dict, config: dict, image: Tensor, **variant) -> Tensor:
    """Logits `[classes]` of one image `[3, H, W]`."""
    variant = {**DEFAULT, **variant}
    x = image
    for i, stride in enumerate((2, 1, 1, 2, 1)):
        weight = state[f"patch_embed.conv.{i}.conv.weight"]
        x = F.conv2d(x[None], weight, None, stride, weight.shape[-1] // 2)[0]
        x = batch_norm(x, state, f"patch_embed.conv.{i}.norm")
        x = x.clamp(min=0) if i < 4 else x
    for stage, depth in enumerate(config["depths"]):
        grid, tokens = tuple(x.shape[1:]), x.flatten(1).T
        for i in range(depth):
            name, heads = f"layers.{stage}.blocks.{i}", config["num_heads"][stage]
            tokens = block(tokens, grid, state, name, heads, 1e-5, True, variant)
        x = tokens.T.reshape(-1, *grid)
        if stage + 1 < len(config["depths"]):
            name = f"layers.{stage}.downsample.conv."
            weights = [(state[f"{name}{i}.conv.weight"], state[f"{name}{i}.conv.bias"]) for i in range(3)]
            x = F.conv2d(x[None], *weights[0])[0].clamp(min=0)
            x = F.conv2d(x[None], *weights[1], 2, 1, groups=len(x))[0].clamp(min=0)
            x = batch_norm(F.conv2d(x[None], *weights[2])[0], state, name + "2.norm")
    return linear(batch_norm(x.flatten(1), state, "norm").mean(1), state, "head")
