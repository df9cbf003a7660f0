"""What of a configuration an engine can run. Nothing here needs one."""

from __future__ import annotations

import inspect
from functools import cache

import torch

from kvbind.inner.projections import Projections
from kvbind.inner.spec import InnerLoop
from kvbind.layers.fast_weights.layer import FastWeightLayer
from kvbind.layers.lact.layer import LactLayer
from kvbind.models.lact.config import LactConfig
from kvbind.serving.states import StateLayout

SERVED_FIELDS = frozenset(
    {
        "attn_qk_norm", "base_lr", "bos_token_id", "decode_dtype", "eos_token_id", "fw_init_gain", "hidden_ratio",
        "hidden_size", "inner", "initializer_range", "inter_multi", "intermediate_size", "lact_chunk_size",
        "learnable_ttt_scale", "max_position_embeddings", "no_v_silu", "norm_eps", "num_attn_heads", "num_hidden_layers",
        "num_lact_heads", "pad_token_id", "projections", "qkv_bias", "qkv_silu", "released_parameters", "rope_theta",
        "tie_word_embeddings", "ttt_form", "ttt_loss_type", "ttt_nope", "ttt_prenorm", "use_cache", "use_momentum",
        "use_muon", "vocab_size", "w0_w2_low_rank", "window_size",
    }
)  # fmt: skip
"""Fields of `LactConfig` that the served model computes by."""


def check_servable(
    config: LactConfig,
    *,
    ranks: int = 1,
    pipeline: int = 1,
    quantization: str | None = None,
    cache_dtype: str = "auto",
    speculative: str | None = None,
) -> None:
    """Refuse what cannot be served as it would be by the model itself.

    Args:
        config: of the model.
        ranks: that heads are divided over.
        pipeline: that layers are divided over.
        quantization: of weights.
        cache_dtype: of cached keys and values, where it is not the model's.
        speculative: the method of speculative decoding.

    Raises:
        ValueError: any of it; the message names the argument as vLLM has it.
    """
    for name, parameter in inspect.signature(LactConfig.__init__).parameters.items():
        known = name in SERVED_FIELDS or parameter.kind is not parameter.POSITIONAL_OR_KEYWORD or name == "self"
        if not known and getattr(config, name, parameter.default) != parameter.default:
            raise ValueError(
                f"{name} must be {parameter.default!r} in a model that vLLM serves, which has no such computation; got "
                f"{getattr(config, name)!r}"
            )
    for name, heads in (("num_attn_heads", config.num_attn_heads), ("num_lact_heads", config.num_lact_heads)):
        if heads % ranks:
            raise ValueError(f"tensor_parallel_size must divide {name} = {heads}; got {ranks}")
    if config.vocab_size < ranks:
        raise ValueError(f"tensor_parallel_size must be at most vocab_size = {config.vocab_size}; got {ranks}")
    plain = {
        "pipeline_parallel_size": (pipeline, 1, "layers are not divided over ranks; use tensor_parallel_size"),
        "quantization": (quantization, None, "quantized weights would change what fast weights learn"),
        "kv_cache_dtype": (cache_dtype, "auto", "pending keys and values are written into fast weights as they are"),
        "speculative_config": (speculative, None, "fast weights have no way back over a rejected token"),
    }
    for name, (value, only, why) in plain.items():
        if value != only:
            raise ValueError(f"{name} must be {only!r} for {type(config).__name__}: {why}; got {value!r}")
    state_layout(config, ranks)


def state_layout(config: LactConfig, ranks: int = 1) -> StateLayout:
    """How states of a layer are laid out on each of `ranks` ranks.

    Raises:
        ValueError: as `StateLayout.of`.
    """
    sizes = config.hidden_size, config.num_attn_heads, config.num_lact_heads
    return _layout(*sizes, config.inner, config.projections, config.inter_multi, ranks)


@cache
def _layout(
    hidden_size: int,
    num_attn_heads: int,
    num_lact_heads: int,
    inner: InnerLoop,
    projections: Projections | None,
    multiplier: float,
    ranks: int,
) -> StateLayout:
    layer: LactLayer | FastWeightLayer
    with torch.device("meta"):
        if projections is None:
            layer = LactLayer(hidden_size, num_attn_heads, num_lact_heads, inner, 1, hidden_multiplier=multiplier)
        else:
            layer = FastWeightLayer(hidden_size, num_lact_heads, inner, projections, hidden_multiplier=multiplier)
    return StateLayout.of(layer.eval(), ranks)
