"""The hierarchical ViTTT: a convolutional stem and stages of halving resolution."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from kvbind.inner.spec import InnerLoop
from kvbind.inner.value import check_positive_int
from kvbind.layers.grid import Grid, to_tokens
from kvbind.layers.vittt import INIT_STD
from kvbind.models.vittt.blocks import drop_path_rates, vittt_blocks
from kvbind.models.vittt.image_model import ImageModel
from kvbind.models.vittt.stages import Stage, TokenBatchNorm, downsampling, stem


class HierarchicalVittt(ImageModel):
    """Hierarchical ViTTT: a convolutional stem and four stages, each at half the resolution of the one before.

    Its blocks have rotary positions on the grid, computed for whatever size comes, and a convolution in the MLP. Images of
    any size; the stem takes 4x4 pixels to a token, and sides round up. Parameters have the released names.

    Source: arXiv 2512.01643.

    Args:
        dim: width of each stage, a multiple of 4.
        depths: blocks of each stage.
        num_heads: heads of each stage's fast weights.
        num_classes: classes; 0 for no head.
        in_chans: channels of the images.
        inner: inner loop of the heads; by default `kvbind.systems.vittt()`.
        inner_conv: inner loop of the convolution; by default `kvbind.systems.vittt("conv")`.
        mlp_ratio: hidden width of the MLPs over the stage's.
        qkv_bias: a bias in the `qkv` projections.
        drop_rate: dropout in the MLPs and behind the stem.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 at the first.
        global_pool: "avg", or "" for none.
        initializer_range: standard deviation of linear layers and fast weights at the start.

    Raises:
        ValueError: numbers that do not fit together, or an inner loop that the layers cannot run.
        TypeError: `inner` or `inner_conv` is no InnerLoop.
    """

    hierarchical: ClassVar[bool] = True

    def __init__(
        self,
        dim: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (1, 3, 9, 4),
        num_heads: Sequence[int] = (2, 4, 10, 16),
        num_classes: int = 1000,
        in_chans: int = 3,
        inner: InnerLoop | None = None,
        inner_conv: InnerLoop | None = None,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        global_pool: str = "avg",
        initializer_range: float = INIT_STD,
    ) -> None:
        if not len(dim) == len(depths) == len(num_heads) or not len(dim):
            raise ValueError(
                f"dim, depths and num_heads must have one entry per stage; got {list(dim)}, {list(depths)} and "
                f"{list(num_heads)}"
            )
        super().__init__(dim[-1], num_classes, in_chans, global_pool, initializer_range)
        for name, values in (("dim", dim), ("depths", depths)):
            for value in values:
                check_positive_int(f"{name}'s entries", value)
        for width in dim:
            if width % 4:
                raise ValueError(f"dim's entries must be multiples of 4, for rotary positions; got {list(dim)}")
        self.dim = tuple(dim)
        self.patch_embed = stem(in_chans, dim[0])
        self.pos_drop = nn.Dropout(drop_rate)
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        self.layers = nn.ModuleList()
        for i, (width, depth, heads) in enumerate(zip(dim, depths, num_heads, strict=True)):
            blocks = vittt_blocks(
                itertools.islice(rates, depth), width, heads, inner, inner_conv, mlp_ratio=mlp_ratio, qkv_bias=qkv_bias,
                drop_rate=drop_rate, norm_eps=1e-5, mlp_convolution=True,
            )  # fmt: skip
            self.layers.append(Stage(blocks, downsampling(width, dim[i + 1]) if i + 1 < len(dim) else None))
        self.norm = TokenBatchNorm(dim[-1])
        self._finish()

    @property
    def depth(self) -> int:
        return len(self.layers)

    @property
    def patch(self) -> tuple[int, int]:
        return 4, 4

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        widths = enumerate(self.dim[: self.depth])
        return [{"num_chs": width, "reduction": 4 * 2**i, "module": f"layers.{i}"} for i, width in widths]

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks = [(r"^layers\.(\d+)\.downsample", (0,)), (r"^layers\.(\d+)\.blocks\.(\d+)", None)]
        stages = [(r"^layers\.(\d+)", None)]
        return {"stem": r"^patch_embed", "blocks": [*(stages if coarse else blocks), (r"^norm", (99999,))]}

    def _cut(self, count: int) -> None:
        self.layers = self.layers[:count]
        # nothing follows
        setattr(self.layers[-1], "downsample", None)  # noqa: B010  torch types attributes of modules as tensors

    def embed(self, image: Tensor) -> tuple[Tensor, Grid]:
        self.check_image(image)
        tokens = self.patch_embed(image)
        return self.pos_drop(to_tokens(tokens)), tuple(tokens.shape[-2:])

    def layers_of(self, x: Tensor, grid: Grid) -> Iterator[tuple[Tensor, Grid]]:
        for stage in self.layers:
            mixed, image = stage(x, grid, self._run)
            yield mixed, grid
            if image is not None:
                x, grid = to_tokens(image), tuple(image.shape[-2:])
