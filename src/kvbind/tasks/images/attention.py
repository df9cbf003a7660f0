"""What the layers of a trained ViTTT attend to: the token-mixing weights of their linear attention, as images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvbind.layers.grid import Grid
from kvbind.layers.vittt import VitttLayer
from kvbind.models.vittt.image_model import ImageModel


@dataclass(frozen=True, eq=False)
class Attention:
    """The weights with which one layer's tokens hold the effective values of all tokens of an image, averaged over heads.

    Attributes:
        layer: its number, from 0.
        grid: height and width of the image in tokens.
        heads: of the heads' network, float32 `[T, T]`: row t belongs to the output of token t.
        conv: of the convolution, likewise.
    """

    layer: int
    grid: Grid
    heads: Tensor
    conv: Tensor

    def of(self, branch: str, token: int) -> Tensor:
        """A token's weights over the image, `[height, width]`; `branch` is "heads" or "conv"."""
        weights: Tensor = getattr(self, branch)[token]
        return weights.reshape(self.grid)


@torch.no_grad()
def effective_attention(model: ImageModel, image: Tensor, layers: Sequence[int]) -> list[Attention]:
    """The linear attention (`kvbind.linearize`) of some layers on one image, with the operands that they have there.

    Args:
        model: a trained model; runs in evaluation mode.
        image: normalized, `[C, H, W]`.
        layers: numbers of fast-weight layers, from 0.

    Raises:
        ValueError: a layer that the model has not.
    """
    mixers = model.mixers
    for layer in layers:
        if not 0 <= layer < len(mixers):
            raise ValueError(f"layers must be from 0 to {len(mixers) - 1}; got {layer}")
    found: dict[int, Attention] = {}

    def look(number: int) -> Any:
        def hook(mixer: VitttLayer, arguments: tuple[Any, ...]) -> None:
            calls = mixer.calls(*arguments)
            # a convolution's channels are heads of their own there
            weights = [call.linearize().matrix()[0].float().mean(0) for call in calls]
            found[number] = Attention(number, arguments[1], *weights)

        return hook

    hooks = [mixers[layer].register_forward_pre_hook(look(layer)) for layer in set(layers)]
    training = model.training
    try:
        model.eval()(image[None])
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return [found[layer] for layer in layers]
