"""The perceptual loss LPIPS (arXiv 1801.03924), where its package is installed."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def open_lpips() -> nn.Module:
    """LPIPS over VGG features, frozen.

    Raises:
        ImportError: the package `lpips` is not installed.
    """
    try:
        import lpips
    except ImportError as error:
        raise ImportError(
            "loss.perceptual above 0 needs the packages 'lpips' and 'torchvision', of which one is not installed"
        ) from error
    network: nn.Module = lpips.LPIPS(net="vgg", verbose=False).eval()
    return network.requires_grad_(False)


def perceptual_loss(network: Any, predicted: Tensor, true: Tensor) -> Tensor:
    """Its mean over images `[N, 3, h, w]`, RGB in [0, 1]."""
    loss: Tensor = network(predicted, true, normalize=True).mean()
    return loss
