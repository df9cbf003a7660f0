"""What both ViTTT models share: an image classifier in the manner of timm, around layers that subclasses build."""

from __future__ import annotations

import abc
import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, ClassVar, Self

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kvbind.inner.spec import InnerLoop
from kvbind.inner.value import check_choice, check_positive_int
from kvbind.layers.grid import Grid, to_image
from kvbind.layers.vittt import VitttLayer
from kvbind.models.ablations import images_ablation
from kvbind.models.recompute import check_recomputing
from kvbind.models.vittt.blocks import init_weights
from kvbind.models.vittt.released_fields import read_released_config


class ImageModel(nn.Module, abc.ABC):
    """What both models share: pooling, classifier, intermediate layers, inner loops.

    Attributes:
        num_classes: classes of the head; 0 for none.
        num_features: width of the features that the head reads.
        global_pool: "avg" for the mean over tokens, or "" for none, which classifies every token.
    """

    hierarchical: ClassVar[bool] = False
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
        """The classification head, as timm asks for it."""
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
        if patch_size is not None and height_and_width("patch_size", patch_size) != self.patch:
            raise ValueError(f"patch_size must be {self.patch[0]} x {self.patch[1]}, the model's own; got {patch_size}")
        if img_size is None:
            return
        size = height_and_width("img_size", img_size)
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

    def check_image(self, image: Tensor, argument: str = "image") -> None:
        """Raise `ValueError` for anything but images `[B, C, height, width]`, at least one; `argument` is its name."""
        if image.dim() != 4 or image.shape[1] != self.in_chans or not image.shape[0]:
            shape = f"[B, {self.in_chans}, height, width]"
            raise ValueError(f"{argument} must be {shape} with at least one image; got shape {list(image.shape)}")

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
        hierarchical, arguments = read_released_config(fields)
        inner, inner_conv = images_ablation(fields.get("ttt_loss_type", "dot_product"))
        if hierarchical != cls.hierarchical:
            kind = "hierarchical" if hierarchical else "plain"
            raise ValueError(f"fields must be of a {cls.__name__}; they are of the {kind} model")
        model = cls(**arguments)
        # after building, as released checkpoints hold every matrix, also those that their ablation does not use
        model.inner, model.inner_conv = inner, inner_conv
        return model


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


def height_and_width(argument: str, value: int | Sequence[int]) -> tuple[int, int]:
    """Height and width of one number or two."""
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2:
        raise ValueError(f"{argument} must be a number or (height, width); got {value!r}")
    for side in pair:
        check_positive_int(argument, side)
    return pair
