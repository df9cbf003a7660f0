"""The LaCT language model as a transformers model (arXiv 2505.23884): a pre-norm decoder of `LactLayer`s and SwiGLU MLPs.

With `LactConfig.projections` its mixers are `FastWeightLayer`s, as other systems have them.

Parameters have the names of the released checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from kvbind.kernels.common.tracing import is_exported
from kvbind.layers.fast_weights.layer import FastWeightLayer
from kvbind.layers.lact.layer import LactLayer
from kvbind.layers.norm import RMSNorm
from kvbind.layers.plain_modules import is_a_product
from kvbind.layers.rotary import rotary_tables
from kvbind.models.lact.blocks import LactBlock
from kvbind.models.lact.cache import CACHE, CACHE_NAMES, LactCache, MixerState, given_cache
from kvbind.models.lact.config import REFUSED, LactConfig
from kvbind.models.lact.decoding import decode, stands_for
from kvbind.models.lact.inputs import Arrangement, arrange, check_padding_side, check_tokens
from kvbind.models.lact.loss import IGNORE, cross_entropy, linear_cross_entropy, next_token_labels
from kvbind.models.options import check_options, known_by_name
from kvbind.models.recompute import check_recomputing, is_recomputed, is_reentrant
from kvbind.models.saving import FromFolder
from kvbind.sequence.boundaries import Boundaries
from kvbind.sequence.shard import current_shard


class LactPreTrainedModel(FromFolder, PreTrainedModel):
    """What `LactModel` and `LactForCausalLM` share: configuration, initialization, and what transformers may do to them."""

    config: LactConfig
    config_class = LactConfig
    base_model_prefix = "model"
    _input_embed_layer = "embeddings"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LactBlock"]  # noqa: RUF012
    _skip_keys_device_placement = list(CACHE_NAMES)  # noqa: RUF012
    _supports_sdpa = True
    # generation cannot roll back, which rules out assisted decoding
    _is_stateful = True

    def __init__(self, config: LactConfig) -> None:
        check_options(config, REFUSED)
        super().__init__(config)

    def set_attn_implementation(self, attn_implementation: str | dict[str, str], *args: Any, **kwargs: Any) -> None:
        """Refused, but for "sdpa": which attention runs where is not left to choose.

        Raises:
            ValueError: another name.
        """
        if attn_implementation != "sdpa":
            allowed, reason = REFUSED["attn_implementation"]
            raise ValueError(f"attn_implementation must be {allowed[0]!r}, as {reason}; got {attn_implementation!r}")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, LactLayer | FastWeightLayer):
            module.reset_parameters()

    @classmethod
    def from_released_config(cls, fields: dict[str, Any]) -> Self:
        """A model with random weights, built as a released configuration says.

        Args:
            fields: the content of the released JSON file.

        Raises:
            ValueError: as `LactConfig.from_released_config`.
        """
        return cls(LactConfig.from_released_config(fields))


class LactModel(LactPreTrainedModel):
    """Embeddings, blocks and last norm.

    Args:
        config: the configuration.
    """

    def __init__(self, config: LactConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([LactBlock(config) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: LactCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | Sequence[int] | Boundaries | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: LactCache | None = None,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Hidden states of tokens.

        Args:
            input_ids: `[B, T]` token ids; or `inputs_embeds`.
            attention_mask: `[B, T]`, 0 at padding, which is neither attended to nor written and may sit anywhere; with
                a cache `[B, columns + T]`.
            position_ids: `[B, T]`; where they do not rise by one, a new document starts.
            past_key_values: a `LactCache`, read and, unless `use_cache=False`, advanced.
            inputs_embeds: `[B, T, d]` in place of `input_ids`.
            use_cache: make or advance a cache; by default outside training, for unpacked input, as the configuration says.
            cu_seqlens: `[n + 1]` boundaries of documents packed into one row (`B = 1`).
            output_attentions: must not be set: attention weights are never formed.
            output_hidden_states: also return the hidden states before each block and after the last norm; by default as the
                configuration says.
            return_dict: False for a tuple; by default as the configuration says.
            cache: another name of `past_key_values`, that of transformers since 5.24.

        Returns:
            `last_hidden_state` `[B, T, d]` (zero at padding), `hidden_states`, and the cache under transformers' name:
            `cache`, or `past_key_values` before 5.24.

        Raises:
            ValueError: arguments that do not fit together; the message names them.
            TypeError: the cache is no LactCache.
        """
        config = self.config
        check_tokens(input_ids, inputs_embeds)
        if output_attentions is None:
            output_attentions = config.output_attentions
        if output_attentions:
            raise ValueError("output_attentions must not be set: attention weights are never formed")
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        if return_dict is None:
            return_dict = config.return_dict
        cache = given_cache(past_key_values, cache, LactCache)
        if torch.is_grad_enabled() and any(map(is_recomputed, self.layers)):
            check_recomputing()
        x = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        arrangement = arrange(
            (x.shape[0], x.shape[1]),
            x.device,
            attention_mask,
            position_ids,
            cu_seqlens,
            seen=() if cache is None else cache.seen,
            columns=0 if cache is None else cache.columns,
        )
        if arrangement.uncacheable and (use_cache or cache is not None):
            raise ValueError(arrangement.uncacheable)
        if use_cache and is_exported():
            raise ValueError(
                "use_cache must be False in torch.export, as a cache counts its tokens; generate() runs unexported"
            )
        if use_cache is None:
            wanted = config.use_cache and not self.training and not arrangement.uncacheable and not is_exported()
            use_cache = bool(wanted or cache is not None)
        if use_cache and cache is None:
            cache = LactCache()
        if cache is not None and torch.is_grad_enabled() and any(map(is_reentrant, self.layers)):
            raise ValueError(
                "gradient checkpointing must have use_reentrant=False beside a cache, through whose state gradients would "
                "be lost: model.gradient_checkpointing_enable({'use_reentrant': False})"
            )

        x, states, every = self._run_blocks(x, arrangement, cache, bool(use_cache), bool(output_hidden_states))
        if cache is not None and use_cache:
            cache.advance(states, arrangement.shape[1])
        kept: dict[str, Any] = {CACHE: cache if use_cache else None}
        output = BaseModelOutputWithPast(last_hidden_state=x, hidden_states=every, **kept)
        return output.to_tuple() if return_dict is False else output

    def _run_blocks(
        self, x: Tensor, arrangement: Arrangement, cache: LactCache | None, return_state: bool, keep_all: bool
    ) -> tuple[Tensor, list[MixerState], tuple[Tensor, ...] | None]:
        """All blocks and the last norm: hidden states `[B, T, d]`, the states asked for, and every hidden state if so."""
        layout = arrangement.layout
        tables = rotary_tables(
            layout.positions, self.config.hidden_size // self.config.num_attn_heads, self.config.rope_theta
        )
        before: Sequence[MixerState | None] = (
            cache.states if cache is not None and cache.states else [None] * len(self.layers)
        )
        x = arrangement.apply(x)
        every, states = [], []
        for block, state in zip(self.layers, before, strict=True):
            if keep_all:
                every.append(arrangement.undo(x))
            x, after = block(x, layout, tables, state, return_state)
            if after is not None:
                states.append(after)
        x = arrangement.undo(self.norm(x))
        return x, states, (*every, x) if keep_all else None


class LactForCausalLM(LactPreTrainedModel, GenerationMixin):
    """`LactModel` with a projection to the vocabulary.

    Args:
        config: the configuration.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}  # noqa: RUF012

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        known_by_name(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, cls)

    def __init__(self, config: LactConfig) -> None:
        super().__init__(config)
        # transformers would tell it from the name of the class, which may be derived from this
        self.loss_type = "ForCausalLM"
        self.model = LactModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: LactCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | Sequence[int] | Boundaries | None = None,
        logits_to_keep: int | Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits, and the loss of predicting each label's token from the tokens before it.

        The loss is computed in pieces, so that no `[B, T, vocab]` matrix is formed for it; see `logits_to_keep`.

        Args:
            input_ids: `[B, T]`; or `inputs_embeds`.
            attention_mask: as `LactModel` takes it.
            position_ids: as `LactModel` takes them.
            past_key_values: a `LactCache`; also as `cache`, its name in transformers since 5.24.
            inputs_embeds: `[B, T, d]`.
            use_cache: make or advance a cache.
            cu_seqlens: `[n + 1]` boundaries of documents packed into one row.
            labels: `[B, T]`, aligned with the input (the model shifts them), -100 where nothing is predicted. Nothing is
                predicted across documents, nor at padding.
            logits_to_keep: of how many last positions (0: all), or of which, to return logits: indices `[n]` or, by
                sequence, `[B, n]`; or a mask `[B, T]`, for logits `[number of True, vocab]`. By default of all, but of
                none in training with labels.
            num_items_in_batch: what the summed loss is divided by; by default the number of predicted tokens.
            output_attentions: must not be set.
            output_hidden_states: also return every hidden state.
            return_dict: False for a tuple.
            **kwargs: `cache`; what transformers' data collators add for FlashAttention (`cu_seq_lens_q` and its like);
                what belongs to `generate` alone (`cache_position`, `stop_strings`, `tokenizer`) and is ignored; and
                `shift_labels` `[B, T]` in place of `labels`: what each position has to predict, shifted already, -100 where
                nothing. Inside `kvbind.sequence_parallel` there is no other way, and `num_items_in_batch` is needed, of the
                whole row: losses and gradients then add up over ranks. `kvbind.shard_batch` makes both.

        Returns:
            `loss` (float32 or wider), `logits` `[B, kept, vocab]` in the model's dtype, `hidden_states`, and the cache under
            transformers' name: `cache`, or `past_key_values` before 5.24.

        Raises:
            ValueError, TypeError: arguments that do not fit; the message names them.
        """
        # no named argument, as transformers' Trainer takes those for labels that every batch has
        shift_labels: Tensor | None = kwargs.pop("shift_labels", None)
        # nor `cache`: a `generate` that knows it as past_key_values would pass it on without counting its tokens
        cache = given_cache(past_key_values, kwargs.pop("cache", None), LactCache)
        cu_seqlens = _collated_bounds(cu_seqlens, kwargs)
        _check_labels(labels, shift_labels, num_items_in_batch)
        hidden_wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        asked = (inputs_embeds, labels, shift_labels, cu_seqlens, hidden_wanted or None, output_attentions or None)
        one_more = cache is not None and input_ids is not None and cache.is_initialized and input_ids.shape[1:] == (1,)
        if one_more and use_cache is not False and asked == (None,) * 6 and logits_to_keep in (None, 0, 1):
            assert cache is not None
            assert input_ids is not None
            logits = decode(self, cache, input_ids, attention_mask, position_ids)
            if logits is not None:
                return self._output(return_dict, logits=logits, **{CACHE: cache})
        outputs = self.model(
            input_ids,
            attention_mask,
            position_ids,
            cache,
            inputs_embeds,
            use_cache,
            cu_seqlens,
            output_attentions,
            output_hidden_states,
            return_dict=True,
        )
        hidden = outputs.last_hidden_state
        targets = None
        if shift_labels is not None:
            targets = shift_labels.to(hidden.device)
        elif labels is not None:
            targets = next_token_labels(
                labels.to(hidden.device),
                attention_mask=attention_mask,
                position_ids=position_ids,
                cu_seqlens=cu_seqlens,
            )
        loss, every = None, None
        if getattr(self, "_loss_function", None) is not None and targets is not None:
            every = self.lm_head(hidden)
            given = {"shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
            given = {name: x for name, x in given.items() if x is not None}
            loss = self.loss_function(logits=every, labels=labels, vocab_size=self.config.vocab_size, **given)
        elif targets is not None:
            loss, every = self._loss(hidden, targets, num_items_in_batch)
        logits = None
        if logits_to_keep is not None or targets is None or not self.training:
            logits = self.lm_head(_kept(hidden, logits_to_keep)) if every is None else _kept(every, logits_to_keep)
        kept: dict[str, Any] = {CACHE: getattr(outputs, CACHE)}
        return self._output(return_dict, loss=loss, logits=logits, hidden_states=outputs.hidden_states, **kept)

    def _output(self, return_dict: bool | None, **fields: Any) -> CausalLMOutputWithPast | tuple[Any, ...]:
        output = CausalLMOutputWithPast(**fields)
        return output.to_tuple() if (self.config.return_dict if return_dict is None else return_dict) is False else output

    def _loss(self, hidden: Tensor, targets: Tensor, count: Tensor | int | None) -> tuple[Tensor, Tensor | None]:
        """The loss, and the logits of all tokens where it took them."""
        count = (targets != IGNORE).sum().clamp(min=1) if count is None else count
        if is_a_product(self.lm_head) and self.lm_head.bias is None:
            return linear_cross_entropy(hidden, self.lm_head.weight, targets) / count, None
        # called once, for all tokens: what is put on it may count its calls, or draw at random
        logits = self.lm_head(hidden)
        return cross_entropy(logits, targets) / count, logits

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
            model_kwargs[CACHE] = LactCache()
            return None
        parent: Any = super()
        return parent._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)


known_by_name(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, LactForCausalLM)


def _check_labels(labels: Tensor | None, shift_labels: Tensor | None, count: Tensor | int | None) -> None:
    """One kind of labels; on a slice of a row those that need no token of the next slice, and the count of the whole row."""
    if labels is not None and shift_labels is not None:
        raise ValueError("at most one of labels and shift_labels may be given")
    if current_shard() is None:
        return
    if labels is not None:
        raise ValueError("labels must be shift_labels inside sequence_parallel, as kvbind.shard_batch makes them")
    if shift_labels is not None and count is None:
        raise ValueError(
            "num_items_in_batch must be the whole row's number of predicted tokens inside sequence_parallel, as "
            "kvbind.shard_batch makes it; got None"
        )


def _kept(hidden: Tensor, logits_to_keep: int | Tensor | None) -> Tensor:
    """Of `hidden` `[B, T, d]` the positions whose logits are wanted."""
    if not isinstance(logits_to_keep, Tensor):
        return hidden[:, -logits_to_keep:] if logits_to_keep else hidden
    if logits_to_keep.ndim < 2:
        return hidden[:, logits_to_keep]
    if logits_to_keep.dtype == torch.bool:
        return hidden[logits_to_keep]
    return hidden.take_along_dim(logits_to_keep[..., None], dim=1)


_COLLATED = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"})
"""What transformers' collator of flattened batches adds."""

_OF_GENERATION = frozenset({"assistant_tokenizer", "cache_position", "stop_strings", "tokenizer"})
"""What generation loops hand to every model, and no model of transformers reads."""


def _collated_bounds(
    cu_seqlens: Tensor | Sequence[int] | Boundaries | None, extra: dict[str, Any]
) -> Tensor | Sequence[int] | Boundaries | None:
    """`cu_seqlens`, or what transformers' collator of flattened batches calls it; nothing unknown may be in `extra`."""
    for name, value in extra.items():
        if name not in _COLLATED | _OF_GENERATION and value is not None:
            raise TypeError(f"LactForCausalLM.forward takes no argument {name!r}")
    return extra.get("cu_seq_lens_q") if cu_seqlens is None else cu_seqlens


stands_for(LactForCausalLM, LactModel, LactBlock)
