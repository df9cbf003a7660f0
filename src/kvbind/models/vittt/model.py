"""The two ViTTT models, plain and hierarchical, as image classifiers in the manner of timm."""

from __future__ import annotations

import abc
import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kvbind.inner.spec import InnerLoop
from kvbind.inner.value import check_bool, check_choice, check_positive_int
from kvbind.layers.attention import grid_positions
from kvbind.layers.grid import Grid, to_image, to_tokens
from kvbind.layers.vittt import INIT_STD, VitttLayer
from kvbind.models.recompute import check_recomputing
from kvbind.models.vittt.blocks import VitttBlock, init_weights
from kvbind.models.vittt.stages import Stage, TokenBatchNorm, downsampling, stem


class ImageModel(nn.Module, abc.ABC):
    """What both models share: pooling, classifier, intermediate layers, inner loops.

    Attributes:
        num_classes: classes of the head; 0 for none.
        num_features: width of the features that the head reads.
        global_pool: "avg" for the mean over tokens, or "" for none, which classifies every token.
    """

    norm: nn.Module
    head: nn.Module
    pretrained_cfg: dict[str, Any]
    default_cfg: dict[str, Any]

    def __init__(
        self, num_features: int, num_classes: int, in_chans: int, global_pool: str, initializer_range: float
    ) -> None:
        super().__init__()
        check_choice("global_pool", global_pool, ("avg", ""))
        check_positive_int("in_chans", in_chans)
        self.num_features, self.in_chans, self.global_pool = num_features, in_chans, global_pool
        # what timm knows a model by
        self.pretrained_cfg = self.default_cfg = {}
        self.initializer_range = initializer_range
        self.num_classes = _checked_classes(num_classes)
        self.gradient_checkpointing = False
        self.register_load_state_dict_pre_hook(_without_owner)

    @abc.abstractmethod
    def embed(self, image: Tensor) -> tuple[Tensor, Grid]:
        """First tokens `[B, T, d]` of images `[B, C, H, W]`, and their grid."""

    @abc.abstractmethod
    def layers_of(self, x: Tensor, grid: Grid) -> Iterator[tuple[Tensor, Grid]]:
        """Tokens and grid after each layer that `get_intermediate_layers` counts."""

    @property
    @abc.abstractmethod
    def depth(self) -> int:
        """How many layers `get_intermediate_layers` counts."""

    @property
    @abc.abstractmethod
    def feature_info(self) -> list[dict[str, Any]]:
        """What timm asks of each such layer: channels (`num_chs`), pixels to a place (`reduction`) and name (`module`)."""

    @property
    @abc.abstractmethod
    def patch(self) -> tuple[int, int]:
        """Height and width in pixels of what becomes one token first."""

    @abc.abstractmethod
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions by which timm groups parameters, for learning rates that decay from layer to layer.

        Args:
            coarse: a group for each stage in place of each block.
        """

    @abc.abstractmethod
    def _cut(self, count: int) -> None:
        """Keep the first `count` layers."""

    def _finish(self) -> None:
        """The head and the starting parameters, once the rest is built."""
        self.head = nn.Linear(self.num_features, self.num_classes) if self.num_classes else nn.Identity()
        self.apply(partial(init_weights, std=self.initializer_range))

    @property
    def mixers(self) -> tuple[VitttLayer, ...]:
        """The fast-weight layers, first to last."""
        return tuple(module for module in self.modules() if isinstance(module, VitttLayer))

    @property
    def inner(self) -> InnerLoop:
        """The inner loop of the heads, of the first layer; assigning one gives it to every layer."""
        return self.mixers[0].inner

    @inner.setter
    def inner(self, inner: InnerLoop) -> None:
        for mixer in self.mixers:
            mixer.inner = inner

    @property
    def inner_conv(self) -> InnerLoop:
        """The inner loop of the convolution, of the first layer; assigning one gives it to every layer."""
        return self.mixers[0].inner_conv

    @inner_conv.setter
    def inner_conv(self, inner: InnerLoop) -> None:
        for mixer in self.mixers:
            mixer.inner_conv = inner

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass in place of keeping its activations."""
        self.gradient_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Parameters that optimizers usually decay but should not: none, beside the vectors they leave out anyway."""
        return set()

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new, untrained head in place.

        Args:
            num_classes: its classes; 0 for no head, so that the model returns pooled features.
            global_pool: "avg" or ""; None leaves it.

        Raises:
            ValueError: a negative number of classes, or another pooling.
        """
        if global_pool is not None:
            check_choice("global_pool", global_pool, ("avg", ""))
            self.global_pool = global_pool
        self.num_classes = _checked_classes(num_classes)
        if not self.num_classes:
            self.head = nn.Identity()
            return
        like = next(self.parameters())
        self.head = nn.Linear(self.num_features, self.num_classes, device=like.device, dtype=like.dtype)
        init_weights(self.head, self.initializer_range)

    def set_input_size(
        self, img_size: int | Sequence[int] | None = None, patch_size: int | Sequence[int] | None = None
    ) -> None:
        """Say at which size images will come: nothing is made for it, and images of other sizes are still taken.

        Args:
            img_size: pixels, or (height, width); None leaves it.
            patch_size: None, or the model's own, as its weights are of patches of one size.

        Raises:
            ValueError: a size that the patches do not tile, or another size of patches.
        """
        if patch_size is not None and _pair("patch_size", patch_size) != self.patch:
            raise ValueError(f"patch_size must be {self.patch[0]} x {self.patch[1]}, the model's own; got {patch_size}")
        if img_size is None:
            return
        size = _pair("img_size", img_size)
        self._check_tiles(size)
        for known in {id(fields): fields for fields in (self.pretrained_cfg, self.default_cfg)}.values():
            known["input_size"] = (self.in_chans, *size)

    def _check_tiles(self, size: tuple[int, int]) -> None:
        """Refuse a size that patches do not tile."""

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]] | dict[str, Any]:
        """Features of some layers, as timm asks for them.

        Args:
            x: images `[B, C, H, W]`.
            indices: of the last n layers, of the layers at these indices (negative ones from the end), or of all.
            norm: apply the model's last norm, which the hierarchical model can do to its last stage alone.
            stop_early: compute no layer behind the last that is asked for; with `intermediates_only` alone.
            output_fmt: "NCHW" for images `[B, d, h, w]`, "NLC" for tokens `[B, T, d]`.
            intermediates_only: leave out the last features.
            output_dict: as "image_intermediates" and "image_features" of a dict.

        Returns:
            Normed tokens of the last layer `[B, T, d]` and the layers' features; or these alone.

        Raises:
            ValueError: images that do not fit, layers that do not exist, a norm of another width, or another format.
        """
        check_choice("output_fmt", output_fmt, ("NCHW", "NLC"))
        wanted = self._taken(indices)
        if stop_early and not intermediates_only:
            raise ValueError("stop_early must be False without intermediates_only, as the last features need all layers")
        last, found = self._features(x, wanted, norm, max(wanted) + 1 if stop_early else self.depth, output_fmt == "NCHW")
        if intermediates_only:
            return {"image_intermediates": found} if output_dict else found
        final = self._normed(last)
        return {"image_features": final, "image_intermediates": found} if output_dict else (final, found)

    def _features(
        self, image: Tensor, wanted: set[int], norm: bool, stop: int, reshape: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """Tokens of the last of `stop` layers, and the features of those that are wanted."""
        found: list[Tensor] = []
        last = image
        for i, (last, grid) in enumerate(itertools.islice(self.layers_of(*self.embed(image)), stop)):
            if i in wanted:
                tokens = self._normed_layer(i, last) if norm else last
                found.append(to_image(tokens, grid) if reshape else tokens)
        return last, found

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what features of some layers do not need.

        Args:
            indices: as `forward_intermediates` takes them.
            prune_norm: drop the last norm too.
            prune_head: drop the head too.

        Returns:
            The indices of these layers.
        """
        wanted = self._taken(indices)
        self._cut(max(wanted) + 1)
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return sorted(wanted)

    def _taken(self, indices: int | Sequence[int] | None) -> set[int]:
        """The layers that indices name: all for None, of an int the last so many."""
        depth = self.depth
        if indices is None:
            return set(range(depth))
        if isinstance(indices, int):
            if not 1 <= indices <= depth:
                raise ValueError(
                    f"n must be from 1 to {depth}, the number of layers, or a sequence of indices; got {indices}"
                )
            return set(range(depth - indices, depth))
        if not len(indices) or not all(-depth <= i < depth for i in indices):
            raise ValueError(f"n must hold indices from {-depth} to {depth - 1}; got {list(indices)}")
        return {i % depth for i in indices}

    def _normed_layer(self, i: int, x: Tensor) -> Tensor:
        """Layer i's tokens behind the last norm, where they have its width."""
        if x.shape[-1] != self.num_features:
            raise ValueError(
                f"norm must be False for layer {i}, of width {x.shape[-1]}; the norm is of width {self.num_features}"
            )
        return self._normed(x)

    def _run(self, block: nn.Module, *args: Any) -> Tensor:
        if not (self.gradient_checkpointing and self.training):
            return block(*args)
        check_recomputing()
        # transformers puts one here, with the arguments that its user gave
        recomputed = getattr(self, "_gradient_checkpointing_func", None) or partial(checkpoint, use_reentrant=False)
        output: Tensor = recomputed(block, *args)
        return output

    def _check_image(self, image: Tensor) -> None:
        if image.dim() != 4 or image.shape[1] != self.in_chans:
            raise ValueError(f"image must be [B, {self.in_chans}, height, width]; got shape {list(image.shape)}")

    def forward_features(self, image: Tensor) -> Tensor:
        """Normed tokens of the last layer, before pooling.

        Args:
            image: `[B, C, H, W]`.

        Returns:
            `[B, T, d]`.

        Raises:
            ValueError: images that do not fit.
        """
        for x, _ in self.layers_of(*self.embed(image)):
            last = x
        return self._normed(last)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of normed tokens.

        Args:
            x: what `forward_features` returns.
            pre_logits: stop before the classifier.

        Returns:
            `[B, num_classes]`, or `[B, d]` with `pre_logits` or without a head; an axis of tokens stays where nothing pools.
        """
        pooled = x.mean(1) if self.global_pool else x
        return pooled if pre_logits else self.head(pooled)

    def forward(self, image: Tensor, return_layers: bool = False) -> Tensor | tuple[Tensor, tuple[Tensor, ...]]:
        """Classify images.

        Args:
            image: `[B, C, H, W]`.
            return_layers: also return each layer's tokens as images `[B, d, h, w]`.

        Returns:
            Logits `[B, num_classes]`; and, if so, the layers.
        """
        if not return_layers:
            return self.forward_head(self.forward_features(image))
        layers = list(self.layers_of(*self.embed(image)))
        return self.forward_head(self._normed(layers[-1][0])), tuple(to_image(x, grid) for x, grid in layers)

    def get_intermediate_layers(
        self, image: Tensor, n: int | Sequence[int] = 1, reshape: bool = False, norm: bool = False
    ) -> tuple[Tensor, ...]:
        """Features of some layers, first to last: blocks of the plain model, stages of the hierarchical one.

        Args:
            image: `[B, C, H, W]`.
            n: of the last n layers, or of the layers at these indices, negative ones from the end.
            reshape: as images `[B, d, h, w]` in place of tokens `[B, T, d]`.
            norm: apply the model's last norm, which the hierarchical model can do to its last stage alone.

        Raises:
            ValueError: images that do not fit, layers that do not exist, or a norm of another width.
        """
        wanted = self._taken(n)
        return tuple(self._features(image, wanted, norm, max(wanted) + 1, reshape)[1])

    def _normed(self, x: Tensor) -> Tensor:
        normed: Tensor = self.norm(x)
        return normed

    @classmethod
    def from_released_config(cls, fields: dict[str, Any]) -> Self:
        """A model with random weights, built as a released configuration says.

        Args:
            fields: as `kvbind.models.vittt.from_released_config` takes them.

        Raises:
            ValueError: as there; or a configuration of the other model.
        """
        from kvbind.models.vittt.released import from_released_config

        model = from_released_config(fields)
        if not isinstance(model, cls):
            raise ValueError(f"fields must be of a {cls.__name__}; they are of a {type(model).__name__}")
        return model


class PatchEmbed(nn.Module):
    """Non-overlapping patches, projected: `[B, C, H, W]` to an image of tokens `[B, d, H / p, W / p]`.

    Args:
        patch: height and width of a patch, in pixels.
        in_chans: channels of the images.
        dim: width d.
    """

    def __init__(self, patch: tuple[int, int], in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch, patch)

    def forward(self, image: Tensor) -> Tensor:
        """Project the patches.

        Raises:
            ValueError: a side that is no multiple of the patch's.
        """
        for name, side, patch in zip(("height", "width"), image.shape[-2:], self.proj.kernel_size, strict=True):
            if side % patch or not side:
                raise ValueError(f"image's {name} must be a multiple of the patch's, {patch}; got {side}")
        output: Tensor = self.proj(image)
        return output


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
        self.patch_embed = PatchEmbed(_pair("patch_size", patch_size), in_chans, embed_dim)
        self.blocks = nn.ModuleList(
            VitttBlock(
                embed_dim,
                num_heads,
                inner,
                inner_conv,
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                drop_rate=drop_rate,
                drop_path=rate,
                norm_eps=1e-6,
                mlp_convolution=False,
                fast_weights=fast_weights,
            )
            for rate in _drop_path_rates(drop_path_rate, depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self._finish()

    @property
    def depth(self) -> int:
        return len(self.blocks)

    @property
    def patch(self) -> tuple[int, int]:
        height, width = self.patch_embed.proj.kernel_size
        return height, width

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
        self._check_image(image)
        patches = self.patch_embed(image)
        tokens, grid = to_tokens(patches), tuple(patches.shape[-2:])
        if not self.fast_weights:
            tokens = tokens + grid_positions(grid, self.embed_dim, tokens.device).to(tokens.dtype)
        return tokens, grid

    def layers_of(self, x: Tensor, grid: Grid) -> Iterator[tuple[Tensor, Grid]]:
        for block in self.blocks:
            x = self._run(block, x, grid)
            yield x, grid


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
        rates = iter(_drop_path_rates(drop_path_rate, sum(depths)))
        self.layers = nn.ModuleList()
        for i, (width, depth, heads) in enumerate(zip(dim, depths, num_heads, strict=True)):
            blocks = nn.ModuleList(
                VitttBlock(
                    width,
                    heads,
                    inner,
                    inner_conv,
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    drop_rate=drop_rate,
                    drop_path=next(rates),
                    norm_eps=1e-5,
                    mlp_convolution=True,
                )
                for _ in range(depth)
            )
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
        self._check_image(image)
        tokens = self.patch_embed(image)
        return self.pos_drop(to_tokens(tokens)), tuple(tokens.shape[-2:])

    def layers_of(self, x: Tensor, grid: Grid) -> Iterator[tuple[Tensor, Grid]]:
        for stage in self.layers:
            mixed, image = stage(x, grid, self._run)
            yield mixed, grid
            if image is not None:
                x, grid = to_tokens(image), tuple(image.shape[-2:])


def _without_owner(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """A trained `VitttForImageClassification` has this model as its part `vittt`; its weights load here too."""
    owner = "vittt."
    if not prefix and state_dict and all(name.startswith(owner) for name in state_dict):
        for name in list(state_dict):
            state_dict[name.removeprefix(owner)] = state_dict.pop(name)


def _checked_classes(num_classes: int) -> int:
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 0:
        raise ValueError(f"num_classes must be an int of at least 0; got {num_classes!r}")
    return num_classes


def _pair(argument: str, value: int | Sequence[int]) -> tuple[int, int]:
    """Height and width of one number or two."""
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2:
        raise ValueError(f"{argument} must be a number or (height, width); got {value!r}")
    for side in pair:
        check_positive_int(argument, side)
    return pair


def _drop_path_rates(last: float, depth: int) -> list[float]:
    rates: list[float] = torch.linspace(0, last, depth, device="cpu").tolist()
    return rates
