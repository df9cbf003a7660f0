"""What the hierarchical ViTTT has beyond the plain one: convolutions between resolutions, and the stages between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from kvbind.layers.grid import Grid, to_image
from kvbind.layers.vittt import rotary_angles


class ConvUnit(nn.Module):
    """A convolution, then, where asked for, batch norm and ReLU.

    Args:
        inputs: input channels.
        outputs: output channels.
        kernel: side of the kernel, which is padded to keep the size.
        stride: of the convolution.
        groups: of the convolution.
        bias: of the convolution.
        norm: batch norm.
        act: ReLU.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        *,
        stride: int = 1,
        groups: int = 1,
        bias: bool = True,
        norm: bool = False,
        act: bool = True,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=bias)
        self.norm = nn.BatchNorm2d(outputs) if norm else None
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """`[B, inputs, H, W]` to `[B, outputs, ceil(H / stride), ceil(W / stride)]`."""
        x = self.conv(x)
        if self.norm is not None:
            x = self.norm(x)
        return F.relu(x) if self.act else x


class Convs(nn.Module):
    """Convolutions in a row, under the released name `conv`.

    Args:
        *units: the convolutions.
    """

    def __init__(self, *units: ConvUnit) -> None:
        super().__init__()
        self.conv = nn.Sequential(*units)

    def forward(self, image: Tensor) -> Tensor:
        """All of them, on an image `[B, C, H, W]`."""
        output: Tensor = self.conv(image)
        return output


def stem(in_chans: int, dim: int) -> Convs:
    """From pixels to tokens at a quarter of the resolution."""
    half = dim // 2
    return Convs(
        ConvUnit(in_chans, half, 3, stride=2, bias=False, norm=True),
        ConvUnit(half, half, 3, bias=False, norm=True),
        ConvUnit(half, half, 3, bias=False, norm=True),
        ConvUnit(half, 4 * dim, 3, stride=2, bias=False, norm=True),
        ConvUnit(4 * dim, dim, 1, bias=False, norm=True, act=False),
    )


def downsampling(inputs: int, outputs: int) -> Convs:
    """Half the resolution, another width."""
    hidden = 4 * outputs
    return Convs(
        ConvUnit(inputs, hidden, 1),
        ConvUnit(hidden, hidden, 3, stride=2, groups=hidden),
        ConvUnit(hidden, outputs, 1, norm=True, act=False),
    )


class TokenBatchNorm(nn.BatchNorm1d):
    """Batch norm of the channels of tokens `[B, T, d]`."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mT).mT


class Stage(nn.Module):
    """Blocks at one resolution, and the downsampling behind them.

    Args:
        blocks: the blocks.
        downsample: what leads to the next stage, or None.
    """

    def __init__(self, blocks: nn.ModuleList, downsample: Convs | None) -> None:
        super().__init__()
        self.blocks, self.downsample = blocks, downsample
        self.register_load_state_dict_pre_hook(_drop_rotations)

    def forward(self, x: Tensor, grid: Grid, run: Callable[..., Tensor]) -> tuple[Tensor, Tensor | None]:
        """On tokens `[B, T, d]`.

        Args:
            x: the tokens.
            grid: their height and width.
            run: calls a block with its arguments, as the model has it: kept or recomputed.

        Returns:
            The tokens behind the blocks, and the next stage's image, or None behind the last.
        """
        rotary = rotary_angles(grid, x.shape[-1], x.device)
        for block in self.blocks:
            x = run(block, x, grid, rotary)
        return x, None if self.downsample is None else self.downsample(to_image(x, grid))


def _drop_rotations(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Released checkpoints hold the tables of rotary positions for one image size, which we compute for any."""
    for name in [name for name in state_dict if name.startswith(prefix) and name.endswith(".rope.rotations")]:
        del state_dict[name]
