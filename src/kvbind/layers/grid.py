"""Tokens that lie on a grid, and depthwise convolutions of them."""

from __future__ import annotations

from torch import Tensor, nn

from kvbind.kernels.common.devices import runs_on
from kvbind.layers.plain_modules import WEIGHTS, is_plain

Grid = tuple[int, int]
"""Height and width in tokens."""


def to_image(x: Tensor, grid: Grid) -> Tensor:
    """Tokens `[B, T, d]` as an image `[B, d, height, width]`."""
    return x.mT.reshape(x.shape[0], x.shape[2], *grid)


def to_tokens(image: Tensor) -> Tensor:
    """An image `[B, d, height, width]` as tokens `[B, T, d]`, row after row."""
    return image.flatten(2).mT


def add_convolution(x: Tensor, conv: nn.Conv2d, grid: Grid) -> Tensor:
    """`x + conv(x)` of tokens `[B, T, d]`, on a kernel where one takes them.

    Args:
        x: the tokens.
        conv: a convolution that keeps the shape of images; where it is more than that, as under an adapter, it is called.
        grid: height and width.
    """
    if runs_on(x.device) and _is_depthwise(conv, x.shape[-1]):
        from kvbind.kernels.elementwise.depthwise import covers, token_conv

        if covers(x, conv.weight, conv.bias, grid):
            return token_conv(x, conv.weight, conv.bias, grid, add=True)
    return x + to_tokens(conv(to_image(x, grid)))


def _is_depthwise(conv: nn.Module, channels: int) -> bool:
    """Whether a module is a 3x3 convolution of each channel by itself, with zeros around the image, and nothing else."""
    if not is_plain(conv, nn.Conv2d) or type(conv.weight) not in WEIGHTS or type(conv.bias) not in (*WEIGHTS, type(None)):
        return False
    shape = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.padding_mode)
    return shape == ((3, 3), (1, 1), (1, 1), (1, 1), "zeros") and conv.groups == channels == conv.out_channels
