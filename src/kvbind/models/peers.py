"""What stands beside the LaCT language model where it is compared: a Llama of its sizes, and that with In-Place TTT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kvbind.models.lact.config import LactConfig

if TYPE_CHECKING:
    from kvbind.models.in_place import InPlaceForCausalLM

CAUSAL = "kvbind_causal_sdpa"
"""transformers' SDPA under a name for which it makes no mask. Compiled or captured it would make a dense one, with which no
flash attention runs."""


def llama(config: LactConfig) -> LlamaForCausalLM:
    """A Llama of the same width, depth, heads, MLP and vocabulary, with random weights on the current device."""
    AttentionInterface.register(CAUSAL, sdpa_attention_forward)
    fields: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attn_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "initializer_range": config.initializer_range,
        "rms_norm_eps": config.norm_eps,
        "attn_implementation": CAUSAL,
        # none of the random tokens is special
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")),
    }
    return LlamaForCausalLM(LlamaConfig(**fields))


def in_place_llama(config: LactConfig) -> InPlaceForCausalLM:
    """That Llama with fast MLPs, for training from scratch: chunks as long as the inner loop's, values of embeddings."""
    from kvbind.models.in_place import InPlaceForCausalLM

    return InPlaceForCausalLM.from_base(llama(config), chunk=config.inner.chunk or 1, values="embeddings")
