"""The plain ViTTT: a vision transformer of one resolution."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from kvbind.inner.spec import InnerLoop
from kvbind.inner.value import check_bool, check_positive_int
from kvbind.layers.attention.modules import grid_positions
from kvbind.layers.grid import Grid, to_tokens
from kvbind.layers.plain_modules import WEIGHTS, is_plain
from kvbind.layers.vittt import INIT_STD
from kvbind.models.vittt.blocks import drop_path_rates, vittt_blocks
from kvbind.models.vittt.image_model import ImageModel, height_and_width


class PatchEmbed(nn.Module):
    """Non-overlapping patches, projected: `[B, C, H, W]` to an image of tokens `[B, d, H / p, W / p]`.

    Args:
        patch: height and width of a patch, in pixels.
        in_chans: channels of the images.
        dim: width d.
    """

    def __init__(self, patch: tuple[int, int], in_chans: int, dim: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(in_chans, dim, patch, patch)

    def forward(self, image: Tensor) -> Tensor:
        """Project the patches.

        Raises:
            ValueError: a side that is no multiple of the patch's.
        """
        for name, side, patch in zip(("height", "width"), image.shape[-2:], self.patch, strict=True):
            if side % patch or not side:
                raise ValueError(f"image's {name} must be a multiple of the patch's, {patch}; got {side}")
        if not self._is_a_product():
            output: Tensor = self.proj(image)
            return output
        # several times as fast as libraries' convolutions with strides
        height, width = self.patch
        patches = image.unflatten(3, (-1, width)).unflatten(2, (-1, height)).permute(0, 2, 4, 1, 3, 5)
        return F.linear(patches.flatten(3), self.proj.weight.flatten(1), self.proj.bias).permute(0, 3, 1, 2)

    def _is_a_product(self) -> bool:
        """Whether the projection is still of patches that do not overlap, and nothing else."""
        proj = self.proj
        if (
            not is_plain(proj, nn.Conv2d)
            or type(proj.weight) not in WEIGHTS
            or type(proj.bias) not in (*WEIGHTS, type(None))
        ):
            return False
        shape = (proj.kernel_size, proj.stride, proj.padding, proj.dilation, proj.groups)
        return shape == (self.patch, self.patch, (0, 0), (1, 1), 1)


class Vittt(ImageModel):
    """Plain ViTTT: a vision transformer whose attention is two fast networks (arXiv 2512.01643).

    Images of any size, square or not, that the patches tile. Nothing in it knows positions but its convolutions, so one
    model runs at every size. Parameters have the released names (specification, section 6).

    Args:
        embed_dim: width d.
        depth: blocks.
        num_heads: heads of the fast weights in each.
        patch_size: height and width of a patch in pixels, or one number for both.
        num_classes: classes; 0 for no head.
        in_chans: channels of the images.
        inner: inner loop of the heads; by default `kvbind.systems.vittt()`.
        inner_conv: inner loop of the convolution; by default `kvbind.systems.vittt("conv")`.
        mlp_ratio: hidden width of the MLPs over d.
        qkv_bias: a bias in the `qkv` projections.
        drop_rate: dropout in the MLPs.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 at the first.
        global_pool: "avg", or "" for none.
        initializer_range: standard deviation of linear layers and fast weights at the start.
        fast_weights: False for a plain vision transformer of these sizes, as a baseline: softmax attention, and fixed
            positions on the grid in place of the convolutions (arXiv 2205.01580).

    Raises:
        ValueError: numbers that do not fit together, or an inner loop that the layers cannot run.
        TypeError: `inner` or `inner_conv` is no InnerLoop.
    """

    def __init__(
        self,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 6,
        patch_size: int | Sequence[int] = 16,
        num_classes: int = 1000,
        in_chans: int = 3,
        inner: InnerLoop | None = None,
        inner_conv: InnerLoop | None = None,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
        initializer_range: float = INIT_STD,
        fast_weights: bool = True,
    ) -> None:
        super().__init__(embed_dim, num_classes, in_chans, global_pool, initializer_range)
        check_positive_int("depth", depth)
        check_bool("fast_weights", fast_weights)
        if not fast_weights and embed_dim % 4:
            raise ValueError(f"embed_dim must be a multiple of 4 with fast_weights=False; got {embed_dim}")
        self.embed_dim, self.fast_weights = embed_dim, fast_weights
        self.patch_embed = PatchEmbed(height_and_width("patch_size", patch_size), in_chans, embed_dim)
        self.blocks = vittt_blocks(
            drop_path_rates(drop_path_rate, depth), embed_dim, num_heads, inner, inner_conv, mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias, drop_rate=drop_rate, norm_eps=1e-6, mlp_convolution=False, fast_weights=fast_weights,
        )  # fmt: skip
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self._finish()

    @property
    def depth(self) -> int:
        return len(self.blocks)

    @property
    def patch(self) -> tuple[int, int]:
        return self.patch_embed.patch

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        reduction = max(self.patch)
        return [{"num_chs": self.embed_dim, "reduction": reduction, "module": f"blocks.{i}"} for i in range(self.depth)]

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": r"^patch_embed", "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}

    def _cut(self, count: int) -> None:
        self.blocks = self.blocks[:count]

    def _check_tiles(self, size: tuple[int, int]) -> None:
        for name, side, patch in zip(("height", "width"), size, self.patch, strict=True):
            if side % patch:
                raise ValueError(f"img_size's {name} must be a multiple of the patch's, {patch}; got {side}")

    def embed(self, image: Tensor) -> tuple[Tensor, Grid]:
        self.check_image(image)
        patches = self.patch_embed(image)
        tokens, grid = to_tokens(patches), tuple(patches.shape[-2:])
        if not self.fast_weights:
            tokens = tokens + grid_positions(grid, self.embed_dim, tokens.device).to(tokens.dtype)
        return tokens, grid

    def layers_of(self, x: Tensor, grid: Grid) -> Iterator[tuple[Tensor, Grid]]:
        for block in self.blocks:
            x = self._run(block, x, grid)
            yield x, grid
