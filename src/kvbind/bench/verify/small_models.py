"""Models that promises are tried on, at two scales, and a batch and a loss for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvbind.inner import systems
from kvbind.inner.spec import InnerLoop


@dataclass(frozen=True)
class ModelScale:
    """Sizes of the models.

    Attributes:
        width: of the residual stream; two heads of every kind.
        layers: blocks.
        tokens: in a training sequence; no multiple of the chunk.
        chunk: tokens.
        window: tokens that attention sees.
        image: side of pictures in pixels; the second of two sizes is half as large again.
        backend: of `torch.compile`.
    """

    width: int
    layers: int
    tokens: int
    chunk: int
    window: int
    image: int
    backend: str


FULL = ModelScale(width=256, layers=2, tokens=4 * 256 + 77, chunk=256, window=256, image=128, backend="inductor")

SMALL = ModelScale(width=32, layers=1, tokens=21, chunk=8, window=8, image=16, backend="aot_eager")


def precise(inner: InnerLoop) -> InnerLoop:
    """An inner loop whose Newton-Schulz runs in float32."""
    if inner.orthogonalize is None:
        return inner
    return inner.replace(orthogonalize=inner.orthogonalize.replace(dtype=torch.float32))


def language(scale: ModelScale, device: torch.device, rung: str = "rung2", **fields: Any) -> Any:
    """A language model of random weights."""
    from kvbind.models.lact import LactConfig, LactForCausalLM

    torch.manual_seed(0)
    inner = precise(systems.ladder(systems.lact_llm(scale.chunk))[rung])
    config = LactConfig(
        vocab_size=512, hidden_size=scale.width, num_hidden_layers=scale.layers, num_attn_heads=2, num_lact_heads=2,
        window_size=scale.window, inner=inner, initializer_range=0.1, bos_token_id=None, eos_token_id=None, **fields,
    )  # fmt: skip
    model: nn.Module = LactForCausalLM(config)
    return model.to(device)


def text(scale: ModelScale, device: torch.device, batch: int = 2) -> Tensor:
    """Token ids `[batch, tokens]`."""
    return torch.randint(0, 512, (batch, scale.tokens), generator=torch.Generator().manual_seed(0)).to(device)


def pictures(scale: ModelScale, device: torch.device, batch: int, sides: int) -> Tensor:
    """Pictures `[batch, 3, side, side]` of the first or second size."""
    side = scale.image * sides // 2
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(sides)).to(device)


def views(scale: ModelScale, device: torch.device, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures, poses and intrinsics of one scene."""
    image = pictures(scale, device, count, 2)[None]
    angle = 0.2 * torch.arange(count, dtype=torch.float32)
    pose = torch.eye(4).repeat(count, 1, 1)
    pose[:, 0, 0], pose[:, 2, 2] = angle.cos(), angle.cos()
    pose[:, 0, 2], pose[:, 2, 0] = angle.sin(), -angle.sin()
    pose[:, :3, 3] = torch.stack((angle, 0.1 * angle, -angle), dim=-1)
    side = float(scale.image)
    intrinsics = torch.tensor([side, side, side / 2, side / 2]).expand(count, 4)
    return image, pose[None].to(device), intrinsics[None].to(device)


Job = tuple[nn.Module, Callable[[nn.Module, int], Tensor]]
"""A model in training mode, and a loss of it at the first, second ... size of what it reads."""


def language_job(rung: str, scale: ModelScale, device: torch.device) -> Job:
    """The language model; its second size is a shorter sequence."""
    ids = text(scale, device)

    def loss(model: nn.Module, size: int) -> Tensor:
        part = ids[:, : ids.shape[1] - 3 * size]
        found: Tensor = model(input_ids=part, labels=part).loss
        return found

    return language(scale, device, rung).train(), loss


def vittt_job(scale: ModelScale, device: torch.device) -> Job:
    """ViTTT; its second size is a larger picture."""
    from kvbind.models.vittt import Vittt

    torch.manual_seed(0)
    model = Vittt(embed_dim=scale.width, depth=scale.layers, num_heads=2, patch_size=scale.image // 8, num_classes=10)
    target = torch.tensor([1, 2], device=device)

    def loss(model: nn.Module, size: int) -> Tensor:
        return nn.functional.cross_entropy(model(pictures(scale, device, 2, 2 + size)), target)

    return model.to(device).train(), loss


def views_job(scale: ModelScale, device: torch.device) -> Job:
    """View synthesis; its second size has a view more."""
    from kvbind.models.lact_nvs import LactNvs, LactNvsConfig

    torch.manual_seed(0)
    width = scale.width
    model = LactNvs(LactNvsConfig(dim=width, layers=scale.layers, head_dim=width // 2, fast_head_dim=width // 2))
    for layer in model.mixers:
        layer.inner = precise(layer.inner)

    def loss(model: nn.Module, size: int) -> Tensor:
        image, poses, intrinsics = views(scale, device, 3 + size)
        rendered: Tensor = model(image, poses, intrinsics, poses[:, :2], intrinsics[:, :2])
        return (rendered - image[:, :2]).square().mean()

    return model.to(device).train(), loss
