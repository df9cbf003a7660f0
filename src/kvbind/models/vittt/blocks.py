"""What both ViTTT models are made of: stochastic depth, the transformer block, and how parameters start."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvbind.inner.spec import InnerLoop
from kvbind.layers.attention.modules import FullAttention
from kvbind.layers.grid import Grid, add_convolution
from kvbind.layers.norm import add_layer_norm
from kvbind.layers.vittt import INIT_STD, VitttLayer


class StochasticDepth(nn.Module):
    """Drops a branch of the residual stream for some images while training, and scales the others up (arXiv 1603.09382).

    Args:
        rate: the probability of dropping, from 0 up to but not including 1.

    Raises:
        ValueError: a rate outside that range.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"rate must be at least 0 and below 1; got {rate}")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """`[B, ...]`, each of the B entries zeroed or divided by `1 - rate`."""
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        kept = torch.empty(x.shape[0], *(1,) * (x.dim() - 1), dtype=x.dtype, device=x.device).bernoulli_(keep)
        return x * kept / keep

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{self.rate:.3g}"


class VitttMlp(nn.Module):
    """`fc2(gelu(fc1(x)))`, with an optional depthwise 3x3 convolution on the hidden channels.

    Args:
        dim: input and output width.
        hidden: hidden width.
        drop_rate: dropout after each linear layer.
        convolution: `h + dwc(h)` on the hidden image, with a second GELU behind it (the hierarchical model).
    """

    def __init__(self, dim: int, hidden: int, drop_rate: float = 0.0, convolution: bool = False) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwc = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden) if convolution else None
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """`[B, T, d]` to the same shape."""
        h = self.drop(F.gelu(self.fc1(x)))
        if self.dwc is not None:
            h = F.gelu(add_convolution(h, self.dwc, grid))
        output: Tensor = self.drop(self.fc2(h))
        return output


class VitttBlock(nn.Module):
    """`x + cpe(x)`, then `x + attn(norm1(x))`, then `x + mlp(norm2(x))`.

    `cpe` is a depthwise 3x3 convolution, the model's only source of positions where no rotary angles are given.

    Args:
        dim: width d.
        heads: heads of the fast weights.
        inner: inner loop of the heads.
        inner_conv: inner loop of the convolution's head.
        mlp_ratio: hidden width of the MLP over d.
        qkv_bias: a bias in the `qkv` projection.
        drop_rate: dropout in the MLP.
        drop_path: rate of stochastic depth on both residual branches.
        norm_eps: of the LayerNorms.
        mlp_convolution: a depthwise convolution inside the MLP.
        fast_weights: False for the block of a plain vision transformer: softmax attention in their place, and no `cpe`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        inner: InnerLoop | None,
        inner_conv: InnerLoop | None,
        *,
        mlp_ratio: float,
        qkv_bias: bool,
        drop_rate: float,
        drop_path: float,
        norm_eps: float,
        mlp_convolution: bool,
        fast_weights: bool = True,
    ) -> None:
        super().__init__()
        self.cpe = nn.Conv2d(dim, dim, 3, padding=1, groups=dim) if fast_weights else None
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn: VitttLayer | FullAttention = (
            VitttLayer(dim, heads, inner, inner_conv, qkv_bias=qkv_bias)
            if fast_weights
            else FullAttention(dim, dim // heads, bias=qkv_bias, qk_norm=False)
        )
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = VitttMlp(dim, int(dim * mlp_ratio), drop_rate, mlp_convolution)
        self.drop_path = StochasticDepth(drop_path)

    def forward(self, x: Tensor, grid: Grid, rotary: Tensor | None = None) -> Tensor:
        """`[B, T, d]` to the same shape; `grid` and `rotary` as `VitttLayer.forward` takes them."""
        x, h = add_layer_norm(x if self.cpe is None else add_convolution(x, self.cpe, grid), None, self.norm1)
        mixed = self.attn(h)[0] if isinstance(self.attn, FullAttention) else self.attn(h, grid, rotary)
        x, h = add_layer_norm(x, self.drop_path(mixed), self.norm2)
        return x + self.drop_path(self.mlp(h, grid))


def init_weights(module: nn.Module, std: float = INIT_STD) -> None:
    """Draw one module's own parameters anew.

    Linear layers and fast weights are truncated normal, norms start at one, convolutions as PyTorch has it.

    Args:
        module: whose parameters.
        std: standard deviation of linear layers and fast weights.
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, VitttLayer):
        module.reset_parameters(std)
    elif isinstance(module, nn.LayerNorm | nn.Conv2d | nn.BatchNorm1d | nn.BatchNorm2d):
        module.reset_parameters()


def drop_path_rates(last: float, depth: int) -> list[float]:
    """Rates of stochastic depth that grow linearly from 0 at the first of `depth` blocks to `last`."""
    rates: list[float] = torch.linspace(0, last, depth, device="cpu").tolist()
    return rates


def vittt_blocks(
    rates: Iterable[float], dim: int, heads: int, inner: InnerLoop | None, inner_conv: InnerLoop | None, **options: Any
) -> nn.ModuleList:
    """Blocks of one width, one for each rate of stochastic depth.

    Args:
        rates: `drop_path` of each.
        dim: channels of tokens.
        heads: of the first branch.
        inner: the inner loop of its heads, or None for the published one.
        inner_conv: that of the convolution branch, or None for the published one.
        **options: the other arguments of `VitttBlock`.
    """
    return nn.ModuleList(VitttBlock(dim, heads, inner, inner_conv, drop_path=rate, **options) for rate in rates)
