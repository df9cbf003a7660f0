"""ViTTT for transformers: its configuration, and the classifier that `AutoModelForImageClassification` loads."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from kvbind.inner.spec import InnerLoop
from kvbind.inner.systems import vittt
from kvbind.inner.value import check_bool, check_choice
from kvbind.layers.vittt import INIT_STD
from kvbind.models.ablations import images_ablation
from kvbind.models.auto import WithImports
from kvbind.models.options import NOT_FOR_US, Refusals, check_labels, check_options, inherited_fields, known_by_name
from kvbind.models.saving import FromFolder
from kvbind.models.vittt.blocks import init_weights
from kvbind.models.vittt.hierarchical import HierarchicalVittt
from kvbind.models.vittt.image_model import ImageModel
from kvbind.models.vittt.plain import Vittt
from kvbind.models.vittt.released_fields import read_released_config

PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")
"""What a classifier's labels may be, as transformers calls it."""

REFUSED: Refusals = {
    **NOT_FOR_US,
    "attn_implementation": ((None, "eager"), "it has no softmax attention"),
    "tie_word_embeddings": ((False, None), "it has no embeddings of words"),
}
"""Options of transformers that the model has no use for."""


class VitttConfig(WithImports, PretrainedConfig):
    """Configuration of `VitttForImageClassification`; the defaults are the tiny plain model.

    Widths, depths and heads given as one number each mean the plain model, as sequences the hierarchical one.

    Args:
        embed_dim: width, or the width of each stage.
        depth: blocks, or those of each stage.
        num_heads: heads of the fast weights, or those of each stage.
        patch_size: side of a patch in pixels, or (height, width); the hierarchical model has none but 4.
        img_size: the size trained at, in pixels; nothing is limited to it.
        in_chans: channels of the images.
        inner: inner loop of the heads, or its plain dict; read back as an `InnerLoop`, stored as plain data.
        inner_conv: inner loop of the convolution, likewise.
        mlp_ratio: hidden width of the MLPs over the width.
        qkv_bias: a bias in the `qkv` projections.
        drop_rate: dropout in the MLPs.
        drop_path_rate: stochastic depth of the last block.
        initializer_range: standard deviation of linear layers and fast weights at the start.
        fast_weights: False for a plain vision transformer of these sizes, as a baseline (`Vittt`); not of the hierarchical
            model.
        **kwargs: fields of transformers' `PretrainedConfig`, such as `num_labels` (also as `num_classes`), `id2label`,
            `label2id` and `problem_type`.

    Raises:
        ValueError: a mixture of numbers and sequences, an inner loop that does not fit, an unknown field that is set, or an
            option of transformers that the model has no use for.
        TypeError: an inner loop that is neither an InnerLoop nor a dict.
    """

    model_type = "vittt"
    auto_home = "kvbind.models.vittt"
    attribute_map = {  # noqa: RUF012
        "num_classes": "num_labels",
        "image_size": "img_size",
        "num_channels": "in_chans",
        "hidden_size": "embed_dim",
        "num_hidden_layers": "depth",
        "num_attention_heads": "num_heads",
    }

    def __init__(
        self,
        embed_dim: int | Sequence[int] = 192,
        depth: int | Sequence[int] = 12,
        num_heads: int | Sequence[int] = 6,
        patch_size: int | Sequence[int] = 16,
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        inner: InnerLoop | dict[str, Any] | None = None,
        inner_conv: InnerLoop | dict[str, Any] | None = None,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        initializer_range: float = INIT_STD,
        fast_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        if len({isinstance(value, int) for value in (embed_dim, depth, num_heads)}) > 1:
            raise ValueError(
                "embed_dim, depth and num_heads must be numbers (plain) or sequences with one entry per stage "
                f"(hierarchical), all three alike; got {embed_dim!r}, {depth!r} and {num_heads!r}"
            )
        self.embed_dim, self.depth, self.num_heads = embed_dim, depth, num_heads
        self.patch_size, self.img_size, self.in_chans = patch_size, img_size, in_chans
        self.inner = vittt() if inner is None else inner
        self.inner_conv = vittt("conv") if inner_conv is None else inner_conv
        self.mlp_ratio, self.qkv_bias = mlp_ratio, qkv_bias
        self.drop_rate, self.drop_path_rate = drop_rate, drop_path_rate
        self.initializer_range = initializer_range
        check_bool("fast_weights", fast_weights)
        self.fast_weights = fast_weights
        if self.hierarchical and not fast_weights:
            raise ValueError("fast_weights must be True in the hierarchical model; got False")
        if kwargs.get("problem_type") is not None:
            check_choice("problem_type", kwargs["problem_type"], PROBLEMS)
        if kwargs.get("problem_type") == PROBLEMS[1] and 1 in (kwargs.get("num_labels"), kwargs.get("num_classes")):
            raise ValueError(f"problem_type must not be {PROBLEMS[1]!r} with one label, as there is nothing to choose from")
        own = inspect.signature(VitttConfig.__init__).parameters
        check_labels(kwargs)
        mapped = {name: kwargs.pop(name) for name in self.attribute_map if name in kwargs}
        super().__init__(**mapped, **inherited_fields("VitttConfig", kwargs, REFUSED, (*own, *self.attribute_map)))

    @property
    def inner(self) -> InnerLoop:
        """The inner loop of every layer's heads."""
        return self._inner

    @inner.setter
    def inner(self, inner: InnerLoop | dict[str, Any]) -> None:
        self._inner = _inner_loop("inner", inner)

    @property
    def inner_conv(self) -> InnerLoop:
        """The inner loop of every layer's convolution."""
        return self._inner_conv

    @inner_conv.setter
    def inner_conv(self, inner: InnerLoop | dict[str, Any]) -> None:
        self._inner_conv = _inner_loop("inner_conv", inner)

    @property
    def hierarchical(self) -> bool:
        """Whether this is the model of several stages."""
        return not isinstance(self.embed_dim, int)

    def to_dict(self) -> dict[str, Any]:
        """As plain data, the inner loops included."""
        fields: dict[str, Any] = super().to_dict()
        for name in ("_inner", "_inner_conv"):
            fields.pop(name, None)
        return {**fields, "inner": self.inner.to_dict(), "inner_conv": self.inner_conv.to_dict()}

    @classmethod
    def from_released_config(cls, fields: dict[str, Any]) -> Self:
        """The configuration that a released one stands for.

        Args:
            fields: as `kvbind.models.vittt.from_released_config` takes them.

        Raises:
            ValueError: a field that is missing or has another value than released models have.
        """
        hierarchical, arguments = read_released_config(fields)
        inner, inner_conv = images_ablation(fields.get("ttt_loss_type", "dot_product"))
        if hierarchical:
            arguments["embed_dim"], arguments["depth"] = arguments.pop("dim"), arguments.pop("depths")
        arguments |= {name: fields[name] for name in ("img_size",) if name in fields}
        arguments["num_labels"] = arguments.pop("num_classes", 1000)
        return cls(**arguments, inner=inner, inner_conv=inner_conv)

    def build(self) -> ImageModel:
        """The model that this configures, with random weights and `num_labels` classes."""
        common: dict[str, Any] = {
            "num_classes": self.num_labels,
            "in_chans": self.in_chans,
            "inner": self.inner,
            "inner_conv": self.inner_conv,
            "mlp_ratio": self.mlp_ratio,
            "qkv_bias": self.qkv_bias,
            "drop_rate": self.drop_rate,
            "drop_path_rate": self.drop_path_rate,
            "initializer_range": self.initializer_range,
        }
        if self.hierarchical:
            return HierarchicalVittt(self.embed_dim, self.depth, self.num_heads, **common)  # type: ignore[arg-type]
        common["fast_weights"] = self.fast_weights
        return Vittt(self.embed_dim, self.depth, self.num_heads, self.patch_size, **common)  # type: ignore[arg-type]


def _inner_loop(argument: str, inner: InnerLoop | dict[str, Any]) -> InnerLoop:
    if isinstance(inner, dict):
        inner = InnerLoop.from_dict(inner)
    if not isinstance(inner, InnerLoop):
        raise TypeError(f"{argument} must be a kvbind.InnerLoop or its dict; got {type(inner).__name__}")
    return inner


def _problem(config: VitttConfig) -> str | None:
    """The configuration's `problem_type`, or the one that its number of labels says: "regression" for one alone.

    Raises:
        ValueError: an unknown one.
    """
    problem = config.problem_type
    if problem is None:
        return "regression" if config.num_labels == 1 else None
    check_choice("problem_type", problem, PROBLEMS)
    return problem


class VitttForImageClassification(FromFolder, PreTrainedModel):
    """A ViTTT model as transformers expects one; the model itself is the attribute `vittt`.

    Args:
        config: the configuration.
    """

    config: VitttConfig
    config_class = VitttConfig
    base_model_prefix = "vittt"
    main_input_name = "pixel_values"
    input_modalities = ["image"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _no_split_modules = ["VitttBlock"]  # noqa: RUF012

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        known_by_name(MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, cls)

    def __init__(self, config: VitttConfig) -> None:
        check_options(config, REFUSED)
        super().__init__(config)
        # transformers would tell it from the name of the class, which may be derived from this
        self.loss_type = "ForImageClassification"
        self.vittt = config.build()
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """What makes tokens of patches: whose output `enable_input_require_grads` lets ask for gradients."""
        return self.vittt.get_submodule("patch_embed")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        init_weights(module, self.config.initializer_range)

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> ImageClassifierOutputWithNoAttention | tuple[Any, ...]:
        """Classify images.

        Args:
            pixel_values: `[B, C, H, W]`.
            labels: what `config.problem_type` asks for. "single_label_classification": `[B]` class indices, or
                `[B, num_labels]` class probabilities, for the cross-entropy. "multi_label_classification": `[B, num_labels]`
                of 0 to 1, for the binary cross-entropy. "regression": `[B, num_labels]`, or `[B]` of one, for the mean
                squared error. None is regression with one label, and else, unlike in transformers, which takes probabilities
                for several labels at once, classification.
            output_hidden_states: also return each layer's (or stage's) tokens as images `[B, d, h, w]`; by default as the
                configuration says.
            return_dict: False for a tuple; by default as the configuration says.

        Returns:
            `loss` (float32 or wider), `logits` `[B, num_labels]`, `hidden_states`.

        Raises:
            ValueError: images or labels of another shape.
        """
        self.vittt.check_image(pixel_values, "pixel_values")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        every: tuple[Tensor, ...] | None = None
        if output_hidden_states:
            logits, every = self.vittt(pixel_values, return_layers=True)
        else:
            logits = self.vittt(pixel_values)
        loss = None
        if labels is not None and getattr(self, "_loss_function", None) is not None:
            loss = self.loss_function(labels, logits, self.config)
        elif labels is not None:
            loss = self._loss(logits, labels.to(logits.device))
        output = ImageClassifierOutputWithNoAttention(loss=loss, logits=logits, hidden_states=every)
        return output.to_tuple() if (self.config.return_dict if return_dict is None else return_dict) is False else output

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        wide, problem = logits.to(torch.promote_types(logits.dtype, torch.float32)), _problem(self.config)
        numbers = problem in ("regression", "multi_label_classification")
        shapes = [logits.shape[:1], logits.shape] if not numbers or logits.shape[-1] == 1 else [logits.shape]
        if labels.shape not in shapes or not self.config.num_labels:
            wanted = " or ".join(str(list(shape)) for shape in shapes) if self.config.num_labels else "None without classes"
            raise ValueError(f"labels must be {wanted} for {problem or 'classification'}; got shape {list(labels.shape)}")
        if not numbers:
            return F.cross_entropy(wide, labels.to(wide.dtype) if labels.dim() == 2 else labels)
        labels = labels.reshape(logits.shape).to(wide.dtype)
        return F.mse_loss(wide, labels) if problem == "regression" else F.binary_cross_entropy_with_logits(wide, labels)


known_by_name(MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, VitttForImageClassification)
