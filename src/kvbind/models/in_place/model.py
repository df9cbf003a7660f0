"""In-Place TTT as a model of transformers: a decoder with gated MLPs, some of which are fast weights (arXiv 2604.06169)."""

from __future__ import annotations

import logging
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from kvbind.forms.validation import check_cu_seqlens
from kvbind.kernels.common.tracing import is_mapped
from kvbind.layers.in_place.chunk_plan import ChunkPlan, documents_of, plan_of
from kvbind.layers.in_place.layer import Call, InPlaceMLP
from kvbind.models.in_place.cache import InPlaceCache
from kvbind.models.in_place.config import REFUSED, InPlaceConfig
from kvbind.models.lact.cache import CACHE, CACHE_NAMES, given_cache
from kvbind.models.lact.inputs import check_padding_side, check_tokens
from kvbind.models.options import check_options, known_by_name
from kvbind.models.recompute import is_recomputed, is_reentrant
from kvbind.models.saving import FromFolder

log = logging.getLogger("kvbind.models")

CALL = "in_place_call"
"""The keyword argument by which a call travels through the model to its layers, also where these are recomputed."""


class HandOver:
    """A hook on a layer's attention: takes the call from its arguments, and gives it to the layer's MLP.

    What a block's attention gets passes through whatever surrounds the block: checkpoints, wrappers, offloaders.

    Args:
        mlp: of the same layer; None where it is no fast one.
    """

    def __init__(self, mlp: InPlaceMLP | None) -> None:
        self.mlp = mlp

    def __call__(self, attention: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """A pre-hook with keyword arguments."""
        kwargs = dict(kwargs)
        call = kwargs.pop(CALL, None)
        if self.mlp is not None:
            self.mlp.call = call
        return args, kwargs


class InPlaceForCausalLM(FromFolder, PreTrainedModel, GenerationMixin):
    """A causal language model of transformers, in some of whose layers the MLP is written as it reads.

    It is called, trained and generated with as the model inside. Its outputs are those of that model until the new
    parameters are trained. Positions `[B, T]` that do not rise by one, without a mask and a cache, start a new document, for
    fast weights as for attention.

    Args:
        config: the configuration.
        base: the model inside, whose modules are taken as they are; by default one with random weights.

    Attributes:
        base: the model inside, with its MLPs exchanged. It is not to be called by itself.

    Raises:
        ValueError: a model inside whose layers do not fit.
    """

    config: InPlaceConfig
    config_class = InPlaceConfig
    base_model_prefix = "base"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = list(CACHE_NAMES)  # noqa: RUF012
    # which attention runs is for the model inside
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # generation cannot roll back, which rules out assisted decoding
    _is_stateful = True

    def __init__(self, config: InPlaceConfig, base: PreTrainedModel | None = None) -> None:
        check_options(config, REFUSED)
        super().__init__(config)
        if base is None:
            base = AutoModelForCausalLM.from_config(config.text_config)
        else:
            for module in base.modules():
                # what is given is not drawn anew
                module._is_hf_initialized = True  # type: ignore[assignment]
        self.base = base
        _check_layers(base)
        self._exchange(_layers_of(base))
        self.generation_config = base.generation_config
        self.post_init()

    def _exchange(self, layers: nn.ModuleList) -> None:
        """Put fast MLPs in place of the chosen layers' own."""
        config = self.config
        for i, layer in enumerate(layers):
            fast = None
            if i in config.fast_layers:
                fast = InPlaceMLP(
                    layer.get_submodule("mlp"), i, chunk=config.chunk, lr=config.lr, conv_width=config.conv_width,
                    projection=config.projection, form=config.ttt_form,
                )  # fmt: skip
                layer.mlp = fast
            layer.get_submodule("self_attn").register_forward_pre_hook(HandOver(fast), with_kwargs=True)

    @classmethod
    def from_base(cls, base: PreTrainedModel, *, freeze_base: bool = False, **fields: Any) -> Self:
        """A model made of another, whose modules it takes: the other is then not to be called by itself.

        Args:
            base: a causal language model of transformers, such as `AutoModelForCausalLM.from_pretrained` returns. Adapters
                come after, on the result.
            freeze_base: train the new parameters alone.
            **fields: of `InPlaceConfig`: `layers`, `chunk`, `lr`, `values`, `conv_width`, `projection`, `ttt_form`.

        Raises:
            TypeError: no such model.
            ValueError: one whose layers do not fit, or a field that does not.
        """
        if not isinstance(base, PreTrainedModel) or not base.can_generate():
            raise TypeError(f"base must be a causal language model of transformers; got {type(base).__name__}")
        if any(isinstance(module, InPlaceMLP) for module in base.modules()):
            raise ValueError("base must be a model without fast MLPs; got one that has them already")
        # transformers hands these two on to the configuration inside
        shared = {"dtype": base.dtype, "attn_implementation": base.config._attn_implementation}
        config = InPlaceConfig(text_config=base.config, **shared, **fields)
        model = cls(config, base)
        tell_unread(config)
        if freeze_base:
            model.freeze_base()
        return model.train(base.training)

    @classmethod
    def from_released_config(cls, fields: dict[str, Any]) -> Self:
        """A model with random weights, built as a released configuration says.

        Args:
            fields: the content of the released JSON file.

        Raises:
            ValueError: as `InPlaceConfig.from_released_config`.
        """
        return cls(InPlaceConfig.from_released_config(fields))

    @classmethod
    def from_released(cls, folder: str, **kwargs: Any) -> Self:
        """The model of a released checkpoint's folder: a Llama or Qwen3 with `mlp.ttt_conv` and `mlp.ttt_proj`.

        Args:
            folder: as `from_pretrained` takes it.
            **kwargs: as `from_pretrained` takes them.

        Raises:
            ValueError: as `InPlaceConfig.from_released_config`.
        """
        fields, _ = PretrainedConfig.get_config_dict(folder)
        config = InPlaceConfig.from_released_config(fields)
        return cls.from_pretrained(folder, config=config, key_mapping={r"^(?!base\.)": "base."}, **kwargs)

    @property
    def fast_mlps(self) -> tuple[InPlaceMLP, ...]:
        """The MLPs that are fast weights, in order."""
        return tuple(module for module in self.base.modules() if isinstance(module, InPlaceMLP))

    def freeze_base(self) -> None:
        """Leave all parameters of the model inside as they are, and train the new ones."""
        self.base.requires_grad_(False)
        for mlp in self.fast_mlps:
            mlp.ttt_conv.requires_grad_(True)
            if mlp.ttt_proj is not None:
                mlp.ttt_proj.requires_grad_(True)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Draw what a loaded file lacks: the new parameters here, those of the model inside by its own rules."""
        for mlp in self.fast_mlps:
            for module in (mlp.ttt_conv, mlp.ttt_proj):
                # as transformers marks what has been drawn or loaded, here and on parameters
                if module is not None and not getattr(module, "_is_hf_initialized", False):
                    init.copy_(module.weight, module.start())
        super().initialize_weights()

    def get_input_embeddings(self) -> nn.Module:
        """Those of the model inside."""
        embeddings: nn.Module = self.base.get_input_embeddings()
        return embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Of the model inside."""
        self.base.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        """Those of the model inside."""
        embeddings: nn.Module | None = self.base.get_output_embeddings()
        return embeddings

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Of the model inside."""
        self.base.set_output_embeddings(new_embeddings)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: InPlaceCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """What the model inside returns for these arguments, with fast weights.

        Args:
            input_ids: `[B, T]` token ids; or `inputs_embeds`.
            attention_mask: `[B, T]`, 0 at padding, which writes nothing and may sit anywhere; with a cache
                `[B, columns + T]`.
            position_ids: `[B, T]` or `[1, T]`.
            past_key_values: an `InPlaceCache`, read and advanced; also as `cache`, its name in transformers since 5.24.
            inputs_embeds: `[B, T, d]`.
            labels: `[B, T]`, as the model inside takes them.
            use_cache: make or advance a cache; by default outside training, for unpacked input, as the configuration says.
            logits_to_keep: as the model inside takes it.
            **kwargs: further ones for the model inside, and `cache`.

        Raises:
            ValueError: arguments that do not fit together; the message names them.
            TypeError: the cache is no InPlaceCache.
        """
        # no named argument: a `generate` that knows it as past_key_values would pass it on without counting its tokens
        cache = given_cache(past_key_values, kwargs.pop("cache", None), InPlaceCache)
        given = check_tokens(input_ids, inputs_embeds)
        plan = self._plan((given.shape[0], given.shape[1]), attention_mask, position_ids, cache, kwargs)
        recomputed = torch.is_grad_enabled() and any(map(is_recomputed, _layers_of(self.base)))
        if use_cache is None:
            wanted = self.config.use_cache and not self.training and plan.documents is None and not recomputed
            use_cache = bool(wanted or cache is not None)
        if cache is not None and not use_cache:
            raise ValueError("use_cache must not be False beside a cache, which attention cannot read without advancing it")
        if use_cache and plan.documents is not None:
            raise ValueError("use_cache must be False for packed documents, which have no one state")
        if use_cache and recomputed:
            raise ValueError("use_cache must be False under gradient checkpointing, which runs layers twice")
        if use_cache and cache is None:
            cache = InPlaceCache(self.config.text_config)

        source = None
        if self.config.values == "embeddings":
            source = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
            input_ids, inputs_embeds = None, source
            if source.requires_grad and recomputed and any(map(is_reentrant, _layers_of(self.base))):
                raise ValueError(
                    "gradient checkpointing must have use_reentrant=False where values are made of embeddings, whose "
                    "gradients would be lost: model.gradient_checkpointing_enable({'use_reentrant': False})"
                )
        call = Call(plan, source, {} if cache is None else cache.states, {} if cache is not None else None)
        output = self.base(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, inputs_embeds=inputs_embeds,
            labels=labels, use_cache=use_cache, logits_to_keep=logits_to_keep, **{CACHE: cache, CALL: call}, **kwargs,
        )  # fmt: skip
        if cache is not None and call.after is not None:
            cache.advance(call.after, plan.lengths)
        return output

    def _plan(
        self,
        shape: tuple[int, int],
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: InPlaceCache | None,
        kwargs: dict[str, Any],
    ) -> ChunkPlan:
        """Where a call's tokens sit."""
        seen, columns = ((), 0) if cache is None else (cache.seen, cache.get_seq_length())
        if seen and len(seen) != shape[0]:
            raise ValueError(f"cache must hold {shape[0]} sequences, as the input has; it holds {len(seen)}")
        for name, x in (("attention_mask", attention_mask), ("position_ids", position_ids)):
            if isinstance(x, Tensor) and is_mapped(x):
                raise ValueError(
                    f"{name} must be the same for all that vmap runs at once, as it says where tokens are; loop over it"
                )
        real, documents = None, None
        if attention_mask is not None:
            if not isinstance(attention_mask, Tensor) or tuple(attention_mask.shape) != (shape[0], columns + shape[1]):
                found = list(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
                raise ValueError(
                    f"attention_mask must be [B, T] = {[shape[0], columns + shape[1]]}, columns in the cache included, as "
                    f"it says which tokens are padding; got {found}"
                )
            real = attention_mask[:, columns:] != 0
        elif position_ids is not None and not columns and shape[1] > 1:
            documents = documents_of(position_ids.expand(shape), shape[1])
        bounds = kwargs.get("cu_seq_lens_q")
        if bounds is not None and documents is None:
            documents = check_cu_seqlens(bounds, *shape)
        if documents is not None and (real is not None or columns):
            raise ValueError("cu_seq_lens_q must be None beside an attention_mask or a cache: a packed row has neither")
        return plan_of(shape, self.config.chunk, seen, real=real, documents=documents)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation must be None: this model has one kind of cache; got "
                f"{generation_config.cache_implementation!r}"
            )
        check_padding_side(model_kwargs.get("attention_mask"))
        if model_kwargs.get(CACHE) is None and generation_config.use_cache is not False:
            model_kwargs[CACHE] = InPlaceCache(self.config.text_config)
            return None
        parent: Any = super()
        return parent._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)


known_by_name(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, InPlaceForCausalLM)


def tell_unread(config: InPlaceConfig) -> None:
    """Warn where no update is ever read, as a sequence ends within its first chunk."""
    positions = getattr(config.text_config, "max_position_embeddings", None)
    if isinstance(positions, int) and config.chunk >= positions:
        log.warning(
            "chunk is %s, and the model inside knows %s positions: within those, no token reads an update; a chunk of at "
            "most %s would let some", f"{config.chunk:,}", f"{positions:,}", f"{max(positions // 4, 1):,}",
        )  # fmt: skip


def _layers_of(base: PreTrainedModel) -> nn.ModuleList:
    """The blocks of a decoder."""
    layers: nn.ModuleList = base.get_decoder().layers
    return layers


def _check_layers(base: PreTrainedModel) -> None:
    """Refuse a model in whose blocks fast MLPs would not be told whose tokens they get.

    Raises:
        ValueError: it keeps no list of blocks, or blocks of another build.
    """
    name = type(base).__name__
    layers = getattr(base.get_decoder(), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"base must be a decoder with its blocks in `layers`; {name} has no such list")
    for i, layer in enumerate(layers):
        for part in ("self_attn", "mlp"):
            if not isinstance(getattr(layer, part, None), nn.Module):
                raise ValueError(f"every block of base must have self_attn and mlp; {name}'s layer {i} has no {part}")
