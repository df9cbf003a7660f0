"""The configuration of a language model whose MLPs are fast weights: the model's own, and what is made of it."""

from __future__ import annotations

import inspect
from typing import Any, Literal, Self

from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from kvbind.forms.evaluate import FORMS, Form
from kvbind.inner.spec import InnerLoop
from kvbind.inner.systems import in_place_ttt
from kvbind.inner.value import check_bool, check_choice, check_positive, check_positive_int
from kvbind.models.auto import WithImports
from kvbind.models.lact.cache import CACHE_NAMES
from kvbind.models.options import NOT_FOR_US, Refusals, inherited_fields

Values = Literal["hidden", "embeddings"]

RELEASED_DEFAULTS: dict[str, Any] = {
    "ttt_mode": True,
    "ttt_layers": [0, 6, 12, 18, 24, 30],
    "ttt_proj": True,
    "ttt_lr": 0.3,
    "ttt_chunk": 8192,
    "ttt_target": "hidden_states",
}
"""What a released configuration means by a field it leaves out (ByteDance-Seed/In-Place-TTT@be23248, both models of its
training code)."""

RELEASED_VALUES: dict[str, Values] = {"hidden_states": "hidden", "input_embed": "embeddings"}

REFUSED: Refusals = {
    **{name: NOT_FOR_US[name] for name in ("is_encoder_decoder", "per_layer_config", "tie_last_hidden_states")},
    **{
        name: (allowed, "it belongs to the model inside: set it in text_config, or give it to the call")
        for name, allowed in {
            "chunk_size_feed_forward": (0, None),
            "output_attentions": (False, None),
            "output_hidden_states": (False, None),
            "return_dict": (True, None),
        }.items()
    },
}
"""Options of transformers that would be without effect here."""


class InPlaceConfig(WithImports, PretrainedConfig):
    """Configuration of `InPlaceForCausalLM`.

    The defaults are those of the published training configurations.

    Args:
        text_config: the configuration of the language model inside, or its dict.
        layers: the layers whose MLPs are fast weights: an int for every n-th from the first on, or a list of numbers.
        chunk: tokens between updates.
        lr: the inner learning rate, a constant.
        values: what values are made of: the MLP's input ("hidden", for training that goes on from a finished model) or the
            embeddings of the tokens ("embeddings", for training from scratch).
        conv_width: tokens of a chunk that a value sees, centred; odd.
        projection: values are projected behind the convolution.
        ttt_form: "auto", "recurrent" or "parallel", as `kvbind.ttt` takes it.
        use_cache: generate with a cache.
        **kwargs: fields of transformers' `PretrainedConfig`. What concerns the model inside is set in `text_config`.

    Raises:
        ValueError: a field with a value that is not supported, an unknown one, or one that belongs to the model inside.
        TypeError: a field of another type.
    """

    model_type = "in_place_ttt"
    auto_home = "kvbind.models.in_place"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012
    keys_to_ignore_at_inference = list(CACHE_NAMES)  # noqa: RUF012

    def __init__(
        self,
        text_config: PretrainedConfig | dict[str, Any] | None = None,
        layers: int | list[int] = 6,
        chunk: int = 4096,
        lr: float = 3.0,
        values: Values = "hidden",
        conv_width: int = 5,
        projection: bool = True,
        ttt_form: Form = "auto",
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        check_positive_int("chunk", chunk)
        check_positive("lr", lr)
        check_choice("values", values, ("hidden", "embeddings"))
        check_positive_int("conv_width", conv_width)
        check_bool("projection", projection)
        check_choice("ttt_form", ttt_form, FORMS)
        if conv_width % 2 == 0:
            raise ValueError(f"conv_width must be odd, as the convolution is centred; got {conv_width}")
        # transformers makes one without arguments, to tell which fields are at their defaults
        self.text_config = _config_of({"model_type": "llama"} if text_config is None else text_config)
        self.layers = _check_layers(layers, self.text_config)
        self.chunk, self.lr, self.values = chunk, float(lr), values
        self.conv_width, self.projection, self.ttt_form, self.use_cache = conv_width, projection, ttt_form, use_cache
        own = inspect.signature(InPlaceConfig.__init__).parameters
        super().__init__(**inherited_fields("InPlaceConfig", kwargs, REFUSED, own))

    @property
    def inner(self) -> InnerLoop:
        """The inner loop of every fast layer."""
        return in_place_ttt(self.chunk)

    @property
    def fast_layers(self) -> tuple[int, ...]:
        """The numbers of the layers whose MLPs are fast weights."""
        if isinstance(self.layers, int):
            return tuple(range(0, self.text_config.num_hidden_layers, self.layers))
        return tuple(self.layers)

    @classmethod
    def from_released_config(cls, fields: dict[str, Any]) -> Self:
        """The configuration that a released JSON file stands for: that of a Llama or Qwen3 with fields `ttt_*`.

        Layers beyond the last are left out, as the released code does.

        Args:
            fields: the file's content.

        Raises:
            ValueError: fields without `ttt_mode`, or a value that is not supported.
        """
        given = {name: x for name, x in fields.items() if name.startswith("ttt_")}
        if unknown := sorted(given.keys() - RELEASED_DEFAULTS.keys()):
            raise ValueError(f"fields must have no ttt_ field but {', '.join(RELEASED_DEFAULTS)}; got {', '.join(unknown)}")
        if not given:
            raise ValueError("fields must be of a released In-Place TTT model, with ttt_layers and others; got none of them")
        released = RELEASED_DEFAULTS | given
        if not released["ttt_mode"]:
            raise ValueError("ttt_mode must be true in a model with fast weights; got false, a model without")
        check_choice("ttt_target", released["ttt_target"], tuple(RELEASED_VALUES))
        # the names of classes of the released code
        text_config = _config_of({name: x for name, x in fields.items() if name not in {*given, "auto_map"}})
        return cls(
            text_config=text_config,
            layers=[i for i in released["ttt_layers"] if i < text_config.num_hidden_layers],
            chunk=released["ttt_chunk"],
            lr=released["ttt_lr"],
            values=RELEASED_VALUES[released["ttt_target"]],
            projection=released["ttt_proj"],
        )


def _config_of(given: PretrainedConfig | dict[str, Any]) -> PretrainedConfig:
    """The configuration of the model inside."""
    if isinstance(given, PretrainedConfig):
        return given
    if not isinstance(given, dict):
        raise TypeError(f"text_config must be a configuration of transformers or its dict; got {type(given).__name__}")
    name = given.get("model_type")
    if not isinstance(name, str) or name not in CONFIG_MAPPING:
        raise ValueError(f"text_config must have the model_type of a model of transformers; got {name!r}")
    config: PretrainedConfig = CONFIG_MAPPING[name](**{key: x for key, x in given.items() if key != "model_type"})
    return config


def _check_layers(layers: Any, text_config: PretrainedConfig) -> int | list[int]:
    if not isinstance(layers, list | tuple):
        check_positive_int("layers (where it is no list)", layers)
        return int(layers)
    count = text_config.num_hidden_layers
    known = all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < count for i in layers)
    if not layers or not known or len(set(layers)) < len(layers):
        raise ValueError(
            f"layers must be an int, for every n-th, or a list of different numbers from 0 to {count - 1}; got {layers!r}"
        )
    return sorted(layers)
