"""The LaCT language model as vLLM runs it: one row of tokens of many sequences, with parameters of the saved names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.mamba_utils import get_temporal_copy_spec
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid, SupportsMambaPrefixCaching
from vllm.model_executor.models.utils import maybe_prefix

from kvbind.layers.layout import Layout
from kvbind.layers.norm import RMSNorm
from kvbind.layers.rotary import rotary_tables
from kvbind.models.lact.config import LactConfig
from kvbind.serving.checks import state_layout
from kvbind.serving.layer import ServedBlock, blocks


class ServedLactModel(nn.Module):
    """Embeddings, blocks and last norm.

    Args:
        vllm_config: vLLM's configuration.
        prefix: the model's name in vLLM.
    """

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config: LactConfig = vllm_config.model_config.hf_config
        self.config = config
        self.embeddings = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            [ServedBlock(config, vllm_config, f"{prefix}.layers.{i}") for i in range(config.num_hidden_layers)]
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps)

    def forward(self, input_ids: Tensor | None, positions: Tensor, inputs_embeds: Tensor | None = None) -> Tensor:
        """Hidden states `[T, d]` of tokens at `positions` `[T]`."""
        x = (self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds)[None]
        width = self.config.hidden_size // self.config.num_attn_heads
        layout = Layout(positions[None])
        tables = rotary_tables(layout.positions, width, self.config.rope_theta)
        for block in blocks(self.layers):
            x = block(x, layout, tables)
        output: Tensor = self.norm(x)[0]
        return output


class ServedLactForCausalLM(nn.Module, HasInnerState, IsHybrid, SupportsMambaPrefixCaching):
    """The model, as vLLM asks for it.

    Args:
        vllm_config: vLLM's configuration.
        prefix: the model's name in vLLM.
    """

    has_inner_state: ClassVar[Literal[True]] = True
    is_hybrid: ClassVar[Literal[True]] = True

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: LactConfig = vllm_config.model_config.hf_config
        self.config = config
        self.model = ServedLactModel(vllm_config, maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, prefix=maybe_prefix(prefix, "lm_head"))
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embeddings)
        self.logits_processor = LogitsProcessor(config.vocab_size)

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
        """The shape of a layer's state on one rank."""
        config = vllm_config.model_config.hf_config
        return ((state_layout(config, vllm_config.parallel_config.tensor_parallel_size).size,),)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        """States are in float32, whatever the model is in."""
        return (torch.float32,)

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[Any, ...]:
        """A state is copied whole."""
        return (get_temporal_copy_spec,)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Embeddings of tokens."""
        embedded: Tensor = self.model.embeddings(input_ids)
        return embedded

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Hidden states of a step's tokens `[T, d]`."""
        hidden: Tensor = self.model(input_ids, positions, inputs_embeds)
        return hidden

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Logits `[T, vocab]`."""
        logits: Tensor | None = self.logits_processor(self.lm_head, hidden_states)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Take parameters by their saved names.

        Raises:
            ValueError: a weight that the model has no use for, or one of another shape.
        """
        parameters, loaded = dict(self.named_parameters()), set()
        for name, weight in weights:
            if name not in parameters:
                if name == "lm_head.weight" and self.config.tie_word_embeddings:
                    continue
                raise ValueError(f"weights must be those of the configuration, which has no {name!r}")
            parameter = parameters[name]
            try:
                getattr(parameter, "weight_loader", default_weight_loader)(parameter, weight)
            except (AssertionError, RuntimeError) as error:
                raise ValueError(f"weights must fit the configuration; {name!r} of {list(weight.shape)} does not") from error
            loaded.add(name)
        for block in blocks(self.model.layers):
            block.forget_start()
        return loaded
